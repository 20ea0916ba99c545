"""Starts a process for each job, stops those that are to stop, and takes up what others left.

A job belongs to the process that holds its lease. When that process is gone, whatever ended it,
the job waits again, and the next process goes on with what is on the disk.
"""

import asyncio
import contextlib
import errno
import json
import os
import secrets
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from service.results import Folders, Results
from service.settings import Settings
from service.store import ATTEMPTS, Experiment, Held, Job, State, Store
from service.worker import GRACE, STOPPED, Order

TICK = 0.25
"""Seconds between two looks at the jobs."""

REST = 5.0
"""Seconds after which what went wrong is tried again."""

LATE = 60.0
"""Seconds after the end of a lease in which a process that is alive may still speak up."""

FOR_NOW = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)
"""Why no process could be started, where that is not the job's fault: it waits until it can."""

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Child:
    """A process of ours.

    Attributes:
        job, holder: the job, and what the process calls itself.
        begun: when it was started, on the loop's clock.
        process: the process; None while it is being started.
        stopping: when it was told to stop, on the loop's clock.
        killed: why it was killed; empty where it was not.
    """

    job: int
    holder: str
    begun: float
    process: asyncio.subprocess.Process | None = None
    stopping: float | None = None
    killed: str = ""

    @property
    def age(self) -> float:
        """Seconds since it was started."""
        return asyncio.get_running_loop().time() - self.begun


class Runner:
    """Works through the queue, as a task of the server.

    Args:
        store, settings, folders, results: of the service.
    """

    def __init__(
        self, store: Store, settings: Settings, folders: Folders, results: Results
    ) -> None:
        self._store = store
        self._results = results
        self._settings = settings
        self._folders = folders
        self._children: dict[int, Child] = {}
        self._attending: set[asyncio.Task[None]] = set()
        self._not_begun: Counter[int] = Counter()  # processes that never took their job
        self._memory = settings.memory_bytes

    @property
    def memory_bytes(self) -> int | None:
        """What a job may take."""
        return self._memory

    async def run(self) -> None:
        """Until it is cancelled; then its processes are stopped, and their jobs wait again."""
        try:
            await keep_doing(self._look, TICK)
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
            elif each.left < -LATE:
                self._kill(child, "its process did not answer any more and was killed")
            elif child.age > self._settings.job_hours * 3600:
                text = f"it took longer than the {self._settings.job_hours:g} hours that a job may"
                await asyncio.to_thread(
                    self._store.finish, each.job, each.holder, "failed", problems=[text]
                )
                self._stop(child)
        self._kill_the_late()
        busy = self._children.keys() | {each.job for each in held}
        free = max(0, self._settings.workers - len(busy))
        if free:
            waiting = await asyncio.to_thread(self._store.next_jobs, free + len(busy))
            for job in [each for each in waiting if each not in busy][:free]:
                self._start(job)

    def _take_up(self, held: Held) -> None:
        """A job of another process: of a server that is gone, or of one that is going."""
        if held.process.is_alive():
            if held.left < -LATE:
                with contextlib.suppress(OSError):
                    os.killpg(held.process.pid, signal.SIGKILL)
            return
        state = self._store.release(
            held.job, held.holder, "the server or the machine was restarted", died=True
        )
        job = self._store.job(held.job)
        if job is not None and state in ("cancelled", "failed"):
            self._clear(job)

    # Own processes

    def _start(self, job: int) -> None:
        child = Child(job, secrets.token_hex(8), asyncio.get_running_loop().time())
        self._children[job] = child
        task = asyncio.create_task(self._attend(child))
        self._attending.add(task)
        task.add_done_callback(self._attending.discard)

    async def _attend(self, child: Child) -> None:
        """A job's process from its start to its end."""
        try:
            cause, by_itself = await self._run(child)
            state = await asyncio.to_thread(
                self._store.release, child.job, child.holder, cause, died=by_itself
            )
            job = await asyncio.to_thread(self._store.job, child.job)
            if job is None:
                return
            print(
                f"{job.experiment}: {job.kind} {job.state} ({cause})", file=sys.stderr, flush=True
            )
            if state is None and job.state == "queued":
                state = await self._not_taken(job, cause)
            else:
                self._not_begun.pop(child.job, None)
            if (state or job.state) in ("cancelled", "failed"):
                await asyncio.to_thread(self._clear, job)
        except Exception:  # of the database, say: the job is found again when it answers
            traceback.print_exc()
            await asyncio.sleep(REST)
        finally:
            del self._children[child.job]

    async def _not_taken(self, job: Job, cause: str) -> State | None:
        """What becomes of a job whose process has ended before it took the job."""
        self._not_begun[job.number] += 1
        if self._not_begun[job.number] < ATTEMPTS:
            await asyncio.sleep(1)  # what fails at once is not tried as fast as can be
            return None
        del self._not_begun[job.number]
        text = f"{cause} before it began, {ATTEMPTS} times. The service's log of it says why"
        await asyncio.to_thread(self._store.give_up, job.number, text)
        return "failed"

    async def _run(self, child: Child) -> tuple[str, bool]:
        """A process from its start to its end: why it ended, and whether by itself."""
        job = await asyncio.to_thread(self._store.job, child.job)
        if job is None:
            return "it was removed", False
        found = await asyncio.to_thread(self._store.experiment, job.experiment)
        if found is None:
            return "it was removed", False
        order = self._order(child, found, merges=job.kind == "merge")
        try:
            with self._folders.log(found.id).open("ab") as log:
                child.process = process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "service.worker",
                    stdin=asyncio.subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    cwd=ROOT,
                    env={**os.environ, "TMPDIR": str(self._folders.passing)},
                    start_new_session=True,
                )
        except OSError as error:
            if error.errno in FOR_NOW:
                raise
            return f"no process could be started ({error.strerror})", True
        if child.stopping is not None:  # meanwhile
            _signal(process, signal.SIGTERM)
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):
            process.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
            await process.stdin.drain()
        status = await process.wait()
        return child.killed or _cause(status), status != STOPPED

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
            folders=experiment.plan["folders"],
            settings=settings,
            download_bytes=experiment.plan["plan"]["download_bytes"],
        )

    def _stop(self, child: Child) -> None:
        if child.stopping is None:
            child.stopping = asyncio.get_running_loop().time()
            _signal(child.process, signal.SIGTERM)

    def _kill(self, child: Child, why: str) -> None:
        child.killed = why
        _signal(child.process, signal.SIGKILL)

    def _kill_the_late(self) -> None:
        now = asyncio.get_running_loop().time()
        for child in self._children.values():
            if child.stopping is not None and now >= child.stopping + GRACE:
                self._kill(child, "its process did not stop in time and was killed")

    async def _stop_all(self) -> None:
        for child in self._children.values():
            self._stop(child)
        if self._attending:
            _, late = await asyncio.wait(self._attending, timeout=GRACE)
            self._kill_the_late()
            if late:
                await asyncio.wait(late, timeout=5)

    def _clear(self, job: Job) -> None:
        """Remove what a merge has left that nobody will go on with."""
        if job.kind == "merge":
            self._results.remove(job.experiment, log=False)


def _signal(process: asyncio.subprocess.Process | None, number: int) -> None:
    """To the process, if it has been started, and all that it has started."""
    if process is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


async def keep_doing(look: Callable[[], Awaitable[None]], every: float) -> None:
    """Look after something again and again; what goes wrong is told, and tried again later."""
    while True:
        try:
            await look()
        except Exception:  # a full disk, say: it goes on when that is over
            traceback.print_exc()
            await asyncio.sleep(REST)
        await asyncio.sleep(every)


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
