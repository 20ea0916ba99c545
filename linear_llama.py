"""Average models of one architecture, with weights: a model soup.

python linear_llama.py --ft_models A B C --weights 0.5 0.3 0.2 --save OUT
"""

from merge_driver import make_driver

linear_merge_llama, linear_merge_llama_to_folder, main = make_driver(
    "linear", __name__, __doc__ or ""
)

if __name__ == "__main__":
    raise SystemExit(main())
