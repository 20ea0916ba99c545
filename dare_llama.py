"""Merge fine-tunes of one base by DARE: drop changes at random, rescale the rest, add.

python dare_llama.py BASE --ft_models A B --densities 0.5 0.5 --save OUT
"""

from merge_driver import make_driver

dare_merge_llama, dare_merge_llama_to_folder, main = make_driver("dare", __name__, __doc__ or "")

if __name__ == "__main__":
    raise SystemExit(main())
