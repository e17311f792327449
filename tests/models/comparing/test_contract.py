"""What every rival of a comparison promises: it learns from training spots alone, for any head, and repeats itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData
from peft import LoraConfig
from scipy.sparse import csr_matrix
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

from pekasc import Compute, Readout, Recipe
from pekasc._expression import log1p_cp10k
from pekasc.models.comparing import _rivals
from pekasc.models.comparing._comparison import HEST, Bench, Comparison, Result
from pekasc.models.comparing._results import Results
from pekasc.models.comparing._rivals import RIVALS, Rival, adapter_rival, rival
from pekasc.models.encoders._network import EncoderNetwork
from pekasc.models.encoders._registry import resolve_encoder
from pekasc.models.features import embed
from pekasc.models.heads._registry import HEADS
from pekasc.models.selection import _student
from pekasc.models.selection._inputs import Options
from pekasc.models.teachers._pca import PcaTeacher
from pekasc.models.training._methods import known_methods
from pekasc.tiling import ArrayTiles, TileSpec
from pekasc.tl._options import check_methods, resolve_comparison

TILE_PX, SIDE, N_GENES = 28, (4, 4), 8
SECTIONS = ("A", "B", "C")  # two to train on, one to test
N = SIDE[0] * SIDE[1]
PLAIN = Readout(head="ridge", depth=2, context_um=None, fields_um=None)
READOUTS = [
    *(PLAIN.replace(head=head) for head in HEADS), PLAIN.replace(context_um=150.0), PLAIN.replace(head="blend"),
]  # fmt: skip
RECIPE = Recipe(
    rank=8, blocks=1, n_clusters=2, teacher_components=3, epochs=1, choose_epochs=False, n_views=1, batch_size=8,
    learning_rate=1e-2, cluster_head_epochs=1,
)  # fmt: skip
METHODS: dict[str, Any] = {
    **{name: name for name in (*RIVALS, *known_methods())},
    "own": LoraConfig(r=4, target_modules=["attn.proj"]),
}
OF_HEST = [name for name, method in METHODS.items() if rival(method).hest is not None]
READ_TEST_SPOTS = {"neighbours", "teacher"}  # by definition: marks to compare with, and no predictions


@dataclass(frozen=True)
class Spots:
    """Tiles and counts of three sections; what a tile shows is what its spot expresses."""

    tiles: np.ndarray
    counts: np.ndarray

    def bench(self, *, teacher: bool = True) -> Bench:
        log = csr_matrix(log1p_cp10k(AnnData(self.counts)))
        sections = np.repeat(SECTIONS, N)
        x, y = np.meshgrid(100.0 * np.arange(SIDE[0]), 100.0 * np.arange(SIDE[1]))
        train = np.flatnonzero(sections != "C")

        def make_teacher(expressed: np.ndarray, seed: int) -> PcaTeacher:
            return PcaTeacher(log[:, expressed], RECIPE.teacher_components, seed)

        return Bench(
            tiles=[ArrayTiles(self.tiles)], spec=TileSpec(TILE_PX, 2.0), log=log, counts=csr_matrix(self.counts),
            genes=[f"G{i}" for i in range(N_GENES)], groups=sections, sections=sections,
            coords_um=np.tile(np.column_stack([x.ravel(), y.ravel()]), (len(SECTIONS), 1)),
            totals=self.counts.sum(axis=1), default_groups=False,
            folds={"C": (train, np.flatnonzero(sections == "C"))}, leaky=frozenset(), teacher="pca",
            make_teacher=make_teacher if teacher else None, draws=False, teacher_fingerprint="", tiles_fingerprint="",
            fingerprint="",
        )  # fmt: skip


def spots(*, test_counts: int = 0, test_tiles: int = 0) -> Spots:
    """Return the spots; another number gives the test section other counts or tiles."""

    def rng(what: int) -> np.random.Generator:
        return np.random.default_rng(what)

    state = rng(0).uniform(size=(len(SECTIONS) * N, 3))
    test = slice(-N, None)
    counts = rng(1).poisson(2 + np.exp(3 * state @ rng(2).uniform(-1, 1, (3, N_GENES)))).astype(np.float32)
    shown = state[:, None, None] * np.ones((1, TILE_PX, TILE_PX, 1))
    tiles = np.clip(255 * shown + rng(3).normal(0, 20, shown.shape), 0, 255).astype(np.uint8)
    if test_counts:
        counts[test] = rng(test_counts).poisson(9, (N, N_GENES))
    if test_tiles:
        tiles[test] = rng(test_tiles).integers(0, 256, (N, TILE_PX, TILE_PX, 3))
    return Spots(tiles, counts)


@pytest.fixture(scope="module")
def model() -> EncoderNetwork:
    return EncoderNetwork(resolve_encoder("tiny"), TILE_PX)


Run = Callable[..., list[Result]]


@pytest.fixture(scope="module")
def run(model: EncoderNetwork) -> Run:
    """Return what compares methods on one fold."""

    def made(
        bench: Bench, methods: Mapping[str, Rival], readouts: Sequence[Readout] = READOUTS, *, protocol: str = "nested",
        seeds: Sequence[int] = (3,), recipe: Recipe = RECIPE,
    ) -> list[Result]:  # fmt: skip
        options = Options(None, recipe, readouts[0], Compute(device="cpu"), torch.device("cpu"))
        sets = {HEST: None} if protocol.startswith(HEST) else {"given": list(bench.genes)}
        comparison = Comparison(
            bench, dict(methods), readouts, tuple(seeds), protocol, sets, N_GENES, options, Results(None), Results(None)
        )
        ((_, found),) = comparison.on_encoder(model, SimpleNamespace(update=lambda n: None))
        return found

    return made


def rows(names: Sequence[str] = tuple(METHODS)) -> dict[str, Rival]:
    return {name: rival(METHODS[name]) for name in names}


HEST_READOUTS = [PLAIN.replace(depth="own"), PLAIN.replace(depth="own", context_um=150.0)]
Predicted = dict[str, list[np.ndarray]]


def _of_each(found: Sequence[Result]) -> Predicted:
    out: Predicted = {}
    for result in found:
        out.setdefault(result.method, []).append(result.prediction.predicted)
    return out


@pytest.fixture(scope="module")
def nested(run: Run) -> Predicted:
    """Return what every rival predicts, by readout."""
    return _of_each(run(spots().bench(), rows()))


@pytest.fixture(scope="module")
def nested_of_other_test_counts(run: Run) -> Predicted:
    torch.manual_seed(99)
    np.random.seed(99)
    return _of_each(run(spots(test_counts=7).bench(), rows()))


@pytest.fixture(scope="module")
def hest(run: Run) -> Predicted:
    """Return the same under HEST-Bench's protocol, whose methods all go the same way."""
    return _of_each(run(spots().bench(), rows(_some(OF_HEST)), HEST_READOUTS, protocol=HEST))


@pytest.fixture(scope="module")
def hest_of_other_test_counts(run: Run) -> Predicted:
    return _of_each(run(spots(test_counts=7).bench(), rows(_some(OF_HEST)), HEST_READOUTS, protocol=HEST))


def _some(names: Sequence[str]) -> list[str]:
    """Return the rivals by name and one that trains."""
    return [name for name in names if name in RIVALS or name == "bone"]


@pytest.mark.parametrize("name", METHODS)
def test_predicts_every_test_spot_for_every_head(name: str, nested: Predicted) -> None:
    assert len(nested[name]) == len(READOUTS)
    for predicted in nested[name]:
        assert predicted.shape == (N, N_GENES) and predicted.dtype == np.float32
        assert np.isfinite(predicted).all()


@pytest.mark.parametrize("name", _some(OF_HEST))
def test_predicts_under_the_protocol_of_hest(name: str, hest: Predicted) -> None:
    assert len(hest[name]) == len(HEST_READOUTS)
    for predicted in hest[name]:
        assert predicted.shape == (N, N_GENES) and predicted.dtype == np.float32
        assert np.isfinite(predicted).all()


@pytest.mark.parametrize("name", METHODS)
def test_what_test_spots_express_never_matters(
    name: str, nested: Predicted, nested_of_other_test_counts: Predicted
) -> None:
    """Bit for bit, whatever was drawn before: this is also the promise that the same seed repeats itself."""
    for one, other in zip(nested[name], nested_of_other_test_counts[name], strict=True):
        assert np.array_equal(one, other) == (name not in READ_TEST_SPOTS)


@pytest.mark.parametrize("name", _some(OF_HEST))
def test_what_test_spots_express_never_matters_to_hest(
    name: str, hest: Predicted, hest_of_other_test_counts: Predicted
) -> None:
    for one, other in zip(hest[name], hest_of_other_test_counts[name], strict=True):
        assert np.array_equal(one, other) == (name not in READ_TEST_SPOTS)


def test_marks_repeat_themselves(run: Run, nested: Predicted) -> None:
    again = _of_each(run(spots().bench(), rows(sorted(READ_TEST_SPOTS))))
    for name in READ_TEST_SPOTS:
        np.testing.assert_array_equal(again[name], nested[name])


def test_heads_differ_where_a_rival_reads_them(nested: Predicted) -> None:
    for name, predicted in nested.items():
        ridge, per_gene, low_rank, context, blend = predicted
        if name in ("mean", "neighbours", "lazy"):
            assert all((ridge == other).all() for other in (per_gene, low_rank, context, blend)), name
            continue
        assert not np.array_equal(ridge, per_gene) and not np.array_equal(ridge, low_rank), name
        # what a spot expresses is known: its neighbours would only blur the upper bound
        assert np.array_equal(ridge, context) == (name in ("teacher", "coordinates")), name
        # of a blend, what has no adapter at all reads its first head; the others average several
        assert np.array_equal(low_rank, blend) == (name in ("teacher", "coordinates", "frozen")), name


def test_frozen_features_take_the_place_of_an_adapter_in_a_blend(run: Run) -> None:
    """The gain of the adapter stands beside the gain of the reading: an adapter that did nothing has the same score."""
    untrained = replace(RECIPE, epochs=0)
    (frozen,) = run(spots().bench(), rows(["frozen-best"]), [Readout(depth="all", context_um=None, fields_um=None)])
    (bone,) = run(
        spots().bench(), rows(["bone"]), [Readout(depth="all", context_um=None, fields_um=None)], recipe=untrained
    )
    np.testing.assert_allclose(bone.prediction.predicted, frozen.prediction.predicted, atol=1e-4)


def test_lazy_is_what_one_would_write(run: Run, model: EncoderNetwork) -> None:
    given = spots()
    (found,) = run(given.bench(), rows(["lazy"]), READOUTS[:1])
    x = embed(model, ArrayTiles(given.tiles), [(model.n_blocks,)], batch_size=64, device=torch.device("cpu"))
    features, y = x[model.n_blocks,], log1p_cp10k(AnnData(given.counts))
    y = np.asarray(y.todense() if hasattr(y, "todense") else y)
    scaler = StandardScaler().fit(features[:-N])
    ridge = RidgeCV(alphas=np.logspace(-1, 5, 13)).fit(scaler.transform(features[:-N]), y[:-N])
    np.testing.assert_allclose(found.prediction.predicted, ridge.predict(scaler.transform(features[-N:])), atol=1e-3)
    assert found.prediction.about["depth"] == str(model.n_blocks)
    assert found.prediction.about["alpha"] == pytest.approx(ridge.alpha_)


def test_the_tuned_protocol_is_the_other_with_another_penalty(run: Run, hest: Predicted) -> None:
    found = run(spots().bench(), rows(["frozen", "mean"]), HEST_READOUTS, protocol="hest-tuned")
    tuned = _of_each(found)
    for one, other in zip(tuned["mean"], hest["mean"], strict=True):
        np.testing.assert_array_equal(one, other)
    assert not any(np.array_equal(a, b) for a, b in zip(tuned["frozen"], hest["frozen"], strict=True))
    strengths = [r.prediction.about["alpha"] for r in found if r.method == "frozen"]
    assert all(strength > 1 for strength in strengths)  # between sections, HEST-Bench's is far too small
    # counts of the test section never choose it
    others = _of_each(run(spots(test_counts=7).bench(), rows(["frozen"]), HEST_READOUTS, protocol="hest-tuned"))
    for one, other in zip(tuned["frozen"], others["frozen"], strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match='`protocol="hest-tuned"` chooses nothing inside the fold, so it has no'):
        check_methods(["frozen-best"], "hest-tuned")
    with pytest.raises(ValueError, match='is not known. Choose "nested", "hest" or "hest-tuned"'):
        check_methods(["frozen"], "hest-tune")


def test_rows_say_what_a_rival_reads(run: Run, nested: Predicted) -> None:
    some = _some(list(METHODS))
    others = _of_each(run(spots(test_tiles=7).bench(), rows(some)))
    for name in some:
        same = all(np.array_equal(one, other) for one, other in zip(nested[name], others[name], strict=True))
        assert same != rival(name).reads_image, name
    # the others never ask for a teacher
    without = [name for name in some if not rival(name).reads_teacher]
    alone = _of_each(run(spots().bench(teacher=False), rows(without)))
    for name in without:
        np.testing.assert_array_equal(alone[name], nested[name])


def test_what_trains_differs_from_what_does_not(nested: Predicted) -> None:
    trained = [name for name, method in METHODS.items() if rival(method).trains is not None]
    for name in trained:
        assert not any(np.array_equal(nested[name][0], nested[other][0]) for other in nested if other != name), name


def test_only_what_draws_runs_for_every_seed(run: Run) -> None:
    found = run(spots().bench(), rows(["mean", "frozen", "teacher", "bone"]), READOUTS[:1], seeds=(3, 4))
    assert [(r.method, r.seed) for r in found] == [
        ("mean", 3), ("frozen", 3), ("teacher", 3), ("bone", 3), ("bone", 4)
    ]  # fmt: skip
    assert not np.array_equal(found[-1].prediction.predicted, found[-2].prediction.predicted)


def test_rivals_that_share_a_training_train_once(run: Run, nested: Predicted, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []
    original = _student.train_student

    def spy(*args: Any, **kwargs: Any) -> Any:
        trained.append("")
        return original(*args, **kwargs)

    monkeypatch.setattr(_student, "train_student", spy)
    names = ["frozen+peka", "mean", "bone"]
    found = run(spots().bench(), rows(names))
    assert len(trained) == 3  # two inner folds and the final fit, for two rivals and all readouts
    assert [r.method for r in found] == [name for name in names for _ in READOUTS]  # in the order that was asked for
    for name in names:
        np.testing.assert_array_equal(_of_each(found)[name], nested[name])
    about = {r.method: r.prediction.about for r in found}
    assert about["bone"]["n_parameters"] == about["frozen+peka"]["n_parameters"] > 0
    assert about["bone"]["epochs"] == 1 and about["bone"]["depth"] == "2"
    trained.clear()
    run(spots().bench(), rows(["bone", "lora"]), READOUTS[:1])
    assert len(trained) == 6


@pytest.mark.parametrize("name", METHODS)
def test_hest_has_the_rows_that_say_so(name: str) -> None:
    row = rival(METHODS[name])
    if row.hest is not None:
        assert check_methods([METHODS[name]], HEST)
        return
    with pytest.raises(
        ValueError, match='`protocol="hest"` chooses nothing inside the fold, so it has no .*' + name[:6]
    ):
        check_methods([METHODS[name]], HEST)


def test_what_hest_leaves_out() -> None:
    assert {name for name, row in RIVALS.items() if row.hest is None} == {
        "coordinates", "lazy", "frozen-best", "frozen+peka",
    }  # fmt: skip


def test_a_rival_that_is_registered_is_known(run: Run, nested: Predicted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RIVALS, "_rows", dict(RIVALS))
    RIVALS.register("mine", replace(RIVALS["mean"], name="mine"))
    call = resolve_comparison(["mine", "mean"], "tiny", "pca", "nested", [0], None, None, None)
    found = _of_each(run(spots().bench(), call.methods))
    np.testing.assert_array_equal(found["mine"], nested["mean"])
    with pytest.raises(ValueError, match=r"The rival 'mine' is there already \(Rival.*: take another name"):
        RIVALS.register("mine", RIVALS["frozen"])
    assert RIVALS["mine"].predict is RIVALS["mean"].predict


def test_a_name_that_is_not_there() -> None:
    message = (
        r"`methods='frozen_best'` is not known\. Close names: frozen-best, .* Choose one of \['mean', .*'bone'.*PeftC"
    )
    with pytest.raises(ValueError, match=message):
        check_methods(["frozen_best"], "nested")
    with pytest.raises(ValueError, match="'frozen_best'.* is not known"):
        rival("frozen_best")


def test_an_adapter_is_a_rival_by_its_method() -> None:
    assert rival("bone").name == "bone" and rival("bone").trains == "bone"
    config = LoraConfig(r=2)
    assert rival(config).trains is config and rival(config).reads_teacher
    assert adapter_rival("bat", in_hest=False).hest is None
    # the names of rivals come first: none hides a method
    assert not set(RIVALS) & set(known_methods())
    assert _rivals.BEST_FROZEN in RIVALS
