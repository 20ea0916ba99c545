"""The pages on the methods say what the code does."""

import ast
import doctest
import importlib
import inspect
import itertools
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from merge_arguments import command_parser
from merge_grammar import COMMON_KEYS, MERGEKIT_KEYS, OWN_KEYS, read_recipes
from merge_methods import METHODS
from merge_parameters import PROFILES
from merge_plan import check_recipe
from merge_recipe import make_recipe
from model_chat_templates import CHAT_TEMPLATES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "methods"
INDEX = DOCS / "README.md"
PAGES = {name: DOCS / f"{name}.md" for name in METHODS}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = PROJECT["scripts"]  # command: "module:main"
BASE = {"required": "yes", "none": "no", "optional": "optional"}
SHARES = {"densities": [(0.5, 0.5), (1.0, 1.0)], "select_topk": [0.5, 1.0]}

each_page = pytest.mark.parametrize("method", METHODS)


def read(path: Path) -> str:
    assert path.is_file(), f"{path.relative_to(ROOT)} is missing"
    return path.read_text()


def table(path: Path, columns: str) -> list[dict[str, str]]:
    """The table of a page whose head begins with these columns; a cell by its column's name."""
    lines = read(path).splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith(f"| {columns} |")]
    if not starts:
        return []
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[starts[0] :])
    head, _, *body = ([cell.strip() for cell in row[1:-1].split("|")] for row in rows)
    return [dict(zip(head, cells, strict=True)) for cells in body]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", read(path), re.MULTILINE | re.DOTALL)


def value_of(cell: str):
    """What a cell says: on, off, unset, or a value in backticks."""
    if cell in ("on", "off", "unset"):
        return {"on": True, "off": False, "unset": None}[cell]
    found = re.fullmatch(r"`([^`]+)`", cell)
    assert found, f"not a value: {cell!r}"
    try:
        return ast.literal_eval(found[1])
    except ValueError:
        return found[1]


def by_profile(cell: str) -> dict[str, object]:
    """The values of "mergekit, peft: `1`; paper: on"."""
    found = {}
    for part in filter(None, cell.split("; ")):
        names, value = part.split(": ")
        found |= dict.fromkeys(names.split(", "), value_of(value))
    return found


def differences(method: str, parameter: str) -> dict[str, object]:
    profiles = METHODS[method].profiles
    return {p: profiles[p][parameter] for p in PROFILES if parameter in profiles.get(p, {})}


def commands(path: Path) -> list[list[str]]:
    return [shlex.split(line) for block in blocks(path, "sh") for line in block.splitlines()]


def problems(method: str, base, models, given, **settings) -> list[str]:
    recipe = make_recipe(method, base, models, given, **settings)
    return check_recipe(recipe)[1]


def options_of(method: str):
    return command_parser(method, "")._option_string_actions


def test_every_method_has_a_page_and_there_are_no_others():
    assert {path.stem for path in DOCS.glob("*.md")} == {*METHODS, "README"}


@each_page
def test_the_parameter_table_is_that_of_the_code(method):
    rows = {row["name"].strip("`"): row for row in table(PAGES[method], "name")}
    declared = {parameter.name: parameter for parameter in METHODS[method].parameters}
    assert list(rows) == list(declared)
    options = options_of(method)
    for name, parameter in declared.items():
        row = rows[name]
        default = row["default"].removesuffix(" each")
        assert value_of(default) == parameter.default, name
        assert row["default"].endswith(" each") == parameter.per_model, name
        assert by_profile(row["profiles"]) == differences(method, name), name
        flags = re.findall("`(--[^`]+)`", row["option"])
        assert flags, name
        assert {options[flag].dest for flag in flags} == {name}
        assert all(f"`{choice}`" in row["meaning"] for choice in parameter.choices), name
        assert len(row["meaning"]) > 5, name


@each_page
def test_the_page_has_its_parts_and_its_source(method):
    text = read(PAGES[method])
    heads = re.findall("^## (.+)$", text, re.MULTILINE)
    wanted = ["When", "What can go wrong", "Parameters", "Example", "Elsewhere"]
    assert heads == wanted
    assert blocks(PAGES[method], "text"), "no formula"
    for paper in re.findall(r"arXiv:(\d{4}\.\d{5})", METHODS[method].source):
        assert f"https://arxiv.org/abs/{paper}" in text


@each_page
def test_examples_of_the_command_would_run(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = commands(PAGES[method])
    assert examples
    for command, *arguments in examples:
        module, function = SCRIPTS[command].split(":")
        assert module == f"{method}_llama"
        assert hasattr(importlib.import_module(module), function)
        parsed = vars(command_parser(method, "").parse_args(arguments))
        assert parsed["save"], "an example that merges says where to"
        given = {each.name: parsed[each.name] for each in METHODS[method].parameters}
        profile = parsed["profile"]
        models = parsed["ft_models"]
        assert problems(method, parsed.get("base"), models, given, profile=profile) == []


@each_page
def test_examples_in_python_would_run(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = [block for block in blocks(PAGES[method], "python") if ">>>" not in block]
    assert sources
    for source in sources:
        tree = ast.parse(source)
        scope: dict[str, object] = {}
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), "imports", "exec"), scope)
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert [ast.unparse(call.func) for call in calls] == [f"{method}_merge_llama_to_folder"]
        (call,) = calls
        positional = [ast.literal_eval(argument) for argument in call.args]
        named = {each.arg: ast.literal_eval(each.value) for each in call.keywords}
        signature = inspect.signature(scope[ast.unparse(call.func)])
        bound = signature.bind(*positional, **named).arguments
        given = {p.name: bound[p.name] for p in METHODS[method].parameters if p.name in bound}
        base = bound.get("base_model_path")
        output = {name: bound[name] for name in ("output_dir", "dtype") if name in bound}
        assert problems(method, base, bound["ft_model_paths"], given, **output) == []


@each_page
def test_examples_on_numbers_give_what_they_show(method):
    flags = doctest.NORMALIZE_WHITESPACE
    sources = [block for block in blocks(PAGES[method], "python") if ">>>" in block]
    assert sources
    for source in sources:
        test = doctest.DocTestParser().get_doctest(source, {}, method, str(PAGES[method]), 0)
        assert test.examples
        assert any(example.want for example in test.examples)
        assert doctest.DocTestRunner(optionflags=flags).run(test).failed == 0


def passes_of(method: str) -> set[int]:
    """How often a method can read its inputs, over all its choices."""
    values = []
    for each in METHODS[method].parameters:
        choices = [True, False] if each.kind is bool else each.choices or [each.default]
        values.append(SHARES.get(each.name, choices))
    names = [each.name for each in METHODS[method].parameters]
    count = METHODS[method].passes
    return {count(dict(zip(names, some, strict=True))) for some in itertools.product(*values)}


def test_the_index_lists_every_method():
    rows = table(INDEX, "method | command")
    assert len(rows) == len(METHODS)
    for method, row in zip(METHODS, rows, strict=True):
        declared = METHODS[method]
        command, passes = f"{method.replace('_', '-')}-llama", passes_of(method)
        title = read(PAGES[method]).splitlines()[0].removeprefix("# ")
        exact = declared.fewest == declared.most
        assert declared.most in (None, declared.fewest), "the column has no form for this"
        assert row["method"] == f"[{title}]({method}.md)"
        assert row["command"] == f"`{command}`"
        assert command in SCRIPTS
        assert row["base"] == BASE[declared.base]
        assert row["models"] == f"{declared.fewest}{'' if exact else ' or more'}"
        assert row["passes"] == " to ".join(map(str, sorted({min(passes), max(passes)})))
        assert row["what it does"]


def test_the_index_has_every_difference_of_every_profile():
    found = {}
    for row in table(INDEX, "method | parameter"):
        method = re.fullmatch(r"\[(\w+)\]\((\w+)\.md\)", row["method"])
        assert method
        assert method[1] == method[2]
        name = row["parameter"].strip("`")
        default, *others = (row[profile] for profile in PROFILES)
        (parameter,) = (each for each in METHODS[method[1]].parameters if each.name == name)
        assert value_of(default) == parameter.default, (method[1], name)
        cells = zip(PROFILES[1:], others, strict=True)
        found[method[1], name] = {p: value_of(cell) for p, cell in cells if cell}
    declared = {
        (method, each.name): differences(method, each.name)
        for method in METHODS
        for each in METHODS[method].parameters
        if differences(method, each.name)
    }
    assert found == declared


def test_the_index_names_the_methods_without_a_profile():
    (sentence,) = re.findall(r"^So (.+?) have no profile that differs", read(INDEX), re.M | re.S)
    plain = [method for method in METHODS if not any(METHODS[method].profiles.values())]
    assert re.findall(r"`(\w+)`", sentence) == plain


@pytest.mark.parametrize("page", ["README.md", "docs/recipes.md"])
def test_recipes_on_a_page_are_sound(page):
    recipes = blocks(ROOT / page, "yaml")
    assert recipes
    for text in recipes:
        assert read_recipes(text)


def test_the_page_on_recipes_has_every_key():
    text = read(ROOT / "docs" / "recipes.md")
    for key in (*COMMON_KEYS, *MERGEKIT_KEYS, *OWN_KEYS, *CHAT_TEMPLATES):
        assert key in text, key


def test_the_index_links_every_page():
    assert {f"{method}.md" for method in METHODS} <= set(re.findall(r"\]\(([^)]+)\)", read(INDEX)))


@pytest.mark.parametrize("path", [INDEX, *PAGES.values()], ids=lambda path: path.stem)
def test_options_in_the_text_exist(path):
    """Every `--option` of a page is one of its method's; the index may name any method's."""
    methods = METHODS if path == INDEX else [path.stem]
    known = set().union(*(options_of(method) for method in methods))
    assert set(re.findall(r"(?<![\w-])--\w[\w-]*", read(path))) - known == set()
