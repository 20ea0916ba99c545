"""The models that there are, by id: folders under the configured roots, the tiny LLaMAs, the Hub's.

`scan` opens what may come from anywhere, so it runs in the planner's process; the server keeps what
it found. Merges find a model of this machine by its id: a link of that name, in the folder in which
they run. So no text of theirs holds a path.
"""

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from model_checks import HEAD, is_tied
from model_errors import ModelCompatibilityError
from model_files import has_file, read_text
from model_locate import ADAPTER_CONFIG, CONFIG
from model_text import printable
from model_utils import format_bytes, open_model_folder
from service import hub
from service.log import log
from service.requests import Names, id_of

TINY = "examples/tiny_llamas"
DEPTH = 5
MOST_FOLDERS = 20_000
MOST_MODELS = 1000
READ_BY_MERGES = (".safetensors", ".json", ".model", ".jinja")
SERVICE = "jobs.sqlite3"
"""In a folder of a merge service: what it has merged is its own, and goes when its time is over."""


class HubModel(NamedTuple):
    """A model of the Hub that can be offered without asking the Hub.

    Attributes:
        id, name, hub_id: what it is called here, by people, and on the Hub.
        size, architecture: parameters as "7B", and the kind of model.
        nbytes: of its weights.
    """

    id: str
    name: str
    hub_id: str
    size: str
    architecture: str
    nbytes: int


HUB_MODELS = (
    HubModel(
        "mistral-7b-instruct", "Mistral 7B Instruct v0.1", "mistralai/Mistral-7B-Instruct-v0.1",
        "7B", "mistral", 14_483_464_192,
    ),
    HubModel(
        "zephyr-7b-beta", "Zephyr 7B Beta", "HuggingFaceH4/zephyr-7b-beta",
        "7B", "mistral", 14_483_464_192,
    ),
    HubModel(
        "code-llama-7b", "Code Llama 7B", "codellama/CodeLlama-7b-hf",
        "7B", "llama", 13_477_093_376,
    ),
    HubModel(
        "llama2-7b-chat", "Llama 2 7B Chat", "meta-llama/Llama-2-7b-chat-hf",
        "7B", "llama", 13_476_831_232,
    ),
    HubModel(
        "openchat-7b", "OpenChat 3.5 7B", "openchat/openchat_3.5",
        "7B", "mistral", 14_483_496_960,
    ),
)  # fmt: skip
"""Sizes are those of the tensors' shapes in 16 bits; the plan says them exactly."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model of the registry.

    Attributes:
        id: what clients call it.
        name: what people call it.
        kind: a model, or a LoRA adapter.
        source: its folder, or its id on the Hub; never told to a client.
        hub_id: on the Hub; None for a folder.
        size, architecture: parameters as "7B", and the kind of model.
        nbytes: of its weights.
        base: of an adapter: what its files call its base; then that model's id.
        problem: why it cannot be merged; empty if it can.
    """

    id: str
    name: str
    kind: Literal["model", "adapter"]
    source: str
    hub_id: str | None = None
    size: str = ""
    architecture: str = ""
    nbytes: int = 0
    base: str | None = None
    problem: str = ""

    def view(self) -> dict[str, Any]:
        """As clients see it."""
        return {
            "id": self.id,
            "name": self.name,
            "kind": self.kind,
            "size": self.size,
            "architecture": self.architecture,
            "download_size": _decimal(self.nbytes),
            "bytes": self.nbytes,
            "hub_id": self.hub_id,
            "base_model": self.base,
            "available": not self.problem,
            "note": self.problem,
        }


class Registry:
    """What a scan has found, and links by which merges find the models.

    Args:
        links: the folder for the links.
    """

    def __init__(self, links: Path) -> None:
        self._links = links
        self.entries: dict[str, Entry] = {}

    def update(self, found: Iterable[Mapping[str, Any]]) -> None:
        """Take over what `scan` has found, and link to it."""
        entries = {each["id"]: Entry(**each) for each in found}
        self._links.mkdir(parents=True, exist_ok=True)
        for key, entry in entries.items():
            if entry.hub_id is None:
                _link(self._links / key, entry.source)
        self.entries = entries


def fingerprint(folder: Path) -> str:
    """What differs where a model's files are others: their names, sizes and times.

    Of what a merge reads, so that a note beside a model may be written at any time.
    """
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in READ_BY_MERGES:
            status = path.stat()
            found.update(os.fsencode(f"{path.name}/{status.st_size}/{status.st_mtime_ns}/"))
    return found.hexdigest()


def names_of(entries: Mapping[str, Entry]) -> Names:
    """What models are called, for recipes."""
    found = entries.values()
    return Names(
        references={entry.id: entry.hub_id or entry.id for entry in found},
        bases={entry.id: entry.base for entry in found if entry.kind == "adapter"},
        unavailable={entry.id: entry.problem for entry in found if entry.problem},
    )


def _link(link: Path, target: str) -> None:
    """A link of a model's name; one that leads elsewhere is replaced at once, never missing."""
    with suppress(OSError):
        if os.readlink(link) == target:
            return
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    os.replace(new, link)


def tiny_models() -> Path | None:
    """The folder of the tiny LLaMAs: beside the modules, or where they were installed."""
    checkout = Path(__file__).resolve().parent.parent / TINY
    installed = Path(sys.prefix) / "share/llama-merge/tiny_llamas"
    return next((path for path in (checkout, installed) if path.is_dir()), None)


# In the planner's process


def scan(
    roots: Sequence[str], tiny: str | None, hub_ids: Sequence[str], downloads: bool
) -> list[dict[str, Any]]:
    """All models that there are, as the fields of an `Entry`.

    Args:
        roots: folders with models in them, at most five levels below.
        tiny: the folder of the tiny LLaMAs, if they are offered.
        hub_ids: models of the Hub, beside `HUB_MODELS`.
        downloads: what the cache lacks can be downloaded.
    """
    known = {model.hub_id for model in HUB_MODELS}
    others = (
        HubModel(re.sub(r"[^\w.-]", "-", each), each.split("/")[-1], each, "", "", 0)
        for each in hub_ids
        if each not in known
    )
    found: list[Entry] = []
    for root in [*roots, tiny]:  # the plain ids are for the user's own
        if root is not None:
            found += _below(Path(root))
    entries: dict[str, Entry] = {}
    for entry in [*found, *(_of_hub(model, downloads) for model in (*HUB_MODELS, *others))]:
        key = entry.id if entry.id not in entries else f"{entry.id}-{_digest(entry.source)}"
        entries[key] = replace(entry, id=key)
    return [asdict(_with_base(entry, entries)) for entry in entries.values()]


def _below(root: Path) -> Iterator[Entry]:
    """The models in a folder, by their paths; a folder that cannot be read has none."""
    paths = sorted(_model_folders(root), key=lambda path: (not hub.is_main(path), path))
    if len(paths) > MOST_MODELS:
        log(f"{root}: {len(paths)} models, of which the first {MOST_MODELS:,} are offered")
    for path in paths[:MOST_MODELS]:
        relative = str(path.relative_to(root)) if path != root else path.name
        yield _entry(path, relative)


def _model_folders(root: Path) -> Iterator[Path]:
    for count, (folder, names, files) in enumerate(os.walk(root)):
        if count == MOST_FOLDERS:
            log(f"{root}: has more than {MOST_FOLDERS:,} folders, and the others were passed over")
            return
        path = Path(folder)
        if SERVICE in files:
            names.clear()
        elif CONFIG in files or ADAPTER_CONFIG in files:
            yield path
            names.clear()
        elif len(path.relative_to(root).parts) >= DEPTH:
            names.clear()
        else:
            names[:] = [name for name in names if not name.startswith(".")]


def _entry(path: Path, relative: str) -> Entry:
    name = shown(_from_cache(path) or relative)
    key = id_of(name) or f"model-{_digest(str(path))}"
    entry = Entry(id=key[:100], name=name, kind="model", source=str(path))
    try:
        if has_file(path, ADAPTER_CONFIG):
            return _adapter(path, entry)
        with open_model_folder(path, weights=False) as model:
            counted = {
                name: info for name, info in model.tensors.items()
                if not (name == HEAD and is_tied(model))
            }  # fmt: skip
            count = sum(math.prod(info.shape) for info in counted.values())
            return replace(
                entry,
                size=_parameters(count),
                architecture=shown(str(model.config.get("model_type", ""))),
                nbytes=sum(info.nbytes for info in model.tensors.values()),
            )
    except (ModelCompatibilityError, OSError, ValueError, RecursionError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        for written in (str(path), printable(str(path))):
            text = text.replace(written, "its folder").removeprefix("its folder: ")
        return replace(entry, problem=shown(text.split("\n")[0] or type(error).__name__, 1000))


def _adapter(path: Path, entry: Entry) -> Entry:
    config = json.loads(read_text(path, ADAPTER_CONFIG, entry.name))
    if not isinstance(config, dict):
        raise ValueError(f"{ADAPTER_CONFIG} is no JSON object")
    rank = config.get("r")
    weights = path / "adapter_model.safetensors"
    base = config.get("base_model_name_or_path")
    problem = "" if weights.is_file() else "has no adapter_model.safetensors"
    return replace(
        entry,
        kind="adapter",
        size=f"rank {rank if isinstance(rank, int) and 0 < rank < 10**6 else '?'}",
        architecture=shown(str(config.get("peft_type", "LORA")).lower()),
        nbytes=weights.stat().st_size if not problem else 0,
        base=base if isinstance(base, str) else None,
        problem=problem,
    )


def _with_base(entry: Entry, entries: Mapping[str, Entry]) -> Entry:
    """An adapter with the id of its base, if that is among the models, and there is but one."""
    if entry.kind != "adapter" or entry.base is None:
        return replace(entry, base=None)
    models = [each for each in entries.values() if each.kind == "model"]
    whole = [each.id for each in models if entry.base in (each.hub_id, each.source)]
    whole = whole or [each.id for each in models if each.name == entry.base]  # of a cache
    name = Path(entry.base).name
    last = [each.id for each in models if name and Path(each.source).name == name]
    beside = [key for key in last if _folder_of(entries[key]) == _folder_of(entry)]
    for found in (whole, beside, last):
        if len(found) == 1:
            return replace(entry, base=found[0])
    return replace(entry, base=None)


def _folder_of(entry: Entry) -> Path:
    return Path(entry.source).parent


def _of_hub(model: HubModel, downloads: bool) -> Entry:
    cached = hub.is_cached(model.hub_id)
    problem = "" if cached or downloads else (
        "is not on this machine, and downloads are switched off (hub_downloads)"
    )  # fmt: skip
    return Entry(
        id=model.id,
        name=model.name,
        kind="model",
        source=model.hub_id,
        hub_id=model.hub_id,
        size=model.size,
        architecture=model.architecture,
        nbytes=model.nbytes,
        problem=problem,
    )


def shown(text: str, most: int = 200) -> str:
    """A text of a stranger's folder, as it can be sent and shown: no lone surrogates, no lines.

    >>> shown("a\\udcff\\n"), shown("abc", 2)
    ('a\\\\udcff\\\\n', 'ab')
    """
    return printable(text)[:most]


def _from_cache(path: Path) -> str:
    """The Hub's name of a model that lies in a cache's folder; empty for any other."""
    part = next((part for part in path.parts if part.startswith("models--")), "")
    return part.removeprefix("models--").replace("--", "/")


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:6]


def _parameters(count: int) -> str:
    """A number of parameters, as models are named by it.

    >>> [_parameters(n) for n in (1_100_048_384, 6_738_415_616, 226_112)]
    ['1.1B', '6.7B', '226K']
    """
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            number = count / unit
            return f"{number:.1f}{letter}" if number < 10 else f"{number:.0f}{letter}"
    return str(count)


def _decimal(nbytes: int) -> str:
    """A size as the listing has it: 13.5GB."""
    return format_bytes(nbytes).replace(" ", "") if nbytes else ""
