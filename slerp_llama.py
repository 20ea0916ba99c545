"""Merge two models by spherical interpolation.

python slerp_llama.py --ft_models A B --t 0.5 --save OUT
"""

from merge_driver import make_driver

slerp_merge_llama, slerp_merge_llama_to_folder, main = make_driver("slerp", __name__, __doc__ or "")

if __name__ == "__main__":
    raise SystemExit(main())
