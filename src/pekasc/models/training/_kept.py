"""The weights that a finished training keeps, as the content of a file; reading it cannot run code."""

from __future__ import annotations

import io
import json
from pickle import UnpicklingError
from typing import Any

import torch

from pekasc.models.training._methods import config_from, config_values
from pekasc.models.training._trainer import Trained


def kept_content(trained: Trained) -> bytes:
    """Return weights and configurations by kept epoch as the content of a file."""
    configs = {epoch: json.dumps(config_values(config)) for epoch, config in trained.configs.items()}
    out = io.BytesIO()
    torch.save({"weights": trained.weights, "configs": configs}, out)
    return out.getvalue()


def kept_from(content: bytes, history: list[dict[str, Any]]) -> Trained:
    """Return the training whose weights :func:`kept_content` made a file of.

    Raises
    ------
    ValueError
        If it is another file.
    """
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        configs = {int(epoch): config_from(json.loads(text)) for epoch, text in found["configs"].items()}
        weights = {
            int(epoch): {kind: dict(state) for kind, state in kinds.items()}
            for epoch, kinds in found["weights"].items()
        }
        tensors = [tensor for kinds in weights.values() for state in kinds.values() for tensor in state.values()]
        if weights.keys() != configs.keys() or not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
            raise ValueError("epochs or tensors are missing")
        if not all({"adapter", "projector", "cluster_head"} == kinds.keys() for kinds in weights.values()):
            raise ValueError("parts of the weights are missing")
    except (UnpicklingError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"it holds no weights of adapters ({str(error)[:300]})") from error
    return Trained(weights, configs, history)
