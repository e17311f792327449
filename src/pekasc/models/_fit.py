"""Fit an adapter from tiles, expression and groups: pure arrays, one selection rule for every method."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import PeftConfig
from scipy import sparse

from pekasc._expression import Matrix, dense
from pekasc.models import _ranks
from pekasc.models._adapter import Adapter
from pekasc.models._auto import choose_blocks
from pekasc.models._choose import Choice, Depth, candidate_depths, choose, depth_name, features_at, held_out_errors
from pekasc.models._context import with_context
from pekasc.models._embed import PRECISIONS, embed
from pekasc.models._embed_job import EmbedJob
from pekasc.models._encoders import Encoder, FrozenEncoder, warn_of_scale
from pekasc.models._folds import InnerFold, inner_folds
from pekasc.models._head_methods import FoldData, Head, check_head, fit_rows
from pekasc.models._heads import ALPHAS, RidgeHead, n_components_for
from pekasc.models._methods import Method, last_block, make_config, method_name, target_layers
from pekasc.models._peka import Recipe, n_clusters_for
from pekasc.models._prefix import Inputs, Prefix, PrefixPlan, TileInputs, make_prefix, tiles_digest
from pekasc.models._profile import Profile, peak_memory
from pekasc.models._results import fingerprint
from pekasc.models._resume import Resume
from pekasc.models._scores import pearson
from pekasc.models._teachers import StoredTeacher, Teacher, check_finite
from pekasc.models._training import LAST, Engine, Trained, train_student
from pekasc.tiling import TileSource, TileSpec

logger = logging.getLogger(__name__)


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
class _Fit:
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

    def embed(self, depths: Sequence[Depth], bar: bool = False, n_kept: int = 1) -> dict[Depth, np.ndarray]:
        """Return features of all training tiles; `n_kept` says how many such results are kept side by side."""
        o, own = self.options, np.flatnonzero(self.mine)
        n = len(own) * len(self.sources) * o.orientations
        with o.profile.stage("encoding", n):
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
            )
            if _ranks.n_ranks() == 1:
                return made
            return {depth: self._of_all(values, own) for depth, values in made.items()}

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
        o = self.options
        return Engine(o.device, o.precision, o.progress) if o.engine is None else o.engine

    def freeze(self, start: int) -> None:
        """Compute what enters block `start` + 1, once for all trainings and the features after them."""
        o = self.options
        if not start or o.prefix is None or not self.model.splits:
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
                None if o.max_memory is None else o.max_memory // len(self.sources), o.progress, o.store,
                job.digest(self.model),
            )  # fmt: skip
            with o.profile.stage("encoding", len(own) * views):
                self.prefixes.append(make_prefix(self.model, source, own, plan))

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


def fit(
    encoder: Encoder,
    spec: TileSpec,
    data: Data,
    teacher: Teacher,
    options: Options,
    readers: Sequence[Reader],
    frozen: Mapping[Depth, np.ndarray] | None = None,
) -> list[Adapter]:
    """Return an adapter per reader for the training spots in `data`.

    Depth and penalty are chosen on frozen features, epochs and penalty again on those of adapters that never saw
    the held-out groups, all by the same held-out error; then one fit on all training groups with what was chosen.
    The depth of an adapter is chosen without context, so that readers share the training.

    Parameters
    ----------
    encoder, spec, data, teacher, options, readers
        What to fit, on what, and how.
    frozen
        Features of the training tiles by depth, where they are known already; else the tiles are embedded.
    """
    for reader in readers:
        check_head(reader.head)
    if teacher.n_spots != data.tiles.n:
        raise ValueError(
            f"The teacher {teacher.name!r} knows {teacher.n_spots} spots, but there are {data.tiles.n} training spots: "
            "its embedding needs one row for each, in their order."
        )
    model = FrozenEncoder(encoder, spec.tile_px)
    warn_of_scale(encoder, spec.mpp)
    depths = _depths(model, options.depth)
    if options.method is not None:
        # before hours of embedding: is there anything to attach to, and can the spots support the labels?
        target_layers(model, depths[-1], options.blocks, options.method)
    folds = inner_folds(data.groups, data.coords_um, data.sections, margin_um(spec, options.scales))
    _check_sizes(folds, options)
    dtype = PRECISIONS[options.precision]
    if dtype is not None:
        model.halve(dtype)
    mine = np.full(data.tiles.n, data.mine is None)
    if data.mine is not None:
        mine[data.mine] = True
    settings = {} if options.resume is None else _settings(model, data, teacher, options)
    job = _Fit(model, encoder, spec, data, teacher, options, folds, mine, Resume(options.resume, settings))
    if options.method is not None and (known := job.resume.facts("choice")) is not None:
        choice = _choice_of(known)
        return _fit_student(
            job, choice, job.resume.array("frozen", lambda: job.embed([choice.depth])[choice.depth]), readers
        )

    features = job.embed(depths, bar=True) if frozen is None else frozen
    if list(features) != depths:
        raise ValueError(f"Features of the depths {depths} are needed, got those of {list(features)}.")

    def chosen_by(reader: Reader) -> Choice:
        seen = None if reader.context_um is None else lambda x, fold: job.seen(reader, x, fold=fold)
        with options.profile.stage("head"):
            choice = _ranks.agreed(choose(features, data.expression, folds, options.n_components, seen))
        logger.info(
            "Depth %s chosen of %s: held-out error %.4f of the mean predictor's.",
            choice.depth, depths, choice.table["error"].min(),
        )  # fmt: skip
        return choice

    if options.method is None:
        return [_frozen(job, reader, chosen_by(reader), features) for reader in readers]
    # an adapter is trained on tiles alone, so its depth is chosen on theirs: readers then share the training
    choice = chosen_by(Reader())
    frozen_at = job.resume.array("frozen", lambda: features_at(features, choice.depth))
    job.resume.leave("choice", _facts_of(choice))
    return _fit_student(job, choice, frozen_at, readers)


def _facts_of(choice: Choice) -> dict[str, Any]:
    table = choice.table[["depth", "alpha", "error"]].to_numpy(dtype=object).tolist()
    return {"depth": choice.depth, "alpha": choice.alpha, "table": table}


def _choice_of(facts: Mapping[str, Any]) -> Choice:
    def depth(value: Any) -> Depth:
        return None if value is None else tuple(value)

    rows = [(depth(d), a, e) for d, a, e in facts["table"]]
    return Choice(depth(facts["depth"]), facts["alpha"], pd.DataFrame(rows, columns=["depth", "alpha", "error"]))


def _settings(model: FrozenEncoder, data: Data, teacher: Teacher, options: Options) -> dict[str, Any]:
    """Return what decides the result of a fit, for its folder: plain values, and digests of the data."""
    o = options
    method = o.method.to_dict() if isinstance(o.method, PeftConfig) else o.method
    y = data.expression
    parts = (y.data, y.indices, y.indptr) if sparse.issparse(y) else (np.asarray(y),)
    own = np.arange(data.tiles.n) if data.mine is None else data.mine
    stored = [fingerprint(teacher.embedding)] if isinstance(teacher, StoredTeacher) else []
    return {
        "encoder": model.digest,
        "method": json.loads(json.dumps(method, default=str)),
        "blocks": o.blocks,
        "depth": o.depth,
        "recipe": asdict(o.recipe),
        "n_components": o.n_components,
        "precision": o.precision,
        "prefix": o.prefix,
        "random_state": o.random_state,
        "scales": o.scales,
        "orientations": o.orientations,
        "accumulate": 1 if o.engine is None else o.engine.accumulate,
        "tile_px": data.tiles.tile_px,
        "tiles": _ranks.agreed([tiles_digest(source, own) for source in (data.tiles, *data.further)]),
        "expression": fingerprint(*parts),
        "genes": fingerprint(np.array(list(data.genes), dtype=object)),
        "groups": fingerprint(data.groups.astype("U"), data.sections.astype("U"), data.coords_um),
        "teacher": [teacher.name, teacher.digest, *stored],
        "processes": _ranks.n_ranks(),
    }


def margin_um(spec: TileSpec, scales: Sequence[float]) -> float:
    """Return how far apart spots are that share no pixel: two squares overlap as far as their diagonal reaches."""
    return float(spec.side_um * max(scales) * 2**0.5)


def _check_sizes(folds: list[InnerFold], options: Options) -> None:
    """Check explicit sizes against the smallest inner fold: what fits all training spots may not fit that."""
    smallest = min(folds, key=lambda fold: len(fold.train))
    n = len(smallest.train)
    try:
        if options.method is not None:
            n_clusters_for(n, options.recipe.n_clusters)
        if options.n_components is not None:
            n_components_for(n, n, options.n_components)
    except ValueError as error:
        raise ValueError(
            f"{error} (These are the {n} spots that are left to train on while {smallest.name} is held out.)"
        ) from error


def _depths(model: FrozenEncoder, depth: Depth | str) -> list[Depth]:
    if depth == "choose":
        return candidate_depths(model.n_blocks)
    if depth is None:
        return [None]
    return [tuple(model.check_depth(block) for block in depth)]  # type: ignore[arg-type]


def _fold_data(
    job: _Fit, reader: Reader, features: Sequence[np.ndarray], frozen: np.ndarray | None = None
) -> list[FoldData]:
    """Return what a reader's head learns from and is judged by, per inner fold, from that fold's features."""
    out, y = [], job.data.expression
    for fold, raw in zip(job.folds, features, strict=True):
        x = job.seen(reader, raw, frozen, fold)
        out.append(FoldData(x, y, fold))
    return out


def _frozen(job: _Fit, reader: Reader, choice: Choice, features: Mapping[Depth, np.ndarray]) -> Adapter:
    """Return the frozen encoder with a head, at the depth that this reader chose."""
    at = features_at(features, choice.depth)
    inner = _fold_data(job, reader, [at] * len(job.folds))
    return _result(job, reader, choice.depth, None, job.seen(reader, at), inner, _stage_of(choice))


def _stage_of(choice: Choice) -> pd.DataFrame:
    """Return what was tried among frozen features, as rows of an adapter's selection."""
    return choice.table.assign(stage="frozen", epochs=0)


@dataclass
class _FoldRun:
    """What one inner fold measured: per epoch the features, and per reader the held-out error per penalty."""

    features: dict[int, np.ndarray]
    errors: dict[int, list[np.ndarray]]
    history: list[dict[str, Any]]


def _fit_student(job: _Fit, choice: Choice, frozen: np.ndarray, readers: Sequence[Reader]) -> list[Adapter]:
    data, o, depth = job.data, job.options, choice.depth
    assert o.method is not None  # for the type checker: fit() asked
    blocks, n_blocks = o.blocks, last_block(job.model, depth)
    if blocks == "auto":
        parts = job.engine.accumulate
        at_once = -(-o.recipe.batch_size // parts)
        blocks = _ranks.agreed(choose_blocks(job.model, n_blocks, at_once, o.device, o.precision))
    elif blocks != "all" and o.depth == "choose" and int(blocks) > n_blocks:
        # what fits the encoder may not fit the depth that this training set chose
        logger.info("Features are taken after block %d, so all of these blocks are adapted, not %s.", n_blocks, blocks)
        blocks = "all"
    targets = target_layers(job.model, depth, blocks, o.method)
    config = make_config(o.method, o.recipe.rank, targets)
    job.freeze(0 if blocks == "all" else n_blocks - int(blocks))
    runs = list[_FoldRun]()
    weights = np.array([len(fold.held_out) for fold in job.folds], dtype=np.float64)
    for i in range(len(job.folds)):
        runs.append(_run_fold(job, i, config, depth, frozen, readers, runs))
    # every fold ran as long as the shortest one at least
    last = min(max(run.errors) for run in runs)
    tried = range(last + 1) if o.recipe.choose_epochs else [o.recipe.epochs]
    tables, epochs = [], []
    for i in range(len(readers)):
        rows = []
        for epoch in tried:
            error = np.average([run.errors[epoch][i] for run in runs], axis=0, weights=weights)
            rows += [
                {"depth": depth, "alpha": a, "error": e, "stage": "adapter", "epochs": epoch}
                for a, e in zip(ALPHAS, error, strict=True)
            ]
        table = pd.DataFrame(rows)
        best = table.loc[table["error"].idxmin()]
        tables.append(table)
        epochs.append(int(_ranks.agreed(int(best["epochs"]))))
        logger.info(
            "%d epochs chosen of %s: held-out error %.4f of the mean predictor's.",
            epochs[i],
            list(tried),
            best["error"],
        )
        if epochs[i] == 0:
            logger.warning(
                "No epoch of training beat the frozen encoder on held-out groups: the adapter is left at zero."
            )
    adapted = {0: frozen}

    def keep_features(epoch: int) -> float:
        if epoch in epochs:
            adapted[epoch] = job.resume.array(f"final/epoch-{epoch}", lambda: job.embed([depth])[depth])
        return float("nan")

    logger.info("Final fit: %d epochs on all training spots.", max(epochs))
    folder = job.resume.folder("final")
    trained = _train(job, config, depth, np.arange(data.tiles.n), max(epochs), set(epochs), keep_features, folder)
    for epoch in set(epochs) - set(adapted):  # measured by the run that this one goes on from
        adapted[epoch] = job.resume.array(f"final/epoch-{epoch}", lambda: job.embed([depth])[depth])
    first = [row for run in runs for row in run.history]
    made = []
    for reader, table, epoch in zip(readers, tables, epochs, strict=True):
        inner = _fold_data(job, reader, [run.features[epoch] for run in runs], frozen)
        final = [{"fold": -1, "held_out": "", **row} for row in trained.history if row["epoch"] <= epoch]
        seen = job.seen(reader, adapted[epoch], frozen)
        selection = pd.concat([_stage_of(choice), table])
        adapter = _result(job, reader, depth, config, seen, inner, selection, epoch, blocks)
        n_parameters = sum(tensor.numel() for tensor in trained.weights[epoch]["adapter"].values())
        made.append(
            replace(
                adapter,
                config=trained.configs[epoch],
                info={**adapter.info, "n_parameters": n_parameters},
                weights=trained.weights[epoch],
                history=_history_frame([*first, *final]),
            )
        )
    return made


def _train(
    job: _Fit,
    config: PeftConfig,
    depth: Depth,
    rows: np.ndarray,
    epochs: int,
    keep: Collection[int],
    on_epoch: Callable[[int], float],
    folder: Path | None,
    stop: Callable[[int], bool] = lambda epoch: False,
) -> Trained:
    o = job.options
    with o.profile.stage("head"):
        taught = check_finite(job.teacher.embed(rows), job.teacher.name)
    with o.profile.stage("training"):
        trained = train_student(
            job.model,
            depth,
            config,
            job.inputs,
            rows,
            taught,
            recipe=o.recipe,
            epochs=epochs,
            engine=job.engine,
            random_state=o.random_state,
            mine=job.mine,
            keep=keep,
            on_epoch=on_epoch,
            stop=stop,
            folder=folder,
        )
    o.profile.tiles["training"] += len(trained.history) * len(rows)
    for row in trained.history:
        o.profile.saw_memory(int(row["peak_memory"]))
    return trained


def _run_fold(
    job: _Fit,
    number: int,
    config: PeftConfig,
    depth: Depth,
    frozen: np.ndarray,
    readers: Sequence[Reader],
    before: Sequence[_FoldRun],
) -> _FoldRun:
    """Train on one inner fold's training spots; measure the held-out ones after every epoch.

    With patience, a fold ends when the error, mean over it and the folds before, has not fallen for so many epochs,
    and no fold runs longer than one before it: epochs are chosen among those that all ran.
    """
    fold, o = job.folds[number], job.options
    run = _FoldRun({}, {}, [])
    name = f"fold-{number}"
    most = min([o.recipe.epochs, *(max(other.errors) for other in before)])
    weights = [len(job.folds[i].held_out) for i in range(number + 1)]

    def measure(epoch: int, features: np.ndarray) -> float:
        run.features[epoch] = features
        with o.profile.stage("head"):
            run.errors[epoch] = [
                held_out_errors(job.seen(reader, features, frozen, fold), job.data.expression, [fold], o.n_components)[
                    0
                ]
                for reader in readers
            ]
        return float(run.errors[epoch][0].min())

    def features_after(epoch: int) -> np.ndarray:
        # the features of every epoch are kept until the best one is known
        kept = len(job.folds) * o.recipe.epochs
        return job.resume.array(f"{name}/epoch-{epoch}", lambda: job.embed([depth], n_kept=kept)[depth])

    def on_epoch(epoch: int) -> float:
        if not o.recipe.choose_epochs and epoch < o.recipe.epochs:
            return float("nan")
        return measure(epoch, features_after(epoch))

    def error_of(epoch: int) -> float:
        # of the first reader: any other would end somewhere else, and they share the training
        errors = [other.errors[epoch][0] for other in (*before, run)]
        return float(np.average(errors, axis=0, weights=weights).min())

    def stop(epoch: int) -> bool:
        if o.recipe.patience is None or not o.recipe.choose_epochs:
            return False
        curve = [error_of(e) for e in range(epoch + 1)]
        return bool(_ranks.agreed(len(curve) - 1 - int(np.argmin(curve)) >= o.recipe.patience))

    start = measure(0, frozen)
    logger.info("Inner fold %d of %d: %s held out.", number + 1, len(job.folds), fold.name)
    done = job.resume.facts(f"{name}/done")
    if done is None:
        folder = job.resume.folder(name)
        if folder is not None and (folder / LAST).exists():
            # of epochs that an earlier run finished, for patience counts them
            for epoch in range(1, most + 1):
                if (folder / f"epoch-{epoch}.npy").exists():
                    on_epoch(epoch)
        done = _train(job, config, depth, fold.train, most, (), on_epoch, folder, stop).history
        job.resume.leave(f"{name}/done", done)
    for row in done:
        if row["epoch"] not in run.errors:
            on_epoch(int(row["epoch"]))
    for epoch in [epoch for epoch in run.errors if epoch > len(done)]:
        del run.errors[epoch], run.features[epoch]
    first = {"epoch": 0, "loss": np.nan, "kd": np.nan, "sa": np.nan, "matching": np.nan, "val_error": start}
    run.history = [{"fold": number, "held_out": fold.name, **row} for row in [first, *done]]
    return run


_GENES = 2048  # at once


def _gene_scores(job: _Fit, head_name: str, inner: Sequence[FoldData], setting: Any) -> pd.DataFrame:
    """Return the Pearson correlation of every gene within each held-out section, mean over sections.

    What was chosen (depth, epochs, penalty) was chosen on these same groups, so the scores are slightly optimistic;
    no weight was fitted on them.
    """
    data, o = job.data, job.options
    correlations = []
    for part, fold in zip(inner, job.folds, strict=True):
        head = fit_rows(head_name, part, o.n_components, setting, o.random_state)
        for section in np.unique(data.sections[fold.held_out]):
            rows = fold.held_out[data.sections[fold.held_out] == section]
            correlations.append(_correlations(head, part.features[rows], data.expression[rows]))
    stacked = np.array(correlations)
    known = np.isfinite(stacked)
    count = known.sum(axis=0)
    mean = np.divide(
        np.where(known, stacked, 0).sum(axis=0), count, out=np.full(stacked.shape[1], np.nan), where=count > 0
    )
    return pd.DataFrame({"pearson": mean, "n_sections": count}, index=pd.Index(list(data.genes), name="gene"))


def _correlations(head: Head, x: np.ndarray, y: Matrix) -> np.ndarray:
    """Return Pearson's correlation of every gene over some spots, a part of the genes at a time."""
    y = y.tocsc() if sparse.issparse(y) else y
    parts = [slice(i, i + _GENES) for i in range(0, y.shape[1], _GENES)]
    return np.concatenate([pearson(head.predict(x, part), dense(y[:, part])) for part in parts])


_COLUMNS = ["fold", "held_out", "epoch", "loss", "kd", "sa", "matching", "val_error", "peak_memory"]


def _history_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=_COLUMNS)


def _result(
    job: _Fit,
    reader: Reader,
    depth: Depth,
    config: PeftConfig | None,
    seen: np.ndarray,
    inner: Sequence[FoldData],
    selection: pd.DataFrame,
    epochs: int = 0,
    blocks: str | int | None = None,
) -> Adapter:
    """Choose the head's setting on the inner folds, fit it on all training spots, and put everything together."""
    data, o = job.data, job.options
    method = check_head(reader.head)
    with o.profile.stage("head"):
        setting = method.choose(inner, o.n_components, o.random_state)
        scores = _gene_scores(job, reader.head, inner, setting)
        head = method.fit(seen, data.expression, o.n_components, setting, o.random_state)
    o.profile.saw_memory(peak_memory(o.device))
    columns = ["stage", "depth", "epochs", "alpha", "error"]
    table = selection[columns].reset_index(drop=True)
    table["depth"] = [depth_name(d) for d in table["depth"]]
    info = {
        "depth": depth_name(depth),
        "n_spots": int(data.tiles.n),
        "groups": [str(g) for g in np.unique(data.groups)],
        "sections": [str(s) for s in np.unique(data.sections)],
        "held_out": [fold.name for fold in job.folds],
        "teacher": job.teacher.name,
        "teacher_licence": job.teacher.licence,
        "teacher_digest": job.teacher.digest,
        "epochs": epochs,
        "head": reader.head,
        "alpha": float(np.median(head.alpha)) if isinstance(head, RidgeHead) else None,
        "context_um": reader.context_um,
        "scales": list(o.scales),
        "orientations": o.orientations,
        "n_components": int(head.projection.components.shape[0]),
        "n_clusters": None if config is None else n_clusters_for(int(data.tiles.n), o.recipe.n_clusters),
        "blocks": o.blocks if blocks is None else blocks,
        "rank": None if config is None else getattr(config, "r", None),
        "n_parameters": 0,
        "n_views": None if config is None else o.recipe.n_views,
        "random_state": o.random_state,
        "precision": o.precision,
        "profile": o.profile.record(),
        "versions": {name: version(name) for name in ("pekasc", "torch", "timm", "peft", "scikit-learn")},
    }
    return Adapter(
        encoder=job.encoder,
        encoder_digest=job.model.digest,
        spec=job.spec,
        depth=depth,
        method=method_name(o.method),
        genes=tuple(str(gene) for gene in data.genes),
        head=head,
        context_um=reader.context_um,
        scales=o.scales,
        orientations=o.orientations,
        config=config,
        weights={},
        gene_scores=scores,
        history=_history_frame([]),
        selection=table,
        info=info,
    )
