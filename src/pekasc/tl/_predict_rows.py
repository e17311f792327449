"""From features to predictions: whole sections in memory, or parts of the rows into a store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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
    adapter: Adapter, features: SectionFeatures, number: int, weights: Any, index: np.ndarray
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


@dataclass(frozen=True, eq=False)
class LayerSpec:
    """What a layer of predictions holds.

    Parameters
    ----------
    shape
        Rows and columns of the layer.
    wanted, columns
        Genes of the adapter, and their columns in the layer (-1: none).
    grid
        Whether the rows are tiles of a grid, see :meth:`pekasc.Adapter.context_weights`.
    """

    shape: tuple[int, int]
    wanted: np.ndarray
    columns: np.ndarray
    grid: bool


def layer_parts(
    adapter: Adapter, features: SectionFeatures, sections: Sequence[Section], layer: LayerSpec, parts: Iterable[slice]
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield parts of the rows of a layer with their predictions, float32; NaN where nothing is predicted."""
    there = layer.columns >= 0
    contexts: dict[int, Any] = {}
    for part in parts:
        values = np.full((part.stop - part.start, layer.shape[1]), np.nan, dtype=np.float32)
        for i, section in enumerate(sections):
            index = np.flatnonzero((section.rows >= part.start) & (section.rows < part.stop))
            if not index.size:
                continue
            if i not in contexts:  # of one section at a time; neighbours never cross sections
                one = np.zeros(section.rows.size)
                contexts = {i: adapter.context_weights(section.centres_um, one, grid=layer.grid)}
            predicted = predict_rows(adapter, features, i, contexts[i], index)
            values[np.ix_(section.rows[index] - part.start, layer.columns[there])] = predicted[:, layer.wanted[there]]
        yield part, values


def store_predictions(
    adapter: Adapter, features: SectionFeatures, sections: Sequence[Section], layer: LayerSpec, path: Path, *,
    dtype: str, progress: bool,
) -> PredictionStore:  # fmt: skip
    """Predict all rows of a layer into a store, in parts; those that are there already are left as they are."""
    facts = {
        "genes": [adapter.genes[i] for i in layer.wanted], "columns": layer.columns.tolist(),
        "shape": list(layer.shape), "grid": layer.grid, "context_um": adapter.context_um,
        "offsets": adapter.info.get("context_offsets_um", []), "dtype": dtype,
    }  # fmt: skip
    rows = [section.rows for section in sections]
    digest = sha256(repr(facts), *features.digests, *array_parts(adapter.head), *rows)
    info = {"adapter": adapter.method, "encoder": adapter.encoder.short, "target": adapter.info["target"]}
    store = PredictionStore(path, digest, layer.shape, info, dtype)
    with locked(path, [store.name]):
        store.sweep()
        missing = store.missing()
        bar = tqdm(missing, desc="predict", unit="part", disable=not progress or len(missing) < 2)
        for part, values in layer_parts(adapter, features, sections, layer, bar):
            store.write(part, values)
    return store
