"""`pekasc.settings`: who shows the package's log, and how much of it."""

from __future__ import annotations

import ast
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pekasc as pk
from pekasc import _settings
from pekasc._settings import HINT, get_logger

SOURCES = Path(str(pk.__file__)).parent

# what calls do: a line of each kind, twice
LINES = """
import logging
import pekasc as pk
from pekasc._settings import get_logger
logger = get_logger("pekasc.call")
{before}
for number in (1, 2):
    logger.info("progress %d", number)
    logger.hint("chosen %d", number)
    logger.warning("doubt %d", number)
    {between}
"""
FIRST, SECOND = ["chosen 1", "WARNING: doubt 1"], ["chosen 2", "WARNING: doubt 2"]


def shown(before: str = "", between: str = "", *, code: str = LINES, **env: str) -> list[str]:
    """Return the lines that a fresh process shows on stderr."""
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code.format(before=before, between=between)],
        check=True, capture_output=True, text=True, env={**clean, **env},
    )  # fmt: skip
    assert not done.stdout
    return done.stderr.splitlines()


@contextmanager
def no_logging() -> Iterator[logging.Logger]:
    """Take pytest's handlers away, give the package's logger, and put everything back afterwards."""
    package, root, handler = logging.getLogger("pekasc"), logging.getLogger(), _settings._handler
    before = package.level, package.handlers, root.handlers, pk.settings.verbosity, handler.level_is_default
    package.handlers, root.handlers = [], []
    try:
        yield package
    finally:
        pk.settings.verbosity = before[3]
        package.handlers, root.handlers, handler.level_is_default = before[1], before[2], before[4]
        package.setLevel(before[0])


# ------------------------------------------------------------------------------------------------ fresh processes


def test_import_sets_nothing_up_and_a_call_shows_what_it_chose() -> None:
    # in one process, for imports are what takes time
    code = """
import logging
import scanpy
import pekasc as pk
for name in ("datasets", "get", "io", "models", "pl", "pp", "tl"):
    getattr(pk, name)
package = logging.getLogger("pekasc")
assert not package.handlers and package.level == logging.NOTSET and package.propagate
assert not logging.getLogger().handlers
sdata = pk.datasets.phantom(n_patients=1, n_sections=1, n_spots=30)
pk.pp.tile(sdata)
# scanpy's hints stay at their level
scanpy.settings.verbosity = "hint"
assert scanpy.settings._root_logger.level == scanpy.logging.HINT == 15
assert logging.getLevelName(25) == "HINT"
"""
    (line,) = shown(code=code)  # not what the data set has, which is INFO
    assert re.match(r"section P1S1_spots: 30 tiles of 224 px \(112 um\) on image P1S1_he, .*\.", line)


def test_hints_are_shown_by_default() -> None:
    assert shown() == FIRST + SECOND


@pytest.mark.parametrize(("verbosity", "n_lines"), [("warning", 1), ("hint", 2), ("info", 3), ("debug", 3)])
def test_verbosity(verbosity: str, n_lines: int) -> None:
    setting = f"pk.settings.verbosity = {verbosity!r}"
    second = ["progress 2", *SECOND][-n_lines:]
    if verbosity == "warning":
        second = SECOND[1:]
    first = [line.replace("2", "1") for line in second]
    assert shown(before=setting) == first + second
    assert shown(between=setting) == FIRST + second


def test_the_users_logging_wins() -> None:
    setup = "logging.basicConfig(level=logging.{}, format='%(levelname)s|%(name)s|%(message)s')"
    assert shown(setup.format("INFO"))[:3] == [
        "INFO|pekasc.call|progress 1",
        "HINT|pekasc.call|chosen 1",
        "WARNING|pekasc.call|doubt 1",
    ]
    assert len(shown(setup.format("INFO"))) == 6
    assert shown(setup.format("ERROR")) == []
    # asked for, so it holds in the user's log too
    asked = shown(setup.format("ERROR") + "; pk.settings.verbosity = 'hint'")
    assert [line.split("|")[0] for line in asked] == ["HINT", "WARNING"] * 2


def test_logging_set_up_after_the_first_call_takes_over() -> None:
    after = shown(between="logging.basicConfig(level=logging.INFO, format='theirs: %(message)s')")
    assert after == [*FIRST, "theirs: progress 2", "theirs: chosen 2", "theirs: doubt 2"]
    after = shown(between="logging.getLogger('pekasc').addHandler(logging.NullHandler())")
    assert after == FIRST


def test_a_level_of_the_users_holds() -> None:
    assert len(shown("logging.getLogger('pekasc').setLevel('INFO')")) == 6
    assert shown("logging.getLogger('pekasc').setLevel('ERROR')") == []


def test_the_first_of_several_processes_speaks() -> None:
    assert shown(RANK="0", LOCAL_RANK="0") == FIRST + SECOND
    assert shown(LOCAL_RANK="1") == []
    assert shown(RANK="8", LOCAL_RANK="0") == []


# ------------------------------------------------------------------------------------------------ here


def test_lines_go_where_stderr_is_now(capsys: pytest.CaptureFixture[str]) -> None:
    logger = get_logger("pekasc.test")
    with no_logging() as package:
        logger.hint("%d spots left out.", 3)
        logger.warning("Look.")
        logger.info("a step")
        assert package.handlers == [_settings._handler]
    assert capsys.readouterr() == ("", "3 spots left out.\nWARNING: Look.\n")


def test_notebooks_have_them_on_stdout(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.__IPYTHON__", True, raising=False)
    with no_logging():
        get_logger("pekasc.test").hint("chosen")
        assert capsys.readouterr() == ("chosen\n", "")
        monkeypatch.setattr(sys, "stdout", None)
        get_logger("pekasc.test").hint("no console")
        monkeypatch.undo()


def test_a_line_names_its_caller(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(HINT, logger="pekasc"):
        get_logger("pekasc.test").hint("here")
    assert [(r.levelno, r.filename, r.funcName) for r in caplog.records] == [
        (HINT, "test_settings.py", "test_a_line_names_its_caller")
    ]


def test_names_of_levels() -> None:
    with no_logging() as package:
        pk.settings.verbosity = "INFO"
        assert pk.settings.verbosity == "info" and repr(pk.settings) == "Settings(verbosity='info')"
        assert package.level == logging.INFO and not package.handlers
        for wrong in ("error", "hints", 3, None):
            message = f"`verbosity={wrong!r}` is unknown. Valid levels: warning, hint, info, debug."
            with pytest.raises(ValueError, match=re.escape(message)):
                pk.settings.verbosity = wrong  # type: ignore[assignment]
        assert pk.settings.verbosity == "info"
        with pytest.raises(AttributeError):
            pk.settings.verbose = "info"


def test_every_module_logs_through_the_settings() -> None:
    # a line of `logging.getLogger` would be shown only after one of ours
    found = [
        path.name
        for path in SOURCES.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node) == "logging.getLogger(__name__)"
    ]
    assert not found
