import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from dare_utils import (
    DARE,
    dare,
    dare_linear,
    dare_ties,
    drop,
    keep_mask,
    mask_draws,
    mask_key,
    philox,
    rescale_factor,
)
from linear_utils import task_arithmetic

UP_PROJ = mask_key(42, "0", "model.layers.0.mlp.up_proj.weight")
EIGHTHS = torch.arange(1, 9) / 8


def hexes(words):
    return " ".join(f"{word % 2**64:016x}" for word in words)


def test_known_answers_of_the_generator():
    first, second = philox((0, 0), 0, 2).tolist()
    assert hexes(first) == "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"
    assert hexes(second) == "02f4ba6408e4d89b 3dd62b0b9ca8c5b2 1c8667a55d902e79 907d7a052fd5b4dc"


def test_golden_g9_key_draws_and_masks():
    assert hexes(UP_PROJ) == "56716f7037a6c786 86777c0fd21c4e2b"
    draws = [f"{draw:08x}" for draw in mask_draws(UP_PROJ, 0, 8).tolist()]
    assert " ".join(draws) == (
        "0c48b05a a875cc5f 1be873a4 397b43bd 8f758618 1848a464 078157be b0b33ced"
    )
    for density, bits in ((0.5, "1011011001111001"), (0.1, "1000011001000000")):
        mask = keep_mask(density, mask_draws(UP_PROJ, 0, 16))
        assert "".join(str(int(bit)) for bit in mask) == bits


@pytest.mark.parametrize(
    ("rescale", "expected"),
    [
        ("inverse_density", [0.25, 0, 0.75, 1, 0, 1.5, 1.75, 0]),
        ("l1", [0.21428571, 0, 0.64285714, 0.85714286, 0, 1.28571429, 1.5, 0]),
        ("none", [0.125, 0, 0.375, 0.5, 0, 0.75, 0.875, 0]),
    ],
)
def test_golden_g9_dare(rescale, expected):
    torch.testing.assert_close(dare(EIGHTHS, 0.5, UP_PROJ, rescale=rescale), torch.tensor(expected))


@pytest.mark.parametrize(
    ("merge", "normalize", "expected"),
    [
        (dare_linear, False, [3, -1, 1, 0, 2, -1]),
        (dare_ties, False, [3, -2, 1, 0, 2, -2]),
        (dare_ties, True, [3, -4, 2, 0, 4, -4]),
    ],
)
def test_golden_g9b(merge, normalize, expected):
    models = [torch.ones(6), torch.tensor([2.0, -2, 2, -2, 2, -2])]
    merged = merge(
        torch.zeros(6), models, [0.5, 0.5], [0.5, 0.5], seed=42, name="w", normalize=normalize
    )
    assert merged.tolist() == expected


@given(st.integers(0, 2**64 - 1), st.integers(0, 10_000), st.integers(1, 100))
def test_draws_are_those_of_numpy_from_any_start(seed, start, count):
    key = mask_key(seed, "1", "w")
    raw = np.random.Philox(key=np.array(key, np.uint64), counter=0).random_raw(
        (start + count) // 2 + 1
    )
    halves = np.stack((raw & np.uint64(0xFFFFFFFF), raw >> np.uint64(32)), axis=1).flatten()
    assert mask_draws(key, start, count).tolist() == halves[start : start + count].tolist()


@given(st.integers(1, 60), st.integers(1, 12), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
def test_dropping_in_pieces_is_dropping_the_whole(count, step, density):
    delta = torch.arange(1, count + 1).float()
    pieces = [
        drop(delta[start : start + step], density, UP_PROJ, start)
        for start in range(0, count, step)
    ]
    assert torch.equal(torch.cat(pieces), drop(delta, density, UP_PROJ))


@pytest.mark.parametrize("density", [0.05, 0.5, 0.9])
def test_the_share_kept_is_the_density(density):
    kept = keep_mask(density, mask_draws(UP_PROJ, 0, 200_000)).double().mean()
    assert abs(float(kept) - density) < 5 * math.sqrt(density * (1 - density) / 200_000)


def test_masks_of_two_models_and_of_two_tensors_are_independent():
    count = 100_000
    keys = [mask_key(0, "0", "a"), mask_key(0, "1", "a"), mask_key(0, "0", "b")]
    masks = torch.stack([keep_mask(0.5, mask_draws(key, 0, count)).double() for key in keys])
    correlation = torch.corrcoef(masks) - torch.eye(3)
    assert float(correlation.abs().max()) < 5 / math.sqrt(count)


def test_the_mean_over_seeds_is_task_arithmetic():
    base = torch.zeros(40)
    generator = torch.Generator().manual_seed(0)
    models = [torch.randn(40, generator=generator) for _ in range(2)]
    weights, density, seeds = [0.6, 0.7], 0.3, 400
    total = sum(
        dare_linear(base, models, weights, [density] * 2, seed=seed, name="w").double()
        for seed in range(seeds)
    )
    spread = sum(
        (weight * model.double()) ** 2 for weight, model in zip(weights, models, strict=True)
    )
    expected = task_arithmetic(base, models, weights)
    bound = 5 * torch.sqrt(spread * (1 - density) / (density * seeds))
    assert ((total / seeds - expected).abs() <= bound).all()


def test_density_one_is_task_arithmetic_and_zero_is_the_base():
    base, model = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
    assert torch.equal(
        dare_linear(base, [model], [0.5], [1.0]), task_arithmetic(base, [model], [0.5])
    )
    assert torch.equal(dare_linear(base, [model], [0.5], [0.0]), base)


def test_the_same_model_twice_gets_two_masks():
    base, model = torch.zeros(64), torch.ones(64)
    merged = dare_linear(base, [model, model], [1, 1], [0.5, 0.5], rescale="none")
    assert sorted(set(merged.tolist())) == [0, 1, 2]


@pytest.mark.parametrize("elect", [False, True])
@pytest.mark.parametrize("rescale", ["inverse_density", "l1", "none"])
def test_agrees_with_the_reference(elect, rescale):
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(9, 7, generator=generator)
    models = [base + 0.1 * torch.randn(9, 7, generator=generator) for _ in range(3)]
    weights, densities = [0.5, 0.8, 0.3], [0.5, 0.7, 1.0]
    merge = dare_ties if elect else dare_linear
    options = {"lam": 0.9, "seed": 11, "name": "x", "rescale": rescale}
    got = merge(base, models, weights, densities, **options)
    arrays = [tensor.numpy() for tensor in (base, *models)]
    expected = reference.dare(arrays[0], arrays[1:], weights, densities, elect=elect, **options)
    torch.testing.assert_close(got, torch.from_numpy(expected).float(), rtol=1e-6, atol=1e-6)


def test_tiny_norms_are_not_rescaled():
    assert rescale_factor("l1", 0.5, 1e-8, 1e-9) == 1
    assert not dare(torch.zeros(8), 0.5, UP_PROJ, rescale="l1").any()


def test_the_class_merges_as_the_functions_do():
    base, models = torch.zeros(6).half(), [torch.ones(6), -2 * torch.ones(6)]
    arguments = ([0.5, 0.5], base, models, [0.5, 0.5])
    plain = DARE(lam=2.0).merge(*arguments, seed=3, name="w")
    elected = DARE(variant="ties").merge(*arguments, "cpu", 3, "w")
    floats = (base.float(), models, [0.5, 0.5], [0.5, 0.5])
    assert torch.equal(plain, dare_linear(*floats, seed=3, name="w", lam=2.0))
    assert torch.equal(elected, dare_ties(*floats, seed=3, name="w"))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: dare(EIGHTHS, 1.5, UP_PROJ), r"densities must be in \[0, 1\]"),
        (lambda: dare(EIGHTHS, math.nan, UP_PROJ), r"densities must be in \[0, 1\]"),
        (lambda: dare(EIGHTHS, 0.5, UP_PROJ, rescale="l2"), "rescale must be one of .* got 'l2'"),
        (lambda: mask_key(-1, "0", "w"), r"seed must be an integer in \[0, 2\*\*64\), got -1"),
        (lambda: mask_key(2**64, "0", "w"), "seed must be an integer"),
        (lambda: DARE(variant="both"), "variant must be linear or ties, got 'both'"),
        (
            lambda: dare_ties(EIGHTHS, [EIGHTHS], [-1], [1], normalize=True),
            "must not be negative when normalize is on",
        ),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()
