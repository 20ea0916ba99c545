"""Serve the merge API and its page.

llama-merge serve                               on this machine, port 5007
llama-merge serve --models /data/models         offer the models below a folder
llama-merge serve --host 0.0.0.0 --hosts merge.lan   for others; they need the token it prints
llama-merge serve --config service.toml         settings from a file

Every setting is also an environment variable, LLAMA_MERGE_ and its name: LLAMA_MERGE_PORT. What is
given here comes before the environment, and that before the file.
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


def _parser() -> argparse.ArgumentParser:
    from service.settings import Settings

    parser = CommandParser("[--models FOLDER ...]", description=__doc__)
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings as TOML")
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "" if default in (None, ()) else f" (default: {str(default).lower()})"
        options: dict[str, Any] = {"help": f"{field.description}{shown}"}
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = "FOLDER" if name in ("data", "models") else name.upper()
            options["nargs"] = "+" if default == () else None
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, default=None, **options)
    return parser


def _serve(arguments: argparse.Namespace) -> str:
    from service.app import create_app, with_token
    from service.server import serve
    from service.settings import read_settings

    given = {key: value for key, value in vars(arguments).items() if key != "config"}
    settings = with_token(read_settings(arguments.config, given))
    serve(create_app, settings)
    return "stopped"


if __name__ == "__main__":
    raise SystemExit(main())
