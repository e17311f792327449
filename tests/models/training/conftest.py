"""One small random encoder, which every training gives back as it was."""

from __future__ import annotations

import pytest

from pekasc.models import Encoder
from pekasc.models.encoders import EncoderNetwork


@pytest.fixture(scope="session")
def encoder() -> EncoderNetwork:
    """Return four random blocks for tiles of 32 px, with register tokens and layer scale."""
    kwargs = {"depth": 4, "reg_tokens": 2, "init_values": 0.5}
    return EncoderNetwork(Encoder("vit_tiny_patch16_224", weights="random", model_kwargs=kwargs), 32)
