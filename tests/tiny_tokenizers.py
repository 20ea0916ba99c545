"""Tokenizers as real models have them, in each of the forms, small and made on the spot."""

import functools
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "a merge of two models is a model that has learnt from both of them",
    "where there is a token there is a row, and where there is a row there is a number",
] * 4
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BYTES, MERGES = 256, 44
NORMAL = BYTES + MERGES
"""Tokens of the byte-level tokenizer before any added ones."""


@functools.cache
def byte_level_json() -> str:
    """A byte-level BPE tokenizer.json, as of Llama 3 and Qwen, with no added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=NORMAL, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    assert tokenizer.get_vocab_size() == NORMAL
    return str(tokenizer.to_str())


def write_byte_level(
    folder: Path,
    special: Sequence[str],
    ordinary: Sequence[str] = (),
    *,
    bos: str | None = None,
    eos: str | None = None,
    chat_template: str | None = None,
    form: str = "tokenizer.json",
    template_in: str = "chat_template.jinja",
) -> dict[str, int]:
    """Write a byte-level tokenizer with these added tokens; ids by token.

    Args:
        special: added tokens that decoding leaves out, with the first ids after the normal ones.
        ordinary: added tokens that count as text, after them.
        form: "tokenizer.json", or "vocab.json" for the older pair with merges.txt.
        template_in: the file for the chat template: its own or tokenizer_config.json.
    """
    tokenizer = Tokenizer.from_str(byte_level_json())
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ordinary])
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 128,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "unk_token": None,  # classes of known models would add one of their own
        "pad_token": None,
    }
    settings |= {role: token for role, token in (("bos_token", bos), ("eos_token", eos)) if token}
    if form == "tokenizer.json":
        tokenizer.save(str(folder / form))
    else:
        settings["tokenizer_class"] = "Qwen2Tokenizer"
        settings["added_tokens_decoder"] = _write_vocab_and_merges(folder, tokenizer)
    if chat_template is not None and template_in == "chat_template.jinja":
        (folder / template_in).write_text(chat_template)
    elif chat_template is not None:
        settings["chat_template"] = chat_template
    write_json(folder / "tokenizer_config.json", settings)
    return dict(tokenizer.get_vocab())


def _write_vocab_and_merges(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """vocab.json and merges.txt; the added tokens as tokenizer_config.json lists them."""
    content = json.loads(tokenizer.to_str())
    write_json(folder / "vocab.json", content["model"]["vocab"])
    merges = [" ".join(merge) for merge in content["model"]["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return {str(entry.pop("id")): entry for entry in content["added_tokens"]}


@functools.cache
def sentencepiece_model() -> bytes:
    """A tokenizer.model with byte fallback, as of Llama 2 and Mistral."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, model_type="bpe", vocab_size=NORMAL,
        byte_fallback=True, minloglevel=2, hard_vocab_limit=True, unk_id=0, bos_id=1, eos_id=2,
        pad_id=-1, character_coverage=1.0,
    )  # fmt: skip
    return model.getvalue()


def write_sentencepiece(folder: Path, added: Sequence[str] = ()) -> None:
    """Write a tokenizer.model and, beside it, added tokens in the two files for them."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    settings: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": False,
    }
    if added:
        ids = {token: NORMAL + index for index, token in enumerate(added)}
        write_json(folder / "added_tokens.json", ids)
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        settings["added_tokens_decoder"] = {
            str(token_id): {"content": token, "special": True} | flags
            for token, token_id in ids.items()
        }
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
