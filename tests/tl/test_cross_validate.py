"""tl.cross_validate and tl.leakage_audit: nothing leaks, nothing is computed twice, nothing is dropped in silence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
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
from pekasc.models.comparing import _comparison
from pekasc.models.comparing import _fold as _compare
from pekasc.models.encoders._network import EncoderNetwork
from pekasc.models.encoders._registry import resolve_encoder
from pekasc.models.teachers._pca import PcaTeacher
from pekasc.models.teachers._registry import TEACHERS, Source
from pekasc.models.training._methods import known_methods

QUICK: dict[str, Any] = {"genes": "svg", "n_genes": 8, "device": "cpu", "progress": False}
SMALL: dict[str, Any] = {**QUICK, "epochs": 1, "rank": 8, "blocks": 1, "n_depths": 1}


def by_method(frame: pd.DataFrame, section: str = "pooled") -> pd.Series:
    return frame[frame["section"] == section].groupby("method")["pearson"].mean()


def same(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    return one.drop(columns="seconds").equals(other.drop(columns="seconds"))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by every method that is computed."""
    done: list[str] = []
    for name in ("control", "read_out", "adapted"):
        original: Callable[..., Any] = getattr(_compare, name)

        def spy(*args: Any, original: Any = original, name: str = name, **kwargs: Any) -> Any:
            done.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(f"pekasc.tl._comparison.{name}", spy)
    return done


def test_one_row_per_fold_section_method_context_and_set(tiled: SpatialData) -> None:
    frame = pk.tl.cross_validate(tiled, methods=["mean", "frozen", "frozen-best"], genes=["svg", "hvg"], n_genes=8, progress=False, readout=[pk.Readout(), pk.Readout(context_um=200.0)], compute={"device": "cpu"})  # fmt: skip
    assert not frame.duplicated(["fold", "section", "method", "context_um", "seed", "genes"]).any()
    assert len(frame) == 2 * 2 * 3 * 2 * 2
    assert set(frame["fold"]) == {"P1", "P2"}
    assert set(frame.loc[frame["fold"] == "P1", "section"]) == {"pooled", "P1S1_spots"}
    assert (frame.loc[frame["genes"] == "svg", "n_genes"] == 8).all()
    assert set(frame["context_um"]) == {0.0, 200.0}
    assert (frame.loc[frame["method"] == "mean", "pearson"] == 0).all()
    best = frame["method"] == "frozen-best"
    assert frame.loc[best, "difference"].isna().all() and frame.loc[~best, "difference"].notna().all()
    # blocks of 1 mm: a section of 0.7 mm has too few for an interval, and none is made up
    assert frame["pearson_low"].isna().all()


@pytest.mark.parametrize("reading", [{}, {"scales": (1, 0.5), "orientations": 2}], ids=["plain", "scales"])
def test_frozen_equals_fit_adapter_and_evaluate(tiled: SpatialData, reading: dict[str, Any]) -> None:
    how: dict[str, Any] = {"genes": list(tiled["table"].var_names[:6]), "device": "cpu", "progress": False, **reading}
    frame = pk.tl.cross_validate(tiled, methods=["frozen-best"], **how, readout={"n_depths": 1})
    adapter = pk.tl.fit_adapter(tiled, method=None, train=["P1S1_spots"], **how)
    pk.tl.predict_expression(tiled, adapter, progress=False, compute={"device": "cpu"})
    want = pk.tl.evaluate(tiled)["pearson"].mean()
    got = frame.loc[(frame["fold"] == "P2") & (frame["section"] == "P2S1_spots"), "pearson"].item()
    assert got == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("reading", [{}, {"scales": (1, 0.5), "orientations": 2}], ids=["plain", "scales"])
def test_an_adapter_equals_fit_adapter_and_evaluate(tiled: SpatialData, reading: dict[str, Any]) -> None:
    genes = list(tiled["table"].var_names[:6])
    how: dict[str, Any] = {"epochs": 2, "rank": 8, "device": "cpu", "progress": False, "genes": genes, **reading}
    frame = pk.tl.cross_validate(tiled, methods=["bone"], seeds=[4], **how)
    adapter = pk.tl.fit_adapter(tiled, train=["P1S1_spots"], random_state=4, **how)
    pk.tl.predict_expression(tiled, adapter, progress=False, compute={"device": "cpu"})
    row = frame[(frame["fold"] == "P2") & (frame["section"] == "P2S1_spots")].iloc[0]
    assert row["pearson"] == pytest.approx(pk.tl.evaluate(tiled)["pearson"].mean(), abs=1e-4)
    assert row["epochs"] == adapter.info["epochs"] and row["depth"] == adapter.info["depth"]


def test_test_spots_teach_nothing(tiled: SpatialData) -> None:
    """Whatever the test spots express, what is predicted for them stays the same."""
    methods = ["mean", "coordinates", "frozen", "frozen-best", "bone", "frozen+peka"]
    folds = {"P2": (["P1S1_spots"], ["P2S1_spots"])}
    how: dict[str, Any] = {**SMALL, "genes": ["svg", "hvg"], "methods": methods, "folds": folds}
    before = _predictions(tiled, **how)
    table = tiled["table"]
    test = np.flatnonzero(table.obs["region"] == "P2S1_spots")
    counts = table.X.toarray()
    counts[test] = np.random.default_rng(0).permutation(counts[test].ravel()).reshape(counts[test].shape)
    table.X = csr_matrix(counts)
    after = _predictions(tiled, **how)
    assert before.keys() == after.keys() and len(before) == len(methods)
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name], err_msg=name)
    # and a training spot does teach
    first = np.flatnonzero(table.obs["region"] == "P1S1_spots")[0]
    counts[first] = counts[first][::-1]
    table.X = csr_matrix(counts)
    assert not np.array_equal(_predictions(tiled, **how)["frozen"], before["frozen"])


def _predictions(sdata: SpatialData, **how: Any) -> dict[str, np.ndarray]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        pk.tl.cross_validate(sdata, **how, compute={"cache": folder})
        out = {}
        for path in Path(folder).glob("P2-*.npz"):
            with np.load(path) as stored:
                out[path.stem.removeprefix("P2-tiny-").rsplit("-", 1)[0]] = stored["predicted"]
        return out


def test_goes_on_where_it_was_interrupted(tiled: SpatialData, tmp_path: Path, counted: list[str]) -> None:
    whole = pk.tl.cross_validate(tiled, methods=["mean", "frozen", "bone"], **SMALL)
    assert counted.count("adapted") == 2
    counted.clear()
    pk.tl.cross_validate(tiled, methods=["mean", "bone"], **SMALL, compute={"cache": tmp_path})
    assert sorted(set(counted)) == ["adapted", "control"]
    # half of it is lost, and a file is left half written
    lost = sorted(tmp_path.glob("P2-*bone*.npz"))
    assert len(lost) == 1
    lost[0].rename(tmp_path / f".{lost[0].name}.1.part")
    counted.clear()
    resumed = pk.tl.cross_validate(tiled, methods=["mean", "frozen", "bone"], **SMALL, compute={"cache": tmp_path})
    assert counted.count("adapted") == 1 and counted.count("control") == 0
    assert same(whole, resumed)
    # other settings are other results
    counted.clear()
    pk.tl.cross_validate(tiled, methods=["mean", "bone"], **{**SMALL, "rank": 4}, compute={"cache": tmp_path})
    assert counted.count("adapted") == 2
    assert counted.count("control") == 0  # which have no rank


def test_frozen_features_are_kept_in_files_that_are_read_as_needed(
    tiled: SpatialData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"methods": ["frozen-best"], **QUICK}
    plain = pk.tl.cross_validate(tiled, **how)
    # more than may be held in memory, without a store and with one
    assert same(pk.tl.cross_validate(tiled, **how, compute={"max_memory": 1}), plain)
    assert same(pk.tl.cross_validate(tiled, **how, compute={"cache": tmp_path, "max_memory": 1}), plain)
    (kept,) = tmp_path.glob("frozen-tiny-*")
    assert not list(tmp_path.glob(".*"))  # nothing half done
    assert len(list(kept.glob("*.npy"))) > 1  # one of every depth
    for path in tmp_path.glob("P*.npz"):
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("pekasc.tl._comparison.embed", None)  # computed once
        assert same(pk.tl.cross_validate(tiled, **how, compute={"cache": tmp_path}), plain)
    damaged = sorted(kept.glob("*.npy"))[0]
    damaged.write_bytes(damaged.read_bytes()[:1000])
    for harm in (lambda: None, damaged.unlink, lambda: (kept / "about.json").unlink()):
        harm()
        with pytest.raises(ValueError, match=f"The stored result {kept.name} cannot be read .* delete it to compute"):
            pk.tl.cross_validate(tiled, **{**how, "n_genes": 7}, compute={"cache": tmp_path})


def test_features_of_all_depths_are_not_in_memory_at_once(
    tiled: SpatialData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    original = _comparison.read_out

    def spy(fold: Any, reader: Any, features: Any, *rest: Any) -> Any:
        seen.extend(features.values())
        return original(fold, reader, features, *rest)

    monkeypatch.setattr(_comparison, "read_out", spy)
    for how in ({"max_memory": 1}, {"store": tmp_path}):
        seen.clear()
        pk.tl.cross_validate(tiled, methods=["frozen-best"], **{**QUICK, **how})
        assert seen and all(isinstance(x, np.memmap) for x in seen)


def test_every_reading_has_its_own_place_in_a_store(tiled: SpatialData, tmp_path: Path, counted: list[str]) -> None:
    how: dict[str, Any] = {"methods": ["mean", "frozen"], **QUICK}
    for reading in ({}, {"scales": (1, 0.5)}, {"orientations": 2}):
        counted.clear()
        stored = pk.tl.cross_validate(tiled, **how, **reading, compute={"cache": tmp_path})
        # what reads no image is computed once
        assert counted.count("control") == (2 if not reading else 0) and counted.count("read_out") == 2
        assert same(stored, pk.tl.cross_validate(tiled, **how, **reading))
    assert (stored["orientations"] == 2).all() and (stored["scales"] == "1").all()
    other = pk.tl.cross_validate(tiled, **how, readout={"scales": (1, 0.5)}, compute={"cache": tmp_path})
    with pytest.raises(ValueError, match=r"rows of one method, fold and seed twice .*'scales': \['1', '1\+0.5'\]"):
        pk.get.comparison(pd.concat([stored, other]), rival="mean")


def test_too_few_spots_beside_the_widest_tiles_are_found_before_embedding(
    tiled: SpatialData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pekasc.tl._comparison.embed", None)
    with pytest.raises(ValueError, match="Too few training spots .* Within 316.8 um"):
        pk.tl.cross_validate(tiled, methods=["frozen"], **QUICK, readout={"scales": (1, 2)})


def test_differences_per_gene_add_up_to_that_of_the_mean(tiled: SpatialData) -> None:
    how: dict[str, Any] = {"methods": ["mean", "frozen", "frozen-best"], **QUICK}
    genes, mean = pk.tl.cross_validate(tiled, per_gene=True, **how), pk.tl.cross_validate(tiled, **how)
    keys = ["fold", "section", "method"]
    expected = mean.set_index(keys)["difference"].dropna().sort_index()
    found = genes.groupby(keys)["difference"].mean().dropna().sort_index()
    assert len(expected) == 2 * 2 * 2
    pd.testing.assert_series_equal(found, expected)
    assert genes.loc[genes["method"] == "frozen-best", "difference"].isna().all()


def test_torch_keeps_its_number_of_threads(tiled: SpatialData) -> None:
    # numba's OpenMP layer, under scanpy and squidpy, sets that of the whole process
    assert torch.get_num_threads() == 1
    pk.tl.cross_validate(
        tiled, methods=["frozen"], genes=["svg", "hvg"], n_genes=8, progress=False, compute={"device": "cpu"}
    )
    assert torch.get_num_threads() == 1


def test_other_counts_are_not_taken_from_the_store(tiled: SpatialData, tmp_path: Path) -> None:
    first = pk.tl.cross_validate(tiled, methods=["frozen"], **QUICK, compute={"cache": tmp_path})
    tiled["table"].X = csr_matrix(np.random.default_rng(0).permutation(tiled["table"].X.toarray()))
    second = pk.tl.cross_validate(tiled, methods=["frozen"], **QUICK, compute={"cache": tmp_path})
    assert not np.allclose(by_method(first), by_method(second))


def test_a_damaged_result_is_named(tiled: SpatialData, tmp_path: Path) -> None:
    pk.tl.cross_validate(tiled, methods=["mean"], **QUICK, compute={"cache": tmp_path})
    path = next(tmp_path.glob("P1-*mean*.npz"))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=rf"{path.name} cannot be read .* delete it to compute it again"):
        pk.tl.cross_validate(tiled, methods=["mean"], **QUICK, compute={"cache": tmp_path})


def test_contexts_share_one_training(tiled: SpatialData, counted: list[str]) -> None:
    both = pk.tl.cross_validate(tiled, methods=["bone"], **SMALL, readout=[pk.Readout(), pk.Readout(context_um=200.0)])
    assert counted.count("adapted") == 2  # one a fold
    one = pk.tl.cross_validate(tiled, methods=["bone"], **SMALL, readout={"context_um": 200.0})
    assert same(both[both["context_um"] == 200.0].reset_index(drop=True), one)


@pytest.mark.parametrize(
    "method", [*known_methods(), LoraConfig(r=4)], ids=lambda m: m if isinstance(m, str) else "own"
)
def test_every_method_trains_and_comes_back(tiled: SpatialData, tmp_path: Path, method: Any) -> None:
    adapter = pk.tl.fit_adapter(tiled, method=method, train=["P1S1_spots"], progress=False, recipe=pk.Recipe.preset("paper").replace(rank=8, n_clusters=4, teacher_components=10, epochs=2, blocks=1, learning_rate=3e-3), readout=pk.Readout.preset("paper").replace(n_components=10, depth=2), compute={"device": "cpu"})  # fmt: skip
    assert adapter.info["n_parameters"] > 0
    tiles = pk.get.tiles(tiled)[:4].to_numpy()
    features = adapter.embed(tiles, mpp=2.0, compute={"device": "cpu"})
    plain = pk.tl.fit_adapter(tiled, method=None, train=["P1S1_spots"], progress=False, readout={"depth": 2}, compute={"device": "cpu"}).embed(tiles, mpp=2.0, compute={"device": "cpu"})  # fmt: skip
    assert np.abs(features - plain).max() > 1e-5
    adapter.save(tmp_path / "adapter")
    again = pk.Adapter.load(tmp_path / "adapter").embed(tiles, mpp=2.0, compute={"device": "cpu"})
    np.testing.assert_array_equal(features, again)
    merged = adapter.merge()
    assert not [name for name, _ in merged.named_modules() if "lora" in name or "miss" in name or "hra" in name]


def test_teacher_is_an_upper_bound_and_neighbours_smooth(tiled: SpatialData) -> None:
    scores = by_method(pk.tl.cross_validate(tiled, methods=["mean", "neighbours", "teacher", "frozen"], **QUICK))
    assert scores["teacher"] > scores["frozen"] > scores["mean"] == 0
    assert scores["neighbours"] > 0.1


def test_neighbours_mean(tiled: SpatialData) -> None:
    folds = {"P2": (["P1S1_spots"], ["P2S1_spots"])}
    genes = list(tiled["table"].var_names[:3])
    predicted = _predictions(tiled, methods=["neighbours"], folds=folds, genes=genes, device="cpu", progress=False)
    part = pk.get.tiles(tiled)["tile"].to_numpy()
    table = tiled["table"][part]
    table = table[(table.obs["region"] == "P2S1_spots").to_numpy()]
    counts = table.X.toarray()
    log = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))[:, :3]
    xy = table.obsm["spatial"]
    at = np.argsort(np.linalg.norm(xy[:1] - xy, axis=1), kind="stable")[1:7]
    order = np.argsort([list(table.var_names).index(g) for g in genes])
    np.testing.assert_allclose(predicted["neighbours"][0], log[at][:, order].mean(axis=0), atol=1e-5)


def test_constant_genes_are_named(tiled: SpatialData) -> None:
    table = tiled["table"]
    counts = table.X.toarray()
    counts[np.flatnonzero(table.obs["region"] == "P2S1_spots"), 1] = 0
    table.X = csr_matrix(counts)
    genes = list(table.var_names[:4])
    folds = {"P2": (["P1S1_spots"], ["P2S1_spots"])}
    how: dict[str, Any] = {"methods": ["mean", "frozen"], "genes": genes, "folds": folds, **{"progress": False}}
    with pytest.warns(UserWarning, match=rf"Fold 'P2': 1 genes are constant .*\['{genes[1]}'\]"):
        frame = pk.tl.cross_validate(tiled, **how)
    assert (frame["n_undefined"] == 1).all() and frame["pearson"].notna().all()
    with pytest.warns(UserWarning, match="constant"):
        single = pk.tl.cross_validate(tiled, per_gene=True, **how)
    nan = single.loc[single["pearson"].isna(), "gene"].unique()
    assert list(nan) == [genes[1]]
    assert len(single) == 2 * 2 * 4


def test_shuffled_labels_score_nothing(tiled: SpatialData) -> None:
    table = tiled["table"]
    counts = table.X.toarray()
    rng = np.random.default_rng(0)
    regions = table.obs["region"].to_numpy()
    means = []
    for _ in range(6):
        order = np.arange(len(counts))
        for region in np.unique(regions):
            at = np.flatnonzero(regions == region)
            order[at] = rng.permutation(at)
        table.X = csr_matrix(counts[order])
        means.append(by_method(pk.tl.cross_validate(tiled, methods=["frozen", "frozen-best"], **QUICK)))
    frame = pd.DataFrame(means)
    assert (frame.mean().abs() < 3 * frame.std() / len(frame) ** 0.5 + 0.02).all()


def test_hest_protocol(tiled: SpatialData) -> None:
    frame = pk.tl.cross_validate(tiled, methods=["mean", "frozen", "teacher", "bone"], protocol="hest", n_genes=8, progress=False, recipe={"epochs": 1, "rank": 8, "blocks": 1, "n_clusters": 3}, compute={"device": "cpu"})  # fmt: skip
    assert set(frame["genes"]) == {"hest"}
    assert by_method(frame)["teacher"] > by_method(frame)["frozen"]
    with pytest.raises(
        ValueError, match='`protocol="hest"` chooses nothing inside the fold, so it has no .frozen-best'
    ):
        pk.tl.cross_validate(tiled, methods=["frozen-best"], protocol="hest")
    with pytest.raises(ValueError, match="has genes and a regression of its own"):
        pk.tl.cross_validate(tiled, methods=["frozen"], protocol="hest", readout={"head": "ridge-per-gene"})
    pooled = frame[(frame["section"] == "pooled") & (frame["method"] == "frozen")]
    table = pk.get.comparison(frame, rival="frozen")
    assert table.loc[("tiny", 0.0, "hest", "frozen"), "pearson"] == pytest.approx(pooled["pearson"].mean())


def test_folds_by_column_and_by_section(tiled: SpatialData) -> None:
    pk.pp.split(tiled, groups="patient")
    by_column = pk.tl.cross_validate(tiled, methods=["frozen"], folds="fold", **QUICK)
    by_patient = pk.tl.cross_validate(tiled, methods=["frozen"], groups="patient", **QUICK)
    assert set(by_column["fold"]) == {"0", "1"}
    np.testing.assert_array_equal(by_column["pearson"], by_patient["pearson"])
    tiled["table"].obs["patient"] = "one"
    with pytest.warns(UserWarning, match="say little about another patient"):
        pk.tl.cross_validate(tiled, methods=["mean"], **QUICK)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"methods": ["bones"]}, ValueError, "'bones' is not known. Choose from .*'frozen-best'"),
        ({"methods": []}, ValueError, "`methods=` is empty"),
        ({"methods": [None]}, ValueError, "None is the frozen encoder of `fit_adapter`; say"),
        ({"methods": ["adalora"], "epochs": 1, "blocks": 1}, ValueError, "AdaLoRA plans its ranks .* too few"),
        ({"n_genes": 0}, ValueError, "`n_genes=0`.* must be positive"),
        ({"genes": None}, ValueError, "`genes=None`: name sets"),
        ({"seeds": [0.5]}, TypeError, "`seeds` must be a whole number, got 0.5"),
        ({"n_depths": 0}, ValueError, "`n_depths=0` must be positive"),
        ({"block_um": 0}, ValueError, "`block_um=0` must be positive"),
        ({"encoders": []}, ValueError, "`encoders=` is empty"),
        ({"folds": {}}, ValueError, "`folds=` is empty"),
        ({"genes": {"mine": "svg"}}, KeyError, "not in the table: .'svg'"),
        ({"methods": [LoraConfig(r=2), "lora"]}, ValueError, "two of one name"),
        ({"methods": ["mean"], "protocol": "loo"}, ValueError, '`protocol=.loo.` is not known. Choose "nested"'),
        ({"genes": ["svgs"]}, KeyError, "1 of 1 genes are not in the table: .*'svg'"),
        ({"genes": {"mine": []}}, ValueError, "the set 'mine' is empty"),
        ({"folds": "folds"}, KeyError, "`folds='folds'` not found in `obs`"),
        ({"folds": {"a": ["P1S1_spots"]}}, TypeError, r"`folds\['a'\]` must be a pair \(train, test\)"),
        ({"folds": {"a": (["P1S1"], ["P1S1"])}}, ValueError, "spots are in training and in test"),
        ({"groups": "one"}, ValueError, r"single group in obs\['one'\], 'x': nothing is left to train on"),
        ({"groups": "few"}, ValueError, "Fold 'few' has [0-9]+ training and 4 test spots .* at least 10"),
        ({"context_um": -1}, ValueError, "positive radius in um"),
        ({"scales": (2, 1)}, ValueError, r"`scales=\(2, 1\)` must be multiples .* 1 \(the tile itself\) before"),
        ({"scales": (1, -2)}, ValueError, r"`scales=\(1, -2\)` must be multiples"),
        ({"scales": (1, 2, 2)}, ValueError, "each once"),
        ({"orientations": 3}, ValueError, r"`orientations=3` must be one of \[1, 2, 4, 8\]"),
        ({"protocol": "hest", "scales": (1, 2)}, ValueError, "reads a tile once and as it is"),
        ({"seeds": []}, ValueError, "must hold each seed once"),
        ({"teacher": "nobody"}, KeyError, "neither one of .* nor a key of `obsm`"),
        ({"encoders": ["tiny", "tiny"]}, ValueError, "names one twice"),
    ],
)
def test_bad_input(tiled: SpatialData, how: dict[str, Any], error: type[Exception], message: str) -> None:
    obs = tiled["table"].obs
    obs["one"] = "x"
    obs["few"] = np.where(np.arange(len(obs)) < 4, "few", "many")
    before = obs.copy()
    with pytest.raises(error, match=message):
        pk.tl.cross_validate(tiled, **{"methods": ["mean"], "device": "cpu", "progress": False, **how})
    pd.testing.assert_frame_equal(obs, before)


def test_a_teacher_that_no_method_asks_is_not_read(tiled: SpatialData) -> None:
    tiled["table"].obsm["X_mine"] = np.full((tiled["table"].n_obs, 3), np.nan)
    frame = pk.tl.cross_validate(tiled, methods=["frozen"], teacher="mine", **QUICK)
    assert same(frame, pk.tl.cross_validate(tiled, methods=["frozen"], **QUICK))


def test_a_teacher_with_nan_is_refused(tiled: SpatialData) -> None:
    tiled["table"].obsm["X_mine"] = np.full((tiled["table"].n_obs, 3), np.nan)
    with pytest.raises(ValueError, match="NaN or infinite values"):
        pk.tl.cross_validate(tiled, methods=["bone"], teacher="mine", **SMALL)


def test_audit_finds_the_leak_of_neighbouring_spots(tiled: SpatialData) -> None:
    """Expression that is smooth noise, which no image shows: only folds of random spots predict it."""
    table = tiled["table"]
    rng = np.random.default_rng(0)
    xy = table.obsm["spatial"] / np.ptp(table.obsm["spatial"], axis=0)
    rates = np.empty(table.shape)
    for region in table.obs["region"].unique():
        at = np.flatnonzero(table.obs["region"] == region)
        waves = np.sin(4 * xy[at] @ rng.normal(size=(2, table.n_vars)) + rng.uniform(0, 6, table.n_vars))
        rates[at] = np.exp(1.5 * waves + 2)
    table.X = csr_matrix(rng.poisson(rates).astype(np.float32))
    audit = pk.tl.leakage_audit(tiled, methods=["coordinates"], **QUICK)
    row = audit.loc[("tiny", 0.0, "svg", "coordinates")]
    assert row["random_spots"] > row["grouped"] + 0.3
    assert row["inflation"] == pytest.approx(row["random_spots"] - row["grouped"])
    with pytest.raises(TypeError, match="`folds=` cannot be given"):
        pk.tl.leakage_audit(tiled, folds="fold")


def test_groups_that_leak_are_said_whoever_names_them(tiled: SpatialData) -> None:
    table = tiled["table"]
    table.obs["any"] = [f"g{i % 2}" for i in range(table.n_obs)]
    with pytest.warns(UserWarning, match="spots of one section in training and in test"):
        frame = pk.tl.cross_validate(tiled, methods=["mean"], groups="any", **QUICK)
    assert not frame["whole_groups"].any()
    # two sections of one patient
    table.obs["patient"] = "P1"
    with pytest.warns(UserWarning, match="spots of one patient in training and in test"):
        frame = pk.tl.cross_validate(tiled, methods=["mean"], groups="region", **QUICK)
    assert not frame["whole_groups"].any()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Folds .* have spots")
        warnings.filterwarnings("ignore", message="There are not two patients")
        pk.tl.cross_validate(tiled, methods=["mean"], **QUICK)
        table.obs["patient"] = table.obs["region"]
        frame = pk.tl.cross_validate(tiled, methods=["mean"], **QUICK)
    assert frame["whole_groups"].all()


def test_a_teacher_that_saw_the_test_spots_is_refused(tiled: SpatialData) -> None:
    pk.tl.embed_expression(tiled, "pca", n_components=5)
    with pytest.raises(ValueError, match="fitted by `embed_expression` on .* Give `teacher='pca'`"):
        pk.tl.cross_validate(tiled, methods=["teacher"], teacher="X_pca", **QUICK)


def test_intervals_are_over_whole_groups_and_frames_of_one_setting(tiled: SpatialData) -> None:
    frame = pk.tl.cross_validate(tiled, methods=["frozen", "mean"], **QUICK)
    five = pd.concat([frame[frame["fold"] == frame["fold"].iloc[0]].assign(fold=f"patient {i}") for i in range(5)])
    row = ("tiny", 0.0, "svg", "frozen")
    assert np.isfinite(pk.get.comparison(five, rival="mean").loc[row, "difference_low"])
    assert np.isnan(pk.get.comparison(five.assign(whole_groups=False), rival="mean").loc[row, "difference_low"])
    with pytest.raises(ValueError, match=r"twice \(settings: .*'head': \['ridge', 'ridge-per-gene'\]"):
        pk.get.comparison(pd.concat([frame, frame.assign(head="ridge-per-gene")]), rival="mean")


def test_a_radius_without_neighbours_is_refused(tiled: SpatialData) -> None:
    match = r"`context_um=0.3`: no spot has a neighbour within it; the nearest neighbour is 1\d\d(\.\d)? um away"
    with pytest.raises(ValueError, match=match):
        pk.tl.cross_validate(tiled, methods=["frozen"], **QUICK, readout={"context_um": 0.3})
    with pytest.raises(ValueError, match=match):
        pk.tl.fit_adapter(tiled, method=None, progress=False, readout={"context_um": 0.3}, compute={"device": "cpu"})


def test_genes_that_nobody_can_learn_are_named(tiled: SpatialData) -> None:
    table = tiled["table"]
    counts = table.X.toarray()
    gene = table.var_names[3]
    counts[(table.obs["region"] == "P1S1_spots").to_numpy(), 3] = 0
    counts[(table.obs["region"] == "P2S1_spots").to_numpy(), 3] = np.arange((table.obs["region"] == "P2S1_spots").sum())
    table.X = csr_matrix(counts)
    how = {**QUICK, "genes": [gene, table.var_names[0], table.var_names[1]]}
    with pytest.warns(UserWarning, match=f"1 genes are constant among the training spots, .* count 0: .'{gene}'"):
        frame = pk.tl.cross_validate(tiled, methods=["frozen"], folds={"a": (["P1S1_spots"], ["P2S1_spots"])}, **how)
    assert (frame["n_untaught"] == 1).all()


def test_a_spot_alone_in_its_section_has_no_neighbours(tiled: SpatialData) -> None:
    table = tiled["table"]
    second = np.flatnonzero(table.obs["region"] == "P2S1_spots")
    counts = table.X.toarray()
    counts[second[1:]] = 0
    table.X = csr_matrix(counts)
    first = np.flatnonzero(table.obs["region"] == "P1S1_spots")
    test = np.zeros(table.n_obs, dtype=bool)
    test[[*first[:12], second[0]]] = True
    folds = {"a": (~test, test)}
    with pytest.warns(UserWarning):
        frame = pk.tl.cross_validate(tiled, methods=["neighbours"], folds=folds, **QUICK)
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
    with pytest.raises(ValueError, match="leave `genes=`, `head=` and `n_depths=` out"):
        pk.tl.cross_validate(
            tiled,
            methods=["frozen"],
            protocol="hest",
            progress=False,
            readout={"n_depths": 1},
            compute={"device": "cpu"},
        )


def test_the_audit_makes_five_random_folds_at_most(tiled: SpatialData, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tiled["table"]
    table.obs["many"] = [f"g{i % 7}" for i in range(table.n_obs)]
    asked: list[Any] = []
    original = pk.tl.cross_validate

    def spy(*args: Any, **kwargs: Any) -> pd.DataFrame:
        asked.append(kwargs.get("folds"))
        return original(*args, **kwargs)

    monkeypatch.setattr("pekasc.tl._leakage_audit.cross_validate", spy)
    pk.tl.leakage_audit(tiled, methods=["mean"], groups="many", **QUICK)
    assert [None if folds is None else len(folds) for folds in asked] == [None, 5]
    held_out = np.sum([test for _, test in asked[1].values()], axis=0)
    np.testing.assert_array_equal(held_out, 1)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"methods": ["bat"], "rank": 7}, "rank that divides both sides"),
        ({"methods": ["bone"], "blocks": 99}, "`blocks=99` does not fit"),
        ({"methods": ["frozen+peka"], "blocks": 99}, "`blocks=99` does not fit"),
    ],
)
def test_adapters_that_cannot_be_fail_before_the_work(
    tiled: SpatialData, how: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("pekasc.tl._comparison.embed", no_work)
    with pytest.raises(ValueError, match=message):
        pk.tl.cross_validate(tiled, **{**QUICK, **how})


def test_a_teacher_that_draws_runs_once_per_seed(tiled: SpatialData, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def make(source: Source) -> PcaTeacher:
        assert source.expression is not None
        drawn.append(source.random_state)
        return PcaTeacher(source.expression[:, source.expressed], 4 + source.random_state)

    row = replace(TEACHERS["pca"], make=make)
    monkeypatch.setitem(TEACHERS._rows, "scvi", row)
    frame = pk.tl.cross_validate(tiled, methods=["teacher"], teacher="scvi", seeds=[0, 3], **QUICK)
    assert set(drawn) == {0, 3}
    scores = frame[frame["section"] == "pooled"].groupby("seed")["pearson"].mean()
    assert scores[0] != scores[3]


def test_genes_are_checked_before_anything_is_read(tiled: SpatialData, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_tiles(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("pekasc.tl._cross_validate._read", no_tiles)
    with pytest.raises(KeyError, match="not in the table"):
        pk.tl.cross_validate(tiled, genes=["nothing"], progress=False, compute={"device": "cpu"})


def test_comparison_sums_up(tiled: SpatialData) -> None:
    frame = pk.tl.cross_validate(tiled, methods=["mean", "frozen", "frozen-best"], **QUICK)
    table = pk.get.comparison(frame)
    sections = frame[frame["section"] != "pooled"]
    row = table.loc[("tiny", 0.0, "svg", "frozen")]
    own = sections[sections["method"] == "frozen"].set_index("fold")["pearson"]
    best = sections[sections["method"] == "frozen-best"].set_index("fold")["pearson"]
    assert row["pearson"] == pytest.approx(own.mean())
    assert row["difference"] == pytest.approx((own - best).mean())
    assert row["P1 difference"] == pytest.approx(own["P1"] - best["P1"])
    assert row["n_better"] == int((own > best).sum()) and row["n_folds"] == 2
    assert np.isnan(row["difference_low"])  # two folds have no interval
    many = pd.concat([frame.assign(fold=frame["fold"] + str(i)) for i in range(3)])
    low = pk.get.comparison(many).loc[("tiny", 0.0, "svg", "frozen")]
    assert low["difference_low"] <= low["difference"] <= low["difference_high"]
    with pytest.raises(ValueError, match="`rival='bone'` is not among"):
        pk.get.comparison(frame, rival="bone")
    with pytest.raises(ValueError, match="no comparison of methods"):
        pk.get.comparison(frame.drop(columns="section"))


def test_names_configurations_and_rivals(tiled: SpatialData, tmp_path: Path, counted: list[str]) -> None:
    """A configuration, its layers in whatever order, a name that no file can have, and a rival under another name."""
    table = tiled["table"]
    table.obs["patient"] = table.obs["patient"].astype(str).str.replace("P", "P/")
    config = LoraConfig(r=4, target_modules=["attn.qkv", "attn.proj", "mlp.fc1"])
    methods = {"best": "frozen-best", "my/lora": config}
    genes = {"about": list(table.var_names[:4]), "file": list(table.var_names[4:8])}
    how: dict[str, Any] = {**SMALL, "genes": genes, "methods": methods, "store": tmp_path}
    frame = pk.tl.cross_validate(tiled, **how)
    assert set(frame["fold"]) == {"P/1", "P/2"}
    assert frame.loc[frame["method"] == "my/lora", "difference"].notna().all()
    counted.clear()
    assert same(pk.tl.cross_validate(tiled, **how), frame)
    assert not counted


def test_encoders_of_the_same_weights_are_told_apart(tiled: SpatialData, tmp_path: Path) -> None:
    from dataclasses import replace

    row = resolve_encoder("tiny")
    other = replace(row, mean=(0.1, 0.2, 0.3), key="other", note=None)
    both = pk.tl.cross_validate(tiled, methods=["frozen"], encoders=[row, other], **QUICK, compute={"cache": tmp_path})
    alone = pk.tl.cross_validate(tiled, methods=["frozen"], encoders=other, **QUICK)
    part = both[both["encoder"] == "other"].reset_index(drop=True)
    assert same(part, alone)
    assert not np.allclose(part["pearson"], both.loc[both["encoder"] == "tiny", "pearson"])


def test_another_image_is_not_taken_from_the_store(tiled: SpatialData, tmp_path: Path) -> None:
    first = pk.tl.cross_validate(tiled, methods=["frozen"], **QUICK, compute={"cache": tmp_path})
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
        second = pk.tl.cross_validate(tiled, methods=["frozen"], **QUICK, compute={"cache": tmp_path})
    except ValueError as error:  # the tiles know that their image changed
        assert "image" in str(error)
    else:
        assert not np.allclose(first["pearson"], second["pearson"])


def test_folds_that_cut_a_group_are_warned_of(tiled: SpatialData) -> None:
    number = np.arange(tiled["table"].n_obs) % 2
    folds = {"odd": (number == 0, number == 1)}
    with pytest.warns(UserWarning, match=r"Folds \['odd'\] have spots of one section in training and in test"):
        pk.tl.cross_validate(tiled, methods=["mean"], folds=folds, **QUICK)


def test_a_patient_without_a_name_is_an_error(tiled: SpatialData) -> None:
    patient = tiled["table"].obs["patient"].astype(object)
    patient.iloc[0] = None
    tiled["table"].obs["patient"] = patient
    with pytest.raises(ValueError, match="1 spots have no patient in `obs.'patient'.`, others have"):
        pk.tl.cross_validate(tiled, methods=["mean"], **QUICK)


def test_a_small_section_has_no_score_of_its_own(tiled: SpatialData) -> None:
    number = np.arange(tiled["table"].n_obs)
    first = (tiled["table"].obs["region"] == "P1S1_spots").to_numpy()
    test = ~first | (number == number[first][0])
    with pytest.warns(UserWarning, match="sections .*P1S1_spots.* have fewer than 10 test spots"):
        frame = pk.tl.cross_validate(tiled, methods=["mean", "frozen"], folds={"a": (~test, test)}, **QUICK)
    assert frame.loc[frame["section"] == "P1S1_spots", "pearson"].isna().all()
    assert frame.loc[frame["section"] != "P1S1_spots", "pearson"].notna().all()


def test_one_patients_sections_are_held_out_inside_a_fold() -> None:
    """As fit_adapter does by itself on the same training spots."""
    sdata = pk.datasets.phantom(n_patients=2, n_sections=2, size_um=600, mpp=1.0, n_genes=24)
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    train = ["P1S1_spots", "P1S2_spots"]
    genes = list(sdata["table"].var_names[:6])
    how: dict[str, Any] = {"genes": genes, "device": "cpu", "progress": False}
    folds = {"P2": (train, ["P2S1_spots", "P2S2_spots"])}
    frame = pk.tl.cross_validate(sdata, methods=["frozen-best"], folds=folds, **how, readout={"n_depths": 1})
    adapter = pk.tl.fit_adapter(sdata, method=None, train=train, **how)
    assert adapter.info["held_out"] == train
    assert frame.iloc[0]["alpha"] == pytest.approx(adapter.info["alpha"])
    assert frame.iloc[0]["depth"] == adapter.info["depth"]
    pk.tl.predict_expression(sdata, adapter, progress=False, compute={"device": "cpu"})
    want = pk.tl.evaluate(sdata).groupby("group")["pearson"].mean()
    for section, value in want.items():
        assert frame.loc[frame["section"] == section, "pearson"].item() == pytest.approx(value, abs=1e-4)
