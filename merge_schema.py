"""The JSON Schema of our recipes, made from what the methods declare."""

from typing import Any

from merge_finite import NAN_POLICIES
from merge_methods import ALIASES, METHODS, Method
from merge_parameters import PROFILES
from merge_recipe import Parameter
from model_lora import ROUNDINGS, TYINGS
from model_safetensors import DTYPE_NAMES
from model_vocabulary import CHOICES

SCHEMA_ID = "https://json-schema.org/draft/2020-12/schema"

_TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
_TEXTS = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}
_POSITIVE = {"type": "integer", "minimum": 1}


def recipe_schema() -> dict[str, Any]:
    """What a recipe with `method` may say; draft 2020-12.

    It knows names, kinds and choices. What numbers may be, and what goes together, is checked when
    a recipe is read.
    """
    names = [*METHODS, *ALIASES]
    return {
        "$schema": SCHEMA_ID,
        "title": "llama-merge recipe",
        "type": "object",
        "required": ["method"],
        "properties": {
            "name": _described(_TEXT, "what later recipes of the file call its result"),
            "method": {"enum": names},
            "profile": _described({"enum": [*PROFILES]}, "whose conventions the defaults follow"),
            "base_model": {"$ref": "#/$defs/model"},
            "models": _some("entry"),
            "slices": _some("slice"),
            "parameters": {"type": "object"},
            "dtype": _described({"enum": [*DTYPE_NAMES]}, "of the result"),
            "max_shard_size": {"anyOf": [_TEXT, _POSITIVE]},
            "vocabulary": {"$ref": "#/$defs/vocabulary"},
            "tokenizer_source": {"$ref": "#/$defs/model"},
            "chat_template": _described(
                _TEXT, "auto, none, a model, the name of a template, or a Jinja template"
            ),
            "include": _TEXTS,
            "exclude": _TEXTS,
            "merge_embeddings": {"type": "boolean"},
            "merge_lm_head": {"type": "boolean"},
            "weight_decay": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
            "clamp_range": {
                "type": "array",
                "prefixItems": [{"type": ["number", "null"]}] * 2,
                "minItems": 2,
                "maxItems": 2,
            },
            "lora_rounding": {"enum": [*ROUNDINGS]},
            "tied_lora": {"enum": [*TYINGS]},
            "nan_policy": {"enum": [*NAN_POLICIES]},
        },
        "additionalProperties": False,
        "oneOf": [{"required": ["models"]}, {"required": ["slices"]}],
        "allOf": [_of_method(name) for name in names],
        "$defs": {
            "model": _described(
                _TEXT,
                "a folder, or a Hub id, maybe with @REVISION; LoRA adapters on top follow a +, "
                "maybe with :STRENGTH",
            ),
            "entry": {
                "anyOf": [
                    {"$ref": "#/$defs/model"},
                    _object({"model": {"$ref": "#/$defs/model"}, "parameters": {}}, "model"),
                ]
            },
            "slice": _object(
                {
                    "sources": _some("source"),
                    "base_model": {"$ref": "#/$defs/model"},
                    "parameters": {"type": "object"},
                },
                "sources",
            ),
            "source": _object(
                {
                    "model": {"$ref": "#/$defs/model"},
                    "layer_range": {
                        "type": "array",
                        "items": {"type": "integer", "minimum": 0},
                        "minItems": 2,
                        "maxItems": 2,
                    },
                    "parameters": {},
                },
                "model",
                "layer_range",
            ),
            "vocabulary": {"anyOf": [_TEXT, _vocabulary()]},
            **{f"parameters-{name}": _parameters(METHODS[name]) for name in METHODS},
        },
    }


def _described(schema: dict[str, Any], text: str) -> dict[str, Any]:
    return {**schema, "description": text}


def _some(what: str) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": {"$ref": f"#/$defs/{what}"}}


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [*required],
        "additionalProperties": False,
    }


def _of_method(name: str) -> dict[str, Any]:
    """Which parameters go with a method, wherever they stand."""
    method = ALIASES[name][0] if name in ALIASES else name
    parameters = {"parameters": {"$ref": f"#/$defs/parameters-{method}"}}
    entries = {"type": "array", "items": {"properties": parameters}}
    slices = {"items": {"properties": {**parameters, "sources": entries}}}
    then = {"properties": {**parameters, "models": entries, "slices": slices}}
    return {"if": {"properties": {"method": {"const": name}}}, "then": then}


def _parameters(method: Method) -> dict[str, Any]:
    properties = {parameter.key: _setting(parameter) for parameter in method.parameters}
    return {"type": ["object", "null"], "properties": properties, "additionalProperties": False}


def _setting(parameter: Parameter) -> dict[str, Any]:
    """One value, a gradient, or values by filters."""
    value: dict[str, Any] = {"type": _KINDS[parameter.kind]}
    if parameter.choices:
        value = {"enum": [*parameter.choices]}
    values = {"anyOf": [value, {"type": "array", "minItems": 1, "items": value}]}
    choice = _object({"filter": _TEXT, "value": values}, "value")
    several = {"type": "array", "minItems": 1, "items": choice}
    return _described({"anyOf": [*values["anyOf"], choice, several]}, parameter.help)


_KINDS = {float: "number", int: "integer", bool: "boolean", str: "string"}


def _vocabulary() -> dict[str, Any]:
    return _object(
        {
            "mode": _TEXT,
            "tokens": _described({"type": "object"}, "where the rows of single tokens come from"),
            "pad_to_multiple_of": _POSITIVE,
            "id_alias": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            **{name: {"enum": [*choices]} for name, choices in CHOICES.items()},
        }
    )
