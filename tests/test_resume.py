"""A run goes on with what another one has left; what is left is never believed."""

import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import signal
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faults import content_of
from tiny_adapters import make_lora
from tiny_checkpoints import make_llama

import merge_adapter_output
import merge_identity
import model_writer
from linear_llama import linear_merge_llama_to_folder
from lora_llama import lora_extract_adapter, lora_fold_llama_to_folder
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


def edit(path, key, value):
    """Change an entry of a JSON file."""
    content = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps({**content, key: value}))


def later(path):
    """The time of a file's last change is one second after now."""
    ahead = time.time() + 1
    os.utime(path, (ahead, ahead))


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
        (lambda: {"lam": 0.5}, "the recipe: parameters: lambda"),
        (lambda: {"dtype": "float32"}, "the recipe: dtype"),
        (lambda: {"findings": True}, "--findings"),
        (lambda: os.utime("a/model.safetensors") or {}, "when the inputs were changed"),
        (lambda: edit("a/config.json", "max_position_embeddings", 64) or {}, "their configs"),
        (lambda: edit("base/tokenizer_config.json", "x", 1) or {}, "the small files"),
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


def test_other_packages_begin_anew(models, monkeypatch):
    stop(monkeypatch)
    monkeypatch.setattr(merge_identity, "computed_with", lambda: {"numba": "99"})
    (note,) = (note for note in ties(resume=True).notes if "all is made anew" in note)
    assert "what computes: numba" in note


def test_verified_inputs_may_have_been_copied_anew(models, monkeypatch, reference):
    stop(monkeypatch, lambda: ties(findings=True, verify_inputs=True))
    for name in ("base", "a", "b"):
        shutil.copytree(name, "copy")
        shutil.rmtree(name)
        os.rename("copy", name)
        later(f"{name}/model.safetensors")
    report = ties(findings=True, verify_inputs=True, resume=True)
    assert report.bytes_kept > 0
    found = content_of(Path("out"))
    assert found.pop("merge_manifest.json") != reference.pop("merge_manifest.json")  # has SHA-256
    assert found == reference


def test_another_strength_in_an_adapters_config_begins_anew(models, monkeypatch):
    make_lora(models / "lora", models / "base", seed=3)
    merge = functools.partial(
        lora_fold_llama_to_folder, "base", ["lora"], "out", threads=1, progress=False
    )
    stop(monkeypatch, merge)
    edit("lora/adapter_config.json", "lora_alpha", 64)
    report = merge(resume=True)
    assert report.bytes_kept == 0
    first = content_of(Path("out"))
    edit("lora/adapter_config.json", "lora_alpha", 32)
    with pytest.raises(ValueError, match="the output exists already"):
        merge(resume=True)
    edit("lora/adapter_config.json", "lora_alpha", 64)
    shutil.rmtree("out")
    merge()
    assert content_of(Path("out")) == first


@pytest.mark.parametrize("change", ["newer", "other"])
def test_a_result_of_other_weights_is_not_this_one(models, change):
    ties()
    if change == "newer":
        later("a/model.safetensors")
    else:  # as checkpoint-500 of another run: same name, size, header and age
        state = os.stat("a/model.safetensors")
        make_llama(models / "a", seed=9, base=models / "base", tokenizer=True, **SIZES)
        os.utime("a/model.safetensors", ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(ValueError, match="the output exists already"):
        ties(resume=True)
    make_llama(models / "a", seed=1, base=models / "base", tokenizer=True, **SIZES)
    os.utime("a/model.safetensors", (0, 0))
    assert ties(resume=True).finished_before


def test_an_edited_card_is_no_reason_to_merge_again(models):
    ties()
    Path("out/README.md").write_text("my own words")
    assert ties(resume=True).finished_before


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


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_signals_that_are_ignored_stay_so(models, number, monkeypatch):
    """As under `nohup`, or in a background job of a shell."""
    before = signal.signal(number, signal.SIG_IGN)
    plain = FolderWriter.finish

    def finish(writer, findings):
        os.kill(os.getpid(), number)
        plain(writer, findings)

    monkeypatch.setattr(FolderWriter, "finish", finish)
    try:
        command = ["base", "--ft_models", "a", "b", "--save", "out", "--quiet"]
        assert ties_main(command) == 0
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_after_an_interrupt_signals_are_what_they_were(models, number, monkeypatch, capsys):
    before = [signal.getsignal(each) for each in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)]
    plain = FolderWriter.finish

    def finish(writer, findings):
        plain(writer, findings)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(FolderWriter, "finish", finish)
    command = ["base", "--ft_models", "a", "b", "--save", "out", "--quiet"]
    assert ties_main(command) == 128 + number
    assert "error: interrupted" in capsys.readouterr().err
    after = [signal.getsignal(each) for each in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)]
    assert after == before


def test_a_signal_right_after_the_folder_has_its_name(models, monkeypatch):
    plain = os.rename

    def rename(old, new):
        plain(old, new)
        if Path(new).name == "out":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt) as caught:
        ties()
    assert sorted(os.listdir()) == ["a", "b", "base", "out"]
    assert not hasattr(caught.value, "__notes__")
    assert ties(resume=True).finished_before


def test_an_output_that_appears_meanwhile_stays(models, monkeypatch, capsys):
    plain = FolderWriter.commit

    def commit(writer, about):
        (models / "out").mkdir()
        (models / "out/mine").write_text("mine")
        plain(writer, about)

    command = ["base", "--ft_models", "a", "b", "--save", "out", "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(FolderWriter, "commit", commit)
        assert ties_main(command) == 2
    assert "the output exists already" in capsys.readouterr().err
    shutil.rmtree("out")
    assert ties_main([*command, "--resume"]) == 0
    assert "kept 10.91 KB that a stopped run had merged" in capsys.readouterr().out


def test_the_folder_of_an_output_that_is_there_is_not_left(models, monkeypatch):
    """It appears between the first look and the lock."""
    plain = PartialFolder._take_lock

    def take_lock(partial):
        plain(partial)
        (models / "out").mkdir()
        (models / "out/mine").write_text("mine")

    monkeypatch.setattr(PartialFolder, "_take_lock", take_lock)
    with pytest.raises(FileExistsError, match="the output exists already"):
        ties()
    assert sorted(os.listdir()) == ["a", "b", "base", "out"]


def test_a_folder_that_another_run_has_just_made_is_left_to_it(models):
    with PartialFolder(models / "out") as partial:
        with pytest.raises(OutputBusyError):
            ties()
        assert partial.path.is_dir()


@pytest.mark.parametrize("output", ["x" * 250, "../link"])
def test_outputs_that_cannot_be(models, output):
    Path("link").symlink_to("a")
    Path("here").mkdir()
    os.chdir("here")
    with pytest.raises(ValueError, match=r"Name a|bytes too long"):
        linear_merge_llama_to_folder(["../a"], output_dir=output, progress=False)
    assert os.listdir() == []


def test_an_output_is_where_the_system_takes_its_path_to_be(models):
    Path("far/away").mkdir(parents=True)
    Path("link").symlink_to("far/away")
    linear_merge_llama_to_folder(["a"], output_dir="link/../out", progress=False)
    assert sorted(os.listdir("far")) == ["away", "out"]


def test_an_empty_output_keeps_its_mode_and_litter_is_no_obstacle(models, monkeypatch):
    stop(monkeypatch)
    (PARTIAL / ".DS_Store").write_text("")
    (PARTIAL / "model/folder").mkdir()
    Path("out").mkdir(mode=0o700)
    assert ties(resume=True).bytes_kept > 0
    assert Path("out").stat().st_mode & 0o777 == 0o700
    assert not Path("out/folder").exists()


def test_what_is_kept_or_lost_is_said_before_the_work(models, monkeypatch, capsys):
    stop(monkeypatch)
    command = ["base", "--ft_models", "a", "b", "--densities", "0.5", "0.5", "--save", "out"]
    command += ["--max-shard-size", "8KB"]

    def finish(writer, findings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FolderWriter, "finish", finish)
        assert ties_main([*command, "--resume"]) == 130
        assert "KB are kept of what a stopped run has left" in capsys.readouterr().err
        assert ties_main([*command, "--resume", "--lambda", "2"]) == 130
        assert "(not the same: the recipe: parameters: lambda" in capsys.readouterr().err
    stop(monkeypatch)
    assert ties_main(command) == 0
    assert "was removed; --resume (resume=True) would" in capsys.readouterr().err


def test_a_disk_without_locks_is_said(models, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    assert any("knows no locks: start no second run" in note for note in ties().notes)


def test_a_lock_on_a_folder_that_was_removed_meanwhile_is_none(models, monkeypatch):
    """Another run ends between this one's opening of the folder and its lock."""
    plain, again = fcntl.flock, []

    def flock(descriptor, how):
        if not again:
            again.append(PARTIAL.stat().st_ino)
            PARTIAL.rmdir()
            Path("between").mkdir()  # so that the inode is not given out at once
        plain(descriptor, how)

    monkeypatch.setattr("fcntl.flock", flock)
    with PartialFolder(models / "out") as partial:
        assert os.path.samestat(os.fstat(partial._lock), partial.path.stat())


def test_a_record_of_a_part_of_a_tensor_proves_nothing(models, monkeypatch, reference):
    stop(monkeypatch, lambda: ties(findings=True))
    journal = PARTIAL / "blocks.jsonl"
    lines = []
    for line in journal.read_bytes().rstrip(b"\0").splitlines():
        record = json.loads(line[9:])
        text = json.dumps({**record, "rows": {name: [] for name in record["rows"]}}).encode()
        lines.append(b"%08x %s\n" % (zlib.crc32(text), text))
    journal.write_bytes(b"".join(lines))
    for file in (PARTIAL / "model").glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        content[start:] = bytes(len(content) - start)
        file.write_bytes(content)
    assert ties(findings=True, resume=True).bytes_kept == 0
    assert content_of(Path("out")) == reference


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


def test_what_does_not_read_back_is_said_before_the_end(models, monkeypatch):
    finished = []
    plain = FolderWriter.finish

    def finish(writer, findings):
        writer._read_back.error = OSError(errno.EIO, "does not read back")
        finished.append(findings)
        plain(writer, findings)

    monkeypatch.setattr(FolderWriter, "finish", finish)
    with pytest.raises(OSError, match="does not read back"):
        ties()
    assert len(finished) == 1


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


def stop_at_the_last(monkeypatch):
    """Merge the chain until its last recipe is on its way."""
    stop(monkeypatch, lambda: merge_main_raising(["chain.yml", "out", "--quiet"]), after=30)


@pytest.mark.parametrize("change", ["weights", "bytes", "recipe", "more recipes"])
def test_an_earlier_result_that_is_not_the_wanted_one_is_made_anew(models, monkeypatch, change):
    Path("chain.yml").write_text(CHAIN)
    stop_at_the_last(monkeypatch)
    kept = PARTIAL / "earlier/0/model.safetensors"
    if change == "weights":
        make_llama(models / "a", seed=9, base=models / "base", tokenizer=True, **SIZES)
    elif change == "bytes":
        content = bytearray(kept.read_bytes())
        content[-9] ^= 1
        kept.write_bytes(content)
    elif change == "recipe":
        Path("chain.yml").write_text(CHAIN.replace("0.5", "0.4"))
    else:
        more = "name: zeroth\nmethod: ties\nbase_model: base\nmodels: [b]\n---\n"
        Path("chain.yml").write_text(more + CHAIN.replace("[a, b]", "[a, zeroth]"))
    assert merge_main(["chain.yml", "out", "--quiet", "--resume"]) == 0
    found = content_of(Path("out"))
    shutil.rmtree("out")
    assert merge_main(["chain.yml", "out", "--quiet"]) == 0
    assert content_of(Path("out")) == found


def test_a_model_behind_a_recipe_that_changes_ends_the_merge(models, monkeypatch):
    Path("chain.yml").write_text(
        CHAIN.replace("ties", "linear")
        .replace("base_model: base\n", "")
        .replace("parameters: {density: 0.5}\n", "")
    )
    plain = FolderWriter.finish

    def finish(writer, findings):
        later("a/model.safetensors")
        plain(writer, findings)

    monkeypatch.setattr(FolderWriter, "finish", finish)
    assert merge_main(["chain.yml", "out", "--quiet"]) == 3
    assert not Path("out").exists()


def test_inputs_of_earlier_recipes_are_verified_before_they_are_merged(models, monkeypatch, capsys):
    Path("chain.yml").write_text(CHAIN)
    linear_merge_llama_to_folder(["a"], output_dir="known", progress=False)
    shutil.copy("known/merge_manifest.json", "a")
    monkeypatch.setattr(FolderWriter, "write_rows", None)  # nothing is written
    assert merge_main(["chain.yml", "out", "--quiet", "--verify-inputs"]) == 3
    assert "a: model.safetensors has the SHA-256" in capsys.readouterr().err


def test_the_manifest_has_sha256_of_verified_inputs_of_earlier_recipes_too(models):
    Path("chain.yml").write_text(CHAIN)
    assert merge_main(["chain.yml", "out", "--quiet", "--verify-inputs"]) == 0
    inputs = json.loads(Path("out/merge_manifest.json").read_text())["inputs"]
    for file in inputs:
        content = (Path(file["model"]) / file["file"]).read_bytes()
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert {file["model"] for file in inputs} == {"base", "a", "b"}


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
    shutil.rmtree("out")
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        extract()
    monkeypatch.setattr(merge_adapter_output, "torch_threads", lambda: 99)
    assert extract(resume=True).modules_kept == 0


def test_a_manifest_has_what_went_in_and_what_came_out(models):
    linear_merge_llama_to_folder(["a", "b"], output_dir="out", progress=False)
    manifest = json.loads(Path("out/merge_manifest.json").read_text())
    assert [each["model"] for each in manifest["inputs"]] == ["a", "b"]
    assert {*manifest["files"]} == {*os.listdir("out")} - {"merge_manifest.json"}
    assert str(models) not in json.dumps(manifest)
