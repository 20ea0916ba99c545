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

from gram_utils import gram_pairs
from linear_utils import add_task_vector
from scalar_utils import (
    DENOMINATORS,
    ELECT_METHODS,
    ELECT_ON,
    KEEP_ALL,
    KEEP_NONE,
    NO_MAGNITUDE,
    TRIM_TIES,
    Cut,
    Denominator,
    ElectMethod,
    ElectOn,
    KRule,
    TrimThreshold,
    TrimTies,
    Window,
    check_choice,
    check_count,
    check_ties_weights,
    check_weights,
    kept_count,
    trim_cut,
)
from tensor_utils import as_float32, check_tensors, rows_of, select


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


def trim_threshold(delta: Tensor, density: float, rule: KRule = "floor") -> TrimThreshold:
    """The exact threshold that keeps the `kept_count` largest magnitudes of `delta`.

    Args:
        delta: float32, finite, any shape.
        density: share kept, in [0, 1].
        rule: see `kept_count`.

    >>> trim_threshold(torch.tensor([1.0, -1.0, 0.5, 1.0, -2.0, 0.0, 1.0]), 0.5)
    TrimThreshold(bits=1065353216, ties=2)
    """
    return rank_threshold(delta, kept_count(density, delta.numel(), rule))


def rank_threshold(delta: Tensor, rank: int) -> TrimThreshold:
    """The exact threshold that keeps the `rank` largest magnitudes of `delta`."""
    check_tensors([delta])
    if rank in (0, delta.numel()):
        return KEEP_ALL if rank else KEEP_NONE
    coarse_bin, above = select_bin(coarse_histogram(delta), rank)
    return threshold_from(coarse_bin, fine_histogram(delta, coarse_bin << 16), rank - above)


def count_ties(delta: Tensor, threshold: TrimThreshold) -> int:
    """Number of entries whose magnitude equals the threshold."""
    return int((magnitude_bits(delta) == threshold.bits).count_nonzero())


def count_equal(delta: Tensor, cut: Cut) -> tuple[int, int]:
    """Number of entries whose magnitude equals the cut's lower bound, and its upper one."""
    bits = magnitude_bits(delta)
    lower, upper = ((bits == bound).count_nonzero() for bound in (cut.lower, cut.upper))
    return int(lower), int(upper)


def cut_mask(delta: Tensor, cut: Cut, seen: tuple[int, int] = (0, 0)) -> Tensor:
    """Which entries a cut keeps.

    Args:
        delta: some rows of a task vector, float32, in flat order.
        cut: from all rows of it.
        seen: entries equal to the lower bound, and to the upper one, in the rows before these.

    Returns:
        Same shape, bool.
    """
    bits = magnitude_bits(delta)
    equal = bits == cut.lower
    above = (bits > cut.lower) | _from_to(equal, cut.first - seen[0], cut.stop - seen[0])
    if cut.upper == NO_MAGNITUDE:
        return above
    equal = bits == cut.upper
    return above & ((bits < cut.upper) | _from_to(equal, 0, cut.until - seen[1]))


def cut_apply(delta: Tensor, cut: Cut, seen: tuple[int, int] = (0, 0)) -> Tensor:
    """Zero the entries that a cut does not keep; arguments as `cut_mask`.

    Returns:
        Same shape, float32; kept entries unchanged, the others 0.
    """
    return select(cut_mask(delta, cut, seen), delta)


def _from_to(mask: Tensor, first: int, stop: int) -> Tensor:
    """Of the places where a mask is true, those from number `first` up to number `stop`."""
    if first <= 0 and stop >= int(mask.count_nonzero()):
        return mask
    number = mask.flatten().cumsum(0).view_as(mask) - 1
    return mask & (number >= first) & (number < stop)


def trim_apply(delta: Tensor, threshold: TrimThreshold, ties_before: int = 0) -> Tensor:
    """Zero the entries below a threshold.

    Args:
        delta: some rows of a task vector, float32, in flat order.
        threshold: from all rows of it.
        ties_before: entries equal to the threshold in the rows before these.

    Returns:
        Same shape, float32; kept entries unchanged, the others 0.
    """
    return cut_apply(delta, trim_cut(threshold), (ties_before, 0))


def trim(delta: Tensor, density: float, *, rule: KRule = "floor", all_ties: bool = False) -> Tensor:
    """Keep the entries of `delta` with the largest magnitudes, zero the rest.

    Args:
        delta: task vector, float32, finite, any shape.
        density: share kept, in [0, 1].
        rule: how many entries that is; see `kept_count`.
        all_ties: keep every entry equal to the smallest kept one (as the authors' code does),
            instead of exactly so many, lowest flat index first (mergekit and PEFT leave that to
            their sort).

    Returns:
        Same shape, float32.

    Raises:
        ValueError: `density` is outside [0, 1] or `delta` is not float32.

    Source: TIES, arXiv:2306.01708, step "trim".

    >>> trim(torch.tensor([4.0, -1.0, 3.0, 0.5, -2.0]), 0.6)
    tensor([ 4.,  0.,  3.,  0., -2.])
    """
    threshold = trim_threshold(delta, density, rule)
    if all_ties and threshold.ties:
        threshold = TrimThreshold(threshold.bits, count_ties(delta, threshold))
    return trim_apply(delta, threshold)


def trim_rows(
    delta: Tensor, density: float, *, rule: KRule = "floor", all_ties: bool = False
) -> Tensor:
    """`trim` of every row on its own: `kept_count(density, row length)` entries are kept in each.

    Args:
        delta: task vector, float32, finite. A row is one entry of the first axis; a vector or a
            number is one row.
        density, rule, all_ties: as `trim`.

    Returns:
        Same shape, float32.

    >>> trim_rows(torch.tensor([[4.0, -1.0], [0.5, 0.5]]), 0.5)
    tensor([[4.0000, 0.0000],
            [0.5000, 0.0000]])
    """
    check_tensors([delta])
    length = rows_of(delta).shape[1]
    window = Window(kept_count(density, length, rule), 0)
    return keep_window_of_rows(delta, window, all_ties=all_ties)


def keep_window_of_rows(
    delta: Tensor, window: Window, *, last_first: bool = False, all_ties: bool = False
) -> Tensor:
    """Keep `window.kept` entries of every row, below the `window.removed` largest.

    Args:
        delta: task vector, float32, finite.
        window: two counts, together at most the length of a row.
        last_first: of equal magnitudes the last ones count as larger; else the first ones.
        all_ties: keep all entries equal to the smallest that is kept.

    Returns:
        Same shape, float32.
    """
    rows = rows_of(delta)
    if window.kept in (0, rows.shape[1]):
        return delta.clone() if window.kept else torch.zeros_like(delta)
    bits = magnitude_bits(rows)
    if last_first:
        order = bits.argsort(dim=1, stable=True).flip(1)
    else:
        order = bits.argsort(dim=1, descending=True, stable=True)
    chosen = order[:, window.removed : window.removed + window.kept]
    keep = torch.zeros_like(bits, dtype=torch.bool).scatter_(1, chosen, value=True)
    if all_ties:
        keep |= bits == bits.gather(1, chosen[:, -1:])
    return select(keep, rows).view_as(delta)


def trim_model(
    deltas: Sequence[Tensor], density: float, *, rule: KRule = "floor", all_ties: bool = False
) -> list[Tensor]:
    """`trim` of a whole model: the largest magnitudes of all its tensors together are kept.

    A tensor whose changes are all small can lose all of them. This is what the authors' code
    trims, with rule "paper" and `all_ties`.

    Args:
        deltas: task vectors of every tensor, float32, finite. Their order decides among equal
            magnitudes at the cut.
        density, rule, all_ties: as `trim`.

    Returns:
        The trimmed task vectors, in that order.

    >>> trim_model([torch.tensor([0.1, 0.2]), torch.tensor([3.0, -4.0])], 0.5)
    [tensor([0., 0.]), tensor([ 3., -4.])]
    """
    sizes = [delta.numel() for delta in deltas]
    flat = torch.cat([delta.flatten() for delta in deltas])
    trimmed = trim(flat, density, rule=rule, all_ties=all_ties)
    parts = torch.split(trimmed, sizes)
    return [part.view_as(delta) for part, delta in zip(parts, deltas, strict=True)]


def elect_sign(
    deltas: Sequence[Tensor] | Tensor, *, method: ElectMethod = "mass", zero: float = 1.0
) -> Tensor:
    """Majority sign of every parameter.

    Args:
        deltas: task vectors that vote, a sequence of tensors of one shape or a stack
            (models, *shape); float32, finite. The paper's are trimmed, mergekit's weighted too.
        method: each model votes with its magnitude ("mass"), or with 1 ("count").
        zero: the sign of a parameter whose votes sum to exactly zero: 1.0 as in mergekit and
            PEFT; the authors' code takes that of the whole model (`majority`).

    Returns:
        Shape (*shape), float32, entries -1.0 or 1.0, or `zero`. Sums run in float32 in the order
        of the models.

    Raises:
        ValueError: no deltas, not float32, or of several shapes.

    Source: TIES, arXiv:2306.01708, step "elect". One big change outvotes two small ones:

    >>> elect_sign(torch.tensor([[5.0, -1.0], [-1.0, -1.0], [-1.0, 0.0]]))
    tensor([ 1., -1.])
    """
    check_choice("method", method, ELECT_METHODS)
    votes = list(deltas)
    check_tensors(votes)
    total = torch.zeros_like(votes[0])
    for vote in votes:
        total += vote if method == "mass" else vote.sign()
    return torch.where(total == 0, zero, total.sign())


def majority(signs: Sequence[Tensor]) -> float:
    """Sign of a whole model: that of the sum of its parameters' signs; 0.0 where they balance.

    With 0.0, entries whose votes balance are left out; the authors' code then takes the negative
    ones.

    Args:
        signs: of every tensor, from `elect_sign` with `zero` 0.0.

    >>> majority([torch.tensor([1.0, -1.0, 0.0]), torch.tensor([-1.0])])
    -1.0
    """
    total = sum(int(sign.sum(dtype=torch.float64)) for sign in signs)
    return float((total > 0) - (total < 0))


def count_conflicts(deltas: Sequence[Tensor], thresholds: Sequence[int]) -> list[tuple[int, int]]:
    """How often models pull an entry in opposite directions.

    Args:
        deltas: some rows of the task vectors, float32.
        thresholds: bits of a magnitude for each; changes up to it do not count. 0 counts all.

    Returns:
        For each of `gram_utils.gram_pairs`, entries that both models change, and those they
        change in opposite directions; last, entries that any model changes, and those that some
        models raise and others lower.

    >>> count_conflicts([torch.tensor([1.0, -2.0, 0.0]), torch.tensor([3.0, 1.0, 0.0])], [0, 0])
    [(2, 0), (2, 1), (2, 0), (2, 1)]
    """
    check_tensors(deltas)
    signs = [
        select(magnitude_bits(delta) > threshold, delta).sign()
        for delta, threshold in zip(deltas, thresholds, strict=True)
    ]
    products = [signs[i] * signs[j] for i, j in gram_pairs(len(signs))]
    counts = [(int(x.count_nonzero()), int((x < 0).count_nonzero())) for x in products]
    raised, lowered = (torch.stack([s == way for s in signs]).any(dim=0) for way in (1, -1))
    return [*counts, (int((raised | lowered).sum()), int((raised & lowered).sum()))]


def disjoint_mean(
    deltas: Sequence[Tensor] | Tensor,
    signs: Tensor,
    weights: Sequence[float],
    *,
    denominator: Denominator = "weight",
    votes: Sequence[Tensor] | None = None,
) -> Tensor:
    """Mean over the models whose entry has the elected sign; the others are left out.

    `sum(m_i * z_i) / sum(m_i * w_i)` with `m_i = 1` where model i voted for the elected sign. An
    entry that is 0 (trimmed) never counts. Where no model agrees, the result is 0.

    Args:
        deltas: task vectors already multiplied by their weights (z_i), a sequence or a stack.
        signs: -1.0 or 1.0 per parameter, from `elect_sign`.
        weights: one per model.
        denominator: the summed weights of those who agree ("weight", as in mergekit), their
            number ("count": the paper and PEFT), or nothing ("none": the sum).
        votes: what the models voted with, where that is not `deltas`.

    Returns:
        Shape of one delta, float32. Where the agreeing weights sum to exactly 0, the sum.

    Raises:
        ValueError: counts, shapes or dtypes do not fit.

    Source: TIES, arXiv:2306.01708, step "disjoint merge"; weights as in mergekit 0.1.5.

    >>> disjoint_mean(torch.tensor([[4.0], [2.0], [-1.0]]), torch.tensor([1.0]), [1.0, 1.0, 1.0])
    tensor([3.])
    """
    deltas = list(deltas)
    votes = deltas if votes is None else votes
    check_choice("denominator", denominator, DENOMINATORS)
    check_count("weights", weights, len(deltas))
    check_weights(weights)
    check_tensors([*deltas, *votes], signs)
    total, divisor = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, vote, weight in zip(deltas, votes, weights, strict=True):
        agrees = vote * signs > 0
        total += select(agrees, delta)
        if denominator != "none":
            divisor += agrees.float() * (weight if denominator == "weight" else 1.0)
    return total if denominator == "none" else total / torch.where(divisor == 0, 1.0, divisor)


def elect_and_merge(
    base: Tensor,
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    lam: float = 1.0,
    *,
    denominator: Denominator = "weight",
    elect_on: ElectOn = "weighted",
    elect_method: ElectMethod = "mass",
    zero: float = 1.0,
) -> Tensor:
    """Add sparse task vectors to the base: weight, elect, disjoint merge, scale by `lam`.

    Args:
        base: float32.
        deltas: trimmed (TIES) or dropped (DARE) task vectors, float32, shape of `base`.
        weights, lam: as in `ties`.
        denominator: see `disjoint_mean`.
        elect_on: models vote with their "weighted" task vectors (mergekit), or "unweighted" (the
            paper, PEFT).
        elect_method, zero: see `elect_sign`.
    """
    return add_task_vector(
        base,
        elect_and_combine(
            deltas,
            weights,
            denominator=denominator,
            elect_on=elect_on,
            elect_method=elect_method,
            zero=zero,
        ),
        lam,
    )


def elect_and_combine(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    denominator: Denominator = "weight",
    elect_on: ElectOn = "weighted",
    elect_method: ElectMethod = "mass",
    zero: float = 1.0,
) -> Tensor:
    """The merged task vector of `elect_and_merge`, before it is scaled and added."""
    check_choice("elect_on", elect_on, ELECT_ON)
    check_count("weights", weights, len(deltas))
    weighted = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    votes = weighted if elect_on == "weighted" else list(deltas)
    signs = elect_sign(votes, method=elect_method, zero=zero)
    return disjoint_mean(weighted, signs, weights, denominator=denominator, votes=votes)


def ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    lam: float = 1.0,
    normalize: bool = True,
    denominator: Denominator | None = None,
    trim_scope: Literal["tensor", "row"] = "tensor",
    trim_ties: TrimTies = "index",
    k_rule: KRule = "floor",
    elect_on: ElectOn = "weighted",
    elect_method: ElectMethod = "mass",
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
        denominator: what to divide by instead; see `disjoint_mean`.
        trim_scope: trim the tensor as a whole or every row of it. For the whole model, trim its
            task vectors with `trim_model` and give them to `elect_and_merge`.
        trim_ties: of equal magnitudes at the cut keep the first ones, or all.
        k_rule: how many a density keeps; see `kept_count`.
        elect_on, elect_method: see `elect_and_merge`.

    Returns:
        Same shape, float32.

    Raises:
        ValueError: counts, shapes, dtypes or ranges do not fit; negative weights with
            `normalize`.

    Source: TIES, arXiv:2306.01708; the defaults are those of mergekit 0.1.5.

    >>> base, one = torch.zeros(5), torch.tensor([4.0, -1.0, 3.0, 0.5, -2.0])
    >>> two = torch.tensor([-1.0, 2.0, -3.0, 1.0, -4.0])
    >>> ties(base, [one, two], [1.0, 1.0], [0.6, 0.6])
    tensor([ 4.,  2.,  3.,  0., -3.])
    """
    check_tensors(tensors, base)
    check_count("densities", densities, len(tensors))
    check_ties_weights(weights, normalize=normalize and denominator is None)
    check_choice("trim_scope", trim_scope, ("tensor", "row"))
    check_choice("trim_ties", trim_ties, TRIM_TIES)
    trim_one = trim if trim_scope == "tensor" else trim_rows
    trimmed = [
        trim_one(tensor - base, density, rule=k_rule, all_ties=trim_ties == "all")
        for tensor, density in zip(tensors, densities, strict=True)
    ]
    return elect_and_merge(
        base,
        trimmed,
        weights,
        lam,
        denominator=denominator or ("weight" if normalize else "none"),
        elect_on=elect_on,
        elect_method=elect_method,
    )


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
