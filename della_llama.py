"""Merge fine-tunes of one base by DELLA: drop small changes more often, elect signs, average.

python della_llama.py BASE --ft_models A B --densities 0.5 0.5 --save OUT
"""

from merge_driver import make_driver

della_merge_llama, della_merge_llama_to_folder, main = make_driver("della", __name__, __doc__ or "")

if __name__ == "__main__":
    raise SystemExit(main())
