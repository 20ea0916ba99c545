"""LoRA's arithmetic on small matrices: golden values, exactness, optimality."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_utils import (
    Factors,
    cat_factors,
    factorise,
    fold_dora,
    fold_lora,
    linear_factors,
    lora_delta,
    lora_scale,
    row_norms,
    truncate_factors,
)

TWO = [
    Factors(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[1.0], [0.0]])),
    Factors(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[1.0], [2.0]])),
]
MULTIPLIERS = [2 * 0.5, 0.5 * 1.0]
"""Scales 2 and 0.5, weights 0.5 and 1."""

SUM = torch.tensor([[1.0, 2.5, 0.5], [0.0, 1.0, 1.0]])


def random_factors(seed: int, rank: int, out: int = 12, wide: int = 20) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(rank, wide, generator=generator), torch.randn(out, rank, generator=generator)
    )


def product(factors: Factors) -> torch.Tensor:
    return factors.lora_B.double() @ factors.lora_A.double()


def test_the_sum_of_two_adapters() -> None:
    deltas = [lora_delta(*each, by) for each, by in zip(TWO, MULTIPLIERS, strict=True)]
    assert torch.equal(fold_lora(torch.zeros(2, 3), deltas), SUM)


def test_cat_is_the_sum() -> None:
    joined = cat_factors(TWO, MULTIPLIERS)
    assert joined.rank == 2
    assert torch.equal(joined.lora_B @ joined.lora_A, SUM)


def test_linear_is_not_the_sum_but_what_peft_computes() -> None:
    found = linear_factors(TWO, MULTIPLIERS)
    expected = [[1.70710678, 4.62132034, 1.20710678], [1.41421356, 3.82842712, 1]]
    torch.testing.assert_close(found.lora_B @ found.lora_A, torch.tensor(expected))


def test_linear_doubles_two_equal_adapters_at_a_half() -> None:
    found = linear_factors([TWO[0], TWO[0]], [0.5, 0.5])
    torch.testing.assert_close(product(found), 2 * product(TWO[0]))


def test_linear_keeps_the_sign_of_a_single_negative_weight() -> None:
    found = linear_factors([TWO[0]], [-0.3])
    torch.testing.assert_close(product(found), -0.3 * product(TWO[0]), atol=1e-6, rtol=0)


def test_linear_needs_equal_ranks() -> None:
    with pytest.raises(ValueError, match="one rank, got 1, 2"):
        linear_factors([random_factors(0, 1), random_factors(1, 2)], [1.0, 1.0])


def test_truncation_of_the_sum() -> None:
    joined = cat_factors(TWO, MULTIPLIERS)
    found = truncate_factors(joined, 1)
    expected = [[0.83786231, 2.46323286, 0.78750823], [0.36857707, 1.08358036, 0.34642622]]
    torch.testing.assert_close(product(found.factors).float(), torch.tensor(expected))
    assert found.norm == pytest.approx((2.96979885**2 + 0.82479989**2) ** 0.5)
    assert found.error == pytest.approx(0.82479989 / found.norm)


def test_dora() -> None:
    weight, delta = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    expected = torch.tensor([[6.0, 8.0], [0.0, 1.0]])
    magnitude = torch.tensor([10.0, 1.0])
    assert torch.equal(fold_dora(weight, delta, magnitude), expected)
    half = fold_dora(weight, delta, magnitude, strength=0.5)
    assert torch.equal(half, (weight + expected) / 2)


def test_dora_as_it_begins_changes_nothing() -> None:
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    folded = fold_dora(weight, torch.zeros(7, 33), row_norms(weight).float())
    torch.testing.assert_close(folded, weight, rtol=2e-7, atol=0)


def test_dora_leaves_a_row_of_zeros() -> None:
    zeros = torch.zeros(2, 3)
    assert torch.equal(fold_dora(zeros, zeros, torch.tensor([5.0, 0.0])), zeros)


@given(st.integers(0, 1000), st.integers(1, 9), st.floats(-3, 3))
def test_a_change_is_the_product_of_its_factors(seed: int, rank: int, scale: float) -> None:
    factors = random_factors(seed, rank)
    delta = lora_delta(*factors, scale)
    torch.testing.assert_close(delta.double(), product(factors) * scale, rtol=0, atol=1e-4)
    assert delta.dtype == torch.float32


def test_a_change_has_the_same_bits_by_rows_and_in_numpy() -> None:
    factors = random_factors(3, 16, 64, 500)
    whole = lora_delta(*factors, 1.7)
    parts = [
        lora_delta(factors.lora_A, factors.lora_B[first : first + 5], 1.7)
        for first in range(0, 64, 5)
    ]
    assert torch.equal(torch.cat(parts), whole)
    plain = lora_delta(factors.lora_A.numpy(), factors.lora_B.numpy(), 1.7)
    assert plain.dtype == np.float32
    assert np.array_equal(plain, whole.numpy())


def test_row_norms_have_the_same_bits_by_rows_and_in_numpy() -> None:
    values = torch.randn(9, 301, generator=torch.Generator().manual_seed(1))
    norms = row_norms(values)
    assert torch.equal(torch.cat([row_norms(values[i : i + 1]) for i in range(9)]), norms)
    assert np.array_equal(row_norms(values.numpy()), norms.numpy())
    torch.testing.assert_close(norms, values.double().norm(dim=1), rtol=1e-14, atol=0)


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lora_A must be \(r, in\)"):
        lora_delta(torch.ones(2, 3), torch.ones(4, 3))
    with pytest.raises(ValueError, match="lora_rank must be at least 1, got 0"):
        lora_scale(0, 8)


def test_the_change_is_rounded_first_if_that_is_asked_for() -> None:
    weight = torch.full((1, 1), 256.0, dtype=torch.bfloat16)
    deltas = [torch.tensor([[0.9]]), torch.tensor([[0.9]])]
    assert fold_lora(weight, deltas).item() == pytest.approx(257.8)
    assert (
        fold_lora(weight, deltas, round_delta=True).item() == 256.0
    )  # twice less than half a step


@given(st.integers(0, 1000), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_cat_is_exact_and_a_full_rank_too(seed: int, ranks: list[int]) -> None:
    factors = [random_factors(seed + number, rank) for number, rank in enumerate(ranks)]
    multipliers = [(-1.0) ** number * (number + 0.5) for number in range(len(ranks))]
    exact = sum(product(each) * by for each, by in zip(factors, multipliers, strict=True))
    joined = cat_factors(factors, multipliers)
    norm = float(exact.norm())  # type: ignore[union-attr]
    assert float((product(joined) - exact).norm()) <= 3e-7 * norm
    whole = truncate_factors(joined, 100)
    assert float((product(whole.factors) - exact).norm()) <= 3e-7 * norm
    assert whole.error == 0.0


@given(st.integers(0, 1000), st.integers(1, 8))
def test_truncation_is_the_optimum(seed: int, rank: int) -> None:
    factors = random_factors(seed, 8)
    u, values, v = torch.linalg.svd(product(factors), full_matrices=False)
    best = u[:, :rank] * values[:rank] @ v[:rank]
    for found in (
        truncate_factors(factors, rank),
        factorise(product(factors).float(), rank=rank),
        factorise(product(factors).float().T.contiguous(), rank=rank),
    ):
        kept = product(found.factors)
        kept = kept if kept.shape == best.shape else kept.T
        norm = float(values.norm())
        assert float((kept - best).norm()) <= 1e-5 * norm
        assert found.error == pytest.approx(float(values[rank:].norm()) / norm, abs=1e-6)
        assert found.norm == pytest.approx(norm, rel=1e-6)


@given(st.integers(0, 1000), st.floats(0, 0.9))
def test_the_rank_is_the_smallest_that_keeps_an_error(seed: int, most: float) -> None:
    delta = torch.randn(11, 17, generator=torch.Generator().manual_seed(seed))
    found = factorise(delta, max_error=most)
    rank = found.factors.rank
    assert found.error <= most + 1e-6
    if rank > 1:
        assert factorise(delta, rank=rank - 1).error > most - 1e-6
    assert factorise(delta, rank=3, max_error=most).factors.rank == min(3, rank)


def test_a_change_of_zeros_has_factors_of_zeros() -> None:
    found = factorise(torch.zeros(4, 6), rank=2)
    assert found.error == 0.0
    assert not product(found.factors).any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "needs a rank or a max_error"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"max_error": 1.0}, r"max_error must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        factorise(torch.ones(2, 2), **settings)  # type: ignore[arg-type]
