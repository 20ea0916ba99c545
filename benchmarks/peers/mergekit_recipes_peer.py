"""Recipes as mergekit carries them out, in its environment: `python THIS_FILE JOB.json`.

Of whole recipes: the merged tensors, config.json and tokens. Of others: which models and parameters
mergekit resolves for every tensor, as its methods are given them.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import mergekit.merge_methods.base as base
import numpy as np
import torch
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.multimerge import main as multimerge
from safetensors.torch import load_file

OPTIONS = MergeOptions(write_model_card=False, quiet=True, random_seed=1)


def merge(text, folder):
    """Merge a file with one recipe or several."""
    documents = [*yaml.safe_load_all(text)]
    if len(documents) == 1:
        run_merge(MergeConfiguration.model_validate(documents[0]), str(folder), OPTIONS)
        return
    file = folder.with_suffix(".yml")
    file.write_text(text)
    options = ["--out-path", str(folder), "--intermediate-dir", str(folder.with_suffix(".parts"))]
    result = CliRunner().invoke(
        multimerge, [str(file), *options, "--quiet", "--no-write-model-card", "--random-seed", "1"]
    )
    if result.exception is not None:
        raise result.exception


def outcome(text, folder):
    """Everything in a merged folder that is compared, and its values one after the other."""
    merge(text, folder)
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    names = sorted(tensors)
    tokenizer = folder / "tokenizer.json"
    told = {
        "tensors": {name: [str(tensors[name].dtype), list(tensors[name].shape)] for name in names},
        "config": json.loads((folder / "config.json").read_text()),
        "tokens": tokens_of(json.loads(tokenizer.read_text())) if tokenizer.exists() else {},
    }
    values = [tensors[name].to(torch.float32).numpy().ravel() for name in names]
    return told, np.concatenate(values)


def tokens_of(tokenizer):
    added = {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}
    return tokenizer["model"]["vocab"] | added


def resolve(recipe, folder):
    """What the methods are given, by tensor: the models' names, and parameters."""
    found = {}
    execute = base.MergeMethod._execute_resolved

    def record(self, groups, parameters, **settings):
        for group, given in zip(groups, parameters, strict=True):
            inputs = [str(entry.id) for entry in group.entries]
            plain = {
                key: {str(model): each for model, each in value.items()}
                if isinstance(value, base.PerInputValues)
                else value
                for key, value in given.items()
            }
            found[group.metadata.name] = {"inputs": inputs, "parameters": plain}
        return execute(self, groups, parameters, **settings)

    base.MergeMethod._execute_resolved = record
    try:
        run_merge(MergeConfiguration.model_validate(recipe), str(folder), OPTIONS)
    finally:
        base.MergeMethod._execute_resolved = execute
    return found


def main(job):
    torch.set_num_threads(1)
    folder = Path(job["folder"])
    told, arrays = {}, {}
    for name, text in job["recipes"].items():
        told[name], arrays[name] = outcome(text, folder / name)
    resolved = {
        name: resolve(recipe, folder / "resolved") for name, recipe in job["resolved"].items()
    }
    packages = ("mergekit", "torch", "transformers")
    versions = {package: version(package) for package in packages}
    np.savez(job["arrays"], **arrays)
    result = {"versions": versions, "recipes": told, "resolved": resolved}
    Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
