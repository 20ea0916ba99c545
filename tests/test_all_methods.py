"""Laws that hold for every method alike."""

import pytest
import torch

from arcee_fusion_utils import arcee_fusion
from breadcrumbs_utils import breadcrumbs, breadcrumbs_ties
from consensus_utils import consensus, consensus_ties
from dare_utils import dare_linear, dare_ties
from della_utils import della_linear, della_ties
from linear_utils import linear, nearswap, scale, sequential_lerp, task_arithmetic
from model_stock_utils import model_stock
from ram_utils import ram, ramplus
from sce_utils import sce
from slerp_utils import karcher, multislerp, nuslerp, sequential_slerp, slerp
from ties_utils import ties

WEIGHTS, DENSITIES = [0.5, 0.3, 1.2], [0.4, 0.7, 0.2]
TRIMMED = (WEIGHTS, DENSITIES)
CRUMBS = (*TRIMMED, [0.1, 0.0, 0.3])
RANKED = (*TRIMMED, [0.3, 0.2, 0.1])
FACTORS = [0.2, 0.4, 0.6]
BY_ROW = {"trim_scope": "row"}
METHODS = {
    "linear": lambda base, models: linear(models, WEIGHTS),
    "sequential_lerp": lambda base, models: sequential_lerp(models, WEIGHTS),
    "slerp": lambda base, models: slerp(*models[:2], 0.3),
    "slerp_normalize": lambda base, models: slerp(*models[:2], 0.3, normalize=True),
    "sequential_slerp": lambda base, models: sequential_slerp(models, WEIGHTS),
    "nuslerp": lambda base, models: nuslerp(*models[:2], WEIGHTS[:2]),
    "nuslerp_base": lambda base, models: nuslerp(*models[:2], WEIGHTS[:2], base=base),
    "multislerp": lambda base, models: multislerp(models, WEIGHTS),
    "multislerp_base": lambda base, models: multislerp(models, WEIGHTS, base=base),
    "karcher": lambda base, models: karcher(models, WEIGHTS),
    "model_stock": model_stock,
    "nearswap": lambda base, models: nearswap(base, models[0], 0.1),
    "passthrough": lambda base, models: scale(models[0], None),
    "scale": lambda base, models: scale(models[0], 0.3),
    "task_arithmetic": lambda base, models: task_arithmetic(base, models, WEIGHTS, lam=0.7),
    "ties": lambda base, models: ties(base, models, *TRIMMED, lam=0.7),
    "dare_linear": lambda base, models: dare_linear(base, models, *TRIMMED, seed=1),
    "dare_ties": lambda base, models: dare_ties(base, models, *TRIMMED, seed=1),
    "breadcrumbs": lambda base, models: breadcrumbs(base, models, *CRUMBS),
    "breadcrumbs_ties": lambda base, models: breadcrumbs_ties(base, models, *CRUMBS),
    "sce": lambda base, models: sce(base, models, select_topk=0.4),
    "ram": ram,
    "ramplus": ramplus,
    "consensus": lambda base, models: consensus(base, models, WEIGHTS, FACTORS),
    "consensus_ties": lambda base, models: consensus_ties(base, models, *TRIMMED, FACTORS),
}
ROW_METHODS = {
    "nuslerp": lambda base, models: nuslerp(*models[:2], WEIGHTS[:2], flatten=False),
    "model_stock": lambda base, models: model_stock(base, models, filter_wise=True),
    "ties": lambda base, models: ties(base, models, *TRIMMED, **BY_ROW),
    "breadcrumbs": lambda base, models: breadcrumbs(base, models, *CRUMBS, **BY_ROW),
    "breadcrumbs_ties": lambda base, models: breadcrumbs_ties(base, models, *CRUMBS, **BY_ROW),
    "della_linear": lambda base, models: della_linear(base, models, *RANKED, seed=1),
    "della_ties": lambda base, models: della_ties(base, models, *RANKED, seed=1),
    "arcee_fusion": lambda base, models: arcee_fusion(base, models[0]),
}
COLUMN_METHODS = {
    "nuslerp": lambda base, models: nuslerp(*models[:2], WEIGHTS[:2], flatten=False, row_wise=True),
}
ALL = {
    **METHODS,
    **{f"{name} by row": merge for name, merge in ROW_METHODS.items()},
    **{f"{name} by column": merge for name, merge in COLUMN_METHODS.items()},
}


@pytest.fixture
def family():
    """A base and three models, 6 rows of 10."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 10, generator=generator)
    return base, [base + 0.3 * torch.randn(6, 10, generator=generator) for _ in range(3)]


def reshaped(family, shape):
    base, models = family
    return base.view(shape), [model.view(shape) for model in models]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(60,), (20, 3), (2, 3, 10), (1, 60)])
def test_a_tensor_of_another_shape_is_merged_alike(family, method, shape):
    merged = METHODS[method](*family)
    other = METHODS[method](*reshaped(family, shape))
    assert merged.shape == family[0].shape
    assert merged.dtype == torch.float32
    assert torch.equal(other, merged.view(shape))


@pytest.mark.parametrize("method", ROW_METHODS)
def test_methods_by_row_see_what_follows_the_first_axis_as_one_row(family, method):
    merged = ROW_METHODS[method](*family)
    assert merged.shape == family[0].shape
    assert merged.dtype == torch.float32
    deep = ROW_METHODS[method](*reshaped(family, (6, 2, 5)))
    assert torch.equal(deep, merged.view(6, 2, 5))
    vector = ROW_METHODS[method](*reshaped(family, (60,)))
    row = ROW_METHODS[method](*reshaped(family, (1, 60)))
    assert torch.equal(vector, row[0])
    assert not torch.equal(vector, merged.flatten())


@pytest.mark.parametrize("method", ALL)
def test_inputs_stay_as_they_are_and_the_result_is_a_tensor_of_its_own(family, method):
    base, models = family
    copies = [tensor.clone() for tensor in (base, *models)]
    ALL[method](base, models).zero_()
    assert all(torch.equal(x, y) for x, y in zip((base, *models), copies, strict=True))


@pytest.mark.parametrize("method", ALL)
def test_the_same_inputs_give_the_same_bits(family, method):
    assert torch.equal(ALL[method](*family), ALL[method](*family))


@pytest.mark.parametrize("method", ALL)
def test_a_transposed_tensor_is_merged_as_its_copy(family, method):
    base, models = family
    merged = ALL[method](base.T, [model.T for model in models])
    copied = ALL[method](base.T.contiguous(), [model.T.contiguous() for model in models])
    assert torch.equal(merged, copied)


@pytest.mark.parametrize("method", ALL)
def test_a_scalar_and_one_element_are_merged(method):
    base, models = torch.tensor(1.0), [torch.tensor(value) for value in (1.5, 2.0, 0.5)]
    merged = ALL[method](base, models)
    assert merged.shape == ()
    assert torch.equal(ALL[method](base.view(1), [m.view(1) for m in models])[0], merged)


@pytest.mark.parametrize("method", ALL)
def test_zeros_are_merged_to_zeros(method):
    zero = torch.zeros(3, 4)
    assert torch.equal(ALL[method](zero, [zero] * 3), zero)


@pytest.mark.parametrize("method", [m for m in ALL if m not in ("passthrough", "scale")])
def test_shapes_that_do_not_fit_are_refused(method):
    zero = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"one shape, got .*\(4, 3\)"):
        ALL[method](zero, [torch.zeros(4, 3), zero, zero])


@pytest.mark.parametrize("method", ALL)
def test_dtypes_other_than_float32_are_refused(method):
    zero = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"must be float32, got torch\.bfloat16"):
        ALL[method](zero, [zero.bfloat16(), zero, zero])
