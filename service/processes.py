"""Who is who among processes: whether the one that held a job is still there."""

import os
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

BOOT = Path("/proc/sys/kernel/random/boot_id")


class Process(NamedTuple):
    """A process, told from all others that had or will have its number.

    Attributes:
        boot: the start of the machine that it belongs to; empty where that is not known.
        pid: its number.
        born: when it began, in the system's ticks; 0 where that is not known.
    """

    boot: str
    pid: int
    born: int

    def is_alive(self) -> bool:
        """Whether it still runs."""
        if self.boot != boot_id():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's, which has got its number
            return False
        return _born(self.pid) == self.born and not _is_over(self.pid)


def this_process() -> Process:
    """The process that asks."""
    return Process(boot_id(), os.getpid(), _born(os.getpid()))


@cache
def boot_id() -> str:
    """What tells one start of the machine from the next; empty if the system does not say."""
    try:
        return BOOT.read_text().strip()
    except OSError:
        return ""


def uptime() -> float:
    """Seconds on a clock that all processes share, and that nobody sets."""
    return time.monotonic()


def _stat(pid: int) -> list[str]:
    """What Linux says of a process, from its state on; nothing elsewhere."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _born(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[19]) if fields else 0


def _is_over(pid: int) -> bool:
    """Whether it has ended, and its parent has not asked yet how."""
    return _stat(pid)[:1] in (["Z"], ["X"])
