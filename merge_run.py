"""Carry out a recipe: into a folder, or into a transformers model in memory."""

import errno
import resource
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from merge_plan import Plan, format_bytes, free_bytes, open_plan, usable_cores
from merge_progress import progress_bar
from merge_recipe import Recipe
from merge_stream import Sink, StreamSettings, stream
from model_checks import HEAD
from model_config import edit_config
from model_errors import ModelCompatibilityError
from model_prep import untie_head
from model_utils import FolderWriter, get_llama, parse_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARRIED = (
    *("tokenizer*.json", "tokenizer*.model", "tokenizer.model.v*", "tekken.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", "chat_template*.jinja", "chat_template.json"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
)
"""Files that go from the base (the first model, where there is no base) into the result."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        method, parameters, base_model, models, output_dir, dtype: as resolved.
        tensors: tensors in the result.
        rows_aligned: vocabulary rows cut, by model.
        bytes_read: from the weights, all passes together.
        bytes_written: tensors of the result.
        seconds: wall time.
        peak_memory: highest resident memory of the whole process so far, in bytes.
        files_carried, files_left: other files of the template, taken over and left behind.
        notes: what the user should know.
        findings: per tensor, what the method found out.
    """

    method: str
    parameters: Mapping[str, Any]
    base_model: str | None
    models: tuple[str, ...]
    output_dir: str | None
    dtype: str
    tensors: int
    rows_aligned: Mapping[str, int]
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_memory: int
    files_carried: tuple[str, ...]
    files_left: tuple[str, ...]
    notes: tuple[str, ...]
    findings: Mapping[str, Mapping[str, Any]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return asdict(self)

    def summary(self) -> str:
        """The report in a few lines."""
        count = len(self.models)
        lines = [
            f"merged {count} model{'s' if count > 1 else ''} by {self.method} into "
            f"{self.output_dir or 'memory'}: {self.tensors} tensors, {self.dtype}, "
            f"{format_bytes(self.bytes_written)}",
            f"read {format_bytes(self.bytes_read)} in {self.seconds:.1f} s, "
            f"peak memory {format_bytes(self.peak_memory)}",
        ]
        if self.files_carried:
            lines.append(f"carried over: {', '.join(self.files_carried)}")
        if self.files_left:
            lines.append(f"left behind: {', '.join(self.files_left)}")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def merge_to_folder(
    recipe: Recipe, *, device: str = "cpu", threads: int | None = None, progress: bool = True
) -> MergeReport:
    """Merge model folders into a new folder, in memory that does not grow with the models.

    Args:
        recipe: with an `output_dir`.
        device: where to compute, "cpu" or "cuda".
        threads: blocks worked on at once; by default one per core.
        progress: show how far it is, on stderr.

    Raises:
        ValueError: something is wrong with the parameters or the output.
        ModelCompatibilityError: models cannot be read or do not fit together.
        OSError: the disk is full, or a file cannot be read or written.
    """
    if recipe.output_dir is None:
        raise ValueError("output_dir must name the folder to make, got None")
    started = time.monotonic()
    with open_plan(recipe, settings_problems(device, threads)) as plan:
        _check_space(recipe.output_dir, plan.write_bytes)
        size = parse_size(recipe.max_shard_size)
        with FolderWriter(recipe.output_dir, plan.tensors, size) as writer:
            findings = _stream(plan, writer, device, threads, progress)
            carried, left = _carry(plan, writer)
            writer.write_text("config.json", merged_config(plan))
            writer.commit()
        return _report(plan, findings, started, carried, left)


def merge_to_model(
    recipe: Recipe, *, device: str = "cpu", threads: int | None = None, progress: bool = True
) -> "PreTrainedModel":
    """Merge model folders into one transformers model, float32, on the CPU.

    Only the result is held in memory, however many models go in.

    Arguments and errors as `merge_to_folder`; the recipe has no `output_dir` and no `dtype`.
    Warns (`UserWarning`) where a vocabulary is cut or a head untied.
    """
    with open_plan(replace(recipe, dtype="float32"), settings_problems(device, threads)) as plan:
        for note in plan.alignment.notes:
            warnings.warn(note, stacklevel=3)
        model = get_llama(plan.template.path)
        if model.config.vocab_size != plan.alignment.vocab_size:
            model.resize_token_embeddings(plan.alignment.vocab_size)
        if not plan.alignment.tied:
            untie_head(model)
        _check_names(plan, model)
        _stream(plan, ModelSink(model), device, threads, progress)
        return model


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
        self.tensors: Mapping[str, Tensor] = model.state_dict()

    def write_rows(self, name: str, first: int, rows: Tensor) -> None:
        """As `FolderWriter.write_rows`."""
        self.tensors[name].view(-1, rows.shape[1])[first : first + len(rows)] = rows


def _stream(
    plan: Plan, sink: Sink, device: str, threads: int | None, progress: bool
) -> dict[str, Mapping[str, Any]]:
    with progress_bar(plan.read_bytes, plan.recipe.method, show=progress) as on_bytes:
        settings = StreamSettings(device, threads or usable_cores(), on_bytes=on_bytes)
        return stream(plan.tasks, plan.method.merge_tensor, plan.base, plan.models, sink, settings)


def settings_problems(device: str, threads: int | None) -> list[str]:
    """What is wrong with how a merge is to be run."""
    problems = []
    if threads is not None and not (type(threads) is int and threads >= 1):
        problems.append(f"threads must be a whole number of at least 1, got {threads!r}")
    try:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are known")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        problems.append(f"device {device!r} cannot be used here ({reason}). Use device 'cpu'")
    return problems


def merged_config(plan: Plan) -> str:
    """config.json of the result: the template's text with the values that the merge changes."""
    config = plan.template.config
    dtype_keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    changes: dict[str, Any] = {
        **dict.fromkeys(dtype_keys, plan.dtype),
        "vocab_size": plan.alignment.vocab_size,
        "tie_word_embeddings": plan.alignment.tied,
    }
    return edit_config(plan.template.config_text, changes)


def _carry(plan: Plan, writer: FolderWriter) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Copy what belongs to a model besides weights and config; names taken and left."""
    files = sorted(path for path in plan.template.path.iterdir() if not path.name.startswith("."))
    carried = [path for path in files if path.is_file() and _is_carried(path)]
    for path in carried:
        writer.copy_file(path)
    weights = {path for path in files if path.suffix == ".safetensors" or _is_index(path)}
    left = set(files) - set(carried) - weights - {plan.template.path / "config.json"}
    return tuple(path.name for path in carried), tuple(sorted(path.name for path in left))


def _is_carried(path: Path) -> bool:
    return path.suffix != ".py" and any(path.match(pattern) for pattern in CARRIED)


def _is_index(path: Path) -> bool:
    return path.name.endswith(".safetensors.index.json")


def _check_space(output_dir: Path, need: int) -> None:
    free = free_bytes(output_dir)
    if need > free:
        raise OSError(
            errno.ENOSPC,
            f"{output_dir}: the result needs {format_bytes(need)}, the disk has "
            f"{format_bytes(free)} free. Make room or choose another place",
        )


def peak_memory() -> int:
    """Highest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _report(
    plan: Plan,
    findings: Mapping[str, Mapping[str, Any]],
    started: float,
    carried: tuple[str, ...],
    left: tuple[str, ...],
) -> MergeReport:
    recipe = plan.recipe
    return MergeReport(
        method=recipe.method,
        parameters=plan.parameters,
        base_model=recipe.base_model,
        models=recipe.models,
        output_dir=None if recipe.output_dir is None else str(recipe.output_dir),
        dtype=plan.dtype,
        tensors=len(plan.tasks),
        rows_aligned=plan.alignment.rows_cut,
        bytes_read=plan.read_bytes,
        bytes_written=plan.write_bytes,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
        files_carried=carried,
        files_left=left,
        notes=(*plan.notes, *plan.method.remarks(findings)),
        findings=findings,
    )
