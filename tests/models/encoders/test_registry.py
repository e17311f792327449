"""Encoders that have a name: one contract for every row, and what is special about fetching their weights."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from huggingface_hub import model_info
from safetensors.torch import save_file

import pekasc as pk
from pekasc.models.encoders import _network
from pekasc.models.encoders._network import EncoderNetwork
from pekasc.models.encoders._registry import _SHAPING, resolve_encoder
from pekasc.models.training._methods import attach, make_config, target_layers

TABLE = pk.models.list_encoders()
NAMES = list(TABLE.index)
META_ABOVE = 600  # millions of parameters: from here on without values, so that the tests fit into memory
TILE_PX = 112  # a multiple of every patch size


@pytest.fixture
def without_values(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # the meta device knows shapes only: there is nothing to make a digest of
    monkeypatch.setattr(_network, "weights_digest", lambda model: "")
    with torch.device("meta"):
        yield


def _built(name: str) -> EncoderNetwork:
    return EncoderNetwork(replace(pk.models.get_encoder(name), weights="random"), TILE_PX)


def test_the_encoders_that_were_asked_for_are_there() -> None:
    wanted = """
        tiny uni uni2-h h-optimus-0 h-optimus-1 h0-mini virchow virchow2 prov-gigapath gigapath-flash
        hibou-b hibou-l midnight-12k openmidnight gpfm mstar
        lunit-s8 lunit-s16 kaiko-s8 kaiko-s16 kaiko-b8 kaiko-b16 kaiko-l14 phikon phikon-v2
        dinov2-s dinov2-b dinov2-l dinov2-g
    """
    assert NAMES == wanted.split()
    assert TABLE.index.name == "name"


@pytest.mark.parametrize("name", NAMES)
def test_row(name: str) -> None:
    row, facts = pk.models.get_encoder(name), TABLE.loc[name]
    assert re.fullmatch(r"[a-z0-9-]+", name) and row.key == row.short == name
    assert not timm.is_model(name)  # a name of ours must not hide one of timm's
    assert timm.is_model(row.name) and row.name == facts["architecture"]
    assert row.licence and row.licence == facts["licence"]
    assert isinstance(row.gated, bool) and row.gated == facts["gated"]
    assert row.mean is not None and row.std is not None
    assert all(0.4 < v < 0.8 for v in row.mean) and all(0.1 < v <= 0.5 for v in row.std)
    assert row.mpp is None or 0.1 < row.mpp < 4
    assert row.pooling in ({None} if name == "tiny" else {"class", "class+mean"})
    assert facts["library"] in {"timm", "transformers"}
    if name == "tiny":
        assert row.weights and row.hub is None
    else:
        assert row.weights is None
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", str(row.hub))
        assert re.search(r"doi:10\.|arXiv:\d{4}\.\d{5}|huggingface\.co/", str(row.citation))
    assert pk.models.Encoder.from_dict(row.to_dict()) == row


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("without_values")
def test_architecture_is_what_the_row_says(name: str) -> None:
    encoder, facts = _built(name), TABLE.loc[name]
    model = encoder.model
    assert model.embed_dim == facts["width"]
    assert encoder.n_blocks == facts["n_blocks"]
    assert model.blocks[0].attn.num_heads == facts["heads"]
    assert model.patch_embed.patch_size == (facts["patch"], facts["patch"])
    assert model.num_prefix_tokens == 1 + facts["registers"]
    # at the grid that the weights come with
    native = timm.create_model(**_arguments(encoder.encoder))
    assert sum(p.numel() for p in native.parameters()) / 1e6 == pytest.approx(facts["parameters"], abs=0.06)
    assert len(target_layers(encoder, None, "all", "bone")) == facts["n_blocks"]


def _arguments(row: pk.models.Encoder) -> dict[str, object]:
    kwargs = dict(row.model_kwargs)
    if "mlp_layer" in kwargs:
        kwargs["mlp_layer"] = getattr(timm.layers, kwargs["mlp_layer"])
    return {"model_name": row.name, "num_classes": 0, **kwargs}


def _check_with_adapter(name: str, *, values: bool) -> None:
    encoder, facts = _built(name), TABLE.loc[name]
    width, depth = facts["width"], encoder.n_blocks
    tile = torch.randint(0, 256, (1, TILE_PX, TILE_PX, 3), dtype=torch.uint8)
    with torch.no_grad():
        x = encoder.normalise(tile)
        first, last = encoder(x, [1, depth])
        own = encoder.own_output(x)
    assert first.shape == last.shape == (1, 2 * width)
    assert own.shape == (1, 2 * width if encoder.encoder.pooling == "class+mean" else width)

    targets = target_layers(encoder, (depth,), "all", "bone")
    peft_model = attach(encoder, make_config("bone", 8, targets), random_state=0)
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == depth * 8 * 3 * width
    (adapted,) = encoder(x, [depth])
    assert adapted.shape == (1, 2 * width)
    if values:
        torch.testing.assert_close(adapted, last)  # an adapter starts as no change
        torch.testing.assert_close(own[:, :width], last[:, :width])
        (adapted * torch.randn_like(adapted)).sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE.query(f"parameters < {META_ABOVE}").index)
def test_one_tile_with_an_adapter(name: str) -> None:
    torch.manual_seed(0)
    _check_with_adapter(name, values=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE.query(f"parameters >= {META_ABOVE}").index)
@pytest.mark.usefixtures("without_values")
def test_one_tile_with_an_adapter_in_shapes(name: str) -> None:
    _check_with_adapter(name, values=False)


def test_names(tmp_path: Path) -> None:
    row = pk.models.Encoder("vit_tiny_patch16_224", weights="random")
    assert resolve_encoder("tiny").key == "tiny"
    assert resolve_encoder("resnet18") == pk.models.Encoder("resnet18")
    assert resolve_encoder("hf-hub:MahmoodLab/UNI2-h").short == "UNI2-h"
    assert resolve_encoder(row) is row
    with pytest.raises(ValueError, match=r"`encoder='vit_smal_patch14_dinov2'` is not known.*vit_small_patch14_dinov2"):
        resolve_encoder("vit_smal_patch14_dinov2")
    with pytest.raises(TypeError, match="must be a name or a pekasc.models.Encoder, got int"):
        resolve_encoder(3)  # type: ignore[arg-type]
    (tmp_path / "weights").write_bytes(b"")
    for path in ("my/uni.pth", "vit.safetensors", str(tmp_path / "weights")):
        with pytest.raises(ValueError, match=r"is a path.*`encoder=pekasc\.models\.Encoder\(\".*weights="):
            resolve_encoder(path)


def test_names_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"`encoder='UNI2_h'` is not known. Close names: uni2-h.*list_encoders"):
        resolve_encoder("UNI2_h")
    with pytest.raises(ValueError, match=r"`name='virchow3'` is not known. Close names: virchow, virchow2"):
        pk.models.get_encoder("virchow3")
    with pytest.raises(TypeError, match="`name` must be a string, got int"):
        pk.models.get_encoder(3)
    with pytest.raises(ValueError, match="timm.layers has no `mlp_layer` named 'NoMlp'"):
        row = pk.models.Encoder("vit_tiny_patch16_224", weights="random", model_kwargs={"mlp_layer": "NoMlp"})
        EncoderNetwork(row, 32)


def test_arguments_of_a_model_shape_it_and_read_nothing() -> None:
    reading = (timm.create_model, timm.models.load_checkpoint)
    creates = {name for call in reading for name in inspect.signature(call).parameters}
    assert {"checkpoint_path", "pretrained", "pretrained_cfg", "cache_dir"} <= creates and not creates & _SHAPING
    assert not [
        name for name in _SHAPING if re.search("path$|url|file|cfg|config|checkpoint|hub|cache|dir$|device|dtype", name)
    ]
    for model in ("vision_transformer.VisionTransformer", "resnet.ResNet", "convnext.ConvNeXt", "eva.Eva"):
        known = inspect.signature(attrgetter(model)(timm.models).__init__).parameters
        assert len(_SHAPING & set(known)) > 10, model
    with pytest.raises(ValueError, match=r"`model_kwargs` takes arguments .* that shape .*'pretrained_cfg'"):
        pk.models.Encoder("resnet18", model_kwargs={"pretrained_cfg": {"file": "evil.pth"}})
    with pytest.raises(TypeError, match="`model_kwargs`: 'norm_layer' must be a number, a name"):
        pk.models.Encoder("resnet18", model_kwargs={"norm_layer": print})
    with pytest.raises(ValueError, match="timm.layers has no `mlp_layer` named 'create_classifier'"):
        layer = {"mlp_layer": "create_classifier"}
        EncoderNetwork(pk.models.Encoder("vit_tiny_patch16_224", weights="random", model_kwargs=layer), 32)


def test_list_is_the_callers_own() -> None:
    table = pk.models.list_encoders()
    table.loc["uni", "licence"] = "mine"
    pd.testing.assert_frame_equal(pk.models.list_encoders(), TABLE)


def test_what_is_missing_is_none_and_not_a_number() -> None:
    assert TABLE.loc["tiny", "hub"] is None and TABLE.loc["tiny", "citation"] is None
    assert {type(value) for value in TABLE["pooling"]} == {str, type(None)}
    assert TABLE["width"].dtype == np.int64 and np.isnan(TABLE.loc["tiny", "mpp"])


def test_a_note_is_logged_once_the_encoder_is_used(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="pekasc"):
        assert pk.models.get_encoder("tiny").weights
        assert not caplog.records
        resolve_encoder("tiny")
    assert "not for a paper" in caplog.text


def test_pooling_of_the_authors() -> None:
    row = pk.models.Encoder("vit_small_patch14_reg4_dinov2", weights="random", model_kwargs={"depth": 2})
    x = torch.rand(1, 3, 28, 28)
    own = {}
    for pooling in (None, "class", "class+mean"):
        encoder = EncoderNetwork(replace(row, pooling=pooling), 28)
        with torch.inference_mode():
            own[pooling] = encoder.own_output(x)
            tokens = encoder.model.forward_features(x)
    torch.testing.assert_close(own["class"], own[None])
    torch.testing.assert_close(own["class+mean"], torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1))


def test_a_row_is_the_callers_own_and_hub_names_are_known() -> None:
    row = pk.models.get_encoder("uni2-h")
    row.model_kwargs["depth"] = 3  # type: ignore[index]
    assert pk.models.get_encoder("uni2-h").model_kwargs["depth"] != 3
    known = resolve_encoder("hf-hub:MahmoodLab/UNI2-h")
    assert known == replace(pk.models.get_encoder("uni2-h"), key="UNI2-h") and known.short == "UNI2-h"
    assert resolve_encoder("hf-hub:somebody/else").key is None


@pytest.mark.network
@pytest.mark.parametrize("name", TABLE.index[TABLE["hub"].notna()])
def test_licence_and_gating_are_those_of_the_card(name: str) -> None:
    row = pk.models.get_encoder(name)
    info = model_info(str(row.hub))
    assert bool(info.gated) == row.gated
    stated = info.card_data.get("license") if info.card_data else None
    if stated not in {None, "other", "unknown"}:
        assert str(row.licence).lower().startswith(stated)


# names in LazySlide's registry of models, where they are not ours
LAZYSLIDE = {
    "uni2-h": "uni2",
    "prov-gigapath": "gigapath",
    "midnight-12k": "midnight",
    "openmidnight": "open-midnight",
    "lunit-s8": "lunit-dino-s8",
    "lunit-s16": "lunit-dino-s16",
    "phikon-v2": "phikonv2",
}
# where the two differed when this was written (lazyslide-models 0.1.0), and what the cards say
DIFFERENT = {
    ("h-optimus-0", "gated"),  # its page asks to accept terms
    ("midnight-12k", "gated"),  # its card: "publicly available"
    ("hibou-l", "hub"),  # theirs names Hibou-B
    ("lunit-s8", "licence"),  # the same under another name
    ("lunit-s16", "licence"),
}


def test_rows_agree_with_lazyslides_registry() -> None:
    theirs = pytest.importorskip("lazyslide_models", reason="lazyslide-models is not installed").MODEL_REGISTRY
    different, compared = set(), 0
    for name in NAMES:
        key = LAZYSLIDE.get(name, name)
        if key not in theirs:
            continue
        compared += 1
        row, model = pk.models.get_encoder(name), theirs[key]
        width = TABLE.loc[name, "width"] * (2 if model.encode_dim == 2 * TABLE.loc[name, "width"] else 1)
        # "CC BY-NC-ND 4.0", "Apache 2.0 with conditions": the words, without what joins them
        ours, stated = (re.findall(r"[a-z]+|\d", str(text).lower())[:2] for text in (row.licence, model.license))
        facts = {
            "hub": str(model.hf_url).removeprefix("https://huggingface.co/") == row.hub,
            "gated": model.is_gated == row.gated,
            "licence": ours == stated,
            "width": model.encode_dim == width,
        }
        different |= {(name, fact) for fact, same in facts.items() if not same}
    assert compared > 15
    assert different == DIFFERENT


def test_alhena_is_merged_as_its_updates_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "encoders.md").read_text()
    (code,) = re.findall(r"### ALHENA.*?```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    kwargs = {**pk.models.get_encoder("uni2-h").model_kwargs, "depth": 2, "embed_dim": 48, "num_heads": 4}
    row = replace(pk.models.get_encoder("uni2-h"), model_kwargs=kwargs, weights="alhena.safetensors")
    base = timm.create_model(**_arguments(row))
    torch.save(base.state_dict(), "pytorch_model.bin")
    generator = torch.Generator().manual_seed(0)
    updates = {
        f"blocks.{block}.attn.qkv.adapter_{part}_{kind}": torch.randn(shape, generator=generator)
        for block in range(2)
        for part in "QV"
        for kind, shape in (("downsample", (48, 64)), ("upsample", (64, 48)))
    }
    save_file(updates, "adapters.safetensors")
    exec(code, {})
    merged = EncoderNetwork(row, 28).model
    x = torch.randn(3, 48, generator=generator)
    for number, block in enumerate(merged.blocks):
        prefix = f"blocks.{number}.attn.qkv.adapter_"
        query, value = (
            0.5 * x @ updates[f"{prefix}{part}_downsample"] @ updates[f"{prefix}{part}_upsample"] for part in "QV"
        )
        expected = base.blocks[number].attn.qkv(x) + torch.cat([query, torch.zeros_like(query), value], dim=1)
        torch.testing.assert_close(block.attn.qkv(x), expected, atol=1e-4, rtol=1e-4)
