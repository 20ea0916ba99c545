"""The service under load: 200 clients list, watch and download while a merge runs.

    python benchmarks/service_load.py FOLDER [--minutes 5] [--clients 200]

Makes a base and three models of TinyLlama-1.1B's shape in FOLDER (random weights, bfloat16) and
starts a server. TIES of the three is merged again and again: alone, then under load, then alone.
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
from collections.abc import Sequence
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
        times: seconds until an answer was there, by kind; of streams and downloads, its beginning.
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

    async def _open(
        self, path: str
    ) -> tuple[int, asyncio.StreamReader, asyncio.StreamWriter, int | None]:
        """Ask for something: status, connection, length of the body."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=PIECE)
        writer.write(
            f"GET {API}{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = next(
            (int(line[15:]) for line in head.splitlines() if line.startswith("content-length:")),
            None,
        )
        status = int(head.split()[1])
        self.statuses[status] += 1
        return status, reader, writer, length

    async def ask(self, kind: str, path: str) -> None:
        """Ask every few seconds."""
        while True:
            started = time.monotonic()
            _, reader, writer, _ = await self._open(path)
            await reader.read(-1)
            self.times[kind].append(time.monotonic() - started)
            writer.close()
            await asyncio.sleep(SECONDS_BETWEEN)

    async def watch(self) -> None:
        """Watch the merge that runs; when it is over, the next one."""
        while True:
            _, reader, writer, _ = await self._open("/experiments?limit=1")
            body = await reader.read(-1)
            writer.close()
            newest = json.loads(body)["experiments"][0]["id"]
            started = time.monotonic()
            _, reader, writer, _ = await self._open(f"/experiments/{newest}/events")
            self.times["watch"].append(time.monotonic() - started)
            while line := await reader.readline():
                self.events += line.startswith(b"event:")
            writer.close()
            await asyncio.sleep(SECONDS_BETWEEN)  # until the next merge has begun

    async def download(self) -> None:
        """Download at the pace of a line of 2 MB/s."""
        while True:
            started = time.monotonic()
            _, reader, writer, _ = await self._open(f"/experiments/{self.key}/download")
            self.times["download"].append(time.monotonic() - started)
            begun, got = time.monotonic(), 0
            while piece := await reader.read(PIECE):
                got += len(piece)
                self.received += len(piece)
                ahead = got / BYTES_A_SECOND - (time.monotonic() - begun)
                if ahead > 0.25:
                    await asyncio.sleep(ahead)
            writer.close()

    async def run(self, count: int, seconds: float) -> None:
        """All of them, for so long."""
        tasks = []
        for number in range(count):
            await asyncio.sleep(min(5.0, seconds / 10) / count)  # they come one after the other
            if number % 10 < 6:
                work = self.watch()
            elif number % 10 < 9:
                kind, path = (
                    ("list", "/experiments")
                    if number % 2
                    else ("experiment", f"/experiments/{self.key}")
                )
                work = self.ask(kind, path)
            else:
                work = self.download()
            tasks.append(asyncio.create_task(work))
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            task.cancel()
        for task in done:
            task.result()


def run_clients(pipe: Connection, port: int, key: str, count: int, seconds: float) -> None:
    """The process of the clients."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    clients = Clients(port, key)
    asyncio.run(clients.run(count, seconds))
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
    found = server.finished(key, 600)
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
    parser.add_argument("--alone", type=int, default=3, help="merges before and after the load")
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
        before = [merge_once(server) for _ in range(arguments.alone)]
        mine, other = multiprocessing.get_context("spawn").Pipe()
        seconds = arguments.minutes * 60
        clients = multiprocessing.get_context("spawn").Process(
            target=run_clients, args=(other, server.port, kept, arguments.clients, seconds)
        )
        computed, started = cpu_seconds(pid), time.monotonic()
        clients.start()
        during: list[float] = []
        most = {"all": 0, "own": 0}
        while time.monotonic() < started + seconds - 20:
            during.append(merge_once(server))
            now = memory(pid)
            most = {name: max(most[name], now[name]) for name in most}
        times, statuses, received, events = mine.recv()
        clients.join()
        computed = (cpu_seconds(pid) - computed) / (time.monotonic() - started)
        after = [merge_once(server) for _ in range(arguments.alone)]
    with contextlib.suppress(OSError):
        rmtree(data)
    say(f"{arguments.clients} clients, {arguments.minutes:g} minutes")
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
        f"without mapped files), {computed:.0%} of a core")  # fmt: skip
    alone, loaded = statistics.median([*before, *after]), statistics.median(during)
    say(f"  merges alone {shown(before)} and {shown(after)}, under load {shown(during)}")
    say(f"  medians {alone:.2f} s and {loaded:.2f} s: {loaded / alone - 1:+.1%}")
    return 0


def shown(times: Sequence[float]) -> str:
    """Times in a line."""
    return ", ".join(f"{each:.1f}" for each in times) + " s"


if __name__ == "__main__":
    raise SystemExit(main())
