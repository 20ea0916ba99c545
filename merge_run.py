"""Carry out a recipe: plan it, merge into a folder, or into a transformers model in memory."""

import json
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from merge_analysis import Analysis, make_analysis
from merge_card import model_card, public_inputs, saved_report, weight_files
from merge_findings import analyze, restored, stored, told
from merge_finite import remark_on_broken
from merge_identity import copied_hashes, digest, is_older, of_this_run, plan_identity, verified
from merge_memory import (
    Fit,
    anonymous_memory,
    fit_memory,
    mapped_memory,
    peak_memory,
    remember_compiled,
)
from merge_operations import arithmetic, make_operations, numba_problem
from merge_plan import Earlier, Plan, open_plan, usable_cores
from merge_progress import Progress, progress_bar, teller
from merge_recipe import Recipe
from merge_report import (
    MergeReport,
    PlanReport,
    disk_bytes,
    plan_report,
    resolved_parameters,
    resolved_slices,
    small_file_bytes,
    vocabulary_summary,
)
from merge_stream import Nowhere, StreamSettings, stream
from merge_yaml import write_recipes
from model_checks import HEAD
from model_config import read_config
from model_errors import ModelCompatibilityError
from model_files import read_text
from model_hashes import RECIPE_FILE, REPORT_FILE
from model_partial import PartialFolder, bytes_there, tidy
from model_prep import resize_vocabulary, set_special_ids, warn_about
from model_small_files import GENERATION
from model_utils import WeightFile, get_llama, parse_size
from model_verify import verify_folder
from model_writer import FolderWriter, read_manifest

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
        progress: show how far it is, on stderr; or a function of what is being done, the bytes
            done and all bytes, which is called often, in the thread that merges.
        resume: go on with what a stopped run of the same merge has left; if it was finished, do
            nothing.
        verify_inputs: before merging, read all weight files and compare them with the SHA-256
            that are known of them.
    """

    device: str = "cpu"
    threads: int | None = None
    max_memory: str | int | None = None
    findings: bool = False
    progress: Progress = True
    resume: bool = False
    verify_inputs: bool = False

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
        return [*problems, *device_problems(self.device)]

    def fit(self, plan: Plan, beside: int = 0) -> Fit:
        """What fits into `max_memory`; `beside` are bytes that the result takes in memory.

        Raises:
            ValueError: nothing does, or findings are asked for where they cannot be added up.
        """
        if self.findings and not plan.same_models:
            raise ValueError(
                "findings (--findings, --analyze) are of the same models in all layers, and these "
                "slices have different ones. Ask without slices, or of slices of the same models"
            )
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


def device_problems(device: str) -> Iterator[str]:
    """What speaks against computing on a device, as PyTorch calls it."""
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
    findings: bool = False,
    resume: bool = False,
    earlier: Earlier | None = None,
) -> PlanReport:
    """What a merge would do, from config.json, tokenizer files and headers alone.

    Of models on the Hub that the cache lacks, only these are fetched; no weights are read.

    Arguments and errors as `merge_to_folder`; the recipe needs no `output_dir`. With `resume` it
    may be there already, and what it takes, or what a stopped run has left, counts as free.
    """
    settings = RunSettings(device, threads, max_memory, findings)
    beside = 0 if earlier is None else earlier.memory_bytes
    output_dir = recipe.output_dir
    there = bytes_there(output_dir) if resume and output_dir is not None else 0
    if resume and output_dir is not None and output_dir.exists():
        recipe = replace(recipe, output_dir=None)
    with open_plan(recipe, settings.problems(), weights=False, earlier=earlier) as opened:
        fit = settings.fit(opened, beside)
        return plan_report(opened, fit, earlier or Earlier(), output_dir, there)


def merge_to_folder(
    recipe: Recipe,
    *,
    device: str = "cpu",
    threads: int | None = None,
    max_memory: str | int | None = None,
    findings: bool = False,
    progress: Progress = True,
    resume: bool = False,
    verify_inputs: bool = False,
    earlier: Earlier | None = None,
    partial: PartialFolder | None = None,
) -> MergeReport:
    """Merge model folders into a new folder, in memory that does not grow with the models.

    Args:
        recipe: with an `output_dir`.
        device, threads, max_memory, findings, progress, resume, verify_inputs: see `RunSettings`.
        earlier: results of earlier recipes that this one uses; see `merge_chain.open_earlier`.
        partial: where the output is built, if it is open already.

    Raises:
        ValueError: something is wrong with the parameters or the output.
        ModelCompatibilityError: models cannot be read or do not fit together.
        OutputBusyError: another process is making this output.
        OSError: the disk is full, or a file cannot be read or written.
    """
    if recipe.output_dir is None:
        raise ValueError("output_dir must name the folder to make, got None")
    settings = RunSettings(device, threads, max_memory, findings, progress, resume, verify_inputs)
    earlier = earlier or Earlier()
    if resume and (finished := finished_report(recipe, settings, earlier)):
        return finished
    started = time.monotonic()
    with open_plan(recipe, settings.problems(), weights=False, earlier=earlier) as plan:
        fit = settings.fit(plan, earlier.memory_bytes)
        tell = teller(show=progress)
        place = partial or PartialFolder(recipe.output_dir, resume=resume, tell=tell)
        with nullcontext() if partial else place:
            if plan.download_bytes:  # not before it is known that there is room for the result
                place.check_space(disk_bytes(plan))
            with _downloaded(plan, recipe, earlier) as whole:
                report = _merge(whole, fit, settings, earlier, place, started)
        return report if partial else replace(report, notes=(*report.notes, *place.notes))


def _merge(
    plan: Plan,
    fit: Fit,
    settings: RunSettings,
    earlier: Earlier,
    partial: PartialFolder,
    started: float,
) -> MergeReport:
    """Merge into a folder, or what is left of it."""
    identity = plan_identity(plan, earlier, settings.device, findings=settings.findings)
    copied = copied_hashes(plan)
    hashes, unknown = _verified(plan, earlier, settings)
    with FolderWriter(
        partial,
        plan.tensors,
        parse_size(plan.recipe.max_shard_size),
        plan={**identity, **of_this_run(weight_files(plan, earlier), hashes)},
        others=small_file_bytes(plan, findings=settings.findings),
    ) as writer:
        found, bytes_read = _stream(plan, fit, FolderSink(writer), settings)
        for each in (*earlier.plans.values(), plan):
            for source in each.sources:
                source.check_unchanged()
        report = _report(plan, fit, found, started)
        _write_small_files(plan, report, writer, earlier, copied)
        _verify(writer.path, partial.output_dir)
        inputs = public_inputs(plan, earlier, hashes)
        writer.commit({"plan_sha256": digest(identity), "inputs": inputs})
    return replace(
        report,
        bytes_read=bytes_read,
        bytes_kept=writer.kept_bytes,
        seconds=time.monotonic() - started,
        notes=(*report.notes, *unknown),
    )


def _verified(
    plan: Plan, earlier: Earlier, settings: RunSettings
) -> tuple[dict[WeightFile, str], list[str]]:
    """The SHA-256 of all weight files if they are to be verified, and notes on unknown ones.

    Raises:
        ModelCompatibilityError: one is not what it should be.
    """
    if not settings.verify_inputs:
        return {}, []
    files = [file for file in weight_files(plan, earlier) if file not in earlier.hashes]
    threads = settings.threads or usable_cores()
    hashes, unknown = verified(files, threads, progress=settings.progress)
    return {**earlier.hashes, **hashes}, unknown


def finished_report(recipe: Recipe, settings: RunSettings, earlier: Earlier) -> MergeReport | None:
    """The report of a merge whose output is there already; None if it is not, or of another merge.

    Whether its files are intact is what `verify_folder` says; only their sizes are looked at.
    """
    assert recipe.output_dir is not None
    started = time.monotonic()
    manifest = read_manifest(recipe.output_dir)
    if manifest is None:
        return None
    elsewhere, problems = replace(recipe, output_dir=None), settings.problems()
    with open_plan(elsewhere, problems, weights=False, earlier=earlier) as plan:
        identity = plan_identity(plan, earlier, settings.device, findings=settings.findings)
        files = weight_files(plan, earlier)
        if manifest.get("plan_sha256") != digest(identity) or is_older(recipe.output_dir, files):
            return None
        tidy(recipe.output_dir)
        saved = read_config(read_text(recipe.output_dir, REPORT_FILE, str(recipe.output_dir)))
        fit = settings.fit(plan, earlier.memory_bytes)
        report = _report(plan, fit, {}, started)
        return replace(
            report,
            output_dir=str(recipe.output_dir),
            bytes_read=0,
            bytes_kept=plan.write_bytes,
            finished_before=True,
            findings=saved["findings"],
            task_vectors=saved["task_vectors"],
        )


@contextmanager
def _open_for_merging(recipe: Recipe, settings: RunSettings, earlier: Earlier) -> Iterator[Plan]:
    """A plan whose weights can be read; what speaks against it is said before any download."""
    with (
        open_plan(recipe, settings.problems(), weights=False, earlier=earlier) as headers,
        _downloaded(headers, recipe, earlier) as plan,
    ):
        yield plan


@contextmanager
def _downloaded(plan: Plan, recipe: Recipe, earlier: Earlier) -> Iterator[Plan]:
    """A plan whose weights can be read, from one that may have looked at headers on the Hub."""
    if not plan.download_bytes:
        yield plan
        return
    with open_plan(recipe, earlier=earlier) as whole:
        yield whole


def _write_small_files(
    plan: Plan,
    report: MergeReport,
    writer: FolderWriter,
    earlier: Earlier,
    copied: Mapping[str, str],
) -> None:
    """Everything that belongs to a model besides its weights; `copied` has SHA-256 by name."""
    for path in plan.carried.copies:
        writer.copy_file(path, copied[path.name])
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
    progress: Progress = True,
    verify_inputs: bool = False,
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
    settings = RunSettings(
        device, threads, max_memory, progress=progress, verify_inputs=verify_inputs
    )
    with _open_for_merging(replace(recipe, dtype="float32"), settings, Earlier()) as plan:
        fit = settings.fit(plan, beside=_model_bytes(plan))
        of_models = [note for source in plan.sources for note in source.notes]
        # where a driver's function is called
        warn_about(plan.alignment, stacklevel=5, of_models=of_models)
        _, unknown = _verified(plan, Earlier(), settings)
        for note in unknown:
            warnings.warn(note, stacklevel=5)
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
    # What begins with _ is how transformers came to it; transformers 4 would take it for its own.
    entries = {key: value for key, value in json.loads(text).items() if not key.startswith("_")}
    return GenerationConfig.from_dict(entries)


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
    """Writes merged rows into a model in memory.

    Attributes:
        findings: none are known beforehand.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        self.findings: dict[str, Mapping[str, Any]] = {}
        self.tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def write_rows(self, name: str, first: int, rows: NDArray[np.float32]) -> None:
        """As `FolderWriter.write_rows`."""
        self.tensors[name].reshape(-1, rows.shape[1])[first : first + len(rows)] = rows

    def finish(self, findings: Mapping[str, Mapping[str, Any]]) -> None:
        """Nothing is left to do."""


class FolderSink:
    """Writes merged rows into a folder, and what was found out into its records.

    Attributes:
        findings: by tensor, of those that a stopped run has merged.
    """

    def __init__(self, writer: FolderWriter) -> None:
        self.findings = {name: restored(found) for name, found in writer.findings.items()}
        self.write_rows = writer.write_rows
        self._writer = writer

    def finish(self, findings: Mapping[str, Mapping[str, Any]]) -> None:
        """These tensors are complete."""
        self._writer.finish({name: stored(found) for name, found in findings.items()})


def _stream(
    plan: Plan, fit: Fit, sink: ModelSink | FolderSink, run_settings: RunSettings
) -> tuple[dict[str, Mapping[str, Any]], int]:
    """Merge what is not done; what was found out about each tensor, and the bytes read for it."""
    loops, done = plan.loops, sink.findings
    groups = [group for group in plan.groups if not all(task.name in done for task in group)]
    whole, left = (
        sum(plan.read_bytes_of([task], plan.passes_of(task)) for each in some for task in each)
        for some in (plan.groups, groups)
    )
    merge_group = plan.observe if run_settings.findings else plan.merge
    with (
        make_operations(run_settings.device, loops, finish=plan.finish) as operations,
        progress_bar(
            whole, plan.recipe.method, show=run_settings.progress, done=whole - left
        ) as on_bytes,
    ):
        policy = plan.recipe.nan_policy
        settings = StreamSettings(fit.threads, fit.block_bytes, on_bytes, policy)
        findings = stream(
            groups,
            lambda tasks: merge_group(tasks, operations),
            plan.passes_of,
            operations,
            plan.sources,
            sink,
            settings,
        )
        remember_compiled(plan, arithmetic(run_settings.device, loops))
        findings = {**done, **findings}
    known = {task.name: findings[task.name] for task in plan.tasks if findings.get(task.name)}
    return known, left


def analyze_models(
    recipe: Recipe,
    *,
    device: str = "cpu",
    threads: int | None = None,
    max_memory: str | int | None = None,
    progress: Progress = True,
    earlier: Earlier | None = None,
) -> Analysis:
    """What the models of a recipe have changed and where they disagree, without merging them.

    Of the tensors that the recipe merges. Arguments and errors as `merge_to_folder`; the recipe
    needs no `output_dir`.
    """
    settings = RunSettings(device, threads, max_memory, findings=True, progress=progress)
    earlier = earlier or Earlier()
    with _open_for_merging(recipe, settings, earlier) as plan:
        fit = settings.fit(plan, earlier.memory_bytes)
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
            plan, {task.name: findings[task.name] for task in plan.tasks if findings.get(task.name)}
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
        bytes_kept=0,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
        mapped_memory=mapped_memory(),
        files_carried=plan.carried.names,
        files_left=plan.carried.left,
        notes=(
            *plan.notes,
            *fit.notes,
            *plan.method.remarks(findings),
            *remark_on_broken(findings, recipe.nan_policy),
        ),
        findings=by_tensor,
        task_vectors=groups,
    )
