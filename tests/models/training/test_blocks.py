"""How many blocks are adapted where a recipe leaves it open."""

from __future__ import annotations

import pytest
import torch

from pekasc.models import Encoder
from pekasc.models.encoders import EncoderNetwork
from pekasc.models.training._blocks import choose_blocks, training_bytes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def deep() -> EncoderNetwork:
    return EncoderNetwork(Encoder("vit_tiny_patch16_224", weights="random", model_kwargs={"depth": 6}), 32)


def test_the_last_four_where_the_memory_allows(deep: EncoderNetwork, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert choose_blocks(deep, 6, 32, CPU, "fp32") == 4
    assert 'blocks="auto": the last 4 of 6; training one takes about' in caplog.text
    assert choose_blocks(deep, 2, 32, CPU, "fp32") == 2


def test_fewer_where_it_does_not(
    deep: EncoderNetwork, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = training_bytes(deep, 32, CPU, "fp32")
    for free, expected in ((4 * each, 2), (5 * each, 2), (6 * each, 3)):  # half of it is for activations
        monkeypatch.setattr("pekasc.models.training._blocks.memory_at_hand", lambda device, free=free: free)
        assert choose_blocks(deep, 6, 32, CPU, "fp32") == expected
    assert "may not fit" not in caplog.text
    # a batch in two parts takes half, and so does half precision
    monkeypatch.setattr("pekasc.models.training._blocks.memory_at_hand", lambda device: 4 * each)
    assert choose_blocks(deep, 6, 16, CPU, "fp32") == choose_blocks(deep, 6, 32, CPU, "bf16") == 4
    monkeypatch.setattr("pekasc.models.training._blocks.memory_at_hand", lambda device: 1)
    assert choose_blocks(deep, 6, 32, CPU, "fp32") == 1
    assert "Training even one block may run out of memory: `Compute.accumulate` (micro-batches)" in caplog.text


def test_all_where_blocks_cannot_be_run_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    row = Encoder("eva02_tiny_patch14_224", weights="random", model_kwargs={"depth": 2})
    assert choose_blocks(EncoderNetwork(row, 56), 2, 32, CPU, "fp32") == "all"
    assert 'blocks="auto": all 2, for those of this encoder cannot be run one by one' in caplog.text
