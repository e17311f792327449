"""Fit an adapter from tiles, expression and groups: pure arrays, one selection rule for every method."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import PeftConfig

from pekasc._expression import Matrix
from pekasc.models._adapter import Adapter
from pekasc.models._choose import Choice, Depth, candidate_depths, choose, depth_name, features_at, held_out_errors
from pekasc.models._context import with_context
from pekasc.models._embed import embed
from pekasc.models._encoders import Encoder, FrozenEncoder, warn_of_scale
from pekasc.models._folds import InnerFold, inner_folds
from pekasc.models._head_methods import FoldData, check_head
from pekasc.models._heads import ALPHAS, RidgeHead, n_components_for
from pekasc.models._methods import Method, last_block, make_config, method_name, target_layers
from pekasc.models._peka import Recipe, n_clusters_for
from pekasc.models._scores import pearson
from pekasc.models._teachers import Teacher, check_finite
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
    """

    tiles: TileSource
    expression: Matrix
    genes: Sequence[str]
    groups: np.ndarray
    sections: np.ndarray
    coords_um: np.ndarray
    further: Sequence[TileSource] = ()


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

    def embed(self, depths: Sequence[Depth], bar: bool = False, n_kept: int = 1) -> dict[Depth, np.ndarray]:
        """Return features of all training tiles; `n_kept` says how many such results are kept side by side."""
        o = self.options
        return embed(
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
        )

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
    job = _Fit(model, encoder, spec, data, teacher, options, folds)

    features = job.embed(depths, bar=True) if frozen is None else frozen
    if list(features) != depths:
        raise ValueError(f"Features of the depths {depths} are needed, got those of {list(features)}.")

    def chosen_by(reader: Reader) -> Choice:
        seen = None if reader.context_um is None else lambda x, fold: job.seen(reader, x, fold=fold)
        choice = choose(features, data.expression, folds, options.n_components, seen)
        logger.info(
            "Depth %s chosen of %s: held-out error %.4f of the mean predictor's.",
            choice.depth, depths, choice.table["error"].min(),
        )  # fmt: skip
        return choice

    if options.method is None:
        return [_frozen(job, reader, chosen_by(reader), features) for reader in readers]
    # an adapter is trained on tiles alone, so its depth is chosen on theirs: readers then share the training
    choice = chosen_by(Reader())
    return _fit_student(job, choice, features_at(features, choice.depth), readers)


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
        out.append(FoldData.of(x, y, fold))
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
    if blocks != "all" and o.depth == "choose" and int(blocks) > n_blocks:
        # what fits the encoder may not fit the depth that this training set chose
        logger.info("Features are taken after block %d, so all of these blocks are adapted, not %s.", n_blocks, blocks)
        blocks = "all"
    targets = target_layers(job.model, depth, blocks, o.method)
    config = make_config(o.method, o.recipe.rank, targets)
    runs = [_run_fold(job, i, config, depth, frozen, readers) for i in range(len(job.folds))]
    weights = np.array([len(fold.held_out) for fold in job.folds], dtype=np.float64)
    tried = range(o.recipe.epochs + 1) if o.recipe.choose_epochs else [o.recipe.epochs]
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
        epochs.append(int(best["epochs"]))
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
            adapted[epoch] = job.embed([depth])[depth]
        return float("nan")

    trained = _train(job, config, depth, np.arange(data.tiles.n), max(epochs), set(epochs), keep_features)
    first = [row for run in runs for row in run.history]
    made = []
    for reader, table, epoch in zip(readers, tables, epochs, strict=True):
        inner = _fold_data(job, reader, [run.features[epoch] for run in runs], frozen)
        final = [{"fold": -1, "held_out": "", **row} for row in trained.history if row["epoch"] <= epoch]
        seen = job.seen(reader, adapted[epoch], frozen)
        selection = pd.concat([_stage_of(choice), table])
        adapter = _result(job, reader, depth, config, seen, inner, selection, epoch)
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
    job: _Fit, config: PeftConfig, depth: Depth, rows: np.ndarray, epochs: int, keep: Collection[int], on_epoch: Any
) -> Any:
    from pekasc.models._training import train_student

    o = job.options
    return train_student(
        job.model,
        depth,
        config,
        job.data.tiles,
        rows,
        check_finite(job.teacher.embed(rows), job.teacher.name),
        recipe=o.recipe,
        epochs=epochs,
        device=o.device,
        precision=o.precision,
        random_state=o.random_state,
        progress=o.progress,
        keep=keep,
        on_epoch=on_epoch,
    )


def _run_fold(
    job: _Fit, number: int, config: PeftConfig, depth: Depth, frozen: np.ndarray, readers: Sequence[Reader]
) -> _FoldRun:
    """Train on one inner fold's training spots; measure the held-out ones after every epoch."""
    fold, o = job.folds[number], job.options
    run = _FoldRun({}, {}, [])

    def measure(epoch: int, features: np.ndarray) -> float:
        run.features[epoch] = features
        run.errors[epoch] = [
            held_out_errors(job.seen(reader, features, frozen, fold), job.data.expression, [fold], o.n_components)[0]
            for reader in readers
        ]
        return float(run.errors[epoch][0].min())

    def on_epoch(epoch: int) -> float:
        if not o.recipe.choose_epochs and epoch < o.recipe.epochs:
            return float("nan")
        # the features of every epoch are kept until the best one is known
        return measure(epoch, job.embed([depth], n_kept=len(job.folds) * o.recipe.epochs)[depth])

    start = measure(0, frozen)
    logger.info("Inner fold %d of %d: %s held out.", number + 1, len(job.folds), fold.name)
    trained = _train(job, config, depth, fold.train, o.recipe.epochs, (), on_epoch)
    first = {"epoch": 0, "loss": np.nan, "kd": np.nan, "sa": np.nan, "matching": np.nan, "val_error": start}
    run.history = [{"fold": number, "held_out": fold.name, **row} for row in [first, *trained.history]]
    return run


def _gene_scores(job: _Fit, head_name: str, inner: Sequence[FoldData], setting: Any) -> pd.DataFrame:
    """Return the Pearson correlation of every gene within each held-out section, mean over sections.

    What was chosen (depth, epochs, penalty) was chosen on these same groups, so the scores are slightly optimistic;
    no weight was fitted on them.
    """
    data, o = job.data, job.options
    correlations = []
    for part, fold in zip(inner, job.folds, strict=True):
        head = check_head(head_name).fit(part.x, part.y, o.n_components, setting, o.random_state)
        predicted = head.predict(part.x_held_out)
        for section in np.unique(data.sections[fold.held_out]):
            rows = np.flatnonzero(data.sections[fold.held_out] == section)
            correlations.append(pearson(predicted[rows], part.y_held_out[rows]))
    stacked = np.array(correlations)
    known = np.isfinite(stacked)
    count = known.sum(axis=0)
    mean = np.divide(
        np.where(known, stacked, 0).sum(axis=0), count, out=np.full(stacked.shape[1], np.nan), where=count > 0
    )
    return pd.DataFrame({"pearson": mean, "n_sections": count}, index=pd.Index(list(data.genes), name="gene"))


_COLUMNS = ["fold", "held_out", "epoch", "loss", "kd", "sa", "matching", "val_error"]


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
) -> Adapter:
    """Choose the head's setting on the inner folds, fit it on all training spots, and put everything together."""
    data, o = job.data, job.options
    method = check_head(reader.head)
    setting = method.choose(inner, o.n_components, o.random_state)
    scores = _gene_scores(job, reader.head, inner, setting)
    head = method.fit(seen, data.expression, o.n_components, setting, o.random_state)
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
        "blocks": o.blocks,
        "rank": None if config is None else getattr(config, "r", None),
        "n_parameters": 0,
        "random_state": o.random_state,
        "precision": o.precision,
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
