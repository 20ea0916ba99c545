"""The k-th largest magnitude of a large tensor, exactly, from a few passes and without a sort.

A sample of the rows says about where it will lie. One pass over everything counts every magnitude
in a window around that place, and what lies above: this proves the guess, or shows on which side
the right one is. Then the sample is asked for a place safely on that side, and after that a pass
over everything that counts coarsely says which window is right. Of scores that differ too much
from row to row for a sample of rows to say anything, the coarse count comes first.
"""

import math
from collections.abc import Generator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from merge_operations import (
    FINE_BINS,
    Counts,
    Importance,
    Operations,
    Quantity,
    SegmentCounts,
    window,
)
from merge_stream import Gather
from scalar_utils import KEEP_ALL, KEEP_NONE, TrimThreshold

SAFE_DEVIATIONS = 5
"""How many standard deviations of a sample's rank are taken for safe."""


class Rank(NamedTuple):
    """What to find: the magnitude that so many entries of a quantity reach.

    Attributes:
        which: number of the quantity, such as the model whose task vector it is.
        rank: from 0, for which nothing is kept, to the number of entries.
    """

    which: int
    rank: int


class Thresholds(NamedTuple):
    """What keeps so many entries, one for each rank.

    Attributes:
        chosen: the thresholds.
        tied: how many entries are equal to each.
        segments: entries above each and at it, where that has been counted already.
    """

    chosen: tuple[TrimThreshold, ...]
    tied: tuple[int, ...]
    segments: SegmentCounts | None

    @property
    def cuts_ties(self) -> bool:
        """Whether some of the equal entries are kept and some are not."""
        pairs = zip(self.chosen, self.tied, strict=True)
        return any(threshold.ties < tied for threshold, tied in pairs)


class _Search(NamedTuple):
    """What is looked for.

    Attributes:
        ranks: all that are wanted; those below are named by their place among them.
        numel: entries of each quantity.
        of: what the quantities are.
        operations: the arithmetic.
    """

    ranks: Sequence[Rank]
    numel: int
    of: Quantity
    operations: Operations

    def coarse_histograms(
        self, missing: Sequence[int], *, sample: bool
    ) -> Generator[Gather, Any, list[Counts]]:
        """One for each missing rank; ranks of the same quantity share theirs."""
        each = [self.ranks[number].which for number in missing]
        which = sorted(set(each))
        counts = yield self.operations.coarse_histograms(which, self.of, sample=sample)
        return [counts[which.index(one)] for one in each]

    def fine_histograms(self, guesses: Mapping[int, int], *, sample: bool = False) -> Gather:
        pairs = [(self.ranks[number].which, guess) for number, guess in guesses.items()]
        return self.operations.fine_histograms(pairs, self.of, sample=sample)


Guesses = Generator[Gather, Any, dict[int, int]]
"""Gathers, and ends with the bits of a magnitude for each wanted rank."""


def find_thresholds(
    ranks: Sequence[Rank], numel: int, operations: Operations, of: Quantity = "deltas"
) -> Generator[Gather, Any, Thresholds]:
    """Find the magnitudes of some ranks.

    Args:
        ranks: what to find.
        numel: entries of each quantity in the group.
        operations: the arithmetic.
        of: what the quantities are. Of scores the smallest is looked for too; of what is
            trimmed a rank of all entries keeps everything, whatever the smallest is.
    """
    search = _Search(ranks, numel, of, operations)
    last = numel if isinstance(of, Importance) else numel - 1
    chosen = [KEEP_ALL if rank else KEEP_NONE for _, rank in ranks]
    tied = [0] * len(ranks)
    counted: dict[int, Counts] = {}
    missing = [number for number, (_, rank) in enumerate(ranks) if 0 < rank <= last]
    sides: dict[int, int] = {}
    by_sample = () if isinstance(of, Importance) else (_guess, _guess_on_the_other_side)
    for find_windows in (*by_sample, _find_windows):
        if not missing:
            break
        guesses = yield from find_windows(missing, search, sides)
        fine = yield search.fine_histograms(guesses)
        for index, (number, guess) in enumerate(guesses.items()):
            rank, bins = ranks[number].rank - int(fine.above[index]), fine.bins[index]
            if not 0 < rank <= bins.sum():
                sides[number] = 1 if rank > 0 else -1  # the right one is smaller, or larger
                continue
            position, above = operations.select_bin(bins, rank)
            chosen[number] = TrimThreshold(window(guess) + position, rank - above)
            tied[number] = int(bins[position])
            if chosen[number].bits == guess:
                counted[number] = fine.segments.counts[:, index]
            missing.remove(number)
        names = fine.segments.names
        del fine, bins  # before the next pass
    segments = None
    if len(counted) == len(ranks):
        counts = [counted[number] for number in range(len(ranks))]
        segments = SegmentCounts(names, np.stack(counts, axis=1))
    return Thresholds(tuple(chosen), tuple(tied), segments)


def _guess(
    missing: Sequence[int],
    search: _Search,
    _: Mapping[int, int],
    deviations: Mapping[int, int] = MappingProxyType({}),
) -> Guesses:
    """Where the magnitudes lie, as far as a sample can say.

    Args:
        missing: numbers of the ranks.
        deviations: so many standard deviations of the sample away from the rank.
    """
    coarse = yield from search.coarse_histograms(missing, sample=True)
    sampled = int(coarse[0].sum())
    wanted, above, middles = {}, {}, {}
    for number, counts in zip(missing, coarse, strict=True):
        share = search.ranks[number].rank / search.numel
        deviation = math.sqrt(share * (1 - share) * sampled)
        place = round(share * sampled + deviations.get(number, 0) * deviation)
        wanted[number] = min(max(1, place), sampled)
        coarse_bin, above[number] = search.operations.select_bin(counts, wanted[number])
        middles[number] = _middle(coarse_bin)
    del coarse, counts  # before the next pass
    fine = yield search.fine_histograms(middles, sample=True)
    return {
        number: window(middle)
        + search.operations.select_bin(fine.bins[index], wanted[number] - above[number])[0]
        for index, (number, middle) in enumerate(middles.items())
    }


def _guess_on_the_other_side(
    missing: Sequence[int], search: _Search, sides: Mapping[int, int]
) -> Guesses:
    """A guess from the sample that is safely on the side on which the right one is."""
    deviations = {number: SAFE_DEVIATIONS * sides[number] for number in missing}
    return (yield from _guess(missing, search, sides, deviations))


def _find_windows(missing: Sequence[int], search: _Search, _: Mapping[int, int]) -> Guesses:
    """A guess in whose window the magnitude is, from all coarse bins."""
    coarse = yield from search.coarse_histograms(missing, sample=False)
    return {
        number: _middle(search.operations.select_bin(counts, search.ranks[number].rank)[0])
        for number, counts in zip(missing, coarse, strict=True)
    }


def _middle(coarse_bin: int) -> int:
    """Bits of the magnitude whose window is a coarse bin."""
    return coarse_bin * FINE_BINS + FINE_BINS // 2
