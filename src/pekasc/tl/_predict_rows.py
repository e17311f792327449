"""From features to predictions: whole sections in memory, or parts of the rows into a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from pekasc._digests import sha256
from pekasc._sections import Section
from pekasc._settings import get_logger
from pekasc.models import Adapter
from pekasc.models.features import PredictionStore, locked
from pekasc.models.runtime import array_parts
from pekasc.tl._section_features import SectionFeatures

logger = get_logger(__name__)

_TILES = 512  # predicted at once


def predict_rows(
    adapter: Adapter, features: SectionFeatures, number: int, section: Section, weights: Any, index: np.ndarray
) -> np.ndarray:
    """Predict some tiles of a section, (k, genes of the adapter) float32.

    Only the features of these tiles and of their context are read.

    Parameters
    ----------
    weights
        The context of every tile of the section, see :meth:`pekasc.Adapter.context_weights`.
    index
        Indices of the tiles.
    """
    out = np.empty((len(index), len(adapter.genes)), dtype=np.float32)
    for start in range(0, len(index), _TILES):
        part = index[start : start + _TILES]
        own = features.rows(number, part)
        if weights is not None:
            around = weights[part]
            near, columns = np.unique(around.indices, return_inverse=True)
            around = type(around)((around.data, columns, around.indptr), shape=(len(part), near.size))
            context = around @ features.rows(number, near)
            own = np.concatenate([own, context.astype(np.float32)], axis=1)
        out[start : start + _TILES] = adapter.head.predict(own)
    return out


def context_of(adapter: Adapter, section: Section, grid: bool) -> Any:
    """Return the context of every tile of a section; neighbours never cross sections."""
    return adapter.context_weights(section.centres_um, np.zeros(section.rows.size), grid=grid)


def store_predictions(
    adapter: Adapter,
    features: SectionFeatures,
    sections: Sequence[Section],
    path: Path,
    *,
    shape: tuple[int, int],
    wanted: np.ndarray,
    columns: np.ndarray,
    grid: bool,
    dtype: str,
    progress: bool,
) -> PredictionStore:
    """Predict all rows into a store, in parts; those that are there already are left as they are.

    Parameters
    ----------
    shape
        Rows and columns of the layer.
    wanted, columns
        Genes of the adapter, and their columns in the layer (-1: none).
    """
    facts = {
        "genes": [adapter.genes[i] for i in wanted], "columns": columns.tolist(), "shape": list(shape), "grid": grid,
        "context_um": adapter.context_um, "offsets": adapter.info.get("context_offsets_um", []), "dtype": dtype,
    }  # fmt: skip
    rows = [section.rows for section in sections]
    digest = sha256(repr(facts), *features.digests, *array_parts(adapter.head), *rows)
    info = {"adapter": adapter.method, "encoder": adapter.encoder.short, "target": adapter.info["target"]}
    store = PredictionStore(path, digest, shape, info, dtype)
    there = columns >= 0
    with locked(path, [store.name]):
        store.sweep()
        missing = store.missing()
        contexts: dict[int, Any] = {}
        for part in tqdm(missing, desc="predict", unit="part", disable=not progress or len(missing) < 2):
            values = np.full((part.stop - part.start, shape[1]), np.nan, dtype=np.float32)
            for i, section in enumerate(sections):
                index = np.flatnonzero((section.rows >= part.start) & (section.rows < part.stop))
                if not index.size:
                    continue
                if i not in contexts:
                    contexts = {i: context_of(adapter, section, grid)}  # of one section at a time
                predicted = predict_rows(adapter, features, i, section, contexts[i], index)
                values[np.ix_(section.rows[index] - part.start, columns[there])] = predicted[:, wanted[there]]
            store.write(part, values)
    return store
