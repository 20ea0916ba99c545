"""What the check of a finished folder finds, and that it leaves sound folders alone."""

import errno
import json
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import make_llama, read_tensors, save_tensors, write_json

import model_utils
import model_verify
from model_utils import ModelFolder
from model_verify import verify_folder

ROOT = Path(__file__).resolve().parent.parent
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DOWN, NORM = "model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight"
CONFIG, GENERATION, INDEX = "config.json", "generation_config.json", "model.safetensors.index.json"
NO_MANIFEST = "there is no merge_manifest.json, so no file was compared with what a merge wrote"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TOKENS_MAP = "special_tokens_map.json"
ROWS = f"expected a whole number from 0 to 47, the rows of {EMBEDDING} (or null)"
BROKEN = "expected finite weights. The model is broken; use another copy, or merge again"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    """So that problems call a model "a", not by a long path."""
    monkeypatch.chdir(tmp_path)


def folder(name="a", **options):
    return make_llama(Path(name), **options)


def problems(path="a", **options):
    return list(verify_folder(path, **options).problems)


def edit(file, **changes):
    """Set values of a JSON file of the model "a"; `...` takes one out."""
    path = Path("a", file)
    content = (json.loads(path.read_text()) if path.exists() else {}) | changes
    write_json(path, {key: value for key, value in content.items() if value is not ...})


def spoil(values, name="a"):
    """Set values of a model's tensors: by tensor, then by place (`...` is everywhere)."""
    tensors = read_tensors(Path(name))
    for tensor, places in values.items():
        for place, value in places.items():
            tensors[tensor][place] = value
    save_tensors(Path(name), tensors, 1)


# Sound folders


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_each_type_is_sound(model_type, tied):
    assert problems(folder(model_type=model_type, tied=tied, tokenizer=True)) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_dtype_and_sharding_is_sound(dtype, shards):
    assert problems(folder(dtype=dtype, shards=shards)) == []


@pytest.mark.parametrize("name", ["base", "animals", "capitals", "elements", "french", "german"])
def test_the_shipped_examples_are_sound(name):
    assert problems(ROOT / "examples" / "tiny_llamas" / name) == []


def test_what_was_found_is_counted():
    folder(dtype="float16", tokenizer=True, shards=2)
    found = verify_folder("a")
    tensors = read_tensors(Path("a"))
    assert (found.label, found.tensors, found.dtypes) == ("a", 21, ("float16",))
    assert (found.vocab_rows, found.tokens) == (48, 48)
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert found.bytes == 2 * found.parameters
    assert (found.read_weights, found.problems, found.notes) == (True, (), (NO_MANIFEST,))
    assert json.loads(json.dumps(found.to_dict()))["dtypes"] == ["float16"]
    assert verify_folder(Path("a"), read_weights=False).to_dict() == found.to_dict() | {
        "read_weights": False,
        "notes": (),
    }


def test_the_summary_says_it_in_a_few_lines():
    folder(extra={NORM: torch.full((32,), torch.nan)})
    assert verify_folder("a", read_weights=False).summary().splitlines() == [
        "a: sound",
        "21 tensors, bfloat16 and float32, 20,128 parameters, 40,320 bytes",
        "vocabulary: 48 rows, no tokenizer",
        "values: not read",
        "note: no tokenizer: there is none of tokenizer.json, tokenizer.model, vocab.json",
    ]
    edit(CONFIG, bos_token_id=48)
    lines = verify_folder("a").summary().splitlines()
    assert (lines[0], lines[3]) == ("a: 2 problems", "values: all read")
    assert lines[4].startswith("problem: a: bos_token_id in config.json is 48")
    assert lines[5].startswith(f"problem: a: {NORM} has 32 NaN")
    assert lines[6].startswith("note: no tokenizer")
    assert lines[7:] == [f"note: {NO_MANIFEST}"]
    lines = verify_folder("b").summary().splitlines()
    assert lines == ["b: 1 problem", "problem: b: no such folder. Check the path"]


# Files


def test_a_name_that_is_no_folder_is_not_asked_for_on_the_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert problems("org/name") == ["org/name: no such folder. Check the path"]


def test_what_cannot_be_found_or_opened_is_a_problem():
    Path("empty").mkdir()
    assert problems("empty")[0].startswith("empty: no config.json in this folder")
    assert problems("")[0].startswith("a model's name is empty")
    folder(shards=3)
    Path("a", "model-00002-of-00003.safetensors").unlink()
    assert problems() == [
        "a: 1 of 3 weight files are missing (model-00002-of-00003.safetensors). "
        "Download the model again"
    ]
    assert verify_folder("a").tensors == 0


def test_a_file_cut_off_and_what_is_wrong_beside_it_are_said_together():
    path = folder(tokenizer=True) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    edit(TOKENIZER_CONFIG, pad_token="<pad>")
    Path("a", GENERATION).write_text("[]")
    found = verify_folder("a")
    assert (found.tensors, found.vocab_rows, found.tokens) == (0, None, 48)
    assert found.read_weights is False
    assert len(found.problems) == 3
    assert found.problems[0].startswith("a/model.safetensors: the safetensors header is corrupt")
    assert found.problems[1].startswith(f"a: {GENERATION} is not a valid JSON object")
    assert found.problems[2].startswith("a: pad_token '<pad>' in tokenizer_config.json")


def test_a_disk_that_fails_is_not_a_problem_of_the_model(monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "input/output error")

    folder()
    monkeypatch.setattr(model_utils.os, "preadv", fail)
    with pytest.raises(OSError, match=r"nput/output error: .a/model\.safetensors"):
        verify_folder("a")
    assert problems(read_weights=False) == []


@pytest.mark.parametrize("metadata", [..., None, [], "text"])
def test_an_index_must_have_metadata(metadata):
    folder(shards=2)
    edit(INDEX, metadata=metadata)
    got = None if metadata is ... else metadata
    assert problems() == [
        f"a: metadata in {INDEX} is {got!r}, expected an object; transformers cannot load the "
        'model. Add "metadata": {"total_size": <bytes of all tensors>}'
    ]


def test_an_index_that_is_broken_is_said_once_and_one_that_is_not_used_is_not_read():
    folder(shards=2)
    Path("a", INDEX).write_text("{")
    (problem,) = problems()
    assert problem.startswith(f"a: {INDEX} is not a safetensors index")
    Path("a", INDEX).write_text("{}")
    save_tensors(Path("a"), read_tensors(folder("b")), 1)
    assert problems() == []


# config.json and the tensors


def test_shapes_that_are_not_those_of_config_json_are_a_problem():
    folder(config_changes={"intermediate_size": 64})
    (problem,) = problems()
    assert problem.startswith(
        "a: shapes are not those of config.json: model.layers.0.mlp.gate_proj"
    )


def test_a_head_that_is_missing_is_a_problem():
    (problem,) = problems(folder(drop=[HEAD]))
    assert problem.startswith(f"a: 1 tensor ({HEAD}) missing")


def test_a_tied_model_must_not_store_a_head():
    folder()
    edit(CONFIG, tie_word_embeddings=True)
    assert problems() == [
        f"a: tie_word_embeddings in config.json is true, but {HEAD} is stored; some loaders ignore "
        "it and some use it. Set it to false, or leave the tensor out"
    ]


def test_a_tie_that_is_neither_true_nor_false_is_said_once():
    folder()
    edit(CONFIG, tie_word_embeddings="false")
    (problem,) = problems()
    assert problem.startswith("a: tie_word_embeddings in config.json must be true or false")


@pytest.mark.parametrize(
    "said",
    [
        {"torch_dtype": "bfloat16", "dtype": "bfloat16"},
        {"torch_dtype": ..., "dtype": "bfloat16"},
        {"torch_dtype": None, "dtype": "bfloat16"},
        {"torch_dtype": ...},
    ],
)
def test_a_dtype_that_is_that_of_the_tensors_under_either_key_is_sound(said):
    folder()
    edit(CONFIG, **said)
    assert problems() == []


@pytest.mark.parametrize("value", ["float16", "torch.bfloat16", "auto", 16, ["bfloat16"]])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_that_no_tensor_has_is_a_problem(key, value):
    folder()
    edit(CONFIG, **({"torch_dtype": ...} | {key: value}))
    assert problems() == [
        f"a: {key} in config.json is {value!r}, but the tensors are bfloat16; "
        "loaders would convert them. Set it to 'bfloat16'"
    ]


def test_two_dtypes_in_one_config_are_a_problem():
    folder(extra={NORM: torch.ones(32)})
    edit(CONFIG, dtype="float32")
    assert problems() == [
        "a: dtype 'float32' and torch_dtype 'bfloat16' in config.json differ; loaders take one or "
        "the other. Set both to the dtype of the tensors"
    ]


def test_of_a_mixture_one_tensor_must_have_the_dtype_of_the_config():
    folder(extra={NORM: torch.ones(32)})
    assert problems() == []
    edit(CONFIG, torch_dtype="float16")
    (problem,) = problems()
    assert problem.startswith("a: torch_dtype in config.json is 'float16', but the tensors are ")
    assert "are float32 and bfloat16; loaders" in problem


def test_stored_rotary_frequencies_do_not_decide_on_the_dtype():
    folder(extra={"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    edit(CONFIG, torch_dtype="float32")
    (problem,) = problems()
    assert problem.startswith("a: torch_dtype in config.json is 'float32', but the tensors are bf")


def test_tensors_of_no_dtype_that_can_be_merged_are_said_once():
    tensors = read_tensors(folder())
    save_tensors(Path("a"), {name: tensor.double() for name, tensor in tensors.items()}, 1)
    found = verify_folder("a")
    (problem,) = found.problems
    assert problem.startswith("a: weights are stored as F64")
    assert found.dtypes == ("F64",)


# Vocabulary


@pytest.mark.parametrize(
    ("rows", "shown"),
    [
        (47, "1 token (47 'B') beyond the 47 rows"),
        (43, "5 tokens (43 '7', 44 '8', 45 '9', ...) beyond the 43 rows"),
    ],
)
def test_a_token_without_a_row_is_a_problem(rows, shown):
    folder("b", vocab_size=48, tokenizer=True)
    folder(vocab_size=rows)
    Path("a", TOKENIZER).write_bytes(Path("b", TOKENIZER).read_bytes())
    assert problems() == [
        f"a: its tokenizer has {shown} of {EMBEDDING}; text with them would fail. "
        "Use the tokenizer that belongs to these weights"
    ]


def test_rows_without_a_token_are_padding():
    folder("b", vocab_size=40, tokenizer=True)
    folder()
    Path("a", TOKENIZER).write_bytes(Path("b", TOKENIZER).read_bytes())
    found = verify_folder("a")
    assert (found.vocab_rows, found.tokens, found.problems) == (48, 40, ())


def test_added_tokens_count_wherever_they_stand():
    folder(tokenizer=True)
    edit(TOKENIZER_CONFIG, added_tokens_decoder={"48": {"content": "<pad>"}}, pad_token="<pad>")
    (problem,) = problems()
    assert problem.startswith("a: its tokenizer has 1 token (48 '<pad>') beyond the 48 rows")


@pytest.mark.parametrize("value", [0, 47, [0, 47], [], None, -1])
@pytest.mark.parametrize("file", [CONFIG, GENERATION])
def test_special_ids_that_have_a_row_or_say_none_are_sound(file, value):
    folder()
    edit(file, eos_token_id=value, pad_token_id=value, decoder_start_token_id=value)
    assert problems() == []


@pytest.mark.parametrize("value", [-2, 1.0, "1", True, {"id": 1}, [[1]], 48])
@pytest.mark.parametrize("key", ["pad_token_id", "forced_bos_token_id"])
@pytest.mark.parametrize("file", [CONFIG, GENERATION])
def test_a_special_id_without_a_row_is_a_problem(file, key, value):
    folder()
    edit(file, **{key: value})
    expected = "expected a whole number from 0 on, a list of them or null"
    assert problems() == [
        f"a: {key} in {file} is {value!r}, {ROWS if value == 48 else expected}. "
        "Set it to the id of that token"
    ]


def test_of_a_list_of_special_ids_those_without_a_row_are_named():
    folder()
    edit(GENERATION, eos_token_id=[2, 48, 47, 99])
    assert [problem.split(",")[0] for problem in problems()] == [
        f"a: eos_token_id in {GENERATION} is {token_id}" for token_id in (48, 99)
    ]


@pytest.mark.parametrize("value", ["a", {"content": "<unk>", "lstrip": False}, None, "", ...])
@pytest.mark.parametrize("file", [TOKENIZER_CONFIG, TOKENS_MAP])
def test_a_special_token_that_is_a_token_or_none_is_sound(file, value):
    folder(tokenizer=True)
    edit(file, pad_token=value, eos_token=value)
    assert problems() == []


@pytest.mark.parametrize("value", ["[PAD]", {"content": "[PAD]"}])
@pytest.mark.parametrize("key", ["bos_token", "eos_token", "pad_token", "unk_token"])
@pytest.mark.parametrize("file", [TOKENIZER_CONFIG, TOKENS_MAP])
def test_a_special_token_that_the_tokenizer_lacks_is_a_problem(file, key, value):
    folder(tokenizer=True)
    edit(file, **{key: value})
    assert problems() == [
        f"a: {key} {value!r} in {file} is not a token of its tokenizer; loaders would give it an "
        "id without a row. Name one of the tokens, or null"
    ]


@pytest.mark.parametrize("value", [3, ["<s>"], {"lstrip": True}, {"content": 3}])
def test_a_special_token_that_is_no_string_is_a_problem(value):
    folder(tokenizer=True)
    edit(TOKENIZER_CONFIG, eos_token=value)
    assert problems() == [
        f"a: eos_token {value!r} in {TOKENIZER_CONFIG} is neither a string nor an object with a "
        'string "content". Name one of the tokens, or null'
    ]


@pytest.mark.parametrize("text", ["[]", "{", '"a"', "[" * 100_000])
@pytest.mark.parametrize("file", [GENERATION, TOKENIZER_CONFIG, TOKENS_MAP])
def test_files_beside_the_weights_must_be_json_objects(file, text):
    folder(tokenizer=True)
    Path("a", file).write_text(text)
    (problem,) = problems()
    assert problem.startswith(f"a: {file} is not a valid JSON object (")
    assert problem.endswith("). Save or download it again")


def test_a_file_that_is_no_text_is_a_problem():
    folder(tokenizer=True)
    Path("a", GENERATION).write_bytes(b'{"a": "\xff"}')
    (problem,) = problems()
    assert problem.startswith(f"a: {GENERATION} is not a valid JSON object ('utf-8' codec")


def test_a_tokenizer_that_cannot_be_read_is_a_problem():
    folder(tokenizer=True)
    Path("a", TOKENIZER).write_text("{}")
    found = verify_folder("a")
    (problem,) = found.problems
    assert problem.startswith("a: tokenizer.json holds no model with a vocab")
    assert (found.tokens, found.notes) == (None, (NO_MANIFEST,))


def test_a_package_that_is_not_installed_is_not_a_problem_of_the_model(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    Path(folder(), "tokenizer.model").write_bytes(b"pieces")
    found = verify_folder("a")
    note, _ = found.notes
    assert (found.tokens, found.problems) == (None, ())
    assert "pip install sentencepiece" in note
    assert f"\nnote: {note}\n" in found.summary()


# Values


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_value_that_is_not_finite_is_found_in_the_last_row_of_the_last_tensor(dtype, value):
    folder(dtype=dtype)
    spoil({HEAD: {(47, 31): value}})
    assert problems() == [
        f"a: {HEAD} has 1 NaN or infinite value, at row 47, column 31 ({value}); {BROKEN}"
    ]
    assert problems(read_weights=False) == []


@pytest.mark.parametrize("block_elements", [1, 100, 2**18])
@pytest.mark.parametrize("threads", [1, 4])
def test_neither_blocks_nor_threads_change_what_is_found(monkeypatch, block_elements, threads):
    monkeypatch.setattr(model_verify, "BLOCK_ELEMENTS", block_elements)
    folder()
    nan, inf = torch.nan, torch.inf
    spoil(
        {
            DOWN: {(31, 55): nan, (9, 3): inf, (9, 2): -inf, (30, 0): nan},
            NORM: {7: nan},
            EMBEDDING: {(0, 0): inf},
        }
    )
    assert problems(threads=threads) == [
        f"a: {EMBEDDING} has 1 NaN or infinite value, at row 0, column 0 (inf); {BROKEN}",
        f"a: {NORM} has 1 NaN or infinite value, at row 0, column 7 (nan); {BROKEN}",
        f"a: {DOWN} has 4 NaN or infinite values, the first at row 9, column 2 (-inf); {BROKEN}",
    ]


def test_tensors_are_looked_at_in_the_order_of_the_layers():
    folder(layers=11)
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(11)]
    spoil({name: {(1, 1): torch.nan} for name in names} | {"model.norm.weight": {0: torch.nan}})
    found = [problem.split()[1] for problem in problems(threads=2)]
    assert found == [*names, "model.norm.weight"]


def test_large_values_whose_sum_is_not_finite_are_sound():
    folder(dtype="float32")
    spoil({DOWN: {...: torch.finfo(torch.float32).max}})
    assert problems() == []


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_an_embedding_or_a_head_of_zeros_is_a_problem(monkeypatch, name):
    monkeypatch.setattr(model_verify, "BLOCK_ELEMENTS", 100)
    folder()
    spoil({name: {...: 0.0}, NORM: {...: 0.0}})
    assert problems() == [
        f"a: {name} is zero throughout; the model cannot tell tokens apart. "
        "Use another copy, or merge again"
    ]
    spoil({name: {(47, 31): 1e-30}})
    assert problems() == []


def test_no_more_than_a_block_is_read_at_once_and_everything_is_read_once(monkeypatch):
    read, told = [], []

    def read_rows(self, name, first, stop, buffer):
        rows = plain(self, name, first, stop, buffer)
        read.append((name, rows.size, len(buffer)))
        return rows

    def on_bytes(count):
        told.append((count, threading.get_ident()))

    plain = ModelFolder.read_rows
    monkeypatch.setattr(ModelFolder, "read_rows", read_rows)
    monkeypatch.setattr(model_verify, "BLOCK_ELEMENTS", 100)
    folder(hidden_size=32, intermediate_size=128)
    found = verify_folder("a", threads=3, on_bytes=on_bytes)
    assert found.problems == ()
    assert sum(count for _, count, _ in read) == found.parameters
    assert max(count for name, count, _ in read if name == DOWN) == 128  # a row
    assert max(count for name, count, _ in read if name == EMBEDDING) == 96  # three rows of 32
    assert max(size for _, _, size in read) == 2 * 128  # bytes of a thread's memory
    assert sum(count for count, _ in told) == found.bytes
    assert {thread for _, thread in told} == {threading.get_ident()}


def test_tensors_without_elements_and_of_other_dtypes_are_not_looked_at():
    told = []
    folder(extra={"z": torch.ones(0, 3), "y": torch.ones(3, 0), "x": torch.ones(3).double()})
    found = verify_folder("a", on_bytes=told.append)
    (problem,) = found.problems
    assert problem.startswith("a: not a LLaMA-family causal language model")
    assert sum(told) == found.bytes - 3 * 8
    assert 0 not in told


def test_blocks_are_looked_at_by_as_many_threads_as_asked_for(monkeypatch):
    together = threading.Barrier(3)

    def read_rows(self, name, first, stop, buffer):
        if name == EMBEDDING:  # 48 blocks, so that three threads always meet
            together.wait(timeout=60)
        return plain(self, name, first, stop, buffer)

    plain = ModelFolder.read_rows
    monkeypatch.setattr(ModelFolder, "read_rows", read_rows)
    monkeypatch.setattr(model_verify, "BLOCK_ELEMENTS", 1)
    assert problems(folder(), threads=3) == []


def test_a_file_that_becomes_shorter_is_a_problem_and_ends_the_reading():
    path = folder() / "model.safetensors"
    size = path.stat().st_size
    spoil({EMBEDDING: {(3, 4): torch.nan}})
    first, second = problems(on_bytes=lambda _: os.truncate(path, size // 2))
    assert first.startswith(f"a: {EMBEDDING} has 1 NaN")
    assert "ends early: the file changed" in second


# All at once


def test_everything_that_is_wrong_is_said_at_once():
    folder(tokenizer=True, shards=2)
    tensors = read_tensors(Path("a"))
    tensors[DOWN][31, 55] = torch.nan
    tensors["model.norm.weight"] = torch.ones(31, dtype=torch.bfloat16)
    save_tensors(Path("a"), tensors, 2)
    edit(CONFIG, tie_word_embeddings=True, dtype="float16", torch_dtype=..., pad_token_id=50)
    edit(INDEX, metadata=...)
    edit(GENERATION, eos_token_id=[2, 51])
    edit(TOKENS_MAP, pad_token="[PAD]")
    edit("added_tokens.json", **{"<extra>": 60})
    parts = [
        "shapes are not those of config.json: model.norm.weight [31]",
        "tie_word_embeddings in config.json is true",
        "dtype in config.json is 'float16'",
        f"metadata in {INDEX} is None",
        f"pad_token '[PAD]' in {TOKENS_MAP}",
        "its tokenizer has 1 token (48 '<extra>')",
        "pad_token_id in config.json is 50",
        f"eos_token_id in {GENERATION} is 51",
        f"{DOWN} has 1 NaN",
    ]
    found = problems()
    assert len(found) == len(parts)
    for problem, part in zip(found, parts, strict=True):
        assert problem.startswith(f"a: {part}")
