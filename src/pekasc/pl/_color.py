"""What `color=` names: values of tiles with limits and colours, of a gene, or of a numeric or categorical column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib import rcParams
from matplotlib.colors import Colormap, ListedColormap, Normalize
from scipy import sparse

from pekasc._expression import TARGETS, close_genes
from pekasc._layers import missing_layer
from pekasc._measured import prediction_record, was_trained_on
from pekasc._obsm import predicted_column, target_column
from pekasc._settings import get_logger
from pekasc.pl._draw import robust_limits
from pekasc.pl._expression import UNIT, not_predicted

if TYPE_CHECKING:
    from anndata import AnnData

logger = get_logger(__name__)

_UNITS: dict[Any, str] = {TARGETS["log1p"]: UNIT, TARGETS["as_is"]: "expression, as stored"}
_MAX_CATEGORIES = 102  # as many as scanpy has colours for


@dataclass(frozen=True, eq=False)
class Map:
    """What one panel shows: a value for each tile, or the code of its category."""

    title: str
    values: np.ndarray
    norm: Normalize
    cmap: Colormap
    unit: str = ""
    italic: bool = False
    legend: Sequence[tuple[str, Any]] | None = None


def color_names(color: Any) -> list[str]:
    """Return the names as a list, empty for None."""
    names = [] if color is None else [color] if isinstance(color, str) else color
    if not isinstance(names, Sequence | np.ndarray | pd.Index) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"`color` must be the name of a gene or of a column of `obs`, or a list of them, got {color!r}."
        )
    if color is not None and not len(names):
        raise ValueError("`color` is an empty list: name at least one gene or column, or leave it out.")
    return list(names)


def color_maps(
    table: AnnData,
    names: list[str],
    rows: np.ndarray,
    *,
    layer: str,
    table_name: str,
    cmap: Colormap,
    limits: tuple[float | None, float | None],
) -> list[Map]:
    """Return what to draw of `rows` for each name: a column of ``obs`` or, if there is none, a gene of the layer.

    A name ``"key:column"`` is a column of a predicted target.

    Raises
    ------
    KeyError
        If the layer, or a gene or column, is not there.
    ValueError
        If there are no values, or too many categories.
    """
    found = {name: target_column(table, layer, name) for name in names if name not in table.obs}
    targets = {name: predicted_column(table, layer, *at)[rows] for name, at in found.items() if at is not None}
    genes = [name for name, at in found.items() if at is None]
    for name in genes:
        _check_gene(table, name, table_name)
    shadowed = [name for name in names if name in table.obs and name in table.var_names]
    if shadowed:
        logger.hint("%s: columns of `obs` are drawn, not the genes of that name, as scanpy does.", ", ".join(shadowed))
    predicted = _genes(table, genes, rows, layer, table_name) if genes else {}
    trained = bool(was_trained_on(table, layer)[rows].any())
    unit = _UNITS.get(prediction_record(table, layer).get("target"), layer)

    def numeric(name: str, values: np.ndarray, **about: Any) -> Map:
        return Map(name, values, Normalize(*robust_limits(values, vmin=limits[0], vmax=limits[1])), cmap, **about)

    maps = []
    for name in names:
        if name in predicted:
            title = f"{name} (trained on)" if trained else name
            maps.append(numeric(title, predicted[name], unit=unit, italic=True))
            continue
        if name in targets:
            if not np.isfinite(targets[name]).any():
                raise ValueError(f"Column {name!r} was not predicted in these rows: all values are NaN.")
            maps.append(
                numeric(f"{name} (trained on)" if trained else name, targets[name], unit=name.partition(":")[0])
            )
            continue
        column = table.obs[name].iloc[rows]
        if column.isna().all():
            raise ValueError(f"`obs[{name!r}]` has no values in these rows: all are NaN. Name another column.")
        if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
            maps.append(numeric(name, column.to_numpy(dtype=np.float64, na_value=np.nan)))
        else:
            maps.append(_categories(table, name, rows))
    return maps


def _check_gene(table: AnnData, name: str, table_name: str) -> None:
    if name in table.var_names:
        return
    known = np.r_[table.obs.columns.to_numpy(dtype=object), table.var_names.to_numpy(dtype=object)]
    genes = f"one of its {table.n_vars} genes" if table.n_vars else "a gene: it has none until " + _predict(table_name)
    raise KeyError(
        f"{name!r} is neither a column of `obs` of the table {table_name!r} ({list(table.obs)}) nor {genes}."
        f"{close_genes(name, known)}"
    )


def _predict(table_name: str) -> str:
    return f"`pk.tl.predict_expression(sdata, adapter, table_name={table_name!r})`"


def _genes(table: AnnData, genes: list[str], rows: np.ndarray, layer: str, table_name: str) -> dict[str, np.ndarray]:
    if layer not in table.layers:
        raise missing_layer(table, layer, table_name)
    columns = np.unique(table.var_names.get_indexer(genes))
    part = table.layers[layer][:, columns]  # all genes at once, and only they, of a layer that lies in a store
    part = part.compute() if hasattr(part, "compute") else part
    values = np.asarray(part.toarray() if sparse.issparse(part) else part, dtype=np.float64)[rows]
    out = {str(name): values[:, i] for i, name in enumerate(table.var_names[columns])}
    for gene in genes:
        if not np.isfinite(out[gene]).any():
            raise not_predicted(gene, layer)
    return out


def _categories(table: AnnData, name: str, rows: np.ndarray) -> Map:
    """Return the codes of the categories, with scanpy's colours and a legend of those that have tiles."""
    column = table.obs[name]
    if not isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(str).where(column.notna()).astype("category")
    categories = [str(category) for category in column.cat.categories]
    if len(categories) > _MAX_CATEGORIES:
        raise ValueError(
            f"`obs[{name!r}]` has {len(categories)} categories, and no more than {_MAX_CATEGORIES} have a colour of "
            "their own. Join some, or give numbers."
        )
    codes = column.cat.codes.to_numpy()[rows]
    colours = _category_colours(table, name, len(categories))
    legend = [(categories[i], colours[i]) for i in np.unique(codes[codes >= 0])]
    norm = Normalize(-0.5, len(categories) - 0.5)
    return Map(name, np.where(codes < 0, np.nan, codes), norm, ListedColormap(colours), legend=legend)


def _category_colours(table: AnnData, name: str, n: int) -> list[Any]:
    stored = table.uns.get(f"{name}_colors")
    if stored is not None and len(stored) >= n:  # fewer are left from other categories
        return list(stored)[:n]
    # what scanpy chooses, so that a UMAP and a slide have the same colours
    cycle = rcParams["axes.prop_cycle"].by_key().get("color", [])
    if len(cycle) >= n:
        return list(cycle[:n])
    from scanpy.plotting.palettes import default_20, default_28, default_102

    return list(next(palette for palette in (default_20, default_28, default_102) if len(palette) >= n)[:n])
