"""Read HDF5 files of others: nothing outside the file, no objects, and no more memory than the file accounts for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import h5py

# deflate, the strongest of HDF5's own filters, packs at most 1032 bytes into one
_RATIO = 1100
_FREE = 32 * 2**20  # bytes that any file may declare
_STRING_BYTES = 256 * 2**20  # that strings read at once may take, if each was as long as the file
_ATTRIBUTE_BYTES = 2**16
_NUMBERS = "biuf"


class H5File:
    """An open HDF5 file whose data sets are checked before they are read.

    Only hard links are followed. Data sets with external storage or of other files (virtual ones), and types other than
    numbers and strings are refused, and so are sizes that the length of the file does not account for.

    Parameters
    ----------
    file
        The open file.
    path
        Its path, for errors.
    """

    def __init__(self, file: h5py.File, path: Path) -> None:
        self._file, self._path = file, path
        self._length = path.stat().st_size
        self._left = _RATIO * self._length + _FREE

    def wrong(self, name: str, what: str) -> ValueError:
        """Return an error about a part of the file."""
        return ValueError(f"{str(self._path)!r} cannot be read: {name!r} {what}.")

    def _part(self, name: str) -> Any:
        """Return a group or data set, None if it is not there."""
        import h5py

        found: Any = self._file
        for part in name.split("/") if name else []:
            if not isinstance(found, h5py.Group):
                raise self.wrong(name, "lies in something that is no group")
            links = found.id.links  # looking a name up in the group would open what it links to
            if not links.exists(part.encode()):
                return None
            if links.get_info(part.encode()).type != h5py.h5l.TYPE_HARD:
                raise self.wrong(name, "is a link to somewhere else: copy the data into the file")
            found = found[part]
        return found

    def is_group(self, name: str) -> bool:
        """Return whether there is a group of that name."""
        import h5py

        return isinstance(self._part(name), h5py.Group)

    def is_there(self, name: str) -> bool:
        """Return whether there is a group or data set of that name."""
        return self._part(name) is not None

    def names(self) -> list[str]:
        """Return the names at the top of the file."""
        return sorted(self._file)

    def dataset(self, name: str) -> h5py.Dataset:
        """Return a data set of numbers or strings, after checking where and how it is stored.

        Raises
        ------
        ValueError
            If it is not there, or may not be read.
        """
        import h5py

        found = self._part(name)
        if found is None:
            raise self.wrong(name, "is missing")
        if not isinstance(found, h5py.Dataset):
            raise self.wrong(name, "is no data set")
        plan = found.id.get_create_plist()
        if plan.get_layout() == h5py.h5d.VIRTUAL or plan.get_external_count():
            raise self.wrong(name, "is stored in other files: copy the data into the file")
        try:
            dtype = found.dtype
        except (TypeError, ValueError) as error:  # floats of more bits than numpy has are the latter
            raise self.wrong(name, f"is neither numbers nor strings ({error})") from error
        if dtype.kind not in _NUMBERS and h5py.check_string_dtype(dtype) is None:
            raise self.wrong(name, f"is neither numbers nor strings, but {dtype}")
        if found.shape is None:
            raise self.wrong(name, "is empty")
        for shape in (found.shape, found.chunks or ()):
            # in Python's integers, which do not overflow
            n_bytes = dtype.itemsize
            for n in shape:
                n_bytes *= int(n)
            if n_bytes > _RATIO * self._length + _FREE:
                raise self.wrong(
                    name, f"declares {n_bytes} bytes, which a file of {self._length} bytes cannot hold: it is damaged"
                )
        return found

    def _take(self, name: str, n_bytes: int) -> None:
        self._left -= n_bytes
        if self._left < 0:
            raise self.wrong(name, f"takes more memory than a file of {self._length} bytes accounts for: it is damaged")

    def numbers(self, name: str, n_axes: int, kinds: str = _NUMBERS) -> np.ndarray:
        """Return an array of numbers with so many axes; `kinds` are those of :attr:`numpy.dtype.kind`."""
        found = self.dataset(name)
        if found.dtype.kind not in kinds or found.ndim != n_axes:
            raise self.wrong(name, f"must be numbers with {n_axes} axes, got {found.dtype} of shape {found.shape}")
        self._take(name, found.size * found.dtype.itemsize)
        values: np.ndarray = found[...]
        return values

    def strings(self, name: str) -> np.ndarray:
        """Return strings, flattened, as an array of objects."""
        import h5py

        found = self.dataset(name)
        if h5py.check_string_dtype(found.dtype) is None:
            raise self.wrong(name, f"must be strings, got {found.dtype}")
        self._take(name, found.size * max(found.dtype.itemsize, 64))
        n = len(found) if found.ndim else 0
        # many elements can share one long string in the file
        step = max(1, min(n, _STRING_BYTES // max(self._length, 1)))
        parts: list[Any] = []
        for start in range(0, n, step):
            part = found[start : start + step].reshape(-1).tolist()
            self._take(name, sum(map(len, part)))
            parts += part
        try:
            return np.array([part.decode() if isinstance(part, bytes) else str(part) for part in parts], dtype=object)
        except UnicodeDecodeError as error:
            raise self.wrong(name, f"has strings that are not UTF-8 ({error})") from error

    def attribute(self, name: str, key: str) -> Any:
        """Return an attribute of a group or data set: a string, a number or an array of numbers; None without one."""
        import h5py

        found = self._part(name)
        if found is None or key not in found.attrs:
            return None
        plan = found.attrs.get_id(key)
        if plan.get_storage_size() > _ATTRIBUTE_BYTES:
            raise self.wrong(name, f"has an attribute {key!r} of {plan.get_storage_size()} bytes")
        if plan.dtype.kind not in _NUMBERS and (h5py.check_string_dtype(plan.dtype) is None or plan.shape != ()):
            raise self.wrong(name, f"has an attribute {key!r} that is neither numbers nor a string")
        value = found.attrs[key]
        return value.decode() if isinstance(value, bytes) else value


@contextmanager
def opened(path: Path) -> Iterator[H5File]:
    """Open an HDF5 file for reading.

    Raises
    ------
    ValueError
        If it is no HDF5 file, or damaged, also where that is found within the block.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            yield H5File(file, path)
    except (OSError, RuntimeError, LookupError, TypeError, OverflowError, MemoryError, UnicodeError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read; the file is damaged or was not downloaded to its end: {error}"
        ) from error
