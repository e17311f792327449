"""The truth of a phantom between its spots is what it is at them."""

from __future__ import annotations

import numpy as np
import pytest

import pekasc as pk


def test_at_the_spots_it_is_the_layer_and_between_them_it_is_in_between() -> None:
    sdata = pk.datasets.phantom(n_patients=2, size_um=(900.0, 700.0), mpp=2.0, n_genes=12, random_state=4)
    table = sdata["table"]
    for name in ("P1S1", "P2S1"):
        own = (table.obs["region"] == f"{name}_spots").to_numpy()
        at = np.asarray(table.obsm["spatial"])[own] * 2.0
        truth = pk.datasets.phantom_truth(sdata, f"{name}_he", coords_um=at)
        assert list(truth.columns) == list(table.var_names) and (truth.dtypes == np.float32).all()
        np.testing.assert_allclose(truth, table.layers["truth"][own], atol=1e-6)
        near = pk.datasets.phantom_truth(sdata, f"{name}_he", coords_um=at + 10)
        assert 0 < np.abs(near - truth).to_numpy().mean() < truth.to_numpy().std()


def test_what_is_no_phantom_is_refused() -> None:
    sdata = pk.datasets.phantom(n_patients=1, size_um=500, mpp=2.0, n_genes=8)
    with pytest.raises(KeyError, match=r"no image 'P2S1_he'. Its images: \['P1S1_he'\]"):
        pk.datasets.phantom_truth(sdata, "P2S1_he", coords_um=np.zeros((1, 2)))
    for wrong in (np.zeros(2), np.zeros((2, 3)), np.array([[np.nan, 0]])):
        with pytest.raises(ValueError, match=r"`coords_um` must be \(n, 2\) finite numbers"):
            pk.datasets.phantom_truth(sdata, "P1S1_he", coords_um=wrong)
    del sdata["table"].uns["pekasc"]["phantom"]
    with pytest.raises(ValueError, match=r"No table of \['table'\] has the record of a phantom"):
        pk.datasets.phantom_truth(sdata, "P1S1_he", coords_um=np.zeros((1, 2)))
