"""`Adapter`, the result of a fit, and its folder on disk."""

from __future__ import annotations

from pekasc.models.adapter._adapter import Adapter
from pekasc.models.adapter._genes import wanted_index
from pekasc.models.adapter._hub import fetch
from pekasc.models.adapter._lazyslide import LazySlideModels

__all__ = [
    "Adapter",
    "LazySlideModels",
    "fetch",
    "wanted_index",
]
