"""Heads as linear maps of features and their neighbours' mean, and readings that average several of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pekasc.models.heads import (
    Block,
    LinearHead,
    LinearMap,
    Member,
    Reading,
    Source,
    linear_block,
    neighbour_means,
    share_weights,
    with_context,
)

N, D, K, GENES = 14, 5, 3, 4
TILE, WIDE, DEEP = Source("frozen", 0, (1,)), Source("frozen", 1, (1,)), Source("adapted", 0, (2,))
RNG = np.random.default_rng(0)
FEATURES = {s: (50 + RNG.normal(size=(N, D))).astype(np.float32) for s in (TILE, WIDE, DEEP)}
COORDS, SECTIONS = RNG.uniform(0, 300, (N, 2)), np.repeat(["A", "B"], N // 2)
RADIUS = 150.0


def made(
    sources: list[Source], context_um: float | None = None, seed: int = 1
) -> tuple[LinearHead, np.ndarray, np.ndarray]:
    """Return a head, and what it predicts by hand for FEATURES with and without neighbours of its section."""
    rng = np.random.default_rng(seed)
    x = np.concatenate([FEATURES[s] for s in sources], axis=1)
    x = with_context(x, COORDS, SECTIONS, context_um).astype(np.float64)
    matrix, mean = rng.normal(size=(x.shape[1], K)), x.mean(axis=0) + rng.normal(size=x.shape[1])
    out, intercept = rng.normal(size=(K, GENES)), rng.normal(size=GENES)
    block = linear_block(matrix, mean, out, sources, context=context_um is not None)
    return LinearHead((block,), intercept, context_um), (x - mean) @ matrix @ out + intercept, intercept


def predicted(reading: Reading) -> np.ndarray:
    features = {s: FEATURES[s] for s in reading.sources}
    return reading.expression(reading.placed_scores(features, COORDS, SECTIONS))


@pytest.mark.parametrize("context_um", [None, RADIUS])
@pytest.mark.parametrize("sources", [[TILE], [TILE, WIDE], [TILE, DEEP, WIDE]])
def test_a_head_is_one_matrix_for_features_and_their_context(sources: list[Source], context_um: float | None) -> None:
    head, expected, _ = made(sources, context_um)
    assert head.sources == sources and head.n_scores == K and head.context_um == context_um
    got = predicted(Reading((Member("frozen:ridge", 1.0, head),)))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_scores_of_sources_add_up_whatever_they_come_with() -> None:
    head, *_ = made([TILE, WIDE], RADIUS)
    for around in (False, True):
        whole = head.scores(FEATURES, around=around)
        parts = [head.scores({s: FEATURES[s]}, around=around) for s in (TILE, WIDE)]
        assert whole.shape == (N, K) and whole.dtype == np.float32
        np.testing.assert_allclose(parts[0] + parts[1], whole, atol=1e-4)
        assert (head.scores({DEEP: FEATURES[DEEP]}, around=around) == 0).all()  # which it does not read
        assert np.ptp(parts[0]) > 0.1 < np.ptp(parts[1])
    assert not np.allclose(head.scores(FEATURES), head.scores(FEATURES, around=True))
    # without context, a tile is nothing to its neighbours
    assert (made([TILE])[0].scores(FEATURES, around=True) == 0).all()


def test_genes_in_slices_are_those_of_the_whole() -> None:
    one, other = made([TILE], RADIUS)[0], made([DEEP], seed=2)[0]
    head = LinearHead((*one.blocks, *other.blocks), one.intercept, RADIUS)
    assert repr(head) == f"LinearHead(n_scores={2 * K}, n_genes={len(one.intercept)}, context_um={RADIUS})"
    scores = head.scores(FEATURES)
    assert scores.shape == (N, 2 * K)
    np.testing.assert_array_equal(head.expression(scores)[:, 1:3], head.expression(scores, slice(1, 3)))
    np.testing.assert_allclose(
        head.expression(scores) + one.intercept,
        one.expression(scores[:, :K]) + replace(other, intercept=one.intercept).expression(scores[:, K:]),
        atol=1e-4,
    )


def test_large_offsets_cost_no_digits() -> None:
    # features far from 0, as those of a CNN: differences of large numbers would leave two digits
    far = {TILE: FEATURES[TILE] + np.float32(1e4)}
    x = far[TILE].astype(np.float64)
    matrix = RNG.normal(size=(D, K))
    block = linear_block(matrix, x.mean(axis=0), np.eye(K), [TILE], context=False)
    got = LinearHead((block,), np.zeros(K)).scores(far)
    np.testing.assert_allclose(got, (x - x.mean(axis=0)) @ matrix, atol=5e-3)


def test_features_of_another_width_are_refused() -> None:
    head, *_ = made([TILE])
    with pytest.raises(ValueError, match=r"takes 5 features of the encoder's depth 1, and there are 4: it is of anoth"):
        head.scores({TILE: FEATURES[TILE][:, :4]})
    own = Source("frozen", 0, None)
    block = Block({own: LinearMap(np.zeros(3), np.zeros((3, 2)), None)}, np.zeros(2), np.zeros((2, 1)))
    with pytest.raises(ValueError, match="takes 3 features of the encoder's own output, and there are 5"):
        LinearHead((block,), np.zeros(1)).scores({own: FEATURES[TILE]})


@pytest.fixture
def blend() -> Reading:
    """Return a blend whose frozen half has heads for a wider field and context, for context, and for neither."""
    heads = [made([TILE, WIDE], RADIUS, 1), made([TILE], RADIUS, 2), made([TILE], None, 3)]
    frozen = [Member("frozen:low-rank", 0.5, head, i) for i, (head, *_) in enumerate(heads)]
    adapted = [
        Member("adapted:ridge", 0.5, made([DEEP], c, s)[0], i) for i, (c, s) in enumerate(((RADIUS, 4), (None, 5)))
    ]
    return Reading((*frozen, *adapted))


@pytest.mark.parametrize(
    ("situation", "taken"),
    [
        ({}, [0, 3]),
        ({"fields": False}, [1, 3]),
        ({"context": False}, [2, 4]),
        ({"context": False, "fields": False}, [2, 4]),
    ],
)
def test_the_first_variant_of_a_name_that_fits_what_there_is(
    blend: Reading, situation: dict[str, bool], taken: list[int]
) -> None:
    used = blend.use(**situation)
    assert [m.head for m in used.members] == [blend.members[i].head for i in taken]
    assert [m.name for m in used.members] == ["frozen:low-rank", "adapted:ridge"]
    assert sum(m.weight for m in used.members) == pytest.approx(1)
    assert used.radii_um == (() if situation.get("context") is False else (RADIUS,))
    assert (WIDE in used.sources) == (not situation)


def test_what_no_member_can_do_without_leaves_others_with_all_weight(blend: Reading) -> None:
    # three names of unequal weight, of which one needs context in any case
    members = (
        Member("frozen:ridge", 0.5, made([TILE], RADIUS)[0]), Member("adapted:ridge", 0.2, made([DEEP])[0]),
        Member("adapted:low-rank", 0.3, made([DEEP])[0]),
    )  # fmt: skip
    used = Reading(members).use(context=False)
    assert [(m.name, m.weight) for m in used.members] == [("adapted:ridge", 0.4), ("adapted:low-rank", 0.6)]
    assert not Reading(members[:1]).use(context=False).members
    assert [m.weight for m in Reading(members).use().members] == [0.5, 0.2, 0.3]


def test_a_reading_is_the_weighted_mean_of_its_members(blend: Reading) -> None:
    one, other = blend.members[0], blend.members[3]
    unequal = Reading((replace(one, weight=0.7), replace(other, weight=0.3)))
    alone = [predicted(Reading((replace(m, weight=1.0),))) for m in (one, other)]
    np.testing.assert_allclose(predicted(unequal), 0.7 * alone[0] + 0.3 * alone[1], atol=1e-4)
    assert unequal.n_scores == 2 * K and unequal.n_genes == GENES and unequal.sources == [TILE, WIDE, DEEP]
    scores = unequal.scores(FEATURES)
    for genes in (slice(1, 3), np.array([1, 2])):
        np.testing.assert_array_equal(unequal.expression(scores, genes), unequal.expression(scores)[:, 1:3])
    # without the neighbours, it would be another prediction
    assert np.abs(unequal.expression(scores) - predicted(unequal)).max() > 0.1


def test_members_with_and_without_context_go_together() -> None:
    near, alone = made([TILE], RADIUS), made([DEEP], None, 2)
    reading = Reading((Member("a:ridge", 0.5, near[0]), Member("b:ridge", 0.5, alone[0])))
    assert reading.radii_um == (RADIUS,) and (reading.n_scores, reading.n_around) == (2 * K, K)
    np.testing.assert_allclose(predicted(reading), 0.5 * near[1] + 0.5 * alone[1], atol=1e-4)


def test_members_of_several_radii_are_one_variant() -> None:
    """As an average over radii has it: each reads its own neighbours, and without positions none of them counts."""
    parts = [made([TILE], 80.0), made([DEEP], None, 2), made([TILE, WIDE], RADIUS, 3)]
    members = [Member("frozen:ridge", w, part[0]) for w, part in zip((0.2, 0.3, 0.5), parts, strict=True)]
    alone = made([TILE], None, 4)
    reading = Reading((*members, Member("frozen:ridge", 1.0, alone[0], variant=1)))
    assert reading.use().radii_um == (80.0, RADIUS) and reading.use().n_around == 2 * K
    expected = sum(w * part[1] for w, part in zip((0.2, 0.3, 0.5), parts, strict=True))
    np.testing.assert_allclose(predicted(reading.use()), expected, atol=1e-4)
    # a variant is used whole or not at all
    for situation in ({"context": False}, {"fields": False, "context": False}):
        np.testing.assert_allclose(predicted(reading.use(**situation)), alone[1], atol=1e-4)
    assert [m.head for m in reading.use(fields=False).members] == [alone[0]]


@pytest.mark.parametrize("context_um", [None, RADIUS])
@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_smoothing_mixes_predictions_with_their_neighbours_mean(context_um: float | None, weight: float) -> None:
    head, plain, _ = made([TILE], context_um)
    reading = Reading((Member("frozen:ridge", 1.0, head),), smooth_um=100.0, smooth_weight=weight)
    mean = neighbour_means(COORDS, SECTIONS, 100.0) @ plain
    np.testing.assert_allclose(predicted(reading), (1 - weight) * plain + weight * mean, atol=1e-4)
    assert np.abs(mean - plain).max() > 0.1
    # where there are no positions, there are no neighbours to smooth over
    assert (reading.use().smooth_um, reading.use().smooth_weight) == (100.0, weight)
    without = reading.use(context=False)
    assert (without.smooth_um, without.smooth_weight) == (None, 0.0)


def test_networks_share_alike_and_heads_of_one_network_alike() -> None:
    assert share_weights(["frozen:low-rank", "adapted:ridge", "adapted:low-rank"]) == [0.5, 0.25, 0.25]
    assert share_weights(["frozen:ridge"]) == [1.0]
    assert share_weights(["frozen:ridge", "frozen:low-rank"]) == [0.5, 0.5]
