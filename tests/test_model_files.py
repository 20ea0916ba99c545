"""Headers, configs, finding folders, reading and writing them."""

import errno
import json
import os
import stat
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_checkpoints import make_llama, read_tensors

import model_writer
from model_config import edit_config, merged_config, read_config
from model_errors import ModelCompatibilityError
from model_locate import find_model_folder
from model_partial import PartialFolder
from model_safetensors import TensorInfo, build_header, read_header
from model_utils import get_llama, open_model_folder, parse_size
from model_writer import FolderWriter, plan_shards


def header_of(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return read_header(descriptor, path.name).entries
    finally:
        os.close(descriptor)


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# Headers


dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
shapes = st.lists(st.integers(0, 4), max_size=3)


@given(st.lists(st.tuples(dtypes, shapes), min_size=1, max_size=6))
def test_headers_of_the_library_are_read_as_the_library_reads_them(tmp_path_factory, specs):
    path = tmp_path_factory.mktemp("header") / "a.safetensors"
    tensors = {f"t{i}": torch.zeros(shape, dtype=dtype) for i, (dtype, shape) in enumerate(specs)}
    save_file(tensors, path, {"format": "pt"})
    entries = header_of(path)
    with safe_open(path, "pt") as file:
        assert set(entries) == set(file.keys())
        for name, found in entries.items():
            part = file.get_slice(name)
            assert (found.info.dtype, list(found.info.shape)) == (
                part.get_dtype(),
                part.get_shape(),
            )


@pytest.mark.parametrize(
    ("header", "data", "text"),
    [
        (b"{not json", b"", "header is corrupt"),
        (b"[1, 2]", b"", "not a JSON object"),
        (b'{"a": 1, "a": 2}', b"", "a name stands in it twice"),
        ({"a": {"dtype": "F32"}}, b"", "'a' is not dtype, shape and data_offsets"),
        ({"a": entry(["F32"], [1], 0, 4)}, b"1234", "'a' has the unknown dtype"),
        ({"a": entry("F99", [1], 0, 4)}, b"1234", "'a' has the unknown dtype 'F99'"),
        ({"a": entry("F32", [-1], 0, 4)}, b"1234", "not whole numbers"),
        ({"a": entry("F32", [2], 0, 4)}, b"1234", "does not fill its bytes"),
        ({"a": entry("F16", [2], 0, 4), "b": entry("F16", [1], 2, 4)}, b"1234", "'b' starts at"),
        ({"a": entry("F16", [1], 2, 4)}, b"1234", "'a' starts at byte"),
        ({"a": entry("F16", [1], 0, 2)}, b"1234", "the tensors end at byte"),
        ({"a": entry("F16", [4], 0, 8)}, b"1234", "the tensors end at byte"),
    ],
)
def test_corrupt_headers_are_refused(tmp_path, header, data, text):
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(ModelCompatibilityError, match=text) as caught:
        header_of(path)
    assert str(caught.value).startswith("bad.safetensors: ")


@pytest.mark.parametrize("size", [0, 7, 8, 40])
def test_a_cut_off_file_is_refused(tmp_path, size):
    path = tmp_path / "cut.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelCompatibilityError, match=f"not a complete .*it has {size} bytes"):
        header_of(path)


def test_a_built_header_is_what_the_library_reads(tmp_path):
    tensors = {"b": TensorInfo("BF16", (2, 3)), "a": TensorInfo("F32", (5,))}
    header, entries = build_header(tensors)
    path = tmp_path / "a.safetensors"
    path.write_bytes(header + bytes(sum(info.nbytes for info in tensors.values())))
    assert header_of(path) == entries
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("b").shape == (2, 3)


# config.json


def test_only_the_values_that_change_are_touched():
    text = (
        '{\n    "rope_theta": 5e5,\n  "vocab_size" :32000 ,\n'
        '"nested": {"vocab_size": 7}, "e": "caf\\u00e9"}\n'
    )
    assert edit_config(text, {"vocab_size": 31000}) == text.replace("32000", "31000")


def test_a_value_that_is_right_already_and_missing_keys():
    assert edit_config('{"a":1.0}', {"a": 1.0}) == '{"a":1.0}'
    assert read_config(edit_config("{}", {"b": "x"})) == {"b": "x"}
    assert read_config(edit_config('{"a": true}', {"a": 1, "b": None})) == {"a": 1, "b": None}


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5))
objects = st.dictionaries(st.text(max_size=4), st.one_of(scalars, st.lists(scalars, max_size=3)))


@given(objects, objects, st.sampled_from([None, 2]))
def test_editing_is_updating(config, changes, indent):
    text = json.dumps(config, indent=indent)
    assert read_config(edit_config(text, changes)) == {**config, **changes}


def test_configs_inside_a_config_follow_where_they_have_the_key():
    text = (
        '{"vocab_size":10,"text_config": {"vocab_size" : 10, "deep_config": {"vocab_size":10}},\n'
        ' "vision_config": {"size": 1}, "a_config": 7, "extra": {"vocab_size": 10}}'
    )
    changed = text.replace('"vocab_size":10', '"vocab_size":8').replace('ze" : 10', 'ze" : 8')
    assert merged_config(text, {"vocab_size": 8}) == changed
    assert merged_config('{"b_config": {}}', {"c": 1}) == '{"b_config": {},\n  "c": 1}'


@given(objects, objects, objects)
def test_merging_configs_updates_all_levels(outer, inner, changes):
    text = json.dumps({**outer, "x_config": inner})
    within = {key: changes.get(key, value) for key, value in inner.items()}
    changes = {key: value for key, value in changes.items() if key != "x_config"}
    assert read_config(merged_config(text, changes)) == {**outer, **changes, "x_config": within}


# Finding a model


def test_a_folder_is_found_and_so_is_the_only_one_below(tmp_path):
    model = make_llama(tmp_path / "llama-3.2/transformers/1b-instruct/1")
    assert find_model_folder(model) == model
    assert find_model_folder(tmp_path / "llama-3.2") == model


def test_several_folders_below_are_listed(tmp_path):
    one, two = (make_llama(tmp_path / "models" / name) for name in ("a/1", "b/1"))
    with pytest.raises(ModelCompatibilityError, match="2 folders with one below it") as caught:
        find_model_folder(tmp_path / "models")
    assert f"\n    {one}\n    {two}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (None, "a model's name is empty"),
        ("nowhere/at/all", "no such folder, and not the id of a Hub model"),
        ("empty", "no config.json in this folder or up to 5 levels below"),
        ("adapter", r"is a LoRA adapter, not a model .* BASE\+.*adapter"),
        ("both", r"is a LoRA adapter, not a model .* BASE\+.*both"),
        ("file", "expected a folder with config.json .* got a file"),
    ],
)
def test_what_is_not_a_model_is_refused(tmp_path, name, text):
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    (make_llama(tmp_path / "both") / "adapter_config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelCompatibilityError, match=text):
        find_model_folder(tmp_path / name if name else "")


# Opening and reading


def bits(tensor):
    """A tensor as numpy holds it: bfloat16 by its bits."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@pytest.mark.parametrize("shards", [1, 3])
def test_rows_are_read_as_stored(tmp_path, shards):
    stored = read_tensors(make_llama(tmp_path / "m", shards=shards))
    buffer = np.empty(100_000, dtype=np.uint8)
    with open_model_folder(tmp_path / "m") as model:
        assert model.tensors.keys() == stored.keys()
        name = "model.layers.1.mlp.down_proj.weight"
        assert np.array_equal(model.read_rows(name, 3, 7, buffer), bits(stored[name][3:7]))
        norm = "model.norm.weight"
        assert np.array_equal(model.read_rows(norm, 0, 1, buffer), bits(stored[norm][None]))


def test_a_file_that_becomes_shorter_is_noticed(tmp_path):
    path = make_llama(tmp_path / "m") / "model.safetensors"
    with open_model_folder(tmp_path / "m") as model:
        os.truncate(path, path.stat().st_size // 2)
        last = max(model.tensors, key=lambda name: model._places[name].begin)
        with pytest.raises(ModelCompatibilityError, match="the file changed while"):
            model.read_rows(last, 0, 1, np.empty(10_000, dtype=np.uint8))


def remove(name):
    return lambda folder: (folder / name).unlink()


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def edit_index(change):
    def break_it(folder):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return break_it


def move_tensor(index):
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    index["weight_map"]["model.embed_tokens.weight"] = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("shards", "break_it", "text"),
    [
        (1, remove("config.json"), "no config.json"),
        (1, remove("model.safetensors"), "no model.safetensors and no model.safetensors.index"),
        (1, pickle_only, "has only pickle weights .pytorch_model.bin.* Convert them"),
        (1, lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
        (1, lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
        (1, lambda f: (f / "config.json").write_text("[" * 10**5), "nested too deeply"),
        (2, remove("model-00002-of-00002.safetensors"), "1 of 2 weight files are missing"),
        (2, edit_index(lambda i: i.pop("weight_map")), "not a safetensors index"),
        (2, edit_index(lambda i: i.update(weight_map={"a": "../x.safetensors"})), "in the model's"),
        (2, edit_index(lambda i: i["weight_map"].pop("model.norm.weight")), "says is in no file"),
        (
            2,
            edit_index(lambda i: i["weight_map"].update(a="model-00001-of-00002.safetensors")),
            "names 1 tensors that their files do not hold .a.",
        ),
        (2, edit_index(move_tensor), "which model.safetensors.index.json says is in"),
    ],
)
def test_broken_folders_are_refused(tmp_path, shards, break_it, text):
    folder = make_llama(tmp_path / "m", shards=shards)
    break_it(folder)
    with pytest.raises(ModelCompatibilityError, match=text):
        open_model_folder(folder)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "`git lfs pull`"),
        (b"<!DOCTYPE html><html><title>Log in</title></html>", "is a web page"),
    ],
)
def test_what_a_download_has_brought_instead_of_weights_is_named(tmp_path, content, text):
    (make_llama(tmp_path / "m") / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelCompatibilityError, match=text), open_model_folder(tmp_path / "m"):
        pass


def test_get_llama_loads_in_float32_for_inference(tmp_path):
    model = get_llama(make_llama(tmp_path / "m", dtype="bfloat16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training


# Writing

TENSORS = {
    "a": TensorInfo("F32", (3, 4)),
    "b": TensorInfo("F32", (5,)),
    "c": TensorInfo("F32", (2, 2)),
}


@contextmanager
def folder_writer(path, max_shard_size):
    with (
        PartialFolder(path) as partial,
        FolderWriter(partial, TENSORS, max_shard_size, plan={}) as writer,
    ):
        yield writer


def write_all(writer, names=("a", "b", "c")):
    for name in names:
        rows = torch.arange(TENSORS[name].numel).float()
        shape = TENSORS[name].shape
        writer.write_rows(name, 0, rows.view(shape if len(shape) > 1 else (1, -1)).numpy())
        writer.finish({name: {}})


@pytest.mark.parametrize(("shard_size", "files"), [(10**9, 1), (50, 2), (70, 2), (1, 3)])
def test_a_folder_is_written_as_the_library_expects(tmp_path, shard_size, files):
    with folder_writer(tmp_path / "out", shard_size) as writer:
        writer.write_rows("a", 1, torch.arange(4, 12).float().view(2, 4).numpy())
        writer.write_rows("a", 0, torch.arange(4).float().view(1, 4).numpy())
        writer.finish({"a": {}})
        write_all(writer, ("b", "c"))
        writer.commit()
    stored = read_tensors(tmp_path / "out")
    assert {name: tensor.flatten().tolist() for name, tensor in stored.items()} == {
        name: list(range(info.numel)) for name, info in TENSORS.items()
    }
    weights = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(weights) == files
    index = tmp_path / "out/model.safetensors.index.json"
    assert index.exists() == (files > 1)
    if files > 1:
        content = json.loads(index.read_text())
        assert content["metadata"] == {"total_parameters": 21, "total_size": 84}
        assert set(content["weight_map"]) == set(TENSORS)
    umask = os.umask(0)
    os.umask(umask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in weights} == {0o666 & ~umask}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ModelCompatibilityError("x"), KeyboardInterrupt(), OSError(5)])
def test_without_commit_there_is_no_output(tmp_path, error):
    """What would only fail again is removed; what was interrupted is kept if something is done."""

    def interrupted(names):
        with folder_writer(tmp_path / "new/out", 50) as writer:
            write_all(writer, names)
            assert not (tmp_path / "new/out").exists()
            raise error

    for names in ((), ("a", "b")):
        with pytest.raises(type(error)):
            interrupted(names)
        if names and not isinstance(error, ModelCompatibilityError):
            assert os.listdir(tmp_path / "new") == [".out.partial"]
            (note,) = error.__notes__
            assert "new/.out.partial; the same run with --resume (resume=True) goes on" in note
        else:
            assert os.listdir(tmp_path) == []


def test_an_output_that_exists_is_refused_and_an_empty_folder_is_used(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(FileExistsError, match=f"{name}: the output exists already"):
            PartialFolder(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(FileExistsError, match="link: the output is a link or a mount point"):
        PartialFolder(tmp_path / "link")
    with folder_writer(tmp_path / "empty", 50) as writer:
        write_all(writer)
        writer.commit()
    assert len(read_tensors(tmp_path / "empty")) == 3


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path):
    with folder_writer(tmp_path / "new/out", 50) as writer:
        write_all(writer)
        (tmp_path / "new/out").mkdir()
        (tmp_path / "new/out/x").write_text("mine")
        with pytest.raises(FileExistsError, match="exists already"):
            writer.commit()
    assert os.listdir(tmp_path / "new") == ["out"]
    assert os.listdir(tmp_path / "new/out") == ["x"]


def test_the_current_folder_can_be_the_output_if_it_is_empty(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with folder_writer(Path("."), 10**9) as writer:
        write_all(writer)
        writer.commit()
    assert os.listdir(tmp_path) == ["here"]
    assert len(read_tensors(tmp_path / "here")) == 3


def test_text_is_written_as_it_is(tmp_path):
    with folder_writer(tmp_path / "out", 10**9) as writer:
        writer.write_text("config.json", '{"a":\r\n1}')
        write_all(writer)
        writer.commit()
    assert (tmp_path / "out/config.json").read_bytes() == b'{"a":\r\n1}'


def test_rows_of_another_dtype_are_not_cast(tmp_path):
    with (
        folder_writer(tmp_path / "out", 50) as writer,
        pytest.raises(TypeError, match=r"b is F32, got rows of float16"),
    ):
        writer.write_rows("b", 0, np.zeros((1, 5), np.float16))


def test_shards_are_filled_in_order():
    info = TensorInfo("F16", (4,))
    shards = plan_shards(dict.fromkeys("abcde", info), 20)
    assert list(shards.values()) == [["a", "b"], ["c", "d"], ["e"]]


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), (7000, 7000), ("20KB", 20_000)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 gigs", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="size must be a size such as 5GB"):
        parse_size(text)


def test_a_number_that_was_meant_with_a_unit_is_refused():
    with pytest.raises(
        ValueError, match=r"max_memory 4 would be bytes\. Say the unit, as in 4MB or 4GB"
    ):
        parse_size("4", "max_memory")


def test_configs_are_edited_at_any_depth():
    text = '{"a_config": {"b_config": {"vocab_size": 1}, "tied": 1}}'
    assert json.loads(merged_config(text, {"vocab_size": 9})) == {
        "a_config": {"b_config": {"vocab_size": 9}, "tied": 1},
        "vocab_size": 9,
    }


@pytest.mark.parametrize("late", [False, True])
def test_a_disk_that_fails_while_files_are_brought_to_it_ends_the_merge(
    tmp_path, monkeypatch, late
):
    """The system reports it once, to whoever asks first."""
    failed = threading.Event()

    def flush(descriptor):
        failed.set()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(model_writer, "_FLUSH", flush)
    monkeypatch.setattr(model_writer, "FLUSH_BYTES", 1)

    def merge():
        with folder_writer(tmp_path / "out", 10**9) as writer:
            write_all(writer, ("a",))
            assert failed.wait(10)
            while not late:
                write_all(writer, ("b",))
            writer.commit()

    with pytest.raises(OSError, match="Input/output error"):
        merge()
    assert os.listdir(tmp_path) == [".out.partial"]


def test_an_interrupt_while_the_disk_is_busy_leaves_no_folder(tmp_path, monkeypatch):
    busy = threading.Event()
    monkeypatch.setattr(model_writer, "FLUSH_BYTES", 1)
    monkeypatch.setattr(model_writer, "_FLUSH", lambda _: (busy.set(), time.sleep(0.3)))
    plain, interrupts = threading.Thread.join, iter([KeyboardInterrupt, None])

    def join(thread, timeout=None):
        plain(thread, timeout)

    def interrupted(thread, timeout=None):
        if (error := next(interrupts, None)) is not None:
            raise error
        join(thread, timeout)

    def merge(writer):
        with writer:
            writer.write_rows("b", 0, np.zeros((1, 5), np.float32))
            assert busy.wait(10)
            monkeypatch.setattr(threading.Thread, "join", interrupted)

    with PartialFolder(tmp_path / "out") as partial:
        writer = FolderWriter(partial, TENSORS, 10**9, plan={})
        with pytest.raises(KeyboardInterrupt):
            merge(writer)
        assert writer._descriptors == []
    assert os.listdir(tmp_path) == []
