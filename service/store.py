"""Experiments and their jobs, in SQLite: what is asked for, by whom it is worked on, what came out.

A job is held by one process at a time, which says again and again that it is still there (its
lease). Every change is one transaction that looks at the state it changes, so of two processes that
want the same, one gets it. Nothing is stored but numbers, texts and JSON.
"""

import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

from service.processes import Process, uptime

Kind = Literal["merge", "evaluation"]
State = Literal["queued", "running", "completed", "failed", "cancelled"]
STATES: tuple[State, ...] = get_args(State)
OPEN = ("queued", "running")

ATTEMPTS = 3
"""Processes that may die over a job one after the other without getting further with it."""

VERSION = 1
"""Of the schema."""

SCHEMA = """
CREATE TABLE experiments (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    created REAL NOT NULL,
    name TEXT NOT NULL,
    request TEXT NOT NULL,
    recipe TEXT NOT NULL,
    plan TEXT NOT NULL,
    removed REAL
);
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    experiment TEXT NOT NULL REFERENCES experiments(id) ON DELETE CASCADE,
    kind TEXT NOT NULL CHECK (kind IN ('merge', 'evaluation')),
    state TEXT NOT NULL DEFAULT 'queued'
        CHECK (state IN ('queued', 'running', 'completed', 'failed', 'cancelled')),
    request TEXT NOT NULL,
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    stop INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    furthest INTEGER NOT NULL DEFAULT 0,
    furthest_of TEXT NOT NULL DEFAULT '',
    step TEXT NOT NULL DEFAULT '',
    done INTEGER NOT NULL DEFAULT 0,
    total INTEGER NOT NULL DEFAULT 0,
    speed REAL,
    problems TEXT NOT NULL DEFAULT '[]',
    outcome TEXT NOT NULL DEFAULT '{}',
    holder TEXT,
    boot TEXT,
    pid INTEGER,
    born INTEGER,
    lease REAL
);
CREATE INDEX jobs_of_experiment ON jobs (experiment, kind);
CREATE INDEX jobs_by_state ON jobs (state, number);
CREATE TABLE history (
    job INTEGER NOT NULL REFERENCES jobs(number) ON DELETE CASCADE,
    time REAL NOT NULL,
    state TEXT NOT NULL,
    text TEXT NOT NULL
);
CREATE INDEX history_of_job ON history (job);
"""

SHORT = """
    number, id, created, name, '{}' AS request, '' AS recipe, removed,
    json_object(
        'plan', json_object(
            'method', json_extract(plan, '$.plan.method'),
            'disk_bytes', json_extract(plan, '$.plan.disk_bytes')
        ),
        'base', json_extract(plan, '$.base'),
        'models', json_extract(plan, '$.models')
    ) AS plan
"""
"""Columns of `experiments` without what can be long: a hundred of them must fit in memory."""

SHORT_JOB = """
    number, experiment, kind, state, created, started, finished, stop, attempts, step, done,
    total, speed, problems,
    CASE WHEN kind = 'evaluation' THEN json_remove(request, '$.text') ELSE '{}' END AS request,
    CASE WHEN kind = 'merge' THEN outcome ELSE '{}' END AS outcome
"""


BEAT = """
UPDATE jobs SET lease = :lease, step = :step, done = :done, total = :total, speed = :speed,
    attempts = CASE
        WHEN :of = furthest_of AND :done > furthest AND furthest > 0 THEN 1 ELSE attempts END,
    furthest = CASE
        WHEN :total = 0 THEN furthest WHEN :of = furthest_of THEN max(furthest, :done)
        ELSE :done END,
    furthest_of = CASE WHEN :total = 0 THEN furthest_of ELSE :of END
WHERE number = :number AND holder = :holder AND state = 'running'
"""


class QueueFullError(Exception):
    """As many experiments wait or run as may."""


class StateError(Exception):
    """What is asked for does not go with what is; the text says why."""


class Progress(NamedTuple):
    """How far a job is.

    Attributes:
        step: what is being done.
        done, total: bytes, or other units of work; 0 of 0 if not known.
        speed: bytes per second; None if there are none.
    """

    step: str
    done: int = 0
    total: int = 0
    speed: float | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """A row of `jobs`; times are seconds since 1970.

    Attributes:
        problems: why it failed, a text each.
        outcome: what came out, as JSON.
        history: what became of it: times, states and texts.
    """

    number: int
    experiment: str
    kind: Kind
    state: State
    request: Mapping[str, Any]
    created: float
    started: float | None
    finished: float | None
    stop: bool
    attempts: int
    progress: Progress
    problems: tuple[str, ...]
    outcome: Mapping[str, Any]
    history: tuple[tuple[float, str, str], ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether it waits or runs."""
        return self.state in OPEN


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A row of `experiments`, with its jobs.

    Attributes:
        id: by which clients know it; nobody can guess it.
        created: seconds since 1970.
        name: its client's.
        request: as its client sent it. This, the recipe and most of the plan are left out where
            there are several.
        recipe: what is merged, as YAML, with ids as the names of models.
        plan: as it was made before.
        removed: when its result was removed; None while it is there, or yet to come.
        merge: the job.
        evaluation: the last one, if there is any.
        place: in the queue, from 1 on; None if it does not wait.
    """

    number: int
    id: str
    created: float
    name: str
    request: Mapping[str, Any]
    recipe: str
    plan: Mapping[str, Any]
    removed: float | None
    merge: Job
    evaluation: Job | None
    place: int | None

    @property
    def is_open(self) -> bool:
        """Whether any of its jobs waits or runs."""
        return any(job is not None and job.is_open for job in (self.merge, self.evaluation))


class Held(NamedTuple):
    """A job that a process holds.

    Attributes:
        job: its number.
        holder: what the process has called itself.
        process: the process.
        left: seconds until its lease ends; below 0 after that.
        stop: whether it has been asked to stop.
    """

    job: int
    holder: str
    process: Process
    left: float
    stop: bool


class Store:
    """The database; safe to use from several threads and processes.

    Args:
        path: the file; made if it is not there, for its owner alone.
        durable: False where a commit that a power failure undoes does no harm.
    """

    def __init__(self, path: Path, *, durable: bool = True) -> None:
        # Only where it is new: to close a descriptor of a database drops this process's locks on
        # it, and then another process may take it for closed, and remove its log.
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        self._db.execute("PRAGMA foreign_keys = ON")
        with self._transaction():
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in SCHEMA.split(";\n"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {VERSION}")
        if version not in (0, VERSION):
            self.close()
            raise ValueError(
                f"{path}: was made by another version ({version}, expected {VERSION}). Use the "
                "version that made it, or another data folder"
            )

    def close(self) -> None:
        """Nothing more is asked of it."""
        with self._lock:
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def version(self) -> int:
        """A number that differs after others have changed anything."""
        with self._lock:
            return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    # Experiments

    def add(
        self, name: str, request: Mapping[str, Any], recipe: str, plan: Mapping[str, Any], most: int
    ) -> str:
        """A new experiment, which waits; its id.

        Args:
            name, request, recipe, plan: see `Experiment`.
            most: jobs that may wait or run.

        Raises:
            QueueFullError: there are as many already.
        """
        now, key = time.time(), f"exp-{secrets.token_hex(8)}"
        with self._transaction():
            self._check_queue(most)
            self._db.execute(
                "INSERT INTO experiments (id, created, name, request, recipe, plan) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (key, now, name, json.dumps(request), recipe, json.dumps(plan)),
            )
            self._add_job(key, "merge", request)
        return key

    def _check_queue(self, most: int) -> None:
        (waiting,) = self._db.execute(
            "SELECT count(*) FROM jobs WHERE state IN ('queued', 'running')"
        ).fetchone()
        if waiting >= most:
            raise QueueFullError(f"{waiting} jobs wait or run already, and {most} may")

    def add_evaluation(self, key: str, request: Mapping[str, Any], most: int) -> None:
        """Have the models of an experiment and its result compared; in place of an earlier time.

        Args:
            key, request: of the experiment, and what to compare by.
            most: jobs that may wait or run.

        Raises:
            StateError: there is no result, or it is being done already.
            QueueFullError: there are as many jobs already.
        """
        with self._transaction():
            (found,) = self._experiments("WHERE id = ?", (key,)) or (None,)
            if found is None or found.removed is not None or found.merge.state != "completed":
                raise StateError("there is no merged model to evaluate")
            if found.evaluation is not None and found.evaluation.is_open:
                raise StateError("an evaluation of this experiment waits or runs already")
            self._check_queue(most)
            self._db.execute(
                "DELETE FROM jobs WHERE experiment = ? AND kind = 'evaluation'", (key,)
            )
            self._add_job(key, "evaluation", request)

    def _add_job(self, key: str, kind: Kind, request: Mapping[str, Any]) -> None:
        row = self._db.execute(
            "INSERT INTO jobs (experiment, kind, request, created) VALUES (?, ?, ?, ?)",
            (key, kind, json.dumps(request), time.time()),
        )
        self._tell(int(row.lastrowid or 0), "queued", "asked for")

    def experiment(self, key: str) -> Experiment | None:
        """An experiment by its id, with the history of its jobs."""
        with self._lock:
            return next(iter(self._experiments("WHERE id = ?", (key,), history=True)), None)

    def experiments(self, limit: int, before: int | None = None) -> list[Experiment]:
        """The newest experiments; those before a number."""
        bound = 2**62 if before is None else before
        with self._lock:
            return self._experiments(
                "WHERE number < ? ORDER BY number DESC LIMIT ?", (bound, limit)
            )

    def open_experiments(self) -> list[Experiment]:
        """Those that wait or run, the oldest first."""
        with self._lock:
            return self._experiments(
                "WHERE id IN (SELECT experiment FROM jobs WHERE state IN ('queued', 'running')) "
                "ORDER BY number"
            )

    def counts(self) -> dict[str, int]:
        """How many jobs there are of each state that they are in."""
        with self._lock:
            rows = self._db.execute("SELECT state, count(*) AS many FROM jobs GROUP BY state")
            return {row["state"]: row["many"] for row in rows}

    def results(self) -> list[Experiment]:
        """Those with a result that is there, the oldest first."""
        with self._lock:
            return self._experiments(
                "WHERE removed IS NULL AND id IN (SELECT experiment FROM jobs "
                "WHERE kind = 'merge' AND state = 'completed') ORDER BY number"
            )

    def without_results(self, before: float) -> list[str]:
        """The ids of those whose merge failed or was cancelled before a time."""
        with self._lock:
            rows = self._db.execute(
                "SELECT experiment FROM jobs WHERE kind = 'merge' "
                "AND state IN ('failed', 'cancelled') AND finished < ?",
                (before,),
            )
            return [row["experiment"] for row in rows]

    def _experiments(
        self, which: str, values: Sequence[Any] = (), *, history: bool = False
    ) -> list[Experiment]:
        """Some experiments; with their histories, all of what requests and plans say."""
        columns, of_jobs = ("*", "*") if history else (SHORT, SHORT_JOB)
        rows = self._db.execute(f"SELECT {columns} FROM experiments {which}", values).fetchall()
        keys = [row["id"] for row in rows]
        jobs: dict[tuple[str, str], Job] = {}
        for key in keys:
            for row in self._db.execute(
                f"SELECT {of_jobs} FROM jobs WHERE experiment = ? ORDER BY number", (key,)
            ):
                jobs[key, row["kind"]] = _job(row, self._history(row) if history else ())
        places = {
            row["experiment"]: place
            for place, row in enumerate(
                self._db.execute(
                    "SELECT experiment FROM jobs WHERE state = 'queued' ORDER BY number"
                ),
                1,
            )
        }
        return [
            Experiment(
                number=row["number"],
                id=row["id"],
                created=row["created"],
                name=row["name"],
                request=json.loads(row["request"]),
                recipe=row["recipe"],
                plan=json.loads(row["plan"]),
                removed=row["removed"],
                merge=jobs[row["id"], "merge"],
                evaluation=jobs.get((row["id"], "evaluation")),
                place=places.get(row["id"]),
            )
            for row in rows
        ]

    def downloads(self) -> dict[str, int]:
        """By model, bytes that merges which wait or run have yet to download, as planned."""
        with self._lock:
            rows = self._db.execute(
                "SELECT json_extract(plan, '$.plan.models') AS models FROM experiments "
                "WHERE id IN (SELECT experiment FROM jobs "
                "WHERE kind = 'merge' AND state IN ('queued', 'running'))"
            ).fetchall()
        models = [model for row in rows for model in json.loads(row["models"])]
        return {model["name"]: model["download_bytes"] for model in models}

    def seconds_worked(self, number: int) -> float:
        """For how long processes have worked on a job, one after the other."""
        with self._lock:
            rows = self._history({"number": number})
        worked, since = 0.0, None
        for when, state, _ in rows:
            if since is not None:
                worked += when - since
            since = when if state == "running" else None
        return worked + (0.0 if since is None else time.time() - since)

    def _history(self, job: Mapping[str, Any] | sqlite3.Row) -> tuple[tuple[float, str, str], ...]:
        rows = self._db.execute(
            "SELECT time, state, text FROM history WHERE job = ? ORDER BY rowid", (job["number"],)
        )
        return tuple((row["time"], row["state"], row["text"]) for row in rows)

    def set_removed(self, key: str) -> bool:
        """Its result is going to be removed; False if something still waits or runs."""
        with self._transaction():
            found = self._experiments("WHERE id = ?", (key,))
            if not found or found[0].is_open:
                return False
            self._db.execute(
                "UPDATE experiments SET removed = ? WHERE id = ? AND removed IS NULL",
                (time.time(), key),
            )
        return True

    def remove(self, key: str) -> None:
        """Forget an experiment whose files are removed."""
        with self._transaction():
            self._db.execute("DELETE FROM experiments WHERE id = ?", (key,))

    def cancel(self, key: str) -> bool:
        """Ask the jobs of an experiment to stop; whether one of them waited or ran.

        What waits is cancelled now; what runs is stopped by whoever has started it.
        """
        with self._transaction():
            rows = self._db.execute(
                "SELECT number, state, stop FROM jobs WHERE experiment = ? "
                "AND state IN ('queued', 'running')",
                (key,),
            ).fetchall()
            for row in rows:
                if row["state"] == "queued":
                    self._end(row["number"], "cancelled", "cancelled", [], {})
                elif not row["stop"]:
                    self._db.execute("UPDATE jobs SET stop = 1 WHERE number = ?", (row["number"],))
                    self._tell(row["number"], "running", "asked to stop")
        return bool(rows)

    # Jobs

    def next_jobs(self, count: int) -> list[int]:
        """The jobs that have waited longest."""
        with self._lock:
            rows = self._db.execute(
                "SELECT number FROM jobs WHERE state = 'queued' ORDER BY number LIMIT ?", (count,)
            )
            return [row["number"] for row in rows]

    def job(self, number: int) -> Job | None:
        """A job by its number."""
        with self._lock:
            row = self._db.execute("SELECT * FROM jobs WHERE number = ?", (number,)).fetchone()
            return None if row is None else _job(row, ())

    def claim(self, number: int, holder: str, process: Process, lease: float) -> Job | None:
        """Take a job that waits; None if another process was faster, or it has been cancelled."""
        with self._transaction():
            changed = self._db.execute(
                "UPDATE jobs SET state = 'running', holder = ?, boot = ?, pid = ?, born = ?, "
                "lease = ?, attempts = attempts + 1, started = coalesce(started, ?), "
                "step = '', done = 0, total = 0, speed = NULL "
                "WHERE number = ? AND state = 'queued'",
                (holder, *process, uptime() + lease, time.time(), number),
            ).rowcount
            if not changed:
                return None
            self._tell(number, "running", "begun")
        return self.job(number)

    def beat(self, number: int, holder: str, lease: float, progress: Progress) -> bool:
        """Say that the holder is still there and how far it is; False if the job is not its own.

        A job that gets further than any process before may lose as many processes again. Only the
        same step is compared with itself: a download and a merge count other bytes.
        """
        told = progress._asdict()
        told |= {"number": number, "holder": holder, "lease": uptime() + lease}
        told["of"] = f"{progress.step}, {progress.total}"
        with self._transaction():
            return bool(self._db.execute(BEAT, told).rowcount)

    def finish(
        self,
        number: int,
        holder: str,
        state: State,
        *,
        problems: Sequence[str] = (),
        outcome: Mapping[str, Any] = {},
    ) -> bool:
        """The holder's last word on a job; False if it is not its own any more.

        A merge of which an evaluation was asked for is followed by it.
        """
        with self._transaction():
            row = self._db.execute(
                "SELECT * FROM jobs WHERE number = ? AND holder = ? AND state = 'running'",
                (number, holder),
            ).fetchone()
            if row is None:
                return False
            text = problems[0] if problems else state
            self._end(number, state, text, problems, outcome)
            evaluation = json.loads(row["request"]).get("evaluation")
            if state == "completed" and row["kind"] == "merge" and evaluation and not row["stop"]:
                self._add_job(row["experiment"], "evaluation", evaluation)
        return True

    def release(self, number: int, holder: str, cause: str, *, died: bool) -> State | None:
        """Give back a job whose holder has gone; the state it is in then.

        Args:
            number, holder: the job, and who held it.
            cause: why.
            died: the process ended by itself; too often, and the job has failed.

        Returns:
            None if the job was no longer held.
        """
        with self._transaction():
            row = self._db.execute(
                "SELECT attempts, stop FROM jobs WHERE number = ? AND holder = ? "
                "AND state = 'running'",
                (number, holder),
            ).fetchone()
            if row is None:
                return None
            if row["stop"]:
                self._end(number, "cancelled", "cancelled", [], {})
                return "cancelled"
            if died and row["attempts"] >= ATTEMPTS:
                text = (
                    f"{cause}. That happened {row['attempts']} times without the job getting "
                    "further. Look at the machine's memory, and start it again"
                )
                self._end(number, "failed", text, [text], {})
                return "failed"
            self._db.execute(
                "UPDATE jobs SET state = 'queued', holder = NULL, lease = NULL, speed = NULL, "
                "attempts = attempts - ? WHERE number = ?",
                (0 if died else 1, number),
            )
            self._tell(number, "queued", f"{cause}; it goes on from what is done")
        return "queued"

    def note(self, number: int, text: str) -> None:
        """Keep in the history of a job that waits why that is so, once."""
        with self._transaction():
            row = self._db.execute(
                "SELECT state, (SELECT text FROM history WHERE job = number "
                "ORDER BY rowid DESC LIMIT 1) AS last FROM jobs WHERE number = ?",
                (number,),
            ).fetchone()
            if row is not None and row["state"] == "queued" and row["last"] != text:
                self._tell(number, "queued", text)

    def give_up(self, number: int, text: str) -> bool:
        """Fail a job that waits and that no process can take; whether it did wait."""
        with self._transaction():
            waits = "SELECT 1 FROM jobs WHERE number = ? AND state = 'queued'"
            if self._db.execute(waits, (number,)).fetchone() is None:
                return False
            self._end(number, "failed", text, [text], {})
        return True

    def held(self) -> list[Held]:
        """All jobs that a process holds."""
        with self._lock:
            rows = self._db.execute("SELECT * FROM jobs WHERE state = 'running'").fetchall()
        return [
            Held(
                row["number"],
                row["holder"],
                Process(row["boot"], row["pid"], row["born"]),
                row["lease"] - uptime(),
                bool(row["stop"]),
            )
            for row in rows
        ]

    def _end(
        self,
        number: int,
        state: State,
        text: str,
        problems: Sequence[str],
        outcome: Mapping[str, Any],
    ) -> None:
        self._db.execute(
            "UPDATE jobs SET state = ?, finished = ?, problems = ?, outcome = ?, speed = NULL, "
            "holder = NULL, lease = NULL WHERE number = ?",
            (state, time.time(), json.dumps([*problems]), json.dumps(outcome), number),
        )
        self._tell(number, state, text)

    def _tell(self, number: int, state: State, text: str) -> None:
        self._db.execute(
            "INSERT INTO history (job, time, state, text) VALUES (?, ?, ?, ?)",
            (number, time.time(), state, text),
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")


def _job(row: sqlite3.Row, history: tuple[tuple[float, str, str], ...]) -> Job:
    return Job(
        number=row["number"],
        experiment=row["experiment"],
        kind=row["kind"],
        state=row["state"],
        request=json.loads(row["request"]),
        created=row["created"],
        started=row["started"],
        finished=row["finished"],
        stop=bool(row["stop"]),
        attempts=row["attempts"],
        progress=Progress(row["step"], row["done"], row["total"], row["speed"]),
        problems=tuple(json.loads(row["problems"])),
        outcome=json.loads(row["outcome"]),
        history=history,
    )
