"""How the result of a merge is looked at, as a `MergeConfig` says it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval_compare import METRICS
from eval_perplexity import read_texts
from merge_recipe import brief, unknown_name

PROMPTS = ("Hello! How are you?", "مرحبا، كيف حالك؟")
"""What is asked where no prompts are given."""

FLAGS = ("run_tests", "quick_test", "chat")
COUNTS = {"sample_size": 100, "test_batch_size": 8, "max_new_tokens": 64}
QUICK_TOKENS = 16
LISTS = {"metrics": METRICS, "test_prompts": PROMPTS, "text": ()}
KEYS = (*FLAGS, *COUNTS, *LISTS, "text_file")


@dataclass(frozen=True, kw_only=True)
class Validation:
    """How a result is looked at.

    Attributes:
        wanted: whether a merge does so by itself.
        quick: look at the result alone, not at its base and sources.
        prompts, texts: what it is asked, and what it reads.
        metrics: which numbers; see `eval_compare.METRICS`.
        max_new_tokens, batch_size, chat: see `eval_compare.Settings`.
        notes: what the user should know.
    """

    wanted: bool = False
    quick: bool = False
    prompts: tuple[str, ...] = PROMPTS
    texts: tuple[str, ...] = ()
    metrics: tuple[str, ...] = METRICS
    max_new_tokens: int = COUNTS["max_new_tokens"]
    batch_size: int = COUNTS["test_batch_size"]
    chat: bool = False
    notes: tuple[str, ...] = ()


def read_validation(given: Any) -> tuple[Validation, list[str]]:
    """What a config says of it, and what is wrong with that.

    Args:
        given: None, or a mapping with any of these:
            run_tests (False): look at the result after a merge, beside its base and its sources.
            quick_test (False): look at it after a merge, by one short answer, beside nothing.
            test_prompts: texts to go on with; by default `PROMPTS`.
            chat (False): put them into the chat template.
            max_new_tokens: of an answer, 64 (16 in a quick test).
            test_batch_size: prompts or texts at once, 8.
            text, text_file: a list of texts for the perplexity, or a file as
                `eval_perplexity.read_texts` takes it; by default the prompts.
            sample_size: texts, at most; 100.
            metrics: of `eval_compare.METRICS`; by default all.
    """
    if given is not None and not isinstance(given, Mapping):
        return Validation(), [f"validation must be a mapping, got {brief(given)}"]
    given = {key: value for key, value in (given or {}).items() if value is not None}
    problems = [unknown_name("entry of validation", key, KEYS) for key in given if key not in KEYS]
    flags = {name: given.get(name, False) for name in FLAGS}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            problems.append(f"{name} must be true or false, got {brief(flag)}")
    defaults = {**COUNTS, "max_new_tokens": QUICK_TOKENS} if flags["quick_test"] else COUNTS
    counts = {name: given.get(name, default) for name, default in defaults.items()}
    for name, count in counts.items():
        if not (type(count) is int and count >= 1):
            problems.append(f"{name} must be a whole number of at least 1, got {brief(count)}")
    lists = {name: given.get(name, default) for name, default in LISTS.items()}
    for name, values in lists.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            problems.append(f"{name} must be a list, got {brief(values)}")
        elif wrong := [each for each in values if not isinstance(each, str)]:
            problems.append(f"each of {name} must be a text, got {brief(wrong[0])}")
        elif name == "metrics":
            unknown = [each for each in values if each not in METRICS]
            problems += [unknown_name("metric", each, METRICS) for each in unknown]
    texts = lists["text"]
    if "text" in given and "text_file" in given:
        problems.append("text and text_file are both given. Leave one of them out")
    elif "text_file" in given:
        try:
            texts = read_texts(given["text_file"])
        except (OSError, ValueError, TypeError) as error:
            problems.append(f"text_file: {error}")
    wanted = flags["run_tests"] or flags["quick_test"]
    if wanted and not (lists["test_prompts"] or (texts and "perplexity" in lists["metrics"])):
        problems.append("there is nothing to validate by. Give test_prompts, or text")
    if problems:
        return Validation(), problems
    prompts, metrics = tuple(lists["test_prompts"]), tuple(lists["metrics"])
    notes = []
    if flags["quick_test"] and len(prompts) > 1:
        notes.append(f"quick_test asks the first of {len(prompts)} prompts")
        prompts = prompts[:1]
    if not texts and prompts and "perplexity" in metrics:
        texts = prompts
        notes.append("perplexity and bits per byte are those of the prompts, as no text is given")
    size = counts["sample_size"]
    if len(texts) > size:
        notes.append(f"the first {size} of {len(texts)} texts are read (sample_size)")
    return Validation(
        wanted=wanted,
        quick=flags["quick_test"],
        prompts=prompts,
        texts=tuple(texts[:size]),
        metrics=metrics,
        max_new_tokens=counts["max_new_tokens"],
        batch_size=counts["test_batch_size"],
        chat=flags["chat"],
        notes=tuple(notes),
    ), []
