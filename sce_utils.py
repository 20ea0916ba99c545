"""SCE: select the entries on which models differ most, weigh models by their changes, erase
what goes against the majority.

Pure tensor math over TIES' election. Source: FuseChat-3.0's SCE, arXiv:2408.07990; where the
authors' code and mergekit differ, the docstrings say so.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scalar_utils import (
    SCE_MASKS,
    SceMask,
    TrimThreshold,
    check_choice,
    check_topk,
    sce_weights,
    selected_count,
    trim_cut,
)
from tensor_utils import check_tensors, run_sums, select
from ties_utils import cut_mask, elect_and_merge, magnitude_bits, rank_threshold


def variance(deltas: Sequence[Tensor]) -> Tensor:
    """Population variance of each entry over the models, in float64, rounded to float32.

    >>> variance([torch.tensor([2.0, 1.0]), torch.tensor([0.0, 1.0])])
    tensor([1., 0.])
    """
    check_tensors(deltas)
    total = torch.zeros_like(deltas[0], dtype=torch.float64)
    for delta in deltas:
        total += delta
    mean = total / len(deltas)
    squares = torch.zeros_like(total)
    for delta in deltas:
        apart = delta - mean
        squares += apart * apart
    return (squares / len(deltas)).float()


def select_threshold(deltas: Sequence[Tensor], select_topk: float) -> TrimThreshold:
    """The exact threshold on the `variance` that selects its largest `select_topk`.

    That is a share of the entries whose variance is not 0; all entries for 1.
    """
    spread = variance(deltas)
    varying = int((magnitude_bits(spread) > 0).count_nonzero())
    return rank_threshold(spread, selected_count(select_topk, varying, spread.numel()))


def square_parts(delta: Tensor) -> list[float]:
    """Run sums of squares in float64; `math.fsum` of those of all rows is the squared norm."""
    wide = delta.double()
    return run_sums(wide * wide)


def sce(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    select_topk: float = 1.0,
    sce_mask: SceMask = "deltas",
    sce_floor: float = 0.0,
    lam: float = 1.0,
) -> Tensor:
    """SCE merge of one tensor: select, calculate weights, erase the minority, add the base.

    Each model's weight is the mean square of its selected changes. What agrees with the sign of
    the summed changes is averaged by these weights.

    Args:
        base: the common ancestor, float32, finite.
        tensors: the fine-tuned models, float32, finite, same shape.
        select_topk: share of the entries that differ between the models to select, in [0, 1]; 1
            takes all entries, and with one model anything else gives the base.
        sce_mask: the selection drops the other entries from the "deltas" (mergekit), or counts
            for the weights alone ("weights_only", the authors' code).
        sce_floor: weights are equal where their mean squares sum to less. mergekit has 1e-6,
            which ordinary fine-tunes stay below; the authors' code 0.
        lam: scale of the merged task vector.

    Returns:
        Same shape, float32.

    Raises:
        ValueError: shapes, dtypes or ranges do not fit.

    Source: SCE, arXiv:2408.07990.

    >>> one, two = torch.tensor([2.0, 0.0, 1.0, -1.0]), torch.tensor([0.0, 1.0, 1.0, 3.0])
    >>> sce(torch.zeros(4), [one, two], select_topk=0.67)
    tensor([2., 0., 0., 3.])
    """
    check_topk(select_topk)
    check_choice("sce_mask", sce_mask, SCE_MASKS)
    check_tensors(tensors, base)
    deltas = [tensor - base for tensor in tensors]
    chosen = cut_mask(variance(deltas), trim_cut(select_threshold(deltas, select_topk)))
    selected = [select(chosen, delta) for delta in deltas]
    squares = [math.fsum(square_parts(delta)) for delta in selected]
    weights = sce_weights(squares, base.numel(), sce_floor)
    votes = selected if sce_mask == "deltas" else deltas
    return elect_and_merge(base, votes, weights, lam, elect_on="unweighted")
