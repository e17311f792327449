"""What every image encoder promises: features of a tile that depend on its pixels and the weights alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import pekasc as pk
from pekasc.models.encoders import _registry, _weights
from pekasc.models.encoders._network import EncoderNetwork
from pekasc.models.encoders._registry import Encoder, EncoderRow, resolve_encoder
from pekasc.models.runtime import Registry, weights_digest

Change = Callable[..., EncoderNetwork]


@dataclass(frozen=True)
class Case:
    """An encoder that needs no network, and what is known of it."""

    row: Encoder
    tile_px: int
    width: int  # of the features after the last depth
    n_blocks: int
    splits: bool = True
    own_width: int | None = None  # of the encoder's own output; half of `width` by default


def _vit(name: str = "vit_tiny_patch16_224", **kwargs: object) -> Encoder:
    return Encoder(name, weights="random", model_kwargs={"depth": 2, **kwargs})


CASES = {
    "tiny": Case(pk.models.get_encoder("tiny"), 56, 512, 6),
    "class token": Case(_vit(), 32, 384, 2),
    "no class token": Case(_vit(class_token=False, global_pool="avg"), 32, 192, 2, own_width=192),
    "registers": Case(_vit("vit_small_patch14_reg4_dinov2"), 28, 768, 2),
    "gated units": Case(
        replace(_vit(mlp_layer="SwiGLUPacked", act_layer="silu"), pooling="class+mean"), 32, 384, 2, own_width=384
    ),
    "two class tokens": Case(_vit("deit_tiny_distilled_patch16_224"), 32, 384, 2, splits=False),
    "rotary positions": Case(_vit("eva02_tiny_patch14_224"), 56, 384, 2, splits=False),
    "convolutional": Case(Encoder("resnet10t", weights="random"), 64, 512, 5, splits=False, own_width=512),
    "windows": Case(
        Encoder(
            "swin_tiny_patch4_window7_224",
            weights="random",
            model_kwargs={"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 32},
        ),
        56, 64, 2, splits=False, own_width=64,
    ),
}  # fmt: skip


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def encoder(case: Case) -> EncoderNetwork:
    return EncoderNetwork(case.row, case.tile_px)


@pytest.fixture(scope="module")
def tiles(case: Case) -> torch.Tensor:
    shape = (3, case.tile_px, case.tile_px, 3)
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8))


@pytest.fixture(scope="module")
def x(encoder: EncoderNetwork, tiles: torch.Tensor) -> torch.Tensor:
    return encoder.normalise(tiles)


def features(encoder: EncoderNetwork, x: torch.Tensor, *depths: int, start: int = 0) -> list[torch.Tensor]:
    with torch.inference_mode():
        return encoder(x, list(depths), start)


def test_tiles_become_features_of_the_encoders_width(
    case: Case, encoder: EncoderNetwork, tiles: torch.Tensor, x: torch.Tensor
) -> None:
    before = tiles.clone()
    assert encoder.normalise(tiles).shape == (3, 3, case.tile_px, case.tile_px)
    assert torch.equal(tiles, before)
    first, last = features(encoder, x, 1, case.n_blocks)
    with torch.inference_mode():
        own = encoder.own_output(x)
    assert last.shape == (3, case.width) and own.shape == (3, case.own_width or case.width // 2)
    for out in (first, last, own):
        assert out.dtype == torch.float32 and torch.isfinite(out).all()
        assert (out[0] - out[1]).abs().max() > 1e-4  # other tiles, other features


def test_features_are_the_class_token_beside_the_mean_patch_token(encoder: EncoderNetwork, x: torch.Tensor) -> None:
    model = encoder.model
    with torch.inference_mode():
        out = model.forward_features(x)
        stages = None if encoder.is_vit or hasattr(model, "layer1") else model.layers(model.patch_embed(x))
    if stages is not None:  # timm gives stages without the final norm, channels last
        expected = stages.mean(dim=(1, 2))
    elif not encoder.is_vit:  # no tokens: the mean over the map
        expected = out.mean(dim=(2, 3))
    else:
        expected = out[:, model.num_prefix_tokens :].mean(dim=1)
        if getattr(model, "cls_token", None) is not None:
            expected = torch.cat([out[:, 0], expected], dim=1)
    (got,) = features(encoder, x, encoder.n_blocks)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_pixels_are_standardised_by_mean_and_deviation(case: Case, tiles: torch.Tensor, x: torch.Tensor) -> None:
    config = timm.get_pretrained_cfg(case.row.name)
    mean, std = case.row.mean or config.mean, case.row.std or config.std
    expected = (tiles.numpy() / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(x.numpy(), np.moveaxis(expected, -1, 1), atol=1e-5)
    own = EncoderNetwork(replace(case.row, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0)), case.tile_px)
    expected = (tiles.numpy() / 255 - np.array([0.1, 0.2, 0.3])) / np.array([1.0, 2.0, 4.0])
    np.testing.assert_allclose(own.normalise(tiles).numpy(), np.moveaxis(expected, -1, 1), atol=1e-5)


def test_several_depths_are_each_alone_in_the_order_asked_for(
    case: Case, encoder: EncoderNetwork, x: torch.Tensor
) -> None:
    last, first = features(encoder, x, case.n_blocks, 1)
    torch.testing.assert_close(first, features(encoder, x, 1)[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(last, features(encoder, x, case.n_blocks)[0], rtol=0, atol=1e-6)
    assert first.shape != last.shape or not torch.allclose(first, last)


def test_a_tile_does_not_depend_on_its_batch(case: Case, encoder: EncoderNetwork, x: torch.Tensor) -> None:
    (together,) = features(encoder, x, case.n_blocks)
    for i in range(len(x)):
        torch.testing.assert_close(features(encoder, x[i : i + 1], case.n_blocks)[0][0], together[i], atol=1e-5, rtol=0)


def test_depths_are_counted_from_either_end_and_checked(case: Case, encoder: EncoderNetwork) -> None:
    n = case.n_blocks
    assert encoder.n_blocks == n
    assert [encoder.check_depth(d) for d in (1, n, -1, -n)] == [1, n, n, 1]
    name = case.row.short
    for depth in (0, n + 1, -n - 1):
        with pytest.raises(
            ValueError, match=rf"`depth={depth}` is outside encoder '{name}', which has {n} blocks: give 1 to {n}"
        ):
            encoder.check_depth(depth)
    for wrong in (1.5, True, "1", None):
        with pytest.raises(TypeError, match=rf"must be an integer, got {wrong!r}"):
            encoder.check_depth(wrong)


def test_built_twice_it_is_the_same_to_the_bit_whatever_was_drawn_before(
    case: Case, encoder: EncoderNetwork, x: torch.Tensor
) -> None:
    torch.manual_seed(99)
    expected = torch.rand(2)
    torch.manual_seed(99)
    again = EncoderNetwork(case.row, case.tile_px)
    assert torch.equal(torch.rand(2), expected)  # and the caller's generator is where it was
    assert again.digest == encoder.digest
    (one,), (other) = features(encoder, x, case.n_blocks), features(again, x, case.n_blocks)[0]
    assert torch.equal(one, other)
    assert torch.equal(one, features(encoder, x, case.n_blocks)[0])


def test_the_digest_is_that_of_the_weights_and_not_of_the_tile_size(
    case: Case, encoder: EncoderNetwork, tmp_path: Path
) -> None:
    assert EncoderNetwork(case.row, 2 * case.tile_px).digest == encoder.digest
    state = _weights._create(case.row).state_dict()
    digests = []
    for change in (0, 1):
        name = next(name for name, tensor in state.items() if tensor.ndim == 1 and tensor.is_floating_point())
        state[name][0] += change
        save_file(state, tmp_path / f"{change}.safetensors")
        row = replace(case.row, weights=tmp_path / f"{change}.safetensors")
        digests.append(EncoderNetwork(row, case.tile_px).digest)
    assert digests[0] == encoder.digest != digests[1]


def test_nothing_in_it_is_trained(encoder: EncoderNetwork, x: torch.Tensor) -> None:
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    before = encoder.digest, weights_digest(encoder.model)
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not encoder(x, [1])[0].requires_grad
    assert (encoder.digest, weights_digest(encoder.model)) == before


def test_the_row_survives_json(case: Case, encoder: EncoderNetwork) -> None:
    row = replace(case.row, mpp=0.5, mean=(0.1, 0.2, 0.3), adapter_targets=("attn.proj", "mlp.fc1"))
    for written in (case.row, row):
        read = Encoder.from_dict(json.loads(json.dumps(written.to_dict())))
        assert read == written
        assert EncoderNetwork(read, case.tile_px).digest == encoder.digest


def test_where_blocks_can_be_run_apart_the_features_are_the_same(
    case: Case, encoder: EncoderNetwork, x: torch.Tensor
) -> None:
    assert encoder.splits == case.splits
    if not case.splits:
        match = rf"blocks of encoder '{case.row.short}' \({type(encoder.model).__name__}\) cannot be run one by one"
        with pytest.raises(ValueError, match=match):
            encoder.check_splits()
        with pytest.raises(ValueError, match=match):
            encoder.tokens(x, 1)
        return
    n = case.n_blocks
    encoder.check_splits()
    kept: dict[int, torch.Tensor | None] = dict.fromkeys(range(n))
    with torch.inference_mode():
        (whole,), own = encoder(x, [n], 0, kept), encoder.own_output(x)
        for start in range(1, n):
            tokens = encoder.tokens(x, start)
            torch.testing.assert_close(tokens, kept[start], rtol=0, atol=1e-6)
            torch.testing.assert_close(encoder(tokens, [n], start)[0], whole, rtol=0, atol=1e-6)
            torch.testing.assert_close(encoder.own_output(tokens, start), own, rtol=0, atol=1e-6)


def test_features_of_a_depth_are_those_of_an_encoder_cut_there(
    case: Case, encoder: EncoderNetwork, x: torch.Tensor
) -> None:
    cut = EncoderNetwork(case.row, case.tile_px)
    cut.cut(1)
    if cut.is_vit:
        assert len(cut.model.blocks) == 1
    torch.testing.assert_close(features(cut, x, 1)[0], features(encoder, x, 1)[0], rtol=0, atol=1e-6)


def test_a_tile_size_that_does_not_fit_is_refused(case: Case, encoder: EncoderNetwork) -> None:
    patch = getattr(getattr(encoder.model, "patch_embed", None), "patch_size", None)
    if patch is None:
        assert EncoderNetwork(case.row, case.tile_px + 1).tile_px == case.tile_px + 1  # convolutions take any
        return
    with pytest.raises(ValueError, match=rf"patches of {patch[0]} px, so tiles of {case.tile_px + 1} px do not fit"):
        EncoderNetwork(case.row, case.tile_px + 1)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Registry[EncoderRow]:
    """Return the registry; what is added to it goes away with the test."""
    known = _registry._table()
    monkeypatch.setattr(known, "_rows", dict(known))
    return known


def test_an_encoder_that_is_registered_is_known_everywhere(table: Registry[EncoderRow]) -> None:
    row = replace(_vit(), key="mine", licence="CC0")
    table.register("mine", EncoderRow(row, {"width": 192}))
    assert resolve_encoder("mine") == pk.models.get_encoder("mine") == row
    listed = pk.models.list_encoders()
    assert listed.index.is_unique and listed.index[-1] == "mine"
    assert listed.loc["mine", ["architecture", "width", "licence"]].tolist() == ["vit_tiny_patch16_224", 192, "CC0"]
    assert EncoderNetwork(resolve_encoder("mine"), 32).n_blocks == 2


def test_a_name_that_is_taken(table: Registry[EncoderRow]) -> None:
    before = pk.models.get_encoder("uni")
    with pytest.raises(ValueError, match=r"The encoder 'uni' is there already \(.*vit_large_patch16_224.*another name"):
        table.register("uni", EncoderRow(_vit()))
    assert pk.models.get_encoder("uni") == before


def test_a_name_that_is_not_there() -> None:
    known = r"Choose one of \['tiny', 'uni', .*list_encoders.*"
    for name in ("tinny", "TINY_"):
        with pytest.raises(ValueError, match=rf"`encoder='{name}'` is not known. Close names: tiny.*{known}timm model"):
            resolve_encoder(name)
        with pytest.raises(ValueError, match=rf"`name='{name}'` is not known. Close names: tiny.*{known}Encoder\(name"):
            pk.models.get_encoder(name)
    with pytest.raises(ValueError, match=rf"`encoder='qqqqqq'` is not known. {known}"):  # nothing is close
        resolve_encoder("qqqqqq")
