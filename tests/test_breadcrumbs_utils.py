import math

import pytest
import reference_task_vectors as reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import assert_near, assume_clear, families, total

from breadcrumbs_utils import (
    breadcrumbs,
    breadcrumbs_ties,
    crumbs_cut,
    keep_middle,
    keep_middle_of_rows,
)
from linear_utils import task_arithmetic
from scalar_utils import Cut, window_counts
from ties_utils import count_equal, cut_apply, trim

TENTHS = torch.tensor([0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8, 0.9, -1])
SHARES = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
GAMMAS = st.one_of(st.sampled_from([0.0, 0.01, 0.5]), st.floats(0, 0.99))


def kept(tensor):
    """Indices of entries that are not 0."""
    return tensor.nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("density", "gamma", "expected"),
    [(0.6, 0.2, range(2, 8)), (0.9, 0.3, range(9)), (0.6, 0, range(4, 10)), (1, 0.3, range(10))],
)
def test_golden_g10(density, gamma, expected):
    middle = keep_middle(TENTHS, density, gamma)
    assert kept(middle) == list(expected)
    assert torch.equal(middle[middle != 0], TENTHS[middle != 0])
    assert torch.equal(keep_middle_of_rows(TENTHS, density, gamma), middle)


def test_where_both_shares_do_not_fit_fewer_are_removed_or_fewer_kept():
    assert kept(keep_middle(TENTHS, 0.9, 0.3)) == list(range(9))
    assert kept(keep_middle(TENTHS, 0.9, 0.3, shrink=False)) == list(range(7))
    assert kept(keep_middle_of_rows(TENTHS, 0.9, 0.3, shrink=False)) == list(range(7))
    assert kept(keep_middle(TENTHS, 1, 0.3, shrink=False)) == list(range(7))


def test_shares_are_cut_off_and_can_be_nothing():
    assert window_counts(0.29, 0.1, 100) == (28, 10)
    assert window_counts(0.1, 0.1, 3) == (0, 0)
    assert not keep_middle(TENTHS[:3], 0.3, 0.3).any()
    assert not keep_middle(TENTHS, 0, 0.5).any()


def test_of_equal_changes_the_last_count_as_larger():
    delta = torch.tensor([1.0, -1.0, 1.0, 2.0, -2.0, 2.0])
    assert kept(keep_middle(delta, 0.5, 1 / 3)) == [1, 2, 3]
    assert kept(keep_middle(torch.ones(5), 0.4, 0.2)) == [2, 3]
    assert kept(keep_middle_of_rows(torch.ones(5), 0.4, 0.2)) == [2, 3]


@given(families(max_models=1), SHARES, GAMMAS, st.booleans())
def test_exactly_the_wanted_entries_of_the_reference_are_kept(family, density, gamma, shrink):
    (delta,) = family.deltas
    options = (density, gamma, shrink)
    middle = keep_middle(delta, density, gamma, shrink=shrink)
    expected = reference.keep_middle(delta.numpy(), *options)
    assert torch.equal(middle, torch.from_numpy(expected).float())
    rows = keep_middle_of_rows(delta, density, gamma, shrink=shrink)
    expected = reference.by_rows(reference.keep_middle, delta.numpy(), *options)
    assert torch.equal(rows, torch.from_numpy(expected).float())


@given(st.permutations(range(1, 31)), SHARES, GAMMAS, st.booleans())
def test_kept_ranks_are_a_window_of_the_wanted_size(order, density, gamma, shrink):
    ranks = torch.tensor(order, dtype=torch.float32)
    window = window_counts(density, gamma, 30, shrink=shrink)
    left = sorted(x for x in keep_middle(ranks, density, gamma, shrink=shrink).tolist() if x)
    top = 30 - window.removed
    assert left == list(range(top - window.kept + 1, top + 1))


@given(families(max_models=1), st.floats(0.1, 1))
def test_without_removal_breadcrumbs_keep_what_trim_keeps(family, density):
    (delta,) = family.deltas
    count = int(density * delta.numel())
    largest_first = delta.abs().flatten().sort(descending=True).values.tolist()
    assume(count and largest_first[count - 1] not in largest_first[count:])
    assert torch.equal(keep_middle(delta, density, 0), trim(delta, density))


@given(families(max_models=1), SHARES, GAMMAS, st.integers(1, 9))
def test_a_tensor_in_pieces_is_cut_as_the_whole(family, density, gamma, step):
    delta = family.deltas[0].flatten()
    cut = crumbs_cut(delta, window_counts(density, gamma, delta.numel()))
    pieces, seen = [], (0, 0)
    for start in range(0, len(delta), step):
        piece = delta[start : start + step]
        pieces.append(cut_apply(piece, cut, seen))
        lower, upper = count_equal(piece, cut)
        seen = (seen[0] + lower, seen[1] + upper)
    assert torch.equal(torch.cat(pieces), keep_middle(delta, density, gamma))


def test_a_cut_knows_its_bounds_and_the_ties_at_them():
    delta = torch.tensor([1.0, -1.0, 1.0, 2.0, -2.0, 2.0])
    one, two = 0x3F800000, 0x40000000
    assert crumbs_cut(delta, window_counts(0.5, 1 / 3, 6)) == Cut(one, 1, 3, two, 1)


@pytest.mark.parametrize("trim_scope", ["tensor", "row"])
@pytest.mark.parametrize("elect", [False, True])
@given(families(), st.floats(0.3, 1), st.floats(0, 0.4), st.booleans(), st.booleans())
@settings(max_examples=30)
def test_agrees_with_the_reference(trim_scope, elect, family, density, gamma, shrink, normalize):
    count = len(family.models)
    shares = ([density] * count, [gamma] * count)
    options = {"lam": 0.8, "trim_scope": trim_scope, "shrink": shrink}
    keep = keep_middle if trim_scope == "tensor" else keep_middle_of_rows
    middles = [keep(delta, density, gamma, shrink=shrink) for delta in family.deltas]
    array, arrays = family.arrays
    expected = reference.breadcrumbs(
        array, arrays, family.weights, *shares, elect=elect, normalize=normalize, **options
    )
    if elect:
        assume_clear(w * middle for w, middle in zip(family.weights, middles, strict=True))
        divide = {"denominator": "weight" if normalize else "none"}
        merged = breadcrumbs_ties(
            family.base, family.models, family.weights, *shares, **options, **divide
        )
    else:
        merged = breadcrumbs(
            family.base, family.models, family.weights, *shares, normalize=normalize, **options
        )
    divisor = min(family.weights) if normalize else 1
    assert_near(merged, expected, family.base.abs() + 2 * total(middles, family.weights) / divisor)


def test_everything_kept_is_task_arithmetic():
    base, one, two = torch.ones(10), TENTHS, TENTHS.flip(0)
    shares = ([1, 1], [0.3, 0.3])
    for scope in ("tensor", "row"):
        merged = breadcrumbs(base, [one, two], [0.5, 2], *shares, lam=0.7, trim_scope=scope)
        assert torch.equal(merged, task_arithmetic(base, [one, two], [0.5, 2], lam=0.7))


def test_nothing_kept_is_the_base():
    base = torch.full((10,), 0.3)
    assert torch.equal(breadcrumbs(base, [TENTHS], [1], [0], [0.1]), base)
    assert torch.equal(breadcrumbs_ties(base, [TENTHS], [1], [0], [0.1]), base)
    assert torch.equal(breadcrumbs(base, [base, base], [1, 1], [0.5] * 2, [0.1] * 2), base)


def test_one_entry_is_kept_by_density_one_alone():
    zero, one = torch.zeros(1), torch.ones(1)
    assert breadcrumbs(zero, [one], [1], [1], [0.5]).tolist() == [1]
    assert breadcrumbs(zero, [one], [1], [0.9], [0.5]).tolist() == [0]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: keep_middle(x, 1.1), r"densities must be in \[0, 1\] .* got 1.1"),
        (lambda x: keep_middle(x, math.nan), r"densities must be in \[0, 1\] .* got nan"),
        (lambda x: keep_middle(x, 0.5, 1), r"gammas must be in \[0, 1\) .* got 1"),
        (lambda x: keep_middle_of_rows(x, 0.5, -0.1), r"gammas must be in \[0, 1\) .* got -0.1"),
        (lambda x: keep_middle(x, 0.5, math.nan), r"gammas must be in \[0, 1\) .* got nan"),
        (lambda x: keep_middle(x.half(), 0.5), "must be float32, got torch.float16"),
        (lambda x: breadcrumbs(x, [x], [1], [1, 1], [0]), "densities must have one entry per"),
        (lambda x: breadcrumbs(x, [x], [1], [1], []), "gammas must have one entry per model"),
        (lambda x: breadcrumbs(x, [x], [1, 1], [1], [0]), "weights must have one entry per"),
        (lambda x: breadcrumbs_ties(x, [x], [1, 1], [1], [0]), "weights must have one entry per"),
        (
            lambda x: breadcrumbs(x, [x], [1], [1], [0], trim_scope="model"),
            "trim_scope must be one of tensor, row, got 'model'",
        ),
        (
            lambda x: breadcrumbs(x, [x, x], [1, -1], [1] * 2, [0] * 2, normalize=True),
            "cannot be normalized",
        ),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call(torch.ones(2))
