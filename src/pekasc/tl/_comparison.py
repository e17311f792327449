"""The work of a comparison: every method on every fold, each piece computed once and kept."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
from peft import PeftConfig

from pekasc._expression import Matrix, dense
from pekasc.models import Encoder
from pekasc.models._choose import Depth, candidate_depths
from pekasc.models._compare import (
    BESIDE,
    CONTROLS,
    READOUTS,
    Fold,
    Prediction,
    adapted,
    asks_teacher,
    control,
    hest_adapted,
    hest_read_out,
    is_chosen,
    is_trained,
    read_out,
    reads_image,
)
from pekasc.models._embed import embed
from pekasc.models._encoders import FrozenEncoder, warn_of_scale
from pekasc.models._fit import margin_um
from pekasc.models._fit_job import Data, Options, Reader
from pekasc.models._folds import inner_folds
from pekasc.models._hest import hest_genes
from pekasc.models._methods import Method, attached, make_config, target_layers
from pekasc.models._results import Results, fingerprint
from pekasc.models._teachers import TEACHERS, Source, StoredTeacher, Teacher, check_finite
from pekasc.tiling import TileSource, TileSpec
from pekasc.tl import _inputs
from pekasc.tl._gene_sets import choose_gene_sets

HEST = "hest"
RIVAL = "frozen-best"


@dataclass(frozen=True)
class Spots:
    """All spots of the comparison, in one order; what a fold may see of them is decided later."""

    tiles: TileSource
    further: Sequence[TileSource]
    spec: TileSpec
    log: Matrix
    raw: Matrix
    genes: list[str]
    groups: np.ndarray
    default_groups: bool
    sections: np.ndarray
    coords_um: np.ndarray
    folds: dict[str, tuple[np.ndarray, np.ndarray]]
    leaky: frozenset[str]  # folds with spots of one section, patient or group on both sides
    teacher: str
    stored: StoredTeacher | None
    teacher_fingerprint: str
    tiles_fingerprint: str
    fingerprint: str


@dataclass(frozen=True)
class Found:
    """What one method predicted in a fold."""

    encoder: str
    method: str
    kind: Any  # what stands behind the name
    teacher: str  # "" where none is asked
    context_um: float | None
    seed: int
    prediction: Prediction


@dataclass(frozen=True)
class FoldGenes:
    """A fold with its genes: positions in the table of those that are predicted, and where each set lies in them."""

    fold: Fold
    sets: dict[str, np.ndarray]
    measured: np.ndarray
    expressed: np.ndarray  # positions of the genes that a fitted teacher reads


@dataclass
class Run:
    """The comparison: what is asked for, and what is known so far."""

    spots: Spots
    methods: dict[str, Method]
    contexts: list[float | None]
    head: str
    seeds: tuple[int, ...]
    protocol: str
    sets: dict[str, list[str] | None]
    n_genes: int
    n_depths: int
    options: Options
    results: Results

    def __post_init__(self) -> None:
        self._made: dict[str, FoldGenes] = {}
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds={self.seeds}` must hold each seed once.")

    def seeds_of(self, label: str) -> tuple[int, ...]:
        """Return the seeds that a method runs with: one is enough for what draws no random numbers."""
        method = self.methods[label]
        drawn = self.head == "mlp" and is_chosen(method)
        varies = is_trained(method) or drawn or (method == "teacher" and self.spots.teacher == "scvi")
        return self.seeds if varies else self.seeds[:1]

    def of_encoder(self, row: Encoder, bar: Any) -> Iterator[tuple[FoldGenes, list[Found]]]:
        """Yield what every method predicted, fold by fold."""
        spots = self.spots
        if self.protocol == HEST and row.pooling == "class+mean":
            row = replace(row, pooling="class")  # as HEST-Bench reads every encoder
        model = FrozenEncoder(row, spots.spec.tile_px)
        warn_of_scale(row, spots.spec.mpp)
        self._check_adapters(model)
        self._check_folds()
        frozen = self._frozen(model)
        last: Depth = None if self.protocol == HEST else (model.n_blocks,)
        common = {
            "data": spots.fingerprint,
            "encoder": _row(model),
            "head": self.head,
            "protocol": self.protocol,
            "genes": self.sets,
            "n_genes": self.n_genes,
            "versions": {name: version(name) for name in ("pekasc", "torch", "timm", "peft", "scikit-learn")},
        }
        for name in spots.folds:
            of = self._fold(name)
            found: list[Found] = []
            for labels in self._units():
                for seed in self.seeds_of(labels[0]):
                    found += self._unit(of, row, labels, seed, frozen, last, common)
                    bar.update(len(labels))
            # in the order of the methods that were asked for, whatever was trained together
            yield of, sorted(found, key=lambda f: list(self.methods).index(f.method))

    def _check_adapters(self, model: FrozenEncoder) -> None:
        """Attach every adapter once: what cannot be, fails before hours of embedding."""
        o = self.options
        for method in self.methods.values():
            if not is_trained(method):
                continue
            of = "bone" if method == BESIDE else method
            assert of is not None  # for the type checker: check_methods() asked
            targets = target_layers(model, None if self.protocol == HEST else (model.n_blocks,), o.blocks, of)
            with attached(model, make_config(of, o.recipe.rank, targets), 0):
                pass

    def _check_folds(self) -> None:
        """Make the inner folds of every fold once: too few spots are found before hours of embedding."""
        if self.protocol == HEST or not any(map(is_chosen, self.methods.values())):
            return
        spots = self.spots
        for train, _ in spots.folds.values():
            groups = self._groups(train)[train]
            inner_folds(
                groups, spots.coords_um[train], spots.sections[train], margin_um(spots.spec, self.options.scales)
            )

    def _groups(self, train: np.ndarray) -> np.ndarray:
        """Return what is held out inside training spots, of all spots.

        By default as `fit_adapter` would choose on these spots: one patient's sections are held out in turn.
        """
        spots = self.spots
        single = spots.default_groups and len(np.unique(spots.groups[train])) < 2
        return spots.sections if single else spots.groups

    def _units(self) -> list[list[str]]:
        """Return methods by training: adapted features, alone or beside frozen ones, share one."""
        trained: dict[str, list[str]] = {}
        for label, method in self.methods.items():
            trained.setdefault("bone" if method in (BESIDE, "bone") else f"alone {label}", []).append(label)
        return list(trained.values())

    def _unit(
        self,
        of: FoldGenes,
        row: Encoder,
        labels: list[str],
        seed: int,
        frozen: Mapping[Depth, np.ndarray],
        last: Depth,
        common: dict[str, Any],
    ) -> list[Found]:
        """Return what methods of one training predicted in every context: from the store, or computed and kept now."""
        fold = of.fold
        asked = [(label, context) for label in labels for context in self.contexts]
        out: dict[tuple[str, float | None], Prediction] = {}
        keys: dict[tuple[str, float | None], tuple[str, str]] = {}
        for label, context in asked:
            method = self.methods[label]
            about_method = method.to_dict() if isinstance(method, PeftConfig) else method
            if method == RIVAL:
                about_method = f"{RIVAL} of {self.n_depths}"
            key = fingerprint(
                common, fold.train, fold.test, fold.data.groups.astype("U"), about_method, context, seed,
                self._depends_on(label),
            )  # fmt: skip
            keys[label, context] = _file_name(f"{fold.name}-{row.short}-{label}"), key
            stored = self.results.get(*keys[label, context])
            if stored is not None:
                out[label, context] = Prediction(stored[0]["predicted"], stored[1])
        todo = [unit for unit in asked if unit not in out]
        if todo:
            start = time.perf_counter()
            method = self.methods[labels[0]]
            readers = [Reader(self.head, context, self.methods[label] == BESIDE) for label, context in todo]
            if asks_teacher(method):
                fold = replace(fold, teacher=self._teacher(of.expressed, seed))
            made = self._predict(fold, row, method, readers, replace(self.options, random_state=seed), frozen, last)
            for unit, prediction in zip(todo, made, strict=True):
                about = {"seconds": time.perf_counter() - start, **prediction.about}
                out[unit] = Prediction(prediction.predicted.astype(np.float32), about)
                self.results.put(*keys[unit], {"predicted": out[unit].predicted}, about)
        return [
            Found(row.short, label, self.methods[label], self._teacher_of(label), context, seed, out[label, context])
            for label, context in asked
        ]

    def _depends_on(self, label: str) -> dict[str, Any]:
        """Return the options that a method depends on; where it was computed is no part of them."""
        o = self.options
        out: dict[str, Any] = {"n_components": o.n_components, "precision": o.precision}
        if is_chosen(self.methods[label]):
            out["scales"] = o.scales  # they set how far apart the sides of an inner fold are
        if reads_image(self.methods[label]):
            out |= {"tiles": self.spots.tiles_fingerprint, "orientations": o.orientations}
        if self._teacher_of(label):
            out["teacher"] = self.spots.teacher, self.spots.teacher_fingerprint
        if is_trained(self.methods[label]):
            out |= {"blocks": o.blocks, "depth": o.depth, "recipe": asdict(o.recipe)}
        return out

    def _teacher_of(self, label: str) -> str:
        return self.spots.teacher if asks_teacher(self.methods[label]) else ""

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
        margin = margin_um(spec, self.options.scales)
        if method in CONTROLS:
            return [control(fold, str(method), reader, options, margin) for reader in readers]
        if self.protocol == HEST:
            if method in READOUTS:
                x = frozen[None] if method == "frozen" else self._taught(fold)
                return [hest_read_out(fold, x, reader) for reader in readers]
            return hest_adapted(fold, row, spec, method, readers, frozen, options)
        if method == "teacher":
            every: dict[Depth, np.ndarray] = {None: self._taught(fold)}
            # what a spot expresses is known: its neighbours' noise would only blur the bound
            bound = read_out(fold, replace(readers[0], context_um=None), every, options, margin)
            return [bound for _ in readers]
        if method in READOUTS:
            features = {last: frozen[last]} if method == "frozen" else frozen
            return [read_out(fold, reader, features, options, margin, self.n_depths) for reader in readers]
        return adapted(fold, row, spec, "bone" if method == BESIDE else method, readers, frozen, options)

    def _taught(self, fold: Fold) -> np.ndarray:
        """Return what a teacher that learned from the training spots says of all spots."""
        assert fold.teacher is not None  # for the type checker: a method asked for it
        return check_finite(fold.teacher.embed(fold.train, np.arange(fold.data.tiles.n)), fold.teacher.name)

    def _frozen(self, model: FrozenEncoder) -> dict[Depth, np.ndarray]:
        """Return the frozen features of all spots at every depth that may be asked for."""
        spots, o = self.spots, self.options
        depths: list[Depth] = [None] if self.protocol == HEST else candidate_depths(model.n_blocks)
        if not any(map(reads_image, self.methods.values())):
            return {}
        # whatever is measured there, tiles look the same
        key = fingerprint(
            spots.tiles_fingerprint, _row(model), [list(d) if d else None for d in depths], o.precision, o.orientations
        )

        def make() -> list[np.ndarray]:
            made = embed(
                model, spots.tiles, depths, further=spots.further, orientations=o.orientations, batch_size=o.batch_size,
                device=o.device, precision=o.precision, max_memory=o.max_memory,
            )  # fmt: skip
            return [made[depth] for depth in depths]

        return dict(zip(depths, self.results.kept_large(f"frozen-{model.encoder.short}", key, make), strict=True))

    def _fold(self, name: str) -> FoldGenes:
        """Return a fold with its genes; what is chosen for it reads the training spots alone (but in "hest")."""
        if name in self._made:
            return self._made[name]
        spots = self.spots
        train, test = spots.folds[name]
        groups = self._groups(train)
        expressed = _inputs.expressed_genes(spots.log[train], groups[train])
        if not expressed.size:
            raise ValueError(f"Fold {name!r}: no gene is seen in at least 10 % of the spots of every training group.")
        if self.protocol == HEST:
            target, chosen = self._hest
        else:
            target = spots.log
            chosen = self._genes(name, expressed)
        predicted = np.unique(np.concatenate(list(chosen.values())))
        data = Data(
            spots.tiles,
            target[:, predicted],
            [spots.genes[i] for i in predicted],
            groups,
            spots.sections,
            spots.coords_um,
            spots.further,
        )
        fold = Fold(name, train, test, data, teacher=None)
        sets = {s: np.searchsorted(predicted, at) for s, at in chosen.items()}
        self._made[name] = FoldGenes(fold, sets, dense(data.expression[test]), expressed)
        return self._made[name]

    @cached_property
    def _hest(self) -> tuple[Matrix, dict[str, np.ndarray]]:
        """HEST-Bench's target of all genes and its choice of genes, the same in every fold."""
        raw = self.spots.raw
        genes = hest_genes(raw, self.spots.genes, self.spots.sections, self.n_genes)
        return raw.astype(np.float64).log1p().tocsr(), {HEST: genes}

    def _genes(self, name: str, expressed: np.ndarray) -> dict[str, np.ndarray]:
        spots = self.spots
        train = spots.folds[name][0]
        key = fingerprint(spots.fingerprint, train, expressed, self.sets, self.n_genes)

        def make() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            made = choose_gene_sets(
                self.sets, spots.genes, spots.log[train], spots.coords_um[train], spots.sections[train], expressed,
                self.n_genes,
            )  # fmt: skip
            return {f"set{i}": at for i, at in enumerate(made.values())}, {"names": list(made)}

        sets, about = self.results.kept(_file_name(f"genes-{name}"), key, make)
        return {set_name: sets[f"set{i}"] for i, set_name in enumerate(about["names"])}

    def _teacher(self, expressed: np.ndarray, seed: int) -> Teacher | None:
        """Return what teaches in a fold with a seed; None where no method asks for a teacher that was not read."""
        spots, o = self.spots, self.options
        if spots.stored is not None:
            return spots.stored
        row = TEACHERS.get(spots.teacher)
        if row is None or not row.fitted:
            return None
        return row.make(
            Source(
                expression=spots.log,
                counts=spots.raw if row.counts else None,
                genes=np.array(spots.genes, dtype=object),
                expressed=expressed,
                n_components=o.n_components if spots.teacher == "pca" else None,
                device=o.device,
                precision=o.precision,
                random_state=seed,
            )
        )


def _file_name(title: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+=\-]+", "_", title)


def _row(model: FrozenEncoder) -> dict[str, Any]:
    """Return what features depend on: the row, its weights by what they are and not where."""
    return model.encoder.to_dict() | {"weights": model.digest}
