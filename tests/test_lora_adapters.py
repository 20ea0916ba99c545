"""Adapters made of adapters, and of tuned models: what PEFT 0.21.2 makes of them on the base."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft_adapters import CASES, AdapterCase, make_adapter, make_base
from safetensors.torch import load_file
from tiny_checkpoints import read_tensors, save_tensors
from tiny_tokenizers import write_byte_level
from transformers import AutoModelForCausalLM

from dare_utils import dare_ties
from lora_llama import lora_extract_adapter, lora_fold_llama_to_folder, lora_merge_adapters
from lora_utils import factorise
from merge_recipe import make_recipe
from merge_run import merge_to_folder
from model_errors import ModelCompatibilityError
from ties_utils import ties

BY_NAME = {case.name: case for case in CASES}
IDS = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(2))
QUIET: dict[str, Any] = {"progress": False}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")
"""PEFT's own, on what it asks of transformers."""


def adapters_on_one_base(place: Path, *names: str) -> tuple[Path, list[Path]]:
    """The base of the first case, and the adapters of all of them, on it."""
    base = place / "base"
    make_base(BY_NAME[names[0]], base)
    folders = [place / name for name in names]
    for name, folder in zip(names, folders, strict=True):
        make_adapter(BY_NAME[name], base, folder)
    return base, folders


def on_base(base: Path, adapter: Path, rows: int | None = None) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter).eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def folded_logits(base: Path, adapters: Sequence[Path], out: Path, **settings: Any) -> torch.Tensor:
    lora_fold_llama_to_folder(base, adapters, out, dtype="float32", **settings, **QUIET)
    return logits_of(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval())


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 3e-6) -> bool:
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def deltas_of(model: PeftModel, name: str = "default") -> dict[str, torch.Tensor]:
    """The changes that PEFT computes, by module."""
    return {
        path.removeprefix("base_model.model."): module.get_delta_weight(name).detach()
        for path, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
        and name in (*getattr(module, "lora_A", ()), *getattr(module, "lora_embedding_A", ()))
    }


MIXED = ("rslora-rank-pattern", "attention", "embed-and-head", "alpha-pattern")
"""Ranks, scales and modules differ; all on an untied llama."""

WEIGHTS = (0.7, -0.4, 1.0, 0.25)


@pytest.mark.parametrize("method", ["auto", "cat", "svd"])
def test_the_sum_is_exact(method: str, tmp_path: Path) -> None:
    base, adapters = adapters_on_one_base(tmp_path, *MIXED)
    settings = {"rank": 200} if method == "svd" else {}
    report = lora_merge_adapters(
        adapters, tmp_path / "one", WEIGHTS, method=method, **settings, **QUIET
    )
    assert report.error < 1e-6
    merged = logits_of(on_base(base, tmp_path / "one"))
    assert near(merged, folded_logits(base, adapters, tmp_path / "out", weights=WEIGHTS))


def test_peft_scales_each_module_by_one(tmp_path: Path) -> None:
    """Whatever ranks the modules have, and although the first adapter is rank-stabilised."""
    base, adapters = adapters_on_one_base(tmp_path, *MIXED)
    lora_merge_adapters(adapters, tmp_path / "one", WEIGHTS, **QUIET)
    model = on_base(base, tmp_path / "one")
    scales = {
        scale
        for module in model.modules()
        if isinstance(getattr(module, "scaling", None), dict)
        for scale in module.scaling.values()
    }
    assert scales == {1.0}
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    assert config["use_rslora"] is False


def test_what_peft_cannot_merge_is_merged_as_peft_should(tmp_path: Path) -> None:
    """cat and svd of PEFT's own, where it does not keep the first adapter's rank stabilisation."""
    base, adapters = adapters_on_one_base(tmp_path, "attention", "one-layer")
    model = on_base(base, adapters[0])
    model.load_adapter(adapters[1], "other")
    weights = [0.6, 0.3]
    ranks = [json.loads((a / "adapter_config.json").read_text())["r"] for a in adapters]
    for kind, settings in (("cat", {}), ("svd", {"rank": max(ranks)})):
        model.add_weighted_adapter(
            ["default", "other"],
            weights,
            kind,
            combination_type=kind,
            **({"svd_rank": settings["rank"]} if settings else {}),
        )
        out = tmp_path / f"by-{kind}"
        lora_merge_adapters(adapters, out, weights, method=kind, **settings, **QUIET)
        ours, theirs = deltas_of(on_base(base, out)), deltas_of(model, kind)
        both = ours.keys() & theirs.keys()
        assert both == ours.keys()
        for module in both:
            assert near(ours[module], theirs[module], 2e-5), (kind, module)


def test_peft_scales_the_sum_twice_where_the_first_adapter_is_rank_stabilised(
    tmp_path: Path,
) -> None:
    """Else docs/lora.md says something that is no longer so."""
    base, adapters = adapters_on_one_base(tmp_path, "rslora", "attention")
    model = on_base(base, adapters[0])
    model.load_adapter(adapters[1], "other")
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "cat", combination_type="cat")
    lora_merge_adapters(adapters, tmp_path / "out", method="cat", **QUIET)
    ours, theirs = deltas_of(on_base(base, tmp_path / "out")), deltas_of(model, "cat")
    one, other = deltas_of(model), deltas_of(model, "other")
    rank = sum(json.loads((a / "adapter_config.json").read_text())["r"] for a in adapters)
    for module in one.keys() & other.keys():
        assert near(ours[module], one[module] + other[module], 2e-6)
        assert near(theirs[module], ours[module] * rank**0.5, 1e-5)


def test_linear_is_pefts_and_says_how_wrong_it_is(tmp_path: Path) -> None:
    base, adapters = adapters_on_one_base(tmp_path, "attention", "embed")
    model = on_base(base, adapters[0])
    model.load_adapter(adapters[1], "other")
    model.add_weighted_adapter(
        ["default", "other"], [0.6, 0.3], "linear", combination_type="linear"
    )
    out = tmp_path / "out"
    report = lora_merge_adapters(adapters, out, [0.6, 0.3], method="linear", **QUIET)
    ours, theirs = deltas_of(on_base(base, out)), deltas_of(model, "linear")
    assert all(near(ours[module], theirs[module], 1e-5) for module in ours)
    assert any("linear is approximate" in note for note in report.notes)
    dense = [deltas_of(on_base(base, adapter)) for adapter in adapters]
    missing = whole = 0.0
    for module, delta in ours.items():
        exact = sum(
            by * each[module] for by, each in zip((0.6, 0.3), dense, strict=True) if module in each
        )
        missing += float((delta - exact).square().sum())
        whole += float(exact.square().sum())  # type: ignore[union-attr]
    assert report.error == pytest.approx((missing / whole) ** 0.5, rel=1e-4)
    assert report.error > 0.1


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_ties_and_dare_work_on_the_changes(method: str, tmp_path: Path) -> None:
    base, adapters = adapters_on_one_base(tmp_path, "attention", "one-layer")
    out, densities, rank = tmp_path / "out", [0.5, 0.4], 6
    seed = {} if method == "ties" else {"seed": 5}
    report = lora_merge_adapters(
        adapters, out, [1.0, 0.5], method=method, densities=densities, rank=rank, **seed, **QUIET
    )
    ours = deltas_of(on_base(base, out))
    dense = [deltas_of(on_base(base, adapter)) for adapter in adapters]
    for module, found in ours.items():
        deltas = [each.get(module, torch.zeros_like(found)) for each in dense]
        nothing = torch.zeros_like(found)
        if method == "ties":
            merged = ties(nothing, deltas, [1.0, 0.5], densities)
        else:
            name = f"{module}.weight"
            merged = dare_ties(nothing, deltas, [1.0, 0.5], densities, seed=5, name=name)
        best = factorise(merged, rank=rank)
        assert near(found, best.factors.lora_B @ best.factors.lora_A, 1e-4)
        assert report.errors[module] == pytest.approx(best.error, rel=1e-3)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_at_full_rank_it_is_the_merge_of_the_models(method: str, tmp_path: Path) -> None:
    """The same entries of the same tensors are kept, an embedding's too."""
    base, adapters = adapters_on_one_base(tmp_path, "embed", "attention")
    densities, weights = [0.5, 0.6], [1.0, 0.5]
    seed = {} if method == "ties" else {"seed": 3}
    settings = {"densities": densities, **seed, **QUIET}
    lora_merge_adapters(adapters, tmp_path / "one", weights, method=method, rank=99, **settings)
    folded = tmp_path / "folded"
    lora_fold_llama_to_folder(base, [tmp_path / "one"], folded, **QUIET)
    parameters = {"weights": weights, "densities": densities, **seed}
    models = [f"{base}+{adapter}" for adapter in adapters]
    out = tmp_path / "merged"
    recipe = make_recipe(method, base, models, parameters, output_dir=out, dtype="float32")
    merge_to_folder(recipe, **QUIET)
    ours, expected = read_tensors(folded), read_tensors(out)
    assert all(near(ours[name], expected[name], 1e-5) for name in expected)


def test_modules_of_some_layers_are_named_whole(tmp_path: Path) -> None:
    base, adapters = adapters_on_one_base(tmp_path, "one-layer", "one-layer")
    lora_merge_adapters(adapters, tmp_path / "out", **QUIET)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert all(name.startswith("model.layers.") for name in config["target_modules"])
    assert len(deltas_of(on_base(base, tmp_path / "out"))) == len(config["target_modules"])


def test_the_error_of_a_truncation_is_that_of_the_sum(tmp_path: Path) -> None:
    base, adapters = adapters_on_one_base(tmp_path, "attention", "gaussian")
    report = lora_merge_adapters(adapters, tmp_path / "out", method="svd", rank=1, **QUIET)
    ours = deltas_of(on_base(base, tmp_path / "out"))
    dense = [deltas_of(on_base(base, adapter)) for adapter in adapters]
    for module, found in ours.items():
        exact = sum(each[module] for each in dense if module in each)
        norms = torch.linalg.svdvals(exact.double())  # type: ignore[union-attr]
        best = float(norms[1:].norm() / norms.norm())
        assert report.errors[module] == pytest.approx(best, rel=1e-4)
        assert float((found - exact).norm()) == pytest.approx(best * float(norms.norm()), rel=1e-4)


def test_what_takes_the_place_of_the_bases_is_kept(tmp_path: Path) -> None:
    base, adapters = adapters_on_one_base(tmp_path, "saved-head", "attention")
    lora_merge_adapters(adapters, tmp_path / "one", [1.0, 0.5], **QUIET)
    expected = folded_logits(base, adapters, tmp_path / "out", weights=[1.0, 0.5])
    assert near(logits_of(on_base(base, tmp_path / "one")), expected)


@pytest.mark.parametrize(
    ("names", "weights", "settings", "words"),
    [
        (("dora", "attention"), None, {}, "is a DoRA adapter"),
        (("lora-bias", "attention"), None, {}, "adds to biases"),
        (("saved-head", "saved-embed-and-head"), None, {}, "each replaces .*lm_head"),
        (("saved-head", "attention"), [0.5, 1.0], {}, "its weight must be 1, got 0.5"),
        (("attention", "rank-one"), None, {"method": "linear"}, "linear needs adapters of one"),
        (
            ("saved-head", "head"),
            None,
            {},
            r"each replaces lm_head\.weight",
        ),
        (("saved-mlp", "mlp"), None, {}, "replaces .*up_proj.weight, which .* changes as well"),
        (("tokens", "embed"), None, {}, r"replaces model\.embed_tokens\.tokens"),
        (("bias-lora-only-qwen2",), [2.0], {}, "its weight must be 1, got 2"),
        (("saved-head", "saved-head"), [2.0, 2.0], {}, "each replaces lm_head"),
        (("attention",), [1e30], {"dtype": "float16"}, "do not fit F16"),
        (("tying-alpha-pattern",), None, {}, "scales their changes differently"),
        (("tied", "tying-embed"), None, {}, "some adapters keep embedding and head tied"),
    ],
)
def test_what_no_adapter_can_be_is_refused(
    names: tuple[str, ...],
    weights: list[float] | None,
    settings: Mapping[str, Any],
    words: str,
    tmp_path: Path,
) -> None:
    _, adapters = adapters_on_one_base(tmp_path, *names)
    with pytest.raises(ModelCompatibilityError, match=words):
        lora_merge_adapters(adapters, tmp_path / "out", weights, **settings, **QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "names",
    [
        ("bias-all-qwen2", "all-linear-qwen2"),
        ("bias-lora-only-qwen2", "all-linear-qwen2"),
        ("embed-and-head", "embed"),
        ("tokens", "attention"),
        ("saved-norms", "attention"),
        ("tying-embed", "tying-embed-and-head"),
    ],
)
def test_what_is_kept_whole_is_where_peft_looks_for_it(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    base, adapters = adapters_on_one_base(tmp_path, *names)
    lora_merge_adapters(adapters, tmp_path / "one", **QUIET)
    merged = logits_of(on_base(base, tmp_path / "one"))
    assert near(merged, folded_logits(base, adapters, tmp_path / "out"))
    assert near(merged, folded_logits(base, [tmp_path / "one"], tmp_path / "again"))


def test_dare_keeps_a_tie(tmp_path: Path) -> None:
    base, adapters = adapters_on_one_base(tmp_path, "tying-embed", "tying-embed-and-head")
    settings = {"densities": [0.5, 0.5], "rank": 99, **QUIET}
    lora_merge_adapters(adapters, tmp_path / "one", method="dare_linear", **settings)
    merged = logits_of(on_base(base, tmp_path / "one"))
    assert near(merged, folded_logits(base, [tmp_path / "one"], tmp_path / "out"))
    assert "lm_head.weight" not in read_tensors(tmp_path / "out")


@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_a_tie_that_differs_is_extracted(before: bool, resized: bool, tmp_path: Path) -> None:
    """Base tied and tuned not, or the other way round; the embedding itself may be the same."""
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    make_base(BY_NAME["tied" if before else "attention"], base)
    tune(BY_NAME["attention"], base, tuned, "q_proj.weight")
    config = json.loads((tuned / "config.json").read_text())
    config["tie_word_embeddings"] = not before
    tensors = read_tensors(tuned)
    if before:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0)
    else:
        del tensors["lm_head.weight"]
    if resized:
        for name in {"model.embed_tokens.weight", "lm_head.weight"} & tensors.keys():
            tensors[name] = torch.cat([tensors[name], tensors[name][:6] * 0.5])
        config["vocab_size"] += 6
    (tuned / "config.json").write_text(json.dumps(config))
    save_tensors(tuned, tensors, 1)
    lora_extract_adapter(tuned, base, tmp_path / "out", rank=99, **QUIET)
    expected = logits_of(AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32).eval())
    rows = config["vocab_size"] if resized else None
    assert near(logits_of(on_base(base, tmp_path / "out", rows)), expected)
    assert near(folded_logits(base, [tmp_path / "out"], tmp_path / "again"), expected)


def test_nothing_is_taken_through_a_link(tmp_path: Path) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    make_base(BY_NAME["attention"], base)
    tune(BY_NAME["attention"], base, tuned, "q_proj.weight")
    (tmp_path / "secret").write_text("{}")
    (tuned / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelCompatibilityError, match=r"tokenizer\.json is a link out"):
        lora_extract_adapter(tuned, base, tmp_path / "out", rank=2, **QUIET)


def test_an_output_inside_an_input_is_refused(tmp_path: Path) -> None:
    _, adapters = adapters_on_one_base(tmp_path, "attention")
    with pytest.raises(ValueError, match="the output lies inside"):
        lora_merge_adapters(adapters, adapters[0] / "out", **QUIET)


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    _, adapters = adapters_on_one_base(tmp_path, "attention", "mlp")
    write_byte_level(adapters[1], ("<|end|>",), eos="<|end|>")
    report = lora_merge_adapters(adapters[:1], tmp_path / "without", **QUIET)
    assert not (tmp_path / "without/tokenizer.json").exists()
    report = lora_merge_adapters(adapters, tmp_path / "with", **QUIET)
    assert (tmp_path / "with/tokenizer.json").read_bytes() == (
        adapters[1] / "tokenizer.json"
    ).read_bytes()
    assert any("the tokenizer beside it is that of" in note for note in report.notes)


@pytest.mark.parametrize(
    ("method", "setting"), [("cat", "lam"), ("cat", "seed"), ("ties", "seed"), ("svd", "max_rank")]
)
def test_what_has_no_effect_is_refused(method: str, setting: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{setting} has no effect with {method}"):
        lora_merge_adapters(["a", "b"], tmp_path / "out", method=method, **{setting: 2})


def test_a_strength_in_a_name_multiplies_the_weight(tmp_path: Path) -> None:
    base, adapters = adapters_on_one_base(tmp_path, "attention", "mlp")
    named = [f"{adapters[0]}:0.5", adapters[1]]
    lora_merge_adapters(named, tmp_path / "one", [-2.0, 1.0], **QUIET)
    expected = folded_logits(base, adapters, tmp_path / "out", weights=[-1.0, 1.0])
    assert near(logits_of(on_base(base, tmp_path / "one")), expected)
    again = folded_logits(base, named, tmp_path / "again", weights=[-2.0, 1.0])
    assert torch.equal(again, expected)


def test_an_adapter_says_how_it_was_made_without_paths(tmp_path: Path) -> None:
    base, adapters = adapters_on_one_base(tmp_path, "attention", "embed")
    weights = [1.0, 0.5]
    lora_merge_adapters(adapters, tmp_path / "one", weights, method="svd", rank=1, **QUIET)
    lora_extract_adapter(f"{base}+{adapters[0]}", base, tmp_path / "two", rank=1, **QUIET)
    for name in ("one", "two"):
        for file in ("README.md", "merge_report.json"):
            assert str(tmp_path) not in (tmp_path / name / file).read_text()
    saved = json.loads((tmp_path / "one/merge_report.json").read_text())
    assert saved["method"] == "svd"
    assert saved["settings"]["weights"] == weights
    assert saved["errors"].keys() >= {"model.embed_tokens"}
    card = (tmp_path / "one/README.md").read_text()
    assert "library_name" in card
    assert "`attention`" in card


def test_a_rank_that_is_too_low_is_said(tmp_path: Path) -> None:
    _, adapters = adapters_on_one_base(tmp_path, "attention", "embed")
    report = lora_merge_adapters(adapters, tmp_path / "a", method="svd", rank=1, **QUIET)
    assert any("does not fit the rank" in note for note in report.notes)
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    tune(BY_NAME["attention"], base, tuned, "q_proj.weight")
    report = lora_extract_adapter(tuned, base, tmp_path / "b", rank=2, max_error=0.1, **QUIET)
    assert any("rank 2 does not reach max_error 0.1 in 2 matrices" in n for n in report.notes)


def test_settings_out_of_range_are_refused_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights") as caught:
        lora_merge_adapters(
            ["a", "b"], tmp_path / "out", [1.0], method="tis", rank=0, densities=[2.0, 0.5], seed=-1
        )
    text = str(caught.value)
    for words in (
        "unknown method 'tis'; there are: auto, cat, svd, ties",
        "Did you mean 'ties'?",
        "weights must have one entry per adapter: got 1 for 2",
        "densities must be in [0, 1]",
        "rank must be a whole number of at least 1, got 0",
        "seed must be a whole number",
    ):
        assert words in text


def tune(case: AdapterCase, base: Path, folder: Path, pattern: str) -> None:
    """A copy of a base in which tensors whose names hold a text have changed; of one, the rows."""
    tensors = read_tensors(base)
    generator = torch.Generator().manual_seed(7)
    for name, value in sorted(tensors.items()):
        if any(part in name for part in pattern.split("|")):
            noise = torch.randn(value.shape, generator=generator) * value.float().std() * 0.1
            tensors[name] = (value.float() + noise).to(value.dtype)
    folder.mkdir()
    (folder / "config.json").write_text((base / "config.json").read_text())
    save_tensors(folder, tensors, 1)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("attention", "_proj.weight"),
        ("attention", "q_proj.weight|layers.1.mlp.up_proj"),
        ("attention", "_proj.weight|norm"),
        ("attention", "_proj.weight|lm_head"),
        ("attention", ""),
        ("all-linear-qwen2", "_proj."),
        ("all-linear-qwen2", "v_proj.weight|k_proj.bias"),
        ("tied", "_proj.weight|embed_tokens"),
    ],
)
def test_an_adapter_of_full_rank_is_the_model(name: str, pattern: str, tmp_path: Path) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    make_base(BY_NAME[name], base)
    tune(BY_NAME[name], base, tuned, pattern or "embed_tokens|q_proj")
    report = lora_extract_adapter(tuned, base, tmp_path / "out", rank=100, **QUIET)
    assert report.error < 1e-6
    expected = logits_of(AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32).eval())
    assert near(logits_of(on_base(base, tmp_path / "out")), expected)
    assert near(folded_logits(base, [tmp_path / "out"], tmp_path / "again"), expected)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config.get("ensure_weight_tying", False) == (name == "tied")


def test_a_resized_vocabulary_is_saved_whole(tmp_path: Path) -> None:
    case = BY_NAME["larger"]
    base, adapters = adapters_on_one_base(tmp_path, "larger")
    tuned = tmp_path / "tuned"
    expected = folded_logits(base, adapters, tuned)
    report = lora_extract_adapter(tuned, base, tmp_path / "out", rank=100, **QUIET)
    assert any("resize the base's first" in note for note in report.notes)
    assert near(logits_of(on_base(base, tmp_path / "out", case.resized)), expected)
    assert near(folded_logits(base, [tmp_path / "out"], tmp_path / "again"), expected)


def test_extraction_keeps_the_error_that_is_allowed(tmp_path: Path) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    make_base(BY_NAME["attention"], base)
    tune(BY_NAME["attention"], base, tuned, "_proj.weight")
    report = lora_extract_adapter(tuned, base, tmp_path / "out", max_error=0.5, **QUIET)
    before, after = read_tensors(base), read_tensors(tuned)
    ours = deltas_of(on_base(base, tmp_path / "out"))
    assert len(ours) == 14
    for module, found in ours.items():
        delta = after[f"{module}.weight"] - before[f"{module}.weight"]
        missing = float((found - delta).norm() / delta.norm())
        assert missing <= 0.5
        assert report.errors[module] == pytest.approx(missing, rel=1e-4)
        values = torch.linalg.svdvals(delta.double())
        enough = [r for r in range(1, 99) if values[r:].norm() <= 0.5 * values.norm()]
        rank = load_file(tmp_path / "out" / "adapter_model.safetensors")[
            f"base_model.model.{module}.lora_A.weight"
        ].shape[0]
        assert rank == enough[0]


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    make_base(BY_NAME["attention"], base)
    tune(BY_NAME["attention"], base, tuned, "q_proj.weight|norm")
    report = lora_extract_adapter(tuned, base, tmp_path / "out", rank=4, others="drop", **QUIET)
    assert any("5 changed tensors are left out" in note for note in report.notes)
    with pytest.raises(ValueError, match="There is nothing to extract"):
        lora_extract_adapter(base, base, tmp_path / "none", rank=4, **QUIET)
    with pytest.raises(ValueError, match="needs a rank or a max_error"):
        lora_extract_adapter(tuned, base, tmp_path / "none", **QUIET)
    assert not (tmp_path / "none").exists()
