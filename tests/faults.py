"""Merges in processes of their own, in which an operation on files fails, or the process dies."""

import builtins
import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BY_PATH = (
    *("open", "mkdir", "rmdir", "unlink", "remove", "rename", "replace", "stat", "lstat"),
    *("listdir", "scandir", "readlink", "statvfs"),
)
BY_DESCRIPTOR = (
    *("pread", "preadv", "pwrite", "read", "write", "fsync", "fdatasync", "ftruncate"),
    *("posix_fallocate", "fstat"),
)
CAN_FILL_A_DISK = ("open", "mkdir", "rename", "pwrite", "write", "fsync", "fdatasync", "ftruncate")
CAN_FILL_A_DISK += ("posix_fallocate",)
CAN_BE_SHORT = ("pread", "preadv", "pwrite", "read", "write")

KINDS = ("EIO", "ENOSPC", "short", "SIGKILL")


class Faults:
    """Counts operations on files below a folder, in this process, and lets one of them fail.

    Args:
        root: the folder.
        kind: one of `KINDS`.
        at: number of the operation, from 1; 0 for none.
    """

    def __init__(self, root: Path, kind: str = "EIO", at: int = 0) -> None:
        self.root = os.path.realpath(root)
        self.kind = kind
        self.at = at
        self.count = 0
        self.happened = ""
        self._opened: set[int] = set()

    def install(self) -> None:
        """Take the place of the system's functions, for good."""
        for name in (*BY_PATH, *BY_DESCRIPTOR):
            setattr(os, name, self._watched(name, getattr(os, name)))
        plain = builtins.open

        def opened(file: Any, *args: Any, **named: Any) -> Any:
            if self._is_below(file):
                self._step("open", lambda: None)
            return plain(file, *args, **named)

        builtins.open = io.open = opened  # type: ignore[assignment]

    def _is_below(self, target: Any, dir_fd: int | None = None) -> bool:
        if isinstance(target, int):
            return target in self._opened
        if dir_fd is not None and not os.path.isabs(os.fspath(target)):
            return dir_fd in self._opened
        path = os.path.join(os.getcwd(), os.fsdecode(target))
        return os.path.normpath(path).startswith(self.root)

    def _watched(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            dir_fd = named.get("dir_fd", named.get("src_dir_fd"))
            if not args or not self._is_below(args[0], dir_fd):
                return plain(*args, **named)
            short = self._step(name, lambda: None)
            if short and name in CAN_BE_SHORT:
                return _shortened(name, plain, args)
            found = plain(*args, **named)
            if name == "open":
                self._opened.add(found)
            return found

        return call

    def _step(self, name: str, _: Any) -> bool:
        """Count an operation; let it fail if it is its turn. Whether it shall fall short."""
        if self.kind == "ENOSPC" and name not in CAN_FILL_A_DISK:
            return False
        if self.kind == "short" and name not in CAN_BE_SHORT:
            return False
        self.count += 1
        if self.count != self.at:
            return False
        self.happened = name
        if self.kind == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "short":
            return True
        number = getattr(errno, self.kind)
        raise OSError(number, os.strerror(number), f"({name} no. {self.at})")


def _shortened(name: str, plain: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Half of what was asked for, at least one byte."""
    descriptor, what, *others = args
    if name in ("pread", "read"):
        return plain(descriptor, max(1, what // 2), *others)
    if name == "preadv":
        (buffer,) = what
        return plain(descriptor, [buffer[: max(1, len(buffer) // 2)]], *others)
    return plain(descriptor, memoryview(what)[: max(1, len(what) // 2)], *others)


def run_apart(
    work: Callable[[], int], log: Path, faults: Faults | None = None, seconds: int = 60
) -> int:
    """Do some work in a forked process; its exit status, or minus the signal that killed it.

    The parent must have no threads. With faults, the last line of the log says how many
    operations there were, if the process could say so.
    """
    child = os.fork()
    if child == 0:
        status = 99
        try:
            signal.alarm(seconds)
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
            if faults is not None:
                faults.install()
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            if faults is not None:
                print(f"operations: {faults.count} {faults.happened}")
            sys.stdout.flush()
            os._exit(status)
    _, found = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(found)


def operations(log: Path) -> int:
    """How many operations a run with faults counted."""
    lines = [line for line in log.read_text().splitlines() if line.startswith("operations:")]
    return int(lines[-1].split()[1])


def content_of(folder: Path) -> Mapping[str, bytes]:
    """All files below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class TooSlowError(BaseException):
    """A case takes too long."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """`TooSlowError` if the block takes longer."""

    def stop(*_: object) -> None:
        raise TooSlowError(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
