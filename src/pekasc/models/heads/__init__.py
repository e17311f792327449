"""Expression heads: regression from features, with spatial context, to genes."""

from __future__ import annotations

from pekasc.models.heads._average import setting_weights, spread
from pekasc.models.heads._context import (
    check_radius,
    coarse_stride,
    cuts_sections,
    lattice_offsets,
    neighbour_means,
    offset_means,
    pitch_um,
    with_context,
)
from pekasc.models.heads._fits import Inputs, Target, Tried
from pekasc.models.heads._linear import Block, LinearHead, LinearMap, Source, linear_block
from pekasc.models.heads._low_rank import ranks_for
from pekasc.models.heads._projection import n_components_for
from pekasc.models.heads._reading import Member, Reading, share_weights
from pekasc.models.heads._registry import HeadFits, check_head, head_fits, linear_head
from pekasc.models.heads._ridge import ALPHAS, fit_folds, fit_ridge

__all__ = [
    "ALPHAS",
    "Block",
    "HeadFits",
    "Inputs",
    "LinearHead",
    "LinearMap",
    "Member",
    "Reading",
    "Source",
    "Target",
    "Tried",
    "check_head",
    "check_radius",
    "coarse_stride",
    "cuts_sections",
    "fit_folds",
    "fit_ridge",
    "head_fits",
    "lattice_offsets",
    "linear_block",
    "linear_head",
    "n_components_for",
    "neighbour_means",
    "offset_means",
    "pitch_um",
    "ranks_for",
    "setting_weights",
    "share_weights",
    "spread",
    "with_context",
]
