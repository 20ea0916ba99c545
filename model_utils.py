"""Model folders: open one and read rows of its tensors, write one as a stream, load one.

The only `*_utils` module that touches disk: it belongs to the `model_*` layer and knows no math.
Weights are read with `pread` into buffers that the caller owns, and written with `pwrite` to
places that are known beforehand, so neither side ever holds a whole tensor.
"""

import fnmatch
import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from model_config import read_config
from model_errors import ModelCompatibilityError, UnsafeModelError
from model_files import has_file, open_file, read_into, read_text
from model_locate import CONFIG, files_left_on_hub, find_model_folder, read_hub_header
from model_safetensors import FLOAT_DTYPES, HeaderEntry, TensorInfo, read_header
from model_tokenizer import TokenTable, read_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors")
_PICKLE_NAMES = ("pytorch_model*.bin", "*.pth", "*.pt", "*.ckpt")

SMALLEST_PLAIN = 1000
"""Sizes without a unit are bytes; smaller ones were meant otherwise."""

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class _Place(NamedTuple):
    """Where a tensor that can be merged lies, worked out once: it is read in thousands of blocks.

    Attributes:
        descriptor: of its open file.
        begin: offset of its first byte.
        row_bytes, row_length: bytes and elements of a row.
        dtype: as numpy holds it.
    """

    descriptor: int
    begin: int
    row_bytes: int
    row_length: int
    dtype: np.dtype[Any]


def _place(descriptor: int, entry: HeaderEntry) -> _Place:
    rows, row_length = rows_of(entry.info.shape)
    dtype = FLOAT_DTYPES.get(entry.info.dtype, np.dtype(np.uint8))  # others are not merged
    row_bytes = entry.info.nbytes // max(1, rows)
    return _Place(descriptor, entry.begin, row_bytes, row_length, dtype)


class Origin(NamedTuple):
    """Something that a model is read from.

    Attributes:
        name: what the user called it.
        path: its folder.
        download_bytes: size of its weight files that are on the Hub only.
    """

    name: str
    path: Path
    download_bytes: int


class FileState(NamedTuple):
    """By what it is seen that a file was changed: size, time of the last change in ns, inode."""

    bytes: int
    changed_ns: int
    inode: int


class WeightFile(NamedTuple):
    """A weight file of a model, open for reading.

    Attributes:
        model: what the user called the model.
        folder: where the file lies.
        name: of the file.
        header_sha256: of its header.
        state: when it was opened.
    """

    model: str
    folder: Path
    name: str
    header_sha256: str
    state: FileState


def _state(descriptor: int) -> FileState:
    found = os.fstat(descriptor)
    return FileState(found.st_size, found.st_mtime_ns, found.st_ino)


class ModelFolder:
    """An open model folder: its config, its tensors, and rows of them on request.

    Attributes:
        label: what the user called the model.
        path: the folder with config.json.
        tokenizer_path: the one with tokenizer and chat template.
        config_text: config.json as it stands.
        config: the same, parsed.
        tensors: dtype and shape of every tensor, by name.
        strengths: of the LoRA adapters that it has.
        notes: what the user should know of it.
        is_input: False for a result that this very run has made.

    Reading is safe from several threads. Close it, or use it in a `with` block.
    """

    def __init__(self, label: str, path: Path, on_hub: Mapping[str, int] | None = None) -> None:
        self.label = label
        self.path = path
        self.tokenizer_path = path
        self.strengths: tuple[float, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.is_input = True
        self._on_hub = dict(on_hub or {})
        self.config_text = ""
        self.config: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, _Place] = {}
        self._descriptors: list[int] = []
        self._files: list[WeightFile] = []

    @property
    def files(self) -> tuple["WeightFile", ...]:
        """The weight files that it is read from; none of a result that is made on the way."""
        return tuple(self._files) if self.is_input else ()

    def check_unchanged(self) -> None:
        """Whether the weight files are as they were when they were opened.

        Raises:
            ModelCompatibilityError: one was written to.
        """
        for descriptor, file in zip(self._descriptors, self._files, strict=True):
            if _state(descriptor) != file.state:
                raise ModelCompatibilityError(
                    f"{file.model}: {file.name} was changed while it was being read. Leave it "
                    "alone meanwhile and run it again"
                )

    @property
    def download_bytes(self) -> int:
        """Size of the weight files that are on the Hub only; their tensors cannot be read."""
        return sum(self._on_hub[file] for file in fnmatch.filter(self._on_hub, "*.safetensors"))

    @property
    def memory_bytes(self) -> int:
        """What reading it keeps in memory."""
        return 0

    @property
    def config_texts(self) -> tuple[str, ...]:
        """The files that say what its tensors mean, as they stand."""
        return (self.config_text,)

    @property
    def origins(self) -> tuple[Origin, ...]:
        """What it is read from."""
        return (Origin(self.label, self.path, self.download_bytes),)

    @property
    def stored_tensors(self) -> Mapping[str, TensorInfo]:
        """Its tensors as they are stored, which decides the dtype of a result by default."""
        return self.tensors

    @functools.cached_property
    def tokens(self) -> TokenTable | None:
        """The tokens of its tokenizer files; None where there are none."""
        return read_tokens(self.tokenizer_path, self.label)

    def read_rows(
        self, name: str, first: int, stop: int, buffer: NDArray[np.uint8]
    ) -> NDArray[Any]:
        """Rows `first` to `stop` of a tensor, as stored.

        Args:
            name: a key of `tensors`. A tensor of shape (n,) or () is one row.
            first, stop: rows, counted along the first axis.
            buffer: contiguous, at least as long as the rows; it is overwritten, and the result
                is a view of it.

        Returns:
            Shape (stop - first, row length), in the stored dtype (see `FLOAT_DTYPES`).

        Raises:
            ModelCompatibilityError: the file has become shorter since it was opened, or is on
                the Hub only.
        """
        place = self._places.get(name)
        if place is None:
            raise ModelCompatibilityError(
                f"{self.label}: {name} cannot be read: its weights are not downloaded, only its "
                "header was read. Open the model with its weights"
            )
        target = buffer[: (stop - first) * place.row_bytes]
        try:
            whole = read_into(place.descriptor, target, place.begin + first * place.row_bytes)
        except OSError as error:
            file = self._files[self._descriptors.index(place.descriptor)]
            where = f"{self.label}/{file.name}"
            raise OSError(error.errno, os.strerror(error.errno or 0), where) from error
        if not whole:
            raise ModelCompatibilityError(
                f"{self.label}: {name} ends early: the file changed while it was being read. "
                "Leave it alone meanwhile and run it again"
            )
        return target.view(place.dtype).reshape(stop - first, place.row_length)

    def read_ahead(self, name: str, first: int, stop: int) -> None:
        """Ask the system to read rows that will be asked for soon, meanwhile."""
        place = self._places.get(name)
        if place is not None and hasattr(os, "posix_fadvise"):  # macOS has no such call
            begin, size = place.begin + first * place.row_bytes, (stop - first) * place.row_bytes
            os.posix_fadvise(place.descriptor, begin, size, os.POSIX_FADV_WILLNEED)

    def position(self, name: str) -> tuple[int, int]:
        """Where a tensor lies: to read in this order is to read each file from front to back."""
        place = self._places.get(name)
        return (0, 0) if place is None else (self._descriptors.index(place.descriptor), place.begin)

    def close(self) -> None:
        """Close the files; the folder cannot be read from afterwards."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open_file(self, file: str) -> bool:
        """Take in the tensors of a single weight file; False where there is none.

        Raises:
            ModelCompatibilityError: the file is corrupt.
        """
        if not self._has(file):
            return False
        self._add_file(file, {})
        return True

    def open_weights(self) -> None:
        """Open the weight files of a model and take in their headers."""
        index = self._read_index()
        files = sorted(set(index.values())) if index else [WEIGHTS]
        missing = [name for name in files if not self._has(name)]
        if missing:
            raise ModelCompatibilityError(
                f"{self.label}: {len(missing)} of {len(files)} weight files are missing "
                f"({', '.join(missing[:3])}). Download the model again"
            )
        for file in files:
            self._add_file(file, index)
        absent = sorted(index.keys() - self.tensors.keys())
        if absent:
            raise ModelCompatibilityError(
                f"{self.label}: {INDEX} names {len(absent)} tensors that their files do not hold "
                f"({', '.join(absent[:3])}). Download the model again"
            )

    def _has(self, file: str) -> bool:
        return file in self._on_hub or has_file(self.path, file)

    def _add_file(self, file: str, index: Mapping[str, str]) -> None:
        for name, info in self._read_infos(file).items():
            if index and index.get(name) != file:
                raise ModelCompatibilityError(
                    f"{self.label}: {file} holds {name}, which {INDEX} says is in "
                    f"{index.get(name, 'no file')}. Save the model again"
                )
            self.tensors[name] = info

    def _read_infos(self, file: str) -> dict[str, TensorInfo]:
        """The header of a weight file, which stays open, or of one on the Hub."""
        if file in self._on_hub:
            infos = read_hub_header(self.label, self.path.name, file)
            self._on_hub[file] = self._on_hub[file] or sum(info.nbytes for info in infos.values())
            return infos
        descriptor = open_file(self.path, file, self.label)
        self._descriptors.append(descriptor)
        entries, sha256 = read_header(descriptor, f"{self.label}/{file}")
        self._files.append(WeightFile(self.label, self.path, file, sha256, _state(descriptor)))
        self._places.update({name: _place(descriptor, entry) for name, entry in entries.items()})
        return {name: entry.info for name, entry in entries.items()}

    def _read_index(self) -> dict[str, str]:
        """Tensor name to file name; empty for a folder with a single weight file."""
        if self._has(WEIGHTS):
            return {}
        if not has_file(self.path, INDEX):
            raise _no_weights(self.label, self.path)
        try:
            weight_map = read_config(read_text(self.path, INDEX, self.label))["weight_map"]
            files = set(weight_map.values())
            bad = [file for file in files if not _SHARD_NAME.fullmatch(file)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelCompatibilityError(
                f"{self.label}: {INDEX} is not a safetensors index "
                f"({type(error).__name__}: {error}). Download it again"
            ) from error
        if not files:
            raise ModelCompatibilityError(
                f"{self.label}: {INDEX} has an empty weight_map. Download it again"
            )
        if bad:
            raise UnsafeModelError(
                f"{self.label}: {INDEX} names the weight files {sorted(bad)[:3]}; expected names "
                "such as model-00001-of-00002.safetensors, in the model's own folder. Do not use it"
            )
        return dict(weight_map)


def open_model_folder(model: str | os.PathLike[str], *, weights: bool = True) -> ModelFolder:
    """Open a model by folder or Hub id; reads config.json and the headers, no weights.

    Args:
        model: a folder or a Hub id.
        weights: download the weights of a Hub model where the cache lacks them. Without, their
            headers are read from the Hub: `tensors` is known, `read_rows` is refused.

    Raises:
        ModelCompatibilityError: no such model; no config.json; no safetensors weights, or
            files that are missing, cut off or corrupt.
        OSError: the folder cannot be read.

    See `model_locate.find_model_folder` for what a model may be called.
    """
    label = str(model)
    path = find_model_folder(model, weights=weights)
    folder = ModelFolder(label, path, None if weights else files_left_on_hub(model, path))
    try:
        folder.config_text = read_text(folder.path, CONFIG, label)
        folder.config = read_config(folder.config_text)
        folder.open_weights()
    except ValueError as error:
        folder.close()
        raise ModelCompatibilityError(
            f"{label}: config.json is not valid JSON ({error}). Download it again"
        ) from error
    except BaseException:
        folder.close()
        raise
    return folder


def rows_of(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and row length of a tensor; a vector or scalar is one row.

    >>> rows_of((32000, 2048)), rows_of((2048,))
    ((32000, 2048), (1, 2048))
    """
    rows = shape[0] if len(shape) > 1 else 1
    numel = TensorInfo("F32", tuple(shape)).numel
    return rows, numel // rows if rows else 0


def _no_weights(label: str, path: Path) -> ModelCompatibilityError:
    files = sorted({*os.listdir(path), *files_left_on_hub(label, path)})
    pickles = sorted(file for name in _PICKLE_NAMES for file in fnmatch.filter(files, name))
    if pickles:
        return UnsafeModelError(
            f"{label}: has only pickle weights ({pickles[0]}), which can run code when loaded. "
            "Convert them in a place you trust: AutoModelForCausalLM.from_pretrained(...)"
            '.save_pretrained("converted")'
        )
    others = fnmatch.filter(files, "*.safetensors")
    found = f"; found {', '.join(others[:3])}" if others else ""
    return ModelCompatibilityError(
        f"{label}: no {WEIGHTS} and no {INDEX}{found}. Expected a folder from save_pretrained"
    )


def parse_size(size: str | int, name: str = "size") -> int:
    """Bytes of a size such as "5GB" (10**9 each), "500MB" or 1000000; `name` is for the error.

    Raises:
        ValueError: it is no size, or a number below 1000 without a unit.

    >>> parse_size("1.5GB")
    1500000000
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?) ?([KMGT]B)?", str(size).strip().upper())
    if match is None or float(match[1]) <= 0:
        shown = f"{str(size)[:60]}..." if len(str(size)) > 60 else repr(size)
        raise ValueError(f"{name} must be a size such as 5GB or 500MB, got {shown}")
    if match[2] is None and float(match[1]) < SMALLEST_PLAIN:
        raise ValueError(f"{name} {size} would be bytes. Say the unit, as in {size}MB or {size}GB")
    return max(1, int(float(match[1]) * _UNITS.get(match[2] or "", 1)))


def free_memory() -> int | None:
    """Bytes that a new process could have without swapping; None where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (free,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError):
        return None
    return 1024 * int(free)


def format_bytes(count: float) -> str:
    """A size for people, in decimal units.

    >>> format_bytes(2200000000), format_bytes(512)
    ('2.20 GB', '512 bytes')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} bytes"


def get_llama(
    model: str | os.PathLike[str], device: str = "cpu", dtype: str = "float32"
) -> "PreTrainedModel":
    """Load a model through transformers, ready for inference.

    Args:
        model: a folder, or a Hub id; see `model_locate.find_model_folder`.
        device: such as "cpu" or "cuda".
        dtype: "float32", "float16" or "bfloat16".

    Raises:
        ModelCompatibilityError: there is no such model, transformers does not know its
            architecture, or its weights are not all there.
        OSError: a file cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            find_model_folder(model),
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except ValueError as error:
        raise ModelCompatibilityError(
            f"{model}: transformers cannot load this model: {error}"
        ) from error
    random = sorted(info["missing_keys"])
    if random:
        raise ModelCompatibilityError(
            f"{model}: {len(random)} tensors that transformers expects are missing "
            f"({', '.join(random[:3])}); it would fill them at random. Download the model again"
        )
    if loaded.config.tie_word_embeddings:
        loaded.tie_weights()  # some versions keep a stored head that config.json says is not used
    ready: PreTrainedModel = loaded.to(device).eval()
    return ready
