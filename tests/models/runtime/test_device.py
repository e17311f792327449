"""Devices and precision: what is taken, and what cannot be had."""

from __future__ import annotations

import logging

import pytest
import torch

from pekasc._settings import HINT
from pekasc.models.runtime import autocast, resolve_device
from pekasc.models.runtime._device import check_precision


@pytest.mark.parametrize("gpu", [False, True])
def test_auto_takes_the_first_gpu_else_the_cpu(
    gpu: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with caplog.at_level(HINT, logger="pekasc"):
        assert resolve_device("auto").type == ("cuda" if gpu else "cpu")
    assert f"Device: {'cuda' if gpu else 'cpu'}." in caplog.text


def test_a_device_that_is_named_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="pekasc"):
        assert resolve_device("cpu") == torch.device("cpu")
    assert not caplog.records


@pytest.mark.parametrize("device", ["cuda:99", "gpu", ""])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(ValueError, match=rf"`device='{device}'` cannot be used: (.|\n)*\. Available: \['cpu'"):
        resolve_device(device)


def test_precisions() -> None:
    cpu, x = torch.device("cpu"), torch.ones(2, 2)
    with autocast(cpu, "fp32"):
        assert (x @ x).dtype == torch.float32
    with autocast(cpu, "bf16"):
        assert (x @ x).dtype == torch.bfloat16
    with pytest.raises(ValueError, match='`precision="fp16"` needs a GPU: on the CPU take "fp32" or "bf16"'):
        autocast(cpu, "fp16")
    assert autocast(torch.device("cuda"), "fp16") is not None
    with pytest.raises(ValueError, match="`precision='fp8'`"):
        check_precision("fp8")
