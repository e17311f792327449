"""Tools: embed tiles and expression, fit adapters, predict expression, calibrate, evaluate, and make images."""

from __future__ import annotations

from pekasc.tl._calibrate import calibrate
from pekasc.tl._cross_validate import cross_validate
from pekasc.tl._embed_expression import embed_expression
from pekasc.tl._embed_tiles import embed_tiles
from pekasc.tl._evaluate import evaluate
from pekasc.tl._fit_adapter import fit_adapter
from pekasc.tl._leakage_audit import leakage_audit
from pekasc.tl._predict_expression import predict_expression
from pekasc.tl._rasterize_expression import rasterize_expression

__all__ = [
    "calibrate",
    "cross_validate",
    "embed_expression",
    "embed_tiles",
    "evaluate",
    "fit_adapter",
    "leakage_audit",
    "predict_expression",
    "rasterize_expression",
]
