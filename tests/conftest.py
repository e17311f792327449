"""Fixtures that every room's tests may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder with real data for tests: named by PEKASC_SHARED, else `shared` beside the checkout."""
    named = os.environ.get("PEKASC_SHARED")
    path = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip(f"no real data: {path} is no folder (set PEKASC_SHARED to one laid out like it)")
    return path
