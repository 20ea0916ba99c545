"""Write a model anew: another dtype, vocabulary or shard size, and maybe scaled.

python passthrough_llama.py --ft_models A --dtype float16 --save OUT
"""

from merge_driver import make_driver

passthrough_merge_llama, passthrough_merge_llama_to_folder, main = make_driver(
    "passthrough", __name__, __doc__ or ""
)

if __name__ == "__main__":
    raise SystemExit(main())
