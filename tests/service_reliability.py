"""What is promised of the service's jobs, tried out: `python tests/service_reliability.py`.

50 jobs, while the server and its workers are killed (SIGKILL) 20 times at random moments; the
server is started again each time. In the end each job is done, once, with the bytes that the same
merge gives without the service, or has failed and says why.

    python tests/service_reliability.py --rounds 3 --jobs 50 --kills 20 --seed 0
    python tests/service_reliability.py --short        as in the test suite

Prints a line for each round; ends with status 1 if something went wrong.
"""

import argparse
import contextlib
import hashlib
import http.client
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from service_server import API, Server  # noqa: E402
from tiny_checkpoints import make_llama  # noqa: E402

import merge  # noqa: E402

SIZES = {"layers": 6, "hidden_size": 768, "intermediate_size": 3072, "vocab_size": 8192, "heads": 8}
MODELS = ("base", "one", "two", "three")
REQUESTS = (
    {"method": "linear", "models": ["one", "two"]},
    {"method": "slerp", "models": ["one", "two"], "parameters": {"t": 0.3}},
    {"method": "ties", "models": ["one", "two", "three"], "parameters": {"density": 0.4}},
    {"method": "dare", "models": ["one", "two"], "parameters": {"density": 0.5, "seed": 7}},
    {"method": "task_arithmetic", "models": ["one", "three"], "parameters": {"lambda": 0.5}},
    {"method": "model_stock", "models": ["one", "two", "three"]},
)
LEGAL = {
    (None, "queued"), ("queued", "running"), ("running", "queued"), ("running", "completed"),
    ("running", "failed"), ("running", "running"),
}  # fmt: skip
"""Steps in the life of a job that nobody cancels; running twice is "begun", and what is asked."""


def request_of(number):
    """The request of a job: they take turns."""
    content = REQUESTS[number % len(REQUESTS)]
    needs_base = content["method"] not in ("linear", "slerp")
    models = [{"id": name} for name in content["models"]]
    return {**content, "models": models, **({"base_model": "base"} if needs_base else {})}


def expected(folder):
    """SHA-256 of the weights of each kind of job, merged without the service."""
    found = []
    for number in range(len(REQUESTS)):
        content = request_of(number)
        content["models"] = [{"model": str(folder / each["id"])} for each in content["models"]]
        if "base_model" in content:
            content["base_model"] = str(folder / "base")
        with tempfile.TemporaryDirectory() as place:
            merge.merge_recipe(content, Path(place) / "out", progress=False)
            found.append(sha256(Path(place) / "out" / "model.safetensors"))
    return found


def sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kill_something(server, chance, killed):
    """SIGKILL to the server, or to a worker; a server is started again."""
    pid = None
    if chance.random() < 0.5:
        end = time.monotonic() + 3
        while not (pids := server.workers()) and time.monotonic() < end:
            time.sleep(0.01)
        pid = chance.choice([*pids.values()]) if pids else None
        time.sleep(chance.uniform(0, 0.5))
    if pid is None:
        server.kill()
        killed["server"] += 1
        time.sleep(chance.choice((0, 0.2, 1.5)))
        server.start()
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        killed["worker"] += 1


def run(place, models, wanted, *, jobs, kills, seed):
    """One round; what went wrong, and what is to be told."""
    chance, killed = random.Random(seed), Counter()
    options = ("--workers", 2, "--no-tiny-models", "--changes-per-minute", 1000)
    with Server(place / "data", "--models", models, *options) as server:
        keys = [server.merge(request_of(number)) for number in range(jobs)]
        started = time.monotonic()
        while sum(killed.values()) < kills:
            time.sleep(chance.uniform(0.2, 2.0))
            if not (unfinished := open_jobs(server)):
                break
            kill_something(server, chance, killed)
        while unfinished := open_jobs(server):
            assert time.monotonic() < started + 1800, f"{unfinished} jobs are not done"
            time.sleep(0.3)
        problems = [
            f"job {number}: {problem}"
            for number, key in enumerate(keys)
            for problem in wrong(server, key, wanted[number % len(REQUESTS)])
        ]
        every = [server.experiment(key) for key in keys]
        states = Counter(found["status"] for found in every)
        for found in every:
            if found["status"] == "failed":
                print("\n  ".join(["failed:", *(step["text"] for step in found["history"])]))
        again = sum(
            sum(step["state"] == "running" for step in found["history"]) - 1 for found in every
        )
        seconds = time.monotonic() - started
    left = (place / "data" / "results").rglob("*.partial")
    problems += [f"left behind: {path}" for path in left]
    told = (
        f"{jobs} jobs, SIGKILL of the server {killed['server']} times and of workers "
        f"{killed['worker']} times: {dict(states)}, {again} begun again, {seconds:.0f} s"
    )
    return problems, told


def open_jobs(server):
    """How many experiments wait or run."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        health = server.get("/health")
        return health["running"] + health["queued"]
    return 1


def wrong(server, key, digest):
    """What is wrong with a job that is over."""
    found = server.experiment(key)
    states = [step["state"] for step in found["history"]]
    for step in zip([None, *states], states, strict=False):
        if step not in LEGAL:
            yield f"went from {step[0]} to {step[1]}"
    if states.count("completed") > 1:
        yield "was done twice"
    if found["status"] == "failed":
        if not found["problems"] or not found["problems"][0]:
            yield "failed and does not say why"
        return
    if found["status"] != "completed":
        yield f"is {found['status']} in the end"
        return
    folder = server.data / "results" / key / "model"
    for file in found["result"]["files"]:
        if sha256(folder / file["name"]) != file["sha256"]:
            yield f"{file['name']} is not what the service says"
    (weights,) = (
        each for each in found["result"]["files"] if each["name"].endswith(".safetensors")
    )
    if weights["sha256"] != digest:
        yield "has other bytes than the same merge without the service"
    answer = server.ask("GET", f"{API}/experiments/{key}/download", headers={"Range": "bytes=0-3"})
    if answer.body != b"PK\3\4":
        yield "cannot be downloaded"


def main(argv=None):
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="1 round of 5 jobs and 3 kills")
    parser.add_argument("--place", type=Path, help="folder for models and results")
    arguments = parser.parse_args(argv)
    if arguments.short:
        arguments.rounds, arguments.jobs, arguments.kills = 1, 5, 3
    bad = 0
    with tempfile.TemporaryDirectory(dir=arguments.place) as folder:
        models = Path(folder) / "models"
        for seed, name in enumerate(MODELS):
            base = models / "base" if name != "base" else None
            make_llama(models / name, seed=seed, base=base, **SIZES)
        wanted = expected(models)
        for number in range(arguments.rounds):
            place = Path(folder) / f"round-{number}"
            place.mkdir()
            problems, told = run(
                place,
                models,
                wanted,
                jobs=arguments.jobs,
                kills=arguments.kills,
                seed=arguments.seed + number,
            )
            print(f"round {number + 1}: {told}; {len(problems)} problems", flush=True)
            print("\n".join(problems), end="\n" if problems else "", flush=True)
            bad += len(problems)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
