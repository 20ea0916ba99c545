"""The oracle against numbers worked out by hand or published; they stand in the tests."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import reference
import reference_task_vectors as entries
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


def test_golden_g1_linear_divides_by_the_summed_weights() -> None:
    assert_close(reference.linear([[1, 2], [5, 6]], [1, 3]), [4, 5])
    assert_close(reference.linear([[1, 2], [5, 6]], [1, 3], normalize=False), [16, 20])


def test_golden_g1_sequential_lerp_is_linear() -> None:
    tensors, weights = [[1, 2], [3, 5], [7, 11]], [1, 2, 3]
    assert_close(reference.sequential_lerp(tensors, weights), [4.6666667, 7.5])
    assert_close(reference.linear(tensors, weights), [4.6666667, 7.5])


@pytest.mark.parametrize("weights", [[1, -1], [0, 0]])
def test_linear_refuses_weights_that_cancel(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights must not sum to 0"):
        reference.linear([[1], [2]], weights)


def test_a_weight_of_zero_leaves_a_tensor_out() -> None:
    assert_close(reference.linear([[1, 2], [np.inf, np.nan]], [2, 0]), [1, 2])


def test_golden_g2_task_arithmetic_adds_scaled_changes() -> None:
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
def test_golden_g3_slerp(a: list[float], c: list[float], t: float, expected: list[float]) -> None:
    assert_close(reference.slerp(a, c, t), expected)


def test_golden_g3_slerp_ends_at_the_models() -> None:
    assert_close(reference.slerp([1, 0], [0, 2], 0), [1, 0], tolerance=4e-16)
    assert_close(reference.slerp([1, 0], [0, 2], 1), [0, 2], tolerance=4e-16)


def test_golden_g7_sequential_slerp_depends_on_the_order() -> None:
    rows = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    steps = [1 / 2, 1 / 3]
    assert_close(reference.sequential_slerp(rows, steps), [0.61237244, 0.61237244, 0.5])
    assert_close(reference.sequential_slerp(rows[::-1], steps), [0.5, 0.61237244, 0.61237244])


def test_slerp_can_interpolate_the_length_apart() -> None:
    root = math.sqrt(0.5)
    assert_close(reference.slerp_apart([1, 0], [0, 3], 0.5), [2 * root, 2 * root])
    assert_close(reference.slerp_apart([1, 0], [0, 3], 1), [0, 3])
    assert_close(reference.slerp_apart([1, 0], [3, 0], 0.25), [1.5, 0])
    assert_close(reference.slerp_apart([0, 0], [0, 3], 0.25), [0, 0.75])


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        ("tensor", [[0.26697041, 0.77351113], [0, 2.08096308]]),
        ("rows", [[0.38268343, 0.92387953], [0, 2]]),
        ("columns", [[0.38268343, 0.76198469], [0, 2.04118318]]),
    ],
)
def test_golden_g4_nuslerp(vectors: str, expected: list[list[float]]) -> None:
    a, c = [[1, 0], [0, 2]], [[0, 1], [0, 2]]
    assert_close(reference.nuslerp(a, c, [1, 3], vectors=vectors), expected)


def test_golden_g4_nuslerp_from_a_base() -> None:
    merged = reference.nuslerp([[2, 1], [1, 1]], [[1, 2], [1, 1]], [1, 1], np.ones((2, 2)))
    assert_close(merged, [[1.70710678, 1.70710678], [1, 1]])


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([1, 1], [2.47487373, 2.47487373]), ([0.75, 0.25], [3.08322072, 1.02774024])],
)
def test_golden_g5_multislerp(weights: list[float], expected: list[float]) -> None:
    assert_close(reference.multislerp([[3, 0], [0, 4]], weights), expected)
    moved = reference.multislerp([[4, 1], [1, 5]], weights, [1, 1])
    assert_close(moved, np.add(expected, 1))
    fourfold = reference.multislerp(
        [[3, 0], [0, 4]], [4 * w / sum(weights) for w in weights], normalize_weights=False
    )
    assert_close(fourfold, np.multiply(expected, 4))


def test_opposite_vectors_give_the_weighted_sum() -> None:
    assert_close(reference.multislerp([[1, 2], [-3, -6]], [1, 1]), [-1, -2])


@pytest.mark.parametrize(
    ("rows", "limits", "expected"),
    [
        ([[1, 0, 0], [0, 1, 0], [0, 0, 2]], (10, 1e-5), [0.76980036] * 3),
        (
            [[1, 0, 0], [0.6, 0.8, 0], [0, 0.6, 0.8]],
            (10, 1e-5),
            [0.70226240, 0.60996249, 0.36711481],
        ),
        (
            [[1, 0, 0], [0.6, 0.8, 0], [0, 0.6, 0.8]],
            (100, 1e-12),
            [0.70226387, 0.60995791, 0.36711961],
        ),
        ([[1, 0], [0, 2]], (10, 1e-5), [1.06066017, 1.06066017]),
        ([[3, 4], [0, 0]], (10, 1e-5), [1.5, 2]),
    ],
)
def test_golden_g5_karcher(
    rows: list[list[float]], limits: tuple[int, float], expected: list[float]
) -> None:
    merged = reference.karcher(rows, [1] * len(rows), *limits)
    assert_close(merged, expected, tolerance=1e-8)


SLANTED = [[2, 1, 1], [2, 2, 1], [2, 2, 2]]


@pytest.mark.parametrize(
    ("models", "average", "expected"),
    [
        ([[2, 1], [1.5, 1.5]], "cosine", [1.62132034, 1.20710678]),
        (SLANTED, "cosine", [1.87516552, 1.58344368, 1.29172184]),
        (SLANTED, "angle", [1.87867966, 1.58578644, 1.29289322]),
        ([[2, 1], [0, 1]], "cosine", [1, 1]),
    ],
)
def test_golden_g6_model_stock(
    models: list[list[float]], average: str, expected: list[float]
) -> None:
    base = [1] * len(expected)
    assert_close(reference.model_stock(base, models, average=average), expected)


def test_golden_g6_model_stock_by_row_and_by_tensor() -> None:
    models = [[[1, 0], [1, 0]], [[1, 0], [0, 1]]]
    base = np.zeros((2, 2))
    assert_close(reference.model_stock(base, models, filter_wise=True), [[1, 0], [0, 0]])
    assert_close(reference.model_stock(base, models), [[2 / 3, 0], [1 / 3, 1 / 3]])


def test_golden_g6_a_norm_floor_and_the_clamp() -> None:
    small = [np.array([5e-4, 0.0])] * 2
    assert reference.stock_ratio(small) == pytest.approx(1)
    assert reference.stock_ratio(small, norm_floor=1e-6) == pytest.approx(0.4)
    opposed = [np.array([1.0, 0.0]), np.array([-0.5, math.sqrt(0.75)])]
    assert reference.stock_ratio(opposed) == 0
    assert reference.stock_ratio(opposed, clamp=False) == pytest.approx(-2)


# One model


def test_golden_g13_nearswap_and_passthrough() -> None:
    assert_close(reference.nearswap([0, 1], [0.5, 1.1], 0.1), [0.1, 1.1])
    assert_close(reference.nearswap([0, 1], [0.5, 1.1], 0), [0, 1])
    assert_close(reference.scale([2, -1], 0.5), [1, -0.5])
    assert_close(reference.scale([2, -1], None), [2, -1])


# TIES


def test_golden_g8_trim_keeps_the_largest() -> None:
    assert_close(reference.trim(A, 0.6), [4, 0, 3, 0, -2])
    assert_close(reference.trim(B, 0.6), [0, 2, -3, 0, -4])


def test_golden_g11_trim_keeps_the_first_of_equals() -> None:
    kept = reference.trim([1, -1, 0.5, 1, -2, 0, 1], 3 / 7)
    assert_close(kept, [1, -1, 0, 0, -2, 0, 0])
    assert_close(reference.trim([[1, 1], [1, 1]], 0.5), [[1, 1], [0, 0]])


@pytest.mark.parametrize(
    ("n", "density", "count"),
    [(100, 0.29, 28), (3, 0.1, 1), (3, 0.0, 0), (3, 1.0, 3), (100, 0.999, 99)],
)
def test_golden_g11_trim_counts_as_float64_does(n: int, density: float, count: int) -> None:
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
def test_golden_g8_ties(
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
def test_golden_g8_ties_elects_by_weighted_mass(
    tensors: list[list[float]], weights: list[float], normalize: bool, expected: list[float]
) -> None:
    base, densities = [0.0] * len(expected), [1.0] * len(tensors)
    merged = reference.ties(base, tensors, weights, densities, normalize=normalize)
    assert_close(merged, expected)


def test_golden_g8_steps_merge_as_other_implementations_do() -> None:
    deltas = [reference.trim(A, 0.6), reference.trim(B, 0.6)]
    by_mass = reference.elect_sign(deltas[0] + deltas[1])
    assert_close(by_mass, [1, 1, 1, 1, -1])
    by_count = reference.disjoint_merge(deltas, [2, 1], by_mass, "count")
    assert_close(by_count, [8, 2, 6, 0, -4])
    deltas = [np.array(row, float) for row in ([3, 1], [-1, 1], [-1, -3])]
    votes = np.array([-1.0, 1.0])
    assert_close(reference.disjoint_merge(deltas, [1, 1, 1], votes, "count"), [-1, 1])


@pytest.mark.parametrize(
    ("weights", "expected"), [([1, 1], [4, 2, 3, 0, -3]), ([2, 1], [8, 2, 6, 0, -4])]
)
def test_golden_g8_ties_as_in_peft(weights: list[float], expected: list[float]) -> None:
    merged = reference.ties(
        ZEROS, [A, B], weights, [0.6, 0.6], denominator="count", elect_on="unweighted"
    )
    assert_close(merged, expected)


@pytest.mark.parametrize(
    ("denominator", "expected"), [("count", [4, 2, 3, 1, -3]), ("none", [4, 2, 3, 1, -6])]
)
def test_golden_g8_ties_as_in_the_paper(
    denominator: reference.Denominator, expected: list[float]
) -> None:
    assert_close(reference.trim(A, 0.6, "paper", all_ties=True), [4, -1, 3, 0, -2])
    assert_close(reference.trim(B, 0.6, "paper", all_ties=True), B)
    merged = reference.ties(
        ZEROS,
        [A, B],
        [1, 1],
        [0.6, 0.6],
        trim_ties="all",
        k_rule="paper",
        elect_on="unweighted",
        denominator=denominator,
    )
    assert_close(merged, expected)


def test_golden_g8_votes_by_head_and_unweighted() -> None:
    models = [[3, 1], [-1, 1], [-1, -3]]
    assert_close(reference.ties([0, 0], models, [1] * 3, [1] * 3, elect_method="count"), [-1, 1])
    merged = reference.ties([0], [[3], [-2]], [1, 2], [1, 1], elect_on="unweighted")
    assert_close(merged, [3])


@pytest.mark.parametrize(("zero", "expected"), [(1, [2, 0]), (-1, [-2, 0]), (0, [0, 0])])
def test_votes_that_balance_go_to_the_given_sign(zero: float, expected: list[float]) -> None:
    merged = reference.ties([0, 0], [[2, 0], [-2, 0]], [1, 1], [1, 1], zero=zero)
    assert_close(merged, expected)


def test_the_majority_is_that_of_all_signs() -> None:
    signs = [reference.elect_sign(np.array(mass), 0) for mass in ([3.0, -0.1, 0.0], [-5.0, -1.0])]
    assert_close(signs[0], [1, -1, 0])
    assert reference.majority(signs) == -1
    assert reference.majority(signs[:1]) == 0


def test_ties_trims_rows_and_whole_models() -> None:
    delta = [[4, 3], [1, 2]]
    merged = reference.ties(np.zeros((2, 2)), [delta], [1], [0.5], trim_scope="row")
    assert_close(merged, [[4, 0], [0, 2]])
    trimmed = reference.trim_model([[1, 2], delta], 0.5)
    assert_close(trimmed[0], [0, 2])
    assert_close(trimmed[1], [[4, 3], [0, 0]])


def test_ties_can_restore_the_norm() -> None:
    merged = reference.ties(ZEROS, [A], [1], [0.6], rescale="l1")
    assert_close(merged, np.multiply([4, 0, 3, 0, -2], 10.5 / 9))


def test_ties_trims_differences_rounded_to_float32() -> None:
    base, tensor = [1.0, 1.0], [1 + 1e-3, 1 + 1.00001e-3]
    assert np.float32(tensor[0]) == np.float32(tensor[1])
    assert_close(reference.ties(base, [tensor], [1], [0.5]), [1 + 1e-3, 1])


# DARE


def test_golden_g9_the_mask_key_and_the_first_draws() -> None:
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
def test_golden_g9_keep_mask(tag: str, name: str, n: int, density: float, expected: str) -> None:
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
def test_golden_g9_dare_rescales_what_is_left(
    rescale: reference.Rescale, expected: list[float]
) -> None:
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
def test_golden_g9b_dare_linear_and_dare_ties(
    elect: bool, normalize: bool, expected: Sequence[float]
) -> None:
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


# DELLA


@pytest.mark.parametrize(
    ("rescale", "expected"),
    [
        (
            "inverse_prob",
            [0.41666667, 0, 0.90517241, 1.06060606, 0, 1.2804878, 1.36111111, 1.42857143],
        ),
        ("l1", [0.15517241, 0, 0.46551724, 0.62068966, 0, 0.93103448, 1.0862069, 1.24137931]),
        ("none", [0.125, 0, 0.375, 0.5, 0, 0.75, 0.875, 1]),
    ],
)
@pytest.mark.parametrize("elect", [False, True])
def test_golden_g9_della(rescale: entries.RankRescale, expected: list[float], elect: bool) -> None:
    one = ([1], [0.5], [0.2], 1.0, 42, UP_PROJ)
    merged = entries.della([0] * 8, [EIGHTHS], *one, rescale=rescale, elect=elect)
    assert_close(merged, expected)


def test_golden_g9_della_chances() -> None:
    assert_close(entries.keep_chances([0.3, -0.1, 0.2, -0.5, 0.4], 0.5, 0.2),
                 [0.5, 0.3, 0.4, 0.7, 0.6])  # fmt: skip
    by_index = entries.keep_chances(EIGHTHS, 0.5, 0.2)
    assert_close(by_index[[0, 1, 6, 7]], [0.3, 0.35714286, 0.64285714, 0.7])
    assert_close(entries.keep_chances([1, 1, 1], 0.5, 0.2), [0.3, 0.5, 0.7])
    assert_close(entries.keep_chances([3], 0.5, 0.2), [0.5])


def test_della_ranks_each_row_on_its_own() -> None:
    base, tensor = np.zeros((2, 4)), [[1, 2, 3, 4], [40, 30, 20, 10]]
    limits = [0.3, 1.3 / 3, 1.7 / 3, 0.7]
    draws = reference.mask_draws(42, "0", "w", 8) / 2**32
    merged = entries.della(base, [tensor], [1], [0.5], [0.2], 1.0, 42, "w", rescale="none")
    kept = [*(draws[:4] < limits), *(draws[4:] < limits[::-1])]
    assert_close(merged.ravel() != 0, kept)


# Breadcrumbs

TENTHS = [0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8, 0.9, -1]


@pytest.mark.parametrize(
    ("density", "gamma", "shrink", "kept"),
    [
        (0.6, 0.2, True, range(2, 8)),
        (0.9, 0.3, True, range(9)),
        (0.9, 0.3, False, range(7)),
        (0.6, 0, True, range(4, 10)),
        (1, 0.3, True, range(10)),
        (0, 0.3, True, []),
    ],
)
def test_golden_g10_breadcrumbs(
    density: float, gamma: float, shrink: bool, kept: Sequence[int]
) -> None:
    expected = [x if i in kept else 0 for i, x in enumerate(TENTHS)]
    shares = ([1], [density], [gamma])
    assert_close(entries.breadcrumbs([0] * 10, [TENTHS], *shares, shrink=shrink), expected)


def test_breadcrumbs_drop_the_first_of_equals_below_and_the_last_above() -> None:
    middle = entries.keep_middle([1, -1, 1, 2, -2, 2], 0.5, 1 / 3)
    assert_close(middle, [0, -1, 1, 2, 0, 0])


def test_breadcrumbs_by_row_and_elected() -> None:
    models = [[[1, 2, 3], [6, 5, 4]], [[-4, -2, 3], [6, 5, 9]]]
    third = [0.34, 0.34]
    by_row = entries.breadcrumbs(
        np.zeros((2, 3)), models, [1, 2], third, third, trim_scope="row", elect=True
    )
    assert_close(by_row, [[0, 2, 6], [12, 5, 0]])


# SCE


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [2, 1, 1, 3]),
        ({"select_topk": 0.67}, [2, 0, 0, 3]),
        ({"select_topk": 0.67, "sce_mask": "weights_only"}, [2, 1, 1, 3]),
        ({"select_topk": 0}, [0, 0, 0, 0]),
    ],
)
def test_golden_g12_sce(options: dict[str, float], expected: list[float]) -> None:
    assert_close(entries.sce([0] * 4, [[2, 0, 1, -1], [0, 1, 1, 3]], **options), expected)


def test_golden_g12_sce_weights_models_by_their_squares() -> None:
    # Squares 6 and 11 give the weights .35294118 and .64705882.
    merged = entries.sce([0] * 4, [[2, 1, 1, 0], [0, 1, 1, 3]])
    assert_close(merged, [2, 1, 1, 3])
    merged = entries.sce([0] * 4, [[1, 1, 2, 0], [3, 1, 0, 1]])
    assert_close(merged[0], 0.35294118 * 1 + 0.64705882 * 3)
    merged = entries.sce([0] * 2, [[1e-4, 0], [3e-4, 0]], sce_floor=1e-6)
    assert_close(merged, [2e-4, 0], tolerance=1e-10)


# RAM, consensus, Arcee Fusion


def test_golden_g13_ram() -> None:
    changes = [[1, 0, 2], [0, 0, 4]]
    assert_close(entries.ram([0] * 3, changes), [1, 0, 3])
    assert_close(entries.ram([0] * 3, changes, plus=(0.1, 0.2)), [1.02, 0, 3])
    assert_close(entries.ram([0] * 3, changes, epsilon=2), [0, 0, 4])


def test_consensus_keeps_what_matters_to_enough_models() -> None:
    changes = [[1, 1, 0], [1, 0.1, 2]]
    for agreement, expected in ((1, [2, 1.1, 2]), (2, [2, 0, 0]), (3, [0, 0, 0])):
        merged = entries.consensus([0] * 3, changes, [1, 1], [0.4, 0.4], agreement)
        assert_close(merged, expected)


def test_consensus_of_ties_looks_at_whole_changes() -> None:
    changes, half = [[4, 1, -3, 0.5], [2, 3, 3, 1]], [0.5, 0.5]
    for factor, expected in ((0.4, [4, 3, 3, 0]), (0.6, [4, 0, 0, 0])):
        merged = entries.consensus([0] * 4, changes, [1, 1], [factor] * 2, densities=half)
        assert_close(merged, expected)


def test_arcee_fusion_takes_what_stands_out() -> None:
    base, tensor = [[0.0, 0.0]], [[0.0, math.log(3)]]
    divergence = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert_close(entries.importance(base, tensor), [[0, math.log(3) * divergence]])
    assert entries.fusion_threshold(np.array([6, 1, 2, 3, 5, 4.0])) == 3 + 1.5 * (4 - 2)
    tensor = [[0, 0.1, 0.2, 0.3, 3], [0.1] * 5]
    fused = entries.arcee_fusion(np.zeros((2, 5)), tensor)
    assert_close(fused, [[0, 0, 0.2, 0.3, 3], [0] * 5])
