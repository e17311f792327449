"""Plots: tiles, slides, measured and predicted expression, scores and trust per gene, calibration, novelty, history."""

from __future__ import annotations

from pekasc.pl._calibration import calibration
from pekasc.pl._expression import expression
from pekasc.pl._gene_scores import gene_scores
from pekasc.pl._history import history
from pekasc.pl._novelty import novelty
from pekasc.pl._slide import slide
from pekasc.pl._tiles import tiles
from pekasc.pl._trust import trust

__all__ = ["calibration", "expression", "gene_scores", "history", "novelty", "slide", "tiles", "trust"]
