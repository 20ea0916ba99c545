"""The methods: what each is called, which parameters it takes, and how it merges one tensor.

A method here is a few lines over the pure functions of the `*_utils` modules: a generator that
asks `merge_stream` for passes over a tensor and ends with the function for a block. To add one:
its functions in a `*_utils` module, an entry in `METHODS`, a driver, a test.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import dare_utils
import ties_utils
from linear_utils import add_task_vector, combine_deltas, linear
from merge_recipe import Parameter
from merge_stream import Block, Gather, Merge, Passes, TensorTask
from slerp_utils import apply_slerp, dot_parts, slerp_coefficients
from tensor_utils import check_lam, check_normalizable, check_t, check_weights
from ties_utils import TrimThreshold, check_density, check_ties_weights, elect_and_merge


@dataclass(frozen=True)
class Method:
    """A merging method.

    Attributes:
        merge_tensor: merges one tensor; see `merge_stream.Passes`.
        parameters: what the user can set.
        passes: how often the inputs are read, from the resolved parameters.
        uses_base: whether the method needs the models' common ancestor.
        model_count: exact number of fine-tuned models, or None for one or more.
        check: raises `ValueError` for parameters that do not go together.
        advice: remarks on parameters that are allowed and seldom meant.
        remarks: what is worth saying about the findings of all tensors.
        copies: float32 blocks that a thread holds per input, as measured; for the memory figure.
    """

    merge_tensor: Callable[[TensorTask], Passes | Merge]
    parameters: tuple[Parameter, ...]
    passes: Callable[[Mapping[str, Any]], int] = lambda _: 1
    uses_base: bool = True
    model_count: int | None = None
    check: Callable[[Mapping[str, Any]], None] = lambda _: None
    advice: Callable[[Mapping[str, Any]], Iterable[str]] = lambda _: ()
    remarks: Callable[[Mapping[str, Mapping[str, Any]]], Iterable[str]] = lambda _: ()
    copies: int = 7


def merge_linear(task: TensorTask) -> Merge:
    """`linear_utils.linear`, block by block."""
    weights, normalize = task.parameters["weights"], task.parameters["normalize"]
    return Merge(lambda block: linear(block.models, weights, normalize=normalize))


def merge_slerp(task: TensorTask) -> Passes:
    """`slerp_utils.slerp`: dot products over the whole tensor, then two multipliers."""
    parts = yield Gather(lambda block: dot_parts(*block.models), _join_lists)
    aa, cc, ac = (math.fsum(part) for part in parts)
    coefficients = slerp_coefficients(aa, cc, ac, task.parameters["t"])
    findings = {
        "cosine": coefficients.cosine,
        "branch": "lerp" if coefficients.used_lerp else "slerp",
    }
    return Merge(lambda block: apply_slerp(coefficients, block.models), findings)


def merge_task_arithmetic(task: TensorTask) -> Merge:
    """`linear_utils.task_arithmetic`, block by block."""
    weights, normalize = task.parameters["weights"], task.parameters["normalize"]

    def merge(block: Block) -> Tensor:
        delta = combine_deltas(block.deltas, weights, normalize=normalize)
        return add_task_vector(_base(block), delta, task.parameters["lam"])

    return Merge(merge)


def merge_ties(task: TensorTask) -> Passes:
    """`ties_utils.ties`: the trim thresholds of the whole tensor, then blocks on their own.

    Three passes find the thresholds and where the entries equal to them lie: the upper bits of
    the magnitudes, the lower bits, the number of equal entries in each block.
    """
    densities, numel = task.parameters["densities"], task.info.numel
    ranks = [ties_utils.kept_count(density, numel) for density in densities]
    thresholds = [ties_utils.KEEP_ALL if rank else ties_utils.KEEP_NONE for rank in ranks]
    trimmed = [model for model, rank in enumerate(ranks) if 0 < rank < numel]
    tied = [[0] for _ in densities]
    if trimmed:
        coarse = yield Gather(
            lambda block: [ties_utils.coarse_histogram(block.deltas[m]) for m in trimmed], _add_each
        )
        bins = [
            ties_utils.select_bin(counts, ranks[model])
            for model, counts in zip(trimmed, coarse, strict=True)
        ]
        fine = yield Gather(
            lambda block: [
                ties_utils.fine_histogram(block.deltas[model], coarse_bin)
                for model, (coarse_bin, _) in zip(trimmed, bins, strict=True)
            ],
            _add_each,
        )
        for model, (coarse_bin, above), counts in zip(trimmed, bins, fine, strict=True):
            thresholds[model] = ties_utils.threshold_from(coarse_bin, counts, ranks[model] - above)
        counted = yield Gather(
            lambda block: [
                [ties_utils.count_ties(block.deltas[m], thresholds[m])] for m in trimmed
            ],
            _join_lists,
        )
        for model, counts in zip(trimmed, counted, strict=True):
            tied[model] = list(itertools.accumulate(counts, initial=0))

    def merge(block: Block) -> Tensor:
        deltas = [
            ties_utils.trim_apply(delta, threshold, before[block.index] if threshold.ties else 0)
            for delta, threshold, before in zip(block.deltas, thresholds, tied, strict=True)
        ]
        return _elect(block, deltas, task.parameters)

    totals = [before[-1] for before in tied]
    return Merge(merge, {"trim": _trim_findings(ranks, thresholds, totals)})


def _trim_findings(
    ranks: list[int], thresholds: list[TrimThreshold], tied: list[int]
) -> list[dict[str, Any]]:
    """Per model: entries kept, the smallest magnitude kept (if any), and how many share it."""
    return [
        {
            "kept": rank,
            "threshold": ties_utils.magnitude(threshold) if rank else None,
            "tied": count,
            "tied_kept": threshold.ties,
        }
        for rank, threshold, count in zip(ranks, thresholds, tied, strict=True)
    ]


def merge_dare(task: TensorTask) -> Passes:
    """`dare_utils.dare_linear` and `dare_ties`: masks are made per block from the element index."""
    parameters = task.parameters
    densities, rescale = parameters["densities"], parameters["rescale"]
    keys = [
        dare_utils.mask_key(parameters["seed"], str(model), task.name)
        for model in range(len(densities))
    ]

    def dropped(block: Block) -> list[Tensor]:
        return [
            dare_utils.drop(delta, density, key, block.start)
            for delta, density, key in zip(block.deltas, densities, keys, strict=True)
        ]

    norms = [(math.nan, math.nan)] * len(densities)
    if rescale == "l1":
        parts = yield Gather(
            lambda block: [dare_utils.absolute_parts(d) for d in (*block.deltas, *dropped(block))],
            _join_lists,
        )
        sums = [math.fsum(part) for part in parts]
        norms = list(zip(sums[: len(keys)], sums[len(keys) :], strict=True))
    factors = [
        dare_utils.rescale_factor(rescale, density, *norm)
        for density, norm in zip(densities, norms, strict=True)
    ]

    def merge(block: Block) -> Tensor:
        deltas = [delta * factor for delta, factor in zip(dropped(block), factors, strict=True)]
        if parameters["variant"] == "ties":
            return _elect(block, deltas, parameters)
        delta = combine_deltas(deltas, parameters["weights"], normalize=parameters["normalize"])
        return add_task_vector(_base(block), delta, parameters["lam"])

    return Merge(merge, {"rescale_factors": factors})


def _elect(block: Block, deltas: list[Tensor], parameters: Mapping[str, Any]) -> Tensor:
    weights, lam, normalize = (parameters[name] for name in ("weights", "lam", "normalize"))
    return elect_and_merge(_base(block), deltas, weights, lam, normalize)


def _base(block: Block) -> Tensor:
    assert block.base is not None  # the plan gives one to every method that uses it
    return block.base


def _add_each(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    """Add histogram by histogram, in place: a new one for each block costs as much as counting."""
    return [a.add_(b) for a, b in zip(left, right, strict=True)]


def _join_lists(left: list[list[Any]], right: list[list[Any]]) -> list[list[Any]]:
    """Join list by list, in place: there can be many thousand blocks."""
    for a, b in zip(left, right, strict=True):
        a.extend(b)
    return left


def _check_normalizable(parameters: Mapping[str, Any]) -> None:
    check_weights(parameters["weights"])
    if parameters["normalize"]:
        check_normalizable(parameters["weights"])


def _check_ties(parameters: Mapping[str, Any]) -> None:
    check_ties_weights(parameters["weights"], normalize=parameters["normalize"])


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
        (WEIGHTS, DENSITIES, LAM, _normalize(True, " of the models that agree")),
        passes=lambda p: 4 if any(0 < density < 1 for density in p["densities"]) else 1,
        check=_check_ties,
        advice=_advise,
    ),
    "dare": Method(
        merge_dare,
        (
            WEIGHTS,
            DENSITIES,
            LAM,
            Parameter("seed", int, 0, "seed of the random masks", dare_utils.check_seed),
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
                choices=dare_utils.RESCALES,
            ),
            _normalize(False, ""),
        ),
        passes=lambda p: 2 if p["rescale"] == "l1" else 1,
        check=_check_dare,
        advice=_advise,
    ),
}
