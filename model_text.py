"""Texts of models as people see them: in a terminal, and on a page that needs no network."""

import html
import json
import os
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FIRST_ISOLATE, POP_ISOLATE = "\u2068", "\u2069"
"""Around a text whose direction is its own: Arabic stays whole beside what is written in Latin."""

JOINERS = "\u200c\u200d\u200e\u200f"
"""Letters without a width that belong to words: Persian and Urdu, emoji, and marks of direction."""


def printable(text: str) -> str:
    """A text in which what would act on a terminal, or begin a new line, is escaped."""
    allowed = (FIRST_ISOLATE, POP_ISOLATE, *JOINERS)
    return "".join(
        each if each.isprintable() or each in allowed else repr(each)[1:-1] for each in text
    )


def isolated(text: str) -> str:
    """A text from a model, which keeps its direction whatever stands beside it, line by line."""
    lines = text.replace(FIRST_ISOLATE, "").replace(POP_ISOLATE, "").split("\n")
    if text.isascii():  # which has no other direction
        return "\n".join(map(printable, lines))
    return "\n".join(f"{FIRST_ISOLATE}{printable(line)}{POP_ISOLATE}" for line in lines)


def cleaned(text: str) -> str:
    """A text of several lines, in each of which what would act on a terminal is escaped."""
    return "\n".join(map(printable, text.split("\n")))


def shown_name(name: str) -> str:
    """A name beside others in a line: one that is not in Latin letters alone is isolated."""
    return isolated(name.replace("\n", " "))


def padded_name(name: str, width: int) -> str:
    """A name, filled up with spaces to a width in columns of a terminal."""
    return shown_name(name) + " " * (width - name_width(name))


def name_width(name: str) -> int:
    """How many columns of a terminal a name takes.

    >>> [name_width(name) for name in ("base", "نموذج", "می\\u200cرود", "模型", "a\\x1b")]
    [4, 5, 5, 4, 5]
    """
    letters = printable(name.replace("\n", " "))  # as it is shown
    without = sum(each in JOINERS or unicodedata.category(each) in "MnMe" for each in letters)
    wide = sum(unicodedata.east_asian_width(each) in "WF" for each in letters)
    return len(letters) - without + wide


def numbered(names: Sequence[str]) -> list[str]:
    """Names that all differ: one that comes again gets a number.

    >>> numbered(["a", "b", "a", "a (2)"])
    ['a', 'b', 'a (2)', 'a (2) (2)']
    """
    found: dict[str, None] = {}
    for name in names:
        new, number = name, 1
        while new in found:
            number += 1
            new = f"{name} ({number})"
        found[new] = None
    return [*found]


def say(text: str, *, error: bool = False) -> None:
    """Print a text; a stream that has not all of its letters gets their numbers instead."""
    stream = sys.stderr if error else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    encoded = cleaned(text).encode(encoding, "backslashreplace")
    print(encoded.decode(encoding), file=stream, flush=True)


STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 84rem; padding: 0 1rem;
  color: #1b1f24; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.what { color: #57606a; max-width: 50rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
"""
"""Of every page."""


def html_page(title: str, body: str, style: str) -> str:
    """A page in one file; `body` and `style`, which comes after that of every page, as they are."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{html.escape(cleaned(title))}</title>\n<style>{STYLE}{style}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def write_page(target: Path, content: Mapping[str, Any], page: str) -> tuple[Path, Path]:
    """Write `target`.json and `target`.html, and return both.

    Raises:
        OSError: one of them exists, or cannot be written.
    """
    paths = check_page_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    paths[0].write_text(text + "\n", encoding="utf-8")
    paths[1].write_text(page, encoding="utf-8")
    return paths


def check_page_target(target: Path) -> tuple[Path, Path]:
    """The two files of a page; `OSError` if one exists, or they cannot be written."""
    if not target.name:
        raise ValueError(f"{target} is a folder; name the files to write in it, as {target}/seen")
    stem = target.with_suffix("") if target.suffix in (".json", ".html") else target
    paths = stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".html")
    for path in paths:
        if path.exists():
            raise FileExistsError(f"{path}: exists already. Choose another name, or remove it")
    folder = next(each for each in target.absolute().parents if each.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise PermissionError(f"{folder}: {target} cannot be written there. Choose another name")
    return paths
