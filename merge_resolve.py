"""From the parameters of a recipe to those of each tensor.

What holds for every tensor is checked at once; what differs from one to the next, where they are
known.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merge_layers import Place
from merge_methods import METHODS, Method
from merge_parameters import PROFILES, Values, settled
from merge_recipe import Parameter, Recipe, resolve_parameters
from merge_settings import ANY, Setting, value_at


@dataclass(frozen=True)
class Parameters:
    """The parameters of a recipe or of one of its slices.

    Attributes:
        method: whose.
        declared: with the profile's defaults.
        given: by the user; None stands for the default.
        values: with defaults filled in. Where they differ between tensors some are `Setting`s, and
            what depends on others is left for each tensor.
    """

    method: Method
    declared: tuple[Parameter, ...]
    given: Values
    values: Values
    _found: dict[Any, tuple[Values, list[str]]] = field(default_factory=dict, compare=False)

    @property
    def vary(self) -> bool:
        """Whether they differ between tensors."""
        return any(_varies(value) for value in self.values.values())

    def at(self, name: str, t: float, inputs: Sequence[str]) -> tuple[Values, list[str]]:
        """The parameters of a tensor, and what is wrong with them.

        Args:
            name: of the tensor in the result. Filters of what belongs to the whole merge fit it.
            t: where in its slice its layer is.
            inputs: what the models that are merged call it. Filters of what belongs to a model fit
                its own name, whose layer may have another number; all this as in mergekit.
        """
        if not self.vary:
            return self.values, []
        of_input = {each.name for each in self.declared if each.of_input}
        names = {key: inputs[0] if key in of_input else name for key in self.values}
        values, given = (
            {key: _at(value, names.get(key, name), t, inputs) for key, value in of.items()}
            for of in (self.values, self.given)
        )
        known = tuple((key, value, given.get(key)) for key, value in values.items())
        if known not in self._found:
            self._found[known] = self._settled(values, given)
        found, problems = self._found[known]
        return found, [f"{name}: {problem}" for problem in problems]

    def _settled(self, values: Values, given: Values) -> tuple[Values, list[str]]:
        lacking = [
            f"no filter of {parameter.key} fits it. Add an entry without a filter, for all others"
            for parameter in self.declared
            if parameter.required and _lacks(values[parameter.name])
        ]
        if lacking:
            return values, lacking
        complete, problems = settled(self.declared, values, given)
        return complete, [*problems, *self.method.problems(complete)]


def _varies(value: Any) -> bool:
    return isinstance(value, Setting) or (
        isinstance(value, tuple) and any(isinstance(each, Setting) for each in value)
    )


def _at(value: Any, name: str, t: float, inputs: Sequence[str]) -> Any:
    """A parameter's value for a tensor: one, or one for each model."""
    if isinstance(value, list | tuple):
        return tuple(value_at(each, own, t) for each, own in zip(value, inputs, strict=True))
    return value_at(value, name, t)


def _lacks(value: Any) -> bool:
    return value is None or (isinstance(value, tuple) and None in value)


def resolve(recipe: Recipe) -> tuple[list[Parameters], list[str]]:
    """The parameters of each slice (of the whole recipe, if it has none), and what is wrong.

    Args:
        recipe: with a method of `METHODS`.
    """
    method = METHODS[recipe.method]
    is_known = recipe.profile in PROFILES
    declared = method.parameters_of(recipe.profile) if is_known else method.parameters
    parts = [
        (len(each.sources), each.parameters, f"slice {number}: ")
        for number, each in enumerate(recipe.slices, 1)
    ]
    parts = parts or [(len(recipe.models), recipe.parameters, "")]
    found, problems = [], []
    for count, given, where in parts:
        wrong = _count_problems(recipe.method, method, count)
        values, unusable = resolve_parameters(declared, given, count)
        parameters = Parameters(method, declared, given, values)
        if not unusable and is_known and not parameters.vary:  # what goes together: the profile's
            values, unusable = settled(declared, values, given)
            unusable += [] if wrong else method.problems(values)
            parameters = Parameters(method, declared, given, values)
        found.append(parameters)
        problems += [f"{where}{problem}" for problem in (*wrong, *unusable)]
    return found, list(dict.fromkeys(problems))


def _count_problems(name: str, method: Method, count: int) -> list[str]:
    """A wrong number of models."""
    if method.fewest <= count and (method.most is None or count <= method.most):
        return []
    noun = "fine-tuned model" if (method.most or method.fewest) == 1 else "fine-tuned models"
    if method.most is None:
        expected = f"at least {method.fewest} {noun}"
    elif method.fewest == method.most:
        expected = f"exactly {method.most} {noun}"
    else:
        expected = f"{method.fewest} to {method.most} {noun}"
    return [f"{name} takes {expected}, got {count}"]


def tensor_parameters(
    recipe: Recipe,
    slices: list[Parameters],
    places: Mapping[str, Place],
    merged: Iterable[str],
) -> dict[str, Values]:
    """The parameters of every tensor that is merged.

    Raises:
        ValueError: those of a tensor are not in order, or differ where all are merged as one.
    """
    found: dict[str, Values] = {}
    problems: dict[str, str] = {}
    for name in merged:
        place = places[name]
        found[name], wrong = slices[place.slice].at(name, place.t, place.names)
        for problem in wrong:
            problems.setdefault(problem.removeprefix(f"{name}: "), problem)
    problems |= {each: each for each in _together_problems(slices[0].method, found)}
    if problems:
        raise ValueError("\n".join(recipe.placed(problems.values())))
    return found


def unused_filters(slices: Sequence[Parameters], places: Mapping[str, Place]) -> Iterator[str]:
    """Says which filters are part of no tensor's name."""
    names = {*places, *(name for place in places.values() for name in place.names)}
    filters: dict[tuple[str, str], None] = {}
    for each in slices:
        keys = {parameter.name: parameter.key for parameter in each.declared}
        for name, value in each.values.items():
            settings = value if isinstance(value, tuple) else (value,)
            found = (one for one in settings if isinstance(one, Setting))
            filters |= {
                (keys[name], choice.filter): None for one in found for choice in one.choices
            }
    for key, pattern in filters:
        if pattern != ANY and not any(pattern in name for name in names):
            hint = ". A filter is a part of the name; * within it means nothing" * ("*" in pattern)
            yield f"the filter {pattern!r} of {key} is part of no tensor's name{hint}"


def _together_problems(method: Method, found: Mapping[str, Values]) -> Iterator[str]:
    """Parameters that differ between tensors which are merged as one."""
    variants = distinct(found.values())
    if len(variants) > 1 and any(map(method.whole_model, variants)):
        differing = [
            key for key in variants[0] if len({str(each.get(key)) for each in variants}) > 1
        ]
        yield (
            f"{method.title} of the whole model merges all tensors at once, so {differing[0]} "
            "cannot differ between them. Give it one value, or choose trim_scope tensor"
        )


def distinct(parameters: Iterable[Values]) -> list[Values]:
    """Parameters, each set of them once.

    >>> distinct([{"t": 0.5}, {"t": 0.1}, {"t": 0.5}])
    [{'t': 0.5}, {'t': 0.1}]
    """
    return [*{tuple(each.items()): each for each in parameters}.values()]
