"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from pekasc.models.runtime._files import unfinished, write_array, write_json, write_whole


def test_folders_are_made_and_content_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.json"
    for value in ({"epoch": 1}, {"epoch": 2}):
        write_json(path, value, "The state")
        assert json.loads(path.read_text()) == value
    write_array(path.with_suffix(".npy"), np.arange(3), "The features")
    np.testing.assert_array_equal(np.load(path.with_suffix(".npy")), np.arange(3))
    assert sorted(p.name for p in path.parent.iterdir()) == ["state.json", "state.npy"]


def test_what_fails_half_way_leaves_the_earlier_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"earlier")

    def half(out: BinaryIO) -> None:
        out.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, half, "The state")
    assert path.read_bytes() == b"earlier" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_so(tmp_path: Path, code: int) -> None:
    def full(out: BinaryIO) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(OSError, match="The state of the fit cannot be written to '.*file': No room") as caught:
        write_whole(tmp_path / "file", full, "The state of the fit")
    assert caught.value.errno == code and not list(tmp_path.iterdir())


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="The state cannot be written to .*: (Not a directory|File exists)"):
        write_json(tmp_path / "file" / "state.json", {}, "The state")


def test_array_of_objects_is_not_pickled(tmp_path: Path) -> None:
    values: Any = np.array([{}], dtype=object)
    with pytest.raises(ValueError, match="allow_pickle"):
        write_array(tmp_path / "x.npy", values, "The features")
    assert not list(tmp_path.iterdir())


def test_names_to_write_under_never_meet(tmp_path: Path) -> None:
    names = {unfinished(tmp_path / "file") for _ in range(50)}
    assert len(names) == 50 and {name.parent for name in names} == {tmp_path}
