"""What a fit is given, and its state: pure arrays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig
from scipy import sparse

from pekasc._expression import Matrix
from pekasc._settings import get_logger
from pekasc.models import _ranks
from pekasc.models._auto import MOST
from pekasc.models._choose import Depth
from pekasc.models._context import with_context
from pekasc.models._embed import TokensOnTheWay, embed
from pekasc.models._embed_job import EmbedJob
from pekasc.models._encoders import Encoder, FrozenEncoder
from pekasc.models._folds import InnerFold
from pekasc.models._methods import Method, last_block
from pekasc.models._peka import Recipe
from pekasc.models._prefix import KINDS, Inputs, Prefix, PrefixPlan, TileInputs, make_prefix, tiles_digest, token_shape
from pekasc.models._profile import Profile
from pekasc.models._results import fingerprint, plain
from pekasc.models._resume import Resume
from pekasc.models._teachers import Teacher
from pekasc.models._training import Engine
from pekasc.tiling import TileSource, TileSpec

logger = get_logger(__name__)


@dataclass(frozen=True)
class Data:
    """Everything about the training spots, in one order; nothing else is ever looked at.

    Parameters
    ----------
    tiles
        Their tiles.
    expression
        What the head learns, spots x genes.
    genes
        Names of those genes.
    groups, sections
        Group and section of every spot.
    coords_um
        Positions in the section, (n, 2).
    further
        The same tiles at every further scale.
    mine
        Numbers of the tiles that this process has; all by default.
    """

    tiles: TileSource
    expression: Matrix
    genes: Sequence[str]
    groups: np.ndarray
    sections: np.ndarray
    coords_um: np.ndarray
    further: Sequence[TileSource] = ()
    mine: np.ndarray | None = None


@dataclass(frozen=True)
class Options:
    """How to fit; see :func:`pekasc.tl.fit_adapter` for what each means."""

    method: Method
    blocks: str | int
    depth: Depth | str
    recipe: Recipe
    n_components: int | None
    batch_size: int
    device: torch.device
    precision: str
    random_state: int
    progress: bool
    max_memory: int | None = None
    scales: tuple[float, ...] = (1.0,)
    orientations: int = 1
    prefix: str | None = "fp16"
    store: Path | None = None
    resume: Path | None = None
    engine: Engine | None = None  # made of device, precision and progress where it is not given
    profile: Profile = field(default_factory=Profile)


@dataclass(frozen=True)
class Reader:
    """What reads features: a head, and what it sees beside them. Several can share one training."""

    head: str = "ridge"
    context_um: float | None = None
    beside_frozen: bool = False  # adapted features beside the frozen ones


@dataclass
class Job:
    """The state of one fit: what is known so far, and how to embed with what is in the encoder now."""

    model: FrozenEncoder
    encoder: Encoder
    spec: TileSpec
    data: Data
    teacher: Teacher
    options: Options
    folds: list[InnerFold]
    mine: np.ndarray  # which tiles this process has, boolean
    resume: Resume
    prefixes: list[Prefix] = field(default_factory=list)  # of every scale, once the first adapted block is known
    tokens: TokensOnTheWay | None = None  # what the first pass left for the prefix

    def embed_first(self, depths: Sequence[Depth]) -> dict[Depth, np.ndarray]:
        """Return frozen features, and keep the tokens that may become the prefix, where all of them fit the memory.

        The pass goes through the same blocks. Which of them are frozen is known once the depth is chosen.
        """
        o = self.options
        if o.method is not None and o.prefix is not None and self._why_whole(o.method) is None:
            starts = sorted({_first_block(self.model, depth, o.blocks) for depth in depths if depth is not None} - {0})
            dtype: torch.dtype = getattr(torch, KINDS[o.prefix])
            self.model.to(o.device)
            each = int(np.prod(token_shape(self.model, o.precision))) * dtype.itemsize * int(self.mine.sum())
            most = each * len(self.sources) * max(len(starts) * o.orientations, o.recipe.n_views)
            if starts and (o.max_memory is None or most <= o.max_memory):
                self.tokens = TokensOnTheWay(starts, dtype)
        return self.embed(depths, bar=True)

    def embed(self, depths: Sequence[Depth], bar: bool = False, n_kept: int = 1) -> dict[Depth, np.ndarray]:
        """Return features of all training tiles; `n_kept` says how many such results are kept side by side."""
        o, own = self.options, np.flatnonzero(self.mine)
        n = len(own) * len(self.sources) * o.orientations
        with o.profile.stage("encoding", n), _ranks.together():
            made = embed(
                self.model,
                self.data.tiles,
                depths,
                further=self.data.further,
                orientations=o.orientations,
                batch_size=o.batch_size,
                device=o.device,
                precision=o.precision,
                progress=o.progress and bar,
                max_memory=None if o.max_memory is None else o.max_memory // n_kept,
                index=own,
                prefixes=self.prefixes,
                tokens=self.tokens,
            )
        if _ranks.n_ranks() == 1:
            return made
        return {depth: self._of_all(values, own) for depth, values in made.items()}

    def features_after(
        self, training: str, epoch: int, depth: Depth, known: bool = False, n_kept: int = 1
    ) -> np.ndarray:
        """Return features with what is in the encoder after an epoch; `known` ones from the folder of the fit."""
        name = f"{training}/epoch-{epoch}"
        return self.resume.finished(name) if known else self.resume.put(name, self.embed([depth], n_kept=n_kept)[depth])

    def _of_all(self, values: np.ndarray, own: np.ndarray) -> np.ndarray:
        whole = np.zeros((len(self.mine), values.shape[1]), dtype=np.float32)
        whole[own] = values
        return _ranks.gathered(whole, self.options.device)

    @property
    def sources(self) -> list[TileSource]:
        """Tiles at every scale."""
        return [self.data.tiles, *self.data.further]

    @property
    def engine(self) -> Engine:
        """How trainings run."""
        return _engine_of(self.options)

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
        if o.prefix is None or blocks == "all":
            return
        if not start:
            if int(blocks) < last_block(self.model, depth):
                logger.hint("All blocks run in every epoch, the frozen ones too: features of block 1 are read.")
            return
        if (why := self._why_whole(config)) is not None:
            logger.hint("All blocks run in every epoch, the frozen ones too: %s.", why)
            return
        own = np.flatnonzero(self.mine)
        job = EmbedJob(
            self.encoder, self.model.digest, self.spec.tile_px, (start,), 1, o.batch_size, str(o.device), o.precision
        )
        for i, source in enumerate(self.sources):
            # only the first scale is trained on
            views = max(o.orientations, o.recipe.n_views if i == 0 else 1)
            plan = PrefixPlan(
                start, views, o.prefix, o.batch_size, o.device, o.precision,
                None if o.max_memory is None else o.max_memory // len(self.sources), o.progress,
                # there, a run that goes on finds it
                self.resume.folder("prefix.zarr") if o.store is None else o.store,
                job.digest(self.model), _ranks.n_here(),
            )  # fmt: skip
            known = {} if tokens is None else {v: r for (s, n, v), r in tokens.rows.items() if (s, n) == (i, start)}
            with o.profile.stage("encoding", len(own) * (views - len(known))), _ranks.together():
                self.prefixes.append(make_prefix(self.model, source, own, plan, known))

    @property
    def inputs(self) -> Inputs:
        """What enters the trained blocks."""
        return self.prefixes[0] if self.prefixes else TileInputs(self.data.tiles)

    def seen(
        self,
        reader: Reader,
        features: np.ndarray,
        frozen: np.ndarray | None = None,
        fold: InnerFold | None = None,
    ) -> np.ndarray:
        """Return what a head reads: the features of the tiles, with their context on their side of an inner fold."""
        if reader.beside_frozen and frozen is not None:
            features = np.concatenate([frozen, features], axis=1)
        return with_context(features, self.data.coords_um, self.data.sections, reader.context_um, fold)


def _first_block(model: FrozenEncoder, depth: Depth, blocks: str | int) -> int:
    """Return how many blocks nothing is learned in: those before the adapted ones and before the first that is read."""
    if blocks == "all":
        return 0
    start = max(0, last_block(model, depth) - (MOST if blocks == "auto" else int(blocks)))
    return start if depth is None else min(start, min(depth) - 1)


def _engine_of(options: Options) -> Engine:
    if options.engine is None:
        return Engine(options.device, options.precision, options.progress)
    return options.engine


def _matrix_print(matrix: Matrix) -> str:
    """Return the fingerprint of a dense or sparse matrix."""
    if sparse.issparse(matrix):
        return fingerprint(matrix.data, matrix.indices, matrix.indptr)
    return fingerprint(np.asarray(matrix))


def _inputs_of(teacher: Teacher) -> list[str]:
    """Return digests of the matrices that a teacher is fitted on, which may be of other genes than are predicted."""
    found = []
    for name, value in sorted(vars(teacher).items()):
        if sparse.issparse(value) or isinstance(value, np.ndarray):
            found.append(f"{name} {_matrix_print(value)}")
        elif isinstance(value, int | float | str | None):
            found.append(f"{name} {value}")
    return found


_OF_TRAINER = ("precision", "gradient_clip_val", "gradient_clip_algorithm")  # what of it changes numbers


def settings_of(
    encoder: Encoder, model: FrozenEncoder, data: Data, teacher: Teacher, options: Options, readers: Sequence[Reader]
) -> dict[str, Any]:
    """Return what decides the result of a fit, for its folder: plain values, and digests of the data."""
    o = options
    engine = _engine_of(o)
    job = EmbedJob(encoder, model.digest, model.tile_px, None, 1, o.batch_size, str(o.device), o.precision)
    method = o.method.to_dict() if isinstance(o.method, PeftConfig) else o.method
    own = np.arange(data.tiles.n) if data.mine is None else data.mine
    return {
        "encoder": job.digest(model),
        "adapter_targets": encoder.adapter_targets,
        "method": json.loads(json.dumps(method, default=plain)),
        "readers": [asdict(reader) for reader in readers],
        "batch_size": o.batch_size,
        "device": o.device.type,
        "engine": {
            "accumulate": engine.accumulate,
            "gradient_checkpointing": engine.gradient_checkpointing,
            "compile": engine.compile,
            **{name: str(engine.trainer[name]) for name in _OF_TRAINER if name in engine.trainer},
        },
        "blocks": o.blocks,
        "depth": o.depth,
        "recipe": asdict(o.recipe),
        "n_components": o.n_components,
        "precision": o.precision,
        "prefix": o.prefix,
        "random_state": o.random_state,
        "scales": o.scales,
        "orientations": o.orientations,
        "tile_px": data.tiles.tile_px,
        "tiles": _ranks.from_all([tiles_digest(source, own) for source in (data.tiles, *data.further)]),
        "expression": _matrix_print(data.expression),
        "genes": fingerprint(np.array(list(data.genes), dtype=object)),
        "groups": fingerprint(data.groups.astype("U"), data.sections.astype("U"), data.coords_um),
        "teacher": [teacher.name, teacher.digest, *_inputs_of(teacher)],
        "processes": _ranks.n_ranks(),
        "versions": {name: version(name) for name in ("pekasc", "torch", "timm", "peft", "lightning")},
    }
