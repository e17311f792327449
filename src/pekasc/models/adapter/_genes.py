"""Which genes of an adapter are predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pekasc._expression import close_genes, gene_positions

if TYPE_CHECKING:
    from pekasc.models.adapter._adapter import Adapter


def wanted_index(adapter: Adapter, genes: str | Sequence[str] | None) -> np.ndarray:
    """Return the genes to predict as indices of the adapter's, each once; None: all.

    Raises
    ------
    KeyError
        If the adapter does not predict one.
    ValueError
        If there are none.
    """
    if genes is None:
        return np.arange(len(adapter.genes))
    wanted = [genes] if isinstance(genes, str) else list(dict.fromkeys(genes))
    if not wanted:
        raise ValueError("`genes=` is empty: name at least one gene.")
    known = np.array(adapter.genes, dtype=object)
    index = gene_positions(known, wanted)
    missing = [gene for gene, at in zip(wanted, index, strict=True) if at < 0]
    if missing:
        raise KeyError(
            f"The adapter does not predict {len(missing)} of the {len(wanted)} genes asked for: {missing[:5]}. It "
            f"predicts {len(known)} (`adapter.genes`).{close_genes(str(missing[0]), known)}"
        )
    return index
