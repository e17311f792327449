"""Cached activations: the tokens entering the first adapted block, computed once per tile and orientation.

The frozen blocks before it never change, so they need not run in every epoch of every fold.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from tqdm.auto import tqdm

from pekasc._digests import sha256
from pekasc._settings import get_logger
from pekasc.models.encoders import VIEWS, EncoderNetwork, orient, orient_tensor
from pekasc.models.features._store import FeatureStore, locked
from pekasc.models.runtime import autocast
from pekasc.tiling import TileSource, in_batches, read_ahead

logger = get_logger(__name__)

KINDS = {"fp16": "float16", "fp32": "float32"}
_CHUNK_BYTES = 16 * 2**20
_HASHED = 256  # tiles hashed or checked at a time


class Inputs(Protocol):
    """Training inputs: tiles, or their cached activations."""

    @property
    def start(self) -> int:
        """Number of blocks that ran already; 0 for tiles."""
        ...

    def read(self, index: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Return the inputs of tiles `index` (k,) in the orientations `views` (k,)."""
        ...


@dataclass(frozen=True)
class TileInputs:
    """Tiles as training inputs: all blocks run at every step."""

    source: TileSource
    start: int = 0

    def read(self, index: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Return tiles in the given orientations, (k, y, x, 3) uint8."""
        return orient(self.source.read(index), views)


class _Rows(Protocol):
    def rows(self, index: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class _InMemory:
    array: np.ndarray

    def rows(self, index: np.ndarray) -> np.ndarray:
        return self.array[index]


@dataclass(frozen=True)
class CachedActivations:
    """Tokens of all tiles entering block ``start + 1``, by orientation.

    Parameters
    ----------
    start
        Number of frozen blocks before it.
    shape
        Number of tokens and their width.
    parts
        By orientation, the rows of the tiles of this process.
    slot
        (n,) row of every tile, -1 if another process has it.
    folder
        Temporary folder with the tokens, if they are on disk; deleted with this object.
    """

    start: int
    shape: tuple[int, int]
    parts: dict[int, _Rows]
    slot: np.ndarray
    folder: tempfile.TemporaryDirectory[str] | None = None

    def read(self, index: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Return the tokens of tiles, (k, tokens, width) in half or single precision."""
        slots = self.slot[index]
        if not len(slots):
            return np.empty((0, *self.shape), dtype=np.float16)
        found: np.ndarray | None = None
        for view in np.unique(views).tolist():
            at = views == view
            rows = self.parts[view].rows(slots[at])
            if found is None:
                found = np.empty((len(slots), rows.shape[1]), dtype=rows.dtype)
            found[at] = rows
        assert found is not None  # for the type checker: there is a view
        return found.reshape(-1, *self.shape)

    def stream(self, index: np.ndarray, batch_size: int, n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Iterate over batches of tiles, read ahead: their indices, and tokens of their first `n` orientations."""
        return read_ahead(lambda part: self.views(part, n), in_batches([index], batch_size))

    def views(self, index: np.ndarray, n: int) -> np.ndarray:
        """Return the tokens of tiles in their first `n` orientations, (k, n, tokens, width)."""
        slots = self.slot[index]
        return np.stack([self.parts[v].rows(slots).reshape(-1, *self.shape) for v in VIEWS[:n]], axis=1)


@dataclass(frozen=True)
class CachePlan:
    """How to cache activations, and where.

    Parameters
    ----------
    start
        Number of frozen blocks.
    n_views
        Orientations of every tile.
    kind
        Precision of the cache, ``"fp16"`` or ``"fp32"``.
    batch_size, device, precision, max_memory, progress
        As in :class:`pekasc.Compute`.
    store
        Folder for activations that do not fit in `max_memory` bytes; a temporary one by default.
    facts
        Digest of the encoder and its settings, for the store.
    n_here
        Number of processes that cache to the same disk.
    """

    start: int
    n_views: int
    kind: str
    batch_size: int
    device: torch.device
    precision: str
    max_memory: int | None
    progress: bool
    store: Path | None
    facts: str
    n_here: int = 1


def token_shape(encoder: EncoderNetwork, precision: str = "fp32") -> tuple[int, int]:
    """Return the number of tokens of a tile between blocks, and their width."""
    device = encoder.mean.device
    tile = torch.zeros(1, 3, encoder.tile_px, encoder.tile_px, device=device)
    with torch.inference_mode(), autocast(device, precision):
        tokens = encoder.tokens(tile, 0)
    return int(tokens.shape[1]), int(tokens.shape[2])


def cache_activations(
    encoder: EncoderNetwork,
    source: TileSource,
    local: np.ndarray,
    plan: CachePlan,
    known: Mapping[int, np.ndarray] = MappingProxyType({}),
) -> CachedActivations:
    """Run the frozen blocks on the tiles `local` and keep their tokens, in memory if they fit, else in a store on disk.

    Parameters
    ----------
    encoder
        The frozen encoder.
    source
        All tiles.
    local
        Indices of the tiles that this process needs.
    plan
        What to cache, and where.
    known
        Tokens that are computed already, (n, tokens * width) by orientation, in reading order; used if all tokens fit
        in memory.

    Raises
    ------
    OSError
        If there is not enough disk space, before anything is computed.
    FloatingPointError
        If tokens overflow in half precision.
    """
    encoder.to(plan.device)
    shape = token_shape(encoder, plan.precision)
    views = VIEWS[: plan.n_views]
    order = source.reading_order[np.isin(source.reading_order, local)]
    slot = np.full(source.n, -1, dtype=np.int64)
    slot[order] = np.arange(len(order))
    dtype = np.dtype(KINDS[plan.kind])
    each = shape[0] * shape[1] * dtype.itemsize
    total = each * len(order) * len(views)
    in_memory = plan.max_memory is None or total <= plan.max_memory
    logger.info(
        "Cached activations of %d frozen block%s: %.3g MB per tile and orientation (%s), %d tiles in %d orientation%s: "
        "%.3g GB, %s.",
        plan.start, "s"[: plan.start > 1], each / 1e6, plan.kind, len(order), len(views), "s"[: len(views) > 1],
        total / 1e9, "in memory" if in_memory else f"on disk (more than max_memory={plan.max_memory} bytes)",
    )  # fmt: skip
    run = _BlockRunner(encoder, source, plan, dtype)
    with tqdm(total=len(order) * len(views), desc="cache activations", unit="tile", disable=not plan.progress) as bar:
        if in_memory:
            array = {view: known[view] for view in views if view in known}
            for rows in array.values():
                _check_range(rows, plan)
                bar.update(len(rows))
            missing = [view for view in views if view not in known]
            array |= {view: np.empty((len(order), shape[0] * shape[1]), dtype=dtype) for view in missing}
            if missing:
                run.over(order, missing, lambda view, at, rows: array[view].__setitem__(at, rows), bar)
            return CachedActivations(plan.start, shape, {view: _InMemory(array[view]) for view in views}, slot)
        return _on_disk(run, order, views, shape, each, slot, bar)


@dataclass(frozen=True)
class _BlockRunner:
    """Run batches of tiles through the frozen blocks."""

    encoder: EncoderNetwork
    source: TileSource
    plan: CachePlan
    dtype: np.dtype[Any]

    def over(
        self, order: np.ndarray, views: Sequence[int], put: Callable[[int, slice, np.ndarray], None], bar: Any
    ) -> None:
        """Compute the tokens of tiles `order`; `put` gets the orientation, the slice of `order`, and the rows."""
        start = 0
        for _, tiles in read_ahead(self.source.read, in_batches([order], self.plan.batch_size)):
            for view in views:
                put(view, slice(start, start + len(tiles)), self._tokens(tiles, view))
                bar.update(len(tiles))
            start += len(tiles)

    def _tokens(self, tiles: np.ndarray, view: int) -> np.ndarray:
        plan = self.plan
        with torch.inference_mode(), autocast(plan.device, plan.precision):
            x = orient_tensor(torch.from_numpy(tiles).to(plan.device), view, (1, 2))
            tokens = self.encoder.tokens(self.encoder.normalise(x), plan.start)
            tokens = tokens.to(getattr(torch, KINDS[plan.kind]))
        rows = tokens.flatten(1).cpu().numpy()
        _check_range(rows, plan)
        return rows


def _check_range(rows: np.ndarray, plan: CachePlan) -> None:
    # part by part, since isfinite() allocates a boolean per value
    if not all(np.isfinite(rows[i : i + _HASHED]).all() for i in range(0, len(rows), _HASHED)):
        raise FloatingPointError(
            f"Tokens after block {plan.start} are NaN or infinite in {plan.kind}: "
            + (
                'take `Compute(cached_activations="fp32")`.'
                if plan.kind == "fp16"
                else "check the encoder's weights and the tiles."
            )
        )


def _on_disk(
    run: _BlockRunner,
    order: np.ndarray,
    views: Sequence[int],
    shape: tuple[int, int],
    each: int,
    slot: np.ndarray,
    bar: Any,
) -> CachedActivations:
    plan = run.plan
    folder = None if plan.store is not None else tempfile.TemporaryDirectory(prefix="pekasc-activations-")
    path = plan.store if folder is None else Path(folder.name) / "activations.zarr"
    assert path is not None  # for the type checker: one of them is there
    chunk = min(max(1, _CHUNK_BYTES // each), len(order))
    about = {"what": f"tokens after block {plan.start}", "shape": list(shape), "kind": plan.kind}
    tiles = tiles_digest(run.source, order)
    digests = {view: sha256(f"activations 1 {plan.facts} {tiles} {plan.start} {view} {plan.kind}") for view in views}
    _check_room(path, len(order) * each * len(views), digests.values(), plan.n_here)
    stores: dict[int, _Rows] = {}
    with locked(path, [digest[:16] for digest in digests.values()]):
        for view in views:
            store = FeatureStore(
                path, digests[view], (len(order), shape[0] * shape[1]), chunk, {**about, "view": view},
                dtype=KINDS[plan.kind],
            )  # fmt: skip
            store.sweep()
            missing = store.missing() if folder is None else list(range(store.n_chunks))
            bar.update(len(order) - sum(len(order[i * store.chunk : (i + 1) * store.chunk]) for i in missing))
            for i in missing:
                part = order[i * store.chunk : (i + 1) * store.chunk]
                rows = np.empty((len(part), shape[0] * shape[1]), dtype=run.dtype)
                run.over(part, [view], lambda _, at, found, rows=rows: rows.__setitem__(at, found), bar)  # type: ignore[misc]
                store.write(i, rows)
            stores[view] = store
    return CachedActivations(plan.start, shape, stores, slot, folder)


def _check_room(path: Path, size: int, digests: Any, n_here: int) -> None:
    there = sum(file.stat().st_size for digest in digests for file in (path / digest[:16]).rglob("*") if file.is_file())
    above = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(above).free
    more = (size - there) * n_here
    if more > free:
        raise OSError(
            f"The cached activations take {more / 1e9:.3g} GB more, and {str(above)!r} has {free / 1e9:.3g} GB "
            "left. Give `Compute.cache` a folder with room (or set TMPDIR), fewer `Recipe.n_views`, or "
            "`cached_activations=None`, which runs the frozen blocks in every epoch."
        )


def tiles_digest(source: TileSource, order: np.ndarray) -> str:
    """Return the SHA-256 of all pixels of the tiles `order`."""
    return sha256(source.read(order[i : i + _HASHED]) for i in range(0, len(order), _HASHED))
