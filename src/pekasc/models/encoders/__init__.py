"""Image encoders: registry, weights, network, depths and orientations."""

from __future__ import annotations

from pekasc.models.encoders._depths import (
    ArraysOnAccess,
    Depth,
    candidate_depths,
    depth_name,
    features_at,
    features_of_some,
)
from pekasc.models.encoders._network import EncoderNetwork
from pekasc.models.encoders._orientations import VIEWS, orient, orient_tensor
from pekasc.models.encoders._registry import Encoder, get_encoder, list_encoders, resolve_encoder, warn_of_scale

__all__ = [
    "ArraysOnAccess",
    "Depth",
    "Encoder",
    "EncoderNetwork",
    "VIEWS",
    "candidate_depths",
    "depth_name",
    "features_at",
    "features_of_some",
    "get_encoder",
    "list_encoders",
    "orient",
    "orient_tensor",
    "resolve_encoder",
    "warn_of_scale",
]
