"""A server of the merge service in a process of its own, and a client that speaks to it.

with Server(tmp_path / "data") as server:
    key = server.post("/experiments", {"method": "linear", "models": [...]})["experiment_id"]
    server.finished(key)
"""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
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
    """

    def __init__(
        self, data: Path, *options: object, environment: Mapping[str, str] | None = None
    ) -> None:
        self.data = data
        self.options = options
        self.environment = {**os.environ, **(environment or {})}
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
        )
        self.said = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if line.startswith("llama-merge: "):
                self.port = int(line.rstrip("/\n").rpartition(":")[2])
                return
        self.process.wait()
        self._close()
        raise RuntimeError("".join(self.said))

    def stop(self) -> int:
        """Stop it as Ctrl-C does; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        status = self.process.wait(60)
        self._close()
        return status

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()
        self._close()

    def _close(self) -> None:
        assert self.process.stderr is not None
        self.process.stderr.close()

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

    def experiment(self, key: str) -> Any:
        """An experiment as it is now."""
        return self.get(f"/experiments/{key}")["experiment"]

    def until(self, key: str, holds: Callable[[Any], object], seconds: float = 60) -> Any:
        """Wait until something holds of an experiment; the experiment."""
        end = time.monotonic() + seconds
        while not holds(found := self.experiment(key)):
            assert time.monotonic() < end, found
            time.sleep(0.05)
        return found

    def finished(self, key: str, seconds: float = 60) -> Any:
        """An experiment when it neither waits nor runs."""
        return self.until(key, lambda found: found["status"] not in ("queued", "running"), seconds)


def _well(answer: Answer) -> Any:
    assert 200 <= answer.status < 300, answer.body
    assert answer.json["success"] is True
    return answer.json
