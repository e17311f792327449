"""Which sections measured which genes: `panels=` of a call, or ``varm["measured"]``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from pekasc._panels import Panels
from pekasc._sections import section_labels
from pekasc._settings import get_logger
from pekasc.tl._select import is_boolean, wanted_genes

logger = get_logger(__name__)

MEASURED = "measured"


def training_panels(
    table: AnnData, rows: np.ndarray, panels: Any, names: np.ndarray, columns: np.ndarray
) -> Panels | None:
    """Return which of the training spots `rows` measured which genes; None if all measured all.

    Parameters
    ----------
    table, rows
        The table, and the rows of the training spots.
    panels
        Genes by region: names, a boolean mask, or a boolean column of var. None reads ``varm["measured"]``.
    names, columns
        Names of the genes, and their columns in the table.

    Raises
    ------
    KeyError
        If a region has no panel, or a region or gene is not there.
    TypeError
        If it is something else.
    ValueError
        If a panel is empty, or the sections share no gene.
    """
    regions, region = np.unique(section_labels(table)[rows].astype("U"), return_inverse=True)
    if panels is None:
        genes = _stored(table, regions)
        genes = None if genes is None else genes[:, columns]
    else:
        if MEASURED in table.varm:
            logger.hint('`panels=` is given: varm["%s"] is not read.', MEASURED)
        genes = _given(table, regions, panels, names, columns)
    if genes is None or genes.all():
        return None
    shared = genes.all(axis=0)
    if not shared.any():
        sizes = ", ".join(f"{name} {int(own.sum())}" for name, own in zip(regions, genes, strict=True))
        raise ValueError(
            f"No gene was measured by all training sections (genes each: {sizes}), and the totals of spots, the "
            "teacher and the components of a low-rank head are over the genes that they share. Train on sections that "
            "share genes (`train=`)."
        )
    unique, number = np.unique(genes, axis=0, return_inverse=True)
    logger.hint(
        "Sections measured different genes: %d of %d genes are in the panels of all training sections; totals are over "
        "these.", int(shared.sum()), int(genes.any(axis=0).sum()),
    )  # fmt: skip
    return Panels(np.asarray(number).ravel()[np.asarray(region).ravel()], unique)


def check_not_mixed(panels: Panels) -> None:
    """Raise for a call that compares methods on the same genes in all sections.

    Raises
    ------
    ValueError
        Always: sections measured different genes.
    """
    raise ValueError(
        f"Sections measured different genes (varm[{MEASURED!r}]): {int(panels.shared.sum())} of {panels.shared.size} "
        "are in the panels of all. This call compares methods on genes that all sections measured: give it a table of "
        "these, `table[:, table.varm['measured'].all(axis=1)]`. `pekasc.tl.fit_adapter` learns each gene from the "
        "sections that measured it."
    )


def measured_entries(table: AnnData, rows: np.ndarray, columns: np.ndarray) -> np.ndarray | None:
    """Return whether rows of a table measured some columns by ``varm["measured"]``, (rows, columns) bool.

    None without it, or if all measured all.
    """
    regions, region = np.unique(section_labels(table)[rows].astype("U"), return_inverse=True)
    genes = _stored(table, regions)
    if genes is None or genes[:, columns].all():
        return None
    return genes[:, columns][np.asarray(region).ravel()]


def _stored(table: AnnData, regions: np.ndarray) -> np.ndarray | None:
    """Return ``varm["measured"]`` for some regions, (regions, columns of the table) bool."""
    if MEASURED not in table.varm:
        return None
    frame = table.varm[MEASURED]
    what = f"varm[{MEASURED!r}]"
    if not isinstance(frame, pd.DataFrame):
        raise TypeError(
            f"{what} must be a DataFrame of genes x regions, whose columns name the regions, got "
            f"{type(frame).__name__}. Give it as one, or take `panels=` of `fit_adapter`."
        )
    _check_regions(what, "column", regions, [str(name) for name in frame.columns])
    frame = frame.set_axis([str(name) for name in frame.columns], axis=1)[list(regions)]
    if wrong := [name for name in frame if not is_boolean(frame[name])]:
        raise TypeError(
            f"{what} must be boolean, its column {wrong[0]!r} has dtype {frame[wrong[0]].dtype}"
            f"{' with missing values' if frame[wrong[0]].isna().any() else ''}: True where a region measured a gene."
        )
    return frame.to_numpy(dtype=bool).T


def _given(table: AnnData, regions: np.ndarray, panels: Any, names: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the panels of a call, (regions, genes) bool."""
    if not isinstance(panels, Mapping):
        raise TypeError(f"`panels=` must be a mapping from regions to genes, got {type(panels).__name__}.")
    known = sorted({str(name) for name in section_labels(table)})
    for unknown in sorted({str(name) for name in panels} - set(known)):
        close = difflib.get_close_matches(unknown, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise KeyError(
            f"`panels=` names the region {unknown!r}, which is not in the table. Regions: {known[:10]}.{hint}"
        )
    _check_regions("`panels=`", "panel", regions, [str(name) for name in panels])
    out = np.zeros((len(regions), len(names)), dtype=bool)
    for name, genes in panels.items():
        try:
            own = wanted_genes(table, names, genes, columns, argument=f"panels[{str(name)!r}]")
        except TypeError as error:
            raise TypeError(f"`panels[{str(name)!r}]` must be names of genes, a mask or a column of var.") from error
        out[regions == str(name), own[:, None]] = True
    return out


def _check_regions(what: str, kind: str, needed: np.ndarray, there: list[str]) -> None:
    if missing := sorted(str(name) for name in set(needed) - set(there)):
        raise KeyError(
            f"{what} has no {kind} for the region{'s' if len(missing) > 1 else ''} {missing}; it has {there[:10]}. Say "
            "for each which genes were measured: zeros do not tell."
        )
