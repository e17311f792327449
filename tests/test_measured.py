"""Measured values are on the scale that a prediction's record says, and of the layer that it names."""

from __future__ import annotations

import numpy as np
import pytest
from anndata import AnnData

from pekasc._expression import TARGETS, log1p_cp10k
from pekasc._keys import write_uns
from pekasc._measured import measured
from pekasc._totals import totals_to_record


def record(adata: AnnData, layer: str | None) -> None:
    """Record totals as a prediction does."""
    recorded = totals_to_record(adata, layer)
    assert recorded is not None
    adata.obs["peka_total"], adata.obsm["peka_total_check"] = recorded[:2]
    write_uns(adata, "peka", {"target": TARGETS["log1p"], **recorded[2]})


@pytest.fixture
def adata() -> AnnData:
    """Return counts of 12 genes in 30 spots, one of them without any, with totals as a prediction records them."""
    raw = np.random.default_rng(0).poisson(3, (30, 12)).astype(np.float32)
    raw[4] = 0
    adata = AnnData(raw)
    record(adata, None)
    return adata


def test_the_layer_of_the_counts_is_recorded(adata: AnnData) -> None:
    adata.layers["spliced"] = np.floor(adata.X / 2)
    record(adata, "spliced")
    np.testing.assert_array_equal(measured(adata, "peka")[0], log1p_cp10k(adata, "spliced"))
    del adata.layers["spliced"]
    with pytest.warns(UserWarning, match=r"were in layers\['spliced'\], which is not in the table any more"):
        measured(adata, "peka")


def test_a_scale_that_was_lost_is_not_guessed(adata: AnnData) -> None:
    adata.obs["peka_train"] = False
    del adata.uns["pekasc"]
    measured(adata, "peka")  # totals say that it was counts
    del adata.obs["peka_total"]
    with pytest.raises(ValueError, match=r"scale of layers\['peka'\] is not known: .*joining objects drops it"):
        measured(adata, "peka")
