"""The arithmetic of the methods on blocks, by the torch functions of `*_utils`, on any device."""

import contextlib
import functools
import operator
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from gram_utils import Gram, gram_pairs
from merge_operations import (
    FINE_BINS,
    Counts,
    CutRows,
    Cuts,
    Drop,
    DropByRank,
    FineCounts,
    Finish,
    Importance,
    Quantity,
    RunSums,
    Select,
    Sparsify,
    Take,
    TaskVectorMerge,
    coarse_gather,
    counts_gather,
    fine_gather,
    run_sums_gather,
    segments_gather,
    window,
)
from merge_stream import Block, Gather

if TYPE_CHECKING:
    import torch
    from torch import Tensor

State = Counts | None


class TorchOperations:
    """The functions of `*_utils` on blocks.

    On a GPU, memory is pinned and every thread has a stream of its own, so that copies and
    arithmetic of different blocks overlap. When the GPU's memory runs out, a warning says so and
    the rest is computed on the CPU.

    Args:
        device: such as "cpu" or "cuda".
        finish: what is done to every merged value.
    """

    _lock = threading.Lock()
    _users = 0
    _torch_threads = 1

    def __init__(self, device: str = "cpu", finish: Finish | None = None) -> None:
        self._device_name = device
        self._local = threading.local()
        self._finish = finish or Finish()

    @functools.cached_property
    def _torch(self) -> Any:
        """The package, imported when it is needed: compiled loops can do without."""
        import torch

        return torch

    @functools.cached_property
    def _device(self) -> "torch.device":
        device: torch.device = self._torch.device(self._device_name)
        return device

    @functools.cached_property
    def _dtypes(self) -> "dict[str, torch.dtype]":
        torch = self._torch
        return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

    def __enter__(self) -> Self:
        with TorchOperations._lock:  # torch's setting is one for the process, whose merges share it
            if TorchOperations._users == 0:
                TorchOperations._torch_threads = self._torch.get_num_threads()
            TorchOperations._users += 1
        return self

    def __exit__(self, *_: object) -> None:
        with TorchOperations._lock:
            TorchOperations._users -= 1
            if TorchOperations._users == 0:
                self._torch.set_num_threads(TorchOperations._torch_threads)

    def start_thread(self) -> None:
        """Each thread computes on its own, without torch's threads inside."""
        self._torch.set_num_threads(1)

    def memory(self, size: int) -> NDArray[np.uint8]:
        """Memory for a thread's blocks, pinned where a GPU copies from it."""
        memory = self._torch.empty(
            size, dtype=self._torch.uint8, pin_memory=self._device.type == "cuda"
        )
        array: NDArray[np.uint8] = memory.numpy()
        return array

    def broken_inputs(self, block: Block) -> list[int]:
        """Which inputs hold NaN or infinity."""
        inputs = self._run(lambda: [self._all_finite(values) for values in self._inputs(block)])
        return [index for index, finite in enumerate(inputs) if not finite]

    def result_is_finite(self, block: Block) -> bool:
        """Whether the result, as it was rounded, holds no NaN and no infinity."""
        return self._all_finite(self._stored(block, -1))

    # Merging

    def linear(self, weights: Sequence[float], *, normalize: bool) -> Take:
        """`linear_utils.linear`."""
        from linear_utils import linear

        return self._merging(lambda inputs: linear(inputs, weights, normalize=normalize))

    def combine(self, coefficients: Sequence[float]) -> Take:
        """`linear_utils.combine`."""
        from linear_utils import combine

        return self._merging(lambda inputs: combine(coefficients, inputs))

    def combine_rows(
        self, coefficients: Callable[[Gram], Sequence[float]], *, deltas: bool
    ) -> Take:
        """`linear_utils.combine_rows`, with what follows from the dot products of each row."""
        from linear_utils import combine_rows
        from slerp_utils import row_grams

        def combined(base: "Tensor | None", tensors: "list[Tensor]") -> "Tensor":
            each = [list(coefficients(gram)) for gram in row_grams(tensors)]
            multipliers = self._torch.tensor(each, dtype=self._torch.float32, device=self._device)
            merged = combine_rows(multipliers, tensors)
            return merged if base is None else base + merged

        return self._merging_from(combined, deltas=deltas)

    def combine_columns(self, coefficients: NDArray[np.float32], *, deltas: bool) -> Take:
        """As `combine_rows`, with numbers for every column."""
        from linear_utils import combine_rows

        def combined(base: "Tensor | None", tensors: "list[Tensor]") -> "Tensor":
            multipliers = self._torch.from_numpy(coefficients).to(self._device).T
            merged = combine_rows(multipliers, [tensor.T for tensor in tensors]).T
            return merged if base is None else base + merged

        return self._merging_from(combined, deltas=deltas)

    def copy(self) -> Take:
        """The first input as it is, not finished."""

        def take(block: Block, _: object) -> None:
            self._run(lambda: self._store(block, self._inputs(block)[0]))

        return take

    def scale(self, factor: float | None) -> Take:
        """`linear_utils.scale`."""
        from linear_utils import scale

        return self._merging(lambda inputs: scale(inputs[0], factor))

    def nearswap(self, t: float) -> Take:
        """`linear_utils.nearswap`."""
        from linear_utils import nearswap

        return self._merging(lambda inputs: nearswap(inputs[0], inputs[1], t))

    def fuse(self, score: Importance, threshold: float) -> Take:
        """`arcee_fusion_utils.fuse`."""
        from arcee_fusion_utils import fuse

        def work(block: Block) -> None:
            base, tensor = self._inputs(block)
            self._put(block, fuse(base, tensor, self._divergence(block, score), threshold))

        def take(block: Block, _: object) -> None:
            self._run(lambda: work(block))

        return take

    def merge_active(self, epsilon: float, factors: Sequence[float], lam: float) -> Take:
        """`ram_utils.merge_active`, scaled and added to the base."""
        from linear_utils import add_task_vector
        from ram_utils import merge_active

        def merged(base: "Tensor | None", deltas: "list[Tensor]") -> "Tensor":
            assert base is not None
            return add_task_vector(base, merge_active(deltas, epsilon, factors), lam)

        return self._merging_from(merged, deltas=True)

    def merge_task_vectors(self, merge: TaskVectorMerge) -> Take:
        """Sparsify, weight, elect, combine, scale, add the base."""
        from consensus_utils import keep_consensus
        from linear_utils import add_task_vector, combine_deltas
        from ties_utils import elect_and_combine

        def combined(sparse: "list[Tensor]") -> "Tensor":
            election = merge.election
            if election is None:
                return combine_deltas(sparse, merge.weights, normalize=merge.normalize)
            return elect_and_combine(
                sparse,
                merge.weights,
                denominator=election.denominator,
                elect_on=election.on,
                elect_method=election.method,
                zero=election.zero,
            )

        def found(block: Block, state: State) -> None:
            base, deltas = self._deltas(block)
            delta = combined(self._sparsify(block, deltas, merge.sparsify, state))
            if merge.consensus is not None:
                consensus = merge.consensus
                delta = keep_consensus(delta, deltas, consensus.mask_lambdas, consensus.agreement)
            self._put(block, add_task_vector(base, delta, merge.lam))

        def take(block: Block, state: State) -> None:
            self._advance(lambda own: found(block, own), state)

        return take

    # Gathering

    def gram_parts(self, *, deltas: bool, first: int | None = None) -> Gather:
        """`slerp_utils.gram_parts` of the inputs, or of the task vectors."""
        from slerp_utils import gram_parts

        def found(block: Block) -> list[list[float]]:
            tensors = self._deltas(block)[1] if deltas else self._inputs(block)
            return gram_parts(tensors[:first])

        def take(block: Block, sums: RunSums, _: object) -> bool:
            return sums.append(self._run(lambda: found(block)))

        return run_sums_gather(take, tells_finite=first is None)

    def row_divergence(self, rows: int) -> Gather:
        """`arcee_fusion_utils.row_divergence` of all rows of a tensor."""
        from arcee_fusion_utils import row_divergence

        def take(block: Block, found: NDArray[np.float32], _: object) -> None:
            divergence = self._run(lambda: row_divergence(*self._inputs(block)).cpu().numpy())
            found[block.first : block.first + block.rows] = divergence

        return Gather(lambda _: np.zeros(rows, dtype=np.float32), take, operator.iadd)

    def column_grams(self, *, deltas: bool) -> Gather:
        """Dot products of the columns of two models, or task vectors: (3, columns)."""
        from slerp_utils import column_grams

        def found(block: Block, sums: "list[Tensor]") -> "list[Tensor]":
            tensors = self._deltas(block)[1] if deltas else self._inputs(block)
            return [column_grams(tensors, *sums)]

        def take(block: Block, sums: "list[Tensor]", _: object) -> None:
            sums[:] = self._run(lambda: found(block, sums))

        return Gather(lambda _: [], take, lambda sums, others: sums + others)

    def norm_parts(
        self,
        sparsify: Sparsify,
        power: int,
        start_segment: Callable[[int], State] = lambda _: None,
    ) -> Gather:
        """Run sums of |delta| ** power per model, then of what is kept of each."""
        from dare_utils import absolute_parts
        from sce_utils import square_parts

        parts = absolute_parts if power == 1 else square_parts
        if not isinstance(sparsify, CutRows | Select):
            sparsify = replace(sparsify, factors=(1.0,) * len(sparsify.factors))

        def found(block: Block, state: State) -> list[list[float]]:
            deltas = self._deltas(block)[1]
            sparse = self._sparsify(block, deltas, sparsify, state)
            return [parts(delta) for delta in (*deltas, *sparse)]

        def take(block: Block, sums: RunSums, state: State) -> None:
            sums.append(self._advance(lambda own: found(block, own), state))

        return run_sums_gather(take, start_segment)

    def count_active(self, epsilon: float, models: int) -> Gather:
        """`ram_utils.count_active`."""
        from ram_utils import count_active

        def take(block: Block, counts: Counts, _: object) -> None:
            counts += self._run(lambda: np.array(count_active(self._deltas(block)[1], epsilon)))

        return counts_gather((models, 2), take)

    def count_conflicts(self, thresholds: Sequence[int]) -> Gather:
        """`ties_utils.count_conflicts` of the task vectors."""
        from ties_utils import count_conflicts

        def take(block: Block, counts: Counts, _: object) -> None:
            counts += self._run(
                lambda: np.array(count_conflicts(self._deltas(block)[1], thresholds))
            )

        return counts_gather((len([*gram_pairs(len(thresholds))]) + 1, 2), take)

    def sum_signs(self, merge: TaskVectorMerge, start_segment: Callable[[int], State]) -> Gather:
        """Sum of the elected signs, those that balance counting 0."""
        from ties_utils import elect_sign

        election = merge.election
        assert election is not None

        def found(block: Block, state: State) -> int:
            votes = self._sparsify(block, self._deltas(block)[1], merge.sparsify, state)
            if election.on == "weighted":
                votes = [vote * weight for vote, weight in zip(votes, merge.weights, strict=True)]
            signs = elect_sign(votes, method=election.method, zero=0.0)
            return int(signs.sum(dtype=self._torch.float64))

        def take(block: Block, counts: Counts, state: State) -> None:
            counts += self._advance(lambda own: found(block, own), state)

        return counts_gather((1,), take, start_segment)

    def coarse_histograms(
        self, which: Sequence[int], of: Quantity = "deltas", *, sample: bool = False
    ) -> Gather:
        """`ties_utils.coarse_histogram` of some quantities."""
        from ties_utils import coarse_histogram

        def found(block: Block) -> Counts:
            quantities = self._quantities(block, of)
            return np.stack([coarse_histogram(quantities[each]).cpu().numpy() for each in which])

        def take(block: Block, counts: Counts, _: object) -> None:
            counts += self._run(lambda: found(block))

        return coarse_gather(len(which), take, sample=sample)

    def fine_histograms(
        self,
        guesses: Sequence[tuple[int, int]],
        of: Quantity = "deltas",
        *,
        sample: bool = False,
    ) -> Gather:
        """`ties_utils.fine_histogram` of some quantities, around guesses."""
        from ties_utils import fine_histogram, magnitude_bits

        def found(block: Block) -> list[tuple[Counts, int, list[int]]]:
            quantities = self._quantities(block, of)
            counts = []
            for which, guess in guesses:
                lowest, bits = window(guess), magnitude_bits(quantities[which])
                bins = fine_histogram(quantities[which], lowest).cpu().numpy()
                above = int((bits - lowest >= FINE_BINS).count_nonzero())
                around = [int(part.count_nonzero()) for part in (bits > guess, bits == guess)]
                counts.append((bins, above, around))
            return counts

        def take(block: Block, gathered: FineCounts, counts: Counts) -> None:
            for index, (bins, above, around) in enumerate(self._run(lambda: found(block))):
                gathered.bins[index] += bins
                gathered.above[index] += above
                counts[index] += around

        return fine_gather(len(guesses), take, sample=sample)

    def count_around(
        self, thresholds: Sequence[tuple[int, int]], of: Quantity = "deltas"
    ) -> Gather:
        """How many entries of some quantities lie above a magnitude's bits, and at it."""
        from ties_utils import magnitude_bits

        def found(block: Block) -> list[list[int]]:
            quantities = [magnitude_bits(each) for each in self._quantities(block, of)]
            pairs = [(quantities[which], bits) for which, bits in thresholds]
            return [
                [int((each > bits).count_nonzero()), int((each == bits).count_nonzero())]
                for each, bits in pairs
            ]

        def take(block: Block, counts: Counts) -> None:
            counts += np.array(self._run(lambda: found(block)))

        return segments_gather(len(thresholds), take)

    def select_bin(self, counts: Counts, rank: int) -> tuple[int, int]:
        """`ties_utils.select_bin`."""
        from ties_utils import select_bin

        return select_bin(self._torch.from_numpy(counts), rank)

    # What these are made of

    def _quantities(self, block: Block, of: Quantity) -> "list[Tensor]":
        from arcee_fusion_utils import importance
        from sce_utils import variance

        if isinstance(of, Importance):
            base, tensor = self._inputs(block)
            return [importance(base, tensor, self._divergence(block, of))]
        _, deltas = self._deltas(block)
        return deltas if of == "deltas" else [variance(deltas)]

    def _divergence(self, block: Block, score: Importance) -> "Tensor":
        """Of the block's rows."""
        rows = score.divergence[block.first : block.first + block.rows]
        divergence: Tensor = self._torch.from_numpy(rows).to(self._device)
        return divergence

    def _sparsify(
        self, block: Block, deltas: "list[Tensor]", sparsify: Sparsify | None, state: State
    ) -> "list[Tensor]":
        """What is left of the task vectors; brings the state up to the next block."""
        if isinstance(sparsify, Cuts):
            return self._cut(deltas, sparsify, state)
        if isinstance(sparsify, CutRows):
            return self._cut_rows(deltas, sparsify)
        if isinstance(sparsify, Drop):
            return self._drop(block, deltas, sparsify)
        if isinstance(sparsify, DropByRank):
            return self._drop_by_rank(block, deltas, sparsify)
        if isinstance(sparsify, Select):
            return self._select(deltas, sparsify, state)
        return deltas

    def _cut(self, deltas: "list[Tensor]", sparsify: Cuts, seen: State) -> "list[Tensor]":
        from ties_utils import count_equal, cut_apply

        assert seen is not None
        sparse = []
        for number, (delta, cut) in enumerate(zip(deltas, sparsify.cuts, strict=True)):
            lower, upper = seen[number].tolist()
            sparse.append(cut_apply(delta, cut, (lower, upper)))
            seen[number] += count_equal(delta, cut)
        return self._scaled(sparse, sparsify.factors)

    def _scaled(self, deltas: "list[Tensor]", factors: Sequence[float]) -> "list[Tensor]":
        return [delta * factor for delta, factor in zip(deltas, factors, strict=True)]

    def _cut_rows(self, deltas: "list[Tensor]", sparsify: CutRows) -> "list[Tensor]":
        from ties_utils import keep_window_of_rows

        windows = sparsify.windows(deltas[0].shape[1])
        return [
            keep_window_of_rows(
                delta, each, last_first=sparsify.last_first, all_ties=sparsify.all_ties
            )
            for delta, each in zip(deltas, windows, strict=True)
        ]

    def _drop(self, block: Block, deltas: "list[Tensor]", drop: Drop) -> "list[Tensor]":
        from dare_utils import drop as drop_entries

        kept = [
            drop_entries(delta, density, key, block.start)
            for delta, density, key in zip(deltas, drop.densities, drop.keys, strict=True)
        ]
        return self._scaled(kept, drop.factors)

    def _drop_by_rank(
        self, block: Block, deltas: "list[Tensor]", drop: DropByRank
    ) -> "list[Tensor]":
        from della_utils import drop_by_rank

        settings = zip(drop.densities, drop.epsilons, drop.keys, strict=True)
        kept = [
            drop_by_rank(delta, *setting, block.start, drop.rescale)
            for delta, setting in zip(deltas, settings, strict=True)
        ]
        return self._scaled(kept, drop.factors)

    def _select(self, deltas: "list[Tensor]", sparsify: Select, seen: State) -> "list[Tensor]":
        from sce_utils import variance
        from tensor_utils import select
        from ties_utils import count_equal, cut_mask

        assert seen is not None
        spread = variance(deltas)
        lower, upper = seen[0].tolist()
        chosen = cut_mask(spread, sparsify.cut, (lower, upper))
        seen[0] += count_equal(spread, sparsify.cut)
        return [select(chosen, delta) for delta in deltas]

    def _merging(self, function: "Callable[[list[Tensor]], Tensor]") -> Take:
        def take(block: Block, _: object) -> None:
            self._run(lambda: self._put(block, function(self._inputs(block))))

        return take

    def _merging_from(
        self, function: "Callable[[Tensor | None, list[Tensor]], Tensor]", *, deltas: bool
    ) -> Take:
        """As `_merging`, of the task vectors, with the base, or of the inputs, without."""

        def take(block: Block, _: object) -> None:
            def work() -> None:
                base, tensors = self._deltas(block) if deltas else (None, self._inputs(block))
                self._put(block, function(base, tensors))

            self._run(work)

        return take

    def _stored(self, block: Block, index: int) -> "Tensor":
        """An input (or the result, -1) as torch sees it, in the block's memory."""
        stored = self._torch.from_numpy(block.stored(index).view(np.uint8))
        values: Tensor = stored.view(self._dtypes[block.layout.dtypes[index]])
        return values

    def _inputs(self, block: Block) -> "list[Tensor]":
        """The inputs in float32 on the device."""
        return [
            self._stored(block, index)
            .to(self._device, non_blocking=True)
            .to(self._torch.float32, copy=False)
            for index in range(len(block.layout.dtypes) - 1)
        ]

    def _deltas(self, block: Block) -> "tuple[Tensor, list[Tensor]]":
        """The base and the task vectors, on the device."""
        base, *models = self._inputs(block)
        return base, [model - base for model in models]

    def _put(self, block: Block, merged: "Tensor") -> None:
        """Finish what is merged, and store it."""
        from linear_utils import finish

        self._store(block, finish(merged, self._finish.weight_decay, self._finish.clamp_range))

    def _store(self, block: Block, values: "Tensor") -> None:
        """Round once to the output's dtype, and bring it to the block's memory."""
        result = self._stored(block, -1)
        result.copy_(values.to(result.dtype))

    def _all_finite(self, values: "Tensor") -> bool:
        """A sum that is finite says so at a fraction of the cost; one that is not may overflow."""
        if self._torch.isfinite(values.sum(dtype=self._torch.float32)):
            return True
        return bool(self._torch.isfinite(values).all())

    def _advance(self, work: Callable[[State], Any], state: State) -> Any:
        """`_run` with the state of a segment, which changes once, however often that takes."""

        def attempt() -> tuple[Any, State]:
            own = None if state is None else state.copy()
            return work(own), own

        found, own = self._run(attempt)
        if state is not None:
            state[...] = own
        return found

    def _run(self, work: Callable[[], Any]) -> Any:
        """Do the work on the device; on the CPU, from then on, where its memory does not do."""
        try:
            with self._stream():
                return work()
        except self._torch.cuda.OutOfMemoryError as error:
            if self._device.type == "cpu":
                raise
            with TorchOperations._lock:
                if self._device.type != "cpu":
                    warnings.warn(
                        f"{self._device} has too little memory for a block "
                        f"({str(error).splitlines()[0]}). The rest is computed on the CPU",
                        stacklevel=2,
                    )
                    self._device = self._torch.device("cpu")
            return work()

    @contextlib.contextmanager
    def _stream(self) -> Iterator[None]:
        """The thread's own stream of work on a GPU."""
        if self._device.type != "cuda":
            yield
            return
        if not hasattr(self._local, "stream"):
            self._local.stream = self._torch.cuda.Stream(self._device)
        with self._torch.cuda.stream(self._local.stream):
            yield
            self._local.stream.synchronize()
