"""The Hub's models as they lie in this machine's cache (HF_HOME): which are there, and of when."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from model_locate import CONFIG


def cache_folder() -> Path:
    """Where the Hub's library keeps what it downloads; it may not be there yet."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def folder_of(hub_id: str) -> Path:
    """Where all versions of a model are; it may not be there."""
    return cache_folder() / f"models--{hub_id.replace('/', '--')}"


def is_cached(hub_id: str) -> bool:
    """Whether the weights of a model are there."""
    snapshots = folder_of(hub_id) / "snapshots"
    return any(snapshots.glob("*/*.safetensors")) and any(snapshots.glob(f"*/{CONFIG}"))


def pinned(hub_id: str) -> str:
    """A model at the commit at which it was last looked at, as `org/name@commit`.

    So what is merged is what was planned with, whatever is uploaded meanwhile.
    """
    commit = _main_of(folder_of(hub_id))
    return f"{hub_id}@{commit}" if commit else hub_id


def is_main(snapshot: Path) -> bool:
    """Whether a folder of the cache is the version that a model's name stands for."""
    return _main_of(snapshot.parent.parent) == snapshot.name


def bytes_there(hub_ids: Iterable[str]) -> int:
    """What the files of some models take by now, those included that are still coming."""
    found = 0
    for hub_id in hub_ids:
        for path in folder_of(hub_id).glob("blobs/*"):
            with suppress(OSError):
                found += path.stat().st_size
    return found


def _main_of(folder: Path) -> str:
    try:
        return (folder / "refs/main").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
