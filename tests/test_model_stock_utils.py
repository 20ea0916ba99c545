import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_near, families, total

from linear_utils import linear
from model_stock_utils import model_stock

SLANTED = [[2, 1, 1], [2, 2, 1], [2, 2, 2]]


def tensors(*rows):
    return [torch.tensor(row, dtype=torch.float32) for row in rows]


@pytest.mark.parametrize(
    ("models", "options", "expected"),
    [
        ([[2, 1], [1.5, 1.5]], {}, [1.62132034, 1.20710678]),
        (SLANTED, {}, [1.87516552, 1.58344368, 1.29172184]),
        (SLANTED, {"average": "angle"}, [1.87867966, 1.58578644, 1.29289322]),
        ([[2, 1], [0, 1]], {}, [1, 1]),
        ([[2, 1], [0, 1]], {"clamp": False}, [1, 1]),
        ([[1 + 2**-11, 1]] * 2, {}, [1 + 2**-11, 1]),
        ([[1 + 2**-11, 1]] * 2, {"norm_floor": 2**-20}, [1 + 0.4 * 2**-11, 1]),
    ],
)
def test_golden_g6(models, options, expected):
    base = torch.ones(len(expected))
    merged = model_stock(base, tensors(*models), **options)
    wanted = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(merged, wanted, rtol=0, atol=2e-7)


@pytest.mark.parametrize(
    ("filter_wise", "expected"),
    [(True, [[1, 0], [0, 0]]), (False, [[0.66666667, 0], [0.33333333, 0.33333333]])],
)
def test_golden_g6_by_row_and_by_tensor(filter_wise, expected):
    models = tensors([[1, 0], [1, 0]], [[1, 0], [0, 1]])
    merged = model_stock(torch.zeros(2, 2), models, filter_wise=filter_wise)
    torch.testing.assert_close(merged, torch.tensor(expected, dtype=torch.float32))


@given(
    families(min_models=2),
    st.booleans(),
    st.sampled_from(["cosine", "angle"]),
    st.sampled_from([0.0, 1e-2]),
)
def test_agrees_with_the_reference(family, filter_wise, average, floor):
    options = {"filter_wise": filter_wise, "average": average, "norm_floor": floor}
    merged = model_stock(family.base, family.models, **options)
    array, arrays = family.arrays
    expected = reference.model_stock(array, arrays, **options)
    # The multipliers feel the rounding of differences to float32 where these are small.
    scale = family.base.abs() + 10 * total(family.models, [1] * len(family.models))
    assert_near(merged, expected, scale)


@given(families(min_models=2), st.booleans())
def test_identical_models_are_the_result(family, filter_wise):
    merged = model_stock(family.base, family.models[:1] * 3, filter_wise=filter_wise)
    torch.testing.assert_close(merged, family.models[0], rtol=0, atol=2**-20)


@given(families(min_models=2))
def test_the_result_lies_between_the_base_and_the_mean_whatever_the_order(family):
    merged = model_stock(family.base, family.models)
    mean = linear(family.models, [1] * len(family.models))
    margin = 8 * 2**-24 * total([family.base, *family.models], [1] * (len(family.models) + 1))
    assert (merged >= torch.minimum(mean, family.base) - margin).all()
    assert (merged <= torch.maximum(mean, family.base) + margin).all()
    assert ((model_stock(family.base, family.models[::-1]) - merged).abs() <= margin).all()


def test_changes_at_right_angles_leave_the_base():
    base = torch.tensor([0.5, -1.0, 2.0])
    assert torch.equal(model_stock(base, list(base + torch.eye(3))), base)
    assert torch.equal(model_stock(base, [base, base]), base)


def test_changes_of_one_direction_give_the_mean_however_long_they_are():
    base, change = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -0.25])
    models = [base + change, base + 3 * change]
    torch.testing.assert_close(model_stock(base, models), base + 2 * change)


def test_the_scale_of_all_changes_goes_through_unless_there_is_a_floor():
    zero, models = torch.zeros(2), tensors([1, 0.5], [0.25, 1])
    small = [2**-12 * x for x in models]
    assert torch.equal(model_stock(zero, small), 2**-12 * model_stock(zero, models))
    floored = model_stock(zero, small, norm_floor=1e-6)
    assert (floored < 2**-12 * model_stock(zero, models)).all()


def test_every_row_is_merged_as_if_alone():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 7, generator=generator)
    models = [base + torch.rand(4, 7, generator=generator) for _ in range(3)]
    merged = model_stock(base, models, filter_wise=True)
    for row in range(4):
        alone = model_stock(base[row], [x[row] for x in models])
        torch.testing.assert_close(merged[row], alone)
    vector = [x[0] for x in (base, *models)]
    assert torch.equal(
        model_stock(vector[0], vector[1:], filter_wise=True), model_stock(vector[0], vector[1:])
    )


def test_without_a_clamp_opposed_models_lead_to_the_far_side_of_the_base():
    models = tensors([1, 0], [-0.5, 1])
    assert model_stock(torch.zeros(2), models).tolist() == [0, 0]
    assert (model_stock(torch.zeros(2), models, clamp=False) < 0).all()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: model_stock(x, [x]), "Model Stock needs at least 2 models, got 1"),
        (lambda x: model_stock(x, []), "at least one entry"),
        (lambda x: model_stock(x, [x, x[:1]]), r"one shape, got \(2,\) and \(1,\)"),
        (lambda x: model_stock(x, [x, x.half()]), "must be float32"),
        (lambda x: model_stock(x, [x, x], average="max"), "average must be one of cosine, angle"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call(torch.ones(2))
