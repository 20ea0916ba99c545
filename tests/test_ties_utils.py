import math

import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import (
    assert_near,
    assume_clear,
    families,
    models_with_weights,
    tensor_lists,
    total,
)

from scalar_utils import DENOMINATORS, ELECT_METHODS, ELECT_ON, K_RULES, Cut
from ties_utils import (
    KEEP_ALL,
    KEEP_NONE,
    TIES,
    TrimThreshold,
    count_equal,
    count_ties,
    cut_apply,
    cut_mask,
    disjoint_mean,
    elect_and_merge,
    elect_sign,
    kept_count,
    majority,
    ties,
    trim,
    trim_apply,
    trim_model,
    trim_rows,
    trim_threshold,
)

A = torch.tensor([4, -1, 3, 0.5, -2])
B = torch.tensor([-1, 2, -3, 1, -4.0])
ZERO = torch.zeros(5)
PAPER = {
    "k_rule": "paper",
    "trim_ties": "all",
    "elect_on": "unweighted",
    "denominator": "count",
}


@pytest.mark.parametrize(
    ("weights", "options", "expected"),
    [
        ([1, 1], {}, [4, 2, 3, 0, -3]),
        ([1, 1], {"normalize": False}, [4, 2, 3, 0, -6]),
        ([2, 1], {}, [4, 2, 3, 0, -8 / 3]),
        ([2, 1], {"normalize": False}, [8, 2, 6, 0, -8]),
        ([1, 1], {"lam": 0.5}, [2, 1, 1.5, 0, -1.5]),
    ],
)
def test_golden_g8_trimmed_to_three(weights, options, expected):
    merged = ties(ZERO, [A, B], weights, [0.6, 0.6], **options)
    torch.testing.assert_close(merged, torch.tensor(expected, dtype=torch.float32))


def test_golden_g8_steps():
    assert trim(A, 0.6).tolist() == [4, 0, 3, 0, -2]
    assert trim(B, 0.6).tolist() == [0, 2, -3, 0, -4]
    assert elect_sign([trim(A, 0.6), trim(B, 0.6)]).tolist() == [1, 1, 1, 1, -1]


def test_golden_g8_without_trim():
    assert ties(ZERO, [A, B], [1, 1], [1, 1]).tolist() == [4, 2, 3, 0.75, -3]


def test_golden_g8_votes_go_by_mass_and_are_weighted():
    models = [torch.tensor(x) for x in ([3.0, 1.0], [-1.0, 1.0], [-1.0, -3.0])]
    assert ties(torch.zeros(2), models, [1] * 3, [1] * 3).tolist() == [3, -3]
    pair = [torch.tensor([3.0]), torch.tensor([-2.0])]
    assert ties(torch.zeros(1), pair, [1, 2], [1, 1]).tolist() == [-2]


def test_golden_g8_one_negative_weight():
    zero, model = torch.zeros(2), [torch.tensor([3.0, 1.0])]
    assert ties(zero, model, [-1], [1], normalize=False).tolist() == [-3, -1]
    assert ties(zero, model, [-1], [1], denominator="count").tolist() == [-3, -1]
    assert ties(zero, model, [-1], [1], denominator="weight").tolist() == [3, 1]


def test_golden_g8_weights_of_both_signs():
    models = [torch.tensor([3.0]), torch.tensor([-1.0])]
    assert ties(torch.zeros(1), models, [1, -1], [1, 1], denominator="weight").tolist() == [4]


@pytest.mark.parametrize(
    ("weights", "denominator", "expected"),
    [
        ([1, 1], "count", [4, 2, 3, 0, -3]),
        ([1, 1], "none", [4, 2, 3, 0, -6]),
        ([2, 1], "count", [8, 2, 6, 0, -4]),
        ([2, 1], "none", [8, 2, 6, 0, -8]),
        ([2, 1], "weight", [4, 2, 3, 0, -8 / 3]),
    ],
)
def test_golden_g8_denominators_with_votes_as_in_peft(weights, denominator, expected):
    options = {"denominator": denominator, "elect_on": "unweighted", "normalize": False}
    merged = ties(ZERO, [A, B], weights, [0.6, 0.6], **options)
    torch.testing.assert_close(merged, torch.tensor(expected, dtype=torch.float32))


def test_golden_g8_as_in_the_paper():
    assert trim(A, 0.6, rule="paper", all_ties=True).tolist() == [4, -1, 3, 0, -2]
    assert trim(B, 0.6, rule="paper", all_ties=True).tolist() == B.tolist()
    assert ties(ZERO, [A, B], [1, 1], [0.6, 0.6], **PAPER).tolist() == [4, 2, 3, 1, -3]
    summed = {**PAPER, "denominator": "none"}
    assert ties(ZERO, [A, B], [1, 1], [0.6, 0.6], **summed).tolist() == [4, 2, 3, 1, -6]


@pytest.mark.parametrize(("method", "expected"), [("mass", [3, -3]), ("count", [-1, 1])])
def test_golden_g8_votes_by_mass_or_by_head(method, expected):
    models = [torch.tensor(x) for x in ([3.0, 1.0], [-1.0, 1.0], [-1.0, -3.0])]
    merged = ties(torch.zeros(2), models, [1] * 3, [1] * 3, elect_method=method)
    assert merged.tolist() == expected


@pytest.mark.parametrize(("elect_on", "expected"), [("weighted", [-2]), ("unweighted", [3])])
def test_golden_g8_votes_weighted_or_not(elect_on, expected):
    pair = [torch.tensor([3.0]), torch.tensor([-2.0])]
    merged = ties(torch.zeros(1), pair, [1, 2], [1, 1], elect_on=elect_on)
    assert merged.tolist() == expected


def test_golden_g11_threshold_with_ties():
    delta = torch.tensor([1, -1, 0.5, 1, -2, 0, 1])
    assert trim_threshold(delta, 3 / 7) == TrimThreshold(0x3F800000, 2)
    assert trim(delta, 3 / 7).nonzero().flatten().tolist() == [0, 1, 4]
    assert count_ties(delta, TrimThreshold(0x3F800000, 2)) == 4


@pytest.mark.parametrize(
    ("density", "numel", "kept"),
    [(0.29, 100, 28), (0.1, 3, 1), (0, 3, 0), (1, 3, 3), (1e-9, 10, 1), (0.5, 0, 0), (1, 0, 0)],
)
def test_golden_g11_kept_count(density, numel, kept):
    assert kept_count(density, numel) == kept


@pytest.mark.parametrize(("elect_on", "expected"), [("weighted", 3), ("unweighted", 1)])
def test_a_model_that_is_subtracted_agrees_by_what_it_voted_with(elect_on, expected):
    models, options = [[3.0], [2.0]], {"denominator": "none", "elect_on": elect_on}
    merged = ties(torch.zeros(1), [torch.tensor(x) for x in models], [1, -1], [1, 1], **options)
    assert merged.tolist() == [expected]
    assert reference.ties([0], models, [1, -1], [1, 1], **options).tolist() == [expected]


@pytest.mark.parametrize(
    ("rule", "kept"), [("floor", [0, 1, 1, 28, 3]), ("peft", [0, 0, 1, 28, 3]),
                       ("paper", [0, 1, 2, 29, 3])],
)  # fmt: skip
def test_how_many_are_kept_goes_by_a_rule(rule, kept):
    cases = [(0, 3), (0.1, 3), (0.4, 3), (0.29, 100), (1, 3)]
    assert [kept_count(density, numel, rule) for density, numel in cases] == kept


def test_one_large_change_outvotes_two_small_ones():
    assert elect_sign(torch.tensor([[5.0], [-1.0], [-1.0]])).tolist() == [1.0]


def test_a_sum_of_exactly_zero_elects_plus():
    assert elect_sign([torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])]).tolist() == [1, 1]


def test_disjoint_mean_ignores_trimmed_entries_and_leaves_zero_where_none_agrees():
    deltas = torch.tensor([[2.0, 0.0], [0.0, 0.0], [6.0, -1.0]])
    assert disjoint_mean(deltas, torch.tensor([1.0, 1.0]), [1, 1, 1]).tolist() == [4, 0]


rounded = st.sampled_from([None, 2, 8])
"""Rounding to a grid makes many magnitudes equal, as in bfloat16 models."""


@given(tensor_lists(max_models=1), st.floats(0, 1), rounded)
def test_trim_keeps_exactly_as_many_as_the_reference_and_the_same_ones(models, density, grid):
    delta = models[0] if grid is None else (models[0] * grid).round() / grid
    expected = torch.from_numpy(reference.trim(delta.numpy(), density)).float()
    assert torch.equal(trim(delta, density), expected)
    kept = kept_count(density, delta.numel())
    zeros = int((delta == 0).sum())
    assert kept - zeros <= int((trim(delta, density) != 0).sum()) <= kept


@given(tensor_lists(max_models=1), st.floats(0, 1), st.floats(0, 1), rounded)
def test_a_larger_density_keeps_everything_that_a_smaller_one_keeps(models, one, two, grid):
    delta = models[0] if grid is None else (models[0] * grid).round() / grid
    few, many = (trim(delta, density) != 0 for density in sorted((one, two)))
    assert not (few & ~many).any()


@given(tensor_lists(max_models=1), st.floats(0.01, 0.99), st.integers(1, 9), rounded)
def test_trimming_in_pieces_is_trimming_the_whole(models, density, step, grid):
    delta = models[0].flatten()
    delta = delta if grid is None else (delta * grid).round() / grid
    threshold = trim_threshold(delta, density)
    pieces, before = [], 0
    for start in range(0, len(delta), step):
        piece = delta[start : start + step]
        pieces.append(trim_apply(piece, threshold, before))
        before += count_ties(piece, threshold)
    assert torch.equal(torch.cat(pieces), trim(delta, density))


def test_density_one_keeps_all_and_zero_none():
    assert trim_threshold(A, 1.0) == KEEP_ALL
    assert trim_threshold(A, 0.0) == KEEP_NONE
    assert torch.equal(trim(A, 1.0), A)
    assert not trim(A, 0.0).any()


@given(
    families(max_models=1), st.floats(0, 1), st.sampled_from(K_RULES), st.booleans()
)  # fmt: skip
def test_every_rule_and_scope_trims_as_the_reference(family, density, rule, all_ties):
    (delta,) = family.deltas
    options, wanted = {"rule": rule, "all_ties": all_ties}, (density, rule, all_ties)
    expected = reference.trim(delta.numpy(), *wanted)
    assert torch.equal(trim(delta, density, **options), torch.from_numpy(expected).float())
    expected = reference.by_rows(reference.trim, delta.numpy(), *wanted)
    assert torch.equal(trim_rows(delta, density, **options), torch.from_numpy(expected).float())
    tensors = [delta.flatten()[:1], delta, 2 * delta]
    expected = reference.trim_model([x.numpy() for x in tensors], *wanted)
    trimmed = trim_model(tensors, density, **options)
    for got, want in zip(trimmed, expected, strict=True):
        assert torch.equal(got, torch.from_numpy(want).float())


def test_all_equal_changes_at_the_cut_are_kept_or_the_first():
    delta = torch.tensor([[1, -1, 0.5], [1, -2, 0]])
    assert trim(delta, 0.5).tolist() == [[1, -1, 0], [0, -2, 0]]
    assert trim(delta, 0.5, all_ties=True).tolist() == [[1, -1, 0], [1, -2, 0]]
    assert trim_rows(delta, 0.4).tolist() == [[1, 0, 0], [0, -2, 0]]
    assert trim_rows(delta, 0.4, all_ties=True).tolist() == [[1, -1, 0], [0, -2, 0]]


def test_a_whole_model_can_trim_a_tensor_of_small_changes_away():
    small, large = torch.tensor([0.1, -0.2]), torch.tensor([[3.0, -4.0]])
    trimmed = trim_model([small, large], 0.5)
    assert [x.tolist() for x in trimmed] == [[0, 0], [[3, -4]]]


def test_a_cut_keeps_what_lies_between_its_bounds_and_some_that_equal_them():
    delta = torch.tensor([1.0, -1.0, 2.0, 1.0, 3.0, -3.0, 4.0, 0.5])
    one, three = 0x3F800000, 0x40400000
    cut = Cut(one, 1, 3, three, 1)
    assert cut_apply(delta, cut).tolist() == [0, -1, 2, 1, 3, 0, 0, 0]
    assert count_equal(delta, cut) == (3, 2)
    assert cut_mask(delta, Cut(one, 0, 0)).nonzero().flatten().tolist() == [2, 4, 5, 6]
    halves = [cut_apply(delta[:4], cut), cut_apply(delta[4:], cut, count_equal(delta[:4], cut))]
    assert torch.equal(torch.cat(halves), cut_apply(delta, cut))


@pytest.mark.parametrize(
    ("signs", "expected"), [([[1, -1, 0], [1]], 1), ([[0, -1]], -1), ([[1], [-1, 0]], 0)]
)
def test_the_majority_is_that_of_all_signs_of_a_model(signs, expected):
    signs = [torch.tensor(sign, dtype=torch.float32) for sign in signs]
    assert majority(signs) == expected
    assert reference.majority([sign.numpy() for sign in signs]) == expected


@pytest.mark.parametrize(("zero", "expected"), [(1.0, [3, 2]), (-1.0, [-3, 2]), (0.0, [0, 2])])
def test_votes_that_balance_go_to_the_given_sign_or_to_nobody(zero, expected):
    deltas = [torch.tensor([3.0, 2.0]), torch.tensor([-3.0, 0.0])]
    assert elect_sign(deltas, zero=zero).tolist() == [zero, 1]
    merged = elect_and_merge(torch.zeros(2), deltas, [1, 1], zero=zero)
    assert merged.tolist() == expected


@given(
    families(),
    st.floats(0.2, 1),
    st.sampled_from(DENOMINATORS),
    st.sampled_from(ELECT_ON),
    st.sampled_from(ELECT_METHODS),
    st.sampled_from([1.0, -1.0, 0.0]),
    st.sampled_from(["tensor", "row"]),
    st.sampled_from(K_RULES),
)
def test_every_switch_agrees_with_the_reference(
    family, density, denominator, elect_on, elect_method, zero, scope, rule
):
    densities = [density] * len(family.models)
    keep = trim if scope == "tensor" else trim_rows
    trimmed = [keep(delta, density, rule=rule, all_ties=True) for delta in family.deltas]
    weighted = [w * x for w, x in zip(family.weights, trimmed, strict=True)]
    assume_clear(weighted if elect_on == "weighted" else trimmed)
    elected = {"denominator": denominator, "elect_on": elect_on, "elect_method": elect_method}
    cut = {"trim_scope": scope, "trim_ties": "all", "k_rule": rule}
    array, arrays = family.arrays
    expected = reference.ties(
        array, arrays, family.weights, densities, 0.8, zero=zero, **elected, **cut
    )
    merged = elect_and_merge(family.base, trimmed, family.weights, 0.8, zero=zero, **elected)
    divisor = min(family.weights) if denominator == "weight" else 1
    terms = family.base.abs() + 2 * total(trimmed, family.weights) / divisor
    assert_near(merged, expected, terms)
    if zero == 1:
        whole = ties(
            family.base, family.models, family.weights, densities, lam=0.8, **elected, **cut
        )
        assert torch.equal(whole, merged)


@given(families(), st.floats(0.1, 1), st.sampled_from(["count", "none"]))
@settings(max_examples=50)
def test_without_division_by_weights_a_common_factor_scales_the_change(family, density, divide):
    densities, zero = [density] * len(family.models), torch.zeros_like(family.base)
    once, more = (
        ties(zero, family.deltas, [k * w for w in family.weights], densities, denominator=divide)
        for k in (1, 4)
    )
    assert torch.equal(more, 4 * once)


@given(models_with_weights(min_models=2), st.floats(0.1, 1), st.booleans())
@settings(max_examples=50)
def test_agrees_with_the_reference(case, density, normalize):
    (base, *models), weights = case
    weights = weights[1:]
    densities = [density] * len(models)
    got = ties(base, models, weights, densities, lam=0.8, normalize=normalize)
    arrays = [tensor.numpy() for tensor in (base, *models)]
    expected = torch.from_numpy(
        reference.ties(arrays[0], arrays[1:], weights, densities, lam=0.8, normalize=normalize)
    )
    trimmed = [w * trim(m - base, density) for w, m in zip(weights, models, strict=True)]
    mass = sum(t.double() for t in trimmed)
    magnitude = sum(t.double().abs() for t in trimmed)
    assume(not ((mass.abs() < 1e-5 * magnitude) & (magnitude > 0)).any())
    scale = magnitude / (min(weights) if normalize else 1) + base.abs()
    assert ((got - expected).abs() <= 16 * 2**-24 * scale).all()


@given(models_with_weights(min_models=2), st.floats(0.1, 1))
@settings(max_examples=50)
def test_the_result_stays_within_the_largest_change_and_on_the_kept_entries(case, density):
    (base, *models), weights = case
    weights, densities = weights[1:], [density] * len(models)
    trimmed = torch.stack([trim(m - base, density) for m in models])
    change = ties(base, models, weights, densities) - base
    assert (change.abs() <= trimmed.abs().amax(0) * (1 + 1e-6) + base.abs() * 2**-23).all()
    assert not change[(trimmed == 0).all(0)].any()


@given(models_with_weights(min_models=3), st.floats(0.1, 1))
@settings(max_examples=40)
def test_order_common_factor_scale_and_sign(case, density):
    (base, *models), weights = case
    weights, densities = weights[1:], [density] * len(models)
    zero = torch.zeros_like(base)
    deltas = [m - base for m in models]
    weighted = [w * trim(d, density) for w, d in zip(weights, deltas, strict=True)]
    mass, magnitude = sum(weighted), sum(w.abs() for w in weighted)
    assume(not ((mass.abs() < 1e-5 * magnitude) & (magnitude > 0)).any())
    merged = ties(zero, deltas, weights, densities)
    close = {"rtol": 1e-5, "atol": 1e-7}
    assert torch.allclose(ties(zero, deltas[::-1], weights[::-1], densities), merged, **close)
    assert torch.allclose(ties(zero, deltas, [4 * w for w in weights], densities), merged, **close)
    assert torch.equal(ties(zero, [4 * d for d in deltas], weights, densities), 4 * merged)
    assert torch.equal(ties(zero, [-d for d in deltas], weights, densities), -merged)


def test_one_model_whole_is_that_model():
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(7, 5, generator=generator)
    model = base + 0.01 * torch.randn(7, 5, generator=generator)
    merged = ties(base, [model], [0.3], [1.0])
    torch.testing.assert_close(merged, model, rtol=0, atol=2**-21)


def test_merging_a_model_with_itself_changes_only_what_trim_drops():
    delta = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ties(torch.zeros(6, 5), [delta] * 2, [1, 1], [0.4] * 2), trim(delta, 0.4))


def test_the_class_merges_parameters_of_any_float_dtype_and_leaves_them_alone():
    base = torch.nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
    models = [A.half(), B.double()]
    merged = TIES(lam=0.5).merge([1, 1], base, models, [0.6, 0.6], "cpu")
    assert merged.dtype == torch.float32
    assert not merged.requires_grad
    assert merged.tolist() == [2, 1, 1.5, 0, -1.5]
    assert models[0].tolist() == A.tolist()


def test_inputs_are_unchanged():
    base, one, two = ZERO.clone(), A.clone(), B.clone()
    ties(base, [one, two], [1, 2], [0.5, 1.0])
    assert (base.tolist(), one.tolist(), two.tolist()) == (ZERO.tolist(), A.tolist(), B.tolist())


@pytest.mark.parametrize("density", [-0.1, 1.01, 20.0, math.nan])
def test_density_outside_its_range_is_refused(density):
    with pytest.raises(ValueError, match=r"densities must be in \[0, 1\] .* got"):
        trim(A, density)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([1, -1], [1, 1]), "must not be negative when normalize is on"),
        (([1], [1, 1]), "weights must have one entry per model, got 1 for 2 models"),
        (([1, 1], [1]), "densities must have one entry per model, got 1 for 2 models"),
        (([1, math.nan], [1, 1]), "weights must be 0 or between .* got nan"),
    ],
)
def test_refusals(arguments, text):
    with pytest.raises(ValueError, match=text):
        ties(ZERO, [A, B], *arguments)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"trim_scope": "model"}, "trim_scope must be one of tensor, row, got 'model'"),
        ({"elect_on": "mass"}, "elect_on must be one of weighted, unweighted, got 'mass'"),
        ({"elect_method": "sum"}, "method must be one of mass, count, got 'sum'"),
        ({"denominator": "mean"}, "denominator must be one of weight, count, none, got 'mean'"),
        ({"k_rule": "half"}, "k_rule must be one of floor, paper, peft, got 'half'"),
        ({"trim_ties": "first"}, "trim_ties must be one of index, all, got 'first'"),
    ],
)
def test_unknown_switches_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        ties(ZERO, [A, B], [1, 1], [0.5, 0.5], **options)
