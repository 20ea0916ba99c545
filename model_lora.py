"""LoRA adapters as PEFT saves them: read strictly, and what each does to the tensors of a model.

Nothing is computed here: an adapter says which of its tensors are the factors of which matrix, and
what they are multiplied by. What would give a wrong model is refused by name: entries of
adapter_config.json that are not known to leave weights alone, and tensors without a place in the
model.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model_checks import EMBEDDING, HEAD, VOCABULARY_TENSORS, Model, is_tied
from model_config import read_config
from model_errors import ModelCompatibilityError, UnsafeModelError
from model_files import has_file, read_text
from model_locate import ADAPTER_CONFIG, files_left_on_hub, find_model_folder
from model_patterns import check_pattern, matched
from model_safetensors import FLOAT_DTYPES, widen
from model_utils import ModelFolder

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the names of the model's tensors."""

_PARTS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_B.bias": "lora_bias",
    ".lora_embedding_A": "lora_embedding_A",
    ".lora_embedding_B": "lora_embedding_B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".token_adapter.trainable_tokens_delta": "tokens",
    ".token_adapter.base_layer.weight": "weight",
    ".base_layer.weight": "weight",
    ".modules_to_save.weight": "weight again",
    ".original_module.weight": "original",
    ".weight": "weight",
    ".base_layer.bias": "bias",
    ".modules_to_save.bias": "bias again",
    ".original_module.bias": "original",
    ".bias": "bias",
}
"""What a tensor of an adapter is, by the end of its name; longer ends before those they end in.

Of a resized embedding that is in modules_to_save, PEFT saves three: "weight", which it loads, the
same "again", and the "original", which is not used.
"""

_LEAVE_WEIGHTS_ALONE = (
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying"),
    *("exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights"),
    *("layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout"),
    *("megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r"),
    *("rank_pattern", "revision", "runtime_config", "target_modules", "task_type"),
    *("trainable_token_indices", "use_dora", "use_rslora", "eva_config", "loftq_config"),
    *("corda_config", "lora_ga_config"),  # which say how factors began; see `_CHANGE_THE_BASE`
)
"""Entries that are read here, or that say nothing of the weights."""

_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin training that put another matrix in place of the base's."""

_BEGINNINGS = ("gaussian", "eva", "orthogonal", "mica")
"""Those that leave it alone."""


Rounding = Literal["none", "sum", "delta"]
Tying = Literal["untie", "shared"]

ROUNDINGS: tuple[Rounding, ...] = ("none", "sum", "delta")
TYINGS: tuple[Tying, ...] = ("untie", "shared")


class LoraSettings(NamedTuple):
    """How adapters are put on a base.

    Attributes:
        rounding: of base plus adapter. "none" gives float32; "sum" rounds to the base's dtype, as a
            folded folder does; "delta" rounds the change before it is added as well, as PEFT does
            with adapters in 16 bits (autocast_adapter_dtype=False).
        tied: what becomes of a head that is the embedding, where an adapter adds to one of them
            alone: "untie" gives it rows of its own, as the adapter was trained; "shared" adds to
            both, as PEFT's merge_and_unload does. What replaces one of them alone unties.
    """

    rounding: Rounding = "none"
    tied: Tying = "untie"


class LowRank(NamedTuple):
    """A change of a matrix, as a product of two tensors of an adapter.

    Attributes:
        left: of shape (rows, r) in the matrix's orientation; None for a vector, which is `right`.
        right: of shape (r, row length).
        left_transposed, right_transposed: the adapter stores it the other way round.
        rank: r.
        scale: alpha / r, or alpha / sqrt(r).
        magnitude: of DoRA: the lengths of rows, or of an embedding's columns.
    """

    left: str | None
    right: str
    left_transposed: bool
    right_transposed: bool
    rank: int
    scale: float
    magnitude: str | None = None


class Change(NamedTuple):
    """What an adapter does to one tensor of a model.

    Attributes:
        replaced: its tensor that stands in the place of the model's; None for none.
        rows: rows that are replaced, and the tensor that has them.
        low_rank: what is added.
    """

    replaced: str | None = None
    rows: tuple[tuple[int, ...], str] | None = None
    low_rank: LowRank | None = None


class AdapterFolder(ModelFolder):
    """An open LoRA adapter: `config` is its adapter_config.json, `tensors` its own.

    Attributes:
        known_modules: those for which its patterns may be asked.
    """

    known_modules: frozenset[str] = frozenset()

    @property
    def uses_dora(self) -> bool:
        """Whether it turns rows and gives them lengths (DoRA)."""
        return bool(self.config.get("use_dora"))

    @property
    def base_name(self) -> str:
        """The model that it was trained on; empty if it does not say."""
        return str(self.config.get("base_model_name_or_path") or "")

    def values(self, name: str) -> NDArray[np.float32]:
        """A whole tensor, in float32.

        Raises:
            ModelCompatibilityError: it has NaN or infinity.
        """
        info = self.tensors[name]
        rows = info.shape[0] if len(info.shape) > 1 else 1
        stored = self.read_rows(name, 0, rows, np.empty(info.nbytes, np.uint8))
        values = widen(stored, info.dtype).reshape(info.shape)
        if not np.isfinite(values).all():
            raise ModelCompatibilityError(
                f"{self.label}: {name} has NaN or infinite weights. The adapter is broken; use "
                "another copy"
            )
        return values

    def factors(self, low_rank: LowRank) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Both factors of a change, (rows, r) and (r, row length), contiguous."""
        right = self.values(low_rank.right)
        if low_rank.left is None:
            return np.ones((1, 1), np.float32), right.reshape(1, -1)
        left = self.values(low_rank.left)
        left = left.T if low_rank.left_transposed else left
        right = right.T if low_rank.right_transposed else right
        return np.ascontiguousarray(left), np.ascontiguousarray(right)

    def module_rank(self, module: str) -> int:
        """r of a module: that of the first pattern that fits it."""
        return int(self._by_pattern("rank_pattern", module, self.config["r"]))

    def module_scale(self, module: str) -> float:
        """What the product of a module's factors is multiplied by."""
        alpha = self._by_pattern("alpha_pattern", module, self.config["lora_alpha"])
        rank = self.module_rank(module)
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _by_pattern(self, key: str, module: str, otherwise: Any) -> Any:
        """The value of the first pattern that fits the end of a module's path."""
        for pattern, value in (self.config.get(key) or {}).items():
            if self.fits(_at_the_end(pattern), module):
                return value
        return otherwise

    def fits(self, pattern: str, module: str) -> bool:
        """Whether one of the adapter's patterns fits a module's whole path.

        Raises:
            ModelCompatibilityError: the patterns take too long.
        """
        self.known_modules |= {module}
        patterns = [self.config.get(key) for key in ("target_modules", "exclude_modules")]
        patterns = [each for each in patterns if isinstance(each, str)]
        for key in ("rank_pattern", "alpha_pattern"):
            patterns += map(_at_the_end, self.config.get(key) or {})
        try:
            return module in matched(tuple(patterns), self.known_modules)[pattern]
        except ValueError as error:
            raise UnsafeModelError(f"{self.label}: {ADAPTER_CONFIG}: {error}") from error


def open_adapter(name: str, *, weights: bool = True) -> AdapterFolder:
    """Open a LoRA adapter by folder or Hub id; reads its config and header, no weights.

    Args:
        name: a folder with adapter_config.json, one somewhere above it, or a Hub id.
        weights: as `model_utils.open_model_folder`.

    Raises:
        ModelCompatibilityError: no such adapter, files that are missing or corrupt, or an adapter
            whose change is not what its factors say.
    """
    path = find_model_folder(name, weights=weights, config=ADAPTER_CONFIG)
    adapter = AdapterFolder(name, path, None if weights else files_left_on_hub(name, path))
    try:
        adapter.config_text = read_text(path, ADAPTER_CONFIG, name)
        adapter.config = read_config(adapter.config_text)
        if problems := [*_config_problems(adapter)]:
            raise ModelCompatibilityError(problems)
        if not adapter.open_file(ADAPTER_WEIGHTS):
            raise _no_weights(adapter)
    except ValueError as error:
        adapter.close()
        raise ModelCompatibilityError(
            f"{name}: {ADAPTER_CONFIG} is not valid JSON ({error}). Download it again"
        ) from error
    except BaseException:
        adapter.close()
        raise
    return adapter


def _no_weights(adapter: AdapterFolder) -> ModelCompatibilityError:
    if has_file(adapter.path, "adapter_model.bin"):
        return UnsafeModelError(
            f"{adapter.label}: has only pickle weights (adapter_model.bin), which can run code "
            "when loaded. Convert them in a place you trust: PEFT's load and save_pretrained"
        )
    return ModelCompatibilityError(
        f"{adapter.label}: no {ADAPTER_WEIGHTS}. Expected a folder from PEFT's save_pretrained"
    )


def _config_problems(adapter: AdapterFolder) -> Iterator[str]:
    """What adapter_config.json says that cannot be done, or is no sense."""
    config, label = adapter.config, adapter.label
    kind = config.get("peft_type")
    if kind != "LORA":
        yield (
            f"{label}: peft_type {kind!r} in {ADAPTER_CONFIG} is not LORA. Fold it into its base "
            "with PEFT (merge_and_unload, save_pretrained) and give that model"
        )
        return
    yield from (f"{label}: {ADAPTER_CONFIG}: {problem}" for problem in _entry_problems(config))


def _entry_problems(config: Mapping[str, Any]) -> Iterator[str]:
    for name, value in config.items():
        if name not in _LEAVE_WEIGHTS_ALONE and value:
            yield (
                f"{name} {_shown(value)} is not supported, and may change what the weights mean. "
                "Fold the adapter with PEFT (merge_and_unload), if that can"
            )
    beginning = config.get("init_lora_weights", True)
    if isinstance(beginning, str) and beginning.lower().startswith(_CHANGE_THE_BASE):
        yield (
            f"init_lora_weights {beginning!r} began from another base matrix, which is not in the "
            "file: W + s B A would be wrong. Save the adapter converted (PEFT's save_pretrained "
            "with path_initial_model_for_weight_conversion)"
        )
    elif not isinstance(beginning, bool | None) and beginning not in _BEGINNINGS:
        yield (
            f"init_lora_weights {_shown(beginning)} is unknown; expected true, false or one of "
            f"{', '.join(_BEGINNINGS)}"
        )
    if type(config.get("r")) is not int or config["r"] < 1:
        yield f"r must be a whole number of at least 1, got {_shown(config.get('r'))}"
    if not is_number(config.get("lora_alpha")):
        yield f"lora_alpha must be a number, got {_shown(config.get('lora_alpha'))}"
    for name in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying"):
        if not isinstance(config.get(name), bool | None):
            yield f"{name} must be true or false, got {_shown(config[name])}"
    for name, fits in (("rank_pattern", _is_rank), ("alpha_pattern", is_number)):
        yield from _pattern_problems(name, config.get(name), fits)
    yield from _token_problems(config.get("trainable_token_indices"))
    if not _is_names(config.get("modules_to_save")):
        yield f"modules_to_save must be a list of names, got {_shown(config['modules_to_save'])}"
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), str):
            try:
                check_pattern(config[name])
            except ValueError as error:
                yield f"{name}: {error}"
        elif not _is_names(config.get(name)):
            yield f"{name} must be a list of names or a pattern, got {_shown(config[name])}"
    layers = config.get("layers_to_transform")
    each = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not all(type(layer) is int for layer in each):
        yield f"layers_to_transform must be numbers of layers, got {_shown(layers)}"


def _pattern_problems(name: str, patterns: Any, fits: Callable[[Any], bool]) -> Iterator[str]:
    if patterns is None:
        return
    if not isinstance(patterns, Mapping):
        yield f"{name} must be an object, got {_shown(patterns)}"
        return
    for pattern, value in patterns.items():
        if not fits(value):
            yield f"{name}: {pattern!r} has {_shown(value)}, expected a number"
        try:
            check_pattern(pattern)
        except ValueError as error:
            yield f"{name}: {error}"


def _token_problems(indices: Any) -> Iterator[str]:
    by_name = indices.values() if isinstance(indices, Mapping) else [indices]
    for each in by_name:
        if each is not None and not (
            isinstance(each, list) and all(type(i) is int and i >= 0 for i in each)
        ):
            yield (
                "trainable_token_indices must be token ids, or lists of them by module, got "
                f"{_shown(each)}"
            )
        elif each and len(set(each)) < len(each):
            yield f"trainable_token_indices names a token twice: {_shown(each)}"


LARGEST_NUMBER = 1e30
"""Of what changes are multiplied by: beyond it nothing is left of them in float32."""


def is_number(value: Any) -> bool:
    """Whether a value is a number that a change can be multiplied by."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -LARGEST_NUMBER <= value <= LARGEST_NUMBER


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(n, str) for n in value))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _at_the_end(pattern: str) -> str:
    """A pattern for the end of a module's path, as PEFT means those of ranks and alphas."""
    return rf"(.*\.)?({pattern})"


class Changes(NamedTuple):
    """What an adapter does to a model.

    Attributes:
        by_tensor: by the model's names; `HEAD` too where the model ties it, but the adapter does
            something to it. A bias that the model lacks begins as zeros.
        notes: what the user should know.
    """

    by_tensor: dict[str, Change]
    notes: tuple[str, ...]


class ModuleFactors(NamedTuple):
    """The two factors of a module's change.

    Attributes:
        lora_A, lora_B: tensors of the adapter, of shapes (r, in) and (out, r).
        rank: r.
        scale: what their product is multiplied by.
        embeds: whether the module is an embedding, whose matrix is (in, out): the product has to be
            transposed.
    """

    lora_A: str  # noqa: N815 (the field's names)
    lora_B: str  # noqa: N815
    rank: int
    scale: float
    embeds: bool


MOST_PROBLEMS = 10
"""What is wrong with an adapter is mostly wrong with all of its modules."""


class AdapterParts(NamedTuple):
    """What an adapter holds, whatever it is put on.

    Attributes:
        modules: its tensors by module and part; see `_PARTS`.
        factors: of the modules that have some.
    """

    modules: dict[str, dict[str, str]]
    factors: dict[str, ModuleFactors]


def parts_of(adapter: AdapterFolder) -> AdapterParts:
    """What an adapter holds.

    Raises:
        ModelCompatibilityError: tensors that are no part of an adapter, factors that lack each
            other or do not have the rank that the config says; all of them are listed.
    """
    modules, unknown = _by_module(adapter)
    adapter.known_modules |= {*modules}
    problems = _unknown_problems(adapter, unknown)
    problems += [
        f"{name} is stored as {info.dtype}; expected float32, float16 or bfloat16"
        for name, info in adapter.tensors.items()
        if info.dtype not in FLOAT_DTYPES
    ]
    factors = {}
    for module, parts in modules.items():
        found = _module_factors(adapter, module, parts, problems)
        if found is not None:
            factors[module] = found
    _raise(adapter, problems)
    return AdapterParts(modules, factors)


def _raise(adapter: AdapterFolder, problems: Sequence[str]) -> None:
    if problems:
        shown = [f"{adapter.label}: {problem}" for problem in problems[:MOST_PROBLEMS]]
        if len(problems) > MOST_PROBLEMS:
            more = len(problems) - MOST_PROBLEMS
            shown.append(f"{adapter.label}: and so on; {more} more of its modules do not fit")
        raise ModelCompatibilityError(shown)


def _module_factors(
    adapter: AdapterFolder, module: str, parts: Mapping[str, str], problems: list[str]
) -> ModuleFactors | None:
    """The factors of a module; None if it has none, or something is wrong with them."""
    given = {"magnitude", "lora_bias", *_LINEAR, *_EMBEDDING} & parts.keys()
    if not given:
        return None
    kinds = [kind for kind in (_LINEAR, _EMBEDDING) if {*kind} & given]
    if len(kinds) != 1 or not {*kinds[0]} <= given:
        problems.append(
            f"{module} has {', '.join(parts[part] for part in sorted(given))}; expected lora_A and "
            "lora_B, or lora_embedding_A and lora_embedding_B. The adapter is incomplete; use "
            "another copy"
        )
        return None
    lora_a, lora_b = (parts[part] for part in kinds[0])
    if not _is_target(adapter, module):
        problems.append(
            f"{lora_a}: target_modules in {ADAPTER_CONFIG} does not name {module}, so PEFT "
            "would not use it. Save the adapter again, or correct target_modules"
        )
    if (parts.get("magnitude") is not None) != adapter.uses_dora:
        problems.append(
            f"{parts.get('magnitude', module)}: a DoRA adapter has lora_magnitude_vector for each "
            f"module, and only such a one has; use_dora is {adapter.uses_dora}. Save it again"
        )
    shapes = adapter.tensors[lora_a].shape, adapter.tensors[lora_b].shape
    rank = adapter.module_rank(module)
    if (
        [len(shape) for shape in shapes] != [2, 2]
        or (shapes[0][0], shapes[1][1]) != (rank, rank)
        or 0 in (*shapes[0], *shapes[1])
    ):
        problems.append(
            f"{lora_a} has shape {list(shapes[0])} and {lora_b} {list(shapes[1])}, but r and "
            f"rank_pattern in {ADAPTER_CONFIG} say rank {rank}, by which the change is scaled. "
            "Save the adapter again"
        )
        return None
    scale = adapter.module_scale(module)
    return ModuleFactors(lora_a, lora_b, rank, scale, kinds[0] is _EMBEDDING)


_LINEAR, _EMBEDDING = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")


def changes_of(adapter: AdapterFolder, base: Model) -> Changes:
    """What an adapter does to the tensors of a model.

    Raises:
        ModelCompatibilityError: as `parts_of`; or tensors of the adapter have no place in the model
            or do not fit; all of them are listed.
    """
    adapter.known_modules |= {name.removesuffix(".weight") for name in base.tensors}
    found = parts_of(adapter)
    problems: list[str] = []
    turned = _is_turned(adapter, base, found.factors)
    changes: dict[str, Change] = {}
    for module, parts in found.modules.items():
        factors = found.factors.get(module)
        for tensor, change in _changes_of_module(
            adapter, base, module, parts, factors, turned, problems
        ):
            changes[tensor] = change
    _raise(adapter, problems)
    if is_tied(base):
        _tie(adapter, changes)
    return Changes(changes, tuple(_notes(adapter, base, found.modules, turned)))


def _by_module(adapter: AdapterFolder) -> tuple[dict[str, dict[str, str]], list[str]]:
    """An adapter's tensors by module and part, and those that are no part of one."""
    modules: dict[str, dict[str, str]] = {}
    unknown = []
    again = []
    for name in adapter.tensors:
        end = next((end for end in _PARTS if name.endswith(end)), None)
        if end is None or not name.startswith(PREFIX) or "lora_" in name.removesuffix(end):
            unknown.append(name)
            continue
        module, part = name.removeprefix(PREFIX).removesuffix(end), _PARTS[end]
        if part.endswith("again"):
            again.append((module, part.removesuffix(" again"), name))
        elif part != "original":
            modules.setdefault(module, {})[part] = name
    for module, part, name in again:
        modules.setdefault(module, {}).setdefault(part, name)
    return modules, unknown


def _unknown_problems(adapter: AdapterFolder, unknown: Sequence[str]) -> list[str]:
    if not unknown:
        return [] if adapter.tensors else [f"{ADAPTER_WEIGHTS} holds no tensors"]
    return [
        f"{len(unknown)} tensors are no part of a LoRA adapter that is known here "
        f"({', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}); expected names such as "
        f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight. Save it with PEFT's "
        "save_pretrained"
    ]


def _weight_shape(base: Model, module: str) -> tuple[int, ...] | None:
    """Shape of a module's matrix; None if the model has no such module."""
    name = f"{module}.weight"
    name = EMBEDDING if name == HEAD and is_tied(base) else name
    return base.tensors[name].shape if name in base.tensors else None


def _is_turned(adapter: AdapterFolder, base: Model, factors: Mapping[str, ModuleFactors]) -> bool:
    """Whether factors fit the transposed matrices, and not the matrices."""
    for module, each in factors.items():
        shape = _weight_shape(base, module)
        if shape is not None and not each.embeds and shape[0] != shape[-1]:
            return _product_shape(adapter, each) == shape[::-1]
    return False


def _product_shape(adapter: AdapterFolder, factors: ModuleFactors) -> tuple[int, ...]:
    """Shape of the product of two factors."""
    return adapter.tensors[factors.lora_B].shape[0], adapter.tensors[factors.lora_A].shape[1]


def _changes_of_module(
    adapter: AdapterFolder,
    base: Model,
    module: str,
    parts: Mapping[str, str],
    factors: ModuleFactors | None,
    turned: bool,
    problems: list[str],
) -> Iterator[tuple[str, Change]]:
    """What an adapter does to a module's matrix and bias; adds what is wrong to `problems`."""
    weight, bias = f"{module}.weight", f"{module}.bias"
    shape = _weight_shape(base, module)
    if shape is None:
        problems.append(
            f"{', '.join(parts.values())}: {base.label} has no {module}. Give the model that the "
            "adapter was trained on"
        )
        return
    rows = _replaced_shape(adapter, weight, shape, parts.get("weight"), problems)
    replaced_rows = _token_rows(adapter, module, parts.get("tokens"), rows, problems)
    magnitude = parts.get("magnitude")
    low_rank = _low_rank(adapter, module, magnitude, factors, rows, turned, problems)
    if {"weight", "tokens"} & parts.keys() or low_rank is not None:
        yield weight, Change(parts.get("weight"), replaced_rows, low_rank)
    of_bias = (shape[0],)
    if "bias" in parts:
        if bias not in base.tensors:
            problems.append(f"{parts['bias']}: {base.label} has no {bias}")
        _replaced_shape(adapter, bias, of_bias, parts["bias"], problems)
    added = None
    if "lora_bias" in parts:
        if adapter.tensors[parts["lora_bias"]].shape != of_bias:
            problems.append(_misfit(adapter, parts["lora_bias"], of_bias, bias))
        scale = adapter.module_scale(module)
        added = LowRank(None, parts["lora_bias"], False, False, 1, scale)
    if {"bias", "lora_bias"} & parts.keys():
        yield bias, Change(parts.get("bias"), low_rank=added)


def _replaced_shape(
    adapter: AdapterFolder,
    tensor: str,
    shape: tuple[int, ...],
    replaced: str | None,
    problems: list[str],
) -> tuple[int, ...]:
    """The shape of a tensor of the model after it has been replaced, if it is."""
    if replaced is None:
        return shape
    info = adapter.tensors[replaced]
    resized = tensor in (EMBEDDING, HEAD) and info.shape[1:] == shape[1:]
    if info.shape != shape and not resized:
        problems.append(_misfit(adapter, replaced, shape, tensor))
    return info.shape


def _misfit(adapter: AdapterFolder, name: str, shape: tuple[int, ...], tensor: str) -> str:
    return (
        f"{name} has shape {list(adapter.tensors[name].shape)}, but {tensor} asks for "
        f"{list(shape)}. Give the model that the adapter was trained on"
    )


def _token_rows(
    adapter: AdapterFolder,
    module: str,
    name: str | None,
    shape: tuple[int, ...],
    problems: list[str],
) -> tuple[tuple[int, ...], str] | None:
    """The rows that are replaced by trained tokens."""
    if name is None:
        return None
    indices = adapter.config.get("trainable_token_indices")
    if f"{module}.weight" not in VOCABULARY_TENSORS:
        problems.append(f"{name}: only rows of the embedding and the head are trained as tokens")
        return None
    if isinstance(indices, Mapping):
        # Of a tied head, PEFT saves the embedding's under its name as well.
        names = (module, EMBEDDING.removesuffix(".weight"))
        fitting = [ids for name in names for end, ids in indices.items() if _ends_with(name, end)]
        indices = fitting[0] if fitting else None
    found = adapter.tensors[name].shape
    if not indices or found != (len(indices), *shape[1:]):
        problems.append(
            f"{name} has shape {list(found)}, but trainable_token_indices in {ADAPTER_CONFIG} has "
            f"{len(indices or ())} ids for {module}. Save the adapter again"
        )
        return None
    if beyond := [i for i in indices if i >= shape[0]]:
        problems.append(
            f"trainable_token_indices has {beyond[0]}, but {module} has {shape[0]} rows. Give the "
            "model that the adapter was trained on"
        )
    return tuple(indices), name


def _low_rank(
    adapter: AdapterFolder,
    module: str,
    magnitude: str | None,
    factors: ModuleFactors | None,
    shape: tuple[int, ...],
    turned: bool,
    problems: list[str],
) -> LowRank | None:
    """The product of factors that is added to a module's matrix."""
    if factors is None:
        return None
    lora_a, lora_b, rank, scale, embeds = factors
    product = _product_shape(adapter, factors)
    fits = product[::-1] if embeds or turned else product
    if fits != shape or embeds != (f"{module}.weight" == EMBEDDING):
        resized = embeds and fits[1:] == shape[1:]
        hint = (
            ". It was trained with another vocabulary: save it with save_embedding_layers=True"
            if resized
            else ". Give the model that the adapter was trained on"
        )
        problems.append(
            f"{lora_a} and {lora_b} make a change of shape {list(fits)}, but "
            f"{module}.weight has {list(shape)}{hint}"
        )
    elif magnitude is not None:
        length = shape[1] if embeds else shape[0]
        if turned:
            problems.append(
                f"{magnitude}: DoRA of transposed matrices is not supported. Fold it with PEFT"
            )
        elif math.prod(adapter.tensors[magnitude].shape) != length:
            problems.append(_misfit(adapter, magnitude, (length,), f"{module}.weight"))
    if embeds or turned:  # (B A)^T = A^T B^T
        return LowRank(lora_a, lora_b, True, True, rank, scale, magnitude)
    return LowRank(lora_b, lora_a, False, False, rank, scale, magnitude)


def _is_target(adapter: AdapterFolder, module: str, *, tying: bool = True) -> bool:
    """Whether PEFT would give a module factors."""
    config = adapter.config
    targets = config.get("target_modules")
    head, embedding = (tensor.removesuffix(".weight") for tensor in (HEAD, EMBEDDING))
    if targets is None:
        return True  # by the kind of model
    both = {head: embedding, embedding: head}
    if module in both and tying and config.get("ensure_weight_tying"):
        return any(_is_target(adapter, each, tying=False) for each in (module, both[module]))
    if isinstance(targets, str):
        if targets == "all-linear":
            return module != head
        return adapter.fits(targets, module)
    if module in targets:
        return True
    chosen = config.get("layers_to_transform")
    layers = [chosen] if isinstance(chosen, int) else (chosen or [])
    layer = re.match(r".*?\.[^.]*\.(\d+)\.", module)
    if layers and (layer is None or int(layer[1]) not in layers):
        return False
    return any(_ends_with(module, target) for target in targets)


def _ends_with(module: str, end: str) -> bool:
    """Whether a module's path is a name, or ends in it.

    >>> _ends_with("model.layers.0.mlp.up_proj", "up_proj"), _ends_with("lm_head", "head")
    (True, False)
    """
    return module == end or module.endswith(f".{end}")


def _tie(adapter: AdapterFolder, changes: dict[str, Change]) -> None:
    """What an adapter does to an embedding that is also the head, for each of the two.

    A module of `modules_to_save` is a copy that only one of them uses, and so are factors. The
    shared matrix itself is changed by what was saved of it otherwise; trained tokens of the
    embedding are those of the head. With `ensure_weight_tying` all is shared.
    """
    embedding, head = changes.get(EMBEDDING, Change()), changes.get(HEAD, Change())
    together = bool(adapter.config.get("ensure_weight_tying"))
    shared_by_embedding, shared_by_head = (
        together or not is_saved(adapter.config, tensor.removesuffix(".weight"))
        for tensor in (EMBEDDING, HEAD)
    )
    changes[HEAD] = Change(
        head.replaced or (embedding.replaced if shared_by_embedding else None),
        head.rows or embedding.rows,
        head.low_rank or (embedding.low_rank if together else None),
    )
    changes[EMBEDDING] = embedding._replace(
        replaced=embedding.replaced or (head.replaced if shared_by_head else None),
    )
    for tensor in (EMBEDDING, HEAD):
        if changes[tensor] == Change():
            del changes[tensor]


def _notes(
    adapter: AdapterFolder,
    base: Model,
    modules: Mapping[str, Mapping[str, str]],
    turned: bool,
) -> Iterator[str]:
    if turned:
        yield (
            f"{adapter.label}: its factors fit the transposed matrices only, so they are taken "
            "transposed"
        )
    elif adapter.config.get("fan_in_fan_out"):
        yield f"{adapter.label}: fan_in_fan_out has no effect on such models, here as in PEFT"
    targets = [
        name.removesuffix(".weight")
        for name, info in base.tensors.items()
        if len(info.shape) == 2 and name.endswith("_proj.weight")
    ]
    left = [
        module
        for module in targets
        if adapter.config.get("target_modules") is not None
        and _is_target(adapter, module)
        and not _is_left_out(adapter, module)
        and module not in modules
    ]
    if left:
        yield (
            f"{adapter.label}: target_modules names {len(left)} modules that the adapter has "
            f"nothing for ({', '.join(left[:3])}{', ...' if len(left) > 3 else ''}); they stay as "
            "they are"
        )


def _is_left_out(adapter: AdapterFolder, module: str) -> bool:
    """Whether `exclude_modules` or `modules_to_save` takes a module from the targets."""
    left = adapter.config.get("exclude_modules") or ()
    if isinstance(left, str):
        left_out = adapter.fits(left, module)
    else:
        left_out = any(_ends_with(module, name) for name in left)
    return left_out or is_saved(adapter.config, module)


def is_saved(config: Mapping[str, Any], module: str) -> bool:
    """Whether a module is trained and saved whole; PEFT looks at the end of its path alone."""
    return any(module.endswith(name) for name in config.get("modules_to_save") or ())
