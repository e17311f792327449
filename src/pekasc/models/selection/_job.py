"""What a fit is given, and its state: pure arrays."""

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
    EmbedJob,
    Inputs,
    Prefix,
    PrefixPlan,
    TileInputs,
    TokensBetweenBlocks,
    embed,
    make_prefix,
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
    """The state of one fit: what is known so far, and how to embed with what is in the encoder now."""

    model: EncoderNetwork
    spec: TileSpec
    data: Data
    teacher: TeacherModel | None
    options: Options
    folds: list[InnerFold]
    local: np.ndarray  # which tiles this process has, boolean
    resume: Resume
    prefixes: list[Prefix] = field(default_factory=list)  # of every scale, once the first adapted block is known
    tokens: TokensBetweenBlocks | None = None  # what the first pass left for the prefix

    def embed_first(self, depths: Sequence[Depth]) -> dict[Depth, np.ndarray]:
        """Return frozen features, and keep the tokens that may become the prefix, where all of them fit the memory.

        The pass goes through the same blocks. Which of them are frozen is known once the depth is chosen.
        """
        o = self.options
        if o.method is not None and o.compute.cached_activations is not None and self._why_whole(o.method) is None:
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
        """Return features of all training tiles; `n_kept` says how many such results are kept side by side."""
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
                prefixes=self.prefixes,
                tokens=self.tokens,
            )
        if processes.n_ranks() == 1:
            return made
        return {depth: self._of_all(values, own) for depth, values in made.items()}

    def features_after(
        self, training: str, epoch: int, depth: Depth, known: bool = False, n_kept: int = 1
    ) -> np.ndarray:
        """Return features with what is in the encoder after an epoch; `known` ones from the folder of the fit."""
        name = f"{training}/epoch-{epoch}"
        return self.resume.finished(name) if known else self.resume.put(name, self.embed([depth], n_kept=n_kept)[depth])

    def _of_all(self, values: np.ndarray, own: np.ndarray) -> np.ndarray:
        whole = np.zeros((len(self.local), values.shape[1]), dtype=np.float32)
        whole[own] = values
        return processes.gather_rows(whole, self.options.device)

    @property
    def sources(self) -> list[TileSource]:
        """Tiles at every scale."""
        return [self.data.tiles, *self.data.further]

    def _why_whole(self, method: Method) -> str | None:
        """Return why the frozen blocks cannot be run once for all, or None."""
        if not self.model.splits:
            return "this encoder's cannot be split"
        return "its configuration trains biases everywhere" if getattr(method, "bias", "none") == "all" else None

    def freeze(self, depth: Depth, blocks: str | int, config: PeftConfig) -> None:
        """Compute what enters the first adapted block, once for all trainings and the features after them."""
        o, start = self.options, _first_block(self.model, depth, blocks)
        tokens, self.tokens = self.tokens, None
        if tokens is not None:  # before there is room for the other orientations
            tokens.rows = {name: rows for name, rows in tokens.rows.items() if name[1] == start}
        if o.compute.cached_activations is None or blocks == "all":
            return
        if not start:
            if int(blocks) < last_block(self.model, depth):
                logger.hint("All blocks run in every epoch, the frozen ones too: features of block 1 are read.")
            return
        if (why := self._why_whole(config)) is not None:
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
            # only the first scale is trained on
            views = max(o.readout.orientations, o.recipe.n_views if i == 0 else 1)
            plan = PrefixPlan(
                start, views, o.compute.cached_activations, o.compute.embed_batch_size, o.device, o.precision,
                o.max_memory // len(self.sources), o.progress,
                # there, a run that goes on finds it
                self.resume.folder(ACTIVATIONS) if o.compute.cache is None else Path(o.compute.cache) / ACTIVATIONS,
                job.digest(self.model), processes.n_on_machine(),
            )  # fmt: skip
            known = {} if tokens is None else {v: r for (s, n, v), r in tokens.rows.items() if (s, n) == (i, start)}
            with o.profile.stage("encoding", len(own) * (views - len(known))), processes.raise_together():
                self.prefixes.append(make_prefix(self.model, source, own, plan, known))

    @property
    def inputs(self) -> Inputs:
        """What enters the trained blocks."""
        return self.prefixes[0] if self.prefixes else TileInputs(self.data.tiles)


def _first_block(model: EncoderNetwork, depth: Depth, blocks: str | int) -> int:
    """Return how many blocks nothing is learned in: those before the adapted ones and before the first that is read."""
    if blocks == "all":
        return 0
    start = max(0, last_block(model, depth) - (MOST if blocks == "auto" else int(blocks)))
    return start if depth is None else min(start, min(depth) - 1)
