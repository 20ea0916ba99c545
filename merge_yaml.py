"""Recipes as text: YAML or JSON, read strictly, with the line of every entry.

YAML is read by the core schema of YAML 1.2, in which 1e-3 is a number and `no` a word, without
tags, and with bounds on what a few bytes can become: a recipe may come from anywhere.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import yaml

MAX_BYTES = 10**6
MAX_ENTRIES = 100_000
MAX_DEPTH = 20
MAX_PARTS = 20_000
MAX_DIGITS = 300

Path = tuple[str | int, ...]
"""Where an entry is: ("models", 0, "parameters", "weight")."""

_CORE = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"),
    "infinity": re.compile(r"[-+]?\.(inf|Inf|INF)"),
    "nan": re.compile(r"\.(nan|NaN|NAN)"),
}


class RecipeError(ValueError):
    """A recipe that cannot be read; the text has one line per problem, each with its place."""


@dataclass(frozen=True)
class Document:
    """One recipe as it was written.

    Attributes:
        value: of mappings, lists, texts, numbers, truth values and None.
        source: what the file is called.
        lines: of the entries, from 1 on; empty for JSON.
    """

    value: Any
    source: str
    lines: Mapping[Path, int] = field(default_factory=dict)

    def place(self, path: Path = ()) -> str:
        """Where an entry is, for a message.

        >>> Document({}, "r.yml", {("models",): 3}).place(("models", 0, "parameters"))
        'r.yml:3: models[0].parameters'
        """
        line = next((self.lines[known] for known in _upwards(path) if known in self.lines), None)
        at = f"{self.source}:{line}" if line is not None else self.source
        return f"{at}: {path_text(path)}" if path else at


def _upwards(path: Path) -> Iterator[Path]:
    """An entry's path, and those of what it lies in."""
    return (path[:length] for length in range(len(path), -1, -1))


def path_text(path: Path) -> str:
    """An entry's path as it is written in messages.

    >>> path_text(("slices", 0, "sources", 1, "layer_range"))
    'slices[0].sources[1].layer_range'
    """
    parts = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return "".join(parts).removeprefix(".")


def read_documents(text: str | bytes, source: str = "recipe") -> list[Document]:
    """The recipes in a text: YAML (several are parted by ---) or JSON.

    Args:
        text: at most `MAX_BYTES` of it.
        source: what to call it in messages. What ends in ".json" is read as JSON.

    Raises:
        RecipeError: the text is too large, not UTF-8, not YAML or JSON, or has keys twice, tags,
            anchors that contain themselves or come to more than `MAX_ENTRIES` entries.
    """
    data = text.encode() if isinstance(text, str) else text
    if len(data) > MAX_BYTES:
        raise RecipeError(
            f"{source}: {len(data):,} bytes; a recipe has at most {MAX_BYTES:,}. Is it one?"
        )
    try:
        decoded = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{source}: not UTF-8 (byte {error.start}). Save it as UTF-8") from None
    if source.endswith(".json"):
        return [Document(_read_json(decoded, source), source)]
    return _read_yaml(decoded, source)


def _read_json(text: str, source: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice = next(key for key, count in counts.items() if count > 1)
            raise RecipeError(f"{source}: the key {twice[:60]!r} is given twice. Keep one of them")
        return value

    try:
        value = json.loads(text, object_pairs_hook=unique)
        _check_depth(value, source)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{source}:{error.lineno}: no JSON: {error.msg}") from None
    except RecipeError:
        raise
    except ValueError as error:  # more digits than Python reads
        raise RecipeError(f"{source}: {error}") from None
    except RecursionError:
        raise RecipeError(_too_deep(source)) from None
    return value


def _check_depth(value: Any, source: str, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise RecipeError(_too_deep(source))
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            _check_depth(each, source, depth + 1)


def _too_deep(place: str) -> str:
    return f"{place}: entries lie in one another more than {MAX_DEPTH} deep. No recipe needs that"


def _read_yaml(text: str, source: str) -> list[Document]:
    documents = []
    try:
        _check_tags_and_depth(text, source)
        for node in yaml.compose_all(text, Loader=yaml.SafeLoader):
            reader = _Reader(source)
            value = reader.value(node, ())
            documents.append(Document(value, source, reader.lines))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        said = " ".join(filter(None, (error.context, error.problem)))
        if "'\\t'" in said:
            said = "a tab. Indent by spaces"
        raise RecipeError(f"{source}{line}: no YAML: {said}. Check indents and quotes") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: no YAML: {' '.join(str(error).split())}") from None
    return documents


def _check_tags_and_depth(text: str, source: str) -> None:
    """Before a tree is made of the text, which could ask for more depth than Python has."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        mark = event.start_mark
        place = source if mark is None else f"{source}:{mark.line + 1}"
        if number > MAX_PARTS:
            raise RecipeError(f"{place}: more than {MAX_PARTS} entries; no recipe needs so many")
        tag = getattr(event, "tag", None)
        if tag not in (None, "!"):
            raise RecipeError(f"{place}: the tag {tag!r}. Recipes have no tags; leave it out")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise RecipeError(_too_deep(place))


class _Dumper(yaml.SafeDumper):
    """Quotes texts that `read_documents` would read as something else, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    looks_like_more = any(form.fullmatch(text) for form in _CORE.values())
    style = "'" if looks_like_more else "|" if "\n" in text else None
    if not text.replace("\n", "").isprintable():
        style = '"'  # escaped: YAML would fold or refuse some of it
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_text)


def write_yaml(value: Any) -> str:
    """A recipe as YAML that `read_documents` reads as the same value."""
    text: str = yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None,
        width=100,
    )
    return text


def write_recipes(contents: Sequence[Any]) -> str:
    """Several recipes in one file, the last of which uses the others."""
    return "---\n".join(map(write_yaml, contents))


class _Reader:
    """Makes Python values of YAML nodes.

    Attributes:
        lines: of the entries.
    """

    def __init__(self, source: str) -> None:
        self.lines: dict[Path, int] = {}
        self._source = source
        self._entries = 0
        self._inside: list[yaml.Node] = []

    def value(self, node: yaml.Node, path: Path) -> Any:
        """The value of a node; of an alias, that of what it stands for."""
        self.lines.setdefault(path, node.start_mark.line + 1)
        self._entries += 1
        if self._entries > MAX_ENTRIES:
            raise self._error(
                node, f"aliases come to more than {MAX_ENTRIES:,} entries. Write them out"
            )
        if any(node is each for each in self._inside):
            raise self._error(node, "an alias lies within what it stands for. Write it out")
        self._inside.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self.value(each, (*path, i)) for i, each in enumerate(node.value)]
            return self._scalar(cast(yaml.ScalarNode, node))
        finally:
            self._inside.pop()

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        """A mapping; what `<<` brings in gives way to its own keys."""
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            if key == "<<" and key_node.style is None:
                for each in self._merged(value_node, path):
                    merged = {**each, **merged}
                continue
            if key in own:
                raise self._error(
                    key_node, f"{path_text((*path, key))} is given twice. Keep one of them"
                )
            self.lines[(*path, key)] = key_node.start_mark.line + 1
            own[key] = self.value(value_node, (*path, key))
        return {**merged, **own}

    def _merged(self, node: yaml.Node, path: Path) -> Iterator[dict[str, Any]]:
        """The mappings that `<<` brings in, the first of which wins."""
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for each in nodes:
            if not isinstance(each, yaml.MappingNode):
                raise self._error(node, "<< must stand before an alias of a mapping")
            yield self.value(each, path)

    def _key(self, node: yaml.Node) -> str:
        key = self._scalar(node) if isinstance(node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            raise self._error(node, "a key that is no text. Put it into quotes")
        return key

    def _scalar(self, node: yaml.ScalarNode) -> Hashable:
        """A scalar by the core schema of YAML 1.2; what is quoted is a text."""
        text: str = node.value
        if node.style is not None:
            return text
        kind = next((name for name, form in _CORE.items() if form.fullmatch(text)), None)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int" and len(text) <= MAX_DIGITS:
            return int(text, 0) if text[1:2] in ("o", "x") else int(text)
        if kind == "float":
            if re.match(r"[-+]?0[0-9]", text):
                raise self._error(
                    node, f"{text} may be octal or decimal. Leave out the first 0, or quote it"
                )
            return float(text)
        if kind == "nan":
            return math.nan
        return float(text.replace(".", "")) if kind == "infinity" else text

    def _error(self, node: yaml.Node, text: str) -> RecipeError:
        return RecipeError(f"{self._source}:{node.start_mark.line + 1}: {text}")
