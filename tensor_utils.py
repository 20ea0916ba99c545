"""What all merge math shares: argument checks, and sums that do not depend on the blocks.

The checks raise `ValueError` and know no model or tensor names; callers that do add them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

RUN = 2**14
"""Elements summed in one go. Runs never cross a row, so their sums do not depend on how the
rows of a tensor are grouped into blocks."""


SMALLEST, LARGEST = 1e-30, 1e30
"""Weights beyond these magnitudes are refused: products with them leave the range of float32."""


def check_weights(weights: Sequence[float]) -> None:
    """Raise `ValueError` unless there is a weight, and all are 0 or of a magnitude in range."""
    if not weights:
        raise ValueError("weights must have at least one entry, got none")
    for weight in weights:
        if not (weight == 0 or SMALLEST <= abs(weight) <= LARGEST):
            raise ValueError(
                f"weights must be 0 or between {SMALLEST:g} and {LARGEST:g} in magnitude, "
                f"got {weight}"
            )


def check_normalizable(weights: Sequence[float]) -> None:
    """Raise `ValueError` when dividing by the sum of `weights` makes no sense.

    The sum counts as zero below 1e-12 of the summed magnitudes, and where float32 sees none.
    """
    total = math.fsum(weights)
    magnitude = math.fsum(abs(weight) for weight in weights)
    if abs(total) <= 1e-12 * magnitude or float32_sum(weights) == 0:
        raise ValueError(
            f"weights {list(weights)} sum to {total:g}, so they cannot be normalized. "
            "Change a weight, or turn normalize off to take the plain sum"
        )


def float32_sum(weights: Sequence[float]) -> float:
    """Sum of the weights as float32 arithmetic applies them, in their order.

    >>> float32_sum([1.0, -0.999999999])
    0.0
    """
    total = torch.zeros(())
    for weight in weights:
        total += weight
    return float(total)


def check_tensors(tensors: Sequence[Tensor], base: Tensor | None = None) -> None:
    """Raise `ValueError` unless all tensors are float32 and of one shape."""
    if not tensors:
        raise ValueError("tensors must have at least one entry, got none")
    first = tensors[0] if base is None else base
    for tensor in tensors if base is None else (base, *tensors):
        if tensor.dtype != torch.float32:
            raise ValueError(f"tensors must be float32, got {tensor.dtype}. Convert with .float()")
        if tensor.shape != first.shape:
            raise ValueError(
                f"tensors must have one shape, got {tuple(first.shape)} and {tuple(tensor.shape)}"
            )


def as_float32(parameters: Sequence[Tensor], device: str | torch.device) -> list[Tensor]:
    """Parameters of loaded models, detached, float32, on `device`; `ValueError` if not floats."""
    for parameter in parameters:
        if not isinstance(parameter, Tensor) or not parameter.is_floating_point():
            kind = parameter.dtype if isinstance(parameter, Tensor) else type(parameter).__name__
            raise ValueError(
                f"parameters must be float tensors, got {kind}. Quantized weights cannot be merged"
            )
    return [parameter.detach().to(device=device, dtype=torch.float32) for parameter in parameters]


def check_count(name: str, values: Sequence[float], tensors: Sequence[Tensor]) -> None:
    """Raise `ValueError` unless there is one value for each tensor."""
    if len(values) != len(tensors):
        raise ValueError(
            f"{name} must have one entry per model, got {len(values)} for {len(tensors)} models"
        )


def check_t(t: float) -> None:
    """Raise `ValueError` unless `t` is in [0, 1]."""
    if not 0.0 <= t <= 1.0:
        raise ValueError(f"t must be in [0, 1] (0 is the first model, 1 the second), got {t}")


def check_lam(lam: float) -> None:
    """Raise `ValueError` unless `lam` is a number of a magnitude in range."""
    if not abs(lam) <= LARGEST:
        raise ValueError(f"lam must be a number up to {LARGEST:g} in magnitude, got {lam}")


def select(mask: Tensor, values: Tensor) -> Tensor:
    """`values` where `mask`, 0.0 elsewhere: `torch.where(mask, values, 0.0)`, several times faster.

    Works on the bits, so what is left out is +0.0 whatever it was (a product with the mask
    would leave -0.0 and NaN).

    Args:
        mask: bool.
        values: float32, same shape.

    >>> select(torch.tensor([True, False, False]), torch.tensor([-2.0, -3.0, math.nan]))
    tensor([-2.,  0.,  0.])
    """
    return (values.view(torch.int32) & -mask.int()).view(torch.float32)


def run_sums(values: Tensor) -> list[float]:
    """Sums of `values` over runs of at most 2**14 elements that do not cross a row.

    Args:
        values: any shape, float64. A row is one entry of the first axis; a vector is one row.

    Returns:
        One number per run. `math.fsum` over the runs of all blocks of a tensor gives the
        same total, to the bit, for every way to cut the tensor between rows.

    >>> run_sums(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64))
    [3.0, 7.0]
    """
    if values.numel() == 0:
        return []
    rows = values.reshape(values.shape[0] if values.dim() > 1 else 1, -1)
    sums = [rows[:, start : start + RUN].sum(dim=1) for start in range(0, rows.shape[1], RUN)]
    total: list[float] = torch.stack(sums).flatten().tolist()
    return total
