"""Forward passes of an encoder and of its adapters: features at several depths, with shared blocks run once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from pekasc.models.encoders import Depth, EncoderNetwork


def features_of(
    encoder: EncoderNetwork,
    x: torch.Tensor,
    depths: Sequence[Depth],
    start: int = 0,
    kept: dict[int, torch.Tensor | None] | None = None,
) -> list[torch.Tensor]:
    """Return features of normalised tiles for every entry of `depths`, from one pass through the encoder.

    With `start`, `x` are the tokens after that many blocks. For `kept`, see :meth:`EncoderNetwork.forward`.
    """
    blocks = sorted({block for depth in depths if depth is not None for block in depth})
    layers = dict(zip(blocks, encoder(x, blocks, start, kept), strict=True)) if blocks else {}
    return [
        encoder.own_output(x, start) if depth is None else torch.cat([layers[block] for block in depth], dim=1)
        for depth in depths
    ]


def tuned_layers(model: EncoderNetwork) -> list[tuple[str, Any]]:
    """Return the layers to which an adapter is attached, by name."""
    return [(name, module) for name, module in model.model.named_modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def without_adapter(model: EncoderNetwork) -> Iterator[None]:
    """Run the encoder without the adapter that is attached to it, within the block."""
    layers = tuned_layers(model)
    trained = [(parameter, parameter.data) for parameter, _ in model.originals]
    with torch.inference_mode(False):  # what is moved to another device here must serve outside of it as well
        before = [value.to(parameter.device) for parameter, value in model.originals]
    for _, layer in layers:
        layer.enable_adapters(False)
    for (parameter, _), value in zip(trained, before, strict=True):
        parameter.data = value
    try:
        yield
    finally:
        for parameter, value in trained:
            parameter.data = value
        for _, layer in layers:
            layer.enable_adapters(True)
            layer.requires_grad_(False)


def shared_blocks(model: EncoderNetwork, depths: Sequence[Depth]) -> int:
    """Return the number of frozen blocks before the first adapted one, and before the first of `depths`.

    It is 0 where blocks cannot be told apart.
    """
    if not model.splits or model.originals:  # ``bias="all"`` trains biases of every block
        return 0
    numbers = []
    for name, _ in tuned_layers(model):
        parts = name.split(".")
        at = [int(parts[i + 1]) for i, part in enumerate(parts[:-1]) if part == "blocks" and parts[i + 1].isdigit()]
        numbers.append(at[0] if at else 0)
    start = min(numbers, default=0)
    return start if all(depth is None or min(depth) > start for depth in depths) else 0


def adapted_features(
    encoder: EncoderNetwork,
    x: torch.Tensor,
    at: Sequence[Sequence[Depth]],
    start: int,
    tokens: torch.Tensor | None = None,
) -> list[list[torch.Tensor]]:
    """Return the features of every adapter of an encoder, float32; the blocks before the first adapted one run once.

    Parameters
    ----------
    encoder
        The encoder, with an adapter attached to it and to each of its copies.
    x
        Normalised tiles.
    at
        For every adapter, the depths of its features.
    start
        Number of :func:`shared_blocks` of all these depths.
    tokens
        The tokens after these blocks, if they are known.
    """
    if tokens is None and start and len(encoder.networks) > 1:
        tokens = encoder.tokens(x, start)
    made = []
    for network, depths in zip(encoder.networks, at, strict=True):
        parts = features_of(network, x, depths) if tokens is None else features_of(network, tokens, depths, start)
        made.append([part.float() for part in parts])
    return made


def mean_of(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean of features of several adapters; of one, its own."""
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).mean(dim=0)
