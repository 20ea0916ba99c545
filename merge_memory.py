"""How much memory a merge takes, and how it is made to fit into what the user allows.

A block per thread, and what a few passes have gathered. Neither grows with the size of the
models, but where a whole model is trimmed at once: by a few bytes per segment, and by those per row
where it is rescaled to its L1 norm, or findings are asked for. Files that the
system caches are not counted; it gives them up when others need memory.
"""

import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from merge_operations import FINE_BINS
from merge_plan import Plan
from merge_stream import BLOCK_BYTES, Layout, TensorTask
from model_errors import MemoryLimitError
from model_utils import format_bytes, rows_of
from scalar_utils import RUN

SMALLEST_BLOCK_BYTES = 2**16
"""Smaller blocks would save next to nothing, and cost much time."""

ARITHMETIC_BYTES = {"numba": 80 * 10**6, "torch": 55 * 10**6}
"""What the packages take when they are at work, compiling included, beside what importing them
took; measured on Linux, rounded up."""

COLLECTIONS = 3
"""For each thread: one that it fills, and others whose pass waits for its last segment."""

SEGMENT_OBJECT_BYTES = 300

_compiled: set[tuple[object, ...]] = set()
"""Kinds of merges that numba has compiled for in this process, which holds that memory by now."""

STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Fit:
    """How a merge is run so that its memory suffices.

    Attributes:
        threads: segments worked on at once.
        block_bytes: memory of a block.
        memory_bytes: highest memory of the process, without files that the system caches.
        notes: what the user should know.
    """

    threads: int
    block_bytes: int
    memory_bytes: int
    notes: tuple[str, ...] = ()


def fit_memory(
    plan: Plan,
    packages: Sequence[str],
    threads: int,
    limit: int | None,
    held: int,
    *,
    findings: bool = False,
) -> Fit:
    """Choose blocks, and threads if need be, with which a merge stays within a limit.

    Args:
        plan: what is merged.
        packages: those that compute; see `merge_operations.arithmetic`.
        threads: segments to work on at once, at most.
        limit: most memory of the process in bytes; None for no limit.
        held: what it holds before the merge and will hold beside it, in bytes.
        findings: whether sums of every pair of models are gathered as well.

    Raises:
        MemoryLimitError: the merge cannot be done in so little memory.
    """
    needs: dict[int, _Need] = {}
    block_bytes = BLOCK_BYTES
    while not needs or (limit is not None and block_bytes >= SMALLEST_BLOCK_BYTES):
        needs[block_bytes] = _needed(plan, packages, block_bytes, findings)
        block_bytes //= 2
    useful = min(threads, needs[BLOCK_BYTES].segments)
    for used in range(useful, 0, -1):
        for block_bytes, need in needs.items():
            needed = held + need.fixed + used * need.per_thread
            if limit is None or needed <= limit:
                notes = []
                if used < useful:
                    notes.append(f"{used} of {threads} threads are used, to stay within max_memory")
                return Fit(used, block_bytes, needed, tuple(notes))
    raise MemoryLimitError(
        f"max_memory {format_bytes(limit or 0)} is too little: this merge takes at least "
        f"{format_bytes(needed)}, {format_bytes(held)} of which the process holds already. Allow "
        "more, or merge fewer models at once"
    )


def remember_compiled(plan: Plan, packages: Sequence[str]) -> None:
    """The next merge of this kind compiles nothing."""
    if "numba" in packages:
        _compiled.add(_kind(plan))


def _kind(plan: Plan) -> tuple[object, ...]:
    """What decides which loops a merge needs."""
    choices = {
        tuple(value for value in parameters.values() if isinstance(value, str))
        for parameters in plan.variants
    }
    return (plan.recipe.method, *sorted(choices))


class _Need(NamedTuple):
    """What a merge takes beside what the process holds.

    Attributes:
        fixed, per_thread: bytes.
        segments: how many there are to work on.
    """

    fixed: int
    per_thread: int
    segments: int


def _needed(plan: Plan, packages: Sequence[str], block_bytes: int, findings: bool) -> _Need:
    layouts = [_layout(plan, task, block_bytes) for task in plan.tasks]
    blocks = (
        _block_bytes(plan, packages, task, layout)
        for task, layout in zip(plan.tasks, layouts, strict=True)
    )
    models = plan.most_models
    rows = [rows_of(task.info.shape) for task in plan.tasks]
    segments = [
        math.ceil(count / layout.segment_rows)
        for (count, _), layout in zip(rows, layouts, strict=True)
    ]
    together = sum if plan.whole_model else max
    group = together(segments)
    runs = together(count * math.ceil(length / RUN) for count, length in rows)
    sums = max(plan.method.sums(each, models) for each in plan.variants)
    if findings:
        sums += models * (models + 1) // 2 + 1
    fixed = group * SEGMENT_OBJECT_BYTES + 3 * sums * runs * 8
    compiles = _kind(plan) not in _compiled
    fixed += sum(ARITHMETIC_BYTES[each] for each in packages if each != "numba" or compiles)
    histograms = max(plan.method.bins(each, models) for each in plan.variants)
    fixed += sum(source.memory_bytes for source in plan.sources)
    counts = 8 * histograms * (FINE_BINS + 2 * group)
    return _Need(fixed, max(blocks) + COLLECTIONS * counts, max(1, sum(segments)))


def _layout(plan: Plan, task: TensorTask, block_bytes: int) -> Layout:
    stored = [plan.sources[each.model].tensors[each.tensor].dtype for each in task.inputs]
    return Layout(task, stored, block_bytes)


def _block_bytes(plan: Plan, packages: Sequence[str], task: TensorTask, layout: Layout) -> int:
    """What a thread takes for a block."""
    elements = layout.rows * layout.row_length
    mapped = 10 * elements if task.row_map is not None else 0  # a model's own rows, widened
    if any(plan.sources[each.model].memory_bytes for each in task.inputs):
        mapped += 12 * elements  # the base's rows, and what an adapter adds
    copies = plan.method.copies * len(task.inputs) + 4 if "torch" in packages else 0
    return layout.nbytes + mapped + 4 * elements * copies


def peak_memory() -> int:
    """Highest resident memory of this process so far, in bytes."""
    if STATUS.exists():  # getrusage would count what the process had before it became this one
        return _status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def anonymous_memory() -> int:
    """What this process takes now beside files that the system caches, in bytes."""
    return _status("RssAnon") + _status("RssShmem") if STATUS.exists() else peak_memory()


def mapped_memory() -> int:
    """What of this process's memory are mapped files, such as libraries, in bytes; 0 if unknown."""
    return _status("RssFile") if STATUS.exists() else 0


def _status(entry: str) -> int:
    """An entry of what Linux knows about this process, in bytes."""
    lines = STATUS.read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{entry}:"))
    return int(line.split()[1]) * 1024
