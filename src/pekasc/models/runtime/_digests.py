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
    """Yield what is in a dataclass of arrays, numbers and names, in dataclasses and collections in it, for a digest."""
    if is_dataclass(value):
        for field in fields(value):
            yield field.name
            yield from array_parts(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield repr(name)
            yield from array_parts(item)
    elif isinstance(value, tuple | list):
        yield f"{len(value)} items"
        for item in value:
            yield from array_parts(item)
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape}"
        yield np.ascontiguousarray(value)
    else:
        yield repr(value)


def tensor_parts(tensors: Mapping[str, Tensor]) -> Iterator[str | np.ndarray]:
    """Yield name, type and shape, and values of tensors, for a digest, in order of names."""
    for name, tensor in sorted(tensors.items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
