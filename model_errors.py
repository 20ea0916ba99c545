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


class NoTokenizerError(ModelCompatibilityError):
    """A model has no tokenizer, or none that can be loaded."""


class UnsafeModelError(ModelCompatibilityError):
    """A model folder that could do harm: it would run code, or reaches out of itself."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        problems = (problems,) if isinstance(problems, str) else problems
        super().__init__(UnsafeProblem(problem) for problem in problems)


class UnsafeProblem(str):
    """One of the problems of an `UnsafeModelError`, wherever it is told."""


class OutputBusyError(OSError):
    """Another process is making the same output."""


class MemoryLimitError(ValueError):
    """The work takes more memory than is allowed."""


def refusal(problems: Iterable[str]) -> ModelCompatibilityError:
    """The error for all problems together: `UnsafeModelError` if one of them is unsafe.

    >>> type(refusal(["a: quantized", *UnsafeModelError("b: is a pickle").problems])).__name__
    'UnsafeModelError'
    """
    problems = tuple(problems)
    unsafe = any(isinstance(problem, UnsafeProblem) for problem in problems)
    kind = UnsafeModelError if unsafe else ModelCompatibilityError
    return kind(problems)
