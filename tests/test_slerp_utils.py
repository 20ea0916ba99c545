import math

import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import tensor_lists

from gram_utils import slerp_coefficients
from slerp_utils import gram, gram_parts, sequential_slerp, slerp
from tensor_utils import RUN, run_sums


def vector(*values):
    return torch.tensor(values, dtype=torch.float32)


def dots(a, c):
    """`<a,a>`, `<c,c>` and `<a,c>`."""
    (aa, ac), (_, cc) = gram([a, c])
    return aa, cc, ac


@pytest.mark.parametrize(
    ("a", "c", "t", "expected"),
    [
        ((1, 0), (0, 2), 0.5, (0.70710678, 1.41421356)),
        ((1, 0), (0, 2), 0.25, (0.92387953, 0.76536686)),
        ((1, 0), (0.5, 0.8660254), 1 / 3, (0.93969262, 0.34202014)),
        ((1, 0), (1, 0.01), 0.5, (1, 0.005)),
        ((1, 0), (-1, 0), 0.5, (0, 0)),
        ((0, 0), (3, 4), 0.5, (2.12132034, 2.82842712)),
        ((0, 0), (3, 4), 0.25, (1.1480503, 1.5307337)),
    ],
)
def test_golden_g3(a, c, t, expected):
    torch.testing.assert_close(slerp(vector(*a), vector(*c), t), vector(*expected))


def test_golden_g7_the_order_of_the_models_matters():
    axes = list(torch.eye(3))
    there, back = sequential_slerp(axes, [1, 1, 1]), sequential_slerp(axes[::-1], [1, 1, 1])
    torch.testing.assert_close(there, vector(0.61237244, 0.61237244, 0.5))
    torch.testing.assert_close(back, vector(0.5, 0.61237244, 0.61237244))


def test_one_model_in_sequence_is_that_model_and_a_weight_of_zero_adds_nothing():
    a, c = vector(1, 2), vector(3, -1)
    assert torch.equal(sequential_slerp([a], [2.0]), a)
    assert torch.equal(sequential_slerp([a, c], [1.0, 0.0]), a)


@given(tensor_lists(min_models=2, max_models=2))
def test_the_ends_are_the_models_exactly(pair):
    a, c = pair
    assert torch.equal(slerp(a, c, 0.0), a)
    assert torch.equal(slerp(a, c, 1.0), c)


@given(tensor_lists(min_models=2, max_models=2), st.floats(0, 1), st.booleans())
def test_agrees_with_the_reference_and_with_itself_swapped(pair, t, apart):
    a, c = pair
    c = -c.flip(0) if apart else c
    *_, cosine = slerp_coefficients(*dots(a, c), t)
    assume(abs(abs(cosine) - 0.9995) > 1e-6 and cosine > -0.99)
    merged = slerp(a, c, t)
    expected = torch.from_numpy(reference.slerp(a.double().numpy(), c.double().numpy(), t))
    margin = 8 * 2**-24 * (a.abs() + c.abs()) / math.sqrt(max(1e-3, 1 - cosine**2))
    assert ((merged - expected).abs() <= margin).all()
    assert ((slerp(c, a, 1 - t) - merged).abs() <= 4 * margin).all()


def test_equal_lengths_keep_their_length_and_divide_the_angle():
    generator = torch.Generator().manual_seed(0)
    a, c = (torch.nn.functional.normalize(torch.randn(50, generator=generator), dim=0) * 3
            for _ in range(2))  # fmt: skip
    angle = math.acos(float(a @ c) / 9)
    for t in (0.2, 0.5, 0.9):
        merged = slerp(a, c, t)
        assert float(merged.norm()) == pytest.approx(3, rel=1e-6)
        assert math.acos(float(a @ merged) / 9) == pytest.approx(t * angle, rel=1e-4)


def test_a_positive_factor_goes_through():
    a, c = vector(1, 2, -1), vector(0.5, -2, 4)
    torch.testing.assert_close(slerp(8 * a, 8 * c, 0.3), 8 * slerp(a, c, 0.3))


def test_identical_models_take_the_straight_line_and_stay():
    a = vector(0.3, -0.7)
    assert slerp_coefficients(*dots(a, a), 0.4).used_lerp
    torch.testing.assert_close(slerp(a, a, 0.4), a)


def test_the_branch_changes_little_at_the_threshold():
    on_arc = slerp_coefficients(1, 1, 0.99949, 0.5)
    straight = slerp_coefficients(1, 1, 0.99951, 0.5)
    assert (on_arc.used_lerp, straight.used_lerp) == (False, True)
    assert on_arc.first == pytest.approx(straight.first, rel=2e-4)


@given(st.integers(1, 6), st.integers(1, 50), st.integers(1, 5))
def test_dot_products_are_the_same_for_every_way_to_cut_rows(rows, columns, step):
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    a, c = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    whole = [math.fsum(part) for part in gram_parts([a, c])]
    pieces = [gram_parts([a[r : r + step], c[r : r + step]]) for r in range(0, rows, step)]
    assert [math.fsum(x for piece in pieces for x in piece[k]) for k in range(3)] == whole


def test_long_rows_are_cut_into_runs():
    values = torch.ones(2, 2 * RUN + 3, dtype=torch.float64)
    assert sorted(run_sums(values)) == sorted([RUN, RUN, 3.0] * 2)
    assert len(run_sums(values[0])) == 3


def test_inputs_are_unchanged():
    a, c = vector(1, 2), vector(3, -1)
    slerp(a, c, 0.5)
    assert (a.tolist(), c.tolist()) == ([1, 2], [3, -1])


@pytest.mark.parametrize("t", [-0.1, 1.1, math.nan])
def test_t_outside_its_range_is_refused(t):
    with pytest.raises(ValueError, match=r"t must be in \[0, 1\]"):
        slerp(vector(1), vector(2), t)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        slerp(vector(1), vector(1, 2), 0.5)


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ([1.0], "one entry per model, got 1 for 2 models"),
        ([0.0, 1.0], "the first above 0"),
        ([1.0, -1.0], "weights must be >= 0"),
    ],
)
def test_weights_of_a_sequence_that_do_not_fit_are_refused(weights, text):
    with pytest.raises(ValueError, match=text):
        sequential_slerp([vector(1, 2), vector(3, 4)], weights)
