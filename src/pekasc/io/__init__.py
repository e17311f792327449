"""Readers: whole slide images and HEST-1k."""

from __future__ import annotations

from pekasc.io._hest import read_hest
from pekasc.io._slide import read_slide

__all__ = ["read_hest", "read_slide"]
