"""Run an encoder over tiles: devices, precision, and features in the order of the tiles."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from tqdm.auto import tqdm

from pekasc.models._choose import Depth
from pekasc.models._encoders import FrozenEncoder
from pekasc.tiling import TileSource, batches, check_temporary_room

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(device: str) -> torch.device:
    """Return the device; ``"auto"`` takes the first CUDA GPU if there is one, else the CPU, and logs it.

    Raises
    ------
    ValueError
        If the named device is not there.
    """
    if device == "auto":
        found = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        logger.info("Device: %s.", found)
        return found
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(f"`device={device!r}` cannot be used: {error}. Available: {available}.") from error
    return found


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the autocast context for `precision` (``"fp32"``, ``"bf16"``, ``"fp16"``)."""
    if precision not in PRECISIONS:
        raise ValueError(f"`precision={precision!r}` is not known. Choose one of {list(PRECISIONS)}.")
    dtype = PRECISIONS[precision]
    if dtype is torch.float16 and device.type == "cpu":
        raise ValueError('`precision="fp16"` needs a GPU: on the CPU take "fp32" or "bf16".')
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def features_of(encoder: FrozenEncoder, x: torch.Tensor, depths: Sequence[Depth]) -> list[torch.Tensor]:
    """Return features of normalised tiles for every entry of `depths`, from one pass through the encoder."""
    blocks = sorted({block for depth in depths if depth is not None for block in depth})
    layers = dict(zip(blocks, encoder(x, blocks), strict=True)) if blocks else {}
    return [
        encoder.own_output(x) if depth is None else torch.cat([layers[block] for block in depth], dim=1)
        for depth in depths
    ]


def embed(
    encoder: FrozenEncoder,
    source: TileSource,
    depths: Sequence[Depth],
    *,
    batch_size: int,
    device: torch.device,
    precision: str = "fp32",
    index: np.ndarray | None = None,
    progress: bool = False,
    description: str = "embed tiles",
    max_memory: int | None = None,
) -> dict[Depth, np.ndarray]:
    """Return features of tiles, one float32 array (n, d) per entry of `depths`, in the order of `index`.

    Parameters
    ----------
    encoder
        The encoder, moved to `device`.
    source
        Where tiles are read from.
    depths
        Block numbers whose features are concatenated; None is the encoder's own output.
    batch_size
        Tiles at once.
    device, precision
        See :func:`resolve_device` and :func:`autocast`.
    index
        Tiles to embed; all by default. They are read chunk by chunk, whatever their order here.
    progress
        Show a bar.
    description
        What the bar says.
    max_memory
        Bytes that the features may take in memory; beyond, they lie in temporary files, which go away with them.

    Raises
    ------
    OSError
        If the temporary folder has no room.
    """
    index = np.arange(source.n) if index is None else np.asarray(index, dtype=np.int64)
    if not index.size:
        raise ValueError("There are no tiles to embed.")
    row = np.full(source.n, -1, dtype=np.int64)
    row[index] = np.arange(len(index))
    order = source.reading_order[row[source.reading_order] >= 0]
    out: dict[Depth, np.ndarray] = {}
    encoder = encoder.to(device)
    stream = batches(source, batch_size, index=order)
    with torch.inference_mode(), tqdm(total=len(index), desc=description, unit="tile", disable=not progress) as bar:
        for positions, tiles in stream:
            x = encoder.normalise(torch.from_numpy(tiles).to(device))
            with autocast(device, precision):
                parts = features_of(encoder, x, depths)
            for depth, part in zip(depths, parts, strict=True):
                values = part.float().cpu().numpy()
                if depth not in out:
                    share = None if max_memory is None else max_memory // len(depths)
                    out[depth] = _room(len(index), values.shape[1], share)
                out[depth][row[positions]] = values
            bar.update(len(positions))
    return out


def _room(n: int, width: int, max_memory: int | None) -> np.ndarray:
    """Return an array for features, (n, width) float32: in memory, or in a temporary file without a name."""
    size = 4 * n * width
    if max_memory is None or size <= max_memory:
        return np.empty((n, width), dtype=np.float32)
    check_temporary_room(size, f"Features of {n} tiles")
    file = tempfile.TemporaryFile(prefix="pekasc-features-")
    return np.memmap(file, dtype=np.float32, mode="w+", shape=(n, width))
