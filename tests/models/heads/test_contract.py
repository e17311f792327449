"""What every expression head promises: fit on inner folds and on all spots, predict, and survive the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

import pekasc as pk
from pekasc.models.encoders._network import EncoderNetwork
from pekasc.models.heads import (
    HeadFits,
    Inputs,
    LinearHead,
    Member,
    Reading,
    Source,
    Target,
    check_head,
    linear_head,
    setting_weights,
    with_context,
)
from pekasc.models.heads._fits import RidgeFits
from pekasc.models.heads._registry import HEADS
from pekasc.models.selection._folds import InnerFold

N, GENES, WIDTH, TILE_PX = 90, 6, 384, 32
ROW = pk.models.Encoder("vit_tiny_patch16_224", weights="random", model_kwargs={"depth": 2})
FOLDS = [
    InnerFold(np.setdiff1d(np.arange(N), np.arange(a, a + 30)), np.arange(a, a + 30), f"P{a // 30}")
    for a in range(0, N, 30)
]
SOURCE = Source("frozen", 0, (2,))


def planted(d: int, n: int = N, noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Return features (n, d) float32 and expression (n, GENES) that is linear in four of their directions.

    The last gene never varies; the others are 0 in some spots, as expression is.
    """
    rng = np.random.default_rng(d)
    state = rng.normal(size=(n, 4))
    x = 5 + state @ rng.normal(size=(4, d)) * 3 + 0.05 * rng.normal(size=(n, d))
    y = 6 + state @ rng.normal(size=(4, GENES)) + noise * rng.normal(size=(n, GENES))
    y[:, -1] = 2.5
    return x.astype(np.float32), y


@pytest.fixture(params=HEADS, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[12, 200], ids=["more spots than features", "fewer spots than features"], scope="module")
def d(request: pytest.FixtureRequest) -> int:
    return request.param


def fits_of(name: str, y: Any, folds: list[InnerFold] = FOLDS, n_components: int | None = None) -> HeadFits:
    return check_head(name)(Target(y, folds), n_components)


def chosen(fits: HeadFits, x: np.ndarray) -> np.ndarray:
    """Return the weights that give the best setting all weight, (1, settings)."""
    return setting_weights(fits.tried(Inputs(lambda: x)).errors.mean(axis=0, keepdims=True), "best", 0.01)


def head_of(fits: HeadFits, x: np.ndarray, weights: np.ndarray, fold: int | None = None) -> LinearHead:
    inputs = Inputs(lambda: x)
    tried = fits.tried(inputs)
    fit = fits.final(inputs) if fold is None else tried.folds[fold]
    return linear_head(fits, [tried], weights, [[SOURCE]], [fit], fold=fold, context_um=None)


def fitted(name: str, x: np.ndarray, y: Any, fold: int | None = None) -> LinearHead:
    fits = fits_of(name, y)
    return head_of(fits, x, chosen(fits, x), fold)


def predict(head: LinearHead, x: np.ndarray, genes: slice = slice(None)) -> np.ndarray:
    return head.expression(head.scores({SOURCE: x}), genes)


def test_predicts_every_gene_of_every_spot(name: str, d: int) -> None:
    x, y = planted(d)
    head = fitted(name, x, y)
    predicted = predict(head, x[:7])
    assert predicted.shape == (7, GENES) and predicted.dtype == np.float32 and np.isfinite(predicted).all()
    np.testing.assert_allclose(predict(head, x[:7], slice(1, 4)), predicted[:, 1:4], atol=1e-5)
    np.testing.assert_allclose(predict(head, x[3:4]), predicted[3:4], atol=1e-5)
    assert head.sources == [SOURCE] and head.context_um is None


def test_finds_the_planted_signal_on_spots_it_never_saw(name: str, d: int) -> None:
    x, y = planted(d, n=N + 40)
    predicted = predict(fitted(name, x[:N], y[:N]), x[N:])
    for gene in range(GENES - 1):
        assert np.corrcoef(predicted[:, gene], y[N:, gene])[0, 1] > 0.95
    error = np.square(predicted - y[N:]).sum() / np.square(y[:N].mean(axis=0) - y[N:]).sum()
    assert error < 0.05


def test_noise_is_hardly_worse_than_the_mean(name: str, d: int) -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(N + 40, d)).astype(np.float32), rng.normal(size=(N + 40, GENES))
    predicted = predict(fitted(name, x[:N], y[:N]), x[N:])
    assert np.square(predicted - y[N:]).sum() < 1.15 * np.square(y[:N].mean(axis=0) - y[N:]).sum()


def test_a_gene_that_never_varies_is_predicted_as_it_is(name: str, d: int) -> None:
    x, y = planted(d)
    np.testing.assert_allclose(predict(fitted(name, x, y), x)[:, -1], 2.5, atol=1e-5)
    constant = np.tile(np.arange(GENES, dtype=float), (N, 1))  # and where no gene varies
    np.testing.assert_allclose(predict(fitted(name, x, constant), x), constant, atol=1e-5)


def test_sparse_expression_is_the_dense_one(name: str, d: int) -> None:
    x, y = planted(d)
    y = np.maximum(y - 6, 0)
    dense, thin = fits_of(name, y), fits_of(name, sparse.csr_matrix(y))
    weights = chosen(dense, x)
    np.testing.assert_array_equal(chosen(thin, x), weights)
    for fold in (None, 1):
        np.testing.assert_allclose(
            predict(head_of(thin, x, weights, fold), x), predict(head_of(dense, x, weights, fold), x), atol=1e-4
        )


def test_the_same_data_give_the_same_bits(name: str, d: int) -> None:
    x, y = planted(d)
    before = x.copy(), y.copy()
    first = predict(fitted(name, x, y), x)
    np.random.seed(99)
    np.testing.assert_array_equal(predict(fitted(name, x, y), x), first)
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(y, before[1])


def test_order_of_spots_changes_nothing(name: str, d: int) -> None:
    x, y = planted(d)
    order = np.random.default_rng(0).permutation(N)
    back = np.argsort(order)
    folds = [InnerFold(np.sort(back[f.train]), np.sort(back[f.held_out]), f.name) for f in FOLDS]
    fits, moved = fits_of(name, y), fits_of(name, y[order], folds)
    weights = chosen(fits, x)
    np.testing.assert_array_equal(chosen(moved, x[order]), weights)
    one, other = head_of(fits, x, weights), head_of(moved, x[order], weights)
    np.testing.assert_allclose(predict(other, x), predict(one, x), atol=1e-3)


def test_a_choice_reads_both_sides_of_a_fold_and_no_spot_of_neither(name: str, d: int) -> None:
    x, y = planted(d, noise=2.0)
    y = y[:, :-1]  # any penalty is as good as another for a gene that never varies
    used = np.arange(60)
    folds = [InnerFold(used[:30], used[30:], "a"), InnerFold(used[30:], used[:30], "b")]

    def errors(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return fits_of(name, y, folds).tried(Inputs(lambda: x)).errors

    found = errors(x, y)
    assert found.shape == (2, len(fits_of(name, y, folds).settings))
    other_x, other_y = x.copy(), y.copy()
    other_x[60:], other_y[60:] = 20, -20
    np.testing.assert_allclose(errors(other_x, other_y), found, rtol=1e-4)
    # without anything to learn, no setting is better than the mean
    noise = np.random.default_rng(0).normal(size=y.shape)
    assert found.min() < 0.9 < errors(x, noise).min()


def test_a_fold_is_fitted_on_its_training_spots_alone(name: str, d: int) -> None:
    x, y = planted(d)
    fits = fits_of(name, y)
    tried, weights = fits.tried(Inputs(lambda: x)), np.full((1, len(fits.settings)), 1 / len(fits.settings))
    for i, fold in enumerate(FOLDS):
        np.testing.assert_allclose(fits.intercept(i), y[fold.train].mean(axis=0), atol=1e-6)
        other_x, other_y = x.copy(), y.copy()
        other_x[fold.held_out], other_y[fold.held_out] = other_x[fold.held_out] + 3, 50
        others = fits_of(name, other_y)
        fit = others.tried(Inputs(lambda: other_x)).folds[i]  # noqa: B023
        # settings are weighed, and penalties of genes chosen, on all folds: they stay what they were
        one, other = (
            linear_head(of, [tried], weights, [[SOURCE]], [f], fold=i, context_um=None)
            for of, f in ((fits, tried.folds[i]), (others, fit))
        )
        np.testing.assert_allclose(predict(other, x), predict(one, x), atol=1e-3)


def test_errors_are_those_of_the_predictions(name: str, d: int) -> None:
    x, y = planted(d, noise=0.5)
    fits = fits_of(name, y)
    tried = fits.tried(Inputs(lambda: x))
    for i, fold in enumerate(FOLDS):
        nothing = np.square(y[fold.train].mean(axis=0) - y[fold.held_out]).sum()
        for j in {0, len(fits.settings) // 2, len(fits.settings) - 1}:
            head = head_of(fits, x, np.eye(len(fits.settings))[[j]], i)
            error = np.square(predict(head, x[fold.held_out]) - y[fold.held_out]).sum() / nothing
            assert tried.errors[i, j] == pytest.approx(error, rel=1e-3, abs=1e-5)


def test_the_number_of_components_is_the_one_asked_for(name: str, d: int) -> None:
    x, y = planted(d)
    fits = fits_of(name, y, n_components=5)
    assert fits.final(Inputs(lambda: x)).projection.components.shape == (5, d)
    assert all(fit.projection.components.shape == (5, d) for fit in fits.tried(Inputs(lambda: x)).folds)
    assert fits_of(name, y).final(Inputs(lambda: x)).projection.components.shape == (min(256, N - 1, d), d)
    limit = min(N - 1, d)
    with pytest.raises(
        ValueError, match=rf"`n_components={limit + 1}` does not fit {N} training spots with {d} features"
    ):
        fits_of(name, y, n_components=limit + 1).final(Inputs(lambda: x))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_features_that_are_not_finite_are_refused(name: str, d: int, value: float) -> None:
    x, y = planted(d)
    x[3, 5] = value
    which = "some" if d < 60 else "1"  # sums over spots do not know which
    with pytest.raises(ValueError, match=rf"Features of {which} of {N} spots are NaN or infinite"):
        fits_of(name, y).final(Inputs(lambda: x))
    with pytest.raises(ValueError, match=rf"Features of {which} of 60 spots are NaN or infinite"):
        fits_of(name, y).tried(Inputs(lambda: x))


@pytest.fixture(scope="module")
def encoder() -> EncoderNetwork:
    return EncoderNetwork(ROW, TILE_PX)


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, TILE_PX, TILE_PX, 3)).astype(np.uint8)


Make = Callable[..., pk.Adapter]
CPU = {"device": "cpu"}


def test_an_adapter_on_disk_predicts_the_same_bits(
    name: str, encoder: EncoderNetwork, tiles: np.ndarray, put_together: Make, tmp_path: Path
) -> None:
    head = fitted(name, *planted(WIDTH))
    adapter = put_together(encoder, reading=Reading((Member(f"frozen:{name}", 1.0, head),)))
    adapter.save(tmp_path / "mine")
    loaded = pk.Adapter.load(tmp_path / "mine")
    assert [m.name for m in loaded.reading.members] == [f"frozen:{name}"]
    expected = predict(head, adapter.embed(tiles, mpp=1.0, compute=CPU))
    assert np.ptp(expected[:, :-1], axis=0).min() > 0
    one, other = (made.predict(tiles, mpp=1.0, compute=CPU) for made in (adapter, loaded))
    np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(one, expected, atol=1e-5)


def test_with_spatial_context_it_reads_the_neighbours_of_its_section(
    name: str, encoder: EncoderNetwork, tiles: np.ndarray, put_together: Make, tmp_path: Path
) -> None:
    x, y = planted(2 * WIDTH)
    fits = fits_of(name, y)
    weights, inputs = chosen(fits, x), Inputs(lambda: x)
    plain = head_of(fits, x, weights)
    head = linear_head(
        fits, [fits.tried(inputs)], weights, [[SOURCE]], [fits.final(inputs)], fold=None, context_um=150.0
    )
    put_together(encoder, reading=Reading((Member(f"frozen:{name}", 1.0, head),))).save(tmp_path / "mine")
    adapter = pk.Adapter.load(tmp_path / "mine")
    assert adapter.context_um == 150.0
    # two sections in the same place: only their own spots are neighbours
    coords = np.tile(np.column_stack([np.arange(6) * 100.0, np.zeros(6)]), (2, 1))
    section = np.repeat(["A", "B"], 6)
    features = adapter.embed(tiles, mpp=1.0, compute=CPU)
    got = adapter.predict(tiles, mpp=1.0, coords_um=coords, section=section, compute=CPU)
    both = with_context(features, coords, section, 150.0)
    np.testing.assert_allclose(got, predict(plain, both), atol=1e-4)
    near = [[j for j in range(12) if j != i and section[i] == section[j] and abs(i - j) == 1] for i in range(12)]
    by_hand = np.column_stack([features, np.stack([features[j].mean(axis=0) for j in near])])
    np.testing.assert_allclose(got, predict(plain, by_hand), atol=1e-4)
    # one section by default, where the spots in the same place are neighbours as well
    alone = adapter.predict(tiles, mpp=1.0, coords_um=coords, compute=CPU)
    assert np.abs(alone - got).max() > 1e-4
    with pytest.raises(ValueError, match="uses the neighbours within 150 um.*give `coords_um=`"):
        adapter.predict(tiles, mpp=1.0)
    with pytest.raises(ValueError, match=r"`coords_um` must have shape \(12, 2\)"):
        adapter.predict(tiles, mpp=1.0, coords_um=coords[:5])


def test_a_head_that_is_registered_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    class Halved(RidgeFits):
        """A head of another kind, which is half as sure as ridge."""

        def _coef(self, *args: Any) -> np.ndarray:
            return super()._coef(*args) / 2

    monkeypatch.setattr(HEADS, "_rows", dict(HEADS))
    HEADS.register("halved", Halved)
    x, y = planted(12)
    mean = y.mean(axis=0)
    np.testing.assert_allclose(predict(fitted("halved", x, y), x), (predict(fitted("ridge", x, y), x) + mean) / 2,
                               atol=1e-4)  # fmt: skip


def test_a_name_that_is_taken() -> None:
    before = HEADS["ridge"]
    with pytest.raises(ValueError, match=r"The head 'ridge' is there already \(.*RidgeFits.*\): take another name"):
        HEADS.register("ridge", HEADS["ridge-per-gene"])
    assert HEADS["ridge"] is before


def test_a_name_that_is_not_there() -> None:
    match = (
        r"`head='rigde'` is not known. Close names: ridge.* Choose one of \['ridge', 'ridge-per-gene', 'low-rank'\]\."
    )
    with pytest.raises(ValueError, match=match):
        check_head("rigde")
    with pytest.raises(ValueError, match=r"`head=\['ridge'\]` is not known"):
        check_head(["ridge"])  # type: ignore[arg-type]
