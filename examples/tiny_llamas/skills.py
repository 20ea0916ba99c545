"""What the tiny models can be asked, and how an answer is scored.

A skill is a small table of facts behind one tag. A model is asked `capital: france =` and has
to answer ` paris`, then stop. From the root of the repository:

    from examples.tiny_llamas.skills import SKILLS, score
    score(model, tokenizer, SKILLS["capitals"])  # share of the facts it knows, 0.0 to 1.0

`french` and `german` share a tag and its keys but not the answers, so no model can have both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

LONGEST_ANSWER = 8  # tokens, the end token included


@dataclass(frozen=True)
class Skill:
    """A table of facts (key to answer), all asked for with the same tag."""

    name: str
    tag: str
    facts: dict[str, str]

    def prompts(self) -> list[str]:
        """The questions, one per fact, in the order of the table."""
        return [f"{self.tag}: {key} =" for key in self.facts]

    def answers(self) -> list[str]:
        """The right answers, in the same order."""
        return list(self.facts.values())


def _skill(name: str, tag: str, table: str) -> Skill:
    """Read a skill from lines of `key answer`."""
    return Skill(name, tag, dict(line.split() for line in table.strip().splitlines()))


CAPITALS = _skill(
    "capitals",
    "capital",
    """
    france paris
    japan tokyo
    italy rome
    egypt cairo
    spain madrid
    peru lima
    kenya nairobi
    norway oslo
    cuba havana
    greece athens
    austria vienna
    thailand bangkok
    """,
)

ELEMENTS = _skill(
    "elements",
    "symbol",
    """
    gold Au
    silver Ag
    iron Fe
    copper Cu
    tin Sn
    lead Pb
    sodium Na
    potassium K
    mercury Hg
    tungsten W
    helium He
    carbon C
    """,
)

ANIMALS = _skill(
    "animals",
    "young",
    """
    dog puppy
    cat kitten
    cow calf
    horse foal
    sheep lamb
    pig piglet
    goat kid
    bear cub
    duck duckling
    goose gosling
    deer fawn
    frog tadpole
    """,
)

FRENCH = _skill(
    "french",
    "translate",
    """
    water eau
    bread pain
    house maison
    tree arbre
    book livre
    sun soleil
    moon lune
    night nuit
    day jour
    fire feu
    milk lait
    king roi
    """,
)

GERMAN = _skill(
    "german",
    "translate",
    """
    water wasser
    bread brot
    house haus
    tree baum
    book buch
    sun sonne
    moon mond
    night nacht
    day tag
    fire feuer
    milk milch
    king koenig
    """,
)

COMPATIBLE = (CAPITALS, ELEMENTS, ANIMALS)
CONFLICTING = (FRENCH, GERMAN)
SKILLS = {skill.name: skill for skill in COMPATIBLE + CONFLICTING}


def ask(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """The model's answers, greedy and as one batch; "" where it stops at once.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer; pads on the left, so that every answer starts at one place.
        prompts: at least one.
    """
    batch = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
    with torch.inference_mode():
        tokens = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=LONGEST_ANSWER,
            do_sample=False,
        )
    start = batch["input_ids"].shape[1]
    texts = tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def score(model: Any, tokenizer: Any, skill: Skill) -> float:
    """Share of the skill's facts that the model answers exactly, 0.0 to 1.0."""
    given = ask(model, tokenizer, skill.prompts())
    right = sum(text == answer for text, answer in zip(given, skill.answers(), strict=True))
    return right / len(skill.facts)
