"""Train an adapter on the inner folds, choose the number of epochs, and train it on all training spots."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from peft import PeftConfig

from pekasc._settings import get_logger
from pekasc.models.adapter import Adapter
from pekasc.models.encoders import Depth
from pekasc.models.heads import ALPHAS, Source, with_context
from pekasc.models.runtime import processes
from pekasc.models.selection._choice import Choice, held_out_errors, mean_error
from pekasc.models.selection._folds import InnerFold
from pekasc.models.selection._inputs import HeadSpec
from pekasc.models.selection._job import Job
from pekasc.models.selection._readout import Features, Reader, fixed_radius
from pekasc.models.selection._refit import KEPT, Training, kept_of, predicting
from pekasc.models.selection._result import history_frame, make_result
from pekasc.models.teachers import check_finite
from pekasc.models.training import (
    Trained,
    check_history,
    choose_blocks,
    kept_content,
    last_block,
    make_config,
    target_layers,
    train_student,
)

logger = get_logger(__name__)


def fit_student(job: Job, choice: Choice, features: Features, heads: Sequence[HeadSpec]) -> list[Adapter]:
    """Train on every inner fold, choose the number of epochs, and train on all spots; return an adapter per head.

    Which of these trainings predict is the recipe's ``refit``.

    Parameters
    ----------
    job
        The fit.
    choice
        Depth of the adapter.
    features
        The frozen features.
    heads
        Readings to fit.
    """
    data, o, depth = job.data, job.options, choice.depth
    assert o.method is not None  # for the type checker: checked in fit()
    blocks = _blocks(job, depth)
    targets = target_layers(job.model, depth, blocks, o.method)
    config = make_config(o.method, o.recipe.rank, targets)
    job.freeze(depth, blocks, config)
    frozen = features.of(Source("frozen", 0, depth), None)
    inputs = [_Inputs(job, head, frozen, fixed_radius(head.readout)) for head in heads]
    runs = list[Training]()
    for i in range(len(job.folds)):
        runs.append(_run_fold(job, i, config, depth, frozen, inputs, runs))
    tables, epochs = _choose_epochs(job, runs, depth, len(heads))
    refit = o.recipe.refit
    # without any epoch, all adapters are the same
    final = _run_final(job, config, depth, frozen, [e for e in epochs if refit != "ensemble" or e == 0])
    first = [row for run in runs for row in run.history]
    made = []
    for head, table, epoch in zip(heads, tables, epochs, strict=True):
        predict = predicting(refit, epoch, final, runs)
        read = replace(
            features,
            adapted=[training.features[epoch] for training in predict],
            inner=[run.features[epoch] for run in runs],
        )
        reader = Reader(data, job.folds, read)
        with o.profile.stage("head"):
            # frozen members of a blend: at all depths, or at the one that was chosen
            fitted = reader.fit(head, [depth] if head.readout.depth == "best" else list(features.frozen))
        selection = pd.concat([choice.table.assign(stage="frozen", epochs=0), table])
        adapter = make_result(job, head, depth, config, reader, fitted, selection, epoch, blocks)
        (own, weights), *others = (training.adapter(epoch) for training in predict)
        states = [weights["adapter"], *(state["adapter"] for _, state in others)]
        n_parameters = sum(tensor.numel() for state in states for tensor in state.values())
        last = [row for row in final.history if row["epoch"] <= epoch] if final in predict else []
        made.append(
            replace(
                adapter,
                config=own,
                info={**adapter.info, "n_parameters": n_parameters},
                weights=weights,
                others=tuple((further, state["adapter"]) for further, state in others),
                history=history_frame([*first, *last]),
            )
        )
    return made


@dataclass(frozen=True)
class _Inputs:
    """Inputs of plain ridge on adapted features, which chooses the number of epochs for a reading."""

    job: Job
    head: HeadSpec
    frozen: np.ndarray
    context_um: float | None

    def error(self, features: np.ndarray, fold: InnerFold) -> np.ndarray:
        """Return the held-out error per penalty, (alphas,)."""
        data = self.job.data
        x = np.concatenate([self.frozen, features], axis=1) if self.head.beside_frozen else features
        x = with_context(x, data.coords_um, data.sections, self.context_um, fold)
        return held_out_errors(x, data.expression, [fold], self.head.readout.n_components, panels=data.panels)[0]


def _blocks(job: Job, depth: Depth) -> int | str:
    """Return the number of blocks to adapt: that of the recipe, or as many as the memory allows."""
    o, n_blocks = job.options, last_block(job.model, depth)
    blocks = o.recipe.blocks
    if blocks == "auto":
        known = job.resume.facts("blocks")  # a resumed run may have less free memory
        if known is None:
            at_once = -(-o.recipe.batch_size // o.compute.accumulate)
            known = processes.broadcast(choose_blocks(job.model, n_blocks, at_once, o.device, o.precision))
            job.resume.put_facts("blocks", known)
        elif known != "all" and not (isinstance(known, int) and 1 <= known <= n_blocks):
            raise ValueError(job.resume.damaged(f"blocks.json names {known!r} of {n_blocks} blocks"))
        return known
    if blocks != "all" and o.readout.depth in ("all", "best") and int(blocks) > n_blocks:
        # valid for the encoder, but more than the blocks up to the chosen depth
        logger.hint("Features are taken after block %d, so all of these blocks are adapted, not %s.", n_blocks, blocks)
        return "all"
    return blocks


def _choose_epochs(
    job: Job, runs: Sequence[Training], depth: Depth, n_heads: int
) -> tuple[list[pd.DataFrame], list[int]]:
    """Return, per head, the table of candidates (depth, alpha, error, stage, epochs) and the chosen epochs."""
    recipe = job.options.recipe
    # candidates are the epochs that all folds ran
    last = min(max(run.errors) for run in runs)
    tried = range(last + 1) if recipe.choose_epochs else [recipe.epochs]
    tables, epochs = [], []
    for i in range(n_heads):
        rows = []
        for epoch in tried:
            error = mean_error([run.errors[epoch][i] for run in runs], job.folds)
            rows += [
                {"depth": depth, "alpha": a, "error": e, "stage": "adapter", "epochs": epoch}
                for a, e in zip(ALPHAS, error, strict=True)
            ]
        table = pd.DataFrame(rows)
        best = table.loc[table["error"].idxmin()]
        tables.append(table)
        epochs.append(int(processes.broadcast(int(best["epochs"]))))
        candidates = f" of {tried[0]} to {tried[-1]}" if len(tried) > 1 else ""
        logger.hint("Epochs: %d%s (held-out error %.3f of the mean predictor's).", epochs[i], candidates, best["error"])
        if epochs[i] == 0:
            logger.warning(
                "No number of epochs beat the frozen encoder on held-out groups: the adapter stays untrained."
            )
    return tables, epochs


def _train(
    job: Job,
    name: str,
    config: PeftConfig,
    depth: Depth,
    rows: np.ndarray,
    epochs: int,
    keep: Collection[int],
    on_epoch: Callable[[int, bool], float],
    stop: Callable[[int], bool] = lambda epoch: False,
) -> Trained:
    o, teacher = job.options, job.teacher
    assert teacher is not None  # for the type checker: checked in fit()
    with o.profile.stage("head"):
        embedding = check_finite(teacher.embed(rows), teacher.name)
    with o.profile.stage("training"):
        trained = train_student(
            job.model,
            depth,
            config,
            job.inputs,
            rows,
            embedding,
            recipe=o.recipe,
            epochs=epochs,
            engine=o.engine if job.resume.writable else replace(o.engine, checkpoint_minutes=math.inf),
            random_state=o.random_state,
            local=job.local,
            keep=keep,
            on_epoch=lambda epoch: on_epoch(epoch, False),
            stop=stop,
            known=lambda epoch: on_epoch(epoch, True),
            folder=job.resume.folder(name),
        )
    o.profile.tiles["training"] += len(trained.history) * len(rows)
    for row in trained.history:
        o.profile.saw_memory(int(row["peak_memory"]))
    return trained


def _run_final(job: Job, config: PeftConfig, depth: Depth, frozen: np.ndarray, epochs: Sequence[int]) -> Training:
    """Train on all training spots, and keep features and weights after some epochs; train nothing if there are none."""
    run = Training({0: frozen}, {}, [])
    if not epochs:
        return run

    def keep_features(epoch: int, known: bool = False) -> float:
        if epoch in epochs:
            run.features[epoch] = job.features_after("final", epoch, depth, known)
        return float("nan")

    logger.info("Final fit: %d epochs on all training spots.", max(epochs))
    rows = np.arange(job.data.tiles.n)
    run.kept = _train(job, "final", config, depth, rows, max(epochs), set(epochs), keep_features)
    run.history = [{"fold": -1, "held_out": "", **row} for row in run.kept.history]
    return run


def _check_history(job: Job, file: str, rows: Any, most: int) -> None:
    """Check the epochs that an earlier run wrote down."""
    try:
        check_history(rows)
    except ValueError as error:
        raise ValueError(job.resume.damaged(f"{file}: {error}")) from error
    if not 1 <= len(rows) <= most:
        raise ValueError(job.resume.damaged(f"{file} is no history of 1 to {most} epochs"))


def _run_fold(
    job: Job,
    number: int,
    config: PeftConfig,
    depth: Depth,
    frozen: np.ndarray,
    heads: Sequence[_Inputs],
    before: Sequence[Training],
) -> Training:
    """Train on the training spots of one inner fold, and compute the held-out error after every epoch.

    With `patience`, training stops when the held-out error, averaged over this and the earlier folds, has not fallen
    for that many epochs. No fold runs longer than an earlier one, since epochs are chosen among those that all ran.
    """
    fold, o = job.folds[number], job.options
    run = Training({}, {}, [])
    name = f"fold-{number}"
    most = min([o.recipe.epochs, *(max(other.errors) for other in before)])

    def measure(epoch: int, features: np.ndarray) -> float:
        run.features[epoch] = features
        with o.profile.stage("head"):
            run.errors[epoch] = [head.error(features, fold) for head in heads]
        return float(run.errors[epoch][0].min())

    def on_epoch(epoch: int, known: bool = False) -> float:
        if not o.recipe.choose_epochs and epoch < o.recipe.epochs:
            return float("nan")
        # the features of every epoch are kept until the best epoch is chosen, and share the memory limit
        kept = len(job.folds) * o.recipe.epochs
        return measure(epoch, job.features_after(name, epoch, depth, known, kept))

    def error_of(epoch: int) -> float:
        # of the first head: heads share the training, which can stop at one epoch only
        errors = [other.errors[epoch][0] for other in (*before, run)]
        return float(mean_error(errors, job.folds[: number + 1]).min())

    def stop(epoch: int) -> bool:
        if o.recipe.patience is None or not o.recipe.choose_epochs:
            return False
        curve = [error_of(e) for e in range(epoch + 1)]
        if not np.isfinite(curve[0]):  # no fold so far measured the genes in training and held-out spots
            return False
        return bool(processes.broadcast(len(curve) - 1 - int(np.argmin(curve)) >= o.recipe.patience))

    start = measure(0, frozen)
    logger.info("Inner fold %d of %d: %s held out.", number + 1, len(job.folds), fold.name)
    done = job.resume.facts(f"{name}/done")
    keep: Collection[int] = ()
    if o.recipe.refit != "last":
        keep = range(1, most + 1) if o.recipe.choose_epochs else {o.recipe.epochs}
    if done is None:
        run.kept = _train(job, name, config, depth, fold.train, most, keep, on_epoch, stop)
        done = run.kept.history
        if keep:
            job.resume.put_content(f"{name}/{KEPT}", kept_content(run.kept))
        job.resume.put_facts(f"{name}/done", done)
    else:
        _check_history(job, f"{name}/done.json", done, most)
        for row in done:
            on_epoch(int(row["epoch"]), known=True)
        if keep:
            run.kept = kept_of(job.resume, f"{name}/{KEPT}", done, keep)
    first = {"epoch": 0, "loss": np.nan, "kd": np.nan, "sa": np.nan, "matching": np.nan, "val_error": start}
    run.history = [{"fold": number, "held_out": fold.name, **row} for row in [first, *done]]
    return run
