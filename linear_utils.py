"""Weighted sums of tensors: linear averages (model soups), lerp, task arithmetic.

Pure tensor math: tensors in, new tensors out, on any device. Every function here is
elementwise, so it gives the same numbers for a whole tensor and for a block of its rows.

All sums run in float32, in the order of the arguments, and round after each product and each
addition; only `linear` rounds once for both, as mergekit does. A model with weight 0 is left
out before any arithmetic.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gram_utils import lerp_coefficients, sequential_steps
from scalar_utils import (
    check_clamp_range,
    check_count,
    check_distance,
    check_lam,
    check_normalizable,
    check_t,
    check_weight_decay,
    check_weights,
    float32_sum,
)
from tensor_utils import check_tensors, rows_of


def combine(
    coefficients: Sequence[float], tensors: Sequence[Tensor], base: Tensor | None = None
) -> Tensor:
    """Weighted sum: `sum(c_i * x_i)`, plus `base` if given.

    Args:
        coefficients: one finite number per tensor, any sign, rounded once to float32.
        tensors: float32, all of one shape.
        base: added after the sum; float32, same shape.

    Returns:
        Same shape, float32.

    Raises:
        ValueError: counts, shapes or dtypes do not fit.

    >>> combine([2.0, -1.0], [torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])])
    tensor([2., 3.])
    """
    for coefficient in coefficients:
        if not math.isfinite(coefficient):
            raise ValueError(f"coefficients must be finite numbers, got {coefficient}")
    check_count("coefficients", coefficients, len(tensors))
    check_tensors(tensors, base)
    total = torch.zeros_like(tensors[0])
    for coefficient, tensor in zip(coefficients, tensors, strict=True):
        if coefficient != 0:
            total += tensor * coefficient
    return total if base is None else total + base


def linear(
    tensors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool = True
) -> Tensor:
    """Weighted average of models, `sum(w_i * x_i) / sum(w_i)`; a model soup when all are equal.

    Args:
        tensors: float32, all of one shape.
        weights: one finite number per tensor, any sign.
        normalize: divide by the sum of the weights, at the end.

    Returns:
        Same shape, float32.

    Raises:
        ValueError: counts, shapes or dtypes do not fit; or `normalize` with weights that sum to 0.

    The sum takes a fused multiply-add per model where the processor has one (x86 since 2013),
    so a last place can differ between kinds of processor; it never does between blocks.

    Source: model soups, arXiv:2203.05482; WiSE-FT, arXiv:2109.01903, is the case of two models.

    >>> linear([torch.tensor([1.0, 2.0]), torch.tensor([5.0, 6.0])], [1.0, 3.0])
    tensor([4., 5.])
    """
    check_weights(weights)
    check_count("weights", weights, len(tensors))
    check_tensors(tensors)
    total = torch.zeros_like(tensors[0])
    for weight, tensor in zip(weights, tensors, strict=True):
        if weight != 0:
            total.addcmul_(tensor, torch.tensor(weight, dtype=torch.float32, device=tensor.device))
    return divide_by_sum(total, weights) if normalize else total


def divide_by_sum(total: Tensor, weights: Sequence[float]) -> Tensor:
    """`total / sum(weights)`, the weights rounded and summed in float32 as they are in `total`.

    Raises:
        ValueError: the weights sum to 0.

    >>> divide_by_sum(torch.tensor([8.0]), [1.0, 3.0])
    tensor([2.])
    """
    check_normalizable(weights)
    return total / float32_sum(weights)


def combine_deltas(
    deltas: Sequence[Tensor], weights: Sequence[float], *, normalize: bool
) -> Tensor:
    """Weighted sum of task vectors, `sum(w_i * d_i)`; `normalize` divides by `sum(w_i)`.

    Arguments, result and errors as `linear`.

    >>> combine_deltas([torch.tensor([1.0]), torch.tensor([-3.0])], [0.5, 0.5], normalize=False)
    tensor([-1.])
    """
    check_weights(weights)
    check_count("weights", weights, len(deltas))
    total = combine(weights, deltas)
    return divide_by_sum(total, weights) if normalize else total


def lerp(a: Tensor, c: Tensor, t: float) -> Tensor:
    """Straight line from `a` (t = 0) to `c` (t = 1): `(1 - t) * a + t * c`; float32, one shape.

    Raises:
        ValueError: `t` is outside [0, 1], or shapes or dtypes do not fit.

    >>> lerp(torch.tensor([0.0, 4.0]), torch.tensor([8.0, 0.0]), 0.25)
    tensor([2., 3.])
    """
    check_t(t)
    return combine([1.0 - t, t], [a, c])


def sequential_lerp(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Fold models in one by one: step k goes `w_k / (w_1 + ... + w_k)` of the way to model k.

    This is `linear(tensors, weights)`; it is the form in which models are merged when they arrive
    one at a time.

    Args:
        tensors: float32, all of one shape.
        weights: one number per tensor, not negative, the first above 0.

    Returns:
        Same shape, float32; there are no intermediate results that would be rounded.

    Raises:
        ValueError: counts, shapes or dtypes do not fit; or a step leaves [0, 1].

    >>> sequential_lerp([torch.tensor([1.0]), torch.tensor([3.0])], [1.0, 1.0])
    tensor([2.])
    """
    check_count("weights", weights, len(tensors))
    return combine(lerp_coefficients(sequential_steps(weights)), tensors)


def combine_rows(coefficients: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """`combine` with coefficients of their own for every row.

    Args:
        coefficients: shape (rows, N), float32.
        tensors: float32, all of one shape, N of them. A row is one entry of the first axis; a
            vector or a number is one row.

    >>> combine_rows(torch.tensor([[1.0], [2.0]]), [torch.tensor([[1.0, 2.0], [3.0, 4.0]])])
    tensor([[1., 2.],
            [6., 8.]])
    """
    check_tensors(tensors)
    total = torch.zeros_like(rows_of(tensors[0]))
    for index, tensor in enumerate(tensors):
        total += rows_of(tensor) * coefficients[:, index, None]
    return total.view_as(tensors[0])


def scale(tensor: Tensor, factor: float | None) -> Tensor:
    """`tensor * factor`, the factor rounded once to float32; a copy for None.

    >>> scale(torch.tensor([2.0, -0.0]), None)
    tensor([2., -0.])
    """
    check_tensors([tensor])
    if factor is None:
        return tensor.clone()
    check_lam(factor, "factor")
    return tensor * factor


def finish(
    tensor: Tensor, weight_decay: float = 0.0, clamp_range: tuple[float, float] | None = None
) -> Tensor:
    """Shrink merged values towards 0 and keep them within a range: `clamp((1 - decay) * x)`.

    Args:
        tensor: float32.
        weight_decay: in [0, 1).
        clamp_range: lowest and highest value.

    Returns:
        Same shape, float32.

    >>> finish(torch.tensor([1.0, -4.0]), 0.5, (-1.0, 1.0))
    tensor([ 0.5000, -1.0000])
    """
    check_tensors([tensor])
    check_weight_decay(weight_decay)
    check_clamp_range(clamp_range)
    shrunk = tensor * (1.0 - weight_decay) if weight_decay else tensor.clone()
    return shrunk if clamp_range is None else shrunk.clamp(*clamp_range)


def nearswap(base: Tensor, tensor: Tensor, t: float) -> Tensor:
    """Take the other model's value where it is near the base's, and go towards it by `t` elsewhere.

    `z = min(1, t / max(|x - base|, 1e-6))`, result `z * x + (1 - z) * base`.

    Args:
        base, tensor: float32, same shape.
        t: the distance up to which values are swapped; >= 0.

    Source: alchemonaut's NearSwap, as in mergekit 0.1.5.

    >>> nearswap(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 1.1]), 0.1)
    tensor([0.1000, 1.1000])
    """
    check_distance(t)
    check_tensors([tensor], base)
    share = ((base - tensor).abs().clamp(min=1e-6).reciprocal() * t).clamp(max=1.0)
    return share * tensor + (1.0 - share) * base


def task_arithmetic(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    lam: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """Add weighted task vectors to the base: `base + lam * sum(w_i * (x_i - base))`.

    Args:
        base: the common ancestor of the models, float32.
        tensors: the fine-tuned models, float32, same shape.
        weights: one finite number per model; a negative one subtracts a skill.
        lam: scale of the merged task vector (lambda), finite.
        normalize: divide the sum by the sum of the weights.

    Returns:
        Same shape, float32.

    Raises:
        ValueError: counts, shapes or dtypes do not fit; or `normalize` with weights that sum to 0.

    Source: task arithmetic, arXiv:2212.04089.

    >>> base, one, two = (torch.tensor(v) for v in ([1.0, 1.0], [2.0, 1.0], [1.0, 0.0]))
    >>> task_arithmetic(base, [one, two], [1.0, 2.0], lam=0.5)
    tensor([1.5000, 0.0000])
    """
    check_tensors(tensors, base)
    deltas = [tensor - base for tensor in tensors]
    return add_task_vector(base, combine_deltas(deltas, weights, normalize=normalize), lam)


def add_task_vector(base: Tensor, delta: Tensor, lam: float) -> Tensor:
    """`base + lam * delta`, float32; exactly the base for `lam` 0.

    >>> add_task_vector(torch.tensor([1.0]), torch.tensor([4.0]), 0.5)
    tensor([3.])
    """
    check_lam(lam)
    return base + delta * lam if lam != 0 else base.clone()
