"""Merge the tiny LLaMAs with every method, score the results, and draw them.

    python examples/demo.py

Three specialists know one table of facts each; a good merge knows all three. Two more were taught
different answers to the same questions; no merge can know both. See examples/tiny_llamas.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from examples.tiny_llamas.skills import COMPATIBLE, CONFLICTING, Skill, ask, score  # noqa: E402
from merge_methods import ALIASES, METHODS  # noqa: E402
from merge_recipe import make_recipe  # noqa: E402
from merge_run import merge_to_folder  # noqa: E402

TINY = ROOT / "examples" / "tiny_llamas"
BASE = TINY / "base"
GOOD = 0.8  # a merge that has this share of every skill counts as one that kept them

Scores = dict[str, list[float]]  # model -> its accuracy in each skill, 0.0 to 1.0


class Merge(NamedTuple):
    """A merge of some specialists.

    Attributes:
        method: as a recipe calls it.
        parameters: the method's; a single density stands for each model's.
        models: how many of the specialists it takes, the first ones; None for all.
        from_base: whether to give a base to a method that can do without.
        adapters: whether it takes the specialists' LoRA adapters instead of the models.
    """

    method: str
    parameters: Mapping[str, Any] = {}
    models: int | None = None
    from_base: bool = False
    adapters: bool = False


MERGES = {
    "linear": Merge("linear"),
    "sequential": Merge("sequential"),
    "slerp": Merge("slerp", models=2),
    "nuslerp": Merge("nuslerp", models=2),
    "multislerp": Merge("multislerp"),
    "multislerp + base": Merge("multislerp", from_base=True),
    "karcher": Merge("karcher"),
    "model stock": Merge("model_stock"),
    "task arithmetic": Merge("task_arithmetic", {"lam": 0.7}),
    "ties": Merge("ties", {"densities": 0.5}),
    "ties of adapters": Merge("ties", {"densities": 0.5}, adapters=True),
    "dare": Merge("dare", {"densities": 0.5, "lam": 0.7}),
    "dare + ties": Merge("dare_ties", {"densities": 0.5, "lam": 0.7}),
    "della": Merge("della", {"densities": 0.5}),
    "della linear": Merge("della_linear", {"densities": 0.5, "lam": 0.7}),
    "breadcrumbs": Merge("breadcrumbs", {"densities": 0.8, "lam": 0.7}),
    "breadcrumbs + ties": Merge("breadcrumbs_ties", {"densities": 0.8, "lam": 0.7}),
    "sce": Merge("sce"),
    "ram": Merge("ram", {"epsilon": 0.005}),
    "ram plus": Merge("ramplus_tl", {"epsilon": 0.005}),
    "consensus": Merge("consensus", {"agreement": 1, "lam": 0.8}),
    "nearswap": Merge("nearswap", {"t": 0.01}, models=1),
    "arcee fusion": Merge("arcee_fusion", models=1),
    "passthrough": Merge("passthrough", models=1),
}
"""Every method, with parameters that suit these models."""


def title(name: str, skills: Sequence[Skill]) -> str:
    """What a table calls a merge; it says where not all specialists are in it."""
    taken = MERGES[name].models
    few = {1: " of one", 2: " of two"}
    return name if taken in (None, len(skills)) else name + few[taken]


def merge(name: str, skills: Sequence[Skill], folder: Path) -> None:
    """Merge the specialists in these skills into a folder."""
    method, parameters, taken, from_base, adapters = MERGES[name]
    end = "-lora" if adapters else ""
    models = [TINY / f"{skill.name}{end}" for skill in skills][:taken]
    values = dict(parameters)
    if "densities" in values:
        values["densities"] = [values["densities"]] * len(models)
    needs_base = METHODS[ALIASES.get(method, (method,))[0]].base == "required"
    base = BASE if needs_base or from_base else None
    merge_to_folder(make_recipe(method, base, models, values, output_dir=folder), progress=False)


def load(folder: Path) -> tuple[Any, Any]:
    """The model, in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def evaluate(folder: Path, skills: Sequence[Skill]) -> list[float]:
    """Accuracy of the model in a folder, skill by skill."""
    model, tokenizer = load(folder)
    return [score(model, tokenizer, skill) for skill in skills]


def merge_and_score(skills: Sequence[Skill], out: Path) -> tuple[Scores, Scores]:
    """Accuracies of the base and the specialists, and those of their merges, written to `out`."""
    sources = {"base": BASE} | {skill.name: TINY / skill.name for skill in skills}
    before = {name: evaluate(folder, skills) for name, folder in sources.items()}
    after = {}
    for name, each in MERGES.items():
        if each.adapters and skills is not COMPATIBLE:
            continue  # the others have none
        folder = out / name.replace(" + ", "-").replace(" ", "-")
        merge(name, skills, folder)
        after[title(name, skills)] = evaluate(folder, skills)
    return before, after


def print_table(skills: Sequence[Skill], scores: Scores) -> None:
    """One row per model, one column per skill, in percent."""
    print("".join([f"{'':20}", *(f"{skill.name:>10}" for skill in skills)]))
    for name, accuracies in scores.items():
        print("".join([f"{name:20}", *(f"{accuracy:>10.0%}" for accuracy in accuracies)]))


def print_answers(folder: Path, skills: Sequence[Skill]) -> None:
    """What the model says to the first two questions of each skill."""
    model, tokenizer = load(folder)
    prompts = [prompt for skill in skills for prompt in skill.prompts()[:2]]
    for prompt, answer in zip(prompts, ask(model, tokenizer, prompts), strict=True):
        print(f"  {prompt} {answer}")


def draw(tables: Sequence[tuple[str, Sequence[Skill], Scores]], path: Path) -> None:
    """Write one heat map per table, side by side; the same scores give the same bytes."""
    matplotlib.rcParams.update({"svg.hashsalt": "tiny-llamas", "svg.fonttype": "none"})
    figure = Figure(figsize=(9, 9.5), layout="constrained")
    widths = [len(skills) for _, skills, _ in tables]
    for axes, (title, skills, scores) in zip(
        figure.subplots(1, len(tables), width_ratios=widths), tables, strict=True
    ):
        rows = list(scores.values())
        axes.pcolormesh(rows, cmap="Blues", vmin=0.0, vmax=1.25, edgecolors="white", linewidth=2)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=11)
        axes.set_xticks([x + 0.5 for x in range(len(skills))], [skill.name for skill in skills])
        axes.set_yticks([y + 0.5 for y in range(len(rows))], list(scores))
        axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
        axes.spines[:].set_visible(False)
        axes.axhline(len(skills) + 1, color="white", linewidth=7)  # sources above, merges below
        for y, row in enumerate(rows):
            for x, accuracy in enumerate(row):
                color = "white" if accuracy > 0.6 else "black"
                axes.text(
                    x + 0.5, y + 0.5, f"{accuracy:.0%}", ha="center", va="center", color=color
                )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def run(out: Path, chart: Path) -> None:
    """Merge, print, draw."""
    print("Three skills that have nothing to do with each other:\n")
    before, after = merge_and_score(COMPATIBLE, out / "compatible")
    print_table(COMPATIBLE, before | after)
    print("\nThe merge by task arithmetic answers:\n")
    print_answers(out / "compatible" / "task-arithmetic", COMPATIBLE)

    print("\nTwo skills that answer the same questions differently:\n")
    before_pair, after_pair = merge_and_score(CONFLICTING, out / "conflicting")
    print_table(CONFLICTING, before_pair | after_pair)

    draw(
        [
            ("Three skills apart", COMPATIBLE, before | after),
            ("Two in conflict", CONFLICTING, before_pair | after_pair),
        ],
        chart,
    )
    kept = [name for name, accuracies in after.items() if min(accuracies) >= GOOD]
    both = [name for name, accuracies in after_pair.items() if min(accuracies) >= GOOD]
    print(f"\nAt least {GOOD:.0%} in all three skills: {', '.join(kept) or 'none'}.")
    print(f"At least {GOOD:.0%} in both conflicting skills: {', '.join(both) or 'none'}.")
    print(f"Chart: {chart}")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments and run; returns the exit status."""
    parser = argparse.ArgumentParser(description="Merge the tiny LLaMAs and score the results.")
    parser.add_argument("--out", type=Path, help="keep the merged models here (default: discard)")
    parser.add_argument(
        "--chart", type=Path, default=ROOT / "docs" / "tiny_llamas.svg", help="SVG to write"
    )
    arguments = parser.parse_args(argv)
    logging.disable_progress_bar()
    if arguments.out is not None:
        run(arguments.out, arguments.chart)
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder), arguments.chart)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
