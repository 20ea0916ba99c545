"""Recipe files: how they are read, what is refused and how, round trips, stacks and chains."""

import io
import json
import os
import threading
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_checkpoints import make_llama, read_tensors, tensor_hashes

import merge
from benchmarks.random_recipes import RecipeMaker
from merge_document import recipe_document
from merge_grammar import load_recipes, read_recipes, recipe_of
from merge_methods import ALIASES, METHODS
from merge_plan import open_plan
from merge_recipe import LayerRange, make_recipe
from merge_run import merge_to_model
from merge_schema import recipe_schema
from merge_settings import Choice, Setting, interpolate, joined
from merge_yaml import RecipeError, read_documents, write_yaml

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples" / "recipes").glob("*.yml"))
PUBLISHED = sorted((ROOT / "tests" / "recipes").glob("*.yml"))
SMALL = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32, "tokenizer": True}


def value(text):
    (document,) = read_documents(text)
    return document.value


def recipe(text):
    (stage,) = read_recipes(text)
    return stage.recipe


def run(*arguments):
    """The command's exit status and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    quiet = [] if {"--check", "--schema"} & {*arguments} else ["--quiet"]
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = merge.main([*map(str, arguments), *quiet])
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A base and fine-tunes a, b, c of 4 layers in the current folder, and deep, of 6."""
    base = make_llama(tmp_path / "base", seed=1, layers=4, **SMALL)
    for seed, name in enumerate("abc", 2):
        make_llama(tmp_path / name, seed=seed, layers=4, base=base, **SMALL)
    make_llama(tmp_path / "deep", seed=9, layers=6, **SMALL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# YAML


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-3", 0.001), ("1E5", 100000.0), ("-.5", -0.5), ("1.", 1.0), ("0x1F", 31), ("0o17", 15),
        (".inf", float("inf")), ("-.INF", float("-inf")), ("0", 0), ("-12", -12), ("~", None),
        ("true", True), ("False", False), ("yes", "yes"), ("on", "on"), ("1_000", "1_000"),
        ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ('"1"', "1"), ("'true'", "true"),
        ("=", "="), ("0.1e", "0.1e"), ("", None),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, expected):
    found = value(f"a: {text}")["a"]
    assert (found, type(found)) == (expected, type(expected))


def test_lines_are_those_of_the_entries():
    (document,) = read_documents("# x\na:\n  - b: 1\n    c: 2\n", "r.yml")
    assert document.place(("a", 0, "c")) == "r.yml:4: a[0].c"
    assert document.place(("a", 0, "unknown")) == "r.yml:3: a[0].unknown"


def test_merge_keys_give_way_to_own_ones():
    text = "x: &x {a: 1, b: 2}\ny: &y {b: 3}\nz: {<<: [*y, *x], c: 4}\nw: {a: 0, <<: *x}"
    found = value(text)
    assert found["z"] == {"a": 1, "b": 3, "c": 4}
    assert found["w"] == {"a": 0, "b": 2}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
@example("a\x85b")
@example({"\u2028": "\ufeff\n", "010": "1e-3"})
@example("\n ")
@settings(max_examples=150)
def test_what_is_written_is_read_as_the_same(content):
    assert value(write_yaml({"x": content}))["x"] == content


@pytest.mark.parametrize(
    ("text", "source", "said"),
    [
        ('{"a": 1, "a": 2}', "r.json", "r.json: the key 'a' is given twice. Keep one of them"),
        ("{", "r.json", "r.json:1: no JSON: Expecting property name"),
        ("[" * 5000, "r.json", "r.json: entries lie in one another more than 20 deep"),
        ("x" * 1_000_001, "r.yml", "r.yml: 1,000,001 bytes; a recipe has at most 1,000,000"),
        (b"\xff", "r.yml", "r.yml: not UTF-8 (byte 0). Save it as UTF-8"),
        ("a: \x01", "r.yml", "r.yml: no YAML: "),
        ("a: " + "1" * 5000, "r.json", "r.json:1: no JSON"),
    ],
)
def test_files_that_cannot_be_read_are_refused(text, source, said):
    with pytest.raises(RecipeError) as caught:
        read_documents(text, source)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


# Settings


def test_gradients_are_linear_between_numbers_and_steps_between_others():
    assert [interpolate((0.0, 1.0, 0.5), place / 4) for place in range(5)] == [0, 0.5, 1, 0.75, 0.5]
    assert interpolate((0.3,), 0.7) == 0.3
    assert [interpolate(("a", "b"), place) for place in (0.0, 0.99, 1.0)] == ["a", "a", "b"]


def test_levels_are_asked_in_turn_until_a_filter_fits():
    levels = [
        Setting((Choice((1.0,), "mlp"),)),
        Setting((Choice((2.0,), "q_proj"), Choice((3.0,)))),
        Setting((Choice((4.0,), "mlp"),)),
    ]
    both = joined(levels)
    names = ("l.mlp.x", "l.q_proj", "norm")
    assert [both.at(name, 0) for name in names] == [1.0, 2.0, 3.0]
    assert joined(levels[1:2]) == levels[1]
    assert joined([Setting((Choice((5.0,)),)), *levels]) == 5.0


LEVELS = """
merge_method: task_arithmetic
base_model: base
slices:
- sources:
  - {model: base, layer_range: [0, 2]}
  - {model: a, layer_range: [0, 2], parameters: {weight: {filter: mlp, value: 1}}}
  - {model: b, layer_range: [2, 4]}
  parameters: {weight: [{filter: q_proj, value: 2}, {filter: "layers.3.", value: 2.5}], lambda: 7}
- sources:
  - {model: base, layer_range: [2, 4]}
  - {model: a, layer_range: [2, 4]}
  - {model: b, layer_range: [2, 4]}
parameters: {weight: [3, 4], lambda: 8}
"""


def test_source_wins_over_slice_and_slice_over_the_recipe(models):
    with open_plan(recipe(LEVELS), weights=False) as plan:
        found = {task.name: task.parameters for task in plan.tasks}
    weights = {name: each["weights"] for name, each in found.items()}
    layer = "model.layers.{}.{}.weight".format
    assert weights[layer(0, "mlp.up_proj")] == (1, 3)
    assert weights[layer(0, "self_attn.q_proj")] == (2, 2)
    assert weights[layer(1, "self_attn.k_proj")] == (4, 2.5)  # b's own layer is number 3
    assert weights[layer(3, "self_attn.q_proj")] == (4, 4)
    assert weights["model.embed_tokens.weight"] == (3, 3)
    assert weights["lm_head.weight"] == (3, 3)
    assert [found[layer(number, "mlp.up_proj")]["lam"] for number in range(4)] == [7, 7, 8, 8]


# Kinds of recipes


def test_the_conventions_are_those_that_the_key_says():
    text = "base_model: base\nmodels: [{model: a, parameters: {weight: 1}}]\n"
    theirs, ours = recipe(f"merge_method: ties\n{text}"), recipe(f"method: ties\n{text}")
    assert (theirs.profile, ours.profile) == ("mergekit", "default")
    assert recipe(f"merge_method: ties\nprofile: paper\n{text}").profile == "paper"


@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize("sliced", [False, True])
def test_a_name_for_a_variant_implies_it_wherever_parameters_stand(alias, sliced):
    body = "models: [{model: base}, {model: a}]"
    if sliced:
        entry = "{{model: {}, layer_range: [0, 2]}}".format
        body = f"slices: [{{sources: [{entry('base')}, {entry('a')}]}}]"
    found = recipe(f"method: {alias}\nbase_model: base\n{body}\n")
    method, implied = ALIASES[alias]
    given = found.slices[0].parameters if sliced else found.parameters
    assert found.method == method
    assert {name: given[name] for name in implied} == implied


def test_a_base_that_is_listed_is_no_model_of_its_own():
    text = "merge_method: ties\nbase_model: base\nparameters: {weight: 1}\n"
    found = recipe(text + "models: [{model: base, parameters: {density: 1}}, {model: a}]")
    assert (found.base_model, found.models) == ("base", ("a",))
    assert found.notes == ("models[0].parameters in the recipe has no effect, as this is the base",)


def test_slerp_starts_at_its_base():
    text = "merge_method: slerp\nbase_model: b\nparameters: {t: 0.25}\nmodels: "
    assert recipe(text + "[{model: a}, {model: b}]").models == ("b", "a")
    assert recipe(text + "[{model: a}]").models == ("b", "a")


def test_rescale_is_a_truth_value_in_mergekits_files():
    text = "merge_method: {}\nbase_model: base\nmodels: [{{model: a}}]\n"
    text += "parameters: {{weight: 1, rescale: {}}}"
    assert recipe(text.format("dare_ties", "true")).parameters["rescale"] == "l1"
    assert recipe(text.format("ties", "true")).parameters["rescale"] == "l1"
    assert recipe(text.format("dare_ties", "false")).parameters["rescale"] == "none"
    profile = text.format("dare_ties", "true") + "\nprofile: mergekit-0.0.6"
    assert recipe(profile).parameters["rescale"] == "inverse_density"


def test_filters_that_decide_nothing_are_noted(models):
    text = """
method: slerp
models: [a, b]
parameters: {t: [{filter: self_atn, value: 1}, {filter: "*.mlp.*", value: 1}, {value: 0}]}
"""
    Path("r.yml").write_text(text)
    out = run("r.yml", "--plan")[1]
    assert "note        the filter 'self_atn' of t is part of no tensor's name\n" in out
    assert "the filter '*.mlp.*' of t is part of no tensor's name. A filter is a part of" in out
    found = recipe(
        "method: slerp\nmodels: [a, b]\nparameters: {t: [{value: 1}, {filter: x, value: 0}]}"
    )
    assert found.notes == (
        "parameters.t[1] in the recipe is never used: an entry before it fits everything",
    )


def test_forms_of_older_recipes_are_known():
    text = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: o/a}, {model: o/b}]\n"
    found = recipe(text + "tokenizer_source: model:o/b\nrandom_seed: 0\n")
    assert found.vocabulary.mode == "model:o/b"
    (note,) = found.notes
    assert note.startswith("random_seed in the recipe has no effect")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("merge_method: TIES", "unknown method 'TIES'; there are: "),
        ("method: linear\nmodels: [a]\ndtype: bf16", "got 'bf16'. Did you mean 'bfloat16'?"),
        ("method: linear\nmodels: [a]\nchat_template: llama-3", "Did you mean 'llama3'?"),
        (
            "merge_method: linear\nparameters: {weight: 1}\nmodels: [a]\n"
            "tokenizer: {source: unoin}",
            "'unoin' is neither union nor base. Did you mean 'union'?",
        ),
        (
            "merge_method: slerp\nbase_model: x\nparameters: {t: 0.5}\nmodels: [a, b]",
            "base_model: x is none of the two models. Name one of them",
        ),
        ("method: ties\nbase_model: b\nweights: [1]\nmodels: [a]", "'weights' is 'weight' under"),
        (
            "method: della\nbase_model: b\nparameters: {epsilon: 0.2}\n"
            "models:\n- {model: a, parameters: {density: 0.1}}\n- b2\n",
            "recipe:5: models[0]: epsilons must leave",
        ),
    ],
)
def test_slips_are_named(text, said):
    with pytest.raises(RecipeError) as caught:
        read_recipes(text)
    assert said in str(caught.value)


def test_models_are_named_by_path_and_revision():
    text = "merge_method: linear\nparameters: {weight: 1}\nmodels:\n"
    text += "- model: {model: {path: o/a, revision: v1}}\n- model: o/b@v2\n"
    assert recipe(text).models == ("o/a@v1", "o/b@v2")


def test_a_folder_may_have_a_plus_in_its_name(models):
    (models / "a").rename("a+b")
    assert recipe("method: linear\nmodels: [a+b]").models == ("a+b",)


@pytest.mark.parametrize("file", [*EXAMPLES, *PUBLISHED], ids=lambda file: file.stem)
def test_a_recipe_is_the_same_as_object_mapping_json_and_yaml(file):
    for stage in load_recipes(file):
        for complete in (False, True):
            content = recipe_document(stage.recipe, complete=complete)
            assert recipe_of(content) == stage.recipe
            assert recipe_of(json.loads(json.dumps(content))) == stage.recipe
            assert recipe(write_yaml(content)) == stage.recipe


@given(st.integers(0, 10**6))
@settings(max_examples=40)
def test_random_recipes_make_the_round_trip(seed):
    found = recipe(write_yaml(RecipeMaker(seed).recipe()))
    assert recipe_of(recipe_document(found)) == found
    assert recipe(write_yaml(recipe_document(found, complete=True))) == found


def test_what_a_driver_makes_is_written_too():
    made = make_recipe(
        "ties", "base", ["a", Path("b")], {"weights": [1, 0.5], "lam": None, "trim_scope": "row"},
        include="*.mlp.*", clamp_range=(-float("inf"), 2), vocabulary="union", dtype="float16",
    )  # fmt: skip
    given = {name: each for name, each in made.parameters.items() if each is not None}
    again = recipe_of(json.loads(json.dumps(recipe_document(made))))
    assert again == replace(made, parameters=given | {"weights": (1.0, 0.5)})


# The schema


SCHEMA = ROOT / "docs" / "recipe.schema.json"
VALIDATOR = jsonschema.Draft202012Validator(recipe_schema())


def test_the_published_schema_is_that_of_the_methods():
    jsonschema.Draft202012Validator.check_schema(recipe_schema())
    assert json.loads(SCHEMA.read_text()) == recipe_schema()
    assert json.loads(run("--schema")[1]) == recipe_schema()


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_examples_fit_the_schema(file):
    for document in read_documents(file.read_bytes()):
        if "method" in document.value:
            VALIDATOR.validate(document.value)
    for stage in load_recipes(file):
        VALIDATOR.validate(recipe_document(stage.recipe, complete=True))


@pytest.mark.parametrize(
    "change",
    [
        {"method": "tiez"}, {"modles": []}, {"models": []}, {"dtype": "float8"},
        {"parameters": {"densty": 1}}, {"parameters": {"t": 1}}, {"merge_lm_head": "yes"},
        {"models": [{"model": "a", "parameters": {"weigth": 1}}]},
        {"parameters": {"density": [{"filter": "mlp"}]}},
        {"parameters": {"density": "half"}},
    ],
)  # fmt: skip
def test_the_schema_refuses_what_the_reader_refuses(change):
    good = {"method": "ties", "base_model": "base", "models": ["a"]}
    VALIDATOR.validate(good)
    recipe_of(good)
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(good | change)
    with pytest.raises(RecipeError):
        recipe_of(good | change)


# Examples


def test_there_is_an_example_of_every_method():
    used = {stage.recipe.method for file in EXAMPLES for stage in load_recipes(file)}
    assert used == METHODS.keys()


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_gives_a_sound_model_and_can_be_run_again_from_what_it_leaves(
    monkeypatch, tmp_path, file
):
    monkeypatch.chdir(ROOT)
    status, out, err = run(file, tmp_path / "out")
    assert (status, err) == (0, "")
    assert "profile" in out.splitlines()[0]
    assert run("--check", tmp_path / "out")[0] == 0
    monkeypatch.chdir(ROOT / "examples" / "tiny_llamas")  # it names models by their last part
    assert run(tmp_path / "out" / "merge_recipe.yml", tmp_path / "again")[0] == 0
    assert tensor_hashes(tmp_path / "again") == tensor_hashes(tmp_path / "out")
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


# Stacks


def test_layers_are_those_that_slices_say(models):
    text = """
method: passthrough
slices:
- sources: [{model: a, layer_range: [1, 4]}]
- sources: [{model: deep, layer_range: [5, 6], parameters: {scale: [{filter: o_proj, value: 0}]}}]
"""
    Path("r.yml").write_text(text)
    assert run("r.yml", "out")[0] == 0
    found, a, deep = (read_tensors(Path(name)) for name in ("out", "a", "deep"))
    assert json.loads(Path("out/config.json").read_text())["num_hidden_layers"] == 4
    for name, tensor in found.items():
        if not name.startswith("model.layers."):
            source = a if "embed" in name else deep
            assert tensor.equal(source[name]), name
            continue
        _, _, layer, part = name.split(".", 3)
        if layer == "3":
            expected = deep[f"model.layers.5.{part}"] * ("o_proj" not in part)
        else:
            expected = a[f"model.layers.{int(layer) + 1}.{part}"]
        assert tensor.equal(expected), name


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "ties", "dare", "sce"])
def test_slices_of_whole_models_are_the_models(models, method):
    has_base = METHODS[method].base == "required"
    inputs = ["base", "a", "b"] if has_base else ["a", "b"]
    base = "base_model: base\n" if has_base else ""
    shared = f"method: {method}\n{base}"
    Path("m.yml").write_text(f"{shared}models: [{', '.join(inputs)}]\n")
    entries = "".join(f"  - {{model: {name}, layer_range: [0, 4]}}\n" for name in inputs)
    Path("s.yml").write_text(f"{shared}slices:\n- sources:\n{entries}")
    assert run("m.yml", "m")[0] == run("s.yml", "s")[0] == 0
    assert tensor_hashes(Path("m")) == tensor_hashes(Path("s"))


def test_slices_may_have_other_models_and_bases(models):
    text = """
method: task_arithmetic
slices:
- base_model: base
  sources: [{model: base, layer_range: [0, 1]}, {model: a, layer_range: [0, 1]}]
- base_model: c
  sources:
  - {model: c, layer_range: [0, 1]}
  - {model: a, layer_range: [1, 2]}
  - {model: b, layer_range: [2, 3]}
"""
    found = recipe(text)
    assert (found.base_model, found.models) == ("base", ("a", "c", "b"))
    assert found.slices[1].base == LayerRange("c", 0, 1)
    Path("r.yml").write_text(text + "dtype: float32\n")
    assert run("r.yml", "out")[0] == 0
    out = read_tensors(Path("out"))
    tensors = {name: read_tensors(Path(name)) for name in ("base", "a", "b", "c")}
    part = "model.layers.{}.mlp.up_proj.weight".format
    c = tensors["c"][part(0)].float()
    expected = c + ((tensors["a"][part(1)].float() - c) + (tensors["b"][part(2)].float() - c))
    assert out[part(1)].allclose(expected, rtol=1e-6, atol=1e-7)
    assert out[part(0)].allclose(tensors["a"][part(0)].float(), rtol=1e-6, atol=1e-7)


def test_findings_are_of_the_same_models_in_all_layers(models):
    same = "[{model: a, layer_range: [0, 2]}, {model: b, layer_range: [2, 4]}]"
    other = "[{model: a, layer_range: [0, 2]}, {model: c, layer_range: [2, 4]}]"
    Path("same.yml").write_text(
        f"method: linear\nslices: [{{sources: {same}}}, {{sources: {same}}}]"
    )
    Path("other.yml").write_text(
        f"method: linear\nslices: [{{sources: {same}}}, {{sources: {other}}}]"
    )
    assert run("same.yml", "--analyze", "found")[0] == 0
    assert run("same.yml", "one", "--findings")[0] == 0
    for arguments in (["--analyze", "x"], ["two", "--findings"], ["two", "--plan", "--findings"]):
        status, _, err = run("other.yml", *arguments)
        assert status == 2
        assert err.startswith("error: findings (--findings, --analyze) are of the same models")
    assert not Path("two").exists()


def test_scale_goes_by_the_name_in_the_model(models):
    text = """
method: passthrough
slices:
- sources: [{model: a, layer_range: [2, 4], parameters: {scale: {filter: "layers.3.", value: 2}}}]
"""
    with open_plan(recipe(text), weights=False) as plan:
        scales = {task.name: task.parameters["scale"] for task in plan.tasks}
    assert scales["model.layers.1.mlp.up_proj.weight"] == 2
    assert scales["model.layers.0.mlp.up_proj.weight"] is None


def test_patterns_are_of_the_results_names(models):
    text = "method: task_arithmetic\nbase_model: base\nslices:\n"
    for first in (0, 2, 1):
        layers = f"layer_range: [{first}, {first + 2}]"
        text += f"- sources: [{{model: base, {layers}}}, {{model: a, {layers}}}]\n"
    Path("r.yml").write_text(text + "exclude: ['*.layers.5.*', 'lm_head*']\n")
    status, out, _ = run("r.yml", "out")
    assert status == 0
    assert "10 of 57 tensors are not merged but those of base" in out
    found, base = read_tensors(Path("out")), read_tensors(Path("base"))
    name = "mlp.up_proj.weight"
    assert found[f"model.layers.5.{name}"].equal(base[f"model.layers.2.{name}"])


def test_a_model_that_only_gives_the_config_is_kept(models):
    text = """
method: passthrough
base_model: c
slices:
- sources: [{model: a, layer_range: [0, 2]}]
- sources: [{model: b, layer_range: [2, 4]}]
"""
    found = recipe(text)
    assert found.models == ("c", "a", "b")
    assert recipe_of(recipe_document(found)) == found


def test_slerp_may_have_its_base_in_the_slices():
    text = "merge_method: slerp\nparameters: {t: 0.3}\nslices: [{base_model: m, sources: "
    text += "[{model: n, layer_range: [0, 3]}, {model: m, layer_range: [1, 4]}]}]"
    found = recipe(text).slices[0]
    assert found.sources == (LayerRange("m", 1, 4), LayerRange("n", 0, 3))


def test_a_stack_is_not_made_in_memory(models):
    text = "method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]"
    with pytest.raises(ValueError, match="can be merged into a folder only"):
        merge_to_model(recipe(text))


# Several recipes

CHAINS = {
    "read as merged": ("linear", "slerp", "dare"),
    "through a folder": ("ties", "breadcrumbs", "sce"),
    "both": ("karcher", "ties", "task_arithmetic"),
    "several passes": ("model_stock", "nuslerp", "ties"),
}


def chain_of(methods):
    """Three recipes, each of which uses those before it; as texts without names."""
    texts = []
    for number, method in enumerate(methods):
        given = {
            "ties": "{density: 0.5}", "breadcrumbs": "{density: 0.5}", "dare": "{density: 0.5}",
            "sce": "{select_topk: 0.5}", "slerp": "{t: [0.2, 0.9]}",
        }  # fmt: skip
        models = [["a", "b"], ["x0", "c"], ["x1", "x0", "b"]][number]
        if METHODS[method].most == 2:
            models = models[:2]
        base = "base_model: base\n" if METHODS[method].base == "required" else ""
        texts.append(
            f"method: {method}\n{base}models: [{', '.join(models)}]\n"
            f"parameters: {given.get(method, '{}')}\ndtype: {['bfloat16', 'float16'][number % 2]}\n"
        )
    return texts


@pytest.mark.parametrize(("kind", "threads"), [*dict.fromkeys(CHAINS, 3).items(), ("both", 1)])
def test_a_chain_is_merging_one_after_the_other(models, kind, threads):
    texts = chain_of(CHAINS[kind])
    for number, text in enumerate(texts):
        Path("one.yml").write_text(text)
        assert run("one.yml", f"x{number}", "--threads", threads)[0] == 0
    names = [f"name: x{number}\n" for number in range(len(texts) - 1)] + [""]
    parts = [name + text for name, text in zip(names, texts, strict=True)]
    Path("chain.yml").write_text("---\n".join(parts))
    os.rename("x0", "hidden0")  # the names are those of the recipes, not of folders
    os.rename("x1", "hidden1")
    before = {*os.listdir()}
    assert run("chain.yml", "out", "--threads", threads)[0] == 0
    assert {*os.listdir()} == before | {"out"}
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert Path("out", name).read_bytes() == Path("x2", name).read_bytes()


def test_what_can_be_merged_as_it_is_read_is_never_written(models, monkeypatch):
    monkeypatch.delattr("merge_chain.open_model_folder")
    texts = chain_of(CHAINS["read as merged"])
    Path("chain.yml").write_text(f"name: x0\n{texts[0]}---\nname: x1\n{texts[1]}---\n{texts[2]}")
    assert run("chain.yml", "out")[0] == 0
    status, out, _ = run("chain.yml", "--plan")
    assert status == 0
    assert "earlier     x0: linear average of a, b, merged as it is read\n" in out
    assert ".recipes-" not in out


def test_what_an_earlier_recipe_gets_wrong_is_said_before_anything_is_written(models):
    texts = chain_of(CHAINS["both"])
    Path("chain.yml").write_text(
        f"name: x0\n{texts[0]}---\nname: x1\n{texts[1]}---\nmethod: linear\nmodels: [x1, nowhere]"
    )
    before = {*os.listdir()}
    status, _, err = run("chain.yml", "out")
    assert status == 3
    assert err.startswith("error: chain.yml:14: nowhere: no such folder")
    assert {*os.listdir()} == before


def test_a_recipe_that_is_not_used_is_noted(models):
    Path("r.yml").write_text(
        "name: x\nmethod: linear\nmodels: [a]\n---\nmethod: linear\nmodels: [b]\n"
    )
    status, out, _ = run("r.yml", "--plan")
    assert status == 0
    assert "note        'x' of the recipes is not used" in out


def test_what_counts_along_a_tensor_is_written_first(models):
    texts = chain_of(CHAINS["through a folder"])
    Path("chain.yml").write_text(f"name: x0\n{texts[0]}---\nname: x1\n{texts[1]}---\n{texts[2]}")
    out = run("chain.yml", "--plan")[1]
    assert "earlier     x0: TIES of base, a, b, merged into a folder first\n" in out


def test_weights_that_are_read_when_merged_are_looked_at(models):
    broken = read_tensors(Path("a"))
    broken["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(broken, "a/model.safetensors")
    linear = "method: linear\nmodels: [{}, c]\n".format
    Path("r.yml").write_text(f"name: x\n{linear('a')}---\n{linear('x')}")
    status, _, err = run("r.yml", "out")
    assert status == 3
    assert err.startswith("error: a: model.layers.2.mlp.up_proj.weight has NaN or infinite weights")
    assert not [name for name in os.listdir() if name.startswith((".recipes", ".out", "out"))]


def test_a_recipes_name_is_never_taken_for_a_folder(models):
    (models / "deeper").mkdir()
    os.rename("b", "deeper/x")
    linear = "method: linear\nmodels: [{}, {}]\n".format
    Path("r.yml").write_text(f"name: x\n{linear('a', 'c')}---\n{linear('x', 'deeper/x')}")
    assert run("r.yml", "out")[0] == 0
    left = (models / "out/merge_recipe.yml").read_text()
    os.rename("deeper/x", "x-2")
    Path("again.yml").write_text(left)
    assert run("again.yml", "again")[0] == 0
    assert tensor_hashes(Path("again")) == tensor_hashes(Path("out"))


def test_an_output_inside_a_model_of_an_earlier_recipe_is_refused(models):
    linear = "method: linear\nmodels: [{}]\n".format
    Path("r.yml").write_text(f"name: x\n{linear('a')}---\n{linear('x')}")
    status, _, err = run("r.yml", "a/out")
    assert (status, err) == (
        2, "error: a/out: the output lies inside the model 'a'. Choose another place\n"
    )  # fmt: skip
    assert run("r.yml", "new/place/out")[0] == 0


def test_the_form_of_the_result_is_asked_for_of_the_last_recipe_alone(models):
    texts = chain_of(CHAINS["read as merged"])
    Path("chain.yml").write_text(f"name: x0\n{texts[0]}---\nname: x1\n{texts[1]}---\n{texts[2]}")
    resolved = run("chain.yml", "--resolve", "json", "--dtype", "float32")[1]
    assert [each["dtype"] for each in json.loads(resolved)] == ["bfloat16", "float16", "float32"]


# The command


def test_parts_of_the_command(models):
    Path("r.yml").write_text(
        "method: dare\nbase_model: base\nmodels: [a, b]\nparameters: {density: 0.5}\n"
    )
    status, out, _ = run("r.yml", "--plan", "--seed", 5, "--dtype", "float16")
    assert status == 0
    assert "  seed      5\n" in out
    assert ", float16" in out
    assert not Path("out").exists()
    assert run("r.yml", "--analyze", "found")[0] == 0
    assert Path("found.html").exists()
    resolved = run("r.yml", "--resolve", "json", "--seed", 7)[1]
    assert json.loads(resolved)["parameters"]["seed"] == 7
    assert recipe(run("r.yml", "--resolve", "yaml")[1]).method == "dare"
    assert run("r.yml", "out", "--findings", "--json")[0] == 0
    assert run("--check", "out")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: RECIPE"),
        (["r.yml"], "OUT, the folder to make, is required (or --plan"),
        (["r.yml", "out", "more"], "not expected: more"),
        (["r.yml", "out", "--cuda"], "unknown option --cuda. It is written --device cuda"),
        (["r.yml", "out", "--lazy-unpickle"], "unknown option --lazy-unpickle. Leave it out: "),
        (
            ["r.yml", "out", "--density", "1"],
            "unknown option --density. It belongs into the recipe, under parameters",
        ),
        (["r.yml", "out", "--thread", "1"], "unknown option --thread. Did you mean --threads"),
        (["r.yml", "out", "--analyze", "x"], "--analyze merges nothing: give it without OUT"),
        (["r.yml", "--schema"], "--schema stands alone"),
    ],
)
def test_wrong_arguments_are_refused_with_what_is_meant(models, arguments, said):
    Path("r.yml").write_text("method: linear\nmodels: [a]\n")
    status, _, err = run(*arguments)
    assert status == 2
    assert said in err.splitlines()[0]


def test_recipes_from_python(models):
    Path("r.yml").write_text("method: linear\nmodels: [a, b]\n")
    content = {"method": "linear", "models": ["a", "b"]}
    for number, given_as in enumerate(["r.yml", Path("r.yml"), content, recipe_of(content)]):
        report = merge.merge_recipe(given_as, f"out{number}", progress=False)
        assert report.output_dir == f"out{number}"
        assert tensor_hashes(Path(f"out{number}")) == tensor_hashes(Path("out0"))
        assert merge.plan_recipe(given_as).method == "linear"


def test_a_missing_file_is_said_in_a_line(models):
    status, _, err = run("nowhere.yml", "out")
    assert (status, len(err.splitlines())) == (6, 1)
    assert "nowhere.yml" in err


def test_a_recipe_may_be_json(models):
    content = {"method": "linear", "models": ["a", "b"]}
    Path("r.json").write_text(json.dumps(content))
    Path("r.yml").write_text(yaml.safe_dump(content))
    assert run("r.json", "one")[0] == run("r.yml", "two")[0] == 0
    assert tensor_hashes(Path("one")) == tensor_hashes(Path("two"))


def test_nothing_local_is_in_what_a_recipe_leaves(models):
    Path("r.yml").write_text(
        f"merge_method: linear\nparameters: {{weight: 1, int8_mask: true}}\n"
        f"models: [{{model: {models}/a}}]\n"
    )
    assert run(models / "r.yml", "out")[0] == 0
    for name in ("README.md", "merge_report.json", "merge_recipe.yml"):
        assert str(models) not in Path("out", name).read_text()


@pytest.mark.parametrize("name", ["alpaca", "chatml", "llama3", "mistral", "exaone"])
def test_chat_templates_by_name(models, name):
    from transformers import AutoTokenizer

    Path("r.yml").write_text(f"method: linear\nmodels: [a]\nchat_template: {name}\n")
    assert run("r.yml", "out")[0] == 0
    tokenizer = AutoTokenizer.from_pretrained("out")
    messages = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Ho"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.index("Hi") < text.index("Ho")
    if name == "chatml":
        start = "<|im_start|>assistant\n"
        expected = f"<|im_start|>user\n Hi <|im_end|>\n{start}Ho<|im_end|>\n"
        assert text == expected
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert prompt == expected + start


def test_a_chat_template_may_be_given_as_such(models):
    Path("r.yml").write_text(
        "method: linear\nmodels: [a]\nchat_template: '{{ messages[0].content }}'\n"
    )
    assert run("r.yml", "out")[0] == 0
    assert Path("out/chat_template.jinja").read_text() == "{{ messages[0].content }}"


def test_threads_do_not_mix_what_they_read(models):
    """Rows of a lazily merged model, asked for by several threads at once, in any order."""
    from merge_chain import open_earlier
    from merge_run import RunSettings
    from model_partial import PartialFolder

    stages = read_recipes(
        "name: x\nmethod: slerp\nmodels: [a, b]\n---\nmethod: linear\nmodels: [x, c]\n"
    )
    Path("x.yml").write_text("method: slerp\nmodels: [a, b]\n")
    assert run("x.yml", "x")[0] == 0
    expected = read_tensors(Path("x"))
    wrong = []
    with (
        PartialFolder(models / "out") as partial,
        open_earlier(stages, RunSettings(), partial) as earlier,
    ):
        import numpy as np
        import torch

        model = earlier.models["x"]

        def read(offset):
            for name in [*expected][offset:] + [*expected][:offset]:
                rows = expected[name].reshape(-1, expected[name].shape[-1])
                for first in range(len(rows)):
                    found = model.read_rows(name, first, first + 1, np.empty(1000, np.uint8))
                    own = torch.from_numpy(found.copy()).view(torch.bfloat16)
                    if not own.equal(rows[first : first + 1]):
                        wrong.append((name, first))

        threads = [threading.Thread(target=read, args=(offset,)) for offset in (0, 5, 11)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
