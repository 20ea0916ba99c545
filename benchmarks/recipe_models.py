"""The models that tests/recipes name, made small: as many layers and tokens as the recipes say."""

from pathlib import Path
from typing import Any

from tests.tiny_checkpoints import DType, make_llama
from tests.tiny_tokenizers import NORMAL, write_byte_level

SIZES: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 12, "heads": 2, "kv_heads": 1}
STORED: dict[int, DType] = {32: "bfloat16", 40: "float16"}
"""Dtypes by the number of layers, as the models that the recipes were written for have them."""

CHATML = ("<|im_start|>", "<|im_end|>", "<|special|>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|special|>")
TOKENS = {"plain": (), "chatml": CHATML, "llama3": LLAMA3}


def make_recipe_models(folder: Path, dtype: DType | None = None) -> None:
    """Write every model that a recipe of tests/recipes names into a folder, under its name.

    Args:
        folder: where.
        dtype: of all of them; by default as they are usually stored.
    """
    for layers, stored in STORED.items():
        for number, name in enumerate(("base", "a", "b", "c")):
            make_llama(
                folder / f"{name}-{layers}", layers=layers, seed=layers + number, vocab_size=24,
                base=folder / f"base-{layers}" if number else None, tokenizer=True,
                dtype=dtype or stored, **SIZES,
            )  # fmt: skip
    for seed, (name, added) in enumerate(TOKENS.items()):
        special = ("<|end|>", *added)
        make_llama(
            folder / name, seed=seed, vocab_size=NORMAL + len(special), dtype="float32",
            base=folder / "plain" if added else None, **SIZES,
        )  # fmt: skip
        write_byte_level(folder / name, special, eos="<|end|>", chat_template=f"{{# {name} #}}")
