"""DELLA: drop entries of each task vector at random, large ones less often than small ones.

Pure tensor math. Chances follow from an entry's rank within its row, so rows can be done on their
own; the random numbers are those of `dare_utils`, and with `epsilon` 0 so is everything else.

Source: DELLA-Merging, arXiv:2406.11617, step "MagPrune"; `epsilon` is the half width, as in
mergekit (the authors' code takes the full width, `window_size`).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dare_utils import absolute_parts, mask_draws
from linear_utils import add_task_vector, combine_deltas
from scalar_utils import (
    Denominator,
    ElectMethod,
    ElectOn,
    Key,
    RankRescale,
    check_count,
    keep_chances,
    keep_limit,
    mask_key,
    rank_factors,
    rescale_factor,
)
from tensor_utils import check_tensors, rows_of, select
from ties_utils import elect_and_merge, magnitude_bits


def rank_in_rows(delta: Tensor) -> Tensor:
    """Each entry's place in its row by magnitude, the smallest 0; equal ones by index.

    Args:
        delta: float32, shape (rows, length).

    Returns:
        Same shape, int64.

    >>> rank_in_rows(torch.tensor([[0.3, -0.1, 0.2, -0.5]]))
    tensor([[2, 0, 1, 3]])
    """
    order = magnitude_bits(delta).argsort(dim=1, stable=True)
    places = torch.arange(delta.shape[1], device=delta.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def drop_by_rank(
    delta: Tensor,
    density: float,
    epsilon: float,
    key: Key,
    start: int = 0,
    rescale: RankRescale = "inverse_prob",
) -> Tensor:
    """Zero entries of some rows at random, the chance of being kept growing with the magnitude.

    Args:
        delta: some whole rows of a task vector, float32, finite. A row is one entry of the first
            axis; a vector is one row.
        density: mean chance of being kept, in [0, 1].
        epsilon: the smallest entry of a row is kept with chance density - epsilon, the largest
            with density + epsilon; both lie between 0 and 1.
        key: from `mask_key`.
        start: flat index of the first entry in its tensor.
        rescale: "inverse_prob" divides what is kept by its chance. "l1" needs whole tensors; here
            it does what "none" does.

    Returns:
        Same shape, float32.
    """
    rows = rows_of(delta)
    chances = keep_chances(density, epsilon, rows.shape[1])
    limits = torch.tensor([keep_limit(chance) for chance in chances], device=delta.device)
    factors = torch.tensor(rank_factors(rescale, chances), device=delta.device).float()
    rank = rank_in_rows(rows)
    draws = mask_draws(key, start, rows.numel(), delta.device).view_as(rows)
    return select(draws < limits[rank], rows * factors[rank]).view_as(delta)


def della(
    delta: Tensor,
    density: float,
    epsilon: float,
    key: Key,
    *,
    rescale: RankRescale = "inverse_prob",
) -> Tensor:
    """Drop entries of a whole task vector at random by rank, and rescale the rest.

    Args:
        delta: float32, finite, any shape.
        density, epsilon, key: as `drop_by_rank`.
        rescale: divide each kept entry by its chance ("inverse_prob", the paper: the expected
            value is `delta`), multiply all by one factor that keeps the L1 norm ("l1", mergekit
            since 0.1.0: large changes grow, small ones shrink), or leave them ("none").

    Returns:
        Same shape, float32.

    Raises:
        ValueError: a parameter is out of range, or `delta` is not float32.

    >>> key = mask_key(42, "0", "model.layers.0.mlp.up_proj.weight")
    >>> della(torch.arange(1.0, 9.0) / 8, 0.5, 0.2, key, rescale="none")
    tensor([0.1250, 0.0000, 0.3750, 0.5000, 0.0000, 0.7500, 0.8750, 1.0000])
    """
    check_tensors([delta])
    kept = drop_by_rank(delta, density, epsilon, key, rescale=rescale)
    if rescale != "l1":
        return kept
    norms = [math.fsum(absolute_parts(x)) for x in (delta, kept)]
    return kept * rescale_factor("l1", density, *norms)


def della_linear(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    epsilons: Sequence[float],
    *,
    seed: int = 0,
    name: str = "",
    lam: float = 1.0,
    normalize: bool = False,
    rescale: RankRescale = "inverse_prob",
) -> Tensor:
    """Task arithmetic on task vectors dropped by rank.

    Args:
        base: the common ancestor, float32, finite.
        tensors: the fine-tuned models, float32, finite, same shape.
        weights: one finite number per model.
        densities, epsilons: see `drop_by_rank`; one per model.
        seed: in [0, 2**64).
        name: the tensor's name. Masks of tensors with one name and seed are drawn alike.
        lam: scale of the merged task vector.
        normalize: divide by the sum of the weights.
        rescale: see `della`.

    Returns:
        Same shape, float32. Its mean over seeds is `task_arithmetic` ("inverse_prob").

    Raises:
        ValueError: counts, shapes, dtypes or ranges do not fit.
    """
    deltas = _della_deltas(base, tensors, densities, epsilons, seed, name, rescale)
    return add_task_vector(base, combine_deltas(deltas, weights, normalize=normalize), lam)


def della_ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    epsilons: Sequence[float],
    *,
    seed: int = 0,
    name: str = "",
    lam: float = 1.0,
    denominator: Denominator = "weight",
    elect_on: ElectOn = "weighted",
    elect_method: ElectMethod = "mass",
    rescale: RankRescale = "inverse_prob",
) -> Tensor:
    """TIES' sign election and disjoint merge on task vectors dropped by rank; DELLA proper.

    Arguments, result and errors as `della_linear` and `ties_utils.elect_and_merge`.
    """
    deltas = _della_deltas(base, tensors, densities, epsilons, seed, name, rescale)
    return elect_and_merge(
        base,
        deltas,
        weights,
        lam,
        denominator=denominator,
        elect_on=elect_on,
        elect_method=elect_method,
    )


def _della_deltas(
    base: Tensor,
    tensors: Sequence[Tensor],
    densities: Sequence[float],
    epsilons: Sequence[float],
    seed: int,
    name: str,
    rescale: RankRescale,
) -> list[Tensor]:
    check_tensors(tensors, base)
    check_count("densities", densities, len(tensors))
    check_count("epsilons", epsilons, len(tensors))
    return [
        della(tensor - base, density, epsilon, mask_key(seed, str(position), name), rescale=rescale)
        for position, (tensor, density, epsilon) in enumerate(
            zip(tensors, densities, epsilons, strict=True)
        )
    ]
