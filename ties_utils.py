"""TIES: trim each task vector, elect a sign per parameter, average the models that agree.

Pure tensor math. A task vector (`delta`) is `model - base`, in float32. Trimming needs the
k-th largest magnitude of a whole tensor; it is found exactly and without a sort, from two
histograms over the bits of the magnitudes, so any rows of a large tensor can be counted and
trimmed on their own:

    coarse = sum of coarse_histogram(rows)              over all rows
    fine   = sum of fine_histogram(rows, bin << 16)     over all rows
    threshold = threshold_from(...)
    trimmed rows = trim_apply(rows, threshold, ties_before)

`trim` is these steps for one tensor. Source: TIES-Merging, arXiv:2306.01708, section 3; where
this differs from the authors' code, the docstring says so.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from linear_utils import add_task_vector
from scalar_utils import (
    KEEP_ALL,
    KEEP_NONE,
    TrimThreshold,
    check_count,
    check_ties_weights,
    kept_count,
)
from tensor_utils import as_float32, check_tensors, select


def magnitude_bits(delta: Tensor) -> Tensor:
    """Bits of |delta| as int32 in [0, 2**31): they order finite float32 magnitudes as numbers."""
    return delta.view(torch.int32) & 0x7FFFFFFF


def coarse_histogram(delta: Tensor) -> Tensor:
    """Counts of the upper 15 bits of |delta|; int64, shape (2**15,). `delta` is float32."""
    return torch.bincount((magnitude_bits(delta) >> 16).flatten(), minlength=2**15)


def fine_histogram(delta: Tensor, lowest: int) -> Tensor:
    """Counts of the 2**16 magnitudes from some bits on, each on its own; int64, shape (2**16,).

    Args:
        delta: float32.
        lowest: bits of the first of them; those of a coarse bin begin at `bin << 16`.
    """
    position = magnitude_bits(delta).flatten() - lowest
    # The bins below 0 and from 2**16 on take what lies outside, and are dropped.
    counts = torch.bincount(position.clamp_(-1, 2**16).add_(1), minlength=2**16 + 2)
    return counts[1:-1]


def select_bin(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the `rank`-th largest entry, and how many entries lie above the bin.

    Args:
        counts: int64, ascending bins.
        rank: in [1, counts.sum()].

    >>> select_bin(torch.tensor([5, 2, 1]), 3)
    (1, 1)
    """
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, rank))
    chosen = len(counts) - 1 - position
    return chosen, int(from_top[position] - counts[chosen])


def threshold_from(coarse_bin: int, fine_counts: Tensor, rank: int) -> TrimThreshold:
    """The threshold that keeps `rank` entries of a coarse bin (and all above that bin).

    Args:
        coarse_bin: from `select_bin` on the coarse histogram.
        fine_counts: int64 (2**16,), the fine histogram of that bin.
        rank: in [1, fine_counts.sum()]; the number to keep less those above the bin.
    """
    fine_bin, above = select_bin(fine_counts, rank)
    return TrimThreshold(coarse_bin << 16 | fine_bin, rank - above)


def trim_threshold(delta: Tensor, density: float) -> TrimThreshold:
    """The exact threshold that keeps the `kept_count` largest magnitudes of `delta`.

    Args:
        delta: float32, finite, any shape.
        density: share kept, in [0, 1].

    >>> trim_threshold(torch.tensor([1.0, -1.0, 0.5, 1.0, -2.0, 0.0, 1.0]), 0.5)
    TrimThreshold(bits=1065353216, ties=2)
    """
    check_tensors([delta])
    rank = kept_count(density, delta.numel())
    if rank in (0, delta.numel()):
        return KEEP_ALL if rank else KEEP_NONE
    coarse_bin, above = select_bin(coarse_histogram(delta), rank)
    return threshold_from(coarse_bin, fine_histogram(delta, coarse_bin << 16), rank - above)


def count_ties(delta: Tensor, threshold: TrimThreshold) -> int:
    """Number of entries whose magnitude equals the threshold."""
    return int((magnitude_bits(delta) == threshold.bits).count_nonzero())


def trim_apply(delta: Tensor, threshold: TrimThreshold, ties_before: int = 0) -> Tensor:
    """Zero the entries below a threshold.

    Args:
        delta: some rows of a task vector, float32, in flat order.
        threshold: from all rows of it.
        ties_before: entries equal to the threshold in the rows before these.

    Returns:
        Same shape, float32; kept entries unchanged, the others 0.
    """
    bits = magnitude_bits(delta)
    ties_left = threshold.ties - ties_before
    if ties_left <= 0:
        return select(bits > threshold.bits, delta)
    keep = bits >= threshold.bits
    tied = bits == threshold.bits
    if ties_left < int(tied.count_nonzero()):
        keep &= ~tied | (tied.flatten().cumsum(0).view_as(tied) <= ties_left)
    return select(keep, delta)


def trim(delta: Tensor, density: float) -> Tensor:
    """Keep the entries of `delta` with the largest magnitudes, zero the rest.

    Exactly `kept_count(density, n)` entries are kept. Among equal magnitudes at the cut the
    lowest flat index is kept first (mergekit and PEFT leave that to their sort; the authors'
    code keeps all of them, and trims as `trim_model` does).

    Args:
        delta: task vector, float32, finite, any shape.
        density: share kept, in [0, 1].

    Returns:
        Same shape, float32.

    Raises:
        ValueError: `density` is outside [0, 1] or `delta` is not float32.

    Source: TIES, arXiv:2306.01708, step "trim".

    >>> trim(torch.tensor([4.0, -1.0, 3.0, 0.5, -2.0]), 0.6)
    tensor([ 4.,  0.,  3.,  0., -2.])
    """
    return trim_apply(delta, trim_threshold(delta, density))


def trim_rows(delta: Tensor, density: float) -> Tensor:
    """`trim` of every row on its own: `kept_count(density, row length)` entries are kept in each.

    Args:
        delta: task vector, float32, finite. A row is one entry of the first axis; a vector or a
            number is one row.
        density: share kept, in [0, 1].

    Returns:
        Same shape, float32.

    >>> trim_rows(torch.tensor([[4.0, -1.0], [0.5, 0.5]]), 0.5)
    tensor([[4.0000, 0.0000],
            [0.5000, 0.0000]])
    """
    check_tensors([delta])
    rows = delta.reshape(delta.shape[0] if delta.dim() > 1 else 1, -1)
    length = rows.shape[1]
    rank = kept_count(density, length)
    if rank in (0, length):
        return delta.clone() if rank else torch.zeros_like(delta)
    bits = magnitude_bits(rows)
    threshold = bits.kthvalue(length - rank + 1, dim=1, keepdim=True).values
    above, tied = bits > threshold, bits == threshold
    ties_left = rank - above.sum(dim=1, keepdim=True)
    return select(above | (tied & (tied.cumsum(dim=1) <= ties_left)), rows).view_as(delta)


def trim_model(deltas: Sequence[Tensor], density: float) -> list[Tensor]:
    """`trim` of a whole model: the largest magnitudes of all its tensors together are kept.

    A tensor whose changes are all small can lose all of them. This is what the authors' code
    trims, but for its rule on equal magnitudes (see `trim`).

    Args:
        deltas: task vectors of every tensor, float32, finite. Their order decides among equal
            magnitudes at the cut.
        density: share kept, in [0, 1].

    Returns:
        The trimmed task vectors, in that order.

    >>> trim_model([torch.tensor([0.1, 0.2]), torch.tensor([3.0, -4.0])], 0.5)
    [tensor([0., 0.]), tensor([ 3., -4.])]
    """
    sizes = [delta.numel() for delta in deltas]
    trimmed = trim(torch.cat([delta.flatten() for delta in deltas]), density)
    parts = torch.split(trimmed, sizes)
    return [part.view_as(delta) for part, delta in zip(parts, deltas, strict=True)]


def elect_sign(deltas: Sequence[Tensor] | Tensor) -> Tensor:
    """Majority sign of every parameter, each model voting with its magnitude.

    Args:
        deltas: trimmed and weighted task vectors, a sequence of tensors of one shape or a
            stack (models, *shape); float32, finite.

    Returns:
        Shape (*shape), float32, entries -1.0 or 1.0. A parameter that sums to exactly zero
        gets 1.0, as in mergekit and PEFT; the authors' code takes the model-wide majority.
        Sums run in float32 in the order of the models.

    Raises:
        ValueError: no deltas, not float32, or of several shapes.

    Source: TIES, arXiv:2306.01708, step "elect". One big change outvotes two small ones:

    >>> elect_sign(torch.tensor([[5.0, -1.0], [-1.0, -1.0], [-1.0, 0.0]]))
    tensor([ 1., -1.])
    """
    votes = list(deltas)
    check_tensors(votes)
    mass = torch.zeros_like(votes[0])
    for vote in votes:
        mass += vote
    return torch.copysign(torch.ones_like(mass), mass)  # mass is never -0.0: it began at 0.0


def disjoint_mean(
    deltas: Sequence[Tensor] | Tensor,
    signs: Tensor,
    weights: Sequence[float],
    *,
    normalize: bool = True,
) -> Tensor:
    """Mean over the models whose entry has the elected sign; the others are left out.

    `sum(m_i * z_i) / sum(m_i * w_i)` with `m_i = 1` where `z_i` has the elected sign. An entry
    that is 0 (trimmed) never counts. Where no model agrees, the result is 0.

    Args:
        deltas: task vectors already multiplied by their weights (z_i), a sequence or a stack.
        signs: -1.0 or 1.0 per parameter, from `elect_sign`.
        weights: one per model; what the mean divides by (PEFT divides by the number of models).
        normalize: False gives the sum instead of the mean.

    Returns:
        Shape of one delta, float32.

    Raises:
        ValueError: counts, shapes or dtypes do not fit; negative weights with `normalize`.

    Source: TIES, arXiv:2306.01708, step "disjoint merge"; weights as in mergekit 0.1.5.

    >>> disjoint_mean(torch.tensor([[4.0], [2.0], [-1.0]]), torch.tensor([1.0]), [1.0, 1.0, 1.0])
    tensor([3.])
    """
    deltas = list(deltas)
    check_count("weights", weights, len(deltas))
    check_ties_weights(weights, normalize=normalize)
    check_tensors(deltas, signs)
    total = torch.zeros_like(deltas[0])
    divisor = torch.zeros_like(total)
    for delta, weight in zip(deltas, weights, strict=True):
        agreeing = torch.relu(delta * signs)  # its magnitude, or 0 where the sign is another
        total += agreeing
        if normalize:
            divisor += agreeing.sign() * weight
    total *= signs
    # Weights are 0 or at least 1e-30 here, so the divisor is 0 only where the total is as well.
    return total / divisor.clamp_(min=torch.finfo(torch.float32).tiny) if normalize else total


def elect_and_merge(
    base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], lam: float, normalize: bool
) -> Tensor:
    """Add sparse task vectors to the base: weight, elect, disjoint merge, scale by `lam`.

    Args:
        base: float32.
        deltas: trimmed (TIES) or dropped (DARE) task vectors, float32, shape of `base`.
        weights, lam, normalize: as in `ties`.
    """
    check_count("weights", weights, len(deltas))
    weighted = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    merged = disjoint_mean(weighted, elect_sign(weighted), weights, normalize=normalize)
    return add_task_vector(base, merged, lam)


def ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    lam: float = 1.0,
    normalize: bool = True,
    trim_scope: Literal["tensor", "row"] = "tensor",
) -> Tensor:
    """TIES merge of one tensor: trim, elect, disjoint merge, scale, add the base.

    Args:
        base: the common ancestor, float32, finite.
        tensors: the fine-tuned models, float32, finite, same shape.
        weights: one per model. They enter the election and the mean (the paper has none); a
            common factor cancels, and with one model the weight has no effect.
        densities: share of each task vector kept, in [0, 1].
        lam: scale of the merged task vector.
        normalize: divide by the summed weights of the models that agree.
        trim_scope: trim the tensor as a whole or every row of it. For the whole model, trim its
            task vectors with `trim_model` and give them to `elect_and_merge`.

    Returns:
        Same shape, float32.

    Raises:
        ValueError: counts, shapes, dtypes or ranges do not fit; negative weights with
            `normalize`.

    Source: TIES, arXiv:2306.01708; the choices are those of mergekit 0.1.5.

    >>> base, one = torch.zeros(5), torch.tensor([4.0, -1.0, 3.0, 0.5, -2.0])
    >>> two = torch.tensor([-1.0, 2.0, -3.0, 1.0, -4.0])
    >>> ties(base, [one, two], [1.0, 1.0], [0.6, 0.6])
    tensor([ 4.,  2.,  3.,  0., -3.])
    """
    check_tensors(tensors, base)
    check_count("densities", densities, len(tensors))
    if trim_scope not in ("tensor", "row"):
        raise ValueError(f"trim_scope must be tensor or row, got {trim_scope!r}")
    trim_one = trim if trim_scope == "tensor" else trim_rows
    trimmed = [
        trim_one(tensor - base, density) for tensor, density in zip(tensors, densities, strict=True)
    ]
    return elect_and_merge(base, trimmed, weights, lam, normalize)


class TIES:
    """TIES for parameters of loaded models, one at a time.

    Args:
        lam: scale of the merged task vector.
        normalize: divide by the summed weights of the models that agree.

    >>> zero, one = torch.zeros(2), torch.ones(2)
    >>> TIES().merge([1.0], zero, [one], [1.0])
    tensor([1., 1.])
    """

    def __init__(self, *, lam: float = 1.0, normalize: bool = True) -> None:
        self.lam = lam
        self.normalize = normalize

    def merge(
        self,
        weights: Sequence[float],
        base_model_parameters: Tensor,
        ft_models_parameters: Sequence[Tensor],
        densities: Sequence[float],
        device: str | torch.device = "cpu",
    ) -> Tensor:
        """The merged parameter, float32, on `device`; the inputs stay as they are.

        Args:
            weights: one per fine-tuned model.
            base_model_parameters: one parameter of the base model, any float dtype.
            ft_models_parameters: the same parameter of each fine-tuned model.
            densities: share of each task vector kept, in [0, 1].
            device: where to compute.

        Raises:
            ValueError: as `ties`.
        """
        base, *tensors = as_float32([base_model_parameters, *ft_models_parameters], device)
        return ties(base, tensors, weights, densities, lam=self.lam, normalize=self.normalize)
