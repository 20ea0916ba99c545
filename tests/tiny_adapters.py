"""Small LoRA adapters written without PEFT, also broken ones."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import gaussian, read_tensors

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


def make_lora(
    folder: Path,
    base: Path,
    *,
    targets: Collection[str] = ("q_proj", "up_proj"),
    rank: int = 4,
    alpha: float = 8,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    changes: Mapping[str, Any] | None = None,
    extra: Mapping[str, torch.Tensor] | None = None,
    drop: Collection[str] = (),
) -> Path:
    """Write an adapter for a base and return its folder; the same arguments give the same bytes.

    Args:
        folder: to be made.
        base: the model folder.
        targets: ends of the names of the modules that get factors.
        rank, alpha: of all of them.
        seed: of the random factors.
        dtype: of the factors.
        changes: entries of adapter_config.json that are other than usual; None removes one.
        extra: further tensors, with their whole names.
        drop: tensors that are left out.
    """
    tensors = {}
    for name, weight in read_tensors(base).items():
        module = name.removesuffix(".weight")
        if module == name or module.rpartition(".")[2] not in targets:
            continue
        out, wide = weight.shape
        for end, shape in ((".lora_A.weight", (rank, wide)), (".lora_B.weight", (out, rank))):
            values = gaussian(f"{seed}{module}{end}", shape) * 0.1
            tensors[f"{PREFIX}{module}{end}"] = values.to(dtype)
    tensors |= dict(extra or {})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(targets),
        **(changes or {}),
    }
    folder.mkdir(parents=True)
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    kept = {name: value for name, value in tensors.items() if name not in drop}
    save_file(kept, folder / WEIGHTS)
    return folder


def change_of(folder: Path, base: Path, strength: float = 1.0) -> dict[str, torch.Tensor]:
    """The tensors of base plus adapter in float32, from the definition: W + s B A."""
    config = json.loads((folder / "adapter_config.json").read_text())
    factors = load_file(folder / WEIGHTS)
    tensors = {name: value.float() for name, value in read_tensors(base).items()}
    for name in list(tensors):
        module = f"{PREFIX}{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in factors:
            a, b = (factors[f"{module}.lora_{each}.weight"].double() for each in "AB")
            scale = config["lora_alpha"] / config["r"] * strength
            tensors[name] = (tensors[name].double() + scale * (b @ a)).float()
    return tensors
