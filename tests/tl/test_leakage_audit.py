"""tl.leakage_audit: what folds of random spots claim beyond what held-out groups show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from spatialdata import SpatialData

import pekasc as pk

RIDGE = pk.Readout.preset("ridge").replace(n_depths=None)
QUICK: dict[str, Any] = {"genes": "svg", "n_genes": 8, "compute": {"device": "cpu"}, "progress": False}


def test_finds_the_leak_of_neighbouring_spots(tiled: SpatialData) -> None:
    """Expression that is smooth noise, which no image shows: only folds of random spots predict it."""
    table = tiled["table"]
    rng = np.random.default_rng(0)
    xy = table.obsm["spatial"] / np.ptp(table.obsm["spatial"], axis=0)
    rates = np.empty(table.shape)
    for region in table.obs["region"].unique():
        at = np.flatnonzero(table.obs["region"] == region)
        waves = np.sin(4 * xy[at] @ rng.normal(size=(2, table.n_vars)) + rng.uniform(0, 6, table.n_vars))
        rates[at] = np.exp(1.5 * waves + 2)
    table.X = csr_matrix(rng.poisson(rates).astype(np.float32))
    audit = pk.tl.leakage_audit(tiled, methods=["coordinates"], readout=RIDGE, **QUICK)
    assert audit.index.names == ["encoder", "context_um", "genes", "method"]
    row = audit.loc[("tiny", "", "svg", "coordinates")]
    assert row["random_spots"] > row["grouped"] + 0.3
    assert row["inflation"] == pytest.approx(row["random_spots"] - row["grouped"])
    assert np.isnan(row["inflation_relative"]) if row["grouped"] <= 0 else row["inflation_relative"] > 0


def test_folds_are_its_own(tiled: SpatialData) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'folds'"):
        pk.tl.leakage_audit(tiled, folds="fold")  # type: ignore[call-arg]


def test_makes_five_random_folds_at_most(tiled: SpatialData, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tiled["table"]
    table.obs["many"] = [f"g{i % 7}" for i in range(table.n_obs)]
    asked: list[Any] = []
    original = pk.tl.cross_validate

    def spy(*args: Any, **kwargs: Any) -> pd.DataFrame:
        asked.append(kwargs.get("folds"))
        return original(*args, **kwargs)

    monkeypatch.setattr("pekasc.tl._leakage_audit.cross_validate", spy)
    with pytest.warns(UserWarning, match="spots of one section in training and in test"):
        pk.tl.leakage_audit(tiled, methods=["mean"], groups="many", **QUICK)
    assert [None if folds is None else len(folds) for folds in asked] == [None, 5]
    held_out = np.sum([test for _, test in asked[1].values()], axis=0)
    np.testing.assert_array_equal(held_out, 1)


def test_every_readout_has_its_row(tiled: SpatialData) -> None:
    readout = [RIDGE, RIDGE.replace(head="ridge-per-gene")]
    audit = pk.tl.leakage_audit(tiled, methods=["mean", "coordinates"], readout=readout, **QUICK)
    assert audit.index.names == ["encoder", "context_um", "readout", "genes", "method"]
    assert list(audit.index.get_level_values("readout").unique()) == [repr(value) for value in readout]
    assert len(audit) == 4 and audit.notna()[["grouped", "random_spots", "inflation"]].all(axis=None)


def test_a_field_that_does_nothing_is_an_error_in_a_mapping(tiled: SpatialData) -> None:
    with pytest.raises(ValueError, match="`compute`: 'resume' does nothing in this call"):
        pk.tl.leakage_audit(tiled, methods=["mean"], progress=False, compute={"resume": "x"})
    with pytest.raises(ValueError, match="`compute`: 'accumulate' does nothing in this call: it trains nothing"):
        pk.tl.leakage_audit(tiled, methods=["mean"], progress=False, compute={"accumulate": 2})
    with pytest.raises(ValueError, match="`recipe`: 'rank' does nothing in this call"):
        pk.tl.leakage_audit(tiled, methods=["mean"], progress=False, recipe={"rank": 2})
