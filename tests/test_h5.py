"""HDF5 files of others: nothing outside of the file is read, and no more memory taken than it accounts for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pekasc._h5 import H5File, opened

VALUES = np.arange(12.0).reshape(4, 3)
NAMES = ["a", "b", "äöü"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    with h5py.File(tmp_path / "a.h5", "w") as h5:
        h5["group/values"] = VALUES
        h5.create_dataset("packed", data=np.zeros(10**6), compression="gzip")
        h5["names"] = NAMES
        h5["bytes"] = np.array([b"x", b"yz"])[:, None]
        h5["group"].attrs.update({"kind": "csr", "size": 3.5, "shape": [4, 3]})
    return tmp_path / "a.h5"


def test_numbers_strings_and_attributes_come_back(file: Path) -> None:
    with opened(file) as h5:
        np.testing.assert_array_equal(h5.numbers("group/values", 2), VALUES)
        assert not h5.numbers("packed", 1).any()  # a thousand times smaller in the file
        assert list(h5.strings("names")) == NAMES and list(h5.strings("bytes")) == ["x", "yz"]
        assert h5.is_group("group") and not h5.is_group("names") and h5.is_there("names") and not h5.is_there("group/x")
        assert h5.attribute("group", "kind") == "csr" and h5.attribute("group", "size") == 3.5
        assert list(h5.attribute("group", "shape")) == [4, 3] and h5.attribute("group", "none") is None
        assert h5.names() == ["bytes", "group", "names", "packed"]
        with pytest.raises(ValueError, match=r"a.h5' cannot be read: 'nothing' is missing"):
            h5.dataset("nothing")


def _external(h5: h5py.File) -> None:
    secret = Path(h5.filename).with_name("secret.bin")
    secret.write_bytes(VALUES.tobytes())
    h5.create_dataset("x", VALUES.shape, VALUES.dtype, external=[(str(secret), 0, VALUES.nbytes)])


def _virtual(h5: h5py.File) -> None:
    layout = h5py.VirtualLayout(VALUES.shape, VALUES.dtype)
    layout[:] = h5py.VirtualSource("secret.h5", "x", VALUES.shape)
    h5.create_virtual_dataset("x", layout)


def _link(link: Any) -> Callable[[h5py.File], None]:
    return lambda h5: h5.__setitem__("x", link)


def _many(h5: h5py.File) -> None:
    h5.create_dataset("x", (2**40, 3), "f8", chunks=(100, 3))


def _wide_chunks(h5: h5py.File) -> None:
    h5.create_dataset("x", (4,), "f8", chunks=(2**28,), maxshape=(None,))


def _wide_float(h5: h5py.File) -> None:
    kind = h5py.h5t.IEEE_F64LE.copy()
    kind.set_ebias(2**20)  # beyond what any float of numpy has
    h5py.h5d.create(h5.id, b"x", kind, h5py.h5s.create_simple((2,)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_wide_float, r"is neither numbers nor strings \(Insufficient precision"),
        (_external, "is stored in other files"),
        (_virtual, "is stored in other files"),
        (_link(h5py.ExternalLink("secret.h5", "x")), "is a link to somewhere else"),
        (_link(h5py.SoftLink("/group/values")), "is a link to somewhere else"),
        (_many, "declares 26388279066624 bytes, which a file of .* bytes cannot hold"),
        (_wide_chunks, "declares 2147483648 bytes"),
        (_link(np.zeros(2, dtype=[("a", "f8"), ("b", "i4")])), "is neither numbers nor strings"),
        (_link(h5py.Empty("f8")), "is empty"),
        (lambda h5: h5.create_dataset("x", (2,), h5py.ref_dtype), "is neither numbers nor strings"),
        (lambda h5: h5.create_dataset("x", (2,), h5py.vlen_dtype("f8")), "is neither numbers nor strings"),
        (lambda h5: h5.create_group("x"), "is no data set"),
        (lambda h5: h5.__setitem__("x", np.dtype("f8")), "is no data set"),
    ],
)
def test_what_is_refused(file: Path, make: Callable[[h5py.File], Any], message: str) -> None:
    with h5py.File(file.with_name("secret.h5"), "w") as h5:
        h5["x"] = VALUES
    with h5py.File(file, "a") as h5:
        make(h5)
    with pytest.raises(ValueError, match=rf"a.h5' cannot be read: 'x' {message}"), opened(file) as read:
        read.numbers("x", 2)


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda h5: h5.numbers("names", 1), "'names' must be numbers with 1 axes, got object"),
        (lambda h5: h5.numbers("group/values", 1), "must be numbers with 1 axes, got float64 of shape"),
        (lambda h5: h5.numbers("group/values", 2, "iu"), "must be numbers"),
        (lambda h5: h5.strings("group/values"), "must be strings, got float64"),
        (lambda h5: h5.dataset("names/x"), "lies in something that is no group"),
        (lambda h5: h5.attribute("group", "reference"), "has an attribute 'reference' that is neither"),
    ],
)
def test_other_kinds_than_were_asked_for(file: Path, read: Callable[[H5File], Any], message: str) -> None:
    with h5py.File(file, "a") as h5:
        h5["group"].attrs.create("reference", h5["group"].ref, dtype=h5py.ref_dtype)
    with pytest.raises(ValueError, match=message), opened(file) as h5:
        read(h5)


def test_a_long_attribute_is_not_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w", libver="latest") as h5:
        h5.attrs["long"] = np.zeros(10**4)
    with opened(tmp_path / "a.h5") as read, pytest.raises(ValueError, match="has an attribute 'long' of 80000 bytes"):
        read.attribute("", "long")


def test_data_that_is_read_again_and_again_is_counted(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as h5:
        h5.create_dataset("x", data=np.zeros(2**22), compression="gzip")  # 32 MiB
    with opened(tmp_path / "a.h5") as h5:
        h5.numbers("x", 1)
        with pytest.raises(ValueError, match="takes more memory than a file of .* bytes accounts for"):
            for _ in range(9):
                h5.numbers("x", 1)


def test_one_long_string_that_many_share_is_counted(tmp_path: Path) -> None:
    # as a file made by hand can have it: all elements point to one string in the file
    with h5py.File(tmp_path / "a.h5", "w") as h5:
        h5["x"] = ["x" * 10**6, *(["y"] * 99_999)]
        where, n = h5["x"].id.get_offset(), len(h5["x"])
    content = bytearray((tmp_path / "a.h5").read_bytes())
    content[where : where + 16 * n] = bytes(content[where : where + 16]) * n
    (tmp_path / "a.h5").write_bytes(content)
    with pytest.raises(ValueError, match="takes more memory than a file of"), opened(tmp_path / "a.h5") as h5:
        h5.strings("x")


@pytest.mark.parametrize("content", [b"", b"rubbish" * 100])
def test_what_is_no_hdf5(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.h5").write_bytes(content)
    with pytest.raises(ValueError, match="a.h5' cannot be read; the file is damaged"), opened(tmp_path / "a.h5"):
        pass


def test_strings_that_are_no_utf8(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as h5:
        h5["x"] = np.array([b"\xff\xfe"])
    with pytest.raises(ValueError, match="'x' has strings that are not UTF-8"), opened(tmp_path / "a.h5") as h5:
        h5.strings("x")
