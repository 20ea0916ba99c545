"""Merge fine-tunes of one base by TIES: trim, elect signs, average the models that agree.

python ties_llama.py BASE --ft_models A B --densities 0.5 0.5 --save OUT
"""

from merge_driver import make_driver

ties_merge_llama, ties_merge_llama_to_folder, main = make_driver("ties", __name__, __doc__ or "")

if __name__ == "__main__":
    raise SystemExit(main())
