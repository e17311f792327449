"""Where adapters go, whose rank and layers they have, and the Block-Affine layer as a formula."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from peft import LoraConfig, MissConfig, PrefixTuningConfig, get_peft_model
from torch import nn

from pekasc.models.encoders import Encoder, EncoderNetwork
from pekasc.models.training._methods import attached, check_method, make_config, target_layers


def test_adapters_go_to_the_blocks_that_features_need(encoder: EncoderNetwork) -> None:
    def numbers(depth: tuple[int, ...] | None, blocks: str | int) -> list[int]:
        names = target_layers(encoder, depth, blocks)
        assert all(name.endswith(".attn.qkv") for name in names)
        return [int(name.split(".")[1]) for name in names]

    assert numbers(None, "all") == [0, 1, 2, 3]
    assert numbers((3,), "all") == [0, 1, 2]
    assert numbers((1, 3), 2) == [1, 2]
    assert all(b - a == 1 for a, b in pairwise(numbers((4,), 3)))
    for blocks in (0, 4, True, "some", 1.5):
        with pytest.raises(ValueError, match=r"`blocks=.*does not fit.*1 to 3"):
            target_layers(encoder, (3,), blocks)


def test_a_configuration_has_its_own_layers_rank_and_dropout(encoder: EncoderNetwork) -> None:
    method = LoraConfig(r=4, target_modules=["attn.proj", "mlp.fc1"], lora_dropout=0.5)
    layers = target_layers(encoder, (2,), 1, method)
    assert layers == ["blocks.1.attn.proj", "blocks.1.mlp.fc1"]
    config = make_config(method, 64, layers)
    assert config.r == 4  # type: ignore[attr-defined]
    with attached(encoder, config, 0):
        encoder.train()
        active = {name for name, module in encoder.named_modules() if module.training}
        assert active and all("lora_dropout" in name for name in active)
        encoder.eval()
        assert not any(module.training for module in encoder.modules())
    with pytest.raises(ValueError, match=r"linear layers \['attn.query'\].*its blocks have: \['attn.proj', 'attn.qkv'"):
        target_layers(encoder, (2,), "all", LoraConfig(target_modules=["attn.query"]))


@pytest.mark.parametrize("r", [4, 5])  # 12 inputs: three shards, or two and a padded one
def test_block_affine_is_the_formula_of_the_method(r: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 18))
    weight, bias = net[0].weight.detach().clone(), net[0].bias.detach().clone()
    config = make_config("bone", r, ["0"])
    assert isinstance(config, MissConfig)
    model = get_peft_model(net, config)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    (block,) = trainable.values()
    assert tuple(block.shape) == (r, 18)
    assert block.abs().sum() == 0  # starts as the plain layer
    with torch.no_grad():
        block.normal_()
    x = torch.randn(7, 12)
    padded = nn.functional.pad(x, (0, -12 % r))
    expected = x @ weight.T + bias + sum(padded.split(r, dim=1)) @ block.detach()
    np.testing.assert_allclose(model(x).detach().numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload()
    np.testing.assert_allclose(merged(x).detach().numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)


def test_a_configuration_without_linear_layers_is_refused() -> None:
    config = PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="`method`: PrefixTuningConfig is no adapter of linear layers"):
        check_method(config)


def test_a_regular_expression_names_layers_within_the_blocks() -> None:
    encoder = EncoderNetwork(Encoder("vit_tiny_patch16_224", weights="random", model_kwargs={"depth": 3}), 32)
    config = LoraConfig(target_modules=r".*\.(qkv|fc1)")
    wanted = ["blocks.1.attn.qkv", "blocks.1.mlp.fc1", "blocks.2.attn.qkv", "blocks.2.mlp.fc1"]
    assert target_layers(encoder, None, 2, config) == wanted
