"""Merge fine-tunes of one base without their largest and smallest changes.

python breadcrumbs_llama.py BASE --ft_models A B --densities 0.9 0.9 --save OUT
"""

from merge_driver import make_driver

breadcrumbs_merge_llama, breadcrumbs_merge_llama_to_folder, main = make_driver(
    "breadcrumbs", __name__, __doc__ or ""
)

if __name__ == "__main__":
    raise SystemExit(main())
