"""Kriging: the same numbers as scikit-learn's Gaussian process, whatever the nugget of a gene and the window."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern

from pekasc.models.kriging import Kriging, _kriging
from pekasc.models.kriging._kriging import correlation, window_centres

RANGE = 350.0
NUGGETS = np.array([0.3, 3.0, np.inf, 0.3])
SD = np.array([1.0, 0.5, 2.0, 0.0])
REST = np.array([0.0, 0.3, 0.0, 0.0])


def lattice(n: int, pitch: float = 100.0) -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(n), np.arange(n)), axis=-1).reshape(-1, 2) * pitch


@pytest.fixture
def kriging() -> Kriging:
    rng = np.random.default_rng(0)
    coords = lattice(9) + rng.normal(0, 5, (81, 2))
    residuals = rng.normal(size=(81, 4)).astype(np.float32)
    noise = rng.lognormal(0, 0.5, 81)
    return Kriging(coords, residuals, noise, RANGE, NUGGETS, np.array([0.0, 0.7, 0.0, 0.2]), SD, REST)


def test_it_is_a_gaussian_process_with_the_noise_of_each_spot(kriging: Kriging) -> None:
    places = np.random.default_rng(1).uniform(-200, 1000, (50, 2))
    pull, sd = kriging.at(places)
    assert pull.dtype == sd.dtype == np.float32 and pull.shape == sd.shape == (50, 4)
    scale = RANGE * np.sqrt(3) / 4.743865
    for gene in (0, 1):
        model = GaussianProcessRegressor(
            ConstantKernel(1.0) * Matern(length_scale=scale, nu=1.5),
            alpha=NUGGETS[gene] * kriging.noise,
            optimizer=None,
        )
        model.fit(kriging.coords_um, kriging.residuals[:, gene] - kriging.offset[gene])
        mean, std = model.predict(places, return_std=True)
        np.testing.assert_allclose(pull[:, gene], mean + kriging.offset[gene], atol=2e-4)
        np.testing.assert_allclose(sd[:, gene], np.hypot(std * SD[gene], REST[gene]), atol=2e-3)
    # no pull but the offset, and all of the process is left
    np.testing.assert_array_equal(pull[:, 2], 0)
    np.testing.assert_array_equal(sd[:, 2], SD[2])
    assert (sd[:, 3] == 0).all() and pull[:, 3].std() > 0
    np.testing.assert_array_equal(kriging.pulled, [True, True, False, True])


def test_the_range_is_where_the_correlation_is_a_twentieth() -> None:
    np.testing.assert_allclose(correlation(np.array([0.0, 200.0]), 200.0), [1, 0.05], atol=1e-6)


def test_far_from_all_spots_nothing_but_the_offset_is_left(kriging: Kriging) -> None:
    far = np.array([[1e5, 1e5]])
    pull, sd = kriging.at(far)
    np.testing.assert_allclose(pull[0], kriging.offset, atol=1e-6)
    np.testing.assert_allclose(sd[0], np.hypot(SD, REST), atol=1e-6)
    np.testing.assert_allclose(kriging.distance(far), np.linalg.norm(far - kriging.coords_um, axis=1).min())


def test_windows_give_what_all_spots_give(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    coords = lattice(24)
    residuals = rng.normal(size=(len(coords), 2)).astype(np.float32)
    parts = (coords, residuals, np.ones(len(coords)), 300.0, np.array([0.3, 1.0]), np.zeros(2), np.ones(2), np.zeros(2))
    places = rng.uniform(0, 2300, (300, 2))
    whole, whole_sd = Kriging(*parts).at(places)
    monkeypatch.setattr(_kriging, "MOST_SPOTS", 160)
    assert len(window_centres(coords)) == 16
    made, sd = Kriging(*parts).at(places)
    assert not np.array_equal(made, whole)
    np.testing.assert_allclose(made, whole, atol=0.03)
    np.testing.assert_allclose(sd, whole_sd, atol=0.01)
    # the order of places, and how many there are at once, change nothing
    monkeypatch.setattr(_kriging, "_PLACES", 7)
    again = Kriging(*parts)
    order = rng.permutation(300)
    np.testing.assert_allclose(again.at(places[order])[0], made[order], atol=1e-5)
