"""Which adapters predict: the last one, those of the inner folds, or both, and the mean of what they predict."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from spatialdata import SpatialData

import pekasc as pk
from pekasc._expression import dense, log1p_cp10k
from pekasc.models.heads import LinearHead, Reading
from pekasc.models.heads._ridge import fit_ridge
from pekasc.models.runtime import replace_sealed
from pekasc.models.selection import _student as room
from pekasc.models.training import Trained
from pekasc.models.trust import FAULTS
from pekasc.tl._options import resolve_fit

Fit = Callable[..., pk.Adapter]
Numbers = Callable[[pk.Adapter], dict[str, bytes]]
CPU: dict[str, Any] = {"mpp": 2.0, "compute": {"device": "cpu"}}
TRAINED: dict[str, Any] = {"choose_epochs": False}
BLEND: dict[str, Any] = {"head": "blend", "members": None, "selection": "average", "context_um": 200, "n_components": 8}

SMALL = pk.Recipe(
    rank=8, blocks=1, epochs=1, n_views=1, batch_size=8, cluster_head_epochs=2, learning_rate=3e-3, choose_epochs=False,
    refit="ensemble",
)  # fmt: skip
SPLIT = {"P2": (["P1S1_spots"], ["P2S1_spots"])}


@pytest.fixture(scope="module")
def larger() -> SpatialData:
    """Return two patients whose sections leave enough spots when blocks of one are held out."""
    sdata = pk.datasets.phantom(n_patients=2, size_um=900, mpp=1.0, n_genes=20)
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    return sdata


@pytest.fixture(scope="module")
def ensemble(make_sections: Callable[[], SpatialData], fit: Fit) -> pk.Adapter:
    """Return the mean of two inner folds' adapters, with context."""
    return fit(make_sections(), recipe={**TRAINED, "refit": "ensemble"}, readout=BLEND)


@pytest.fixture(scope="module")
def both(make_sections: Callable[[], SpatialData], fit: Fit) -> pk.Adapter:
    """Return the mean of the last adapter and the inner folds'."""
    return fit(make_sections(), recipe={**TRAINED, "refit": "both"}, readout=BLEND)


@pytest.fixture(scope="module")
def places() -> np.ndarray:
    """Return positions of the tiles."""
    return np.random.default_rng(1).uniform(0, 400, (9, 2))


def alone(adapter: pk.Adapter, number: int) -> pk.Adapter:
    """Return one of several adapters with its own heads, as an adapter of its own that predicts without the frozen."""
    states = [(adapter.config, adapter.weights["adapter"]), *adapter.others]
    members = []
    for member in adapter.reading.members:
        if {(s.network, s.adapter) for s in member.head.sources} == {("adapted", number)}:
            blocks = tuple(
                replace(block, maps={s._replace(adapter=0): linear for s, linear in block.maps.items()})
                for block in member.head.blocks
            )
            members.append(replace(member, head=LinearHead(blocks, member.head.intercept, member.head.context_um)))
    config, weights = states[number]
    return replace(adapter, config=config, weights={"adapter": weights}, others=(), reading=Reading(tuple(members)))


def frozen(adapter: pk.Adapter) -> pk.Adapter:
    members = tuple(member for member in adapter.reading.members if member.name.startswith("frozen:"))
    return replace(adapter, config=None, weights={}, others=(), reading=Reading(members))


def states_of(adapter: pk.Adapter) -> list[dict[str, torch.Tensor]]:
    return [dict(adapter.weights["adapter"]), *(dict(weights) for _, weights in adapter.others)]


def same(a: pk.Adapter, b: pk.Adapter) -> bool:
    pairs = list(zip(states_of(a), states_of(b), strict=True))
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in pairs)


@pytest.mark.parametrize(
    ("method", "refit"),
    [("bone", "ensemble"), ("bone", "both"), ("adalora", "ensemble"),
     pytest.param(LoraConfig(r=4, bias="all"), "both", id="biases")],
)  # fmt: skip
def test_predictions_are_the_mean_over_adapters(
    sections: SpatialData, fit: Fit, tiles: np.ndarray, places: np.ndarray, method: Any, refit: str
) -> None:  # fmt: skip
    adapter = fit(sections, method=method, recipe={**TRAINED, "refit": refit}, readout=BLEND)
    assert adapter.n_adapters == (2 if refit == "ensemble" else 3) == 1 + len(adapter.others)
    for given in ({}, {"coords_um": places}):
        each = [alone(adapter, i).predict(tiles, **CPU, **given) for i in range(adapter.n_adapters)]
        by_hand = (frozen(adapter).predict(tiles, **CPU, **given) + np.mean(each, axis=0)) / 2
        np.testing.assert_allclose(adapter.predict(tiles, **CPU, **given), by_hand, atol=2e-4)
        assert np.abs(each[0] - each[1]).max() > 1e-2  # or there was nothing to average
    features = [alone(adapter, i).embed(tiles, **CPU) for i in range(adapter.n_adapters)]
    np.testing.assert_allclose(adapter.embed(tiles, **CPU), np.mean(features, axis=0), atol=1e-4)


@pytest.mark.parametrize("refit", ["last", "ensemble", "both"])
def test_each_is_trained_on_its_own_spots_and_read_on_all(
    sections: SpatialData, fit: Fit, monkeypatch: pytest.MonkeyPatch, refit: str
) -> None:
    made: list[tuple[np.ndarray, Trained]] = []

    def spied(*args: Any, **kwargs: Any) -> Trained:
        made.append((args[4], train_student(*args, **kwargs)))
        return made[-1][1]

    train_student = room.train_student
    monkeypatch.setattr(room, "train_student", spied)
    adapter = fit(sections, recipe={**TRAINED, "refit": refit})
    # the folds hold out a patient each; the last training has all
    n = len(sections["table"])
    assert [len(rows) for rows, _ in made] == [n // 2, n // 2, *([n] if refit != "ensemble" else [])]
    assert not set(made[0][0]) & set(made[1][0])
    wanted = {"last": [2], "ensemble": [0, 1], "both": [2, 0, 1]}[refit]
    for state, number in zip(states_of(adapter), wanted, strict=True):
        kept = made[number][1].weights[2]["adapter"]
        assert state.keys() == kept.keys() and all(torch.equal(state[k], kept[k]) for k in kept)
    # every head is ridge on the features of all spots, with one penalty
    x = np.asarray(pk.get.tiles(sections).values)
    y = dense(log1p_cp10k(sections["table"]))[:, sections["table"].var_names.get_indexer(adapter.genes)]
    parts = []
    for i in range(adapter.n_adapters):
        features = alone(adapter, i).embed(x, **CPU)
        ridge = fit_ridge(features, y)
        p = ridge.projection
        z = (features - p.mean) / p.scale @ p.components.T
        parts.append(z @ ridge.coef(adapter.info["alpha"]) + ridge.intercept)
    np.testing.assert_allclose(adapter.predict(x, **CPU), np.mean(parts, axis=0), atol=1e-3)


def test_what_is_chosen_does_not_depend_on_it(
    sections: SpatialData, fit: Fit, numbers: Numbers, ensemble: pk.Adapter, both: pk.Adapter
) -> None:
    last = numbers(fit(sections, recipe=TRAINED, readout=BLEND))
    for adapter in (ensemble, both):
        found = numbers(adapter)
        assert all(found[name] == last[name] for name in ("scores", "selection"))
    # the first of both is the last one, with its history
    assert all(numbers(both)[name] == last[name] for name in last if name.startswith(("adapter.", "history")))
    assert (ensemble.history["fold"] >= 0).all() and ensemble.info["refit"] == "ensemble"
    each = sum(t.numel() for t in ensemble.weights["adapter"].values())
    assert (ensemble.info["n_parameters"], both.info["n_parameters"]) == (2 * each, 3 * each)


def test_the_epoch_that_is_chosen_is_kept(
    sections: SpatialData, fit: Fit, monkeypatch: pytest.MonkeyPatch, tiles: np.ndarray
) -> None:
    chosen = iter([1, 0])
    choose = room._choose_epochs

    def one(*args: Any) -> Any:
        return choose(*args)[0], [next(chosen)]

    plain = fit(sections, recipe={**TRAINED, "epochs": 1, "refit": "ensemble"})
    monkeypatch.setattr(room, "_choose_epochs", one)
    # the schedule of two epochs is that of one, as far as that goes
    assert same(plain, fit(sections, recipe={"refit": "ensemble"}))
    # without any epoch, there is one adapter, which changes nothing
    none = fit(sections, recipe={"refit": "ensemble"})
    assert none.n_adapters == 1 and none.info["epochs"] == 0
    np.testing.assert_allclose(none.embed(tiles, **CPU), replace(none, config=None).embed(tiles, **CPU), atol=1e-5)


def test_readings_of_one_training_may_differ_in_epochs(larger: SpatialData, monkeypatch: pytest.MonkeyPatch) -> None:
    choose, made = room._choose_epochs, list[pk.Adapter]()
    fit_student = room.fit_student

    def differ(*args: Any) -> Any:
        return choose(*args)[0], [0, 2]

    def spied(*args: Any) -> Any:
        made.extend(fit_student(*args))
        return made

    monkeypatch.setattr(room, "_choose_epochs", differ)
    monkeypatch.setattr("pekasc.models.selection._fit.fit_student", spied)
    frame = pk.tl.cross_validate(
        larger, methods=["bone"], folds=SPLIT, progress=False, n_bootstrap=10, recipe=SMALL.replace(epochs=2),
        readout=[pk.Readout(head="ridge", depth=2, context_um=radius, fields_um=None) for radius in (None, 200)],
    )  # fmt: skip
    assert [(a.n_adapters, a.info["epochs"]) for a in made] == [(1, 0), (3, 2)]  # of three blocks of one section
    assert set(frame["epochs"]) == {0, 2}


def test_saved_and_loaded(
    both: pk.Adapter, ensemble: pk.Adapter, numbers: Numbers, tiles: np.ndarray, places: np.ndarray, tmp_path: Path
) -> None:
    both.save(tmp_path / "mine")
    loaded = pk.Adapter.load(tmp_path / "mine")
    assert same(loaded, both) and numbers(loaded) == numbers(both)
    for given in ({}, {"coords_um": places}):
        np.testing.assert_array_equal(loaded.predict(tiles, **CPU, **given), both.predict(tiles, **CPU, **given))
    names = {path.name for path in (tmp_path / "mine").iterdir()}
    assert {"adapter_model.safetensors", "adapter_model_2.safetensors", "adapter_config_3.json"} < names
    assert json.loads((tmp_path / "mine" / "pekasc.json").read_text())["format"] == 9
    # a smaller one in its place leaves no file behind
    ensemble.save(tmp_path / "mine")
    assert same(pk.Adapter.load(tmp_path / "mine"), ensemble)
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {name for name in names if "_3." not in name}
    (tmp_path / "mine" / "adapter_model_2.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is damaged: adapter_model_2.safetensors is not the file"):
        pk.Adapter.load(tmp_path / "mine")
    (tmp_path / "mine" / "adapter_model_2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model_2.safetensors is missing"):
        pk.Adapter.load(tmp_path / "mine")


def test_what_it_says_and_cannot_do(both: pk.Adapter) -> None:
    assert repr(both).startswith("Adapter (bone, 2 epochs, mean of 3 adapters) on encoder 'tiny'")
    assert "25% adapted encoder, ridge, block 2" in repr(both)
    with pytest.raises(ValueError, match=r'ensemble of 3 adapters.*cannot be merged. Fit with `refit="last"`'):
        both.merge()


def test_of_an_object(sections: SpatialData, both: pk.Adapter, tmp_path: Path) -> None:
    how: dict[str, Any] = {"progress": False, "compute": {"device": "cpu"}}
    pk.tl.predict_expression(sections, both, **how)
    x = np.asarray(pk.get.tiles(sections).values)
    np.testing.assert_allclose(sections["table"].obsm["X_peka"], both.embed(x, **CPU), atol=1e-4)
    coords, section = sections["table"].obsm["spatial"], sections["table"].obs["region"].to_numpy()
    by_hand = both.predict(x, **CPU, coords_um=np.asarray(coords) * 1.0, section=section)
    found = sections["table"][:, list(both.genes)].layers["peka"]
    np.testing.assert_allclose(found, by_hand, atol=1e-4)
    pk.tl.embed_tiles(sections, both, key_added="again", **how)
    np.testing.assert_allclose(sections["table"].obsm["again"], sections["table"].obsm["X_peka"], atol=1e-4)
    # another ensemble of the same first adapter has features of its own in a store
    pk.tl.embed_tiles(sections, both, key_added="kept", store=tmp_path / "store", **how)
    fewer = replace(both, others=both.others[:1])
    pk.tl.embed_tiles(sections, fewer, key_added="fewer", store=tmp_path / "store", **how)
    assert np.abs(sections["table"].obsm["fewer"] - sections["table"].obsm["kept"]).max() > 1e-4


def test_goes_on_from_any_place_with_the_same_bits(
    sections: SpatialData, fit: Fit, numbers: Numbers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"refit": "both", "choose_epochs": False}
    plain = fit(sections, recipe=recipe)
    how: dict[str, Any] = {"recipe": recipe, "compute": {"resume": tmp_path / "state", "checkpoint_minutes": 0}}
    fit(sections, **how)
    done = [tmp_path / "state" / f"fold-{i}" / "done.json" for i in (0, 1)]
    done[1].unlink()  # as if killed in the second fold, after the state of its last epoch
    again = fit(sections, **how)
    assert same(again, plain) and numbers(again) == numbers(plain)
    # finished folds are not trained again
    train = room.train_student
    monkeypatch.setattr(
        room, "train_student", lambda *args, **kw: train(*args, **kw) if kw["folder"].name == "final" else None
    )
    finished = fit(sections, **how)
    assert same(finished, plain) and numbers(finished) == numbers(plain)
    plain.save(tmp_path / "plain")
    finished.save(tmp_path / "finished")
    for file in sorted(path.name for path in (tmp_path / "plain").iterdir() if path.name != "pekasc.json"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "finished" / file).read_bytes(), file


def test_weights_of_a_fold_that_are_damaged(sections: SpatialData, fit: Fit, tmp_path: Path) -> None:
    how: dict[str, Any] = {"recipe": {"refit": "ensemble", "epochs": 1}}
    whole = tmp_path / "whole"
    fit(sections, **how, compute={"resume": whole})
    content = (whole / "fold-1" / "adapters.pt").read_bytes()

    def harmed(name: str, harm: Callable[[Path], Any]) -> dict[str, Any]:
        file = Path(shutil.copytree(whole, tmp_path / name)) / "fold-1" / "adapters.pt"
        harm(file)
        return {**how, "compute": {"resume": tmp_path / name}}

    torch.save({"weights": {}, "configs": {}}, tmp_path / "other.pt")
    cases: list[tuple[Callable[[Path], Any], str]] = [
        (lambda file: file.unlink(), "cannot be read"),
        (lambda file: file.write_bytes(content[:-9]), "it is not the file that was written"),
        (lambda file: replace_sealed(file, content[:-9], "x"), "it holds no weights of adapters"),
        (lambda file: replace_sealed(file, (tmp_path / "other.pt").read_bytes(), "x"), "weights of other epochs"),
    ]
    for i, (harm, message) in enumerate(cases):
        with pytest.raises(ValueError, match=rf"is damaged: fold-1/adapters.pt.*{message}.*Delete the folder"):
            fit(sections, **harmed(str(i), harm))


def test_a_comparison_reads_what_a_fit_reads(larger: SpatialData) -> None:
    genes = list(larger["table"].var_names[:8])
    common: dict[str, Any] = {
        "recipe": SMALL, "readout": pk.Readout(depth=2, context_um=200, fields_um=None), "progress": False,
        "compute": {"device": "cpu"}, "genes": genes,
    }  # fmt: skip
    frame = pk.tl.cross_validate(larger, methods=["bone"], folds=SPLIT, n_bootstrap=10, **common)
    # one training group: the adapters are those of three blocks of its tissue
    adapter = pk.tl.fit_adapter(larger, train=["P1S1_spots"], **common)
    assert adapter.n_adapters == 3 and adapter.info["held_out"] == ["block1", "block2", "block3"]
    pk.tl.predict_expression(larger, adapter, progress=False, compute={"device": "cpu"})
    found = frame[frame["section"] == "P2S1_spots"].iloc[0]
    assert found["pearson"] == pytest.approx(pk.tl.evaluate(larger)["pearson"].mean(), abs=1e-4)
    assert found["n_parameters"] == adapter.info["n_parameters"]


def test_under_the_protocol_of_hest(larger: SpatialData) -> None:
    how: dict[str, Any] = {"protocol": "hest", "methods": ["bone"], "folds": SPLIT, "n_bootstrap": 10}
    scores = [
        pk.tl.cross_validate(larger, recipe=SMALL.replace(refit=refit), progress=False, **how)["pearson"].to_numpy()
        for refit in ("last", "ensemble")
    ]
    assert np.isfinite(scores).all() and np.abs(scores[0] - scores[1]).max() > 1e-4


def test_values_that_cannot_be(sections: SpatialData, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"`refit='mean'` must be one of \['last', 'ensemble', 'both'\]"):
        pk.Recipe(refit="mean")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`refit=True` must be one of"):
        pk.Recipe(refit=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'`refit="both"` keeps the adapters .* `epochs=0` trains none'):
        pk.Recipe(refit="both", epochs=0)
    with pytest.raises(ValueError, match="`recipe`: 'refit' does nothing in this call: with `method=None` nothing"):
        pk.tl.fit_adapter(sections, method=None, recipe={"refit": "both"})
    caplog.set_level("INFO")
    resolve_fit("tiny", "pca", None, pk.Recipe(refit="both"), None, None, 0, False)
    assert "recipe: refit do nothing in this call" in caplog.text


def test_known_faults_are_those_of_the_frozen_network(
    both: pk.Adapter, make_sections: Callable[[], SpatialData], fit: Fit
) -> None:
    frozen = fit(make_sections(), method=None, readout=BLEND)
    assert both.novelty is not None and frozen.novelty is not None
    trained, plain = both.novelty.distance, frozen.novelty.distance
    assert trained.faults.names == FAULTS == plain.faults.names
    np.testing.assert_allclose(trained.faults.weights, plain.faults.weights, rtol=1e-3, atol=1e-5)
    assert trained.scale == pytest.approx(plain.scale, rel=1e-3)
