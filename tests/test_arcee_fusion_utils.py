import math

import pytest
import reference_task_vectors as reference
import torch
from hypothesis import assume, given
from strategies import families

from arcee_fusion_utils import (
    arcee_fusion,
    fuse,
    fusion_threshold,
    importance,
    row_divergence,
)
from scalar_utils import quartile_ranks


def score_of(base, tensor):
    return importance(base, tensor, row_divergence(base, tensor))


def test_importance_is_the_change_times_the_divergence_of_the_row():
    base, tensor = torch.zeros(2, 2), torch.tensor([[0.0, math.log(3)], [1.0, 1.0]])
    divergence = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    wanted = torch.tensor([[0, math.log(3) * divergence], [0, 0]])
    torch.testing.assert_close(score_of(base, tensor), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("score", "threshold"),
    [
        ([1, 2, 3, 4, 5], 3 + 1.5 * (4 - 2)),
        ([5, 4, 1, 2, 3, 6], 3 + 1.5 * (4 - 2)),
        ([1, 2, 3, 4], 2 + 1.5 * (3 - 1)),
        ([7], 7),
        ([1, 9], 1),
        ([0, 0, 0, 0, 9], 0),
    ],
)
def test_the_threshold_takes_the_lower_of_two_middle_entries(score, threshold):
    score = torch.tensor(score, dtype=torch.float32)
    assert fusion_threshold(score) == threshold
    assert fusion_threshold(score.flip(0).view(-1, 1)) == threshold


@pytest.mark.parametrize(
    ("numel", "ranks"), [(1, (1, 1, 1)), (2, (2, 2, 1 + 1)), (5, (4, 3, 2)), (101, (76, 51, 26))]
)
def test_quartiles_are_ranks_from_the_top(numel, ranks):
    assert quartile_ranks(numel) == ranks


def test_what_stands_out_is_taken():
    base = torch.zeros(2, 5)
    tensor = torch.tensor([[0, 0.1, 0.2, 0.3, 3], [0.1, 0.1, 0.1, 0.1, 0.1]])
    score = score_of(base, tensor)[0]
    assert fusion_threshold(score_of(base, tensor)) == pytest.approx(1.5 * float(score[1]))
    assert arcee_fusion(base, tensor).nonzero().tolist() == [[0, 2], [0, 3], [0, 4]]


def test_a_score_at_the_threshold_is_taken():
    base, tensor = torch.zeros(3), torch.tensor([0.0, 0.5, 1.0])
    divergence = row_divergence(base, tensor)
    score = importance(base, tensor, divergence)
    assert torch.equal(fuse(base, tensor, divergence, float(score[1])), tensor)
    beyond = math.nextafter(float(score[2]), 0) + 1e-6
    assert fuse(base, tensor, divergence, beyond).tolist() == [0, 0, 0]


@given(families(max_models=1))
def test_agrees_with_the_reference(family):
    array, (other,) = family.arrays
    score = reference.importance(array, other)
    near = abs(score - reference.fusion_threshold(score)) <= 1e-5 * abs(score) + 1e-12
    # Equal scores, as those of unchanged entries, are equal in both.
    assume(not (near & (score != 0)).any() or score.size == 1)
    wanted = torch.from_numpy(reference.arcee_fusion(array, other)).float()
    assert torch.equal(arcee_fusion(family.base, family.models[0]), wanted)
    torch.testing.assert_close(
        score_of(family.base, family.models[0]).double(),
        torch.from_numpy(score),
        rtol=1e-6,
        atol=1e-12,
    )


@given(families(max_models=1))
def test_every_entry_is_one_of_the_two(family):
    merged = arcee_fusion(family.base, family.models[0])
    assert ((merged == family.base) | (merged == family.models[0])).all()
    assert torch.equal(arcee_fusion(family.base, family.base), family.base)


def test_a_constant_added_to_a_row_changes_no_divergence():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(3, 8, generator=generator)
    assert float(score_of(base, base + 2).abs().max()) < 1e-12


@pytest.mark.parametrize("shape", [(150, 1003), (3, 70_000)])
def test_a_row_diverges_alike_however_rows_are_put_together(shape):
    generator = torch.Generator().manual_seed(2)
    base, tensor = (torch.randn(shape, generator=generator) for _ in range(2))
    whole = row_divergence(base, tensor)
    each = [row_divergence(base[row : row + 1], tensor[row : row + 1]) for row in range(shape[0])]
    assert torch.equal(whole, torch.cat(each))


def test_rows_are_independent_but_for_the_threshold():
    generator = torch.Generator().manual_seed(1)
    base, tensor = (torch.randn(6, 9, generator=generator) for _ in range(2))
    threshold = fusion_threshold(score_of(base, tensor))
    pieces = [
        fuse(base[rows], tensor[rows], row_divergence(base[rows], tensor[rows]), threshold)
        for rows in (slice(0, 2), slice(2, 3), slice(3, 6))
    ]
    assert torch.equal(torch.cat(pieces), arcee_fusion(base, tensor))


def test_one_entry_is_taken_and_few_changes_are_taken_whole():
    assert arcee_fusion(torch.zeros(1), torch.ones(1)).tolist() == [1]
    tensor = torch.zeros(8)
    tensor[3] = 1.0
    assert torch.equal(arcee_fusion(torch.zeros(8), tensor), tensor)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (torch.ones(3), r"one shape, got \(2,\) and \(3,\)"),
        (torch.ones(2).half(), "must be float32, got torch.float16"),
    ],
)
def test_refusals(other, text):
    with pytest.raises(ValueError, match=text):
        arcee_fusion(torch.ones(2), other)
