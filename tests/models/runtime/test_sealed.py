"""Files with the SHA-256 of their content: a bit that changed is found before the content is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pekasc.models.runtime._sealed import (
    check_sealed,
    read_sealed_array,
    read_sealed_json,
    replace_sealed,
    write_sealed_array,
    write_sealed_json,
)

VALUES = {"depth": [2], "error": float("nan"), "rows": [[1, 0.1]]}
ARRAYS = [np.arange(12.0, dtype=np.float32).reshape(4, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.zeros(0)]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("array", ARRAYS, ids=["rows", "columns", "empty"])
def test_arrays_come_back_and_any_reader_of_npy_reads_them(tmp_path: Path, array: np.ndarray) -> None:
    write_sealed_array(tmp_path / "x.npy", array, "The features")
    np.testing.assert_array_equal(read_sealed_array(tmp_path / "x.npy"), array)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), array)


@pytest.mark.parametrize("at", [0, 20, 130, -40, -1])
def test_a_flipped_bit_of_an_array_is_found(tmp_path: Path, at: int) -> None:
    write_sealed_array(tmp_path / "x.npy", ARRAYS[0], "The features")
    flip(tmp_path / "x.npy", at)
    with pytest.raises(ValueError, match="x.npy is not the file that was written"):
        read_sealed_array(tmp_path / "x.npy")


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 31, b"x" * 33])
def test_a_short_array_is_found(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(ValueError, match="x.npy is not the file that was written"):
        read_sealed_array(tmp_path / "x.npy")


def test_values_come_back(tmp_path: Path) -> None:
    write_sealed_json(tmp_path / "x.json", VALUES, "The choice")
    np.testing.assert_equal(read_sealed_json(tmp_path / "x.json"), VALUES)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text.replace("0.1", "0.2"), "x.json was changed after it was written"),
        (lambda text: text[:-3], "x.json is no JSON"),
        (lambda text: "[" * 100_000, "x.json is no JSON"),
        (lambda text: "[]", "x.json has no SHA-256 of its values"),
        (lambda text: json.dumps(VALUES), "x.json has no SHA-256 of its values"),
    ],
)
def test_values_that_were_changed_are_found(tmp_path: Path, edit: Callable[[str], str], message: str) -> None:
    file = tmp_path / "x.json"
    write_sealed_json(file, VALUES, "The choice")
    file.write_text(edit(file.read_text()))
    with pytest.raises(ValueError, match=message):
        read_sealed_json(file)


def test_a_file_and_its_digest_agree_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "last.ckpt"
    replace_sealed(file, b"first", "The checkpoint")
    check_sealed(file)

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pekasc.models.runtime._sealed.write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            replace_sealed(file, b"second", "The checkpoint")  # killed between its two files
    assert file.read_bytes() == b"first"
    check_sealed(file)
    replace_sealed(file, b"second", "The checkpoint")
    check_sealed(file)
    flip(file, 2)
    with pytest.raises(ValueError, match="is not the file that was written"):
        check_sealed(file)


@pytest.mark.parametrize("text", [None, "", "{}", '{"sha256": 3}', "[1]"])
def test_a_digest_that_is_missing_or_damaged(tmp_path: Path, text: str | None) -> None:
    replace_sealed(tmp_path / "last.ckpt", b"first", "The checkpoint")
    (tmp_path / "last.json").unlink() if text is None else (tmp_path / "last.json").write_text(text)
    with pytest.raises(ValueError, match="last.json, which has its SHA-256, (cannot be read|is missing or damaged)"):
        check_sealed(tmp_path / "last.ckpt")
