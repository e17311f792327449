"""Features come in the order asked, whatever the order of reading, and several depths from one pass."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import pekasc as pk
from pekasc.models.encoders._network import EncoderNetwork
from pekasc.models.features._embed import embed
from pekasc.models.features._files import FeatureFiles
from pekasc.models.runtime._device import autocast, resolve_device
from pekasc.tiling import ArrayTiles

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder() -> EncoderNetwork:
    return EncoderNetwork(pk.models.Encoder("vit_tiny_patch16_224", weights="random", model_kwargs={"depth": 3}), 32)


class Shuffled(ArrayTiles):
    """Tiles that are cheapest to read in another order."""

    def __init__(self, array: np.ndarray) -> None:
        super().__init__(array)
        self.reading_order = np.random.default_rng(1).permutation(self.n)


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3)).astype(np.uint8)


def test_order(encoder: EncoderNetwork, tiles: np.ndarray) -> None:
    plain = embed(encoder, ArrayTiles(tiles), [(3,)], batch_size=4, device=CPU)[(3,)]
    assert plain.dtype == np.float32 and plain.shape == (11, 384)
    shuffled = embed(encoder, Shuffled(tiles), [(3,)], batch_size=4, device=CPU)[(3,)]
    np.testing.assert_allclose(shuffled, plain, atol=1e-5)
    index = np.array([7, 0, 10, 3])
    some = embed(encoder, Shuffled(tiles), [(3,)], batch_size=3, device=CPU, index=index)[(3,)]
    np.testing.assert_allclose(some, plain[index], atol=1e-5)


def test_features_beyond_the_memory_lie_in_files(
    encoder: EncoderNetwork, tiles: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"batch_size": 4, "device": CPU}
    plain = embed(encoder, Shuffled(tiles), [(1,), (3,)], **how)
    size = plain[1,].nbytes
    inside = embed(encoder, Shuffled(tiles), [(1,), (3,)], max_memory=2 * size, **how)
    outside = embed(encoder, Shuffled(tiles), [(1,), (3,)], max_memory=2 * size - 1, **how)
    for depth, x in plain.items():
        assert not isinstance(inside[depth], np.memmap) and isinstance(outside[depth], np.memmap)
        np.testing.assert_array_equal(inside[depth], x)
        np.testing.assert_array_equal(outside[depth], x)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(OSError, match="Set TMPDIR to a folder with room, or raise `Compute.max_memory`"):
        embed(encoder, Shuffled(tiles), [(1,)], max_memory=1, **how)


def test_features_in_half_precision_are_read_a_depth_at_a_time(
    encoder: EncoderNetwork, tiles: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"batch_size": 4, "device": CPU, "further": [Shuffled(tiles[::-1].copy())]}
    depths = [(1,), (3, 1)]
    plain = embed(encoder, Shuffled(tiles), depths, **how)
    folder = tmp_path / "new" / "cache"
    found = embed(encoder, Shuffled(tiles), depths, max_memory=1, half=True, folder=folder, **how)
    assert isinstance(found, FeatureFiles) and list(found) == depths and (3, 1) in found and (2,) not in found
    for depth in (*depths, *depths):  # twice: reading changes nothing
        assert found[depth].dtype == np.float32 and not isinstance(found[depth], np.memmap)
        np.testing.assert_array_equal(found[depth], plain[depth].astype(np.float16))
    assert folder.is_dir() and not list(folder.iterdir())  # files without a name
    kept = embed(encoder, Shuffled(tiles), depths, half=True, max_memory=2**30, **how)
    np.testing.assert_array_equal(kept[1,], plain[1,])
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(OSError, match="Set `Compute.cache` to a folder with room, or raise `Compute.max_memory`"):
        embed(encoder, Shuffled(tiles), [(1,)], max_memory=1, half=True, folder=folder, batch_size=4, device=CPU)


def test_values_beyond_half_precision_are_an_error() -> None:
    files = FeatureFiles(2, [(7,)])
    with pytest.raises(ValueError, match=r"depth 7 reach 7e\+04, .* up to 65504: raise `Compute.max_memory`"):
        files.put((7,), 0, np.arange(2), np.array([[1.0, 70_000], [0, 0]], np.float32))


def test_scales_side_by_side(encoder: EncoderNetwork, tiles: np.ndarray) -> None:
    how: dict[str, Any] = {"batch_size": 4, "device": CPU, "orientations": 2}
    wide = tiles[::-1].copy()
    depths = [(1,), (3, 1)]
    near, far = (embed(encoder, ArrayTiles(array), depths, **how) for array in (tiles, wide))
    both = embed(encoder, ArrayTiles(tiles), depths, further=[Shuffled(wide)], max_memory=1, **how)
    for depth in depths:
        np.testing.assert_allclose(both[depth], np.concatenate([near[depth], far[depth]], axis=1), atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_features_are_the_mean_over_orientations(encoder: EncoderNetwork, tiles: np.ndarray, n: int) -> None:
    how: dict[str, Any] = {"batch_size": 16, "device": CPU}
    turned = [np.rot90(tiles, k, (1, 2)) for k in (0, 2, 1, 3)]
    views = [*turned, *(view[:, :, ::-1] for view in turned)][:n]
    singles = [embed(encoder, ArrayTiles(view.copy()), [(3,)], **how)[3,] for view in views]
    mean = embed(encoder, ArrayTiles(tiles), [(3,)], orientations=n, **how)[3,]
    np.testing.assert_allclose(mean, np.mean(singles, axis=0), atol=1e-5)
    if n == 8:  # it makes no difference how a tile lies
        again = embed(encoder, ArrayTiles(views[-1].copy()), [(3,)], orientations=n, **how)[3,]
        np.testing.assert_allclose(again, mean, atol=1e-4)


def test_depths_in_one_pass(encoder: EncoderNetwork, tiles: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    single = {d: embed(encoder, ArrayTiles(tiles), [d], batch_size=11, device=CPU)[d] for d in ((1,), (3,), None)}
    calls: list[int] = []
    forward = encoder.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(encoder, "forward", counted)
    depths = [(3,), (1,), (3, 1), None]
    several = embed(encoder, ArrayTiles(tiles), depths, batch_size=11, device=CPU)
    assert len(calls) == 1
    np.testing.assert_array_equal(several[3,], single[3,])
    np.testing.assert_array_equal(several[1,], single[1,])
    np.testing.assert_array_equal(several[3, 1], np.concatenate([single[3,], single[1,]], axis=1))
    np.testing.assert_array_equal(several[None], single[None])
    assert several[None].shape == (11, 192)  # the encoder's own output


def test_bf16_is_near(encoder: EncoderNetwork, tiles: np.ndarray) -> None:
    exact = embed(encoder, ArrayTiles(tiles), [(2,)], batch_size=11, device=CPU)[(2,)]
    rough = embed(encoder, ArrayTiles(tiles), [(2,)], batch_size=11, device=CPU, precision="bf16")[(2,)]
    assert 0 < np.abs(rough - exact).max() < 0.2


def test_devices_and_precision() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type in {"cpu", "cuda"}
    with pytest.raises(ValueError, match=r"`device='cuda:99'` cannot be used.*Available: \['cpu'"):
        resolve_device("cuda:99")
    with pytest.raises(ValueError, match="`device='gpu'` cannot be used"):
        resolve_device("gpu")
    with pytest.raises(ValueError, match=r"`precision='fp8'` is not known.*fp32"):
        autocast(CPU, "fp8")
    with pytest.raises(ValueError, match="needs a GPU"):
        autocast(CPU, "fp16")


def test_no_tiles_are_an_error(encoder: EncoderNetwork) -> None:
    source = ArrayTiles(np.zeros((2, encoder.tile_px, encoder.tile_px, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="no tiles to embed"):
        embed(encoder, source, [(1,)], batch_size=2, device=torch.device("cpu"), index=np.empty(0, dtype=int))
