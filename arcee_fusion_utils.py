"""Arcee Fusion: take the other model's value where it matters most, and keep the base elsewhere.

Pure tensor math. What matters is decided by a threshold on an importance score, of which three
order statistics are found exactly, as in TIES' trim. Source: mergekit 0.1.5, `arcee_fusion`, which
estimates them from a random sample in tensors of more than a million entries.
"""

import torch
from torch import Tensor

from scalar_utils import quartile_ranks
from tensor_utils import check_tensors, rows_of

EPS = 1e-8

_ELEMENTS = 2**16
"""Elements worked on at once: few enough for what is computed on the way to stay in a cache."""


def row_divergence(base: Tensor, tensor: Tensor) -> Tensor:
    """How much each row changes as a distribution.

    `sum p ln(p / q)` with p and q the row's softmax in x and b, plus 1e-8 each.

    Args:
        base, tensor: whole rows, float32, same shape. A row is one entry of the first axis; a
            vector is one row.

    Returns:
        Shape (rows,), float32, at least 0. Computed in float64: it is a sum of terms that nearly
        cancel, of which mergekit's float32 leaves two or three digits.
    """
    check_tensors([tensor], base)
    rows, base_rows = rows_of(tensor), rows_of(base)
    count = max(1, _ELEMENTS // max(1, rows.shape[1]))
    pieces = zip(torch.split(rows, count), torch.split(base_rows, count), strict=True)
    return torch.cat([_divergence(*piece) for piece in pieces])


def _divergence(rows: Tensor, base_rows: Tensor) -> Tensor:
    p, q = _softmax(rows).add_(EPS), _softmax(base_rows).add_(EPS)
    return torch.log(p / q).mul_(p).sum(dim=1).clamp(min=0.0).float()


def _softmax(rows: Tensor) -> Tensor:
    """Of each row, in float64; a fraction of the time that `torch.softmax` takes for that."""
    rows = rows.double()
    exponentials = rows.sub_(rows.amax(dim=1, keepdim=True)).exp_()
    return exponentials.div_(exponentials.sum(dim=1, keepdim=True))


def importance(base: Tensor, tensor: Tensor, divergence: Tensor) -> Tensor:
    """How much each entry matters: its change, times how much its row changes.

    Args:
        base, tensor: as in `row_divergence`.
        divergence: what that gives.

    Returns:
        Same shape, float32.
    """
    change = (rows_of(tensor) - rows_of(base)).abs()
    return (change * divergence[:, None]).view_as(tensor)


def fusion_threshold(score: Tensor) -> float:
    """`median + 1.5 (Q3 - Q1)` of all entries, the lower neighbour where a rank is fractional."""
    flat, numel = score.flatten(), score.numel()
    first, median, third = (
        float(flat.kthvalue(numel - rank + 1).values) for rank in quartile_ranks(numel)
    )
    return median + 1.5 * (third - first)


def arcee_fusion(base: Tensor, tensor: Tensor) -> Tensor:
    """Arcee Fusion of one tensor.

    Args:
        base, tensor: float32, finite, same shape.

    Returns:
        Same shape, float32: the other model's values where the score is at least the threshold.

    >>> base = torch.zeros(1, 5)
    >>> arcee_fusion(base, torch.tensor([[0.0, 0.1, 0.2, 0.3, 3.0]]))
    tensor([[0., 0., 0., 0., 3.]])
    """
    divergence = row_divergence(base, tensor)
    threshold = fusion_threshold(importance(base, tensor, divergence))
    return fuse(base, tensor, divergence, threshold)


def fuse(base: Tensor, tensor: Tensor, divergence: Tensor, threshold: float) -> Tensor:
    """Some whole rows of `arcee_fusion`, with the threshold of all."""
    return torch.where(importance(base, tensor, divergence) >= threshold, tensor, base)
