"""A process that does one job: a merge, or an evaluation.

The server starts it as `python -m service.worker`, and tells it what to do in a line of JSON on
its standard input, which stays open: where it ends, the server is gone, and the process stops. What
is merged by then is on the disk, and the next process goes on with it.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model_hashes import REPORT_FILE
from model_locate import split_revision
from model_writer import read_manifest
from service import hub
from service.archive import open_plain
from service.planner import explained, public
from service.processes import this_process, uptime
from service.registry import fingerprint
from service.requests import model_ids, referred, stages_of
from service.store import Job, Progress, Store

LEASE = 30.0
BEAT = 0.5
"""Seconds between two words to the server."""

GRACE = 20.0
"""Seconds in which a process that is to stop brings its work to the disk."""

STOPPED = 75
"""Exit status of a process that was told to stop."""


@dataclass(frozen=True)
class Order:
    """What the server tells a process.

    Attributes:
        store, folder, models: paths: the database, that of the job's results, and that of the
            links to models.
        job, holder: its number, and what the process calls itself.
        recipe: as `requests.recipe_text` has it.
        references: what models are called, by ids.
        folders: of models of this machine by ids, with fingerprints, as they were when the merge
            was planned.
        settings: of `merge.merge_recipe`: device, threads, max_memory, findings.
        download_bytes, cached_bytes: of the Hub's models, what was to come when the merge was
            planned, and what was there.
    """

    store: str
    folder: str
    models: str
    job: int
    holder: str
    recipe: str
    references: Mapping[str, str]
    folders: Mapping[str, Sequence[str]]
    settings: Mapping[str, Any]
    download_bytes: int
    cached_bytes: int


CHUNK = 2**20

STARTING = Progress("starting")


@dataclass
class Watch:
    """Says how far the job is, and that the process is still there."""

    store: Store
    order: Order
    progress: Progress = STARTING
    over: threading.Event = field(default_factory=threading.Event)
    _begin: int = 0
    _first: tuple[float, int] | None = None

    def tell(self, step: str, done: int, total: int) -> None:
        """For `progress` of a merge."""
        now = uptime()
        if self.progress.step != step or done < self.progress.done:
            self._begin, self._first = done, None
        if self._first is None and done > self._begin:
            self._first = now, done  # until now, loops may have been compiled
        speed = None
        if self._first is not None and now - self._first[0] > BEAT:
            speed = (done - self._first[1]) / (now - self._first[0])
        self.progress = Progress(step, done, total, speed)

    def count(self, done: int, total: int) -> None:
        """How many of the things are done of which `say` tells."""
        self.progress = self.progress._replace(done=done, total=total)

    def say(self, step: str) -> None:
        """What is being done; what is counted stays."""
        self.progress = self.progress._replace(step=step, speed=None)

    def run(self) -> None:
        """Until it is over, or the job is another process's."""
        while not self.over.wait(BEAT):
            with contextlib.suppress(sqlite3.Error):  # a full disk, say; it may be over next time
                if not self.store.beat(self.order.job, self.order.holder, LEASE, self.progress):
                    stop_this_process()
                    return

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Watch in a thread of its own."""
        thread = threading.Thread(target=self.run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.over.set()
            thread.join()


class Interrupt:
    """Turns the signal to stop into `KeyboardInterrupt`, but only while there is work to stop.

    What a process says of a job in the database is said whole.
    """

    def __init__(self) -> None:
        self._working = self._asked = False
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which stops us

    def _on_signal(self, *_: object) -> None:
        again, self._asked = self._asked, True
        if self._working and not again:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def possible(self) -> Iterator[None]:
        """Within it, work can be stopped; at its beginning, if that has been asked for by then."""
        self._working = True
        try:
            if self._asked:
                raise KeyboardInterrupt
            yield
        finally:
            self._working = False


def main() -> int:
    """The process; returns its exit status."""
    interrupt = Interrupt()
    order = Order(**json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_leave_with_the_server, daemon=True).start()
    os.chdir(order.models)
    warnings.simplefilter("ignore")
    with Store(Path(order.store)) as store, Store(Path(order.store), durable=False) as beats:
        job = store.claim(order.job, order.holder, this_process(), LEASE)
        if job is None:
            return 0
        watch = Watch(beats, order)
        try:
            with watch.running(), interrupt.possible():
                check_models(order.folders)
                outcome = WORK[job.kind](order, job, watch)
                check_models(order.folders)  # which may have been exchanged meanwhile
                outcome["seconds"] = store.seconds_worked(job.number)
        except KeyboardInterrupt:  # by the server, or because it is gone: not the job's fault
            store.release(order.job, order.holder, "its process was stopped", died=False)
            return STOPPED
        except Exception as error:
            problems = explained(error, str(Path(order.folder) / "model"))
            store.finish(order.job, order.holder, "failed", problems=problems)
            return 1
        store.finish(order.job, order.holder, "completed", outcome=outcome)
    return 0


def check_models(folders: Mapping[str, Sequence[str]]) -> None:
    """Whether the ids of models still mean what they meant when the merge was planned.

    Raises:
        ValueError: they do not.
    """
    problems = []
    for key, (folder, mark) in folders.items():
        link, what = Path(key), "has changed since the merge was asked for"
        if not link.is_symlink() or os.readlink(link) != folder:
            what = "is another model now than it was when the merge was asked for"
        elif not link.is_dir():
            what = "is not there any more"
        elif fingerprint(link) == mark:
            continue
        problems.append(f"{key} {what}. Ask for the merge again")
    if problems:
        raise ValueError("\n".join(problems))


def stop_this_process() -> None:
    """Have the work stop where it can go on later; at the latest after `GRACE`."""
    late = threading.Timer(GRACE, os._exit, [STOPPED])
    late.daemon = True
    late.start()
    os.kill(os.getpid(), signal.SIGTERM)


def _leave_with_the_server() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    stop_this_process()


# A merge


def merge(order: Order, job: Job, watch: Watch) -> dict[str, Any]:
    """Merge by a recipe, or go on with what another process has left."""
    from merge_chain import is_finished, merge_stages

    folder = Path(order.folder)
    model = folder / "model"
    folder.mkdir(parents=True, exist_ok=True)
    stages = stages_of(order.recipe, order.references)
    settings = {**order.settings, "progress": watch.tell}
    with downloads_shown(order, watch):
        if model.is_dir() and not is_finished(stages, model, **settings):
            shutil.rmtree(model)  # by a process before this one, of what has changed since
        report = merge_stages(stages, model, resume=True, **settings)
    watch.say("checksums")
    return {
        "bytes": report.bytes_written,
        "peak_memory": report.peak_memory - report.mapped_memory,  # as plans count it
        "notes": [public(note, str(model)) for note in report.notes],
        "files": sealed(model),
        "findings": write_findings(folder),
    }


def sealed(model: Path) -> list[dict[str, Any]]:
    """The files of a model, with what a download needs to know of them."""
    manifest = read_manifest(model)
    known = {} if manifest is None else manifest["files"]
    found = []
    for path in sorted(model.iterdir()):
        sha256 = known.get(path.name, {}).get("sha256")
        digest, size, crc = hashlib.sha256(), 0, 0
        with open_plain(path) as file:
            while piece := file.read(CHUNK):
                size, crc = size + len(piece), zlib.crc32(piece, crc)
                if sha256 is None:  # of the manifest itself
                    digest.update(piece)
        sha256 = sha256 or digest.hexdigest()
        found.append({"name": path.name, "bytes": size, "crc32": crc, "sha256": sha256})
    return found


def write_findings(folder: Path) -> bool:
    """The page with heat maps, if the report has what it needs."""
    from merge_analysis import analysis_page, saved_analysis

    saved = json.loads((folder / "model" / REPORT_FILE).read_text(encoding="utf-8"))
    analysis = saved_analysis(saved)
    if analysis is None:
        return False
    write_whole(folder / "findings.html", analysis_page(analysis))
    return True


def write_whole(path: Path, text: str) -> None:
    """Write a file that is never there in part."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


@contextlib.contextmanager
def downloads_shown(order: Order, watch: Watch) -> Iterator[None]:
    """While models are downloaded, the growth of their folders in the cache is the progress."""
    wanted = order.download_bytes
    if not wanted:
        yield
        return
    names = {split_revision(name)[0] for name in order.references.values() if "/" in name}
    over = threading.Event()

    def look() -> None:
        while not over.wait(BEAT):
            done = max(0, min(hub.bytes_there(names) - order.cached_bytes, wanted))
            if watch.progress.step in (STARTING.step, "download") and done:
                watch.tell("download", done, wanted)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# An evaluation


def name_of_result(others: Sequence[str]) -> str:
    """What the result is called beside models; "the merge" is no id of any."""
    return "merged" if "merged" not in others else "the merge"


def evaluate(order: Order, job: Job, watch: Watch) -> dict[str, Any]:
    """Compare the base, the sources and the merge."""
    import functools

    from eval_compare import Candidate, Settings, compare
    from eval_page import comparison_page
    from merge_load import load_to_run
    from model_inference import Running, loading_bars

    folder, asked = Path(order.folder), job.request
    base, models = model_ids(order.recipe)
    named = [
        *((base, "base") for base in [base] if base is not None),
        *((model, "source") for model in models),
    ]
    page = folder / "comparison.html"
    page.unlink(missing_ok=True)  # of an earlier time
    called = name_of_result([name for name, _ in named])
    named.append((called, "merge"))
    loaded: list[str] = []

    def load(name: str) -> Running:
        if name not in loaded:
            watch.count(len(loaded), len(named))
            loaded.append(name)
        what = folder / "model" if name == called else referred(name, order.references)
        return load_to_run(what, order.settings["device"])

    candidates = [
        Candidate(name, role, functools.partial(load, name))  # type: ignore[arg-type]
        for name, role in named
    ]
    with loading_bars(show=False):
        comparison = compare(
            candidates,
            texts=[asked["text"]] if asked.get("text") else [],
            prompts=asked.get("prompts", []),
            settings=Settings(
                max_new_tokens=asked.get("max_new_tokens", 64), chat=asked.get("chat", False)
            ),
            tell=watch.say,
        )
    write_whole(page, comparison_page(comparison))
    return comparison.to_dict()


WORK: dict[str, Callable[[Order, Job, Watch], dict[str, Any]]] = {
    "merge": merge,
    "evaluation": evaluate,
}

if __name__ == "__main__":
    raise SystemExit(main())
