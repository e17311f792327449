"""Plots: tiles, slides, measured and predicted expression, scores per gene, training history."""

from __future__ import annotations

from pekasc.pl._expression import expression
from pekasc.pl._gene_scores import gene_scores
from pekasc.pl._history import history
from pekasc.pl._slide import slide
from pekasc.pl._tiles import tiles

__all__ = ["expression", "gene_scores", "history", "slide", "tiles"]
