"""Heads where sections measured different genes, against fits on the sections that measured them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import sparse

from pekasc._panels import Panels, same_panel
from pekasc.models.heads import ALPHAS, Inputs, LinearHead, Source, Target, head_fits, linear_head
from pekasc.models.heads._genes import gene_space, loadings, panel_loadings
from pekasc.models.heads._linear import beside, linear_block
from pekasc.models.selection._choice import choose, held_out_errors, mean_error
from pekasc.models.selection._folds import InnerFold

N, GENES, WIDTH = 120, 16, 6
SOURCE = Source("frozen", 0, (1,))
SECTION = np.repeat([0, 1, 2], N // 3)
# genes 12, 13 in sections 0 and 1; 14 in sections 1 and 2; 15 in section 0 alone
MEASURED = np.ones((3, GENES), dtype=bool)
MEASURED[2, [12, 13]] = MEASURED[0, 14] = MEASURED[1:, 15] = False
PANELS = Panels(SECTION, MEASURED)
FOLDS = [InnerFold(np.flatnonzero(i != SECTION), np.flatnonzero(i == SECTION), str(i)) for i in range(3)]
# sections of two panels held out together
TWO = [InnerFold(np.flatnonzero(SECTION == 1), np.flatnonzero(SECTION != 1), "0+2"), FOLDS[1]]


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(2, 1, (N, WIDTH))
    y = x @ rng.normal(size=(WIDTH, 3)) @ rng.normal(size=(3, GENES)) + 0.3 * rng.normal(size=(N, GENES)) + 2
    return x.astype(np.float32), y


def _target(y: np.ndarray, folds: list[InnerFold] = FOLDS, weights: Any = None, panels: Any = PANELS) -> Target:
    y = y if panels is None else panels.masked(y)
    return Target(y, folds, every=y[:, :12], weights=weights, panels=panels)


def _head(fits: Any, inputs: Inputs, setting: int, fold: int | None) -> LinearHead:
    tried = fits.tried(inputs)
    weights = np.zeros((1, len(fits.settings)))
    weights[0, setting] = 1
    fitted = fits.final(inputs) if fold is None else tried.folds[fold]
    return linear_head(fits, [tried], weights, [[SOURCE]], [fitted], fold=fold, context_um=None)


def _predicted(head: LinearHead, x: np.ndarray) -> np.ndarray:
    return head.expression(head.scores({SOURCE: x}))


def test_patterns_are_genes_of_the_same_spots() -> None:
    found = {tuple(genes): tuple(np.unique(SECTION[rows])) for genes, rows in PANELS.patterns()}
    assert found == {tuple(range(12)): (0, 1, 2), (12, 13): (0, 1), (14,): (1, 2), (15,): (0,)}
    assert PANELS.shared.sum() == 12 and PANELS.n_spots()[[0, 12, 15]].tolist() == [N, 80, 40]
    # without the genes in which they differ, panels are one
    assert len(PANELS.columns(np.arange(12)).genes) == 1
    rows = np.array([0, 119])
    assert PANELS.take(rows).of(np.array([1]), [12, 14]).tolist() == [[False, True]]


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix])
def test_what_was_not_measured_is_0(kind: Any, data: tuple[np.ndarray, np.ndarray]) -> None:
    y = data[1]
    found = PANELS.masked(kind(y))
    found = found.toarray() if sparse.issparse(found) else found
    np.testing.assert_array_equal(found, np.where(MEASURED[SECTION], y, 0))
    assert y[119, 12] != 0  # what was given stays


@pytest.mark.parametrize("folds", [FOLDS, TWO], ids=["one panel a fold", "two"])
@pytest.mark.parametrize("per_fold", [False, True])
@pytest.mark.parametrize("wide", [False, True], ids=["more spots", "more features"])
@pytest.mark.parametrize("head", ["ridge", "ridge-per-gene", "low-rank"])
def test_held_out_errors_are_over_what_was_measured(
    data: tuple[np.ndarray, np.ndarray], head: str, wide: bool, per_fold: bool, folds: list[InnerFold]
) -> None:
    x, y = data
    if wide:
        x = np.concatenate([x, np.random.default_rng(1).normal(size=(N, 150)).astype(np.float32)], axis=1)
    weights = np.random.default_rng(2).uniform(0.2, 1, N) if head == "low-rank" else None
    inputs = Inputs(lambda: x, (lambda fold: x) if per_fold else None)
    fits = head_fits(head, _target(y, folds, weights), None)
    tried = fits.tried(inputs)
    w = np.ones(N) if weights is None else weights
    for i, fold in enumerate(folds):
        learned = np.array([(MEASURED[SECTION[fold.train], g]).sum() >= 10 for g in range(GENES)])
        known = MEASURED[SECTION[fold.held_out]] & learned
        for setting in {0, len(fits.settings) // 2, len(fits.settings) - 1}:
            made = _head(fits, inputs, setting, i)
            errors = np.square(_predicted(made, x[fold.held_out]) - y[fold.held_out])
            mean = np.square(made.intercept - y[fold.held_out])
            expected = (w[fold.held_out] @ (errors * known)).sum() / (w[fold.held_out] @ (mean * known)).sum()
            assert tried.errors[i, setting] == pytest.approx(expected, rel=1e-4)
        # a gene that no training section measured is constant
        assert np.ptp(_predicted(made, x)[:, ~learned], axis=0).max(initial=0) == 0


@pytest.mark.parametrize("head", ["ridge", "low-rank"])
def test_a_gene_is_learned_from_the_sections_that_measured_it(data: tuple[np.ndarray, np.ndarray], head: str) -> None:
    x, y = data
    inputs = Inputs(lambda: x)
    fits, full = (head_fits(head, _target(y, panels=panels), None) for panels in (PANELS, None))
    # the largest rank, the smallest penalty
    setting = len(fits.settings) - len(ALPHAS) if head == "low-rank" else 0
    found = _predicted(_head(fits, inputs, setting, None), x)
    everywhere = _predicted(_head(full, inputs, setting, None), x)
    # genes of all sections are as without panels
    np.testing.assert_allclose(found[:, :12], everywhere[:, :12], rtol=1e-4, atol=1e-4)
    # what section 2 would have measured of gene 12 does not matter
    other = y.copy()
    other[SECTION == 2, 12] += 1000
    again = _predicted(_head(head_fits(head, _target(other), None), inputs, setting, None), x)
    np.testing.assert_array_equal(again, found)
    if head == "ridge":
        rows = np.flatnonzero(SECTION < 2)
        alone = head_fits("ridge", Target(y[rows][:, [12, 13]], [FOLDS[0]]), None)
        fit = alone.final(Inputs(lambda: x[rows]))
        expected = (x - fit.projection.mean) / fit.projection.scale @ fit.projection.components.T @ fit.coef(1e-2)
        np.testing.assert_allclose(found[:, [12, 13]], expected + fit.intercept, rtol=1e-4, atol=1e-4)
    # zeros are not learned: means are those of the sections that measured a gene
    assert np.abs(found[:, 15] - y[:, 15]).mean() < 0.8 * np.abs(y[:, 15] - y[:, 15].mean()).mean()


def test_loadings_of_some_spots_are_a_regression(data: tuple[np.ndarray, np.ndarray]) -> None:
    _, y = data
    weights = np.random.default_rng(3).uniform(0.2, 1, N)
    scores = gene_space(y[:, :12], 4, weights).scores(y[:, :12])
    mean, found = panel_loadings(scores, PANELS.masked(y), PANELS, weights)
    rows = SECTION == 0
    root = np.sqrt(weights[rows])[:, None]
    design = np.column_stack([np.ones(rows.sum()), scores[rows]])
    expected = np.linalg.lstsq(design * root, y[rows][:, [15]] * root, rcond=None)[0][:, 0]
    np.testing.assert_allclose([mean[15], *found[:, 15]], expected, rtol=1e-6)
    whole = loadings(scores, y[:, :12], weights)
    np.testing.assert_allclose(mean[:12], whole[0])
    np.testing.assert_allclose(found[:, :12], whole[1])
    # too few spots
    few = Panels(np.r_[np.ones(5, dtype=int), np.zeros(N - 5, dtype=int)], np.array([[True, False], [True, True]]))
    mean, found = panel_loadings(scores, y[:, :2], few)
    assert mean[1] == 0 and not found[:, 1].any() and mean[0] != 0


def test_blocks_beside_each_other_with_context() -> None:
    rng = np.random.default_rng(0)
    x, near = rng.normal(3, 1, (5, 4)).astype(np.float32), rng.normal(3, 1, (5, 4)).astype(np.float32)
    parts, expected = [], np.zeros((5, 5))
    for genes in (np.array([0, 3]), np.array([1, 2])):
        matrix, mean, out = rng.normal(size=(8, 2)), rng.normal(3, 1, 8), rng.normal(size=(2, 2))
        parts.append((linear_block(matrix, mean, out, [SOURCE], context=True), genes))
        expected[:, genes] = (np.column_stack([x, near]) - mean) @ matrix @ out
    head = LinearHead((beside(parts, 5),), np.zeros(5), 100.0)
    scores = head.scores({SOURCE: x}) + head.scores({SOURCE: near}, around=True)
    np.testing.assert_allclose(head.expression(scores), expected, rtol=1e-4, atol=1e-4)


def test_spots_that_measured_all_have_one_panel() -> None:
    panels = same_panel(3, 2)
    assert panels.shared.all() and len(panels.patterns()) == 1


@pytest.mark.parametrize("folds", [FOLDS, TWO[:1]], ids=["trains", "never trains"])
def test_genes_of_one_section_get_the_penalty_of_the_others(
    data: tuple[np.ndarray, np.ndarray], folds: list[InnerFold]
) -> None:
    x, y = data
    fits = head_fits("ridge-per-gene", _target(y, folds), None)
    inputs = Inputs(lambda: x)
    parts = {tuple(part.genes): one.alphas for part, one in zip(fits.parts, fits.tried(inputs).parts, strict=True)}
    others = np.concatenate([alphas for genes, alphas in parts.items() if genes != (15,)])
    np.testing.assert_allclose(parts[(15,)], [np.exp(np.log(others).mean())])
    found = _predicted(_head(fits, inputs, 0, None), x)
    assert np.corrcoef(found[SECTION == 0, 15], y[SECTION == 0, 15])[0, 1] > 0.9


def test_a_fold_that_says_nothing_does_not_count(data: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = data
    panels = PANELS.columns(np.array([12, 15]))  # gene 12 in sections 0 and 1, 15 in 0 alone
    y = panels.masked(y[:, [12, 15]])
    errors = [held_out_errors(x, y, [fold], None, panels=panels)[0] for fold in FOLDS]
    assert np.isnan(errors[2]).all() and np.isfinite(errors[:2]).all()
    np.testing.assert_allclose(mean_error(errors, FOLDS), np.mean(errors[:2], axis=0))
    # in one go as well
    np.testing.assert_allclose(held_out_errors(x, y, FOLDS, None, panels=panels), errors)
    chosen = choose({(1,): x, (2,): x[:, :2]}, y, FOLDS, None, panels=panels)
    assert chosen.depth == (1,) and np.isfinite(chosen.table["error"]).all()


def test_components_fit_the_fewest_spots_that_measured_a_gene(data: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = data
    wide = np.concatenate([x, np.random.default_rng(1).normal(size=(N, 60)).astype(np.float32)], axis=1)
    fits = head_fits("ridge", _target(y), 50)  # more than the 40 spots of section 0
    head = _head(fits, Inputs(lambda: wide), 0, None)
    assert np.isfinite(_predicted(head, wide)).all()
