"""`tl.cross_validate`: every fitted thing inside the fold, every method on the same head."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from peft import PeftConfig
from scipy import sparse
from spatialdata import SpatialData
from tqdm.auto import tqdm

from pekasc._digests import fingerprint
from pekasc._expression import gene_names
from pekasc._keys import PATIENT, TILES, check_key
from pekasc._options import FIT_MEMORY, Compute, Readout, Recipe, resolve, resolve_recipe, unused_in_embedding, whole
from pekasc._sections import check_table, get_table, places
from pekasc.models import Encoder, Teacher
from pekasc.models.comparing import (
    BEST_FROZEN,
    CHOSEN,
    HEST,
    MIN_TEST,
    RIVALS,
    Bench,
    Comparison,
    Results,
    Rival,
    check_gene_sets,
    rival,
    score_fold,
)
from pekasc.models.encoders import EncoderNetwork, resolve_encoder
from pekasc.models.heads import check_head, check_radius
from pekasc.models.runtime import autocast, resolve_device
from pekasc.models.selection import Options
from pekasc.models.teachers import TEACHERS, StoredTeacher, TeacherModel, asked_once, resolve_teacher
from pekasc.models.training import check_method, known_methods, method_name
from pekasc.tiling import ArrayTiles, TileSource
from pekasc.tl._options import unused_in_recipe
from pekasc.tl._read import Spots, reading
from pekasc.tl._select import training_mask
from pekasc.tl._teachers import check_installed, fitted_here, make_teacher, stored_key, stored_teacher

HEST_TILES = (224, 0.5)
_HERE, _KEPT = "a comparison runs in this process", "a comparison keeps its finished pieces in `cache`"
UNUSED_IN_COMPARISON = {"client": _HERE, "trainer": _HERE, "resume": _KEPT, "checkpoint_minutes": _KEPT}


def cross_validate(
    sdata: SpatialData,
    *,
    methods: Sequence[str | PeftConfig] | Mapping[str, str | PeftConfig] = ("mean", "frozen", "frozen-best", "bone"),
    encoders: str | Encoder | Sequence[str | Encoder] = "tiny",
    teacher: str | Teacher = "pca",
    groups: str | None = None,
    folds: str | Mapping[str, tuple[Any, Any]] | None = None,
    genes: Any = ("svg", "hvg"),
    n_genes: int = 50,
    protocol: Literal["nested", "hest"] = "nested",
    seeds: int | Sequence[int] = (0,),
    layer: str | None = None,
    gene_key: str | None = None,
    recipe: Recipe | str | Mapping[str, Any] | None = None,
    readout: Readout | str | Mapping[str, Any] | None | Sequence[Readout | str | Mapping[str, Any]] = None,
    compute: Compute | str | Mapping[str, Any] | None = None,
    per_gene: bool = False,
    block_um: float = 1000.0,
    n_bootstrap: int = 1000,
    table_name: str = "table",
    key: str = TILES,
    progress: bool = True,
) -> pd.DataFrame:
    """Compare methods on held-out groups, with all fitting and selection inside the training folds.

    In each fold one group is held out, and gene sets, teacher, clusters, cluster head, adapter, projector, depth,
    epochs, scaling, PCA and penalty come from the other groups alone, by the rule of :func:`pekasc.tl.fit_adapter`.
    All methods share the readout, the genes and the spots.

    Parameters
    ----------
    sdata
        Sections with tiles (:func:`pekasc.pp.tile`); tiled with its defaults where they have none.
    methods
        What to compare, or a mapping from names to it:

        ``"mean"``
            The mean of the training spots.
        ``"coordinates"``
            The head on the place in the section, without the image.
        ``"neighbours"``
            The mean of the six nearest spots' measured expression: no prediction, but what smoothing would give.
        ``"teacher"``
            The head on the teacher's embedding of the test spots' own expression, without context: an upper bound.
        ``"frozen"``
            The head on the frozen encoder's last block (its own output with ``readout.depth="own"``).
        ``"frozen-best"``
            The same at the depth that the training groups choose, up to ``readout.n_depths`` blocks side by side: the
            rival. ``fit_adapter(method=None)`` takes one block, as ``n_depths=1`` does here.
        ``"bone"``, ``"bat"``, ``"lora"``, ``"dora"``, ``"adalora"``, ``"hra"``, or a ``peft.PeftConfig``
            PEKA with that adapter.
        ``"frozen+peka"``
            PEKA's features (Block-Affine) beside the frozen ones of the same depth.
    encoders
        One or several encoders, as in :func:`pekasc.tl.fit_adapter`.
    teacher
        As in :func:`pekasc.tl.fit_adapter`. A stored embedding must not have been fitted on spots that are tested: what
        `embed_expression` fitted on this table is an error.
    groups
        Column of obs; each of its values is held out once, and in turn inside the training spots. By default
        ``"patient"``, if there is such a column with two patients or more, else sections, with a warning.
    folds
        Which spots are held out, if not one group after the other: a column of obs with the number of the fold in which
        a row is held out, as :func:`pekasc.pp.split` writes it, or a mapping from a name to ``(train, test)``, each a
        boolean mask, a boolean column of obs or a list of sections.
    genes
        ``"svg"`` (highest Moran's I, mean over training sections), ``"hvg"`` (scanpy's highly variable genes),
        ``"expressed"`` (seen in at least 10 % of the spots of every training group), chosen in the fold; or a list of
        genes, or a mapping from names to lists. One fit predicts the genes of all sets, and choices minimise the error
        over all of them together.
    n_genes
        Genes in a set that is chosen.
    protocol
        ``"nested"``, or ``"hest"``: genes, target, features and regression of HEST-Bench, for comparison with its
        published figures. Its genes are chosen on test samples as well.
    seeds
        Seeds of the training, and of a teacher that draws random numbers; deterministic methods run once.
    layer, gene_key
        As in :func:`pekasc.tl.fit_adapter`.
    recipe
        How adapters are trained, as in :func:`pekasc.tl.fit_adapter`. ``"paper"`` brings the published features with it
        unless `readout` is given.
    readout
        How features become genes, as in :func:`pekasc.tl.fit_adapter`, or several: those that differ in head and
        context alone share one training. The depth of an adapter is chosen without context.
    compute
        As in :func:`pekasc.tl.fit_adapter`. ``cache`` is a folder in which finished pieces are kept: a call that was
        interrupted, or that asks for more, goes on from them.
    per_gene
        Return a row for every gene.
    block_um, n_bootstrap
        Intervals come from so many draws of squares of tissue of this side.
    table_name, key, progress
        As in :func:`pekasc.tl.fit_adapter`.

    Returns
    -------
    One row per fold, section, encoder, method, readout, seed and gene set, with

    ``fold``, ``section``
        The held-out groups; a section of them, or ``"pooled"`` for the spots of all together.
    ``whole_groups``
        Whether no section, patient or group is on both sides of the fold; elsewhere scores are too good.
    ``encoder``, ``method``, ``teacher``, ``head``, ``context_um``, ``scales``, ``orientations``, ``readout``, \
    ``seed``, ``genes``
        What was done; ``context_um`` is 0 without, scales are joined by ``+``, ``readout`` can be typed back.
    ``n_genes``, ``n_undefined``, ``n_constant_train``
        Genes of the set; those that are constant in the test spots: they have no score and are left out of the
        mean; and those that are constant in the training spots, which nobody can learn: they count 0, as does every
        gene whose prediction is constant.
    ``n_train``, ``n_test``
        Spots.
    ``pearson``, ``pearson_low``, ``pearson_high``, ``rmse``
        Mean Pearson correlation over genes with its 95 % interval, and root mean squared error over spots and genes.
        Intervals are over tissue of the test section: they know nothing of how patients differ.
    ``difference``, ``difference_low``, ``difference_high``
        Paired difference in correlation to ``"frozen-best"`` of the same encoder and readout, where it was asked for.
    ``depth``, ``epochs``, ``alpha``, ``n_parameters``, ``seconds``
        What was chosen, trainable parameters of the adapter, seconds of its training.

    With `per_gene`: a row for every gene of every set, with ``gene``, ``pearson`` (NaN where it is undefined),
    ``difference`` to ``"frozen-best"`` and ``rmse``.
    :func:`pekasc.get.comparison` sums the rows up.

    Raises
    ------
    KeyError
        If a column, gene, section or the teacher's embedding is not there.
    TypeError
        If an argument or a field of an option has a wrong type.
    ValueError
        If there is a single group, a group has too few spots, a method is unknown, or a field of an option is not known
        or does nothing here.
    ImportError
        If a method asks for scVI and it is not installed.

    References
    ----------
    Pan, Chen, Secrier, arXiv:2504.07061; HEST-Bench: Jaume et al., NeurIPS 2024. Adapters: the PEFT library.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=3, size_um=1000)
    >>> pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    >>> frame = pk.tl.cross_validate(sdata, methods=["mean", "frozen"], genes=["svg"], n_genes=20, progress=False)
    >>> sorted(frame["method"].unique())
    ['frozen', 'mean']
    """
    check_key(key)
    table = get_table(sdata, table_name)
    check_table(table)
    call = _resolve(
        methods, encoders, teacher, protocol, seeds, recipe, readout, compute, genes=genes, n_genes=n_genes,
        block_um=block_um, n_bootstrap=n_bootstrap, names=gene_names(table, gene_key),
    )  # fmt: skip
    with reading(sdata, table_name=table_name, key=key, layer=layer, gene_key=gene_key, groups=groups) as spots:
        comparisons = _comparisons(call, spots, groups, folds, n_genes)
    frames = []
    with tqdm(total=call.n_units(comparisons), desc="cross-validate", unit="fit", disable=not progress) as bar:
        for row in call.encoders:
            model = EncoderNetwork(row, spots.spec.tile_px)
            for comparison in comparisons:
                frames += [
                    score_fold(fold, found, comparison.bench, per_gene, block_um, n_bootstrap)
                    for fold, found in comparison.on_encoder(model, bar)
                ]
    return pd.concat(frames, ignore_index=True)


@dataclass(frozen=True)
class _Call:
    """The arguments of a comparison, resolved."""

    methods: dict[str, Rival]
    encoders: list[Encoder]
    teacher: Teacher
    protocol: str
    seeds: tuple[int, ...]
    sets: dict[str, list[str] | None]
    recipe: Recipe
    readouts: list[Readout]
    compute: Compute
    device: torch.device

    def shared_readouts(self) -> list[list[Readout]]:
        """Return the readouts by training: those that differ in head and context share one."""
        shared: dict[Readout, list[Readout]] = {}
        for readout in self.readouts:
            shared.setdefault(readout.replace(head="ridge", context_um=None), []).append(readout)
        return list(shared.values())

    def n_units(self, comparisons: Sequence[Comparison]) -> int:
        """Return how many fits there are to do."""
        return len(self.encoders) * sum(
            len(comparison.bench.folds) * len(comparison.seeds_of(name))
            for comparison in comparisons
            for name in self.methods
        )


def _resolve(
    methods: Any,
    encoders: Any,
    teacher: Any,
    protocol: str,
    seeds: Any,
    recipe: Any,
    readout: Any,
    compute: Any,
    *,
    genes: Any,
    n_genes: Any,
    block_um: Any,
    n_bootstrap: Any,
    names: np.ndarray,
) -> _Call:
    """Check all arguments before any work."""
    rows = check_methods(methods, protocol)
    described = resolve_teacher(teacher)
    if whole("n_genes", n_genes) < 1 or whole("n_bootstrap", n_bootstrap) < 1 or not block_um > 0:
        raise ValueError(
            f"`n_genes={n_genes}`, `n_bootstrap={n_bootstrap}` and `block_um={block_um}` must be positive."
        )
    numbers = tuple(whole("seeds", seed) for seed in _several(seeds))
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"`seeds={numbers}` must hold each seed once.")
    training, readout = resolve_recipe(recipe, readout, unused=_unused_in_recipe(rows, described))
    readouts = _readouts(readout, rows, protocol)
    how = resolve(compute, Compute, "compute", unused=_unused_in_compute(rows))
    device = resolve_device(how.device)
    autocast(device, how.precision)
    found = [resolve_encoder(e) for e in _several(encoders)]
    if not found:
        raise ValueError("`encoders=` is empty.")
    if len({row.short for row in found}) < len(found):
        raise ValueError("`encoders=` names one twice; give `key=` to tell them apart: `Encoder(..., key=...)`.")
    if genes is None:
        raise ValueError(f"`genes=None`: name sets that are chosen in the fold ({list(CHOSEN)}), or genes.")
    sets: dict[str, list[str] | None] = {HEST: None}
    if protocol == HEST:
        if tuple(_several(genes)) != ("svg", "hvg"):
            raise ValueError('`protocol="hest"` has genes of its own: leave `genes=` out.')
        # as HEST-Bench reads every encoder
        found = [replace(row, pooling="class") if row.pooling == "class+mean" else row for row in found]
    else:
        sets = check_gene_sets(genes, [str(name) for name in names])
    if any(row.reads_teacher for row in rows.values()):
        check_installed(described.name)
    return _Call(rows, found, described, protocol, numbers, sets, training, readouts, how, device)


def _unused_in_recipe(methods: Mapping[str, Rival], teacher: Teacher) -> dict[str, str]:
    trained = [row.trains for row in methods.values() if row.trains is not None]
    if not trained:
        unused = unused_in_recipe(None, teacher)
        if any(row.reads_teacher for row in methods.values()) and teacher.name == "pca":
            del unused["teacher_components"]
        return unused
    of_each = [unused_in_recipe(method, teacher) for method in trained]
    return {name: reason for name, reason in of_each[0].items() if all(name in other for other in of_each)}


def _unused_in_compute(methods: Mapping[str, Rival]) -> dict[str, str]:
    unused = dict(UNUSED_IN_COMPARISON)
    if all(row.trains is None for row in methods.values()):
        unused |= {name: reason for name, reason in unused_in_embedding().items() if name != "cache"}
    return unused


def _readouts(readout: Any, methods: Mapping[str, Rival], protocol: str) -> list[Readout]:
    """Return the readouts that are asked for, each once."""
    given = list(readout) if isinstance(readout, Sequence) and not isinstance(readout, str) else [readout]
    unused = {}
    if all(row.name != BEST_FROZEN for row in methods.values()):
        unused["n_depths"] = 'only "frozen-best" reads several depths'
    if not any(row.reads_image for row in methods.values()):
        unused |= dict.fromkeys(("depth", "n_depths", "scales", "orientations"), "no method reads the image")
    if protocol == HEST:
        unused |= dict.fromkeys(("head", "n_components", "n_depths", "depth"), "HEST-Bench has a regression of its own")
        unused |= dict.fromkeys(("scales", "orientations"), "HEST-Bench reads a tile once and as it is")
    readouts = [resolve(value, Readout, "readout", unused=unused) for value in given]
    for value in readouts:
        check_head(value.head)
    if protocol == HEST:
        idle = sorted({name for value in readouts for name in value.changed() if name in unused})
        if idle:
            raise ValueError(f'`protocol="hest"` has features and a regression of its own: leave {idle} out.')
        readouts = [value.replace(depth="own") for value in readouts]
    if not readouts or len(set(readouts)) < len(readouts):
        raise ValueError(f"`readout={readout!r}` must hold each readout once.")
    return readouts


def check_methods(methods: Any, protocol: str) -> dict[str, Rival]:
    """Return the rows of methods by name.

    Raises
    ------
    ValueError
        If one is unknown, named twice, or not part of the protocol.
    """
    if protocol not in ("nested", HEST):
        raise ValueError(f'`protocol={protocol!r}` is not known. Choose "nested" or "hest".')
    given = methods if isinstance(methods, Mapping) else {_name(m): m for m in _several(methods)}
    if not isinstance(methods, Mapping) and len(given) < len(_several(methods)):
        raise ValueError(
            "`methods=` holds two of one name. Give a mapping from names: "
            '`methods={"lora r=8": LoraConfig(r=8), "lora r=64": LoraConfig(r=64)}`.'
        )
    out: dict[str, Rival] = {}
    for name, method in given.items():
        if method is None:
            raise ValueError(
                '`methods=`: None is the frozen encoder of `fit_adapter`; say "frozen" or "frozen-best" here.'
            )
        known = [*RIVALS, *known_methods()]
        if isinstance(method, str) and method not in known:
            raise RIVALS.unknown("methods", method, f"{list(known_methods())}, or a peft.PeftConfig", known_methods())
        row = rival(method)
        if protocol == HEST and row.hest is None:
            raise ValueError(f'`protocol="hest"` chooses nothing inside the fold, so it has no {method!r}.')
        out[str(name)] = row
    if not out:
        raise ValueError("`methods=` is empty.")
    return out


def _name(method: Any) -> str:
    return method if isinstance(method, str) else "None" if method is None else method_name(check_method(method))


def _several(values: Any) -> list[Any]:
    return [values] if isinstance(values, str | Encoder | PeftConfig | Integral) else list(values)


def _comparisons(call: _Call, spots: Spots, groups: str | None, folds: Any, n_genes: int) -> list[Comparison]:
    """Return what is to be compared, one part for readouts that share a training; pixels are read last."""
    parts = _folds(spots, groups, folds)
    leaky = _warn_of_leaks(parts, _units(spots, by_default=groups is None and folds is None))
    for readout in call.readouts:
        check_radius(spots.coords_um, spots.labels, readout.context_um)
    if call.protocol == HEST and (spots.spec.tile_px, spots.spec.mpp) != HEST_TILES:
        warnings.warn(
            f"HEST-Bench has tiles of {HEST_TILES[0]} px at {HEST_TILES[1]} um/px, these are {spots.spec.tile_px} px "
            f"at {spots.spec.mpp:g}: scores do not compare with its published ones.",
            UserWarning,
            stacklevel=3,
        )
    results = Results(None if call.compute.cache is None else Path(call.compute.cache))
    teacher, embedding = _teacher(call, spots, results)
    names = [str(name) for name in spots.names]
    counts = sparse.csr_matrix(spots.counts)
    lie = {name: fingerprint(centres) for name, centres in sorted(places(spots.sections).items())}
    print_of_places = fingerprint(spots.labels.astype("U"), spots.coords_um, lie, asdict(spots.spec))
    print_of_data = fingerprint(
        counts.data, counts.indices, counts.indptr, np.array(names), spots.groups.astype("U"), print_of_places
    )
    tiles: dict[tuple[float, ...], list[TileSource]] = {}
    out = []
    for shared in call.shared_readouts():
        scales = shared[0].scales
        if scales not in tiles:
            tiles[scales] = spots.read_tiles(scales, call.compute.memory(FIT_MEMORY))
        # every pixel counts: two images may differ where only some tiles lie
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
            default_groups=groups is None,
            folds=parts,
            leaky=leaky,
            teacher=call.teacher.name,
            make_teacher=teacher,
            draws=call.teacher.name == "scvi",
            teacher_fingerprint="" if embedding is None else fingerprint(embedding.embedding),
            tiles_fingerprint=fingerprint(print_of_places, scales, pixels),
            fingerprint=print_of_data,
        )
        # a fold's fit is no call of its own: it keeps nothing on disk
        compute = call.compute.replace(cache=None, resume=None, client=None, trainer=None)
        options = Options(None, call.recipe, shared[0], compute, call.device)
        out.append(Comparison(
            bench, call.methods, shared, call.seeds, call.protocol, call.sets, n_genes, options, results
        ))  # fmt: skip
    return out


def _units(spots: Spots, *, by_default: bool) -> dict[str, np.ndarray]:
    """Return what may not be on both sides of a fold: label of every spot by kind."""
    table, rows = spots.table, spots.rows
    units = {"section": spots.labels, "group": spots.groups}
    if not by_default:  # held out by default, sections of one patient have had their warning
        patients = table.obs[PATIENT].astype(str).to_numpy()[rows] if PATIENT in table.obs else spots.groups
        units = {"section": spots.labels, "patient": patients, "group": spots.groups}
    return units


def _teacher(
    call: _Call, spots: Spots, results: Results
) -> tuple[Callable[[np.ndarray, int], TeacherModel] | None, StoredTeacher | None]:
    """Return what makes the teacher of a fold, and the embedding where it is the same in all of them."""
    teacher, table = call.teacher, spots.table
    stored = stored_key(table, teacher)
    if not any(row.reads_teacher for row in call.methods.values()):
        return None, None
    if stored is not None:
        _check_not_fitted(table, stored)
        embedding = stored_teacher(table, stored, teacher.name, spots.rows)
        return lambda expressed, seed: embedding, embedding
    row = TEACHERS[teacher.name]

    def make(expressed: np.ndarray, seed: int) -> TeacherModel:
        return make_teacher(
            teacher, expression=spots.expression, counts=spots.counts if row.counts else None, genes=spots.names,
            expressed=expressed, n_components=call.recipe.teacher_components if teacher.name == "pca" else None,
            device=call.device, precision=call.compute.precision, random_state=seed,
        )  # fmt: skip

    if row.fitted:
        return make, None
    # a frozen teacher's embedding is the same in every fold
    made = make(np.arange(spots.names.size), 0)
    key = fingerprint(
        spots.counts.data if sparse.issparse(spots.counts) else spots.counts, spots.names, made.name, made.digest,
        call.compute.precision,
    )  # fmt: skip
    kept, _ = results.kept(f"teacher-{made.name}", key, lambda: ({"embedding": asked_once(made).embedding}, {}))
    once = StoredTeacher(kept["embedding"], made.name, made.licence, made.digest)
    return lambda expressed, seed: once, once


def _warn_of_leaks(parts: dict[str, tuple[np.ndarray, np.ndarray]], units: Mapping[str, np.ndarray]) -> frozenset[str]:
    """Return the folds that have spots of one section, patient or group on both sides, and say so."""
    leaky: set[str] = set()
    for what, labels in units.items():
        cut = [name for name, (train, test) in parts.items() if set(labels[train]) & set(labels[test])]
        if set(cut) - leaky:
            warnings.warn(
                f"Folds {cut} have spots of one {what} in training and in test: neighbouring and serial tissue makes "
                "their scores too good. `pekasc.tl.leakage_audit` shows by how much.",
                UserWarning,
                stacklevel=4,
            )
        leaky |= set(cut)
    return frozenset(leaky)


def _check_not_fitted(table: AnnData, key: str) -> None:
    record = fitted_here(table, key)
    if record is not None:
        raise ValueError(
            f"The teacher obsm[{key!r}] was fitted by `embed_expression` on {record['n_spots']} spots of this table, "
            "those that are tested among them: it would leak. Give "
            f"`teacher={str(record.get('teacher', 'pca'))!r}`, which is fitted in every fold."
        )


def _folds(spots: Spots, groups: str | None, folds: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return training and test spots of every fold, as positions among the spots."""
    table, rows = spots.table, spots.rows
    out: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    if isinstance(folds, Mapping):
        if not folds:
            raise ValueError("`folds=` is empty.")
        for name, pair in folds.items():
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise TypeError(f"`folds[{name!r}]` must be a pair (train, test), got {pair!r}.")
            train, test = (training_mask(table, part)[rows] for part in pair)
            if (train & test).any():
                raise ValueError(f"`folds[{name!r}]`: {int((train & test).sum())} spots are in training and in test.")
            out[str(name)] = np.flatnonzero(train), np.flatnonzero(test)
    elif folds is not None:
        if not isinstance(folds, str) or folds not in table.obs:
            raise KeyError(f"`folds={folds!r}` not found in `obs`. Available columns: {list(table.obs)}.")
        column = table.obs[folds].iloc[rows]
        if column.isna().any():
            raise ValueError(f"{int(column.isna().sum())} spots have no fold in `obs[{folds!r}]`.")
        out = _each(column.astype(str).to_numpy(dtype=object), f"obs[{folds!r}]")
    else:
        if spots.group_key is None:
            warnings.warn(
                "There are not two patients to hold out in turn (see `groups=`), so sections are: scores are for an "
                "unseen section of the same tissue, and say little about another patient.",
                UserWarning,
                stacklevel=4,
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
