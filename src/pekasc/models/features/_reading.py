"""Embed tiles for an adapter's reading: frozen and adapted features from one pass through the shared blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from pekasc.models.encoders import VIEWS, Depth, EncoderNetwork, orient_tensor
from pekasc.models.features._embed import BatchEncoder, features_of
from pekasc.models.heads import Reading, Source
from pekasc.models.runtime import autocast


def _tuned(model: EncoderNetwork) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.model.named_modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def without_adapter(model: EncoderNetwork) -> Iterator[None]:
    """Run the encoder without the adapter that is attached to it, within the block."""
    layers = _tuned(model)
    trained = [(parameter, parameter.data) for parameter, _ in model.originals]
    with torch.inference_mode(False):  # what is moved to another device here must serve outside of it as well
        before = [value.to(parameter.device) for parameter, value in model.originals]
    for _, layer in layers:
        layer.enable_adapters(False)
    for (parameter, _), value in zip(trained, before, strict=True):
        parameter.data = value
    try:
        yield
    finally:
        for parameter, value in trained:
            parameter.data = value
        for _, layer in layers:
            layer.enable_adapters(True)
            layer.requires_grad_(False)


def first_adapted(model: EncoderNetwork) -> int:
    """Return the number of blocks before the first adapted one; 0 where blocks cannot be told apart."""
    if not model.splits or model.originals:  # ``bias="all"`` trains biases of every block
        return 0
    numbers = []
    for name, _ in _tuned(model):
        parts = name.split(".")
        at = [int(parts[i + 1]) for i, part in enumerate(parts[:-1]) if part == "blocks" and parts[i + 1].isdigit()]
        numbers.append(at[0] if at else 0)
    return min(numbers, default=0)


class ReadingEncoder(BatchEncoder):
    """Embed batches of tiles of one field of view into what a reading needs of them.

    That is, side by side: the adapted features at `depth` (for the tiles themselves), and their scores for the reading,
    as a tile and, with spatial context, as a neighbour. Features of a depth do not leave the batch: a tile takes the
    same room however many depths are averaged.

    Parameters
    ----------
    encoder
        The encoder, with its adapter attached, moved to `device`.
    reading
        The reading.
    field
        Number of the field of view.
    depth
        Depth of the adapted features, which come first for field 0.
    orientations, device, precision
        See :class:`BatchEncoder`.
    """

    def __init__(
        self,
        encoder: EncoderNetwork,
        reading: Reading,
        field: int,
        depth: Depth,
        orientations: int,
        device: torch.device,
        precision: str,
    ) -> None:
        super().__init__(encoder, [depth], orientations, device, precision)
        self.reading = reading
        sources = [source for source in reading.sources if source.field == field]
        self.own = depth if field == 0 else None
        self.field = field
        self.frozen = [source for source in sources if source.network == "frozen"]
        self.adapted = [source for source in sources if source.network == "adapted"]
        self.has_adapter = bool(_tuned(encoder))

    def over(self, stream: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
        """Iterate over batches: indices of the tiles, and what the reading needs of them, (k, width) float32."""
        for positions, parts in super().over(stream):
            yield positions, [self._read(parts, len(positions))]

    def features(self, tiles: np.ndarray) -> np.ndarray:
        """Return what the reading needs of some tiles, (k, width) float32."""
        return self._read([part.cpu().numpy() for part in self._features(tiles)], len(tiles))

    def _read(self, parts: Sequence[np.ndarray], n: int) -> np.ndarray:
        first = [parts[0]] if self.field == 0 else []
        features = dict(zip([*self.adapted, *self.frozen], parts[len(first) :], strict=True))
        if not features:  # no member reads this field
            features = {Source("frozen", self.field, ()): np.zeros((n, 0), np.float32)}
        scores = [self.reading.scores(features)]
        if self.reading.n_around:
            scores.append(self.reading.scores(features, around=True))
        return np.concatenate([*first, *scores], axis=1)

    def _forward(self, tiles: np.ndarray) -> list[torch.Tensor]:
        x = torch.from_numpy(np.ascontiguousarray(tiles))  # a reversed array has no tensor
        if self.device.type == "cuda":
            x = x.pin_memory().to(self.device, non_blocking=True)
        total: list[torch.Tensor] = []
        with torch.inference_mode(), autocast(self.device, self.precision):
            x = self.encoder.normalise(x.to(self.device))
            for number in VIEWS[: self.orientations]:
                parts = self._both(orient_tensor(x, number, (-2, -1)) if number else x)
                total = [s + part for s, part in zip(total, parts, strict=True)] if total else parts
            return [sums / self.orientations for sums in total]

    def _both(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the adapted features at `depth` and of the sources, then the frozen ones."""
        adapted_at = [source.depth for source in self.adapted]
        if self.field == 0:
            adapted_at = [self.depths[0], *adapted_at]
        frozen_at = [source.depth for source in self.frozen]
        model = self.encoder
        if not self.has_adapter:
            return [part.float() for part in features_of(model, x, [*adapted_at, *frozen_at])]
        start = first_adapted(model)
        shared: dict[int, torch.Tensor | None] = {}
        frozen: list[torch.Tensor] = []
        if frozen_at:
            deepest = max((max(d) for d in frozen_at if d is not None), default=0)
            shares = 0 < start < deepest and all(d is None or min(d) > start for d in adapted_at)
            shared = {start: None} if shares else {}
            with without_adapter(model):
                frozen = features_of(model, x, frozen_at, kept=shared or None)
        tokens = shared.get(start)
        if not adapted_at:
            adapted = []
        elif tokens is None:
            adapted = features_of(model, x, adapted_at)
        else:
            adapted = features_of(model, tokens, adapted_at, start)
        return [part.float() for part in (*adapted, *frozen)]
