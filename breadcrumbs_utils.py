"""Breadcrumbs: keep the middle of each task vector, without its largest and its smallest changes.

Pure tensor math. Which entries are kept follows from two exact thresholds, as in TIES' trim, so a
large tensor is never sorted. Source: Model Breadcrumbs, arXiv:2312.06795, section 3; defaults as
in mergekit 0.1.5, which calls the paper's beta gamma.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from linear_utils import add_task_vector, combine_deltas
from scalar_utils import (
    Cut,
    Denominator,
    ElectMethod,
    ElectOn,
    Window,
    check_choice,
    check_count,
    window_counts,
    window_cut,
)
from tensor_utils import check_tensors, rows_of
from ties_utils import (
    count_equal,
    cut_apply,
    elect_and_merge,
    keep_window_of_rows,
    rank_threshold,
)


def crumbs_cut(delta: Tensor, window: Window) -> Cut:
    """The exact bounds between which `window.kept` entries lie, below `window.removed` larger ones.

    Args:
        delta: task vector, float32, finite, any shape.
        window: from `window_counts`.
    """
    lower = rank_threshold(delta, window.kept + window.removed)
    upper = rank_threshold(delta, window.removed)
    tied = count_equal(delta, Cut(lower.bits, 0, 0, upper.bits, 0))
    return window_cut(lower, tied[0], upper, tied[1])


def keep_middle(
    delta: Tensor, density: float, gamma: float = 0.01, *, shrink: bool = True
) -> Tensor:
    """Keep `int(density * n)` entries of a task vector, below its `int(gamma * n)` largest.

    Args:
        delta: float32, finite, any shape.
        density: share kept, in [0, 1]; with `shrink`, 1 keeps everything, whatever gamma is.
        gamma: share of the largest magnitudes that is removed, in [0, 1).
        shrink: see `scalar_utils.window_counts`.

    Returns:
        Same shape, float32. Of equal magnitudes the later ones count as larger.

    Raises:
        ValueError: a share is out of range or `delta` is not float32.

    >>> import torch
    >>> keep_middle(torch.tensor([0.1, -0.2, 0.3, -0.4, 0.5]), 0.4, 0.2)
    tensor([ 0.0000,  0.0000,  0.3000, -0.4000,  0.0000])
    """
    check_tensors([delta])
    window = window_counts(density, gamma, delta.numel(), shrink=shrink)
    return cut_apply(delta, crumbs_cut(delta, window))


def keep_middle_of_rows(
    delta: Tensor, density: float, gamma: float = 0.01, *, shrink: bool = True
) -> Tensor:
    """`keep_middle` of every row; a row is one entry of the first axis, a vector is one row.

    >>> import torch
    >>> keep_middle_of_rows(torch.tensor([[1.0, 3.0, 2.0], [-4.0, 6.0, 5.0]]), 0.4, 0.4)
    tensor([[0., 0., 2.],
            [0., 0., 5.]])
    """
    check_tensors([delta])
    window = window_counts(density, gamma, rows_of(delta).shape[1], shrink=shrink)
    return keep_window_of_rows(delta, window, last_first=True)


def breadcrumbs(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    gammas: Sequence[float],
    *,
    lam: float = 1.0,
    normalize: bool = False,
    trim_scope: Literal["tensor", "row"] = "tensor",
    shrink: bool = True,
) -> Tensor:
    """Task arithmetic on the middle of each task vector.

    Args:
        base: the common ancestor, float32, finite.
        tensors: the fine-tuned models, float32, finite, same shape.
        weights: one finite number per model.
        densities: share of each task vector kept, in [0, 1].
        gammas: share of its largest magnitudes removed, in [0, 1).
        lam: scale of the merged task vector.
        normalize: divide by the sum of the weights.
        trim_scope: shares of the tensor (mergekit), or of each of its rows (the authors' code).
        shrink: see `scalar_utils.window_counts`.

    Returns:
        Same shape, float32.

    Raises:
        ValueError: counts, shapes, dtypes or ranges do not fit.

    >>> import torch
    >>> base, one = torch.zeros(4), torch.tensor([1.0, -2.0, 3.0, 9.0])
    >>> breadcrumbs(base, [one], [1.0], [0.5], [0.25])
    tensor([ 0., -2.,  3.,  0.])
    """
    deltas = _middles(base, tensors, densities, gammas, trim_scope, shrink)
    return add_task_vector(base, combine_deltas(deltas, weights, normalize=normalize), lam)


def breadcrumbs_ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    gammas: Sequence[float],
    *,
    lam: float = 1.0,
    denominator: Denominator = "none",
    elect_on: ElectOn = "weighted",
    elect_method: ElectMethod = "mass",
    trim_scope: Literal["tensor", "row"] = "tensor",
    shrink: bool = True,
) -> Tensor:
    """TIES' sign election and disjoint merge on the middle of each task vector.

    Arguments, result and errors as `breadcrumbs` and `ties_utils.elect_and_merge`.
    """
    deltas = _middles(base, tensors, densities, gammas, trim_scope, shrink)
    return elect_and_merge(
        base,
        deltas,
        weights,
        lam,
        denominator=denominator,
        elect_on=elect_on,
        elect_method=elect_method,
    )


def _middles(
    base: Tensor,
    tensors: Sequence[Tensor],
    densities: Sequence[float],
    gammas: Sequence[float],
    trim_scope: Literal["tensor", "row"],
    shrink: bool,
) -> list[Tensor]:
    check_tensors(tensors, base)
    check_count("densities", densities, len(tensors))
    check_count("gammas", gammas, len(tensors))
    check_choice("trim_scope", trim_scope, ("tensor", "row"))
    keep = keep_middle if trim_scope == "tensor" else keep_middle_of_rows
    return [
        keep(tensor - base, density, gamma, shrink=shrink)
        for tensor, density, gamma in zip(tensors, densities, gammas, strict=True)
    ]
