"""A process beside the server that opens models and plans merges.

What it reads may come from anywhere, and is large: tokenizers, headers, recipes. So it has a limit
of memory and of time, and the server, which only waits for it, stays small and answers others.
"""

import asyncio
import contextlib
import multiprocessing
import os
import resource
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from model_errors import ModelCompatibilityError
from service import hub
from service.log import log
from service.requests import Names, RequestError
from service.schemas import ExperimentRequest

MEMORY = 3 * 2**30
"""Bytes that the process may take; a tokenizer of 128,000 tokens takes some hundred megabytes."""

WAITING = 50
"""Calls that wait or run, at most."""

PLANS = 200
"""After which the process makes way for a new one."""

TOO_LARGE = "the plan took more memory than there is for one. Are the models sound?"
DIED = (
    "the process that makes plans died over this twice, as it does where a plan takes more memory "
    "than there is for one. Are the models sound?"
)


class PlanLimitError(Exception):
    """A plan took longer, or more memory, than it may."""


class BusyError(Exception):
    """As many plans wait as may."""


class Planner:
    """A process that calls functions, as `plan`, one after the other.

    Args:
        folder: with links to the models; the process works in it.
        passing: a folder for what it writes for itself.
        seconds: that a call may take.
    """

    def __init__(self, folder: Path, passing: Path, seconds: float) -> None:
        self._folders = str(folder), str(passing)
        self._seconds = seconds
        self._pool: ProcessPoolExecutor | None = None
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Have a function of a module called in the process; what it returns.

        Raises:
            PlanLimitError: it took too long, or more memory than it may.
            BusyError: too many wait for it already.
        """
        if self._waiting >= WAITING:
            raise BusyError(f"{WAITING} plans wait already")
        self._waiting += 1
        try:
            return await self._run(work, *arguments)
        finally:
            self._waiting -= 1

    async def _run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        async with self._turn:
            with contextlib.suppress(BrokenProcessPool):
                return await self._call(work, *arguments)
            try:  # it may have died before, of something else
                return await self._call(work, *arguments)
            except BrokenProcessPool:
                raise PlanLimitError(DIED) from None

    async def _call(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Call it once; what goes wrong costs the process."""
        self._pool = self._pool or self._start()
        try:
            call = asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)
            return await asyncio.wait_for(asyncio.shield(call), self._seconds)
        except TimeoutError:
            self._kill()
            with contextlib.suppress(BrokenProcessPool, asyncio.CancelledError):
                await call
            raise PlanLimitError(
                f"the plan took longer than {self._seconds:g} s and was given up"
            ) from None
        except MemoryError:
            self._kill()
            raise PlanLimitError(TOO_LARGE) from None
        except BrokenProcessPool:
            self._kill()
            raise

    def close(self) -> None:
        """End the process."""
        self._kill()

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            1,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=self._folders,
            max_tasks_per_child=PLANS,
        )

    def _kill(self) -> None:
        if self._pool is None:
            return
        for process in [*(self._pool._processes or {}).values()]:
            process.kill()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = None


# In that process


def _begin(folder: str, passing: str) -> None:
    """Work among the models, within limits, and only as long as the server is there."""
    tempfile.tempdir = passing
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends this process itself
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    server = multiprocessing.parent_process()
    assert server is not None

    def leave() -> None:
        wait([server.sentinel])
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def plan(
    request: Mapping[str, Any], names: Sequence[Any], output: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What a request would do.

    Args:
        request: of an `ExperimentRequest`.
        names: of `Names`.
        output: where the result would be.
        settings: of `merge.plan_recipe`: device, threads, max_memory.

    Returns:
        "problems" (and "unknown", whether an id is among them); and if there are none "recipe"
        (YAML), "plan", "findings" (whether they can be found out), "base" and "models" (as their
        client names them), "references" (see `Names`, those of the Hub at their commits) of all
        ids that it needs, "cached_bytes" of what is there of the Hub's, and "fingerprints" of the
        others.
    """
    from merge_chain import plan_stages
    from service.registry import fingerprint
    from service.requests import all_ids, model_ids, problems_of, recipe_text, stages_of

    asked, known = ExperimentRequest(**request), Names(*names)
    try:
        text, notes = recipe_text(asked, known)
    except RequestError as error:
        unknown = any(problem.text.startswith("unknown model ") for problem in error.problems)
        return {"problems": [*map(tuple, error.problems)], "unknown": unknown}
    references = {each: known.references[each] for each in all_ids(text)}
    of_hub = {key: name for key, name in references.items() if name != key}
    try:
        fingerprints = {key: fingerprint(Path(key)) for key in references.keys() - of_hub.keys()}
        stages = stages_of(text, known.references)
        findings = _can_be_compared(stages) if asked.findings is None else asked.findings
        report = plan_stages(stages, Path(output), **settings, findings=findings)
    except (ValueError, ModelCompatibilityError, OSError) as error:
        lines = "\n".join(explained(error, output))
        problems = problems_of(ValueError(lines), form=asked.recipe is None)
        return {"problems": [*map(tuple, problems)]}
    base, models = model_ids(text)
    return {
        "problems": [],
        "recipe": text,
        "plan": public_plan(report, notes, output),
        "findings": findings,
        "base": base,
        "models": models,
        "references": references | {key: hub.pinned(name) for key, name in of_hub.items()},
        "cached_bytes": hub.bytes_there({*of_hub.values()}),
        "fingerprints": fingerprints,
    }


def _can_be_compared(stages: Sequence[Any]) -> bool:
    """Whether what the models have changed can be added up: not where slices differ in them."""
    from merge_chain import final_stage

    recipe = final_stage(stages).recipe
    return not recipe.slices and len(recipe.models) > 1


def public_plan(report: Any, notes: Sequence[str], output: str) -> dict[str, Any]:
    """A plan without what it says of this machine's folders."""
    models = tuple(replace(model, folder="") for model in report.models)
    report = replace(report, models=models, notes=(*notes, *report.notes))
    content = asdict(report)
    del content["output_dir"]
    for model in content["models"]:
        del model["folder"]
    content["summary"] = report.summary()
    found: dict[str, Any] = public(content, output)
    return found


def public(value: Any, output: str) -> Any:
    """A text, or what holds texts, as others can be told it.

    The output, and what lies beside it while it is made, have no path; and names of files that are
    not Unicode are escaped.
    """
    if isinstance(value, dict):
        return {public(key, output): public(each, output) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [public(each, output) for each in value]
    if not isinstance(value, str):
        return value
    text = value.encode("utf-8", "backslashreplace").decode()
    text = text.replace(f"{output}/", "the output's ").replace(output, "the output")
    return text.replace(f"{Path(output).parent}/", "")


def explained(error: Exception, output: str) -> list[str]:
    """What went wrong, in lines that tell nothing of this machine's folders."""
    if _is_lack_of_memory(error):
        lines = ["there is too little memory. Allow the service more, or merge smaller models"]
    elif isinstance(error, OSError) and error.errno is not None:  # the system's, with a path
        log("".join(traceback.format_exception(error)))
        name = "" if error.filename is None else f"{Path(os.fsdecode(error.filename)).name}: "
        lines = [f"{name}{error.strerror or type(error).__name__}"]
    elif isinstance(error, ValueError | ModelCompatibilityError | OSError):
        lines = str(error).splitlines()
    else:
        log("".join(traceback.format_exception(error)))
        lines = [f"an error of the program itself ({type(error).__name__}), which its log has"]
    return [public(line, output) for line in lines] or [type(error).__name__]


def _is_lack_of_memory(error: Exception) -> bool:
    """Also PyTorch's: of a GPU it is a class of its own, of the CPU only a text."""
    texts = "not enough memory", "can't allocate memory"
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(each in str(error) for each in texts))
    )


def check_device(device: str) -> None:
    """Whether merges can be computed there; in a process that ends, as it loads PyTorch.

    Raises:
        ValueError: they cannot.
    """
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawning) as pool:
        problems = pool.submit(_problems_of, device).result()
    if problems:
        raise ValueError("\n".join(problems))


def _problems_of(device: str) -> list[str]:
    from merge_run import device_problems

    return [*device_problems(device)]
