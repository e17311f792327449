"""From features to predictions: whole sections in memory, or parts of the rows into a store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm.auto import tqdm

from pekasc._digests import sha256
from pekasc._options import RESULT_MEMORY, Compute
from pekasc._sections import Section, trained_rows, with_stain
from pekasc._settings import get_logger
from pekasc._warnings import warn_user
from pekasc.models import Adapter
from pekasc.models.features import PredictionStore, locked
from pekasc.models.heads import Reading
from pekasc.models.runtime import array_parts
from pekasc.models.trust import Novelty
from pekasc.tiling import TileSpec
from pekasc.tl._read import further_readers
from pekasc.tl._section_features import SectionFeatures, reading_jobs, section_features

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
    novelty
        Distance to the training tiles, which comes after the adapted features, if the adapter is calibrated.
    """

    features: SectionFeatures
    reading: Reading
    novelty: Novelty | None = None

    @property
    def n_adapted(self) -> int:
        """Number of adapted features, which come first."""
        return self.features.widths[0] - self._n_of_field - self._n_novel

    @property
    def _n_novel(self) -> int:
        return 0 if self.novelty is None else 1

    @property
    def _n_of_field(self) -> int:
        return self.reading.n_scores + self.reading.n_around

    def rows(self, number: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the scores of some tiles of a section, as tiles and as neighbours, summed over fields of view."""
        values = self.features.rows(number, index)[:, self.n_adapted + self._n_novel :]
        values = values.reshape(len(index), -1, self._n_of_field).sum(axis=1)
        return values[:, : self.reading.n_scores], values[:, self.reading.n_scores :]

    def p_values(self, n_obs: int, sections: Sequence[Section]) -> np.ndarray | None:
        """Return the novelty of every row of the table, (n_obs,) float32, NaN without a tile; None if not wanted."""
        if self.novelty is None:
            return None
        distances = np.full(n_obs, np.nan, dtype=np.float32)
        for number, section in enumerate(sections):
            for start in range(0, section.rows.size, _TILES):
                at = np.arange(start, min(start + _TILES, section.rows.size))
                distances[section.rows[at]] = self.features.rows(number, at)[:, self.n_adapted]
        return self.novelty.p_values(distances)

    def placed(self, number: int, neighbours: Mapping[float, Any], index: np.ndarray) -> np.ndarray:
        """Return the scores of some tiles of a section with what their neighbours give; see :meth:`Reading.joined`.

        Only the scores of these tiles and of their neighbours are read.
        """
        smooth = self.reading.smooth_um
        if smooth is None:
            return self._with_context(number, neighbours, index)
        around = neighbours[smooth][index]
        wide = np.union1d(index, around.indices)
        scores = self._with_context(number, neighbours, wide)
        return self.reading.smoothed(scores[np.searchsorted(wide, index)], _columns(around, wide) @ scores)

    def _with_context(self, number: int, neighbours: Mapping[float, Any], index: np.ndarray) -> np.ndarray:
        parts = {radius: neighbours[radius][index] for radius in self.reading.radii_um}
        read = np.unique(np.concatenate([index, *(part.indices for part in parts.values())]))
        own, given = self.rows(number, read)
        around = {radius: _columns(part, read) for radius, part in parts.items()}
        return self.reading.with_context(own[np.searchsorted(read, index)], given, around)


def _columns(matrix: Any, kept: np.ndarray) -> Any:
    """Return a sparse matrix with some of its columns, sorted, of which it uses no other."""
    places = np.searchsorted(kept, matrix.indices)
    return type(matrix)((matrix.data, places, matrix.indptr), shape=(matrix.shape[0], kept.size))


def tile_scores(
    adapter: Adapter, sections: Sequence[Section], spec: TileSpec, *, n_obs: int, store: str | Path | None,
    compute: Compute, progress: bool,
) -> tuple[Scores, tuple[float, ...]]:  # fmt: skip
    """Embed the tiles of all sections for the reading of an adapter, and return the fields of view that were read.

    With an adapter's stain, tiles are brought to its reference.
    """
    sections = with_stain(sections, spec, adapter.stain)
    reading, fields_um = _readable(adapter, sections, spec)
    scales = (1.0, *(width / spec.side_um for width in fields_um))
    jobs = reading_jobs(adapter, spec.tile_px, reading, len(scales), compute)
    features = section_features(
        sections, spec, scales, jobs, adapter.network(), n_obs=n_obs, store=store, client=compute.client,
        max_memory=compute.memory(RESULT_MEMORY), progress=progress,
    )  # fmt: skip
    return Scores(features, reading, None if adapter.calibration is None else adapter.novelty), fields_um


def _readable(adapter: Adapter, sections: Sequence[Section], spec: TileSpec) -> tuple[Reading, tuple[float, ...]]:
    """Return the reading to use, and the wider fields of view in um: none, with a warning, where one cannot be read."""
    try:
        further_readers(sections, spec, adapter.scales, quiet=True)
    except ValueError as error:
        found = adapter.reading_of(context=True, fields=False)
        warn_user(
            f"The adapter's wider field of view cannot be read here, and heads that were fitted without it predict: "
            f"{error}"
        )
        return found, ()
    return adapter.reading.use(), adapter.fields_um


def trained_on(adapter: Adapter, sections: Sequence[Section], spec: TileSpec, n_obs: int) -> np.ndarray:
    """Return whether an adapter was trained on the tissue of a row, (n_obs,)."""
    trained = np.zeros(n_obs, dtype=bool)
    trained[trained_rows(sections, spec.side_um * max(adapter.scales), adapter.trained_on)] = True
    return trained


def predict_rows(scores: Scores, number: int, neighbours: Mapping[float, Any], index: np.ndarray) -> np.ndarray:
    """Predict some tiles of a section, (k, genes of the adapter) float32.

    Parameters
    ----------
    neighbours
        Of every tile of the section, see :meth:`pekasc.Adapter.neighbours`.
    index
        Indices of the tiles.
    """
    out = np.empty((len(index), scores.reading.n_genes), dtype=np.float32)
    for start in range(0, len(index), _TILES):
        part = index[start : start + _TILES]
        out[start : start + _TILES] = scores.reading.expression(scores.placed(number, neighbours, part))
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
        Whether the rows are tiles of a grid, see :meth:`pekasc.Adapter.neighbours`.
    left_out
        Rows that are not predicted, (rows,) bool; None: all are.
    """

    shape: tuple[int, int]
    wanted: np.ndarray
    columns: np.ndarray
    grid: bool
    left_out: np.ndarray | None = None


def layer_parts(
    adapter: Adapter, scores: Scores, sections: Sequence[Section], layer: LayerSpec, parts: Iterable[slice]
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield parts of the rows of a layer with their predictions, float32; NaN where nothing is predicted."""
    there = layer.columns >= 0
    contexts: dict[int, Mapping[float, Any]] = {}
    for part in parts:
        values = np.full((part.stop - part.start, layer.shape[1]), np.nan, dtype=np.float32)
        for i, section in enumerate(sections):
            index = np.flatnonzero((section.rows >= part.start) & (section.rows < part.stop))
            if not index.size:
                continue
            if i not in contexts:  # of one section at a time; neighbours never cross sections
                one = np.zeros(section.rows.size)
                contexts = {i: adapter.neighbours(section.centres_um, one, grid=layer.grid)}
            predicted = predict_rows(scores, i, contexts[i], index)
            values[np.ix_(section.rows[index] - part.start, layer.columns[there])] = predicted[:, layer.wanted[there]]
        if layer.left_out is not None:
            values[layer.left_out[part]] = np.nan
        yield part, values


class Pulled(Protocol):
    """What is added to predictions, see :class:`pekasc.tl._predict_measured.Pull`."""

    def apply(self, part: slice, values: np.ndarray) -> np.ndarray:
        """Change a part of the rows in place, and return its standard deviation."""

    def parts(self) -> Iterable[str | np.ndarray]:
        """Yield what it depends on."""


def store_predictions(
    adapter: Adapter, scores: Scores, sections: Sequence[Section], layer: LayerSpec, path: Path, *,
    dtype: str, progress: bool, pull: Pulled | None = None,
) -> tuple[PredictionStore, PredictionStore | None]:  # fmt: skip
    """Predict all rows of a layer into a store, in parts; those that are there already are left as they are.

    With a `pull`, its standard deviation is stored beside them, in the second store that is returned.
    """
    facts = {
        "genes": [adapter.genes[i] for i in layer.wanted], "columns": layer.columns.tolist(),
        "shape": list(layer.shape), "grid": layer.grid, "radii_um": scores.reading.radii_um,
        "offsets": [adapter.info.get(name) for name in ("neighbour_offsets_um", "context_offsets_um")],
        "dtype": dtype,
    }  # fmt: skip
    rows = [section.rows for section in sections]
    if layer.left_out is not None and layer.left_out.any():
        rows.append(layer.left_out)
    parts = () if pull is None else pull.parts()
    digest = sha256(repr(facts), *scores.features.digests, *array_parts(scores.reading), *rows, *parts)
    info = {"adapter": adapter.method, "encoder": adapter.encoder.short, "target": adapter.info["target"]}
    store = PredictionStore(path, digest, layer.shape, info, dtype)
    sd_store = None if pull is None else PredictionStore(path, sha256(digest, "sd"), layer.shape, info, dtype)
    stores = [store] if sd_store is None else [store, sd_store]
    with locked(path, [one.name for one in stores]):
        for one in stores:
            one.sweep()
        missing = sorted({(part.start, part.stop) for one in stores for part in one.missing()})
        bar = tqdm(missing, desc="predict", unit="part", disable=not progress or len(missing) < 2)
        for part, values in layer_parts(adapter, scores, sections, layer, (slice(*ends) for ends in bar)):
            if pull is not None and sd_store is not None:
                sd_store.write(part, pull.apply(part, values))
            store.write(part, values)
    return store, sd_store
