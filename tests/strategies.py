"""Random inputs for the property tests, and a distance between float32 tensors."""

import torch
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


def ulps(left: torch.Tensor, right: torch.Tensor) -> int:
    """Largest distance in units in the last place of float32, elementwise."""

    def ordered(values: torch.Tensor) -> torch.Tensor:
        bits = values.float().contiguous().view(torch.int32).long()
        return torch.where(bits < 0, -(2**31) - bits, bits)

    return int((ordered(left) - ordered(right)).abs().max())
