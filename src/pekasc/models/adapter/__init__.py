"""`Adapter`, the result of a fit, and its folder on disk."""

from __future__ import annotations

from pekasc.models.adapter._adapter import Adapter

__all__ = [
    "Adapter",
]
