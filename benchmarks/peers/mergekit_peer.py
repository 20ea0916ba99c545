"""Merge cases with mergekit, in an environment that has it: `python mergekit_peer.py JOB.json`.

Each recipe is what mergekit-yaml would read from a file. Of some the result is also computed in
float64, and of some the mean and variance over random seeds.
"""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file


def merge(recipe, folder, dtype="float32", seed=None):
    """The merged tensors by name."""
    options = MergeOptions(
        copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=seed
    )
    recipe = recipe | {"dtype": dtype, "out_dtype": dtype}
    run_merge(MergeConfiguration.model_validate(recipe), str(folder), options)
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def joined(tensors, names=None):
    return np.concatenate([tensors[name].ravel() for name in names or sorted(tensors)])


def moments(recipe, folder, names, base, seeds):
    """Mean and variance of the merged task vector of some tensors over seeds."""
    names = [name for name in names if name in base]
    start = joined(base, names).astype(np.float64)
    values = [joined(merge(recipe, folder, seed=seed), names) - start for seed in range(seeds)]
    return np.mean(values, axis=0), np.var(values, axis=0, ddof=1)


def main(job):
    torch.set_num_threads(1)  # so that sums are always taken in the same order
    folder = Path(job["folder"])
    arrays = {key: joined(merge(recipe, folder)) for key, recipe in job["recipes"].items()}
    for key in job["exact"]:
        exact = joined(merge(job["recipes"][key], folder, dtype="float64"))
        arrays[f"off/{key}"] = exact - arrays[key]
    for key, recipe in job["random"].items():
        base = load_file(Path(recipe["base_model"]) / "model.safetensors")
        base = {name: tensor.numpy() for name, tensor in base.items()}
        mean, variance = moments(recipe, folder, job["statistics"], base, job["seeds"])
        arrays[f"mean/{key}"], arrays[f"variance/{key}"] = mean, variance
    np.savez(job["arrays"], **arrays)
    packages = ("mergekit", "torch", "transformers", "numpy")
    versions = {package: version(package) for package in packages}
    versions["python"] = platform.python_version()
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    versions["platform"] = f"{platform.system()} {processor}"
    Path(job["versions"]).write_text(json.dumps(versions))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
