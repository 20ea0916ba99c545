"""Perplexity: how surprised a model is by a text.

The exponential of the mean negative log-likelihood per token, each token predicted from those
before it. A text that is longer than the model can see is read in windows that overlap, and of
each only the tokens that the one before did not have are counted (the strided evaluation of
"Perplexity of fixed-length models" in the documentation of transformers).
"""

import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from model_inference import Running, ids_to_go_on_with, padded

IGNORED = -100
"""The label of a token that is not counted."""

BROKEN = "\ufffd"
"""What a tokenizer makes of a part of a letter."""

SCORES_BYTES = 2**30
"""Most memory of the scores of a batch in float32, but for those of a single window."""


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts texts.

    Attributes:
        nats: negative log-likelihood of all tokens together.
        tokens: how many were predicted; the first of a text cannot be.
        bytes: length in UTF-8 of what was predicted.
        texts: how many there were.
    """

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    texts: int = 0

    @property
    def value(self) -> float:
        """The perplexity, at least 1; NaN if no token was predicted, infinite if it overflows."""
        if not self.tokens:
            return math.nan
        try:
            return math.exp(self.nats / self.tokens)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """The same by what was read, which models with other tokenizers can be compared by."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


class Window(NamedTuple):
    """Tokens that a model sees at once.

    Attributes:
        ids: the tokens.
        first: the first of them that is counted.
    """

    ids: list[int]
    first: int


def perplexity(
    running: Running,
    texts: Iterable[str],
    *,
    batch_size: int = 1,
    max_length: int | None = None,
    stride: int | None = None,
    on_tokens: Callable[[int], None] = lambda _: None,
) -> Perplexity:
    """The perplexity of a model on texts, which are read one after the other and not kept.

    Args:
        running: the model.
        texts: each is read on its own.
        batch_size: windows read at once, at most; shorter ones are filled up at the right and the
            filling is not counted, so that the result does not depend on it but for rounding.
        max_length: tokens of a window, at least 2; by default what the model can see, at most 2048.
        stride: how far a window is behind the one before, in [1, max_length); by default half of
            it. A smaller one gives every token more to go by, and takes longer.
        on_tokens: told how many tokens were predicted since the last call.

    Raises:
        ValueError: a setting is out of range.
    """
    length, step = _checked(running, batch_size, max_length, stride)
    read = _Read(running, length, step)
    windows = (window for text in texts for window in read.alone(text))
    nats, tokens = _score(running, windows, batch_size, on_tokens)
    return Perplexity(nats, tokens, read.bytes, read.texts)


def perplexity_after(
    running: Running,
    pairs: Iterable[tuple[str, str]],
    *,
    batch_size: int = 1,
    max_length: int | None = None,
    stride: int | None = None,
    on_tokens: Callable[[int], None] = lambda _: None,
) -> Perplexity:
    """The perplexity of texts that go on with others: answers after their prompts.

    Args:
        running: the model.
        pairs: what comes before, and the text that is scored; they are tokenized apart.
        batch_size, max_length, stride, on_tokens: as `perplexity`.

    Raises:
        ValueError: a setting is out of range.
    """
    length, step = _checked(running, batch_size, max_length, stride)
    read = _Read(running, length, step)
    windows = (window for before, text in pairs for window in read.after(before, text))
    nats, tokens = _score(running, windows, batch_size, on_tokens)
    return Perplexity(nats, tokens, read.bytes, read.texts)


def _checked(
    running: Running, batch_size: int, max_length: int | None, stride: int | None
) -> tuple[int, int]:
    """Length and stride of windows."""
    length = min(running.longest, 2048) if max_length is None else max_length
    step = max(1, length // 2) if stride is None else stride
    if not 2 <= length <= running.longest:
        raise ValueError(
            f"max_length must be in [2, {running.longest}], what the model can see; got {length}"
        )
    if not 1 <= step < length:
        raise ValueError(f"stride must be in [1, {length}), got {step}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return length, step


class _Read:
    """Texts as windows; counts how many there were, and the bytes of what is predicted."""

    def __init__(self, running: Running, length: int, stride: int) -> None:
        self.texts = self.bytes = 0
        self._running = running
        self._windows = functools.partial(windows_of, length=length, stride=stride)

    def alone(self, text: str) -> Iterator[Window]:
        """A text whose first token, if it is of the text, cannot be predicted."""
        ids = self._running.tokenizer(text, verbose=False)["input_ids"]
        self._count(text, ids[:1])
        return self._windows(ids)

    def after(self, before: str, text: str) -> Iterator[Window]:
        """A text that goes on with another one."""
        ids = ids_to_go_on_with(self._running, before)
        own = self._running.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        self._count(text, [] if ids else own[:1])
        return self._windows([*ids, *own], counted=max(1, len(ids)))

    def _count(self, text: str, unpredicted: list[int]) -> None:
        first = self._running.tokenizer.decode(unpredicted, skip_special_tokens=True)
        self.texts += 1
        self.bytes += max(0, len(text.encode()) - len(first.replace(BROKEN, "?").encode()))


def _score(
    running: Running,
    windows: Iterator[Window],
    batch_size: int,
    on_tokens: Callable[[int], None],
) -> tuple[float, int]:
    """Negative log-likelihood of what is counted in windows, and how many tokens that are."""
    nats, tokens = 0.0, 0
    for batch in _batches(windows, batch_size, running.model.config.vocab_size):
        count = sum(len(window.ids) - window.first for window in batch)
        nats, tokens = nats + _nats(running, batch), tokens + count
        on_tokens(count)
    return nats, tokens


def _batches(windows: Iterator[Window], batch_size: int, vocabulary: int) -> Iterator[list[Window]]:
    """Windows that are read at once: no more than there is room for their scores."""
    batch: list[Window] = []
    for window in windows:
        longest = max(len(each.ids) for each in (*batch, window))
        nbytes = 4 * (len(batch) + 1) * longest * vocabulary
        if batch and (len(batch) == batch_size or nbytes > SCORES_BYTES):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def read_texts(path: str | os.PathLike[str]) -> list[str]:
    """The texts of a UTF-8 file.

    Args:
        path: of a `.jsonl` file every line is a text, as a JSON string or under "text"; any other
            file is one text.

    Raises:
        ValueError: it holds no text.
        OSError: it cannot be read.
    """
    path = Path(path)
    content = path.read_text(encoding="utf-8-sig")
    if path.suffix != ".jsonl":
        texts = [content]
    else:
        lines = enumerate(content.split("\n"), 1)  # others that end a line may stand in a string
        texts = [_text_of(line, f"{path}:{number}") for number, line in lines if line.strip()]
    if not any(text.strip() for text in texts):
        raise ValueError(f"{path}: there is no text in it")
    return texts


def _text_of(line: str, place: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error})") from error
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise ValueError(f'{place}: expected a JSON string, or an object with a string as "text"')
    return text


def windows_of(ids: list[int], length: int, stride: int, counted: int = 1) -> Iterator[Window]:
    """Windows in which every token is counted once, but for those that are `counted` already.

    >>> list(windows_of([5, 6, 7, 8, 9], length=4, stride=2))
    [Window(ids=[5, 6, 7, 8], first=1), Window(ids=[7, 8, 9], first=2)]
    """
    for begin in range(0, len(ids), stride):
        if counted >= len(ids):
            return
        if counted < begin + length:
            yield Window(ids[begin : begin + length], counted - begin)
            counted = begin + length


def _nats(running: Running, batch: list[Window]) -> float:
    """Negative log-likelihood of the tokens of windows that count, in float32 row by row."""
    import torch
    from torch.nn.functional import cross_entropy

    ids, mask = padded([window.ids for window in batch], running.device, side="right")
    labels = ids.masked_fill(mask == 0, IGNORED)
    for row, window in enumerate(batch):
        labels[row, : window.first] = IGNORED
    with torch.inference_mode():
        logits = running.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        rows = [
            cross_entropy(scores.float(), wanted, ignore_index=IGNORED, reduction="sum").double()
            for scores, wanted in zip(logits[:, :-1], labels[:, 1:], strict=True)
        ]
    return float(torch.stack(rows).sum())
