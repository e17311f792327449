"""`pl.trust`: genes ranked by their scores on held-out sections, with the range over sections and their trust level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from pekasc._expression import close_genes
from pekasc.pl._draw import DARK, GREY, SMALL, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pekasc.models import Adapter

# colour and form, so that levels are told apart without colours
_STYLES = {"high": ("#1b7a5a", "o"), "medium": ("#c77f12", "D"), "low": (GREY, "s")}
_ROW_INCHES = 0.165


def trust(
    adapter: Adapter,
    genes: Sequence[str] | None = None,
    *,
    n: int = 30,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
) -> Axes:
    """Plot how far the predictions of each gene can be trusted: its scores on held-out sections, and their range.

    Parameters
    ----------
    adapter
        An adapter from :func:`pekasc.tl.fit_adapter`.
    genes
        Genes to show, best first; None is the `n` best.
    n
        Number of genes without `genes`.
    ax
        Axes to draw on; None creates a figure.
    figsize
        Width and height of the new figure in inches; by default as high as the genes need.

    Returns
    -------
    The Axes: a row for each gene, with the mean Pearson correlation over held-out sections of the training data, a line
    from the lowest to the highest of them, and the trust level by colour and form. High: 0.4 or more, above 0.2 in
    each of two or more; medium: 0.2 or more, above 0 in every section; low: the others. The legend counts all genes of
    the adapter.

    Raises
    ------
    KeyError
        If the adapter does not predict a gene.
    TypeError
        If `adapter` is no adapter.
    ValueError
        If no gene has a score, `genes` is empty, or `n` is not positive.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=3, size_um=700)
    >>> pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    >>> adapter = pk.tl.fit_adapter(sdata, method=None, progress=False)
    >>> ax = pk.pl.trust(adapter, n=20)
    """
    from pekasc.models.trust import LEVELS, RULES, trust_levels

    scores = getattr(adapter, "gene_scores", None)
    if not isinstance(scores, pd.DataFrame):
        raise TypeError(f"Expected an Adapter, got {type(adapter).__name__}.")
    if isinstance(n, bool) or n < 1:
        raise ValueError(f"`n` must be a positive integer, got {n!r}.")
    if scores["pearson"].isna().all():
        raise ValueError("No gene has a score: no group was held out (see `groups=` of `pekasc.tl.fit_adapter`).")
    scores = scores.assign(level=np.asarray(trust_levels(scores), dtype=object))
    counted = scores["level"].value_counts()
    shown = _shown(scores, genes, n)
    if ax is None:
        _, ax = plt.subplots(figsize=figsize or (5.0, _ROW_INCHES * len(shown) + 1.1), layout="constrained")
    y = np.arange(len(shown))
    for bound in (0.0, *(mean for mean, _ in RULES.values())):  # what the levels ask of the mean
        ax.axvline(bound, color=GREY, linewidth=0.8, linestyle="-" if bound == 0 else (0, (1, 2)), zorder=1)
    for level in reversed(LEVELS):
        color, marker = _STYLES[level]
        own = (shown["level"] == level).to_numpy()
        if "lowest" in shown:  # missing in adapters saved by an earlier version
            ax.hlines(y[own], shown["lowest"][own], shown["highest"][own], color=color, linewidth=1.2, zorder=2)
        n_genes = counted.get(level, 0)
        label = f"{level} ({n_genes} gene{'' if n_genes == 1 else 's'})"
        ax.plot(shown["pearson"][own], y[own], marker, color=color, markersize=4, zorder=3, label=label)
    for at in np.flatnonzero(shown["pearson"].isna()):
        ax.text(0.01, float(at), "never held out", fontsize=SMALL, color=GREY, va="center")
    ax.set_yticks(y, [str(gene) for gene in shown.index], fontsize=SMALL, style="italic", color=DARK)
    for name in ax.get_yticklabels():
        name.set_parse_math(False)  # names are no formulas
    ax.set_ylim(len(shown) - 0.4, -0.6)
    spread = ": mean, lowest and highest" if "lowest" in shown else ""
    held_out = "sections" if len(adapter.info["groups"]) > 1 else "blocks of the one training group"
    ax.set_xlabel(f"Pearson r on held-out {held_out}{spread}", fontsize=SMALL + 1)
    ax.legend(
        loc="lower right", bbox_to_anchor=(1.02, 1), ncols=3, fontsize=SMALL, frameon=False, borderpad=0,
        handletextpad=0.2, columnspacing=1.0,
    )  # fmt: skip
    tidy(ax)
    ax.tick_params(axis="y", length=0)
    return ax


def _shown(scores: pd.DataFrame, genes: Any, n: int) -> pd.DataFrame:
    """Return the scores of the genes to show, best first."""
    ranked = scores.sort_values("pearson", ascending=False, kind="stable", na_position="last")
    if genes is None:
        return ranked[ranked["pearson"].notna()].head(n)
    wanted = [genes] if isinstance(genes, str) else [str(gene) for gene in genes]
    if not wanted:
        raise ValueError("`genes` is an empty list: name at least one, or leave it out.")
    unknown = [gene for gene in wanted if gene not in scores.index]
    if unknown:
        raise KeyError(
            f"The adapter does not predict {unknown[:5]}.{close_genes(unknown[0], scores.index.to_numpy(dtype=object))}"
        )
    return ranked.loc[ranked.index.isin(wanted)]
