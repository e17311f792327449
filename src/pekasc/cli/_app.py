"""The command with its subcommands, and what its help says."""

from __future__ import annotations

from typing import Annotated

import typer

from pekasc.cli import _compare, _evaluate, _fit, _info, _predict, _report, _tile

# "\b": a paragraph whose lines stay as they are
EXIT_CODES = """\b
Exit codes:
  0  all done, or finished before, or another process is at it
  1  some failed, the rest is done
  2  wrong arguments, nothing was started
  3  nothing could be done
"""


def _version(value: bool) -> None:
    if value:
        from pekasc import __version__

        typer.echo(f"pekasc {__version__}")
        raise typer.Exit


def pekasc(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Predict gene expression from H&E slides with pathology encoders trained on your own sections."""


def _app() -> typer.Typer:
    # plain text: the same in a terminal, in a log file and in the documentation
    app = typer.Typer(
        name="pekasc", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
    )
    app.callback(epilog=EXIT_CODES)(pekasc)
    commands = (
        _info.info, _tile.tile, _fit.fit, _predict.predict, _evaluate.evaluate, _report.report, _compare.compare,
    )  # fmt: skip
    for command in commands:
        app.command(epilog=EXIT_CODES, no_args_is_help=True)(command)
    return app


app = _app()


def main() -> None:
    """Run the command with the arguments of the process."""
    app(prog_name="pekasc")
