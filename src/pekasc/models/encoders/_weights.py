"""Build the timm model of an encoder with its weights: packaged, from a local file, or from the hub."""

from __future__ import annotations

import difflib
import math
import pickle
from collections.abc import Mapping
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pekasc.models.encoders._registry import _HUB, PACKAGED, RANDOM, Encoder, _table
from pekasc.models.encoders._remap import to_timm

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"Encoder weights not found: {path}. Give the path of a file (`weights=`), or leave it out to take them "
            "from the hub."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"The encoder weights {path.name} cannot be read: {str(error)[:300]}. A state dict is needed: "
            ".safetensors, or a file for `torch.load(weights_only=True)`."
        ) from error
    state = state.get("state_dict", state.get("model", state)) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path.name} holds no state dict (names and tensors) but a {type(state).__name__}.")
    return dict(state)


def _create(encoder: Encoder) -> nn.Module:
    if not encoder.name.startswith(_HUB) and not timm.is_model(encoder.name):
        close = difflib.get_close_matches(encoder.name, timm.list_models(), n=3)
        raise ValueError(
            f"`Encoder({encoder.name!r})`: timm {timm.__version__} knows no model of that name. Give one of "
            f"`timm.list_models()` or 'hf-hub:owner/model'.{' Close names: ' + ', '.join(close) + '.' if close else ''}"
        )
    # timm initialises weights at random before loading any: leave the caller's random state alone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return _build(encoder, {"num_classes": 0, **encoder.model_kwargs})
        except (TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, RuntimeError) as error:
            raise ValueError(
                f"timm cannot build {encoder.name!r} with model_kwargs={dict(encoder.model_kwargs)}: "
                f"{type(error).__name__}: {str(error)[:300]}"
            ) from error


def _build(encoder: Encoder, kwargs: dict[str, Any]) -> nn.Module:
    # layers are given by name, so that an Encoder holds plain values; timm takes names for all but this one
    if isinstance(layer := kwargs.get("mlp_layer"), str):
        found = getattr(timm.layers, layer, None)
        layer_type = found.func if isinstance(found, partial) else found  # SwiGLUPacked is a Mlp with other defaults
        if not (isinstance(layer_type, type) and issubclass(layer_type, nn.Module)):
            raise ValueError(
                f"`model_kwargs`: timm.layers has no `mlp_layer` named {layer!r}. It has 'Mlp', 'GluMlp', 'SwiGLU', "
                "'SwiGLUPacked' and others."
            )
        kwargs = {**kwargs, "mlp_layer": found}
    if encoder.weights == RANDOM:
        return timm.create_model(encoder.name, pretrained=False, **kwargs)
    if encoder.weights is None and encoder.hub is None:
        return _create_pretrained(encoder, kwargs)
    path = _weights_path(encoder)
    state = to_timm(_read_state_dict(path))
    model = timm.create_model(encoder.name, pretrained=False, **kwargs)
    _match_grid(model, state)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"The weights in {path.name} do not fit {encoder.name!r} with model_kwargs={dict(encoder.model_kwargs)}: "
            f"{str(error)[:500]}"
        ) from error
    return model


def _match_grid(model: Any, state: Mapping[str, Tensor]) -> None:
    """Resize the model's grid of position embeddings to that of the saved weights, so that they can be loaded."""
    own, saved = getattr(model, "pos_embed", None), state.get("pos_embed")
    if own is None or saved is None or own.shape == saved.shape or not hasattr(model, "set_input_size"):
        return
    patches: Any = model.patch_embed
    n = saved.shape[1] - (own.shape[1] - patches.num_patches)  # without prefix tokens
    side = math.isqrt(max(n, 0))
    if side and side * side == n:
        model.set_input_size(img_size=(side * patches.patch_size[0], side * patches.patch_size[1]))


def _weights_path(encoder: Encoder) -> Path:
    if encoder.weights is None:
        return _hub_path(encoder)
    if str(encoder.weights).startswith(PACKAGED):
        return Path(str(files("pekasc.models.encoders").joinpath("weights", str(encoder.weights)[len(PACKAGED) :])))
    return Path(encoder.weights)


def _hub_path(encoder: Encoder) -> Path:
    """Return the file with the weights in the hub's cache, downloaded if needed."""
    hub = str(encoder.hub)
    names = _HUB_FILES if encoder.hub_file is None else (encoder.hub_file,)
    for name in names:
        # a downloaded file is used without asking the hub again, so that it works offline
        cached = try_to_load_from_cache(hub, name)
        if isinstance(cached, str):
            return Path(cached)
    for name in names:
        try:
            return Path(hf_hub_download(hub, name))
        except LocalEntryNotFoundError as error:  # no network: another name would fail as well
            raise _unreachable(encoder, hub, error) from error
        except EntryNotFoundError as error:
            if name == names[-1]:
                raise _unreachable(encoder, hub, error) from error
        except (OSError, ValueError, RuntimeError) as error:
            raise _unreachable(encoder, hub, error) from error
    raise AssertionError  # for the type checker: the loop returns or raises


def _create_pretrained(encoder: Encoder, kwargs: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(encoder.name, pretrained=True, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        # huggingface_hub's errors (gated, not found, offline) derive from OSError and ValueError
        raise _unreachable(encoder, encoder.name.split(":", 1)[-1], error) from error


def _unreachable(encoder: Encoder, hub: str, error: Exception) -> OSError:
    own = encoder.key if encoder.key in _table() else None
    terms = "The model is gated:" if encoder.gated else "If the model is gated,"
    local = (
        f'`dataclasses.replace(pekasc.models.get_encoder({own!r}), weights="PATH")`'
        if own
        else f'`pekasc.models.Encoder({encoder.name!r}, weights="PATH")`'
    )
    return OSError(
        f"The weights of {own or encoder.name!r} could not be fetched from the model hub ({type(error).__name__}: "
        f"{str(error)[:200]}). "
        f"{terms} accept its terms at https://huggingface.co/{hub} and log in with `hf auth login`. "
        f'Without a network, fetch the file elsewhere and give it with {local}; `weights="random"` gives random '
        'weights, and `encoder="tiny"` needs no network.'
    )
