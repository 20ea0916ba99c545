"""The notebooks run from top to bottom as they stand, and with what their users exchange."""

import json
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tiny_checkpoints import make_llama, read_tensors, tensor_hashes

from model_text import isolated
from model_verify import verify_folder
from ties_llama import ties_merge_llama_to_folder

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny_llamas"
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in PATHS]
OUTPUTS = {
    "ties": {"ties-merged"},
    "slerp": {"slerp-merged"},
    "recipe": {"recipe-merged", "recipe.yml"},
    "evaluate": {"evaluate-merged", "compared.json", "compared.html"},
    "lora": {"lora-merged", "lora-adapter", "lora-folded", "lora-extracted"},
}
"""What each makes in the folder in which it runs."""

SPECIALISTS = [TINY / name for name in ("capitals", "elements", "animals")]
RIGHT = ["capital: france = paris", "symbol: gold = Au", "young: dog = puppy"]
ARABIC = "مرحبا، كيف حالك؟"
QUANTUM = "Explain the concept of quantum entanglement to a 5-year-old."

each_notebook = pytest.mark.parametrize("name", NAMES)


def read(name: str):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def cell_of(book, cell_id: str):
    (cell,) = (each for each in book.cells if each.id == cell_id)
    return cell


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder beside the examples, as notebooks/ is, and what a kernel of it is started with."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "run").mkdir()
    for variable in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(tmp_path / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "run"


def run(name: str, folder: Path, until: str | None = None, **parameters):
    """A notebook whose cells have run in a kernel, up to the one named `until`.

    Parameters are set in a cell behind that of the defaults, as papermill does it.
    """
    book = read(name)
    (place,) = (at for at, each in enumerate(book.cells) if "parameters" in tags_of(each))
    values = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    book.cells.insert(place + 1, nbformat.v4.new_code_cell(values))
    if until is not None:
        book.cells = book.cells[: book.cells.index(cell_of(book, until)) + 1]
    execute(book, folder)
    return book


def execute(book, folder: Path) -> None:
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(book, timeout=300, kernel_name="python3", resources=where).execute()


def tags_of(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def printed(book, cell_id: str) -> str:
    outputs = cell_of(book, cell_id).outputs
    return "".join(each.text for each in outputs if each.get("name") == "stdout")


def answers(book, cell_id: str) -> list[str]:
    """Prompts with their answers, without the isolates around both."""
    lines = printed(book, cell_id).splitlines()
    return [re.sub("[\u2068\u2069]", "", each).strip() for each in lines if each.startswith(" ")]


def rounded(model: Path) -> dict[str, torch.Tensor]:
    return {name: values.half() for name, values in read_tensors(model).items()}


def same_tensors(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# What they are


def test_there_is_a_notebook_for_each_output_that_is_looked_at():
    assert {*NAMES} == OUTPUTS.keys()


@each_notebook
def test_a_notebook_is_clean(name):
    text = (ROOT / "notebooks" / f"{name}.ipynb").read_text()
    book = nbformat.reads(text, as_version=4)
    nbformat.validate(book)
    assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    assert (book.nbformat, book.nbformat_minor) == (4, 5)
    assert book.metadata.kernelspec.name == "python3"
    assert [tags_of(each) for each in book.cells if tags_of(each)] == [["parameters"]]
    for cell in book.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@each_notebook
def test_every_notebook_has_the_same_cells_for_the_same_ends(name):
    ours, others = read(name), read("ties")
    ends = ("install", "check", "ask", "ask-merged", "pipeline")
    for shared in ends[:2] if name == "evaluate" else ends:
        assert cell_of(ours, shared).source == cell_of(others, shared).source
    assert "max_disk" in cell_of(ours, "parameters").source
    assert f'from_pretrained("{name}-merged"' in cell_of(ours, "next").source


def test_readme_lists_the_notebooks():
    rows = re.findall(
        r"^\| \[notebooks/(\w+).ipynb\]\((.+?)\)", (ROOT / "README.md").read_text(), re.M
    )
    assert sorted(name for name, _ in rows) == NAMES
    assert all((ROOT / path).is_file() for _, path in rows)


# As they stand


def run_as_it_stands(name: str, folder: Path):
    """A notebook that was run whole, whose results are sound."""
    book = run(name, folder)
    assert {path.name for path in folder.iterdir()} == OUTPUTS[name]
    for output in OUTPUTS[name]:
        if "." not in output:
            assert verify_folder(folder / output).problems == ()
    assert verify_folder(folder / f"{name}-merged").dtypes == ("float16",)
    assert printed(book, "check").startswith(f"{name}-merged: sound")
    if name != "evaluate":
        assert printed(book, "pipeline") == f"{RIGHT[0]}\n"
    return book


def test_the_evaluation_notebook_sets_a_merge_beside_what_it_was_made_of(folder):
    book = run_as_it_stands("evaluate", folder)
    shown = printed(book, "compare").splitlines()
    assert [line.split()[:2] for line in shown[1:5]] == [
        ["base", "base"], ["capitals", "source"], ["elements", "source"],
        ["evaluate-merged", "merge"],
    ]  # fmt: skip
    assert isolated(ARABIC) in "\n".join(shown)
    merged = [isolated(line) for line in ("paris", "Au")]
    assert [line.split()[1] for line in shown if line.startswith("  evaluate-merged")][:2] == merged
    (page,) = cell_of(book, "page").outputs[:1]
    assert f'<td class=text dir="auto">{ARABIC}</td>' in page.data["text/html"]
    assert page.data["text/html"] == (folder / "compared.html").read_text(encoding="utf-8")
    again = run("evaluate", folder, until="merge")
    assert "was finished before" in printed(again, "merge")


def test_the_ties_notebook_asks_a_base_that_knows_nothing_and_a_merge_that_knows_all(folder):
    book = run_as_it_stands("ties", folder)
    asked = answers(book, "ask-sources")  # three prompts, of the base and of each specialist
    known = [{*asked[at : at + 3]} & {*RIGHT} for at in range(0, 12, 3)]
    assert known == [set(), *({right} for right in RIGHT)]
    assert answers(book, "ask-merged") == RIGHT


def test_the_slerp_notebook_merges_two_tables(folder):
    book = run_as_it_stands("slerp", folder)
    assert answers(book, "ask-merged") == RIGHT[:2]
    assert re.search(r"^arc: \d+ tensors, straight line: \d+$", printed(book, "arc"), re.M)


def test_the_recipe_notebook_shows_how_a_recipe_is_understood_and_where_models_disagree(folder):
    book = run_as_it_stands("recipe", folder)
    assert answers(book, "ask-merged") == RIGHT[:2]
    assert "profile: mergekit" in printed(book, "recipe")
    assert "vocabulary: {mode: base}" in printed(book, "recipe")
    shown = printed(book, "findings")
    assert re.search(r"^whole model +changed +0\.1\d+ +0\.1\d+ +conflict \d+\.\d%$", shown, re.M)
    assert re.search(r"^layer 1 .*\n(.*\n)*projection mlp.up_proj ", shown, re.M)


def test_the_lora_notebook_merges_folds_extracts_and_loads_with_peft(folder):
    book = run_as_it_stands("lora", folder)
    assert answers(book, "ask-merged") == RIGHT
    assert answers(book, "ask-sources")[3:] == RIGHT
    assert answers(book, "peft") == RIGHT
    assert "rank 24" in printed(book, "adapter")
    assert "exact but for rounding" in printed(book, "adapter")
    assert "rank 16" in printed(book, "extract")


# What is exchanged


def test_the_kernel_is_the_interpreter_of_the_tests(folder):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import sys\nsys.executable")])
    execute(book, folder)
    assert book.cells[0].outputs[0].data["text/plain"] == repr(sys.executable)


@each_notebook
def test_every_plan_is_held_against_the_room_there_is(name):
    cells = [each.source for each in read(name).cells]
    (place,) = (at for at, each in enumerate(cells) if "check_room" in each and "print" in each)
    assert cells[place].endswith("\nplan.check_room(max_disk=max_disk)")
    assert not [each for each in cells[:place] if "merge_recipe(" in each or ".merge()" in each]


@pytest.mark.parametrize("name", ["ties", "recipe"])
def test_without_room_nothing_is_written(name, folder):
    with pytest.raises(CellExecutionError, match=r"on the disk, and 1\.00 KB are there"):
        run(name, folder, until="merge", max_disk="1KB")
    assert {path.name for path in folder.iterdir()} <= {"recipe.yml"}


def test_density_and_lam_are_those_of_ties(folder):
    run("ties", folder, until="merge", density=0.2, lam=0.7, OUTPUT="out")
    settings = {"densities": [0.2] * 3, "lam": 0.7, "dtype": "float16", "progress": False}
    ties_merge_llama_to_folder(TINY / "base", SPECIALISTS, output_dir=folder / "same", **settings)
    assert tensor_hashes(folder / "out") == tensor_hashes(folder / "same")
    ties_merge_llama_to_folder(
        TINY / "base", SPECIALISTS, output_dir=folder / "other", **{**settings, "lam": 1.0}
    )
    assert tensor_hashes(folder / "out") != tensor_hashes(folder / "other")


@pytest.mark.parametrize(("merge_ratio", "model"), [(0.0, "capitals"), (1.0, "elements")])
def test_the_ends_of_slerp_are_the_models(folder, merge_ratio, model):
    run("slerp", folder, until="merge", merge_ratio=merge_ratio)
    assert same_tensors(read_tensors(folder / "slerp-merged"), rounded(TINY / model))


def test_a_notebook_that_is_run_again_goes_on(folder):
    first = run("slerp", folder, until="merge")
    again = run("slerp", folder, until="arc")
    assert "was finished before" in printed(again, "merge")
    assert "was finished before" not in printed(first, "merge")
    assert re.search(r"^arc: \d+ tensors", printed(again, "arc"), re.M)


@pytest.fixture
def unequal(tmp_path):
    """A base, a model of its vocabulary, and one with two tokens more; all can chat."""
    base = make_llama(tmp_path / "base", tokenizer=True)
    same = make_llama(tmp_path / "same", seed=1, base=base, tokenizer=True)
    more = make_llama(tmp_path / "more", seed=2, base=base, tokenizer=True, vocab_size=50)
    return base, same, more


@pytest.mark.parametrize(("vocabulary", "rows"), [(None, 50), ("min", 48)])
def test_ties_of_models_whose_vocabularies_differ_in_size(folder, unequal, vocabulary, rows):
    base, same, more = map(str, unequal)
    given = {} if vocabulary is None else {"vocabulary": vocabulary}
    run("ties", folder, "check", base_model_name=base, model_paths=[same, more], **given)
    merged, owner = read_tensors(folder / "ties-merged"), rounded(unequal[2])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert len(merged[name]) == rows
        assert torch.equal(
            merged[name][48:], owner[name][48:rows]
        )  # a new token, as its owner has it
    config = json.loads((folder / "ties-merged" / "config.json").read_text())
    assert config["vocab_size"] == rows


def test_slerp_of_models_whose_vocabularies_differ_in_size_is_asked_in_arabic_by_its_chat_template(
    folder, unequal
):
    _, same, more = map(str, unequal)
    book = run("slerp", folder, MODEL_1_URL=same, MODEL_2_URL=more, prompts=[ARABIC, QUANTUM])
    assert "vocabulary  50 rows, 50 tokens, by 'max'" in printed(book, "plan")
    assert verify_folder(folder / "slerp-merged").vocab_rows == 50
    for cell_id in ("ask-sources", "ask-merged"):
        assert isolated(ARABIC) in printed(book, cell_id)
        assert isolated(QUANTUM) in printed(book, cell_id)


def test_what_is_wrong_with_a_recipe_is_refused_with_its_line(folder):
    wrong = "merge_method: ties\nbase_modle: base\n"
    with pytest.raises(CellExecutionError, match=r"recipe\.yml.*2.*base_model"):
        run("recipe", folder, until="merge", RECIPE=wrong)


# The cell that installs


def install(**settings: str) -> None:
    """Run the cell here, with its own settings replaced."""
    source = cell_of(read(NAMES[0]), "install").source
    for key, value in settings.items():
        source, count = re.subn(rf'^{key} = ".*?"', f"{key} = {value!r}", source, flags=re.M)
        assert count == 1
    exec(compile(source, "install", "exec"), {})


def test_what_can_be_imported_is_not_installed(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was run"))
    install()


@pytest.fixture
def not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv("PIP_DRY_RUN", "1")  # whatever the cell asks for, nothing changes here


def write_wheel(folder: Path, name: str, version: str, *requirements: str) -> Path:
    """A wheel without modules."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {each}" for each in requirements]
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return path


def test_what_is_installed_is_a_constraint(not_installed, monkeypatch):
    run_before, commands, constraints = subprocess.run, [], []

    def record(command, **settings):
        commands.append(command[3:])
        if "-c" in command:
            constraints.append(Path(command[command.index("-c") + 1]).read_text())
            return subprocess.CompletedProcess(command, 0)
        return run_before(command, **settings)

    monkeypatch.setattr(subprocess, "run", record)
    install(PACKAGE="llama-merge", WHEELS="wheels")
    listed, installed = commands
    assert listed == ["list", "--format=freeze"]
    assert installed[0] == "install"
    assert installed[-1] == "llama-merge"
    assert installed[-4:-1] == ["--no-index", "--find-links", "wheels"]
    assert not [each for each in installed if "upgrade" in each or "force" in each]
    for name in ("torch", "numpy", "transformers"):
        assert f"{name}=={version(name)}" in constraints[0].splitlines()


def test_a_package_that_would_replace_numpy_is_not_installed(not_installed, tmp_path):
    write_wheel(tmp_path, "numpy", "99.0")
    fits = write_wheel(tmp_path, "fits", "1.0", "numpy>=1.26")
    replaces = write_wheel(tmp_path, "replaces", "1.0", "numpy>=99")
    install(PACKAGE=str(fits), WHEELS=str(tmp_path))
    with pytest.raises(
        RuntimeError, match=rf"(?s)pip cannot add .*\(constraint\) numpy=={version('numpy')}"
    ):
        install(PACKAGE=str(replaces), WHEELS=str(tmp_path))
