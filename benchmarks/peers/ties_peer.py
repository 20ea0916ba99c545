"""Merge cases by the rule of the TIES authors: `python ties_peer.py JOB.json`.

The rule works on the whole model as one vector: of each task vector all entries are kept that reach
the magnitude of rank n - int(density n) from below; each entry's sign is that of the sum of what is
kept, or where that is 0 the sign of all these signs summed; the entries of that sign are averaged,
or summed. `authors` in the job names a file with the authors' own function `ties_merging`; then its
results are taken, and must be equal to those of the rule.
"""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file


def merged_task_vector(deltas, density, reduction):
    """The rule, on a matrix with a row for each model."""
    magnitudes = deltas.abs()
    rank = deltas.shape[1] - int(deltas.shape[1] * density)
    smallest = magnitudes.sort(dim=1).values[:, rank - 1 : rank]
    kept = torch.where(magnitudes >= smallest, deltas, 0.0)
    signs = kept.sum(dim=0).sign()
    signs = torch.where(signs == 0, signs.sum().sign(), signs)
    agrees = torch.where(signs > 0, kept > 0, kept < 0)
    total = torch.where(agrees, kept, 0.0).sum(dim=0)
    return total / agrees.sum(dim=0).clamp(min=1) if reduction == "mean" else total


def authors_function(file):
    """`ties_merging` as the authors wrote it."""
    found = {"torch": torch}
    exec(compile(Path(file).read_text(), file, "exec"), found)
    return found["ties_merging"]


def joined(folder):
    tensors = load_file(Path(folder) / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def merge(call, authors):
    base, *models = (joined(folder) for folder in call["models"])
    deltas = torch.vstack(models) - base
    merged = merged_task_vector(deltas, call["density"], call["reduction"])
    if authors is not None:
        theirs = authors(deltas, call["density"], f"dis-{call['reduction']}")
        if not torch.equal(theirs, merged):
            raise SystemExit(f"the authors' function differs from the rule: {call}")
    return (base + call["lam"] * merged).numpy()


def main(job):
    torch.set_num_threads(1)  # so that sums are always taken in the same order
    authors = authors_function(job["authors"]) if job["authors"] else None
    np.savez(job["arrays"], **{key: merge(call, authors) for key, call in job["recipes"].items()})
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    versions = {
        "rule": "equal to the authors' function" if authors else "not run by the authors' function",
        "torch": version("torch"),
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {processor}",
    }
    Path(job["versions"]).write_text(json.dumps(versions))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
