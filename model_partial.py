"""Where a result is built: a hidden folder beside the output, with which a stopped run goes on.

    .OUT.partial/
        plan.json       what is being made; written before anything else
        blocks.jsonl    which rows of it are there, with checksums, and what was found out
        model/          the result, as far as it is there
        reserve         disk space for what is written at the end
        earlier/        results that this one is made of
        small/          small files of those of which no weights are written

One process at a time works in it: it holds a lock on the folder, which ends with the process. At
the end `model` is given the name of the output, and the rest is removed. Nothing in it is
believed when a run goes on: rows are there if their checksums say so, and everything is made anew
if `plan.json` is of anything else.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from model_errors import ModelCompatibilityError, OutputBusyError
from model_files import check_space, read_all, reserve, sync_folder, write_all, write_file

PLAN, JOURNAL, MODEL, RESERVE = "plan.json", "blocks.jsonl", "model", "reserve"
EARLIER, SMALL = "earlier", "small"
_OURS = (RESERVE, f"{PLAN}.new", JOURNAL, MODEL, EARLIER, SMALL, PLAN)
"""All that there is in such a folder; the plan last, without which the rest is nothing."""

LONGEST_NAME = 255
"""Bytes of a file's name, at most."""

_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}
"""What file managers leave in every folder that is looked at."""

_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EBADF, errno.EINVAL)
"""What some network file systems say, which know no locks on folders."""

SHOWN = 3
"""Differences that are named."""

_FUTILE = (ModelCompatibilityError, ValueError, TypeError)
"""After these errors the same run would end in the same way."""


def check_output_dir(output_dir: Path) -> None:
    """Raise unless `output_dir` is free: not there, or an empty folder.

    A complete folder takes its place by being renamed, which works with no link or mount point.

    Raises:
        FileExistsError: it is not free.
        ValueError: its name is too long.
    """
    if (length := len(os.fsencode(_partial_name(output_dir)))) > LONGEST_NAME:
        raise ValueError(
            f"{output_dir}: the name of the output is {length - LONGEST_NAME} bytes too long; "
            f"{LONGEST_NAME} is most, with .partial behind it"
        )
    if output_dir.is_symlink() or _is_mount_point(output_dir):
        raise FileExistsError(
            f"{output_dir}: the output is a link or a mount point. Name a new folder inside it"
        )
    if output_dir.is_dir() and not any(output_dir.iterdir()):
        return
    if output_dir.exists():
        raise FileExistsError(
            f"{output_dir}: the output exists already. Choose another name or remove it first"
        )


def bytes_there(output_dir: Path) -> int:
    """What an output, or what a stopped run has left for it, takes on the disk by now."""
    folders = (output_dir, output_dir.with_name(_partial_name(output_dir)))
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files)


def _partial_name(output_dir: Path) -> str:
    return f".{output_dir.name}.partial"


def _is_mount_point(path: Path) -> bool:
    """Also of a folder that is mounted a second time, which `os.path.ismount` does not see."""
    if os.path.ismount(path):
        return True
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    except OSError:  # not Linux
        return False
    escaped = os.path.realpath(path).replace("\\", "\\134").replace(" ", "\\040")
    return any(line.split(" ")[4] == escaped for line in mounts.splitlines())


def tidy(output_dir: Path) -> None:
    """Remove what a run has left that was killed right after it had finished an output."""
    partial = PartialFolder(output_dir, resume=True, output_is_there=True)
    if partial.path.is_dir():
        with contextlib.suppress(OutputBusyError), partial:
            pass


class PartialFolder:
    """The folder in which one output is built, locked for this process in a `with` block.

    Where the block ends before `publish`, what has been recorded stays for a later run, if that
    could end better.

    Args:
        output_dir: the folder to make; it must not exist, or be empty.
        resume: keep what a stopped run has left. Otherwise it is removed.
        tell: is told at once what the user should know.
        keep: False if no later run can go on with it.
        output_is_there: it need not be free, as nothing will be made.

    Attributes:
        output_dir: absolute.
        path: the folder.
        model: in it, what will be the output.
        earlier, small: in it, folders for results that this one is made of, and for small files of
            others; the second is empty at the beginning.
        plan, journal, reserve: in it, the files with the plan and with records, and one that takes
            disk space.
        tell: as given.
        notes: what the user should know of it.

    Raises:
        FileExistsError: the output is not free, or something else has the name of the folder.
        OutputBusyError: another process is making this output.
        OSError: the place cannot be written.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        resume: bool = False,
        tell: Callable[[str], None] = lambda _: None,
        keep: bool = True,
        output_is_there: bool = False,
    ) -> None:
        self._must_be_free = not output_is_there
        self._check_output_dir(output_dir)
        self.output_dir = _absolute(output_dir)
        self.path = self.output_dir.with_name(_partial_name(self.output_dir))
        self.model = self.path / MODEL
        self.earlier = self.path / EARLIER
        self.small = self.path / SMALL
        self.plan = self.path / PLAN
        self.journal = self.path / JOURNAL
        self.reserve = self.path / RESERVE
        self.notes: tuple[str, ...] = ()
        self.tell = tell
        self._resume = resume
        self._keep = keep
        self._lock = self._journal = -1
        self._journal_end = 0
        self._publishing = False
        self._parents_made: list[Path] = []

    def __enter__(self) -> Self:
        try:
            for parent in reversed(self.output_dir.parents):
                if not parent.exists():
                    with contextlib.suppress(FileExistsError):  # another process was faster
                        parent.mkdir()
                        self._parents_made.append(parent)
            self._take_lock()
            self._check_output_dir(self.output_dir)  # whoever held the lock may have finished it
            self._look_through()
            self._clear([SMALL])
        except BaseException:
            if self._lock >= 0:  # it is ours
                with contextlib.suppress(OSError):  # it is not empty: something is kept in it
                    self.path.rmdir()
            self._close()
            self._remove_parents()
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            futile = error is None or not self._keep or isinstance(error, _FUTILE)
            if futile or self._is_published() or not self._has_records():
                self._clear(_OURS)
                self.path.rmdir()
                self._remove_parents()
            elif error is not None and not hasattr(error, "__notes__"):
                error.add_note(
                    f"what is done so far is kept in {self.path}; the same run with --resume "
                    "(resume=True) goes on with it"
                )
        except OSError as trouble:  # the next run removes what is left
            self._note(f"{self.path} could not be removed ({trouble}). Remove it")
        finally:
            self._close()

    def begin(self, plan: Mapping[str, Any]) -> bool:
        """Say what is going to be made.

        Args:
            plan: JSON; whatever decides a byte of the result.

        Returns:
            Whether the folder holds the beginning of just that. If not, it is empty now, but for
            earlier results, which have plans of their own.
        """
        text = json.dumps(plan, indent=1, sort_keys=True).encode()
        there = self._read(PLAN)
        if there == text and self.model.is_dir():
            return True
        if there is not None and self._has_records():
            self._note(
                f"what a stopped run had left for {self.output_dir} was of another merge (not the "
                f"same: {_difference(there, plan)}), so all is made anew"
            )
        self._clear([name for name in _OURS if name not in (EARLIER, SMALL)])
        write_file(self.path / f"{PLAN}.new", [text])
        os.rename(self.path / f"{PLAN}.new", self.path / PLAN)
        self.model.mkdir()
        sync_folder(self.path)
        return False

    def records(self) -> list[Any]:
        """What was recorded, in order, up to the first record that is not whole."""
        found: list[Any] = []
        self._journal_end = 0
        for value, end in _records(self._read(JOURNAL) or b""):
            found.append(value)
            self._journal_end = end
        return found

    def open_records(self, nbytes: int) -> int:
        """Begin to record, after what `records` has found; returns the descriptor.

        Args:
            nbytes: so much of the disk is taken now, beside what the records take already.
        """
        if self._journal < 0:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._journal = os.open(self.journal, flags, 0o666)
        reserve(self._journal, self._journal_end + nbytes)
        return self._journal

    def check_space(self, nbytes: int) -> None:
        """Whether there is so much room on the disk, beside what the folder takes already.

        Raises:
            OSError: there is too little (ENOSPC).
        """
        files = [path for path in self.path.rglob("*") if path.is_file()]
        sizes = {path: path.stat().st_size for path in files}
        room = max(0, nbytes - sum(sizes.values()))
        check_space({**sizes, self.path / "more": room}, self.output_dir)

    def record(self, value: Any) -> None:
        """Add a JSON value to the records."""
        text = json.dumps(value, separators=(",", ":")).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        write_all(self._journal, line, self._journal_end)
        self._journal_end += len(line)

    def begin_reserve(self, nbytes: int) -> None:
        """Take so much of the disk, until `end_reserve`."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.reserve, flags, 0o666)
        try:
            reserve(descriptor, nbytes)
        finally:
            os.close(descriptor)

    def end_reserve(self) -> None:
        """Give it back, to the small files that are written now."""
        self.reserve.unlink(missing_ok=True)

    def publish(self) -> None:
        """Give the finished folder its name; the rest is removed when the block ends.

        Raises:
            FileExistsError: something has taken its place meanwhile.
        """
        check_output_dir(self.output_dir)
        with contextlib.suppress(FileNotFoundError):  # an empty folder is replaced by one like it
            os.chmod(self.model, stat.S_IMODE(self.output_dir.stat().st_mode))
        sync_folder(self.model)
        self._publishing = True
        os.rename(self.model, self.output_dir)
        sync_folder(self.output_dir.parent)
        while self._parents_made:
            sync_folder(self._parents_made.pop().parent)

    def _is_published(self) -> bool:
        return self._publishing and not self.model.exists()

    def _note(self, text: str) -> None:
        self.notes += (text,)
        self.tell(text)

    def _check_output_dir(self, output_dir: Path) -> None:
        if self._must_be_free:
            check_output_dir(output_dir)

    def _take_lock(self) -> None:
        """Make the folder and lock it; it may vanish meanwhile, when another process ends."""
        while True:
            with contextlib.suppress(FileExistsError):
                self.path.mkdir()
            try:
                self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                self._try_lock()
                if os.path.samestat(os.stat(self.path), os.fstat(self._lock)):
                    return
            except FileNotFoundError:
                pass
            except NotADirectoryError:  # also for a link
                raise FileExistsError(
                    f"{self.path}: is in the way, and no folder that a run has left. Move it away"
                ) from None
            self._close()

    def _try_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close()
            raise OutputBusyError(
                f"{self.output_dir}: another run is making it now. Wait for it, or choose another "
                "output"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self._note(
                f"the disk of {self.output_dir} "
                "knows no locks: start no second run with this output"
            )

    def _look_through(self) -> None:
        """Keep or remove what is there; refuse what no run has left."""
        for litter in {*os.listdir(self.path)} & _LITTER:
            (self.path / litter).unlink(missing_ok=True)
        names = os.listdir(self.path)
        if strange := sorted({*names} - {*_OURS}):
            raise FileExistsError(
                f"{self.path}: holds {strange[0]!r}, which no merge puts there. Move it away"
            )
        if names and not self._resume:
            if self._has_records():
                self._note(
                    f"what a stopped run had left for {self.output_dir} was removed; --resume "
                    "(resume=True) would have gone on with it"
                )
            self._clear(_OURS)

    def _has_records(self) -> bool:
        """Whether anything is done, here or of an earlier result."""
        if self.earlier.is_dir() and any(self.earlier.iterdir()):
            return True
        return next(_records(self._read(JOURNAL) or b""), None) is not None

    def _read(self, name: str) -> bytes | None:
        """A file in the folder; None where there is none."""
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(self.path / name, flags)
        except FileNotFoundError:
            return None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None  # no run has left it; it is removed with the others
            return read_all(descriptor, os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)

    def _clear(self, names: Collection[str]) -> None:
        for name in names:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _remove_parents(self) -> None:
        """Remove the parents that were made for the output."""
        while self._parents_made:
            with contextlib.suppress(OSError):  # someone else has put something there meanwhile
                self._parents_made.pop().rmdir()

    def _close(self) -> None:
        """Close the records, and end the lock."""
        for descriptor in (self._journal, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._journal = self._lock = -1


def _records(content: bytes) -> Iterator[tuple[Any, int]]:
    """Every whole record, and where it ends."""
    end = 0
    for line in content.splitlines(keepends=True):
        checksum, _, text = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
            return
        end += len(line)
        yield json.loads(text), end


def _difference(there: bytes, plan: Mapping[str, Any]) -> str:
    """Which parts of a plan that was found are not as in the plan that is wanted.

    What follows from others comes behind them in the plan, so the first ones say it.
    """
    try:
        found = json.loads(there)
        parts = [*_differing(found, json.loads(json.dumps(plan)))]
    except (ValueError, AttributeError):
        parts = []
    more = ", ..." if len(parts) > SHOWN else ""
    return ", ".join(parts[:SHOWN]) + more or "its plan"


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Names of entries that differ; those in other entries with the names of these."""
    for name in dict.fromkeys([*wanted, *found]):
        old, new = found.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from (f"{name}: {each}" for each in _differing(old, new))
        elif old != new:
            yield name


def _absolute(path: Path) -> Path:
    """A path without links but maybe its last part: `..` is where the system takes it to be."""
    if path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent), path.name)
