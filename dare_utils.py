"""DARE: drop entries of each task vector at random, rescale the rest, merge.

Pure tensor math. The random numbers come from a counter-based generator, Philox4x64-10, keyed
by (seed, model tag, tensor name) and read at the element's flat index. So a mask is the same
for every block size, thread count and device, and can be made for any rows on their own. The
numbers are those of numpy's `Philox(key, counter).random_raw`.

Source: DARE, arXiv:2311.03099; Philox: Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from linear_utils import add_task_vector, combine_deltas
from scalar_utils import (
    Denominator,
    ElectMethod,
    ElectOn,
    Key,
    Rescale,
    check_count,
    check_ties_weights,
    keep_limit,
    mask_key,
    rescale_factor,
)
from tensor_utils import as_float32, check_tensors, run_sums, select
from ties_utils import elect_and_merge

DRAWS_PER_COUNTER = 8
_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


def _signed(word: int) -> int:
    """A 64-bit word as the int64 with the same bits; torch has no full uint64 arithmetic."""
    return word - 2**64 if word >= 2**63 else word


def _multiply_wide(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 64 bits of the unsigned product, from products of 32-bit halves."""
    low_half, high_half = word & _LOW, (word >> 32) & _LOW
    multiplier_low, multiplier_high = multiplier & _LOW, multiplier >> 32
    middle = high_half * multiplier_low + ((low_half * multiplier_low >> 32) & _LOW)
    cross = low_half * multiplier_high + (middle & _LOW)
    high = high_half * multiplier_high + ((middle >> 32) & _LOW) + ((cross >> 32) & _LOW)
    return high, word * _signed(multiplier)


def philox(key: Key, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Blocks of Philox4x64-10 for the counters `first`, `first + 1`, ...

    Returns:
        Shape (count, 4), int64 holding the bits of unsigned 64-bit words.
    """
    words = [torch.arange(first, first + count, dtype=torch.int64, device=device)]
    words += [torch.zeros_like(words[0]) for _ in range(3)]
    first_key, second_key = key
    for _ in range(10):
        high_0, low_0 = _multiply_wide(words[0], _MULTIPLIERS[0])
        high_2, low_2 = _multiply_wide(words[2], _MULTIPLIERS[1])
        words = [
            high_2 ^ words[1] ^ _signed(first_key),
            low_2,
            high_0 ^ words[3] ^ _signed(second_key),
            low_0,
        ]
        first_key = (first_key + _KEY_STEPS[0]) % 2**64
        second_key = (second_key + _KEY_STEPS[1]) % 2**64
    return torch.stack(words, dim=1)


def mask_draws(key: Key, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The random numbers of the elements `start` to `start + count` of a tensor.

    Args:
        key: from `mask_key`.
        start: flat index of the first element, >= 0.
        count: number of elements.

    Returns:
        Shape (count,), int64, each uniform in [0, 2**32).

    >>> mask_draws(mask_key(42, "0", "model.layers.0.mlp.up_proj.weight"), 0, 2).tolist()
    [206090330, 2826292319]
    """
    first = start // DRAWS_PER_COUNTER
    last = -(-(start + count) // DRAWS_PER_COUNTER)
    # numpy steps the counter before the first block, hence the 1.
    words = philox(key, first + 1, last - first, device)
    draws = torch.stack((words & _LOW, (words >> 32) & _LOW), dim=2).flatten()
    skip = start - first * DRAWS_PER_COUNTER
    return draws[skip : skip + count]


def keep_mask(density: float, draws: Tensor) -> Tensor:
    """Which elements are kept: those whose draw is below `density * 2**32`, rounded.

    Args:
        density: chance of being kept, in [0, 1]; 0 keeps none, 1 all.
        draws: int64 in [0, 2**32), from `mask_draws`.

    Returns:
        Same shape, bool. The comparison is between integers, so it is the same everywhere.
    """
    return draws < keep_limit(density)


def drop(delta: Tensor, density: float, key: Key, start: int = 0) -> Tensor:
    """Zero each entry of some rows of a task vector with chance `1 - density`, without rescaling.

    Args:
        delta: float32, any shape.
        density: chance of being kept, in [0, 1].
        key: from `mask_key`.
        start: flat index of the first entry in its tensor.

    Returns:
        Same shape, float32.
    """
    if density == 1:
        return delta.clone()
    draws = mask_draws(key, start, delta.numel(), delta.device).view_as(delta)
    return select(keep_mask(density, draws), delta)


def absolute_parts(delta: Tensor) -> list[float]:
    """Run sums of |delta| in float64; `math.fsum` of those of all rows is the L1 norm."""
    return run_sums(delta.double().abs())


def dare(
    delta: Tensor, density: float, key: Key, *, rescale: Rescale = "inverse_density"
) -> Tensor:
    """Drop entries of a whole task vector at random and rescale the rest.

    Args:
        delta: float32, finite, any shape.
        density: chance of being kept, in [0, 1] (the paper's drop rate is `1 - density`).
        key: from `mask_key`; one per model and tensor.
        rescale: see `rescale_factor`. With "inverse_density" the expected value is `delta`.

    Returns:
        Same shape, float32.

    Raises:
        ValueError: `density` or `rescale` is out of range, or `delta` is not float32.

    Source: DARE, arXiv:2311.03099, section 3.

    >>> delta, key = torch.ones(8), mask_key(42, "0", "model.layers.0.mlp.up_proj.weight")
    >>> dare(delta, 0.5, key)
    tensor([2., 0., 2., 2., 0., 2., 2., 0.])
    """
    check_tensors([delta])
    kept = drop(delta, density, key)
    norms = [math.fsum(absolute_parts(x)) for x in (delta, kept)] if rescale == "l1" else []
    return kept * rescale_factor(rescale, density, *norms)


def dare_linear(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    seed: int = 0,
    name: str = "",
    lam: float = 1.0,
    normalize: bool = False,
    rescale: Rescale = "inverse_density",
) -> Tensor:
    """Task arithmetic on dropped and rescaled task vectors.

    Args:
        base: the common ancestor, float32, finite.
        tensors: the fine-tuned models, float32, finite, same shape.
        weights: one finite number per model.
        densities: chance of an entry being kept, in [0, 1], per model.
        seed: in [0, 2**64).
        name: the tensor's name. Masks of tensors with one name and seed are the same.
        lam: scale of the merged task vector.
        normalize: divide by the sum of the weights.
        rescale: see `rescale_factor`.

    Returns:
        Same shape, float32. Its mean over seeds is `task_arithmetic` ("inverse_density").

    Raises:
        ValueError: counts, shapes, dtypes or ranges do not fit.

    Source: DARE, arXiv:2311.03099.
    """
    deltas = _dare_deltas(base, tensors, densities, seed, name, rescale)
    return add_task_vector(base, combine_deltas(deltas, weights, normalize=normalize), lam)


def dare_ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    seed: int = 0,
    name: str = "",
    lam: float = 1.0,
    normalize: bool = False,
    rescale: Rescale = "inverse_density",
    denominator: Denominator | None = None,
    elect_on: ElectOn = "weighted",
    elect_method: ElectMethod = "mass",
) -> Tensor:
    """TIES' sign election and disjoint merge on dropped and rescaled task vectors, no trim.

    Arguments, result and errors as `dare_linear`; `normalize` divides by the summed weights of
    the models that agree, and then needs weights that are not negative. `denominator`, `elect_on`
    and `elect_method` are those of `ties_utils.elect_and_merge`; the first goes before `normalize`.

    Source: DARE, arXiv:2311.03099, with TIES, arXiv:2306.01708; as in mergekit, without a trim.
    """
    check_ties_weights(weights, normalize=normalize and denominator is None)
    deltas = _dare_deltas(base, tensors, densities, seed, name, rescale)
    return elect_and_merge(
        base,
        deltas,
        weights,
        lam,
        denominator=denominator or ("weight" if normalize else "none"),
        elect_on=elect_on,
        elect_method=elect_method,
    )


def _dare_deltas(
    base: Tensor,
    tensors: Sequence[Tensor],
    densities: Sequence[float],
    seed: int,
    name: str,
    rescale: Rescale,
) -> list[Tensor]:
    check_tensors(tensors, base)
    check_count("densities", densities, len(tensors))
    return [
        dare(tensor - base, density, mask_key(seed, str(position), name), rescale=rescale)
        for position, (tensor, density) in enumerate(zip(tensors, densities, strict=True))
    ]


class DARE:
    """DARE for parameters of loaded models, one at a time.

    Args:
        variant: "linear" (sum of the task vectors) or "ties" (sign election).
        lam: scale of the merged task vector.
        normalize: divide by the sum of the weights.
        rescale: see `rescale_factor`.

    >>> zero, one = torch.zeros(2), torch.ones(2)
    >>> DARE().merge([1.0], zero, [one], [1.0])
    tensor([1., 1.])
    """

    def __init__(
        self,
        *,
        variant: Literal["linear", "ties"] = "linear",
        lam: float = 1.0,
        normalize: bool = False,
        rescale: Rescale = "inverse_density",
    ) -> None:
        if variant not in ("linear", "ties"):
            raise ValueError(f"variant must be linear or ties, got {variant!r}")
        self.variant = variant
        self.lam = lam
        self.normalize = normalize
        self.rescale = rescale

    def merge(
        self,
        weights: Sequence[float],
        base_model_parameters: Tensor,
        ft_models_parameters: Sequence[Tensor],
        densities: Sequence[float],
        device: str | torch.device = "cpu",
        seed: int = 0,
        name: str = "",
    ) -> Tensor:
        """The merged parameter, float32, on `device`; the inputs stay as they are.

        Args:
            weights: one per fine-tuned model.
            base_model_parameters: one parameter of the base model, any float dtype.
            ft_models_parameters: the same parameter of each fine-tuned model.
            densities: chance of an entry being kept, in [0, 1].
            device: where to compute.
            seed: in [0, 2**64).
            name: the parameter's name. Give it when you merge several parameters with one
                seed: parameters without a name, or with one name, get the same mask.

        Raises:
            ValueError: as `dare_linear`.
        """
        merge = dare_linear if self.variant == "linear" else dare_ties
        base, *tensors = as_float32([base_model_parameters, *ft_models_parameters], device)
        return merge(
            base,
            tensors,
            weights,
            densities,
            seed=seed,
            name=name,
            lam=self.lam,
            normalize=self.normalize,
            rescale=self.rescale,
        )
