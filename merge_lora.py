"""A base with LoRA adapters on top, as a model whose rows are computed when they are read.

Nothing is folded beforehand, on the disk or in memory: a block of rows of W + s B A takes these
rows of W, these rows of B, and A.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_utils import fold_dora, lora_delta, row_norms
from merge_operations import numba_problem
from model_checks import EMBEDDING, HEAD, is_tied, model_problems
from model_config import merged_config, read_config
from model_errors import AdapterGivenError, ModelCompatibilityError, refusal
from model_locate import AdapterName, adapter_name, last_part, split_adapters
from model_lora import (
    AdapterFolder,
    Change,
    LoraSettings,
    LowRank,
    Tying,
    changes_of,
    is_saved,
    open_adapter,
)
from model_rows import float_rows, same_values
from model_safetensors import FLOAT_DTYPES, TensorInfo, narrow, widen
from model_tokenizer import has_tokenizer
from model_utils import ModelFolder, Origin, WeightFile, open_model_folder, rows_of

Floats = NDArray[np.float32]

NORM_ROWS = 64
"""Rows of an embedding squared and added up at once; fixed, as sums must not depend on blocks."""


class _Step(NamedTuple):
    """What one adapter does to a tensor.

    Attributes:
        adapter: an open adapter.
        strength: its change is multiplied by this.
        change: what it does.
    """

    adapter: AdapterFolder
    strength: float
    change: Change


class _Adapted(NamedTuple):
    """A tensor that adapters change.

    Attributes:
        of_base: the base's tensor that they change; None begins with zeros.
        steps: one for each adapter that does something to it.
    """

    of_base: str | None
    steps: tuple[_Step, ...]


class _Product(NamedTuple):
    """The factors of a change, in memory.

    Attributes:
        left, right: (rows, r) and (r, row length).
        magnitude: of DoRA.
        column_norms: lengths of the columns of base plus change, for DoRA of an embedding.
    """

    left: Floats
    right: Floats
    magnitude: Floats | None = None
    column_norms: NDArray[np.float64] | None = None


class AdaptedModel(ModelFolder):
    """A base with adapters on top; its small files are the base's, or an adapter's tokenizer.

    Args:
        label: what the user called it.
        base: the open base.
        owns_base: whether it is closed with this model.
        adapters: open adapters, each with its strength.
        settings: how they are put on it.

    Raises:
        ModelCompatibilityError: an adapter does not fit the base, or two do not fit each other.
    """

    def __init__(
        self,
        label: str,
        base: ModelFolder,
        adapters: Sequence[tuple[AdapterFolder, float]],
        settings: LoraSettings,
        *,
        owns_base: bool = True,
    ) -> None:
        super().__init__(label, base.path)
        self._base = base
        self._adapters = [adapter for adapter, _ in adapters]
        self._owned = [*self._adapters, *([base] if owns_base else [])]
        self._rounding = settings.rounding
        self.strengths = (*base.strengths, *(strength for _, strength in adapters))
        steps, notes = _steps_by_tensor(base, adapters)
        tied = is_tied(base)
        stays_tied = tied and _share_head(steps, settings.tied)
        if tied and not stays_tied:
            notes.append(
                f"{label}: its head is no longer the embedding, because an adapter changes the two "
                "differently"
            )
        biases, of_config = _new_biases(base, steps)
        self._adapted = {
            name: _Adapted(_of_base(base, name), tuple(steps.get(name, ())))
            for name in dict.fromkeys([*steps, *biases, *([HEAD] if tied != stays_tied else [])])
        }
        self.tensors = dict(base.tensors) | {
            name: self._info(name, adapted) for name, adapted in self._adapted.items()
        }
        rows = self.tensors[EMBEDDING].shape[0]
        changes = {"vocab_size": rows, "tie_word_embeddings": stays_tied, **of_config}
        changes = {key: value for key, value in changes.items() if base.config.get(key) != value}
        if tied == stays_tied:
            changes.pop("tie_word_embeddings", None)
        self.config_text = merged_config(base.config_text, changes) if changes else base.config_text
        self.config = read_config(self.config_text)
        givers = [each for each in self._adapters if has_tokenizer(each.path)]
        self.tokenizer_path = givers[0].path if givers else base.tokenizer_path
        if givers:
            notes.append(f"{label}: tokenizer and chat template are those of {givers[0].label}")
        self.notes = (*base.notes, *notes)
        self._products: OrderedDict[tuple[str, int], _Product] = OrderedDict()
        self._locks: dict[str, threading.Lock] = {name: threading.Lock() for name in self._adapted}
        self._lock = threading.Lock()
        self._threads = threading.local()

    @property
    def files(self) -> tuple[WeightFile, ...]:
        """Those of the base and of the adapters."""
        return tuple(file for each in (self._base, *self._adapters) for file in each.files)

    @property
    def config_texts(self) -> tuple[str, ...]:
        """Those of the base and of the adapters."""
        return tuple(text for each in (self._base, *self._adapters) for text in each.config_texts)

    def check_unchanged(self) -> None:
        """As `ModelFolder.check_unchanged`, of base and adapters."""
        for each in (self._base, *self._adapters):
            each.check_unchanged()

    def _info(self, name: str, adapted: _Adapted) -> TensorInfo:
        """Dtype and shape of a tensor after it has been changed."""
        like = adapted.of_base or name.replace(".bias", ".weight")
        stored = self._base.tensors[like]
        shape = stored.shape if adapted.of_base else stored.shape[:1]
        for adapter, _, change in adapted.steps:
            if change.replaced is not None:
                shape = adapter.tensors[change.replaced].shape
        changed = any(each.change != Change() for each in adapted.steps)
        dtype = "F32" if changed and self._rounding == "none" else stored.dtype
        return TensorInfo(dtype, shape)

    @property
    def stored_tensors(self) -> Mapping[str, TensorInfo]:
        """As the base stores them."""
        return self._base.stored_tensors

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The base and the adapters."""
        own = [each for adapter in self._adapters for each in adapter.origins]
        return (*self._base.origins, *own)

    @property
    def memory_bytes(self) -> int:
        """What the factors of the largest tensors take, as many as are kept."""
        sizes = sorted(
            sum(
                4 * adapter.tensors[part].numel
                for adapter, _, change in adapted.steps
                if change.low_rank is not None
                for part in (change.low_rank.left, change.low_rank.right)
                if part is not None
            )
            for adapted in self._adapted.values()
        )
        return self._base.memory_bytes + 2 * sum(sizes[-_KEPT:])

    def read_rows(
        self, name: str, first: int, stop: int, buffer: NDArray[np.uint8]
    ) -> NDArray[Any]:
        """As `ModelFolder.read_rows`; computed now."""
        adapted = self._adapted.get(name)
        if adapted is None:
            return self._base.read_rows(name, first, stop, buffer)
        info = self.tensors[name]
        dtype, length = FLOAT_DTYPES[info.dtype], rows_of(info.shape)[1]
        target = buffer[: (stop - first) * length * dtype.itemsize].view(dtype)
        target = target.reshape(stop - first, length)
        single = info.dtype == "F32"
        values = target if single else np.empty((stop - first, length), np.float32)
        self._fill(name, adapted, first, stop, values)
        if not single:
            target[:] = narrow(values, info.dtype)
        return target

    def _fill(self, name: str, adapted: _Adapted, first: int, stop: int, values: Floats) -> None:
        """Rows of a changed tensor, in float32; what replaces comes before what is added."""
        self._read_base(adapted, first, stop, values)
        for step in adapted.steps:
            if step.change.replaced is not None:
                own = float_rows(step.adapter, step.change.replaced, first, stop)
                _replace(values, own, step.strength)
            if step.change.rows is not None:
                _replace_tokens(values, first, step)
        for number, step in enumerate(adapted.steps):
            if step.change.low_rank is not None:
                product = self._product(name, adapted, number)
                self._add(name, step, step.change.low_rank, product, first, values)
                if self._rounding == "delta":  # PEFT adds one adapter after the other
                    dtype = self.tensors[name].dtype
                    values[:] = widen(narrow(values, dtype), dtype)

    def _read_base(self, adapted: _Adapted, first: int, stop: int, values: Floats) -> None:
        """Rows of the base, in float32; zeros where it has none."""
        name = adapted.of_base
        replaced = any(
            step.change.replaced is not None and step.strength == 1.0 for step in adapted.steps
        )
        if name is None or replaced:  # what is not needed may not even be there
            values[:] = 0.0
            return
        info = self._base.tensors[name]
        size = values.size * FLOAT_DTYPES[info.dtype].itemsize
        scratch: NDArray[np.uint8] | None = getattr(self._threads, "scratch", None)
        if scratch is None or len(scratch) < size:
            scratch = self._threads.scratch = np.empty(size, np.uint8)
        widen_rows(self._base.read_rows(name, first, stop, scratch), info.dtype, values)

    def _add(
        self,
        name: str,
        step: _Step,
        low_rank: LowRank,
        product: _Product,
        first: int,
        values: Floats,
    ) -> None:
        """Add what an adapter adds to some rows."""
        left = product.left[first : first + len(values)]
        strength, rounded = step.strength, self._rounder(name)
        magnitude, norms = product.magnitude, product.column_norms
        if magnitude is None and self._rounding != "delta":
            add_low_rank(values, left, product.right, low_rank.scale * strength)
            return
        delta = np.zeros_like(values)
        by = low_rank.scale * (strength if magnitude is None else 1.0)
        add_low_rank(delta, left, product.right, by)
        delta = rounded(delta)
        if magnitude is None:
            values += delta
        elif norms is None:
            lengths = magnitude[first : first + len(values)]
            values[:] = fold_dora(values, delta, lengths, None, strength, rounded)
        else:
            values[:] = fold_dora(values.T, delta.T, magnitude, norms, strength, rounded).T

    def _rounder(self, name: str) -> Callable[[Floats], Floats]:
        """Rounds what PEFT has in the base's dtype on the way, if that is asked for."""
        if self._rounding != "delta":
            return lambda values: values
        dtype = self.tensors[name].dtype
        return lambda values: widen(narrow(np.ascontiguousarray(values), dtype), dtype)

    def _product(self, name: str, adapted: _Adapted, number: int) -> _Product:
        """The factors of a tensor's change by an adapter; those used last are kept."""
        key = name, number
        with self._lock:
            if key in self._products:
                self._products.move_to_end(key)
                return self._products[key]
        with self._locks[name]:
            found = self._products.get(key) or self._read_product(name, adapted, number)
        with self._lock:
            self._products[key] = found
            while len(self._products) > _KEPT * len(self._adapters):
                self._products.popitem(last=False)
        return found

    def _read_product(self, name: str, adapted: _Adapted, number: int) -> _Product:
        adapter, _, change = adapted.steps[number]
        assert change.low_rank is not None
        rounded = self._rounder(name)
        left, right = map(rounded, adapter.factors(change.low_rank))
        if change.low_rank.magnitude is None:
            return _Product(left, right)
        magnitude = rounded(adapter.values(change.low_rank.magnitude).reshape(-1))
        norms = None
        if change.low_rank.left_transposed:
            norms = self._column_norms(name, adapted, change, left, right)
        return _Product(left, right, magnitude, norms)

    def _column_norms(
        self, name: str, adapted: _Adapted, change: Change, left: Floats, right: Floats
    ) -> NDArray[np.float64]:
        """Lengths of the columns of an embedding with its change, before DoRA sets them."""
        assert change.low_rank is not None
        step, rounded = adapted.steps[0], self._rounder(name)
        sums = np.zeros(right.shape[1])
        for first in range(0, len(left), NORM_ROWS):
            stop = min(first + NORM_ROWS, len(left))
            values = np.empty((stop - first, right.shape[1]), np.float32)
            self._read_base(adapted, first, stop, values)
            if change.replaced is not None:
                values[:] = float_rows(step.adapter, change.replaced, first, stop)
            delta = np.zeros_like(values)
            add_low_rank(delta, left[first:stop], right, change.low_rank.scale)
            values += rounded(delta)
            sums += row_norms(np.ascontiguousarray(rounded(values).T)) ** 2
        return np.sqrt(sums)

    def read_ahead(self, name: str, first: int, stop: int) -> None:
        """Of the base; adapters are small."""
        adapted = self._adapted.get(name)
        of_base = name if adapted is None else adapted.of_base
        if of_base is not None:
            self._base.read_ahead(of_base, first, stop)

    def position(self, name: str) -> tuple[int, int]:
        """In the base."""
        adapted = self._adapted.get(name)
        return self._base.position(name if adapted is None else adapted.of_base or EMBEDDING)

    def close(self) -> None:
        """Close the adapters, and the base if it is this model's own."""
        for each in self._owned:
            each.close()


_KEPT = 8
"""Tensors whose factors are kept in memory: those that threads work on, and some more."""

LARGEST_STRENGTH = 1e30
"""Beyond it no float32 is left of any change."""


def add_low_rank(values: Floats, left: Floats, right: Floats, scale: float) -> None:
    """Add `lora_utils.lora_delta` to some rows, by a compiled loop where there is one."""
    if numba_problem():
        values += lora_delta(right, left, scale)
        return
    import merge_kernels as kernels

    kernels.add_low_rank(values, left, right, np.float32(scale))


def widen_rows(stored: NDArray[Any], dtype: str, values: Floats) -> None:
    """As `model_safetensors.widen`, into an array, by a compiled loop where it is worth it."""
    if dtype != "BF16":
        values[...] = stored
    elif numba_problem():
        values[...] = widen(stored, dtype)
    else:
        import merge_kernels as kernels

        kernels.widen_half(stored, values)


def _replace(values: Floats, own: Floats, strength: float) -> None:
    """Go so far from some values to those of an adapter."""
    values[:] = own if strength == 1.0 else values + (own - values) * np.float32(strength)


def _replace_tokens(values: Floats, first: int, step: _Step) -> None:
    """Replace the rows of the tokens that an adapter has trained."""
    assert step.change.rows is not None
    indices, name = step.change.rows
    for number, index in enumerate(indices):
        if first <= index < first + len(values):
            row = values[index - first : index - first + 1]
            _replace(row, float_rows(step.adapter, name, number, number + 1), step.strength)


def _steps_by_tensor(
    base: ModelFolder, adapters: Sequence[tuple[AdapterFolder, float]]
) -> tuple[dict[str, list[_Step]], list[str]]:
    """What adapters do to each tensor, and notes; raises what is wrong with them, all at once."""
    steps: dict[str, list[_Step]] = {}
    notes: list[str] = []
    problems: list[str] = []
    for adapter, strength in adapters:
        notes += _base_notes(adapter, base)
        try:
            changes = changes_of(adapter, base)
        except ModelCompatibilityError as error:
            problems += error.problems
            continue
        notes += changes.notes
        for name, change in changes.by_tensor.items():
            if _is_copy(adapter, base, name, change.replaced):
                change = change._replace(replaced=None)
            if change != Change():
                steps.setdefault(name, []).append(_Step(adapter, strength, change))
    problems += _conflicts(base, adapters, steps)
    if problems:
        raise refusal(problems)
    return steps, notes


def _is_copy(adapter: AdapterFolder, base: ModelFolder, name: str, replaced: str | None) -> bool:
    """Whether what an adapter has saved in the place of embedding or head is the base's own."""
    of_base = _of_base(base, name)
    if replaced is None or of_base is None or name not in (EMBEDDING, HEAD):
        return False
    if adapter.tensors[replaced].shape != base.tensors[of_base].shape:
        return False
    if any(each.download_bytes for each in (*adapter.origins, *base.origins)):
        return not is_saved(adapter.config, name.removesuffix(".weight"))  # as it most likely is
    return same_values(adapter, replaced, base, of_base)


def _base_notes(adapter: AdapterFolder, base: ModelFolder) -> Iterator[str]:
    """Says that an adapter was trained on another model than the base, as far as names tell."""
    name = adapter.base_name
    known = [origin.name for origin in base.origins[:1]]
    known += [str(base.config.get("_name_or_path") or "")]
    if name and not any(last_part(name) == last_part(other) for other in known):
        yield (
            f"{adapter.label}: says that it was trained on {name}; the base here is {base.label}. "
            "If these are not the same weights, the result is wrong"
        )


def _conflicts(
    base: ModelFolder,
    adapters: Sequence[tuple[AdapterFolder, float]],
    steps: Mapping[str, Sequence[_Step]],
) -> Iterator[str]:
    """Adapters that cannot be put on one base together, or not with such a strength."""
    turning = [adapter.label for adapter, _ in adapters if adapter.uses_dora]
    if turning and len(adapters) > 1:
        yield (
            f"{', '.join(turning)}: is a DoRA adapter, whose change depends on what it is put on, "
            f"so it cannot be put on {base.label} together with others. Merge BASE+ADAPTER models "
            "instead, such as by task arithmetic"
        )
    for name, of_tensor in steps.items():
        replacing = [each for each in of_tensor if each.change.replaced or each.change.rows]
        if len(replacing) > 1:
            labels = ", ".join(each.adapter.label for each in replacing)
            yield (
                f"{labels}: each replaces {name} (modules_to_save, trained tokens or biases), and "
                "only one can. Merge BASE+ADAPTER models instead, such as by task arithmetic"
            )
        for adapter, strength, change in replacing:
            shape = base.tensors[_of_base(base, name) or EMBEDDING].shape
            resized = change.replaced and adapter.tensors[change.replaced].shape != shape
            if resized and strength != 1.0:
                yield (
                    f"{adapter.label}: replaces {name} by another number of rows, so its strength "
                    f"must be 1, got {strength:g}"
                )


def _of_base(base: ModelFolder, name: str) -> str | None:
    """The base's tensor that stands where a tensor of the result will."""
    if name == HEAD and is_tied(base):
        return EMBEDDING
    return name if name in base.tensors else None


def _share_head(steps: dict[str, list[_Step]], tied: Tying) -> bool:
    """Whether embedding and head of a base that ties them stay one; then `HEAD` has no steps.

    If the same is done to both; or, if that is wanted, both get what is added to either.
    """
    embedding, head = steps.get(EMBEDDING, []), steps.get(HEAD, [])
    adapters = {id(each.adapter): each.adapter for each in (*embedding, *head)}
    added = []
    for adapter in adapters.values():
        ours, theirs = (
            next((each for each in of_tensor if each.adapter is adapter), None)
            for of_tensor in (embedding, head)
        )
        one, other = (Change() if each is None else each.change for each in (ours, theirs))
        if not _same_rows(adapter, one, other):
            return False
        if not _same_product(adapter, one.low_rank, other.low_rank):
            if tied == "untie":
                return False
            if theirs is not None and other.low_rank is not None:
                added.append(theirs._replace(change=Change(low_rank=other.low_rank)))
    if embedding or added:
        steps[EMBEDDING] = [*embedding, *added]
    steps.pop(HEAD, None)
    return True


def _same_rows(adapter: AdapterFolder, one: Change, other: Change) -> bool:
    """Whether the same rows of embedding and head are replaced, by the same values."""
    indices, tokens = one.rows or ((), None)
    its_indices, its_tokens = other.rows or ((), None)
    return (
        indices == its_indices
        and _same_tensor(adapter, tokens, its_tokens)
        and _same_tensor(adapter, one.replaced, other.replaced)
    )


def _same_tensor(adapter: AdapterFolder, name: str | None, other: str | None) -> bool:
    """Whether two tensors of an adapter have the same values, as far as they can be read yet."""
    if name is None or other is None or name == other:
        return name == other
    same_form = adapter.tensors[name] == adapter.tensors[other]
    if not same_form or adapter.download_bytes:
        return same_form
    return same_values(adapter, name, adapter, other)


def _same_product(adapter: AdapterFolder, one: LowRank | None, other: LowRank | None) -> bool:
    """Whether the same is added to embedding and head."""
    if one is None or other is None or one == other:
        return one == other
    if one.magnitude or other.magnitude or one.scale != other.scale or one.rank != other.rank:
        return False
    if adapter.download_bytes:
        return True  # as it most likely is
    pairs = zip(adapter.factors(one), adapter.factors(other), strict=True)
    return all(np.array_equal(mine, its) for mine, its in pairs)


def _new_biases(
    base: ModelFolder, steps: Mapping[str, Sequence[_Step]]
) -> tuple[list[str], dict[str, bool]]:
    """Biases that a base must get so that adapters can change some, and its settings then.

    Raises:
        ModelCompatibilityError: such models have no biases there.
    """
    lacking = [name for name in steps if name.endswith(".bias") and name not in base.tensors]
    if not lacking:
        return [], {}
    if base.config.get("model_type") != "llama":
        raise ModelCompatibilityError(
            f"{steps[lacking[0]][0].adapter.label}: lora_bias adds to {lacking[0]}, and models of "
            f"type {base.config.get('model_type')} have no such bias. It cannot be folded"
        )
    parts = {"self_attn": "attention_bias", "mlp": "mlp_bias"}
    wanted = {part: key for part, key in parts.items() if any(f".{part}." in n for n in lacking)}
    biases = [
        name.replace(".weight", ".bias")
        for name in base.tensors
        if name.endswith("_proj.weight") and any(f".{part}." in name for part in wanted)
    ]
    return biases, dict.fromkeys(wanted.values(), True)


def open_model(
    name: str,
    settings: LoraSettings = LoraSettings(),  # noqa: B008 (frozen)
    *,
    weights: bool = True,
    base_model: str | None = None,
    earlier: Mapping[str, ModelFolder] | None = None,
) -> ModelFolder:
    """Open a model by folder or Hub id, with the adapters that its name puts on top.

    Args:
        name: MODEL, or MODEL+ADAPTER+..., each adapter maybe with `:STRENGTH`.
        settings: how adapters are put on.
        weights: as `model_utils.open_model_folder`.
        base_model: what an adapter alone is put on; without one, it is refused.
        earlier: open models by name, which are taken for MODEL and stay open.

    Raises:
        ModelCompatibilityError: a model or adapter cannot be opened, or they do not fit.
        OSError: a folder cannot be read.
    """
    earlier = earlier or {}
    model, adapters = split_adapters(name)
    with ExitStack() as stack:
        try:
            base = _opened(model, earlier, stack, weights)
        except ModelCompatibilityError as error:
            alone = adapter_name(model)
            given = isinstance(error, AdapterGivenError) or alone.name != model
            if base_model is None or not given:
                raise
            model, below = split_adapters(base_model)
            adapters = (*below, alone, *adapters)
            base = _opened(model, earlier, stack, weights)
        if adapters:
            opened = _open_adapters(base, adapters, stack, weights)
            base = AdaptedModel(name, base, opened, settings, owns_base=model not in earlier)
        stack.pop_all()
        return base


def _opened(
    model: str, earlier: Mapping[str, ModelFolder], stack: ExitStack, weights: bool
) -> ModelFolder:
    """A model without adapters; closed with the stack, unless it was open before."""
    if model in earlier:
        return earlier[model]
    return stack.enter_context(open_model_folder(model, weights=weights))


def _open_adapters(
    base: ModelFolder, names: Sequence[AdapterName], stack: ExitStack, weights: bool
) -> list[tuple[AdapterFolder, float]]:
    """Adapters with their strengths; what is wrong with them or the base is said at once."""
    problems = [*model_problems(base)]
    adapters = []
    for name, strength in names:
        if not abs(strength) <= LARGEST_STRENGTH:
            problems.append(f"{name}: its strength must be a number up to 1e30, got {strength:g}")
        try:
            adapters.append((stack.enter_context(open_adapter(name, weights=weights)), strength))
        except ModelCompatibilityError as error:
            problems += error.problems
    if problems:
        raise refusal(problems)
    return adapters
