"""The command as a whole: help, version, speed, and the pages on it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pekasc as pk
from pekasc.cli import _app

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ["info", "tile", "fit", "predict", "evaluate", "report", "compare"]


def test_help_lists_the_commands(run: Any) -> None:
    shown = run("--help").stdout
    assert re.findall(r"^  (\w+) {2,}\S", shown.split("Commands:")[1].split("Exit codes")[0], re.MULTILINE) == COMMANDS
    assert "1  some failed, the rest is done" in shown
    assert run("--version").stdout == f"pekasc {pk.__version__}\n"
    assert run("predit").code == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(run: Any, command: str) -> None:
    done = run(command, "--help")
    assert done.code == 0
    usage, text = done.stdout.split("Options:")
    assert usage.startswith(f"Usage: pekasc {command} ")
    for option in ("--json", "--debug", "--verbosity", *(() if command == "info" else ("--config",))):
        assert option in text
    # every option says what it is
    assert not re.findall(r"^  (--[\w-]+(?: [A-Z]+)?)\s*$\n  --", text, re.MULTILINE)
    assert "Exit codes:\n    0  all done" in text


def test_options_are_named_after_the_arguments_of_the_calls() -> None:
    from inspect import signature

    from pekasc.cli import _arguments, _compare, _evaluate, _fit, _predict, _report, _tile

    calls = {
        _tile.tile: (pk.io.read_slide, pk.pp.tile, pk.pp.tile_grid),
        _fit.fit: (pk.tl.fit_adapter, pk.pp.tile),
        _predict.predict: (pk.io.read_slide, pk.tl.predict_expression, pk.pp.tile_grid),
        _evaluate.evaluate: (pk.tl.evaluate,),
        _report.report: (pk.report,),
        _compare.compare: (pk.tl.cross_validate, pk.pp.tile),
    }
    of_the_command = {"context", "sources", "list_file", "out", "config", "as_json", "debug", "verbosity", "resume"}
    for command, functions in calls.items():
        known = set().union(*(signature(function).parameters for function in functions))
        assert set(signature(command).parameters) - of_the_command <= known, command
    assert set(signature(_arguments.grid_arguments).parameters) <= set(signature(pk.pp.tile_grid).parameters)


def test_help_is_quick() -> None:
    code = """
import sys
sys.argv = ["pekasc", "predict", "--help"]
from pekasc.cli import main
try:
    main()
except SystemExit as end:
    heavy = {"anndata", "dask", "numpy", "pandas", "spatialdata", "torch", "zarr"}
    print("code", end.code, sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "code 0 []"
    assert done.stdout.startswith("Usage: pekasc predict")


def test_module_runs_as_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pekasc", "predict", "slide.svs", "--adapter", "nothing", "--out", "x"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2 and "nothing holds no adapter of pekasc" in done.stderr and not done.stdout
    assert not list(tmp_path.iterdir())


def test_exit_codes_are_on_the_page() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    codes = re.findall(r"^  (\d)  (.*)$", _app.EXIT_CODES, re.MULTILINE)
    assert [code for code, _ in codes] == ["0", "1", "2", "3"]
    for code, meaning in codes:
        assert f"| {code} | {meaning} |" in page
