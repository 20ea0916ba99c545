"""ModelMerger: a config becomes a recipe, and every documented use of it works."""

import gc
import io
import json
import logging
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import make_llama

import model_merger
from lora_llama import lora_merge_adapters
from merge_adapters import AdapterMerge
from merger_config import translate
from model_inference import ask, load_model
from model_merger import (
    MergeConfig,
    ModelCompatibilityError,
    ModelMerger,
    check_model_compatibility,
)
from model_verify import verify_folder
from slerp_llama import slerp_merge_llama, slerp_merge_llama_to_folder
from task_arithmetic_llama import task_arithmetic_merge_llama_to_folder

TINY = Path("examples/tiny_llamas").resolve()
CAPITALS, ELEMENTS, ANIMALS, FRENCH = (
    f"{TINY}/{name}" for name in ("capitals", "elements", "animals", "french")
)
BASE = f"{TINY}/base"
PROMPTS = ["capital: france =", "symbol: gold ="]
ARABIC = ["مرحبا، كيف حالك؟", "إزيك؟"]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def recipe(**config):
    config = {"models": [{"path": CAPITALS}, {"path": ELEMENTS}], **config}
    return translate(MergeConfig(**config)).work


def refusal(**config):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (callers look at the text)
        recipe(**{"strategy": "weighted", **config})
    return str(error.value)


# Strategies


def test_weighted_is_a_linear_average(tmp_path):
    config = MergeConfig(
        strategy="weighted",
        models=[
            {"path": CAPITALS, "weight": 1.4, "name": "primary"},
            {"path": ELEMENTS, "weight": 0.6, "name": "secondary"},
        ],
        output_path=tmp_path / "out",
        options={"normalize_weights": True, "weight_decay": 0.5, "verbose": False},
    )
    merger = ModelMerger(config)
    model = merger.merge()
    one, other, out = weights(CAPITALS), weights(ELEMENTS), weights(tmp_path / "out")
    for name, value in out.items():
        mean = (0.7 * one[name].float() + 0.3 * other[name].float()) * 0.5
        torch.testing.assert_close(value.float(), mean, atol=1e-8, rtol=2**-8)
    assert merger.report.output_dir == str(tmp_path / "out")
    assert not verify_folder(tmp_path / "out").problems
    torch.testing.assert_close(model.lm_head.weight, out["lm_head.weight"].float())


def test_strategies_become_recipes():
    models = [{"path": CAPITALS, "weight": 0.75}, {"path": ELEMENTS, "weight": 0.25}]
    assert recipe(strategy="weighted", models=models).parameters["weights"] == [0.75, 0.25]
    off = recipe(strategy="weighted", models=models, options={"normalize_weights": False})
    assert (off.method, off.parameters["normalize"]) == ("linear", False)
    assert recipe(strategy="sequential", models=models).method == "sequential"
    assert recipe(strategy="slerp", models=models).parameters["t"] == 0.25
    assert "t" not in recipe(strategy="slerp").parameters
    scaled = recipe(strategy="task_arithmetic", base_model=BASE, options={"scaling_factor": 0.7})
    assert (scaled.base_model, scaled.parameters["lam"]) == (BASE, 0.7)
    ties = recipe(
        strategy="ties",
        base_model=BASE,
        models=[{"path": CAPITALS, "density": 0.3}, {"path": ELEMENTS}],
        options={"density": 0.6, "trim_scope": "row", "lambda": 0.9},
    )
    assert ties.parameters["densities"] == [0.3, 0.6]
    assert (ties.parameters["trim_scope"], ties.parameters["lam"]) == ("row", 0.9)
    dare = recipe(strategy="dare_ties", base_model=BASE, options={"seed": 3})
    assert (dare.method, dare.parameters["variant"], dare.parameters["seed"]) == ("dare", "ties", 3)


def test_subtract_takes_a_weight_as_negative():
    for weight in (0.5, -0.5):
        models = [
            {"path": CAPITALS, "weight": 1.2, "operation": "add"},
            {"path": ELEMENTS, "weight": weight, "operation": "subtract"},
        ]
        found = recipe(strategy="task_arithmetic", base_model=BASE, models=models)
        assert found.parameters["weights"] == [1.2, -0.5]


def test_the_interpolation_factor_wins_and_says_so():
    models = [{"path": CAPITALS, "weight": 0.7}, {"path": ELEMENTS, "weight": 0.3}]
    config = MergeConfig(strategy="slerp", models=models, options={"interpolation_factor": 0.5})
    job = translate(config)
    assert job.work.parameters["t"] == 0.5
    assert job.notes == ("interpolation_factor 0.5 is taken; by the weights it would be 0.3",)
    config.options["interpolation_factor"] = 0.3
    assert translate(config).notes == ()
    config.options["interpolation_factor"] = None
    assert translate(config).work.parameters["t"] == 0.3


def test_clamping_needs_both_or_neither():
    bounds = {"clamp_range": [-2.0, 2.0]}
    assert recipe(strategy="weighted", options=bounds).clamp_range == (-2.0, 2.0)
    on = recipe(strategy="weighted", options={"clamp_weights": True, **bounds})
    assert on.clamp_range == (-2.0, 2.0)
    off = recipe(strategy="weighted", options={"clamp_weights": False, **bounds})
    assert off.clamp_range is None
    assert "clamp_weights needs clamp_range" in refusal(options={"clamp_weights": True})


def test_the_embedding_and_the_head_can_be_left_alone(tmp_path):
    options = {"merge_embeddings": False, "merge_lm_head": False, "verbose": False}
    models = [{"path": CAPITALS}, {"path": ELEMENTS}]
    ModelMerger(MergeConfig("weighted", models, tmp_path / "out", options=options)).merge()
    first, out = weights(CAPITALS), weights(tmp_path / "out")
    changed = {name for name in out if not torch.equal(out[name], first[name])}
    assert changed
    assert not changed & {"lm_head.weight", "model.embed_tokens.weight"}


def test_an_option_that_means_nothing_here_says_once_what_happens_instead(tmp_path, capsys):
    options = {
        "low_memory_mode": True, "sequential_loading": True, "parallel_loading": True,
        "cache_models": True, "offload_folder": "./temp", "gradient_checkpointing": True,
        "torch_compile": True, "use_safetensors": False, "preserve_tokenizer": False,
        "device_map": "balanced",
    }  # fmt: skip
    models = [{"path": CAPITALS}, {"path": ELEMENTS}]
    merger = ModelMerger(MergeConfig("weighted", models, tmp_path / "out", options=options))
    assert sorted(note.partition(":")[0].split()[0] for note in merger.notes) == sorted(options)
    assert merger.check_compatibility() is True
    merger.merge()
    said = capsys.readouterr().err
    assert said.count("note: low_memory_mode: memory never grows with the models") == 1
    assert not (tmp_path / "temp").exists()
    merger.config.options["verbose"] = False
    with pytest.raises(ValueError, match="out: the output exists already"):
        ModelMerger(merger.config)
    merger.config.output_path = tmp_path / "other"
    quiet = ModelMerger(merger.config)
    quiet.merge()
    assert quiet.notes == merger.notes
    assert "note:" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "dtype"),
    [("fp16", "float16"), ("bf16", "bfloat16"), (torch.float32, "float32"), ("auto", None)],
)
def test_a_dtype_has_several_names(given, dtype):
    assert recipe(strategy="weighted", options={"torch_dtype": given}).dtype == dtype


def test_a_config_is_a_config():
    with pytest.raises(TypeError, match="config must be a MergeConfig"):
        ModelMerger({"strategy": "weighted"})


def test_an_option_that_means_nothing_with_a_strategy_is_named():
    options = {"trim_scope": "row", "interpolation_factor": 0.5, "merge_method": "svd"}
    job = translate(MergeConfig("weighted", [{"path": CAPITALS}], options=options))
    assert job.notes == tuple(f"{name} has no effect with weighted in memory" for name in options)
    for options, output, where in (
        ({"findings": True, "resume": True, "max_shard_size": "1GB"}, None, " in memory"),
        ({"density": 0.5}, "out", ""),
    ):
        job = translate(MergeConfig("weighted", [{"path": "a"}], output, options=options))
        assert job.notes == tuple(f"{name} has no effect with weighted{where}" for name in options)
    options = {"clamp_range": [-1, 1], "merge_lm_head": False, "scaling_factor": 2.0, "lam": 1.0}
    peft = {"base_model_path": BASE}
    job = translate(MergeConfig("weighted", [{"path": "a"}], "out", None, options, peft))
    assert job.notes == tuple(
        f"{name} has no effect with weighted of adapters" for name in [*options][:3]
    )
    options = {"threads": 1, "max_memory": "1KB", "findings": True}
    job = translate(MergeConfig("svd", [{"path": "a"}], "out", None, options, peft))
    assert job.notes == tuple(f"{name} has no effect with svd of adapters" for name in options)


@pytest.mark.parametrize("name", ["options", "peft_config", "validation"])
def test_parts_of_a_config_are_mappings(name):
    assert f"{name} must be a mapping, got ['a']" in refusal(**{name: ["a"]})


def test_on_options_that_are_always_on_nothing_is_said():
    options = {
        "use_safetensors": True, "preserve_tokenizer": True, "merge_embeddings": True,
        "torch_compile": False, "low_memory_mode": None, "device_map": "auto",
    }  # fmt: skip
    assert translate(MergeConfig("weighted", [{"path": CAPITALS}], options=options)).notes == ()


def test_everything_that_is_wrong_is_said_at_once():
    said = refusal(
        models=[{"path": CAPITALS, "wieght": 1}, {"path": 3}, {}, {"path": "b", "weight": "x"}],
        options={"low_memory": True, "torch_dtype": "float8", "density": 0.5, "threads": 0,
                 "weight_decay": 2.0, "log_level": "LOUD", "verbose": "yes"},
        peft_config=None,
        validation={"prompts": [], "sample_size": 0, "metrics": ["fluent"], "run_tests": 1},
    )  # fmt: skip
    for text in (
        "unknown entry (of", "'wieght'; there are: path, weight, name, operation. Did you mean",
        "path of model 2 must be the name of a model folder or a Hub id, got 3",
        'model 3 must be a mapping with "path", got {}', "b: weight must be a number, got 'x'",
        "unknown option 'low_memory'", "Did you mean 'low_memory_mode'?",
        "unknown torch_dtype 'float8'", "threads must be a whole number of at least 1, got 0",
        "weight_decay", "unknown log_level 'LOUD'", "verbose must be true or false, got 'yes'",
        "unknown entry of validation 'prompts'", "Did you mean 'test_prompts'?",
        "sample_size must be a whole number of at least 1, got 0",
        "unknown metric 'fluent'", "run_tests must be true or false, got 1",
    ):  # fmt: skip
        assert text in said, text


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"models": CAPITALS}, 'models must be a list of {"path": ...}'),
        ({"models": []}, 'models must be a list of {"path": ...}'),
        ({"models": [{"path": "a", "weight": 0.7, "operation": "subtract"}, {"path": "b"}]},
         "are divided by their sum, so they must not be negative, got -0.7, 1"),
        ({"peft_config": {"base_model_path": BASE}, "output_path": "out",
          "models": [{"path": "a"}, {"path": "b", "weight": -0.3}]}, "must not be negative"),
        ({"strategy": "slerpp"}, "Did you mean 'slerp'?"),
        ({"strategy": "task_arithmetic"}, "task_arithmetic needs a base_model"),
        ({"strategy": "slerp", "models": [{"path": "a"}] * 3}, "takes exactly 2 fine-tuned"),
        ({"options": {"torch_dtype": "float16", "dtype": "float32"}}, "are the same"),
        ({"options": {"normalize": True, "normalize_weights": True}}, "are the same"),
        ({"options": {"device_map": "cuda"}}, "cuda"),
        ({"models": [{"path": "a", "operation": "subtrct"}]}, "Did you mean 'subtract'?"),
        ({"strategy": "slerp", "models": [{"path": "a", "weight": -1}, {"path": "b"}]},
         "weights of slerp must be at least 0"),
        ({"strategy": "ties", "base_model": BASE, "models": [{"path": "a", "density": 0.5}],
          "options": {"density": 0.4, "densities": [0.4]}}, "both given"),
        ({"validation": {"text": ["a"], "text_file": "b"}}, "text and text_file are both given"),
        ({"validation": {"text_file": "absent.txt"}}, "text_file: "),
        ({"validation": {"test_prompts": "hello"}}, "test_prompts must be a list"),
        ({"validation": ["run_tests"]}, "validation must be a mapping"),
        ({"validation": {"run_tests": True, "test_prompts": []}}, "nothing to validate by"),
        ({"validation": {"quick_test": True, "test_prompts": [], "text": ["a"],
                         "metrics": ["fluency"]}}, "nothing to validate by"),
        ({"output_path": 5}, "output_path must name a folder, got 5"),
        ({"strategy": ["weighted"]}, "unknown strategy ['weighted']"),
        ({"options": {"chat_template": 5}, "output_path": "out"}, "chat_template must be a text"),
        ({"options": {"resume": "no"}, "output_path": "out"}, "resume must be true or false"),
        ({"options": {"log_level": True}}, "unknown log_level True"),
        ({"options": {"weights": [1.0, 1.0]}, "models": [{"path": "a", "weight": 1},
          {"path": "b"}]}, "weights are given twice"),
        ({"options": {"lambda": 0.5, "lam": 0.3}, "base_model": BASE,
          "strategy": "task_arithmetic"}, "lam and lambda are the same"),
        ({"peft_config": {"base_model_path": BASE}, "base_model": CAPITALS, "output_path": "out"},
         "differ. Leave one out"),
        ({"peft_config": {"base_model_path": BASE}, "output_path": "out",
          "models": [{"path": f"{BASE}+a"}]}, "a path names an adapter alone"),
        ({"peft_config": {"base_model_path": BASE, "adapter_names": ["../x"]}},
         "must be a name without slashes"),
        ({"peft_config": {"base_model_path": BASE}, "output_path": "out",
          "options": {"normalize_weights": "no"}}, "normalize_weights must be true or false"),
        ({"peft_config": {"base_model_path": BASE}, "output_path": "out", "strategy": "ties",
          "options": {"densities": 0.3}}, "densities must be a list, got 0.3"),
        ({"peft_config": {"base_model_path": BASE}, "output_path": "out", "strategy": "ties",
          "options": {"densities": [0.3]}, "models": [{"path": "a", "density": 0.2}]},
         "densities are given twice"),
        ({"peft_config": {"base_model_path": BASE}, "output_path": str(TINY)},
         "the output exists already"),
        ({"peft_config": {"base_model": BASE}}, "Did you mean 'base_model_path'?"),
        ({"peft_config": {}, "output_path": "out"}, "base_model_path must name the model"),
        ({"peft_config": {"base_model_path": BASE}}, "output_path must name the folder"),
        ({"peft_config": {"base_model_path": BASE}, "strategy": "slerp", "output_path": "out"},
         "Others need merge_adapters false"),
        ({"peft_config": {"merge_adapters": False}}, "so each adapter is put on a base"),
        ({"peft_config": {"base_model_path": BASE, "adapter_names": ["a", "b", "c"]}},
         "one name for all adapters or one for each, got 3 for 2"),
        ({"peft_config": {"base_model_path": BASE}, "output_path": "out",
          "models": [{"path": "a", "weight": 1}, {"path": "b", "weight": -1}]},
         "cannot be normalized, as their sum is 0"),
        ({"peft_config": {"base_model_path": BASE}, "output_path": "out", "strategy": "ties",
          "options": {"merge_method": "svd"}}, "strategy ties and merge_method 'svd' differ"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_what_to_do(config, text):
    assert text in refusal(**config)


def test_a_merge_is_that_of_the_driver(tmp_path):
    models = [{"path": CAPITALS}, {"path": ELEMENTS}]
    options = {
        "interpolation_factor": 0.3, "normalize_before_slerp": True, "epsilon": 1e-6,
        "torch_dtype": torch.float16, "max_shard_size": "1GB", "verbose": False,
    }  # fmt: skip
    model = ModelMerger(MergeConfig("slerp", models, tmp_path / "one", options=options)).merge()
    slerp_merge_llama_to_folder(
        [CAPITALS, ELEMENTS], 0.3, output_dir=tmp_path / "other", dtype="float16", progress=False,
        normalize_before_slerp=True, epsilon=1e-6,
    )  # fmt: skip
    assert same(tmp_path / "one", tmp_path / "other")
    assert model.dtype == torch.float16


def test_without_an_output_the_result_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = [{"path": CAPITALS}, {"path": ELEMENTS}]
    merger = ModelMerger(MergeConfig("slerp", models, options={"verbose": False}))
    model = merger.merge()
    expected = slerp_merge_llama([CAPITALS, ELEMENTS], progress=False).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert [*tmp_path.iterdir()] == []
    assert merger.report is None
    merger.save_merged_model(model, "saved/here")
    assert not verify_folder(tmp_path / "saved" / "here").problems
    saved = load_model(tmp_path / "saved" / "here", "cpu")
    assert all(torch.equal(v, expected[n]) for n, v in saved.model.state_dict().items())
    assert saved.tokenizer.get_vocab() == merger.tokenizer.get_vocab()
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["here"]
    with pytest.raises(FileExistsError):
        merger.save_merged_model(model, "saved/here")


def test_a_merger_goes_on_with_what_is_there(tmp_path):
    models = [{"path": CAPITALS}, {"path": ELEMENTS}]
    options = {"resume": True, "verbose": False}
    config = MergeConfig("slerp", models, tmp_path / "out", options=options)
    first = ModelMerger(config).merge()
    merger = ModelMerger(config)
    assert merger.plan().output_dir == str(tmp_path / "out")
    again = merger.merge()
    assert merger.report.finished_before
    assert all(torch.equal(one, two) for one, two in zip(
        first.state_dict().values(), again.state_dict().values(), strict=True
    ))  # fmt: skip


def test_a_half_saved_model_leaves_nothing(tmp_path, monkeypatch):
    models = [{"path": CAPITALS}, {"path": ELEMENTS}]
    merger = ModelMerger(MergeConfig("slerp", models, options={"verbose": False}))
    model = merger.merge()

    def fail(_):
        raise OSError("no")

    monkeypatch.setattr(merger.tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="no"):
        merger.save_merged_model(model, tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


def test_models_that_do_not_fit_are_refused_before_anything_is_made(tmp_path):
    make_llama(tmp_path / "wide", hidden_size=64)
    make_llama(tmp_path / "small")
    models = [{"path": str(tmp_path / "wide")}, {"path": str(tmp_path / "small")}]
    merger = ModelMerger(MergeConfig("weighted", models, tmp_path / "out"))
    for check in (merger.check_compatibility, merger.merge, merger.plan):
        with pytest.raises(ModelCompatibilityError, match="Merge models of one size"):
            check()
    with pytest.raises(ModelCompatibilityError, match="Merge models of one size"):
        check_model_compatibility(models)
    check_model_compatibility(models[:1])
    assert not (tmp_path / "out").exists()


def test_models_are_loaded_by_name():
    models = [{"path": CAPITALS, "name": "one"}, {"path": f"{BASE}+{TINY}/elements-lora"}]
    config = MergeConfig("weighted", models, options={"torch_dtype": "float32"})
    loaded = ModelMerger(config).load_models()
    assert [*loaded] == ["one", "elements-lora"]
    assert all(model.dtype == torch.float32 for model in loaded.values())


# Adapters


@pytest.fixture(scope="module")
def merged_adapter(tmp_path_factory):
    """A merger, its adapter and the folder of it."""
    out = tmp_path_factory.mktemp("adapter") / "out"
    config = MergeConfig(
        strategy="weighted",
        models=[
            {"path": f"{TINY}/capitals-lora", "weight": 1.2},
            {"path": f"{TINY}/elements-lora", "weight": 0.8},
        ],
        output_path=out,
        peft_config={
            "merge_adapters": True, "adapter_names": ["default"], "base_model_path": BASE
        },
        options={"preserve_base_model": True, "verbose": False},
        validation={"run_tests": True, "test_prompts": PROMPTS, "max_new_tokens": 12},
    )  # fmt: skip
    merger = ModelMerger(config)
    assert merger.check_compatibility() is True
    return merger, merger.merge(), out


def test_adapters_become_one_adapter_on_their_base(merged_adapter, tmp_path):
    merger, adapter, out = merged_adapter
    lora_merge_adapters(
        [f"{TINY}/capitals-lora", f"{TINY}/elements-lora"], tmp_path / "own", [0.6, 0.4],
        progress=False,
    )  # fmt: skip
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "own" / name).read_bytes()
    assert type(adapter).__name__ == "PeftModelForCausalLM"
    assert (merger.report.method, merger.report.ranks) == ("cat", (16, 16))
    assert [(each.name, each.role) for each in merger.validation.models] == [
        ("base", "base"), ("capitals-lora", "source"), ("elements-lora", "source"),
        ("out", "merge"),
    ]  # fmt: skip
    merger.save_merged_model(adapter, tmp_path / "saved")
    assert (tmp_path / "saved" / name).exists()
    assert (tmp_path / "saved" / "tokenizer.json").exists()


def test_without_peft_the_merged_adapter_is_folded(merged_adapter, tmp_path, monkeypatch, capsys):
    merger, adapter, _ = merged_adapter
    config = MergeConfig(**{**vars(merger.config), "output_path": tmp_path / "out"})
    config.validation, config.options = None, {}
    monkeypatch.setitem(sys.modules, "peft", None)
    folded = ModelMerger(config).merge()
    assert "note: PEFT is not installed" in capsys.readouterr().err
    ids = torch.arange(12)[None]
    torch.testing.assert_close(folded(ids).logits, adapter(ids).logits, atol=1e-4, rtol=1e-4)


def test_adapters_of_another_base_are_named(tmp_path, capsys):
    config = MergeConfig(
        "weighted", [{"path": f"{TINY}/capitals-lora"}], tmp_path / "out", None, {},
        {"base_model_path": ELEMENTS},
    )  # fmt: skip
    merger = ModelMerger(config)
    merger.merge()
    said = capsys.readouterr().err
    assert "the base here is" in said
    assert any("the base here is" in note for note in merger.notes)


def test_adapters_can_be_merged_as_models(tmp_path):
    config = MergeConfig(
        strategy="task_arithmetic",
        models=[{"path": f"{TINY}/capitals-lora"}, {"path": f"{TINY}/elements-lora"}],
        output_path=tmp_path / "out",
        peft_config={"merge_adapters": False, "base_model_path": BASE},
        options={"verbose": False},
    )
    ModelMerger(config).merge()
    models = [f"{BASE}+{TINY}/{name}-lora" for name in ("capitals", "elements")]
    task_arithmetic_merge_llama_to_folder(BASE, models, output_dir=tmp_path / "own", progress=False)
    assert same(tmp_path / "out", tmp_path / "own")


def test_methods_of_adapters_are_strategies_too():
    config = MergeConfig(
        strategy="dare_ties",
        models=[{"path": "a", "density": 0.5}, {"path": "b", "weight": 2}],
        output_path="out",
        peft_config={"base_model_path": BASE, "adapter_names": ["default", "chat"]},
        options={"rank": 4, "seed": 7, "lam": 0.5, "torch_dtype": "float16"},
    )
    assert translate(config).work == AdapterMerge(
        adapters=("a", os.path.join("b", "chat")), method="dare_ties", weights=(1.0, 2.0), rank=4,
        densities=(0.5, 1.0), lam=0.5, seed=7, dtype="float16",
    )  # fmt: skip
    config.strategy, config.options = "task_arithmetic", {}
    config.models = [{"path": "a"}, {"path": "b", "weight": 0.3, "operation": "subtract"}]
    assert translate(config).work.weights == (1.0, -0.3)
    config.options = {"merge_method": "svd"}
    assert translate(config).work.method == "svd"


def test_an_adapter_that_does_not_fit_its_base_is_found_out(tmp_path):
    make_llama(tmp_path / "other")
    config = MergeConfig(
        strategy="weighted",
        models=[{"path": f"{TINY}/capitals-lora"}],
        output_path=tmp_path / "out",
        peft_config={"base_model_path": str(tmp_path / "other")},
    )
    for check in (ModelMerger(config).check_compatibility, ModelMerger(config).merge):
        with pytest.raises(ModelCompatibilityError, match="capitals-lora"):
            check()
    assert not (tmp_path / "out").exists()


def test_a_base_to_compare_with_is_looked_for_before_the_merge(tmp_path):
    models = [{"path": CAPITALS}, {"path": ELEMENTS}]
    absent, tests = str(tmp_path / "absent"), {"run_tests": True}
    config = MergeConfig("slerp", models, tmp_path / "out", absent, validation=tests)
    with pytest.raises(ModelCompatibilityError, match="absent: no such folder"):
        ModelMerger(config).merge()
    assert not (tmp_path / "out").exists()


# Validation


def test_a_validation_sets_the_merge_beside_its_sources(tmp_path, capsys):
    text = tmp_path / "facts.jsonl"
    text.write_text("\n".join(map(json.dumps, [*PROMPTS, "young: dog = puppy"])))
    config = MergeConfig(
        strategy="task_arithmetic",
        base_model=BASE,
        models=[{"path": CAPITALS, "name": "base"}, {"path": ELEMENTS, "name": "out"}],
        output_path=tmp_path / "out",
        options={"torch_dtype": "float32"},
        validation={
            "run_tests": True, "test_prompts": [*PROMPTS, ARABIC[0]], "text_file": str(text),
            "sample_size": 2, "test_batch_size": 2, "max_new_tokens": 12,
            "metrics": ["perplexity", "coherence"],
        },
    )  # fmt: skip
    merger = ModelMerger(config)
    model = merger.merge()
    found = merger.validation
    assert [(each.name, each.role) for each in found.models] == [
        ("base (2)", "base"), ("base", "source"), ("out", "source"), ("out (2)", "merge"),
    ]  # fmt: skip
    merge = found.models[-1]
    assert [answer.text.strip() for answer in merge.answers[:2]] == ["paris", "Au"]
    assert (merge.perplexity.texts, merge.dtype) == (2, "float32")
    assert "the first 2 of 3 texts are read (sample_size)" in found.notes
    assert found.columns == ("perplexity", "bits_per_byte", "distinct_1")
    assert f"> \u2068{ARABIC[0]}\u2069" in capsys.readouterr().out
    again = merger.validate_merge(model)
    assert [each.answers for each in again.models] == [each.answers for each in found.models]
    other = ModelMerger(MergeConfig(**{**vars(config), "output_path": tmp_path / "more"}))
    assert other.validate_merge(model).models[-1].answers == merge.answers


def test_a_result_is_not_lost_where_it_cannot_be_validated(tmp_path):
    config = MergeConfig(
        strategy="weighted",
        models=[{"path": CAPITALS}, {"path": ELEMENTS}],
        options={"verbose": False},
        validation={"run_tests": True, "test_prompts": ["x " * 100]},
    )
    merger = ModelMerger(config)
    with pytest.warns(UserWarning, match=r"the merge is done, .* the model can see 64"):
        model = merger.merge()
    assert merger.validation is None
    assert model(torch.arange(3)[None]).logits.isfinite().all()


@pytest.mark.parametrize("output", ["x/../out", None])
def test_models_without_a_tokenizer_are_merged_but_not_asked(tmp_path, monkeypatch, output, capsys):
    monkeypatch.chdir(tmp_path)
    models = [
        {"path": str(make_llama(tmp_path / name, seed=seed))} for seed, name in enumerate("ab")
    ]
    merger = ModelMerger(MergeConfig("weighted", models, output))
    model = merger.merge()
    assert "note: the models have no tokenizer" in capsys.readouterr().err
    assert model(torch.arange(3)[None]).logits.isfinite().all()
    assert (merger.model, merger.tokenizer) == (model, None)
    merger.save_merged_model(model, "saved")
    assert not verify_folder(tmp_path / "saved").problems
    config = MergeConfig("weighted", models, "more", validation={"run_tests": True})
    for check in (ModelMerger(config).check_compatibility, ModelMerger(config).merge):
        with pytest.raises(ModelCompatibilityError, match="cannot load its tokenizer"):
            check()
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("names", [["a", "a", "a (2)"], ["base", "merged", "merged"]])
def test_a_name_decides_nothing_but_what_is_shown(names):
    paths = [CAPITALS, ELEMENTS, ANIMALS]
    models = [{"path": path, "name": name} for path, name in zip(paths, names, strict=True)]
    config = MergeConfig(
        "weighted", models, base_model=BASE, options={"verbose": False},
        validation={"run_tests": True, "test_prompts": PROMPTS[:1], "max_new_tokens": 2},
    )  # fmt: skip
    job = translate(config)
    assert job.work.models == tuple(paths)
    assert [*job.sources.values()] == paths
    merger = ModelMerger(config)
    merger.merge()
    roles = [each.role for each in merger.validation.models]
    assert roles == ["base", "source", "source", "source", "merge"]
    assert len({each.name for each in merger.validation.models}) == 5


def test_a_template_or_a_terminal_that_fails_loses_no_result(monkeypatch):
    config = MergeConfig(
        "slerp", [{"path": CAPITALS}, {"path": ELEMENTS}],
        validation={"quick_test": True, "test_prompts": ["مرحبا"], "chat": True},
    )  # fmt: skip
    template = "{{ raise_exception('no') }}"
    merger = ModelMerger(config)
    monkeypatch.setattr(merger._tokenizer(), "chat_template", template)
    with pytest.warns(UserWarning, match="could not be validated: no"):
        assert merger.merge() is merger.model
    config.validation["chat"] = False
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    ModelMerger(config).merge()
    sys.stdout.seek(0)
    assert "\\u0645" in sys.stdout.read()


def test_looking_at_a_model_leaves_it_as_it_was():
    config = MergeConfig(
        "slerp", [{"path": CAPITALS}, {"path": ELEMENTS}], options={"verbose": False},
        validation={"test_prompts": PROMPTS[:1], "max_new_tokens": 2},
    )  # fmt: skip
    merger = ModelMerger(config)
    model = merger.merge().train()
    before = torch.random.get_rng_state()
    merger.validate_merge(model)
    assert model.training
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_base_that_nothing_needs_is_not_looked_for():
    models = [{"path": CAPITALS}, {"path": ELEMENTS}]
    for validation in ({}, {"quick_test": True, "test_prompts": PROMPTS}):
        config = MergeConfig("slerp", models, base_model="absent", validation=validation)
        config.options = {"verbose": False}
        ModelMerger(config).merge()


def test_how_a_merge_is_run_is_handed_on(tmp_path, monkeypatch):
    models = [{"path": CAPITALS}, {"path": ELEMENTS}]
    seen = {}

    def record(name):
        work = getattr(model_merger, name)

        def recorded(*given, **named):
            seen[name] = named
            return work(*given, **named)

        monkeypatch.setattr(model_merger, name, recorded)

    for name in ("merge_to_model", "merge_adapters"):
        record(name)
    options = {"verify_inputs": True, "threads": 1, "max_memory": "4GB", "verbose": False}
    with pytest.warns(UserWarning, match="SHA-256"):
        ModelMerger(MergeConfig("weighted", models, options=options)).merge()
    assert seen["merge_to_model"] == {
        "device": "cpu", "threads": 1, "max_memory": "4GB", "progress": False,
        "verify_inputs": True,
    }  # fmt: skip
    config = MergeConfig(
        "cat", [{"path": f"{TINY}/capitals-lora"}], tmp_path / "out", None,
        {"resume": True, "verify_inputs": True, "verbose": False}, {"base_model_path": BASE},
    )  # fmt: skip
    ModelMerger(config).merge()
    assert seen["merge_adapters"] == {"progress": False, "resume": True, "verify_inputs": True}


def test_the_tokenizer_of_merged_adapters_is_that_of_the_adapter(tmp_path):
    adapter = shutil.copytree(f"{TINY}/capitals-lora", tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{BASE}/{name}", adapter)
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "hi"}))
    config = MergeConfig(
        "cat", [{"path": str(adapter)}], tmp_path / "out", None, {"verbose": False},
        {"base_model_path": BASE},
    )  # fmt: skip
    merger = ModelMerger(config)
    merger.merge()
    assert merger.tokenizer.chat_template == "hi"
    assert (
        ModelMerger(replace(config, output_path=tmp_path / "b"))._tokenizer().chat_template == "hi"
    )


def test_vocabularies_that_differ_do_not_fit_as_they_are(tmp_path):
    for size in (40, 44):
        make_llama(tmp_path / str(size), vocab_size=size, tokenizer=True)
    models = [{"path": str(tmp_path / "40")}, {"path": str(tmp_path / "44")}]
    with pytest.raises(ModelCompatibilityError, match="vocab"):
        check_model_compatibility(models)
    merger = ModelMerger(MergeConfig("weighted", models, tmp_path / "out"))
    assert merger.check_compatibility()


def test_a_quick_test_asks_the_result_one_thing(tmp_path):
    config = MergeConfig(
        strategy="slerp",
        models=[{"path": CAPITALS}, {"path": ELEMENTS}],
        options={"verbose": False},
        validation={"quick_test": True, "test_prompts": PROMPTS, "sample_size": 50},
    )
    merger = ModelMerger(config)
    model = merger.merge()
    (measured,) = merger.validation.models
    assert (measured.name, measured.role) == ("merged", "merge")
    (answer,) = measured.answers
    assert translate(config).validation.max_new_tokens == 16
    assert answer == ask(load_like(model, merger), PROMPTS[:1], max_new_tokens=16)[0]
    assert merger.validation.notes == (
        "quick_test asks the first of 2 prompts",
        "perplexity and bits per byte are those of the prompts, as no text is given",
    )


def load_like(model, merger):
    return model_merger.Running(model, merger.tokenizer, "cpu", "float32")


# Devices


class NoMemory:
    """A merge or a load for which a GPU has too little memory."""

    def __init__(self, work):
        self.work, self.devices = work, []

    def __call__(self, *given, device=None, **named):
        where = device if device is not None else given[-2]
        self.devices.append(where)
        if where != "cpu":
            raise torch.cuda.OutOfMemoryError("out of memory")
        return self.work(*given, **({} if device is None else {"device": device}), **named)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU in name, which has no memory."""
    monkeypatch.setattr("merge_run.device_problems", lambda _: iter(()))
    monkeypatch.setattr("model_inference.chosen_device", lambda device: device)
    monkeypatch.setattr(model_merger, "chosen_device", lambda device: device)


@pytest.mark.parametrize("output", ["out", None])
def test_where_a_gpu_has_too_little_memory_the_cpu_merges(
    gpu, output, tmp_path, monkeypatch, capsys
):
    name = "merge_to_model" if output is None else "merge_to_folder"
    load = "run_loaded" if output is None else "load_to_run"
    merge, load_it = NoMemory(getattr(model_merger, name)), NoMemory(getattr(model_merger, load))
    monkeypatch.setattr(model_merger, name, merge)
    monkeypatch.setattr(model_merger, load, load_it)
    config = MergeConfig(
        strategy="weighted",
        models=[{"path": CAPITALS}, {"path": ELEMENTS}],
        output_path=output and tmp_path / output,
        options={"device_map": "cuda"},
    )
    model = ModelMerger(config).merge()
    assert merge.devices == load_it.devices == ["cuda", "cpu"]
    assert model.device.type == "cpu"
    said = capsys.readouterr().err
    assert "note: the memory of cuda does not suffice to merge (out of memory)" in said
    assert "note: the memory of the GPU does not suffice (out of memory); the CPU is used" in said


@pytest.mark.parametrize(
    ("device_map", "merges", "loads"),
    [
        (None, "cpu", "auto"), ("auto", "cpu", "auto"), ("cpu", "cpu", "cpu"),
        ("cuda", "cuda", "cuda"), ("cuda:1", "cuda:1", "cuda:1"), (0, "cuda:0", "cuda:0"),
        ({"": 1}, "cuda:1", "cuda:1"), ({"": "cpu"}, "cpu", "cpu"), ("balanced", "cpu", "auto"),
        ("cpu:0", "cpu", "cpu"),
    ],
)  # fmt: skip
def test_a_device_map_says_where_to_merge_and_where_to_load(gpu, device_map, merges, loads):
    options = {"device_map": device_map}
    job = translate(MergeConfig("weighted", [{"path": CAPITALS}], options=options))
    assert (job.run.device, job.device) == (merges, loads)


# Documented uses


def test_with_logging_every_step_is_told(tmp_path, caplog, capsys, monkeypatch):
    config = MergeConfig(
        strategy="weighted",
        models=[{"path": CAPITALS, "weight": 0.6}, {"path": ELEMENTS, "weight": 0.4}],
        output_path=tmp_path / "out",
        options={"verbose": True, "log_level": "INFO"},
    )
    config.options["low_memory_mode"] = True
    try:
        ModelMerger(config).merge()
        assert "merging 2 models by weighted" in caplog.text
        assert "the result runs in float32 on cpu" in caplog.text
        assert "low_memory_mode: memory never grows" in caplog.text
        assert "low_memory_mode" not in capsys.readouterr().err  # said once
        monkeypatch.setattr(logging.getLogger("model_merger"), "propagate", False)
        ModelMerger(MergeConfig(**{**vars(config), "output_path": tmp_path / "more"})).merge()
        assert "low_memory_mode" in capsys.readouterr().err  # no handler would show it
    finally:
        logging.getLogger("model_merger").setLevel(logging.NOTSET)


def test_a_config_can_be_changed_and_merged_again(tmp_path):
    """As after running out of a GPU's memory."""
    config = MergeConfig(
        strategy="weighted",
        models=[{"path": CAPITALS, "weight": 0.5}, {"path": ELEMENTS, "weight": 0.5}],
        output_path=tmp_path / "out",
        options={"verbose": False},
    )
    merger = ModelMerger(config)
    try:
        torch.cuda.empty_cache()
        gc.collect()
        raise torch.cuda.OutOfMemoryError
    except torch.cuda.OutOfMemoryError:
        config.options["device_map"] = "cpu"
        config.options["low_memory_mode"] = True
        merger = ModelMerger(config)
        model = merger.merge()
    assert model.device.type == "cpu"
    assert merger.notes == (
        "low_memory_mode: memory never grows with the models; max_memory sets a limit",
    )


def test_four_models_of_unequal_weight(tmp_path):
    shares = {CAPITALS: 0.3, ELEMENTS: 0.3, ANIMALS: 0.2, FRENCH: 0.2}
    config = MergeConfig(
        strategy="weighted",
        models=[{"path": p, "weight": share, "name": p[-4:]} for p, share in shares.items()],
        output_path=tmp_path / "out",
        options={"normalize_weights": True, "preserve_tokenizer": True, "verbose": False},
        validation={"run_tests": True, "test_prompts": ARABIC, "max_new_tokens": 4},
    )
    merger = ModelMerger(config)
    merger.merge()
    assert [each.name for each in merger.validation.models] == [
        *(path[-4:] for path in shares), "out"
    ]  # fmt: skip
    assert merger.validation.judge == "tals"
    assert [answer.prompt for answer in merger.validation.models[-1].answers] == ARABIC
