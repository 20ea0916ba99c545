"""How far a merge is, in bytes read: a bar in terminals and notebooks, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from model_text import printable
from model_utils import format_bytes

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress_bar(total: int, description: str, *, show: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes the number of bytes done since its last call.

    Args:
        total: bytes in all.
        description: what is being done.
        show: False for no output at all.
    """
    if not show:
        yield lambda _: None
    elif sys.stderr.isatty() or _in_notebook():
        from tqdm.auto import tqdm

        with tqdm(total=total, desc=description, unit="B", unit_scale=True, mininterval=0.5) as bar:
            yield _Bar(bar).update
    else:
        yield _Lines(total, description).update


def teller(*, show: bool) -> Callable[[str], None]:
    """Says on stderr at once what cannot wait for the report; nothing, unless progress is shown."""
    return lambda text: print(f"note: {printable(text)}", file=sys.stderr) if show else None


def _in_notebook() -> bool:
    """Whether a Jupyter kernel runs this process; `tqdm.auto` then draws a widget."""
    return "ipykernel" in sys.modules


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

    def __init__(self, total: int, description: str) -> None:
        self.total = total
        self.description = description
        self.done = self.first = 0
        self.started = self.printed = time.monotonic()

    def update(self, count: int) -> None:
        now = time.monotonic()
        if not self.first:  # until now, loops may have been compiled
            self.first, self.started = count, now
        self.done += count
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
