"""Whether models can be merged: float weights, the LLaMA family, shapes that fit each other.

The rules look at config.json and the tensors' names, dtypes and shapes alone, and yield one text
for each thing that is wrong.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from model_safetensors import FLOAT_DTYPES, TensorInfo
from model_tokenizer import TokenTable

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
VOCABULARY_TENSORS = (EMBEDDING, HEAD)
KNOWN_TYPES = ("llama", "mistral", "qwen2", "qwen3")
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads"),
)
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")
SAME_SETTINGS = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act")
"""Settings by which the same weights would be another model."""

OWN_SETTINGS = (
    *("_name_or_path", "architectures", "auto_map", "transformers_version", "model_type"),
    *("dtype", "torch_dtype", "use_cache", "vocab_size", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "initializer_range", "pretraining_tp"),
    *("attention_dropout", "output_attentions", "output_hidden_states", "return_dict"),
)
"""Settings that a merge decides itself, compares in its own way, or that do not matter to it."""

COMPUTING = ("rms_norm_eps", "sliding_window", "use_sliding_window", "max_position_embeddings")
"""Settings of `pair_notes` that count also where only one model gives them."""

DEFAULT_ROPE_THETA = 10000.0

_PROJECTION = r"self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj"
_NORM = r"(?:self_attn\.)?\w+norm"
FAMILY_TENSOR = re.compile(
    rf"model\.(?:embed_tokens\.weight|norm\.weight"
    rf"|layers\.(0|[1-9]\d*)\.(?:(?:{_PROJECTION})\.(?:weight|bias)|{_NORM}\.weight))|lm_head\.weight"
)
"""Names of the tensors of Llama, Mistral, Qwen2, Qwen3 and models built like them."""

DERIVED_TENSOR = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Constants that old checkpoints store and every loader computes anew."""

QUANTIZED_SUFFIX = re.compile(r"\.(?:scales|weight_scale(?:_inv)?|SCB|meta)$|\.weight\.\w+")
"""Float tensors that accompany packed weights, which themselves are integers or FP8."""

INTEGER_DTYPE = re.compile(r"[IU]\d+|torch\.u?int\d+")


class Model(Protocol):
    """What the rules look at; a `ModelFolder` has it, and so does a `ModelDescription`."""

    @property
    def label(self) -> str:
        """What the user called the model."""

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json, parsed."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of every tensor, by name."""

    @property
    def tokens(self) -> TokenTable | None:
        """Its tokenizer's tokens; None where that is not known."""


class ModelDescription(NamedTuple):
    """A model reduced to what decides whether it can be merged."""

    label: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    tokens: TokenTable | None = None


def is_tied(model: Model) -> bool:
    """Whether a model uses its embedding as its head.

    As config.json says. Where it says nothing, Llama, Mistral, Qwen2 and Qwen3 have a head of
    their own, as in transformers; others are tied if they store none.
    """
    unsaid = model.config.get("model_type") not in KNOWN_TYPES and HEAD not in model.tensors
    return bool(model.config.get("tie_word_embeddings", unsaid))


def model_problems(model: Model) -> Iterator[str]:
    """What is wrong with one model on its own; what is not even a candidate is not looked into."""
    checks = (quantization_problems, family_problems, dtype_problems)
    for check in checks:
        problems = list(check(model))
        if problems:
            yield from problems
            return
    yield from structure_problems(model)
    for key, value in model.config.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield (
                f"{model.label}: {key} in config.json is {value}, expected a finite number. "
                "Download the model again"
            )


def quantization_problems(model: Model) -> Iterator[str]:
    """Whether a model is quantized, by its config, its tensor names or its dtypes."""
    advice = "Merging needs float weights; use the original checkpoint"
    settings = model.config.get("quantization_config") or model.config.get("compression_config")
    if settings:
        method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
        method = getattr(method, "value", method) or "unknown"  # an enum, in transformers' configs
        yield (
            f"{model.label}: weights are quantized (quant_method {method!r} in config.json). "
            f"{advice}"
        )
        return
    packed = [
        name
        for name, info in model.tensors.items()
        if QUANTIZED_SUFFIX.search(name) or INTEGER_DTYPE.fullmatch(info.dtype)
    ]
    if packed:
        yield (
            f"{model.label}: weights are quantized ({_listed(packed, 'packed tensor')}; "
            f"{model.tensors[packed[0]].dtype}). {advice}"
        )


def family_problems(model: Model) -> Iterator[str]:
    """Whether all tensors have the names of a LLaMA-family model."""
    strange = [
        name
        for name in model.tensors
        if not FAMILY_TENSOR.fullmatch(name) and not DERIVED_TENSOR.fullmatch(name)
    ]
    if strange:
        yield (
            f"{model.label}: not a LLaMA-family causal language model: model_type "
            f"{model.config.get('model_type')!r} with {_listed(strange, 'other tensor')}. "
            "Expected the tensor names of Llama, Mistral, Qwen2 or Qwen3"
        )


def dtype_problems(model: Model) -> Iterator[str]:
    """Whether all tensors are of a dtype that can be merged."""
    for name, info in model.tensors.items():
        if info.dtype not in FLOAT_DTYPES:
            fp8 = info.dtype.startswith(("F8", "torch.float8"))
            kind = "quantized to FP8" if fp8 else f"stored as {info.dtype}"
            yield (
                f"{model.label}: weights are {kind} ({name}). "
                "Merging reads float32, float16 and bfloat16; save the model as one of these"
            )
            return


def structure_problems(model: Model) -> Iterator[str]:
    """Where tensors and config.json do not say the same: sizes, names, shapes."""
    wrong = [f"{key} {model.config.get(key)!r}" for key in SIZES if not _is_size(model, key)]
    wrong += [
        f"{key} {model.config[key]!r}"
        for key in OPTIONAL_SIZES
        if model.config.get(key) is not None and not _is_size(model, key)
    ]
    tie = model.config.get("tie_word_embeddings", False)
    if wrong:
        yield (
            f"{model.label}: config.json must have whole numbers above 0, got {', '.join(wrong)}. "
            "Download or save the model again"
        )
    yield from rope_form_problems(model.label, model.config)
    yield from special_id_form_problems(model.label, "config.json", model.config)
    if not isinstance(tie, bool):
        yield (
            f"{model.label}: tie_word_embeddings in config.json must be true or false, got {tie!r}"
        )
    if wrong or not isinstance(tie, bool):
        return
    layers = model.config["num_hidden_layers"]
    if layers > len(model.tensors):
        yield (
            f"{model.label}: num_hidden_layers in config.json is {layers}, but there are only "
            f"{len(model.tensors)} tensors. Download or save the model again"
        )
        return
    expected = expected_shapes(model)
    missing = [name for name in expected if name not in model.tensors]
    if missing:
        yield (
            f"{model.label}: {_listed(missing, 'tensor')} missing; "
            f"num_hidden_layers in config.json is {layers}. Download or save the model again"
        )
    beyond = [
        name
        for name in model.tensors
        if (match := FAMILY_TENSOR.fullmatch(name)) and match[1] and int(match[1]) >= layers
    ]
    if beyond:
        yield (
            f"{model.label}: {_listed(beyond, 'tensor')} beyond num_hidden_layers "
            f"{layers} in config.json. Save the model again"
        )
    unused = sorted(
        name
        for name in model.tensors.keys() - expected.keys() - {HEAD, *beyond}
        if not DERIVED_TENSOR.fullmatch(name)
    )
    if unused:
        yield (
            f"{model.label}: {_listed(unused, 'tensor')} that a {model.config['model_type']} with "
            "this config.json does not have; loaders would ignore them. Use the config.json that "
            "belongs to these weights"
        )
    misshapen = [
        f"{name} {list(model.tensors[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in model.tensors and model.tensors[name].shape != shape
    ]
    if misshapen:
        yield (
            f"{model.label}: shapes are not those of config.json: "
            f"{misshapen[0]}{_more(misshapen)}. "
            "Use the config.json that belongs to these weights"
        )


def rope_form_problems(label: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Rotary settings of which nothing can be made."""
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key), Mapping | None):
            yield (
                f"{label}: {key} in config.json is {config[key]!r}, expected an object or null. "
                "Download or save the model again"
            )
    theta = config.get("rope_theta")
    if theta is not None and not (type(theta) in (int, float) and 0 < theta < 1e300):
        yield (
            f"{label}: rope_theta in config.json must be a number above 0, got "
            f"{str(theta)[:40]!r}. Download or save the model again"
        )


def _is_size(model: Model, key: str) -> bool:
    value = model.config.get(key)
    return type(value) is int and value > 0


def expected_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """The tensors that a model must have, and their shapes, from its config.

    Of types other than `KNOWN_TYPES`, which may have other norms and biases, only the projections
    are known; their layers must be alike.
    """
    config = model.config
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_size, (config.get("num_key_value_heads") or heads) * head_size
    layer: dict[str, tuple[int, ...]] = {
        f"{part}.weight": shape
        for part, shape in {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }.items()
    }
    if config.get("model_type") in KNOWN_TYPES:
        layer |= _norms_and_biases(config, layer, head_size)
    else:
        layer |= _parts_of_any_layer(model, layer)
    vocabulary = (config["vocab_size"], hidden)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: vocabulary, "model.norm.weight": (hidden,)}
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{part}": shape for part, shape in layer.items()}
    return shapes if is_tied(model) else shapes | {HEAD: vocabulary}


def _norms_and_biases(
    config: Mapping[str, Any], projections: Mapping[str, tuple[int, ...]], head_size: int
) -> dict[str, tuple[int, ...]]:
    """What a layer of a known type has besides its projections."""
    kind, hidden = config["model_type"], config["hidden_size"]
    parts: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if kind == "qwen3":
        parts |= dict.fromkeys(("self_attn.q_norm.weight", "self_attn.k_norm.weight"), (head_size,))
    biased = {"qwen2": "qkv", "mistral": ""}.get(
        kind, "qkvo" if config.get("attention_bias") else ""
    )
    names = [f"self_attn.{letter}_proj" for letter in biased]
    if kind == "llama" and config.get("mlp_bias"):
        names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    return parts | {f"{name}.bias": projections[f"{name}.weight"][:1] for name in names}


def _parts_of_any_layer(
    model: Model, projections: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """What some layer has besides the projections, with the shape in the first that has it."""
    parts: dict[str, tuple[int, ...]] = {}
    for name in sorted(model.tensors, key=layer_order):
        if (match := FAMILY_TENSOR.fullmatch(name)) and match[1]:
            parts.setdefault(name.split(".", 3)[3], model.tensors[name].shape)
    return {part: shape for part, shape in parts.items() if part not in projections}


def pair_problems(first: Model, model: Model) -> Iterator[str]:
    """What keeps a model from being merged with the first one."""
    ours, theirs = first.config.get("model_type"), model.config.get("model_type")
    if ours != theirs:
        yield (
            f"{model.label}: model_type {theirs!r}, but {first.label} has {ours!r}. "
            "Merge models of one architecture"
        )
        return
    for key in SAME_SETTINGS:
        values = first.config.get(key), model.config.get(key)
        if None not in values and values[0] != values[1]:  # what one leaves out, its shapes tell
            yield (
                f"{model.label}: {key} {values[1]}, but {first.label} has {values[0]}. "
                "Merge fine-tunes of one base"
            )
    ours, theirs = rope_settings(first.config), rope_settings(model.config)
    differing = [
        f"{key} {theirs.get(key)}, but {first.label} has {ours.get(key)}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
    if differing:
        yield (
            f"{model.label}: other rotary positions: {'; '.join(differing)}. Weights trained for "
            "one do not fit the other. If they are known to, give both models the same settings "
            "in config.json"
        )
    yield from _tensor_differences(first, model)


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """How positions are turned, whichever way transformers 4 or 5 spells it.

    >>> rope_settings({"rope_theta": 5e5, "rope_scaling": None})
    {'rope_theta': 500000.0}
    >>> rope_settings({"rope_parameters": {"rope_type": "default", "rope_theta": 500000}})
    {'rope_theta': 500000.0}
    """
    settings = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = settings.pop("rope_type", None) or settings.pop("type", None) or "default"
    settings.pop("type", None)
    if settings.get("rope_theta") is None:
        settings["rope_theta"] = config.get("rope_theta") or DEFAULT_ROPE_THETA
    settings = {
        key: float(value) if isinstance(value, int | float) and abs(value) < 1e300 else value
        for key, value in settings.items()
    }
    return settings if kind == "default" else settings | {"rope_type": kind}


def pair_notes(first: Model, model: Model) -> Iterator[str]:
    """Settings that differ and leave shapes as they are; the result has those of the first."""
    differing = [
        f"{key} {model.config.get(key)!r} ({first.label}: {first.config.get(key)!r})"
        for key in sorted(first.config.keys() | model.config.keys())
        if first.config.get(key) != model.config.get(key)
        and key not in {*SAME_SETTINGS, *OWN_SETTINGS}
        and not key.endswith("_token_id")
        and (key in COMPUTING or None not in (first.config.get(key), model.config.get(key)))
    ]
    if differing:
        yield f"{model.label}: {', '.join(differing)}; the result is as {first.label}"


def _tensor_differences(first: Model, model: Model) -> Iterator[str]:
    names, others = (
        {name for name in m.tensors if name != HEAD and not DERIVED_TENSOR.fullmatch(name)}
        for m in (first, model)
    )
    if missing := sorted(names - others, key=layer_order):
        yield f"{model.label}: {_listed(missing, 'tensor')} missing that {first.label} has"
    if extra := sorted(others - names, key=layer_order):
        yield f"{model.label}: {_listed(extra, 'tensor')} that {first.label} does not have"
    wrong = [
        name
        for name in sorted(names & others, key=layer_order)
        if _without_vocabulary(name, first) != _without_vocabulary(name, model)
    ]
    if wrong:
        name = wrong[0]
        yield (
            f"{model.label}: {name} has shape {list(model.tensors[name].shape)}, but "
            f"{list(first.tensors[name].shape)} in {first.label}{_more(wrong)}. "
            "Merge models of one size"
        )


def _without_vocabulary(name: str, model: Model) -> tuple[int, ...]:
    shape = model.tensors[name].shape
    return shape[1:] if name == EMBEDDING else shape


def special_ids(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Ids of special tokens by key; -1 and null stand for none.

    >>> special_ids({"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": None})
    {'bos_token_id': [1], 'eos_token_id': [2, 7]}
    """
    ids = {
        key: [i for i in (value if isinstance(value, list) else [value]) if type(i) is int]
        for key, value in config.items()
        if key.endswith("_token_id")
    }
    return {key: kept for key, value in ids.items() if (kept := [i for i in value if i >= 0])}


def special_id_form_problems(label: str, file: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """Special ids that are no ids."""
    for key, value in settings.items():
        ids = value if isinstance(value, list) else [value]
        sound = all(i is None or (type(i) is int and i >= -1) for i in ids)
        if key.endswith("_token_id") and not sound:
            yield (
                f"{label}: {key} in {file} is {repr(value)[:60]}, expected a whole number from "
                "0 on, a list of them or null. Set it to the id of that token"
            )


def special_id_problems(
    label: str, file: str, config: Mapping[str, Any], rows: int
) -> Iterator[str]:
    """Special tokens of the result that its vocabulary does not have."""
    for key, ids in special_ids(config).items():
        if beyond := [str(token_id) for token_id in dict.fromkeys(ids) if token_id >= rows]:
            shown = ", ".join(beyond[:3]) + (", ..." if len(beyond) > 3 else "")
            yield (
                f"{label}: {key} {shown} in {file} lies beyond the vocabulary of the result "
                f"({rows} rows). Keep the row (vocabulary 'max', 'union' or 'base') or choose "
                "a model with other special tokens (tokenizer_source)"
            )


def _listed(names: Sequence[str], noun: str) -> str:
    """ "3 tensors (a, b, c, ...)"."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''} ({shown})"


def _more(found: Sequence[str]) -> str:
    """ " (and 2 more tensors)" after the first of three."""
    rest = len(found) - 1
    return f" (and {rest} more tensor{'s' if rest > 1 else ''})" if rest else ""


def layer_order(name: str) -> tuple[int, int, str]:
    """Embedding, layers by number, final norm, head: the order in which a model computes."""
    if match := re.match(r"model\.layers\.(\d+)\.", name):
        return (1, int(match[1]), name)
    return ({EMBEDDING: 0, HEAD: 3}.get(name, 2), 0, name)
