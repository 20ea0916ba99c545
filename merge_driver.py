"""The two functions and the command of a method, made from what `merge_methods` declares.

A driver (`<method>_llama.py`) names its method and says what it is for; its arguments, their
defaults and their help are those of the method's parameters, so they are written once.
"""

import functools
import inspect
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import Parameter as Argument
from typing import TYPE_CHECKING, Any, NamedTuple

from merge_command import run_command
from merge_methods import METHODS, Method
from merge_parameters import PROFILES
from merge_progress import Progress
from merge_recipe import DEFAULT_SHARD_SIZE, Parameter, make_recipe
from merge_report import MergeReport
from merge_run import merge_to_folder, merge_to_model
from model_vocabulary import VocabularySettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Paths = Sequence[str | os.PathLike[str]]


class Driver(NamedTuple):
    """What a driver offers.

    Attributes:
        to_model: merges into a transformers model in memory.
        to_folder: streams from folders to a folder.
        main: the command; returns its exit status.
    """

    to_model: "Callable[..., PreTrainedModel]"
    to_folder: Callable[..., MergeReport]
    main: Callable[..., int]


class Setting(NamedTuple):
    """A keyword argument that is the same for every method."""

    name: str
    default: Any
    kind: Any
    help: str


OF_THE_RECIPE = (
    Setting(
        "profile",
        "default",
        str,
        f"whose conventions the defaults follow: {', '.join(PROFILES)}. Parameters that are given "
        "win.",
    ),
    Setting(
        "vocabulary",
        "min",
        str | VocabularySettings,
        '"min", "max", "union", "base", "model:<name>" or "error", or '
        "`model_vocabulary.VocabularySettings`, which say what each does.",
    ),
    Setting(
        "tokenizer_source",
        None,
        str | None,
        "the model whose tokenizer and special tokens the result has; by default the base, the "
        'first model where there is none (with "max", the one with the most tokens).',
    ),
)
OF_THE_TENSORS = (
    Setting(
        "include",
        (),
        Sequence[str],
        'patterns of the names of the tensors to merge, such as "*.mlp.*"; by default all. The '
        "others are the base's (the first model's, where there is no base).",
    ),
    Setting("exclude", (), Sequence[str], "patterns of tensors that are not merged."),
    Setting("merge_embeddings", True, bool, "merge the embedding; else it is the base's."),
    Setting("merge_lm_head", True, bool, "merge the head; else it is the base's."),
    Setting("weight_decay", 0.0, float, "merged values are multiplied by 1 minus this, in [0, 1)."),
    Setting(
        "clamp_range",
        None,
        tuple[float, float] | None,
        "lowest and highest merged value, such as (-2.0, 2.0); by default there are no bounds.",
    ),
    Setting(
        "lora_rounding",
        None,
        str | None,
        'of a base with LoRA adapters: "none", "sum" or "delta"; see `model_lora.LoraSettings`.',
    ),
    Setting(
        "tied_lora",
        None,
        str | None,
        'what becomes of a tied head of which adapters change one side: "untie" or "shared"; see '
        "`model_lora.LoraSettings`.",
    ),
    Setting(
        "nan_policy",
        "error",
        str,
        'what becomes of NaN and infinity in the models: "error" refuses them, "base" takes the '
        'base\'s values instead, "propagate" lets them through.',
    ),
)
OF_A_FOLDER = (
    Setting(
        "output_dir",
        Argument.empty,
        str | os.PathLike[str],
        "the folder to make; it must not exist, or be empty.",
    ),
    Setting(
        "dtype",
        None,
        str | None,
        '"float32", "float16" or "bfloat16"; by default that of the base, of the first model '
        "where there is none.",
    ),
    Setting(
        "chat_template",
        "auto",
        str,
        '"auto" (the tokenizer\'s model\'s, or the only one there is), "none", or the model that '
        "gives it. `tokenizer_source` gives the tokenizer and generation config.",
    ),
    Setting(
        "max_shard_size",
        DEFAULT_SHARD_SIZE,
        str | int,
        'bytes per weight file, at most, such as "5GB".',
    ),
)
OF_THE_RUN = (
    Setting(
        "threads", None, int | None, "parts of tensors at work at once; by default one per core."
    ),
    Setting(
        "max_memory",
        None,
        str | int | None,
        'most memory of the process, such as "4GB", a result in memory included; by default there '
        "is no limit. Refused where it is too little.",
    ),
    Setting("progress", True, Progress, "show how far it is; or a function that is told."),
    Setting(
        "verify_inputs",
        False,
        bool,
        "before merging, compare all weight files with the SHA-256 that are known of them.",
    ),
)
OF_A_MERGE = (
    Setting(
        "findings",
        False,
        bool,
        "also put into the report what each model has changed, and where they disagree.",
    ),
    Setting(
        "resume",
        False,
        bool,
        "go on with what a stopped run of the same merge has left; if it was finished, do nothing.",
    ),
)
"""Of how a merge into a folder is run."""

OF_EVERY_RECIPE = (*OF_THE_RECIPE, *OF_THE_TENSORS)

TO_MODEL = """
Returns:
    A transformers model on the CPU in float32. It is the only model held in memory.
"""
TO_FOLDER = """
Returns:
    A report. The memory taken does not grow with the models; transformers is not imported.
"""
RAISES = """
Raises:
    TypeError: a model is not named by a path or Hub id.
    ValueError: a parameter is out of range or its count is wrong.
    ModelCompatibilityError: models cannot be read or do not fit together.
    OutputBusyError: another process is making this output.
    OSError: the disk is full, or a file cannot be read or written.
"""


def make_driver(name: str, module: str, description: str) -> Driver:
    """The functions `<name>_merge_llama` and `<name>_merge_llama_to_folder`, and the command.

    Args:
        name: of the method, from `METHODS`.
        module: the driver's.
        description: the driver's docstring; its first line says what the method does, and all of
            it is shown by `--help`.
    """
    method = METHODS[name]

    def to_model(values: Mapping[str, Any]) -> "PreTrainedModel":
        recipe = make_recipe(name, **_of_recipe(method, values))
        return merge_to_model(recipe, **_of_run(values))

    def to_folder(values: Mapping[str, Any]) -> MergeReport:
        of_folder = {setting.name: values[setting.name] for setting in OF_A_FOLDER}
        recipe = make_recipe(name, **_of_recipe(method, values), **of_folder)
        of_merge = {setting.name: values[setting.name] for setting in OF_A_MERGE}
        return merge_to_folder(recipe, **_of_run(values), **of_merge)

    shared = (*OF_EVERY_RECIPE, *OF_THE_RUN)
    in_folder = (
        OF_A_FOLDER[0],
        OF_A_FOLDER[1],
        *OF_EVERY_RECIPE,
        *OF_A_FOLDER[2:],
        *OF_THE_RUN,
        *OF_A_MERGE,
    )
    what = description.strip().splitlines()[0]
    functions = (
        _function(f"{name}_merge_llama", method, shared, to_model, what, TO_MODEL),
        _function(f"{name}_merge_llama_to_folder", method, in_folder, to_folder, what, TO_FOLDER),
    )
    for function in functions:
        function.__module__ = module
    return Driver(*functions, functools.partial(run_command, name, description))


def _of_recipe(method: Method, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe is made of, from the arguments of a call."""
    return {
        "base_model": values.get("base_model_path"),
        "models": values["ft_model_paths"],
        "parameters": {p.name: values[p.name] for p in method.parameters},
        **{setting.name: values[setting.name] for setting in OF_EVERY_RECIPE},
    }


def _of_run(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in ("device", *(each.name for each in OF_THE_RUN))}


def _function(
    name: str,
    method: Method,
    settings: Sequence[Setting],
    merge: Callable[[Mapping[str, Any]], Any],
    what: str,
    returns: str,
) -> Callable[..., Any]:
    """A function with the arguments of a method, which `help` shows."""
    arguments = [*_arguments(method, settings)]
    signature = inspect.Signature(
        [argument for argument, _ in arguments],
        return_annotation=inspect.get_annotations(merge)["return"],
    )

    def call(*given: Any, **named: Any) -> Any:
        try:
            bound = signature.bind(*given, **named)
        except TypeError as error:
            raise TypeError(f"{name}(): {error}") from None
        bound.apply_defaults()
        return merge(bound.arguments)

    helps = [
        textwrap.fill(
            f"{argument.name}: {text}", 96, initial_indent="    ", subsequent_indent=" " * 8
        )
        for argument, text in arguments
    ]
    source = f"\nSource: {method.source}.\n"
    call.__name__ = call.__qualname__ = name
    call.__doc__ = "\n".join([what, "", "Args:", *helps, returns.rstrip(), RAISES, source.strip()])
    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def _arguments(method: Method, settings: Sequence[Setting]) -> Iterator[tuple[Argument, str]]:
    """The arguments of a method's functions, with what each is for."""
    positional, keyword = Argument.POSITIONAL_OR_KEYWORD, Argument.KEYWORD_ONLY
    base = "the common ancestor: a model folder or Hub id."
    if method.base == "required":
        yield Argument("base_model_path", positional, annotation=str | os.PathLike[str]), base
    models = "the fine-tuned models: folders or Hub ids."
    yield Argument("ft_model_paths", positional, annotation=Paths), models
    for parameter in method.parameters:
        if parameter.positional:
            yield _argument(parameter, positional)
    device = 'where to compute, "cpu" or "cuda".'
    yield Argument("device", positional, default="cpu", annotation=str), device
    if method.base == "optional":
        annotation = str | os.PathLike[str] | None
        yield Argument("base_model_path", keyword, default=None, annotation=annotation), base
    for parameter in method.parameters:
        if not parameter.positional:
            yield _argument(parameter, keyword)
    for name, default, kind, text in settings:
        yield Argument(name, keyword, default=default, annotation=kind), text


def _argument(parameter: Parameter, kind: Any) -> tuple[Argument, str]:
    """A method's parameter as an argument of a function; None stands for the profile's default."""
    text = parameter.help
    if parameter.choices:
        text += f": {', '.join(parameter.choices)}"
    if parameter.per_model:
        text += "; one for each model"
    annotation: Any = Sequence[parameter.kind] if parameter.per_model else parameter.kind  # type: ignore[name-defined]
    text += _by_default(parameter)
    return Argument(parameter.name, kind, default=None, annotation=annotation | None), f"{text}."


def _by_default(parameter: Parameter) -> str:
    """ "; by default 1.0 each"."""
    if parameter.default is None:
        return ""
    return f"; by default {parameter.default}{' each' if parameter.per_model else ''}"
