"""tl.cross_validate: nothing leaks, nothing is computed twice, nothing is dropped in silence."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from anndata import AnnData
from peft import LoraConfig
from scipy.sparse import csr_matrix
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import get_transformation

import pekasc as pk
from pekasc._ceiling import noise_ceiling
from pekasc.models.comparing import _comparison, _rivals
from pekasc.models.comparing._fold import Prediction
from pekasc.models.comparing._rivals import RIVALS
from pekasc.models.encoders._network import EncoderNetwork
from pekasc.models.encoders._registry import resolve_encoder
from pekasc.models.features import FeatureFiles
from pekasc.models.teachers._pca import PcaTeacher
from pekasc.models.teachers._registry import TEACHERS, Source
from pekasc.models.training._methods import known_methods
from pekasc.tl._options import resolve_comparison

FIRST, SECOND = "P1S1_spots", "P2S1_spots"
HOLD_OUT_SECOND = {"P2": ([FIRST], [SECOND])}
# one epoch on tiles as they are: enough for what is not about how good an adapter gets
SMALL = pk.Recipe(epochs=1, rank=8, blocks=1, n_views=1, cluster_head_epochs=2)
CPU = pk.Compute(device="cpu")
# one ridge regression at the best depth: most of what is tested here is not how well features are read
RIDGE = pk.Readout.preset("ridge").replace(n_depths=None)
# just wider than the tile: one section of 0.7 mm has room for no other margin
FIELD = (116.0,)
WIDE = RIDGE.replace(fields_um=FIELD, orientations=2)


def compare(
    sdata: SpatialData,
    methods: Sequence[Any] | Mapping[str, Any],
    *,
    compute: Mapping[str, Any] | None = None,
    **how: Any,
) -> pd.DataFrame:
    """Return a comparison of a few genes on the CPU."""
    how = {"genes": "svg", "n_genes": 8, "progress": False, "readout": RIDGE, **how}
    return pk.tl.cross_validate(sdata, methods=methods, compute={"device": "cpu", **(compute or {})}, **how)


def by_method(frame: pd.DataFrame, section: str = "pooled") -> pd.Series:
    return frame[frame["section"] == section].groupby("method")["pearson"].mean()


def same(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    return one.drop(columns="seconds").equals(other.drop(columns="seconds"))


def counts_of(sdata: SpatialData) -> np.ndarray:
    return sdata["table"].X.toarray()


def in_section(sdata: SpatialData, section: str) -> np.ndarray:
    return (sdata["table"].obs["region"] == section).to_numpy()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by every fit of a fold: the name of the rival, or "adapted"."""
    done: list[str] = []

    def spied(original: Callable[..., list[Prediction]], name: str) -> Callable[..., list[Prediction]]:
        def spy(*args: Any) -> list[Prediction]:
            done.append(name)
            return original(*args)

        return spy

    for name, row in RIVALS.items():
        if row.trains is None:
            monkeypatch.setitem(RIVALS._rows, name, replace(row, predict=spied(row.predict, name)))
    monkeypatch.setattr(_rivals, "predict_adapted", spied(_rivals.predict_adapted, "adapted"))
    return done


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by every encoder that is built."""
    built: list[str] = []
    original = EncoderNetwork.__init__

    def spy(self: EncoderNetwork, encoder: pk.models.Encoder, *args: Any, **kwargs: Any) -> None:
        built.append(encoder.short)
        original(self, encoder, *args, **kwargs)

    monkeypatch.setattr(EncoderNetwork, "__init__", spy)
    return built


@pytest.fixture(scope="module")
def frame(_tiled: SpatialData) -> pd.DataFrame:
    """Return a comparison of what trains nothing, without and with context."""
    # numba's OpenMP layer, under scanpy and squidpy, sets the number of threads of the whole process
    assert torch.get_num_threads() == 1
    readout = [RIDGE, RIDGE.replace(context_um=200.0)]
    made = compare(_tiled, ["mean", "frozen", "frozen-best"], genes=["svg", "hvg"], readout=readout)
    assert torch.get_num_threads() == 1
    return made


@pytest.fixture(scope="module")
def plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Return its rows without context, of one gene set."""
    return frame[(frame["context_um"] == "") & (frame["genes"] == "svg")].reset_index(drop=True)


def test_one_row_per_fold_section_method_readout_and_set(frame: pd.DataFrame) -> None:
    assert not frame.duplicated(["fold", "section", "method", "readout", "seed", "genes"]).any()
    assert len(frame) == 2 * 2 * 3 * 2 * 2
    assert set(frame["fold"]) == {"P1", "P2"}
    assert set(frame.loc[frame["fold"] == "P1", "section"]) == {"pooled", FIRST}
    assert (frame.loc[frame["genes"] == "svg", "n_genes"] == 8).all()
    assert set(frame["context_um"]) == {"", "200"}
    assert set(frame["readout"]) == {repr(RIDGE), repr(RIDGE.replace(context_um=200.0))}
    assert (frame["head"] == "ridge").all() and (frame["fields_um"] == "").all() and (frame["orientations"] == 1).all()
    assert (frame.loc[frame["method"] == "mean", "pearson"] == 0).all()
    best = frame["method"] == "frozen-best"
    assert frame.loc[best, "difference"].isna().all() and frame.loc[~best, "difference"].notna().all()
    # blocks of 1 mm: a section of 0.7 mm has too few for an interval, and none is made up
    assert frame["pearson_low"].isna().all()


def test_ceilings_are_of_the_test_spots_and_the_same_for_every_method(tiled: SpatialData, frame: pd.DataFrame) -> None:
    genes = compare(tiled, ["mean", "frozen"], genes=["svg", "hvg"], per_gene=True)
    table = tiled["table"]
    totals = table.X.sum(axis=1, dtype=np.float64).A1
    for section in (FIRST, SECOND):
        at = in_section(tiled, section)
        expected = pd.Series(noise_ceiling(table.X[at], totals[at]), index=table.var_names)
        rows = genes[genes["section"] == section]
        np.testing.assert_allclose(rows["ceiling"], expected[rows["gene"]])
        np.testing.assert_allclose(rows["reached"], rows["pearson"] / rows["ceiling"])
        for name, single in rows[rows["method"] == "frozen"].groupby("genes"):
            means = frame[(frame["section"] == section) & (frame["genes"] == name)]
            assert len(means) == 2 * 3  # readouts and methods
            np.testing.assert_allclose(means["ceiling"], single["ceiling"].mean())
            np.testing.assert_allclose(means["reached"], means["pearson"] / means["ceiling"])
            assert (means.loc[means["method"] == "mean", "reached"] == 0).all()


GENES_OF_A_FIT = 6
RECIPE_OF_A_FIT = pk.Recipe(
    epochs=1, rank=8, blocks=2, n_views=2, learning_rate=1e-3, cluster_head_epochs=2, choose_epochs=False
)
READOUTS_OF_A_FIT = {"plain": RIDGE.replace(n_depths=1), "fields": WIDE.replace(n_depths=1)}


@pytest.fixture(scope="module")
def beside_fits(_tiled: SpatialData) -> pd.DataFrame:
    """Return a comparison of what `fit_adapter` can do as well."""
    made = compare(
        _tiled, ["frozen-best", "bone"], genes=list(_tiled["table"].var_names[:GENES_OF_A_FIT]), seeds=[4],
        folds=HOLD_OUT_SECOND, recipe=RECIPE_OF_A_FIT, readout=list(READOUTS_OF_A_FIT.values()),
    )  # fmt: skip
    assert made["epochs"].max() == 1
    return made


@pytest.mark.parametrize("reading", READOUTS_OF_A_FIT)
@pytest.mark.parametrize(("name", "method"), [("frozen-best", None), ("bone", "bone")])
def test_a_fold_equals_fit_adapter_and_evaluate(
    tiled: SpatialData, beside_fits: pd.DataFrame, name: str, method: str | None, reading: str
) -> None:
    readout = READOUTS_OF_A_FIT[reading]
    adapter = pk.tl.fit_adapter(
        tiled, method=method, train=[FIRST], genes=list(tiled["table"].var_names[:GENES_OF_A_FIT]), random_state=4,
        recipe=RECIPE_OF_A_FIT, readout=readout, compute=CPU, progress=False,
    )  # fmt: skip
    pk.tl.predict_expression(tiled, adapter, progress=False, compute=CPU)
    found = beside_fits[beside_fits["section"] == SECOND].set_index(["method", "readout"]).loc[(name, repr(readout))]
    assert found["pearson"] == pytest.approx(pk.tl.evaluate(tiled)["pearson"].mean(), abs=1e-4)
    assert found["depth"] == adapter.info["depth"] and found["alpha"] == pytest.approx(adapter.info["alpha"])
    if method is not None:
        assert found["epochs"] == adapter.info["epochs"] and found["n_parameters"] == adapter.info["n_parameters"]


def test_test_spots_teach_nothing(tiled: SpatialData) -> None:
    """Whatever the test spots express, what is predicted for them stays the same."""
    methods = ["mean", "coordinates", "frozen", "frozen-best", "bone", "frozen+peka"]
    how: dict[str, Any] = {"genes": ["svg", "hvg"], "recipe": SMALL, "folds": HOLD_OUT_SECOND}
    before = _predictions(tiled, methods, **how)
    table = tiled["table"]
    test = np.flatnonzero(in_section(tiled, SECOND))
    counts = counts_of(tiled)
    counts[test] = np.random.default_rng(0).permutation(counts[test].ravel()).reshape(counts[test].shape)
    table.X = csr_matrix(counts)
    after = _predictions(tiled, methods, **how)
    assert before.keys() == after.keys() == set(methods)
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name], err_msg=name)
    # and a training spot does teach
    first = np.flatnonzero(in_section(tiled, FIRST))[0]
    counts[first] = counts[first][::-1]
    table.X = csr_matrix(counts)
    assert not np.array_equal(_predictions(tiled, ["frozen"], **how)["frozen"], before["frozen"])


def _predictions(sdata: SpatialData, methods: Sequence[str], **how: Any) -> dict[str, np.ndarray]:
    with TemporaryDirectory() as folder:
        compare(sdata, methods, store=folder, **how)
        return {
            path.parent.name.removeprefix("P2-tiny-").rsplit("-", 1)[0]: np.load(path)
            for path in Path(folder).glob("P2-*/predicted.npy")
        }


def test_an_encoder_is_built_once_and_every_training_runs_once(
    tiled: SpatialData, networks: list[str], counted: list[str]
) -> None:
    """Four methods on three folds, read without and with context."""
    half = in_section(tiled, SECOND) & (np.arange(tiled["table"].n_obs) % 2 == 0)
    folds = {"P1": ([SECOND], [FIRST]), "P2": ([FIRST], [SECOND]), "half": ([FIRST], half)}
    readout = [RIDGE, RIDGE.replace(context_um=200.0)]
    methods = ["mean", "frozen-best", "bone", "frozen+peka"]
    both = compare(tiled, methods, folds=folds, recipe=SMALL, readout=readout)
    assert networks == ["tiny"]
    assert sorted(set(counted)) == ["adapted", "frozen-best", "mean"]
    assert counted.count("adapted") == 3  # one a fold: PEKA's features are read alone and beside the frozen ones
    assert list(both["method"].unique()) == methods
    one = compare(tiled, ["bone"], folds=HOLD_OUT_SECOND, recipe=SMALL, readout=RIDGE.replace(context_um=200.0))
    alone = both[(both["context_um"] == "200") & (both["method"] == "bone") & (both["fold"] == "P2")]
    columns = ["fold", "section", "readout", "pearson", "rmse", "depth", "epochs", "alpha", "n_parameters"]
    pd.testing.assert_frame_equal(alone[columns].reset_index(drop=True), one[columns], check_dtype=False)


def test_the_published_recipe_and_features(tiled: SpatialData, networks: list[str], counted: list[str]) -> None:
    """With readouts that differ in their fields of view: each has its own training, and its own rival."""
    recipe = pk.Recipe.preset("paper").replace(
        n_clusters=4, teacher_components=10, epochs=1, rank=16, cluster_head_epochs=2
    )
    own = pk.Readout.preset("paper").replace(n_components=10)
    found = compare(
        tiled,
        ["frozen-best", "bone"],
        folds=HOLD_OUT_SECOND,
        recipe=recipe,
        readout=[own, own.replace(fields_um=FIELD)],
    )
    assert networks == ["tiny"] and counted.count("adapted") == 2
    bone = found[found["method"] == "bone"]
    assert (bone["depth"] == "own").all() and (bone["epochs"] == 1).all()
    assert list(bone["fields_um"].unique()) == ["", "116"]
    table = pk.get.comparison(found)
    assert table.index.names == ["encoder", "context_um", "readout", "genes", "method"]
    scores = found[found["section"] == SECOND].set_index(["readout", "method"])["pearson"]
    for readout in found["readout"].unique():
        row = table.loc[("tiny", "", readout, "svg", "bone")]
        assert row["pearson"] == pytest.approx(scores[readout, "bone"])
        assert row["difference"] == pytest.approx(scores[readout, "bone"] - scores[readout, "frozen-best"])
    assert scores.nunique() == 4


def test_goes_on_where_it_was_interrupted(tiled: SpatialData, tmp_path: Path, counted: list[str]) -> None:
    how: dict[str, Any] = {"recipe": SMALL}
    whole = compare(tiled, ["mean", "frozen", "bone"], **how)
    assert counted.count("adapted") == 2
    counted.clear()
    compare(tiled, ["mean", "bone"], store=tmp_path, **how)
    assert sorted(set(counted)) == ["adapted", "mean"]
    # half of it is lost, and a piece is left half written
    lost = sorted(tmp_path.glob("P2-*bone*"))
    assert len(lost) == 1
    lost[0].rename(tmp_path / f".{lost[0].name}.1.part")
    counted.clear()
    resumed = compare(tiled, ["mean", "frozen", "bone"], store=tmp_path, **how)
    assert counted.count("adapted") == 1 and counted.count("mean") == 0
    assert same(whole, resumed)
    # other settings are other results
    counted.clear()
    other = SMALL.replace(rank=4)
    compare(tiled, ["mean", "bone"], folds=HOLD_OUT_SECOND, recipe=other, store=tmp_path)
    assert counted.count("adapted") == 1
    assert counted.count("mean") == 0  # which has no rank


def test_frozen_features_are_kept_in_files_that_are_read_as_needed(
    tiled: SpatialData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"methods": ["frozen-best"]}
    plain = compare(tiled, **how)
    # more than may be held in memory, without a cache and with one: in half precision
    rounded = compare(tiled, **how, compute={"max_memory": 1})
    np.testing.assert_allclose(rounded["pearson"], plain["pearson"], atol=5e-3)
    assert same(compare(tiled, **how, compute={"cache": tmp_path, "max_memory": 1}), rounded)
    (kept,) = tmp_path.glob("frozen-tiny-*")
    assert not list(tmp_path.glob(".*"))  # nothing half done
    assert len(list(kept.glob("*.npy"))) > 1  # one of every depth
    assert not list(tmp_path.glob("P*"))  # predictions belong in `store=`
    with monkeypatch.context() as patch:
        patch.setattr(_comparison, "embed", None)  # computed once
        assert same(compare(tiled, **how, compute={"cache": tmp_path}), rounded)
    damaged = sorted(kept.glob("*.npy"))[0]
    damaged.write_bytes(damaged.read_bytes()[:1000])
    for harm in (lambda: None, damaged.unlink, lambda: (kept / "about.json").unlink()):
        harm()
        with pytest.raises(ValueError, match=f"{kept.name}' cannot be read .* delete it to compute"):
            compare(tiled, **how, n_genes=7, compute={"cache": tmp_path})


def test_features_of_all_depths_are_not_in_memory_at_once(
    tiled: SpatialData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    row = RIVALS["frozen-best"]

    def spy(fold: Any, encoded: Any, *rest: Any) -> list[Prediction]:
        seen.append(encoded.frozen)
        return row.predict(fold, encoded, *rest)

    monkeypatch.setitem(RIVALS._rows, "frozen-best", replace(row, predict=spy))
    compare(tiled, ["frozen-best"], compute={"max_memory": 1})
    assert seen and all(isinstance(features, FeatureFiles) for features in seen)
    seen.clear()
    compare(tiled, ["frozen-best"], compute={"cache": tmp_path})
    assert seen and all(isinstance(x, np.memmap) for features in seen for x in features.values())


def test_every_readout_has_its_own_place_in_a_store(tiled: SpatialData, tmp_path: Path, counted: list[str]) -> None:
    readouts = [RIDGE, RIDGE.replace(fields_um=FIELD), RIDGE.replace(orientations=2)]
    frames = []
    for i, readout in enumerate(readouts):
        counted.clear()
        frames.append(compare(tiled, ["mean", "frozen"], readout=readout, store=tmp_path))
        # what reads no image is computed once
        assert counted.count("mean") == (2 if i == 0 else 0) and counted.count("frozen") == 2
    together = compare(tiled, ["mean", "frozen"], readout=readouts)
    joined = pd.concat(frames)
    order = ["readout", "fold", "section", "method"]
    assert same(*(x.sort_values(order).reset_index(drop=True) for x in (joined, together)))
    assert (frames[2]["orientations"] == 2).all() and (frames[2]["fields_um"] == "").all()
    assert (frames[1]["fields_um"] == "116").all()
    table = pk.get.comparison(joined, rival="mean")
    pd.testing.assert_frame_equal(table, pk.get.comparison(together, rival="mean").loc[table.index])
    rows = table.xs("frozen", level="method")
    assert list(rows.index.get_level_values("readout")) == [repr(readout) for readout in readouts]
    np.testing.assert_allclose(rows["difference"], rows["pearson"])  # the mean of the same readout scores 0


def test_too_few_spots_beside_the_widest_tiles_are_found_before_embedding(
    tiled: SpatialData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_comparison, "embed", None)
    with pytest.raises(ValueError, match="Too few training spots .* [Ww]ithin 316.8 um"):
        compare(tiled, ["frozen"], readout=RIDGE.replace(fields_um=(224,)))


def test_differences_per_gene_add_up_to_that_of_the_mean(tiled: SpatialData, frame: pd.DataFrame) -> None:
    genes = compare(tiled, ["mean", "frozen", "frozen-best"], genes=["svg", "hvg"], per_gene=True)
    keys = ["fold", "section", "method", "genes"]
    expected = frame[frame["context_um"] == ""].set_index(keys)["difference"].dropna().sort_index()
    found = genes.groupby(keys)["difference"].mean().dropna().sort_index()
    assert len(expected) == 2 * 2 * 2 * 2
    pd.testing.assert_series_equal(found, expected)
    assert genes.loc[genes["method"] == "frozen-best", "difference"].isna().all()


def test_other_counts_are_not_taken_from_the_store(tiled: SpatialData, tmp_path: Path) -> None:
    first = compare(tiled, ["frozen"], store=tmp_path)
    tiled["table"].X = csr_matrix(np.random.default_rng(0).permutation(counts_of(tiled)))
    second = compare(tiled, ["frozen"], store=tmp_path)
    assert not np.allclose(by_method(first), by_method(second))


def test_a_damaged_result_is_named(tiled: SpatialData, tmp_path: Path) -> None:
    compare(tiled, ["mean"], store=tmp_path)
    path = next(tmp_path.glob("P1-*mean*/predicted.npy"))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=rf"{path.parent.name}' cannot be read .* delete it to compute it again"):
        compare(tiled, ["mean"], store=tmp_path)


@pytest.fixture(scope="module")
def four_tiles(_tiled: SpatialData) -> tuple[np.ndarray, np.ndarray]:
    """Return a few tiles and their frozen features."""
    tiles = pk.get.tiles(_tiled)[:4].to_numpy()
    frozen = pk.tl.fit_adapter(
        _tiled, method=None, train=[FIRST], progress=False, readout=RIDGE.replace(depth=2), compute={"device": "cpu"}
    )
    return tiles, frozen.embed(tiles, mpp=2.0, compute=CPU)


@pytest.mark.parametrize(
    "method", [*known_methods(), LoraConfig(r=4)], ids=lambda m: m if isinstance(m, str) else "own"
)
def test_every_method_trains_and_comes_back(
    tiled: SpatialData, tmp_path: Path, four_tiles: tuple[np.ndarray, np.ndarray], method: Any
) -> None:
    recipe = pk.Recipe.preset("paper").replace(
        rank=8, n_clusters=4, teacher_components=10, epochs=2, blocks=1, learning_rate=3e-3, cluster_head_epochs=2
    )
    readout = pk.Readout.preset("paper").replace(n_components=10, depth=2)
    adapter = pk.tl.fit_adapter(
        tiled, method=method, train=[FIRST], progress=False, recipe=recipe, readout=readout, compute=CPU
    )
    assert adapter.info["n_parameters"] > 0
    tiles, frozen = four_tiles
    features = adapter.embed(tiles, mpp=2.0, compute=CPU)
    assert np.abs(features - frozen).max() > 1e-5
    adapter.save(tmp_path / "adapter")
    again = pk.Adapter.load(tmp_path / "adapter").embed(tiles, mpp=2.0, compute=CPU)
    np.testing.assert_array_equal(features, again)
    merged = adapter.merge()
    assert not [name for name, _ in merged.named_modules() if "lora" in name or "miss" in name or "hra" in name]


def test_teacher_is_an_upper_bound_and_neighbours_smooth(tiled: SpatialData) -> None:
    scores = by_method(compare(tiled, ["mean", "neighbours", "teacher", "frozen"]))
    assert scores["teacher"] > scores["frozen"] > scores["mean"] == 0
    assert scores["neighbours"] > 0.1


def test_neighbours_mean(tiled: SpatialData) -> None:
    genes = list(tiled["table"].var_names[:3])
    predicted = _predictions(tiled, ["neighbours"], folds=HOLD_OUT_SECOND, genes=genes)
    part = pk.get.tiles(tiled)["tile"].to_numpy()
    table = tiled["table"][part]
    table = table[(table.obs["region"] == SECOND).to_numpy()]
    counts = table.X.toarray()
    log = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))[:, :3]
    xy = table.obsm["spatial"]
    at = np.argsort(np.linalg.norm(xy[:1] - xy, axis=1), kind="stable")[1:7]
    order = np.argsort([list(table.var_names).index(g) for g in genes])
    np.testing.assert_allclose(predicted["neighbours"][0], log[at][:, order].mean(axis=0), atol=1e-5)


def test_constant_genes_are_named(tiled: SpatialData) -> None:
    table = tiled["table"]
    counts = counts_of(tiled)
    counts[in_section(tiled, SECOND), 1] = 0
    table.X = csr_matrix(counts)
    genes = list(table.var_names[:4])
    how: dict[str, Any] = {"methods": ["mean", "frozen"], "genes": genes, "folds": HOLD_OUT_SECOND}
    with pytest.warns(UserWarning, match=rf"Fold 'P2': 1 genes are constant .*\['{genes[1]}'\]"):
        frame = compare(tiled, **how)
    assert (frame["n_undefined"] == 1).all() and frame["pearson"].notna().all()
    with pytest.warns(UserWarning, match="constant"):
        single = compare(tiled, per_gene=True, **how)
    nan = single.loc[single["pearson"].isna(), "gene"].unique()
    assert list(nan) == [genes[1]]
    assert len(single) == 2 * 2 * 4


def test_shuffled_labels_score_nothing(tiled: SpatialData, tmp_path: Path) -> None:
    table = tiled["table"]
    counts = counts_of(tiled)
    rng = np.random.default_rng(0)
    regions = table.obs["region"].to_numpy()
    means = []
    for _ in range(6):
        order = np.arange(len(counts))
        for region in np.unique(regions):
            at = np.flatnonzero(regions == region)
            order[at] = rng.permutation(at)
        table.X = csr_matrix(counts[order])
        # the tiles stay the same: they are embedded once
        means.append(by_method(compare(tiled, ["frozen", "frozen-best"], compute={"cache": tmp_path})))
    frame = pd.DataFrame(means)
    assert (frame.mean().abs() < 3 * frame.std() / len(frame) ** 0.5 + 0.02).all()


HEST_READOUT = pk.Readout(head="ridge", selection="best", depth="own", context_um=None, fields_um=None)


def test_hest_protocol(tiled: SpatialData) -> None:
    recipe = SMALL.replace(n_clusters=3)
    with pytest.warns(UserWarning, match="HEST-Bench has tiles of 224 px"):
        frame = pk.tl.cross_validate(
            tiled, methods=["mean", "frozen", "teacher", "bone"], protocol="hest", n_genes=8, progress=False,
            recipe=recipe, compute=CPU,
        )  # fmt: skip
    assert set(frame["genes"]) == {"hest"} and set(frame["readout"]) == {repr(HEST_READOUT)}
    assert by_method(frame)["teacher"] > by_method(frame)["frozen"]
    assert frame[["ceiling", "reached"]].isna().all(axis=None)  # its target is not normalised
    pooled = frame[(frame["section"] == "pooled") & (frame["method"] == "frozen")]
    table = pk.get.comparison(frame, rival="frozen")
    assert table.loc[("tiny", "", "hest", "frozen"), "pearson"] == pytest.approx(pooled["pearson"].mean())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"methods": ["frozen-best"]}, '`protocol="hest"` chooses nothing inside the fold, so it has no .frozen-best'),
        (
            {"readout": {"head": "ridge-per-gene"}},
            "`readout`: 'head' does nothing in this call: HEST-Bench has a regression of its own. Leave it out",
        ),
        (
            {"readout": {"depth": "best", "n_depths": 1}},
            "'(n_depths|depth)' does nothing in this call: HEST-Bench has a regression of its own",
        ),
        (
            {"readout": {"fields_um": (224,)}},
            "'fields_um' does nothing in this call: HEST-Bench embeds every tile once",
        ),
        (
            {"readout": pk.Readout(orientations=2)},
            r"has features and a regression of its own: leave .'orientations'",
        ),
        ({"genes": "svg"}, '`protocol="hest"` has genes of its own: leave `genes=` out'),
    ],
)
def test_what_hest_decides_by_itself(tiled: SpatialData, how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pk.tl.cross_validate(tiled, **{"methods": ["frozen"], "protocol": "hest", "progress": False, **how})


def test_hest_takes_the_published_recipe() -> None:
    """Which brings no readout there: HEST-Bench has its own."""
    call = resolve_comparison(["bone"], "tiny", "pca", "hest", [0], "paper", None, CPU)
    assert call.recipe == pk.Recipe.preset("paper") and call.readouts == [HEST_READOUT]


def test_folds_by_column_and_by_section(tiled: SpatialData) -> None:
    pk.pp.split(tiled, groups="patient")
    by_column = compare(tiled, ["frozen"], folds="fold")
    by_patient = compare(tiled, ["frozen"], groups="patient")
    assert set(by_column["fold"]) == {"0", "1"}
    np.testing.assert_array_equal(by_column["pearson"], by_patient["pearson"])
    tiled["table"].obs["patient"] = "one"
    with pytest.warns(UserWarning, match="say little about another patient"):
        compare(tiled, ["mean"])


BEST = {"methods": ["frozen-best"]}


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"methods": ["bones"]}, ValueError, "'bones'` is not known. Close names: bone. Choose one of .*'frozen-best'"),
        ({"methods": []}, ValueError, "`methods=` is empty"),
        ({"methods": [None]}, ValueError, "None is the frozen encoder of `fit_adapter`; write"),
        (
            {"methods": ["adalora"], "recipe": {"epochs": 1, "blocks": 1, "n_views": 1}},
            ValueError,
            "AdaLoRA plans its ranks .* too few",
        ),
        ({"n_genes": 0}, ValueError, "`n_genes=0` must be a whole number, at least 1"),
        ({"n_genes": 5.5}, TypeError, "`n_genes=5.5` must be a whole number"),
        ({"n_bootstrap": 0}, ValueError, "`n_bootstrap=0` must be a whole number, at least 1"),
        ({"genes": None}, ValueError, "`genes=None`: name sets"),
        ({"seeds": [0.5]}, TypeError, "`seeds=0.5` must be a whole number"),
        (
            {**BEST, "readout": {"depth": "best", "n_depths": 0}},
            ValueError,
            "`readout`: `n_depths=0` must be a whole number, at least 1",
        ),
        ({"block_um": 0}, ValueError, "`block_um=0` must be positive"),
        ({"encoders": []}, ValueError, "`encoders=` is empty"),
        ({"folds": {}}, ValueError, "`folds=` is empty"),
        ({"genes": {"mine": "svg"}}, KeyError, "not in the table: .'svg'"),
        ({"methods": [LoraConfig(r=2), "lora"]}, ValueError, "two of one name"),
        ({"methods": ["mean"], "protocol": "loo"}, ValueError, '`protocol=.loo.` is not known. Choose "nested"'),
        ({"genes": ["svgs"]}, KeyError, "1 of 1 genes are not in the table: .*'svg'"),
        ({"genes": {"mine": []}}, ValueError, "the set 'mine' is empty"),
        ({"folds": "folds"}, KeyError, "`folds='folds'` not found in `obs`"),
        ({"folds": {"a": [FIRST]}}, TypeError, r"`folds\['a'\]` must be a pair \(train, test\)"),
        ({"folds": {"a": (["P1S1"], ["P1S1"])}}, ValueError, "spots are in training and in test"),
        ({"groups": "one"}, ValueError, r"single group in obs\['one'\], 'x': nothing is left to train on"),
        ({"groups": "few"}, ValueError, "Fold 'few' has [0-9]+ training and 4 test spots .* at least 10"),
        ({"readout": {"context_um": -1}}, ValueError, "`context_um=-1` must be positive and finite .a radius in um"),
        (
            {**BEST, "readout": {"fields_um": (56,)}},
            ValueError,
            r"`fields_um`: 56 um is not wider than the tile \(112 um\): give widths beyond it",
        ),
        ({**BEST, "readout": {"fields_um": (448, -2)}}, ValueError, r"`fields_um=\(448, -2\)` must be widths"),
        ({**BEST, "readout": {"fields_um": (448, 448)}}, ValueError, "each once"),
        ({**BEST, "readout": {"orientations": 3}}, ValueError, r"`orientations=3` must be one of \[1, 2, 4, 8\]"),
        ({"readout": {"head": "rigde"}}, ValueError, "'rigde'` is not known. Close names: ridge"),
        (
            {"readout": {"orientations": 2}},
            ValueError,
            "'orientations' does nothing in this call: no method reads",
        ),
        (
            {"methods": ["frozen"], "readout": {"depth": "best", "n_depths": 2}},
            ValueError,
            "'n_depths' does nothing in this call: only \"frozen-best\" concatenates several depths",
        ),
        ({"readout": []}, ValueError, r"`readout=\[\]` must hold each readout once"),
        ({"readout": [None, "default"]}, ValueError, "must hold each readout once"),
        ({"recipe": {"rank": 8}}, ValueError, "`recipe`: 'rank' does nothing in this call: "),
        (
            {"methods": [LoraConfig(r=2)], "recipe": {"rank": 8}},
            ValueError,
            "'rank' does nothing in this call: a peft.PeftConfig has its own",
        ),
        (
            {"methods": ["bone"], "compute": {"trainer": {"devices": 2}}},
            ValueError,
            "'trainer' does nothing in this call: a comparison",
        ),
        (
            {"methods": ["bone"], "compute": {"resume": "x"}},
            ValueError,
            "'resume' does nothing in this call: .* in `store=`",
        ),
        ({"compute": {"accumulate": 2}}, ValueError, "'accumulate' does nothing in this call: it trains nothing"),
        ({"seeds": []}, ValueError, "must hold each seed once"),
        ({"store": ""}, ValueError, "`store=''` is no path: give a folder"),
        ({"store": __file__}, ValueError, "`store=.*test_cross_validate.py'` is a file: give a folder"),
        ({"teacher": "nobody", "methods": ["teacher"]}, KeyError, "neither one of .* nor a key of `obsm`"),
        ({"encoders": ["tiny", "tiny"]}, ValueError, "names one twice"),
    ],
)
def test_bad_input(tiled: SpatialData, how: dict[str, Any], error: type[Exception], message: str) -> None:
    obs = tiled["table"].obs
    obs["one"] = "x"
    obs["few"] = np.where(np.arange(len(obs)) < 4, "few", "many")
    before = obs.copy()
    with pytest.raises(error, match=message):
        pk.tl.cross_validate(tiled, **{"methods": ["mean"], "compute": CPU, "progress": False, **how})
    pd.testing.assert_frame_equal(obs, before)


def test_a_teacher_that_no_method_asks_is_not_read(tiled: SpatialData, frame: pd.DataFrame) -> None:
    tiled["table"].obsm["X_mine"] = np.full((tiled["table"].n_obs, 3), np.nan)
    found = compare(tiled, ["mean", "frozen", "frozen-best"], genes=["svg", "hvg"], teacher="mine")
    assert same(found, frame[frame["context_um"] == ""].reset_index(drop=True))


def test_a_teacher_with_nan_is_refused(tiled: SpatialData) -> None:
    tiled["table"].obsm["X_mine"] = np.full((tiled["table"].n_obs, 3), np.nan)
    with pytest.raises(ValueError, match="NaN or infinite values"):
        compare(tiled, ["bone"], teacher="mine", recipe=SMALL)


def test_groups_that_leak_are_said_whoever_names_them(tiled: SpatialData) -> None:
    table = tiled["table"]
    table.obs["any"] = [f"g{i % 2}" for i in range(table.n_obs)]
    with pytest.warns(UserWarning, match="spots of one section in training and in test"):
        frame = compare(tiled, ["mean"], groups="any")
    assert not frame["whole_groups"].any()
    # two sections of one patient
    table.obs["patient"] = "P1"
    with pytest.warns(UserWarning, match="spots of one patient in training and in test"):
        frame = compare(tiled, ["mean"], groups="region")
    assert not frame["whole_groups"].any()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Folds .* have spots")
        warnings.filterwarnings("ignore", message="There are not two patients")
        compare(tiled, ["mean"])
        table.obs["patient"] = table.obs["region"]
        frame = compare(tiled, ["mean"])
    assert frame["whole_groups"].all()


def test_a_teacher_that_saw_the_test_spots_is_refused(tiled: SpatialData) -> None:
    pk.tl.embed_expression(tiled, "pca", n_components=5)
    with pytest.raises(ValueError, match="fitted by `embed_expression` on .* Give `teacher='pca'`"):
        compare(tiled, ["teacher"], teacher="X_pca")


def test_a_radius_without_neighbours_is_refused(tiled: SpatialData) -> None:
    match = r"`context_um=0.3`: no spot has a neighbour within it; the nearest neighbour is 1\d\d(\.\d)? um away"
    with pytest.raises(ValueError, match=match):
        compare(tiled, ["frozen"], readout={"context_um": 0.3})
    with pytest.raises(ValueError, match=match):
        pk.tl.fit_adapter(tiled, method=None, progress=False, readout={"context_um": 0.3}, compute={"device": "cpu"})


def test_genes_that_nobody_can_learn_are_named(tiled: SpatialData) -> None:
    table = tiled["table"]
    counts = counts_of(tiled)
    gene = table.var_names[3]
    counts[in_section(tiled, FIRST), 3] = 0
    counts[in_section(tiled, SECOND), 3] = np.arange(in_section(tiled, SECOND).sum())
    table.X = csr_matrix(counts)
    genes = [gene, table.var_names[0], table.var_names[1]]
    with pytest.warns(UserWarning, match=f"1 genes are constant among the training spots, .* 0: .'{gene}'"):
        frame = compare(tiled, ["frozen"], folds=HOLD_OUT_SECOND, genes=genes)
    assert (frame["n_constant_train"] == 1).all()


def test_a_spot_alone_in_its_section_has_no_neighbours(tiled: SpatialData) -> None:
    table = tiled["table"]
    second = np.flatnonzero(in_section(tiled, SECOND))
    counts = counts_of(tiled)
    counts[second[1:]] = 0
    table.X = csr_matrix(counts)
    first = np.flatnonzero(in_section(tiled, FIRST))
    test = np.zeros(table.n_obs, dtype=bool)
    test[[*first[:12], second[0]]] = True
    with pytest.warns(UserWarning):
        frame = compare(tiled, ["neighbours"], folds={"a": (~test, test)})
    assert np.isfinite(frame.loc[frame["section"] == "pooled", "pearson"]).all()


def test_hest_is_said_to_be_another_where_tiles_are(tiled: SpatialData) -> None:
    with pytest.warns(UserWarning, match="HEST-Bench has tiles of 224 px at 0.5 um/px, these are 56 px at 2"):
        frame = pk.tl.cross_validate(
            tiled, methods=["frozen"], protocol="hest", progress=False, compute={"device": "cpu"}
        )
    # the same by scikit-learn and scanpy alone
    table = tiled["table"]
    encoder = EncoderNetwork(replace(resolve_encoder("tiny"), pooling="class"), 56)
    with torch.inference_mode():
        x = encoder.own_output(encoder.normalise(torch.from_numpy(pk.get.tiles(tiled).to_numpy()))).numpy()
    counts = table.X.toarray()
    seen = np.all(
        [
            (counts[table.obs["region"] == region] > 0).sum(axis=0)
            >= np.ceil(0.1 * (table.obs["region"] == region).sum())
            for region in table.obs["region"].unique()
        ],
        axis=0,
    )
    some = AnnData(np.log1p(counts[:, seen]))
    sc.pp.highly_variable_genes(some, n_top_genes=min(50, int(seen.sum())))
    y = np.log1p(counts[:, seen][:, some.var["highly_variable"]].astype(np.float64))
    for fold, score in frame[frame["section"] == "pooled"].set_index("fold")["pearson"].items():
        test = (table.obs["patient"] == fold).to_numpy()
        n_components = min(256, int((~test).sum()), x.shape[1])
        reduce = make_pipeline(StandardScaler(), PCA(n_components, random_state=1)).fit(x[~test])
        alpha = 100 / (n_components * y.shape[1])
        ridge = Ridge(alpha=alpha, fit_intercept=False, solver="lsqr", max_iter=1000, random_state=0)
        predicted = ridge.fit(reduce.transform(x[~test]), y[~test]).predict(reduce.transform(x[test]))
        r = [np.corrcoef(predicted[:, i], y[test][:, i])[0, 1] for i in range(y.shape[1])]
        assert score == pytest.approx(np.mean(r), abs=1e-6)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"methods": ["bat"], "recipe": {"rank": 7}}, "rank that divides both sides"),
        ({"methods": ["bone"], "recipe": {"blocks": 99}}, "`blocks=99` does not fit"),
        ({"methods": ["frozen+peka"], "recipe": {"blocks": 99}}, "`blocks=99` does not fit"),
    ],
)
def test_adapters_that_cannot_be_fail_before_the_work(
    tiled: SpatialData, how: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(_comparison, "embed", no_work)
    with pytest.raises(ValueError, match=message):
        compare(tiled, **how)


def test_a_teacher_that_draws_runs_once_per_seed(tiled: SpatialData, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def make(source: Source) -> PcaTeacher:
        assert source.expression is not None
        drawn.append(source.random_state)
        return PcaTeacher(source.expression[:, source.expressed], 4 + source.random_state)

    row = replace(TEACHERS["pca"], make=make)
    monkeypatch.setitem(TEACHERS._rows, "scvi", row)
    frame = compare(tiled, ["teacher"], teacher="scvi", seeds=[0, 3])
    assert set(drawn) == {0, 3}
    scores = frame[frame["section"] == "pooled"].groupby("seed")["pearson"].mean()
    assert scores[0] != scores[3]


def test_genes_are_checked_before_anything_is_read(tiled: SpatialData, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_tiles(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("pekasc.tl._cross_validate.reading", no_tiles)
    with pytest.raises(KeyError, match="not in the table"):
        compare(tiled, ["bone"], genes=["nothing"])


def test_names_configurations_and_rivals(
    tiled: SpatialData, tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A configuration, its layers in whatever order, a name that no file can have, and a rival under another name."""
    table = tiled["table"]
    table.obs["patient"] = table.obs["patient"].astype(str).str.replace("P", "P/")
    config = LoraConfig(r=4, target_modules=["attn.qkv", "attn.proj", "mlp.fc1"])
    methods = {"best": "frozen-best", "my/lora": config}
    genes = {"about": list(table.var_names[:4]), "file": list(table.var_names[4:8])}
    how: dict[str, Any] = {"genes": genes, "methods": methods, "recipe": SMALL, "store": tmp_path}
    frame = compare(tiled, **how)
    assert set(frame["fold"]) == {"P/1", "P/2"}
    assert frame.loc[frame["method"] == "my/lora", "difference"].notna().all()
    counted.clear()
    with monkeypatch.context() as patch:
        patch.setattr(_comparison, "embed", None)  # with all predictions in the store, no tile is embedded
        assert same(compare(tiled, **how), frame)
    assert not counted


def test_encoders_of_the_same_weights_are_told_apart(tiled: SpatialData, tmp_path: Path) -> None:
    row = resolve_encoder("tiny")
    other = replace(row, mean=(0.1, 0.2, 0.3), key="other", note=None)
    both = compare(tiled, ["frozen"], encoders=[row, other], store=tmp_path)
    alone = compare(tiled, ["frozen"], encoders=other)
    part = both[both["encoder"] == "other"].reset_index(drop=True)
    assert same(part, alone)
    assert not np.allclose(part["pearson"], both.loc[both["encoder"] == "tiny", "pearson"])


def test_another_image_is_not_taken_from_the_store(tiled: SpatialData, tmp_path: Path) -> None:
    first = compare(tiled, ["frozen"], store=tmp_path / "store", compute={"cache": tmp_path})
    image = tiled["P2S1_he"]["scale0/image"]
    pixels = image.to_numpy().copy()
    pixels[:, 100:300, 100:300] = 255 - pixels[:, 100:300, 100:300]
    tiled["P2S1_he"] = Image2DModel.parse(
        pixels,
        dims=("c", "y", "x"),
        scale_factors=[2],
        transformations=get_transformation(tiled["P2S1_he"], get_all=True),
    )
    try:
        second = compare(tiled, ["frozen"], store=tmp_path / "store", compute={"cache": tmp_path})
    except ValueError as error:  # the tiles know that their image changed
        assert "image" in str(error)
    else:
        assert not np.allclose(first["pearson"], second["pearson"])


def test_folds_that_cut_a_group_are_warned_of(tiled: SpatialData) -> None:
    number = np.arange(tiled["table"].n_obs) % 2
    folds = {"odd": (number == 0, number == 1)}
    with pytest.warns(UserWarning, match=r"Folds \['odd'\] have spots of one section in training and in test"):
        compare(tiled, ["mean"], folds=folds)


def test_a_patient_without_a_name_is_an_error(tiled: SpatialData) -> None:
    patient = tiled["table"].obs["patient"].astype(object)
    patient.iloc[0] = None
    tiled["table"].obs["patient"] = patient
    with pytest.raises(ValueError, match="1 spots have no patient in `obs.'patient'.`, others have"):
        compare(tiled, ["mean"])


def test_a_small_section_has_no_score_of_its_own(tiled: SpatialData) -> None:
    number = np.arange(tiled["table"].n_obs)
    first = in_section(tiled, FIRST)
    test = ~first | (number == number[first][0])
    with pytest.warns(UserWarning, match="sections .*P1S1_spots.* have fewer than 10 test spots"):
        frame = compare(tiled, ["mean", "frozen"], folds={"a": (~test, test)})
    assert frame.loc[frame["section"] == FIRST, ["pearson", "ceiling", "reached"]].isna().all(axis=None)
    assert frame.loc[frame["section"] != FIRST, ["pearson", "ceiling", "reached"]].notna().all(axis=None)


def test_one_patients_sections_are_held_out_inside_a_fold() -> None:
    """As fit_adapter does by itself on the same training spots."""
    sdata = pk.datasets.phantom(n_patients=2, n_sections=2, size_um=600, mpp=1.0, n_genes=24)
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    train = ["P1S1_spots", "P1S2_spots"]
    genes = list(sdata["table"].var_names[:6])
    readout = RIDGE.replace(n_depths=1)
    folds = {"P2": (train, ["P2S1_spots", "P2S2_spots"])}
    frame = compare(sdata, ["frozen-best"], folds=folds, genes=genes, readout=readout)
    adapter = pk.tl.fit_adapter(
        sdata, method=None, train=train, genes=genes, readout=readout, compute=CPU, progress=False
    )
    assert adapter.info["held_out"] == train
    assert frame.iloc[0]["alpha"] == pytest.approx(adapter.info["alpha"])
    assert frame.iloc[0]["depth"] == adapter.info["depth"]
    pk.tl.predict_expression(sdata, adapter, progress=False, compute=CPU)
    want = pk.tl.evaluate(sdata).groupby("group")["pearson"].mean()
    for section, value in want.items():
        assert frame.loc[frame["section"] == section, "pearson"].item() == pytest.approx(value, abs=1e-4)


def test_an_explicit_depth_is_read_by_the_frozen_encoder(tiled: SpatialData) -> None:
    how: dict[str, Any] = {"genes": "svg", "n_genes": 4, "progress": False, "compute": {"device": "cpu"}}
    frame = pk.tl.cross_validate(tiled, methods=["frozen", "frozen-best"], readout=RIDGE.replace(depth=2), **how)
    assert set(frame.loc[frame["method"] == "frozen", "depth"]) == {"2"}
    with pytest.raises(
        ValueError, match=r"'depth' does nothing in this call: \"frozen-best\" reads all depths, or the best"
    ):
        pk.tl.cross_validate(tiled, methods=["mean", "frozen-best"], readout={"depth": 2}, **how)
    with pytest.raises(ValueError, match="'epochs' does nothing in this call: no method of this comparison is trained"):
        pk.tl.cross_validate(tiled, methods=["frozen"], recipe={"epochs": 2}, **how)


def test_a_comparison_that_fails_leaves_no_tiles(untiled: SpatialData) -> None:
    shapes = set(untiled.shapes)
    unfit = pk.models.Encoder("resnet10t", weights="random")
    with pytest.raises(ValueError, match="needs linear layers"):
        pk.tl.cross_validate(untiled, methods=["bone"], encoders=unfit, progress=False, compute={"device": "cpu"})
    assert set(untiled.shapes) == shapes and "tile_inside" not in untiled["table"].obs
