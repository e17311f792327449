"""Embed tiles for an adapter's reading: frozen and adapted features from one pass through the shared blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from pekasc.models.encoders import VIEWS, Depth, EncoderNetwork, orient_tensor
from pekasc.models.features._embed import BatchEncoder
from pekasc.models.features._forward import (
    adapted_features,
    features_of,
    mean_of,
    shared_blocks,
    tuned_layers,
    without_adapter,
)
from pekasc.models.heads import Reading, Source
from pekasc.models.runtime import autocast
from pekasc.models.trust import Novelty


class ReadingEncoder(BatchEncoder):
    """Embed batches of tiles of one field of view into what a reading needs of them.

    That is, side by side: for the tiles themselves, the adapted features at `depth` (the mean over several adapters)
    and, with `novelty`, the distance to the training tiles; then their scores for the reading, as a tile and, with
    spatial context, as a neighbour. Features of a depth do not leave the batch: a tile takes the same room however many
    depths are averaged.

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
    novelty
        Distance to the training tiles, if it is wanted.
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
        novelty: Novelty | None = None,
    ) -> None:
        super().__init__(encoder, [depth], orientations, device, precision)
        self.reading = reading
        sources = [source for source in reading.sources if source.field == field]
        self.own = depth if field == 0 else None
        self.field = field
        self.novelty = novelty if field == 0 else None
        looks = [] if self.novelty is None else [Source("frozen", 0, depth) for depth in self.novelty.depths]
        frozen = [source for source in sources if source.network == "frozen"]
        self.frozen = list(dict.fromkeys([*frozen, *looks]))
        adapted = [source for source in sources if source.network == "adapted"]
        self.adapted = sorted(adapted, key=lambda source: source.adapter)  # as their features are made
        self.has_adapter = bool(tuned_layers(encoder))

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
        if self.novelty is not None:
            looks = [features[Source("frozen", 0, depth)] for depth in self.novelty.depths]
            first.append(self.novelty.distance(np.concatenate(looks, axis=1))[:, None])
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
        """Return the adapted features at `depth` (mean over adapters) and of the sources, then the frozen ones."""
        own = [self.depths[0]] if self.field == 0 else []
        frozen_at = [source.depth for source in self.frozen]
        model = self.encoder
        at = [
            [*own, *(source.depth for source in self.adapted if source.adapter == number)]
            for number in range(len(model.networks))
        ]
        if not self.has_adapter:
            return [part.float() for part in features_of(model, x, [*at[0], *frozen_at])]
        kept: dict[int, torch.Tensor | None] = {}
        frozen: list[torch.Tensor] = []
        start = shared_blocks(model, [depth for depths in at for depth in depths])
        if frozen_at:
            deepest = max((max(d) for d in frozen_at if d is not None), default=0)
            kept = {start: None} if 0 < start < deepest else {}
            with without_adapter(model):
                frozen = features_of(model, x, frozen_at, kept=kept or None)
        adapted = adapted_features(model, x, at, start, kept.get(start)) if any(at) else [[]]
        mean = [mean_of([parts[0] for parts in adapted])] if own else []
        return [*mean, *(part for parts in adapted for part in parts[len(own) :]), *(part.float() for part in frozen)]
