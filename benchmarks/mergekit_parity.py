"""Compare our merges with mergekit's, element by element, in units in the last place (ulp).

    python -m venv mk && mk/bin/pip install mergekit==0.1.5
    python benchmarks/mergekit_parity.py /tmp/parity --mergekit mk/bin/mergekit-yaml

Makes a small float32 Llama and three fine-tunes of it, merges them with both programs by linear,
slerp, task_arithmetic and ties under three random settings, and prints how far apart the results
are. Takes half a minute; needs what the tests need.

Every distance is given twice. In ulps of the result is the raw figure. Where large terms cancel,
one rounding of a term is thousands of ulps of what is left of them, so the second figure is in
ulps of the largest operand: of the tensors that the method reads, and of the result. The columns
"from float64" say which of the two results is how far from exact, in ulps of that operand.

The exit status is 1 if an element that was not set aside is more than 2 ulps of the result away
from mergekit's; for slerp, more than 2 ulps of the largest operand away from float64. mergekit's
slerp sums norms and the dot product in float32: the longer the tensor, the further off are its
multipliers (`--vocabulary 32000` makes two tensors of 2 million elements). Ours are float64.

Set aside are elements whose value is a matter of chance in mergekit. That is decided from the
inputs alone, never from the results; how many of them are over 2 ulps of the result is printed:
    cut      a magnitude that the trim both keeps and drops; which, mergekit leaves to its sort.
             Common in real checkpoints: see `--dtype bfloat16`
    vote     the weighted task vectors cancel to within the rounding of their sum
    cosine   the tensors' cosine is too near slerp's threshold for float32 to tell the side
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from linear_llama import linear_merge_llama_to_folder  # noqa: E402
from slerp_llama import slerp_merge_llama_to_folder  # noqa: E402
from task_arithmetic_llama import task_arithmetic_merge_llama_to_folder  # noqa: E402
from tests import reference  # noqa: E402
from tests.tiny_checkpoints import DType, make_llama, read_tensors  # noqa: E402
from ties_llama import ties_merge_llama_to_folder  # noqa: E402

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Mask = NDArray[np.bool_]

LIMIT = 2.0

NOISES = (0.002, 0.002, 0.005)
"""How far each fine-tune is from the base, whose weights are N(0, 0.1). The first two are near
enough for slerp to take the straight line; a pair with the third is not."""

PAIRS = ((0, 1), (1, 2), (2, 0))
"""The two models that slerp merges in each setting."""

COSINE_MARGIN = 3e-5
"""mergekit's float32 cosine was seen 2.5e-5 off, for tensors of ten million elements."""

REASONS = ("", "cut", "vote", "cosine")
"""Why an element is set aside; `Distances.aside` holds the positions."""


class Method(NamedTuple):
    """How a merge is done here and in float64, and the parameters it takes, as we call them.

    `same_steps`: mergekit computes in the same steps, so that equal results can be expected.
    """

    ours: Callable[..., object]
    exact: Callable[..., Doubles]
    parameters: tuple[str, ...]
    uses_base: bool
    same_steps: bool = True


METHODS = {
    "linear": Method(
        linear_merge_llama_to_folder,
        reference.linear,
        ("weights", "normalize"),
        uses_base=False,
    ),
    "slerp": Method(
        slerp_merge_llama_to_folder,
        lambda models, t: reference.slerp(models[0], models[1], t),
        ("t",),
        uses_base=False,
        same_steps=False,
    ),
    "task_arithmetic": Method(
        task_arithmetic_merge_llama_to_folder,
        reference.task_arithmetic,
        ("weights", "lam", "normalize"),
        uses_base=True,
    ),
    "ties": Method(
        ties_merge_llama_to_folder,
        reference.ties,
        ("weights", "densities", "lam", "normalize"),
        uses_base=True,
    ),
}

MERGEKIT_PER_MODEL = {"weights": "weight", "densities": "density"}
MERGEKIT_SHARED = {"lam": "lambda", "normalize": "normalize", "t": "t"}


@dataclass(frozen=True)
class Setting:
    """Parameters drawn at random."""

    weights: tuple[float, ...]
    densities: tuple[float, ...]
    lam: float
    normalize: bool
    t: float

    def __str__(self) -> str:
        weights, densities = ([round(x, 3) for x in v] for v in (self.weights, self.densities))
        return (
            f"weights {weights}, normalize {str(self.normalize).lower()}, "
            f"densities {densities}, lambda {self.lam:.3f}, t {self.t:.3f}"
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
    def parameters(self) -> dict[str, Any]:
        return {name: getattr(self.setting, name) for name in METHODS[self.method].parameters}

    def with_base(self, base: Any, models: Any) -> tuple[Any, ...]:
        """The inputs as arguments, the base first if the method uses it."""
        return (base, models) if METHODS[self.method].uses_base else (models,)


class Distances(NamedTuple):
    """Per element, flat: how far two results are apart, and the reason for setting it aside."""

    in_result: Doubles
    in_operand: Doubles
    ours_off: Doubles
    mergekit_off: Doubles
    aside: NDArray[np.int8]


def random_setting(seed: int, *, normalize: bool) -> Setting:
    """Weights have both signs when they are not normalized."""
    draw = random.Random(seed)
    low = 0.2 if normalize else -1.2
    return Setting(
        weights=tuple(draw.uniform(low, 1.2) for _ in NOISES),
        densities=tuple(draw.uniform(0.1, 0.9) for _ in NOISES),
        lam=draw.uniform(0.3, 1.5),
        normalize=normalize,
        t=draw.uniform(0.1, 0.9),
    )


def make_models(folder: Path, vocabulary: int, dtype: DType) -> list[Path]:
    """The base, then its fine-tunes."""
    models: list[Path] = []
    for model, noise in enumerate((0.0, *NOISES)):
        made = make_llama(
            folder / f"model-{model}",
            seed=model,
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=176,
            dtype=dtype,
            base=models[0] if models else None,
            noise=noise,
        )
        models.append(made)
    return models


def make_cases(
    names: Sequence[str], base: Path, tuned: Sequence[Path], settings: Sequence[Setting]
) -> list[Case]:
    cases = []
    for name in names:
        for number, setting in enumerate(settings):
            models = [tuned[model] for model in PAIRS[number]] if name == "slerp" else tuned
            cases.append(Case(name, number + 1, setting, base, tuple(models)))
    return cases


# Merging


def merge_by_mergekit(command: Path, cases: Sequence[Case], folder: Path) -> list[Path]:
    """Run what the command runs, for all cases in one process: it takes long to start.

    On one thread, so that its sums are always taken in the same order.
    """
    options = ["--quiet", "--no-copy-tokenizer", "--no-write-model-card"]
    outputs, calls = [], []
    for case in cases:
        output = folder / f"{case.method}-{case.number}-mergekit"
        recipe = output.with_suffix(".yaml")
        shutil.rmtree(output, ignore_errors=True)
        recipe.write_text(json.dumps(mergekit_recipe(case), indent=2))  # JSON is YAML
        outputs.append(output)
        calls.append([str(recipe), str(output), *options])
    ask_mergekit(
        command,
        "import json, sys; from mergekit.scripts.run_yaml import main\n"
        "for call in json.load(sys.stdin): main(call, standalone_mode=False)",
        json.dumps(calls),
    )
    return outputs


def ask_mergekit(command: Path, script: str, text: str = "") -> str:
    """What a script prints, run by the Python beside mergekit's command."""
    done = subprocess.run(
        [str(command.parent / "python"), "-c", script],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        input=text,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"mergekit failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip()


def mergekit_recipe(case: Case) -> dict[str, Any]:
    """Says everything that mergekit has a default for, as some differ by method."""
    parameters = case.parameters
    shared = {MERGEKIT_SHARED[k]: v for k, v in parameters.items() if k in MERGEKIT_SHARED}
    per_model = {MERGEKIT_PER_MODEL[k]: v for k, v in parameters.items() if k in MERGEKIT_PER_MODEL}
    models = [
        {"model": str(model), "parameters": {k: values[i] for k, values in per_model.items()}}
        for i, model in enumerate(case.models)
    ]
    recipe = {
        "merge_method": case.method,
        "models": models,
        "parameters": shared,
        "dtype": "float32",
        "out_dtype": "float32",
    }
    if METHODS[case.method].uses_base:
        recipe["base_model"] = str(case.base)
        recipe["parameters"] = shared | {"int8_mask": False, "rescale": False}
    elif case.method == "slerp":
        recipe["base_model"] = str(case.models[0])  # mergekit's name for the end where t is 0
    return recipe


def merge_by_us(case: Case, folder: Path) -> Path:
    output = folder / f"{case.method}-{case.number}-ours"
    shutil.rmtree(output, ignore_errors=True)
    METHODS[case.method].ours(
        *case.with_base(case.base, case.models),
        **case.parameters,
        output_dir=output,
        dtype="float32",
        progress=False,
    )
    return output


# Setting aside


def set_aside(case: Case, base: Floats, models: Sequence[Floats]) -> NDArray[np.int8]:
    """Positions in `REASONS`. Looks at the inputs only, and shares no code with our merges."""
    reasons = np.zeros(base.shape, np.int8)
    if case.method == "slerp" and near_threshold(*models):
        reasons[...] = REASONS.index("cosine")
    if case.method == "ties":
        deltas = [model - base for model in models]
        reasons[undecided(deltas, case.setting)] = REASONS.index("vote")
        for delta, density in zip(deltas, case.setting.densities, strict=True):
            reasons[at_the_cut(delta, density)] = REASONS.index("cut")
    return reasons


def cut(delta: Floats, density: float) -> tuple[np.float32, np.float32]:
    """The smallest magnitude that a trim keeps and the largest that it drops."""
    magnitudes = np.sort(np.abs(delta), axis=None)[::-1]
    kept = max(1, int(density * delta.size))
    return magnitudes[kept - 1], magnitudes[kept]


def at_the_cut(delta: Floats, density: float) -> Mask:
    """Elements of the magnitude at the cut, if it is found on both sides."""
    kept, dropped = cut(delta, density)
    at_cut: Mask = (np.abs(delta) == kept) & (kept == dropped)
    return at_cut


def undecided(deltas: Sequence[Floats], setting: Setting) -> Mask:
    """Elements where float32 may get the sign of the summed votes wrong.

    The sum over n models is off by at most n + 2 roundings (of the weight, the product and the
    additions), each 2**-24 of the summed magnitudes.
    """
    votes = np.stack(
        [
            np.where(np.abs(delta) >= cut(delta, density)[0], delta * np.float64(weight), 0.0)
            for delta, density, weight in zip(
                deltas, setting.densities, setting.weights, strict=True
            )
        ]
    )
    size: Doubles = np.abs(votes).sum(axis=0)
    margin = (len(votes) + 2) * 2.0**-24 * size
    near_zero: Mask = (size > 0) & (np.abs(votes.sum(axis=0)) <= margin)
    return near_zero


def near_threshold(a: Floats, c: Floats) -> bool:
    a, c = a.ravel(), c.ravel()
    aa, cc, ac = (float(np.sum(x * y, dtype=np.float64)) for x, y in ((a, a), (c, c), (a, c)))
    return abs(abs(ac) / math.sqrt(aa * cc) - 0.9995) <= COSINE_MARGIN


# Comparing


def compare(case: Case, ours: Path, mergekit: Path) -> Distances:
    """All tensors of two merged models, joined into one."""
    base, left, right = (read_arrays(folder) for folder in (case.base, ours, mergekit))
    models = [read_arrays(folder) for folder in case.models]
    if not base.keys() == left.keys() == right.keys():
        raise SystemExit(f"{ours} and {mergekit} do not have the same tensors")
    parts = [
        compare_tensor(case, base[name], [model[name] for model in models], left[name], right[name])
        for name in base
    ]
    return Distances(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def compare_tensor(
    case: Case, base: Floats, models: Sequence[Floats], ours: Floats, mergekit: Floats
) -> Distances:
    method = METHODS[case.method]
    exact = method.exact(*case.with_base(base, models), **case.parameters)
    inputs = [base, *models] if method.uses_base else models
    operand = ulp(np.max(np.abs([*inputs, mergekit]), axis=0))
    apart = np.abs(ours.astype(np.float64) - mergekit)
    return Distances(
        (apart / ulp(mergekit)).ravel(),
        (apart / operand).ravel(),
        (np.abs(ours - exact) / operand).ravel(),
        (np.abs(mergekit - exact) / operand).ravel(),
        set_aside(case, base, models).ravel(),
    )


def ulp(values: Floats) -> Doubles:
    """Distance from |value| to the next larger float32."""
    return np.spacing(np.abs(values)).astype(np.float64)


def read_arrays(folder: Path) -> dict[str, Floats]:
    return {name: tensor.float().numpy() for name, tensor in read_tensors(folder).items()}


# Reporting


TITLES = (
    f"{'':27} {'ulps of result':>19} {'ulps of operand':>17} {'from float64':>15}\n"
    f"{'method':<15} # {'elements':>9} {'largest':>11} {'over 2':>7} {'largest':>9} {'over 2':>7} "
    f"{'ours':>6} {'mergekit':>8}  set aside"
)


def report(case: Case, distances: Distances) -> bool:
    """Print a row; True if every element that is not set aside is near enough."""
    compared = distances.aside == 0
    result, operand, ours, mergekit = (values[compared] for values in distances[:4])
    print(
        f"{case.method:<15} {case.number} {compared.size:>9,} "
        f"{result.max(initial=0):>11,.0f} {np.sum(result > LIMIT):>7,} "
        f"{operand.max(initial=0):>9.2f} {np.sum(operand > LIMIT):>7,} "
        f"{ours.max(initial=0):>6.2f} {mergekit.max(initial=0):>8.2f}  {describe_aside(distances)}"
    )
    measured = result if METHODS[case.method].same_steps else ours
    return bool(np.all(measured <= LIMIT))


def describe_aside(distances: Distances) -> str:
    """How many elements are set aside for each reason, and how many of them are over the limit."""
    parts = []
    for position, reason in enumerate(REASONS[1:], start=1):
        found = distances.in_result[distances.aside == position]
        if found.size:
            parts.append(f"{found.size:,} {reason} ({np.sum(found > LIMIT):,} over 2)")
    return ", ".join(parts) or "none"


def print_header(command: Path, dtype: str, settings: Sequence[Setting]) -> None:
    ask = "from importlib.metadata import version as v; print(v('mergekit'), 'torch', v('torch'))"
    versions = ask_mergekit(command, ask)
    print(f"mergekit {versions}, ours torch {torch.__version__}", end=", ")
    print(f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {dtype} models")
    print(f"fails over {LIMIT:g} ulps of the result; slerp: of the operand, from float64")
    for number, (setting, pair) in enumerate(zip(settings, PAIRS, strict=True), start=1):
        print(f"# {number}: {setting} of models {pair[0] + 1} and {pair[1] + 1}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where models are made and merged")
    parser.add_argument("--mergekit", type=Path, required=True, help="its mergekit-yaml command")
    parser.add_argument("--method", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    parser.add_argument("--seed", type=int, default=0, help="of the settings")
    parser.add_argument("--vocabulary", type=int, default=1024, help="rows of the embedding")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    folder, command = arguments.folder.resolve(), arguments.mergekit.absolute()
    settings = [
        random_setting(len(PAIRS) * arguments.seed + number, normalize=number != 1)
        for number in range(len(PAIRS))
    ]
    base, *tuned = make_models(folder, arguments.vocabulary, arguments.dtype)
    cases = make_cases(arguments.method, base, tuned, settings)
    print_header(command, arguments.dtype, settings)
    mergekit = merge_by_mergekit(command, cases, folder)
    distances = [
        compare(case, merge_by_us(case, folder), theirs)
        for case, theirs in zip(cases, mergekit, strict=True)
    ]
    print(TITLES)
    passed = [report(case, found) for case, found in zip(cases, distances, strict=True)]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    raise SystemExit(main())
