"""The script that measures a GPU runs where there is none, at small size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not part of an installed package")
def test_the_gpu_script_runs_at_small_size(tmp_path: Path) -> None:
    out = tmp_path / "page.md"
    command = [sys.executable, str(BENCHMARKS / "gpu_speed.py"), "--device", "cpu", "--small", "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in out.read_text().splitlines() if line.startswith("| ViT")]
    assert len(rows) == 6
    assert all(float(row[3]) > 0 and row[4].strip().endswith("%") for row in rows)
