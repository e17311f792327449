"""The state of a fit: what was computed so far, and features with what is attached to the encoder now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from peft import PeftConfig

from pekasc._settings import get_logger
from pekasc.models.encoders import Depth, EncoderNetwork
from pekasc.models.features import (
    KINDS,
    BatchEncoder,
    CachedActivations,
    CachePlan,
    EmbedJob,
    Inputs,
    TileInputs,
    TokensBetweenBlocks,
    cache_activations,
    embed,
    token_shape,
)
from pekasc.models.runtime import processes
from pekasc.models.selection._folds import InnerFold
from pekasc.models.selection._inputs import Data, Options
from pekasc.models.selection._state import Resume
from pekasc.models.teachers import TeacherModel
from pekasc.models.training import MOST, Method, last_block
from pekasc.tiling import TileSource, TileSpec

logger = get_logger(__name__)

ACTIVATIONS = "activations.zarr"


@dataclass
class Job:
    """Inputs and state of one fit, which embeds tiles with the adapter that is attached to the encoder at that time."""

    model: EncoderNetwork
    spec: TileSpec
    data: Data
    teacher: TeacherModel | None
    options: Options
    folds: list[InnerFold]
    local: np.ndarray  # boolean mask of the tiles of this process
    resume: Resume
    cached: list[CachedActivations] = field(default_factory=list)  # by scale, once the first adapted block is known
    tokens: TokensBetweenBlocks | None = None  # collected in the first pass, to be cached
    _widths: dict[Depth, int] = field(default_factory=dict)

    def embed_first(self, depths: Sequence[Depth]) -> dict[Depth, np.ndarray]:
        """Return frozen features, and keep tokens between blocks to be cached later, if they fit in memory.

        This saves a second pass through the frozen blocks. The number of frozen blocks depends on the depth, which is
        chosen on these features, so tokens are kept for every candidate.
        """
        o = self.options
        if o.method is not None and o.compute.cached_activations is not None and self._why_not_cached(o.method) is None:
            starts = sorted(
                {_first_block(self.model, depth, o.recipe.blocks) for depth in depths if depth is not None} - {0}
            )
            dtype: torch.dtype = getattr(torch, KINDS[o.compute.cached_activations])
            self.model.to(o.device)
            each = int(np.prod(token_shape(self.model, o.precision))) * dtype.itemsize * int(self.local.sum())
            most = each * len(self.sources) * max(len(starts) * o.readout.orientations, o.recipe.n_views)
            if starts and most <= o.max_memory:
                self.tokens = TokensBetweenBlocks(starts, dtype)
        return self.embed(depths, bar=True)

    def embed(self, depths: Sequence[Depth], bar: bool = False, n_kept: int = 1) -> dict[Depth, np.ndarray]:
        """Return features of all training tiles; `n_kept` such results share the memory limit."""
        o, own = self.options, np.flatnonzero(self.local)
        n = len(own) * len(self.sources) * o.readout.orientations
        with o.profile.stage("encoding", n), processes.raise_together():
            made = embed(
                self.model,
                self.data.tiles,
                depths,
                further=self.data.further,
                orientations=o.readout.orientations,
                batch_size=o.compute.embed_batch_size,
                device=o.device,
                precision=o.precision,
                progress=o.progress and bar,
                max_memory=o.max_memory // n_kept,
                index=own,
                cached=self.cached,
                tokens=self.tokens,
            )
        if processes.n_ranks() == 1:
            return made
        return {depth: self._gathered(values, own) for depth, values in made.items()}

    def shape(self, depth: Depth) -> tuple[int, int]:
        """Return the number of training spots, and of their features at a depth."""
        if depth not in self._widths:
            o, side = self.options, self.spec.tile_px
            run = BatchEncoder(self.model.to(o.device), [depth], 1, o.device, o.precision)
            self._widths[depth] = run.features(np.zeros((1, side, side, 3), np.uint8)).shape[1]
        return len(self.local), len(self.sources) * self._widths[depth]

    def features_after(
        self, training: str, epoch: int, depth: Depth, known: bool = False, n_kept: int = 1
    ) -> np.ndarray:
        """Return features after an epoch of a training; `known` ones are read from the checkpoints of the fit."""
        name = f"{training}/epoch-{epoch}"
        if known:
            return self.resume.finished(name, *self.shape(depth))
        return self.resume.put(name, self.embed([depth], n_kept=n_kept)[depth])

    def _gathered(self, values: np.ndarray, own: np.ndarray) -> np.ndarray:
        whole = np.zeros((len(self.local), values.shape[1]), dtype=np.float32)
        whole[own] = values
        return processes.gather_rows(whole, self.options.device)

    @property
    def sources(self) -> list[TileSource]:
        """Tiles at every scale."""
        return [self.data.tiles, *self.data.further]

    def _why_not_cached(self, method: Method) -> str | None:
        """Return why activations of the frozen blocks cannot be cached, or None."""
        if not self.model.splits:
            return "those of this encoder cannot be run one by one"
        return "the method trains biases of all blocks" if getattr(method, "bias", "none") == "all" else None

    def freeze(self, depth: Depth, blocks: str | int, config: PeftConfig) -> None:
        """Cache the activations entering the first adapted block, for all trainings and features of this fit."""
        o, start = self.options, _first_block(self.model, depth, blocks)
        tokens, self.tokens = self.tokens, None
        if tokens is not None:  # free memory for the other orientations first
            tokens.rows = {name: rows for name, rows in tokens.rows.items() if name[1] == start}
        if o.compute.cached_activations is None or blocks == "all":
            return
        if not start:
            if int(blocks) < last_block(self.model, depth):
                logger.hint("All blocks run in every epoch, the frozen ones too: features are taken after block 1.")
            return
        if (why := self._why_not_cached(config)) is not None:
            logger.hint("All blocks run in every epoch, the frozen ones too: %s.", why)
            return
        own = np.flatnonzero(self.local)
        job = EmbedJob(
            self.model.encoder,
            self.model.digest,
            self.spec.tile_px,
            (start,),
            1,
            o.compute.embed_batch_size,
            str(o.device),
            o.precision,
        )
        for i, source in enumerate(self.sources):
            # training uses the first scale only, the others need no augmentation
            views = max(o.readout.orientations, o.recipe.n_views if i == 0 else 1)
            plan = CachePlan(
                start, views, o.compute.cached_activations, o.compute.embed_batch_size, o.device, o.precision,
                o.max_memory // len(self.sources), o.progress,
                # with `resume`, beside the checkpoints, so that a resumed fit finds it
                self.resume.folder(ACTIVATIONS) if o.compute.cache is None else Path(o.compute.cache) / ACTIVATIONS,
                job.digest(self.model), processes.n_on_machine(),
            )  # fmt: skip
            known = {} if tokens is None else {v: r for (s, n, v), r in tokens.rows.items() if (s, n) == (i, start)}
            with o.profile.stage("encoding", len(own) * (views - len(known))), processes.raise_together():
                self.cached.append(cache_activations(self.model, source, own, plan, known))

    @property
    def inputs(self) -> Inputs:
        """Training inputs: cached activations, or the tiles."""
        return self.cached[0] if self.cached else TileInputs(self.data.tiles)


def _first_block(model: EncoderNetwork, depth: Depth, blocks: str | int) -> int:
    """Return the number of blocks before the first adapted one, and before the first whose features are used."""
    if blocks == "all":
        return 0
    start = max(0, last_block(model, depth) - (MOST if blocks == "auto" else int(blocks)))
    return start if depth is None else min(start, min(depth) - 1)
