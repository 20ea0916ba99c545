"""Load what can be merged, or has been, to run it: models, bases with adapters on top."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from merge_lora import open_model
from merge_plan import open_plan
from merge_recipe import Recipe, make_recipe
from merge_run import merge_to_model
from model_errors import ModelCompatibilityError, NoTokenizerError, refusal
from model_inference import Running, load_model, load_tokenizer, run_loaded
from model_locate import CONFIG, split_adapters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_to_run(
    model: str | os.PathLike[str],
    device: str = "auto",
    dtype: str = "auto",
    *,
    needs_tokenizer: bool = True,
) -> Running:
    """Load a model as merges name it, with its tokenizer, to run it.

    Args:
        model: a folder or Hub id, also with LoRA adapters on top (`BASE+ADAPTER:0.5`), which are
            folded in memory, in float32.
        device, dtype, needs_tokenizer: as `model_inference.load_model`; "auto" leaves a fold on a
            CPU in float32.

    Raises:
        ValueError, ModelCompatibilityError, OSError: as there.
    """
    name = os.fspath(model)
    if not split_adapters(name).adapters:
        return load_model(name, device, dtype, needs_tokenizer=needs_tokenizer)
    try:
        tokenizer = tokenizer_of(name)
    except NoTokenizerError:
        if needs_tokenizer:
            raise
        tokenizer = None
    fold = make_recipe("passthrough", None, [name], {})
    return run_loaded(merge_to_model(fold, progress=False), tokenizer, device, dtype)


def check_to_run(models: Iterable[str]) -> list[str]:
    """Whether models can be opened, before any of them is loaded.

    Returns:
        What the user should know of them, such as an adapter that is for another base.

    Raises:
        ModelCompatibilityError: some cannot; all that is wrong is said at once.
    """
    problems: dict[str, None] = {}
    notes: dict[str, None] = {}
    for model in models:
        try:
            with open_model(model, weights=False) as opened:
                notes |= dict.fromkeys(opened.notes)
        except ModelCompatibilityError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise refusal(problems)
    return [*notes]


def tokenizer_of(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model, or of the adapter on top of it that has one.

    Raises:
        ModelCompatibilityError: there is none, or something cannot be opened.
    """
    with open_model(name, weights=False) as folder:
        return load_tokenizer(folder.tokenizer_path)


def merged_tokenizer(recipe: Recipe) -> "PreTrainedTokenizerBase":
    """The tokenizer that the result of a recipe would have in its folder.

    Raises:
        ModelCompatibilityError: there is none, or the models do not fit together.
    """
    with open_plan(recipe, weights=False) as plan, TemporaryDirectory() as made:
        folder = Path(made)
        for path in plan.carried.copies:
            shutil.copyfile(path, folder / path.name)
        for name, edit in plan.carried.edits.items():
            (folder / name).write_text(edit.make(), encoding="utf-8")
        (folder / CONFIG).write_text(plan.config_text, encoding="utf-8")
        return load_tokenizer(folder, "the merged model")
