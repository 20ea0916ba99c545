"""Model folders: open one and read rows of its tensors, write one as a stream, load one.

The only `*_utils` module that touches disk: it belongs to the `model_*` layer and knows no math.
Weights are read with `pread` into buffers that the caller owns, and written with `pwrite` to
places that are known beforehand, so neither side ever holds a whole tensor.
"""

import contextlib
import fnmatch
import functools
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from model_config import read_config
from model_errors import ModelCompatibilityError
from model_locate import files_left_on_hub, find_model_folder, read_hub_header
from model_safetensors import FLOAT_DTYPES, HeaderEntry, TensorInfo, build_header, read_header
from model_tokenizer import TokenTable, read_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors")
_PICKLE_NAMES = ("pytorch_model*.bin", "*.pth", "*.pt", "*.ckpt")

FLUSH_BYTES = 2**27
"""What is written goes to the disk in portions of this size."""

_FLUSH = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync

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

    Reading is safe from several threads. Close it, or use it in a `with` block.
    """

    def __init__(self, label: str, path: Path, on_hub: Mapping[str, int] | None = None) -> None:
        self.label = label
        self.path = path
        self.tokenizer_path = path
        self.strengths: tuple[float, ...] = ()
        self.notes: tuple[str, ...] = ()
        self._on_hub = dict(on_hub or {})
        self.config_text = ""
        self.config: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, _Place] = {}
        self._descriptors: list[int] = []

    @property
    def download_bytes(self) -> int:
        """Size of the weight files that are on the Hub only; their tensors cannot be read."""
        return sum(self._on_hub[file] for file in fnmatch.filter(self._on_hub, "*.safetensors"))

    @property
    def memory_bytes(self) -> int:
        """What reading it keeps in memory."""
        return 0

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
        if not _read_fully(place.descriptor, target, place.begin + first * place.row_bytes):
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

    def open_file(self, file: str, missing: str) -> None:
        """Take in the tensors of a single weight file.

        Raises:
            ModelCompatibilityError: the file is corrupt, or there is none: with the text `missing`.
        """
        if not self._has(file):
            raise ModelCompatibilityError(missing)
        self._add_file(file, {})

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
        return file in self._on_hub or (self.path / file).is_file()

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
        descriptor = os.open(self.path / file, os.O_RDONLY)
        self._descriptors.append(descriptor)
        entries = read_header(descriptor, f"{self.label}/{file}")
        self._places.update({name: _place(descriptor, entry) for name, entry in entries.items()})
        return {name: entry.info for name, entry in entries.items()}

    def _read_index(self) -> dict[str, str]:
        """Tensor name to file name; empty for a folder with a single weight file."""
        path = self.path / INDEX
        if self._has(WEIGHTS):
            return {}
        if not path.is_file():
            raise ModelCompatibilityError(_no_weights(self.label, self.path))
        try:
            weight_map = read_config(path.read_text("utf-8"))["weight_map"]
            files = set(weight_map.values())
            bad = [file for file in files if not _SHARD_NAME.fullmatch(file)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelCompatibilityError(
                f"{self.label}: {INDEX} is not a safetensors index "
                f"({type(error).__name__}: {error}). Download it again"
            ) from error
        if bad or not files:
            raise ModelCompatibilityError(
                f"{self.label}: {INDEX} names the weight files {sorted(bad)}; expected names such "
                "as model-00001-of-00002.safetensors, in the model's own folder"
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
        folder.config_text = (folder.path / "config.json").read_bytes().decode("utf-8")
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


def _read_fully(descriptor: int, target: NDArray[np.uint8], offset: int) -> bool:
    """Fill a buffer from a file; False where the file ends before."""
    done = 0
    while done < len(target):  # a signal can end a read early
        count = os.preadv(descriptor, [target[done:].data], offset + done)
        if count == 0:
            return False
        done += count
    return True


def _no_weights(label: str, path: Path) -> str:
    files = sorted({*os.listdir(path), *files_left_on_hub(label, path)})
    pickles = sorted(file for name in _PICKLE_NAMES for file in fnmatch.filter(files, name))
    if pickles:
        return (
            f"{label}: has only pickle weights ({pickles[0]}), which can run code when loaded. "
            "Convert them in a place you trust: AutoModelForCausalLM.from_pretrained(...)"
            '.save_pretrained("converted")'
        )
    others = fnmatch.filter(files, "*.safetensors")
    found = f"; found {', '.join(others[:3])}" if others else ""
    return f"{label}: no {WEIGHTS} and no {INDEX}{found}. Expected a folder from save_pretrained"


class _Flusher:
    """Brings files to the disk while they are still being written.

    Otherwise the system keeps most of what is written in memory until the end, and then the
    disk works alone.

    Attributes:
        error: what went wrong first. The system says it once; a later fsync would not.
    """

    def __init__(self, descriptors: Sequence[int]) -> None:
        self.error: OSError | None = None
        self._descriptors = descriptors
        self._written = 0
        self._wake = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def add(self, count: int) -> None:
        """So many bytes were written.

        Raises:
            OSError: what was written before could not be brought to the disk.
        """
        if self.error is not None:
            raise self.error
        with self._wake:
            self._written += count
            if self._written < FLUSH_BYTES or self._stopping:
                return
            self._wake.notify()
            if self._thread is None:
                # Here, and not before: this is no main thread, which an interrupt could end
                # in the middle of the start.
                thread = threading.Thread(target=self._run, daemon=True)
                thread.start()
                self._thread = thread

    def stop(self) -> None:
        """End; returns when no file is worked on any more, even if it is interrupted."""
        interrupt = None
        while self._thread is not None:
            try:
                with self._wake:
                    self._stopping = True
                    self._wake.notify()
                self._thread.join()
                self._thread = None
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self._written >= FLUSH_BYTES)
                if self._stopping:
                    return
                self._written = 0
            try:
                for descriptor in self._descriptors:
                    _FLUSH(descriptor)
            except OSError as error:
                self.error = error
                return


class FolderWriter:
    """A model folder that appears complete or not at all.

    Built in a `with` block under a temporary name beside `output_dir`, and renamed by
    `commit`. Leaving the block without `commit` removes what was written.

    Args:
        output_dir: the folder to make; it must not exist, or be empty.
        tensors: dtype and shape of every tensor, in the order in which they are stored.
        max_shard_size: bytes of tensors per file, at most (a larger tensor gets a file alone).
        file: the name of a single weight file.

    Raises:
        FileExistsError: `output_dir` exists and is not an empty folder.
        OSError: the disk is full, or the place cannot be written.
    """

    def __init__(
        self,
        output_dir: Path,
        tensors: Mapping[str, TensorInfo],
        max_shard_size: int,
        file: str = WEIGHTS,
    ) -> None:
        check_output_dir(output_dir)
        self.output_dir = Path(os.path.abspath(output_dir))
        self.tensors = tensors
        self.shards = plan_shards(tensors, max_shard_size, file)
        self.partial = self.output_dir.with_name(
            f".{self.output_dir.name}.partial-{secrets.token_hex(4)}"
        )
        self._parents_made: list[Path] = []
        self._places: dict[str, tuple[int, HeaderEntry]] = {}
        self._descriptors: list[int] = []
        self._flusher = _Flusher(self._descriptors)

    def __enter__(self) -> Self:
        try:
            for parent in reversed(self.output_dir.parents):
                if not parent.exists():
                    parent.mkdir()
                    self._parents_made.append(parent)
            self.partial.mkdir()
            for file, names in self.shards.items():
                self._create_shard(file, names)
            if len(self.shards) > 1:
                self.write_text(INDEX, self._index())
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._abandon()

    def write_rows(self, name: str, first: int, rows: NDArray[Any]) -> None:
        """Write rows of a tensor, starting at row `first`; safe from several threads.

        Args:
            name: one of the tensors that the folder was made for.
            first: row along the first axis; 0 for a vector.
            rows: (count, row length), contiguous, in the dtype of the tensor as numpy holds it.
        """
        descriptor, entry = self._places[name]
        if rows.dtype != FLOAT_DTYPES[entry.info.dtype]:
            raise TypeError(f"{name} is {entry.info.dtype}, got rows of {rows.dtype}")
        row_bytes = rows_of(entry.info.shape)[1] * rows.itemsize
        view = rows.reshape(-1).view(np.uint8).data
        offset = entry.begin + first * row_bytes
        while len(view):
            count = os.pwrite(descriptor, view, offset)
            view, offset = view[count:], offset + count
        self._flusher.add(rows.nbytes)

    def write_text(self, name: str, text: str) -> None:
        """Add a text file."""
        (self.partial / name).write_bytes(text.encode("utf-8"))

    def copy_file(self, source: Path) -> None:
        """Add a file, byte for byte."""
        shutil.copyfile(source, self.partial / source.name)

    def commit(self) -> None:
        """Bring everything to the disk and give the folder its name."""
        self._flusher.stop()
        self._flusher.add(0)  # raises what went wrong
        for descriptor in self._descriptors:
            os.fsync(descriptor)
        for file in self.partial.iterdir():
            _fsync_path(file)
        _fsync_path(self.partial)
        check_output_dir(self.output_dir)
        os.rename(self.partial, self.output_dir)
        self._parents_made.clear()
        _fsync_path(self.output_dir.parent)

    def _create_shard(self, file: str, names: Sequence[str]) -> None:
        header, entries = build_header({name: self.tensors[name] for name in names})
        size = len(header) + sum(entry.info.nbytes for entry in entries.values())
        descriptor = os.open(self.partial / file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._descriptors.append(descriptor)
        if hasattr(os, "posix_fallocate"):  # a full disk shows here; macOS has no such call
            os.posix_fallocate(descriptor, 0, size)
        os.pwrite(descriptor, header, 0)
        self._places.update({name: (descriptor, entry) for name, entry in entries.items()})

    def _index(self) -> str:
        files = {name: file for file, names in self.shards.items() for name in names}
        metadata = {
            "total_parameters": sum(info.numel for info in self.tensors.values()),
            "total_size": sum(info.nbytes for info in self.tensors.values()),
        }
        index = {"metadata": metadata, "weight_map": dict(sorted(files.items()))}
        return json.dumps(index, indent=2) + "\n"

    def _abandon(self) -> None:
        """Close the files; remove what was made if it was not renamed."""
        try:
            self._flusher.stop()
        finally:
            self._remove()

    def _remove(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.partial)
        while self._parents_made:
            with contextlib.suppress(OSError):  # someone else has put something there meanwhile
                self._parents_made.pop().rmdir()


def check_output_dir(output_dir: Path) -> None:
    """Raise `FileExistsError` unless `output_dir` is free: not there, or an empty folder.

    A complete folder takes its place by being renamed, which works with no link or mount point.
    """
    if output_dir.is_symlink() or os.path.ismount(output_dir):
        raise FileExistsError(
            f"{output_dir}: the output is a link or a mount point. Name a new folder inside it"
        )
    if output_dir.is_dir() and not any(output_dir.iterdir()):
        return
    if output_dir.exists():
        raise FileExistsError(
            f"{output_dir}: the output exists already. Choose another name or remove it first"
        )


def plan_shards(
    tensors: Mapping[str, TensorInfo], max_shard_size: int, file: str = WEIGHTS
) -> dict[str, list[str]]:
    """File names and the tensors in each, filled in order up to `max_shard_size` bytes.

    >>> info = TensorInfo("F16", (4,))
    >>> plan_shards({"a": info, "b": info, "c": info}, 16)["model-00002-of-00002.safetensors"]
    ['c']
    """
    shards: list[list[str]] = []
    room = -1
    for name, info in tensors.items():
        if info.nbytes > room or not shards:
            shards.append([])
            room = max_shard_size
        shards[-1].append(name)
        room -= info.nbytes
    if len(shards) == 1:
        return {file: shards[0]}
    return {
        f"model-{number:05}-of-{len(shards):05}.safetensors": names
        for number, names in enumerate(shards, 1)
    }


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


def format_bytes(count: float) -> str:
    """A size for people, in decimal units.

    >>> format_bytes(2200000000), format_bytes(512)
    ('2.20 GB', '512 bytes')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} bytes"


def _fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def get_llama(model: str | os.PathLike[str], device: str = "cpu") -> "PreTrainedModel":
    """Load a model through transformers, in float32, ready for inference.

    Args:
        model: a folder, or a Hub id; see `model_locate.find_model_folder`.
        device: such as "cpu" or "cuda".

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
            dtype=torch.float32,
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
