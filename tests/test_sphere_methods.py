"""The kin of SLERP: by rows and columns, of more models than two, one after the other."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import assert_near, families, tensor_lists, total

from linear_utils import linear
from slerp_utils import (
    gram,
    karcher,
    multislerp,
    nuslerp,
    row_grams,
    sequential_slerp,
    slerp,
)

VECTORS = {
    "tensor": {},
    "rows": {"flatten": False},
    "columns": {"flatten": False, "row_wise": True},
}
CHAIN = [[1, 0, 0], [0.6, 0.8, 0], [0, 0.6, 0.8]]


def tensors(*rows):
    return [torch.tensor(row, dtype=torch.float32) for row in rows]


def unit(x):
    return x.double() / x.double().norm()


def cosine(a, c):
    return float((unit(a) * unit(c)).sum())


def spread(a, c, **options):
    """How much the arc's multipliers enlarge rounding: the largest 1 / sin of an angle."""
    if not options or a.dim() < 2:
        a, c = a.flatten()[None], c.flatten()[None]
    elif "row_wise" in options:
        a, c = a.T, c.T
    cosines = [cosine(x, y) for x, y in zip(a, c, strict=True)]
    return 1 / math.sqrt(max(1e-30, 1 - max(map(abs, cosines)) ** 2))


# NuSLERP


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        ("tensor", [[0.26697041, 0.77351113], [0, 2.08096308]]),
        ("rows", [[0.38268343, 0.92387953], [0, 2]]),
        ("columns", [[0.38268343, 0.76198469], [0, 2.04118318]]),
    ],
)
def test_golden_g4_by_tensor_row_and_column(vectors, expected):
    a, c = tensors([[1, 0], [0, 2]], [[0, 1], [0, 2]])
    merged = nuslerp(a, c, [1, 3], **VECTORS[vectors])
    torch.testing.assert_close(merged, torch.tensor(expected))


def test_golden_g4_from_a_base():
    a, c = tensors([[2, 1], [1, 1]], [[1, 2], [1, 1]])
    merged = nuslerp(a, c, [1, 1], base=torch.ones(2, 2))
    torch.testing.assert_close(merged, torch.tensor([[1.70710678, 1.70710678], [1, 1]]))


@pytest.mark.parametrize("vectors", VECTORS)
@given(families(min_models=2, max_models=2), st.booleans())
def test_nuslerp_agrees_with_the_reference(vectors, family, has_base):
    a, c = family.models
    base = family.base if has_base else None
    moved = family.deltas if has_base else family.models
    enlarged = spread(*moved, **VECTORS[vectors])
    assume(enlarged < 100)
    merged = nuslerp(a, c, family.weights, base=base, **VECTORS[vectors])
    array, arrays = family.arrays
    origin = array if has_base else None
    expected = reference.nuslerp(*arrays, family.weights, origin, vectors)
    terms = enlarged * total([*family.models, family.base], [1, 1, has_base])
    assert_near(merged, expected, terms)


@given(families(min_models=2, max_models=2))
def test_nuslerp_is_slerp_where_that_takes_the_arc(family):
    a, c = family.models
    assume(abs(cosine(a, c)) < 0.999)
    t = family.weights[1] / sum(family.weights)
    assert torch.equal(nuslerp(a, c, family.weights), slerp(a, c, t))


def test_nuslerp_takes_the_arc_where_slerp_takes_the_line():
    a, c = tensors([1, 0], [1, 0.02])
    t, angle = 0.3, math.atan(0.02)
    assert torch.equal(slerp(a, c, t), linear([a, c], [0.7, 0.3], normalize=False))
    on_arc = [math.sin(share * angle) / math.sin(angle) for share in (1 - t, t)]
    merged = nuslerp(a, c, [1 - t, t])
    torch.testing.assert_close(merged, on_arc[0] * a + on_arc[1] * c, rtol=0, atol=1e-7)
    assert not torch.equal(merged, slerp(a, c, t))


def test_a_matrix_of_one_row_and_a_vector_are_one_vector():
    a, c = tensors([[1, 2, 0]], [[0, 1, -3]])
    whole = nuslerp(a, c, [1, 3])
    assert torch.equal(nuslerp(a, c, [1, 3], flatten=False), whole)
    for options in VECTORS.values():
        assert torch.equal(nuslerp(a[0], c[0], [1, 3], **options), whole[0])


def test_columns_are_the_rows_of_the_transposed():
    generator = torch.Generator().manual_seed(0)
    a, c = (torch.randn(5, 3, generator=generator) for _ in range(2))
    by_column = nuslerp(a, c, [1, 2], **VECTORS["columns"])
    torch.testing.assert_close(by_column.T, nuslerp(a.T, c.T, [1, 2], flatten=False))


@pytest.mark.parametrize("options", VECTORS.values())
def test_a_base_of_zeros_is_none(options):
    a, c = tensors([[1, 2], [3, -1]], [[0, 1], [2, 2]])
    merged = nuslerp(a, c, [1, 3], base=torch.zeros(2, 2), **options)
    assert torch.equal(merged, nuslerp(a, c, [1, 3], **options))


@pytest.mark.parametrize("options", VECTORS.values())
def test_zeros_and_identical_models_stay(options):
    a = torch.tensor([[0.3, -0.7], [0, 0]])
    torch.testing.assert_close(nuslerp(a, a, [1, 2], **options), a)


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1e-7, 1e-7]])
def test_weights_that_sum_to_nothing_mean_the_middle(weights):
    a, c = tensors([1, 0], [0, 2])
    assert torch.equal(nuslerp(a, c, weights), slerp(a, c, 0.5))


# The direction along the arc, the length apart


@given(tensor_lists(min_models=2, max_models=2), st.floats(0, 1), st.floats(0.1, 5))
def test_slerp_can_interpolate_the_length_apart(pair, t, factor):
    a, c = pair[0], factor * pair[1].flip(0)
    assume(abs(abs(cosine(a, c)) - 0.9995) > 1e-6 and cosine(a, c) > -0.99)
    merged = slerp(a, c, t, normalize=True)
    expected = reference.slerp_apart(a.numpy(), c.numpy(), t)
    enlarged = max(1, factor, 1 / factor) * min(spread(a, c), 1e2)
    assert_near(merged, expected, enlarged * total([a, c], [1, 1]))
    between = (1 - t) * float(a.norm()) + t * float(c.norm())
    assert float(merged.norm()) == pytest.approx(between, rel=1e-5)


def test_both_slerps_agree_on_models_of_one_length():
    a, c = tensors([3, 4, 0], [0, -5, 0])
    torch.testing.assert_close(slerp(a, c, 0.3, normalize=True), slerp(a, c, 0.3))


def test_a_tensor_of_zeros_has_a_length_to_interpolate():
    a, c = tensors([0, 0], [3, 4])
    torch.testing.assert_close(slerp(a, c, 0.25, normalize=True), c / 4)
    assert not slerp(a, a, 0.25, normalize=True).any()


# Multi-SLERP


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([1, 1], [2.47487373, 2.47487373]), ([0.75, 0.25], [3.08322072, 1.02774024])],
)
def test_golden_g5_multislerp(weights, expected):
    merged = multislerp(tensors([3, 0], [0, 4]), weights)
    torch.testing.assert_close(merged, torch.tensor(expected))


@given(families(min_models=1), st.booleans(), st.booleans())
def test_multislerp_agrees_with_the_reference(family, has_base, normalize):
    moved = family.deltas if has_base else family.models
    lengths = [float(x.norm()) for x in moved]
    assume(min(lengths) > 1e-3)
    shares = [w / sum(family.weights) for w in family.weights]
    mean = sum(w * unit(x) for w, x in zip(shares, moved, strict=True))
    assume(float(mean.norm()) > 0.05)
    base = family.base if has_base else None
    merged = multislerp(family.models, family.weights, base=base, normalize_weights=normalize)
    array, arrays = family.arrays
    origin = array if has_base else None
    expected = reference.multislerp(arrays, family.weights, origin, normalize)
    enlarged = max(lengths) / min(lengths) / float(mean.norm())
    scale = total([*family.models, family.base], [*([max(1, sum(family.weights))] * len(moved)), 1])
    assert_near(merged, expected, enlarged * scale)


@given(families(min_models=2))
def test_multislerp_is_as_long_as_the_models_on_average_and_ignores_their_order(family):
    shares = [w / sum(family.weights) for w in family.weights]
    lengths = [float(x.double().norm()) for x in family.models]
    mean = sum(w * unit(x) for w, x in zip(shares, family.models, strict=True) if x.any())
    assume(isinstance(mean, torch.Tensor) and float(mean.norm()) > 0.05)
    merged = multislerp(family.models, family.weights)
    wanted = math.fsum(share * length for share, length in zip(shares, lengths, strict=True))
    assert float(merged.double().norm()) == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(
        merged, multislerp(family.models[::-1], family.weights[::-1]), rtol=1e-5, atol=1e-6
    )


def test_two_equal_models_by_length_and_weight_meet_at_the_middle_of_the_arc():
    a, c = tensors([3, 4, 0], [0, 3, -4])
    middle = slerp(a, c, 0.5)
    torch.testing.assert_close(multislerp([a, c], [2, 2]), middle)
    torch.testing.assert_close(karcher([a, c], [2, 2]), middle)


def test_weights_that_are_not_normalized_change_the_length_alone():
    models = tensors([1, 2], [3, -1])
    plain = multislerp(models, [1, 3], normalize_weights=False)
    torch.testing.assert_close(plain, 4 * multislerp(models, [1, 3]))


def test_multislerp_from_a_base_merges_the_changes():
    base, *models = tensors([1, -1], [4, -1], [1, 3])
    merged = multislerp(models, [0.75, 0.25], base=base)
    torch.testing.assert_close(merged, torch.tensor([4.08322072, 0.02774024]))


def test_multislerp_of_one_model_is_that_model():
    base, model = tensors([1, -1], [4.1, 0.3])
    assert torch.equal(multislerp([model], [3]), model)
    assert torch.equal(multislerp([model], [3], base=base), model)


def test_two_opposite_models_give_the_weighted_sum_and_three_that_cancel_are_refused():
    a, c = tensors([1, 2], [-1, -2])
    torch.testing.assert_close(multislerp([a, 3 * c], [1, 1]), -a)
    third = 2 * math.pi / 3
    star = [torch.tensor([math.cos(k * third), math.sin(k * third)]) for k in range(3)]
    with pytest.raises(ValueError, match=r"the directions of the tensors cancel .* use linear"):
        multislerp(star, [1, 1, 1], eps=1e-6)


def test_a_tensor_of_zeros_shortens_the_mean_of_a_sphere_but_does_not_turn_it():
    model, zero = torch.tensor([3.0, 4.0]), torch.zeros(2)
    torch.testing.assert_close(multislerp([model, zero], [1, 1]), model / 2)
    torch.testing.assert_close(karcher([model, zero], [1, 1]), model / 2)
    assert not multislerp([zero, zero, zero], [1, 1, 1]).any()
    assert not karcher([zero, zero], [1, 1]).any()


# Karcher mean


@pytest.mark.parametrize(
    ("models", "options", "expected"),
    [
        ([[1, 0, 0], [0, 1, 0], [0, 0, 2]], {}, [0.76980036] * 3),
        (CHAIN, {}, [0.70226240, 0.60996249, 0.36711481]),
        (CHAIN, {"max_iter": 100, "tol": 1e-7}, [0.70226387, 0.60995791, 0.36711961]),
        ([[1, 0], [0, 2]], {}, [1.06066017, 1.06066017]),
    ],
)
def test_golden_g5_karcher(models, options, expected):
    merged = karcher(tensors(*models), [1] * len(models), **options)
    torch.testing.assert_close(merged, torch.tensor(expected), rtol=0, atol=3e-7)


@given(families(min_models=1), st.sampled_from([(10, 1e-5), (1, 1e-5), (50, 1e-7)]))
def test_karcher_agrees_with_the_reference_which_walks_with_vectors(family, limits):
    assume(min(float(x.norm()) for x in family.models) > 1e-3)
    assume(all(cosine(x, y) > 0.1 for x in family.models for y in family.models))
    merged = karcher(family.models, family.weights, max_iter=limits[0], tol=limits[1])
    expected = reference.karcher(family.arrays[1], family.weights, *limits)
    lengths = [float(x.norm()) for x in family.models]
    assert_near(merged, expected, max(lengths) / min(lengths) * total(family.models, family.weights)
                / min(1, sum(family.weights)))  # fmt: skip


def test_the_karcher_mean_is_where_the_pulls_of_the_models_cancel():
    generator = torch.Generator().manual_seed(3)
    models = [torch.rand(40, generator=generator) + 0.1 for _ in range(4)]
    weights = [0.5, 1.0, 2.0, 0.3]
    merged = karcher(models, weights, max_iter=60, tol=1e-7)
    mean = unit(merged).numpy()
    pulls = [
        weight * reference.towards(mean, unit(x).numpy(), 1e-9)
        for weight, x in zip(weights, models, strict=True)
    ]
    assert np.linalg.norm(sum(pulls)) < 1e-6
    wanted = sum(w * float(x.norm()) for w, x in zip(weights, models, strict=True)) / sum(weights)
    assert float(merged.norm()) == pytest.approx(wanted, rel=1e-6)


def test_the_karcher_mean_turns_with_the_models_and_ignores_their_order_and_scale():
    generator = torch.Generator().manual_seed(4)
    models = [torch.rand(6, generator=generator) for _ in range(3)]
    weights = [1.0, 2.0, 0.5]
    merged = karcher(models, weights, max_iter=50, tol=1e-7)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator))
    turned = karcher([turn @ x for x in models], weights, max_iter=50, tol=1e-7)
    torch.testing.assert_close(turned, turn @ merged, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        karcher(models[::-1], weights[::-1], max_iter=50, tol=1e-7), merged, rtol=1e-5, atol=1e-6
    )
    scaled = karcher([4 * x for x in models], [8 * w for w in weights], max_iter=50, tol=1e-7)
    torch.testing.assert_close(scaled, 4 * merged)


@pytest.mark.parametrize("merge", [multislerp, karcher, sequential_slerp])
@given(models=tensor_lists(max_models=1), count=st.integers(1, 4))
def test_a_model_merged_with_itself_stays(merge, models, count):
    merged = merge(models * count, [1.0, 0.3, 2.0, 0.7][:count])
    torch.testing.assert_close(merged, models[0], rtol=1e-6, atol=1e-7)


def test_a_model_of_weight_zero_does_not_pull():
    models = tensors([1, 0, 0], [0, 2, 0], [0, 0, 1])
    torch.testing.assert_close(karcher(models, [1, 1, 0]), karcher(models[:2], [1, 1]))


# One after the other


@given(families(min_models=2))
def test_sequential_slerp_agrees_with_the_reference(family):
    steps = reference.sequential_steps(family.weights)
    merged = family.arrays[1][0].astype(np.float64)
    for tensor, t in zip(family.arrays[1][1:], steps, strict=True):
        near = cosine(torch.from_numpy(merged), torch.from_numpy(tensor)) if merged.any() else 0
        assume(near > -0.99 and abs(near - 0.9995) > 1e-5)
        merged = reference.slerp(merged, tensor, t)
    got = sequential_slerp(family.models, family.weights)
    assert_near(got, merged, 30 * total(family.models, [1] * len(family.models)))


def test_each_row_has_a_gram_matrix_of_its_own():
    a, c = tensors([[1, 2], [0, 3]], [[0, 1], [1, 1]])
    assert row_grams([a, c]) == [[[5, 2], [2, 1]], [[9, 3], [3, 2]]]
    assert row_grams([a[0], c[0]]) == [gram([a[0], c[0]])]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: nuslerp(x, x, [1]), "one entry per model, got 1 for 2 models"),
        (lambda x: nuslerp(x, x, [1, -3]), r"must not have opposite signs, got \[1, -3\]"),
        (lambda x: nuslerp(x, x[:1], [1, 1]), r"one shape, got \(2,\) and \(1,\)"),
        (lambda x: nuslerp(x, x, [1, 1], base=x.half()), "must be float32, got torch.float16"),
        (lambda x: multislerp([x, x], [1]), "one entry per model, got 1 for 2 models"),
        (lambda x: multislerp([x, x], [1, -1]), r"must sum to more than 0, got \[1, -1\]"),
        (lambda x: multislerp([x], [-1]), r"must sum to more than 0, got \[-1\]"),
        (lambda x: multislerp([x, x], [1, 1], base=x[:1]), "one shape"),
        (lambda x: karcher([x, x], [1]), "one entry per model, got 1 for 2 models"),
        (lambda x: karcher([x, x], [1, -0.5]), "must be >= 0 and one above 0"),
        (lambda x: karcher([x, x], [0, 0]), "must be >= 0 and one above 0"),
        (lambda x: karcher([], []), "at least one entry"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call(torch.ones(2))
