"""Rows of several models at once, brought to the rows of the merged vocabulary.

What `model_row_maps` decides is carried out here, for any range of rows: so a merge stays a
stream of blocks, whatever the models' vocabularies look like.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_safetensors import FLOAT_DTYPES, TensorInfo
from model_vocabulary import MISSING, Piece, RowMap

MEAN_ROWS = 64
"""Rows added up at once for a mean; fixed, so that the mean does not depend on the blocks."""


class Rows(Protocol):
    """Where rows come from; a `ModelFolder` is one."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of every tensor, by name."""

    def read_rows(self, name: str, first: int, stop: int, buffer: Tensor) -> Tensor:
        """Rows of a tensor as stored; see `ModelFolder.read_rows`."""


class MappedRows:
    """One tensor with a row per token, of several models; safe to read from several threads.

    Args:
        sources: the models.
        names: what each calls the tensor.
        row_map: which of their rows feeds which row of the result.
    """

    def __init__(self, sources: Sequence[Rows], names: Sequence[str], row_map: RowMap) -> None:
        self._sources = sources
        self._names = names
        self._map = row_map
        self._givers = _givers(row_map)
        self._means: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def read(self, first: int, stop: int, buffer: Callable[[int, int], Tensor]) -> list[Tensor]:
        """Rows `first` to `stop` of the result's vocabulary, of every model.

        Args:
            first, stop: rows of the merged vocabulary.
            buffer: gives memory of a size in bytes (uint8, on the CPU) for each model's index.

        Returns:
            For each model (stop - first, row length), float32; it may lie in the buffer.
        """
        inputs = [self._own_rows(model, first, stop, buffer) for model in range(len(self._names))]
        lacking = self._map.rows[:, first:stop] == MISSING
        givers = self._givers[first:stop]
        for model, values in enumerate(inputs):
            for giver in np.unique(givers[lacking[model]]).tolist():
                if giver != MISSING:
                    places = torch.from_numpy(np.flatnonzero(lacking[model] & (givers == giver)))
                    values[places] = inputs[giver][places]
        for place in np.flatnonzero(lacking.any(axis=0) & (givers == MISSING)).tolist():
            pieces = self._map.fills[first + place]
            shared = None if pieces is None else self._sum(pieces)
            for model in np.flatnonzero(lacking[:, place]).tolist():
                inputs[model][place] = self._mean(model) if shared is None else shared
        return inputs

    def _own_rows(
        self, model: int, first: int, stop: int, buffer: Callable[[int, int], Tensor]
    ) -> Tensor:
        """A model's own rows where the result has them; what it lacks is left undefined."""
        name, source = self._names[model], self._sources[model]
        dtype = FLOAT_DTYPES[source.tensors[name].dtype]
        row_length = source.tensors[name].shape[1]
        row_bytes = row_length * dtype.itemsize
        memory = buffer(model, (stop - first) * row_length * 4)[: (stop - first) * row_bytes]
        for position, begin, end in runs(self._map.rows[model, first:stop]):
            source.read_rows(name, begin, end, memory[position * row_bytes :])
        return memory.view(dtype).view(stop - first, row_length).to(torch.float32)

    def _sum(self, pieces: Sequence[Piece]) -> Tensor:
        """A sum of rows, in float64, rounded once to float32."""
        total = torch.zeros(self._sources[0].tensors[self._names[0]].shape[1], dtype=torch.float64)
        for model, row, share in pieces:
            total += share * self._float64(model, row, row + 1)[0]
        return total.to(torch.float32)

    def _mean(self, model: int) -> Tensor:
        """The mean of a model's rows that are in the result."""
        with self._lock:
            if model not in self._means:
                own = self._map.rows[model]
                kept = np.unique(own[own != MISSING])
                total = torch.zeros(1, dtype=torch.float64)
                for start in range(0, len(kept), MEAN_ROWS):
                    for _, begin, end in runs(kept[start : start + MEAN_ROWS]):
                        total = total + self._float64(model, begin, end).sum(dim=0)
                self._means[model] = (total / max(1, len(kept))).to(torch.float32)
            return self._means[model]

    def _float64(self, model: int, begin: int, end: int) -> Tensor:
        """Consecutive rows of one model."""
        name, source = self._names[model], self._sources[model]
        size = (end - begin) * source.tensors[name].shape[1] * 4
        rows = source.read_rows(name, begin, end, torch.empty(size, dtype=torch.uint8))
        return rows.to(torch.float64)


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
    """Tensors in memory as a source of rows."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        names = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
        self._values = tensors
        self.tensors = {
            name: TensorInfo(names[tensor.dtype], tuple(tensor.shape))
            for name, tensor in tensors.items()
        }

    def read_rows(self, name: str, first: int, stop: int, buffer: Tensor) -> Tensor:
        """As `ModelFolder.read_rows`: the rows lie in `buffer` afterwards."""
        rows = self._values[name][first:stop]
        target = buffer[: rows.numel() * rows.element_size()].view(rows.dtype).view(rows.shape)
        return target.copy_(rows)


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
