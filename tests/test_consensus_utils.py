import math

import pytest
import reference_task_vectors as reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import assert_near, assume_clear, families, total

from consensus_utils import consensus, consensus_ties, keep_consensus, tall_mask
from linear_utils import combine_deltas, task_arithmetic
from ties_utils import elect_and_combine, ties, trim

FACTORS = [0.2, 0.4, 0.6, 1.0]


def tensors(*rows):
    return [torch.tensor(row, dtype=torch.float32) for row in rows]


def test_a_mask_marks_where_the_merged_change_is_near_to_the_models():
    delta, merged = tensors([1, 1, 1, -1, 0, 0], [1, 3.4, 3.6, 1, 0, 1])
    assert tall_mask(delta, merged, 0.4).tolist() == [True, True, False, True, False, False]
    assert tall_mask(delta, merged, 0).tolist() == [True, True, True, True, False, False]


def test_an_entry_at_the_limit_is_not_marked():
    assert tall_mask(*tensors([1], [3]), 0.5).tolist() == [False]


@pytest.mark.parametrize(
    ("agreement", "expected"),
    [(0, [2, 1.1, 2, 0]), (1, [2, 1.1, 2, 0]), (2, [2, 0, 0, 0]), (3, [0, 0, 0, 0])],
)
def test_entries_that_matter_to_too_few_models_are_reset(agreement, expected):
    models = tensors([1, 1, 0, 0], [1, 0.1, 2, 0])
    merged = consensus(torch.zeros(4), models, [1, 1], [0.4, 0.4], agreement=agreement)
    torch.testing.assert_close(merged, torch.tensor(expected, dtype=torch.float32))


def test_every_model_has_a_factor_of_its_own():
    delta, merged = tensors([1], [3])
    assert keep_consensus(merged, [delta, delta], [0.4, 0.6], 1).tolist() == [3]
    assert keep_consensus(merged, [delta, delta], [0.4, 0.6], 2).tolist() == [0]


def test_masks_compare_whole_changes_with_what_ties_merges_of_trimmed_ones():
    models = tensors([4, 1, -3, 0.5], [2, 3, 3, 1])
    arguments = (torch.zeros(4), models, [1, 1], [0.5, 0.5])
    assert ties(*arguments).tolist() == [4, 3, 3, 0]
    assert consensus_ties(*arguments, [0.4, 0.4], agreement=2).tolist() == [4, 3, 3, 0]
    assert consensus_ties(*arguments, [0.6, 0.6], agreement=2).tolist() == [4, 0, 0, 0]


@pytest.mark.parametrize("by_ties", [False, True])
@given(
    family=families(min_models=2),
    density=st.floats(0.2, 1),
    factors=st.lists(st.sampled_from(FACTORS), min_size=4, max_size=4),
    agreement=st.integers(0, 4),
)
@settings(max_examples=40)
def test_agrees_with_the_reference(by_ties, family, density, factors, agreement):
    count = len(family.models)
    densities, factors = [density] * count, factors[:count]
    if by_ties:
        trimmed = [trim(delta, density) for delta in family.deltas]
        assume_clear(w * x for w, x in zip(family.weights, trimmed, strict=True))
        merged = elect_and_combine(trimmed, family.weights)
    else:
        merged = combine_deltas(family.deltas, family.weights, normalize=False)
    for delta, factor in zip(family.deltas, factors, strict=True):
        limit = factor * (merged - delta).abs()
        assume(((delta.abs() - limit).abs() > 1e-6).all())
    options = {"agreement": agreement, "lam": 0.8}
    array, arrays = family.arrays
    if by_ties:
        got = consensus_ties(
            family.base, family.models, family.weights, densities, factors, **options
        )
    else:
        got = consensus(family.base, family.models, family.weights, factors, **options)
    expected = reference.consensus(
        array, arrays, family.weights, factors, densities=densities if by_ties else None, **options
    )
    divisor = min(1, *family.weights)
    terms = total(family.deltas, family.weights) / divisor
    assert_near(got, expected, family.base.abs() + 2 * terms)


@given(families(min_models=2), st.integers(0, 4))
@settings(max_examples=50)
def test_what_is_kept_is_what_is_merged_and_more_agreement_keeps_less(family, agreement):
    zero, count = torch.zeros_like(family.base), len(family.models)
    factors = [0.4] * count
    whole = task_arithmetic(zero, family.deltas, family.weights)
    less, more = (
        consensus(zero, family.deltas, family.weights, factors, agreement=least)
        for least in (agreement + 1, agreement)
    )
    for merged in (less, more):
        assert torch.equal(merged[merged != 0], whole[merged != 0])
    assert not ((less != 0) & (more == 0)).any()


def test_no_agreement_is_task_arithmetic_or_ties_and_too_much_is_the_base():
    base, *models = tensors([1, 1, 1], [2, 0, 1], [1.5, 3, 1])
    shared, factors = (base, models, [0.5, 2.0]), [0.4, 0.4]
    whole = consensus(*shared, factors, agreement=0, lam=0.7)
    assert torch.equal(whole, task_arithmetic(*shared, lam=0.7))
    whole = consensus_ties(*shared, [0.7, 0.7], factors, agreement=0, lam=0.7)
    assert torch.equal(whole, ties(*shared, [0.7, 0.7], lam=0.7))
    assert torch.equal(consensus(*shared, factors, agreement=3), base)
    assert torch.equal(consensus_ties(*shared, [1, 1], factors, agreement=3), base)


def test_one_model_agrees_with_itself_alone():
    base, model = tensors([1, 1], [2, 1.5])
    assert torch.equal(consensus(base, [model], [1], [0.4], agreement=1), model)
    assert torch.equal(consensus(base, [model], [1], [0.4]), base)
    assert torch.equal(consensus(base, [base, base], [1, 1], [0.4] * 2), base)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: tall_mask(x, x, -0.1), "mask_lambdas must be at least 0 .* got -0.1"),
        (lambda x: tall_mask(x, x, math.nan), "mask_lambdas must be at least 0 .* got nan"),
        (lambda x: consensus(x, [x], [1], [0.4], agreement=-1), "agreement must be at least 0"),
        (lambda x: consensus(x, [x], [1], []), "mask_lambdas must have one entry per model"),
        (lambda x: consensus(x, [x], [], [0.4]), "weights must have at least one entry"),
        (lambda x: consensus(x, [x], [1, 1], [0.4]), "weights must have one entry per model"),
        (lambda x: consensus(x, [x[:1]], [1], [0.4]), "one shape"),
        (lambda x: consensus_ties(x, [x], [1], [], [0.4]), "densities must have one entry per"),
        (lambda x: consensus_ties(x, [x], [1], [2], [0.4]), r"densities must be in \[0, 1\]"),
        (lambda x: consensus_ties(x, [x], [1, 1], [1], [0.4]), "weights must have one entry per"),
        (lambda x: consensus_ties(x.half(), [x], [1], [1], [0.4]), "must be float32"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call(torch.ones(2))
