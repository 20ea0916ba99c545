import math

import pytest
import reference_task_vectors as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import assert_near, families

from linear_utils import task_arithmetic
from ram_utils import count_active, merge_active, ram, ramplus
from scalar_utils import ramplus_factors

ONE, TWO, ZERO = torch.tensor([1.0, 0, 2]), torch.tensor([0.0, 0, 4]), torch.zeros(3)
EPSILONS = st.sampled_from([0.0, 1e-5, 0.05, 0.125])


def test_golden_g13_ram():
    assert ram(ZERO, [ONE, TWO]).tolist() == [1, 0, 3]
    assert ram(ZERO, [ONE, TWO], lam=0.5).tolist() == [0.5, 0, 1.5]


def test_ramplus_amplifies_what_one_model_alone_has_changed():
    assert count_active([ONE, TWO], 1e-5) == [(1, 1), (1, 0)]
    assert ramplus_factors([1, 1], [1, 0]) == pytest.approx([1.02, 1.02])
    assert ramplus(ZERO, [ONE, TWO]).tolist() == pytest.approx([1.02, 0, 3])
    assert ramplus(ZERO, [ONE, TWO], r=0.5, alpha=3).tolist() == pytest.approx([1.5, 0, 3])


@pytest.mark.parametrize(
    ("shared", "unique", "factor"),
    [(0, 5, 1), (1, 10, 1.01), (1, 5, 1.02), (9, 1, 1.02), (1, 0, 1.02), (0, 0, 1)],
)
def test_the_factor_grows_with_what_is_shared_up_to_a_bound(shared, unique, factor):
    assert ramplus_factors([shared], [unique]) == pytest.approx([factor])


def test_changes_up_to_epsilon_do_not_count():
    models = [torch.tensor([0.5, 0.25, 1.0]), torch.tensor([0.25, 0.25, 0.5])]
    assert ram(ZERO, models, epsilon=0.25).tolist() == [0.5, 0, 0.75]
    assert ram(ZERO, models, epsilon=0).tolist() == [0.375, 0.25, 0.75]
    assert ram(ZERO, [-x for x in models], epsilon=0.25).tolist() == [-0.5, 0, -0.75]
    tenth = torch.tensor([0.1])
    assert ram(torch.zeros(1), [tenth], epsilon=0.1).tolist() == [0]


@given(families(), EPSILONS, st.none() | st.tuples(st.floats(0, 2), st.floats(0, 3)))
def test_agrees_with_the_reference(family, epsilon, plus):
    array, arrays = family.arrays
    expected = reference.ram(array, arrays, epsilon, 0.8, plus)
    options = {"epsilon": epsilon, "lam": 0.8}
    if plus is None:
        merged, largest = ram(family.base, family.models, **options), 1.0
    else:
        merged = ramplus(family.base, family.models, r=plus[0], alpha=plus[1], **options)
        largest = 1 + plus[0] * plus[1]
    terms = sum(delta.abs() for delta in family.deltas)
    assert_near(merged, expected, family.base.abs() + largest * terms)


@given(families(min_models=2), EPSILONS)
@settings(max_examples=50)
def test_the_order_of_the_models_does_not_matter_and_no_amplification_is_ram(family, epsilon):
    options = {"epsilon": epsilon}
    close = {"rtol": 1e-6, "atol": 1e-6}
    for merge in (ram, ramplus):
        merged = merge(family.base, family.models, **options)
        turned = merge(family.base, family.models[::-1], **options)
        torch.testing.assert_close(turned, merged, **close)
    plain = ram(family.base, family.models, **options)
    assert torch.equal(ramplus(family.base, family.models, r=0, **options), plain)
    assert torch.equal(ramplus(family.base, family.models, alpha=0, **options), plain)


def test_models_that_change_different_entries_are_added_up():
    base = torch.tensor([1.0, 2.0, 3.0, 4.0])
    models = [base + change for change in torch.diag(torch.tensor([0.5, -1.0, 2.0, 4.0]))]
    assert torch.equal(ram(base, models), task_arithmetic(base, models, [1.0] * 4))
    assert torch.equal(ramplus(base, models), ram(base, models))


def test_identical_models_one_model_and_unchanged_ones():
    base, model = torch.tensor([0.5, 0.25]), torch.tensor([1.0, 0.75])
    for merge in (ram, ramplus):
        assert torch.equal(merge(base, [model] * 3), model)
        assert torch.equal(merge(base, [model]), model)
        assert torch.equal(merge(base, [base, base]), base)
        assert torch.equal(merge(base, [model], lam=0), base)
    assert merge_active([torch.zeros(1)], 0, [1]).tolist() == [0]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ram(ZERO, [ONE], epsilon=-1), "epsilon must be at least 0 .* got -1"),
        (lambda: ram(ZERO, [ONE], epsilon=math.nan), "epsilon must be at least 0"),
        (lambda: ramplus(ZERO, [ONE], r=-0.1), "r must be at least 0 .*, got -0.1"),
        (lambda: ramplus(ZERO, [ONE], alpha=math.nan), "alpha must be at least 0 .*, got nan"),
        (lambda: merge_active([ONE, TWO], 0, [1]), "factors must have one entry per model"),
        (lambda: ram(ZERO, []), "at least one entry"),
        (lambda: ram(ZERO, [ONE[:1]]), r"one shape, got \(3,\) and \(1,\)"),
        (lambda: ramplus(ZERO.half(), [ONE]), "must be float32, got torch.float16"),
        (lambda: ram(ZERO, [ONE], lam=math.nan), "lam must be a number"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()
