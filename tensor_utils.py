"""What all merge math on tensors shares: checks, and sums that do not depend on the blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from scalar_utils import LANES, RUN


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


def select(mask: Tensor, values: Tensor) -> Tensor:
    """`values` where `mask`, 0.0 elsewhere: `torch.where(mask, values, 0.0)`, several times faster.

    Works on the bits, so what is left out is +0.0 whatever it was (a product with the mask
    would leave -0.0 and NaN).

    Args:
        mask: bool.
        values: float32, same shape.

    >>> select(torch.tensor([True, False, False]), torch.tensor([-2.0, -3.0, float("nan")]))
    tensor([-2.,  0.,  0.])
    """
    return (values.view(torch.int32) & -mask.int()).view(torch.float32)


def rows_of(tensor: Tensor) -> Tensor:
    """A tensor as a matrix: a row is one entry of its first axis; a vector or number is one row.

    >>> rows_of(torch.zeros(2, 3, 4)).shape, rows_of(torch.zeros(3)).shape
    (torch.Size([2, 12]), torch.Size([1, 3]))
    """
    return tensor.reshape(tensor.shape[0] if tensor.dim() > 1 else 1, -1)


def run_sums(values: Tensor) -> list[float]:
    """Sums of `values` over runs of at most 2**14 elements that do not cross a row.

    The order of the additions is laid down, so that it can be the same everywhere: element j of
    a run goes to lane `j % 256`, each lane is summed from its first element on, then the upper
    half of the lanes is added to the lower half until one is left.

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
    rows = rows_of(values)
    sums = [_lane_sums(rows[:, start : start + RUN]) for start in range(0, rows.shape[1], RUN)]
    total: list[float] = torch.stack(sums, dim=1).flatten().tolist()
    return total


def _lane_sums(runs: Tensor) -> Tensor:
    """Sum of each row of at most 2**14 elements, in the order that `run_sums` lays down."""
    steps = pad(runs, (0, -runs.shape[1] % LANES)).view(len(runs), -1, LANES)
    lanes = steps[:, 0]
    for step in range(1, steps.shape[1]):
        lanes = lanes + steps[:, step]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]
