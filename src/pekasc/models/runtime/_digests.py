"""SHA-256 of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pekasc._digests import sha256


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's state dict (names, shapes and values in order of names)."""
    return sha256(*tensor_parts(model.state_dict()))


def array_parts(value: Any) -> Iterator[str | np.ndarray]:
    """Yield the arrays of a dataclass of arrays and numbers, and of dataclasses in it, for a digest."""
    for field in fields(value):
        item = getattr(value, field.name)
        yield field.name
        if is_dataclass(item):
            yield from array_parts(item)
        else:
            array = np.ascontiguousarray(item)
            yield f"{array.dtype} {array.shape}"
            yield array


def tensor_parts(tensors: Mapping[str, Tensor]) -> Iterator[str | np.ndarray]:
    """Yield name, type and shape, and values of tensors, for a digest, in order of names."""
    for name, tensor in sorted(tensors.items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
