"""A model folder written as a stream: it appears complete or not at all, and can be gone on with.

The places of all tensors are known beforehand, so rows are written with `pwrite` wherever they
belong, in any order. Of every tensor that is done it is recorded which rows were written, and the
checksums of their bytes; a later run keeps those that still have them. While the rest is being
written, what is done is read back, for the SHA-256 of the files in the manifest.
"""

import abc
import errno
import hashlib
import json
import os
import shutil
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from model_config import read_config
from model_errors import ModelCompatibilityError
from model_files import (
    check_space,
    chunks,
    open_file,
    read_into,
    read_text,
    reserve,
    write_all,
    write_file,
)
from model_hashes import CARD, MANIFEST
from model_partial import PartialFolder
from model_safetensors import FLOAT_DTYPES, HeaderEntry, TensorInfo, build_header
from model_utils import INDEX, WEIGHTS, format_bytes, rows_of

FLUSH_BYTES = 2**27
"""What is written goes to the disk in portions of this size."""

RECORD_BYTES = 1024
"""Room on the disk for the record of a tensor; a longer one is seldom."""

READ_BYTES = 2**19
"""What is read back at once: it stays in a core's cache while it is digested."""

_FLUSH = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


class Run(NamedTuple):
    """Rows of a tensor: the first, the one after the last, and their `checksum_rows`."""

    first: int
    stop: int
    checksum: int


class FolderWriter:
    """The weights of a model and what stands beside them, written into a `PartialFolder`.

    Used in a `with` block; `commit` ends the work.

    Args:
        partial: where it is built; open.
        tensors: dtype and shape of every tensor, in the order in which they are stored.
        max_shard_size: bytes of tensors per file, at most (a larger tensor gets a file alone).
        file: the name of a single weight file.
        plan: JSON; whatever else decides what is written. What a stopped run has left is kept if
            it was of the same plan. None if `partial.begin` was called already; then nothing is.
        others: bytes that all other files will take, at most.

    Attributes:
        path: the folder as long as it is being built.
        findings: what `finish` was given, by tensor; of all tensors that are done.
        kept_bytes: of the tensors that a stopped run had done.

    Raises:
        OSError: the disk is full, or the place cannot be written.
    """

    def __init__(
        self,
        partial: PartialFolder,
        tensors: Mapping[str, TensorInfo],
        max_shard_size: int,
        file: str = WEIGHTS,
        *,
        plan: Mapping[str, Any] | None = None,
        others: int = 0,
    ) -> None:
        self.partial = partial
        self.path = partial.model
        self.tensors = tensors
        self.findings: dict[str, Mapping[str, Any]] = {}
        self.kept_bytes = 0
        self.shards = plan_shards(tensors, max_shard_size, file)
        self._plan = plan
        self._others = others
        self._files: dict[str, dict[str, Any]] = {}
        self._runs = _Runs()
        self._buffer = _Buffer()
        self._places: dict[str, tuple[int, HeaderEntry]] = {}
        self._descriptors: list[int] = []
        self._shards: list[_Shard] = []
        self._flusher = _Flusher(self._descriptors)
        self._read_back = _ReadBack(self._shards, self._runs)

    def __enter__(self) -> Self:
        try:
            headers = {
                file: build_header({name: self.tensors[name] for name in names})
                for file, names in self.shards.items()
            }
            layout = {
                file: hashlib.sha256(header).hexdigest() for file, (header, _) in headers.items()
            }
            if self._plan is None:
                records = []
            else:
                goes_on = self.partial.begin({**self._plan, "the files": layout})
                records = self.partial.records() if goes_on else []
            self._make_room({file: header for file, (header, _) in headers.items()})
            for file, (header, entries) in headers.items():
                self._open_shard(file, header, entries)
            self._descriptors.append(self.partial.open_records(self._record_bytes))
            self._take_up(records)
            if len(self.shards) > 1:
                self.write_text(INDEX, self._index())
            self.partial.begin_reserve(self._others)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

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
        content = rows.reshape(-1).view(np.uint8).reshape(len(rows), -1)
        write_all(descriptor, content.reshape(-1).data, entry.begin + first * content.shape[1])
        self._runs.add(name, first, first + len(rows), content)
        self._read_back.start()
        self._flusher.add(rows.nbytes)

    def finish(self, findings: Mapping[str, Mapping[str, Any]]) -> None:
        """Record tensors whose rows are all written, with JSON that a later run gets back.

        Raises:
            OSError: a tensor does not read back as it was written.
        """
        self._read_back.check()
        rows = {name: self._runs.of(name) for name in findings}
        for name, runs in rows.items():
            if not _cover(runs, self.tensors[name]):
                raise ValueError(f"{name} is not written completely")
        self.partial.record({"rows": rows, "findings": findings})
        self.findings.update(findings)
        self._read_back.done(findings)

    def write_text(self, name: str, text: str) -> None:
        """Add a text file."""
        try:
            content = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ModelCompatibilityError(
                f"{name} would hold characters that are none ({error.object[error.start]!r}). Look "
                "for them in the models' small files"
            ) from error
        self.partial.end_reserve()
        write_file(self.path / name, [content])
        self._files[name] = _described(len(content), hashlib.sha256(content))

    def copy_file(self, source: Path, sha256: str | None = None) -> None:
        """Add a file of a model, byte for byte.

        Raises:
            ModelCompatibilityError: it has not the SHA-256 that it had, if that is given.
        """
        digest = hashlib.sha256()
        self.partial.end_reserve()
        descriptor = open_file(source.parent, source.name, str(source.parent))
        try:
            size = os.fstat(descriptor).st_size
            write_file(self.path / source.name, _hashed(chunks(descriptor, 0, size), digest))
        finally:
            os.close(descriptor)
        if sha256 not in (None, digest.hexdigest()):
            raise ModelCompatibilityError(
                f"{source.parent}: {source.name} was changed during the merge. Leave it alone "
                "meanwhile and run it again"
            )
        self._files[source.name] = _described(size, digest)

    def commit(self, about: Mapping[str, Any] | None = None) -> None:
        """Bring everything to the disk, write the manifest, and give the folder its name.

        Args:
            about: JSON for the manifest, beside the files.
        """
        self._flusher.stop()
        self._flusher.check()
        filled = {name for name, info in self.tensors.items() if info.numel}
        if missing := filled - self.findings.keys():
            raise ValueError(f"{min(missing)} is not written completely")
        for descriptor in self._descriptors:
            os.fsync(descriptor)
        for shard in self._read_back.complete():
            self._files[shard.file] = _described(shard.size, shard.digest)
        manifest = {**(about or {}), "files": dict(sorted(self._files.items()))}
        text = json.dumps(manifest, indent=2) + "\n"  # ASCII: names of files may be no UTF-8
        write_file(self.path / MANIFEST, [text.encode("ascii")])
        self.partial.publish()

    @property
    def _record_bytes(self) -> int:
        return RECORD_BYTES * (len(self.tensors) + 1)

    def _make_room(self, headers: Mapping[str, bytes]) -> None:
        """Take the disk space for everything, or say how much is missing."""
        for file in self.path.iterdir():
            if file.name not in headers:
                shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
        sizes = {
            self.path / file: len(header) + sum(self.tensors[n].nbytes for n in self.shards[file])
            for file, header in headers.items()
        }
        others = {
            self.partial.plan: self.partial.plan.stat().st_size,
            self.partial.journal: self._record_bytes,
            self.partial.reserve: self._others,
        }
        check_space(sizes | others, self.partial.output_dir)

    def _open_shard(self, file: str, header: bytes, entries: Mapping[str, HeaderEntry]) -> None:
        size = len(header) + sum(entry.info.nbytes for entry in entries.values())
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.path / file, flags, 0o666)
        self._descriptors.append(descriptor)
        self._shards.append(_Shard(file, descriptor, header, entries, size))
        reserve(descriptor, size)
        write_all(descriptor, header, 0)
        self._places.update({name: (descriptor, entry) for name, entry in entries.items()})

    def _take_up(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Keep the tensors that are recorded, and whose bytes are those that were written."""
        if not records:
            return
        for shard in self._shards:
            _forget_cached(shard.descriptor)
        for record in records:
            rows = {name: [Run(*run) for run in runs] for name, runs in record["rows"].items()}
            if all(self._is_there(name, runs) for name, runs in rows.items()):
                self._runs.keep(rows)
                self.findings.update(record["findings"])
                self._read_back.done(rows)
        self.kept_bytes = sum(self.tensors[name].nbytes for name in self.findings)
        whole = sum(info.nbytes for info in self.tensors.values())
        self.partial.tell(
            f"{format_bytes(self.kept_bytes)} of {format_bytes(whole)} are kept of what a stopped "
            "run has left"
        )

    def _is_there(self, name: str, runs: Sequence[Run]) -> bool:
        """Whether a tensor's rows still have the checksums that they were written with."""
        descriptor, entry = self._places[name]
        return _cover(runs, entry.info) and all(
            self._checksum(descriptor, entry, run) == run.checksum for run in runs
        )

    def _checksum(self, descriptor: int, entry: HeaderEntry, run: Run) -> int:
        checksum = 0
        for rows in _read_rows(descriptor, entry, run, self._buffer):
            checksum = checksum_rows(rows, checksum)
        return checksum

    def _index(self) -> str:
        files = {name: file for file, names in self.shards.items() for name in names}
        metadata = {
            "total_parameters": sum(info.numel for info in self.tensors.values()),
            "total_size": sum(info.nbytes for info in self.tensors.values()),
        }
        index = {"metadata": metadata, "weight_map": dict(sorted(files.items()))}
        return json.dumps(index, indent=2) + "\n"

    def _close(self) -> None:
        """Close the files, when no thread works on them any more."""
        try:
            self._flusher.stop()
        finally:
            try:
                self._read_back.stop()
            finally:
                self._runs.clear()
                while self._shards:
                    os.close(self._shards.pop().descriptor)
                self._descriptors.clear()


def _forget_cached(descriptor: int) -> None:
    """Make what is read next come from the disk.

    Once a disk has said that it could not take something, memory may hold what it does not.
    """
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):  # macOS has no such call
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished folder; None where there is none, or files have other sizes.

    The card may have been edited.
    """
    try:
        manifest = read_config(read_text(folder, MANIFEST, str(folder)))
        sizes = {name: file["bytes"] for name, file in manifest["files"].items() if name != CARD}
        there = all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ModelCompatibilityError):
        return None
    return manifest if there else None


def _described(size: int, digest: Any) -> dict[str, Any]:
    """A file as the manifest lists it."""
    return {"bytes": size, "sha256": digest.hexdigest()}


def _hashed(parts: Iterable[bytes], digest: Any) -> Iterator[bytes]:
    for part in parts:
        digest.update(part)
        yield part


def checksum_rows(rows: NDArray[np.uint8], checksum: int = 0) -> int:
    """CRC-32 of the sums of the rows, each of its words; by parts it is the same as of the whole.

    It shows what did not arrive on a disk, and costs a tenth of a CRC-32 of all bytes.

    Args:
        rows: shape (rows, bytes of a row), contiguous.
        checksum: of the rows before.
    """
    width = next(width for width in (8, 4, 2, 1) if rows.shape[1] % width == 0)
    words = rows.view(np.dtype(f"u{width}"))
    return zlib.crc32(np.add.reduce(words, axis=1, dtype=np.uint64), checksum)


def _read_rows(
    descriptor: int, entry: HeaderEntry, run: Run, buffer: "_Buffer"
) -> Iterator[NDArray[np.uint8]]:
    """Rows of a tensor as bytes, some at a time; `OSError` where the file ends before."""
    rows, _ = rows_of(entry.info.shape)
    row_bytes = entry.info.nbytes // max(1, rows)
    step = max(1, READ_BYTES // max(1, row_bytes))
    for first in range(run.first, run.stop, step):
        stop = min(first + step, run.stop)
        target = buffer.take((stop - first) * row_bytes)
        if not read_into(descriptor, target, entry.begin + first * row_bytes):
            raise OSError(errno.EIO, "a weight file became shorter while it was being written")
        yield target.reshape(stop - first, row_bytes)


class _Buffer:
    """Memory to read into, used again and again."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def take(self, size: int) -> NDArray[np.uint8]:
        """So many bytes; what was taken before is overwritten."""
        if len(self._memory) < size:
            self._memory = np.empty(size, np.uint8)
        return self._memory[:size]


def _cover(runs: Sequence[Run], info: TensorInfo) -> bool:
    """Whether runs, in order, are all rows of a tensor, each once."""
    rows = rows_of(info.shape)[0] if info.numel else 0
    ends = [0, *(run.stop for run in runs)]
    return [run.first for run in runs] == ends[:-1] and ends[-1] == rows


class _Runs:
    """Which rows of each tensor are written; what follows on what is joined."""

    def __init__(self) -> None:
        self._by_name: dict[str, dict[int, Run]] = {}
        self._lock = threading.Lock()

    def add(self, name: str, first: int, stop: int, content: NDArray[np.uint8]) -> None:
        """Rows were written; from several threads, of which none writes the same rows."""
        with self._lock:
            runs = self._by_name.setdefault(name, {})
            before = runs.pop(first, Run(first, first, 0))
        run = Run(before.first, stop, checksum_rows(content, before.checksum))
        with self._lock:
            runs[stop] = run

    def keep(self, rows: Mapping[str, Sequence[Run]]) -> None:
        """These are written already."""
        self._by_name.update({name: {run.stop: run for run in rows[name]} for name in rows})

    def of(self, name: str) -> list[Run]:
        """What is written of a tensor, in order."""
        return sorted(self._by_name.get(name, {}).values())

    def clear(self) -> None:
        """Forget everything."""
        self._by_name.clear()


class _Helper(abc.ABC):
    """A thread that works beside those that write, and ends before the files are closed.

    Attributes:
        error: what went wrong first.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._wake = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, at the first call.

        It comes from a thread that writes: an interrupt could end the main thread in the middle.
        """
        with self._wake:
            if self._thread is None and not self._stopping:
                thread = threading.Thread(target=self._work, daemon=True)
                thread.start()
                self._thread = thread

    def check(self) -> None:
        """Raise what went wrong."""
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """End; returns when no file is worked on any more, even if it is interrupted."""
        interrupt = None
        while True:
            try:
                with self._wake:
                    self._stopping = True
                    self._wake.notify_all()
                if self._thread is not None:
                    self._thread.join()
                    self._thread = None
                break
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _work(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self.error = error

    @abc.abstractmethod
    def _run(self) -> None:
        """The work; it looks at `_stopping` from time to time."""


class _Flusher(_Helper):
    """Brings files to the disk while they are still being written.

    Otherwise the system keeps most of what is written in memory until the end, and then the
    disk works alone. It says once that something went wrong; a later fsync would not.
    """

    def __init__(self, descriptors: Sequence[int]) -> None:
        super().__init__()
        self._descriptors = descriptors
        self._written = 0

    def add(self, count: int) -> None:
        """So many bytes were written.

        Raises:
            OSError: what was written before could not be brought to the disk.
        """
        self.check()
        with self._wake:
            self._written += count
            if self._written < FLUSH_BYTES:
                return
            self._wake.notify_all()
        self.start()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self._written >= FLUSH_BYTES)
                if self._stopping:
                    return
                self._written = 0
            for descriptor in self._descriptors:
                _FLUSH(descriptor)


class _Shard:
    """A weight file that is being written.

    Attributes:
        file: its name.
        descriptor: open for reading and writing.
        header: its first bytes.
        entries: its tensors, in their order.
        size: bytes of the whole file.
        digest: SHA-256 of what has been read back.
    """

    def __init__(
        self,
        file: str,
        descriptor: int,
        header: bytes,
        entries: Mapping[str, HeaderEntry],
        size: int,
    ) -> None:
        self.file, self.descriptor, self.size = file, descriptor, size
        self.header, self.entries = header, entries
        self.digest = hashlib.sha256()


class _ReadBack(_Helper):
    """Reads what is done, file by file from the front, for SHA-256.

    What is read differs from what was written where memory fails, or the file was written to.
    """

    def __init__(self, shards: Sequence[_Shard], runs: _Runs) -> None:
        super().__init__()
        self._shards = shards
        self._runs = runs
        self._done: set[str] = set()
        self._buffer = _Buffer()

    def done(self, names: Iterable[str]) -> None:
        """These tensors are complete."""
        with self._wake:
            self._done.update(names)
            self._wake.notify_all()

    def complete(self) -> Sequence[_Shard]:
        """The files, once they are read; all tensors must be done.

        Raises:
            OSError: a file cannot be read, or does not hold what was written.
        """
        if self._thread is None:
            self._run()
        else:
            self._thread.join()
        self.check()
        return self._shards

    def _wait_for(self, name: str) -> None:
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or name in self._done)

    def _run(self) -> None:
        for shard in self._shards:
            shard.digest.update(shard.header)
            for name, entry in shard.entries.items():
                if entry.info.numel:
                    self._wait_for(name)
                for run in self._runs.of(name):
                    checksum = 0
                    for rows in _read_rows(shard.descriptor, entry, run, self._buffer):
                        if self._stopping:
                            return
                        shard.digest.update(rows.data)
                        checksum = checksum_rows(rows, checksum)
                    if checksum != run.checksum:
                        raise OSError(
                            errno.EIO,
                            f"{shard.file}: {name} does not read back as it was written: the disk "
                            "or the memory of this machine makes errors. Do not trust it",
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


def file_sizes(tensors: Mapping[str, TensorInfo], max_shard_size: int) -> dict[str, int]:
    """Sizes of the weight files of a model."""
    return {
        file: len(build_header({name: tensors[name] for name in names})[0])
        + sum(tensors[name].nbytes for name in names)
        for file, names in plan_shards(tensors, max_shard_size).items()
    }
