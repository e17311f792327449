"""tl.fit_adapter: it looks at nothing outside `train=`, repeats itself, and refuses what it cannot do."""

from __future__ import annotations

import gc
import json
import logging
import signal
import tempfile
import warnings
import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from peft import HRAConfig, LoraConfig
from scipy.sparse import csr_matrix, hstack
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import get_transformation

import pekasc as pk
from pekasc._expression import log1p_cp10k
from pekasc._keys import read_uns
from pekasc.models.encoders import EncoderNetwork, resolve_encoder
from pekasc.models.heads import with_context
from pekasc.models.heads._registry import HEADS
from pekasc.models.heads._ridge import fit_ridge
from pekasc.models.selection._fit import margin_um
from pekasc.models.selection._job import Job
from pekasc.models.training._plan import Student
from pekasc.models.trust import trust_levels
from pekasc.tiling import TileSpec

Bits = Callable[[pk.Adapter], dict[str, bytes]]
TRAIN = ["P1S1_spots"]
CPU = pk.Compute(device="cpu")
RIDGE = pk.Readout.preset("ridge").replace(n_depths=None)
FROZEN: dict[str, Any] = {"method": None, "readout": RIDGE, "compute": CPU, "progress": False}
# one epoch in two blocks, in the orientation that a tile has
RECIPE = pk.Recipe(epochs=1, rank=8, n_views=1, cluster_head_epochs=3)
SMALL: dict[str, Any] = {"recipe": RECIPE, "readout": RIDGE.replace(depth=2), "compute": CPU, "progress": False}
PREDICT: dict[str, Any] = {"compute": CPU, "progress": False}


def test_nothing_outside_train_is_looked_at(
    tiled: SpatialData, adapter: pk.Adapter, all_bits: Bits, trained_options: dict[str, Any]
) -> None:
    rng = np.random.default_rng(0)
    table = tiled["table"]
    test = np.flatnonzero(table.obs["region"] == "P2S1_spots")
    counts = table.X.toarray()
    counts[test] = rng.permutation(counts[test].ravel()).reshape(counts[test].shape) * 3
    table.X = csr_matrix(counts)
    image = tiled["P2S1_he"]["scale0/image"]
    noise = rng.integers(0, 256, image.shape).astype(np.uint8)
    tiled["P2S1_he"] = Image2DModel.parse(
        noise, dims=("c", "y", "x"), scale_factors=[2, 2],
        transformations=get_transformation(tiled["P2S1_he"], get_all=True),
    )  # fmt: skip
    got = all_bits(pk.tl.fit_adapter(tiled, train=TRAIN, **trained_options))
    assert got == all_bits(adapter)
    # the adapter is a trained one, and the test would see a change: of one count of one training spot
    assert max(t.abs().max().item() for t in adapter.weights["adapter"].values()) > 0
    first = int(np.flatnonzero(table.obs["region"] == "P1S1_spots")[0])
    counts[first, 0] += 1
    table.X = csr_matrix(counts)
    changed = all_bits(pk.tl.fit_adapter(tiled, train=TRAIN, **trained_options))
    assert any(changed[name] != got[name] for name in got if name.startswith("reading."))
    assert any(changed[name] != got[name] for name in got if name.startswith("adapter."))


def test_the_rule_that_chooses_looks_at_nothing_outside_train(tiled: SpatialData, all_bits: Bits) -> None:
    options = {**SMALL, "recipe": RECIPE.replace(learning_rate=3e-3), "readout": RIDGE}
    first = pk.tl.fit_adapter(tiled, train=TRAIN, **options)
    table = tiled["table"]
    values = table.X.toarray()
    test = np.flatnonzero(table.obs["region"] == "P2S1_spots")
    # negative and NaN there: whoever reads them fails
    values[test] = np.nan
    values[test[0]] = -1
    table.X = csr_matrix(values)
    second = pk.tl.fit_adapter(tiled, train=TRAIN, **options)
    assert all_bits(second) == all_bits(first)


def test_the_same_seed_gives_the_same_bits_whatever_was_drawn_before(
    tiled: SpatialData, adapter: pk.Adapter, all_bits: Bits, trained_options: dict[str, Any]
) -> None:
    torch.manual_seed(123)
    np.random.seed(123)
    again = pk.tl.fit_adapter(tiled, train=TRAIN, **trained_options)
    assert all_bits(again) == all_bits(adapter)
    other = pk.tl.fit_adapter(tiled, train=TRAIN, **trained_options, random_state=1)
    assert all_bits(other) != all_bits(adapter)


def test_alone_on_a_section_without_tiles(caplog: pytest.LogCaptureFixture) -> None:
    sdata = pk.datasets.phantom(n_patients=1, size_um=700, mpp=1.0, n_genes=16, n_spots=36)
    with caplog.at_level(logging.INFO, logger="pekasc"):
        # the defaults, but for what takes its time
        adapter = pk.tl.fit_adapter(sdata, recipe={"epochs": 1, "n_views": 1, "cluster_head_epochs": 3})
    assert (adapter.spec.tile_px, adapter.spec.mpp) == (224, 0.5)
    assert adapter.method == "bone" and adapter.encoder.short == "tiny"
    assert "P1S1_spots_tiles" in sdata.shapes
    for line in (
        'encoder="tiny", teacher="pca", method="bone".',
        "contiguous blocks of its tissue",
        "Depth: block",
        "Epochs: ",
        "16 genes, detected in 10 % of the",
    ):
        assert line in caplog.text, line
    assert read_uns(sdata["table"], "adapter")["method"] == "bone"
    assert adapter.info["held_out"] == ["block1", "block2", "block3"]


def test_frozen_encoder(tiled: SpatialData, frozen: pk.Adapter) -> None:
    assert frozen.method == "frozen" and frozen.config is None and not frozen.weights
    assert frozen.history.empty
    table = frozen.selection
    assert set(table["stage"]) == {"frozen", "reading"} and set(table["depth"]) == {"1", "2", "3", "4", "5", "6"}
    assert table.loc[table["error"].idxmin(), "depth"] == frozen.info["depth"]
    read = table[table["stage"] == "reading"]
    assert sorted(read["weight"]) == [0.0] * (len(read) - 1) + [1.0]  # the best, and nothing else
    # its head is the head on plain features at that depth
    pk.tl.embed_tiles(tiled, "tiny", readout={"depth": frozen.depth}, **PREDICT)
    x = tiled["table"].obsm["X_tiny"]
    pk.tl.predict_expression(tiled, frozen, **PREDICT)
    np.testing.assert_array_equal(tiled["table"].obsm["X_peka"], x)
    (source,) = frozen.reading.sources
    assert (source.network, source.field, source.depth) == ("frozen", 0, frozen.depth)
    np.testing.assert_allclose(
        _predicted(tiled, frozen), frozen.reading.expression(frozen.reading.scores({source: x})), atol=1e-5
    )


def test_feature_matching_is_part_of_the_loss(tiled: SpatialData) -> None:
    adapter = pk.tl.fit_adapter(
        tiled, **{**SMALL, "recipe": RECIPE.replace(epochs=3, matching_weight=4)}, groups="patient"
    )
    trained = adapter.history[adapter.history["epoch"] > 0]
    parts = (trained["kd"] + trained["sa"]) / 2 + 4 * trained["matching"]
    np.testing.assert_allclose(trained["loss"], parts, rtol=1e-5)
    first, last = (trained.loc[trained["epoch"] == e, "matching"].to_numpy()[:2] for e in (1, 3))
    assert (last < first).all()


def test_what_is_kept(tiled: SpatialData) -> None:
    adapter = pk.tl.fit_adapter(tiled, **SMALL, groups="patient")
    history = adapter.history
    losses = ["loss", "kd", "sa", "matching"]
    assert list(history.columns) == ["fold", "held_out", "epoch", *losses, "val_error", "peak_memory"]
    inner = history[history["fold"] >= 0]
    assert sorted(set(inner["held_out"])) == ["P1", "P2"] and sorted(set(inner["epoch"])) == [0, 1]
    assert inner["val_error"].notna().all() and inner.loc[inner["epoch"] > 0, ["loss", "kd", "sa"]].notna().all(
        axis=None
    )
    trained = inner[inner["epoch"] > 0]
    np.testing.assert_allclose(trained["loss"], (trained["kd"] + trained["sa"]) / 2, rtol=1e-5)
    best = adapter.selection.loc[adapter.selection["stage"] == "adapter"]
    best = best.loc[best["error"].idxmin()]
    assert (best["epochs"], best["alpha"]) == (adapter.info["epochs"], pytest.approx(adapter.info["alpha"]))
    assert list(adapter.gene_scores.index) == list(adapter.genes)
    assert adapter.gene_scores["pearson"].dropna().between(-1, 1).all()
    assert adapter.info["groups"] == ["P1", "P2"] and adapter.info["n_spots"] == tiled["table"].n_obs
    record = read_uns(tiled["table"], "adapter")
    assert record["encoder_digest"] == adapter.encoder_digest and record["n_genes"] == len(adapter.genes)
    json.dumps(dict(adapter.info))


def test_gene_scores_are_the_correlations_on_held_out_groups(tiled: SpatialData) -> None:
    adapter = pk.tl.fit_adapter(tiled, **FROZEN, groups="patient")
    # by hand: each patient's head, judged on the other patient
    pk.tl.embed_tiles(tiled, "tiny", readout={"depth": adapter.depth}, **PREDICT)
    table = tiled["table"]
    x, y = table.obsm["X_tiny"], log1p_cp10k(table).toarray()[:, table.var_names.get_indexer(adapter.genes)]
    patient = table.obs["patient"].to_numpy()
    per_patient = []
    for held_out in ("P1", "P2"):
        a, b = patient != held_out, patient == held_out
        guess = ridge(x[a], y[a], adapter.info["alpha"], x[b])
        per_patient.append([np.corrcoef(guess[:, j], y[b][:, j])[0, 1] for j in range(y.shape[1])])
    np.testing.assert_allclose(adapter.gene_scores["pearson"], np.mean(per_patient, axis=0), atol=1e-5)
    assert (adapter.gene_scores["n_sections"] == 2).all()


def ridge(x: np.ndarray, y: np.ndarray, alpha: float, new: np.ndarray) -> np.ndarray:
    """Return predictions of ridge on standardised principal components."""
    fit = fit_ridge(x, y)
    p = fit.projection
    return (new - p.mean) / p.scale @ p.components.T @ fit.coef(alpha) + fit.intercept


@pytest.mark.parametrize(
    ("blocks", "depth", "method", "layers"),
    [
        (2, 4, "bone", {2, 3}),
        ("auto", (1, 3), "bone", {0, 1, 2}),
        (1, -1, "lora", {5}),
        ("auto", 1, LoraConfig(r=2, lora_alpha=4), {0}),
    ],
)
def test_blocks_depth_and_method(
    tiled: SpatialData, blocks: Any, depth: int | tuple[int, ...], method: Any, layers: set[int]
) -> None:
    how = {**SMALL, "recipe": RECIPE.replace(blocks=blocks), "readout": RIDGE.replace(depth=depth)}
    adapter = pk.tl.fit_adapter(tiled, train=TRAIN, method=method, **how)
    names = adapter.weights["adapter"]
    assert {int(name.split("blocks.")[1].split(".")[0]) for name in names} == layers
    assert all("attn.qkv" in name for name in names)
    assert adapter.depth == (depth if isinstance(depth, tuple) else (6,) if depth == -1 else (depth,))
    width = 512 * len(adapter.depth)
    (source,) = adapter.reading.sources
    assert (source.network, source.depth) == ("adapted", adapter.depth)
    assert adapter.embed(pk.get.tiles(tiled)[:2].to_numpy(), mpp=2.0, compute=CPU).shape == (2, width)


def test_train_says_the_same_in_all_its_forms(tiled: SpatialData, frozen: pk.Adapter, all_bits: Bits) -> None:
    table = tiled["table"]
    mask = (table.obs["region"] == "P1S1_spots").to_numpy()
    table.obs["mine"] = mask
    for train in (mask, "mine", list(map(bool, mask)), pd.Series(mask), ["P1S1"]):
        assert all_bits(pk.tl.fit_adapter(tiled, train=train, **FROZEN)) == all_bits(frozen)


def test_a_series_is_joined_by_its_index(tiled: SpatialData, frozen: pk.Adapter, all_bits: Bits) -> None:
    table = tiled["table"]
    mask = (table.obs["region"] == "P1S1_spots").sample(frac=1, random_state=1)
    assert not np.array_equal(mask.to_numpy(), (table.obs["region"] == "P1S1_spots").to_numpy())
    for train in (mask, mask.astype("boolean")):
        assert all_bits(pk.tl.fit_adapter(tiled, train=train, **FROZEN)) == all_bits(frozen)
    wanted = pd.Series(table.var_names.isin(frozen.genes[:3]), index=table.var_names).sample(frac=1, random_state=2)
    assert set(pk.tl.fit_adapter(tiled, train=TRAIN, genes=wanted, **FROZEN).genes) == set(frozen.genes[:3])
    with pytest.raises(ValueError, match=r"index of the Series `train=` does not hold the table's names: it has \['x"):
        pk.tl.fit_adapter(tiled, train=mask.rename(lambda name: f"x{name}"), **FROZEN)


def test_a_stored_zero_is_a_zero(tiled: SpatialData, frozen: pk.Adapter) -> None:
    table = tiled["table"]
    dense = table.X.toarray()
    dense[1:, 0] = 0
    stored = csr_matrix(np.where(dense == 0, 1, dense))
    stored.data = dense[stored.nonzero()].astype(np.float32)
    assert stored.nnz == dense.size
    table.X = stored
    genes = pk.tl.fit_adapter(tiled, train=TRAIN, **FROZEN).genes
    assert table.var_names[0] not in genes and table.X.nnz == dense.size
    table.X = dense
    assert pk.tl.fit_adapter(tiled, train=TRAIN, **FROZEN).genes == genes


@pytest.mark.parametrize(
    ("train", "error", "message"),
    [
        (["P3S1"], KeyError, r"section 'P3S1', which is not there\. Sections: .*P1S1"),
        ("P1S1", KeyError, r"no column of `obs`.*`train=\['P1S1'\]`"),
        ("patient", ValueError, "needs a boolean column"),
        ([True, False], ValueError, "length 2, the table has"),
        ([], ValueError, "leaves no spots"),
    ],
)
def test_wrong_train(tiled: SpatialData, train: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pk.tl.fit_adapter(tiled, train=train, **FROZEN)


def test_stored_teacher(tiled: SpatialData) -> None:
    table = tiled["table"]
    table.obsm["X_mine"] = np.random.default_rng(0).normal(size=(table.n_obs, 5)).astype(np.float32)
    adapter = pk.tl.fit_adapter(tiled, teacher="mine", train=TRAIN, **SMALL)
    assert adapter.info["teacher"] == "mine"
    assert adapter.weights["projector"]["2.weight"].shape[0] == 5
    table.obsm["X_mine"][0] = np.nan
    with pytest.raises(ValueError, match="embedding 'mine' has NaN or infinite values in 1 of"):
        pk.tl.fit_adapter(tiled, teacher="mine", train=TRAIN, **SMALL)
    with pytest.raises(KeyError, match=r"scgpt.* is neither one of \['pca', .* nor a key of `obsm`"):
        pk.tl.fit_adapter(tiled, teacher="scgpt", train=TRAIN, **SMALL)


def test_genes_by_name_mask_column_and_gene_key(tiled: SpatialData) -> None:
    table = tiled["table"]
    names = list(table.var_names[[7, 3]])
    mask = table.var_names.isin(names)
    table.var["wanted"] = mask
    for genes in (names, mask, "wanted"):
        assert set(pk.tl.fit_adapter(tiled, genes=genes, train=TRAIN, **FROZEN).genes) == set(names)
    table.var["ensembl"] = [f"ENSG{i}" for i in range(table.n_vars)]
    adapter = pk.tl.fit_adapter(tiled, genes=["ENSG3"], gene_key="ensembl", train=TRAIN, **FROZEN)
    assert adapter.genes == ("ENSG3",)


def test_genes_seen_too_rarely_are_left_out(tiled: SpatialData) -> None:
    table = tiled["table"]
    values = table.X.toarray()
    second = np.flatnonzero(table.obs["patient"] == "P2")
    values[second, 0] = 0  # seen in one patient only
    values[:, 1] = 0
    values[: table.n_obs // 2 : 30, 1] = 5
    table.X = values
    adapter = pk.tl.fit_adapter(tiled, groups="patient", **FROZEN)
    seen = np.array([(values[table.obs["patient"] == p] > 0).mean(axis=0) for p in ("P1", "P2")]).min(axis=0)
    assert list(adapter.genes) == list(table.var_names[seen >= 0.1])
    assert table.var_names[0] not in adapter.genes and table.var_names[1] not in adapter.genes


def test_antibody_counts_are_no_genes(tiled: SpatialData, caplog: pytest.LogCaptureFixture) -> None:
    frozen = {**FROZEN, "readout": RIDGE.replace(depth=2)}
    without = pk.tl.fit_adapter(tiled, train=TRAIN, **frozen)
    table = tiled["table"]
    antibodies = np.random.default_rng(0).poisson(3000, (table.n_obs, 3))
    var = pd.DataFrame(
        {"feature_types": ["Antibody Capture"] * 3 + ["Gene Expression"] * table.n_vars},
        index=["CD3", "CD4", "CD8", *table.var_names],
    )
    both = AnnData(hstack([csr_matrix(antibodies), table.X], "csr"), obs=table.obs, var=var, uns=table.uns)
    del tiled.tables["table"]
    tiled.tables["table"] = both
    with caplog.at_level(logging.INFO, logger="pekasc"):
        adapter = pk.tl.fit_adapter(tiled, train=TRAIN, **frozen)
    assert '3 features are no gene expression by `var["feature_types"]`' in caplog.text
    assert adapter.genes == without.genes
    pd.testing.assert_frame_equal(adapter.gene_scores, without.gene_scores)
    pk.tl.predict_expression(tiled, adapter, **PREDICT)
    predicted = both.layers["peka"]
    assert np.isnan(predicted[:, :3]).all()
    np.testing.assert_array_equal(both.obs["peka_total"], table.X.sum(axis=1, dtype=np.float64).A1)
    scores = pk.tl.evaluate(tiled).set_index("gene")
    both.X[:, :3] = 0  # whatever the antibodies are
    pd.testing.assert_frame_equal(pk.tl.evaluate(tiled).set_index("gene"), scores)


def test_target_as_is(tiled: SpatialData) -> None:
    table = tiled["table"]
    table.layers["log"] = log1p_cp10k(table)
    table.X = table.layers["log"]
    adapter = pk.tl.fit_adapter(tiled, target="as_is", layer="log", train=TRAIN, **FROZEN)
    assert "as stored" in repr(adapter)
    rows = np.flatnonzero(table.obs["region"] == "P1S1_spots")
    expected = table.layers["log"][rows].toarray().mean(axis=0)[table.var_names.get_indexer(adapter.genes)]
    np.testing.assert_allclose(adapter.reading.members[0].head.intercept, expected, rtol=1e-5)


def _state(sdata: SpatialData) -> dict[str, Any]:
    table = sdata["table"]
    return {
        "elements": sorted((kind, name) for kind, name, _ in sdata.gen_elements()),
        "obs": table.obs.to_csv(), "var": table.var.to_csv(), "uns": repr(deepcopy(dict(table.uns))),
        "obsm": sorted(table.obsm), "layers": sorted(k for k in table.layers if k is not None),
    }  # fmt: skip


RESNET = pk.models.Encoder("resnet18", weights="random")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"recipe": {"n_clusters": 1000}}, ValueError, r"`n_clusters=1000` does not fit \d+ training spots"),
        ({"recipe": {"teacher_components": 500}}, ValueError, r"`teacher_components=500` does not fit \d+ training"),
        ({"readout": {"n_components": 500}}, ValueError, r"`n_components=500` does not fit \d+ training spots"),
        ({"recipe": "papr"}, ValueError, r"`recipe='papr'` is no preset\. Did you mean 'paper'\?"),
        ({"readout": "papr"}, ValueError, r"`readout='papr'` is no preset\. Did you mean 'paper'\?"),
        ({"recipe": {"epoch": 3}}, ValueError, r"`recipe`: Recipe has no field 'epoch'\. Did you mean 'epochs'\?"),
        ({"readout": {"depht": 3}}, ValueError, r"Readout has no field 'depht'\. Did you mean 'depth'\?"),
        ({"compute": {"devise": "cpu"}}, ValueError, r"Compute has no field 'devise'\. Did you mean 'device'\?"),
        ({"recipe": pk.Readout()}, TypeError, "`recipe` must be None, a pekasc.Recipe, .*, got Readout"),
        ({"encoder": RESNET}, ValueError, r"needs linear layers \['attn.qkv'\].*`method=None`"),
        ({"encoder": "tinny"}, ValueError, "Close names: tiny"),
        ({"method": "bon"}, ValueError, "`method='bon'` is not known"),
        ({"readout": {"depth": 7}}, ValueError, "has 6 blocks: give 1 to 6"),
        ({"readout": {"depth": []}}, TypeError, r'`depth=\[\]` must be "all", "best", "own", a number of blocks'),
        (
            {"readout": {"depth": "last"}},
            ValueError,
            r"`depth='last'` must be one of \['all', 'best', 'own'\], a number of",
        ),
        ({"readout": {"fields_um": "wide"}}, TypeError, r"`fields_um='wide'` must be widths .* such as \(448,\)"),
        ({"readout": {"fields_um": (112,)}}, ValueError, r"112 um is not wider than the tile \(112 um\): .*\(448,\)"),
        ({"readout": {"fields_um": (2000,)}}, ValueError, r"tiles of 2000 um lie to \d\d% outside of their images"),
        # one section of 0.7 mm, held out in blocks
        ({"readout": {"fields_um": 448}}, ValueError, r"Too few training spots .* within 633.6 um .*the largest tile"),
        ({"readout": {"head_rank": 500}}, ValueError, r"`head_rank=500` does not fit \d+ training spots with 24 expr"),
        ({"readout": {"members": ["frozen:ridge"]}}, ValueError, "must be at least two, each once: a blend of one is"),
        ({"readout": {"orientations": True}}, TypeError, r"`orientations=True` must be one of"),
        ({"readout": {"orientations": "all"}}, TypeError, r"`orientations='all'` must be one of \[1, 2, 4, 8\]"),
        ({"readout": {"head": "rigde"}}, ValueError, r"`head='rigde'` is not known\. Close names: ridge"),
        ({"readout": {"n_components": 2.5}}, TypeError, "`n_components=2.5` must be a whole number"),
        ({"readout": {"context_um": -5}}, ValueError, "`context_um=-5` must be positive"),
        ({"readout": {"context_um": 1e-3}}, ValueError, r"`context_um=0\.001`"),
        (
            {"readout": {"depth": "best", "n_depths": 2}},
            ValueError,
            "'n_depths' does nothing in this call: an adapter is trained at",
        ),
        ({"recipe": {"blocks": 9}}, ValueError, "`blocks=9` does not fit"),
        ({"recipe": {"blocks": "some"}}, ValueError, r"`blocks='some'` must be one of \['auto', 'all'\]"),
        ({"recipe": {"epochs": 1.5}}, TypeError, "`epochs=1.5` must be a whole number"),
        ({"recipe": {"learning_rate": -1.0}}, ValueError, "`learning_rate=-1.0` must be positive"),
        ({"recipe": {"kd_weight": 2}}, ValueError, "`kd_weight=2` must lie between 0 and 1"),
        ({"recipe": {"matching_weight": -1}}, ValueError, "`matching_weight=-1` must be 0 or more and finite"),
        ({"recipe": {"n_views": 3}}, ValueError, r"`n_views=3` must be one of \[1, 2, 4, 8\]"),
        ({"recipe": {"patience": 0}}, ValueError, "`patience=0` must be a whole number, at least 1"),
        ({"compute": {"accumulate": 0}}, ValueError, "`accumulate=0` must be a whole number, at least 1"),
        ({"compute": {"checkpoint_minutes": -1}}, ValueError, r"`checkpoint_minutes=-1` must be 0 or more .*minutes"),
        ({"compute": {"device": "cuda:77"}}, ValueError, "cannot be used"),
        ({"compute": {"precision": "fp8"}}, ValueError, r"`precision='fp8'` must be one of .*'bf16'"),
        ({"compute": {"cached_activations": "int8"}}, ValueError, r"`cached_activations='int8'` must be .*or None"),
        ({"compute": {"client": ...}}, ValueError, "'client' does nothing in this call: a fit runs in this proc"),
        ({"compute": {"trainer": {"epochs": 2}}}, TypeError, r"knows no \['epochs'\]"),
        (
            {"compute": {"trainer": {"gradient_clip_val": 1}}},
            ValueError,
            "gradient_clip_val.*give `Recipe.gradient_clip`",
        ),
        ({"compute": {"trainer": {"devices": 0, "accelerator": "cpu"}}}, ValueError, r"`trainer=.*Available: "),
        ({"genes": ["ENSG1", "ENSG2"]}, ValueError, r"None of the 2 genes .*`gene_key=`"),
        ({"genes": ["STATE_TUMOUR_01"]}, ValueError, "None of the 1 genes"),
        (
            {"genes": ["STATE_TUMOUR_001", "STATE_TUMOUR_0001"]},
            KeyError,
            "1 of 2 genes .*Did you mean STATE_TUMOUR_001",
        ),
        ({"genes": []}, ValueError, "`genes=` is empty"),
        ({"genes": np.zeros(24, dtype=bool)}, ValueError, "`genes=` is empty: the mask"),
        ({"key_added": "tiles"}, ValueError, "holds tiles"),
        ({"key_added": "a/b"}, ValueError, "cannot be stored"),
        ({"groups": "donor"}, KeyError, "`groups='donor'` not found in `obs`.*patient"),
        ({"layer": "raw"}, KeyError, "Layer 'raw' not found"),
        ({"layer": "truth"}, ValueError, r"layers\['truth'\] has values that are no integers"),
        ({"table_name": "cells"}, KeyError, "Table 'cells' not found"),
    ],
    ids=lambda v: str(v)[:60] if isinstance(v, dict) else None,
)
def test_what_does_not_fit_is_refused_and_nothing_changes(
    tiled: SpatialData, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = _state(tiled)
    with pytest.raises(error, match=message):
        pk.tl.fit_adapter(tiled, **{"train": TRAIN, **SMALL, **options})
    assert _state(tiled) == before


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoraConfig(r=4, init_lora_weights=False), "untrained adapter 'lora' changes the features"),
        (LoraConfig(r=4, init_lora_weights="pissa"), "'lora' left the encoder changed"),
        (HRAConfig(r=5), "untrained adapter 'hra' changes the features.*an even rank for HRA"),
    ],
    ids=["random", "pissa", "odd"],
)
def test_an_adapter_has_to_begin_as_the_frozen_encoder(tiled: SpatialData, method: Any, message: str) -> None:
    before = _state(tiled)
    with pytest.raises(ValueError, match=message):
        pk.tl.fit_adapter(tiled, train=TRAIN, **{**SMALL, "method": method})
    assert _state(tiled) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": {"n_clusters": 1000}}, r"`n_clusters=1000` does not fit \d+ training spots"),
        ({"encoder": RESNET}, r"needs linear layers \['attn.qkv'\] .* 'resnet18'"),
    ],
)
def test_an_error_leaves_no_tiles_behind(untiled: SpatialData, options: dict[str, Any], message: str) -> None:
    before = _state(untiled)
    with pytest.raises(ValueError, match=message):
        pk.tl.fit_adapter(untiled, **{**SMALL, **options})
    assert _state(untiled) == before


def test_an_untiled_object_of_unknown_pixel_size_is_left_as_it_was(unknown: SpatialData) -> None:
    before = _state(unknown)
    message = (
        r"The pixel size of image 'P1S1_he' .* is not known.*`image_mpp=.*"
        r"run `pekasc\.pp\.tile\(sdata, tile_px=224, mpp=0\.5, \.\.\.\)` with what is missing, then this call again"
    )
    with pytest.raises(ValueError, match=message):
        pk.tl.fit_adapter(unknown, **FROZEN)
    assert _state(unknown) == before
    # the line names the table and the tiles where they have other names
    unknown.tables["cells"] = unknown.tables.pop("table")
    with pytest.raises(ValueError, match=r"mpp=0\.5, table_name='cells', key_added='near', \.\.\.\)"):
        pk.tl.fit_adapter(unknown, table_name="cells", key="near", **FROZEN)


PAPER = (pk.Recipe.preset("paper"), pk.Readout.preset("paper"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"recipe": "paper"}, PAPER),
        ({"recipe": pk.Recipe.preset("paper")}, PAPER),
        (
            {"recipe": "paper", "readout": {"depth": 2, "fields_um": None}},
            (PAPER[0], pk.Readout(depth=2, fields_um=None)),
        ),
        ({"recipe": PAPER[0].replace(rank=8)}, (PAPER[0].replace(rank=8), pk.Readout())),
        ({}, (pk.Recipe(), pk.Readout())),
    ],
    ids=["preset", "instance", "with a readout", "changed", "default"],
)
def test_the_published_training_is_what_is_run(
    tiled: SpatialData, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, options: dict[str, Any],
    expected: tuple[pk.Recipe, pk.Readout],
) -> None:  # fmt: skip
    def run(model: Any, spec: Any, data: Any, teacher: Any, found: Any, heads: Any) -> Any:
        assert (found.recipe, found.readout) == expected and found.method == "bone"
        raise InterruptedError("as far as the arrays")

    caplog.set_level(logging.INFO)
    monkeypatch.setattr("pekasc.tl._fit_adapter.fit", run)
    table = tiled["table"]
    table.obsm["X_mine"] = np.zeros((table.n_obs, 5), dtype=np.float32)  # of a teacher that has sizes of its own
    with pytest.raises(InterruptedError):
        pk.tl.fit_adapter(tiled, teacher="mine", compute=CPU, progress=False, **options)
    assert ('recipe="paper" brings readout="paper"' in caplog.text) == (expected == PAPER)


def test_the_published_sizes_never_adapt(tiled: SpatialData) -> None:
    how: dict[str, Any] = {"compute": CPU, "progress": False}
    with pytest.raises(ValueError, match=r"`teacher_components=256` does not fit \d+ training spots"):
        pk.tl.fit_adapter(tiled, recipe="paper", **how)
    recipe = PAPER[0].replace(teacher_components=5)
    with pytest.raises(ValueError, match=r"`n_clusters=100` does not fit \d+ training spots"):
        pk.tl.fit_adapter(tiled, recipe=recipe, readout="paper", **how)
    with pytest.raises(ValueError, match=r"`n_components=256` does not fit \d+ training spots"):
        pk.tl.fit_adapter(tiled, recipe=recipe.replace(n_clusters=4), readout="paper", **how)


def test_a_quick_recipe_trains_nothing(
    tiled: SpatialData, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pekasc.models.selection._student.train_student", None)
    caplog.set_level(logging.INFO)
    adapter = pk.tl.fit_adapter(tiled, recipe="quick", compute=CPU, progress=False)
    assert adapter.method == "frozen" and adapter.config is None and adapter.history.empty
    assert adapter.fields_um == () and adapter.info["teacher"] is None
    members = adapter.reading.use().members  # one for every radius of the spatial context
    assert {member.name for member in members} == {"frozen:low-rank"}
    assert len({source.depth for source in adapter.reading.use().sources}) > 1
    assert f'recipe="quick" brings readout="quick" with it: {pk.Readout.preset("quick")!r}' in caplog.text
    assert "trains no epoch: the frozen encoder is read" in caplog.text
    # as the frozen encoder with the same readout
    same = pk.tl.fit_adapter(tiled, method=None, readout="quick", compute=CPU, progress=False)
    pd.testing.assert_frame_equal(same.gene_scores, adapter.gene_scores)


def test_fields_that_do_nothing_for_the_frozen_encoder(
    tiled: SpatialData, frozen: pk.Adapter, all_bits: Bits, caplog: pytest.LogCaptureFixture
) -> None:
    # a mapping is written for this call; an instance may serve several, and the log says what does nothing here
    with pytest.raises(ValueError, match=r"`recipe`: 'epochs' does nothing in this call: .*nothing is trained"):
        pk.tl.fit_adapter(tiled, recipe={"epochs": 3}, **FROZEN)
    with pytest.raises(ValueError, match=r"`compute`: 'resume' does nothing in this call: .*nothing is trained"):
        pk.tl.fit_adapter(tiled, **{**FROZEN, "compute": {"resume": "folder"}})
    caplog.set_level(logging.INFO)
    compute = CPU.replace(accumulate=2)
    adapter = pk.tl.fit_adapter(tiled, train=TRAIN, recipe=RECIPE, **{**FROZEN, "compute": compute})
    assert all_bits(adapter) == all_bits(frozen)
    assert "epochs" in caplog.text and "accumulate" in caplog.text and adapter.info["teacher"] is None
    # and one depth is trained, whatever an instance allows
    pk.tl.fit_adapter(tiled, train=TRAIN, **{**SMALL, "readout": RIDGE.replace(n_depths=2)})
    assert "readout: n_depths do" in caplog.text


@pytest.mark.parametrize("name", HEADS)
def test_every_head_survives_the_disk(tiled: SpatialData, tmp_path: Path, name: str) -> None:
    adapter = pk.tl.fit_adapter(tiled, **{**FROZEN, "readout": RIDGE.replace(head=name, depth=2)})
    assert adapter.info["head"] == name
    adapter.save(tmp_path / "adapter")
    loaded = pk.Adapter.load(tmp_path / "adapter")
    assert [member.name for member in loaded.reading.members] == [f"frozen:{name}"] and loaded.info["head"] == name
    tiles = pk.get.tiles(tiled)[:9].to_numpy()
    expected = adapter.predict(tiles, mpp=2.0, compute=CPU)
    np.testing.assert_array_equal(loaded.predict(tiles, mpp=2.0, compute=CPU), expected)
    pk.tl.predict_expression(tiled, loaded, **PREDICT)
    np.testing.assert_allclose(_predicted(tiled, adapter)[:9], expected, atol=1e-5)


@pytest.mark.parametrize("method", [None, "bone"])
def test_spatial_context_is_the_head_on_neighbours_features(
    tiled: SpatialData, tmp_path: Path, method: str | None
) -> None:
    how = {**SMALL, "recipe": None if method is None else RECIPE.replace(choose_epochs=False, learning_rate=3e-3)}
    adapter = pk.tl.fit_adapter(tiled, method=method, **{**how, "readout": RIDGE.replace(depth=2, context_um=150)})
    assert adapter.context_um == 150 and adapter.info["context_um"] == [150]
    pk.tl.predict_expression(tiled, adapter, **PREDICT)
    table = tiled["table"]
    x, labels = table.obsm["X_peka"], table.obs["region"].astype(str).to_numpy()
    # the phantom has 1 um per unit, and its table is in the order of its shapes
    points = [point for region in ("P1S1_spots", "P2S1_spots") for point in tiled[region].geometry]
    coords_um = np.array([(point.x, point.y) for point in points])
    both = with_context(x, coords_um, labels, 150.0)
    assert both.shape == (table.n_obs, 2 * x.shape[1])
    y = log1p_cp10k(table).toarray()[:, table.var_names.get_indexer(adapter.genes)]
    np.testing.assert_allclose(_predicted(tiled, adapter), ridge(both, y, adapter.info["alpha"], both), atol=1e-4)
    # and from arrays, also after a save
    adapter.save(tmp_path / "adapter")
    tiles = pk.get.tiles(tiled).to_numpy()
    for one in (adapter, pk.Adapter.load(tmp_path / "adapter")):
        made = one.predict(tiles, mpp=2.0, coords_um=coords_um, section=labels, compute=CPU)
        np.testing.assert_allclose(made, _predicted(tiled, adapter), atol=1e-4)
        # without positions, the head that was fitted without context predicts
        alone = one.predict(tiles, mpp=2.0, compute=CPU)
        plain = {**how, "readout": RIDGE.replace(depth=2)}
        without = pk.tl.fit_adapter(tiled, method=method, **plain)
        np.testing.assert_allclose(alone, without.predict(tiles, mpp=2.0, compute=CPU), atol=1e-4)


def test_a_frozen_encoder_at_two_depths(tiled: SpatialData, tmp_path: Path) -> None:
    chosen = pk.tl.fit_adapter(tiled, **{**FROZEN, "readout": RIDGE.replace(n_depths=2)})
    (source,) = chosen.reading.sources
    assert source.depth is not None and len(source.depth) in (1, 2)
    adapter = pk.tl.fit_adapter(tiled, **{**FROZEN, "readout": RIDGE.replace(depth=(2, 4))})
    (source,) = adapter.reading.sources
    assert source.depth == adapter.depth == (2, 4)
    (linear,) = adapter.reading.members[0].head.blocks[0].maps.values()
    assert linear.centre.shape == (512 * 2,)
    adapter.save(tmp_path / "adapter")
    loaded = pk.Adapter.load(tmp_path / "adapter")
    assert loaded.depth == adapter.depth
    pk.tl.predict_expression(tiled, loaded, **PREDICT)
    tiles = pk.get.tiles(tiled)[:9].to_numpy()
    expected = adapter.predict(tiles, mpp=2.0, compute=CPU)
    np.testing.assert_allclose(_predicted(tiled, adapter)[:9], expected, atol=1e-5)


def test_an_encoder_without_blocks_works_frozen(tiled: SpatialData) -> None:
    adapter = pk.tl.fit_adapter(tiled, encoder=RESNET, train=TRAIN, **FROZEN)
    pk.tl.predict_expression(tiled, adapter, **PREDICT)
    assert np.isfinite(tiled["table"].layers["peka"]).any()


@pytest.mark.parametrize(
    ("change", "message"), [(-1.0, "negative values"), (np.nan, "1 values that are NaN"), (0.5, "no integers")]
)
def test_bad_counts(tiled: SpatialData, change: float, message: str) -> None:
    values = tiled["table"].X.toarray()
    values[0, 0] = change
    tiled["table"].X = values
    with pytest.raises(ValueError, match=f"Raw counts are needed, but `X` has .*{message}"):
        pk.tl.fit_adapter(tiled, train=TRAIN, **FROZEN)


def test_log_normalised_data_are_refused(tiled: SpatialData) -> None:
    tiled["table"].X = tiled["table"].layers["truth"]
    with pytest.raises(ValueError, match=r'`layer=`.*`target="as_is"`'):
        pk.tl.fit_adapter(tiled, train=TRAIN, **FROZEN)


def test_a_table_alone_has_no_tiles(tiled: SpatialData) -> None:
    with pytest.raises(TypeError, match="Tiles need images: expected a SpatialData, got AnnData"):
        pk.tl.fit_adapter(tiled["table"], **FROZEN)  # type: ignore[arg-type]


def test_the_callers_random_numbers_are_left_alone(tiled: SpatialData) -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(2), np.random.rand(2)
    torch.manual_seed(3)
    np.random.seed(3)
    pk.tl.fit_adapter(tiled, train=TRAIN, method=LoraConfig(r=2, lora_dropout=0.5), **SMALL)
    assert torch.equal(torch.rand(2), expected[0])
    np.testing.assert_array_equal(np.random.rand(2), expected[1])


def test_a_students_fold_never_saw_the_group_that_it_held_out(tiled: SpatialData) -> None:
    first = pk.tl.fit_adapter(tiled, **SMALL).history
    table = tiled["table"]
    values = table.X.toarray()
    rows = np.flatnonzero(table.obs["region"] == "P2S1_spots")
    values[rows] = values[np.random.default_rng(0).permutation(rows)]  # as many spots see each gene as before
    table.X = csr_matrix(values)
    second = pk.tl.fit_adapter(tiled, **SMALL).history
    lessons = ["loss", "kd", "sa"]
    for held_out, same in (("P2", True), ("P1", False)):
        a, b = (frame.loc[(frame["held_out"] == held_out) & (frame["epoch"] > 0)] for frame in (first, second))
        assert len(a) == 1
        assert a[lessons].equals(b[lessons]) is same
        assert not a["val_error"].equals(b["val_error"])


def test_patients_are_held_out_whole_where_they_are_known(tiled: SpatialData, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pekasc"):
        assert pk.tl.fit_adapter(tiled, **FROZEN).info["groups"] == ["P1", "P2"]
    assert "Held out in turn: obs['patient'] (P1, P2)" in caplog.text
    del tiled["table"].obs["patient"]
    assert pk.tl.fit_adapter(tiled, **FROZEN).info["groups"] == ["P1S1_spots", "P2S1_spots"]


def test_blocks_of_one_section_are_one_section(tiled: SpatialData, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pekasc"):
        adapter = pk.tl.fit_adapter(tiled, train=["P1S1_spots"], **FROZEN)
    assert "One training group (P1S1_spots): blocks of its tissue are held out in turn, with a margin." in caplog.text
    scores = adapter.gene_scores
    assert scores["n_sections"].max() == 1 and scores["pearson"].max() > 0.4
    assert set(trust_levels(scores)) <= {"low", "medium"}
    assert "held-out blocks of the one training group: Pearson median" in repr(adapter)


def test_totals_over_other_genes_are_warned_of(tiled: SpatialData) -> None:
    adapter = pk.tl.fit_adapter(tiled, train=["P1S1_spots"], **FROZEN)
    assert adapter.info["n_genes_in_total"] == 24
    few = SpatialData(
        images=dict(tiled.images), shapes=dict(tiled.shapes), tables={"table": tiled["table"][:, :8].copy()}
    )
    with pytest.warns(UserWarning, match="Totals of spots are over 8 genes here, and were over 24 in the training"):
        pk.tl.predict_expression(few, adapter, compute=CPU, progress=False)
    other = pk.tl.fit_adapter(few, train=["P1S1_spots"], **FROZEN)
    with pytest.warns(UserWarning, match="over 24 genes here, and were over 8"):
        pk.tl.predict_expression(tiled, other, compute=CPU, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pk.tl.predict_expression(tiled, adapter, compute=CPU, progress=False)


def test_a_configurations_own_layers_and_rank_are_recorded(tiled: SpatialData) -> None:
    method = LoraConfig(r=2, target_modules=["attn.qkv", "mlp.fc1"], bias="all")
    recipe = PAPER[0].replace(
        blocks=1, n_clusters=2, teacher_components=5, epochs=1, learning_rate=1e-2, cluster_head_epochs=3
    )
    how = {**SMALL, "readout": RIDGE.replace(depth=2, n_components=5)}
    adapter = pk.tl.fit_adapter(tiled, train=TRAIN, method=method, **{**how, "recipe": recipe})
    assert adapter.info["rank"] == 2
    assert {name.split("model.")[-1].split(".lora")[0] for name in adapter.weights["adapter"] if "lora_" in name} == {
        "blocks.1.attn.qkv", "blocks.1.mlp.fc1",
    }  # fmt: skip
    # trained biases are part of what is kept
    tiles = pk.get.tiles(tiled).to_numpy()[:5]
    frozen = pk.tl.fit_adapter(tiled, train=TRAIN, **{**FROZEN, "readout": RIDGE.replace(depth=2)})
    before = frozen.embed(tiles, mpp=2.0)
    after = adapter.embed(tiles, mpp=2.0)
    assert np.abs(after - before).max() > 1e-3
    merged = adapter.merge()
    model = EncoderNetwork(adapter.encoder, 56)
    with torch.no_grad():
        tokens = merged.forward_features(model.normalise(torch.from_numpy(tiles)))
    got = torch.cat([tokens[:, 0], tokens[:, merged.num_prefix_tokens :].mean(dim=1)], dim=1)
    np.testing.assert_allclose(got.numpy(), after, atol=1e-4)


def test_tiles_of_another_scale_than_the_encoders_are_said(
    tiled: SpatialData, caplog: pytest.LogCaptureFixture
) -> None:
    row = replace(resolve_encoder("tiny"), mpp=0.5)
    pk.tl.fit_adapter(tiled, encoder=row, **FROZEN)
    assert "Encoder 'tiny' was trained at 0.5 um/px; these tiles have 2." in caplog.text


def test_fields_of_view_and_several_orientations(tiled: SpatialData, tmp_path: Path) -> None:
    readout = RIDGE.replace(depth=2, fields_um=(224,), orientations=2)
    adapter = pk.tl.fit_adapter(tiled, **{**SMALL, "readout": readout})
    assert adapter.fields_um == (224.0,) and adapter.orientations == 2
    assert "fields      224 um around the tile" in str(adapter) and "averaged over 2 orientations" in str(adapter)
    pk.tl.predict_expression(tiled, adapter, **PREDICT)
    # obsm has the adapted features alone; the wider field is read by the frozen encoder
    assert tiled["table"].obsm["X_peka"].shape[1] == 512
    assert {source[:2] for source in adapter.reading.use().sources} == {("adapted", 0), ("frozen", 1)}

    # the same from arrays, and after a save
    near, wide = (pk.get.tiles(tiled, field_um=width).to_numpy()[:9] for width in (None, 224))
    adapter.save(tmp_path / "adapter")
    for one in (adapter, pk.Adapter.load(tmp_path / "adapter")):
        predicted = one.predict(near, mpp=2.0, fields={224: wide}, compute=CPU)
        np.testing.assert_allclose(predicted, _predicted(tiled, one)[:9], atol=1e-4)
        # the wide tiles count, and without them the head that was fitted on the tiles alone predicts
        assert np.abs(one.predict(near, mpp=2.0, fields={224: near}, compute=CPU) - predicted).max() > 1e-3
        alone = one.predict(near, mpp=2.0, compute=CPU)
        assert np.isfinite(alone).all() and np.abs(alone - predicted).max() > 1e-3
    pk.tl.embed_tiles(tiled, adapter, key_added="X_again", **PREDICT)
    np.testing.assert_allclose(tiled["table"].obsm["X_again"], tiled["table"].obsm["X_peka"], atol=1e-5)
    record = read_uns(tiled["table"], "peka")
    assert record is not None and record["fields_um"] == [224.0] and "scales" not in record

    for fields, error, message in (
        ({300: wide}, ValueError, r"must hold tiles of 224 um .* got tiles of \[300.0\] um"),
        ({224: wide, 448: wide}, ValueError, r"got tiles of \[224.0, 448.0\]"),
        ({}, ValueError, r"got tiles of \[\] um"),
        ({224: wide[:3]}, ValueError, r"the tiles of 224 um have shape \(3, 56, 56, 3\), the others \(9, "),
        (wide, TypeError, r"must map widths in um to tiles, such as \{224: wide\}, got ndarray"),
    ):
        with pytest.raises(error, match=message):
            adapter.predict(near, mpp=2.0, fields=fields)
    with pytest.raises(ValueError, match="'fields_um' does nothing in this call: an adapter has its own readout"):
        pk.tl.embed_tiles(tiled, adapter, readout={"fields_um": (224,)})


def _predicted(sdata: SpatialData, adapter: pk.Adapter) -> np.ndarray:
    columns = sdata["table"].var_names.get_indexer(list(adapter.genes))
    return np.asarray(sdata["table"].layers["peka"][:, columns])


def test_features_of_a_wider_field_are_those_of_wider_tiles(tiled: SpatialData) -> None:
    plain = pk.tl.fit_adapter(tiled, **{**FROZEN, "readout": RIDGE.replace(depth=2)})
    with pytest.raises(ValueError, match="reads no wider field of view: leave `fields=` out"):
        plain.predict(pk.get.tiles(tiled)[:2].to_numpy(), mpp=2.0, fields={224: np.zeros((2, 56, 56, 3), np.uint8)})
    pk.pp.tile(tiled, tile_px=56, mpp=4.0, key_added="wide")
    np.testing.assert_array_equal(pk.get.tiles(tiled, key="wide"), pk.get.tiles(tiled, field_um=224))
    depth = {"depth": 2}
    pk.tl.embed_tiles(tiled, "tiny", key_added="near", readout=depth, **PREDICT)
    pk.tl.embed_tiles(tiled, "tiny", key="wide", key_added="wide_features", readout=depth, **PREDICT)
    pk.tl.embed_tiles(tiled, "tiny", key_added="both", readout={**depth, "fields_um": 224}, **PREDICT)
    table = tiled["table"]
    side_by_side = np.concatenate([table.obsm["near"], table.obsm["wide_features"]], axis=1)
    np.testing.assert_allclose(table.obsm["both"], side_by_side, atol=1e-5)
    assert read_uns(table, "near")["fields_um"] == [] and read_uns(table, "both")["fields_um"] == [224.0]  # type: ignore[index]
    with pytest.raises(ValueError, match="tiles of 5600 um lie to 9.% outside of their images: leave this field"):
        pk.tl.embed_tiles(tiled, "tiny", readout={**depth, "fields_um": (5600,)}, **PREDICT)
    with pytest.raises(ValueError, match="100 um is not wider than the tile"):
        pk.tl.embed_tiles(tiled, "tiny", readout={**depth, "fields_um": 100}, **PREDICT)


def test_inner_folds_keep_the_widest_tiles_apart() -> None:
    spec = TileSpec(112, 1.0)
    assert margin_um(spec) == pytest.approx(112 * 2**0.5)
    assert margin_um(spec, (224.0,)) == pytest.approx(224 * 2**0.5)


def test_tissue_that_a_wide_tile_saw_is_training_tissue(tiled: SpatialData) -> None:
    table = tiled["table"]
    x = np.array([g.x for g in tiled["P1S1_spots"].geometry])
    left = np.zeros(table.n_obs, dtype=bool)
    left[: len(x)] = x < np.median(x)
    left |= (table.obs["region"] == "P2S1_spots").to_numpy()
    known = []
    for fields_um in (None, (448.0,)):
        readout = RIDGE.replace(depth=1, fields_um=fields_um)
        adapter = pk.tl.fit_adapter(tiled, train=left, groups="patient", **{**FROZEN, "readout": readout})
        pk.tl.predict_expression(tiled, adapter, **PREDICT)
        known.append(table.obs["peka_train"].to_numpy(dtype=bool).copy())
        assert read_uns(table, "X_peka")["fields_um"] == list(fields_um or ())
    np.testing.assert_array_equal(known[0], left)
    assert known[1][left].all() and known[1].sum() > left.sum() + 5


def test_spots_stay_with_their_tiles_in_any_order(tiled: SpatialData) -> None:
    order = np.random.default_rng(0).permutation(tiled["table"].n_obs)
    mixed = SpatialData(
        images=dict(tiled.images), shapes=dict(tiled.shapes), tables={"table": tiled["table"][order].copy()}
    )
    plain, again = (
        pk.tl.fit_adapter(sdata, groups="patient", **{**FROZEN, "readout": RIDGE.replace(depth=4)})
        for sdata in (tiled, mixed)
    )
    np.testing.assert_allclose(again.gene_scores["pearson"], plain.gene_scores["pearson"], atol=1e-5)


class _Button(L.Callback):
    """Presses the stop button of a notebook."""

    def on_train_batch_end(self, *args: Any) -> None:
        raise KeyboardInterrupt


def test_a_fit_leaves_nothing_behind(tiled: SpatialData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []

    def spied(cls: type[Any]) -> None:
        init = cls.__init__

        def spy(self: Any, *args: Any, **options: Any) -> None:
            made.append(weakref.ref(self))
            init(self, *args, **options)

        monkeypatch.setattr(cls, "__init__", spy)

    for cls in (L.Trainer, Student, EncoderNetwork, Job):
        spied(cls)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gc.disable()  # what reference counts do not free would wait for the collector
    try:
        fitted = pk.tl.fit_adapter(
            tiled, **{**SMALL, "recipe": RECIPE.replace(choose_epochs=False), "compute": CPU.replace(max_memory=1)}
        )
        assert len(made) == 8  # network and job; trainer and student of two inner folds and of the last training
        assert [type(ref()) for ref in made if ref() is not None] == []
        assert fitted.info["epochs"] == 1
        # torch makes a folder for its compiler
        assert [p.name for p in tmp_path.iterdir() if not p.name.startswith("torchinductor")] == []
    finally:
        gc.enable()


def test_the_stop_button_stops(tiled: SpatialData, all_bits: Bits) -> None:
    before, handler = pk.tl.fit_adapter(tiled, **SMALL), signal.getsignal(signal.SIGINT)
    stopped = {**SMALL, "compute": CPU.replace(trainer={"callbacks": [_Button()]})}
    with pytest.raises(KeyboardInterrupt):
        pk.tl.fit_adapter(tiled, key_added="other", **stopped)
    assert signal.getsignal(signal.SIGINT) == handler
    assert "other" not in tiled["table"].uns["pekasc"]
    assert all_bits(pk.tl.fit_adapter(tiled, **SMALL)) == all_bits(before)
