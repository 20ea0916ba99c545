"""Merge two models by spherical interpolation.

python slerp_llama.py --ft_models A B --t 0.5 --save OUT
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from merge_command import run_command
from merge_recipe import DEFAULT_SHARD_SIZE, make_recipe
from merge_report import MergeReport
from merge_run import merge_to_folder, merge_to_model
from model_vocabulary import VocabularySettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "slerp"


def slerp_merge_llama(
    ft_model_paths: Sequence[str | os.PathLike[str]],
    t: float = 0.5,
    device: str = "cpu",
    *,
    vocabulary: str | VocabularySettings = "min",
    tokenizer_source: str | None = None,
    threads: int | None = None,
    max_memory: str | int | None = None,
    progress: bool = True,
) -> "PreTrainedModel":
    """SLERP of two models, into a model in memory.

    Args:
        ft_model_paths: two models: folders or Hub ids.
        t: position in [0, 1]; 0 is the first model, 1 the second.
        device: where to compute, "cpu" or "cuda".
        vocabulary: "min", "max", "union", "base", "model:<name>" or "error", or
            `model_vocabulary.VocabularySettings`, which say what each does.
        tokenizer_source: the model whose special tokens the result has; by default the first one
            (with "max", the one with the most tokens).
        threads: at work at once; by default one per core.
        max_memory: most memory of the process, such as "4GB", the result included; by default
            there is no limit. Refused where it is too little.
        progress: show how far it is.

    Returns:
        A transformers model on the CPU in float32. It is the only model held in memory.

    Raises:
        TypeError: a model is not named by a path or Hub id.
        ValueError: a parameter is out of range or its count is wrong.
        ModelCompatibilityError: models cannot be read or do not fit together.

    Source: K. Shoemake, 1985; see `slerp_utils.slerp`. Each tensor is one vector.
    """
    recipe = make_recipe(
        METHOD,
        None,
        ft_model_paths,
        {"t": t},
        vocabulary=vocabulary,
        tokenizer_source=tokenizer_source,
    )
    return merge_to_model(
        recipe, device=device, threads=threads, max_memory=max_memory, progress=progress
    )


def slerp_merge_llama_to_folder(
    ft_model_paths: Sequence[str | os.PathLike[str]],
    t: float = 0.5,
    device: str = "cpu",
    *,
    output_dir: str | os.PathLike[str],
    dtype: str | None = None,
    vocabulary: str | VocabularySettings = "min",
    tokenizer_source: str | None = None,
    chat_template: str = "auto",
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    threads: int | None = None,
    max_memory: str | int | None = None,
    progress: bool = True,
) -> MergeReport:
    """SLERP of two models, from folders to a folder, in memory that does not grow with them.

    Args:
        output_dir: the folder to make; it must not exist, or be empty.
        dtype: "float32", "float16" or "bfloat16"; by default that of the first model.
        chat_template: "auto" (the tokenizer's model's, or the only one there is), "none", or the
            model that gives it. `tokenizer_source` gives the tokenizer and generation config.
        max_shard_size: bytes per weight file, at most, such as "5GB".

    The other arguments and errors are those of `slerp_merge_llama`. Raises `OSError` as
    well, when the disk is full or a file cannot be read or written. transformers is not imported.
    """
    recipe = make_recipe(
        METHOD,
        None,
        ft_model_paths,
        {"t": t},
        output_dir=output_dir,
        dtype=dtype,
        max_shard_size=max_shard_size,
        vocabulary=vocabulary,
        tokenizer_source=tokenizer_source,
        chat_template=chat_template,
    )
    return merge_to_folder(
        recipe, device=device, threads=threads, max_memory=max_memory, progress=progress
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command(METHOD, __doc__ or "", argv)


if __name__ == "__main__":
    raise SystemExit(main())
