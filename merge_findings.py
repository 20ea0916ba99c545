"""What models have changed, and where they disagree: per tensor, per layer, per projection.

Gathered from the blocks of a merge while they are merged, or in passes of its own (`analyze`).
Everything is kept as sums (dot products, counts) for as long as possible, so that what is said of
a layer or of the whole model is exact as well, and not a mean of means.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from gram_utils import Gram, gram_matrix, gram_pairs
from merge_operations import Counts, Operations, by_tensor, together
from merge_stream import Gather, Merge, Passes, TensorTask
from scalar_utils import magnitude_of

LARGEST_SHARE = 0.2
"""Of the largest changes it is also said how many conflict: what a usual trim leaves of them."""

ENERGY_SHARES = (0.5, 0.9, 0.99)
"""Shares of a task vector's squared norm for which the least density is told."""

LAYER = re.compile(r"\.layers\.(\d+)\.(.+?)(?:\.weight)?$")


@dataclass(frozen=True)
class TensorSums:
    """Sums over some tensors.

    Attributes:
        numel: entries.
        gram: dot products of the task vectors (of the models, where there is no base).
        base: squared norm of the base; None without one.
        conflicts: as `ties_utils.count_conflicts`; None without a base.
        largest: the same for the largest changes alone, if that has been counted.
        histogram: entries of each model by the upper 11 bits of their change, if counted.
    """

    numel: int
    gram: Gram
    base: float | None = None
    conflicts: Counts | None = None
    largest: Counts | None = None
    histogram: Counts | None = None

    def __add__(self, other: Self) -> "TensorSums":
        def add(one: Any, two: Any) -> Any:
            return None if one is None or two is None else one + two

        gram = np.add(self.gram, other.gram).tolist()
        return TensorSums(
            self.numel + other.numel,
            gram,
            add(self.base, other.base),
            add(self.conflicts, other.conflicts),
            add(self.largest, other.largest),
            add(self.histogram, other.histogram),
        )

    @property
    def norms(self) -> list[float]:
        """Norm of each task vector."""
        return [math.sqrt(row[i]) for i, row in enumerate(self.gram)]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it.

        Returns:
            "elements", "norms" (of task vectors, per model), "cosines" (per pair of models),
            and with a base: "base_norm", "relative_norms" (of the base's), "sign_conflict" (the
            share of changed entries that some models raise and others lower), "pair_conflicts"
            (of the entries that both change); of the largest changes the same as
            "largest_conflict" and "largest_pair_conflicts"; and "densities", per model the
            least density that keeps each of `ENERGY_SHARES` of its squared norm.
        """
        norms = self.norms
        found: dict[str, Any] = {
            "elements": self.numel,
            "norms": norms,
            "cosines": [
                _ratio(self.gram[i][j], norms[i] * norms[j]) for i, j in pairs_of(len(norms))
            ],
        }
        if self.base is not None:
            base = math.sqrt(self.base)
            found["base_norm"] = base
            found["relative_norms"] = [_ratio(norm, base) for norm in norms]
        for key, counts in (("", self.conflicts), ("largest_", self.largest)):
            if counts is not None:
                some, mixed = counts[-1].tolist()
                found[f"{key}conflict" if key else "sign_conflict"] = _ratio(mixed, some)
                found[f"{key}pair_conflicts"] = _pair_conflicts(counts, len(norms))
        if self.histogram is not None:
            found["densities"] = [
                {f"{share:g}": density_for(counts, share) for share in ENERGY_SHARES}
                for counts in self.histogram
            ]
        return found


def pairs_of(models: int) -> list[tuple[int, int]]:
    """Pairs of different models: (0, 1), (0, 2), (1, 2), ..."""
    return [(i, j) for j in range(models) for i in range(j)]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _pair_conflicts(counts: Counts, models: int) -> list[float]:
    """Of the entries that both models of a pair change, the share changed in opposite ways."""
    by_pair = dict(zip(gram_pairs(models), counts.tolist(), strict=False))
    return [_ratio(by_pair[pair][1], by_pair[pair][0]) for pair in pairs_of(models)]


def density_for(histogram: Counts, share: float) -> float:
    """The least density that keeps a share of a task vector's squared norm.

    As near as the bins tell, each of which spans an eighth of a power of 2.

    Args:
        histogram: entries by the upper 11 bits of their magnitude.
        share: in (0, 1].

    >>> counts = np.zeros(2048, dtype=np.int64)
    >>> counts[[0, 1016]] = 90, 10  # 90 unchanged entries, and 10 by about as much
    >>> density_for(counts, 0.5)
    0.05
    """
    bins = np.flatnonzero(histogram)[::-1]
    counts = histogram[bins]
    middles = np.array([magnitude_of((int(each) << 20) + 2**19) if each else 0.0 for each in bins])
    squares = (counts * middles**2).cumsum()
    if not len(bins) or squares[-1] == 0:
        return 0.0
    wanted = share * squares[-1]
    place = int(np.searchsorted(squares, wanted))
    before = squares[place - 1] if place else 0.0
    kept = counts[:place].sum() + counts[place] * (wanted - before) / (squares[place] - before)
    return float(kept / counts.sum())


def observed(
    merge: Merge, tasks: Sequence[TensorTask], operations: Operations, *, has_base: bool
) -> Merge:
    """A merge whose last pass also gathers what its findings are to hold.

    Args:
        merge: the merge.
        tasks: the group.
        operations: the arithmetic.
        has_base: whether the first input is the models' common ancestor.
    """
    gather, conclude = _gather(tasks, operations, has_base)

    def findings(collected: Any) -> dict[str, Mapping[str, Any]]:
        return {name: {"task_vectors": s.to_dict()} for name, s in conclude(collected).items()}

    return merge._replace(observe=gather, conclude=findings)


def analyze(tasks: Sequence[TensorTask], operations: Operations, *, has_base: bool) -> Passes:
    """Passes over a tensor that merge nothing; findings: "sums", a `TensorSums`."""
    (task,) = tasks
    gather, conclude = _gather(tasks, operations, has_base)
    if not has_base:
        return _found(task, conclude((yield gather))[task.name])
    models = [*range(len(task.sources) - 1)]
    collected, histograms = yield together([gather, operations.coarse_histograms(models)])
    thresholds = [_least_of_largest(operations, counts) for counts in histograms]
    largest = yield operations.count_conflicts(thresholds)
    histogram = histograms.reshape(len(models), -1, 16).sum(axis=2)
    sums = conclude(collected)[task.name]
    return _found(task, replace(sums, largest=largest, histogram=histogram))


def _found(task: TensorTask, sums: TensorSums) -> Merge:
    return Merge(None, findings={task.name: {"sums": sums}})


def _least_of_largest(operations: Operations, histogram: Counts) -> int:
    """Bits below which no change belongs to the largest ones; to the nearest bin."""
    rank = max(1, int(LARGEST_SHARE * histogram.sum()))
    position, _ = operations.select_bin(histogram, rank)
    return max(0, (position << 16) - 1)


def _gather(
    tasks: Sequence[TensorTask], operations: Operations, has_base: bool
) -> tuple[Gather, Callable[[Any], dict[str, TensorSums]]]:
    """A pass over a group that collects sums per tensor, and what makes `TensorSums` of them."""
    sizes = {task.name: task.info.numel for task in tasks}
    models = len(tasks[0].sources) - has_base
    gathers = [operations.gram_parts(deltas=has_base)]
    if has_base:
        gathers.append(operations.gram_parts(deltas=False, first=1))
        gathers.append(operations.count_conflicts([0] * models))

    def conclude(collected: Mapping[str, list[Any]]) -> dict[str, TensorSums]:
        sums = {}
        for name, (gram, *rest) in collected.items():
            matrix = gram_matrix(gram.totals(), models)
            base, conflicts = (rest[0].totals()[0], rest[1]) if has_base else (None, None)
            sums[name] = TensorSums(sizes[name], matrix, base, conflicts)
        return sums

    return by_tensor(together(gathers)), conclude


def layer_of(name: str) -> tuple[int, str] | None:
    """A tensor's layer and projection; None for what is in no layer.

    >>> layer_of("model.layers.3.mlp.up_proj.weight"), layer_of("lm_head.weight")
    ((3, 'mlp.up_proj'), None)
    """
    found = LAYER.search(name)
    return None if found is None else (int(found.group(1)), found.group(2))


def grouped(sums: Mapping[str, TensorSums]) -> Iterator[tuple[str, str, TensorSums]]:
    """Sums over layers, over projections, over everything: kind, name and sums."""
    groups: dict[tuple[str, str], TensorSums] = {}
    for name, each in sums.items():
        place = layer_of(name)
        keys = [("whole", "")]
        if place is not None:
            keys += [("layers", str(place[0])), ("projections", place[1])]
        for key in keys:
            groups[key] = groups[key] + each if key in groups else each
    for (kind, name), each in groups.items():
        yield kind, name, each
