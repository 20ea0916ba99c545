"""How far a merge is, in bytes read: a bar in terminals and notebooks, plain lines elsewhere.

Whoever wants to show it otherwise gives a function instead.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from model_text import printable
from model_utils import format_bytes

SECONDS_BETWEEN_LINES = 10.0

Progress = bool | Callable[[str, int, int], None]
"""Whether to show it on stderr; or a function of what is being done, the bytes done, and all."""


@contextmanager
def progress_bar(
    total: int, description: str, *, show: Progress, done: int = 0
) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes the number of bytes done since its last call.

    Args:
        total: bytes in all.
        description: what is being done.
        show: False for no output at all; a function is told instead, first of what is done.
        done: bytes that an earlier run has done.
    """
    if not show:
        yield lambda _: None
    elif callable(show):
        yield _Told(show, description, total, done).update
    elif sys.stderr.isatty() or _in_notebook():
        from tqdm.auto import tqdm

        shown = {"unit": "B", "unit_scale": True, "mininterval": 0.5, "initial": done}
        with tqdm(total=total, desc=description, **shown) as bar:
            yield _Bar(bar).update
    else:
        yield _Lines(total, description, done).update


def teller(*, show: Progress) -> Callable[[str], None]:
    """Says on stderr at once what cannot wait for the report; nothing, unless progress is shown."""
    on_stderr = show is True
    return lambda text: print(f"note: {printable(text)}", file=sys.stderr) if on_stderr else None


def _in_notebook() -> bool:
    """Whether a Jupyter kernel runs this process; `tqdm.auto` then draws a widget."""
    return "ipykernel" in sys.modules


class _Told:
    """Tells a function how far it is."""

    def __init__(
        self, tell: Callable[[str, int, int], None], description: str, total: int, done: int
    ) -> None:
        self.tell = tell
        self.description = description
        self.total = total
        self.done = done
        self.update(0)

    def update(self, count: int) -> None:
        self.done += count
        self.tell(self.description, self.done, self.total)


class _Bar:
    """A bar whose clock starts with the first bytes: before them, loops may have been compiled."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar
        self.has_begun = False

    def update(self, count: int) -> None:
        if count and not self.has_begun:
            self.has_begun = True
            self.bar.reset()
        self.bar.update(count)


class _Lines:
    """A line at the start of every ten seconds, for logs."""

    def __init__(self, total: int, description: str, done: int) -> None:
        self.total = total
        self.description = description
        self.done = done
        self.first = 0  # what is done when the clock starts
        self.started = self.printed = time.monotonic()

    def update(self, count: int) -> None:
        now = time.monotonic()
        self.done += count
        if not self.first:  # until now, loops may have been compiled
            self.first, self.started = self.done, now
        if now - self.printed < SECONDS_BETWEEN_LINES:
            return
        self.printed = now
        left = ""
        if self.done > self.first:  # a first look at a sample counts for nothing
            since = self.done - self.first
            seconds = (now - self.started) * (self.total - self.done) / since
            left = f", about {seconds:.0f} s left"
        print(
            f"{self.description}: {format_bytes(self.done)} of {format_bytes(self.total)} "
            f"({100 * self.done / self.total:.0f} %){left}",
            file=sys.stderr,
            flush=True,
        )
