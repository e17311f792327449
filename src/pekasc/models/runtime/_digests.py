"""Digests: of weights, of arrays and plain values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's state dict (names, shapes and values in order of names)."""
    sha = hashlib.sha256()
    add_tensors(sha, model.state_dict())
    return sha.hexdigest()


def add_tensors(sha: Any, tensors: Mapping[str, Tensor]) -> None:
    """Add names, types, shapes and values to a hash, in order of names."""
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def fingerprint(*parts: Any) -> str:
    """Return the SHA-256 of arrays and plain values, in order."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            array = np.ascontiguousarray(part.astype("U") if part.dtype == object else part)
            sha.update(f"{array.dtype} {array.shape}".encode())
            sha.update(array.view(np.uint8).data if array.size else b"")
        else:
            sha.update(json.dumps(part, sort_keys=True, default=plain).encode())
        sha.update(b"\n")
    return sha.hexdigest()


def plain(value: Any) -> Any:
    """Return what JSON cannot write as something that it can, the same in every process."""
    # a set has no order of its own
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
