"""The methods as the studio shows them: in plain words, with a field for each parameter.

Fields are made from what a method declares, so one that is added to `METHODS` has its settings in
the studio at once. Only the words are written here; without any, its title and source stand there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from merge_methods import METHODS, Method
from merge_recipe import Parameter
from service.requests import FEWEST, MODEL_LIMITS, MOST_MODELS

FIRST = ("linear", "slerp", "ties", "dare")
"""Methods that are shown at once; the others are one click away."""

Kind = Literal["slider", "number", "choice", "switch"]


class Words(NamedTuple):
    """A method for people who have never merged: what it does, and when to choose it."""

    does: str
    choose: str


WORDS: Mapping[str, Words] = {
    "linear": Words(
        "Averages the models, each as much as its weight says.",
        "A good first try, above all for fine-tunes of one base that do similar things.",
    ),
    "slerp": Words(
        "Goes from the first model to the second along an arc, which keeps the size of the weights "
        "that an average would shrink.",
        "For a blend of two models whose base is not at hand.",
    ),
    "ties": Words(
        "Keeps the largest changes of each fine-tune, settles where they pull in opposite "
        "directions, and adds the rest to the base.",
        "For fine-tunes of one base with different skills, when all skills should survive.",
    ),
    "dare": Words(
        "Drops part of each fine-tune's changes at random and scales up those that are left, so "
        "that the changes get in each other's way less often.",
        "For fine-tunes that have changed the base only a little.",
    ),
    "nuslerp": Words(
        "Turns from one model to the other as SLERP does, by their weights; with a base it turns "
        "the changes only.",
        "Instead of SLERP, when you think in weights or have the base at hand.",
    ),
    "multislerp": Words(
        "Averages the directions of the models and keeps their average length.",
        "For what SLERP does, with three models or more.",
    ),
    "karcher": Words(
        "Finds the model in the middle of all others on a sphere, step by step.",
        "For several equal models of which none should lead.",
    ),
    "sequential": Words(
        "Merges the first two models, then the result with the third, and so on.",
        "When the order is meant to matter: later models count more.",
    ),
    "model_stock": Words(
        "Goes from the base towards the average, as far as the models agree on the way.",
        "For fine-tunes of the same task that differ in seed or settings.",
    ),
    "task_arithmetic": Words(
        "Adds up what each fine-tune has changed, and adds the sum to the base.",
        "To add skills, or with a negative weight to take one away.",
    ),
    "della": Words(
        "Drops changes at random, small ones more often than large ones, then settles conflicts "
        "as TIES does.",
        "Instead of DARE, when a few large changes matter most.",
    ),
    "breadcrumbs": Words(
        "Leaves out the largest and the smallest changes and adds those in between.",
        "For many fine-tunes, of which single extreme changes would spoil the result.",
    ),
    "sce": Words(
        "Selects the entries in which the models differ most, weighs each model by its changes "
        "there, and leaves out the minority.",
        "When you do not want to choose weights yourself.",
    ),
    "ram": Words(
        "Adds whole what one model alone has changed, and averages what several have changed.",
        "For models trained by reinforcement, each of which has changed few entries.",
    ),
    "consensus": Words(
        "Keeps the changes that matter to several models and resets those of one model alone.",
        "For many fine-tunes, when what they have in common is wanted.",
    ),
    "nearswap": Words(
        "Moves each weight of the base towards one other model, by a small fixed distance at most.",
        "To give a base a touch of another model.",
    ),
    "arcee_fusion": Words(
        "Takes the weights of one model where its changes stand out, and the base elsewhere.",
        "To take over the essentials of one fine-tune.",
    ),
    "passthrough": Words(
        "Writes one model anew, without mixing anything into it.",
        "To store a model, or a base with an adapter, in another format.",
    ),
}

LABELS: Mapping[str, str] = {
    "t": "Position",
    "density": "Density",
    "lambda": "Strength (lambda)",
    "select_topk": "Selected share (top k)",
    "epsilon": "Epsilon",
    "gamma": "Gamma",
    "seed": "Seed",
    "agreement": "Models that must agree",
    "normalize": "Divide by the sum of the weights",
}
"""Of parameters, by their keys; others are called as in recipes."""

PLAIN: Mapping[tuple[str, str], str] = {
    ("slerp", "t"): "0 is the first model, 1 is the second, 0.5 is halfway.",
    ("dare", "density"): "Share of each model's changes that is kept; the drop rate is the rest.",
    ("", "density"): "Share of each model's changes that is kept.",
    ("", "lambda"): "How strongly the merged changes are added: 0 leaves the base, 1 is as they "
    "are.",
    ("", "select_topk"): "Share of the entries that is merged, those that differ most first.",
}
"""Help in plainer words than the declared, by method (empty for all) and key."""

STARTS: Mapping[str, float] = {"density": 0.5}
"""Where a slider stands at first, if not at the default: keeping all changes is seldom meant."""

MAIN = ("lambda",)
"""Parameters with a slider, beside those that are shares."""

SHARES = (0.0, 1.0, 0.01)
STRENGTHS = (0.0, 2.0, 0.05)
"""Least, most and step of a slider."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """A parameter, as something to fill in.

    Attributes:
        key: in the request.
        label, help: for people.
        kind: how it is asked for.
        default: without it, as JSON; None where it depends on others.
        start: what the field holds at first.
        span: least, most and step of a slider.
        step: of a number, as HTML has it.
        choices: values of a choice, and what they are called.
        only: another key and its values (as JSON) with which this one has an effect.
        is_main: shown at once.
    """

    key: str
    label: str
    help: str
    kind: Kind
    default: Any
    start: Any
    span: tuple[float, float, float] = SHARES
    step: str = "any"
    choices: tuple[tuple[str, str], ...] = ()
    only: tuple[str, tuple[Any, ...]] | None = None
    is_main: bool = False


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A method, as the studio shows it.

    Attributes:
        name: in requests.
        title, does, choose: for people.
        base: whether it takes one: required, optional, none.
        fewest, most: number of models.
        has_weights: each model has one.
        weights_are_shares: only their proportions matter, unless `normalize` is switched off.
        fields: of its parameters, without weights.
    """

    name: str
    title: str
    does: str
    choose: str
    base: str
    fewest: int
    most: int
    has_weights: bool
    weights_are_shares: bool
    fields: tuple[Field, ...]

    @property
    def takes(self) -> str:
        """How many models, in words."""
        if self.fewest == self.most:
            models = "1 model" if self.most == 1 else f"{self.most} models"
        elif self.most < MOST_MODELS:
            models = f"{self.fewest} to {self.most} models"
        else:
            models = f"{self.fewest} or more models" if self.fewest > 1 else "any number of models"
        ends = {"required": " and their base", "optional": ", with or without a base", "none": ""}
        end = ends[self.base].replace("their", "its") if self.most == 1 else ends[self.base]
        return models + end


def shown_methods() -> list[Shown]:
    """All methods, those to begin with first."""
    names = [*FIRST, *(name for name in METHODS if name not in FIRST)]
    return [_shown(name, METHODS[name]) for name in names]


def _shown(name: str, method: Method) -> Shown:
    words = WORDS.get(name, Words(f"{method.title[:1].upper()}{method.title[1:]}.", method.source))
    fewest, most = MODEL_LIMITS.get(name, (FEWEST.get(name, 1), MOST_MODELS))
    keys = {each.key: each for each in method.parameters}
    divides = keys.get("normalize")
    return Shown(
        name=name,
        title=f"{method.title[:1].upper()}{method.title[1:]}",
        does=words.does,
        choose=words.choose,
        base=method.base,
        fewest=max(fewest, method.fewest),
        most=min(most, method.most or MOST_MODELS),
        has_weights="weight" in keys,
        weights_are_shares="weight" in keys
        and (method.base != "required" if divides is None else bool(divides.default)),
        fields=tuple(_field(name, each) for each in method.parameters if each.key != "weight"),
    )


def _field(method: str, parameter: Parameter) -> Field:
    key = parameter.key
    label = LABELS.get(key, key.replace("_", " ").capitalize())
    text = PLAIN.get((method, key)) or PLAIN.get(("", key)) or _sentence(parameter.help)
    asked = _asked(parameter)
    slides = asked["kind"] == "slider"
    return Field(
        key=key,
        label=label,
        help=text,
        default=parameter.default,
        start=STARTS.get(key, parameter.default) if slides else parameter.default,
        only=parameter.only,
        is_main=slides or parameter.positional,
        **asked,
    )


def _asked(parameter: Parameter) -> dict[str, Any]:
    """How a parameter is asked for, as attributes of a `Field`."""
    by_default = (("", "by default"),) if parameter.default is None else ()
    if parameter.choices:
        named = ((each, each.replace("_", " ")) for each in parameter.choices)
        return {"kind": "choice", "choices": (*by_default, *named)}
    if parameter.kind is bool and by_default:
        return {"kind": "choice", "choices": (*by_default, ("true", "yes"), ("false", "no"))}
    if parameter.kind is bool:
        return {"kind": "switch"}
    if parameter.kind is float and is_share(parameter):
        return {"kind": "slider", "span": SHARES}
    if parameter.key in MAIN:
        return {"kind": "slider", "span": STRENGTHS}
    return {"kind": "number", "step": "1" if parameter.kind is int else "any"}


def is_share(parameter: Parameter) -> bool:
    """Whether a parameter goes from 0 to 1, by what its own check lets through."""
    return (
        _accepts(parameter, 0.5) and not _accepts(parameter, 1.5) and not _accepts(parameter, -0.5)
    )


def _accepts(parameter: Parameter, value: float) -> bool:
    try:
        parameter.check(value)
    except ValueError:
        return False
    return True


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
