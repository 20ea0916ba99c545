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
from merge_kernels import KernelOperations
from merge_operations import Drop, TaskVectorMerge, TorchOperations, Trim, TrimRows, window
from merge_stream import Block, Layout, TensorTask
from model_safetensors import FLOAT_DTYPES, TensorInfo, widen
from scalar_utils import KEEP_ALL, KEEP_NONE, LANES, RUN, TrimThreshold, mask_key

ROOT = Path(__file__).resolve().parent.parent
KERNELS, TORCH = KernelOperations(), TorchOperations()
DTYPES = tuple(FLOAT_DTYPES)
MODELS = 3
WEIGHTS = ((0.5, 0.3, -0.7), (1.0, 1.0, 1.0), (0.0, 2.0, 0.1))
SIZES = [(1, 1), (1, 511), (3, 512), (2, 1025), (5, 33), (1, 17000)]


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
        found.append((block.stored(-1).tobytes(), None if own is None else np.maximum(own, 0)))
    return found


def assert_same_bits(block, make, state=None):
    (kernels, left), (torchs, left_by_torch) = results(block, make, state)
    assert kernels == torchs
    assert state is None or np.array_equal(left, left_by_torch)


def gathered(block, make):
    """What both gather from a block."""
    found = []
    for operations in (KERNELS, TORCH):
        gather = make(operations)
        collection = gather.start(["t"])
        gather.take(block, collection)
        found.append(collection)
    return found


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


@pytest.mark.parametrize("dtypes", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dot_products_and_norms(dtypes, size):
    block = make_block(*size, dtypes)
    pair = make_block(*size, (*dtypes[:2], dtypes[-1]))
    kernels, by_torch = gathered(pair, lambda ops: ops.dot_parts())
    assert np.array_equal(kernels._parts[0], by_torch._parts[0])
    keys = tuple(mask_key(1, str(model), "t") for model in range(MODELS))
    drop = Drop(keys, (0.3, 0.0, 1.0), (1.0,) * MODELS)
    kernels, by_torch = gathered(block, lambda ops: ops.absolute_parts(drop))
    assert np.array_equal(kernels._parts[0], by_torch._parts[0])
    assert kernels.totals() == by_torch.totals()


@pytest.mark.parametrize("dtypes", LAYOUTS, ids="-".join)
def test_histograms_and_counts(dtypes):
    block = make_block(4, 1700, dtypes)
    kernels, by_torch = gathered(block, lambda ops: ops.coarse_histograms([2, 0]))
    assert np.array_equal(kernels, by_torch)
    assert kernels.sum() == 2 * block.size
    deltas = [block.values(index) - block.values(0) for index in range(1, 4)]
    some = [int(np.abs(d).view(np.int32).flat[9]) for d in deltas]
    for guesses in ({0: some[0], 2: some[2]}, {1: 0}, {1: 2**31 - 1}):
        kernels, by_torch = gathered(block, lambda ops, g=guesses: ops.fine_histograms(g))
        for index, (model, guess) in enumerate(guesses.items()):
            assert np.array_equal(kernels.bins[index], by_torch.bins[index])
            magnitudes = np.abs(deltas[model]).view(np.int32)
            above = int((magnitudes.astype(np.int64) >= window(guess) + 2**16).sum())
            assert kernels.above[index] == by_torch.above[index] == above
        assert np.array_equal(kernels.segments.counts, by_torch.segments.counts)
        assert kernels.segments.names == ["t"]
    thresholds = [TrimThreshold(some[0], 1), KEEP_ALL, KEEP_NONE]
    kernels, by_torch = gathered(block, lambda ops: ops.count_kept(thresholds))
    assert np.array_equal(kernels.counts, by_torch.counts)
    assert kernels.counts[0, 1:].tolist() == [[block.size, 0], [0, 0]]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.data())
def test_a_bin_is_selected_as_torch_does(counts, data):
    counts = np.array([*counts, 1])
    rank = data.draw(st.integers(1, int(counts.sum())))
    assert KERNELS.select_bin(counts, rank) == TORCH.select_bin(counts, rank)


@pytest.mark.parametrize("elect", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtypes", LAYOUTS, ids="-".join)
def test_task_vectors_are_merged_alike(dtypes, normalize, elect):
    for size, weights, lam in itertools.product(SIZES, WEIGHTS, (1.0, 0.0, -0.4)):
        if normalize and elect and min(weights) < 0:
            continue
        block = make_block(*size, dtypes)
        merge = TaskVectorMerge(weights, lam, normalize, elect)
        assert_same_bits(block, lambda ops, merge=merge: ops.merge_task_vectors(merge))


@pytest.mark.parametrize("dtypes", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("left", [0, 1, 7, 300, 10**9, -5])
def test_equal_magnitudes_are_kept_from_the_first_on(dtypes, left):
    block = make_block(3, 1500, dtypes)
    bits = [
        int(np.sort(np.abs(block.values(index) - block.values(0)).view(np.int32), axis=None)[2000])
        for index in (1, 2)
    ]
    for chosen in ((TrimThreshold(bits[0], 5), TrimThreshold(bits[1], 5), KEEP_ALL),
                   (KEEP_NONE, TrimThreshold(bits[1], 5), TrimThreshold(0, 9))):  # fmt: skip
        merge = TaskVectorMerge(WEIGHTS[1], 1.0, True, True, Trim(chosen))
        state = np.array([left if threshold.ties else 0 for threshold in chosen])
        assert_same_bits(block, lambda ops, merge=merge: ops.merge_task_vectors(merge), state)


@settings(max_examples=60)
@given(
    size=st.sampled_from([(1, 1), (4, 3), (2, 700), (3, 1025)]),
    densities=st.tuples(*[st.sampled_from([0.0, 0.001, 0.3, 0.5, 0.99, 1.0])] * MODELS),
    dtypes=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 99),
)
def test_rows_are_trimmed_alike(size, densities, dtypes, seed):
    block = make_block(*size, dtypes, seed)
    merge = TaskVectorMerge(WEIGHTS[1], 1.0, True, True, TrimRows(densities))
    assert_same_bits(block, lambda ops: ops.merge_task_vectors(merge))


@pytest.mark.parametrize("elect", [False, True])
@pytest.mark.parametrize("dtypes", LAYOUTS, ids="-".join)
@pytest.mark.parametrize(
    ("size", "first"), [((1, 5), 0), ((3, 1500), 7), ((2, 515), 3), ((2, 515), 2**35 + 3)], ids=str
)
def test_entries_are_dropped_alike(dtypes, size, first, elect):
    block = make_block(*size, dtypes, first=first)
    keys = tuple(mask_key(2**63 + 5, str(model), "t") for model in range(MODELS))
    for densities in ((0.3, 0.9, 0.01), (0.0, 1.0, 0.5)):
        drop = Drop(keys, densities, (1 / 0.3, 1.7, 0.0))
        merge = TaskVectorMerge((0.5, 0.3, 0.7), 1.0, elect, elect, drop)
        assert_same_bits(block, lambda ops, merge=merge: ops.merge_task_vectors(merge))


# Torch, when a GPU's memory runs out


def test_what_does_not_fit_on_the_gpu_is_computed_on_the_cpu(monkeypatch):
    """A device stands in for the GPU whose memory is always too small."""
    block = make_block(3, 700, MIXED)
    merge = TaskVectorMerge(WEIGHTS[1], 1.0, True, True, TrimRows((0.3, 0.5, 1.0)))
    TORCH.merge_task_vectors(merge)(block, None)
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
        gather.take(block, counts)
    block.stored(-1).fill(0)
    take(block, None)
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
    assert [k.__name__ for k in kernels if len(k.signatures) > 1] == []


def test_compiled_code_outlives_a_read_only_installation(tmp_path):
    """Where the module's folder cannot be written the user's cache is used, or none."""
    code = (
        "import merge_kernels as k; import numpy as np; k._sum_lanes(np.zeros(1024));"
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
