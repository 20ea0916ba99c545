"""The merge methods a second time, plainly: whole tensors, numpy, float64.

The tests compare the fast code with these functions, so they share nothing with it: no torch, no
blocks, no in-place arithmetic. Every function takes arrays of one shape S and returns float64 of
shape S; float32 and float64 inputs are both exact in float64. Model i's weight is weights[i].

Where a method compares changes with each other, the differences `tensor - base` are rounded to
float32 first: equal magnitudes must be those a float32 merge sees. Parameters are not checked; the
formulas are applied as they stand. A row is an entry of the first axis; a vector is one row.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Denominator = Literal["none", "weight", "count"]
Rescale = Literal["inverse_density", "l1", "none"]
KRule = Literal["floor", "paper", "peft"]
ElectOn = Literal["weighted", "unweighted"]
ElectMethod = Literal["mass", "count"]


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
    for tensor, t in zip(tensors[1:], sequential_steps(weights), strict=True):
        merged = (1 - t) * merged + t * as_float64(tensor)
    return merged


def sequential_steps(weights: Sequence[float]) -> list[float]:
    """Each model's share of the weights up to it, from the second model on."""
    return [weights[k] / sum(weights[: k + 1]) for k in range(1, len(weights))]


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


def slerp_apart(a: ArrayLike, c: ArrayLike, t: float) -> Array:
    """Slerp between the directions, at the length on a straight line between the lengths."""
    a, c = as_float64(a), as_float64(c)
    direction = slerp(unit(a, 1e-8), unit(c, 1e-8), t)
    return ((1 - t) * length(a) + t * length(c)) * unit(direction, 0.0)


def nuslerp(
    a: ArrayLike,
    c: ArrayLike,
    weights: Sequence[float],
    base: ArrayLike | None = None,
    vectors: Literal["tensor", "rows", "columns"] = "tensor",
) -> Array:
    """Slerp by the second weight's share: of whole tensors, their rows, or their columns.

    A straight line only where the cosine is within 1e-7 of 1 or -1. With a base, the task vectors
    are interpolated and added to it.
    """
    t = weights[1] / sum(weights) if abs(sum(weights)) >= 1e-6 else 0.5
    origin = np.zeros(np.shape(a)) if base is None else as_float64(base)
    a, c = as_float64(a) - origin, as_float64(c) - origin
    if vectors == "tensor" or a.ndim == 1:
        return origin + arc(a, c, t)
    a, c = a.reshape(len(a), -1), c.reshape(len(c), -1)
    if vectors == "rows":
        merged = np.stack([arc(x, y, t) for x, y in zip(a, c, strict=True)])
    else:
        merged = np.stack([arc(x, y, t) for x, y in zip(a.T, c.T, strict=True)], axis=1)
    return origin + merged.reshape(origin.shape)


def arc(a: Array, c: Array, t: float) -> Array:
    """From one vector to the other along the arc; lengths below 1e-7 count as 1e-7."""
    cosine = float(np.sum(a * c)) / max(length(a), 1e-7) / max(length(c), 1e-7)
    if 1 - abs(cosine) < 1e-7:
        return (1 - t) * a + t * c
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * c) / math.sin(angle)


def multislerp(
    tensors: Sequence[ArrayLike],
    weights: Sequence[float],
    base: ArrayLike | None = None,
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Array:
    """The weighted mean of the directions, at the weighted mean of the lengths.

    With a base, of the task vectors, and added to it. Two opposite tensors give the weighted sum.
    """
    origin = np.zeros(np.shape(tensors[0])) if base is None else as_float64(base)
    moved = [as_float64(tensor) - origin for tensor in tensors]
    total = sum(weights) if normalize_weights else 1.0
    shares = [weight / total for weight in weights]
    mean = weighted_sum([x / (length(x) + eps) for x in moved], shares)
    if len(moved) == 1:
        return as_float64(tensors[0])
    if length(mean) < eps:
        return origin + weighted_sum(moved, shares)
    mean_length = sum(share * length(x) for share, x in zip(shares, moved, strict=True))
    return origin + mean_length * mean / length(mean)


def karcher(
    tensors: Sequence[ArrayLike],
    weights: Sequence[float],
    max_iter: int = 10,
    tol: float = 1e-5,
) -> Array:
    """The point of the sphere with the least weighted squared angles, at the mean length.

    Each step goes along the sphere by the weighted mean of the tangents towards the directions.
    Tensors of a length up to `tol` have no direction, but count in the mean length.
    """
    vectors = [as_float64(tensor) for tensor in tensors]
    if len(vectors) == 1:
        return vectors[0]
    pointing = [(w, unit(x, tol)) for w, x in zip(weights, vectors, strict=True) if length(x) > tol]
    if not pointing:
        return np.zeros_like(vectors[0])
    total = sum(weight for weight, _ in pointing)
    mean = sum_of([weight / total * u for weight, u in pointing])
    mean = unit(mean, 0.0) if length(mean) >= tol else pointing[0][1]
    for _ in range(max_iter):
        tangent = sum_of([weight / total * towards(mean, u, tol) for weight, u in pointing])
        if length(tangent) < tol:
            break
        size = length(tangent)
        mean = unit(math.cos(size) * mean + math.sin(size) * tangent / size, 0.0)
    lengths = [w / sum(weights) * length(x) for w, x in zip(weights, vectors, strict=True)]
    return sum(lengths) * mean


def towards(start: Array, end: Array, tol: float) -> Array:
    """The tangent at one unit vector that leads to the other, as long as their angle."""
    cosine = min(1.0, max(-1.0, float(np.sum(start * end))))
    angle = math.acos(cosine)
    if angle < tol:
        return np.zeros_like(start)
    return angle / max(math.sin(angle), 1e-12) * (end - cosine * start)


def model_stock(
    base: ArrayLike,
    tensors: Sequence[ArrayLike],
    filter_wise: bool = False,
    average: Literal["cosine", "angle"] = "cosine",
    norm_floor: float = 0.0,
    clamp: bool = True,
) -> Array:
    """From the base towards the mean of the models, as far as their angles say, or each row's."""
    origin = as_float64(base)
    deltas = [as_float64(tensor) - origin for tensor in tensors]
    rows = list(zip(*deltas, strict=True)) if filter_wise and origin.ndim > 1 else [tuple(deltas)]
    ts = [stock_ratio(row, average, norm_floor, clamp) for row in rows]
    merged = [t * sum_of(row) / len(row) for t, row in zip(ts, rows, strict=True)]
    return origin + np.stack(merged).reshape(origin.shape)


def stock_ratio(
    deltas: Sequence[Array],
    average: Literal["cosine", "angle"] = "cosine",
    norm_floor: float = 0.0,
    clamp: bool = True,
) -> float:
    """t = N c / (1 + (N - 1) c) with the mean cosine c of all pairs, or that of their mean angle.

    A product of lengths counts as at least `norm_floor`; where it is 0 the cosine is 0. Without
    `clamp`, t is 0 at the formula's pole.
    """
    cosines = []
    for one, two in combinations(deltas, 2):
        product = max(length(one) * length(two), norm_floor)
        cosines.append(float(np.sum(one * two)) / product if product > 1e-30 else 0.0)
    cosine = float(np.mean(cosines))
    if average == "angle":
        cosine = math.cos(np.mean(np.arccos(np.clip(cosines, -1, 1))))
    if clamp and cosine <= 0:
        return 0.0
    divisor = 1 + (len(deltas) - 1) * cosine
    t = len(deltas) * cosine / divisor if abs(divisor) >= 1e-6 else 0.0
    return min(t, 1.0) if clamp else t


# One model


def scale(tensor: ArrayLike, factor: float | None) -> Array:
    """The tensor times the factor, or as it is."""
    return as_float64(tensor) * (1.0 if factor is None else factor)


def nearswap(base: ArrayLike, tensor: ArrayLike, t: float) -> Array:
    """The tensor within t of the base; elsewhere the base, moved by t."""
    base, tensor = as_float64(base), as_float64(tensor)
    share = np.minimum(1, t / np.maximum(np.abs(base - tensor), 1e-6))
    return share * tensor + (1 - share) * base


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


def trim(delta: ArrayLike, density: float, rule: KRule = "floor", all_ties: bool = False) -> Array:
    """Zero all but the `kept_count` largest magnitudes.

    Of equal magnitudes the lowest flat index is kept first; with `all_ties` whatever equals the
    smallest kept one is kept too.
    """
    delta = as_float64(delta)
    flat, keep = delta.ravel(), np.zeros(delta.size, bool)
    count = kept_count(density, delta.size, rule)
    keep[np.argsort(-np.abs(flat), kind="stable")[:count]] = True
    if all_ties and count:
        keep = np.abs(flat) >= np.min(np.abs(flat[keep]))
    return np.where(keep, flat, 0.0).reshape(delta.shape)


def kept_count(density: float, n: int, rule: KRule = "floor") -> int:
    """All from density 1 on, nothing at 0 and below; else int(density * n), by the rule.

    "floor" keeps at least 1, "paper" one more, "peft" that many.
    """
    if density >= 1 or density <= 0:
        return n if density >= 1 else 0
    count = int(density * n)
    return {"floor": max(1, count), "paper": min(n, count + 1), "peft": count}[rule]


def trim_model(
    deltas: Sequence[ArrayLike], density: float, rule: KRule = "floor", all_ties: bool = False
) -> list[Array]:
    """`trim` of all tensors of a model as one."""
    flat = np.concatenate([np.ravel(delta) for delta in deltas])
    ends = np.cumsum([np.size(delta) for delta in deltas])
    parts = np.split(trim(flat, density, rule, all_ties), ends[:-1])
    return [part.reshape(np.shape(delta)) for part, delta in zip(parts, deltas, strict=True)]


def ties(
    base: ArrayLike,
    tensors: Sequence[ArrayLike],
    weights: Sequence[float],
    densities: Sequence[float],
    lam: float = 1.0,
    normalize: bool = True,
    trim_scope: Literal["tensor", "row"] = "tensor",
    trim_ties: Literal["index", "all"] = "index",
    k_rule: KRule = "floor",
    denominator: Denominator | None = None,
    elect_on: ElectOn = "weighted",
    elect_method: ElectMethod = "mass",
    zero: float = 1.0,
    rescale: Rescale = "none",
) -> Array:
    """TIES: trim, elect, merge what agrees, add lam times that to the base.

    `denominator` goes before `normalize`, which stands for "weight" or "none". `zero` is the sign
    where votes balance: +1, or `majority`.
    """
    kept = []
    for delta, density in zip(task_vectors(base, tensors), densities, strict=True):
        options = (density, k_rule, trim_ties == "all")
        rows = by_rows(trim, delta, *options)
        trimmed = trim(delta, *options) if trim_scope == "tensor" else rows
        kept.append(rescale_factor(delta, trimmed, density, rescale) * trimmed)
    divide = denominator or ("weight" if normalize else "none")
    merged = elect_and_merge(kept, weights, divide, elect_on, elect_method, zero)
    return as_float64(base) + lam * merged


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
    """What kept entries are multiplied with: 1 / density, or the ratio of the L1 norms."""
    if rescale == "inverse_density":
        return 1 / density if 0 < density < 1 else 1.0
    before, after = float(np.abs(delta).sum()), float(np.abs(kept).sum())
    if rescale == "none" or before < 1e-7 or after < 1e-7:
        return 1.0
    return before / after


# Steps that several methods share


def task_vectors(base: ArrayLike, tensors: Sequence[ArrayLike]) -> list[Array]:
    """Differences to the base as float32 has them."""
    narrow = np.asarray(base, np.float32)
    return [as_float64(np.asarray(tensor, np.float32) - narrow) for tensor in tensors]


def by_rows(function: Callable[..., Array], tensor: Array, *arguments: object) -> Array:
    """The function of each entry of the first axis; of a vector as a whole."""
    if tensor.ndim < 2:
        return function(tensor, *arguments)
    return np.stack([function(row, *arguments) for row in tensor])


def combine(
    deltas: Sequence[Array], weights: Sequence[float], elect: bool, normalize: bool
) -> Array:
    """Merge task vectors that are already trimmed or masked; lam and the base come later."""
    if elect:
        return elect_and_merge(deltas, weights, "weight" if normalize else "none")
    total = sum(weights)
    return weighted_sum(deltas, weights) / (total if normalize and abs(total) >= 1e-8 else 1.0)


def elect_and_merge(
    deltas: Sequence[Array],
    weights: Sequence[float],
    denominator: Denominator,
    elect_on: ElectOn = "weighted",
    elect_method: ElectMethod = "mass",
    zero: float = 1.0,
) -> Array:
    """Elect a sign per entry, by magnitude or by heads, and merge the models that voted for it."""
    votes = [
        weight * delta if elect_on == "weighted" else delta
        for weight, delta in zip(weights, deltas, strict=True)
    ]
    mass = sum_of(votes if elect_method == "mass" else [np.sign(vote) for vote in votes])
    return disjoint_merge(deltas, weights, elect_sign(mass, zero), denominator, votes)


def elect_sign(mass: Array, zero: float = 1.0) -> Array:
    """The sign of the summed task vectors, `zero` where they cancel exactly."""
    return np.where(mass == 0, zero, np.sign(mass))


def majority(signs: Sequence[Array]) -> float:
    """The sign of the summed signs of a whole model, elected with a `zero` of 0."""
    return float(np.sign(sum(float(np.sum(sign)) for sign in signs)))


def disjoint_merge(
    deltas: Sequence[Array],
    weights: Sequence[float],
    sign: Array,
    denominator: Denominator,
    votes: Sequence[Array] | None = None,
) -> Array:
    """Sum weight * delta over the models whose vote, by default that product, has the elected sign.

    Divided by 1, by the summed weights of those models or by their number; a divisor of 0 is 1.
    Where the elected sign is 0, no model has it.
    """
    products = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
    agrees = [(np.sign(v) == sign) & (v != 0) for v in (products if votes is None else votes)]
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


def sum_of(arrays: Sequence[NDArray[np.float64] | NDArray[np.bool_]]) -> Array:
    """Elementwise sum, first to last; of masks, how many are true."""
    total = np.zeros(arrays[0].shape)
    for array in arrays:
        total = total + array
    return total


def length(tensor: Array) -> float:
    """The Euclidean norm."""
    return math.sqrt(float(np.sum(tensor * tensor)))


def unit(tensor: Array, eps: float) -> Array:
    """The tensor at length 1, or as it is when its length is <= `eps`."""
    return tensor / length(tensor) if length(tensor) > eps else tensor


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
