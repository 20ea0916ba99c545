"""What methods' parameters are: declarations that several share, and what goes together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from merge_recipe import Parameter, said
from scalar_utils import (
    DENOMINATORS,
    ELECT_METHODS,
    ELECT_ON,
    K_RULES,
    TRIM_SCOPES,
    TRIM_TIES,
    check_density,
    check_lam,
    check_normalizable,
    check_seed,
    check_ties_weights,
    check_weights,
)

Values = Mapping[str, Any]
"""A method's parameters, resolved."""

PROFILES = ("default", "mergekit", "mergekit-0.1.4", "mergekit-0.0.6", "paper", "peft")
"""Whose conventions the defaults follow; "mergekit" is 0.1.5."""

MERGEKITS = ("mergekit", "mergekit-0.1.4", "mergekit-0.0.6")


def normalize(default: bool, what: str = "") -> Parameter:
    """Whether to divide by the sum of the weights."""
    return Parameter("normalize", bool, default, f"divide by the sum of the weights{what}")


def variant(default: str, text: str, *choices: str) -> Parameter:
    """Which of a method's variants."""
    return Parameter("variant", str, default, text, choices=choices)


WEIGHTS = Parameter(
    "weights",
    float,
    1.0,
    "multiplier of each model",
    lambda w: check_weights([w]),
    per_model=True,
    positional=True,
    required=True,
)
DENSITIES = Parameter(
    "densities",
    float,
    1.0,
    "share of each task vector that is kept, in [0, 1]",
    check_density,
    per_model=True,
    positional=True,
)
LAM = Parameter(
    "lam", float, 1.0, "scale of the merged task vector (lambda)", check_lam, flag="--lambda"
)
SEED = Parameter("seed", int, 0, "seed of the random masks, in [0, 2**64)", check_seed)
OF_THOSE_WHO_AGREE = " of the models that agree"
ELECTS = "linear adds the task vectors, ties elects signs"
ELECTION = (
    Parameter(
        "denominator",
        str,
        None,
        "what the sum over the models that agree is divided by: their weights, their number, or "
        "nothing; by default their weights if normalize is on",
        choices=DENOMINATORS,
    ),
    Parameter(
        "elect_on",
        str,
        "weighted",
        "models vote with their weighted task vectors, or as these are",
        choices=ELECT_ON,
    ),
    Parameter(
        "elect_method",
        str,
        "mass",
        "a vote counts with its magnitude, or as one",
        choices=ELECT_METHODS,
    ),
    Parameter(
        "negative_weights",
        bool,
        False,
        "accept them where the sum is divided by weights; the result can then have any size",
    ),
)
TRIM = (
    Parameter(
        "trim_scope",
        str,
        "tensor",
        "what a density is a share of: each tensor, each of its rows, or the whole model",
        choices=TRIM_SCOPES,
    ),
    Parameter(
        "trim_ties",
        str,
        "index",
        "of equal changes at the cut, keep the first ones, or all",
        choices=TRIM_TIES,
    ),
    Parameter(
        "k_rule",
        str,
        "floor",
        "how many a density keeps of n: int(density n) and at least 1 (floor), one more (paper), "
        "or that and maybe none (peft)",
        choices=K_RULES,
    ),
)
L1_OR_NOT = Parameter(
    "rescale",
    str,
    "none",
    "scale what is kept up to the same L1 norm, or not",
    choices=("l1", "none"),
)


def only_with(name: str, value: Any, parameters: Sequence[Parameter]) -> tuple[Parameter, ...]:
    """Parameters that have an effect with one value of another alone."""
    return tuple(replace(each, only=(name, (value,))) for each in parameters)


PEFT_ELECTION = {"elect_on": "unweighted", "denominator": "count"}
ALLOW = {name: {"negative_weights": True} for name in MERGEKITS}


def normalizable(values: Values) -> Iterator[str]:
    """Weights that cannot be used, or not be divided by their sum, if they are to be."""
    weights = values["weights"]
    wrong = list(said(check_weights, weights))
    yield from wrong
    if values["normalize"] and not wrong:
        yield from said(check_normalizable, weights)


def electable(values: Values) -> Iterator[str]:
    """Weights that do not fit how a method with an election, or its variant without, divides."""
    if "denominator" not in values:
        yield from normalizable(values)
        return
    divides = values["denominator"] == "weight" and not values["negative_weights"]
    yield from said(check_ties_weights, values["weights"], normalize=divides)


def trimmable(values: Values) -> Iterator[str]:
    """As `electable`, and parts of a trim that do not go together."""
    yield from electable(values)
    if values.get("elect_zero") == "global_majority" and values["trim_scope"] == "tensor":
        yield (
            "elect_zero global_majority (the default of profile paper) looks at the whole model, "
            "so trim_scope must be model or row, got tensor"
        )
    if values["rescale"] == "l1" and values["trim_scope"] == "row":
        yield ("rescale l1 keeps the norm of what is trimmed as one, so trim_scope must not be row")


def settled(
    declared: Sequence[Parameter], values: Values, given: Values
) -> tuple[dict[str, Any], list[str]]:
    """Parameters that have an effect, those filled in whose defaults depend on others.

    Args:
        declared: the method's.
        values: all of them, resolved.
        given: what the user said; None stands for nothing.

    Returns:
        Values by name, and one text per parameter that was given for nothing (other than as it is
        by itself).
    """
    complete, problems = dict(values), []
    for parameter in declared:
        if parameter.only is None or parameter.applies(values):
            continue
        value = complete.pop(parameter.name)
        each = set(value) if parameter.per_model else {value}
        if given.get(parameter.name) is not None and each != {parameter.default}:
            other, needed = parameter.only
            problems.append(
                f"{parameter.name} has no effect with {other} {values[other]}. Leave it out, or "
                f"give {other} {' or '.join(map(str, needed))}"
            )
    if "normalize" in complete and complete["normalize"] is None:
        complete["normalize"] = complete["variant"] == "ties"
    if "denominator" in complete and "normalize" in complete:
        problems += _settle_denominator(complete, given)
    return complete, problems


def _settle_denominator(values: dict[str, Any], given: Values) -> list[str]:
    """Bring `normalize` and `denominator` into line; what was given wins over a profile."""
    normalize, denominator = given.get("normalize"), given.get("denominator")
    if normalize is not None and denominator is not None and normalize == (denominator == "none"):
        return [f"normalize {normalize} contradicts denominator {denominator}. Leave one out"]
    if denominator is None and (normalize is not None or values["denominator"] is None):
        values["denominator"] = "weight" if values["normalize"] else "none"
    values["normalize"] = values["denominator"] != "none"
    return []


# How often inputs are read, and what is gathered for each run of a row


def trim_passes(values: Values) -> int:
    """One to find the thresholds and one to merge; more where a sample is misleading."""
    trims = any(0 < density < 1 for density in values["densities"])
    passes = 2 if trims and values["trim_scope"] != "row" else 1
    return passes + int(values.get("elect_zero") == "global_majority")


def rescaled(passes: int, values: Values) -> int:
    """One pass more to rescale to the same L1 norm."""
    return passes + int(values["rescale"] == "l1")


def gram_sums(_: Values, models: int) -> int:
    """Dot products of all pairs."""
    return models * (models + 1) // 2


def l1_sums(values: Values, models: int) -> int:
    """Norms before and after, to rescale."""
    return 2 * models if values["rescale"] == "l1" else 0
