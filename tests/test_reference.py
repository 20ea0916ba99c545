"""The oracle against numbers worked out by hand or published; they stand in the tests."""

from collections.abc import Sequence

import numpy as np
import pytest
import reference
from numpy.typing import ArrayLike

A = [4, -1, 3, 0.5, -2]
B = [-1, 2, -3, 1, -4]
ZEROS = [0.0] * 5
EIGHTHS = [i / 8 for i in range(1, 9)]
UP_PROJ = "model.layers.0.mlp.up_proj.weight"


def assert_close(got: ArrayLike, expected: ArrayLike, tolerance: float = 1e-6) -> None:
    """Elementwise within an absolute tolerance, shapes equal."""
    assert np.shape(got) == np.shape(expected)
    distance = np.abs(np.asarray(got, np.float64) - np.asarray(expected, np.float64))
    assert np.max(distance) <= tolerance, f"{got!r} is not {expected!r}"


def bits(mask: ArrayLike) -> str:
    """A mask as a string of 0 and 1."""
    return "".join(str(int(keep)) for keep in np.asarray(mask))


# Linear and task arithmetic


def test_linear_divides_by_the_summed_weights() -> None:
    assert_close(reference.linear([[1, 2], [5, 6]], [1, 3]), [4, 5])
    assert_close(reference.linear([[1, 2], [5, 6]], [1, 3], normalize=False), [16, 20])


def test_sequential_lerp_is_linear() -> None:
    tensors, weights = [[1, 2], [3, 5], [7, 11]], [1, 2, 3]
    assert_close(reference.sequential_lerp(tensors, weights), [4.6666667, 7.5])
    assert_close(reference.linear(tensors, weights), [4.6666667, 7.5])


@pytest.mark.parametrize("weights", [[1, -1], [0, 0]])
def test_linear_refuses_weights_that_cancel(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights must not sum to 0"):
        reference.linear([[1], [2]], weights)


def test_a_weight_of_zero_leaves_a_tensor_out() -> None:
    assert_close(reference.linear([[1, 2], [np.inf, np.nan]], [2, 0]), [1, 2])


def test_task_arithmetic_adds_scaled_changes() -> None:
    tensors = [[2, 1], [1, 0]]
    assert_close(reference.task_arithmetic([1, 1], tensors, [1, 2], lam=0.5), [1.5, 0])
    normalized = reference.task_arithmetic([1, 1], tensors, [1, 3], normalize=True)
    assert_close(normalized, [1.25, 0.25])


# Slerp


@pytest.mark.parametrize(
    ("a", "c", "t", "expected"),
    [
        ([1, 0], [0, 2], 0.5, [0.70710678, 1.41421356]),
        ([1, 0], [0, 2], 0.25, [0.92387953, 0.76536686]),
        ([1, 0], [0.5, 0.8660254], 1 / 3, [0.93969262, 0.34202014]),
        ([1, 0], [1, 0.01], 0.5, [1, 0.005]),
        ([1, 0], [-1, 0], 0.5, [0, 0]),
        ([1, 0], [-1, 0.01], 0.5, [0, 0.005]),
        ([0, 0], [3, 4], 0.5, [2.12132034, 2.82842712]),
        ([0, 0], [3, 4], 0.25, [1.1480503, 1.5307337]),
    ],
)
def test_slerp(a: list[float], c: list[float], t: float, expected: list[float]) -> None:
    assert_close(reference.slerp(a, c, t), expected)


def test_slerp_ends_at_the_models() -> None:
    assert_close(reference.slerp([1, 0], [0, 2], 0), [1, 0], tolerance=4e-16)
    assert_close(reference.slerp([1, 0], [0, 2], 1), [0, 2], tolerance=4e-16)


def test_sequential_slerp_depends_on_the_order() -> None:
    rows = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    steps = [1 / 2, 1 / 3]
    assert_close(reference.sequential_slerp(rows, steps), [0.61237244, 0.61237244, 0.5])
    assert_close(reference.sequential_slerp(rows[::-1], steps), [0.5, 0.61237244, 0.61237244])


# TIES


def test_trim_keeps_the_largest() -> None:
    assert_close(reference.trim(A, 0.6), [4, 0, 3, 0, -2])
    assert_close(reference.trim(B, 0.6), [0, 2, -3, 0, -4])


def test_trim_keeps_the_first_of_equals() -> None:
    kept = reference.trim([1, -1, 0.5, 1, -2, 0, 1], 3 / 7)
    assert_close(kept, [1, -1, 0, 0, -2, 0, 0])
    assert_close(reference.trim([[1, 1], [1, 1]], 0.5), [[1, 1], [0, 0]])


@pytest.mark.parametrize(
    ("n", "density", "count"),
    [(100, 0.29, 28), (3, 0.1, 1), (3, 0.0, 0), (3, 1.0, 3), (100, 0.999, 99)],
)
def test_trim_counts_as_float64_does(n: int, density: float, count: int) -> None:
    assert np.count_nonzero(reference.trim(np.arange(1, n + 1), density)) == count


@pytest.mark.parametrize(
    ("weights", "density", "lam", "normalize", "expected"),
    [
        ([1, 1], 0.6, 1, True, [4, 2, 3, 0, -3]),
        ([1, 1], 0.6, 1, False, [4, 2, 3, 0, -6]),
        ([2, 1], 0.6, 1, True, [4, 2, 3, 0, -2.66666667]),
        ([2, 1], 0.6, 1, False, [8, 2, 6, 0, -8]),
        ([1, 1], 1.0, 1, True, [4, 2, 3, 0.75, -3]),
        ([1, 1], 1.0, 0.5, True, [2, 1, 1.5, 0.375, -1.5]),
    ],
)
def test_ties(
    weights: list[float], density: float, lam: float, normalize: bool, expected: list[float]
) -> None:
    densities = [density, density]
    merged = reference.ties(ZEROS, [A, B], weights, densities, lam=lam, normalize=normalize)
    assert_close(merged, expected)


@pytest.mark.parametrize(
    ("tensors", "weights", "normalize", "expected"),
    [
        ([[3, 1], [-1, 1], [-1, -3]], [1, 1, 1], True, [3, -3]),
        ([[3], [-2]], [1, 2], True, [-2]),
        ([[3, 1]], [-1], True, [3, 1]),
        ([[3, 1]], [-1], False, [-3, -1]),
        ([[3], [-1]], [1, -1], True, [4]),
    ],
)
def test_ties_elects_by_weighted_mass(
    tensors: list[list[float]], weights: list[float], normalize: bool, expected: list[float]
) -> None:
    base, densities = [0.0] * len(expected), [1.0] * len(tensors)
    merged = reference.ties(base, tensors, weights, densities, normalize=normalize)
    assert_close(merged, expected)


def test_steps_merge_as_other_implementations_do() -> None:
    deltas = [reference.trim(A, 0.6), reference.trim(B, 0.6)]
    by_mass = reference.elect_sign(deltas[0] + deltas[1])
    assert_close(by_mass, [1, 1, 1, 1, -1])
    by_count = reference.disjoint_merge(deltas, [2, 1], by_mass, "count")
    assert_close(by_count, [8, 2, 6, 0, -4])
    deltas = [np.array(row, float) for row in ([3, 1], [-1, 1], [-1, -3])]
    votes = np.array([-1.0, 1.0])
    assert_close(reference.disjoint_merge(deltas, [1, 1, 1], votes, "count"), [-1, 1])


def test_ties_trims_differences_rounded_to_float32() -> None:
    base, tensor = [1.0, 1.0], [1 + 1e-3, 1 + 1.00001e-3]
    assert np.float32(tensor[0]) == np.float32(tensor[1])
    assert_close(reference.ties(base, [tensor], [1], [0.5]), [1 + 1e-3, 1])


# DARE


def test_the_mask_key_and_the_first_draws() -> None:
    key = [f"{int(word):016x}" for word in reference.mask_key(42, "0", UP_PROJ)]
    assert key == ["56716f7037a6c786", "86777c0fd21c4e2b"]
    draws = " ".join(f"{int(draw):08x}" for draw in reference.mask_draws(42, "0", UP_PROJ, 8))
    assert draws == "0c48b05a a875cc5f 1be873a4 397b43bd 8f758618 1848a464 078157be b0b33ced"


def test_numpy_is_the_generator_that_was_specified() -> None:
    words = np.random.Philox(key=0, counter=0).random_raw(4)
    assert [f"{int(word):016x}" for word in words] == [
        "02f4ba6408e4d89b",
        "3dd62b0b9ca8c5b2",
        "1c8667a55d902e79",
        "907d7a052fd5b4dc",
    ]


@pytest.mark.parametrize(
    ("tag", "name", "n", "density", "expected"),
    [
        ("0", UP_PROJ, 16, 0.5, "1011011001111001"),
        ("0", UP_PROJ, 16, 0.1, "1000011001000000"),
        ("0", UP_PROJ, 5, 0.5, "10110"),
        ("0", "w", 6, 0.5, "111001"),
        ("1", "w", 6, 0.5, "110011"),
        ("1", "w", 6, 1.0, "111111"),
        ("1", "w", 6, 0.0, "000000"),
    ],
)
def test_keep_mask(tag: str, name: str, n: int, density: float, expected: str) -> None:
    assert bits(reference.keep_mask(42, tag, name, n, density)) == expected


def test_another_purpose_is_another_mask() -> None:
    masks = [bits(reference.keep_mask(42, "0", "w", 64, 0.5, p)) for p in ("mask", "noise")]
    assert masks[0] != masks[1]


@pytest.mark.parametrize(
    ("rescale", "expected"),
    [
        ("inverse_density", [0.25, 0, 0.75, 1, 0, 1.5, 1.75, 0]),
        ("l1", [0.21428571, 0, 0.64285714, 0.85714286, 0, 1.28571429, 1.5, 0]),
        ("none", [0.125, 0, 0.375, 0.5, 0, 0.75, 0.875, 0]),
    ],
)
def test_dare_rescales_what_is_left(rescale: reference.Rescale, expected: list[float]) -> None:
    merged = reference.dare([0] * 8, [EIGHTHS], [1], [0.5], 1.0, 42, UP_PROJ, rescale=rescale)
    assert_close(merged, expected)


@pytest.mark.parametrize(
    ("elect", "normalize", "expected"),
    [
        (False, False, [3, -1, 1, 0, 2, -1]),
        (False, True, [3, -1, 1, 0, 2, -1]),
        (True, False, [3, -2, 1, 0, 2, -2]),
        (True, True, [3, -4, 2, 0, 4, -4]),
    ],
)
def test_dare_linear_and_dare_ties(elect: bool, normalize: bool, expected: Sequence[float]) -> None:
    tensors = [[1] * 6, [2, -2] * 3]
    half = [0.5, 0.5]
    merged = reference.dare(
        [0] * 6, tensors, half, half, 1.0, 42, "w", elect=elect, normalize=normalize
    )
    assert_close(merged, expected)


@pytest.mark.parametrize("rescale", ["inverse_density", "l1", "none"])
def test_dare_at_density_one_keeps_all_and_at_zero_nothing(rescale: reference.Rescale) -> None:
    merge = [
        reference.dare([1, 1], [[2, 3]], [1], [density], 1.0, 0, "w", rescale=rescale)
        for density in (1.0, 0.0)
    ]
    assert_close(merge, [[2, 3], [1, 1]])
