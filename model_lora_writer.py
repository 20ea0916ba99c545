"""LoRA adapters written as PEFT loads them."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model_config import without_code
from model_errors import ModelCompatibilityError
from model_files import read_text
from model_locate import ADAPTER_CONFIG
from model_lora import ADAPTER_WEIGHTS, PREFIX
from model_partial import PartialFolder
from model_safetensors import TensorInfo, narrow, widen
from model_tokenizer import CONFIG as TOKENIZER_CONFIG
from model_tokenizer import SPECIAL
from model_utils import rows_of
from model_writer import FolderWriter

Floats = NDArray[np.float32]

_ENDS = {
    False: (".lora_A.weight", ".lora_B.weight"),
    True: (".lora_embedding_A", ".lora_embedding_B"),
}
"""What the factors of a module are called, and those of an embedding."""


@dataclass
class NewAdapter:
    """An adapter in memory. Its factors are scaled already: alpha is r everywhere.

    Attributes:
        base_name: the model that it belongs to.
        factors: lora_A (r, in) and lora_B (out, r) by module, and whether it is an embedding.
        whole: tensors that take the place of the base's, by the names in an adapter's file.
        settings: entries of adapter_config.json for these.
        target_modules: names by which PEFT finds the modules that have factors.
        files: small files to be copied beside it.
    """

    base_name: str
    factors: dict[str, tuple[Floats, Floats, bool]] = field(default_factory=dict)
    whole: dict[str, Floats] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    target_modules: Sequence[str] = ()
    files: Sequence[Path] = ()

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks by module."""
        return {module: len(lora_a) for module, (lora_a, _, _) in self.factors.items()}

    @property
    def tensors(self) -> dict[str, Floats]:
        """All tensors by the names in an adapter's file."""
        found = {}
        for module, (lora_a, lora_b, embeds) in self.factors.items():
            for end, values in zip(_ENDS[embeds], (lora_a, lora_b), strict=True):
                found[f"{PREFIX}{module}{end}"] = values
        return found | self.whole

    @property
    def config(self) -> dict[str, Any]:
        """adapter_config.json.

        alpha is r, for every module: so its scale is 1, as long as the adapter is not
        rank-stabilised, and that is said. Where ranks differ, those of single modules stand in
        rank_pattern, and the same in alpha_pattern.
        """
        ranks = self.ranks
        rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
        other = {module: each for module, each in ranks.items() if each != rank}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_name,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": other,
            "alpha_pattern": other,
            "target_modules": [*self.target_modules],
            "use_rslora": False,
            "use_dora": False,
            "fan_in_fan_out": False,
            "lora_dropout": 0.0,
            "bias": "none",
            "modules_to_save": None,
            "init_lora_weights": True,
            "inference_mode": True,
            **self.settings,
        }


def write_adapter(
    adapter: NewAdapter,
    partial: PartialFolder,
    dtype: str,
    texts: Mapping[str, str],
    about: Mapping[str, Any] | None = None,
) -> int:
    """Write an adapter into a new folder, which appears complete or not at all.

    Args:
        adapter: what to write.
        partial: where; begun.
        dtype: safetensors name, such as "F32".
        texts: other files by name.
        about: JSON for the manifest.

    Returns:
        Bytes of its tensors.

    Raises:
        ModelCompatibilityError: a tensor is NaN or infinite in that dtype.
        FileExistsError: the output is not free any more.
        OSError: the disk is full, or the place cannot be written.
    """
    tensors = adapter.tensors
    broken = [
        name
        for name, values in tensors.items()
        if not np.isfinite(widen(_stored(values, dtype), dtype)).all()
    ]
    if broken:
        raise ModelCompatibilityError(
            f"{len(broken)} tensors of the adapter do not fit {dtype} or are NaN "
            f"({', '.join(broken[:3])}). Choose another dtype, or smaller weights"
        )
    infos = {name: TensorInfo(dtype, values.shape) for name, values in tensors.items()}
    size = sum(info.nbytes for info in infos.values())
    others = sum(len(text.encode()) for text in texts.values()) + 2**18
    others += sum(path.stat().st_size for path in adapter.files)
    with FolderWriter(partial, infos, max(1, size), ADAPTER_WEIGHTS, others=others) as writer:
        for name, values in tensors.items():
            writer.write_rows(name, 0, _stored(values, dtype).reshape(rows_of(values.shape)))
            writer.finish({name: {}})
        for path in adapter.files:
            if path.name in (TOKENIZER_CONFIG, SPECIAL):
                text = read_text(path.parent, path.name, str(path.parent))
                writer.write_text(path.name, without_code(text))
            else:
                writer.copy_file(path)
        writer.write_text(ADAPTER_CONFIG, json.dumps(adapter.config, indent=2) + "\n")
        for name, text in texts.items():
            writer.write_text(name, text)
        writer.commit(about)
    return size


def _stored(values: Floats, dtype: str) -> NDArray[Any]:
    """A tensor as it is written."""
    return narrow(np.ascontiguousarray(values), dtype)
