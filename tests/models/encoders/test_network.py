"""Encoders: names, weights, tile sizes, digests, depths."""

from __future__ import annotations

import pytest
import torch

from pekasc.models.encoders._network import EncoderNetwork
from pekasc.models.encoders._registry import resolve_encoder


@pytest.fixture(scope="module")
def tiny() -> EncoderNetwork:
    return EncoderNetwork(resolve_encoder("tiny"), 56)


@pytest.mark.parametrize("tile_px", [56, 112, 224])
def test_tiny_takes_the_usual_tiles(tile_px: int) -> None:
    encoder = EncoderNetwork(resolve_encoder("tiny"), tile_px)
    with torch.inference_mode():
        (features,) = encoder(torch.zeros(1, 3, tile_px, tile_px), [encoder.n_blocks])
    assert features.shape == (1, 512) and torch.isfinite(features).all()


def test_a_tile_size_that_does_not_fit_names_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"patches of 14 px, so tiles of 100 px do not fit.*84, 98, 112, 126"):
        EncoderNetwork(resolve_encoder("tiny"), 100)
    with pytest.raises(ValueError, match=r"tiles of 10 px do not fit.*such as 14"):
        EncoderNetwork(resolve_encoder("tiny"), 10)


def test_earlier_depths_are_those_of_a_model_cut_there(tiny: EncoderNetwork) -> None:
    x = torch.rand(2, 3, 56, 56)
    cut = EncoderNetwork(resolve_encoder("tiny"), 56)
    cut.cut(3)
    with torch.inference_mode():
        three, one, last = tiny(x, [3, 1, 6])
        tokens = cut.model.forward_features(x)
    torch.testing.assert_close(three, torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1), rtol=0, atol=1e-6)
    assert not torch.allclose(one, three) and not torch.allclose(three, last)
