"""Random inputs for the property tests, and distances between float32 tensors."""

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st

SHAPES = st.one_of(
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 8), st.integers(1, 12)),
)


@st.composite
def tensor_lists(draw, min_models=1, max_models=5):
    """Float32 tensors of one random shape: a random base and small changes to it."""
    shape = draw(SHAPES)
    count = draw(st.integers(min_models, max_models))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    base = torch.randn(shape, generator=generator)
    return [base + 0.1 * torch.randn(shape, generator=generator) for _ in range(count)]


@st.composite
def models_with_weights(draw, min_models=1):
    """Tensors as above and a positive weight for each."""
    models = draw(tensor_lists(min_models=min_models))
    weights = draw(st.lists(st.floats(0.05, 3), min_size=len(models), max_size=len(models)))
    return models, weights


class Family(NamedTuple):
    """A base, models tuned from it, and a positive weight for each of these."""

    base: torch.Tensor
    models: list[torch.Tensor]
    weights: list[float]

    @property
    def deltas(self) -> list[torch.Tensor]:
        """What each model has changed."""
        return [model - self.base for model in self.models]

    @property
    def arrays(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Base and models for the reference."""
        return self.base.numpy(), [model.numpy() for model in self.models]


@st.composite
def families(draw, min_models=1, max_models=4, max_weight=3.0):
    """A random family; in half of them changes are coarse, so that many are equal, cancel or are 0.

    Weights are powers of two then, so that sums of changes are exact.
    """
    models = draw(tensor_lists(min_models + 1, max_models + 1))
    weight = st.floats(0.05, max_weight)
    if draw(st.booleans()):
        models = [models[0]] + [models[0] + (8 * (m - models[0])).round() / 8 for m in models[1:]]
        models = [(8 * model).round() / 8 for model in models]
        weight = st.sampled_from([0.25, 0.5, 1.0, 2.0])
    count = len(models) - 1
    weights = draw(st.lists(weight, min_size=count, max_size=count))
    return Family(models[0], models[1:], weights)


def assume_clear(votes):
    """Leave out votes that almost balance: rounding decides them. Exact balance is clear."""
    stacked = torch.stack(list(votes)).double()
    mass, magnitude = stacked.sum(0).abs(), stacked.abs().sum(0)
    assume(not ((mass < 1e-5 * magnitude) & (mass > 0)).any())


def assert_near(got: torch.Tensor, expected: np.ndarray, terms: torch.Tensor, units=4):
    """Within `units` * 2^-24 of the result and of the magnitudes that were added up to it."""
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    wanted = torch.from_numpy(np.asarray(expected))
    margin = units * 2**-24 * (wanted.abs() + terms.double())
    worst = ((got - wanted).abs() - margin).max()
    assert worst <= 0, f"{got} is not {wanted}"


def total(tensors, weights) -> torch.Tensor:
    """Summed magnitudes of weighted tensors."""
    return sum(abs(w) * tensor.abs() for w, tensor in zip(weights, tensors, strict=True))


def ulps(left: torch.Tensor, right: torch.Tensor) -> int:
    """Largest distance in units in the last place of float32, elementwise."""

    def ordered(values: torch.Tensor) -> torch.Tensor:
        bits = values.float().contiguous().view(torch.int32).long()
        return torch.where(bits < 0, -(2**31) - bits, bits)

    return int((ordered(left) - ordered(right)).abs().max())
