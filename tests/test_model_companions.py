"""What a merged folder has besides weights and config.json, and what loaders make of it."""

import json
import os

import pytest
import torch
from tiny_checkpoints import make_llama, read_tensors, save_tensors
from tiny_tokenizers import (
    NORMAL,
    TEMPLATE,
    TEXT,
    write_byte_level,
    write_json,
    write_sentencepiece,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import model_files
from merge_recipe import Recipe
from merge_run import merge_to_folder
from model_companions import carry
from model_errors import ModelCompatibilityError
from model_prep import align
from model_utils import open_model_folder
from model_vocabulary import TokenSource, VocabularySettings

CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"
SPECIAL_MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
JINJA, FOLDER = "chat_template.jinja", "additional_chat_templates"
START, END, STOP, TOOL = "<|im_start|>", "<|im_end|>", "<|end|>", "<tool>"
HI = [{"role": "user", "content": "a quick fox"}]
SIZES = {"layers": 1, "hidden_size": 8, "intermediate_size": 8, "heads": 2, "dtype": "float32"}


def read_json(path):
    return json.loads(path.read_text("utf-8"))


def change_json(path, **changes):
    write_json(path, {**(read_json(path) if path.exists() else {}), **changes})


def make(folder, special=(), *, rows=None, template=None, form="tokenizer.json", **options):
    """A model with a tokenizer of that form, ending at its last special token."""
    rows = rows or NORMAL + len(special)
    options = SIZES | {"model_type": {"vocab.json": "qwen2"}.get(form, "llama")} | options
    make_llama(folder, vocab_size=rows, **options)
    if form == "tokenizer.model":
        write_sentencepiece(folder, special)
        end = 2
    elif form is not None:
        eos = special[-1] if special else None
        ids = write_byte_level(folder, special, eos=eos, form=form)
        end = ids.get(eos, 2)
    else:
        end = 2
    for name in ("config.json", GENERATION):
        change_json(folder / name, eos_token_id=end)
    if template is not None:
        (folder / JINJA).write_text(template)
    return folder


def make_old(folder):
    """List added tokens and roles as transformers did before there was an added_tokens_decoder."""
    settings = read_json(folder / CONFIG)
    listed = settings.pop("added_tokens_decoder", {})
    write_json(folder / ADDED, {entry["content"]: int(i) for i, entry in listed.items()})
    filled = [key for key, token in settings.items() if key.endswith("_token") and token]
    roles = {key: settings.pop(key) for key in filled}
    lists = {"additional_special_tokens": [e["content"] for e in listed.values() if e["special"]]}
    write_json(folder / SPECIAL_MAP, roles | lists)
    write_json(folder / CONFIG, settings)


class Carried:
    """What `carry` decides for folders; `texts` are those of edited files."""

    def __init__(self, *folders, mode="min", donor=None, template="auto", **settings):
        models = [open_model_folder(folder) for folder in folders]
        vocabulary = VocabularySettings(mode=mode, **settings)
        merged = align(models, vocabulary, donor=donor).vocabulary
        self.files, self.problems = carry(models, merged, template)
        self.notes = self.files.notes
        self.copies = {path.name: path for path in self.files.copies}
        for model in models:
            model.close()

    @property
    def texts(self):
        return {name: edit.make() for name, edit in self.files.edits.items()}

    def json(self, name):
        return json.loads(self.texts[name])


def merge(base, tuned, out, *, mode="min", **options):
    recipe = Recipe(
        method="task_arithmetic",
        base_model=str(base),
        models=(str(tuned),),
        output_dir=out,
        vocabulary=VocabularySettings(mode=mode),
        **options,
    )
    return merge_to_folder(recipe, threads=1, progress=False)


# Where files come from


def test_without_a_reason_to_edit_every_file_of_the_donor_is_copied(tmp_path):
    base = make(tmp_path / "base", [STOP], template="hello")
    make_old(base)
    for name in ("tokenizer.model", "tokenizer.model.v3", "tekken.json", "vocab.txt", "merges.txt"):
        (base / name).write_text("{}")
    found = Carried(base, make(tmp_path / "tuned", [STOP], template="another"))
    assert (found.problems, found.files.edits) == ([], {})
    assert set(found.copies) == {
        "tokenizer.json", CONFIG, SPECIAL_MAP, ADDED, GENERATION, JINJA,
        "tokenizer.model", "tokenizer.model.v3", "tekken.json", "vocab.txt", "merges.txt",
    }  # fmt: skip
    assert {path.parent for path in found.files.copies} == {base}


def test_the_donors_files_are_taken_and_the_first_models_licence(tmp_path):
    base, tuned = make(tmp_path / "base", [STOP]), make(tmp_path / "tuned", [STOP], template="x")
    for name, folder in [("LICENSE.txt", base), ("USE_POLICY.md", base), ("LICENSE", tuned)]:
        (folder / name).write_text(f"of {folder.name}")
    found = Carried(base, tuned, donor=1)
    parents = {name: path.parent.name for name, path in found.copies.items()}
    assert parents == {
        "tokenizer.json": "tuned", CONFIG: "tuned", GENERATION: "tuned", JINJA: "tuned",
        "LICENSE.txt": "base", "USE_POLICY.md": "base",
    }  # fmt: skip
    note = f"licence files of {base}; {tuned} has others (LICENSE)"
    assert note in found.notes
    (tuned / "LICENSE").write_text("of base")
    assert note not in Carried(base, tuned).notes
    (base / "LICENSE").write_text("of another")
    (tuned / "LICENSE").write_text("of tuned")
    assert note in Carried(base, tuned).notes


def test_other_files_of_the_first_model_and_the_donor_are_named_as_left_behind(tmp_path):
    base, tuned = make(tmp_path / "base", [STOP]), make(tmp_path / "tuned", [STOP])
    for folder, name in [(base, "modeling.py"), (base, "a.bin"), (tuned, "notes.txt")]:
        (folder / name).write_text("")
    for name in (".hidden", "README.md", "other.safetensors"):
        (base / name).write_text("")
    (base / "onnx").mkdir()
    (base / "LICENSES").mkdir()
    assert Carried(base, tuned).files.left == ("LICENSES", "a.bin", "modeling.py", "onnx")
    left = Carried(base, tuned, mode="base", donor=1).files.left
    assert left == ("LICENSES", "a.bin", "modeling.py", "notes.txt", "onnx")


def test_links_into_the_hubs_cache_are_followed(tmp_path):
    made = make(tmp_path / "made", [STOP])
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots/abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    shared = tmp_path / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    for number, file in enumerate(sorted(made.iterdir())):
        blob = repo / "blobs" / f"etag{number}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    blob = (snapshot / "tokenizer.json").resolve()
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    merge(snapshot, made, tmp_path / "out")
    for name in ("tokenizer.json", CONFIG):
        copy = tmp_path / "out" / name
        assert not copy.is_symlink()
        assert copy.read_bytes() == (made / name).read_bytes()


def link_out(folder):
    (folder.parent / "secret").write_text("key")
    (folder / "LICENSE").symlink_to("../secret")


def link_to_nothing(folder):
    (folder / SPECIAL_MAP).symlink_to("gone")


def with_mark(folder):
    path = folder / "tokenizer.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def template_linked_out(folder):
    (folder.parent / "secret").write_text("key")
    (folder / FOLDER).mkdir()
    (folder / FOLDER / "tools.jinja").symlink_to("../../secret")


def main_template_linked_out(folder):
    (folder.parent / "secret").write_text("key")
    (folder / JINJA).symlink_to("../secret")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (main_template_linked_out, "base: chat_template.jinja is a link out of the model's fold"),
        (link_out, "base: LICENSE is a link out of the model's folder, and what it holds"),
        (
            template_linked_out,
            "base: additional_chat_templates/tools.jinja is a link out of the model's folder",
        ),
        (link_to_nothing, "base: special_tokens_map.json is a link to nothing. Download the mo"),
        (with_mark, "base: tokenizer.json is no JSON object: it starts with a byte order mark"),
    ],
)
def test_files_that_are_not_what_they_seem_are_refused(tmp_path, change, text):
    base = make(tmp_path / "base", [STOP])
    change(base)
    (problem,) = problems_of(base, make(tmp_path / "tuned", [STOP]))
    assert text in problem


def problems_of(*folders):
    """What is wrong with the small files, wherever it is found."""
    try:
        return Carried(*folders).problems
    except ModelCompatibilityError as error:
        return error.problems


def test_a_link_within_the_folder_is_followed(tmp_path):
    base = make(tmp_path / "base", [STOP])
    (base / "legal").mkdir()
    (base / "legal/text").write_text("MIT")
    (base / "LICENSE").symlink_to("legal/text")
    assert "LICENSE" in Carried(base).copies


def test_a_file_of_absurd_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(model_files, "TOKENIZER_BYTES", 1000)
    (problem,) = problems_of(make(tmp_path / "base", [STOP]))
    assert "tokenizer.json has " in problem
    assert "expected at most 1000. Download the model again" in problem


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        (GENERATION, b"[1]", "generation_config.json is not a valid JSON object (expected a JSON"),
        (GENERATION, b"\xef\xbb\xbf{}", "generation_config.json is not a valid JSON object"),
        (GENERATION, b"[" * 99_999, "is not a valid JSON object (it is nested too deeply)"),
        (SPECIAL_MAP, b'{"a": "\xff"}', "special_tokens_map.json is not a valid JSON object"),
        (JINJA, b"\xff\xfe{{ x }}", "chat_template.jinja is not UTF-8 text"),
        ("chat_template.json", b'{"chat_template": 7}', "chat_template in chat_template.json is n"),
        (CONFIG, b'{"chat_template": 7}', "chat_template in tokenizer_config.json is neither a t"),
        (CONFIG, b'{"chat_template": [{"name": "a"}]}', "is neither a text nor a list of named te"),
        (CONFIG, b'{"chat_template": {"a": 1}}', "is neither a text nor a list of named texts"),
    ],
)
@pytest.mark.parametrize("donor", [0, 1])
def test_a_broken_file_of_any_model_is_refused_by_name(tmp_path, donor, name, content, text):
    base, tuned = (make(tmp_path / folder, [STOP]) for folder in ("base", "tuned"))
    (tuned / name).write_bytes(content)
    (problem,) = Carried(base, tuned, donor=donor).problems
    assert problem.startswith(f"{tuned}: ")
    assert text in problem
    assert problem.endswith("Download the model again")


# Special tokens of the donor


@pytest.mark.parametrize(
    ("file", "settings", "text"),
    [
        (CONFIG, {"pad_token": TOOL}, f"pad_token {TOOL!r} in {CONFIG} lies beyond the vocabulary"),
        (CONFIG, {"my_token": {"content": TOOL}}, f"my_token {TOOL!r} in {CONFIG} lies beyond"),
        (SPECIAL_MAP, {"sep_token": TOOL}, f"sep_token {TOOL!r} in {SPECIAL_MAP} lies beyond"),
        (CONFIG, {"pad_token": "[PAD]"}, "pad_token '[PAD]' in tokenizer_config.json is not a tok"),
        (GENERATION, {"pad_token_id": NORMAL + 1}, f"pad_token_id {NORMAL + 1} in {GENERATION} li"),
        (GENERATION, {"eos_token_id": 2.0}, f"eos_token_id in {GENERATION} is 2.0, expected a wh"),
        (
            GENERATION,
            {"eos_token_id": [2, "7"]},
            "is [2, '7'], expected a whole number from",
        ),
    ],
)
def test_special_tokens_that_the_result_lacks_are_refused(tmp_path, file, settings, text):
    base = make(tmp_path / "base", [STOP, TOOL])
    for name, other in [("config.json", {"eos_token_id": NORMAL}), (CONFIG, {"eos_token": STOP})]:
        change_json(base / name, **other)
    change_json(base / GENERATION, eos_token_id=NORMAL)
    assert Carried(base, make(tmp_path / "tuned", [STOP])).problems == []
    change_json(base / file, **settings)
    (problem,) = Carried(base, tmp_path / "tuned").problems
    assert problem.startswith(f"{base}: ")
    assert text in problem


def test_what_a_cut_removes_leaves_lists_of_special_tokens(tmp_path):
    base = make(tmp_path / "base", [STOP, TOOL])
    change_json(base / "config.json", eos_token_id=NORMAL)
    change_json(base / GENERATION, eos_token_id=NORMAL)
    change_json(base / CONFIG, eos_token=STOP, extra_special_tokens={"a": STOP, "b": TOOL})
    write_json(base / SPECIAL_MAP, {"additional_special_tokens": [{"content": TOOL}, STOP]})
    write_json(base / ADDED, {STOP: NORMAL, TOOL: NORMAL + 1})
    found = Carried(base, make(tmp_path / "tuned", [STOP]))
    assert found.problems == []
    assert found.json(CONFIG)["extra_special_tokens"] == {"a": STOP}
    assert found.json(SPECIAL_MAP) == {"additional_special_tokens": [STOP]}
    assert found.json(ADDED) == {STOP: NORMAL}
    assert [e["content"] for e in found.json("tokenizer.json")["added_tokens"]] == [STOP]


# Tokens added and cut


def test_a_union_edits_the_files_that_list_tokens_and_no_others(tmp_path):
    base = make(tmp_path / "base", [STOP])
    (base / SPECIAL_MAP).write_text('{"eos_token":\n "<|end|>"}')
    (base / ADDED).write_text(f'{{"{STOP}":{NORMAL}}}')
    found = Carried(base, make(tmp_path / "tuned", [STOP, TOOL]), mode="union")
    assert set(found.texts) == {"tokenizer.json", ADDED}
    assert found.texts[ADDED] == f'{{"{STOP}":{NORMAL},\n  "{TOOL}": {NORMAL + 1}}}'
    assert set(found.copies) == {CONFIG, SPECIAL_MAP, GENERATION}
    (entry,) = found.json("tokenizer.json")["added_tokens"][1:]
    assert (entry["id"], entry["content"], entry["special"]) == (NORMAL + 1, TOOL, True)
    assert found.copies[SPECIAL_MAP].parent == found.copies[CONFIG].parent == base


def test_text_that_is_no_ascii_stays_as_it_is(tmp_path):
    base = make(tmp_path / "base", [STOP])
    change_json(base / CONFIG, note="é “x” \N{GRINNING FACE}", added_tokens_decoder={})
    found = Carried(base, make(tmp_path / "tuned", [STOP, TOOL]), mode="union")
    assert '"é “x” \N{GRINNING FACE}"' in found.texts[CONFIG]


def test_a_list_that_stands_in_for_older_files_has_all_that_they_name(tmp_path):
    base = make(tmp_path / "base", [STOP, "<pad>"], form="vocab.json")
    make_old(base)
    change_json(base / SPECIAL_MAP, pad_token={"content": "<pad>"}, eos_token=STOP)
    tuned = make(tmp_path / "tuned", [STOP, TOOL], form="vocab.json")
    settings = Carried(base, tuned, mode="union").json(CONFIG)
    listed = {int(i): e["content"] for i, e in settings["added_tokens_decoder"].items()}
    assert listed == {NORMAL: STOP, NORMAL + 1: "<pad>", NORMAL + 2: TOOL}
    assert {entry["special"] for entry in settings["added_tokens_decoder"].values()} == {True}
    assert (settings["eos_token"], settings["pad_token"]) == (STOP, "<pad>")
    assert settings["additional_special_tokens"] == [STOP, "<pad>"]


def test_a_list_that_is_there_is_only_extended(tmp_path):
    base = make(tmp_path / "base", [STOP], form="vocab.json")
    role = {"__type": "AddedToken", "content": STOP, "lstrip": True}
    change_json(base / CONFIG, eos_token=role)
    write_json(base / SPECIAL_MAP, {"eos_token": "<other>"})
    tuned = make(tmp_path / "tuned", [STOP, TOOL], form="vocab.json")
    before = read_json(base / CONFIG)
    (base / "vocab.json").write_text(json.dumps(read_json(base / "vocab.json")))
    found = Carried(base, tuned, mode="union")
    assert {"vocab.json", "merges.txt", SPECIAL_MAP} <= found.copies.keys()
    settings = found.json(CONFIG)
    (new,) = settings["added_tokens_decoder"].keys() - before["added_tokens_decoder"].keys()
    assert settings["added_tokens_decoder"].pop(new)["content"] == TOOL
    assert settings == before


def test_a_merge_rule_goes_with_any_of_its_tokens(tmp_path):
    base, tuned = (make(tmp_path / name, rows=rows) for name, rows in [("base", 6), ("tuned", 4)])
    merges = ["a b", "ab c", "c a", "c b"]
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "abc": 3, "ab": 4, "ca": 5}}
    model["vocab"]["cb"] = 3
    change_json(base / "tokenizer.json", model=model | {"merges": merges}, added_tokens=[])
    for name in ("tokenizer.json", CONFIG):
        (tuned / name).unlink()
    model = Carried(base, tuned).json("tokenizer.json")["model"]
    assert (model["vocab"].keys(), model["merges"]) == ({"a", "b", "c", "abc", "cb"}, ["c b"])


def test_forms_of_mistral_are_left_behind_where_tokens_change(tmp_path):
    base = make(tmp_path / "base", [STOP])
    for name in ("tekken.json", "tokenizer.model.v3"):
        (base / name).write_text("{}")
    found = Carried(base, make(tmp_path / "tuned", [STOP, TOOL]), mode="union")
    assert not {"tekken.json", "tokenizer.model.v3"} & {*found.copies, *found.texts}
    assert "left behind, as other tokens are in it: tekken.json, tokenizer.model.v3" in found.notes


def test_a_sentencepiece_model_cannot_lose_normal_tokens(tmp_path):
    base = make(tmp_path / "base", form="tokenizer.model")
    tuned = make(tmp_path / "tuned", rows=NORMAL - 9, form=None)
    (problem,) = Carried(base, tuned).problems
    assert f"tokenizer.model holds normal tokens beyond the {NORMAL - 9} rows" in problem


def test_a_token_around_every_text_cannot_be_cut(tmp_path):
    base = make(tmp_path / "base", [STOP, TOOL])
    change_json(base / "config.json", eos_token_id=NORMAL)
    change_json(base / GENERATION, eos_token_id=NORMAL)
    change_json(base / CONFIG, eos_token=STOP)
    tuned = make(tmp_path / "tuned", [STOP])
    around = {"type": "TemplateProcessing", "special_tokens": {TOOL: {"ids": [NORMAL + 1]}}}
    for processor in (
        around,
        {"type": "Sequence", "processors": [{"type": "ByteLevel"}, around]},
        {"type": "RobertaProcessing", "sep": [TOOL, NORMAL + 1], "cls": [STOP, NORMAL]},
    ):
        change_json(base / "tokenizer.json", post_processor=processor)
        (problem,) = Carried(base, tuned).problems
        assert f"(ValueError: it puts the token {NORMAL + 1}, which has no row, around" in problem


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (ADDED, {STOP: "one"}),
        (ADDED, {"\ud800": 0, TOOL: NORMAL + 1}),
        (CONFIG, {"added_tokens_decoder": [STOP]}),
    ],
)
def test_a_file_that_cannot_be_edited_is_refused_before_the_merge(tmp_path, name, content):
    base, tuned = make(tmp_path / "base", [STOP, TOOL]), make(tmp_path / "tuned", [STOP])
    for file in ("config.json", GENERATION):
        change_json(base / file, eos_token_id=NORMAL)
    change_json(base / CONFIG, eos_token=None)
    models = [open_model_folder(folder) for folder in (base, tuned)]
    merged = align(models).vocabulary
    (base / name).write_text(json.dumps(content))
    _, (problem,) = carry(models, merged)
    assert problem.startswith(f"{base}: {name} cannot be changed as the result needs it (")
    assert problem.endswith("or take another tokenizer (tokenizer_source)")


# Chat templates

A, B = "{{ messages }} a", "{{ messages }} b"


@pytest.mark.parametrize(
    ("base", "tuned", "other", "choice", "source", "note"),
    [
        (None, None, None, "auto", None, None),
        (A, A, A, "auto", "base", None),
        (A, B, A, "auto", "base", "chat template of base; tuned has another"),
        (A, B, B, "auto", "base", "chat template of base; tuned, other have another"),
        (A, None, B, "auto", "base", "chat template of base; other has another; tuned has none"),
        (A, None, None, "auto", "base", "chat template of base; tuned, other have none"),
        (None, B, B, "auto", "tuned", "chat template of tuned, as base has none"),
        (
            None,
            None,
            B,
            "auto",
            "other",
            "chat template of other, as base has none; tuned has none",
        ),
        (" \n", B, B, "auto", "tuned", "chat template of tuned, as base has none"),
        (None, A, B, "auto", None, "no chat template: base has none, and those of tuned, other di"),
        (A, B, B, "none", None, None),
        (A, B, B, "base", "base", "chat template of base; tuned, other have another"),
        (A, B, B, "other", "other", "chat template of other; base has another"),
        (A, A, A, "tuned", "tuned", "chat template of tuned"),
        (None, A, B, "other", "other", "chat template of other, as base has none; tuned has anot"),
    ],
)
def test_which_chat_template_is_taken(
    tmp_path, monkeypatch, base, tuned, other, choice, source, note
):
    monkeypatch.chdir(tmp_path)
    texts = {"base": base, "tuned": tuned, "other": other}
    for name, text in texts.items():
        make(tmp_path / name, [STOP], template=text)
    found = Carried(*texts, template=choice)
    assert found.problems == []
    kept = {name: path.read_text() for name, path in found.copies.items()}
    expected = {} if source is None else {JINJA: texts[source]}
    assert found.texts.keys() <= {JINJA}
    assert {n: text for n, text in (kept | found.texts).items() if "template" in n} == expected
    notes = [text for text in found.notes if "template" in text]
    assert len(notes) == (note is not None)
    assert not notes or notes[0].startswith(note)


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ("elsewhere", "'elsewhere' is none of the models: base, tuned. Choose auto, none"),
        (
            "tuned",
            "chat_template: 'tuned' has no chat template. Choose auto, none or a model that ha",
        ),
    ],
)
def test_a_choice_that_is_no_template_is_refused(tmp_path, monkeypatch, choice, text):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "base", [STOP], template=A)
    make(tmp_path / "tuned", [STOP])
    (problem,) = Carried("base", "tuned", template=choice).problems
    assert text in problem
    (tmp_path / "base" / JINJA).unlink()
    (problem,) = Carried("base", "tuned", template=choice).problems
    assert problem.endswith("(there is none)")


def test_a_model_that_is_listed_twice_is_named_and_noted_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "base", [STOP], template=A)
    make(tmp_path / "some/tuned", [STOP, TOOL], template=B)
    change_json(tmp_path / "some/tuned" / GENERATION, temperature=0.5)
    (tmp_path / "some/tuned/LICENSE").write_text("MIT")
    models = ["base", "some/tuned", "some/../some/tuned", "some/tuned"]
    assert Carried(*models, template="some/tuned").texts[JINJA] == B
    notes = Carried(*models).notes
    assert len(notes) == len(set(notes)) == len(Carried(*models[:2]).notes) == 4


STORED = ["text", "list", "named texts", "jinja", "chat_template.json", "folder"]


def store_template(folder, how, text):
    """Store a chat template in one of the ways; in "folder" and lists beside another one."""
    more = {"default": text, "tools": "tools " + text}
    if how in ("jinja", "folder"):
        (folder / JINJA).write_text(text)
    if how == "folder":
        (folder / FOLDER).mkdir()
        (folder / FOLDER / "tools.jinja").write_text(more["tools"])
    listed = [{"name": name, "template": template} for name, template in more.items()]
    stored = {"text": text, "chat_template.json": text, "list": listed, "named texts": more}
    if how in stored:
        file = how if how == "chat_template.json" else CONFIG
        change_json(folder / file, chat_template=stored[how])


def rendered(folder, **options):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(HI, tokenize=False, **options)


@pytest.mark.parametrize("before", [None, "text", "jinja", "folder"])
@pytest.mark.parametrize("how", STORED)
def test_a_template_of_another_model_renders_however_either_is_stored(tmp_path, how, before):
    base, tuned = make(tmp_path / "base", [STOP]), make(tmp_path / "tuned", [STOP])
    store_template(tuned, how, "tuned: {{ messages[0]['content'] }}")
    if before is not None:
        store_template(base, before, "base: {{ messages[0]['content'] }}")
    merge(base, tuned, tmp_path / "out", chat_template=str(tuned))
    assert rendered(tmp_path / "out") == "tuned: a quick fox"
    if how in ("list", "named texts", "folder"):
        assert rendered(tmp_path / "out", chat_template="tools") == "tools tuned: a quick fox"
        assert rendered(tmp_path / "out", tools=[]) == "tuned: a quick fox"


@pytest.mark.parametrize("how", STORED)
def test_no_template_is_left_if_none_is_asked_for(tmp_path, how):
    base = make(tmp_path / "base", [STOP])
    store_template(base, how, A)
    merge(base, base, tmp_path / "out", chat_template="none")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is None


@pytest.mark.parametrize("how", ["text", "list", "named texts", "jinja", "chat_template.json"])
def test_the_donors_template_stays_where_it_is(tmp_path, how):
    base = make(tmp_path / "base", [STOP])
    store_template(base, how, A)
    found = Carried(base, make(tmp_path / "tuned", [STOP]))
    assert found.files.edits == {}


def test_the_donors_folder_of_templates_moves_into_the_tokenizer_config(tmp_path):
    base = make(tmp_path / "base", [STOP])
    store_template(base, "folder", "{{ messages[0]['content'] }}")
    report = merge(base, base, tmp_path / "out")
    assert rendered(tmp_path / "out") == rendered(base)
    assert rendered(tmp_path / "out", chat_template="tools") == "tools a quick fox"
    assert f"the chat templates of {base} (default, tools) are in {CONFIG}" in report.notes
    assert report.files_left == ()


def test_a_template_that_writes_what_the_result_reads_otherwise_is_noted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "base", [STOP])
    make(tmp_path / "tuned", [STOP, *map("<|{}|>".format, "abcd")])
    store_template(tmp_path / "tuned", "text", "<|a|> <|c|> {{ eos_token }} {{ my_eos_token_x }}")
    notes = Carried("base", "tuned", template="tuned").notes
    assert (
        "the chat template of tuned writes '<|a|>', '<|c|>', which the result does not have: chats "
        "will be garbled. Use vocabulary 'union'"
    ) in notes
    assert (
        "the chat template of tuned writes the eos_token, there '<|d|>'; with the tokenizer of "
        "base it writes '<|end|>'"
    ) in notes
    assert not [n for n in Carried("base", "tuned", mode="base", donor=1).notes if "writes" in n]
    united = Carried("base", "tuned", mode="union").notes
    assert ["eos" in note for note in united if "writes" in note] == [True]
    store_template(tmp_path / "tuned", "text", "<|a|><|b|><|c|><|d|>{{ my_eos_token_x }}")
    (note,) = [note for note in Carried("base", "tuned").notes if "writes" in note]
    assert note == (
        "no chat template: base has none, and that of tuned writes '<|a|>', '<|b|>', '<|c|>', ..., "
        "which the result does not have. Vocabulary 'union' keeps such tokens"
    )


# End tokens


@pytest.mark.parametrize(
    ("donor_ends", "template_ends", "expected"),
    [
        (NORMAL, NORMAL + 2, [NORMAL, NORMAL + 1]),
        ([NORMAL, 5], [NORMAL + 2], [NORMAL, 5, NORMAL + 1]),
        (NORMAL, [NORMAL + 2, 7, NORMAL], [NORMAL, NORMAL + 1, 7]),
        (None, NORMAL + 2, [NORMAL, NORMAL + 1]),  # that of config.json
        (NORMAL, None, [NORMAL, NORMAL + 1]),
        (NORMAL, NORMAL, None),
    ],
)
def test_end_tokens_of_the_templates_model_are_added_by_their_strings(
    tmp_path, donor_ends, template_ends, expected
):
    base = make(tmp_path / "base", [STOP])
    tuned = make(tmp_path / "tuned", [STOP, TOOL, END], template=A)
    (tuned / "tokenizer.json").write_text(
        (tuned / "tokenizer.json").read_text().replace(TOOL, START)
    )
    make(tmp_path / "other", [STOP, END])  # so that END is numbered on in the union
    (base / GENERATION).write_text(
        f'{{"temperature":0.5, "eos_token_id":{json.dumps(donor_ends)}}}'
    )
    change_json(tuned / GENERATION, eos_token_id=template_ends)
    found = Carried(base, tmp_path / "other", tuned, mode="union")
    if expected is None:
        assert GENERATION in found.copies
        return
    text = json.dumps(expected)
    assert found.texts[GENERATION] == f'{{"temperature":0.5, "eos_token_id":{text}}}'
    (note,) = [note for note in found.notes if "generation ends at" in note]
    assert note.endswith(f"as in {base} and {tuned}")
    assert "'<|end|>'" in note


def test_a_generation_config_is_made_where_the_donor_has_none(tmp_path):
    base, tuned = make(tmp_path / "base", [STOP]), make(tmp_path / "tuned", [STOP, END], template=A)
    (base / GENERATION).unlink()
    change_json(base / "config.json", pad_token_id=None)
    found = Carried(base, tuned, mode="union")
    ends = {"bos_token_id": 1, "eos_token_id": [NORMAL, NORMAL + 1]}
    assert found.json(GENERATION) == ends
    (note,) = [note for note in found.notes if "generation config" in note]
    assert note == f"{base} has no generation config; that of {tuned} is not taken over"


@pytest.mark.parametrize("form", [None, "tokenizer.json"])
def test_an_end_token_without_a_row_is_noted(tmp_path, form):
    base = make(tmp_path / "base", [STOP])
    tuned = make(tmp_path / "tuned", [STOP, END], form=form, template=A)
    change_json(tuned / GENERATION, eos_token_id=NORMAL + 1)
    found = Carried(base, tuned)
    name = repr(END) if form else NORMAL + 1
    assert (
        f"{tuned} ends its answers with {name}, which the result does not have: it may not stop. "
        "Use vocabulary 'union'"
    ) in found.notes
    assert GENERATION in found.copies


def test_an_end_token_is_found_by_its_row_where_no_string_tells(tmp_path):
    base = make(tmp_path / "base", ["<|spare|>", STOP])
    no_tokenizer = make(tmp_path / "none", rows=NORMAL + 2, form=None, template=A)
    change_json(no_tokenizer / GENERATION, eos_token_id=NORMAL)
    assert Carried(base, no_tokenizer).json(GENERATION)["eos_token_id"] == [NORMAL + 1, NORMAL]
    renamed = make(tmp_path / "renamed", [END, STOP], template=A)
    change_json(renamed / GENERATION, eos_token_id=NORMAL)
    for mode in ("min", "base"):
        same = Carried(base, renamed, mode=mode, id_alias=(NORMAL,))
        assert same.json(GENERATION)["eos_token_id"] == [NORMAL + 1, NORMAL]
    longer = make(tmp_path / "longer", [END, "<|x|>", STOP], template=A)
    change_json(longer / GENERATION, eos_token_id=NORMAL)
    moved = Carried(base, longer, mode="base", id_alias=(NORMAL,))
    assert moved.json(GENERATION)["eos_token_id"] == [NORMAL + 1, NORMAL]
    donor = make(tmp_path / "donor", [STOP, "<|spare|>"])
    by_donor = Carried(base, donor, no_tokenizer, mode="base", donor=1)
    assert by_donor.json(GENERATION)["eos_token_id"] == [NORMAL + 1, NORMAL]


def test_an_end_token_without_a_string_is_noted_by_its_number(tmp_path):
    base = make(tmp_path / "base", [STOP], rows=NORMAL + 3)
    tuned = make(tmp_path / "tuned", rows=NORMAL + 3, form=None, template=A)
    change_json(tuned / GENERATION, eos_token_id=NORMAL + 2)
    (note,) = [note for note in Carried(base, tuned).notes if "generation ends" in note]
    assert f"ends at '<|end|>', {NORMAL + 2}, as in " in note


def test_an_end_token_whose_row_comes_from_another_model_is_found_by_its_string(tmp_path):
    base, tuned = make(tmp_path / "base", [STOP]), make(tmp_path / "tuned", [STOP, END], template=A)
    source = {END: TokenSource(model=str(base), token=STOP, force=True)}
    found = Carried(base, tuned, mode="union", tokens=source)
    assert found.json(GENERATION)["eos_token_id"] == [NORMAL, NORMAL + 1]


def test_an_end_token_at_which_generation_goes_on_is_noted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, ends in [("base", NORMAL), ("tuned", [NORMAL, NORMAL + 2, 5]), ("other", NORMAL + 1)]:
        make(tmp_path / name, [STOP, START, END], template=A)
        change_json(tmp_path / name / GENERATION, eos_token_id=ends)
    notes = [note for note in Carried("base", "tuned", "other").notes if "ends" in note]
    text = "which is not among the tokens at which the result stops. If it talks on, add {} to "
    text += "eos_token_id in generation_config.json, or take its chat template (chat_template)"
    assert notes == [
        f"tuned ends its answers with '<|im_end|>', '&', {text.format(f'{NORMAL + 2}, 5')}",
        f"other ends its answers with '<|im_start|>', {text.format(NORMAL + 1)}",
    ]
    assert [n for n in Carried("base", "tuned", template="tuned").notes if "answers" in n] == []
    assert [n for n in Carried("tuned", "base", "tuned").notes if "answers" in n] == []
    (tmp_path / "other" / JINJA).unlink()
    (note,) = [note for note in Carried("base", "other").notes if "ends" in note]
    assert note.endswith(f"add {NORMAL + 1} to eos_token_id in generation_config.json")


def test_settings_that_no_file_holds_are_written_into_a_new_one(tmp_path):
    base = make(tmp_path / "base", [STOP], form="vocab.json")
    make_old(base)
    (base / CONFIG).unlink()
    tuned = make(tmp_path / "tuned", [STOP, END], form="vocab.json")
    store_template(tuned, "list", A)
    settings = Carried(base, tuned, mode="union").json(CONFIG)
    assert list(settings) == [
        "added_tokens_decoder", "additional_special_tokens", "chat_template", "eos_token",
    ]  # fmt: skip
    assert [template["name"] for template in settings["chat_template"]] == ["default", "tools"]


# What the user is told


def test_generation_configs_and_roles_that_differ_are_noted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "same", "other", "none"):
        make(tmp_path / name, [STOP, "<pad>"])
        change_json(tmp_path / name / CONFIG, eos_token=STOP)
    change_json(tmp_path / "same" / GENERATION, transformers_version="1", top_k=None)
    change_json(tmp_path / "other" / GENERATION, temperature=0.5, eos_token_id=[NORMAL + 1])
    change_json(tmp_path / "other" / CONFIG, eos_token="<pad>", pad_token={"content": "<pad>"})
    (tmp_path / "none" / GENERATION).unlink()
    assert Carried("base", "same", "other", "none").notes == (
        "generation config of base; that of other differs in eos_token_id, temperature",
        "pad_token: base names none; other has '<pad>'",
        "eos_token '<|end|>' of base; other has '<pad>'",
        "generation config of base; none has none",
    )


def test_roles_of_the_old_map_count_where_no_added_tokens_are_listed(tmp_path):
    base, tuned = make(tmp_path / "base", [STOP, END]), make(tmp_path / "tuned", [STOP, END])
    write_json(tuned / SPECIAL_MAP, {"eos_token": STOP})
    (note,) = Carried(base, tuned).notes
    assert note == f"eos_token '<|im_end|>' of {base}; {tuned} has '<|end|>'"
    change_json(tuned / CONFIG, added_tokens_decoder={})
    assert Carried(base, tuned).notes == ()


# What loaders make of it

FORMS = [
    "tokenizer.json",
    "vocab.json",
    "vocab.json, old",
    "tokenizer.model",
    "tokenizer.model, old",
]


def write_form(folder, special, how, **options):
    """A model with a tokenizer in one of `FORMS`."""
    form, _, old = how.partition(", ")
    make(folder, special, form=form, **options)
    if old:
        make_old(folder)
    return folder


def make_it_answer(folder, token_id):
    """Let a model answer with one token, whatever it is asked."""
    tensors = read_tensors(folder)
    tensors["model.embed_tokens.weight"][:, 0] = 5.0
    tensors["lm_head.weight"][:, 0] = 0.0
    tensors["lm_head.weight"][token_id, 0] = 20.0
    save_tensors(folder, tensors, 1)


def answer(folder, text, count):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([tokenizer.encode(text)])
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return found[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("form", FORMS)
def test_a_chat_of_the_tuned_model_is_rendered_encoded_and_ended(tmp_path, form):
    base = write_form(tmp_path / "base", [STOP], form)
    tuned = write_form(tmp_path / "tuned", [STOP, START, END], form, template=TEMPLATE, base=base)
    for folder in (base, tuned):
        make_it_answer(folder, NORMAL)
    make_it_answer(tuned, NORMAL + 2)
    change_json(tuned / GENERATION, eos_token_id=NORMAL + 2)
    change_json(base / GENERATION, temperature=0.5, do_sample=True)
    merge(base, tuned, tmp_path / "out", mode="union")

    own, tokenizer = (AutoTokenizer.from_pretrained(folder) for folder in (tuned, tmp_path / "out"))
    text = rendered(tmp_path / "out", add_generation_prompt=True)
    assert text == rendered(tuned, add_generation_prompt=True)
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    for token, token_id in [(STOP, NORMAL), (START, NORMAL + 1), (END, NORMAL + 2)]:
        assert tokenizer.encode(token, add_special_tokens=False)[-1] == token_id
        assert tokenizer.decode([token_id], skip_special_tokens=True) == ""
    assert tokenizer.encode(text) == own.encode(text)
    assert max(tokenizer.get_vocab().values()) == NORMAL + 2
    assert tokenizer.eos_token == AutoTokenizer.from_pretrained(base).eos_token

    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    first = read_json(base / GENERATION)["eos_token_id"]
    assert (generation.eos_token_id, generation.temperature) == ([first, NORMAL + 2], 0.5)
    assert answer(tmp_path / "out", text, 4) == [NORMAL + 2]
    change_json(tmp_path / "out" / GENERATION, eos_token_id=first)
    assert answer(tmp_path / "out", text, 4) == [NORMAL + 2] * 4


@pytest.mark.parametrize("mode", ["min", "max", "union", "base"])
def test_rows_beyond_the_tokens_change_no_file(tmp_path, mode):
    base = make(tmp_path / "base", [START, END], rows=NORMAL + 20, template=TEMPLATE)
    tuned = make(tmp_path / "tuned", [START, END], rows=NORMAL + 20, template=TEMPLATE)
    merge(base, tuned, tmp_path / "out", mode=mode)
    for name in ("tokenizer.json", CONFIG, GENERATION, JINJA, "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == NORMAL + 2


def merges_as_strings(folder):
    content = read_json(folder / "tokenizer.json")
    model = content["model"]
    model["merges"] = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]
    ]
    write_json(folder / "tokenizer.json", content)


def beside_other_forms(folder):
    write_byte_level(folder, [STOP, TOOL], form="vocab.json")
    write_byte_level(folder, [STOP, TOOL])
    (folder / "tokenizer.model").write_bytes(b"other")


def as_unigram(folder):
    content = read_json(folder / "tokenizer.json")
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    model = {"type": "Unigram", "unk_id": 0, "vocab": [[token, -1.0] for token in tokens]}
    write_json(folder / "tokenizer.json", content | {"model": model})


def unchanged(folder):
    pass


@pytest.mark.parametrize(
    ("form", "change"),
    [
        ("tokenizer.json", unchanged),
        ("tokenizer.json", merges_as_strings),
        ("tokenizer.json", beside_other_forms),
        ("tokenizer.json", as_unigram),
        ("vocab.json", unchanged),
    ],
)
def test_after_a_cut_every_text_is_encoded_within_the_rows(tmp_path, form, change):
    rows = NORMAL - 9
    base = make(tmp_path / "base", [STOP, TOOL], form=form)
    for name in ("config.json", GENERATION):
        change_json(base / name, eos_token_id=2)
    change(base)
    change_json(base / CONFIG, eos_token=None)
    tuned = make(tmp_path / "tuned", rows=rows, form=None, model_type=read_type(base))
    report = merge(base, tuned, tmp_path / "out")
    assert ("tokenizer.model" in report.files_left) == (change is beside_other_forms)

    before, tokenizer = (AutoTokenizer.from_pretrained(f) for f in (base, tmp_path / "out"))
    assert sorted(tokenizer.get_vocab().values()) == list(range(rows))
    differing = 0
    for text in [*TEXT, f"a {TOOL} b{STOP}", "Ünïcödé ☃ \n\t 語"]:
        ids = tokenizer.encode(text)
        assert max(ids) < rows
        assert tokenizer.decode(ids) == text
        differing += ids != before.encode(text)
    assert differing
    for word in TEXT[0].split():
        ids = before.encode(word)
        if max(ids) < rows:  # made by rules that are kept
            assert tokenizer.encode(word) == ids
            assert change is as_unigram or len(ids) < len(word)
    if form == "vocab.json":
        kept = (tmp_path / "out/merges.txt").read_text()
        assert kept.startswith("#version: 0.2\n")
        assert kept in (base / "merges.txt").read_text()[: len(kept) - 1] + "\n"


def read_type(folder):
    return read_json(folder / "config.json")["model_type"]


@pytest.mark.parametrize("form", FORMS)
def test_after_a_cut_of_added_tokens_the_others_stay(tmp_path, form):
    base = write_form(tmp_path / "base", [STOP, TOOL], form)
    for name in ("config.json", GENERATION):
        change_json(base / name, eos_token_id=2)
    for name in (CONFIG, SPECIAL_MAP):
        if (base / name).exists() and "model" not in form:
            change_json(base / name, eos_token=STOP)
    tuned = write_form(tmp_path / "tuned", [STOP], form)
    merge(base, tuned, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode(STOP, add_special_tokens=False)[-1] == NORMAL
    assert max(tokenizer.encode(f"a {TOOL} b")) < NORMAL
    assert len(tokenizer) == NORMAL + 1
