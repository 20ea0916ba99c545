"""Files: those of a model folder, which may come from a stranger, and those that are written.

Of a folder that a user names, only regular files inside it are read. A link that leads out of it
could bring a private file into a result that is published; a pipe or a device would never end.
The links of the Hugging Face cache are known, and lead into that model's own store.
"""

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model_errors import UnsafeModelError

MB = 10**6

JSON_BYTES = 16 * MB
"""A config has a few KB; the list of tensors of the largest models, 10 MB."""

TOKENIZER_BYTES = 256 * MB
"""The largest tokenizer.json has 35 MB."""

TOKENIZER_NAMES = ("tokenizer", "vocab", "merges", "tekken")
"""How the files begin that may be as long as `TOKENIZER_BYTES`; others, `JSON_BYTES`."""

CHUNK_BYTES = 2**22
"""Files are read in parts of this size."""

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""A pipe without a writer would block; it is refused once it is open."""


def has_file(folder: Path, name: str) -> bool:
    """Whether a folder has an entry of that name, of whatever kind: `open_file` says if it is one.

    What is there and cannot be read is refused, and not passed over.
    """
    try:
        os.lstat(folder / name)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return False
        raise
    return True


def open_file(folder: Path, name: str, label: str) -> int:
    """Open a file of a model folder for reading.

    Args:
        folder: what the user named, or its `snapshots` folder in the Hub's cache.
        name: of a file in it, or in a folder in it.
        label: what errors call the model.

    Returns:
        A descriptor.

    Raises:
        UnsafeModelError: it is no regular file, or a link out of the folder.
        OSError: it cannot be opened.
    """
    target = real_file(folder, name, label)
    try:
        descriptor = os.open(target, _FLAGS)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            text = "too many files are open at once. Allow more (ulimit -n)"
            raise OSError(error.errno, text, str(folder / name)) from error
        if error.errno not in (errno.ENXIO, errno.ELOOP, errno.ENODEV):
            raise
        raise UnsafeModelError(_no_file(label, name)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnsafeModelError(_no_file(label, name))
    return descriptor


def real_file(folder: Path, name: str, label: str) -> Path:
    """Where a file of a model folder really lies; it must be in the folder.

    Raises:
        UnsafeModelError: it is a link out of the folder, or to nothing.
    """
    root = os.path.realpath(folder, strict=True)
    try:
        target = os.path.realpath(os.path.join(root, name), strict=True)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP) or not has_file(folder, name):
            raise
        text = f"{label}: {name} is a link to nothing. Download the model again"
        raise UnsafeModelError(text) from error
    if not any(_lies_in(target, place) for place in (root, *_cache_of(root))):
        raise UnsafeModelError(
            f"{label}: {name} is a link out of the model's folder, and what it holds could end in "
            "a result that is published. Put the file itself there (a hard link will do)"
        )
    return Path(target)


def _lies_in(target: str, folder: str) -> bool:
    return os.path.commonpath([target, folder]) == folder


def _cache_of(root: str) -> Iterator[str]:
    """Where links of a snapshot in the Hub's cache lead: the model's blobs, or those of all models.

    `hub/models--org--name/snapshots/COMMIT` is a snapshot. Its `blobs` are no link themselves:
    whoever packs a folder could let them lead anywhere.
    """
    snapshots, _ = os.path.split(root)
    model, last = os.path.split(snapshots)
    cache, name = os.path.split(model)
    if last == "snapshots" and name.startswith("models--"):
        stores = (os.path.join(place, "blobs") for place in (model, cache))
        yield from (store for store in stores if os.path.realpath(store) == store)


def _no_file(label: str, name: str) -> str:
    return f"{label}: {name} is no regular file but a folder, pipe or device. Remove it"


def read_file(folder: Path, name: str, label: str) -> bytes:
    """The content of a small file of a model folder; arguments and errors as `open_file`.

    Raises:
        UnsafeModelError: it is longer than such a file can be, too.
    """
    descriptor = open_file(folder, name, label)
    try:
        size = os.fstat(descriptor).st_size
        limit = TOKENIZER_BYTES if name.startswith(TOKENIZER_NAMES) else JSON_BYTES
        if size > limit:
            raise UnsafeModelError(
                f"{label}: {name} has {size} bytes, expected at most {limit}. Download the model "
                "again"
            )
        return read_all(descriptor, size)
    finally:
        os.close(descriptor)


def read_text(folder: Path, name: str, label: str) -> str:
    """The text of a small file; `ValueError` where it is not plain UTF-8. Else as `read_file`."""
    text = read_file(folder, name, label).decode("utf-8")
    if text.startswith("\ufeff"):
        raise ValueError("it starts with a byte order mark, which loaders refuse")
    return text


def read_all(descriptor: int, size: int) -> bytes:
    """So many bytes of an open file, or fewer where it ends before."""
    return b"".join(chunks(descriptor, 0, size))


def chunks(descriptor: int, offset: int, size: int) -> Iterator[bytes]:
    """Some bytes of an open file, part by part; fewer where it ends before."""
    while size > 0 and (part := os.pread(descriptor, min(size, CHUNK_BYTES), offset)):
        yield part
        size, offset = size - len(part), offset + len(part)


def read_into(descriptor: int, target: NDArray[np.uint8], offset: int) -> bool:
    """Fill a buffer from a file; False where the file ends before."""
    done = 0
    while done < len(target):  # a signal can end a read early
        count = os.preadv(descriptor, [target[done:].data], offset + done)
        if count == 0:
            return False
        done += count
    return True


def write_all(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    """Write into an open file; `OSError` if it cannot all be written."""
    view = memoryview(content)
    while len(view):
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def write_file(path: Path, content: Iterable[bytes]) -> None:
    """Make a file and bring it to the disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        end = 0
        for part in content:
            write_all(descriptor, part, end)
            end += len(part)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reserve(descriptor: int, size: int) -> None:
    """Give an open file this size, and take the disk space for it.

    A full disk shows here, and not in the middle of the work.
    """
    os.ftruncate(descriptor, size)
    if size and hasattr(os, "posix_fallocate"):  # macOS has no such call
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:  # some file systems cannot say beforehand
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise


def check_space(sizes: Mapping[Path, int], output_dir: Path) -> None:
    """Whether files can become as long as they are going to be.

    Args:
        sizes: by file, which may be there in part; all in folders of one disk, which exist.
        output_dir: what the error is about.

    Raises:
        OSError: the disk has too little room (ENOSPC).
    """
    place = os.statvfs(next(iter(sizes)).parent)
    needs = {path: -(-size // place.f_frsize) * place.f_frsize for path, size in sizes.items()}
    missing = sum(max(0, need - _allocated(path)) for path, need in needs.items())
    need, free = sum(needs.values()), place.f_bavail * place.f_frsize
    if missing > free:
        there = need - missing
        have = f" ({there:,} of them are there already)" if there else ""
        raise OSError(
            errno.ENOSPC,
            f"{output_dir}: the result needs {need:,} bytes{have}, the disk has {free:,} free. "
            "Make room or choose another place",
        )


def _allocated(path: Path) -> int:
    """Disk space that a file takes; 0 where there is none."""
    try:
        return os.lstat(path).st_blocks * 512
    except FileNotFoundError:
        return 0


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
