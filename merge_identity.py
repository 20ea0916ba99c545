"""What decides the bytes of a result: by it the beginning of the same merge is known again."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_card import VERSION, computed_with, public_inputs, public_recipe
from merge_plan import Earlier, Plan
from merge_progress import Progress, progress_bar
from merge_stream import TensorTask
from model_companions import Edit
from model_files import read_file
from model_hashes import MANIFEST, verify_files
from model_utils import WeightFile

FORMAT = 1


def plan_identity(plan: Plan, earlier: Earlier, device: str, *, findings: bool) -> dict[str, Any]:
    """Everything that decides a byte of a result, as JSON without paths.

    Args:
        plan: what is merged; its models are open.
        earlier: results of earlier recipes among its models.
        device: where it is computed.
        findings: whether they are reported.

    Returns:
        By what a user would call it: the format and version, the recipe (and the earlier ones it
        uses), the inputs (weight files: size, digests of header and samples), digests of their
        configs, of what feeds each tensor and of the small files.
    """
    plans = (*earlier.plans.values(), plan)
    tasks = [_described(task) for each in plans for task in each.tasks]
    files = [_small_files(each) for each in plans]
    configs = [source.config_texts for each in plans for source in each.sources]
    return {
        "the version": [FORMAT, VERSION],
        "the recipe": public_recipe(plan, earlier),
        "the earlier recipes": {
            name: public_recipe(each, earlier) for name, each in earlier.plans.items()
        },
        "the device": device,
        "--findings": findings,
        "the inputs": public_inputs(plan, earlier),
        "their configs": digest(configs),
        "the tensors": digest(tasks),
        "the small files": digest(files),
    }


def of_this_run(
    files: Iterable[WeightFile], hashes: Mapping[WeightFile, str], **settings: Any
) -> dict[str, Any]:
    """What else must be the same for a stopped run to be gone on with.

    Args:
        files: what it reads; known again by their size, time of change and inode.
        hashes: their SHA-256, where these are known; then the time does not matter.
        settings: what a computation depends on besides.
    """
    return {
        "when the inputs were changed": [hashes.get(file, file.state) for file in files],
        "what computes": {**computed_with(), **settings},
    }


def is_older(folder: Path, files: Iterable[WeightFile]) -> bool:
    """Whether a result was there before one of its inputs was changed, so that it is not of it."""
    made = (folder / MANIFEST).stat().st_mtime_ns
    return any(file.state.changed_ns > made for file in files)


def verified(
    files: Sequence[WeightFile], threads: int, *, progress: Progress
) -> tuple[dict[WeightFile, str], list[str]]:
    """`model_hashes.verify_files` with a progress bar."""
    if not files:
        return {}, []
    size = sum(file.state.bytes for file in files)
    with progress_bar(size, "verify", show=progress) as on_bytes:
        return verify_files(files, threads, on_bytes)


def _described(task: TensorTask) -> list[Any]:
    """What feeds a tensor."""
    row_map = task.row_map
    rows = None
    if row_map is not None:
        rows = [hashlib.sha256(row_map.rows.tobytes()).hexdigest(), repr(row_map.fills)]
    parameters = {name: repr(value) for name, value in task.parameters.items()}
    return [task.name, task.info, task.inputs, parameters, rows, task.names, task.copied]


def copied_hashes(plan: Plan) -> dict[str, str]:
    """SHA-256 of the files that are copied, by name."""
    return {path.name: _sha256(path) for path in plan.carried.copies}


def _small_files(plan: Plan) -> list[Any]:
    """What makes the small files of a result."""
    copies = copied_hashes(plan)
    edits = {name: _made_of(edit) for name, edit in plan.carried.edits.items()}
    return [plan.config_text, copies, edits]


def _made_of(edit: Edit) -> list[Any]:
    source = None if edit.source is None else _sha256(edit.source)
    tokens = None if edit.vocabulary is None else [edit.vocabulary.rows, edit.vocabulary.added]
    return [source, tokens, edit.changes, edit.text]


def _sha256(path: Path) -> str:
    return hashlib.sha256(read_file(path.parent, path.name, path.name)).hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    text = json.dumps(value, sort_keys=True, default=dict)
    return hashlib.sha256(text.encode()).hexdigest()
