"""Our merges against those of mergekit, PEFT and the TIES authors; see benchmarks/parity.py."""

import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.parity_cases import (
    EXACT,
    MOST_ASIDE,
    PEERS,
    SIGMAS,
    Case,
    Family,
    compare,
    draw_cases,
    join,
    make_families,
    merge_here,
    read_fixture,
    resolved,
    to_json,
)
from benchmarks.parity_random import in_sigmas, numpy_draws, our_moments, pinned_moments
from dare_utils import mask_draws, mask_key

fixture = functools.cache(read_fixture)
GROUPS = [(peer, group) for peer in PEERS for group in PEERS[peer].groups]
RANDOM = [(peer, group) for peer in PEERS for group in PEERS[peer].random]
MODELS = {
    "tied": "a471d9835b8230f189581ed43007f51c32d34637171dd416211f349c1dd93db8",
    "untied": "64d799f5a276da5edd2db3e528f5bf260fb22d64961a7d0ed6bcbfb4f9e85a05",
}
"""Hashes of the inputs: other models would need other fixtures."""


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Family]:
    return make_families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small take torch longer to share out than to merge."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cases_of(peer: str, group: str) -> dict[str, Case]:
    return {key: case for key, case in fixture(peer).cases.items() if case.group == group}


def test_the_tiny_models_are_those_that_the_others_merged(families):
    assert {"tied": families[True].hash, "untied": families[False].hash} == MODELS
    assert all(fixture(peer).about["models"] == MODELS for peer in PEERS)


@pytest.mark.parametrize("peer", PEERS)
def test_the_settings_are_those_that_are_drawn(peer):
    drawn = draw_cases(PEERS[peer].groups, 10)
    assert json.dumps({key: to_json(case) for key, case in drawn.items()}) == json.dumps(
        fixture(peer).about["cases"]
    )


@pytest.mark.parametrize("peer", PEERS)
def test_every_method_has_ten_settings_with_tied_heads_and_ten_without(peer):
    for group in PEERS[peer].groups:
        heads = [case.tied for case in cases_of(peer, group).values()]
        assert (heads.count(True), heads.count(False)) == (10, 10)


@pytest.mark.parametrize(("peer", "group"), GROUPS)
def test_merges_are_equal_up_to_rounding(peer, group, families, merged):
    profile, results, exact = PEERS[peer].profile, fixture(peer), fixture(EXACT)
    parts = []
    for key, case in cases_of(peer, group).items():
        exactly = exact.exact(key) if exact.cases.get(key) == case else None
        family, inputs = families[case.tied], case.inputs(families)
        ours = merged(case, profile)
        parts.append(compare(case, profile, family, inputs, ours, results.arrays[key], exactly))
    distances, kind = join(parts), PEERS[peer].groups[group]
    beyond = distances.beyond(kind)
    worst = distances.measured(same_steps=kind.same_steps)[distances.aside == 0].max()
    assert not beyond.any(), f"{beyond.sum()} elements are up to {worst:.1f} ulp apart"
    assert np.mean(distances.aside > 0) <= MOST_ASIDE


@pytest.fixture(scope="module")
def merged(families, tmp_path_factory):
    """Our merge of a case; profiles that resolve to the same parameters share it."""
    folder: Path = tmp_path_factory.mktemp("merged") / "model"
    known = {}

    def merge(case: Case, profile: str):
        key = resolved_key(case, profile)
        if key not in known:
            known[key] = merge_here(case, profile, families, folder)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # these folders need not outlast a power failure
        yield merge


def resolved_key(case: Case, profile: str) -> str:
    method, values = resolved(case, profile)
    return repr((method, case.tied, case.base, case.models, sorted(values.items())))


# Random masks


@pytest.fixture(scope="module")
def moments(families):
    """Mean and variance of our merges of a case; shared as those of `merged`."""
    known = {}

    def gather(case: Case, profile: str, seeds: int):
        key = resolved_key(case, profile)
        if key not in known:
            known[key] = our_moments(case, profile, families[case.tied], seeds)
        return known[key]

    return gather


@pytest.mark.parametrize(("peer", "group"), RANDOM)
def test_random_merges_have_the_same_means(peer, group, moments):
    results, squares = fixture(peer), []
    seeds = results.about["seeds"]
    for key, case in results.random.items():
        if case.group == group:
            ours = moments(case, PEERS[peer].profile, seeds)
            apart = in_sigmas(ours, pinned_moments(results, key), seeds)
            assert apart.max() < SIGMAS
            squares.append(apart**2)
    assert 0.8 < np.mean(np.concatenate(squares)) < 1.2


def test_the_draws_of_numpy_are_ours():
    key = mask_key(1, "0", "model.norm.weight")
    assert torch.equal(numpy_draws(key, 0, 21), mask_draws(key, 0, 21))
