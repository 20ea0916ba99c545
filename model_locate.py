"""From what a user calls a model, or a LoRA adapter, to its folder.

Either is a folder, a folder somewhere above one (Kaggle mounts models a few levels deep), or an id
on the Hugging Face Hub. `BASE+ADAPTER` is a model with an adapter on top.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from model_errors import AdapterGivenError, ModelCompatibilityError
from model_files import has_file

if TYPE_CHECKING:
    from model_safetensors import TensorInfo  # loads torch, which finding a folder does not need

HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w.-][\w./-]*))?")
"""org/name, or org/name@revision: a branch, a tag or a commit."""

HUB_WEIGHTS = "*.safetensors"
HUB_FILES = (HUB_WEIGHTS, "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")
HUB_NEEDED = ("config.json", HUB_WEIGHTS, "*.safetensors.index.json")
HUB_OTHERS = ("*/*", "consolidated*")
"""Subfolders, and the weights once more in another format."""

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"

MAX_NAME = 1024
"""Characters of a path or Hub id."""

MAX_DEPTH = 5
MAX_LISTED = 10

_STRENGTH = re.compile(r"(.+):(-?(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?)")
"""An adapter and how much of its change is taken."""


class AdapterName(NamedTuple):
    """A LoRA adapter as a user names it, ADAPTER or ADAPTER:STRENGTH.

    Attributes:
        name: a folder or Hub id.
        strength: its change is multiplied by this.
    """

    name: str
    strength: float = 1.0


class ModelName(NamedTuple):
    """A model as a user names it, MODEL or MODEL+ADAPTER+...

    Attributes:
        model: a folder or Hub id.
        adapters: LoRA adapters on top of it.
    """

    model: str
    adapters: tuple[AdapterName, ...] = ()


def split_adapters(name: str) -> ModelName:
    """The parts of a model's name.

    A folder may have a + in its name: what exists is taken for one name, the longest first.

    >>> split_adapters("org/base@main+org/chat+code:-0.5")
    ModelName(model='org/base@main', adapters=(AdapterName(name='org/chat', strength=1.0), \
AdapterName(name='code', strength=-0.5)))
    """
    model, *others = _names(name)
    return ModelName(model, tuple(map(adapter_name, others)))


def _names(name: str) -> list[str]:
    """What stands between the + of a name."""
    parts = name.split("+")
    for count in range(len(parts), 1, -1):
        first = "+".join(parts[:count])
        if _exists(first) or _exists(adapter_name(first).name):
            break
    else:
        count = 1
    rest = _names("+".join(parts[count:])) if count < len(parts) else []
    return ["+".join(parts[:count]), *rest]


def _exists(name: str) -> bool:
    """Whether there is a file or folder; False for what cannot be the name of one."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


def adapter_name(text: str) -> AdapterName:
    """ADAPTER or ADAPTER:STRENGTH; what exists is taken for a name."""
    found = None if _exists(text) else _STRENGTH.fullmatch(text)
    return AdapterName(text) if found is None else AdapterName(found[1], float(found[2]))


def join_adapters(model: str, adapters: Sequence[AdapterName]) -> str:
    """The name of a model with adapters on top; what `split_adapters` takes apart.

    >>> join_adapters("base", [AdapterName("chat"), AdapterName("code", 0.5)])
    'base+chat+code:0.5'
    """
    # A + in a number would be taken for the beginning of another adapter.
    strengths = ("" if by == 1.0 else f":{by!r}".replace("e+", "e") for _, by in adapters)
    named = (f"{each.name}{by}" for each, by in zip(adapters, strengths, strict=True))
    return "+".join([model, *named])


def last_part(name: str) -> str:
    """The last part of a model's name, without a revision; lower case.

    >>> last_part("org/Llama-1B@main"), last_part("/models/llama-1b/")
    ('llama-1b', 'llama-1b')
    """
    return name.rstrip("/").rpartition("/")[2].partition("@")[0].lower()


def find_model_folder(
    model: str | os.PathLike[str], *, weights: bool = True, config: str = CONFIG
) -> Path:
    """The folder of a model, or of a LoRA adapter, that a user named.

    Args:
        model: a folder with config.json; a folder with exactly one such folder at most five
            levels below it; or a Hub id such as "org/name" or "org/name@revision", taken from the
            local cache or downloaded into it.
        weights: download the weights of a Hub model too, not only its small files.
        config: what makes a folder one: `CONFIG`, or `ADAPTER_CONFIG` for an adapter.

    Raises:
        ModelCompatibilityError: there is none, there are several (they are listed), or the Hub
            cannot be reached.
    """
    path = Path(model)
    if not str(model):
        raise ModelCompatibilityError("a model's name is empty. Give a folder or a Hub id")
    if len(str(model)) > MAX_NAME or "\0" in str(model):
        raise ModelCompatibilityError(
            f"{str(model)[:60]!r}... is no name of a model ({len(str(model))} characters). Give a "
            "folder or a Hub id"
        )
    if path.is_dir():
        return _folder_below(path, config)
    if path.exists():
        raise ModelCompatibilityError(
            f"{model}: expected a folder with {config} and safetensors files, got a file"
        )
    if HUB_ID.fullmatch(str(model)):
        try:
            return _with_config(str(model), _download(str(model), weights), config)
        except AdapterGivenError:
            raise
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


def _with_config(model_id: str, snapshot: Path, config: str) -> Path:
    """The snapshot of a Hub model, which must be what is wanted."""
    _refuse_other(model_id, snapshot, config)
    if not has_file(snapshot, config):
        raise ModelCompatibilityError(
            f"{model_id}: this Hub model has no {config}, so it is no "
            + ("LoRA adapter of PEFT" if config == ADAPTER_CONFIG else "model of transformers")
            + " (GGUF files alone cannot be merged). Give the original"
        )
    return snapshot


def is_adapter(path: Path) -> bool:
    """Whether a folder holds a LoRA adapter."""
    return has_file(path, ADAPTER_CONFIG)


def _refuse_other(label: str, path: Path, config: str) -> None:
    """An adapter where a model is wanted, or the other way round."""
    if config == CONFIG and is_adapter(path):
        raise AdapterGivenError(
            f"{label}: is a LoRA adapter, not a model (it has {ADAPTER_CONFIG}). Name its base "
            f"with it: BASE+{label}"
        )
    if config == ADAPTER_CONFIG and has_file(path, CONFIG) and not is_adapter(path):
        raise ModelCompatibilityError(
            f"{label}: is a model, not a LoRA adapter (it has no {ADAPTER_CONFIG}). Give the base "
            "first, then adapters; other models are merged by the other commands"
        )


def _folder_below(path: Path, config: str) -> Path:
    _refuse_other(str(path), path, config)
    if has_file(path, config):
        return path
    found = sorted(_walk(path, MAX_DEPTH, config))
    if len(found) == 1:
        _refuse_other(str(found[0]), found[0], config)
        return found[0]
    if found:
        listed = "".join(f"\n    {folder}" for folder in found[:MAX_LISTED])
        more = f"\n    and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else ""
        raise ModelCompatibilityError(
            f"{path}: has no {config} itself and {len(found)} folders with one below it. "
            f"Name one of them:{listed}{more}"
        )
    if config == CONFIG and (adapters := [*_walk(path, MAX_DEPTH, ADAPTER_CONFIG)]):
        raise AdapterGivenError(
            f"{path}: holds no model but {len(adapters)} LoRA adapter"
            f"{'s' if len(adapters) > 1 else ''} ({', '.join(map(str, adapters[:MAX_LISTED]))}). "
            "Name the base with one: BASE+ADAPTER"
        )
    raise ModelCompatibilityError(
        f"{path}: no {config} in this folder or up to {MAX_DEPTH} levels below it. "
        "Expected a folder as saved by save_pretrained"
    )


def _walk(path: Path, depth: int, config: str) -> Iterator[Path]:
    """Folders with such a file below `path`, none in another; hidden ones and links left out."""
    for child in sorted(path.iterdir()):
        if child.name.startswith(".") or child.is_symlink() or not child.is_dir():
            continue
        if has_file(child, config):
            yield child
        elif depth > 1:
            yield from _walk(child, depth - 1, config)


def split_revision(name: str) -> tuple[str, str | None]:
    """A Hub id and the revision it asks for, if any.

    >>> split_revision("org/name@main"), split_revision("org/name")
    (('org/name', 'main'), ('org/name', None))
    """
    found = HUB_ID.fullmatch(name)
    return (name, None) if found is None else (found[1], found[2])


def files_left_on_hub(model: str | os.PathLike[str], folder: Path) -> dict[str, int]:
    """Sizes of a Hub model's files that its snapshot does not have, by name.

    Args:
        model: what the user called the model.
        folder: what `find_model_folder` found; its name is the revision.

    Returns:
        Nothing for a local folder, or if the Hub cannot be asked and the weights are all there.
        A size is 0 where the Hub does not say it, as some mirrors do not.

    Raises:
        ModelCompatibilityError: the Hub cannot be asked and weights are missing.
    """
    if Path(model).is_dir():
        return {}
    with _hub_errors(str(model)):
        return {
            file: size
            for file, size in _list_files(str(model), folder.name)
            if not any(fnmatch(file, pattern) for pattern in HUB_OTHERS)
            and not (folder / file).is_file()
        }


def read_hub_header(model_id: str, revision: str, file: str) -> "dict[str, TensorInfo]":
    """Dtype and shape of every tensor of a weight file on the Hub, from its first bytes.

    Checks that each tensor fills its bytes; `model_safetensors.read_header` has stricter rules,
    for when the file is there.
    """
    from huggingface_hub import HfApi

    with _hub_errors(model_id):
        name, _ = split_revision(model_id)
        header = HfApi().parse_safetensors_file_metadata(name, file, revision=revision)
        return {name: _tensor_info(name, tensor) for name, tensor in header.tensors.items()}


def _tensor_info(name: str, tensor: Any) -> "TensorInfo":
    """Our description of a tensor from huggingface_hub's, which may hold any JSON."""
    from huggingface_hub.errors import SafetensorsParsingError

    from model_safetensors import TensorInfo

    with suppress(KeyError, TypeError, ValueError):
        info = TensorInfo(tensor.dtype, tuple(tensor.shape))
        begin, end = tensor.data_offsets
        if info.nbytes == end - begin:
            return info
    raise SafetensorsParsingError(
        f"{name!r} with {tensor.dtype} {tensor.shape} does not fill its bytes {tensor.data_offsets}"
    )


def _list_files(model_id: str, revision: str) -> list[tuple[str, int]]:
    """Names and sizes of a Hub model's files; nothing if it cannot be asked but need not be."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:  # (list_repo_tree tries again and again where there is no network)
        name, _ = split_revision(model_id)
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    except Exception as error:
        with suppress(LocalEntryNotFoundError):
            _cached(model_id)
            return []
        if isinstance(error, RepositoryNotFoundError):
            raise
        raise LocalEntryNotFoundError(f"the files of {model_id} cannot be listed") from error
    return [(file.rfilename, file.size or 0) for file in info.siblings]


def _download(model_id: str, weights: bool) -> Path:
    """The snapshot of a Hub model in the local cache, completed from the Hub where possible."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    ignored = HUB_OTHERS if weights else (*HUB_OTHERS, HUB_WEIGHTS)
    name, revision = split_revision(model_id)
    with _hub_errors(model_id):
        try:
            return Path(
                snapshot_download(
                    name,
                    revision=revision,
                    allow_patterns=list(HUB_FILES),
                    ignore_patterns=list(ignored),
                )
            )
        except LocalEntryNotFoundError:
            return _cached(model_id)


def _cached(model_id: str) -> Path:
    """The cached snapshot if it has at least what a merge needs, whoever downloaded it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, revision = split_revision(model_id)
    folder = Path(
        snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(HUB_NEEDED),
            ignore_patterns=list(HUB_OTHERS),
            local_files_only=True,
        )
    )
    if not any(folder.glob(HUB_WEIGHTS)):  # older versions return whatever there is
        raise LocalEntryNotFoundError(f"{folder} has no {HUB_WEIGHTS}")
    return folder


@contextmanager
def _hub_errors(model_id: str) -> Iterator[None]:
    """Says what goes wrong with the Hub and its cache in our words."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        SafetensorsParsingError,
    )

    try:
        yield
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
    except RevisionNotFoundError as error:
        raise ModelCompatibilityError(
            f"{model_id}: this Hub model has no such revision. Give a branch, tag or commit it has"
        ) from error
    except HFValidationError as error:
        raise ModelCompatibilityError(
            f"{model_id}: no such folder, and not a name that a Hub model can have. Check the path"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelCompatibilityError(
            f"{model_id}: no such folder, not in the Hub cache, and the Hub cannot be reached "
            f"({type(error).__name__}). Go online once to download it, or give a local folder"
        ) from error
    except SafetensorsParsingError as error:
        raise ModelCompatibilityError(
            f"{model_id}: a safetensors header on the Hub is corrupt: {error}. "
            "Use another model, or report it on this one's page"
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the network
        # Which network errors there are depends on the version of huggingface_hub.
        raise ModelCompatibilityError(
            f"{model_id}: the download from the Hub broke off ({type(error).__name__}: {error}). "
            "Run it again; what has arrived is kept"
        ) from error
