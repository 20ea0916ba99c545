"""What a merge is, as data: the method, the models, the parameters, the output.

A driver's arguments, a command line and whatever comes later all become a `Recipe`, and every
rule about parameters is checked here, once, from the declarations in `merge_methods`.
"""

import difflib
import math
import numbers
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from merge_finite import NAN_POLICIES, NanPolicy
from merge_settings import Choice, Setting, joined
from model_lora import ROUNDINGS, TYINGS, LoraSettings, Rounding, Tying
from model_partial import check_output_dir
from model_safetensors import DTYPE_NAMES
from model_utils import parse_size
from model_vocabulary import VocabularySettings, vocabulary_settings
from scalar_utils import check_clamp_range, check_weight_decay

DEFAULT_SHARD_SIZE = "5GB"

MOST_SHOWN = 100
"""Characters of a value in a message."""

OPTIONS = (
    "include",
    "exclude",
    "merge_embeddings",
    "merge_lm_head",
    "weight_decay",
    "clamp_range",
    "lora_rounding",
    "tied_lora",
    "nan_policy",
)
"""Fields of a recipe that every method has beside its parameters."""

_LORA_OF_PROFILES = {
    "peft": LoraSettings("delta", "shared"),
    "mergekit": LoraSettings("sum", "shared"),
}
"""Where they differ from ours. mergekit folds with PEFT, which then loads adapters in float32."""

KEYS = {
    "weights": "weight",
    "densities": "density",
    "epsilons": "epsilon",
    "gammas": "gamma",
    "mask_lambdas": "mask_lambda",
    "lam": "lambda",
}
"""What parameters are called in recipe files, where it is not their name."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, declared once for Python, commands and checks.

    Attributes:
        name: the keyword, such as "densities".
        kind: float, int, bool or str; what one value must be.
        default: the value, or that of each model, when the user gives none.
        help: what it does, for `--help`.
        check: raises `ValueError` for one value out of range.
        per_model: a list with one value per fine-tuned model.
        choices: the values of a str.
        flag: the command's option, if it is not `--` and the name.
        positional: can be given by its place in the method's functions.
        only: a parameter and the values of it with which this one has an effect.
        required: where it is given for some tensors, it must be for all.
        of_input: belongs to a model, although there is but one; `per_model` ones always do.
    """

    name: str
    kind: type
    default: Any
    help: str
    check: Callable[[Any], None] = lambda _: None
    per_model: bool = False
    choices: tuple[str, ...] = ()
    flag: str = ""
    positional: bool = False
    only: tuple[str, tuple[Any, ...]] | None = None
    required: bool = False
    of_input: bool = False

    @property
    def key(self) -> str:
        """What it is called in recipe files, where each model says its own."""
        return KEYS.get(self.name, self.name)

    def applies(self, values: Mapping[str, Any]) -> bool:
        """Whether it has an effect beside these values of the others."""
        return self.only is None or values.get(self.only[0]) in self.only[1]


class LayerRange(NamedTuple):
    """Consecutive layers of a model.

    Attributes:
        model: as the recipe names it.
        first, stop: the first layer, and the one after the last.
    """

    model: str
    first: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Consecutive layers of the result, and what they are merged from.

    Attributes:
        sources: layers of the models to merge, equally many of each.
        base: those of their common ancestor, for methods that use one.
        parameters: as of a recipe, for these models.
    """

    sources: tuple[LayerRange, ...]
    base: LayerRange | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[LayerRange, ...]:
        """Layers of all models, the base (if any) first."""
        return self.sources if self.base is None else (self.base, *self.sources)

    @property
    def length(self) -> int:
        """How many layers of the result it makes."""
        return self.sources[0].stop - self.sources[0].first


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the bytes of a merged model.

    Attributes:
        method: a name from `merge_methods.METHODS`.
        models: the fine-tuned models: folders or Hub ids.
        base_model: their common ancestor, for methods that use one.
        parameters: values by name; None stands for the default. A value, or one of the list that
            has one for each model, may be a `merge_settings.Setting`.
        slices: layers of the result, from the first to the last, where these are not those of the
            models in their order. Then these have the parameters, and the recipe has none.
        output_dir: the folder to make; None for a model in memory.
        dtype: float32, float16 or bfloat16; None for the dtype of the base (of the first
            model, where there is no base).
        max_shard_size: bytes per weight file, at most, as 5GB, 500MB or a number.
        vocabulary: how vocabularies are brought together.
        tokenizer_source: the model that gives the tokenizer, chat template, generation config
            and special tokens; None for the base (the first model, where there is no base), and
            with vocabulary "max" for the one with the most tokens.
        chat_template: "auto", "none", or the model that gives it; see
            `model_companions.carry`.
        profile: whose conventions the parameters' defaults follow, from `merge_methods.PROFILES`.
        include, exclude: patterns of tensor names, such as "*.mlp.*". What no pattern of the first
            fits (if there are any), or one of the second, is the base's (the first model's).
        merge_embeddings, merge_lm_head: whether the embedding and the head are merged, or the
            base's (the first model's).
        weight_decay: merged values are multiplied by 1 minus this; in [0, 1).
        clamp_range: lowest and highest merged value; None for no bounds.
        lora_rounding, tied_lora: how LoRA adapters are put on their bases; see
            `model_lora.LoraSettings`. None for the profile's way.
        nan_policy: what becomes of NaN and infinity in the models: "error" refuses them, "base"
            takes the base's values instead, "propagate" lets them through.
        notes: what the user should know of how it was read.
        place: where it was read, for messages: file and line.
    """

    method: str
    models: tuple[str, ...]
    base_model: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    slices: tuple[Slice, ...] = ()
    output_dir: Path | None = None
    dtype: str | None = None
    max_shard_size: str | int = DEFAULT_SHARD_SIZE
    vocabulary: VocabularySettings = field(default_factory=VocabularySettings)
    tokenizer_source: str | None = None
    chat_template: str = "auto"
    profile: str = "default"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    merge_embeddings: bool = True
    merge_lm_head: bool = True
    weight_decay: float = 0.0
    clamp_range: tuple[float, float] | None = None
    lora_rounding: Rounding | None = None
    tied_lora: Tying | None = None
    nan_policy: NanPolicy = "error"
    notes: tuple[str, ...] = field(default=(), compare=False)
    place: str = field(default="", compare=False)

    @property
    def options(self) -> dict[str, Any]:
        """Which tensors are merged, and what is done to every merged value.

        JSON has no infinity, so a range that is open at one end has None there.
        """
        options = {name: getattr(self, name) for name in OPTIONS}
        bounds = options["clamp_range"]
        if isinstance(bounds, tuple):
            options["clamp_range"] = tuple(None if math.isinf(each) else each for each in bounds)
        return options

    @property
    def lora(self) -> LoraSettings:
        """How adapters are put on their bases: as they were trained, or as the profile has it."""
        family = str(self.profile).partition("-")[0]
        rounding, tied = _LORA_OF_PROFILES.get(family, LoraSettings())
        return LoraSettings(self.lora_rounding or rounding, self.tied_lora or tied)

    def placed(self, problems: Iterable[str]) -> list[str]:
        """What is wrong with it, with the place where it was read."""
        if not self.place:
            return list(problems)
        return [type(each)(f"{self.place}: {each}") for each in problems]  # it may be unsafe

    @property
    def has_base(self) -> bool:
        """Whether there is a base, for every slice if there are any."""
        if not self.slices:
            return self.base_model is not None
        return all(each.base is not None for each in self.slices)

    @property
    def names(self) -> tuple[str, ...]:
        """All models, the base (if any) first."""
        return self.models if self.base_model is None else (self.base_model, *self.models)


def make_recipe(
    method: str,
    base_model: str | os.PathLike[str] | None,
    models: Sequence[str | os.PathLike[str]],
    parameters: Mapping[str, Any],
    *,
    output_dir: str | os.PathLike[str] | None = None,
    vocabulary: str | VocabularySettings = "min",
    include: str | Sequence[str] | None = (),
    exclude: str | Sequence[str] | None = (),
    clamp_range: Sequence[float] | None = None,
    weight_decay: float = 0.0,
    profile: str | None = "default",
    **settings: Any,
) -> Recipe:
    """A recipe from what a driver is given: any kind of path, a mode as the vocabulary.

    Raises:
        TypeError: a model is not named by a path or Hub id.
    """
    return Recipe(
        method=method,
        base_model=None if base_model is None else model_name(base_model),
        models=model_names(models),
        parameters=parameters,
        output_dir=None if output_dir is None else Path(output_dir),
        vocabulary=vocabulary_settings(vocabulary),
        include=_patterns(include),
        exclude=_patterns(exclude),
        clamp_range=None if clamp_range is None else _plain(clamp_range),
        weight_decay=_plain(weight_decay),
        profile="default" if profile is None else profile,
        **settings,
    )


def _patterns(patterns: str | Sequence[str] | None) -> tuple[str, ...]:
    if patterns is None or isinstance(patterns, str):
        return () if patterns is None else (patterns,)
    return tuple(patterns) if isinstance(patterns, Iterable) else (patterns,)


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's; several as a tuple. What is none stays as it is."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_plain(each) for each in value)
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return float(value) if is_number else value


def model_name(model: str | os.PathLike[str], argument: str = "base_model_path") -> str:
    """A model as a recipe holds it; `TypeError` for anything but a folder or Hub id."""
    if not isinstance(model, str | os.PathLike) or not os.fspath(model):
        raise TypeError(
            f"{argument} must be the name of a model folder or a Hub id, got {brief(model)}"
        )
    return os.fspath(model)


def model_names(
    models: Sequence[str | os.PathLike[str]], argument: str = "ft_model_paths"
) -> tuple[str, ...]:
    """Models as a recipe holds them; `TypeError` for one path instead of a list of them."""
    if isinstance(models, str | os.PathLike) or not isinstance(models, Iterable):
        raise TypeError(f"{argument} must be a list of models, got the single {brief(models)}")
    return tuple(model_name(model, f"each of {argument}") for model in models)


def brief(value: object) -> str:
    """A value for a message: models and tensors print whole pages."""
    text = repr(value)
    if len(text) <= MOST_SHOWN:
        return text
    is_text = isinstance(value, str | int | float)
    return f"{text[:MOST_SHOWN]}..." if is_text else f"a {type(value).__name__}"


def resolve_parameters(
    declared: Sequence[Parameter], given: Mapping[str, Any], model_count: int
) -> tuple[dict[str, Any], list[str]]:
    """All parameters of a method with defaults filled in, and what is wrong with them.

    Args:
        declared: the method's parameters.
        given: the user's values; None stands for the default.
        model_count: number of fine-tuned models.

    Returns:
        Values by name (per-model ones as tuples), and one text per problem. Values with a
        problem are left out.
    """
    known = {parameter.name: parameter for parameter in declared}
    problems = [unknown_name("parameter", name, known) for name in given if name not in known]
    values: dict[str, Any] = {}
    for name, parameter in known.items():
        value, wrong = _resolve(parameter, given.get(name), model_count)
        problems += wrong
        if not wrong:
            values[name] = value
    return values, problems


def _resolve(parameter: Parameter, value: Any, model_count: int) -> tuple[Any, list[str]]:
    """A value, or that of each model, and what is wrong with it; `Setting`s stay such."""
    if value is None:
        default = parameter.default
        return ((default,) * model_count if parameter.per_model else default), []
    if not parameter.per_model:
        return converted(parameter, value)
    value = value.tolist() if hasattr(value, "tolist") else value  # numpy, torch
    if isinstance(value, str) or not isinstance(value, Sequence):
        return None, [f"{parameter.name} must be a list with one entry per model, got {value!r}"]
    if len(value) != model_count:
        return None, [
            f"{parameter.name} must have one entry per model: got {len(value)} "
            f"({', '.join(str(entry) for entry in value)}) for {model_count} models"
        ]
    each = [converted(parameter, entry) for entry in value]
    problems = [
        f"{problem} (model {model})"
        for model, (_, wrong) in enumerate(each, 1)
        for problem in wrong
    ]
    return tuple(entry for entry, _ in each), problems


def converted(parameter: Parameter, value: Any) -> tuple[Any, list[str]]:
    """A value (or a setting's values) in the kind that is declared, and what is wrong with it."""
    if isinstance(value, Setting):
        return _converted_setting(parameter, value)
    try:
        return _convert(parameter, value), []
    except ValueError as error:
        return None, [str(error)]


def _converted_setting(parameter: Parameter, setting: Setting) -> tuple[Any, list[str]]:
    """A setting whose values are converted; what it says nothing of has the default."""
    problems = [problem for value in setting.values for problem in converted(parameter, value)[1]]
    gradient = any(len(choice.values) > 1 for choice in setting.choices)
    if gradient and parameter.kind is int:
        problems.append(f"{parameter.name} takes whole numbers, so it cannot be a gradient")
    if problems:
        return None, list(dict.fromkeys(problems))
    sound = setting.map(lambda value: _convert(parameter, value))
    if parameter.required:
        return sound, []
    return joined([sound, Setting((Choice((parameter.default,)),))]), []


def _convert(parameter: Parameter, value: Any) -> Any:
    """One value in the kind that is declared; an int is a float, a bool is neither."""
    if parameter.choices and not (isinstance(value, str) and value in parameter.choices):
        raise ValueError(
            f"{parameter.name} must be one of {', '.join(parameter.choices)}, got {brief(value)}"
        )
    accepted = {float: numbers.Real, int: numbers.Integral}.get(parameter.kind, parameter.kind)
    if not isinstance(value, accepted) or (isinstance(value, bool) and parameter.kind is not bool):
        raise ValueError(
            f"{parameter.name} must be of type {parameter.kind.__name__}, got {brief(value)}"
        )
    parameter.check(value)
    return parameter.kind(value)


def option_problems(recipe: Recipe) -> list[str]:
    """What is wrong with the options that every method has."""
    problems = []
    for name in ("merge_embeddings", "merge_lm_head"):
        if not isinstance(getattr(recipe, name), bool):
            problems.append(f"{name} must be true or false, got {getattr(recipe, name)!r}")
    for name in ("include", "exclude"):
        wrong = [each for each in getattr(recipe, name) if not isinstance(each, str)]
        if wrong:
            problems.append(f"{name} must be patterns of names, got {wrong[0]!r}")
    if recipe.nan_policy not in NAN_POLICIES:
        problems.append(unknown_name("nan_policy", recipe.nan_policy, NAN_POLICIES))
    elif recipe.nan_policy == "base" and not recipe.has_base:
        problems.append("nan_policy base needs a base_model, whose values are taken")
    for name, choices in (("lora_rounding", ROUNDINGS), ("tied_lora", TYINGS)):
        if getattr(recipe, name) not in (None, *choices):
            problems.append(
                f"{name} must be one of {', '.join(choices)}, got {brief(getattr(recipe, name))}"
            )
    decay: Any = recipe.weight_decay
    if not isinstance(decay, float | int):
        problems.append(f"weight_decay must be a number, got {decay!r}")
        decay = 0.0
    bounds: Any = recipe.clamp_range
    if bounds is not None and not _are_two_numbers(bounds):
        problems.append(f"clamp_range must be two numbers, got {bounds!r}")
        bounds = None
    return [*problems, *said(check_weight_decay, decay), *said(check_clamp_range, bounds)]


def said(check: Callable[..., None], *values: Any, **settings: Any) -> Iterator[str]:
    """What a check that raises `ValueError` says against values."""
    try:
        check(*values, **settings)
    except ValueError as error:
        yield str(error)


def _are_two_numbers(values: Any) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) == 2
        and all(isinstance(value, float | int) for value in values)
    )


def output_problems(recipe: Recipe) -> list[str]:
    """What is wrong with the output that a recipe asks for."""
    problems = []
    if recipe.dtype is not None and (
        not isinstance(recipe.dtype, str) or recipe.dtype not in DTYPE_NAMES
    ):
        problems.append(f"dtype must be one of {', '.join(DTYPE_NAMES)}, got {recipe.dtype!r}")
    try:
        parse_size(recipe.max_shard_size, "max_shard_size")
    except ValueError as error:
        problems.append(str(error))
    if recipe.output_dir is not None:
        try:
            check_output_dir(recipe.output_dir)
        except (FileExistsError, ValueError) as error:
            problems.append(str(error))
    return problems


def unknown_name(noun: str, name: object, known: Iterable[str]) -> str:
    """The text for a name that does not exist, with the nearest one that does."""
    known = list(known)
    lower = {each.lower(): each for each in known}
    near = difflib.get_close_matches(str(name)[:MOST_SHOWN].lower(), lower, n=1)
    hint = f" Did you mean {lower[near[0]]!r}?" if near else ""
    return f"unknown {noun} {brief(name)}; there are: {', '.join(known)}.{hint}"
