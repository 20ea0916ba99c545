"""Starts a process for each job, stops those that are to stop, and takes up what others left.

A job belongs to the process that holds its lease. When that process is gone, whatever ended it,
the job waits again, and the next process goes on with what is on the disk.
"""

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from service.settings import Settings
from service.store import Experiment, Held, Store
from service.worker import GRACE, STOPPED, Order

TICK = 0.25
"""Seconds between two looks at the jobs."""

REST = 5.0
"""Seconds after which what went wrong is tried again."""

NOT_STARTED = 127
"""As the exit status of a process that could not be started."""

LATE = 60.0
"""Seconds after the end of a lease in which a process that is alive may still speak up."""

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Folders:
    """Where things lie.

    Attributes:
        store: the database.
        models: links to models, by their ids.
        results: a folder for each experiment.
        logs: what processes say, a file for each experiment.
    """

    store: Path
    models: Path
    results: Path
    logs: Path

    @classmethod
    def below(cls, data: Path) -> "Folders":
        """Those of a data folder; made if they are not there."""
        folders = cls(data / "jobs.sqlite3", data / "models", data / "results", data / "logs")
        for folder in (data, folders.models, folders.results, folders.logs):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folders

    def of(self, key: str) -> Path:
        """The folder of an experiment."""
        return self.results / key


@dataclass
class Child:
    """A process of ours.

    Attributes:
        job, holder: the job, and what the process calls itself.
        process: the process; None while it is being started.
        stopping: when it was told to stop, on the loop's clock.
    """

    job: int
    holder: str
    process: asyncio.subprocess.Process | None = None
    stopping: float | None = None


class Runner:
    """Works through the queue, as a task of the server.

    Args:
        store, settings, folders: of the service.
    """

    def __init__(self, store: Store, settings: Settings, folders: Folders) -> None:
        self._store = store
        self._settings = settings
        self._folders = folders
        self._children: dict[int, Child] = {}
        self._attending: set[asyncio.Task[None]] = set()
        self._memory = settings.memory_bytes

    @property
    def memory_bytes(self) -> int | None:
        """What a job may take."""
        return self._memory

    async def run(self) -> None:
        """Until it is cancelled; then its processes are stopped, and their jobs wait again."""
        try:
            while True:
                try:
                    await self._look()
                except Exception:  # a full disk, say: the queue goes on when it is over
                    traceback.print_exc()
                    await asyncio.sleep(REST)
                await asyncio.sleep(TICK)
        finally:
            await self._stop_all()

    async def _look(self) -> None:
        held = await asyncio.to_thread(self._store.held)
        ours = {child.holder: child for child in self._children.values()}
        for each in held:
            child = ours.get(each.holder)
            if child is None:
                await asyncio.to_thread(self._take_up, each)
            elif each.stop:
                self._stop(child)
            elif each.running > self._settings.job_hours * 3600:
                text = f"it took longer than the {self._settings.job_hours:g} hours that a job may"
                self._store.finish(each.job, each.holder, "failed", problems=[text])
                self._stop(child)
        self._kill_the_late()
        free = self._settings.workers - len(self._children) - len(held) + len(
            {each.job for each in held} & self._children.keys()
        )  # fmt: skip
        if free > 0:
            for job in await asyncio.to_thread(self._store.next_jobs, free + len(self._children)):
                if job not in self._children and free > 0:
                    free -= 1
                    self._start(job)

    def _take_up(self, held: Held) -> None:
        """A job of another process: of a server that is gone, or of one that is going."""
        if held.process.is_alive():
            if held.left > -LATE:
                return
            with contextlib.suppress(OSError):
                os.killpg(held.process.pid, signal.SIGKILL)
        state = self._store.release(
            held.job, held.holder, "the server or the machine was restarted", died=True
        )
        if state in ("cancelled", "failed"):
            self.clear(held.job)

    # Own processes

    def _start(self, job: int) -> None:
        child = Child(job, secrets.token_hex(8))
        self._children[job] = child
        task = asyncio.create_task(self._attend(child))
        self._attending.add(task)
        task.add_done_callback(self._attending.discard)

    async def _attend(self, child: Child) -> None:
        """A job's process from its start to its end."""
        try:
            status = await self._run(child)
        except OSError as error:
            status = NOT_STARTED
            cause = f"no process could be started ({error.strerror})"
        else:
            cause = _cause(status)
        try:
            state = await asyncio.to_thread(
                self._store.release, child.job, child.holder, cause, died=status != STOPPED
            )
            job = await asyncio.to_thread(self._store.job, child.job)
            if job is not None:
                text = f"{job.experiment}: {job.kind} {job.state} ({cause})"
                print(text, file=sys.stderr, flush=True)
            if job is not None and (state or job.state) in ("cancelled", "failed"):
                await asyncio.to_thread(self.clear, child.job)
            if status not in (0, 1, STOPPED):
                await asyncio.sleep(1)  # what fails at once is not tried as fast as can be
        finally:
            del self._children[child.job]

    async def _run(self, child: Child) -> int:
        job = await asyncio.to_thread(self._store.job, child.job)
        if job is None:
            return 0
        experiment = await asyncio.to_thread(self._store.experiment, job.experiment)
        if experiment is None:
            return 0
        order = self._order(child, experiment, merges=job.kind == "merge")
        with (self._folders.logs / f"{experiment.id}.log").open("ab") as log:
            child.process = process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "service.worker",
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                start_new_session=True,
            )
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):
            process.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
            await process.stdin.drain()
        return await process.wait()

    def _order(self, child: Child, experiment: Experiment, *, merges: bool) -> Order:
        settings: dict[str, Any] = {"max_memory": self._memory}
        if merges:
            settings |= {
                "device": self._settings.device,
                "threads": self._settings.threads,
                "findings": experiment.plan["findings"],
            }
        return Order(
            store=str(self._folders.store),
            folder=str(self._folders.of(experiment.id)),
            models=str(self._folders.models),
            job=child.job,
            holder=child.holder,
            recipe=experiment.recipe,
            references=experiment.plan["references"],
            settings=settings,
            download_bytes=experiment.plan["plan"]["download_bytes"],
        )

    def _stop(self, child: Child) -> None:
        if child.process is None or child.stopping is not None:
            return
        child.stopping = asyncio.get_running_loop().time()
        _signal(child.process, signal.SIGTERM)

    def _kill_the_late(self) -> None:
        now = asyncio.get_running_loop().time()
        for child in self._children.values():
            if child.stopping is not None and now > child.stopping + GRACE and child.process:
                _signal(child.process, signal.SIGKILL)

    async def _stop_all(self) -> None:
        for child in self._children.values():
            self._stop(child)
        if self._attending:
            _, late = await asyncio.wait(self._attending, timeout=GRACE)
            for child in self._children.values():
                if child.process is not None:
                    _signal(child.process, signal.SIGKILL)
            if late:
                await asyncio.wait(late, timeout=5)

    def clear(self, number: int) -> None:
        """Remove what a merge has left that nobody will go on with."""
        job = self._store.job(number)
        if job is not None and job.kind == "merge":
            shutil.rmtree(self._folders.of(job.experiment), ignore_errors=True)


def _signal(process: asyncio.subprocess.Process, number: int) -> None:
    """To the process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _cause(status: int) -> str:
    if status == -signal.SIGKILL:
        return "its process was killed, as the system does where memory runs out"
    if status in (0, 1):
        return "its process has ended"
    if status < 0:
        return f"its process was ended by signal {-status}"
    if status == STOPPED:
        return "its process was stopped"
    return f"its process ended with status {status}"
