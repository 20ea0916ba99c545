"""What becomes of NaN and infinity in the models."""

import json
import math

import numpy as np
import pytest
import torch
from test_merge_to_folder import EVERY_CASE, make_family, recipe_of, run
from tiny_checkpoints import make_llama, read_tensors, save_tensors

from merge_methods import METHODS
from merge_run import merge_to_folder
from model_errors import ModelCompatibilityError
from ties_llama import main, ties_merge_llama

UP, EMBEDDING = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
PLACES = {(UP, 3, 5): math.nan, (UP, 7, 1): -math.inf, (EMBEDDING, 0, 0): math.inf}
WITH_BASE = [
    case
    for case, (method, parameters) in EVERY_CASE.items()
    if METHODS[method].base == "required" or parameters.get("from_base")
]


def spoil(folder, places=PLACES):
    """Put values into a model; the folder."""
    tensors = read_tensors(folder)
    for (name, row, column), value in places.items():
        tensors[name][row, column] = value
    save_tensors(folder, tensors, 1)
    return folder


def test_the_tensor_the_count_and_the_first_element_are_named(tmp_path):
    base, models = make_family(tmp_path)
    spoil(models[1])
    with pytest.raises(ModelCompatibilityError) as caught:
        run("ties", base, models, tmp_path / "out")
    assert (
        f"{models[1]}: {EMBEDDING} has NaN or infinite weights: row 0, column 0 (element 0, inf)"
    ) in str(caught.value)
    spoil(models[1], {(EMBEDDING, 0, 0): 0.0})
    with pytest.raises(ModelCompatibilityError) as caught:
        run("ties", base, models, tmp_path / "out")
    assert (
        f"{UP} has NaN or infinite weights: 2 of 384, the first at row 3, column 5 (element 53"
        in (str(caught.value))
    )


@pytest.mark.parametrize("case", WITH_BASE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_base_takes_the_bases_values(tmp_path, case, dtype):
    """As if the model had never had others; also where the method reads several times."""
    method, parameters = EVERY_CASE[case]
    base, models = make_family(tmp_path, (dtype,) * 4)
    mended = read_tensors(models[0])
    for name, row, column in PLACES:
        mended[name][row, column] = read_tensors(base)[name][row, column]
    save_tensors(models[0], mended, 1)
    run(method, base, models, tmp_path / "mended", parameters=parameters)
    spoil(models[0])
    report = run(method, base, models, tmp_path / "out", parameters=parameters, nan_policy="base")
    files = [tmp_path / name / "model.safetensors" for name in ("out", "mended")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert report.findings[UP]["not_finite"] == {str(models[0]): 2}
    assert report.findings[EMBEDDING]["not_finite"] == {str(models[0]): 1}
    text = f"{models[0]}: 3 values (in 2 of its tensors) are NaN or infinite"
    assert f"{text}; the base's were taken instead" in report.notes
    saved = json.loads((tmp_path / "out/merge_report.json").read_text())
    assert saved["findings"][UP]["not_finite"] == {"model-2": 2}
    assert saved["recipe"]["nan_policy"] == "base"


@pytest.mark.parametrize(("method", "parameters"), EVERY_CASE.values(), ids=EVERY_CASE)
def test_what_is_let_through_stays_where_it_is_or_ends_the_merge(tmp_path, method, parameters):
    base, models = make_family(tmp_path)
    spoil(models[0])
    recipe = recipe_of(
        method, parameters, base, models, output_dir=tmp_path / "out", dtype="float16",
        nan_policy="propagate",
    )  # fmt: skip
    try:
        report = merge_to_folder(recipe, threads=2, progress=False)
    except ModelCompatibilityError as error:
        assert "is not finite, although it is in all models" in str(error)  # noqa: PT017
        return
    note = f"{models[0]}: 3 values (in 2 of its tensors) are NaN or infinite; they were let through"
    assert note in report.notes
    for name, tensor in read_tensors(tmp_path / "out").items():
        broken = {(row, column) for other, row, column in PLACES if other == name}
        assert {*map(tuple, np.argwhere(~np.isfinite(tensor.numpy())).tolist())} == broken
        bits = tensor.view(torch.int16)[tensor.isnan()]
        assert {*bits.tolist()} <= {0x7E00}


def test_a_linear_merge_lets_through_exactly_what_is_broken(tmp_path):
    base, models = make_family(tmp_path)
    spoil(models[0])
    run("linear", base, models, tmp_path / "out", nan_policy="propagate")
    found = read_tensors(tmp_path / "out")
    assert [math.isnan(found[UP][3, 5]), found[UP][7, 1].item()] == [True, -math.inf]
    assert sum(int((~tensor.isfinite()).sum()) for tensor in found.values()) == 3


@pytest.mark.parametrize("policy", ["error", "base", "propagate"])
def test_what_a_merge_brings_forth_itself_always_ends_it(tmp_path, policy):
    base, models = make_family(tmp_path)
    text = r"weight: row \d+, column \d+ \(-?inf; .*does not fit float16"
    with pytest.raises(ModelCompatibilityError, match=text):
        run(
            "task_arithmetic", base, models, tmp_path / "out", dtype="float16",
            parameters={"lam": 1e9}, nan_policy=policy,
        )  # fmt: skip


def test_a_base_that_is_broken_cannot_replace(tmp_path):
    base, models = make_family(tmp_path)
    spoil(base, {(UP, 2, 2): math.nan})
    with pytest.raises(ModelCompatibilityError, match=f"base: {UP} has NaN or infinite weights"):
        run("ties", base, models, tmp_path / "out", nan_policy="base")


def test_rows_that_another_model_lacks_are_its_own(tmp_path):
    """A row that stands in for a missing one is not counted as the model's."""
    base, models = make_family(
        tmp_path, changes=({"vocab_size": 40}, {"vocab_size": 48}, {}, {}), vocab_size=40
    )
    spoil(models[0], {(EMBEDDING, 44, 1): math.nan, (EMBEDDING, 3, 1): math.nan})
    report = run("ties", base, models, tmp_path / "out", nan_policy="base")
    assert report.findings[EMBEDDING]["not_finite"] == {str(models[0]): 1}


def test_the_command_and_the_function_in_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_llama(tmp_path / "base")
    spoil(make_llama(tmp_path / "a", seed=1, base=tmp_path / "base"))
    command = ["base", "--ft_models", "a", "--save", "out", "--quiet"]
    assert main(command) == 3
    assert main([*command, "--nan-policy", "base"]) == 0
    assert "a: 3 values (in 2 of its tensors) are NaN or infinite" in capsys.readouterr().out
    merged = ties_merge_llama("base", ["a"], nan_policy="base", progress=False)
    assert all(tensor.isfinite().all() for tensor in merged.state_dict().values())


def test_policies_are_checked(tmp_path):
    base, models = make_family(tmp_path)
    with pytest.raises(ValueError, match="nan_policy base needs a base_model, whose values are"):
        run("linear", base, models, tmp_path / "out", nan_policy="base")
    with pytest.raises(ValueError, match=r"unknown nan_policy 'bas'.* Did you mean 'base'?"):
        run("ties", base, models, tmp_path / "out", nan_policy="bas")
