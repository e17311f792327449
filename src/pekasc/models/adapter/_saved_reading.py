"""The reading of an adapter in its folder: a record of its structure, and arrays by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pekasc.models.heads import Block, LinearHead, LinearMap, Member, Reading, Source, linear_block


def _name(*parts: object) -> str:
    return ".".join(("reading", *map(str, parts)))


def reading_parts(reading: Reading) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Return the record of a reading, and its arrays in single precision."""
    record, arrays = [], dict[str, np.ndarray]()
    for i, member in enumerate(reading.members):
        blocks = []
        arrays[_name(i, "intercept")] = member.head.intercept
        for j, block in enumerate(member.head.blocks):
            arrays[_name(i, j, "offset")], arrays[_name(i, j, "out")] = block.offset, block.out
            sources = []
            for k, (source, linear) in enumerate(block.maps.items()):
                depth = None if source.depth is None else list(source.depth)
                number = [source.adapter] if source.adapter else []  # of several adapters, the first has none
                sources.append([source.network, source.field, depth, *number])
                arrays[_name(i, j, k, "centre")], arrays[_name(i, j, k, "own")] = linear.centre, linear.own
                if linear.around is not None:
                    arrays[_name(i, j, k, "around")] = linear.around
            blocks.append(sources)
        record.append(
            {
                "name": member.name, "weight": float(member.weight), "variant": member.variant,
                "context_um": member.head.context_um, "blocks": blocks,
            }
        )  # fmt: skip
    # copies: several members may share an array, which a safetensors file cannot
    return record, {name: np.array(array, dtype=np.float32) for name, array in arrays.items()}


def reading_from(record: list[dict[str, Any]], arrays: Mapping[str, np.ndarray]) -> Reading:
    """Return the reading that :func:`reading_parts` took apart."""
    members = []
    for i, part in enumerate(record):
        blocks = []
        for j, sources in enumerate(part["blocks"]):
            maps = {}
            for k, (network, field, depth, *number) in enumerate(sources):
                source = Source(network, field, None if depth is None else tuple(depth), *number)
                around = arrays.get(_name(i, j, k, "around"))
                maps[source] = LinearMap(arrays[_name(i, j, k, "centre")], arrays[_name(i, j, k, "own")], around)
            blocks.append(Block(maps, arrays[_name(i, j, "offset")], arrays[_name(i, j, "out")]))
        head = LinearHead(tuple(blocks), arrays[_name(i, "intercept")], part["context_um"])
        members.append(Member(part["name"], part["weight"], head, part["variant"]))
    return Reading(tuple(members))


def old_reading(arrays: Mapping[str, np.ndarray], record: Mapping[str, Any], *, adapted: bool) -> Reading:
    """Return the reading of formats 2 to 4: one ridge on one depth, with the adapter at every scale."""
    network = "adapted" if adapted else "frozen"
    depth = None if record["depth"] is None else tuple(record["depth"])
    sources = [Source(network, i, depth) for i in range(len(record["scales"]))]
    matrix = (arrays["head.components"] / arrays["head.scale"]).T
    block = linear_block(
        matrix, arrays["head.mean"], arrays["head.coef"], sources, context=record["context_um"] is not None
    )
    head = LinearHead((block,), arrays["head.intercept"], record["context_um"])
    return Reading((Member(f"{network}:ridge", 1.0, head),))


def expected_shapes(
    record: list[dict[str, Any]], n_genes: int, arrays: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Return the shape that every array of a reading must have, given its own other arrays.

    Raises
    ------
    ValueError
        If one is missing.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def size(name: str) -> int:
        if name not in arrays or len(arrays[name].shape) != 1:
            raise ValueError(f"{name} is missing, or no vector")
        return int(arrays[name].shape[0])

    for i, part in enumerate(record):
        shapes[_name(i, "intercept")] = (n_genes,)
        for j, sources in enumerate(part["blocks"]):
            k_scores = size(_name(i, j, "offset"))
            shapes[_name(i, j, "offset")] = (k_scores,)
            shapes[_name(i, j, "out")] = (k_scores, n_genes)
            for k in range(len(sources)):
                width = size(_name(i, j, k, "centre"))
                shapes[_name(i, j, k, "centre")] = (width,)
                shapes[_name(i, j, k, "own")] = (width, k_scores)
                if part["context_um"] is not None:
                    shapes[_name(i, j, k, "around")] = (width, k_scores)
    return shapes
