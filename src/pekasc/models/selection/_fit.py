"""Fit an adapter on arrays: tiles, expression and groups, with one selection rule for every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pekasc._options import Readout
from pekasc._settings import get_logger
from pekasc.models.adapter import Adapter
from pekasc.models.encoders import ArraysOnAccess, Depth, EncoderNetwork, candidate_depths, depth_name, warn_of_scale
from pekasc.models.heads import ALPHAS, check_head, n_components_for, ranks_for
from pekasc.models.runtime import PRECISIONS
from pekasc.models.selection._choice import Choice
from pekasc.models.selection._fingerprint import settings_of
from pekasc.models.selection._folds import InnerFold, inner_folds
from pekasc.models.selection._inputs import Data, HeadSpec, Options
from pekasc.models.selection._job import Job
from pekasc.models.selection._readout import Features, Reader, choose_depth, fixed_radius
from pekasc.models.selection._result import make_result
from pekasc.models.selection._state import Resume
from pekasc.models.selection._student import fit_student
from pekasc.models.teachers import TeacherModel
from pekasc.models.training import check_starts, n_clusters_for, target_layers
from pekasc.tiling import TileSpec

logger = get_logger(__name__)


def fit(
    model: EncoderNetwork,
    spec: TileSpec,
    data: Data,
    teacher: TeacherModel | None,
    options: Options,
    heads: Sequence[HeadSpec],
    frozen: Mapping[Depth, np.ndarray] | None = None,
) -> list[Adapter]:
    """Fit an adapter on the training spots in `data`; return one per head.

    Settings are chosen, or averaged, by the held-out error: those of frozen features, and those of the features of
    adapters that were trained without the held-out groups. The final fit uses all training groups. An adapter's depth
    is chosen by plain ridge without spatial context, so that all heads share the training.

    Parameters
    ----------
    model
        The encoder's network. It is returned without an adapter, in half precision for mixed precision.
    spec
        Size of the tiles.
    data
        The training spots.
    teacher
        Teacher of the training spots; None for the frozen encoder.
    options
        Method, option objects and device.
    heads
        Heads to fit.
    frozen
        Features of the training tiles by depth, if they are computed already.
    """
    for head in heads:
        for name in head.names(adapted=True):
            check_head(name.partition(":")[2])
    if options.method is not None:
        if teacher is None:
            raise ValueError("An adapter needs a teacher.")
        if teacher.n_spots != data.tiles.n:
            raise ValueError(
                f"The teacher {teacher.name!r} has {teacher.n_spots} spots, but there are {data.tiles.n} training "
                "spots: its embedding needs one row for each, in their order."
            )
    warn_of_scale(model.encoder, spec.mpp)
    depths = depths_of(model, options.readout)
    if options.method is not None:
        # fail before hours of embedding if there are no layers to attach to
        target_layers(model, depths[-1], options.recipe.blocks, options.method)
    folds = inner_folds(data.groups, data.coords_um, data.sections, margin_um(spec, options.fields_um))
    _check_sizes(folds, options, heads, data)
    _check_panels(folds, data)
    dtype = PRECISIONS[options.precision]
    if dtype is not None:
        model.halve(dtype)
    local = np.full(data.tiles.n, data.local is None)
    if data.local is not None:
        local[data.local] = True
    if options.method is not None and (options.compute.gradient_checkpointing or options.compute.compile):
        model.check_splits()
    if options.method is not None and options.trainer:
        check_starts(options.engine, options.recipe)
    resume = options.compute.resume if options.method is not None else None
    settings = {} if resume is None else settings_of(model, data, teacher, options, heads)
    job = Job(
        model, spec, data, teacher, options, folds, local, Resume(None if resume is None else Path(resume), settings)
    )
    with job.resume.held():
        return _fit(job, depths, heads, frozen)


def _fit(
    job: Job, depths: list[Depth], heads: Sequence[HeadSpec], frozen: Mapping[Depth, np.ndarray] | None
) -> list[Adapter]:
    data, o, folds = job.data, job.options, job.folds
    known = job.resume.facts("choice") if o.method is not None else None
    if frozen is not None and list(frozen) != depths:
        raise ValueError(f"Features of the depths {depths} are needed, got those of {list(frozen)}.")
    if frozen is None:
        frozen = job.frozen(depths)
    if known is None:
        tiles = tiles_alone(frozen, 1 + len(o.fields_um))
        with o.profile.stage("head"):
            choice = choose_depth(tiles, data, folds, heads[0].readout.n_components)
        _log_depth(choice.depth, depths, choice.table)
        job.resume.put_facts("choice", _choice_to_json(choice))
    else:
        choice = _choice_from_json(job, known, depths)
    features = Features(frozen, choice.depth, n_fields=1 + len(o.fields_um))
    reader = Reader(data, folds, features)
    if o.method is not None:
        return fit_student(job, choice, features, heads)
    selection = choice.table.assign(stage="frozen", epochs=0)
    made = []
    for head in heads:
        with o.profile.stage("head"):
            read_at = depths
            if head.readout.depth == "best":
                # with the context and fields that the head has, and several blocks side by side
                r = head.readout
                chosen = choose_depth(frozen, data, folds, r.n_components, fixed_radius(r), r.n_depths or 1)
                read_at = [chosen.depth]
            fitted = reader.fit(head, read_at)
        made.append(make_result(job, head, choice.depth, None, reader, fitted, selection))
    return made


def tiles_alone(features: Mapping[Depth, np.ndarray], n_fields: int) -> ArraysOnAccess[Depth]:
    """Return features by depth of the tiles, without those of wider fields of view, which follow them."""

    def own(depth: Depth) -> np.ndarray:
        values = features[depth]
        return values[:, : values.shape[1] // n_fields]

    return ArraysOnAccess(features, own)


def _log_depth(depth: Depth, depths: list[Depth], table: pd.DataFrame) -> None:
    candidates = ", ".join(depth_name(candidate) for candidate in depths)
    logger.hint(
        "Depth: %s of %s (held-out error %.3f of the mean predictor's).",
        depth_name(depth) if depth is None else f"block {depth_name(depth)}", candidates, table["error"].min(),
    )  # fmt: skip


def _choice_to_json(choice: Choice) -> dict[str, Any]:
    table = choice.table[["depth", "alpha", "error"]].to_numpy(dtype=object).tolist()
    return {"depth": choice.depth, "alpha": choice.alpha, "table": table}


def _choice_from_json(job: Job, facts: Any, depths: Sequence[Depth]) -> Choice:
    """Return the choice of an earlier run, which must be one that this fit could make."""

    def depth(value: Any) -> Depth:
        return None if value is None else tuple(value)

    try:
        rows = [(depth(d), float(a), float(e)) for d, a, e in facts["table"]]
        choice = Choice(
            depth(facts["depth"]), float(facts["alpha"]), pd.DataFrame(rows, columns=["depth", "alpha", "error"])
        )
        fits = choice.depth in depths and {d for d, _, _ in rows} <= set(depths) and choice.alpha in {*ALPHAS}
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(job.resume.damaged(f"choice.json has another shape ({error!r})")) from error
    if not fits or not rows:
        raise ValueError(job.resume.damaged("choice.json has depths or penalties that this fit does not try"))
    return choice


def margin_um(spec: TileSpec, fields_um: Sequence[float] = ()) -> float:
    """Return the distance in um from which tiles share no pixel: the diagonal of the largest field of view."""
    return float(max([spec.side_um, *fields_um]) * 2**0.5)


def kept_spots(
    groups: np.ndarray, coords_um: np.ndarray, sections: np.ndarray, spec: TileSpec, width_um: float
) -> list[tuple[int, int]]:
    """Return the training spots of every inner fold with the margin of a field of view, and with that of the tile."""
    pairs = zip(
        inner_folds(groups, coords_um, sections, margin_um(spec, [width_um])),
        inner_folds(groups, coords_um, sections, margin_um(spec)),
        strict=True,
    )
    return [(len(wide.train), len(narrow.train)) for wide, narrow in pairs]


def _check_sizes(folds: list[InnerFold], options: Options, heads: Sequence[HeadSpec], data: Data) -> None:
    """Check explicit sizes against the smallest inner fold, which has fewer spots than the final fit."""
    smallest = min(folds, key=lambda fold: len(fold.train))
    n = len(smallest.train)
    try:
        if options.method is not None:
            n_clusters_for(n, options.recipe.n_clusters)
        for head in heads:
            if head.readout.n_components is not None:
                n_components_for(n, n, head.readout.n_components)
            if head.readout.head_rank is not None:
                ranks_for(n, (data.expression if data.every is None else data.every).shape[1], head.readout.head_rank)
    except ValueError as error:
        raise ValueError(
            f"{error} (These are the {n} spots that are left to train on while {smallest.name} is held out.)"
        ) from error


def _check_panels(folds: list[InnerFold], data: Data) -> None:
    """Check that some gene was measured in training and in held-out spots of an inner fold."""
    if data.panels is None:
        return
    counted = [data.panels.learned(fold.train) & (data.panels.n_spots(fold.held_out) > 0) for fold in folds]
    if not np.any(counted):
        raise ValueError(
            f"None of the {len(data.genes)} genes was measured in two training groups, so that nothing can be chosen "
            "on held-out ones. Ask for genes that all sections measured as well (`genes=`), or leave `genes=` out."
        )
    alone = int((~np.any(counted, axis=0)).sum())
    if alone:
        logger.hint(
            "%d genes were measured in one training group only: they are learned from it, with the settings of the "
            "others, and have no held-out score.", alone,
        )  # fmt: skip


def depths_of(model: EncoderNetwork, readout: Readout) -> list[Depth]:
    """Return the depths at which a readout needs features: all candidates for "all" and "best", else the given one."""
    depth = readout.depths
    if depth in ("all", "best"):
        return candidate_depths(model.n_blocks)
    return [None] if depth is None else [tuple(model.check_depth(int(block)) for block in depth)]
