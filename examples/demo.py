"""Merge the tiny LLaMAs with every method, score the results, and draw them.

    python examples/demo.py

Three specialists know one table of facts each; a good merge knows all three. Two more were taught
different answers to the same questions; no merge can know both. See examples/tiny_llamas.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dare_llama import dare_merge_llama_to_folder  # noqa: E402
from examples.tiny_llamas.skills import COMPATIBLE, CONFLICTING, Skill, ask, score  # noqa: E402
from linear_llama import linear_merge_llama_to_folder  # noqa: E402
from slerp_llama import slerp_merge_llama_to_folder  # noqa: E402
from task_arithmetic_llama import task_arithmetic_merge_llama_to_folder  # noqa: E402
from ties_llama import ties_merge_llama_to_folder  # noqa: E402

TINY = ROOT / "examples" / "tiny_llamas"
BASE = TINY / "base"
GOOD = 0.8  # a merge that has this share of every skill counts as one that kept them

Scores = dict[str, list[float]]  # model -> its accuracy in each skill, 0.0 to 1.0


def merges(skills: Sequence[Skill]) -> dict[str, Callable[..., object]]:
    """Every method over the specialists in these skills, still to be given an `output_dir`.

    SLERP merges two models, so it takes the first two.
    """
    models = [TINY / skill.name for skill in skills]
    densities = [0.5] * len(models)
    linear = partial(linear_merge_llama_to_folder, ft_model_paths=models)
    slerp = partial(slerp_merge_llama_to_folder, ft_model_paths=models[:2], t=0.5)
    arithmetic = partial(
        task_arithmetic_merge_llama_to_folder, base_model_path=BASE, ft_model_paths=models, lam=0.7
    )
    ties = partial(
        ties_merge_llama_to_folder,
        base_model_path=BASE,
        ft_model_paths=models,
        densities=densities,
        lam=1.0,
    )
    dare = partial(
        dare_merge_llama_to_folder,
        base_model_path=BASE,
        ft_model_paths=models,
        densities=densities,
        lam=0.7,
        seed=0,
    )
    return {
        "linear": linear,
        "slerp" if len(models) == 2 else "slerp of two": slerp,
        "task arithmetic": arithmetic,
        "ties": ties,
        "dare": dare,
        "dare + ties": partial(dare, variant="ties"),
    }


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
    for name, merge in merges(skills).items():
        folder = out / name.replace(" + ", "-").replace(" ", "-")
        merge(output_dir=folder, progress=False)
        after[name] = evaluate(folder, skills)
    return before, after


def print_table(skills: Sequence[Skill], scores: Scores) -> None:
    """One row per model, one column per skill, in percent."""
    print("".join([f"{'':16}", *(f"{skill.name:>10}" for skill in skills)]))
    for name, accuracies in scores.items():
        print("".join([f"{name:16}", *(f"{accuracy:>10.0%}" for accuracy in accuracies)]))


def print_answers(folder: Path, skills: Sequence[Skill]) -> None:
    """What the model says to the first two questions of each skill."""
    model, tokenizer = load(folder)
    prompts = [prompt for skill in skills for prompt in skill.prompts()[:2]]
    for prompt, answer in zip(prompts, ask(model, tokenizer, prompts), strict=True):
        print(f"  {prompt} {answer}")


def draw(tables: Sequence[tuple[str, Sequence[Skill], Scores]], path: Path) -> None:
    """Write one heat map per table, side by side; the same scores give the same bytes."""
    matplotlib.rcParams.update({"svg.hashsalt": "tiny-llamas", "svg.fonttype": "none"})
    figure = Figure(figsize=(9, 4.6), layout="constrained")
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
