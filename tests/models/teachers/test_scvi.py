"""scVI as teacher, where scvi-tools is installed: what the contract suite does not say."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from pekasc.models.teachers._scvi import ScviTeacher, _batch_size


def test_no_batch_is_left_with_a_single_spot() -> None:
    # batch normalisation cannot take it
    assert all(n % _batch_size(n) != 1 for n in range(2, 2000))
    assert (_batch_size(1000), _batch_size(129)) == (128, 127)


def test_spots_without_counts() -> None:
    pytest.importorskip("scvi")
    counts = np.random.default_rng(0).poisson(3, (40, 12)).astype(np.float32)
    counts[[3, 30]] = 0
    teacher = ScviTeacher(counts, 3, epochs=1)
    got = teacher.embed(np.arange(20), np.arange(40))
    assert np.flatnonzero(np.isnan(got).any(axis=1)).tolist() == [3, 30]
    # an empty training spot is none
    np.testing.assert_array_equal(teacher.embed(np.delete(np.arange(20), 3), np.arange(40)), got)
    with pytest.raises(ValueError, match="scVI cannot be fitted on 1 spots with counts"):
        teacher.embed(np.array([2, 3]))


@pytest.mark.slow
def test_finds_a_planted_signal_in_spots_it_never_saw() -> None:
    pytest.importorskip("scvi")
    rng = np.random.default_rng(0)
    state = rng.normal(size=(600, 3))
    counts = rng.poisson(np.exp(state @ rng.normal(size=(3, 200)) * 0.5))
    teacher = ScviTeacher(counts)
    latent = teacher.embed(np.arange(450), np.arange(600))
    fit = LinearRegression().fit(latent[:450], state[:450])
    assert fit.score(latent[450:], state[450:]) > 0.9
