"""From what a user calls a model to a folder with a config.json.

A model is a folder, a folder somewhere above one (Kaggle mounts models a few levels deep), or
the id of a model on the Hugging Face Hub.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from model_errors import ModelCompatibilityError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")
HUB_NEEDED = ("config.json", "*.safetensors", "*.safetensors.index.json")
HUB_OTHERS = ("*/*", "consolidated*")
"""Subfolders, and the weights once more in another format."""

MAX_DEPTH = 5
MAX_LISTED = 10


def find_model_folder(model: str | os.PathLike[str]) -> Path:
    """The folder of a model that a user named.

    Args:
        model: a folder with config.json; a folder with exactly one such folder at most five
            levels below it; or a Hub id such as "org/name", taken from the local cache or
            downloaded into it.

    Raises:
        ModelCompatibilityError: there is none, there are several (they are listed), or the Hub
            cannot be reached.
    """
    path = Path(model)
    if not str(model):
        raise ModelCompatibilityError("a model's name is empty. Give a folder or a Hub id")
    if path.is_dir():
        return _folder_below(path)
    if path.exists():
        raise ModelCompatibilityError(
            f"{model}: expected a model folder with config.json and safetensors files, got a file"
        )
    if HUB_ID.fullmatch(str(model)):
        try:
            return _download(str(model))
        except ModelCompatibilityError as error:
            raise ModelCompatibilityError(f"{error}{_neighbours(path)}") from error
    raise ModelCompatibilityError(
        f"{model}: no such folder, and not the id of a Hub model (org/name). Check the path"
        f"{_neighbours(path)}"
    )


def _neighbours(path: Path) -> str:
    """What stands where a folder was looked for; a name may be misspelt."""
    if not path.parent.name or not path.parent.is_dir():
        return ""
    names = sorted(child.name for child in path.parent.iterdir())
    return f"; the folder {path.parent} holds {', '.join(names[:MAX_LISTED]) or 'nothing'}"


def _folder_below(path: Path) -> Path:
    if (path / "adapter_config.json").is_file():
        raise ModelCompatibilityError(
            f"{path}: is a LoRA adapter, not a model (it has adapter_config.json). "
            "Fold it into its base first (PEFT: merge_and_unload, then save_pretrained)"
        )
    if (path / "config.json").is_file():
        return path
    found = sorted(_walk(path, MAX_DEPTH))
    if len(found) == 1:
        return found[0]
    if found:
        listed = "".join(f"\n    {folder}" for folder in found[:MAX_LISTED])
        more = f"\n    and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else ""
        raise ModelCompatibilityError(
            f"{path}: has no config.json itself and {len(found)} model folders below it. "
            f"Name one of them:{listed}{more}"
        )
    raise ModelCompatibilityError(
        f"{path}: no config.json in this folder or up to {MAX_DEPTH} levels below it. "
        "Expected a model folder as saved by save_pretrained"
    )


def _walk(path: Path, depth: int) -> Iterator[Path]:
    """Folders with a config.json below `path`, none inside another, hidden ones left out."""
    for child in sorted(path.iterdir()):
        if child.name.startswith(".") or not child.is_dir():
            continue
        if (child / "config.json").is_file():
            yield child
        elif depth > 1:
            yield from _walk(child, depth - 1)


def _download(model_id: str) -> Path:
    """The snapshot of a Hub model in the local cache, completed from the Hub where possible."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                model_id, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_OTHERS)
            )
        )
    except GatedRepoError as error:
        raise ModelCompatibilityError(
            f"{model_id}: access to this Hub model must be requested on its page. "
            "Request it, then log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelCompatibilityError(
            f"{model_id}: no such folder, and no such model on the Hub (or it is private). "
            "Check the name; for a private model set HF_TOKEN"
        ) from error
    except HFValidationError as error:
        raise ModelCompatibilityError(
            f"{model_id}: no such folder, and not a name that a Hub model can have. Check the path"
        ) from error
    except LocalEntryNotFoundError as error:
        return _cached(model_id, error)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the network
        # Which network errors there are depends on the version of huggingface_hub.
        raise ModelCompatibilityError(
            f"{model_id}: the download from the Hub broke off ({type(error).__name__}: {error}). "
            "Run it again; what has arrived is kept"
        ) from error


def _cached(model_id: str, reason: Exception) -> Path:
    """The cached snapshot if it has at least what a merge needs, whoever downloaded it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model_id,
                allow_patterns=list(HUB_NEEDED),
                ignore_patterns=list(HUB_OTHERS),
                local_files_only=True,
            )
        )
    except LocalEntryNotFoundError:
        raise ModelCompatibilityError(
            f"{model_id}: no such folder, not in the Hub cache, and the Hub cannot be reached "
            f"({type(reason).__name__}). Go online once to download it, or give a local folder"
        ) from reason
