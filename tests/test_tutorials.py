"""Every tutorial runs as a script, from the first line to the last."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "tutorials"
TUTORIALS = sorted(path.stem for path in FOLDER.glob("*.py"))
EXTRAS = {"into_lazyslide": "lazyslide"}  # packages that are not among those of the tests


def test_every_notebook_has_its_script() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == TUTORIALS


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_runs(name: str, tmp_path: Path) -> None:
    if name in EXTRAS and find_spec(EXTRAS[name]) is None:
        pytest.skip(f"needs {EXTRAS[name]}: pip install 'pekasc[{EXTRAS[name]}]'")
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py")],
        cwd=tmp_path, env={**os.environ, "MPLBACKEND": "Agg"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
