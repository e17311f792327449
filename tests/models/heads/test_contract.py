"""What every expression head promises: choose a setting on held-out groups, fit, predict, and survive the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

import pekasc as pk
from pekasc.models.encoders._network import EncoderNetwork
from pekasc.models.heads._context import with_context
from pekasc.models.heads._registry import HEADS, FoldData, Head, HeadMethod, check_head, fit_rows
from pekasc.models.selection._folds import InnerFold

N, GENES, WIDTH, TILE_PX = 90, 6, 384, 32
ROW = pk.models.Encoder("vit_tiny_patch16_224", weights="random", model_kwargs={"depth": 2})
FOLDS = [
    InnerFold(np.setdiff1d(np.arange(N), np.arange(a, a + 30)), np.arange(a, a + 30), f"P{a // 30}")
    for a in range(0, N, 30)
]


def planted(d: int, n: int = N, noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Return features (n, d) float32 and expression (n, GENES) that is linear in four of their directions.

    The last gene never varies; the others are 0 in some spots, as expression is.
    """
    rng = np.random.default_rng(d)
    state = rng.normal(size=(n, 4))
    x = 5 + state @ rng.normal(size=(4, d)) * 3 + 0.05 * rng.normal(size=(n, d))
    y = 6 + state @ rng.normal(size=(4, GENES)) + noise * rng.normal(size=(n, GENES))
    y[:, -1] = 2.5
    return x.astype(np.float32), y


@pytest.fixture(params=HEADS, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def method(name: str) -> HeadMethod:
    return check_head(name)


@pytest.fixture(params=[12, 200], ids=["more spots than features", "fewer spots than features"], scope="module")
def d(request: pytest.FixtureRequest) -> int:
    return request.param


def chosen(method: HeadMethod, x: np.ndarray, y: Any, seed: int = 0) -> Any:
    return method.choose([FoldData(x, y, fold) for fold in FOLDS], None, seed)


def fitted(method: HeadMethod, x: np.ndarray, y: Any, seed: int = 0) -> Head:
    return method.fit(x, y, None, chosen(method, x, y, seed), seed)


def test_predicts_every_gene_of_every_spot(method: HeadMethod, d: int) -> None:
    x, y = planted(d)
    head = fitted(method, x, y)
    predicted = head.predict(x[:7])
    assert predicted.shape == (7, GENES) and predicted.dtype == np.float32 and np.isfinite(predicted).all()
    np.testing.assert_allclose(head.predict(x[:7], slice(1, 4)), predicted[:, 1:4], atol=1e-5)
    np.testing.assert_allclose(head.predict(x[3:4]), predicted[3:4], atol=1e-5)
    assert head.projection(x[:7]).shape == (7, min(256, N - 1, d))


def test_finds_the_planted_signal_on_spots_it_never_saw(method: HeadMethod, d: int) -> None:
    x, y = planted(d, n=N + 40)
    predicted = fitted(method, x[:N], y[:N]).predict(x[N:])
    for gene in range(GENES - 1):
        assert np.corrcoef(predicted[:, gene], y[N:, gene])[0, 1] > 0.95
    error = np.square(predicted - y[N:]).sum() / np.square(y[:N].mean(axis=0) - y[N:]).sum()
    assert error < 0.05


def test_noise_is_hardly_worse_than_the_mean(method: HeadMethod, d: int) -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(N + 40, d)).astype(np.float32), rng.normal(size=(N + 40, GENES))
    predicted = fitted(method, x[:N], y[:N]).predict(x[N:])
    assert np.square(predicted - y[N:]).sum() < 1.15 * np.square(y[:N].mean(axis=0) - y[N:]).sum()


def test_a_gene_that_never_varies_is_predicted_as_it_is(method: HeadMethod, d: int) -> None:
    x, y = planted(d)
    np.testing.assert_allclose(fitted(method, x, y).predict(x)[:, -1], 2.5, atol=1e-5)
    constant = np.tile(np.arange(GENES, dtype=float), (N, 1))  # and where no gene varies
    np.testing.assert_allclose(fitted(method, x, constant).predict(x), constant, atol=1e-5)


def test_sparse_expression_is_the_dense_one(method: HeadMethod, d: int) -> None:
    x, y = planted(d)
    y = np.maximum(y - 6, 0)
    thin = sparse.csr_matrix(y)
    setting = chosen(method, x, y)
    np.testing.assert_array_equal(chosen(method, x, thin), setting)
    one, other = method.fit(x, y, None, setting, 0), method.fit(x, thin, None, setting, 0)
    np.testing.assert_allclose(other.predict(x), one.predict(x), atol=1e-5)


def test_the_same_data_give_the_same_bits(method: HeadMethod, d: int) -> None:
    x, y = planted(d)
    before = x.copy(), y.copy()
    first = fitted(method, x, y).predict(x)
    np.random.seed(99)
    np.testing.assert_array_equal(fitted(method, x, y).predict(x), first)
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(y, before[1])


def test_order_of_spots_changes_nothing(method: HeadMethod, d: int) -> None:
    x, y = planted(d)
    setting = chosen(method, x, y)
    order = np.random.default_rng(0).permutation(N)
    one, other = method.fit(x, y, None, setting, 0), method.fit(x[order], y[order], None, setting, 0)
    np.testing.assert_allclose(other.predict(x), one.predict(x), atol=1e-4)


def test_a_choice_reads_both_sides_of_a_fold_and_no_spot_of_neither(method: HeadMethod, d: int) -> None:
    x, y = planted(d, noise=2.0)
    used = np.arange(60)
    folds = [InnerFold(used[:30], used[30:], "a"), InnerFold(used[30:], used[:30], "b")]

    def choice(x: np.ndarray, y: np.ndarray) -> Any:
        y = y[:, :-1]  # any penalty is as good as another for a gene that never varies
        return method.choose([FoldData(x, y, fold) for fold in folds], None, 0)

    setting = choice(x, y)
    other_x, other_y = x.copy(), y.copy()
    other_x[60:], other_y[60:] = 1e3, -1e3
    np.testing.assert_array_equal(choice(other_x, other_y), setting)
    # without anything to learn another penalty is best
    noise = np.random.default_rng(0).normal(size=y.shape)
    assert np.any(choice(x, noise) != setting)


def test_a_fold_is_fitted_on_its_training_spots_alone(name: str, method: HeadMethod, d: int) -> None:
    x, y = planted(d)
    setting = chosen(method, x, y)
    for fold in FOLDS:
        by_hand = method.fit(x[fold.train], y[fold.train], None, setting, 0).predict(x)
        np.testing.assert_allclose(
            fit_rows(name, FoldData(x, y, fold), None, setting, 0).predict(x), by_hand, atol=1e-4
        )
        changed = y.copy()
        changed[fold.held_out] = 1e3
        got = fit_rows(name, FoldData(x, changed, fold), None, setting, 0).predict(x)
        np.testing.assert_allclose(got, by_hand, atol=1e-4)


def test_the_number_of_components_is_the_one_asked_for(method: HeadMethod, d: int) -> None:
    x, y = planted(d)
    setting = method.choose([FoldData(x, y, fold) for fold in FOLDS], 5, 0)
    head = method.fit(x, y, 5, setting, 0)
    assert head.projection.components.shape == (5, d)
    limit = min(N - 1, d)
    with pytest.raises(
        ValueError, match=rf"`n_components={limit + 1}` does not fit {N} training spots with {d} features"
    ):
        method.fit(x, y, limit + 1, setting, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_features_that_are_not_finite_are_refused(method: HeadMethod, d: int, value: float) -> None:
    x, y = planted(d)
    setting = chosen(method, x, y)
    x[3, 5] = value
    which = "some" if d < 60 else "1"  # sums over spots do not know which
    with pytest.raises(ValueError, match=rf"Features of {which} of {N} spots are NaN or infinite"):
        method.fit(x, y, None, setting, 0)
    with pytest.raises(ValueError, match=rf"Features of {which} of 60 spots are NaN or infinite"):
        chosen(method, x, y)


@pytest.fixture(scope="module")
def encoder() -> EncoderNetwork:
    return EncoderNetwork(ROW, TILE_PX)


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, TILE_PX, TILE_PX, 3)).astype(np.uint8)


Make = Callable[..., pk.Adapter]


def test_an_adapter_on_disk_predicts_the_same_bits(
    method: HeadMethod, encoder: EncoderNetwork, tiles: np.ndarray, put_together: Make, tmp_path: Path
) -> None:
    head: Any = fitted(method, *planted(WIDTH))
    adapter = put_together(encoder, width=WIDTH, head=head)
    adapter.save(tmp_path / "mine")
    loaded = pk.Adapter.load(tmp_path / "mine")
    assert isinstance(loaded.head, type(head))
    for field in ("coef", "intercept", "alpha"):
        np.testing.assert_array_equal(getattr(loaded.head, field), getattr(head, field))
    features = adapter.embed(tiles, mpp=1.0, compute={"device": "cpu"})
    expected = head.predict(features)
    assert np.ptp(expected[:, :-1], axis=0).min() > 0
    for made in (adapter, loaded):
        np.testing.assert_array_equal(made.predict(tiles, mpp=1.0, compute={"device": "cpu"}), expected)


def test_with_spatial_context_it_reads_the_neighbours_of_its_section(
    method: HeadMethod, encoder: EncoderNetwork, tiles: np.ndarray, put_together: Make, tmp_path: Path
) -> None:
    head = fitted(method, *planted(2 * WIDTH))
    put_together(encoder, width=2 * WIDTH, head=head, context_um=150.0).save(tmp_path / "mine")
    adapter = pk.Adapter.load(tmp_path / "mine")
    assert adapter.context_um == 150.0
    # two sections in the same place: only their own spots are neighbours
    coords = np.tile(np.column_stack([np.arange(6) * 100.0, np.zeros(6)]), (2, 1))
    section = np.repeat(["A", "B"], 6)
    features = adapter.embed(tiles, mpp=1.0, compute={"device": "cpu"})
    got = adapter.predict(tiles, mpp=1.0, coords_um=coords, section=section, compute={"device": "cpu"})
    np.testing.assert_array_equal(got, head.predict(with_context(features, coords, section, 150.0)))
    near = [[j for j in range(12) if j != i and section[i] == section[j] and abs(i - j) == 1] for i in range(12)]
    by_hand = np.column_stack([features, np.stack([features[j].mean(axis=0) for j in near])])
    np.testing.assert_allclose(got, head.predict(by_hand), atol=1e-4)
    # one section by default, where the spots in the same place are neighbours as well
    alone = adapter.predict(tiles, mpp=1.0, coords_um=coords, compute={"device": "cpu"})
    assert np.abs(alone - got).max() > 1e-4
    with pytest.raises(ValueError, match="uses the neighbours within 150 um.*give `coords_um=`"):
        adapter.predict(tiles, mpp=1.0)
    with pytest.raises(ValueError, match=r"`coords_um` must have shape \(12, 2\)"):
        adapter.predict(tiles, mpp=1.0, coords_um=coords[:5])


def test_a_head_that_is_registered_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine:
        """A head of another kind, which knows its fold's training spots by what it is given."""

        def choose(self, *args: Any) -> float:
            return 0.5

        def fit(self, x: np.ndarray, y: Any, n_components: int | None, setting: Any, random_state: int) -> Head:
            assert len(x) == 60 and setting == 0.5
            return HEADS["ridge"].fit(x, y, n_components, setting, random_state)

    monkeypatch.setattr(HEADS, "_rows", dict(HEADS))
    HEADS.register("mine", Mine())
    x, y = planted(12)
    head = fit_rows("mine", FoldData(x, y, FOLDS[0]), None, check_head("mine").choose([], None, 0), 0)
    expected = fit_rows("ridge", FoldData(x, y, FOLDS[0]), None, 0.5, 0)
    np.testing.assert_allclose(head.predict(x), expected.predict(x), atol=1e-4)


def test_a_name_that_is_taken() -> None:
    before = HEADS["ridge"]
    with pytest.raises(ValueError, match=r"The head 'ridge' is there already \(Ridge\(\)\): take another name"):
        HEADS.register("ridge", HEADS["ridge-per-gene"])
    assert HEADS["ridge"] is before


def test_a_name_that_is_not_there() -> None:
    match = r"`head='rigde'` is not known. Close names: ridge.* Choose one of \['ridge', 'ridge-per-gene'\]\."
    with pytest.raises(ValueError, match=match):
        check_head("rigde")
    with pytest.raises(ValueError, match=r"`head=\['ridge'\]` is not known"):
        check_head(["ridge"])


def test_a_head_that_the_disk_does_not_know(encoder: EncoderNetwork, put_together: Make, tmp_path: Path) -> None:
    class Mean:
        """No ridge regression."""

        projection = fitted(check_head("ridge"), *planted(12)).projection

        def predict(self, features: np.ndarray, genes: slice = slice(None)) -> np.ndarray:
            return np.zeros((len(features), 2), dtype=np.float32)

    adapter = put_together(encoder, width=12, head=Mean())
    with pytest.raises(TypeError, match="no ridge regression cannot be saved, got Mean"):
        adapter.save(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    put_together(encoder, width=WIDTH).save(tmp_path / "mine")
    file = tmp_path / "mine" / "pekasc.json"
    file.write_text(file.read_text().replace('"head": "ridge"', '"head": "mlp"'))
    with pytest.raises(ValueError, match="has the head 'mlp', which this pekasc does not read: fit it again"):
        pk.Adapter.load(tmp_path / "mine")
