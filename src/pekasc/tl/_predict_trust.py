"""What a calibrated adapter adds to predictions: intervals of the rate, novelty, and rows that are not predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from pekasc._keys import bound_keys, kriging_sd_key, novelty_key, trust_key
from pekasc._sections import Section
from pekasc._settings import get_logger
from pekasc._text import number
from pekasc._warnings import warn_user
from pekasc.models import Adapter
from pekasc.models.features import StoredLayer, derived_layer
from pekasc.models.trust import intervals_of, trust_levels

logger = get_logger(__name__)

_ROWS = 4096  # at once
# Of a slide at the wrong pixel size, 27 to 99 % of tiles are below 0.05, of other sections of a training patient 0 to
# 4 %, those of other patients 10 to 38 % (docs/decisions.md)
_LEVEL, _MOST, _FEWEST = 0.05, 0.3, 20


def check_abstain(adapter: Adapter, abstain: float | None) -> None:
    """Check that rows can be left out by their novelty.

    Raises
    ------
    ValueError
        If `abstain` is not between 0 and 1, or the adapter is not calibrated or knows no novelty.
    """
    if abstain is None:
        return
    if isinstance(abstain, bool | np.bool_) or not isinstance(abstain, Real) or not 0 < abstain < 1:
        raise ValueError(f"`abstain` must be above 0 and below 1, such as 0.01, got {abstain!r}.")
    if adapter.calibration is None:
        raise ValueError(
            "`abstain=` needs the novelty of tiles, which a calibrated adapter gives: "
            "`adapter = pekasc.tl.calibrate(adapter)`."
        )
    if adapter.novelty is None:
        raise ValueError(
            "`abstain=` needs the novelty of tiles, and this adapter was saved by a version that kept nothing of its "
            "training tiles: fit it again."
        )


def left_out(p_values: np.ndarray | None, abstain: float | None) -> np.ndarray | None:
    """Return the rows whose tiles are too unlike the training tiles to be predicted; None if none is asked for."""
    if abstain is None or p_values is None:
        return None
    rows = p_values < abstain  # NaN, without a tile, is not
    n = int(np.isfinite(p_values).sum())
    logger.hint(
        "%d of %d tiles are not predicted: their novelty p-value is below %g (`abstain=`).", rows.sum(), n, abstain
    )
    return np.asarray(rows)


def warn_of_novel_sections(p_values: np.ndarray | None, sections: Sequence[Section], trained: np.ndarray) -> None:
    """Warn of sections of which many tiles are unlike the training tiles, as those of a wrong pixel size are.

    Parameters
    ----------
    p_values
        Novelty of every row, (n_obs,); None where the adapter knows none.
    sections
        The sections that were predicted.
    trained
        Whether the adapter was trained on a row's tissue, (n_obs,) bool: such tiles say nothing.
    """
    if p_values is None:
        return
    found = []
    for section in sections:
        own = p_values[section.rows[~trained[section.rows]]]
        own = own[np.isfinite(own)]
        if own.size >= _FEWEST and (share := float((own < _LEVEL).mean())) > _MOST:
            found.append(f"{section.name!r} ({share:.0%})")
    if found:
        warn_user(
            f"Many tiles of {number(len(found), 'section')} are less like the training tiles than 95% of those that "
            f"were held out there: {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}. Check the pixel "
            "size, the stain and the focus of these images (`pekasc.pl.novelty` shows the tiles); another patient or "
            "tissue can do the same. Scores of held-out groups do not tell how good these predictions are."
        )


def abstained(rows: np.ndarray | None, abstain: float | None) -> dict[str, Any]:
    """Return what the record of a prediction says of rows that were left out."""
    return {} if rows is None or abstain is None else {"abstain": float(abstain), "n_abstained": int(rows.sum())}


def bounds(record: Mapping[str, Any], values: Any, names: pd.Index) -> tuple[Any, Any]:
    """Return the ends of the intervals of the rate around predictions, float32, NaN where nothing is known of a gene.

    Parameters
    ----------
    record
        What the prediction's record says of its intervals.
    values
        Predictions, rows x `names`; a dask array gives dask arrays.
    names
        Columns of the table.
    """
    noise, threshold = intervals_of(record, names)
    if not isinstance(values, np.ndarray):
        return noise.rate_bounds(values, threshold)
    low, high = np.empty_like(values), np.empty_like(values)
    for start in range(0, len(values), _ROWS):
        part = slice(start, start + _ROWS)
        low[part], high[part] = noise.rate_bounds(values[part], threshold)
    return low, high


def remove_trust(table: AnnData, key: str, before: Mapping[str, Any]) -> None:
    """Remove what an earlier prediction by a calibrated adapter wrote, by its record; the user's own stays."""
    if "measured" in before and kriging_sd_key(key) in table.layers:
        del table.layers[kriging_sd_key(key)]
    if not {"intervals", "calibrated"} & set(before):
        return
    for where, names in (
        (table.layers, bound_keys(key) if "intervals" in before else ()),
        (table.obs, (novelty_key(key),)), (table.var, (trust_key(key),)),
    ):  # fmt: skip
        for name in names:
            if name in where:
                del where[name]


def write_bounds(table: AnnData, key: str, values: Any, ends: tuple[Any, Any]) -> None:
    """Write the intervals around predictions beside them; like these, they stay in a store."""
    for name, found in zip(bound_keys(key), ends, strict=True):
        table.layers[name] = derived_layer(found, name) if isinstance(values, StoredLayer) else found


def write_levels(table: AnnData, key: str, adapter: Adapter, wanted: np.ndarray, columns: np.ndarray) -> None:
    """Write how far every gene can be trusted.

    Parameters
    ----------
    wanted, columns
        Genes of the adapter, and their columns in the table (-1: none).
    """
    there = columns >= 0
    levels = trust_levels(adapter.gene_scores.iloc[wanted[there]])
    codes = np.full(table.n_vars, -1)
    codes[columns[there]] = levels.codes
    table.var[trust_key(key)] = pd.Categorical.from_codes(codes, categories=levels.categories, ordered=True)
