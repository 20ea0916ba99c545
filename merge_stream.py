"""The one loop of every merge: read a block of rows of all models, compute, write.

It knows blocks, buffers, threads and progress, and no math. A method gives it a generator per
tensor (see `Passes`): the generator asks for passes over the tensor, receives what they
gathered, and ends with the function that turns a block of every input into a block of output.

Blocks are ranges of whole rows. What is gathered is folded in the order of the blocks, so the
result does not depend on how many threads there are; that it does not depend on the size of the
blocks either is up to what a method gathers (integer counts, and sums over runs within a row).
"""

import functools
import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

from model_errors import ModelCompatibilityError
from model_rows import MappedRows
from model_safetensors import FLOAT_DTYPES, TensorInfo
from model_utils import rows_of
from model_vocabulary import MISSING, RowMap

T = TypeVar("T")

BLOCK_ELEMENTS = 2**17
"""Elements of one tensor in a block: a float32 block of one model is 512 KB and stays in cache."""

SPAN_BLOCKS = 16
"""Consecutive blocks that a thread works through before it hands in what it gathered."""


class Source(Protocol):
    """Where tensors come from; a `ModelFolder` is one."""

    @property
    def label(self) -> str:
        """What the user called the model."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of every tensor, by name."""

    def read_rows(self, name: str, first: int, stop: int, buffer: Tensor) -> Tensor:
        """Rows of a tensor as stored; see `ModelFolder.read_rows`."""


class Sink(Protocol):
    """Where merged rows go; a `FolderWriter` is one."""

    def write_rows(self, name: str, first: int, rows: Tensor) -> None:
        """Take merged rows, from row `first` on; see `FolderWriter.write_rows`."""


@dataclass(frozen=True)
class TensorTask:
    """One tensor of the merged model.

    Attributes:
        name: in the merged model.
        info: dtype and shape in the merged model.
        sources: which tensor of each model feeds it, the base (if any) first.
        parameters: the method's parameters for this tensor.
        row_map: which rows of the models feed its rows, where these are not the same.
    """

    name: str
    info: TensorInfo
    sources: tuple[str, ...]
    parameters: Mapping[str, Any]
    row_map: RowMap | None = None


@dataclass(frozen=True)
class Block:
    """The same rows of every model, float32, on the device.

    Attributes:
        index: position among the blocks of the tensor.
        first: the first row.
        start: flat index of the first element in the tensor.
        base: (rows, row length), or None for methods without a base.
        models: the fine-tuned models, each (rows, row length).
    """

    index: int
    first: int
    start: int
    base: Tensor | None
    models: list[Tensor]

    @functools.cached_property
    def deltas(self) -> list[Tensor]:
        """The task vectors `model - base`."""
        if self.base is None:
            raise ValueError("there are no task vectors without a base")
        return [model - self.base for model in self.models]


class Gather(NamedTuple):
    """A pass that collects something: `function` per block, joined by `fold` in block order."""

    function: Callable[[Block], Any]
    fold: Callable[[Any, Any], Any]


class Merge(NamedTuple):
    """The last pass: `function` turns a block of every model into a block of the result.

    `findings` is what the method found out about the tensor, for the report.
    """

    function: Callable[[Block], Tensor]
    findings: Mapping[str, Any] = {}


Passes = Generator[Gather, Any, Merge]
"""What a method does with one tensor: any number of `Gather`, each answered with what was
gathered, then `Merge`. A method that gathers nothing is a plain function returning `Merge`."""


@dataclass(frozen=True)
class StreamSettings:
    """How a merge is run; nothing here changes a bit of the result on the CPU.

    Attributes:
        device: where to compute, such as "cpu" or "cuda"; blocks travel there and back.
        threads: blocks worked on at once.
        block_elements: elements of each model in a block (at least one row is taken).
        on_bytes: told how many bytes of input have been read since the last call.
    """

    device: str = "cpu"
    threads: int = 1
    block_elements: int = BLOCK_ELEMENTS
    on_bytes: Callable[[int], None] = lambda _: None


def stream(
    tasks: Sequence[TensorTask],
    merge_tensor: Callable[[TensorTask], Passes | Merge],
    base: Source | None,
    models: Sequence[Source],
    sink: Sink,
    settings: StreamSettings,
) -> dict[str, Mapping[str, Any]]:
    """Merge tensor by tensor, block by block.

    Args:
        tasks: the tensors of the result, in the order in which they are made.
        merge_tensor: the method.
        base: the common ancestor, or None for a method without one.
        models: the fine-tuned models.
        sink: takes the merged rows.

    Returns:
        What the method found out about each tensor, by name.

    Raises:
        ModelCompatibilityError: an input holds NaN or infinity, or the result does not fit the
            output's dtype.
        OSError: reading or writing failed.
    """
    findings = {}
    buffers = _Buffers()
    with _Workers(settings.threads) as workers:
        for task in tasks:
            if not task.info.numel:
                continue  # nothing to read, to merge or to write
            work = _TensorWork(task, base, models, settings, buffers, workers)
            merge = _gather_all(merge_tensor(task), work)
            work.run(functools.partial(write_block, merge, task, sink), lambda *_: None)
            findings[task.name] = merge.findings
    return findings


def _gather_all(passes: Passes | Merge, work: "_TensorWork") -> Merge:
    """Run the passes that a method asks for, up to its last one."""
    if isinstance(passes, Merge):
        return passes
    answer: Any = None
    while True:
        try:
            gather = passes.send(answer)
        except StopIteration as stop:
            merge: Merge = stop.value
            return merge
        answer = work.run(gather.function, gather.fold)


def write_block(merge: Merge, task: TensorTask, sink: Sink, block: Block) -> None:
    """Compute a block of the result, round it once to the output's dtype, write it."""
    dtype = FLOAT_DTYPES[task.info.dtype]
    merged = merge.function(block).to(dtype).cpu()
    if not all_finite(merged):
        raise ModelCompatibilityError(
            f"{task.name}: {_where_not_finite(merged, block)} does not fit {dtype} "
            f"(largest value {torch.finfo(dtype).max:g}). Choose another output dtype, or check "
            "weights and lam"
        )
    sink.write_rows(task.name, block.first, merged)


class _TensorWork:
    """One tensor's blocks, worked on by the pool."""

    def __init__(
        self,
        task: TensorTask,
        base: Source | None,
        models: Sequence[Source],
        settings: StreamSettings,
        buffers: "_Buffers",
        workers: "_Workers",
    ) -> None:
        self.task = task
        self.base = base
        self.sources = [*models] if base is None else [base, *models]
        self.settings = settings
        self.buffers = buffers
        self.workers = workers
        self.checked = False
        self.mapped = None
        if task.row_map is not None:
            self.mapped = MappedRows(self.sources, task.sources, task.row_map)
        rows, self.row_length = rows_of(task.info.shape)
        step = max(1, settings.block_elements // max(1, self.row_length))
        self.blocks = [(first, min(first + step, rows)) for first in range(0, rows, step)]

    def run(self, function: Callable[[Block], T], fold: Callable[[T, T], T]) -> T:
        """`function` of every block, folded in the order of the blocks; the pool does the work."""
        check, self.checked = not self.checked, True

        def work(span: range) -> T:
            return functools.reduce(
                fold, (function(self.read(index, check=check)) for index in span)
            )

        return functools.reduce(fold, self._over_spans(work))

    def _over_spans(self, work: Callable[[range], T]) -> Iterator[T]:
        """`work` of every span, in order.

        Only a few spans are under way at once: what they gather can be larger than a block.
        """
        waiting: deque[tuple[range, Future[T]]] = deque()
        for start in range(0, len(self.blocks), SPAN_BLOCKS):
            span = range(start, min(start + SPAN_BLOCKS, len(self.blocks)))
            waiting.append((span, self.workers.pool.submit(work, span)))
            if len(waiting) > 2 * self.settings.threads:
                yield self._finish(*waiting.popleft())
        while waiting:
            yield self._finish(*waiting.popleft())

    def _finish(self, span: range, future: Future[T]) -> T:
        result = future.result()
        rows = self.blocks[span[-1]][1] - self.blocks[span[0]][0]
        self.settings.on_bytes(rows * self.row_bytes())
        return result

    def row_bytes(self) -> int:
        """Bytes of one row of all inputs."""
        dtypes = (
            source.tensors[name].dtype
            for source, name in zip(self.sources, self.task.sources, strict=True)
        )
        return sum(FLOAT_DTYPES[dtype].itemsize for dtype in dtypes) * self.row_length

    def read(self, index: int, *, check: bool) -> Block:
        """Read one block of all inputs, as float32 on the device."""
        if self.workers.stopping.is_set():
            raise CancelledError
        first, stop = self.blocks[index]
        inputs = [
            rows.to(device=self.settings.device, dtype=torch.float32)
            for rows in self._rows(first, stop)
        ]
        start = first * self.row_length
        base = None if self.base is None else inputs[0]
        block = Block(index, first, start, base, inputs if base is None else inputs[1:])
        if check:
            self._check_finite(inputs, block)
        return block

    def _rows(self, first: int, stop: int) -> Iterator[Tensor]:
        """The same rows of every input, on the CPU."""
        if self.mapped is not None:
            yield from self.mapped.read(first, stop, self.buffers.get)
            return
        size = (stop - first) * self.row_length * 4
        for slot, (source, name) in enumerate(zip(self.sources, self.task.sources, strict=True)):
            yield source.read_rows(name, first, stop, self.buffers.get(slot, size))

    def _check_finite(self, inputs: Sequence[Tensor], block: Block) -> None:
        for model, values in enumerate(inputs):
            if all_finite(values):
                continue
            values = self._own(model, values, block)
            if all_finite(values):
                continue  # rows that stand in: their owner is among the inputs
            source, name = self.sources[model], self.task.sources[model]
            raise ModelCompatibilityError(
                f"{source.label}: {name} has NaN or infinite weights: "
                f"{_where_not_finite(values, block, self._row_of(model))}. The model is broken; "
                "use another copy"
            )

    def _own(self, model: int, values: Tensor, block: Block) -> Tensor:
        """Rows of a block with zeros where they are not the model's own."""
        if self.task.row_map is None:
            return values
        own = self.task.row_map.rows[model, block.first : block.first + len(values)]
        missing = torch.from_numpy(own == MISSING).to(values.device)
        return values.masked_fill(missing.unsqueeze(1), 0.0)

    def _row_of(self, model: int) -> Callable[[int], int]:
        """From a row of the result to the model's own."""
        row_map = self.task.row_map
        return (lambda row: row) if row_map is None else (lambda row: int(row_map.rows[model, row]))


class _Buffers(threading.local):
    """Memory to read into, one piece per input and thread, used again for every block."""

    def __init__(self) -> None:
        self.pieces: dict[int, Tensor] = {}

    def get(self, slot: int, size: int) -> Tensor:
        """At least `size` bytes, uint8."""
        if slot not in self.pieces or len(self.pieces[slot]) < size:
            self.pieces[slot] = torch.empty(size, dtype=torch.uint8)
        return self.pieces[slot]


class _Workers:
    """Threads that each compute on their own, without torch's threads inside.

    No thread is left when the block is: they write to files that are closed next, so even a
    second interrupt has to wait for them, which takes no longer than a block.
    """

    _lock = threading.Lock()
    _merges = 0
    _torch_threads = 1

    def __init__(self, threads: int) -> None:
        self.stopping = threading.Event()
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> Self:
        with _Workers._lock:  # torch's setting is one for the process, whose merges share it
            if _Workers._merges == 0:
                _Workers._torch_threads = torch.get_num_threads()
            _Workers._merges += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        interrupt = None
        if kind is not None:
            self.stopping.set()
        while True:
            try:
                self.pool.shutdown(cancel_futures=True)
                break
            except KeyboardInterrupt as error:
                self.stopping.set()
                interrupt = error
        with _Workers._lock:
            _Workers._merges -= 1
            if _Workers._merges == 0:
                torch.set_num_threads(_Workers._torch_threads)
        if interrupt is not None:
            raise interrupt


def all_finite(values: Tensor) -> bool:
    """Whether there is no NaN and no infinity.

    A sum that is finite says so at a fraction of the cost; one that is not may have overflowed.
    """
    return math.isfinite(float(values.sum(dtype=torch.float32))) or bool(
        torch.isfinite(values).all()
    )


def _where_not_finite(
    values: Tensor, block: Block, row_of: Callable[[int], int] = lambda row: row
) -> str:
    """ "row 3, column 7 (inf; 12 such values in this block)"."""
    bad = torch.nonzero(~torch.isfinite(values))
    row, column = bad[0].tolist()
    value = float(values[row, column])
    place = row_of(block.first + row)
    return f"row {place}, column {column} ({value}; {len(bad)} such in this block)"
