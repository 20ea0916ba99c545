"""Laws that hold for every method alike."""

import pytest
import torch

from dare_utils import dare_linear, dare_ties
from linear_utils import linear, sequential_lerp, task_arithmetic
from slerp_utils import sequential_slerp, slerp
from ties_utils import ties

WEIGHTS, DENSITIES = [0.5, 0.3, 1.2], [0.4, 0.7, 0.2]
METHODS = {
    "linear": lambda base, models: linear(models, WEIGHTS),
    "sequential_lerp": lambda base, models: sequential_lerp(models, WEIGHTS),
    "slerp": lambda base, models: slerp(*models[:2], 0.3),
    "sequential_slerp": lambda base, models: sequential_slerp(models, WEIGHTS),
    "task_arithmetic": lambda base, models: task_arithmetic(base, models, WEIGHTS, lam=0.7),
    "ties": lambda base, models: ties(base, models, WEIGHTS, DENSITIES, lam=0.7),
    "dare_linear": lambda base, models: dare_linear(base, models, WEIGHTS, DENSITIES, seed=1),
    "dare_ties": lambda base, models: dare_ties(base, models, WEIGHTS, DENSITIES, seed=1),
}


@pytest.fixture
def family():
    """A base and three models, 6 rows of 10."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 10, generator=generator)
    return base, [base + 0.3 * torch.randn(6, 10, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(60,), (20, 3), (2, 3, 10), (1, 60)])
def test_a_tensor_of_another_shape_is_merged_alike(family, method, shape):
    base, models = family
    merged = METHODS[method](base, models)
    reshaped = METHODS[method](base.view(shape), [model.view(shape) for model in models])
    assert merged.shape == base.shape
    assert merged.dtype == torch.float32
    assert torch.equal(reshaped, merged.view(shape))


@pytest.mark.parametrize("method", METHODS)
def test_inputs_stay_as_they_are_and_the_result_is_a_tensor_of_its_own(family, method):
    base, models = family
    copies = [tensor.clone() for tensor in (base, *models)]
    METHODS[method](base, models).zero_()
    assert all(torch.equal(x, y) for x, y in zip((base, *models), copies, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_transposed_tensor_is_merged_as_its_copy(family, method):
    base, models = family
    merged = METHODS[method](base.T, [model.T for model in models])
    copied = METHODS[method](base.T.contiguous(), [model.T.contiguous() for model in models])
    assert torch.equal(merged, copied)


@pytest.mark.parametrize("method", METHODS)
def test_a_scalar_and_one_element_are_merged(method):
    base, models = torch.tensor(1.0), [torch.tensor(value) for value in (1.5, 2.0, 0.5)]
    merged = METHODS[method](base, models)
    assert merged.shape == ()
    assert torch.equal(METHODS[method](base.view(1), [m.view(1) for m in models])[0], merged)
