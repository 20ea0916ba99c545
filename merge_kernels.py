"""The arithmetic of the methods on blocks of rows, compiled: `TorchOperations` without its cost.

Every kernel gives the bits that the torch functions of `*_utils` give; the tests compare them. A
kernel takes a block as it is stored and works in pieces of 512 elements, which stay in a core's
first cache from the first conversion to the last rounding. No kernel holds the interpreter's
lock, so threads run them side by side; none has threads of its own.

The loops are written so that the compiler can make vector instructions of them: one simple thing
per loop, no branch inside but choices between values.

Compiled code is kept in `__pycache__`, or in the user's cache folder where that cannot be
written, or for the process alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

from merge_operations import (
    Counts,
    Drop,
    FineCounts,
    RunSums,
    Take,
    TaskVectorMerge,
    Trim,
    TrimRows,
    coarse_gather,
    counts_gather,
    fine_gather,
    run_sums_gather,
    window,
)
from merge_stream import Block, Gather
from scalar_utils import TrimThreshold, float32_sum, keep_limit, kept_count

F = TypeVar("F", bound=Callable[..., Any])

PIECE = 512
"""Elements worked on at once."""

RUN, LANES = 2**14, 2**10
"""As in `scalar_utils`. What a kernel knows as a constant stands in this file: compiled code is
kept until the file changes."""

COUNTERS = PIECE // 8
"""Philox counters of a piece that starts at a multiple of 8; a counter gives 8 draws."""

# Histograms of a row: the upper 8 of the 31 bits of a magnitude, the next 8, ...; a row is short,
# and to look through many bins would take longer than to fill them.
_ROW_SHIFTS = (23, 15, 7, 0)
_ROW_BINS = 2**8

_PLAIN, _TRIM, _DROP = 0, 1, 2

_MAGNITUDE = np.int32(0x7FFFFFFF)
_TINY = np.finfo(np.float32).tiny
_ZERO, _ONE = np.float32(0), np.float32(1)
_U32 = np.uint32

# Philox4x64-10 (dare_utils): multipliers in halves, and the steps of the key.
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_M0_LOW, _M0_HIGH = np.uint64(0xE14C6C93), np.uint64(0xD2E7470E)
_M1_LOW, _M1_HIGH = np.uint64(0x95121157), np.uint64(0xCA5A8263)
_STEP_0, _STEP_1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)

# A byte eight times; of each of these bytes the bit of its number.
_REPEAT, _BIT_OF_BYTE = np.uint64(0x0101010101010101), np.uint64(0x8040201008040201)


def _kernel(**options: Any) -> Callable[[F], F]:
    """Compile without the interpreter's lock, and keep the result for the next process."""

    def compiled(function: F) -> F:
        settings = {"nogil": True, "error_model": "numpy", **options}
        try:
            kernel: F = njit(function, cache=True, **settings)
        except RuntimeError:  # nowhere to keep it
            kernel = njit(function, **settings)
        return kernel

    return compiled


@_kernel()
def _float(bits: Any) -> Any:
    return _U32(bits).view(np.float32)


@_kernel()
def _bits(value: Any) -> Any:
    return np.float32(value).view(np.uint32)


@_kernel()
def _magnitude(value: Any) -> Any:
    return np.float32(value).view(np.int32) & _MAGNITUDE


@_kernel()
def _widen(memory: Any, place: Any, kind: Any, start: Any, size: Any, values: Any) -> None:
    """`size` elements of an input from `start` on, as float32."""
    if kind == 0:
        single = memory[place + 4 * start : place + 4 * (start + size)].view(np.float32)
        for j in range(size):
            values[j] = single[j]
        return
    half = memory[place + 2 * start : place + 2 * (start + size)].view(np.uint16)
    if kind == 2:
        for j in range(size):
            values[j] = _float(_U32(half[j]) << _U32(16))
        return
    for j in range(size):
        # float16: move exponent and mantissa into place and change the exponent's bias; below
        # the normal range, let a subtraction find the exponent.
        moved = (_U32(half[j]) & _U32(0x7FFF)) << _U32(13)
        normal = _float(moved + _U32(112 << 23))
        subnormal = _float(moved + _U32(113 << 23)) - np.float32(2.0**-14)
        value = normal if moved >= _U32(0x400 << 13) else subnormal
        values[j] = _float(_bits(value) | ((_U32(half[j]) & _U32(0x8000)) << _U32(16)))


@_kernel()
def _subtract(
    memory: Any, place: Any, kind: Any, start: Any, size: Any, base: Any, delta: Any
) -> None:
    """`size` elements of a task vector from `start` on."""
    if kind == 2:
        half = memory[place + 2 * start : place + 2 * (start + size)].view(np.uint16)
        for j in range(size):
            delta[j] = _float(_U32(half[j]) << _U32(16)) - base[j]
        return
    _widen(memory, place, kind, start, size, delta)
    for j in range(size):
        delta[j] -= base[j]


@_kernel()
def _round(values: Any, memory: Any, place: Any, kind: Any, start: Any, size: Any) -> None:
    """Write elements of the result, rounded to nearest even."""
    if kind == 0:
        single = memory[place + 4 * start : place + 4 * (start + size)].view(np.float32)
        for j in range(size):
            single[j] = values[j]
        return
    half = memory[place + 2 * start : place + 2 * (start + size)].view(np.uint16)
    if kind == 2:
        for j in range(size):
            bits = _bits(values[j])
            rounded = (bits + _U32(0x7FFF) + ((bits >> _U32(16)) & _U32(1))) >> _U32(16)
            # Rounding the bits of a NaN could make a number of it.
            is_nan = (bits & _U32(0x7FFFFFFF)) > _U32(0x7F800000)
            half[j] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded)
        return
    for j in range(size):
        sign = _bits(values[j]) & _U32(0x80000000)
        bits = _bits(values[j]) ^ sign
        odd = (bits >> _U32(13)) & _U32(1)
        normal = _U32(bits + _U32(0xC8000FFF) + odd) >> _U32(13)
        # Below the normal range: adding 0.5 leaves the rounded mantissa in the lowest bits.
        subnormal = _U32(_bits(_float(bits) + np.float32(0.5)) - _U32(126 << 23))
        rounded = normal if bits >= _U32(113 << 23) else subnormal
        rounded = rounded if bits < _U32(143 << 23) else _U32(0x7C00)
        rounded = rounded if bits <= _U32(0x7F800000) else _U32(0x7E00)
        half[j] = np.uint16(rounded | (sign >> _U32(16)))


@_kernel()
def _is_finite(memory: Any, place: Any, kind: Any, size: Any) -> Any:
    """Whether no exponent is all ones."""
    worst = _U32(0)
    if kind == 0:
        single = memory[place : place + 4 * size].view(np.uint32)
        for j in range(size):
            worst = max(worst, single[j] & _U32(0x7F800000))
        return worst != _U32(0x7F800000)
    half = memory[place : place + 2 * size].view(np.uint16)
    exponent = np.uint16(0x7F80) if kind == 2 else np.uint16(0x7C00)
    highest = np.uint16(0)
    for j in range(size):
        highest = max(highest, np.uint16(half[j] & exponent))
    return highest != exponent


@_kernel(fastmath={"contract"})  # a fused multiply-add, as in torch.addcmul
def _linear(memory: Any, places: Any, kinds: Any, size: Any, weights: Any, divisor: Any) -> None:
    """`linear_utils.linear`."""
    values, total = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    for start in range(0, size, PIECE):
        n = min(PIECE, size - start)
        for j in range(n):
            total[j] = _ZERO
        for i in range(len(weights)):
            weight = weights[i]
            _widen(memory, places[i], kinds[i], start, n, values)
            for j in range(n):
                total[j] += values[j] * weight
        for j in range(n):
            total[j] /= divisor
        _round(total, memory, places[-1], kinds[-1], start, n)


@_kernel()
def _combine(memory: Any, places: Any, kinds: Any, size: Any, coefficients: Any) -> None:
    """`linear_utils.combine`."""
    values, total = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    for start in range(0, size, PIECE):
        n = min(PIECE, size - start)
        for j in range(n):
            total[j] = _ZERO
        for i in range(len(coefficients)):
            coefficient = coefficients[i]
            _widen(memory, places[i], kinds[i], start, n, values)
            for j in range(n):
                total[j] += values[j] * coefficient
        _round(total, memory, places[-1], kinds[-1], start, n)


@_kernel()
def _sum_lanes(lanes: Any) -> Any:
    """Add the upper half of the lanes to the lower, until one is left."""
    count = LANES
    while count > 1:
        count //= 2
        for j in range(count):
            lanes[j] += lanes[j + count]
    return lanes[0]


@_kernel()
def _dot_parts(memory: Any, places: Any, kinds: Any, rows: Any, row_length: Any, sums: Any) -> None:
    """`slerp_utils.dot_parts`: shape (3, rows * runs in a row)."""
    a, c = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    lanes = np.empty((3, LANES), np.float64)
    number = 0
    for row in range(rows):
        for run in range(0, row_length, RUN):
            lanes[:] = 0.0
            stop = min(run + RUN, row_length)
            for start in range(run, stop, PIECE):
                n = min(PIECE, stop - start)
                place = row * row_length + start
                _widen(memory, places[0], kinds[0], place, n, a)
                _widen(memory, places[1], kinds[1], place, n, c)
                lane = (start - run) % LANES
                for j in range(n):
                    lanes[0, lane + j] += np.float64(a[j]) * np.float64(a[j])
                for j in range(n):
                    lanes[1, lane + j] += np.float64(c[j]) * np.float64(c[j])
                for j in range(n):
                    lanes[2, lane + j] += np.float64(a[j]) * np.float64(c[j])
            for i in range(3):
                sums[i, number] = _sum_lanes(lanes[i])
            number += 1


@_kernel()
def _absolute_parts(
    memory: Any,
    places: Any,
    kinds: Any,
    rows: Any,
    row_length: Any,
    first: Any,
    keys: Any,
    limits: Any,
    sums: Any,
) -> None:
    """`dare_utils.absolute_parts` of every task vector, then of what is kept of each."""
    models = len(keys)
    base, delta = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    kept, flags = np.empty(2 * COUNTERS, np.uint8), np.empty(2 * PIECE, np.uint8)
    lanes = np.empty((2 * models, LANES), np.float64)
    number = 0
    for row in range(rows):
        for run in range(0, row_length, RUN):
            lanes[:] = 0.0
            stop = min(run + RUN, row_length)
            for start in range(run, stop, PIECE):
                n = min(PIECE, stop - start)
                place = row * row_length + start
                _widen(memory, places[0], kinds[0], place, n, base)
                lane = (start - run) % LANES
                for i in range(models):
                    _subtract(memory, places[i + 1], kinds[i + 1], place, n, base, delta)
                    for j in range(n):
                        lanes[i, lane + j] += np.float64(abs(delta[j]))
                    _drop(delta, n, keys[i], limits[i], first + place, kept, flags)
                    for j in range(n):
                        lanes[models + i, lane + j] += np.float64(abs(delta[j]))
            for i in range(2 * models):
                sums[i, number] = _sum_lanes(lanes[i])
            number += 1


@_kernel()
def _multiply_wide(word: Any, low: Any, high: Any) -> Any:
    """High and low 64 bits of the product with a multiplier given in halves."""
    word_low, word_high = word & _LOW, word >> _HALF
    lowest = word_low * low
    middle = word_high * low + (lowest >> _HALF)
    cross = word_low * high + (middle & _LOW)
    return (
        word_high * high + (middle >> _HALF) + (cross >> _HALF),
        (cross << _HALF) | (lowest & _LOW),
    )


@_kernel()
def _kept(word: Any, limit: Any) -> Any:
    """Two bits: whether the draws of a word lie below the limit; its low half is drawn first."""
    return np.uint64((word & _LOW) < limit) | np.uint64((word >> _HALF) < limit) << np.uint64(1)


@_kernel()
def _keep_bits(key_0: Any, key_1: Any, first: Any, limit: Any, kept: Any) -> None:
    """`dare_utils.philox` from a counter on; of each, which of its 8 draws lie below the limit.

    The compiler makes vector instructions of this only while the count is a constant, and its
    widest ones because what is stored is narrow. Of a counter's four words three are 0, so each
    of the first two of the ten rounds has a product that is not needed: that of 0, and that of
    the key.
    """
    key_high, key_low = _multiply_wide(key_0, _M0_LOW, _M0_HIGH)
    for j in range(COUNTERS):
        high_0, low_0 = _multiply_wide(first + np.uint64(j), _M0_LOW, _M0_HIGH)
        high_2, low_2 = _multiply_wide(high_0 ^ key_1, _M1_LOW, _M1_HIGH)
        step_0, step_1 = key_0 + _STEP_0, key_1 + _STEP_1
        word_0, word_1 = high_2 ^ step_0, low_2
        word_2, word_3 = key_high ^ low_0 ^ step_1, key_low
        for _ in range(8):
            step_0 += _STEP_0
            step_1 += _STEP_1
            high_0, low_0 = _multiply_wide(word_0, _M0_LOW, _M0_HIGH)
            high_2, low_2 = _multiply_wide(word_2, _M1_LOW, _M1_HIGH)
            word_0, word_1 = high_2 ^ word_1 ^ step_0, low_2
            word_2, word_3 = high_0 ^ word_3 ^ step_1, low_0
        bits = _kept(word_0, limit) | _kept(word_1, limit) << np.uint64(2)
        bits |= _kept(word_2, limit) << np.uint64(4) | _kept(word_3, limit) << np.uint64(6)
        kept[j] = np.uint8(bits)


@_kernel()
def _drop(delta: Any, size: Any, key: Any, limit: Any, start: Any, kept: Any, flags: Any) -> None:
    """`dare_utils.drop` in place; `start` is the flat index of the first entry."""
    if limit > _LOW:  # every draw is below
        return
    first, skip = np.uint64(start // 8 + 1), start % 8
    _keep_bits(key[0], key[1], first, limit, kept)
    if skip > 0:  # the last entries belong to one counter more; their number is a constant
        _keep_bits(key[0], key[1], first + np.uint64(COUNTERS), limit, kept[COUNTERS:])
    octets = flags.view(np.uint64)
    for j in range(2 * COUNTERS if skip > 0 else COUNTERS):
        octets[j] = np.uint64(kept[j]) * _REPEAT & _BIT_OF_BYTE
    for j in range(size):
        delta[j] = delta[j] if flags[skip + j] != 0 else _ZERO


@_kernel()
def _coarse_histograms(
    memory: Any, places: Any, kinds: Any, size: Any, models: Any, counts: Any
) -> None:
    """`ties_utils.coarse_histogram` of some of the task vectors."""
    base, delta = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    for start in range(0, size, PIECE):
        n = min(PIECE, size - start)
        _widen(memory, places[0], kinds[0], start, n, base)
        for k in range(len(models)):
            i = models[k] + 1
            _subtract(memory, places[i], kinds[i], start, n, base, delta)
            bins = counts[k]
            for j in range(n):
                bins[_magnitude(delta[j]) >> 16] += 1


@_kernel()
def _fine_histograms(
    memory: Any,
    places: Any,
    kinds: Any,
    size: Any,
    models: Any,
    guesses: Any,
    windows: Any,
    bins: Any,
    above: Any,
    around: Any,
) -> None:
    """What `merge_operations.FineCounts` holds.

    Few entries lie in a window, apart from those equal to the guess, and these are counted apart:
    the branch is rarely taken, which costs less than to count everything somewhere.
    """
    base, delta = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    position = np.empty(PIECE, np.uint32)
    count = _U32(bins.shape[1])
    for start in range(0, size, PIECE):
        n = min(PIECE, size - start)
        _widen(memory, places[0], kinds[0], start, n, base)
        for k in range(len(models)):
            i = models[k] + 1
            _subtract(memory, places[i], kinds[i], start, n, base, delta)
            found, guess, lowest = bins[k], guesses[k], windows[k]
            guessed, highest = _U32(guess - lowest), np.int32(lowest + count - 1)
            beyond, over, equal = np.int32(0), np.int32(0), np.int32(0)
            for j in range(n):
                magnitude = _magnitude(delta[j])
                beyond += np.int32(magnitude > highest)
                over += np.int32(magnitude > guess)
                equal += np.int32(magnitude == guess)
                place = _U32(magnitude - lowest)  # below the window: a large number
                position[j] = place if magnitude != guess else count
            for j in range(n):
                if position[j] < count:
                    found[position[j]] += 1
            found[guessed] += equal
            above[k] += beyond
            around[k, 0] += over
            around[k, 1] += equal


@_kernel()
def _count_kept(
    memory: Any, places: Any, kinds: Any, size: Any, thresholds: Any, counts: Any
) -> None:
    """How many entries of each task vector lie above its threshold, and at it."""
    base, delta = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    for start in range(0, size, PIECE):
        n = min(PIECE, size - start)
        _widen(memory, places[0], kinds[0], start, n, base)
        for i in range(len(thresholds)):
            _subtract(memory, places[i + 1], kinds[i + 1], start, n, base, delta)
            threshold, above, tied = thresholds[i], np.int32(0), np.int32(0)
            for j in range(n):
                above += np.int32(_magnitude(delta[j]) > threshold)
                tied += np.int32(_magnitude(delta[j]) == threshold)
            counts[i, 0] += above
            counts[i, 1] += tied


@_kernel()
def _row_thresholds(
    memory: Any,
    places: Any,
    kinds: Any,
    rows: Any,
    row_length: Any,
    ranks: Any,
    thresholds: Any,
    ties: Any,
) -> None:
    """The threshold of every row of every task vector: (rows, models) each.

    As `ties_utils.trim_threshold`, by histograms of fewer bits each: a row is short, and lies in
    the cache.
    """
    base, delta = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    magnitudes = np.empty(row_length, np.int32)
    bins = np.empty(_ROW_BINS, np.int32)
    for row in range(rows):
        for i in range(len(ranks)):
            if ranks[i] == 0 or ranks[i] == row_length:
                thresholds[row, i] = np.int32(-1) if ranks[i] else _MAGNITUDE
                ties[row, i] = 0
                continue
            for start in range(0, row_length, PIECE):
                n = min(PIECE, row_length - start)
                place = row * row_length + start
                _widen(memory, places[0], kinds[0], place, n, base)
                _subtract(memory, places[i + 1], kinds[i + 1], place, n, base, delta)
                for j in range(n):
                    magnitudes[start + j] = _magnitude(delta[j])
            rank, count, found = ranks[i], row_length, 0
            for shift in _ROW_SHIFTS:
                bins[:] = 0
                for j in range(count):
                    bins[(magnitudes[j] >> shift) & (_ROW_BINS - 1)] += 1
                position = _ROW_BINS - 1
                while bins[position] < rank:
                    rank -= bins[position]
                    position -= 1
                found |= position << shift
                count = _keep_bin(magnitudes, count, found >> shift, shift)
            thresholds[row, i] = found
            ties[row, i] = rank


@_kernel()
def _keep_bin(magnitudes: Any, count: Any, upper: Any, shift: Any) -> Any:
    """Move the magnitudes with these upper bits to the front; how many they are."""
    kept = 0
    for j in range(count):
        magnitudes[kept] = magnitudes[j]
        kept += (magnitudes[j] >> shift) == upper
    return kept


@_kernel()
def _select_bin(counts: Any, rank: Any) -> Any:
    """`ties_utils.select_bin`."""
    above = 0
    position = len(counts) - 1
    while above + counts[position] < rank:
        above += counts[position]
        position -= 1
    return position, above


@_kernel()
def _trim(delta: Any, size: Any, threshold: Any, ties_left: Any) -> Any:
    """`ties_utils.trim_apply` in place; how many of the equal entries are left to keep."""
    lowest = threshold
    if ties_left > 0:
        tied = np.int32(0)
        for j in range(size):
            tied += np.int32(_magnitude(delta[j]) == threshold)
        if tied > ties_left:  # the last ones to keep are among these
            for j in range(size):
                if _magnitude(delta[j]) == threshold:
                    delta[j] = delta[j] if ties_left > 0 else _ZERO
                    ties_left -= 1
        else:
            ties_left -= tied
        lowest = np.int32(threshold - 1)
    for j in range(size):
        delta[j] = delta[j] if _magnitude(delta[j]) > lowest else _ZERO
    return ties_left


@_kernel()
def _merge_task_vectors(
    memory: Any,
    places: Any,
    kinds: Any,
    size: Any,
    stretch: Any,
    sparsify: Any,
    thresholds: Any,
    ties_left: Any,
    first: Any,
    keys: Any,
    limits: Any,
    factors: Any,
    weights: Any,
    lam: Any,
    normalize: Any,
    divisor: Any,
    elect: Any,
) -> None:
    """Sparsify, weight, elect, combine, scale, add the base.

    Thresholds and ties hold for stretches of the block, such as its rows: (stretches, models).
    """
    models = len(weights)
    base, total = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    signs, agreeing = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    deltas = np.empty((models, PIECE), np.float32)
    kept, flags = np.empty(2 * COUNTERS, np.uint8), np.empty(2 * PIECE, np.uint8)
    for number in range(size // stretch):
        for start in range(number * stretch, (number + 1) * stretch, PIECE):
            n = min(PIECE, (number + 1) * stretch - start)
            _widen(memory, places[0], kinds[0], start, n, base)
            for j in range(n):
                total[j] = _ZERO
            for i in range(models):
                delta, factor, weight = deltas[i], factors[i], weights[i]
                _subtract(memory, places[i + 1], kinds[i + 1], start, n, base, delta)
                if sparsify == _TRIM:
                    ties_left[number, i] = _trim(
                        delta, n, thresholds[number, i], ties_left[number, i]
                    )
                elif sparsify == _DROP:
                    _drop(delta, n, keys[i], limits[i], first + start, kept, flags)
                for j in range(n):
                    delta[j] *= factor
                    delta[j] *= weight
                    total[j] += delta[j]
            if elect:
                _disjoint_sum(deltas, n, weights, total, signs, agreeing)
                if normalize:
                    for j in range(n):
                        total[j] /= max(agreeing[j], _TINY)
            elif normalize:
                for j in range(n):
                    total[j] /= divisor
            if lam != _ZERO:
                for j in range(n):
                    base[j] += total[j] * lam
            _round(base, memory, places[-1], kinds[-1], start, n)


@_kernel()
def _disjoint_sum(
    deltas: Any, size: Any, weights: Any, total: Any, signs: Any, agreeing: Any
) -> None:
    """`ties_utils.disjoint_mean` before its division, and what it divides by.

    `total` is the sum of all votes at first, then that of those with its sign.
    """
    for j in range(size):
        signs[j] = -_ONE if total[j] < _ZERO else _ONE
        total[j] = _ZERO
        agreeing[j] = _ZERO
    for i in range(len(weights)):
        delta, weight = deltas[i], weights[i]
        for j in range(size):
            vote = delta[j] * signs[j]
            total[j] += vote if vote > _ZERO else _ZERO
            agreeing[j] += weight if vote > _ZERO else _ZERO
    for j in range(size):
        total[j] *= signs[j]


class KernelOperations:
    """The kernels as `merge_operations.Operations`; on the CPU."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""

    def start_thread(self) -> None:
        """Threads need no preparation."""

    def memory(self, size: int) -> NDArray[np.uint8]:
        """Memory for a thread's blocks."""
        return np.empty(size, dtype=np.uint8)

    def broken_inputs(self, block: Block) -> list[int]:
        """Which inputs hold NaN or infinity."""
        return [i for i in range(len(block.layout.dtypes) - 1) if not self._is_finite(block, i)]

    def result_is_finite(self, block: Block) -> bool:
        """Whether the result, as it was rounded, holds no NaN and no infinity."""
        return self._is_finite(block, -1)

    def _is_finite(self, block: Block, index: int) -> bool:
        layout = block.layout
        finite: bool = _is_finite(
            block.memory, layout.places[index], layout.kinds[index], block.size
        )
        return finite

    def linear(self, weights: Sequence[float], *, normalize: bool) -> Take:
        """`linear_utils.linear`."""
        multipliers = np.array(weights, dtype=np.float32)
        divisor = np.float32(float32_sum(weights) if normalize else 1.0)

        def take(block: Block, _: object) -> None:
            _linear(*_parts(block), block.size, multipliers, divisor)

        return take

    def combine(self, coefficients: Sequence[float]) -> Take:
        """`linear_utils.combine`."""
        multipliers = np.array(coefficients, dtype=np.float32)

        def take(block: Block, _: object) -> None:
            _combine(*_parts(block), block.size, multipliers)

        return take

    def dot_parts(self) -> Gather:
        """`slerp_utils.dot_parts` of two inputs."""

        def take(block: Block, sums: RunSums) -> None:
            found = _room_for_sums(block, 3)
            _dot_parts(*_parts(block), block.rows, block.layout.row_length, found)
            sums.append(found)

        return run_sums_gather(take)

    def absolute_parts(self, drop: Drop) -> Gather:
        """`dare_utils.absolute_parts` of every task vector, then of what is kept of each."""
        keys, limits = _random(drop)

        def take(block: Block, sums: RunSums) -> None:
            found = _room_for_sums(block, 2 * len(keys))
            shape = (block.rows, block.layout.row_length)
            _absolute_parts(*_parts(block), *shape, block.start, keys, limits, found)
            sums.append(found)

        return run_sums_gather(take)

    def coarse_histograms(self, models: Sequence[int], *, sample: bool = False) -> Gather:
        """`ties_utils.coarse_histogram` of some of the task vectors."""
        chosen = np.array(models)

        def take(block: Block, counts: Counts) -> None:
            _coarse_histograms(*_parts(block), block.size, chosen, counts)

        return coarse_gather(len(models), take, sample=sample)

    def fine_histograms(self, guesses: Mapping[int, int], *, sample: bool = False) -> Gather:
        """`ties_utils.fine_histogram` of some of the task vectors, around their guesses."""
        models, bits = np.array([*guesses]), np.array([*guesses.values()], dtype=np.int32)
        lowest = np.array([window(guess) for guess in guesses.values()], dtype=np.int32)

        def take(block: Block, gathered: FineCounts, counts: Counts) -> None:
            found = (gathered.bins, gathered.above, counts)
            _fine_histograms(*_parts(block), block.size, models, bits, lowest, *found)

        return fine_gather(len(guesses), take, sample=sample)

    def count_kept(self, thresholds: Sequence[TrimThreshold]) -> Gather:
        """How many entries of each task vector lie above its threshold, and at it."""
        bits = np.array([threshold.bits for threshold in thresholds], dtype=np.int32)

        def take(block: Block, counts: Counts) -> None:
            _count_kept(*_parts(block), block.size, bits, counts)

        return counts_gather(len(thresholds), take)

    def select_bin(self, counts: Counts, rank: int) -> tuple[int, int]:
        """`ties_utils.select_bin`."""
        position, above = _select_bin(counts, rank)
        return position, above

    def merge_task_vectors(self, merge: TaskVectorMerge) -> Take:
        """Sparsify, weight, elect, combine, scale, add the base."""
        count = len(merge.weights)
        sparsify = merge.sparsify
        kind, bits = _PLAIN, np.zeros((1, count), dtype=np.int32)
        keys, limits = np.zeros((count, 2), np.uint64), np.zeros(count, np.uint64)
        factors = np.ones(count, dtype=np.float32)
        if isinstance(sparsify, Trim):
            kind, bits = _TRIM, np.array([[t.bits for t in sparsify.thresholds]], dtype=np.int32)
        elif isinstance(sparsify, TrimRows):
            kind = _TRIM
        elif isinstance(sparsify, Drop):
            kind, (keys, limits) = _DROP, _random(sparsify)
            factors = np.array(sparsify.factors, dtype=np.float32)
        divided = merge.normalize and not merge.elect
        combining = (
            np.array(merge.weights, dtype=np.float32),
            np.float32(merge.lam),
            merge.normalize,
            np.float32(float32_sum(merge.weights) if divided else 1.0),
            merge.elect,
        )

        def take(block: Block, ties_left: Counts | None) -> None:
            stretch, thresholds = block.size, bits
            ties = np.zeros((1, count), dtype=np.int64)
            if isinstance(sparsify, TrimRows):
                stretch = block.layout.row_length
                thresholds, ties = _thresholds_of_rows(block, sparsify.densities)
            elif ties_left is not None:
                ties = ties_left[None, :]
            random = (block.start, keys, limits, factors)
            _merge_task_vectors(
                *_parts(block), block.size, stretch, kind, thresholds, ties, *random, *combining
            )

        return take


def _parts(block: Block) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any]]:
    return block.memory, block.layout.places, block.layout.kinds


def _room_for_sums(block: Block, count: int) -> NDArray[np.float64]:
    """Room for the run sums of a block: shape (count, runs)."""
    runs = -(-block.layout.row_length // RUN)
    return np.empty((count, block.rows * runs), dtype=np.float64)


def _random(drop: Drop) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Keys, and the limits below which draws keep their element."""
    limits = [keep_limit(density) for density in drop.densities]
    return np.array(drop.keys, dtype=np.uint64), np.array(limits, dtype=np.uint64)


def _thresholds_of_rows(
    block: Block, densities: Sequence[float]
) -> tuple[NDArray[np.int32], Counts]:
    """The threshold of every row of every task vector, and the equal entries to keep."""
    row_length = block.layout.row_length
    ranks = np.array([kept_count(density, row_length) for density in densities], dtype=np.int32)
    thresholds = np.empty((block.rows, len(ranks)), dtype=np.int32)
    ties = np.empty((block.rows, len(ranks)), dtype=np.int64)
    _row_thresholds(*_parts(block), block.rows, row_length, ranks, thresholds, ties)
    return thresholds, ties
