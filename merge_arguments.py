"""The arguments of every driver's command: what can be given, and the recipe that they make."""

import argparse
import difflib
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from merge_finite import NAN_POLICIES
from merge_methods import METHODS
from merge_parameters import PROFILES
from merge_recipe import DEFAULT_SHARD_SIZE, Parameter, Recipe
from model_companions import AUTO_TEMPLATE
from model_config import read_config
from model_lora import ROUNDINGS, TYINGS
from model_safetensors import DTYPE_NAMES
from model_vocabulary import CHOICES, VocabularySettings, token_source

EXIT_USAGE = 2

DEFAULT_VOCABULARY = VocabularySettings()
CHECK_HELP = "check a finished model folder, all its weights included; takes no other arguments"
JSON_HELP = "print the report, plan or check as JSON"
SCHEMA_HELP = "print the JSON Schema of our recipes; takes no other arguments"

EXIT_CODES = """exit status:
  0 merged; 2 wrong arguments; 3 models that cannot be merged; 4 models that could do
  harm; 5 disk full; 6 other trouble with files; 7 another run is making this output;
  8 more memory needed than allowed; 129, 130, 143 interrupted. Unless it is 0, there
  is no output folder; what a stopped run has done is kept for --resume."""


_PLACE_OF_BASE = {
    "required": "The base is the first argument, without an option",
    "optional": "The base is given as --base BASE",
    "none": "This method takes no base",
}

_MEANT = {"out": "--save", "output": "--save", "output_dir": "--save", "model": "--ft_models"}
"""Options as others call them."""

_MEANT_WITH_RECIPE = {
    "cuda": "It is written --device cuda",
    "out_shard_size": "It is written --max-shard-size, in bytes, such as 5GB",
    "clone_tensors": "Leave it out: there is nothing to clone",
    "read_to_gpu": "It is written --device cuda",
    "v": "Leave it out; --quiet shows less",
    "random_seed": "It is written --seed",
    "num_threads": "It is written --threads",
    "lazy_unpickle": "Leave it out: memory is bounded anyway, and pickles are not read",
    "low_cpu_memory": "Leave it out: memory is bounded anyway; --max-memory sets how much",
    "copy_tokenizer": "Leave it out: the tokenizer is always carried over",
    "allow_crimes": "Leave it out: models of different architectures cannot be merged",
    "trust_remote_code": "Leave it out: no code of a model is ever run",
    "write_model_card": "Leave it out: the card is always written",
    "save": "OUT is the second argument, without an option",
}
"""Options of mergekit-yaml, and what there is instead."""

_NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|-inf(inity)?$|-nan$", re.IGNORECASE)
"""Arguments that are numbers, although they begin as options do."""


class CommandParser(argparse.ArgumentParser):
    """A parser that says what is wrong in a line, without two screens of usage before it.

    Attributes:
        shortest: the arguments that are needed.
    """

    def __init__(self, shortest: str, **settings: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings
        )
        self.shortest = shortest
        self._negative_number_matcher = _NEGATIVE  # argparse's own knows no exponents

    def error(self, message: str) -> NoReturn:
        """Print every line of a message as an error, and exit."""
        lines = [f"error: {line}" for line in message.splitlines()]
        lines += [f"usage: {self.prog} {self.shortest}", f"{self.prog} --help says more"]
        self.exit(EXIT_USAGE, "\n".join(lines) + "\n")

    def unknown_options(self, argv: Sequence[str]) -> list[str]:
        """The options among some arguments that do not exist, each once."""
        given = itertools.takewhile(lambda each: each != "--", argv)
        options = (each.split("=")[0] for each in given if each[:1] == "-" and each != "-")
        known = self._option_string_actions
        return [
            each
            for each in dict.fromkeys(options)
            if each not in known and not _NEGATIVE.match(each)
        ]

    def nearest(self, option: str) -> str:
        """The option that is spelled most like one that does not exist; empty if none is."""
        names: dict[str, str] = {}
        for each in self._option_string_actions:
            names.setdefault(_plain(each), each)
        near = difflib.get_close_matches(_plain(option), names, n=1)
        return names[near[0]] if near else ""


def _plain(option: str) -> str:
    """An option's name as Python has it."""
    return option.lstrip("-").replace("-", "_")


def parse_arguments(
    method: str, description: str, argv: Sequence[str]
) -> tuple[CommandParser, argparse.Namespace]:
    """The arguments of a method's command; exits with a text where they are wrong.

    Args:
        method: a name from `METHODS`.
        description: the driver's docstring; shown by `--help` as it stands.
        argv: arguments.
    """
    parser = command_parser(method, description)
    problems = [_unknown(method, parser, option) for option in parser.unknown_options(argv)]
    if problems:  # before argparse misses what was misspelled
        parser.error("\n".join(problems))
    arguments, others = parser.parse_known_args(argv)
    if others:
        parser.error(
            f"not expected: {' '.join(others)}. {_PLACE_OF_BASE[METHODS[method].base]}; the "
            "fine-tuned models follow --ft_models"
        )
    return parser, arguments


def _unknown(method: str, parser: CommandParser, option: str) -> str:
    """What is wrong with an option that a command does not know."""
    name, near = _plain(option), parser.nearest(option)
    if name == _plain(near):
        return f"{option} is written {near}"
    owners = [
        other
        for other in METHODS
        if any(name in _names(parameter) for parameter in METHODS[other].parameters)
    ]
    if owners:
        return f"{option} is an option of {', '.join(owners)}, not of {method}"
    if name in ("base", "base_model"):
        return f"{option}: {_PLACE_OF_BASE[METHODS[method].base]}"
    near = _MEANT.get(name) or near
    return f"unknown option {option}" + (f". Did you mean {near}?" if near else "")


def _names(parameter: Parameter) -> tuple[str, ...]:
    """How a parameter can be called."""
    return parameter.name, _plain(parameter.flag), f"no_{parameter.name}"


def command_parser(method: str, description: str) -> CommandParser:
    """The parser of a method's command."""
    of_base = "BASE " if METHODS[method].base == "required" else ""
    parser = CommandParser(
        f"{of_base}--ft_models MODEL ... --save OUT", description=description, epilog=EXIT_CODES
    )
    ancestor = "the common ancestor: a model folder or Hub id"
    if METHODS[method].base == "required":
        parser.add_argument("base", metavar="BASE", help=ancestor)
    elif METHODS[method].base == "optional":
        parser.add_argument("--base", metavar="BASE", help=f"{ancestor} (default: none)")
    parser.add_argument(
        *spellings("--ft_models"),
        nargs="+",
        action="extend",
        required=True,
        metavar="MODEL",
        help="the fine-tuned models: folders or Hub ids, maybe with LoRA adapters: MODEL+ADAPTER"
        + ("; an ADAPTER alone is put on the base" if METHODS[method].base != "none" else ""),
    )
    for parameter in METHODS[method].parameters:
        _add_parameter(parser, parameter)
    parser.add_argument(
        "--profile",
        choices=PROFILES,
        default="default",
        help="whose conventions the defaults of the options above follow; mergekit is 0.1.5 "
        "(default: %(default)s)",
    )
    parser.add_argument("--save", type=Path, metavar="OUT", help="the folder to make")
    _add_parts(parser)
    _add_tensors(parser)
    add_lora(parser)
    _add_vocabulary(parser)
    add_settings(parser)
    return parser


def recipe_parser(description: str) -> CommandParser:
    """The parser of the command that takes a recipe file."""
    parser = CommandParser("RECIPE OUT", description=description, epilog=EXIT_CODES)
    parser.add_argument(
        "recipe", type=Path, metavar="RECIPE", help="a YAML file (or .json): mergekit's or ours"
    )
    parser.add_argument("save", type=Path, nargs="?", metavar="OUT", help="the folder to make")
    _add_parts(parser)
    parser.add_argument(
        "--resolve",
        choices=("yaml", "json"),
        help="only print the recipe as it was understood, in our words; opens no model",
    )
    parser.add_argument("--schema", action="store_true", help=SCHEMA_HELP)
    parser.add_argument(
        "--seed",
        type=number(int),
        metavar="INT",
        help="of the random masks, instead of the recipe's (default: 0)",
    )
    add_settings(parser)
    parser.set_defaults(max_shard_size=None)
    return parser


def parse_recipe_arguments(
    description: str, argv: Sequence[str]
) -> tuple[CommandParser, argparse.Namespace]:
    """The arguments of the command that takes a recipe; exits with a text where they are wrong."""
    parser = recipe_parser(description)
    problems = []
    for option in parser.unknown_options(argv):
        name, near = _plain(option), parser.nearest(option)
        meant = _MEANT_WITH_RECIPE.get(name)
        parameters = [p for method in METHODS.values() for p in method.parameters]
        if meant is None and any(name in (p.key, *_names(p)) for p in parameters):
            meant = "It belongs into the recipe, under parameters"
        hint = meant or (f"Did you mean {near}?" if near else "")
        problems.append(f"unknown option {option}. {hint}".rstrip(" ."))
    if problems:
        parser.error("\n".join(problems))
    arguments, others = parser.parse_known_args(argv)
    if others:
        parser.error(f"not expected: {' '.join(others)}. Give one recipe and one folder to make")
    return parser, arguments


def _add_parts(parser: argparse.ArgumentParser) -> None:
    """What can be done besides merging."""
    parser.add_argument(
        "--plan", action="store_true", help="only say what would be done, and read no weights"
    )
    parser.add_argument(
        "--analyze",
        type=Path,
        metavar="NAME",
        help="merge nothing, but write NAME.json and NAME.html: what each model has changed, and "
        "where they disagree; the method's options change nothing",
    )
    parser.add_argument(
        "--findings",
        action="store_true",
        help="also put into merge_report.json what each model has changed, and where they "
        "disagree, by tensor, layer and projection; a short merge takes up to twice as long",
    )
    parser.add_argument("--check", metavar="FOLDER", help=CHECK_HELP)
    parser.add_argument("--json", action="store_true", help=JSON_HELP)


def _add_tensors(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "tensors", "what is not merged is the base's (without one, the first model's)"
    )
    for name, text in (
        ("include", 'merge only tensors whose names fit one of these, such as "*.mlp.*"'),
        ("exclude", "do not merge tensors whose names fit one of these"),
    ):
        group.add_argument(
            f"--{name}", nargs="+", action="extend", default=[], metavar="PATTERN", help=text
        )
    for name, what in (("merge_embeddings", "the embedding"), ("merge_lm_head", "the head")):
        group.add_argument(
            *spellings(f"--{name}"),
            action=argparse.BooleanOptionalAction,
            default=True,
            help=f"merge {what} (default: on)",
        )
    group.add_argument(
        *spellings("--weight_decay"),
        type=number(float),
        default=0.0,
        metavar="FLOAT",
        help="multiply merged values by 1 minus this (default: 0)",
    )
    group.add_argument(
        *spellings("--clamp_range"),
        type=number(float),
        nargs=2,
        metavar=("LOWEST", "HIGHEST"),
        help="keep merged values in this range (default: no bounds)",
    )
    group.add_argument(
        *spellings("--nan_policy"),
        choices=NAN_POLICIES,
        default="error",
        help="NaN and infinity in the models: error refuses them, base takes the base's values "
        "instead, propagate lets them through (default: %(default)s)",
    )


def add_lora(parser: argparse.ArgumentParser) -> None:
    """Arguments on how adapters are put on their bases."""
    group = parser.add_argument_group(
        "LoRA adapters", "a model can be MODEL+ADAPTER, or MODEL+ADAPTER:STRENGTH+ADAPTER..."
    )
    group.add_argument(
        *spellings("--lora_rounding"),
        choices=ROUNDINGS,
        help="of base plus adapter: none, to the base's dtype as a folded folder has it (sum), or "
        "the change as well, as PEFT does with adapters in 16 bits (delta) (default: none, with "
        "profile mergekit sum, with peft delta)",
    )
    group.add_argument(
        *spellings("--tied_lora"),
        choices=TYINGS,
        help="where an adapter changes a tied embedding or head alone: untie them, as it was "
        "trained, or change both, as PEFT's merge_and_unload (default: untie; with profiles "
        "mergekit and peft shared)",
    )


def _add_parameter(parser: argparse.ArgumentParser, parameter: Parameter) -> None:
    flags = [*spellings(parameter.flag), *spellings(f"--{parameter.name}")]
    if parameter.kind is bool:
        on_or_off = {None: "", True: " (default: on)", False: " (default: off)"}
        parser.add_argument(
            *flags,
            dest=parameter.name,
            action=argparse.BooleanOptionalAction,
            help=f"{parameter.help}{on_or_off[parameter.default]}",
        )
        return
    each = " for each" if parameter.per_model else ""
    default = "" if parameter.default is None else f" (default: {parameter.default}{each})"
    parser.add_argument(
        *flags,
        dest=parameter.name,
        type=number(parameter.kind) if parameter.kind in (float, int) else str,
        nargs="+" if parameter.per_model else None,
        action="extend" if parameter.per_model else "store",
        choices=parameter.choices or None,
        metavar=None if parameter.choices else parameter.kind.__name__.upper(),
        help=f"{parameter.help}{default}",
    )


def number(kind: type) -> Callable[[str], Any]:
    """Converts an argument to a number."""

    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            hint = ". Put spaces between several: 0.5 0.5" if "," in text else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}{hint}") from None

    return convert


def _add_vocabulary(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("vocabulary and tokenizer")
    group.add_argument(
        "--vocabulary",
        default="min",
        metavar="MODE",
        help="min (or truncate): rows that all models have; max (or pad): rows that any has; both "
        "where token ids agree. "
        "union: the base's tokens and those that others added; base or model:NAME: the tokens of "
        "one model; all matched by their strings. error: no difference (default: %(default)s)",
    )
    group.add_argument(
        *spellings("--tokenizer_source"),
        metavar="MODEL",
        help="whose tokenizer, chat template, generation config and special tokens the result has "
        "(default: the base's, or the first model's; with max, of the one with the most tokens)",
    )
    group.add_argument(
        *spellings("--chat_template"),
        default=AUTO_TEMPLATE,
        metavar="MODEL",
        help="auto (the tokenizer's model's, or the only one there is), none, or the model that "
        "gives it (default: %(default)s)",
    )
    group.add_argument(
        *spellings("--pad_to_multiple_of"),
        type=number(int),
        metavar="INT",
        help="round the number of rows up to a multiple of this",
    )
    helps = {
        "union_tokens": "which tokens a union adds",
        "missing_row": "a row that no model has: the mean of a model's rows, or zeros",
        "new_row": "a token that the base lacks arrives as its owners have it, or scaled",
        "linear_missing": "in a linear merge, a model without a token takes another's row, or has "
        "no part in it",
        "tie": "tie the head if all models do, or if the base does",
    }
    for name, text in helps.items():
        default = getattr(DEFAULT_VOCABULARY, name)
        group.add_argument(
            *spellings(f"--{name}"),
            choices=CHOICES[name],
            default=default,
            help=f"{text} (default: {default})",
        )
    group.add_argument(
        *spellings("--id_alias"),
        type=number(int),
        nargs="+",
        action="extend",
        default=[],
        metavar="ID",
        help="ids that mean the same in all models although their strings differ",
    )
    group.add_argument(
        "--tokens",
        type=Path,
        metavar="FILE",
        help='JSON: where the rows of single tokens come from: {"<token>": {"source": "MODEL"}}, '
        "as in mergekit's tokenizer.tokens",
    )


def recipe_of(method: str, arguments: argparse.Namespace) -> Recipe:
    """The recipe that a method's arguments make.

    Raises:
        ValueError: the file with tokens cannot be read.
    """
    return Recipe(
        method=method,
        base_model=getattr(arguments, "base", None),
        models=tuple(arguments.ft_models),
        parameters={
            parameter.name: getattr(arguments, parameter.name)
            for parameter in METHODS[method].parameters
        },
        output_dir=arguments.save,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        vocabulary=_vocabulary(arguments),
        tokenizer_source=arguments.tokenizer_source,
        chat_template=arguments.chat_template,
        profile=arguments.profile,
        include=tuple(arguments.include),
        exclude=tuple(arguments.exclude),
        merge_embeddings=arguments.merge_embeddings,
        merge_lm_head=arguments.merge_lm_head,
        weight_decay=arguments.weight_decay,
        clamp_range=None if arguments.clamp_range is None else tuple(arguments.clamp_range),
        lora_rounding=arguments.lora_rounding,
        tied_lora=arguments.tied_lora,
        nan_policy=arguments.nan_policy,
    )


def _vocabulary(arguments: argparse.Namespace) -> VocabularySettings:
    content = {} if arguments.tokens is None else _token_sources(arguments.tokens)
    return VocabularySettings(
        mode=arguments.vocabulary,
        tokens={token: token_source(token, entry) for token, entry in content.items()},
        pad_to_multiple_of=arguments.pad_to_multiple_of,
        id_alias=tuple(arguments.id_alias),
        **{name: getattr(arguments, name) for name in CHOICES},
    )


def _token_sources(path: Path) -> dict[str, Any]:
    try:
        return read_config(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"is no JSON object: {error}"
        raise ValueError(
            f"--tokens {path}: {reason}. Expected a JSON object such as "
            '{"<token>": {"source": "MODEL"}}'
        ) from error


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Arguments on the form of the result, and on how a merge is run."""
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPE_NAMES),
        help="of the result (default: as the base, or the first model where there is no base)",
    )
    parser.add_argument(
        *spellings("--max_shard_size"),
        default=DEFAULT_SHARD_SIZE,
        metavar="SIZE",
        help="weights per file, such as 5GB or 500MB (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where to compute (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=number(int),
        metavar="INT",
        help="parts of tensors worked on at once; each takes some memory (default: one per core)",
    )
    parser.add_argument(
        *spellings("--max_memory"),
        metavar="SIZE",
        help="most memory of the process, such as 2GB, without files that the system caches "
        "(default: no limit; a merge takes about 130 MB, and --plan says how much)",
    )
    add_verification(parser)
    add_resume(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def add_verification(parser: argparse.ArgumentParser) -> None:
    """The argument for a look at what is read."""
    parser.add_argument(
        *spellings("--verify_inputs"),
        action="store_true",
        help="before merging, read all weight files and compare them with the SHA-256 known of "
        "them: from the Hub's cache, or a merge_manifest.json",
    )


def add_resume(parser: argparse.ArgumentParser) -> None:
    """The argument for what was stopped."""
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with what a stopped run of the same command has left; without anything left, "
        "begin, and if it was finished, say so",
    )


def spellings(flag: str) -> list[str]:
    """An option with underscores, and with hyphens."""
    return [] if not flag else list(dict.fromkeys((flag, "--" + flag[2:].replace("_", "-"))))
