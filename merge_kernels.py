"""Compiled loops over blocks of rows: what `merge_compiled` calls, and nothing else.

Every loop gives the bits that the torch functions of `*_utils` give; the tests compare them. A
loop takes a block as it is stored and works in pieces of 2048 elements, which stay in a core's
caches from the first conversion to the last rounding. No loop holds the interpreter's lock, so
threads run them side by side; none has threads of its own.

They are written so that the compiler can make vector instructions of them: one simple thing per
loop, no branch inside but choices between values, and indices that are the loop's own: one that is
a sum could be negative for all that the compiler knows, which means from the end, so slices are
taken before the loop. What is called for every few hundred elements is inlined. Each way to thin
out task vectors has loops of its own, so that a merge compiles what it needs and no more.

Compiled code is kept in `__pycache__`, or in the user's cache folder where that cannot be
written, or for the process alone. It is kept until this file changes, so all loops, and all that
they know as constants, stand in it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

F = TypeVar("F", bound=Callable[..., Any])

RUN, LANES = 2**14, 2**8
"""As in `scalar_utils`."""

STRIDE = 4 * LANES
"""Elements that are added to the lanes in one go."""

PIECE = 2 * STRIDE
"""Elements worked on at once: few enough for a core's cache to hold those of every model."""

TILE = 512
"""Columns of a product of factors worked on at once."""

COUNTERS = 64
"""Philox counters worked on at once; each gives 8 draws."""

# Histograms of a row: the upper 8 of the 31 bits of a magnitude, the next 8, ...; a row is short,
# and to look through many bins would take longer than to fill them.
_ROW_SHIFTS = (23, 15, 7, 0)
_ROW_BINS = 2**8

# A row is sorted by the upper half of its magnitudes, 8 powers of 2 deep, and then by moving
# entries past their neighbours, at most so often per entry; else digit by digit, 8 bits each.
_SORT_BINS = 2**10
_MOVES = 8
_DIGITS = (0, 8, 16, 24)
_DIGIT = np.uint64(2**8 - 1)

VARIANCE = -1
"""In place of a model's number: the variance over all of them."""

NO_ELECTION, BY_MASS, BY_COUNT = 0, 1, 2

_MAGNITUDE = np.int32(0x7FFFFFFF)
_ZERO, _ONE, _INFINITY = np.float32(0), np.float32(1), np.float32(np.inf)
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


class Parts(NamedTuple):
    """A block.

    Attributes:
        memory: inputs and result, as they are stored.
        places: where each begins, in bytes; the result last.
        kinds: 0 for float32, 1 for float16, 2 for bfloat16.
        keep: what merged values are multiplied by, before they are clamped.
        lowest, highest: what they are clamped to.
        zero: 0. A literal 0 as an argument is a type of its own, for which a loop would be compiled
            once more.
    """

    memory: NDArray[np.uint8]
    places: NDArray[np.int64]
    kinds: NDArray[np.int64]
    keep: np.float32
    lowest: np.float32
    highest: np.float32
    zero: int


class Combining(NamedTuple):
    """How task vectors become the merged one; see `merge_operations.TaskVectorMerge`.

    Attributes:
        weights: one per model.
        votes: what a model's changes are multiplied by before they vote.
        shares: what a model that agrees adds to the divisor.
        election: `NO_ELECTION`, `BY_MASS` or `BY_COUNT`.
        zero: the sign where votes balance.
        divides: by the shares of those who agree, or, without an election, by `divisor`.
        divisor: sum of the weights.
        mask_lambdas: one per model, or none where no consensus is asked for.
        agreement: how many models it takes.
        lam: scale of the merged task vector.
    """

    weights: NDArray[np.float32]
    votes: NDArray[np.float32]
    shares: NDArray[np.float32]
    election: int
    zero: np.float32
    divides: bool
    divisor: np.float32
    mask_lambdas: NDArray[np.float32]
    agreement: np.float32
    lam: np.float32


@_kernel()
def _widen(parts: Any, index: Any, start: Any, size: Any, values: Any) -> None:
    """`size` elements of an input from `start` on, as float32."""
    memory, place, kind = parts.memory, parts.places[index], parts.kinds[index]
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
        # float16: move exponent and mantissa into place and change the exponent's bias, twice as
        # much for infinity and NaN; below the normal range, let a subtraction find the exponent.
        moved = (_U32(half[j]) & _U32(0x7FFF)) << _U32(13)
        bias = _U32(112 << 23) if moved < _U32(0x7C00 << 13) else _U32(224 << 23)
        normal = _float(moved + bias)
        subnormal = _float(moved + _U32(113 << 23)) - np.float32(2.0**-14)
        value = normal if moved >= _U32(0x400 << 13) else subnormal
        values[j] = _float(_bits(value) | ((_U32(half[j]) & _U32(0x8000)) << _U32(16)))


@_kernel()
def widen_half(half: Any, values: Any) -> None:
    """bfloat16 by its bits as float32; rows of both."""
    for i in range(half.shape[0]):
        bits, row = half[i], values[i]
        for j in range(len(bits)):
            row[j] = _float(_U32(bits[j]) << _U32(16))


@_kernel()
def add_low_rank(values: Any, left: Any, right: Any, scale: Any) -> None:
    """Add `lora_utils.lora_delta` to some rows: `left` (rows, r), `right` (r, length).

    Two rows at once, for fewer trips to the caches, and four products at a time, which are added
    one after the other. The last of an odd number of rows is computed twice.
    """
    ranks, length = right.shape
    last = left.shape[0] - 1
    room = np.empty((2, TILE), np.float32)
    for start in range(0, length, TILE):
        size = min(TILE, length - start)
        sums, others = room[0, :size], room[1, :size]
        for i in range(0, last + 1, 2):
            other = min(i + 1, last)
            one, two = left[i], left[other]
            row = right[0, start : start + size]
            for j in range(size):
                sums[j] = one[0] * row[j]
                others[j] = two[0] * row[j]
            done = 1
            while done + 4 <= ranks:
                a_0, a_1, a_2, a_3 = one[done], one[done + 1], one[done + 2], one[done + 3]
                b_0, b_1, b_2, b_3 = two[done], two[done + 1], two[done + 2], two[done + 3]
                row_0 = right[done, start : start + size]
                row_1 = right[done + 1, start : start + size]
                row_2 = right[done + 2, start : start + size]
                row_3 = right[done + 3, start : start + size]
                for j in range(size):
                    sums[j] = (
                        ((sums[j] + a_0 * row_0[j]) + a_1 * row_1[j]) + a_2 * row_2[j]
                    ) + a_3 * row_3[j]
                    others[j] = (
                        ((others[j] + b_0 * row_0[j]) + b_1 * row_1[j]) + b_2 * row_2[j]
                    ) + b_3 * row_3[j]
                done += 4
            while done < ranks:
                row, by, by_other = right[done, start : start + size], one[done], two[done]
                for j in range(size):
                    sums[j] += by * row[j]
                    others[j] += by_other * row[j]
                done += 1
            result = values[i, start : start + size]
            for j in range(size):
                result[j] += sums[j] * scale
            if other > i:
                result = values[other, start : start + size]
                for j in range(size):
                    result[j] += others[j] * scale


@_kernel()
def _subtract(parts: Any, index: Any, start: Any, size: Any, base: Any, delta: Any) -> None:
    """`size` elements of an input's task vector from `start` on."""
    memory, place, kind = parts.memory, parts.places[index], parts.kinds[index]
    if kind == 2:
        half = memory[place + 2 * start : place + 2 * (start + size)].view(np.uint16)
        for j in range(size):
            delta[j] = _float(_U32(half[j]) << _U32(16)) - base[j]
        return
    _widen(parts, index, start, size, delta)
    for j in range(size):
        delta[j] -= base[j]


@_kernel()
def _round(values: Any, parts: Any, start: Any, size: Any) -> None:
    """Finish elements of the result, and write them, rounded to nearest even."""
    if parts.keep != _ONE:
        for j in range(size):
            values[j] *= parts.keep
    if parts.lowest != -_INFINITY or parts.highest != _INFINITY:
        for j in range(size):
            values[j] = min(max(values[j], parts.lowest), parts.highest)
    memory, place, kind = parts.memory, parts.places[-1], parts.kinds[-1]
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
def is_finite(parts: Any, index: Any, size: Any) -> Any:
    """Whether no exponent of an input (or the result, -1) is all ones."""
    memory, place, kind = parts.memory, parts.places[index], parts.kinds[index]
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


@_kernel(inline="always")  # else the compiler makes no vector instructions of the callers' loops
def _philox(counter: Any, key_0: Any, key_1: Any, key_high: Any, key_low: Any) -> Any:
    """Four words of `dare_utils.philox`; the product of the key and the first multiplier is given.

    Of a counter's four words three are 0, so each of the first two of the ten rounds has a product
    that is not needed: that of 0, and that of the key, which is the same for all counters.
    """
    high_0, low_0 = _multiply_wide(counter, _M0_LOW, _M0_HIGH)
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
    return word_0, word_1, word_2, word_3


@_kernel()
def _keep_bits(key_0: Any, key_1: Any, first: Any, limit: Any, kept: Any) -> None:
    """Of each of 64 counters, which of its 8 draws lie below the limit.

    The compiler makes vector instructions of this only while the count is a constant, and its
    widest ones because what is stored is narrow.
    """
    key_high, key_low = _multiply_wide(key_0, _M0_LOW, _M0_HIGH)
    for j in range(COUNTERS):
        word_0, word_1, word_2, word_3 = _philox(
            first + np.uint64(j), key_0, key_1, key_high, key_low
        )
        bits = _kept(word_0, limit) | _kept(word_1, limit) << np.uint64(2)
        bits |= _kept(word_2, limit) << np.uint64(4) | _kept(word_3, limit) << np.uint64(6)
        kept[j] = np.uint8(bits)


@_kernel()
def _drop(delta: Any, size: Any, key: Any, limit: Any, start: Any, kept: Any, flags: Any) -> None:
    """`dare_utils.drop` in place; `start` is the flat index of the first entry.

    `kept` has room for a byte per counter of a piece and `COUNTERS` more, `flags` for 8 times that.
    """
    if limit > _LOW:  # every draw is below
        return
    first, skip = start // 8 + 1, start % 8
    counters = (skip + size + 7) // 8
    for counter in range(0, counters, COUNTERS):
        _keep_bits(key[0], key[1], np.uint64(first + counter), limit, kept[counter:])
    octets = flags.view(np.uint64)
    for j in range(counters):
        octets[j] = np.uint64(kept[j]) * _REPEAT & _BIT_OF_BYTE
    flags = flags[skip : skip + size]
    for j in range(size):
        delta[j] = delta[j] if flags[j] != 0 else _ZERO


@_kernel()
def _draws(key_0: Any, key_1: Any, first: Any, words: Any) -> None:
    """The four words of each of 64 counters, as vector instructions like to store them."""
    key_high, key_low = _multiply_wide(key_0, _M0_LOW, _M0_HIGH)
    for j in range(COUNTERS):
        word_0, word_1, word_2, word_3 = _philox(
            first + np.uint64(j), key_0, key_1, key_high, key_low
        )
        words[j] = word_0
        words[COUNTERS + j] = word_1
        words[2 * COUNTERS + j] = word_2
        words[3 * COUNTERS + j] = word_3


@_kernel()
def _draw_row(key: Any, first: Any, size: Any, words: Any, draws: Any) -> None:
    """The draws of `size` elements from a flat index on; `draws` has room for 2**10 more."""
    skip = first % 8
    for start in range(0, size + skip, 8 * COUNTERS):
        _draws(key[0], key[1], np.uint64((first - skip + start) // 8 + 1), words)
        pairs = draws[start : start + 8 * COUNTERS].view(np.uint64)  # the low half is drawn first
        for j in range(COUNTERS):
            for k in range(4):
                pairs[4 * j + k] = words[k * COUNTERS + j]


@_kernel()
def _cut(delta: Any, size: Any, cut: Any, seen: Any) -> None:
    """`ties_utils.cut_apply` in place; counts the entries equal to the bounds that it has seen."""
    lower, upper = np.int32(cut[0]), np.int32(cut[3])
    bounded = upper != _MAGNITUDE
    low, high = np.int32(0), np.int32(0)
    for j in range(size):
        low += np.int32(_magnitude(delta[j]) == lower)
    if bounded:
        for j in range(size):
            high += np.int32(_magnitude(delta[j]) == upper)
    first, stop, until = cut[1] - seen[0], cut[2] - seen[0], cut[4] - seen[1]
    seen[0] += low
    seen[1] += high
    some_low = low > 0 and first < low and stop > 0 and not (first <= 0 and low <= stop)
    some_high = high > 0 and until > 0 and until < high
    if some_low or some_high:  # these are looked at one by one
        low_number, high_number = np.int64(0), np.int64(0)
        for j in range(size):
            magnitude, keeps = _magnitude(delta[j]), True
            if magnitude == lower:
                keeps = first <= low_number and low_number < stop
                low_number += 1
            if magnitude == upper:
                keeps = keeps and high_number < until
                high_number += 1
            delta[j] = delta[j] if keeps else _ZERO
    keeps_low = some_low or (first <= 0 and low <= stop)
    keeps_high = some_high or high <= until
    lowest = np.int32(lower - 1) if keeps_low and low > 0 else lower
    for j in range(size):
        delta[j] = delta[j] if _magnitude(delta[j]) > lowest else _ZERO
    if bounded:
        highest = np.int32(upper + 1) if keeps_high else upper
        for j in range(size):
            delta[j] = delta[j] if _magnitude(delta[j]) < highest else _ZERO


@_kernel()
def _sort_row(row: Any, size: Any, keys: Any, spare: Any, counts: Any) -> Any:
    """Magnitudes of a row in ascending order, each with its index in the lower half of a key.

    The sort is stable, so equal ones stay in order: the indices see to it. Of bfloat16 models the
    magnitudes have few bits, so hardly any entry has to move; nor do many in a row of float32.
    """
    highest = np.int32(0)
    for j in range(size):
        highest = max(highest, _magnitude(row[j]))
    lowest = (highest >> 16) - (_SORT_BINS - 1)
    bins = counts[:_SORT_BINS]
    bins[:] = 0
    for j in range(size):
        bins[_U32(max((_magnitude(row[j]) >> 16) - lowest, 0))] += 1
    place = _U32(0)
    for k in range(_SORT_BINS):
        count = bins[k]
        bins[k] = place
        place += count
    for j in range(size):
        magnitude = _magnitude(row[j])
        number = _U32(max((magnitude >> 16) - lowest, 0))
        keys[bins[number]] = np.uint64(magnitude) << _HALF | np.uint64(j)
        bins[number] += 1
    left = _MOVES * size
    for j in range(1, size):
        key, k = keys[j], j
        if keys[j - 1] <= key:
            continue
        while k > 0 and keys[k - 1] > key:
            keys[k] = keys[k - 1]
            k -= 1
        keys[k] = key
        left -= j - k
        if left < 0:
            return _sort_digits(keys, size, spare, counts)
    return keys


@_kernel()
def _sort_digits(keys: Any, size: Any, spare: Any, counts: Any) -> Any:
    """Sort keys whose lower halves, of equal upper halves, are in order already.

    Digits that all have in common are skipped.
    """
    for shift in _DIGITS:
        upper, places = np.uint64(shift + 32), counts[: 2**8]
        places[:] = 0
        for j in range(size):
            places[keys[j] >> upper & _DIGIT] += 1
        if places[keys[0] >> upper & _DIGIT] == size:
            continue
        place = _U32(0)
        for digit in range(2**8):
            count = places[digit]
            places[digit] = place
            place += count
        for j in range(size):
            key = keys[j]
            digit = key >> upper & _DIGIT
            spare[places[digit]] = key
            places[digit] += 1
        keys, spare = spare, keys
    return keys


@_kernel()
def _drop_row(row: Any, size: Any, keys: Any, draws: Any, limits: Any, factors: Any) -> None:
    """Drop entries of a row by rank, in place; `keys` are sorted.

    Whether an entry is kept is a toss of a coin that no processor foresees, so this has no branch.
    """
    for rank in range(size):
        j = keys[rank] & _LOW
        keeps = _U32(np.uint64(draws[j]) < limits[rank])
        row[j] = _float(_bits(row[j] * factors[rank]) & (_U32(0) - keeps))


@_kernel()
def _variance(deltas: Any, size: Any, variance: Any) -> None:
    """`sce_utils.variance` of a piece."""
    mean, squares = np.empty(PIECE, np.float64), np.empty(PIECE, np.float64)
    models = np.float64(len(deltas))
    for j in range(size):
        mean[j] = 0.0
        squares[j] = 0.0
    for i in range(len(deltas)):
        delta = deltas[i]
        for j in range(size):
            mean[j] += np.float64(delta[j])
    for j in range(size):
        mean[j] /= models
    for i in range(len(deltas)):
        delta = deltas[i]
        for j in range(size):
            apart = np.float64(delta[j]) - mean[j]
            squares[j] += apart * apart
    for j in range(size):
        variance[j] = np.float32(squares[j] / models)


@_kernel()
def _quantity(
    parts: Any, which: Any, start: Any, size: Any, base: Any, deltas: Any, scale: Any, values: Any
) -> None:
    """A piece of a model's task vector, scaled, or of the variance over all."""
    if which != VARIANCE:
        _subtract(parts, which + 1, start, size, base, values)
        if scale != _ONE:
            for j in range(size):
                values[j] *= scale
        return
    for i in range(len(deltas)):
        _subtract(parts, i + 1, start, size, base, deltas[i])
    _variance(deltas, size, values)


@_kernel()
def _vote(deltas: Any, offset: Any, size: Any, combining: Any, total: Any) -> None:
    """Sum of what the models vote with, of a piece that begins at an offset of `deltas`."""
    for j in range(size):
        total[j] = _ZERO
    for i in range(len(deltas)):
        delta, multiplier = deltas[i][offset : offset + size], combining.votes[i]
        if combining.election == BY_COUNT:
            for j in range(size):
                vote = delta[j] * multiplier
                total[j] += _ONE if vote > _ZERO else (-_ONE if vote < _ZERO else _ZERO)
        else:
            for j in range(size):
                total[j] += delta[j] * multiplier


@_kernel()
def _elect_and_combine(
    deltas: Any, offset: Any, size: Any, combining: Any, total: Any, signs: Any, shares: Any
) -> None:
    """`ties_utils.elect_and_combine` of a piece."""
    _vote(deltas, offset, size, combining, total)
    for j in range(size):
        sign = -_ONE if total[j] < _ZERO else _ONE
        signs[j] = sign if total[j] != _ZERO else combining.zero
        total[j] = _ZERO
        shares[j] = _ZERO
    for i in range(len(deltas)):
        delta = deltas[i][offset : offset + size]
        multiplier, weight, share = combining.votes[i], combining.weights[i], combining.shares[i]
        for j in range(size):
            value = delta[j]
            agrees = value * multiplier * signs[j] > _ZERO
            total[j] += value * weight if agrees else _ZERO
            shares[j] += share if agrees else _ZERO
    if combining.divides:
        for j in range(size):
            total[j] /= shares[j] if shares[j] != _ZERO else _ONE


@_kernel()
def _keep_consensus(
    parts: Any,
    start: Any,
    size: Any,
    base: Any,
    combining: Any,
    total: Any,
    delta: Any,
    count: Any,
) -> None:
    """`consensus_utils.keep_consensus` of a piece."""
    for j in range(size):
        count[j] = _ZERO
    for i in range(len(combining.mask_lambdas)):
        mask_lambda = combining.mask_lambdas[i]
        _subtract(parts, i + 1, start, size, base, delta)
        for j in range(size):
            matters = abs(delta[j]) > abs(total[j] - delta[j]) * mask_lambda
            count[j] += _ONE if matters else _ZERO
    for j in range(size):
        total[j] = total[j] if count[j] >= combining.agreement else _ZERO


@_kernel()
def _finish(
    parts: Any,
    start: Any,
    size: Any,
    base: Any,
    deltas: Any,
    offset: Any,
    combining: Any,
    spare: Any,
) -> None:
    """Combine a piece of sparse task vectors, scale it, add the base, write the result.

    `deltas` hold the piece from `offset` on; `spare` is room for three pieces.
    """
    total = spare[0]
    if combining.election == NO_ELECTION:
        for j in range(size):
            total[j] = _ZERO
        for i in range(len(deltas)):
            delta, weight = deltas[i][offset : offset + size], combining.weights[i]
            for j in range(size):
                total[j] += delta[j] * weight
        _divide(total, size, combining)
    else:
        _elect_and_combine(deltas, offset, size, combining, total, spare[1], spare[2])
    _add(parts, start, size, base, total, combining, spare)


@_kernel()
def _divide(total: Any, size: Any, combining: Any) -> None:
    """Divide a sum of task vectors by that of the weights, if that is wanted."""
    if combining.divides:
        for j in range(size):
            total[j] /= combining.divisor


@_kernel()
def _add(
    parts: Any, start: Any, size: Any, base: Any, total: Any, combining: Any, spare: Any
) -> None:
    """Keep the consensus of a piece's merged task vector, scale it, add the base, write it."""
    if len(combining.mask_lambdas) > 0:
        _keep_consensus(parts, start, size, base, combining, total, spare[1], spare[2])
    lam = combining.lam
    if lam != _ZERO:
        for j in range(size):
            base[j] += total[j] * lam
    _round(base, parts, start, size)


# Merging


@_kernel(fastmath={"contract"})  # a fused multiply-add, as in torch.addcmul
def linear(parts: Any, size: Any, weights: Any, divisor: Any) -> None:
    """`linear_utils.linear`."""
    values, total = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    for start in range(0, size, PIECE):
        n = min(PIECE, size - start)
        for j in range(n):
            total[j] = _ZERO
        for i in range(len(weights)):
            weight = weights[i]
            _widen(parts, i, start, n, values)
            for j in range(n):
                total[j] += values[j] * weight
        for j in range(n):
            total[j] /= divisor
        _round(total, parts, start, n)


@_kernel()
def combine(parts: Any, size: Any, coefficients: Any) -> None:
    """`linear_utils.combine`."""
    values, total = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    for start in range(0, size, PIECE):
        n = min(PIECE, size - start)
        for j in range(n):
            total[j] = _ZERO
        for i in range(len(coefficients)):
            coefficient = coefficients[i]
            _widen(parts, i, start, n, values)
            for j in range(n):
                total[j] += values[j] * coefficient
        _round(total, parts, start, n)


@_kernel()
def combine_rows(parts: Any, rows: Any, row_length: Any, coefficients: Any, of_deltas: Any) -> None:
    """`linear_utils.combine_rows` of the inputs, or of the task vectors, with the base added."""
    models, shift = coefficients.shape[1], 1 if of_deltas else 0
    base, values = np.zeros(PIECE, np.float32), np.empty(PIECE, np.float32)
    total = np.empty(PIECE, np.float32)
    for row in range(rows):
        for start in range(row * row_length, (row + 1) * row_length, PIECE):
            n = min(PIECE, (row + 1) * row_length - start)
            if of_deltas:
                _widen(parts, parts.zero, start, n, base)
            for j in range(n):
                total[j] = _ZERO
            for i in range(models):
                coefficient = coefficients[row, i]
                if of_deltas:
                    _subtract(parts, i + shift, start, n, base, values)
                else:
                    _widen(parts, i, start, n, values)
                for j in range(n):
                    total[j] += values[j] * coefficient
            if of_deltas:
                for j in range(n):
                    total[j] = base[j] + total[j]
            _round(total, parts, start, n)


@_kernel()
def scale(parts: Any, size: Any, factor: Any) -> None:
    """`linear_utils.scale`."""
    values = np.empty(PIECE, np.float32)
    for start in range(0, size, PIECE):
        n = min(PIECE, size - start)
        _widen(parts, parts.zero, start, n, values)
        for j in range(n):
            values[j] *= factor
        _round(values, parts, start, n)


@_kernel()
def nearswap(parts: Any, size: Any, t: Any) -> None:
    """`linear_utils.nearswap`."""
    base, values = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    smallest = np.float32(1e-6)
    for start in range(0, size, PIECE):
        n = min(PIECE, size - start)
        _widen(parts, parts.zero, start, n, base)
        _widen(parts, parts.zero + 1, start, n, values)
        for j in range(n):
            share = min(_ONE / max(abs(base[j] - values[j]), smallest) * t, _ONE)
            values[j] = share * values[j] + (_ONE - share) * base[j]
        _round(values, parts, start, n)


@_kernel()
def fuse(parts: Any, rows: Any, row_length: Any, divergence: Any, threshold: Any) -> None:
    """`arcee_fusion_utils.fuse`."""
    base, values = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    for row in range(rows):
        for start in range(row * row_length, (row + 1) * row_length, PIECE):
            n = min(PIECE, (row + 1) * row_length - start)
            _widen(parts, parts.zero, start, n, base)
            _widen(parts, parts.zero + 1, start, n, values)
            for j in range(n):
                score = abs(values[j] - base[j]) * divergence[row]
                values[j] = values[j] if score >= threshold else base[j]
            _round(values, parts, start, n)


@_kernel()
def merge_active(parts: Any, size: Any, epsilon: Any, factors: Any, lam: Any) -> None:
    """`ram_utils.merge_active`, scaled and added to the base."""
    base, delta = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    total, alone = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    count = np.empty(PIECE, np.float32)
    for start in range(0, size, PIECE):
        n = min(PIECE, size - start)
        _widen(parts, parts.zero, start, n, base)
        for j in range(n):
            total[j] = _ZERO
            alone[j] = _ZERO
            count[j] = _ZERO
        for i in range(len(factors)):
            factor = factors[i]
            _subtract(parts, i + 1, start, n, base, delta)
            for j in range(n):
                own = delta[j] if abs(delta[j]) > epsilon else _ZERO
                total[j] += own
                alone[j] += own * factor
                count[j] += _ONE if abs(delta[j]) > epsilon else _ZERO
        for j in range(n):
            mean = total[j] / max(count[j], _ONE)
            total[j] = alone[j] if count[j] == _ONE else mean
        if lam != _ZERO:
            for j in range(n):
                base[j] += total[j] * lam
        _round(base, parts, start, n)


@_kernel()
def _add_delta(
    parts: Any, index: Any, start: Any, size: Any, base: Any, weight: Any, total: Any, delta: Any
) -> None:
    """Add a piece of an input's task vector to the total."""
    memory, place, kind = parts.memory, parts.places[index], parts.kinds[index]
    if kind == 2:
        half = memory[place + 2 * start : place + 2 * (start + size)].view(np.uint16)
        for j in range(size):
            total[j] += (_float(_U32(half[j]) << _U32(16)) - base[j]) * weight
        return
    _subtract(parts, index, start, size, base, delta)
    for j in range(size):
        total[j] += delta[j] * weight


@_kernel()
def merge_sum(parts: Any, size: Any, combining: Any) -> None:
    """Add up task vectors as they are, without an election."""
    base, spare = np.empty(PIECE, np.float32), np.empty((3, PIECE), np.float32)
    total = spare[0]
    for start in range(0, size, PIECE):
        n = min(PIECE, size - start)
        _widen(parts, parts.zero, start, n, base)
        for j in range(n):
            total[j] = _ZERO
        for i in range(len(combining.weights)):
            _add_delta(parts, i + 1, start, n, base, combining.weights[i], total, spare[1])
        _divide(total, n, combining)
        _add(parts, start, n, base, total, combining, spare)


@_kernel()
def merge_whole(parts: Any, size: Any, combining: Any) -> None:
    """Merge task vectors as they are, by an election."""
    base, spare = np.empty(PIECE, np.float32), np.empty((3, PIECE), np.float32)
    deltas = np.empty((len(combining.weights), PIECE), np.float32)
    for start in range(0, size, PIECE):
        n = min(PIECE, size - start)
        _widen(parts, parts.zero, start, n, base)
        for i in range(len(deltas)):
            _subtract(parts, i + 1, start, n, base, deltas[i])
        _finish(parts, start, n, base, deltas, parts.zero, combining, spare)


@_kernel()
def merge_cut(
    parts: Any, size: Any, stretch: Any, cuts: Any, seen: Any, factors: Any, combining: Any
) -> None:
    """Merge what cuts keep.

    They hold for stretches of the block, such as its rows: cuts (stretches, models, 5), seen
    (stretches, models, 2).
    """
    base, spare = np.empty(PIECE, np.float32), np.empty((3, PIECE), np.float32)
    deltas = np.empty((len(combining.weights), PIECE), np.float32)
    for number in range(size // stretch):
        for start in range(number * stretch, (number + 1) * stretch, PIECE):
            n = min(PIECE, (number + 1) * stretch - start)
            _widen(parts, parts.zero, start, n, base)
            for i in range(len(deltas)):
                delta, factor = deltas[i], factors[i]
                _subtract(parts, i + 1, start, n, base, delta)
                _cut(delta, n, cuts[number, i], seen[number, i])
                if factor != _ONE:
                    for j in range(n):
                        delta[j] *= factor
            _finish(parts, start, n, base, deltas, parts.zero, combining, spare)


@_kernel()
def merge_dropped(
    parts: Any, size: Any, first: Any, keys: Any, limits: Any, factors: Any, combining: Any
) -> None:
    """Merge what is kept at random; `first` is the flat index of the block's first element."""
    base, spare = np.empty(PIECE, np.float32), np.empty((3, PIECE), np.float32)
    deltas = np.empty((len(combining.weights), PIECE), np.float32)
    kept = np.empty(PIECE // 8 + COUNTERS, np.uint8)
    flags = np.empty(8 * len(kept), np.uint8)
    for start in range(0, size, PIECE):
        n = min(PIECE, size - start)
        _widen(parts, parts.zero, start, n, base)
        for i in range(len(deltas)):
            delta, factor = deltas[i], factors[i]
            _subtract(parts, i + 1, start, n, base, delta)
            _drop(delta, n, keys[i], limits[i], first + start, kept, flags)
            for j in range(n):
                delta[j] *= factor
        _finish(parts, start, n, base, deltas, parts.zero, combining, spare)


@_kernel()
def _ranked_row(
    parts: Any,
    model: Any,
    row: Any,
    size: Any,
    base: Any,
    delta: Any,
    first: Any,
    key: Any,
    limits: Any,
    factors: Any,
    keys: Any,
    counts: Any,
    words: Any,
    draws: Any,
) -> None:
    """A row of a task vector without what is dropped by rank."""
    for start in range(0, size, PIECE):
        n = min(PIECE, size - start)
        place = row * size + start
        _subtract(parts, model + 1, place, n, base[start:], delta[start:])
    if limits[0] == limits[-1] and limits[0] > _LOW:  # every draw is below
        return
    _draw_row(key, first + row * size, size, words, draws)
    ordered = _sort_row(delta, size, keys[0], keys[1], counts)
    _drop_row(delta, size, ordered, draws[(first + row * size) % 8 :], limits, factors)


@_kernel()
def merge_ranked(
    parts: Any,
    rows: Any,
    row_length: Any,
    first: Any,
    keys: Any,
    limits: Any,
    rank_factors: Any,
    factors: Any,
    combining: Any,
) -> None:
    """Merge what is kept at random by rank in the row: limits and rank factors (models, ranks)."""
    models = len(combining.weights)
    base, spare = np.empty(row_length, np.float32), np.empty((3, PIECE), np.float32)
    deltas = np.empty((models, row_length), np.float32)
    sorting, counts = np.empty((2, row_length), np.uint64), np.empty(_SORT_BINS, np.uint32)
    words = np.empty(4 * COUNTERS, np.uint64)
    draws = np.empty(row_length + 16 * COUNTERS, np.uint32)
    for row in range(rows):
        for start in range(0, row_length, PIECE):
            n = min(PIECE, row_length - start)
            _widen(parts, parts.zero, row * row_length + start, n, base[start:])
        for i in range(models):
            _ranked_row(
                parts, i, row, row_length, base, deltas[i], first, keys[i], limits[i],
                rank_factors[i], sorting, counts, words, draws,
            )  # fmt: skip
            delta, factor = deltas[i], factors[i]
            if factor != _ONE:
                for j in range(row_length):
                    delta[j] *= factor
        for start in range(0, row_length, PIECE):
            n = min(PIECE, row_length - start)
            place = row * row_length + start
            _finish(parts, place, n, base[start:], deltas, start, combining, spare)


@_kernel()
def _select(
    parts: Any, start: Any, size: Any, base: Any, deltas: Any, cut: Any, seen: Any, spread: Any
) -> None:
    """A piece of all task vectors, without the entries that are not selected by their variance."""
    for i in range(len(deltas)):
        _subtract(parts, i + 1, start, size, base, deltas[i])
    _variance(deltas, size, spread)
    # A mark tells a selected variance of 0 from one that is not: cuts go by bits, and 0 is least.
    lower, equal = np.int32(cut[0]), np.int32(0)
    for j in range(size):
        equal += np.int32(_magnitude(spread[j]) == lower)
    first, stop = cut[1] - seen[0], cut[2] - seen[0]
    seen[0] += equal
    if equal > 0 and first < equal and stop > 0 and not (first <= 0 and equal <= stop):
        number = np.int64(0)  # some of the equal ones: these are looked at one by one
        for j in range(size):
            bits = _magnitude(spread[j])
            keeps = bits > lower or (bits == lower and first <= number and number < stop)
            number += np.int64(bits == lower)
            spread[j] = _ONE if keeps else _ZERO
    else:
        lowest = np.int32(lower - 1) if equal > 0 and first <= 0 and equal <= stop else lower
        for j in range(size):
            spread[j] = _ONE if _magnitude(spread[j]) > lowest else _ZERO
    for i in range(len(deltas)):
        delta = deltas[i]
        for j in range(size):
            delta[j] = delta[j] if spread[j] != _ZERO else _ZERO


@_kernel()
def merge_selected(parts: Any, size: Any, cut: Any, seen: Any, combining: Any) -> None:
    """Merge the entries whose variance a cut keeps."""
    base, spare = np.empty(PIECE, np.float32), np.empty((3, PIECE), np.float32)
    deltas, spread = (
        np.empty((len(combining.weights), PIECE), np.float32),
        np.empty(PIECE, np.float32),
    )
    for start in range(0, size, PIECE):
        n = min(PIECE, size - start)
        _widen(parts, parts.zero, start, n, base)
        _select(parts, start, n, base, deltas, cut, seen, spread)
        _finish(parts, start, n, base, deltas, parts.zero, combining, spare)


# Gathering


@_kernel()
def _sum_lanes(lanes: Any) -> Any:
    """Add the upper half of the lanes to the lower, until one is left."""
    count = LANES
    while count > 1:
        count //= 2
        upper = lanes[count:]
        for j in range(count):
            lanes[j] += upper[j]
    return lanes[0]


@_kernel(fastmath={"contract"}, forceinline=True)  # exact products: fused or not, the same sum
def _add_stride(left: Any, right: Any, lanes: Any) -> None:
    """Add the products of two strides to the lanes."""
    left_1, left_2, left_3 = left[LANES:], left[2 * LANES :], left[3 * LANES :]
    right_1, right_2, right_3 = right[LANES:], right[2 * LANES :], right[3 * LANES :]
    for j in range(LANES):
        total = lanes[j] + np.float64(left[j]) * np.float64(right[j])
        total += np.float64(left_1[j]) * np.float64(right_1[j])
        total += np.float64(left_2[j]) * np.float64(right_2[j])
        lanes[j] = total + np.float64(left_3[j]) * np.float64(right_3[j])


@_kernel(fastmath={"contract"}, forceinline=True)  # as above
def _add_products(left: Any, right: Any, size: Any, lanes: Any) -> None:
    """Add the products of two pieces to the lanes."""
    whole = size - size % STRIDE
    for start in range(0, whole, STRIDE):
        _add_stride(left[start:], right[start:], lanes)
    for start in range(whole, size, LANES):
        left_part, right_part = left[start:size], right[start:size]
        for j in range(min(LANES, size - start)):
            lanes[j] += np.float64(left_part[j]) * np.float64(right_part[j])


@_kernel()
def _add_powers(delta: Any, size: Any, power: Any, lanes: Any) -> None:
    """As `_add_products`, of |delta| ** power; power 1 or 2."""
    if power == 2:
        _add_products(delta, delta, size, lanes)
        return
    for start in range(0, size, LANES):
        part = delta[start:size]
        for j in range(min(LANES, size - start)):
            lanes[j] += np.float64(abs(part[j]))


@_kernel()
def gram_parts(
    parts: Any, rows: Any, row_length: Any, models: Any, of_deltas: Any, sums: Any
) -> None:
    """`slerp_utils.gram_parts` of the first inputs or task vectors: shape (pairs, rows * runs)."""
    base, values = np.empty(PIECE, np.float32), np.empty((models, PIECE), np.float32)
    lanes = np.empty((len(sums), LANES), np.float64)
    number = 0
    for row in range(rows):
        for run in range(row * row_length, (row + 1) * row_length, RUN):
            stop = min(run + RUN, (row + 1) * row_length)
            lanes[:] = 0.0
            for start in range(run, stop, PIECE):
                n = min(PIECE, stop - start)
                if of_deltas:
                    _widen(parts, parts.zero, start, n, base)
                for i in range(models):
                    if of_deltas:
                        _subtract(parts, i + 1, start, n, base, values[i])
                    else:
                        _widen(parts, i, start, n, values[i])
                pair = 0
                for i in range(models):
                    for k in range(i, models):
                        _add_products(values[i], values[k], n, lanes[pair])
                        pair += 1
            for pair in range(len(sums)):
                sums[pair, number] = _sum_lanes(lanes[pair])
            number += 1


@_kernel()
def norms_cut(
    parts: Any, rows: Any, row_length: Any, power: Any, cuts: Any, seen: Any, sums: Any
) -> None:
    """Run sums of |delta| ** power of each task vector, then of what its cut keeps."""
    models = len(cuts)
    base, delta = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    lanes = np.empty((2 * models, LANES), np.float64)
    number = 0
    for row in range(rows):
        for run in range(row * row_length, (row + 1) * row_length, RUN):
            stop = min(run + RUN, (row + 1) * row_length)
            lanes[:] = 0.0
            for start in range(run, stop, PIECE):
                n = min(PIECE, stop - start)
                _widen(parts, parts.zero, start, n, base)
                for i in range(models):
                    _subtract(parts, i + 1, start, n, base, delta)
                    _add_powers(delta, n, power, lanes[i])
                    _cut(delta, n, cuts[i], seen[i])
                    _add_powers(delta, n, power, lanes[models + i])
            for i in range(2 * models):
                sums[i, number] = _sum_lanes(lanes[i])
            number += 1


@_kernel()
def norms_dropped(
    parts: Any,
    rows: Any,
    row_length: Any,
    power: Any,
    first: Any,
    keys: Any,
    limits: Any,
    sums: Any,
) -> None:
    """Run sums of |delta| ** power of each task vector, then of what is kept at random."""
    models = len(keys)
    base, delta = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    kept = np.empty(PIECE // 8 + COUNTERS, np.uint8)
    flags = np.empty(8 * len(kept), np.uint8)
    lanes = np.empty((2 * models, LANES), np.float64)
    number = 0
    for row in range(rows):
        for run in range(row * row_length, (row + 1) * row_length, RUN):
            stop = min(run + RUN, (row + 1) * row_length)
            lanes[:] = 0.0
            for start in range(run, stop, PIECE):
                n = min(PIECE, stop - start)
                _widen(parts, parts.zero, start, n, base)
                for i in range(models):
                    _subtract(parts, i + 1, start, n, base, delta)
                    _add_powers(delta, n, power, lanes[i])
                    _drop(delta, n, keys[i], limits[i], first + start, kept, flags)
                    _add_powers(delta, n, power, lanes[models + i])
            for i in range(2 * models):
                sums[i, number] = _sum_lanes(lanes[i])
            number += 1


@_kernel()
def norms_ranked(
    parts: Any,
    rows: Any,
    row_length: Any,
    power: Any,
    first: Any,
    keys: Any,
    limits: Any,
    rank_factors: Any,
    sums: Any,
) -> None:
    """Run sums of |delta| ** power of each task vector, then of what is kept by rank."""
    models = len(keys)
    base, delta = np.empty(row_length, np.float32), np.empty(row_length, np.float32)
    sorting, counts = np.empty((2, row_length), np.uint64), np.empty(_SORT_BINS, np.uint32)
    words = np.empty(4 * COUNTERS, np.uint64)
    draws = np.empty(row_length + 16 * COUNTERS, np.uint32)
    lanes = np.empty(LANES, np.float64)
    runs = -(-row_length // RUN)
    for row in range(rows):
        for start in range(0, row_length, PIECE):
            n = min(PIECE, row_length - start)
            _widen(parts, parts.zero, row * row_length + start, n, base[start:])
        for i in range(2 * models):
            model = i % models
            if i < models:
                for start in range(0, row_length, PIECE):
                    n = min(PIECE, row_length - start)
                    place = row * row_length + start
                    _subtract(parts, model + 1, place, n, base[start:], delta[start:])
            else:
                _ranked_row(
                    parts, model, row, row_length, base, delta, first, keys[model], limits[model],
                    rank_factors[model], sorting, counts, words, draws,
                )  # fmt: skip
            for run in range(runs):
                stop = min((run + 1) * RUN, row_length)
                lanes[:] = 0.0
                for start in range(run * RUN, stop, PIECE):
                    n = min(PIECE, stop - start)
                    _add_powers(delta[start:], n, power, lanes)
                sums[i, row * runs + run] = _sum_lanes(lanes)


@_kernel()
def norms_selected(
    parts: Any, rows: Any, row_length: Any, power: Any, cut: Any, seen: Any, sums: Any
) -> None:
    """Run sums of |delta| ** power of each task vector, then of its selected entries."""
    models = len(sums) // 2
    base, spread = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    deltas = np.empty((models, PIECE), np.float32)
    lanes = np.empty((2 * models, LANES), np.float64)
    number = 0
    for row in range(rows):
        for run in range(row * row_length, (row + 1) * row_length, RUN):
            stop = min(run + RUN, (row + 1) * row_length)
            lanes[:] = 0.0
            for start in range(run, stop, PIECE):
                n = min(PIECE, stop - start)
                _widen(parts, parts.zero, start, n, base)
                for i in range(models):
                    _subtract(parts, i + 1, start, n, base, deltas[i])
                    _add_powers(deltas[i], n, power, lanes[i])
                _select(parts, start, n, base, deltas, cut, seen, spread)
                for i in range(models):
                    _add_powers(deltas[i], n, power, lanes[models + i])
            for i in range(2 * models):
                sums[i, number] = _sum_lanes(lanes[i])
            number += 1


@_kernel()
def count_active(parts: Any, size: Any, epsilon: Any, counts: Any) -> None:
    """`ram_utils.count_active`."""
    models = len(counts)
    base, deltas = np.empty(PIECE, np.float32), np.empty((models, PIECE), np.float32)
    number = np.empty(PIECE, np.int32)
    for start in range(0, size, PIECE):
        n = min(PIECE, size - start)
        _widen(parts, parts.zero, start, n, base)
        for j in range(n):
            number[j] = 0
        for i in range(models):
            delta = deltas[i]
            _subtract(parts, i + 1, start, n, base, delta)
            for j in range(n):
                number[j] += np.int32(abs(delta[j]) > epsilon)
        for i in range(models):
            delta, shared, alone = deltas[i], np.int32(0), np.int32(0)
            for j in range(n):
                shared += np.int32(abs(delta[j]) > epsilon and number[j] > 1)
                alone += np.int32(abs(delta[j]) > epsilon and number[j] == 1)
            counts[i, 0] += shared
            counts[i, 1] += alone


@_kernel()
def count_conflicts(parts: Any, size: Any, thresholds: Any, counts: Any) -> None:
    """`ties_utils.count_conflicts` of the task vectors, above a magnitude's bits each."""
    models = len(thresholds)
    base, deltas = np.empty(PIECE, np.float32), np.empty((models, PIECE), np.float32)
    for start in range(0, size, PIECE):
        n = min(PIECE, size - start)
        _widen(parts, parts.zero, start, n, base)
        for i in range(models):
            delta, threshold = deltas[i], thresholds[i]
            _subtract(parts, i + 1, start, n, base, delta)
            for j in range(n):
                sign = _ONE if delta[j] > _ZERO else -_ONE
                delta[j] = sign if _magnitude(delta[j]) > threshold else _ZERO
        for j in range(n):
            base[j] = _ZERO
        row = 0
        for i in range(models):
            for k in range(i, models):
                left, right = deltas[i], deltas[k]
                both, apart = np.int32(0), np.int32(0)
                for j in range(n):
                    product = left[j] * right[j]
                    both += np.int32(product != _ZERO)
                    apart += np.int32(product < _ZERO)
                counts[row, 0] += both
                counts[row, 1] += apart
                row += 1
        # One bit for each sign that an entry has.
        signs, some, mixed = base, np.int32(0), np.int32(0)
        for i in range(models):
            delta = deltas[i]
            for j in range(n):
                bit = _ONE if delta[j] > _ZERO else np.float32(2)
                has = signs[j] == bit or signs[j] == np.float32(3)
                signs[j] += bit if delta[j] != _ZERO and not has else _ZERO
        for j in range(n):
            some += np.int32(signs[j] != _ZERO)
            mixed += np.int32(signs[j] == np.float32(3))
        counts[row, 0] += some
        counts[row, 1] += mixed


@_kernel()
def sum_signs(parts: Any, size: Any, stretch: Any, cuts: Any, seen: Any, combining: Any) -> Any:
    """Sum of the signs elected from what cuts keep; see `merge_cut`."""
    base, total = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    deltas = np.empty((len(combining.weights), PIECE), np.float32)
    summed = np.int64(0)
    for number in range(size // stretch):
        for start in range(number * stretch, (number + 1) * stretch, PIECE):
            n = min(PIECE, (number + 1) * stretch - start)
            _widen(parts, parts.zero, start, n, base)
            for i in range(len(deltas)):
                _subtract(parts, i + 1, start, n, base, deltas[i])
                _cut(deltas[i], n, cuts[number, i], seen[number, i])
            _vote(deltas, parts.zero, n, combining, total)
            for j in range(n):
                summed += np.int64(total[j] > _ZERO) - np.int64(total[j] < _ZERO)
    return summed


@_kernel()
def coarse_histograms(
    parts: Any, size: Any, stretch: Any, scales: Any, which: Any, counts: Any
) -> None:
    """`ties_utils.coarse_histogram` of some quantities.

    Task vectors are scaled, each stretch of the block by a number of its own.
    """
    base, values = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    deltas = np.empty((len(parts.places) - 2, PIECE), np.float32)
    for number in range(size // stretch):
        for start in range(number * stretch, (number + 1) * stretch, PIECE):
            n = min(PIECE, (number + 1) * stretch - start)
            _widen(parts, parts.zero, start, n, base)
            for k in range(len(which)):
                _quantity(parts, which[k], start, n, base, deltas, scales[number], values)
                bins = counts[k]
                for j in range(n):
                    bins[_magnitude(values[j]) >> 16] += 1


@_kernel()
def fine_histograms(
    parts: Any,
    size: Any,
    stretch: Any,
    scales: Any,
    which: Any,
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
    base, values = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    deltas = np.empty((len(parts.places) - 2, PIECE), np.float32)
    position = np.empty(PIECE, np.uint32)
    count = _U32(bins.shape[1])
    for number in range(size // stretch):
        for start in range(number * stretch, (number + 1) * stretch, PIECE):
            n = min(PIECE, (number + 1) * stretch - start)
            _widen(parts, parts.zero, start, n, base)
            for k in range(len(which)):
                _quantity(parts, which[k], start, n, base, deltas, scales[number], values)
                found, guess, lowest = bins[k], guesses[k], windows[k]
                guessed, highest = _U32(guess - lowest), np.int32(lowest + count - 1)
                beyond, over, equal = np.int32(0), np.int32(0), np.int32(0)
                for j in range(n):
                    magnitude = _magnitude(values[j])
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
def count_around(
    parts: Any, size: Any, stretch: Any, scales: Any, which: Any, thresholds: Any, counts: Any
) -> None:
    """How many entries of some quantities lie above a magnitude's bits, and at it."""
    base, values = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    deltas = np.empty((len(parts.places) - 2, PIECE), np.float32)
    for number in range(size // stretch):
        for start in range(number * stretch, (number + 1) * stretch, PIECE):
            n = min(PIECE, (number + 1) * stretch - start)
            _widen(parts, parts.zero, start, n, base)
            for k in range(len(which)):
                _quantity(parts, which[k], start, n, base, deltas, scales[number], values)
                threshold, above, tied = thresholds[k], np.int32(0), np.int32(0)
                for j in range(n):
                    above += np.int32(_magnitude(values[j]) > threshold)
                    tied += np.int32(_magnitude(values[j]) == threshold)
                counts[k, 0] += above
                counts[k, 1] += tied


@_kernel()
def row_thresholds(
    parts: Any, rows: Any, row_length: Any, ranks: Any, thresholds: Any, ties: Any, tied: Any
) -> None:
    """The threshold of every row of every task vector, how many of the equal entries belong to
    the rank, and how many there are: (rows, models) each.

    As `ties_utils.rank_threshold`, by histograms of fewer bits each: a row is short, and lies in
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
                tied[row, i] = 0
                continue
            for start in range(0, row_length, PIECE):
                n = min(PIECE, row_length - start)
                place = row * row_length + start
                _widen(parts, parts.zero, place, n, base)
                _subtract(parts, i + 1, place, n, base, delta)
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
            tied[row, i] = count


@_kernel()
def _keep_bin(magnitudes: Any, count: Any, upper: Any, shift: Any) -> Any:
    """Move the magnitudes with these upper bits to the front; how many they are."""
    kept = 0
    for j in range(count):
        magnitudes[kept] = magnitudes[j]
        kept += (magnitudes[j] >> shift) == upper
    return kept


@_kernel()
def select_bin(counts: Any, rank: Any) -> Any:
    """`ties_utils.select_bin`."""
    above = 0
    position = len(counts) - 1
    while above + counts[position] < rank:
        above += counts[position]
        position -= 1
    return position, above
