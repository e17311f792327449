"""Number of blocks to adapt for ``blocks="auto"``."""

from __future__ import annotations

import psutil
import torch

from pekasc._settings import get_logger
from pekasc.models.encoders import EncoderNetwork
from pekasc.models.features import token_shape

logger = get_logger(__name__)

MOST = 4  # see docs/decisions.md: more blocks cost time and gave no better score
_SHARE = 0.5  # fraction of the free memory that activations may take
# values per token and width that a block stores for the backward pass (Korthikanti et al., arXiv:2205.05198)
_PER_TOKEN = 17


def memory_at_hand(device: torch.device) -> int:
    """Return the free memory of the device in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def training_bytes(encoder: EncoderNetwork, batch_size: int, device: torch.device, precision: str) -> int:
    """Estimate the memory in bytes for the activations of one trained block."""
    tokens, width = token_shape(encoder, precision)
    n = batch_size * tokens * width * _PER_TOKEN
    if device.type == "cpu":  # stores the attention weights, which a fused kernel on a GPU recomputes
        heads = getattr(encoder.model.blocks[0].attn, "num_heads", 1)
        n += 2 * batch_size * heads * tokens**2
    return n * (4 if precision == "fp32" else 2)


def choose_blocks(
    encoder: EncoderNetwork, last: int, batch_size: int, device: torch.device, precision: str
) -> int | str:
    """Return how many of the first `last` blocks to adapt: the last four, or fewer if memory is short.

    Parameters
    ----------
    encoder
        The encoder.
    last
        Number of the block after which features are taken.
    batch_size
        Tiles per micro-batch.
    device, precision
        Device and precision of the training.
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
            "Training even one block may run out of memory: `Compute.accumulate` (micro-batches) and "
            "`Compute.gradient_checkpointing` need less."
        )
    return k
