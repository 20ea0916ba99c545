"""The folders of results: what room there is for another, and which have to go."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from model_files import sync_folder
from model_utils import format_bytes
from service import hub
from service.log import log
from service.settings import Settings
from service.store import Experiment, Store

DAY = 86400


class NoRoomError(Exception):
    """There is no room for a result; the text says how much there is."""


@dataclass(frozen=True)
class Folders:
    """Where things lie.

    Attributes:
        store: the database.
        models: links to models, by their ids.
        results: a folder for each experiment.
        logs: what processes say, a file for each experiment.
        passing: what processes write for themselves; empty when none runs.
    """

    store: Path
    models: Path
    results: Path
    logs: Path
    passing: Path

    @classmethod
    def below(cls, data: Path) -> "Folders":
        """Those of a data folder; made if they are not there."""
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        data = data.resolve()  # as merges call what lies in it
        folders = [data / name for name in ("models", "results", "logs", "passing")]
        for folder in folders:
            folder.mkdir(mode=0o700, exist_ok=True)
        return cls(data / "jobs.sqlite3", *folders)

    def of(self, key: str) -> Path:
        """The folder of an experiment."""
        return self.results / key

    def log(self, key: str) -> Path:
        """What the processes of an experiment say."""
        return self.logs / f"{key}.log"


class Results:
    """What has been merged, as files.

    Args:
        store, settings, folders: of the service.
    """

    def __init__(self, store: Store, settings: Settings, folders: Folders) -> None:
        self._store = store
        self._settings = settings
        self._folders = folders

    def in_the_way(self, disk_bytes: int, downloads: Mapping[str, int]) -> list[Experiment]:
        """The oldest results that have to go for another one; nothing is removed yet.

        Args:
            disk_bytes: of the new result, at most.
            downloads: by model, bytes that it needs and that are not on this machine yet.

        Raises:
            NoRoomError: it would not fit even then.
        """
        waiting = [each for each in self._store.open_experiments() if each.merge.is_open]
        sizes = {each.id: self._size(each) for each in waiting}
        to_come = sum(max(0, each.plan["plan"]["disk_bytes"] - sizes[each.id]) for each in waiting)
        going, freed = [], 0
        if self._settings.max_results is not None:
            most = int(self._settings.max_results)
            there = self._store.results()
            sizes |= {each.id: self._size(each) for each in there}
            taken = sum(sizes.values()) + to_come
            for each in there:
                if taken - freed + disk_bytes <= most:
                    break
                if not each.is_open:
                    going.append(each)
                    freed += sizes[each.id]
            if taken - freed + disk_bytes > most:
                raise NoRoomError(
                    f"the merge takes up to {format_bytes(disk_bytes)}, and of the "
                    f"{format_bytes(most)} that all results may take here (max_results), "
                    f"{format_bytes(taken - freed)} are taken by those that are being made or used"
                )
        self._check_disks(disk_bytes, to_come - freed, downloads)
        return going

    def _check_disks(self, needed: int, taken: int, downloads: Mapping[str, int]) -> None:
        """Whether a result has room beside what will be taken, and downloads where they go.

        What several merges need is downloaded once.
        """
        here, cache = self._settings.data, hub.cache_folder()
        if any(downloads.values()):
            cache = next(path for path in (cache, *cache.parents) if path.exists())
            others = self._store.downloads()
            coming, all_coming = sum(downloads.values()), sum({**others, **downloads}.values())
            if cache.stat().st_dev == here.stat().st_dev:
                needed, taken = needed + coming, taken + all_coming - coming
            else:
                self._check_disk(cache, coming, all_coming - coming, "the Hub's cache")
        self._check_disk(here, needed, taken, "the results")

    def _check_disk(self, place: Path, needed: int, taken: int, what: str) -> None:
        free = shutil.disk_usage(place).free - taken - int(self._settings.disk_reserve)
        if needed > free:
            raise NoRoomError(
                f"the merge takes up to {format_bytes(needed)} on the disk of {what}, and "
                f"{format_bytes(max(free, 0))} are left for it there. Remove experiments that are "
                "no longer needed"
            )

    def _size(self, experiment: Experiment) -> int:
        """What is there of a result by now; it may be about to be made or removed."""
        found = 0
        for folder, _, names in os.walk(self._folders.of(experiment.id)):
            for name in names:
                with contextlib.suppress(OSError):
                    found += os.lstat(os.path.join(folder, name)).st_blocks * 512
        return found

    def kept_until(self, experiment: Experiment) -> float | None:
        """When a result will be removed; None if it is not there, or stays."""
        finished, days = experiment.merge.finished, self._settings.keep_days
        is_there = experiment.merge.state == "completed" and experiment.removed is None
        return finished + days * DAY if days and is_there and finished is not None else None

    def remove(self, key: str, *, with_log: bool = True) -> None:
        """Remove the files of an experiment, maybe without what its processes have said."""
        shutil.rmtree(self._folders.of(key), ignore_errors=True)
        if with_log:
            self._folders.log(key).unlink(missing_ok=True)
        sync_folder(self._folders.results)

    def expire(self, experiments: Sequence[Experiment]) -> None:
        """Remove results; their experiments stay."""
        for each in experiments:
            if self._store.set_removed(each.id):
                self.remove(each.id)

    def tidy(self) -> None:
        """Remove what has been kept long enough: results, and experiments without one.

        Besides what is left of merges that failed, were cancelled or have been removed, as of one
        whose process outlived the server that was to clear it away.
        """
        self._clear_ended()
        self._miss_lost()
        days, now = self._settings.keep_days, time.time()
        if not days:
            return
        self.expire(
            [each for each in self._store.results() if (self.kept_until(each) or now) < now]
        )
        for key in self._store.without_results(now - days * DAY):
            if self._store.set_removed(key):
                self.remove(key)
                self._store.remove(key)

    def clear_left(self) -> None:
        """Remove what a server that has ended was removing, or left lying about."""
        for path in self._folders.passing.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        for path in self._clear_ended():
            log(f"not of this service, and left alone: {path}")
        for path in self._left_logs():
            path.unlink(missing_ok=True)

    def _miss_lost(self) -> None:
        """Results whose files somebody else has removed are not there any more."""
        if not any(self._folders.results.iterdir()):
            return  # a disk that is not there at the moment, maybe: nothing is to be forgotten
        for each in self._store.results():
            folder = self._folders.of(each.id)
            if not (folder / "model").is_dir() and not each.is_open:
                log(f"{each.id}: somebody else has removed its files, {folder}")
                self._store.set_removed(each.id)

    def _clear_ended(self) -> list[Path]:
        """Remove what is left of merges that nobody goes on with; the folders of no experiment."""
        strange = []
        for path in [*self._folders.results.iterdir()]:
            found = self._store.experiment(path.name)
            if found is None:
                strange.append(path)
            elif found.removed is not None:
                self.remove(path.name)
            elif found.merge.state in ("failed", "cancelled"):
                self.remove(path.name, with_log=False)
        return strange

    def _left_logs(self) -> Iterator[Path]:
        for path in self._folders.logs.glob("*.log"):
            if self._store.experiment(path.stem) is None:
                yield path
