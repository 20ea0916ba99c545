"""Broken recipes: what is said of each, with its place and what to do."""

import re
from pathlib import Path

import pytest
from tiny_checkpoints import make_llama

import merge

GOOD = """\
models:
  - model: a
    parameters: {weight: 0.5, density: 0.5}
  - model: b
    parameters: {weight: 0.5, density: 0.5}
merge_method: ties
base_model: base
parameters: {normalize: true}
dtype: float16
"""


def changed(old, new):
    """The good recipe with one thing changed."""
    assert old in GOOD
    return GOOD.replace(old, new, 1)


LINEAR = "merge_method: linear\n"
BOMB = (
    "a: &a ["
    + ", ".join("1" * 10)
    + "]\n"
    + "".join(
        f"{new}: &{new} [" + ", ".join([f"*{old}"] * 10) + "]\n"
        for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
)

BROKEN = {
    "merge_method typo value": (
        changed("ties", "tiez"),
        ["r.yml:6: merge_method: unknown method 'tiez'; there are: ... Did you mean 'ties'?"],
    ),
    "key typo": (
        changed("merge_method", "merge_metod"),
        [
            "r.yml:6: merge_metod: unknown key 'merge_metod'; there are: ... Did you mean 'merge_method'?"
        ],
    ),
    "param typo": (
        changed("density", "densty"),
        [
            "r.yml:3: models[0].parameters.densty: unknown parameter of ties 'densty'; there are: ... Did you mean 'density'?"
        ],
    ),
    "param at top": (
        GOOD + "normalize: true\n",
        ["r.yml:10: normalize: 'normalize' is a parameter. Put it under parameters:"],
    ),
    "param beside model": (
        changed("    parameters: {weight: 0.5, density: 0.5}\n", "    weight: 0.5\n"),
        [
            "r.yml:3: models[0].weight: 'weight' is a parameter. Put it under parameters:",
        ],
    ),
    "duplicate key": (
        GOOD + "dtype: bfloat16\n",
        ["r.yml:10: dtype is given twice. Keep one of them"],
    ),
    "missing base": (
        changed("base_model: base\n", ""),
        [
            "r.yml:1: ties needs a base_model: the common ancestor of the models, a folder or a Hub id"
        ],
    ),
    "weight text": (
        changed("weight: 0.5", "weight: half"),
        ["r.yml:3: models[0].parameters.weight: weight must be a number, got 'half'"],
    ),
    "weight missing": (
        changed("weight: 0.5, ", ""),
        [
            "r.yml:2: models[0]: weight of a is missing. Give it under its parameters, or for all models under parameters of the recipe"
        ],
    ),
    "density range": (
        changed("density: 0.5", "density: 1.5"),
        [
            "r.yml:3: models[0].parameters.density: density must be in [0, 1] (the share of each task vector kept), got 1.5; for 1.5 percent write 0.015"
        ],
    ),
    "density nan": (
        changed("density: 0.5", "density: .nan"),
        [
            "r.yml:3: models[0].parameters.density: density must be in [0, 1] (the share of each task vector kept), got nan"
        ],
    ),
    "empty gradient": (
        changed("density: 0.5", "density: []"),
        [
            "r.yml:3: models[0].parameters.density: an empty gradient. Give its values from the first layer to the last"
        ],
    ),
    "gradient with text": (
        changed("density: 0.5", "density: [0.1, x]"),
        ["r.yml:3: models[0].parameters.density[1]: density must be a number, got 'x'"],
    ),
    "filter without value": (
        changed("density: 0.5", "density: [{filter: mlp}]"),
        [
            "r.yml:3: models[0].parameters.density[0]: value is missing. Give {filter: ..., value: ...}"
        ],
    ),
    "pattern": (
        changed("density: 0.5", "density: [{pattern: mlp, value: 1}, {value: 1}]"),
        [
            "r.yml:3: models[0].parameters.density[0].pattern: unknown key 'pattern'. It is called 'filter'"
        ],
    ),
    "filters without else": (
        changed("weight: 0.5", "weight: [{filter: mlp, value: 1}]"),
        [
            "r.yml:1: model.embed_tokens.weight: no filter of weight fits it. Add an entry without a filter, for all others"
        ],
    ),
    "dtype": (
        changed("float16", "float8"),
        ["r.yml:9: dtype: expected one of float32, float16, bfloat16, got 'float8'"],
    ),
    "models and slices": (
        GOOD + "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n",
        [
            "r.yml:1: exactly one of models, slices and modules is needed: models and slices are given"
        ],
    ),
    "no models": (
        "merge_method: linear\n",
        ["r.yml:1: exactly one of models, slices and modules is needed: none is given"],
    ),
    "models no list": (
        "merge_method: linear\nmodels: a\n",
        ["r.yml:2: models: expected a list of models, each after a hyphen, got 'a'"],
    ),
    "twice": (
        changed("model: b", "model: a"),
        [
            "r.yml:4: models[1]: a is listed twice. Leave one out, or write method: instead of merge_method:"
        ],
    ),
    "layer_range reversed": (
        "merge_method: passthrough\nslices:\n- sources:\n  - {model: a, layer_range: [4, 2]}\n",
        [
            "r.yml:4: slices[0].sources[0].layer_range: expected [first, last + 1], counted from 0, such as [0, 16], got [4, 2]"
        ],
    ),
    "layer_range beyond": (
        "merge_method: passthrough\nslices:\n- sources:\n  - {model: a, layer_range: [0, 40]}\n",
        [
            "r.yml:1: slice 1: layer_range [0, 40] of a, which has 2 layers. Take some of 0 to 1: at most [0, 2]"
        ],
    ),
    "layer counts": (
        "merge_method: linear\nparameters: {weight: 1}\nslices:\n- sources:\n  - {model: a, layer_range: [0, 2]}\n  - {model: b, layer_range: [0, 1]}\n",
        [
            "r.yml:6: slices[0].sources[1].layer_range: 1 layers, but 2 in the first source. Take as many of each"
        ],
    ),
    "tabs": (
        "merge_method: linear\nmodels:\n\t- model: a\n",
        ["r.yml:3: no YAML: a tab. Indent by spaces. Check indents and quotes"],
    ),
    "unclosed": (
        "merge_method: linear\nmodels: [{model: a\n",
        [
            "r.yml:3: no YAML: while parsing a flow mapping expected ',' or '}', but got '<stream end>'. Check indents and quotes"
        ],
    ),
    "recursive alias": (
        "merge_method: linear\nmodels: &m [{model: a, parameters: *m}]\n",
        ["r.yml:2: an alias lies within what it stands for. Write it out"],
    ),
    "bomb": (
        BOMB,
        ["r.yml:1: aliases come to more than 100,000 entries. Write them out"],
    ),
    "tag": (
        "merge_method: !!python/object/apply:os.system ['id']\n",
        [
            "r.yml:1: the tag 'tag:yaml.org,2002:python/object/apply:os.system'. Recipes have no tags; leave it out"
        ],
    ),
    "deep": (
        "merge_method: " + "[" * 3000,
        ["r.yml:1: entries lie in one another more than 20 deep. No recipe needs that"],
    ),
    "two docs, no names": (
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n---\nmerge_method: linear\nmodels: [{model: b, parameters: {weight: 1}}]\n",
        ["r.yml:4: a second recipe without a name. Give all but one a `name`"],
    ),
    "circle": (
        "name: x\nmerge_method: linear\nparameters: {weight: 1}\nmodels: [{model: y}]\n---\nname: y\nmerge_method: linear\nparameters: {weight: 1}\nmodels: [{model: x}]\n",
        [
            "r.yml:1: 'x' needs its own result. Break the circle",
            "r.yml:6: 'y' needs its own result. Break the circle",
        ],
    ),
    "lora": (
        changed("model: a", "model: {model: a, lora: {path: b, rank: 8}}"),
        ["r.yml:2: models[0].model.lora.rank: unknown key 'rank'; there are: path, revision."],
    ),
    "lora without a path": (
        changed("model: a", "model: {model: a, lora: {revision: b}}"),
        ["r.yml:2: models[0].model.lora: path is missing. Give a folder or a Hub id"],
    ),
    "an empty lora": (
        changed("model: a", 'model: {model: a, lora: ""}'),
        ["r.yml:2: models[0].model.lora: expected a text, got ''. Put it into quotes"],
    ),
    "tokenizer twice": (
        GOOD + "tokenizer_source: union\ntokenizer: {source: base}\n",
        ["r.yml:10: tokenizer_source: tokenizer says it already. Leave one of them out"],
    ),
    "token source": (
        GOOD + "tokenizer: {source: union, tokens: {x: {source: {kind: nothing}}}}\n",
        [
            'r.yml:10: tokenizer.tokens.x: tokens: \'x\' has the source {\'source\': {\'kind\': \'nothing\'}}. Expected a model, or {"source": MODEL or {"kind": "zero"} or {"kind": "model_token", "model": MODEL, "token" or "token_id": ...}, "force": true or false}'
        ],
    ),
    "weights sum 0": (
        "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n- {model: b, parameters: {weight: -1}}\n",
        [
            "r.yml:3: models[0].parameters.weight: weights [1.0, -1.0] sum to 0, so they cannot be normalized. Change a weight, or turn normalize off to take the plain sum"
        ],
    ),
    "too few": (
        "merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\nmodels: [{model: a}]\n",
        ["r.yml:1: slerp takes exactly 2 fine-tuned models, got 1"],
    ),
    "base not in slice": (
        "merge_method: ties\nbase_model: base\nparameters: {weight: 1}\nslices:\n- sources:\n  - {model: a, layer_range: [0, 2]}\n",
        [
            "r.yml:5: slices[0].sources: base_model base is none of the sources. Add it with its layer_range"
        ],
    ),
    "yes": (
        changed("normalize: true", "normalize: yes"),
        ["r.yml:8: parameters.normalize: normalize must be true or false, got 'yes'"],
    ),
    "octal": (
        changed("weight: 0.5", "weight: 010"),
        ["r.yml:3: 010 may be octal or decimal. Leave out the first 0, or quote it"],
    ),
    "empty": (
        "",
        ["r.yml: empty. Expected a recipe with merge_method and models"],
    ),
    "a list": (
        "- a\n- b\n",
        ["r.yml:1: expected entries such as `key: value`, got ['a', 'b']"],
    ),
    "missing model folder": (
        changed("model: b", "model: nowhere"),
        [
            "r.yml:1: nowhere: no such folder, and not the id of a Hub model (org/name). Check the path"
        ],
    ),
    "whole number gradient": (
        "merge_method: karcher\nmodels: [{model: a}, {model: b}]\nparameters: {max_iter: [1, 5]}\n",
        ["r.yml:3: parameters.max_iter: max_iter is a whole number, so it cannot be a gradient"],
    ),
    "t missing": (
        "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\n",
        ["r.yml:1: t is missing. Give it under parameters of the recipe"],
    ),
    "modules": (
        "merge_method: linear\nparameters: {weight: 1}\nmodules: {text: {models: [{model: a}]}}\n",
        ["r.yml:3: modules: a language model has one module, 'default', got text"],
    ),
    "profile": (
        GOOD + "profile: paperr\n",
        ["r.yml:10: profile: unknown profile 'paperr'; there are: ... Did you mean 'paper'?"],
    ),
    "both methods": (
        GOOD + "method: ties\n",
        [
            "r.yml:1: merge_method (mergekit's conventions) or method (ours): both are given. Give one"
        ],
    ),
}
"""By what is wrong: the recipe, and the lines that are said; ... stands for anything."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = make_llama(folder / "base", tokenizer=True)
    for seed, name in enumerate("ab", 1):
        make_llama(folder / name, seed=seed, base=base, tokenizer=True)
    return folder


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_recipe_is_refused_with_place_and_remedy(models, monkeypatch, capsys, what):
    text, said = BROKEN[what]
    monkeypatch.chdir(models)
    Path("r.yml").write_text(text)
    assert merge.main(["r.yml", "out", "--quiet"]) in (2, 3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(said)
    for line, expected in zip(lines, said, strict=True):
        pattern = re.escape(f"error: {expected}").replace(r"\.\.\.", ".*")
        assert re.fullmatch(pattern, line), line
        assert line.startswith("error: r.yml")
    assert not Path("out").exists()


def test_the_recipe_that_these_are_made_of_is_sound(models, monkeypatch, capsys):
    monkeypatch.chdir(models)
    Path("r.yml").write_text(GOOD)
    assert merge.main(["r.yml", "--plan"]) == 0
    assert capsys.readouterr().err == ""


def test_everything_wrong_is_said_at_once(models, monkeypatch, capsys):
    monkeypatch.chdir(models)
    text = changed("density: 0.5", "density: 2").replace("float16", "f16") + "extra: 1\n"
    Path("r.yml").write_text(text + "---\nmerge_method: linaer\nmodels: [{model: a}]\n")
    assert merge.main(["r.yml", "out", "--quiet"]) == 2
    places = [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()]
    assert places == ["r.yml:10", "r.yml:9", "r.yml:3", "r.yml:12"]


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: linear\nmodels: [{model: {}}]",
        "merge_method: linear\nmodels: [[]]\ndtype: [float32]\nprofile: {}\nname: [x]",
        "merge_method: linear\nmodels: [a]\nmax_shard_size: " + "9" * 400,
        "merge_method: linear\nmodels: [a]\ntokenizer: {source: 5, tokens: [1]}\nclamp_range: {}",
        "merge_method: [ties]\nmodels: 5\nbase_model: 7\nparameters: []",
        "method: linear\nmodels: [a]\ninclude: {x: 1}\nweight_decay: []\nvocabulary: [union]",
        "method: ties\nbase_model: b\nslices: [{sources: [{model: b, layer_range: [0, 1]}]}]",
        "method: slerp\nslices: [5, {sources: {}}, {sources: [a]}]",
    ],
)
def test_nonsense_is_refused_without_a_traceback(models, monkeypatch, capsys, text):
    monkeypatch.chdir(models)
    Path("r.yml").write_text(text)
    assert merge.main(["r.yml", "--resolve", "yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("error: r.yml") and len(line) < 600 for line in lines)


def test_what_a_recipe_says_acts_on_no_terminal_and_fills_no_screen(models, monkeypatch, capsys):
    monkeypatch.chdir(models)
    keys = "".join(f"key{number}: 1\n" for number in range(3000))
    Path("r.yml").write_text('method: linear\nmodels: ["\\e[31ma\\nerror: all is well"]\n' + keys)
    assert merge.main(["r.yml", "--plan"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 41
    assert all(line.isprintable() and line.startswith("error: ") for line in lines)
    assert lines[-1] == "error: and 2960 more"
