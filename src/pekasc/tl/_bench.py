"""Prepare the comparisons of `tl.cross_validate`: folds, teacher and tiles of the spots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache as cache_once
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from scipy import sparse

from pekasc._digests import fingerprint
from pekasc._expression import Matrix, did_you_mean
from pekasc._keys import PATIENT
from pekasc._options import FIT_MEMORY
from pekasc._sections import coarse_tiles, places
from pekasc._warnings import warn_user
from pekasc.models.comparing import (
    HEST_PROTOCOLS,
    MIN_TEST,
    Bench,
    Comparison,
    Results,
)
from pekasc.models.heads import check_radius
from pekasc.models.selection import Options, kept_spots
from pekasc.models.teachers import TEACHERS, StoredTeacher, TeacherModel, precomputed
from pekasc.tiling import ArrayTiles, TileSource
from pekasc.tl._options import ComparisonCall
from pekasc.tl._read import Spots, field_scales, fields_of
from pekasc.tl._select import training_mask
from pekasc.tl._teachers import fitted_here, make_teacher, stored_key, stored_teacher

HEST_TILES = (224, 0.5)


def make_comparisons(
    call: ComparisonCall,
    spots: Spots,
    groups: str | None,
    folds: Any,
    sets: dict[str, list[str] | None],
    n_genes: int,
) -> list[Comparison]:
    """Return the comparisons to run, one per group of readouts that share a training; pixels are read last."""
    parts = _folds(spots, folds)
    leaky = _warn_of_leaks(parts, _units(spots, by_default=groups is None and folds is None))
    for readout in call.readouts:
        if readout.context_um != "auto":
            check_radius(spots.coords_um, spots.labels, readout.context_um)
    if call.protocol in HEST_PROTOCOLS and (spots.spec.tile_px, spots.spec.mpp) != HEST_TILES:
        warn_user(
            f"HEST-Bench has tiles of {HEST_TILES[0]} px at {HEST_TILES[1]} um/px, these are {spots.spec.tile_px} px "
            f"at {spots.spec.mpp:g}: scores do not compare with its published ones."
        )
    cache = Results(None if call.compute.cache is None else Path(call.compute.cache))
    teacher, teacher_fingerprint = _teacher(call, spots, cache)
    names = [str(name) for name in spots.names]
    counts = sparse.csr_matrix(spots.counts)
    centres = {name: fingerprint(centres) for name, centres in sorted(places(spots.sections).items())}
    places_fingerprint = fingerprint(spots.labels.astype("U"), spots.coords_um, centres, asdict(spots.spec))
    data_fingerprint = fingerprint(
        counts.data, counts.indices, counts.indptr, np.array(names), spots.groups.astype("U"), places_fingerprint
    )
    tiles: dict[tuple[float, ...], list[TileSource]] = {}
    coarse = None
    reads_image = any(row.reads_image for row in call.methods.values())
    if reads_image and any(readout.stain is not None for readout in call.readouts):
        coarse = np.concatenate([coarse_tiles(section, spots.spec, every=True) for section in spots.sections])
    out = []
    for shared in call.shared_readouts():
        fields_um = fields_of(spots, shared[0], lambda width: _kept(spots, parts, width))
        scales = field_scales(spots.spec, fields_um)
        if scales not in tiles:
            tiles[scales] = spots.read_tiles(scales, call.compute.memory(FIT_MEMORY))
        # all pixels, since two images may differ in a few tiles only
        pixels = [fingerprint(t.array) if isinstance(t, ArrayTiles) else None for t in tiles[scales]]
        bench = Bench(
            tiles=tiles[scales],
            spec=spots.spec,
            log=spots.expression,
            counts=counts,
            genes=names,
            groups=spots.groups,
            sections=spots.labels,
            coords_um=spots.coords_um,
            totals=spots.totals,
            default_groups=groups is None,
            folds=parts,
            leaky=leaky,
            teacher=call.teacher.name,
            make_teacher=teacher,
            draws=call.teacher.name == "scvi",
            teacher_fingerprint=teacher_fingerprint,
            tiles_fingerprint=fingerprint(places_fingerprint, scales, pixels),
            fingerprint=data_fingerprint,
            stain=shared[0].stain if reads_image else None,
            coarse=coarse,
        )
        # the fit of a fold writes nothing to disk: finished fits are kept by the comparison
        compute = call.compute.replace(cache=None, resume=None, client=None, trainer=None)
        options = Options(None, call.recipe, shared[0], compute, call.device, fields_um)
        out.append(Comparison(
            bench, call.methods, shared, call.seeds, call.protocol, sets, n_genes, options, Results(call.store), cache
        ))  # fmt: skip
    return out


def _kept(spots: Spots, folds: Mapping[str, tuple[np.ndarray, np.ndarray]], width_um: float) -> list[tuple[int, int]]:
    """Return :func:`kept_spots` of the training spots of all folds."""
    return [
        kept
        for train, _ in folds.values()
        for kept in kept_spots(
            spots.groups[train] if len(np.unique(spots.groups[train])) > 1 else spots.labels[train],
            spots.coords_um[train], spots.labels[train], spots.spec, width_um,
        )
    ]  # fmt: skip


def _units(spots: Spots, *, by_default: bool) -> dict[str, np.ndarray]:
    """Return labels of the spots that must not be in training and in test, by kind: section, patient, group."""
    table, rows = spots.table, spots.rows
    units = {"section": spots.labels, "group": spots.groups}
    if not by_default:  # for the default folds, `_folds` warns of sections of one patient
        patients = table.obs[PATIENT].astype(str).to_numpy()[rows] if PATIENT in table.obs else spots.groups
        units = {"section": spots.labels, "patient": patients, "group": spots.groups}
    return units


def _teacher(
    call: ComparisonCall, spots: Spots, cache: Results
) -> tuple[Callable[[np.ndarray, int], TeacherModel] | None, str]:
    """Return a function that makes the teacher of a fold, and the fingerprint of an embedding shared by all folds."""
    teacher, table = call.teacher, spots.table
    stored = stored_key(table, teacher)
    if not any(row.reads_teacher for row in call.methods.values()):
        return None, ""
    if stored is not None:
        _check_not_fitted(table, stored)
        embedding = stored_teacher(table, stored, teacher.name, spots.rows)
        return lambda expressed, seed: embedding, fingerprint(embedding.embedding)
    row = TEACHERS[teacher.name]

    def make(expressed: np.ndarray, seed: int) -> TeacherModel:
        return make_teacher(
            teacher, expression=spots.expression, counts=spots.counts if row.counts else None, genes=spots.names,
            expressed=expressed, n_components=call.recipe.teacher_components if teacher.name == "pca" else None,
            device=call.device, precision=call.compute.precision, random_state=seed,
        )  # fmt: skip

    if row.fitted:
        return make, ""
    # a frozen teacher's embedding is the same in every fold: computed once, when a fold first needs it
    made = make(np.arange(spots.names.size), 0)
    key = fingerprint(
        *_matrix_parts(spots.counts), spots.names, made.name, made.digest,
        call.compute.precision,
    )  # fmt: skip

    @cache_once
    def once() -> StoredTeacher:
        kept, _ = cache.kept(f"teacher-{made.name}", key, lambda: ({"embedding": precomputed(made).embedding}, {}))
        return StoredTeacher(kept["embedding"], made.name, made.licence, made.digest)

    return lambda expressed, seed: once(), key


def _warn_of_leaks(parts: dict[str, tuple[np.ndarray, np.ndarray]], units: Mapping[str, np.ndarray]) -> frozenset[str]:
    """Warn of folds with spots of one section, patient or group in training and in test, and return their names."""
    leaky: set[str] = set()
    for what, labels in units.items():
        cut = [name for name, (train, test) in parts.items() if set(labels[train]) & set(labels[test])]
        if set(cut) - leaky:
            warn_user(
                f"Folds {cut} have spots of one {what} in training and in test: neighbouring and serial tissue leaks, "
                "and inflates their scores. `pekasc.tl.leakage_audit` shows by how much."
            )
        leaky |= set(cut)
    return frozenset(leaky)


def _check_not_fitted(table: AnnData, key: str) -> None:
    record = fitted_here(table, key)
    if record is not None:
        raise ValueError(
            f"The teacher obsm[{key!r}] was fitted by `embed_expression` on {record['n_spots']} spots of this table, "
            "test spots among them: it would leak. Give "
            f"`teacher={str(record.get('teacher', 'pca'))!r}`, which is fitted in every fold."
        )


def _folds(spots: Spots, folds: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return training and test spots of every fold, as positions among the spots."""
    table, rows = spots.table, spots.rows
    out: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    if isinstance(folds, Mapping):
        if not folds:
            raise ValueError(
                "`folds=` is empty: map names of folds to pairs (train, test), or leave it out to hold out groups."
            )
        for name, pair in folds.items():
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise TypeError(f"`folds[{name!r}]` must be a pair (train, test), got {pair!r}.")
            train, test = (training_mask(table, part)[rows] for part in pair)
            if (train & test).any():
                raise ValueError(
                    f"`folds[{name!r}]`: {int((train & test).sum())} spots are in training and in test: leave them "
                    "out of one."
                )
            out[str(name)] = np.flatnonzero(train), np.flatnonzero(test)
    elif folds is not None:
        if not isinstance(folds, str) or folds not in table.obs:
            close = did_you_mean(folds, table.obs)
            raise KeyError(f"`folds={folds!r}` not found in `obs`.{close} Available columns: {list(table.obs)}.")
        column = table.obs[folds].iloc[rows]
        if column.isna().any():
            raise ValueError(
                f"{int(column.isna().sum())} spots have no fold in `obs[{folds!r}]`: fill it (`pekasc.pp.split` "
                "does), or leave them out."
            )
        out = _each(column.astype(str).to_numpy(dtype=object), f"obs[{folds!r}]")
    else:
        if spots.group_key is None:
            warn_user(
                "There are not two patients to hold out in turn (see `groups=`), so sections are: scores are for a new "
                "section of the same tissue, and say little about another patient."
            )
        out = _each(spots.groups, "the sections" if spots.group_key is None else f"obs[{spots.group_key!r}]")
    for name, (train, test) in out.items():
        if test.size < MIN_TEST or not train.size:
            raise ValueError(
                f"Fold {name!r} has {train.size} training and {test.size} test spots with tile and counts: at least "
                f"{MIN_TEST} test spots are needed for a score. Join groups, or leave this one out with `folds=`."
            )
    return out


def _each(labels: np.ndarray, what: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    names = np.unique(labels)
    if len(names) < 2:
        raise ValueError(
            f"There is a single group in {what}, {str(names[0])!r}: nothing is left to train on while it is held out. "
            "Give sections of another patient, other `groups=`, or `folds=`."
        )
    return {str(n): (np.flatnonzero(labels != n), np.flatnonzero(labels == n)) for n in names}


def _matrix_parts(matrix: Matrix) -> list[np.ndarray]:
    """Return the arrays that a matrix consists of, for its fingerprint."""
    return [matrix.data, matrix.indices, matrix.indptr] if sparse.issparse(matrix) else [np.asarray(matrix)]
