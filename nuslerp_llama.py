"""Merge two models by spherical interpolation with weights: whole tensors, rows or columns.

python nuslerp_llama.py --ft_models A B --weights 0.7 0.3 --save OUT
"""

from merge_driver import make_driver

nuslerp_merge_llama, nuslerp_merge_llama_to_folder, main = make_driver(
    "nuslerp", __name__, __doc__ or ""
)

if __name__ == "__main__":
    raise SystemExit(main())
