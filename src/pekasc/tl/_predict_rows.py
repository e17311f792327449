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
from pekasc.models.heads import Reading
from pekasc.models.runtime import array_parts
from pekasc.tl._section_features import SectionFeatures

logger = get_logger(__name__)

_TILES = 512  # predicted at once


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of all tiles for a reading, and what comes before them.

    Parameters
    ----------
    features
        What :class:`pekasc.models.features.ReadingEncoder` made of every field of view: the adapted features, and
        scores as a tile and, with spatial context, as a neighbour.
    reading
        The reading.
    """

    features: SectionFeatures
    reading: Reading

    @property
    def n_adapted(self) -> int:
        """Number of adapted features, which come first."""
        return self.features.widths[0] - self._n_of_field

    @property
    def _n_of_field(self) -> int:
        return self.reading.n_scores * (1 if self.reading.context_um is None else 2)

    def rows(self, number: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the scores of some tiles of a section, as tiles and as neighbours, summed over fields of view."""
        values = self.features.rows(number, index)[:, self.n_adapted :]
        values = values.reshape(len(index), -1, self._n_of_field).sum(axis=1)
        k = self.reading.n_scores
        return values[:, :k], values[:, k:]


@dataclass(frozen=True)
class Neighbours:
    """Neighbours of every tile of a section, see :meth:`pekasc.Adapter.context_weights`; None without them.

    Parameters
    ----------
    context
        Whose features the heads also get.
    smooth
        Over which predictions are smoothed.
    """

    context: Any
    smooth: Any


def _near(weights: Any, part: np.ndarray) -> tuple[Any, np.ndarray]:
    """Return the rows of a matrix over tiles, and the tiles that they average, which are its columns then."""
    around = weights[part]
    near, columns = np.unique(around.indices, return_inverse=True)
    return type(around)((around.data, columns, around.indptr), shape=(len(part), near.size)), near


def _with_context(scores: Scores, number: int, context: Any, part: np.ndarray) -> np.ndarray:
    own, _ = scores.rows(number, part)
    if context is None:
        return own
    around, near = _near(context, part)
    return own + (around @ scores.rows(number, near)[1]).astype(np.float32)


def predict_rows(scores: Scores, number: int, neighbours: Neighbours, index: np.ndarray) -> np.ndarray:
    """Predict some tiles of a section, (k, genes of the adapter) float32.

    Only the scores of these tiles and of their neighbours are read.

    Parameters
    ----------
    neighbours
        Of every tile of the section.
    index
        Indices of the tiles.
    """
    out = np.empty((len(index), scores.reading.n_genes), dtype=np.float32)
    for start in range(0, len(index), _TILES):
        part = index[start : start + _TILES]
        own = _with_context(scores, number, neighbours.context, part)
        if neighbours.smooth is not None:
            around, near = _near(neighbours.smooth, part)
            own = scores.reading.smoothed(own, around @ _with_context(scores, number, neighbours.context, near))
        out[start : start + _TILES] = scores.reading.expression(own)
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
    adapter: Adapter, scores: Scores, sections: Sequence[Section], layer: LayerSpec, parts: Iterable[slice]
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield parts of the rows of a layer with their predictions, float32; NaN where nothing is predicted."""
    there = layer.columns >= 0
    contexts: dict[int, Neighbours] = {}
    for part in parts:
        values = np.full((part.stop - part.start, layer.shape[1]), np.nan, dtype=np.float32)
        for i, section in enumerate(sections):
            index = np.flatnonzero((section.rows >= part.start) & (section.rows < part.stop))
            if not index.size:
                continue
            if i not in contexts:  # of one section at a time; neighbours never cross sections
                one = np.zeros(section.rows.size)
                contexts = {
                    i: Neighbours(
                        adapter.context_weights(section.centres_um, one, grid=layer.grid),
                        adapter.context_weights(section.centres_um, one, grid=layer.grid, smooth=True),
                    )
                }
            predicted = predict_rows(scores, i, contexts[i], index)
            values[np.ix_(section.rows[index] - part.start, layer.columns[there])] = predicted[:, layer.wanted[there]]
        yield part, values


def store_predictions(
    adapter: Adapter, scores: Scores, sections: Sequence[Section], layer: LayerSpec, path: Path, *,
    dtype: str, progress: bool,
) -> PredictionStore:  # fmt: skip
    """Predict all rows of a layer into a store, in parts; those that are there already are left as they are."""
    facts = {
        "genes": [adapter.genes[i] for i in layer.wanted], "columns": layer.columns.tolist(),
        "shape": list(layer.shape), "grid": layer.grid, "context_um": adapter.context_um,
        "offsets": [adapter.info.get(name, []) for name in ("context_offsets_um", "smooth_offsets_um")],
        "dtype": dtype,
    }  # fmt: skip
    rows = [section.rows for section in sections]
    digest = sha256(repr(facts), *scores.features.digests, *array_parts(scores.reading), *rows)
    info = {"adapter": adapter.method, "encoder": adapter.encoder.short, "target": adapter.info["target"]}
    store = PredictionStore(path, digest, layer.shape, info, dtype)
    with locked(path, [store.name]):
        store.sweep()
        missing = store.missing()
        bar = tqdm(missing, desc="predict", unit="part", disable=not progress or len(missing) < 2)
        for part, values in layer_parts(adapter, scores, sections, layer, bar):
            store.write(part, values)
    return store
