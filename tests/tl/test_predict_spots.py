"""Residuals of spots: the noise of counts is that of draws, and a table that is not there is named."""

from __future__ import annotations

import numpy as np
import pytest

import pekasc as pk
from pekasc.tl._predict_spots import counting_variance, spots_table


def test_the_variance_of_counting_is_that_of_draws() -> None:
    rng = np.random.default_rng(0)
    totals = np.exp(rng.uniform(np.log(500), np.log(20000), 400))
    shares = 1e-4 * np.array([0.02, 0.3, 3.0, 40.0, 400.0]) * rng.lognormal(0, 0.4, (400, 5))
    draws = rng.poisson(totals[:, None] * shares, (200, 400, 5))
    logs = np.log1p(1e4 * draws / totals[:, None])
    expected = logs.var(axis=0)
    found = counting_variance(logs[0], np.log1p(1e4 * shares), totals)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.mean(axis=0)[1:], expected.mean(axis=0)[1:], rtol=0.1)
    np.testing.assert_allclose(found.mean(axis=0)[0], expected.mean(axis=0)[0], rtol=0.6)  # few counts in one draw
    # a prediction that is off by a factor is brought to the counts
    off = counting_variance(logs[0], np.log1p(3e4 * shares), totals)
    np.testing.assert_allclose(off, found, rtol=1e-3)


def test_a_gene_without_counts_has_no_noise_to_take_away() -> None:
    found = counting_variance(np.zeros((30, 2)), np.full((30, 2), [0.0, 1.0]), np.full(30, 5000.0))
    np.testing.assert_array_equal(found, 0)


def test_the_argument_of_the_table_is_named() -> None:
    sdata = pk.datasets.phantom(n_patients=1, size_um=600, n_genes=4)
    assert spots_table(sdata, None) == spots_table(sdata, "table") == "table"
    with pytest.raises(
        KeyError, match=r"'tabel' not found .*\['table'\]\. Name that of the spots with `measured_table="
    ):
        spots_table(sdata, "tabel")
    sdata.tables["one"], sdata.tables["two"] = sdata["table"].copy(), sdata["table"].copy()
    del sdata.tables["table"]
    with pytest.raises(KeyError, match=r"'table' not found .* `measured_table=`"):
        spots_table(sdata, None)
