"""The compiled kernels give the bits of the torch functions, on every branch."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import merge_kernels
from gram_utils import nuslerp_coefficients
from merge_compiled import CompiledOperations
from merge_operations import (
    Consensus,
    CutRows,
    Cuts,
    Drop,
    DropByRank,
    Election,
    Importance,
    Select,
    TaskVectorMerge,
    window,
)
from merge_stream import Block, Layout, TensorTask
from merge_torch import TorchOperations
from model_safetensors import FLOAT_DTYPES, TensorInfo, widen
from scalar_utils import (
    KEEP_ALL,
    KEEP_NONE,
    LANES,
    RUN,
    Cut,
    TrimThreshold,
    Window,
    kept_count,
    mask_key,
    trim_cut,
    window_counts,
)
from sce_utils import variance

ROOT = Path(__file__).resolve().parent.parent
KERNELS, TORCH = CompiledOperations(), TorchOperations()
DTYPES = tuple(FLOAT_DTYPES)
MODELS = 3
WEIGHTS = ((0.5, 0.3, -0.7), (1.0, 1.0, 1.0), (0.0, 2.0, 0.1))
SIZES = [(1, 1), (1, 511), (3, 512), (2, 1025), (5, 33), (2, 2049), (1, 3500), (1, 17000)]


def stored(values, dtype):
    """Float32 values as they are stored, rounded by torch."""
    tensor = torch.from_numpy(values.astype(np.float32))
    if dtype == "BF16":
        return tensor.bfloat16().view(torch.uint16).numpy()
    return tensor.numpy() if dtype == "F32" else tensor.half().numpy()


def make_block(rows=3, row_length=1500, dtypes=("BF16",) * 5, seed=0, first=7):
    """A base and fine-tunes that differ little, often not at all, sometimes much."""
    random = np.random.default_rng(seed)
    info = TensorInfo(dtypes[-1], (10**4, row_length))
    task = TensorTask("t", info, ("t",) * (len(dtypes) - 1), {})
    layout = Layout(task, dtypes[:-1], 10**9)
    layout.rows = rows
    sizes = [rows * row_length * FLOAT_DTYPES[dtype].itemsize for dtype in dtypes]
    layout.offsets = [*itertools.accumulate((size + 64 for size in sizes), initial=0)][:-1]
    layout.places = np.array(layout.offsets)
    block = Block(np.zeros(sum(sizes) + 64 * len(sizes), np.uint8), layout, first, rows, segment=0)
    base = random.normal(0, 0.02, (rows, row_length))
    base[random.random(base.shape) < 0.05] = -0.0
    base[random.random(base.shape) < 0.05] *= 1e-4  # below float16's normal range
    for index, dtype in enumerate(dtypes[:-1]):
        noise = random.normal(0, 0.001, base.shape) * (random.random(base.shape) < 0.8)
        block.stored(index)[:] = stored(base + noise * (index > 0), dtype)
    return block


def results(block, make, state=None):
    """What both make of a block, and what they leave of the state."""
    found = []
    for operations in (KERNELS, TORCH):
        block.stored(-1).fill(0)
        own = None if state is None else state.copy()
        make(operations)(block, own)
        found.append((block.stored(-1).tobytes(), None if own is None else own.tolist()))
    return found


def assert_same_bits(block, make, state=None):
    kernels, by_torch = results(block, make, state)
    assert kernels == by_torch


def gathered(block, make, state=None):
    """What both gather from a block."""
    found = []
    for operations in (KERNELS, TORCH):
        gather = make(operations)
        collection = gather.start(["t"])
        gather.take(block, collection, None if state is None else state.copy())
        found.append(collection)
    return found


def magnitudes(block):
    """Bits of the magnitudes of every task vector."""
    base = block.values(0)
    return [np.abs(block.values(index) - base).view(np.int32) for index in range(1, MODELS + 1)]


def ranked(block, rank):
    """Bits of a magnitude of each task vector that so many entries are not larger than."""
    return [int(np.sort(bits, axis=None)[rank % bits.size]) for bits in magnitudes(block)]


SEEN = np.zeros((MODELS, 2), dtype=np.int64)
KEYS = tuple(mask_key(2**63 + 5, str(model), "t") for model in range(MODELS))

MIXED = ("BF16", "F16", "F32", "BF16", "F16")
LAYOUTS = [*((dtype,) * 5 for dtype in DTYPES), MIXED, (*MIXED[:4], "F32")]


@pytest.mark.parametrize("dtypes", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_weighted_sums(dtypes, size):
    block = make_block(*size, dtypes)
    for normalize in (True, False):
        assert_same_bits(
            block, lambda ops, n=normalize: ops.linear((0.5, 0.3, -0.7, 0.0), normalize=n)
        )
    assert_same_bits(block, lambda ops: ops.combine((0.31, 0.69, 0.0, -1e-3)))

    for factor in (None, 0.5, -1.7):
        assert_same_bits(block, lambda ops, factor=factor: ops.scale(factor))
    for t in (0.0, 1e-3, 2.0):
        assert_same_bits(block, lambda ops, t=t: ops.nearswap(t))


def nuslerp(gram):
    (aa, ac), (_, cc) = gram
    return nuslerp_coefficients(aa, cc, ac, 0.3)[:2]


@pytest.mark.parametrize("dtypes", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_are_combined_alike(dtypes, size):
    pair = make_block(*size, (*dtypes[:2], dtypes[-1]))
    assert_same_bits(pair, lambda ops: ops.combine_rows(nuslerp, deltas=False))
    three = make_block(*size, (*dtypes[:3], dtypes[-1]))
    assert_same_bits(three, lambda ops: ops.combine_rows(nuslerp, deltas=True))


@pytest.mark.parametrize("dtypes", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dot_products(dtypes, size):
    block = make_block(*size, dtypes)
    for deltas, pairs in ((False, 10), (True, 6)):
        kernels, by_torch = gathered(block, lambda ops, d=deltas: ops.gram_parts(deltas=d))
        assert np.array_equal(kernels._parts[0], by_torch._parts[0])
        assert len(kernels._parts[0]) == pairs


@pytest.mark.parametrize("dtypes", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_conflicts_are_counted_alike(dtypes, size):
    block = make_block(*size, dtypes)
    for thresholds in ([0] * MODELS, ranked(block, block.size // 2)):
        kernels, by_torch = gathered(block, lambda ops, t=thresholds: ops.count_conflicts(t))
        assert np.array_equal(kernels, by_torch)
    kernels, by_torch = gathered(block, lambda ops: ops.gram_parts(deltas=False, first=1))
    assert np.array_equal(kernels._parts[0], by_torch._parts[0])


def sparsifiers(block):
    """Every way to thin out task vectors, with the state that it starts with."""
    lower, upper = ranked(block, block.size // 2), ranked(block, block.size * 9 // 10)
    cuts = [Cut(low, 1, 4, high, 2) for low, high in zip(lower, upper, strict=True)]
    spread = variance([torch.from_numpy(block.values(i) - block.values(0)) for i in (1, 2, 3)])
    middle = int(np.sort(spread.numpy().view(np.int32), axis=None)[block.size // 2])
    rates = (0.3, 0.9, 0.01)
    return {
        "cuts": (Cuts(tuple(cuts), (1.0, 0.7, 1.3)), SEEN),
        "drop": (Drop(KEYS, rates, (1 / 0.3, 1.7, 0.0)), None),
        "rank": (DropByRank(KEYS, (0.5, 0.0, 1.0), (0.2,) * 3, "none", (1.0, 1.0, 0.3)), None),
        "chance": (DropByRank(KEYS, (0.3, 0.6, 0.5), (0.1,) * 3, "inverse_prob", (1.0,) * 3), None),
        "select": (Select(Cut(middle, 0, 2)), SEEN[:1]),
    }


@pytest.mark.parametrize("dtypes", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("power", [1, 2])
def test_norms_of_what_is_kept(dtypes, size, power):
    block = make_block(*size, dtypes)
    for sparsify, state in sparsifiers(block).values():
        kernels, by_torch = gathered(block, lambda ops, s=sparsify: ops.norm_parts(s, power), state)
        assert np.array_equal(kernels._parts[0], by_torch._parts[0])
        assert kernels.totals() == by_torch.totals()


@pytest.mark.parametrize("dtypes", LAYOUTS, ids="-".join)
def test_histograms_and_counts(dtypes):
    block = make_block(4, 1700, dtypes)
    kernels, by_torch = gathered(block, lambda ops: ops.coarse_histograms([2, 0, 2]))
    assert np.array_equal(kernels, by_torch)
    assert kernels.sum() == 3 * block.size
    bits = magnitudes(block)
    some = [int(each.flat[9]) for each in bits]
    for guesses in ([(0, some[0]), (2, some[2]), (0, some[1])], [(1, 0)], [(1, 2**31 - 1)]):
        kernels, by_torch = gathered(block, lambda ops, g=guesses: ops.fine_histograms(g))
        for index, (model, guess) in enumerate(guesses):
            assert np.array_equal(kernels.bins[index], by_torch.bins[index])
            above = int((bits[model].astype(np.int64) >= window(guess) + 2**16).sum())
            assert kernels.above[index] == by_torch.above[index] == above
        assert np.array_equal(kernels.segments.counts, by_torch.segments.counts)
        assert kernels.segments.names == ["t"]
    around = [(0, some[0]), (1, KEEP_ALL.bits), (2, KEEP_NONE.bits)]
    kernels, by_torch = gathered(block, lambda ops: ops.count_around(around))
    assert np.array_equal(kernels.counts, by_torch.counts)
    assert kernels.counts[0, 1:].tolist() == [[block.size, 0], [0, 0]]


@pytest.mark.parametrize("dtypes", LAYOUTS, ids="-".join)
def test_the_variance_is_counted_alike(dtypes):
    block = make_block(4, 1700, dtypes)
    kernels, by_torch = gathered(block, lambda ops: ops.coarse_histograms([0], "variance"))
    assert np.array_equal(kernels, by_torch)
    guess = [(0, int(np.flatnonzero(kernels[0])[-2]) << 16)]
    kernels, by_torch = gathered(block, lambda ops: ops.fine_histograms(guess, "variance"))
    assert np.array_equal(kernels.bins, by_torch.bins)
    kernels, by_torch = gathered(block, lambda ops: ops.count_around([(0, 0)], "variance"))
    assert np.array_equal(kernels.counts, by_torch.counts)
    assert 0 < kernels.counts[0, 0, 1] < block.size


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.data())
def test_a_bin_is_selected_as_torch_does(counts, data):
    counts = np.array([*counts, 1])
    rank = data.draw(st.integers(1, int(counts.sum())))
    assert KERNELS.select_bin(counts, rank) == TORCH.select_bin(counts, rank)


ELECTIONS = [
    None,
    *(
        Election(denominator, on, method, zero)
        for denominator in ("weight", "count", "none")
        for on in ("weighted", "unweighted")
        for method, zero in (("mass", 1.0), ("count", 0.0), ("mass", -1.0))
    ),
]


@pytest.mark.parametrize("election", ELECTIONS, ids=str)
@pytest.mark.parametrize("dtypes", LAYOUTS, ids="-".join)
def test_task_vectors_are_merged_alike(dtypes, election):
    for size, weights, lam in itertools.product(SIZES, WEIGHTS, (1.0, 0.0, -0.4)):
        block = make_block(*size, dtypes)
        merge = TaskVectorMerge(weights, lam, election is None, election)
        assert_same_bits(block, lambda ops, merge=merge: ops.merge_task_vectors(merge))


@pytest.mark.parametrize("dtypes", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("agreement", [0, 1, 2, 4])
def test_consensus_is_kept_alike(dtypes, agreement):
    for size, election in itertools.product(SIZES, ELECTIONS[:2]):
        block = make_block(*size, dtypes)
        consensus = Consensus((0.2, 0.4, 1.5), agreement)
        merge = TaskVectorMerge(WEIGHTS[1], 0.7, election=election, consensus=consensus)
        assert_same_bits(block, lambda ops, merge=merge: ops.merge_task_vectors(merge))


@pytest.mark.parametrize("dtypes", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("election", ELECTIONS[:2], ids=str)
def test_what_is_kept_is_merged_alike(dtypes, size, election):
    block = make_block(*size, dtypes)
    for sparsify, state in sparsifiers(block).values():
        merge = TaskVectorMerge((0.5, 0.3, 0.7), 0.9, True, election, sparsify)
        assert_same_bits(block, lambda ops, merge=merge: ops.merge_task_vectors(merge), state)


@pytest.mark.parametrize("dtypes", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("ties", [0, 1, 7, 300, 10**9])
@pytest.mark.parametrize("seen", [0, 3, 299, 10**9])
def test_equal_magnitudes_are_kept_from_the_first_on(dtypes, ties, seen):
    block = make_block(3, 1500, dtypes)
    bits = ranked(block, 2000)
    state = SEEN + seen
    for chosen in ((TrimThreshold(bits[0], ties), TrimThreshold(bits[1], ties), KEEP_ALL),
                   (KEEP_NONE, TrimThreshold(bits[1], ties), TrimThreshold(0, ties))):  # fmt: skip
        cuts = Cuts(tuple(map(trim_cut, chosen)), (1.0,) * MODELS)
        merge = TaskVectorMerge(WEIGHTS[1], election=Election("weight"), sparsify=cuts)
        assert_same_bits(block, lambda ops, merge=merge: ops.merge_task_vectors(merge), state)
        signs = gathered(block, lambda ops, merge=merge: ops.sum_signs(merge, None), state)
        assert signs[0].tolist() == signs[1].tolist()


@pytest.mark.parametrize("dtypes", [LAYOUTS[2], MIXED], ids="-".join)
@pytest.mark.parametrize(("first", "stop"), [(0, 5), (3, 900), (40, 41), (7, 7)])
@pytest.mark.parametrize("until", [0, 2, 500])
def test_windows_are_cut_alike_also_where_both_bounds_are_equal(dtypes, first, stop, until):
    block = make_block(3, 1500, dtypes)
    lower, upper = ranked(block, 2000), ranked(block, 4000)
    cuts = (
        Cut(lower[0], first, stop, upper[0], until),
        Cut(lower[1], first, stop, lower[1], until),
        Cut(0, first, stop, upper[2], until),
    )
    merge = TaskVectorMerge(WEIGHTS[1], sparsify=Cuts(cuts, (1.0,) * MODELS))
    for seen in (0, 20):
        assert_same_bits(block, lambda ops, merge=merge: ops.merge_task_vectors(merge), SEEN + seen)


@settings(max_examples=60)
@given(
    size=st.sampled_from([(1, 1), (4, 3), (2, 700), (3, 1025)]),
    densities=st.tuples(*[st.sampled_from([0.0, 0.001, 0.3, 0.5, 0.99, 1.0])] * MODELS),
    gamma=st.sampled_from([None, 0.0, 0.2, 0.9]),
    all_ties=st.booleans(),
    dtypes=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 99),
)
def test_rows_are_cut_alike(size, densities, gamma, all_ties, dtypes, seed):
    block = make_block(*size, dtypes, seed)

    def windows(length):
        if gamma is None:
            return [Window(kept_count(density, length), 0) for density in densities]
        return [window_counts(density, gamma, length) for density in densities]

    rows = CutRows(windows, gamma is not None, all_ties and gamma is None)
    merge = TaskVectorMerge(WEIGHTS[1], election=Election("weight"), sparsify=rows)
    assert_same_bits(block, lambda ops: ops.merge_task_vectors(merge))


@pytest.mark.parametrize("election", ELECTIONS[:2], ids=str)
@pytest.mark.parametrize("dtypes", LAYOUTS, ids="-".join)
@pytest.mark.parametrize(
    ("size", "first"),
    [((1, 5), 0), ((3, 1500), 7), ((2, 515), 3), ((2, 515), 2**35 + 3), ((2, 2051), 3)],
    ids=str,
)
def test_entries_are_dropped_alike(dtypes, size, first, election):
    block = make_block(*size, dtypes, first=first)
    for densities in ((0.3, 0.9, 0.01), (0.0, 1.0, 0.5)):
        epsilons = [min(density, 1 - density) / 2 for density in densities]
        for drop in (
            Drop(KEYS, densities, (1 / 0.3, 1.7, 0.0)),
            DropByRank(KEYS, densities, tuple(epsilons), "inverse_prob", (1.0, 1.0, 0.4)),
        ):
            merge = TaskVectorMerge((0.5, 0.3, 0.7), 1.0, True, election, drop)
            assert_same_bits(block, lambda ops, merge=merge: ops.merge_task_vectors(merge))


@pytest.mark.parametrize("dtypes", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 10.0])
def test_what_one_model_alone_has_changed_is_found_alike(dtypes, epsilon):
    for size in SIZES:
        block = make_block(*size, dtypes)
        kernels, by_torch = gathered(block, lambda ops: ops.count_active(epsilon, MODELS))
        assert np.array_equal(kernels, by_torch)
        assert_same_bits(block, lambda ops: ops.merge_active(epsilon, (1.0, 1.2, 0.9), 0.7))


@pytest.mark.parametrize(
    "row",
    [
        np.zeros(700),
        np.random.default_rng(0).normal(size=2500),
        np.random.default_rng(1).integers(-3, 4, 3000) * 2.0**-20,
        1.0 + np.random.default_rng(2).random(2000) * 1e-3,  # the upper halves are all the same
        np.concatenate([[1e30], np.random.default_rng(3).random(1500) * 1e-30, [0.0]]),
        np.arange(4096, 0, -1) * 1e-40,
        [-0.0, 3.0, 0.0],
        [7.0],
    ],
    ids=lambda row: str(len(row)),
)
def test_rows_are_sorted_by_magnitude_and_equal_ones_by_place(row):
    row = np.array(row, dtype=np.float32)
    keys, spare = np.empty((2, len(row)), np.uint64)
    counts = np.empty(merge_kernels._SORT_BINS, np.uint32)
    order = merge_kernels._sort_row(row, len(row), keys, spare, counts) & np.uint64(2**32 - 1)
    assert np.array_equal(order, np.argsort(np.abs(row), kind="stable"))


@pytest.mark.parametrize("rows", [(1, 700), (3, 700), (2, 5000)])
def test_arcee_fusion(rows):
    pair = make_block(*rows, ("BF16",) * 3)
    found, by_torch = gathered(pair, lambda ops: ops.row_divergence(100))
    assert np.array_equal(found, by_torch)
    divergence = found[pair.first : pair.first + pair.rows]
    assert (divergence > 0).all()
    score = Importance(found)
    scores = np.abs(pair.values(1) - pair.values(0)) * divergence[:, None]
    middle = np.sort(scores, axis=None)[scores.size // 2]
    guesses = [(0, int(middle.view(np.int32)))]
    kernels, by_torch = gathered(pair, lambda ops: ops.coarse_histograms([0], score))
    assert np.array_equal(kernels, by_torch)
    assert kernels.sum() == pair.size
    kernels, by_torch = gathered(pair, lambda ops: ops.fine_histograms(guesses, score))
    assert np.array_equal(kernels.bins, by_torch.bins)
    assert kernels.bins.sum() > 0
    assert np.array_equal(kernels.above, by_torch.above)
    kernels, by_torch = gathered(pair, lambda ops: ops.count_around(guesses, score))
    assert np.array_equal(kernels.counts, by_torch.counts)
    assert kernels.counts.sum() > 0
    assert_same_bits(pair, lambda ops: ops.fuse(score, float(middle)))


def test_what_has_no_loop_is_done_by_torch():
    pair = make_block(3, 700, ("BF16",) * 3)
    kernels, by_torch = gathered(pair, lambda ops: ops.column_grams(deltas=False))
    assert np.array_equal(np.asarray(kernels[0]), np.asarray(by_torch[0]))
    block = make_block(3, 700)
    rows = CutRows(lambda length: [Window(length // 3, 0)] * MODELS)
    kernels, by_torch = gathered(block, lambda ops: ops.norm_parts(rows, 1))
    assert kernels.totals() == by_torch.totals()
    merge = TaskVectorMerge(WEIGHTS[1], election=Election("weight"))
    assert (
        len({int(each[0]) for each in gathered(block, lambda ops: ops.sum_signs(merge, None))}) == 1
    )


# Torch, when a GPU's memory runs out


def test_what_does_not_fit_on_the_gpu_is_computed_on_the_cpu(monkeypatch):
    """A device stands in for the GPU whose memory is always too small."""
    block = make_block(3, 700, MIXED)
    cuts = Cuts(tuple(Cut(bits, 0, 2) for bits in ranked(block, 99)), (1.0,) * MODELS)
    merge = TaskVectorMerge(WEIGHTS[1], election=Election("weight"), sparsify=cuts)
    seen = SEEN.copy()
    TORCH.merge_task_vectors(merge)(block, seen)
    want = block.stored(-1).copy()
    operations = TorchOperations()
    operations._device = torch.device("meta")
    plain, asked = operations._inputs, []

    def inputs(block):
        asked.append(operations._device.type)
        if operations._device.type == "meta":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB\nmore")
        return plain(block)

    monkeypatch.setattr(operations, "_inputs", inputs)
    gather, take = operations.coarse_histograms([0]), operations.merge_task_vectors(merge)
    counts = gather.start(["t"])
    text = r"meta has too little memory for a block .*2 MiB\). The rest is computed on the CPU"
    with pytest.warns(UserWarning, match=text) as caught:
        gather.take(block, counts, None)
    block.stored(-1).fill(0)
    own = SEEN.copy()
    take(block, own)
    assert np.array_equal(own, seen)
    assert counts.sum() == block.size
    assert np.array_equal(block.stored(-1), want)
    assert (len(caught), asked) == (1, ["meta", "cpu", "cpu"])


# Conversions


def test_every_float16_and_bfloat16_is_read_as_numpy_reads_it():
    bits = np.arange(2**16, dtype=np.uint16)
    for dtype, exponent in (("F16", 0x7C00), ("BF16", 0x7F80)):
        finite = bits[bits & exponent != exponent].view(FLOAT_DTYPES[dtype])
        block = make_block(1, len(finite), (dtype, "F32"))
        block.stored(0)[:] = finite
        KERNELS.combine([1.0])(block, None)
        assert np.array_equal(block.stored(-1)[0] + 0.0, widen(finite, dtype) + 0.0)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@np.errstate(all="ignore")
def test_float32_is_rounded_as_torch_rounds_it(dtype):
    every = widen(np.arange(2**16, dtype=np.uint16).view(FLOAT_DTYPES[dtype]), dtype)
    every = np.sort(every[np.isfinite(every)])
    halves = ((every[1:].astype(np.float64) + every[:-1]) / 2).astype(np.float32)
    neighbours = [np.nextafter(halves, np.float32(side)) for side in (np.inf, -np.inf)]
    random = np.random.default_rng(0).integers(0, 2**32, 10**6, dtype=np.uint32).view(np.float32)
    edges = np.array([65519.9, 65520, 3.4e38, 1e-45, np.inf, np.nan, 0.0], dtype=np.float32)
    values = np.concatenate([every, halves, *neighbours, random, edges, -edges])
    block = make_block(1, len(values), ("F32", dtype))
    block.stored(0)[:] = values
    KERNELS.combine([1.0])(block, None)
    want = widen(stored(values + np.float32(0.0), dtype), dtype)
    found = block.values(-1)[0]
    assert np.array_equal(found, want, equal_nan=True)
    zero = want == 0
    assert np.array_equal(np.signbit(found[zero]), np.signbit(want[zero]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 700, 1499])
def test_what_is_not_finite_is_found(dtype, value, place):
    block = make_block(1, 1500, (dtype,) * 3)
    for operations in (KERNELS, TORCH):
        block.stored(-1).fill(0)
        assert operations.broken_inputs(block) == []
        assert operations.result_is_finite(block)
    for index in (1, -1):
        values = block.values(index).copy()
        values[0, place] = value
        block.stored(index)[:] = stored(values, dtype)
    for operations in (KERNELS, TORCH):
        assert operations.broken_inputs(block) == [1]
        assert not operations.result_is_finite(block)


# Compiling


def test_constants_that_are_compiled_in_are_those_of_the_definition():
    assert (merge_kernels.RUN, merge_kernels.LANES) == (RUN, LANES)


def test_a_kernel_is_compiled_once_for_all_dtypes():
    for dtypes in LAYOUTS:
        KERNELS.linear((1.0,) * 4, normalize=True)(make_block(2, 40, dtypes), None)
    kernels = [value for value in vars(merge_kernels).values() if hasattr(value, "signatures")]
    assert len(kernels) > 20
    assert {k.__name__: k.signatures for k in kernels if len(k.signatures) > 1} == {}


def test_compiled_code_outlives_a_read_only_installation(tmp_path):
    """Where the module's folder cannot be written the user's cache is used, or none."""
    code = (
        "import merge_kernels as k; import numpy as np; k._sum_lanes(np.zeros(256));"
        "s = k._sum_lanes.stats; print(bool(s.cache_path), sum(s.cache_hits.values()))"
    )
    package = tmp_path / "package"
    package.mkdir()
    for path in ROOT.glob("*.py"):
        (package / path.name).write_bytes(path.read_bytes())
    (package / "__pycache__").write_text("a file, where a folder is wanted")

    def run(cache):
        result = subprocess.run(
            [sys.executable, "-B", "-c", code],
            cwd=tmp_path, capture_output=True, text=True, check=True,
            env={"PYTHONPATH": str(package), "PATH": os.environ["PATH"], "XDG_CACHE_HOME": cache},
        )  # fmt: skip
        return result.stdout

    cache = str(tmp_path / "cache")
    assert run(cache) == f"{True} 0\n"
    assert run(cache) == f"{True} 1\n"
    (tmp_path / "file").touch()
    assert run(str(tmp_path / "file")) == f"{False} 0\n"
