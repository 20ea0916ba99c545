"""Merges with random masks, compared in law: DARE and DELLA draw other masks than their peers."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dare_utils  # noqa: E402
import della_utils  # noqa: E402
from benchmarks.parity_cases import (  # noqa: E402
    STATISTICS,
    Case,
    Doubles,
    Family,
    Fixture,
    resolved,
)
from linear_utils import add_task_vector, combine_deltas  # noqa: E402
from scalar_utils import Key, mask_key  # noqa: E402
from ties_utils import elect_and_merge  # noqa: E402

Values = Mapping[str, Any]


class Moments(NamedTuple):
    """Mean and variance over seeds of each element of merged task vectors."""

    mean: Doubles
    variance: Doubles


def in_sigmas(ours: Moments, peer: Moments, seeds: int) -> Doubles:
    """How far apart two means over seeds are, per element, in sigma from both variances.

    An entry that every seed keeps, here and there, may differ by rounding: 1e-6 of it count as
    the least sigma.
    """
    sigma = np.sqrt((ours.variance + peer.variance) / seeds)
    least = 1e-6 * np.abs(peer.mean) + 1e-12
    apart: Doubles = np.abs(ours.mean - peer.mean) / np.maximum(sigma, least)
    return apart


def pinned_moments(fixture: Fixture, key: str) -> Moments:
    """A peer's."""
    mean, variance = (fixture.arrays[f"{what}/{key}"] for what in Moments._fields)
    return Moments(mean.astype(np.float64), variance.astype(np.float64))


def our_moments(case: Case, profile: str, family: Family, seeds: int) -> Moments:
    """Ours, of the tensors in `STATISTICS`.

    By the functions of the math: hundreds of folders would take long. And with `numpy_draws`.
    """
    _, values = resolved(case, profile)
    names = [name for name in STATISTICS if name in family.names]
    with (
        patch.object(dare_utils, "mask_draws", numpy_draws),
        patch.object(della_utils, "mask_draws", numpy_draws),
    ):
        merged = [
            np.concatenate([_merge(case, values, family, name, seed) for name in names])
            for seed in range(seeds)
        ]
    return Moments(np.mean(merged, axis=0), np.var(merged, axis=0, ddof=1))


def numpy_draws(key: Key, start: int, count: int, device: object = "cpu") -> Tensor:
    """`dare_utils.mask_draws` of whole tensors: numpy has that generator, and is ready sooner."""
    if start:
        raise ValueError(f"start must be 0, got {start}")
    counter = np.zeros(4, np.uint64)
    words = np.random.Philox(key=np.array(key, np.uint64), counter=counter).random_raw(
        (count + 1) // 2
    )
    halves = np.stack((words & np.uint64(2**32 - 1), words >> np.uint64(32)), axis=1)
    return torch.from_numpy(halves.ravel()[:count].astype(np.int64))


def _merge(case: Case, values: Values, family: Family, name: str, seed: int) -> Doubles:
    """The merged task vector of one tensor, flat."""
    inputs = [torch.from_numpy(tensors[name]) for tensors in case.inputs({case.tied: family})]
    base, models = inputs[0], inputs[1:]
    deltas = [_sparse(model - base, i, values, name, seed) for i, model in enumerate(models)]
    zero = torch.zeros_like(base)
    if values["variant"] == "linear":
        total = combine_deltas(deltas, values["weights"], normalize=values["normalize"])
        merged = add_task_vector(zero, total, values["lam"])
    else:
        merged = elect_and_merge(
            zero,
            deltas,
            values["weights"],
            values["lam"],
            denominator=values["denominator"],
            elect_on=values["elect_on"],
            elect_method=values["elect_method"],
        )
    return merged.flatten().double().numpy()


def _sparse(delta: Tensor, model: int, values: Values, name: str, seed: int) -> Tensor:
    """A task vector of which entries were dropped at random."""
    key, density = mask_key(seed, str(model), name), values["densities"][model]
    if "epsilons" in values:
        return della_utils.della(
            delta, density, values["epsilons"][model], key, rescale=values["rescale"]
        )
    return dare_utils.dare(delta, density, key, rescale=values["rescale"])
