"""Merge models at the mean of their directions on the sphere, with their mean length.

python karcher_llama.py --ft_models A B C --save OUT
"""

from merge_driver import make_driver

karcher_merge_llama, karcher_merge_llama_to_folder, main = make_driver(
    "karcher", __name__, __doc__ or ""
)

if __name__ == "__main__":
    raise SystemExit(main())
