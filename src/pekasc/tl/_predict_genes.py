"""Which genes are predicted, and where in a table they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pekasc._expression import close_genes, gene_positions
from pekasc._settings import get_logger
from pekasc._warnings import warn_user
from pekasc.models import Adapter

logger = get_logger(__name__)

_OTHER = 2.0  # times as many genes, or as few, whose totals are another scale


def wanted_of(adapter: Adapter, genes: Sequence[str] | None) -> np.ndarray:
    """Return the genes to predict, as places among those of the adapter."""
    if genes is None:
        return np.arange(len(adapter.genes))
    genes = [genes] if isinstance(genes, str) else list(dict.fromkeys(genes))
    if not len(genes):
        raise ValueError("`genes=` is empty: leave it out to predict all genes of the adapter.")
    known = np.array(adapter.genes, dtype=object)
    positions = gene_positions(known, list(genes))
    missing = [gene for gene, at in zip(genes, positions, strict=True) if at < 0]
    if missing:
        raise KeyError(
            f"The adapter does not predict {len(missing)} of the {len(genes)} genes asked for: {missing[:5]}. It "
            f"predicts {len(known)} (`adapter.genes`).{close_genes(missing[0], known)}"
        )
    return positions


def columns_of(names: np.ndarray, target_genes: Sequence[str], gene_of: np.ndarray) -> np.ndarray:
    """Return the column of the table for each gene, -1 where it has none."""
    at = gene_positions(names, target_genes)
    return np.where(at >= 0, gene_of[at], -1) if gene_of.size else at


def columns_of_totals(adapter: Adapter, names: np.ndarray, gene_of: np.ndarray) -> np.ndarray | None:
    """Return the columns of the genes that totals are over; None is all genes of the table.

    Those of an adapter whose training sections measured different genes are over the genes that these shared.
    """
    shared = adapter.info.get("total_genes")
    if shared is None:
        return None
    columns = columns_of(names, shared, gene_of)
    if (columns < 0).any():
        logger.hint(
            "Totals are over %d genes of the %d that all training sections measured: the others are not in the table.",
            int((columns >= 0).sum()), len(shared),
        )  # fmt: skip
    return columns[columns >= 0]


def warn_of_other_totals(adapter: Adapter, n_genes: int) -> None:
    """Warn if totals of spots are over far fewer or more genes than in the training, such as in a filtered table."""
    then = adapter.info.get("n_genes_in_total")  # missing in adapters of earlier versions, and of other targets
    if then is None or not n_genes or 1 / _OTHER <= n_genes / then <= _OTHER:
        return
    warn_user(
        f"Totals of spots are over {n_genes} genes here, and were over {then} in the training: measured values are on "
        "another scale than predictions, so that rmse, intervals, their coverage and a pull to these values do not "
        "hold. Give the table with all its genes, and choose those to predict with `genes=`."
    )
