"""The frozen prefix: what enters the first adapted block, computed once for every tile and view.

Blocks before the first adapted one never change, so a training needs them once, not in every epoch of every fold.
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
from pekasc.models.encoders import VIEWS, EncoderNetwork, orient, turned
from pekasc.models.features._store import FeatureStore, locked
from pekasc.models.runtime import autocast
from pekasc.tiling import TileSource, in_batches, read_ahead

logger = get_logger(__name__)

KINDS = {"fp16": "float16", "fp32": "float32"}
_CHUNK_BYTES = 16 * 2**20
_HASHED = 256  # tiles hashed, or checked, at once


class Inputs(Protocol):
    """What enters the part of the encoder that is trained."""

    @property
    def start(self) -> int:
        """Blocks that ran already; 0 for tiles."""
        ...

    def read(self, index: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Return what enters for tiles `index` (k,) in the orientations `views` (k,)."""
        ...


@dataclass(frozen=True)
class TileInputs:
    """Tiles themselves: every block runs at every step."""

    source: TileSource
    start: int = 0

    def read(self, index: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Return turned tiles, (k, y, x, 3) uint8."""
        return orient(self.source.read(index), views)


class _Rows(Protocol):
    def rows(self, index: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class _InMemory:
    array: np.ndarray

    def rows(self, index: np.ndarray) -> np.ndarray:
        return self.array[index]


@dataclass(frozen=True)
class Prefix:
    """Tokens that enter block ``start + 1``.

    Parameters
    ----------
    start
        Frozen blocks before.
    shape
        Tokens and width.
    parts
        By orientation, the rows of the tiles that this process has.
    slot
        (n,) row of every tile, -1 where another process has it.
    folder
        The temporary folder they lie in, if they do: it goes away with this object.
    """

    start: int
    shape: tuple[int, int]
    parts: dict[int, _Rows]
    slot: np.ndarray
    folder: tempfile.TemporaryDirectory[str] | None = None

    def read(self, index: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Return tokens, (k, tokens, width) half or single precision."""
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
        """Iterate over batches of tiles: their numbers, and their first `n` orientations, read ahead."""
        return read_ahead(lambda part: self.views(part, n), in_batches([index], batch_size))

    def views(self, index: np.ndarray, n: int) -> np.ndarray:
        """Return the first `n` orientations of tiles, (k, n, tokens, width)."""
        slots = self.slot[index]
        return np.stack([self.parts[v].rows(slots).reshape(-1, *self.shape) for v in VIEWS[:n]], axis=1)


@dataclass(frozen=True)
class PrefixPlan:
    """What to keep and where.

    Parameters
    ----------
    start
        Frozen blocks.
    n_views
        Orientations of every tile.
    kind
        ``"fp16"`` or ``"fp32"``.
    batch_size, device, precision, max_memory, progress
        As in ``tl.fit_adapter``.
    store
        Folder for what does not fit `max_memory`; a temporary one by default.
    facts
        Digest of the encoder's part in it.
    n_here
        Processes that keep as much on the same disk.
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
    """Return tokens and width between blocks, for one tile."""
    device = encoder.mean.device
    tile = torch.zeros(1, 3, encoder.tile_px, encoder.tile_px, device=device)
    with torch.inference_mode(), autocast(device, precision):
        tokens = encoder.tokens(tile, 0)
    return int(tokens.shape[1]), int(tokens.shape[2])


def make_prefix(
    encoder: EncoderNetwork,
    source: TileSource,
    local: np.ndarray,
    plan: PrefixPlan,
    known: Mapping[int, np.ndarray] = MappingProxyType({}),
) -> Prefix:
    """Compute the tokens of the tiles `mine`, in memory where they fit, else in a store on disk.

    Parameters
    ----------
    encoder
        The frozen encoder.
    source
        Tiles.
    mine
        Numbers of those that this process needs.
    plan
        What to keep, and where.
    known
        By orientation, tokens (n, tokens * width) that are there already, in the order in which tiles are read: used
        where all fit the memory.

    Raises
    ------
    OSError
        If the disk has no room; nothing was computed then.
    FloatingPointError
        If tokens leave the range of half precision.
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
        "Frozen prefix of %d block%s: %.3g MB a tile and view (%s), %d tiles in %d view%s: %.3g GB, %s.",
        plan.start, "s"[: plan.start > 1], each / 1e6, plan.kind, len(order), len(views), "s"[: len(views) > 1],
        total / 1e9, "in memory" if in_memory else f"on disk (more than max_memory={plan.max_memory} bytes)",
    )  # fmt: skip
    run = _BlockRunner(encoder, source, plan, dtype)
    with tqdm(total=len(order) * len(views), desc="frozen prefix", unit="tile", disable=not plan.progress) as bar:
        if in_memory:
            array = {view: known[view] for view in views if view in known}
            for rows in array.values():
                _check_range(rows, plan)
                bar.update(len(rows))
            missing = [view for view in views if view not in known]
            array |= {view: np.empty((len(order), shape[0] * shape[1]), dtype=dtype) for view in missing}
            if missing:
                run.over(order, missing, lambda view, at, rows: array[view].__setitem__(at, rows), bar)
            return Prefix(plan.start, shape, {view: _InMemory(array[view]) for view in views}, slot)
        return _on_disk(run, order, views, shape, each, slot, bar)


@dataclass(frozen=True)
class _BlockRunner:
    """Batches of tiles through the frozen blocks."""

    encoder: EncoderNetwork
    source: TileSource
    plan: PrefixPlan
    dtype: np.dtype[Any]

    def over(
        self, order: np.ndarray, views: Sequence[int], put: Callable[[int, slice, np.ndarray], None], bar: Any
    ) -> None:
        """Compute the tokens of tiles `order`; `put` gets view, place in `order`, and rows."""
        start = 0
        for _, tiles in read_ahead(self.source.read, in_batches([order], self.plan.batch_size)):
            for view in views:
                put(view, slice(start, start + len(tiles)), self._tokens(tiles, view))
                bar.update(len(tiles))
            start += len(tiles)

    def _tokens(self, tiles: np.ndarray, view: int) -> np.ndarray:
        plan = self.plan
        with torch.inference_mode(), autocast(plan.device, plan.precision):
            x = turned(torch.from_numpy(tiles).to(plan.device), view, (1, 2))
            tokens = self.encoder.tokens(self.encoder.normalise(x), plan.start)
            tokens = tokens.to(getattr(torch, KINDS[plan.kind]))
        rows = tokens.flatten(1).cpu().numpy()
        _check_range(rows, plan)
        return rows


def _check_range(rows: np.ndarray, plan: PrefixPlan) -> None:
    # part by part: numpy makes a boolean of every number
    if not all(np.isfinite(rows[i : i + _HASHED]).all() for i in range(0, len(rows), _HASHED)):
        raise FloatingPointError(
            f"Tokens after block {plan.start} leave the range of {plan.kind}: "
            + (
                'take `Compute(cached_activations="fp32")`.'
                if plan.kind == "fp16"
                else "the encoder's weights or tiles are not finite."
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
) -> Prefix:
    plan = run.plan
    folder = None if plan.store is not None else tempfile.TemporaryDirectory(prefix="pekasc-prefix-")
    path = plan.store if folder is None else Path(folder.name) / "prefix.zarr"
    assert path is not None  # for the type checker: one of them is there
    chunk = min(max(1, _CHUNK_BYTES // each), len(order))
    about = {"what": f"tokens after block {plan.start}", "shape": list(shape), "kind": plan.kind}
    tiles = tiles_digest(run.source, order)
    digests = {view: sha256(f"prefix 1 {plan.facts} {tiles} {plan.start} {view} {plan.kind}") for view in views}
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
    return Prefix(plan.start, shape, stores, slot, folder)


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
    """Return the SHA-256 of every pixel of tiles, in their order."""
    return sha256(source.read(order[i : i + _HASHED]) for i in range(0, len(order), _HASHED))
