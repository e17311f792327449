"""tl.fit_adapter: it looks at nothing outside `train=`, repeats itself, and refuses what it cannot do."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import HRAConfig, LoraConfig
from scipy.sparse import csr_matrix
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import get_transformation

import pekasc as pk
from pekasc._keys import read_uns
from pekasc.models.selection._choice import choose
from pekasc.models.selection._fit import margin_um
from pekasc.tiling import TileSpec

Bits = Callable[[pk.Adapter], dict[str, bytes]]
TRAIN = ["P1S1_spots"]
QUICK: dict[str, Any] = {"method": None, "device": "cpu", "progress": False}
SMALL: dict[str, Any] = {"epochs": 1, "rank": 8, "depth": 2, "device": "cpu", "progress": False}


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
    assert changed["coef"] != got["coef"]
    assert any(changed[name] != got[name] for name in got if name.startswith("adapter."))


def test_the_rule_that_chooses_looks_at_nothing_outside_train(tiled: SpatialData, all_bits: Bits) -> None:
    options = {**SMALL, "depth": None, "learning_rate": 3e-3}
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
        adapter = pk.tl.fit_adapter(sdata)
    assert (adapter.spec.tile_px, adapter.spec.mpp) == (224, 0.5)
    assert adapter.method == "bone" and adapter.encoder.short == "tiny"
    assert "P1S1_spots_tiles" in sdata.shapes
    for said in (
        'encoder="tiny"',
        'teacher="pca"',
        "method='bone'",
        "blocks of its tissue",
        "chosen",
        "16 genes, detected in 10 % of the",
    ):
        assert said in caplog.text, said
    assert read_uns(sdata["table"], "adapter")["method"] == "bone"
    assert adapter.info["held_out"] == ["block1", "block2", "block3"]


def test_frozen_encoder(tiled: SpatialData, frozen: pk.Adapter) -> None:
    assert frozen.method == "frozen" and frozen.config is None and not frozen.weights
    assert frozen.history.empty
    table = frozen.selection
    assert set(table["stage"]) == {"frozen"} and set(table["depth"]) == {"1", "2", "3", "4", "5", "6"}
    assert table.loc[table["error"].idxmin(), "depth"] == frozen.info["depth"]
    # its head is the head on plain features at that depth
    pk.tl.embed_tiles(tiled, "tiny", progress=False, readout={"depth": frozen.depth}, compute={"device": "cpu"})
    x = tiled["table"].obsm["X_tiny"]
    pk.tl.predict_expression(tiled, frozen, progress=False, compute={"device": "cpu"})
    np.testing.assert_array_equal(tiled["table"].obsm["X_peka"], x)
    np.testing.assert_array_equal(tiled["table"].layers["peka"], frozen.head.predict(x))


def test_feature_matching_is_part_of_the_loss(tiled: SpatialData) -> None:
    adapter = pk.tl.fit_adapter(tiled, **{**SMALL, "epochs": 3}, groups="patient", recipe={"matching_weight": 4})
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
    assert (best["epochs"], best["alpha"]) == (adapter.info["epochs"], adapter.info["alpha"])
    assert list(adapter.gene_scores.index) == list(adapter.genes)
    assert adapter.gene_scores["pearson"].dropna().between(-1, 1).all()
    assert adapter.info["groups"] == ["P1", "P2"] and adapter.info["n_spots"] == tiled["table"].n_obs
    record = read_uns(tiled["table"], "adapter")
    assert record["encoder_digest"] == adapter.encoder_digest and record["n_genes"] == len(adapter.genes)
    json.dumps(dict(adapter.info))


def test_gene_scores_are_the_correlations_on_held_out_groups(tiled: SpatialData) -> None:
    adapter = pk.tl.fit_adapter(tiled, **QUICK, groups="patient")
    # by hand: each patient's head, judged on the other patient
    pk.tl.embed_tiles(tiled, "tiny", progress=False, readout={"depth": adapter.depth}, compute={"device": "cpu"})
    from pekasc._expression import log1p_cp10k
    from pekasc.models.heads._ridge import fit_ridge

    table = tiled["table"]
    x, y = table.obsm["X_tiny"], log1p_cp10k(table).toarray()[:, table.var_names.get_indexer(adapter.genes)]
    patient = table.obs["patient"].to_numpy()
    per_patient = []
    for held_out in ("P1", "P2"):
        a, b = patient != held_out, patient == held_out
        guess = fit_ridge(x[a], y[a]).head(adapter.head.alpha).predict(x[b])
        per_patient.append([np.corrcoef(guess[:, j], y[b][:, j])[0, 1] for j in range(y.shape[1])])
    np.testing.assert_allclose(adapter.gene_scores["pearson"], np.mean(per_patient, axis=0), atol=1e-5)
    assert (adapter.gene_scores["n_sections"] == 2).all()


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"blocks": 2, "depth": 4}, {2, 3}),
        ({"depth": (1, 3)}, {0, 1, 2}),
        ({"depth": -1, "blocks": 1, "method": "lora"}, {5}),
        ({"method": LoraConfig(r=2, lora_alpha=4), "depth": 1}, {0}),
    ],
)
def test_blocks_depth_and_method(tiled: SpatialData, options: dict[str, Any], layers: set[int]) -> None:
    adapter = pk.tl.fit_adapter(tiled, train=TRAIN, **{**SMALL, **options})
    names = adapter.weights["adapter"]
    assert {int(name.split("blocks.")[1].split(".")[0]) for name in names} == layers
    assert all("attn.qkv" in name for name in names)
    depth = options["depth"]
    assert adapter.depth == (depth if isinstance(depth, tuple) else (6,) if depth == -1 else (depth,))
    width = 512 * len(adapter.depth)
    assert adapter.head.projection.mean.shape == (width,)


def test_train_says_the_same_in_all_its_forms(tiled: SpatialData, frozen: pk.Adapter, all_bits: Bits) -> None:
    table = tiled["table"]
    mask = (table.obs["region"] == "P1S1_spots").to_numpy()
    table.obs["mine"] = mask
    for train in (mask, "mine", list(map(bool, mask)), pd.Series(mask), ["P1S1"]):
        assert all_bits(pk.tl.fit_adapter(tiled, train=train, **QUICK)) == all_bits(frozen)


def test_a_series_is_joined_by_its_index(tiled: SpatialData, frozen: pk.Adapter, all_bits: Bits) -> None:
    table = tiled["table"]
    mask = (table.obs["region"] == "P1S1_spots").sample(frac=1, random_state=1)
    assert not np.array_equal(mask.to_numpy(), (table.obs["region"] == "P1S1_spots").to_numpy())
    for train in (mask, mask.astype("boolean")):
        assert all_bits(pk.tl.fit_adapter(tiled, train=train, **QUICK)) == all_bits(frozen)
    wanted = pd.Series(table.var_names.isin(frozen.genes[:3]), index=table.var_names).sample(frac=1, random_state=2)
    assert set(pk.tl.fit_adapter(tiled, train=TRAIN, genes=wanted, **QUICK).genes) == set(frozen.genes[:3])
    with pytest.raises(ValueError, match=r"index of the Series `train=` does not hold the table's names: it has \['x"):
        pk.tl.fit_adapter(tiled, train=mask.rename(lambda name: f"x{name}"), **QUICK)


def test_a_stored_zero_is_a_zero(tiled: SpatialData, frozen: pk.Adapter) -> None:
    table = tiled["table"]
    dense = table.X.toarray()
    dense[1:, 0] = 0
    stored = csr_matrix(np.where(dense == 0, 1, dense))
    stored.data = dense[stored.nonzero()].astype(np.float32)
    assert stored.nnz == dense.size
    table.X = stored
    genes = pk.tl.fit_adapter(tiled, train=TRAIN, **QUICK).genes
    assert table.var_names[0] not in genes and table.X.nnz == dense.size
    table.X = dense
    assert pk.tl.fit_adapter(tiled, train=TRAIN, **QUICK).genes == genes


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
        pk.tl.fit_adapter(tiled, train=train, **QUICK)


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
        assert set(pk.tl.fit_adapter(tiled, genes=genes, train=TRAIN, **QUICK).genes) == set(names)
    table.var["ensembl"] = [f"ENSG{i}" for i in range(table.n_vars)]
    adapter = pk.tl.fit_adapter(tiled, genes=["ENSG3"], gene_key="ensembl", train=TRAIN, **QUICK)
    assert adapter.genes == ("ENSG3",)


def test_genes_seen_too_rarely_are_left_out(tiled: SpatialData) -> None:
    table = tiled["table"]
    values = table.X.toarray()
    second = np.flatnonzero(table.obs["patient"] == "P2")
    values[second, 0] = 0  # seen in one patient only
    values[:, 1] = 0
    values[: table.n_obs // 2 : 30, 1] = 5
    table.X = values
    adapter = pk.tl.fit_adapter(tiled, groups="patient", **QUICK)
    seen = np.array([(values[table.obs["patient"] == p] > 0).mean(axis=0) for p in ("P1", "P2")]).min(axis=0)
    assert list(adapter.genes) == list(table.var_names[seen >= 0.1])
    assert table.var_names[0] not in adapter.genes and table.var_names[1] not in adapter.genes


def test_target_as_is(tiled: SpatialData) -> None:
    table = tiled["table"]
    from pekasc._expression import log1p_cp10k

    table.layers["log"] = log1p_cp10k(table)
    table.X = table.layers["log"]
    adapter = pk.tl.fit_adapter(tiled, target="as_is", layer="log", train=TRAIN, **QUICK)
    assert "as stored" in repr(adapter)
    rows = np.flatnonzero(table.obs["region"] == "P1S1_spots")
    expected = table.layers["log"][rows].toarray().mean(axis=0)[table.var_names.get_indexer(adapter.genes)]
    np.testing.assert_allclose(adapter.head.intercept, expected, rtol=1e-5)


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
        ({"n_clusters": 1000}, ValueError, r"`n_clusters=1000` does not fit \d+ training spots"),
        ({"n_components": 500}, ValueError, r"`n_components=500` does not fit \d+ training spots"),
        ({"preset": "paper"}, ValueError, r"n_clusters=100|n_components=256"),
        ({"preset": "papr"}, ValueError, "`preset='papr'` is not known"),
        ({"encoder": RESNET}, ValueError, r"needs linear layers \['attn.qkv'\].*`method=None`"),
        ({"encoder": "tinny"}, ValueError, "Close names: tiny"),
        ({"method": "bon"}, ValueError, "`method='bon'` is not known"),
        ({"depth": 7}, ValueError, "has 6 blocks: give 1 to 6"),
        ({"scales": 2}, ValueError, r"`scales=2` must be multiples .*`scales=\(1, 2\)`"),
        ({"scales": None}, ValueError, r"`scales=None` must be multiples"),
        ({"orientations": True}, ValueError, r"`orientations=True` must be one of"),
        ({"orientations": "all"}, ValueError, r"`orientations='all'` must be one of \[1, 2, 4, 8\]"),
        ({"blocks": 9}, ValueError, "`blocks=9` does not fit"),
        ({"genes": ["ENSG1", "ENSG2"]}, ValueError, r"None of the 2 genes .*`gene_key=`"),
        ({"genes": ["STATE_TUMOUR_01"]}, ValueError, "None of the 1 genes"),
        (
            {"genes": ["STATE_TUMOUR_001", "STATE_TUMOUR_0001"]},
            KeyError,
            "1 of 2 genes .*Did you mean STATE_TUMOUR_001",
        ),
        ({"genes": []}, ValueError, "`genes=` is empty"),
        ({"genes": np.zeros(24, dtype=bool)}, ValueError, "`genes=` is empty: the mask"),
        ({"n_components": 2.5}, TypeError, "`n_components` must be a whole number, got 2.5"),
        ({"epochs": 1.5}, TypeError, "`epochs` must be a whole number, got 1.5"),
        ({"depth": []}, ValueError, "`depth` is empty"),
        ({"depth": "last"}, TypeError, "`depth` counts blocks"),
        ({"key_added": "tiles"}, ValueError, r"holds tiles, which a adapter must not replace|holds tiles"),
        ({"groups": "donor"}, KeyError, "`groups='donor'` not found in `obs`.*patient"),
        ({"layer": "raw"}, KeyError, "Layer 'raw' not found"),
        ({"layer": "truth"}, ValueError, r"layers\['truth'\] has values that are no integers"),
        ({"learning_rate": -1.0}, ValueError, "`learning_rate=-1.0` must be positive"),
        ({"kd_weight": 2}, ValueError, "between 0 and 1"),
        ({"matching_weight": -1}, ValueError, "`matching_weight=-1` must be 0 or a positive number"),
        ({"device": "cuda:77"}, ValueError, "cannot be used"),
        ({"precision": "fp8"}, ValueError, "`precision='fp8'` is not known"),
        ({"key_added": "a/b"}, ValueError, "cannot be stored"),
        ({"tile_px": 112}, ValueError, "ask for 112 px"),
        ({"table_name": "cells"}, KeyError, "Table 'cells' not found"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
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
        (LoraConfig(r=4, init_lora_weights=False), "'lora' does not begin as the frozen encoder"),
        (LoraConfig(r=4, init_lora_weights="pissa"), "'lora' left the encoder changed"),
        (HRAConfig(r=5), "'hra' does not begin as the frozen encoder.*an even rank for HRA"),
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
        ({"n_clusters": 1000}, "`n_clusters=1000` does not fit 36 training spots"),
        ({"encoder": RESNET, "tile_px": 64, "mpp": 2.0}, r"needs linear layers \['attn.qkv'\] .* 'resnet18'"),
    ],
)
def test_an_error_leaves_no_tiles_behind(untiled: SpatialData, options: dict[str, Any], message: str) -> None:
    before = _state(untiled)
    with pytest.raises(ValueError, match=message):
        pk.tl.fit_adapter(untiled, **{"tile_px": 56, "mpp": 2.0, **SMALL, **options})
    assert _state(untiled) == before


def test_little_memory_gives_the_same_adapter(tiled: SpatialData, all_bits: Bits) -> None:
    # several epochs and folds, whose features all lie in files
    plain = pk.tl.fit_adapter(tiled, **{**SMALL, "epochs": 2})
    assert all_bits(pk.tl.fit_adapter(tiled, **{**SMALL, "epochs": 2}, compute={"max_memory": 1})) == all_bits(plain)


def test_more_blocks_than_the_depth_that_was_chosen(
    tiled: SpatialData, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def first(features: Any, *args: Any) -> Any:
        return replace(choose(features, *args), depth=(1,))

    monkeypatch.setattr("pekasc.models._fit.choose", first)
    options = {**SMALL, "depth": None, "blocks": 2}
    with caplog.at_level("INFO"):
        adapter = pk.tl.fit_adapter(tiled, **options)
    assert adapter.depth == (1,)
    assert "Features are taken after block 1, so all of these blocks are adapted, not 2" in caplog.text
    # a depth of the user's own choice is another matter
    with pytest.raises(ValueError, match="`blocks=2` does not fit"):
        pk.tl.fit_adapter(tiled, **{**options, "depth": 1})


def test_preset_paper_never_adapts(tiled: SpatialData) -> None:
    with pytest.raises(ValueError, match=r"`n_components=256` does not fit \d+ training spots"):
        pk.tl.fit_adapter(
            tiled,
            progress=False,
            recipe=pk.Recipe.preset("paper"),
            readout=pk.Readout.preset("paper"),
            compute={"device": "cpu"},
        )
    with pytest.raises(ValueError, match=r"`n_clusters=100` does not fit \d+ training spots"):
        pk.tl.fit_adapter(
            tiled,
            progress=False,
            recipe=pk.Recipe.preset("paper").replace(teacher_components=5),
            readout=pk.Readout.preset("paper").replace(n_components=5),
            compute={"device": "cpu"},
        )


def test_an_encoder_without_blocks_works_frozen(tiled: SpatialData) -> None:
    adapter = pk.tl.fit_adapter(tiled, encoder=RESNET, train=TRAIN, **QUICK)
    assert np.isfinite(adapter.head.coef).all()
    pk.tl.predict_expression(tiled, adapter, progress=False, compute={"device": "cpu"})
    assert np.isfinite(tiled["table"].layers["peka"]).any()


@pytest.mark.parametrize(
    ("change", "message"), [(-1.0, "negative values"), (np.nan, "1 values that are NaN"), (0.5, "no integers")]
)
def test_bad_counts(tiled: SpatialData, change: float, message: str) -> None:
    values = tiled["table"].X.toarray()
    values[0, 0] = change
    tiled["table"].X = values
    with pytest.raises(ValueError, match=f"Raw counts are needed, but `X` has .*{message}"):
        pk.tl.fit_adapter(tiled, train=TRAIN, **QUICK)


def test_log_normalised_data_are_refused(tiled: SpatialData) -> None:
    tiled["table"].X = tiled["table"].layers["truth"]
    with pytest.raises(ValueError, match=r'`layer=`.*`target="as_is"`'):
        pk.tl.fit_adapter(tiled, train=TRAIN, **QUICK)


def test_a_table_alone_has_no_tiles(tiled: SpatialData) -> None:
    with pytest.raises(TypeError, match="Tiles need images: expected a SpatialData, got AnnData"):
        pk.tl.fit_adapter(tiled["table"], **QUICK)  # type: ignore[arg-type]


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
        assert pk.tl.fit_adapter(tiled, **QUICK).info["groups"] == ["P1", "P2"]
    assert "Held out in turn: obs['patient'] (P1, P2)" in caplog.text
    del tiled["table"].obs["patient"]
    assert pk.tl.fit_adapter(tiled, **QUICK).info["groups"] == ["P1S1_spots", "P2S1_spots"]


def test_a_configurations_own_layers_and_rank_are_recorded(tiled: SpatialData) -> None:
    method = LoraConfig(r=2, target_modules=["attn.qkv", "mlp.fc1"], bias="all")
    adapter = pk.tl.fit_adapter(tiled, train=TRAIN, method=method, **{
        **SMALL, "rank": None, "n_clusters": 2, "n_components": 5, "learning_rate": 1e-2,
    }, recipe=pk.Recipe.preset("paper").replace(blocks=1), readout=pk.Readout.preset("paper"))  # fmt: skip
    assert adapter.info["rank"] == 2
    assert {name.split("model.")[-1].split(".lora")[0] for name in adapter.weights["adapter"] if "lora_" in name} == {
        "blocks.1.attn.qkv", "blocks.1.mlp.fc1",
    }  # fmt: skip
    # trained biases are part of what is kept
    tiles = pk.get.tiles(tiled).to_numpy()[:5]
    frozen = pk.tl.fit_adapter(tiled, train=TRAIN, **QUICK, readout={"depth": 2})
    before = frozen.embed(tiles, mpp=2.0)
    after = adapter.embed(tiles, mpp=2.0)
    assert np.abs(after - before).max() > 1e-3
    merged = adapter.merge()
    model = pk.models._encoders.EncoderNetwork(adapter.encoder, 56)
    with torch.no_grad():
        tokens = merged.forward_features(model.normalise(torch.from_numpy(tiles)))
    got = torch.cat([tokens[:, 0], tokens[:, merged.num_prefix_tokens :].mean(dim=1)], dim=1)
    np.testing.assert_allclose(got.numpy(), after, atol=1e-4)


def test_tiles_of_another_scale_than_the_encoders_are_said(
    tiled: SpatialData, caplog: pytest.LogCaptureFixture
) -> None:
    row = replace(pk.models._encoders.resolve_encoder("tiny"), mpp=0.5)
    pk.tl.fit_adapter(tiled, encoder=row, **QUICK)
    assert "Encoder 'tiny' was trained at 0.5 um/px; these tiles have 2." in caplog.text


def test_tiles_at_two_scales_and_in_several_orientations(tiled: SpatialData, tmp_path: Path) -> None:
    adapter = pk.tl.fit_adapter(tiled, **SMALL, readout={"scales": (1, 2), "orientations": 2})
    assert adapter.scales == (1.0, 2.0) and adapter.orientations == 2
    assert "scales      2 um/px, 4 um/px" in str(adapter) and "the mean over 2 orientations" in str(adapter)
    pk.tl.predict_expression(tiled, adapter, progress=False, compute={"device": "cpu"})
    width = adapter.head.projection.mean.shape[0]
    assert tiled["table"].obsm["X_peka"].shape[1] == width == 2 * pk.tl.fit_adapter(tiled, method=None, progress=False, readout={"depth": 2}, compute={"device": "cpu"}).head.projection.mean.shape[0]  # fmt: skip

    # the same from arrays, and after a save
    near, wide = (pk.get.tiles(tiled, scale=scale).to_numpy()[:9] for scale in (1, 2))
    adapter.save(tmp_path / "adapter")
    for one in (adapter, pk.Adapter.load(tmp_path / "adapter")):
        predicted = one.predict(near, mpp=2.0, scales={4.0: wide}, compute={"device": "cpu"})
        np.testing.assert_allclose(predicted, _predicted(tiled, one)[:9], atol=1e-4)
    pk.tl.embed_tiles(tiled, adapter, key_added="X_again", progress=False, compute={"device": "cpu"})
    np.testing.assert_allclose(tiled["table"].obsm["X_again"], tiled["table"].obsm["X_peka"], atol=1e-5)
    assert read_uns(tiled["table"], "X_again")["scales"] == [1.0, 2.0]

    for scales, error, message in (
        (None, ValueError, r"also reads tiles of 4 um/px .* got tiles of \[\]"),
        ({3.0: wide}, ValueError, r"also reads tiles of 4 um/px .* got tiles of \[3.0\]"),
        ({4.0: wide, 8.0: wide}, ValueError, r"got tiles of \[4.0, 8.0\]"),
        ({4.0: wide[:3]}, ValueError, r"the tiles of 4 um/px have shape \(3, 56, 56, 3\), the others \(9, "),
        (wide, TypeError, r"must map pixel sizes in um to tiles, such as \{4: wide\}, got ndarray"),
    ):
        with pytest.raises(error, match=message):
            adapter.predict(near, mpp=2.0, scales=scales)
    with pytest.raises(ValueError, match="has its own depth, scales and orientations"):
        pk.tl.embed_tiles(tiled, adapter, readout={"scales": (1, 2)})


def _predicted(sdata: SpatialData, adapter: pk.Adapter) -> np.ndarray:
    columns = sdata["table"].var_names.get_indexer(list(adapter.genes))
    return np.asarray(sdata["table"].layers["peka"][:, columns])


def test_a_frozen_encoder_at_two_scales(tiled: SpatialData) -> None:
    how: dict[str, Any] = {"depth": 2, "device": "cpu", "progress": False}
    plain = pk.tl.fit_adapter(tiled, method=None, **how)
    with pytest.raises(ValueError, match="reads tiles at one scale, 2 um/px: leave `scales=` out"):
        plain.predict(pk.get.tiles(tiled)[:2].to_numpy(), mpp=2.0, scales={4.0: np.zeros((2, 56, 56, 3), np.uint8)})
    pk.pp.tile(tiled, tile_px=56, mpp=4.0, key_added="wide")
    np.testing.assert_array_equal(pk.get.tiles(tiled, key="wide"), pk.get.tiles(tiled, scale=2))
    pk.tl.embed_tiles(tiled, "tiny", key_added="near", **how)
    pk.tl.embed_tiles(tiled, "tiny", key="wide", key_added="wide_features", **how)
    pk.tl.embed_tiles(tiled, "tiny", key_added="both", **how, readout={"scales": (1, 2)})
    table = tiled["table"]
    side_by_side = np.concatenate([table.obsm["near"], table.obsm["wide_features"]], axis=1)
    np.testing.assert_allclose(table.obsm["both"], side_by_side, atol=1e-5)
    with pytest.raises(ValueError, match=r"Too few training spots .* Within 316.8 um .* the widest tile"):
        # one section of 0.7 mm: held out in blocks
        pk.tl.fit_adapter(tiled, train=TRAIN, method=None, **how, readout={"scales": (1, 2)})
    with pytest.raises(ValueError, match="At scale 50, tiles of 5600 um lie to 9.% outside of their images"):
        pk.tl.embed_tiles(tiled, "tiny", **how, readout={"scales": (1, 50)})


def test_inner_folds_keep_the_widest_tiles_apart() -> None:
    spec = TileSpec(112, 1.0)
    assert margin_um(spec, (1.0,)) == pytest.approx(112 * 2**0.5)
    assert margin_um(spec, (1.0, 2.0)) == pytest.approx(224 * 2**0.5)


def test_tissue_that_a_wide_tile_saw_is_training_tissue(tiled: SpatialData) -> None:
    table = tiled["table"]
    x = np.array([g.x for g in tiled["P1S1_spots"].geometry])
    left = np.zeros(table.n_obs, dtype=bool)
    left[: len(x)] = x < np.median(x)
    left |= (table.obs["region"] == "P2S1_spots").to_numpy()
    how: dict[str, Any] = {"method": None, "depth": 1, "train": left, "device": "cpu", "progress": False}
    known = []
    for scales in ((1,), (1, 4)):
        adapter = pk.tl.fit_adapter(tiled, groups="patient", **how, readout={"scales": scales})
        pk.tl.predict_expression(tiled, adapter, progress=False, compute={"device": "cpu"})
        known.append(table.obs["peka_train"].to_numpy(dtype=bool).copy())
        assert read_uns(table, "X_peka")["scales"] == [float(scale) for scale in scales]
    np.testing.assert_array_equal(known[0], left)
    assert known[1][left].all() and known[1].sum() > left.sum() + 5
