"""Recipes written down, as `merge_grammar` reads them."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from merge_methods import METHODS
from merge_recipe import OPTIONS, Parameter, Recipe, Slice
from merge_settings import written
from model_vocabulary import TokenSource, VocabularySettings


def recipe_document(recipe: Recipe, *, complete: bool = False) -> dict[str, Any]:
    """A recipe as a file has it: `merge_grammar.recipe_of` gives the same recipe again.

    Args:
        recipe: its method under our name; `output_dir` is not part of it.
        complete: also write what is as it is by itself.
    """
    declared = {parameter.name: parameter for parameter in METHODS[recipe.method].parameters}
    content: dict[str, Any] = {"method": recipe.method, "profile": recipe.profile}
    first = _config_giver(recipe)
    if first is not None:
        content["base_model"] = first
    if recipe.slices:
        content["slices"] = [_written_slice(each, declared) for each in recipe.slices]
    else:
        own, shared = _written_parameters(recipe.parameters, declared, len(recipe.models))
        content["models"] = [
            {"model": model} | ({"parameters": each} if each else {})
            for model, each in zip(recipe.models, own, strict=True)
        ]
        content |= {"parameters": shared} if shared else {}
    defaults = Recipe(method="", models=())
    for name in ("dtype", "max_shard_size", "tokenizer_source", "chat_template", *OPTIONS):
        value = recipe.options[name] if name in OPTIONS else getattr(recipe, name)
        default = defaults.options[name] if name in OPTIONS else getattr(defaults, name)
        if value != default or (complete and value is not None):
            content[name] = [*value] if isinstance(value, tuple) else value
    vocabulary = _written_vocabulary(recipe.vocabulary, complete=complete)
    return content | ({"vocabulary": vocabulary} if vocabulary else {})


def _config_giver(recipe: Recipe) -> str | None:
    """The base; or the model that gives config.json where it is not the first that is stacked."""
    inputs = [source.model for each in recipe.slices for source in each.inputs]
    if recipe.base_model is None and inputs and recipe.models[0] != inputs[0]:
        return recipe.models[0]
    return recipe.base_model


def _written_slice(each: Slice, declared: Mapping[str, Parameter]) -> dict[str, Any]:
    own, shared = _written_parameters(each.parameters, declared, len(each.sources))
    if each.base is not None:
        own = [{}, *own]
    sources = [
        {"model": model, "layer_range": [first, stop]} | ({"parameters": of} if of else {})
        for (model, first, stop), of in zip(each.inputs, own, strict=True)
    ]
    content: dict[str, Any] = {"sources": sources}
    content |= {} if each.base is None else {"base_model": each.base.model}
    return content | ({"parameters": shared} if shared else {})


def _written_parameters(
    parameters: Mapping[str, Any], declared: Mapping[str, Parameter], models: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Those of each model, and those of all."""
    own: list[dict[str, Any]] = [{} for _ in range(models)]
    shared = {}
    for name, value in parameters.items():
        if value is None:
            continue
        parameter = declared[name]
        if not parameter.per_model:
            shared[parameter.key] = _number_written(written(value))
            continue
        for of_model, each in zip(own, value, strict=True):
            of_model[parameter.key] = _number_written(written(each))
    return own, shared


def _number_written(value: Any) -> Any:
    """Numbers of numpy and torch as Python's."""
    return value.item() if hasattr(value, "item") else value


def _written_vocabulary(settings: VocabularySettings, *, complete: bool) -> dict[str, Any]:
    """What is not as it is by itself; or everything."""
    defaults = VocabularySettings()
    content = {
        each.name: getattr(settings, each.name)
        for each in fields(settings)
        if getattr(settings, each.name) != getattr(defaults, each.name)
        or (complete and getattr(settings, each.name) is not None)
    }
    if "tokens" in content:
        content["tokens"] = {
            token: _written_source(source) for token, source in settings.tokens.items()
        }
    if "id_alias" in content:
        content["id_alias"] = [*settings.id_alias]
    return content


def _written_source(source: TokenSource) -> dict[str, Any]:
    if source.model:
        row = {"token": source.token, "token_id": source.token_id}
        given = {key: value for key, value in row.items() if value is not None}
        kind: dict[str, Any] = {"kind": "model_token", "model": source.model, **given}
    else:
        kind = {"kind": "zero"}
    return {"source": kind} | ({"force": True} if source.force else {})
