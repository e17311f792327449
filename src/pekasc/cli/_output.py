"""What a command says and how it ends: results on stdout, everything else on stderr, exit codes."""

from __future__ import annotations

import json
import math
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

import typer

from pekasc._settings import settings

SOME_FAILED = 1
NOTHING_DONE = 3


class Output:
    """Where a command writes: its results to stdout, as JSON or as text, and all else to stderr.

    Parameters
    ----------
    as_json
        Whether results are JSON, one object a line.
    debug
        Whether an error shows its traceback.
    """

    def __init__(self, *, as_json: bool, debug: bool) -> None:
        self._results: TextIO = sys.stdout
        self._as_json, self._debug = as_json, debug
        self.bars = sys.stderr.isatty()

    def result(self, record: Mapping[str, Any], text: str) -> None:
        """Write a result: the record with ``--json``, else the text, unless it is empty."""
        if self._as_json:
            text = json.dumps(_plain(record), ensure_ascii=False)
        if text:
            self._results.write(f"{text}\n")
            self._results.flush()

    def line(self, text: str) -> None:
        """Write a line about the progress."""
        if self.bars:
            from tqdm.auto import tqdm

            tqdm.write(text, file=sys.stderr)
        else:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def reason(self, error: BaseException) -> str:
        """Return an error as one line, and show its traceback if asked for."""
        if self._debug:
            traceback.print_exception(error)
        return one_line(error)


@contextmanager
def working(*, as_json: bool, debug: bool, verbosity: str | None) -> Iterator[Output]:
    """Run a command: what libraries print goes to stderr, and an error ends it with one line and its exit code."""
    out = Output(as_json=as_json, debug=debug)
    if verbosity is not None:
        try:
            settings.verbosity = verbosity
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--verbosity") from None
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield out
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:  # noqa: BLE001 (whatever it is: one line says it, and --debug shows where)
        sys.stderr.write(f"pekasc: error: {out.reason(error)}\n")
        raise typer.Exit(NOTHING_DONE) from None


def finish(out: Output, failures: Mapping[str, str], n_other: int) -> None:
    """Name what failed, and leave with the exit code.

    Parameters
    ----------
    out
        Where to write.
    failures
        Reason by name of what failed.
    n_other
        Number of those that did not fail.
    """
    if not failures:
        return
    out.line(f"{len(failures)} of {len(failures) + n_other} failed:")
    for name, reason in failures.items():
        out.line(f"pekasc: error: {name}: {reason}")
    raise typer.Exit(SOME_FAILED if n_other else NOTHING_DONE)


def one_line(error: BaseException) -> str:
    """Return what an error says on one line; its class where it says nothing."""
    # str() of a KeyError has the quotes of a key
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__


def _show_warning(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
    """Show a warning on one line; those about other packages, meant for who calls them, if as much is asked for."""
    ours = Path(filename).is_relative_to(Path(__file__).parents[1])
    if ours or settings.verbosity in {"info", "debug"}:
        sys.stderr.write(f"pekasc: warning: {' '.join(str(message).split())}\n")


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: NaN and infinities are null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # arrays and numbers of NumPy
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int) else str(value)
