"""Cached activations of the frozen blocks: in memory, on disk, in every orientation, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pekasc.models import Encoder
from pekasc.models.encoders import EncoderNetwork
from pekasc.models.features._cached_blocks import CachedActivations, CachePlan, cache_activations
from pekasc.models.features._embed import embed
from pekasc.tiling import ArrayTiles

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
TILES = ArrayTiles(RNG.integers(0, 255, (22, 32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def encoder() -> EncoderNetwork:
    kwargs = {"depth": 3, "reg_tokens": 2, "init_values": 0.5}
    return EncoderNetwork(Encoder("vit_tiny_patch16_224", weights="random", model_kwargs=kwargs), 32)


def cached(encoder: EncoderNetwork, start: int, tiles: ArrayTiles = TILES, **changes: Any) -> CachedActivations:
    how: dict[str, Any] = {
        "n_views": 8, "kind": "fp32", "batch_size": 7, "device": CPU, "precision": "fp32", "max_memory": None,
        "progress": False, "store": None, "facts": "x",
    }  # fmt: skip
    return cache_activations(encoder, tiles, np.arange(22), CachePlan(start=start, **{**how, **changes}))


@pytest.mark.parametrize("n_views", [1, 2, 8])
def test_views_are_the_orientations_of_a_tile(encoder: EncoderNetwork, n_views: int) -> None:
    made = cached(encoder, 2, n_views=n_views)
    features = embed(encoder, TILES, [(3,)], orientations=n_views, batch_size=5, device=CPU)
    again = embed(encoder, TILES, [(3,)], orientations=n_views, batch_size=5, device=CPU, cached=[made])
    np.testing.assert_allclose(again[3,], features[3,], atol=1e-4)
    assert len(made.parts) == n_views


def test_on_disk_they_are_those_in_memory(
    encoder: EncoderNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("pekasc.models.features._cached_blocks._CHUNK_BYTES", 3 * 7 * 192 * 4)  # three tiles
    on_disk: dict[str, Any] = {"max_memory": 1, "store": tmp_path / "p.zarr"}
    kept = cached(encoder, 2)
    assert (
        "0.00538 MB per tile and orientation (fp32), 22 tiles in 8 orientations: 0.000946 GB, in memory" in caplog.text
    )
    stored = cached(encoder, 2, **on_disk)
    assert "on disk" in caplog.text
    index, views = RNG.integers(0, 22, 40), RNG.choice([0, 3, 7], 40)
    np.testing.assert_array_equal(stored.read(index, views), kept.read(index, views))
    # a second call computes nothing; one of other tiles or another block does
    counted: list[int] = []
    tokens = encoder.tokens

    def count(x: torch.Tensor, n: int) -> torch.Tensor:
        counted.append(len(x))
        return tokens(x, n)

    monkeypatch.setattr(encoder, "tokens", count)
    cached(encoder, 2, **on_disk)
    assert sum(counted) == 1  # the shape
    cached(encoder, 2, ArrayTiles(TILES.array ^ 1), **on_disk)
    assert sum(counted) == 2 + 22 * 8
    # a damaged chunk is computed again
    file = next((tmp_path / "p.zarr").glob("*/c/0/0"))
    file.write_bytes(b"no")
    np.testing.assert_array_equal(cached(encoder, 2, **on_disk).read(index, views), kept.read(index, views))


def test_a_temporary_store_goes_away(encoder: EncoderNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = cached(encoder, 1, max_memory=1, n_views=1)
    assert list(tmp_path.iterdir())
    assert made.read(np.arange(2), np.zeros(2, int)).shape == (2, 7, 192)
    del made
    assert not list(tmp_path.iterdir())


def test_no_room_on_the_disk_is_an_error_before_any_work(
    encoder: EncoderNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("pekasc.models.features._cached_blocks.shutil.disk_usage", lambda folder: usage)
    monkeypatch.setattr("pekasc.models.features._cached_blocks._BlockRunner.over", lambda *args: pytest.fail("worked"))
    message = (
        r"The cached activations take 0.000946 GB more, and .* has 1e-06 GB left\. Give `Compute.cache` a folder with "
        r"room \(or set TMPDIR\), fewer `Recipe.n_views`, or `cached_activations=None`"
    )
    with pytest.raises(OSError, match=message):
        cached(encoder, 2, max_memory=1, store=tmp_path / "p")
    # two processes that share the disk
    with pytest.raises(OSError, match=r"The cached activations take 0.00189 GB more"):
        cached(encoder, 2, max_memory=1, store=tmp_path / "p", n_here=2)


def test_activations_beyond_half_precision_are_refused(encoder: EncoderNetwork) -> None:
    scale = encoder.model.blocks[0].ls2
    before = scale.gamma.detach().clone()
    message = r'after block 1 are NaN or infinite in fp16: take `Compute\(cached_activations="fp32"\)`'
    with torch.no_grad():
        scale.gamma.fill_(1e7)
    try:
        with pytest.raises(FloatingPointError, match=message):
            cached(encoder, 1, kind="fp16")
    finally:
        with torch.no_grad():
            scale.gamma.copy_(before)
