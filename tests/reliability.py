"""What is promised of runs that stop, tried out: `python tests/reliability.py` does everything.

    python tests/reliability.py faults     every operation on files fails once
    python tests/reliability.py kills      SIGKILL at random moments
    python tests/reliability.py disk       a disk with too little room, or that others fill
    python tests/reliability.py starts     several runs on one output
    python tests/reliability.py inputs     models that are read-only, or vanish
    python tests/reliability.py large --models FOLDER
                                           SIGKILL of merges of FOLDER/base and FOLDER/tuned-*,
                                           as benchmarks/compare.py makes them
    python tests/reliability.py --short    a part of the cases, as in the test suite

Prints a line for each, with the number of cases; ends with status 1 if one went wrong.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from faults import KINDS, Faults, content_of, operations, run_apart  # noqa: E402
from tiny_adapters import make_lora  # noqa: E402
from tiny_checkpoints import make_llama  # noqa: E402

import lora_llama  # noqa: E402
import merge  # noqa: E402
import merge_command  # noqa: E402
from merge_methods import METHODS  # noqa: E402

ENDS = {"EIO": {6}, "ENOSPC": {5}, "short": {0}, "SIGKILL": {-signal.SIGKILL}}
"""Exit statuses that a fault may lead to. One that comes after the work is done may have none."""

CHAIN = """
name: first
method: ties
base_model: base
models: [a, b]
parameters: {density: 0.5}
---
name: second
method: linear
models: [a, b]
---
method: task_arithmetic
base_model: base
models: [first, second]
"""


def driver(method: str) -> list[str]:
    """Arguments of a driver for the tiny models."""
    models = ["a"] if method in ("nearswap", "arcee_fusion", "passthrough") else ["a", "b"]
    base = ["base"] if METHODS[method].base == "required" else []
    shards = ["--max-shard-size", "12KB", "--findings"]
    return [*base, "--ft_models", *models, "--save", "work/out", *shards]


def scenarios(*, short: bool) -> dict[str, Callable[[list[str]], int]]:
    """What is run, by name: functions of further arguments that return an exit status."""

    def of_driver(method: str) -> Callable[[list[str]], int]:
        given = [*driver(method), "--quiet", "--threads", "1"]
        return lambda more: merge_command.run_command(method, "", [*given, *more])

    methods = ("ties",) if short else tuple(METHODS)
    found = {method: of_driver(method) for method in methods}
    chain = ["chain.yml", "work/out", "--quiet", "--threads", "1"]
    extract = ["extract", "a", "--base", "base", "--rank", "2", "--save", "work/out", "--quiet"]
    found["recipes that use others"] = lambda more: merge.main([*chain, *more])
    found["extraction of an adapter"] = lambda more: lora_llama.main([*extract, *more])
    if not short:
        adapters = ["merge", "lora-1", "lora-2", "--save", "work/out", "--quiet"]
        found["merge of adapters"] = lambda more: lora_llama.main([*adapters, *more])
    return found


@contextlib.contextmanager
def tiny_models() -> Iterator[Path]:
    """A folder with models, recipes and room for work, in which this process then is."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="reliability-") as name:
        place = Path(name).resolve()
        make_llama(place / "base", hidden_size=16, intermediate_size=24, shards=2, tokenizer=True)
        for seed, model in enumerate("ab", 1):
            sizes = {"hidden_size": 16, "intermediate_size": 24}
            make_llama(place / model, seed=seed, base=place / "base", tokenizer=True, **sizes)
        for seed in (1, 2):
            make_lora(place / f"lora-{seed}", place / "base", seed=seed)
        (place / "chain.yml").write_text(CHAIN)
        (place / "work").mkdir()
        os.chdir(place)
        try:
            yield place
        finally:
            os.chdir(before)


def cleared(work: Path) -> None:
    """Leave nothing of the last run."""
    shutil.rmtree(work)
    work.mkdir()


class WrongEndError(Exception):
    """A promise that was not kept."""


def check_end(
    status: int, allowed: set[int], work: Path, reference: Mapping[str, bytes], log: Path
) -> None:
    """Whether a run ended as it may: as it should, without an output or with the right one."""
    said = log.read_text()[-2000:]
    there = (work / "out").exists()
    if status == 0 and not there:
        raise WrongEndError(f"status 0 without an output\n{said}")
    if there and content_of(work / "out") != reference:
        raise WrongEndError(f"a wrong output, status {status}\n{said}")
    if status not in (allowed | {0} if there else allowed):
        raise WrongEndError(f"status {status}, expected {allowed}\n{said}")


def check_resumed(
    run: Callable[[list[str]], int], work: Path, reference: Mapping[str, bytes], log: Path
) -> None:
    """Whether the run can be gone on with, and then has the right output and leaves nothing."""
    status = run_apart(lambda: run(["--resume"]), log)
    if status != 0:
        raise WrongEndError(f"--resume ended with status {status}\n{log.read_text()[-2000:]}")
    if content_of(work / "out") != reference:
        raise WrongEndError("--resume made another output")
    if left := sorted({*os.listdir(work)} - {"out"}):
        raise WrongEndError(f"--resume left {left}")


def faults(options: argparse.Namespace) -> Counter[str]:
    """Every operation on files fails in turn, in a new run and in one that goes on."""
    with ProcessPoolExecutor(options.jobs) as pool:
        return sum(pool.map(faults_of_job, [options] * options.jobs, itertools.count()), Counter())


def faults_of_job(options: argparse.Namespace, job: int) -> Counter[str]:
    """The share of one of the processes of `faults`."""
    done: Counter[str] = Counter()
    short, step = options.short, options.step if options.short else 1
    with tiny_models() as place:
        work, log, half = place / "work", place / "log", place / "half"
        inputs = {each: content_of(place / each) for each in ("base", "a", "b")}
        for name, run in scenarios(short=short).items():
            if options.only not in (None, name):
                continue
            assert run([]) == 0, name
            reference = content_of(work / "out")
            cleared(work)
            assert run_apart(lambda run=run: run([]), log, Faults(place)) == 0
            middle = operations(log) * 2 // 3
            cleared(work)
            run_apart(lambda run=run: run([]), log, Faults(place, "SIGKILL", middle))
            shutil.copytree(work, half)
            for resumed in (False, True):
                more = ["--resume"] if resumed else []
                where = "going on" if resumed else "new"
                for kind in KINDS:
                    for at in itertools.count(step * (job + 1), step * options.jobs):
                        cleared(work)
                        if resumed:
                            shutil.copytree(half, work, dirs_exist_ok=True)
                        fault = Faults(place, kind, at)
                        status = run_apart(lambda run=run, more=more: run(more), log, fault)
                        happened = status == -signal.SIGKILL or operations(log) >= at
                        try:
                            check_end(status, ENDS[kind] if happened else {0}, work, reference, log)
                            check_resumed(run, work, reference, log)
                        except WrongEndError as wrong:
                            print(f"WRONG: {name}, {where}, {kind} no. {at}: {wrong}", flush=True)
                            done["wrong"] += 1
                        if not happened:
                            break
                        done[kind] += 1
                cases = sum(done.values())
                print(f"job {job}: {name}, {where}: {cases} cases so far", flush=True)
            shutil.rmtree(half)
            cleared(work)
        if inputs != {each: content_of(place / each) for each in inputs}:
            print("WRONG: an input was changed")
            done["wrong"] += 1
    return done


TIES = [*driver("ties"), "--quiet", "--threads", "2", "--densities", "0.5", "0.5"]


def ties(more: Sequence[str] = ()) -> int:
    """The merge that is disturbed in all campaigns but the first."""
    return merge_command.run_command("ties", "", [*TIES, *more])


def complain(done: Counter[str], text: str) -> None:
    """Note that something went wrong."""
    print(f"WRONG: {text}", flush=True)
    done["wrong"] += 1


def start(work: Callable[[], int], log: Path) -> int:
    """Begin some work in a forked process, with its output in a file; the process's number."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
            status = work()
        finally:
            os._exit(status)
    return child


def ended(child: int) -> int:
    """How a process ended."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextlib.contextmanager
def tiny_merge() -> Iterator[tuple[Path, Mapping[str, bytes], float]]:
    """The tiny models, the output of their merge, and the seconds that it takes when warm."""
    with tiny_models() as place:
        assert ties() == 0
        cleared(place / "work")
        started = time.monotonic()
        assert run_apart(ties, place / "log") == 0
        seconds = time.monotonic() - started
        reference = content_of(place / "work/out")
        cleared(place / "work")
        yield place, reference, seconds


def kills(options: argparse.Namespace) -> Counter[str]:
    """SIGKILL at random moments, one to five times, before a run that may end."""
    done: Counter[str] = Counter()
    chance = random.Random(options.seed)
    with tiny_merge() as (place, reference, seconds):
        work, log = place / "work", place / "log"
        wanted = options.count or (50 if options.short else 1000)
        while done["kills"] < wanted:
            cleared(work)
            for _ in range(chance.randint(1, 5)):
                child = start(lambda: ties(["--resume"]), log)
                time.sleep(chance.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
                if ended(child) == -signal.SIGKILL:
                    done["kills"] += 1
                if (work / "out").exists() and content_of(work / "out") != reference:
                    complain(done, f"seed {options.seed}: a wrong output after a kill")
            try:
                check_resumed(lambda more: ties(more), work, reference, log)
                done["resumed"] += 1
            except WrongEndError as wrong:
                complain(done, f"seed {options.seed}, {done['kills']} kills: {wrong}")
    return done


def starts(options: argparse.Namespace) -> Counter[str]:
    """Several runs on one output at once; one of them makes it, the others say so at once."""
    done: Counter[str] = Counter()
    chance = random.Random(options.seed)
    with tiny_merge() as (place, reference, _):
        work = place / "work"
        for number in range(options.count or (10 if options.short else 100)):
            cleared(work)
            if killed := number % 3 == 2:  # something has been left
                run_apart(ties, place / "log", Faults(place, "SIGKILL", chance.randint(100, 600)))
            ready, go = os.pipe()
            count = chance.choice([2, 4, 8])
            logs = [place / f"log-{index}" for index in range(count)]
            more = ["--resume"] if chance.random() < 0.5 else []

            def when_told(ready: int = ready, more: Sequence[str] = more) -> int:
                os.read(ready, 1)
                return ties(more)

            children = [start(when_told, log) for log in logs]
            os.close(ready)
            os.write(go, b"x" * count)
            os.close(go)
            ends = sorted(ended(child) for child in children)
            # Who comes when all is done finds it, or with --resume says that it is done.
            late = {0} if more else {2, 6}
            if not (ends.count(0) >= 1 and {*ends} <= {0, 7} | late):
                said = "".join(log.read_text() for log in logs)
                complain(done, f"round {number}, killed {killed}: ended with {ends}\n{said}")
            elif not more and ends.count(0) != 1:
                complain(done, f"round {number}: {ends.count(0)} runs made one output")
            elif content_of(work / "out") != reference or os.listdir(work) != ["out"]:
                complain(done, f"round {number}: a wrong output, or something is left")
            done["rounds"] += 1
            done["turned away"] += ends.count(7)
    return done


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    """A disk of so many bytes, as `place`, for a while."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def can_mount(place: Path) -> bool:
    """Whether this process may make small disks."""
    try:
        with small_disk(place, 2**20):
            return True
    except (subprocess.CalledProcessError, FileNotFoundError):
        return False


def disk(options: argparse.Namespace) -> Counter[str]:
    """Disks of 10 to 110 percent of the need, of just the need, and such that others fill."""
    done: Counter[str] = Counter()
    chance = random.Random(options.seed)
    with tiny_merge() as (place, reference, seconds):
        work, log = place / "work", place / "log"
        if not can_mount(work):
            print("disk: left out, as no disks can be made here (root)")
            return done
        with small_disk(work, 2**16):
            assert run_apart(ties, log) == 5
            (need,) = re.findall(r"the result needs ([\d,]+) bytes", log.read_text())
        exact = int(need.replace(",", ""))
        for size in [*range(exact // 10, exact * 11 // 10, exact // 20), exact - 4096, exact]:
            size = size // 4096 * 4096
            with small_disk(work, size):
                status = run_apart(ties, log)
                fits = size >= exact
                if status != (0 if fits else 5):
                    complain(done, f"{size} bytes of {exact}: status {status}\n{log.read_text()}")
                elif fits and content_of(work / "out") != reference:
                    complain(done, f"{size} bytes: a wrong output")
                elif not fits and (os.listdir(work) or "the disk has" not in log.read_text()):
                    complain(done, f"{size} bytes: left {os.listdir(work)}\n{log.read_text()}")
                done["sizes"] += 1
        for number in range(2 if options.short else 20):
            with small_disk(work, exact + 2**20):
                child = start(ties, log)
                time.sleep(chance.uniform(0, seconds))
                with contextlib.suppress(OSError), (work / "filler").open("wb") as file:
                    while True:
                        file.write(bytes(2**14))
                status = ended(child)
                (work / "filler").unlink()
                try:
                    check_end(status, {0, 5}, work, reference, log)
                    check_resumed(lambda more: ties(more), work, reference, log)
                except WrongEndError as wrong:
                    complain(done, f"filled, no. {number}: {wrong}")
                done["filled"] += 1
    return done


def inputs(options: argparse.Namespace) -> Counter[str]:
    """Models that only can be read, and models whose files vanish meanwhile."""
    done: Counter[str] = Counter()
    chance = random.Random(options.seed)
    with tiny_merge() as (place, reference, seconds):
        work, log, models = place / "work", place / "log", place / "a"
        files = [path for name in ("base", "a", "b") for path in (place / name).iterdir()]
        for path in files:
            path.chmod(0o444)
        for name in ("base", "a", "b"):
            (place / name).chmod(0o555)
        place.chmod(0o755)
        work.chmod(0o777)
        log.chmod(0o666)

        def as_nobody() -> int:
            if os.getuid() == 0:  # whom permissions do not concern
                os.setgid(65534)
                os.setuid(65534)
            return ties()

        status = run_apart(as_nobody, log)
        if status or content_of(work / "out") != reference:
            complain(done, f"read-only models: status {status}\n{log.read_text()}")
        done["read-only"] += 1
        for name in ("base", "a", "b"):
            (place / name).chmod(0o755)
        shutil.copytree(models, place / "kept")
        for number in range(10 if options.short else 200):
            cleared(work)
            child = start(ties, log)
            time.sleep(chance.uniform(0, seconds))
            shutil.rmtree(models)
            try:
                check_end(ended(child), {0, 3, 6}, work, reference, log)
            except WrongEndError as wrong:
                complain(done, f"vanished, no. {number}: {wrong}")
            shutil.copytree(place / "kept", models)
            cleared(work)
            done["vanished"] += 1
    return done


def large(options: argparse.Namespace) -> Counter[str]:
    """SIGKILL of the real command at random moments, on models of a real size."""
    done: Counter[str] = Counter()
    if options.models is None:
        print("large: left out, as --models is not given")
        return done
    chance = random.Random(options.seed)
    work = options.models / "work"
    work.mkdir()
    tuned = [str(path) for path in sorted(options.models.glob("tuned-*"))]
    command = [sys.executable, str(ROOT / "ties_llama.py"), str(options.models / "base")]
    command += ["--ft_models", *tuned, "--densities", *["0.5"] * len(tuned)]
    command += ["--save", str(work / "out"), "--quiet", "--json", "--max-shard-size", "500MB"]
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    reference = {path.name: sha256(path) for path in (work / "out").iterdir()}
    while done["kills"] < (options.count or 20):
        cleared(work)
        waited = chance.uniform(0.5, seconds)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(waited)
            seconds = waited  # it was faster this time
            continue
        process.kill()
        done["kills"] += process.wait() == -signal.SIGKILL
        report = subprocess.run([*command, "--resume"], stdout=subprocess.PIPE, check=False)
        found = {path.name: sha256(path) for path in (work / "out").iterdir()}
        if report.returncode or found != reference or os.listdir(work) != ["out"]:
            complain(done, f"killed after {waited:.1f} s of {seconds:.1f}")
        said = json.loads(report.stdout)
        kept = said["bytes_kept"] / said["bytes_written"]
        print(
            f"killed after {waited:4.1f} of {seconds:4.1f} s, {kept:4.0%} kept, "
            f"{said['seconds']:4.1f} s to the end",
            flush=True,
        )
    shutil.rmtree(work)
    return done


def sha256(path: Path) -> str:
    """Of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


CAMPAIGNS = {
    "faults": faults,
    "kills": kills,
    "disk": disk,
    "starts": starts,
    "inputs": inputs,
    "large": large,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("campaign", nargs="*", choices=[*CAMPAIGNS, []], default=[])
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--step", type=int, default=17, help="of faults, with --short")
    parser.add_argument("--only", help="of faults, the merge of this name, such as ties")
    parser.add_argument("--jobs", type=int, default=1, help="processes of faults")
    parser.add_argument("--count", type=int, help="cases of kills, starts and large")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", type=Path, help="for large")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # forked processes have no other threads
    wrong = 0
    for name in arguments.campaign or CAMPAIGNS:
        started = time.monotonic()
        done = CAMPAIGNS[name](arguments)
        wrong += done.pop("wrong", 0)
        cases = ", ".join(f"{count} {kind}" for kind, count in done.items())
        print(f"{name}: {cases}; {wrong} wrong; {time.monotonic() - started:.0f} s", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
