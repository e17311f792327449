"""The end of a fit: a score for every gene on held-out groups, and a record of what was chosen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from scipy.stats import pearsonr

import pekasc as pk
from pekasc.models.encoders._network import EncoderNetwork
from pekasc.models.encoders._registry import resolve_encoder
from pekasc.models.heads._ridge import fit_ridge
from pekasc.models.selection import _result
from pekasc.models.selection._fit import fit
from pekasc.models.selection._folds import inner_folds
from pekasc.models.selection._inputs import Data, HeadSpec, Options
from pekasc.models.selection._result import correlations_of, history_frame
from pekasc.tiling import ArrayTiles, TileSpec

COLUMNS = ["stage", "network", "head", "depth", "context_um", "fields", "epochs", "rank", "alpha", "error", "weight"]
N, GENES, DEPTH = 48, ["known", "noise", "constant in B", "constant"], 2


@pytest.mark.parametrize("kind", [np.asarray, csr_matrix])
def test_correlations_in_chunks_of_genes(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_result, "_GENES", 3)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 5)), rng.poisson(3, size=(30, 7)).astype(float)
    y[:, 4] = 2
    fit = fit_ridge(x, y, 5)
    predicted = fit.projection(x) @ fit.coef(0.1) + fit.intercept
    found = correlations_of(lambda genes: predicted[:, genes], kind(y))
    assert np.isnan(found[4]) and found.shape == (7,)
    for gene in (0, 3, 6):
        assert found[gene] == pytest.approx(pearsonr(predicted[:, gene], y[:, gene]).statistic, abs=1e-5)


def test_a_history_without_a_training_has_its_columns() -> None:
    assert history_frame([]).empty
    assert list(history_frame([])) == list(history_frame([{"epoch": 1, "fold": 0, "other": 3}]))


@pytest.fixture(scope="module")
def data() -> Data:
    rng = np.random.default_rng(0)
    sections = np.repeat(["A", "B", "C"], N // 3)
    shade = rng.uniform(size=N)
    tiles = (255 * shade[:, None, None, None] * np.ones((1, 28, 28, 3))).astype(np.uint8)
    y = np.column_stack([shade, rng.normal(size=N), rng.normal(size=N), np.ones(N)])
    y[sections == "B", 2] = 1
    coords = np.tile(100.0 * np.column_stack(np.divmod(np.arange(N // 3), 4)), (3, 1))
    return Data(ArrayTiles(tiles), y, GENES, sections, sections, coords)


@pytest.fixture(scope="module")
def adapter(data: Data) -> pk.Adapter:
    readout = pk.Readout.preset("ridge").replace(depth=DEPTH, n_depths=None, context_um=150)
    options = Options(None, pk.Recipe(), readout, pk.Compute(device="cpu"), torch.device("cpu"), random_state=5)
    model = EncoderNetwork(resolve_encoder("tiny"), 28)
    (made,) = fit(model, TileSpec(28, 2.0), data, None, options, [HeadSpec(readout)])
    return made


@pytest.fixture(scope="module")
def blend(data: Data) -> pk.Adapter:
    readout = pk.Readout(
        members=("frozen:low-rank", "frozen:ridge", "adapted:ridge"), depth=(1, 2), n_components=6, fields_um=None
    )
    options = Options(None, pk.Recipe(), readout, pk.Compute(device="cpu"), torch.device("cpu"))
    weighed = replace(data, every=np.column_stack([data.expression] * 2), totals=np.linspace(10, 900, N))
    model = EncoderNetwork(resolve_encoder("tiny"), 28)
    (made,) = fit(model, TileSpec(28, 2.0), weighed, None, options, [HeadSpec(readout)])
    return made


def test_genes_are_scored_within_the_held_out_sections_that_know_them(data: Data, adapter: pk.Adapter) -> None:
    scores = adapter.gene_scores
    assert list(scores.index) == GENES and scores.index.name == "gene"
    assert scores["n_sections"].tolist() == [3, 3, 2, 0]
    assert scores.loc["known", "pearson"] > 0.9 > scores.loc["noise", "pearson"]
    assert np.isnan(scores.loc["constant", "pearson"]) and np.isfinite(scores.loc["constant in B", "pearson"])
    # by hand: heads that were fitted on two sections, on the third
    plain = adapter.embed(data.tiles.read(np.arange(N)), mpp=2.0, compute={"device": "cpu"})
    found = []
    for fold in inner_folds(data.groups, data.coords_um, data.sections, 0):
        x = pk.models.heads.with_context(plain, data.coords_um, data.sections, 150.0)
        own = fit_ridge(x[fold.train], np.asarray(data.expression)[fold.train])
        predicted = own.projection(x[fold.held_out]) @ own.coef(adapter.info["alpha"])
        found.append(pearsonr(predicted[:, 0], data.expression[fold.held_out, 0]).statistic)
    assert scores.loc["known", "pearson"] == pytest.approx(np.mean(found), abs=1e-4)


def test_the_record_of_a_frozen_encoder(adapter: pk.Adapter) -> None:
    info = adapter.info
    assert adapter.method == "frozen" and adapter.config is None and adapter.depth == (DEPTH,)
    assert (info["n_spots"], info["groups"], info["sections"]) == (N, ["A", "B", "C"], ["A", "B", "C"])
    assert info["held_out"] == ["A", "B", "C"] and info["random_state"] == 5
    for nothing in ("teacher", "teacher_licence", "teacher_digest", "rank", "n_clusters", "n_views"):
        assert info[nothing] is None, nothing
    assert info["n_parameters"] == 0 and info["epochs"] == 0
    assert (info["head"], info["context_um"], info["fields_um"], info["orientations"]) == ("ridge", [150.0], [], 1)
    assert info["members"]["frozen:ridge"]["weight"] == 1
    assert info["members"]["frozen:ridge"]["pearson"] == pytest.approx(adapter.gene_scores["pearson"].median())
    assert adapter.history.empty
    assert list(adapter.selection) == COLUMNS
    depth, read = (adapter.selection[adapter.selection["stage"] == stage] for stage in ("frozen", "reading"))
    assert len(depth) == len(read) == len(adapter.selection) / 2
    assert set(adapter.selection["depth"]) == {info["depth"]} == {str(DEPTH)}
    # rows that chose the depth have no weight of their own: they are plain ridge without context
    assert set(depth["context_um"]) == {0.0} and set(depth["weight"]) == {0.0} and set(depth["head"]) == {"ridge"}
    assert set(read["context_um"]) == {150.0} and read["weight"].sum() == 1
    assert info["alpha"] == pytest.approx(read.loc[read["error"].idxmin(), "alpha"])
    assert not adapter.selection.isna().any(axis=None)


def test_the_record_of_a_blend_without_an_adapter(blend: pk.Adapter) -> None:
    info, read = blend.info, blend.selection[blend.selection["stage"] == "reading"]
    # adapted members need an adapter: the frozen ones share all weight
    assert {name: member["weight"] for name, member in info["members"].items()} == {
        "frozen:low-rank": pytest.approx(0.5), "frozen:ridge": pytest.approx(0.5)
    }  # fmt: skip
    assert all(-1 <= member["pearson"] <= 1 for member in info["members"].values())
    assert read.groupby("head")["weight"].sum().to_dict() == {
        "low-rank": pytest.approx(1), "ridge": pytest.approx(1)
    }  # fmt: skip
    assert set(read.loc[read["head"] == "low-rank", "rank"]) == {1, 2, 3, 5, 8}
    assert set(read.loc[read["head"] == "ridge", "rank"]) == {0}
    assert list(blend.selection) == COLUMNS and set(read["network"]) == {"frozen"}
    assert set(read["context_um"]) >= {0.0, 150.0} and set(read["depth"]) == {"1+2"}
    known = read[read["weight"] > 0]
    assert info["alpha"] == pytest.approx(np.exp(np.average(np.log(known["alpha"]), weights=known["weight"])))
    assert blend.gene_scores.loc["known", "pearson"] > 0.9
    assert blend.reading.use().radii_um == tuple(info["context_um"])
