"""Run a finished model: on a GPU in float16 where there is one, on the CPU otherwise."""

import gc
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from model_errors import NoTokenizerError
from model_locate import find_model_folder
from model_safetensors import DTYPE_NAMES
from model_tokenizer import has_tokenizer
from model_utils import format_bytes, free_memory, get_llama, open_model_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Finish = Literal["end", "length"]
"""Why an answer ended: the model said so, or it was as long as it may be."""


@dataclass(frozen=True)
class Running:
    """A model that can be asked.

    Attributes:
        model: in evaluation mode, on `device`.
        tokenizer: its own; None if it has none, so that it cannot be asked.
        device: "cpu", "cuda" or such as "cuda:1".
        dtype: of its weights.
        notes: what the user should know of these choices.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    device: str
    dtype: str
    notes: tuple[str, ...] = ()

    @property
    def longest(self) -> int:
        """How many tokens the model can see at once."""
        return int(getattr(self.model.config, "max_position_embeddings", 2048))


class Answer(NamedTuple):
    """What a model said.

    Attributes:
        prompt: what it was asked.
        text: what it answered, without special tokens.
        tokens: how many it made, with the one that ended the answer.
        finish: why it ended.
    """

    prompt: str
    text: str
    tokens: int
    finish: Finish


def load_model(
    model: str | os.PathLike[str],
    device: str = "auto",
    dtype: str = "auto",
    *,
    needs_tokenizer: bool = True,
) -> Running:
    """Load a model with its tokenizer, to run it.

    Args:
        model: a folder or Hub id.
        device: "auto" for a GPU where there is one, else the CPU; "cpu", "cuda", "cuda:1".
        dtype: "float32", "float16" or "bfloat16"; "auto" for float16 on a GPU, and on the CPU for
            float32, or bfloat16 where float32 would not fit into the memory that is free.
        needs_tokenizer: refuse a model without one.

    Raises:
        ValueError: there is no such device or dtype.
        ModelCompatibilityError: the model or its tokenizer cannot be loaded.
        OSError: a file cannot be read.
    """
    device = chosen_device(device)
    _check_dtype(dtype)
    folder = find_model_folder(model)
    notes: tuple[str, ...] = ()
    if dtype == "auto":
        dtype, notes = ("float16", ()) if device != "cpu" else _dtype_for_cpu(folder)
    with_tokenizer = needs_tokenizer or has_tokenizer(folder)
    tokenizer = load_tokenizer(folder) if with_tokenizer else None
    return Running(get_llama(folder, device, dtype), tokenizer, device, dtype, notes)


def run_loaded(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    device: str = "auto",
    dtype: str = "auto",
) -> Running:
    """Move a model that is in memory to where it runs.

    Args:
        model: is changed: it has the device and dtype afterwards.
        tokenizer: its own.
        device: as `load_model`.
        dtype: as `load_model`, but "auto" leaves it as it is on a CPU.

    Raises:
        ValueError: there is no such device or dtype.
    """
    import torch

    device = chosen_device(device)
    _check_dtype(dtype)
    if dtype == "auto":
        is_own = device == "cpu"
        dtype = str(model.dtype).removeprefix("torch.") if is_own else "float16"
    moved = model.to(device=device, dtype=getattr(torch, dtype)).eval()
    return Running(moved, tokenizer, device, dtype)


def load_tokenizer(model: str | os.PathLike[str], label: str = "") -> "PreTrainedTokenizerBase":
    """The tokenizer of a model, as transformers loads it; no code that comes with it is run.

    Args:
        model: a folder or Hub id.
        label: what it is called in an error; by default as it is named.

    Raises:
        NoTokenizerError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder = Path(model)  # an adapter can have one, too
    if not has_tokenizer(folder):
        folder = find_model_folder(model)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise NoTokenizerError(
            f"{label or model}: transformers cannot load its tokenizer ({_first_line(error)}). Put "
            "the tokenizer of the model that it was tuned from beside it"
        ) from error
    return tokenizer


@contextmanager
def loading_bars(*, show: bool) -> Iterator[None]:
    """Whether transformers shows how far the loading of a model is."""
    from transformers.utils import logging

    were_on = logging.is_progress_bar_enabled()
    if not show:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            logging.enable_progress_bar()


def release_memory() -> None:
    """Give back what a model had that nothing uses any more, before the next one is loaded."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def ask(
    running: Running,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    chat: bool = False,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_answers: Callable[[Sequence[Answer]], None] = lambda _: None,
) -> list[Answer]:
    """What a model answers to prompts, several at once.

    Args:
        running: the model.
        prompts: texts to go on with; with `chat`, messages of a user.
        max_new_tokens: of an answer, at most; fewer where the model cannot see so many.
        batch_size: prompts that are answered at once: more are faster, and take memory.
        chat: put prompts into the model's chat template.
        temperature: 0 always takes the likeliest token; above, tokens are drawn.
        top_p: tokens are drawn from the likeliest that together have this probability, in (0, 1].
        seed: of the draws; a seed and a batch size give one result on one machine.
        on_answers: told the answers of each batch.

    Returns:
        An answer for each prompt, in their order.

    Raises:
        ValueError: a setting is out of range, a prompt is too long, or there is no chat template.
    """
    import torch

    problems = [*answer_problems(max_new_tokens, batch_size, temperature, top_p, seed)]
    if chat and not running.tokenizer.chat_template:
        problems.append("the model has no chat template. Leave chat out, or write its turns")
    if problems:
        raise ValueError("\n".join(problems))
    rows = [_prompt_ids(running, prompt, chat=chat) for prompt in prompts]
    how = {"temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    answers: list[Answer] = []
    with torch.random.fork_rng(), torch.inference_mode(), _own_generation(running, how):
        torch.manual_seed(seed)
        for first, stop in _batches(rows, batch_size, running.longest - max_new_tokens):
            some = rows[first:stop]
            ids, mask = padded(some, running.device, side="left")
            made = running.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=min(max_new_tokens, running.longest - max(map(len, some))),
            )
            tokens = made[:, ids.shape[1] :].tolist()
            new = [
                _answer(running, prompt, own)
                for prompt, own in zip(prompts[first:stop], tokens, strict=True)
            ]
            answers += new
            on_answers(new)
    return answers


@contextmanager
def _own_generation(running: Running, how: Mapping[str, float]) -> Iterator[None]:
    """The model generates as it is told here: no beams, penalties or stops of its own."""
    from transformers import GenerationConfig

    before = running.model.generation_config
    ends = sorted(_end_tokens(running))
    running.model.generation_config = GenerationConfig(
        do_sample=bool(how),
        top_k=0,
        eos_token_id=ends or None,
        pad_token_id=_pad_token(running),
        **how,
    )
    try:
        yield
    finally:
        running.model.generation_config = before


def _batches(
    rows: Sequence[Sequence[int]], batch_size: int, longest: int
) -> Iterator[tuple[int, int]]:
    """Where batches begin and stop; a row longer than `longest`, which cuts its answer, is alone.

    >>> list(_batches([[1], [2], [3, 4, 5], [6], [7]], batch_size=4, longest=2))
    [(0, 2), (2, 3), (3, 5)]
    """
    first = 0
    while first < len(rows):
        stop = first + 1
        while (
            stop < min(len(rows), first + batch_size)
            and max(len(rows[first]), len(rows[stop])) <= longest
        ):
            stop += 1
        yield first, stop
        first = stop


def padded(
    rows: Sequence[Sequence[int]], device: str, *, side: Literal["left", "right"]
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Token ids of several texts as one tensor, and the mask that says which are theirs.

    Args:
        rows: token ids, at least one of each text.
        device: where the tensors are made.
        side: where shorter ones are filled up: "left" to go on with them, "right" to score them.

    Returns:
        Ids and mask, int64, shape (texts, longest).
    """
    import torch

    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[number, place] = torch.tensor(row)
        mask[number, place] = 1
    return ids.to(device), mask.to(device)


def chosen_device(device: str) -> str:
    """A device that there is: "auto" is a GPU if there is one.

    Raises:
        ValueError: there is none of that name.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if has_gpu else "cpu"
    kind, _, number = device.partition(":")
    if kind == "cpu" and number in ("", "0"):
        return "cpu"
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:NUMBER, got {device!r}")
    if kind == "cuda" and not (has_gpu and int(number or 0) < torch.cuda.device_count()):
        raise ValueError(f"there is no device {device} here. Use cpu, or another GPU")
    return device


def _check_dtype(dtype: str) -> None:
    if dtype not in ("auto", *DTYPE_NAMES):
        raise ValueError(f"dtype must be auto, {', '.join(DTYPE_NAMES)}, got {dtype!r}")


def _dtype_for_cpu(folder: Path) -> tuple[str, tuple[str, ...]]:
    """What a model fits into the free memory in, and why that is not float32."""
    with open_model_folder(folder) as opened:
        size = 4 * sum(info.numel for info in opened.tensors.values())
    free = free_memory()
    if free is None or size < free:
        return "float32", ()
    return "bfloat16", (
        f"{folder}: runs in bfloat16: float32 would take {format_bytes(size)}, and "
        f"{format_bytes(free)} are free",
    )


def answer_problems(
    max_new_tokens: int, batch_size: int, temperature: float, top_p: float, seed: int
) -> Iterator[str]:
    """What is wrong with settings of `ask`."""
    for name, number in {"max_new_tokens": max_new_tokens, "batch_size": batch_size}.items():
        if not (type(number) is int and number >= 1):
            yield f"{name} must be a whole number of at least 1, got {number!r}"
    if not (isinstance(temperature, float | int) and 0 <= temperature < math.inf):
        yield f"temperature must be at least 0, got {temperature!r}"
    if not (isinstance(top_p, float | int) and 0 < top_p <= 1):
        yield f"top_p must be in (0, 1], got {top_p!r}"
    if not (type(seed) is int and 0 <= seed < 2**64):
        yield f"seed must be a whole number in [0, 2**64), got {seed!r}"


def ids_to_go_on_with(running: Running, text: str) -> list[int]:
    """Tokens of a text with what its tokenizer puts before it, but no end behind it."""
    ids = list(running.tokenizer(text, verbose=False)["input_ids"])
    own = list(running.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    for begin in range(len(ids) - len(own) + 1):
        if own and ids[begin : begin + len(own)] == own:
            return ids[: begin + len(own)]
    return ids


def _prompt_ids(running: Running, prompt: str, *, chat: bool) -> list[int]:
    """The tokens of a prompt; `ValueError` if no answer would have room behind them."""
    if chat:
        turns = [{"role": "user", "content": prompt}]
        text = running.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        ids = running.tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = ids_to_go_on_with(running, prompt)
    if not ids:
        raise ValueError(f"the prompt {prompt!r} has no tokens. Say something")
    if len(ids) >= running.longest:
        raise ValueError(
            f"the prompt {prompt[:60]!r} has {len(ids)} tokens, and the model can see "
            f"{running.longest}, the answer among them. Shorten it"
        )
    return list(ids)


def _end_tokens(running: Running) -> set[int]:
    """The tokens at which generation ends."""
    config = running.model.generation_config
    ends = None if config is None else config.eos_token_id
    if ends is None:
        ends = running.tokenizer.eos_token_id
    return {ends} if isinstance(ends, int) else {*(ends or ())}


def _pad_token(running: Running) -> int:
    """What fills up answers that have ended; it is masked, so any will do."""
    pad = running.tokenizer.pad_token_id
    return min(_end_tokens(running), default=0) if pad is None else int(pad)


def _answer(running: Running, prompt: str, tokens: list[int]) -> Answer:
    """An answer from what was made, up to the token that ends it."""
    ends = _end_tokens(running)
    stop = next((at for at, token in enumerate(tokens) if token in ends), None)
    own = tokens if stop is None else tokens[: stop + 1]
    text = running.tokenizer.decode(tokens[:stop], skip_special_tokens=True)
    return Answer(prompt, text, len(own), "length" if stop is None else "end")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
