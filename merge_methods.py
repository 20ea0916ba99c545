"""The methods: what each is called, which parameters it takes, and how it merges tensors.

A method here is a few lines over the functions that `merge_operations` gives it: a generator
that asks `merge_stream` for passes over a group of tensors and ends with the function for a block.
To add one: its functions in a `*_utils` module, an entry in `METHODS`, a driver, a test.
"""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from merge_operations import (
    FINE_BINS,
    Counts,
    Drop,
    Operations,
    SegmentCounts,
    TaskVectorMerge,
    Trim,
    TrimRows,
    window,
)
from merge_recipe import Parameter
from merge_stream import Gather, Merge, Passes, TensorTask
from scalar_utils import (
    KEEP_ALL,
    KEEP_NONE,
    RESCALES,
    TRIM_SCOPES,
    TrimThreshold,
    check_density,
    check_lam,
    check_normalizable,
    check_seed,
    check_t,
    check_ties_weights,
    check_weights,
    kept_count,
    magnitude,
    mask_key,
    rescale_factor,
    slerp_coefficients,
)


@dataclass(frozen=True)
class Method:
    """A merging method.

    Attributes:
        merge: merges a group of tensors; see `merge_stream.Passes`.
        parameters: what the user can set.
        passes: how often the inputs are read, from the resolved parameters.
        uses_base: whether the method needs the models' common ancestor.
        model_count: exact number of fine-tuned models, or None for one or more.
        check: raises `ValueError` for parameters that do not go together.
        advice: remarks on parameters that are allowed and seldom meant.
        remarks: what is worth saying about the findings of all tensors.
        whole_model: whether all tensors are one group, from the resolved parameters; else each
            is one.
        bins: most bins that a pass counts in, per model, for the memory plan.
        sums: sums that are gathered for each run of a row, from the resolved parameters and the
            number of models, for the memory plan.
        copies: float32 blocks that torch holds per input, as measured, for the memory plan.
    """

    merge: Callable[[Sequence[TensorTask], Operations], Passes | Merge]
    parameters: tuple[Parameter, ...]
    passes: Callable[[Mapping[str, Any]], int] = lambda _: 1
    uses_base: bool = True
    model_count: int | None = None
    check: Callable[[Mapping[str, Any]], None] = lambda _: None
    advice: Callable[[Mapping[str, Any]], Iterable[str]] = lambda _: ()
    remarks: Callable[[Mapping[str, Mapping[str, Any]]], Iterable[str]] = lambda _: ()
    whole_model: Callable[[Mapping[str, Any]], bool] = lambda _: False
    bins: int = 0
    sums: Callable[[Mapping[str, Any], int], int] = lambda _, models: 0
    copies: int = 7


def merge_linear(tasks: Sequence[TensorTask], operations: Operations) -> Merge:
    """`linear_utils.linear`, block by block."""
    (task,) = tasks
    weights, normalize = task.parameters["weights"], task.parameters["normalize"]
    return Merge(operations.linear(weights, normalize=normalize))


def merge_slerp(tasks: Sequence[TensorTask], operations: Operations) -> Passes:
    """`slerp_utils.slerp`: dot products over the whole tensor, then two multipliers."""
    (task,) = tasks
    parts = yield operations.dot_parts()
    aa, cc, ac = parts.totals()
    coefficients = slerp_coefficients(aa, cc, ac, task.parameters["t"])
    findings = {
        "cosine": coefficients.cosine,
        "branch": "lerp" if coefficients.used_lerp else "slerp",
    }
    take = operations.combine([coefficients.first, coefficients.second])
    return Merge(take, findings={task.name: findings})


def merge_task_arithmetic(tasks: Sequence[TensorTask], operations: Operations) -> Merge:
    """`linear_utils.task_arithmetic`, block by block."""
    (task,) = tasks
    return Merge(operations.merge_task_vectors(_task_vectors(task.parameters)))


def merge_ties(tasks: Sequence[TensorTask], operations: Operations) -> Passes:
    """`ties_utils.ties` with the thresholds of a tensor, of each row, or of the whole model."""
    parameters = tasks[0].parameters
    densities = parameters["densities"]
    if parameters["trim_scope"] == "row":
        trim_rows = TrimRows(densities)
        take = operations.merge_task_vectors(_task_vectors(parameters, trim_rows, elect=True))
        return Merge(take)
    numel = sum(task.info.numel for task in tasks)
    ranks = [kept_count(density, numel) for density in densities]
    thresholds = yield from _thresholds(ranks, numel, operations)
    segments = thresholds.segments
    if segments is None and (thresholds.cuts_ties or len(tasks) > 1):
        segments = yield operations.count_kept(thresholds.chosen)
    task_vectors = _task_vectors(parameters, Trim(thresholds.chosen), elect=True)
    return Merge(
        operations.merge_task_vectors(task_vectors),
        _ties_left(thresholds.chosen, segments),
        _trim_findings(tasks, ranks, thresholds, segments),
    )


class _Thresholds(NamedTuple):
    """What keeps so many entries of each model's task vector.

    Attributes:
        chosen: one per model.
        tied: how many entries of each model are equal to its threshold.
        segments: entries above the thresholds and at them, where that has been counted already.
    """

    chosen: tuple[TrimThreshold, ...]
    tied: tuple[int, ...]
    segments: SegmentCounts | None

    @property
    def cuts_ties(self) -> bool:
        """Whether some of the equal entries are kept and some are not, the first ones first."""
        pairs = zip(self.chosen, self.tied, strict=True)
        return any(threshold.ties < tied for threshold, tied in pairs)


def _thresholds(
    ranks: Sequence[int], numel: int, operations: Operations
) -> Generator[Gather, Any, _Thresholds]:
    """Find the k-th largest magnitude of each task vector, exactly; k is its rank.

    A sample says about where it will lie. One pass over everything counts every magnitude in a
    window around that place, and what lies above: this proves the guess, or shows on which side
    the right one is. Then the sample is asked for a place safely on that side, and after that a
    pass over everything that counts coarsely says which window is right.
    """
    chosen = [KEEP_ALL if rank else KEEP_NONE for rank in ranks]
    tied = [0] * len(ranks)
    counted: dict[int, Counts] = {}
    missing = {model: rank for model, rank in enumerate(ranks) if 0 < rank < numel}
    sides: dict[int, int] = {}
    for find_windows in (_guess, _guess_on_the_other_side, _find_windows):
        if not missing:
            break
        guesses = yield from find_windows(missing, numel, operations, sides)
        fine = yield operations.fine_histograms(guesses)
        for index, (model, guess) in enumerate(guesses.items()):
            rank, bins = ranks[model] - int(fine.above[index]), fine.bins[index]
            if not 0 < rank <= bins.sum():
                sides[model] = 1 if rank > 0 else -1  # the right one is smaller, or larger
                continue
            position, above = operations.select_bin(bins, rank)
            chosen[model] = TrimThreshold(window(guess) + position, rank - above)
            tied[model] = int(bins[position])
            if chosen[model].bits == guess:
                counted[model] = fine.segments.counts[:, index]
            del missing[model]
        names = fine.segments.names
        del fine, bins  # before the next pass
    segments = None
    if len(counted) == len(ranks):
        counts = [counted[model] for model in range(len(ranks))]
        segments = SegmentCounts(names, np.stack(counts, axis=1))
    return _Thresholds(tuple(chosen), tuple(tied), segments)


def _guess(
    ranks: Mapping[int, int],
    numel: int,
    operations: Operations,
    _: Mapping[int, int],
    deviations: Mapping[int, int] = MappingProxyType({}),
) -> Generator[Gather, Any, dict[int, int]]:
    """By model, the bits of the magnitude that has this rank, as far as a sample can say.

    Args:
        deviations: by model, so many standard deviations of the sample away from the rank.
    """
    coarse = yield operations.coarse_histograms([*ranks], sample=True)
    sampled = int(coarse[0].sum())
    wanted, above, middles = {}, {}, {}
    for (model, rank), counts in zip(ranks.items(), coarse, strict=True):
        share = rank / numel
        deviation = math.sqrt(share * (1 - share) * sampled)
        place = round(share * sampled + deviations.get(model, 0) * deviation)
        wanted[model] = min(max(1, place), sampled)
        coarse_bin, above[model] = operations.select_bin(counts, wanted[model])
        middles[model] = _middle(coarse_bin)
    del coarse, counts  # before the next pass
    fine = yield operations.fine_histograms(middles, sample=True)
    return {
        model: window(middle)
        + operations.select_bin(fine.bins[index], wanted[model] - above[model])[0]
        for index, (model, middle) in enumerate(middles.items())
    }


def _guess_on_the_other_side(
    ranks: Mapping[int, int], numel: int, operations: Operations, sides: Mapping[int, int]
) -> Generator[Gather, Any, dict[int, int]]:
    """A guess from the sample that is safely on the side on which the right one is."""
    deviations = {model: SAFE_DEVIATIONS * sides[model] for model in ranks}
    return (yield from _guess(ranks, numel, operations, sides, deviations))


def _find_windows(
    ranks: Mapping[int, int], _numel: int, operations: Operations, _: Mapping[int, int]
) -> Generator[Gather, Any, dict[int, int]]:
    """By model, a guess in whose window the magnitude of this rank is, from all coarse bins."""
    coarse = yield operations.coarse_histograms([*ranks])
    return {
        model: _middle(operations.select_bin(counts, rank)[0])
        for (model, rank), counts in zip(ranks.items(), coarse, strict=True)
    }


def _middle(coarse_bin: int) -> int:
    """Bits of the magnitude whose window is a coarse bin."""
    return coarse_bin * FINE_BINS + FINE_BINS // 2


def _ties_left(
    thresholds: Sequence[TrimThreshold], segments: SegmentCounts | None
) -> Callable[[int], Counts]:
    """From a segment's number to the equal entries of each model that are left to keep there.

    Where segments were not counted, every equal entry is kept.
    """
    ties = np.array([threshold.ties for threshold in thresholds])
    if segments is None:
        return lambda _: ties.copy()
    tied = segments.counts[:, :, 1]
    left = ties - (tied.cumsum(axis=0) - tied)
    return lambda number: left[number].copy()


def _trim_findings(
    tasks: Sequence[TensorTask],
    ranks: Sequence[int],
    thresholds: _Thresholds,
    segments: SegmentCounts | None,
) -> dict[str, Mapping[str, Any]]:
    """Per tensor and model: entries kept, the smallest magnitude kept, how many share it."""
    ties = [threshold.ties for threshold in thresholds.chosen]
    if segments is None:
        found = _found(ranks, thresholds.chosen, thresholds.tied, ties)
        return {task.name: {"trim": found} for task in tasks}
    counted = {task.name: np.zeros((len(ranks), 2), dtype=np.int64) for task in tasks}
    for name, counts in zip(segments.names, segments.counts, strict=True):
        counted[name] += counts
    findings: dict[str, Mapping[str, Any]] = {}
    left = np.array(ties)
    for name, counts in counted.items():
        above, tied = counts.T
        kept = np.clip(left, 0, tied)
        left -= tied
        found = _found((above + kept).tolist(), thresholds.chosen, tied.tolist(), kept.tolist())
        findings[name] = {"trim": found}
    return findings


def _found(
    kept: Sequence[int],
    thresholds: Sequence[TrimThreshold],
    tied: Sequence[int],
    tied_kept: Sequence[int],
) -> list[dict[str, Any]]:
    """What was found out about each model's task vector."""
    numbers = zip(kept, map(magnitude, thresholds), tied, tied_kept, strict=True)
    return [
        {
            "kept": each,
            "threshold": smallest if math.isfinite(smallest) else None,
            "tied": equal,
            "tied_kept": equal_kept,
        }
        for each, smallest, equal, equal_kept in numbers
    ]


def merge_dare(tasks: Sequence[TensorTask], operations: Operations) -> Passes:
    """`dare_utils.dare_linear` and `dare_ties`: masks are made per block from the element index."""
    (task,) = tasks
    parameters = task.parameters
    densities, rescale = parameters["densities"], parameters["rescale"]
    models = range(len(densities))
    keys = tuple(mask_key(parameters["seed"], str(model), task.name) for model in models)
    norms = [(math.nan, math.nan)] * len(keys)
    if rescale == "l1":
        parts = yield operations.absolute_parts(Drop(keys, densities, (1.0,) * len(keys)))
        sums = parts.totals()
        norms = list(zip(sums[: len(keys)], sums[len(keys) :], strict=True))
    factors = tuple(
        rescale_factor(rescale, density, *norm)
        for density, norm in zip(densities, norms, strict=True)
    )
    elect = parameters["variant"] == "ties"
    task_vectors = _task_vectors(parameters, Drop(keys, densities, factors), elect=elect)
    findings = {task.name: {"rescale_factors": factors}}
    return Merge(operations.merge_task_vectors(task_vectors), findings=findings)


def _task_vectors(
    parameters: Mapping[str, Any],
    sparsify: Trim | TrimRows | Drop | None = None,
    *,
    elect: bool = False,
) -> TaskVectorMerge:
    weights, lam, normalize = (parameters[name] for name in ("weights", "lam", "normalize"))
    return TaskVectorMerge(weights, lam, normalize, elect, sparsify)


def _check_normalizable(parameters: Mapping[str, Any]) -> None:
    check_weights(parameters["weights"])
    if parameters["normalize"]:
        check_normalizable(parameters["weights"])


def _check_ties(parameters: Mapping[str, Any]) -> None:
    check_ties_weights(parameters["weights"], normalize=parameters["normalize"])


def _ties_passes(parameters: Mapping[str, Any]) -> int:
    """One to find the thresholds and one to merge; more where a sample is misleading."""
    trims = any(0 < density < 1 for density in parameters["densities"])
    return 2 if trims and parameters["trim_scope"] != "row" else 1


def _check_dare(parameters: Mapping[str, Any]) -> None:
    (_check_ties if parameters["variant"] == "ties" else _check_normalizable)(parameters)


def _advise(parameters: Mapping[str, Any]) -> Iterator[str]:
    """On task vectors: densities, weights and lambda that make a result no one wants."""
    densities = parameters.get("densities", ())
    if densities and all(density == 1 for density in densities):
        yield "every density is 1.0, so nothing is trimmed or dropped; 0.2 to 0.5 is usual"
    for model, density in enumerate(densities, 1):
        if density == 0:
            yield f"density 0 leaves nothing of model {model}"
    if parameters["lam"] == 0:
        yield "lambda is 0, so the result is the base"
    reach = abs(parameters["lam"]) * sum(abs(weight) for weight in parameters["weights"])
    if not parameters["normalize"] and reach > ADVISED_REACH * len(parameters["weights"]):
        yield (
            f"lambda times the weights sums to {reach:g}; weights are factors, not percent, "
            "and 0.3 to 1 for each model is usual"
        )


def _remark_on_slerp(findings: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    lines = [name for name, found in findings.items() if found["branch"] == "lerp"]
    opposite = [name for name in lines if findings[name]["cosine"] < 0]
    if lines:
        yield (
            f"{len(lines)} of {len(findings)} tensors took the straight line: they are so nearly "
            "parallel (cosine beyond 0.9995) that the arc is one"
        )
    if opposite:
        yield (
            f"{len(opposite)} tensors point opposite ways, so that near t 0.5 little is left of "
            f"them ({', '.join(opposite[:3])})"
        )


SAFE_DEVIATIONS = 5
"""How many standard deviations of a sample's rank are taken for safe."""

ADVISED_REACH = 5.0
"""Where lambda times the mean weight lies above this, percent were probably meant."""

WEIGHTS = Parameter(
    "weights", float, 1.0, "multiplier of each model", lambda w: check_weights([w]), per_model=True
)
DENSITIES = Parameter(
    "densities",
    float,
    1.0,
    "share of each task vector that is kept, in [0, 1]",
    check_density,
    per_model=True,
)
LAM = Parameter(
    "lam", float, 1.0, "scale of the merged task vector (lambda)", check_lam, flag="--lambda"
)


def _normalize(default: bool, what: str) -> Parameter:
    return Parameter("normalize", bool, default, f"divide by the sum of the weights{what}")


METHODS: dict[str, Method] = {
    "linear": Method(
        merge_linear,
        (WEIGHTS, _normalize(True, "")),
        uses_base=False,
        check=_check_normalizable,
        copies=2,
    ),
    "slerp": Method(
        merge_slerp,
        (Parameter("t", float, 0.5, "position: 0 is the first model, 1 the second", check_t),),
        passes=lambda _: 2,
        uses_base=False,
        model_count=2,
        sums=lambda _, models: 3,
        remarks=_remark_on_slerp,
    ),
    "task_arithmetic": Method(
        merge_task_arithmetic,
        (WEIGHTS, LAM, _normalize(False, "")),
        check=_check_normalizable,
        advice=_advise,
    ),
    "ties": Method(
        merge_ties,
        (
            WEIGHTS,
            DENSITIES,
            LAM,
            _normalize(True, " of the models that agree"),
            Parameter(
                "trim_scope",
                str,
                "tensor",
                "what a density is a share of: each tensor, each of its rows, or the whole model",
                choices=TRIM_SCOPES,
            ),
        ),
        passes=_ties_passes,
        check=_check_ties,
        advice=_advise,
        whole_model=lambda p: p["trim_scope"] == "model",
        bins=FINE_BINS,
    ),
    "dare": Method(
        merge_dare,
        (
            WEIGHTS,
            DENSITIES,
            LAM,
            Parameter("seed", int, 0, "seed of the random masks", check_seed),
            Parameter(
                "variant",
                str,
                "linear",
                "linear adds the task vectors, ties elects signs",
                choices=("linear", "ties"),
            ),
            Parameter(
                "rescale",
                str,
                "inverse_density",
                "how kept entries are scaled up: by 1/density, to the same L1 norm, or not",
                choices=RESCALES,
            ),
            _normalize(False, ""),
        ),
        passes=lambda p: 2 if p["rescale"] == "l1" else 1,
        sums=lambda p, models: 2 * models if p["rescale"] == "l1" else 0,
        check=_check_dare,
        advice=_advise,
    ),
}
