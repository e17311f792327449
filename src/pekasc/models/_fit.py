"""Fit an adapter from tiles, expression and groups: pure arrays, one selection rule for every method."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import PeftConfig

from pekasc._expression import Matrix
from pekasc.models._adapter import Adapter
from pekasc.models._choose import Depth, candidate_depths, choose, held_out_errors
from pekasc.models._context import with_context
from pekasc.models._embed import embed
from pekasc.models._encoders import Encoder, FrozenEncoder, warn_of_scale
from pekasc.models._folds import InnerFold, inner_folds
from pekasc.models._head_methods import FoldData, check_head
from pekasc.models._heads import ALPHAS, RidgeHead, n_components_for
from pekasc.models._methods import Method, make_config, method_name, target_layers
from pekasc.models._peka import Recipe, n_clusters_for
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
    """

    tiles: TileSource
    expression: Matrix
    genes: Sequence[str]
    groups: np.ndarray
    sections: np.ndarray
    coords_um: np.ndarray


@dataclass(frozen=True)
class Options:
    """How to fit; see :func:`pekasc.tl.fit_adapter` for what each means."""

    method: Method
    blocks: str | int
    depth: Depth | str
    recipe: Recipe
    head: str
    context_um: float | None
    n_components: int | None
    batch_size: int
    device: torch.device
    precision: str
    random_state: int
    progress: bool


@dataclass
class _Fit:
    """The state of one fit: what is known so far, and how to embed with what is in the encoder now."""

    model: FrozenEncoder
    data: Data
    teacher: Teacher
    options: Options
    folds: list[InnerFold]

    def embed(self, depths: Sequence[Depth], bar: bool = False) -> dict[Depth, np.ndarray]:
        """Return the head's input for all training spots: features of their tiles, with their context."""
        o, data = self.options, self.data
        features = embed(
            self.model,
            data.tiles,
            depths,
            batch_size=o.batch_size,
            device=o.device,
            precision=o.precision,
            progress=o.progress and bar,
        )
        return {d: with_context(x, data.coords_um, data.sections, o.context_um) for d, x in features.items()}


def fit(encoder: Encoder, spec: TileSpec, data: Data, teacher: Teacher, options: Options) -> Adapter:
    """Return the adapter for the training spots in `data`.

    Depth and penalty are chosen on frozen features, epochs and penalty again on those of adapters that never saw
    the held-out groups, all by the same held-out error; then one fit on all training groups with what was chosen.
    """
    check_head(options.head)
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
    # two squares overlap as far as their diagonal reaches
    folds = inner_folds(data.groups, data.coords_um, data.sections, margin_um=spec.side_um * 2**0.5)
    _check_sizes(folds, options)
    job = _Fit(model, data, teacher, options, folds)

    frozen = job.embed(depths, bar=True)
    chosen = choose(frozen, data.expression, folds, options.n_components)
    selection = chosen.table.assign(stage="frozen", epochs=0)
    logger.info(
        "Depth %s chosen of %s: held-out error %.4f of the mean predictor's.",
        chosen.depth, depths, chosen.table["error"].min(),
    )  # fmt: skip
    features = frozen[chosen.depth]
    del frozen
    if options.method is None:
        inner = [_fold_data(features, data.expression, fold) for fold in folds]
        return _result(job, encoder, spec, chosen.depth, None, features, inner, selection)
    return _fit_student(job, encoder, spec, chosen.depth, features, selection)


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


def _fold_data(features: np.ndarray, y: Matrix, fold: InnerFold) -> FoldData:
    return FoldData(features[fold.train], y[fold.train], features[fold.held_out], y[fold.held_out])


@dataclass
class _FoldRun:
    """What one inner fold measured: per epoch the held-out error per penalty, and what the head reads."""

    errors: dict[int, np.ndarray]
    data: dict[int, FoldData]
    history: list[dict[str, Any]]


def _fit_student(
    job: _Fit, encoder: Encoder, spec: TileSpec, depth: Depth, frozen: np.ndarray, selection: pd.DataFrame
) -> Adapter:
    data, o = job.data, job.options
    assert o.method is not None  # for the type checker: fit() asked
    targets = target_layers(job.model, depth, o.blocks, o.method)
    config = make_config(o.method, o.recipe.rank, targets)
    runs = [_run_fold(job, i, config, depth, frozen) for i in range(len(job.folds))]
    weights = np.array([len(fold.held_out) for fold in job.folds], dtype=np.float64)
    tried = range(o.recipe.epochs + 1) if o.recipe.choose_epochs else [o.recipe.epochs]
    rows = []
    for epoch in tried:
        error = np.average([run.errors[epoch] for run in runs], axis=0, weights=weights)
        rows += [
            {"depth": depth, "alpha": a, "error": e, "stage": "adapter", "epochs": epoch}
            for a, e in zip(ALPHAS, error, strict=True)
        ]
    table = pd.DataFrame(rows)
    best = table.loc[table["error"].idxmin()]
    epochs = int(best["epochs"])
    logger.info(
        "%d epochs chosen of %s: held-out error %.4f of the mean predictor's.", epochs, list(tried), best["error"]
    )
    if epochs == 0:
        logger.warning("No epoch of training beat the frozen encoder on held-out groups: the adapter is left at zero.")
    history = [row for run in runs for row in run.history]
    all_rows = np.arange(data.tiles.n)
    adapted = {0: frozen}

    trained = _train(job, config, depth, all_rows, epochs, lambda epoch: _keep(job, depth, adapted, epoch, epochs))
    history += [{"fold": -1, "held_out": "", **row} for row in trained.history]
    weights_out = {
        "adapter": trained.adapter,
        "projector": trained.projector,
        "cluster_head": trained.cluster_head,
    }
    inner = [run.data[epochs] for run in runs]
    adapter = _result(job, encoder, spec, depth, config, adapted[epochs], inner, pd.concat([selection, table]), epochs)
    return replace(adapter, weights=weights_out, history=_history_frame(history))


def _keep(job: _Fit, depth: Depth, store: dict[int, np.ndarray], epoch: int, wanted: int) -> float:
    """Embed all training tiles after the last epoch, while the adapter is in the encoder."""
    if epoch == wanted:
        store[epoch] = job.embed([depth])[depth]
    return float("nan")


def _train(job: _Fit, config: PeftConfig, depth: Depth, rows: np.ndarray, epochs: int, on_epoch: Any) -> Any:
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
        on_epoch=on_epoch,
    )


def _run_fold(job: _Fit, number: int, config: PeftConfig, depth: Depth, frozen: np.ndarray) -> _FoldRun:
    """Train on one inner fold's training spots; measure the held-out ones after every epoch."""
    fold, o = job.folds[number], job.options
    y = job.data.expression
    run = _FoldRun({}, {}, [])

    def measure(epoch: int, features: np.ndarray) -> float:
        run.errors[epoch] = held_out_errors(features, y, [fold], o.n_components)[0]
        run.data[epoch] = _fold_data(features, y, fold)
        return float(run.errors[epoch].min())

    def on_epoch(epoch: int) -> float:
        if not o.recipe.choose_epochs and epoch < o.recipe.epochs:
            return float("nan")
        return measure(epoch, job.embed([depth])[depth])

    start = measure(0, frozen)
    logger.info("Inner fold %d of %d: %s held out.", number + 1, len(job.folds), fold.name)
    trained = _train(job, config, depth, fold.train, o.recipe.epochs, on_epoch)
    first = {"epoch": 0, "loss": np.nan, "kd": np.nan, "sa": np.nan, "val_error": start}
    run.history = [{"fold": number, "held_out": fold.name, **row} for row in [first, *trained.history]]
    return run


def _gene_scores(job: _Fit, inner: Sequence[FoldData], setting: Any) -> pd.DataFrame:
    """Return the Pearson correlation of every gene within each held-out section, mean over sections.

    What was chosen (depth, epochs, penalty) was chosen on these same groups, so the scores are slightly optimistic;
    no weight was fitted on them.
    """
    data, o = job.data, job.options
    correlations = []
    for part, fold in zip(inner, job.folds, strict=True):
        head = check_head(o.head).fit(part.x, part.y, o.n_components, setting, o.random_state)
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


def pearson(predicted: np.ndarray, measured: Matrix) -> np.ndarray:
    """Return the Pearson correlation of every column (genes,); NaN where either side is constant."""
    y = measured if isinstance(measured, np.ndarray) else measured.toarray()
    a = predicted.astype(np.float64) - predicted.mean(axis=0, dtype=np.float64)
    b = y.astype(np.float64) - y.mean(axis=0, dtype=np.float64)
    scale = np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))
    # a constant column leaves rounding noise, not exactly 0
    known = (np.ptp(predicted, axis=0) > 0) & (np.ptp(y, axis=0) > 0) & (scale > 0)
    return np.divide((a * b).sum(axis=0), scale, out=np.full(y.shape[1], np.nan), where=known)


_COLUMNS = ["fold", "held_out", "epoch", "loss", "kd", "sa", "val_error"]


def _history_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=_COLUMNS)


def _result(
    job: _Fit,
    encoder: Encoder,
    spec: TileSpec,
    depth: Depth,
    config: PeftConfig | None,
    features: np.ndarray,
    inner: Sequence[FoldData],
    selection: pd.DataFrame,
    epochs: int = 0,
) -> Adapter:
    """Choose the head's setting on the inner folds, fit it on all training spots, and put everything together."""
    data, o = job.data, job.options
    method = check_head(o.head)
    setting = method.choose(inner, o.n_components, o.random_state)
    scores = _gene_scores(job, inner, setting)
    head = method.fit(features, data.expression, o.n_components, setting, o.random_state)
    columns = ["stage", "depth", "epochs", "alpha", "error"]
    table = selection[columns].reset_index(drop=True)
    table["depth"] = ["own" if d is None else "+".join(str(b) for b in d) for d in table["depth"]]
    info = {
        "depth": "own" if depth is None else "+".join(str(b) for b in depth),
        "n_spots": int(data.tiles.n),
        "groups": [str(g) for g in np.unique(data.groups)],
        "sections": [str(s) for s in np.unique(data.sections)],
        "held_out": [fold.name for fold in job.folds],
        "teacher": job.teacher.name,
        "teacher_licence": job.teacher.licence,
        "teacher_digest": job.teacher.digest,
        "epochs": epochs,
        "head": o.head,
        "alpha": float(np.median(head.alpha)) if isinstance(head, RidgeHead) else None,
        "context_um": o.context_um,
        "n_components": int(head.projection.components.shape[0]),
        "n_clusters": None if config is None else n_clusters_for(int(data.tiles.n), o.recipe.n_clusters),
        "blocks": o.blocks,
        "rank": None if config is None else getattr(config, "r", None),
        "random_state": o.random_state,
        "precision": o.precision,
        "versions": {name: version(name) for name in ("pekasc", "torch", "timm", "peft", "scikit-learn")},
    }
    return Adapter(
        encoder=encoder,
        encoder_digest=job.model.digest,
        spec=spec,
        depth=depth,
        method=method_name(o.method),
        genes=tuple(str(gene) for gene in data.genes),
        head=head,
        context_um=o.context_um,
        config=config,
        weights={},
        gene_scores=scores,
        history=_history_frame([]),
        selection=table,
        info=info,
    )
