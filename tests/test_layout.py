"""The import rules: which layer may use which."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
OTHER_DRIVERS = (
    "merge",
    "generate",
    "merger_config",
    "merger_options",
    "merger_validation",
    "model_merger",
)
SCRIPTS = ["start"]  # for a checkout; what is installed has `llama-merge serve`
SERVICE = sorted((ROOT / "service").glob("*.py"))
DRIVERS = [n for n in MODULES if n.endswith("_llama") or n in OTHER_DRIVERS]
EVAL = [n for n in MODULES if n.startswith("eval_") and n not in DRIVERS]
MERGE = [n for n in MODULES if n.startswith("merge_")]
# Model Stock is a method, ModelMerger a driver; what else begins with model_ is about models.
MODEL = [
    n
    for n in MODULES
    if n.startswith("model_") and not n.startswith("model_stock_") and n not in DRIVERS
]
MATH = [n for n in MODULES if n.endswith("_utils") and n not in MODEL]


def nodes_of(node: ast.AST, *, functions: bool):
    """All nodes below one; without functions, those that run when a module is imported."""
    for child in ast.iter_child_nodes(node):
        later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        later |= isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if functions or not later:
            yield child
            yield from nodes_of(child, functions=functions)


def imports(source: str, *, top_level: bool = False) -> set[str]:
    """First parts of all imported names; `top_level` leaves out those inside functions."""
    found = set()
    for node in nodes_of(ast.parse(source), functions=not top_level):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def imports_of(module: str, *, top_level: bool = False) -> set[str]:
    return imports(MODULES[module].read_text(), top_level=top_level)


def test_every_module_belongs_to_a_layer():
    assert set(MODULES) == {*MATH, *MODEL, *MERGE, *EVAL, *DRIVERS, *SCRIPTS}


@pytest.mark.parametrize("module", MATH)
def test_math_imports_only_torch_the_standard_library_and_math(module):
    assert imports_of(module) <= {"torch", *sys.stdlib_module_names, *MATH}


@pytest.mark.parametrize("module", MODEL)
def test_model_modules_import_no_math_and_no_later_layer(module):
    assert not imports_of(module) & {*MATH, *MERGE, *EVAL, *DRIVERS}


@pytest.mark.parametrize("module", MERGE)
def test_merge_modules_import_no_driver(module):
    assert not imports_of(module) & {*EVAL, *DRIVERS}


@pytest.mark.parametrize("module", EVAL)
def test_what_measures_a_finished_model_merges_none(module):
    assert not imports_of(module) & {*MATH, *MERGE, *DRIVERS}


def test_the_stream_knows_no_math():
    assert not imports_of("merge_stream") & set(MATH)


def test_the_service_is_imported_by_what_starts_it_alone():
    assert [n for n in MODULES if "service" in imports_of(n)] == ["merge", "start"]
    assert "service" not in imports_of("merge", top_level=True)


@pytest.mark.parametrize("path", SERVICE, ids=lambda path: path.stem)
def test_the_service_imports_nothing_that_is_large(path):
    large = {"torch", "numba", "transformers", "huggingface_hub", *EVAL}
    assert not imports(path.read_text(), top_level=True) & large


@pytest.mark.parametrize("module", sorted(MODULES))
def test_transformers_is_never_imported_at_the_top(module):
    heavy = {"transformers", "huggingface_hub", "tokenizers", "tqdm"}
    assert not imports_of(module, top_level=True) & heavy


def test_every_module_is_installed():
    text = (ROOT / "pyproject.toml").read_text()
    assert [n for n in MODULES if f'"{n}"' not in text] == SCRIPTS


def test_the_import_finder_sees_imports_inside_functions():
    source = "if 1:\n    import os.path\ndef f():\n    from transformers import X\n"
    assert imports(source) == {"os", "transformers"}
    assert imports(source, top_level=True) == {"os"}
