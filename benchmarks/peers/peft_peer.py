"""Merge cases with PEFT's tensor functions: `python peft_peer.py JOB.json`.

They merge task vectors tensor by tensor; the base is added here.
"""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from peft.utils import merge_utils
from safetensors.torch import load_file


def merge(call, names=None, *, add_base=True):
    """The merged tensors, joined."""
    base, *models = (load_file(Path(folder) / "model.safetensors") for folder in call["models"])
    function = getattr(merge_utils, call["function"])
    weights = torch.tensor(call["weights"])
    parts = []
    for name in sorted(base) if names is None else [name for name in names if name in base]:
        deltas = [model[name] - base[name] for model in models]
        merged = function(deltas, weights, **call["arguments"])
        parts.append((base[name] + merged if add_base else merged).flatten())
    return torch.cat(parts).numpy()


def moments(call, names, seeds):
    """Mean and variance of the merged task vector of some tensors over seeds."""
    values = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        values.append(merge(call, names, add_base=False).astype(np.float64))
    return np.mean(values, axis=0), np.var(values, axis=0, ddof=1)


def main(job):
    torch.set_num_threads(1)  # so that sums are always taken in the same order
    arrays = {key: merge(call) for key, call in job["recipes"].items()}
    for key, call in job["random"].items():
        mean, variance = moments(call, job["statistics"], job["seeds"])
        arrays[f"mean/{key}"], arrays[f"variance/{key}"] = mean, variance
    np.savez(job["arrays"], **arrays)
    versions = {package: version(package) for package in ("peft", "torch", "numpy")}
    versions["python"] = platform.python_version()
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    versions["platform"] = f"{platform.system()} {processor}"
    Path(job["versions"]).write_text(json.dumps(versions))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
