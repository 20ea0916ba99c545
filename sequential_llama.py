"""Merge models one after the other by interpolation; their order matters.

python sequential_llama.py --ft_models A B C --weights 0.5 0.3 0.2 --save OUT
"""

from merge_driver import make_driver

sequential_merge_llama, sequential_merge_llama_to_folder, main = make_driver(
    "sequential", __name__, __doc__ or ""
)

if __name__ == "__main__":
    raise SystemExit(main())
