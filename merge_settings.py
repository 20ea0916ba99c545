"""Parameters that differ between tensors: gradients over the layers, and values by name.

The grammar is mergekit's. A setting is a list of choices; the first whose filter is part of a
tensor's name gives its value. What a model, its slice and the whole recipe say about one parameter
is one setting, in that order: what no choice fits is left to the next.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

ANY = "*"
"""The filter that fits every tensor."""


class Choice(NamedTuple):
    """A value for some tensors.

    Attributes:
        values: one value; or the points of a gradient from the first layer to the last.
        filter: part of the tensors' names; `ANY` for all.
    """

    values: tuple[Any, ...]
    filter: str = ANY

    def fits(self, name: str) -> bool:
        """Whether a tensor's name has the filter in it."""
        return self.filter == ANY or self.filter in name


@dataclass(frozen=True)
class Setting:
    """A parameter's values.

    Attributes:
        choices: the first that fits a tensor counts.
    """

    choices: tuple[Choice, ...]

    def at(self, name: str, t: float) -> Any:
        """The value for a tensor; None if no choice fits.

        Args:
            name: of the tensor in the result.
            t: where in its slice its layer is: 0 for the first, 1 for the last. Tensors outside
                the layers are at 0.

        >>> t = Setting((Choice((0.0, 1.0, 0.5), "mlp"), Choice((0.3,))))
        >>> [t.at("layers.1.mlp.up_proj", place) for place in (0, 0.25, 1)], t.at("norm", 0)
        ([0.0, 0.5, 0.5], 0.3)
        """
        choice = next((each for each in self.choices if each.fits(name)), None)
        return None if choice is None else interpolate(choice.values, t)

    @property
    def values(self) -> Iterator[Any]:
        """All values and points of gradients."""
        return (value for choice in self.choices for value in choice.values)

    def map(self, change: Callable[[Any], Any]) -> "Setting":
        """The same with other values."""
        return replace(
            self,
            choices=tuple(
                each._replace(values=tuple(map(change, each.values))) for each in self.choices
            ),
        )


def joined(settings: Sequence[Setting]) -> Any:
    """What several levels say of one parameter, the nearest first: one setting, or a plain value.

    >>> joined([Setting((Choice((1.0,), "mlp"),)), Setting((Choice((0.5,)),))]).at("norm", 0)
    0.5
    """
    choices = [choice for setting in settings for choice in setting.choices]
    last = next((i for i, choice in enumerate(choices) if choice.filter == ANY), len(choices))
    return plain(Setting(tuple(choices[: last + 1])))


def plain(setting: Setting) -> Any:
    """A setting that says the same of every tensor as its one value."""
    first = setting.choices[0] if setting.choices else Choice((None,))
    return first.values[0] if first.filter == ANY and len(first.values) == 1 else setting


def written(value: Any) -> Any:
    """A parameter's value, or that of each model, as a recipe file has it.

    >>> written(Setting((Choice((0.0, 1.0), "mlp"), Choice((0.5,)))))
    [{'filter': 'mlp', 'value': [0.0, 1.0]}, {'value': 0.5}]
    >>> written((Setting((Choice((0.0, 1.0)),)), 0.5))
    [[0.0, 1.0], 0.5]
    """
    if isinstance(value, tuple):
        return [written(each) for each in value]
    if not isinstance(value, Setting):
        return value
    entries = [
        ({} if filter == ANY else {"filter": filter})
        | {"value": values[0] if len(values) == 1 else [*values]}
        for values, filter in value.choices
    ]
    is_gradient = len(entries) == 1 and value.choices[0].filter == ANY
    return entries[0]["value"] if is_gradient else entries


def value_at(value: Any, name: str, t: float) -> Any:
    """A parameter's value for a tensor, whether it is a setting or the same for all."""
    return value.at(name, t) if isinstance(value, Setting) else value


def interpolate(points: Sequence[Any], t: float) -> Any:
    """A gradient's value: linear between numbers; other values change by steps.

    >>> interpolate([0.0, 0.5, 0.3], 0.5), interpolate([True, False], 0.9)
    (0.5, True)
    """
    place = t * (len(points) - 1)
    below = int(place)
    if any(isinstance(point, bool | str) for point in points):
        return points[below]
    below = min(below, max(0, len(points) - 2))
    share = place - below
    return points[below] if share == 0 else (1 - share) * points[below] + share * points[below + 1]
