"""The merge methods a second time, plainly: whole tensors, numpy, float64.

The tests compare the fast code with these functions, so they share nothing with it: no torch, no
blocks, no in-place arithmetic. Every function takes arrays of one shape S and returns float64 of
shape S; float32 and float64 inputs are both exact in float64. Model i's weight is weights[i].
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Denominator = Literal["none", "weight", "count"]
Rescale = Literal["inverse_density", "l1", "none"]


# Models combined with one coefficient each


def linear(tensors: Sequence[ArrayLike], weights: Sequence[float], normalize: bool = True) -> Array:
    """Sum of weight times tensor, divided by the sum of the weights if `normalize`.

    Raises ValueError where that sum cancels to (almost) zero.
    """
    total = weighted_sum(tensors, weights)
    if not normalize:
        return total
    if abs(sum(weights)) <= 1e-12 * sum(abs(weight) for weight in weights):
        raise ValueError(f"weights must not sum to 0, got {list(weights)}")
    return total / sum(weights)


def sequential_lerp(tensors: Sequence[ArrayLike], weights: Sequence[float]) -> Array:
    """Go from model to model: to model k by its share of the weights up to k."""
    merged = as_float64(tensors[0])
    for k in range(1, len(tensors)):
        t = weights[k] / sum(weights[: k + 1])
        merged = (1 - t) * merged + t * as_float64(tensors[k])
    return merged


def slerp(
    a: ArrayLike, c: ArrayLike, t: float, dot_threshold: float = 0.9995, eps: float = 1e-8
) -> Array:
    """From `a` (t=0) to `c` (t=1) along the arc between their directions, lengths as they are.

    A straight line where |cosine| > `dot_threshold`. A tensor of length <= `eps` counts as
    perpendicular to every other.
    """
    a, c = as_float64(a), as_float64(c)
    cosine = min(1.0, max(-1.0, float(np.sum(unit(a, eps) * unit(c, eps)))))
    if abs(cosine) > dot_threshold:
        return (1 - t) * a + t * c
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * c) / math.sin(angle)


def sequential_slerp(tensors: Sequence[ArrayLike], ts: Sequence[float]) -> Array:
    """Slerp from model to model; ts[k] is the step towards tensors[k + 1]."""
    merged = as_float64(tensors[0])
    for tensor, t in zip(tensors[1:], ts, strict=True):
        merged = slerp(merged, tensor, t)
    return merged


# Task vectors


def task_arithmetic(
    base: ArrayLike,
    tensors: Sequence[ArrayLike],
    weights: Sequence[float],
    lam: float = 1.0,
    normalize: bool = False,
) -> Array:
    """base + lam * sum of weight * (tensor - base); `normalize` divides by the sum of weights."""
    deltas = [as_float64(tensor) - as_float64(base) for tensor in tensors]
    return as_float64(base) + lam * combine(deltas, weights, elect=False, normalize=normalize)


def trim(delta: ArrayLike, density: float) -> Array:
    """Zero all but the k = max(1, int(density * n)) largest magnitudes.

    Of equal magnitudes the lowest flat index is kept first. All is kept from density 1 on, nothing
    at 0 and below.
    """
    delta = as_float64(delta)
    if density >= 1:
        return delta
    flat, kept = delta.ravel(), np.zeros(delta.size)
    if density > 0:
        count = max(1, int(density * delta.size))
        largest = np.argsort(-np.abs(flat), kind="stable")[:count]
        kept[largest] = flat[largest]
    return kept.reshape(delta.shape)


def trim_rows(delta: ArrayLike, density: float) -> Array:
    """`trim` of every row."""
    return np.stack([trim(row, density) for row in np.asarray(delta)])


def ties(
    base: ArrayLike,
    tensors: Sequence[ArrayLike],
    weights: Sequence[float],
    densities: Sequence[float],
    lam: float = 1.0,
    normalize: bool = True,
    trim_scope: Literal["tensor", "row"] = "tensor",
) -> Array:
    """TIES: trim, elect by weighted mass, merge what agrees, add lam times that to the base.

    The subtraction is rounded to float32 first: equal magnitudes must be those a float32 merge
    sees. Negative weights are not refused; the formula is applied as it stands. A row is an entry
    of the first axis of a matrix; a vector is one row.
    """
    narrow = [np.asarray(tensor, np.float32) - np.asarray(base, np.float32) for tensor in tensors]
    trim_one = trim if trim_scope == "tensor" or narrow[0].ndim == 1 else trim_rows
    deltas = [trim_one(delta, density) for delta, density in zip(narrow, densities, strict=True)]
    return as_float64(base) + lam * combine(deltas, weights, elect=True, normalize=normalize)


def dare(
    base: ArrayLike,
    tensors: Sequence[ArrayLike],
    weights: Sequence[float],
    densities: Sequence[float],
    lam: float,
    seed: int,
    name: str,
    rescale: Rescale = "inverse_density",
    elect: bool = False,
    normalize: bool = False,
) -> Array:
    """DARE: drop task vector entries at random, rescale the rest, and sum.

    dare_linear without `elect`, dare_ties with it. Model i's mask is drawn with tag str(i).
    """
    deltas = []
    for i, (tensor, density) in enumerate(zip(tensors, densities, strict=True)):
        delta = as_float64(tensor) - as_float64(base)
        keep = keep_mask(seed, str(i), name, delta.size, density).reshape(delta.shape)
        kept = np.where(keep, delta, 0.0)
        deltas.append(rescale_factor(delta, kept, density, rescale) * kept)
    return as_float64(base) + lam * combine(deltas, weights, elect, normalize)


def rescale_factor(delta: Array, kept: Array, density: float, rescale: Rescale) -> float:
    """What DARE multiplies the kept entries with: 1 / density, or the ratio of the L1 norms."""
    if rescale == "inverse_density":
        return 1 / density if 0 < density < 1 else 1.0
    before, after = float(np.abs(delta).sum()), float(np.abs(kept).sum())
    if rescale == "none" or before < 1e-7 or after < 1e-7:
        return 1.0
    return before / after


# Steps that several methods share


def combine(
    deltas: Sequence[Array], weights: Sequence[float], elect: bool, normalize: bool
) -> Array:
    """Merge task vectors that are already trimmed or masked; lam and the base come later."""
    if elect:
        sign = elect_sign(weighted_sum(deltas, weights))
        return disjoint_merge(deltas, weights, sign, "weight" if normalize else "none")
    total = sum(weights)
    return weighted_sum(deltas, weights) / (total if normalize and abs(total) >= 1e-8 else 1.0)


def elect_sign(mass: Array) -> Array:
    """The sign of the summed task vectors, +1 where they cancel exactly."""
    return np.where(mass < 0, -1.0, 1.0)


def disjoint_merge(
    deltas: Sequence[Array], weights: Sequence[float], sign: Array, denominator: Denominator
) -> Array:
    """Sum weight * delta over the models whose product has the elected sign.

    Divided by 1, by the summed weights of those models or by their number; a divisor of 0 is 1.
    """
    products = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
    agrees = [np.sign(product) == sign for product in products]
    total = sum_of([np.where(agree, p, 0.0) for agree, p in zip(agrees, products, strict=True)])
    if denominator == "none":
        return total
    shares = weights if denominator == "weight" else [1.0] * len(deltas)
    divisor = sum_of([np.where(agree, s, 0.0) for agree, s in zip(agrees, shares, strict=True)])
    return total / np.where(divisor == 0, 1.0, divisor)


def weighted_sum(tensors: Sequence[ArrayLike], weights: Sequence[float]) -> Array:
    """Sum of weight times tensor. A weight of 0 leaves its tensor out, infinities included."""
    terms = [
        weight * as_float64(tensor) if weight != 0 else np.zeros(np.shape(tensor))
        for weight, tensor in zip(weights, tensors, strict=True)
    ]
    return sum_of(terms)


def sum_of(arrays: Sequence[Array]) -> Array:
    """Elementwise sum, first to last."""
    total = np.zeros_like(arrays[0])
    for array in arrays:
        total = total + array
    return total


def unit(tensor: Array, eps: float) -> Array:
    """The tensor at length 1, or as it is when its length is <= `eps`."""
    length = math.sqrt(float(np.sum(tensor * tensor)))
    return tensor / length if length > eps else tensor


def as_float64(tensor: ArrayLike) -> Array:
    """A float64 copy, so that no result is ever an input."""
    return np.array(tensor, dtype=np.float64)


# Random masks


def mask_key(seed: int, tag: str, name: str, purpose: str = "mask") -> NDArray[np.uint64]:
    """The generator's key, two words: the first 16 bytes of a SHA-256 over all that matters."""
    text = b"merge-mask/v1\0" + purpose.encode() + b"\0" + seed.to_bytes(8, "little")
    digest = hashlib.sha256(text + tag.encode() + b"\0" + name.encode()).digest()
    return np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)


def mask_draws(seed: int, tag: str, name: str, n: int, purpose: str = "mask") -> NDArray[np.uint32]:
    """Draws 0 to n-1, shape (n,): each 64-bit word is two of them, low half first."""
    philox = np.random.Philox(key=mask_key(seed, tag, name, purpose), counter=[0, 0, 0, 0])
    words = [int(word) for word in philox.random_raw((n + 1) // 2)]
    halves = [half for word in words for half in (word & 0xFFFFFFFF, word >> 32)]
    return np.array(halves[:n], dtype=np.uint32)


def keep_mask(
    seed: int, tag: str, name: str, n: int, density: float, purpose: str = "mask"
) -> NDArray[np.bool_]:
    """Which of n elements are kept, shape (n,): those whose draw is below density * 2^32."""
    limit = math.floor(density * 2**32 + 0.5) if density > 0 else 0
    draws = mask_draws(seed, tag, name, n, purpose)
    return np.array([int(draw) < limit for draw in draws], dtype=np.bool_)
