"""Tasks of the Language Model Evaluation Harness on a model that is loaded.

The harness (`lm-eval`) is an optional package; what it says is handed on as it says it.
"""

import functools
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from model_inference import Running

INSTALL = 'pip install "llama-merge[lm-eval]"'


def check_harness() -> None:
    """Raise `ValueError` where the harness is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"tasks need the Language Model Evaluation Harness ({error}). Install it: {INSTALL}"
        ) from error


def check_tasks(tasks: Sequence[str], include_path: str | os.PathLike[str] | None = None) -> None:
    """Raise `ValueError` for tasks that the harness does not have.

    Args:
        tasks: names of tasks or groups of them.
        include_path: a folder with tasks of one's own, as YAML files.
    """
    check_harness()
    manager = _manager(_text(include_path))
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ValueError(
            f"the harness has no task {', '.join(map(repr, unknown))}. `lm-eval ls tasks` lists "
            "those that it has; your own need the folder that they are in"
        )


def run_tasks(
    running: Running,
    tasks: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    include_path: str | os.PathLike[str] | None = None,
) -> dict[str, float]:
    """What the harness finds out about a model.

    Args:
        running: the model.
        tasks: names of tasks or groups of them.
        shots: solved examples before each question; by default as the task has it.
        limit: questions of each task, at most; by default all. Such scores are for a first look.
        batch_size: questions that are read at once.
        chat: put questions into the model's chat template, if it has one.
        include_path: a folder with tasks of one's own, as YAML files.

    Returns:
        Values by "task metric", such as "arc_easy acc_norm".

    Raises:
        ValueError: the harness is not installed.
    """
    check_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _random_states_kept():  # the harness sets seeds
        found: dict[str, Any] = simple_evaluate(
            model=HFLM(
                pretrained=running.model, tokenizer=running.tokenizer, batch_size=batch_size
            ),
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            apply_chat_template=chat and bool(running.tokenizer.chat_template),
            task_manager=_manager(_text(include_path)),
            bootstrap_iters=0,
            log_samples=False,
        )
    return {
        f"{task} {metric.removesuffix(',none')}": float(value)
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float)
        and not metric.startswith(("sample_len", "alias"))
        and "_stderr" not in metric
    }


@contextmanager
def _random_states_kept() -> Iterator[None]:
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@functools.lru_cache(maxsize=1)  # it reads thousands of files
def _manager(include_path: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _text(folder: str | os.PathLike[str] | None) -> str | None:
    return None if folder is None else os.fspath(folder)
