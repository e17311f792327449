"""A store of features: chunks with checksums, one writer at a time, nothing of another digest."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from pekasc.models.features._store import FeatureStore, locked

RNG = np.random.default_rng(0)
X = RNG.normal(size=(23, 6)).astype(np.float32)


def store(folder: Path, digest: str = "a" * 64, chunk: int = 5, **how: Any) -> FeatureStore:
    return FeatureStore(folder / "f.zarr", digest, X.shape, chunk, {"section": "A", **how})


def fill(made: FeatureStore, chunks: Any = range(5)) -> None:
    for i in chunks:
        made.write(i, X[5 * i : 5 * i + 5])


def chunk_file(made: FeatureStore, i: int) -> Path:
    return made.path / made.name / "c" / str(i) / "0"


def test_chunks_in_any_order_and_over_two_runs(tmp_path: Path) -> None:
    first = store(tmp_path)
    assert first.missing() == [0, 1, 2, 3, 4]
    fill(first, [4, 1])
    second = store(tmp_path, chunk=64)  # the chunks of the array that is there
    assert second.chunk == 5 and second.missing() == [0, 2, 3]
    fill(second, [0, 2, 3])
    assert second.missing() == []
    np.testing.assert_array_equal(first.read(slice(None)), X)
    np.testing.assert_array_equal(first.read(np.array([0, 7, 22])), X[[0, 7, 22]])
    # any reader of zarr finds them
    found: Any = zarr.open_group(tmp_path / "f.zarr", mode="r")
    np.testing.assert_array_equal(found[first.name][:], X)
    assert found[first.name].attrs["pekasc_features"]["section"] == "A"


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[:7], lambda b: b"", lambda b: b + b"x"]
)
def test_a_damaged_chunk_is_missing_and_said(tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture) -> None:
    made = store(tmp_path)
    fill(made)
    file = chunk_file(made, 2)
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert store(tmp_path).missing() == [2]
    assert "Chunk 2 of aaaaaaaaaaaaaaaa" in caplog.text and "computed again" in caplog.text
    fill(made, [2])
    assert store(tmp_path).missing() == []


def test_a_flipped_value_is_found(tmp_path: Path) -> None:
    made = store(tmp_path)
    fill(made)
    content = bytearray(chunk_file(made, 0).read_bytes())
    content[10] ^= 4
    chunk_file(made, 0).write_bytes(bytes(content))
    assert made.missing() == [0]


def test_digests_do_not_mix(tmp_path: Path) -> None:
    fill(store(tmp_path))
    other = store(tmp_path, "b" * 64)
    assert other.missing() == [0, 1, 2, 3, 4]
    assert sorted(zarr.open_group(tmp_path / "f.zarr", mode="r").keys()) == ["a" * 16, "b" * 16]


def test_an_array_of_another_digest_or_size_under_this_name_is_an_error(tmp_path: Path) -> None:
    made = store(tmp_path)
    array: Any = zarr.open_array(tmp_path / "f.zarr", path=made.name, mode="r+")
    array.attrs["pekasc_features"] = {**array.attrs["pekasc_features"], "digest": "c" * 64}
    with pytest.raises(ValueError, match="of another digest or size .digest ccc.* Delete .*give another `store=`"):
        store(tmp_path)
    with pytest.raises(ValueError, match="of another digest or size"):
        FeatureStore(tmp_path / "f.zarr", "d" * 64, X.shape, 5, {}) and FeatureStore(
            tmp_path / "f.zarr", "d" * 64, (23, 7), 5, {}
        )


def test_what_is_no_store_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "f.zarr").mkdir()
    (tmp_path / "f.zarr" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no zarr group: give another folder"):
        store(tmp_path)
    zarr.create_array(tmp_path / "g" / "f.zarr", name="image", shape=(3,), dtype="u1")
    with pytest.raises(ValueError, match=r"zarr group with other content \(\['image'\]\)"):
        store(tmp_path / "g")
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "f.zarr").write_text("a file")
    with pytest.raises(ValueError, match="is a file: give a folder"):
        store(tmp_path / "file")
    made = store(tmp_path / "h")
    zarr.open_group(made.path, mode="r+").attrs["pekasc_features"] = 99
    with pytest.raises(ValueError, match="has format 99, this pekasc writes 1"):
        store(tmp_path / "h")


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="The store .* cannot be written: Not a directory"):
        FeatureStore(tmp_path / "file" / "f.zarr", "a" * 64, X.shape, 5, {})


def test_a_full_disk_says_so_and_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = store(tmp_path)
    fill(made, [0, 1])
    from zarr.storage import _local

    put = _local._put

    def full(path: Path, value: Any, exclusive: bool = False) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_local, "_put", full)
    with pytest.raises(OSError, match="No room for features in the store .* 2 is missing; make room and run") as caught:
        fill(made, [2])
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.setattr(_local, "_put", put)
    again = store(tmp_path)
    assert again.missing() == [2, 3, 4]
    fill(again, [2, 3, 4])
    np.testing.assert_array_equal(again.read(slice(None)), X)


def test_the_second_writer_waits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = store(tmp_path), store(tmp_path)
    order = []

    def other() -> None:
        with locked(second.path, [second.name]):
            order.append(("second", second.missing()))

    with caplog.at_level(logging.WARNING):
        with locked(first.path, [first.name, first.name]):
            thread = threading.Thread(target=other)
            thread.start()
            while "waiting for it" not in caplog.text:
                thread.join(0.01)
            fill(first)
            order.append(("first", []))
        thread.join(10)
    assert order == [("first", []), ("second", [])]


def test_locks_are_taken_in_one_order_and_are_few(tmp_path: Path) -> None:
    done = []

    def run(names: list[str]) -> None:
        for _ in range(30):
            with locked(tmp_path / "f.zarr", names):
                done.append(1)

    threads = [threading.Thread(target=run, args=(names,)) for names in (["aa1", "bb2"], ["bb2", "aa1", "bb3"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(done) == 60
    with locked(tmp_path / "f.zarr", [f"{i:04x}" for i in range(0, 65536, 7)]):
        assert len(list((tmp_path / ".f.zarr.locks").iterdir())) <= 258


BEGIN = """
import sys
from pathlib import Path
from pekasc.models.features import FeatureStore
print("ready", flush=True)
sys.stdin.readline()
for i in range(20):
    FeatureStore(Path(sys.argv[1]) / f"{i}.zarr", "a" * 64, (23, 6), 5, {})
print("made")
"""


def test_runs_that_begin_at_once_make_one_store(tmp_path: Path) -> None:
    pipe = subprocess.PIPE
    other = subprocess.Popen([sys.executable, "-c", BEGIN, str(tmp_path)], stdin=pipe, stdout=pipe, text=True)
    assert other.stdin is not None and other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    other.stdin.write("go\n")
    other.stdin.flush()
    for i in range(20):
        FeatureStore(tmp_path / f"{i}.zarr", "a" * 64, (23, 6), 5, {})
    assert other.communicate(timeout=300)[0] == "made\n"
    for i in range(20):
        assert FeatureStore(tmp_path / f"{i}.zarr", "a" * 64, (23, 6), 5, {}).missing() == [0, 1, 2, 3, 4]


def test_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    made = store(tmp_path)
    fill(made, [0])
    left = chunk_file(made, 0).with_suffix(".abc.partial")
    left.write_bytes(b"half")
    made.sweep()
    assert not left.exists()
    assert made.missing() == [1, 2, 3, 4]


def test_a_run_that_was_killed_as_it_began(tmp_path: Path) -> None:
    (tmp_path / "f.zarr").mkdir()
    (tmp_path / "f.zarr" / "zarr.abc.partial").write_bytes(b"{")
    made = store(tmp_path)
    assert made.missing() == [0, 1, 2, 3, 4]
    (tmp_path / "f.zarr" / "zarr.json").write_bytes(b"")
    with pytest.raises(ValueError, match="no zarr group, or a damaged one .*: give another folder, or delete it"):
        store(tmp_path)
