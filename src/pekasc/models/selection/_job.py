"""The state of a fit: what was computed so far, and features with what is attached to the encoder now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig

from pekasc._settings import get_logger
from pekasc.models.encoders import Depth, EncoderNetwork, depth_name
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
    cached: list[CachedActivations] = field(default_factory=list)  # of the tiles, once the first adapted block is known
    tokens: TokensBetweenBlocks | None = None  # collected in the first pass, to be cached
    _widths: dict[Depth, int] = field(default_factory=dict)

    def frozen(self, depths: Sequence[Depth]) -> Mapping[Depth, np.ndarray]:
        """Return frozen features of the tiles and of wider fields, (n, fields * d), from checkpoints where they are."""
        if self.resume.path is None:
            return self.embed_first(depths)
        made: list[Mapping[Depth, np.ndarray]] = []

        def of(depth: Depth) -> np.ndarray:
            if not made:
                made.append(self.embed_first(depths))
            return made[0][depth]

        fields = 1 + len(self.data.further)
        found = {}
        for depth in depths:
            n, width = self.shape(depth)
            found[depth] = self.resume.array(f"frozen/{depth_name(depth)}", partial(of, depth), n, fields * width)
        return found

    def embed_first(self, depths: Sequence[Depth]) -> Mapping[Depth, np.ndarray]:
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
            most = each * max(len(starts) * o.readout.orientations, o.recipe.n_views)
            if starts and most <= o.max_memory:
                self.tokens = TokensBetweenBlocks(starts, dtype)
        return self.embed(depths, bar=True, further=self.data.further, half=True)

    def embed(
        self,
        depths: Sequence[Depth],
        bar: bool = False,
        n_kept: int = 1,
        further: Sequence[TileSource] = (),
        half: bool = False,
    ) -> Mapping[Depth, np.ndarray]:
        """Return features of all training tiles; `n_kept` such results share the memory limit.

        More than fit are kept in files, `half` in half precision.
        """
        o, own = self.options, np.flatnonzero(self.local)
        n = len(own) * (1 + len(further)) * o.readout.orientations
        with o.profile.stage("encoding", n), processes.raise_together():
            made = embed(
                self.model,
                self.data.tiles,
                depths,
                further=further,
                **self.how,
                progress=o.progress and bar,
                max_memory=o.max_memory // n_kept,
                folder=None if o.compute.cache is None else Path(o.compute.cache),
                half=half,
                index=own,
                cached=self.cached,
                tokens=self.tokens,
            )
        if processes.n_ranks() == 1:
            return made
        return {depth: self._gathered(values, own) for depth, values in made.items()}

    @property
    def how(self) -> dict[str, Any]:
        """How tiles are embedded: orientations, batch size, device and precision."""
        o = self.options
        return {
            "orientations": o.readout.orientations, "batch_size": o.compute.embed_batch_size, "device": o.device,
            "precision": o.precision,
        }  # fmt: skip

    def shape(self, depth: Depth) -> tuple[int, int]:
        """Return the number of training spots, and of the features of their tiles at a depth."""
        if depth not in self._widths:
            o, side = self.options, self.spec.tile_px
            run = BatchEncoder(self.model.to(o.device), [depth], 1, o.device, o.precision)
            self._widths[depth] = run.features(np.zeros((1, side, side, 3), np.uint8)).shape[1]
        return len(self.local), self._widths[depth]

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
            tokens.rows = {name: rows for name, rows in tokens.rows.items() if name[0] == start}
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
        plan = CachePlan(
            start, max(o.readout.orientations, o.recipe.n_views), o.compute.cached_activations,
            o.compute.embed_batch_size, o.device, o.precision, o.max_memory, o.progress,
            # with `resume`, beside the checkpoints, so that a resumed fit finds it
            self.resume.folder(ACTIVATIONS) if o.compute.cache is None else Path(o.compute.cache) / ACTIVATIONS,
            job.digest(self.model), processes.n_on_machine(),
        )  # fmt: skip
        known = {} if tokens is None else {v: r for (s, v), r in tokens.rows.items() if s == start}
        with o.profile.stage("encoding", len(own) * (plan.n_views - len(known))), processes.raise_together():
            self.cached.append(cache_activations(self.model, self.data.tiles, own, plan, known))

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
