"""Merge fine-tunes of one base by RAM: add what one alone has changed, average what several have.

python ram_llama.py BASE --ft_models A B --save OUT
"""

from merge_driver import make_driver

ram_merge_llama, ram_merge_llama_to_folder, main = make_driver("ram", __name__, __doc__ or "")

if __name__ == "__main__":
    raise SystemExit(main())
