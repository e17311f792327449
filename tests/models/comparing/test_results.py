"""Finished pieces of a comparison: there whole or not at all, and read from their files as needed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from pekasc.models.comparing._results import Piece, Results
from pekasc.models.runtime import _files

KEY = "0123456789abcdef" * 4
ARRAYS = {"predicted": np.arange(6.0).reshape(2, 3), "few": np.array([1, 2])}


def never() -> Piece:
    raise AssertionError("made twice")


def test_without_a_folder_nothing_is_kept() -> None:
    results = Results(None)
    results.put("a", KEY, ARRAYS, {})
    assert results.get("a", KEY) is None
    arrays, about = results.kept("a", KEY, lambda: (ARRAYS, {"n": 1}))
    assert arrays is ARRAYS and about == {"n": 1}


def test_a_piece_is_made_once_and_mapped_from_its_files(tmp_path: Path) -> None:
    results = Results(tmp_path / "new" / "folder")
    assert results.get("a", KEY) is None
    for arrays, about in (
        results.kept("a", KEY, lambda: (ARRAYS, {"n": 1, "depth": None})),
        results.kept("a", KEY, never),
        Results(tmp_path / "new" / "folder").kept("a", KEY, never),
    ):
        assert about == {"n": 1, "depth": None} and list(arrays) == list(ARRAYS)
        for name, array in arrays.items():
            assert isinstance(array, np.memmap)
            np.testing.assert_array_equal(array, ARRAYS[name])
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [f"a-{KEY[:16]}"]
    # another name or fingerprint is another piece
    assert results.get("b", KEY) is None and results.get("a", KEY[::-1]) is None


def test_the_run_that_was_first_wins(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.put("a", KEY, ARRAYS, {"run": 1})
    results.put("a", KEY, {"predicted": np.zeros(1)}, {"run": 2})
    found = results.get("a", KEY)
    assert found is not None and found[1] == {"run": 1}
    assert len(list(tmp_path.iterdir())) == 1  # and nothing half done


def test_what_fails_halfway_leaves_nothing(tmp_path: Path) -> None:
    results = Results(tmp_path)
    with pytest.raises(TypeError):
        results.put("a", KEY, ARRAYS, {"no JSON": object()})
    assert not list(tmp_path.iterdir()) and results.get("a", KEY) is None
    with pytest.raises(AssertionError):
        results.kept("a", KEY, never)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["predicted", "about"])
def test_a_full_disk_names_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    def full(descriptor: int) -> None:
        if f".{file}." in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_files.os, "fsync", full)
    with pytest.raises(OSError, match=rf"^\[Errno 28\] A result of .* to '{tmp_path}/a-{KEY[:16]}': No room\.$"):
        Results(tmp_path).put("a", KEY, ARRAYS, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["about.json", "predicted.npy", "few.npy"])
@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_a_damaged_piece_is_named(tmp_path: Path, name: str, harm: str) -> None:
    results = Results(tmp_path)
    results.put("a", KEY, ARRAYS, {})
    file = tmp_path / f"a-{KEY[:16]}" / name
    file.unlink() if harm == "gone" else file.write_bytes(file.read_bytes()[:9])
    with pytest.raises(
        ValueError, match=f"The stored result .*a-{KEY[:16]}' cannot be read .* delete it to compute it again"
    ):
        results.kept("a", KEY, never)


def test_a_piece_that_was_changed_is_not_used(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.put("a", KEY, ARRAYS, {"n": 1})
    folder = tmp_path / f"a-{KEY[:16]}"
    about = (folder / "about.json").read_text()
    (folder / "about.json").write_text(about.replace('"n": 1', '"n": 2'))
    with pytest.raises(ValueError, match=r"about.json was changed after it was written"):
        results.get("a", KEY)
    (folder / "about.json").write_text(about)
    content = bytearray((folder / "predicted.npy").read_bytes())
    content[-1] ^= 1
    (folder / "predicted.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"predicted.npy is not the file that was written"):
        results.get("a", KEY)
