"""Encoders, adapters and heads: pure torch and numpy, no SpatialData."""

from __future__ import annotations

from pekasc.models._adapter import Adapter
from pekasc.models._encoders import Encoder

__all__ = ["Adapter", "Encoder"]
