"""Go from the base towards the mean of its fine-tunes, as far as their angles say.

python model_stock_llama.py BASE --ft_models A B --save OUT
"""

from merge_driver import make_driver

model_stock_merge_llama, model_stock_merge_llama_to_folder, main = make_driver(
    "model_stock", __name__, __doc__ or ""
)

if __name__ == "__main__":
    raise SystemExit(main())
