"""README.md and merge_report.json of a merged folder: fit to be published, and well-formed."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard
from tiny_checkpoints import make_llama
from tiny_tokenizers import NORMAL, write_byte_level

from merge_card import VERSION, model_card, public_names, publish, saved_report
from merge_grammar import read_recipes, recipe_of
from merge_plan import Earlier
from merge_recipe import Recipe
from merge_report import MergeReport
from merge_run import merge_to_folder
from model_utils import Origin
from model_vocabulary import TokenSource, VocabularySettings

SIZES = {"layers": 1, "hidden_size": 8, "intermediate_size": 8, "heads": 2}
STRANGE = [
    "plain",
    'it\'s a "name"',
    "#1: [x](y) {z} & *all*",
    "two\nlines",
    "--- \n---",
    "```",
    "<img onerror=x>",
    "Ünïcödé \N{GRINNING FACE} 語 \u2028",
    "a\\b",
    "null",
    "- x: y",
    "\x7f\x1b[31m",
    os.fsdecode(b"not \xff utf-8"),
]


def make(folder, special=("<|end|>",)):
    make_llama(folder, vocab_size=NORMAL + len(special), **SIZES)
    write_byte_level(folder, special, eos=special[0])
    return folder


def recipe_for(base, *models, **options):
    return Recipe(method="ties", base_model=str(base), models=tuple(map(str, models)), **options)


def merge(*models, out, **options):
    options = {"vocabulary": VocabularySettings(mode="union")} | options
    recipe = recipe_for(*models, output_dir=out, **options)
    return merge_to_folder(recipe, threads=1, progress=False)


def saved(*names, paths=None, notes=(), files=("tokenizer.json",), method="ties", **options):
    """What would be saved of a merge of these models, none of which need exist."""
    recipe = Recipe(method=method, base_model=names[0], models=names[1:], **options)
    paths = paths or [Path("/cache") / name for name in names]
    plan = SimpleNamespace(
        recipe=recipe,
        sources=[
            SimpleNamespace(origins=(Origin(name, path, 0),), strengths=())
            for name, path in zip(names, paths, strict=True)
        ],
        alignment=SimpleNamespace(tied=False, vocabulary=SimpleNamespace(donor=0)),
        parameters=({},),
        dtype="float32",
    )
    vocabulary = {"rows": 7, "tokenizer_source": names[0], "rows_changed": {names[-1]: {"cut": 1}}}
    report = MergeReport(
        method, "default", {"lam": 1.0}, (), recipe.options, names[0], names[1:], "/home/me/out",
        "float32", vocabulary, 3, 10, 20, 0, 1.5, 2**30, 0, files, (), tuple(notes),
        {"model.norm.weight": {"kept": 1}}, {},
    )  # fmt: skip
    return saved_report(plan, report, Earlier())


def head(card):
    _, text, _ = card.split("---\n", 2)
    return yaml.safe_load(text)


# What may be published


def test_no_path_is_in_the_card_or_the_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = make(tmp_path / "secret-place/base")
    tuned = make(tmp_path / "secret-place/deep/tuned", ["<|end|>", "<tool>"])
    (tuned / "chat_template.jinja").write_text("{{ messages }}")
    (tuned / "LICENSE").write_text("MIT")
    merge(
        base, "secret-place/deep/tuned", f"{tuned}/", "secret-place/../secret-place/deep/tuned",
        out=tmp_path / "out", chat_template=str(tuned),
        vocabulary=VocabularySettings(
            mode="union", tokens={"<tool>": TokenSource(model=str(tuned), token="<tool>")}
        ),
    )  # fmt: skip
    for name in ("README.md", "merge_report.json"):
        text = (tmp_path / "out" / name).read_text()
        assert "tuned" in text
        for part in ("secret-place", "deep", str(tmp_path), str(tmp_path.parent), "out/"):
            assert part not in text
    report = json.loads((tmp_path / "out/merge_report.json").read_text())
    assert len(report["notes"]) >= 4
    assert [each["model"] for each in report["recipe"]["models"]] == ["tuned"] * 3
    assert report["recipe"]["chat_template"] == "tuned"


def test_two_runs_of_a_recipe_give_the_same_files(tmp_path):
    models = make(tmp_path / "base"), make(tmp_path / "tuned", ["<|end|>", "<tool>"])
    for number in ("1", "2"):
        merge(*models, out=tmp_path / number)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert {"README.md", "merge_report.json", "config.json", "tokenizer.json"} <= set(names)
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_the_report_has_the_recipe_as_it_was_resolved(tmp_path):
    models = make(tmp_path / "first"), make(tmp_path / "tuned")
    (tmp_path / "first/chat_template.jinja").write_text("x")
    merge(*models, out=tmp_path / "out", parameters={"densities": (0.5,)}, chat_template="base")
    report = json.loads((tmp_path / "out/merge_report.json").read_text())
    assert report["recipe"] == {
        "method": "ties",
        "base_model": "first",
        "models": [{"model": "tuned", "parameters": {"weight": 1.0, "density": 0.5}}],
        "profile": "default",
        "parameters": {
            "lambda": 1.0, "normalize": True,
            "trim_scope": "tensor", "trim_ties": "index", "k_rule": "floor", "rescale": "none",
            "denominator": "weight", "elect_on": "weighted", "elect_method": "mass",
            "negative_weights": False, "elect_zero": "plus",
        },
        "include": [], "exclude": [], "merge_embeddings": True, "merge_lm_head": True,
        "weight_decay": 0.0,
        "nan_policy": "error",
        "dtype": "bfloat16",
        "max_shard_size": "5GB",
        "vocabulary": {
            "mode": "union", "tokens": {}, "union_tokens": "added",
            "missing_row": "mean", "new_row": "donor", "linear_missing": "fill", "id_alias": [],
            "tie": "auto",
        },
        "tokenizer_source": "first",
        "chat_template": "first",
    }  # fmt: skip
    assert report["versions"].keys() == {"llama-merge", "torch", "numba", "python", "machine"}
    assert report["versions"]["llama-merge"] == VERSION
    assert report["result"]["tied"] is False
    assert "seconds" not in json.dumps(report)


def test_models_of_the_same_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["/a/chat", "chat", "../chat", "/a/chat", "org/chat", "b/chat-2"]
    public = public_names(names)
    assert public == {
        "chat": "chat", "/a/chat": "chat-2", "../chat": "chat-3", "org/chat": "org/chat",
        "b/chat-2": "b/chat-2",
    }  # fmt: skip
    assert public_names([".", ".."]) == {".": tmp_path.name, "..": tmp_path.parent.name}
    assert set(public_names(["/a/chat", "/a/./chat/", "/a/b/../chat"]).values()) == {"chat"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a/b/chat: 3 rows cut (/a/b/chat 5, /a/b/chat-it 4)", "chat: 3 rows cut (chat 5, it 4)"),
        ("by 'model:/a/b/chat'", "by 'model:chat'"),
        ("../x: 1 of ../x/model.safetensors", "x: 1 of x/model.safetensors"),
        (f"{'/a/two' + chr(10) + 'lines'!r}: cut, /a/two\nlines", "'2': cut, 2"),
        ("/a/b/chatter and c/a/b/chat", "/a/b/chatter and c/a/b/chat"),
        ("F32/BF16 and/or ../y", "F32/BF16 and/or ../y"),
    ],
)
def test_paths_within_texts_are_replaced_and_nothing_else(text, expected):
    names = {
        "/a/b/chat": "chat",
        "/a/b/chat-it": "it",
        "../x": "x",
        "/a/two\nlines": "2",
        "o/y": "o/y",
    }
    assert publish({text: [text, 1, None, {"a": text}]}, names) == {
        expected: [expected, 1, None, {"a": expected}]
    }


def test_a_folder_is_found_by_its_whole_path_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/chat").mkdir(parents=True)
    names = public_names(["models/chat", "."])
    text = f"{tmp_path}/models/chat and {tmp_path} and models/chat and ./a"
    assert publish(text, names) == f"chat and {tmp_path.name} and chat and ./a"
    assert publish([".", "models/chat"], names) == [tmp_path.name, "chat"]


# The Hub's fields


def test_only_hub_ids_are_base_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/local").mkdir(parents=True)
    snapshot = Path("/cache/models--org--base/snapshots/0123abc")
    paths = [snapshot, Path("/cache/elsewhere"), Path("org/local"), Path("/models/tuned")]
    names = ["org/base", "org/tuned", "org/local", "/models/tuned", "org/base"]
    report = saved(*names, paths=[*paths, snapshot])
    assert report["base_models"] == ["org/base", "org/tuned"]
    assert report["revisions"] == {"org/base": "0123abc"}
    card = model_card(report)
    assert head(card) == {
        "base_model": ["org/base", "org/tuned"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "llama-merge"],
    }
    assert "- `org/base` (base) at 0123abc\n- `org/tuned`\n- `local`\n- `tuned`" in card
    data = ModelCard(card, ignore_metadata_errors=False).data
    assert (data.base_model, data.tags) == (["org/base", "org/tuned"], ["merge", "llama-merge"])


def test_without_hub_models_no_base_is_named():
    assert head(model_card(saved("/a/base", "/a/tuned"))).keys() == {
        "library_name", "pipeline_tag", "tags",
    }  # fmt: skip


# The card as a text


def test_the_card_says_what_was_merged_and_how():
    card = model_card(saved("/a/base", "/a/tuned", notes=["1 token cut", "2 kept"]))
    body = card.split("---\n", 2)[2]
    assert body.startswith(
        "\n# A merge by TIES\n\n- `base` (base)\n- `tuned`\n\n"
        "3 tensors in float32; 7 vocabulary rows, tokenizer of `base`.\n\n```yaml\nmethod: ties\n"
    )
    recipe = yaml.safe_load(body.split("```")[1].removeprefix("yaml"))
    assert recipe["models"] == [{"model": "tuned"}]
    assert f"```\n\n- 1 token cut\n- 2 kept\n\nMade with llama-merge {VERSION}, torch " in body
    assert body.endswith(". merge_report.json has the findings per tensor.\n")


def test_a_merge_without_a_tokenizer_has_a_card():
    card = model_card(saved("/a/x", "/a/y", files=("LICENSE",), method="linear"))
    assert "# A merge by linear average\n" in card
    assert "7 vocabulary rows, no tokenizer.\n" in card
    assert "\n\n\n" not in card


@pytest.mark.parametrize("name", STRANGE)
def test_a_merge_of_a_folder_of_any_name_has_a_sound_card(tmp_path, name):
    base, tuned = make(tmp_path / "base"), make(tmp_path / "tuned", ["<|end|>", "<tool>"])
    tuned = tuned.rename(tmp_path / name)
    merge(base, tuned, out=tmp_path / "out", chat_template="none")
    card = (tmp_path / "out/README.md").read_text("utf-8")
    report = json.loads((tmp_path / "out/merge_report.json").read_text("utf-8"))
    public = name.encode("utf-8", "replace").decode()
    assert [each["model"] for each in report["recipe"]["models"]] == [public]
    assert str(tmp_path) not in card + json.dumps(report)
    assert head(card)["tags"] == ["merge", "llama-merge"]
    assert "base_model" not in ModelCard(card).data.to_dict()
    lines = card.split("\n")
    start = next(index for index, line in enumerate(lines) if line.endswith("```yaml"))
    stop = lines.index(lines[start].removesuffix("yaml"))
    assert recipe_of(yaml.safe_load("\n".join(lines[start + 1 : stop]))).models == (public,)
    assert read_recipes((tmp_path / "out/merge_recipe.yml").read_bytes())[0].recipe.models == (
        public,
    )
    shown = " ".join(public.split())
    assert any(line.startswith("- `") and shown in line for line in lines[:start])
    notes = [line for line in lines[stop + 1 : -2] if line]
    assert len(notes) == len(report["notes"]) > 0
    assert all(note.startswith("- ") for note in notes)


@pytest.mark.parametrize(
    ("note", "shown"),
    [
        ("1 token added: '<think>'", r"1 token added: '\<think\>'"),
        ("a *b* _c_ `d` [e](f) #g ~h~ i|j $k$ &lt; \\", None),
        ("two\nlines", "two lines"),
        ("pad_to_multiple_of, my_model", "pad_to_multiple_of, my_model"),
    ],
)
def test_notes_are_shown_as_they_are(note, shown):
    if shown is None:
        shown = r"a \*b\* \_c\_ \`d\` \[e\](f) \#g \~h\~ i\|j \$k\$ \&lt; \\"
    assert f"\n- {shown}\n" in model_card(saved("/a/x", "/a/y", notes=[note]))


@pytest.mark.parametrize(
    ("name", "shown"), [("a`b", "`` a`b ``"), ("``", "``` `` ```"), ("a  b", "`a b`")]
)
def test_names_are_shown_as_they_are(name, shown):
    assert f"- {shown}\n" in model_card(saved("/a/x", f"/a/{name}"))
