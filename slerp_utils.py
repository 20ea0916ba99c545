"""Interpolation on spheres: SLERP, and its kin for more models, rows and columns.

Pure tensor math, split in the way that a large tensor needs: `gram_parts` gathers dot products
from any rows, `gram_utils` turns them into one number per tensor, and `linear_utils.combine`
applies these to any rows. Each function here is the three together. All take float32 tensors of
one shape and return a new one.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gram_utils import (
    Gram,
    gram_matrix,
    gram_pairs,
    karcher_coefficients,
    multislerp_coefficients,
    nuslerp_coefficients,
    nuslerp_t,
    sequential_coefficients,
    sequential_steps,
    slerp_coefficients,
)
from linear_utils import combine, combine_rows
from scalar_utils import check_count
from tensor_utils import check_tensors, rows_of, run_sums


def gram_parts(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Run sums of the dot products of tensors, in float64 from the products on.

    Args:
        tensors: some whole rows of N tensors, float32, same shape.

    Returns:
        A list for each of `gram_utils.gram_pairs`. Lists of several blocks are joined; `math.fsum`
        of each is the dot product.
    """
    check_tensors(tensors)
    wide = [tensor.double() for tensor in tensors]
    return [run_sums(wide[i] * wide[j]) for i, j in gram_pairs(len(tensors))]


def gram(tensors: Sequence[Tensor]) -> Gram:
    """Dot products of tensors taken as flat vectors, shape (N, N), float64.

    >>> gram([torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])])
    [[5.0, 2.0], [2.0, 1.0]]
    """
    return gram_matrix([math.fsum(part) for part in gram_parts(tensors)], len(tensors))


def row_grams(tensors: Sequence[Tensor]) -> list[Gram]:
    """The `gram` of every row; a row is one entry of the first axis, a vector is one row."""
    parts = gram_parts(tensors)
    rows = rows_of(tensors[0]).shape[0]
    runs = len(parts[0]) // rows
    return [
        gram_matrix(
            [math.fsum(part[row * runs : (row + 1) * runs]) for part in parts], len(tensors)
        )
        for row in range(rows)
    ]


def column_grams(tensors: Sequence[Tensor], before: Tensor | None = None) -> Tensor:
    """Dot products of the columns of tensors, added row by row, from the first to the last.

    Args:
        tensors: some rows of each, float32, same shape.
        before: what this gave for the rows before these.

    Returns:
        Shape (pairs, columns), float64; pairs as in `gram_utils.gram_pairs`.
    """
    wide = [rows_of(tensor).double() for tensor in tensors]
    products = torch.stack([wide[i] * wide[j] for i, j in gram_pairs(len(wide))])
    if before is not None:
        products = torch.cat([before.to(products.device)[:, None], products], dim=1)
    return products.cumsum(dim=1)[:, -1]


def slerp(
    a: Tensor,
    c: Tensor,
    t: float,
    *,
    dot_threshold: float = 0.9995,
    eps: float = 1e-8,
    normalize: bool = False,
) -> Tensor:
    """Spherical interpolation from `a` (t = 0) to `c` (t = 1), both taken as flat vectors.

    Args:
        a, c: float32, same shape.
        t: in [0, 1].
        dot_threshold: above this |cosine| the straight line is taken instead.
        eps: norms up to it count as zero.
        normalize: turn the direction along the arc and interpolate the length apart.

    Returns:
        Same shape, float32.

    Raises:
        ValueError: `t` is outside [0, 1], or shapes or dtypes do not fit.

    >>> slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]), 0.5)
    tensor([0.7071, 1.4142])
    """
    (aa, ac), (_, cc) = gram([a, c])
    coefficients = slerp_coefficients(
        aa, cc, ac, t, dot_threshold=dot_threshold, eps=eps, normalize=normalize
    )
    return combine(coefficients[:2], [a, c])


def sequential_slerp(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Fold models in one by one: step k goes `w_k / (w_1 + ... + w_k)` of the way to model k.

    The result depends on the order of the models.

    Args:
        tensors: float32, all of one shape.
        weights: one number per tensor, not negative, the first above 0.

    Returns:
        Same shape, float32; there are no intermediate results that would be rounded.

    Raises:
        ValueError: counts, shapes or dtypes do not fit; or a weight is out of range.

    >>> sequential_slerp(list(torch.eye(3)), [1.0, 1.0, 1.0])
    tensor([0.6124, 0.6124, 0.5000])
    """
    check_count("weights", weights, len(tensors))
    coefficients, _ = sequential_coefficients(gram(tensors), sequential_steps(weights))
    return combine(coefficients, tensors)


def nuslerp(
    a: Tensor,
    c: Tensor,
    weights: Sequence[float],
    *,
    base: Tensor | None = None,
    flatten: bool = True,
    row_wise: bool = False,
) -> Tensor:
    """SLERP by two weights, of whole tensors, rows or columns, with a straight line only where
    the tensors are parallel.

    Args:
        a, c: float32, same shape.
        weights: two; `t` is the second's share.
        base: interpolate the task vectors `a - base` and `c - base`, and add the base.
        flatten: take each tensor as one vector. Otherwise each row (an entry of the first axis) is
            one; a tensor of one axis is one vector in any case.
        row_wise: without `flatten`, take each column instead (the name is mergekit's).

    Raises:
        ValueError: weights have opposite signs; shapes or dtypes do not fit.

    Source: mergekit 0.1.5, `nuslerp`.

    >>> nuslerp(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]), [1.0, 1.0])
    tensor([[0.7071, 1.4142]])
    """
    t = nuslerp_t(weights)
    pair = _from(base, [a, c])
    if flatten or a.dim() < 2:
        (aa, ac), (_, cc) = gram(pair)
        merged = combine(nuslerp_coefficients(aa, cc, ac, t)[:2], pair)
    elif row_wise:
        each = column_grams(pair).T.tolist()
        multipliers = [_nuslerp(gram_matrix(dots, 2), t) for dots in each]
        coefficients = torch.tensor(multipliers, dtype=torch.float32, device=a.device)
        columns = [rows_of(tensor).T for tensor in pair]
        merged = combine_rows(coefficients, columns).T.reshape(a.shape)
    else:
        merged = _by_rows(pair, lambda dots: _nuslerp(dots, t))
    return merged if base is None else base + merged


def _nuslerp(dots: Gram, t: float) -> Sequence[float]:
    (aa, ac), (_, cc) = dots
    return nuslerp_coefficients(aa, cc, ac, t)[:2]


def _from(base: Tensor | None, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, or their task vectors where there is a base."""
    check_tensors(tensors, base)
    return list(tensors) if base is None else [tensor - base for tensor in tensors]


def _by_rows(tensors: Sequence[Tensor], coefficients: Callable[[Gram], Sequence[float]]) -> Tensor:
    """Combine every row by what its own dot products say."""
    each = [list(coefficients(dots)) for dots in row_grams(tensors)]
    return combine_rows(torch.tensor(each, dtype=torch.float32, device=tensors[0].device), tensors)


def multislerp(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    base: Tensor | None = None,
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """The weighted mean direction with the weighted mean length: `multislerp_coefficients`.

    Args:
        tensors: float32, all of one shape.
        weights: one per tensor, their sum above 0.
        base: merge the task vectors, and add the base.
        normalize_weights: divide the weights by their sum first.
        eps: norms below it count as zero.

    Raises:
        ValueError: the directions cancel, or counts, shapes, dtypes or weights do not fit.

    >>> multislerp([torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])], [1.0, 1.0])
    tensor([2.4749, 2.4749])
    """
    if len(tensors) == 1 and base is not None:
        check_tensors(tensors, base)
        return tensors[0].clone()
    moved = _from(base, tensors)
    coefficients = multislerp_coefficients(
        gram(moved), weights, normalize=normalize_weights, eps=eps
    )
    return combine(coefficients, moved, base)


def karcher(
    tensors: Sequence[Tensor], weights: Sequence[float], *, max_iter: int = 10, tol: float = 1e-5
) -> Tensor:
    """The Riemannian mean of the directions with the mean length: `karcher_coefficients`.

    Args:
        tensors: float32, all of one shape.
        weights: one per tensor, not negative, one above 0.
        max_iter, tol: when the search ends.

    Raises:
        ValueError: counts, shapes, dtypes or weights do not fit.

    >>> karcher([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])], [1.0, 1.0])
    tensor([1.0607, 1.0607])
    """
    mean = karcher_coefficients(gram(tensors), weights, max_iter=max_iter, tol=tol)
    return combine(mean.coefficients, tensors)
