"""NaN and infinity: where they are, and what becomes of them.

`error` refuses models that hold them. `base` takes the base's value instead. `propagate` lets them
through: where a model has one the result is not finite, even if the method would have left that
model out there. A value that is NaN or infinite although it is finite in all models always ends a
merge. NaN has one pattern of bits, as it has different ones from different instructions.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from model_errors import ModelCompatibilityError
from model_safetensors import DTYPE_NAMES, FLOAT_DTYPES, narrow, widen
from model_utils import rows_of
from model_vocabulary import MISSING, RowMap

if TYPE_CHECKING:
    from merge_stream import Arithmetic, Block, Source, TensorTask

NanPolicy = Literal["error", "base", "propagate"]
NAN_POLICIES: tuple[NanPolicy, ...] = get_args(NanPolicy)

NOT_FINITE = "not_finite"
"""The finding on a tensor that tells how many values were not finite, by model."""

LARGEST = {"F32": 3.40282e38, "F16": 65504, "BF16": 3.38953e38}
"""The largest finite value of each dtype."""

_NAN = {"F32": np.float32("nan"), "F16": np.float16("nan"), "BF16": np.uint16(0x7FC0)}

_SCAN_BYTES = 2**22


class FiniteCheck:
    """Looks at what goes into a merge and what comes out of it, from several threads.

    Args:
        sources: the models.
        operations: the arithmetic.
        policy: what becomes of values of the models that are not finite; with "base", the first
            input of every tensor is the base.
    """

    def __init__(
        self, sources: "Sequence[Source]", operations: "Arithmetic", policy: NanPolicy
    ) -> None:
        self.policy = policy
        self._sources = sources
        self._operations = operations
        self._counts: dict[str, dict[str, int]] = {}
        self._lock = threading.Lock()

    def look_at_inputs(self, task: "TensorTask", block: "Block", *, first_time: bool) -> None:
        """Refuse, replace or count what is not finite among the inputs of a block.

        Args:
            first_time: whether this pass is the first that reads all of the tensor.

        Raises:
            ModelCompatibilityError: there is something that the policy refuses.
        """
        if self.policy == "propagate" and not first_time:
            return
        for index in self._operations.broken_inputs(block):
            model, name = task.inputs[index]
            values = block.values(index)
            bad = ~np.isfinite(values) & _is_own(task.row_map, model, block)
            if not bad.any():
                continue  # rows that stand in: their owner is among the inputs
            if self.policy == "error" or (self.policy == "base" and index == 0):
                raise self._refusal(model, name, task.row_map)
            if self.policy == "base":
                self._take_from_base(task, block, index, bad)
            if first_time:
                self._count(task.name, self._sources[model].label, int(bad.sum()))

    def _take_from_base(
        self, task: "TensorTask", block: "Block", index: int, bad: NDArray[np.bool_]
    ) -> None:
        stored = block.stored(index)
        stored[bad] = narrow(block.values(0)[bad], block.layout.dtypes[index])
        if not np.isfinite(block.values(index)[bad]).all():
            model, name = task.inputs[0]
            raise ModelCompatibilityError(
                f"{self._sources[model].label}: {name} has no finite value in the dtype of "
                f"{self._sources[task.inputs[index].model].label} where that has NaN or infinity, "
                "so nan_policy base cannot replace it. Use another copy of one of them"
            )

    def look_at_result(self, task: "TensorTask", block: "Block") -> None:
        """Refuse values that are not finite although all models' are; let the others through.

        Raises:
            ModelCompatibilityError: there is one.
        """
        lets_through = self.policy == "propagate" and task.name in self._counts
        if self._operations.result_is_finite(block) and not lets_through:
            return
        dtype = task.info.dtype
        result = block.values(-1)
        bad = ~np.isfinite(result)
        if self.policy == "propagate":
            inputs = range(len(task.inputs))
            known = np.logical_or.reduce([~np.isfinite(block.values(i)) for i in inputs])
            if not (bad & ~known).any():
                block.stored(-1)[np.isnan(result) | (known & ~bad)] = _NAN[dtype]
                return
            bad &= ~known
        row, column = np.argwhere(bad)[0].tolist()
        name = next(name for name, stored in DTYPE_NAMES.items() if stored == dtype)
        place = (
            f"{task.name}: row {block.first + row}, column {column} ({result[row, column]}; "
            f"{bad.sum()} such in this block)"
        )
        if self.policy == "propagate":
            raise ModelCompatibilityError(
                f"{place} is not finite, although it is in all models: by this method NaN of one "
                f"place reaches others, or the value does not fit {name}. Choose nan_policy base, "
                "or another output dtype"
            )
        raise ModelCompatibilityError(
            f"{place} does not fit {name} (largest value {LARGEST[dtype]:g}). Choose another "
            "output dtype, or check weights and lam"
        )

    def findings(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What was counted in these tensors."""
        return {name: {NOT_FINITE: self._counts[name]} for name in names if name in self._counts}

    def _count(self, tensor: str, label: str, count: int) -> None:
        with self._lock:
            by_model = self._counts.setdefault(tensor, {})
            by_model[label] = by_model.get(label, 0) + count

    def _refusal(self, model: int, name: str, row_map: RowMap | None) -> ModelCompatibilityError:
        """The error for a tensor of a model, all of which is looked at."""
        source = self._sources[model]
        info = source.tensors[name]
        rows, row_length = rows_of(info.shape)
        step = max(1, _SCAN_BYTES // max(1, 4 * row_length))
        count, first = 0, ""
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            size = (stop - start) * row_length * FLOAT_DTYPES[info.dtype].itemsize
            values = source.read_rows(name, start, stop, np.empty(size, np.uint8))
            bad = np.argwhere(~np.isfinite(found := widen(values, info.dtype)))
            if len(bad) and not first:
                row, column = bad[0].tolist()
                element = (start + row) * row_length + column
                value = found[row, column]
                first = f"row {start + row}, column {column} (element {element}, {value})"
            count += len(bad)
        advice = "" if self.policy == "base" else " (--nan_policy base takes the base's values)"
        several = f"{count} of {info.numel}, the first at " if count > 1 else ""
        return ModelCompatibilityError(
            f"{source.label}: {name} has NaN or infinite weights: {several}{first}. The model is "
            f"broken; use another copy{advice}"
        )


def _is_own(row_map: RowMap | None, model: int, block: "Block") -> NDArray[np.bool_]:
    """Which rows of a block are the model's own, shape (rows, 1)."""
    if row_map is None:
        return np.ones((block.rows, 1), dtype=bool)
    own: NDArray[np.bool_] = row_map.rows[model, block.first : block.first + block.rows] != MISSING
    return own[:, None]


def remark_on_broken(findings: Mapping[str, Mapping[str, Any]], policy: NanPolicy) -> list[str]:
    """Says how many values were not finite, and what became of them."""
    totals: dict[str, list[int]] = {}
    for found in findings.values():
        for label, count in found.get(NOT_FINITE, {}).items():
            totals.setdefault(label, []).append(count)
    done = "the base's were taken instead" if policy == "base" else "they were let through"
    return [
        f"{label}: {sum(counts)} values (in {len(counts)} of its tensors) are NaN or infinite; "
        f"{done}"
        for label, counts in totals.items()
    ]
