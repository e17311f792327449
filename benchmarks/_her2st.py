"""What the scripts on her2st share: splits, and the genes that the training sections choose."""

from __future__ import annotations

import numpy as np

from pekasc.tl._gene_sets import choose_gene_sets
from pekasc.tl._inputs import expressed_genes

FOLDS = {"C4": (["C2", "C3"], ["C4"]), "B4": (["C2", "C3", "C4"], ["B4"])}
ALL_FOLDS = {
    **FOLDS,
    "C3": (["C2", "C4"], ["C3"]),
    "C2": (["C3", "C4"], ["C2"]),
    "B to C": (["B4"], ["C2", "C3", "C4"]),
}


def chosen_genes(
    log: np.ndarray, names: list[str], coords_um: np.ndarray, sections: np.ndarray
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Return expressed genes, and 50 spatially variable and 50 highly variable ones: all, and each set's places in it.

    Everything is of the training spots.
    """
    expressed = expressed_genes(log, sections)
    sets = choose_gene_sets({"svg": None, "hvg": None}, names, log, coords_um, sections, expressed, 50)
    union = np.unique(np.concatenate(list(sets.values())))
    return expressed, union, {name: np.searchsorted(union, at) for name, at in sets.items()}
