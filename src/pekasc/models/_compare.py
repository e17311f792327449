"""One fold of a comparison: every method fitted on the same training spots, predicting the same held-out ones."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sklearn.neighbors import kneighbors_graph

from pekasc._expression import dense
from pekasc.models._adapter import Adapter
from pekasc.models._choose import Depth, FeaturesOfSome, choose, depth_name, features_at
from pekasc.models._context import with_context
from pekasc.models._encoders import Encoder
from pekasc.models._fit import fit
from pekasc.models._fit_job import Data, Options, Reader
from pekasc.models._folds import InnerFold, inner_folds
from pekasc.models._head_methods import FoldData, check_head
from pekasc.models._heads import RidgeHead
from pekasc.models._hest import hest_predict
from pekasc.models._methods import Method
from pekasc.models._profile import Profile
from pekasc.models._teachers import Teacher
from pekasc.tiling import TileSpec, TileSubset

CONTROLS = ("mean", "coordinates", "neighbours")
READOUTS = ("frozen", "frozen-best", "teacher")
BESIDE = "frozen+peka"
_N_NEIGHBOURS = 6
_DEGREE = 3


def is_trained(method: Method) -> bool:
    """Tell whether a method trains an adapter."""
    return method not in (*CONTROLS, *READOUTS)


def is_chosen(method: Method) -> bool:
    """Tell whether anything is chosen on inner folds."""
    return method not in ("mean", "neighbours")


def reads_image(method: Method) -> bool:
    """Tell whether a method sees tiles."""
    return method not in (*CONTROLS, "teacher")


def asks_teacher(method: Method) -> bool:
    """Tell whether a method needs a teacher."""
    return is_trained(method) or method == "teacher"


@dataclass(frozen=True)
class Fold:
    """What is known in one fold.

    Parameters
    ----------
    name
        The held-out groups' names.
    train, test
        Positions among all spots, sorted.
    data
        All spots, with the genes that this fold predicts; of the test spots' expression nothing is read but by the
        controls that say so.
    teacher
        Of all spots, fitted on whichever it is asked to; None where it is not asked.
    """

    name: str
    train: np.ndarray
    test: np.ndarray
    data: Data
    teacher: Teacher | None

    def training(self) -> Data:
        """Return the training spots alone."""
        d, at = self.data, self.train
        tiles, *further = self.tiles(at)
        return Data(tiles, d.expression[at], d.genes, d.groups[at], d.sections[at], d.coords_um[at], further)

    def tiles(self, rows: np.ndarray) -> list[TileSubset]:
        """Return the tiles of some spots at every scale."""
        return [TileSubset(source, rows) for source in (self.data.tiles, *self.data.further)]

    def lesson(self) -> Teacher:
        """Return the teacher as it knows the training spots alone, under their numbers."""
        assert self.teacher is not None  # for the type checker: a method asked for it
        return _TeacherOfSome(self.teacher, self.train)


class _TeacherOfSome:
    """A teacher that only knows some of its spots."""

    def __init__(self, teacher: Teacher, index: np.ndarray) -> None:
        self.teacher, self.index, self.n_spots = teacher, index, len(index)
        self.name, self.licence, self.digest = teacher.name, teacher.licence, teacher.digest
        self.n_genes = teacher.n_genes

    def embed(self, train: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Return the embedding of `rows` by what was fitted on `train`, both among these spots."""
        return self.teacher.embed(self.index[train], None if rows is None else self.index[rows])


@dataclass(frozen=True)
class Prediction:
    """What a method predicted for the test spots, (n_test, genes) float32, and what was chosen on the way."""

    predicted: np.ndarray
    about: Mapping[str, Any]


def control(fold: Fold, name: str, reader: Reader, options: Options, margin_um: float) -> Prediction:
    """Predict without the image: the training mean, the place in the section, or the measured neighbours' mean.

    ``"neighbours"`` reads what was measured around a test spot, so it is no prediction but a mark to compare with:
    what smoothing would give where every neighbour was sequenced.
    """
    d = fold.data
    if name == "mean":
        mean = np.asarray(d.expression[fold.train].mean(axis=0), dtype=np.float32).ravel()
        return Prediction(np.tile(mean, (len(fold.test), 1)), {})
    if name == "coordinates":
        return read_out(fold, reader, {None: _polynomial(d.coords_um, d.sections)}, options, margin_um)
    predicted = np.empty((len(fold.test), len(d.genes)), dtype=np.float32)
    for section in np.unique(d.sections[fold.test]):
        # every spot of the section that was measured, whichever side of the fold it is on
        at = np.flatnonzero(d.sections == section)
        if len(at) == 1:  # nothing was measured around it
            predicted[fold.test == at[0]] = np.asarray(d.expression[fold.train].mean(axis=0)).ravel()
            continue
        graph = kneighbors_graph(d.coords_um[at], min(_N_NEIGHBOURS, len(at) - 1))
        mean = dense(graph @ d.expression[at]) / np.asarray(graph.sum(axis=1)).reshape(-1, 1)
        inside = np.isin(fold.test, at)
        predicted[inside] = mean[np.searchsorted(at, fold.test[inside])]
    return Prediction(predicted, {})


def _polynomial(coords_um: np.ndarray, sections: np.ndarray) -> np.ndarray:
    """Return powers of x and y up to the third, in each section from -1 to 1."""
    scaled = np.empty(coords_um.shape)
    for section in np.unique(sections):
        at = sections == section
        low, high = coords_um[at].min(axis=0), coords_um[at].max(axis=0)
        scaled[at] = 2 * (coords_um[at] - low) / np.where(high > low, high - low, 1.0) - 1
    x, y = scaled.T
    powers = [x**i * y**j for i in range(_DEGREE + 1) for j in range(_DEGREE + 1 - i) if i + j]
    return np.column_stack(powers).astype(np.float32)


def read_out(
    fold: Fold,
    reader: Reader,
    features: Mapping[Depth, np.ndarray],
    options: Options,
    margin_um: float,
    n_depths: int = 1,
) -> Prediction:
    """Choose depth and the head's setting on the training groups, fit the head on them, and predict the test spots.

    Parameters
    ----------
    fold, reader, options
        What to predict, and how.
    features
        Features of all spots by depth, from which one is chosen.
    margin_um
        See :func:`pekasc.models._folds.inner_folds`.
    n_depths
        Most depths whose features are put side by side.
    """
    d = fold.data

    y = d.expression[fold.train]
    groups, coords, sections = d.groups[fold.train], d.coords_um[fold.train], d.sections[fold.train]
    folds = inner_folds(groups, coords, sections, margin_um)

    def seen(x: np.ndarray, inner: InnerFold | None = None) -> np.ndarray:
        # the neighbours of training spots are training spots, on their side of an inner fold
        return with_context(x, coords, sections, reader.context_um, inner)

    training = FeaturesOfSome(features, fold.train)
    context = None if reader.context_um is None else seen
    chosen = choose(training, y, folds, options.n_components, context, n_depths)
    x = features_at(training, chosen.depth)
    method = check_head(reader.head)
    inner = [FoldData(seen(x, f), y, f) for f in folds]
    setting = method.choose(inner, options.n_components, options.random_state)
    head = method.fit(seen(x), y, options.n_components, setting, options.random_state)
    about = {
        "depth": depth_name(chosen.depth),
        "alpha": float(np.median(head.alpha)) if isinstance(head, RidgeHead) else None,
    }
    test = features_at(FeaturesOfSome(features, fold.test), chosen.depth)
    test = with_context(test, d.coords_um[fold.test], d.sections[fold.test], reader.context_um)
    return Prediction(head.predict(test), about)


def hest_read_out(fold: Fold, features: np.ndarray, reader: Reader) -> Prediction:
    """Predict the test spots as HEST-Bench does, from the features (n, d) of all spots."""
    d = fold.data

    def seen(rows: np.ndarray) -> np.ndarray:
        return with_context(features[rows], d.coords_um[rows], d.sections[rows], reader.context_um)

    return Prediction(
        hest_predict(seen(fold.train), dense(d.expression[fold.train]), seen(fold.test)), {"depth": "own"}
    )


def _trained(
    fold: Fold,
    encoder: Encoder,
    spec: TileSpec,
    method: Method,
    readers: Sequence[Reader],
    frozen: Mapping[Depth, np.ndarray],
    options: Options,
) -> list[Adapter]:
    """Return an adapter per reader, fitted on the training spots alone."""
    how = replace(options, method=method, profile=Profile())
    training = FeaturesOfSome(frozen, fold.train)
    return fit(encoder, spec, fold.training(), fold.lesson(), how, readers, frozen=training)


def hest_adapted(
    fold: Fold,
    encoder: Encoder,
    spec: TileSpec,
    method: Method,
    readers: Sequence[Reader],
    frozen: Mapping[Depth, np.ndarray],
    options: Options,
) -> list[Prediction]:
    """Train an adapter on the training spots, and predict the test spots from its features as HEST-Bench does."""
    start = time.perf_counter()
    # the head of the fit only counts epochs here
    adapter = _trained(fold, encoder, spec, method, [Reader()], frozen, options)[0]
    features = adapter.embed_source(
        fold.data.tiles, batch_size=options.batch_size, device=str(options.device), precision=options.precision
    )
    about = {
        "epochs": adapter.info["epochs"],
        "n_parameters": adapter.info["n_parameters"],
        "seconds": time.perf_counter() - start,
    }
    out = [hest_read_out(fold, features, reader) for reader in readers]
    return [Prediction(p.predicted, {**p.about, **about}) for p in out]


def adapted(
    fold: Fold,
    encoder: Encoder,
    spec: TileSpec,
    method: Method,
    readers: Sequence[Reader],
    frozen: Mapping[Depth, np.ndarray],
    options: Options,
) -> list[Prediction]:
    """Train an adapter on the training spots for every reader and predict the test spots.

    Parameters
    ----------
    fold, encoder, spec, method, readers, options
        What to train, and how.
    frozen
        Features of all spots by depth: test spots' are read only beside adapted ones.
    """
    start = time.perf_counter()
    adapters = _trained(fold, encoder, spec, method, readers, frozen, options)
    seconds = time.perf_counter() - start
    d = fold.data
    coords, sections = d.coords_um[fold.test], d.sections[fold.test]
    test, *further = fold.tiles(fold.test)
    known: dict[tuple[Depth, int], np.ndarray] = {}
    out = []
    for reader, adapter in zip(readers, adapters, strict=True):
        epochs = adapter.info["epochs"]
        if (adapter.depth, epochs) not in known:
            known[adapter.depth, epochs] = adapter.embed_source(
                test, further, batch_size=options.batch_size, device=str(options.device),
                precision=options.precision,
            )  # fmt: skip
        features = known[adapter.depth, epochs]
        if reader.beside_frozen:
            features = np.concatenate([features_at(FeaturesOfSome(frozen, fold.test), adapter.depth), features], axis=1)
        about = {
            "depth": depth_name(adapter.depth),
            "epochs": epochs,
            "alpha": adapter.info["alpha"],
            "n_parameters": adapter.info["n_parameters"],
            "seconds": seconds,
        }
        out.append(Prediction(adapter.predict_features(features, coords, sections), about))
    return out
