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
from dataclasses import replace
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM
from typing import Any

from merge_adapter_output import AdapterReport
from merge_analysis import Analysis, analysis_page
from merge_arguments import (
    CHECK_HELP,
    EXIT_USAGE,
    JSON_HELP,
    CommandParser,
    parse_arguments,
    parse_recipe_arguments,
    recipe_of,
)
from merge_chain import analyze_stages, check_stages, final_stage, merge_stages, plan_stages
from merge_document import recipe_document
from merge_grammar import Stage, load_recipes, with_seed
from merge_plan import usable_cores
from merge_recipe import Recipe
from merge_report import MergeReport, PlanReport
from merge_run import analyze_models, merge_to_folder, plan
from merge_schema import recipe_schema
from merge_yaml import write_recipes
from model_errors import (
    MemoryLimitError,
    ModelCompatibilityError,
    OutputBusyError,
    UnsafeModelError,
    refusal,
)
from model_text import check_page_target, printable, say, write_page
from model_verify import Findings, verify_folder

EXIT_OK = 0
EXIT_BAD_INPUT = 3
EXIT_UNSAFE = 4
EXIT_NO_SPACE = 5
EXIT_IO = 6
EXIT_BUSY = 7
EXIT_MEMORY = 8

SIGNALS = (SIGINT, SIGTERM, SIGHUP)


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
        return run_check(arguments_given)
    parser, arguments = parse_arguments(method, description, arguments_given)
    _check_parts(parser, arguments, "--save OUT", "--save")
    return reported(lambda: carry_out(recipe_of(method, arguments), arguments), last=argv is None)


def run_recipe_command(description: str, argv: Sequence[str] | None = None) -> int:
    """Parse the command line of the command that takes a recipe file, and carry it out.

    Arguments and exit status as `run_command`.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    if any(each.split("=")[0] == "--check" for each in given):
        return run_check(given)
    if given == ["--schema"]:
        return reported(lambda: json.dumps(recipe_schema(), indent=2))
    parser, arguments = parse_recipe_arguments(description, given)
    if arguments.schema:
        parser.error("--schema stands alone")
    if not arguments.resolve:
        _check_parts(parser, arguments, "OUT, the folder to make,", "OUT")
    return reported(lambda: _carry_out_recipe(arguments), last=argv is None)


def _check_parts(
    parser: CommandParser, arguments: argparse.Namespace, needed: str, out: str
) -> None:
    """What is to be done must be clear."""
    if not (arguments.save or arguments.analyze or arguments.plan):
        parser.error(
            f"{needed} is required (or --plan, to see what would be done, or --analyze NAME)"
        )
    if arguments.analyze and (arguments.save or arguments.plan):
        parser.error(f"--analyze merges nothing: give it without {out} and --plan")
    if arguments.findings and not arguments.save:
        parser.error(f"--findings is for the report of a merge: give it with {out}")
    for name in ("resume", "verify_inputs"):
        if getattr(arguments, name) and (arguments.plan or not arguments.save):
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} is for a merge: give it with {out}, without --plan")


def _carry_out_recipe(arguments: argparse.Namespace) -> str:
    """What is asked for with a recipe file; what to print."""
    stages = load_recipes(arguments.recipe)
    last = final_stage(stages)
    stages = [_changed(each, arguments, last=each is last) for each in stages]
    if arguments.resolve:
        contents = [
            ({"name": stage.name} if stage.name else {}) | recipe_document(stage.recipe)
            for stage in stages
        ]
        check_stages(stages)
        if arguments.resolve == "json":
            return json.dumps(contents if len(contents) > 1 else contents[0], indent=2)
        return write_recipes(contents).rstrip()
    settings = _run_settings(arguments)
    if arguments.plan:
        settings["findings"] = arguments.findings
        return printed(plan_stages(stages, arguments.save, **settings), as_json=arguments.json)
    settings["progress"] = not arguments.quiet
    if arguments.analyze is not None:
        check_page_target(arguments.analyze)
        analysis = analyze_stages(stages, arguments.analyze, **settings)
        return _written(analysis, arguments)
    report = merge_stages(stages, arguments.save, **_merge_settings(arguments))
    return printed(report, as_json=arguments.json)


def _run_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("device", "threads", "max_memory")}


def _merge_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """How a merge into a folder is run."""
    of_merge = ("findings", "resume", "verify_inputs")
    return {
        **_run_settings(arguments),
        **{name: getattr(arguments, name) for name in of_merge},
        "progress": not arguments.quiet,
    }


def _written(analysis: Analysis, arguments: argparse.Namespace) -> str:
    """Write an analysis down; what to print."""
    paths = write_page(arguments.analyze, analysis.to_dict(), analysis_page(analysis))
    wrote = f"\nwrote {paths[0]} and {paths[1]}"
    return printed(analysis, as_json=arguments.json) + ("" if arguments.json else wrote)


def _changed(stage: Stage, arguments: argparse.Namespace, *, last: bool) -> Stage:
    """A recipe with what the command line says instead; of the result's form, if it is the last."""
    recipe = stage.recipe
    if last:
        given = {"dtype": arguments.dtype, "max_shard_size": arguments.max_shard_size}
        given = {key: value for key, value in given.items() if value is not None}
        recipe = replace(recipe, **given)
    if arguments.seed is not None:
        recipe = with_seed(recipe, arguments.seed)
    return stage._replace(recipe=recipe)


def run_check(argv: Sequence[str]) -> int:
    """`--check FOLDER`, which stands alone: none of the other arguments is needed."""
    parser = CommandParser("--check FOLDER")
    parser.add_argument("--check", type=Path, required=True, metavar="FOLDER", help=CHECK_HELP)
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    arguments, others = parser.parse_known_args(argv)
    if others:
        parser.error(f"--check stands alone (or with --json), got also: {' '.join(others)}")
    problems: tuple[str, ...] = ()

    def check() -> str:
        nonlocal problems
        findings = verify_folder(arguments.check, threads=usable_cores())
        problems = findings.problems
        return printed(findings, as_json=arguments.json)

    status = reported(check)
    return _exit_code(refusal(problems)) if problems and not status else status


def reported(work: Callable[[], str], *, last: bool = False) -> int:
    """Do the work and print what it returns, or in one line what went wrong; the exit status.

    `last` says that the process does nothing else: once the work is done, no signal makes a failure
    of it.
    """
    try:
        with _signals_interrupt(last=last):
            text = work()
    except (ValueError, ModelCompatibilityError, OSError, MemoryError) as error:
        for line in _text(error).splitlines():
            shown = printable(line)
            print(shown if line.startswith(" ") else f"error: {shown}", file=sys.stderr)
        _print_notes(error)
        return _exit_code(error)
    except KeyboardInterrupt as error:
        print("error: interrupted", file=sys.stderr)
        _print_notes(error)
        return 128 + (error.args[0] if error.args else SIGINT)
    try:
        say(text)
    except BrokenPipeError:  # whoever reads has seen enough
        _close_stdout()
    except OSError as error:
        _close_stdout()
        print(
            f"error: the work is done and complete, but the report could not be printed: {error}",
            file=sys.stderr,
        )
        return _exit_code(error)
    return EXIT_OK


def _close_stdout() -> None:
    """What is still to be printed goes nowhere, also at the end of the process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def carry_out(recipe: Recipe, arguments: argparse.Namespace) -> str:
    """Merge, or plan a merge; what to print."""
    settings = _run_settings(arguments)
    if arguments.plan:
        found = plan(recipe, **settings, findings=arguments.findings)
        return printed(found, as_json=arguments.json)
    settings["progress"] = not arguments.quiet
    if arguments.analyze is not None:
        check_page_target(arguments.analyze)
        return _written(analyze_models(recipe, **settings), arguments)
    report = merge_to_folder(recipe, **_merge_settings(arguments))
    return printed(report, as_json=arguments.json)


def printed(
    report: PlanReport | MergeReport | Analysis | Findings | AdapterReport, *, as_json: bool
) -> str:
    """A report for people, or for programs."""
    return json.dumps(report.to_dict(), indent=2) if as_json else report.summary()


@contextmanager
def _signals_interrupt(*, last: bool) -> Iterator[None]:
    """A closed terminal and `kill` end a merge as Ctrl-C does, and leave no half folder.

    Further signals are ignored while it cleans up, which takes no longer than a block, and after
    what was the process's last work. What was ignored before (`nohup`) stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers
        return

    before = {
        number: handler
        for number in SIGNALS
        if (handler := signal.getsignal(number)) is not signal.SIG_IGN
    }
    over = False

    def set_handlers(handler: Any) -> None:
        for number in before:
            signal.signal(number, handler)

    def interrupt(number: int, _: object) -> None:
        nonlocal over
        over = True
        set_handlers(signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    set_handlers(interrupt)
    try:
        yield
        over = True
    finally:
        if last and over:
            set_handlers(signal.SIG_IGN)
        else:
            for number, handler in before.items():
                signal.signal(number, handler)


def _print_notes(error: BaseException) -> None:
    """What is left of the work, and how to go on with it."""
    for note in getattr(error, "__notes__", ()):
        print(f"note: {printable(note)}", file=sys.stderr)


def _text(error: Exception) -> str:
    """What an error says, without the number that Python puts before it."""
    if isinstance(error, MemoryError):
        return f"there is too little memory ({str(error) or 'for Python'}). Is the model sound?"
    if not (isinstance(error, OSError) and error.strerror):
        return str(error)
    if _is_full(error) and error.strerror == os.strerror(error.errno or 0):
        return f"the disk of the output is full ({error.strerror}). Make room on it"
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def _exit_code(error: Exception) -> int:
    kinds = {
        MemoryLimitError: EXIT_MEMORY,
        MemoryError: EXIT_MEMORY,
        ValueError: EXIT_USAGE,
        FileExistsError: EXIT_USAGE,
        UnsafeModelError: EXIT_UNSAFE,
        ModelCompatibilityError: EXIT_BAD_INPUT,
        OutputBusyError: EXIT_BUSY,
    }
    for kind, code in kinds.items():
        if isinstance(error, kind):
            return code
    return EXIT_NO_SPACE if _is_full(error) else EXIT_IO


def _is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
