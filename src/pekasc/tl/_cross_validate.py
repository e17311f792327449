"""`tl.cross_validate`: every fitted thing inside the fold, every method on the same head."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from numbers import Real
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
from pekasc._keys import TILES, check_key
from pekasc._sections import check_table, get_table, section_labels
from pekasc.models import Encoder
from pekasc.models._choose import Depth, candidate_depths
from pekasc.models._compare import (
    BESIDE,
    CONTROLS,
    READOUTS,
    Fold,
    Prediction,
    adapted,
    control,
    dense,
    hest_adapted,
    hest_read_out,
    read_out,
)
from pekasc.models._embed import autocast, embed, resolve_device
from pekasc.models._encoders import FrozenEncoder, resolve_encoder
from pekasc.models._fit import Data, Options, Reader
from pekasc.models._head_methods import check_head
from pekasc.models._hest import hest_genes
from pekasc.models._methods import Method, check_method, known_methods, method_name
from pekasc.models._results import Results, fingerprint
from pekasc.models._scores import BlockScores, gene_scores, interval, mean_score, tissue_blocks
from pekasc.models._teachers import TEACHERS, Source, StoredTeacher, Teacher
from pekasc.tiling import TileSource, TileSpec, cached
from pekasc.tl import _inputs
from pekasc.tl._gene_sets import check_gene_sets, choose_gene_sets
from pekasc.tl._options import make_recipe, whole
from pekasc.tl._teachers import stored_key, stored_teacher

logger = logging.getLogger(__name__)

RIVAL = "frozen-best"
POOLED = "pooled"
HEST = "hest"
_MIN_TEST = 10
_NOT_IN_HEST = ("frozen-best", "coordinates", BESIDE)


def cross_validate(
    sdata: SpatialData,
    *,
    methods: Sequence[str | PeftConfig] | Mapping[str, str | PeftConfig] = ("mean", "frozen", "frozen-best", "bone"),
    encoders: str | Encoder | Sequence[str | Encoder] = "tiny",
    teacher: str = "pca",
    groups: str | None = None,
    folds: str | Mapping[str, tuple[Any, Any]] | None = None,
    genes: Any = ("svg", "hvg"),
    n_genes: int = 50,
    head: Literal["ridge", "ridge-per-gene", "mlp"] = "ridge",
    context_um: float | None | Sequence[float | None] = None,
    seeds: Sequence[int] = (0,),
    protocol: Literal["nested", "hest"] = "nested",
    per_gene: bool = False,
    layer: str | None = None,
    gene_key: str | None = None,
    checkpoint: str | Path | None = None,
    blocks: Literal["all"] | int = "all",
    n_depths: int = 2,
    rank: int | None = None,
    n_clusters: int | None = None,
    n_components: int | None = None,
    epochs: int | None = None,
    learning_rate: float | None = None,
    kd_weight: float | None = None,
    temperature: float | None = None,
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
            The head on the teacher's embedding of the test spots' own expression: an upper bound.
        ``"frozen"``
            The head on the frozen encoder's last block.
        ``"frozen-best"``
            The same at the depth that the training groups choose, up to `n_depths` blocks side by side: the rival.
        ``"bone"``, ``"bat"``, ``"lora"``, ``"dora"``, ``"adalora"``, ``"hra"``, or a ``peft.PeftConfig``
            PEKA with that adapter.
        ``"frozen+peka"``
            PEKA's features (Block-Affine) beside the frozen ones of the same depth.
    encoders
        One or several encoders, as in :func:`pekasc.tl.fit_adapter`.
    teacher, checkpoint
        As in :func:`pekasc.tl.fit_adapter`. A stored embedding must not have been fitted on spots that are tested.
    groups
        Column of obs; each of its values is held out once. By default ``"patient"``, if there is such a column with
        two patients or more, else sections, with a warning.
    folds
        Instead of `groups`: a column of obs with the number of the fold in which a row is held out, as
        :func:`pekasc.pp.split` writes it, or a mapping from a name to ``(train, test)``, each a boolean mask, a boolean
        column of obs or a list of sections.
    genes
        ``"svg"`` (highest Moran's I, mean over training sections), ``"hvg"`` (scanpy's highly variable genes),
        ``"expressed"`` (seen in at least 10 % of the spots of every training group), chosen in the fold; or a list of
        genes, or a mapping from names to lists.
    n_genes
        Genes in a set that is chosen.
    head, context_um
        As in :func:`pekasc.tl.fit_adapter`; several radii (with None for none) share one training.
    seeds
        Seeds of the training; what has no random numbers runs once.
    protocol
        ``"nested"``, or ``"hest"``: genes, target, features and regression of HEST-Bench, for comparison with its
        published figures. Its genes are chosen on test samples as well.
    per_gene
        Return a row for every gene.
    layer, gene_key
        As in :func:`pekasc.tl.fit_adapter`.
    blocks, rank, n_clusters, n_components, epochs, learning_rate, kd_weight, temperature
        As in :func:`pekasc.tl.fit_adapter`.
    n_depths
        Most blocks whose features are put side by side.
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
    ``encoder``, ``method``, ``context_um``, ``seed``, ``genes``
        What was done; ``context_um`` is 0 without.
    ``n_genes``, ``n_undefined``
        Genes of the set, and those that are constant in the test spots: they have no score and are left out of the
        mean. Where only a prediction is constant, the gene counts 0.
    ``n_train``, ``n_test``
        Spots.
    ``pearson``, ``pearson_low``, ``pearson_high``, ``rmse``
        Mean Pearson correlation over genes with its 95 % interval, and root mean squared error over spots and genes.
        Intervals are over tissue of the test section: they know nothing of how patients differ.
    ``difference``, ``difference_low``, ``difference_high``
        Paired difference in correlation to ``"frozen-best"`` of the same encoder and context, where it was asked for.
    ``depth``, ``epochs``, ``alpha``, ``n_parameters``, ``seconds``
        What was chosen, trainable parameters of the adapter, seconds of its training.

    With `per_gene`: a row for every gene of every set, with ``gene`` and ``pearson`` (NaN where it is undefined).
    :func:`pekasc.get.comparison` sums the rows up.

    Raises
    ------
    KeyError
        If a column, gene, section or the teacher's embedding is not there.
    ValueError
        If there is a single group, a group has too few spots, or a method is unknown.

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
    asked = check_methods(methods, protocol)
    contexts = _contexts(context_um)
    check_head(head)
    rows_of_encoders = [resolve_encoder(e) for e in _several(encoders)]
    if len({row.short for row in rows_of_encoders}) < len(rows_of_encoders):
        raise ValueError("`encoders=` names one twice; give `key=` to tell them apart: `Encoder(..., key=...)`.")
    recipe = make_recipe(
        None, rank=rank, n_clusters=n_clusters, epochs=epochs, learning_rate=learning_rate, kd_weight=kd_weight,
        temperature=temperature,
    )  # fmt: skip
    options = Options(
        method=None,
        blocks=blocks,
        depth="choose" if protocol == "nested" else None,
        n_depths=whole("n_depths", n_depths),
        recipe=recipe,
        n_components=None if n_components is None else whole("n_components", n_components),
        batch_size=batch_size,
        device=resolve_device(device),
        precision=precision,
        random_state=0,
        progress=False,
    )
    autocast(options.device, precision)
    check_key(key)
    table = get_table(sdata, table_name)
    check_table(table)
    spots = _read(sdata, table, layer, gene_key, teacher, checkpoint, table_name, key, groups, folds, max_memory)
    sets = check_gene_sets(genes, spots.genes) if protocol == "nested" else {HEST: None}
    results = Results(None if store is None else Path(store))
    run = _Run(spots, asked, contexts, head, tuple(seeds), protocol, sets, n_genes, options, results, checkpoint)
    frames = []
    units = len(rows_of_encoders) * len(spots.folds) * (len(asked) + (len(run.seeds) - 1) * len(run.trained))
    with tqdm(total=units, desc="cross-validate", unit="fit", disable=not progress) as bar:
        for row in rows_of_encoders:
            frames += [
                _score(fold, found, spots, per_gene, block_um, n_bootstrap) for fold, found in run.of_encoder(row, bar)
            ]
    frame = pd.concat(frames, ignore_index=True)
    _report(frame, spots)
    return frame


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
    return method if isinstance(method, str) else method_name(check_method(method))


def _several(values: Any) -> list[Any]:
    return [values] if isinstance(values, str | Encoder | PeftConfig) else list(values)


def _contexts(context_um: Any) -> list[float | None]:
    values = list(context_um) if isinstance(context_um, Sequence) else [context_um]
    for value in values:
        if value is not None and not (isinstance(value, Real) and 0 < value < float("inf")):
            raise ValueError(f"`context_um={value!r}` must be a positive radius in um, or None.")
    if not values or len(set(values)) < len(values):
        raise ValueError(f"`context_um={context_um!r}` must hold each radius once.")
    return values


@dataclass(frozen=True)
class _Spots:
    """All spots of the comparison, in one order; what a fold may see of them is decided later."""

    tiles: TileSource
    spec: TileSpec
    log: Matrix
    raw: Matrix | None
    genes: list[str]
    groups: np.ndarray
    sections: np.ndarray
    coords_um: np.ndarray
    folds: dict[str, tuple[np.ndarray, np.ndarray]]
    teacher: str
    stored: StoredTeacher | None
    fingerprint: str


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
) -> _Spots:
    if groups is not None and folds is not None:
        raise ValueError("`groups=` and `folds=` both say what is held out: give one of them.")
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
        groups = _inputs.default_groups(table, rows) if groups is None and folds is None else groups
        parts = _folds(table, groups, folds, rows)
        labels = _labels(table, groups, folds, rows)
        log = log1p_cp10k(table[rows], layer)
        raw = sparse.csr_matrix(raw_all[rows])
        coords = np.concatenate([section.centres_um for section in sections])
        of = section_labels(table)[rows]
        embedding = None if stored is None else stored_teacher(table, stored, teacher, rows)
        places = {name: fingerprint(centres) for name, centres in sorted(_inputs.places(sections).items())}
        print_of_data = fingerprint(
            raw.data, raw.indices, raw.indptr, np.array(names), labels.astype("U"), of.astype("U"), coords, places,
            asdict(spec), None if embedding is None else fingerprint(embedding.embedding), checkpoint,
        )  # fmt: skip
        return _Spots(
            cached(stream, max_memory=max_memory), spec, log, raw, names, labels, of, coords, parts, teacher, embedding,
            print_of_data,
        )  # fmt: skip


def _labels(table: AnnData, groups: str | None, folds: Any, rows: np.ndarray) -> np.ndarray:
    """Return the groups that are held out inside the training spots."""
    if groups is None and folds is not None:
        groups = _inputs.default_groups(table, rows)
    return _inputs.obs_groups(table, groups, rows)


def _folds(
    table: AnnData, groups: str | None, folds: Any, rows: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return training and test spots of every fold, as positions among `rows`."""
    out: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    if isinstance(folds, Mapping):
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
        if test.size < _MIN_TEST or not train.size:
            raise ValueError(
                f"Fold {name!r} has {train.size} training and {test.size} test spots with tile and counts: at least "
                f"{_MIN_TEST} test spots are needed for a score. Join groups, or leave this one out with `folds=`."
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


@dataclass(frozen=True)
class _Found:
    """What one method predicted in a fold."""

    encoder: str
    method: str
    context_um: float | None
    seed: int
    prediction: Prediction


@dataclass(frozen=True)
class _FoldOf:
    """A fold with its genes: positions in the table of those that are predicted, and where each set lies in them."""

    fold: Fold
    sets: dict[str, np.ndarray]
    measured: np.ndarray


@dataclass
class _Run:
    """The comparison: what is asked for, and what is known so far."""

    spots: _Spots
    methods: dict[str, Method]
    contexts: list[float | None]
    head: str
    seeds: tuple[int, ...]
    protocol: str
    sets: dict[str, list[str] | None]
    n_genes: int
    options: Options
    results: Results
    checkpoint: str | Path | None

    def __post_init__(self) -> None:
        self._made: dict[str, _FoldOf] = {}
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds={self.seeds}` must hold each seed once.")

    @property
    def trained(self) -> dict[str, Method]:
        """The methods that train an adapter."""
        return {name: m for name, m in self.methods.items() if m not in (*CONTROLS, *READOUTS)}

    def of_encoder(self, row: Encoder, bar: Any) -> Iterator[tuple[_FoldOf, list[_Found]]]:
        """Yield what every method predicted, fold by fold."""
        spots = self.spots
        model = FrozenEncoder(row, spots.spec.tile_px)
        frozen = self._frozen(model)
        last: Depth = None if self.protocol == HEST else (model.n_blocks,)
        common = {
            "data": spots.fingerprint,
            "encoder": row.to_dict() | {"weights": model.digest},
            "teacher": spots.teacher,
            "head": self.head,
            "protocol": self.protocol,
            "genes": self.sets,
            "n_genes": self.n_genes,
            "options": _plain(self.options),
            "version": version("pekasc"),
        }
        for name in spots.folds:
            of = self._fold(name)
            found: list[_Found] = []
            for label, method in self.methods.items():
                for seed in self.seeds if label in self.trained else self.seeds[:1]:
                    found += self._unit(of, row, label, method, seed, frozen, last, common)
                    bar.update()
            yield of, found

    def _unit(
        self,
        of: _FoldOf,
        row: Encoder,
        label: str,
        method: Method,
        seed: int,
        frozen: Mapping[Depth, np.ndarray],
        last: Depth,
        common: dict[str, Any],
    ) -> list[_Found]:
        """Return what one method predicted in every context: from the store, or computed now and kept there."""
        fold = of.fold
        about_method = method.to_dict() if isinstance(method, PeftConfig) else method
        keys = {
            context: fingerprint(common, fold.train, fold.test, about_method, context, seed)
            for context in self.contexts
        }
        title = f"{fold.name}-{row.short}-{label}".replace("/", "_").replace(" ", "_")
        known = {context: self.results.get(title, k) for context, k in keys.items()}
        todo = [context for context, stored in known.items() if stored is None]
        out = {c: Prediction(s[0]["predicted"], s[1]) for c, s in known.items() if s is not None}
        if todo:
            start = time.perf_counter()
            readers = [Reader(self.head, context, method == BESIDE) for context in todo]
            made = self._predict(fold, row, method, readers, replace(self.options, random_state=seed), frozen, last)
            for context, prediction in zip(todo, made, strict=True):
                about = {"seconds": time.perf_counter() - start, **prediction.about}
                out[context] = Prediction(prediction.predicted.astype(np.float32), about)
                self.results.put(title, keys[context], {"predicted": out[context].predicted}, about)
        return [_Found(row.short, label, context, seed, out[context]) for context in self.contexts]

    def _predict(
        self,
        fold: Fold,
        row: Encoder,
        method: Method,
        readers: list[Reader],
        options: Options,
        frozen: Mapping[Depth, np.ndarray],
        last: Depth,
    ) -> list[Prediction]:
        spec = self.spots.spec
        margin = spec.side_um * 2**0.5
        if method in CONTROLS:
            return [control(fold, str(method), reader, options, margin) for reader in readers]
        if self.protocol == HEST:
            if method in READOUTS:
                x = frozen[None] if method == "frozen" else fold.teacher.embed(fold.train, np.arange(fold.data.tiles.n))
                return [hest_read_out(fold, x, reader) for reader in readers]
            return hest_adapted(fold, row, spec, method, readers, frozen, options)
        if method == "teacher":
            every = {None: fold.teacher.embed(fold.train, np.arange(fold.data.tiles.n))}
            return [read_out(fold, reader, every, options, margin) for reader in readers]
        if method in READOUTS:
            features = {last: frozen[last]} if method == "frozen" else frozen
            return [read_out(fold, reader, features, options, margin) for reader in readers]
        return adapted(fold, row, spec, "bone" if method == BESIDE else method, readers, frozen, options)

    def _frozen(self, model: FrozenEncoder) -> dict[Depth, np.ndarray]:
        """Return the frozen features of all spots at every depth that may be asked for."""
        spots, o = self.spots, self.options
        depths: list[Depth] = [None] if self.protocol == HEST else candidate_depths(model.n_blocks)
        if not set(self.methods.values()) - {*CONTROLS, "teacher"}:
            return {}
        key = fingerprint(spots.fingerprint, model.digest, [list(d) if d else None for d in depths], o.precision)
        title = f"frozen-{model.encoder.short}"
        stored = self.results.get(title, key)
        if stored is None:
            made = embed(model, spots.tiles, depths, batch_size=o.batch_size, device=o.device, precision=o.precision)
            stored = {str(i): made[depth] for i, depth in enumerate(depths)}, {}
            self.results.put(title, key, *stored)
        return {depth: stored[0][str(i)] for i, depth in enumerate(depths)}

    def _fold(self, name: str) -> _FoldOf:
        """Return a fold with its genes; what is chosen for it reads the training spots alone (but in "hest")."""
        if name in self._made:
            return self._made[name]
        spots = self.spots
        train, test = spots.folds[name]
        expressed = _inputs.expressed_genes(spots.log[train], spots.groups[train])
        if not expressed.size:
            raise ValueError(f"Fold {name!r}: no gene is seen in at least 10 % of the spots of every training group.")
        if self.protocol == HEST:
            assert spots.raw is not None  # for the type checker
            target = spots.raw.astype(np.float64).log1p().tocsr()
            chosen = {HEST: hest_genes(spots.raw, spots.genes, spots.sections, self.n_genes)}
        else:
            target = spots.log
            chosen = self._genes(name, expressed)
        predicted = np.unique(np.concatenate(list(chosen.values())))
        data = Data(
            spots.tiles,
            target[:, predicted],
            [spots.genes[i] for i in predicted],
            spots.groups,
            spots.sections,
            spots.coords_um,
        )
        fold = Fold(name, train, test, data, self._teacher(expressed))
        sets = {s: np.searchsorted(predicted, at) for s, at in chosen.items()}
        self._made[name] = _FoldOf(fold, sets, dense(data.expression[test]))
        return self._made[name]

    def _genes(self, name: str, expressed: np.ndarray) -> dict[str, np.ndarray]:
        spots = self.spots
        train = spots.folds[name][0]
        key = fingerprint(spots.fingerprint, train, expressed, self.sets, self.n_genes)
        stored = self.results.get(f"genes-{name}", key)
        if stored is None:
            made = choose_gene_sets(
                self.sets, spots.genes, spots.log[train], spots.coords_um[train], spots.sections[train], expressed,
                self.n_genes,
            )  # fmt: skip
            stored = made, {}
            self.results.put(f"genes-{name}", key, *stored)
        return stored[0]

    def _teacher(self, expressed: np.ndarray) -> Teacher:
        spots, o = self.spots, self.options
        if spots.stored is not None:
            return spots.stored
        row = TEACHERS[spots.teacher]
        return row.make(
            Source(
                expression=spots.log,
                counts=spots.raw if row.counts else None,
                genes=np.array(spots.genes, dtype=object),
                expressed=expressed,
                n_components=o.n_components if spots.teacher == "pca" else None,
                checkpoint=self.checkpoint,
                device=o.device,
                precision=o.precision,
                random_state=o.random_state,
            )
        )


def _plain(options: Options) -> dict[str, Any]:
    """Return what a result depends on; where it was computed is no part of it."""
    named = {k: getattr(options, k) for k in ("blocks", "depth", "n_depths", "n_components", "precision")}
    return {**named, "recipe": asdict(options.recipe)}


def _score(
    of: _FoldOf, found: list[_Found], spots: _Spots, per_gene: bool, block_um: float, n_draws: int
) -> pd.DataFrame:
    fold = of.fold
    sections = spots.sections[fold.test]
    frames = []
    for section in [POOLED, *np.unique(sections)]:
        at = np.arange(len(fold.test)) if section == POOLED else np.flatnonzero(sections == section)
        for name, columns in of.sets.items():
            measured = of.measured[np.ix_(at, columns)]
            about = {
                "fold": fold.name, "section": str(section), "genes": name, "n_train": len(fold.train), "n_test": len(at)
            }  # fmt: skip
            if per_gene:
                frames += [_gene_rows(of, f, at, columns, measured, about) for f in found]
                continue
            blocks = tissue_blocks(spots.coords_um[fold.test[at]], sections[at], block_um)
            draw = BlockScores(measured, blocks, n_draws, random_state=0)
            frames.append(_mean_rows(found, at, columns, measured, about, draw))
    return pd.concat(frames, ignore_index=True)


def _identity(f: _Found) -> dict[str, Any]:
    return {"encoder": f.encoder, "method": f.method, "context_um": f.context_um or 0.0, "seed": f.seed}


def _gene_rows(
    of: _FoldOf, f: _Found, at: np.ndarray, columns: np.ndarray, measured: np.ndarray, about: dict[str, Any]
) -> pd.DataFrame:
    predicted = f.prediction.predicted[np.ix_(at, columns)]
    names = [of.fold.data.genes[i] for i in columns]
    rmse = np.sqrt(np.square(predicted - measured).mean(axis=0))
    return pd.DataFrame(
        {**about, **_identity(f), "gene": names, "pearson": gene_scores(predicted, measured), "rmse": rmse}
    )


def _mean_rows(
    found: list[_Found],
    at: np.ndarray,
    columns: np.ndarray,
    measured: np.ndarray,
    about: dict[str, Any],
    draw: BlockScores,
) -> pd.DataFrame:
    parts = [f.prediction.predicted[np.ix_(at, columns)] for f in found]
    scores = [mean_score(gene_scores(part, measured)) for part in parts]
    draws = [draw(part) for part in parts]
    undefined = int((np.ptp(measured, axis=0) == 0).sum())
    rival = {f.context_um: i for i, f in enumerate(found) if f.method == RIVAL}
    rows = []
    for i, f in enumerate(found):
        low, high = interval(draws[i])
        row = {
            **about, **_identity(f), "n_genes": len(columns), "n_undefined": undefined, "pearson": scores[i],
            "pearson_low": low, "pearson_high": high,
            "rmse": float(np.sqrt(np.square(parts[i] - measured).mean())),
        }  # fmt: skip
        j = rival.get(f.context_um)
        difference = (np.nan, np.nan, np.nan)
        if j is not None and j != i:
            difference = (scores[i] - scores[j], *interval(draws[i] - draws[j]))
        row |= dict(zip(("difference", "difference_low", "difference_high"), difference, strict=True))
        chosen = f.prediction.about
        rows.append(row | {k: chosen.get(k) for k in ("depth", "epochs", "alpha", "n_parameters", "seconds")})
    return pd.DataFrame(rows)


def _report(frame: pd.DataFrame, spots: _Spots) -> None:
    """Say which genes have no score."""
    for name, (_, test) in spots.folds.items():
        if "n_undefined" in frame and not (frame.loc[frame["fold"] == name, "n_undefined"] > 0).any():
            continue
        varies = np.asarray(spots.log[test].max(axis=0).todense()).ravel() if sparse.issparse(spots.log) else None
        never = [] if varies is None else [g for g, top in zip(spots.genes, varies, strict=True) if top == 0]
        n = int(frame.loc[frame["fold"] == name, "n_undefined"].max()) if "n_undefined" in frame else 0
        if n:
            warnings.warn(
                f"Fold {name!r}: up to {n} genes of a set are constant among the test spots of a section, so they have "
                f"no score there and are left out of its mean{f' (never seen: {never[:3]})' if never else ''}; "
                "`per_gene=True` names them.",
                UserWarning,
                stacklevel=3,
            )
