"""Which token string has which id in a model folder, from the tokenizer's own files.

No tokenizer is built and no text is encoded: bringing vocabularies together takes the strings
and their ids alone. Three forms are read: tokenizer.json, tokenizer.model (SentencePiece) and
vocab.json with merges.txt; added tokens may also stand in tokenizer_config.json or, of old,
in added_tokens.json. Where files contradict each other, what loaders make of them counts.
"""

import functools
import hashlib
import itertools
import json
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_config import read_config
from model_errors import ModelCompatibilityError
from model_files import has_file, read_file, read_text

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
SENTENCEPIECE, VOCABULARY, MERGES = "tokenizer.model", "vocab.json", "merges.txt"
ADDED, SPECIAL = "added_tokens.json", "special_tokens_map.json"
FORMS = (TOKENIZER, SENTENCEPIECE, VOCABULARY)
"""Files that hold the normal tokens; the first that a folder has is the one that counts."""

MAX_IDS = 2**24
"""More than any vocabulary has; something is kept for every id."""

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

_tables: "weakref.WeakValueDictionary[str, TokenTable]" = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class TokenTable:
    """The tokens of a tokenizer.

    Attributes:
        tokens: string by id, normal and added tokens together; no string twice. Where an added
            token has the id of a normal one, it is the added one that counts.
        added: entries of the added tokens by string, as tokenizer.json has them.
        splitting: how text is cut into normal tokens (model type, normalizer, pre-tokenizer), or
            None where only other files than tokenizer.json say so.
        merges: digest of the merge rules, or None where there are none to compare.
    """

    tokens: Mapping[int, str]
    added: Mapping[str, Mapping[str, Any]]
    splitting: str | None = None
    merges: str | None = None

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """Id by string."""
        return {token: token_id for token_id, token in self.tokens.items()}

    @functools.cached_property
    def length(self) -> int:
        """One more than the highest id."""
        return max(self.tokens, default=-1) + 1


def has_tokenizer(path: Path) -> bool:
    """Whether a folder holds a tokenizer in one of the forms."""
    return any(has_file(path, form) for form in FORMS)


def signature(path: Path, label: str) -> str | None:
    """A digest of all files that define the tokens of a folder; None where there are none."""
    if not has_tokenizer(path):
        return None
    digest = hashlib.sha256()
    for name in (*FORMS, MERGES, CONFIG, ADDED, SPECIAL):
        if has_file(path, name):
            content = read_file(path, name, label)
            digest.update(f"{name} {len(content)}\0".encode() + content)
    return digest.hexdigest()


def read_tokens(path: Path, label: str) -> TokenTable | None:
    """The tokens of a folder; None if it holds no tokenizer.

    Folders with the same tokenizer files share one table for as long as one of them uses it.

    Raises:
        ModelCompatibilityError: a tokenizer file is not what its name says.
    """
    key = signature(path, label)
    if key is None:
        return None
    table = _tables.get(key)
    if table is None:
        try:
            table = _tables[key] = _read_tokens(path, label)
        except ImportError as error:
            raise ModelCompatibilityError(f"{label}: {error}") from error
        except ValueError as error:
            raise ModelCompatibilityError(f"{label}: {error}. Download the model again") from error
    return table


def _read_object(path: Path, name: str, label: str) -> dict[str, Any]:
    """The JSON object in a file; `ValueError` if it holds something else."""
    try:
        return read_config(read_text(path, name, label))
    except ValueError as error:
        raise ValueError(f"{name} is no JSON object: {error}") from error


def added_token(token_id: int, content: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """An added token as tokenizer.json lists it."""
    return {"id": token_id, "content": content} | {
        flag: bool(flags.get(flag, False)) for flag in _FLAGS
    }


def _read_tokens(path: Path, label: str) -> TokenTable:
    """The table of a folder with a tokenizer; `ValueError` if a file is broken."""
    beside = _added_beside(path, label)
    if has_file(path, TOKENIZER):
        return _from_json(_read_object(path, TOKENIZER, label), beside)
    if has_file(path, SENTENCEPIECE):
        normal, control = _read_pieces(path, label)
        return _table(normal, [*control, *beside])
    normal = _normal_ids(VOCABULARY, _read_object(path, VOCABULARY, label))
    return _table(normal, beside, merges=_read_merges(path, label))


def _table(
    normal: Mapping[str, int], listed: Iterable[Mapping[str, Any]], **rules: str | None
) -> TokenTable:
    """A table of normal and added tokens, with the ids that loaders give the added ones.

    They are not always the ids written beside them. An added token that is a normal one has the
    id of that; the others are numbered on, in their order, from the number of normal tokens.
    Source: `add_tokens` of the tokenizers library, by which it reads tokenizer.json and
    transformers the other files.
    """
    added: dict[str, Mapping[str, Any]] = {}
    numbers = itertools.count(len(normal))
    for entry in listed:
        token = entry["content"]
        if token and token not in added:
            token_id = normal[token] if token in normal else next(numbers)
            added[token] = {**entry, "id": token_id}
    tokens = {token_id: token for token, token_id in normal.items()}
    tokens |= {entry["id"]: token for token, entry in added.items()}
    return TokenTable(tokens, added, **rules)


# tokenizer.json


def _from_json(content: Mapping[str, Any], beside: Iterable[Mapping[str, Any]]) -> TokenTable:
    model = content.get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise ValueError(f"{TOKENIZER} holds no model with a vocab")
    listed = content.get("added_tokens") or []
    if not isinstance(listed, list):
        raise ValueError(f"added_tokens in {TOKENIZER} is no list")
    return _table(
        _normal_ids(TOKENIZER, model["vocab"]),
        [*(_checked(TOKENIZER, entry) for entry in listed), *beside],
        splitting=_splitting(content),
        merges=_digest(TOKENIZER, model.get("merges")),
    )


def _splitting(content: Mapping[str, Any]) -> str:
    model = content["model"]
    parts = {
        "model type": model.get("type", "BPE"),
        "byte_fallback": bool(model.get("byte_fallback")),
        "normalizer": content.get("normalizer"),
        "pre_tokenizer": content.get("pre_tokenizer"),
    }
    return json.dumps(parts, sort_keys=True)


# tokenizer.model and vocab.json


def _read_pieces(path: Path, label: str) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Ids of all pieces, and those that never come from text as added tokens."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ImportError(
            f"without a {TOKENIZER} beside it, a {SENTENCEPIECE} is read with the package "
            "sentencepiece. Install it: pip install sentencepiece"
        ) from error
    broken = f"{SENTENCEPIECE} is no SentencePiece model"
    try:
        pieces = SentencePieceProcessor(model_proto=read_file(path, SENTENCEPIECE, label))
    except RuntimeError as error:
        raise ValueError(broken) from error
    if not len(pieces):
        raise ValueError(broken)
    names = [pieces.id_to_piece(index) for index in range(len(pieces))]
    control = [
        added_token(index, name, {"special": True})
        for index, name in enumerate(names)
        if pieces.is_control(index) or pieces.is_unknown(index)
    ]
    return {name: index for index, name in enumerate(names)}, control


def _read_merges(path: Path, label: str) -> str | None:
    """Digest of a merges.txt, whose first line may be a comment; None if there is none."""
    if not has_file(path, MERGES):
        return None
    try:
        lines = read_text(path, MERGES, label).split("\n")
    except ValueError as error:
        raise ValueError(f"{MERGES} is no text: {error}") from error
    stripped = (line.rstrip("\r") for line in lines)
    return _digest(MERGES, [line for line in stripped if line and not line.startswith("#version")])


# Added tokens beside the normal ones


def _added_beside(path: Path, label: str) -> list[dict[str, Any]]:
    """Added tokens of the other files, in the form of tokenizer.json, in the order of their ids.

    As in transformers, added_tokens.json counts only where there is no added_tokens_decoder.
    """
    config = _read_object(path, CONFIG, label) if has_file(path, CONFIG) else {}
    if config.get("added_tokens_decoder") is not None:
        entries = _decoder_entries(config["added_tokens_decoder"])
    else:
        entries = _old_entries(path, label, config)
    return sorted(entries, key=lambda entry: int(entry["id"]))


def _decoder_entries(decoder: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(decoder, dict):
        raise ValueError(f"added_tokens_decoder in {CONFIG} is no JSON object")
    for key, entry in decoder.items():
        token_id = int(key) if key.isdecimal() else key
        entry = _checked(CONFIG, {**entry, "id": token_id} if isinstance(entry, dict) else entry)
        yield added_token(token_id, entry["content"], entry)


def _old_entries(path: Path, label: str, config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Those of added_tokens.json; special are the ones that another file names so."""
    if not has_file(path, ADDED):
        return
    special = {*_named(config)}
    if has_file(path, SPECIAL):
        special |= {*_named(_read_object(path, SPECIAL, label))}
    for token, token_id in _read_object(path, ADDED, label).items():
        entry = _checked(ADDED, {"id": token_id, "content": token})
        flags = {"special": token in special, "normalized": token not in special}
        yield added_token(entry["id"], token, flags)


def _named(settings: Mapping[str, Any]) -> Iterator[str]:
    """The special tokens that a file names by their role, or lists."""
    for key, value in settings.items():
        if key.endswith(("_token", "_special_tokens")):
            for token in value if isinstance(value, list) else [value]:
                content = token.get("content") if isinstance(token, dict) else token
                if isinstance(content, str):
                    yield content


# Checks


def _normal_ids(file: str, vocab: Any) -> dict[str, int]:
    """Ids by string, from such a mapping or, of a Unigram model, a list of (string, score)."""
    if isinstance(vocab, list):
        pairs = [
            (entry[0] if isinstance(entry, list) and entry else entry, token_id)
            for token_id, entry in enumerate(vocab)
        ]
    elif isinstance(vocab, dict):
        pairs = list(vocab.items())
    else:
        raise ValueError(f"the vocab in {file} is neither a list nor a JSON object")
    for token, token_id in pairs:
        if not isinstance(token, str) or not _is_id(token_id):
            raise ValueError(f"{file} holds the token {token!r:.80} with the id {token_id!r:.80}")
    return dict(pairs)


def _checked(file: str, entry: Any) -> dict[str, Any]:
    """The entry of an added token; `ValueError` if it is none."""
    if (
        isinstance(entry, dict)
        and isinstance(entry.get("content"), str)
        and _is_id(entry.get("id"))
    ):
        return entry
    raise ValueError(f"{file} lists the added token {entry!r:.80}, without an id or a content")


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_IDS


def _digest(file: str, merges: Any) -> str | None:
    """Of the merge rules, whether written "a b" or ["a", "b"]; None if there are none."""
    if not merges:
        return None
    if not isinstance(merges, list):
        raise ValueError(f"the merges in {file} are no list")
    digest = hashlib.sha256()
    for merge in merges:
        pair = [merge] if isinstance(merge, str) else merge
        if not isinstance(pair, list) or not all(isinstance(part, str) for part in pair):
            raise ValueError(f"{file} holds the merge rule {merge!r:.80}")
        digest.update(" ".join(pair).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()
