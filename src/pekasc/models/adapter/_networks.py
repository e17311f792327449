"""From an adapter to networks: the encoder with trained weights attached, or merged into its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict

from pekasc.models.encoders import EncoderNetwork
from pekasc.models.training import last_block, tuned_model

if TYPE_CHECKING:
    from pekasc.models.adapter._adapter import Adapter

Trained = tuple[PeftConfig, Mapping[str, torch.Tensor]]


def trained_parts(adapter: Adapter) -> list[Trained]:
    """Return configuration and weights of every adapter; none of the frozen encoder."""
    return [] if adapter.config is None else [(adapter.config, adapter.weights["adapter"]), *adapter.others]


def attached_network(adapter: Adapter) -> EncoderNetwork:
    """Return the encoder with every adapter attached, in evaluation mode and without gradients.

    Raises
    ------
    ValueError
        If the encoder's weights are not those that it was trained on, or the adapter's do not fit them.
    """
    model = _encoder(adapter)
    for config, _ in adapter.others:
        model.add_copy(share=getattr(config, "bias", "none") == "none")
    for network, trained in zip(model.networks, trained_parts(adapter), strict=False):  # none if frozen
        _attach(adapter, network, trained)
    return model


def merged_network(adapter: Adapter) -> torch.nn.Module:
    """Return the encoder with the adapter merged into its weights, without later blocks; see `Adapter.merge`."""
    if adapter.others:
        raise ValueError(
            f"This is an ensemble of {adapter.n_adapters} adapters, whose mean no single network has, so that it "
            'cannot be merged. Fit with `refit="last"` (a field of `pekasc.Recipe`) for one adapter that can.'
        )
    model = _encoder(adapter)
    for trained in trained_parts(adapter):
        model.model = _attach(adapter, model, trained).merge_and_unload()
    model.cut(last_block(model, adapter.depth))
    model.model.requires_grad_(False)
    return model.model.eval()


def fill(adapter: Adapter, peft_model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Load trained weights into an attached adapter, in place.

    Raises
    ------
    ValueError
        If they do not fit.
    """
    weights = dict(weights)
    try:
        set_peft_model_state_dict(peft_model, weights)
        loaded = get_peft_model_state_dict(peft_model)  # what is missing or left over was ignored
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise _misfit(adapter, error) from error
    if loaded.keys() != weights.keys():
        raise _misfit(adapter, f"{sorted(loaded.keys() ^ weights.keys())[:4]} are in one of them only")


def _encoder(adapter: Adapter) -> EncoderNetwork:
    model = EncoderNetwork(adapter.encoder, adapter.spec.tile_px)
    if model.digest != adapter.encoder_digest:
        raise ValueError(
            f"This adapter was trained on encoder {adapter.encoder.short!r} with weights "
            f"{adapter.encoder_digest[:12]}, but the weights found now are {model.digest[:12]}. Give the same weights, "
            "for instance `Adapter.load(path, encoder=pekasc.models.Encoder(..., weights=PATH))`."
        )
    return model


def _attach(adapter: Adapter, model: EncoderNetwork, trained: Trained) -> Any:
    """Attach a trained adapter to the model, in place; return the PEFT model."""
    config, weights = trained
    try:
        with torch.random.fork_rng(devices=[]):
            peft_model = tuned_model(model, config)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError) as error:
        raise _misfit(adapter, error) from error
    fill(adapter, peft_model, weights)
    model.requires_grad_(False)
    model.eval()
    return peft_model


def _misfit(adapter: Adapter, why: Exception | str) -> ValueError:
    return ValueError(
        f"The weights of this adapter and its configuration ({adapter.method}) do not fit encoder "
        f"{adapter.encoder.short!r}: {str(why)[:300]}. Copy its folder again, or fit it again."
    )
