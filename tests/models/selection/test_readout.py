"""Features to genes by one rule: what a reading reads, and that its settings come from held-out groups alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pekasc._options import Readout
from pekasc.models.encoders._depths import Depth, features_at
from pekasc.models.heads import Reading, Source, neighbour_means, spread, with_context
from pekasc.models.heads._ridge import ALPHAS, fit_ridge
from pekasc.models.selection import _readout
from pekasc.models.selection._choice import choose
from pekasc.models.selection._folds import InnerFold, inner_folds
from pekasc.models.selection._inputs import Data, HeadSpec
from pekasc.models.selection._readout import Features, Fitted, Reader, choose_depth, fixed_radius, n_neighbours
from pekasc.tiling import ArrayTiles

N, GENES = 120, ["a", "b", "c", "d"]
DEPTHS: list[Depth] = [(1,), (2,), (3,)]
RIDGE = Readout.preset("ridge")
ADAPTED = Source("adapted", 0, (2,))


def frozen(depth: int, field: int = 0) -> Source:
    return Source("frozen", field, (depth,))


@pytest.fixture
def data() -> Data:
    rng = np.random.default_rng(0)
    sections = np.repeat(["A", "B", "C"], N // 3)
    coords = np.tile(100.0 * np.column_stack(np.divmod(np.arange(N // 3), 8)), (3, 1))
    tiles = ArrayTiles(np.zeros((N, 2, 2, 3), dtype=np.uint8))
    return Data(tiles, rng.normal(size=(N, len(GENES))), GENES, sections, sections, coords)


@pytest.fixture
def by_depth(data: Data) -> dict[Depth, np.ndarray]:
    """Return features of which blocks 2 and 3 know half of the genes each."""
    rng = np.random.default_rng(1)
    noise = {block: rng.normal(size=(N, 6)) for block in (1, 2, 3)}
    y = np.asarray(data.expression)
    known = {1: y[:, :0], 2: y[:, :2], 3: y[:, 2:]}
    return {(b,): np.column_stack([known[b], noise[b]]).astype(np.float32) for b in (1, 2, 3)}


@pytest.fixture
def features(by_depth: dict[Depth, np.ndarray]) -> Features:
    """Return frozen features, and those of adapters: another one in every inner fold."""
    rng = np.random.default_rng(2)
    inner = [by_depth[2,] + rng.normal(0, 0.3, by_depth[2,].shape).astype(np.float32) for _ in range(3)]
    return Features(by_depth, (2,), [by_depth[2,] + np.float32(0.1)], inner)


@pytest.fixture
def folds(data: Data) -> list[InnerFold]:
    return inner_folds(data.groups, data.coords_um, data.sections, margin_um=0)


def with_fields(features: Features, n: int = 2) -> Features:
    """Return the same with wider fields of view, whose features are beside those of the tile."""
    rng = np.random.default_rng(3)
    wide = {
        depth: np.concatenate([x, *(rng.normal(size=x.shape).astype(np.float32) for _ in range(n - 1))], axis=1)
        for depth, x in features.frozen.items()
    }
    return replace(features, frozen=wide, n_fields=n)


def predicted(reading: Reading, features: Features, data: Data, fold: int | None = None) -> np.ndarray:
    parts = {source: features.of(source, fold) for source in reading.sources}
    return reading.expression(reading.placed_scores(parts, data.coords_um, data.sections))


def test_features_of_a_source(features: Features) -> None:
    wide = with_fields(features, 3)
    for depth, x in wide.frozen.items():
        width = x.shape[1] // 3
        for field in range(3):
            for fold in (None, 1):
                got = wide.of(Source("frozen", field, depth), fold)
                np.testing.assert_array_equal(got, x[:, field * width : (field + 1) * width])
    assert features.of(ADAPTED, None) is features.adapted[0] and features.of(ADAPTED, 1) is features.inner[1]


def test_features_of_several_blocks_keep_their_fields_apart(features: Features) -> None:
    # of different width, as the stages of a CNN
    wide = with_fields(features)
    assert wide.frozen[1,].shape != wide.frozen[2,].shape
    for field in (0, 1):
        parts = [wide.of(Source("frozen", field, (b,)), None) for b in (1, 2)]
        np.testing.assert_array_equal(wide.of(Source("frozen", field, (1, 2)), None), np.concatenate(parts, axis=1))
    # blocks that the user named come side by side, field by field
    both = Features({(1, 2): np.arange(8.0).reshape(1, 8)}, (1, 2), n_fields=2)
    np.testing.assert_array_equal(both.of(Source("frozen", 1, (1, 2)), None), [[4, 5, 6, 7]])


def variants(fitted: Fitted) -> list[tuple[str, int, list[Source], float | None]]:
    return [(m.name, m.variant, m.head.sources, m.head.context_um) for m in fitted.reading.members]


def test_what_members_read(data: Data, features: Features, folds: list[InnerFold]) -> None:
    reader = Reader(data, folds, features)
    spec = HeadSpec(RIDGE.replace(selection="average"))
    # an adapter's features are read at its depth, whatever the depths of the frozen ones
    assert variants(reader.fit(spec, DEPTHS)) == [("adapted:ridge", 0, [ADAPTED], None)]
    without = Reader(data, folds, replace(features, adapted=()))
    ((name, _, sources, _),) = variants(without.fit(spec, DEPTHS))
    assert name == "frozen:ridge" and set(sources) <= {frozen(d) for d in (1, 2, 3)}
    both = reader.fit(replace(spec, beside_frozen=True), DEPTHS)
    assert variants(both) == [("adapted:ridge", 0, [frozen(2), ADAPTED], None)]
    blend = reader.fit(HeadSpec(Readout(context_um=150, fields_um=None)), [(3,)])
    assert variants(blend) == [
        ("frozen:low-rank", 0, [frozen(3)], 150.0), ("frozen:low-rank", 1, [frozen(3)], None),
        ("adapted:ridge", 0, [ADAPTED], 150.0), ("adapted:ridge", 1, [ADAPTED], None),
        ("adapted:low-rank", 0, [ADAPTED], 150.0), ("adapted:low-rank", 1, [ADAPTED], None),
    ]  # fmt: skip
    assert [m.weight for m in blend.reading.use().members] == pytest.approx([0.5, 0.25, 0.25])
    alone = without.fit(HeadSpec(Readout(context_um=None, fields_um=None)), [(3,)])
    assert variants(alone) == [("frozen:low-rank", 0, [frozen(3)], None)]


def test_wider_fields_are_read_and_left_out_where_there_are_none(
    data: Data, features: Features, folds: list[InnerFold]
) -> None:
    reader = Reader(data, folds, with_fields(features))
    wide = [frozen(3), frozen(3, 1)]
    spec = HeadSpec(Readout(members=("frozen:low-rank", "adapted:ridge"), context_um=150))
    blend = reader.fit(spec, [(3,)])
    # the adapted half of a blend does without them here, where they are noise
    assert variants(blend) == [
        ("frozen:low-rank", 0, wide, 150.0), ("frozen:low-rank", 1, wide[:1], 150.0),
        ("frozen:low-rank", 2, wide[:1], None),
        ("adapted:ridge", 0, [ADAPTED], 150.0), ("adapted:ridge", 1, [ADAPTED], 150.0),
        ("adapted:ridge", 2, [ADAPTED], None),
    ]  # fmt: skip
    assert set(blend.table.loc[blend.table["network"] == "adapted", "fields"]) == {0, 1}
    # and reads them where they know the genes, alone or beside a fit without
    knowing = with_fields(features)
    known = np.asarray(data.expression, dtype=np.float32)
    knowing.frozen[2,][:, -known.shape[1] :] = known
    blend = Reader(data, folds, knowing).fit(spec, [(3,)])
    assert variants(blend)[3] == ("adapted:ridge", 0, [ADAPTED, frozen(2, 1)], 150.0)
    adapted = blend.table[blend.table["network"] == "adapted"]
    assert adapted["weight"].sum() == pytest.approx(1)
    assert adapted.groupby("fields")["weight"].sum()[1] > 0.9
    # without a frozen half, they stand beside the adapted features
    ridge = reader.fit(HeadSpec(RIDGE), [(3,)])
    assert variants(ridge) == [
        ("adapted:ridge", 0, [ADAPTED, frozen(2, 1)], None), ("adapted:ridge", 1, [ADAPTED], None)
    ]  # fmt: skip


def test_frozen_features_stand_in_for_adapted_ones(data: Data, features: Features, folds: list[InnerFold]) -> None:
    without = Reader(data, folds, replace(features, adapted=(), inner=()))
    spec = HeadSpec(Readout(context_um=None, fields_um=None))
    fitted = without.fit(spec, [(3,)], stand_in=True)
    assert variants(fitted) == [
        ("frozen:low-rank", 0, [frozen(3)], None), ("adapted:ridge", 0, [frozen(2)], None),
        ("adapted:low-rank", 0, [frozen(2)], None),
    ]  # fmt: skip
    # as if an adapter had changed nothing
    same = replace(features, adapted=[features.frozen[2,]], inner=[features.frozen[2,]] * 3)
    untrained = Reader(data, folds, same).fit(spec, [(3,)])
    np.testing.assert_allclose(
        predicted(fitted.reading, same, data), predicted(untrained.reading, same, data), atol=1e-5
    )
    np.testing.assert_allclose(fitted.table["error"], untrained.table["error"], rtol=1e-9)


@pytest.mark.parametrize("context_um", [None, 150.0])
def test_the_best_depth_and_penalty_are_those_of_the_rule_by_hand(
    data: Data, by_depth: dict[Depth, np.ndarray], folds: list[InnerFold], context_um: float | None
) -> None:
    readout = RIDGE.replace(context_um=context_um, n_components=5)
    fitted = Reader(data, folds, Features(by_depth, (1,))).fit(HeadSpec(readout), DEPTHS)

    def inputs(x: np.ndarray, fold: InnerFold | None = None) -> np.ndarray:
        return with_context(x, data.coords_um, data.sections, context_um, fold)

    choice = choose(by_depth, data.expression, folds, 5, inputs)
    best = fitted.table[fitted.table["weight"] > 0]
    assert len(best) == 1 and best["weight"].item() == 1
    assert (best["depth"].item(), best["alpha"].item()) == (choice.depth, choice.alpha)
    np.testing.assert_allclose(fitted.table["error"], choice.table["error"])
    assert set(fitted.table["context_um"]) == {context_um or 0.0} and set(fitted.table["rank"]) == {0}
    features = Features(by_depth, (1,))
    x = inputs(by_depth[choice.depth])
    fit = fit_ridge(x, data.expression, 5)
    expected = fit.projection(x) @ fit.coef(choice.alpha) + fit.intercept
    np.testing.assert_allclose(predicted(fitted.reading.use(), features, data), expected, atol=1e-4)
    # and on every fold, fitted on its training spots
    for i, fold in enumerate(folds):
        x = inputs(by_depth[choice.depth], fold)
        fit = fit_ridge(x[fold.train], np.asarray(data.expression)[fold.train], 5)
        expected = fit.projection(x[fold.held_out]) @ fit.coef(choice.alpha) + fit.intercept
        reader = Reader(data, folds, features)
        got = fitted.folds[i].expression(reader.held_out(fitted.folds[i], i))
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_an_average_weighs_settings_by_their_held_out_error(
    data: Data, by_depth: dict[Depth, np.ndarray], folds: list[InnerFold]
) -> None:
    reader = Reader(data, folds, Features(by_depth, (1,)))
    table = reader.fit(HeadSpec(RIDGE.replace(selection="average")), DEPTHS).table
    assert len(table) == 3 * len(ALPHAS) and table["weight"].sum() == pytest.approx(1)
    raw = np.exp(-(table["error"] / table["error"].min() - 1) / spread(3, N))
    raw[raw < 1e-3] = 0
    np.testing.assert_allclose(table["weight"], raw / raw.sum())
    assert table.groupby("depth")["weight"].sum().loc[[(1,)]].item() < 0.01  # which knows nothing
    assert reader.spread == pytest.approx(spread(3, N))
    low = reader.fit(HeadSpec(Readout(head="low-rank", context_um=None)), DEPTHS).table
    assert set(low["rank"]) == {1, 2, 3} and low["weight"].sum() == pytest.approx(1)


@pytest.mark.parametrize("head", ["ridge", "ridge-per-gene", "low-rank", "blend"])
@pytest.mark.parametrize("beside_frozen", [False, True])
def test_several_adapters_are_averaged(
    data: Data, features: Features, folds: list[InnerFold], head: str, beside_frozen: bool
) -> None:
    spec = HeadSpec(Readout(head=head, fields_um=None), beside_frozen)
    rng = np.random.default_rng(4)
    several = [features.adapted[0] + rng.normal(0, s, (N, 8)).astype(np.float32) for s in (0.1, 0.5, 1.0)]
    alone = [replace(features, adapted=[x]) for x in several]
    made = [Reader(data, folds, f).fit(spec, DEPTHS) for f in alone]
    each = [predicted(fit.reading.use(), f, data) for fit, f in zip(made, alone, strict=True)]
    all_of_them = replace(features, adapted=several)
    fitted = Reader(data, folds, all_of_them).fit(spec, DEPTHS)
    np.testing.assert_allclose(predicted(fitted.reading.use(), all_of_them, data), np.mean(each, axis=0), atol=1e-5)
    assert np.abs(each[0] - each[2]).max() > 1e-2
    # settings are those of the inner folds, which have one adapter each
    np.testing.assert_array_equal(fitted.table["weight"], made[0].table["weight"])
    for one, other in zip(fitted.folds, made[0].folds, strict=True):
        assert [(m.name, m.weight) for m in one.members] == [(m.name, m.weight) for m in other.members]


def test_held_out_scores_use_the_adapter_of_the_fold_alone(
    data: Data, features: Features, folds: list[InnerFold]
) -> None:
    spec = HeadSpec(Readout(context_um=150, fields_um=None))
    leaky = replace(features, adapted=[np.column_stack([data.expression] * 2).astype(np.float32)])
    one, other = (Reader(data, folds, f).fit(spec, DEPTHS) for f in (features, leaky))
    np.testing.assert_array_equal(one.table["error"], other.table["error"])
    for i in range(len(folds)):
        scores = [Reader(data, folds, f).held_out(r.folds[i], i) for f, r in ((features, one), (leaky, other))]
        np.testing.assert_array_equal(scores[0], scores[1])
    # features of another fold's adapter would give others
    swapped = replace(features, inner=features.inner[::-1])
    assert not np.array_equal(Reader(data, folds, swapped).fit(spec, DEPTHS).table["error"], one.table["error"])


@pytest.mark.parametrize("head", ["ridge", "low-rank", "blend"])
def test_a_fold_is_fitted_on_its_own_training_spots(
    data: Data, features: Features, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where folds cut a section: held-out spots are nobody's neighbours, and neither are those of the margin."""
    monkeypatch.setattr(_readout, "setting_weights", lambda errors, *rest: np.full(errors.shape, 1 / errors.size))
    one = replace(data, sections=np.repeat("A", N), groups=np.repeat("P", N), totals=np.linspace(5, 900, N))
    rows = np.arange(N)
    cut = [InnerFold(rows[rows % 3 == i], rows[rows % 3 == (i + 1) % 3], str(i)) for i in range(3)]
    spec = HeadSpec(Readout(head=head, context_um=150, fields_um=None))
    fitted = Reader(one, cut, features).fit(spec, DEPTHS)
    for i, fold in enumerate(cut):
        away = np.setdiff1d(rows, fold.train)
        y = np.asarray(one.expression).copy()
        y[away] = 40
        other_frozen = {d: x.copy() for d, x in features.frozen.items()}
        inner = [x.copy() for x in features.inner]
        for x in (*other_frozen.values(), inner[i]):
            x[away] += 2
        changed = replace(features, frozen=other_frozen, inner=inner)
        again = Reader(replace(one, expression=y), cut, changed).fit(spec, DEPTHS)
        got, want = (predicted(r.folds[i], features, one, i) for r in (again, fitted))
        np.testing.assert_allclose(got, want, atol=2e-3)


def test_radii_to_try(data: Data, features: Features, folds: list[InnerFold]) -> None:
    def radii(scale: float, **changes: Any) -> tuple[float | None, ...]:
        reader = Reader(replace(data, coords_um=data.coords_um * scale), folds, features)
        return reader.radii(Readout(**{"context_um": "auto", **changes}))

    assert radii(1) == (None, 150.0, 300.0, 500.0)
    assert radii(2) == (None, 210.0, 300.0, 500.0)  # spots 200 um apart: their nearest ones instead of 150
    assert radii(4.5) == (None, 473.0, 500.0)
    assert radii(20) == (None,)
    assert radii(1, context_um=80) == (80.0,) and radii(1, context_um=None) == (None,)
    dense = np.random.default_rng(0).uniform(0, 100, (N, 2))
    together = Reader(replace(data, coords_um=dense, sections=np.repeat("A", N)), folds, features)
    assert together.radii(Readout()) == (None, 150.0, 300.0, 500.0)  # 119 neighbours
    assert fixed_radius(Readout()) is None
    assert fixed_radius(Readout(context_um=80)) == 80.0 and fixed_radius(Readout(context_um=None)) is None


def test_radii_are_settings_like_depths(data: Data, folds: list[InnerFold]) -> None:
    # a gene that the neighbours know and the spot does not
    rng = np.random.default_rng(4)
    x = rng.normal(size=(N, 3)).astype(np.float32)
    around = neighbour_means(data.coords_um, data.sections, 150.0) @ x
    near = replace(data, expression=np.column_stack([around] * 2)[:, :4] + 0.01 * rng.normal(size=(N, 4)))
    reader = Reader(near, folds, Features({(1,): x}, (1,)))
    best = reader.fit(HeadSpec(RIDGE.replace(context_um="auto")), [(1,)])
    assert best.reading.use().radii_um == (150.0,) and len(best.reading.use().members) == 1
    errors = best.table.groupby("context_um")["error"].min()
    assert list(errors.index) == [0.0, 150.0, 300.0, 500.0] and errors.idxmin() == 150.0 and errors[0.0] > 0.9
    # where none of them knows anything, all are averaged
    noise = Reader(replace(data, expression=rng.normal(size=(N, 4))), folds, Features({(1,): x}, (1,)))
    mean = noise.fit(HeadSpec(RIDGE.replace(context_um="auto", selection="average")), [(1,)])
    used = mean.reading.use()
    assert len(used.radii_um) > 1 and sum(m.weight for m in used.members) == pytest.approx(1)
    assert mean.reading.use(context=False).radii_um == ()
    for member in used.members:
        share = mean.table.loc[mean.table["context_um"] == (member.head.context_um or 0.0), "weight"].sum()
        assert member.weight == pytest.approx(share)


def test_smoothing_is_chosen_where_it_helps(data: Data, folds: list[InnerFold]) -> None:
    rng = np.random.default_rng(5)
    wave = np.column_stack([np.sin(data.coords_um[:, 0] / 300), np.cos(data.coords_um[:, 1] / 300)])
    x = (wave + 0.7 * rng.normal(size=wave.shape)).astype(np.float32)
    y = np.column_stack([wave, wave]) + 0.05 * rng.normal(size=(N, 4))
    smooth = Reader(replace(data, expression=y), folds, Features({(1,): x}, (1,)))
    for given in (150.0, "auto"):
        fitted = smooth.fit(HeadSpec(RIDGE.replace(smooth_um=given)), [(1,)])
        assert fitted.reading.smooth_um is not None and fitted.reading.smooth_weight >= 0.5
        assert {(r.smooth_um, r.smooth_weight) for r in fitted.folds} == {
            (fitted.reading.smooth_um, fitted.reading.smooth_weight)
        }
        # the weight is that of the smallest error on held-out spots
        plain = smooth.fit(HeadSpec(RIDGE), [(1,)])
        errors = {}
        for weight in (0.0, 0.25, 0.5, 0.75, 1.0):
            total = 0.0
            for i, fold in enumerate(folds):
                at = fold.held_out
                found = plain.folds[i].expression(smooth.held_out(plain.folds[i], i)).astype(np.float64)
                mean = neighbour_means(data.coords_um[at], data.sections[at], fitted.reading.smooth_um) @ found
                total += np.square((1 - weight) * found + weight * mean - y[at]).sum()
            errors[weight] = total
        assert fitted.reading.smooth_weight == min(errors, key=lambda w: errors[w])
    # where neighbours say nothing of a spot, predictions stay what they are
    alone = Reader(replace(data, expression=x[:, [0, 1, 0, 1]].astype(float)), folds, Features({(1,): x}, (1,)))
    fitted = alone.fit(HeadSpec(RIDGE.replace(smooth_um="auto")), [(1,)])
    assert (fitted.reading.smooth_um, fitted.reading.smooth_weight) == (None, 0.0)


def test_depths_side_by_side_know_what_each_knows(
    data: Data, by_depth: dict[Depth, np.ndarray], folds: list[InnerFold]
) -> None:
    one = choose_depth(by_depth, data, folds, None)
    two = choose_depth(by_depth, data, folds, None, None, 2)
    assert one.depth in ((2,), (3,)) and two.depth == (2, 3)
    assert two.table["error"].min() < 0.2 < one.table["error"].min()
    features = Features(by_depth, (2, 3))
    fitted = Reader(data, folds, features).fit(HeadSpec(RIDGE), [two.depth])
    assert fitted.reading.sources == [Source("frozen", 0, (2, 3))]
    np.testing.assert_allclose(predicted(fitted.reading, features, data), data.expression, atol=0.5)
    assert features_at(by_depth, two.depth).shape == (N, 16)


def test_numbers_of_neighbours(data: Data) -> None:
    counts = n_neighbours(data.coords_um, data.sections, 100.0)
    direct = [
        int(((np.linalg.norm(data.coords_um - at, axis=1) < 100.1) & (data.sections == s)).sum()) - 1
        for at, s in zip(data.coords_um, data.sections, strict=True)
    ]
    assert counts.tolist() == direct and counts.max() == 4
    assert len(n_neighbours(data.coords_um, data.sections, 100.0, sample=7)) == 7
