"""The command line of every driver: parse, merge, print, and say what went wrong in one line."""

import argparse
import errno
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM

from merge_methods import METHODS
from merge_plan import describe_plan, open_plan, usable_cores
from merge_recipe import DEFAULT_SHARD_SIZE, Parameter, Recipe
from merge_run import merge_to_folder, settings_problems
from model_errors import ModelCompatibilityError
from model_safetensors import DTYPE_NAMES

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_BAD_INPUT = 3
EXIT_NO_SPACE = 5
EXIT_IO = 6

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
    parser = _parser(method, description)
    arguments = parser.parse_args(argv)
    if arguments.save is None and not arguments.plan:
        parser.error("--save OUT is required (or --plan, to see what would be done)")
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
    )
    try:
        with _signals_interrupt():
            text = _carry_out(recipe, arguments)
    except (ValueError, ModelCompatibilityError, OSError) as error:
        for line in _text(error).splitlines():
            print(line if line.startswith(" ") else f"error: {line}", file=sys.stderr)
        return _exit_code(error)
    except KeyboardInterrupt as error:
        print("error: interrupted; nothing has been written", file=sys.stderr)
        return 128 + (error.args[0] if error.args else SIGINT)
    print(text)
    return EXIT_OK


def _carry_out(recipe: Recipe, arguments: argparse.Namespace) -> str:
    """Merge, or plan a merge; what to print."""
    if arguments.plan:
        problems = settings_problems(arguments.device, arguments.threads)
        with open_plan(recipe, problems) as plan:
            return describe_plan(plan, arguments.threads or usable_cores())
    return merge_to_folder(
        recipe,
        device=arguments.device,
        threads=arguments.threads,
        progress=not arguments.quiet,
    ).summary()


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """A closed terminal and `kill` end a merge as Ctrl-C does, and leave no half folder.

    Further signals are ignored from then on: cleaning up takes no longer than a block.
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
    if METHODS[method].uses_base:
        parser.add_argument(
            "base", metavar="BASE", help="the common ancestor: a model folder or Hub id"
        )
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
    parser.add_argument("--save", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument(
        "--plan", action="store_true", help="only say what would be done, and read no weights"
    )
    _add_settings(parser)
    return parser


def _add_parameter(parser: argparse.ArgumentParser, parameter: Parameter) -> None:
    flags = [*_spellings(parameter.flag), *_spellings(f"--{parameter.name}")]
    if parameter.kind is bool:
        parser.add_argument(
            *flags,
            dest=parameter.name,
            action=argparse.BooleanOptionalAction,
            help=f"{parameter.help} (default: {'on' if parameter.default else 'off'})",
        )
        return
    each = " for each" if parameter.per_model else ""
    parser.add_argument(
        *flags,
        dest=parameter.name,
        type=parameter.kind,
        nargs="+" if parameter.per_model else None,
        action="extend" if parameter.per_model else "store",
        choices=parameter.choices or None,
        metavar=None if parameter.choices else parameter.kind.__name__.upper(),
        help=f"{parameter.help} (default: {parameter.default}{each})",
    )


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
        "--threads", type=int, metavar="INT", help="blocks worked on at once (default: all cores)"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _spellings(flag: str) -> list[str]:
    """An option with underscores, and with hyphens."""
    return [] if not flag else list(dict.fromkeys((flag, "--" + flag[2:].replace("_", "-"))))
