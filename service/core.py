"""What the service can do, whoever asks: the API and the page are two ways to ask for it."""

import asyncio
import contextlib
import fcntl
import functools
import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_card import VERSION
from model_utils import format_bytes
from service import planner, registry
from service.archive import Archive, Entry, File
from service.log import log
from service.planner import BusyError, PlanLimitError, Planner
from service.registry import Registry, tiny_models
from service.requests import Problem
from service.results import Folders, NoRoomError, Results
from service.runner import Runner, keep_doing
from service.schemas import EvaluationRequest, ExperimentRequest
from service.settings import Settings
from service.store import Experiment, QueueFullError, StateError, Store
from service.views import API, file_name, progress_view, view

FRESH = 30.0
"""Seconds for which a scan of the models is believed."""

SCAN_SECONDS = 300.0
"""That it may take."""

LOOK = 1.0
"""Seconds between two looks at what has changed."""

MOST_TEXT = 8 * 2**20
"""Characters that are kept for those who ask for the same."""

ENTRY = 1000
"""What it takes to keep even an empty one."""

HEARTBEAT = 15.0
"""Seconds after which a watcher is told something in any case."""

TIDY = 60.0
"""Seconds between two looks for results that are to be removed."""

DEEPEST = 50
"""Levels of a request's entries; recipes have less."""

LIBRARIES = 10**9
"""Bytes that it takes to run any model at all; one in 16 bits is run in float32 besides."""

NO_EXPERIMENT = "there is no experiment of this id"


class RefusedError(Exception):
    """Something that cannot be done.

    Attributes:
        status: of HTTP.
        problems: what is wrong, if it is more than the error's text.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        error: str,
        problems: Sequence[Problem] = (),
        headers: Mapping[str, str] = {},
    ) -> None:
        super().__init__(error)
        self.status = status
        self.problems = tuple(problems)
        self.headers = dict(headers)


class DataBusyError(OSError):
    """Another server works with the same data folder."""


class Service:
    """Models, experiments, and the processes that work on them. Use it as a context manager.

    Args:
        settings: how it runs.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folders = Folders.below(settings.data)
        self._lock = _locked(settings.data)
        self.store = Store(self.folders.store)
        self.results = Results(self.store, settings, self.folders)
        self._changes = Store(self.folders.store)  # sees what the other one commits
        self.runner = Runner(self.store, settings, self.folders, self.results)
        environment = {} if settings.hub_downloads else {"HF_HUB_OFFLINE": "1"}
        os.environ.update(environment)  # also of the processes that merge
        where = self.folders.models, self.folders.passing
        self._planner = Planner(*where, settings.plan_seconds)
        self._scanner = Planner(*where, SCAN_SECONDS)
        self._registry = Registry(self.folders.models)
        self._scan: asyncio.Task[None] | None = None
        self._scanned: float | None = None
        self._adding = asyncio.Lock()
        self._changed = asyncio.Event()  # another one after each change
        self._version = 0
        self._texts: dict[str, asyncio.Future[str]] = {}
        self.watchers = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Service":
        await asyncio.to_thread(self.results.clear_left)
        self._version = self._changes.version()
        work = (
            self.runner.run(),
            keep_doing(self._look_for_changes, LOOK),
            keep_doing(functools.partial(asyncio.to_thread, self.results.tidy), TIDY),
        )
        self._tasks = [asyncio.create_task(each) for each in work]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._planner.close()
        self._scanner.close()
        self.store.close()
        self._changes.close()
        os.close(self._lock)

    # Models

    async def models(self) -> list[registry.Entry]:
        """All models, those that can be merged first.

        What is known is told at once; where that is old, they are looked for meanwhile.
        """
        if self._scanned is None or time.monotonic() > self._scanned + FRESH:
            await self._look_for_models(wait=self._scanned is None)
        return sorted(self._registry.entries.values(), key=lambda entry: bool(entry.problem))

    async def _look_for_models(self, *, wait: bool) -> None:
        if self._scan is None or self._scan.done():
            self._scan = asyncio.create_task(self._scan_models())
        if wait:
            await asyncio.shield(self._scan)

    async def _scan_models(self) -> None:
        tiny = tiny_models() if self.settings.tiny_models else None
        try:
            found = await self._scanner.run(
                registry.scan,
                [str(root) for root in self.settings.models],
                None if tiny is None else str(tiny),
                [*self.settings.hub_models],
                self.settings.hub_downloads,
            )
            await asyncio.to_thread(self._registry.update, found)
        except Exception as error:  # those that are known stay known
            log(f"models could not be looked for: {error!r}")
        self._scanned = time.monotonic()

    # Experiments

    async def plan(self, request: ExperimentRequest) -> dict[str, Any]:
        """What a request would do: see `planner.plan`; "folders" of its models besides, by id.

        Raises:
            RefusedError: it cannot be carried out.
        """
        content = _storable(request)
        await self.models()
        entries, found = await self._planned(content)
        if found.get("unknown"):  # it may have come since the last look
            await self._look_for_models(wait=True)
            entries, found = await self._planned(content)
        problems = [Problem(*each) for each in found["problems"]]
        if problems:
            raise RefusedError(422, "\n".join(problem.text for problem in problems), problems)
        found["folders"] = {
            key: (entries[key].source, mark) for key, mark in found["fingerprints"].items()
        }
        if request.evaluation is not None:
            self._check_memory(found["plan"]["write_bytes"])
        return found

    def _check_memory(self, nbytes: int) -> None:
        """Whether models whose result takes so many bytes can be run one after the other."""
        if self.settings.device != "cpu":
            return  # whose memory is not known here
        limit, needed = self.runner.memory_bytes, 2 * nbytes + LIBRARIES
        if limit is not None and needed > limit:
            text = (
                f"to run these models takes about {format_bytes(needed)} of memory, and a job may "
                f"take {format_bytes(limit)} here. Merge without an evaluation, and run the result "
                "on a machine with more, or with a GPU"
            )
            raise RefusedError(422, text, [Problem("evaluation", text)])

    async def _planned(
        self, content: Mapping[str, Any]
    ) -> tuple[Mapping[str, registry.Entry], dict[str, Any]]:
        """What `planner.plan` says, and the models that it was made with."""
        entries = self._registry.entries  # a scan puts others in their place
        settings = {
            "max_memory": self.runner.memory_bytes,
            "threads": self.settings.threads,
            "device": self.settings.device,
        }
        output = str(self.folders.results / "new" / "model")
        names = [*registry.names_of(entries)]
        try:
            found: dict[str, Any] = await self._planner.run(
                planner.plan, content, names, output, settings
            )
        except PlanLimitError as error:
            raise RefusedError(422, str(error), [Problem("", str(error))]) from None
        except BusyError as error:
            text = f"{error}. Try again later"
            raise RefusedError(429, text, headers={"retry-after": "5"}) from None
        return entries, found

    async def create(self, request: ExperimentRequest) -> Experiment:
        """A new experiment, which waits for its turn.

        Raises:
            RefusedError: it cannot be carried out, or there is no room for it.
        """
        if request.evaluation is not None:
            check_evaluation(request.evaluation)
        found = await self.plan(request)
        content = _storable(request)
        name = request.name.strip() or _name(found["plan"]["method"], found["models"])
        async with self._adding:  # of two, the second finds what the first takes
            key = await asyncio.to_thread(self._add, name, content, found)
        self._tell()
        return await self.experiment(key)

    def _add(self, name: str, content: Mapping[str, Any], found: Mapping[str, Any]) -> str:
        """Add an experiment if there is room for its result; its id."""
        plan = found["plan"]
        downloads = {model["name"]: model["download_bytes"] for model in plan["models"]}
        try:
            going = self.results.in_the_way(plan["disk_bytes"], downloads)
            key = self.store.add(name, content, found["recipe"], found, self.settings.queue)
        except NoRoomError as error:
            raise RefusedError(409, str(error), [Problem("", str(error))]) from None
        except QueueFullError as error:
            raise _full(error) from None
        self.results.expire(going)
        return key

    async def experiment(self, key: str) -> Experiment:
        """An experiment by its id.

        Raises:
            RefusedError: there is none.
        """
        found = await asyncio.to_thread(self.store.experiment, key)
        if found is None:
            raise RefusedError(404, NO_EXPERIMENT)
        return found

    async def description(self, key: str) -> str:
        """The same as the API's JSON.

        Raises:
            RefusedError: there is none.
        """

        def told() -> str:
            found = self.store.experiment(key)
            if found is None:
                raise RefusedError(404, NO_EXPERIMENT)
            return json.dumps(self.described(found))

        return await asyncio.to_thread(told)

    def described(self, found: Experiment) -> dict[str, Any]:
        """An experiment as the body of an answer."""
        shown = view(found, self.results.kept_until(found), whole=True)
        return {"success": True, "experiment_id": found.id, "experiment": shown}

    async def experiments(self, limit: int, before: int | None) -> list[Experiment]:
        """The newest experiments, or those before one."""
        return await asyncio.to_thread(self.store.experiments, limit, before)

    async def listing(self, limit: int, before: int | None) -> str:
        """The same as the API's JSON."""

        def listed() -> str:
            found = self.store.experiments(limit, before)
            shown = [view(each, self.results.kept_until(each), whole=False) for each in found]
            more = None
            if len(found) == limit:
                more = f"{API}/experiments?limit={limit}&before={found[-1].number}"
            return json.dumps({"success": True, "experiments": shown, "next": more})

        return await self._shared(f"list {limit} {before}", listed)

    async def cancel(self, key: str) -> Experiment:
        """Stop whatever waits or runs of an experiment.

        Raises:
            RefusedError: there is no such experiment, or nothing of it waits or runs.
        """
        await self.experiment(key)
        if not await asyncio.to_thread(self.store.cancel, key):
            raise RefusedError(409, "nothing of this experiment waits or runs any more")
        found = await self.experiment(key)
        if found.merge.state == "cancelled":
            await asyncio.to_thread(self.results.remove, key, with_log=False)
        self._tell()
        return found

    async def remove(self, key: str) -> None:
        """Remove an experiment with all that came out of it.

        Raises:
            RefusedError: there is none, or something of it waits or runs.
        """
        await self.experiment(key)
        if not await asyncio.to_thread(self.store.set_removed, key):
            raise RefusedError(409, "something of this experiment waits or runs. Cancel it first")
        await asyncio.to_thread(self.results.remove, key)
        await asyncio.to_thread(self.store.remove, key)
        self._tell()

    async def evaluate(self, key: str, request: EvaluationRequest) -> Experiment:
        """Have the base, the sources and the merge compared.

        Raises:
            RefusedError: there is nothing to compare, or nothing to compare by.
        """
        check_evaluation(request)
        found = await self.experiment(key)
        if found.merge.state == "completed":
            self._check_memory(found.merge.outcome["bytes"])
        content = _storable(request)
        try:
            most = self.settings.queue
            await asyncio.to_thread(self.store.add_evaluation, key, content, most)
        except StateError as error:
            raise RefusedError(409, str(error)) from None
        except QueueFullError as error:
            raise _full(error) from None
        self._tell()
        return await self.experiment(key)

    # Results

    async def result(self, key: str) -> Experiment:
        """An experiment whose result is there.

        Raises:
            RefusedError: it is not.
        """
        found = await self.experiment(key)
        if found.merge.state != "completed":
            raise RefusedError(409, f"there is no merged model: the merge is {found.merge.state}")
        if found.removed is not None:
            text = "the merged model has been removed: it was kept long enough, or made room"
            raise RefusedError(410, text)
        return found

    async def archive(self, key: str) -> tuple[str, Archive]:
        """What to call the ZIP of a result, and the ZIP."""
        found = await self.result(key)
        name = file_name(found.name)
        entries = [
            Entry(f"{name}/{file['name']}", file["bytes"], file["crc32"])
            for file in found.merge.outcome["files"]
        ]
        return f"{name}.zip", Archive(self.folders.of(key) / "model", entries)

    async def file(self, key: str, name: str) -> File:
        """A file of a result.

        Raises:
            RefusedError: there is no result, or no such file in it.
        """
        found = await self.result(key)
        for file in found.merge.outcome["files"]:
            if file["name"] == name:
                path = self.folders.of(key) / "model" / file["name"]
                return File(path, file["bytes"], file["sha256"])
        raise RefusedError(404, "the merged model has no such file")

    async def page(self, key: str, name: str) -> str:
        """findings.html or comparison.html of an experiment."""
        await self.result(key)
        path = self.folders.of(key) / name
        try:
            return await asyncio.to_thread(path.read_text, encoding="utf-8")
        except FileNotFoundError:
            raise RefusedError(404, "there is no such page of this experiment") from None

    # Watching

    async def watch(self, key: str) -> AsyncIterator[str]:
        """Server-sent events of an experiment until nothing of it waits or runs.

        An experiment that does not exist is told as one that was removed.
        """
        last = ""
        while True:
            changed = self._changed
            event = await self._event(key)
            if event != last:
                yield event
                last = event
            if event.startswith("event: end"):
                return
            try:
                async with asyncio.timeout(HEARTBEAT):
                    await changed.wait()
            except TimeoutError:
                yield ": still there\n\n"

    async def _event(self, key: str) -> str:
        """What there is to tell of an experiment."""

        def told() -> str:
            found = self.store.experiment(key)
            if found is None:
                return 'event: end\ndata: {"status": "removed"}\n\n'
            kind = "progress" if found.is_open else "end"
            return f"event: {kind}\ndata: {json.dumps(progress_view(found))}\n\n"

        return await self._shared(f"event {key}", told)

    async def _shared(self, key: str, make: Callable[[], str]) -> str:
        """A text that is made once for all who ask for it, until something changes."""
        texts = self._texts  # others, after a change
        if key not in texts:
            texts[key] = asyncio.ensure_future(asyncio.to_thread(make))
        try:
            text = await asyncio.shield(texts[key])
        except Exception:
            texts.pop(key, None)
            raise
        whole = (each for each in texts.values() if each.done() and not each.exception())
        if sum(len(each.result()) + ENTRY for each in whole) > MOST_TEXT:
            texts.pop(key, None)
        return text

    async def _look_for_changes(self) -> None:
        version = await asyncio.to_thread(self._changes.version)
        if version != self._version:
            self._version = version
            self._tell()

    def _tell(self) -> None:
        """Something has changed."""
        self._texts = {}
        self._changed.set()
        self._changed = asyncio.Event()

    # Room

    async def health(self) -> dict[str, Any]:
        """How it is doing."""
        counts = await asyncio.to_thread(self.store.counts)
        return {
            "version": VERSION,
            "running": counts.get("running", 0),
            "queued": counts.get("queued", 0),
            "free_disk": shutil.disk_usage(self.settings.data).free,
            "memory_for_a_job": self.runner.memory_bytes,
        }


def _locked(data: Path) -> int:
    """A lock that ends with this process: one server works with a data folder."""
    descriptor = os.open(data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DataBusyError(
            f"{data}: another server works with this data folder. Stop it, or choose another"
        ) from None
    return descriptor


def _full(error: QueueFullError) -> RefusedError:
    return RefusedError(429, f"the queue is full: {error}. Try again later")


def _storable(request: ExperimentRequest | EvaluationRequest) -> dict[str, Any]:
    """A request as JSON that everyone can read: no lone surrogates, no infinite numbers."""
    content = request.model_dump(exclude_unset=True)
    if _depth(content) > DEEPEST:
        text = f"entries lie in one another more than {DEEPEST} deep"
        raise RefusedError(422, text, [Problem("", text)])
    try:
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        text = "a number that is not finite, or a text that is not Unicode. Expected JSON's"
        raise RefusedError(422, text, [Problem("", text)]) from None
    return content


def _depth(value: Any) -> int:
    """How deep entries lie in one another; without recursion, of which Python has little.

    >>> _depth({"a": [1, {"b": 2}]}), _depth(1)
    (3, 0)
    """
    depth, level = 0, [value]
    while level := [
        entry
        for each in level
        if isinstance(each, dict | list)
        for entry in (each.values() if isinstance(each, dict) else each)
    ]:
        depth += 1
    return depth


def check_evaluation(request: EvaluationRequest) -> None:
    """Whether there is something to compare by."""
    if not request.prompts and not request.text.strip():
        text = "say what to compare by: prompts, or a text"
        raise RefusedError(422, text, [Problem("evaluation", text)])


def _name(method: str, models: Sequence[str]) -> str:
    return f"{' and '.join(models[:2])}{' and more' if len(models) > 2 else ''}, {method}"[:200]
