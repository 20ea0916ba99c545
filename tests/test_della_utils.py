import math

import pytest
import reference_task_vectors as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import assert_near, assume_clear, families, total

from dare_utils import dare, dare_linear, dare_ties
from della_utils import della, della_linear, della_ties, drop_by_rank, rank_in_rows
from linear_utils import task_arithmetic
from scalar_utils import keep_chances, mask_key

UP_PROJ = mask_key(42, "0", "model.layers.0.mlp.up_proj.weight")
EIGHTHS = torch.arange(1, 9) / 8
RANGES = [(0.5, 0.2), (0.3, 0.29), (0.9, 0.05), (0.5, 0.0), (1.0, 0.0), (0.0, 0.0)]
CHI_SQUARE_999 = 26.12
"""What chi-square with 8 degrees of freedom exceeds in one case of a thousand."""


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
def test_golden_g9_della(rescale, expected):
    dropped = della(EIGHTHS, 0.5, 0.2, UP_PROJ, rescale=rescale)
    torch.testing.assert_close(dropped, torch.tensor(expected))


def test_golden_g9_chances_go_by_rank():
    chances = [0.3, 0.35714286, 0.41428571, 0.47142857, 0.52857143, 0.58571429, 0.64285714, 0.7]
    assert keep_chances(0.5, 0.2, 8) == pytest.approx(chances)
    rank = rank_in_rows(torch.tensor([[0.3, -0.1, 0.2, -0.5, 0.4]]))[0]
    chances = torch.tensor(keep_chances(0.5, 0.2, 5))[rank]
    torch.testing.assert_close(chances, torch.tensor([0.5, 0.3, 0.4, 0.7, 0.6]))


def test_ranks_are_those_of_a_row_and_equal_changes_rank_by_index():
    delta = torch.tensor([[3.0, -1.0, 1.0, 0.0], [0.5, 0.5, -0.5, 9.0]])
    assert rank_in_rows(delta).tolist() == [[3, 1, 2, 0], [0, 1, 2, 3]]


@given(st.integers(1, 50), st.floats(0.01, 0.99), st.floats(0, 1))
def test_the_mean_chance_in_a_row_is_the_density(count, density, share):
    epsilon = 0.99 * share * min(density, 1 - density)
    chances = keep_chances(density, epsilon, count)
    assert math.fsum(chances) / count == pytest.approx(density)
    assert chances == sorted(chances)
    assert chances[0] == pytest.approx(density - epsilon if count > 1 else density)
    assert chances[-1] == pytest.approx(density + epsilon if count > 1 else density)


@pytest.mark.parametrize("density", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize(
    ("rescale", "of_dare"), [("inverse_prob", "inverse_density"), ("l1", "l1"), ("none", "none")]
)
def test_epsilon_zero_is_dare_bit_for_bit(density, rescale, of_dare):
    generator = torch.Generator().manual_seed(1)
    base, *models = (torch.randn(9, 11, generator=generator) for _ in range(4))
    delta = models[0] - base
    one = della(delta, density, 0, UP_PROJ, rescale=rescale)
    assert torch.equal(one, dare(delta, density, UP_PROJ, rescale=of_dare))
    shared = ([0.5, 0.8, 0.2], [density] * 3)
    named = {"seed": 7, "name": "w", "lam": 0.9}
    for merge, like in ((della_linear, dare_linear), (della_ties, dare_ties)):
        options = {"denominator": "none"} if merge is della_ties else {}
        got = merge(base, models, *shared, [0] * 3, rescale=rescale, **named, **options)
        assert torch.equal(got, like(base, models, *shared, rescale=of_dare, **named))


def kept_by_rank(density, epsilon, seed, rows=4000):
    """How often each of 8 ranks is kept, in rows whose ranks are shuffled."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(rows, 8, generator=generator).argsort(1)
    delta = (ranks + 1.0) / 8
    dropped = della(delta, density, epsilon, mask_key(seed, "0", "w"), rescale="none")
    return torch.bincount(ranks[dropped != 0], minlength=8).double()


def chi_square(counts, chances, rows=4000):
    """How far counts of 8 independent chances are from what is expected of them."""
    chances = torch.tensor(chances, dtype=torch.float64)
    return float(((counts - rows * chances) ** 2 / (rows * chances * (1 - chances))).sum())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.2), (0.2, 0.15), (0.8, 0.1), (0.4, 0)])
def test_the_share_kept_grows_linearly_with_the_rank(density, epsilon, seed):
    counts = kept_by_rank(density, epsilon, seed)
    assert chi_square(counts, keep_chances(density, epsilon, 8)) < CHI_SQUARE_999
    if epsilon:
        assert chi_square(counts, [density] * 8) > 10 * CHI_SQUARE_999


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.2), (0.3, 0.25)])
def test_the_mean_over_seeds_is_the_task_vector(density, epsilon):
    delta, seeds = torch.randn(3, 8, generator=torch.Generator().manual_seed(2)), 400
    drawn = [della(delta, density, epsilon, mask_key(seed, "0", "w")) for seed in range(seeds)]
    chances = torch.tensor(keep_chances(density, epsilon, 8))[rank_in_rows(delta)]
    bound = 5 * delta.abs() * torch.sqrt((1 - chances) / (chances * seeds))
    assert ((torch.stack(drawn).double().mean(0) - delta).abs() <= bound).all()
    biased = torch.stack([(x != 0) * delta / density for x in drawn]).double().mean(0)
    assert not ((biased - delta).abs() <= bound).all()


def test_l1_keeps_the_norm_and_none_the_values():
    delta = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    scaled = della(delta, 0.5, 0.3, UP_PROJ, rescale="l1")
    assert float(scaled.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-5)
    left = della(delta, 0.5, 0.3, UP_PROJ, rescale="none")
    assert torch.equal(left[left != 0], delta[left != 0])
    assert torch.equal(left != 0, scaled != 0)


@pytest.mark.parametrize("rescale", ["inverse_prob", "l1", "none"])
@pytest.mark.parametrize("elect", [False, True])
@given(families(), st.lists(st.sampled_from(RANGES), min_size=4, max_size=4), st.integers(0, 99))
@settings(max_examples=30)
def test_agrees_with_the_reference(rescale, elect, family, ranges, seed):
    count = len(family.models)
    densities, epsilons = ([pair[k] for pair in ranges[:count]] for k in range(2))
    options = {"seed": seed, "name": "w", "lam": 0.8, "rescale": rescale}
    shared = (family.weights, densities, epsilons)
    dropped = [
        della(delta, density, epsilon, mask_key(seed, str(i), "w"), rescale=rescale)
        for i, (delta, density, epsilon) in enumerate(
            zip(family.deltas, densities, epsilons, strict=True)
        )
    ]
    assume_clear(w * x for w, x in zip(family.weights, dropped, strict=True))
    merge = della_ties if elect else della_linear
    merged = merge(family.base, family.models, *shared, **options)
    array, arrays = family.arrays
    expected = reference.della(array, arrays, *shared, elect=elect, normalize=elect, **options)
    divisor = min(family.weights) if elect else 1
    assert_near(merged, expected, family.base.abs() + 2 * total(dropped, family.weights) / divisor)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_rows_can_be_dropped_on_their_own(step):
    delta = torch.randn(7, 5, generator=torch.Generator().manual_seed(5))
    pieces = [
        drop_by_rank(delta[row : row + step], 0.5, 0.2, UP_PROJ, row * 5)
        for row in range(0, 7, step)
    ]
    assert torch.equal(torch.cat(pieces), della(delta, 0.5, 0.2, UP_PROJ))


def test_rows_of_one_entry_are_kept_with_chance_density():
    delta = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(6))
    dropped = della(delta, 0.3, 0.2, UP_PROJ)
    assert torch.equal(dropped, dare(delta, 0.3, UP_PROJ))
    assert torch.equal(della(delta[0], 0.3, 0.2, UP_PROJ), dare(delta[0], 0.3, UP_PROJ))


def test_density_one_is_task_arithmetic_and_zero_is_the_base():
    base, model = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
    whole = della_linear(base, [model], [0.5], [1.0], [0.15])
    assert torch.equal(whole, task_arithmetic(base, [model], [0.5]))
    for merge in (della_linear, della_ties):
        assert torch.equal(merge(base, [model], [0.5], [0.0], [0.15]), base)
        assert torch.equal(merge(base, [base], [0.5], [0.5], [0.15]), base)


def test_the_same_model_twice_gets_two_masks():
    base, model = torch.zeros(64), torch.ones(64)
    merged = della_linear(base, [model] * 2, [1, 1], [0.5] * 2, [0.2] * 2, rescale="none")
    assert sorted(set(merged.tolist())) == [0, 1, 2]


def test_a_model_keeps_its_mask_when_another_is_added_after_it():
    base, models = torch.zeros(50), [torch.full((50,), 2.0), torch.zeros(50)]
    alone = della_linear(base, models[:1], [1], [0.5], [0.2], seed=4, name="w")
    both = della_linear(base, models, [1, 1], [0.5] * 2, [0.2] * 2, seed=4, name="w")
    assert torch.equal(alone, both)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: della(x, 1.5, 0, UP_PROJ), r"densities must be in \[0, 1\]"),
        (lambda x: della(x, 0.5, -0.1, UP_PROJ), r"epsilons must be in \[0, 1\), got -0.1"),
        (lambda x: della(x, 0.5, math.nan, UP_PROJ), r"epsilons must be in \[0, 1\), got nan"),
        (
            lambda x: della(x, 0.9, 0.15, UP_PROJ),
            "got density 0.9 and epsilon 0.15. Take an epsilon below 0.1",
        ),
        (lambda x: della(x, 0.1, 0.1, UP_PROJ), "Take an epsilon below 0.1"),
        (
            lambda x: della(x, 0.5, 0.1, UP_PROJ, rescale="l2"),
            "rescale must be one of inverse_prob",
        ),
        (lambda x: della(x.double(), 0.5, 0.1, UP_PROJ), "must be float32"),
        (lambda x: della_linear(x, [x], [1], [0.5], []), "epsilons must have one entry per model"),
        (lambda x: della_linear(x, [x], [1], [], [0.1]), "densities must have one entry per model"),
        (lambda x: della_ties(x, [x], [], [0.5], [0.1]), "weights must have one entry per model"),
        (lambda x: della_ties(x, [x], [1], [0.5], [0.1], seed=-1), "seed must be an integer"),
        (
            lambda x: della_ties(x, [x], [1], [0.5], [0.1], elect_on="mass"),
            "elect_on must be one of weighted, unweighted, got 'mass'",
        ),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call(torch.ones(2))
