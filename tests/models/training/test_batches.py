"""Batches: as large as the recipe says, in a new order every epoch, in the orientations that it allows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pekasc._options import Recipe
from pekasc.models.encoders import VIEWS
from pekasc.models.training._batches import Batch, _Batches


class _Named:
    """Inputs that are the numbers of their tiles and orientations."""

    start = 0

    def read(self, index: np.ndarray, views: np.ndarray) -> np.ndarray:
        return np.stack([index, views], axis=1)


def batches(recipe: Recipe, parts: int = 1, local: np.ndarray | None = None, seed: int = 0) -> _Batches:
    index = np.arange(5, 27)  # 22 of 30 tiles
    local = np.ones(30, dtype=bool) if local is None else local
    return _Batches(_Named(), index, local, recipe, parts, seed, torch.device("cpu"))


def tiles(epoch: list[Batch]) -> np.ndarray:
    return np.concatenate([x[:n].numpy() for x, _, n, _ in epoch])


@pytest.mark.parametrize("batch_size", [4, 8, 32])
def test_a_batch_has_the_recipes_size(batch_size: int) -> None:
    made = batches(Recipe(batch_size=batch_size))
    epoch = list(made)
    sizes = [len(x) for x, _, _, _ in epoch]
    assert len(made) == len(sizes) == -(-22 // batch_size)
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1) and sum(sizes) == 22
    # every tile once, and beside it its row of the targets
    assert sorted(tiles(epoch)[:, 0]) == list(range(5, 27))
    assert all((x[:, 0] == rows + 5).all() for x, rows, _, _ in epoch)


@pytest.mark.parametrize("n_views", [1, 2, 4, 8])
def test_orientations_are_drawn_among_the_recipes(n_views: int) -> None:
    made = batches(Recipe(n_views=n_views))
    drawn = {int(view) for _ in range(10) for view in tiles(list(made))[:, 1]}
    assert drawn == set(VIEWS[:n_views])


def test_every_epoch_has_an_order_of_its_own_and_the_seed_decides() -> None:
    made = batches(Recipe())
    first, second = tiles(list(made)), tiles(list(made))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(tiles(list(batches(Recipe()))), first)
    assert not np.array_equal(tiles(list(batches(Recipe(), seed=1))), first)


def test_parts_of_a_batch_are_the_batch() -> None:
    whole, made = list(batches(Recipe(batch_size=8))), batches(Recipe(batch_size=8), parts=3)
    epoch = list(made)
    assert len(made) == len(epoch) == 9
    for i, (x, _, _, _) in enumerate(whole):
        np.testing.assert_array_equal(tiles(epoch[3 * i : 3 * i + 3]), x)
        assert [n_all for _, _, _, n_all in epoch[3 * i : 3 * i + 3]] == [len(x)] * 3


def test_processes_share_a_batch() -> None:
    here = np.arange(30) % 3 == 0
    one, two = (list(batches(Recipe(batch_size=8), local=local)) for local in (here, ~here))
    whole = list(batches(Recipe(batch_size=8)))
    for (x, _, n, n_all), (_, _, n_one, _), (_, _, n_two, n_all_two) in zip(whole, one, two, strict=True):
        assert n_one + n_two == n == len(x) == n_all == n_all_two
    assert {*tiles(one)[:, 0]} == {*np.flatnonzero(here)} & {*range(5, 27)}


def test_it_goes_on_in_the_middle_of_an_epoch() -> None:
    made = batches(Recipe(batch_size=8))
    list(made)
    second = list(made)
    left = batches(Recipe(batch_size=8))
    left.load_state_dict({"epoch": 1, "batch": 2})
    (last,) = list(left)
    np.testing.assert_array_equal(last[0], second[2][0])
    assert left.state_dict() == {"epoch": 2, "batch": 0}
