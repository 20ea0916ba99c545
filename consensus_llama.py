"""Add the changes of fine-tunes to their base where they matter to several of them.

python consensus_llama.py BASE --ft_models A B C --agreement 2 --save OUT
"""

from merge_driver import make_driver

consensus_merge_llama, consensus_merge_llama_to_folder, main = make_driver(
    "consensus", __name__, __doc__ or ""
)

if __name__ == "__main__":
    raise SystemExit(main())
