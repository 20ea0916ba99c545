"""The methods that pick entries of task vectors, a second time, plainly: see `reference`."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from tests.reference import (
    Array,
    as_float64,
    by_rows,
    combine,
    elect_and_merge,
    mask_draws,
    rescale_factor,
    sum_of,
    task_vectors,
    trim,
    weighted_sum,
)

RankRescale = Literal["inverse_prob", "l1", "none"]


def della(
    base: ArrayLike,
    tensors: Sequence[ArrayLike],
    weights: Sequence[float],
    densities: Sequence[float],
    epsilons: Sequence[float],
    lam: float,
    seed: int,
    name: str,
    rescale: RankRescale = "inverse_prob",
    elect: bool = False,
    normalize: bool = False,
) -> Array:
    """DELLA: DARE with a chance of its own for each entry, by its magnitude's rank in the row."""
    kept = []
    deltas = task_vectors(base, tensors)
    for i, (delta, density, epsilon) in enumerate(zip(deltas, densities, epsilons, strict=True)):
        chances = by_rows(keep_chances, delta, density, epsilon)
        draws = mask_draws(seed, str(i), name, delta.size).reshape(delta.shape)
        left = np.where(draws < np.floor(chances * 2**32 + 0.5), delta, 0.0)
        if rescale == "inverse_prob":
            kept.append(left / np.where(chances > 0, chances, 1.0))
        else:
            kept.append(rescale_factor(delta, left, density, rescale) * left)
    return as_float64(base) + lam * combine(kept, weights, elect, normalize)


def keep_chances(row: ArrayLike, density: float, epsilon: float) -> Array:
    """From density - epsilon for the smallest magnitude to density + epsilon for the largest.

    Of equal magnitudes the first is the smaller. Densities 0 and 1 leave no choice, and one entry
    has nothing to be ranked against.
    """
    row = as_float64(row)
    if row.size == 1 or density <= 0 or density >= 1:
        return np.full(row.shape, density)
    chances = np.empty(row.size)
    order = np.argsort(np.abs(row.ravel()), kind="stable")
    chances[order] = density - epsilon + 2 * epsilon * np.arange(row.size) / (row.size - 1)
    return chances.reshape(row.shape)


def consensus(
    base: ArrayLike,
    tensors: Sequence[ArrayLike],
    weights: Sequence[float],
    mask_lambdas: Sequence[float],
    agreement: int = 2,
    lam: float = 1.0,
    densities: Sequence[float] | None = None,
) -> Array:
    """A merged task vector, only where it is near enough to that of `agreement` models.

    The sum of the task vectors, or with densities what TIES merges of them.
    """
    deltas = task_vectors(base, tensors)
    if densities is None:
        merged = weighted_sum(deltas, weights)
    else:
        kept = [trim(delta, density) for delta, density in zip(deltas, densities, strict=True)]
        merged = elect_and_merge(kept, weights, "weight")
    marks = [
        np.abs(delta) > factor * np.abs(merged - delta)
        for delta, factor in zip(deltas, mask_lambdas, strict=True)
    ]
    return as_float64(base) + lam * np.where(sum_of(marks) >= agreement, merged, 0.0)


def breadcrumbs(
    base: ArrayLike,
    tensors: Sequence[ArrayLike],
    weights: Sequence[float],
    densities: Sequence[float],
    gammas: Sequence[float],
    lam: float = 1.0,
    trim_scope: Literal["tensor", "row"] = "tensor",
    shrink: bool = True,
    elect: bool = False,
    normalize: bool = False,
) -> Array:
    """Breadcrumbs: drop the largest and the smallest changes, merge the middle."""
    kept = []
    deltas = task_vectors(base, tensors)
    for delta, density, gamma in zip(deltas, densities, gammas, strict=True):
        options = (density, gamma, shrink)
        rows = by_rows(keep_middle, delta, *options)
        kept.append(keep_middle(delta, *options) if trim_scope == "tensor" else rows)
    return as_float64(base) + lam * combine(kept, weights, elect, normalize)


def keep_middle(delta: ArrayLike, density: float, gamma: float, shrink: bool = True) -> Array:
    """Of all entries in ascending order, those below the int(gamma n) last, int(density n) of them.

    Equal magnitudes stay in order. Where both do not fit, `shrink` removes fewer, else fewer are
    kept.
    """
    delta = as_float64(delta)
    n, kept, removed = delta.size, int(density * delta.size), int(gamma * delta.size)
    if shrink:
        removed = min(removed, n - kept)
    order = np.argsort(np.abs(delta.ravel()), kind="stable")[: n - removed]
    chosen = order[max(0, len(order) - kept) :]
    flat = np.zeros(n)
    flat[chosen] = delta.ravel()[chosen]
    return flat.reshape(delta.shape)


def sce(
    base: ArrayLike,
    tensors: Sequence[ArrayLike],
    select_topk: float = 1.0,
    sce_mask: Literal["deltas", "weights_only"] = "deltas",
    sce_floor: float = 0.0,
    lam: float = 1.0,
) -> Array:
    """SCE: select the entries that vary most, weigh models by their mean squares, erase minorities.

    The selection is a share of the entries that vary at all; of equal variances (in float32) the
    lowest index is selected first. At 1 everything is.
    """
    deltas = task_vectors(base, tensors)
    variance = np.var(np.stack(deltas), axis=0).astype(np.float32).ravel()
    count = int(select_topk * np.count_nonzero(variance)) if select_topk < 1 else variance.size
    chosen = np.zeros(variance.size, bool)
    chosen[np.argsort(-variance, kind="stable")[:count]] = True
    selected = [np.where(chosen.reshape(delta.shape), delta, 0.0) for delta in deltas]
    squares = [float(np.mean(delta * delta)) for delta in selected]
    total = sum(squares)
    is_flat = total == 0 or total < sce_floor
    weights = [1 / len(deltas) if is_flat else square / total for square in squares]
    votes = selected if sce_mask == "deltas" else deltas
    merged = elect_and_merge(votes, weights, "weight", elect_on="unweighted")
    return as_float64(base) + lam * merged


def ram(
    base: ArrayLike,
    tensors: Sequence[ArrayLike],
    epsilon: float = 1e-5,
    lam: float = 1.0,
    plus: tuple[float, float] | None = None,
) -> Array:
    """RAM: the mean over the models that have changed an entry by more than epsilon.

    `plus` is RAM+'s r and alpha: what one model alone has changed is multiplied with
    1 + r * min(shared / unique, alpha), from the numbers of its changes.
    """
    deltas = task_vectors(base, tensors)
    marks = [np.abs(delta) > np.float32(epsilon) for delta in deltas]
    count = sum_of(marks)
    merged = np.zeros_like(count)
    for delta, mark in zip(deltas, marks, strict=True):
        factor = 1.0
        if plus is not None:
            shared, unique = np.sum(mark & (count > 1)), np.sum(mark & (count == 1))
            factor = 1 + plus[0] * min(shared / max(unique, 1e-8), plus[1])
        merged += np.where(mark, delta / np.maximum(count, 1), 0.0) * np.where(
            count == 1, factor, 1.0
        )
    return as_float64(base) + lam * merged


def arcee_fusion(base: ArrayLike, tensor: ArrayLike) -> Array:
    """The tensor where its importance reaches median + 1.5 (Q3 - Q1) of all; else the base."""
    score = importance(base, tensor)
    reached = score >= fusion_threshold(score)
    return as_float64(np.where(reached, as_float64(tensor), as_float64(base)))


def importance(base: ArrayLike, tensor: ArrayLike) -> Array:
    """Change of each entry times the divergence of its row, both rows taken as distributions."""
    base, tensor = as_float64(base), as_float64(tensor)
    rows = (len(base), -1) if base.ndim > 1 else (1, -1)
    p, q = (softmax(x.reshape(rows)) + 1e-8 for x in (tensor, base))
    divergence = np.sum(p * np.log(p / q), axis=1, keepdims=True)
    return as_float64((np.abs(tensor - base).reshape(rows) * divergence).reshape(base.shape))


def fusion_threshold(score: Array) -> float:
    """Median plus 1.5 times the quartiles' distance; of two middle entries the lower one."""
    ascending = np.sort(score.ravel())
    first, median, third = (
        float(ascending[math.floor(share * (score.size - 1))]) for share in (0.25, 0.5, 0.75)
    )
    return median + 1.5 * (third - first)


def softmax(rows: Array) -> Array:
    """Each row as a distribution."""
    powers = np.exp(rows - rows.max(axis=1, keepdims=True))
    return as_float64(powers / powers.sum(axis=1, keepdims=True))
