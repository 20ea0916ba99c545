"""Rows of several models at once, brought to the rows of the merged vocabulary.

What `model_row_maps` decides is carried out here, for any range of rows: so a merge stays a
stream of blocks, whatever the models' vocabularies look like.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from model_safetensors import DTYPE_NAMES, FLOAT_DTYPES, TensorInfo, widen
from model_vocabulary import MISSING, Piece, RowMap

if TYPE_CHECKING:
    from torch import Tensor

MEAN_ROWS = 64
"""Rows added up at once for a mean; fixed, so that the mean does not depend on the blocks."""


class Rows(Protocol):
    """Where rows come from; a `ModelFolder` is one."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of every tensor, by name."""

    def read_rows(
        self, name: str, first: int, stop: int, buffer: NDArray[np.uint8]
    ) -> NDArray[Any]:
        """Rows of a tensor as stored; see `ModelFolder.read_rows`."""


COMPARED_ROWS = 1024
"""Rows that are compared at once."""


def float_rows(source: Rows, name: str, first: int, stop: int) -> NDArray[np.float32]:
    """Rows of a tensor, in float32: shape (stop - first, row length)."""
    info = source.tensors[name]
    length = info.numel // max(1, info.shape[0] if len(info.shape) > 1 else 1)
    size = (stop - first) * length * FLOAT_DTYPES[info.dtype].itemsize
    return widen(source.read_rows(name, first, stop, np.empty(size, np.uint8)), info.dtype)


def same_values(one: Rows, name: str, other: Rows, its_name: str) -> bool:
    """Whether two tensors have one shape and the same values; NaN is not the same as NaN."""
    shape = one.tensors[name].shape
    if other.tensors[its_name].shape != shape:
        return False
    rows = shape[0] if len(shape) > 1 else 1
    for first in range(0, rows, COMPARED_ROWS):
        stop = min(first + COMPARED_ROWS, rows)
        mine, theirs = float_rows(one, name, first, stop), float_rows(other, its_name, first, stop)
        if not np.array_equal(mine, theirs):
            return False
    return True


class MappedRows:
    """One tensor with a row per token, of several models; safe to read from several threads.

    Args:
        sources: the models.
        names: what each calls the tensor.
        row_map: which of their rows feeds which row of the result.
        wanted: the models whose rows are read; by default all of them. What these lack may still
            come from others.
    """

    def __init__(
        self,
        sources: Sequence[Rows],
        names: Sequence[str],
        row_map: RowMap,
        wanted: Sequence[int] | None = None,
    ) -> None:
        self._sources = sources
        self._names = names
        self._map = row_map
        self._wanted = [*range(len(names))] if wanted is None else [*wanted]
        self._givers = _givers(row_map)
        self._means: dict[int, NDArray[np.float32]] = {}
        self._lock = threading.Lock()

    def read(self, first: int, stop: int, targets: Sequence[NDArray[np.float32]]) -> None:
        """Rows `first` to `stop` of the result's vocabulary, of every model that is wanted.

        Args:
            first, stop: rows of the merged vocabulary.
            targets: for each of these models (stop - first, row length), to be filled.
        """
        rows, givers = self._map.rows[:, first:stop], self._givers[first:stop]
        for model, values in zip(self._wanted, targets, strict=True):
            self._read_own_rows(model, rows[model], values)
        lacking = rows[self._wanted] == MISSING
        for index, values in enumerate(targets):
            for giver in np.unique(givers[lacking[index]]).tolist():
                places = lacking[index] & (givers == giver)
                if giver in self._wanted:
                    values[places] = targets[self._wanted.index(giver)][places]
                elif giver != MISSING:
                    self._read_own_rows(giver, np.where(places, rows[giver], MISSING), values)
        for place in np.flatnonzero(lacking.any(axis=0) & (givers == MISSING)).tolist():
            pieces = self._map.fills[first + place]
            shared = None if pieces is None else self._sum(pieces)
            for index in np.flatnonzero(lacking[:, place]).tolist():
                mean = self._mean(self._wanted[index]) if shared is None else shared
                targets[index][place] = mean

    def _read_own_rows(
        self, model: int, rows: NDArray[np.int64], values: NDArray[np.float32]
    ) -> None:
        """Some rows of a model; where `rows` is `MISSING`, values stay as they are."""
        for position, begin, end in runs(rows):
            values[position : position + end - begin] = self._own(model, begin, end)

    def _own(self, model: int, begin: int, end: int) -> NDArray[np.float32]:
        """Consecutive rows of one model."""
        name, source = self._names[model], self._sources[model]
        info = source.tensors[name]
        size = (end - begin) * info.shape[1] * FLOAT_DTYPES[info.dtype].itemsize
        return widen(source.read_rows(name, begin, end, np.empty(size, np.uint8)), info.dtype)

    def _sum(self, pieces: Sequence[Piece]) -> NDArray[np.float32]:
        """A sum of rows, in float64, rounded once to float32."""
        total = np.zeros(self._sources[0].tensors[self._names[0]].shape[1], dtype=np.float64)
        for model, row, share in pieces:
            total += share * self._own(model, row, row + 1)[0].astype(np.float64)
        return total.astype(np.float32)

    def _mean(self, model: int) -> NDArray[np.float32]:
        """The mean of a model's rows that are in the result."""
        with self._lock:
            if model not in self._means:
                own = self._map.rows[model]
                kept = np.unique(own[own != MISSING])
                total = np.zeros(self._sources[model].tensors[self._names[model]].shape[1])
                for start in range(0, len(kept), MEAN_ROWS):
                    for _, begin, end in runs(kept[start : start + MEAN_ROWS]):
                        total += self._own(model, begin, end).sum(axis=0, dtype=np.float64)
                self._means[model] = (total / max(1, len(kept))).astype(np.float32)
            return self._means[model]


def _givers(row_map: RowMap) -> NDArray[np.int64]:
    """By merged row, the model whose own row is what the others get; `MISSING` where none is."""
    givers = np.full(row_map.rows.shape[1], MISSING, dtype=np.int64)
    for row, pieces in row_map.fills.items():
        if pieces and len(pieces) == 1:
            model, own, share = pieces[0]
            if share == 1.0 and row_map.rows[model, row] == own:
                givers[row] = model
    return givers


class TensorRows:
    """Matrices in memory as a source of rows."""

    def __init__(self, tensors: "Mapping[str, Tensor]") -> None:
        self._values = tensors
        self.tensors = {
            name: TensorInfo(dtype_name(tensor), tuple(tensor.shape))
            for name, tensor in tensors.items()
        }

    def read_rows(
        self, name: str, first: int, stop: int, buffer: NDArray[np.uint8]
    ) -> NDArray[Any]:
        """As `ModelFolder.read_rows`: the rows lie in `buffer` afterwards."""
        import torch

        rows = self._values[name][first:stop]
        stored = rows.cpu().contiguous().view(torch.uint8).numpy()
        target = buffer[: stored.size]
        target[:] = stored.reshape(-1)
        return target.view(FLOAT_DTYPES[self.tensors[name].dtype]).reshape(tuple(rows.shape))


def dtype_name(tensor: "Tensor") -> str:
    """A tensor's dtype under its safetensors name; one that cannot be merged as torch calls it."""
    return DTYPE_NAMES.get(str(tensor.dtype).removeprefix("torch."), str(tensor.dtype))


def runs(rows: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """Where consecutive rows stand: (position, first row, row after the last).

    >>> list(runs(np.array([7, 8, MISSING, 3])))
    [(0, 7, 9), (3, 3, 4)]
    """
    steps = np.flatnonzero(np.diff(rows) != 1) + 1
    for begin, end in zip([0, *steps.tolist()], [*steps.tolist(), len(rows)], strict=True):
        # MISSING is -1, so that a run may seem to start with it: -1, 0, 1
        skip = int(end > begin and rows[begin] == MISSING)
        if end - begin > skip:
            first = int(rows[begin + skip])
            yield begin + skip, first, first + end - begin - skip
