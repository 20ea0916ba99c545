"""Whether a finished model folder is sound: files, config.json, tokenizer, every value.

What a loader would silently get wrong is looked for: a head that is ignored, token ids without a
row, a dtype that is not that of the tensors, NaN. No tensor is held whole.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model_checks import (
    DERIVED_TENSOR,
    EMBEDDING,
    HEAD,
    VOCABULARY_TENSORS,
    Model,
    layer_order,
    model_problems,
    special_id_form_problems,
    special_ids,
)
from model_config import read_config
from model_errors import ModelCompatibilityError
from model_files import has_file, read_text
from model_hashes import changed_files
from model_locate import ADAPTER_CONFIG, find_model_folder
from model_lora import open_adapter, parts_of
from model_safetensors import DTYPE_NAMES, FLOAT_DTYPES, widen
from model_tokenizer import FORMS, TokenTable, has_tokenizer, read_tokens
from model_utils import INDEX, WEIGHTS, ModelFolder, open_model_folder, rows_of

GENERATION, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
TOKENS_MAP = "special_tokens_map.json"
DTYPE_KEYS = ("dtype", "torch_dtype")
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")

BLOCK_ELEMENTS = 2**18
"""Elements of a tensor that are read at once (at least one row is)."""

SHOWN = 3


@dataclass(frozen=True)
class Findings:
    """What was found out about a model folder.

    Attributes:
        label: what the user called the folder.
        tensors: how many there are; 0 if the folder cannot be opened.
        dtypes: of the tensors, as config.json would call them.
        vocab_rows: rows of the embedding; None if there is none.
        tokens: of the tokenizer; None without a tokenizer that can be read.
        parameters: elements of all tensors together.
        bytes: of all tensors together.
        read_weights: whether the values were looked at.
        problems: everything that is wrong, one text each; none for a sound folder.
        notes: what could not be checked.
    """

    label: str
    tensors: int = 0
    dtypes: tuple[str, ...] = ()
    vocab_rows: int | None = None
    tokens: int | None = None
    parameters: int = 0
    bytes: int = 0
    read_weights: bool = False
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The findings as JSON can hold them."""
        return asdict(self)

    def summary(self) -> str:
        """The findings in a few lines."""
        count = len(self.problems)
        verdict = f"{count} problem{'s' if count > 1 else ''}" if count else "sound"
        size = f"{self.parameters:,} parameters, {self.bytes:,} bytes"
        tokens = "no tokenizer" if self.tokens is None else f"{self.tokens} tokens"
        lines = [f"{self.label}: {verdict}"]
        if self.tensors:
            lines += [
                f"{self.tensors} tensors, {' and '.join(self.dtypes)}, {size}",
                f"vocabulary: {self.vocab_rows or 'no'} rows, {tokens}",
                f"values: {'all read' if self.read_weights else 'not read'}",
            ]
        lines += [f"problem: {problem}" for problem in self.problems]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


class SideFiles(NamedTuple):
    """What stands beside the weights and config.json.

    Attributes:
        objects: the JSON files among them that there are, by name.
        tokens: those of the tokenizer; None where there is none, or none that can be read.
        problems: what is wrong with these files on their own.
        notes: what could not be checked.
    """

    objects: Mapping[str, Mapping[str, Any]]
    tokens: TokenTable | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def verify_folder(
    folder: str | os.PathLike[str],
    *,
    read_weights: bool = True,
    threads: int = 1,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Findings:
    """Look for everything that is wrong with a model folder.

    Args:
        folder: with config.json, or with one such folder below it. Never looked up on the Hub.
        read_weights: look at every value. All other checks take a moment whatever the size.
        threads: blocks looked at at once; each holds one in memory.
        on_bytes: told how many bytes of weights have been read since the last call, always from
            the thread that called this function.

    Returns:
        What was found. What is wrong with the model is in `problems` and is not raised.

    Raises:
        OSError: a file cannot be read.
    """
    label = str(folder)
    try:
        if has_file(Path(folder), ADAPTER_CONFIG) and not has_file(Path(folder), "config.json"):
            return _adapter_findings(Path(folder), read_weights, threads, on_bytes)
        side = read_side_files(_existing_folder(folder), label)
    except ModelCompatibilityError as error:
        return Findings(label, problems=error.problems)
    try:
        with open_model_folder(folder) as model:
            problems = [
                *model_problems(model),
                *tie_problems(model),
                *config_dtype_problems(model),
                *side.problems,
                *token_row_problems(model, side.tokens),
                *special_id_problems(model, side.objects.get(GENERATION, {})),
            ]
            if read_weights:
                problems += value_problems(model, threads, on_bytes)
                changed, notes = changed_files(model.path, label)
                problems += changed
                side = side._replace(notes=(*side.notes, *notes))
            return _findings(model, side, read_weights, problems)
    except ModelCompatibilityError as error:
        tokens = None if side.tokens is None else len(side.tokens.tokens)
        problems = [*error.problems, *side.problems]
        return Findings(label, tokens=tokens, problems=tuple(problems), notes=side.notes)


def _adapter_findings(
    folder: Path, read_weights: bool, threads: int, on_bytes: Callable[[int], None]
) -> Findings:
    """The findings on a LoRA adapter."""
    label = str(folder)
    with open_adapter(label) as adapter:
        problems: list[str] = []
        notes: list[str] = []
        try:
            parts_of(adapter)
        except ModelCompatibilityError as error:
            problems += error.problems
        if read_weights:
            problems += value_problems(adapter, threads, on_bytes)
            changed, notes = changed_files(folder, label)
            problems += changed
        side = SideFiles({}, read_tokens(folder, label), (), tuple(notes))
        return _findings(adapter, side, read_weights, problems)


def _existing_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder with config.json; a name that is misspelt is not asked for on the Hub."""
    if not Path(folder).exists():
        raise ModelCompatibilityError(f"{folder}: no such folder. Check the path")
    return find_model_folder(folder)


def _findings(model: Model, side: SideFiles, read_weights: bool, problems: list[str]) -> Findings:
    infos = model.tensors.values()
    names = {stored: name for name, stored in DTYPE_NAMES.items()}
    return Findings(
        label=model.label,
        tensors=len(infos),
        dtypes=tuple(sorted({names.get(info.dtype, info.dtype) for info in infos})),
        vocab_rows=_vocab_rows(model),
        tokens=None if side.tokens is None else len(side.tokens.tokens),
        parameters=sum(info.numel for info in infos),
        bytes=sum(info.nbytes for info in infos),
        read_weights=read_weights,
        problems=tuple(problems),
        notes=side.notes,
    )


def _vocab_rows(model: Model) -> int | None:
    """Rows of the embedding, which token ids index."""
    info = model.tensors.get(EMBEDDING)
    return info.shape[0] if info and info.shape else None


# config.json and the tensors


def tie_problems(model: Model) -> Iterator[str]:
    """Whether a tied model stores a head, which some loaders use and some do not."""
    if model.config.get("tie_word_embeddings") is True and HEAD in model.tensors:
        yield (
            f"{model.label}: tie_word_embeddings in config.json is true, but {HEAD} is stored; "
            "some loaders ignore it and some use it. Set it to false, or leave the tensor out"
        )


def config_dtype_problems(model: Model) -> Iterator[str]:
    """Whether config.json names a dtype that tensors have."""
    said = {key: model.config[key] for key in DTYPE_KEYS if model.config.get(key) is not None}
    values = list(said.values())
    if len(values) == 2 and values[0] != values[1]:
        yield (
            f"{model.label}: dtype {values[0]!r} and torch_dtype {values[1]!r} in config.json "
            "differ; loaders take one or the other. Set both to the dtype of the tensors"
        )
    stored = {
        info.dtype for name, info in model.tensors.items() if not DERIVED_TENSOR.fullmatch(name)
    }
    names = [name for name, dtype in DTYPE_NAMES.items() if dtype in stored]
    for key, value in said.items():
        if names and value not in names:
            yield (
                f"{model.label}: {key} in config.json is {value!r}, but the tensors are "
                f"{' and '.join(names)}; loaders would convert them. Set it to {names[0]!r}"
            )


# Vocabulary


def token_row_problems(model: Model, tokens: TokenTable | None) -> Iterator[str]:
    """Whether every token has a row of the embedding."""
    rows = _vocab_rows(model)
    if tokens is None or rows is None:
        return
    beyond = sorted(token_id for token_id in tokens.tokens if token_id >= rows)
    if beyond:
        count = f"{len(beyond)} token{'s' if len(beyond) > 1 else ''}"
        shown = ", ".join(f"{token_id} {tokens.tokens[token_id]!r}" for token_id in beyond[:SHOWN])
        yield (
            f"{model.label}: its tokenizer has {count} ({shown}{', ...' * (len(beyond) > SHOWN)}) "
            f"beyond the {rows} rows of {EMBEDDING}; text with them would fail. "
            "Use the tokenizer that belongs to these weights"
        )


def special_id_problems(model: Model, generation: Mapping[str, Any]) -> Iterator[str]:
    """Whether the special ids of config.json and generation_config.json have rows."""
    rows = _vocab_rows(model)
    if not rows:
        return
    yield from special_id_form_problems(model.label, GENERATION, generation)
    for file, settings in (("config.json", model.config), (GENERATION, generation)):
        for key, ids in special_ids(settings).items():
            for token_id in [each for each in dict.fromkeys(ids) if each >= rows][:SHOWN]:
                yield (
                    f"{model.label}: {key} in {file} is {token_id}, expected a whole number "
                    f"from 0 to {rows - 1}, the rows of {EMBEDDING} (or null). "
                    "Set it to the id of that token"
                )


# Files beside the weights


def read_side_files(path: Path, label: str) -> SideFiles:
    """Read what stands beside the weights, and say what is wrong with it on its own."""
    problems = [*index_problems(path, label)]
    notes: list[str] = []
    objects: dict[str, Mapping[str, Any]] = {}
    for name in (GENERATION, TOKENIZER_CONFIG, TOKENS_MAP):
        try:
            if has_file(path, name):
                objects[name] = read_config(read_text(path, name, label))
        except ValueError as error:
            problems.append(
                f"{label}: {name} is not a valid JSON object ({error}). Save or download it again"
            )
    tokens = None
    try:
        if TOKENIZER_CONFIG in objects or not has_file(path, TOKENIZER_CONFIG):
            tokens = read_tokens(path, label)
    except ModelCompatibilityError as error:
        # A package that is not installed says nothing about the folder.
        unread = notes if isinstance(error.__cause__, ImportError) else problems
        unread += error.problems
    if not has_tokenizer(path):
        notes.append(f"no tokenizer: there is none of {', '.join(FORMS)}")
    if tokens is not None:
        for name in (TOKENIZER_CONFIG, TOKENS_MAP):
            problems += special_token_problems(label, name, objects.get(name, {}), tokens)
    return SideFiles(objects, tokens, tuple(problems), tuple(notes))


def index_problems(path: Path, label: str) -> Iterator[str]:
    """Whether an index that is used has the metadata without which transformers 5 fails.

    An index that is no JSON object at all is what `open_model_folder` refuses.
    """
    if has_file(path, WEIGHTS) or not has_file(path, INDEX):
        return
    try:
        metadata = read_config(read_text(path, INDEX, label)).get("metadata")
    except ValueError:
        return
    if not isinstance(metadata, dict):
        yield (
            f"{label}: metadata in {INDEX} is {metadata!r}, expected an object; transformers "
            'cannot load the model. Add "metadata": {"total_size": <bytes of all tensors>}'
        )


def special_token_problems(
    label: str, file: str, settings: Mapping[str, Any], tokens: TokenTable
) -> Iterator[str]:
    """Whether the special tokens that a file names are tokens."""
    for key in SPECIAL_TOKENS:
        value = settings.get(key)
        token = value.get("content") if isinstance(value, Mapping) else value
        if value is None or token == "" or (isinstance(token, str) and token in tokens.ids):
            continue  # an empty one stands for none
        wrong = (
            "is not a token of its tokenizer; loaders would give it an id without a row"
            if isinstance(token, str)
            else 'is neither a string nor an object with a string "content"'
        )
        yield f"{label}: {key} {value!r} in {file} {wrong}. Name one of the tokens, or null"


# Values


class BlockValues(NamedTuple):
    """What a block of a tensor holds.

    Attributes:
        nbytes: its size.
        bad: how many values are NaN or infinite.
        place: row and column of the first of them in the tensor, and its value.
        zero: whether all values are 0, which is only looked at in embedding and head.
    """

    nbytes: int
    bad: int
    place: tuple[int, int, float] | None
    zero: bool


def value_problems(
    model: ModelFolder, threads: int, on_bytes: Callable[[int], None]
) -> Iterator[str]:
    """Which tensors have values that no model can work with, in the order of the layers."""
    names = [name for name, info in model.tensors.items() if info.dtype in FLOAT_DTYPES]
    look = functools.partial(_look, model, _Buffer())
    with ThreadPoolExecutor(threads) as pool:
        for name in sorted(names, key=layer_order):
            blocks = []
            try:
                for block in pool.map(functools.partial(look, name), _blocks(model, name)):
                    on_bytes(block.nbytes)
                    blocks.append(block)
            except ModelCompatibilityError as error:  # the file has become shorter
                yield from error.problems
                return
            yield from _bad_values(model.label, name, blocks)


def _bad_values(label: str, name: str, blocks: list[BlockValues]) -> Iterator[str]:
    """What is wrong with the values of one tensor."""
    places = [block.place for block in blocks if block.place is not None]
    if places:
        count = sum(block.bad for block in blocks)
        row, column, value = places[0]
        yield (
            f"{label}: {name} has {count} NaN or infinite value{'s' if count > 1 else ''}, "
            f"{'the first ' * (count > 1)}at row {row}, column {column} ({value}); expected finite "
            "weights. The model is broken; use another copy, or merge again"
        )
    if blocks and all(block.zero for block in blocks):
        yield (
            f"{label}: {name} is zero throughout; the model cannot tell tokens apart. "
            "Use another copy, or merge again"
        )


def _blocks(model: ModelFolder, name: str) -> Iterator[tuple[int, int]]:
    """First row and the one after the last, block by block; none for a tensor without elements."""
    rows, row_length = rows_of(model.tensors[name].shape)
    step = max(1, BLOCK_ELEMENTS // max(1, row_length))
    if row_length:
        yield from ((first, min(first + step, rows)) for first in range(0, rows, step))


def _look(model: ModelFolder, buffer: "_Buffer", name: str, span: tuple[int, int]) -> BlockValues:
    """Read one block and look at its values."""
    info, (first, stop) = model.tensors[name], span
    size = (stop - first) * rows_of(info.shape)[1] * FLOAT_DTYPES[info.dtype].itemsize
    values = widen(model.read_rows(name, first, stop, buffer.get(size)), info.dtype)
    zero = name in VOCABULARY_TENSORS and not values.any()
    bad = np.argwhere(~np.isfinite(values))
    if not len(bad):
        return BlockValues(size, 0, None, zero)
    row, column = bad[0].tolist()
    return BlockValues(size, len(bad), (first + row, column, float(values[row, column])), zero)


class _Buffer(threading.local):
    """Memory to read into, one piece per thread, used again for every block."""

    def __init__(self) -> None:
        self.memory = np.empty(0, dtype=np.uint8)

    def get(self, size: int) -> NDArray[np.uint8]:
        """At least `size` bytes."""
        if len(self.memory) < size:
            self.memory = np.empty(size, dtype=np.uint8)
        return self.memory
