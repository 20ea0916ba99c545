"""A LoRA adapter extracted from a tuned model and its base: the leading part of what has changed.

One matrix after the other is read, compared and taken apart; only the adapter is held in memory.
"""

import functools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from merge_adapter_output import AdapterOutput, AdapterReport, Errors
from merge_lora import open_model
from merge_plan import place_problems
from merge_progress import Progress, progress_bar
from merge_recipe import brief, unknown_name
from model_checks import (
    DERIVED_TENSOR,
    EMBEDDING,
    HEAD,
    VOCABULARY_TENSORS,
    is_tied,
    layer_order,
)
from model_companions import code_notes, tokenizer_files
from model_errors import ModelCompatibilityError
from model_lora import PREFIX, is_number
from model_lora_writer import NewAdapter
from model_prep import fit_problems
from model_rows import float_rows, same_values
from model_safetensors import DTYPE_NAMES
from model_utils import ModelFolder, rows_of

if TYPE_CHECKING:
    from lora_utils import Truncated

Floats = NDArray[np.float32]

OTHERS = ("save", "drop")
"""What becomes of changed tensors that are no matrices of layers."""


@dataclass(frozen=True)
class Extraction:
    """What is to be extracted.

    Attributes:
        tuned_model: a folder or Hub id, maybe with adapters.
        base_model: what it was tuned from.
        rank: of the factors, at most.
        max_error: the largest relative error of a module, in [0, 1); the rank is the smallest that
            keeps it. At least one of the two is given.
        others: changed embeddings, heads and norms are saved whole ("save"), or left out ("drop").
        dtype: of the adapter.
    """

    tuned_model: str
    base_model: str
    rank: int | None = None
    max_error: float | None = None
    others: str = "save"
    dtype: str = "float32"

    def problems(self) -> list[str]:
        """What is wrong with it."""
        found = []
        if self.rank is None and self.max_error is None:
            found.append("an extraction needs a rank or a max_error, such as rank 16")
        if self.rank is not None and not (type(self.rank) is int and self.rank >= 1):
            found.append(f"rank must be a whole number of at least 1, got {brief(self.rank)}")
        error = self.max_error
        if error is not None and not (is_number(error) and 0 <= error < 1):
            found.append(f"max_error must be in [0, 1), got {brief(error)}")
        if self.others not in OTHERS:
            found.append(unknown_name("choice for others", self.others, OTHERS))
        if self.dtype not in DTYPE_NAMES:
            found.append(unknown_name("dtype", self.dtype, DTYPE_NAMES))
        return found


def extract_adapter(
    extraction: Extraction,
    output_dir: Path,
    *,
    progress: Progress = True,
    resume: bool = False,
    verify_inputs: bool = False,
) -> AdapterReport:
    """Extract an adapter that makes of the base what comes nearest to the tuned model.

    Args:
        extraction: of what, and how much.
        output_dir: the folder to make; it must not exist, or be empty.
        progress, resume, verify_inputs: see `merge_run.RunSettings`.

    Raises:
        OutputBusyError: another process is making this output.
        ValueError: something is wrong with the settings, or nothing has changed.
        ModelCompatibilityError: the models cannot be read or do not fit together.
        OSError: the disk is full, or a file cannot be read or written.
    """
    if problems := extraction.problems():
        raise ValueError("\n".join(problems))
    with ExitStack() as stack:
        base = stack.enter_context(open_model(extraction.base_model))
        tuned = stack.enter_context(open_model(extraction.tuned_model, base_model=base.label))
        if problems := fit_problems([base, tuned]):
            raise ModelCompatibilityError(problems)
        if wrong := place_problems(output_dir, [base, tuned]):
            raise ValueError("\n".join(wrong))
        given = {key: value for key, value in asdict(extraction).items() if value is not None}
        output = AdapterOutput(
            output_dir,
            given,
            [base, tuned],
            progress=progress,
            resume=resume,
            verify_inputs=verify_inputs,
        )
        if output.finished:
            return output.finished
        work = _Work(extraction, base, tuned, stack.enter_context(output))
        sizes = {module: tuned.tensors[f"{module}.weight"].nbytes for module in work.modules}
        with progress_bar(sum(sizes.values()), "extract", show=progress) as on_bytes:
            for module in work.modules:
                work.take_module(module)
                on_bytes(sizes[module])
        work.take_others()
        new = work.finished()
        del given["tuned_model"], given["base_model"]
        inputs = (extraction.tuned_model, extraction.base_model)
        return output.write(
            new, "extract", given, inputs, extraction.dtype, work.errors, work.notes
        )


class _Work:
    """An extraction on its way."""

    def __init__(
        self, extraction: Extraction, base: ModelFolder, tuned: ModelFolder, output: AdapterOutput
    ) -> None:
        self.extraction = extraction
        self.output = output
        self.base = base
        self.tuned = tuned
        self.errors = Errors()
        self.notes = [*base.notes, *tuned.notes]
        self.new = NewAdapter(base.label)
        if len(base.origins) > 1:
            self.notes.append(
                f"the adapter belongs on {base.label}; PEFT needs that as a folder (fold it first)"
            )
        names = sorted(tuned.tensors, key=layer_order)
        self.modules = [n.removesuffix(".weight") for n in names if n.endswith("_proj.weight")]

    def take_module(self, module: str) -> None:
        """Take the change of a matrix apart, if there is one."""
        weight, bias = f"{module}.weight", f"{module}.bias"
        delta = self._values(self.tuned, weight)
        delta -= self._values(self.base, weight)
        biased = bias in self.tuned.tensors and self._has_changed(bias)
        if not (biased or delta.any()):
            return
        if not np.isfinite(delta).all():
            raise ModelCompatibilityError(
                f"{self.tuned.label}: {weight} differs from {self.base.label} by NaN or infinity. "
                "One of the models is broken; use another copy"
            )
        found = self.output.factors(module, functools.partial(self._factorised, delta))
        self.errors.add(module, found)
        lora_a, lora_b = (each.numpy() for each in found.factors)
        self.new.factors[module] = lora_a, lora_b, False
        if biased:
            self.new.settings["bias"] = "lora_only"

    def _factorised(self, delta: Floats) -> "Truncated":
        import torch

        from lora_utils import factorise

        rank, max_error = self.extraction.rank, self.extraction.max_error
        return factorise(torch.from_numpy(delta), rank=rank, max_error=max_error)

    def take_others(self) -> None:
        """Take what is no matrix of a layer whole, if it has changed; the biases of modules too."""
        for module in self.new.factors:
            bias = f"{module}.bias"
            if self.new.settings.get("bias") and bias in self.tuned.tensors:
                name = f"{PREFIX}{module}.base_layer.bias"
                self.new.whole[name] = self._values(self.tuned, bias).reshape(-1)
        names = [
            name
            for name in sorted({*self.tuned.tensors, HEAD}, key=layer_order)
            if "_proj." not in name and not DERIVED_TENSOR.fullmatch(name)
        ]
        if self._are_tied:
            names.remove(HEAD)  # which is the embedding, before and after
        changed = [name for name in names if self._has_changed(name)]
        if changed and self.extraction.others == "drop":
            self.notes.append(
                f"{len(changed)} changed tensors are left out (others drop): "
                f"{', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''}"
            )
        elif changed:
            self._save(changed)

    def _save(self, changed: Sequence[str]) -> None:
        """Save changed tensors whole."""
        # PEFT expects a resized vocabulary in the base itself, unless its tie is another one.
        in_base = self._is_resized and is_tied(self.base) == is_tied(self.tuned)
        modules = []
        for name in changed:
            self.new.whole[f"{PREFIX}{name}"] = self._whole(name)
            if not (in_base and name in VOCABULARY_TENSORS):
                modules.append(name.removesuffix(".weight"))
        if EMBEDDING in changed and self._are_tied:
            self.new.whole[f"{PREFIX}{HEAD}"] = self.new.whole[f"{PREFIX}{EMBEDDING}"]
            if not in_base:
                self.new.settings["ensure_weight_tying"] = True
        if modules:
            self.new.settings["modules_to_save"] = modules
        shown = f"{', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''}"
        self.notes.append(f"{len(changed)} changed tensors are saved whole: {shown}")
        if self._is_resized:
            rows = self.tuned.tensors[EMBEDDING].shape[0]
            self.notes.append(
                f"the vocabulary has {rows} rows, the base's "
                f"{self.base.tensors[EMBEDDING].shape[0]}: with PEFT, resize the base's first "
                "(resize_token_embeddings)"
            )

    @property
    def _is_resized(self) -> bool:
        return self.base.tensors[EMBEDDING].shape != self.tuned.tensors[EMBEDDING].shape

    @property
    def _are_tied(self) -> bool:
        return is_tied(self.base) and is_tied(self.tuned)

    def finished(self) -> NewAdapter:
        """The adapter.

        Raises:
            ValueError: nothing has changed.
        """
        if not self.new.factors:
            raise ValueError(
                f"{self.tuned.label}: no matrix of a layer differs from {self.base.label}. There "
                "is nothing to extract"
            )
        self.new.target_modules = _targets(self.modules, self.new.factors)
        self.new.files = tokenizer_files(self.tuned)
        self.notes += code_notes(self.tuned, self.new.files)
        most = self.extraction.max_error
        over = [m for m, e in self.errors.by_module.items() if most is not None and e > most]
        if over:
            self.notes.append(
                f"rank {self.extraction.rank} does not reach max_error {most:g} in {len(over)} "
                f"matrices, such as {over[0]}"
            )
        return self.new

    def _has_changed(self, name: str) -> bool:
        before, after = _stored(self.base, name), _stored(self.tuned, name)
        return not same_values(self.base, before, self.tuned, after)

    def _whole(self, name: str) -> Floats:
        """A tensor of the tuned model in its own shape; its head even where it is the embedding."""
        name = _stored(self.tuned, name)
        return self._values(self.tuned, name).reshape(self.tuned.tensors[name].shape)

    def _values(self, model: ModelFolder, name: str) -> Floats:
        """A whole tensor as rows, in float32."""
        return float_rows(model, name, 0, rows_of(model.tensors[name].shape)[0])


def _stored(model: ModelFolder, name: str) -> str:
    """What a model calls a tensor that has the values of another."""
    return EMBEDDING if name == HEAD and is_tied(model) else name


def _targets(modules: Sequence[str], factors: Mapping[str, Any]) -> list[str]:
    """Names by which PEFT finds the modules with factors, and no others: short ones if all have."""
    last = {module: module.rpartition(".")[2] for module in modules}
    whole = {last[m] for m in modules} - {last[m] for m in modules if m not in factors}
    return sorted({last[m] if last[m] in whole else m for m in factors})
