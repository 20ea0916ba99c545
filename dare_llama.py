"""Merge fine-tunes of one base by DARE: drop changes at random, rescale the rest, add.

python dare_llama.py BASE --ft_models A B --densities 0.5 0.5 --save OUT
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from merge_command import run_command
from merge_recipe import DEFAULT_SHARD_SIZE, make_recipe
from merge_report import MergeReport
from merge_run import merge_to_folder, merge_to_model
from model_vocabulary import VocabularySettings
from scalar_utils import Rescale

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "dare"


def dare_merge_llama(
    base_model_path: str | os.PathLike[str],
    ft_model_paths: Sequence[str | os.PathLike[str]],
    weights: Sequence[float] | None = None,
    densities: Sequence[float] | None = None,
    device: str = "cpu",
    *,
    lam: float = 1.0,
    seed: int = 0,
    variant: Literal["linear", "ties"] = "linear",
    rescale: Rescale = "inverse_density",
    normalize: bool = False,
    vocabulary: str | VocabularySettings = "min",
    tokenizer_source: str | None = None,
    threads: int | None = None,
    max_memory: str | int | None = None,
    progress: bool = True,
) -> "PreTrainedModel":
    """DARE merge into a model in memory.

    Args:
        base_model_path: the common ancestor: a model folder or Hub id.
        ft_model_paths: its fine-tunes.
        weights: multiplier of each model; by default 1.0 each.
        densities: chance of a change being kept, in [0, 1]; by default 1.0 each, which drops
            nothing. The paper's drop rate is 1 - density.
        device: where to compute, "cpu" or "cuda".
        lam: scale of the merged task vector.
        seed: in [0, 2**64); same seed, same masks, whatever the threads or device.
        variant: "linear" adds the task vectors, "ties" elects signs as TIES does.
        rescale: "inverse_density" (the paper), "l1" (mergekit since 0.1.0) or "none".
        normalize: divide by the sum of the weights.
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

    Source: DARE, arXiv:2311.03099; see `dare_utils.dare_linear` and `dare_ties`.
    """
    recipe = make_recipe(
        METHOD,
        base_model_path,
        ft_model_paths,
        {
            "weights": weights,
            "densities": densities,
            "lam": lam,
            "seed": seed,
            "variant": variant,
            "rescale": rescale,
            "normalize": normalize,
        },
        vocabulary=vocabulary,
        tokenizer_source=tokenizer_source,
    )
    return merge_to_model(
        recipe, device=device, threads=threads, max_memory=max_memory, progress=progress
    )


def dare_merge_llama_to_folder(
    base_model_path: str | os.PathLike[str],
    ft_model_paths: Sequence[str | os.PathLike[str]],
    weights: Sequence[float] | None = None,
    densities: Sequence[float] | None = None,
    device: str = "cpu",
    *,
    output_dir: str | os.PathLike[str],
    dtype: str | None = None,
    lam: float = 1.0,
    seed: int = 0,
    variant: Literal["linear", "ties"] = "linear",
    rescale: Rescale = "inverse_density",
    normalize: bool = False,
    vocabulary: str | VocabularySettings = "min",
    tokenizer_source: str | None = None,
    chat_template: str = "auto",
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    threads: int | None = None,
    max_memory: str | int | None = None,
    progress: bool = True,
) -> MergeReport:
    """DARE merge from folders to a folder, in memory that does not grow with the models.

    Args:
        output_dir: the folder to make; it must not exist, or be empty.
        dtype: "float32", "float16" or "bfloat16"; by default that of the base.
        chat_template: "auto" (the tokenizer's model's, or the only one there is), "none", or the
            model that gives it. `tokenizer_source` gives the tokenizer and generation config.
        max_shard_size: bytes per weight file, at most, such as "5GB".

    The other arguments and errors are those of `dare_merge_llama`. Raises `OSError` as
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
            "seed": seed,
            "variant": variant,
            "rescale": rescale,
            "normalize": normalize,
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
