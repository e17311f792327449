"""Predictions of a ridge regression by itself, for the scripts that read features on their own."""

from __future__ import annotations

from typing import Any

import numpy as np


def predict(fit: Any, alpha: float, features: np.ndarray) -> np.ndarray:
    """Return what a :class:`RidgeFit` predicts for features, with a penalty, (n, genes)."""
    return np.asarray(fit.projection(features) @ fit.coef(alpha) + fit.intercept)
