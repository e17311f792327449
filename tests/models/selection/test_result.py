"""The end of a fit: a score for every gene on held-out groups, and a record of what was chosen."""

from __future__ import annotations

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

N, GENES, DEPTH = 48, ["known", "noise", "constant in B", "constant"], 2


@pytest.mark.parametrize("kind", [np.asarray, csr_matrix])
def test_correlations_in_chunks_of_genes(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_result, "_GENES", 3)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 5)), rng.poisson(3, size=(30, 7)).astype(float)
    y[:, 4] = 2
    head = fit_ridge(x, y, 5).head(0.1)
    found = correlations_of(head, x, kind(y))
    assert np.isnan(found[4]) and found.shape == (7,)
    predicted = head.predict(x)
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
    readout = pk.Readout(depth=DEPTH, context_um=150)
    options = Options(None, pk.Recipe(), readout, pk.Compute(device="cpu"), torch.device("cpu"), random_state=5)
    model = EncoderNetwork(resolve_encoder("tiny"), 28)
    (made,) = fit(model, TileSpec(28, 2.0), data, None, options, [HeadSpec.from_readout(readout)])
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
        head = fit_ridge(x[fold.train], np.asarray(data.expression)[fold.train]).head(adapter.info["alpha"])
        found.append(pearsonr(head.predict(x[fold.held_out])[:, 0], data.expression[fold.held_out, 0]).statistic)
    assert scores.loc["known", "pearson"] == pytest.approx(np.mean(found), abs=1e-4)


def test_the_record_of_a_frozen_encoder(adapter: pk.Adapter) -> None:
    info = adapter.info
    assert adapter.method == "frozen" and adapter.config is None and adapter.depth == (DEPTH,)
    assert (info["n_spots"], info["groups"], info["sections"]) == (N, ["A", "B", "C"], ["A", "B", "C"])
    assert info["held_out"] == ["A", "B", "C"] and info["random_state"] == 5
    for nothing in ("teacher", "teacher_licence", "teacher_digest", "rank", "n_clusters", "n_views"):
        assert info[nothing] is None, nothing
    assert info["n_parameters"] == 0 and info["epochs"] == 0
    assert (info["head"], info["context_um"], info["scales"], info["orientations"]) == ("ridge", 150.0, [1.0], 1)
    assert adapter.history.empty
    assert list(adapter.selection) == ["stage", "depth", "epochs", "alpha", "error"]
    assert set(adapter.selection["stage"]) == {"frozen"} and set(adapter.selection["depth"]) == {info["depth"]}
    assert info["alpha"] == adapter.selection.loc[adapter.selection["error"].idxmin(), "alpha"]
