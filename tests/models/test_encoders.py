"""Encoders: names, weights, tile sizes, digests, depths."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import pekasc as pk
from pekasc.models import _encoders
from pekasc.models._encoders import FrozenEncoder, resolve_encoder

SMALL = pk.models.Encoder("vit_tiny_patch16_224", weights="random", model_kwargs={"depth": 3})


@pytest.fixture(scope="module")
def tiny() -> FrozenEncoder:
    return FrozenEncoder(resolve_encoder("tiny"), 56)


@pytest.mark.parametrize("tile_px", [56, 112, 224])
def test_tiny_takes_the_usual_tiles(tile_px: int) -> None:
    encoder = FrozenEncoder(resolve_encoder("tiny"), tile_px)
    with torch.inference_mode():
        (features,) = encoder(torch.zeros(1, 3, tile_px, tile_px), [encoder.n_blocks])
    assert features.shape == (1, 512) and torch.isfinite(features).all()


def test_tiny_is_small() -> None:
    path = Path(str(files("pekasc.models").joinpath("weights", "tiny.safetensors")))
    assert path.stat().st_size <= 12e6


def test_a_tile_size_that_does_not_fit_names_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"patches of 14 px, so tiles of 100 px do not fit.*84, 98, 112, 126"):
        FrozenEncoder(resolve_encoder("tiny"), 100)
    with pytest.raises(ValueError, match=r"tiles of 10 px do not fit.*such as 14"):
        FrozenEncoder(resolve_encoder("tiny"), 10)


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


def test_row_as_plain_values() -> None:
    row = replace(SMALL, mean=(0.1, 0.2, 0.3), mpp=0.5)
    assert pk.models.Encoder.from_dict(row.to_dict()) == row
    assert pk.models.Encoder.from_dict(resolve_encoder("tiny").to_dict()) == resolve_encoder("tiny")


def test_digest_is_stable_and_follows_the_weights(tmp_path: Path) -> None:
    first = FrozenEncoder(SMALL, 32)
    torch.manual_seed(99)
    second = FrozenEncoder(SMALL, 64)
    assert first.digest == second.digest  # neither chance nor the tile size
    state = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=0).state_dict()
    state["norm.bias"][0] += 1
    save_file(state, tmp_path / "w.safetensors")
    changed = FrozenEncoder(replace(SMALL, weights=tmp_path / "w.safetensors"), 32)
    state["norm.bias"][0] -= 1
    save_file(state, tmp_path / "v.safetensors")
    original = FrozenEncoder(replace(SMALL, weights=tmp_path / "v.safetensors"), 32)
    assert len({first.digest, changed.digest, original.digest}) == 3


def test_random_weights_only_when_asked_for_and_without_touching_the_generator() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    FrozenEncoder(SMALL, 32)
    assert torch.equal(torch.rand(2), expected)


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
        FrozenEncoder(resolve_encoder(name), 224)


def test_local_weights(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=0)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pth")
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    digests = {FrozenEncoder(replace(SMALL, weights=tmp_path / n), 32).digest for n in ("a.pth", "a.safetensors")}
    assert len(digests) == 1
    with pytest.raises(ValueError, match=r"weights in a\.pth do not fit 'vit_tiny_patch16_224' with model_kwargs="):
        FrozenEncoder(replace(SMALL, weights=tmp_path / "a.pth", model_kwargs={"depth": 2}), 32)
    with pytest.raises(FileNotFoundError, match=r"Encoder weights not found: .*b\.pth"):
        FrozenEncoder(replace(SMALL, weights=tmp_path / "b.pth"), 32)


def test_features_are_class_token_and_mean_patch_token(tiny: FrozenEncoder) -> None:
    x = torch.rand(2, 3, 56, 56)
    with torch.inference_mode():
        tokens = tiny.model.forward_features(x)
        (features,) = tiny(x, [tiny.n_blocks])
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)


def test_earlier_depths_are_those_of_a_model_cut_there(tiny: FrozenEncoder) -> None:
    x = torch.rand(2, 3, 56, 56)
    cut = FrozenEncoder(resolve_encoder("tiny"), 56)
    cut.cut(3)
    with torch.inference_mode():
        three, one, last = tiny(x, [3, 1, 6])
        tokens = cut.model.forward_features(x)
    torch.testing.assert_close(three, torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1), rtol=0, atol=1e-6)
    assert not torch.allclose(one, three) and not torch.allclose(three, last)


def test_register_tokens_are_left_out() -> None:
    row = pk.models.Encoder("vit_small_patch14_reg4_dinov2", weights="random", model_kwargs={"depth": 2})
    encoder = FrozenEncoder(row, 28)
    x = torch.rand(1, 3, 28, 28)
    with torch.inference_mode():
        tokens = encoder.model.forward_features(x)
        (features,) = encoder(x, [2])
    assert tokens.shape[1] == 1 + 4 + 4
    torch.testing.assert_close(features, torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1), rtol=0, atol=1e-6)


def test_convolutional_models_give_pooled_stages() -> None:
    encoder = FrozenEncoder(pk.models.Encoder("resnet18", weights="random"), 64)
    x = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        features = encoder(x, [encoder.n_blocks, 1])
        expected = encoder.model.forward_features(x).mean(dim=(2, 3))
    torch.testing.assert_close(features[0], expected)
    assert features[1].shape[1] < features[0].shape[1]


def test_input_statistics(tiny: FrozenEncoder) -> None:
    tile = np.random.default_rng(0).integers(0, 256, (1, 56, 56, 3)).astype(np.uint8)
    expected = (tile / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    got = tiny.normalise(torch.from_numpy(tile)).numpy()
    np.testing.assert_allclose(got, np.moveaxis(expected, -1, 1), atol=1e-5)
    own = FrozenEncoder(replace(SMALL, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)), 64)
    np.testing.assert_allclose(own.normalise(torch.from_numpy(tile)), np.moveaxis(tile, -1, 1) / 255, atol=1e-6)


def test_depths(tiny: FrozenEncoder) -> None:
    assert [tiny.check_depth(d) for d in (1, 6, -1, -6)] == [1, 6, 6, 1]
    for depth in (0, 7, -7):
        with pytest.raises(ValueError, match=rf"`depth={depth}` is outside encoder 'tiny', which has 6 blocks"):
            tiny.check_depth(depth)
    with pytest.raises(TypeError, match="must be an integer, got 1.5"):
        tiny.check_depth(1.5)  # type: ignore[arg-type]


def test_a_frozen_encoder_stays_in_evaluation_mode(tiny: FrozenEncoder) -> None:
    tiny.train()
    assert not any(module.training for module in tiny.modules())
    assert not any(p.requires_grad for p in tiny.parameters())


def test_weights_that_are_none(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.safetensors", b"no tensors", "cannot be read"),
        ("b.pth", b"no pickle", "cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"weights {name} {message}.*A state dict is needed"):
            FrozenEncoder(pk.models.Encoder("vit_tiny_patch16_224", weights=tmp_path / name), 32)
    torch.save([1, 2], tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt holds no state dict .* but a list"):
        FrozenEncoder(pk.models.Encoder("vit_tiny_patch16_224", weights=tmp_path / "c.pt"), 32)


def test_an_architecture_that_timm_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"timm .* knows no model of that name.*Close names: vit_tiny"):
        FrozenEncoder(pk.models.Encoder("vit_tiny_patch16_225", weights="random"), 32)
