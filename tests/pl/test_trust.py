from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import pekasc as pk

SCORES = pd.DataFrame(
    {
        "pearson": [0.1, 0.6, np.nan, 0.5, 0.3, -0.1],
        "lowest": [-0.2, 0.4, np.nan, 0.1, 0.1, -0.2],
        "highest": [0.3, 0.7, np.nan, 0.8, 0.5, 0.0],
    },
    index=pd.Index(["low", "high", "never", "uneven", "medium", "worst"], name="gene"),
)


def _adapter(scores: pd.DataFrame = SCORES, groups: tuple[str, ...] = ("P1", "P2")) -> Any:
    return SimpleNamespace(gene_scores=scores, info={"groups": groups})


def _names(ax: Any) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


def _by_level(ax: Any) -> dict[str, list[float]]:
    lines = {line.get_label().split(" ")[0]: line for line in ax.lines if " gene" in str(line.get_label())}
    return {level: list(line.get_xdata()) for level, line in lines.items()}


def test_genes_are_ranked_with_their_range_and_level() -> None:
    ax = pk.pl.trust(_adapter())
    assert _names(ax) == ["high", "uneven", "medium", "low", "worst"]
    # 0.5 on average, but no more than 0.1 in one section: medium
    assert _by_level(ax) == {"high": [0.6], "medium": [0.5, 0.3], "low": [0.1, -0.1]}
    ranges = {tuple(np.round(segment[:, 0], 6)) for part in ax.collections for segment in part.get_segments()}
    assert ranges == {(0.4, 0.7), (0.1, 0.8), (0.1, 0.5), (-0.2, 0.3), (-0.2, 0.0)}
    low, high = ax.get_ylim()
    assert low > high  # the best above


def test_the_legend_counts_all_genes_of_the_adapter() -> None:
    ax = pk.pl.trust(_adapter(), n=1)
    assert _names(ax) == ["high"]
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["high (1 gene)", "medium (2 genes)", "low (3 genes)"]


def test_genes_that_were_asked_for() -> None:
    ax = pk.pl.trust(_adapter(), ["never", "low", "high"])
    assert _names(ax) == ["high", "low", "never"]
    assert [text.get_text() for text in ax.texts] == ["never held out"]
    assert _names(pk.pl.trust(_adapter(), "medium")) == ["medium"]


def test_adapters_of_earlier_versions_have_no_range() -> None:
    ax = pk.pl.trust(_adapter(SCORES[["pearson"]]))
    assert not ax.collections
    assert ax.get_xlabel() == "Pearson r on held-out sections"


def test_names_are_no_formulas() -> None:
    scores = SCORES.rename(index={"high": "$x^2$"})
    ax = pk.pl.trust(_adapter(scores))
    assert _names(ax)[0] == "$x^2$" and not ax.get_yticklabels()[0].get_parse_math()
    ax.figure.canvas.draw()


def test_nothing_is_drawn_outside_of_the_figure() -> None:
    ax = pk.pl.trust(_adapter())
    ax.figure.canvas.draw()
    inside = ax.figure.bbox
    for artist in (ax.get_legend(), ax.xaxis.label, *ax.get_yticklabels()):
        box = artist.get_window_extent()
        assert box.x0 >= inside.x0 - 1 and box.x1 <= inside.x1 + 1 and box.y1 <= inside.y1 + 1


def test_draws_on_the_axes_given() -> None:
    _, ax = plt.subplots()
    assert pk.pl.trust(_adapter(), ax=ax) is ax
    assert len(plt.get_fignums()) == 1


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="Expected an Adapter, got str"):
        pk.pl.trust("adapter")
    with pytest.raises(ValueError, match="`n` must be a positive integer, got 0"):
        pk.pl.trust(_adapter(), n=0)
    with pytest.raises(ValueError, match="No gene has a score: no group was held out"):
        pk.pl.trust(_adapter(SCORES * np.nan))
    with pytest.raises(ValueError, match="`genes` is an empty list"):
        pk.pl.trust(_adapter(), [])
    with pytest.raises(KeyError, match=r"The adapter does not predict \['hihg'\].*high"):
        pk.pl.trust(_adapter(), ["hihg"])
    assert not plt.get_fignums()


def test_blocks_of_one_group_are_no_sections() -> None:
    assert pk.pl.trust(_adapter()).get_xlabel().startswith("Pearson r on held-out sections")
    assert "held-out blocks of the one training group" in pk.pl.trust(_adapter(groups=("P1",))).get_xlabel()
