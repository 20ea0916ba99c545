"""RAM: what one model alone has changed is added whole, what several have changed is averaged.

Pure tensor math. Made for models trained by reinforcement learning, whose changes are sparse: an
average over all models would dilute what only one of them has learned. Source: Reinforced Agent
Merging, arXiv:2601.13572; as in mergekit 0.1.5, whose RAM+ counts within each tensor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from linear_utils import add_task_vector
from scalar_utils import check_at_least_0, check_count, ramplus_factors
from tensor_utils import check_tensors, select


def active(deltas: Sequence[Tensor], epsilon: float) -> list[Tensor]:
    """Which entries each model has changed, by more than `epsilon` (rounded to float32); bool."""
    check_at_least_0("epsilon", epsilon)
    check_tensors(deltas)
    bound = torch.tensor(epsilon, dtype=torch.float32)
    return [delta.abs() > bound for delta in deltas]


def count_active(deltas: Sequence[Tensor], epsilon: float) -> list[tuple[int, int]]:
    """Per model, how many entries it has changed together with others, and alone."""
    masks = active(deltas, epsilon)
    alone = sum(mask.int() for mask in masks) == 1
    return [(int((mask & ~alone).sum()), int((mask & alone).sum())) for mask in masks]


def merge_active(deltas: Sequence[Tensor], epsilon: float, factors: Sequence[float]) -> Tensor:
    """The mean over the models that have changed an entry; one model's own, times its factor.

    Args:
        deltas: some rows of the task vectors, float32.
        epsilon: changes up to it do not count.
        factors: one per model; 1.0 each for RAM.

    Returns:
        Shape of one delta, float32; 0 where no model has changed anything.

    >>> merge_active([torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])], 1e-5, [1.0, 1.0])
    tensor([1., 3.])
    """
    check_count("factors", factors, len(deltas))
    total, alone, count = (torch.zeros_like(deltas[0]) for _ in range(3))
    for delta, mask, factor in zip(deltas, active(deltas, epsilon), factors, strict=True):
        own = select(mask, delta)
        total += own
        alone += own * factor
        count += mask
    return torch.where(count == 1, alone, total / count.clamp(min=1.0))


def ram(
    base: Tensor, tensors: Sequence[Tensor], *, epsilon: float = 1e-5, lam: float = 1.0
) -> Tensor:
    """RAM merge of one tensor.

    Args:
        base: the common ancestor, float32, finite.
        tensors: the fine-tuned models, float32, finite, same shape.
        epsilon: changes up to it do not count; >= 0.
        lam: scale of the merged task vector.

    Returns:
        Same shape, float32.

    Raises:
        ValueError: shapes, dtypes or ranges do not fit.

    >>> ram(torch.zeros(3), [torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 4.0])])
    tensor([1., 0., 3.])
    """
    check_tensors(tensors, base)
    deltas = [tensor - base for tensor in tensors]
    return add_task_vector(base, merge_active(deltas, epsilon, [1.0] * len(deltas)), lam)


def ramplus(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    r: float = 0.1,
    alpha: float = 0.2,
    epsilon: float = 1e-5,
    lam: float = 1.0,
) -> Tensor:
    """RAM+ merge of one tensor: what a model alone has changed is amplified.

    Args:
        r, alpha: see `scalar_utils.ramplus_factors`.

    The other arguments, result and errors as `ram`.

    >>> ramplus(torch.zeros(2), [torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])])
    tensor([1.0200, 3.0000])
    """
    check_tensors(tensors, base)
    deltas = [tensor - base for tensor in tensors]
    shared, unique = zip(*count_active(deltas, epsilon), strict=True)
    factors = ramplus_factors(shared, unique, r, alpha)
    return add_task_vector(base, merge_active(deltas, epsilon, factors), lam)
