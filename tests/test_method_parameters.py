"""What methods' parameters come to: profiles, what was given, what has no effect."""

import inspect
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from tiny_checkpoints import make_llama, read_tensors, save_tensors

import dare_llama
import linear_llama
from linear_llama import linear_merge_llama_to_folder
from merge_methods import METHODS
from merge_parameters import PROFILES
from merge_plan import open_plan
from merge_recipe import make_recipe
from merge_run import merge_to_folder, plan
from multislerp_llama import main as multislerp_main

SMALL = {"layers": 1, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A base and three fine-tunes in the current folder: base, a, b and c."""
    base = make_llama(tmp_path / "base", seed=1, **SMALL)
    for seed, name in enumerate("abc", 2):
        make_llama(tmp_path / name, seed=seed, base=base, **SMALL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(method, parameters=None, names="abc", **options):
    entry = METHODS.get(method)
    base = "base" if entry is None or entry.base == "required" else None
    chosen = list(names)[: entry.most if entry else None]
    return make_recipe(method, base, chosen, parameters or {}, **options)


def resolved(method, parameters=None, **options):
    with open_plan(recipe(method, parameters, **options)) as opened:
        return opened.parameters[0]


def refused(text):
    return pytest.raises(ValueError, match=re.escape(text))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges_in_every_profile_and_says_what_it_found(models, method, profile):
    report = merge_to_folder(
        recipe(method, profile=profile, output_dir="out"), findings=True, progress=False
    )
    assert report.profile == profile
    assert all("task_vectors" in found for found in report.findings.values())
    assert set(report.findings) == set(read_tensors(models / "out"))


def test_findings_of_rows_do_not_disturb_the_remarks(models):
    options = {"output_dir": "out", "parameters": {"filter_wise": True}}
    merge_to_folder(recipe("model_stock", **options), findings=True, progress=False)


def test_a_profile_changes_defaults_and_what_is_given_wins(models):
    paper = resolved("ties", profile="paper")
    assert (paper["densities"], paper["trim_scope"]) == ((0.2,) * 3, "model")
    given = {"densities": [0.4] * 3, "trim_ties": "index"}
    mixed = resolved("ties", given, profile="paper")
    assert (mixed["densities"], mixed["trim_ties"], mixed["k_rule"]) == (
        (0.4,) * 3,
        "index",
        "paper",
    )


@pytest.mark.parametrize(
    ("given", "profile", "want"),
    [
        ({}, "default", (True, "weight")),
        ({"normalize": False}, "default", (False, "none")),
        ({"denominator": "count"}, "default", (True, "count")),
        ({"denominator": "none"}, "default", (False, "none")),
        ({}, "peft", (True, "count")),
        ({"normalize": True}, "peft", (True, "weight")),
        ({"normalize": True, "denominator": "count"}, "default", (True, "count")),
        ({"normalize": False}, "peft", (False, "none")),
        ({"normalize": False}, "paper", (False, "none")),
    ],
)
def test_normalize_and_denominator_say_the_same(models, given, profile, want):
    values = resolved("ties", given, profile=profile)
    assert (values["normalize"], values["denominator"]) == want


def test_what_has_no_effect_may_be_said_as_it_is_by_itself(models):
    assert "nuslerp_row_wise" not in resolved("nuslerp", {"nuslerp_row_wise": False})
    assert "densities" not in resolved("consensus", {"densities": [1.0] * 3})


def test_della_divides_with_an_election_and_not_without(models):
    assert resolved("della")["denominator"] == "weight"
    assert resolved("della_linear")["normalize"] is False


@pytest.mark.parametrize(
    ("method", "parameters", "text"),
    [
        ("ties", {"normalize": False, "denominator": "count"}, "contradicts denominator count"),
        ("ties", {"normalize": True, "denominator": "none"}, "contradicts denominator none"),
        (
            "dare",
            {"elect_on": "unweighted"},
            "with variant linear. Leave it out, or give variant ties",
        ),
        ("consensus", {"densities": [0.5] * 3}, "densities has no effect with variant linear"),
        ("ram", {"r": 0.3}, "r has no effect with variant ram"),
        ("nuslerp", {"nuslerp_row_wise": True}, "no effect with nuslerp_flatten True"),
        ("ties", {"rescale": "l1", "trim_scope": "row"}, "so trim_scope must not be row"),
        ("breadcrumbs", {"rescale": "l1", "trim_scope": "row"}, "so trim_scope must not be row"),
        ("ties", {"elect_zero": "global_majority"}, "trim_scope must be model or row, got tensor"),
        ("karcher", {"tol": 0.0}, "tol must be above 0"),
        ("sce", {"sce_floor": -1.0}, "sce_floor must be at least 0"),
        ("model_stock", {"stock_norm_floor": -1.0}, "stock_norm_floor must be at least 0"),
        ("passthrough", {"scale": float("inf")}, "scale must be a number"),
        ("karcher", {"max_iter": 0}, "max_iter must be at least 1, got 0"),
        ("dare_ties", {"variant": "linear"}, "dare_ties means variant 'ties', got 'linear'"),
        ("dareties", {}, "unknown method 'dareties'"),
    ],
)
def test_what_does_not_go_together_or_has_no_effect_is_refused(models, method, parameters, text):
    with refused(text):
        plan(recipe(method, parameters))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"include": [1]}, "include must be patterns of names, got 1"),
        ({"clamp_range": 1.0}, "clamp_range must be two numbers, got 1.0"),
        ({"clamp_range": []}, "clamp_range must be two numbers, got ()"),
        ({"clamp_range": ["a", "b"]}, "clamp_range must be two numbers"),
    ],
)
def test_options_of_other_types_are_named(models, options, text):
    with refused(text):
        plan(recipe("linear", **options))


def test_numbers_of_numpy_are_saved_as_numbers(models):
    options = {"clamp_range": np.array([-1, 1]), "weight_decay": np.float32(0.25)}
    report = merge_to_folder(recipe("linear", output_dir="out", **options), progress=False)
    assert report.options["clamp_range"] == (-1.0, 1.0)
    assert "with weight_decay 0.25; clamp_range -1.0, 1.0" in report.summary()
    text = plan(recipe("linear", include=None, exclude=["*norm*"], profile=None)).summary()
    assert "exclude            *norm*" in text


def test_a_range_can_be_open_at_one_end(models):
    options = {"output_dir": "out", "clamp_range": (-np.inf, 0.0), "dtype": "float32"}
    report = merge_to_folder(recipe("linear", **options), progress=False)
    assert report.options["clamp_range"] == (None, 0.0)
    assert max(float(tensor.max()) for tensor in read_tensors(models / "out").values()) == 0


def test_one_model_is_not_moved_by_its_base(models):
    arguments = ["--base", "base", "--ft_models", "a", "--save", "out", "--quiet"]
    assert multislerp_main(arguments) == 0
    merged, model = read_tensors(models / "out"), read_tensors(models / "a")
    assert all(torch.equal(merged[name], model[name]) for name in model)


def test_a_model_that_has_not_changed_a_tensor_can_be_merged_with_eps_0(models):
    save_tensors(models / "a", read_tensors(models / "base"), 1)
    multislerp = make_recipe("multislerp", "base", ["a", "b"], {"eps": 0.0}, output_dir="out")
    merge_to_folder(multislerp, progress=False)


def test_the_functions_of_a_driver_are_the_drivers(models):
    function = linear_llama.linear_merge_llama
    assert pickle.loads(pickle.dumps(function)) is function
    assert function.__module__ == "linear_llama"
    assert "weights: multiplier of each model" in " ".join(inspect.getdoc(function).split())
    with pytest.raises(TypeError, match=r"linear_merge_llama\(\): .*'wieghts'"):
        function(["a"], wieghts=[1.0])
    report = linear_merge_llama_to_folder(
        ["a", "b"], output_dir="out", findings=True, progress=False
    )
    assert "task_vectors" in report.findings["lm_head.weight"]


def test_a_warning_points_to_where_the_function_was_called(models):
    make_llama(models / "d", seed=9, base=models / "base", **{**SMALL, "vocab_size": 30})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dare_llama.dare_merge_llama("base", ["d"], progress=False)
    assert [warning.filename for warning in caught] == [__file__] * len(caught)
    assert caught
