from __future__ import annotations

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from matplotlib.text import Text

import pekasc as pk

SCORES = pd.Series([0.1, 0.7, np.nan, -0.2, 0.4, 0.3], index=[f"G{i}" for i in range(6)])
RANKED = [0.7, 0.4, 0.3, 0.1, -0.2]


def _all_points(ax):
    return np.asarray(ax.collections[0].get_offsets())


def _names(ax) -> list[str]:
    return [text.get_text() for text in ax.texts if text.get_text().startswith("G")]


def test_ranked_from_every_source() -> None:
    adata = AnnData(np.zeros((2, 6)), var=pd.DataFrame({"peka_pearson": SCORES}))
    frame = pd.DataFrame({"pearson": SCORES})
    adapter = SimpleNamespace(gene_scores=frame)
    for data in (adata, frame, adapter):
        ax = pk.pl.gene_scores(data, n=2)
        np.testing.assert_allclose(_all_points(ax), np.c_[[1, 2, 3, 4, 5], RANKED])
        assert _names(ax) == ["G1", "G4", "G0", "G3"]
        assert ax.get_xlabel() == "genes, ranked (n = 5)"
        assert ax.get_ylabel() == "Pearson r"


def test_groups_are_averaged() -> None:
    frame = pd.DataFrame({"gene": ["a", "a", "b"], "group": ["x", "y", "x"], "pearson": [0.2, 0.4, 0.1]})
    ax = pk.pl.gene_scores(frame)
    np.testing.assert_allclose(_all_points(ax)[:, 1], [0.3, 0.1])


def test_lines_at_zero_and_at_the_median() -> None:
    ax = pk.pl.gene_scores(pd.DataFrame({"pearson": SCORES}), n=0)
    assert [line.get_ydata()[0] for line in ax.lines] == [0, pytest.approx(0.3)]
    assert [text.get_text() for text in ax.texts] == ["median 0.30"]
    low, high = ax.get_ylim()
    assert low < -0.2
    assert high > 0.7


def test_ceilings_are_dashes_above_their_genes() -> None:
    ceilings = pd.Series([0.9, 0.95, 0.8, 0.5, np.nan, 0.7], index=SCORES.index)
    adata = AnnData(np.zeros((2, 6)), var=pd.DataFrame({"peka_pearson": SCORES, "peka_ceiling": ceilings}))
    groups = pd.DataFrame({"gene": SCORES.index, "pearson": SCORES.to_numpy(), "ceiling": ceilings.to_numpy()})
    halves = [groups.assign(ceiling=groups["ceiling"] + d, group=d) for d in (-0.02, 0.02)]
    for data in (adata, groups, pd.concat(halves)):
        ax = pk.pl.gene_scores(data)
        (dashes,) = (part for part in ax.collections if "ceiling" in part.get_label())
        offsets = np.ma.filled(dashes.get_offsets(), np.nan)
        np.testing.assert_allclose(offsets[:, 1], [0.95, np.nan, 0.7, 0.9, 0.5])  # ranked by score
        np.testing.assert_allclose(offsets[[0, 2, 3, 4], 0], [1, 3, 4, 5])
        assert [text.get_text() for text in ax.get_legend().get_texts()] == [dashes.get_label()]
        assert "what counting noise allows at most" in dashes.get_label()
        assert ax.get_ylim()[1] > 0.95
        assert not any("ceiling" in part.get_label() for part in pk.pl.gene_scores(adata, metric="ceiling").collections)


def test_without_ceilings_there_are_no_dashes() -> None:
    var = pd.DataFrame({"peka_pearson": SCORES, "peka_rmse": SCORES + 1, "peka_ceiling": SCORES * np.nan})
    for metric in ("pearson", "rmse"):
        ax = pk.pl.gene_scores(AnnData(np.zeros((2, 6)), var=var), metric=metric)
        assert ax.get_legend() is None and len(ax.collections) == 2
    assert pk.pl.gene_scores(SimpleNamespace(gene_scores=pd.DataFrame({"pearson": SCORES}))).get_legend() is None


def test_names_do_not_overlap_nor_touch_the_curve() -> None:
    rng = np.random.default_rng(0)
    values = np.r_[rng.uniform(0.695, 0.7, 6), rng.uniform(-0.02, 0.6, 188), rng.uniform(-0.05, -0.045, 6)]
    ax = pk.pl.gene_scores(pd.DataFrame({"pearson": values}, index=[f"G{i}" for i in range(200)]))
    ax.figure.canvas.draw()
    names = [text for text in ax.texts if text.get_text().startswith("G")]
    # of the text alone: an annotation's own box holds its leader line
    boxes = [Text.get_window_extent(text) for text in names]
    assert len(boxes) == 12
    for i, a in enumerate(boxes):
        assert not any(a.overlaps(b) for b in boxes[i + 1 :])
    points = ax.transData.transform(_all_points(ax))
    assert not any(box.contains(*point) for box in boxes for point in points)


def test_draws_on_the_axes_given() -> None:
    _, ax = plt.subplots()
    assert pk.pl.gene_scores(pd.DataFrame({"pearson": SCORES}), ax=ax) is ax
    assert len(plt.get_fignums()) == 1


def test_other_metric_and_layer() -> None:
    adata = AnnData(np.zeros((2, 6)), var=pd.DataFrame({"mine_rmse": SCORES + 1}))
    ax = pk.pl.gene_scores(adata, layer="mine", metric="rmse")
    assert ax.get_ylabel() == "RMSE"
    np.testing.assert_allclose(_all_points(ax)[0], [1, 1.7])


@pytest.mark.parametrize("n_genes", [1, 2, 3])
def test_few_genes(n_genes: int) -> None:
    frame = pd.DataFrame({"pearson": np.linspace(0.5, 0.1, n_genes)}, index=[f"G{i}" for i in range(n_genes)])
    ax = pk.pl.gene_scores(frame)
    names = _names(ax)
    assert len(names) == len(set(names)) == n_genes


def test_bad_input() -> None:
    adata = AnnData(np.zeros((2, 6)), var=pd.DataFrame({"peka_pearson": SCORES}))
    with pytest.raises(KeyError, match=r"Scores 'other_pearson' not found in `var`. Available columns: \['peka_pears"):
        pk.pl.gene_scores(adata, layer="other")
    with pytest.raises(KeyError, match=r"Scores 'spearman' not found. Available columns: \['pearson'\]"):
        pk.pl.gene_scores(pd.DataFrame({"pearson": SCORES}), metric="spearman")
    with pytest.raises(TypeError, match="or a DataFrame of scores, got list"):
        pk.pl.gene_scores([0.1])
    with pytest.raises(ValueError, match="No gene has a score 'pearson'"):
        pk.pl.gene_scores(pd.DataFrame({"pearson": SCORES * np.nan}))
    with pytest.raises(ValueError, match="`n` must not be negative"):
        pk.pl.gene_scores(adata, n=-1)
    assert not plt.get_fignums()
