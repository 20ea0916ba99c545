"""Tokens of a folder, read from every form of tokenizer files, as loaders see them."""

import gc
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import (
    NORMAL,
    write_byte_level,
    write_json,
    write_sentencepiece,
)
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import model_tokenizer
from model_errors import ModelCompatibilityError
from model_tokenizer import TokenTable, added_token, has_tokenizer, read_tokens, signature

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(tmp_path):
    """An empty model folder."""
    path = tmp_path / "m"
    path.mkdir()
    return path


def write_model(folder, model, added=(), **rest):
    """A tokenizer.json; `added` are tokens, or pairs of id and token."""
    entries = [entry if isinstance(entry, tuple) else (0, entry) for entry in added]
    listed = [{"id": i, "content": token, **FLAGS, "special": True} for i, token in entries]
    write_json(folder / "tokenizer.json", {"added_tokens": listed, "model": model, **rest})


def word_level(*words):
    return {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}}


def tokens_of(folder):
    found = read_tokens(folder, "m")
    assert found.ids == {token: token_id for token_id, token in found.tokens.items()}
    assert found.length == max(found.tokens, default=-1) + 1
    assert all(found.tokens[entry["id"]] == token for token, entry in found.added.items())
    return dict(found.tokens)


# Forms


def test_a_folder_without_tokenizer_files_has_no_tokens(folder):
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>"})
    write_json(folder / "added_tokens.json", {"<s>": 0})
    (folder / "merges.txt").write_text("a b\n")
    assert (has_tokenizer(folder), signature(folder, "m"), read_tokens(folder, "m")) == (
        False,
        None,
        None,
    )


def test_a_mapping_of_words_is_read(folder):
    write_model(folder, word_level("a", "b"), ["b", (2, "<s>")])
    assert tokens_of(folder) == {0: "a", 1: "b", 2: "<s>"}
    found = read_tokens(folder, "m")
    assert found.added == {
        "b": {"id": 1, "content": "b", **FLAGS, "special": True},
        "<s>": {"id": 2, "content": "<s>", **FLAGS, "special": True},
    }
    assert found.merges is None


def test_a_list_of_pieces_with_scores_is_read(folder):
    write_model(folder, {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.5]]}, ["<s>"])
    assert tokens_of(folder) == {0: "<unk>", 1: "a", 2: "<s>"}


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json", "tokenizer.model"])
def test_every_form_is_read_as_transformers_loads_it(folder, form):
    if form == "tokenizer.model":
        write_sentencepiece(folder, ["<|a|>", "<|b|>"])
    else:
        write_byte_level(folder, ["<|a|>", "<|endoftext|>"], ["brown"], form=form)
    write_json(folder / "config.json", {"model_type": "llama"})
    loaded = AutoTokenizer.from_pretrained(folder)
    assert {token: token_id for token_id, token in tokens_of(folder).items()} == loaded.get_vocab()
    special = {token for token, entry in read_tokens(folder, "m").added.items() if entry["special"]}
    decoder = loaded.added_tokens_decoder.values()
    assert special == {token.content for token in decoder if token.special}


def test_both_forms_of_byte_level_files_have_the_same_merge_rules(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_byte_level(folder, ["<|a|>"])
    write_byte_level(other, ["<|a|>"], form="vocab.json")
    first, second = read_tokens(folder, "m"), read_tokens(other, "other")
    assert (first.tokens, first.merges, first.added) == (second.tokens, second.merges, second.added)
    assert first.merges is not None
    assert (first.splitting is None, second.splitting) == (False, None)


def test_control_pieces_count_as_special_added_tokens(folder):
    write_sentencepiece(folder)
    found = read_tokens(folder, "m")
    assert {token: entry["id"] for token, entry in found.added.items()} == {
        "<unk>": 0, "<s>": 1, "</s>": 2,
    }  # fmt: skip
    assert all(entry["special"] for entry in found.added.values())
    assert (found.length, found.splitting, found.merges) == (NORMAL, None, None)


@pytest.mark.parametrize("first", ["tokenizer.json", "tokenizer.model"])
def test_of_several_forms_the_first_counts(folder, first):
    write_json(folder / "vocab.json", {"other": 0})
    if first == "tokenizer.json":
        (folder / "tokenizer.model").write_bytes(b"not read")
        write_model(folder, word_level("a"))
        assert tokens_of(folder) == {0: "a"}
    else:
        write_sentencepiece(folder)
        assert len(tokens_of(folder)) == NORMAL


def test_a_vocab_json_may_stand_alone(folder):
    write_json(folder / "vocab.json", {"b": 1, "a": 0})
    assert tokens_of(folder) == {0: "a", 1: "b"}
    assert read_tokens(folder, "m").merges is None


# Added tokens in other files


def decoder(**tokens):
    """`added_tokens_decoder` of tokens by id, written x7 for 7."""
    return {"added_tokens_decoder": {
        key[1:]: {"content": token, "special": True, "lstrip": True}
        for key, token in tokens.items()
    }}  # fmt: skip


def test_added_tokens_stand_beside_in_the_order_of_their_ids(folder):
    write_json(folder / "vocab.json", {"a": 0, "b": 1})
    write_json(folder / "tokenizer_config.json", decoder(x10="<t>", x2="<s>"))
    assert tokens_of(folder) == {0: "a", 1: "b", 2: "<s>", 3: "<t>"}
    entry = read_tokens(folder, "m").added["<s>"]
    assert entry == {"id": 2, "content": "<s>", **FLAGS, "lstrip": True, "special": True}


def test_a_tokenizer_json_comes_before_what_stands_beside_it(folder):
    write_model(folder, word_level("a"), [(1, "<s>")])
    write_json(folder / "tokenizer_config.json", decoder(x1="<t>", x0="<s>"))
    assert tokens_of(folder) == {0: "a", 1: "<s>", 2: "<t>"}
    assert read_tokens(folder, "m").added["<s>"]["lstrip"] is False


def test_added_tokens_json_counts_only_without_a_decoder(folder):
    write_json(folder / "vocab.json", {"a": 0})
    write_json(folder / "added_tokens.json", {"<t>": 2, "<s>": 1})
    assert tokens_of(folder) == {0: "a", 1: "<s>", 2: "<t>"}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": None})
    assert tokens_of(folder) == {0: "a", 1: "<s>", 2: "<t>"}
    write_json(folder / "tokenizer_config.json", decoder(x1="<u>"))
    assert tokens_of(folder) == {0: "a", 1: "<u>"}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": {}})
    assert tokens_of(folder) == {0: "a"}


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    "named",
    [
        {"eos_token": "<s>"},
        {"eos_token": {"content": "<s>"}},
        {"additional_special_tokens": ["<x>", {"content": "<s>"}]},
        {"extra_special_tokens": ["<s>"]},
    ],
)
def test_a_token_of_added_tokens_json_is_special_if_a_file_says_so(folder, file, named):
    write_json(folder / "vocab.json", {"a": 0})
    write_json(folder / "added_tokens.json", {"<s>": 1, "<t>": 2})
    write_json(folder / file, named | {"pad_token": None, "model_max_length": 8})
    added = read_tokens(folder, "m").added
    assert {token: entry["special"] for token, entry in added.items()} == {
        "<s>": True, "<t>": False,
    }  # fmt: skip
    assert {token: entry["normalized"] for token, entry in added.items()} == {
        "<s>": False, "<t>": True,
    }  # fmt: skip


# Ids that loaders give


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 8), min_size=1),
    st.lists(
        st.tuples(st.integers(0, 12), st.sampled_from([*"abc", "", "<p>", "<q>", "<r>"])),
        unique_by=lambda entry: entry[1],
    ),
)
def test_added_tokens_have_the_ids_that_the_tokenizers_library_gives_them(vocab, added):
    vocab = {token: token_id for token_id, token in {i: t for t, i in vocab.items()}.items()}
    content = {
        "version": "1.0", "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "a"},
        "added_tokens": [{"id": i, "content": t, **FLAGS, "special": True} for i, t in added],
    }  # fmt: skip
    loaded = Tokenizer.from_str(json.dumps(content))
    found = model_tokenizer._from_json(content, [])
    assert {token: entry["id"] for token, entry in found.added.items()} == {
        token: loaded.token_to_id(token) for _, token in added if token
    }
    assert found.tokens == {
        token_id: loaded.id_to_token(token_id) for token_id in loaded.get_vocab().values()
    }


@pytest.mark.parametrize("form", ["vocab.json", "tokenizer.model"])
def test_ids_beside_the_normal_tokens_count_only_by_their_order(folder, form):
    if form == "tokenizer.model":
        write_sentencepiece(folder)
        normal, number = "</s>", 2
    else:
        write_byte_level(folder, [], form=form)
        normal, number = "!", 0
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    listed = decoder(x309="<q>", x305="<p>", x5="<o>", x400=normal)
    write_json(folder / "tokenizer_config.json", settings | listed)
    write_json(folder / "config.json", {"model_type": "llama"})
    vocab = AutoTokenizer.from_pretrained(folder).get_vocab()
    ids = read_tokens(folder, "m").ids
    expected = {"<o>": NORMAL, "<p>": NORMAL + 1, "<q>": NORMAL + 2, normal: number}
    assert {token: ids[token] for token in expected} == expected
    assert {token: vocab[token] for token in expected} == expected


def test_an_added_token_with_the_id_of_a_normal_one_counts(folder):
    write_model(folder, {"type": "WordLevel", "vocab": {"a": 0, "b": 2}}, ["<s>"])
    assert tokens_of(folder) == {0: "a", 2: "<s>"}  # numbered on from two normal tokens


# How text is cut


def test_splitting_is_what_decides_how_text_is_cut(folder, tmp_path):
    write_model(folder, word_level("a"), normalizer={"type": "NFC"}, post_processor={"type": "X"})
    first = read_tokens(folder, "m").splitting
    assert json.loads(first) == {
        "model type": "WordLevel", "byte_fallback": False, "normalizer": {"type": "NFC"},
        "pre_tokenizer": None,
    }  # fmt: skip
    write_model(folder, word_level("b"), normalizer={"type": "NFC"}, decoder={"type": "Y"})
    assert read_tokens(folder, "m").splitting == first
    for other in ({"normalizer": None}, {"pre_tokenizer": {"type": "Whitespace"}}):
        write_model(folder, word_level("a"), **{"normalizer": {"type": "NFC"}} | other)
        assert read_tokens(folder, "m").splitting != first
    write_model(folder, {"vocab": {"a": 0}, "byte_fallback": True})
    assert json.loads(read_tokens(folder, "m").splitting)["model type"] == "BPE"


def test_merge_rules_are_the_same_in_either_spelling(folder):
    digests = []
    for merges in (["a b", "ab c"], [["a", "b"], ["ab", "c"]], [["ab", "c"], ["a", "b"]], [], None):
        write_model(folder, {"vocab": {"a": 0}, "merges": merges})
        digests.append(read_tokens(folder, "m").merges)
    assert digests[0] == digests[1] != digests[2]
    assert digests[3:] == [None, None]


def test_a_merges_txt_is_read_without_its_first_line_and_in_any_line_endings(folder):
    write_json(folder / "vocab.json", {"a": 0})
    digests = []
    for text in ("#version: 0.2\na b\nab c\n", "a b\r\nab c", "ab c\na b\n"):
        (folder / "merges.txt").write_bytes(text.encode())
        digests.append(read_tokens(folder, "m").merges)
    assert digests[0] == digests[1] != digests[2]


# One table for equal files


def test_folders_with_equal_files_share_one_table_as_long_as_it_is_used(folder, tmp_path):
    other = tmp_path / "n"
    other.mkdir()
    for path in (folder, other):
        write_byte_level(path, ["<|a|>"])
    first = read_tokens(folder, "m")
    assert read_tokens(other, "n") is first
    key = signature(folder, "m")
    assert key in model_tokenizer._tables
    del first
    gc.collect()
    assert key not in model_tokenizer._tables


@pytest.mark.parametrize(
    "file",
    [
        *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"),
        *("tokenizer_config.json", "special_tokens_map.json"),
    ],
)
def test_the_signature_covers_every_file_that_is_read(folder, file):
    write_json(folder / "vocab.json", {"a": 0})
    before = signature(folder, "m")
    (folder / file).write_text('{"b": 0}')
    assert signature(folder, "m") != before
    (folder / file).rename(folder / "other.json")
    if file != "vocab.json":
        assert signature(folder, "m") == before


def test_what_no_token_depends_on_leaves_the_signature_alone(folder):
    write_byte_level(folder, ["<|a|>"])
    before = signature(folder, "m")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    write_json(folder / "generation_config.json", {})
    assert signature(folder, "m") == before


# Broken files

DECODER = "added_tokens_decoder"


def json_text(**content):
    return json.dumps({"model": {"vocab": {"a": 0}}} | content)


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("tokenizer.json", "{", "tokenizer.json is no JSON object: Expecting property name"),
        ("tokenizer.json", "[" * 100_000, "tokenizer.json is no JSON object: "),
        ("tokenizer.json", "\udcff", "tokenizer.json is no JSON object: 'utf-8' codec"),
        ("tokenizer.json", "[]", "tokenizer.json is no JSON object"),
        ("tokenizer.json", "{}", "tokenizer.json holds no model with a vocab"),
        ("tokenizer.json", '{"model": []}', "tokenizer.json holds no model with a vocab"),
        ("tokenizer.json", '{"model": {}}', "tokenizer.json holds no model with a vocab"),
        (
            "tokenizer.json",
            json_text(model={"vocab": "ab"}),
            "the vocab in tokenizer.json is neither a list nor a JSON object",
        ),
        (
            "tokenizer.json",
            json_text(model={"vocab": {"a": -1}}),
            "tokenizer.json holds the token 'a' with the id -1",
        ),
        (
            "tokenizer.json",
            json_text(model={"vocab": {"a": True}}),
            "tokenizer.json holds the token 'a' with the id True",
        ),
        (
            "tokenizer.json",
            json_text(model={"vocab": [["a", 0.5], []]}),
            "tokenizer.json holds the token [] with the id 1",
        ),
        (
            "tokenizer.json",
            json_text(model={"vocab": [["a", 0.5], {"b": 1}]}),
            "tokenizer.json holds the token {'b': 1} with the id 1",
        ),
        (
            "tokenizer.json",
            json_text(model={"vocab": {"a": 0}, "merges": "a b"}),
            "the merges in tokenizer.json are no list",
        ),
        (
            "tokenizer.json",
            json_text(model={"vocab": {"a": 0}, "merges": ["a b", ["a", 1]]}),
            "tokenizer.json holds the merge rule ['a', 1]",
        ),
        (
            "tokenizer.json",
            json_text(added_tokens={"a": 0}),
            "added_tokens in tokenizer.json is no list",
        ),
        *(
            (
                "tokenizer.json",
                json_text(added_tokens=[entry]),
                f"tokenizer.json lists the added token {entry!r}, without an id or a content",
            )
            for entry in ("a", {"id": 1}, {"content": "a"}, {"id": "1", "content": "a"})
        ),
        ("tokenizer.model", "pieces", "tokenizer.model is no SentencePiece model"),
        ("tokenizer.model", "", "tokenizer.model is no SentencePiece model"),
        ("vocab.json", "[]", "vocab.json is no JSON object"),
        ("vocab.json", '{"a": "0"}', "vocab.json holds the token 'a' with the id '0'"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json is no JSON object"),
        (
            "tokenizer_config.json",
            json.dumps({DECODER: [1]}),
            f"{DECODER} in tokenizer_config.json is no JSON object",
        ),
        (
            "tokenizer_config.json",
            json.dumps({DECODER: {"x": {"content": "a"}}}),
            "tokenizer_config.json lists the added token {'content': 'a', 'id': 'x'}, without an "
            "id or a content",
        ),
        (
            "tokenizer_config.json",
            json.dumps({DECODER: {"1": "a"}}),
            "tokenizer_config.json lists the added token 'a', without an id or a content",
        ),
        ("added_tokens.json", "{", "added_tokens.json is no JSON object"),
        (
            "added_tokens.json",
            '{"a": 1.0}',
            "added_tokens.json lists the added token {'id': 1.0, 'content': 'a'}, without",
        ),
        ("merges.txt", "\udcff", "merges.txt is no text: 'utf-8' codec"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(folder, file, text, problem):
    if file not in ("tokenizer.json", "tokenizer.model"):
        write_json(folder / "vocab.json", {"a": 0})
    (folder / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    if file == "added_tokens.json":
        write_json(folder / "special_tokens_map.json", {})
    with pytest.raises(ModelCompatibilityError) as caught:
        read_tokens(folder, "models/m")
    assert str(caught.value).startswith(f"models/m: {problem}")
    assert str(caught.value).endswith(". Download the model again")


def test_a_long_entry_is_cut_in_the_text(folder):
    (folder / "tokenizer.json").write_text(json_text(added_tokens=["x" * 1000]))
    with pytest.raises(ModelCompatibilityError) as caught:
        read_tokens(folder, "m")
    assert len(str(caught.value)) < 200


def test_half_a_surrogate_pair_is_a_token_like_any_other(folder):
    model = {"vocab": {"\ud83d": 0}, "merges": [["\ud83d", "\ude00"]]}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model}))
    assert tokens_of(folder) == {0: "\ud83d"}


def test_without_the_package_sentencepiece_its_models_cannot_be_read(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    write_byte_level(folder, [])
    (folder / "tokenizer.model").write_bytes(b"not read")
    assert len(tokens_of(folder)) == NORMAL  # tokenizer.json is enough
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelCompatibilityError) as caught:
        read_tokens(folder, "m")
    assert str(caught.value) == (
        "m: without a tokenizer.json beside it, a tokenizer.model is read with the package "
        "sentencepiece. Install it: pip install sentencepiece"
    )
    assert isinstance(caught.value.__cause__, ImportError)


# Values


def test_an_added_token_has_all_flags():
    assert added_token(3, "<s>", {"special": True, "rstrip": 1, "other": True}) == {
        "id": 3, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": True,
        "normalized": False, "special": True,
    }  # fmt: skip


def test_an_empty_tokenizer_has_length_zero():
    assert (TokenTable({}, {}).length, TokenTable({}, {}).ids) == (0, {})
