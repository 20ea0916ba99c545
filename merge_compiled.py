"""The arithmetic of the methods on blocks, by the loops of `merge_kernels`; on the CPU."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

import merge_kernels as kernels
from gram_utils import Gram, gram_matrix, gram_pairs
from merge_kernels import RUN, VARIANCE, Combining, Parts
from merge_operations import (
    Counts,
    CutRows,
    Cuts,
    Drop,
    DropByRank,
    FineCounts,
    Finish,
    Importance,
    Quantity,
    RunSums,
    Select,
    Sparsify,
    Take,
    TaskVectorMerge,
    coarse_gather,
    counts_gather,
    fine_gather,
    run_sums_gather,
    segments_gather,
    window,
)
from merge_stream import Block, Gather
from merge_torch import TorchOperations
from scalar_utils import (
    NO_MAGNITUDE,
    Cut,
    Key,
    RankRescale,
    float32_sum,
    keep_chances,
    keep_limit,
    rank_factors,
)

Floats = NDArray[np.float32]

NOTHING = Finish()


class CompiledOperations(TorchOperations):
    """The functions of `*_utils` by compiled loops, and by torch where there is none.

    Args:
        finish: what is done to every merged value.
        with_torch: whether the method needs what there is no loop for.
    """

    def __init__(self, finish: Finish | None = None, *, with_torch: bool = False) -> None:
        super().__init__("cpu", finish)
        self._with_torch = with_torch

    def __enter__(self) -> Self:
        return super().__enter__() if self._with_torch else self

    def __exit__(self, *error: object) -> None:
        if self._with_torch:
            super().__exit__(*error)

    def start_thread(self) -> None:
        """For loops threads need no preparation."""
        if self._with_torch:
            super().start_thread()

    def memory(self, size: int) -> NDArray[np.uint8]:
        """Memory for a thread's blocks."""
        return np.empty(size, dtype=np.uint8)

    def broken_inputs(self, block: Block) -> list[int]:
        """Which inputs hold NaN or infinity."""
        parts = _parts(block)
        inputs = range(len(block.layout.dtypes) - 1)
        return [i for i in inputs if not kernels.is_finite(parts, i, block.size)]

    def result_is_finite(self, block: Block) -> bool:
        """Whether the result, as it was rounded, holds no NaN and no infinity."""
        finite: bool = kernels.is_finite(_parts(block), -1, block.size)
        return finite

    # Merging

    def linear(self, weights: Sequence[float], *, normalize: bool) -> Take:
        """`linear_utils.linear`."""
        divisor = np.float32(float32_sum(weights) if normalize else 1.0)
        return self._looped(kernels.linear, _floats(weights), divisor)

    def combine(self, coefficients: Sequence[float]) -> Take:
        """`linear_utils.combine`."""
        return self._looped(kernels.combine, _floats(coefficients))

    def combine_rows(
        self, coefficients: Callable[[Gram], Sequence[float]], *, deltas: bool
    ) -> Take:
        """`linear_utils.combine_rows`, with what follows from the dot products of each row."""

        def take(block: Block, _: object) -> None:
            models = len(block.layout.dtypes) - 1 - deltas
            grams = _row_grams(block, models, deltas=deltas)
            each = _floats([list(coefficients(gram)) for gram in grams])
            kernels.combine_rows(
                self._parts(block), block.rows, block.layout.row_length, each, deltas
            )

        return take

    def copy(self) -> Take:
        """The first input as it is, not finished."""

        def take(block: Block, _: object) -> None:
            kernels.scale(_parts(block), block.size, np.float32(1))

        return take

    def scale(self, factor: float | None) -> Take:
        """`linear_utils.scale`."""
        return self._looped(kernels.scale, np.float32(1.0 if factor is None else factor))

    def nearswap(self, t: float) -> Take:
        """`linear_utils.nearswap`."""
        return self._looped(kernels.nearswap, np.float32(t))

    def fuse(self, score: Importance, threshold: float) -> Take:
        """`arcee_fusion_utils.fuse`."""

        def take(block: Block, _: object) -> None:
            rows = score.divergence[block.first : block.first + block.rows]
            kernels.fuse(
                self._parts(block), block.rows, block.layout.row_length, rows, np.float32(threshold)
            )

        return take

    def merge_active(self, epsilon: float, factors: Sequence[float], lam: float) -> Take:
        """`ram_utils.merge_active`, scaled and added to the base."""
        return self._looped(
            kernels.merge_active, np.float32(epsilon), _floats(factors), np.float32(lam)
        )

    def merge_task_vectors(self, merge: TaskVectorMerge) -> Take:
        """Sparsify, weight, elect, combine, scale, add the base."""
        combining, sparsify = _combining(merge), merge.sparsify
        if sparsify is None:
            kernel = kernels.merge_sum if merge.election is None else kernels.merge_whole
            return self._looped(kernel, combining)
        if isinstance(sparsify, Drop):
            keys, limits, factors = _random(sparsify)

            def take_dropped(block: Block, _: object) -> None:
                random = (block.start, keys, limits, factors)
                kernels.merge_dropped(self._parts(block), block.size, *random, combining)

            return take_dropped
        if isinstance(sparsify, DropByRank):
            factors = _floats(sparsify.factors)

            def take_ranked(block: Block, _: object) -> None:
                random = _random_by_rank(sparsify, block)
                kernels.merge_ranked(
                    self._parts(block),
                    block.rows,
                    block.layout.row_length,
                    *random,
                    factors,
                    combining,
                )

            return take_ranked
        if isinstance(sparsify, Select):
            cut = np.array(sparsify.cut)

            def take_selected(block: Block, seen: Counts) -> None:
                kernels.merge_selected(self._parts(block), block.size, cut, seen[0], combining)

            return take_selected
        factors = _floats(
            sparsify.factors if isinstance(sparsify, Cuts) else [1.0] * len(merge.weights)
        )

        def take_cut(block: Block, seen: Counts) -> None:
            stretches = _stretches(block, sparsify, seen)
            kernels.merge_cut(self._parts(block), block.size, *stretches, factors, combining)

        return take_cut

    def _parts(self, block: Block) -> Parts:
        """A block whose merged values are finished."""
        return _parts(block, self._finish)

    def _looped(self, kernel: Callable[..., None], *settings: object) -> Take:
        """A loop over the elements of a block, with its settings bound."""

        def take(block: Block, _: object) -> None:
            kernel(self._parts(block), block.size, *settings)

        return take

    # Gathering

    def gram_parts(self, *, deltas: bool, first: int | None = None) -> Gather:
        """`slerp_utils.gram_parts` of the inputs, or of the task vectors."""

        def take(block: Block, sums: RunSums, _: object) -> bool:
            models = first or len(block.layout.dtypes) - 1 - deltas
            return sums.append(_gram_parts(block, models, deltas=deltas))

        return run_sums_gather(take, tells_finite=first is None)

    def norm_parts(
        self,
        sparsify: Sparsify,
        power: int,
        start_segment: Callable[[int], Counts | None] = lambda _: None,
    ) -> Gather:
        """Run sums of |delta| ** power per model, then of what is kept of each."""
        if isinstance(sparsify, CutRows):
            return super().norm_parts(sparsify, power, start_segment)

        def take(block: Block, sums: RunSums, seen: Counts) -> None:
            found = _room_for_sums(block, 2 * (len(block.layout.dtypes) - 2))
            shaped = (*_shaped(block), power)
            if isinstance(sparsify, Cuts):
                kernels.norms_cut(*shaped, np.array(sparsify.cuts), seen, found)
            elif isinstance(sparsify, Drop):
                keys, limits, _ = _random(sparsify)
                kernels.norms_dropped(*shaped, block.start, keys, limits, found)
            elif isinstance(sparsify, DropByRank):
                kernels.norms_ranked(*shaped, *_random_by_rank(sparsify, block), found)
            else:
                kernels.norms_selected(*shaped, np.array(sparsify.cut), seen[0], found)
            sums.append(found)

        return run_sums_gather(take, start_segment)

    def count_active(self, epsilon: float, models: int) -> Gather:
        """`ram_utils.count_active`."""

        def take(block: Block, counts: Counts, _: object) -> None:
            kernels.count_active(_parts(block), block.size, np.float32(epsilon), counts)

        return counts_gather((models, 2), take)

    def count_conflicts(self, thresholds: Sequence[int]) -> Gather:
        """`ties_utils.count_conflicts` of the task vectors."""
        bits = np.array(thresholds, dtype=np.int32)

        def take(block: Block, counts: Counts, _: object) -> None:
            kernels.count_conflicts(_parts(block), block.size, bits, counts)

        return counts_gather((len([*gram_pairs(len(bits))]) + 1, 2), take)

    def sum_signs(
        self, merge: TaskVectorMerge, start_segment: Callable[[int], Counts | None]
    ) -> Gather:
        """Sum of the elected signs, those that balance counting 0."""
        combining, sparsify = _combining(merge), merge.sparsify
        if not isinstance(sparsify, Cuts | CutRows):
            return super().sum_signs(merge, start_segment)

        def take(block: Block, counts: Counts, seen: Counts) -> None:
            stretches = _stretches(block, sparsify, seen)
            counts += kernels.sum_signs(_parts(block), block.size, *stretches, combining)

        return counts_gather((1,), take, start_segment)

    def coarse_histograms(
        self, which: Sequence[int], of: Quantity = "deltas", *, sample: bool = False
    ) -> Gather:
        """`ties_utils.coarse_histogram` of some quantities."""
        chosen = _which(which, of)

        def take(block: Block, counts: Counts, _: object) -> None:
            kernels.coarse_histograms(*_scaled(block, of), chosen, counts)

        return coarse_gather(len(which), take, sample=sample)

    def fine_histograms(
        self,
        guesses: Sequence[tuple[int, int]],
        of: Quantity = "deltas",
        *,
        sample: bool = False,
    ) -> Gather:
        """`ties_utils.fine_histogram` of some quantities, around guesses."""
        chosen = _which([which for which, _ in guesses], of)
        bits = np.array([guess for _, guess in guesses], dtype=np.int32)
        lowest = np.array([window(guess) for _, guess in guesses], dtype=np.int32)

        def take(block: Block, gathered: FineCounts, counts: Counts) -> None:
            found = (gathered.bins, gathered.above, counts)
            kernels.fine_histograms(*_scaled(block, of), chosen, bits, lowest, *found)

        return fine_gather(len(guesses), take, sample=sample)

    def count_around(
        self, thresholds: Sequence[tuple[int, int]], of: Quantity = "deltas"
    ) -> Gather:
        """How many entries of some quantities lie above a magnitude's bits, and at it."""
        chosen = _which([which for which, _ in thresholds], of)
        bits = np.array([bits for _, bits in thresholds], dtype=np.int32)

        def take(block: Block, counts: Counts) -> None:
            kernels.count_around(*_scaled(block, of), chosen, bits, counts)

        return segments_gather(len(thresholds), take)

    def select_bin(self, counts: Counts, rank: int) -> tuple[int, int]:
        """`ties_utils.select_bin`."""
        position, above = kernels.select_bin(counts, rank)
        return position, above


def _parts(block: Block, finish: Finish = NOTHING) -> Parts:
    lowest, highest = finish.clamp_range or (-math.inf, math.inf)
    return Parts(
        block.memory,
        block.layout.places,
        block.layout.kinds,
        np.float32(1.0 - finish.weight_decay),
        np.float32(lowest),
        np.float32(highest),
        0,
    )


def _shaped(block: Block) -> tuple[Parts, int, int]:
    """A block for loops that go row by row."""
    return _parts(block), block.rows, block.layout.row_length


def _scaled(block: Block, of: Quantity) -> tuple[Parts, int, int, Floats]:
    """A block, and how long its stretches are and what their task vectors are scaled by."""
    if isinstance(of, Importance):
        rows = of.divergence[block.first : block.first + block.rows]
        return _parts(block), block.size, block.layout.row_length, rows
    return _parts(block), block.size, block.size, np.ones(1, dtype=np.float32)


def _floats(values: Any) -> Floats:
    return np.array(values, dtype=np.float32)


def _combining(merge: TaskVectorMerge) -> Combining:
    """What the loops know of a merge."""
    election, weights = merge.election, _floats(merge.weights)
    if election is None:
        divisor = np.float32(float32_sum(merge.weights) if merge.normalize else 1.0)
        voting = (weights, weights, kernels.NO_ELECTION, np.float32(1), merge.normalize, divisor)
    else:
        ones = np.ones_like(weights)
        by = kernels.BY_MASS if election.method == "mass" else kernels.BY_COUNT
        voting = (
            weights if election.on == "weighted" else ones,
            weights if election.denominator == "weight" else ones,
            by,
            np.float32(election.zero),
            election.denominator != "none",
            np.float32(1),
        )
    consensus = merge.consensus
    mask_lambdas = _floats(() if consensus is None else consensus.mask_lambdas)
    agreement = np.float32(0 if consensus is None else consensus.agreement)
    return Combining(weights, *voting, mask_lambdas, agreement, np.float32(merge.lam))


def _which(which: Sequence[int], of: Quantity) -> NDArray[np.int64]:
    """Numbers of quantities, as the loops know them."""
    return np.array([VARIANCE] * len(which) if of == "variance" else which)


def _room_for_sums(block: Block, count: int) -> NDArray[np.float64]:
    """Room for the run sums of a block: shape (count, runs)."""
    runs = -(-block.layout.row_length // RUN)
    return np.empty((count, block.rows * runs), dtype=np.float64)


def _gram_parts(block: Block, models: int, *, deltas: bool) -> NDArray[np.float64]:
    found = _room_for_sums(block, len([*gram_pairs(models)]))
    kernels.gram_parts(*_shaped(block), models, deltas, found)
    return found


def _row_grams(block: Block, models: int, *, deltas: bool) -> list[Gram]:
    """Dot products within each row of a block."""
    sums = _gram_parts(block, models, deltas=deltas)
    runs = sums.reshape(len(sums), block.rows, -1).tolist()
    return [gram_matrix([*map(math.fsum, row)], models) for row in zip(*runs, strict=True)]


def _keys(keys: Sequence[Key]) -> NDArray[np.uint64]:
    return np.array(keys, dtype=np.uint64)


def _random(drop: Drop) -> tuple[NDArray[np.uint64], NDArray[np.uint64], Floats]:
    """Keys, the limits below which draws keep their element, and factors."""
    limits = np.array([keep_limit(density) for density in drop.densities], dtype=np.uint64)
    return _keys(drop.keys), limits, _floats(drop.factors)


def _random_by_rank(
    drop: DropByRank, block: Block
) -> tuple[int, NDArray[np.uint64], NDArray[np.uint64], Floats]:
    """First index, keys, limits and factors by rank: shape (models, row length) each."""
    by_rank = [
        _rank_table(density, epsilon, block.layout.row_length, drop.rescale)
        for density, epsilon in zip(drop.densities, drop.epsilons, strict=True)
    ]
    limits, factors = (np.stack(tables) for tables in zip(*by_rank, strict=True))
    return block.start, _keys(drop.keys), limits, factors


@functools.lru_cache(maxsize=16)
def _rank_table(
    density: float, epsilon: float, length: int, rescale: RankRescale
) -> tuple[NDArray[np.uint64], Floats]:
    """Limit of the draws and factor of each rank."""
    chances = keep_chances(density, epsilon, length)
    limits = np.array([keep_limit(chance) for chance in chances], dtype=np.uint64)
    return limits, _floats(rank_factors(rescale, chances))


def _stretches(
    block: Block, sparsify: Cuts | CutRows, seen: Counts
) -> tuple[int, NDArray[np.int64], Counts]:
    """How long the stretches are that cuts hold for, the cuts, and what has been seen before."""
    if isinstance(sparsify, Cuts):
        return block.size, np.array([sparsify.cuts], dtype=np.int64), seen[None]
    length = block.layout.row_length
    windows = sparsify.windows(length)
    lower, kept, tied = _row_thresholds(block, [each.kept + each.removed for each in windows])
    cuts = np.zeros((block.rows, len(windows), len(Cut._fields)), dtype=np.int64)
    cuts[:, :, 0], cuts[:, :, 3] = lower, NO_MAGNITUDE
    cuts[:, :, 1] = tied - kept if sparsify.last_first else 0
    cuts[:, :, 2] = tied if sparsify.last_first or sparsify.all_ties else kept
    if any(each.removed for each in windows):
        upper, removed, tied = _row_thresholds(block, [each.removed for each in windows])
        cuts[:, :, 3], cuts[:, :, 4] = upper, tied - removed
    return length, cuts, np.zeros((block.rows, len(windows), 2), dtype=np.int64)


def _row_thresholds(block: Block, ranks: Sequence[int]) -> tuple[NDArray[np.int32], Counts, Counts]:
    """The threshold of every row and model, equal entries that belong to the rank, and all."""
    shape = (block.rows, len(ranks))
    thresholds = np.empty(shape, dtype=np.int32)
    ties, tied = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
    wanted = np.array(ranks, dtype=np.int32)
    kernels.row_thresholds(*_shaped(block), wanted, thresholds, ties, tied)
    return thresholds, ties, tied
