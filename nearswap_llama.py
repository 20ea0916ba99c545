"""Take a model's values where they are near the base's, and keep the base elsewhere.

python nearswap_llama.py BASE --ft_models A --t 0.0001 --save OUT
"""

from merge_driver import make_driver

nearswap_merge_llama, nearswap_merge_llama_to_folder, main = make_driver(
    "nearswap", __name__, __doc__ or ""
)

if __name__ == "__main__":
    raise SystemExit(main())
