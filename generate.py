"""Ask a finished model: on a GPU in float16 where there is one, on the CPU otherwise.

python generate.py OUT "The capital of France is"
python generate.py OUT --chat "What is the capital of France?" --max-new-tokens 64
python generate.py OUT --prompts FILE --batch-size 16 --json
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from merge_arguments import CommandParser, number, spellings
from merge_command import reported
from merge_load import load_to_run
from model_inference import Answer, ask
from model_safetensors import DTYPE_NAMES
from model_text import isolated


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)  # options may stand before the prompts
    if bool(arguments.prompt) == bool(arguments.prompts):
        parser.error("give prompts, or --prompts FILE with one in each line")
    return reported(lambda: _answered(arguments), last=argv is None)


def _parser() -> CommandParser:
    parser = CommandParser("MODEL PROMPT ...", description=__doc__)
    parser.add_argument(
        "model", metavar="MODEL", help="a model folder or Hub id, maybe BASE+ADAPTER"
    )
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="texts to go on with")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a UTF-8 file with a prompt in each line"
    )
    add_answering(parser)
    parser.add_argument("--json", action="store_true", help="print the answers as JSON")
    return parser


def add_answering(parser: argparse.ArgumentParser) -> None:
    """Arguments that say where a model runs, and how it answers."""
    parser.add_argument(
        "--chat", action="store_true", help="prompts are messages, put into the chat template"
    )
    parser.add_argument(
        *spellings("--max_new_tokens"),
        type=number(int),
        default=128,
        metavar="INT",
        help="tokens of an answer, at most (default: %(default)s)",
    )
    parser.add_argument(
        *spellings("--batch_size"),
        type=number(int),
        default=8,
        metavar="INT",
        help="prompts answered at once (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=number(float),
        default=0.0,
        metavar="FLOAT",
        help="0 takes the likeliest token always (default: 0)",
    )
    parser.add_argument(
        *spellings("--top_p"), type=number(float), default=1.0, metavar="FLOAT",
        help="draw from the likeliest tokens of this probability together (default: 1)",
    )  # fmt: skip
    parser.add_argument("--seed", type=number(int), default=0, metavar="INT", help="of the draws")
    parser.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="auto, cpu, cuda or such as cuda:1 (default: %(default)s, a GPU if there is one)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPE_NAMES),
        default="auto",
        help="(default: float16 on a GPU; on the CPU float32, or bfloat16 where that is too large)",
    )


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
        ValueError: there are none.
        OSError: it cannot be read.
    """
    lines = [each.rstrip("\r") for each in path.read_text(encoding="utf-8-sig").split("\n")]
    if not (prompts := [line for line in lines if line.strip()]):
        raise ValueError(f"{path}: there is no prompt in it")
    return prompts


def _answered(arguments: argparse.Namespace) -> str:
    prompts = arguments.prompt or read_prompts(arguments.prompts)
    running = load_to_run(arguments.model, arguments.device, arguments.dtype)
    for note in running.notes:
        print(f"note: {note}", file=sys.stderr)
    started = time.monotonic()
    answers = ask(
        running,
        prompts,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        chat=arguments.chat,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    seconds = time.monotonic() - started
    speed = sum(answer.tokens for answer in answers) / seconds
    if arguments.json:
        found = {
            "model": arguments.model,
            "device": running.device,
            "dtype": running.dtype,
            "seconds": seconds,
            "tokens_per_second": speed,
            "answers": [answer._asdict() for answer in answers],
        }
        return json.dumps(found, indent=2, ensure_ascii=False)
    where = f"{running.dtype} on {running.device}, {speed:.1f} tokens per second"
    return "\n\n".join([*map(_shown, answers), where])


def _shown(answer: Answer) -> str:
    cut = " ..." if answer.finish == "length" else ""
    return f"> {isolated(answer.prompt)}\n{isolated(answer.text.strip())}{cut}"


if __name__ == "__main__":
    raise SystemExit(main())
