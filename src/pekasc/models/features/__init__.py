"""Tiles to features: in memory, in pieces on workers, in a store; activations of the frozen blocks, cached."""

from __future__ import annotations

from pekasc.models.features._cached_blocks import (
    KINDS,
    Inputs,
    Prefix,
    PrefixPlan,
    TileInputs,
    make_prefix,
    tiles_digest,
    token_shape,
)
from pekasc.models.features._embed import BatchEncoder, TokensBetweenBlocks, embed, embed_chunks, features_of
from pekasc.models.features._pieces import EmbedJob, Piece, Reader, embed_pieces, n_features, sample_digest
from pekasc.models.features._store import FeatureStore, locked

__all__ = [
    "BatchEncoder",
    "EmbedJob",
    "FeatureStore",
    "Inputs",
    "KINDS",
    "Piece",
    "Prefix",
    "PrefixPlan",
    "Reader",
    "TileInputs",
    "TokensBetweenBlocks",
    "embed",
    "embed_chunks",
    "embed_pieces",
    "features_of",
    "locked",
    "make_prefix",
    "n_features",
    "sample_digest",
    "tiles_digest",
    "token_shape",
]
