"""Compare a merge with its base and its sources: perplexity, answers, tasks.

python eval_llama.py OUT --base BASE --ft_models A B --text FILE
python eval_llama.py OUT --base BASE --ft_models A B --prompts FILE --page compared
python eval_llama.py OUT --base BASE --ft_models A B --tasks arc_easy --limit 100
"""

import argparse
import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from eval_compare import METRICS, Candidate, Comparison, Settings, compare
from eval_page import comparison_page
from eval_perplexity import read_texts
from eval_tasks import check_tasks, run_tasks
from generate import add_answering, read_prompts
from merge_arguments import CommandParser, number, spellings
from merge_command import reported
from merge_load import check_to_run, load_to_run
from model_inference import loading_bars
from model_text import check_page_target, numbered, say, write_page


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    if not (arguments.text or arguments.prompt or arguments.prompts or arguments.tasks):
        parser.error("say what to compare by: --text FILE, --prompts FILE, --prompt or --tasks")
    return reported(lambda: _compared(arguments), last=argv is None)


def _parser() -> CommandParser:
    parser = CommandParser("OUT --base BASE --ft_models A B ...", description=__doc__)
    parser.add_argument(
        "merges", nargs="+", metavar="OUT", help="merged models: folders or Hub ids"
    )
    parser.add_argument("--base", metavar="BASE", help="what the models were tuned from")
    parser.add_argument(
        *spellings("--ft_models"), nargs="+", default=[], metavar="MODEL",
        help="what was merged, maybe BASE+ADAPTER",
    )  # fmt: skip
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[], metavar="FILE",
        help='UTF-8 texts for the perplexity; of a .jsonl file each line is one, under "text"',
    )  # fmt: skip
    parser.add_argument("--prompt", nargs="+", default=[], metavar="PROMPT", help="to be answered")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a UTF-8 file with a prompt in each line"
    )
    add_answering(parser)
    parser.add_argument(
        "--metrics", nargs="+", choices=METRICS, default=METRICS, help="(default: all)"
    )
    parser.add_argument(
        *spellings("--max_length"), type=number(int), metavar="INT",
        help="tokens read at once for the perplexity (default: what a model can see, at most 2048)",
    )  # fmt: skip
    parser.add_argument(
        "--stride", type=number(int), metavar="INT",
        help="how far one window is behind the one before (default: half of that)",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK",
        help="of the Language Model Evaluation Harness, if it is installed",
    )  # fmt: skip
    parser.add_argument(
        "--shots", type=number(int), metavar="INT",
        help="solved examples before each question of a task (default: as the task has it)",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=number(int), metavar="INT", help="questions of each task (default: all)"
    )
    parser.add_argument(
        *spellings("--task_folder"), metavar="FOLDER", help="with tasks of your own, as YAML files"
    )
    parser.add_argument(
        "--page", type=Path, metavar="NAME", help="also write NAME.json and NAME.html, with charts"
    )
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")
    parser.add_argument("--quiet", action="store_true", help="do not say what is being done")
    return parser


def _compared(arguments: argparse.Namespace) -> str:
    """What is asked for; what to print."""
    if arguments.page is not None:
        check_page_target(arguments.page)
    if arguments.tasks:
        check_tasks(arguments.tasks, arguments.task_folder)
    check_to_run(
        [*([arguments.base] if arguments.base else []), *arguments.ft_models, *arguments.merges]
    )
    texts = [text for path in arguments.text for text in read_texts(path)]
    prompts = [*arguments.prompt, *(read_prompts(arguments.prompts) if arguments.prompts else [])]
    with loading_bars(show=not arguments.quiet):
        comparison = compare(
            _candidates(arguments),
            texts=texts,
            prompts=prompts,
            settings=_settings(arguments),
            tell=lambda step: None if arguments.quiet else say(step, error=True),
        )
    if arguments.tasks and arguments.limit:
        note = f"tasks: of {arguments.limit} questions each, at most: a first look, no score"
        comparison = replace(comparison, notes=(*comparison.notes, note))
    if arguments.page is not None:
        paths = write_page(arguments.page, comparison.to_dict(), comparison_page(comparison))
        say(f"wrote {paths[0]} and {paths[1]}", error=True)
    return _shown(comparison, as_json=arguments.json)


def _candidates(arguments: argparse.Namespace) -> list[Candidate]:
    models = [
        *(("base", model) for model in [arguments.base] if model),
        *(("source", model) for model in arguments.ft_models),
        *(("merge", model) for model in arguments.merges),
    ]
    names = short_names([model for _, model in models])
    return [
        Candidate(
            name,
            role,  # type: ignore[arg-type]
            functools.partial(load_to_run, model, arguments.device, arguments.dtype),
        )
        for name, (role, model) in zip(names, models, strict=True)
    ]


def short_names(models: Sequence[str]) -> list[str]:
    """Models by the last parts of their names, as many as make them differ.

    >>> short_names(["runs/a/final", "runs/b/final", "base"])
    ['a/final', 'b/final', 'base']
    >>> short_names(["base", "base"])
    ['base', 'base (2)']
    """
    parts = [model.rstrip("/").split("/") for model in models]
    names = ["/".join(each[-1:]) for each in parts]
    for count in range(2, max(map(len, parts), default=1) + 1):
        names = [
            "/".join(each[-count:]) if names.count(name) > 1 else name
            for name, each in zip(names, parts, strict=True)
        ]
    return numbered(names)


def _settings(arguments: argparse.Namespace) -> Settings:
    tasks = functools.partial(
        run_tasks,
        tasks=arguments.tasks,
        shots=arguments.shots,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        chat=arguments.chat,
        include_path=arguments.task_folder,
    )
    shared = ("chat", "max_new_tokens", "batch_size", "max_length", "stride", "temperature")
    return Settings(
        metrics=tuple(arguments.metrics),
        top_p=arguments.top_p,
        seed=arguments.seed,
        tasks=tasks if arguments.tasks else None,
        **{name: getattr(arguments, name) for name in shared},
    )


def _shown(comparison: Comparison, *, as_json: bool) -> str:
    if as_json:
        return json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False)
    return comparison.summary()


if __name__ == "__main__":
    raise SystemExit(main())
