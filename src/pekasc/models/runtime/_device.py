"""Devices and precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from pekasc._settings import get_logger

logger = get_logger(__name__)

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(device: str) -> torch.device:
    """Return the device; ``"auto"`` is the first CUDA GPU if there is one, else the CPU, and is logged.

    Raises
    ------
    ValueError
        If the device is not available.
    """
    if device == "auto":
        found = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        logger.hint("Device: %s.", found)
        return found
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(f"`device={device!r}` cannot be used: {error}. Available: {available}.") from error
    return found


def check_precision(precision: str) -> None:
    """Check that a precision is known."""
    if precision not in PRECISIONS:
        raise ValueError(f"`precision={precision!r}` is not known. Choose one of {list(PRECISIONS)}.")


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the autocast context for `precision` (``"fp32"``, ``"bf16"``, ``"fp16"``)."""
    check_precision(precision)
    dtype = PRECISIONS[precision]
    if dtype is torch.float16 and device.type == "cpu":
        raise ValueError('`precision="fp16"` needs a GPU: on the CPU take "fp32" or "bf16".')
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
