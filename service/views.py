"""Experiments and models as clients see them: in lists, one by one, and as they go on."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from service.registry import Entry
from service.store import Experiment, Job

API = "/api/model-merger"
"""Where the API begins."""


def view(experiment: Experiment, kept_until: float | None, *, whole: bool) -> dict[str, Any]:
    """An experiment as the API gives it; `whole` with all that a list leaves out."""
    base, models = experiment.plan["base"], experiment.plan["models"]
    links = {"self": f"{API}/experiments/{experiment.id}"}
    merge, evaluation = experiment.merge, experiment.evaluation
    result: dict[str, Any] | None = None
    if merge.state == "completed":
        there = experiment.removed is None
        result = {
            **{name: merge.outcome[name] for name in ("bytes", "seconds", "peak_memory", "notes")},
            "files": [
                {name: file[name] for name in ("name", "bytes", "sha256")}
                for file in merge.outcome["files"]
            ],
            "available": there,
        }
        if there:
            links |= {name: f"{links['self']}/{name}" for name in ("download", "report")}
            if merge.outcome["findings"]:
                links["findings"] = f"{links['self']}/findings"
    if result and result["available"] and evaluation and evaluation.state == "completed":
        links["comparison"] = f"{links['self']}/comparison"
    if experiment.is_open:
        links["events"] = f"{links['self']}/events"
    return {
        **job_view(merge, whole=whole),
        "id": experiment.id,
        "name": experiment.name,
        "method": experiment.plan["plan"]["method"],
        "models": [
            *({"id": each, "role": "base"} for each in [base] if base),
            *({"id": each, "role": "model"} for each in models),
        ],
        "recipe": experiment.recipe,
        "queue_place": experiment.place,
        "kept_until": None if kept_until is None else moment(kept_until),
        "plan": experiment.plan["plan"] if whole else {},
        "result": result,
        "evaluation": None
        if evaluation is None
        else {
            **job_view(evaluation, whole=whole),
            "request": evaluation.request,
            "result": evaluation.outcome or None,
        },
        "links": links,
    }


def job_view(job: Job, *, whole: bool = False) -> dict[str, Any]:
    """A job as the API gives it."""
    step, done, total, speed = job.progress
    running = job.state == "running"
    if job.state == "completed":
        done, percent = total, 100.0
    else:  # what runs is not done: files have still to be written
        percent = min(100 * done / total, 99.9) if total else 0.0
    seconds = (total - done) / speed if running and speed and total else None
    return {
        "status": job.state,
        "progress": round(percent, 1),
        "step": ("stopping" if job.stop else step) if running else "",
        "done_bytes": done,
        "total_bytes": total,
        "bytes_per_second": speed if running else None,
        "seconds_left": None if seconds is None else round(seconds, 1),
        "created_at": moment(job.created),
        "started_at": None if job.started is None else moment(job.started),
        "finished_at": None if job.finished is None else moment(job.finished),
        "problems": [*job.problems],
        "history": [
            {"time": moment(when), "state": state, "text": text}
            for when, state, text in (job.history if whole else ())
        ],
    }


def progress_view(experiment: Experiment) -> dict[str, Any]:
    """What watchers are told."""
    keys = ("status", "progress", "step", "done_bytes", "total_bytes", "bytes_per_second")
    more = ("seconds_left", "problems")

    def told(job: Job) -> dict[str, Any]:
        found = job_view(job)
        return {key: found[key] for key in (*keys, *more)}

    evaluation = experiment.evaluation
    return {
        "id": experiment.id,
        **told(experiment.merge),
        "queue_place": experiment.place,
        "evaluation": None if evaluation is None else told(evaluation),
    }


def moment(seconds: float) -> str:
    """A time as ISO 8601 has it, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def entries_view(entries: Sequence[Entry]) -> list[Mapping[str, Any]]:
    """Models as the API gives them."""
    return [entry.view() for entry in entries]


def file_name(name: str) -> str:
    """A name that a folder can have anywhere.

    >>> file_name("Code + Chat Model"), file_name("../..")
    ('Code-Chat-Model', 'merged-model')
    """
    kept = "".join(
        each if each.isascii() and (each.isalnum() or each in "-_") else " " for each in name
    )
    return "-".join(kept.split())[:80].strip("-") or "merged-model"
