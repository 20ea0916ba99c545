"""Which tensors are merged, and what is done to every merged value."""

from pathlib import Path

import pytest
import torch
from tiny_checkpoints import make_llama, read_tensors, save_tensors, tensor_hashes

from linear_llama import linear_merge_llama
from merge_recipe import make_recipe
from merge_run import merge_to_folder, plan
from model_errors import ModelCompatibilityError
from ties_llama import main as ties_main

SMALL = {"layers": 2, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DENSITIES = {"densities": [0.5, 0.5]}


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A base and two fine-tunes in the current folder: base, a and b."""
    base = make_llama(tmp_path / "base", seed=1, **SMALL)
    for seed, name in enumerate("ab", 2):
        make_llama(tmp_path / name, seed=seed, base=base, **SMALL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merge(out, method="task_arithmetic", base="base", parameters=None, **options):
    recipe = make_recipe(method, base, ["a", "b"], parameters or {}, output_dir=out, **options)
    report = merge_to_folder(recipe, progress=False)
    return report, read_tensors(Path(out))


def differing(left, right):
    return {name for name in left if not torch.equal(left[name], right[name])}


def test_what_is_not_included_or_excluded_is_the_bases_bit_for_bit(models):
    base = read_tensors(models / "base")
    base["model.norm.weight"][:3] = -0.0
    save_tensors(models / "base", base, 1)
    report, merged = merge("out", include=["*.mlp.*", "*norm*"], exclude="*.1.mlp.up_proj.weight")
    _, everything = merge("all")
    chosen = {name for name in base if (".mlp." in name or "norm" in name)}
    chosen.remove("model.layers.1.mlp.up_proj.weight")
    assert differing(merged, everything) == set(base) - chosen
    for name in set(base) - chosen:
        assert torch.equal(merged[name].view(torch.int16), base[name].view(torch.int16))
    assert any("of 21 tensors are not merged but those of base: " in note for note in report.notes)


def test_without_a_base_they_are_the_first_models(models):
    _, merged = merge("out", "linear", base=None, include="*.mlp.*")
    assert differing(merged, read_tensors(models / "a")) == {
        name for name in merged if ".mlp." in name
    }


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_a_trim_of_the_whole_model_looks_at_what_is_merged(models, scope):
    parameters = DENSITIES | {"trim_scope": scope}
    report, merged = merge("out", "ties", parameters=parameters, exclude=["model.layers.0.*"])
    untouched = {name for name in merged if name.startswith("model.layers.0.")}
    base = read_tensors(models / "base")
    assert differing(merged, base) == set(merged) - untouched
    assert set(report.findings) == set(merged) - untouched
    if scope == "model":
        kept = sum(each["trim"][0]["kept"] for each in report.findings.values())
        assert kept == sum(base[name].numel() for name in report.findings) // 2


def test_embedding_and_head_can_be_the_bases(models):
    base = read_tensors(models / "base")
    for option, name in (("merge_embeddings", EMBEDDING), ("merge_lm_head", HEAD)):
        _, merged = merge(option, **{option: False})
        assert set(merged) - differing(merged, base) == {name}


def test_a_tied_head_cannot_be_left_out_alone(models):
    for name in ("base", "a", "b"):
        make_llama(models / f"tied/{name}", seed=1, tied=True, **SMALL)
    recipe = make_recipe(
        "task_arithmetic", "tied/base", ["tied/a"], {}, output_dir="out", merge_lm_head=False
    )
    with pytest.raises(ValueError, match=r"the head of these models is their embedding\. Turn"):
        merge_to_folder(recipe, progress=False)
    assert not (models / "out").exists()


def test_the_bases_embedding_gets_the_rows_of_tokens_that_it_lacks(models):
    make_llama(models / "b", seed=4, base=models / "base", **{**SMALL, "vocab_size": 34})
    _, merged = merge("out", vocabulary="max", merge_embeddings=False)
    assert torch.equal(merged[EMBEDDING][:32], read_tensors(models / "base")[EMBEDDING])
    assert torch.equal(merged[EMBEDDING][32:], read_tensors(models / "b")[EMBEDDING][32:])


@pytest.mark.parametrize("numba", [True, False])
def test_merged_values_are_shrunk_and_clamped_and_others_are_not(models, monkeypatch, numba):
    if not numba:
        monkeypatch.setattr("merge_operations.numba_problem", lambda: "not wanted")
    options = {"exclude": "lm_head.weight", "dtype": "float32"}
    _, plain = merge("plain", **options)
    _, merged = merge("out", weight_decay=0.25, clamp_range=(-0.05, 0.1), **options)
    for name, values in plain.items():
        want = values if name == HEAD else (values * 0.75).clamp(-0.05, 0.1)
        assert torch.equal(merged[name], want)


def test_the_model_in_memory_is_merged_alike(models):
    options = {"include": ["*.mlp.*"], "weight_decay": 0.1, "clamp_range": (-0.2, 0.2)}
    _, stored = merge("out", "linear", base=None, dtype="float32", **options)
    merged = linear_merge_llama(["a", "b"], progress=False, **options)
    assert differing(stored, merged.state_dict()) == set()


def test_a_plan_says_what_is_read(models):
    recipe = make_recipe("ties", "base", ["a", "b"], DENSITIES, exclude=["lm_head.weight"])
    base = read_tensors(models / "base")
    sizes = {name: tensor.nbytes for name, tensor in base.items()}
    rest = sum(sizes.values()) - sizes[HEAD]
    assert plan(recipe).read_bytes == sizes[HEAD] + 2 * 3 * rest


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"include": ["*.mpl.*"]}, r"include '\*\.mpl\.\*' fits none of the 21 tensors; they are"),
        ({"exclude": "nothing"}, "exclude 'nothing' fits none of the 21 tensors"),
        ({"exclude": "*"}, "leave none of the 21 tensors to be merged"),
        ({"include": "lm_head*", "merge_lm_head": False}, "leave none of the 21 tensors"),
        ({"weight_decay": 1.0}, r"weight_decay must be in \[0, 1\), got 1.0"),
        ({"weight_decay": "x"}, "weight_decay must be a number, got 'x'"),
        ({"clamp_range": (1.0, -1.0)}, "clamp_range must be a lowest and a highest value"),
        ({"clamp_range": (1.0,)}, "clamp_range must be two numbers"),
        ({"merge_embeddings": 1}, "merge_embeddings must be true or false, got 1"),
        ({"profile": "mergkit"}, r"unknown profile 'mergkit'; .* Did you mean 'mergekit'"),
    ],
)
def test_options_out_of_range_are_refused(models, options, text):
    with pytest.raises((ValueError, ModelCompatibilityError), match=text):
        merge("out", **options)
    assert not (models / "out").exists()


def test_the_command_has_the_options(models, capsys):
    arguments = ["base", "--ft_models", "a", "b", "--densities", "0.5", "0.5", "--quiet"]
    arguments += ["--include", "*.mlp.*", "--exclude", "*.0.mlp.*", "--weight_decay", "0.1"]
    arguments += ["--clamp_range", "-0.5", "0.5", "--no-merge_lm_head", "--profile", "paper"]
    assert ties_main([*arguments, "--save", "out"]) == 0
    merge(
        "same",
        "ties",
        parameters=DENSITIES,
        include=["*.mlp.*"],
        exclude=["*.0.mlp.*"],
        weight_decay=0.1,
        clamp_range=(-0.5, 0.5),
        merge_lm_head=False,
        profile="paper",
    )
    assert tensor_hashes(models / "out") == tensor_hashes(models / "same")
    assert "not merged but those of base" in capsys.readouterr().out
