"""Embedding in pieces: chunks of tiles, in this process or on the workers of a Dask cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from threading import Lock
from typing import Any, Protocol
from uuid import uuid4

import numpy as np
import torch
from peft import PeftConfig

from pekasc._digests import sha256
from pekasc.models.encoders import Depth, Encoder, EncoderNetwork
from pekasc.models.features._embed import BatchEncoder, embed_chunks
from pekasc.models.runtime import resolve_device, tensor_parts
from pekasc.tiling import PatchReader, TileReader, TileStream

# of what features are made with here: change it whenever tiles or features change by more than rounding
_VERSION = 1
_SAMPLE = 64

Reader = TileReader | PatchReader
Piece = tuple[int, np.ndarray]  # which reader, and the tiles' numbers there


class AdaptedEncoder(Protocol):
    """An encoder with an adapter, as far as features are concerned: a fitted `Adapter`."""

    @property
    def encoder(self) -> Encoder:
        """The encoder's row."""
        ...

    @property
    def config(self) -> PeftConfig | None:
        """The adapter's configuration."""
        ...

    @property
    def weights(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Its weights by kind."""
        ...

    def network(self) -> EncoderNetwork:
        """Return the encoder with the adapter attached."""
        ...


@dataclass(frozen=True, eq=False)
class EmbedJob:
    """How tiles become features: all that a process needs to know, but for the tiles.

    Parameters
    ----------
    encoder
        The encoder's row, or an adapter.
    encoder_digest
        SHA-256 of the encoder's weights, which every process compares with what it finds.
    tile_px
        Pixels along the side of a tile.
    depth, orientations, batch_size, device, precision
        As in :func:`pekasc.tl.embed_tiles`.
    """

    encoder: Encoder | AdaptedEncoder
    encoder_digest: str
    tile_px: int
    depth: Depth
    orientations: int
    batch_size: int
    device: str
    precision: str
    token: str = field(default_factory=lambda: uuid4().hex)  # tells the jobs of one worker apart

    def model(self) -> EncoderNetwork:
        """Build the encoder, with the adapter if there is one.

        Raises
        ------
        ValueError
            If its weights are others here.
        """
        if not isinstance(self.encoder, Encoder):
            return self.encoder.network()
        model = EncoderNetwork(self.encoder, self.tile_px)
        if model.digest != self.encoder_digest:
            raise ValueError(
                f"The weights of encoder {self.encoder.short!r} differ between processes: {model.digest[:12]} here, "
                f"{self.encoder_digest[:12]} where the call was made. Give every worker the same weights."
            )
        return model

    def run(self, model: EncoderNetwork) -> BatchEncoder:
        """Put the encoder on its device."""
        return BatchEncoder(model, [self.depth], self.orientations, resolve_device(self.device), self.precision)

    def digest(self, model: EncoderNetwork) -> str:
        """Return the SHA-256 of everything but the tiles that decides the features; the batch size does not."""
        facts = {
            "version": _VERSION,
            "architecture": model.encoder.name,
            "encoder": self.encoder_digest,
            "mean": model.mean.flatten().tolist(),
            "std": model.std.flatten().tolist(),
            "pooling": model.encoder.pooling,
            "model_kwargs": dict(model.encoder.model_kwargs),
            "tile_px": self.tile_px,
            "depth": None if self.depth is None else list(self.depth),
            "orientations": self.orientations,
            "precision": self.precision,
        }
        parts: list[str | np.ndarray] = [_canonical(facts)]
        if not isinstance(self.encoder, Encoder) and self.encoder.config is not None:
            parts += [_canonical(self.encoder.config.to_dict()), *tensor_parts(self.encoder.weights["adapter"])]
        return sha256(*parts)


def _canonical(value: Any) -> str:
    """Return JSON that is the same in every process: sets have no order of their own.

    Raises
    ------
    TypeError
        If a value has no such form: a digest must not depend on how something is printed.
    """

    def plain(item: Any) -> Any:
        if isinstance(item, set | frozenset):
            return sorted(map(str, item))
        if isinstance(item, Enum):
            return item.value
        if isinstance(item, torch.dtype | type):
            return str(item)
        raise TypeError(f"{type(item).__name__} cannot be part of a digest: {item!r}.")

    return json.dumps(value, sort_keys=True, default=plain)


def n_features(job: EmbedJob, model: EncoderNetwork) -> int:
    """Return the number of features of a tile, from a pass over an empty one on the CPU."""
    run = BatchEncoder(model, [job.depth], 1, torch.device("cpu"), "fp32")
    return run.features(np.zeros((1, job.tile_px, job.tile_px, 3), np.uint8)).shape[1]


def sample_digest(reader: Reader) -> str:
    """Return the SHA-256 of some tiles, as they are read: as many as are needed to tell one picture from another.

    At most 64, spread over the section; no tile is read at another level than the features are made from.
    """
    some = np.unique(np.linspace(0, reader.n - 1, min(reader.n, _SAMPLE)).astype(np.int64))
    return sha256(reader.read(reader.canonical_order[some]))


def embed_pieces(
    job: EmbedJob, model: EncoderNetwork, readers: Sequence[Reader], pieces: Sequence[Piece], client: Any
) -> Iterator[tuple[int, np.ndarray]]:
    """Embed pieces of several readers; return each one's number and features as it is done.

    With a :class:`distributed.Client` each piece is one task, which reads its tiles and has them embedded where it
    runs; Dask runs it again where its worker died. Without one they are done here, in their order, by the same code.
    """
    if client is None:
        stream = TileStream(readers)
        chunks = [stream.offsets[reader] + index for reader, index in pieces]
        yield from enumerate(embed_chunks(job.run(model), stream, chunks, job.batch_size))
        return
    from distributed import as_completed

    # as tasks, not as scattered data: Dask makes them again when the worker that held them dies
    shared = client.submit(_same, job, pure=False)
    sources = {i: client.submit(_same, readers[i], pure=False) for i in sorted({reader for reader, _ in pieces})}
    # a worker that sees other pixels than this process, or none, must not go on
    sample = {i: sample_digest(readers[i]) for i in sources}
    futures = [client.submit(_embed_piece, shared, sources[i], sample[i], index, pure=False) for i, index in pieces]
    numbers = {future.key: number for number, future in enumerate(futures)}
    try:
        for future in as_completed(futures):
            yield numbers[future.key], future.result()
            future.release()
    finally:
        client.cancel(futures)
        client.run(_forget, job.token, on_error="ignore")


def _same(value: Any) -> Any:
    return value


@dataclass
class _Kept:
    """What a worker keeps between the pieces of one call."""

    run: BatchEncoder
    reader: Reader | None = None
    checked: set[str] = field(default_factory=set)


_KEPT: dict[str, _Kept] = {}
_LOADING = Lock()


def _embed_piece(job: EmbedJob, reader: Reader, sample: str, index: np.ndarray) -> np.ndarray:
    """Embed the tiles of one piece, in a worker that keeps the encoder for its next ones."""
    with _LOADING:
        if job.token not in _KEPT:
            _KEPT[job.token] = _Kept(job.run(job.model()))
        kept = _KEPT[job.token]
        if kept.reader is not None and kept.reader is not reader:
            kept.reader.release()  # decoded chunks of one section at a time
        kept.reader = reader
        if sample not in kept.checked:
            if sample_digest(reader) != sample:
                raise OSError(
                    f"A worker reads other pixels than the process that asks{_of(reader)}: give all workers the same "
                    "image, at the same place."
                )
            kept.checked.add(sample)
    return next(embed_chunks(kept.run, reader, [index], job.batch_size))


def _of(reader: Reader) -> str:
    label = getattr(reader, "label", "")
    return f" in {label}" if label else ""


def _forget(token: str) -> None:
    kept = _KEPT.pop(token, None)
    if kept is not None and kept.reader is not None:
        kept.reader.release()
