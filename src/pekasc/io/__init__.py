"""Readers of whole slide images, HEST-1k and stored predictions; a writer of GeoJSON for QuPath."""

from __future__ import annotations

from pekasc.io._geojson import write_geojson
from pekasc.io._hest import read_hest
from pekasc.io._predictions import attach_predictions
from pekasc.io._slide import read_slide

__all__ = ["attach_predictions", "read_hest", "read_slide", "write_geojson"]
