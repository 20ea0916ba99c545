"""What clients ask for becomes the recipe that it means, or is refused with its place."""

import re
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from merge_yaml import RecipeError
from service.requests import (
    Names,
    RequestError,
    model_ids,
    problems_of,
    recipe_text,
    referred,
    stages_of,
)
from service.schemas import ExperimentRequest

IDS = ("base", "code", "chat", "code-lora", "zephyr-7b-beta", "gone")
NAMES = Names(
    references={**{name: name for name in IDS}, "zephyr-7b-beta": "HuggingFaceH4/zephyr-7b-beta"},
    bases={"code-lora": "base"},
    unavailable={"gone": "is not on this machine"},
)
BOTH = [{"id": "code", "weight": 0.7}, {"id": "chat", "weight": 0.3}]
ROOT = Path(__file__).resolve().parent.parent


def asked(**request):
    return recipe_text(ExperimentRequest(**request), NAMES)


def recipe(**request):
    """The recipe that a request means."""
    (stage,) = stages_of(asked(**request)[0], NAMES.references)
    return stage.recipe


def problems(**request):
    with pytest.raises(RequestError) as caught:
        asked(**request)
    return [tuple(problem) for problem in caught.value.problems]


def test_weights_stand_beside_the_models():
    found = recipe(method="linear", models=BOTH)
    assert found.models == ("code", "chat")
    assert found.parameters["weights"] == (0.7, 0.3)


def test_a_form_and_the_recipe_that_it_becomes_mean_the_same():
    text, _ = asked(method="ties", base_model="base", models=BOTH, parameters={"density": 0.3})
    assert asked(recipe=text)[0] == text
    assert model_ids(text) == ("base", ["code", "chat"])


def test_alpha_is_the_position_of_slerp():
    assert recipe(method="slerp", models=[{"id": "code"}, {"id": "chat"}],
                  parameters={"alpha": 0.25}).parameters["t"] == 0.25  # fmt: skip


def test_weights_of_slerp_are_told_as_the_alpha_that_they_come_to():
    text, notes = asked(method="slerp", models=BOTH)
    (stage,) = stages_of(text, {})
    assert stage.recipe.parameters["t"] == pytest.approx(0.3)
    assert notes == ["alpha is 0.3, the second model's share of the weights"]


def test_weights_beside_alpha_are_noted():
    text, notes = asked(method="slerp", models=BOTH, parameters={"alpha": 0.5})
    assert stages_of(text, {})[0].recipe.parameters["t"] == 0.5
    assert "SLERP takes no weights" in notes[0]


def test_a_drop_rate_is_what_density_leaves():
    models = [{"id": "code", "drop_rate": 0.5}, {"id": "chat"}]
    found = recipe(method="dare", base_model="base", models=models, parameters={"drop_rate": 0.9})
    assert found.parameters["densities"] == (0.5, 0.1)


@pytest.mark.parametrize("rate", [1, -0.1, "half", True, 1e400])
def test_a_drop_rate_out_of_range_is_refused_by_its_name(rate):
    (found,) = problems(
        method="dare", base_model="base", models=BOTH, parameters={"drop_rate": rate}
    )
    assert found[0] == "parameters.drop_rate"
    assert "at least 0 and below 1" in found[1]


@pytest.mark.parametrize(
    ("method", "count", "text"),
    [
        ("linear", 1, "linear takes 2 to 8 models, got 1"),
        ("linear", 9, "linear takes 2 to 8 models, got 9"),
        ("slerp", 1, "slerp takes exactly 2 models, got 1"),
        ("slerp", 3, "slerp takes exactly 2 models, got 3. For more take multislerp or karcher"),
        ("ties", 1, "ties takes 2 to 64 models, got 1"),
        ("dare", 1, "dare takes 2 to 64 models, got 1"),
    ],
)
def test_methods_have_their_numbers_of_models(method, count, text):
    assert ("models", text) in problems(method=method, models=[{"id": "code"}] * count)


def test_all_that_is_wrong_is_said_at_once_with_its_place():
    models = [{"id": "code", "density": 2}, {"id": "chat", "wieght": 1}]
    places = dict(problems(method="ties", models=models, parameters={"lamda": 1}, vocab="max"))
    assert set(places) == {
        *("base_model", "models[0].density", "models[1].wieght", "parameters.lamda", "vocab")
    }
    assert "Did you mean 'weight'?" in places["models[1].wieght"]
    assert "Did you mean 'lambda'?" in places["parameters.lamda"]


def test_a_missing_base_is_said_at_its_field():
    ((where, text),) = problems(method="ties", models=BOTH)
    assert where == "base_model"
    assert text.startswith("ties needs a base_model")


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("recipe: lam must be finite, got nan", "parameters.lambda"),
        ("recipe: weights must be finite, got inf (model 2)", "models[1].weight"),
        ("recipe: something else must do", ""),
        ("recipe: models[1].parameters.weight: must be a number", "models[1].weight"),
    ],
)
def test_texts_on_the_whole_are_put_where_they_belong(line, place):
    (found,) = problems_of(ValueError(line), form=True)
    assert found.where == place


def test_an_unknown_method_has_a_nearest():
    ((where, text),) = problems(method="tise", models=BOTH)
    assert where == "method"
    assert text.endswith("Did you mean 'ties'?")


NO_IDS = [
    "/etc/passwd", "../secret", "..", "a/b", "HuggingFaceH4/zephyr", "file:///etc/passwd",
    "http://127.0.0.1/x", "code\\..\\x", "code\0", "code;x", "code\n", "%2e%2e", "~root", "",
    "base+../x", "base+/etc", "code@main",
]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in NO_IDS if name])
def test_what_is_no_id_is_refused_wherever_it_stands(name):
    quoted = repr(name).replace("\\x00", "\\0") if "\0" not in name else None
    requests = [
        {"method": "linear", "models": [{"id": name}, {"id": "code"}]},
        {"method": "ties", "base_model": name, "models": BOTH},
    ]
    if quoted and "\n" not in name and "\\" not in name:
        requests.append({"recipe": f"merge_method: passthrough\nmodels: [{{model: {quoted}}}]"})
        layers = f"sources: [{{model: {quoted}, layer_range: [0, 1]}}]"
        requests.append({"recipe": f"merge_method: passthrough\nslices: [{{{layers}}}]"})
    for request in requests:
        texts = [text for _, text in problems(**request)]
        assert any("is no id of a model" in text or "unknown model" in text for text in texts), (
            texts
        )


def test_unknown_and_unavailable_models_are_told_apart():
    found = problems(method="linear", models=[{"id": "cdoe"}, {"id": "gone"}])
    assert found[0][0] == "models[0].id"
    assert found[0][1].endswith("Did you mean 'code'?")
    assert found[1] == ("models[1].id", "gone: is not on this machine")


def test_a_name_of_the_hub_is_no_id_but_leads_to_it():
    models = [{"id": "HuggingFaceH4/zephyr-7b-beta"}, {"id": "code"}]
    text = "'HuggingFaceH4/zephyr-7b-beta' is no id of a model. Is 'zephyr-7b-beta' meant?"
    assert problems(method="linear", models=models) == [("models[0].id", text)]


@pytest.mark.parametrize("name", ["models/code", "code lora", "/data/models/code-lora/"])
def test_a_path_or_a_name_is_no_id_but_leads_to_it(name):
    meant = "code" if name == "models/code" else "code-lora"
    recipe = f"method: linear\nmodels:\n- model: chat\n- model: {name}\n"
    text = f"{name!r} is no id of a model. Is {meant!r} meant?"
    assert ("line 4", text) in problems(recipe=recipe)


def test_what_a_request_can_say_is_listed_where_it_says_something_else():
    ((where, text),) = problems(method="linear", models=BOTH, evaluaton={})
    assert where == "evaluaton"
    assert text.endswith("Did you mean 'evaluation'?")
    assert {"recipe", "findings", "dtype"} <= {*text.partition("there are: ")[2].split(", ")}


def test_an_adapter_alone_comes_with_its_base():
    found = recipe(method="linear", models=[{"id": "code-lora"}, {"id": "chat"}])
    assert found.models == ("base+code-lora", "chat")
    assert recipe(
        method="linear", models=[{"id": "base+code-lora:0.5"}, {"id": "chat"}]
    ).models == (
        "base+code-lora:0.5",
        "chat",
    )


def test_models_of_the_hub_are_merged_by_their_names_there():
    models = [{"id": "code"}, {"id": "zephyr-7b-beta"}]
    text, _ = asked(method="linear", models=models, tokenizer_source="zephyr-7b-beta")
    assert "HuggingFaceH4" not in text
    (stage,) = stages_of(text, NAMES.references)
    assert stage.recipe.models == ("code", "HuggingFaceH4/zephyr-7b-beta")
    assert stage.recipe.tokenizer_source == "HuggingFaceH4/zephyr-7b-beta"
    assert referred("zephyr-7b-beta+code-lora:0.5", NAMES.references) == (
        "HuggingFaceH4/zephyr-7b-beta+code-lora:0.5"
    )


def test_models_of_slices_and_of_tokens_are_renamed_as_well():
    text = """
merge_method: linear
slices:
- sources:
  - {model: code, layer_range: [0, 2], parameters: {weight: 1}}
  - {model: zephyr-7b-beta, layer_range: [0, 2], parameters: {weight: 1}}
tokenizer:
  source: union
  tokens:
    <x>: {source: zephyr-7b-beta}
"""
    (stage,) = stages_of(asked(recipe=text)[0], NAMES.references)
    hub = "HuggingFaceH4/zephyr-7b-beta"
    assert [layers.model for layers in stage.recipe.slices[0].sources] == ["code", hub]
    assert stage.recipe.vocabulary.tokens["<x>"].model == hub


def test_recipes_may_use_each_others_results():
    text = """
name: both
merge_method: linear
models: [{model: code, parameters: {weight: 1}}, {model: chat, parameters: {weight: 1}}]
---
merge_method: slerp
base_model: both
models: [{model: base}]
parameters: {t: 0.5}
"""
    found, _ = asked(recipe=text)
    assert model_ids(found)[1] == ["code", "chat", "base"]


def test_a_recipe_says_the_line_of_what_is_wrong():
    text = (
        "merge_method: ties\nbase_model: base\nmodels:\n- model: code\n  parameters:\n    densty: 1"
    )
    ((where, said),) = problems(recipe=text)
    assert where == "line 6: models[0].parameters.densty"
    assert said.startswith("unknown parameter")


def test_a_whole_recipe_stands_alone():
    found = problems(recipe="merge_method: linear", method="linear", dtype="float16")
    assert [where for where, _ in found] == ["method", "dtype"]


def test_notes_on_what_has_no_effect_are_kept():
    text = "merge_method: linear\nmodels: [{model: code, parameters: {weight: 1}}, " \
           "{model: chat, parameters: {weight: 1}}]\nparameters: {int8_mask: true}"  # fmt: skip
    _, notes = asked(recipe=text)
    assert notes == [
        "parameters.int8_mask in the recipe has no effect on linear, here as in mergekit"
    ]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples/recipes").glob("*.yml")), ids=lambda p: p.stem
)
def test_every_example_recipe_is_accepted_with_ids(path):
    text = path.read_text().replace("examples/tiny_llamas/", "")
    names = set(re.findall(r"[\w.-]+", text))
    known = Names({name: name for name in names}, {}, {})
    recipes, _ = recipe_text(ExperimentRequest(recipe=text), known)
    assert stages_of(recipes, {})


def test_too_many_models_are_refused():
    models = "".join(f"- {{model: m{i}, parameters: {{weight: 1}}}}\n" for i in range(65))
    found = problems(recipe=f"merge_method: linear\nmodels:\n{models}")
    assert found[0] == ("models", "65 models; a recipe has at most 64")


def test_broken_yaml_is_a_problem_with_its_line():
    ((where, text),) = problems(recipe="a: [")
    assert where.startswith("line ")
    assert isinstance(RecipeError(text), ValueError)
