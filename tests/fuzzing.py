"""What comes from strangers, broken in many ways: `python tests/fuzzing.py` does everything.

    python tests/fuzzing.py parsers        headers, indexes, configs, tokenizer files, recipes
    python tests/fuzzing.py differential   headers of weight files, against the safetensors library
    python tests/fuzzing.py folders        model folders, merged from end to end
    python tests/fuzzing.py parsers --seed 123 --count 1    one case again, with all that is known

Each case follows from its seed alone. Prints a line for each campaign; ends with status 1 if a
promise was broken: an error that is not documented, a case that takes too long, memory or files
that are not given back, a file that is accepted and should not be, a wrong result.
"""

import argparse
import collections
import contextlib
import copy
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import safetensors  # noqa: E402
import torch  # noqa: E402
from faults import TooSlowError, at_most  # noqa: E402
from reference import Array, linear, task_arithmetic, ties  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_adapters import make_lora  # noqa: E402
from tiny_checkpoints import make_llama, write_json, write_tokenizer  # noqa: E402
from tiny_tokenizers import NORMAL, TEMPLATE, write_byte_level  # noqa: E402

import model_patterns  # noqa: E402
from linear_llama import linear_merge_llama_to_folder  # noqa: E402
from lora_llama import lora_fold_llama_to_folder  # noqa: E402
from merge_grammar import read_recipes  # noqa: E402
from merge_recipe import make_recipe  # noqa: E402
from merge_run import plan  # noqa: E402
from merge_yaml import RecipeError, read_documents  # noqa: E402
from model_errors import MemoryLimitError, ModelCompatibilityError  # noqa: E402
from model_lora import changes_of, open_adapter  # noqa: E402
from model_safetensors import DTYPE_BITS, STRICTER, read_header  # noqa: E402
from model_utils import open_model_folder  # noqa: E402
from task_arithmetic_llama import task_arithmetic_merge_llama_to_folder  # noqa: E402
from ties_llama import ties_merge_llama_to_folder  # noqa: E402

MAX_GROWTH = 64 * 10**6
"""Bytes by which the memory of a process may grow in a campaign."""

MOST_MEMORY = 8 * 10**9
"""Bytes that a process may ask for: a file that asks for more must not bring the machine down."""

MOST_SHOWN = 3
"""Cases that are printed of one kind of failure."""

SIZES = {"hidden_size": 16, "intermediate_size": 24}


# Documents: what is wrong is put into a tree, so that the rest stays right


class Pairs(list[list[Any]]):
    """A JSON object as lists of a key and a value; a key may stand twice."""


class Raw(str):
    """Text that is written as it is."""


ODD_NUMBERS = (
    *(0, 1, -1, 2, 3, 4, 7, 8, 16, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**40 + 1, 2**53 + 1),
    *(2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 10**30, 0.5, 1.0, -0.0, 5e-324, 1e300, 1e308),
    *map(Raw, ("-0", "1e999", "-1E400", "NaN", "Infinity", "-Infinity", "01", "0x10", "0o17")),
    *map(Raw, ("1_000", ".5", ".nan", "-.inf", "+1", "9" * 400, "9" * 5000)),
)
ODD_TEXTS = (
    *("", " ", "a", "\0", "a\0b", "/", "/etc/passwd", "..", ".", "../../x", "../model.safetensors"),
    *("\ud800", "a\udfffb", "\U0001f600", "e\u0301", "\u202e", "\ufeff", "\x1b[31m", "\r\n"),
    *("x" * 512, "x" * 513, "\u00e9" * 300, "x" * 100_000, "__metadata__", "__class__", "null"),
    *("F32", "F64", "I8", "F4", "F8_E4M3", "BF16", "llama", "gptq", "LORA", "model.norm.weight"),
    *("lm_head.weight", "default", "<<", "*a", "&a", "!!python/object:os.system", "%s{0}", "none"),
    *(
        "(",
        "[[a",
        "(.|.)*!",
        "(a?){40}a{40}",
        "x{99999}",
        "(?P<a>",
        ".*.*.*.*!",
        "\\",
        "all-linear",
    ),
)
ODD_KEYS = (
    *("__metadata__", "dtype", "shape", "data_offsets", "auto_map", "quantization_config", "vocab"),
    *("text_config", "tie_word_embeddings", "rope_scaling", "eos_token_id", "added_tokens_decoder"),
    *("additional_special_tokens", "chat_template", "use_rslora", "use_dora", "rank_pattern"),
    *("alpha_pattern", "modules_to_save", "trainable_token_indices", "layers_to_transform", "lora"),
    *("slices", "modules", "parameters", "filter", "value", "tokenizer", "tokens", "seed", "t"),
)
ODD_OTHERS = (
    *(None, True, False, [], Pairs(), [[]], [None], Pairs([["a", None]]), Pairs([["a", []]])),
    *map(Raw, ("", "nul", "[", "}", "'", "[" * 30 + "]" * 30, "[" * 9999 + "]" * 9999)),
    *map(Raw, ('{"a":' * 200 + "1" + "}" * 200, '{"a":' * 9999 + "1" + "}" * 9999, '"\\ud800"')),
)


def parsed(text: bytes) -> Any:
    """A document as a tree; `ValueError` if it is no JSON."""
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs(map(list, pairs)))


def written(value: Any) -> str:
    """A tree as JSON."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{written(key)}: {written(each)}" for key, each in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return json.dumps(value)


class Place(NamedTuple):
    """An entry of a tree: an item of a list, or the key or the value of a pair of an object.

    Attributes:
        at, index: `at[index]` is the item, the key (`index` is 0) or the value (1).
        owner, number: `owner[number]` is the item or the pair.
    """

    at: list[Any]
    index: int
    owner: list[Any]
    number: int

    @property
    def is_key(self) -> bool:
        """Whether it is the key of a pair."""
        return isinstance(self.owner, Pairs) and self.index == 0


def places_in(tree: Any) -> Iterator[Place]:
    """Every entry of a tree."""
    for number, each in enumerate(tree if isinstance(tree, list) else ()):
        if isinstance(tree, Pairs):
            yield Place(each, 0, tree, number)
            yield Place(each, 1, tree, number)
            yield from places_in(each[1])
        else:
            yield Place(tree, number, tree, number)
            yield from places_in(each)


def odd(rng: random.Random, like: Any) -> Any:
    """A value as none should be, mostly of the kind of another."""
    kinds = (ODD_NUMBERS, ODD_TEXTS, ODD_OTHERS)
    if isinstance(like, int | float) and rng.random() < 0.7:
        step = rng.choice((-8, -1, 1, 8, like, -like, -2 * like))
        return rng.choice((*ODD_NUMBERS, like + step, like + step))
    if isinstance(like, str) and rng.random() < 0.7:
        return rng.choice((*ODD_TEXTS, like + rng.choice(ODD_TEXTS), rng.choice(ODD_TEXTS) + like))
    return copy.deepcopy(rng.choice(rng.choice(kinds)))


def mutated(document: Any, rng: random.Random) -> Any:
    """A tree with a few changes."""
    holder = [document]
    for _ in range(rng.choice((1, 1, 1, 1, 2, 4))):
        places = [*places_in(holder)]
        at, index, owner, number = place = rng.choice(places)
        match rng.randrange(8):
            case 0 if owner is not holder:
                del owner[number]
            case 1 if owner is not holder:
                owner.insert(rng.randint(0, len(owner)), copy.deepcopy(owner[number]))
            case 2:
                other = rng.choice([each for each in places if each.is_key == place.is_key])
                mine, its = copy.deepcopy((at[index], other.at[other.index]))
                at[index], other.at[other.index] = its, mine
            case 3 if isinstance(at[index], Pairs):
                key = rng.choice((rng.choice(ODD_KEYS), rng.choice(ODD_TEXTS)))
                at[index].insert(rng.randint(0, len(at[index])), [key, odd(rng, None)])
            case 4 if isinstance(at[index], list):
                rng.shuffle(at[index])
            case 5 if not place.is_key:
                at[index] = rng.choice(([at[index]], Pairs([["a", at[index]]])))
            case _ if place.is_key:
                at[index] = rng.choice((*ODD_KEYS, *ODD_TEXTS))
            case _:
                at[index] = odd(rng, at[index])
    return holder[0]


def shaken(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Bytes with a few of them changed, cut out, put in, repeated or of another document."""
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randint(0, len(data))
        size = rng.choice((1, 1, 2, 8, 64, len(data)))
        before, part, rest = data[:at], data[at : at + size], data[at + size :]
        match rng.randrange(8):
            case 0 | 1:
                part = bytes(each ^ (1 << rng.randrange(8)) for each in part[:1]) + part[1:]
            case 2:
                part = b""
            case 3:
                part = part * rng.choice((2, 3, 50)) if len(part) < 1000 else part
            case 4:
                odds = (b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\n", b"\t", b" " * 9)
                part = rng.choice((*odds, b"---\n", b"&a ", b"*a", b"!!", b"[", b"{", b'"')) + part
            case 5:
                rest = b"" if rng.random() < 0.3 else rest
            case 6:
                other = rng.choice(others)
                part = other[rng.randint(0, len(other)) :][: rng.choice((4, 40, len(other)))]
            case _:
                part = str(rng.choice(ODD_NUMBERS)).encode()
        data = before + part + rest
    return data


def broken(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """A document that is mostly broken: as a tree if it is JSON, by its bytes, or both."""
    how = rng.random()
    if how < 0.8:
        with contextlib.suppress(ValueError):
            data = written(mutated(parsed(data), rng)).encode("utf-8", "surrogatepass")
    return shaken(data, rng, others) if how > 0.7 else data


# Weight files


def sound_header(rng: random.Random) -> Pairs:
    """The header of a few tensors."""
    header, position = Pairs(), 0
    if rng.random() < 0.5:
        header.append(["__metadata__", Pairs([["format", "pt"]])])
    for number in range(rng.randrange(6)):
        dtype = rng.choice(("F32", "BF16", "F16", rng.choice([*DTYPE_BITS])))
        shape = [rng.choice((0, 1, 2, 3, 8)) for _ in range(rng.randrange(4))]
        while 0 in shape and rng.random() < 0.3:
            shape.insert(rng.randint(0, len(shape)), 2 ** rng.choice((20, 40)))
        stop = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
        entry = Pairs([["dtype", dtype], ["shape", shape], ["data_offsets", [position, stop]]])
        header.append([f"model.layers.{number}.weight", entry])
        position = stop
    rng.shuffle(header)
    return header


def data_size(header: bytes) -> int:
    """How many bytes a header says are behind it; 0 if it says nothing sensible."""
    ends = [0]
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(header)
        for entry in found.values() if isinstance(found, dict) else ():
            with contextlib.suppress(LookupError, TypeError):
                ends.append(entry["data_offsets"][1])
    return max(end for end in ends if type(end) is int and end < 10**5)


def broken_weights(rng: random.Random) -> bytes:
    """A weight file whose header is mostly broken, with as many bytes behind it as fit, or not."""
    text = written(sound_header(rng)).encode()
    size = data_size(text)
    if rng.random() < 0.95:
        text = broken(text, rng, [written(sound_header(rng)).encode()])
    text += rng.choice((b"",) * 12 + (b" ", b" " * 7, b"\n", b"\0"))
    data = rng.randbytes(rng.choice((size, data_size(text), data_size(text))))
    data = rng.choice((data,) * 12 + (data + b"\0", data[1:]))
    length = len(text) + rng.choice((0,) * 20 + (1, -1, 2**63, 2**64 - 1 - len(text)))
    return max(0, length).to_bytes(8, "little") + text + data


# Running a case


class BrokenPromiseError(Exception):
    """A promise that was not kept."""


def is_documented(error: BaseException, documented: tuple[type[BaseException], ...]) -> bool:
    """Whether an error is one that a function promises; kinds of `ValueError` that slip out of
    the libraries are not.
    """
    if isinstance(error, ValueError):
        kinds = (ValueError, RecipeError, MemoryLimitError)
        return type(error) in kinds and issubclass(type(error), documented)
    return isinstance(error, documented)


class Outcome(NamedTuple):
    """How the cases of a campaign ended.

    Attributes:
        counts: of cases by how they ended.
        failures: the seeds and texts of those that broke a promise, by what broke.
        slowest: seconds, and the seed.
        growth: bytes by which the process grew after the first cases.
    """

    counts: collections.Counter[str]
    failures: dict[str, list[tuple[int, str]]]
    slowest: tuple[float, int]
    growth: int


Case = Callable[[random.Random], str]
"""Makes a case and tries it; says how it ended, or raises what was not to be raised."""


def run_cases(campaign: str, first: int, count: int) -> Outcome:
    """The cases of so many seeds from the first on."""
    counts: collections.Counter[str] = collections.Counter()
    failures: dict[str, list[tuple[int, str]]] = {}
    slowest = (0.0, first)
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory(prefix="fuzzing-") as place,
        CAMPAIGNS[campaign](Path(place).resolve()) as run,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # regular expressions of strangers
        memory, descriptors = _peak_memory(), _descriptors()
        for seed in range(first, first + count):
            started = time.monotonic()
            try:
                with at_most(LIMITS[campaign]):
                    ended = run(random.Random(seed))
            except (Exception, TooSlowError) as error:
                ended = "failed"
                text = "".join(traceback.format_exception(error)) if count == 1 else _brief(error)
                failures.setdefault(_where(error), []).append((seed, text))
            counts[ended] += 1
            slowest = max(slowest, (time.monotonic() - started, seed))
        growth = _peak_memory() - memory
        if growth > MAX_GROWTH:
            failures["memory"] = [(first, f"{growth:,} bytes in {count} cases")]
        if (left := _descriptors() - descriptors) > 0:
            failures["open files"] = [(first, f"{left} are left open after {count} cases")]
    return Outcome(counts, failures, slowest, growth)


def _peak_memory() -> int:
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _descriptors() -> int:
    place = Path("/proc/self/fd")
    return len(os.listdir(place)) if place.is_dir() else 0


def _where(error: BaseException) -> str:
    """What kind of error it is, and the last place of ours that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).parent == ROOT]
    said = f": {error}"[:90] if isinstance(error, BrokenPromiseError) else ""
    place = f"{Path(ours[-1].filename).name}: {ours[-1].name}" if ours else "here"
    return f"{type(error).__name__} in {place}{said}"


def _brief(error: BaseException) -> str:
    text = repr(error)
    return text if len(text) <= 300 else f"{text[:300]}..."


def put_together(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome of all parts of a campaign."""
    failures: dict[str, list[tuple[int, str]]] = {}
    for outcome in outcomes:
        for where, found in outcome.failures.items():
            failures.setdefault(where, []).extend(found)
    counts = sum((outcome.counts for outcome in outcomes), collections.Counter())
    slowest = max(outcome.slowest for outcome in outcomes)
    return Outcome(counts, failures, slowest, max(outcome.growth for outcome in outcomes))


# Parsers


class Parser(NamedTuple):
    """A function that reads what a stranger wrote.

    Attributes:
        documents: that it accepts.
        read: reads one; what may be chosen besides is chosen by the generator.
        documented: errors that it may raise.
    """

    documents: Sequence[bytes]
    read: Callable[[bytes, random.Random | None], object]
    documented: tuple[type[BaseException], ...] = (ModelCompatibilityError, OSError)


SMALL = 6
"""After so many parsers come those of small files, which take longer and get half of the cases."""


@contextlib.contextmanager
def parser_cases(place: Path) -> Iterator[Case]:
    """Documents that are mostly broken, for every parser."""
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, model_patterns, "SECONDS", model_patterns.SECONDS)
        model_patterns.SECONDS = 0.5  # of the one second that a case may take
        parsers = {
            **_weights_parser(stack),
            **_recipe_parsers(),
            **_index_parser(place / "sharded"),
            **_adapter_parser(place / "lora", stack),
            **_small_file_parsers(place / "new", _new_folder),
            **_small_file_parsers(place / "old", _old_folder),
        }
        for parser in parsers.values():
            for document in parser.documents:
                parser.read(document, None)

        def run(rng: random.Random) -> str:
            name = rng.choice([*parsers][:SMALL] if rng.random() < 0.5 else [*parsers][SMALL:])
            parser = parsers[name]
            document = b""
            try:
                if name == "weights":
                    document = broken_weights(rng)
                else:
                    document = broken(rng.choice(parser.documents), rng, parser.documents)
                parser.read(document, rng)
            except (Exception, TooSlowError) as error:
                if is_documented(error, parser.documented):
                    return f"{name} refused"
                error.add_note(f"{name}: {document[:3000]!r}")
                raise
            return f"{name} accepted"

        yield run


def _weights_parser(stack: contextlib.ExitStack) -> dict[str, Parser]:
    file = stack.enter_context(tempfile.TemporaryFile(buffering=0))  # noqa: SIM115
    sound = [b"\2\0\0\0\0\0\0\0{}"]
    return {"weights": Parser(sound, lambda data, _: table_of(data, file))}


def table_of(content: bytes, file: IO[bytes]) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of every tensor of a weight file, by our reader."""
    file.truncate(0)
    os.pwrite(file.fileno(), content, 0)
    return {
        name: (info.dtype, list(info.shape), content[begin : begin + info.nbytes])
        for name, (info, begin) in read_header(file.fileno(), "file").entries.items()
    }


def _recipe_parsers() -> dict[str, Parser]:
    """Of YAML as people write it, of YAML that is JSON, and of JSON."""
    texts = [path.read_bytes() for path in sorted((ROOT / "examples/recipes").glob("*.yml"))]
    values = [[document.value for document in read_documents(text)] for text in texts]
    single = [json.dumps(of_file[0]).encode() for of_file in values if len(of_file) == 1]

    def parser(name: str, documents: Sequence[bytes]) -> Parser:
        return Parser(documents, lambda data, _: read_recipes(data, name), (RecipeError,))

    return {
        "recipe": parser("recipe.yml", [*texts, ANCHORS]),
        "recipe in flow style": parser("recipe.yml", single),
        "recipe.json": parser("recipe.json", single),
    }


ANCHORS = b"""
merge_method: linear
parameters: &shared {weight: [0.5, 1e-1], normalize: true}
models:
  - &first {model: a, parameters: *shared}
  - {<<: *first, model: 'b'}
dtype: bfloat16 # of both
"""


def _index_parser(folder: Path) -> dict[str, Parser]:
    make_llama(folder, shards=2, **SIZES)
    file = folder / "model.safetensors.index.json"

    def read(data: bytes, _: random.Random | None) -> None:
        file.write_bytes(data)
        open_model_folder(folder).close()

    return {"index": Parser([file.read_bytes()], read)}


USUAL = """
{"bias": "none", "use_rslora": false, "use_dora": false, "lora_dropout": 0.0, "rank_pattern": {},
 "alpha_pattern": {"layers.1.self_attn.q_proj": 4}, "modules_to_save": null, "layers_pattern": null,
 "exclude_modules": ["lm_head"], "init_lora_weights": true, "layers_to_transform": [0, 1],
 "trainable_token_indices": null}
"""
"""Further entries of an adapter's config."""


def _adapter_parser(folder: Path, stack: contextlib.ExitStack) -> dict[str, Parser]:
    place = make_llama(folder.with_name("base of lora"), **SIZES)
    config = make_lora(folder, place) / "adapter_config.json"
    base = stack.enter_context(open_model_folder(place))
    usual = json.loads(config.read_text()) | json.loads(USUAL)
    pattern = usual | {"target_modules": r".*\.(q|up)_proj", "exclude_modules": "lm_.*"}

    def read(data: bytes, _: random.Random | None) -> None:
        config.write_bytes(data)
        with open_adapter(str(folder)) as adapter:
            changes_of(adapter, base)

    return {"adapter": Parser([json.dumps(each).encode() for each in (usual, pattern)], read)}


def _small_file_parsers(folder: Path, make: Callable[[Path], Path]) -> dict[str, Parser]:
    """Of every small file of a model, by planning a merge of it with another one."""
    base = make(folder)
    parsers = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".txt", ".jinja"):
            read = functools.partial(_read_small_file, file, file.read_bytes(), base)
            documented = (ModelCompatibilityError, ValueError, OSError)
            name = f"{folder.name} {file.name}"
            parsers[name] = Parser([file.read_bytes()], read, documented)
    return parsers


def _read_small_file(
    file: Path, before: bytes, base: Path, data: bytes, rng: random.Random | None
) -> None:
    """Plan a merge in which a small file of one of the models has this content."""
    models = [str(file.parent), str(base)]
    settings: dict[str, Any] = {}
    if rng is not None:
        rng.shuffle(models)
        settings["vocabulary"] = rng.choice(("min", "max", "union", "base"))
        settings["tokenizer_source"] = rng.choice((None, *models))
        settings["chat_template"] = rng.choice(("auto", "auto", "none", *models))
    file.write_bytes(data)
    try:
        report = plan(make_recipe("linear", None, models, {}, **settings), threads=1)
        report.summary()
        json.dumps(report.to_dict())
    finally:
        file.write_bytes(before)


def _new_folder(folder: Path) -> Path:
    """A model with the small files of today; returns one that it can be merged with."""
    make_llama(folder, vocab_size=54, tokenizer=True, **SIZES)
    write_tokenizer(folder, 52)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for number, token in enumerate(("<|im_start|>", "<|im_end|>"), 52):
        entry = {"content": token, "special": True, "normalized": False, "lstrip": False}
        tokenizer["added_tokens"].append(
            {"id": number, "single_word": False, "rstrip": False, **entry}
        )
        settings.setdefault("added_tokens_decoder", {})[str(number)] = entry
    settings["additional_special_tokens"] = ["<|im_end|>"]
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", settings)
    return make_llama(folder.with_name("base of new"), vocab_size=48, tokenizer=True, **SIZES)


def _old_folder(folder: Path) -> Path:
    """A model with the small files of old; returns one that it can be merged with."""
    base = folder.with_name("base of old")
    for place, added in ((folder, ("<|im_start|>", "<|im_end|>")), (base, ("<|im_start|>",))):
        make_llama(place, vocab_size=NORMAL + len(added), **SIZES)
        write_byte_level(place, added, form="vocab.json", chat_template=TEMPLATE)
        (place / "chat_template.jinja").unlink()
        settings = json.loads((place / "tokenizer_config.json").read_text())
        write_json(place / "chat_template.json", {"chat_template": TEMPLATE})
        ids = {
            entry["content"]: int(i) for i, entry in settings.pop("added_tokens_decoder").items()
        }
        write_json(place / "added_tokens.json", ids)
        write_json(place / "special_tokens_map.json", {"eos_token": added[0]})
        write_json(place / "tokenizer_config.json", settings | {"eos_token": added[0]})
    return base


# Against the safetensors library

REASONS = (
    "a name stands in it twice",
    "is not dtype, shape and data_offsets",
    "is no name for a tensor",
    "expected at most 8 dimensions of 2**40",
    "it claims|it names",
    "it is not a JSON object, with nothing but spaces after it",
    "__metadata__ is not an object of texts",
)
"""What our reader says in the cases of `STRICTER`, in their order."""


@contextlib.contextmanager
def differential_cases(_: Path) -> Iterator[Case]:
    """Weight files with broken headers, read by us and by the safetensors library."""
    assert len(REASONS) == len(STRICTER)
    with tempfile.TemporaryFile(buffering=0) as file:

        def run(rng: random.Random) -> str:
            content = broken_weights(rng)
            try:
                return compare_readers(content, file)
            except (Exception, TooSlowError) as error:
                error.add_note(f"the file: {content[:3000]!r}")
                raise

        yield run


def compare_readers(content: bytes, file: IO[bytes]) -> str:
    """Which of the two readers accept a file; they must find the same in it."""
    said, refused = "", ""
    ours = theirs = {}
    try:
        ours = table_of(content, file)
    except ModelCompatibilityError as error:
        said = str(error.__cause__ or error)
    try:
        found = safetensors.deserialize(content)
        theirs = {name: (of["dtype"], of["shape"], bytes(of["data"])) for name, of in found}
    except safetensors.SafetensorError as error:
        refused = str(error).removeprefix("Error while deserializing: ")
    if refused and not said:
        raise BrokenPromiseError(f"accepted, but refused by the library: {refused}")
    if said and not refused:
        reasons = zip(REASONS, STRICTER, strict=True)
        explained = [case for words, case in reasons if any(w in said for w in words.split("|"))]
        if not explained or (explained[0] == STRICTER[-1] and b"null" not in content):
            raise BrokenPromiseError(f"refused, but accepted by the library: {said}")
        return f"stricter, as {explained[0]}"
    if ours != theirs:
        raise BrokenPromiseError(f"read otherwise: {ours}, by the library {theirs}")
    return "refused by both" if said else "accepted by both"


# Folders

NAMES = {"linear": "ab", "task_arithmetic": ("base", *"ab"), "ties": ("base", *"ab")}
NAMES["fold"] = ("base", "lora")
WEIGHTS = (0.5, 0.75)
DENSITY = 0.5
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@contextlib.contextmanager
def folder_cases(place: Path) -> Iterator[Case]:
    """Merges of a small family, one folder of which is broken in up to three ways."""
    family, outside, work = place / "family", place / "outside", place / "work"
    base = make_llama(family / "base", tokenizer=True, **SIZES)
    for seed, name in enumerate("ab", 1):
        make_llama(family / name, seed=seed, base=base, tokenizer=True, shards=seed, **SIZES)
    make_lora(family / "lora", base)
    make_llama(outside, seed=3, tokenizer=True, **SIZES)
    work.mkdir()
    before = Path.cwd()
    os.chdir(outside)
    try:
        for method, names in NAMES.items():
            merge_and_check(method, {name: family / name for name in names}, work)
        yield functools.partial(_folder_case, place)
    finally:
        os.chdir(before)


def _folder_case(place: Path, rng: random.Random) -> str:
    method = rng.choice([*NAMES])
    folders = {name: place / "family" / name for name in NAMES[method]}
    victim = rng.choice([*folders])
    case = place / "case"
    shutil.rmtree(case, ignore_errors=True)
    folders[victim] = shutil.copytree(folders[victim], case / victim)
    done = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        change = rng.choice(CHANGES)
        with contextlib.suppress(*UNCHANGED):  # of what was broken before
            change(folders[victim], rng)
            done.append(change.__name__)
    before = states_of(place)
    try:
        ended = merge_and_check(method, folders, place / "work")
        if states_of(place) != before:
            differing = dict(states_of(place).items() ^ before.items())
            raise BrokenPromiseError(f"changed besides the output: {sorted(differing)}")
        return f"{method} {ended}"
    except (Exception, TooSlowError) as error:
        error.add_note(f"{method}, in {victim}: {', '.join(done)}")
        raise
    finally:
        shutil.rmtree(place / "work")
        (place / "work").mkdir()


UNCHANGED = (OSError, ValueError, LookupError, TypeError, RuntimeError, RecursionError)
UNCHANGED += (safetensors.SafetensorError, AttributeError)


def merge_and_check(method: str, folders: Mapping[str, Path], work: Path) -> str:
    """Merge folders; whether it was refused, or the result is right."""
    out = work / "out"
    try:
        merge(method, folders, out)
    except Exception as error:
        if not is_documented(error, (ModelCompatibilityError, ValueError, OSError)):
            raise
        if left := os.listdir(work):
            raise BrokenPromiseError(f"{left} left by a run that was refused") from error
        return "refused"
    if (left := os.listdir(work)) != ["out"]:
        raise BrokenPromiseError(f"{left} left by a run")
    check_result(weights_of(out), expected(method, [*folders.values()]))
    shutil.rmtree(out)
    return "merged"


def merge(method: str, folders: Mapping[str, Path], out: Path) -> None:
    """Merge as a user does."""
    first, *others = folders.values()
    settings: dict[str, Any] = {"output_dir": out, "progress": False, "threads": 1}
    match method:
        case "linear":
            linear_merge_llama_to_folder([first, *others], weights=WEIGHTS, **settings)
        case "task_arithmetic":
            task_arithmetic_merge_llama_to_folder(first, others, weights=WEIGHTS, **settings)
        case "ties":
            ties_merge_llama_to_folder(first, others, densities=[DENSITY] * 2, **settings)
        case "fold":
            lora_fold_llama_to_folder(first, others, **settings)


def states_of(place: Path) -> dict[str, tuple[int, ...]]:
    """By what changes of files and folders are seen, but for those of the output."""
    found = {}
    for folder, folders, files in os.walk(place):
        if "work" in folders:
            folders.remove("work")
        for name in (".", *folders, *files):
            path = os.path.join(folder, name)
            state = os.lstat(path)
            found[path] = (state.st_mode, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    return found


# What a result should be, from the files alone


class Reference(NamedTuple):
    """A tensor as it should be, and the sum of the magnitudes that it comes from."""

    values: Array
    magnitude: Array


Tokens = Mapping[int, str]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that a loader finds in a folder."""
    names = {"model.safetensors"}
    if not (folder / "model.safetensors").exists():
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        names = {*index["weight_map"].values()}
    return {name: t for file in sorted(names) for name, t in load_file(folder / file).items()}


def expected(method: str, folders: Sequence[Path]) -> dict[str, Reference]:
    """What the tensors of a merge are, in float64."""
    if method == "fold":
        return _folded(*folders)
    models = [weights_of(folder) for folder in folders]
    tied = [_is_tied(folder, model) for folder, model in zip(folders, models, strict=True)]
    rows = min(len(model[EMBEDDING]) for model in models)
    names = {name for name in models[0] if "rotary_emb" not in name} - {HEAD}
    found = {}
    for name in names | ({HEAD} if not all(tied) else set()):
        arrays = []
        for model, shares in zip(models, tied, strict=True):
            values = model[EMBEDDING if name == HEAD and shares else name].double().numpy().copy()
            arrays.append(values[:rows] if name in (EMBEDDING, HEAD) else values)
        if name in (EMBEDDING, HEAD):
            _fill(arrays, [tokens_of(folder) for folder in folders], has_base=method != "linear")
        found[name] = _merged(method, arrays)
    return found


def _fill(arrays: list[Array], tokens: Sequence[Tokens | None], *, has_base: bool) -> None:
    """Rows whose token a model does not have are the base's, or the mean of those that have it."""
    first = next((each for each in tokens if each is not None), {})
    for row in range(len(arrays[0])):
        has = [each is None or each.get(row) == first.get(row) for each in tokens]
        owners = [array[row] for array, owns in zip(arrays, has, strict=True) if owns]
        filled = arrays[0][row] if has_base and has[0] else np.mean(owners, axis=0)
        for array, owns in zip(arrays, has, strict=True):
            array[row] = array[row] if owns else filled


def tokens_of(folder: Path) -> Tokens | None:
    """Tokens by id, of a tokenizer.json."""
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    content = json.loads(file.read_text())
    tokens = {row: token for token, row in content["model"]["vocab"].items()}
    known, added = set(tokens.values()), content.get("added_tokens") or []
    return tokens | {each["id"]: each["content"] for each in added if each["content"] not in known}


def _merged(method: str, arrays: Sequence[Array]) -> Reference:
    magnitude = sum(np.abs(array) for array in arrays)
    base, *others = arrays
    if method == "linear":
        return Reference(linear(arrays, WEIGHTS), magnitude)
    if method == "ties":
        return Reference(ties(base, others, [1.0] * 2, [DENSITY] * 2), magnitude)
    return Reference(task_arithmetic(base, others, WEIGHTS), 2 * magnitude)


def _folded(base: Path, adapter: Path) -> dict[str, Reference]:
    """W + s B A."""
    model, factors = weights_of(base), load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    rank = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    names = {name for name in model if "rotary_emb" not in name}
    found = {}
    for name in names - ({HEAD} if _is_tied(base, model) else set()):
        values = model[name].double().numpy()
        magnitude = np.abs(values)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in factors:
            a, b = (factors[f"{module}.lora_{each}.weight"].double().numpy() for each in "AB")
            scale = config["lora_alpha"] / rank
            values = values + scale * (b @ a)
            magnitude = magnitude + abs(scale) * (np.abs(b) @ np.abs(a))
        found[name] = Reference(values, magnitude)
    return found


def _is_tied(folder: Path, model: Mapping[str, torch.Tensor]) -> bool:
    config = json.loads((folder / "config.json").read_text())
    is_known = config.get("model_type") in ("llama", "mistral", "qwen2", "qwen3")
    return bool(config.get("tie_word_embeddings", not is_known and HEAD not in model))


def check_result(found: Mapping[str, torch.Tensor], wanted: Mapping[str, Reference]) -> None:
    """Whether all tensors are there, and as near as their dtype allows."""
    if found.keys() != wanted.keys():
        raise BrokenPromiseError(f"other tensors: {sorted(found.keys() ^ wanted.keys())}")
    for name, tensor in found.items():
        values, magnitude = wanted[name]
        kind, result = torch.finfo(tensor.dtype), tensor.double().numpy()
        if result.shape != values.shape:
            raise BrokenPromiseError(f"{name} has shape {result.shape}, not {values.shape}")
        if not np.isfinite(values).all():
            raise BrokenPromiseError(f"{name} was merged from values that are not finite")
        room = 0.501 * kind.eps * np.abs(values) + 2**-20 * magnitude + kind.tiny * kind.eps
        with np.errstate(invalid="ignore"):
            wrong = ~(np.abs(result - values) <= room) & (magnitude < 0.99 * kind.max)
        if wrong.any():
            place = tuple(int(i[0]) for i in wrong.nonzero())
            raise BrokenPromiseError(
                f"{wrong.sum()} values of a tensor are wrong: {name} at {place} is "
                f"{result[place]}, not {values[place]}"
            )


# What is done to a folder


def _files(folder: Path, pattern: str = "*") -> list[Path]:
    """Files that can be written to: links, pipes and folders stay as they are."""
    files = [each for each in sorted(folder.glob(pattern)) if each.is_file()]
    return [each for each in files if not each.is_symlink() and each.stat().st_nlink == 1]


def break_bytes(folder: Path, rng: random.Random) -> None:
    file = rng.choice(_files(folder))
    file.write_bytes(shaken(file.read_bytes(), rng, [b"{}"]))


def break_document(folder: Path, rng: random.Random) -> None:
    file = rng.choice(_files(folder, "*.json"))
    text = written(mutated(parsed(file.read_bytes()), rng))
    file.write_bytes(text.encode("utf-8", "surrogatepass"))


def break_header(folder: Path, rng: random.Random) -> None:
    file = rng.choice(_files(folder, "*.safetensors"))
    content = file.read_bytes()
    stop = 8 + int.from_bytes(content[:8], "little")
    text = written(mutated(parsed(content[8:stop]), rng)).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[stop:])


def flip_payload(folder: Path, rng: random.Random) -> None:
    file = rng.choice(_files(folder, "*.safetensors"))
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for _ in range(rng.choice((1, 1, 10, 100))):
        content[rng.randrange(start, len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def remove(folder: Path, rng: random.Random) -> None:
    rng.choice(_files(folder)).unlink()


def rename(folder: Path, rng: random.Random) -> None:
    file, other = rng.choice(_files(folder)), rng.choice(_files(folder)).name
    names = (other, "model.safetensors", "pytorch_model.bin", "x.json", f"{file.name}.bak")
    file.rename(folder / rng.choice(names))


def swap(folder: Path, rng: random.Random) -> None:
    file, other = rng.choices(_files(folder, rng.choice(("*.safetensors", "*.json"))), k=2)
    one, two = file.read_bytes(), other.read_bytes()
    file.write_bytes(two)
    other.write_bytes(one)


def replace(folder: Path, rng: random.Random) -> None:
    """Something else than a file in the place of one."""
    file = rng.choice(_files(folder))
    outside, content = folder.parent.parent / "outside", file.read_bytes()
    file.unlink()
    match rng.randrange(7):
        case 0:
            os.mkfifo(file)
        case 1:
            file.mkdir()
        case 2:
            file.symlink_to(outside / file.name)
        case 3:
            file.symlink_to(rng.choice(("nowhere", file.name, "/dev/zero", "..", ".")))
        case 4:  # inside the folder, which is allowed
            (folder / "own").write_bytes(content)
            file.symlink_to(rng.choice(("own", f"../{folder.name}/own")))
        case 5:
            os.link(rng.choice([*outside.iterdir()]), file)
        case 6:
            file.write_bytes(b"")


OTHER_VALUES = """
{"tie_word_embeddings": [true, false], "torch_dtype": ["float32", "float16", "x"],
 "hidden_size": [8, 32], "intermediate_size": [16, 25], "num_hidden_layers": [1, 3],
 "vocab_size": [47, 49], "num_attention_heads": [2, 8], "num_key_value_heads": [1, 4],
 "model_type": ["mistral", "qwen2", "qwen3", "gemma"], "rope_theta": [5e5],
 "head_dim": [4, 8, null], "eos_token_id": [3, [2, 47], 48], "attention_bias": [true],
 "r": [2, 4, 8], "lora_alpha": [0, -3.5, 1e9], "use_rslora": [true], "use_dora": [true],
 "lora_bias": [true], "fan_in_fan_out": [true], "target_modules": ["all-linear"]}
"""
"""Entries of a config, and values of them that could be right."""


def change_config(folder: Path, rng: random.Random) -> None:
    """Another value that could be right."""
    file = rng.choice(_files(folder, "*config.json"))
    config = json.loads(file.read_text())
    changes = json.loads(OTHER_VALUES)
    key = rng.choice([key for key in changes if key in config or rng.random() < 0.3])
    file.write_text(json.dumps(config | {key: rng.choice(changes[key])}))


def change_tensors(folder: Path, rng: random.Random) -> None:
    """Other tensors, in a weight file that is valid."""
    file = rng.choice(_files(folder, "*.safetensors"))
    tensors = load_file(file)
    name = rng.choice([*tensors])
    match rng.randrange(8):
        case 0:
            kind = rng.choice((torch.float32, torch.float16, torch.bfloat16, torch.float64))
            names = rng.choice(([name], [*tensors]))
            tensors |= {each: tensors[each].to(kind) for each in names}
        case 1:
            del tensors[name]
        case 2:
            tensors[rng.choice((f"{name}x", *tensors))] = tensors.pop(name)
        case 3:
            tensors[name] = tensors[name].T.contiguous()
        case 4:
            tensors[name].view(-1)[0] = rng.choice((math.nan, math.inf, 0.0, 3e38, 1e-40))
        case 5:
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        case 6:
            tensors[name] = tensors[name][: rng.randrange(len(tensors[name]) + 1)].clone()
        case 7:
            other = rng.choice([*tensors])
            tensors[name], tensors[other] = tensors[other], tensors[name]
    save_file(tensors, file)


def change_vocabulary(folder: Path, rng: random.Random) -> None:
    """More or fewer rows, or a head that is the embedding, in weights and config alike."""
    (file,) = _files(folder, "config.json")
    config = json.loads(file.read_text())
    rows = rng.choice((None, 40, 47, 49, 64))
    for weights in _files(folder, "*.safetensors"):
        tensors = load_file(weights)
        if rows is None:
            tensors.pop(HEAD, None)
        for name in tensors.keys() & {EMBEDDING, HEAD} if rows else ():
            tensors[name] = tensors[name].repeat(2, 1)[:rows].clone()
        save_file(tensors, weights)
    change = {"tie_word_embeddings": True} if rows is None else {"vocab_size": rows}
    file.write_text(json.dumps(config | change))
    for index in _files(folder, "*.index.json") if rows is None else ():
        content = json.loads(index.read_text())
        content["weight_map"].pop(HEAD, None)
        index.write_text(json.dumps(content))


CHANGES = (
    *(break_bytes, break_document, break_header, flip_payload, flip_payload, remove, rename, swap),
    *(replace, change_config, change_tensors, change_tensors, change_vocabulary),
)


# Campaigns

CAMPAIGNS: Mapping[str, Callable[[Path], contextlib.AbstractContextManager[Case]]] = {
    "parsers": parser_cases,
    "differential": differential_cases,
    "folders": folder_cases,
}
COUNTS = {"parsers": 200_000, "differential": 100_000, "folders": 5_000}
LIMITS = {"parsers": 1.0, "differential": 1.0, "folders": 20.0}
"""Seconds that a case may take."""


def run_campaign(campaign: str, first: int, count: int, jobs: int) -> Outcome:
    """The cases of a campaign, in several processes."""
    jobs = min(jobs, count)
    ends = [first + count * job // jobs for job in range(jobs + 1)]
    parts = [(campaign, start, stop - start) for start, stop in itertools.pairwise(ends)]
    if jobs == 1:
        return run_cases(*parts[0])
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        return put_together(pool.starmap(run_cases, parts))


def main() -> int:
    """Parse the command line and run what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("campaign", nargs="*", choices=[*CAMPAIGNS, []], default=[])
    parser.add_argument("--count", type=int, help="cases; by default as many as a release needs")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    arguments = parser.parse_args()
    failed = False
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    for campaign in arguments.campaign or CAMPAIGNS:
        started = time.monotonic()
        count = arguments.count or COUNTS[campaign]
        outcome = run_campaign(campaign, arguments.seed, count, arguments.jobs)
        for where, found in sorted(outcome.failures.items()):
            print(f"FAILED {campaign}, {len(found)} times: {where}")
            for seed, text in found[:MOST_SHOWN]:
                print(f"    --seed {seed} --count 1: {text}")
        print(summary(campaign, outcome, time.monotonic() - started), flush=True)
        failed = failed or bool(outcome.failures)
    return int(failed)


def summary(campaign: str, outcome: Outcome, seconds: float) -> str:
    """A line on a campaign."""
    counts, (slowest, seed) = outcome.counts, outcome.slowest
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    failures = sum(map(len, outcome.failures.values()))
    return (
        f"{campaign}: {counts.total()} cases ({kinds}); {failures} failures; slowest "
        f"{slowest:.2f} s (seed {seed}), memory +{outcome.growth / 1e6:.0f} MB; {seconds:.0f} s"
    )


if __name__ == "__main__":
    raise SystemExit(main())
