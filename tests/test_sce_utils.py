import math

import pytest
import reference_task_vectors as reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import assert_near, assume_clear, families

from scalar_utils import TrimThreshold, sce_weights, selected_count
from sce_utils import sce, select_threshold, square_parts, variance
from ties_utils import KEEP_ALL, KEEP_NONE

ONE, TWO = torch.tensor([2.0, 0.0, 1.0, -1.0]), torch.tensor([0.0, 1.0, 1.0, 3.0])
ZERO = torch.zeros(4)
SHARES = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))


def weights_of(models):
    """Each model's share of the squared changes."""
    return sce_weights([math.fsum(square_parts(x)) for x in models], models[0].numel())


def test_golden_g12_variance_and_weights():
    assert variance([ONE, TWO]).tolist() == [1, 0.25, 0, 4]
    assert weights_of([ONE, TWO]) == pytest.approx([0.35294118, 0.64705882])
    assert sce_weights([5, 9], 4) == pytest.approx([0.35714286, 0.64285714])
    assert selected_count(0.67, 3, 4) == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [2, 1, 1, 3]),
        ({"select_topk": 0.67}, [2, 0, 0, 3]),
        ({"select_topk": 0.67, "sce_mask": "weights_only"}, [2, 1, 1, 3]),
        ({"lam": 0.5}, [1, 0.5, 0.5, 1.5]),
        ({"select_topk": 0}, [0, 0, 0, 0]),
        ({"select_topk": 0.3}, [0, 0, 0, 0]),
    ],
)
def test_golden_g12(options, expected):
    assert sce(ZERO, [ONE, TWO], **options).tolist() == pytest.approx(expected)


def test_models_are_averaged_by_their_squared_changes():
    base, one, two = torch.ones(2), torch.tensor([2.0, 1.0]), torch.tensor([4.0, 1.0])
    torch.testing.assert_close(sce(base, [one, two]), torch.tensor([1 + (1 + 27) / 10, 1]))


def test_of_equal_variances_the_first_are_selected():
    one = torch.tensor([1.0, -1, 1, 1])
    assert select_threshold([one, -one], 0.5) == TrimThreshold(0x3F800000, 2)
    merged = sce(ZERO, [one, ZERO], select_topk=0.5)
    assert merged.tolist() == [1, -1, 0, 0]


def test_entries_that_do_not_differ_do_not_count_in_the_share():
    one = torch.tensor([1.0, 1, 1, 1, 1, 1, 9, 5])
    two = torch.tensor([1.0, 1, 1, 1, 1, 1, 0, 0])
    assert sce(torch.zeros(8), [one, two], select_topk=0.5).nonzero().tolist() == [[6]]


@pytest.mark.parametrize("mask", ["deltas", "weights_only"])
@given(family=families(), share=SHARES, floor=st.sampled_from([0.0, 1e-2]))
@settings(max_examples=50)
def test_agrees_with_the_reference(mask, family, share, floor):
    assume_clear(family.deltas)
    options = {"select_topk": share, "sce_mask": mask, "sce_floor": floor, "lam": 0.8}
    squares = [float((delta.double() ** 2).mean()) for delta in family.deltas]
    assume(min(squares) > 1e-6 * max(squares) or min(squares) == 0)
    merged = sce(family.base, family.models, **options)
    array, arrays = family.arrays
    expected = reference.sce(array, arrays, **options)
    largest = torch.stack(family.deltas).abs().amax(0)
    assert_near(merged, expected, family.base.abs() + 2 * largest)


@given(families(max_models=1), st.integers(1, 4), SHARES)
@settings(max_examples=50)
def test_identical_models_are_the_result_unless_a_share_is_selected(family, count, share):
    merged = sce(family.base, family.models * count, select_topk=share)
    wanted = family.models[0] if share == 1 else family.base
    torch.testing.assert_close(merged, wanted, rtol=0, atol=2**-20)


@given(families(min_models=2), st.floats(0.1, 1))
@settings(max_examples=50)
def test_weights_sum_to_one_follow_their_models_and_ignore_a_common_scale(family, share):
    weights = weights_of(family.deltas)
    assert math.fsum(weights) == pytest.approx(1)
    assert weights_of(family.deltas[::-1]) == weights[::-1]
    assert weights_of([4 * delta for delta in family.deltas]) == weights
    assume_clear(family.deltas)
    zero = torch.zeros_like(family.base)
    merged = sce(zero, family.deltas, select_topk=share)
    turned = sce(zero, family.deltas[::-1], select_topk=share)
    torch.testing.assert_close(merged, turned, rtol=1e-5, atol=1e-7)
    scaled = sce(zero, [4 * delta for delta in family.deltas], select_topk=share)
    assert torch.equal(scaled, 4 * merged)


def test_a_floor_makes_the_weights_of_small_changes_equal():
    small = [torch.tensor([1e-4, 0.0]), torch.tensor([3e-4, 0.0])]
    zero = torch.zeros(2)
    assert sce(zero, small)[0] == pytest.approx(2.8e-4)
    assert sce(zero, small, sce_floor=1e-6)[0] == pytest.approx(2e-4)
    assert sce_weights([2, 6], 8, floor=1.01) == [0.5, 0.5]
    assert sce_weights([2, 6], 8, floor=1) == [0.25, 0.75]


def test_unchanged_models_leave_the_base_and_one_model_alone_is_taken_whole():
    base, model = torch.tensor([0.1, 0.7]), torch.tensor([0.3, -1.0])
    assert torch.equal(sce(base, [base, base]), base)
    assert torch.equal(sce(base, [base, base], select_topk=0.5), base)
    torch.testing.assert_close(sce(base, [model]), model)
    assert torch.equal(sce(base, [model], select_topk=0.99), base)
    merged = sce(torch.zeros(1), [torch.ones(1), 2 * torch.ones(1)])
    assert merged.tolist() == pytest.approx([9 / 5])


def test_the_ends_of_the_share_select_everything_and_nothing():
    assert select_threshold([ONE, TWO], 1) == KEEP_ALL
    assert select_threshold([ONE, TWO], 0) == KEEP_NONE


def test_a_model_that_has_hardly_changed_has_hardly_a_say():
    base, one = torch.zeros(2), torch.tensor([1.0, 1.0])
    merged = sce(base, [one, torch.tensor([1e-16, 0.0])])
    torch.testing.assert_close(merged, one)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: sce(ZERO, [ONE], select_topk=1.5), r"select_topk must be in \[0, 1\] .* got 1.5"),
        (lambda: sce(ZERO, [ONE], select_topk=math.nan), "select_topk must be in"),
        (lambda: sce(ZERO, [ONE], sce_mask="all"), "one of deltas, weights_only, got 'all'"),
        (lambda: sce(ZERO, []), "at least one entry"),
        (lambda: sce(ZERO, [ONE, TWO[:2]]), r"one shape, got \(4,\) and \(2,\)"),
        (lambda: sce(ZERO, [ONE, TWO.half()]), "must be float32, got torch.float16"),
        (lambda: sce(ZERO, [ONE], lam=math.inf), "lam must be a number up to"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()
