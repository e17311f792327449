"""`tl.cross_validate`: every fitted thing inside the fold, every method on the same head."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from peft import PeftConfig
from scipy import sparse
from spatialdata import SpatialData
from tqdm.auto import tqdm

from pekasc._expression import Matrix, counts, gene_names, log1p_cp10k
from pekasc._keys import PATIENT, TILES, check_key
from pekasc._sections import check_table, get_table, section_labels
from pekasc.models import Encoder
from pekasc.models._compare import (
    BESIDE,
    CONTROLS,
    READOUTS,
    asks_teacher,
)
from pekasc.models._context import check_radius
from pekasc.models._embed import autocast, resolve_device
from pekasc.models._encoders import resolve_encoder
from pekasc.models._fit_job import Options
from pekasc.models._head_methods import check_head
from pekasc.models._methods import Method, check_method, known_methods, method_name
from pekasc.models._results import Results, fingerprint
from pekasc.models._teachers import TEACHERS, Source, StoredTeacher, TeacherRow, asked_once
from pekasc.tiling import ArrayTiles
from pekasc.tl import _inputs
from pekasc.tl._comparison import HEST, Run, Spots
from pekasc.tl._comparison_table import MIN_TEST, score_fold
from pekasc.tl._gene_sets import CHOSEN, check_gene_sets
from pekasc.tl._options import check_context, check_orientations, check_scales, make_recipe, wanted_blocks, whole
from pekasc.tl._teachers import check_installed, fitted_here, stored_key, stored_teacher

HEST_TILES = (224, 0.5)
_N_DEPTHS = 2
_NOT_IN_HEST = ("frozen-best", "coordinates", BESIDE)


def cross_validate(
    sdata: SpatialData,
    *,
    methods: Sequence[str | PeftConfig] | Mapping[str, str | PeftConfig] = ("mean", "frozen", "frozen-best", "bone"),
    encoders: str | Encoder | Sequence[str | Encoder] = "tiny",
    teacher: str = "pca",
    checkpoint: str | Path | None = None,
    groups: str | None = None,
    folds: str | Mapping[str, tuple[Any, Any]] | None = None,
    genes: Any = ("svg", "hvg"),
    n_genes: int = 50,
    head: Literal["ridge", "ridge-per-gene", "mlp"] = "ridge",
    context_um: float | None | Sequence[float | None] = None,
    scales: Sequence[float] = (1,),
    orientations: int = 1,
    seeds: int | Sequence[int] = (0,),
    protocol: Literal["nested", "hest"] = "nested",
    per_gene: bool = False,
    layer: str | None = None,
    gene_key: str | None = None,
    blocks: Literal["auto", "all"] | int = "auto",
    rank: int | None = None,
    n_clusters: int | None = None,
    n_components: int | None = None,
    epochs: int | None = None,
    learning_rate: float | None = None,
    kd_weight: float | None = None,
    matching_weight: float | None = None,
    temperature: float | None = None,
    n_views: int | None = None,
    patience: int | None = None,
    n_depths: int = _N_DEPTHS,
    batch_size: int = 64,
    device: str = "auto",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    block_um: float = 1000.0,
    n_bootstrap: int = 1000,
    store: str | Path | None = None,
    table_name: str = "table",
    key: str = TILES,
    max_memory: int = 2 * 2**30,
    progress: bool = True,
) -> pd.DataFrame:
    """Compare methods on groups that they never saw: everything that is fitted or chosen, is so inside the fold.

    In each fold one group is held out, and gene sets, teacher, clusters, cluster head, adapter, projector, depth,
    epochs, scaling, PCA and penalty come from the other groups alone, by the rule of :func:`pekasc.tl.fit_adapter`.
    All methods share the head, the genes and the spots.

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
            The head on the frozen encoder's last block.
        ``"frozen-best"``
            The same at the depth that the training groups choose, up to `n_depths` blocks side by side: the rival.
            ``fit_adapter(method=None)`` takes one block, as `n_depths=1` does here.
        ``"bone"``, ``"bat"``, ``"lora"``, ``"dora"``, ``"adalora"``, ``"hra"``, or a ``peft.PeftConfig``
            PEKA with that adapter.
        ``"frozen+peka"``
            PEKA's features (Block-Affine) beside the frozen ones of the same depth.
    encoders
        One or several encoders, as in :func:`pekasc.tl.fit_adapter`.
    teacher, checkpoint
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
    head, context_um
        As in :func:`pekasc.tl.fit_adapter`; several radii (with None for none) share one training, and so the depth of
        an adapter, which is chosen without context.
    scales, orientations
        As in :func:`pekasc.tl.fit_adapter`, for every method that reads the image.
    seeds
        Seeds of the training, and of a fitted teacher that draws random numbers; what draws none runs once.
    protocol
        ``"nested"``, or ``"hest"``: genes, target, features and regression of HEST-Bench, for comparison with its
        published figures. Its genes are chosen on test samples as well.
    per_gene
        Return a row for every gene.
    layer, gene_key
        As in :func:`pekasc.tl.fit_adapter`.
    blocks, rank, n_clusters, n_components, epochs, learning_rate, kd_weight, matching_weight, temperature
        As in :func:`pekasc.tl.fit_adapter`.
    n_views, patience
        As in :func:`pekasc.tl.fit_adapter`.
    n_depths
        Most blocks whose features ``"frozen-best"`` puts side by side, as long as the held-out error falls.
    batch_size, device, precision
        As in :func:`pekasc.tl.fit_adapter`.
    block_um, n_bootstrap
        Intervals come from so many draws of squares of tissue of this side.
    store
        Folder in which finished pieces are kept: a call that was interrupted, or that asks for more, goes on from them.
        None keeps nothing.
    table_name, key, max_memory, progress
        As in :func:`pekasc.tl.fit_adapter`.

    Returns
    -------
    One row per fold, section, encoder, method, context, seed and gene set, with

    ``fold``, ``section``
        The held-out groups; a section of them, or ``"pooled"`` for the spots of all together.
    ``whole_groups``
        Whether no section, patient or group is on both sides of the fold; elsewhere scores are too good.
    ``encoder``, ``method``, ``head``, ``scales``, ``orientations``, ``teacher``, ``context_um``, ``seed``, ``genes``
        What was done; ``context_um`` is 0 without, scales are joined by ``+``.
    ``n_genes``, ``n_undefined``, ``n_untaught``
        Genes of the set; those that are constant in the test spots: they have no score and are left out of the
        mean; and those that are constant in the training spots, which nobody can learn: they count 0, as does every
        gene whose prediction is constant.
    ``n_train``, ``n_test``
        Spots.
    ``pearson``, ``pearson_low``, ``pearson_high``, ``rmse``
        Mean Pearson correlation over genes with its 95 % interval, and root mean squared error over spots and genes.
        Intervals are over tissue of the test section: they know nothing of how patients differ.
    ``difference``, ``difference_low``, ``difference_high``
        Paired difference in correlation to ``"frozen-best"`` of the same encoder and context, where it was asked for.
    ``depth``, ``epochs``, ``alpha``, ``n_parameters``, ``seconds``
        What was chosen, trainable parameters of the adapter, seconds of its training.

    With `per_gene`: a row for every gene of every set, with ``gene``, ``pearson`` (NaN where it is undefined),
    ``difference`` to ``"frozen-best"`` and ``rmse``.
    :func:`pekasc.get.comparison` sums the rows up.

    Raises
    ------
    KeyError
        If a column, gene, section or the teacher's embedding is not there.
    ValueError
        If there is a single group, a group has too few spots, or a method is unknown.
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
    if genes is None:
        raise ValueError(f"`genes=None`: name sets that are chosen in the fold ({list(CHOSEN)}), or genes.")
    if protocol == HEST and (head != "ridge" or tuple(_several(genes)) != ("svg", "hvg") or n_depths != _N_DEPTHS):
        raise ValueError(
            '`protocol="hest"` has genes and a regression of its own: leave `genes=`, `head=` and `n_depths=` out.'
        )
    scales, orientations = check_scales(scales), check_orientations(orientations)
    if protocol == HEST and (len(scales) > 1 or orientations > 1):
        raise ValueError('`protocol="hest"` reads a tile once and as it is: leave `scales=` and `orientations=` out.')
    if whole("n_genes", n_genes) < 1 or whole("n_bootstrap", n_bootstrap) < 1 or not block_um > 0:
        raise ValueError(
            f"`n_genes={n_genes}`, `n_bootstrap={n_bootstrap}` and `block_um={block_um}` must be positive."
        )
    if whole("n_depths", n_depths) < 1:
        raise ValueError(f"`n_depths={n_depths}` must be positive.")
    seeds = [whole("seeds", seed) for seed in _several(seeds)]
    asked = check_methods(methods, protocol)
    contexts = _contexts(context_um)
    check_head(head)
    rows_of_encoders = [resolve_encoder(e) for e in _several(encoders)]
    if not rows_of_encoders:
        raise ValueError("`encoders=` is empty.")
    if len({row.short for row in rows_of_encoders}) < len(rows_of_encoders):
        raise ValueError("`encoders=` names one twice; give `key=` to tell them apart: `Encoder(..., key=...)`.")
    recipe = make_recipe(
        None, rank=rank, n_clusters=n_clusters, epochs=epochs, learning_rate=learning_rate,
        kd_weight=kd_weight, matching_weight=matching_weight,
        temperature=temperature, n_views=n_views, patience=patience,
    )  # fmt: skip
    options = Options(
        method=None,
        blocks=wanted_blocks(blocks),
        depth="choose" if protocol == "nested" else None,
        recipe=recipe,
        n_components=None if n_components is None else whole("n_components", n_components),
        batch_size=batch_size,
        device=resolve_device(device),
        precision=precision,
        random_state=0,
        progress=False,
        max_memory=max_memory,
        scales=scales,
        orientations=orientations,
    )
    autocast(options.device, precision)
    check_key(key)
    table = get_table(sdata, table_name)
    check_table(table)
    sets: dict[str, list[str] | None] = {HEST: None}
    if protocol == "nested":
        sets = check_gene_sets(genes, [str(name) for name in gene_names(table, gene_key)])
    uses_teacher = any(asks_teacher(method) for method in asked.values())
    if uses_teacher:
        check_installed(teacher)
    results = Results(None if store is None else Path(store))
    spots = _read(
        sdata, table, layer, gene_key, teacher, checkpoint, table_name, key, groups, folds, max_memory, uses_teacher,
        options, contexts, results,
    )  # fmt: skip
    if protocol == HEST and (spots.spec.tile_px, spots.spec.mpp) != HEST_TILES:
        warnings.warn(
            f"HEST-Bench has tiles of {HEST_TILES[0]} px at {HEST_TILES[1]} um/px, these are {spots.spec.tile_px} px "
            f"at {spots.spec.mpp:g}: scores do not compare with its published ones.",
            UserWarning,
            stacklevel=2,
        )
    run = Run(spots, asked, contexts, head, tuple(seeds), protocol, sets, n_genes, n_depths, options, results)
    settings = {"head": head, "scales": "+".join(f"{scale:g}" for scale in scales), "orientations": orientations}
    frames = []
    units = len(rows_of_encoders) * len(spots.folds) * sum(len(run.seeds_of(label)) for label in asked)
    with tqdm(total=units, desc="cross-validate", unit="fit", disable=not progress) as bar:
        for row in rows_of_encoders:
            frames += [
                score_fold(fold, found, spots, settings, per_gene, block_um, n_bootstrap)
                for fold, found in run.of_encoder(row, bar)
            ]
    return pd.concat(frames, ignore_index=True)


def check_methods(methods: Any, protocol: str) -> dict[str, Method]:
    """Return methods by name: ``None`` for controls and frozen encoders, what to train for the others.

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
    out: dict[str, Method] = {}
    for name, method in given.items():
        if method is None:
            raise ValueError(
                '`methods=`: None is the frozen encoder of `fit_adapter`; say "frozen" or "frozen-best" here.'
            )
        fixed = isinstance(method, str) and method in (*CONTROLS, *READOUTS, BESIDE)
        if not fixed and isinstance(method, str) and method not in known_methods():
            raise ValueError(
                f"`methods=`: {method!r} is not known. Choose from {[*CONTROLS, *READOUTS, BESIDE, *known_methods()]}, "
                "or give a peft.PeftConfig."
            )
        if protocol == HEST and method in _NOT_IN_HEST:
            raise ValueError(f'`protocol="hest"` chooses nothing inside the fold, so it has no {method!r}.')
        out[str(name)] = method if fixed else check_method(method)
    if not out:
        raise ValueError("`methods=` is empty.")
    return out


def _name(method: Any) -> str:
    return method if isinstance(method, str) else "None" if method is None else method_name(check_method(method))


def _several(values: Any) -> list[Any]:
    return [values] if isinstance(values, str | Encoder | PeftConfig | Integral) else list(values)


def _contexts(context_um: Any) -> list[float | None]:
    values = list(context_um) if isinstance(context_um, Sequence) else [context_um]
    for value in values:
        check_context(value)
    if not values or len(set(values)) < len(values):
        raise ValueError(f"`context_um={context_um!r}` must hold each radius once.")
    return values


def _read(
    sdata: SpatialData,
    table: AnnData,
    layer: str | None,
    gene_key: str | None,
    teacher: str,
    checkpoint: str | Path | None,
    table_name: str,
    key: str,
    groups: str | None,
    folds: Any,
    max_memory: int,
    uses_teacher: bool,
    options: Options,
    contexts: Sequence[float | None],
    results: Results,
) -> Spots:
    names = [str(name) for name in gene_names(table, gene_key)]
    stored = stored_key(table, teacher, checkpoint)
    raw_all = counts(table, layer)
    with _inputs.untiled_on_error(sdata, table_name=table_name, key=key):
        sections, spec = _inputs.ensure_tiles(sdata, table_name=table_name, key=key, pixel_size={}, spec=None)
        usable = np.asarray(raw_all.sum(axis=1)).ravel() > 0
        sections = [part for part in (s.take(usable[s.rows]) for s in sections) if part.rows.size]
        if not sections:
            raise ValueError("No spot has both a tile and counts.")
        stream, rows = _inputs.tile_stream(sections, spec)
        by_default = groups is None
        groups = _inputs.default_groups(table, rows) if groups is None else groups
        parts = _folds(table, groups, folds, rows)
        labels = _inputs.obs_groups(table, groups, rows)
        of = section_labels(table)[rows]
        patients = table.obs[PATIENT].astype(str).to_numpy()[rows] if PATIENT in table.obs else labels
        units = {"section": of, "patient": patients, "group": labels}
        if folds is None and by_default:
            del units["patient"]  # held out by default, sections of one patient have had their warning
        leaky = _warn_of_leaks(parts, units)
        log = log1p_cp10k(table[rows], layer)
        raw = sparse.csr_matrix(raw_all[rows])
        coords = np.concatenate([section.centres_um for section in sections])
        for radius in contexts:
            check_radius(coords, of, radius)
        embedding = None
        if uses_teacher and stored is not None:
            _check_not_fitted(table, stored)
            embedding = stored_teacher(table, stored, teacher, rows)
        elif uses_teacher and not TEACHERS[teacher].fitted:
            # a frozen teacher says the same in every fold: it is asked once
            embedding = _frozen_teacher(TEACHERS[teacher], log, raw, names, checkpoint, options, results)
        places = {name: fingerprint(centres) for name, centres in sorted(_inputs.places(sections).items())}
        tiles, *further = _inputs.cached_scales(stream, sections, spec, options.scales, max_memory)
        # every pixel counts: two images may differ where only some tiles lie
        pixels = [fingerprint(t.array) if isinstance(t, ArrayTiles) else None for t in (tiles, *further)]
        print_of_places = fingerprint(of.astype("U"), coords, places, asdict(spec))
        print_of_tiles = fingerprint(print_of_places, options.scales, pixels)
        print_of_data = fingerprint(
            raw.data, raw.indices, raw.indptr, np.array(names), labels.astype("U"), print_of_places
        )  # fmt: skip
        print_of_teacher = "" if embedding is None else fingerprint(embedding.embedding)
        return Spots(
            tiles, further, spec, log, raw, names, labels, by_default, of, coords, parts, leaky, teacher, embedding,
            print_of_teacher, print_of_tiles, print_of_data,
        )  # fmt: skip


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


def _frozen_teacher(
    row: TeacherRow,
    log: Matrix,
    raw: Matrix,
    names: list[str],
    checkpoint: str | Path | None,
    options: Options,
    results: Results,
) -> StoredTeacher:
    """Return what a frozen teacher says of all spots, from the store where it was asked before."""
    genes = np.array(names, dtype=object)
    source = Source(
        log, raw, genes, np.arange(len(names)), checkpoint=checkpoint, device=options.device,
        precision=options.precision,
    )  # fmt: skip
    made = row.make(source)
    key = fingerprint(raw.data, raw.indices, raw.indptr, np.array(names), made.name, made.digest, options.precision)
    said, _ = results.kept(f"teacher-{made.name}", key, lambda: ({"embedding": asked_once(made).embedding}, {}))
    return StoredTeacher(said["embedding"], made.name, made.licence, made.digest)


def _folds(
    table: AnnData, groups: str | None, folds: Any, rows: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return training and test spots of every fold, as positions among `rows`."""
    out: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    if isinstance(folds, Mapping):
        if not folds:
            raise ValueError("`folds=` is empty.")
        for name, pair in folds.items():
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise TypeError(f"`folds[{name!r}]` must be a pair (train, test), got {pair!r}.")
            train, test = (_inputs.training_mask(table, part)[rows] for part in pair)
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
        if groups is None:
            warnings.warn(
                "There are not two patients to hold out in turn (see `groups=`), so sections are: scores are for an "
                "unseen section of the same tissue, and say little about another patient.",
                UserWarning,
                stacklevel=4,
            )
        out = _each(_inputs.obs_groups(table, groups, rows), "the sections" if groups is None else f"obs[{groups!r}]")
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
