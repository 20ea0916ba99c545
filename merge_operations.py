"""The arithmetic of the methods on blocks of rows, by the torch functions of `*_utils`.

Those functions are the definition. `merge_kernels` does the same faster on a CPU; both give the
same bits. A method (`merge_methods`) asks for the functions it needs, with its parameters bound,
and hands them to `merge_stream`.
"""

import contextlib
import math
import mmap
import operator
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from merge_stream import Arithmetic, Block, Gather
from scalar_utils import Key, TrimThreshold

if TYPE_CHECKING:
    from torch import Tensor

COARSE_BINS, FINE_BINS = 2**15, 2**16

Counts = NDArray[np.int64]
Take = Callable[[Block, Any], None]
"""What `merge_stream.Merge.take` is: fills a block's result."""


@dataclass(frozen=True)
class Trim:
    """Keep what a threshold keeps; each segment starts with the equal entries left to keep.

    Attributes:
        thresholds: one per model.
    """

    thresholds: tuple[TrimThreshold, ...]


@dataclass(frozen=True)
class TrimRows:
    """Keep the largest magnitudes of every row; a density per model."""

    densities: tuple[float, ...]


@dataclass(frozen=True)
class Drop:
    """Keep entries at random and rescale them; all per model.

    Attributes:
        keys: of the random numbers.
        densities: chances of being kept.
        factors: what is kept is multiplied by.
    """

    keys: tuple[Key, ...]
    densities: tuple[float, ...]
    factors: tuple[float, ...]


@dataclass(frozen=True)
class TaskVectorMerge:
    """How task vectors become the merged one.

    Attributes:
        weights: one per model.
        lam: scale of the merged task vector.
        normalize: divide by the sum of the weights; after an election, by that of the models that
            agree.
        elect: elect a sign per parameter and leave out the models that have the other.
        sparsify: what is done to each task vector first.
    """

    weights: tuple[float, ...]
    lam: float
    normalize: bool
    elect: bool = False
    sparsify: Trim | TrimRows | Drop | None = None


class Operations(Arithmetic, Protocol):
    """The arithmetic that the methods and the stream use; torch and the kernels both offer it.

    Functions for a block come with their parameters bound.
    """

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def linear(self, weights: Sequence[float], *, normalize: bool) -> Take:
        """`linear_utils.linear`."""

    def combine(self, coefficients: Sequence[float]) -> Take:
        """`linear_utils.combine`."""

    def dot_parts(self) -> Gather:
        """`slerp_utils.dot_parts` of two inputs: `RunSums`."""

    def absolute_parts(self, drop: Drop) -> Gather:
        """`dare_utils.absolute_parts` of each task vector, then of what is kept: `RunSums`."""

    def coarse_histograms(self, models: Sequence[int], *, sample: bool = False) -> Gather:
        """`ties_utils.coarse_histogram` of some of the task vectors: shape (models, 2**15)."""

    def fine_histograms(self, guesses: Mapping[int, int], *, sample: bool = False) -> Gather:
        """`ties_utils.fine_histogram` of some of the task vectors, and more: `FineCounts`.

        Args:
            guesses: by model, bits of a magnitude; see `window`.
            sample: look at a sample of the blocks.
        """

    def count_kept(self, thresholds: Sequence[TrimThreshold]) -> Gather:
        """Entries of each task vector above its threshold, and at it: `SegmentCounts`."""

    def select_bin(self, counts: Counts, rank: int) -> tuple[int, int]:
        """`ties_utils.select_bin`."""

    def merge_task_vectors(self, merge: TaskVectorMerge) -> Take:
        """Sparsify, weight, elect, combine, scale, add the base. Starts with the ties left."""


def numba_problem() -> str:
    """Why numba cannot be used; empty where it can."""
    try:
        import numba  # noqa: F401
    except Exception as error:  # not there, or broken beside this numpy, with errors of any kind
        return str(error) or type(error).__name__
    return ""


def arithmetic(device: str) -> str:
    """The package that computes, imported: "numba" on a CPU, where that works, else "torch"."""
    if device == "cpu" and not numba_problem():
        return "numba"
    import torch  # noqa: F401

    return "torch"


def make_operations(device: str) -> Operations:
    """The fastest arithmetic there is for a device; see `arithmetic`."""
    if arithmetic(device) == "numba":
        from merge_kernels import KernelOperations

        return KernelOperations()
    return TorchOperations(device)


def coarse_gather(models: int, take: Callable[[Block, Counts], None], *, sample: bool) -> Gather:
    """A pass that counts into coarse bins, per model: shape (models, 2**15)."""
    return Gather(lambda _: _bins(models, COARSE_BINS), take, _join_bins, sample=sample)


def _bins(models: int, count: int) -> Counts:
    """Empty bins, shape (models, count), in memory that goes back to the system after use.

    The allocator would keep it; and pages whose bins stay empty take none.
    """
    size = models * count * np.dtype(np.int64).itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype=np.int64).reshape(models, count)


def _join_bins(bins: Counts, others: Counts) -> Counts:
    """Add counts to others, and leave pages alone where there is nothing to add."""
    return np.add(bins, others, out=bins, where=others != 0)


@dataclass
class SegmentCounts:
    """Entries above a magnitude, and equal to it, per segment and model.

    Attributes:
        names: of the tensors that the segments belong to.
        counts: shape (segments, models, 2).
    """

    names: Sequence[str]
    counts: Counts

    @classmethod
    def start(cls, names: Sequence[str], models: int) -> Self:
        """Nothing counted yet."""
        return cls(names, np.zeros((len(names), models, 2), dtype=np.int64))

    def __iadd__(self, other: Self) -> Self:
        self.counts += other.counts
        return self


@dataclass
class FineCounts:
    """What lies in a window of 2**16 magnitudes around a guess, per model, and above it.

    Attributes:
        bins: entries of every magnitude in the window; shape (models, 2**16).
        above: entries above the window; shape (models,).
        segments: entries above the guess, and at it.
    """

    bins: Counts
    above: Counts
    segments: SegmentCounts

    @classmethod
    def start(cls, names: Sequence[str], models: int) -> Self:
        """Nothing counted yet."""
        above = np.zeros(models, dtype=np.int64)
        return cls(_bins(models, FINE_BINS), above, SegmentCounts.start(names, models))

    def __iadd__(self, other: Self) -> Self:
        _join_bins(self.bins, other.bins)
        self.above += other.above
        self.segments += other.segments
        return self


def window(guess: int) -> int:
    """Bits of the lowest of the 2**16 magnitudes around a guess; the highest has 31 bits."""
    return min(max(0, guess - FINE_BINS // 2), 2**31 - FINE_BINS)


def fine_gather(
    models: int, take: Callable[[Block, FineCounts, Counts], None], *, sample: bool
) -> Gather:
    """A pass that counts within a window of each model's magnitudes: `FineCounts`.

    `take` is also given the counts of the block's segment.
    """

    def take_block(block: Block, gathered: FineCounts) -> None:
        take(block, gathered, gathered.segments.counts[block.segment])

    def start(names: Sequence[str]) -> FineCounts:
        return FineCounts.start(names, models)

    return Gather(start, take_block, operator.iadd, sample=sample)


class RunSums:
    """Sums over runs of rows, of several quantities; they are joined in the end, exactly."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.float64]] = []

    def append(self, part: "NDArray[np.float64] | list[list[float]]") -> None:
        """Take in the sums of a block: shape (quantities, runs)."""
        self._parts.append(np.asarray(part))

    def totals(self) -> list[float]:
        """The sum of each quantity, rounded once: it does not depend on the blocks."""
        return [math.fsum(sums) for sums in np.concatenate(self._parts, axis=1)]

    def __iadd__(self, other: Self) -> Self:
        self._parts += other._parts
        return self


def run_sums_gather(take: Callable[[Block, RunSums], None]) -> Gather:
    """A pass that collects `RunSums`."""
    return Gather(lambda _: RunSums(), take, operator.iadd)


def counts_gather(models: int, take: Callable[[Block, Counts], None]) -> Gather:
    """A pass that collects `SegmentCounts`."""

    def take_block(block: Block, segments: SegmentCounts) -> None:
        take(block, segments.counts[block.segment])

    return Gather(lambda names: SegmentCounts.start(names, models), take_block, operator.iadd)


class TorchOperations:
    """The functions of `*_utils` on blocks, on any device.

    On a GPU, memory is pinned and every thread has a stream of its own, so that copies and
    arithmetic of different blocks overlap. When the GPU's memory runs out, a warning says so and
    the rest is computed on the CPU.

    Args:
        device: such as "cpu" or "cuda".
    """

    _lock = threading.Lock()
    _users = 0
    _torch_threads = 1

    def __init__(self, device: str = "cpu") -> None:
        import torch

        self._torch = torch
        self._device = torch.device(device)
        self._dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        self._local = threading.local()

    def __enter__(self) -> Self:
        with TorchOperations._lock:  # torch's setting is one for the process, whose merges share it
            if TorchOperations._users == 0:
                TorchOperations._torch_threads = self._torch.get_num_threads()
            TorchOperations._users += 1
        return self

    def __exit__(self, *_: object) -> None:
        with TorchOperations._lock:
            TorchOperations._users -= 1
            if TorchOperations._users == 0:
                self._torch.set_num_threads(TorchOperations._torch_threads)

    def start_thread(self) -> None:
        """Each thread computes on its own, without torch's threads inside."""
        self._torch.set_num_threads(1)

    def memory(self, size: int) -> NDArray[np.uint8]:
        """Memory for a thread's blocks, pinned where a GPU copies from it."""
        memory = self._torch.empty(
            size, dtype=self._torch.uint8, pin_memory=self._device.type == "cuda"
        )
        array: NDArray[np.uint8] = memory.numpy()
        return array

    def broken_inputs(self, block: Block) -> list[int]:
        """Which inputs hold NaN or infinity."""
        inputs = self._run(lambda: [self._all_finite(values) for values in self._inputs(block)])
        return [index for index, finite in enumerate(inputs) if not finite]

    def result_is_finite(self, block: Block) -> bool:
        """Whether the result, as it was rounded, holds no NaN and no infinity."""
        return self._all_finite(self._stored(block, -1))

    def linear(self, weights: Sequence[float], *, normalize: bool) -> Take:
        """`linear_utils.linear`."""
        from linear_utils import linear

        return self._merging(lambda inputs: linear(inputs, weights, normalize=normalize))

    def combine(self, coefficients: Sequence[float]) -> Take:
        """`linear_utils.combine`."""
        from linear_utils import combine

        return self._merging(lambda inputs: combine(coefficients, inputs))

    def dot_parts(self) -> Gather:
        """`slerp_utils.dot_parts` of two inputs."""
        from slerp_utils import dot_parts

        def take(block: Block, sums: RunSums) -> None:
            sums.append(self._run(lambda: dot_parts(*self._inputs(block))))

        return run_sums_gather(take)

    def absolute_parts(self, drop: Drop) -> Gather:
        """`dare_utils.absolute_parts` of every task vector, then of what is kept of each."""
        from dare_utils import absolute_parts

        def found(block: Block) -> list[list[float]]:
            _, deltas = self._deltas(block)
            return [absolute_parts(d) for d in (*deltas, *self._drop(block, deltas, drop))]

        def take(block: Block, sums: RunSums) -> None:
            sums.append(self._run(lambda: found(block)))

        return run_sums_gather(take)

    def coarse_histograms(self, models: Sequence[int], *, sample: bool = False) -> Gather:
        """`ties_utils.coarse_histogram` of some of the task vectors."""
        from ties_utils import coarse_histogram

        def found(block: Block) -> Counts:
            deltas = self._deltas(block)[1]
            return np.stack([coarse_histogram(deltas[model]).cpu().numpy() for model in models])

        def take(block: Block, counts: Counts) -> None:
            counts += self._run(lambda: found(block))

        return coarse_gather(len(models), take, sample=sample)

    def fine_histograms(self, guesses: Mapping[int, int], *, sample: bool = False) -> Gather:
        """`ties_utils.fine_histogram` of some of the task vectors, around their guesses."""
        from ties_utils import fine_histogram, magnitude_bits

        def found(block: Block) -> list[tuple[Counts, int, list[int]]]:
            deltas = self._deltas(block)[1]
            counts = []
            for model, guess in guesses.items():
                lowest, bits = window(guess), magnitude_bits(deltas[model])
                bins = fine_histogram(deltas[model], lowest).cpu().numpy()
                above = int((bits - lowest >= FINE_BINS).count_nonzero())
                around = [int(part.count_nonzero()) for part in (bits > guess, bits == guess)]
                counts.append((bins, above, around))
            return counts

        def take(block: Block, gathered: FineCounts, counts: Counts) -> None:
            for index, (bins, above, around) in enumerate(self._run(lambda: found(block))):
                gathered.bins[index] += bins
                gathered.above[index] += above
                counts[index] += around

        return fine_gather(len(guesses), take, sample=sample)

    def count_kept(self, thresholds: Sequence[TrimThreshold]) -> Gather:
        """How many entries of each task vector lie above its threshold, and at it."""
        from ties_utils import magnitude_bits

        def found(block: Block) -> list[list[int]]:
            pairs = zip(map(magnitude_bits, self._deltas(block)[1]), thresholds, strict=True)
            return [
                [int((bits > t.bits).count_nonzero()), int((bits == t.bits).count_nonzero())]
                for bits, t in pairs
            ]

        def take(block: Block, counts: Counts) -> None:
            counts += np.array(self._run(lambda: found(block)))

        return counts_gather(len(thresholds), take)

    def select_bin(self, counts: Counts, rank: int) -> tuple[int, int]:
        """`ties_utils.select_bin`."""
        from ties_utils import select_bin

        return select_bin(self._torch.from_numpy(counts), rank)

    def merge_task_vectors(self, merge: TaskVectorMerge) -> Take:
        """Sparsify, weight, elect, combine, scale, add the base."""
        from linear_utils import add_task_vector, combine_deltas
        from ties_utils import elect_and_merge

        def merged(base: "Tensor", deltas: "list[Tensor]") -> "Tensor":
            if merge.elect:
                return elect_and_merge(base, deltas, merge.weights, merge.lam, merge.normalize)
            delta = combine_deltas(deltas, merge.weights, normalize=merge.normalize)
            return add_task_vector(base, delta, merge.lam)

        def found(block: Block, ties_left: Counts | None) -> Counts | int:
            """Fills the result; how many entries of each model were equal to its threshold."""
            base, deltas = self._deltas(block)
            sparse = self._sparsify(block, deltas, merge.sparsify, ties_left)
            self._put(block, merged(base, sparse))
            return self._tied(deltas, merge.sparsify) if isinstance(merge.sparsify, Trim) else 0

        def take(block: Block, ties_left: Counts | None) -> None:
            tied = self._run(lambda: found(block, ties_left))
            if ties_left is not None:
                ties_left -= tied

        return take

    def _sparsify(
        self,
        block: Block,
        deltas: "list[Tensor]",
        sparsify: Trim | TrimRows | Drop | None,
        ties_left: Counts | None,
    ) -> "list[Tensor]":
        from ties_utils import trim_apply, trim_rows

        if isinstance(sparsify, Trim):
            assert ties_left is not None
            return [
                trim_apply(delta, TrimThreshold(threshold.bits, int(left)))
                for delta, threshold, left in zip(
                    deltas, sparsify.thresholds, ties_left, strict=True
                )
            ]
        if isinstance(sparsify, TrimRows):
            return [trim_rows(d, each) for d, each in zip(deltas, sparsify.densities, strict=True)]
        if isinstance(sparsify, Drop):
            kept = self._drop(block, deltas, sparsify)
            return [delta * factor for delta, factor in zip(kept, sparsify.factors, strict=True)]
        return deltas

    def _drop(self, block: Block, deltas: "list[Tensor]", drop: Drop) -> "list[Tensor]":
        from dare_utils import drop as drop_entries

        return [
            drop_entries(delta, density, key, block.start)
            for delta, density, key in zip(deltas, drop.densities, drop.keys, strict=True)
        ]

    def _tied(self, deltas: "list[Tensor]", trim: Trim) -> Counts:
        from ties_utils import count_ties

        pairs = zip(deltas, trim.thresholds, strict=True)
        return np.array([count_ties(delta, threshold) for delta, threshold in pairs])

    def _merging(self, function: "Callable[[list[Tensor]], Tensor]") -> Take:
        def take(block: Block, _: object) -> None:
            self._run(lambda: self._put(block, function(self._inputs(block))))

        return take

    def _stored(self, block: Block, index: int) -> "Tensor":
        """An input (or the result, -1) as torch sees it, in the block's memory."""
        stored = self._torch.from_numpy(block.stored(index).view(np.uint8))
        return stored.view(self._dtypes[block.layout.dtypes[index]])

    def _inputs(self, block: Block) -> "list[Tensor]":
        """The inputs in float32 on the device."""
        return [
            self._stored(block, index)
            .to(self._device, non_blocking=True)
            .to(self._torch.float32, copy=False)
            for index in range(len(block.layout.dtypes) - 1)
        ]

    def _deltas(self, block: Block) -> "tuple[Tensor, list[Tensor]]":
        """The base and the task vectors, on the device."""
        base, *models = self._inputs(block)
        return base, [model - base for model in models]

    def _put(self, block: Block, merged: "Tensor") -> None:
        """Round once to the output's dtype, and bring it to the block's memory."""
        result = self._stored(block, -1)
        result.copy_(merged.to(result.dtype))

    def _all_finite(self, values: "Tensor") -> bool:
        """A sum that is finite says so at a fraction of the cost; one that is not may overflow."""
        if self._torch.isfinite(values.sum(dtype=self._torch.float32)):
            return True
        return bool(self._torch.isfinite(values).all())

    def _run(self, work: Callable[[], Any]) -> Any:
        """Do the work on the device; on the CPU, from then on, where its memory does not do."""
        try:
            with self._stream():
                return work()
        except self._torch.cuda.OutOfMemoryError as error:
            if self._device.type == "cpu":
                raise
            with TorchOperations._lock:
                if self._device.type != "cpu":
                    warnings.warn(
                        f"{self._device} has too little memory for a block "
                        f"({str(error).splitlines()[0]}). The rest is computed on the CPU",
                        stacklevel=2,
                    )
                    self._device = self._torch.device("cpu")
            return work()

    @contextlib.contextmanager
    def _stream(self) -> Iterator[None]:
        """The thread's own stream of work on a GPU."""
        if self._device.type != "cuda":
            yield
            return
        if not hasattr(self._local, "stream"):
            self._local.stream = self._torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with self._torch.cuda.stream(self._local.stream):
            yield
            self._local.stream.synchronize()
