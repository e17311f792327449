"""Selection on held-out training groups, by one rule for every method, and the final fit."""

from __future__ import annotations

from pekasc.models.selection._autocorrelation import MIN_SPOTS, morans_i
from pekasc.models.selection._choice import choose
from pekasc.models.selection._fit import depths_of, fit, kept_spots, margin_um, tiles_alone
from pekasc.models.selection._folds import InnerFold, inner_folds
from pekasc.models.selection._inputs import Data, HeadSpec, Options
from pekasc.models.selection._readout import Features, Fitted, Reader, choose_depth, fixed_radius, n_neighbours
from pekasc.models.selection._result import correlations_of
from pekasc.models.selection._scores import BlockScores, gene_scores, interval, mean_score, pearson, tissue_blocks

__all__ = [
    "BlockScores",
    "Data",
    "Features",
    "Fitted",
    "HeadSpec",
    "InnerFold",
    "MIN_SPOTS",
    "Options",
    "Reader",
    "choose",
    "choose_depth",
    "correlations_of",
    "depths_of",
    "fit",
    "fixed_radius",
    "gene_scores",
    "inner_folds",
    "interval",
    "kept_spots",
    "margin_um",
    "mean_score",
    "morans_i",
    "n_neighbours",
    "pearson",
    "tiles_alone",
    "tissue_blocks",
]
