"""The service under load: 200 clients list, watch and download while a merge runs.

    python benchmarks/service_load.py FOLDER [--minutes 5] [--clients 200]

Makes a base and three models of TinyLlama-1.1B's shape in FOLDER (random weights, bfloat16) and
starts a server. TIES of the three is merged again and again, in turn alone and under load, until
the load has lasted so long: machines have slow and fast minutes, and neighbours share them.
Of the clients, three in five watch the running merge (server-sent events), three in ten ask for a
list or an experiment every 5 seconds, and one in ten downloads a ZIP at 2 MB/s, again and again.
They run in a process of their own that gets what others leave (SCHED_IDLE), as clients would run on
machines of their own.
Prints what answers took, what they were, the server's memory, and the merges' times.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from shutil import rmtree
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.compare import prepare_shape, say  # noqa: E402
from tests.service_server import API, Server  # noqa: E402

SHAPE = "tinyllama-1.1b"
SECONDS_BETWEEN = 5.0
COMING = 3.0
"""Seconds in which they come, one after the other."""

BYTES_A_SECOND = 2 * 10**6
PIECE = 2**16
MERGE = {
    "method": "ties",
    "base_model": "base",
    "models": [{"id": f"tuned-{number}"} for number in (1, 2, 3)],
    "parameters": {"density": 0.5},
    "findings": False,
}


class Clients:
    """All clients, in one process.

    Args:
        port: of the server.
        key: of a finished experiment, for downloads and single answers.

    Attributes:
        times: seconds until an answer began, by kind.
        statuses: how often each came.
        received: bytes of downloads.
    """

    def __init__(self, port: int, key: str) -> None:
        self.port, self.key = port, key
        self.times: dict[str, list[float]] = {
            kind: [] for kind in ("list", "experiment", "watch", "download")
        }
        self.statuses: Counter[int] = Counter()
        self.received = self.events = 0

    @contextlib.asynccontextmanager
    async def _asked(self, kind: str, path: str) -> AsyncIterator[asyncio.StreamReader]:
        """Ask for something; what follows the head of its answer."""
        started = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=PIECE)
        try:
            lines = f"GET {API}{path} HTTP/1.1", "Host: localhost", "Connection: close"
            writer.write("\r\n".join([*lines, "", ""]).encode())
            head = await reader.readuntil(b"\r\n\r\n")
            self.statuses[int(head.split()[1])] += 1
            self.times[kind].append(time.monotonic() - started)
            yield reader
        finally:
            writer.close()

    async def ask(self, kind: str, path: str) -> None:
        """Ask every few seconds."""
        while True:
            async with self._asked(kind, path) as reader:
                await reader.read(-1)
            await asyncio.sleep(SECONDS_BETWEEN)

    async def watch(self) -> None:
        """Watch the merge that runs; when it is over, the next one."""
        while True:
            async with self._asked("list", "/experiments?limit=1") as reader:
                newest = json.loads(await reader.read(-1))["experiments"][0]["id"]
            async with self._asked("watch", f"/experiments/{newest}/events") as reader:
                while line := await reader.readline():
                    self.events += line.startswith(b"event:")
            await asyncio.sleep(SECONDS_BETWEEN)  # until the next merge has begun

    async def download(self) -> None:
        """Download at the pace of a line of 2 MB/s."""
        while True:
            async with self._asked("download", f"/experiments/{self.key}/download") as reader:
                begun, got = time.monotonic(), 0
                while piece := await reader.read(PIECE):
                    got += len(piece)
                    self.received += len(piece)
                    ahead = got / BYTES_A_SECOND - (time.monotonic() - begun)
                    if ahead > 0.25:
                        await asyncio.sleep(ahead)

    def _work(self, number: int) -> Coroutine[Any, Any, None]:
        """What a client does."""
        if number % 10 < 6:
            return self.watch()
        if number % 10 == 9:
            return self.download()
        if number % 2:
            return self.ask("list", "/experiments")
        return self.ask("experiment", f"/experiments/{self.key}")

    async def obey(self, pipe: Connection, count: int) -> None:
        """Come and go as the other end of a pipe says, until it says no more."""
        tasks: list[asyncio.Task[None]] = []
        while (said := await asyncio.to_thread(pipe.recv)) is not None:
            if said == "come":
                for number in range(count):
                    tasks.append(asyncio.create_task(self._work(number)))
                    await asyncio.sleep(COMING / count)
                continue
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if not isinstance(result, asyncio.CancelledError):
                    raise RuntimeError("a client failed") from result
            tasks.clear()


def run_clients(pipe: Connection, port: int, key: str, count: int) -> None:
    """The process of the clients."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    clients = Clients(port, key)
    asyncio.run(clients.obey(pipe, count))
    pipe.send((clients.times, dict(clients.statuses), clients.received, clients.events))


def memory(pid: int) -> dict[str, int]:
    """Resident memory of a process in bytes: all of it, and what are no mapped files."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    named = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
    return {"all": int(named["VmRSS"]) * 1024, "own": int(named["RssAnon"]) * 1024}


def cpu_seconds(pid: int) -> float:
    """What a process has computed so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def merge_once(server: Any) -> float:
    """Seconds of a merge, whose result is removed."""
    key = server.merge(MERGE)
    found = server.finished(key, 600, pause=1.0)
    assert found["status"] == "completed", found["problems"]
    server.ask("DELETE", f"{API}/experiments/{key}")
    return float(found["result"]["seconds"])


def share(times: Sequence[float], part: float) -> float:
    """The time within which such a part of the answers came."""
    return sorted(times)[min(len(times) - 1, int(part * len(times)))]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=200)
    arguments = parser.parse_args(argv)
    prepare_shape(arguments.folder, SHAPE, 3)
    data = arguments.folder / "service-data"
    rmtree(data, ignore_errors=True)
    options = ("--models", arguments.folder / SHAPE, "--watchers", arguments.clients)
    with Server(data, *options) as server:
        small = server.merge()
        server.finished(small)
        kept = server.merge(MERGE)  # what is downloaded; also brings the inputs into the cache
        server.finished(kept, 600)
        pid = server.process.pid
        spawning = multiprocessing.get_context("spawn")
        mine, other = spawning.Pipe()
        clients = spawning.Process(
            target=run_clients, args=(other, server.port, kept, arguments.clients)
        )
        clients.start()
        computed = lasted = 0.0
        most = {"all": 0, "own": 0}
        during, alone = [], [merge_once(server)]
        while lasted < arguments.minutes * 60:
            mine.send("come")
            started, before = time.monotonic(), cpu_seconds(pid)
            time.sleep(COMING)
            during.append(merge_once(server))
            now = memory(pid)
            most = {name: max(most[name], now[name]) for name in most}
            lasted += time.monotonic() - started
            computed += cpu_seconds(pid) - before
            mine.send("go")
            time.sleep(1)
            alone.append(merge_once(server))
        mine.send(None)
        times, statuses, received, events = mine.recv()
        clients.join()
    with contextlib.suppress(OSError):
        rmtree(data)
    say(f"{arguments.clients} clients, {lasted / 60:.1f} minutes")
    for kind, found in times.items():
        say(
            f"  {kind:<11} {len(found):>6} answers, half within {1000 * share(found, 0.5):.0f} ms, "
            f"95% within {1000 * share(found, 0.95):.0f} ms, all within {1000 * max(found):.0f} ms"
        )
    everything = [each for found in times.values() for each in found]
    say(f"  {'all':<11} {len(everything):>6} answers, 95% within "
        f"{1000 * share(everything, 0.95):.0f} ms")  # fmt: skip
    say(f"  statuses {statuses}; {events} events; {received / 10**9:.2f} GB downloaded")
    say(f"  server: at most {most['all'] / 10**6:.0f} MB resident ({most['own'] / 10**6:.0f} MB "
        f"without mapped files), {computed / lasted:.0%} of a core")  # fmt: skip
    ratios = [
        2 * loaded / (before + after)
        for loaded, before, after in zip(during, alone[:-1], alone[1:], strict=True)
    ]
    say(f"  merges alone {shown(alone)}; under load {shown(during)}")
    say(f"  each to the two around it: {statistics.median(ratios) - 1:+.1%} (the median)")
    return 0


def shown(times: Sequence[float]) -> str:
    """Times in a line."""
    return ", ".join(f"{each:.1f}" for each in times) + " s"


if __name__ == "__main__":
    raise SystemExit(main())
