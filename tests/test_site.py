"""The documentation site has every page and command, and how-to pages do what they say."""

import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from test_docs import ROOT, SCRIPTS, read
from test_layout import DRIVERS, EVAL, MATH

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
HOW_TO = sorted((DOCS / "how_to").glob("*.md"))
NAV = yaml.safe_load(read(ROOT / "mkdocs.yml"))["nav"]
OTHERS = ("merge_run", "merge_report", "model_prep", "model_vocabulary", "model_inference")
OPTION = re.compile(r"(?<![\w-])--\w[\w-]*")
ISOLATES = str.maketrans("", "", "\N{FIRST STRONG ISOLATE}\N{POP DIRECTIONAL ISOLATE}")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def hooks():
    """The module of the site; it is not among those that are installed."""
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "theme" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_navigation_names_every_page_once(hooks):
    named = hooks.pages_of(NAV)
    assert len({*named}) == len(named)
    assert {path.relative_to(DOCS).as_posix() for path in PAGES} <= {*named}


def test_the_reference_has_every_driver_command_and_part_of_the_math(hooks):
    named = {Path(path).stem for path in hooks.pages_of(NAV) if path.startswith("reference/")}
    assert {*DRIVERS, *MATH, *EVAL, *OTHERS, "model_errors"} <= named
    assert {main.split(":")[0] for main in SCRIPTS.values()} <= named


@pytest.mark.parametrize("command", SCRIPTS)
def test_the_page_of_a_command_has_its_functions_and_its_help(command, hooks):
    module = SCRIPTS[command].split(":")[0]
    page = hooks.reference(module)
    assert f"::: {module}\n" in page
    assert f"\n## Command `{command}`\n\n```text\nusage: {command} [-h]" in page
    if module.endswith("_llama") and module not in ("lora_llama", "eval_llama"):
        assert f"- {module.removesuffix('_llama')}_merge_llama\n" in page
        assert f"- {module.removesuffix('_llama')}_merge_llama_to_folder\n" in page


def test_every_verb_has_its_help(hooks):
    page = hooks.reference("lora_llama")
    assert re.findall("^## Command `(.+)`$", page, re.M) == [
        "lora-llama",
        *(f"lora-llama {verb}" for verb in ("fold", "merge", "extract")),
    ]
    assert set(re.findall(r"\{(fold.*)\}", page)) == {"fold,merge,extract"}


def test_texts_of_other_files_are_put_in_with_their_links(hooks):
    homes = hooks.homes_of(DOCS)
    assert homes["README.md", "choices"] == "choices.md"
    assert homes["CHANGELOG.md", ""] == "changelog.md"
    for file, anchor in homes:
        assert hooks.section(ROOT / file, anchor or None).strip(), (file, anchor)
    text = hooks.section(ROOT / "README.md", "from-python")
    assert "# device_map" in text, "a comment in a block of code is no heading"
    assert "## " not in text
    with pytest.raises(ValueError, match=r"README\.md has no section #nowhere"):
        hooks.section(ROOT / "README.md", "nowhere")


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=name_of)
def test_links_resolve(path, hooks):
    for target, anchor in hooks.LINK.findall(read(path)):
        file = (path.parent / target) if target else path
        assert file.is_file(), target
        if anchor:
            titles = [title for _, title in hooks.headings(read(file).splitlines())]
            assert anchor[1:] in map(hooks.slug, titles), f"{target}{anchor}"


def test_links_are_found(hooks):
    found = hooks.LINK.findall("[a](b.md#c) [d](https://e.org) ![f](g.png) [h](#i)")
    assert found == [("b.md", "#c"), ("g.png", ""), ("", "#i")]


@pytest.mark.parametrize(
    ("written", "read_as"),
    [
        (
            "Args:\n    a, b: two\n        lines.\n    c: one.",
            "Args:\n    a: two\n        lines.\n    b: two\n        lines.\n    c: one.",
        ),
        ("One.\n\n>>> f(1)\n2\n\nTwo.", "One.\n\n```pycon\n>>> f(1)\n2\n```\n\nTwo."),
        ('"<name>" or `<name>`', '"&lt;name>" or `<name>`'),
        ('"*.mlp.*", a * b', r'"\*.mlp.\*", a * b'),
        (">>> f('<a>')\n1", "```pycon\n>>> f('<a>')\n1\n```"),
    ],
)
def test_docstrings_are_shown_as_they_are_meant(written, read_as, hooks):
    assert hooks.as_markdown(written) == read_as


def test_options_in_the_text_of_how_to_pages_exist(hooks):
    known = {
        each
        for main in SCRIPTS.values()
        for each in OPTION.findall(hooks.reference(main.removesuffix(":main")))
    }
    for path in HOW_TO:
        assert {*OPTION.findall(read(path))} - known == set(), path.name


@pytest.mark.parametrize("path", HOW_TO, ids=lambda path: path.stem)
def test_what_a_page_says_to_do_works_and_prints_what_it_shows(path, tmp_path, monkeypatch, capsys):
    """Commands (sh) and Python in the order of the page; then what it shows (text) was printed."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    scope, printed = {}, ""
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", read(path), re.M | re.S):
        if language == "sh":
            for line in block.replace("\\\n", "").splitlines():
                assert run(line, monkeypatch) == 0, line
        elif language == "python":
            exec(compile(block, path.name, "exec"), scope)
        printed += capsys.readouterr().out
        if language == "text":
            lines = {line.strip() for line in printed.translate(ISOLATES).splitlines()}
            assert [line for line in block.splitlines() if line.strip() not in lines] == []


def run(line: str, monkeypatch) -> int:
    """The exit status of a command of ours."""
    command, *arguments = shlex.split(line)
    module, main = SCRIPTS[command].split(":")
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    return getattr(importlib.import_module(module), main)(arguments)
