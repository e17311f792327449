"""The end of a fit: score every gene on held-out groups, and assemble the adapter with its summary."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
from peft import PeftConfig
from scipy import sparse

from pekasc._expression import Matrix, dense
from pekasc.models.adapter import Adapter
from pekasc.models.encoders import Depth, depth_name
from pekasc.models.heads import FoldData, Head, RidgeHead, fit_rows
from pekasc.models.runtime import peak_memory
from pekasc.models.selection._inputs import HeadSpec
from pekasc.models.selection._job import Job
from pekasc.models.selection._readout import Reading
from pekasc.models.selection._scores import pearson
from pekasc.models.training import method_name, n_clusters_for

_GENES = 2048  # per chunk


def _gene_scores(job: Job, head_name: str, inner: Sequence[FoldData], setting: Any) -> pd.DataFrame:
    """Return the Pearson correlation of every gene within held-out sections, averaged over sections.

    Depth, epochs and penalty were chosen on the same groups, so the scores are slightly optimistic; no weights were
    fitted on them.
    """
    data, o = job.data, job.options
    correlations = []
    for part, fold in zip(inner, job.folds, strict=True):
        head = fit_rows(head_name, part, o.readout.n_components, setting, o.random_state)
        for section in np.unique(data.sections[fold.held_out]):
            rows = fold.held_out[data.sections[fold.held_out] == section]
            correlations.append(correlations_of(head, part.features[rows], data.expression[rows]))
    stacked = np.array(correlations)
    known = np.isfinite(stacked)
    count = known.sum(axis=0)
    mean = np.divide(
        np.where(known, stacked, 0).sum(axis=0), count, out=np.full(stacked.shape[1], np.nan), where=count > 0
    )
    return pd.DataFrame({"pearson": mean, "n_sections": count}, index=pd.Index(list(data.genes), name="gene"))


def correlations_of(head: Head, x: np.ndarray, y: Matrix) -> np.ndarray:
    """Return the Pearson correlation of every gene over spots, computed for chunks of genes to save memory."""
    y = y.tocsc() if sparse.issparse(y) else y
    parts = [slice(i, i + _GENES) for i in range(0, y.shape[1], _GENES)]
    return np.concatenate([pearson(head.predict(x, part), dense(y[:, part])) for part in parts])


_COLUMNS = ["fold", "held_out", "epoch", "loss", "kd", "sa", "matching", "val_error", "peak_memory"]


def history_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=_COLUMNS)


def make_result(
    job: Job,
    spec: HeadSpec,
    depth: Depth,
    config: PeftConfig | None,
    reading: Reading,
    selection: pd.DataFrame,
    epochs: int = 0,
    blocks: str | int | None = None,
) -> Adapter:
    """Score every gene on the held-out groups and return the adapter, still without weights and history."""
    data, o, head = job.data, job.options, reading.head
    with o.profile.stage("head"):
        scores = _gene_scores(job, spec.head, reading.inner, reading.setting)
    o.profile.saw_memory(peak_memory(o.device))
    columns = ["stage", "depth", "epochs", "alpha", "error"]
    table = selection[columns].reset_index(drop=True)
    table["depth"] = [depth_name(d) for d in table["depth"]]
    return Adapter(
        encoder=job.model.encoder,
        encoder_digest=job.model.digest,
        spec=job.spec,
        depth=depth,
        method=method_name(o.method),
        genes=tuple(str(gene) for gene in data.genes),
        head=head,
        context_um=spec.context_um,
        scales=o.readout.scales,
        orientations=o.readout.orientations,
        config=config,
        weights={},
        gene_scores=scores,
        history=history_frame([]),
        selection=table,
        info=_info(job, spec, depth, config, head, epochs, blocks),
    )


def _info(
    job: Job,
    spec: HeadSpec,
    depth: Depth,
    config: PeftConfig | None,
    head: Head,
    epochs: int,
    blocks: str | int | None,
) -> dict[str, Any]:
    """Return the summary of a fit, ``Adapter.info``."""
    data, o = job.data, job.options
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
        "head": spec.head,
        "alpha": float(np.median(head.alpha)) if isinstance(head, RidgeHead) else None,
        "context_um": spec.context_um,
        "scales": list(o.readout.scales),
        "orientations": o.readout.orientations,
        "n_components": int(head.projection.components.shape[0]),
        "n_clusters": None if config is None else n_clusters_for(int(data.tiles.n), o.recipe.n_clusters),
        "blocks": o.recipe.blocks if blocks is None else blocks,
        "rank": None if config is None else getattr(config, "r", None),
        "n_parameters": 0,
        "n_views": None if config is None else o.recipe.n_views,
        "random_state": o.random_state,
        "precision": o.precision,
        "profile": o.profile.record(),
        "versions": {name: version(name) for name in ("pekasc", "torch", "timm", "peft", "scikit-learn")},
    }
