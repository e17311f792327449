"""Example data: a synthetic section with known truth, and real sections."""

from __future__ import annotations

from pekasc.datasets._phantom import phantom

__all__ = ["phantom"]
