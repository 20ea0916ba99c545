"""Jobs: each is held by one process at a time, and none is lost or done twice."""

import sqlite3
import stat
import subprocess
import sys
import threading

import pytest

pytest.importorskip("fastapi")

from service import store as module
from service.processes import Process, boot_id, this_process
from service.store import ATTEMPTS, OPEN, Progress, QueueFullError, StateError, Store

PLAN = {"plan": {}}


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "jobs.sqlite3") as store:
        yield store


def add(store, *, most=100, **request):
    """A new experiment; its id, and the number of its merge."""
    key = store.add("name", request, "recipe", PLAN, most)
    return key, store.experiment(key).merge.number


def claim(store, number, holder="one", process=None, lease=10.0):
    return store.claim(number, holder, process or this_process(), lease)


def states(store, key):
    return [state for _, state, _ in store.experiment(key).merge.history]


def test_a_job_goes_from_the_queue_to_its_end(store):
    key, number = add(store)
    assert store.next_jobs(5) == [number]
    assert claim(store, number).state == "running"
    assert store.next_jobs(5) == []
    assert store.beat(number, "one", 10, Progress("ties", 5, 10, 2.0))
    assert store.experiment(key).merge.progress == ("ties", 5, 10, 2.0)
    assert store.finish(number, "one", "completed", outcome={"bytes": 7})
    found = store.experiment(key)
    assert (found.merge.state, found.merge.outcome, found.is_open) == (
        "completed",
        {"bytes": 7},
        False,
    )
    assert states(store, key) == ["queued", "running", "completed"]


def test_of_many_that_want_a_job_one_gets_it(tmp_path):
    path = tmp_path / "jobs.sqlite3"
    with Store(path) as store:
        _, number = add(store)
        got, barrier = [], threading.Barrier(8)

        def take(name):
            with Store(path) as mine:
                barrier.wait()
                got.append(mine.claim(number, name, this_process(), 10))

        threads = [threading.Thread(target=take, args=(str(i),)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(job is not None for job in got) == 1


def test_who_has_lost_a_job_cannot_finish_it(store):
    key, number = add(store)
    claim(store, number)
    assert store.release(number, "one", "it was killed", died=True) == "queued"
    claim(store, number, "two")
    assert not store.beat(number, "one", 10, Progress("ties"))
    assert not store.finish(number, "one", "completed")
    assert store.release(number, "one", "again", died=True) is None
    assert store.finish(number, "two", "completed")
    assert states(store, key) == ["queued", "running", "queued", "running", "completed"]


def test_a_job_over_which_processes_die_fails_in_the_end(store):
    key, number = add(store)
    for attempt in range(1, ATTEMPTS + 1):
        claim(store, number, str(attempt))
        state = store.release(number, str(attempt), "it was killed", died=True)
        assert state == ("queued" if attempt < ATTEMPTS else "failed")
    (problem,) = store.experiment(key).merge.problems
    assert "That happened 3 times" in problem


def test_a_job_that_gets_further_each_time_may_lose_any_number_of_processes(store):
    _, number = add(store)
    for attempt in range(1, 3 * ATTEMPTS):
        claim(store, number, str(attempt))
        store.beat(number, str(attempt), 10, Progress("ties", attempt, 100))
        assert store.release(number, str(attempt), "it was killed", died=True) == "queued"


def test_a_download_and_a_merge_are_not_compared(store):
    """A download counts more bytes than the merge has, so no merge would get further than it."""
    _, number = add(store)
    claim(store, number, "first")
    store.beat(number, "first", 10, Progress("download", 14, 14))
    store.beat(number, "first", 10, Progress("starting"))
    store.beat(number, "first", 10, Progress("ties", 1, 20))
    store.release(number, "first", "it was killed", died=True)
    for attempt in range(2, 3 * ATTEMPTS):
        claim(store, number, str(attempt))
        store.beat(number, str(attempt), 10, Progress("ties", attempt, 20))
        assert store.release(number, str(attempt), "it was killed", died=True) == "queued"
    states = []
    while claim(store, number):  # not further any more
        store.beat(number, "one", 10, Progress("ties", 2, 20))
        states.append(store.release(number, "one", "it was killed", died=True))
    assert states == ["queued", "failed"]


def test_a_job_that_no_process_takes_can_be_given_up(store):
    key, number = add(store)
    assert store.give_up(number, "it cannot be")
    assert store.experiment(key).merge.state == "failed"
    assert store.experiment(key).merge.problems == ("it cannot be",)
    _, number = add(store)
    claim(store, number)
    assert not store.give_up(number, "it runs")


def test_a_process_that_was_stopped_counts_for_nothing(store):
    _, number = add(store)
    for attempt in range(3 * ATTEMPTS):
        claim(store, number, str(attempt))
        assert store.release(number, str(attempt), "stopped", died=False) == "queued"


def test_what_waits_is_cancelled_at_once_and_what_runs_is_asked(store):
    key, number = add(store)
    assert store.cancel(key)
    assert store.experiment(key).merge.state == "cancelled"
    assert claim(store, number) is None
    key, number = add(store)
    claim(store, number)
    assert store.cancel(key)
    assert store.experiment(key).merge.stop
    assert store.held()[0].stop
    assert store.release(number, "one", "stopped", died=False) == "cancelled"
    assert not store.cancel(key)


def test_a_merge_that_is_done_before_it_hears_of_its_end_is_done(store):
    key, number = add(store)
    claim(store, number)
    store.cancel(key)
    assert store.finish(number, "one", "completed")
    assert store.experiment(key).merge.state == "completed"


def test_a_merge_that_was_cancelled_too_late_is_followed_by_nothing(store):
    key, number = add(store, evaluation={"prompts": ["a"]})
    claim(store, number)
    store.cancel(key)
    assert store.finish(number, "one", "completed")
    assert store.experiment(key).evaluation is None


def test_an_evaluation_takes_the_place_of_the_one_before(store):
    key, number = add(store)
    claim(store, number)
    store.finish(number, "one", "completed")
    for _ in range(3):
        store.add_evaluation(key, {"prompts": ["a"]}, 100)
        (number,) = store.next_jobs(5)
        claim(store, number)
        store.finish(number, "one", "completed")
    assert store.counts() == {"completed": 2}


def test_the_queue_has_an_end(store):
    add(store, most=2)
    _, number = add(store, most=2)
    with pytest.raises(QueueFullError, match="2 jobs wait or run already, and 2 may"):
        add(store, most=2)
    claim(store, number)
    store.finish(number, "one", "failed", problems=["no"])
    add(store, most=2)


def test_an_evaluation_that_was_asked_for_follows_the_merge(store):
    key, number = add(store, evaluation={"prompts": ["a"]})
    claim(store, number)
    store.finish(number, "one", "completed", outcome={})
    found = store.experiment(key)
    assert (found.evaluation.state, found.evaluation.request) == ("queued", {"prompts": ["a"]})
    assert found.is_open
    with pytest.raises(StateError, match="waits or runs already"):
        store.add_evaluation(key, {}, 100)


def test_a_failed_merge_is_followed_by_nothing(store):
    key, number = add(store, evaluation={"prompts": ["a"]})
    claim(store, number)
    store.finish(number, "one", "failed", problems=["no"])
    assert store.experiment(key).evaluation is None
    with pytest.raises(StateError, match="no merged model"):
        store.add_evaluation(key, {}, 100)


def test_places_in_the_queue_are_those_in_which_jobs_come_up(store):
    keys = [add(store)[0] for _ in range(3)]
    store.cancel(keys[0])
    assert [store.experiment(key).place for key in keys] == [None, 1, 2]


def test_lists_are_by_age_and_in_pages(store):
    keys = [add(store)[0] for _ in range(5)]
    first = store.experiments(2)
    assert [each.id for each in first] == [keys[4], keys[3]]
    assert [each.id for each in store.experiments(9, first[-1].number)] == keys[2::-1]


def test_what_is_open_cannot_be_removed(store):
    key, number = add(store)
    assert not store.set_removed(key)
    claim(store, number)
    assert not store.set_removed(key)
    store.finish(number, "one", "completed")
    assert store.set_removed(key)
    store.remove(key)
    assert store.experiment(key) is None


def test_others_changes_are_seen_whoever_comes_and_goes(tmp_path):
    """A database that is opened twice in a process, while another process opens and closes it."""
    path = tmp_path / "jobs.sqlite3"
    with Store(path) as store, Store(path) as second:
        key, number = add(store)
        before = second.version()
        script = (
            "import sys; from pathlib import Path; from service.store import *\n"
            "from service.processes import this_process\n"
            "with Store(Path(sys.argv[1])) as s, Store(Path(sys.argv[1])) as t:\n"
            "    s.claim(int(sys.argv[2]), 'x', this_process(), 10)\n"
        )
        for _ in range(2):
            subprocess.run([sys.executable, "-c", script, path, str(number)], check=True)
            assert store.experiment(key).merge.state == "running"
        assert second.version() != before
        store.finish(number, "x", "completed")
    with Store(path) as store:
        assert store.experiment(key).merge.state == "completed"


def test_the_file_is_its_owners(store, tmp_path):
    assert stat.S_IMODE((tmp_path / "jobs.sqlite3").stat().st_mode) == 0o600


def test_a_database_of_another_version_is_left_alone(tmp_path):
    path = tmp_path / "jobs.sqlite3"
    Store(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(ValueError, match="made by another version"):
        Store(path)


def test_states_are_those_that_are_known(store):
    _, number = add(store)
    claim(store, number)
    with pytest.raises(sqlite3.IntegrityError):
        store.finish(number, "one", "odd")
    assert store.job(number).state in OPEN  # the transaction is undone as a whole


def test_a_process_is_told_from_others_with_its_number():
    own = this_process()
    assert own.is_alive()
    assert not own._replace(born=own.born + 1).is_alive()
    assert not own._replace(boot="another start of the machine").is_alive()
    child = subprocess.Popen([sys.executable, "-c", ""])
    gone = Process(boot_id(), child.pid, 0)
    child.wait()
    assert not gone.is_alive()


def test_evaluations_have_their_place_in_the_queue(store):
    keys = []
    for _ in range(2):
        key, number = add(store)
        claim(store, number)
        store.finish(number, "one", "completed")
        keys.append(key)
    store.add_evaluation(keys[0], {}, 1)
    with pytest.raises(QueueFullError, match="1 jobs wait or run already, and 1 may"):
        store.add_evaluation(keys[1], {}, 1)


def test_to_ask_again_to_stop_says_nothing_new(store):
    key, number = add(store)
    claim(store, number)
    assert [store.cancel(key) for _ in range(3)] == [True] * 3
    texts = [text for *_, text in store.experiment(key).merge.history]
    assert texts == ["asked for", "begun", "asked to stop"]


def test_a_process_that_begins_again_begins_at_nothing(store):
    key, number = add(store)
    claim(store, number)
    store.beat(number, "one", 10, Progress("ties", 7, 10))
    store.release(number, "one", "it was killed", died=True)
    claim(store, number, "two")
    assert store.experiment(key).merge.progress == ("", 0, 0, None)


def test_why_a_job_waits_is_kept_once(store):
    key, number = add(store)
    for text in ("no room", "no room", "no memory"):
        store.note(number, text)
    claim(store, number)
    store.note(number, "not while it runs")
    texts = [text for *_, text in store.experiment(key).merge.history]
    assert texts == ["asked for", "no room", "no memory", "begun"]


def test_the_time_that_a_job_took_is_that_of_all_its_processes(store, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "time", lambda: now[0])
    key, number = add(store)
    now[0] = 10
    claim(store, number)
    now[0] = 13
    store.release(number, "one", "it was killed", died=True)
    now[0] = 100
    claim(store, number, "two")
    now[0] = 104
    store.cancel(key)
    now[0] = 106
    assert store.seconds_worked(number) == 3 + 6
    store.finish(number, "two", "completed")
    now[0] = 200
    assert store.seconds_worked(number) == 3 + 6
