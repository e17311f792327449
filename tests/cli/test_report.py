"""`pekasc report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def test_a_report_of_an_adapter(run: Any, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.html"
    done = run("report", "--adapter", adapter, "--out", out, "--json")
    assert done.code == 0
    assert done.results == [{"adapter": str(adapter), "report": str(out), "status": "done"}]
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    again = run("report", "--adapter", adapter, "--out", out)
    assert again.code == 2 and "exists, and a report replaces nothing" in again.stderr


def test_with_predictions(run: Any, predicted: Any, adapter: Path, tmp_path: Path) -> None:
    _, out = predicted
    source = next(path for path in sorted(out.glob("*.zarr")))
    page = tmp_path / "report.html"
    done = run("report", source, "--adapter", adapter, "--out", page)
    assert done.code == 0, done.stderr
    assert done.stdout == f"{adapter}: {page}\n"
    assert "Predictions on these sections" in page.read_text(encoding="utf-8")


def test_bad_input(run: Any, adapter: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = run("report", "--adapter", tmp_path, "--out", page)
    assert done.code == 2 and "--adapter" in done.stderr
    done = run("report", "--adapter", adapter, "--out", page, "--groups", "patient")
    assert done.code == 2 and "--groups does nothing without ZARR" in done.stderr
    done = run("report", tmp_path / "nothing.zarr", "--adapter", adapter, "--out", page)
    assert done.code == 3 and "nothing.zarr is not there" in done.stderr
    assert not page.exists()
