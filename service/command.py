"""Serve the merge API and its page.

llama-merge serve                           for this machine alone, on port 5007
llama-merge serve --models /data/models     with the models below a folder
llama-merge serve --host 0.0.0.0            for others, who need the token that it prints
llama-merge serve --config service.toml     with settings from a file

Every setting is also an environment variable, LLAMA_MERGE_ and its name (LLAMA_MERGE_PORT), and an
entry of the file (port). What is given here comes before the environment, and that before the file.
The token is given by the last two alone: a command line can be seen by all on the machine.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merge_arguments import CommandParser
from merge_command import reported


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    try:
        import fastapi  # noqa: F401
        import jinja2  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        print(
            f"error: the service needs packages that are not installed ({error.name}). Install "
            "them: pip install 'llama-merge[service]', or in a checkout pip install '.[service]'",
            file=sys.stderr,
        )
        return 2
    arguments = _parser().parse_args(argv)
    return reported(lambda: _serve(arguments))


METAVARS = {
    "data": "FOLDER",
    "models": "FOLDER",
    "hub_models": "ID",
    "hosts": "NAME",
    "trusted_proxies": "ADDRESS",
    "host": "ADDRESS",
    "device": "DEVICE",
    **dict.fromkeys(("max_memory", "disk_reserve", "max_results", "max_body"), "SIZE"),
}
"""What options take that is not a number."""

NOT_HERE = ("token",)
"""Settings that everyone on the machine would see on a command line."""


class _NotHere(argparse.Action):
    """Says where a setting is given that is not given on the command line."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        name = self.dest
        parser.error(
            f"the {name} is not given here, where everyone on the machine can see it. Set "
            f"LLAMA_MERGE_{name.upper()}, or `{name}` in the file of --config"
        )


def _parser() -> argparse.ArgumentParser:
    from service.settings import Settings

    name = "start.py" if Path(sys.argv[0]).name == "start.py" else "llama-merge serve"
    parser = CommandParser("[--models FOLDER ...]", prog=name, description=__doc__)
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings as TOML")
    parser.add_argument("--token", action=_NotHere, help=argparse.SUPPRESS)
    for key, field in Settings.model_fields.items():
        if key in NOT_HERE:
            continue
        default = None if field.default_factory else field.default
        shown = "" if default in (None, ()) else f" (default: {_written(default)})"
        options: dict[str, Any] = {"help": f"{field.description}{shown}"}
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = METAVARS.get(key, "N")
            options["nargs"] = "+" if default == () else None
        parser.add_argument(f"--{key.replace('_', '-')}", dest=key, default=None, **options)
    return parser


def _written(default: object) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return f"{default:g}" if isinstance(default, float) else str(default)


def _serve(arguments: argparse.Namespace) -> str:
    from service.app import create_app, with_token
    from service.planner import check_device
    from service.server import serve
    from service.settings import read_settings

    given = {key: value for key, value in vars(arguments).items() if key != "config"}
    asked = read_settings(arguments.config, given)
    if asked.device != "cpu":
        check_device(asked.device)
    settings = with_token(asked)
    serve(create_app, settings, show_token=settings.token != asked.token)
    return "stopped"


if __name__ == "__main__":
    raise SystemExit(main())
