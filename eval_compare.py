"""Finished models side by side: base, sources and merge on the same texts, prompts and tasks.

Every number is defined here or where it comes from (`DEFINITIONS`); nothing is mixed into a score.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

from eval_perplexity import Perplexity, perplexity, perplexity_after
from eval_texts import distinct, ngrams, repetition
from model_inference import Answer, Running, answer_problems, ask, release_memory
from model_text import isolated, name_width, padded_name, printable

Role = Literal["base", "source", "merge"]
ROLES: tuple[Role, ...] = get_args(Role)
Metric = Literal["perplexity", "coherence", "fluency"]
METRICS: tuple[Metric, ...] = get_args(Metric)

DEFINITIONS = {
    "perplexity": "exp of the mean negative log-likelihood per token of the texts; lower is better",
    "bits_per_byte": "the same per byte of what was predicted, for models with other tokenizers",
    "repetition_4": "coherence: share of the sequences of 4 words of an answer that repeat an "
    "earlier one of it, mean of the answers that have any (seq-rep-4, arXiv:1908.04319); lower is "
    "better",
    "distinct_1": "coherence: share of different words in all answers (arXiv:1510.03055)",
    "distinct_2": "coherence: share of different pairs of words in all answers",
    "fluency": "perplexity of the answers under {judge}, which reads each as plain text after its "
    "prompt; lower is more like what that model would say, and a wrong answer can be fluent",
}
"""What the numbers of a comparison are, in the order of its columns."""


class Candidate(NamedTuple):
    """A model to compare.

    Attributes:
        name: what it is called in the comparison.
        role: what it is.
        load: loads it, or returns what is in memory already.
    """

    name: str
    role: Role
    load: Callable[[], Running]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How models are compared.

    Attributes:
        metrics: of `METRICS`: which numbers there are, besides those of tasks.
        chat: put prompts into the chat template of each model that has one.
        max_new_tokens: of an answer, at most.
        batch_size: prompts or windows at once.
        max_length, stride: of windows; see `eval_perplexity.perplexity`.
        temperature, top_p, seed: of answers; see `model_inference.ask`.
        tasks: what else is to be found out about a loaded model: values by name.
    """

    metrics: tuple[str, ...] = METRICS
    chat: bool = False
    max_new_tokens: int = 64
    batch_size: int = 8
    max_length: int | None = None
    stride: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    tasks: Callable[[Running], Mapping[str, float]] | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was found out about one model.

    Attributes:
        name, role: as in its `Candidate`.
        device, dtype: where it ran.
        perplexity: on the texts; None without texts.
        answers: to the prompts, in their order.
        tokens_per_second: of the answers; None without prompts.
        fluency: of the answers under the judge; None without prompts.
        tasks: values by name.
    """

    name: str
    role: Role
    device: str
    dtype: str
    perplexity: Perplexity | None = None
    answers: tuple[Answer, ...] = ()
    tokens_per_second: float | None = None
    fluency: Perplexity | None = None
    tasks: Mapping[str, float] = field(default_factory=dict)

    def numbers(self) -> dict[str, float | None]:
        """All numbers by their names, tasks last; None for what was not asked for."""
        said = [answer.text for answer in self.answers]
        repeated = [repetition(text) for text in said if ngrams(text, 4)]
        of_texts, of_answers = self.perplexity, self.fluency
        found: dict[str, float | None] = {
            "perplexity": None if of_texts is None else of_texts.value,
            "bits_per_byte": None if of_texts is None else of_texts.bits_per_byte,
            "repetition_4": sum(repeated) / len(repeated) if repeated else None,
            "distinct_1": distinct(said, 1),
            "distinct_2": distinct(said, 2),
            "fluency": None if of_answers is None else of_answers.value,
        }
        return {**found, **self.tasks}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several models on the same texts, prompts and tasks.

    Attributes:
        models: in the order in which they were given.
        prompts: what they were asked.
        judge: the model under which fluency is measured.
        metrics: which numbers are shown.
        notes: what the user should know.
    """

    models: tuple[Measured, ...]
    prompts: tuple[str, ...] = ()
    judge: str = ""
    metrics: tuple[str, ...] = METRICS
    notes: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the numbers that at least one model has."""
        hidden = {name for name in DEFINITIONS if metric_of(name) not in self.metrics}
        found = [each.numbers() for each in self.models]
        names = dict.fromkeys(name for numbers in found for name in numbers)
        return tuple(
            name
            for name in names
            if name not in hidden and any(numbers.get(name) is not None for numbers in found)
        )

    @property
    def definitions(self) -> dict[str, str]:
        """What the numbers are."""
        return {
            name: DEFINITIONS[name].format(judge=self.judge)
            for name in self.columns
            if name in DEFINITIONS
        }

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: numbers that are not finite are null."""
        return {
            "models": [
                {
                    "name": each.name,
                    "role": each.role,
                    "device": each.device,
                    "dtype": each.dtype,
                    "numbers": {name: _finite(each.numbers().get(name)) for name in self.columns},
                    "tokens": None if each.perplexity is None else each.perplexity.tokens,
                    "tokens_per_second": each.tokens_per_second,
                    "answers": [answer._asdict() for answer in each.answers],
                }
                for each in self.models
            ],
            "judge": self.judge or None,
            "definitions": self.definitions,
            "notes": list(self.notes),
        }

    def summary(self) -> str:
        """A table, what its numbers are, and the answers side by side."""
        lines = [*_table(self)]
        if self.definitions:
            lines += ["", *(f"{name}: {text}" for name, text in self.definitions.items())]
        width = max(name_width(each.name) for each in self.models)
        for at, prompt in enumerate(self.prompts):
            lines += ["", f"> {isolated(prompt)}"]
            for each in self.models:
                lines += _answer_lines(each.name, width, each.answers[at])
        lines += ["", *(f"note: {printable(note)}" for note in self.notes)] if self.notes else []
        return "\n".join(lines)


def metric_of(name: str) -> str:
    """The metric that a number belongs to: what a user asks for."""
    if name == "bits_per_byte":
        return "perplexity"
    return "coherence" if name.startswith(("repetition", "distinct")) else name


def compare(
    candidates: Sequence[Candidate],
    *,
    texts: Sequence[str] = (),
    prompts: Sequence[str] = (),
    settings: Settings = Settings(),
    tell: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Compare models, of which one after the other is in memory.

    Args:
        candidates: at least one, with names that differ.
        texts: for the perplexity.
        prompts: for answers; their fluency is measured under the base, where there is none under
            the first source, and without sources not at all.
        settings: how.
        tell: told each step.

    Raises:
        ValueError: a setting is out of range, or there is nothing to compare by.
        ModelCompatibilityError: a model cannot be loaded.
    """
    texts, prompts = list(texts), list(prompts)
    if problems := [*_problems(candidates, texts, prompts, settings)]:
        raise ValueError("\n".join(problems))
    judge = min(candidates, key=lambda each: ROLES.index(each.role))
    scored = bool(prompts) and "fluency" in settings.metrics and judge.role != "merge"
    order = sorted(candidates, key=lambda each: each is judge)  # it reads what all have said
    found: dict[str, Measured] = {}
    notes: dict[str, None] = {}
    for candidate in order:
        tell(f"{candidate.name}: loading")
        running = candidate.load()
        notes |= dict.fromkeys(running.notes)
        measured, more = _measured(candidate, running, texts, prompts, settings, tell)
        notes |= dict.fromkeys(more)
        found[candidate.name] = measured
        if candidate is judge and scored:
            for name, each in found.items():
                tell(f"{judge.name}: reading the answers of {name}")
                found[name] = replace(each, fluency=_fluency(running, each, settings))
        del running
        release_memory()
    return Comparison(
        models=tuple(found[each.name] for each in candidates),
        prompts=tuple(prompts),
        judge=judge.name if scored else "",
        metrics=settings.metrics,
        notes=tuple(notes),
    )


def _problems(
    candidates: Sequence[Candidate],
    texts: Sequence[str],
    prompts: Sequence[str],
    settings: Settings,
) -> Iterator[str]:
    names = [each.name for each in candidates]
    if not candidates:
        yield "no model is given. Name at least one"
    if twice := {name for name in names if names.count(name) > 1}:
        yield f"two models are called {min(twice)!r}. Give them names that differ"
    if not (prompts or settings.tasks or (texts and "perplexity" in settings.metrics)):
        yield "there is nothing to compare by. Give texts (for the perplexity), prompts or tasks"
    for metric in settings.metrics:
        if metric not in METRICS:
            yield f"there is no metric {metric!r}; there are: {', '.join(METRICS)}"
    yield from answer_problems(
        settings.max_new_tokens,
        settings.batch_size,
        settings.temperature,
        settings.top_p,
        settings.seed,
    )
    if settings.max_length is not None and settings.max_length < 2:
        yield f"max_length must be at least 2, got {settings.max_length}"
    if settings.stride is not None and settings.stride < 1:
        yield f"stride must be at least 1, got {settings.stride}"


def _measured(
    candidate: Candidate,
    running: Running,
    texts: Sequence[str],
    prompts: Sequence[str],
    settings: Settings,
    tell: Callable[[str], None],
) -> tuple[Measured, list[str]]:
    """What a model does by itself, and what the user should know of it."""
    notes = []
    measured = Measured(
        name=candidate.name, role=candidate.role, device=running.device, dtype=running.dtype
    )
    if texts and "perplexity" in settings.metrics:
        tell(f"{candidate.name}: reading {len(texts)} text{'s' if len(texts) > 1 else ''}")
        measured = replace(
            measured,
            perplexity=perplexity(
                running,
                texts,
                batch_size=settings.batch_size,
                max_length=settings.max_length,
                stride=settings.stride,
            ),
        )
    if prompts:
        tell(f"{candidate.name}: answering {len(prompts)} prompt{'s' if len(prompts) > 1 else ''}")
        chat = settings.chat and bool(running.tokenizer.chat_template)
        if settings.chat and not chat:
            notes.append(f"{candidate.name}: has no chat template; it was given the plain prompts")
        started = time.monotonic()
        answers = ask(
            running,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            chat=chat,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
        )
        speed = sum(answer.tokens for answer in answers) / (time.monotonic() - started)
        measured = replace(measured, answers=tuple(answers), tokens_per_second=speed)
        if empty := sum(not answer.text.strip() for answer in answers):
            notes.append(f"{candidate.name}: {empty} of {len(answers)} answers are empty")
    if settings.tasks is not None:
        tell(f"{candidate.name}: tasks")
        measured = replace(measured, tasks=settings.tasks(running))
    return measured, notes


def _fluency(judge: Running, measured: Measured, settings: Settings) -> Perplexity:
    """How the judge reads what a model has answered."""
    return perplexity_after(
        judge,
        [(answer.prompt, answer.text) for answer in measured.answers],
        batch_size=settings.batch_size,
    )


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _table(comparison: Comparison) -> Iterator[str]:
    """A line for each model, a column for each number."""
    columns = comparison.columns
    rows = [
        [each.name, each.role, *(shown(each.numbers().get(name)) for name in columns)]
        for each in comparison.models
    ]
    heads = ["model", "role", *(name.replace("_", " ") for name in columns)]
    widths = [max(map(name_width, column)) for column in zip(heads, *rows, strict=True)]
    for cells in (heads, *rows):
        words = map(padded_name, cells[:2], widths[:2])
        numbers = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
        yield "  ".join([*words, *numbers]).rstrip()


def shown(number: float | None) -> str:
    """A number as a table has it, with four digits.

    >>> shown(12.3456), shown(1.0), shown(5652.1), shown(123456.0), shown(None)
    ('12.35', '1.000', '5652', '1.235e+05', '-')
    """
    return "-" if number is None or math.isnan(number) else f"{number:#.4g}".rstrip(".")


def _answer_lines(name: str, width: int, answer: Answer) -> Iterator[str]:
    """An answer beside the name of who gave it; further lines are indented."""
    cut = " ..." if answer.finish == "length" else ""
    text = isolated(answer.text.strip()) or "(empty)"
    first, *others = f"{text}{cut}".split("\n")
    yield f"  {padded_name(name, width)}  {first}"
    yield from (f"  {'':{width}}  {line}" for line in others)
