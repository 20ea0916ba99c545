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


def importance(base: Tensor, tensor: Tensor) -> Tensor:
    """How much each entry matters: its change, times how much its row changes as a distribution.

    `|x - b| * sum p ln(p / q)` with p and q the row's softmax in x and b, plus 1e-8 each.

    Args:
        base, tensor: whole rows, float32, same shape. A row is one entry of the first axis; a
            vector is one row.

    Returns:
        Same shape, float32. The row's part is computed in float64: it is a sum of terms that nearly
        cancel, of which mergekit's float32 leaves two or three digits.
    """
    check_tensors([tensor], base)
    rows, base_rows = rows_of(tensor), rows_of(base)
    p = torch.softmax(rows.double(), dim=1) + EPS
    q = torch.softmax(base_rows.double(), dim=1) + EPS
    divergence = (p * torch.log(p / q)).sum(dim=1, keepdim=True).clamp(min=0.0)
    return ((rows - base_rows).abs() * divergence.float()).view_as(tensor)


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
    return fuse(base, tensor, fusion_threshold(importance(base, tensor)))


def fuse(base: Tensor, tensor: Tensor, threshold: float) -> Tensor:
    """Some whole rows of `arcee_fusion`, with the threshold of all."""
    return torch.where(importance(base, tensor) >= threshold, tensor, base)
