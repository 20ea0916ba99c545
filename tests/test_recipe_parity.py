"""Published recipes and random ones, beside what mergekit makes of them (benchmarks/recipes.py)."""

import json

import pytest
from tiny_checkpoints import make_llama

import merge
from benchmarks.random_recipes import LAYERS, MODELS
from benchmarks.random_recipes import METHODS as SET
from benchmarks.recipe_models import SIZES, make_recipe_models
from benchmarks.recipe_parity import (
    AT_RANDOM,
    EXACT_AS_WRITTEN,
    LIMIT,
    RANDOM,
    RECIPES,
    compare_recipe,
    in_float32,
)
from merge_grammar import read_recipes
from merge_plan import open_plan
from merge_yaml import write_yaml


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Two folders with all models: as they are usually stored, and in float32."""
    folder = tmp_path_factory.mktemp("recipes")
    make_recipe_models(folder / "written")
    make_recipe_models(folder / "float32", "float32")
    return folder


@pytest.mark.parametrize("kind", ["written", "float32"])
@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_published_recipe_gives_what_mergekit_makes_of_it(
    models, monkeypatch, tmp_path, file, kind
):
    monkeypatch.chdir(models / kind)
    text = file.read_text()
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(text if kind == "written" else in_float32(text))
    assert merge.main([str(recipe), str(tmp_path / "out"), "--quiet"]) == 0
    found = compare_recipe(f"{kind}/{file.stem}", tmp_path / "out")
    assert found.others == []
    if any(word in file.stem for word in AT_RANDOM):
        return
    if kind == "float32" or file.stem in EXACT_AS_WRITTEN:
        assert found.most <= LIMIT


# What is resolved for each tensor

DRAWN = json.loads(RANDOM.read_text())
THEIRS = {
    "lam": "lambda",
    "weights": "weight",
    "densities": "density",
    "gammas": "gamma",
    "epsilons": "epsilon",
}


@pytest.fixture(scope="session")
def random_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    for seed, name in enumerate(MODELS):
        make_llama(
            folder / name, layers=LAYERS, seed=seed, vocab_size=24, dtype="float32",
            base=folder / MODELS[0] if seed else None, tokenizer=True, **SIZES,
        )  # fmt: skip
    return folder


def resolved_here(recipe):
    """As mergekit tells it: by tensor, the inputs and what the method is given for them."""
    found = {}
    with open_plan(recipe, weights=False) as plan:
        for task in plan.tasks:
            inputs = [plan.sources[each.model].label for each in task.inputs]
            found[task.name] = (inputs, task.parameters, plan.base is not None)
    return found


def as_mergekit_tells(parameters, inputs, has_base):
    """Our parameters of a tensor in mergekit's words; what it has beside them has no effect."""
    told = {}
    for name, value in parameters.items():
        key = THEIRS.get(name, name)
        if name == "rescale":
            value = value == "l1"
        if isinstance(value, tuple) or key == "scale":
            models = inputs[has_base:]
            value = dict(zip(models, value if isinstance(value, tuple) else (value,), strict=True))
        told[key] = value
    return told


@pytest.mark.parametrize("name", DRAWN["recipes"])
def test_every_tensor_has_the_parameters_that_mergekit_resolves(random_models, monkeypatch, name):
    monkeypatch.chdir(random_models)
    text = write_yaml(DRAWN["recipes"][name])
    recipe = read_recipes(text)[0].recipe
    ours, theirs = resolved_here(recipe), DRAWN["resolved"][name]
    assert ours.keys() == theirs.keys()
    for tensor, (inputs, parameters, has_base) in ours.items():
        assert set(inputs) == set(theirs[tensor]["inputs"]), tensor
        told = as_mergekit_tells(parameters, inputs, has_base)
        keys = told.keys() & theirs[tensor]["parameters"].keys()
        assert keys >= {*SET[DRAWN["recipes"][name]["merge_method"]]} - {"rescale"}
        wanted = {key: theirs[tensor]["parameters"][key] for key in keys}
        assert {key: told[key] for key in keys} == wanted, tensor
