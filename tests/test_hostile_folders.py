"""Folders, adapters and recipes of strangers: each is refused with its status, and harms nothing.

Every row of the tables is a folder in which one thing is hostile or broken, given to the real
command. What lies on the disk is compared before and after: a refusal leaves no output and no
beginning of one, changes no input, and a canary that anything of a stranger's would make if it
were run is not there.
"""

import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
import socket
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import at_most
from safetensors.torch import load_file, save_file
from tiny_adapters import make_lora
from tiny_checkpoints import make_llama, read_tensors, tensor_hashes

import lora_llama
import merge
import model_files
import model_utils
import ties_llama
from model_errors import ModelCompatibilityError

OK, USAGE, BAD, UNSAFE, NO_SPACE, IO, MEMORY = 0, 2, 3, 4, 5, 6, 8
"""Exit statuses; see `llama-merge --help`."""

SECONDS = 10.0
"""In which a command must have ended; less for those that are known not to end."""

LARGE, TALKATIVE = 2**26, 20_000
"""Files beyond this are sparse, and compared by size; texts beyond this hide what they say."""

SMALL = {"layers": 1, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
ADAPTER = "adapter_model.safetensors"

MAINS = {"ties": ties_llama.main, "lora": lora_llama.main, "recipe": merge.main}
TIES = ("ties", "base", "--ft_models", "a", "--save", "out", "--quiet")
SHARDED = ("ties", "base", "--ft_models", "sharded", "--save", "out", "--quiet")
FOLD = ("lora", "fold", "base", "adapter", "--save", "out", "--quiet")
JOIN = ("lora", "merge", "adapter", "adapter", "--save", "out", "--quiet")
EXTRACT = ("lora", "extract", "a", "--base", "base", "--rank", "2", "--save", "out", "--quiet")
RECIPE, JSON_RECIPE = ("recipe", "r.yml", "out", "--quiet"), ("recipe", "r.json", "out", "--quiet")
CHECK = ("ties", "--check", "base")

Spoil = Callable[[Path], object]
"""Takes the folder with the models, which is the current one."""

Check = Callable[[Path, str], object]
"""Takes the same, and what the command has said."""


@dataclass(frozen=True)
class Fixture:
    """Something hostile or broken.

    Attributes:
        spoil: does it.
        status: that the command ends with.
        texts: what it says: the model and the file, what is wrong, what to do.
        argv: the command.
        check: looks at the result, where there is one.
    """

    spoil: Spoil
    status: int
    texts: tuple[str, ...]
    argv: tuple[str, ...]
    check: Check


FIXTURES: list[Any] = []


def row(
    name: str,
    spoil: Spoil,
    status: int,
    *texts: str,
    argv: tuple[str, ...] = TIES,
    check: Check = lambda work, said: None,
    skip: bool = False,
) -> None:
    """Add a fixture."""
    mark = pytest.mark.skipif(skip, reason="needs a user for whom files can be unreadable")
    fixture = Fixture(spoil, status, texts, argv, check)
    FIXTURES.append(pytest.param(fixture, id=name, marks=mark))


# What can be spoiled


def nothing(work: Path) -> None:
    """All is as it should be; the command is at fault."""


def both(*spoils: Spoil) -> Spoil:
    def spoil(work: Path) -> None:
        for each in spoils:
            each(work)

    return spoil


def write(name: str, content: str | bytes) -> Spoil:
    data = content.encode() if isinstance(content, str) else content

    def spoil(work: Path) -> None:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(data)

    return spoil


def edit_text(name: str, change: Callable[[str], str]) -> Spoil:
    return lambda work: (work / name).write_text(change((work / name).read_text()))


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Change a JSON file."""

    def changed(text: str) -> str:
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return edit_text(name, changed)


def put(name: str, **entries: Any) -> Spoil:
    """Set entries of a JSON file."""
    return edit(name, lambda content: content.update(entries))


def begin(name: str, entries: str) -> Spoil:
    """Put entries, as text, at the beginning of a JSON object."""
    return edit_text(name, lambda text: text.replace("{", f"{{{entries},", 1))


def remove(name: str) -> Spoil:
    return lambda work: away(work / name)


def away(path: Path) -> Path:
    """Make room for something else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path


def link(name: str, target: str = "../outside/secret.json") -> Spoil:
    """Put a link in the place of a file; the target is seen from the current folder."""
    return lambda work: away(work / name).symlink_to(os.path.join(work, target))


def loop(name: str) -> Spoil:
    return lambda work: away(work / name).symlink_to(Path(name).name)


def pipe(name: str) -> Spoil:
    return lambda work: os.mkfifo(away(work / name))


def folder(name: str) -> Spoil:
    return lambda work: away(work / name).mkdir()


def plug(name: str) -> Spoil:
    """Put a socket in the place of a file."""

    def spoil(work: Path) -> None:
        away(work / name)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(name)  # seen from the current folder: such paths must be short

    return spoil


def closed(name: str) -> Spoil:
    """Take away the right to read a file, which is made if there is none."""

    def spoil(work: Path) -> None:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).touch()
        (work / name).chmod(0)

    return spoil


def cut(name: str, size: int) -> Spoil:
    return lambda work: os.truncate(work / name, size)


def sparse(name: str, head: bytes, size: int) -> Spoil:
    """A file that takes no room on the disk, however long it is."""

    def spoil(work: Path) -> None:
        (work / name).write_bytes(head)
        os.truncate(work / name, size)

    return spoil


def mapped(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Change which file has which tensor, as the sharded model's list says."""
    return edit(f"sharded/{INDEX}", lambda index: change(index["weight_map"]))


def shard_called(name: Any) -> Spoil:
    return mapped(lambda places: places.update({"model.norm.weight": name}))


def header(text: bytes | Mapping[str, Any], data: bytes = b"", length: int | None = None) -> Spoil:
    """Weights with this header; `length` is the size that it is said to have."""
    raw = text if isinstance(text, bytes) else json.dumps(text).encode()
    said = (len(raw) if length is None else length).to_bytes(8, "little")
    return write(f"a/{WEIGHTS}", said + raw + data)


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def tensors(
    change: Callable[[dict[str, torch.Tensor]], object], file: str = f"a/{WEIGHTS}"
) -> Spoil:
    """Change the tensors of a file."""

    def spoil(work: Path) -> None:
        content = load_file(work / file)
        change(content)
        save_file(content, work / file)

    return spoil


def enlarge(**sizes: int) -> Spoil:
    """Both models with sizes that config and header give alike; the files are full of holes."""

    def spoil(work: Path) -> None:
        for name in ("base", "a"):
            before = json.loads((work / name / "config.json").read_text())
            now = {before[key]: size for key, size in sizes.items()}
            entries, end = {}, 0
            for tensor, value in read_tensors(work / name).items():
                shape = [now.get(n, n) for n in value.shape]
                start, end = end, end + 2 * torch.Size(shape).numel()
                entries[tensor] = entry(shape, start, end, "BF16")
            text = json.dumps(entries).encode()
            head = len(text).to_bytes(8, "little") + text
            sparse(f"{name}/{WEIGHTS}", head, len(head) + end)(work)
            put(f"{name}/config.json", **sizes)(work)

    return spoil


def adapter_config(**entries: Any) -> Spoil:
    return put("adapter/adapter_config.json", **entries)


def with_tokenizer(work: Path) -> None:
    """Give the fine-tune the tokenizer of the base."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(work / "base" / file, work / "a" / file)


# 1. Pickles


class Bomb:
    """What a pickle can hold: loading it runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ../canary",)


BOMB = pickle.dumps(Bomb())
CONVERT = "Convert them in a place you trust"

for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "epoch=1.ckpt"):
    spoil = both(remove(f"a/{WEIGHTS}"), write(f"a/{name}", BOMB))
    row(f"pickle: {name} alone", spoil, UNSAFE, f"a: has only pickle weights ({name})", CONVERT)
row(
    "pickle: shards",
    both(
        remove(f"a/{WEIGHTS}"),
        write("a/pytorch_model-00001-of-00001.bin", BOMB),
        write("a/pytorch_model.bin.index.json", '{"weight_map": {"a": "b"}}'),
    ),
    UNSAFE,
    "a: has only pickle weights (pytorch_model-00001-of-00001.bin)",
    CONVERT,
)
row(
    "pickle: called safetensors",
    write(f"a/{WEIGHTS}", BOMB),
    BAD,
    f"a/{WEIGHTS}: not a complete safetensors file",
    "Download or save it again",
)
row(
    "pickle: in the list of weight files",
    both(write("sharded/pytorch_model.bin", BOMB), shard_called("pytorch_model.bin")),
    UNSAFE,
    f"sharded: {INDEX} names the weight files ['pytorch_model.bin']",
    "Do not use it",
    argv=SHARDED,
)
row(
    "pickle: adapter",
    both(remove(f"adapter/{ADAPTER}"), write("adapter/adapter_model.bin", BOMB)),
    UNSAFE,
    "adapter: has only pickle weights (adapter_model.bin)",
    CONVERT,
    argv=FOLD,
)
row(
    "pickle: in a folder that is checked",
    both(remove(f"base/{WEIGHTS}"), write("base/pytorch_model.bin", BOMB)),
    UNSAFE,
    "base: has only pickle weights (pytorch_model.bin)",
    argv=CHECK,
)


def left_out(work: Path, *names: str) -> None:
    """Files that the result does not have."""
    assert not {*names} & {*os.listdir(work / "out")}


def left_behind(*names: str) -> Check:
    """Files that the result does not have, and of which it is said."""

    def check(work: Path, said: str) -> None:
        left_out(work, *names)
        line = next(line for line in said.splitlines() if line.startswith("left behind: "))
        assert all(name in line for name in names)

    return check


row(
    "pickle: beside good weights",
    both(*(write(f"base/{n}", BOMB) for n in ("pytorch_model.bin", "optimizer.pt", "args.pkl"))),
    OK,
    check=left_behind("pytorch_model.bin", "optimizer.pt", "args.pkl"),
)
row("pickle: beside a good adapter", write("adapter/adapter_model.bin", BOMB), OK, argv=FOLD)
for name in ("LICENSE.bin", "LICENSE.py", "NOTICE.safetensors"):
    row(
        f"licence: {name}",
        write(f"base/{name}", BOMB),
        OK,
        check=lambda work, said, name=name: left_out(work, name),
    )

# 2. Names that lead out, links, what is no file

for name, title in {
    "../outside/secret.safetensors": "up",
    "/outside/secret.safetensors": "absolute",
    "..\\outside\\secret.safetensors": "backslash",
    "more/model.safetensors": "subfolder",
    "secret.safetensors\0.safetensors": "NUL",
    "secret.safetensors\n": "line end",
    "": "empty",
    "config.json": "another file",
}.items():
    row(
        f"weight file, name: {title}",
        shard_called(name),
        UNSAFE,
        f"sharded: {INDEX} names the weight files",
        "in the model's own folder. Do not use it",
        argv=SHARDED,
    )
for value in (7, None, ["x"], {}):
    row(
        f"weight file, name: {type(value).__name__}",
        shard_called(value),
        BAD,
        f"sharded: {INDEX} is not a safetensors index",
        "Download it again",
        argv=SHARDED,
    )

READ_BY = {
    f"a/{WEIGHTS}": TIES,
    "a/config.json": TIES,
    "a/generation_config.json": TIES,
    "base/tokenizer.json": TIES,
    "base/tokenizer_config.json": TIES,
    "base/special_tokens_map.json": TIES,
    "base/added_tokens.json": TIES,
    "base/chat_template.jinja": TIES,
    "base/chat_template.json": TIES,
    "base/additional_chat_templates/tools.jinja": TIES,
    "base/LICENSE": TIES,
    "base/USE_POLICY.md": TIES,
    f"sharded/{INDEX}": SHARDED,
    f"sharded/{SHARDS[1]}": SHARDED,
    "adapter/adapter_config.json": FOLD,
    f"adapter/{ADAPTER}": FOLD,
    "adapter/tokenizer.json": JOIN,
    "base/.cache/huggingface/download/model.safetensors.metadata": (*TIES, "--verify-inputs"),
}
"""Files of every kind that are read, and a command that reads them."""

COPIED_ONLY = ("base/chat_template.json", "base/LICENSE", "base/USE_POLICY.md")
COPIED_ONLY += ("adapter/tokenizer.json", "base/additional_chat_templates/tools.jinja")
"""Folders of such names are left behind, like other folders."""

for name, argv in READ_BY.items():
    model, _, file = name.partition("/")
    out = (f"{model}: {file} is a link out of the model's folder", "Put the file itself there")
    dead = (f"{model}: {file} is a link to nothing. Download the model again",)
    odd = (f"{model}: {file} is no regular file but a folder, pipe or device. Remove it",)
    row(f"link out: {name}", link(name), UNSAFE, *out, argv=argv)
    row(f"link to a device: {name}", link(name, "/dev/zero"), UNSAFE, *out, argv=argv)
    row(f"link to nothing: {name}", link(name, "x"), UNSAFE, *dead, argv=argv)
    row(f"link to itself: {name}", loop(name), UNSAFE, *dead, argv=argv)
    row(f"pipe: {name}", pipe(name), UNSAFE, *odd, argv=argv)
    row(f"socket: {name}", plug(name), UNSAFE, *odd, argv=argv)
    if name not in COPIED_ONLY:
        row(f"folder: {name}", folder(name), UNSAFE, *odd, argv=argv)
    row(
        f"unreadable: {name}",
        closed(name),
        IO,
        f"{file}: Permission denied",
        argv=argv,
        skip=os.geteuid() == 0,
    )


def moved_inside(name: str) -> Spoil:
    """A link to a file in the same folder, which is as good as the file."""

    def spoil(work: Path) -> None:
        place = work / name
        place.rename(place.with_name("real"))
        place.symlink_to("real")

    return spoil


for name in (f"a/{WEIGHTS}", "a/config.json", "base/tokenizer.json"):
    row(f"link inside: {name}", moved_inside(name), OK)


def many_loops(work: Path) -> None:
    """Thirty links to the folder itself: 30**5 paths."""
    away(work / "a/config.json")
    for number in range(30):
        (work / f"a/{number}").symlink_to(".")


def model_elsewhere(work: Path) -> None:
    """A folder that holds nothing but a link to a model outside."""
    shutil.move(work / "a", work.parent / "outside/private")
    (work / "a").mkdir()
    (work / "a/1").symlink_to(work.parent / "outside/private")


def forged_cache(work: Path) -> None:
    """Laid out as a cache of the Hub, whose store of files is a link out."""
    place = work / "models--org--x/snapshots/c"
    shutil.copytree(work / "base", place)
    (work / "models--org--x/blobs").symlink_to(work.parent / "outside")
    (place / "LICENSE").symlink_to("../../blobs/secret.json")


def cache(work: Path) -> None:
    """As the Hub's client lays it out."""
    place, blobs = (work / "models--org--x" / part for part in ("snapshots/c", "blobs"))
    place.mkdir(parents=True)
    shutil.copytree(work / "base", blobs)
    for file in os.listdir(blobs):
        (place / file).symlink_to(f"../../blobs/{file}")


CACHED = ("ties", "models--org--x/snapshots/c", *TIES[2:])
row(
    "links of a folder to itself",
    many_loops,
    BAD,
    "a: no config.json in this folder or up to 5 levels below it",
)
row(
    "link out: a whole model",
    model_elsewhere,
    BAD,
    "a: no config.json in this folder or up to 5 levels below it",
)
row("links of the Hub's cache", cache, OK, argv=CACHED)
row(
    "link out: by a forged cache",
    forged_cache,
    UNSAFE,
    "models--org--x/snapshots/c: LICENSE is a link out of the model's folder",
    argv=CACHED,
)


def many_shards(work: Path) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (FEW_FILES, resource.getrlimit(FILES)[1]))
    content = load_file(work / f"a/{WEIGHTS}")
    away(work / f"a/{WEIGHTS}")
    places = {}
    for number in range(FEW_FILES):
        part = {f"t{number}": torch.ones(1)} if number else content
        save_file(part, work / f"a/{number}.safetensors")
        places |= dict.fromkeys(part, f"{number}.safetensors")
    write(f"a/{INDEX}", json.dumps({"weight_map": places}))(work)


FILES, FEW_FILES = resource.RLIMIT_NOFILE, 256
row("more weight files than may be open", many_shards, IO, "a/", "too many files are open at once")

# A finished folder that is checked lists its files

for name, title in {
    "../../outside/secret.json": "up",
    "/dev/zero": "a device",
}.items():
    row(
        f"list of finished files: {title}",
        write("base/merge_manifest.json", json.dumps({"files": {name: {"sha256": ""}}})),
        UNSAFE,
        f"base: merge_manifest.json names {name!r}",
        argv=CHECK,
    )
for name, title in {"a\0": "NUL", "a" * 300: "too long", "\ud800": "half a character"}.items():
    row(
        f"list of finished files: {title}",
        write("base/merge_manifest.json", json.dumps({"files": {name: {"sha256": ""}}})),
        BAD,
        "base: merge_manifest.json",
        argv=CHECK,
    )
row(
    "list of finished files: a list",
    write("base/merge_manifest.json", '{"files": []}'),
    BAD,
    "base: merge_manifest.json is no manifest",
    "Merge again",
    argv=CHECK,
)
row(
    "known SHA-256: not text",
    write("base/.cache/huggingface/download/model.safetensors.metadata", b"\xff"),
    OK,
    argv=(*TIES, "--verify-inputs"),
)

# 3. Headers that exhaust or mislead their reader

NOT_COMPLETE = (f"a/{WEIGHTS}: not a complete safetensors file", "Download or save it again")
CORRUPT = (f"a/{WEIGHTS}: the safetensors header is corrupt", "Download or save the file again")
ONE = entry([1], 0, 4)

for size in (0, 1, 2**31, 2**63, 2**64 - 1):
    row(f"header: length {size}", header(b"{}", length=size), BAD, *NOT_COMPLETE)
for title, text in {
    "33 MB": b"{" + b" " * 33_000_000 + b"}",
    "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep metadata": b'{"__metadata__": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "not UTF-8": b'{"\xff": 1}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "a list": b"[]",
    "something behind": b"{}x",
    "cut": b'{"a": ',
    "a name twice": b'{"a": 1, "a": 2}',
    "a field twice": b'{"a": {"dtype": "F32", "dtype": "F16"}}',
    "a number of many digits": b'{"a": ' + b"9" * 5000 + b"}",
    "half a character": b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
}.items():
    row(f"header: {title}", header(text, b"1234"), BAD, *CORRUPT)
for title, content in {
    "name with NUL": {"a\0b": ONE},
    "name from the root": {"/etc/passwd": ONE},
    "name of 513 bytes": {"a" * 513: ONE},
    "name of few long letters": {"\u00e9" * 257: ONE},
    "no name": {"": ONE},
    "metadata with a number": {"__metadata__": {"a": 1}, "a": ONE},
    "metadata with an object": {"__metadata__": {"a": {}}, "a": ONE},
    "metadata null": {"__metadata__": None, "a": ONE},
    "an entry that is a list": {"a": ["F32", [1], [0, 4]]},
    "another field": {"a": {**ONE, "strides": [1]}},
    "200,001 tensors": {str(number): {} for number in range(200_001)},
}.items():
    row(f"header: {title}", header(content, b"1234"), BAD, *CORRUPT)

# 4. Shapes and places that cannot be

for title, content in {
    "negative size": {"a": entry([-1], 0, 4)},
    "negative place": {"a": entry([1], -4, 0)},
    "size 2**63": {"a": entry([2**63], 0, 4)},
    "size 2**40 + 1": {"a": entry([2**40 + 1, 0], 0, 0)},
    "product 2**64": {"a": entry([2**32, 2**32], 0, 4)},
    "bytes that are 0 modulo 2**64": {"a": entry([2**31, 2**31, 4], 0, 0)},
    "rank 9": {"a": entry([1] * 9, 0, 4)},
    "a fraction": {"a": entry([1.0], 0, 4)},
    "a truth value": {"a": entry([True], 0, 4)},
    "half a byte": {"a": entry([1], 0, 1, "F4")},
    "18 bits in 2 bytes": {"a": entry([3], 0, 2, "F6_E2M3")},
    "unknown dtype": {"a": entry([1], 0, 4, "Q4_K")},
    "one offset": {"a": {**ONE, "data_offsets": [0]}},
    "offsets turned round": {"a": entry([1], 4, 0)},
    "a hole": {"a": entry([1], 4, 8)},
    "two in one place": {"a": ONE, "b": ONE},
    "an overlap": {"a": ONE, "b": entry([1], 2, 6)},
    "bytes behind": {"a": entry([1], 0, 2, "F16")},
    "beyond the end": {"a": entry([100], 0, 400)},
}.items():
    row(f"tensor: {title}", header(content, b"1234"), BAD, *CORRUPT)
for size in (0, 1, 7, 8, 100):
    row(f"weights cut at {size}", cut(f"a/{WEIGHTS}", size), BAD, *NOT_COMPLETE)
row("weights cut in the middle", cut(f"a/{WEIGHTS}", 4000), BAD, *CORRUPT)
row("weights of a terabyte", sparse(f"a/{WEIGHTS}", b"", 2**40), BAD, *NOT_COMPLETE)

# 5. What is claimed, and what is there: tensors


def repeat_tensor(work: Path) -> None:
    """The same tensor in both shards."""
    first, second = (work / "sharded" / shard for shard in SHARDS)
    save_file(load_file(first) | dict([*load_file(second).items()][:1]), first)


row(
    "tensors: one that is listed and not there",
    mapped(lambda places: places.update(x=SHARDS[0])),
    BAD,
    f"sharded: {INDEX} names 1 tensors that their files do not hold (x)",
    "Download the model again",
    argv=SHARDED,
)
row(
    "tensors: one that is there and not listed",
    mapped(lambda places: places.pop("model.norm.weight")),
    BAD,
    f"sharded: {SHARDS[1]} holds model.norm.weight, which {INDEX} says is in no file",
    "Save the model again",
    argv=SHARDED,
)
row(
    "tensors: one in two files",
    repeat_tensor,
    BAD,
    f"sharded: {SHARDS[0]} holds",
    f"which {INDEX} says is in {SHARDS[1]}. Save the model again",
    argv=SHARDED,
)
for title, spoil in {
    "is missing": remove(f"sharded/{SHARDS[1]}"),
    "has another name": lambda work: (work / "sharded" / SHARDS[1]).rename("sharded/x.safetensors"),
}.items():
    row(
        f"tensors: a file {title}",
        spoil,
        BAD,
        f"sharded: 1 of 2 weight files are missing ({SHARDS[1]}). Download the model again",
        argv=SHARDED,
    )
row(
    "tensors: a file is cut",
    cut(f"sharded/{SHARDS[1]}", 2000),
    BAD,
    f"sharded/{SHARDS[1]}: the safetensors header is corrupt",
    "Download or save the file again",
    argv=SHARDED,
)
for title, text in {
    "empty": "",
    "a list": "[]",
    "without a map": "{}",
    "a map that is a list": '{"weight_map": []}',
    "deep": '{"weight_map":' * 100_000,
    "a tensor twice": '{"weight_map": {"a": "b", "a": "c"}}',
}.items():
    row(
        f"list of tensors: {title}",
        write(f"sharded/{INDEX}", text),
        BAD,
        f"sharded: {INDEX} is not a safetensors index",
        "Download it again",
        argv=SHARDED,
    )
row(
    "list of tensors: an empty map",
    write(f"sharded/{INDEX}", '{"weight_map": {}}'),
    BAD,
    f"sharded: {INDEX}",
    "Download it again",
    argv=SHARDED,
)
row(
    "list of tensors: 64 GB",
    sparse(f"sharded/{INDEX}", b"{", 2**36),
    UNSAFE,
    f"sharded: {INDEX} has 68719476736 bytes, expected at most 16000000. Download the model again",
    argv=SHARDED,
)
row(
    "tensors: wider than any disk",
    enlarge(intermediate_size=2**34),
    NO_SPACE,
    "/out: the result needs 1,649,267,769,344 bytes",
    "free. Make room or choose another place",
)
row(
    "tensors: more rows than any memory has room for",
    enlarge(vocab_size=2**34),
    MEMORY,
    "there is too little memory (",
    "Is the model sound?",
)
for title, change, texts in (
    ("NaN", lambda t: t["model.norm.weight"].fill_(float("nan")), ("a: model.norm.weight has",)),
    (
        "integers",
        lambda t: t.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)}),
        ("a: weights are quantized (1 packed tensor (model.norm.weight)",),
    ),
    (
        "of no model",
        lambda t: t.update({"os.system": torch.ones(1)}),
        ("a: not a LLaMA-family causal language model", "(os.system)"),
    ),
    (
        "one missing",
        lambda t: t.pop("model.norm.weight"),
        ("a: 1 tensor (model.norm.weight) missing", "Download or save the model again"),
    ),
):
    row(f"tensors: {title}", tensors(change), BAD, *texts)

# 5. What is claimed, and what is there: config.json

AS_CONFIG = ("a: ", "config.json")
AGAIN = "Download or save the model again"
for title, entries, texts in (
    ("another hidden_size", {"hidden_size": 64}, ("shapes are not those of config.json",)),
    ("another vocabulary", {"vocab_size": 10**9}, ("shapes are not those of config.json",)),
    ("more layers", {"num_hidden_layers": 2}, (AGAIN,)),
    ("2**62 layers", {"num_hidden_layers": 2**62}, ("there are only 12 tensors", AGAIN)),
    ("no heads", {"num_attention_heads": 0}, ("whole numbers above 0", AGAIN)),
    ("a negative size", {"vocab_size": -1}, ("whole numbers above 0", AGAIN)),
    ("a size of 4000 digits", {"intermediate_size": 10**4000}, ("shapes are not those of config",)),
    ("a size that is a text", {"hidden_size": "16"}, ("whole numbers above 0", AGAIN)),
    ("a size that is a list", {"hidden_size": [16]}, ("whole numbers above 0", AGAIN)),
    ("a size that is NaN", {"hidden_size": float("nan")}, ("whole numbers above 0", AGAIN)),
    ("infinite rotations", {"rope_theta": float("inf")}, ("must be a number above 0", AGAIN)),
    ("a list of rotations", {"rope_scaling": [1]}, ("expected an object or null", AGAIN)),
    ("quantized", {"quantization_config": {"quant_method": "x"}}, ("weights are quantized",)),
):
    row(f"config: {title}", put("a/config.json", **entries), BAD, "a: ", *texts)
for title, kind in {"code": "__import__('os').system('touch ../canary')", "object": {}}.items():
    row(
        f"config: a model_type that is {title}",
        put("a/config.json", model_type=kind),
        BAD,
        "a: model_type",
        "but base has 'llama'. Merge models of one architecture",
    )
INVALID = ("a: config.json is not valid JSON (", "Download it again")
for title, text in {
    "empty": b"",
    "binary": bytes(range(256)),
    "UTF-16": "{}".encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "a list": b"[]",
    "a key twice": b'{"model_type": "llama", "model_type": "qwen2"}',
    "deep": b'{"a":' * 10**6,
    "a number of many digits": b'{"a": ' + b"9" * 10**6 + b"}",
}.items():
    row(f"config: {title}", write("a/config.json", text), BAD, *INVALID)
row(
    "config: 64 GB",
    sparse("a/config.json", b"{}", 2**36),
    UNSAFE,
    "a: config.json has 68719476736 bytes, expected at most 16000000. Download the model again",
)
KEYS = ",".join(f'"{number}_config": {{}}' for number in range(50_000))
row(
    "config: 50,000 keys, one twice",
    write("a/config.json", f'{{{KEYS}, "49999_config": 1}}'),
    BAD,
    *INVALID,
)
row(
    "config: 50,000 configs in it",
    begin("base/config.json", KEYS),
    OK,
)
row(
    "config: 50,000 keys, and code",
    begin("base/config.json", f'{KEYS.replace("_config", "")}, "auto_map": {{}}'),
    OK,
    "base: config.json names code (auto_map)",
)
row(
    "config: 600 configs in one another",
    begin("base/config.json", '"a_config": {' * 600 + '"a": 1' + "}" * 600),
    BAD,
    "base: config.json is not valid JSON (it is nested too deeply). Download it again",
)
row(
    "config: NaN where it decides",
    put("base/config.json", rms_norm_eps=float("nan")),
    BAD,
    "base: rms_norm_eps",
)

# The small files

for name, text in {
    "tokenizer.json": "{",
    "tokenizer_config.json": "[]",
    "special_tokens_map.json": "[" * 10**6,
    "generation_config.json": '{"a": 1, "a": 2}',
    "chat_template.jinja": b"\xff",
}.items():
    row(
        f"{name}: not what it should be",
        write(f"base/{name}", text),
        BAD,
        f"base: {name}",
        "Download the model again",
    )
row(
    "tokenizer.json: without a model",
    write("base/tokenizer.json", "{}"),
    BAD,
    "base: tokenizer.json holds no model with a vocab. Download the model again",
)
row(
    "LICENSE: 64 GB",
    sparse("base/LICENSE", b"", 2**36),
    UNSAFE,
    "base: LICENSE has 68719476736 bytes, expected at most 16000000. Download the model again",
)
row(
    "tokenizer.json: an id of 2**62",
    both(with_tokenizer, edit("a/tokenizer.json", lambda c: c["model"]["vocab"].update(zz=2**62))),
    BAD,
    "a: tokenizer.json holds the token 'zz' with the id 4611686018427387904. Download the model",
)
row(
    "generation_config.json: 20,000 tokens without a row",
    put("base/generation_config.json", eos_token_id=[99] * 20_000),
    BAD,
    "base: eos_token_id 99 in generation_config.json lies beyond the vocabulary",
)


def role(name: str) -> Spoil:
    """A special token whose role is this, another in each model; the chat template is a's."""

    def spoil(work: Path) -> None:
        with_tokenizer(work)
        put("base/tokenizer_config.json", **{name: "<s>"})(work)
        put("a/tokenizer_config.json", **{name: "</s>"})(work)
        write("a/chat_template.jinja", "a" * 60)(work)

    return spoil


OTHER_TEMPLATE = (*TIES, "--chat-template", "a")
for name, title in {"(_token": "no pattern", "(aa|a)*x_token": "a pattern without end"}.items():
    row(
        f"tokenizer_config.json: a role that is {title}",
        role(name),
        OK,
        argv=OTHER_TEMPLATE,
    )

# Names that a terminal, or a file in UTF-8, does not take


def strange_file(name: bytes) -> Spoil:
    def spoil(work: Path) -> None:
        with open(b"base/" + name, "w"):
            pass

    return spoil


row(
    "name: acts on the terminal",
    strange_file(b"\x1b[2J\nerror: x"),
    OK,
)
for name in (b"\xff.py", b"LICENSE\xff"):
    row(
        f"name: {name!r} is not UTF-8",
        strange_file(name),
        OK,
    )
for name in ("config.json", "generation_config.json"):
    row(
        f"{name}: half a character",
        both(put(f"base/{name}", **{"\ud800": 1}), put(f"a/{name}", **{"\ud800": 2})),
        OK,
    )
row(
    "adapter_config.json: half a character",
    adapter_config(base_model_name_or_path="\ud800"),
    OK,
    argv=JOIN,
)

# 5. Adapters

for title, entries, texts in (
    ("no pattern", {"target_modules": "("}, ("target_modules: '(' is no regular expression",)),
    ("a long pattern", {"target_modules": "a" * 3000}, ("target_modules: ", "3000 characters")),
    ("rank 0", {"r": 0}, ("r must be a whole number of at least 1, got 0",)),
    ("rank 10**400", {"r": 10**400}, ("say rank 1000", "Save the adapter again")),
    ("a rank that is a text", {"r": "4"}, ("r must be a whole number of at least 1, got '4'",)),
    ("alpha NaN", {"lora_alpha": float("nan")}, ("lora_alpha must be a number, got nan",)),
    ("an unknown entry", {"zz": "[" * 1000}, ("zz '[[", "is not supported", "Fold the adapter")),
    ("another kind", {"peft_type": "os.system"}, ("peft_type 'os.system' in", "is not LORA. Fold")),
    ("a kind that is a list", {"peft_type": ["LORA"]}, ("peft_type ['LORA'] in", "is not LORA")),
    ("layers that are texts", {"layers_to_transform": ["1"]}, ("must be numbers of layers",)),
    ("tokens below 0", {"trainable_token_indices": [-1]}, ("must be token ids",)),
):
    spoil = adapter_config(**entries)
    row(f"adapter: {title}", spoil, BAD, "adapter: ", "adapter_config.json", *texts, argv=FOLD)
ENDLESS = {
    "repeats of choices": r"(\w\w|\w|\.)*!",
    "repeats of repeats": "([a-z._0-9]+)*!",
    "many dots": ".*" * 15 + "!",
    "counted dots": "(.*.){20}!",
    "references back": r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)\8!",
}
for title, pattern in ENDLESS.items():
    row(
        f"adapter: target_modules with {title}",
        adapter_config(target_modules=pattern),
        UNSAFE,
        "adapter: adapter_config.json: ",
        "Write them more simply",
        argv=FOLD,
    )
for key in ("exclude_modules", "rank_pattern", "alpha_pattern"):
    pattern = ENDLESS["many dots"]
    row(
        f"adapter: {key} without end",
        adapter_config(**{key: pattern if key == "exclude_modules" else {pattern: 4}}),
        UNSAFE,
        "adapter: adapter_config.json: ",
        "Write them more simply",
        argv=FOLD,
    )
row(
    "adapter: a pattern that could be without end, and is not here",
    adapter_config(rank_pattern={"(a|a)*$": 4}),
    OK,
    argv=FOLD,
)
row(
    "adapter: NaN",
    tensors(lambda t: next(iter(t.values())).fill_(float("nan")), f"adapter/{ADAPTER}"),
    BAD,
    "adapter: base_model.model.model.layers.0",
    "has NaN or infinite weights. The adapter is broken; use another copy",
    argv=FOLD,
)
row(
    "adapter: a tensor that leads out",
    tensors(lambda t: t.update({"../x.lora_A.weight": torch.ones(4, 4)}), f"adapter/{ADAPTER}"),
    BAD,
    "adapter: 1 tensors are no part of a LoRA adapter that is known here (../x.lora_A.weight)",
    "Save it with PEFT's save_pretrained",
    argv=FOLD,
)

# 7. Code

CODE = {"auto_map": {"AutoModel": "evil.Evil"}, "trust_remote_code": True}
CODE |= {"_attn_implementation": "evil/kernel", "_experts_implementation_internal": "evil"}
PROGRAM = "import os\nos.system('touch ../canary')\n"


def without_code(*names: str) -> Check:
    """Files of the result that name no code, of which it is said."""

    def check(work: Path, said: str) -> None:
        for name in names:
            text = (work / "out" / name).read_text()
            assert not [word for word in (*CODE, "evil") if word in text]
            assert f"{name} names code (auto_map" in said
            assert "is never run and not taken over" in said

    return check


row(
    "code: programs in the folder",
    both(*(write(f"base/{name}.py", PROGRAM) for name in ("evil", "setup", "json", "conftest"))),
    OK,
    check=left_behind("evil.py", "setup.py", "json.py", "conftest.py"),
)
for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
    row(
        f"code: named in {name}",
        both(put(f"base/{name}", **CODE), write("base/evil.py", PROGRAM)),
        OK,
        check=without_code(name),
    )
row(
    "code: named in a config inside a config",
    put("base/config.json", text_config={"vision_config": CODE}),
    OK,
    check=without_code("config.json"),
)
row(
    "code: spelt with escapes",
    begin("base/config.json", r'"\u0061uto_map": {"AutoModel": "evil.Evil"}'),
    OK,
    check=without_code("config.json"),
)


def no_code_in_adapter(work: Path, said: str) -> None:
    for file in (work / "out").glob("*.json"):
        assert "evil" not in file.read_text(), file


row(
    "code: an adapter that names a library",
    adapter_config(auto_mapping={"parent_library": "evil"}, megatron_core="evil"),
    OK,
    argv=JOIN,
    check=no_code_in_adapter,
)
for title, place, argv in (
    ("an adapter", "adapter", JOIN),
    ("a model that becomes one", "a", EXTRACT),
):
    row(
        f"code: named by the tokenizer of {title}",
        both(
            write(f"{place}/tokenizer_config.json", json.dumps(CODE)),
            lambda work, place=place: shutil.copy(work / "base/tokenizer.json", work / place),
        ),
        OK,
        argv=argv,
        check=no_code_in_adapter,
    )

# 8. Chat templates

JINJA = (
    "{{ cycler.__init__.__globals__.os.system('touch ../canary') }}\r\n"
    "{% for i in range(10**9) %}{% for j in range(10**9) %}{{ i }}{% endfor %}{% endfor %}"
    "{% include '/etc/passwd' %}{{ unknown_function() }}{% broken"
)


def same_file(name: str, model: str = "base") -> Check:
    """The result has a file of a model, byte for byte."""

    def check(work: Path, said: str) -> None:
        assert (work / "out" / name).read_bytes() == (work / model / name).read_bytes()

    return check


NO_FILE = remove("base/chat_template.jinja")
for name, spoil in {
    "chat_template.jinja": write("base/chat_template.jinja", JINJA),
    "tokenizer_config.json": both(NO_FILE, put("base/tokenizer_config.json", chat_template=JINJA)),
    "chat_template.json": both(
        NO_FILE, write("base/chat_template.json", json.dumps({"chat_template": JINJA}))
    ),
}.items():
    row(f"template: attacks in {name}", spoil, OK, check=same_file(name))
row(
    "template: attacks in that of another model",
    both(with_tokenizer, write("a/chat_template.jinja", JINJA)),
    OK,
    "chat template of a",
    argv=OTHER_TEMPLATE,
    check=same_file("chat_template.jinja", "a"),
)

# 9. Recipes

GOOD = "models: [{model: a, parameters: {weight: 1}}]\nmerge_method: ties\nbase_model: base\n"


def nested_aliases(first: str, form: str) -> str:
    """Nine times nine times nine ...: few bytes that come to 9**9 entries."""
    lines = [f"a: &a {first}"]
    for old, new in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{new}: &{new} {form.format(', '.join([f'*{old}'] * 9))}")
    return "\n".join(lines)


for title, text, problem in (
    ("a tag that runs", f"{GOOD}dtype: !!python/object/apply:os.system [x]", "r.yml:4: the tag"),
    ("a tag that names", f"{GOOD}name: !!python/name:os.system", "r.yml:4: the tag"),
    ("a tag of its own", f"{GOOD}dtype: !evil float16", "Recipes have no tags; leave it out"),
    ("aliases", nested_aliases("[1, 1]", "[{}]"), "more than 100,000 entries. Write them out"),
    ("merged keys", nested_aliases("{b: 1}", "{{<<: [{}]}}"), "more than 100,000 entries"),
    ("an alias in itself", f"{GOOD}x: &x [*x]", "r.yml:4: an alias lies within what it stands for"),
    ("a key twice", f"{GOOD}base_model: a", "r.yml:4: base_model is given twice. Keep one of them"),
    ("deep", "[" * 10**5, "more than 20 deep. No recipe needs that"),
    ("too long", "#" * 10**6 + "\n", "1,000,001 bytes; a recipe has at most 1,000,000"),
    ("binary", bytes(range(256)), "r.yml: not UTF-8 (byte 128). Save it as UTF-8"),
    ("an output", f"{GOOD}output_dir: ../outside/x", "r.yml:4: output_dir: unknown key"),
    ("a path for a name", f"{GOOD}name: ../../x", "r.yml:4: name: '../../x' is no name. Use"),
    ("code", f"{GOOD}trust_remote_code: true", "r.yml:4: trust_remote_code: unknown key"),
    (
        "an expression",
        GOOD.replace("weight: 1", "weight: __import__('os').system('touch ../canary')"),
        "r.yml:1: models[0].parameters.weight: weight must be a number, got",
    ),
    ("a variable", GOOD.replace("weight: 1", "weight: $HOME"), "weight must be a number, got"),
):
    row(f"recipe: {title}", write("r.yml", text), USAGE, "error: r.yml", problem, argv=RECIPE)
for model, problem in {
    '"a\\0b"': "'a\\x00b'... is no name of a model",
    "http://evil.example/a": "http://evil.example/a: no such folder",
    "/dev/zero": "/dev/zero: expected a folder with config.json and safetensors files, got a file",
    "../outside": "../outside: no config.json in this folder",
    '"\\e[2J"': "\\x1b[2J: no such folder",
}.items():
    spoil = write("r.yml", GOOD.replace("model: a", f"model: {model}"))
    row(f"recipe: the model {model}", spoil, BAD, f"error: r.yml:1: {problem}", argv=RECIPE)
row(
    "recipe: a model with too long a name",
    write("r.yml", GOOD.replace("model: a", f"model: {'a' * 3000}")),
    BAD,
    "error: r.yml:1: 'aaa",
    "is no name of a model (3000 characters). Give a folder or a Hub id",
    argv=RECIPE,
)
row(
    "recipe: too long a name",
    write("r.yml", f"{GOOD}name: {'9' * 100_000}x\n"),
    USAGE,
    "r.yml:4: name: ",
    argv=RECIPE,
)
row(
    "recipe: half a million entries",
    write("r.yml", f"[{'0,' * 490_000}]"),
    USAGE,
    "r.yml:1: ",
    argv=RECIPE,
)
row(
    "recipe: JSON with a key twice",
    write("r.json", "{" + ", ".join(f'"{n}": 0' for n in range(60_000)) + ', "59999": 0}'),
    USAGE,
    "r.json: the key '59999' is given twice. Keep one of them",
    argv=JSON_RECIPE,
)
row(
    "recipe: deep JSON",
    write("r.json", '{"a":' * 10**5),
    USAGE,
    "r.json: entries lie in one another more than 20 deep",
    argv=JSON_RECIPE,
)

# 11. Outputs


def save_as(name: str) -> tuple[str, ...]:
    return (*TIES[:5], name, "--quiet")


EXISTS = "the output exists already. Choose another name or remove it first"
for title, spoil, name, texts in (
    ("a folder with something in it", write("out/mine", ""), "out", (f"out: {EXISTS}",)),
    ("a file", write("out", "mine"), "out", (f"out: {EXISTS}",)),
    ("a pipe", pipe("out"), "out", (f"out: {EXISTS}",)),
    ("a device", nothing, "/dev/null", (f"/dev/null: {EXISTS}",)),
    ("a model", nothing, "a", (f"a: {EXISTS}",)),
    ("a link", link("out", "../outside"), "out", ("out: the output is a link or a mount point",)),
    ("a dead link", link("out", "nowhere"), "out", ("out: the output is a link",)),
    ("in a model", nothing, "a/out", ("a/out: the output lies inside the model 'a'. Choose",)),
    ("up and into a model", nothing, "b/../a/out", ("the output lies inside the model 'a'",)),
    ("by a link in a model", link("c", "a"), "c/out", ("the output lies inside the model 'a'",)),
):
    row(f"output: {title}", spoil, USAGE, *texts, argv=save_as(name))
for title, spoil, texts in (
    ("a link", link(".out.partial", "../outside"), ("is in the way", "Move it away")),
    ("a file", write(".out.partial", "mine"), ("is in the way", "Move it away")),
    ("a stranger's", write(".out.partial/mine", ""), ("holds 'mine'", "Move it away")),
):
    row(f"beginning of an output: {title}", spoil, USAGE, ".out.partial: ", *texts)
row("output: under a file", write("x", ""), IO, "x/", "Not a directory", argv=save_as("x/out"))
row("output: too long a name", nothing, USAGE, "4 bytes too long", argv=save_as("x" * 250))
BEGUN = write(".out.partial/plan.json", "{}")
row(
    "beginning of an output: a link in it",
    both(BEGUN, link(".out.partial/model", "../outside")),
    OK,
    check=lambda work, said: shutil.rmtree(work / "out"),
)
row(
    "beginning of an output: a pipe in it",
    both(BEGUN, pipe(".out.partial/blocks.jsonl")),
    OK,
)


# Running


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A base, two fine-tunes of it, one in shards, and an adapter."""
    place = tmp_path_factory.mktemp("models")
    base = make_llama(place / "base", seed=1, tokenizer=True, **SMALL)
    for seed, (name, shards) in enumerate({"a": 1, "b": 1, "sharded": 2}.items(), 2):
        make_llama(place / name, seed=seed, base=base, shards=shards, **SMALL)
    make_lora(place / "adapter", base)
    return place


@pytest.fixture
def work(models, tmp_path, monkeypatch):
    """Them in the current folder, something private beside it, and no network."""
    shutil.copytree(models, tmp_path / "work")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret.json").write_text('{"secret": 1}')
    monkeypatch.chdir(tmp_path / "work")

    def no_network(*_):
        raise ModelCompatibilityError("the Hub cannot be reached")

    monkeypatch.setattr("model_locate._download", no_network)
    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr("model_patterns.SECONDS", 0.3)
    limits = resource.getrlimit(FILES)
    yield tmp_path / "work"
    resource.setrlimit(FILES, limits)


def run(argv: tuple[str, ...], seconds: float = SECONDS) -> int:
    """The exit status of a command."""
    with at_most(seconds):
        try:
            return MAINS[argv[0]](argv[1:])
        except SystemExit as stop:
            return int(str(stop.code))


def tree(top: Path) -> dict[str, Any]:
    """Everything that lies in a folder, by its path; links are not followed."""
    found: dict[str, Any] = {}
    for place, folders, files in os.walk(top):
        for path in (os.path.join(place, name) for name in (*folders, *files)):
            state = os.lstat(path)
            content: Any = None
            if stat.S_ISLNK(state.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(state.st_mode) and state.st_size > LARGE:
                content = state.st_size
            elif stat.S_ISREG(state.st_mode):
                content = digest(path)
            found[os.path.relpath(path, top)] = (state.st_mode, content)
    return found


def digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except PermissionError:
        return "unreadable"


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    """What a command has said, which must be fit to be read."""
    said = "".join(capsys.readouterr())
    assert "Traceback" not in said
    assert len(said) < TALKATIVE
    assert all(line.isprintable() for line in said.split("\n"))
    return said


@pytest.mark.parametrize("fixture", FIXTURES)
def test_what_is_hostile_or_broken_harms_nothing(fixture, work, capsys):
    fixture.spoil(work)
    before = tree(work.parent)
    status = run(fixture.argv, SECONDS)
    said = printed(capsys)
    assert status == fixture.status, said
    for text in fixture.texts:
        assert text in said
    if status == OK:
        assert not (work.parent / "canary").exists()
        assert_no_secret(work / "out")
        fixture.check(work, said)
        shutil.rmtree(work / "out", ignore_errors=True)
        before = {path: seen for path, seen in before.items() if ".out.partial" not in path}
    elif fixture.argv != CHECK:
        assert said.startswith("error: "), said
    after = tree(work.parent)
    if status == IO and "goes on with it" in said:  # what is done so far is kept, and it is said
        after = {path: seen for path, seen in after.items() if ".out.partial" not in path}
    assert after == before


def assert_no_secret(out: Path) -> None:
    """What is private is in no file of a result, and no file leads out of it."""
    for path in out.rglob("*"):
        assert path.is_file()
        assert not path.is_symlink()
        assert b"secret" not in path.read_bytes()


def test_there_are_enough_fixtures():
    names = [fixture.id for fixture in FIXTURES]
    assert len(names) == len({*names}) >= 50
    assert len(CHANGES) >= 6


def test_the_canary_would_be_there(work):
    """If a pickle of these were loaded, or a program of these run."""
    for act in (lambda: pickle.loads(BOMB), lambda: exec(PROGRAM, {})):
        act()
        (work.parent / "canary").unlink()


# 10. Inputs that change while they are read


def rewrite(work: Path) -> None:
    """Other values in the same place: the size stays."""
    with open(work / f"a/{WEIGHTS}", "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"12345678")


def append(work: Path) -> None:
    with open(work / f"a/{WEIGHTS}", "ab") as file:
        file.write(b"1")


def replace_with(source: str, name: str) -> Spoil:
    """Another file takes a name, as a download does when it has ended."""

    def change(work: Path) -> None:
        shutil.copy(work / source, work / "new")
        os.rename(work / "new", work / name)

    return change


CHANGED = (f"a: {WEIGHTS} was changed while it was being read", "Leave it alone meanwhile")
SHORTER = ("ends early: the file changed while it was being read", "Leave it alone meanwhile")
CHANGES = [
    pytest.param(rewrite, BAD, CHANGED, id="rewritten in place"),
    pytest.param(append, BAD, CHANGED, id="longer"),
    pytest.param(cut(f"a/{WEIGHTS}", 3000), BAD, SHORTER, id="cut in the middle"),
    pytest.param(cut(f"a/{WEIGHTS}", 0), BAD, SHORTER, id="emptied"),
    pytest.param(replace_with(f"b/{WEIGHTS}", f"a/{WEIGHTS}"), OK, (), id="replaced"),
    pytest.param(remove(f"a/{WEIGHTS}"), OK, (), id="removed"),
    pytest.param(write("a/config.json", "{}"), OK, (), id="config rewritten"),
    pytest.param(
        link("base/tokenizer.json"),
        UNSAFE,
        ("base: tokenizer.json is a link out of the model's folder",),
        id="tokenizer replaced by a link out",
    ),
    pytest.param(
        pipe("base/tokenizer.json"),
        UNSAFE,
        ("base: tokenizer.json is no regular file",),
        id="tokenizer replaced by a pipe",
    ),
    pytest.param(
        remove("base/tokenizer.json"),
        IO,
        ("base/tokenizer.json: No such file or directory",),
        id="tokenizer removed",
    ),
    pytest.param(
        edit_text("base/tokenizer.json", lambda text: text.replace('"a"', '"zz"')),
        BAD,
        ("base: tokenizer.json was changed",),
        id="tokenizer rewritten",
    ),
]


@pytest.mark.parametrize(("change", "status", "texts"), CHANGES)
def test_inputs_that_change_while_they_are_read(change, status, texts, work, capsys, monkeypatch):
    """The first rows are read of the old file; what is merged of it is right, or nothing is."""
    assert run(save_as("undisturbed")) == OK
    undisturbed = tensor_hashes(work / "undisturbed")
    shutil.rmtree(work / "undisturbed")
    capsys.readouterr()
    read, changed = model_utils.read_into, []

    def read_into(*arguments: Any) -> bool:
        if not changed:
            changed.append(True)
            change(work)
        return read(*arguments)

    monkeypatch.setattr(model_utils, "read_into", read_into)
    found = run((*TIES, "--threads", "1"))
    said = printed(capsys)
    assert found == status, said
    for text in texts:
        assert text in said
    if status == OK:
        assert tensor_hashes(work / "out") == undisturbed
        shutil.rmtree(work / "out")
    begun = {".out.partial"} if status == IO else set()  # with which a later run can go on
    assert {*os.listdir(work)} == {"a", "b", "base", "sharded", "adapter", *begun}
    assert not (work.parent / "canary").exists()


def test_a_disk_that_fails_while_it_is_read(work, capsys, monkeypatch):
    def preadv(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(model_files.os, "preadv", preadv)
    before = tree(work.parent)
    assert run(TIES) == IO
    assert f"/{WEIGHTS}: Input/output error" in printed(capsys)
    assert tree(work.parent) == before
