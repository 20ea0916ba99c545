"""Change values of a config.json and leave every other character as it was.

transformers 5 writes a loaded config in a new spelling (`rope_theta` moves into
`rope_parameters`) that transformers 4 reads without complaint as other values. So a config is
never loaded and saved again: only the text of the values that change is replaced.
"""

import json
from collections.abc import Mapping
from typing import Any


def read_config(text: str) -> dict[str, Any]:
    """The JSON object in `text`; `ValueError` if it is something else."""
    try:
        config = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(config, dict):
        raise ValueError("expected a JSON object")
    return config


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
    for key, value in read_config(text).items():
        if isinstance(value, dict) and key.endswith("_config"):
            start, stop = _value_spans(text)[key]
            inner = _with_inner_configs(text[start:stop], changes)
            inner = edit_config(inner, {name: changes[name] for name in changes.keys() & value})
            text = text[:start] + inner + text[stop:]
    return text


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
