"""Embed chunks of tiles, in this process or on the workers of a Dask cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from enum import Enum
from threading import Lock
from typing import Any, Protocol
from uuid import uuid4

import numpy as np
import torch
from peft import PeftConfig

from pekasc._digests import sha256
from pekasc._sample import evenly_spaced
from pekasc.models.encoders import Depth, Encoder, EncoderNetwork
from pekasc.models.features._embed import BatchEncoder, embed_chunks
from pekasc.models.features._reading import ReadingEncoder
from pekasc.models.heads import Reading
from pekasc.models.runtime import array_parts, resolve_device, tensor_parts
from pekasc.models.trust import Novelty
from pekasc.tiling import PatchReader, TileReader, TileStream

# part of the digest: increase it whenever a change of the code changes tiles or features by more than rounding
_VERSION = 1
_SAMPLE = 64

Reader = TileReader | PatchReader
Piece = tuple[int, np.ndarray]  # index of the reader, and indices of its tiles


class AdaptedEncoder(Protocol):
    """The part of an `Adapter` that decides the features."""

    @property
    def encoder(self) -> Encoder:
        """Description of the encoder."""
        ...

    @property
    def config(self) -> PeftConfig | None:
        """The adapter's configuration."""
        ...

    @property
    def weights(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Tensors of the adapter by kind."""
        ...

    @property
    def others(self) -> Sequence[tuple[PeftConfig, Mapping[str, torch.Tensor]]]:
        """Configuration and weights of the further adapters of an ensemble."""
        ...

    @property
    def depth(self) -> Depth:
        """Depth of the adapted features."""
        ...

    def network(self) -> EncoderNetwork:
        """Return the encoder with the adapter attached."""
        ...


@dataclass(frozen=True, eq=False)
class EmbedJob:
    """Encoder and settings for embedding tiles, as they are sent to every process.

    Parameters
    ----------
    encoder
        Description of the encoder, or an adapter.
    encoder_digest
        SHA-256 of the encoder's weights, which every process checks.
    tile_px
        Pixels along the side of a tile.
    depth, orientations, batch_size, device, precision
        As in :func:`pekasc.tl.embed_tiles`.
    reading
        With an adapter: what a reading needs of a tile is embedded, see :class:`ReadingEncoder`, and not its features
        alone.
    field
        Number of the field of view of these tiles, for a reading.
    novelty
        Distance to the training tiles, for a reading, if it is wanted.
    """

    encoder: Encoder | AdaptedEncoder
    encoder_digest: str
    tile_px: int
    depth: Depth
    orientations: int
    batch_size: int
    device: str
    precision: str
    reading: Reading | None = None
    field: int = 0
    novelty: Novelty | None = None
    token: str = dataclass_field(default_factory=lambda: uuid4().hex)  # identifies the job on a worker

    def model(self) -> EncoderNetwork:
        """Load the encoder, and attach the adapter if there is one.

        Raises
        ------
        ValueError
            If this process finds other weights than `encoder_digest`.
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
        """Move the encoder to its device."""
        device = resolve_device(self.device)
        if self.reading is not None:
            return ReadingEncoder(
                model, self.reading, self.field, self.depth, self.orientations, device, self.precision, self.novelty
            )
        return BatchEncoder(model, [self.depth], self.orientations, device, self.precision)

    def digest(self, model: EncoderNetwork) -> str:
        """Return the SHA-256 of everything that the features depend on, apart from the tiles and the batch size."""
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
            for config, weights in ((self.encoder.config, self.encoder.weights["adapter"]), *self.encoder.others):
                parts += [_canonical(config.to_dict()), *tensor_parts(weights)]
        if self.reading is not None:
            # what is beyond scores, such as the map to genes, is no part of what is stored
            blocks = [block.maps for member in self.reading.members for block in member.head.blocks]
            parts += [f"field {self.field}", *array_parts(blocks)]
            if self.novelty is not None and self.field == 0:
                parts += array_parts((self.novelty.depths, self.novelty.distance))
        return sha256(*parts)


def _canonical(value: Any) -> str:
    """Return JSON that is identical in every process, with sets sorted.

    Raises
    ------
    TypeError
        If a value cannot be serialised: a digest must not depend on the repr of an object.
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
    """Return the number of features of a tile, from a forward pass of an empty tile on the CPU."""
    run = replace(job, orientations=1, device="cpu", precision="fp32").run(model)
    return run.features(np.zeros((1, job.tile_px, job.tile_px, 3), np.uint8)).shape[1]


def sample_digest(reader: Reader) -> str:
    """Return the SHA-256 of at most 64 tiles spread over the section, to tell images apart.

    They are read from the same pyramid level as for the features.
    """
    return sha256(reader.read(reader.canonical_order[evenly_spaced(reader.n, _SAMPLE)]))


def embed_pieces(
    job: EmbedJob, model: EncoderNetwork, readers: Sequence[Reader], pieces: Sequence[Piece], client: Any
) -> Iterator[tuple[int, np.ndarray]]:
    """Embed pieces of several readers; yield the index and the features of each piece as it is finished.

    With a :class:`distributed.Client`, each piece is one task, which reads and embeds its tiles on a worker and is
    repeated if the worker dies. Without one, pieces are embedded in this process, in their order, by the same code.
    """
    if client is None:
        stream = TileStream(readers)
        chunks = [stream.offsets[reader] + index for reader, index in pieces]
        yield from enumerate(embed_chunks(job.run(model), stream, chunks, job.batch_size))
        return
    from distributed import as_completed

    # tasks instead of scattered data: Dask recomputes them if the worker that held them dies
    shared = client.submit(_identity, job, pure=False)
    sources = {i: client.submit(_identity, readers[i], pure=False) for i in sorted({reader for reader, _ in pieces})}
    # workers compare a sample of the pixels with this process: they might find another file at the same path
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


def _identity(value: Any) -> Any:
    return value


@dataclass
class _WorkerState:
    """Encoder and reader that a worker keeps between the pieces of one call."""

    run: BatchEncoder
    reader: Reader | None = None
    checked: set[str] = dataclass_field(default_factory=set)


_STATES: dict[str, _WorkerState] = {}
_LOADING = Lock()


def _embed_piece(job: EmbedJob, reader: Reader, sample: str, index: np.ndarray) -> np.ndarray:
    """Embed the tiles of one piece on a worker, which keeps the encoder for later pieces."""
    with _LOADING:
        if job.token not in _STATES:
            _STATES[job.token] = _WorkerState(job.run(job.model()))
        state = _STATES[job.token]
        if state.reader is not None and state.reader is not reader:
            state.reader.release()  # decoded chunks of one section at a time
        state.reader = reader
        if sample not in state.checked:
            if sample_digest(reader) != sample:
                raise OSError(
                    f"A worker reads other pixels than the process that made the call{_label(reader)}: all workers "
                    "need the same image at the same path."
                )
            state.checked.add(sample)
    return next(embed_chunks(state.run, reader, [index], job.batch_size))


def _label(reader: Reader) -> str:
    label = getattr(reader, "label", "")
    return f" in {label}" if label else ""


def _forget(token: str) -> None:
    state = _STATES.pop(token, None)
    if state is not None and state.reader is not None:
        state.reader.release()
