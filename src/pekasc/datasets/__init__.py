"""Example data: synthetic sections with known expression, and a public breast cancer data set."""

from __future__ import annotations

from pekasc.datasets._her2st import her2st
from pekasc.datasets._phantom import phantom
from pekasc.datasets._phantom_truth import phantom_truth

__all__ = ["her2st", "phantom", "phantom_truth"]
