"""Gene sets to compare methods on, selected on training spots only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pekasc._expression import Matrix, dense
from pekasc._settings import get_logger
from pekasc.models.comparing._hest import highly_variable
from pekasc.models.selection import MIN_SPOTS, morans_i

logger = get_logger(__name__)

CHOSEN = ("svg", "hvg", "expressed")
GIVEN = "given"


def check_gene_sets(genes: Any, names: Sequence[str]) -> dict[str, list[str] | None]:
    """Return the gene sets by name: names of genes, or None for a set to be selected in the fold.

    Parameters
    ----------
    genes
        Names of sets (``"svg"``, ``"hvg"``, ``"expressed"``), a list of genes, or a mapping from a name to genes.
    names
        Genes of the table.

    Raises
    ------
    KeyError
        If a gene is not in the table.
    ValueError
        If a set is empty.
    """
    if isinstance(genes, str):
        genes = [genes]
    sets: dict[str, list[str] | None]
    if isinstance(genes, Mapping):
        sets = {
            str(name): [given] if isinstance(given, str) else [str(gene) for gene in given]
            for name, given in genes.items()
        }
    elif len(genes) and all(gene in CHOSEN for gene in genes):
        sets = {str(name): None for name in genes}
    else:
        sets = {GIVEN: [str(gene) for gene in genes]}
    known = set(names)
    for name, given in sets.items():
        if given is None:
            continue
        if not given:
            raise ValueError(f"`genes=`: the set {name!r} is empty.")
        missing = [gene for gene in given if gene not in known]
        if missing:
            raise KeyError(
                f"`genes=`: {len(missing)} of {len(given)} genes are not in the table: {missing[:5]}. Sets that are "
                f"chosen in each fold are {list(CHOSEN)}."
            )
    if not sets:
        raise ValueError(f"`genes=` is empty: give some of {list(CHOSEN)}, a list of genes, or a mapping of lists.")
    return sets


def spatially_variable(expression: Matrix, coords_um: np.ndarray, sections: np.ndarray) -> np.ndarray:
    """Return Moran's I of every gene, (genes,), averaged over sections; 0 in sections where the gene is constant."""
    values = []
    for section in np.unique(sections):
        at = np.flatnonzero(sections == section)
        if at.size < MIN_SPOTS:
            continue
        value = morans_i(dense(expression[at]), coords_um[at])[0]
        values.append(np.nan_to_num(value))
    return np.mean(values, axis=0) if values else np.zeros(expression.shape[1])


def choose_gene_sets(
    sets: Mapping[str, list[str] | None],
    names: Sequence[str],
    expression: Matrix,
    coords_um: np.ndarray,
    sections: np.ndarray,
    expressed: np.ndarray,
    n_genes: int,
) -> dict[str, np.ndarray]:
    """Return the indices in `names` of the genes of every set, sorted.

    Parameters
    ----------
    sets
        See :func:`check_gene_sets`.
    names
        Names of the genes.
    expression, coords_um, sections
        Log-normalised expression, positions and sections of the training spots.
    expressed
        Indices of the genes detected in enough spots, among which sets are selected.
    n_genes
        Number of genes in a selected set.
    """
    n = min(n_genes, len(expressed))
    if n < n_genes:
        logger.hint("Only %d genes are detected in enough spots to select %d.", n, n_genes)
    position = {name: i for i, name in enumerate(names)}
    out = {}
    for name, given in sets.items():
        if given is not None:
            out[name] = np.unique([position[gene] for gene in given])
        elif name == "expressed":
            out[name] = expressed
        elif name == "svg":
            score = spatially_variable(expression[:, expressed], coords_um, sections)
            out[name] = np.sort(expressed[np.argsort(-score, kind="stable")[:n]])
        else:
            out[name] = expressed[highly_variable(expression[:, expressed], n)]
    return out
