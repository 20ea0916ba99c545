"""The command line of `lora_llama`: fold, merge and extract adapters."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from merge_adapters import MAX_RANK, METHODS, SPARSE, AdapterMerge, merge_adapters
from merge_arguments import (
    EXIT_CODES,
    JSON_HELP,
    CommandParser,
    add_lora,
    add_resume,
    add_settings,
    add_verification,
    number,
    spellings,
)
from merge_command import carry_out, printed, reported, run_check
from merge_extract import OTHERS, Extraction, extract_adapter
from merge_recipe import Recipe, brief, unknown_name
from model_locate import AdapterName, adapter_name, join_adapters
from model_lora import is_number
from model_safetensors import DTYPE_NAMES

ADAPTERS_HELP = "LoRA adapters: folders or Hub ids"


def run_lora_command(description: str, argv: Sequence[str] | None = None) -> int:
    """Parse a command line and carry it out.

    Args:
        description: the driver's docstring; shown by `--help` as it stands.
        argv: arguments, by default those of the process.

    Returns:
        The exit status.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    if any(each.split("=")[0] == "--check" for each in given):
        return run_check(given)
    verb = given[0] if given else ""
    if verb not in _VERBS:
        parser = CommandParser(f"{{{','.join(_VERBS)}}} ...", description=description)
        parser.add_argument("verb", choices=_VERBS, help="what to do; each has --help")
        if verb in ("-h", "--help"):
            parser.parse_args(["--help"])
        wrong = "say what to do" if not verb else unknown_name("verb", verb, _VERBS)
        parser.error(wrong)
    work = _VERBS[verb](given[1:])
    return reported(work, last=argv is None)


def _parsed(parser: CommandParser, argv: Sequence[str]) -> argparse.Namespace:
    """Arguments; exits with a text where some are unknown."""
    problems = []
    for option in parser.unknown_options(argv):
        near = parser.nearest(option)
        problems.append(f"unknown option {option}" + (f". Did you mean {near}?" if near else ""))
    if problems:
        parser.error("\n".join(problems))
    return parser.parse_args(argv)


def _parser(verb: str, shortest: str, description: str) -> CommandParser:
    parser = CommandParser(shortest, description=description, epilog=EXIT_CODES)
    parser.prog = f"{parser.prog} {verb}"
    return parser


def _add_output(parser: CommandParser) -> None:
    """Arguments of what makes an adapter."""
    parser.add_argument(
        "--save", type=Path, required=True, metavar="OUT", help="the folder to make"
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPE_NAMES), default="float32", help="(default: %(default)s)"
    )
    add_verification(parser)
    add_resume(parser)
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _making(arguments: argparse.Namespace) -> dict[str, bool]:
    """How an adapter is made."""
    return {
        "progress": not arguments.quiet,
        "resume": arguments.resume,
        "verify_inputs": arguments.verify_inputs,
    }


def _add_weights(parser: CommandParser, what: str) -> None:
    parser.add_argument(
        "--weights", type=number(float), nargs="+", action="extend", metavar="FLOAT", help=what
    )


def _fold(argv: Sequence[str]) -> Callable[[], str]:
    parser = _parser(
        "fold",
        "BASE ADAPTER ... --save OUT",
        "Fold LoRA adapters into their base: a model folder that needs no PEFT.",
    )
    parser.add_argument("base", metavar="BASE", help="the model that they were trained on")
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help=ADAPTERS_HELP)
    _add_weights(parser, "the change of each is multiplied by this, of any sign (default: 1 each)")
    parser.add_argument("--save", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument(
        "--plan", action="store_true", help="only say what would be done, and read no weights"
    )
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    add_lora(parser)
    add_settings(parser)
    arguments = _parsed(parser, argv)
    if not (arguments.save or arguments.plan):
        parser.error("--save OUT is required (or --plan, to see what would be done)")
    arguments.analyze, arguments.findings = None, False

    def work() -> str:
        recipe = fold_recipe(
            arguments.base,
            arguments.adapters,
            arguments.weights,
            output_dir=arguments.save,
            dtype=arguments.dtype,
            max_shard_size=arguments.max_shard_size,
            lora_rounding=arguments.lora_rounding,
            tied_lora=arguments.tied_lora,
        )
        return carry_out(recipe, arguments)

    return work


def fold_recipe(
    base: str,
    adapters: Sequence[str],
    weights: Sequence[float] | None = None,
    **settings: object,
) -> Recipe:
    """The recipe that folds adapters into a base: the base with the adapters on top, as it is.

    Raises:
        ValueError: there are no adapters, or not as many weights.
    """
    if not adapters:
        raise ValueError("no adapter is given. Name at least one")
    weights = None if weights is None else numbers(weights, "weights")
    if weights is not None and len(weights) != len(adapters):
        raise ValueError(
            f"weights must have one entry per adapter: got {len(weights)} for {len(adapters)}"
        )
    strengths = [1.0] * len(adapters) if weights is None else [*weights]
    if not all(map(is_number, strengths)):
        raise ValueError(f"weights must be numbers up to 1e30, got {brief(strengths)}")
    named = map(adapter_name, adapters)
    names = [
        AdapterName(name, strength * float(by))
        for (name, strength), by in zip(named, strengths, strict=True)
    ]
    model = join_adapters(base, names)
    return Recipe(method="passthrough", models=(model,), **settings)  # type: ignore[arg-type]


def numbers(values: Sequence[float], argument: str) -> tuple[float, ...]:
    """Several numbers as a tuple, also from numpy and torch; `ValueError` for a single one."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{argument} must be a list, one for each adapter, got {brief(values)}")
    return tuple(values)


def _merge(argv: Sequence[str]) -> Callable[[], str]:
    methods = "; ".join(f"{name}: {what}" for name, what in METHODS.items())
    parser = _parser(
        "merge", "ADAPTER ADAPTER ... --save OUT", "Merge LoRA adapters into one adapter."
    )
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help=ADAPTERS_HELP)
    parser.add_argument(
        "--method", choices=METHODS, default="auto", help=f"{methods} (default: %(default)s)"
    )
    _add_weights(parser, "one for each adapter (default: 1 each)")
    parser.add_argument(
        "--rank",
        type=number(int),
        metavar="INT",
        help="of the result, where it is brought to one (default: the highest of the adapters; for "
        "auto, max_rank)",
    )
    parser.add_argument(
        *spellings("--max_rank"),
        type=number(int),
        default=MAX_RANK,
        metavar="INT",
        help="up to which auto leaves the sum exact (default: %(default)s)",
    )
    parser.add_argument(
        "--densities",
        type=number(float),
        nargs="+",
        action="extend",
        metavar="FLOAT",
        help=f"for {', '.join(SPARSE)}: share of each change that is kept (default: 1 each)",
    )
    parser.add_argument(
        "--lam", type=number(float), default=1.0, metavar="FLOAT", help="scale (default: 1)"
    )
    parser.add_argument(
        "--seed", type=number(int), default=0, metavar="INT", help="of DARE (default: 0)"
    )
    _add_output(parser)
    arguments = _parsed(parser, argv)

    def work() -> str:
        merge = AdapterMerge(
            adapters=tuple(arguments.adapters),
            method=arguments.method,
            weights=None if arguments.weights is None else tuple(arguments.weights),
            rank=arguments.rank,
            max_rank=arguments.max_rank,
            densities=None if arguments.densities is None else tuple(arguments.densities),
            lam=arguments.lam,
            seed=arguments.seed,
            dtype=arguments.dtype,
        )
        report = merge_adapters(merge, arguments.save, **_making(arguments))
        return printed(report, as_json=arguments.json)

    return work


def _extract(argv: Sequence[str]) -> Callable[[], str]:
    parser = _parser(
        "extract",
        "TUNED --base BASE --rank INT --save OUT",
        "Extract a LoRA adapter from a tuned model: the leading part of what it has changed.",
    )
    parser.add_argument("tuned", metavar="TUNED", help="a model folder or Hub id")
    parser.add_argument("--base", required=True, metavar="BASE", help="what it was tuned from")
    parser.add_argument("--rank", type=number(int), metavar="INT", help="of the adapter, at most")
    parser.add_argument(
        *spellings("--max_error"),
        type=number(float),
        metavar="FLOAT",
        help="the largest relative error of a matrix's change, in [0, 1): takes the smallest rank "
        "that keeps it, matrix by matrix",
    )
    parser.add_argument(
        "--others",
        choices=OTHERS,
        default="save",
        help="changed embeddings, heads and norms are saved whole, or left out "
        "(default: %(default)s)",
    )
    _add_output(parser)
    arguments = _parsed(parser, argv)

    def work() -> str:
        extraction = Extraction(
            tuned_model=arguments.tuned,
            base_model=arguments.base,
            rank=arguments.rank,
            max_error=arguments.max_error,
            others=arguments.others,
            dtype=arguments.dtype,
        )
        report = extract_adapter(extraction, arguments.save, **_making(arguments))
        return printed(report, as_json=arguments.json)

    return work


_VERBS = {"fold": _fold, "merge": _merge, "extract": _extract}
