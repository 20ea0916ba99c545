"""What the methods compute with numbers alone: checks of parameters, and what follows from them
and from sums over a tensor.

No tensors here, and so no torch: a streamed merge whose arithmetic is done by `merge_kernels`
needs these, and would wait longer for torch to be imported than many merges take. Each method's
`*_utils` module offers those that are its own. The checks raise `ValueError` and know no model or
tensor names; callers that do add them.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import Literal, NamedTuple

Key = tuple[int, int]
Rescale = Literal["inverse_density", "l1", "none"]
RESCALES: tuple[Rescale, ...] = ("inverse_density", "l1", "none")
TrimScope = Literal["tensor", "row", "model"]
TRIM_SCOPES: tuple[TrimScope, ...] = ("tensor", "row", "model")
TrimTies = Literal["index", "all"]
TRIM_TIES: tuple[TrimTies, ...] = ("index", "all")
KRule = Literal["floor", "paper", "peft"]
K_RULES: tuple[KRule, ...] = ("floor", "paper", "peft")
Denominator = Literal["weight", "count", "none"]
DENOMINATORS: tuple[Denominator, ...] = ("weight", "count", "none")
ElectOn = Literal["weighted", "unweighted"]
ELECT_ON: tuple[ElectOn, ...] = ("weighted", "unweighted")
ElectMethod = Literal["mass", "count"]
ELECT_METHODS: tuple[ElectMethod, ...] = ("mass", "count")
RankRescale = Literal["inverse_prob", "l1", "none"]
RANK_RESCALES: tuple[RankRescale, ...] = ("inverse_prob", "l1", "none")
SceMask = Literal["deltas", "weights_only"]
SCE_MASKS: tuple[SceMask, ...] = ("deltas", "weights_only")

RUN = 2**14
"""Elements of a row that are summed to one number. Runs never cross a row, so their sums do not
depend on how the rows of a tensor are grouped into blocks."""

LANES = 2**8
"""Sums that a run is added up in, side by side, before they are added to each other."""

SMALLEST, LARGEST = 1e-30, 1e30
"""Weights beyond these magnitudes are refused: products with them leave the range of float32."""


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise `ValueError` unless a value is one of those there are."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def check_weights(weights: Sequence[float]) -> None:
    """Raise `ValueError` unless there is a weight, and all are 0 or of a magnitude in range."""
    if not weights:
        raise ValueError("weights must have at least one entry, got none")
    for weight in weights:
        if not (weight == 0 or SMALLEST <= abs(weight) <= LARGEST):
            raise ValueError(
                f"weights must be 0 or between {SMALLEST:g} and {LARGEST:g} in magnitude, "
                f"got {weight}"
            )


def check_normalizable(weights: Sequence[float]) -> None:
    """Raise `ValueError` when dividing by the sum of `weights` makes no sense.

    The sum counts as zero below 1e-12 of the summed magnitudes, and where float32 sees none.
    """
    total = math.fsum(weights)
    magnitude = math.fsum(abs(weight) for weight in weights)
    if abs(total) <= 1e-12 * magnitude or float32_sum(weights) == 0:
        raise ValueError(
            f"weights {list(weights)} sum to {total:g}, so they cannot be normalized. "
            "Change a weight, or turn normalize off to take the plain sum"
        )


def float32_sum(weights: Sequence[float]) -> float:
    """Sum of the weights as float32 arithmetic applies them, in their order.

    >>> float32_sum([1.0, -0.999999999])
    0.0
    """
    total = 0.0
    for weight in weights:
        total = _float32(total + _float32(weight))  # rounding to float64 first changes nothing
    return total


def _float32(value: float) -> float:
    """The nearest float32."""
    single: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return single


def check_count(name: str, values: Sequence[float], models: int) -> None:
    """Raise `ValueError` unless there is one value for each model."""
    if len(values) != models:
        raise ValueError(
            f"{name} must have one entry per model, got {len(values)} for {models} models"
        )


def check_lam(lam: float, name: str = "lam") -> None:
    """Raise `ValueError` unless `lam`, or another factor, is a number of a magnitude in range."""
    if not abs(lam) <= LARGEST:
        raise ValueError(f"{name} must be a number up to {LARGEST:g} in magnitude, got {lam}")


def check_t(t: float) -> None:
    """Raise `ValueError` unless `t` is in [0, 1]."""
    if not 0.0 <= t <= 1.0:
        raise ValueError(f"t must be in [0, 1] (0 is the first model, 1 the second), got {t}")


def check_distance(t: float) -> None:
    """Raise `ValueError` unless `t` is a distance between weights."""
    if not 0.0 <= t <= LARGEST:
        raise ValueError(f"t must be at least 0 (a distance between weights), got {t}")


def check_density(density: float) -> None:
    """Raise `ValueError` unless `density` is in [0, 1]."""
    if not 0.0 <= density <= 1.0:
        raise ValueError(
            f"densities must be in [0, 1] (the share of each task vector kept), got {density}"
            f"{f'; for {density:g} percent write {density / 100:g}' if 1 < density <= 100 else ''}"
        )


def kept_count(density: float, numel: int, rule: KRule = "floor") -> int:
    """How many of `numel` entries a density keeps: all for density 1, none for density 0, else

    - "floor": `int(density * numel)`, but at least one, as in mergekit;
    - "peft": `int(density * numel)`, which can be none;
    - "paper": one more than that, as in the authors' code.

    The product is taken in float64 and cut off.

    >>> kept_count(0.29, 100), kept_count(0.1, 3), kept_count(0.0, 3)
    (28, 1, 0)
    >>> kept_count(0.1, 3, "peft"), kept_count(0.6, 5, "paper")
    (0, 4)
    """
    check_density(density)
    check_choice("k_rule", rule, K_RULES)
    if density in (0.0, 1.0) or numel == 0:
        return int(density) * numel
    cut_off = int(density * numel)
    return {"floor": max(1, cut_off), "peft": cut_off, "paper": min(numel, cut_off + 1)}[rule]


def window_counts(density: float, gamma: float, numel: int, *, shrink: bool = True) -> "Window":
    """How many entries Breadcrumbs keeps, and how many larger ones it removes.

    `int(density * numel)` are kept below the `int(gamma * numel)` largest. Where both do not fit,
    fewer of the largest are removed (`shrink`, as in mergekit), or fewer kept (the authors' code).
    So at density 1 everything is kept with `shrink`, and all but the largest without.

    >>> window_counts(0.6, 0.2, 10), window_counts(0.9, 0.3, 10)
    (Window(kept=6, removed=2), Window(kept=9, removed=1))
    >>> window_counts(0.9, 0.3, 10, shrink=False)
    Window(kept=7, removed=3)
    """
    check_density(density)
    check_gamma(gamma)
    kept, removed = int(density * numel), int(gamma * numel)
    if shrink:
        return Window(kept, min(removed, numel - kept))
    return Window(min(kept, numel - removed), removed)


class Window(NamedTuple):
    """Entries to keep of a task vector, and larger ones that are removed; both are counts."""

    kept: int
    removed: int


def check_gamma(gamma: float) -> None:
    """Raise `ValueError` unless `gamma` is in [0, 1)."""
    if not 0.0 <= gamma < 1.0:
        raise ValueError(
            f"gammas must be in [0, 1) (the share of largest changes removed), got {gamma}"
        )


def check_ties_weights(weights: Sequence[float], *, normalize: bool) -> None:
    """Raise `ValueError` for weights that TIES cannot use.

    A negative weight flips a model's vote; divided by a sum of weights of both signs the result
    can have any size, so it needs `normalize=False`.
    """
    check_weights(weights)
    if normalize and min(weights) < 0:
        raise ValueError(
            f"weights must not be negative when normalize is on, got {list(weights)}. "
            "To subtract a model, turn normalize off, turn negative_weights on, or take "
            "task_arithmetic"
        )


class TrimThreshold(NamedTuple):
    """What to keep of a task vector: float32 bits of |delta| above `bits`, and some equal to it.

    `ties` is how many of the entries equal to the threshold are kept, lowest flat index first.
    """

    bits: int
    ties: int


NO_MAGNITUDE = 2**31 - 1
"""Bits above those of every magnitude."""

KEEP_ALL = TrimThreshold(-1, 0)
KEEP_NONE = TrimThreshold(NO_MAGNITUDE, 0)


class Cut(NamedTuple):
    """Entries of a task vector to keep: those with |delta| between two bounds.

    Entries equal to a bound are told apart by their place among these, in flat order, from 0 on.

    Attributes:
        lower: float32 bits; magnitudes above are kept.
        first, stop: of the entries equal to `lower`, these are kept as well.
        upper: float32 bits; magnitudes above are dropped. `NO_MAGNITUDE` for no bound.
        until: of the entries equal to `upper`, those before this one are kept.
    """

    lower: int
    first: int
    stop: int
    upper: int = NO_MAGNITUDE
    until: int = 0


def trim_cut(threshold: TrimThreshold) -> Cut:
    """What a threshold keeps: of the entries equal to it, the first ones."""
    return Cut(threshold.bits, 0, threshold.ties)


def window_cut(lower: TrimThreshold, lower_tied: int, upper: TrimThreshold, upper_tied: int) -> Cut:
    """What lies above one threshold and not above another, as an ascending stable sort puts it.

    Of equal entries the last ones count as the larger.

    Args:
        lower, upper: thresholds that keep the wanted entries and those to be removed, and the
            latter alone.
        lower_tied, upper_tied: how many entries are equal to each.
    """
    if upper == KEEP_NONE:
        return Cut(lower.bits, lower_tied - lower.ties, lower_tied)
    until = upper_tied - upper.ties
    return Cut(lower.bits, lower_tied - lower.ties, lower_tied, upper.bits, until)


def magnitude(threshold: TrimThreshold) -> float:
    """The threshold as a number; 0.0 where everything is kept, inf where nothing is.

    >>> magnitude(TrimThreshold(1065353216, 2))
    1.0
    """
    return magnitude_of(threshold.bits)


def magnitude_of(bits: int) -> float:
    """The number with these float32 bits; 0.0 for -1, and inf for `NO_MAGNITUDE`."""
    if bits in (-1, NO_MAGNITUDE):
        return 0.0 if bits == -1 else math.inf
    value: float = struct.unpack("<f", struct.pack("<i", bits))[0]
    return value


def check_seed(seed: int) -> None:
    """Raise `ValueError` unless `seed` is an integer in [0, 2**64)."""
    if not (isinstance(seed, int) and 0 <= seed < 2**64):
        raise ValueError(f"seed must be an integer in [0, 2**64), got {seed!r}")


def mask_key(seed: int, tag: str, name: str, *, purpose: str = "mask") -> Key:
    """The generator's key for one tensor of one model.

    Args:
        seed: in [0, 2**64).
        tag: which model; its position among the fine-tuned models, "0", "1", ...
        name: the tensor's name in the merged model.
        purpose: keeps draws for different ends apart.

    Returns:
        Two unsigned 64-bit integers.

    >>> [f"{half:016x}" for half in mask_key(42, "0", "model.layers.0.mlp.up_proj.weight")]
    ['56716f7037a6c786', '86777c0fd21c4e2b']
    """
    check_seed(seed)
    text = b"merge-mask/v1\0" + purpose.encode() + b"\0" + seed.to_bytes(8, "little")
    digest = hashlib.sha256(text + tag.encode() + b"\0" + name.encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def keep_limit(density: float) -> int:
    """Draws below this keep their element; in [0, 2**32]."""
    check_density(density)
    return math.floor(density * 2**32 + 0.5)


def rescale_factor(
    rescale: Rescale, density: float, l1: float = math.nan, l1_kept: float = math.nan
) -> float:
    """What the kept entries are multiplied by.

    Args:
        rescale: "inverse_density" is `1 / density`, unbiased, as in the paper and PEFT; "l1"
            keeps the tensor's L1 norm (mergekit since 0.1.0); "none" is 1.
        density: in [0, 1].
        l1, l1_kept: L1 norms before and after dropping, for "l1" only. Below 1e-7 the
            factor is 1.

    >>> rescale_factor("inverse_density", 0.25), rescale_factor("l1", 0.25, 6.0, 2.0)
    (4.0, 3.0)
    """
    check_choice("rescale", rescale, RESCALES)
    check_density(density)
    if rescale == "inverse_density":
        return 1.0 / density if keep_limit(density) else 0.0
    if rescale == "l1" and min(l1, l1_kept) >= 1e-7:
        return l1 / l1_kept
    return 1.0


def check_della(density: float, epsilon: float) -> None:
    """Raise `ValueError` unless every chance that DELLA gives lies between 0 and 1.

    Densities 0 and 1 keep nothing and everything, whatever `epsilon` is.
    """
    check_density(density)
    if not 0.0 <= epsilon < 1.0:
        raise ValueError(f"epsilons must be in [0, 1), got {epsilon}")
    if density in (0.0, 1.0):
        return
    if density - epsilon <= 0.0 or density + epsilon >= 1.0:
        reach = min(density, 1.0 - density)
        raise ValueError(
            f"epsilons must leave density - epsilon and density + epsilon between 0 and 1, got "
            f"density {density} and epsilon {epsilon}. Take an epsilon below {reach:g}"
        )


def keep_chances(density: float, epsilon: float, length: int) -> list[float]:
    """Chances of being kept, for the entries of a row from the smallest magnitude to the largest.

    `density - epsilon + 2 epsilon r / (length - 1)` for rank r; their mean is the density.

    >>> keep_chances(0.5, 0.25, 3), keep_chances(0.5, 0.25, 1)
    ([0.25, 0.5, 0.75], [0.5])
    """
    check_della(density, epsilon)
    if density in (0.0, 1.0) or length == 1:
        return [density] * length
    return [density - epsilon + 2 * epsilon * rank / (length - 1) for rank in range(length)]


def rank_factors(rescale: RankRescale, chances: Sequence[float]) -> list[float]:
    """What an entry of each rank is multiplied by when it is kept; see `della_utils.della`.

    >>> rank_factors("inverse_prob", [0.25, 0.5])
    [4.0, 2.0]
    """
    check_choice("rescale", rescale, RANK_RESCALES)
    if rescale != "inverse_prob":
        return [1.0] * len(chances)
    return [1.0 / chance if chance else 0.0 for chance in chances]


def check_topk(select_topk: float) -> None:
    """Raise `ValueError` unless `select_topk` is in [0, 1]."""
    if not 0.0 <= select_topk <= 1.0:
        raise ValueError(f"select_topk must be in [0, 1] (the share selected), got {select_topk}")


def selected_count(select_topk: float, varying: int, numel: int) -> int:
    """How many entries SCE selects: `int(select_topk * varying)`, or all of them for 1.

    Args:
        select_topk: in [0, 1].
        varying: entries in which the models differ.
        numel: all entries.

    >>> selected_count(0.67, 3, 4), selected_count(1.0, 3, 4)
    (2, 4)
    """
    check_topk(select_topk)
    return numel if select_topk == 1 else int(select_topk * varying)


def sce_weights(squares: Sequence[float], numel: int, floor: float = 0.0) -> list[float]:
    """Weights of the models: their mean squares, divided by the sum of these.

    A model that has changed anything has a weight that float32 can hold, however small.

    Args:
        squares: summed squares of each model's selected changes.
        numel: entries of the tensor.
        floor: the weights are equal where the mean squares sum to less, and where all are 0.

    >>> sce_weights([2.0, 6.0], 4)
    [0.25, 0.75]
    """
    total = math.fsum(squares)
    if total == 0 or total / numel < floor:
        return [1.0 / len(squares)] * len(squares)
    return [max(square / total, SMALLEST) if square else 0.0 for square in squares]


def check_at_least_0(name: str, value: float) -> None:
    """Raise `ValueError` unless a value is 0 or more, and finite."""
    if not 0.0 <= value <= LARGEST:
        raise ValueError(f"{name} must be at least 0 and at most {LARGEST:g}, got {value}")


def check_above_0(name: str, value: float) -> None:
    """Raise `ValueError` unless a value is more than 0, and finite."""
    if not 0.0 < value <= LARGEST:
        raise ValueError(f"{name} must be above 0 and at most {LARGEST:g}, got {value}")


def ramplus_factors(
    shared: Sequence[int], unique: Sequence[int], r: float = 0.1, alpha: float = 0.2
) -> list[float]:
    """What RAM+ multiplies the changes by that one model alone has made, per model.

    `1 + r * min(shared / unique, alpha)`: a model whose changes are mostly averaged with those of
    others gets more of its own.

    Args:
        shared, unique: entries that each model has changed together with others, and alone.
        r: >= 0.
        alpha: >= 0.

    >>> ramplus_factors([1, 1], [10, 0])
    [1.01, 1.02]
    """
    check_at_least_0("r", r)
    check_at_least_0("alpha", alpha)
    ratios = [s / u if u else (alpha if s else 0.0) for s, u in zip(shared, unique, strict=True)]
    return [1.0 + r * min(ratio, alpha) for ratio in ratios]


def quartile_ranks(numel: int) -> tuple[int, int, int]:
    """Ranks from the top, of `numel` entries, of the lower quartile, the median and the upper one.

    >>> quartile_ranks(5)
    (4, 3, 2)
    """
    first, median, third = (numel - int(share * (numel - 1)) for share in (0.25, 0.5, 0.75))
    return first, median, third


def check_mask_lambda(mask_lambda: float) -> None:
    """Raise `ValueError` unless `mask_lambda` is a factor of a distance."""
    if not 0.0 <= mask_lambda <= LARGEST:
        raise ValueError(
            f"mask_lambdas must be at least 0 (0.2 to 0.6 is usual), got {mask_lambda}"
        )


def check_agreement(agreement: int) -> None:
    """Raise `ValueError` unless `agreement` is a number of models."""
    if agreement < 0:
        raise ValueError(f"agreement must be at least 0 (a number of models), got {agreement}")


def check_weight_decay(weight_decay: float) -> None:
    """Raise `ValueError` unless merged values can be shrunk by it."""
    if not 0.0 <= weight_decay < 1.0:
        raise ValueError(f"weight_decay must be in [0, 1), got {weight_decay}")


def check_clamp_range(clamp_range: tuple[float, float] | None) -> None:
    """Raise `ValueError` unless merged values can be clamped to it; None is no bounds."""
    if clamp_range is not None and not clamp_range[0] <= clamp_range[1]:
        raise ValueError(
            f"clamp_range must be a lowest and a highest value, in this order, got {clamp_range}"
        )
