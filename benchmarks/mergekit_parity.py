"""Compare our merges with mergekit's, element by element, in units in the last place (ulp).

    python -m venv mk && mk/bin/pip install mergekit==0.1.5
    python benchmarks/mergekit_parity.py /tmp/parity --mergekit mk/bin/mergekit-yaml

Makes a small float32 Llama and three fine-tunes of it, merges them with both programs by linear,
slerp, task_arithmetic and ties under three random settings, and prints how far apart the results
are. Runs in a minute on two cores; needs tokenizers and safetensors, as the tests do.

Every distance is given twice. In ulps of the result is the raw figure. Where large terms cancel,
one rounding of a term is thousands of ulps of what is left of them, so the second figure is in
ulps of the largest operand: of the tensors that the method reads, and of the result.

The exit status is 1 if an element that was not set aside is more than 2 ulps apart: of the result
for task_arithmetic and ties, where both programs round in the same order; of the largest operand
for linear and slerp, where they do not. mergekit's linear calls addcmul, which rounds once per
model where torch has a fused multiply-add and twice where it has none, as ours always does: set
ATEN_CPU_CAPABILITY=default to see them equal. Its slerp sums norms and the dot product in
float32, ours in float64; the longer the tensor, the further its multipliers are off, which
`--vocabulary 32000` shows. The last columns say whose result is how far from float64.

Set aside are elements whose value is a matter of chance in mergekit. That is decided from the
inputs alone, never from the results:
    cut      a magnitude that the trim both keeps and drops: mergekit leaves it to its sort
    vote     the weighted task vectors cancel to within the rounding of their sum
    cosine   the tensors' cosine is too close to slerp's threshold for float32 to tell the side
"""

import argparse
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from linear_llama import linear_merge_llama_to_folder  # noqa: E402
from slerp_llama import slerp_merge_llama_to_folder  # noqa: E402
from task_arithmetic_llama import task_arithmetic_merge_llama_to_folder  # noqa: E402
from tests import reference  # noqa: E402
from tests.tiny_checkpoints import make_llama, read_tensors  # noqa: E402
from ties_llama import ties_merge_llama_to_folder  # noqa: E402

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Mask = NDArray[np.bool_]

METHODS = ("linear", "slerp", "task_arithmetic", "ties")
LIMIT = 2.0
LIMIT_IN_OPERAND = ("linear", "slerp")
"""Methods whose limit is in ulps of the largest operand; of the result for the others."""

PER_MODEL: dict[str, tuple[str, ...]] = {
    "linear": ("weight",),
    "slerp": (),
    "task_arithmetic": ("weight",),
    "ties": ("weight", "density"),
}
SHARED: dict[str, tuple[str, ...]] = {
    "linear": ("normalize",),
    "slerp": ("t",),
    "task_arithmetic": ("normalize", "lambda"),
    "ties": ("normalize", "lambda", "int8_mask", "rescale"),
}
"""What mergekit takes for each method. All of it is written: its defaults differ by method."""

NOISES = (0.002, 0.002, 0.005)
"""How far each fine-tune is from the base, whose weights are N(0, 0.1). The first two are close
enough for slerp to take the straight line, a pair with the third is not."""

COSINE_MARGIN = 3e-5
"""mergekit's float32 cosine was seen 2.5e-5 off, for tensors of ten million elements."""


@dataclass(frozen=True)
class Setting:
    """Parameters drawn at random; `pair` is which two models slerp merges."""

    weights: tuple[float, ...]
    densities: tuple[float, ...]
    lam: float
    normalize: bool
    t: float
    pair: tuple[int, int]

    def describe(self) -> str:
        weights, densities = ([round(x, 3) for x in v] for v in (self.weights, self.densities))
        return (
            f"weights {weights}, densities {densities}, lambda {self.lam:.3f}, "
            f"normalize {str(self.normalize).lower()}, t {self.t:.3f} of models {[*self.pair]}"
        )


@dataclass(frozen=True)
class Case:
    """One merge that both programs do; `models` are those that the method reads."""

    method: str
    number: int
    setting: Setting
    base: Path
    models: tuple[Path, ...]

    @property
    def name(self) -> str:
        return f"{self.method}-{self.number}"

    @property
    def uses_base(self) -> bool:
        return self.method in ("task_arithmetic", "ties")


@dataclass(frozen=True)
class Distances:
    """How far apart two results are, per element, flat; and which elements are set aside."""

    in_result: Doubles
    in_operand: Doubles
    ours_off: Doubles
    mergekit_off: Doubles
    aside: dict[str, Mask]


def random_setting(number: int) -> Setting:
    """Odd settings are normalized; the weights of the others have both signs."""
    draw = random.Random(number)
    normalize = number % 2 == 1
    low = 0.2 if normalize else -1.2
    first, second = draw.sample(range(len(NOISES)), 2)
    return Setting(
        weights=tuple(draw.uniform(low, 1.2) for _ in NOISES),
        densities=tuple(draw.uniform(0.1, 0.9) for _ in NOISES),
        lam=draw.uniform(0.3, 1.5),
        normalize=normalize,
        t=draw.uniform(0.1, 0.9),
        pair=(first, second),
    )


def make_models(folder: Path, vocabulary: int) -> list[Path]:
    """The base, then its fine-tunes."""

    def make(seed: int, base: Path | None, noise: float) -> Path:
        return make_llama(
            folder / f"model-{seed}",
            seed=seed,
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=176,
            dtype="float32",
            base=base,
            noise=noise,
        )

    base = make(0, None, 0.0)
    return [base, *(make(seed, base, noise) for seed, noise in enumerate(NOISES, start=1))]


def make_cases(base: Path, tuned: Sequence[Path], settings: Sequence[Setting]) -> list[Case]:
    return [
        Case(
            method,
            number,
            setting,
            base,
            tuple(tuned[i] for i in setting.pair) if method == "slerp" else tuple(tuned),
        )
        for method in METHODS
        for number, setting in enumerate(settings, start=1)
    ]


# Merging


def merge_by_mergekit(command: Path, case: Case, folder: Path) -> Path:
    """Run mergekit on one thread, so that the order of its sums is always the same."""
    output = folder / f"{case.name}-mergekit"
    shutil.rmtree(output, ignore_errors=True)
    recipe = folder / f"{case.name}.yaml"
    recipe.write_text(json.dumps(mergekit_recipe(case), indent=2))  # JSON is YAML
    done = subprocess.run(
        [command, recipe, output, "--quiet", "--no-copy-tokenizer", "--no-write-model-card"],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"mergekit failed on {recipe}:\n{done.stderr[-2000:]}")
    return output


def mergekit_recipe(case: Case) -> dict[str, Any]:
    setting = case.setting
    shared = {
        "normalize": setting.normalize,
        "lambda": setting.lam,
        "t": setting.t,
        "int8_mask": False,
        "rescale": False,
    }
    each = [
        {"weight": weight, "density": density}
        for weight, density in zip(setting.weights, setting.densities, strict=True)
    ]
    recipe: dict[str, Any] = {
        "merge_method": case.method,
        "models": [
            {"model": str(model), "parameters": {k: values[k] for k in PER_MODEL[case.method]}}
            for model, values in zip(case.models, each, strict=False)
        ],
        "parameters": {key: shared[key] for key in SHARED[case.method]},
        "dtype": "float32",
        "out_dtype": "float32",
    }
    if case.uses_base:
        recipe["base_model"] = str(case.base)
    elif case.method == "slerp":
        recipe["base_model"] = str(case.models[0])  # what mergekit calls the end where t is 0
    return recipe


def merge_by_us(case: Case, folder: Path) -> Path:
    output = folder / f"{case.name}-ours"
    shutil.rmtree(output, ignore_errors=True)
    setting, files = case.setting, {"output_dir": output, "dtype": "float32"}
    quiet: dict[str, Any] = files | {"progress": False}
    scale: dict[str, Any] = {"lam": setting.lam, "normalize": setting.normalize}
    match case.method:
        case "linear":
            linear_merge_llama_to_folder(
                case.models, setting.weights, normalize=setting.normalize, **quiet
            )
        case "slerp":
            slerp_merge_llama_to_folder(case.models, setting.t, **quiet)
        case "task_arithmetic":
            task_arithmetic_merge_llama_to_folder(
                case.base, case.models, setting.weights, **scale, **quiet
            )
        case "ties":
            ties_merge_llama_to_folder(
                case.base, case.models, setting.weights, setting.densities, **scale, **quiet
            )
    return output


def merge_in_float64(case: Case, base: Floats, models: Sequence[Floats]) -> Doubles:
    setting = case.setting
    match case.method:
        case "linear":
            return reference.linear(models, setting.weights, setting.normalize)
        case "slerp":
            return reference.slerp(models[0], models[1], setting.t)
        case "task_arithmetic":
            return reference.task_arithmetic(
                base, models, setting.weights, setting.lam, setting.normalize
            )
    return reference.ties(
        base, models, setting.weights, setting.densities, setting.lam, setting.normalize
    )


# Setting aside


def set_aside(case: Case, base: Floats, models: Sequence[Floats]) -> dict[str, Mask]:
    """Elements that mergekit decides by chance, by reason; found in the inputs."""
    if case.method == "slerp":
        return {"cosine": np.full(base.shape, near_threshold(models[0], models[1]))}
    if case.method != "ties":
        return {}
    deltas = [model - base for model in models]
    densities = case.setting.densities
    cuts = [at_the_cut(d, density) for d, density in zip(deltas, densities, strict=True)]
    cut: Mask = np.logical_or.reduce(cuts)
    return {"cut": cut, "vote": undecided(deltas, case.setting) & ~cut}


def cut_between(delta: Floats, density: float) -> tuple[np.float32, np.float32]:
    """The smallest magnitude that a trim keeps, and the largest that it drops."""
    magnitudes = np.sort(np.abs(delta), axis=None)[::-1]
    kept = max(1, int(density * delta.size))
    return magnitudes[kept - 1], magnitudes[kept]


def at_the_cut(delta: Floats, density: float) -> Mask:
    """Elements of the magnitude at the cut, if there are some on both sides of it."""
    kept, dropped = cut_between(delta, density)
    return (np.abs(delta) == kept) & (kept == dropped)


def undecided(deltas: Sequence[Floats], setting: Setting) -> Mask:
    """Elements where float32 may get the sign of the summed votes wrong.

    With n models the sum is off by at most n + 2 roundings (of the weight, the product, and the
    additions), each 2**-24 of the summed magnitudes.
    """
    votes = [
        np.where(np.abs(delta) >= cut_between(delta, density)[0], delta * np.float64(weight), 0.0)
        for delta, density, weight in zip(deltas, setting.densities, setting.weights, strict=True)
    ]
    mass, size = sum(votes), np.sum(np.abs(votes), axis=0)
    undecided: Mask = (size > 0) & (np.abs(mass) <= (len(votes) + 2) * 2.0**-24 * size)
    return undecided


def near_threshold(a: Floats, c: Floats) -> bool:
    wide_a, wide_c = a.astype(np.float64).ravel(), c.astype(np.float64).ravel()
    cosine = (wide_a @ wide_c) / math.sqrt((wide_a @ wide_a) * (wide_c @ wide_c))
    return bool(abs(abs(cosine) - 0.9995) <= COSINE_MARGIN)


# Comparing


def compare(case: Case, ours: Path, mergekit: Path) -> Distances:
    """All tensors of two merged models, joined into one."""
    base, left, right = (read_arrays(folder) for folder in (case.base, ours, mergekit))
    models = [read_arrays(folder) for folder in case.models]
    if not base.keys() == left.keys() == right.keys():
        raise SystemExit(f"{case.name}: the results do not have the tensors of the models")
    parts = [
        compare_tensor(case, base[name], [model[name] for model in models], left[name], right[name])
        for name in base
    ]
    return Distances(
        np.concatenate([part.in_result for part in parts]),
        np.concatenate([part.in_operand for part in parts]),
        np.concatenate([part.ours_off for part in parts]),
        np.concatenate([part.mergekit_off for part in parts]),
        {why: np.concatenate([part.aside[why] for part in parts]) for why in parts[0].aside},
    )


def compare_tensor(
    case: Case, base: Floats, models: Sequence[Floats], ours: Floats, mergekit: Floats
) -> Distances:
    exact = merge_in_float64(case, base, models)
    inputs = [*models, base] if case.uses_base else models
    operand = ulp(np.max(np.abs([*inputs, mergekit]), axis=0))
    apart = np.abs(ours.astype(np.float64) - mergekit)
    return Distances(
        (apart / ulp(mergekit)).ravel(),
        (apart / operand).ravel(),
        (np.abs(ours - exact) / operand).ravel(),
        (np.abs(mergekit - exact) / operand).ravel(),
        {why: mask.ravel() for why, mask in set_aside(case, base, models).items()},
    )


def ulp(values: Floats) -> Doubles:
    """Distance from |value| to the next larger float32, as float64."""
    return np.spacing(np.abs(values)).astype(np.float64)


def read_arrays(folder: Path) -> dict[str, Floats]:
    tensors = read_tensors(folder)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise SystemExit(f"{folder}: {name} is {tensor.dtype}, float32 was asked for")
    return {name: tensor.numpy() for name, tensor in tensors.items()}


# Reporting


HEADER = (
    f"{'':<17} {'':>9} {'ulps of result':>19} {'ulps of operand':>17} {'from float64':>15}\n"
    f"{'method':<15} # {'elements':>9} {'largest':>11} {'over 2':>7} {'largest':>9} {'over 2':>7} "
    f"{'ours':>6} {'mergekit':>8}  set aside"
)


def report(case: Case, distances: Distances) -> bool:
    """Print a row; True if every element that is not set aside is near enough."""
    aside = {why: int(mask.sum()) for why, mask in distances.aside.items()}
    compared = ~np.logical_or.reduce(
        [np.zeros(distances.in_result.shape, bool), *distances.aside.values()]
    )
    result, operand, ours, mergekit = (
        values[compared]
        for values in (
            distances.in_result,
            distances.in_operand,
            distances.ours_off,
            distances.mergekit_off,
        )
    )
    reasons = ", ".join(f"{count} {why}" for why, count in aside.items()) or "none"
    print(
        f"{case.method:<15} {case.number} {compared.size:>9,} "
        f"{result.max():>11,.0f} {np.sum(result > LIMIT):>7,} "
        f"{operand.max():>9.2f} {np.sum(operand > LIMIT):>7,} "
        f"{ours.max():>6.2f} {mergekit.max():>8.2f}  {reasons}"
    )
    measured = operand if case.method in LIMIT_IN_OPERAND else result
    return bool(measured.max() <= LIMIT)


def versions(command: Path) -> str:
    """Of mergekit and torch, from the Python beside mergekit's command."""
    ask = "from importlib.metadata import version as v; print(v('mergekit'), 'torch', v('torch'))"
    asked = [command.parent / "python", "-c", ask]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where models are made and merged")
    parser.add_argument("--mergekit", type=Path, required=True, help="its mergekit-yaml command")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--vocabulary", type=int, default=1024, help="rows of the embedding")
    arguments = parser.parse_args()
    folder, command = arguments.folder.resolve(), arguments.mergekit.absolute()
    settings = [random_setting(number) for number in (1, 2, 3)]
    base, *tuned = make_models(folder, arguments.vocabulary)
    cases = [c for c in make_cases(base, tuned, settings) if c.method in arguments.methods]
    print(
        f"mergekit {versions(command)}; ours torch {torch.__version__}\n"
        f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}; "
        f"fails over {LIMIT:g} ulps: of the largest operand for {', '.join(LIMIT_IN_OPERAND)}, "
        "of the result for the others"
    )
    for number, setting in enumerate(settings, start=1):
        print(f"# {number}: {setting.describe()}")
    with ThreadPoolExecutor(2) as pool:  # most of mergekit's time is its imports
        theirs = pool.map(lambda case: merge_by_mergekit(command, case, folder), cases)
        merged = [
            (merge_by_us(case, folder), folder_)
            for case, folder_ in zip(cases, theirs, strict=True)
        ]
    print(HEADER)
    near = [report(c, compare(c, *folders)) for c, folders in zip(cases, merged, strict=True)]
    return 0 if all(near) else 1


if __name__ == "__main__":
    raise SystemExit(main())
