"""A server of the merge service in a process of its own, and a client that speaks to it.

with Server(tmp_path / "data") as server:
    key = server.post("/experiments", {"method": "linear", "models": [...]})["experiment_id"]
    server.finished(key)
"""

import contextlib
import http.client
import json
import os
import queue
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
API = "/api/model-merger"
TWO: dict[str, Any] = {
    "method": "linear",
    "models": [{"id": "capitals", "weight": 0.6}, {"id": "elements"}],
}


class Answer:
    """What came back: `status`, `headers` by lower-case names, `body`, and `json`, parsed."""

    def __init__(self, reply: http.client.HTTPResponse) -> None:
        self.status = reply.status
        self.headers = {name.lower(): value for name, value in reply.getheaders()}
        self.body = reply.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """A context manager; `start` and `kill` can also be called by themselves, again and again.

    Args:
        data: its data folder.
        options: of the command line.
        environment: variables, beside those of this process.
        files: that it may have open, if not as many as this process.

    Attributes:
        process: the server, as it was last started.
        said: the lines that it has written since.
    """

    def __init__(
        self,
        data: Path,
        *options: object,
        environment: Mapping[str, str] | None = None,
        files: int | None = None,
    ) -> None:
        self.data = data
        self.options = options
        self.environment = {**os.environ, **(environment or {})}
        self.files = files
        self.port = 0
        self.process: subprocess.Popen[str]
        self.said: list[str] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, on the port that it had before, and wait until it answers."""
        command = [sys.executable, ROOT / "start.py", "--data", self.data, "--port", self.port]
        self.process = subprocess.Popen(
            [*map(str, command), *map(str, self.options)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=self.environment,
            preexec_fn=None if self.files is None else self._limit_files,
        )
        self.said = []
        address: queue.Queue[str] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, args=(address,), daemon=True)
        self._listener.start()
        line = address.get()
        if not line:
            self._ended()
            raise RuntimeError("".join(self.said))
        self.port = int(line.rstrip("/\n").rpartition(":")[2])

    def _limit_files(self) -> None:
        assert self.files is not None
        resource.setrlimit(resource.RLIMIT_NOFILE, (self.files, self.files))

    def _listen(self, address: queue.Queue[str]) -> None:
        """Take what it writes, so that the pipe is never full; the address, or "" at the end."""
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.said.append(line)
                if line.startswith("llama-merge: "):
                    address.put(line)
        address.put("")

    def stop(self) -> int:
        """Stop it as Ctrl-C does; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self._ended()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self._ended()

    def _ended(self) -> int:
        status = self.process.wait(60)
        self._listener.join(60)
        return status

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60,
    ) -> Answer:
        """Send a request; a body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        sent = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        try:
            connection.request(method, path, body, sent)
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def get(self, path: str, **options: Any) -> Any:
        """What the API answers to GET, which is to go well."""
        return _well(self.ask("GET", API + path, **options))

    def post(self, path: str, body: Any = None, **options: Any) -> Any:
        """What the API answers to POST, which is to go well."""
        return _well(self.ask("POST", API + path, body, **options))

    def merge(self, request: Mapping[str, Any] | None = None, **more: Any) -> str:
        """Ask for a merge; the id of the experiment."""
        return str(self.post("/experiments", {**(request or TWO), **more})["experiment_id"])

    def cancel(self, key: str) -> None:
        """Cancel an experiment."""
        self.post(f"/experiments/{key}/cancel")

    def experiment(self, key: str) -> Any:
        """An experiment as it is now."""
        return self.get(f"/experiments/{key}")["experiment"]

    def until(
        self, key: str, holds: Callable[[Any], object], seconds: float = 60, *, pause: float = 0.02
    ) -> Any:
        """Wait until something holds of an experiment; the experiment.

        Args:
            key: of the experiment.
            holds: whether it does.
            seconds: to wait at most.
            pause: seconds between two questions, which cost the server something.
        """
        end = time.monotonic() + seconds
        while not holds(found := self.experiment(key)):
            assert time.monotonic() < end, found
            time.sleep(pause)
        return found

    def finished(self, key: str, seconds: float = 60, *, pause: float = 0.02) -> Any:
        """An experiment when it neither waits nor runs."""

        def is_over(found: Any) -> bool:
            return found["status"] not in ("queued", "running")

        return self.until(key, is_over, seconds, pause=pause)

    def workers(self) -> dict[str, int]:
        """The processes that work on experiments, by their ids, as the database has it."""
        path = self.data / "jobs.sqlite3"
        with contextlib.closing(sqlite3.connect(path, timeout=30)) as database:
            held = "SELECT experiment, pid FROM jobs WHERE state = 'running'"
            return dict(database.execute(held).fetchall())

    def worker(self, key: str, seconds: float = 60) -> int:
        """The process that works on an experiment, as soon as one does."""
        end = time.monotonic() + seconds
        while key not in (found := self.workers()):
            assert time.monotonic() < end, self.experiment(key)
            time.sleep(0.005)
        return found[key]

    @contextlib.contextmanager
    def frozen(self, key: str) -> Iterator[int]:
        """The process that works on an experiment, which stands still meanwhile."""
        worker = self.worker(key)
        os.kill(worker, signal.SIGSTOP)
        try:
            yield worker
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGCONT)


def _well(answer: Answer) -> Any:
    assert 200 <= answer.status < 300, answer.body
    assert answer.json["success"] is True
    return answer.json
