"""What sections with predictions of the adapter add to its report: scores, coverage, maps with intervals, novelty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from pekasc import pl, tl
from pekasc._expression import close_genes, dense_layer
from pekasc._keys import bound_keys, novelty_key, target_key
from pekasc._measured import measured, prediction_record, was_trained_on
from pekasc._report._facts import About, share
from pekasc._report._figures import png
from pekasc._report._html import Content, Markup, element, figure, paragraphs, table
from pekasc._sections import check_spatialdata, get_table, section_labels, tiled_table
from pekasc._settings import get_logger
from pekasc._text import names, number
from pekasc.models.trust import percent

if TYPE_CHECKING:
    from pekasc.models import Adapter

logger = get_logger(__name__)

_MAPS = 3  # genes with maps
_SECTIONS = 2  # shown in each


@dataclass(frozen=True, eq=False)
class Predicted:
    """Sections with predictions.

    Parameters
    ----------
    sdata
        The object, with a table of its own, so that scores are written into no object of the caller's.
    table_name
        Name of the table.
    layer
        Layer of the predictions.
    scores
        Scores per gene and group; None where nothing was measured.
    """

    sdata: SpatialData
    table_name: str
    layer: str
    scores: pd.DataFrame | None

    @property
    def table(self) -> AnnData:
        """The table."""
        return get_table(self.sdata, self.table_name)

    @property
    def trained(self) -> np.ndarray:
        """Rows that the adapter was trained on."""
        return was_trained_on(self.table, self.layer)

    @property
    def by_gene(self) -> pd.DataFrame | None:
        """Scores by gene, mean over groups."""
        if self.scores is None:
            return None
        wanted = [name for name in ("pearson", "coverage") if name in self.scores]
        return self.scores.groupby("gene", sort=False)[wanted].mean()


def predicted(adapter: Adapter, sdata: SpatialData, *, layer: str, table_name: str, groups: str | None) -> Predicted:
    """Return sections with predictions of an adapter, and their scores where they were measured.

    Raises
    ------
    KeyError
        If there are no predictions, or a column is not there.
    TypeError
        If `sdata` is no SpatialData.
    ValueError
        If they are of another adapter.
    """
    check_spatialdata(sdata)
    table_name = tiled_table(sdata, table_name)
    table = get_table(sdata, table_name)
    key = adapter.target_key
    name = layer if key is None else target_key(layer, key)
    slot = table.layers if key is None else table.obsm
    if name not in slot:
        where = "layers" if key is None else "obsm"
        raise KeyError(
            f"No predictions found in {where}[{name!r}] of the table {table_name!r}: run "
            "`pekasc.tl.predict_expression(sdata, adapter)` first, or leave out `sdata=`."
        )
    record = prediction_record(table, name)
    known = {"encoder_digest": adapter.encoder_digest, "method": adapter.method, "groups": list(adapter.info["groups"])}
    other = [field for field, value in known.items() if field in record and _plain(record[field]) != value]
    if other:
        raise ValueError(
            f"The predictions in {name!r} are of another adapter than the one to report on: its {other[0]} is "
            f"{record[other[0]]!r:.80}, not {known[other[0]]!r:.80}. Predict again, or give that adapter."
        )
    own = SpatialData(
        images=dict(sdata.images), labels=dict(sdata.labels), shapes=dict(sdata.shapes),
        tables={table_name: _shallow(table)}, attrs=dict(sdata.attrs),
    )  # fmt: skip
    found = Predicted(own, table_name, layer, None)
    if found.trained.all() or not _measured(own[table_name], layer, key):
        return found
    how: dict[str, Any] = {"table_name": table_name} if key is None else {"table_name": table_name, "target": key}
    return Predicted(own, table_name, layer, tl.evaluate(own, layer=layer, groups=groups, **how))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) else value


def _shallow(table: AnnData) -> AnnData:
    """Return a table with the same arrays, to which columns can be added."""
    return AnnData(
        X=table.X, obs=table.obs.copy(), var=table.var.copy(), uns=dict(table.uns), obsm=dict(table.obsm),
        varm=dict(table.varm), layers={name: value for name, value in table.layers.items() if name is not None},
    )  # fmt: skip


def _measured(table: AnnData, layer: str, key: str | None) -> bool:
    """Tell whether there is anything to compare predictions with."""
    if key is not None:
        return key in table.obsm
    if table.X is None and "counts" not in table.layers:
        return False
    try:
        return bool(measured(table, layer)[1].any())
    except (KeyError, ValueError):
        return False


def sections(about: About, found: Predicted) -> Markup:
    """Return which sections these are, and how well they were predicted."""
    table_, n = found.table, found.table.n_obs
    labels = [str(label) for label in dict.fromkeys(section_labels(table_))]
    trained = int(found.trained.sum())
    texts: list[Content] = [f"{number(n, 'tile')} of {number(len(labels), 'section')}: {names(labels)}."]
    if trained:
        texts.append(
            f"The adapter was trained on {trained:,} of them. Predictions there are closer to the measurement than "
            "anywhere else, so they are not scored."
        )
    if found.scores is None:
        texts.append("There is nothing measured to compare with, so these predictions were not scored.")
        return paragraphs(*texts)
    scores = found.scores
    header = ["Group", "Tiles", "Median Pearson r", f"{about.noun.capitalize()} above 0.2"]
    covered = "coverage" in scores
    header += ["In the interval", "Ends taken in part"] if covered else []
    rows: list[list[Content]] = []
    for group, rows_of in scores.groupby("group", sort=False):
        r = rows_of["pearson"]
        row: list[Content] = [str(group), f"{int(rows_of['n_spots'].max()):,}", f"{r.median():.2f}"]
        row.append(share(float((r.dropna() > 0.2).mean())))
        row += [share(float(rows_of[name].mean())) for name in ("coverage", "coverage_randomised")] if covered else []
        rows.append(row)
    shown = table("Predicted against measured, by group of these sections", header, rows)
    made = about.adapter.calibration
    if covered and made is not None:
        texts.append(
            f"Intervals of {percent(made.level)} should hold that share of the measurements. Counts are whole numbers, "
            "so one with both ends holds a little more; with the ends taken in part it can be the level exactly."
        )
    return Markup(paragraphs(*texts).text + shown.text)


def chosen(about: About, found: Predicted, genes: Sequence[str] | None) -> list[str]:
    """Return the genes to map: those asked for, else the ones predicted best.

    Raises
    ------
    KeyError
        If one was not predicted.
    """
    table_, layer = found.table, found.layer
    ranked = [str(gene) for gene in about.adapter.gene_scores["pearson"].sort_values(ascending=False).index]
    if about.adapter.target_key is not None:
        there = set(about.adapter.genes)
    else:
        columns = table_.var_names.intersection(pd.Index(ranked))
        wanted = columns if genes is None else columns.intersection(pd.Index([str(gene) for gene in genes]))
        at = np.sort(table_.var_names.get_indexer(wanted))
        values = dense_layer(table_, layer, at)
        there = {
            str(name) for name, some in zip(table_.var_names[at], np.isfinite(values).any(axis=0), strict=True) if some
        }
    if genes is None:
        return [gene for gene in ranked if gene in there][:_MAPS]
    missing = [str(gene) for gene in genes if str(gene) not in there]
    if missing:
        close = close_genes(missing[0], np.array(ranked, dtype=object))
        raise KeyError(f"`genes`: {missing[:5]} were not predicted in these sections.{close}")
    return [str(gene) for gene in genes]


def maps(about: About, found: Predicted, genes: Sequence[str]) -> list[Markup]:
    """Return maps of genes with their intervals."""
    regions, kept = section_labels(found.table), ~found.trained
    counted = pd.Series(regions[kept if kept.any() else slice(None)]).value_counts()
    shown = [str(region) for region in counted.index[:_SECTIONS]]
    key, table_ = about.adapter.target_key, found.table
    interval = key is None and bound_keys(found.layer)[0] in table_.layers
    out = []
    for gene in genes:
        ends = interval and bool(np.isfinite(_column(table_, bound_keys(found.layer)[0], gene)).any())
        draw = partial(
            pl.expression, found.sdata, gene if key is None else f"{key}:{gene}", layer=found.layer, section=shown,
            interval=ends, table_name=found.table_name,
        )  # fmt: skip
        what = "predicted expression and the ends of its interval" if ends else "predicted expression"
        score = about.adapter.gene_scores["pearson"].get(gene, np.nan)
        known = (
            "never held out in training" if np.isnan(score) else f"Pearson r {score:.2f} on held-out training tissue"
        )
        caption: list[Content] = [element("strong", gene), f", {known}. One colour scale for all panels"]
        caption.append("; where lower and upper end differ much, the value says little." if ends else ".")
        out.append(figure(png(draw), f"Maps of {gene}: H&E, {what}, in {names(shown)}", caption, wide=True))
    return out


def _column(table_: AnnData, layer: str, gene: str) -> np.ndarray:
    return dense_layer(table_, layer, table_.var_names.get_indexer([gene]))


def novelty(found: Predicted) -> Markup | None:
    """Return the figure of how unlike the training the tiles are; None without a novelty."""
    column = novelty_key(found.layer)
    if column not in found.table.obs or not found.table.obs[column].notna().any():
        return None
    p = found.table.obs[column][~found.trained if not found.trained.all() else slice(None)].dropna()
    text = (
        f"{(p < 0.01).mean():.1%} of {len(p):,} tiles have a novelty below 0.01; of tiles like those held out in "
        "training, about 1% have. Look at the most novel ones: folds, pen, another tissue or stain are what a "
        "prediction should not be read from."
    )
    draw = partial(pl.novelty, found.sdata, layer=found.layer, table_name=found.table_name, section=_mapped(found))
    return figure(png(draw), "Maps and histogram of novelty, and tiles at both ends", text, wide=True)


def _mapped(found: Predicted) -> list[str]:
    """Return the sections with the most rows that have a novelty, up to six."""
    known = found.table.obs[novelty_key(found.layer)].notna().to_numpy()
    counted = pd.Series(section_labels(found.table)[known]).value_counts(sort=False)
    return [str(region) for region in counted.nlargest(6).index]
