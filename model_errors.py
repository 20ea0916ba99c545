"""The errors for models that cannot be merged."""

from collections.abc import Iterable


class ModelCompatibilityError(Exception):
    """Models that cannot be read or do not fit together; says everything that is wrong at once.

    Attributes:
        problems: one text per problem: where, what is wrong, what was expected, what to do.

    >>> str(ModelCompatibilityError(["a: no config.json", "b: quantized"]))
    'a: no config.json\\nb: quantized'
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class AdapterGivenError(ModelCompatibilityError):
    """A LoRA adapter was named where a model is wanted."""
