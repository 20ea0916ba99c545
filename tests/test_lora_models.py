"""A base with adapters as a model of any merge: rows computed when they are read."""

import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_adapters import PREFIX, change_of, make_lora
from tiny_checkpoints import make_llama, read_tensors, tensor_hashes
from tiny_tokenizers import NORMAL, write_byte_level

import merge_lora
from lora_llama import lora_fold_llama_to_folder, main
from lora_utils import fold_lora, lora_delta
from merge import merge_recipe
from merge_lora import add_low_rank, open_model
from merge_memory import anonymous_memory
from merge_recipe import Recipe, make_recipe
from merge_run import merge_to_folder, plan
from model_errors import ModelCompatibilityError
from model_locate import AdapterName, join_adapters, split_adapters
from task_arithmetic_llama import main as task_arithmetic_main
from ties_llama import ties_merge_llama_to_folder

QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base and two adapters, that is also the working directory."""
    monkeypatch.chdir(tmp_path)
    make_llama(tmp_path / "base")
    make_lora(tmp_path / "one", tmp_path / "base")
    make_lora(tmp_path / "two", tmp_path / "base", seed=2, rank=3, targets=["q_proj", "v_proj"])
    return tmp_path


def merge(method: str, base: str | None, models: list[str], out: str, **settings: Any) -> Path:
    parameters = settings.pop("parameters", {})
    run = {key: settings.pop(key) for key in ("threads", "max_memory") if key in settings}
    if "max_memory" in run:  # what the process holds by now, and a little
        run["max_memory"] = anonymous_memory() + 10**7
    recipe = make_recipe(method, base, models, parameters, output_dir=out, **settings)
    merge_to_folder(recipe, **run, **QUIET)
    return Path(out)


# Rows


def test_rows_are_those_of_the_definition(place: Path) -> None:
    out = merge("passthrough", None, ["base+one"], "out", dtype="float32")
    expected = change_of(place / "one", place / "base")
    found = read_tensors(out)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    assert any(not torch.equal(found[n], v.float()) for n, v in read_tensors(Path("base")).items())


def test_several_adapters_add_up_with_their_strengths(place: Path) -> None:
    out = merge("passthrough", None, ["base+one:-0.5+two"], "out", dtype="float32")
    base = {name: value.float() for name, value in read_tensors(place / "base").items()}
    one, two = (
        change_of(place / "one", place / "base", -0.5),
        change_of(place / "two", place / "base"),
    )
    for name, value in read_tensors(out).items():
        expected = one[name] + two[name] - base[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=2e-6)


def test_compiled_rows_have_the_bits_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    for rows, rank, length in ((1, 1, 5), (3, 4, 2049), (7, 9, 100), (2, 16, 4096)):
        left = generator.normal(size=(rows, rank)).astype(np.float32)
        right = generator.normal(size=(rank, length)).astype(np.float32)
        values = generator.normal(size=(rows, length)).astype(np.float32)
        compiled, plain = values.copy(), values.copy()
        add_low_rank(compiled, left, right, 1.7)
        assert np.array_equal(compiled, values + lora_delta(right, left, 1.7))
        with monkeypatch.context() as without:
            without.setattr(merge_lora, "numba_problem", lambda: "not there")
            add_low_rank(plain, left, right, 1.7)
        assert np.array_equal(plain, compiled)


def test_threads_and_blocks_change_nothing(place: Path) -> None:
    make_lora(place / "embeds", place / "base", targets=["o_proj", "lm_head"], rank=5)
    models = ["base+one", "base+two", "base+embeds"]
    hashes = [
        tensor_hashes(merge("ties", "base", models, f"out{number}", **settings))
        for number, settings in enumerate(
            [{"threads": 1}, {"threads": 3}, {"threads": 2, "max_memory": 0}]
        )
    ]
    assert hashes[0] == hashes[1] == hashes[2]


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_rows_do_not_depend_on_how_many_are_read(rows: int, place: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with open_model("base+one") as model:
        count, length = model.tensors[name].shape
        whole = model.read_rows(name, 0, count, np.empty(4 * count * length, np.uint8)).copy()
        for first in range(0, count, rows):
            stop = min(first + rows, count)
            part = model.read_rows(name, first, stop, np.empty(4 * whole.size, np.uint8))
            assert np.array_equal(part, whole[first:stop])


def test_reading_is_safe_from_several_threads(place: Path) -> None:
    with open_model("base+one+two") as model:
        names = [name for name in model.tensors if name.endswith("_proj.weight")]

        def read(name: str) -> np.ndarray[Any, Any]:
            count, length = model.tensors[name].shape
            return model.read_rows(name, 0, count, np.empty(4 * count * length, np.uint8)).copy()

        expected = {name: read(name) for name in names}
        wrong: list[str] = []

        def work() -> None:
            wrong.extend(n for n in names * 5 if not np.array_equal(read(n), expected[n]))

        threads = [threading.Thread(target=work) for _ in range(6)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert wrong == []


# Beside folded folders


@pytest.mark.parametrize(
    "method", ["ties", "dare", "task_arithmetic", "breadcrumbs", "sce", "della"]
)
def test_a_merge_is_that_of_the_folded_folders(method: str, place: Path) -> None:
    for adapter in ("one", "two"):
        lora_fold_llama_to_folder("base", [adapter], f"folded-{adapter}", dtype="float32", **QUIET)
    of_folders = merge(method, "base", ["folded-one", "folded-two"], "a", dtype="float32")
    of_adapters = merge(method, "base", ["base+one", "base+two"], "b", dtype="float32")
    assert tensor_hashes(of_folders) == tensor_hashes(of_adapters)
    assert tensor_hashes(of_adapters) != tensor_hashes(
        merge(method, "base", ["base"], "c", dtype="float32")
    )


def test_with_rounding_it_is_that_of_folders_of_the_bases_dtype(place: Path) -> None:
    for adapter in ("one", "two"):
        lora_fold_llama_to_folder("base", [adapter], f"folded-{adapter}", **QUIET)
    of_folders = merge("ties", "base", ["folded-one", "folded-two"], "a")
    of_adapters = merge("ties", "base", ["base+one", "base+two"], "b", lora_rounding="sum")
    finer = merge("ties", "base", ["base+one", "base+two"], "c")
    assert tensor_hashes(of_folders) == tensor_hashes(of_adapters) != tensor_hashes(finer)


def test_an_adapter_alone_is_put_on_the_base(place: Path) -> None:
    ties_merge_llama_to_folder("base", ["one", "two"], output_dir="a", **QUIET)
    ties_merge_llama_to_folder("base", ["base+one", "base+two"], output_dir="b", **QUIET)
    assert tensor_hashes(Path("a")) == tensor_hashes(Path("b"))
    with pytest.raises(ModelCompatibilityError, match=r"one: is a LoRA adapter.*BASE\+one"):
        plan(Recipe(method="linear", models=("one", "two")))


def test_an_adapter_alone_may_lie_below_and_have_a_strength(place: Path) -> None:
    (place / "kaggle/input/mine").mkdir(parents=True)
    (place / "one").rename(place / "kaggle/input/mine/1")
    below = merge("ties", "base", ["kaggle", "two"], "a")
    whole = merge("ties", "base", ["base+kaggle/input/mine/1", "base+two"], "b")
    assert tensor_hashes(below) == tensor_hashes(whole)
    half = merge("task_arithmetic", "base", ["kaggle:0.5"], "c")
    assert tensor_hashes(half) == tensor_hashes(
        merge("task_arithmetic", "base", ["base+kaggle:0.5"], "d")
    )
    with pytest.raises(ModelCompatibilityError, match=r"holds no model but 1 LoRA adapter \("):
        plan(make_recipe("linear", None, ["kaggle", "two"], {}))
    with pytest.raises(ModelCompatibilityError, match="nowhere: no such folder"):
        plan(make_recipe("task_arithmetic", "base", ["nowhere:0.5"], {}))


def test_a_profile_is_written_down_with_what_it_does_to_adapters(place: Path) -> None:
    out = merge("ties", "base", ["base+one", "base+two"], "a", profile="peft")
    assert "lora_rounding: delta" in (out / "merge_recipe.yml").read_text()
    merge_recipe(out / "merge_recipe.yml", "again", **QUIET)
    assert tensor_hashes(Path("again")) == tensor_hashes(out)
    plain = merge("ties", "base", ["base"], "b")
    assert "lora" not in (plain / "merge_recipe.yml").read_text()


def test_an_adapter_of_another_size_is_refused_in_a_few_lines(place: Path) -> None:
    make_llama(place / "wide", hidden_size=64, layers=12)
    make_lora(place / "x", place / "wide")
    with pytest.raises(ModelCompatibilityError, match="14 more of its modules") as caught:
        plan(make_recipe("passthrough", None, ["base+x"], {}))
    assert len(str(caught.value).splitlines()) == 11


def test_a_fold_has_the_dtype_of_the_base(place: Path) -> None:
    report = lora_fold_llama_to_folder("base", ["one"], "out", **QUIET)
    assert report.dtype == "bfloat16"
    exact = change_of(place / "one", place / "base")
    found = read_tensors(Path("out"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(found[name], exact[name].bfloat16())


# Names


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("base", ["base"]),
        ("org/base@main+org/chat@v1", ["org/base@main", ("org/chat@v1", 1.0)]),
        ("base+a:0.5+b:-1e-1", ["base", ("a", 0.5), ("b", -0.1)]),
        ("c++/base+a", ["c++/base", ("a", 1.0)]),
        ("base+c++/a:2", ["base", ("c++/a", 2.0)]),
        ("base+x:7", ["base", ("x:7", 1.0)]),
        ("one+two", ["one+two"]),
        ("base+a:1000000.0+b:1e-30", ["base", ("a", 1e6), ("b", 1e-30)]),
    ],
)
def test_what_exists_is_one_name(
    name: str, parts: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("c++/base", "c++/a", "x:7", "one+two"):
        (tmp_path / folder).mkdir(parents=True)
    model, adapters = split_adapters(name)
    assert [model, *map(tuple, adapters)] == parts


@given(st.floats(-1e30, 1e30))
def test_a_strength_is_kept_as_it_is(strength: float) -> None:
    name = join_adapters("base", [AdapterName("a", strength), AdapterName("b")])
    assert split_adapters(name).adapters == (("a", strength), ("b", 1.0))


def test_a_plan_shows_what_is_put_on_what(place: Path) -> None:
    recipe = make_recipe("ties", "base", ["base+one:0.5", "two"], {})
    report = plan(recipe)
    assert [model.name for model in report.models] == ["base", "base+one:0.5", "two"]
    text = report.summary()
    assert f"{place / 'base'}" in text or "base" in text
    assert "base+one:0.5 in base + one" in text
    assert "two in base + two" in text


def test_two_adapters_on_one_base_are_two_models(place: Path) -> None:
    notes = plan(make_recipe("ties", "base", ["base+one", "base+two", "base+one:0.5"], {})).notes
    assert not any("the same model" in note for note in notes)
    notes = plan(make_recipe("ties", "base", ["base+one", "one"], {})).notes
    assert "one: the same model as base+one" in notes


def test_what_is_published_names_no_paths(place: Path) -> None:
    models = [f"{place}/base+{place}/one:0.5"]
    out = merge("task_arithmetic", f"{place}/base", models, "out")
    for file in ("README.md", "merge_report.json", "merge_recipe.yml"):
        assert str(place) not in (out / file).read_text()
    assert "base+one:0.5" in (out / "README.md").read_text()
    merge_recipe(out / "merge_recipe.yml", "again", **QUIET)
    assert tensor_hashes(Path("again")) == tensor_hashes(out)


def test_recipes_take_mergekits_notation(place: Path) -> None:
    forms = ["base+one", "{model: base, lora: one}", "{model: {path: base}, lora: {path: one}}"]
    for number, form in enumerate(forms):
        text = f"merge_method: linear\nmodels: [{{model: {form}, parameters: {{weight: 1}}}}]\n"
        Path("r.yml").write_text(text)
        merge_recipe("r.yml", f"out{number}", **QUIET)
    hashes = [tensor_hashes(Path(f"out{number}")) for number in range(len(forms))]
    assert hashes[0] == hashes[1] == hashes[2]
    folded = lora_fold_llama_to_folder("base", ["one"], "folded", **QUIET)
    assert hashes[0] == tensor_hashes(Path(folded.output_dir or ""))


def test_an_adapter_can_be_put_on_an_earlier_result(place: Path) -> None:
    make_llama(place / "tuned", base=place / "base")
    Path("r.yml").write_text(
        "name: soup\nmethod: linear\nmodels: [base, tuned]\ndtype: float32\n---\n"
        "method: passthrough\nmodels: [soup+one]\n"
    )
    merge_recipe("r.yml", "out", **QUIET)
    soup = merge("linear", None, ["base", "tuned"], "soup-folder", dtype="float32")
    lora_fold_llama_to_folder(soup, ["one"], "expected", **QUIET)
    assert tensor_hashes(Path("out")) == tensor_hashes(Path("expected"))
    merge_recipe("out/merge_recipe.yml", "again", **QUIET)
    assert tensor_hashes(Path("again")) == tensor_hashes(Path("out"))


# What is said and what is refused


def test_an_adapter_of_another_base_is_reported(place: Path) -> None:
    make_lora(place / "other", place / "base", changes={"base_model_name_or_path": "org/Other-1B"})
    notes = plan(make_recipe("task_arithmetic", "base", ["base+other"], {})).notes
    assert any(
        "other: says that it was trained on org/Other-1B; the base here is base" in n for n in notes
    )
    make_lora(place / "same", place / "base", changes={"base_model_name_or_path": "org/Base"})
    notes = plan(make_recipe("task_arithmetic", "base", ["base+same"], {})).notes
    assert not any("was trained on" in note for note in notes)


MODULE = f"{PREFIX}model.layers.0.self_attn.q_proj"
NORM = f"{PREFIX}model.norm.weight"
TOKENS = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pissa": (
        {"changes": {"init_lora_weights": "pissa_niter_4"}},
        "'pissa_niter_4' began from another base",
    ),
    "olora": ({"changes": {"init_lora_weights": "olora"}}, "'olora' began from another base"),
    "another beginning": ({"changes": {"init_lora_weights": "magic"}}, "'magic' is unknown"),
    "another kind": ({"changes": {"peft_type": "LOHA"}}, "peft_type 'LOHA'"),
    "an unknown entry": ({"changes": {"use_magic": True}}, "use_magic True is not supported"),
    "replication": ({"changes": {"layer_replication": [[0, 2], [1, 2]]}}, "layer_replication"),
    "qalora": ({"changes": {"use_qalora": True}}, "use_qalora True"),
    "activated": ({"changes": {"alora_invocation_tokens": [1]}}, "alora_invocation_tokens"),
    "no rank": ({"changes": {"r": 0}}, "r must be a whole number of at least 1, got 0"),
    "no alpha": ({"changes": {"lora_alpha": "8"}}, "lora_alpha must be a number, got '8'"),
    "a pattern": ({"changes": {"rank_pattern": {"(": 4}}}, "is no regular expression"),
    "a rank in a pattern": ({"changes": {"rank_pattern": {"x": 1.5}}}, "rank_pattern: 'x' has 1.5"),
    "another rank": ({"changes": {"r": 8}}, "say rank 8, by which the change is scaled"),
    "not targeted": (
        {"changes": {"target_modules": ["up_proj"]}},
        "target_modules .* does not name",
    ),
    "half a product": ({"drop": [f"{MODULE}.lora_B.weight"]}, "expected lora_A and lora_B"),
    "an unknown tensor": ({"extra": {f"{MODULE}.lora_E": torch.ones(4)}}, "1 tensors are no part"),
    "without a prefix": ({"extra": {"model.norm.weight": torch.ones(32)}}, "1 tensors are no part"),
    "an unknown module": (
        {"extra": {f"{PREFIX}model.layers.7.mlp.up_proj.weight": torch.ones(56, 32)}},
        "base has no model.layers.7.mlp.up_proj",
    ),
    "another shape": ({"extra": {NORM: torch.ones(31)}}, r"has shape \[31\], but model.norm"),
    "integers": ({"extra": {NORM: torch.ones(32, dtype=torch.int8)}}, "stored as I8"),
    "a magnitude alone": (
        {"extra": {f"{MODULE}.lora_magnitude_vector": torch.ones(32)}},
        "use_dora is False",
    ),
    "dora without lengths": ({"changes": {"use_dora": True}}, "use_dora is True"),
    "nan": ({"extra": {f"{MODULE}.lora_A.weight": torch.full((4, 32), torch.nan)}}, "has NaN"),
    "tokens of a norm": (
        {"extra": {f"{PREFIX}model.norm.token_adapter.trainable_tokens_delta": torch.ones(1, 32)}},
        "only rows of the embedding and the head",
    ),
    "tokens beyond": (
        {
            "extra": {TOKENS: torch.ones(1, 32)},
            "changes": {"trainable_token_indices": [48]},
        },
        "has 48, but model.embed_tokens has 48 rows",
    ),
    "a huge alpha": ({"changes": {"lora_alpha": 10**400}}, "lora_alpha must be a number"),
    "layers": ({"changes": {"layers_to_transform": 1.5}}, "layers_to_transform must be numbers"),
    "other layers": (
        {"changes": {"layers_to_transform": [1]}},
        "target_modules .* does not name model.layers.0",
    ),
    "a pattern that hangs": (
        {"changes": {"target_modules": "([a-z0-9_.]+)+!"}},
        "take too long, or too much. Write them more simply",
    ),
    "no pattern": ({"changes": {"target_modules": "("}}, "is no regular expression"),
    "a pattern too large": (
        {"changes": {"rank_pattern": {"q{99999999999}": 4}}},
        "is no regular expression",
    ),
    "all-linear with a head": (
        {
            "targets": ["lm_head"],
            "changes": {"target_modules": "all-linear"},
        },
        "does not name lm_head",
    ),
    "factors of nothing": (
        {
            "extra": {
                f"{MODULE}.lora_A.weight": torch.ones(4, 0),
                f"{MODULE}.lora_B.weight": torch.ones(32, 4),
            }
        },
        r"has shape \[4, 0\]",
    ),
    "tokens without ids": (
        {"extra": {TOKENS: torch.ones(2, 32)}},
        "has 0 ids for model.embed_tokens",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_wrong_is_refused(case: str, place: Path) -> None:
    settings, words = REFUSED[case]
    make_lora(place / "broken", place / "base", **settings)
    with pytest.raises(ModelCompatibilityError, match=words) as caught:
        lora_fold_llama_to_folder("base", ["broken"], "out", **QUIET)
    assert all(line.startswith("broken") for line in str(caught.value).splitlines())
    assert not Path("out").exists()


def test_all_problems_are_said_at_once(place: Path) -> None:
    make_lora(
        place / "x",
        place / "base",
        changes={"r": 8, "lora_alpha": 16, "target_modules": ["up_proj"]},
    )
    make_lora(place / "y", place / "base", changes={"use_magic": 1, "r": -1})
    with pytest.raises(ModelCompatibilityError) as caught:
        plan(make_recipe("ties", "base", ["base+x", "base+y"], {}))
    text = str(caught.value)
    assert len(re.findall("say rank 8", text)) == 4
    assert "use_magic" in text
    assert "r must be" in text


def test_a_quantized_base_is_refused(place: Path) -> None:
    make_llama(place / "int4", config_changes={"quantization_config": {"quant_method": "awq"}})
    with pytest.raises(ModelCompatibilityError, match="int4: weights are quantized"):
        plan(make_recipe("passthrough", None, ["int4+one"], {}))


def test_only_pickle_weights_are_refused(place: Path) -> None:
    (place / "one/adapter_model.safetensors").rename(place / "one/adapter_model.bin")
    with pytest.raises(ModelCompatibilityError, match="only pickle weights"):
        plan(make_recipe("passthrough", None, ["base+one"], {}))


def test_a_model_after_the_plus_is_refused(place: Path) -> None:
    with pytest.raises(ModelCompatibilityError, match="base: is a model, not a LoRA adapter"):
        plan(make_recipe("passthrough", None, ["base+base"], {}))


def test_dora_stands_alone(place: Path) -> None:
    lengths = {
        f"{PREFIX}model.layers.{layer}.{part}.lora_magnitude_vector": torch.ones(size)
        for layer in range(2)
        for part, size in (("self_attn.q_proj", 32), ("mlp.up_proj", 56))
    }
    make_lora(place / "dora", place / "base", changes={"use_dora": True}, extra=lengths)
    merge("passthrough", None, ["base+dora:0.5"], "alone")
    with pytest.raises(ModelCompatibilityError, match="dora: is a DoRA adapter"):
        plan(make_recipe("passthrough", None, ["base+dora+one"], {}))


def test_two_adapters_that_replace_one_tensor_are_refused(place: Path) -> None:
    for name, value in (("x", 1.0), ("y", 2.0)):
        make_lora(place / name, place / "base", extra={NORM: torch.full((32,), value)})
    with pytest.raises(ModelCompatibilityError, match=r"x, y: each replaces model\.norm\.weight"):
        plan(make_recipe("passthrough", None, ["base+x+y"], {}))
    out = merge("passthrough", None, ["base+x:0.5"], "half", dtype="float32")
    norm = read_tensors(place / "base")["model.norm.weight"].float()
    expected = norm + (1 - norm) * 0.5
    assert torch.equal(read_tensors(out)["model.norm.weight"], expected)


def test_what_replaces_comes_before_what_is_added_in_any_order(place: Path) -> None:
    head = torch.full((48, 32), 0.5)
    saved = {f"{PREFIX}lm_head.weight": head}
    changes = {"modules_to_save": ["lm_head"]}
    make_lora(place / "x", place / "base", extra=saved, changes=changes)
    make_lora(place / "y", place / "base", targets=["lm_head"])
    one, other = (
        merge("passthrough", None, [name], out, dtype="float32")
        for name, out in (("base+x+y", "xy"), ("base+y+x", "yx"))
    )
    assert tensor_hashes(one) == tensor_hashes(other)
    before = read_tensors(place / "base")["lm_head.weight"].float()
    expected = head + change_of(place / "y", place / "base")["lm_head.weight"] - before
    torch.testing.assert_close(read_tensors(one)["lm_head.weight"], expected, rtol=0, atol=1e-6)


def test_two_adapters_are_rounded_one_after_the_other_as_by_peft(place: Path) -> None:
    settings = {"dtype": "float32"}
    out = merge("passthrough", None, ["base+one+two"], "out", lora_rounding="delta", **settings)
    name = "model.layers.0.self_attn.q_proj.weight"
    value = read_tensors(place / "base")[name]
    for adapter in ("one", "two"):
        factors = load_file(place / adapter / "adapter_model.safetensors")
        a, b = (factors[f"{MODULE}.lora_{each}.weight"].bfloat16().float() for each in "AB")
        scale = 8 / a.shape[0]
        value = fold_lora(value, [lora_delta(a, b, scale)], round_delta=True)
    assert torch.equal(read_tensors(out)[name], value.float())
    summed = merge("passthrough", None, ["base+one+two"], "sum", lora_rounding="sum", **settings)
    exact = merge("passthrough", None, ["base+one+two"], "exact")
    assert torch.equal(read_tensors(summed)[name], read_tensors(exact)[name].float())


def test_trained_tokens_are_the_rows_of_their_ids(place: Path) -> None:
    name = TOKENS
    extra = {name: torch.stack([torch.full((32,), value) for value in (1.0, 2.0, 3.0)])}
    changes = {"trainable_token_indices": [47, 0, 5]}
    make_lora(place / "x", place / "base", extra=extra, changes=changes)
    found = read_tensors(merge("passthrough", None, ["base+x"], "out"))["model.embed_tokens.weight"]
    expected = read_tensors(place / "base")["model.embed_tokens.weight"].clone()
    for row, value in ((47, 1.0), (0, 2.0), (5, 3.0)):
        expected[row] = value
    assert torch.equal(found, expected)


def test_a_plan_counts_the_factors(place: Path) -> None:
    make_llama(place / "wide", hidden_size=256, intermediate_size=4096, layers=1)
    sizes = []
    for rank in (1, 200):
        make_lora(place / f"r{rank}", place / "wide", targets=["up_proj"], rank=rank)
        sizes.append(plan(make_recipe("passthrough", None, [f"wide+r{rank}"], {})).memory_bytes)
    assert sizes[1] - sizes[0] > 199 * (4096 + 256) * 4


def test_two_adapters_with_copies_of_the_head_can_be_put_on_one_base(place: Path) -> None:
    """PEFT saves the head, as it was, with an adapter that has factors for it."""
    head = read_tensors(place / "base")["lm_head.weight"]
    for name in ("x", "y"):
        extra = {f"{PREFIX}lm_head.base_layer.weight": head.float()}
        make_lora(place / name, place / "base", targets=["lm_head"], seed=ord(name), extra=extra)
        make_lora(place / f"{name}-alone", place / "base", targets=["lm_head"], seed=ord(name))
    out = merge("passthrough", None, ["base+x:0.5+y"], "out")
    expected = merge("passthrough", None, ["base+x-alone:0.5+y-alone"], "expected")
    assert tensor_hashes(out) == tensor_hashes(expected)


def test_a_module_that_is_saved_under_its_wrapper_is_taken(place: Path) -> None:
    extra = {f"{PREFIX}model.norm.modules_to_save.weight": torch.full((32,), 3.0)}
    extra |= {f"{PREFIX}model.norm.original_module.weight": torch.full((32,), 4.0)}
    make_lora(place / "x", place / "base", extra=extra)
    out = merge("passthrough", None, ["base+x"], "out")
    assert bool((read_tensors(out)["model.norm.weight"] == 3).all())


def embedding_factors(rows: int) -> dict[str, torch.Tensor]:
    module = f"{PREFIX}model.embed_tokens"
    return {
        f"{module}.lora_embedding_A": torch.full((4, rows), 0.5),
        f"{module}.lora_embedding_B": torch.full((32, 4), 0.25),
    }


@pytest.mark.parametrize("together", [True, False])
def test_a_tie_that_is_to_be_kept_is_kept(together: bool, place: Path) -> None:
    make_llama(place / "tied", tied=True)
    changes = {"ensure_weight_tying": together, "target_modules": ["embed_tokens", "q_proj"]}
    extra = embedding_factors(48)
    make_lora(place / "x", place / "tied", targets=["q_proj"], changes=changes, extra=extra)
    tensors = read_tensors(merge("passthrough", None, ["tied+x"], "out", dtype="float32"))
    assert ("lm_head.weight" in tensors) == (not together)
    before = read_tensors(place / "tied")["model.embed_tokens.weight"].float()
    assert torch.equal(tensors["model.embed_tokens.weight"], before + 2 * 4 * 0.125)
    if not together:
        assert torch.equal(tensors["lm_head.weight"], before)


def test_biases_that_a_base_lacks_are_made(place: Path) -> None:
    adds = {f"{MODULE}.lora_B.bias": torch.ones(32)}
    make_lora(place / "x", place / "base", extra=adds, changes={"lora_bias": True})
    out = merge("passthrough", None, ["base+x"], "out")
    tensors = read_tensors(out)
    biases = {name: value for name, value in tensors.items() if name.endswith("_proj.bias")}
    assert len(biases) == 2 * 4
    assert json.loads((out / "config.json").read_text())["attention_bias"] is True
    for name, value in biases.items():
        expected = 2.0 if name == "model.layers.0.self_attn.q_proj.bias" else 0.0
        assert bool((value == expected).all())
    make_llama(place / "qwen", model_type="qwen2")
    adds = {f"{MODULE.replace('q_proj', 'o_proj')}.lora_B.bias": torch.ones(32)}
    make_lora(place / "y", place / "qwen", targets=["o_proj"], extra=adds)
    with pytest.raises(ModelCompatibilityError, match="have no such bias"):
        plan(make_recipe("passthrough", None, ["qwen+y"], {}))


def test_factors_of_transposed_matrices_are_taken_so(place: Path) -> None:
    make_lora(place / "turned", place / "base", targets=["up_proj", "q_proj"])
    weights = place / "turned/adapter_model.safetensors"
    turned = {}
    for name, value in load_file(weights).items():
        other = name.replace("lora_A", "X").replace("lora_B", "lora_A").replace("X", "lora_B")
        turned[other] = value.T.contiguous()
    save_file(turned, weights)
    report = lora_fold_llama_to_folder("base", ["turned"], "out", dtype="float32", **QUIET)
    assert any("fit the transposed matrices only" in note for note in report.notes)
    make_lora(place / "plain", place / "base", targets=["up_proj", "q_proj"])
    lora_fold_llama_to_folder("base", ["plain"], "expected", dtype="float32", **QUIET)
    assert tensor_hashes(Path("out")) == tensor_hashes(Path("expected"))


def test_modules_that_are_named_and_not_there_are_noted(place: Path) -> None:
    gone = [f"{MODULE}.lora_{each}.weight" for each in "AB"]
    make_lora(place / "less", place / "base", drop=gone)
    notes = plan(make_recipe("task_arithmetic", "base", ["less"], {})).notes
    assert any("names 1 modules that the adapter has nothing for" in note for note in notes)


# Small files


def test_the_tokenizer_is_the_adapters_if_it_has_one(place: Path) -> None:
    make_llama(place / "b", vocab_size=NORMAL + 2)
    write_byte_level(place / "b", ("<|end|>", "<|old|>"), eos="<|end|>")
    make_lora(place / "t", place / "b")
    write_byte_level(place / "t", ("<|end|>", "<|new|>"), eos="<|end|>")
    (place / "t/chat_template.jinja").write_text("{{ messages }}")
    report = lora_fold_llama_to_folder("b", ["t"], "out", **QUIET)
    assert "<|new|>" in Path("out/tokenizer.json").read_text()
    assert Path("out/chat_template.jinja").read_text() == "{{ messages }}"
    assert any("tokenizer and chat template are those of t" in note for note in report.notes)
    assert not Path("out/adapter_config.json").exists()


def test_a_resized_vocabulary_can_be_merged_with_the_base(place: Path) -> None:
    rows = NORMAL + 1
    make_llama(place / "b", vocab_size=rows)
    write_byte_level(place / "b", ("<|end|>",), eos="<|end|>")
    values = {n: torch.randn(rows + 1, 32) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    make_lora(place / "t", place / "b", extra={f"{PREFIX}{n}": v for n, v in values.items()})
    write_byte_level(place / "t", ("<|end|>", "<|new|>"), eos="<|end|>")
    out = merge("task_arithmetic", "b", ["b+t"], "out", vocabulary="union", dtype="float32")
    found = read_tensors(out)["lm_head.weight"]
    assert found.shape[0] == rows + 1
    assert torch.equal(found[-1], values["lm_head.weight"][-1])
    with pytest.raises(ModelCompatibilityError, match=r"its strength must be 1, got 0\.5"):
        plan(make_recipe("passthrough", None, ["b+t:0.5"], {}))


# Commands


def test_the_command_folds(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fold", "base", "one", "two", "--weights", "1", "-0.5", "--save", "a"]) == 0
    assert "read" in capsys.readouterr().out
    merge("passthrough", None, ["base+one+two:-0.5"], "b")
    assert tensor_hashes(Path("a")) == tensor_hashes(Path("b"))
    assert main(["fold", "base", "one", "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["name"] == "base+one"
    assert main(["--check", "a"]) == 0


def test_the_command_merges_and_extracts(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "one", "two", "--weights", "1", "-0.5", "--save", "both"]) == 0
    assert "exact but for rounding" in capsys.readouterr().out
    merge("passthrough", None, ["base+both"], "a", dtype="float32")
    merge("passthrough", None, ["base+one+two:-0.5"], "b", dtype="float32")
    one, other = read_tensors(Path("a")), read_tensors(Path("b"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6)
    assert main(["extract", "b", "--base", "base", "--rank", "7", "--save", "c", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["modules"] == 6
    assert report["error"] < 1e-5
    task = ["base", "--ft_models", "base+c", "--dtype", "float32", "--save", "d"]
    assert task_arithmetic_main(task) == 0
    for name, value in read_tensors(Path("d")).items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say what to do"),
        (["flod"], "Did you mean 'fold'?"),
        (["fold", "base"], "ADAPTER"),
        (["fold", "base", "one"], "--save OUT is required"),
        (["fold", "base", "one", "--wieghts", "1"], "Did you mean --weights?"),
        (["merge", "one", "--method", "best", "--save", "o"], "invalid choice: 'best'"),
        (["extract", "base", "--rank", "2", "--save", "o"], "--base"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("verb", [[], ["fold"], ["merge"], ["extract"]])
def test_every_verb_has_help(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*verb, "--help"])
    assert caught.value.code == 0
    assert "--save OUT" in capsys.readouterr().out
