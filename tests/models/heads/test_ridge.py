"""The expression head against scikit-learn, and its errors in closed form against the direct ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pekasc.models.heads import _moments
from pekasc.models.heads._moments import Moments, moments
from pekasc.models.heads._projection import n_components_for, projection_of_rows
from pekasc.models.heads._ridge import ALPHAS, RidgeFit, alpha_per_gene, fit_folds, fit_ridge
from pekasc.models.selection._folds import InnerFold


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (80, 12)) @ rng.normal(size=(12, 12))
    y = np.maximum(0, x @ rng.normal(size=(12, 7)) * 0.1 + rng.normal(size=(80, 7)))
    return x[:60].astype(np.float32), y[:60], x[60:].astype(np.float32), y[60:]


def _predicted(fit: RidgeFit, alpha: float | np.ndarray, x: np.ndarray) -> np.ndarray:
    return fit.projection(x) @ fit.coef(alpha) + fit.intercept


def _scores(fit: RidgeFit, x: np.ndarray, y: np.ndarray) -> Moments:
    return moments(fit.projection(x), y)


@pytest.mark.parametrize("alpha", [1e-2, 0.7, 100.0])
@pytest.mark.parametrize("k", [4, 12])
def test_head_is_sklearns_ridge(data: tuple[np.ndarray, ...], alpha: float, k: int) -> None:
    x, y, x_new, _ = data
    fit = fit_ridge(x, y, k)
    # sklearn's penalty is on the sum of squares, ours on their mean
    reference = make_pipeline(StandardScaler(), PCA(k, svd_solver="full"), Ridge(alpha=alpha * len(x)))
    reference.fit(x.astype(np.float64), y)
    np.testing.assert_allclose(
        _predicted(fit, alpha, x_new), reference.predict(x_new.astype(np.float64)), rtol=0, atol=1e-8
    )
    # the same as one linear map of the standardised features: free of the signs of components
    theirs = reference[1].components_.T @ reference[2].coef_.T
    np.testing.assert_allclose(fit.projection.components.T @ fit.coef(alpha), theirs, rtol=0, atol=1e-8)


def test_errors_in_closed_form_are_the_direct_ones(data: tuple[np.ndarray, ...]) -> None:
    x, y, x_new, y_new = data
    fit = fit_ridge(x, y, 6)
    direct = [np.square(y_new - fit.projection(x_new) @ fit.coef(a) - fit.intercept).sum(axis=0) for a in ALPHAS]
    np.testing.assert_allclose(fit.errors(_scores(fit, x_new, y_new), ALPHAS), direct, rtol=1e-9)


def test_infinite_penalty_is_the_mean_predictor(data: tuple[np.ndarray, ...]) -> None:
    x, y, x_new, y_new = data
    fit = fit_ridge(x, y)
    error = fit.errors(_scores(fit, x_new, y_new), [np.inf])[0]
    np.testing.assert_allclose(error, np.square(y_new - y.mean(axis=0)).sum(axis=0), rtol=1e-9)


@pytest.mark.parametrize("limit", [0.0, 2.0])
def test_sparse_expression_gives_the_same_as_dense(
    data: tuple[np.ndarray, ...], limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_moments, "_DENSE", limit)  # products of a chunk made dense, and sparse ones
    x, y, x_new, y_new = data
    dense, thin = fit_ridge(x, y), fit_ridge(x, sparse.csr_matrix(y))
    np.testing.assert_allclose(thin.coef(1.0), dense.coef(1.0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        thin.errors(_scores(thin, x_new, sparse.csr_matrix(y_new)), ALPHAS),
        dense.errors(_scores(dense, x_new, y_new), ALPHAS),
        rtol=1e-9,
    )


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix])
def test_single_precision_expression_is_summed_in_double(kind: type) -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(30_000, 3)), (rng.random((30_000, 2)) + 8).astype(np.float32)
    exact = y.astype(np.float64)
    fit, reference = fit_ridge(x, kind(y)), fit_ridge(x, exact)
    np.testing.assert_allclose(fit.intercept, exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(
        fit.errors(_scores(fit, x, kind(y)), [1.0]), reference.errors(_scores(reference, x, exact), [1.0]), rtol=1e-8
    )


def test_constant_features_change_nothing(data: tuple[np.ndarray, ...]) -> None:
    x, y, x_new, _ = data

    def widened(a: np.ndarray) -> np.ndarray:
        return np.column_stack([a, np.full(len(a), 5.3, dtype=np.float32)])

    plain = _predicted(fit_ridge(x, y, 5), 1.0, x_new)
    np.testing.assert_allclose(_predicted(fit_ridge(widened(x), y, 5), 1.0, widened(x_new)), plain, atol=1e-5)


def test_number_of_components_adapts_and_explicit_ones_must_fit() -> None:
    assert n_components_for(1000, 512, None) == 256
    assert n_components_for(50, 512, None) == 49
    assert n_components_for(1000, 20, None) == 20
    assert n_components_for(50, 512, 49) == 49
    with pytest.raises(ValueError, match=r"`n_components=50` does not fit 50 training spots .*1 to 49"):
        n_components_for(50, 512, 50)
    with pytest.raises(ValueError, match="n_components=0"):
        n_components_for(50, 512, 0)


@pytest.mark.parametrize("d", [12, 70])  # fewer features than spots (from moments), and more (from rows)
@pytest.mark.parametrize("margin", [0, 5])
def test_folds_are_fits_on_their_training_spots(d: int, margin: int) -> None:
    rng = np.random.default_rng(4)
    x = (rng.normal(50, 2, (90, d)) @ rng.normal(size=(d, d))).astype(np.float32)
    y = np.maximum(0, rng.normal(size=(90, 7)) + (x[:, :1] - x[:, :1].mean()) / x[:, :1].std())
    folds = [
        InnerFold(np.setdiff1d(np.arange(90), np.arange(max(0, a - margin), min(90, a + 30 + margin))),
                  np.arange(a, a + 30), str(a))
        for a in (0, 30, 60)
    ]  # fmt: skip
    for fold, got in zip(folds, fit_folds(x, y, folds, 6), strict=True):
        reference = make_pipeline(StandardScaler(), PCA(6, svd_solver="full"), Ridge(alpha=0.3 * len(fold.train)))
        reference.fit(x[fold.train].astype(np.float64), y[fold.train])
        expected = reference.predict(x[fold.held_out].astype(np.float64))
        np.testing.assert_allclose(_predicted(got.fit, 0.3, x[fold.held_out]), expected, atol=1e-4)
        errors = np.square(expected - y[fold.held_out]).sum(axis=0)
        np.testing.assert_allclose(got.fit.errors(got.held_out, [0.3])[0], errors, rtol=1e-6)
        mean = np.square(y[fold.train].mean(axis=0) - y[fold.held_out]).sum()
        np.testing.assert_allclose(got.relative_errors([0.3]), errors.sum() / mean, rtol=1e-6)
        per_gene = got.fit.errors(got.held_out, [*ALPHAS, np.inf])
        np.testing.assert_allclose(got.fit.total_errors(got.held_out, [*ALPHAS, np.inf]), per_gene.sum(axis=1))


def test_a_penalty_per_gene_is_the_best_of_each_on_held_out_spots(data: tuple[np.ndarray, ...]) -> None:
    x, y, *_ = data
    y = np.column_stack([y, np.random.default_rng(5).normal(size=len(y))])
    folds = [
        InnerFold(np.setdiff1d(np.arange(60), np.arange(a, a + 20)), np.arange(a, a + 20), str(a)) for a in (0, 20, 40)
    ]
    alphas = alpha_per_gene(fit_folds(x, y, folds, 5))
    errors = np.zeros((len(ALPHAS), y.shape[1]))
    for fold in folds:
        for i, alpha in enumerate(ALPHAS):
            model = make_pipeline(StandardScaler(), PCA(5, svd_solver="full"), Ridge(alpha=alpha * len(fold.train)))
            guess = model.fit(x[fold.train].astype(float), y[fold.train]).predict(x[fold.held_out].astype(float))
            errors[i] += np.square(guess - y[fold.held_out]).sum(axis=0)
    np.testing.assert_array_equal(alphas, ALPHAS[errors.argmin(axis=0)])
    fit = fit_ridge(x, y, 5)
    for gene in (0, -1):
        one = _predicted(fit, float(alphas[gene]), x)[:, gene]
        np.testing.assert_allclose(_predicted(fit, alphas, x)[:, gene], one, rtol=1e-6)


@pytest.mark.parametrize("n", [12, 40])
def test_the_projection_is_sklearns(n: int) -> None:
    x = np.random.default_rng(0).normal(size=(n, 60)) * np.linspace(3, 0.01, 60)
    mine = projection_of_rows(x, 9)
    pca = PCA(9, svd_solver="full").fit((x - x.mean(axis=0)) / x.std(axis=0))
    np.testing.assert_allclose(np.abs(mine.components), np.abs(pca.components_), atol=1e-10)


def test_spots_that_repeat_have_no_score_in_directions_that_are_not_there() -> None:
    x = np.repeat(np.random.default_rng(0).normal(size=(5, 60)), 4, axis=0)
    projection = projection_of_rows(x, 19)
    assert np.isfinite(projection.components).all()
    np.testing.assert_allclose(projection.components[4:], 0)
    np.testing.assert_allclose(projection.components[:4] @ projection.components[:4].T, np.eye(4), atol=1e-10)


@pytest.mark.parametrize("n", [30, 200])  # fewer spots than features (from rows), and more (from moments)
@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix])
def test_weights_count_a_spot_several_times(n: int, kind: type) -> None:
    rng = np.random.default_rng(6)
    x = (rng.normal(size=(n, 40)) @ rng.normal(size=(40, 40))).astype(np.float32)
    y = np.maximum(0, rng.normal(size=(n, 5)) + x[:, :1] / 5)
    times = rng.integers(1, 4, n)
    weighted = fit_ridge(x, kind(y), 8, weights=times.astype(float))
    repeated = fit_ridge(np.repeat(x, times, axis=0), np.repeat(y, times, axis=0), 8)
    np.testing.assert_allclose(_predicted(weighted, 0.5, x), _predicted(repeated, 0.5, x), atol=1e-6)
    assert np.abs(_predicted(weighted, 0.5, x) - _predicted(fit_ridge(x, y, 8), 0.5, x)).max() > 1e-2


@pytest.mark.parametrize("d", [12, 70])
def test_weights_of_folds_are_those_of_their_spots(d: int) -> None:
    rng = np.random.default_rng(7)
    x, weights = rng.normal(size=(60, d)).astype(np.float32), rng.uniform(0.1, 2, 60)
    y = rng.normal(size=(60, 3)) + x[:, :3]
    # spots 30 to 39 are of the margin
    fold = InnerFold(np.arange(40, 60), np.arange(30), "a")
    (got,) = fit_folds(x, y, [fold], 5, weights)
    by_hand = fit_ridge(x[fold.train], y[fold.train], 5, weights=weights[fold.train])
    predicted = _predicted(by_hand, 0.4, x[fold.held_out])
    np.testing.assert_allclose(_predicted(got.fit, 0.4, x[fold.held_out]), predicted, atol=1e-5)
    errors = weights[fold.held_out] @ np.square(predicted - y[fold.held_out])
    np.testing.assert_allclose(got.fit.errors(got.held_out, [0.4])[0], errors, rtol=1e-5)


# each process has other features, as if it rounded otherwise
TWO = """
import sys
import numpy as np, torch.distributed as dist
from pekasc.models.heads import Inputs, Target, head_fits
from pekasc.models.selection import InnerFold
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
rng = np.random.default_rng(rank)
x = rng.normal(size=(60, 8)).astype(np.float32)
y = x @ rng.normal(size=(8, 12)) + 10.0 ** np.arange(-3, 3, 0.5) * rng.normal(size=(60, 12))
folds = [InnerFold(np.arange(30), np.arange(30, 60), "a"), InnerFold(np.arange(30, 60), np.arange(30), "b")]
print(*head_fits("ridge-per-gene", Target(y, folds), None).tried(Inputs(lambda: x)).alphas)
"""


def test_penalties_per_gene_are_those_of_the_first_process(tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", TWO, str(rank), str(tmp_path / "meeting")],
            stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    first, second = (process.communicate(timeout=300)[0] for process in started)
    assert [process.returncode for process in started] == [0, 0]
    assert len(set(first.split())) > 1 and first == second
