"""Merge two models by spherical interpolation.

python slerp_llama.py --ft_models A B --t 0.5 --save OUT
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from merge_command import run_command
from merge_recipe import DEFAULT_SHARD_SIZE, Recipe, model_names
from merge_run import MergeReport, merge_to_folder, merge_to_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "slerp"


def slerp_merge_llama(
    ft_model_paths: Sequence[str | os.PathLike[str]],
    t: float = 0.5,
    device: str = "cpu",
    *,
    threads: int | None = None,
    progress: bool = True,
) -> "PreTrainedModel":
    """SLERP of two models, into a model in memory.

    Args:
        ft_model_paths: two models: folders or Hub ids.
        t: position in [0, 1]; 0 is the first model, 1 the second.
        device: where to compute, "cpu" or "cuda".
        threads: blocks worked on at once; by default one per core.
        progress: show how far it is.

    Returns:
        A transformers model on the CPU in float32. It is the only model held in memory.

    Raises:
        TypeError: a model is not named by a path or Hub id.
        ValueError: a parameter is out of range or its count is wrong.
        ModelCompatibilityError: models cannot be read or do not fit together.

    Source: K. Shoemake, 1985; see `slerp_utils.slerp`. Each tensor is one vector.
    """
    recipe = Recipe(
        method=METHOD,
        models=model_names(ft_model_paths),
        parameters={"t": t},
    )
    return merge_to_model(recipe, device=device, threads=threads, progress=progress)


def slerp_merge_llama_to_folder(
    ft_model_paths: Sequence[str | os.PathLike[str]],
    t: float = 0.5,
    device: str = "cpu",
    *,
    output_dir: str | os.PathLike[str],
    dtype: str | None = None,
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    threads: int | None = None,
    progress: bool = True,
) -> MergeReport:
    """SLERP of two models, from folders to a folder, in memory that does not grow with them.

    Args:
        output_dir: the folder to make; it must not exist, or be empty.
        dtype: "float32", "float16" or "bfloat16"; by default that of the first model.
        max_shard_size: bytes per weight file, at most, such as "5GB".

    The other arguments and errors are those of `slerp_merge_llama`. Raises `OSError` as
    well, when the disk is full or a file cannot be read or written. transformers is not imported.
    """
    recipe = Recipe(
        method=METHOD,
        models=model_names(ft_model_paths),
        parameters={"t": t},
        output_dir=Path(output_dir),
        dtype=dtype,
        max_shard_size=max_shard_size,
    )
    return merge_to_folder(recipe, device=device, threads=threads, progress=progress)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command(METHOD, __doc__ or "", argv)


if __name__ == "__main__":
    raise SystemExit(main())
