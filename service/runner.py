"""Starts a process for each job, stops those that are to stop, and takes up what others left.

A job belongs to the process that holds its lease. When that process is gone, whatever ended it,
the job waits again, and the next process goes on with what is on the disk.
"""

import asyncio
import contextlib
import json
import os
import secrets
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from service.log import log, log_error
from service.processes import uptime
from service.results import Folders, Results
from service.settings import Settings
from service.store import ATTEMPTS, Experiment, Held, Job, State, Store
from service.worker import GRACE, STOPPED, Order

TICK = 0.25
"""Seconds between two looks at the jobs."""

REST = 5.0
"""Seconds after which what went wrong is tried again."""

LONGEST_REST = 60.0
"""Seconds until the next try where processes end before they begin, however often that was."""

LATE = 60.0
"""Seconds after the end of a lease in which a process that is alive may still speak up."""

ROOT = Path(__file__).resolve().parent.parent


class NoProcessError(OSError):
    """No process could be started, which is not the fault of the job that it was for."""


@dataclass
class Child:
    """A process of ours.

    Attributes:
        job, holder: the job, and what the process calls itself.
        begun: when it was started, as `uptime` has it.
        experiment: of the job, once that is known.
        process: the process; None while it is being started.
        stopping: when it was told to stop, as `uptime` has it.
        killed: why it was killed; empty where it was not.
    """

    job: int
    holder: str
    begun: float
    experiment: str = ""
    process: asyncio.subprocess.Process | None = None
    stopping: float | None = None
    killed: str = ""

    @property
    def age(self) -> float:
        """Seconds since it was started."""
        return uptime() - self.begun


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
        self._in_vain: Counter[int] = Counter()  # by job, processes that ended before they began
        self._in_a_row = 0  # of any jobs
        self._rests_until = 0.0  # as `uptime` has it
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
        if free and uptime() >= self._rests_until:
            waiting = await asyncio.to_thread(self._store.next_jobs, self._settings.queue)
            waiting.sort(key=lambda job: self._in_vain[job])  # the others first
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
        child = Child(job, secrets.token_hex(8), uptime())
        self._children[job] = child
        task = asyncio.create_task(self._attend(child))
        self._attending.add(task)
        task.add_done_callback(self._attending.discard)

    async def _attend(self, child: Child) -> None:
        """A job's process from its start to its end."""
        try:
            cause, died = await self._run(child)
            await asyncio.to_thread(self._after, child, cause, died)
        except NoProcessError as error:
            self._rest()
            await asyncio.to_thread(self._store.note, child.job, str(error))
            log(f"{child.experiment}: {error}")
        except Exception:  # of the database, say: the job is found again when it answers
            log_error()
            await asyncio.sleep(REST)
        finally:
            del self._children[child.job]

    def _after(self, child: Child, cause: str, died: bool) -> None:
        """What becomes of a job when its process has ended."""
        state = self._store.release(child.job, child.holder, cause, died=died)
        job = self._store.job(child.job)
        if job is None:  # removed, or an evaluation that another one has taken the place of
            if self._store.experiment(child.experiment) is None:
                self._results.remove(child.experiment)
            return
        if died and state is None and job.state == "queued":
            state = self._not_begun(job, cause)
        else:
            self._in_a_row = 0
            del self._in_vain[child.job]
        state = state or job.state
        if state in ("cancelled", "failed"):
            self._clear(job)
        log(f"{job.experiment}: {job.kind} {state} ({cause})")

    def _not_begun(self, job: Job, cause: str) -> State:
        """What becomes of a job whose process has ended before it took the job.

        It may be the job's fault, or that of this installation. So the others come first, each
        try comes later than the one before, and after a few it has failed.
        """
        self._rest()
        self._in_vain[job.number] += 1
        if self._in_vain[job.number] < ATTEMPTS:
            self._store.note(job.number, f"{cause} before it began")
            return "queued"
        del self._in_vain[job.number]
        text = f"{cause} before it began, {ATTEMPTS} times. The service's log of it says why"
        self._store.give_up(job.number, text)
        return "failed"

    def _rest(self) -> None:
        """Start nothing for a while, as what was started last has not begun."""
        self._in_a_row += 1
        seconds = min(REST * 2 ** min(self._in_a_row - 1, 10), LONGEST_REST)
        self._rests_until = uptime() + seconds

    async def _run(self, child: Child) -> tuple[str, bool]:
        """A process from its start to its end: why it ended, and whether it died over the job.

        Raises:
            NoProcessError: there is none.
        """
        job = await asyncio.to_thread(self._store.job, child.job)
        if job is None:
            return "it was removed", False
        child.experiment = job.experiment
        found = await asyncio.to_thread(self._store.experiment, job.experiment)
        if found is None:
            return "it was removed", False
        order = self._order(child, found)
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
            text = f"no process could be started ({error.strerror}); it is tried again"
            raise NoProcessError(text) from None
        if child.stopping is not None:  # meanwhile
            _signal(process, signal.SIGTERM)
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):
            process.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
            await process.stdin.drain()
        status = await process.wait()
        return child.killed or _cause(status), status != STOPPED and child.stopping is None

    def _order(self, child: Child, experiment: Experiment) -> Order:
        return Order(
            store=str(self._folders.store),
            folder=str(self._folders.of(experiment.id)),
            models=str(self._folders.models),
            job=child.job,
            holder=child.holder,
            recipe=experiment.recipe,
            references=experiment.plan["references"],
            folders=experiment.plan["folders"],
            settings={
                "max_memory": self._memory,
                "device": self._settings.device,
                "threads": self._settings.threads,
                "findings": experiment.plan["findings"],
            },
            download_bytes=experiment.plan["plan"]["download_bytes"],
            cached_bytes=experiment.plan["cached_bytes"],
        )

    def _stop(self, child: Child) -> None:
        if child.stopping is None:
            child.stopping = uptime()
            _signal(child.process, signal.SIGTERM)

    def _kill(self, child: Child, why: str) -> None:
        child.killed = why
        _signal(child.process, signal.SIGKILL)

    def _kill_the_late(self) -> None:
        now = uptime()
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
            self._results.remove(job.experiment, with_log=False)


def _signal(process: asyncio.subprocess.Process | None, number: int) -> None:
    """To the process, if it has been started, and all that it has started."""
    if process is not None and process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


async def keep_doing(look: Callable[[], Awaitable[None]], every: float) -> None:
    """Look after something again and again; what goes wrong is told, and tried again later."""
    while True:
        try:
            await look()
        except Exception:  # a full disk, say: it goes on when that is over
            log_error()
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
