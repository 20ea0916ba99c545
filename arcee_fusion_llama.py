"""Take a model's values where its changes matter most, and keep the base elsewhere.

python arcee_fusion_llama.py BASE --ft_models A --save OUT
"""

from merge_driver import make_driver

arcee_fusion_merge_llama, arcee_fusion_merge_llama_to_folder, main = make_driver(
    "arcee_fusion", __name__, __doc__ or ""
)

if __name__ == "__main__":
    raise SystemExit(main())
