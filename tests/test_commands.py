"""Recipes and commands: what is refused and how it is said, plans, help, exit status."""

import builtins
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from tiny_checkpoints import make_llama, read_tensors, tensor_hashes

import merge_memory
import merge_progress
import merge_run
from dare_llama import dare_merge_llama_to_folder
from della_llama import della_merge_llama_to_folder
from linear_llama import linear_merge_llama_to_folder
from merge import merge_recipe, plan_recipe
from merge_memory import fit_memory
from merge_methods import METHODS
from merge_plan import open_plan
from merge_recipe import make_recipe
from merge_run import plan
from model_errors import MemoryLimitError, ModelCompatibilityError
from slerp_llama import slerp_merge_llama_to_folder
from task_arithmetic_llama import task_arithmetic_merge_llama_to_folder
from ties_llama import main as ties_main
from ties_llama import ties_merge_llama, ties_merge_llama_to_folder

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"layers": 1, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}
NEEDED = {"HOME", "PATH", "LANG", "TMPDIR"}


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A base and two fine-tunes in the current folder: base, a and b."""
    base = make_llama(tmp_path / "base", seed=1, tokenizer=True, **SMALL)
    for seed, name in enumerate("ab", 2):
        make_llama(tmp_path / name, seed=seed, base=base, **SMALL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ties(*arguments, models=("a", "b")):
    """The command's exit status."""
    return ties_main(["base", "--ft_models", *models, *map(str, arguments)])


def command(*arguments, cwd):
    """A driver as a process of its own, without anything of this one's environment."""
    environment = {name: os.environ[name] for name in NEEDED & os.environ.keys()}
    return subprocess.run(
        [sys.executable, ROOT / f"{arguments[0]}_llama.py", *arguments[1:]],
        cwd=cwd, capture_output=True, text=True, env=environment,
    )  # fmt: skip


# Parameters


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"weights": [1.0]}, r"weights must have one entry per model: got 1 \(1.0\) for 2 models"),
        ({"weights": [1, 2, 3]}, r"weights must have one entry per model: got 3 \(1, 2, 3\)"),
        (
            {"weights": [1.0, math.nan]},
            "weights must be 0 or between 1e-30 and 1e\\+30 in magnitude, got nan",
        ),
        ({"weights": [1.0, "x"]}, "weights must be of type float, got 'x'"),
        ({"weights": [True, 1.0]}, "weights must be of type float, got True"),
        ({"weights": 0.5}, "weights must be a list with one entry per model, got 0.5"),
        ({"weights": [1.0, -1.0]}, "weights must not be negative when normalize is on"),
        ({"densities": [0.5]}, "densities must have one entry per model: got 1"),
        ({"densities": [0.5, 1.5]}, r"densities must be in \[0, 1\] .* got 1.5"),
        ({"densities": [0.5, 20]}, r"densities must be in \[0, 1\] .* got 20"),
        ({"densities": [0.5, math.nan]}, r"densities must be in \[0, 1\] .* got nan"),
        ({"lam": math.inf}, "lam must be a number up to .* in magnitude, got inf"),
        ({"normalize": "yes"}, "normalize must be of type bool, got 'yes'"),
        ({"dtype": "fp16"}, "dtype must be one of float32, float16, bfloat16, got 'fp16'"),
        ({"max_shard_size": "5 apples"}, "max_shard_size must be a size such as 5GB"),
        ({"max_shard_size": 5}, "max_shard_size 5 would be bytes. Say the unit, as in 5MB or 5GB"),
        ({"output_dir": "a/merged"}, "a/merged: the output lies inside the model 'a'. Choose"),
        ({"rescale": True}, "rescale must be one of l1, none, got True"),
        ({"k_rule": numpy.array(["floor", "x"])}, "k_rule must be one of floor, paper, peft, got "),
        ({"profile": ["paper"]}, r"unknown profile \['paper'\]; there are: default"),
        ({"threads": 0}, "threads must be a whole number of at least 1, got 0"),
        ({"device": "nowhere"}, "device 'nowhere' cannot be used here"),
        ({"output_dir": "a"}, "a: the output exists already"),
        ({"ft_model_paths": []}, "ties takes at least 1 fine-tuned model, got 0"),
    ],
)
def test_parameters_out_of_range_are_refused(models, options, text):
    arguments = {"ft_model_paths": ["a", "b"], "output_dir": "out", "progress": False, **options}
    with pytest.raises((ValueError, FileExistsError), match=text):
        ties_merge_llama_to_folder("base", **arguments)
    assert sorted(os.listdir(models)) == ["a", "b", "base"]


def test_numbers_of_numpy_and_torch_are_numbers(models):
    numpy.testing.assert_equal(
        *(
            ties_merge_llama_to_folder(
                "base", ["a", "b"], weights, densities, output_dir=out, progress=False
            ).parameters
            for weights, densities, out in (
                ([0.5, 0.25], [0.5, 1.0], "x"),
                (numpy.array([0.5, 0.25], "float32"), torch.tensor([0.5, 1.0]), "y"),
            )
        )
    )


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ties_merge_llama(["a"], "base"), "base_model_path must be the name .* got .'a'."),
        (lambda: ties_merge_llama("base", [torch.nn.Linear(2, 2)]), "each of ft_model_paths must"),
        (lambda: ties_merge_llama("base", None), "ft_model_paths must be a list of models, got"),
        (lambda: ties_merge_llama("", ["a"]), "base_model_path must be the name"),
    ],
)
def test_arguments_of_another_type_are_named(models, call, text):
    with pytest.raises(TypeError, match=text):
        call()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: slerp_merge_llama_to_folder(["a", "b", "base"], output_dir="out"), "exactly 2"),
        (lambda: slerp_merge_llama_to_folder(["a", "b"], 1.5, output_dir="out"), "t must be in"),
        (
            lambda: linear_merge_llama_to_folder(["a", "b"], [1.0, -1.0], output_dir="out"),
            "sum to 0, so they cannot be normalized",
        ),
        (
            lambda: dare_merge_llama_to_folder("base", ["a"], seed=-1, output_dir="out"),
            "seed must be an integer in",
        ),
        (
            lambda: dare_merge_llama_to_folder("base", ["a"], seed=1.5, output_dir="out"),
            "seed must be of type int, got 1.5",
        ),
        (
            lambda: dare_merge_llama_to_folder("base", ["a"], rescale="l2", output_dir="out"),
            "rescale must be one of inverse_density, l1, none, got 'l2'",
        ),
        (
            lambda: dare_merge_llama_to_folder("base", ["a"], variant="ty", output_dir="out"),
            "variant must be one of linear, ties, got 'ty'",
        ),
        (
            lambda: task_arithmetic_merge_llama_to_folder(
                "base", ["a", "b"], [1.0, -1.0], normalize=True, output_dir="out"
            ),
            "sum to 0",
        ),
    ],
)
def test_parameters_of_other_methods(models, call, text):
    with pytest.raises(ValueError, match=text):
        call()
    assert not (models / "out").exists()


def test_one_path_instead_of_a_list_is_a_type_error(models):
    with pytest.raises(TypeError, match="ft_model_paths must be a list of models, got the single"):
        ties_merge_llama("base", "a")


def test_everything_wrong_is_said_at_once(models, capsys):
    (models / "a/config.json").unlink()
    (models / "b/model.safetensors").write_bytes(b"")
    assert ties("--weights", 1, "--densities", 2, 0.5, "--save", "base") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    for start, line in zip(
        (
            "error: weights must have one entry per model",
            "error: densities must be in [0, 1]",
            "error: base: the output exists already",
            "error: a: no config.json",
            "error: b/model.safetensors: not a complete safetensors file",
        ),
        lines,
        strict=True,
    ):
        assert line.startswith(start)


def test_so_is_everything_wrong_with_the_parameters(models):
    with pytest.raises(ValueError, match="unknown profile") as caught:
        ties_merge_llama_to_folder(
            "base",
            ["a", "b"],
            [1.0, "x"],
            [2.0, -1.0],
            k_rule="peft2",
            profile="papr",
            weight_decay=2,
            clamp_range=(3, 1),
            include=["nothing.*", "model.*"],
            output_dir="out",
        )
    assert str(caught.value).splitlines() == [
        "unknown profile 'papr'; there are: default, mergekit, mergekit-0.1.4, mergekit-0.0.6, "
        "paper, peft. Did you mean 'paper'?",
        "weights must be of type float, got 'x' (model 2)",
        "densities must be in [0, 1] (the share of each task vector kept), got 2.0; for 2 percent "
        "write 0.02 (model 1)",
        "densities must be in [0, 1] (the share of each task vector kept), got -1.0 (model 2)",
        "k_rule must be one of floor, paper, peft, got 'peft2'",
        "weight_decay must be in [0, 1), got 2.0",
        "clamp_range must be a lowest and a highest value, in this order, got (3.0, 1.0)",
        "include 'nothing.*' fits none of the 12 tensors; they are named like "
        "lm_head.weight and model.norm.weight. * stands for anything",
    ]


def test_what_hangs_on_an_unknown_profile_is_not_judged(models):
    """In the profile that was meant, negative weights may be right."""
    weights = [1.0, -1.0]
    with pytest.raises(ValueError, match="Did you mean 'mergekit'") as caught:
        ties_merge_llama_to_folder("base", ["a", "b"], weights, profile="mergkit", output_dir="out")
    assert len(str(caught.value).splitlines()) == 1


def test_options_are_judged_beside_an_unknown_method_and_a_wrong_type(models):
    recipe = make_recipe("tie", "base", ["a", "b"], {}, weight_decay="x", clamp_range=(3, 1))
    with pytest.raises(ValueError, match="unknown method 'tie'") as caught:
        plan(recipe)
    assert [line.split(" must")[0] for line in str(caught.value).splitlines()[1:]] == [
        "weight_decay",
        "clamp_range",
    ]


def test_patterns_are_not_judged_by_some_of_the_models(models):
    recipe = make_recipe("ties", "base", ["a", "gone"], {}, include=["nothing"])
    with pytest.raises(ModelCompatibilityError) as caught:
        plan(recipe)
    assert "fits none" not in str(caught.value)


def test_numbers_below_0_may_have_exponents(models):
    weights = ("--weights", "-1e-3", "1", "--negative_weights")
    assert ties(*weights, "--clamp_range", "-inf", "1e1", "--save", "out") == 0
    recipe = json.loads(Path("out/merge_report.json").read_text())["recipe"]
    assert [each["parameters"]["weight"] for each in recipe["models"]] == [-0.001, 1.0]
    assert recipe["clamp_range"] == [None, 10.0]


def test_parts_that_do_not_go_together_are_all_named(models):
    with pytest.raises(ValueError, match="weights") as caught:
        ties_merge_llama_to_folder(
            "base", ["a", "b"], [1.0, -1.0], trim_scope="row", rescale="l1", output_dir="out"
        )
    assert [line.split(",")[0] for line in str(caught.value).splitlines()] == [
        "weights must not be negative when normalize is on",
        "rescale l1 keeps the norm of what is trimmed as one",
    ]
    with pytest.raises(ValueError, match="epsilons") as caught:
        della_merge_llama_to_folder("base", ["a", "b"], densities=[0.1, 0.9], output_dir="out")
    assert [line[-9:] for line in str(caught.value).splitlines()] == ["(model 1)", "(model 2)"]


@pytest.mark.parametrize(
    ("driver", "options", "note"),
    [
        ("ties", {}, "every density is 1.0, so nothing is trimmed or dropped; 0.2 to 0.5 is usual"),
        ("ties", {"weights": [0.0, 0.0]}, "all weights are 0, so the result is the base"),
        ("breadcrumbs", {"gammas": [0.1, 0.1]}, "dropped and gammas have no effect"),
        ("della", {"epsilons": [0.2, 0.2]}, "dropped and epsilons have no effect; 0.2 to 0.5"),
    ],
)
def test_what_comes_to_nothing_is_noted(models, driver, options, note):
    recipe = make_recipe(driver, "base", ["a", "b"], options)
    assert any(note in each for each in plan(recipe).notes)


def test_the_time_left_is_reckoned_from_the_first_bytes(monkeypatch, capsys):
    """Before them, loops may have been compiled."""
    clock = iter([0.0, 100.0, 110.0, 120.0])
    monkeypatch.setattr("merge_progress.time.monotonic", lambda: next(clock))
    with merge_progress.progress_bar(4000, "ties", show=True) as on_bytes:
        for _ in range(3):
            on_bytes(1000)
    assert capsys.readouterr().err.splitlines()[-1].endswith("(75 %), about 10 s left")


def test_so_is_that_of_a_bar():
    class Bar:
        said = ()

        def reset(self):
            self.said = (*self.said, "reset")

        def update(self, count):
            self.said = (*self.said, count)

    bar = merge_progress._Bar(Bar())
    for count in (0, 5, 6):
        bar.update(count)
    assert bar.bar.said == (0, "reset", 5, 6)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells them apart")
def test_the_report_tells_libraries_from_the_rest(models):
    report = ties_merge_llama_to_folder("base", ["a", "b"], output_dir="out", progress=False)
    assert 10**7 < report.mapped_memory < report.peak_memory - 10**7
    assert f"{report.mapped_memory / 1e6:.2f} MB of it libraries' files" in report.summary()


def quantize(config):
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}


def change_config(folder, change):
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda: os.remove("a/config.json"), "error: a: no config.json"),
        (lambda: os.truncate("a/model.safetensors", 300), "not a complete safetensors file"),
        (lambda: change_config("a", quantize), "weights are quantized (quant_method 'gptq'"),
        (lambda: make_llama(Path("a"), **{**SMALL, "hidden_size": 32}), "has shape [32, 32], but"),
        (
            lambda: make_llama(Path("a"), drop=["model.norm.weight"], **SMALL),
            "error: a: 1 tensor (model.norm.weight) missing",
        ),
        (
            lambda: make_llama(Path("a"), extra={"model.extra.weight": torch.zeros(2)}, **SMALL),
            "not a LLaMA-family causal language model",
        ),
    ],
)
def test_bad_input_ends_with_status_3_and_nothing_written(models, capsys, spoil, text):
    spoil()
    assert ties("--save", "out") == 3
    error = capsys.readouterr().err
    assert text in error
    assert "Traceback" not in error
    assert sorted(os.listdir(models)) == ["a", "b", "base"]


def test_models_that_could_do_harm_end_with_status_4(models, capsys):
    os.rename("a/model.safetensors", "a/pytorch_model.bin")
    quantized = {"quantization_config": {"quant_method": "gptq"}}
    change_config("b", lambda config: config.update(quantized))
    assert ties("--save", "out") == 4
    error = capsys.readouterr().err
    assert "error: a: has only pickle weights (pytorch_model.bin), which can run code" in error
    assert "error: b: weights are quantized" in error
    assert sorted(os.listdir(models)) == ["a", "b", "base"]


def test_files_that_cannot_be_written_end_with_status_6(models, capsys):
    (models / "file").write_text("")
    assert ties("--save", "file/out", "--quiet") == 6
    assert "file" in capsys.readouterr().err


def test_a_full_disk_ends_with_status_5(models, capsys, monkeypatch):
    full = SimpleNamespace(f_bavail=0, f_frsize=4096)
    monkeypatch.setattr("os.statvfs", lambda _: full)
    assert ties("--save", "out") == 5
    text = r"error: .*out: the result needs [\d,]+ bytes .*, the disk has 0 free"
    assert re.match(text, capsys.readouterr().err)
    assert sorted(os.listdir(models)) == ["a", "b", "base"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_two_signals_in_the_middle_leave_nothing_behind(models, tmp_path, number):
    """Threads must be gone before their files are closed, even if one more comes meanwhile."""
    large = {"layers": 2, "hidden_size": 256, "intermediate_size": 4096, "vocab_size": 8192}
    base = make_llama(tmp_path / "base", **large)
    make_llama(tmp_path / "a", base=base, **large)
    arguments = ["base", "--ft_models", "a", "--densities", "0.5", "--save", "new/out", "--quiet"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "dare_llama.py", *arguments],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not list(tmp_path.glob("new/.out.partial/model/model.safetensors")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == 128 + number, error
    assert error.startswith("error: interrupted\n")
    kept = sorted(path.name for path in tmp_path.glob("new/*"))
    if kept:  # as much as was complete
        assert kept == [".out.partial"]
        assert "the same run with --resume (resume=True) goes on with it" in error
    else:
        assert sorted(os.listdir(tmp_path)) == ["a", "b", "base"]


def test_an_interrupt_before_anything_is_done_leaves_nothing(models, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("model_writer.FolderWriter.write_rows", interrupted)
    assert ties("--save", "out") == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert sorted(os.listdir(models)) == ["a", "b", "base"]


# Commands


def test_the_command_and_the_function_make_the_same_model(models, capsys):
    assert ties("--weights", 0.5, 0.4, "--densities", 0.5, 0.3, "--lambda", 0.7, "--save", "x") == 0
    output = capsys.readouterr()
    assert output.out.startswith(
        "merged 2 models by ties, profile default, into x: 12 tensors, bfloat16, "
    )
    assert output.err == ""
    ties_merge_llama_to_folder(
        "base", ["a", "b"], [0.5, 0.4], [0.5, 0.3], lam=0.7, output_dir="y", progress=False
    )
    assert tensor_hashes(models / "x") == tensor_hashes(models / "y")


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_command_merges(models, capsys, method):
    main = importlib.import_module(f"{method}_llama").main
    base = ["base"] if METHODS[method].base == "required" else []
    tuned = ["a", "b"][: METHODS[method].most]
    assert main([*base, "--ft_models", *tuned, "--save", "out", "--dtype", "float16"]) == 0
    stored = read_tensors(models / "out")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_help_names_every_parameter_with_its_default(method, capsys):
    main = importlib.import_module(f"{method}_llama").main
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert f"python {method}_llama.py" in text
    for parameter in METHODS[method].parameters:
        assert (parameter.flag or f"--{parameter.name}") in text
    assert "exit status:" in text
    assert ("BASE" in text) == (METHODS[method].base != "none")


def test_help_of_ties(capsys):
    with pytest.raises(SystemExit):
        ties_main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "share of each task vector that is kept, in [0, 1] (default: 1.0 for each)" in text
    assert "--normalize, --no-normalize" in text
    assert "--ft_models MODEL [MODEL ...], --ft-models" in text


COMPLETE = ["base", "--ft_models", "a", "--save", "o"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["base", "--ft_models", "a"], "--save OUT is required"),
        (["base", "--save", "out"], "the following arguments are required: --ft_models"),
        ([*COMPLETE, "--t", "0.5"], "--t is an option of slerp, nearswap, not of ties"),
        ([*COMPLETE, "--density", "0.5"], "unknown option --density. Did you mean --densities?"),
        ([*COMPLETE, "--base", "b"], "--base: The base is the first argument"),
        (["other", *COMPLETE], "the fine-tuned models follow --ft_models"),
        ([*COMPLETE, "--lambda", "x"], "argument --lambda/--lam: 'x' is not a number"),
        ([*COMPLETE, "--seed", "1"], "--seed is an option of dare, della, not of ties"),
        ([*COMPLETE, "--threads", "1.5"], "'1.5' is not a whole number"),
        ([*COMPLETE, "-densities", "1"], "-densities is written --densities"),
        ([*COMPLETE, "--no-normalise"], "Did you mean --no-normalize?"),
        ([*COMPLETE, "--cuda"], "unknown option --cuda\nusage"),
        ([*COMPLETE, "--output", "x"], "unknown option --output. Did you mean --save?"),
        ([*COMPLETE, "--base_model", "b"], "--base_model: The base is the first argument"),
        (["base", "--ft_model", "a", "--plan"], "--ft_model. Did you mean --ft_models?"),
        ([*COMPLETE, "--weights", "1,2"], "'1,2' is not a number. Put spaces between several"),
    ],
)
def test_usage_errors_end_with_status_2(models, capsys, arguments, text):
    with pytest.raises(SystemExit) as caught:
        ties_main(arguments)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert text in err
    assert len(err.splitlines()) == 3  # and not two screens of usage before it


def test_a_plan_reads_no_weights_and_writes_nothing(models, capsys, monkeypatch):
    monkeypatch.setattr("model_utils.read_into", None)
    options = ("--save", "out", "--dtype", "float32", "--threads", 2)
    assert ties("--densities", 0.5, 0.5, "--plan", *options) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "method      ties, profile default",
        "  densities        0.5, 0.5",
        "base        base (llama, BF16, 5.98 KB, 32 rows, 32 tokens)",
        "model       a (llama, BF16, 5.98 KB, 32 rows, no tokenizer)",
        "output      out, float32",
        "tensors     12, 2,992 elements, head of its own",
        "vocabulary  32 rows, 32 tokens, by 'min'; tokenizer of base",
        "read        35.90 KB in 2 passes",
        "write       11.97 KB",
    ):
        assert line in lines
    assert not (models / "out").exists()


def test_room_is_looked_at_before_anything_is_begun(models, monkeypatch):
    recipe = {"method": "linear", "models": ["a", "b"]}
    plan = plan_recipe(recipe, "out")
    assert (plan.output_dir, plan_recipe(recipe).disk_free) == ("out", None)
    plan.check_room()
    plan.check_room(max_disk=plan.disk_bytes, max_memory=plan.memory_bytes)
    with pytest.raises(OSError, match=r"takes up to .* on the disk, and 1.00 KB are there for out"):
        plan.check_room(max_disk="1KB")
    with pytest.raises(OSError, match="on the disk"):
        replace(plan, disk_free=plan.disk_bytes - 1).check_room(max_disk="1TB")
    with pytest.raises(MemoryLimitError, match=r"takes up to .* of memory"):
        plan.check_room(max_memory=plan.memory_bytes - 1)
    monkeypatch.setattr("merge_report.free_memory", lambda: 0)
    monkeypatch.setattr("merge_report.anonymous_memory", lambda: plan.memory_bytes)
    plan.check_room()
    monkeypatch.setattr("merge_report.anonymous_memory", lambda: plan.memory_bytes - 1)
    with pytest.raises(MemoryLimitError):
        plan.check_room()


def test_a_plan_of_a_merge_that_goes_on_counts_what_is_there(models, monkeypatch):
    monkeypatch.setattr("merge_report.free_bytes", lambda _: 5 * 10**6)
    recipe = {"method": "linear", "models": ["a", "b"]}
    (models / ".out.partial" / "model").mkdir(parents=True)
    (models / ".out.partial" / "model" / "half").write_bytes(bytes(10**6))
    assert plan_recipe(recipe, "out").disk_free == 5 * 10**6
    assert plan_recipe(recipe, "out", resume=True).disk_free == 6 * 10**6
    shutil.rmtree(models / ".out.partial")
    merge_recipe(recipe, "out", progress=False)
    with pytest.raises(ValueError, match="the output exists already"):
        plan_recipe(recipe, "out")
    finished = plan_recipe(recipe, "out", resume=True)
    written = sum(path.stat().st_size for path in (models / "out").iterdir())
    assert (finished.output_dir, finished.disk_free) == ("out", 5 * 10**6 + written)


def test_a_plan_counts_what_findings_take(models):
    recipe = {
        "method": "ties", "base_model": "base", "models": ["a", "b"],
        "parameters": {"density": 0.5, "trim_scope": "model"},
    }  # fmt: skip
    with_findings = plan_recipe(recipe, findings=True)
    assert with_findings.memory_bytes > plan_recipe(recipe).memory_bytes


def test_a_plan_as_json_says_the_same(models, capsys):
    assert ties("--densities", 0.5, 0.5, "--plan", "--save", "out", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["parameters"]["densities"] == [0.5, 0.5]
    assert [(m["role"], m["name"], m["tokens"]) for m in planned["models"]] == [
        ("base", "base", 32), ("model", "a", None), ("model", "b", None)
    ]  # fmt: skip
    assert (planned["read_bytes"], planned["write_bytes"]) == (35904, 5984)
    assert (planned["passes"], planned["tensors"], planned["parameters_count"]) == (2, 12, 2992)
    assert 0 < planned["memory_bytes"] < 10**9 < planned["disk_free"]
    assert ties("--densities", 0.5, 0.5, "--save", "out", "--json", "--quiet") == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["bytes_read"], done["vocabulary"]) == (35904, planned["vocabulary"])
    assert {path.name for path in (models / "out").iterdir()} == {
        "model.safetensors", *planned["files"]
    }  # fmt: skip


def test_a_finished_folder_is_checked_and_what_is_broken_is_named(models, capsys):
    assert ties("--save", "out", "--quiet") == 0
    capsys.readouterr()
    assert ties_main(["--check", "out"]) == 0
    assert capsys.readouterr().out.startswith("out: sound\n")
    change_config("out", lambda config: config.update(eos_token_id=99))
    assert ties_main(["--check=out", "--json"]) == 3
    problem, changed = json.loads(capsys.readouterr().out)["problems"]
    assert changed.startswith("out: config.json is not as the merge wrote it")
    (models / "out/tokenizer.json").unlink()
    (models / "out/merge_manifest.json").unlink()
    change_config("out", lambda config: config.update(eos_token_id=2))
    assert ties_main(["--check", "out"]) == 0
    assert "note: no tokenizer: there is none of tokenizer.json, tok" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        ties_main(["base", "--check", "out", "--save", "o"])
    assert "--check stands alone (or with --json), got also: base --s" in capsys.readouterr().err
    assert problem.startswith("out: eos_token_id in config.json is 99")


@pytest.mark.parametrize(
    ("arguments", "note"),
    [
        ([], "every density is 1.0, so nothing is trimmed or dropped; 0.2 to 0.5 is usual"),
        (["--densities", 0, 0.5], "density 0 leaves nothing of model 1"),
        (["--lambda", 0], "lambda is 0, so the result is the base"),
        (["--weights", 50, 50, "--no-normalize"], "lambda times the weights sums to 100; weights"),
        (["--ft_models", "base", "--densities", 1, 1, 1], "base: the same model as base"),
    ],
)
def test_a_plan_says_what_is_seldom_meant(models, capsys, arguments, note):
    assert ties("--plan", *arguments) == 0
    assert f"note        {note}" in capsys.readouterr().out


def test_a_plan_refuses_what_the_merge_would_refuse(models, capsys, monkeypatch):
    assert ties("--plan", "--threads", -2) == 2
    assert "threads must be a whole number of at least 1, got -2" in capsys.readouterr().err
    monkeypatch.setattr("merge_report.free_bytes", lambda _: 10)
    assert ties("--plan", "--save", "out") == 0
    assert "note        the disk has too little room" in capsys.readouterr().out


def test_an_option_given_twice_adds_to_the_list(models, capsys):
    options = ("--weights", 0.5, "--ft_models", "base", "--weights", 0.25, 0.5)
    assert ties(*options, "--save", "out") == 0
    report = capsys.readouterr().out
    assert report.startswith("merged 3 models by ties, profile default, into out")


def not_on_the_hub(model, weights):
    raise ModelCompatibilityError(f"{model}: not on the Hub")


def test_a_misspelt_folder_is_told_from_a_hub_id(models, capsys, monkeypatch):
    (models / "models").mkdir()
    (models / "base").rename(models / "models/base")
    monkeypatch.setattr("model_locate._download", not_on_the_hub)
    assert ties_main(["models/bas", "--ft_models", "models/x/a", "--plan"]) == 3
    assert capsys.readouterr().err == (
        "error: models/bas: not on the Hub; the folder models holds base\n"
        "error: models/x/a: no such folder, and not the id of a Hub model (org/name). "
        "Check the path\n"
    )


def test_a_hub_model_is_found_though_a_folder_has_the_name_of_its_owner(models, monkeypatch):
    (models / "org").mkdir()
    monkeypatch.setattr("model_locate._download", lambda model, weights: models / "base")
    monkeypatch.setattr("model_utils.files_left_on_hub", lambda model, folder: {})
    assert ties_main(["org/model", "--ft_models", "a", "--plan"]) == 0


def test_a_streamed_merge_imports_neither_transformers_nor_torch(models):
    code = (
        "import sys; from ties_llama import main; "
        "status = main(['base', '--ft_models', 'a', 'b', '--save', 'o']);"
        "print(status, {'transformers', 'huggingface_hub', 'torch'} & sys.modules.keys())"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=models, capture_output=True, text=True, env=environment
    )
    assert result.stdout.endswith("0 set()\n"), result.stderr


def test_a_reader_that_has_left_makes_no_failure_of_a_merge(models):
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, ROOT / "ties_llama.py", "base", "--ft_models", "a", "b", "--save", "o"],
        cwd=models, stdout=writer, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writer)
    assert (result.returncode, "Traceback" in result.stderr) == (0, False)
    assert (models / "o" / "config.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_report_that_cannot_be_printed_is_a_failure_of_its_own(models):
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, ROOT / "ties_llama.py", "base", "--ft_models", "a", "--save", "o"],
            cwd=models, stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert (result.returncode, "Traceback" in result.stderr) == (5, False)
    assert "the work is done and complete, but the report could not be" in result.stderr
    assert (models / "o" / "config.json").exists()


def test_without_a_terminal_progress_is_plain_lines(models, monkeypatch, capsys):
    monkeypatch.setattr("merge_progress.SECONDS_BETWEEN_LINES", 0.0)
    assert ties("--save", "out") == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("ties: 17.95 KB of 17.95 KB (100 %), about 0 s left")


def test_in_a_terminal_progress_is_a_bar_and_quiet_shows_none(models, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert ties("--save", "out") == 0
    assert "ties: 100%|" in capsys.readouterr().err
    assert ties("--save", "again", "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_a_script_runs_from_another_folder_and_prints_no_traceback(models):
    done = command("linear", "--ft_models", "a", "b", "--save", "out", "--quiet", cwd=models)
    assert (done.returncode, done.stderr) == (0, "")
    again = command("linear", "--ft_models", "a", "b", "--save", "out", cwd=models)
    assert again.returncode == 2
    assert again.stderr == (
        "error: out: the output exists already. Choose another name or remove it first\n"
    )


def test_models_of_two_kinds_of_problem_are_all_named(models):
    change_config("a", quantize)
    change_config("b", lambda config: config.update(hidden_size=99))
    change_config("base", lambda config: config.update(num_hidden_layers=2))
    with pytest.raises(ModelCompatibilityError) as caught:
        ties_merge_llama_to_folder("base", ["a", "b"], output_dir="out")
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["base", "a", "b"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "--tokens sources.json: No such file or directory. Expected a JSON object such as"),
        ("{", "--tokens sources.json: is no JSON object: "),
        ('{"a": 5}', "tokens: 'a' has the source 5. Expected a model, or "),
        ('{"a": "c"}', "tokens: 'a' is to come from a model, but 'c' is none of the models: base,"),
        ('{"zz": "b"}', "tokens: 'zz' is not a token of the result"),
    ],
)
def test_sources_of_single_tokens_that_cannot_be_used_are_refused(models, capsys, content, text):
    if content is not None:
        Path("sources.json").write_text(content)
    assert ties("--tokens", "sources.json", "--plan") in (2, 3)
    assert f"error: {text}" in capsys.readouterr().err


def test_sources_of_single_tokens_come_from_a_file(models, capsys):
    Path("sources.json").write_text('{"a": {"source": "b", "force": true}}')
    assert ties("--tokens", "sources.json", "--plan") == 0
    assert "base: 1 row" in capsys.readouterr().out


# Memory


def test_a_merge_that_does_not_fit_is_refused_before_anything_is_written(models, capsys):
    assert ties("--densities", 0.5, 0.5, "--save", "out", "--max-memory", "20MB") == 8
    error = capsys.readouterr().err
    assert error.startswith("error: max_memory 20.00 MB is too little: this merge takes at least ")
    assert "Allow more" in error
    assert sorted(os.listdir(models)) == ["a", "b", "base"]


@pytest.mark.parametrize("size", ["lots", "0", "-1GB"])
def test_a_memory_that_is_no_size_is_refused(models, capsys, size):
    assert ties("--save", "out", f"--max_memory={size}") == 2
    assert "max_memory must be a size such as 5GB" in capsys.readouterr().err


def test_less_memory_means_smaller_blocks_then_fewer_threads(models, monkeypatch):
    monkeypatch.setattr(merge_memory, "_compiled", set())

    def fit(limit):
        recipe = make_recipe("ties", "base", ["a", "b"], {"densities": [0.5, 0.5]})
        with open_plan(recipe) as plan:
            return fit_memory(plan, ("numba",), 8, limit, 50 * 10**6)

    free = fit(None)
    assert (free.threads, free.notes) == (8, ())
    assert fit(free.memory_bytes) == free
    tight = fit(free.memory_bytes - 10**7)
    assert tight.threads < 8
    assert tight.memory_bytes <= free.memory_bytes - 10**7
    assert tight.notes == (f"{tight.threads} of 8 threads are used, to stay within max_memory",)
    with open_plan(make_recipe("linear", None, ["a", "b"], {})) as plan:
        useful = fit_memory(plan, ("numba",), 10**5, None, 0)
        assert useful.threads == len(plan.tasks)
    with pytest.raises(ValueError, match=r"max_memory 60\.00 MB is too little"):
        fit(60 * 10**6)


def test_what_was_enough_memory_is_enough_again(models, monkeypatch):
    """What numba took to compile is held by then, and not asked for once more."""
    monkeypatch.setattr(merge_memory, "_compiled", set())
    held = 50 * 10**6
    monkeypatch.setattr(merge_run, "anonymous_memory", lambda: held)
    recipe = make_recipe("ties", "base", ["a", "b"], {"densities": [0.5, 0.5]})
    needed = merge_run.plan(recipe).memory_bytes
    merge_run.merge_to_folder(
        replace(recipe, output_dir=Path("x")), max_memory=needed, progress=False
    )
    held = 125 * 10**6
    merge_run.merge_to_folder(
        replace(recipe, output_dir=Path("y")), max_memory=needed, progress=False
    )
    other = make_recipe("linear", None, ["a", "b"], {})
    with pytest.raises(ValueError, match="is too little"):
        merge_run.plan(other, max_memory=needed)


@pytest.mark.parametrize("error", [ImportError, SystemError, AttributeError])
def test_torch_computes_where_numba_does_not_work_and_the_report_says_so(
    models, monkeypatch, error
):
    ties_merge_llama_to_folder("base", ["a", "b"], densities=[0.5, 0.3], output_dir="x")

    def broken(name, *rest):
        if name == "numba":
            raise error("needs another numpy")
        return plain(name, *rest)

    plain = builtins.__import__
    with monkeypatch.context() as patched:
        patched.setattr(builtins, "__import__", broken)
        report = ties_merge_llama_to_folder(
            "base", ["a", "b"], densities=[0.5, 0.3], output_dir="y"
        )
    assert (
        "numba cannot be imported (needs another numpy), so torch computes, many times slower"
    ) in report.notes
    assert tensor_hashes(models / "x") == tensor_hashes(models / "y")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_merge_makes_no_failure_of_it(models, number):
    process = subprocess.Popen(
        [sys.executable, "-u", ROOT / "linear_llama.py", "--ft_models", "a", "b", "--save", "x"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline().startswith("merged 2 models")
    process.send_signal(number)
    assert (process.wait(), process.communicate()[1]) == (0, "")


def test_lines_of_progress_begin_before_anything_counts(capsys, monkeypatch):
    monkeypatch.setattr(merge_progress, "SECONDS_BETWEEN_LINES", 0.0)
    with merge_progress.progress_bar(100, "ties", show=True) as update:
        update(0)
        update(50)
        update(25)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "ties: 0 bytes of 100 bytes (0 %)"
    assert second == "ties: 50 bytes of 100 bytes (50 %)"
    assert third.startswith("ties: 75 bytes of 100 bytes (75 %), about ")
