"""How many blocks to adapt where the user leaves it open."""

from __future__ import annotations

import psutil
import torch

from pekasc._settings import get_logger
from pekasc.models.encoders import EncoderNetwork
from pekasc.models.features import token_shape

logger = get_logger(__name__)

MOST = 4  # see docs/decisions.md: more blocks cost time and gave no better score
_SHARE = 0.5  # of the free memory that activations may take
_PER_TOKEN = 17  # numbers of its width that a block keeps for the backward pass (Korthikanti et al., arXiv:2205.05198)


def memory_at_hand(device: torch.device) -> int:
    """Return free bytes of the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def training_bytes(encoder: EncoderNetwork, batch_size: int, device: torch.device, precision: str) -> int:
    """Return about how many bytes of activations training one block keeps."""
    tokens, width = token_shape(encoder, precision)
    n = batch_size * tokens * width * _PER_TOKEN
    if device.type == "cpu":  # attention is kept there, a fused kernel on a GPU computes it again
        heads = getattr(encoder.model.blocks[0].attn, "num_heads", 1)
        n += 2 * batch_size * heads * tokens**2
    return n * (4 if precision == "fp32" else 2)


def choose_blocks(
    encoder: EncoderNetwork, last: int, batch_size: int, device: torch.device, precision: str
) -> int | str:
    """Return how many of the first `last` blocks to adapt: the last four, or fewer where memory is short.

    Parameters
    ----------
    encoder
        The encoder.
    last
        Blocks that the features need.
    batch_size
        Tiles in a training batch (in the part of one that runs at once).
    device, precision
        Where and how it is trained.
    """
    if not encoder.splits:
        logger.hint('blocks="auto": all %d, for those of this encoder cannot be run one by one.', last)
        return "all"
    each, free = training_bytes(encoder, batch_size, device, precision), memory_at_hand(device)
    fits = int(_SHARE * free // each)
    k = max(1, min(MOST, last, fits))
    logger.hint(
        'blocks="auto": the last %d of %d; training one takes about %.3g GB, %s has %.3g GB free.',
        k, last, each / 1e9, device, free / 1e9,
    )  # fmt: skip
    if fits < 1:
        logger.warning(
            "Training even one block may not fit: `Compute.accumulate` runs a batch in parts, "
            "`Compute.gradient_checkpointing` keeps less."
        )
    return k
