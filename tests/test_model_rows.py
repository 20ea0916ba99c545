"""Rows of several models, read as a row map says: for any blocks, dtypes and threads."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import make_llama, read_tensors

import model_rows
from merge_methods import METHODS
from merge_operations import make_operations
from merge_plan import open_plan
from merge_recipe import Recipe
from merge_stream import StreamSettings, stream
from model_rows import MappedRows, TensorRows, runs
from model_utils import open_model_folder
from model_vocabulary import MISSING, Piece, RowMap, VocabularySettings

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def mapped(tensors, rows, fills=()):
    """Models of one tensor each, under names of their own."""
    names = [f"t{index}" for index in range(len(tensors))]
    sources = [TensorRows({name: t}) for name, t in zip(names, tensors, strict=True)]
    return MappedRows(sources, names, RowMap(np.array(rows, dtype=np.int64), dict(fills)))


def read(rows, first, stop):
    """Rows of every model, read into memory full of NaN."""
    lengths = [
        source.tensors[name].shape[1]
        for source, name in zip(rows._sources, rows._names, strict=True)
    ]
    values = [np.full((stop - first, length), np.nan, dtype=np.float32) for length in lengths]
    rows.read(first, stop, values)
    return [torch.from_numpy(each) for each in values]


def read_in_blocks(rows, stops):
    """The rows of every model, read up to each of the stops."""
    blocks, first = [], 0
    for stop in stops:
        blocks.append(read(rows, first, stop))
        first = stop
    return [torch.cat(parts) for parts in zip(*blocks, strict=True)]


def test_rows_are_cut_moved_and_filled():
    base = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    tuned = torch.tensor([[7.0, 8.0], [9.0, 10.0]])
    fills = {1: (Piece(0, 0),), 2: (Piece(0, 0, 0.5), Piece(1, 1, 2.0)), 3: None, 4: ()}
    rows = [[2, 0, MISSING, MISSING, MISSING], [1, MISSING, MISSING, 0, MISSING]]
    first, second = read(mapped([base, tuned], rows, fills), 0, 5)
    # [1, 2] / 2 + 2 * [9, 10]; the mean of the rows 0 and 2 of the base
    assert first.tolist() == [[5, 6], [1, 2], [18.5, 21], [3, 4], [0, 0]]
    assert second.tolist() == [[9, 10], [1, 2], [18.5, 21], [7, 8], [0, 0]]


def test_what_a_model_gets_may_be_a_row_that_it_does_not_give_itself():
    values = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])]
    forced = mapped(values, [[MISSING, 1], [MISSING, 1]], {0: (Piece(1, 1),)})
    assert [each.tolist() for each in read(forced, 0, 2)] == [[[4], [2]], [[4], [4]]]
    part = mapped(values, [[0, MISSING], [0, 0]], {1: (Piece(1, 0, 0.5),)})
    assert [each.tolist() for each in read(part, 0, 2)] == [[[1], [1.5]], [[3], [3]]]


def test_a_row_that_one_model_gives_leaves_those_alone_that_have_their_own():
    values = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]]), torch.tensor([[4.0]])]
    rows = [[0, 1], [0, MISSING], [MISSING, 0]]
    found = read(mapped(values, rows, {0: (Piece(0, 0),), 1: (Piece(0, 1),)}), 0, 2)
    assert [each.tolist() for each in found] == [[[1], [2]], [[3], [2]], [[1], [4]]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_come_as_float32_without_a_change(dtype):
    values = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    (rows,) = read(mapped([values], [[5, 0, 1, 2, 4]]), 0, 5)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, values[[5, 0, 1, 2, 4]].float())


def test_a_mean_is_that_of_the_rows_that_are_in_the_result():
    values = torch.tensor([[1.0], [100.0], [2.0], [6.0]], dtype=torch.bfloat16)
    other = torch.zeros(4, 1)
    rows = [[0, 2, 3, 3, MISSING], [0, 1, 2, 3, 3]]
    first, _ = read(mapped([values, other], rows, {4: None}), 4, 5)
    assert first.tolist() == [[3.0]]  # a row counts once, however often it is used


def test_the_mean_of_a_model_without_a_row_in_the_result_is_zero():
    (rows,) = read(mapped([torch.ones(2, 3)], [[MISSING] * 2], {0: None, 1: None}), 0, 2)
    assert rows.tolist() == [[0.0] * 3] * 2


# Any map


@st.composite
def models_and_maps(draw):
    """Embeddings of small whole numbers, whose sums are exact, and any map of their rows."""
    count, length = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))
    tensors = [
        torch.tensor(
            draw(
                st.lists(
                    st.lists(st.integers(-8, 8), min_size=length, max_size=length),
                    min_size=size,
                    max_size=size,
                )
            ),
            dtype=draw(st.sampled_from(DTYPES)),
        )
        for size in sizes
    ]
    merged = draw(st.integers(1, 9))
    own = [
        draw(st.lists(st.integers(MISSING, size - 1), min_size=merged, max_size=merged))
        for size in sizes
    ]
    fills = {}
    for row in range(merged):
        if MISSING in [rows[row] for rows in own]:
            pieces = st.integers(0, count - 1).flatmap(
                lambda model: st.builds(
                    Piece,
                    st.just(model),
                    st.integers(0, sizes[model] - 1),
                    st.sampled_from([1.0, 0.5, -0.25]),
                )
            )
            fills[row] = draw(st.none() | st.lists(pieces, max_size=3).map(tuple))
    stops = draw(st.lists(st.integers(1, merged), unique=True).map(sorted))
    return tensors, own, fills, [*(stop for stop in stops if stop < merged), merged]


def row_by_row(tensors, own, fills):
    """What is to be read, the slow way."""
    tables = [tensor.double().tolist() for tensor in tensors]
    length = tensors[0].shape[1]
    result = []
    for table, rows in zip(tables, own, strict=True):
        found = []
        for row, number in enumerate(rows):
            if number != MISSING:
                found.append(table[number])
            elif fills[row] is None:
                kept = {number for number in rows if number != MISSING}
                columns = [[table[number][c] for number in kept] for c in range(length)]
                found.append([sum(column) / max(1, len(kept)) for column in columns])
            else:
                found.append(
                    [sum(s * tables[m][r][c] for m, r, s in fills[row]) for c in range(length)]
                )
        result.append(torch.tensor(found, dtype=torch.float64).float())
    return result


@given(models_and_maps())
def test_any_map_is_read_as_row_by_row_and_in_any_blocks(case):
    tensors, own, fills, stops = case
    expected = row_by_row(tensors, own, fills)
    for blocks in (stops, [len(own[0])], range(1, len(own[0]) + 1)):
        found = read_in_blocks(mapped(tensors, own, fills), blocks)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@given(st.lists(st.integers(MISSING, 9), max_size=20))
def test_runs_are_the_rows_that_are_there_each_once_and_none_longer_than_it_is(rows):
    found = list(runs(np.array(rows, dtype=np.int64)))
    spread = [
        (position + step, first + step)
        for position, first, stop in found
        for step in range(stop - first)
    ]
    assert spread == [(place, row) for place, row in enumerate(rows) if row != MISSING]
    neighbours = [(a, b) for a, b in pairwise(rows) if a != MISSING]
    joined = sum(b == a + 1 for a, b in neighbours)
    assert len(found) == len(spread) - joined


# Means


def test_a_mean_does_not_depend_on_blocks_threads_or_which_is_asked_first(monkeypatch):
    monkeypatch.setattr(model_rows, "MEAN_ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(50, 6, generator=generator).to(dtype) for dtype in DTYPES]
    orders = [torch.randperm(50, generator=generator)[:40].tolist() for _ in tensors]
    rows = [[*order, *[MISSING] * 4] for order in orders]
    fills = dict.fromkeys(range(40, 44))
    expected = read_in_blocks(mapped(tensors, rows, fills), [44])
    for values, order, tensor in zip(expected, orders, tensors, strict=True):
        mean = tensor[order].double().mean(dim=0)
        torch.testing.assert_close(values[43].double(), mean, rtol=1e-6, atol=1e-7)
    for step in (1, 3, 41):
        found = read_in_blocks(mapped(tensors, rows, fills), [*range(step, 44, step), 44])
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    shared = mapped(tensors, rows, fills)
    with ThreadPoolExecutor(4) as pool:
        under_way = [pool.submit(read, shared, row, row + 1) for row in range(43, -1, -1)]
    for row, future in zip(range(43, -1, -1), under_way, strict=True):
        for values, whole in zip(future.result(), expected, strict=True):
            assert torch.equal(values[0], whole[row])


class CountedRows(TensorRows):
    """Counts the rows that are read."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.rows = 0

    def read_rows(self, name, first, stop, buffer):
        self.rows += stop - first
        return super().read_rows(name, first, stop, buffer)


def test_every_row_is_read_once_and_those_of_a_mean_once_more():
    sources = [CountedRows({"e": torch.ones(5, 2)}), CountedRows({"e": torch.ones(3, 2)})]
    rows = np.array([[0, 1, 2, 3, 4, MISSING, MISSING], [0, 1, 2, *[MISSING] * 4]])
    fills = {3: (Piece(0, 3),), 4: (Piece(0, 4),), 5: None, 6: None}
    reader = MappedRows(sources, ["e", "e"], RowMap(rows, fills))
    for row in range(7):
        read(reader, row, row + 1)
    assert [source.rows for source in sources] == [5 + 5, 3 + 3]


# Sources


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_in_memory_are_read_as_those_of_a_folder(tmp_path, dtype):
    make_llama(tmp_path, dtype=dtype)
    memory = TensorRows(read_tensors(tmp_path))
    with open_model_folder(tmp_path) as folder:
        assert memory.tensors == folder.tensors
        for first, stop in [(0, 48), (3, 4), (40, 48)]:
            buffers = [np.full(4 * 48 * 32, 1, dtype=np.uint8) for _ in range(2)]
            found = [
                source.read_rows(EMBEDDING, first, stop, buffer)
                for source, buffer in zip((memory, folder), buffers, strict=True)
            ]
            assert np.array_equal(*found)
            assert np.array_equal(*buffers)
            assert all(map(np.shares_memory, found, buffers))


class Kept:
    """Takes merged rows in memory."""

    def __init__(self, tasks):
        self.tensors = {task.name: torch.empty(task.info.shape) for task in tasks}

    def write_rows(self, name, first, rows):
        target = self.tensors[name].view(-1, rows.shape[1])
        target[first : first + len(rows)] = torch.from_numpy(rows)

    def finish(self, findings):
        pass


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare"])
def test_a_merge_of_mapped_rows_does_not_depend_on_blocks_or_threads(tmp_path, method):
    make_llama(tmp_path / "base", vocab_size=40, layers=1)
    make_llama(tmp_path / "a", seed=1, base=tmp_path / "base", vocab_size=48, layers=1)
    make_llama(
        tmp_path / "b", seed=2, base=tmp_path / "base", vocab_size=44, layers=1, dtype="float16"
    )
    recipe = Recipe(
        method=method, base_model=str(tmp_path / "base"), dtype="float32",
        models=(str(tmp_path / "a"), str(tmp_path / "b")),
        vocabulary=VocabularySettings(mode="pad", pad_to_multiple_of=50),
    )  # fmt: skip
    results = []
    for block_bytes, threads in [(2**20, 1), (512, 1), (1500, 3)]:
        with ExitStack() as stack:
            plan = stack.enter_context(open_plan(recipe))
            tasks = [task for task in plan.tasks if task.name in (EMBEDDING, HEAD)]
            assert all(task.row_map is not None and task.info.shape[0] == 50 for task in tasks)
            kept = Kept(tasks)
            settings = StreamSettings(threads=threads, block_bytes=block_bytes)
            operations = make_operations("cpu")
            stream(
                [[task] for task in tasks],
                lambda group, operations=operations: METHODS[method].merge(group, operations),
                plan.passes_of, operations, plan.sources, kept, settings,
            )  # fmt: skip
            results.append(kept.tensors)
    for name in (EMBEDDING, HEAD):
        assert torch.equal(results[0][name], results[1][name])
        assert torch.equal(results[0][name], results[2][name])
        tuned = [read_tensors(tmp_path / model)[name].float() for model in "ab"]
        assert torch.equal(results[0][name][44:48], tuned[0][44:48])


def test_of_some_models_only_what_these_need_is_read():
    """Model 1 alone is wanted: its own rows, and those that others give it."""
    rows = np.array([[0, 1, MISSING], [0, MISSING, MISSING], [0, MISSING, 2]])
    fills = {1: (Piece(0, 1),), 2: (Piece(0, 0, 0.5), Piece(2, 2, 0.5))}
    values = [torch.full((3, 2), 10.0 * model) + torch.arange(3.0)[:, None] for model in range(3)]
    sources = [TensorRows({"e": value}) for value in values]
    target = np.empty((3, 2), np.float32)
    MappedRows(sources, ["e"] * 3, RowMap(rows, fills), [1]).read(0, 3, [target])
    assert target[:, 0].tolist() == [10.0, 1.0, 11.0]
