from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from pekasc._report._facts import About
from pekasc._report._genes import gene_table
from pekasc.models.trust import trust_levels


def _data(text: str, page: Any) -> Any:
    return json.loads(next(data for tag, data in page(text).texts if tag == "script"))


def test_every_gene_with_its_scores(adapter: Any, page: Any) -> None:
    found = _data(gene_table(About(adapter), None).text, page)
    scores = adapter.gene_scores
    assert [row[0] for row in found["rows"]] == [gene.replace("\u202e", "\ufffd") for gene in scores.index]
    assert [row[1] for row in found["rows"]] == list(trust_levels(scores))
    np.testing.assert_allclose([row[2] for row in found["rows"]], scores["pearson"], atol=1e-4)
    labels = [column["label"] for column in found["columns"]]
    assert labels[:5] == ["Gene", "Trust", "Pearson r, held out", "Lowest", "Highest"] and len(labels) == 8
    assert found["rows"][0][5] == [found["rows"][0][i] for i in (2, 3, 4)]


def test_scores_on_sections_and_genes_without(adapter: Any, page: Any) -> None:
    here = pd.DataFrame({"pearson": [0.5], "coverage": [0.9]}, index=[adapter.genes[1]])
    found = _data(gene_table(About(adapter), here).text, page)
    assert [column["label"] for column in found["columns"]][8:] == [
        "Pearson r, these sections", "In the interval, these sections",
    ]  # fmt: skip
    assert found["rows"][0][8:] == [None, None] and found["rows"][1][8:] == [0.5, 0.9]
    old = replace(adapter, gene_scores=adapter.gene_scores[["pearson"]].assign(pearson=np.nan))
    found = _data(gene_table(About(old), None).text, page)
    assert found["rows"][0][1:] == ["low", None, [None, None, None]]


def test_the_frame_is_there_for_keyboards_and_readers(adapter: Any, page: Any) -> None:
    found = page(gene_table(About(adapter), None).text)
    assert found.counts["label"] == 2 and found.counts["caption"] == 1 and found.counts["noscript"] == 1
    assert next(a for a in found.all("p") if a.get("id") == "genes-status")["role"] == "status"
    assert next(a for a in found.all("div") if a.get("role") == "region")["tabindex"] == "0"
