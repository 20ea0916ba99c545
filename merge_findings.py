"""What models have changed, and where they disagree: per tensor, per layer, per projection.

Gathered from the blocks of a merge while they are merged, or in passes of its own (`analyze`).
Everything is kept as sums (dot products, counts) for as long as possible, so that what is said of
a layer or of the whole model is exact as well, and not a mean of means.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gram_utils import Gram, gram_matrix, gram_pairs
from merge_operations import Counts, Operations, by_tensor, together
from merge_stream import Gather, Merge, Passes, TensorTask
from scalar_utils import magnitude_of

LARGEST_SHARE = 0.2
"""Of the largest changes it is also said how many conflict: what a usual trim leaves of them."""

ENERGY_SHARES = (0.5, 0.9, 0.99)
"""Shares of a task vector's squared norm for which the least density is told."""

TASK_VECTORS = "task_vectors"
"""The finding on a tensor that tells what its models have changed."""

DENSITY_STEP = 1e-6
"""How near a density is told, as a share of it."""

_COUNTS = ("conflicts", "largest", "histogram")

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
            found["densities"] = [least_densities([counts]) for counts in self.histogram]
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


def least_density(histograms: Sequence[Counts], share: float) -> float:
    """The least density that, taken of each tensor, keeps a share of the squared norm of all.

    As near as the bins tell, each of which spans an eighth of a power of 2.

    Args:
        histograms: of the tensors: entries by the upper 11 bits of their magnitude.
        share: in (0, 1].

    Returns:
        In [0, 1]; 0 where nothing has changed.

    >>> changed, same = np.zeros((2, 2048), dtype=np.int64)
    >>> changed[[0, 1016]], same[0] = (90, 10), 100  # 10 entries changed, all by about as much
    >>> round(least_density([changed], 0.5), 4), round(least_density([changed, same], 1.0), 4)
    (0.05, 0.1)
    """
    curves = [_kept(histogram) for histogram in histograms if histogram.any()]
    wanted = share * sum(squares[-1] for _, squares in curves)
    low, high = 0.0, 1.0 if wanted else 0.0
    while high - low > DENSITY_STEP * high:
        middle = (low + high) / 2
        kept = sum(np.interp(middle, densities, squares) for densities, squares in curves)
        low, high = (low, middle) if kept >= wanted else (middle, high)
    return high


def least_densities(histograms: Sequence[Counts]) -> dict[str, float]:
    """`least_density` for each of `ENERGY_SHARES`."""
    return {f"{share:g}": least_density(histograms, share) for share in ENERGY_SHARES}


def _kept(histogram: Counts) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares of the entries, the largest first, and the sum of their squares; both from 0."""
    bins = np.flatnonzero(histogram)[::-1]
    counts = histogram[bins]
    middles = np.array([magnitude_of((int(each) << 20) + 2**19) if each else 0.0 for each in bins])
    shares = counts.cumsum() / counts.sum()
    return np.append(0.0, shares), np.append(0.0, (counts * middles**2).cumsum())


def observed(
    merge: Merge, tasks: Sequence[TensorTask], operations: Operations, *, has_base: bool
) -> Merge:
    """A merge whose last pass also gathers `TensorSums`, its findings under `TASK_VECTORS`.

    Args:
        merge: the merge.
        tasks: the group.
        operations: the arithmetic.
        has_base: whether the first input is the models' common ancestor.
    """
    gather, conclude = _gather(tasks, operations, has_base)

    def findings(collected: Any) -> dict[str, Mapping[str, Any]]:
        return {name: {TASK_VECTORS: sums} for name, sums in conclude(collected).items()}

    return merge._replace(observe=gather, conclude=findings)


def analyze(tasks: Sequence[TensorTask], operations: Operations, *, has_base: bool) -> Passes:
    """Passes over a tensor that merge nothing; findings: "sums", a `TensorSums`."""
    (task,) = tasks
    gather, conclude = _gather(tasks, operations, has_base)
    if not has_base:
        return _found(task, conclude((yield gather))[task.name])
    models = [*range(len(task.inputs) - 1)]
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
    models = len(tasks[0].inputs) - has_base
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


def stored(found: Mapping[str, Any]) -> dict[str, Any]:
    """Findings on a tensor as records can hold them; `restored` gives them back."""
    if TASK_VECTORS not in found:
        return dict(found)
    counts = {
        name: None if value is None else value.tolist()
        for name, value in vars(found[TASK_VECTORS]).items()
        if name in _COUNTS
    }
    return {**found, TASK_VECTORS: {**vars(found[TASK_VECTORS]), **counts}}


def restored(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `stored` was given."""
    if TASK_VECTORS not in found:
        return dict(found)
    counts = {
        name: None if value is None else np.array(value)
        for name, value in found[TASK_VECTORS].items()
        if name in _COUNTS
    }
    return {**found, TASK_VECTORS: TensorSums(**{**found[TASK_VECTORS], **counts})}


def told(
    findings: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Mapping[str, Any]], dict[str, Any]]:
    """Findings as JSON can hold them, and what they come to by `groups`, if sums were gathered."""
    sums = {name: found[TASK_VECTORS] for name, found in findings.items() if TASK_VECTORS in found}
    each = {name: {**findings[name], TASK_VECTORS: sums[name].to_dict()} for name in sums}
    return {**findings, **each}, groups(sums) if sums else {}


def groups(sums: Mapping[str, TensorSums]) -> dict[str, Any]:
    """What sums come to: "layers" and "projections" by name, and "whole".

    With histograms, "whole" also has "tensor_densities", as "densities" but taken of each tensor.
    """
    layers: dict[str, TensorSums] = {}
    projections: dict[str, TensorSums] = {}
    whole: dict[str, TensorSums] = {}
    for name, each in sums.items():
        place = layer_of(name)
        keys = [(whole, "")]
        if place is not None:
            keys += [(layers, str(place[0])), (projections, place[1])]
        for group, key in keys:
            group[key] = group[key] + each if key in group else each
    found = {
        "layers": {key: layers[key].to_dict() for key in sorted(layers, key=int)},
        "projections": {key: each.to_dict() for key, each in projections.items()},
        "whole": whole[""].to_dict(),
    }
    histograms = [each.histogram for each in sums.values() if each.histogram is not None]
    if histograms:
        found["whole"]["tensor_densities"] = [
            least_densities(of_model) for of_model in zip(*histograms, strict=True)
        ]
    return found
