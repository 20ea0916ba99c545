"""Texts of models as people see them: in a terminal, and on a page that needs no network."""

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FIRST_ISOLATE, POP_ISOLATE = "\u2068", "\u2069"
"""Around a text whose direction is its own: Arabic stays whole beside what is written in Latin."""


def printable(text: str) -> str:
    """A text in which what would act on a terminal, or begin a new line, is escaped."""
    allowed = (FIRST_ISOLATE, POP_ISOLATE)
    return "".join(
        each if each.isprintable() or each in allowed else repr(each)[1:-1] for each in text
    )


def isolated(text: str) -> str:
    """A text from a model, which keeps its direction whatever stands beside it, line by line."""
    lines = text.replace(FIRST_ISOLATE, "").replace(POP_ISOLATE, "").split("\n")
    return "\n".join(f"{FIRST_ISOLATE}{printable(line)}{POP_ISOLATE}" for line in lines)


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
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def write_page(target: Path, content: Mapping[str, Any], page: str) -> tuple[Path, Path]:
    """Write `target`.json and `target`.html, and return both.

    Raises:
        FileExistsError: one of them exists.
    """
    paths = check_page_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    paths[0].write_text(text + "\n", encoding="utf-8")
    paths[1].write_text(page, encoding="utf-8")
    return paths


def check_page_target(target: Path) -> tuple[Path, Path]:
    """The two files of a page; `FileExistsError` if one exists."""
    if not target.name:
        raise ValueError(f"{target} is a folder; name the files to write in it, as {target}/seen")
    stem = target.with_suffix("") if target.suffix in (".json", ".html") else target
    paths = stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".html")
    for path in paths:
        if path.exists():
            raise FileExistsError(f"{path}: exists already. Choose another name, or remove it")
    return paths
