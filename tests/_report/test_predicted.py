from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from spatialdata import SpatialData

import pekasc as pk
from pekasc._report._facts import About
from pekasc._report._predicted import chosen, maps, novelty, predicted, sections


def _predicted(adapter: Any, sdata: SpatialData, **changed: Any) -> Any:
    return predicted(adapter, sdata, **{"layer": "peka", "table_name": "table", "groups": None, **changed})


def test_scores_are_those_of_evaluate(adapter: Any, sdata: SpatialData, page: Any) -> None:
    found = _predicted(adapter, sdata)
    expected = pk.tl.evaluate(sdata["table"].copy())
    assert found.scores is not None and list(found.scores["gene"]) == list(expected["gene"])
    np.testing.assert_allclose(found.scores["coverage"], expected["coverage"])
    assert list(found.by_gene.columns) == ["pearson", "coverage"]
    text = page(sections(About(adapter), found).text)
    cells = [data for tag, data in text.texts if tag == "td"]
    assert cells[1] == f"{expected['pearson'].median():.2f}" and cells[3] == f"{expected['coverage'].mean():.0%}"
    n = int(sdata["table"].obs["peka_train"].sum())
    assert f"was trained on {n} of them" in text.text


def test_groups_for_scores(adapter: Any, sdata: SpatialData) -> None:
    found = _predicted(adapter, sdata, groups="donor")
    assert set(found.scores["group"]) == {"$a_b$"}
    with pytest.raises(KeyError, match="nothing"):
        _predicted(adapter, sdata, groups="nothing")


def test_nothing_measured_or_all_trained_on(adapter: Any, sdata: SpatialData, page: Any) -> None:
    table = sdata["table"].copy()
    own = SpatialData(images=dict(sdata.images), shapes=dict(sdata.shapes), tables={"table": table})
    table.obs["peka_train"] = True
    found = _predicted(adapter, own)
    assert found.scores is None and found.by_gene is None
    table.obs["peka_train"] = False
    table.X = None
    text = page(sections(About(adapter), _predicted(adapter, own)).text).text
    assert "nothing measured to compare with" in text and "trained on" not in text


def test_maps_of_the_best_genes_or_those_asked_for(adapter: Any, sdata: SpatialData, page: Any) -> None:
    about, found = About(adapter), _predicted(adapter, sdata)
    best = list(adapter.gene_scores["pearson"].sort_values(ascending=False).index)
    assert chosen(about, found, None) == best[:3]
    assert chosen(about, found, best[5:7]) == best[5:7]
    with pytest.raises(KeyError, match=r"\['nothing'\] were not predicted in these sections"):
        chosen(about, found, ["nothing"])
    (made,) = maps(about, found, best[:1])
    parsed = page(made.text)
    (image,) = parsed.all("img")
    assert image["src"].startswith("data:image/png;base64,") and "ends of its interval" in image["alt"]
    assert image["alt"].endswith("in P3S1_spots")  # not those that were trained on
    assert parsed.text.startswith(best[0])


def test_novelty_is_shown_where_it_is(adapter: Any, sdata: SpatialData, page: Any) -> None:
    shown = novelty(_predicted(adapter, sdata))
    assert shown is not None
    p = sdata["table"].obs.loc[~sdata["table"].obs["peka_train"], "peka_novelty"].dropna()
    assert f"{(p < 0.01).mean():.1%} of {len(p)} tiles" in page(shown.text).text
    table = sdata["table"].copy()
    del table.obs["peka_novelty"]
    own = SpatialData(images=dict(sdata.images), shapes=dict(sdata.shapes), tables={"table": table})
    assert novelty(_predicted(adapter, own)) is None


def test_bad_input(adapter: Any, sdata: SpatialData) -> None:
    with pytest.raises(KeyError, match=r"No predictions found in layers\['mine'\] of the table 'table': run"):
        _predicted(adapter, sdata, layer="mine")
    with pytest.raises(TypeError, match="SpatialData"):
        _predicted(adapter, sdata["table"])
    other = replace(adapter, info={**adapter.info, "groups": ["somebody"]})
    with pytest.raises(ValueError, match="of another adapter than the one to report on: its groups is"):
        _predicted(other, sdata)
