"""What is promised of runs that stop, tried out: `python tests/reliability.py` does everything.

    python tests/reliability.py faults           every operation on files fails once
    python tests/reliability.py kills            SIGKILL at random moments
    python tests/reliability.py disk             too little room
    python tests/reliability.py starts           several runs on one output
    python tests/reliability.py --short ...      a part of the cases, as in the test suite

Prints a line for each, with the number of cases; ends with status 1 if one went wrong.
"""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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
    several = METHODS[method].base != "required" or method not in ("nearswap", "arcee_fusion")
    models = ["a"] if method in ("nearswap", "arcee_fusion", "passthrough") else ["a", "b"]
    base = ["base"] if METHODS[method].base == "required" else []
    assert several or len(models) == 1
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


def faults(*, short: bool, step: int) -> Counter[str]:
    """Every operation on files fails in turn, in a new run and in one that goes on."""
    torch.set_num_threads(1)  # forked processes have no other threads
    done: Counter[str] = Counter()
    with tiny_models() as place:
        work, log, half = place / "work", place / "log", place / "half"
        inputs = {each: content_of(place / each) for each in ("base", "a", "b")}
        for name, run in scenarios(short=short).items():
            assert run([]) == 0, name
            reference = content_of(work / "out")
            cleared(work)
            count = Faults(place)
            assert run_apart(lambda run=run: run([]), log, count) == 0
            middle = operations(log) * 2 // 3
            cleared(work)
            run_apart(lambda run=run: run([]), log, Faults(place, "SIGKILL", middle))
            shutil.copytree(work, half)
            for resumed in (False, True):
                more = ["--resume"] if resumed else []
                for kind in KINDS:
                    at = 0
                    while True:
                        at += 1 if not short else step
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
                            where = "going on" if resumed else "new"
                            print(f"WRONG: {name}, {where}, {kind} no. {at}: {wrong}", flush=True)
                            done["wrong"] += 1
                        if not happened:
                            break
                        done[kind] += 1
            shutil.rmtree(half)
            cleared(work)
        if inputs != {each: content_of(place / each) for each in inputs}:
            print("WRONG: an input was changed")
            done["wrong"] += 1
    return done


CAMPAIGNS = {"faults": faults}


def main() -> int:
    """Parse the command line and run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("campaign", nargs="*", choices=[*CAMPAIGNS, []], default=[])
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--step", type=int, default=17)
    arguments = parser.parse_args()
    wrong = 0
    for name in arguments.campaign or CAMPAIGNS:
        started = time.monotonic()
        done = CAMPAIGNS[name](short=arguments.short, step=arguments.step)
        wrong += done.pop("wrong", 0)
        cases = ", ".join(f"{count} {kind}" for kind, count in done.items())
        print(
            f"{name}: {sum(done.values())} cases ({cases}), {wrong} wrong, "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
