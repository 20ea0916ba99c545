"""The server goes on, whatever becomes of what it has started or asked."""

import asyncio
import os
import shutil
import signal
import sqlite3

import pytest

pytest.importorskip("fastapi")

from service import core, runner
from service.core import Service
from service.planner import PlanLimitError, Planner
from service.schemas import ExperimentRequest
from service.settings import Settings

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
        with pytest.raises(PlanLimitError, match="more memory than there is"):
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


def test_a_job_that_no_process_can_take_fails(tmp_path):
    async def use(service):
        await service.models()
        key = await create(service)
        shutil.rmtree(service.folders.models)  # in which processes work
        return await over(service, key)

    found = served(tmp_path, use).merge
    assert found.state == "failed"
    assert "before it began, 3 times" in found.problems[0]


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
    assert found.problems == (
        "capitals is another model now than it was when this was asked for. Ask for it again",
    )


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
