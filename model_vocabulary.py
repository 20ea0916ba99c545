"""How vocabularies are to be brought together, and what comes of it: settings and results.

`model_row_maps.merge_vocabularies` goes from the one to the other.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model_tokenizer import TokenTable

MISSING = -1
"""In a row map: the model has no such row."""

MODES = ("error", "min", "max", "union", "base")
OTHER_NAMES = {"truncate": "min", "pad": "max"}
BY_MODEL = "model:"


@dataclass(frozen=True, kw_only=True)
class TokenSource:
    """Where the row of a token comes from, for models that lack it.

    Attributes:
        model: as the recipe names it, or "base"; "" for a row of zeros.
        token: the token of that model; by default the one that is being filled.
        token_id: its row, instead of a token.
        force: take this row for all models, also for those that have the token.
    """

    model: str = ""
    token: str | None = None
    token_id: int | None = None
    force: bool = False


SOURCE_KEYS = {"zero": {"kind"}, "model_token": {"kind", "model", "token", "token_id"}}
SOURCE_TEXT = (
    'Expected a model, or {"source": MODEL or {"kind": "zero"} or {"kind": "model_token", '
    '"model": MODEL, "token" or "token_id": ...}, "force": true or false}'
)


def token_source(token: str, entry: Any) -> TokenSource:
    """A source as mergekit's recipes write it.

    Args:
        token: what it is for.
        entry: {"source": ..., "force": bool}, where the source is a model, {"kind": "zero"} or
            {"kind": "model_token", "model": ..., "token": ... or "token_id": ...}.

    >>> token_source("<x>", {"source": {"kind": "model_token", "model": "a", "token_id": 7}})
    TokenSource(model='a', token=None, token_id=7, force=False)
    """
    whole = entry if isinstance(entry, Mapping) and "source" in entry else {"source": entry}
    source = whole["source"]
    if isinstance(source, str):
        source = {"kind": "model_token", "model": source}
    kind = source.get("kind") if isinstance(source, Mapping) else None
    keys = SOURCE_KEYS.get(kind) if isinstance(kind, str) else None
    if keys is not None and source.keys() <= keys and whole.keys() <= {"source", "force"}:
        fields = {key: value for key, value in source.items() if key != "kind"}
        found = TokenSource(**fields, force=whole.get("force", False))
        if _is_sound(found) and bool(found.model) == (kind == "model_token"):
            return found
    raise ValueError(f"tokens: {token!r} has the source {entry!r}. {SOURCE_TEXT}")


def _is_sound(source: Any) -> bool:
    """Whether a source is one, and says neither too little nor too much."""
    return (
        isinstance(source, TokenSource)
        and isinstance(source.model, str)
        and isinstance(source.token, str | None)
        and (source.token_id is None or _is_id(source.token_id))
        and [source.token, source.token_id].count(None) >= (1 if source.model else 2)
        and isinstance(source.force, bool)
    )


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0


@dataclass(frozen=True, kw_only=True)
class VocabularySettings:
    """How vocabularies are brought together.

    Attributes:
        mode: "min" (or "truncate") keeps the rows that all models have; "max" (or "pad") the
            rows that any has; both need ids that agree. "union" adds the tokens that the base
            lacks; "base" and "model:<name>" keep the tokens of one model; all three match tokens
            by their strings. "error" accepts no difference.
        tokens: for single tokens, where the row comes from.
        pad_to_multiple_of: round the number of rows up to a multiple of this, in any mode.
        union_tokens: "added" adds only added tokens (such as chat markers); "all" also normal
            ones, which changes how ordinary text is cut into tokens.
        missing_row: a row that no model has is the "mean" of a model's rows, or "zero".
        new_row: a token that the base lacks enters the base as the row of the models that have
            it ("donor"), so that it arrives unscaled; or as zeros ("scaled").
        linear_missing: in a linear merge with `normalize`, a model without a token takes the
            base's or the other models' row ("fill"), or has no part in it ("renormalise").
        id_alias: ids that mean the same in all models although their strings differ, as of a
            reserved token that was renamed.
        tie: "auto" ties the merged head if all models do; "base" if the base does.
    """

    mode: str = "min"
    tokens: Mapping[str, TokenSource] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    union_tokens: str = "added"
    missing_row: str = "mean"
    new_row: str = "donor"
    linear_missing: str = "fill"
    id_alias: tuple[int, ...] = ()
    tie: str = "auto"

    @property
    def donor_name(self) -> str | None:
        """The model that mode "model:<name>" names."""
        return self.mode.removeprefix(BY_MODEL) if str(self.mode).startswith(BY_MODEL) else None


CHOICES = {
    "union_tokens": ("added", "all"),
    "missing_row": ("mean", "zero"),
    "new_row": ("donor", "scaled"),
    "linear_missing": ("fill", "renormalise"),
    "tie": ("auto", "base"),
}


class Piece(NamedTuple):
    """A part of a row that stands in for a missing one: `share` times a row of a model."""

    model: int
    row: int
    share: float = 1.0


Fill = tuple[Piece, ...] | None
"""What a model gets that lacks a row: a sum of pieces (none: zeros), or None for the mean of its
own rows."""


@dataclass(frozen=True)
class RowMap:
    """Which row of each model feeds each row of the merged vocabulary.

    Attributes:
        rows: shape (models, merged rows), int64: the model's own row, or `MISSING`.
        fills: by merged row, what those models get that lack it.
    """

    rows: NDArray[np.int64]
    fills: Mapping[int, Fill]


@dataclass(frozen=True)
class Side:
    """What matters of one model.

    Attributes:
        label: what the user called it.
        rows: of its embedding.
        table: its tokens, or None where it has no tokenizer files.
    """

    label: str
    rows: int
    table: TokenTable | None


@dataclass(frozen=True)
class MergedVocabulary:
    """The vocabulary of the merged model.

    Attributes:
        mode: as resolved: one of `MODES`.
        rows: of embedding and head.
        donor: index of the model whose tokenizer the result has.
        tokens: string by id.
        added: tokens that the donor's tokenizer gets in addition, as tokenizer.json lists them.
        cut: whether the donor's tokenizer loses tokens, those from id `rows` on.
        row_map: None where every row is fed by the rows of the same number.
        changes: by label, how many of its rows are "cut" and "moved", and how many it lacks
            are "filled"; only what happens at all.
        notes: what the user should know.
        assumption: that ids agree, where tokenizer files are missing that would tell.
    """

    mode: str
    rows: int
    donor: int
    tokens: Mapping[int, str]
    added: tuple[Mapping[str, Any], ...]
    cut: bool
    row_map: RowMap | None
    changes: Mapping[str, Mapping[str, int]]
    notes: tuple[str, ...]
    assumption: str | None


def vocabulary_settings(vocabulary: str | VocabularySettings) -> VocabularySettings:
    """Settings from what a user gives: all of them, or the mode alone."""
    if isinstance(vocabulary, VocabularySettings):
        return vocabulary
    return VocabularySettings(mode=vocabulary)


def settings_problems(settings: VocabularySettings) -> list[str]:
    """What is wrong with settings on their own, whatever their types are."""
    problems = []
    if resolved_mode(settings) not in MODES or settings.mode == BY_MODEL:
        problems.append(
            f"vocabulary must be one of {', '.join([*MODES, *OTHER_NAMES])} or model:<name>, "
            f"got {settings.mode!r}"
        )
    for name, choices in CHOICES.items():
        value = getattr(settings, name)
        if value not in choices:
            problems.append(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    multiple = settings.pad_to_multiple_of
    if multiple is not None and (type(multiple) is not int or multiple < 1):
        problems.append(f"pad_to_multiple_of must be a whole number above 0, got {multiple!r}")
    aliases: Any = settings.id_alias
    if not isinstance(aliases, list | tuple) or not all(map(_is_id, aliases)):
        problems.append(f"id_alias must be a list of token ids, got {aliases!r}")
    return [*problems, *_source_problems(settings.tokens)]


def _source_problems(tokens: Any) -> Iterator[str]:
    if not isinstance(tokens, Mapping):
        yield f"tokens must map each token to its source, got {tokens!r}"
        return
    for token, source in tokens.items():
        if not isinstance(token, str) or not _is_sound(source):
            yield (
                f"tokens: {token!r} has the source {source!r}. Expected a string and a TokenSource "
                "of a model (its token or token_id, not both), or of none for a row of zeros"
            )


def resolved_mode(settings: VocabularySettings) -> str:
    """One of `MODES` if the setting is right: "model:<name>" is "base" with another donor."""
    mode = str(settings.mode)
    return "base" if mode.startswith(BY_MODEL) else OTHER_NAMES.get(mode, mode)


def model_index(name: str, labels: Sequence[str]) -> int | None:
    """Which model a user means: by its whole name, its last part, or "base" for the first.

    None if it is none of them, or may be several.

    >>> model_index("b", ["models/a", "models/b"]), model_index("base", ["models/a"])
    (1, 0)
    """
    paths, wanted = [PurePath(label) for label in labels], PurePath(str(name))
    if wanted in paths:
        return paths.index(wanted)
    named = {path for path in paths if path.name == name}
    if len(named) == 1:
        return paths.index(named.pop())
    return 0 if name == "base" and not named else None


def what_is_wrong(name: str, labels: Sequence[str]) -> str:
    """Why `model_index` finds no model."""
    unique = list(dict.fromkeys(labels))
    if sum(PurePath(label).name == name for label in unique) > 1:
        return f"{name!r} may be several of the models; write it as one of {', '.join(unique)}"
    short = [PurePath(label).name for label in unique]
    near = difflib.get_close_matches(name, [*unique, *short], n=1)
    hint = f". Did you mean {near[0]!r}?" if near else ""
    return f"{name!r} is none of the models: {', '.join(unique)}{hint}"


def chosen_donor(
    labels: Sequence[str], settings: VocabularySettings, tokenizer_source: str | None
) -> tuple[int | None, list[str]]:
    """The model whose tokenizer the result has, if one is named, and what is wrong with that."""
    named = {"vocabulary": settings.donor_name, "tokenizer_source": tokenizer_source}
    indices = {what: model_index(name, labels) for what, name in named.items() if name is not None}
    problems = [
        f"{what}: {what_is_wrong(str(named[what]), labels)}"
        for what, index in indices.items()
        if index is None
    ]
    if settings.mode == "base":
        indices = {"vocabulary": 0, **indices}
    donor = next(iter(indices.values()), None)
    if donor is not None and len(set(indices.values())) > 1 and not problems:
        problems.append(
            f"vocabulary {settings.mode!r} takes the tokens of {labels[donor]}, but "
            f"tokenizer_source is {tokenizer_source!r}. Use vocabulary "
            f"'model:{tokenizer_source}', or leave tokenizer_source out"
        )
    return donor, problems
