"""A folder's files as one ZIP that is never written down: stored, with 64-bit sizes where needed.

Where every byte of it stands follows from the names, sizes and checksums of the files, so the
archive has a known length, is the same each time, and any part of it can be asked for: a download
that broke off goes on where it stopped.

Format: APPNOTE.TXT 6.3.10, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14 to
4.3.16 (its end, with zip64), 4.5.3 (zip64 extra field).
"""

import os
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, NamedTuple

UTF8, STORED, UNIX = 0x0800, 0, 3
VERSION, VERSION_64 = 20, 45
ZIP64 = 0x0001
MARK_16, MARK_32 = 0xFFFF, 0xFFFFFFFF
"""Stand for numbers that are given with 64 bits elsewhere."""
MOST = MARK_32 - 1
"""The largest number that is not."""
DATE = (1 << 5) | 1
"""1 January 1980, the first day that there is: nothing of the archive depends on a clock."""
LAYOUT = 1
"""Another number where archives of the same files would have other bytes."""
MODE = 0o100644 << 16
"""A regular file that all may read."""


class Entry(NamedTuple):
    """A file of the archive.

    Attributes:
        name: in the archive.
        size: in bytes.
        crc32: of its content.
    """

    name: str
    size: int
    crc32: int


@dataclass(frozen=True)
class Span:
    """Bytes of a file.

    Attributes:
        path: of the file.
        size: of all of it, when the folder was finished.
        start: the first byte.
        stop: the byte after the last.
    """

    path: Path
    size: int
    start: int
    stop: int

    def open(self) -> BinaryIO:
        """The file, unbuffered.

        Raises:
            OSError: it is not there any more, or is not what it was.
        """
        file = open_plain(self.path)
        if os.fstat(file.fileno()).st_size != self.size:
            file.close()
            raise OSError(f"{self.path.name} has changed")
        return file

    @property
    def is_there(self) -> bool:
        """Whether the file is there, as large as it was."""
        try:
            return self.path.lstat().st_size == self.size
        except OSError:
            return False

    @property
    def length(self) -> int:
        """How many bytes they are."""
        return self.stop - self.start

    def part(self, start: int, stop: int) -> "Span":
        """Some of them, counted from the first."""
        return Span(self.path, self.size, self.start + start, self.start + stop)


class Archive:
    """The archive of a folder.

    Args:
        folder: where the files lie, by the last parts of their names.
        entries: the files, in the order of the archive.

    Attributes:
        length: in bytes.
    """

    def __init__(self, folder: Path, entries: Sequence[Entry]) -> None:
        self._parts: list[bytes | Span] = []
        directory, position = b"", 0
        for entry in entries:
            head = _local_header(entry)
            directory += _directory_entry(entry, position)
            self._parts += [head, Span(folder / Path(entry.name).name, entry.size, 0, entry.size)]
            position += len(head) + entry.size
        self._parts.append(directory + _end(len(entries), len(directory), position))
        *self._begins, self.length = accumulate(map(_length, self._parts), initial=0)

    def parts(self, start: int, stop: int) -> Iterator[bytes | Span]:
        """What the archive consists of from byte `start` up to `stop`."""
        first = max(0, bisect_right(self._begins, start) - 1)
        for part, begin in zip(self._parts[first:], self._begins[first:], strict=True):
            low, high = max(0, start - begin), min(_length(part), stop - begin)
            if low < high:
                yield part.part(low, high) if isinstance(part, Span) else part[low:high]


@dataclass(frozen=True)
class File:
    """A file of a folder, by itself.

    Attributes:
        path: where it is.
        length: in bytes, as it was when the folder was finished.
        sha256: of its content; empty if it is not known.
    """

    path: Path
    length: int
    sha256: str = ""

    def parts(self, start: int, stop: int) -> Iterator[bytes | Span]:
        """Its bytes from `start` up to `stop`."""
        yield Span(self.path, self.length, start, stop)


def open_plain(path: Path) -> BinaryIO:
    """Open a regular file, and nothing that a link leads to; unbuffered."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    return os.fdopen(descriptor, "rb", buffering=0)


def _length(part: bytes | Span) -> int:
    return part.length if isinstance(part, Span) else len(part)


def _local_header(entry: Entry) -> bytes:
    name = entry.name.encode()
    large = entry.size > MOST
    extra = struct.pack("<HHQQ", ZIP64, 16, entry.size, entry.size) if large else b""
    size = MARK_32 if large else entry.size
    version = VERSION_64 if large else VERSION
    fixed = (version, UTF8, STORED, 0, DATE, entry.crc32, size, size, len(name), len(extra))
    return struct.pack("<4sHHHHHIIIHH", b"PK\3\4", *fixed) + name + extra


def _directory_entry(entry: Entry, position: int) -> bytes:
    name = entry.name.encode()
    large, far = entry.size > MOST, position > MOST
    wide = [entry.size, entry.size] * large + [position] * far
    extra = struct.pack(f"<HH{len(wide)}Q", ZIP64, 8 * len(wide), *wide) if wide else b""
    size = MARK_32 if large else entry.size
    version = VERSION_64 if wide else VERSION
    made_by = UNIX << 8 | version
    fixed = (made_by, version, UTF8, STORED, 0, DATE, entry.crc32, size, size)
    rest = (len(name), len(extra), 0, 0, 0, MODE, MARK_32 if far else position)
    return struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", *fixed, *rest) + name + extra


def _end(count: int, size: int, position: int) -> bytes:
    """What closes the directory of `count` entries and `size` bytes that begins at `position`."""
    wide = b""
    is_wide = count >= MARK_16 or size > MOST or position > MOST
    if is_wide:
        record = (44, UNIX << 8 | VERSION_64, VERSION_64, 0, 0, count, count, size, position)
        wide = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", *record)
        wide += struct.pack("<4sIQI", b"PK\6\7", 0, position + size, 1)
    few = MARK_16 if is_wide else count
    bounds = (few, few, *((MARK_32, MARK_32) if is_wide else (size, position)))
    return wide + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, *bounds, 0)
