"""The command line of every driver: parse, merge, print, and say what went wrong in one line."""

import argparse
import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM
from typing import Any

from merge_analysis import Analysis, check_analysis_target, write_analysis
from merge_methods import METHODS
from merge_parameters import PROFILES
from merge_plan import usable_cores
from merge_recipe import DEFAULT_SHARD_SIZE, Parameter, Recipe
from merge_report import MergeReport, PlanReport
from merge_run import analyze_models, merge_to_folder, plan
from model_companions import AUTO_TEMPLATE
from model_errors import ModelCompatibilityError
from model_safetensors import DTYPE_NAMES
from model_tokenizer import read_object
from model_verify import Findings, verify_folder
from model_vocabulary import CHOICES, VocabularySettings, token_source

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_BAD_INPUT = 3
EXIT_NO_SPACE = 5
EXIT_IO = 6

DEFAULT_VOCABULARY = VocabularySettings()
CHECK_HELP = "check a finished model folder, all its weights included; takes no other arguments"
JSON_HELP = "print the report, plan or check as JSON"

SIGNALS = (SIGINT, SIGTERM, SIGHUP)

EXIT_CODES = """exit status:
  0 merged; 2 wrong arguments; 3 models that cannot be merged; 5 disk full;
  6 other trouble with files; 129, 130, 143 interrupted. Unless it is 0, there is no
  output folder."""


def run_command(method: str, description: str, argv: Sequence[str] | None = None) -> int:
    """Parse a driver's command line and carry it out.

    Args:
        method: a name from `METHODS`.
        description: the driver's docstring; shown by `--help` as it stands.
        argv: arguments, by default those of the process.

    Returns:
        The exit status.
    """
    arguments_given = sys.argv[1:] if argv is None else list(argv)
    if any(each.split("=")[0] == "--check" for each in arguments_given):
        return _check(arguments_given)
    parser = _parser(method, description)
    arguments = parser.parse_args(arguments_given)
    wanted = [arguments.save, arguments.analyze, arguments.plan or None]
    if not any(wanted):
        parser.error(
            "--save OUT is required (or --plan, to see what would be done, or --analyze NAME)"
        )
    if arguments.analyze and (arguments.save or arguments.plan):
        parser.error("--analyze merges nothing: give it without --save and --plan")
    if arguments.findings and not arguments.save:
        parser.error("--findings is for the report of a merge: give it with --save")
    return _reported(lambda: _carry_out(method, arguments), last=argv is None)


def _check(argv: Sequence[str]) -> int:
    """`--check FOLDER`, which stands alone: none of the other arguments is needed."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--check", type=Path, required=True, metavar="FOLDER", help=CHECK_HELP)
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    arguments, others = parser.parse_known_args(argv)
    if others:
        parser.error(f"--check stands alone (or with --json), got also: {' '.join(others)}")
    sound = False

    def check() -> str:
        nonlocal sound
        findings = verify_folder(arguments.check, threads=usable_cores())
        sound = not findings.problems
        return _printed(findings, as_json=arguments.json)

    status = _reported(check)
    return status if status or sound else EXIT_BAD_INPUT


def _reported(work: Callable[[], str], *, last: bool = False) -> int:
    """Do the work and print what it returns, or in one line what went wrong; the exit status.

    `last` says that the process does nothing else: once the work is done, no signal makes a failure
    of it.
    """
    try:
        with _signals_interrupt(last=last):
            text = work()
    except (ValueError, ModelCompatibilityError, OSError) as error:
        for line in _text(error).splitlines():
            print(line if line.startswith(" ") else f"error: {line}", file=sys.stderr)
        return _exit_code(error)
    except KeyboardInterrupt as error:
        print("error: interrupted; nothing has been written", file=sys.stderr)
        return 128 + (error.args[0] if error.args else SIGINT)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # whoever reads has seen enough; nothing is to be said at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_OK


def _carry_out(method: str, arguments: argparse.Namespace) -> str:
    """Merge, or plan a merge; what to print."""
    recipe = Recipe(
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
    )
    settings = {
        "device": arguments.device,
        "threads": arguments.threads,
        "max_memory": arguments.max_memory,
    }
    if arguments.analyze is not None:
        check_analysis_target(arguments.analyze)
        analysis = analyze_models(recipe, **settings, progress=not arguments.quiet)
        paths = write_analysis(analysis, arguments.analyze)
        wrote = f"\nwrote {paths[0]} and {paths[1]}"
        return _printed(analysis, as_json=arguments.json) + ("" if arguments.json else wrote)
    if arguments.plan:
        return _printed(plan(recipe, **settings), as_json=arguments.json)
    report = merge_to_folder(
        recipe, **settings, findings=arguments.findings, progress=not arguments.quiet
    )
    return _printed(report, as_json=arguments.json)


def _printed(report: PlanReport | MergeReport | Analysis | Findings, *, as_json: bool) -> str:
    return json.dumps(report.to_dict(), indent=2) if as_json else report.summary()


@contextmanager
def _signals_interrupt(*, last: bool) -> Iterator[None]:
    """A closed terminal and `kill` end a merge as Ctrl-C does, and leave no half folder.

    Further signals are ignored from then on: cleaning up takes no longer than a block. So they are
    after what was the process's last work.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers
        return

    def interrupt(number: int, _: object) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
        if last:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
    finally:
        if signal.getsignal(SIGINT) is interrupt:
            for number, handler in before.items():
                signal.signal(number, handler)


def _text(error: Exception) -> str:
    """What an error says, without the number that Python puts before our own texts."""
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        return error.strerror
    return str(error)


def _exit_code(error: Exception) -> int:
    if isinstance(error, ValueError):
        return EXIT_USAGE
    if isinstance(error, ModelCompatibilityError):
        return EXIT_BAD_INPUT
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return EXIT_NO_SPACE if full else EXIT_IO


def _parser(method: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    ancestor = "the common ancestor: a model folder or Hub id"
    if METHODS[method].base == "required":
        parser.add_argument("base", metavar="BASE", help=ancestor)
    elif METHODS[method].base == "optional":
        parser.add_argument("--base", metavar="BASE", help=f"{ancestor} (default: none)")
    parser.add_argument(
        *_spellings("--ft_models"),
        nargs="+",
        action="extend",
        required=True,
        metavar="MODEL",
        help="the fine-tuned models: folders or Hub ids",
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
    parser.add_argument(
        "--plan", action="store_true", help="only say what would be done, and read no weights"
    )
    parser.add_argument(
        "--analyze",
        type=Path,
        metavar="NAME",
        help="merge nothing, but write NAME.json and NAME.html: what each model has changed, and "
        "where they disagree",
    )
    parser.add_argument(
        "--findings",
        action="store_true",
        help="also put into the report what each model has changed, and where they disagree; a "
        "short merge takes up to twice as long",
    )
    parser.add_argument("--check", metavar="FOLDER", help=CHECK_HELP)
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    _add_tensors(parser)
    _add_vocabulary(parser)
    _add_settings(parser)
    return parser


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
            *_spellings(f"--{name}"),
            action=argparse.BooleanOptionalAction,
            default=True,
            help=f"merge {what} (default: on)",
        )
    group.add_argument(
        *_spellings("--weight_decay"),
        type=float,
        default=0.0,
        metavar="FLOAT",
        help="multiply merged values by 1 minus this (default: 0)",
    )
    group.add_argument(
        *_spellings("--clamp_range"),
        type=float,
        nargs=2,
        metavar=("LOWEST", "HIGHEST"),
        help="keep merged values in this range (default: no bounds)",
    )


def _add_parameter(parser: argparse.ArgumentParser, parameter: Parameter) -> None:
    flags = [*_spellings(parameter.flag), *_spellings(f"--{parameter.name}")]
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
        type=parameter.kind,
        nargs="+" if parameter.per_model else None,
        action="extend" if parameter.per_model else "store",
        choices=parameter.choices or None,
        metavar=None if parameter.choices else parameter.kind.__name__.upper(),
        help=f"{parameter.help}{default}",
    )


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
        *_spellings("--tokenizer_source"),
        metavar="MODEL",
        help="whose tokenizer, chat template, generation config and special tokens the result has "
        "(default: the base's, or the first model's; with max, of the one with the most tokens)",
    )
    group.add_argument(
        *_spellings("--chat_template"),
        default=AUTO_TEMPLATE,
        metavar="MODEL",
        help="auto (the tokenizer's model's, or the only one there is), none, or the model that "
        "gives it (default: %(default)s)",
    )
    group.add_argument(
        *_spellings("--pad_to_multiple_of"),
        type=int,
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
            *_spellings(f"--{name}"),
            choices=CHOICES[name],
            default=default,
            help=f"{text} (default: {default})",
        )
    group.add_argument(
        *_spellings("--id_alias"),
        type=int,
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
        return read_object(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"--tokens {path}: {reason}. Expected a JSON object such as "
            '{"<token>": {"source": "MODEL"}}'
        ) from error


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPE_NAMES),
        help="of the result (default: as the base, or the first model where there is no base)",
    )
    parser.add_argument(
        *_spellings("--max_shard_size"),
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
        type=int,
        metavar="INT",
        help="parts of tensors worked on at once; each takes some memory (default: one per core)",
    )
    parser.add_argument(
        *_spellings("--max_memory"),
        metavar="SIZE",
        help="most memory of the process, such as 2GB, without files that the system caches "
        "(default: no limit; a merge takes about 130 MB, and --plan says how much)",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _spellings(flag: str) -> list[str]:
    """An option with underscores, and with hyphens."""
    return [] if not flag else list(dict.fromkeys((flag, "--" + flag[2:].replace("_", "-"))))
