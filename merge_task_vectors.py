"""Methods that thin out the models' task vectors and add what is left to the base.

Each finds out what to keep, and leaves the rest to `Operations.merge_task_vectors`.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from merge_operations import (
    Consensus,
    Counts,
    CutRows,
    Cuts,
    Drop,
    DropByRank,
    Election,
    Importance,
    Operations,
    SegmentCounts,
    Select,
    Sparsify,
    TaskVectorMerge,
    equal_before,
)
from merge_stream import Gather, Merge, Passes, TensorTask
from merge_thresholds import Rank, Thresholds, find_thresholds
from model_utils import rows_of
from scalar_utils import (
    TrimThreshold,
    Window,
    kept_count,
    magnitude,
    magnitude_of,
    mask_key,
    quartile_ranks,
    ramplus_factors,
    rescale_factor,
    sce_weights,
    selected_count,
    trim_cut,
    window_counts,
    window_cut,
)


def merge_task_arithmetic(tasks: Sequence[TensorTask], operations: Operations) -> Merge:
    """`linear_utils.task_arithmetic`, block by block."""
    (task,) = tasks
    return Merge(operations.merge_task_vectors(_merge_of(task.parameters)))


def merge_consensus(tasks: Sequence[TensorTask], operations: Operations) -> Passes:
    """`consensus_utils.consensus` and `consensus_ties`."""
    if tasks[0].parameters["variant"] == "linear":
        return Merge(operations.merge_task_vectors(_merge_of(tasks[0].parameters)))
    return (yield from merge_ties(tasks, operations))


def merge_ties(tasks: Sequence[TensorTask], operations: Operations) -> Passes:
    """`ties_utils.ties` with the thresholds of a tensor, of each row, or of the whole model."""
    parameters = tasks[0].parameters
    densities, rule = parameters["densities"], parameters["k_rule"]
    all_ties = parameters["trim_ties"] == "all"
    if parameters["trim_scope"] == "row":

        def windows(length: int) -> list[Window]:
            return [Window(kept_count(density, length, rule), 0) for density in densities]

        return (yield from _cut_rows(tasks, operations, CutRows(windows, all_ties=all_ties)))
    numel = sum(task.info.numel for task in tasks)
    counts = [kept_count(density, numel, rule) for density in densities]
    ranks = [Rank(model, count) for model, count in enumerate(counts)]
    thresholds = yield from find_thresholds(ranks, numel, operations)
    if all_ties:
        thresholds, counts = _with_all_ties(thresholds, counts)
    segments = thresholds.segments
    if segments is None and (thresholds.cuts_ties or len(tasks) > 1):
        around = [(model, each.bits) for model, each in enumerate(thresholds.chosen)]
        segments = yield operations.count_around(around)
    cut = _Cut(
        Cuts(tuple(map(trim_cut, thresholds.chosen)), (1.0,) * len(ranks)),
        equal_before(segments if thresholds.cuts_ties else None, len(ranks)),
        _trim_findings(tasks, counts, thresholds, segments),
    )
    return (yield from _cut_and_merge(tasks, operations, cut))


def merge_breadcrumbs(tasks: Sequence[TensorTask], operations: Operations) -> Passes:
    """`breadcrumbs_utils.breadcrumbs` and `breadcrumbs_ties`, of a tensor or of each row."""
    (task,) = tasks
    parameters = task.parameters
    shares = [*zip(parameters["densities"], parameters["gammas"], strict=True)]

    def windows(length: int) -> list[Window]:
        return [window_counts(*share, length, shrink=parameters["shrink"]) for share in shares]

    if parameters["trim_scope"] == "row":
        return (yield from _cut_rows(tasks, operations, CutRows(windows, last_first=True)))
    wanted = windows(task.info.numel)
    ranks = [Rank(model, each.kept + each.removed) for model, each in enumerate(wanted)]
    ranks += [Rank(model, each.removed) for model, each in enumerate(wanted)]
    thresholds = yield from find_thresholds(ranks, task.info.numel, operations)
    segments = thresholds.segments
    if thresholds.cuts_ties and segments is None:
        around = [
            (rank.which, each.bits) for rank, each in zip(ranks, thresholds.chosen, strict=True)
        ]
        segments = yield operations.count_around(around)
    models = len(wanted)
    bounds = [*zip(thresholds.chosen, thresholds.tied, strict=True)]
    cuts = tuple(
        window_cut(*lower, *upper)
        for lower, upper in zip(bounds[:models], bounds[models:], strict=True)
    )
    found = [
        {
            "kept": each.kept,
            "removed": each.removed,
            "threshold": _finite(magnitude_of(cut.lower)),
            "ceiling": _finite(magnitude_of(cut.upper)),
        }
        for each, cut in zip(wanted, cuts, strict=True)
    ]
    cut = _Cut(
        Cuts(cuts, (1.0,) * models),
        equal_before(segments if thresholds.cuts_ties else None, models),
        {task.name: {"trim": found}},
    )
    return (yield from _cut_and_merge(tasks, operations, cut))


def _with_all_ties(thresholds: Thresholds, counts: Sequence[int]) -> tuple[Thresholds, list[int]]:
    """Thresholds that keep every equal entry, and how many they keep."""
    more = [
        max(0, tied - each.ties)
        for each, tied in zip(thresholds.chosen, thresholds.tied, strict=True)
    ]
    chosen = tuple(
        TrimThreshold(each.bits, each.ties + extra)
        for each, extra in zip(thresholds.chosen, more, strict=True)
    )
    kept = [count + extra for count, extra in zip(counts, more, strict=True)]
    return thresholds._replace(chosen=chosen), kept


class _Cut(NamedTuple):
    """What is kept of a group's task vectors.

    Attributes:
        cuts: by magnitude.
        seen: from a segment's number to the state that it starts with.
        findings: by tensor.
    """

    cuts: Cuts
    seen: Callable[[int], Counts]
    findings: Mapping[str, Mapping[str, Any]]


def _cut_and_merge(
    tasks: Sequence[TensorTask], operations: Operations, cut: _Cut
) -> Generator[Gather, Any, Merge]:
    """Merge what cuts keep, rescaled to the L1 norm that was if that is wanted."""
    parameters, cuts = tasks[0].parameters, cut.cuts
    if parameters.get("rescale") == "l1":
        sums = yield operations.norm_parts(cuts, 1, cut.seen)
        cuts = replace(cuts, factors=_l1_factors(sums.totals()))
    merge = _merge_of(parameters, cuts)
    merge = yield from _with_majority(merge, parameters, operations, cut.seen)
    return Merge(operations.merge_task_vectors(merge), cut.seen, cut.findings)


def _cut_rows(
    tasks: Sequence[TensorTask], operations: Operations, rows: CutRows
) -> Generator[Gather, Any, Merge]:
    """Merge what is kept of each row."""
    parameters = tasks[0].parameters
    merge = _merge_of(parameters, rows)
    merge = yield from _with_majority(merge, parameters, operations, lambda _: None)
    return Merge(operations.merge_task_vectors(merge))


def _with_majority(
    merge: TaskVectorMerge,
    parameters: Mapping[str, Any],
    operations: Operations,
    seen: Callable[[int], Counts | None],
) -> Generator[Gather, Any, TaskVectorMerge]:
    """Votes that balance go to the sign of the whole model's votes, if that is wanted."""
    if merge.election is None or parameters.get("elect_zero") != "global_majority":
        return merge
    (total,) = yield operations.sum_signs(merge, seen)
    election = replace(merge.election, zero=float(np.sign(total)))
    return replace(merge, election=election)


def _trim_findings(
    tasks: Sequence[TensorTask],
    counts: Sequence[int],
    thresholds: Thresholds,
    segments: SegmentCounts | None,
) -> dict[str, Mapping[str, Any]]:
    """Per tensor and model: entries kept, the smallest magnitude kept, how many share it."""
    ties = [threshold.ties for threshold in thresholds.chosen]
    if segments is None:
        found = _found(counts, thresholds.chosen, thresholds.tied, ties)
        return {task.name: {"trim": found} for task in tasks}
    counted = {task.name: np.zeros((len(counts), 2), dtype=np.int64) for task in tasks}
    for name, around in zip(segments.names, segments.counts, strict=True):
        counted[name] += around
    findings: dict[str, Mapping[str, Any]] = {}
    left = np.array(ties)
    for name, around in counted.items():
        above, tied = around.T
        tied_kept = np.clip(left, 0, tied)
        left -= tied
        each = ((above + tied_kept).tolist(), thresholds.chosen, tied.tolist(), tied_kept.tolist())
        findings[name] = {"trim": _found(*each)}
    return findings


def _found(
    kept: Sequence[int],
    thresholds: Sequence[TrimThreshold],
    tied: Sequence[int],
    tied_kept: Sequence[int],
) -> list[dict[str, Any]]:
    """What was found out about each model's task vector."""
    numbers = zip(kept, map(magnitude, thresholds), tied, tied_kept, strict=True)
    return [
        {
            "kept": each,
            "threshold": _finite(smallest),
            "tied": equal,
            "tied_kept": equal_kept,
        }
        for each, smallest, equal, equal_kept in numbers
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def merge_dare(tasks: Sequence[TensorTask], operations: Operations) -> Passes:
    """`dare_utils.dare_linear` and `dare_ties`: masks are made per block from the element index."""
    (task,) = tasks
    parameters = task.parameters
    densities, rescale = parameters["densities"], parameters["rescale"]
    keys = _mask_keys(task)
    if rescale == "l1":
        sums = yield operations.norm_parts(Drop(keys, densities, (1.0,) * len(keys)), 1)
        factors = _l1_factors(sums.totals())
    else:
        factors = tuple(rescale_factor(rescale, density) for density in densities)
    merge = _merge_of(parameters, Drop(keys, densities, factors))
    findings = {task.name: {"rescale_factors": factors}}
    return Merge(operations.merge_task_vectors(merge), findings=findings)


def merge_della(tasks: Sequence[TensorTask], operations: Operations) -> Passes:
    """`della_utils.della_linear` and `della_ties`: chances by rank in the row."""
    (task,) = tasks
    parameters = task.parameters
    rescale, keys = parameters["rescale"], _mask_keys(task)
    settings = (keys, parameters["densities"], parameters["epsilons"], rescale)
    drop = DropByRank(*settings, (1.0,) * len(keys))
    findings: dict[str, Mapping[str, Any]] = {}
    if rescale == "l1":
        sums = yield operations.norm_parts(drop, 1)
        factors = _l1_factors(sums.totals())
        drop, findings = DropByRank(*settings, factors), {task.name: {"rescale_factors": factors}}
    merge = operations.merge_task_vectors(_merge_of(parameters, drop))
    return Merge(merge, findings=findings)


def _mask_keys(task: TensorTask) -> tuple[tuple[int, int], ...]:
    """Keys of the random numbers, one per model."""
    models, seed = range(len(task.inputs) - 1), task.parameters["seed"]
    return tuple(mask_key(seed, str(model), task.name) for model in models)


def _l1_factors(norms: Sequence[float]) -> tuple[float, ...]:
    """What brings what is kept back to the L1 norm before; norms before, then those after."""
    models = len(norms) // 2
    pairs = zip(norms[:models], norms[models:], strict=True)
    return tuple(rescale_factor("l1", 1.0, before, after) for before, after in pairs)


def merge_sce(tasks: Sequence[TensorTask], operations: Operations) -> Passes:
    """`sce_utils.sce`: select by variance, weights from mean squares, erase the minority."""
    (task,) = tasks
    parameters = task.parameters
    numel, models = task.info.numel, len(task.inputs) - 1
    share = parameters["select_topk"]
    selected = numel
    if 0 < share < 1:
        varying = yield operations.count_around([(0, 0)], "variance")
        selected = selected_count(share, int(varying.counts[:, 0, 0].sum()), numel)
    elif share == 0:
        selected = 0
    thresholds = yield from find_thresholds([Rank(0, selected)], numel, operations, "variance")
    segments = thresholds.segments
    if thresholds.cuts_ties and segments is None:
        segments = yield operations.count_around([(0, thresholds.chosen[0].bits)], "variance")
    select = Select(trim_cut(thresholds.chosen[0]))
    seen = equal_before(segments if thresholds.cuts_ties else None, 1)
    sums = yield operations.norm_parts(select, 2, seen)
    weights = sce_weights(sums.totals()[models:], numel, parameters["sce_floor"])
    merge = TaskVectorMerge(
        tuple(weights),
        parameters["lam"],
        election=Election("weight", on="unweighted"),
        sparsify=select if parameters["sce_mask"] == "deltas" else None,
    )
    findings = {"weights": weights, "selected": selected}
    return Merge(operations.merge_task_vectors(merge), seen, {task.name: findings})


def merge_ram(tasks: Sequence[TensorTask], operations: Operations) -> Passes:
    """`ram_utils.ram` and `ramplus`."""
    (task,) = tasks
    parameters, models = task.parameters, len(task.inputs) - 1
    epsilon, factors = parameters["epsilon"], [1.0] * models
    findings: dict[str, Any] = {}
    if parameters["variant"] == "ramplus":
        counts = yield operations.count_active(epsilon, models)
        shared, unique = counts.T.tolist()
        factors = ramplus_factors(shared, unique, parameters["r"], parameters["alpha"])
        findings = {task.name: {"shared": shared, "unique": unique, "factors": factors}}
    return Merge(operations.merge_active(epsilon, factors, parameters["lam"]), findings=findings)


def merge_arcee_fusion(tasks: Sequence[TensorTask], operations: Operations) -> Passes:
    """`arcee_fusion_utils.arcee_fusion`."""
    (task,) = tasks
    ranks = [Rank(0, rank) for rank in quartile_ranks(task.info.numel)]
    rows, _ = rows_of(task.info.shape)
    score = Importance((yield operations.row_divergence(rows)))
    thresholds = yield from find_thresholds(ranks, task.info.numel, operations, score)
    first, median, third = (_reached(each) for each in thresholds.chosen)
    threshold = median + 1.5 * (third - first)
    return Merge(operations.fuse(score, threshold), findings={task.name: {"threshold": threshold}})


def _reached(threshold: TrimThreshold) -> float:
    """The magnitude that the wanted number of entries reach."""
    return magnitude_of(threshold.bits)


def _merge_of(parameters: Mapping[str, Any], sparsify: Sparsify | None = None) -> TaskVectorMerge:
    """How the task vectors of a method with an election, or without, are merged."""
    weights, lam = parameters["weights"], parameters["lam"]
    consensus = None
    if "mask_lambdas" in parameters:
        consensus = Consensus(parameters["mask_lambdas"], parameters["agreement"])
    if "denominator" not in parameters:
        normalize = parameters.get("normalize", False)
        return TaskVectorMerge(weights, lam, normalize, sparsify=sparsify, consensus=consensus)
    election = Election(
        parameters["denominator"], parameters["elect_on"], parameters["elect_method"]
    )
    return TaskVectorMerge(weights, lam, election=election, sparsify=sparsify, consensus=consensus)
