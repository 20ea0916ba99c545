"""Bring models together: one set of tensors, one vocabulary size, or all that speaks against it.

The same rules serve models in memory (`prepare_models_for_merging`) and model folders, whose
config.json and headers are enough (`align`).
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from model_checks import (
    DERIVED_TENSOR,
    EMBEDDING,
    HEAD,
    VOCABULARY_TENSORS,
    Model,
    ModelDescription,
    is_tied,
    layer_order,
    model_problems,
    pair_problems,
    special_id_problems,
)
from model_errors import ModelCompatibilityError
from model_safetensors import FLOAT_DTYPES, TensorInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ModelCompatibilityError", "align", "prepare_models_for_merging"]

QUANTIZING_PACKAGES = (
    *("bitsandbytes", "auto_gptq", "gptqmodel", "awq", "hqq", "compressed_tensors"),
    *("torchao", "quanto", "eetq", "aqlm", "fp8"),
)


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
    found = [list(model_problems(model)) for model in models]
    problems = [problem for of_one in found for problem in of_one]
    sound = [model for model, of_one in zip(models, found, strict=True) if not of_one]
    sizes = [model.tensors[EMBEDDING].shape[0] for model in sound]
    vocab_size = min(sizes, default=0)
    if sound and sound[0] is models[0]:
        for model in sound[1:]:
            problems += pair_problems(models[0], model)
        smallest = sound[sizes.index(vocab_size)]
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
    for name in sorted(names, key=layer_order):
        sources = tuple(EMBEDDING if name == HEAD and model_tied else name for model_tied in tied)
        shape = models[0].tensors[sources[0]].shape
        if name in VOCABULARY_TENSORS:
            shape = (vocab_size, *shape[1:])
        aligned[name] = AlignedTensor(shape, sources)
    return aligned


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


def prepare_models_for_merging(
    base: "PreTrainedModel", ft_models: "Sequence[PreTrainedModel]"
) -> "tuple[PreTrainedModel, list[PreTrainedModel]]":
    """Check models in memory and cut them to the smallest vocabulary.

    Args:
        base: a transformers causal language model of the LLaMA family.
        ft_models: its fine-tunes.

    Returns:
        The same models, changed in place: where a vocabulary was larger than the smallest, it
        is cut, embedding, head and `config.vocab_size` together; where only some models tie
        their head to the embedding, those get a head of their own.

    Raises:
        ModelCompatibilityError: a model is quantized, architectures or shapes differ, or a
            special token would be cut off. Nothing has been changed then.

    Warns:
        UserWarning: a vocabulary is cut, or a head is untied.
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
    for note in alignment.notes:
        warnings.warn(note, stacklevel=2)
    for model in models:
        if len(model.get_input_embeddings().weight) != alignment.vocab_size:
            model.resize_token_embeddings(alignment.vocab_size)
        if not alignment.tied:
            untie_head(model)
    return base, list(ft_models)


def untie_head(model: "PreTrainedModel") -> None:
    """Give a model whose head is its embedding a head of its own, with the same weights."""
    if not _has_tied_head(model):
        return
    embedding = model.get_input_embeddings().weight.detach()
    head = nn.Linear(
        embedding.shape[1], embedding.shape[0], bias=False, device="meta", dtype=embedding.dtype
    )
    head.weight = nn.Parameter(embedding.clone())
    model.config.tie_word_embeddings = False
    model.set_output_embeddings(head)


def _has_tied_head(model: "PreTrainedModel") -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def describe(label: str, model: "PreTrainedModel") -> ModelDescription:
    """A transformers model as the rules see it; its head is tied if it is so in fact."""
    names = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
    tied = _has_tied_head(model)
    tensors = {
        name: TensorInfo(names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if not (tied and name == HEAD)
    }
    config = model.config.to_dict() | {"tie_word_embeddings": tied}
    return ModelDescription(label, config, tensors)


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
