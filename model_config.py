"""Change values of a config.json and leave every other character as it was.

transformers 5 writes a loaded config in a new spelling (`rope_theta` moves into
`rope_parameters`) that transformers 4 reads without complaint as other values. So a config is
never loaded and saved again: only the text of the values that change is replaced.
"""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

MAX_INNER = 20
"""Configs inside configs inside configs."""


def read_config(text: str) -> dict[str, Any]:
    """The JSON object in `text`; `ValueError` if it is something else, or a key stands twice."""
    try:
        config = json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(config, dict):
        raise ValueError("expected a JSON object")
    level, depth = [config], 0
    while level := [v for each in level for k, v in each.items() if is_inner(k, v)]:
        depth += 1
        if depth > MAX_INNER:
            raise ValueError("it is nested too deeply")
    return config


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key stands twice: readers take the first one, or the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice[:60]!r} stands in it twice")
    return values


CODE_KEYS = (
    *("auto_map", "trust_remote_code", "custom_pipelines", "_attn_implementation"),
    *("_attn_implementation_internal", "_experts_implementation_internal"),
)
"""Entries by which a loader would run code that comes with a model, or from the Hub."""


def code_keys(config: Mapping[str, Any]) -> list[str]:
    """The entries of a config, and of configs inside it, that name code."""
    inner = (value for key, value in config.items() if is_inner(key, value))
    found = [key for key in CODE_KEYS if key in config]
    return list(dict.fromkeys([*found, *(key for value in inner for key in code_keys(value))]))


def is_inner(key: str, value: Any) -> bool:
    """Whether an entry is a config inside a config, such as `text_config`."""
    return isinstance(value, dict) and key.endswith("_config")


def without_code(text: str) -> str:
    """A config without the entries of `code_keys`; the rest of the text stays as it is.

    >>> without_code('{"a": 1, "auto_map": {"AutoConfig": "x.Y"}, "text_config": {"auto_map": 1}}')
    '{"a": 1, "text_config": {}}'
    """
    config, spans = read_config(text), _value_spans(text)
    ends = [text.index("{") + 1, *(stop for _, stop in spans.values())]
    kept: list[str] = []
    for (key, (start, stop)), before in zip(spans.items(), ends, strict=False):
        if key in CODE_KEYS:
            continue
        entry = text[before:start]  # the comma, spaces, and the key
        entry = entry if kept else entry.lstrip(" \t\r\n,") if before != ends[0] else entry
        inner = without_code(text[start:stop]) if is_inner(key, config[key]) else text[start:stop]
        kept.append(entry + inner)
    return "".join([text[: ends[0]], *kept, text[ends[-1] :]])


def edit_config(text: str, changes: Mapping[str, Any]) -> str:
    """Replace top-level values of a JSON object; keys it lacks are added at the end.

    Args:
        text: a JSON object.
        changes: new values by key. A value equal to the present one leaves the text alone.

    Returns:
        The text with these values replaced and nothing else touched.

    >>> edit_config('{"vocab_size": 10,  "rope_theta": 5e5}', {"vocab_size": 8, "tied": True})
    '{"vocab_size": 8,  "rope_theta": 5e5,\\n  "tied": true}'
    """
    present = read_config(text)
    spans = _value_spans(text)
    for key in sorted(changes.keys() & spans.keys(), key=lambda key: spans[key], reverse=True):
        if present[key] != changes[key] or type(present[key]) is not type(changes[key]):
            start, stop = spans[key]
            text = text[:start] + _written(changes[key]) + text[stop:]
    added = [f"\n  {json.dumps(key)}: {_written(changes[key])}" for key in changes.keys() - spans]
    if added:
        end = text.rindex("}")
        before = text[:end].rstrip()
        comma = "" if before.endswith("{") else ","
        text = before + comma + ",".join(sorted(added)) + text[len(before) : end] + text[end:]
    return text


def merged_config(text: str, changes: Mapping[str, Any]) -> str:
    """`edit_config`, also of the configs inside a config (such as `text_config`).

    Inside, only keys that are there are changed.

    >>> merged_config('{"vocab_size": 10, "text_config": {"vocab_size": 10}}', {"vocab_size": 8})
    '{"vocab_size": 8, "text_config": {"vocab_size": 8}}'
    """
    return edit_config(_with_inner_configs(text, changes), changes)


def _with_inner_configs(text: str, changes: Mapping[str, Any]) -> str:
    """The text with the configs inside it edited, at any depth."""
    config, spans = read_config(text), _value_spans(text)
    parts, end = [], 0
    for key, value in config.items():
        if is_inner(key, value):
            start, stop = spans[key]
            inner = _with_inner_configs(text[start:stop], changes)
            inner = edit_config(inner, {name: changes[name] for name in changes.keys() & value})
            parts += [text[end:start], inner]
            end = stop
    return "".join([*parts, text[end:]])


def _written(value: Any) -> str:
    """A value as JSON, over several lines if there are objects in it."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not any(isinstance(part, dict) for part in parts):
        return json.dumps(value)
    return json.dumps(value, indent=2).replace("\n", "\n  ")


def _value_spans(text: str) -> dict[str, tuple[int, int]]:
    """Where the value of each top-level key starts and stops in valid JSON text."""
    decoder = json.JSONDecoder()
    spans = {}
    position = _skip_space(text, text.index("{") + 1)
    while text[position] != "}":
        key, position = decoder.raw_decode(text, position)
        start = _skip_space(text, _skip_space(text, position) + 1)
        _, stop = decoder.raw_decode(text, start)
        spans[key] = (start, stop)
        position = _skip_space(text, stop)
        if text[position] == ",":
            position = _skip_space(text, position + 1)
    return spans


def _skip_space(text: str, position: int) -> int:
    while text[position].isspace():
        position += 1
    return position
