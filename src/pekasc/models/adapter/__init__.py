"""The fitted object, and its folder on disk."""

from __future__ import annotations

from pekasc.models.adapter._adapter import Adapter

__all__ = [
    "Adapter",
]
