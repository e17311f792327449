"""`tl.embed_tiles`: embed every tile with an encoder or an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spatialdata import SpatialData

from pekasc._keys import PEKA, TILES, check_free, check_key, feature_key, packed, write_uns
from pekasc._options import RESULT_MEMORY, Compute, Readout, resolve, unused_in_embedding
from pekasc._sections import get_table, tiled_table, with_stain, writable_table
from pekasc.models import Adapter, Encoder
from pekasc.models.encoders import Depth, EncoderNetwork, depth_name, resolve_encoder, warn_of_scale
from pekasc.tl._read import ensure_tiles, field_scales, untiled_on_error
from pekasc.tl._section_features import embed_job, on_device, section_features

_IN_HEAD = "no genes are predicted here"
_REFERENCE = "colours are brought to those of training sections, which only a fitted adapter has"


def embed_tiles(
    sdata: SpatialData,
    encoder: str | Encoder | Adapter,
    *,
    readout: Readout | str | Mapping[str, Any] | None = None,
    compute: Compute | str | Mapping[str, Any] | None = None,
    store: str | Path | None = None,
    table_name: str = "table",
    key: str = TILES,
    key_added: str | None = None,
    progress: bool = True,
) -> None:
    """Embed every tile with an image encoder or an adapter.

    Features are the class token concatenated with the mean patch token, after the block(s) ``readout.depth`` and the
    final norm; the mean token for a model without class token, the spatial mean of a stage for a convolutional one.

    Parameters
    ----------
    sdata
        Sections with tiles; tiled first where they have none: with the defaults of :func:`pekasc.pp.tile`, or with the
        tile size of an adapter.
    encoder
        A name, a :class:`pekasc.models.Encoder`, or a fitted :class:`pekasc.Adapter`.
    readout
        A :class:`pekasc.Readout`, or a mapping of its fields: ``depth`` (a number of blocks, several, or ``"own"``; by
        default the last block), ``fields_um`` (by default the tile alone) and ``orientations``. An adapter has its own,
        with its stain map.
    compute
        A :class:`pekasc.Compute`, or a mapping of its fields: ``device``, ``precision``, ``embed_batch_size``,
        ``max_memory`` and ``client``. Features of more than ``max_memory`` bytes need `store`, and ``obsm`` gets a dask
        array that reads from it; decoded image chunks take up to a quarter as much on top, at most 512 MB. The workers
        of a ``client`` read and embed about 256 tiles per task.
    store
        Folder of a zarr group to which features are written while they are computed, in chunks of about 256 tiles with
        a checksum. An interrupted call continues from there and recomputes damaged chunks; features of other tiles,
        weights or settings are never reused. Several objects and encoders can share a store; a second run on the same
        features waits for the first.
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
        Features, (n_obs, n_features) float32; NaN in rows without a tile.
    ``table.uns["pekasc"][key_added]``
        Tile size, fields of view, orientations, encoder, digest of its weights, depth; of an adapter, its ``stain``
        (``""`` without).

    Raises
    ------
    KeyError
        If there is no such table, or an image is missing.
    ValueError
        If the sections have no tiles and their pixel size is unknown: the message shows the `pp.tile` call to make. If
        the adapter has a stain map and a section too little tissue, or none that looks like H&E. If
        the encoder does not accept tiles of this size, the adapter was trained on tiles of another size, `store` is not
        a feature store, or the features do not fit in memory and need one.
    OSError
        If the encoder's weights cannot be downloaded or read, an image chunk is damaged, or the store cannot be
        written.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=1, size_um=600)
    >>> pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    >>> pk.tl.embed_tiles(sdata, "tiny", progress=False)
    >>> sdata["table"].obsm["X_tiny"].shape[1]
    512
    """
    table_name = tiled_table(sdata, table_name)
    adapter = encoder if isinstance(encoder, Adapter) else None
    read, how = _options(adapter, readout, compute)
    how = on_device(how)
    row = encoder.encoder if isinstance(encoder, Adapter) else resolve_encoder(encoder)
    name = check_key(key_added) if key_added is not None else feature_key(PEKA if adapter else row.short)
    check_free(get_table(sdata, table_name), name, "features", slot="obsm")
    depth: Depth
    with untiled_on_error(sdata, table_name=table_name, key=key):
        sections, spec = ensure_tiles(
            sdata, table_name=table_name, key=key, spec=None if adapter is None else adapter.spec
        )
        if adapter is not None:
            adapter.check_tiles(spec.tile_px, spec.mpp)
            sections = with_stain(sections, spec, adapter.stain)
            read = Readout(orientations=adapter.orientations)
            model, depth, digest = adapter.network(), adapter.depth, adapter.encoder_digest
        else:
            model = EncoderNetwork(row, spec.tile_px)
            warn_of_scale(row, spec.mpp)
            # the last block by default: there is no expression to choose a depth with
            depths = (-1,) if isinstance(read.depths, str) else read.depths
            depth = None if depths is None else tuple(model.check_depth(block) for block in depths)
            digest = model.digest
        scales = (1.0,) if adapter is not None else field_scales(spec, read.fields_um)
        job = embed_job(adapter or row, digest, spec.tile_px, depth, read.orientations, how)
        max_memory = how.memory(RESULT_MEMORY)
        features = section_features(
            sections, spec, scales, [job] * len(scales), model, n_obs=get_table(sdata, table_name).n_obs, store=store,
            client=how.client, max_memory=max_memory, progress=progress,
        )  # fmt: skip
    record: dict[str, Any] = {
        "tile_px": spec.tile_px, "mpp": spec.mpp, "fields_um": [scale * spec.side_um for scale in scales[1:]],
        "orientations": read.orientations,
        "encoder": packed(row.to_dict()), "encoder_digest": digest, "depth": depth_name(depth),
    }  # fmt: skip
    if adapter is not None:
        record |= {"adapter": adapter.method, "stain": "" if adapter.stain is None else adapter.stain.method}
    table = writable_table(sdata, table_name)
    table.obsm[name] = features.by_row(table.n_obs, max_memory)
    write_uns(table, name, record, kind="features")


def _options(adapter: Adapter | None, readout: Any, compute: Any) -> tuple[Readout, Compute]:
    """Return the options, checked: here a readout sets only which features are taken."""
    how = resolve(compute, Compute, "compute", unused=unused_in_embedding())
    if adapter is not None:
        unused = dict.fromkeys(Readout.__dataclass_fields__, "an adapter has its own readout")
    else:
        unused = dict.fromkeys(
            ("head", "head_rank", "members", "selection", "n_components", "n_depths", "context_um", "smooth_um"),
            _IN_HEAD,
        ) | {"stain": _REFERENCE}
        if isinstance(readout, Mapping) and readout.get("depth") in ("all", "best"):
            raise ValueError(
                f'`readout`: `depth="{readout["depth"]}"` is chosen on expression, which this call does not read: give '
                'a number of blocks, several, or "own".'
            )
    return resolve(readout, Readout, "readout", unused=unused), how
