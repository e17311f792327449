"""Where in a table the genes of a prediction and of totals are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pekasc._expression import gene_positions
from pekasc._settings import get_logger
from pekasc._warnings import warn_user
from pekasc.models import Adapter

logger = get_logger(__name__)

_OTHER = 2.0  # times as many genes, or as few, whose totals are another scale


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
