"""Bring models together: one set of tensors, one vocabulary size, or all that speaks against it.

The same rules serve models in memory (`prepare_models_for_merging`) and model folders, whose
config.json and headers are enough (`align`).
"""

import copy
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

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
    pair_notes,
    pair_problems,
    special_id_problems,
)
from model_errors import ModelCompatibilityError
from model_row_maps import merge_vocabularies
from model_rows import MappedRows, TensorRows, dtype_name
from model_safetensors import TensorInfo
from model_tokenizer import TokenTable, added_token, read_tokens
from model_vocabulary import (
    MergedVocabulary,
    RowMap,
    Side,
    VocabularySettings,
    chosen_donor,
    settings_problems,
    vocabulary_settings,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ModelCompatibilityError", "align", "prepare_models_for_merging"]

DEFAULT_VOCABULARY = VocabularySettings()

DEFAULT_IDS = {kind: {"bos_token_id": 1, "eos_token_id": 2} for kind in ("llama", "mistral")}
"""Special ids of a config that names none, as in transformers."""

QUANTIZING_PACKAGES = (
    *("bitsandbytes", "auto_gptq", "gptqmodel", "awq", "hqq", "compressed_tensors"),
    *("torchao", "quanto", "eetq", "aqlm", "fp8"),
)


class AlignedTensor(NamedTuple):
    """A tensor of the merged model.

    Attributes:
        shape: in the merged model.
        sources: which tensor of each model feeds it.
        row_map: which of their rows feeds which row; None where the numbers are the same.
    """

    shape: tuple[int, ...]
    sources: tuple[str, ...]
    row_map: RowMap | None = None


@dataclass(frozen=True)
class Alignment:
    """How the tensors of several models become those of the merged one.

    Attributes:
        tensors: every tensor of the merged model by name, in the order of the layers.
        vocabulary: its tokens, and where their rows come from.
        tied: the merged model's head is its embedding.
        special_ids: `*_token_id` entries of the merged config, where they are not those of the
            first model.
        notes: what was decided, for the report.
    """

    tensors: Mapping[str, AlignedTensor]
    vocabulary: MergedVocabulary
    tied: bool
    special_ids: Mapping[str, Any]
    notes: tuple[str, ...]


def align(
    models: Sequence[Model],
    vocabulary: VocabularySettings = DEFAULT_VOCABULARY,
    *,
    donor: int | None = None,
    has_base: bool = True,
    weights: Sequence[float] | None = None,
) -> Alignment:
    """Decide how models are brought together, or say everything that speaks against it.

    Args:
        models: the first one gives the structure: the base, or the first model.
        vocabulary: how their vocabularies are brought together.
        donor: index of the model whose tokenizer and special tokens the result has; see
            `model_vocabulary.chosen_donor` and `model_row_maps.merge_vocabularies`.
        has_base: whether the first model is a base, whose rows stand in for missing ones.
        weights: of the models, for `linear_missing` "renormalise".

    Raises:
        ModelCompatibilityError: a model is quantized, not of the LLaMA family or incomplete;
            architectures, shapes or settings differ; token ids do not agree; a special token
            would be lost.
    """
    problems = fit_problems(models)
    if not all(_vocabulary_rows(model) for model in models):
        raise ModelCompatibilityError(problems)
    merged, wrong = merge_vocabularies(
        [Side(model.label, _vocabulary_rows(model), model.tokens) for model in models],
        vocabulary,
        donor=donor,
        has_base=has_base,
        weights=weights,
    )
    special = models[merged.donor]
    problems += wrong
    problems += special_id_problems(special.label, "config.json", special.config, merged.rows)
    if problems:
        raise ModelCompatibilityError(problems)
    tied = [is_tied(model) for model in models]
    result_tied = tied[0] if vocabulary.tie == "base" else all(tied)
    return Alignment(
        tensors=_aligned_tensors(models, tied, result_tied, merged),
        vocabulary=merged,
        tied=result_tied,
        special_ids=_other_special_ids(models[0].config, special.config),
        notes=(
            *merged.notes,
            *filter(None, [merged.assumption]),
            *_notes(models, tied, result_tied),
        ),
    )


def _vocabulary_rows(model: Model) -> int:
    """Rows of the embedding; 0 where it is missing or no matrix."""
    embedding = model.tensors.get(EMBEDDING)
    return embedding.shape[0] if embedding is not None and len(embedding.shape) == 2 else 0


def fit_problems(models: Sequence[Model]) -> list[str]:
    """What is wrong with each model, and what keeps it from being merged with the first one."""
    found = [list(model_problems(model)) for model in models]
    problems = [problem for of_one in found for problem in of_one]
    sound = [model for model, of_one in zip(models, found, strict=True) if not of_one]
    if sound and sound[0] is models[0]:
        for model in sound[1:]:
            problems += pair_problems(models[0], model)
    return problems


def _other_special_ids(first: Mapping[str, Any], donor: Mapping[str, Any]) -> dict[str, Any]:
    """The donor's special ids where the first model's config says something else.

    What the donor's config leaves out is what its class has by default.
    """
    keys = [key for key in (*first, *donor) if key.endswith("_token_id")]
    ids = DEFAULT_IDS.get(str(donor.get("model_type")), {}) | dict(donor)
    return {key: ids.get(key) for key in keys if ids.get(key) != first.get(key)}


def _aligned_tensors(
    models: Sequence[Model], tied: Sequence[bool], result_tied: bool, merged: MergedVocabulary
) -> dict[str, AlignedTensor]:
    names = [name for name in models[0].tensors if not DERIVED_TENSOR.fullmatch(name)]
    names = [name for name in names if name != HEAD] + [HEAD] * (not result_tied)
    aligned = {}
    for name in sorted(names, key=layer_order):
        sources = tuple(EMBEDDING if name == HEAD and model_tied else name for model_tied in tied)
        shape = models[0].tensors[sources[0]].shape
        if name in VOCABULARY_TENSORS:
            aligned[name] = AlignedTensor((merged.rows, *shape[1:]), sources, merged.row_map)
        else:
            aligned[name] = AlignedTensor(shape, sources)
    return aligned


def _notes(models: Sequence[Model], tied: Sequence[bool], result_tied: bool) -> Iterator[str]:
    if result_tied and not all(tied):
        heads = [model.label for model, own in zip(models, tied, strict=True) if not own]
        yield (
            f"the result ties its head to the embedding as {models[0].label} does; the trained "
            f"heads of {', '.join(heads)} are lost"
        )
    elif any(tied) and not all(tied):
        yield "some models tie their head to the embedding, some do not: the result does not"
    for model, model_tied in zip(models, tied, strict=True):
        if model_tied and HEAD in model.tensors:
            yield f"{model.label}: ties its head to the embedding, so its stored {HEAD} is not used"
        if any(DERIVED_TENSOR.fullmatch(name) for name in model.tensors):
            yield f"{model.label}: stored rotary_emb.inv_freq left out (loaders compute it)"
    for model in models[1:]:
        yield from pair_notes(models[0], model)


def prepare_models_for_merging(
    base: "PreTrainedModel",
    ft_models: "Sequence[PreTrainedModel]",
    *,
    vocabulary: str | VocabularySettings = "min",
    tokenizers: "Sequence[str | os.PathLike[str] | PreTrainedTokenizerBase] | None" = None,
) -> "tuple[PreTrainedModel, list[PreTrainedModel]]":
    """Check models in memory and bring them to one vocabulary, by default the smallest.

    Args:
        base: a transformers causal language model of the LLaMA family.
        ft_models: its fine-tunes.
        vocabulary: as in a merge of folders; see `model_vocabulary.VocabularySettings`.
        tokenizers: of the base and the models, as folders or transformers tokenizers; by
            default those in the folders from which the models were loaded, if they hold any.

    Returns:
        The same models, changed in place: embedding, head, `config.vocab_size` and special
        token ids are those of the merged vocabulary in all of them, and all have the generation
        config of the model whose tokenizer it is; where only some models tie their head to the
        embedding, those get a head of their own.

    Raises:
        ModelCompatibilityError: a model is quantized, architectures, shapes or settings differ,
            token ids do not agree, or a special token would be lost. Nothing has been changed
            then.
        ValueError: the settings are wrong, or the number of tokenizers.

    Warns:
        UserWarning: for everything that the report of a merge would note.
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
    sources = [None] * len(models) if tokenizers is None else list(tokenizers)
    if len(sources) != len(models):
        raise ValueError(f"tokenizers: got {len(sources)} for {len(models)} models, base included")
    settings = vocabulary_settings(vocabulary)
    donor, wrong = chosen_donor(labels, settings, None)
    if wrong := [*settings_problems(settings), *wrong]:
        raise ValueError("\n".join(wrong))
    described = [describe(*each) for each in zip(labels, models, sources, strict=True)]
    alignment = align(described, settings, donor=donor)
    generation = models[alignment.vocabulary.donor].generation_config
    label, rows = labels[alignment.vocabulary.donor], alignment.vocabulary.rows
    ids = {} if generation is None else generation.to_dict()
    if lost := [*special_id_problems(label, "its generation config", ids, rows)]:
        raise ModelCompatibilityError(lost)
    warn_about(alignment, stacklevel=3, always=tokenizers is not None)
    _give_vocabulary(models, alignment)
    for model in models:
        model.generation_config = copy.deepcopy(generation)
    return base, list(ft_models)


def warn_about(
    alignment: Alignment, stacklevel: int, *, always: bool = False, of_models: Sequence[str] = ()
) -> None:
    """One warning with everything that the user should know, of the models themselves too.

    That ids were taken to agree is worth one only beside something else (or `always`): models in
    memory seldom have their tokenizers with them.
    """
    assumption = None if always else alignment.vocabulary.assumption
    notes = [*dict.fromkeys(of_models), *alignment.notes]
    if any(note != assumption for note in notes):
        warnings.warn("\n".join(notes), stacklevel=stacklevel)


def _give_vocabulary(models: "Sequence[PreTrainedModel]", alignment: Alignment) -> None:
    """Give every model the rows of the merged vocabulary."""
    rows = alignment.vocabulary.rows
    states = [model.state_dict() for model in models]
    mapped = {
        name: _mapped(states, tensor)
        for name, tensor in alignment.tensors.items()
        if tensor.row_map is not None
    }
    for index, model in enumerate(models):
        resize_vocabulary(model, rows, tied=alignment.tied)
        state = model.state_dict()
        for name, values in mapped.items():
            state[name].copy_(values[index])
        set_special_ids(model, alignment.special_ids)


def _mapped(states: "Sequence[Mapping[str, Tensor]]", tensor: AlignedTensor) -> "list[Tensor]":
    """The rows of the merged vocabulary of each model, in its own dtype, from its parameters."""
    import torch

    assert tensor.row_map is not None
    sources = [
        TensorRows({name: state[name]}) for name, state in zip(tensor.sources, states, strict=True)
    ]
    values = [np.empty(tensor.shape, dtype=np.float32) for _ in sources]
    MappedRows(sources, tensor.sources, tensor.row_map).read(0, tensor.shape[0], values)
    return [
        torch.from_numpy(value).to(state[name].dtype)
        for value, name, state in zip(values, tensor.sources, states, strict=True)
    ]


def resize_vocabulary(model: "PreTrainedModel", rows: int, *, tied: bool) -> None:
    """Give a model so many rows, the last ones cut or undefined, and a head of its own or none."""
    if len(model.get_input_embeddings().weight) != rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    if tied and not _has_tied_head(model):
        model.config.tie_word_embeddings = True
        model.tie_weights()
    if not tied:
        untie_head(model)


def set_special_ids(model: "PreTrainedModel", special_ids: Mapping[str, Any]) -> None:
    """Set `*_token_id` entries in a model's config."""
    for key, value in special_ids.items():
        setattr(model.config, key, value)


def untie_head(model: "PreTrainedModel") -> None:
    """Give a model whose head is its embedding a head of its own, with the same weights."""
    from torch import nn

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


def describe(
    label: str,
    model: "PreTrainedModel",
    tokenizer: "str | os.PathLike[str] | PreTrainedTokenizerBase | None" = None,
) -> ModelDescription:
    """A transformers model as the rules see it; its head is tied if it is so in fact."""
    tied = _has_tied_head(model)
    tensors = {
        name: TensorInfo(dtype_name(tensor), tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if not (tied and name == HEAD)
    }
    config = model.config.to_dict() | {"tie_word_embeddings": tied}
    return ModelDescription(label, config, tensors, _tokens(label, model, tokenizer))


def _tokens(
    label: str,
    model: "PreTrainedModel",
    tokenizer: "str | os.PathLike[str] | PreTrainedTokenizerBase | None",
) -> TokenTable | None:
    given = tokenizer is not None
    if not given:
        tokenizer = model.name_or_path or None
    if tokenizer is None:
        return None
    if isinstance(tokenizer, str | os.PathLike):
        table = read_tokens(Path(tokenizer), label)
        if table is None and given:
            raise ValueError(
                f"tokenizers: {tokenizer} is no folder with a tokenizer. Give a folder, or what "
                "AutoTokenizer.from_pretrained returns"
            )
        return table
    added = {
        str(token): added_token(token_id, str(token), token.__getstate__())
        for token_id, token in tokenizer.added_tokens_decoder.items()
    }
    return TokenTable({token_id: token for token, token_id in tokenizer.get_vocab().items()}, added)


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
