"""Model Stock: how far to go from the base towards the mean of its fine-tunes, by their angles.

Pure tensor math over the dot products of the task vectors; `gram_utils.model_stock_ratio` is what
follows from them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gram_utils import StockAverage, model_stock_ratio
from linear_utils import combine, combine_rows
from slerp_utils import gram, row_grams
from tensor_utils import check_tensors


def model_stock(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    filter_wise: bool = False,
    average: StockAverage = "cosine",
    norm_floor: float = 0.0,
    clamp: bool = True,
) -> Tensor:
    """`base + t * mean(x_i - base)`, with t from the angles between the task vectors.

    Args:
        base: the common ancestor, float32.
        tensors: at least two fine-tuned models, float32, same shape.
        filter_wise: a t for each row (an entry of the first axis) instead of one.
        average, norm_floor, clamp: see `gram_utils.model_stock_ratio`.

    Returns:
        Same shape, float32.

    Raises:
        ValueError: counts, shapes or dtypes do not fit.

    Source: Model Stock, arXiv:2403.19522.

    >>> model_stock(torch.ones(2), [torch.tensor([2.0, 1.0]), torch.tensor([1.5, 1.5])])
    tensor([1.6213, 1.2071])
    """
    check_tensors(tensors, base)
    deltas = [tensor - base for tensor in tensors]
    each = row_grams(deltas) if filter_wise else [gram(deltas)]
    shares = [
        model_stock_ratio(dots, average=average, norm_floor=norm_floor, clamp=clamp).t
        / len(tensors)
        for dots in each
    ]
    if not filter_wise:
        return combine(shares * len(tensors), deltas, base)
    coefficients = torch.tensor(shares, dtype=torch.float32, device=base.device)
    return base + combine_rows(coefficients[:, None].expand(-1, len(tensors)), deltas)
