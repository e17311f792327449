"""What a command writes where, and how it ends."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer

import pekasc as pk
from pekasc.cli import _output


@pytest.fixture
def verbosity_kept() -> Iterator[None]:
    """Keep the verbosity of the session, and the level that it sets."""
    before, level = pk.settings.verbosity, logging.getLogger("pekasc").level
    yield
    pk.settings.verbosity = before
    logging.getLogger("pekasc").setLevel(level)


def test_results_are_all_there_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    record = {"n": np.int64(3), "nan": float("nan"), "path": Path("a"), "list": (np.float32(0.5), None, True), "ä": "ö"}
    with _output.working(as_json=True, debug=False, verbosity=None) as output:
        sys.stdout.write("printed by a library\n")
        output.line("a line")
        output.result(record, "text")
    captured = capsys.readouterr()
    assert captured.err == "printed by a library\na line\n"
    assert captured.out.count("\n") == 1
    expected = {"n": 3, "nan": None, "path": "a", "list": [0.5, None, True], "ä": "ö"}
    assert json.loads(captured.out) == expected
    with _output.working(as_json=False, debug=False, verbosity=None) as output:
        output.result(record, "text")
        output.result(record, "")
    assert capsys.readouterr().out == "text\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (KeyError("a 'quoted' key"), "a 'quoted' key"),
        (OSError(28, "No space left on device", "x.zarr"), "[Errno 28] No space left on device: 'x.zarr'"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_an_error_is_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as end, _output.working(as_json=True, debug=False, verbosity=None):
        raise error
    assert end.value.exit_code == 3
    captured = capsys.readouterr()
    assert captured.err == f"pekasc: error: {line}\n" and not captured.out


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), _output.working(as_json=False, debug=True, verbosity=None):
        raise ValueError("why")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1] == "pekasc: error: why"


@pytest.mark.usefixtures("verbosity_kept")
def test_warnings_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def warn() -> None:
        warnings.warn_explicit("ours\nis one line", UserWarning, str(Path(pk.__file__).parent / "tl" / "_x.py"), 1)
        warnings.warn_explicit("theirs", UserWarning, "/elsewhere/zarr.py", 1)

    shown = warnings.showwarning
    with _output.working(as_json=False, debug=False, verbosity=None):
        warnings.simplefilter("always")
        warn()
    assert capsys.readouterr().err == "pekasc: warning: ours is one line\n"
    with _output.working(as_json=False, debug=False, verbosity="info"):
        warnings.simplefilter("always")
        warn()
    assert capsys.readouterr().err == "pekasc: warning: ours is one line\npekasc: warning: theirs\n"
    assert warnings.showwarning is shown


@pytest.mark.usefixtures("verbosity_kept")
def test_verbosity() -> None:
    with _output.working(as_json=False, debug=False, verbosity="warning"):
        assert pk.settings.verbosity == "warning"
    with pytest.raises(typer.BadParameter, match="Valid levels"):
        with _output.working(as_json=False, debug=False, verbosity="loud"):
            pass


@pytest.mark.parametrize(("n_other", "code"), [(2, 1), (0, 3)])
def test_finish(n_other: int, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    output = _output.Output(as_json=False, debug=False)
    _output.finish(output, {}, n_other)
    with pytest.raises(typer.Exit) as end:
        _output.finish(output, {"a.svs": "no tissue"}, n_other)
    assert end.value.exit_code == code
    assert capsys.readouterr().err == f"1 of {n_other + 1} failed:\npekasc: error: a.svs: no tissue\n"
