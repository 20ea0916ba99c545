"""Add the weighted task vectors of fine-tunes to their base.

python task_arithmetic_llama.py BASE --ft_models A B --weights 0.5 0.5 --save OUT
"""

from merge_driver import make_driver

task_arithmetic_merge_llama, task_arithmetic_merge_llama_to_folder, main = make_driver(
    "task_arithmetic", __name__, __doc__ or ""
)

if __name__ == "__main__":
    raise SystemExit(main())
