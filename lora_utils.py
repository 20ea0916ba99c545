"""LoRA: the change of a matrix as the product of two thin ones, B (out, r) times A (r, in).

Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1; rank stabilisation: Kalajdzievski 2023
(arXiv:2312.03732); DoRA: Liu et al. 2024 (arXiv:2402.09353), section 4.1. Adapters by concatenation
and by SVD: as PEFT's `add_weighted_adapter`.

What is computed for every row of a model goes in a fixed order, so that it does not depend on how
many rows are computed at once. `lora_delta` and `fold_dora` take arrays of numpy too, which give
the same bits.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Factors(NamedTuple):
    """The two factors of a change; it is `lora_B @ lora_A`.

    Attributes:
        lora_A: shape (r, in), float32.
        lora_B: shape (out, r), float32.
    """

    lora_A: "Tensor"  # noqa: N815 (the field's names)
    lora_B: "Tensor"  # noqa: N815

    @property
    def rank(self) -> int:
        """r."""
        return self.lora_A.shape[0]


def lora_scale(lora_rank: int, lora_alpha: float, *, rslora: bool = False) -> float:
    """What the product of the factors is multiplied by: alpha / r, or alpha / sqrt(r).

    Args:
        lora_rank: r, at least 1.
        lora_alpha: alpha.
        rslora: whether the adapter is rank-stabilised.

    Raises:
        ValueError: the rank is below 1.

    >>> lora_scale(16, 32), lora_scale(16, 32, rslora=True)
    (2.0, 8.0)
    """
    if lora_rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {lora_rank}")
    return lora_alpha / (math.sqrt(lora_rank) if rslora else lora_rank)


def lora_delta(lora_A: Any, lora_B: Any, scale: float = 1.0) -> Any:  # noqa: N803
    """The change that an adapter makes to a matrix: `scale * lora_B @ lora_A`.

    The products are added up by rank, from the first to the last, each rounded to float32.

    Args:
        lora_A: shape (r, in), float32; a torch tensor or a numpy array.
        lora_B: shape (out, r), of the same kind.
        scale: see `lora_scale`; times the strength of the adapter, of any sign.

    Returns:
        Shape (out, in), float32.

    Raises:
        ValueError: the factors do not fit each other.

    >>> import torch
    >>> lora_delta(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[1.0], [0.0]]), 2.0)
    tensor([[2., 4., 0.],
            [0., 0., 0.]])
    """
    _check_factors(lora_A, lora_B)
    product = lora_B[:, :1] * lora_A[:1]
    for index in range(1, lora_A.shape[0]):
        product += lora_B[:, index : index + 1] * lora_A[index : index + 1]
    product *= scale
    return product


def _check_factors(lora_A: Any, lora_B: Any) -> None:  # noqa: N803
    a, b = tuple(lora_A.shape), tuple(lora_B.shape)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] < 1:
        raise ValueError(f"lora_A must be (r, in) and lora_B (out, r), got {a} and {b}")


def fold_lora(
    weight: "Tensor", deltas: "Sequence[Tensor]", *, round_delta: bool = False
) -> "Tensor":
    """A matrix with the changes of adapters.

    Args:
        weight: shape (out, in), any float dtype.
        deltas: from `lora_delta`, of each adapter, shape (out, in).
        round_delta: round each change, and each sum, to the dtype of `weight`, as PEFT does with
            adapters of that dtype.

    Returns:
        Shape (out, in); float32, or with `round_delta` the dtype of `weight`.

    >>> import torch
    >>> weight, delta = torch.ones(1, 2, dtype=torch.bfloat16), torch.tensor([[0.001, 0.01]])
    >>> fold_lora(weight, [delta])
    tensor([[1.0010, 1.0100]])
    >>> fold_lora(weight, [delta], round_delta=True)
    tensor([[1.0000, 1.0078]], dtype=torch.bfloat16)
    """
    folded = weight.clone() if round_delta else weight.float()
    for delta in deltas:
        folded = folded + delta.to(folded.dtype)
    return folded


def fold_dora(
    weight: Any,
    delta: Any,
    magnitude: Any,
    norms: Any = None,
    strength: float = 1.0,
    rounded: Callable[[Any], Any] = lambda values: values,
) -> Any:
    """A matrix with the change of a DoRA adapter: its rows turned by LoRA, at learned lengths.

    `W' = magnitude / |W + delta| * (W + delta)`; with another strength than 1, that much of the
    way from W to W'. Rows of zeros stay what they are.

    Args:
        weight: shape (out, in), float32; a torch tensor or a numpy array. Of an embedding, whose
            lengths are those of columns, the transposed one.
        delta: from `lora_delta`; shape (out, in).
        magnitude: shape (out,), float32.
        norms: lengths of the rows of `weight + delta`, float64, where they are known.
        strength: of the adapter.
        rounded: rounds what is computed on the way, as PEFT does in 16 bits; by default nothing is.

    Returns:
        Shape (out, in), float32.

    >>> import torch
    >>> fold_dora(
    ...     torch.tensor([[3.0, 4.0], [0.0, 1.0]]),
    ...     torch.tensor([[0.0, 0.0], [0.0, 1.0]]),
    ...     torch.tensor([10.0, 1.0]),
    ... )
    tensor([[6., 8.],
            [0., 1.]])
    """
    turned = rounded(weight + delta)
    norms = rounded(_as_float32(row_norms(turned) if norms is None else norms))
    # A row of zeros has no direction: its length is taken as its magnitude.
    known = norms != 0
    factors = rounded(_as_float32((magnitude * known + ~known) / (norms * known + ~known)))
    folded = rounded(turned * factors[:, None])
    return folded if strength == 1.0 else weight + (folded - weight) * strength


def row_norms(values: Any) -> Any:
    """Lengths of rows, in float64; the squares are added up pairwise, in a fixed order.

    Args:
        values: shape (rows, length), of torch or numpy.

    Returns:
        Shape (rows,), float64.
    """
    squares = _as_float64(values) ** 2
    while squares.shape[1] > 1:
        half = squares.shape[1] // 2
        sums = squares[:, :half] + squares[:, half : 2 * half]
        if squares.shape[1] % 2:
            sums[:, 0] += squares[:, -1]
        squares = sums
    return _roots(squares[:, 0])


def _roots(values: Any) -> Any:
    """Square roots of float64, rounded as IEEE 754 wants: torch's are not, on some processors."""
    if not hasattr(values, "cpu"):
        return values**0.5
    import torch

    return torch.from_numpy(values.cpu().numpy() ** 0.5).to(values.device)


def _as_float32(values: Any) -> Any:
    return values.float() if hasattr(values, "float") else values.astype("float32")


def _as_float64(values: Any) -> Any:
    return values.double() if hasattr(values, "double") else values.astype("float64")


def cat_factors(factors: Sequence[Factors], multipliers: Sequence[float]) -> Factors:
    """Several changes as one, exactly: the factors side by side.

    Args:
        factors: of each change; their ranks may differ.
        multipliers: of each change, scale and weight together; any sign.

    Returns:
        Factors of `sum multiplier_i B_i A_i`, whose rank is the sum of the ranks.
    """
    import torch

    scaled = [each.lora_A.float() * by for each, by in zip(factors, multipliers, strict=True)]
    return Factors(torch.cat(scaled), torch.cat([each.lora_B.float() for each in factors], dim=1))


def linear_factors(factors: Sequence[Factors], multipliers: Sequence[float]) -> Factors:
    """What PEFT calls a linear combination: the factors are added, not the changes.

    With `m_i` the multipliers: `A = sum sign(m_i) sqrt|m_i| A_i`, `B = sum sqrt|m_i| B_i`. Their
    product also has the terms `B_i A_j`, so it is an approximation of nothing in particular; two
    equal adapters at 0.5 each give twice the change.

    Raises:
        ValueError: the ranks differ.
    """
    if len({each.rank for each in factors}) > 1:
        ranks = ", ".join(str(each.rank) for each in factors)
        raise ValueError(f"linear needs adapters of one rank, got {ranks}")
    roots = [math.sqrt(abs(by)) for by in multipliers]
    signed = [math.copysign(root, by) for root, by in zip(roots, multipliers, strict=True)]
    pairs = [*zip(factors, signed, roots, strict=True)]
    lora_a = sum(each.lora_A.float() * sign for each, sign, _ in pairs)
    lora_b = sum(each.lora_B.float() * root for each, _, root in pairs)
    return Factors(lora_a, lora_b)  # type: ignore[arg-type]


class Truncated(NamedTuple):
    """Factors of a lower rank, and what they lack.

    Attributes:
        factors: B and A, which share the singular values' square roots.
        error: norm of what is missing, by the norm of the whole; in [0, 1].
        norm: of the whole.
    """

    factors: Factors
    error: float
    norm: float


def truncate_factors(factors: Factors, rank: int) -> Truncated:
    """The nearest change of a lower rank, by singular values.

    `B = Q_b R_b`, `A^T = Q_a R_a`, and the singular values of `R_b R_a^T` are those of the whole,
    so no dense matrix is made. In float64; optimal in the Frobenius norm (Eckart and Young 1936).

    Args:
        factors: of the change.
        rank: of the result, at least 1; more than there are changes nothing.
    """
    import torch

    q_b, r_b = torch.linalg.qr(factors.lora_B.double())
    q_a, r_a = torch.linalg.qr(factors.lora_A.double().T)
    u, values, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    rank = min(_checked_rank(rank), len(values))
    roots = values[:rank].sqrt()
    kept = Factors(
        (roots[:, None] * (v[:rank] @ q_a.T)).float(), (q_b @ u[:, :rank] * roots).float()
    )
    norm, missing = values.square().sum().sqrt(), values[rank:].square().sum().sqrt()
    return Truncated(kept, float(missing / norm) if norm > 0 else 0.0, float(norm))


def factorise(
    delta: "Tensor", *, rank: int | None = None, max_error: float | None = None
) -> Truncated:
    """A dense change as factors: its leading singular vectors.

    By the eigenvectors of the smaller of `delta delta^T` and `delta^T delta`, in float64; the
    other factor is what the change makes of them, so even a direction that is found inexactly loses
    nothing of it.

    Args:
        delta: shape (out, in).
        rank: of the factors, at least 1; at most the smaller side is used.
        max_error: instead, the largest error allowed (see `Truncated`), in [0, 1): the smallest
            rank that keeps it, 1 at least. With both, whichever is smaller.

    Raises:
        ValueError: neither is given, or one is out of range.
    """
    import torch

    if rank is None and max_error is None:
        raise ValueError("factorise needs a rank or a max_error")
    if max_error is not None and not 0 <= max_error < 1:
        raise ValueError(f"max_error must be in [0, 1), got {max_error}")
    wide = delta.shape[0] <= delta.shape[1]
    matrix = (delta if wide else delta.T).double()
    energies, vectors = torch.linalg.eigh(matrix @ matrix.T)
    energies, vectors = energies.flip(0).clamp(min=0), vectors.flip(1)
    count = len(energies) if rank is None else min(_checked_rank(rank), len(energies))
    whole = float(matrix.square().sum())
    left = (energies.sum() - energies.cumsum(0)).clamp(min=0)
    if max_error is not None:
        enough = (left <= max_error**2 * energies.sum()).nonzero()
        count = min(count, int(enough[0]) + 1 if len(enough) else len(energies))
    vectors = vectors[:, :count]
    others = vectors.T @ matrix
    values = others.square().sum(dim=1).sqrt()
    roots = torch.where(values > 0, values, 1).sqrt()
    vectors, others = (vectors * roots).float(), (others / roots[:, None]).float()
    factors = Factors(others, vectors) if wide else Factors(vectors.T, others.T)
    factors = Factors(*(each.contiguous() for each in factors))
    missing = max(0.0, whole - float(values.square().sum()))
    return Truncated(factors, math.sqrt(missing / whole) if whole else 0.0, math.sqrt(whole))


def _checked_rank(rank: int) -> int:
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    return rank
