"""Carry out a recipe: plan it, merge into a folder, or into a transformers model in memory."""

import errno
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from merge_analysis import Analysis, make_analysis
from merge_card import model_card, saved_report
from merge_findings import analyze, told
from merge_memory import (
    Fit,
    anonymous_memory,
    fit_memory,
    mapped_memory,
    peak_memory,
    remember_compiled,
)
from merge_operations import arithmetic, make_operations, numba_problem
from merge_plan import Earlier, Plan, free_bytes, open_plan, usable_cores
from merge_progress import progress_bar
from merge_recipe import Recipe
from merge_report import (
    RECIPE_FILE,
    REPORT_FILE,
    MergeReport,
    PlanReport,
    plan_report,
    resolved_parameters,
    resolved_slices,
    vocabulary_summary,
)
from merge_stream import Sink, StreamSettings, stream
from merge_yaml import write_recipes
from model_checks import HEAD
from model_errors import ModelCompatibilityError
from model_prep import resize_vocabulary, set_special_ids, warn_about
from model_small_files import GENERATION
from model_utils import FolderWriter, format_bytes, get_llama, parse_size
from model_verify import verify_folder

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


TRANSFORMERS_BYTES = 300 * 10**6
"""What torch and transformers take themselves; measured, rounded up."""


@dataclass(frozen=True)
class RunSettings:
    """How a merge is run; nothing here changes the result on a CPU.

    Attributes:
        device: where to compute, "cpu" or "cuda".
        threads: parts of tensors worked on at once; by default one per core.
        max_memory: most memory of the process, such as "2GB" or a number of bytes, without files
            that the system caches; by default there is no limit, and a merge takes about 120 MB
            and 2 to 20 MB for each thread, as `plan` says.
        findings: also find out, in the last pass, what each model has changed and where they
            disagree; for the report.
        progress: show how far it is, on stderr.
    """

    device: str = "cpu"
    threads: int | None = None
    max_memory: str | int | None = None
    findings: bool = False
    progress: bool = True

    def problems(self) -> list[str]:
        """What is wrong with them."""
        problems = []
        if self.threads is not None and not (type(self.threads) is int and self.threads >= 1):
            problems.append(f"threads must be a whole number of at least 1, got {self.threads!r}")
        if self.max_memory is not None:
            try:
                parse_size(self.max_memory, "max_memory")
            except ValueError as error:
                problems.append(str(error))
        return [*problems, *_device_problems(self.device)]

    def fit(self, plan: Plan, beside: int = 0) -> Fit:
        """What fits into `max_memory`; `beside` are bytes that the result takes in memory.

        Raises:
            ValueError: nothing does.
        """
        limit = None if self.max_memory is None else parse_size(self.max_memory)
        loops = plan.loops
        packages = arithmetic(self.device, loops)
        held = anonymous_memory() + beside
        threads = self.threads or usable_cores()
        fit = fit_memory(plan, packages, threads, limit, held, findings=self.findings)
        if "numba" not in packages and self.device == "cpu" and loops != "none":
            note = (
                f"numba cannot be imported ({numba_problem()}), so torch computes, many times "
                "slower"
            )
            fit = replace(fit, notes=(*fit.notes, note))
        return fit


def _device_problems(device: str) -> Iterator[str]:
    if device == "cpu":
        return
    import torch

    try:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are known")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        yield f"device {device!r} cannot be used here ({reason}). Use device 'cpu'"


def plan(
    recipe: Recipe,
    *,
    device: str = "cpu",
    threads: int | None = None,
    max_memory: str | int | None = None,
    earlier: Earlier | None = None,
) -> PlanReport:
    """What a merge would do, from config.json, tokenizer files and headers alone.

    Of models on the Hub that the cache lacks, only these are fetched; no weights are read.

    Arguments and errors as `merge_to_folder`; the recipe needs no `output_dir`.
    """
    settings = RunSettings(device, threads, max_memory)
    beside = 0 if earlier is None else earlier.memory_bytes
    with open_plan(recipe, settings.problems(), weights=False, earlier=earlier) as opened:
        return plan_report(opened, settings.fit(opened, beside), earlier or Earlier())


def merge_to_folder(
    recipe: Recipe,
    *,
    device: str = "cpu",
    threads: int | None = None,
    max_memory: str | int | None = None,
    findings: bool = False,
    progress: bool = True,
    earlier: Earlier | None = None,
) -> MergeReport:
    """Merge model folders into a new folder, in memory that does not grow with the models.

    Args:
        recipe: with an `output_dir`.
        device, threads, max_memory, findings, progress: see `RunSettings`.
        earlier: results of earlier recipes that this one uses; see `merge_chain.open_earlier`.

    Raises:
        ValueError: something is wrong with the parameters or the output.
        ModelCompatibilityError: models cannot be read or do not fit together.
        OSError: the disk is full, or a file cannot be read or written.
    """
    if recipe.output_dir is None:
        raise ValueError("output_dir must name the folder to make, got None")
    started = time.monotonic()
    settings = RunSettings(device, threads, max_memory, findings, progress)
    with _open_for_merging(recipe, settings, earlier) as plan:
        if findings:
            _check_same_models(plan)
        fit = settings.fit(plan, 0 if earlier is None else earlier.memory_bytes)
        _check_space(recipe.output_dir, plan.write_bytes)
        size = parse_size(recipe.max_shard_size)
        with FolderWriter(recipe.output_dir, plan.tensors, size) as writer:
            found = _stream(plan, fit, writer, settings)
            report = _report(plan, fit, found, started)
            _write_small_files(plan, report, writer, earlier or Earlier())
            _verify(writer.partial, recipe.output_dir)
            writer.commit()
        return replace(report, seconds=time.monotonic() - started)


@contextmanager
def _open_for_merging(
    recipe: Recipe, settings: RunSettings, earlier: Earlier | None = None
) -> Iterator[Plan]:
    """A plan whose weights can be read; what speaks against it is said before any download."""
    problems = settings.problems()
    with open_plan(recipe, problems, weights=False, earlier=earlier) as plan:
        if not plan.download_bytes:
            yield plan
            return
    with open_plan(recipe, problems, earlier=earlier) as plan:
        yield plan


def _write_small_files(
    plan: Plan, report: MergeReport, writer: FolderWriter, earlier: Earlier
) -> None:
    """Everything that belongs to a model besides its weights."""
    for path in plan.carried.copies:
        writer.copy_file(path)
    for name, edit in plan.carried.edits.items():
        writer.write_text(name, edit.make())
    saved = saved_report(plan, report, earlier)
    writer.write_text(REPORT_FILE, json.dumps(saved, indent=2, ensure_ascii=False) + "\n")
    writer.write_text(RECIPE_FILE, write_recipes([*saved["earlier"], saved["recipe"]]))
    writer.write_text("README.md", model_card(saved))
    writer.write_text("config.json", plan.config_text)


def _verify(partial: Path, output_dir: Path) -> None:
    """Check what was written, as far as that takes no second reading of the weights."""
    problems = verify_folder(partial, read_weights=False).problems
    if problems:
        raise ModelCompatibilityError(
            f"{problem.replace(str(partial), str(output_dir))}. So the result is not what was "
            "planned, and was removed"
            for problem in problems
        )


def merge_to_model(
    recipe: Recipe,
    *,
    device: str = "cpu",
    threads: int | None = None,
    max_memory: str | int | None = None,
    progress: bool = True,
) -> "PreTrainedModel":
    """Merge model folders into one transformers model, float32, on the CPU.

    Only the result is held in memory, however many models go in.

    Arguments and errors as `merge_to_folder`; the recipe has no `output_dir` and no `dtype`.
    Warns (`UserWarning`) with what the report would note on how the models are brought together.
    """
    if recipe.slices:
        raise ValueError(
            "a recipe with slices can be merged into a folder only: a model in memory has the "
            "layers of its config. Use merge_to_folder"
        )
    settings = RunSettings(device, threads, max_memory, progress=progress)
    with _open_for_merging(replace(recipe, dtype="float32"), settings) as plan:
        fit = settings.fit(plan, beside=_model_bytes(plan))
        of_models = [note for source in plan.sources for note in source.notes]
        # where a driver's function is called
        warn_about(plan.alignment, stacklevel=5, of_models=of_models)
        model = get_llama(plan.template.path)
        resize_vocabulary(model, plan.alignment.vocabulary.rows, tied=plan.alignment.tied)
        set_special_ids(model, plan.alignment.special_ids)
        model.generation_config = _generation_config(plan, model)
        _check_names(plan, model)
        _stream(plan, fit, ModelSink(model), settings)
        return model


def _model_bytes(plan: Plan) -> int:
    """What a model in memory takes, while its vocabulary is resized and its libraries loaded."""
    embeddings = sum(task.info.nbytes for task in plan.tasks if task.row_map is not None)
    libraries = 0 if "transformers" in sys.modules else TRANSFORMERS_BYTES
    return plan.write_bytes + embeddings + libraries


def _generation_config(plan: Plan, model: "PreTrainedModel") -> "GenerationConfig":
    """The one that a folder would get; from the model's config where it would get none."""
    from transformers import GenerationConfig

    text = plan.carried.text(GENERATION)
    if text is None:
        return GenerationConfig.from_model_config(model.config)
    return GenerationConfig.from_dict(json.loads(text))


def _check_names(plan: Plan, model: "PreTrainedModel") -> None:
    """Every tensor of a loaded model must be merged, and the other way round."""
    tied = {HEAD} if plan.alignment.tied else set()
    differing = sorted(model.state_dict().keys() ^ (plan.tensors.keys() | tied))
    if differing:
        raise ModelCompatibilityError(
            f"{plan.template.label}: transformers loads this model with other tensors than its "
            f"files hold ({', '.join(differing[:3])}). Merge to a folder instead"
        )


class ModelSink:
    """Writes merged rows into a model in memory."""

    def __init__(self, model: "PreTrainedModel") -> None:
        self.tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def write_rows(self, name: str, first: int, rows: NDArray[np.float32]) -> None:
        """As `FolderWriter.write_rows`."""
        self.tensors[name].reshape(-1, rows.shape[1])[first : first + len(rows)] = rows


def _stream(
    plan: Plan, fit: Fit, sink: Sink, run_settings: RunSettings
) -> dict[str, Mapping[str, Any]]:
    loops = plan.loops
    merge_group = plan.observe if run_settings.findings else plan.merge
    with (
        make_operations(run_settings.device, loops, finish=plan.finish) as operations,
        progress_bar(plan.read_bytes, plan.recipe.method, show=run_settings.progress) as on_bytes,
    ):
        settings = StreamSettings(fit.threads, fit.block_bytes, on_bytes)
        findings = stream(
            plan.groups,
            lambda tasks: merge_group(tasks, operations),
            plan.passes_of,
            operations,
            plan.sources,
            sink,
            settings,
        )
        remember_compiled(plan, arithmetic(run_settings.device, loops))
        return {task.name: findings[task.name] for task in plan.tasks if task.name in findings}


def analyze_models(
    recipe: Recipe,
    *,
    device: str = "cpu",
    threads: int | None = None,
    max_memory: str | int | None = None,
    progress: bool = True,
    earlier: Earlier | None = None,
) -> Analysis:
    """What the models of a recipe have changed and where they disagree, without merging them.

    Of the tensors that the recipe merges. Arguments and errors as `merge_to_folder`; the recipe
    needs no `output_dir`.
    """
    settings = RunSettings(device, threads, max_memory, findings=True, progress=progress)
    with _open_for_merging(recipe, settings, earlier) as plan:
        _check_same_models(plan)
        fit = settings.fit(plan, 0 if earlier is None else earlier.memory_bytes)
        tasks = [task for task in plan.tasks if not task.copied]
        if not tasks:
            raise ValueError("include and exclude leave no tensor to analyze")
        passes = 2 if plan.base is not None else 1
        nbytes = plan.read_bytes_of(tasks, passes)
        with (
            make_operations(device) as operations,
            progress_bar(nbytes, "analysis", show=progress) as on_bytes,
        ):
            findings = stream(
                [[task] for task in tasks],
                lambda group: analyze(group, operations, has_base=plan.base is not None),
                lambda _: passes,
                operations,
                plan.sources,
                Nowhere(),
                StreamSettings(fit.threads, fit.block_bytes, on_bytes),
            )
        return make_analysis(
            plan, {task.name: findings[task.name] for task in plan.tasks if task.name in findings}
        )


def _check_same_models(plan: Plan) -> None:
    """What models have changed cannot be added up where slices have other models."""
    if not plan.same_models:
        raise ValueError(
            "--findings and --analyze compare the same models in all layers, and these slices have "
            "different ones. Ask without slices, or of slices of the same models"
        )


class Nowhere:
    """A sink for passes that merge nothing."""

    def write_rows(self, name: str, first: int, rows: NDArray[Any]) -> None:
        """Never called."""
        raise AssertionError(name)


def _check_space(output_dir: Path, need: int) -> None:
    free = free_bytes(output_dir)
    if need > free:
        raise OSError(
            errno.ENOSPC,
            f"{output_dir}: the result needs {format_bytes(need)}, the disk has "
            f"{format_bytes(free)} free. Make room or choose another place",
        )


def _report(
    plan: Plan, fit: Fit, findings: Mapping[str, Mapping[str, Any]], started: float
) -> MergeReport:
    recipe = plan.recipe
    by_tensor, groups = told(findings)
    return MergeReport(
        method=recipe.method,
        profile=recipe.profile,
        parameters=resolved_parameters(plan),
        slices=resolved_slices(plan),
        options=recipe.options,
        base_model=recipe.base_model,
        models=recipe.models,
        output_dir=None if recipe.output_dir is None else str(recipe.output_dir),
        dtype=plan.dtype,
        vocabulary=vocabulary_summary(plan),
        tensors=len(plan.tasks),
        bytes_read=plan.read_bytes,
        bytes_written=plan.write_bytes,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
        mapped_memory=mapped_memory(),
        files_carried=plan.carried.names,
        files_left=plan.carried.left,
        notes=(*plan.notes, *fit.notes, *plan.method.remarks(findings)),
        findings=by_tensor,
        task_vectors=groups,
    )
