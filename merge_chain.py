"""Recipes that use the results of others: merged in turn, or as the last one reads them.

Where the rows of a result can be merged in any order, it is never written: what a later recipe
reads of it is merged at that moment. Where they cannot (a trim counts along a whole tensor), it is
merged into the folder in which the output is built, and removed at the end.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merge_analysis import Analysis
from merge_grammar import Stage
from merge_identity import verified
from merge_memory import anonymous_memory
from merge_operations import make_operations
from merge_plan import (
    Earlier,
    Plan,
    merged_when_read,
    open_plan,
    place_problems,
    usable_cores,
)
from merge_progress import Progress, teller
from merge_recipe import Recipe
from merge_report import MergeReport, PlanReport, disk_bytes
from merge_run import RunSettings, analyze_models, finished_report, merge_to_folder, plan
from merge_stream import MergedRows
from merge_yaml import RecipeError
from model_config import read_config
from model_hashes import changed_files
from model_locate import split_adapters
from model_partial import PartialFolder
from model_utils import ModelFolder, open_model_folder


class MergedModel(ModelFolder):
    """The result of a recipe as a model: its small files lie in a folder, its weights nowhere.

    Args:
        name: of the recipe.
        path: the folder.
        plan: how it is made.
        rows: merges what is read; None if nothing will be.
    """

    def __init__(self, name: str, path: Path, plan: Plan, rows: MergedRows | None) -> None:
        super().__init__(name, path)
        self.config_text = plan.config_text
        self.config = read_config(plan.config_text)
        self.tensors = plan.tensors
        self._order = {task.name: number for number, task in enumerate(plan.tasks)}
        self._rows = rows

    def read_rows(
        self, name: str, first: int, stop: int, buffer: NDArray[np.uint8]
    ) -> NDArray[Any]:
        """As `ModelFolder.read_rows`; merged now."""
        assert self._rows is not None
        return self._rows.read(name, first, stop, buffer)

    def read_ahead(self, name: str, first: int, stop: int) -> None:
        """Nothing: it is not known yet which rows of its models they need."""

    def position(self, name: str) -> tuple[int, int]:
        """In the order of the tensors."""
        return 0, self._order[name]


def final_stage(stages: Sequence[Stage]) -> Stage:
    """The recipe whose result is wanted: the one without a name, or the last."""
    return next((stage for stage in stages if stage.name is None), stages[-1])


def check_stages(stages: Sequence[Stage]) -> list[str]:
    """What the recipes of a file say that does not go together; notes on those that are not used.

    Raises:
        RecipeError: two have one name, several have none, or they use each other in a circle.
    """
    problems = []
    names = [stage.name for stage in stages]
    for index, stage in enumerate(stages):
        if stage.name is None and None in names[:index]:
            problems.append(
                f"{stage.place}: a second recipe without a name. Give all but one a `name`"
            )
        elif stage.name is not None and stage.name in names[:index]:
            problems.append(f"{stage.place}: a second recipe named {stage.name!r}. Rename one")
    by_name = {stage.name: stage for stage in stages if stage.name is not None}
    for stage in stages:
        if stage.name is not None and stage.name in _needed(by_name, stage):
            problems.append(f"{stage.place}: {stage.name!r} needs its own result. Break the circle")
    if problems:
        raise RecipeError("\n".join(problems))
    last = final_stage(stages)
    used = {last.name, *_needed(by_name, last)}
    notes = [f"{name!r} of the recipes is not used" for name in by_name if name not in used]
    hidden = [name for name in by_name if Path(name).exists()]
    return notes + [f"{name!r} is the recipe of that name, not the folder" for name in hidden]


def _needed(by_name: Mapping[str, Stage], stage: Stage) -> list[str]:
    """The names of all recipes whose results one needs, each after those that it needs itself."""
    found: dict[str, None] = {}
    seen: set[str] = set()

    def visit(each: Stage) -> None:
        for name in (split_adapters(each).model for each in each.recipe.names):
            if name in by_name and name not in seen:
                seen.add(name)
                visit(by_name[name])
                found[name] = None

    visit(stage)
    return [*found]


def plan_stages(
    stages: Sequence[Stage], output_dir: Path | None = None, **settings: Any
) -> PlanReport:
    """What the final recipe of several would do; arguments and errors as `merge_run.plan`."""
    recipe = replace(_final_recipe(stages), output_dir=output_dir)
    run_settings = _checked(RunSettings(**settings))
    with open_earlier(stages, run_settings) as earlier:
        return plan(recipe, **settings, earlier=earlier)


def merge_stages(
    stages: Sequence[Stage],
    output_dir: Path,
    *,
    findings: bool = False,
    resume: bool = False,
    **settings: Any,
) -> MergeReport:
    """Carry out the final recipe of several; arguments and errors as `merge_run.merge_to_folder`.

    What can be known of any of them from headers alone is refused before anything is merged.
    """
    started = time.monotonic()
    recipe = replace(_final_recipe(stages), output_dir=output_dir)
    run_settings = _checked(RunSettings(**settings, findings=findings, resume=resume))
    with open_earlier(stages, run_settings) as earlier:
        if not earlier.models:
            return merge_to_folder(recipe, **vars(run_settings))
        if resume and (report := finished_report(recipe, run_settings, earlier)):
            return report
        sources = [source for each in earlier.plans.values() for source in each.sources]
        if wrong := place_problems(output_dir, sources):
            raise ValueError("\n".join(wrong))
        needed = plan(recipe, **_of_plan(run_settings), earlier=earlier).disk_bytes
    tell = teller(show=run_settings.progress)
    with PartialFolder(output_dir, resume=resume, tell=tell) as partial:
        partial.check_space(needed)
        with open_earlier(stages, run_settings, partial) as earlier:
            settings = {**vars(run_settings), "resume": False}
            report = merge_to_folder(recipe, **settings, earlier=earlier, partial=partial)
    return replace(
        report,
        bytes_read=report.bytes_read + earlier.bytes_read,
        seconds=time.monotonic() - started,
        notes=(*report.notes, *earlier.notes, *partial.notes),
    )


def is_finished(
    stages: Sequence[Stage], output_dir: Path, *, findings: bool = False, **settings: Any
) -> bool:
    """Whether an output is there that is what `merge_stages` would make, going on with it."""
    recipe = replace(_final_recipe(stages), output_dir=output_dir)
    run_settings = _checked(RunSettings(**settings, findings=findings, resume=True))
    with open_earlier(stages, run_settings) as earlier:
        return finished_report(recipe, run_settings, earlier) is not None


def analyze_stages(
    stages: Sequence[Stage], place: Path, *, progress: Progress = True, **settings: Any
) -> Analysis:
    """Where the models of the final recipe disagree; as `merge_run.analyze_models`.

    Args:
        place: what has to be written down of earlier results is put beside it for a while.
    """
    recipe = _final_recipe(stages)
    run_settings = _checked(RunSettings(**settings, progress=progress))
    with open_earlier(stages, run_settings) as earlier:
        if not earlier.models:
            return analyze_models(recipe, **settings, progress=progress)
    with (
        PartialFolder(place.with_name(f"{place.name}.models"), keep=False) as partial,
        open_earlier(stages, run_settings, partial) as earlier,
    ):
        return analyze_models(recipe, **settings, progress=progress, earlier=earlier)


def _of_plan(settings: RunSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("device", "threads", "max_memory")}


def _checked(settings: RunSettings) -> RunSettings:
    if wrong := settings.problems():
        raise ValueError("\n".join(wrong))
    return settings


def _final_recipe(stages: Sequence[Stage]) -> Recipe:
    unused = check_stages(stages)
    recipe = final_stage(stages).recipe
    return replace(recipe, notes=(*recipe.notes, *unused))


@contextmanager
def open_earlier(
    stages: Sequence[Stage], settings: RunSettings, partial: PartialFolder | None = None
) -> Iterator[Earlier]:
    """The results that the final recipe needs, as open models.

    Args:
        stages: all recipes of a file; `check_stages` finds nothing wrong with them.
        settings: how they are merged.
        partial: where the last result is built, for what has to be written of the others; None if
            only their headers are going to be read.
    """
    by_name = {stage.name: stage for stage in stages if stage.name is not None}
    needed = _needed(by_name, final_stage(stages))
    earlier, weights = Earlier(), partial is not None
    if not needed:
        yield earlier
        return
    with ExitStack() as stack:
        if partial is None:
            small = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="recipes-")))
        else:
            small = partial.small
            small.mkdir()
        for number, name in enumerate(needed):
            recipe = by_name[name].recipe
            opened = stack.enter_context(open_plan(recipe, weights=weights, earlier=earlier))
            if weights and settings.verify_inputs:
                _verify(opened, earlier, settings)
            rows = None
            if merged_when_read(opened):
                fit = settings.fit(opened)
                earlier.memory_bytes += fit.memory_bytes - anonymous_memory()
                if weights:
                    rows = stack.enter_context(_rows(opened, settings, fit.block_bytes))
            else:
                earlier.disk_bytes += disk_bytes(opened)
            if partial is not None and rows is None:
                folder = partial.earlier / str(number)
                _merge_earlier(replace(recipe, output_dir=folder), settings, earlier)
                model = open_model_folder(folder)
                model.label, model.is_input = name, False
            else:
                model = MergedModel(name, _small_files(opened, small / str(number)), opened, rows)
            stack.callback(model.close)
            earlier.models[name], earlier.plans[name] = model, opened
        yield earlier


def _verify(plan: Plan, earlier: Earlier, settings: RunSettings) -> None:
    """Verify what has not been verified for a recipe before."""
    files = [file for source in plan.sources for file in source.files if file not in earlier.hashes]
    threads = settings.threads or usable_cores()
    hashes, unknown = verified(files, threads, progress=settings.progress)
    earlier.hashes.update(hashes)
    earlier.notes += tuple(unknown)


def _merge_earlier(recipe: Recipe, settings: RunSettings, earlier: Earlier) -> None:
    """Merge an earlier result into its folder, unless it is there already, byte for byte."""
    settings = replace(settings, findings=False, verify_inputs=False)
    folder = recipe.output_dir
    assert folder is not None
    if settings.resume and folder.is_dir():
        changed, _ = changed_files(folder, folder.name)
        if not changed and finished_report(recipe, settings, earlier) is not None:
            return
        shutil.rmtree(folder)
    tell = teller(show=settings.progress)
    with PartialFolder(folder, resume=settings.resume, tell=tell) as partial:
        report = merge_to_folder(recipe, **vars(settings), earlier=earlier, partial=partial)
    earlier.bytes_read += report.bytes_read
    earlier.notes += partial.notes


@contextmanager
def _rows(plan: Plan, settings: RunSettings, block_bytes: int) -> Iterator[MergedRows]:
    with make_operations(settings.device, plan.loops, finish=plan.finish) as operations:
        yield MergedRows(
            plan.tasks,
            lambda tasks: plan.merge(tasks, operations),
            operations,
            plan.sources,
            block_bytes,
            plan.recipe.nan_policy,
        )


def _small_files(plan: Plan, folder: Path) -> Path:
    """A folder with everything of a result but its weights."""
    folder.mkdir()
    for path in plan.carried.copies:
        shutil.copyfile(path, folder / path.name)
    for name, edit in plan.carried.edits.items():
        (folder / name).write_text(edit.make(), encoding="utf-8")
    (folder / "config.json").write_text(plan.config_text, encoding="utf-8")
    return folder
