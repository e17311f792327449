"""What held-out blocks choose: a planted range and offset are found, noise is left alone, deep spots count more."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from pekasc.models.kriging import LEAST_SPOTS, TooFewSpots, _kriging, fit_kriging
from pekasc.models.kriging._choice import _errors, _folds
from pekasc.models.kriging._kriging import correlation

PITCH = 100.0


def lattice(n: int) -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(n), np.arange(n)), axis=-1).reshape(-1, 2) * PITCH


def fields(coords: np.ndarray, range_um: float, n: int, seed: int = 0) -> np.ndarray:
    """Return draws of the process, (places, n)."""
    covariance = correlation(cdist(coords, coords), range_um) + 1e-6 * np.eye(len(coords))
    return np.asarray(np.linalg.cholesky(covariance) @ np.random.default_rng(seed).normal(size=(len(coords), n)))


@pytest.mark.parametrize("range_um", [300.0, 1200.0])
def test_a_planted_process_is_found_between_the_spots(range_um: float) -> None:
    coords = lattice(16)
    between = np.random.default_rng(3).uniform(0, 1500, (100, 2))
    truth = fields(np.concatenate([coords, between]), range_um, 20)
    noise = np.random.default_rng(1).lognormal(0, 0.5, len(coords))
    measured = truth[: len(coords)] + 0.5 * np.sqrt(noise)[:, None] * np.random.default_rng(2).normal(size=(256, 20))
    kriging = fit_kriging(coords, measured, noise, np.repeat(0.25 * noise[:, None], 20, axis=1))
    assert kriging.range_um == pytest.approx(range_um)
    assert np.isfinite(kriging.nuggets).all() and kriging.pulled.all()
    pull, sd = kriging.at(between)
    error = pull - truth[len(coords) :]
    assert np.sqrt(np.mean(error**2)) < 0.6 * truth[len(coords) :].std()
    # the deviation says how large errors are
    assert 0.8 < np.sqrt(np.mean((error / sd) ** 2)) < 1.25
    # without the noise, it is that of a measurement
    plain = fit_kriging(coords, measured, noise).at(between)[1]
    again = error + 0.5 * np.random.default_rng(4).normal(size=error.shape)
    assert (plain > sd).all() and 0.8 < np.sqrt(np.mean((again / plain) ** 2)) < 1.25


def test_noise_is_left_alone_and_an_offset_is_added() -> None:
    coords = lattice(12)
    rng = np.random.default_rng(0)
    residuals = rng.normal(size=(144, 60))
    residuals[:, :20] += 2
    kriging = fit_kriging(coords, residuals, np.ones(144))
    np.testing.assert_allclose(kriging.offset[:20], residuals[:, :20].mean(axis=0), rtol=1e-5)
    assert kriging.pulled[:20].all()
    assert kriging.pulled[20:].mean() < 0.25  # where the gain is above its standard error by chance
    pull, sd = kriging.at(lattice(12) + 50)
    assert np.abs(pull[:, 20:]).mean() < 0.1
    # the deviation is the noise of the residuals, but for what the offset takes
    rms = np.sqrt(np.square(residuals).mean(axis=0))
    left = ~kriging.pulled
    np.testing.assert_allclose(sd[:, left], np.broadcast_to(rms[left], sd[:, left].shape), rtol=0.01)
    alone = kriging.pulled & ~np.isfinite(kriging.nuggets)
    assert alone.sum() > 10
    spread = np.broadcast_to(residuals.std(axis=0), sd.shape)
    np.testing.assert_allclose(sd[:, alone], spread[:, alone], rtol=0.02)
    np.testing.assert_allclose(sd[:, kriging.pulled], spread[:, kriging.pulled], rtol=0.25)  # a field, by chance


@pytest.mark.parametrize("offset", [0.0, 1.5])
def test_counting_noise_is_no_error_of_the_map(offset: float) -> None:
    # errors of one variance at all places, seen at the spots under counting noise of another
    coords, rng = lattice(20), np.random.default_rng(0)
    depth = rng.lognormal(0, 0.7, len(coords))
    noise = np.median(depth) / depth
    errors = offset + 0.5 * rng.normal(size=(len(coords), 60))
    counting = np.repeat(0.8 * noise[:, None], 60, axis=1)
    residuals = errors + np.sqrt(counting) * rng.normal(size=errors.shape)
    kriging = fit_kriging(coords, residuals, noise, counting)
    assert (kriging.offset != 0).all() == (offset > 0)
    sd = kriging.at(coords + 30)[1]
    assert np.sqrt(np.mean(np.square(sd))) == pytest.approx(0.5, abs=0.06)
    # counting noise of all that there is: what is left is not known to be 0
    all_noise = fit_kriging(coords, residuals - errors, noise, counting)
    left = all_noise.at(coords + 30)[1]
    assert 0.1 < left.min() and np.median(left) < 0.35


def test_held_out_errors_are_as_large_as_is_said() -> None:
    # pulled genes, of which a part varies at distances shorter than that between spots
    coords, rng = lattice(18), np.random.default_rng(1)
    places = rng.uniform(0, 1700, (150, 2))
    field = fields(np.concatenate([coords, places]), 800.0, 30) + 0.6 * rng.normal(size=(len(coords) + 150, 30))
    noise = np.ones(len(coords))
    counting = np.full((len(coords), 30), 0.3)
    kriging = fit_kriging(
        coords, field[: len(coords)] + np.sqrt(0.3) * rng.normal(size=(len(coords), 30)), noise, counting
    )
    assert np.isfinite(kriging.nuggets).all()
    pull, sd = kriging.at(places)
    z = (field[len(coords) :] - pull) / sd
    assert 0.85 < np.sqrt(np.mean(z**2)) < 1.15
    assert 0.7 < np.sqrt(np.mean(z**2, axis=0)).min() and np.sqrt(np.mean(z**2, axis=0)).max() < 1.4


def test_genes_without_any_residual_are_left_alone() -> None:
    kriging = fit_kriging(lattice(8), np.zeros((64, 3)), np.ones(64))
    assert not kriging.pulled.any()
    pull, sd = kriging.at(lattice(3) + 30)
    assert (pull == 0).all() and (sd == 0).all()


def test_deep_spots_pull_more_than_shallow_ones() -> None:
    coords = lattice(14)
    truth = fields(coords, 600.0, 30)
    noise = np.where(np.arange(len(coords)) % 2, 0.2, 5.0)
    measured = truth + np.sqrt(noise)[:, None] * np.random.default_rng(1).normal(size=truth.shape)
    known, ignored = (fit_kriging(coords, measured, n).at(coords)[0] for n in (noise, np.ones(len(coords))))
    assert np.square(known - truth).mean() < 0.8 * np.square(ignored - truth).mean()


def test_blocks_are_squares_of_which_no_two_neighbours_are_held_out_together() -> None:
    coords = lattice(15)
    held_out = np.full(len(coords), -1)
    for number, fold in enumerate(_folds(coords, np.arange(len(coords)), PITCH)):
        assert np.intersect1d(fold.train, fold.held_out).size == 0
        assert fold.train.size + fold.held_out.size == len(coords)
        assert (held_out[fold.held_out] == -1).all()
        held_out[fold.held_out] = number
        assert set(np.bincount(fold.block)[np.unique(fold.block)]) == {9}
    assert (held_out >= 0).all()
    blocks = held_out.reshape(5, 3, 5, 3)[:, 0, :, 0]
    assert (blocks[1:] != blocks[:-1]).all() and (blocks[:, 1:] != blocks[:, :-1]).all()
    assert (blocks[1:, 1:] != blocks[:-1, :-1]).all()


def test_a_held_out_block_is_predicted_without_its_values() -> None:
    coords = lattice(12)
    residuals = np.random.default_rng(0).normal(size=(144, 2))
    fold = next(iter(_folds(coords, np.arange(144), PITCH)))

    def errors(value: float) -> np.ndarray:
        changed = residuals.astype(np.float32)
        changed[fold.held_out] = value
        return _errors(coords, changed, np.ones(144), [fold], PITCH)[2]

    # the sum of (value - prediction)^2 is this parabola only if predictions do not depend on the value
    np.testing.assert_allclose(errors(3) + errors(-3) - 2 * errors(0), 2 * 9 * fold.held_out.size, rtol=1e-4)


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        (lattice(4), rf"^kriging needs at least {LEAST_SPOTS} spots$"),
        (np.zeros((40, 2)), "^more than half of the spots share their position with another$"),
        # three islands, five blocks apart: all are of one fold
        (np.concatenate([lattice(3) + [x, 0] for x in (0, 1500, 3000)]), "^no block of 300 um can be held out from"),
        (lattice(40)[:40], None),
    ],
)
def test_too_few_spots(coords: np.ndarray, message: str | None) -> None:
    if message is None:  # a line of spots is enough
        assert fit_kriging(coords, np.zeros((40, 1)), np.ones(40)).range_um > 0
        return
    with pytest.raises(TooFewSpots, match=message):
        fit_kriging(coords, np.zeros((len(coords), 2)), np.ones(len(coords)))


def test_a_large_section_is_chosen_on_some_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    coords = lattice(26)
    truth = fields(coords, 300.0, 10)
    measured = truth + 0.5 * np.random.default_rng(1).normal(size=truth.shape)
    monkeypatch.setattr(_kriging, "MOST_SPOTS", 200)
    kriging = fit_kriging(coords, measured, np.ones(len(coords)))
    assert kriging.range_um == pytest.approx(300) and kriging.pulled.all()
    assert np.square(kriging.at(coords)[0] - truth).mean() < 0.8 * np.square(measured - truth).mean()
