"""Methods on one fold of a comparison: fit on the training spots, predict the test spots."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.neighbors import kneighbors_graph
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pekasc._expression import dense
from pekasc._options import Readout
from pekasc.models.adapter import Adapter
from pekasc.models.comparing._hest import hest_predict, tuned_strength
from pekasc.models.encoders import Depth, EncoderNetwork, candidate_depths, depth_name, features_of_some
from pekasc.models.heads import Reading, with_context
from pekasc.models.runtime import Profile
from pekasc.models.selection import (
    Data,
    Features,
    Fitted,
    HeadSpec,
    Options,
    Reader,
    choose_depth,
    depths_of,
    fit,
    fixed_radius,
    inner_folds,
    margin_um,
    tiles_alone,
)
from pekasc.models.teachers import TeacherModel, check_finite
from pekasc.models.training import Method
from pekasc.tiling import TileSpec, TileSubset

N_DEPTHS = 2  # default maximum of blocks that "frozen-best" concatenates
_N_NEIGHBOURS = 6
_DEGREE = 3


@dataclass(frozen=True)
class Fold:
    """Data of one fold.

    Parameters
    ----------
    name
        Name of the fold.
    train, test
        Indices among all spots, sorted.
    data
        All spots, with the genes that this fold predicts. The expression of test spots is used only by the methods
        "neighbours" and "teacher".
    teacher
        Teacher of all spots; None if no method needs one.
    tuned
        Whether the penalty of HEST-Bench's regression is tuned on held-out training groups.
    """

    name: str
    train: np.ndarray
    test: np.ndarray
    data: Data
    teacher: TeacherModel | None
    tuned: bool = False

    def training(self) -> Data:
        """Return the training spots only."""
        tiles, *further = self.tiles(self.train)
        return self.data.take(self.train, tiles, further)

    def tiles(self, rows: np.ndarray) -> list[TileSubset]:
        """Return the tiles of the spots `rows` at every scale."""
        return [TileSubset(source, rows) for source in (self.data.tiles, *self.data.further)]

    def training_teacher(self) -> TeacherModel:
        """Return the teacher for the training spots, indexed among them."""
        assert self.teacher is not None  # for the type checker: a method needs it
        return _TeacherSubset(self.teacher, self.train)

    def teacher_embedding(self) -> np.ndarray:
        """Return the embedding of all spots by the teacher fitted on the training spots."""
        assert self.teacher is not None  # for the type checker: a method needs it
        return check_finite(self.teacher.embed(self.train, np.arange(self.data.tiles.n)), self.teacher.name)


class _TeacherSubset:
    """A teacher restricted to a subset of its spots."""

    def __init__(self, teacher: TeacherModel, index: np.ndarray) -> None:
        self.teacher, self.index, self.n_spots = teacher, index, len(index)
        self.name, self.licence, self.digest = teacher.name, teacher.licence, teacher.digest
        self.n_genes = teacher.n_genes

    def embed(self, train: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Return the embedding of `rows` by the teacher fitted on `train`, both indexed among these spots."""
        return self.teacher.embed(self.index[train], None if rows is None else self.index[rows])


@dataclass(frozen=True)
class Encoded:
    """An encoder, loaded once for all folds, with the frozen features of all spots.

    Parameters
    ----------
    model
        The network.
    spec
        Size of the tiles.
    read_frozen
        Function that returns the features of all spots by depth, (n, d).
    """

    model: EncoderNetwork
    spec: TileSpec
    read_frozen: Callable[[], Mapping[Depth, np.ndarray]]

    @cached_property
    def frozen(self) -> Mapping[Depth, np.ndarray]:
        """Features of all spots by depth, (n, d), embedded when the first method needs them."""
        return self.read_frozen()


@dataclass(frozen=True)
class Prediction:
    """Predicted expression of the test spots, (n_test, genes) float32, and the settings that were chosen."""

    predicted: np.ndarray
    about: Mapping[str, Any]


def predict_mean(fold: Fold, encoded: Encoded, options: Options, heads: Sequence[HeadSpec]) -> list[Prediction]:
    """Predict the training mean of every gene."""
    return [Prediction(np.tile(_training_mean(fold), (len(fold.test), 1)), {}) for _ in heads]


def _training_mean(fold: Fold) -> np.ndarray:
    return np.asarray(fold.data.expression[fold.train].mean(axis=0), dtype=np.float32).ravel()


def predict_neighbours(fold: Fold, encoded: Encoded, options: Options, heads: Sequence[HeadSpec]) -> list[Prediction]:
    """Predict the mean measured expression of the nearest spots.

    This uses measurements around a test spot, so it is a reference and not a prediction: what smoothing would give if
    all neighbours were sequenced.
    """
    d = fold.data
    predicted = np.empty((len(fold.test), len(d.genes)), dtype=np.float32)
    for section in np.unique(d.sections[fold.test]):
        # all measured spots of the section, training and test
        at = np.flatnonzero(d.sections == section)
        if len(at) == 1:  # no neighbours
            predicted[fold.test == at[0]] = _training_mean(fold)
            continue
        graph = kneighbors_graph(d.coords_um[at], min(_N_NEIGHBOURS, len(at) - 1))
        mean = dense(graph @ d.expression[at]) / np.asarray(graph.sum(axis=1)).reshape(-1, 1)
        inside = np.isin(fold.test, at)
        predicted[inside] = mean[np.searchsorted(at, fold.test[inside])]
    return [Prediction(predicted, {}) for _ in heads]


def predict_coordinates(fold: Fold, encoded: Encoded, options: Options, heads: Sequence[HeadSpec]) -> list[Prediction]:
    """Predict from the spot's coordinates within its section, without the image."""
    features: dict[Depth, np.ndarray] = {None: _polynomial(fold.data.coords_um, fold.data.sections)}
    return _read(fold, features, options, encoded.spec, [_without_image(head) for head in heads], n_fields=1)


def _without_image(head: HeadSpec) -> HeadSpec:
    """Return the head for features that are no encoder's, at one depth, without spatial context and smoothing."""
    names = head.names(adapted=False) or head.names(adapted=True)
    kind = names[0].partition(":")[2]
    rank = head.readout.head_rank if kind == "low-rank" else None
    plain = head.readout.replace(
        head=kind, head_rank=rank, members=None, context_um=None, smooth_um=None, depth="own", n_depths=None
    )
    return replace(head, readout=plain)


def _polynomial(coords_um: np.ndarray, sections: np.ndarray) -> np.ndarray:
    """Return polynomial features of x and y up to degree 3, with coordinates scaled to -1 to 1 in each section."""
    scaled = np.empty(coords_um.shape)
    for section in np.unique(sections):
        at = sections == section
        low, high = coords_um[at].min(axis=0), coords_um[at].max(axis=0)
        scaled[at] = 2 * (coords_um[at] - low) / np.where(high > low, high - low, 1.0) - 1
    x, y = scaled.T
    powers = [x**i * y**j for i in range(_DEGREE + 1) for j in range(_DEGREE + 1 - i) if i + j]
    return np.column_stack(powers).astype(np.float32)


def predict_teacher(fold: Fold, encoded: Encoded, options: Options, heads: Sequence[HeadSpec]) -> list[Prediction]:
    """Predict from the teacher's embedding of the test spots' own expression: an upper bound."""
    every: dict[Depth, np.ndarray] = {None: fold.teacher_embedding()}
    # without spatial context: the spot's own expression is known, and neighbours would only add noise
    return _read(fold, every, options, encoded.spec, [_without_image(head) for head in heads], n_fields=1)


def predict_frozen(fold: Fold, encoded: Encoded, options: Options, heads: Sequence[HeadSpec]) -> list[Prediction]:
    """Predict from the frozen encoder's last block, or at the depth that the readout names."""
    depth = frozen_depth(encoded.model, options.readout)
    return _read(fold, {depth: encoded.frozen[depth]}, options, encoded.spec, heads)


def frozen_depth(model: EncoderNetwork, readout: Readout) -> Depth:
    """Return the depth of the method "frozen": the one that the readout names, else the last block."""
    return (model.n_blocks,) if readout.depth in ("all", "best") else depths_of(model, readout)[-1]


def predict_lazy(fold: Fold, encoded: Encoded, options: Options, heads: Sequence[HeadSpec]) -> list[Prediction]:
    """Predict as one would in five lines: the last block's features, and RidgeCV over spots, of scikit-learn."""
    last = encoded.frozen[(encoded.model.n_blocks,)]
    own = last[:, : last.shape[1] // (1 + len(options.fields_um))]
    model = make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(-1, 5, 13)))
    model.fit(own[fold.train], dense(fold.data.expression[fold.train]))
    alpha = float(model[-1].alpha_)
    predicted = model.predict(own[fold.test]).astype(np.float32)
    return [Prediction(predicted, {"depth": str(encoded.model.n_blocks), "alpha": alpha}) for _ in heads]


def predict_frozen_best(fold: Fold, encoded: Encoded, options: Options, heads: Sequence[HeadSpec]) -> list[Prediction]:
    """Predict from the frozen encoder at all depths, or at those that are best on the training groups.

    Of a blend, frozen features at the depth that plain ridge chooses take the place of adapted ones.
    """
    depths = candidate_depths(encoded.model.n_blocks)
    return _read(fold, encoded.frozen, options, encoded.spec, heads, depths=depths, stand_in=True)


def _read(
    fold: Fold,
    features: Mapping[Depth, np.ndarray],
    options: Options,
    spec: TileSpec,
    heads: Sequence[HeadSpec],
    *,
    depths: Sequence[Depth] | None = None,
    n_fields: int | None = None,
    stand_in: bool = False,
) -> list[Prediction]:
    """Choose or average settings on the training groups, fit every reading, and predict the test spots.

    Features may be of more depths than those to read.
    """
    n_fields = 1 + len(options.fields_um) if n_fields is None else n_fields
    training = fold.training()
    folds = inner_folds(training.groups, training.coords_um, training.sections, margin_um(spec, options.fields_um))
    own = features_of_some(features, fold.train, depths)
    n_components = heads[0].readout.n_components
    depth = choose_depth(tiles_alone(own, n_fields), training, folds, n_components).depth
    reader = Reader(training, folds, Features(own, depth, n_fields=n_fields))
    out = []
    for head in heads:
        read_at = list(own)
        if head.readout.depth == "best" and len(read_at) > 1:
            n_depths = head.readout.n_depths or N_DEPTHS
            radius = fixed_radius(head.readout)
            read_at = [choose_depth(own, training, folds, head.readout.n_components, radius, n_depths).depth]
        fitted = reader.fit(head, read_at, stand_in=stand_in)
        out.append(_predicted(fold, fitted, Features(features_of_some(features, fold.test), depth, n_fields=n_fields)))
    return out


def _predicted(fold: Fold, fitted: Fitted, test: Features) -> Prediction:
    """Predict the test spots from their features."""
    reading = fitted.reading.use()
    predicted = _test_spots(fold, reading, test)
    weighed = fitted.table[fitted.table["weight"] > 0]
    depths = list(dict.fromkeys(depth_name(depth) for depth in weighed["depth"]))
    one = len(weighed) == 1
    about = {
        "depth": depths[0] if len(depths) == 1 else f"{len(depths)} depths",
        "alpha": float(weighed["alpha"].iloc[0]) if one and np.isfinite(weighed["alpha"].iloc[0]) else None,
        "context_um": radii_text(reading),
    }
    return Prediction(predicted, about)


def radii_text(reading: Reading) -> str:
    """Return the radii of a reading for a table."""
    return "+".join(f"{radius:g}" for radius in reading.radii_um)


def _test_spots(fold: Fold, reading: Reading, features: Features) -> np.ndarray:
    found = {source: features.of(source, None) for source in reading.sources}
    d = fold.data
    return reading.expression(reading.placed_scores(found, d.coords_um[fold.test], d.sections[fold.test]))


def predict_frozen_hest(fold: Fold, encoded: Encoded, options: Options, heads: Sequence[HeadSpec]) -> list[Prediction]:
    """Predict from the frozen encoder as HEST-Bench does."""
    return [_hest_read_out(fold, encoded.frozen[None], head) for head in heads]


def predict_teacher_hest(fold: Fold, encoded: Encoded, options: Options, heads: Sequence[HeadSpec]) -> list[Prediction]:
    """Predict from the teacher as HEST-Bench does."""
    features = fold.teacher_embedding()
    return [_hest_read_out(fold, features, head) for head in heads]


def _hest_read_out(fold: Fold, features: np.ndarray, head: HeadSpec) -> Prediction:
    """Predict the test spots as HEST-Bench does, from the features (n, d) of all spots."""
    d = fold.data

    radius = head.readout.context_um
    assert not isinstance(radius, str)  # for the type checker: HEST-Bench chooses nothing

    def inputs(rows: np.ndarray) -> np.ndarray:
        return with_context(features[rows], d.coords_um[rows], d.sections[rows], radius)

    x, y, test = inputs(fold.train), dense(d.expression[fold.train]), inputs(fold.test)
    if not fold.tuned:
        return Prediction(hest_predict(x, y, test), {"depth": "own"})
    strength = tuned_strength(x, y, d.groups[fold.train])
    return Prediction(hest_predict(x, y, test, strength), {"depth": "own", "alpha": strength})


def _trained(
    fold: Fold, encoded: Encoded, method: Method, options: Options, heads: Sequence[HeadSpec]
) -> list[Adapter]:
    """Return an adapter per head, fitted on the training spots alone."""
    how = replace(options, method=method, profile=Profile())
    frozen = features_of_some(encoded.frozen, fold.train, depths_of(encoded.model, options.readout))
    return fit(encoded.model, encoded.spec, fold.training(), fold.training_teacher(), how, heads, frozen=frozen)


def predict_adapted_hest(
    fold: Fold, encoded: Encoded, method: Method, options: Options, heads: Sequence[HeadSpec]
) -> list[Prediction]:
    """Train an adapter on the training spots, and predict the test spots from its features as HEST-Bench does."""
    start = time.perf_counter()
    # this head only serves to choose the epochs
    adapter = _trained(fold, encoded, method, options, [HeadSpec()])[0]
    by_adapter = adapter.embed_with(encoded.model, fold.data.tiles, compute=options.compute, device=options.device)
    features = by_adapter[0] if len(by_adapter) == 1 else np.mean(by_adapter, axis=0)
    about = {
        "epochs": adapter.info["epochs"],
        "n_parameters": adapter.info["n_parameters"],
        "seconds": time.perf_counter() - start,
    }
    out = [_hest_read_out(fold, features, head) for head in heads]
    return [Prediction(p.predicted, {**p.about, **about}) for p in out]


def predict_adapted(
    fold: Fold, encoded: Encoded, method: Method, options: Options, heads: Sequence[HeadSpec]
) -> list[Prediction]:
    """Train an adapter on the training spots, fit every head, and predict the test spots."""
    start = time.perf_counter()
    adapters = _trained(fold, encoded, method, options, heads)
    seconds = time.perf_counter() - start
    test, *_ = fold.tiles(fold.test)
    frozen = features_of_some(encoded.frozen, fold.test)
    known: dict[tuple[Depth, int], list[np.ndarray]] = {}
    out = []
    for adapter in adapters:
        epochs = adapter.info["epochs"]
        if (adapter.depth, epochs) not in known:
            known[adapter.depth, epochs] = adapter.embed_with(
                encoded.model, test, compute=options.compute, device=options.device
            )
        features = Features(frozen, adapter.depth, known[adapter.depth, epochs], n_fields=1 + len(options.fields_um))
        reading = adapter.reading.use()
        predicted = _test_spots(fold, reading, features)
        about = {
            "depth": depth_name(adapter.depth),
            "epochs": epochs,
            "alpha": adapter.info["alpha"],
            "context_um": radii_text(reading),
            "n_parameters": adapter.info["n_parameters"],
            "seconds": seconds,
        }
        out.append(Prediction(predicted, about))
    return out
