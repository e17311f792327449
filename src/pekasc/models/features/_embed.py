"""Embed tiles with an encoder: test-time augmentation, batches that fit the device, features in the order of tiles."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm.auto import tqdm

from pekasc._settings import get_logger
from pekasc.models.encoders import VIEWS, Depth, EncoderNetwork, orient_tensor
from pekasc.models.features._files import FeatureArrays, FeatureFiles, room_for
from pekasc.models.features._forward import adapted_features, features_of, mean_of, shared_blocks
from pekasc.models.runtime import autocast
from pekasc.tiling import TileSource, batches, in_batches, read_parts

if TYPE_CHECKING:
    from pekasc.models.features._cached_blocks import CachedActivations

logger = get_logger(__name__)


def oriented_features(
    encoder: EncoderNetwork,
    x: torch.Tensor,
    depths: Sequence[Depth],
    orientations: int,
    tokens: TokensBetweenBlocks | None,
) -> list[torch.Tensor]:
    """Return :func:`features_of` averaged over the first `orientations` orientations of the tiles, float32.

    Those of an encoder with several adapters are their mean.

    With `tokens`, the features are followed by the tokens of every orientation and number of blocks.
    """
    total: list[torch.Tensor] = []
    between_blocks: list[torch.Tensor] = []
    for number in VIEWS[:orientations]:
        kept: dict[int, torch.Tensor | None] = {} if tokens is None else dict.fromkeys(tokens.starts)
        view = orient_tensor(x, number, (-2, -1)) if number else x
        if encoder.copies:
            start = shared_blocks(encoder, depths)
            found = adapted_features(encoder, view, [depths] * len(encoder.networks), start)
            parts = [mean_of(each) for each in zip(*found, strict=True)]
        else:
            parts = [part.float() for part in features_of(encoder, view, depths, kept=kept)]
        total = [s + part for s, part in zip(total, parts, strict=True)] if total else parts
        if tokens is not None:
            between_blocks += [found.to(tokens.dtype).flatten(1) for found in kept.values() if found is not None]
    return [*(sums / orientations for sums in total), *between_blocks]


@dataclass
class TokensBetweenBlocks:
    """Collect the tokens between blocks during a pass for features, so that caching them needs no other pass.

    Parameters
    ----------
    starts
        Numbers of blocks after which to keep tokens.
    dtype
        Precision to keep them in.
    rows
        Tokens by number of blocks and orientation, (n, tokens * width) in reading order.
    """

    starts: Sequence[int]
    dtype: torch.dtype
    rows: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    def put(self, at: slice, n: int, found: Sequence[np.ndarray]) -> None:
        """Keep the tokens of a batch as :func:`oriented_features` returns them; `n` is the total number of tiles."""
        names = [(view, start) for view in VIEWS[: len(found) // len(self.starts)] for start in self.starts]
        for (view, start), values in zip(names, found, strict=True):
            if (start, view) not in self.rows:
                self.rows[start, view] = np.empty((n, values.shape[1]), dtype=values.dtype)
            self.rows[start, view][at] = values


class BatchEncoder:
    """Embed batches of tiles with an encoder on its device.

    If the device runs out of memory, the batch size is halved for this and later batches, with a warning.

    Parameters
    ----------
    encoder
        The encoder, moved to `device`.
    depths, orientations
        See :func:`oriented_features`.
    device, precision
        See :func:`resolve_device` and :func:`autocast`.
    start
        If above 0, inputs are not tiles but tokens after that many blocks, (n, orientations, tokens, width).
    tokens
        Tokens to return after the features.
    """

    def __init__(
        self,
        encoder: EncoderNetwork,
        depths: Sequence[Depth],
        orientations: int,
        device: torch.device,
        precision: str,
        start: int = 0,
        tokens: TokensBetweenBlocks | None = None,
    ) -> None:
        self.encoder, self.start, self.tokens = encoder.to(device), start, tokens
        self.depths, self.orientations = list(depths), orientations
        self.device, self.precision = device, precision
        self._at_once: int | None = None  # batch size that fits in memory; None until it was halved

    def over(self, stream: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
        """Iterate over batches: indices of the tiles, and their features (k, d), float32, for every depth."""
        # launch the next batch on a GPU before waiting for the features of the last one
        ahead = int(self.device.type == "cuda")
        launched: deque[tuple[np.ndarray, list[torch.Tensor]]] = deque()
        for positions, tiles in stream:
            launched.append((positions, self._features(tiles)))
            if len(launched) > ahead:
                yield _fetched(*launched.popleft())
        while launched:
            yield _fetched(*launched.popleft())

    def features(self, tiles: np.ndarray) -> np.ndarray:
        """Return features (k, d), float32, of the first depth."""
        return self._features(tiles)[0].cpu().numpy()

    def _features(self, tiles: np.ndarray) -> list[torch.Tensor]:
        while True:
            step = self._at_once or len(tiles)
            try:
                parts = [self._forward(tiles[i : i + step]) for i in range(0, len(tiles), step)]
            except RuntimeError as error:
                if not _out_of_memory(error) or step == 1:
                    raise
                self._at_once = (min(step, len(tiles)) + 1) // 2
                logger.warning(
                    "Batches of %d tiles run out of memory on %s (%s): going on with %d.",
                    min(step, len(tiles)), self.device, str(error).splitlines()[0][:200], self._at_once,
                )  # fmt: skip
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            return parts[0] if len(parts) == 1 else [torch.cat(pieces) for pieces in zip(*parts, strict=True)]

    def _forward(self, tiles: np.ndarray) -> list[torch.Tensor]:
        x = torch.from_numpy(tiles)
        if self.device.type == "cuda":
            x = x.pin_memory().to(self.device, non_blocking=True)
        x = x.to(self.device)
        with torch.inference_mode(), autocast(self.device, self.precision):
            if self.start:
                return self._features_of_tokens(x.float())
            x = self.encoder.normalise(x)
            return oriented_features(self.encoder, x, self.depths, self.orientations, self.tokens)

    def _features_of_tokens(self, x: torch.Tensor) -> list[torch.Tensor]:
        views = [features_of(self.encoder, view, self.depths, self.start) for view in x.unbind(1)]
        return [torch.stack([part.float() for part in parts]).mean(dim=0) for parts in zip(*views, strict=True)]


def _fetched(positions: np.ndarray, parts: list[torch.Tensor]) -> tuple[np.ndarray, list[np.ndarray]]:
    return positions, [part.cpu().numpy() for part in parts]


def _out_of_memory(error: RuntimeError) -> bool:
    # the CPU's allocator has no error class of its own
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def embed_chunks(
    run: BatchEncoder, source: TileSource, chunks: Sequence[np.ndarray], batch_size: int
) -> Iterator[np.ndarray]:
    """Yield the features of the first depth, (k, d) float32, for every chunk of tiles.

    Batches never span two chunks, so that the features of a chunk are bit-identical whichever others are embedded.
    """
    stream = run.over(read_parts(source, in_batches(chunks, batch_size)))
    for chunk in chunks:
        parts: list[np.ndarray] = []
        while sum(map(len, parts)) < len(chunk):
            parts.append(next(stream)[1][0])
        yield parts[0] if len(parts) == 1 else np.concatenate(parts)


def embed(
    encoder: EncoderNetwork,
    source: TileSource,
    depths: Sequence[Depth],
    *,
    further: Sequence[TileSource] = (),
    orientations: int = 1,
    batch_size: int,
    device: torch.device,
    precision: str = "fp32",
    index: np.ndarray | None = None,
    progress: bool = False,
    description: str = "embed tiles",
    max_memory: int | None = None,
    folder: Path | None = None,
    half: bool = False,
    cached: Sequence[CachedActivations] = (),
    tokens: TokensBetweenBlocks | None = None,
) -> Mapping[Depth, np.ndarray]:
    """Embed tiles; return one float32 array (n, d) per entry of `depths`, in the order of `index`.

    With `further` tiles, the features of all fields of view are concatenated, (n, fields * d).

    Parameters
    ----------
    encoder
        The encoder, moved to `device`.
    source
        The tiles.
    depths
        Block numbers whose features are concatenated; None is the encoder's own output.
    further
        Tiles of wider fields of view.
    orientations
        Test-time augmentation: number of orientations of a tile to average the features over.
    batch_size
        Tiles per batch.
    device, precision
        See :func:`resolve_device` and :func:`autocast`.
    index
        Indices of the tiles to embed; all by default. They are read image chunk by image chunk, in any order.
    progress
        Show a progress bar.
    description
        Label of the progress bar.
    max_memory
        Bytes of memory for the features; more are kept in temporary files, deleted with the result.
    folder
        Where files in half precision are made; the system's temporary folder by default.
    half
        Keep them in half precision in files, from which every access to a depth reads them: see
        :class:`FeatureFiles`. Otherwise arrays are mapped from files in full precision, in the temporary folder.
    cached
        Cached activations of the tiles: only the blocks after them run.
    tokens
        Tokens between blocks to collect as well; not for the encoder's own output.

    Raises
    ------
    OSError
        If the folder has not enough disk space.
    """
    index = np.arange(source.n) if index is None else np.asarray(index, dtype=np.int64)
    if not index.size:
        raise ValueError("There are no tiles to embed: none of the chosen rows has one (`pekasc.pp.tile` makes them).")
    sources = [source, *further]
    row = np.full(source.n, -1, dtype=np.int64)
    row[index] = np.arange(len(index))
    out: FeatureArrays | FeatureFiles | None = None
    run = BatchEncoder(encoder, depths, orientations, device, precision, cached[0].start if cached else 0, tokens)
    with tqdm(total=len(index) * len(sources), desc=description, unit="tile", disable=not progress) as bar:
        for scale, tiles_at in enumerate(sources):
            if scale and tokens is not None:  # those of the tile alone are cached
                tokens, run = None, BatchEncoder(encoder, depths, orientations, device, precision)
            order = tiles_at.reading_order[row[tiles_at.reading_order] >= 0]
            stream = batches(tiles_at, batch_size, index=order)
            if cached:
                stream = cached[scale].stream(order, batch_size, orientations)
            done = 0
            for positions, parts in run.over(stream):
                if tokens is not None:
                    tokens.put(slice(done, done + len(positions)), len(order), parts[len(depths) :])
                done += len(positions)
                if out is None:
                    widths = [values.shape[1] for values in parts[: len(depths)]]
                    out = room_for(
                        len(index), widths, depths, len(sources), max_memory, folder=folder, half=half
                    )  # fmt: skip
                for depth, values in zip(depths, parts[: len(depths)], strict=True):
                    out.put(depth, scale, row[positions], values)
                bar.update(len(positions))
            tiles_at.release()  # the next scale needs other chunks
    assert out is not None  # for the type checker: there is at least one tile
    return out
