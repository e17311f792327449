"""Get tiles and results in the formats of other tools: xarray, AnnData, pandas."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import xarray as xr
from anndata import AnnData
from spatialdata import SpatialData

from pekasc._expression import dense_layer, named_columns
from pekasc._intervals import interval
from pekasc._keys import PEKA, SECTION, TILES, UNS, records, trust_key
from pekasc._layers import missing_layer
from pekasc._measured import as_stored
from pekasc._sections import (
    annotate_alike,
    get_table,
    positions_um,
    section_labels,
    section_readers,
    tiled_sections,
    tiled_table,
    with_stain,
)
from pekasc._settings import get_logger
from pekasc._warnings import warn_user
from pekasc.tiling import StainMap, TileStream

if TYPE_CHECKING:
    from pekasc.models import Adapter

__all__ = ["comparison", "expression", "interval", "stain_maps", "tiles"]

logger = get_logger(__name__)

_SETTINGS = ("head", "teacher", "fields_um", "orientations")
_MIN_GROUPS = 5  # a bootstrap interval over fewer is not meaningful
_BLOCK = 64  # tiles per dask block: about 10 MB at 224 px


def tiles(
    sdata: SpatialData, *, field_um: float | None = None, table_name: str = "table", key: str = TILES
) -> xr.DataArray:
    """Get the pixels of all tiles as a lazy array, in the order of the table's rows.

    Parameters
    ----------
    sdata
        Sections that :func:`pekasc.pp.tile` has tiled.
    field_um
        Width in um of a wider field of view around the same centres, at the same `tile_px`, as ``fields_um`` of
        :class:`pekasc.Readout`. None is the tiles themselves.
    table_name
        Name of the table.
    key
        Name of the tiles.

    Returns
    -------
    A (tile, y, x, c) array of uint8, backed by dask, which reads pixels on compute. Coordinates: `tile` are the obs
    names (rows without a tile are left out), `c` is r, g, b. Attributes: `tile_px`, and `mpp` in um per pixel.

    Raises
    ------
    KeyError
        If the table was not tiled.
    ValueError
        If an image, a transformation or a pixel size has changed since.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=1, size_um=600)
    >>> pk.pp.tile(sdata, tile_px=112, mpp=1.0)
    >>> pk.get.tiles(sdata)[0].compute().dtype
    dtype('uint8')
    """
    import dask.array as da
    from dask import delayed

    table_name = tiled_table(sdata, table_name)
    sections, spec = tiled_sections(sdata, table_name=table_name, key=key)
    spec = spec if field_um is None else spec.scaled(field_um / spec.side_um)
    stream = TileStream(section_readers(sections, spec, further=field_um is not None))
    rows = np.concatenate([section.rows for section in sections])
    order = np.argsort(rows, kind="stable")
    shape = (spec.tile_px, spec.tile_px, 3)
    blocks = []
    for start in range(0, order.size, _BLOCK):
        index = order[start : start + _BLOCK]
        block = delayed(stream.read, pure=False, traverse=False)(index)
        blocks.append(da.from_delayed(block, shape=(index.size, *shape), dtype=np.uint8))
    names = get_table(sdata, table_name).obs_names.to_numpy()[rows[order]]
    return xr.DataArray(
        da.concatenate(blocks),
        dims=("tile", "y", "x", "c"),
        coords={"tile": names, "c": ["r", "g", "b"]},
        attrs={"mpp": spec.mpp, "tile_px": spec.tile_px},
        name=key,
    )


def stain_maps(
    sdata: SpatialData, adapter: Adapter, *, table_name: str = "table", key: str = TILES
) -> dict[str, StainMap]:
    """Get the map that brings the colours of each section to those that an adapter was trained on.

    Calls on a SpatialData make these maps by themselves. They are for :meth:`pekasc.models.Adapter.predict` on arrays,
    and to look at tiles as the encoder gets them: a map is called with tiles.

    Parameters
    ----------
    sdata
        Sections that :func:`pekasc.pp.tile` has tiled; colours are measured on the tissue under their tiles.
    adapter
        An adapter that was fitted with ``readout={"stain": ...}``.
    table_name
        Name of the table.
    key
        Name of the tiles.

    Returns
    -------
    A :class:`pekasc.models.StainMap` by region.

    Raises
    ------
    KeyError
        If the table was not tiled.
    ValueError
        If the adapter has no stain map, or a section has too little tissue, or none that looks like H&E.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=2, size_um=700)
    >>> pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    >>> readout = pk.Readout(stain="reinhard")
    >>> adapter = pk.tl.fit_adapter(sdata, method=None, readout=readout, progress=False)
    >>> maps = pk.get.stain_maps(sdata, adapter)
    >>> maps["P1S1_spots"](pk.get.tiles(sdata)[0].to_numpy()).shape
    (56, 56, 3)
    """
    from pekasc.models import Adapter

    if not isinstance(adapter, Adapter):
        raise TypeError(f"`adapter` must be a pekasc.Adapter, got {type(adapter).__name__}.")
    if adapter.stain is None:
        raise ValueError("This adapter takes tiles as they are: it was fitted without `stain` (see `pekasc.Readout`).")
    table_name = tiled_table(sdata, table_name)
    sections, spec = tiled_sections(sdata, table_name=table_name, key=key)
    adapter.check_tiles(spec.tile_px, spec.mpp)
    stained = with_stain(sections, spec, adapter.stain)
    return {section.name: section.stain for section in stained if section.stain is not None}


def expression(
    data: SpatialData | AnnData,
    layer: str | None = PEKA,
    *,
    genes: Sequence[str] | None = None,
    min_trust: Literal["low", "medium", "high"] | None = None,
    table_name: str = "table",
    key: str = TILES,
) -> AnnData:
    """Get the genes and observations that a layer has values for as an AnnData, ready for scanpy and squidpy.

    Parameters
    ----------
    data
        A SpatialData or an AnnData with ``layers[layer]``.
    layer
        Layer to return as `X`; None is `X`.
    genes
        Genes to return; of predictions in a store, only these are read. By default all that have values.
    min_trust
        Of predictions of a calibrated adapter: return only genes whose level of trust, ``var["{layer}_trust"]``, is at
        least this. See :func:`pekasc.tl.predict_expression`.
    table_name
        Name of the table in a SpatialData.
    key
        Name of the tiles, from which positions in um are taken.

    Returns
    -------
    A new AnnData: `X` is the layer, dense float32, without genes and rows that are all NaN. `obs`, `var` and `obsm` are
    copied. ``obs["section"]`` is categorical: the column of that name if it has one value per region, else the region;
    if the table has another column of that name, that one stays, and the region is ``obs["peka_section"]``.
    ``obsm["spatial"]`` is in um, within each section, y downwards as in the image; that of an AnnData is unchanged.
    ``uns["log1p"]`` is set unless the values are integers (counts), or predictions of values as stored
    (``target="as_is"``).

    ``squidpy.pl.spatial_scatter(adata, color=gene, shape=None, library_key="section")`` draws it, a panel per section.
    It annotates the shapes that the table annotates: for spatialdata-plot, put it into the object,
    ``sdata.tables["predicted"] = adata``.

    Raises
    ------
    KeyError
        If there is no such layer or gene, or an AnnData has no ``obsm["spatial"]``.
    ValueError
        If the layer holds nothing but NaN, `genes` is empty, or `min_trust` is no level, none is known, or no gene
        reaches it.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=1, size_um=600)
    >>> adata = pk.get.expression(sdata, layer="truth")
    >>> list(adata.obs["section"].cat.categories)
    ['P1S1']
    """
    table_name = tiled_table(data, table_name)
    table = get_table(data, table_name)
    if layer is not None and layer not in table.layers:
        raise missing_layer(table, layer, table_name)
    columns = np.arange(table.n_vars) if genes is None else named_columns(table, genes)
    if min_trust is not None:
        columns = columns[_trusted(table, layer, min_trust)[columns]]
    values = dense_layer(table, layer, None if genes is None and min_trust is None else columns)
    known = ~np.isnan(values).all(axis=0)
    rows = ~np.isnan(values).all(axis=1)
    if not known.any():
        what = "" if genes is None else f" of {list(table.var_names[columns[:3]])}"
        raise ValueError(f"The layer {layer!r} holds no values{what}: all are NaN.")
    spatial = positions_um(data, table_name=table_name, key=key)
    if not rows.all():
        logger.hint("%d of %d rows left out: the layer %r has no values for them.", (~rows).sum(), rows.size, layer)
    labels = _section_names(table)[rows]
    values = values[np.ix_(rows, known)]
    missing = np.isnan(values).any(axis=0).sum()
    if missing:
        warn_user(
            f"{missing} of {values.shape[1]} genes of the layer {layer!r} have no values in some rows (NaN): it holds "
            "predictions of several adapters. Take the sections or genes that belong together before going on."
        )
    obs = table.obs.loc[rows].copy()
    # a user's own column of that name stays
    own = SECTION in obs and not np.array_equal(obs[SECTION].astype(str).to_numpy(dtype=object), labels)
    obs[f"{PEKA}_{SECTION}" if own else SECTION] = pd.Categorical(labels)
    for name in obs.select_dtypes("category"):
        obs[name] = obs[name].cat.remove_unused_categories()
    result = AnnData(X=values, obs=obs, var=table.var.iloc[columns[known]].copy())
    for name, value in table.obsm.items():
        frame = isinstance(value, pd.DataFrame)
        result.obsm[name] = value.loc[rows].set_axis(result.obs_names) if frame else value[rows].copy()
    result.obsm["spatial"] = spatial[rows]
    annotate_alike(result, table)
    if UNS in table.uns:
        result.uns[UNS] = dict(records(table))
    finite = values[np.isfinite(values)]
    if not np.array_equal(finite, np.round(finite)) and not (layer is not None and as_stored(table, layer)):
        result.uns["log1p"] = {"base": None}  # as scanpy.pp.log1p writes it
    return result


def _trusted(table: AnnData, layer: str | None, least: str) -> np.ndarray:
    """Return which columns of a table have at least a level of trust, (n_vars,) bool."""
    from pekasc.models.trust import LEVELS

    name = trust_key(str(layer))
    if name not in table.var:
        raise ValueError(
            f"`min_trust={least!r}` needs `var[{name!r}]`, which predictions of a calibrated adapter have: "
            "`adapter = pekasc.tl.calibrate(adapter)`, and predict again."
        )
    if least not in LEVELS:
        raise ValueError(f"`min_trust` must be one of {list(LEVELS)}, got {least!r}.")
    levels = table.var[name].astype(str).map({level: i for i, level in enumerate(LEVELS)})
    trusted = (levels >= LEVELS.index(least)).to_numpy()
    if not trusted.any():
        found = table.var[name].value_counts().to_dict()
        raise ValueError(f"No gene has a level of trust of {least!r} or more: {found}. Take a lower `min_trust=`.")
    return np.asarray(trusted)


def _section_names(table: AnnData) -> np.ndarray:
    regions = section_labels(table)
    if SECTION not in table.obs or table.obs[SECTION].isna().any():
        return regions
    named = table.obs[SECTION].astype(str).to_numpy(dtype=object)
    pairs = set(zip(regions, named, strict=True))
    one_to_one = len(pairs) == len(set(regions)) == len(set(named))
    return named if one_to_one else regions


def comparison(frame: pd.DataFrame, *, rival: str = "frozen-best", n_bootstrap: int = 10_000) -> pd.DataFrame:
    """Summarise a result of :func:`pekasc.tl.cross_validate`: one row per method, with its difference to a rival.

    Scores within sections are averaged over the sections of a fold and over seeds, so that every fold has the same
    weight.

    Parameters
    ----------
    frame
        Result of `cross_validate`, or several results concatenated.
    rival
        Method to compare with, for the same encoder, readout and genes.
    n_bootstrap
        Number of bootstrap samples for the interval.

    Returns
    -------
    Indexed by encoder, ``context_um`` (of the readout: a radius as text, empty without context, or ``"auto"``), genes
    and method, with the level ``readout`` after ``context_um`` if the readouts differ in more than that. Columns:
    ``n_folds``; ``pearson``, the mean over folds; ``difference`` to the rival; ``n_better``, the number of folds in
    which it is above 0; ``difference_low`` and ``difference_high``, a 95 % bootstrap interval over folds, NaN with
    fewer than five folds, or if a fold has spots of one group in training and in test; then ``pearson`` and
    ``difference`` of each fold as ``"{fold} pearson"`` and ``"{fold} difference"``.

    Raises
    ------
    ValueError
        If `frame` is no comparison, has duplicate rows (of two teachers, or two calls), or lacks the rival.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=2, size_um=700)
    >>> pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    >>> frame = pk.tl.cross_validate(sdata, methods=["mean", "frozen"], genes="svg", n_genes=20, progress=False)
    >>> float(pk.get.comparison(frame, rival="mean").loc[("tiny", "auto", "svg", "mean"), "pearson"])
    0.0
    """
    by = ["encoder", "context_um", "genes", "method"]
    missing = [c for c in (*by, "readout", "fold", "section", "seed", "whole_groups", "pearson") if c not in frame]
    if missing or "gene" in frame:
        raise ValueError(
            f"`frame` is no comparison of methods: columns {missing or 'of single genes'}. Give what "
            "`pekasc.tl.cross_validate` returns without `per_gene=True`."
        )
    if rival not in set(frame["method"]):
        raise ValueError(f"`rival={rival!r}` is not among the methods compared: {sorted(set(frame['method']))}.")
    # by the setting, since "auto" may use other radii in every fold
    frame = frame.assign(context_um=[_context(readout) for readout in frame["readout"]])
    if len({_without_context(readout) for readout in frame["readout"].unique()}) > 1:
        by.insert(2, "readout")
    twice = frame.duplicated([*by, "fold", "section", "seed"])
    if twice.any():
        found = {column: sorted(set(frame[column])) for column in _SETTINGS if column in frame}
        raise ValueError(
            f"`frame` holds {int(twice.sum())} rows of one method, fold and seed twice (settings: {found}): sum up "
            "frames of other settings one by one."
        )
    # HEST-Bench pools the spots of a fold
    pooled = frame["section"] == "pooled"
    sections = frame[np.where(frame["genes"] == "hest", pooled, ~pooled)]
    scores = sections.groupby([*by, "fold"], sort=False)["pearson"].mean().unstack("fold")
    own = scores.xs(rival, level="method")
    difference = scores - own.reindex(scores.index.droplevel("method")).to_numpy()
    difference[scores.index.get_level_values("method") == rival] = np.nan
    generator = np.random.default_rng(0)
    rows = []
    for values, deltas in zip(scores.to_numpy(), difference.to_numpy(), strict=True):
        known = deltas[np.isfinite(deltas)]
        low = high = np.nan
        if known.size >= _MIN_GROUPS and frame["whole_groups"].all():
            draws = known[generator.integers(known.size, size=(n_bootstrap, known.size))].mean(axis=1)
            low, high = np.quantile(draws, [0.025, 0.975])
        rows.append(
            {
                "n_folds": int(np.isfinite(values).sum()),
                "pearson": np.nanmean(values) if np.isfinite(values).any() else np.nan,
                "difference": known.mean() if known.size else np.nan,
                "n_better": int((known > 0).sum()),
                "difference_low": low,
                "difference_high": high,
            }
        )
    out = pd.DataFrame(rows, index=scores.index)
    for fold in scores:
        out[f"{fold} pearson"], out[f"{fold} difference"] = scores[fold], difference[fold]
    return out


def _context(readout: str) -> str:
    """Return the spatial context of a readout, as a frame has it: a radius in um, empty for none, or ``"auto"``."""
    found = re.search(r"context_um=([^,)]+)", readout)
    return "auto" if found is None else "" if found[1] == "None" else f"{float(found[1]):g}"


def _without_context(readout: str) -> str:
    """Return a readout, as a frame has it, without its context, which has a column of its own."""
    return re.sub(r"(, )?context_um=[^,)]+", "", readout).replace("(, ", "(")
