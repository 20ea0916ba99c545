"""Merge fine-tunes of one base by TIES: trim, elect signs, average the models that agree.

python ties_llama.py BASE --ft_models A B --densities 0.5 0.5 --save OUT
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from merge_command import run_command
from merge_recipe import DEFAULT_SHARD_SIZE, make_recipe
from merge_report import MergeReport
from merge_run import merge_to_folder, merge_to_model
from model_vocabulary import VocabularySettings
from scalar_utils import TrimScope

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "ties"


def ties_merge_llama(
    base_model_path: str | os.PathLike[str],
    ft_model_paths: Sequence[str | os.PathLike[str]],
    weights: Sequence[float] | None = None,
    densities: Sequence[float] | None = None,
    device: str = "cpu",
    *,
    lam: float = 1.0,
    normalize: bool = True,
    trim_scope: TrimScope = "tensor",
    vocabulary: str | VocabularySettings = "min",
    tokenizer_source: str | None = None,
    threads: int | None = None,
    max_memory: str | int | None = None,
    progress: bool = True,
) -> "PreTrainedModel":
    """TIES merge into a model in memory.

    Args:
        base_model_path: the common ancestor: a model folder or Hub id.
        ft_model_paths: its fine-tunes.
        weights: multiplier of each model; by default 1.0 each.
        densities: share of each task vector kept, in [0, 1]; by default 1.0 each, which trims
            nothing. The paper keeps 0.2.
        device: where to compute, "cpu" or "cuda".
        lam: scale of the merged task vector.
        normalize: divide by the summed weights of the models that agree.
        trim_scope: what a density is a share of: each "tensor", each "row" of one, or the whole
            "model", as in the authors' code, where tensors with small changes can lose them all.
        vocabulary: "min", "max", "union", "base", "model:<name>" or "error", or
            `model_vocabulary.VocabularySettings`, which say what each does.
        tokenizer_source: the model whose special tokens the result has; by default the base
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

    Source: TIES-Merging, arXiv:2306.01708; `ties_utils.ties` says how each step is done.
    """
    recipe = make_recipe(
        METHOD,
        base_model_path,
        ft_model_paths,
        {
            "weights": weights,
            "densities": densities,
            "lam": lam,
            "normalize": normalize,
            "trim_scope": trim_scope,
        },
        vocabulary=vocabulary,
        tokenizer_source=tokenizer_source,
    )
    return merge_to_model(
        recipe, device=device, threads=threads, max_memory=max_memory, progress=progress
    )


def ties_merge_llama_to_folder(
    base_model_path: str | os.PathLike[str],
    ft_model_paths: Sequence[str | os.PathLike[str]],
    weights: Sequence[float] | None = None,
    densities: Sequence[float] | None = None,
    device: str = "cpu",
    *,
    output_dir: str | os.PathLike[str],
    dtype: str | None = None,
    lam: float = 1.0,
    normalize: bool = True,
    trim_scope: TrimScope = "tensor",
    vocabulary: str | VocabularySettings = "min",
    tokenizer_source: str | None = None,
    chat_template: str = "auto",
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    threads: int | None = None,
    max_memory: str | int | None = None,
    progress: bool = True,
) -> MergeReport:
    """TIES merge from folders to a folder, in memory that does not grow with the models.

    Args:
        output_dir: the folder to make; it must not exist, or be empty.
        dtype: "float32", "float16" or "bfloat16"; by default that of the base.
        chat_template: "auto" (the tokenizer's model's, or the only one there is), "none", or the
            model that gives it. `tokenizer_source` gives the tokenizer and generation config.
        max_shard_size: bytes per weight file, at most, such as "5GB".

    The other arguments and errors are those of `ties_merge_llama`. Raises `OSError` as
    well, when the disk is full or a file cannot be read or written. transformers is not imported.
    """
    recipe = make_recipe(
        METHOD,
        base_model_path,
        ft_model_paths,
        {
            "weights": weights,
            "densities": densities,
            "lam": lam,
            "normalize": normalize,
            "trim_scope": trim_scope,
        },
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
