"""The models that tests/recipes name, made small: as many layers and tokens as the recipes say."""

from pathlib import Path

from tiny_checkpoints import make_llama
from tiny_tokenizers import NORMAL, write_byte_level

SIZES = {"hidden_size": 8, "intermediate_size": 12, "heads": 2, "kv_heads": 1}
CHATML = ("<|im_start|>", "<|im_end|>", "<|special|>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|special|>")
TOKENS = {"plain": (), "chatml": CHATML, "llama3": LLAMA3}


def make_recipe_models(folder: Path) -> None:
    """Write every model that a recipe of tests/recipes names into a folder, under its name."""
    for layers in (32, 40):
        base = make_llama(
            folder / f"base-{layers}", layers=layers, seed=layers, vocab_size=24, tokenizer=True,
            dtype="float16", **SIZES,
        )  # fmt: skip
        for number, name in enumerate("abc", 1):
            make_llama(
                folder / f"{name}-{layers}", layers=layers, seed=layers + number, vocab_size=24,
                base=base, tokenizer=True, dtype="float16", **SIZES,
            )  # fmt: skip
    for seed, (name, added) in enumerate(TOKENS.items()):
        special = ("<|end|>", *added)
        make_llama(
            folder / name, seed=seed, vocab_size=NORMAL + len(special), dtype="float32",
            base=folder / "plain" if added else None, **SIZES,
        )  # fmt: skip
        write_byte_level(folder / name, special, eos="<|end|>", chat_template=f"{{# {name} #}}")
