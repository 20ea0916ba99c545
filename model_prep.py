"""Whether models fit together, and how: one architecture, float weights, one vocabulary size.

The same rules serve models in memory (`prepare_models_for_merging`) and model folders, whose
config.json and headers are enough (`align`). Everything that is wrong is reported at once.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from model_errors import ModelCompatibilityError
from model_safetensors import FLOAT_DTYPES, TensorInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ModelCompatibilityError", "align", "prepare_models_for_merging"]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
VOCABULARY_TENSORS = (EMBEDDING, HEAD)
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
HEAD_COUNTS = ("num_attention_heads", "num_key_value_heads", "head_dim")

_PROJECTION = r"self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj"
_NORM = r"(?:self_attn\.)?\w+norm"
FAMILY_TENSOR = re.compile(
    rf"model\.(?:embed_tokens\.weight|norm\.weight"
    rf"|layers\.(\d+)\.(?:(?:{_PROJECTION})\.(?:weight|bias)|{_NORM}\.weight))|lm_head\.weight"
)
"""Names of the tensors of Llama, Mistral, Qwen2, Qwen3 and models built like them."""

DERIVED_TENSOR = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Constants that old checkpoints store and every loader computes anew."""

LAYER_TENSORS = tuple(
    f"{part}.weight"
    for part in (
        *(f"self_attn.{letter}_proj" for letter in "qkvo"),
        *(f"mlp.{side}_proj" for side in ("gate", "up", "down")),
    )
)

QUANTIZED_SUFFIX = re.compile(
    r"\.(?:qweight|qzeros|g_idx|scales|weight_packed|weight_scale(?:_inv)?|weight_shape|absmax"
    r"|quant_map|nested_\w+|quant_state\.\w+|SCB|weight_format|W_q|meta)$|\.weight\.\w+"
)
INTEGER_DTYPE = re.compile(r"[IU]\d+|BOOL|torch\.(?:u?int\d+|bool)")
QUANTIZING_PACKAGES = (
    *("bitsandbytes", "auto_gptq", "gptqmodel", "awq", "hqq", "compressed_tensors"),
    *("torchao", "quanto", "eetq", "aqlm", "fp8", "fbgemm"),
)


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


class ModelDescription(NamedTuple):
    """A model reduced to what decides whether it can be merged."""

    label: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


class AlignedTensor(NamedTuple):
    """A tensor of the merged model: its shape, and which tensor of each model feeds it."""

    shape: tuple[int, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Alignment:
    """How the tensors of several models become those of the merged one.

    Attributes:
        tensors: every tensor of the merged model by name, in the order of the layers.
        vocab_size: rows of the embedding and the head in the merged model.
        tied: the merged model's head is its embedding.
        rows_cut: rows that each model loses, by label; only models that lose some.
        notes: what was decided, for the report.
    """

    tensors: Mapping[str, AlignedTensor]
    vocab_size: int
    tied: bool
    rows_cut: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def align(models: Sequence[Model]) -> Alignment:
    """Decide how models are brought together, or say everything that speaks against it.

    Args:
        models: the first one gives the structure: the base, or the first model.

    Returns:
        The tensors of the merged model. Vocabularies of different sizes are cut to the
        smallest, embedding and head together; token ids below it must mean the same in all
        models. Where only some models tie their head, the merged one has a head of its own.

    Raises:
        ModelCompatibilityError: a model is quantized, not of the LLaMA family or incomplete;
            architectures or shapes differ; a special token would be cut off.
    """
    problems = [problem for model in models for problem in model_problems(model)]
    if problems:
        raise ModelCompatibilityError(problems)
    problems = [problem for model in models[1:] for problem in pair_problems(models[0], model)]
    sizes = [model.tensors[EMBEDDING].shape[0] for model in models]
    vocab_size = min(sizes)
    smallest = models[sizes.index(vocab_size)]
    problems += special_id_problems(models[0], vocab_size, smallest.label)
    if problems:
        raise ModelCompatibilityError(problems)
    tied = [is_tied(model) for model in models]
    return Alignment(
        tensors=_aligned_tensors(models, tied, vocab_size),
        vocab_size=vocab_size,
        tied=all(tied),
        rows_cut={
            model.label: size - vocab_size
            for model, size in zip(models, sizes, strict=True)
            if size > vocab_size
        },
        notes=tuple(_notes(models, tied, sizes)),
    )


def _aligned_tensors(
    models: Sequence[Model], tied: Sequence[bool], vocab_size: int
) -> dict[str, AlignedTensor]:
    names = [name for name in models[0].tensors if not DERIVED_TENSOR.fullmatch(name)]
    if all(tied):
        names = [name for name in names if name != HEAD]
    elif HEAD not in names:
        names.append(HEAD)
    aligned = {}
    for name in sorted(names, key=_layer_order):
        sources = tuple(EMBEDDING if name == HEAD and model_tied else name for model_tied in tied)
        shape = models[0].tensors[sources[0]].shape
        if name in VOCABULARY_TENSORS:
            shape = (vocab_size, *shape[1:])
        aligned[name] = AlignedTensor(shape, sources)
    return aligned


def _layer_order(name: str) -> tuple[int, int, str]:
    """Embedding, layers by number, final norm, head: the order in which a model computes."""
    if match := re.match(r"model\.layers\.(\d+)\.", name):
        return (1, int(match[1]), name)
    return ({EMBEDDING: 0, HEAD: 3}.get(name, 2), 0, name)


def _notes(models: Sequence[Model], tied: Sequence[bool], sizes: Sequence[int]) -> Iterator[str]:
    if min(sizes) < max(sizes):
        rows = ", ".join(f"{model.label} {size}" for model, size in zip(models, sizes, strict=True))
        yield (
            f"vocabularies cut to the smallest, {min(sizes)} rows ({rows}); "
            "token ids are taken to mean the same in all models"
        )
    if any(tied) and not all(tied):
        yield "some models tie their head to the embedding, some do not: the result does not"
    for model, model_tied in zip(models, tied, strict=True):
        if model_tied and HEAD in model.tensors:
            yield f"{model.label}: ties its head to the embedding, so its stored {HEAD} is not used"
        if any(DERIVED_TENSOR.fullmatch(name) for name in model.tensors):
            yield f"{model.label}: stored rotary_emb.inv_freq left out (loaders compute it)"


def is_tied(model: Model) -> bool:
    """Whether a model uses its embedding as its head.

    As config.json says; where it says nothing, a model without a stored head is tied.
    """
    return bool(model.config.get("tie_word_embeddings", HEAD not in model.tensors))


def model_problems(model: Model) -> Iterator[str]:
    """What is wrong with one model on its own."""
    quantized = list(quantization_problems(model))
    if quantized:
        yield from quantized
        return
    strange = [
        name
        for name in model.tensors
        if not FAMILY_TENSOR.fullmatch(name) and not DERIVED_TENSOR.fullmatch(name)
    ]
    if strange:
        yield (
            f"{model.label}: not a LLaMA-family causal language model: model_type "
            f"{model.config.get('model_type')!r} with {len(strange)} tensors such as "
            f"{strange[0]!r}. Expected the tensor names of Llama, Mistral, Qwen2 or Qwen3"
        )
        return
    yield from completeness_problems(model)


def quantization_problems(model: Model) -> Iterator[str]:
    """Whether a model is quantized, by its config, its tensor names or its dtypes."""
    advice = "Merging needs float weights; use the original checkpoint"
    settings = model.config.get("quantization_config") or model.config.get("compression_config")
    if settings:
        method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
        yield (
            f"{model.label}: weights are quantized (quant_method {method or 'unknown'!r} in "
            f"config.json). {advice}"
        )
        return
    packed = [
        name
        for name, info in model.tensors.items()
        if QUANTIZED_SUFFIX.search(name) or INTEGER_DTYPE.fullmatch(info.dtype)
    ]
    if packed:
        yield (
            f"{model.label}: weights are quantized ({len(packed)} packed tensors such as "
            f"{packed[0]}, {model.tensors[packed[0]].dtype}). {advice}"
        )
        return
    for name, info in model.tensors.items():
        if info.dtype not in FLOAT_DTYPES:
            kind = "quantized to FP8" if info.dtype.startswith("F8") else f"stored as {info.dtype}"
            yield (
                f"{model.label}: weights are {kind} ({name}). "
                "Merging reads float32, float16 and bfloat16; save the model as one of these"
            )
            return


def completeness_problems(model: Model) -> Iterator[str]:
    """Tensors that config.json promises and the files lack, and the other way round."""
    layers = model.config.get("num_hidden_layers")
    if type(layers) is not int or layers < 1:
        yield (
            f"{model.label}: num_hidden_layers in config.json must be a whole number above 0, "
            f"got {layers!r}"
        )
        return
    expected = [EMBEDDING, "model.norm.weight"]
    expected += [] if is_tied(model) else [HEAD]
    expected += [f"model.layers.{n}.{part}" for n in range(layers) for part in LAYER_TENSORS]
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
    vocab_size = model.config.get("vocab_size")
    rows = {name: model.tensors[name].shape[0] for name in VOCABULARY_TENSORS
            if name in model.tensors and model.tensors[name].shape}  # fmt: skip
    for name, count in rows.items():
        if count != vocab_size:
            yield (
                f"{model.label}: {name} has {count} rows, but vocab_size in config.json is "
                f"{vocab_size}. Set vocab_size to the rows of the tensor"
            )


def pair_problems(first: Model, model: Model) -> Iterator[str]:
    """What keeps a model from being merged with the first one."""
    ours, theirs = first.config.get("model_type"), model.config.get("model_type")
    if ours != theirs:
        yield (
            f"{model.label}: model_type {theirs!r}, but {first.label} has {ours!r}. "
            "Merge models of one architecture"
        )
        return
    for key in HEAD_COUNTS:
        if first.config.get(key) != model.config.get(key):
            yield (
                f"{model.label}: {key} {model.config.get(key)}, but {first.label} has "
                f"{first.config.get(key)}. Merge fine-tunes of one base"
            )
    yield from _tensor_differences(first, model)


def _tensor_differences(first: Model, model: Model) -> Iterator[str]:
    names, others = (
        {name for name in m.tensors if name != HEAD and not DERIVED_TENSOR.fullmatch(name)}
        for m in (first, model)
    )
    if missing := sorted(names - others, key=_layer_order):
        yield f"{model.label}: {_listed(missing, 'tensor')} missing that {first.label} has"
    if extra := sorted(others - names, key=_layer_order):
        yield f"{model.label}: {_listed(extra, 'tensor')} that {first.label} does not have"
    shared = sorted(first.tensors.keys() & model.tensors.keys(), key=_layer_order)
    wrong = [
        name
        for name in shared
        if _without_vocabulary(name, first) != _without_vocabulary(name, model)
    ]
    if wrong:
        name = wrong[0]
        more = f" (and {len(wrong) - 1} more tensors)" if len(wrong) > 1 else ""
        yield (
            f"{model.label}: {name} has shape {list(model.tensors[name].shape)}, but "
            f"{list(first.tensors[name].shape)} in {first.label}{more}. "
            "Merge models of one size"
        )


def _without_vocabulary(name: str, model: Model) -> tuple[int, ...]:
    shape = model.tensors[name].shape
    return shape[1:] if name in VOCABULARY_TENSORS else shape


def special_id_problems(model: Model, vocab_size: int, smallest: str) -> Iterator[str]:
    """Special tokens of the merged model that a cut vocabulary no longer has."""
    for key in SPECIAL_IDS:
        value = model.config.get(key)
        for token_id in value if isinstance(value, list) else [value]:
            if isinstance(token_id, int) and token_id >= vocab_size:
                yield (
                    f"{model.label}: {key} {token_id} lies beyond the smallest vocabulary "
                    f"({vocab_size} rows, {smallest}), to which all models are cut. "
                    "Merge models that share their special tokens"
                )


def _listed(names: Sequence[str], noun: str) -> str:
    """ "3 tensors (a, b, c, ...)"."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''} ({shown})"


def prepare_models_for_merging(
    base: "PreTrainedModel", ft_models: "Sequence[PreTrainedModel]"
) -> "tuple[PreTrainedModel, list[PreTrainedModel]]":
    """Check models in memory and cut them to the smallest vocabulary.

    Args:
        base: a transformers causal language model of the LLaMA family.
        ft_models: its fine-tunes.

    Returns:
        The same models, changed in place where a vocabulary was larger than the smallest:
        embedding, head and `config.vocab_size` together.

    Raises:
        ModelCompatibilityError: a model is quantized, architectures or shapes differ, or a
            special token would be cut off. Nothing has been changed then.

    >>> # base, [code, math] = prepare_models_for_merging(base, [code, math])
    """
    models = [base, *ft_models]
    labels = ["base", *(f"ft_models[{index}]" for index in range(len(ft_models)))]
    quantized = [
        problem
        for label, model in zip(labels, models, strict=True)
        for problem in _quantized_modules(label, model)
    ]
    if quantized:
        raise ModelCompatibilityError(quantized)
    alignment = align([describe(label, model) for label, model in zip(labels, models, strict=True)])
    for model in models:
        if model.config.vocab_size != alignment.vocab_size:
            model.resize_token_embeddings(alignment.vocab_size)
    return base, list(ft_models)


def describe(label: str, model: "PreTrainedModel") -> ModelDescription:
    """A transformers model as the rules see it."""
    names = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
    tensors = {
        name: TensorInfo(names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
    }
    return ModelDescription(label, model.config.to_dict(), tensors)


def _quantized_modules(label: str, model: "PreTrainedModel") -> Iterator[str]:
    for name, module in model.named_modules():
        package = type(module).__module__
        if any(part in package for part in QUANTIZING_PACKAGES):
            yield (
                f"{label}: module {name or type(module).__name__} is quantized "
                f"({package}.{type(module).__name__}). Merging needs float weights; load the "
                "model without quantization"
            )
            return
