"""`tl.embed_tiles`: features of every tile into obsm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from spatialdata import SpatialData

from pekasc._keys import PEKA, TILES, check_free, check_key, feature_key, write_uns
from pekasc._sections import get_table, tiled_sections, writable_table
from pekasc.models import Adapter, Encoder
from pekasc.models._embed import autocast, embed, resolve_device
from pekasc.models._encoders import FrozenEncoder, depth_tuple, resolve_encoder, warn_of_scale
from pekasc.tl import _inputs
from pekasc.tl._options import check_orientations, check_scales


def embed_tiles(
    sdata: SpatialData,
    encoder: str | Encoder | Adapter,
    *,
    depth: int | tuple[int, ...] | None = None,
    scales: Sequence[float] = (1,),
    orientations: int = 1,
    batch_size: int = 64,
    device: str = "auto",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    table_name: str = "table",
    key: str = TILES,
    key_added: str | None = None,
    progress: bool = True,
) -> None:
    """Embed every tile with an image encoder or an adapter.

    Features are the class token beside the mean patch token after the block(s) `depth`, final norm applied; for a
    model without class token the mean token, for a convolutional one the mean of a stage.

    Parameters
    ----------
    sdata
        Sections that :func:`pekasc.pp.tile` has tiled.
    encoder
        A name, a :class:`pekasc.models.Encoder`, or a fitted :class:`pekasc.Adapter`.
    depth
        Number of blocks after which features are taken, or several, whose features are concatenated; the last block
        by default. An adapter has its own.
    scales, orientations
        As in :func:`pekasc.tl.fit_adapter`; an adapter has its own.
    batch_size
        Tiles at once.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
    precision
        ``"fp32"``, ``"bf16"`` or, on a GPU, ``"fp16"``.
    table_name
        Name of the table.
    key
        Name of the tiles.
    key_added
        Key in obsm; by default ``"X_{encoder}"``, and ``"X_peka"`` for an adapter.
    progress
        Show a progress bar.

    Returns
    -------
    None, and writes

    ``table.obsm[key_added]``
        Features, float32, NaN in rows without a tile.
    ``table.uns["pekasc"][key_added]``
        Tile size, scales, orientations, encoder, digest of its weights, depth.

    Raises
    ------
    KeyError
        If the table was not tiled.
    ValueError
        If the encoder cannot take the tiles, or an adapter was trained on others.
    OSError
        If the encoder's weights cannot be fetched or read.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=1, size_um=600)
    >>> pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    >>> pk.tl.embed_tiles(sdata, "tiny", progress=False)
    >>> sdata["table"].obsm["X_tiny"].shape[1]
    512
    """
    place = resolve_device(device)
    autocast(place, precision)
    scales, orientations = check_scales(scales), check_orientations(orientations)
    adapter = encoder if isinstance(encoder, Adapter) else None
    row = encoder.encoder if isinstance(encoder, Adapter) else resolve_encoder(encoder)
    name = check_key(key_added) if key_added is not None else feature_key(PEKA if adapter else row.short)
    check_free(get_table(sdata, table_name), name, "features", slot="obsm")
    sections, spec = tiled_sections(sdata, table_name=table_name, key=key)
    stream, rows = _inputs.tile_stream(sections, spec)
    of = adapter.scales if adapter is not None else scales
    views = adapter.orientations if adapter is not None else orientations
    record: dict[str, Any] = {
        "tile_px": spec.tile_px, "mpp": spec.mpp, "scales": list(of), "orientations": views, "encoder": row.to_dict()
    }  # fmt: skip
    if adapter is not None:
        if depth is not None or len(scales) > 1 or orientations > 1:
            raise ValueError(
                "An adapter has its own depth, scales and orientations: leave `depth=`, `scales=` and "
                "`orientations=` out."
            )
        adapter.check_tiles(spec.tile_px, spec.mpp)
        further = _inputs.further_streams(sections, spec, adapter.scales)
        features = adapter.embed_source(
            stream, further, batch_size=batch_size, device=device, precision=precision, progress=progress
        )
        record |= {"encoder_digest": adapter.encoder_digest, "depth": adapter.info["depth"], "adapter": adapter.method}
    else:
        model = FrozenEncoder(row, spec.tile_px)
        warn_of_scale(row, spec.mpp)
        blocks = (-1,) if depth is None else depth_tuple(depth)
        blocks = tuple(model.check_depth(block) for block in blocks)
        features = embed(
            model, stream, [blocks], further=_inputs.further_streams(sections, spec, scales), orientations=orientations,
            batch_size=batch_size, device=place, precision=precision, progress=progress,
        )[blocks]  # fmt: skip
        record |= {"encoder_digest": model.digest, "depth": "+".join(str(b) for b in blocks)}
    table = writable_table(sdata, table_name)
    table.obsm[name] = _inputs.by_row(features, rows, table.n_obs)
    write_uns(table, name, record, kind="features")
