"""What a fit embeds: cached activations of the frozen blocks change little, and where they lie changes nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig
from spatialdata import SpatialData

import pekasc as pk
from pekasc.models.encoders import EncoderNetwork
from pekasc.models.features import _cached_blocks
from pekasc.models.selection._job import Job

Fit = Callable[..., pk.Adapter]
Numbers = Callable[[pk.Adapter], dict[str, bytes]]
WHOLE = "All blocks run in every epoch, the frozen ones too: "


@pytest.fixture(scope="module")
def whole(make_sections: Callable[[], SpatialData], fit: Fit) -> pk.Adapter:
    """Return a fit that runs all blocks in every epoch."""
    return fit(make_sections(), compute={"cached_activations": None})


@pytest.fixture(scope="module")
def halves(make_sections: Callable[[], SpatialData], fit: Fit) -> pk.Adapter:
    """Return a fit on activations in half precision, which is the default."""
    return fit(make_sections())


@pytest.fixture(scope="module")
def in_files(make_sections: Callable[[], SpatialData], fit: Fit) -> pk.Adapter:
    """Return a fit whose frozen features are read from files in half precision."""
    return fit(make_sections(), compute={"max_memory": 1})


def test_frozen_features_in_files_change_little(
    sections: SpatialData, halves: pk.Adapter, in_files: pk.Adapter
) -> None:
    assert in_files.depth == halves.depth
    np.testing.assert_array_equal(in_files.history["loss"], halves.history["loss"])
    np.testing.assert_allclose(in_files.gene_scores["pearson"], halves.gene_scores["pearson"], atol=5e-3)
    assert not in_files.gene_scores["pearson"].equals(halves.gene_scores["pearson"])


def test_cached_activations_change_little(
    sections: SpatialData, fit: Fit, whole: pk.Adapter, halves: pk.Adapter
) -> None:
    full = fit(sections, compute={"cached_activations": "fp32"})
    for adapter, atol in ((halves, 0.05), (full, 1e-3)):
        np.testing.assert_allclose(adapter.history["loss"], whole.history["loss"], atol=atol)


def test_where_cached_activations_lie_changes_nothing(
    sections: SpatialData, fit: Fit, numbers: Numbers, tmp_path: Path, in_files: pk.Adapter
) -> None:
    # where a user says, or in the folder of the fit; features of several epochs and folds lie in files, too
    cache, state = tmp_path / "cache", tmp_path / "state"
    assert numbers(fit(sections, compute={"max_memory": 1, "cache": cache})) == numbers(in_files)
    assert (cache / "activations.zarr").is_dir()
    assert numbers(fit(sections, compute={"max_memory": 1, "resume": state})) == numbers(in_files)
    assert (state / "activations.zarr").is_dir()
    # where nothing is cached, nothing is written
    compute = {"cached_activations": None, "max_memory": 1, "cache": tmp_path / "none"}
    fit(sections, compute=compute)
    assert not (tmp_path / "none" / "activations.zarr").exists()


def test_little_memory_and_no_folder(
    sections: SpatialData, fit: Fit, numbers: Numbers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    in_files: pk.Adapter,
) -> None:  # fmt: skip
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert numbers(fit(sections, compute={"max_memory": 1})) == numbers(in_files)
    gc.collect()  # a training leaves cycles, and temporary folders go with the objects that read them
    assert not list(tmp_path.iterdir())


def test_biases_everywhere_are_trained_everywhere(
    sections: SpatialData, fit: Fit, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    how: dict[str, Any] = {"method": LoraConfig(r=4, bias="all"), "recipe": {"epochs": 1}}
    kept = fit(sections, **how)
    assert f"{WHOLE}the method trains biases of all blocks." in caplog.text
    plain = fit(sections, **how, compute={"cached_activations": None})
    np.testing.assert_array_equal(kept.history["loss"], plain.history["loss"])


def test_where_no_block_is_frozen_the_log_says_why(
    sections: SpatialData, fit: Fit, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    fit(sections, readout={"depth": (1, 3)}, recipe={"epochs": 1})
    assert f"{WHOLE}features are taken after block 1." in caplog.text


@pytest.mark.parametrize(("depth", "blocks"), [((2, 4), 2), ((3, 4), 2)])
def test_features_of_an_early_block_beside_the_last(
    sections: SpatialData, fit: Fit, depth: tuple[int, ...], blocks: int
) -> None:
    how: dict[str, Any] = {"readout": {"depth": depth}, "recipe": {"epochs": 1, "blocks": blocks}}
    kept = fit(sections, **how, compute={"cached_activations": "fp32"})
    plain = fit(sections, **how, compute={"cached_activations": None})
    np.testing.assert_allclose(kept.history["loss"], plain.history["loss"], atol=1e-3)


@pytest.mark.parametrize("depth", ["all", (2, 3)])
def test_the_first_pass_leaves_activations_behind(
    sections: SpatialData, fit: Fit, numbers: Numbers, monkeypatch: pytest.MonkeyPatch, depth: Any
) -> None:
    how: dict[str, Any] = {"readout": {"depth": depth, "fields_um": (168,), "orientations": 2}}
    with monkeypatch.context() as patched:
        patched.setattr(Job, "embed_first", lambda self, depths: self.embed(depths, further=self.data.further))
        twice = fit(sections, **how, recipe={"epochs": 1})
    with monkeypatch.context() as patched:
        patched.setattr(_cached_blocks._BlockRunner, "over", lambda *args: pytest.fail("the frozen blocks ran again"))
        once = fit(sections, **how, recipe={"epochs": 1})
    assert numbers(once) == numbers(twice)
    # of further orientations, only those are computed
    ran: list[list[int]] = []
    over = _cached_blocks._BlockRunner.over

    def counted(self: Any, order: Any, views: Any, *rest: Any) -> None:
        ran.append(list(views))
        over(self, order, views, *rest)

    monkeypatch.setattr(_cached_blocks._BlockRunner, "over", counted)
    fit(sections, **how, recipe={"epochs": 1, "n_views": 4})
    assert ran == [[1, 3]]


def test_an_encoder_whose_blocks_cannot_be_split(
    sections: SpatialData, fit: Fit, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    eva = pk.models.Encoder("eva02_tiny_patch14_224", weights="random", model_kwargs={"depth": 2})
    assert fit(sections, encoder=eva, recipe={"epochs": 1}).info["blocks"] == 1
    assert f"{WHOLE}those of this encoder cannot be run one by one." in caplog.text
    for name in ("gradient_checkpointing", "compile"):
        with pytest.raises(ValueError, match=r"cannot be run one by one.*plain VisionTransformer"):
            fit(sections, encoder=eva, compute={name: True})


def test_batches_of_embedding_have_the_size_that_was_asked_for(
    sections: SpatialData, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    normalise = EncoderNetwork.normalise

    def counted(self: EncoderNetwork, x: Any) -> Any:
        sizes.append(len(x))
        return normalise(self, x)

    monkeypatch.setattr(EncoderNetwork, "normalise", counted)
    frozen: dict[str, Any] = {"method": None, "groups": "patient", "progress": False, "readout": "ridge"}
    for n, expected in ((20, [20, 20, 8]), (64, [48])):
        pk.tl.fit_adapter(sections, **frozen, compute={"device": "cpu", "embed_batch_size": n})
        assert sizes[: len(expected)] == expected
        assert sizes[len(expected) :] == [20] * 7  # some tiles with known faults, and with what is none
        sizes.clear()
