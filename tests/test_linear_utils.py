import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_near, families, models_with_weights, tensor_lists, total, ulps

from linear_utils import (
    add_task_vector,
    combine,
    combine_rows,
    lerp,
    linear,
    nearswap,
    scale,
    sequential_lerp,
    task_arithmetic,
)


def tensors(*rows):
    return [torch.tensor(row, dtype=torch.float32) for row in rows]


def test_linear_golden_g1():
    models = tensors([1, 2], [5, 6])
    assert linear(models, [1, 3]).tolist() == [4, 5]
    assert linear(models, [1, 3], normalize=False).tolist() == [16, 20]


def test_sequential_lerp_golden_g1_equals_linear():
    models = tensors([1, 2], [3, 5], [7, 11])
    expected = torch.tensor([4.6666667, 7.5])
    torch.testing.assert_close(sequential_lerp(models, [1, 2, 3]), expected)
    torch.testing.assert_close(linear(models, [1, 2, 3]), expected)


def test_task_arithmetic_golden_g2():
    base, one, two = tensors([1, 1], [2, 1], [1, 0])
    assert task_arithmetic(base, [one, two], [1, 2], lam=0.5).tolist() == [1.5, 0]


def test_golden_g13_nearswap_and_passthrough():
    a, c = tensors([0, 1], [0.5, 1.1])
    torch.testing.assert_close(nearswap(a, c, 0.1), torch.tensor([0.1, 1.1]))
    assert scale(c, 0.5).tolist() == (c / 2).tolist()


@given(models_with_weights())
def test_linear_of_one_model_many_times_is_that_model(case):
    models, weights = case
    same = [models[0]] * len(weights)
    assert ulps(linear(same, weights), models[0]) <= 1 + len(weights)
    stored = models[0].bfloat16()
    assert torch.equal(linear([stored.float()] * len(weights), weights).bfloat16(), stored)


@given(models_with_weights())
def test_linear_stays_between_the_models(case):
    models, weights = case
    stacked = torch.stack(models)
    margin = stacked.abs().amax(0) * 2**-22
    merged = linear(models, weights)
    assert (merged >= stacked.amin(0) - margin).all()
    assert (merged <= stacked.amax(0) + margin).all()


@given(models_with_weights())
def test_linear_does_not_care_about_a_common_factor_or_the_order(case):
    models, weights = case
    merged = linear(models, weights)
    margin = 4 * 2**-23 * torch.stack(models).abs().sum(0)
    assert ((linear(models, [8 * w for w in weights]) - merged).abs() <= margin).all()
    assert ((linear(models[::-1], weights[::-1]) - merged).abs() <= margin).all()


@given(models_with_weights())
def test_linear_and_task_arithmetic_agree_with_the_reference(case):
    models, weights = case
    arrays = [model.double().numpy() for model in models]
    margin = 8 * 2**-24 * sum(abs(w) * m.abs() for w, m in zip(weights, models, strict=True))
    expected = torch.from_numpy(reference.linear(arrays, weights, normalize=False))
    assert ((linear(models, weights, normalize=False) - expected).abs() <= margin).all()
    base, *tuned = models
    if tuned:
        expected = torch.from_numpy(
            reference.task_arithmetic(arrays[0], arrays[1:], weights[1:], lam=0.7)
        )
        scale = sum(w * (m - base).abs() for w, m in zip(weights[1:], tuned, strict=True))
        got = task_arithmetic(base, tuned, weights[1:], lam=0.7)
        assert ((got - expected).abs() <= 8 * 2**-24 * (scale + base.abs() + got.abs())).all()


def test_task_arithmetic_with_one_whole_model_is_that_model():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, generator=generator)
    model = base + 0.01 * torch.randn(64, generator=generator)
    merged = task_arithmetic(base, [model], [1.0])
    assert ((merged - model).abs() <= 2**-23 * torch.maximum(model.abs(), base.abs())).all()


@pytest.mark.parametrize(("weights", "lam"), [([0.0, 0.0], 1.0), ([0.5, 2.0], 0.0)])
def test_task_arithmetic_without_weight_or_lam_is_the_base_exactly(weights, lam):
    base, one, two = tensors([0.1, -0.3], [2, 1], [1, 0])
    assert torch.equal(task_arithmetic(base, [one, two], weights, lam=lam), base)


def test_task_arithmetic_adds_up():
    generator = torch.Generator().manual_seed(1)
    base, one, two = (torch.randn(3, 5, generator=generator) for _ in range(3))
    both = task_arithmetic(base, [one, two], [0.3, 0.6])
    apart = (
        task_arithmetic(base, [one, two], [0.3, 0.0])
        + task_arithmetic(base, [one, two], [0.0, 0.6])
        - base
    )
    torch.testing.assert_close(both, apart)


def test_task_arithmetic_moves_with_a_constant_added_to_everything():
    base, one, two, shift = tensors([1, 2], [2, 1], [3, 5], [10, -4])
    moved = task_arithmetic(base + shift, [one + shift, two + shift], [0.5, 0.25])
    torch.testing.assert_close(moved, task_arithmetic(base, [one, two], [0.5, 0.25]) + shift)


def test_task_arithmetic_is_linear_with_the_rest_of_the_weight_on_the_base():
    base, one, two = tensors([1, 2], [2, 1], [3, 5])
    expected = linear([base, one, two], [0.25, 0.5, 0.25], normalize=False)
    torch.testing.assert_close(task_arithmetic(base, [one, two], [0.5, 0.25]), expected)


def test_a_model_with_weight_zero_is_left_out_before_any_arithmetic():
    (model,) = tensors([1, 2])
    endless = torch.tensor([math.inf, math.nan])
    assert combine([1.0, 0.0], [model, endless]).tolist() == [1, 2]
    assert linear([model, endless], [1.0, 0.0]).tolist() == [1, 2]


def test_lerp_ends_are_the_models():
    a, c = tensors([0.1, 7], [3, -2])
    assert torch.equal(lerp(a, c, 0.0), a)
    assert torch.equal(lerp(a, c, 1.0), c)


@given(models_with_weights())
def test_sequential_lerp_is_linear_and_agrees_with_the_reference(case):
    models, weights = case
    terms = total(models, weights) / sum(weights)
    merged = sequential_lerp(models, weights)
    assert_near(merged, reference.sequential_lerp([x.numpy() for x in models], weights), terms)
    assert_near(merged, linear(models, weights).double().numpy(), 2 * terms)


def test_a_model_of_weight_zero_is_passed_by_in_sequence():
    models = tensors([1, 2], [5, 6], [3, 3])
    assert torch.equal(sequential_lerp(models, [1, 0, 0]), models[0])
    assert torch.equal(sequential_lerp(models[:1], [0.3]), models[0])


@given(families(max_models=1), st.floats(0, 1))
def test_nearswap_agrees_with_the_reference(family, t):
    base, (model,) = family.base, family.models
    array, (other,) = family.arrays
    terms = total([base, model], [1, 1])
    assert_near(nearswap(base, model, t), reference.nearswap(array, other, t), terms)


def test_nearswap_takes_what_is_near_and_goes_towards_the_rest():
    base, model = tensors([1, 1, 1, 1, 0], [1.25, 1.5, 2, -1, 1e-7])
    assert nearswap(base, model, 0.5).tolist() == [1.25, 1.5, 1.5, 0.5, model[4]]
    assert torch.equal(nearswap(base, model, 0), base)
    assert torch.equal(nearswap(base, model, 2), model)
    assert torch.equal(nearswap(base, base, 1e-4), base)


@given(tensor_lists(max_models=1), st.sampled_from([0.0, 0.5, -1.0, 0.3, 3.0]))
def test_scale_multiplies_once(models, factor):
    assert torch.equal(scale(models[0], factor), models[0] * torch.tensor(factor))
    expected = reference.scale(models[0].numpy(), factor)
    assert_near(scale(models[0], factor), expected, 0 * models[0])


def test_scale_without_a_factor_is_a_copy_of_every_bit():
    special = torch.tensor([-0.0, math.inf, math.nan, 1e-45])
    copy = scale(special, None)
    assert torch.equal(copy.view(torch.int32), special.view(torch.int32))
    assert copy.data_ptr() != special.data_ptr()


def test_rows_have_coefficients_of_their_own():
    one, two = tensors([[1, 2], [3, 4]], [[10, 20], [30, 40]])
    shares = torch.tensor([[1.0, 0.5], [0.0, -1.0]])
    assert combine_rows(shares, [one, two]).tolist() == [[6, 12], [-30, -40]]
    assert combine_rows(shares[:1], [one[1], two[1]]).tolist() == [18, 24]
    deep = combine_rows(shares, [one.view(2, 1, 2), two.view(2, 1, 2)])
    assert deep.tolist() == [[[6, 12]], [[-30, -40]]]


def test_inputs_are_unchanged():
    base, one, two = tensors([1, 2], [2, 1], [3, 5])
    copies = [base.clone(), one.clone(), two.clone()]
    task_arithmetic(base, [one, two], [0.5, 0.25])
    linear([one, two], [1, 2])
    sequential_lerp([one, two], [1, 2])
    add_task_vector(base, one, 0.0).add_(1)
    assert all(torch.equal(x, y) for x, y in zip([base, one, two], copies, strict=True))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: linear([x, x], [1.0]), "one entry per model, got 1 for 2 models"),
        (lambda x: linear([x, x], [1.0, -1.0]), "sum to 0, so they cannot be normalized"),
        (lambda x: linear([x], [math.nan]), "weights must be 0 or between .* got nan"),
        (lambda x: linear([], []), "weights must have at least one entry"),
        (lambda x: linear([x, x[:1]], [1, 1]), r"one shape, got \(2,\) and \(1,\)"),
        (lambda x: linear([x.double()], [1]), "must be float32, got torch.float64"),
        (lambda x: lerp(x, x, 1.5), r"t must be in \[0, 1\] .* got 1.5"),
        (lambda x: lerp(x, x, math.nan), r"t must be in \[0, 1\] .* got nan"),
        (lambda x: task_arithmetic(x, [x], [1.0], lam=math.inf), "lam must be a number up to"),
        (lambda x: sequential_lerp([x, x], [0, 1]), "the first above 0"),
        (lambda x: sequential_lerp([x, x], [1]), "one entry per model, got 1 for 2 models"),
        (lambda x: nearswap(x, x, -0.1), "t must be at least 0 .* got -0.1"),
        (lambda x: nearswap(x, x, math.nan), "t must be at least 0 .* got nan"),
        (lambda x: nearswap(x, x[:1], 1), r"one shape, got \(2,\) and \(1,\)"),
        (lambda x: scale(x, math.inf), "factor must be a number up to .* got inf"),
        (lambda x: scale(x.half(), 1), "must be float32"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call(torch.ones(2))
