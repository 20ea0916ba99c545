"""What mergekit makes of recipes, pinned by benchmarks/recipes.py, and how far ours is from it."""

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.tiny_checkpoints import read_tensors

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
TOLD = FIXTURES / "mergekit_recipes.json"
ARRAYS = FIXTURES / "mergekit_recipes.npz"
RANDOM = FIXTURES / "mergekit_resolved.json"
RECIPES = sorted((ROOT / "tests" / "recipes").glob("*.yml"))

DIGITS = {"torch.float16": 11, "torch.bfloat16": 8, "torch.float32": 24}
AT_RANDOM = ("dare", "multimerge")
LIMIT = 3.0
"""Units of the last place of a tensor's largest value, for sums taken in another order."""

EXACT_AS_WRITTEN = (
    *("gradient-slerp", "lazymergekit-slerp", "linear"),
    *("lazymergekit-passthrough", "orcamini-platy-44layer"),
)
"""Recipes whose methods mergekit computes in float32, whatever their dtype."""

OTHER_DTYPE = "written/arcee_fusion"
"""mergekit writes float32 there, whatever the recipe says."""

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")

LOADERS = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures")
"""Entries of config.json that say who wrote it."""


class Pinned(NamedTuple):
    """What mergekit made of the recipes: names, shapes, configs, tokens; and values."""

    told: dict[str, Any]
    arrays: dict[str, Any]


@functools.cache
def pinned() -> Pinned:
    with np.load(ARRAYS) as loaded:
        return Pinned(json.loads(TOLD.read_text()), {key: loaded[key] for key in loaded.files})


def in_float32(text: str) -> str:
    """A recipe that is carried out and written in float32."""
    changed = re.sub(r"(?m)^dtype: \w+", "dtype: float32", text)
    return changed if changed != text or "dtype:" in text else _each_in_float32(text)


def _each_in_float32(text: str) -> str:
    return "---\n".join(f"{part}dtype: float32\n" for part in text.split("---\n"))


@dataclass
class Difference:
    """How far a result of ours is from mergekit's.

    Attributes:
        tensors, layers: of the result.
        random: nothing of the values can be compared.
        equal: share of equal entries.
        most: largest distance, in units of the last place of a tensor's largest value.
        others: what else differs: names, shapes, dtypes, entries of config.json, tokens.
    """

    tensors: int
    layers: int
    random: bool
    equal: float
    most: float
    others: list[str]

    @property
    def told(self) -> str:
        return f"{100 * self.equal:.2f}%, {self.most:.3g}"


def compare_recipe(key: str, folder: Path) -> Difference:
    """Our result of a recipe beside mergekit's."""
    told = pinned().told["recipes"][key]
    ours = read_tensors(folder)
    config = json.loads((folder / "config.json").read_text())
    theirs = _split(told["tensors"], pinned().arrays[key])
    others = []
    for name in sorted(ours.keys() | theirs.keys()):
        dtype, shape = told["tensors"].get(name, ("", []))
        own = "none"
        if name in ours:
            own = f"{ours[name].dtype} {[*ours[name].shape]}"
        if own != f"{dtype} {shape}" and not (key == OTHER_DTYPE and own.endswith(str(shape))):
            others.append(f"{name}: {own}, {dtype} {shape}")
    others += [
        f"config {entry}: {config[entry]} {value}"
        for entry, value in told["config"].items()
        if entry in config and entry not in LOADERS and config[entry] != value
    ]
    order = _same_tokens(told["tokens"], _tokens(folder), others)
    equal, most, count = 0, 0.0, 0
    for name in ours.keys() & theirs.keys():
        one, two = ours[name].float().numpy(), theirs[name]
        if one.shape != two.shape:
            continue
        if order is not None and one.shape[0] == len(order) and name in VOCABULARY:
            two = two[order]
        digits = DIGITS[str(ours[name].dtype)]
        unit = 2.0 ** (np.floor(np.log2(np.abs(two).max())) - digits + 1)
        most = max(most, float(np.abs(one - two).max() / unit))
        equal, count = equal + int((one == two).sum()), count + one.size
    random = any(word in key for word in AT_RANDOM)
    return Difference(len(ours), config["num_hidden_layers"], random, equal / count, most, others)


def _split(tensors: dict[str, Any], values: Any) -> dict[str, Any]:
    sizes = [int(np.prod(shape)) for _, shape in tensors.values()]
    parts = np.split(values, np.cumsum(sizes)[:-1])
    return {
        name: part.reshape(shape)
        for (name, (_, shape)), part in zip(tensors.items(), parts, strict=True)
    }


def _tokens(folder: Path) -> dict[str, int]:
    content = json.loads((folder / "tokenizer.json").read_text())
    added = {entry["content"]: entry["id"] for entry in content["added_tokens"]}
    return {**content["model"]["vocab"], **added}


def _same_tokens(theirs: dict[str, int], ours: dict[str, int], others: list[str]) -> Any:
    """From our ids to theirs, if they are not the same; a different set of tokens is told."""
    if theirs.keys() != ours.keys():
        others.append(f"tokens {sorted(theirs.keys() ^ ours.keys())[:5]}")
        return None
    if theirs == ours:
        return None
    by_id = sorted(ours, key=ours.__getitem__)
    return np.array([theirs[token] for token in by_id])
