"""What the site has beyond the Markdown under docs: README's sections, and a page for each module.

A paragraph of a page that is nothing but a link to a Markdown file outside docs, or to a section
of it, is replaced by that text. So it is written once, and the page has a link where no site is
built. Other links to such a text lead to the page that has it.

Pages of the reference are made of docstrings; a module that is a command also shows its `--help`.
"""

import contextlib
import importlib
import inspect
import io
import itertools
import os
import posixpath
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from griffe import Extension, Module, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMMANDS = {main.split(":")[0]: command for command, main in PROJECT["scripts"].items()}
VERBS = {"lora-llama": ("fold", "merge", "extract"), "llama-merge": ("serve",)}
REFERENCE = "reference/{}.md"
LINK = re.compile(r"(?<=\]\()(?!https:)([^)#\s]*)(#[^)\s]*)?(?=\))")
PLACE = re.compile(r"^\[[^]\n]+\]\(((?:\.\./)+\w+\.md)(?:#([\w-]+))?\)$", re.MULTILINE)
JOINT = re.compile(r"^( +)(\w+(?:, \w+)+)(: .*(?:\n\1 +.*)*)", re.MULTILINE)
CODE_OR_MARK = re.compile(r'`[^`]*`|^>>>.*|<(?=\w)|(?<=")\*|\*(?=")', re.MULTILINE)
PLAIN = {"<": "&lt;", "*": r"\*"}
DOCTEST = re.compile(r"^>>>.*(?:\n.+)*", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the reference, which the navigation names."""
    for path in pages_of(config.nav):
        module = Path(path).stem
        if path == REFERENCE.format(module) and not files.get_file_from_path(path):
            files.append(File.generated(config, path, content=reference(module)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in the texts of other files, and lead links to them to the pages that have them."""
    here = posixpath.dirname(page.file.src_uri)
    homes = homes_of(Path(config.docs_dir))

    def to_home(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", here, link[1]))
        if not link[1] or target.startswith("docs/"):
            return link[0]
        home = homes.get((target, (link[2] or "")[1:]))
        return link[0] if home is None else posixpath.relpath(home, here)

    def text_of(place: re.Match[str]) -> str:
        file = posixpath.normpath(posixpath.join("docs", here, place[1]))
        return LINK.sub(lambda link: moved(link, file, here), section(ROOT / file, place[2]))

    return LINK.sub(to_home, PLACE.sub(text_of, markdown))


def moved(link: re.Match[str], file: str, here: str) -> str:
    """A link of a file at the root, for a page in a folder of docs."""
    return posixpath.relpath(link[1] or file, posixpath.join("docs", here)) + (link[2] or "")


def homes_of(docs: Path) -> dict[tuple[str, str], str]:
    """The pages that have the texts of other files; a page by file and anchor."""
    return {
        ((page.parent / place[1]).resolve().relative_to(ROOT).as_posix(), place[2] or ""): (
            page.relative_to(docs).as_posix()
        )
        for page in sorted(docs.rglob("*.md"))
        for place in PLACE.finditer(page.read_text())
    }


def section(path: Path, anchor: str | None = None) -> str:
    """What stands under a heading of a Markdown file, up to the next one; or under its title.

    Raises:
        ValueError: it has no such heading.
    """
    lines = path.read_text().splitlines()
    heads = [*headings(lines), (len(lines), "")]
    if anchor is None:
        return "\n".join(lines[heads[0][0] + 1 :])
    for (first, title), (stop, _) in itertools.pairwise(heads):
        if slug(title) == anchor:
            return "\n".join(lines[first + 1 : stop])
    raise ValueError(f"{path.name} has no section #{anchor}")


def headings(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Numbers of the lines that are headings, with their titles; blocks of code have none."""
    in_code = False
    for number, line in enumerate(lines):
        in_code ^= line.startswith("```")
        if not in_code and line.startswith("#"):
            yield number, line.lstrip("# ")


def slug(title: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def pages_of(nav: Any) -> list[str]:
    """The paths that a navigation names."""
    if isinstance(nav, str):
        return [nav]
    return [path for each in nav for path in pages_of(each if isinstance(nav, list) else nav[each])]


def reference(module: str) -> str:
    """The page of a module."""
    text = f"---\ntitle: {module}\n---\n\n::: {module}\n"
    if module.endswith("_llama"):  # drivers are made at run time, so only an import shows them
        text += "    options:\n      force_inspection: true\n      members:\n"
        text += "".join(f"        - {name}\n" for name in functions_of(module))
    if command := COMMANDS.get(module):
        for verb in ("", *VERBS.get(command, ())):
            name = f"{command} {verb}".strip()
            text += f"\n## Command `{name}`\n\n```text\n{help_of(module, name)}```\n"
    return text


def functions_of(module: str) -> list[str]:
    """The functions that a module makes for others."""
    found = inspect.getmembers(importlib.import_module(module), inspect.isfunction)
    return [n for n, each in found if each.__module__ == module and not n.startswith("_")]


def help_of(module: str, command: str) -> str:
    """What a command prints for `--help`."""
    name, *verb = command.split()
    printed = io.StringIO()
    with (
        patch.object(sys, "argv", [name, *verb, "--help"]),
        patch.dict(os.environ, COLUMNS="100"),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        importlib.import_module(module).main()
    return printed.getvalue()


def as_markdown(docstring: str) -> str:
    """A docstring as griffe and Markdown read it.

    Arguments that are described together become one entry each, examples blocks of code, "<name>"
    is no tag, and "*.mlp.*" no emphasis.
    """
    text = JOINT.sub(each_alone, docstring)
    text = CODE_OR_MARK.sub(lambda found: PLAIN.get(found[0], found[0]), text)
    return DOCTEST.sub(lambda found: f"```pycon\n{found[0]}\n```", text)


def each_alone(joint: re.Match[str]) -> str:
    """An entry of several arguments as one for each."""
    return "\n".join(f"{joint[1]}{name}{joint[3]}" for name in joint[2].split(", "))


class Docstrings(Extension):  # type: ignore[misc]
    """Docstrings as Markdown; of a command the first paragraph, as `--help` has the others."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Change the docstring of a module."""
        if pkg.docstring and pkg.name in COMMANDS:
            pkg.docstring.value = pkg.docstring.value.split("\n\n")[0]
        self.on_object(obj=pkg)

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Change the docstring of a class or function."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
