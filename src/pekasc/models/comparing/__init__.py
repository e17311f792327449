"""Comparison of methods on held-out folds: registry of rivals, gene sets, tables, the protocol of HEST-Bench."""

from __future__ import annotations

from pekasc.models.comparing._bench import Bench
from pekasc.models.comparing._comparison import HEST, HEST_PROTOCOLS, Comparison
from pekasc.models.comparing._gene_sets import CHOSEN, check_gene_sets, choose_gene_sets
from pekasc.models.comparing._results import Results
from pekasc.models.comparing._rivals import BEST_FROZEN, LAZY, RIVALS, Rival, rival
from pekasc.models.comparing._table import MIN_TEST, score_fold

__all__ = [
    "BEST_FROZEN",
    "Bench",
    "CHOSEN",
    "Comparison",
    "HEST",
    "HEST_PROTOCOLS",
    "LAZY",
    "MIN_TEST",
    "RIVALS",
    "Results",
    "Rival",
    "check_gene_sets",
    "choose_gene_sets",
    "rival",
    "score_fold",
]
