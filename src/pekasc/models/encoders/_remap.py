"""Rename the tensors of released weights to timm's names, so that no second model library is needed."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_PATCH = "embeddings.patch_embeddings.projection.weight"  # in every ViT and DINOv2 of transformers
_EMBEDDINGS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.register_tokens": "reg_token",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_IN_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    # gate and value in one layer, in the order of timm's SwiGLUPacked
    "mlp.weights_in": "mlp.fc1",
    "mlp.weights_out": "mlp.fc2",
}
_LAYER_SCALE = {"layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma"}
_BLOCK = re.compile(r"encoder\.layer\.(\d+)\.(.+)")


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a state dict to timm's names.

    Supports the files of transformers' ViT, DINOv2 and DINOv2 with registers, and of DINOv2's own repository; other
    state dicts are returned unchanged.
    """
    prefix = next((name[: -len(_PATCH)] for name in state if name.endswith(_PATCH)), None)
    if prefix is not None:
        # drops the heads of a model for some task
        inner = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
        return _class_position(_from_transformers(inner))
    if "mask_token" in state and "patch_embed.proj.weight" in state:
        return _class_position(_from_dinov2(state))
    return dict(state)


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        if name == "embeddings.mask_token" or name.startswith("pooler."):
            continue  # used in pretraining only, and a layer after the class token that no encoder here uses
        block = _BLOCK.fullmatch(name)
        if block is None:
            renamed[_EMBEDDINGS.get(name, name)] = tensor
            continue
        number, inside = block.groups()
        if inside.startswith("attention.attention."):
            continue  # query, key and value are concatenated below
        layer, _, kind = inside.rpartition(".")
        new = _LAYER_SCALE.get(inside) or (f"{_IN_BLOCK[layer]}.{kind}" if layer in _IN_BLOCK else None)
        renamed[f"blocks.{number}.{new}" if new else name] = tensor
    for name in state:
        if match := re.fullmatch(r"encoder\.layer\.(\d+)\.attention\.attention\.query\.(weight|bias)", name):
            number, kind = match.groups()
            parts = [state[name.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
            renamed[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat(parts)
    return renamed


def _from_dinov2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {"register_tokens": "reg_token"}
    renamed = {names.get(name, name): tensor for name, tensor in state.items() if name != "mask_token"}
    return {re.sub(r"\.mlp\.w3\.", ".mlp.fc2.", re.sub(r"\.mlp\.w12\.", ".mlp.fc1.", n)): t for n, t in renamed.items()}


def _class_position(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # with registers, timm's models have positions for patches only: add that of the class token to the token itself
    if "reg_token" in state:
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return state
