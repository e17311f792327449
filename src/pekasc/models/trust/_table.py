"""Intervals as a table by gene, which stays with predictions in an AnnData."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from pekasc.models.trust._calibration import Calibration
from pekasc.models.trust._noise import Noise

FIELDS = ("scale", "spread", "floor", "threshold")


def interval_record(calibration: Calibration, genes: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Return what a prediction's record says of its intervals.

    Parameters
    ----------
    calibration
        The intervals of an adapter.
    genes
        Its genes that were predicted.
    names
        Their names in the table.
    """
    noise = calibration.noise.take(genes)
    values = {"scale": noise.scale, "spread": noise.spread, "floor": noise.floor}
    frame = pd.DataFrame({**values, "threshold": calibration.threshold[genes]}, index=pd.Index(names, name="gene"))
    return {
        "kind": noise.kind, "level": calibration.level, "guarantee": calibration.guarantee,
        "groups": list(calibration.groups), "source": calibration.source, "text": calibration.text, "genes": frame,
    }  # fmt: skip


def intervals_of(record: Mapping[str, Any], names: Sequence[str]) -> tuple[Noise, np.ndarray]:
    """Return noise and threshold of columns of a table; the threshold is NaN where nothing is known of a gene."""
    frame: pd.DataFrame = record["genes"]
    at = pd.Index(frame.index).get_indexer(pd.Index(names))
    found = {field: np.full(len(at), fill) for field, fill in zip(FIELDS, (1.0, 1.0, 0.0, np.nan), strict=True)}
    for field in FIELDS:
        found[field][at >= 0] = frame[field].to_numpy(dtype=np.float64)[at[at >= 0]]
    noise = Noise(str(record["kind"]), found["scale"], found["spread"], found["floor"])
    return noise, found["threshold"]
