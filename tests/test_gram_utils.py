import math

import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import families

from gram_utils import (
    gram_matrix,
    gram_pairs,
    karcher_coefficients,
    lerp_coefficients,
    model_stock_ratio,
    multislerp_coefficients,
    nuslerp_coefficients,
    nuslerp_t,
    sequential_coefficients,
    sequential_steps,
    slerp_coefficients,
)
from slerp_utils import gram

AXES = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 4.0]]
ROOT = math.sqrt(0.5)


def weighted(coefficients, tensors):
    """The weighted sum in float64."""
    return sum(c * tensor.double() for c, tensor in zip(coefficients, tensors, strict=True))


def test_pairs_and_matrix_belong_together():
    assert list(gram_pairs(3)) == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]
    assert gram_matrix([1, 2, 3, 4, 5, 6], 3) == [[1, 2, 3], [2, 4, 5], [3, 5, 6]]
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        gram_matrix([1, 2], 2)


def test_golden_g3_multipliers():
    assert slerp_coefficients(1, 4, 0, 0.5)[:2] == pytest.approx((ROOT, ROOT))
    assert slerp_coefficients(1, 1, 0.5, 1 / 3)[:2] == pytest.approx((0.74222720, 0.39493084))
    assert slerp_coefficients(0, 25, 0, 0.25)[1] == pytest.approx(0.38268343)


def test_golden_g4_where_two_weights_lie():
    assert nuslerp_t([1, 3]) == 0.75
    assert nuslerp_t([2, 0]) == 0
    assert nuslerp_t([-1, -3]) == 0.75
    assert nuslerp_t([1, -1]) == 0.5


def test_nuslerp_takes_the_line_within_a_ten_millionth():
    assert not nuslerp_coefficients(1, 1, 1 - 2e-7, 0.5).used_lerp
    assert not nuslerp_coefficients(1, 1, -1 + 2e-7, 0.5).used_lerp
    assert nuslerp_coefficients(1, 1, 1 - 0.5e-7, 0.3)[:3] == (0.7, 0.3, True)
    assert nuslerp_coefficients(1, 1, -1, 0.3)[:3] == (0.7, 0.3, True)


def test_tiny_norms_count_as_a_ten_millionth_in_nuslerp():
    assert nuslerp_coefficients(1e-16, 1e-16, 1e-16, 0.5).cosine == pytest.approx(0.01)


def test_golden_g5_multislerp_multipliers():
    even = multislerp_coefficients([[9, 0], [0, 16]], [1, 1])
    assert even == pytest.approx([3.5 * ROOT / 3, 3.5 * ROOT / 4])
    assert multislerp_coefficients([[9, 0], [0, 16]], [2, 2], normalize=False) == pytest.approx(
        [4 * c for c in even]
    )


@given(families(min_models=2))
def test_the_step_in_the_tangent_space_adds_nothing_to_multislerp(family):
    units = [x.double() / x.double().norm() for x in family.models if x.any()]
    weights = family.weights[: len(units)]
    assume(units)
    mean = weighted(weights, units)
    assume(float(mean.norm()) > 1e-3)
    pole = mean / mean.norm()
    tangents = [u - (u * pole).sum() * pole for u in units]
    assert float(weighted(weights, tangents).norm()) < 1e-12


def test_golden_g5_karcher_multipliers():
    mean = karcher_coefficients(AXES, [1, 1, 1])
    assert mean.coefficients == pytest.approx([0.76980036, 0.76980036, 0.38490018])
    assert (mean.converged, mean.iterations) == (True, 0)
    assert mean.cosine == pytest.approx(1 / math.sqrt(3))


def test_golden_g5_karcher_converges():
    chain = torch.tensor([[1, 0, 0], [0.6, 0.8, 0], [0, 0.6, 0.8]], dtype=torch.float64)
    dots = (chain @ chain.T).tolist()
    rough = karcher_coefficients(dots, [1, 1, 1])
    fine = karcher_coefficients(dots, [1, 1, 1], max_iter=100, tol=1e-12)
    assert (rough.converged, fine.converged) == (True, True)
    assert rough.iterations < fine.iterations
    assert weighted(rough.coefficients, chain).tolist() == pytest.approx(
        [0.70226240, 0.60996249, 0.36711481], abs=1e-8
    )
    assert weighted(fine.coefficients, chain).tolist() == pytest.approx(
        [0.70226387, 0.60995791, 0.36711961], abs=1e-8
    )


def test_a_karcher_mean_that_is_not_reached_says_so():
    chain = [[1, 0.6, 0], [0.6, 1, 0.48], [0, 0.48, 1]]
    stopped = karcher_coefficients(chain, [1, 1, 1], max_iter=1, tol=1e-12)
    assert (stopped.converged, stopped.iterations) == (False, 1)


def test_a_karcher_mean_of_opposite_directions_says_how_wide_they_are():
    mean = karcher_coefficients([[1, -1], [-1, 1]], [1, 1])
    assert mean.cosine == -1
    assert all(math.isfinite(c) for c in mean.coefficients)


def test_norms_up_to_tol_have_no_direction_but_count_in_the_mean_length():
    mean = karcher_coefficients([[4, 0], [0, 1e-12]], [1, 3], tol=1e-5)
    assert mean.coefficients == pytest.approx([(0.25 * 2 + 0.75 * 1e-6) / 2, 0])


@given(st.integers(0, 999), st.integers(1, 5), st.integers(0, 8))
def test_the_karcher_mean_of_dot_products_is_that_of_vectors_after_every_step(seed, count, steps):
    generator = torch.Generator().manual_seed(seed)
    models = list(torch.rand(count, 6, generator=generator) ** 4 + 1e-3)
    weights = [1.0, 0.5, 2.0, 0.25, 1.5][:count]
    mean = karcher_coefficients(gram(models), weights, max_iter=steps, tol=1e-7)
    expected = torch.from_numpy(
        reference.karcher([x.numpy() for x in models], weights, steps, 1e-7)
    )
    difference = weighted(mean.coefficients, models) - expected
    assert float(difference.norm()) < 1e-7 * float(expected.norm())


def test_golden_g1_steps_and_multipliers_on_straight_lines():
    assert sequential_steps([1, 2, 3]) == pytest.approx([2 / 3, 1 / 2])
    assert lerp_coefficients([2 / 3, 1 / 2]) == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert sequential_steps([2.0]) == []
    assert lerp_coefficients([]) == [1]


def test_golden_g7_multipliers_from_step_to_step():
    identity = [[float(i == j) for j in range(3)] for i in range(3)]
    merged, taken = sequential_coefficients(identity, [1 / 2, 1 / 3])
    assert merged == pytest.approx([0.61237244, 0.61237244, 0.5])
    assert [step.used_lerp for step in taken] == [False, False]


@pytest.mark.parametrize(
    ("cosines", "average", "cosine", "t"),
    [
        ([0.70710678], "cosine", 0.70710678, 0.82842712),
        ([0.70710678], "angle", 0.70710678, 0.82842712),
        ([0.70710678, 0.57735027, 0.81649658], "cosine", 0.70031788, 0.87516552),
        ([0.70710678, 0.57735027, 0.81649658], "angle", 0.70710678, 0.87867966),
        ([1, 1, 1], "cosine", 1, 1),
        ([0, 0, 0], "angle", 0, 0),
    ],
)
def test_golden_g6_ratio(cosines, average, cosine, t):
    count = 2 if len(cosines) == 1 else 3
    dots = [[1.0] * count for _ in range(count)]
    for (i, j), value in zip(
        [pair for pair in gram_pairs(count) if pair[0] != pair[1]], cosines, strict=True
    ):
        dots[i][j] = dots[j][i] = value
    ratio = model_stock_ratio(dots, average=average)
    assert ratio.cosine == pytest.approx(cosine, abs=1e-8)
    assert ratio.t == pytest.approx(t, abs=1e-8)


def test_golden_g6_a_norm_floor_takes_small_changes_for_less_alike():
    small = [[2.5e-7] * 2 for _ in range(2)]
    assert model_stock_ratio(small).t == pytest.approx(1)
    assert model_stock_ratio(small, norm_floor=1e-6)._asdict() == pytest.approx(
        {"t": 0.4, "cosine": 0.25}
    )


@pytest.mark.parametrize(
    ("cosine", "clamped", "free"), [(-0.5, 0, -2), (-1, 0, 0), (0, 0, 0), (0.5, 2 / 3, 2 / 3)]
)
def test_golden_g6_a_negative_cosine_is_clamped_to_the_base(cosine, clamped, free):
    dots = [[1, cosine], [cosine, 1]]
    assert model_stock_ratio(dots).t == pytest.approx(clamped)
    assert model_stock_ratio(dots, clamp=False).t == pytest.approx(free)


def test_a_task_vector_of_zeros_has_nothing_in_common_with_any():
    assert model_stock_ratio([[0, 0], [0, 4]]).t == 0
    assert model_stock_ratio([[0, 0], [0, 0]], clamp=False).t == 0


@given(st.lists(st.floats(-1, 1), min_size=6, max_size=6), st.sampled_from(["cosine", "angle"]))
def test_a_clamped_ratio_stays_between_base_and_mean(cosines, average):
    dots = [[1.0] * 4 for _ in range(4)]
    pairs = [(i, j) for i, j in gram_pairs(4) if i != j]
    for (i, j), value in zip(pairs, cosines, strict=True):
        dots[i][j] = dots[j][i] = value
    assert 0 <= model_stock_ratio(dots, average=average).t <= 1


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: slerp_coefficients(1, 1, 0, 1.5), r"t must be in \[0, 1\]"),
        (lambda: nuslerp_coefficients(1, 1, 0, -0.5), r"t must be in \[0, 1\]"),
        (lambda: nuslerp_t([1, 2, 3]), "one entry per model, got 3 for 2 models"),
        (lambda: nuslerp_t([3, -1]), "must not have opposite signs"),
        (lambda: multislerp_coefficients(AXES, [1, 1]), "got 2 for 3 models"),
        (lambda: multislerp_coefficients(AXES, [1, -1, 0]), "must sum to more than 0"),
        (lambda: karcher_coefficients(AXES, [1, 1]), "got 2 for 3 models"),
        (lambda: karcher_coefficients(AXES, [2, -1, 1]), "must be >= 0 and one above 0"),
        (lambda: sequential_steps([1, -1]), "must be >= 0 and the first above 0"),
        (lambda: sequential_steps([0, 1]), "must be >= 0 and the first above 0"),
        (lambda: lerp_coefficients([0.5, 2]), r"t must be in \[0, 1\] .* got 2"),
        (lambda: sequential_coefficients(AXES, [0.5]), "steps must have one entry per model"),
        (lambda: model_stock_ratio([[1.0]]), "needs at least 2 models, got 1"),
        (lambda: model_stock_ratio(AXES, average="mean"), "one of cosine, angle, got 'mean'"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()
