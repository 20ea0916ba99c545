"""The server goes on, whatever becomes of what it has started or asked."""

import asyncio
import dataclasses
import math
import os
import shutil
import signal
import sqlite3
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from merge_progress import progress_bar
from service import core, log, runner, worker
from service.core import Service
from service.planner import PlanLimitError, Planner
from service.schemas import ExperimentRequest
from service.settings import Settings

TINY = Path(__file__).resolve().parent.parent / "examples/tiny_llamas"
TWO = {"method": "linear", "models": [{"id": "capitals"}, {"id": "elements"}]}


def served(tmp_path, use, **settings):
    """Use a service that no server is around."""

    async def run():
        async with Service(Settings(data=tmp_path / "data", **settings)) as service:
            return await use(service)

    return asyncio.run(run())


async def until(service, key, holds, seconds=60):
    async with asyncio.timeout(seconds):
        while not holds(found := await service.experiment(key)):
            await asyncio.sleep(0.05)
    return found


async def over(service, key):
    return await until(service, key, lambda found: not found.is_open)


async def create(service, **more):
    return (await service.create(ExperimentRequest(**{**TWO, **more}))).id


def planners(folder, use):
    async def run():
        planner = Planner(folder, folder, 20)
        try:
            return await use(planner)
        finally:
            planner.close()

    return asyncio.run(run())


def test_a_planner_that_has_died_is_followed_by_another(tmp_path):
    async def use(planner):
        first = await planner.run(os.getpid)
        os.kill(first, signal.SIGKILL)
        await asyncio.sleep(0.5)
        return first, await planner.run(os.getpid)

    first, second = planners(tmp_path, use)
    assert first != second


def test_a_plan_of_which_planners_die_is_refused(tmp_path):
    async def use(planner):
        with pytest.raises(PlanLimitError, match="died over this twice"):
            await planner.run(os._exit, 1)
        return await planner.run(os.getpid)

    assert planners(tmp_path, use)


def test_an_error_of_the_database_costs_no_place_of_work(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(runner, "REST", 0.1)

    async def use(service):
        read, failures = service.store.job, iter([sqlite3.OperationalError("disk I/O error")])

        def failing(number):
            for error in failures:
                raise error
            return read(number)

        monkeypatch.setattr(service.store, "job", failing)
        return await over(service, await create(service))

    assert served(tmp_path, use).merge.state == "completed"
    assert "disk I/O error" in capfd.readouterr().err


def test_a_job_that_no_process_can_take_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "REST", 0.1)

    async def use(service):
        await service.models()
        key = await create(service)
        shutil.rmtree(service.folders.models)  # in which processes work
        return await over(service, key)

    found = served(tmp_path, use).merge
    assert found.state == "failed"
    assert "before it began, 3 times" in found.problems[0]
    assert sum("before it began" in text for *_, text in found.history) == 2


def test_jobs_wait_while_no_process_can_be_started(tmp_path, monkeypatch):
    """That is the fault of none of them: they are done as soon as one can be."""
    monkeypatch.setattr(runner, "REST", 0.05)
    monkeypatch.setattr(runner, "LONGEST_REST", 0.2)

    async def use(service):
        await service.models()
        logs = service.folders.logs
        logs.rename(logs.with_name("elsewhere"))
        keys = [await create(service) for _ in range(2)]
        await asyncio.sleep(2)
        waiting = [await service.experiment(key) for key in keys]
        logs.mkdir()
        return waiting, [await over(service, key) for key in keys]

    waiting, done = served(tmp_path, use)
    assert [each.merge.state for each in waiting] == ["queued", "queued"]
    said = "no process could be started (No such file or directory); it is tried again"
    assert any(text == said for each in waiting for *_, text in each.merge.history)
    assert [each.merge.state for each in done] == ["completed", "completed"]


def test_the_next_job_has_its_turn_where_a_process_did_not_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "REST", 0.1)

    async def use(service):
        await service.models()
        started, start = [], service.runner._order

        def order(child, experiment):
            started.append(experiment.name)
            found = start(child, experiment)
            if experiment.name == "first" and started.count("first") < 3:
                return dataclasses.replace(found, models="/nowhere")
            return found

        monkeypatch.setattr(service.runner, "_order", order)
        keys = [await create(service, name=name) for name in ("first", "second")]
        return started, [(await over(service, key)).merge.state for key in keys]

    started, states = served(tmp_path, use)
    assert started[:2] == ["first", "second"]
    assert states == ["completed", "completed"]


def test_a_process_that_others_stop_is_not_the_jobs_fault(tmp_path):
    async def use(service):
        key = await create(service)
        for _ in range(4):
            await until(service, key, lambda found: found.merge.state == "running")
            (child,) = service.runner._children.values()
            os.kill(child.process.pid, signal.SIGTERM)
            await until(service, key, lambda found: found.merge.state != "running")
        return await over(service, key)

    assert served(tmp_path, use).merge.state == "completed"


def test_the_service_goes_on_where_nobody_reads_its_log(tmp_path, monkeypatch):
    class Closed:
        text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            if self.text:
                raise BrokenPipeError

    monkeypatch.setattr(log.sys, "stderr", Closed())

    async def use(service):
        key = await create(service)
        await until(service, key, lambda found: found.merge.state == "running")
        await service.cancel(key)
        await over(service, key)
        async with asyncio.timeout(20):
            while service.folders.of(key).exists():
                await asyncio.sleep(0.05)
        return await over(service, await create(service))

    assert served(tmp_path, use).merge.state == "completed"
    log.sys.stderr.close()


def test_a_result_of_other_models_is_made_anew(tmp_path):
    """As where a process is killed that has finished it, and then a model changes."""
    models = tmp_path / "models"
    shutil.copytree(TINY / "capitals", models / "own")
    request = {"models": [{"id": "own"}, {"id": "elements"}]}

    async def use(service):
        key = await create(service, **request)
        done = await over(service, key)
        service.runner._rests_until = math.inf
        again = await create(service, models=[{"id": "base"}, {"id": "elements"}])
        shutil.copytree(service.folders.of(key) / "model", service.folders.of(again) / "model")
        service.runner._rests_until = 0
        return done, await over(service, again)

    done, again = served(tmp_path, use, models=(models,))
    assert [done.merge.state, again.merge.state] == ["completed"] * 2, again.merge.problems
    weights = [
        {file["name"]: file["sha256"] for file in each.merge.outcome["files"]}["model.safetensors"]
        for each in (done, again)
    ]
    assert weights[0] != weights[1]


def test_a_model_may_be_called_merged():
    assert worker.name_of_result(["base", "chat"]) == "merged"
    assert worker.name_of_result(["merged", "chat"]) == "the merge"


def test_a_model_that_has_changed_by_now_is_an_error(tmp_path):
    own = tmp_path / "models" / "own"
    shutil.copytree(TINY / "capitals", own)

    async def use(service):
        service.runner._rests_until = math.inf
        keys = [await create(service, models=[{"id": "own"}, {"id": "base"}]) for _ in range(2)]
        (own / "notes.txt").write_text("which no merge reads")
        service.runner._rests_until = 0
        first = await over(service, keys[0])
        service.runner._rests_until = math.inf
        shutil.copy(TINY / "elements" / "model.safetensors", own)
        again = await create(service, models=[{"id": "own"}, {"id": "base"}])
        return first, keys[1], again

    async def both(service):
        first, second, third = await use(service)
        service.runner._rests_until = 0
        return [first, await over(service, second), await over(service, third)]

    found = served(tmp_path, both, models=(tmp_path / "models",), workers=1)
    assert [each.merge.state for each in found] == ["completed", "failed", "completed"]
    text = "own has changed since the merge was asked for. Ask for the merge again"
    assert found[1].merge.problems == (text,)


def test_progress_of_a_merge_that_goes_on_begins_where_it_stopped():
    told = []
    with progress_bar(100, "ties", show=lambda *said: told.append(said), done=60) as update:
        update(10)
    assert told == [("ties", 60, 100), ("ties", 70, 100)]


def test_looks_go_on_after_an_error(monkeypatch, capfd):
    monkeypatch.setattr(runner, "REST", 0)
    looks = []

    async def look():
        looks.append(len(looks))
        if len(looks) == 1:
            raise OSError("the disk is full")
        if len(looks) == 3:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(runner.keep_doing(look, 0))
    assert looks == [0, 1, 2]
    assert "the disk is full" in capfd.readouterr().err


def test_a_process_that_does_not_answer_is_followed_by_another(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "LATE", -28.0)  # leases are of 30 seconds

    async def use(service):
        key = await create(service)
        await until(service, key, lambda found: found.merge.state == "running")
        (child,) = service.runner._children.values()
        os.kill(child.process.pid, signal.SIGSTOP)
        return await over(service, key)

    found = served(tmp_path, use).merge
    assert found.state == "completed"
    assert any("did not answer any more" in text for _, _, text in found.history)


def test_a_job_has_its_hours_for_each_process(tmp_path, monkeypatch):
    async def use(service):
        key = await create(service)
        await until(service, key, lambda found: found.merge.state == "running")
        (child,) = service.runner._children.values()
        os.kill(child.process.pid, signal.SIGSTOP)
        child.begun -= 3600
        found = await until(service, key, lambda found: not found.is_open)
        os.kill(child.process.pid, signal.SIGCONT)
        return found

    found = served(tmp_path, use, job_hours=1.0).merge
    assert found.problems == ("it took longer than the 1 hours that a job may",)


def test_an_id_that_means_another_model_by_now_is_an_error(tmp_path):
    async def use(service):
        await service.models()
        waiting = await create(service)
        link = service.folders.models / "capitals"
        other = os.readlink(link.with_name("elements"))
        link.unlink()
        link.symlink_to(other)
        return await over(service, waiting)

    found = served(tmp_path, use, workers=1).merge
    assert found.state == "failed"
    text = "capitals is another model now than it was when the merge was asked for"
    assert found.problems == (f"{text}. Ask for the merge again",)


def test_what_many_ask_for_at_once_is_made_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return "text"

    async def use(service):
        return await asyncio.gather(*(service._shared("key", make) for _ in range(50)))

    assert served(tmp_path, use) == ["text"] * 50
    assert made == [1]


def test_models_stay_known_when_they_cannot_be_looked_for(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(core, "FRESH", 0.0)

    async def use(service):
        before = await service.models()

        async def broken(*_):
            raise OSError("no more processes")

        monkeypatch.setattr(service._scanner, "run", broken)
        await service.models()
        await asyncio.sleep(0.1)
        assert await service.models() == before
        return before

    assert served(tmp_path, use)
    assert "no more processes" in capfd.readouterr().err
