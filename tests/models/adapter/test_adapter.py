"""Adapter: store and load, merge, plain PEFT, arrays, and what it says of itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel

import pekasc as pk
from pekasc.models.encoders import EncoderNetwork
from pekasc.models.heads import Member, Reading, Source, with_context
from pekasc.models.heads._ridge import fit_ridge
from pekasc.models.runtime import array_parts

CPU = {"device": "cpu"}


@pytest.fixture(scope="module")
def folder(adapter: pk.Adapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "mine"
    adapter.save(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def tokens(model: torch.nn.Module, adapter: pk.Adapter, tiles: np.ndarray) -> np.ndarray:
    """Return class token beside mean patch token of a plain timm model."""
    encoder = EncoderNetwork(adapter.encoder, adapter.spec.tile_px)
    with torch.inference_mode():
        x = model.forward_features(encoder.normalise(torch.from_numpy(tiles)))
    return torch.cat([x[:, 0], x[:, 1:].mean(dim=1)], dim=1).numpy()


def test_the_adapter_does_something(adapter: pk.Adapter, tiles: np.ndarray) -> None:
    plain = replace(adapter, config=None, weights={})
    assert np.abs(adapter.embed(tiles, mpp=2.0) - plain.embed(tiles, mpp=2.0)).max() > 1e-2


def test_a_new_process_predicts_the_same_bits(adapter: pk.Adapter, folder: Path, tiles: np.ndarray) -> None:
    np.save(folder.parent / "tiles.npy", tiles)
    code = (
        "import sys, numpy as np; from pekasc.models import Adapter; "
        "a = Adapter.load(sys.argv[1] + '/mine'); t = np.load(sys.argv[1] + '/tiles.npy'); "
        "np.save(sys.argv[1] + '/out.npy', a.predict(t, mpp=2.0, compute={'device': 'cpu'}))"
    )
    # torch splits sums by threads: the same number of them, wherever this test runs
    threads = f"import torch; torch.set_num_threads({torch.get_num_threads()}); "
    subprocess.run([sys.executable, "-W", "ignore", "-c", threads + code, str(folder.parent)], check=True)
    np.testing.assert_array_equal(np.load(folder.parent / "out.npy"), adapter.predict(tiles, mpp=2.0, compute=CPU))


def array_print(member: Member) -> str:
    return repr(list(array_parts(member)))


def test_all_fields_survive_the_disk(adapter: pk.Adapter, folder: Path) -> None:
    loaded = pk.Adapter.load(folder)
    for name in ("encoder", "encoder_digest", "spec", "depth", "method", "genes"):
        assert getattr(loaded, name) == getattr(adapter, name), name
    assert dict(loaded.info) == json.loads(json.dumps(dict(adapter.info)))
    for name in ("gene_scores", "history", "selection"):
        pd.testing.assert_frame_equal(
            getattr(loaded, name), getattr(adapter, name), check_names=False, check_dtype=False, rtol=1e-12
        )
    assert loaded.trained_on.keys() == adapter.trained_on.keys()
    for image, centres in adapter.trained_on.items():
        np.testing.assert_array_equal(loaded.trained_on[image], centres)
    places = [at for name, at in loaded.trained_on.items() if "." not in name]  # the others are landmarks
    assert sum(map(len, places)) == adapter.info["n_spots"]
    assert [array_print(m) for m in loaded.reading.members] == [array_print(m) for m in adapter.reading.members]
    assert (loaded.fields_um, loaded.orientations, loaded.context_um) == ((168.0,), 1, 200.0)
    assert loaded.weights.keys() == adapter.weights.keys()
    for kind, state in adapter.weights.items():
        assert all(torch.equal(loaded.weights[kind][name], tensor) for name, tensor in state.items())
    assert repr(loaded) == repr(adapter)


def test_frozen_encoder_is_stored_too(adapter: pk.Adapter, tiles: np.ndarray, tmp_path: Path) -> None:
    members = tuple(m for m in adapter.reading.members if m.name.startswith("frozen:"))
    frozen = replace(adapter, config=None, weights={}, method="frozen", reading=Reading(members))
    frozen.save(tmp_path / "frozen")
    loaded = pk.Adapter.load(tmp_path / "frozen")
    np.testing.assert_array_equal(loaded.predict(tiles, mpp=2.0), frozen.predict(tiles, mpp=2.0))
    assert not (tmp_path / "frozen" / "adapter_config.json").exists()


def test_merged_and_unmerged_agree(adapter: pk.Adapter, tiles: np.ndarray) -> None:
    merged = adapter.merge()
    assert len(merged.blocks) == 2  # cut after the adapter's depth
    assert not any("lora" in name or "miss" in name for name, _ in merged.named_modules())
    np.testing.assert_allclose(tokens(merged, adapter, tiles), adapter.embed(tiles, mpp=2.0), rtol=0, atol=1e-5)
    # and the adapter still works
    np.testing.assert_array_equal(adapter.embed(tiles, mpp=2.0), adapter.embed(tiles, mpp=2.0))


def test_weights_load_with_plain_peft_on_the_plain_model(adapter: pk.Adapter, folder: Path, tiles: np.ndarray) -> None:
    plain = EncoderNetwork(adapter.encoder, 56).model
    model = PeftModel.from_pretrained(plain, str(folder)).eval()
    timm_model = model.base_model.model
    timm_model.prune_intermediate_layers([1], prune_norm=False)
    np.testing.assert_allclose(tokens(timm_model, adapter, tiles), adapter.embed(tiles, mpp=2.0), rtol=0, atol=1e-5)


def test_order_and_batches_of_tiles_do_not_matter(adapter: pk.Adapter, tiles: np.ndarray) -> None:
    whole = adapter.predict(tiles, mpp=2.0)
    np.testing.assert_allclose(adapter.predict(tiles[::-1], mpp=2.0)[::-1], whole, atol=1e-5)
    np.testing.assert_allclose(adapter.predict(tiles, mpp=2.0, compute={"embed_batch_size": 2}), whole, atol=1e-5)
    assert whole.shape == (9, len(adapter.genes)) and whole.dtype == np.float32


@pytest.mark.parametrize(
    ("change", "mpp", "error", "message"),
    [
        (lambda t: t, 1.0, ValueError, r"tiles of 56 px at 2 um/px \(112 um\); these have 56 px at 1 um/px \(56 um\)"),
        (lambda t: t[:, :28, :28], 2.0, ValueError, "these have 28 px"),
        (lambda t: t[..., 0], 2.0, ValueError, "Tiles must have shape"),
        (lambda t: t.astype(np.float32), 2.0, TypeError, "Tiles must be uint8, got float32"),
    ],
)
def test_other_tiles_are_refused(
    adapter: pk.Adapter,
    tiles: np.ndarray,
    change: Callable[[np.ndarray], np.ndarray],
    mpp: float,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        adapter.predict(change(tiles), mpp=mpp)


def test_encoder_weights_that_moved(adapter: pk.Adapter, folder: Path, tiles: np.ndarray, tmp_path: Path) -> None:
    plain = EncoderNetwork(adapter.encoder, 112)
    torch.save(plain.model.state_dict(), tmp_path / "tiny.pth")
    moved = pk.Adapter.load(folder, encoder=replace(adapter.encoder, weights=tmp_path / "tiny.pth"))
    np.testing.assert_array_equal(moved.predict(tiles, mpp=2.0), adapter.predict(tiles, mpp=2.0))
    gone = pk.Adapter.load(folder, encoder=replace(adapter.encoder, weights=tmp_path / "gone.pth"))
    with pytest.raises(FileNotFoundError, match=r"Encoder weights not found: .*gone\.pth"):
        gone.predict(tiles, mpp=2.0)


def test_saving_replaces_an_adapter_and_nothing_else(adapter: pk.Adapter, copy: Path, tmp_path: Path) -> None:
    adapter.save(copy)
    assert pk.Adapter.load(copy).genes == adapter.genes
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="holds no adapter of pekasc"):
        adapter.save(tmp_path / "other")
    with pytest.raises(FileExistsError, match="thesis.txt is there and holds no adapter of pekasc"):
        adapter.save(tmp_path / "other" / "thesis.txt")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "other"]  # nothing half-written


@pytest.mark.parametrize("name", ["heads.safetensors", "adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_folder(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"is damaged: {name} is not the file that was saved"):
        pk.Adapter.load(copy)
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"is damaged: {name} is missing"):
        pk.Adapter.load(copy)


def test_a_foreign_folder(copy: Path, tmp_path: Path) -> None:
    main = copy / "pekasc.json"
    record = json.loads(main.read_text())
    main.write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(ValueError, match="has format 99, this .*pekasc reads up to 9: update pekasc"):
        pk.Adapter.load(copy)
    main.write_text(json.dumps({**record, "format": 1}))
    with pytest.raises(ValueError, match="has format 1, this .*pekasc reads up to 9: fit it again"):
        pk.Adapter.load(copy)
    main.write_text(json.dumps({"hello": 1}))
    with pytest.raises(ValueError, match="lacks the fields"):
        pk.Adapter.load(copy)
    main.write_text(json.dumps(record)[:-20])
    with pytest.raises(ValueError, match="pekasc.json is no JSON"):
        pk.Adapter.load(copy)
    main.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="pekasc.json is no JSON"):
        pk.Adapter.load(copy)
    main.unlink()
    with pytest.raises(ValueError, match=r"pekasc\.json is missing \(found .*A plain PEFT adapter has no"):
        pk.Adapter.load(copy)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        pk.Adapter.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no such folder. From the .* hub: `Adapter.load\('hf-hub:lab/x'\)`"):
        pk.Adapter.load("lab/x")


def test_a_record_that_lacks_a_field_is_a_damaged_one(copy: Path) -> None:
    main = copy / "pekasc.json"
    record = json.loads(main.read_text())
    del record["genes"]
    main.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"damaged: pekasc\.json .*genes"):
        pk.Adapter.load(copy)


def test_it_says_what_it_is_and_how_far_to_trust_it(adapter: pk.Adapter) -> None:
    text = repr(adapter)
    for part in (
        "bone",
        "'tiny'",
        "block 2",
        "56 px at 2 um/px (112 um)",
        "groups: P1, P2",
        "trust",
        "licence",
        "head        blend, with the neighbours within 200 um",
        "50% frozen encoder, low-rank, block 2, alone",
        "25% adapted encoder, ridge, block 2, alone",
        "25% adapted encoder, low-rank, block 2, alone",
        "fields      168 um around the tile, frozen features",
    ):
        assert part in text, part
    scores = adapter.gene_scores["pearson"]
    assert f"median {scores.median():.2f}" in text and scores.idxmax() in text
    unknown = replace(adapter, gene_scores=pd.DataFrame({"pearson": []}))
    assert "unknown: no group was held out" in repr(unknown)


def test_saving_again_keeps_what_else_lies_there(copy: Path, adapter: pk.Adapter) -> None:
    (copy / "notes.txt").write_text("mine")
    adapter.save(copy)
    assert (copy / "notes.txt").read_text() == "mine"
    again = pk.Adapter.load(copy)
    for name in ("gene_scores", "history", "selection"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(adapter, name), check_exact=True)
    assert again.gene_scores.index.name == "gene"


def test_a_record_that_was_edited_is_a_damaged_one(copy: Path) -> None:
    main = copy / "pekasc.json"
    main.write_text(main.read_text().replace('"mpp": 2.0', '"mpp": 1.0'))
    with pytest.raises(ValueError, match=r"damaged: pekasc\.json was changed after it was saved"):
        pk.Adapter.load(copy)


def test_a_head_with_context_needs_positions(
    adapter: pk.Adapter, tiles: np.ndarray, tmp_path: Path, plain_reading: Callable[..., Reading]
) -> None:
    rng = np.random.default_rng(0)
    features = adapter.embed(tiles, mpp=2.0, compute=CPU)
    width, n_genes = 2 * features.shape[1], len(adapter.genes)
    fit = fit_ridge(rng.normal(size=(20, width)), rng.normal(size=(20, n_genes)), 5)
    reading = plain_reading(fit, 1.0, [Source("adapted", 0, (2,))], 150.0, "adapted:ridge")
    with_neighbours = replace(adapter, reading=reading, fields_um=())
    coords_um, section = rng.uniform(0, 400, (9, 2)), np.array(["a"] * 5 + ["b"] * 4)
    with_neighbours.save(tmp_path / "mine")

    def by_hand(sections: np.ndarray) -> np.ndarray:
        x = with_context(features, coords_um, sections, 150.0)
        return fit.projection(x) @ fit.coef(1.0) + fit.intercept

    for made in (with_neighbours, pk.Adapter.load(tmp_path / "mine")):
        got = made.predict(tiles, mpp=2.0, coords_um=coords_um, section=section, compute=CPU)
        np.testing.assert_allclose(got, by_hand(section), atol=1e-4)
        # without sections they are all of one, and there are more neighbours
        one = made.predict(tiles, mpp=2.0, coords_um=coords_um, compute=CPU)
        np.testing.assert_allclose(one, by_hand(np.zeros(9)), atol=1e-4)
        assert np.abs(one - got).max() > 1e-3
    with pytest.raises(ValueError, match=r"uses the neighbours within 150 um.*give `coords_um=` \(n, 2\) in um"):
        with_neighbours.predict(tiles, mpp=2.0)
    for wrong in ({"coords_um": coords_um[:5]}, {"coords_um": coords_um, "section": section[:5]}):
        with pytest.raises(ValueError, match=r"`coords_um` must have shape \(9, 2\) and `section` \(9,\) for 9 tiles"):
            with_neighbours.predict(tiles, mpp=2.0, **wrong)


def test_it_predicts_with_what_there_is(adapter: pk.Adapter, tiles: np.ndarray) -> None:
    """Each member by hand, from frozen and adapted features of passes of their own."""
    frozen = replace(adapter, config=None, weights={})
    coords, wide = np.random.default_rng(0).uniform(0, 500, (9, 2)), tiles[::-1].copy()
    near, far, deep = (
        made.embed(x, mpp=2.0, compute=CPU) for made, x in ((frozen, tiles), (frozen, wide), (adapter, tiles))
    )
    features = {Source("frozen", 0, (2,)): near, Source("frozen", 1, (2,)): far, Source("adapted", 0, (2,)): deep}
    found = []
    for places, fields in ((True, True), (True, False), (False, True), (False, False)):
        given: dict[str, Any] = {"coords_um": coords} if places else {}
        given |= {"fields": {168: wide}} if fields else {}
        got = adapter.predict(tiles, mpp=2.0, compute=CPU, **given)
        reading = adapter.reading_of(context=places, fields=fields)
        assert [m.name for m in reading.members] == ["frozen:low-rank", "adapted:ridge", "adapted:low-rank"]
        parts = {s: features[s] for s in reading.sources}
        # without positions, heads that were fitted without context predict
        assert reading.radii_um == ((200.0,) if places else ())
        scores = reading.placed_scores(parts, coords, np.zeros(9)) if places else reading.scores(parts)
        np.testing.assert_allclose(got, reading.expression(scores), atol=1e-3)
        found.append(got)
    assert len(adapter.reading.members) == 3 * 3
    # of members with context, the tiles alone are left without positions
    np.testing.assert_array_equal(found[2], found[3])
    for one, other in ((0, 1), (1, 3)):
        assert np.abs(found[one] - found[other]).max() > 1e-3


def test_a_head_that_needs_a_wider_field(
    adapter: pk.Adapter, tiles: np.ndarray, plain_reading: Callable[..., Reading]
) -> None:
    rng = np.random.default_rng(0)
    width = adapter.embed(tiles[:1], mpp=2.0, compute=CPU).shape[1]
    fit = fit_ridge(rng.normal(size=(20, 2 * width)), rng.normal(size=(20, len(adapter.genes))), 5)
    both = [Source("adapted", i, (2,)) for i in (0, 1)]
    wide = replace(adapter, reading=plain_reading(fit, 1.0, both, name="adapted:ridge"))
    with pytest.raises(ValueError, match=r"also needs tiles of 168 um around the same centres: give them as `fields="):
        wide.predict(tiles, mpp=2.0)
    assert np.isfinite(wide.predict(tiles, mpp=2.0, fields={168: tiles}, compute=CPU)).all()
    with pytest.raises(ValueError, match=r"`fields=` must hold tiles of 168 um .* got tiles of \[300.0\] um"):
        wide.predict(tiles, mpp=2.0, fields={300: tiles})


def test_predictions_are_smoothed_where_there_are_positions(
    adapter: pk.Adapter, tiles: np.ndarray, tmp_path: Path
) -> None:
    smooth = replace(adapter, reading=replace(adapter.reading, smooth_um=150.0, smooth_weight=0.5))
    coords = np.column_stack([np.arange(9) * 100.0, np.zeros(9)])
    plain = adapter.predict(tiles, mpp=2.0, coords_um=coords, compute=CPU)
    near = [[j for j in range(9) if abs(i - j) == 1] for i in range(9)]
    mean = np.stack([plain[j].mean(axis=0) for j in near])
    smooth.save(tmp_path / "mine")
    for made in (smooth, pk.Adapter.load(tmp_path / "mine")):
        got = made.predict(tiles, mpp=2.0, coords_um=coords, compute=CPU)
        np.testing.assert_allclose(got, (plain + mean) / 2, atol=1e-3)
        alone = made.predict(tiles, mpp=2.0, compute=CPU)
        np.testing.assert_array_equal(alone, adapter.predict(tiles, mpp=2.0, compute=CPU))
    assert np.abs(plain - mean).max() > 1e-2


def test_fields_that_do_nothing_with_arrays_are_refused(adapter: pk.Adapter, tiles: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"'resume' does nothing in this call: it trains nothing"):
        adapter.predict(tiles, mpp=2.0, compute={"resume": "folder"})
    with pytest.raises(ValueError, match=r"'max_memory' does nothing in this call: the tiles are in memory"):
        adapter.embed(tiles, mpp=2.0, compute={"max_memory": 10})
    # an instance may serve several calls
    whole = adapter.predict(tiles, mpp=2.0, compute=CPU)
    several = pk.Compute(device="cpu", max_memory=10, accumulate=2)
    np.testing.assert_array_equal(adapter.predict(tiles, mpp=2.0, compute=several), whole)
