"""Merge models by the weighted mean of their directions, with their mean length.

python multislerp_llama.py --ft_models A B C --weights 0.5 0.3 0.2 --save OUT
"""

from merge_driver import make_driver

multislerp_merge_llama, multislerp_merge_llama_to_folder, main = make_driver(
    "multislerp", __name__, __doc__ or ""
)

if __name__ == "__main__":
    raise SystemExit(main())
