"""Features of all tiles of an object: computed in pieces, kept in a store, given back by section or by table row."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from pekasc._sections import Section, section_readers
from pekasc.models._embed_job import EmbedJob, Piece, Reader, embed_pieces, n_features
from pekasc.models._encoders import FrozenEncoder
from pekasc.models._feature_store import FeatureStore
from pekasc.tiling import TileReader, TileSpec
from pekasc.tl import _inputs

logger = logging.getLogger(__name__)

_CHUNK = 256  # tiles that a kill can cost; about 1 MB of features
_LAZY_ROWS = 4096  # of a lazy array's blocks


@dataclass(frozen=True, eq=False)
class _Part:
    """The tiles of one section at one scale, and where their features go."""

    reader: Reader
    store: FeatureStore | None
    values: np.ndarray | None  # in the order of the tiles, without a store
    chunks: list[np.ndarray]  # numbers of tiles; with a store, chunk i has its rows i * size and following

    @property
    def rows(self) -> np.ndarray:
        """(n,) row of the store for each tile."""
        return np.argsort(np.concatenate(self.chunks), kind="stable")

    def put(self, chunk: int, features: np.ndarray) -> None:
        if self.store is not None:
            self.store.write(chunk, features)
        else:
            assert self.values is not None  # for the type checker
            self.values[self.chunks[chunk]] = features


class SectionFeatures:
    """Features of the tiles of several sections; those of several scales lie side by side."""

    def __init__(self, sections: Sequence[Section], parts: Sequence[Sequence[_Part]], width: int) -> None:
        self._sections, self._parts = sections, parts
        self.width = width * len(parts)

    def of(self, section: int) -> np.ndarray:
        """Return the features of one section, (n, d) float32, in the order of its tiles."""
        return np.concatenate([_values(scale[section]) for scale in self._parts], axis=1)

    def by_row(self, n_obs: int, max_memory: int) -> Any:
        """Return the features of all table rows, NaN where there is no tile: a dask array beyond `max_memory`."""
        if 4 * n_obs * self.width <= max_memory:
            out = np.full((n_obs, self.width), np.nan, dtype=np.float32)
            for i, section in enumerate(self._sections):
                out[section.rows] = self.of(i)
            return out
        return self._lazy(n_obs)

    def _lazy(self, n_obs: int) -> Any:
        import dask.array as da
        from dask import delayed

        where = np.full((n_obs, 2), -1, dtype=np.int64)
        for i, section in enumerate(self._sections):
            where[section.rows, 0], where[section.rows, 1] = i, self._parts[0][i].rows
        stores = [[part.store for part in scale] for scale in self._parts]
        blocks = []
        for start in range(0, n_obs, _LAZY_ROWS):
            of = where[start : start + _LAZY_ROWS]
            block = delayed(_stored_rows, pure=False, traverse=False)(stores, of, self.width)
            blocks.append(da.from_delayed(block, shape=(len(of), self.width), dtype=np.float32))
        return da.concatenate(blocks)


def _values(part: _Part) -> np.ndarray:
    if part.store is None:
        assert part.values is not None  # for the type checker
        return part.values
    return part.store.read(slice(None))[part.rows]


def _stored_rows(stores: Sequence[Sequence[FeatureStore]], where: np.ndarray, width: int) -> np.ndarray:
    """Return features of table rows that lie in a section's row of its stores, (k, width) float32."""
    out = np.full((len(where), width), np.nan, dtype=np.float32)
    for section in np.unique(where[where[:, 0] >= 0, 0]):
        at = where[:, 0] == section
        rows, back = np.unique(where[at, 1], return_inverse=True)
        out[at] = np.concatenate([scale[section].read(rows) for scale in stores], axis=1)[back]
    return out


def section_features(
    sections: Sequence[Section],
    spec: TileSpec,
    scales: Sequence[float],
    job: EmbedJob,
    model: FrozenEncoder,
    *,
    store: str | Path | None,
    client: Any,
    max_memory: int,
    progress: bool,
) -> SectionFeatures:
    """Embed the tiles of all sections at all scales; what a store has already is not computed again.

    Raises
    ------
    OSError
        If an image cannot be read, or the store not be written.
    ValueError
        If the store is none, further scales cannot be read, or there are more features than memory, and no store.
    """
    of_scales = [list(section_readers(sections, spec)), *_inputs.further_readers(sections, spec, scales)]
    run = job.run(model)
    width = n_features(run, spec.tile_px)
    n_tiles = sum(reader.n for reader in of_scales[0])
    size = 4 * n_tiles * width * len(scales)
    if store is None and size > max_memory:
        raise ValueError(
            f"The features of {n_tiles} tiles take {size / 2**30:.1f} GiB, more than `max_memory` "
            f"({max_memory / 2**30:.1f} GiB). Give `store=` a folder, where they stay; `obsm` then reads them from "
            "there. Or raise `max_memory=`."
        )
    digest = job.digest(model)
    with ExitStack() as locks:
        parts: list[list[_Part]] = []
        todo: list[tuple[_Part, int]] = []
        pieces: list[Piece] = []
        for scale, readers in zip(scales, of_scales, strict=True):
            parts.append([])
            for section, reader in zip(sections, readers, strict=True):
                part = _part(section, spec.scaled(scale), reader, job, digest, width, store)
                if part.store is not None:
                    locks.enter_context(part.store.writing())
                number = len(parts[0]) * (len(parts) - 1) + len(parts[-1])
                for chunk in range(len(part.chunks)) if part.store is None else part.store.missing():
                    todo.append((part, chunk))
                    pieces.append((number, part.chunks[chunk]))
                parts[-1].append(part)
        n_all, n_todo = n_tiles * len(scales), sum(len(index) for _, index in pieces)
        if n_todo < n_all:
            logger.info("The store %s has the features of %d of %d tiles.", store, n_all - n_todo, n_all)
        readers = [reader for of_scale in of_scales for reader in of_scale]
        bar = tqdm(total=n_all, initial=n_all - n_todo, desc="embed tiles", unit="tile", disable=not progress)
        with bar:
            for number, features in embed_pieces(job, run, readers, pieces, client):
                part, chunk = todo[number]
                part.put(chunk, features)
                bar.update(len(features))
        for reader in readers:
            reader.release()
    return SectionFeatures(sections, parts, width)


def _part(
    section: Section, spec: TileSpec, reader: Reader, job: EmbedJob, digest: str, width: int, store: str | Path | None
) -> _Part:
    size = job.batch_size * max(1, round(_CHUNK / job.batch_size))
    kept = None
    if store is not None:
        name = hashlib.sha256(f"{digest} {_tiles_digest(section, spec, reader)}".encode()).hexdigest()
        info = {
            "section": section.name, "tile_px": spec.tile_px, "mpp": spec.mpp, "encoder": model_name(job),
            "depth": "own" if job.depth is None else list(job.depth), "orientations": job.orientations,
        }  # fmt: skip
        kept = FeatureStore(Path(store), name, (reader.n, width), size, info)
        size = kept.chunk
    chunks = [reader.reading_order[i : i + size] for i in range(0, reader.n, size)]
    values = np.empty((reader.n, width), dtype=np.float32) if kept is None else None
    return _Part(reader, kept, values, chunks)


def model_name(job: EmbedJob) -> str:
    """Return what the features are called in a store's record."""
    return getattr(job.encoder, "short", None) or f"adapter on {job.encoder.encoder.short}"  # type: ignore[union-attr]


def _tiles_digest(section: Section, spec: TileSpec, reader: Reader) -> str:
    """Return the SHA-256 of what the tiles show, and of the order in which they lie in a store."""
    facts: dict[str, Any] = {
        "pictures": section.picture_ids(),
        "um_to_px": section.um_to_px.tolist(),
        "tile_px": spec.tile_px,
        "mpp": spec.mpp,
        "from": "patches",
    }
    if isinstance(reader, TileReader):
        assert section.pyramid is not None  # for the type checker
        facts |= {"from": "image", "level": list(section.pyramid.scales[reader.level])}
    sha = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    sha.update(np.ascontiguousarray(section.centres_px[reader.reading_order]).tobytes())
    return sha.hexdigest()
