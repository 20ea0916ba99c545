"""The files of a tokenizer that list its tokens, with those of the merged vocabulary.

Tokens that a union adds are appended, tokens that a cut removes are taken out, in every file that
lists them; whatever else a file says stays.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from model_config import edit_config, read_config
from model_files import read_text
from model_tokenizer import ADDED, CONFIG, MERGES, SPECIAL, TOKENIZER, VOCABULARY
from model_vocabulary import MergedVocabulary

TOKEN_FILES = (TOKENIZER, CONFIG, SPECIAL, ADDED, VOCABULARY, MERGES)
"""Files that list tokens and can be edited."""

SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")
DECODER = "added_tokens_decoder"


def with_vocabulary(file: Path, text: str, vocabulary: MergedVocabulary) -> str:
    """A file that lists tokens, with those of the merged vocabulary."""
    if file.name == MERGES:
        known = read_config(read_text(file.parent, VOCABULARY, str(file.parent)))
        return _cut_merges(text, _kept(known, vocabulary))
    content = read_config(text)
    if file.name == TOKENIZER:
        return edit_config(text, _tokenizer_changes(content, vocabulary))
    if file.name in (CONFIG, SPECIAL):
        return edit_config(text, _settings_changes(content, vocabulary))
    kept = _kept(content, vocabulary)
    if len(kept) < len(content):
        text = json.dumps(kept, indent=2, ensure_ascii=False) + "\n"
    new = vocabulary.added if file.name == ADDED else ()
    return edit_config(text, {entry["content"]: entry["id"] for entry in new})


def content_of(token: Any) -> str | None:
    """The string of a special token, written as a string or as an object."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _kept(ids: Mapping[str, int], vocabulary: MergedVocabulary) -> dict[str, int]:
    """Ids by token, of those tokens that have a row."""
    return {token: token_id for token, token_id in ids.items() if token_id < vocabulary.rows}


def _tokenizer_changes(content: Mapping[str, Any], vocabulary: MergedVocabulary) -> dict[str, Any]:
    """What changes in a tokenizer.json."""
    surrounding = [*_surrounding_ids(content.get("post_processor"))]
    if lost := [token_id for token_id in surrounding if token_id >= vocabulary.rows]:
        raise ValueError(f"it puts the token {lost[0]}, which has no row, around every text")
    known = set(vocabulary.tokens.values())
    listed = content.get("added_tokens") or []
    added = [*(entry for entry in listed if entry["content"] in known), *vocabulary.added]
    model = {"model": _model_with(content["model"], vocabulary)} if vocabulary.cut else {}
    return {"added_tokens": added} | model


def _model_with(model: Mapping[str, Any], vocabulary: MergedVocabulary) -> dict[str, Any]:
    """The model inside a tokenizer.json without the tokens that have no row."""
    if isinstance(model["vocab"], list):
        return {**model, "vocab": model["vocab"][: vocabulary.rows]}
    known, merges = _kept(model["vocab"], vocabulary), model.get("merges", [])
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    kept = [merge for merge, pair in zip(merges, pairs, strict=True) if _can_merge(pair, known)]
    return {**model, "vocab": known} | ({"merges": kept} if "merges" in model else {})


def _can_merge(pair: Sequence[str], known: Mapping[str, int]) -> bool:
    """Whether a merge rule's parts and its result are all tokens."""
    return {*pair, "".join(pair)} <= known.keys()


def _cut_merges(text: str, known: Mapping[str, int]) -> str:
    """A merges.txt without the rules whose parts or result are not known."""
    return "\n".join(
        line
        for line in text.split("\n")
        if line.startswith("#version")
        or not line.strip()
        or _can_merge(line.rstrip("\r").split(" "), known)
    )


def _surrounding_ids(processor: Any) -> Iterator[int]:
    """Ids that a post-processor of tokenizer.json puts around every text."""
    if processor is None:
        return
    for part in processor.get("processors") or []:
        yield from _surrounding_ids(part)
    for entry in (processor.get("special_tokens") or {}).values():
        yield from entry["ids"]
    yield from (processor[key][1] for key in ("sep", "cls") if key in processor)


def _settings_changes(content: Mapping[str, Any], vocabulary: MergedVocabulary) -> dict[str, Any]:
    """What changes in a tokenizer_config.json or special_tokens_map.json."""
    changes: dict[str, Any] = {}
    known = set(vocabulary.tokens.values())
    if DECODER in content:
        listed = content[DECODER].items()
        kept = {token_id: entry for token_id, entry in listed if entry["content"] in known}
        changes[DECODER] = kept | decoder(vocabulary.added)
    for key in SPECIAL_LISTS:
        tokens = content.get(key)
        if isinstance(tokens, list):
            changes[key] = [token for token in tokens if content_of(token) in known]
        elif isinstance(tokens, dict):
            changes[key] = {k: token for k, token in tokens.items() if content_of(token) in known}
    return changes


def decoder(tokens: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Added tokens as tokenizer_config.json lists them."""
    return {
        str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
        for entry in tokens
    }
