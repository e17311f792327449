"""Paths of folders, checked in the words of the argument."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pekasc._paths import check_no_file, folder_path


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("", ValueError, "`store=''` is no path: give a folder"),
        ("a\0b", ValueError, "is no path"),
        ("s3://bucket/a", ValueError, "`store='s3://bucket/a'` is an address"),
        (3, TypeError, "`store=3` must be the path of a folder, got int"),
        (b"a", TypeError, "must be the path of a folder, got bytes"),
        ({}, TypeError, "must be the path of a folder, got dict"),
    ],
)
def test_what_is_no_folder(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        folder_path("store", value)


def test_folders(tmp_path: Path) -> None:
    assert folder_path("store", str(tmp_path)) == folder_path("store", tmp_path) == tmp_path
    assert folder_path("store", "~/a") == Path.home() / "a"
    check_no_file("store", tmp_path)
    check_no_file("store", tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"`store=.*file'` is a file: give a folder"):
        check_no_file("store", tmp_path / "file")
