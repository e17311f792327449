"""Measured values are on the scale that a prediction's record says, and of the layer that it names."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from anndata import AnnData

from pekasc._expression import log1p_cp10k
from pekasc._measured import measured


def test_the_layer_of_the_counts_is_recorded(counted: AnnData, record_totals: Callable[..., None]) -> None:
    counted.layers["spliced"] = np.floor(counted.X / 2)
    record_totals(counted, "spliced")
    np.testing.assert_array_equal(measured(counted, "peka")[0], log1p_cp10k(counted, "spliced"))
    del counted.layers["spliced"]
    with pytest.warns(UserWarning, match=r"were in layers\['spliced'\], which is not in the table any more"):
        measured(counted, "peka")


def test_a_scale_that_was_lost_is_not_guessed(counted: AnnData) -> None:
    counted.obs["peka_train"] = False
    del counted.uns["pekasc"]
    measured(counted, "peka")  # totals say that it was counts
    del counted.obs["peka_total"]
    with pytest.raises(ValueError, match=r"scale of layers\['peka'\] is not known: .*joining objects drops it"):
        measured(counted, "peka")
