"""Features of tiles: in memory, on Dask workers, in a zarr store; cached activations of the frozen blocks."""

from __future__ import annotations

from pekasc.models.features._cached_blocks import (
    KINDS,
    CachedActivations,
    CachePlan,
    Inputs,
    TileInputs,
    cache_activations,
    tiles_digest,
    token_shape,
)
from pekasc.models.features._embed import BatchEncoder, TokensBetweenBlocks, embed, embed_chunks
from pekasc.models.features._files import FeatureFiles
from pekasc.models.features._forward import features_of
from pekasc.models.features._pieces import EmbedJob, Piece, Reader, embed_pieces, n_features, sample_digest
from pekasc.models.features._predictions import PredictionStore, StoredLayer, derived_layer, stored_layer
from pekasc.models.features._reading import ReadingEncoder
from pekasc.models.features._store import FeatureStore, locked

__all__ = [
    "BatchEncoder",
    "CachePlan",
    "CachedActivations",
    "EmbedJob",
    "FeatureFiles",
    "FeatureStore",
    "Inputs",
    "KINDS",
    "Piece",
    "Reader",
    "PredictionStore",
    "ReadingEncoder",
    "StoredLayer",
    "TileInputs",
    "TokensBetweenBlocks",
    "cache_activations",
    "derived_layer",
    "embed",
    "embed_chunks",
    "embed_pieces",
    "features_of",
    "locked",
    "n_features",
    "sample_digest",
    "tiles_digest",
    "stored_layer",
    "token_shape",
]
