"""A comparison of models as a page: a bar for each number, and the answers side by side.

One file that needs no network. Texts of models have their own direction, so that Arabic stands at
the right.
"""

import html
import math
from collections.abc import Iterator

from eval_compare import Comparison, Measured, shown
from model_text import cleaned, html_page

STYLE = """
.charts { display: flex; flex-wrap: wrap; gap: 2rem; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: .3rem; }
svg text { font: 12px system-ui, sans-serif; fill: #1b1f24; }
th, td { border: 1px solid #d0d7de; padding: .35rem .6rem; vertical-align: top; }
th { background: #f6f8fa; font-weight: 600; text-align: start; }
td.number { text-align: right; }
td.text { white-space: pre-wrap; min-width: 12rem; text-align: start; }
.wide { overflow-x: auto; }
"""

COLOURS = {"base": "#8c959f", "source": "#0969da", "merge": "#bf3989"}
"""Of the roles."""

BAR, GAP, LABEL, LENGTH, VALUE = 18, 6, 150, 240, 90
"""Pixels: height of a bar and the space below it, width of names, longest bar, and numbers."""

LONGEST_NAME = 22
"""Characters of a name beside a bar."""


def comparison_page(comparison: Comparison) -> str:
    """The page, one HTML file."""
    title = f"{', '.join(each.name for each in comparison.models)}: compared"
    return html_page(title, "\n".join(_parts(title, comparison)), STYLE)


def _parts(title: str, comparison: Comparison) -> Iterator[str]:
    yield f"<h1>{_isolated(title)}</h1>"
    for note in comparison.notes:
        yield f"<p class=what>{_isolated(note)}</p>"
    if comparison.columns:
        yield "<div class=charts>"
        yield from (_chart(comparison, name) for name in comparison.columns)
        yield "</div>"
        yield "<h2>Numbers</h2>"
        yield _numbers(comparison)
    if comparison.definitions:
        yield "<ul>"
        for name, text in comparison.definitions.items():
            yield f"<li><b>{_words(name)}</b>: {_isolated(text)}</li>"
        yield "</ul>"
    if comparison.prompts:
        yield "<h2>Answers</h2>"
        yield _answers(comparison)


def _chart(comparison: Comparison, name: str) -> str:
    """A bar for each model, as long as its number, from 0."""
    numbers = [each.numbers().get(name) for each in comparison.models]
    finite = [abs(number) for number in numbers if number is not None and math.isfinite(number)]
    scale = LENGTH / (max(finite, default=0) or 1)
    height = len(numbers) * (BAR + GAP)
    bars = "\n".join(
        _bar(row * (BAR + GAP), model, number, scale)
        for row, (model, number) in enumerate(zip(comparison.models, numbers, strict=True))
    )
    width = LABEL + LENGTH + VALUE
    return (
        f"<figure><figcaption>{_words(name)}</figcaption>\n"
        f'<svg width="{width}" height="{height}" role="img" aria-label="{_words(name)}">\n'
        f"{bars}\n</svg></figure>"
    )


def _bar(top: int, model: Measured, number: float | None, scale: float) -> str:
    length = abs(number) * scale if number is not None and math.isfinite(number) else 0
    name = model.name
    short = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
    middle = top + BAR * 0.7
    return (
        f'<text x="{LABEL - 8}" y="{middle:.0f}" text-anchor="end">'
        f"{_escaped(short)}<title>{_escaped(name)}, {model.role}</title></text>"
        f'<rect x="{LABEL}" y="{top}" width="{length:.1f}" height="{BAR}" '
        f'fill="{COLOURS[model.role]}"/>'
        f'<text x="{LABEL + length + 6:.0f}" y="{middle:.0f}">{shown(number)}</text>'
    )


def _numbers(comparison: Comparison) -> str:
    heads = "".join(f"<th>{_words(name)}</th>" for name in comparison.columns)
    rows = [f"<tr><th>model</th><th>role</th>{heads}</tr>"]
    for each in comparison.models:
        numbers = each.numbers()
        cells = "".join(
            f"<td class=number>{shown(numbers.get(name))}</td>" for name in comparison.columns
        )
        rows.append(f"<tr><th>{_isolated(each.name)}</th><td>{each.role}</td>{cells}</tr>")
    return _wide(rows)


def _answers(comparison: Comparison) -> str:
    """A row for each prompt, a column for each model."""
    heads = "".join(f"<th>{_isolated(each.name)}</th>" for each in comparison.models)
    rows = [f"<tr><th>prompt</th>{heads}</tr>"]
    for at, prompt in enumerate(comparison.prompts):
        said = [each.answers[at].text.strip() for each in comparison.models]
        cells = "".join(_text(text or "(empty)") for text in said)
        rows.append(f"<tr>{_text(prompt)}{cells}</tr>")
    return _wide(rows)


def _text(text: str) -> str:
    return f'<td class=text dir="auto">{_escaped(text)}</td>'


def _isolated(text: str) -> str:
    """A text beside others, whose direction is its own."""
    return f"<bdi>{_escaped(text)}</bdi>"


def _escaped(text: str) -> str:
    return html.escape(cleaned(text))


def _wide(rows: list[str]) -> str:
    table = "\n".join(rows)
    return f"<div class=wide><table>\n{table}\n</table></div>"


def _words(name: str) -> str:
    return html.escape(name.replace("_", " "))
