"""A run goes on with what another one has left; what is left is never believed."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faults import content_of
from tiny_checkpoints import make_llama

import merge_adapter_output
import model_writer
from linear_llama import linear_merge_llama_to_folder
from lora_llama import lora_extract_adapter
from merge import main as merge_main
from model_errors import OutputBusyError
from model_files import check_space
from model_partial import PartialFolder
from model_writer import FolderWriter, checksum_rows
from ties_llama import main as ties_main
from ties_llama import ties_merge_llama_to_folder

SIZES = {"hidden_size": 16, "intermediate_size": 24}
PARTIAL = Path(".out.partial")
STOPPED = 14
"""Tensors that are done when a run is stopped; there are 21."""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A base and two models, in the current folder."""
    make_llama(tmp_path / "base", tokenizer=True, **SIZES)
    for seed, name in enumerate("ab", 1):
        make_llama(tmp_path / name, seed=seed, base=tmp_path / "base", tokenizer=True, **SIZES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ties(**options):
    settings = {"densities": [0.5, 0.5], "max_shard_size": "8KB", "threads": 1, **options}
    return ties_merge_llama_to_folder(
        "base", ["a", "b"], output_dir="out", progress=False, **settings
    )


def stop(monkeypatch, merge=ties, after=STOPPED):
    """Run a merge that is interrupted after so many tensors."""
    plain, done = FolderWriter.finish, []

    def finish(writer, findings):
        plain(writer, findings)
        done.extend(findings)
        if len(done) >= after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FolderWriter, "finish", finish)
        with pytest.raises(KeyboardInterrupt) as caught:
            merge()
    return done, caught.value


@pytest.fixture
def reference(models):
    """What the merge makes when nothing stops it."""
    ties(findings=True)
    found = content_of(Path("out"))
    shutil.rmtree("out")
    return found


@pytest.fixture
def written(monkeypatch):
    """The tensors whose rows are written from now on."""
    names = []
    plain = FolderWriter.write_rows

    def write_rows(writer, name, first, rows):
        names.append(name)
        plain(writer, name, first, rows)

    monkeypatch.setattr(FolderWriter, "write_rows", write_rows)
    return names


def test_only_what_is_not_done_is_merged_again(models, reference, monkeypatch, written):
    done, error = stop(monkeypatch, lambda: ties(findings=True))
    assert sorted(os.listdir()) == [".out.partial", "a", "b", "base"]
    assert "the same run with --resume (resume=True) goes on with it" in error.__notes__[0]
    assert not (PARTIAL / "model/config.json").exists()
    written.clear()
    report = ties(findings=True, resume=True)
    assert not {*written} & {*done}
    assert content_of(Path("out")) == reference
    assert 0 < report.bytes_kept < report.bytes_written
    left = report.bytes_written - report.bytes_kept
    assert report.bytes_read == 6 * left  # three models, twice
    assert sorted(os.listdir()) == ["a", "b", "base", "out"]


def test_bytes_that_have_changed_are_merged_again(models, reference, monkeypatch, written):
    done, _ = stop(monkeypatch, lambda: ties(findings=True))
    file = sorted((PARTIAL / "model").glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] ^= 1  # of the first tensor
    file.write_bytes(content)
    written.clear()
    ties(findings=True, resume=True)
    assert len({*written} & {*done}) == 1
    assert content_of(Path("out")) == reference


def cut_records(partial):
    lines = (partial / "blocks.jsonl").read_bytes().splitlines(keepends=True)
    (partial / "blocks.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])


def spoil_a_record(partial):
    content = bytearray((partial / "blocks.jsonl").read_bytes())
    content[200] ^= 1
    (partial / "blocks.jsonl").write_bytes(content)


def shorten_a_file(partial):
    file = sorted((partial / "model").glob("*.safetensors"))[1]
    os.truncate(file, file.stat().st_size // 2)


def remove_a_file(partial):
    sorted((partial / "model").glob("*.safetensors"))[1].unlink()


@pytest.mark.parametrize(
    "change",
    [
        cut_records,
        spoil_a_record,
        shorten_a_file,
        remove_a_file,
        lambda partial: (partial / "plan.json").unlink(),
        lambda partial: (partial / "plan.json").write_text("{"),
        lambda partial: (partial / "blocks.jsonl").unlink(),
        lambda partial: shutil.rmtree(partial / "model"),
        lambda partial: (partial / "model/config.json").write_text("{}"),
        lambda partial: (partial / "plan.json.new").write_text("x"),
    ],
)
def test_whatever_is_found_the_result_is_the_same(models, reference, monkeypatch, change):
    stop(monkeypatch, lambda: ties(findings=True))
    change(PARTIAL)
    ties(findings=True, resume=True)
    assert content_of(Path("out")) == reference
    assert not PARTIAL.exists()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda: {"lam": 0.5}, "the recipe and the tensors differ"),
        (lambda: {"findings": True}, "--findings differs"),
        (lambda: os.utime("a/model.safetensors") or {}, "times of the inputs differs"),
    ],
)
def test_the_beginning_of_another_merge_is_not_taken(models, monkeypatch, change, part):
    stop(monkeypatch)
    settings = change()
    report = ties(resume=True, **settings)
    assert report.bytes_kept == 0
    assert any(part in note for note in report.notes), report.notes
    first = content_of(Path("out"))
    shutil.rmtree("out")
    ties(**settings)
    assert content_of(Path("out")) == first


def test_without_resume_what_is_left_is_removed_and_that_is_said(models, monkeypatch):
    stop(monkeypatch)
    report = ties()
    assert report.bytes_kept == 0
    assert any("was removed; --resume (resume=True) would have gone on" in n for n in report.notes)
    assert sorted(os.listdir()) == ["a", "b", "base", "out"]


def test_a_finished_output_is_said_to_be_finished(models, capsys):
    command = ["base", "--ft_models", "a", "b", "--save", "out", "--quiet", "--resume"]
    assert ties_main(command) == 0
    first = content_of(Path("out"))
    (models / ".out.partial").mkdir()  # as by a run that was killed at its very end
    capsys.readouterr()
    assert ties_main(command) == 0
    assert capsys.readouterr().out == "out was finished before; nothing is left to do\n"
    assert content_of(Path("out")) == first
    assert sorted(os.listdir()) == ["a", "b", "base", "out"]
    assert ties_main([*command, "--lambda", "0.5"]) == 2
    assert "out: the output exists already" in capsys.readouterr().err
    os.truncate("out/model.safetensors", 100)
    assert ties_main(command) == 2


def test_a_second_run_on_one_output_is_turned_away_at_once(models, capsys):
    with PartialFolder(models / "out") as partial:
        assert partial.path == models / ".out.partial"
        with pytest.raises(OutputBusyError, match="out: another run is making it now"):
            ties()
        assert ties_main(["base", "--ft_models", "a", "b", "--save", "out", "--quiet"]) == 7
    assert "error: " in capsys.readouterr().err
    ties()


def test_a_disk_without_locks_is_said(models, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    assert any("knows no locks: start no second run" in note for note in ties().notes)


def test_files_that_will_become_shorter_make_no_room(models, monkeypatch):
    """What is there counts for that file alone."""
    disk = SimpleNamespace(f_bavail=1, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    Path("long").write_bytes(bytes(100_000))
    check_space({models / "long": 10, models / "new": 4096}, models)
    with pytest.raises(OSError, match=r"needs 12,288 bytes \(4,096 of them are there already\)"):
        check_space({models / "long": 10, models / "new": 4097}, models)


@pytest.mark.parametrize("kind", ["file", "link", "others"])
def test_what_no_run_has_left_is_not_touched(models, kind):
    if kind == "file":
        PARTIAL.write_text("mine")
    elif kind == "link":
        PARTIAL.symlink_to(models / "a")
    else:
        PARTIAL.mkdir()
        (PARTIAL / "mine").write_text("mine")
    before = content_of(models)
    with pytest.raises(FileExistsError, match="Move it away"):
        ties()
    assert content_of(models) == before


def test_everything_is_on_the_disk_before_the_folder_has_its_name(models, monkeypatch):
    """Files, then the manifest, then their folder, then the name, then the folder around it."""
    events, names = [], {}
    plain = {name: getattr(os, name) for name in ("open", "fsync", "rename")}

    def opened(path, *args, **named):
        descriptor = plain["open"](path, *args, **named)
        names[descriptor] = str(path)
        return descriptor

    def synced(descriptor):
        events.append(("fsync", Path(names[descriptor])))
        plain["fsync"](descriptor)

    def renamed(old, new):
        files = set(Path(old).rglob("*")) if Path(old).is_dir() else {Path(old)}
        events.append(("rename", Path(new), files))
        plain["rename"](old, new)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    ties()
    (at,) = (i for i, event in enumerate(events) if event[:2] == ("rename", models / "out"))
    before = [event[1] for event in events[:at] if event[0] == "fsync"]
    files = events[at][2]
    assert len(files) > 8
    assert files <= {*before}
    assert [path.name for path in before[-2:]] == ["merge_manifest.json", "model"]
    assert ("fsync", models) in events[at:]
    plan = next(event for event in events if event[0] == "rename")
    assert plan[1].name == "plan.json"
    assert plan[2] <= {event[1] for event in events[: events.index(plan)]}


def test_what_does_not_read_back_ends_the_merge(models, monkeypatch):
    plain = model_writer.write_all

    def wrong(descriptor, content, offset):
        content = bytearray(content)
        if len(content) == 2 * 16 * 24:  # a projection
            content[7] ^= 1
        plain(descriptor, content, offset)

    monkeypatch.setattr(model_writer, "write_all", wrong)
    with pytest.raises(OSError, match="does not read back as it was written") as caught:
        ties()
    assert caught.value.errno == errno.EIO
    assert not Path("out").exists()


def test_checksums_of_rows_are_those_of_their_parts():
    rows = np.random.default_rng(0).integers(0, 256, (7, 24), dtype=np.uint8)
    whole = checksum_rows(rows)
    assert checksum_rows(rows[3:], checksum_rows(rows[:3])) == whole
    for width in (24, 12, 6, 5):
        some = np.ascontiguousarray(rows[:, :width])
        before = checksum_rows(some)
        for place in np.ndindex(some.shape):
            changed = some.copy()
            changed[place] ^= 16
            assert checksum_rows(changed) != before
        assert checksum_rows(some[::-1].copy()) != before
        assert checksum_rows(np.zeros_like(some)) != before


CHAIN = """
name: first
method: ties
base_model: base
models: [a, b]
parameters: {density: 0.5}
---
method: linear
models: [first, b]
"""


def test_results_of_earlier_recipes_are_kept_too(models, monkeypatch, written):
    Path("chain.yml").write_text(CHAIN)
    assert merge_main(["chain.yml", "out", "--quiet"]) == 0
    reference = content_of(Path("out"))
    shutil.rmtree("out")
    command = ["chain.yml", "out", "--quiet", "--threads", "1"]
    done, _ = stop(monkeypatch, lambda: merge_main_raising(command), after=30)
    assert (PARTIAL / "earlier/0/merge_manifest.json").exists()
    written.clear()
    assert merge_main([*command, "--resume"]) == 0
    assert len({*written}) == len(written) == 2 * len({*done}) - len(done)
    assert content_of(Path("out")) == reference
    assert sorted(os.listdir()) == ["a", "b", "base", "chain.yml", "out"]


def test_the_room_for_all_results_is_looked_for_first(models, monkeypatch, capsys, written):
    Path("chain.yml").write_text(CHAIN)
    disk = SimpleNamespace(f_bavail=100, f_bfree=100, f_blocks=1000, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    assert merge_main(["chain.yml", "out", "--quiet"]) == 5
    assert f"error: {models / 'out'}: the result needs" in capsys.readouterr().err
    assert written == []
    assert sorted(os.listdir()) == ["a", "b", "base", "chain.yml"]


def merge_main_raising(command):
    """As in a process of its own, in which an interrupt ends the command."""
    if merge_main(command) == 130:
        raise KeyboardInterrupt


def test_modules_of_an_adapter_are_kept(models, monkeypatch):
    def extract(**options):
        return lora_extract_adapter("a", "base", "out", 2, progress=False, **options)

    torch.set_num_threads(1)
    extract()
    reference = content_of(Path("out"))
    shutil.rmtree("out")
    made = []
    plain = merge_adapter_output._stored

    def stored(found):
        made.append(found)
        if len(made) == 5:
            raise KeyboardInterrupt
        return plain(found)

    monkeypatch.setattr(merge_adapter_output, "_stored", stored)
    with pytest.raises(KeyboardInterrupt):
        extract()
    assert sorted(os.listdir()) == [".out.partial", "a", "b", "base"]
    made.extend([None] * 10)
    report = extract(resume=True)
    assert report.modules_kept == 4
    assert len(made) == 5 + 10 + report.modules - 4
    assert content_of(Path("out")) == reference
    again = extract(resume=True)
    assert again.summary() == "out was finished before; nothing is left to do"


def test_a_manifest_has_what_went_in_and_what_came_out(models):
    linear_merge_llama_to_folder(["a", "b"], output_dir="out", progress=False)
    manifest = json.loads(Path("out/merge_manifest.json").read_text())
    assert [each["model"] for each in manifest["inputs"]] == ["a", "b"]
    assert {*manifest["files"]} == {*os.listdir("out")} - {"merge_manifest.json"}
    assert str(models) not in json.dumps(manifest)
