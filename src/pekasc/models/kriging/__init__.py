"""Kriging of residuals: what was measured at spots, less what was predicted there, carried to places between them."""

from __future__ import annotations

from pekasc.models.kriging._choice import LEAST_SPOTS, TooFewSpots, fit_kriging
from pekasc.models.kriging._kriging import Kriging

__all__ = ["LEAST_SPOTS", "Kriging", "TooFewSpots", "fit_kriging"]
