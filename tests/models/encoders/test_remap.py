"""Weights under other libraries' names: renamed, they give the same tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

import pekasc as pk
from pekasc.models.encoders._network import EncoderNetwork
from pekasc.models.encoders._remap import to_timm

SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
COMMON: dict[str, Any] = {"embed_dim": 48, "depth": 3, "num_heads": 4}


def _randomise(model: torch.nn.Module) -> None:
    # not the small values of a fresh model: layer scales and biases must matter
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


# architecture in transformers, in timm; the names of the hub's files are those of transformers' save_pretrained
CASES = {
    "vit": (
        {"image_size": 64, "patch_size": 16, "intermediate_size": 192, "layer_norm_eps": 1e-6},
        ("vit_base_patch16_224", {**COMMON, "img_size": 64}),
    ),
    "dinov2": (
        {"image_size": 56, "patch_size": 14, "mlp_ratio": 4},
        ("vit_base_patch14_dinov2", {**COMMON, "img_size": 56}),
    ),
    "dinov2 with swiglu": (
        {"image_size": 56, "patch_size": 14, "mlp_ratio": 4, "use_swiglu_ffn": True},
        ("vit_base_patch14_dinov2", {**COMMON, "img_size": 56, "mlp_ratio": 2 * 128 / 48, **SWIGLU}),
    ),
    "dinov2 with registers and swiglu": (
        {"image_size": 56, "patch_size": 14, "mlp_ratio": 4, "use_swiglu_ffn": True, "num_register_tokens": 4},
        ("vit_base_patch14_reg4_dinov2", {**COMMON, "img_size": 56, "mlp_ratio": 2 * 128 / 48, **SWIGLU}),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_tokens_are_those_of_transformers(case: str, wrapped: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config, (architecture, kwargs) = CASES[case]
    kind = "ViT" if case == "vit" else "Dinov2WithRegisters" if "registers" in case else "Dinov2"
    size = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    full = getattr(transformers, f"{kind}Config")(**config, **size)
    task = "ForImageClassification" if wrapped else "Model"
    model = getattr(transformers, f"{kind}{task}")(full).eval()
    _randomise(model)
    model.save_pretrained(tmp_path)
    row = pk.models.Encoder(architecture, weights=tmp_path / "model.safetensors", model_kwargs=kwargs)
    encoder = EncoderNetwork(row, config["image_size"])
    x = torch.randn(2, 3, config["image_size"], config["image_size"], generator=torch.Generator().manual_seed(1))
    inner = model.base_model if wrapped else model
    with torch.inference_mode():
        expected = inner(pixel_values=x).last_hidden_state
        got = encoder.model.forward_features(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def _as_transformers(state: dict[str, Tensor], *, swiglu: bool) -> dict[str, Tensor]:
    """Return a timm state dict under the names of the hub's DINOv2 files: the way back."""
    width = state["cls_token"].shape[-1]
    out = {"embeddings.mask_token": torch.zeros(1, width)}
    named = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm", "attn.proj":
        "attention.output.dense", "mlp.fc1": "mlp.weights_in" if swiglu else "mlp.fc1",
        "mlp.fc2": "mlp.weights_out" if swiglu else "mlp.fc2",
    }  # fmt: skip
    for name, tensor in state.items():
        if name in {"cls_token", "pos_embed", "reg_token"}:
            continue
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", name):
            for part, value in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                out[f"encoder.layer.{match[1]}.attention.attention.{part}.{match[2]}"] = value
            continue
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(\w+)", name)
        layer, kind = (block[2], block[3]) if block else name.rsplit(".", 1)
        new = f"layer_scale{layer[-1]}.lambda1" if kind == "gamma" else f"{named.get(layer, layer)}.{kind}"
        out[f"encoder.layer.{block[1]}.{new}" if block else new] = tensor
    # timm folded the position of the class token into it; any split is right
    split = torch.randn(1, 1, width)
    out["embeddings.cls_token"] = state["cls_token"] - split
    out["embeddings.position_embeddings"] = torch.cat([split, state["pos_embed"]], dim=1)
    out["embeddings.register_tokens"] = state["reg_token"]
    return out


@pytest.mark.parametrize("name", ["hibou-b"])
@pytest.mark.parametrize("prefix", ["", "dinov2_with_registers."])
def test_names_there_and_back(name: str, prefix: str, tmp_path: Path) -> None:
    row = pk.models.get_encoder(name)
    kwargs = {**row.model_kwargs, **COMMON, "depth": 2}
    model = timm.create_model(row.name, num_classes=0, **{**kwargs, "mlp_layer": timm.layers.SwiGLUPacked})
    _randomise(model)
    theirs = {prefix + key: value for key, value in _as_transformers(model.state_dict(), swiglu=True).items()}
    if prefix:
        theirs["classifier.weight"] = torch.zeros(2, 48)
    back = to_timm(theirs)
    assert back.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(back[key], value)


@pytest.mark.parametrize("registers", [0, 4])
def test_files_of_dinov2_itself(registers: int) -> None:
    name = "vit_base_patch14_reg4_dinov2" if registers else "vit_base_patch14_dinov2"
    model = timm.create_model(name, num_classes=0, img_size=56, **COMMON)
    _randomise(model)
    theirs = {k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for k, v in model.state_dict().items()}
    theirs["mask_token"] = torch.zeros(1, 48)
    if registers:
        theirs["register_tokens"] = theirs.pop("reg_token")
        theirs["pos_embed"] = torch.cat([torch.randn(1, 1, 48), theirs["pos_embed"]], dim=1)
    expected = checkpoint_filter_fn(dict(theirs), model)  # timm's own reading of them
    got = to_timm(theirs)
    assert got.keys() == expected.keys() == model.state_dict().keys()
    for key, value in expected.items():
        assert torch.equal(got[key], value)


def test_timm_names_stay() -> None:
    state = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0).state_dict()
    assert to_timm(state).keys() == state.keys()
    assert to_timm({"odd": torch.zeros(1)}).keys() == {"odd"}


def test_names_that_are_not_known_stay_so_that_loading_names_them(tmp_path: Path) -> None:
    model = timm.create_model("vit_base_patch14_reg4_dinov2", num_classes=0, img_size=56, **COMMON)
    theirs = _as_transformers(model.state_dict(), swiglu=False)
    theirs["encoder.layer.0.attention.gate.weight"] = torch.zeros(1)
    save_file({name: tensor.clone() for name, tensor in theirs.items()}, tmp_path / "w.safetensors")
    row = pk.models.Encoder("vit_base_patch14_reg4_dinov2", weights=tmp_path / "w.safetensors", model_kwargs=COMMON)
    with pytest.raises(ValueError, match=r"do not fit(.|\n)*Unexpected.*encoder\.layer\.0\.attention\.gate\.weight"):
        EncoderNetwork(row, 56)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_weights_bring_their_own_grid_of_positions(name: str, tmp_path: Path) -> None:
    # trained at another size than the architecture's default: no need to know which
    patch = 16 if "16" in name else 14
    trained = timm.create_model(name, depth=1, num_classes=0, img_size=patch * 5)
    _randomise(trained)
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    row = pk.models.Encoder(name, weights=tmp_path / "w.safetensors", model_kwargs={"depth": 1})
    encoder = EncoderNetwork(row, patch * 5)
    x = torch.rand(1, 3, patch * 5, patch * 5)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.model.forward_features(x), trained.eval().forward_features(x))
