"""Which results are kept, and what is removed for another."""

import shutil
import threading
import time
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest

pytest.importorskip("fastapi")

from service import results as module
from service.processes import this_process
from service.results import Folders, NoRoomError, Results
from service.settings import Settings
from service.store import Store

PAGE = 4096
NOTHING = MappingProxyType({})


@pytest.fixture
def folders(tmp_path):
    return Folders.below(tmp_path)


@pytest.fixture
def store(folders):
    with Store(folders.store) as store:
        yield store


@pytest.fixture
def disk(monkeypatch):
    """A disk that says how much is free on it; here 100 pages."""
    usage = SimpleNamespace(free=100 * PAGE)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    return usage


def results(store, folders, **settings):
    given = {"data": folders.store.parent, "disk_reserve": 10 * PAGE, **settings}
    return Results(store, Settings(**given), folders)


def experiment(store, folders, pages=0, *, state="completed", planned=0, downloads=NOTHING):
    """One with a result of so many pages, so far."""
    models = [{"name": name, "download_bytes": size} for name, size in downloads.items()]
    planned = {"method": "ties", "disk_bytes": planned * PAGE, "models": models}
    plan = {"plan": planned, "base": None, "models": []}
    key = store.add("name", {}, "recipe", plan, 100)
    number = store.experiment(key).merge.number
    if state != "queued":
        store.claim(number, "one", this_process(), 10)
        if state != "running":
            store.finish(number, "one", state)
    if pages:
        path = folders.of(key) / "model" / "weights"
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(pages * PAGE))
    return key


def ids(experiments):
    return [each.id for each in experiments]


def test_the_reserve_and_what_is_still_to_be_written_are_not_free(store, folders, disk):
    kept = results(store, folders)
    assert kept.in_the_way(90 * PAGE, {}) == []
    with pytest.raises(
        NoRoomError, match=r"takes up to 372.74 KB .* and 368.64 KB are left for it"
    ):
        kept.in_the_way(91 * PAGE, {})
    experiment(store, folders, 10, state="running", planned=30)  # 20 of them are to come
    assert kept.in_the_way(70 * PAGE, {}) == []
    with pytest.raises(NoRoomError):
        kept.in_the_way(71 * PAGE, {})


def test_downloads_need_room_where_they_go(store, folders, disk, monkeypatch):
    kept = results(store, folders)
    there, elsewhere = folders.store.parent / "not/there/yet", Path("/proc")
    monkeypatch.setattr(module.hub, "cache_folder", lambda: there)
    with pytest.raises(NoRoomError, match=r"of the results, and 368\.64 KB are left"):
        kept.in_the_way(50 * PAGE, {"a": 30 * PAGE, "b": 20 * PAGE})
    monkeypatch.setattr(module.hub, "cache_folder", lambda: elsewhere)
    assert kept.in_the_way(50 * PAGE, {"a": 50 * PAGE}) == []
    with pytest.raises(NoRoomError, match="of the Hub's cache, and"):
        kept.in_the_way(50 * PAGE, {"a": 91 * PAGE})


def test_what_several_merges_need_is_downloaded_once(store, folders, disk, monkeypatch):
    monkeypatch.setattr(module.hub, "cache_folder", lambda: folders.store.parent)
    experiment(store, folders, state="queued", planned=10, downloads={"a": 40 * PAGE})
    kept = results(store, folders)
    assert kept.in_the_way(40 * PAGE, {"a": 40 * PAGE}) == []
    with pytest.raises(NoRoomError):
        kept.in_the_way(40 * PAGE, {"a": 40 * PAGE, "b": PAGE})
    assert kept.in_the_way(10 * PAGE, {"b": 30 * PAGE}) == []
    with pytest.raises(NoRoomError):  # beside what the other has yet to download
        kept.in_the_way(10 * PAGE, {"b": 31 * PAGE})


def test_the_oldest_make_way_and_count_as_free(store, folders, disk):
    keys = [experiment(store, folders, 10) for _ in range(3)]
    kept = results(store, folders, max_results=40 * PAGE)
    assert kept.in_the_way(10 * PAGE, {}) == []
    assert ids(kept.in_the_way(11 * PAGE, {})) == keys[:1]
    assert ids(kept.in_the_way(40 * PAGE, {})) == keys
    disk.free = 20 * PAGE  # 10 beside the reserve
    assert ids(kept.in_the_way(30 * PAGE, {})) == keys[:2]
    assert all(folders.of(key).exists() for key in keys)  # so far nothing is removed
    kept.expire(kept.in_the_way(30 * PAGE, {}))
    assert [folders.of(key).exists() for key in keys] == [False, False, True]
    assert ids(store.results()) == keys[2:]


def test_what_is_being_made_or_used_does_not_make_way(store, folders, disk):
    experiment(store, folders, 5, state="running", planned=10)
    judged = experiment(store, folders, 10)
    store.add_evaluation(judged, {}, 100)
    old = experiment(store, folders, 10)
    kept = results(store, folders, max_results=40 * PAGE)
    assert kept.in_the_way(10 * PAGE, {}) == []
    assert ids(kept.in_the_way(20 * PAGE, {})) == [old]
    with pytest.raises(
        NoRoomError, match=r"takes up to 86.02 KB, and of the 163.84 KB .* 81.92 KB are"
    ):
        kept.in_the_way(21 * PAGE, {})
    assert folders.of(old).exists()


def test_what_has_been_kept_long_enough_goes(store, folders, monkeypatch):
    result = experiment(store, folders, 1)
    failed = experiment(store, folders, state="failed")
    waiting = experiment(store, folders, state="queued")
    folders.log(failed).write_text("why")
    kept = results(store, folders, keep_days=30)
    kept.tidy()
    assert folders.of(result).exists()
    until = kept.kept_until(store.experiment(result))
    assert until == pytest.approx(time.time() + 30 * 86400, abs=60)
    monkeypatch.setattr(module.time, "time", lambda: until + 1)
    results(store, folders, keep_days=0).tidy()  # for ever
    assert folders.of(result).exists()
    kept.tidy()
    assert store.experiment(result).removed is not None
    assert not folders.of(result).exists()
    assert store.experiment(failed) is None
    assert not folders.log(failed).exists()
    assert store.experiment(waiting) is not None


def test_what_a_server_was_removing_is_removed_and_strangers_stay(store, folders, capfd):
    removed, failed = experiment(store, folders, 1), experiment(store, folders, 1, state="failed")
    there = experiment(store, folders, 1)
    store.set_removed(removed)
    shutil.copytree(folders.of(there), folders.of("exp-of-a-backup"))
    (folders.passing / "recipes-x").mkdir()
    (folders.passing / "tmp1").write_text("of a killed process")
    folders.log("exp-gone").write_text("it was there")
    folders.log(there).write_text("it is there")
    results(store, folders).clear_left()
    assert {path.name for path in folders.results.iterdir()} == {there, "exp-of-a-backup"}
    assert f"left alone: {folders.of('exp-of-a-backup')}" in capfd.readouterr().err
    assert not folders.of(failed).exists()
    assert [path.stem for path in folders.logs.iterdir()] == [there]
    assert [*folders.passing.iterdir()] == []


def test_what_a_process_has_left_that_outlived_its_server_goes_in_time(store, folders):
    left = experiment(store, folders, 1, state="failed")
    folders.log(left).write_text("why it failed")
    running = experiment(store, folders, 1, state="running")
    results(store, folders).tidy()
    assert [path.name for path in folders.results.iterdir()] == [running]
    assert folders.log(left).exists()


def test_results_that_somebody_has_removed_are_not_there_any_more(store, folders, capfd):
    kept, lost = (experiment(store, folders) for _ in range(2))
    (folders.of(kept) / "model").mkdir(parents=True)
    results(store, folders).tidy()
    assert ids(store.results()) == [kept]
    assert f"{lost}: somebody else has removed its files" in capfd.readouterr().err


def test_results_on_a_disk_that_is_not_there_are_not_forgotten(store, folders):
    key = experiment(store, folders, 1)
    folders.results.rename(folders.results.with_name("elsewhere"))
    folders.results.mkdir()
    results(store, folders).tidy()
    folders.results.rmdir()
    folders.results.with_name("elsewhere").rename(folders.results)
    results(store, folders).tidy()
    assert ids(store.results()) == [key]
    assert (folders.of(key) / "model" / "weights").exists()


def test_folders_are_called_as_merges_call_them(tmp_path):
    """Which look behind links: what is said of them is made public by their names."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert Folders.below(tmp_path / "link").results == tmp_path.resolve() / "real" / "results"


def test_sizes_are_taken_while_folders_come_and_go(store, folders):
    key = experiment(store, folders, 1)
    kept, over = results(store, folders), threading.Event()

    def make_and_remove():
        while not over.is_set():
            folder = folders.of(key) / "other"
            for number in range(20):
                (folder / str(number)).mkdir(parents=True)
            shutil.rmtree(folder)

    thread = threading.Thread(target=make_and_remove)
    thread.start()
    try:
        for _ in range(300):
            assert kept._size(store.experiment(key)) >= PAGE
    finally:
        over.set()
        thread.join()
