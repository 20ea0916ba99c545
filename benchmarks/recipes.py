"""Run published recipes with mergekit and here, and compare every tensor.

    python -m venv mk5 && mk5/bin/pip install mergekit==0.1.5
    python benchmarks/recipes.py --mergekit mk5/bin/python

Makes small models of as many layers as the recipes of tests/recipes name, has mergekit carry these
out in an environment of its own, once as they are written and once in float32 on the same models
stored in float32, and draws random recipes of which it asks what mergekit resolves for each tensor.
Pins all that in tests/fixtures, then merges here and writes docs/parity_recipes.md. Without
--mergekit, only the latter. Takes three minutes.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import merge  # noqa: E402
from benchmarks.random_recipes import LAYERS, MODELS, RecipeMaker  # noqa: E402
from benchmarks.recipe_models import SIZES, make_recipe_models  # noqa: E402
from benchmarks.recipe_parity import (  # noqa: E402
    ARRAYS,
    RANDOM,
    RECIPES,
    TOLD,
    Difference,
    compare_recipe,
    in_float32,
    pinned,
)
from tests.tiny_checkpoints import make_llama  # noqa: E402

PEER = ROOT / "benchmarks" / "peers" / "mergekit_recipes_peer.py"
DOCUMENT = ROOT / "docs" / "parity_recipes.md"
COUNT = 50


def make_models(folder: Path) -> None:
    make_recipe_models(folder / "written")
    make_recipe_models(folder / "float32", "float32")
    for seed, name in enumerate(MODELS):
        make_llama(
            folder / "random" / name, layers=LAYERS, seed=seed, vocab_size=24, dtype="float32",
            base=folder / "random" / MODELS[0] if seed else None, tokenizer=True, **SIZES,
        )  # fmt: skip


def ask_mergekit(python: str, folder: Path) -> None:
    """Have mergekit do everything, and pin it."""
    maker = RecipeMaker(seed=0)
    drawn = {f"random-{number}": maker.recipe() for number in range(COUNT)}
    told: dict[str, Any] = {"recipes": {}}
    arrays: dict[str, Any] = {}
    jobs = [
        ("written", {file.stem: file.read_text() for file in RECIPES}, {}),
        ("float32", {file.stem: in_float32(file.read_text()) for file in RECIPES}, {}),
        ("random", {}, drawn),
    ]
    for name, recipes, resolved in jobs:
        place = folder / name
        (place / "mergekit").mkdir()
        job = {
            "folder": str(place / "mergekit"), "recipes": recipes, "resolved": resolved,
            "arrays": str(place / "arrays.npz"), "result": str(place / "result.json"),
        }  # fmt: skip
        (place / "job.json").write_text(json.dumps(job))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
        command = [python, str(PEER), "job.json"]
        subprocess.run(command, cwd=place, env=environment, check=True)
        result = json.loads((place / "result.json").read_text())
        told["versions"] = result["versions"]
        told["recipes"] |= {f"{name}/{key}": each for key, each in result["recipes"].items()}
        if resolved:
            pin_json(RANDOM, {"recipes": drawn, "resolved": result["resolved"]})
        with np.load(place / "arrays.npz") as loaded:
            arrays |= {f"{name}/{key}": loaded[key] for key in loaded.files}
    pin_json(TOLD, told)
    np.savez_compressed(ARRAYS, **arrays)


def pin_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, separators=(",", ":"), sort_keys=True) + "\n")


def merge_here(text: str, folder: Path, out: Path) -> None:
    """As the command does it, in the folder with the models."""
    (folder / "recipe.yml").write_text(text)
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        status = merge.main(["recipe.yml", str(out), "--quiet"])
    if status:
        raise SystemExit(f"{out.name}: exit status {status}")


def row(name: str, written: Difference, exact: Difference) -> str:
    told = f"{written.tensors} | {written.layers}"
    if written.random:
        return f"| {name} | {told} | random | random |"
    return f"| {name} | {told} | {written.told} | {exact.told} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mergekit", metavar="PYTHON", help="of an environment with mergekit")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_models(folder)
        if arguments.mergekit:
            ask_mergekit(arguments.mergekit, folder)
        rows = []
        for file in RECIPES:
            differences = []
            for kind, text in (
                ("written", file.read_text()), ("float32", in_float32(file.read_text()))
            ):  # fmt: skip
                out = folder / kind / "ours" / file.stem
                merge_here(text, folder / kind, out)
                differences.append(compare_recipe(f"{kind}/{file.stem}", out))
                for other in differences[-1].others:
                    print(f"{kind}/{file.stem}: {other}")
            rows.append(row(file.stem, *differences))
    versions = ", ".join(f"{name} {value}" for name, value in pinned().told["versions"].items())
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    DOCUMENT.write_text(DOCUMENT_TEXT.format(rows="\n".join(rows), versions=versions, here=machine))
    print("\n".join(rows))


DOCUMENT_TEXT = """# Published recipes, by mergekit and here

mergekit's six example recipes, the tokenizer blocks of its README, the file of its page on
multi-stage merging, and the four templates of LazyMergekit, with other model names
(`tests/recipes`). Each is carried out by mergekit ({versions}) and by
`llama-merge`, on models of as many layers and few features, and every tensor of the result is
compared; so are names, shapes, dtypes, entries of config.json and tokens. Written by
`python benchmarks/recipes.py`
({here}); `tests/test_recipe_parity.py` holds us to it.

- *As written*: models stored in bfloat16 or float16. mergekit computes in the recipe's `dtype`,
  here everything is computed in float32 and rounded once; so results differ by what its arithmetic
  rounds away, and where rounding decides which entries a trim keeps, by whole entries.
- *In float32*: `dtype: float32`, models stored in float32. What is left is the order of sums: where
  SLERPs differ by 3 units, ours is 1.4 and mergekit's 2.5 units away from the same in float64.

Distances are in units of the last place of the tensor's largest value, in the dtype of the result.

| recipe | tensors | layers | as written: equal, at most | in float32: equal, at most |
|---|---|---|---|---|
{rows}

DARE is random: the masks differ, shapes and configs do not; docs/parity.md compares its mean and
variance. mergekit's `arcee_fusion` writes float32 although `dtype` says bfloat16; ours writes what
the recipe says. A union's added tokens come in another order from run to run in mergekit, so rows
are compared by their tokens.
"""

if __name__ == "__main__":
    main()
