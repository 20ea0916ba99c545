"""Methods whose result is a weighted sum of the models by their dot products.

Each gathers dot products over a tensor, asks `gram_utils` for one number per model, and adds up.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gram_utils import (
    Gram,
    SlerpCoefficients,
    gram_matrix,
    karcher_coefficients,
    lerp_coefficients,
    model_stock_ratio,
    multislerp_coefficients,
    nuslerp_coefficients,
    nuslerp_t,
    sequential_coefficients,
    sequential_steps,
    slerp_coefficients,
)
from merge_operations import Operations, Take, TaskVectorMerge
from merge_stream import Merge, Passes, TensorTask


def merge_linear(tasks: Sequence[TensorTask], operations: Operations) -> Merge:
    """`linear_utils.linear`, block by block."""
    (task,) = tasks
    weights, normalize = task.parameters["weights"], task.parameters["normalize"]
    return Merge(operations.linear(weights, normalize=normalize))


def merge_passthrough(tasks: Sequence[TensorTask], operations: Operations) -> Merge:
    """`linear_utils.scale`, block by block."""
    (task,) = tasks
    return Merge(operations.scale(task.parameters["scale"]))


def merge_nearswap(tasks: Sequence[TensorTask], operations: Operations) -> Merge:
    """`linear_utils.nearswap`, block by block."""
    (task,) = tasks
    return Merge(operations.nearswap(task.parameters["t"]))


def merge_slerp(tasks: Sequence[TensorTask], operations: Operations) -> Passes:
    """`slerp_utils.slerp`: dot products over the whole tensor, then two multipliers."""
    (task,) = tasks
    parameters = task.parameters
    sums = yield operations.gram_parts(deltas=False)
    aa, ac, cc = sums.totals()
    coefficients = slerp_coefficients(
        aa,
        cc,
        ac,
        parameters["t"],
        eps=parameters["epsilon"],
        normalize=parameters["normalize_before_slerp"],
    )
    return Merge(operations.combine(coefficients[:2]), findings={task.name: _arc(coefficients)})


def _arc(coefficients: SlerpCoefficients) -> dict[str, Any]:
    return {
        "cosine": coefficients.cosine,
        "branch": "lerp" if coefficients.used_lerp else "slerp",
    }


def merge_sequential(tasks: Sequence[TensorTask], operations: Operations) -> Passes:
    """`linear_utils.sequential_lerp` and `slerp_utils.sequential_slerp`."""
    (task,) = tasks
    steps = sequential_steps(task.parameters["weights"])
    if task.parameters["variant"] == "lerp":
        return Merge(operations.combine(lerp_coefficients(steps)))
    sums = yield operations.gram_parts(deltas=False)
    gram = gram_matrix(sums.totals(), len(steps) + 1)
    coefficients, taken = sequential_coefficients(gram, steps)
    findings = {"steps": [_arc(step) for step in taken]}
    return Merge(operations.combine(coefficients), findings={task.name: findings})


def merge_nuslerp(tasks: Sequence[TensorTask], operations: Operations) -> Passes:
    """`slerp_utils.nuslerp`, of whole tensors, rows or columns."""
    (task,) = tasks
    parameters = task.parameters
    t, deltas = nuslerp_t(parameters["weights"]), _has_base(task)
    if parameters["nuslerp_flatten"] or len(task.info.shape) < 2:
        sums = yield operations.gram_parts(deltas=deltas)
        aa, ac, cc = sums.totals()
        coefficients = nuslerp_coefficients(aa, cc, ac, t)
        take = _combine(operations, coefficients[:2], deltas)
        return Merge(take, findings={task.name: _arc(coefficients)})

    def of_vector(gram: Gram) -> Sequence[float]:
        (aa, ac), (_, cc) = gram
        return nuslerp_coefficients(aa, cc, ac, t)[:2]

    if not parameters["nuslerp_row_wise"]:
        return Merge(operations.combine_rows(of_vector, deltas=deltas))
    (columns,) = yield operations.column_grams(deltas=deltas)
    each = [of_vector(gram_matrix(dots, 2)) for dots in columns.T.tolist()]
    multipliers = np.array(each, dtype=np.float32).T
    return Merge(operations.combine_columns(multipliers, deltas=deltas))


def _has_base(task: TensorTask) -> bool:
    """Whether the first input is a base, and not one more model."""
    return len(task.inputs) > len(task.parameters["weights"])


def _combine(operations: Operations, coefficients: Sequence[float], deltas: bool) -> Take:
    """A weighted sum of the models, or of the task vectors with the base added."""
    if deltas:
        return operations.merge_task_vectors(TaskVectorMerge(tuple(coefficients)))
    return operations.combine(coefficients)


def merge_multislerp(tasks: Sequence[TensorTask], operations: Operations) -> Passes:
    """`slerp_utils.multislerp`."""
    (task,) = tasks
    parameters, deltas = task.parameters, _has_base(task)
    weights = parameters["weights"]
    if len(weights) == 1:
        return Merge(operations.combine([0.0] * deltas + [1.0]))
    sums = yield operations.gram_parts(deltas=deltas)
    gram = gram_matrix(sums.totals(), len(weights))
    try:
        coefficients = multislerp_coefficients(
            gram, weights, normalize=parameters["normalize_weights"], eps=parameters["eps"]
        )
    except ValueError as error:
        raise ValueError(f"{task.name}: {error}") from None
    return Merge(_combine(operations, coefficients, deltas), findings={task.name: _cosines(gram)})


def _cosines(gram: Gram) -> dict[str, Any]:
    """Lengths of the models' tensors or task vectors, and the cosines between them."""
    norms = [math.sqrt(row[i]) for i, row in enumerate(gram)]
    pairs = [(i, j) for i in range(len(gram)) for j in range(i)]
    scales = [norms[i] * norms[j] for i, j in pairs]
    return {
        "norms": norms,
        "cosines": [
            gram[i][j] / scale if scale else 0.0
            for (i, j), scale in zip(pairs, scales, strict=True)
        ],
    }


def merge_karcher(tasks: Sequence[TensorTask], operations: Operations) -> Passes:
    """`slerp_utils.karcher`."""
    (task,) = tasks
    parameters = task.parameters
    sums = yield operations.gram_parts(deltas=False)
    gram = gram_matrix(sums.totals(), len(parameters["weights"]))
    mean = karcher_coefficients(
        gram, parameters["weights"], max_iter=parameters["max_iter"], tol=parameters["tol"]
    )
    findings = {
        "iterations": mean.iterations,
        "converged": mean.converged,
        "cosine": mean.cosine,
    }
    return Merge(operations.combine(mean.coefficients), findings={task.name: findings})


def merge_model_stock(tasks: Sequence[TensorTask], operations: Operations) -> Passes:
    """`model_stock_utils.model_stock`, of whole tensors or rows."""
    (task,) = tasks
    ratio = _stock_ratio(task.parameters)
    models = len(task.inputs) - 1
    if task.parameters["filter_wise"]:
        take = operations.combine_rows(lambda gram: [ratio(gram)[0] / models] * models, deltas=True)
        return Merge(take)
    sums = yield operations.gram_parts(deltas=True)
    gram = gram_matrix(sums.totals(), models)
    t, cosine = ratio(gram)
    findings = {"t": t, "cosine": cosine, **_cosines(gram)}
    merge = TaskVectorMerge((t / models,) * models)
    return Merge(operations.merge_task_vectors(merge), findings={task.name: findings})


def _stock_ratio(parameters: Mapping[str, Any]) -> Callable[[Gram], tuple[float, float]]:
    def ratio(gram: Gram) -> tuple[float, float]:
        return model_stock_ratio(
            gram,
            average=parameters["stock_average"],
            norm_floor=parameters["stock_norm_floor"],
            clamp=parameters["clamp_t"],
        )

    return ratio
