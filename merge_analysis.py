"""Where models disagree, with or without merging them: as JSON, and as a page with heat maps.

The page is one file that needs no network: tables whose cells are coloured, a row per layer and a
column per projection.
"""

import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_card import public_names
from merge_findings import LARGEST_SHARE, TASK_VECTORS, TensorSums, groups, layer_of, pairs_of
from merge_plan import Plan
from model_text import html_page, numbered

PARALLEL = 0.9995
"""Cosine above which SLERP takes the straight line."""

NOTABLE, DEVIATIONS = 0.05, 5
"""How far above one half, or of a layer above the whole model's, a share of conflicts is worth
saying; and above one half at least how many standard deviations of what chance makes of so few
entries."""

CONTRAST = 4.0
"""Shares of conflicts an eighth away from chance have half their colour."""

ORDER = ("input", "q_", "k_", "v_", "o_", "post_attention", "gate", "up", "down")
"""Of the columns, by what the names of projections contain."""


@dataclass(frozen=True)
class Analysis:
    """What models have changed and where they disagree.

    Attributes:
        models: the fine-tuned models, by their public names.
        base_model: their common ancestor; None where the method has none.
        tensors: per tensor, what `merge_findings.TensorSums.to_dict` says.
        layers, projections: the same, over all tensors of a layer or with one role.
        whole: the same, over everything.
        advice: what it suggests.
    """

    models: tuple[str, ...]
    base_model: str | None
    tensors: Mapping[str, Mapping[str, Any]]
    layers: Mapping[str, Mapping[str, Any]]
    projections: Mapping[str, Mapping[str, Any]]
    whole: Mapping[str, Any]
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return dict(vars(self))

    def summary(self) -> str:
        """What it suggests, in a few lines."""
        count = len(self.models)
        what = "task vectors" if self.base_model else "weights"
        lines = [f"analyzed the {what} of {count} model{'s' if count > 1 else ''}"]
        return "\n".join([*lines, *self.advice])


def make_analysis(plan: Plan, findings: Mapping[str, Mapping[str, Any]]) -> Analysis:
    """What was gathered by `merge_findings.analyze`, put in order."""
    sums: dict[str, TensorSums] = {name: found["sums"] for name, found in findings.items()}
    names = public_names(plan.recipe.names)
    models = tuple(numbered([names[model] for model in plan.recipe.models]))
    tensors = {name: each.to_dict() for name, each in sums.items()}
    grouped = groups(sums)
    base = plan.recipe.base_model
    return Analysis(
        models=models,
        base_model=None if base is None else names[base],
        tensors=tensors,
        **grouped,
        advice=tuple(_advice(models, tensors, grouped["layers"], grouped["whole"])),
    )


def saved_analysis(saved: Mapping[str, Any]) -> Analysis | None:
    """The analysis that lies in a merge's report; None where findings were not asked for.

    Args:
        saved: as `merge_card.saved_report` made it; names are public in it already.
    """
    if not saved["task_vectors"]:
        return None
    models = tuple(numbered(saved["models"]))
    tensors = {
        name: found[TASK_VECTORS]
        for name, found in saved["findings"].items()
        if TASK_VECTORS in found
    }
    grouped = saved["task_vectors"]
    return Analysis(
        models=models,
        base_model=saved["base_model"],
        tensors=tensors,
        **grouped,
        advice=tuple(_advice(models, tensors, grouped["layers"], grouped["whole"])),
    )


def _advice(
    models: Sequence[str],
    tensors: Mapping[str, Mapping[str, Any]],
    layers: Mapping[str, Mapping[str, Any]],
    whole: Mapping[str, Any],
) -> Iterator[str]:
    pairs = pairs_of(len(models))
    if "base_norm" in whole:
        densities = [""] * len(models)  # a merge does not gather them
        if "densities" in whole:
            densities = [
                f"; density {each['0.9']:.2g} of each tensor keeps 90% of its squared change, "
                f"{each['0.5']:.2g} half of it; of the whole model (trim_scope model), "
                f"{at_once['0.9']:.2g} and {at_once['0.5']:.2g} do"
                for each, at_once in zip(whole["tensor_densities"], whole["densities"], strict=True)
            ]
        for model, norm, kept in zip(models, whole["relative_norms"], densities, strict=True):
            yield f"{model}: changed by {norm:.2%} of the base's norm{kept}"
    for (i, j), cosine in zip(pairs, whole["cosines"], strict=True):
        yield f"{models[i]} and {models[j]}: cosine {cosine:.3f}"
    if "sign_conflict" in whole and len(models) > 1:
        yield (
            f"{whole['sign_conflict']:.0%} of the changed entries are raised by some and lowered "
            f"by others{_most(layers, whole, _value('sign_conflict'))}"
        )
    for k, (i, j) in enumerate(pairs if "largest_pair_conflicts" in whole else ()):
        rate = whole["largest_pair_conflicts"][k]
        most = _most(layers, whole, _value("largest_pair_conflicts", k))
        yield (
            f"{models[i]} and {models[j]}: where both change most, {rate:.0%} of the entries go "
            f"opposite ways (50% is chance){most}"
        )
        rates = {
            name: found["largest_pair_conflicts"][k]
            for name, found in tensors.items()
            if found["largest_pair_conflicts"][k] > _beyond_chance(found["elements"])
        }
        if rates:
            worst = max(rates, key=lambda name: rates[name])
            yield (
                f"{models[i]} and {models[j]} conflict most in {worst} ({rates[worst]:.0%}): "
                "adding up cancels such changes, electing signs (ties, della) takes the stronger "
                "side"
            )
    if len(models) == 2:
        parallel = sum(found["cosines"][0] > PARALLEL for found in tensors.values())
        yield (
            f"{parallel} of {len(tensors)} tensors have a cosine above {PARALLEL}: of such SLERP "
            "takes the straight line, as linear does"
        )


def _most(
    layers: Mapping[str, Mapping[str, Any]], whole: Mapping[str, Any], measure: "Measure"
) -> str:
    """ "; most in layer 3, 60%", where that is notably more than in the whole."""
    rates = {layer: measure(found) for layer, found in layers.items()}
    worst = max(rates, key=lambda layer: rates[layer], default="")
    is_notable = bool(rates) and rates[worst] > measure(whole) + NOTABLE
    return f"; most in layer {worst}, {rates[worst]:.0%}" if is_notable else ""


def _beyond_chance(elements: int) -> float:
    """The share of conflicts above which a tensor of so many entries shows more than chance."""
    both = LARGEST_SHARE**2 * elements  # that are large in two models by chance
    return 0.5 + max(NOTABLE, DEVIATIONS * 0.5 / math.sqrt(both))


# The page


STYLE = """
.maps { display: flex; flex-wrap: wrap; gap: 2rem; }
figure { margin: 0; overflow-x: auto; } figcaption { font-weight: 600; margin-bottom: .3rem; }
th { font-weight: 500; font-size: .75rem; color: #57606a; padding: .1rem .3rem; }
th.column { text-align: center; vertical-align: bottom; }
th.row { text-align: right; }
td { text-align: center; font-size: .75rem; padding: .18rem .2rem; min-width: 2.4rem; }
td.empty { background: #f6f8fa; }
"""


def analysis_page(analysis: Analysis) -> str:
    """The page, one HTML file."""
    title = f"{', '.join(analysis.models)}: where they agree"
    body = "\n".join(
        [
            f"<h1>{html.escape(title)}</h1>",
            f"<p class=what>{html.escape(_subject(analysis))}</p>",
            "<ul>",
            *(f"<li>{html.escape(line)}</li>" for line in analysis.advice),
            "</ul>",
            *_sections(analysis),
        ]
    )
    return html_page(title, body, STYLE)


def _subject(analysis: Analysis) -> str:
    elements = f"{analysis.whole['elements']:,} entries in {len(analysis.tensors)} tensors"
    if analysis.base_model is None:
        return f"The models' weights: {elements}."
    return f"What each model has changed of {analysis.base_model}: {elements}."


def _sections(analysis: Analysis) -> Iterator[str]:
    """A heading, a sentence and heat maps for everything that was found out."""
    models, whole = analysis.models, analysis.whole
    pairs = [f"{models[i]} and {models[j]}" for i, j in pairs_of(len(models))]
    if "largest_pair_conflicts" in whole and len(models) > 1:
        text = (
            f"Of the entries that are among the largest {LARGEST_SHARE:.0%} of changes in both "
            "models, the share that one raises and the other lowers. 0.5 is chance. Above it the "
            "models want opposite things, and no merge can give both what they want."
        )
        measures = {pair: _value("largest_pair_conflicts", k) for k, pair in enumerate(pairs)}
        yield _section("Conflicts of large changes", text, analysis, measures, _around_chance)
    if "sign_conflict" in whole and len(models) > 1:
        text = "Share of the changed entries, large or small, that some raise and others lower."
        measures = {"all models": _value("sign_conflict")}
        yield _section("Conflicts of sign", text, analysis, measures, _reds(1.0))
    if pairs:
        text = "1: the same direction; 0: nothing in common; -1: opposite."
        measures = {pair: _value("cosines", k) for k, pair in enumerate(pairs)}
        yield _section("Cosines", text, analysis, measures, _diverging)
    if "relative_norms" in whole:
        text = "Norm of the change, as a share of the norm of the base."
        measures = {model: _value("relative_norms", k) for k, model in enumerate(models)}
        highest = max(max(found["relative_norms"]) for found in analysis.tensors.values())
        yield _section("How much has changed", text, analysis, measures, _blues(highest or 1.0))
    if "densities" in whole:
        text = (
            "The least density that keeps 90% of the squared change: of each projection of each "
            "layer, and, where several are taken together, of all of them trimmed at once."
        )
        measures = {model: _value("densities", k, "0.9") for k, model in enumerate(models)}
        yield _section("Densities to try", text, analysis, measures, _blues(1.0))


Measure = Callable[[Mapping[str, Any]], float]
"""From what was found out about some tensors to the number that a cell shows."""

Colour = Callable[[float], str]
"""From a number to the style of its cell."""


def _value(*path: str | int) -> Measure:
    """What stands at a place."""

    def value(found: Any) -> float:
        for key in path:
            found = found[key]
        return float(found)

    return value


def _section(
    title: str,
    text: str,
    analysis: Analysis,
    measures: Mapping[str, Measure],
    colour: Colour,
) -> str:
    maps = "\n".join(_heat_map(name, value, analysis, colour) for name, value in measures.items())
    return (
        f"<h2>{html.escape(title)}</h2>\n<p class=what>{html.escape(text)}</p>\n"
        f"<div class=maps>\n{maps}\n</div>"
    )


def _heat_map(
    caption: str,
    value: Measure,
    analysis: Analysis,
    colour: Colour,
) -> str:
    """A row per layer, a column per projection; below it, what is in no layer."""
    places = {name: layer_of(name) for name in analysis.tensors}
    cells = {place: name for name, place in places.items() if place is not None}
    columns = sorted({projection for _, projection in cells}, key=_place_of_column)
    layers = sorted({layer for layer, _ in cells})
    heads = "".join(f"<th class=column>{html.escape(_short(name))}</th>" for name in columns)
    rows = [f"<tr><th></th>{heads}<th class=column>all</th></tr>"]
    for layer in layers:
        found = [cells.get((layer, name)) for name in columns]
        row = "".join(
            _cell(name, value, analysis.tensors, colour) if name else "<td class=empty></td>"
            for name in found
        )
        row += _cell(str(layer), value, analysis.layers, colour)
        rows.append(f"<tr><th class=row>layer {layer}</th>{row}</tr>")
    row = "".join(_cell(name, value, analysis.projections, colour) for name in columns)
    row += _cell("", value, {"": analysis.whole}, colour)
    rows.append(f"<tr><th class=row>all</th>{row}</tr>")
    for name in (name for name, place in places.items() if place is None):
        cell = _cell(name, value, analysis.tensors, colour)
        rows.append(f"<tr><th class=row>{html.escape(_short(name))}</th>{cell}</tr>")
    table = "\n".join(rows)
    return (
        f"<figure><figcaption>{html.escape(caption)}</figcaption>\n"
        f"<table>\n{table}\n</table></figure>"
    )


def _place_of_column(projection: str) -> tuple[int, str]:
    name = projection.rpartition(".")[2]
    known = [place for place, start in enumerate(ORDER) if name.startswith(start)]
    return (known[0] if known else len(ORDER), projection)


def _cell(
    name: str,
    value: Measure,
    found: Mapping[str, Mapping[str, Any]],
    colour: Colour,
) -> str:
    number = value(found[name])
    shown = f"{number:.2f}" if abs(number) >= 0.095 else f"{number:.3f}"
    shown = "0" if float(shown) == 0 else shown
    tip = html.escape(f"{name}: {number:.6g}".removeprefix(": "), quote=True)
    return f'<td style="{colour(number)}" title="{tip}">{shown}</td>'


def _short(name: str) -> str:
    """Names that fit above a column."""
    words = {
        "self_attn.": "",
        "mlp.": "",
        "_proj": "",
        "input_layernorm": "norm",
        "post_attention_layernorm": "norm 2",
        "model.": "",
        ".weight": "",
    }
    for long, short in words.items():
        name = name.replace(long, short)
    return name


def _style(red: float, green: float, blue: float) -> str:
    """Background of a cell, with text that can be read on it."""
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
    text = ";color:#fff" if dark else ""
    return f"background:#{round(red):02x}{round(green):02x}{round(blue):02x}{text}"


def _towards(share: float, colour: tuple[int, int, int]) -> str:
    """From white to a colour."""
    share = max(0.0, min(1.0, share))
    red, green, blue = (255 - share * (255 - part) for part in colour)
    return _style(red, green, blue)


def _reds(highest: float) -> Colour:
    return lambda number: _towards(number / highest, (165, 15, 21))


def _blues(highest: float) -> Colour:
    return lambda number: _towards(number / highest, (8, 69, 148))


def _around_chance(number: float) -> str:
    """Red above one half, blue below."""
    return _diverging(CONTRAST * (0.5 - number))


def _diverging(number: float) -> str:
    return _towards(number, (8, 69, 148)) if number >= 0 else _towards(-number, (165, 15, 21))
