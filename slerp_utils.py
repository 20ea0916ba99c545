"""Spherical interpolation of two tensors, and the dot products that it needs.

Pure tensor math, split in the way that a large tensor needs: `dot_parts` gathers from any
rows, `slerp_coefficients` turns the three sums into two numbers, and
`linear_utils.combine` applies them to any rows. `slerp` is the three together.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from linear_utils import combine, fold_in
from scalar_utils import SlerpCoefficients, slerp_coefficients
from tensor_utils import check_tensors, run_sums


def dot_parts(a: Tensor, c: Tensor) -> list[list[float]]:
    """Run sums of `<a, a>`, `<c, c>` and `<a, c>`, in float64 from the products on.

    Args:
        a, c: some whole rows of two tensors, float32, same shape.

    Returns:
        Three lists. Lists of several blocks are joined; `math.fsum` of each is the dot product.
    """
    check_tensors([a, c])
    wide_a, wide_c = a.double(), c.double()
    return [run_sums(x * y) for x, y in ((wide_a, wide_a), (wide_c, wide_c), (wide_a, wide_c))]


def slerp(a: Tensor, c: Tensor, t: float, *, dot_threshold: float = 0.9995) -> Tensor:
    """Spherical interpolation from `a` (t = 0) to `c` (t = 1), both taken as flat vectors.

    Args:
        a, c: float32, same shape.
        t: in [0, 1].
        dot_threshold: above this |cosine| the straight line is taken instead.

    Returns:
        Same shape, float32.

    Raises:
        ValueError: `t` is outside [0, 1], or shapes or dtypes do not fit.

    >>> import torch
    >>> slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]), 0.5)
    tensor([0.7071, 1.4142])
    """
    aa, cc, ac = (math.fsum(part) for part in dot_parts(a, c))
    coefficients = slerp_coefficients(aa, cc, ac, t, dot_threshold=dot_threshold)
    return apply_slerp(coefficients, [a, c])


def apply_slerp(coefficients: SlerpCoefficients, tensors: Sequence[Tensor]) -> Tensor:
    """`first * a + second * c` for any rows of the two tensors (float32, same shape)."""
    return combine([coefficients.first, coefficients.second], tensors)


def sequential_slerp(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Fold models in one by one: step k goes `w_k / (w_1 + ... + w_k)` of the way to model k.

    The result depends on the order of the models.

    Args:
        tensors: float32, all of one shape.
        weights: one number per tensor, not negative, the first above 0.

    Returns:
        Same shape, float32; the intermediate results are not rounded to any other dtype.

    Raises:
        ValueError: counts, shapes or dtypes do not fit; or a weight is out of range.

    >>> import torch
    >>> sequential_slerp(list(torch.eye(3)), [1.0, 1.0, 1.0])
    tensor([0.6124, 0.6124, 0.5000])
    """
    return fold_in(tensors, weights, slerp)
