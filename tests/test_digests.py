"""What names a piece of work: the same for the same values in every process, and another for anything else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from pekasc._digests import file_sha256, fingerprint, plain, sha256


def test_sha256_is_that_of_the_bytes_one_after_the_other(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.int16)
    expected = hashlib.sha256("tiles é".encode() + b"\0" + array.tobytes() + array[::2].tobytes()).hexdigest()
    assert sha256("tiles é", b"\0", array, iter([array[::2]])) == expected
    (tmp_path / "file").write_bytes(b"content")
    assert file_sha256(tmp_path / "file") == sha256(b"content")


def test_a_fingerprint_knows_type_shape_and_where_a_part_ends() -> None:
    x = np.arange(6.0)
    digest = fingerprint(x, {"a": 1, "b": (2, 3)})
    assert fingerprint(x.copy(), {"b": [2, 3], "a": 1}) == digest  # the order of keys is none, as in JSON
    others = [(x.reshape(2, 3), {"a": 1}), (x.astype(np.float32), {"a": 1}), (x, {"a": 2}), (x, {"a": True})]
    assert len({digest, *(fingerprint(*parts) for parts in others)}) == 5
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert fingerprint(np.empty((0, 3))) != fingerprint(np.empty((0, 2)))
    assert fingerprint(np.arange(6)[::2]) == fingerprint(np.array([0, 2, 4]))


def test_names_as_objects_are_those_as_text() -> None:
    names = ["ERBB2", "KRT8é"]
    assert fingerprint(np.array(names, dtype=object)) == fingerprint(np.array(names))
    assert fingerprint(np.array(names[::-1])) != fingerprint(np.array(names))


def test_a_set_has_no_order_of_its_own() -> None:
    names = [f"block{i}" for i in range(20)]
    assert plain(set(names)) == plain(frozenset(reversed(names))) == sorted(names)
    assert fingerprint({"modules": set(names)}) == fingerprint({"modules": sorted(names)})
    assert plain(Path("a") / "b") == str(Path("a") / "b")
