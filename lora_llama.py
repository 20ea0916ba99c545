"""LoRA adapters: fold them into their base, merge several into one, extract one from a model.

python lora_llama.py fold BASE ADAPTER [ADAPTER ...] [--weights 1.0 -0.5] --save OUT
python lora_llama.py merge ADAPTER ADAPTER [--method cat] --save OUT
python lora_llama.py extract TUNED --base BASE --rank 16 --save OUT
python lora_llama.py --check FOLDER    (a folded model)

Every other command takes a base with adapters as a model, too: BASE+ADAPTER.
"""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from merge_adapter_output import AdapterReport
from merge_adapters import MAX_RANK, AdapterMerge, merge_adapters
from merge_extract import Extraction, extract_adapter
from merge_lora_command import fold_recipe, numbers, run_lora_command
from merge_progress import Progress
from merge_recipe import DEFAULT_SHARD_SIZE, model_name, model_names
from merge_report import MergeReport
from merge_run import merge_to_folder, merge_to_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PathLike = str | os.PathLike[str]


def lora_fold_llama(
    base_model_path: PathLike,
    adapter_paths: Sequence[PathLike],
    weights: Sequence[float] | None = None,
    *,
    lora_rounding: str | None = None,
    tied_lora: str | None = None,
    threads: int | None = None,
    max_memory: str | int | None = None,
    progress: Progress = True,
) -> "PreTrainedModel":
    """Fold LoRA adapters into their base: `W + sum weight_i scale_i B_i A_i`.

    Args:
        base_model_path: the model that they were trained on: a folder or Hub id.
        adapter_paths: the adapters, as PEFT saves them: folders or Hub ids.
        weights: the change of each is multiplied by this, of any sign; by default 1.0 each.
        lora_rounding, tied_lora: see `model_lora.LoraSettings`.
        threads, max_memory, progress: see `merge_run.RunSettings`.

    Returns:
        A transformers model on the CPU, float32, the only one in memory.

    Raises:
        ValueError: a parameter is out of range.
        ModelCompatibilityError: the base or an adapter cannot be read, or they do not fit.

    Source: LoRA, arXiv:2106.09685, section 4.1.
    """
    recipe = fold_recipe(
        model_name(base_model_path),
        model_names(adapter_paths, "adapter_paths"),
        weights,
        lora_rounding=lora_rounding,
        tied_lora=tied_lora,
    )
    return merge_to_model(recipe, threads=threads, max_memory=max_memory, progress=progress)


def lora_fold_llama_to_folder(
    base_model_path: PathLike,
    adapter_paths: Sequence[PathLike],
    output_dir: PathLike,
    weights: Sequence[float] | None = None,
    *,
    dtype: str | None = None,
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    lora_rounding: str | None = None,
    tied_lora: str | None = None,
    threads: int | None = None,
    max_memory: str | int | None = None,
    progress: Progress = True,
    resume: bool = False,
    verify_inputs: bool = False,
) -> MergeReport:
    """Fold LoRA adapters into their base, from folders to a folder.

    Args:
        base_model_path, adapter_paths, weights: as `lora_fold_llama`.
        output_dir: the folder to make; it must not exist, or be empty.
        dtype: "float32", "float16" or "bfloat16"; by default that of the base.
        max_shard_size: bytes per weight file, at most, such as "5GB".
        lora_rounding, tied_lora: see `model_lora.LoraSettings`.
        threads, max_memory, progress, resume, verify_inputs: see `merge_run.RunSettings`.

    Returns:
        What was done.

    Raises:
        ValueError, ModelCompatibilityError: as `lora_fold_llama`.
        OSError: the disk is full, or a file cannot be read or written.
    """
    recipe = fold_recipe(
        model_name(base_model_path),
        model_names(adapter_paths, "adapter_paths"),
        weights,
        output_dir=Path(output_dir),
        dtype=dtype,
        max_shard_size=max_shard_size,
        lora_rounding=lora_rounding,
        tied_lora=tied_lora,
    )
    return merge_to_folder(
        recipe,
        threads=threads,
        max_memory=max_memory,
        progress=progress,
        resume=resume,
        verify_inputs=verify_inputs,
    )


def lora_merge_adapters(
    adapter_paths: Sequence[PathLike],
    output_dir: PathLike,
    weights: Sequence[float] | None = None,
    *,
    method: str = "auto",
    rank: int | None = None,
    max_rank: int = MAX_RANK,
    densities: Sequence[float] | None = None,
    lam: float = 1.0,
    seed: int = 0,
    dtype: str = "float32",
    progress: Progress = True,
    resume: bool = False,
    verify_inputs: bool = False,
) -> AdapterReport:
    """Merge LoRA adapters into one adapter, which PEFT loads with the right scale.

    Args:
        adapter_paths: the adapters: folders or Hub ids.
        output_dir: the folder to make; it must not exist, or be empty.
        weights: one for each adapter, of any sign; by default 1.0 each.
        method, rank, max_rank, densities, lam, seed, dtype: see `merge_adapters.AdapterMerge`;
            `merge_adapters.METHODS` says what each method does.
        progress, resume, verify_inputs: see `merge_run.RunSettings`.

    Returns:
        What was done, with the error of the result, module by module.

    Raises:
        ValueError: a parameter is out of range.
        ModelCompatibilityError: an adapter cannot be read, or they cannot be merged into one.
        OSError: the disk is full, or a file cannot be read or written.
    """
    merge = AdapterMerge(
        adapters=model_names(adapter_paths, "adapter_paths"),
        method=method,
        weights=None if weights is None else numbers(weights, "weights"),
        rank=rank,
        max_rank=max_rank,
        densities=None if densities is None else numbers(densities, "densities"),
        lam=lam,
        seed=seed,
        dtype=dtype,
    )
    return merge_adapters(
        merge, Path(output_dir), progress=progress, resume=resume, verify_inputs=verify_inputs
    )


def lora_extract_adapter(
    tuned_model_path: PathLike,
    base_model_path: PathLike,
    output_dir: PathLike,
    rank: int | None = None,
    *,
    max_error: float | None = None,
    others: str = "save",
    dtype: str = "float32",
    progress: Progress = True,
    resume: bool = False,
    verify_inputs: bool = False,
) -> AdapterReport:
    """Extract a LoRA adapter from a tuned model: the leading part of what it has changed.

    Args:
        tuned_model_path: a folder or Hub id.
        base_model_path: what it was tuned from.
        output_dir: the folder to make; it must not exist, or be empty.
        rank, max_error, others, dtype: see `merge_extract.Extraction`; a rank or a largest error
            is needed.
        progress, resume, verify_inputs: see `merge_run.RunSettings`.

    Returns:
        What was done, with the error of the result, module by module.

    Raises:
        ValueError, ModelCompatibilityError, OSError: as `lora_merge_adapters`.
    """
    extraction = Extraction(
        tuned_model=model_name(tuned_model_path, "tuned_model_path"),
        base_model=model_name(base_model_path),
        rank=rank,
        max_error=max_error,
        others=others,
        dtype=dtype,
    )
    return extract_adapter(
        extraction, Path(output_dir), progress=progress, resume=resume, verify_inputs=verify_inputs
    )


main = functools.partial(run_lora_command, __doc__ or "")

if __name__ == "__main__":
    raise SystemExit(main())
