"""Run a comparison: every method on every fold, with finished fits kept in a store."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftConfig

from pekasc._digests import fingerprint
from pekasc._expression import Matrix, dense, expressed_genes
from pekasc._options import Readout
from pekasc._settings import get_logger
from pekasc.models.comparing._bench import Bench, FoldGenes
from pekasc.models.comparing._fold import N_DEPTHS, Encoded, Fold, Prediction, frozen_depth
from pekasc.models.comparing._gene_sets import choose_gene_sets
from pekasc.models.comparing._hest import hest_genes
from pekasc.models.comparing._results import Results
from pekasc.models.comparing._rivals import BEST_FROZEN, LAZY, Rival
from pekasc.models.encoders import ArraysOnAccess, Depth, EncoderNetwork, candidate_depths, warn_of_scale
from pekasc.models.features import embed
from pekasc.models.selection import Data, HeadSpec, Options, depths_of, inner_folds, margin_um
from pekasc.models.training import attached, make_config, target_layers
from pekasc.tiling import TileSource

logger = get_logger(__name__)

HEST, HEST_TUNED = "hest", "hest-tuned"
HEST_PROTOCOLS = (HEST, HEST_TUNED)


@dataclass(frozen=True)
class Result:
    """Prediction of one method in a fold."""

    encoder: str
    method: str
    rival: Rival
    teacher: str  # "" for methods without teacher
    readout: Readout
    seed: int
    prediction: Prediction


@dataclass
class Comparison:
    """Run methods on folds, for readouts that share a training, which differ only in head and context.

    Parameters
    ----------
    bench
        Spots, folds and teacher.
    methods
        Methods by name.
    readouts
        The readouts.
    seeds
        Seeds, for methods that are not deterministic.
    protocol
        ``"nested"``, ``"hest"`` or ``"hest-tuned"``.
    sets, n_genes
        See :func:`pekasc.models.comparing.choose_gene_sets`.
    options
        Options of the fits.
    results
        Store of finished fits.
    cache
        Cache of frozen features and gene sets.
    """

    bench: Bench
    methods: dict[str, Rival]
    readouts: Sequence[Readout]
    seeds: tuple[int, ...]
    protocol: str
    sets: dict[str, list[str] | None]
    n_genes: int
    options: Options
    results: Results
    cache: Results
    _made: dict[str, FoldGenes] = field(default_factory=dict)

    def seeds_of(self, label: str) -> tuple[int, ...]:
        """Return the seeds of a method; deterministic methods run once."""
        row = self.methods[label]
        varies = row.trains is not None or (row.reads_teacher and self.bench.draws)
        return self.seeds if varies else self.seeds[:1]

    def on_encoder(self, model: EncoderNetwork, bar: Any) -> Iterator[tuple[FoldGenes, list[Result]]]:
        """Run all methods with an encoder; yield the predictions fold by fold."""
        bench = self.bench
        warn_of_scale(model.encoder, bench.spec.mpp)
        self._check_adapters(model)
        self._check_folds()
        for name in bench.folds:  # a section without enough tissue fails before hours of embedding
            bench.stained(name)
        encoded = Encoded(model, bench.spec, lambda: self._frozen(model, bench.tiles, ""))
        common = {
            "data": bench.fingerprint,
            "encoder": _row(model),
            "protocol": self.protocol,
            "genes": self.sets,
            "n_genes": self.n_genes,
            "versions": _versions("pekasc", "torch", "timm", "peft", "lightning", "scikit-learn"),
        }
        for name in bench.folds:
            genes = self._fold(name)
            if bench.stain is not None:  # towards another reference in every fold
                encoded = self._encoded(model, genes)
            found: list[Result] = []
            for labels in self._units():
                for seed in self.seeds_of(labels[0]):
                    found += self._unit(genes, encoded, labels, seed, common)
                    bar.update(len(labels))
            # in the order of `methods`, whichever shared a training
            yield genes, sorted(found, key=lambda result: list(self.methods).index(result.method))

    def _encoded(self, model: EncoderNetwork, genes: FoldGenes) -> Encoded:
        """Return the encoder with frozen features of the tiles as a fold reads them."""
        data = genes.fold.data
        return Encoded(model, self.bench.spec, lambda: self._frozen(model, [data.tiles, *data.further], genes.stain))

    def _check_adapters(self, model: EncoderNetwork) -> None:
        """Attach every adapter once, so that an invalid one fails before hours of embedding."""
        o = self.options
        depth = depths_of(model, o.readout)[-1]
        for row in self.methods.values():
            if row.trains is None:
                continue
            targets = target_layers(model, depth, o.recipe.blocks, row.trains)
            with attached(model, make_config(row.trains, o.recipe.rank, targets), 0):
                pass

    def _check_folds(self) -> None:
        """Make the inner folds of every fold once, so that too few spots fail before hours of embedding."""
        if self.protocol in HEST_PROTOCOLS or not any(row.chosen for row in self.methods.values()):
            return
        bench = self.bench
        margin = margin_um(bench.spec, self.options.fields_um)
        for train, _ in bench.folds.values():
            inner_folds(self._groups(train)[train], bench.coords_um[train], bench.sections[train], margin)

    def _groups(self, train: np.ndarray) -> np.ndarray:
        """Return the groups that the inner folds hold out, for all spots.

        With default groups, as `fit_adapter` would choose them: sections, if the training spots are of one patient.
        """
        bench = self.bench
        single = bench.default_groups and len(np.unique(bench.groups[train])) < 2
        return bench.sections if single else bench.groups

    def _units(self) -> list[list[str]]:
        """Return methods grouped by training: adapted features alone, and concatenated with frozen ones, share one."""
        units: dict[str, list[str]] = {}
        for label, row in self.methods.items():
            units.setdefault(row.trains if isinstance(row.trains, str) else f"alone {label}", []).append(label)
        return list(units.values())

    def _unit(
        self, genes: FoldGenes, encoded: Encoded, labels: list[str], seed: int, common: dict[str, Any]
    ) -> list[Result]:
        """Return the predictions of methods that share a training, for every readout: from the store, or computed."""
        fold = genes.fold
        short = encoded.model.encoder.short
        pairs = [(label, readout) for label in labels for readout in self.readouts]
        out: dict[tuple[str, Readout], Prediction] = {}
        keys: dict[tuple[str, Readout], tuple[str, str]] = {}
        for label, readout in pairs:
            key = fingerprint(
                common, fold.train, fold.test, fold.data.groups.astype("U"), seed,
                self._depends_on(label, readout, genes.stain),
            )  # fmt: skip
            keys[label, readout] = _file_name(f"{fold.name}-{short}-{label}"), key
            stored = self.results.get(*keys[label, readout])
            if stored is not None:
                out[label, readout] = Prediction(stored[0]["predicted"], stored[1])
        todo = [unit for unit in pairs if unit not in out]
        if todo and self._stops_early(labels[0]):
            todo = pairs  # the first head decides when inner folds stop, whatever is in the store
        if todo:
            row = self.methods[labels[0]]
            if row.reads_image:
                _ = encoded.frozen  # embedded once for all methods: not part of a method's seconds
            start = time.perf_counter()
            heads = [HeadSpec(readout, self.methods[label].beside_frozen) for label, readout in todo]
            if row.reads_teacher:
                assert self.bench.make_teacher is not None  # for the type checker: this method needs one
                fold = replace(fold, teacher=self.bench.make_teacher(genes.expressed, seed))
            predict = row.hest if self.protocol in HEST_PROTOCOLS else row.predict
            assert predict is not None  # for the type checker: methods outside of the protocol were refused
            fold = replace(fold, tuned=self.protocol == HEST_TUNED)
            made = predict(fold, encoded, replace(self.options, random_state=seed), heads)
            for unit, prediction in zip(todo, made, strict=True):
                about = {"seconds": time.perf_counter() - start, **prediction.about}
                out[unit] = Prediction(prediction.predicted.astype(np.float32), about)
                self.results.put(*keys[unit], {"predicted": out[unit].predicted}, about)
        return [
            Result(short, label, self.methods[label], self._teacher_of(label), readout, seed, out[label, readout])
            for label, readout in pairs
        ]

    def _depends_on(self, label: str, readout: Readout, stain: str) -> dict[str, Any]:
        """Return the settings that the result of a method depends on, as part of its key in the store.

        `stain` is the fingerprint of the stain maps of the fold.
        """
        o, row = self.options, self.methods[label]
        trains = row.trains.to_dict() if isinstance(row.trains, PeftConfig) else row.trains
        out: dict[str, Any] = {
            "method": [row.name, trains],
            "readout": [
                readout.head,
                readout.head_rank,
                readout.members,
                readout.selection,
                readout.context_um,
                readout.smooth_um,
                readout.n_components,
            ],
            "precision": o.precision,
        }
        if row.chosen:
            out["fields_um"] = o.fields_um  # they set the margin between training and held-out spots of inner folds
        if row.reads_image:
            depths = [readout.depth, readout.n_depths or N_DEPTHS]
            out |= {"tiles": self.bench.tiles_fingerprint, "orientations": readout.orientations, "depths": depths}
            if stain:
                out["stain"] = stain
        if self._teacher_of(label):
            out["teacher"] = self.bench.teacher, self.bench.teacher_fingerprint, o.recipe.teacher_components
        if row.trains is not None:
            out["recipe"] = asdict(o.recipe)
        if self._stops_early(label):
            unit = next(labels for labels in self._units() if label in labels)
            out["first head"] = [self.methods[unit[0]].beside_frozen, repr(self.readouts[0])]
        return out

    def _stops_early(self, label: str) -> bool:
        """Return whether the training of a method depends on the first of the heads that share it."""
        return self.methods[label].trains is not None and self.options.recipe.patience is not None

    def _teacher_of(self, label: str) -> str:
        return self.bench.teacher if self.methods[label].reads_teacher else ""

    def _depths(self, model: EncoderNetwork) -> list[Depth]:
        """Return the depths at which some method needs frozen features."""
        readout, rows = self.options.readout, self.methods.values()
        if self.protocol in HEST_PROTOCOLS:
            return [None]
        depths: list[Depth] = []
        if any(row.name == BEST_FROZEN for row in rows):
            depths += candidate_depths(model.n_blocks)
        if any(row.trains is not None for row in rows):
            depths += depths_of(model, readout)
        if any(row.name == LAZY for row in rows):
            depths.append((model.n_blocks,))
        if any(row.name == "frozen" for row in rows):
            depths.append(frozen_depth(model, readout))
        return list(dict.fromkeys(depths))

    def _frozen(self, model: EncoderNetwork, sources: Sequence[TileSource], stain: str) -> Mapping[Depth, np.ndarray]:
        """Return the frozen features of all spots at every depth that some method needs.

        `sources` are their tiles, and those of wider fields of view; `stain` is the fingerprint of their stain maps.
        """
        bench, o = self.bench, self.options
        if not any(row.reads_image for row in self.methods.values()):
            return {}
        depths = self._depths(model)
        # features depend on the tiles only, not on the expression
        key = fingerprint(
            bench.tiles_fingerprint, _row(model), [list(d) if d else None for d in depths], o.precision,
            o.readout.orientations, _versions("pekasc", "torch", "timm"), *([stain] if stain else []),
        )  # fmt: skip

        def embedded() -> Mapping[Depth, np.ndarray]:
            tiles, *further = sources
            return embed(
                model, tiles, depths, further=further, orientations=o.readout.orientations,
                batch_size=o.compute.embed_batch_size, device=o.device, precision=o.precision, max_memory=o.max_memory,
                folder=None if o.compute.cache is None else Path(o.compute.cache), half=True,
            )  # fmt: skip

        if self.cache.folder is None:
            return embedded()
        named = {f"depth{i}": depth for i, depth in enumerate(depths)}

        def make() -> tuple[Mapping[str, np.ndarray], dict[str, Any]]:
            made = embedded()
            return ArraysOnAccess(named, lambda name: made[named[name]]), {}

        arrays, _ = self.cache.kept(f"frozen-{model.encoder.short}", key, make)
        return {depth: arrays[name] for name, depth in named.items()}

    def _fold(self, name: str) -> FoldGenes:
        """Return a fold with its genes, which are selected on its training spots alone, except in "hest"."""
        if name in self._made:
            return self._made[name]
        bench = self.bench
        train, test = bench.folds[name]
        groups = self._groups(train)
        expressed = expressed_genes(bench.log[train], groups[train])
        if not expressed.size:
            raise ValueError(
                f"Fold {name!r}: no gene is detected in at least 10 % of the spots of every training group. Leave "
                "groups that are too shallow out, or join some (`groups=`, `folds=`)."
            )
        if self.protocol in HEST_PROTOCOLS:
            target, chosen = self._hest
        else:
            target = bench.log
            chosen = self._genes(name, expressed)
        predicted = np.unique(np.concatenate(list(chosen.values())))
        (tiles, *further), stain = bench.stained(name)
        genes = [bench.genes[i] for i in predicted]
        nested = self.protocol not in HEST_PROTOCOLS
        data = Data(
            tiles, target[:, predicted], genes, groups, bench.sections, bench.coords_um, further,
            every=target[:, expressed] if nested else None, totals=bench.totals if nested else None,
        )  # fmt: skip
        fold = Fold(name, train, test, data, teacher=None)
        sets = {s: np.searchsorted(predicted, at) for s, at in chosen.items()}
        counts = bench.counts[test][:, predicted] if nested else None
        self._made[name] = FoldGenes(
            fold, sets, dense(data.expression[test]), expressed, counts, bench.totals[test], stain
        )
        return self._made[name]

    @cached_property
    def _hest(self) -> tuple[Matrix, dict[str, np.ndarray]]:
        """Target and gene set of HEST-Bench, the same in every fold."""
        raw = self.bench.counts
        genes = hest_genes(raw, self.bench.genes, self.bench.sections, self.n_genes)
        return raw.astype(np.float64).log1p().tocsr(), {HEST: genes}

    def _genes(self, name: str, expressed: np.ndarray) -> dict[str, np.ndarray]:
        bench = self.bench
        train = bench.folds[name][0]
        versions = _versions("pekasc", "scanpy", "squidpy")
        key = fingerprint(bench.fingerprint, train, expressed, self.sets, self.n_genes, versions)

        def make() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            made = choose_gene_sets(
                self.sets, bench.genes, bench.log[train], bench.coords_um[train], bench.sections[train], expressed,
                self.n_genes,
            )  # fmt: skip
            return {f"set{i}": at for i, at in enumerate(made.values())}, {"names": list(made)}

        sets, about = self.cache.kept(_file_name(f"genes-{name}"), key, make)
        return {set_name: sets[f"set{i}"] for i, set_name in enumerate(about["names"])}


def _versions(*packages: str) -> dict[str, str]:
    return {name: version(name) for name in packages}


def _file_name(title: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+=\-]+", "_", title)


def _row(model: EncoderNetwork) -> dict[str, Any]:
    """Return what features depend on: the description of the encoder, with a digest in place of the weights' path."""
    return model.encoder.to_dict() | {"weights": model.digest}
