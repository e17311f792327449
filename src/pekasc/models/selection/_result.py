"""The end of a fit: score every gene on held-out groups, and assemble the adapter with its summary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
from peft import PeftConfig
from scipy import sparse

from pekasc._expression import Matrix, dense
from pekasc.models.adapter import Adapter
from pekasc.models.encoders import Depth, depth_name
from pekasc.models.heads import Reading
from pekasc.models.runtime import peak_memory
from pekasc.models.selection._inputs import Data, HeadSpec
from pekasc.models.selection._job import Job
from pekasc.models.selection._readout import Fitted, Reader
from pekasc.models.selection._scores import pearson
from pekasc.models.selection._trust import held_out_of, tile_novelty
from pekasc.models.training import method_name, n_clusters_for

_GENES = 2048  # per chunk


def _gene_scores(job: Job, fitted: Fitted, held_out: Sequence[np.ndarray]) -> tuple[pd.DataFrame, dict[str, float]]:
    """Return the Pearson correlation of every gene within held-out sections, averaged over sections.

    Depth, epochs and penalty were chosen on the same groups, so the scores are slightly optimistic; no weights were
    fitted on them. A gene is scored in the sections that measured it, by a fit on others that did. The median over
    genes is returned for every member of the reading as well. `held_out` are the scores of the held-out spots by fold,
    see :meth:`Reader.held_out`.
    """
    data = job.data
    names = list(dict.fromkeys(member.name for member in fitted.folds[0].members))
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("", *names)}
    scored: dict[str, np.ndarray] = {}
    for reading, fold, scores in zip(fitted.folds, job.folds, held_out, strict=True):
        parts = {"": (reading, np.arange(reading.n_scores))}
        parts |= {name: _part(reading, name) for name in names if len(names) > 1}
        for section in np.unique(data.sections[fold.held_out]):
            at = np.flatnonzero(data.sections[fold.held_out] == section)
            y = data.expression[fold.held_out[at]]
            known = slice(None)
            if data.panels is not None:
                known = data.panels.of(fold.held_out[at[:1]])[0] & data.panels.learned(fold.train)
            for name, (part, columns) in parts.items():
                r = np.full(y.shape[1], np.nan)
                r[known] = correlations_of(partial(part.expression, scores[np.ix_(at, columns)]), y)[known]
                found[name].append(r)
            there = np.isfinite(found[""][-1])
            scored[str(section)] = scored.get(str(section), np.zeros_like(there)) | there
    mean = _mean(found[""])
    # blocks of one section are one section
    count = np.sum(list(scored.values()), axis=0, dtype=np.int64)
    alone = {name: _median(_mean(found[name]) if len(names) > 1 else mean) for name in names}
    index = pd.Index(list(data.genes), name="gene")
    found_scores = {"pearson": mean, "n_sections": count, "n_groups": _n_groups(data), **_range(found[""])}
    return pd.DataFrame(found_scores, index=index), alone


def _range(correlations: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Return the smallest and the largest correlation of every gene over held-out sections; NaN without any."""
    stacked = np.array(correlations)
    known = np.isfinite(stacked)
    some = known.any(axis=0)
    return {
        "lowest": np.where(some, np.where(known, stacked, np.inf).min(axis=0), np.nan),
        "highest": np.where(some, np.where(known, stacked, -np.inf).max(axis=0), np.nan),
    }


def _n_groups(data: Data) -> np.ndarray:
    """Return from how many training groups every gene is learned, (genes,)."""
    groups = np.unique(data.groups)
    if data.panels is None:
        return np.full(len(data.genes), len(groups))
    return np.sum([data.panels.n_spots(data.groups == group) > 0 for group in groups], axis=0)


def _part(reading: Reading, name: str) -> tuple[Reading, np.ndarray]:
    """Return the members of one name as a reading of their own, and their columns among the scores."""
    columns, start = [], 0
    for member in reading.members:
        if member.name == name:
            columns.append(np.arange(start, start + member.head.n_scores))
        start += member.head.n_scores
    return Reading(tuple(m for m in reading.members if m.name == name)).use(), np.concatenate(columns)


def _median(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else float("nan")


def _mean(correlations: list[np.ndarray]) -> np.ndarray:
    stacked = np.array(correlations)
    known = np.isfinite(stacked)
    count = known.sum(axis=0)
    total = np.where(known, stacked, 0).sum(axis=0)
    return np.divide(total, count, out=np.full(stacked.shape[1], np.nan), where=count > 0)


def correlations_of(predict: Callable[[slice], np.ndarray], y: Matrix) -> np.ndarray:
    """Return the Pearson correlation of every gene over spots, computed for chunks of genes to save memory."""
    y = y.tocsc() if sparse.issparse(y) else y
    parts = [slice(i, i + _GENES) for i in range(0, y.shape[1], _GENES)]
    return np.concatenate([pearson(predict(part), dense(y[:, part])) for part in parts])


_COLUMNS = ["fold", "held_out", "epoch", "loss", "kd", "sa", "matching", "val_error", "peak_memory"]


def history_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=_COLUMNS)


def make_result(
    job: Job,
    spec: HeadSpec,
    depth: Depth,
    config: PeftConfig | None,
    reader: Reader,
    fitted: Fitted,
    selection: pd.DataFrame,
    epochs: int = 0,
    blocks: str | int | None = None,
) -> Adapter:
    """Score every gene on the held-out groups and return the adapter, still without weights and history."""
    data, o = job.data, job.options
    with o.profile.stage("head"):
        held_out = [reader.held_out(reading, number) for number, reading in enumerate(fitted.folds)]
        scores, alone = _gene_scores(job, fitted, held_out)
        # where methods are compared, nobody asks
        kept = None if data.counts is None else (held_out_of(job, fitted, held_out), tile_novelty(job, reader.features))
    o.profile.saw_memory(peak_memory(o.device))
    table = pd.concat([selection, fitted.table.assign(stage="reading", epochs=epochs)])
    table = table.reindex(columns=SELECTION).reset_index(drop=True)
    table["depth"] = [depth_name(d) for d in table["depth"]]
    defaults = {"network": "frozen", "head": "ridge", "context_um": 0.0, "fields": 0, "rank": 0, "weight": 0.0}
    for name, missing in defaults.items():
        table[name] = table[name].astype(object).where(table[name].notna(), missing).astype(type(missing))
    return Adapter(
        encoder=job.model.encoder,
        encoder_digest=job.model.digest,
        spec=job.spec,
        depth=depth,
        method=method_name(o.method),
        genes=tuple(str(gene) for gene in data.genes),
        reading=fitted.reading,
        fields_um=o.fields_um,
        orientations=o.readout.orientations,
        config=config,
        weights={},
        gene_scores=scores,
        history=history_frame([]),
        selection=table,
        info=_info(job, spec, depth, config, fitted, alone, epochs, blocks),
        held_out=None if kept is None else kept[0],
        novelty=None if kept is None else kept[1],
    )


SELECTION = ["stage", "network", "head", "depth", "context_um", "fields", "epochs", "rank", "alpha", "error", "weight"]


def _info(
    job: Job,
    spec: HeadSpec,
    depth: Depth,
    config: PeftConfig | None,
    fitted: Fitted,
    alone: dict[str, float],
    epochs: int,
    blocks: str | int | None,
) -> dict[str, Any]:
    """Return the summary of a fit, ``Adapter.info``."""
    data, o = job.data, job.options
    used = fitted.reading.use()
    weighed = fitted.table[fitted.table["weight"] > 0]
    return {
        "depth": depth_name(depth),
        "n_spots": int(data.tiles.n),
        "groups": [str(g) for g in np.unique(data.groups)],
        "sections": [str(s) for s in np.unique(data.sections)],
        "held_out": [fold.name for fold in job.folds],
        "teacher": None if job.teacher is None else job.teacher.name,
        "teacher_licence": None if job.teacher is None else job.teacher.licence,
        "teacher_digest": None if job.teacher is None else job.teacher.digest,
        "epochs": epochs,
        "head": spec.readout.head,
        "members": {
            name: {"weight": sum(m.weight for m in used.members if m.name == name), "pearson": pearson}
            for name, pearson in alone.items()
        },
        "alpha": _typical(weighed["alpha"], weighed["weight"]),
        "context_um": list(used.radii_um),
        "fields_um": list(o.fields_um),
        "orientations": o.readout.orientations,
        "n_clusters": None if config is None else n_clusters_for(int(data.tiles.n), o.recipe.n_clusters),
        "blocks": o.recipe.blocks if blocks is None else blocks,
        "rank": None if config is None else getattr(config, "r", None),
        "n_parameters": 0,
        "n_views": None if config is None else o.recipe.n_views,
        "refit": None if config is None else o.recipe.refit,
        "random_state": o.random_state,
        "precision": o.precision,
        "profile": o.profile.record(),
        "versions": {name: version(name) for name in ("pekasc", "torch", "timm", "peft", "scikit-learn")},
    }


def _typical(values: pd.Series, weights: pd.Series) -> float | None:
    """Return the weighted geometric mean of penalties; None where every gene has its own."""
    known = values.notna().to_numpy()
    if not known.any():
        return None
    return float(np.exp(np.average(np.log(values[known]), weights=weights[known])))
