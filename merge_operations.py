"""The arithmetic that methods ask for, on blocks of rows: what there is, and what passes collect.

`merge_torch` does it with the functions of `*_utils`, which are the definition, on any device;
`merge_compiled` does the same faster on a CPU, and gives the same bits. A method (`merge_methods`)
asks for the functions it needs, with its parameters bound, and hands them to `merge_stream`.
"""

import math
import mmap
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from gram_utils import Gram
from merge_stream import Arithmetic, Block, Gather
from scalar_utils import (
    Cut,
    Denominator,
    ElectMethod,
    ElectOn,
    Key,
    RankRescale,
    Window,
)

COARSE_BINS, FINE_BINS = 2**15, 2**16

Loops = Literal["all", "some", "none"]
"""How much of a method's arithmetic there are compiled loops for."""

Counts = NDArray[np.int64]
Take = Callable[[Block, Any], None]
"""What `merge_stream.Merge.take` is: fills a block's result."""


@dataclass(frozen=True)
class Importance:
    """The score of Arcee Fusion; see `arcee_fusion_utils.importance`.

    Attributes:
        divergence: of each row of the tensor; float32.
    """

    divergence: NDArray[np.float32]


Quantity = Literal["deltas", "variance"] | Importance
"""What is counted and compared: the magnitude of each task vector, their variance, the score of
the one model. Of the last two there is one, number 0."""


@dataclass(frozen=True)
class Cuts:
    """Keep what a cut keeps; all per model. State of a segment: `seen`, shape (models, 2).

    Attributes:
        cuts: what is kept.
        factors: what is kept is multiplied by.
    """

    cuts: tuple[Cut, ...]
    factors: tuple[float, ...]


@dataclass(frozen=True)
class CutRows:
    """Keep a window of the magnitudes of every row, per model.

    Attributes:
        windows: from the length of a row to how many entries are kept, and how many larger ones
            removed, per model.
        last_first: of equal magnitudes the last ones count as larger; else the first ones.
        all_ties: keep all entries equal to the smallest that is kept.
    """

    windows: Callable[[int], Sequence[Window]]
    last_first: bool = False
    all_ties: bool = False


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
class DropByRank:
    """Keep entries at random, by their rank in the row; all per model.

    Attributes:
        keys, densities: as `Drop`.
        epsilons: half the distance between the chances of a row's largest and smallest entries.
        rescale: "inverse_prob" divides each entry by its chance.
        factors: what is kept is multiplied by.
    """

    keys: tuple[Key, ...]
    densities: tuple[float, ...]
    epsilons: tuple[float, ...]
    rescale: RankRescale
    factors: tuple[float, ...]


@dataclass(frozen=True)
class Select:
    """Keep the entries whose variance over the models a cut keeps. State: `seen`, shape (1, 2)."""

    cut: Cut


Sparsify = Cuts | CutRows | Drop | DropByRank | Select


@dataclass(frozen=True)
class Election:
    """Which models an entry is merged from; see `ties_utils.elect_and_merge`.

    Attributes:
        denominator, on, method: as there.
        zero: the sign of an entry whose votes balance; -1.0, 0.0 or 1.0.
    """

    denominator: Denominator
    on: ElectOn = "weighted"
    method: ElectMethod = "mass"
    zero: float = 1.0


@dataclass(frozen=True)
class Consensus:
    """Which entries of the merged task vector are kept; see `consensus_utils.keep_consensus`."""

    mask_lambdas: tuple[float, ...]
    agreement: int


@dataclass(frozen=True)
class TaskVectorMerge:
    """How task vectors become the merged one.

    Attributes:
        weights: one per model.
        lam: scale of the merged task vector.
        normalize: divide by the sum of the weights; not with an election.
        election: elect a sign per entry and leave out the models that have the other.
        sparsify: what is done to each task vector first.
        consensus: what is done to the merged one, before it is scaled.
    """

    weights: tuple[float, ...]
    lam: float = 1.0
    normalize: bool = False
    election: Election | None = None
    sparsify: Sparsify | None = None
    consensus: Consensus | None = None


@dataclass(frozen=True)
class Finish:
    """What is done to every merged value before it is rounded; see `linear_utils.finish`."""

    weight_decay: float = 0.0
    clamp_range: tuple[float, float] | None = None


class Operations(Arithmetic, Protocol):
    """The arithmetic that the methods and the stream use; torch and the kernels both offer it.

    Functions for a block come with their parameters bound. What they merge is finished.
    """

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    # Merging

    def linear(self, weights: Sequence[float], *, normalize: bool) -> Take:
        """`linear_utils.linear`."""

    def combine(self, coefficients: Sequence[float]) -> Take:
        """`linear_utils.combine`."""

    def combine_rows(
        self, coefficients: Callable[[Gram], Sequence[float]], *, deltas: bool
    ) -> Take:
        """`linear_utils.combine_rows`, with what follows from the dot products of each row.

        Args:
            coefficients: from the Gram matrix of a row to a number per model.
            deltas: combine the task vectors, and add the base.
        """

    def combine_columns(self, coefficients: NDArray[np.float32], *, deltas: bool) -> Take:
        """As `combine_rows`, with numbers for every column: shape (models, columns)."""

    def copy(self) -> Take:
        """The first input as it is, not finished."""

    def scale(self, factor: float | None) -> Take:
        """`linear_utils.scale`."""

    def nearswap(self, t: float) -> Take:
        """`linear_utils.nearswap`."""

    def fuse(self, score: Importance, threshold: float) -> Take:
        """`arcee_fusion_utils.fuse`."""

    def merge_active(self, epsilon: float, factors: Sequence[float], lam: float) -> Take:
        """`ram_utils.merge_active`, scaled and added to the base."""

    def merge_task_vectors(self, merge: TaskVectorMerge) -> Take:
        """Sparsify, weight, elect, combine, scale, add the base."""

    # Gathering

    def gram_parts(self, *, deltas: bool, first: int | None = None) -> Gather:
        """`slerp_utils.gram_parts` of the inputs, or of the task vectors: `RunSums`.

        Args:
            deltas: of the task vectors.
            first: of so many of them alone.
        """

    def row_divergence(self, rows: int) -> Gather:
        """`arcee_fusion_utils.row_divergence` of all rows of a tensor: float32, shape (rows,)."""

    def column_grams(self, *, deltas: bool) -> Gather:
        """Dot products of the columns of two models, or task vectors: (3, columns), float64.

        The tensor's rows are gathered in order (`TensorTask.in_order`).
        """

    def norm_parts(
        self,
        sparsify: Sparsify,
        power: int,
        start_segment: Callable[[int], Counts | None] = lambda _: None,
    ) -> Gather:
        """Run sums of |delta| ** power per model, then of what is kept of each: `RunSums`.

        What is kept is not multiplied by the factors, which these sums are to tell.
        """

    def count_active(self, epsilon: float, models: int) -> Gather:
        """`ram_utils.count_active`: counts, shape (models, 2)."""

    def count_conflicts(self, thresholds: Sequence[int]) -> Gather:
        """`ties_utils.count_conflicts` of the task vectors: counts, shape (pairs + 1, 2)."""

    def sum_signs(
        self, merge: TaskVectorMerge, start_segment: Callable[[int], Counts | None]
    ) -> Gather:
        """Sum of the elected signs, those that balance counting 0: counts, shape (1,)."""

    def coarse_histograms(
        self, which: Sequence[int], of: Quantity = "deltas", *, sample: bool = False
    ) -> Gather:
        """`ties_utils.coarse_histogram` of some quantities: shape (len(which), 2**15)."""

    def fine_histograms(
        self,
        guesses: Sequence[tuple[int, int]],
        of: Quantity = "deltas",
        *,
        sample: bool = False,
    ) -> Gather:
        """`ties_utils.fine_histogram` of some quantities, and more: `FineCounts`.

        Args:
            guesses: which quantity, and bits of a magnitude; see `window`.
            of: what they are.
            sample: look at a sample of the blocks.
        """

    def count_around(
        self, thresholds: Sequence[tuple[int, int]], of: Quantity = "deltas"
    ) -> Gather:
        """Entries of some quantities above a magnitude's bits, and equal: `SegmentCounts`."""

    def select_bin(self, counts: Counts, rank: int) -> tuple[int, int]:
        """`ties_utils.select_bin`."""


def numba_problem() -> str:
    """Why numba cannot be used; empty where it can."""
    try:
        import numba  # noqa: F401
    except Exception as error:  # not there, or broken beside this numpy, with errors of any kind
        return str(error) or type(error).__name__
    return ""


def arithmetic(device: str, loops: Loops = "all") -> tuple[str, ...]:
    """The packages that compute, imported: "numba" on a CPU, where that works, else "torch".

    Args:
        device: such as "cpu" or "cuda".
        loops: of how much of the method's arithmetic there are; of "some", both compute.
    """
    packages: tuple[str, ...] = ("torch",)
    if loops != "none" and device == "cpu" and not numba_problem():
        packages = ("numba",) if loops == "all" else ("numba", "torch")
    if "torch" in packages:
        import torch  # noqa: F401
    return packages


def make_operations(
    device: str, loops: Loops = "all", *, finish: Finish | None = None
) -> Operations:
    """The fastest arithmetic there is for a device; see `arithmetic`."""
    finish = finish or Finish()
    packages = arithmetic(device, loops)
    if "numba" in packages:
        from merge_compiled import CompiledOperations

        return CompiledOperations(finish, with_torch="torch" in packages)
    from merge_torch import TorchOperations

    return TorchOperations(device, finish)


def together(gathers: Sequence[Gather]) -> Gather:
    """Several passes in one: collects a list of what each collects.

    None of them has a state of its own for a segment.
    """

    def take(block: Block, collections: list[Any], _: object) -> None:
        for gather, collection in zip(gathers, collections, strict=True):
            gather.take(block, collection, None)

    def fold(collections: list[Any], others: list[Any]) -> list[Any]:
        pairs = zip(gathers, collections, others, strict=True)
        return [gather.fold(one, other) for gather, one, other in pairs]

    return Gather(lambda names: [gather.start(names) for gather in gathers], take, fold)


def by_tensor(gather: Gather) -> Gather:
    """A pass that collects for each tensor of a group apart: by name."""

    def take(block: Block, collections: dict[str, Any], state: Any) -> None:
        name = block.layout.name
        if name not in collections:
            collections[name] = gather.start([name])
        gather.take(block, collections[name], state)

    def fold(collections: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
        for name, other in others.items():
            mine = collections.get(name)
            collections[name] = other if mine is None else gather.fold(mine, other)
        return collections

    return Gather(lambda _: {}, take, fold, start_segment=gather.start_segment)


def coarse_gather(
    count: int, take: Callable[[Block, Counts, Any], None], *, sample: bool
) -> Gather:
    """A pass that counts into coarse bins: shape (count, 2**15)."""
    return Gather(lambda _: _bins(count, COARSE_BINS), take, _join_bins, sample=sample)


def _bins(rows: int, count: int) -> Counts:
    """Empty bins, shape (rows, count), in memory that goes back to the system after use.

    The allocator would keep it; and pages whose bins stay empty take none.
    """
    size = rows * count * np.dtype(np.int64).itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype=np.int64).reshape(rows, count)


def _join_bins(bins: Counts, others: Counts) -> Counts:
    """Add counts to others, and leave pages alone where there is nothing to add."""
    return np.add(bins, others, out=bins, where=others != 0)


@dataclass
class SegmentCounts:
    """Entries above a magnitude, and equal to it, per segment and threshold.

    Attributes:
        names: of the tensors that the segments belong to.
        counts: shape (segments, thresholds, 2).
    """

    names: Sequence[str]
    counts: Counts

    @classmethod
    def start(cls, names: Sequence[str], thresholds: int) -> Self:
        """Nothing counted yet."""
        return cls(names, np.zeros((len(names), thresholds, 2), dtype=np.int64))

    def __iadd__(self, other: Self) -> Self:
        self.counts += other.counts
        return self


@dataclass
class FineCounts:
    """What lies in a window of 2**16 magnitudes around each guess, and above it.

    Attributes:
        bins: entries of every magnitude in the window; shape (guesses, 2**16).
        above: entries above the window; shape (guesses,).
        segments: entries above the guess, and at it.
    """

    bins: Counts
    above: Counts
    segments: SegmentCounts

    @classmethod
    def start(cls, names: Sequence[str], guesses: int) -> Self:
        """Nothing counted yet."""
        above = np.zeros(guesses, dtype=np.int64)
        return cls(_bins(guesses, FINE_BINS), above, SegmentCounts.start(names, guesses))

    def __iadd__(self, other: Self) -> Self:
        _join_bins(self.bins, other.bins)
        self.above += other.above
        self.segments += other.segments
        return self


def window(guess: int) -> int:
    """Bits of the lowest of the 2**16 magnitudes around a guess; the highest has 31 bits."""
    return min(max(0, guess - FINE_BINS // 2), 2**31 - FINE_BINS)


def fine_gather(
    guesses: int, take: Callable[[Block, FineCounts, Counts], None], *, sample: bool
) -> Gather:
    """A pass that counts within a window around each guess: `FineCounts`.

    `take` is also given the counts of the block's segment.
    """

    def take_block(block: Block, gathered: FineCounts, _: object) -> None:
        take(block, gathered, gathered.segments.counts[block.segment])

    def start(names: Sequence[str]) -> FineCounts:
        return FineCounts.start(names, guesses)

    return Gather(start, take_block, operator.iadd, sample=sample)


class RunSums:
    """Sums over runs of rows, of several quantities; they are joined in the end, exactly."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.float64]] = []

    def append(self, part: "NDArray[np.float64] | list[list[float]]") -> bool:
        """Take in the sums of a block, shape (quantities, runs); whether all of them are finite."""
        self._parts.append(np.asarray(part))
        return bool(np.isfinite(self._parts[-1]).all())

    def totals(self) -> list[float]:
        """The sum of each quantity, rounded once: it does not depend on the blocks."""
        return [math.fsum(sums) for sums in np.concatenate(self._parts, axis=1)]

    def __iadd__(self, other: Self) -> Self:
        self._parts += other._parts
        return self


def run_sums_gather(
    take: Callable[[Block, RunSums, Any], bool | None],
    start_segment: Callable[[int], Counts | None] = lambda _: None,
    *,
    tells_finite: bool = False,
) -> Gather:
    """A pass that collects `RunSums`; see `Gather` for the rest."""
    return Gather(
        lambda _: RunSums(),
        take,
        operator.iadd,
        start_segment=start_segment,
        tells_finite=tells_finite,
    )


def segments_gather(count: int, take: Callable[[Block, Counts], None]) -> Gather:
    """A pass that collects `SegmentCounts`."""

    def take_block(block: Block, segments: SegmentCounts, _: object) -> None:
        take(block, segments.counts[block.segment])

    return Gather(lambda names: SegmentCounts.start(names, count), take_block, operator.iadd)


def counts_gather(
    shape: tuple[int, ...],
    take: Callable[[Block, Counts, Any], None],
    start_segment: Callable[[int], Counts | None] = lambda _: None,
) -> Gather:
    """A pass that collects counts of some shape."""

    def start(_: Sequence[str]) -> Counts:
        return np.zeros(shape, dtype=np.int64)

    return Gather(start, take, operator.iadd, start_segment=start_segment)


def equal_before(counted: SegmentCounts | None, cuts: int) -> Callable[[int], Counts]:
    """From a segment's number to the entries equal to each cut's bounds before it: (cuts, 2).

    Args:
        counted: entries around each cut's lower bound, and then, if there are any, around each
            one's upper bound. None where it does not matter which of the equal entries come first.
        cuts: how many.
    """
    if counted is None:
        return lambda _: np.zeros((cuts, 2), dtype=np.int64)
    equal = counted.counts[:, :, 1]
    before = np.zeros((len(equal), 2 * cuts), dtype=np.int64)
    before[:, : equal.shape[1]] = equal.cumsum(axis=0) - equal
    return lambda number: before[number].reshape(2, cuts).T.copy()
