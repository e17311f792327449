"""Encoders: names, weights, tile sizes, digests, depths."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import pekasc as pk
from pekasc.models.encoders import _network as _encoders
from pekasc.models.encoders._network import EncoderNetwork
from pekasc.models.encoders._registry import resolve_encoder

SMALL = pk.models.Encoder("vit_tiny_patch16_224", weights="random", model_kwargs={"depth": 3})


@pytest.fixture(scope="module")
def tiny() -> EncoderNetwork:
    return EncoderNetwork(resolve_encoder("tiny"), 56)


@pytest.mark.parametrize("tile_px", [56, 112, 224])
def test_tiny_takes_the_usual_tiles(tile_px: int) -> None:
    encoder = EncoderNetwork(resolve_encoder("tiny"), tile_px)
    with torch.inference_mode():
        (features,) = encoder(torch.zeros(1, 3, tile_px, tile_px), [encoder.n_blocks])
    assert features.shape == (1, 512) and torch.isfinite(features).all()


def test_tiny_is_small() -> None:
    path = Path(str(files("pekasc.models").joinpath("weights", "tiny.safetensors")))
    assert path.stat().st_size <= 12e6


def test_a_tile_size_that_does_not_fit_names_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"patches of 14 px, so tiles of 100 px do not fit.*84, 98, 112, 126"):
        EncoderNetwork(resolve_encoder("tiny"), 100)
    with pytest.raises(ValueError, match=r"tiles of 10 px do not fit.*such as 14"):
        EncoderNetwork(resolve_encoder("tiny"), 10)


def test_names(tmp_path: Path) -> None:
    assert resolve_encoder("tiny").key == "tiny"
    assert resolve_encoder("resnet18") == pk.models.Encoder("resnet18")
    assert resolve_encoder("hf-hub:MahmoodLab/UNI2-h").short == "UNI2-h"
    assert resolve_encoder(SMALL) is SMALL
    with pytest.raises(ValueError, match=r"`encoder='vit_smal_patch14_dinov2'` is not known.*vit_small_patch14_dinov2"):
        resolve_encoder("vit_smal_patch14_dinov2")
    with pytest.raises(TypeError, match="must be a name or a pekasc.models.Encoder, got int"):
        resolve_encoder(3)  # type: ignore[arg-type]
    (tmp_path / "weights").write_bytes(b"")
    for path in ("my/uni.pth", "vit.safetensors", str(tmp_path / "weights")):
        with pytest.raises(ValueError, match=r"is a path.*`encoder=pekasc\.models\.Encoder\(\".*weights="):
            resolve_encoder(path)


@pytest.mark.parametrize("error", [OSError, ValueError, RuntimeError])
@pytest.mark.parametrize("name", ["hf-hub:MahmoodLab/UNI2-h", "vit_small_patch14_dinov2.lvd142m"])
def test_an_unreachable_hub_says_what_to_do(name: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(*_: object, pretrained: bool, **__: object) -> None:
        assert pretrained
        raise error("gated or offline")

    def download(*_: object) -> None:
        raise error("gated or offline")

    # timm fetches what it knows itself, and pekasc what the table has a repository for
    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(_encoders, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(_encoders, "hf_hub_download", download)
    said = f"{error.__name__}: gated or offline"
    match = rf"could not be fetched.*{said}.*hf auth login.*weights=\"PATH\".*`encoder=\"tiny\"`"
    with pytest.raises(OSError, match=match):
        EncoderNetwork(resolve_encoder(name), 224)


def test_local_weights(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=0)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pth")
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    digests = {EncoderNetwork(replace(SMALL, weights=tmp_path / n), 32).digest for n in ("a.pth", "a.safetensors")}
    assert len(digests) == 1
    with pytest.raises(ValueError, match=r"weights in a\.pth do not fit 'vit_tiny_patch16_224' with model_kwargs="):
        EncoderNetwork(replace(SMALL, weights=tmp_path / "a.pth", model_kwargs={"depth": 2}), 32)
    with pytest.raises(FileNotFoundError, match=r"Encoder weights not found: .*b\.pth"):
        EncoderNetwork(replace(SMALL, weights=tmp_path / "b.pth"), 32)


def test_earlier_depths_are_those_of_a_model_cut_there(tiny: EncoderNetwork) -> None:
    x = torch.rand(2, 3, 56, 56)
    cut = EncoderNetwork(resolve_encoder("tiny"), 56)
    cut.cut(3)
    with torch.inference_mode():
        three, one, last = tiny(x, [3, 1, 6])
        tokens = cut.model.forward_features(x)
    torch.testing.assert_close(three, torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1), rtol=0, atol=1e-6)
    assert not torch.allclose(one, three) and not torch.allclose(three, last)


def test_weights_that_are_none(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.safetensors", b"no tensors", "cannot be read"),
        ("b.pth", b"no pickle", "cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"weights {name} {message}.*A state dict is needed"):
            EncoderNetwork(pk.models.Encoder("vit_tiny_patch16_224", weights=tmp_path / name), 32)
    torch.save([1, 2], tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt holds no state dict .* but a list"):
        EncoderNetwork(pk.models.Encoder("vit_tiny_patch16_224", weights=tmp_path / "c.pt"), 32)


def test_an_architecture_that_timm_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"timm .* knows no model of that name.*Close names: vit_tiny"):
        EncoderNetwork(pk.models.Encoder("vit_tiny_patch16_225", weights="random"), 32)
