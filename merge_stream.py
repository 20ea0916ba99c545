"""The one loop of every merge: read a block of rows of all models, compute, write.

It knows blocks, memory, threads and progress, and no math. A method gives it a generator per
group of tensors (see `Passes`): the generator asks for passes over the group, receives what they
gathered, and ends with the function that turns a block of every input into a block of output.

A pass is cut into segments, each worked through by one thread, block by block. While a pass of
one group comes to its end, the next group's first pass is under way, so that no thread waits.
Threads put what they find into collections of their own, which are joined at the end of a pass.
So the result depends on neither threads nor the size of blocks, as long as what a method gathers
depends on no order: integer counts, and sums over runs within a row, joined exactly.
"""

import contextlib
import functools
import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from merge_finite import FiniteCheck, NanPolicy
from model_rows import MappedRows
from model_safetensors import FLOAT_DTYPES, TensorInfo, widen
from model_utils import rows_of
from model_vocabulary import RowMap

BLOCK_BYTES = 2**21
"""Bytes of a block, all inputs and the result together: it stays in a core's cache."""

SEGMENT_BYTES = 16 * BLOCK_BYTES
"""Bytes of the consecutive blocks that one thread works through, however small these are."""

SAMPLE_STEP, SAMPLE_SHARE = 8, 4
"""A sample is a quarter of the rows of every eighth block of a segment."""

UNDER_WAY = 3
"""Segments handed out per thread: one is worked on, the others are read ahead."""

READ_AHEAD_BYTES = 64 * SEGMENT_BYTES
"""Inputs of a group that are larger may not be in memory any more when its next pass comes."""

_ALIGNMENT = 64
_KINDS = {dtype: kind for kind, dtype in enumerate(FLOAT_DTYPES)}


class Source(Protocol):
    """Where tensors come from; a `ModelFolder` is one."""

    @property
    def label(self) -> str:
        """What the user called the model."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of every tensor, by name."""

    def read_rows(
        self, name: str, first: int, stop: int, buffer: NDArray[np.uint8]
    ) -> NDArray[Any]:
        """Rows of a tensor as stored; see `ModelFolder.read_rows`."""

    def read_ahead(self, name: str, first: int, stop: int) -> None:
        """Rows that will be read soon; see `ModelFolder.read_ahead`."""


class Sink(Protocol):
    """Where merged rows go; a `FolderWriter` is one."""

    def write_rows(self, name: str, first: int, rows: NDArray[Any]) -> None:
        """Take merged rows, from row `first` on; see `FolderWriter.write_rows`."""

    def finish(self, findings: Mapping[str, Mapping[str, Any]]) -> None:
        """All rows of these tensors are merged; what the method found out about each."""


class Input(NamedTuple):
    """What feeds a tensor of the merged model.

    Attributes:
        model: index among the sources.
        tensor: its name there.
    """

    model: int
    tensor: str


@dataclass(frozen=True)
class TensorTask:
    """One tensor of the merged model.

    Attributes:
        name: in the merged model.
        info: dtype and shape in the merged model.
        inputs: what feeds it, that of the base (if any) first; the first alone, where only that is
            needed.
        parameters: the method's parameters for this tensor.
        row_map: which rows of the models feed its rows, where these are not the same.
        names: with a row map, what each model calls it: what one lacks comes from others.
        in_order: whether one thread works through all its rows, from the first to the last.
        copied: whether it is the first input, and not merged.
    """

    name: str
    info: TensorInfo
    inputs: tuple[Input, ...]
    parameters: Mapping[str, Any]
    row_map: RowMap | None = None
    names: tuple[str, ...] = ()
    in_order: bool = False
    copied: bool = False


class Layout:
    """Where the inputs of a block and its result lie in a thread's memory.

    Attributes:
        name: of the tensor.
        dtypes: of the inputs, the base (if any) first, then of the result; safetensors names.
        rows: how many a block has at most.
        segment_rows: how many a segment has at most.
        row_length: elements of a row.
        offsets: of each, in bytes; `places` the same, for kernels (int64).
        kinds: 0 for float32, 1 for float16, 2 for bfloat16 (int64).
        nbytes: memory for one block.
    """

    def __init__(self, task: TensorTask, inputs: Sequence[str], block_bytes: int) -> None:
        if task.row_map is not None:
            inputs = ["F32"] * len(inputs)  # as `MappedRows` gives them
        self.name = task.name
        self.dtypes = (*inputs, task.info.dtype)
        sizes = [FLOAT_DTYPES[dtype].itemsize for dtype in self.dtypes]
        rows, self.row_length = rows_of(task.info.shape)
        self.rows = max(1, min(rows, block_bytes // max(1, sum(sizes) * self.row_length)))
        each = [self.rows * self.row_length * size for size in sizes]
        padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in each]
        self.offsets = [*itertools.accumulate(padded, initial=0)][:-1]
        self.places = np.array(self.offsets)
        self.kinds = np.array([_KINDS[dtype] for dtype in self.dtypes])
        self.nbytes = sum(padded)
        self.segment_rows = self.rows * max(1, SEGMENT_BYTES // max(1, self.nbytes))
        if task.in_order:
            self.segment_rows = max(1, rows)


class Block(NamedTuple):
    """The same rows of every input as they are stored, and room for the result.

    Attributes:
        memory: the thread's; the next block overwrites it.
        layout: where in it the inputs lie.
        first: the first row.
        rows: how many.
        segment: number, within the group, of the segment that it is part of.
    """

    memory: NDArray[np.uint8]
    layout: Layout
    first: int
    rows: int
    segment: int

    @property
    def start(self) -> int:
        """Flat index of the first element in the tensor."""
        return self.first * self.layout.row_length

    @property
    def size(self) -> int:
        """Elements of each input."""
        return self.rows * self.layout.row_length

    def stored(self, index: int) -> NDArray[Any]:
        """An input as it is stored, shape (rows, row length); index -1 is the result."""
        dtype = FLOAT_DTYPES[self.layout.dtypes[index]]
        offset = self.layout.offsets[index]
        values = self.memory[offset : offset + self.size * dtype.itemsize].view(dtype)
        return values.reshape(self.rows, self.layout.row_length)

    def values(self, index: int) -> NDArray[np.float32]:
        """An input (or the result, -1) in float32, shape (rows, row length)."""
        return widen(self.stored(index), self.layout.dtypes[index])


class Gather(NamedTuple):
    """A pass that collects something.

    Attributes:
        start: from the names of the tensors that the group's segments belong to, segment by
            segment, to an empty collection; a pass has as many as threads work on it at once.
        take: puts what it finds in a block into a collection. It is also given what
            `start_segment` made for the segment, and may change it: a segment's blocks come in
            their order.
        fold: joins two collections, in any order, and may change the first one.
        sample: look at a sample of the rows alone.
        start_segment: from the number of a segment within the group to what its first block is
            given.
        tells_finite: whether `take` returns True where every input is certainly finite; else they
            are looked at. What goes through `together` or `by_tensor` is looked at first.
    """

    start: Callable[[Sequence[str]], Any]
    take: Callable[[Block, Any, Any], bool | None]
    fold: Callable[[Any, Any], Any]
    sample: bool = False
    start_segment: Callable[[int], Any] = lambda _: None
    tells_finite: bool = False


class Merge(NamedTuple):
    """The last pass.

    Attributes:
        take: fills the block's result. It is also given what `start_segment` made, as in `Gather`.
            None where there is nothing to merge; then there is no last pass.
        start_segment: as in `Gather`.
        findings: what the method found out, by tensor name, for the report.
        observe: collects something from the same blocks.
        conclude: from what was collected so to findings, by tensor name.
    """

    take: Callable[[Block, Any], None] | None
    start_segment: Callable[[int], Any] = lambda _: None
    findings: Mapping[str, Mapping[str, Any]] = {}
    observe: Gather | None = None
    conclude: Callable[[Any], Mapping[str, Mapping[str, Any]]] = lambda _: {}


Passes = Generator[Gather, Any, Merge]
"""What a method does with a group of tensors: any number of `Gather`, each answered with what was
gathered, then `Merge`. A method that gathers nothing is a plain function returning `Merge`."""


class Arithmetic(Protocol):
    """What the loop itself asks of the arithmetic; `merge_operations.Operations` has the rest."""

    def memory(self, size: int) -> NDArray[np.uint8]:
        """Memory for a thread's blocks."""

    def broken_inputs(self, block: Block) -> Sequence[int]:
        """Which inputs hold NaN or infinity."""

    def result_is_finite(self, block: Block) -> bool:
        """Whether the result holds no NaN and no infinity."""

    def start_thread(self) -> None:
        """Called once in every thread that computes."""


@dataclass(frozen=True)
class StreamSettings:
    """How a merge is run; nothing here changes a bit of the result on the CPU.

    Attributes:
        threads: segments worked on at once.
        block_bytes: memory of a block (at least one row is taken).
        on_bytes: told how many bytes of input have been read since the last call.
        nan_policy: what becomes of values of the models that are not finite.
    """

    threads: int = 1
    block_bytes: int = BLOCK_BYTES
    on_bytes: Callable[[int], None] = lambda _: None
    nan_policy: NanPolicy = "error"


def stream(
    groups: Sequence[Sequence[TensorTask]],
    merge_group: Callable[[Sequence[TensorTask]], Passes | Merge],
    passes: Callable[[TensorTask], int],
    operations: Arithmetic,
    sources: Sequence[Source],
    sink: Sink,
    settings: StreamSettings,
) -> dict[str, Mapping[str, Any]]:
    """Merge group by group, segment by segment, block by block.

    Args:
        groups: the tensors of the result, in the order in which they are made. Those of a group
            share what is gathered.
        merge_group: the method.
        passes: how often it reads a tensor, as far as that can be known; what `settings.on_bytes`
            is told adds up to so many times the inputs.
        operations: the arithmetic that it uses.
        sources: the models; `TensorTask.inputs` says which of them feed a tensor.
        sink: takes the merged rows.

    Returns:
        What the method found out about each tensor, by name; empty where that is nothing.

    Raises:
        ModelCompatibilityError: an input holds NaN or infinity, or the result does not fit the
            output's dtype.
        OSError: reading or writing failed.
    """
    findings: dict[str, Mapping[str, Any]] = {}
    failures: list[tuple[int, BaseException]] = []
    reader = _Reader(sources, sink, operations, settings)
    waiting = deque([task for task in tasks if task.info.numel] for tasks in groups)
    under_way: list[_GroupWork] = []
    done: queue.SimpleQueue[tuple[_Job, Future[Any]]] = queue.SimpleQueue()
    given, returned = 0, 0

    with _Workers(settings.threads, operations.start_thread, reader.stopping) as pool:
        while True:
            while not failures and given - returned < UNDER_WAY * settings.threads:
                group = next((each for each in under_way if each.left), None)
                if group is not None:
                    job = _Job(given, group, group.left.popleft())
                    if group.reads_ahead:
                        reader.read_ahead(job.segment)
                    future = pool.submit(reader.work, group, job.segment)
                    future.add_done_callback(functools.partial(_hand_in, done, job))
                    given += 1
                elif waiting:
                    tasks = waiting.popleft()
                    if tasks:
                        segments = [*reader.segments(tasks)]
                        under_way.append(_GroupWork(merge_group(tasks), segments, passes(tasks[0])))
                else:
                    break
            if given == returned:
                break
            job, future = done.get()
            returned += 1
            if error := future.exception():
                failures.append((job.number, error))
                continue
            settings.on_bytes(job.group.credit() * job.segment.nbytes)
            job.group.finish_segment()
            if job.group.merge is not None:  # it was the last pass, or nothing is merged
                found = reader.findings(job.group)
                sink.finish(found)
                findings.update(found)
                under_way.remove(job.group)
        if failures:  # of what was under way, the first that was begun, whichever was faster
            raise min(failures, key=lambda failure: failure[0])[1]
    return findings


class _Job(NamedTuple):
    """One pass over one segment, given to the pool.

    Attributes:
        number: in the order in which jobs are given.
        group, segment: what is worked on.
    """

    number: int
    group: "_GroupWork"
    segment: "_Segment"


def _hand_in(
    done: "queue.SimpleQueue[tuple[_Job, Future[Any]]]", job: _Job, future: "Future[Any]"
) -> None:
    done.put((job, future))


class _Segment(NamedTuple):
    """Rows of one tensor that one thread works through.

    Attributes:
        number: among the segments of the group.
        task: the tensor.
        layout: of its blocks.
        mapped: reads its rows, where they are not the same in all models.
        first, stop: rows.
        nbytes: of all inputs.
    """

    number: int
    task: TensorTask
    layout: Layout
    mapped: MappedRows | None
    first: int
    stop: int
    nbytes: int


class _GroupWork:
    """A group of tensors on its way through its passes.

    Attributes:
        names: of its tensors.
        request: the pass that is under way.
        left: its segments that no thread has been given yet.
        is_read: whether an earlier pass has read all of the group.
        merge: the last pass, once it is complete.
    """

    def __init__(self, passes: Passes | Merge, segments: Sequence[_Segment], expected: int) -> None:
        self.names = list(dict.fromkeys(segment.task.name for segment in segments))
        self._passes = passes
        self._segments = segments
        self._nbytes = sum(segment.nbytes for segment in segments)
        self._to_credit = expected
        self.is_read = False
        self.left: deque[_Segment] = deque()
        self.merge: Merge | None = None
        self._answer: Any = None
        self._collections: list[Any] = []
        self._begin()

    def _begin(self) -> None:
        """Begin the next pass."""
        self.request = self._next_request()
        if isinstance(self.request, Merge) and self.request.take is None:
            self.merge = self.request
            return
        self.left = deque(self._segments)
        self._unfinished = len(self._segments)
        self._answer = None

    @property
    def reads_ahead(self) -> bool:
        """Whether what the pass under way is given will be read from the disk, now or soon."""
        if self._nbytes > READ_AHEAD_BYTES:
            return not (isinstance(self.request, Gather) and self.request.sample)
        return not self.is_read

    def credit(self) -> int:
        """How many of the expected passes the one under way stands for; the last, for the rest."""
        if isinstance(self.request, Merge):
            return self._to_credit
        return 0 if self.request.sample else int(self._to_credit > 1)

    def _next_request(self) -> Gather | Merge:
        if isinstance(self._passes, Merge):
            return self._passes
        try:
            return self._passes.send(self._answer)
        except StopIteration as stop:
            merge: Merge = stop.value
            return merge

    @contextlib.contextmanager
    def collection(self, gather: Gather) -> Iterator[Any]:
        """What a thread puts what it finds in a segment into; no other uses it meanwhile.

        Called by the threads: taking from a list and adding to it are atomic. After a failure it
        is not given back; the pass never ends then.
        """
        try:
            collection = self._collections.pop()
        except IndexError:
            collection = gather.start([segment.task.name for segment in self._segments])
        yield collection
        self._collections.append(collection)

    def finish_segment(self) -> None:
        """After the last one the next pass begins."""
        self._unfinished -= 1
        if self._unfinished:
            return
        if isinstance(self.request, Merge):
            self.merge = self._observed(self.request)
            return
        self._answer = self._collected(self.request)
        self._to_credit -= self.credit()
        self.is_read |= not self.request.sample
        self._begin()

    def _observed(self, merge: Merge) -> Merge:
        """The last pass with what was observed during it among the findings."""
        if merge.observe is None:
            return merge
        observed = merge.conclude(self._collected(merge.observe))
        names = {*merge.findings, *observed}
        both = {name: {**merge.findings.get(name, {}), **observed.get(name, {})} for name in names}
        return merge._replace(findings=both)

    def _collected(self, gather: Gather) -> Any:
        """What all threads have collected in a pass."""
        collected = functools.reduce(gather.fold, self._collections)
        self._collections.clear()
        return collected


class _Reader:
    """What a thread does with a segment: read, compute, write."""

    def __init__(
        self,
        sources: Sequence[Source],
        sink: Sink,
        operations: Arithmetic,
        settings: StreamSettings,
    ) -> None:
        self.sources = sources
        self.sink = sink
        self.operations = operations
        self.settings = settings
        self.stopping = threading.Event()
        self._check = FiniteCheck(sources, operations, settings.nan_policy)
        self._local = threading.local()

    def segments(self, tasks: Sequence[TensorTask]) -> Iterator[_Segment]:
        """The segments of a group, in the order of its tensors and their rows."""
        number = 0
        for task in tasks:
            stored = [self.sources[each.model].tensors[each.tensor].dtype for each in task.inputs]
            layout = Layout(task, stored, self.settings.block_bytes)
            mapped = None
            if task.row_map is not None:
                wanted = [each.model for each in task.inputs]
                mapped = MappedRows(self.sources, task.names, task.row_map, wanted)
            rows, row_length = rows_of(task.info.shape)
            row_bytes = row_length * sum(FLOAT_DTYPES[dtype].itemsize for dtype in stored)
            for first in range(0, rows, layout.segment_rows):
                stop = min(first + layout.segment_rows, rows)
                nbytes = (stop - first) * row_bytes
                yield _Segment(number, task, layout, mapped, first, stop, nbytes)
                number += 1

    def read_ahead(self, segment: _Segment) -> None:
        """Say which rows will be read soon."""
        if segment.mapped is None:
            for model, name in segment.task.inputs:
                self.sources[model].read_ahead(name, segment.first, segment.stop)

    def work(self, group: _GroupWork, segment: _Segment) -> None:
        """Work through a segment."""
        request = group.request
        if isinstance(request, Gather):
            with group.collection(request) as collection:
                self._gather(request, segment, collection, check=not group.is_read)
        elif request.observe is None:
            self._merge(request, segment, check=not group.is_read)
        else:
            with group.collection(request.observe) as collection:
                self._merge(request, segment, collection, check=not group.is_read)

    def _gather(self, gather: Gather, segment: _Segment, collection: Any, *, check: bool) -> None:
        state = gather.start_segment(segment.number)
        for block in self._blocks(segment, sample=gather.sample):
            looks = check and not gather.sample
            tells = gather.tells_finite and self._check.policy == "error"
            if self._looks_before(first_time=looks) and not tells:
                self._check.look_at_inputs(segment.task, block, first_time=looks)
            finite = gather.take(block, collection, state)
            if looks and tells and not finite:
                self._check.look_at_inputs(segment.task, block, first_time=True)

    def _looks_before(self, *, first_time: bool) -> bool:
        """Whether the inputs of a block are looked at before they are used."""
        return first_time or self._check.policy == "base"  # which replaces them in every pass

    def _merge(self, merge: Merge, segment: _Segment, observed: Any = None, *, check: bool) -> None:
        for block in self.merged_blocks(merge, segment, check=check):
            if merge.observe is not None:
                merge.observe.take(block, observed, None)
            self.sink.write_rows(segment.task.name, block.first, block.stored(-1))

    def merged_blocks(self, merge: Merge, segment: _Segment, *, check: bool) -> Iterator[Block]:
        """The blocks of a segment with their results."""
        assert merge.take is not None
        state = merge.start_segment(segment.number)
        for block in self._blocks(segment):
            if self._looks_before(first_time=check):
                self._check.look_at_inputs(segment.task, block, first_time=check)
            merge.take(block, state)
            self._check.look_at_result(segment.task, block)
            yield block

    def findings(self, group: _GroupWork) -> dict[str, Mapping[str, Any]]:
        """What was found out about each tensor of a group that is merged."""
        assert group.merge is not None
        broken = self._check.findings(group.names)
        return {
            name: {**group.merge.findings.get(name, {}), **broken.get(name, {})}
            for name in group.names
        }

    def _blocks(self, segment: _Segment, *, sample: bool = False) -> Iterator[Block]:
        """The blocks of a segment, or some rows of some."""
        rows = segment.layout.rows
        step, taken = (rows * SAMPLE_STEP, -(-rows // SAMPLE_SHARE)) if sample else (rows, rows)
        for first in range(segment.first, segment.stop, step):
            if self.stopping.is_set():
                raise CancelledError
            yield self._read(segment, first, min(first + taken, segment.stop))

    def _read(self, segment: _Segment, first: int, stop: int) -> Block:
        """The rows of every input, as they are stored, in the thread's memory."""
        layout, task = segment.layout, segment.task
        block = Block(self._memory(layout.nbytes), layout, first, stop - first, segment.number)
        if segment.mapped is not None:
            inputs = [block.stored(index) for index in range(len(task.inputs))]
            segment.mapped.read(first, stop, inputs)
            return block
        for offset, (model, name) in zip(layout.offsets, task.inputs, strict=False):
            self.sources[model].read_rows(name, first, stop, block.memory[offset:])
        return block

    def _memory(self, size: int) -> NDArray[np.uint8]:
        """The thread's own memory, used again for every block."""
        memory: NDArray[np.uint8] | None = getattr(self._local, "memory", None)
        if memory is None or len(memory) < size:
            memory = self._local.memory = self.operations.memory(size)
        return memory


class MergedRows:
    """Merges rows when they are asked for, from any thread.

    For methods whose rows can be merged in any order once the passes before the last are done:
    `Merge.start_segment` makes nothing for them. These passes are made when a tensor is first asked
    for.

    Args:
        tasks: the tensors.
        merge_group, operations, sources: as of `stream`; each tensor is a group.
        block_bytes: memory of a block.
        nan_policy: as of `StreamSettings`.
    """

    def __init__(
        self,
        tasks: Sequence[TensorTask],
        merge_group: Callable[[Sequence[TensorTask]], Passes | Merge],
        operations: Arithmetic,
        sources: Sequence[Source],
        block_bytes: int = BLOCK_BYTES,
        nan_policy: NanPolicy = "error",
    ) -> None:
        self._tasks = {task.name: task for task in tasks}
        self._merge_group = merge_group
        settings = StreamSettings(1, block_bytes, nan_policy=nan_policy)
        self._reader = _Reader(sources, Nowhere(), operations, settings)
        self._locks = {name: threading.Lock() for name in self._tasks}
        self._ready: dict[str, tuple[_GroupWork, _Segment]] = {}
        self._threads = threading.local()

    def read(self, name: str, first: int, stop: int, buffer: NDArray[np.uint8]) -> NDArray[Any]:
        """Rows of a tensor, rounded to its dtype; see `ModelFolder.read_rows`."""
        if not hasattr(self._threads, "started"):
            self._reader.operations.start_thread()
            self._threads.started = True
        with self._locks[name]:
            if name not in self._ready:
                self._ready[name] = self._prepared(self._tasks[name])
        work, segment = self._ready[name]
        assert isinstance(work.request, Merge)
        dtype = FLOAT_DTYPES[segment.task.info.dtype]
        length = segment.layout.row_length
        target = buffer[: (stop - first) * length * dtype.itemsize].view(dtype)
        target = target.reshape(stop - first, length)
        rows = segment._replace(first=first, stop=stop)
        for block in self._reader.merged_blocks(work.request, rows, check=not work.is_read):
            target[block.first - first : block.first - first + block.rows] = block.stored(-1)
        return target

    def _prepared(self, task: TensorTask) -> "tuple[_GroupWork, _Segment]":
        """A tensor whose last pass is left, and one of its segments."""
        segments = [*self._reader.segments([task])]
        work = _GroupWork(self._merge_group([task]), segments, 1)
        while isinstance(work.request, Gather):
            self._reader.work(work, work.left.popleft())
            work.finish_segment()
        return work, segments[0]


class Nowhere:
    """A sink for passes that merge nothing."""

    def write_rows(self, name: str, first: int, rows: NDArray[Any]) -> None:
        """Never called."""
        raise AssertionError(name)

    def finish(self, findings: Mapping[str, Mapping[str, Any]]) -> None:
        """Nothing is kept."""


class _Workers:
    """Threads that work on segments.

    No thread is left when the block is: they write to files that are closed next, so even a
    second interrupt has to wait for them: for a block at most, or for a kernel to be compiled.
    """

    def __init__(
        self, threads: int, start_thread: Callable[[], None], stopping: threading.Event
    ) -> None:
        self._stopping = stopping
        self._pool = ThreadPoolExecutor(threads, initializer=start_thread)

    def __enter__(self) -> ThreadPoolExecutor:
        return self._pool

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        interrupt = None
        if kind is not None:
            self._stopping.set()
        while True:
            try:
                self._pool.shutdown(cancel_futures=True)
                break
            except KeyboardInterrupt as error:
                self._stopping.set()
                interrupt = error
        if interrupt is not None:
            raise interrupt
