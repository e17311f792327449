"""Expression heads: regression from features, with spatial context, to genes."""

from __future__ import annotations

from pekasc.models.heads._context import (
    check_radius,
    lattice_offsets,
    neighbour_means,
    offset_means,
    pitch_um,
    with_context,
)
from pekasc.models.heads._projection import Projection, n_components_for
from pekasc.models.heads._registry import FoldData, Head, check_head, fit_rows
from pekasc.models.heads._ridge import ALPHAS, RidgeHead, fit_folds, fit_ridge

__all__ = [
    "ALPHAS",
    "FoldData",
    "Head",
    "Projection",
    "RidgeHead",
    "check_head",
    "check_radius",
    "fit_folds",
    "fit_ridge",
    "fit_rows",
    "n_components_for",
    "lattice_offsets",
    "neighbour_means",
    "offset_means",
    "pitch_um",
    "with_context",
]
