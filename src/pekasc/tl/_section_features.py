"""Embed all tiles of an object in chunks, in memory or in a zarr store; features by section or by table row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from pekasc._digests import sha256
from pekasc._options import Compute
from pekasc._paths import check_no_file, folder_path
from pekasc._sections import Section, section_readers
from pekasc._settings import get_logger
from pekasc.models import Adapter, Encoder
from pekasc.models.encoders import Depth, EncoderNetwork
from pekasc.models.features import (
    EmbedJob,
    FeatureStore,
    Reader,
    embed_pieces,
    locked,
    n_features,
    sample_digest,
)
from pekasc.models.heads import Reading
from pekasc.models.runtime import autocast, resolve_device
from pekasc.tiling import MAX_MEMORY, TileReader, TileSpec
from pekasc.tl._read import further_readers

logger = get_logger(__name__)

_CHUNK = 256  # tiles lost by an interruption; about 1 MB of features
_LAZY_ROWS = 4096  # per block of a dask array


@dataclass(frozen=True, eq=False)
class _Part:
    """The tiles of one section at one scale, and the store or array for their features."""

    reader: Reader
    store: FeatureStore | None
    values: np.ndarray | None  # without a store: features in the order of the tiles
    chunks: list[np.ndarray]  # indices of tiles; chunk i has the rows from i * size on in a store

    @cached_property
    def rows(self) -> np.ndarray:
        """(n,) row of the store for each tile."""
        return np.argsort(np.concatenate(self.chunks), kind="stable")

    def put(self, chunk: int, features: np.ndarray) -> None:
        bad = ~np.isfinite(features).all(axis=1)
        if bad.any():
            # NaN means "no tile", and "not computed yet" in a store
            raise ValueError(
                f"The features of {int(bad.sum())} of {len(features)} tiles are NaN or infinite: the encoder's "
                'activations overflow in this `Compute.precision`. Take "bf16" or "fp32".'
            )
        if self.store is not None:
            self.store.write(chunk, features)
        else:
            assert self.values is not None  # for the type checker
            self.values[self.chunks[chunk]] = features


class SectionFeatures:
    """Features of the tiles of several sections; those of several fields of view are concatenated."""

    def __init__(self, sections: Sequence[Section], parts: Sequence[Sequence[_Part]], widths: Sequence[int]) -> None:
        self._sections, self._parts = sections, parts
        self.widths = list(widths)  # of every field
        self.width = sum(widths)
        self._stored = all(part.store is not None for scale in parts for part in scale)

    def section(self, section: int) -> np.ndarray:
        """Return the features of one section, (n, d) float32, in the order of its tiles."""
        return np.concatenate([_values(scale[section]) for scale in self._parts], axis=1)

    @property
    def digests(self) -> list[str]:
        """Names of the stored features of every section and scale, which say what they depend on."""
        return [part.store.name for scale in self._parts for part in scale if part.store is not None]

    def rows(self, section: int, index: np.ndarray) -> np.ndarray:
        """Return the features of some tiles of a section, (k, d) float32; from a store, without reading the others."""
        found = []
        for part in (scale[section] for scale in self._parts):
            if part.store is not None:
                found.append(part.store.rows(part.rows[index]))
                _check_found(found[-1], part.store)
            elif part.values is not None:
                found.append(part.values[index])
        return np.concatenate(found, axis=1)

    def by_row(self, n_obs: int, max_memory: int, first: int | None = None) -> Any:
        """Return the features of all table rows, NaN without a tile; a dask array if larger than `max_memory` bytes.

        With `first`, only so many of them.
        """
        width = self.width if first is None else first
        if not self._stored or 4 * n_obs * width <= max_memory:
            out = np.full((n_obs, width), np.nan, dtype=np.float32)
            for i, section in enumerate(self._sections):
                out[section.rows] = self.section(i)[:, :width]
            return out
        return self._lazy(n_obs)[:, :width]

    def _lazy(self, n_obs: int) -> Any:
        import dask.array as da
        from dask import delayed

        where = np.full((n_obs, 2), -1, dtype=np.int64)
        for i, section in enumerate(self._sections):
            where[section.rows, 0], where[section.rows, 1] = i, self._parts[0][i].rows
        stores = [[part.store for part in scale] for scale in self._parts]
        blocks = []
        for start in range(0, n_obs, _LAZY_ROWS):
            part = where[start : start + _LAZY_ROWS]
            block = delayed(_stored_rows, pure=False, traverse=False)(stores, part, self.width)
            blocks.append(da.from_delayed(block, shape=(len(part), self.width), dtype=np.float32))
        return da.concatenate(blocks)


def _values(part: _Part) -> np.ndarray:
    if part.store is None:
        assert part.values is not None  # for the type checker
        return part.values
    found = part.store.read(slice(None))[part.rows]
    _check_found(found, part.store)
    return found


def _check_found(found: np.ndarray, store: FeatureStore) -> None:
    # zarr reads a chunk that is not there as NaN
    if not np.isfinite(found).all():
        raise OSError(
            f"Features are missing in the store {str(store.path)!r}: it was moved, deleted or changed since they were "
            "written. Put it back, or run `pekasc.tl.embed_tiles` again."
        )


def _stored_rows(stores: Sequence[Sequence[FeatureStore]], where: np.ndarray, width: int) -> np.ndarray:
    """Read the features of table rows, each given as section and row of its store, (k, 2); (k, width) float32."""
    out = np.full((len(where), width), np.nan, dtype=np.float32)
    for section in np.unique(where[where[:, 0] >= 0, 0]):
        at = where[:, 0] == section
        rows, back = np.unique(where[at, 1], return_inverse=True)
        found = np.concatenate([scale[section].read(rows) for scale in stores], axis=1)
        _check_found(found, stores[0][section])
        out[at] = found[back]
    return out


def section_features(
    sections: Sequence[Section],
    spec: TileSpec,
    scales: Sequence[float],
    jobs: Sequence[EmbedJob],
    model: EncoderNetwork,
    *,
    n_obs: int,
    store: str | Path | None,
    client: Any,
    max_memory: int,
    progress: bool,
) -> SectionFeatures:
    """Embed the tiles of all sections in all fields of view, without those whose features are in the store already.

    `scales` are the fields of view, as multiples of the pixel size, each with its job.

    Raises
    ------
    OSError
        If an image cannot be read, or the store cannot be written.
    ValueError
        If `store` is not a feature store, a larger field of view cannot be read, or the features need more than
        `max_memory` bytes and there is no store.
    """
    path = None if store is None else check_store(store)
    bound = min(MAX_MEMORY, max(max_memory // 4, 1))
    scale_readers = [
        list(section_readers(sections, spec, max_memory=bound)),
        *further_readers(sections, spec, scales, max_memory=bound),
    ]
    widths = [n_features(job, model) for job in jobs]
    n_tiles = sum(reader.n for reader in scale_readers[0])
    size = 4 * n_obs * sum(widths)
    if path is None and size > max_memory:
        raise ValueError(
            f"The features of {n_obs} rows take {size / 2**30:.1f} GiB, more than `Compute.max_memory` "
            f"({max_memory / 2**30:.1f} GiB). Give `store=` a folder, where they stay; `obsm` then reads them from "
            "there. Or raise the limit."
        )
    parts = [
        [
            _part(section, spec.scaled(scale), reader, job, digest, width, path)
            for section, reader in zip(sections, readers, strict=True)
        ]
        for scale, readers, job, width, digest in zip(
            scales, scale_readers, jobs, widths, [job.digest(model) for job in jobs], strict=True
        )
    ]
    every = [part for scale_parts in parts for part in scale_parts]
    names = [part.store.name for part in every if part.store is not None]
    with nullcontext() if path is None else locked(path, names):
        todo = _missing(every)
        n_all = n_tiles * len(scales)
        n_todo = sum(len(every[number].chunks[chunk]) for number, chunk in todo)
        if n_todo < n_all:
            logger.info("The store %s has the features of %d of %d tiles.", path, n_all - n_todo, n_all)
        bar = tqdm(total=n_all, initial=n_all - n_todo, desc="embed tiles", unit="tile", disable=not progress)
        readers = [part.reader for part in every]
        with bar:
            for i, job in enumerate(jobs):
                field = range(i * len(sections), (i + 1) * len(sections))
                own = [(number, chunk) for number, chunk in todo if number in field]
                pieces = [(number, every[number].chunks[chunk]) for number, chunk in own]
                for number, features in embed_pieces(job, model, readers, pieces, client) if pieces else ():
                    part, chunk = own[number]
                    every[part].put(chunk, features)
                    bar.update(len(features))
        for reader in readers:
            reader.release()
    return SectionFeatures(sections, parts, widths)


def _missing(parts: Sequence[_Part]) -> list[tuple[int, int]]:
    """Return the chunks that are still to be computed, as (index of the part, index of the chunk)."""
    todo: list[tuple[int, int]] = []
    begun: set[str] = set()
    for number, part in enumerate(parts):
        chunks = list(range(len(part.chunks)))
        if part.store is not None:
            # two regions with the same tiles share one entry of the store
            chunks = [] if part.store.name in begun else part.store.missing()
            begun.add(part.store.name)
            part.store.sweep()
        todo += [(number, chunk) for chunk in chunks]
    return todo


def embed_job(
    encoder: Encoder | Adapter, digest: str, tile_px: int, depth: Depth, orientations: int, compute: Compute
) -> EmbedJob:
    """Return how tiles become features in a call; see :class:`pekasc.models.features.EmbedJob`."""
    return EmbedJob(
        encoder, digest, tile_px, depth=depth, orientations=orientations, batch_size=compute.embed_batch_size,
        device=compute.device, precision=compute.precision,
    )  # fmt: skip


def reading_jobs(adapter: Adapter, tile_px: int, reading: Reading, n_fields: int, compute: Compute) -> list[EmbedJob]:
    """Return how the tiles of every field of view become what a reading of an adapter needs of them."""
    job = embed_job(adapter, adapter.encoder_digest, tile_px, adapter.depth, adapter.orientations, compute)
    novelty = None if adapter.calibration is None else adapter.novelty
    return [replace(job, reading=reading, field=i, novelty=novelty) for i in range(n_fields)]


def on_device(compute: Compute) -> Compute:
    """Return the options with the device resolved; with a client, its workers have the devices.

    Raises
    ------
    ValueError
        If the device is missing or lacks the precision.
    """
    if compute.client is not None:
        return compute
    device = resolve_device(compute.device)
    autocast(device, compute.precision)
    return compute.replace(device=str(device))


def check_store(store: str | Path) -> Path:
    """Return the absolute path of a store, which a lazy array reads from even after a change of directory.

    Raises
    ------
    TypeError
        If it is no path.
    ValueError
        If it is empty, a URL or a file.
    """
    path = folder_path("store", store).absolute()
    check_no_file("store", path)
    return path


def _part(
    section: Section, spec: TileSpec, reader: Reader, job: EmbedJob, digest: str, width: int, path: Path | None
) -> _Part:
    size = job.batch_size * max(1, round(_CHUNK / job.batch_size))
    kept = None
    if path is not None:
        name = sha256(f"{digest} {_tiles_digest(section, spec, reader)}")
        info = {
            "section": section.name, "tile_px": spec.tile_px, "mpp": spec.mpp, "encoder": model_name(job),
            "depth": "own" if job.depth is None else list(job.depth), "orientations": job.orientations,
        }  # fmt: skip
        kept = FeatureStore(path, name, (reader.n, width), size, info)
        size = kept.chunk
    chunks = [reader.canonical_order[i : i + size] for i in range(0, reader.n, size)]
    values = np.empty((reader.n, width), dtype=np.float32) if kept is None else None
    return _Part(reader, kept, values, chunks)


def model_name(job: EmbedJob) -> str:
    """Return the name of the encoder or adapter, for the record in a store."""
    return getattr(job.encoder, "short", None) or f"adapter on {job.encoder.encoder.short}"  # type: ignore[union-attr]


def _tiles_digest(section: Section, spec: TileSpec, reader: Reader) -> str:
    """Return the SHA-256 of the content of the tiles, independent of the order of the table.

    Coordinates are rounded far below what changes a tile, since libraries differ in the last digits.
    """
    facts: dict[str, Any] = {
        "pictures": section.picture_ids(),
        "um_to_px": [f"{value:.9g}" for value in section.um_to_px.ravel()],
        "tile_px": spec.tile_px,
        "mpp": spec.mpp,
        "from": "patches",
    }
    if isinstance(reader, TileReader):
        assert section.pyramid is not None  # for the type checker
        facts |= {"from": "image", "level": [f"{scale:.9g}" for scale in section.pyramid.scales[reader.level]]}
    if section.stain is not None:
        facts["stain"] = section.stain.digest
    centres = np.round(section.centres_px[reader.canonical_order], 3) + 0.0  # no negative zeros
    return sha256(json.dumps(facts, sort_keys=True), centres, sample_digest(reader))
