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

RUN = 2**14
"""Elements of a row that are summed to one number. Runs never cross a row, so their sums do not
depend on how the rows of a tensor are grouped into blocks."""

LANES = 2**10
"""Sums that a run is added up in, side by side, before they are added to each other."""

SMALLEST, LARGEST = 1e-30, 1e30
"""Weights beyond these magnitudes are refused: products with them leave the range of float32."""


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


def check_lam(lam: float) -> None:
    """Raise `ValueError` unless `lam` is a number of a magnitude in range."""
    if not abs(lam) <= LARGEST:
        raise ValueError(f"lam must be a number up to {LARGEST:g} in magnitude, got {lam}")


def check_t(t: float) -> None:
    """Raise `ValueError` unless `t` is in [0, 1]."""
    if not 0.0 <= t <= 1.0:
        raise ValueError(f"t must be in [0, 1] (0 is the first model, 1 the second), got {t}")


class SlerpCoefficients(NamedTuple):
    """`result = first * a + second * c`, with how it came about."""

    first: float
    second: float
    used_lerp: bool
    cosine: float


def slerp_coefficients(
    aa: float, cc: float, ac: float, t: float, *, dot_threshold: float = 0.9995, eps: float = 1e-8
) -> SlerpCoefficients:
    """The two multipliers of SLERP, from the dot products of the two tensors.

    With `cos(theta) = ac / sqrt(aa * cc)`, clipped to [-1, 1], they are
    `sin((1-t) theta) / sin(theta)` and `sin(t theta) / sin(theta)`. They apply to the tensors
    as they are, not to unit vectors. Where `|cos(theta)|` is above `dot_threshold` the tensors
    are (anti)parallel and the straight line `1-t`, `t` is taken; whole tensors of two
    fine-tunes of one model mostly are. A tensor with norm up to `eps` is not scaled to unit
    length, so an all-zero one has cosine 0.

    Args:
        aa, cc, ac: `<a,a>`, `<c,c>`, `<a,c>` in float64.
        t: in [0, 1]; 0 is `a`, 1 is `c`.

    Raises:
        ValueError: `t` is outside [0, 1].

    Source: K. Shoemake, "Animating rotation with quaternion curves", 1985; threshold and eps as
    in mergekit 0.1.5.

    >>> slerp_coefficients(1.0, 1.0, 0.0, 0.5)[:3]
    (0.7071067811865475, 0.7071067811865475, False)
    """
    check_t(t)
    norm_a, norm_c = math.sqrt(aa), math.sqrt(cc)
    cosine = ac / (norm_a if norm_a > eps else 1.0) / (norm_c if norm_c > eps else 1.0)
    cosine = max(-1.0, min(1.0, cosine))
    if abs(cosine) > dot_threshold:
        return SlerpCoefficients(1.0 - t, t, True, cosine)
    theta = math.acos(cosine)
    first = math.sin((1.0 - t) * theta) / math.sin(theta)
    return SlerpCoefficients(first, math.sin(t * theta) / math.sin(theta), False, cosine)


def check_density(density: float) -> None:
    """Raise `ValueError` unless `density` is in [0, 1]."""
    if not 0.0 <= density <= 1.0:
        raise ValueError(
            f"densities must be in [0, 1] (the share of each task vector kept), got {density}"
            f"{f'; for {density:g} percent write {density / 100:g}' if 1 < density <= 100 else ''}"
        )


def kept_count(density: float, numel: int) -> int:
    """How many of `numel` entries a density keeps: `int(density * numel)`, but at least one.

    All for density 1, none for density 0. The product is taken in float64 and cut off, as in
    mergekit and PEFT; the authors' code keeps one entry more.

    >>> kept_count(0.29, 100), kept_count(0.1, 3), kept_count(0.0, 3)
    (28, 1, 0)
    """
    check_density(density)
    if density in (0.0, 1.0) or numel == 0:
        return int(density) * numel
    return max(1, int(density * numel))


def check_ties_weights(weights: Sequence[float], *, normalize: bool) -> None:
    """Raise `ValueError` for weights that TIES cannot use.

    A negative weight flips a model's vote; divided by a sum of weights of both signs the result
    can have any size, so it needs `normalize=False`.
    """
    check_weights(weights)
    if normalize and min(weights) < 0:
        raise ValueError(
            f"weights must not be negative when normalize is on, got {list(weights)}. "
            "Turn normalize off to subtract a model"
        )


class TrimThreshold(NamedTuple):
    """What to keep of a task vector: float32 bits of |delta| above `bits`, and some equal to it.

    `ties` is how many of the entries equal to the threshold are kept, lowest flat index first.
    """

    bits: int
    ties: int


KEEP_ALL = TrimThreshold(-1, 0)
KEEP_NONE = TrimThreshold(2**31 - 1, 0)


def magnitude(threshold: TrimThreshold) -> float:
    """The threshold as a number; 0.0 where everything is kept, inf where nothing is.

    >>> magnitude(TrimThreshold(1065353216, 2))
    1.0
    """
    if threshold in (KEEP_ALL, KEEP_NONE):
        return 0.0 if threshold == KEEP_ALL else math.inf
    value: float = struct.unpack("<f", struct.pack("<i", threshold.bits))[0]
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


def check_rescale(rescale: str) -> None:
    """Raise `ValueError` unless `rescale` is one of `RESCALES`."""
    if rescale not in RESCALES:
        raise ValueError(f"rescale must be one of {', '.join(RESCALES)}, got {rescale!r}")


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
    check_rescale(rescale)
    check_density(density)
    if rescale == "inverse_density":
        return 1.0 / density if keep_limit(density) else 0.0
    if rescale == "l1" and min(l1, l1_kept) >= 1e-7:
        return l1 / l1_kept
    return 1.0
