"""Merge fine-tunes of one base by SCE: select what differs most, weigh models by their changes.

python sce_llama.py BASE --ft_models A B --select_topk 0.1 --save OUT
"""

from merge_driver import make_driver

sce_merge_llama, sce_merge_llama_to_folder, main = make_driver("sce", __name__, __doc__ or "")

if __name__ == "__main__":
    raise SystemExit(main())
