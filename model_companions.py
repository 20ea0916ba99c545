"""The small files of a model folder: tokenizer, chat template, generation config, licence.

The result takes them from one model, the donor, byte for byte (licences from the first model).
Only what must change is edited: tokens that a union adds or a cut removes, and the chat template
and end tokens where they come from another model than the tokenizer.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from model_chat_templates import is_template
from model_checks import special_id_form_problems, special_id_problems
from model_config import code_keys, edit_config, read_config, without_code
from model_errors import ModelCompatibilityError
from model_files import has_file, open_file, read_file, read_text
from model_hashes import OWN_FILES
from model_small_files import (
    DEFAULT,
    GENERATION,
    OLD_TEMPLATE,
    TEMPLATE,
    TEMPLATE_FOLDER,
    Companions,
    files_in,
    licence_files,
    roles_of,
)
from model_token_files import (
    DECODER,
    SPECIAL_LISTS,
    TOKEN_FILES,
    content_of,
    decoder,
    with_vocabulary,
)
from model_tokenizer import (
    ADDED,
    CONFIG,
    MERGES,
    SENTENCEPIECE,
    SPECIAL,
    TOKENIZER,
    VOCABULARY,
)
from model_utils import ModelFolder
from model_vocabulary import MergedVocabulary, model_index, what_is_wrong

MISTRAL_FORMS = ("tekken.json", "tokenizer.model.v*")
TOKENIZER_FILES = (
    *("tokenizer*.json", "tokenizer*.model", *MISTRAL_FORMS, VOCABULARY, "vocab.txt", MERGES),
    *(SPECIAL, ADDED, "chat_template*.jinja", OLD_TEMPLATE),
)
"""Files that come from the donor, with its generation config."""

MAIN_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
"""Roles whose token a loader adds to a tokenizer that lacks it."""

NO_TEMPLATE, AUTO_TEMPLATE = "none", "auto"

MARKER = re.compile(r"<\|\w+\|>|\[\|\w+\|\]")
"""What chat templates write as tokens: <|im_start|>, [|user|]."""

SHOWN = 3

UNFIT = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What an edit raises where a file is of another form than expected."""


@dataclass(frozen=True)
class Edit:
    """A file of the donor with changes.

    Attributes:
        source: the file as it is; None for a new one.
        vocabulary: whose tokens it shall have, if it lists tokens.
        changes: top-level values to set.
        text: the whole text, instead.
        drops_code: entries that name code are left out.
    """

    source: Path | None
    vocabulary: MergedVocabulary | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    text: str | None = None
    drops_code: bool = False

    def make(self) -> str:
        """The text of the edited file."""
        if self.text is not None:
            return self.text
        text = "{}\n" if self.source is None else _text(self.source)
        if self.vocabulary is not None and self.source is not None:
            text = with_vocabulary(self.source, text, self.vocabulary)
        text = edit_config(text, self.changes) if self.changes else text
        return without_code(text) if self.drops_code else text


@dataclass(frozen=True)
class CarriedFiles:
    """What goes into the result besides weights and config.json.

    Attributes:
        copies: files taken over as they are.
        edits: edited files by name; each text is made when it is written, as it can be long.
        left: names of files of the first model and the donor that are not taken over.
        notes: what the user should know.
    """

    copies: tuple[Path, ...] = ()
    edits: Mapping[str, Edit] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all files, sorted."""
        return tuple(sorted({*(path.name for path in self.copies), *self.edits}))

    def text(self, name: str) -> str | None:
        """The text of a file as the result has it; None if it has no such file."""
        if name in self.edits:
            return self.edits[name].make()
        found = [path for path in self.copies if path.name == name]
        return _text(found[0]) if found else None


def _text(file: Path) -> str:
    return read_text(file.parent, file.name, str(file.parent))


@dataclass
class _Draft:
    """What has been decided so far.

    Attributes:
        by_model: of every model; those of the same folder are one object.
        donor: the one whose files are taken.
        vocabulary: of the result.
        files: of the donor, by name, that are taken as they are or edited.
        edits, notes, problems: as they come.
    """

    by_model: list[Companions]
    donor: Companions
    vocabulary: MergedVocabulary
    files: dict[str, Path]
    edits: dict[str, Edit] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def sides(self) -> list[Companions]:
        """Every folder once."""
        return list(dict.fromkeys(self.by_model))


def carry(
    models: Sequence[ModelFolder], vocabulary: MergedVocabulary, chat_template: str = AUTO_TEMPLATE
) -> tuple[CarriedFiles, list[str]]:
    """Decide what the result has besides weights and config.json.

    Args:
        models: the open folders; the first one gives the licence.
        vocabulary: of the result; its donor gives the tokenizer and the generation config.
        chat_template: "auto" takes the donor's, or that of the others if it has none and they
            have but one; "none" takes none; the name of a model takes that model's; a Jinja
            template is taken itself.

    Returns:
        The files, and what is wrong with them.

    With a template of another model than the donor, the tokens at which that model stops are
    added to those of the donor in generation_config.json: it would talk on without them.
    """
    draft = _draft(models, vocabulary)
    draft.problems += [problem for side in draft.sides for problem in side.problems()]
    if draft.problems:
        return CarriedFiles(), draft.problems
    given = chat_template if is_template(chat_template) else NO_TEMPLATE
    labels = [model.label for model in models]
    template = None if given == chat_template else _chosen_template(draft, labels, chat_template)
    _change_tokens(draft)
    _change_template(draft, template, given)
    _drop_code(draft)
    draft.problems += _taken_problems(draft, template)
    if not draft.problems:
        _settle(draft)
        draft.problems += _special_problems(draft)
        draft.notes += _difference_notes(draft, template)
    return _carried(draft, template), draft.problems


def _draft(models: Sequence[ModelFolder], vocabulary: MergedVocabulary) -> _Draft:
    """All files of the donor, as they are."""
    sides: dict[tuple[Path, Path], Companions] = {}
    places = [(model.path.resolve(), model.tokenizer_path.resolve()) for model in models]
    for index, (place, model) in enumerate(zip(places, models, strict=True)):
        sides.setdefault(place, Companions(index, model))
    by_model = [sides[place] for place in places]
    donor = by_model[vocabulary.donor]
    files = [*files_in(donor.tokenizer_path, TOKENIZER_FILES), *files_in(donor.path, (GENERATION,))]
    return _Draft(by_model, donor, vocabulary, {file.name: file for file in files})


def _carried(draft: _Draft, template: Companions | None) -> CarriedFiles:
    first, donor = draft.sides[0], draft.donor
    copies = [file for name, file in draft.files.items() if name not in draft.edits]
    copies += licence_files(first.path)
    left = {*_others(first.path), *_others(donor.path)}
    left -= {file.name for file in copies} | draft.edits.keys()
    if template is donor:
        left -= {TEMPLATE, TEMPLATE_FOLDER}  # whose texts are in tokenizer_config.json
    return CarriedFiles(tuple(copies), draft.edits, tuple(sorted(left)), tuple(draft.notes))


# Files


def _others(folder: Path) -> Iterator[str]:
    """Names of what a folder holds besides weights and what every result has of its own."""
    for file in folder.iterdir():
        weights = file.suffix == ".safetensors" or file.name.endswith(".safetensors.index.json")
        if not (weights or file.name in OWN_FILES or file.name.startswith(".")):
            yield file.name


def _settle(draft: _Draft) -> None:
    """Make every edit once, to hear of its problems early; what it does not change is copied."""
    for name, edit in list(draft.edits.items()):
        try:
            changed = edit.make().encode("utf-8")
        except UNFIT as error:
            draft.problems.append(
                f"{draft.donor.label}: {name} cannot be changed as the result needs it "
                f"({type(error).__name__}: {error}). Download the model again, or take another "
                "tokenizer (tokenizer_source)"
            )
        else:
            if edit.source is not None and _text(edit.source).encode() == changed:
                del draft.edits[name]


def _taken_problems(draft: _Draft, template: Companions | None) -> list[str]:
    """What is wrong with the files that are taken over."""
    first = draft.sides[0]
    taken = [(draft.donor, draft.files.values()), (first, licence_files(first.path))]
    if template is not None:
        place = template.tokenizer_path
        own = template.template_files or {
            name: place / name for name in (CONFIG, OLD_TEMPLATE) if has_file(place, name)
        }
        taken.append((template, own.values()))
    problems = [problem for side, files in taken for problem in _file_problems(side, files)]
    return list(dict.fromkeys(problems))


def _file_problems(side: Companions, files: Iterable[Path]) -> Iterator[str]:
    """Files that are not what they seem to be."""
    for file in files:
        place = next(p for p in (side.path, side.tokenizer_path) if p in file.parents)
        try:
            content = read_file(place, str(file.relative_to(place)), side.label)
        except ModelCompatibilityError as error:
            yield from error.problems
            continue
        if file.suffix == ".json" and not _is_plain_text(content):
            yield (
                f"{side.label}: {file.name} is not UTF-8, or starts with a byte order mark, which "
                "loaders refuse. Save it as UTF-8 without one"
            )


def _drop_code(draft: _Draft) -> None:
    """Leave out what names code that a loader would run."""
    donor = draft.donor
    for name, content in (
        (CONFIG, donor.tokenizer_config),
        (SPECIAL, donor.special_map),
        (GENERATION, donor.generation or {}),
    ):
        if (keys := code_keys(content)) and name in draft.files:
            edit = draft.edits.get(name) or Edit(draft.files[name])
            draft.edits[name] = replace(edit, drops_code=True)
            draft.notes.append(code_note(donor.label, name, keys))


def code_note(label: str, name: str, keys: Sequence[str]) -> str:
    """Says that a file names code, which is not taken over."""
    return f"{label}: {name} names code ({', '.join(keys)}), which is never run and not taken over"


def tokenizer_files(model: ModelFolder) -> list[Path]:
    """Tokenizer and chat template of a model or adapter, to be copied.

    Raises:
        UnsafeModelError: one is a link out of the folder, or no file.
    """
    files = [*files_in(model.tokenizer_path, TOKENIZER_FILES)]
    for file in files:
        os.close(open_file(model.tokenizer_path, file.name, model.label))
    return files


def code_notes(model: ModelFolder, files: Iterable[Path]) -> Iterator[str]:
    """Says which of a model's files name code; `without_code` is what is taken over of them."""
    for file in files:
        if file.name in (CONFIG, SPECIAL):
            try:
                keys = code_keys(read_config(_text(file)))
            except ValueError as error:
                raise ModelCompatibilityError(
                    f"{model.label}: {file.name} is no JSON object ({error}). Download it again"
                ) from error
            if keys:
                yield code_note(model.label, file.name, keys)


def _is_plain_text(content: bytes) -> bool:
    try:
        return not content.decode("utf-8").startswith("\ufeff")
    except UnicodeDecodeError:
        return False


def _special_problems(draft: _Draft) -> Iterator[str]:
    """Special tokens of the donor's files that the result does not have."""
    donor, rows = draft.donor, draft.vocabulary.rows
    generation, table = donor.generation or {}, donor.model.tokens
    yield from special_id_problems(donor.label, GENERATION, generation, rows)
    yield from special_id_form_problems(donor.label, GENERATION, generation)
    if table is None:
        return
    known = set(draft.vocabulary.tokens.values())
    for file, settings in ((CONFIG, donor.tokenizer_config), (SPECIAL, donor.special_map)):
        for role, token in roles_of(settings).items():
            if token in table.ids and token not in known:
                yield (
                    f"{donor.label}: {role} {token!r} in {file} lies beyond the vocabulary of the "
                    f"result ({rows} rows). Keep the row (vocabulary 'max', 'union' or 'base') or "
                    "choose a model with other special tokens (tokenizer_source)"
                )
            elif token not in known and role in MAIN_ROLES:
                yield (
                    f"{donor.label}: {role} {token!r} in {file} is not a token of its tokenizer; "
                    "loaders would give it an id without a row. Name one of its tokens there, or "
                    "take another tokenizer (tokenizer_source)"
                )


# Tokens added and cut


def _change_tokens(draft: _Draft) -> None:
    """Bring the tokens of the result into the files that list them."""
    vocabulary, donor = draft.vocabulary, draft.donor
    if vocabulary.added or vocabulary.cut:
        names = [name for name in TOKEN_FILES if name in draft.files]
        draft.edits = {name: Edit(draft.files[name], vocabulary) for name in names}
        _leave_out_other_forms(draft)
    if vocabulary.added and TOKENIZER not in draft.files and DECODER not in donor.tokenizer_config:
        draft.edits[CONFIG] = Edit(draft.files.get(CONFIG), vocabulary, _all_added_tokens(draft))


def _leave_out_other_forms(draft: _Draft) -> None:
    """Drop what would contradict the edited files, or say that it cannot be done without."""
    unfit = [name for name in draft.files if any(Path(name).match(p) for p in MISTRAL_FORMS)]
    if SENTENCEPIECE in draft.files and _cuts_normal_tokens(draft):
        unfit.append(SENTENCEPIECE)
        if TOKENIZER not in draft.files:
            draft.problems.append(
                f"{draft.donor.label}: {SENTENCEPIECE} holds normal tokens beyond the "
                f"{draft.vocabulary.rows} rows of the result and cannot be cut. Use vocabulary "
                "'max', or the tokenizer of the model with the fewest tokens (tokenizer_source)"
            )
    for name in unfit:
        del draft.files[name]
    if unfit:
        draft.notes.append(f"left behind, as other tokens are in it: {', '.join(sorted(unfit))}")


def _cuts_normal_tokens(draft: _Draft) -> bool:
    table = draft.donor.model.tokens
    return table is not None and any(
        token_id >= draft.vocabulary.rows and token not in table.added
        for token_id, token in table.tokens.items()
    )


def _all_added_tokens(draft: _Draft) -> dict[str, Any]:
    """All added tokens as tokenizer_config.json lists them, for a tokenizer that lists none there.

    A list there is taken for complete, and loaders then read neither added_tokens.json nor
    special_tokens_map.json: what these name has to come in too.
    """
    settings, table = draft.donor.special_settings, draft.donor.model.tokens
    own = [] if table is None else table.added.values()
    return {
        DECODER: decoder([*own, *draft.vocabulary.added]),
        **roles_of(settings),
        **_lists(settings),
    }


def _lists(settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """Strings of the special tokens that have no role, by the name of their list."""
    lists = {key: settings[key] for key in SPECIAL_LISTS if isinstance(settings.get(key), list)}
    return {key: list(filter(None, map(content_of, tokens))) for key, tokens in lists.items()}


# Chat template and end tokens


def _chosen_template(draft: _Draft, labels: Sequence[str], choice: str) -> Companions | None:
    """The model whose chat template the result has."""
    if choice == NO_TEMPLATE:
        return None
    having = [side for side in draft.sides if side.templates]
    if choice != AUTO_TEMPLATE:
        return _named_side(draft, labels, choice, having)
    if draft.donor in having:
        return draft.donor
    if len({json.dumps(side.templates, sort_keys=True) for side in having}) > 1:
        draft.notes.append(
            f"no chat template: {draft.donor.label} has none, and those of {_listed(having)} "
            "differ. Choose one with chat_template"
        )
        return None
    if having and (lost := _unwritable(draft, having[0])):
        draft.notes.append(
            f"no chat template: {draft.donor.label} has none, and that of {_listed(having)} writes "
            f"{_some(lost)}, which the result does not have. Vocabulary 'union' keeps such tokens"
        )
        return None
    return having[0] if having else None


def _unwritable(draft: _Draft, template: Companions) -> list[str]:
    """Added tokens that a model's chat template writes and the result does not have."""
    text, known = "\n".join(template.templates.values()), set(draft.vocabulary.tokens.values())
    added = {} if template.model.tokens is None else template.model.tokens.added
    return [token for token in added if token not in known and token in text]


def _some(tokens: Sequence[str]) -> str:
    """Up to three tokens, quoted."""
    return ", ".join(map(repr, tokens[:SHOWN])) + (", ..." if len(tokens) > SHOWN else "")


def _named_side(
    draft: _Draft, labels: Sequence[str], name: str, having: Sequence[Companions]
) -> Companions | None:
    """The model that a user named for its chat template; a problem if that cannot be."""
    index = model_index(name, labels)
    side = None if index is None else draft.by_model[index]
    if side in having:
        return side
    wrong = what_is_wrong(name, labels) if side is None else f"{name!r} has no chat template"
    draft.problems.append(
        f"chat_template: {wrong}. Choose auto, none or a model that has one "
        f"({_listed(having) or 'there is none'})"
    )
    return None


def _change_template(draft: _Draft, template: Companions | None, given: str) -> None:
    """Bring a template of another model, several of them, a text or none into the donor's files."""
    donor = draft.donor
    if template is donor and donor.template_files.keys() <= {DEFAULT}:
        return
    texts = {} if template is None else template.templates
    if given != NO_TEMPLATE:
        texts = {DEFAULT: given}
        draft.notes += _given_template_notes(draft, given)
    draft.files = {name: f for name, f in draft.files.items() if "chat_template" not in name}
    listed = [{"name": name, "template": text} for name, text in texts.items()]
    if texts.keys() == {DEFAULT}:
        draft.edits[TEMPLATE] = Edit(None, text=texts[DEFAULT])
        listed = []
    if listed or donor.tokenizer_config.get("chat_template") is not None:
        edit = draft.edits.get(CONFIG) or Edit(draft.files.get(CONFIG))
        draft.edits[CONFIG] = replace(
            edit, changes={**edit.changes, "chat_template": listed or None}
        )
    if template is not None and template is not donor:
        _add_end_tokens(draft, template)


def _add_end_tokens(draft: _Draft, template: Companions) -> None:
    """Add the end tokens of the template's model to the donor's in generation_config.json."""
    donor = draft.donor
    found = {
        token_id: _merged_id(draft.vocabulary, template, token_id) for token_id in template.end_ids
    }
    ends = list(dict.fromkeys([*donor.end_ids, *(i for i in found.values() if i is not None)]))
    names = {} if template.model.tokens is None else template.model.tokens.tokens
    for token_id in [token_id for token_id, merged in found.items() if merged is None]:
        draft.notes.append(
            f"{template.label} ends its answers with {names.get(token_id, token_id)!r}, which the "
            "result does not have: it may not stop. Use vocabulary 'union'"
        )
    if ends == donor.end_ids:
        return
    both = f"{donor.label} and {template.label}"
    draft.notes.append(f"generation ends at {_shown(draft, ends)}, as in {both}")
    source = draft.files.get(GENERATION)
    changes = {} if source else _basic_generation(donor)
    draft.edits[GENERATION] = Edit(source, changes=changes | {"eos_token_id": ends})


def _merged_id(vocabulary: MergedVocabulary, side: Companions, token_id: int) -> int | None:
    """Which id of the result means what an id means in a model: by its string, or by its row."""
    table = side.model.tokens
    token = None if table is None else table.tokens.get(token_id)
    ids = {string: merged for merged, string in vocabulary.tokens.items()}
    if token in ids:
        return ids[token]
    if vocabulary.row_map is None:
        return token_id if token_id < vocabulary.rows else None
    rows = (vocabulary.row_map.rows[side.index] == token_id).nonzero()[0].tolist()
    return rows[0] if rows else None


def _basic_generation(donor: Companions) -> dict[str, Any]:
    keys = ("bos_token_id", "pad_token_id")
    return {key: donor.model.config[key] for key in keys if donor.model.config.get(key) is not None}


# What the user should know


def _difference_notes(draft: _Draft, template: Companions | None) -> Iterator[str]:
    """Says where the inputs differ in what the result has once."""
    donor = draft.donor
    others = [side for side in draft.sides if side is not donor]
    if template is not None:
        yield from _template_notes(draft, template)
        yield from _template_token_notes(draft, template)
    for side in others:
        yield from _generation_notes(donor, side)
        yield from _end_notes(draft, side)
        yield from _role_notes(donor, side)
    yield from _licence_notes(draft.sides)


def _template_notes(draft: _Draft, template: Companions) -> Iterator[str]:
    """Says whose chat template it is, if that is not a matter of course."""
    donor = draft.donor
    reason = "" if donor.templates else f", as {donor.label} has none"
    others = [side for side in draft.sides if side is not template]
    differing = [side for side in others if side.templates not in ({}, template.templates)]
    without = [side for side in others if not (side.templates or (reason and side is donor))]
    parts = [
        f"{_listed(found)} {'has' if len(found) == 1 else 'have'} {what}"
        for found, what in ((differing, "another"), (without, "none"))
        if found
    ]
    if parts or template is not donor:
        yield "; ".join([f"chat template of {template.label}{reason}", *parts])
    if template is donor and not template.template_files.keys() <= {DEFAULT}:
        yield (
            f"the chat templates of {donor.label} ({', '.join(template.templates)}) are in {CONFIG}"
        )


def _given_template_notes(draft: _Draft, template: str) -> Iterator[str]:
    """Says where a template that the user gives writes what look like tokens and are none."""
    known = set(draft.vocabulary.tokens.values())
    markers = dict.fromkeys(MARKER.findall(template))
    lost = [marker for marker in markers if marker not in known]
    if known and lost:
        yield (
            f"the chat template writes {_some(lost)}, which the result's tokenizer does not have "
            "as a token: it is cut into pieces that no model has learned"
        )


def _template_token_notes(draft: _Draft, template: Companions) -> Iterator[str]:
    """Says where a chat template writes tokens that the result does not have, or has others for."""
    text = "\n".join(template.templates.values())
    if lost := _unwritable(draft, template):
        yield (
            f"the chat template of {template.label} writes {_some(lost)}, which the result does "
            "not have: chats will be garbled. Use vocabulary 'union'"
        )
    ours, theirs = (roles_of(side.special_settings) for side in (draft.donor, template))
    for role, token in theirs.items():
        if ours.get(role, token) != token and re.search(rf"\b{re.escape(role)}\b", text):
            yield (
                f"the chat template of {template.label} writes the {role}, there {token!r}; with "
                f"the tokenizer of {draft.donor.label} it writes {ours[role]!r}"
            )


def _generation_notes(donor: Companions, side: Companions) -> Iterator[str]:
    ours, theirs = _generation_settings(donor), _generation_settings(side)
    if ours == theirs:
        return
    if ours is None:
        yield f"{donor.label} has no generation config; that of {side.label} is not taken over"
    elif theirs is None:
        yield f"generation config of {donor.label}; {side.label} has none"
    else:
        keys = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
        yield (
            f"generation config of {donor.label}; that of {side.label} differs in {', '.join(keys)}"
        )


def _end_notes(draft: _Draft, side: Companions) -> Iterator[str]:
    """Says where a model ends its answers with a token at which the result would talk on."""
    edit = draft.edits.get(GENERATION)
    ends = draft.donor.end_ids if edit is None else edit.changes.get("eos_token_id")
    ends = draft.donor.end_ids if ends is None else ends
    merged = [_merged_id(draft.vocabulary, side, token_id) for token_id in side.end_ids]
    lacking = [token_id for token_id in merged if token_id is not None and token_id not in ends]
    if lacking:
        choice = ", or take its chat template (chat_template)" if side.templates else ""
        yield (
            f"{side.label} ends its answers with {_shown(draft, lacking)}, which is not among the "
            f"tokens at which the result stops. If it talks on, add {', '.join(map(str, lacking))} "
            f"to eos_token_id in {GENERATION}{choice}"
        )


def _shown(draft: _Draft, ids: Iterable[int]) -> str:
    """Tokens of the result, quoted; numbers where there is no string."""
    tokens = draft.vocabulary.tokens
    return ", ".join(str(i) if i not in tokens else repr(tokens[i]) for i in ids)


def _generation_settings(side: Companions) -> dict[str, Any] | None:
    """A generation config without what does not matter to generation."""
    own = ("transformers_version", "_from_model_config")
    if side.generation is None:
        return None
    settings = side.generation.items()
    return {key: value for key, value in settings if key not in own and value is not None}


def _role_notes(donor: Companions, side: Companions) -> Iterator[str]:
    ours, theirs = roles_of(donor.special_settings), roles_of(side.special_settings)
    for role, token in theirs.items():
        if role not in ours and donor.model.tokens is not None:
            yield f"{role}: {donor.label} names none; {side.label} has {token!r}"
        elif role in ours and ours[role] != token:
            yield f"{role} {ours[role]!r} of {donor.label}; {side.label} has {token!r}"


def _licence_notes(sides: Sequence[Companions]) -> Iterator[str]:
    """Says where another model has a licence text that the first one does not have."""
    first, *others = sides
    for side in others:
        names = [n for n, text in side.licences.items() if text not in first.licences.values()]
        if names:
            yield f"licence files of {first.label}; {side.label} has others ({', '.join(names)})"


def _listed(sides: Iterable[Companions]) -> str:
    return ", ".join(side.label for side in sides)
