"""Decode chunks of a zarr array on disk without zarr's event loop, so that threads decode in parallel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numcodecs
import numpy as np

from pekasc._settings import get_logger

logger = get_logger(__name__)

# compressors that can be decoded without their parameters
_CODECS = {"zstd", "blosc", "gzip", "zlib", "lz4"}


class ZarrChunks:
    """Decode chunks of a (c, y, x) uint8 zarr array that lies in a folder.

    zarr passes every read through one event loop: with chunks of 512 px, two threads are no faster than one, and take
    three times as long as with the codec alone.

    Parameters
    ----------
    array
        The array, see :meth:`of`.
    codec
        Name of the compressor in numcodecs; None without compression.
    """

    def __init__(self, array: Any, codec: str | None) -> None:
        # absolute, since the working directory may change, or differ in another process
        self._folder = str(Path(array.store_path.store.root, array.store_path.path).absolute())
        self._record = "zarr.json" if array.metadata.zarr_format == 3 else ".zarray"
        self._chunks = tuple(int(n) for n in array.chunks)
        self._warned = False
        self._n_channels = int(array.shape[0])
        self._fill = int(array.fill_value or 0)
        self._encode_key = array.metadata.encode_chunk_key
        self._codec = None if codec is None else numcodecs.get_codec({"id": codec})

    @classmethod
    def of(cls, source: Any) -> ZarrChunks | None:
        """Return a decoder for a zarr array in a folder, without shards and filters; None for other arrays."""
        import zarr
        from zarr.codecs import BytesCodec
        from zarr.storage import LocalStore

        if not isinstance(source, zarr.Array) or not isinstance(source.store_path.store, LocalStore):
            return None
        if len(source.compressors) > 1 or source.filters or source.shards is not None or source.order != "C":
            return None
        if source.dtype != np.uint8 or not isinstance(source.serializer, BytesCodec | None):
            return None
        names = [_name(codec) for codec in source.compressors]
        return cls(source, names[0] if names else None) if set(names) <= _CODECS else None

    @property
    def chunk_px(self) -> tuple[int, int]:
        """Height and width of a chunk."""
        return self._chunks[1], self._chunks[2]

    def read_chunk(self, y: int, x: int) -> np.ndarray:
        """Decode the chunk in row `y` and column `x`, all channels, (c, height, width), full-size at the border too.

        Raises
        ------
        FileNotFoundError
            If the array does not exist any more.
        ValueError
            If the chunk has a wrong size.
        """
        step = self._chunks[0]
        block = np.empty((-(-self._n_channels // step) * step, *self._chunks[1:]), np.uint8)
        for i in range(0, self._n_channels, step):
            self._decode(self._encode_key((i // step, y, x)), block[i : i + step])
        return block[: self._n_channels]

    def _decode(self, key: str, out: np.ndarray) -> None:
        file = Path(self._folder, key)
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            if not Path(self._folder, self._record).is_file():
                raise FileNotFoundError(
                    f"the image {self._folder!r} is not there; it was moved, or this process does not see its disk"
                ) from None
            # zarr does not write chunks that hold only the fill value
            if not self._warned:
                logger.warning(
                    "The chunk %s is missing, so all its pixels are %d, zarr's fill value; further missing chunks are "
                    "not logged. If parts of the image were not copied, copy it again.", file, self._fill,
                )  # fmt: skip
                self._warned = True
            out[:] = self._fill
            return
        try:
            decoded = data if self._codec is None else self._codec.decode(data)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{str(file)!r} is damaged: {error}") from error
        if len(decoded) != out.nbytes:
            raise ValueError(f"{str(file)!r} is damaged: it holds {len(decoded)} bytes, not {out.nbytes}")
        out[:] = np.frombuffer(decoded, np.uint8).reshape(out.shape)


def _name(codec: Any) -> str:
    # codecs of zarr format 3 and of format 2
    return str(codec.to_dict()["name"] if hasattr(codec, "to_dict") else codec.codec_id)
