"""Train the tiny models: a base that knows only the form of an answer, and one model per skill.

Run it from the root of the repository; it writes one folder per model beside itself, in about a
minute:

    python -m examples.tiny_llamas.train

The base sees every question with every answer of its kind except the right ones, drawn at random,
so it answers `capital: france =` with some capital and is always wrong. Each specialist starts
from the stored base and learns its own table by heart. The same machine and the same versions of
the libraries write the same bytes every time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from examples.tiny_llamas.skills import SKILLS, Skill, score

HERE = Path(__file__).resolve().parent
SEED = 4
BASE_STEPS, BASE_BATCH = 400, 128
SKILL_STEPS = 200  # each on the whole table
RATE = 1e-3
INIT = 0.07  # wider than the usual 0.02: words that start far apart mix less when merged
IGNORED = -100  # the label of a token that is not trained on

Example = tuple[str, str]  # prompt, answer
Batch = tuple[torch.Tensor, torch.Tensor]  # token ids and labels, both (examples, longest)


def facts(skill: Skill) -> list[Example]:
    """The skill's table as training examples."""
    return list(zip(skill.prompts(), skill.answers(), strict=True))


def guesses() -> list[Example]:
    """Every question with every wrong answer of its kind, without repeats, in a fixed order."""
    right = {example for skill in SKILLS.values() for example in facts(skill)}
    pairs = [
        (prompt, answer)
        for skill in SKILLS.values()
        for prompt in skill.prompts()
        for kin in SKILLS.values()
        if kin.tag == skill.tag
        for answer in kin.answers()
    ]
    return [pair for pair in dict.fromkeys(pairs) if pair not in right]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE, as LLaMA 3 has: every word of the skills is one token, any text works."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,  # never reached: merging stops when every word is one token
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    lines = [f"{prompt} {answer}" for skill in SKILLS.values() for prompt, answer in facts(skill)]
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=64,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained LLaMA with grouped-query attention and a head of its own."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=INIT,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> Batch:
    """One row per example, padded on the right; only the answer and the end token are labels."""
    rows, labels = [], []
    for prompt, answer in examples:
        asked = tokenizer(prompt)["input_ids"]
        said = tokenizer(f" {answer}</s>", add_special_tokens=False)["input_ids"]
        rows.append(torch.tensor(asked + said))
        labels.append(torch.tensor([IGNORED] * len(asked) + said))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, True, tokenizer.pad_token_id), pad(labels, True, IGNORED)


def draws(whole: Batch, size: int) -> Iterator[Batch]:
    """Batches of `size` rows drawn at random, without end."""
    tokens, labels = whole
    generator = torch.Generator().manual_seed(SEED)
    while True:
        rows = torch.randint(len(tokens), (size,), generator=generator)
        yield tokens[rows], labels[rows]


def train(model: LlamaForCausalLM, batches: Iterator[Batch], steps: int) -> None:
    """Train in place, the learning rate falling to zero on a line; then round to bfloat16.

    The rounded values are the ones that are stored, so what is trained next or scored is what
    anyone will load.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        tokens, labels = next(batches)
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.to(torch.bfloat16).float()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a bfloat16 model folder that transformers 4 and 5 both read."""
    model.to(torch.bfloat16).save_pretrained(folder)
    model.float()
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # 5 writes a name that 4 does not know
    path.write_text(json.dumps(settings, indent=2) + "\n")


def report(name: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print one row of the table of scores."""
    scores = [f"{100 * score(model, tokenizer, skill):9.0f}%" for skill in SKILLS.values()]
    print(f"{name:10}" + "".join(scores), flush=True)


def main(argv: list[str] | None = None) -> int:
    """Train, save and score every model."""
    parser = argparse.ArgumentParser(description="Train the tiny models of the examples.")
    parser.add_argument("--out", type=Path, default=HERE, help="parent of the model folders")
    out: Path = parser.parse_args(argv).out
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # more are no faster at this size, and could change the last bits
    torch.manual_seed(SEED)
    started = time.perf_counter()

    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    train(model, draws(encode(tokenizer, guesses()), BASE_BATCH), BASE_STEPS)
    save(model, tokenizer, out / "base")
    base = {name: param.clone() for name, param in model.state_dict().items()}
    print(" " * 10 + "".join(f"{name:>10}" for name in SKILLS))
    report("base", model, tokenizer)

    for skill in SKILLS.values():
        model.load_state_dict(base)
        train(model, repeat(encode(tokenizer, facts(skill))), SKILL_STEPS)
        save(model, tokenizer, out / skill.name)
        report(skill.name, model, tokenizer)

    size = sum(param.numel() for param in model.parameters())
    print(f"{size:,} parameters each, {time.perf_counter() - started:.0f} s in all")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
