"""Bring vocabularies together: which row of each model feeds each row of the merged one.

Embedding and head have a row per token id. Models may have more or fewer tokens, the same token
under another id, or rows that no token uses (padding). What is decided here is a map of rows,
from token strings and row counts alone; whoever reads the rows applies it block by block.

The merged vocabulary starts from that of one model, the donor (the base, unless another is
chosen), whose ids stay as they are. So the donor's tokenizer files stay true; what the other
models add is appended.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model_tokenizer import TokenTable, added_token
from model_vocabulary import (
    MISSING,
    Fill,
    MergedVocabulary,
    Piece,
    RowMap,
    Side,
    TokenSource,
    VocabularySettings,
    model_index,
    resolved_mode,
    what_is_wrong,
)

BY_STRING = ("union", "base")
"""Modes that match tokens by their strings; in the others, equal ids must mean the same."""

SHOWN = 3

BY_STRINGS = (
    "Match tokens by their strings: vocabulary 'union' keeps the added tokens of all models, "
    "'base' or 'model:<name>' the tokens of one"
)

TENSOR_PARALLEL = 64
"""Row counts are usually a multiple of this, so that a head can be split among GPUs."""


def merge_vocabularies(
    sides: Sequence[Side],
    settings: VocabularySettings,
    *,
    donor: int | None = None,
    has_base: bool = True,
    weights: Sequence[float] | None = None,
) -> tuple[MergedVocabulary, list[str]]:
    """Decide on the merged vocabulary.

    Args:
        sides: the models; the base first, if there is one.
        settings: how to bring them together; `settings_problems` finds nothing in them.
        donor: index of the model whose tokenizer the result has; by default the first one that
            has a tokenizer, and in mode "max" the first one with the most tokens.
        has_base: whether the first model is a base, whose rows stand in for missing ones.
        weights: of the models of a linear merge, for `linear_missing` "renormalise".

    Returns:
        The vocabulary, and everything that speaks against it.

    A row that a model lacks is, in this order: what `settings.tokens` says; the base's row; the
    row of the only model that has it; the mean of the rows of those that do. A row of a task
    vector is then 0 for all models but the owners, and for a single owner too: a new token
    arrives as its owner has it, whatever the weights.

    A row that no token of the result uses goes by its number, unless a model has a token there.
    """
    if donor is None:
        donor = _default_donor(sides, resolved_mode(settings))
    layout = _lay_out(sides, settings, donor)
    row_map, wrong, unused = _row_map(layout, has_base=has_base, weights=weights)
    vocabulary = MergedVocabulary(
        mode=layout.mode,
        rows=layout.rows,
        donor=donor,
        tokens=layout.tokens,
        added=layout.added,
        cut=layout.first.table.length > layout.rows,
        row_map=None if _is_identity(row_map) else row_map,
        changes=_changes(layout.models, row_map),
        notes=(*_notes(layout), *unused, *_idle_notes(settings, has_base, weights)),
        assumption=_assumption(layout),
    )
    return vocabulary, [*_layout_problems(layout), *wrong]


# Tokens


@dataclass(frozen=True)
class _Model:
    """A side, and how its tokens differ from the donor's.

    Attributes:
        table: its tokens, of which only those count that it has rows for; the donor's where it
            has no tokenizer files.
        differing: its tokens that the donor does not have under the same id; id by string.
        unmatched: the donor's tokens that it does not have under the same id; id by string.
        renamed: by id, its own strings of the tokens that `id_alias` gives the donor's.
    """

    label: str
    rows: int
    table: TokenTable
    has_tokenizer: bool
    differing: Mapping[str, int]
    unmatched: Mapping[str, int]
    renamed: Mapping[int, str]


@dataclass(frozen=True)
class _Layout:
    """The tokens of the result, and of the models that it is made from.

    Attributes:
        first: the donor, one of the models.
        added: tokens that are not the donor's.
        rows: of the result, rounded up as the settings say.
        tokens: of the result.
    """

    models: Sequence[_Model]
    first: _Model
    mode: str
    settings: VocabularySettings
    added: tuple[Mapping[str, Any], ...]
    rows: int
    tokens: Mapping[int, str]


def _default_donor(sides: Sequence[Side], mode: str) -> int:
    lengths = [-1 if side.table is None else side.table.length for side in sides]
    if mode == "max":
        return lengths.index(max(lengths))
    return next((index for index, length in enumerate(lengths) if length >= 0), 0)


def _lay_out(sides: Sequence[Side], settings: VocabularySettings, donor: int) -> _Layout:
    mode, table = resolved_mode(settings), sides[donor].table or TokenTable({}, {})
    models = [_compared(side, table, settings.id_alias) for side in sides]
    added: tuple[Mapping[str, Any], ...] = ()
    if mode == "union":
        added = _new_tokens(models, table, settings.union_tokens)
    if mode in BY_STRING and table.tokens:
        added += _named_tokens(models, table, settings.tokens, added)
    rows = {
        "min": min(side.rows for side in sides),
        "max": max(side.rows for side in sides),
        "error": sides[donor].rows,
    }.get(mode, max(table.length + len(added), sides[donor].rows))
    multiple = settings.pad_to_multiple_of or 1
    rows = -(-rows // multiple) * multiple
    tokens = table.tokens
    if table.length > rows:
        tokens = {token_id: token for token_id, token in tokens.items() if token_id < rows}
    if added:
        tokens = {**tokens, **{entry["id"]: entry["content"] for entry in added}}
    return _Layout(models, models[donor], mode, settings, added, rows, tokens)


def _compared(side: Side, donor: TokenTable, aliases: Sequence[int]) -> _Model:
    own = side.table
    if own is None or own == donor:
        own = donor  # one object, which `_differences` need not look into
    table, renamed = _with_aliases(own, donor, aliases)
    differing, unmatched = _differences(table, donor)
    return _Model(
        side.label, side.rows, table, side.table is not None, differing, unmatched, renamed
    )


def _with_aliases(
    table: TokenTable, donor: TokenTable, aliases: Sequence[int]
) -> tuple[TokenTable, dict[int, str]]:
    """A table in which ids that mean the same have the donor's strings; its own ones by id."""
    ours, theirs = donor.tokens, table.tokens
    renamed = {
        token_id: theirs[token_id]
        for token_id in aliases
        if token_id in ours and theirs.get(token_id, ours[token_id]) != ours[token_id]
    }
    if not renamed:
        return table, {}
    names = {own: ours[token_id] for token_id, own in renamed.items()}
    tokens = {**theirs, **{token_id: ours[token_id] for token_id in renamed}}
    added = {names.get(token, token): entry for token, entry in table.added.items()}
    return replace(table, tokens=tokens, added=added), renamed


def _differences(table: TokenTable, donor: TokenTable) -> tuple[dict[str, int], dict[str, int]]:
    """What each of two tables has that the other does not have under the same id.

    Ids are compared, not strings: hashing all strings would take several times as long.
    """
    if table is donor:
        return {}, {}
    ours, theirs = donor.tokens, table.tokens
    differing = {
        token: token_id for token_id, token in theirs.items() if ours.get(token_id) != token
    }
    ids = [*(ours.keys() & set(differing.values())), *(ours.keys() - theirs.keys())]
    return differing, {ours[token_id]: token_id for token_id in ids}


def _new_tokens(
    models: Sequence[_Model], donor: TokenTable, which: str
) -> tuple[Mapping[str, Any], ...]:
    """The tokens that a union adds to the donor's: in the order of models, then of ids."""
    found: dict[str, Mapping[str, Any]] = {}
    for model in models:
        added = model.table.added
        for token, row in sorted(model.differing.items(), key=lambda item: item[1]):
            new = token not in model.unmatched and token not in found and row < model.rows
            if new and (which == "all" or token in added):
                token_id = donor.length + len(found)
                found[token] = added_token(token_id, token, added.get(token, {}))
    return tuple(found.values())


def _named_tokens(
    models: Sequence[_Model],
    donor: TokenTable,
    named: Iterable[str],
    others: Sequence[Mapping[str, Any]],
) -> tuple[Mapping[str, Any], ...]:
    """The tokens that the settings name and neither the donor nor a union has."""
    known = {*donor.tokens.values(), *(entry["content"] for entry in others)}
    first = donor.length + len(others)
    flags: dict[str, Any] = {}
    for model in reversed(models):
        flags |= model.table.added
    new = [token for token in named if token not in known]
    return tuple(
        added_token(first + number, token, flags.get(token, {})) for number, token in enumerate(new)
    )


# What speaks against it


def _layout_problems(layout: _Layout) -> Iterator[str]:
    first, table = layout.first, layout.first.table
    having = dict.fromkeys(model.label for model in layout.models if model.has_tokenizer)
    if having and not first.has_tokenizer:
        yield (
            f"{first.label}: no tokenizer files, so the result cannot have its tokens. Add them, "
            "or choose a model that has some with vocabulary 'model:<name>' or tokenizer_source: "
            f"{', '.join(having)}"
        )
    if layout.mode == "union" and not having:
        yield (
            "vocabulary 'union' matches tokens by their strings, but no model has tokenizer "
            "files. Use 'min' or 'max', or add the tokenizers to the folders"
        )
    if layout.added and len(table.tokens) < table.length:
        gap = next(number for number in range(table.length) if number not in table.tokens)
        yield (
            f"{first.label}: no token has the id {gap}, so that loaders would give added tokens "
            "other ids than rows. Use vocabulary 'base', or the tokenizer of another model "
            "(tokenizer_source)"
        )
    yield from _alias_problems(layout)
    for model in layout.models:
        yield from _agreement_problems(model, layout)


def _alias_problems(layout: _Layout) -> Iterator[str]:
    label, tokens = layout.first.label, layout.first.table.tokens
    for token_id in layout.settings.id_alias:
        if tokens and token_id not in tokens:
            yield (
                f"id_alias: {token_id} is no token of {label}, whose tokens the result has. Leave "
                "it out, or choose another model with tokenizer_source"
            )
    for model in layout.models:
        for token_id in model.renamed:
            token = tokens[token_id]
            if token in model.differing:
                yield (
                    f"id_alias: {token_id} is {token!r} in {label}, which is "
                    f"{model.differing[token]} in {model.label}. Name both ids, or none"
                )


def _agreement_problems(model: _Model, layout: _Layout) -> Iterator[str]:
    """Where a model's ids, or its way to cut text, do not allow the mode."""
    name, by_string = layout.first.label, layout.mode in BY_STRING
    differing = [] if by_string else _differing_ids(model, layout)
    family = _family_difference(model, layout.first.table)
    if family and (by_string or differing):
        yield (
            f"{model.label}: its tokenizer is of another family than that of {name} ({family}), "
            "so the same text has other tokens. Merge models of one family"
        )
    elif differing:
        verb = "means" if len(differing) == 1 else "mean"
        yield (
            f"{model.label}: {_count(differing, 'token id')} {verb} something else than in {name} "
            f"({_listed_ids(differing, model, layout.first.table)}). {BY_STRINGS}"
        )
    elif layout.mode == "error":
        yield from _difference_problems(model, layout.first)


def _differing_ids(model: _Model, layout: _Layout) -> list[int]:
    """Ids at which a model and the donor disagree, or whose token the model has elsewhere."""
    limit = min(model.rows, layout.first.rows, layout.rows)
    return sorted(
        token_id
        for token, token_id in model.unmatched.items()
        if token_id < limit and (token_id in model.table.tokens or token in model.differing)
    )


def _listed_ids(ids: Sequence[int], model: _Model, donor: TokenTable) -> str:
    """ "5 is 'a', not 'b'; 'c' is 7, not 6; ..."."""
    own = model.table.tokens
    shown = [
        f"{token_id} is {own[token_id]!r}, not {donor.tokens[token_id]!r}"
        if token_id in own
        else f"{donor.tokens[token_id]!r} is {model.differing[donor.tokens[token_id]]}, "
        f"not {token_id}"
        for token_id in ids[:SHOWN]
    ]
    return "; ".join(shown + ["..."] * (len(ids) > SHOWN))


def _family_difference(model: _Model, donor: TokenTable) -> str | None:
    """How two tokenizers cut ordinary text into different tokens, if they do.

    Where files do not say, tokenizers are of one family if they share half of their tokens.
    """
    only_ours = model.unmatched.keys() - model.differing.keys()
    only_theirs = model.differing.keys() - model.unmatched.keys()
    if only_ours <= donor.added.keys() and only_theirs <= model.table.added.keys():
        return None
    if differing := _splitting_difference(model.table, donor):
        return f"other {differing}"
    count = len(model.table.tokens)
    common = count - len(only_theirs)
    if 2 * common < min(count, len(donor.tokens)):
        return f"{common} of its {count} tokens in common"
    return None


def _splitting_difference(table: TokenTable, donor: TokenTable) -> str:
    """What differs in how text is cut, as far as files say."""
    if table.splitting is None or donor.splitting is None or table.splitting == donor.splitting:
        return ""
    ours, theirs = json.loads(donor.splitting), json.loads(table.splitting)
    return ", ".join(part for part in ours if ours[part] != theirs[part])


def _difference_problems(model: _Model, first: _Model) -> Iterator[str]:
    """What mode "error" does not accept: other rows, or a token that only one of the two has."""
    both = model.differing.keys() & model.unmatched.keys()
    single = {**model.differing, **model.unmatched}
    names = sorted(single.keys() - both, key=single.__getitem__)
    parts = []
    if model.rows != first.rows:
        parts.append(f"{model.rows} vocabulary rows, not {first.rows}")
    if names:
        parts.append(f"{_count(names, 'token')} that only one of them has: {_some(names)}")
    if parts:
        yield (
            f"{model.label}: its vocabulary is not that of {first.label} ({'; '.join(parts)}). "
            f"{BY_STRINGS}; 'min' and 'max' go by ids, where all models agree on them"
        )


# Rows


def _row_map(
    layout: _Layout, *, has_base: bool, weights: Sequence[float] | None
) -> tuple[RowMap, list[str], list[str]]:
    """The map, what speaks against it, and what the settings ask for in vain."""
    found = np.stack([_own_rows(model, layout) for model in layout.models])
    chosen, problems = _chosen_rows(layout)
    found[:, [row for row, (_, force) in chosen.items() if force]] = MISSING
    lacking = np.flatnonzero((found == MISSING).any(axis=0)).tolist()
    rows = [row for row in lacking if row not in chosen]
    if layout.settings.linear_missing == "fill" or not rows:
        weights = None
    if weights is not None and (wrong := list(_weight_problems(layout, found, rows, weights))):
        problems, weights = [*problems, *wrong], None
    fills = {
        row: _fill(found[:, row].tolist(), layout.settings, has_base, weights) for row in lacking
    }
    unused = [
        f"tokens: all models have {layout.tokens[row]!r}, so that its source is not used; force "
        "takes it for all"
        for row in chosen.keys() - fills.keys()
    ]
    fills |= {row: fill for row, (fill, _) in chosen.items() if row in fills}
    return RowMap(found, fills), problems, sorted(unused)


def _own_rows(model: _Model, layout: _Layout) -> NDArray[np.int64]:
    """Which row of a model has the token of each merged row; padding goes by its number."""
    own = np.arange(layout.rows, dtype=np.int64)
    own[model.rows :] = MISSING
    used = np.array([*model.differing.values()], dtype=np.int64)
    own[used[used < layout.rows]] = MISSING  # a token here, another one or padding in the result
    added = {entry["content"]: entry["id"] for entry in layout.added}
    for token, token_id in {**model.unmatched, **added}.items():
        if token_id < layout.rows:
            row = model.differing.get(token, MISSING)
            own[token_id] = row if row < model.rows else MISSING
    return own


def _chosen_rows(layout: _Layout) -> tuple[dict[int, tuple[Fill, bool]], list[str]]:
    """By merged row, the source that the settings name for its token, and whether it is forced."""
    chosen: dict[int, tuple[Fill, bool]] = {}
    problems, sources = [], layout.settings.tokens
    ids = {token: token_id for token_id, token in layout.tokens.items()} if sources else {}
    for token, source in sources.items():
        try:
            if token not in ids:
                raise ValueError("is not a token of the result")
            chosen[ids[token]] = (_chosen_fill(layout.models, token, source), source.force)
        except ValueError as error:
            problems.append(f"tokens: {token!r} {error}")
    return chosen, problems


def _chosen_fill(models: Sequence[_Model], token: str, source: TokenSource) -> Fill:
    if not source.model:
        return ()
    labels = [model.label for model in models]
    index = model_index(source.model, labels)
    if index is None:
        raise ValueError(f"is to come from a model, but {what_is_wrong(source.model, labels)}")
    wanted = token if source.token is None else source.token
    row = models[index].table.ids.get(wanted) if source.token_id is None else source.token_id
    if row is None or row >= models[index].rows:
        what = f"token {wanted!r}" if row is None else f"row {row}"
        raise ValueError(f"is to come from {source.model}, which has no {what}")
    return (Piece(index, row),)


def _weight_problems(
    layout: _Layout, found: NDArray[np.int64], rows: Sequence[int], weights: Sequence[float]
) -> Iterator[str]:
    """Where the weights of those models that have a row cannot be renormalised."""
    patterns, places = np.unique(found[:, rows] != MISSING, axis=1, return_index=True)
    for has, place in zip(patterns.T, places, strict=True):
        owners = np.flatnonzero(has).tolist()
        parts = [weights[index] for index in owners]
        if owners and abs(math.fsum(parts)) <= 1e-12 * math.fsum(map(abs, parts)):
            token = layout.tokens.get(rows[place])
            what = f"row {rows[place]}" if token is None else repr(token)
            yield (
                f"linear_missing 'renormalise': the weights of those models that have {what} sum "
                f"to 0 ({', '.join(layout.models[index].label for index in owners)}). Change a "
                "weight, or use 'fill'"
            )


def _fill(
    own: Sequence[int],
    settings: VocabularySettings,
    has_base: bool,
    weights: Sequence[float] | None,
) -> Fill:
    """What stands in for a row that some models lack, from the rows of those that have it."""
    owners = [index for index, row in enumerate(own) if row != MISSING]
    if not owners:
        return None if settings.missing_row == "mean" else ()
    if has_base and own[0] != MISSING:
        return (Piece(0, own[0]),)
    if has_base and settings.new_row == "scaled":
        return ()
    parts = [1.0 if weights is None else weights[index] for index in owners]
    total = math.fsum(parts)
    return tuple(
        Piece(index, own[index], part / total) for index, part in zip(owners, parts, strict=True)
    )


def _is_identity(row_map: RowMap) -> bool:
    return bool((row_map.rows == np.arange(row_map.rows.shape[1])).all())


def _changes(models: Sequence[_Model], row_map: RowMap) -> dict[str, dict[str, int]]:
    changes: dict[str, dict[str, int]] = {}
    order = np.arange(row_map.rows.shape[1])
    for model, own in zip(models, row_map.rows, strict=True):
        has = own != MISSING
        counts = {
            "cut": model.rows - int(has.sum()),
            "moved": int((own != order)[has].sum()),
            "filled": int((~has).sum()),
        }
        if any(counts.values()):
            changes[model.label] = {what: count for what, count in counts.items() if count}
    return changes


# What the user should know


def _notes(layout: _Layout) -> Iterator[str]:
    models, first, rows = layout.models, layout.first, layout.rows
    sizes = ", ".join(f"{model.label} {model.rows}" for model in models)
    smallest, largest = min(m.rows for m in models), max(m.rows for m in models)
    if layout.mode == "min" and smallest < largest:
        rounded = f", rounded up to {rows}" if rows > smallest else ""
        yield f"vocabularies cut to the smallest, {smallest} rows{rounded} ({sizes})"
    elif smallest < largest or rows != first.rows:
        multiple = layout.settings.pad_to_multiple_of
        rounded = f" and pad_to_multiple_of {multiple}" if multiple else ""
        yield f"vocabulary of {rows} rows, by {layout.settings.mode!r}{rounded} ({sizes})"
    if layout.first is not models[0]:
        yield f"tokenizer and special tokens of {layout.first.label}, not of {models[0].label}"
    yield from _added_notes(layout)
    for model in models:
        if model.has_tokenizer:
            yield from _model_notes(model, layout)
    if rows % TENSOR_PARALLEL and any(model.rows % TENSOR_PARALLEL == 0 for model in models):
        yield (
            f"{rows} rows are no multiple of {TENSOR_PARALLEL}, which splitting a head among GPUs "
            f"may need; pad_to_multiple_of {TENSOR_PARALLEL} makes them one"
        )


def _added_notes(layout: _Layout) -> Iterator[str]:
    names = [entry["content"] for entry in layout.added]
    if names:
        yield f"{_count(names, 'token')} added to those of {layout.first.label}: {_some(names)}"
    normal_ones = {token for m in layout.models for token in m.differing.keys() - m.table.added}
    if normal := [name for name in names if name in normal_ones]:
        yield (
            f"{_count(normal, 'token')} added that their models have as normal ones: text that "
            f"holds them is cut into other tokens than before: {_some(normal)}"
        )


def _model_notes(model: _Model, layout: _Layout) -> Iterator[str]:
    table = model.table
    if table.length > model.rows:
        beyond = sorted(token_id for token_id in table.tokens if token_id >= model.rows)
        yield (
            f"{model.label}: its tokenizer has {_count(beyond, 'token')} beyond its {model.rows} "
            f"rows: {_some(table.tokens[token_id] for token_id in beyond)}"
        )
    if lost := _lost_tokens(model, layout):
        yield (
            f"{model.label}: {_count(lost, 'token')} not in the result: {_some(lost)} "
            f"({_keeping(lost, model)})"
        )
    if model.renamed:
        pairs = [f"{own!r} as {table.tokens[i]!r}" for i, own in model.renamed.items()]
        yield f"{model.label}: by id_alias, {', '.join(pairs)}"
    if table is not layout.first.table:
        yield from _difference_notes(model, layout)


def _lost_tokens(model: _Model, layout: _Layout) -> list[str]:
    """Tokens of a model that have a row and are not in the result, by id."""
    kept = {entry["content"] for entry in layout.added}
    kept |= {token for token, row in model.unmatched.items() if row < layout.rows}
    lost = {row: token for token, row in model.differing.items() if token not in kept}
    for row, token in model.table.tokens.items():
        if row >= layout.rows and token not in model.differing:  # cut, also where the donor has it
            lost[row] = token
    return [lost[row] for row in sorted(lost) if row < model.rows]


def _keeping(lost: Sequence[str], model: _Model) -> str:
    """What keeps tokens that the result does not have."""
    if all(token in model.table.added or token not in model.differing for token in lost):
        return "vocabulary 'union' keeps them"
    return "vocabulary 'union' with union_tokens 'all' keeps them"


def _difference_notes(model: _Model, layout: _Layout) -> Iterator[str]:
    """Where a tokenizer is not that of the donor, beyond strings and ids."""
    table, first, name = model.table, layout.first.table, layout.first.label
    if differing := _splitting_difference(table, first):
        yield (
            f"{model.label}: its tokenizer cuts text in another way than that of {name} "
            f"({differing}), which the result has"
        )
    if None not in (first.merges, table.merges) and first.merges != table.merges:
        yield f"{model.label}: its tokenizer has other merge rules than that of {name}"
    other = _special(first.added) | _special({entry["content"]: entry for entry in layout.added})
    other ^= _special(table.added)
    if other:
        other = other.intersection(table.tokens.values()).intersection(layout.tokens.values())
    if other:
        yield (
            f"{model.label}: {_count(other, 'token')} special in the result but not there, or the "
            f"other way round: {_some(sorted(other))}"
        )


def _special(added: Mapping[str, Mapping[str, Any]]) -> set[str]:
    return {token for token, entry in added.items() if entry.get("special")}


def _idle_notes(
    settings: VocabularySettings, has_base: bool, weights: Sequence[float] | None
) -> Iterator[str]:
    """Settings that have no effect, as they are meant for another kind of merge."""
    if settings.union_tokens == "all" and settings.mode != "union":
        yield "union_tokens 'all' has no effect: vocabulary is not 'union'"
    if settings.new_row == "scaled" and not has_base:
        yield "new_row 'scaled' has no effect: there is no base"
    if settings.linear_missing == "renormalise" and weights is None:
        yield "linear_missing 'renormalise' has no effect: this is no linear merge with normalize"


def _assumption(layout: _Layout) -> str | None:
    without = dict.fromkeys(model.label for model in layout.models if not model.has_tokenizer)
    if not without or len(layout.models) == 1:
        return None
    where = f"as in {layout.first.label}" if layout.first.has_tokenizer else "in all models"
    return (
        f"no tokenizer files in {', '.join(without)}: token ids are taken to mean the same {where}"
    )


def _count(items: Sized, noun: str) -> str:
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def _some(tokens: Iterable[str]) -> str:
    """Up to three tokens, quoted."""
    listed = list(tokens)
    return ", ".join(map(repr, listed[:SHOWN])) + (", ..." if len(listed) > SHOWN else "")
