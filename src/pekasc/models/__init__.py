"""Encoders, adapters and heads: pure torch and numpy, no SpatialData."""

from __future__ import annotations

from pekasc.models._adapter import Adapter
from pekasc.models._encoders import Encoder, get_encoder, list_encoders

__all__ = ["Adapter", "Encoder", "get_encoder", "list_encoders"]
