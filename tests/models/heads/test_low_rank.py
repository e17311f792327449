"""The low-rank head against numpy's SVD and brute force: components, loadings, and held-out errors in closed form."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from pekasc.models.heads import _genes
from pekasc.models.heads._fits import Inputs, RidgeFits, Target, Tried
from pekasc.models.heads._genes import gene_space, loadings
from pekasc.models.heads._linear import Source
from pekasc.models.heads._low_rank import LowRankFits, ranks_for
from pekasc.models.heads._registry import linear_head
from pekasc.models.heads._ridge import ALPHAS
from pekasc.models.selection._folds import InnerFold

N, EVERY, WANTED, K = 54, 14, [1, 3, 8], 6
# a margin of three spots belongs to neither side
FOLDS = [
    InnerFold(np.setdiff1d(np.arange(N), np.arange(a, min(N, a + 21))), np.arange(a, a + 18), f"P{a}")
    for a in range(0, N, 18)
]
SOURCE = Source("frozen", 0, (1,))
KINDS = pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix], ids=["dense", "sparse"])


def planted(d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features (N, d), expression of all genes (N, EVERY) that follow three of their directions, and weights."""
    rng = np.random.default_rng(seed)
    state = rng.normal(size=(N, 3))
    x = 4 + state @ rng.normal(size=(3, d)) + rng.normal(size=(N, d))
    y = np.maximum(0, state @ rng.normal(size=(3, EVERY)) + rng.normal(size=(N, EVERY)))
    return x.astype(np.float32), y, rng.uniform(0.05, 1, N)


def by_svd(y: np.ndarray, weights: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the weighted mean of genes and the first axes of a weighted PCA, (genes, rank)."""
    mean = np.average(y, axis=0, weights=weights)
    return mean, np.linalg.svd(np.sqrt(weights)[:, None] * (y - mean))[2][:rank].T


def by_hand(
    x: np.ndarray, y: np.ndarray, every: np.ndarray, weights: np.ndarray, rank: int, alpha: float, new: np.ndarray
) -> np.ndarray:
    """Fit a low-rank head with least squares alone, and predict `y` for other features."""
    total = weights.sum()
    centre = np.average(x, axis=0, weights=weights)
    scale = np.sqrt(np.average((x - centre) ** 2, axis=0, weights=weights))
    z = (x - centre) / scale
    axes = np.linalg.svd(np.sqrt(weights)[:, None] * z, full_matrices=False)[2][:K].T
    scores = z @ axes
    mean, genes = by_svd(every, weights, rank)
    components = (every - mean) @ genes
    w = weights[:, None]
    coef = np.linalg.solve(scores.T @ (w * scores) / total + alpha * np.eye(K), scores.T @ (w * components) / total)
    own = np.average(y, axis=0, weights=weights)
    load = np.linalg.lstsq(np.sqrt(w) * components, np.sqrt(w) * (y - own), rcond=None)[0]
    return own + ((new - centre) / scale @ axes) @ coef @ load


def fits_of(d: int, kind: Any, *, weighted: bool, rank: int | None = None) -> LowRankFits:
    _, y, weights = planted(d)
    target = Target(kind(y[:, WANTED]), FOLDS, kind(y), weights if weighted else None, rank)
    return LowRankFits(target, K)


def inputs_of(d: int, *, shared: bool) -> tuple[Inputs, list[np.ndarray]]:
    """Return inputs of a head, and those of every fold: the same, or of features that differ between folds."""
    x = planted(d)[0]
    each = [x if shared else planted(d, seed=9 + i)[0] * 0.3 + x for i in range(len(FOLDS))]
    return Inputs(lambda: x, None if shared else each.__getitem__), each


def head_of(fits: Any, tried: Tried, fit: Any, weights: np.ndarray, fold: int | None) -> Any:
    return linear_head(fits, [tried], weights[None], [[SOURCE]], [fit], fold=fold, context_um=None)


@KINDS
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize("d", [9, 70], ids=["more spots than features", "fewer spots than features"])
@pytest.mark.parametrize("shared", [True, False], ids=["one input", "inputs of every fold"])
def test_errors_in_closed_form_are_those_of_predictions(kind: Any, weighted: bool, d: int, shared: bool) -> None:
    _, every, weights = planted(d)
    y, weights = every[:, WANTED], weights if weighted else np.ones(N)
    fits = fits_of(d, kind, weighted=weighted)
    inputs, each = inputs_of(d, shared=shared)
    tried = fits.tried(inputs)
    assert fits.ranks == (1, 2, 3, 5, 8, 12)
    assert fits.settings == [(rank, float(alpha)) for rank in fits.ranks for alpha in ALPHAS]
    for i, fold in enumerate(FOLDS):
        a, b, w = fold.train, fold.held_out, weights[fold.held_out]
        mean = np.average(y[a], axis=0, weights=weights[a])
        nothing = (w @ np.square(y[b] - mean)).sum()
        for number, (rank, alpha) in enumerate(fits.settings):
            assert rank is not None
            predicted = by_hand(each[i][a], y[a], every[a], weights[a], rank, alpha, each[i][b])
            expected = (w @ np.square(y[b] - predicted)).sum() / nothing
            assert tried.errors[i, number] == pytest.approx(expected, rel=2e-4), (fold.name, rank, alpha)
            if number % 11 == 0:
                one = np.eye(len(fits.settings))[number]
                head = head_of(fits, tried, tried.folds[i], one, i)
                got = head.expression(head.scores({SOURCE: each[i][b]}))
                np.testing.assert_allclose(got, predicted, atol=2e-3)


@KINDS
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize("d", [9, 70])
def test_the_final_fit_is_that_of_all_spots(kind: Any, weighted: bool, d: int) -> None:
    x, every, weights = planted(d)
    y, weights = every[:, WANTED], weights if weighted else np.ones(N)
    fits = fits_of(d, kind, weighted=weighted)
    inputs, _ = inputs_of(d, shared=True)
    tried, final = fits.tried(inputs), fits.final(inputs)
    for number in (3, 40, len(fits.settings) - 1):
        rank, alpha = fits.settings[number]
        assert rank is not None
        head = head_of(fits, tried, final, np.eye(len(fits.settings))[number], None)
        got = head.expression(head.scores({SOURCE: x}))
        np.testing.assert_allclose(got, by_hand(x, y, every, weights, rank, alpha, x), atol=2e-3)
    np.testing.assert_allclose(fits.intercept(None), np.average(y, axis=0, weights=weights), atol=1e-6)
    np.testing.assert_allclose(
        fits.intercept(1), np.average(y[FOLDS[1].train], axis=0, weights=weights[FOLDS[1].train]), atol=1e-6
    )


def test_a_fold_never_reads_what_its_held_out_spots_express() -> None:
    x, every, weights = planted(9)
    for fold in range(len(FOLDS)):
        found = []
        for held_out in (every[FOLDS[fold].held_out], 50.0):
            changed = every.copy()
            changed[FOLDS[fold].held_out] = held_out
            fits = LowRankFits(Target(changed[:, WANTED], FOLDS, changed, weights), K)
            tried = fits.tried(Inputs(lambda: x))
            head = head_of(fits, tried, tried.folds[fold], np.ones(len(fits.settings)) / len(fits.settings), fold)
            found.append(head.expression(head.scores({SOURCE: x})))
        np.testing.assert_allclose(found[0], found[1], atol=1e-4)


@pytest.mark.parametrize("d", [9, 70])
def test_at_full_rank_it_is_ridge(d: int) -> None:
    x, every, _ = planted(d)
    low = LowRankFits(Target(every, FOLDS, rank=EVERY), K)
    ridge = RidgeFits(Target(every, FOLDS), K)
    inputs = Inputs(lambda: x)
    one, other = low.tried(inputs), ridge.tried(inputs)
    assert low.settings == [(EVERY, float(alpha)) for alpha in ALPHAS]
    np.testing.assert_allclose(one.errors, other.errors, rtol=1e-4)
    weights = np.full(len(ALPHAS), 1 / len(ALPHAS))
    ours, theirs = (
        head_of(low, one, low.final(inputs), weights, None),
        head_of(ridge, other, ridge.final(inputs), weights, None),
    )
    features = {SOURCE: x}
    np.testing.assert_allclose(
        ours.expression(ours.scores(features)), theirs.expression(theirs.scores(features)), atol=1e-3
    )


BRANCHES = pytest.mark.parametrize(
    ("n", "exact"), [(10, 4096), (60, 4096), (10, 4), (60, 4)], ids=["spots", "genes", "few spots", "few genes"]
)


@KINDS
@BRANCHES
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
def test_components_are_those_of_a_weighted_pca(
    kind: Any, n: int, exact: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_genes, "_EXACT", exact)
    rng = np.random.default_rng(1)
    y = np.maximum(0, rng.normal(0.5, 1, (n, 20)) * np.linspace(6, 0.5, 20))
    weights = rng.uniform(0.05, 1, n) if weighted else np.ones(n)
    space = gene_space(kind(y), 4, weights if weighted else None)
    mean, axes = by_svd(y, weights, 4)
    np.testing.assert_allclose(space.mean, mean, atol=1e-10)
    # the sign of a component is free
    signs = np.sign(np.einsum("gr,gr->r", space.axes, axes))
    np.testing.assert_allclose(space.axes * signs, axes, atol=1e-4 if exact < 20 else 1e-8)
    np.testing.assert_allclose(space.scores(kind(y)) * signs, (y - mean) @ axes, atol=1e-3 if exact < 20 else 1e-8)
    if weighted:
        assert np.abs(by_svd(y, np.ones(n), 4)[1] - axes).max() > 1e-2


@KINDS
@pytest.mark.parametrize("shape", [(200, 300), (300, 200)], ids=["wide", "long"])
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
def test_components_of_large_matrices_are_those_of_a_weighted_pca(
    kind: Any, shape: tuple[int, int], weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_genes, "_EXACT", 4)
    monkeypatch.setattr(_genes, "_ROWS", 64)
    rng = np.random.default_rng(1)
    n, n_genes = shape
    # eight components, the weakest of which hardly stands out of the noise
    y = rng.normal(size=(n, 8)) * np.linspace(6, 0.5, 8) @ rng.normal(size=(8, n_genes))
    y = np.maximum(0, y + rng.normal(1, 1, shape))
    weights = rng.uniform(0.05, 1, n) if weighted else np.ones(n)
    space = gene_space(kind(y), 4, weights if weighted else None)
    mean, axes = by_svd(y, weights, 4)
    np.testing.assert_allclose(space.mean, mean, atol=1e-10)
    signs = np.sign(np.einsum("gr,gr->r", space.axes, axes))
    np.testing.assert_allclose(space.axes * signs, axes, atol=1e-5)
    np.testing.assert_allclose(space.axes.T @ space.axes, np.eye(4), atol=1e-10)


def test_large_matrices_of_low_rank_have_their_components(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_genes, "_EXACT", 4)
    rng = np.random.default_rng(0)
    y = rng.normal(size=(250, 3)) @ rng.normal(size=(3, 220))
    space = gene_space(y, 5)
    np.testing.assert_allclose(space.axes.T @ space.axes, np.eye(5), atol=1e-8)
    np.testing.assert_allclose(space.scores(y) @ space.axes.T + space.mean, y, atol=1e-4)
    assert np.abs(space.scores(y)[:, 3:]).max() < 1e-4


@pytest.mark.parametrize("n", [10, 60])
def test_the_largest_rank_there_is(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_genes, "_EXACT", 4)
    y = np.random.default_rng(0).normal(size=(n, 9))
    space = gene_space(y, 9, None)
    np.testing.assert_allclose(space.axes.T @ space.axes, np.eye(9), atol=1e-8)
    np.testing.assert_allclose(space.scores(y) @ space.axes.T + space.mean, y, atol=1e-8)


def test_genes_that_do_not_vary_have_no_component() -> None:
    y = np.zeros((12, 30))
    y[:, 0] = np.arange(12)
    for weights in (None, np.linspace(0.1, 1, 12)):
        space = gene_space(y, 3, weights)
        assert np.isfinite(space.axes).all()
        np.testing.assert_allclose(np.abs(space.axes[:, 0]), np.eye(30)[0], atol=1e-8)
        _, loading = loadings(space.scores(y), y, weights)
        assert np.isfinite(loading).all()
        np.testing.assert_allclose(space.scores(y)[:, :1] @ loading[:1], y - space.mean, atol=1e-6)


@KINDS
@pytest.mark.parametrize("weighted", [False, True])
def test_loadings_of_a_gene_that_is_none_of_the_components(kind: Any, weighted: bool) -> None:
    rng = np.random.default_rng(2)
    every, w = rng.normal(2, 1, (40, 15)), rng.uniform(0.1, 1, 40)
    weights = w if weighted else None
    scores = gene_space(every, 5, weights).scores(every)
    other = np.maximum(0, scores[:, :2] @ np.array([[1.0, 0.0], [2.0, 0.0]]) + 0.3 * rng.normal(size=(40, 2)))
    mean, found = loadings(scores, kind(other), weights)
    root = np.sqrt(w if weighted else np.ones(40))[:, None]
    design = np.column_stack([np.ones(40), scores])
    expected = np.linalg.lstsq(root * design, root * other, rcond=None)[0]
    np.testing.assert_allclose(found, expected[1:], atol=1e-8)
    np.testing.assert_allclose(mean, expected[0], atol=1e-8)


def test_wanted_genes_need_not_be_among_the_expressed() -> None:
    x, every, weights = planted(9)
    fits = LowRankFits(Target(every[:, :2], FOLDS, every[:, 2:], weights), K)
    inputs = Inputs(lambda: x)
    head = head_of(fits, fits.tried(inputs), fits.final(inputs), np.eye(len(fits.settings))[-16], None)
    rank, alpha = fits.settings[-16]
    assert rank is not None
    want = by_hand(x, every[:, :2], every[:, 2:], weights, rank, alpha, x)
    np.testing.assert_allclose(head.expression(head.scores({SOURCE: x})), want, atol=2e-3)


def test_ranks_that_fit() -> None:
    assert ranks_for(1000, 5000, None) == (1, 2, 3, 5, 8, 12, 20, 40)
    assert ranks_for(9, 5000, None) == (1, 2, 3, 5, 8)
    assert ranks_for(1000, 4, None) == (1, 2, 3)
    assert ranks_for(1000, 4, 4) == (4,)
    for n_spots, n_genes, limit in ((10, 50, 9), (50, 10, 10)):
        message = (
            f"`head_rank={limit + 1}` does not fit {n_spots} training spots with {n_genes} expressed genes: give 1 to "
            f"{limit}, or None to try several."
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            ranks_for(n_spots, n_genes, limit + 1)
        assert ranks_for(n_spots, n_genes, limit) == (limit,)
    with pytest.raises(ValueError, match=rf"`head_rank={EVERY + 1}` does not fit 33 training spots with {EVERY} expr"):
        fits_of(9, np.asarray, weighted=False, rank=EVERY + 1)
    # of all genes, and not of the wanted ones alone
    assert fits_of(9, np.asarray, weighted=False, rank=EVERY).ranks == (EVERY,)


def test_components_without_variance_have_no_loading() -> None:
    # redundant columns: what is left of the last components is rounding noise, by which a regression would divide
    y = np.random.default_rng(0).normal(3, 1, (60, 5)).astype(np.float32)
    y[:, 3], y[:, 4] = y[:, 0], y[:, 1]
    scores = gene_space(y, 5).scores(y)
    _, found = loadings(scores, y)
    assert (found[3:] == 0).all() and (np.abs(found[:3]).max(axis=1) > 0.1).all()
    np.testing.assert_allclose(scores @ found, y - y.mean(axis=0, dtype=np.float64), atol=1e-5)
    assert (loadings(np.zeros((60, 2)), y)[1] == 0).all()


@KINDS
def test_spots_that_vary_along_few_axes_have_no_more_components(kind: Any) -> None:
    """With fewer spots than genes, as of columns that repeat each other; more components than axes change nothing."""
    rng = np.random.default_rng(0)
    y = rng.poisson(2, (4, 50)).astype(np.float32)[rng.integers(0, 4, 20)]
    scores = gene_space(kind(y), 12).scores(kind(y))
    mean, loading = loadings(scores, kind(y))
    for rank in (3, 5, 12):
        np.testing.assert_allclose(scores[:, :rank] @ loading[:rank] + mean, y, atol=1e-4)
