"""Features to genes by one rule: what a head reads, and that depth and penalty come from held-out groups."""

from __future__ import annotations

import numpy as np
import pytest

from pekasc.models.encoders._depths import Depth, features_at
from pekasc.models.heads._context import with_context
from pekasc.models.heads._registry import HEADS
from pekasc.models.heads._ridge import fit_ridge
from pekasc.models.selection._choice import choose
from pekasc.models.selection._folds import InnerFold, inner_folds
from pekasc.models.selection._inputs import Data, HeadSpec
from pekasc.models.selection._readout import head_inputs, read_features
from pekasc.tiling import ArrayTiles

N, GENES = 120, ["a", "b", "c", "d"]


@pytest.fixture
def data() -> Data:
    rng = np.random.default_rng(0)
    sections = np.repeat(["A", "B", "C"], N // 3)
    coords = np.tile(100.0 * np.column_stack(np.divmod(np.arange(N // 3), 8)), (3, 1))
    tiles = ArrayTiles(np.zeros((N, 2, 2, 3), dtype=np.uint8))
    return Data(tiles, rng.normal(size=(N, len(GENES))), GENES, sections, sections, coords)


@pytest.fixture
def features(data: Data) -> dict[Depth, np.ndarray]:
    """Return features of which blocks 2 and 3 know half of the genes each."""
    rng = np.random.default_rng(1)
    noise = {block: rng.normal(size=(N, 6)) for block in (1, 2, 3)}
    y = np.asarray(data.expression)
    known = {1: y[:, :0], 2: y[:, :2], 3: y[:, 2:]}
    return {(b,): np.column_stack([known[b], noise[b]]).astype(np.float32) for b in (1, 2, 3)}


@pytest.fixture
def folds(data: Data) -> list[InnerFold]:
    return inner_folds(data.groups, data.coords_um, data.sections, margin_um=0)


def test_what_a_head_reads(data: Data, features: dict[Depth, np.ndarray], folds: list[InnerFold]) -> None:
    adapted, frozen = features[2,], features[1,]
    assert head_inputs(HeadSpec(), data, adapted, frozen) is adapted
    both = head_inputs(HeadSpec(beside_frozen=True), data, adapted, frozen)
    np.testing.assert_array_equal(both, np.concatenate([frozen, adapted], axis=1))
    assert head_inputs(HeadSpec(beside_frozen=True), data, adapted) is adapted  # before there is an adapter
    spec = HeadSpec(context_um=150.0, beside_frozen=True)
    for fold in (None, folds[0]):
        np.testing.assert_array_equal(
            head_inputs(spec, data, adapted, frozen, fold),
            with_context(both, data.coords_um, data.sections, 150.0, fold),
        )


def test_context_stays_on_its_side_of_an_inner_fold(data: Data, features: dict[Depth, np.ndarray]) -> None:
    one = Data(data.tiles, data.expression, GENES, data.groups, np.repeat("A", N), data.coords_um)
    fold = InnerFold(np.arange(0, N, 2), np.arange(1, N, 2), "odd")
    changed = features[2,].copy()
    changed[fold.held_out] += 1
    spec = HeadSpec(context_um=150.0)
    before, after = (head_inputs(spec, one, x, fold=fold) for x in (features[2,], changed))
    np.testing.assert_array_equal(before[fold.train], after[fold.train])
    assert not np.array_equal(before[fold.held_out], after[fold.held_out])
    # all training spots together are one side
    everywhere = [head_inputs(spec, one, x)[fold.train] for x in (features[2,], changed)]
    assert not np.array_equal(*everywhere)


@pytest.mark.parametrize("context_um", [None, 150.0])
@pytest.mark.parametrize("name", HEADS)
def test_depth_and_head_are_those_of_the_rule_by_hand(
    data: Data, features: dict[Depth, np.ndarray], folds: list[InnerFold], name: str, context_um: float | None
) -> None:
    spec = HeadSpec(name, context_um)
    reading = read_features(features, data, folds, spec, 5, random_state=0)
    choice = choose(features, data.expression, folds, 5, lambda x, fold: head_inputs(spec, data, x, fold=fold))
    assert reading.depth == choice.depth and reading.table.equals(choice.table)
    x = features[reading.depth]
    assert [part.fold for part in reading.inner] == folds
    for part, fold in zip(reading.inner, folds, strict=True):
        np.testing.assert_array_equal(part.features, head_inputs(spec, data, x, fold=fold))
    want = fit_ridge(head_inputs(spec, data, x), data.expression, 5).head(reading.setting)
    inputs = head_inputs(spec, data, x)
    np.testing.assert_allclose(reading.head.predict(inputs), want.predict(inputs), atol=1e-6)
    if name == "ridge":
        assert reading.setting == choice.alpha
    else:
        assert np.shape(reading.setting) == (len(GENES),)


def test_depths_side_by_side_know_what_each_knows(
    data: Data, features: dict[Depth, np.ndarray], folds: list[InnerFold]
) -> None:
    one = read_features(features, data, folds, HeadSpec(), None)
    two = read_features(features, data, folds, HeadSpec(), None, n_depths=2)
    assert one.depth in ((2,), (3,)) and two.depth == (2, 3)
    assert two.table["error"].min() < 0.2 < one.table["error"].min()
    x = features_at(features, two.depth)
    np.testing.assert_allclose(two.head.predict(x), data.expression, atol=0.5)
