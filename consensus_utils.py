"""Consensus merging: keep the entries of a merged task vector that matter to several models.

Pure tensor math, entry by entry. A model's TALL mask marks the entries on which the merged task
vector is nearer to its own than to nothing; entries marked by too few models are "selfish" or
"catastrophic", and are reset to the base. Source: "Localizing task information for improved model
merging and compression", arXiv:2405.07813, sections 3 and 4.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from linear_utils import add_task_vector, combine_deltas
from scalar_utils import check_agreement, check_count, check_mask_lambda
from tensor_utils import check_tensors, select
from ties_utils import elect_and_combine, trim


def tall_mask(delta: Tensor, merged: Tensor, mask_lambda: float) -> Tensor:
    """Which entries matter to a model: `|delta| > mask_lambda * |merged - delta|`.

    Args:
        delta: the model's task vector, float32.
        merged: the merged task vector, unscaled; float32, same shape.
        mask_lambda: >= 0; a larger one marks less. The authors choose among 0.2 to 0.6.

    Returns:
        Same shape, bool.

    >>> tall_mask(torch.tensor([1.0, 0.1]), torch.tensor([1.2, 2.0]), 0.4)
    tensor([ True, False])
    """
    check_mask_lambda(mask_lambda)
    check_tensors([delta, merged])
    return delta.abs() > (merged - delta).abs() * mask_lambda


def keep_consensus(
    merged: Tensor, deltas: Sequence[Tensor], mask_lambdas: Sequence[float], agreement: int
) -> Tensor:
    """Zero the entries of a merged task vector that matter to fewer than `agreement` models.

    Args:
        merged: float32.
        deltas: every model's task vector, as it is, float32, same shape.
        mask_lambdas: see `tall_mask`; one per model.
        agreement: 0 keeps everything, more than there are models nothing.
    """
    check_agreement(agreement)
    check_count("mask_lambdas", mask_lambdas, len(deltas))
    count = torch.zeros_like(merged)
    for delta, mask_lambda in zip(deltas, mask_lambdas, strict=True):
        count += tall_mask(delta, merged, mask_lambda)
    return select(count >= agreement, merged)


def consensus(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    mask_lambdas: Sequence[float],
    *,
    agreement: int = 2,
    lam: float = 1.0,
) -> Tensor:
    """Consensus task arithmetic: the weighted sum of the task vectors where models agree on it.

    Args:
        base: the common ancestor, float32, finite.
        tensors: the fine-tuned models, float32, finite, same shape.
        weights: one finite number per model; 1.0 each in the paper.
        mask_lambdas: see `tall_mask`; one per model.
        agreement: how many models an entry must matter to.
        lam: scale of the merged task vector.

    Returns:
        Same shape, float32.

    Raises:
        ValueError: counts, shapes, dtypes or ranges do not fit.

    >>> one, two = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.1, 2.0])
    >>> consensus(torch.zeros(3), [one, two], [1.0, 1.0], [0.4, 0.4])
    tensor([2., 0., 0.])
    """
    check_tensors(tensors, base)
    deltas = [tensor - base for tensor in tensors]
    merged = combine_deltas(deltas, weights, normalize=False)
    return add_task_vector(base, keep_consensus(merged, deltas, mask_lambdas, agreement), lam)


def consensus_ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    mask_lambdas: Sequence[float],
    *,
    agreement: int = 2,
    lam: float = 1.0,
) -> Tensor:
    """Consensus TIES: the task vector that TIES merges, where models agree on it.

    Args:
        densities: share of each task vector that TIES keeps, in [0, 1].

    The other arguments, result and errors as `consensus`.
    """
    check_tensors(tensors, base)
    check_count("densities", densities, len(tensors))
    deltas = [tensor - base for tensor in tensors]
    trimmed = [trim(delta, density) for delta, density in zip(deltas, densities, strict=True)]
    merged = elect_and_combine(trimmed, weights)
    return add_task_vector(base, keep_consensus(merged, deltas, mask_lambdas, agreement), lam)
