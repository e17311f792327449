"""`tl.embed_tiles`: features of every tile into obsm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spatialdata import SpatialData

from pekasc._keys import PEKA, TILES, check_free, check_key, feature_key, write_uns
from pekasc._sections import get_table, tiled_sections, writable_table
from pekasc.models import Adapter, Encoder
from pekasc.models._embed import autocast, check_precision, resolve_device
from pekasc.models._embed_job import EmbedJob
from pekasc.models._encoders import FrozenEncoder, depth_tuple, resolve_encoder, warn_of_scale
from pekasc.tl._options import check_batch_size, check_client, check_memory, check_orientations, check_scales
from pekasc.tl._section_features import section_features

if TYPE_CHECKING:
    from distributed import Client


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
    store: str | Path | None = None,
    client: Client | None = None,
    max_memory: int = 4 * 2**30,
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
        Tiles at once; halved, with a message in the log, where they do not fit the device's memory.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
    precision
        ``"fp32"``, ``"bf16"`` or, on a GPU, ``"fp16"``.
    store
        Folder of a zarr group in which features are kept as they are computed, about 256 tiles at a time, each with a
        checksum. A call that was interrupted goes on from there; chunks that are damaged are computed again, and
        features of other tiles, weights or settings are never taken. Several objects and encoders may share one; a
        second run on the same features waits for the first.
    client
        A :class:`distributed.Client`: tiles are read and embedded by its workers, about 256 at a time. They must see
        the image where it is (so keep images on disk, in zarr or a slide), and the encoder's weights. `device` is
        then that of each worker.
    max_memory
        Bytes that the features may take; decoded parts of the image take up to a quarter of it beside, at most 512 MB.
        Beyond, `store` is needed, and ``obsm`` gets a dask array that reads it.
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
        If the encoder cannot take the tiles, an adapter was trained on others, the store is none, or the features need
        one.
    OSError
        If the encoder's weights cannot be fetched or read, an image chunk is damaged, or the store cannot be written.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=1, size_um=600)
    >>> pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    >>> pk.tl.embed_tiles(sdata, "tiny", progress=False)
    >>> sdata["table"].obsm["X_tiny"].shape[1]
    512
    """
    check_client(client)
    if client is None:
        autocast(resolve_device(device), precision)
    else:
        check_precision(precision)  # the devices are those of the workers
    max_memory = check_memory(max_memory)
    batch_size = check_batch_size(batch_size)
    scales, orientations = check_scales(scales), check_orientations(orientations)
    adapter = encoder if isinstance(encoder, Adapter) else None
    row = encoder.encoder if isinstance(encoder, Adapter) else resolve_encoder(encoder)
    name = check_key(key_added) if key_added is not None else feature_key(PEKA if adapter else row.short)
    check_free(get_table(sdata, table_name), name, "features", slot="obsm")
    sections, spec = tiled_sections(sdata, table_name=table_name, key=key)
    if adapter is not None:
        if depth is not None or len(scales) > 1 or orientations > 1:
            raise ValueError(
                "An adapter has its own depth, scales and orientations: leave `depth=`, `scales=` and "
                "`orientations=` out."
            )
        adapter.check_tiles(spec.tile_px, spec.mpp)
        scales, orientations = adapter.scales, adapter.orientations
        model, of, blocks = adapter.frozen_model(), adapter.depth, adapter.info["depth"]
        digest = adapter.encoder_digest
    else:
        model = FrozenEncoder(row, spec.tile_px)
        warn_of_scale(row, spec.mpp)
        of = tuple(model.check_depth(block) for block in ((-1,) if depth is None else depth_tuple(depth)))
        digest, blocks = model.digest, "+".join(str(b) for b in of)
    job = EmbedJob(
        adapter or row, digest, spec.tile_px, depth=of, orientations=orientations, batch_size=batch_size,
        device=device, precision=precision,
    )  # fmt: skip
    features = section_features(
        sections, spec, scales, job, model, n_obs=get_table(sdata, table_name).n_obs, store=store, client=client,
        max_memory=max_memory, progress=progress,
    )  # fmt: skip
    record: dict[str, Any] = {
        "tile_px": spec.tile_px, "mpp": spec.mpp, "scales": list(scales), "orientations": orientations,
        "encoder": row.to_dict(), "encoder_digest": digest, "depth": blocks,
    }  # fmt: skip
    if adapter is not None:
        record["adapter"] = adapter.method
    table = writable_table(sdata, table_name)
    table.obsm[name] = features.by_row(table.n_obs, max_memory)
    write_uns(table, name, record, kind="features")
