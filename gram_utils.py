"""Multipliers of models from their Gram matrix: SLERP and its kin, and Model Stock.

Every method here merges tensors x_1..x_N to a weighted sum of them, with multipliers that depend
only on their dot products, `gram[i][j] = <x_i, x_j>`. So one pass over large tensors gathers the
dot products (`slerp_utils.gram_parts`), these functions do the rest with numbers alone, and
another pass adds up the tensors (`linear_utils.combine`). No tensors here, and no torch.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, combinations_with_replacement
from typing import Literal, NamedTuple

from scalar_utils import check_above_0, check_choice, check_count, check_t, check_weights

Gram = Sequence[Sequence[float]]
StockAverage = Literal["cosine", "angle"]
STOCK_AVERAGES: tuple[StockAverage, ...] = ("cosine", "angle")


def gram_pairs(count: int) -> Iterator[tuple[int, int]]:
    """The pairs whose dot products make a Gram matrix: (0, 0), (0, 1), ..., (1, 1), ..."""
    return combinations_with_replacement(range(count), 2)


def gram_matrix(dots: Sequence[float], count: int) -> list[list[float]]:
    """The matrix from the dot products of `gram_pairs`.

    >>> gram_matrix([1.0, 2.0, 5.0], 2)
    [[1.0, 2.0], [2.0, 5.0]]
    """
    gram = [[0.0] * count for _ in range(count)]
    for (i, j), dot in zip(gram_pairs(count), dots, strict=True):
        gram[i][j] = gram[j][i] = dot
    return gram


class SlerpCoefficients(NamedTuple):
    """`result = first * a + second * c`, with how it came about."""

    first: float
    second: float
    used_lerp: bool
    cosine: float


def slerp_coefficients(
    aa: float,
    cc: float,
    ac: float,
    t: float,
    *,
    dot_threshold: float = 0.9995,
    eps: float = 1e-8,
    normalize: bool = False,
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
        dot_threshold: in (0, 1].
        eps: norms up to it count as zero.
        normalize: turn the direction along the arc and interpolate the length apart, on a
            straight line from `|a|` to `|c|`.

    Raises:
        ValueError: `t` is outside [0, 1].

    Source: K. Shoemake, "Animating rotation with quaternion curves", 1985; threshold and eps as
    in mergekit 0.1.5.

    >>> slerp_coefficients(1.0, 1.0, 0.0, 0.5)[:3]
    (0.7071067811865475, 0.7071067811865475, False)
    """
    check_t(t)
    norm_a, norm_c = math.sqrt(aa), math.sqrt(cc)
    unit_a, unit_c = (norm if norm > eps else 1.0 for norm in (norm_a, norm_c))
    cosine = max(-1.0, min(1.0, ac / unit_a / unit_c))
    first, second, used_lerp = _arc(cosine, t, abs(cosine) > dot_threshold)
    if normalize:
        # Along the arc between unit vectors the length is 1; on their straight line it is not,
        # nor where one of them is zero.
        squared = first * first * aa / unit_a**2 + second * second * cc / unit_c**2
        squared += 2 * first * second * cosine
        length = ((1.0 - t) * norm_a + t * norm_c) / (math.sqrt(max(squared, 0.0)) or 1.0)
        first, second = first * length / unit_a, second * length / unit_c
    return SlerpCoefficients(first, second, used_lerp, cosine)


def _arc(cosine: float, t: float, is_line: bool) -> tuple[float, float, bool]:
    """Multipliers of two vectors at this cosine: on the arc, or on a straight line."""
    if is_line:
        return 1.0 - t, t, True
    theta = math.acos(cosine)
    sine = math.sin(theta)
    return math.sin((1.0 - t) * theta) / sine, math.sin(t * theta) / sine, False


def nuslerp_t(weights: Sequence[float]) -> float:
    """Where between two models their weights lie; the middle where these cancel to 1e-6.

    Raises:
        ValueError: not two weights, or they have opposite signs and do not cancel.

    >>> nuslerp_t([1.0, 3.0])
    0.75
    """
    check_weights(weights)
    check_count("weights", weights, 2)
    total, magnitude = math.fsum(weights), math.fsum(map(abs, weights))
    t = 0.5 if abs(total) <= 1e-6 * magnitude else weights[1] / total
    if not 0.0 <= t <= 1.0:
        raise ValueError(f"weights must not have opposite signs, got {list(weights)}")
    return t


def check_nuslerp(weights: Sequence[float]) -> None:
    """Raise `ValueError` as `nuslerp_t`."""
    nuslerp_t(weights)


def nuslerp_coefficients(aa: float, cc: float, ac: float, t: float) -> SlerpCoefficients:
    """`slerp_coefficients` with a straight line only where the arc has no direction.

    That is where the cosine is within 1e-7 of 1 or -1, which is where mergekit's float32 sees 1.
    Norms below 1e-7 count as 1e-7.

    >>> nuslerp_coefficients(1.0, 1.0, 0.99999, 0.5).used_lerp
    False
    """
    check_t(t)
    cosine = ac / max(math.sqrt(aa), 1e-7) / max(math.sqrt(cc), 1e-7)
    cosine = max(-1.0, min(1.0, cosine))
    first, second, used_lerp = _arc(cosine, t, 1.0 - abs(cosine) < 1e-7)
    return SlerpCoefficients(first, second, used_lerp, cosine)


def multislerp_coefficients(
    gram: Gram, weights: Sequence[float], *, normalize: bool = True, eps: float = 1e-8
) -> list[float]:
    """Multipliers for the weighted mean direction with the weighted mean length.

    `y = (sum w_i |x_i|) * m / |m|` with `m = sum w_i x_i / (|x_i| + eps)`. mergekit's step in the
    tangent space at m adds nothing, because m is the mean by the same weights; so this is what
    its "Multi-SLERP" computes. Of two tensors it is not SLERP, but for equal weights and lengths.

    Args:
        gram: shape (N, N), float64.
        weights: one per tensor, their sum above 0.
        normalize: divide the weights by their sum first; it changes the length alone. One tensor
            is returned as it is, whatever its weight.
        eps: see above; below it `|m|` counts as zero.

    Raises:
        ValueError: the weights' sum is not above 0, or the directions cancel (of two tensors that
            do, the weighted sum is taken).

    Source: mergekit 0.1.5, `multislerp`.

    >>> [round(c, 6) for c in multislerp_coefficients([[9.0, 0.0], [0.0, 16.0]], [1.0, 1.0])]
    [0.824958, 0.618718]
    """
    check_multislerp(weights)
    check_count("weights", weights, len(gram))
    if len(gram) == 1:
        return [1.0]
    total = math.fsum(weights) if normalize else 1.0
    shares = [weight / total for weight in weights]
    norms = [math.sqrt(row[i]) for i, row in enumerate(gram)]
    if not any(norms):
        return shares  # of nothing but zeros
    units = [
        share / (norm + eps) if norm else 0.0 for share, norm in zip(shares, norms, strict=True)
    ]
    length = math.sqrt(max(_squared(gram, units), 0.0))
    if length <= eps * math.fsum(map(abs, shares)):
        if len(gram) == 2:
            return shares
        raise ValueError(
            f"the directions of the tensors cancel under the weights {list(weights)}. Change a "
            "weight, or use linear"
        )
    mean_norm = math.fsum(share * norm for share, norm in zip(shares, norms, strict=True))
    return [unit * mean_norm / length for unit in units]


def check_multislerp(weights: Sequence[float]) -> None:
    """Raise `ValueError` unless the weights sum to more than 0."""
    check_weights(weights)
    if not math.fsum(weights) > 0:
        raise ValueError(f"weights must sum to more than 0, got {list(weights)}")


def _squared(gram: Gram, coefficients: Sequence[float]) -> float:
    """Squared length of a weighted sum."""
    pairs = [(i, j) for i in range(len(gram)) for j in range(len(gram))]
    return math.fsum(coefficients[i] * coefficients[j] * gram[i][j] for i, j in pairs)


class KarcherMean(NamedTuple):
    """Multipliers of the Karcher mean, and how they were reached.

    Attributes:
        coefficients: one per tensor.
        iterations: steps taken.
        converged: the last step was shorter than the tolerance.
        cosine: lowest cosine between the mean and a tensor; near -1 the mean is not unique.
    """

    coefficients: tuple[float, ...]
    iterations: int
    converged: bool
    cosine: float


def karcher_coefficients(
    gram: Gram, weights: Sequence[float], *, max_iter: int = 10, tol: float = 1e-5
) -> KarcherMean:
    """Multipliers for the Riemannian mean of the directions, with the weighted mean length.

    The mean direction u minimises the weighted squared angles to the tensors' directions: each
    step goes along the sphere by the weighted mean of the tangents towards them. All of u's steps
    stay weighted sums of the tensors, so they are done on the multipliers.

    Args:
        gram: shape (N, N), float64.
        weights: one per tensor, not negative, their sum above 0.
        max_iter: at most so many steps, >= 1.
        tol: tensors of a norm up to it have no say in the direction; steps shorter than it end the
            search. > 0.

    Raises:
        ValueError: weights are out of range.

    Source: arXiv:2603.04972; limits as in mergekit 0.1.5, which has equal weights.

    >>> mean = karcher_coefficients([[1.0, 0.0], [0.0, 4.0]], [1.0, 1.0])
    >>> [round(c, 6) for c in mean.coefficients], mean.converged
    ([1.06066, 0.53033], True)
    """
    check_karcher(weights)
    check_above_0("tol", tol)
    check_count("weights", weights, len(gram))
    if len(gram) == 1:
        return KarcherMean((1.0,), 0, True, 1.0)
    norms = [math.sqrt(row[i]) for i, row in enumerate(gram)]
    valid = [i for i, norm in enumerate(norms) if norm > tol and weights[i] > 0]
    coefficients = [0.0] * len(gram)
    if not valid:
        return KarcherMean(tuple(coefficients), 0, True, 1.0)
    cosines = [
        [1.0 if i == j else gram[i][j] / (norms[i] * norms[j]) for j in valid] for i in valid
    ]
    total = math.fsum(weights[i] for i in valid)
    shares = [weights[i] / total for i in valid]
    mean = list(shares)
    length = math.sqrt(max(_squared(cosines, mean), 0.0))
    mean = [c / length for c in mean] if length >= tol else [1.0] + [0.0] * (len(valid) - 1)
    iterations, converged = 0, False
    while not converged and iterations < max_iter:
        mean, step = _karcher_step(cosines, shares, mean, tol)
        converged = step < tol
        iterations += not converged
    summed = math.fsum(weights)
    scale = math.fsum(w / summed * norm for w, norm in zip(weights, norms, strict=True))
    for i, c in zip(valid, mean, strict=True):
        coefficients[i] = scale * c / norms[i]
    lowest = min(_products(cosines, mean))
    return KarcherMean(tuple(coefficients), iterations, converged, lowest)


def check_karcher(weights: Sequence[float]) -> None:
    """Raise `ValueError` unless weights are not negative, and one is above 0."""
    check_weights(weights)
    if min(weights) < 0 or not any(weights):
        raise ValueError(f"weights must be >= 0 and one above 0, got {list(weights)}")


def _products(gram: Gram, coefficients: Sequence[float]) -> list[float]:
    """Dot products of each tensor with a weighted sum of them."""
    return [math.fsum(g * c for g, c in zip(row, coefficients, strict=True)) for row in gram]


def _karcher_step(
    cosines: Gram, shares: Sequence[float], mean: Sequence[float], tol: float
) -> tuple[list[float], float]:
    """The mean after a step along the sphere, and that step's length; none below `tol`."""
    towards = [max(-1.0, min(1.0, q)) for q in _products(cosines, mean)]
    pulls = []
    for share, cosine in zip(shares, towards, strict=True):
        theta = math.acos(cosine)
        pulls.append(share * theta / max(math.sin(theta), 1e-12) if theta >= tol else 0.0)
    along = math.fsum(pull * cosine for pull, cosine in zip(pulls, towards, strict=True))
    tangent = [pull - along * c for pull, c in zip(pulls, mean, strict=True)]
    step = math.sqrt(max(_squared(cosines, tangent), 0.0))
    if step < tol:
        return list(mean), step
    turned = [
        math.cos(step) * c + math.sin(step) * part / step
        for c, part in zip(mean, tangent, strict=True)
    ]
    length = math.sqrt(max(_squared(cosines, turned), 0.0))
    return [c / length for c in turned] if length > tol else turned, step


def sequential_steps(weights: Sequence[float]) -> list[float]:
    """How far each model after the first is gone towards: `w_k / (w_1 + ... + w_k)`.

    Raises:
        ValueError: a weight is negative, or the first one not above 0.

    >>> sequential_steps([1.0, 1.0, 2.0])
    [0.5, 0.5]
    """
    check_weights(weights)
    if weights[0] <= 0 or min(weights) < 0:
        raise ValueError(f"weights must be >= 0 and the first above 0, got {list(weights)}")
    return [weights[k] / math.fsum(weights[: k + 1]) for k in range(1, len(weights))]


def check_sequential(weights: Sequence[float]) -> None:
    """Raise `ValueError` as `sequential_steps`."""
    sequential_steps(weights)


def lerp_coefficients(steps: Sequence[float]) -> list[float]:
    """Multipliers for going from model to model along straight lines.

    >>> lerp_coefficients([0.5, 0.5])
    [0.25, 0.25, 0.5]
    """
    merged = [1.0]
    for t in steps:
        check_t(t)
        merged = [*((1.0 - t) * c for c in merged), t]
    return merged


def sequential_coefficients(
    gram: Gram, steps: Sequence[float], *, dot_threshold: float = 0.9995, eps: float = 1e-8
) -> tuple[list[float], list[SlerpCoefficients]]:
    """Multipliers for going from model to model by SLERP, and what each step was.

    Args:
        gram: shape (N, N), float64.
        steps: N - 1 positions in [0, 1].
        dot_threshold, eps: as `slerp_coefficients`.

    >>> sequential_coefficients([[1.0, 0.0], [0.0, 1.0]], [0.5])[0]
    [0.7071067811865475, 0.7071067811865475]
    """
    check_count("steps", steps, len(gram) - 1)
    merged = [1.0] + [0.0] * (len(gram) - 1)
    taken = []
    for k, t in enumerate(steps, 1):
        squared, products = max(_squared(gram, merged), 0.0), _products(gram, merged)
        step = slerp_coefficients(
            squared, gram[k][k], products[k], t, dot_threshold=dot_threshold, eps=eps
        )
        merged = [step.first * c for c in merged]
        merged[k] += step.second
        taken.append(step)
    return merged, taken


class StockRatio(NamedTuple):
    """How far Model Stock goes from the base to the models' mean, and their mean cosine."""

    t: float
    cosine: float


def model_stock_ratio(
    gram: Gram,
    *,
    average: StockAverage = "cosine",
    norm_floor: float = 0.0,
    clamp: bool = True,
) -> StockRatio:
    """`t = N c / (1 + (N - 1) c)` with the mean cosine c between the task vectors.

    The paper's geometry takes angles between 0 and 90 degrees: c = 1 gives the mean of the models,
    c = 0 the base.

    Args:
        gram: of the task vectors, shape (N, N), float64; N >= 2.
        average: of more than two models, average the cosines, or the angles.
        norm_floor: products of two norms count as at least this. mergekit has 1e-6, which takes
            small changes for less alike than they are.
        clamp: keep t in [0, 1]; below 0 the result would be on the far side of the base.

    Raises:
        ValueError: fewer than two models, or an unknown average.

    Source: Model Stock, arXiv:2403.19522.

    >>> model_stock_ratio([[1.0, 0.5], [0.5, 0.5]]).t.__round__(6)
    0.828427
    """
    if len(gram) < 2:
        raise ValueError(f"Model Stock needs at least 2 models, got {len(gram)}")
    check_choice("average", average, STOCK_AVERAGES)
    count = len(gram)
    cosines = []
    for i, j in combinations(range(count), 2):
        product = max(math.sqrt(gram[i][i]) * math.sqrt(gram[j][j]), norm_floor)
        cosine = gram[i][j] / product if product > 1e-30 else 0.0
        cosines.append(max(-1.0, min(1.0, cosine)))
    if average == "angle":
        cosine = math.cos(math.fsum(map(math.acos, cosines)) / len(cosines))
    else:
        cosine = math.fsum(cosines) / len(cosines)
    divisor = 1.0 + (count - 1) * cosine
    t = 0.0 if abs(divisor) < 1e-6 else count * cosine / divisor
    if clamp:
        t = 0.0 if cosine <= 0 else min(t, 1.0)
    return StockRatio(t, cosine)
