import math

import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import models_with_weights, tensor_lists

from ties_utils import (
    KEEP_ALL,
    KEEP_NONE,
    TIES,
    TrimThreshold,
    count_ties,
    disjoint_mean,
    elect_sign,
    kept_count,
    ties,
    trim,
    trim_apply,
    trim_threshold,
)

A = torch.tensor([4, -1, 3, 0.5, -2])
B = torch.tensor([-1, 2, -3, 1, -4.0])
ZERO = torch.zeros(5)


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
    assert ties(
        torch.zeros(2), [torch.tensor([3.0, 1.0])], [-1], [1], normalize=False
    ).tolist() == [
        -3,
        -1,
    ]


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


@given(models_with_weights(min_models=2), st.floats(0.1, 1), st.booleans())
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
def test_the_result_stays_within_the_largest_change_and_on_the_kept_entries(case, density):
    (base, *models), weights = case
    weights, densities = weights[1:], [density] * len(models)
    trimmed = torch.stack([trim(m - base, density) for m in models])
    change = ties(base, models, weights, densities) - base
    assert (change.abs() <= trimmed.abs().amax(0) * (1 + 1e-6) + base.abs() * 2**-23).all()
    assert not change[(trimmed == 0).all(0)].any()


@given(models_with_weights(min_models=3), st.floats(0.1, 1))
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
