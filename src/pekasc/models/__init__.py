"""Encoders, teachers and adapters, which work on arrays of tiles without SpatialData."""

from __future__ import annotations

from pekasc.models.adapter import Adapter, LazySlideModels
from pekasc.models.encoders import Encoder, get_encoder, list_encoders
from pekasc.models.teachers import Teacher
from pekasc.tiling import StainMap

__all__ = ["Adapter", "Encoder", "LazySlideModels", "StainMap", "Teacher", "get_encoder", "list_encoders"]
