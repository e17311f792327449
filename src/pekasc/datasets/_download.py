"""Download published files into a cache, and verify their checksums."""

from __future__ import annotations

import hashlib
from pathlib import Path


def git_blob_sha1(file: Path) -> str:
    """Return the SHA-1 under which git stores the content of `file`."""
    digest = hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
    with file.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(url: str, *, folder: str, path: str, git_sha1: str, sha256: str = "", cache: Path | None = None) -> Path:
    """Return the local copy of `url`, downloaded if needed.

    Parameters
    ----------
    url
        URL of the file.
    folder
        Folder of the data set in the cache.
    path
        Path of the file in that folder.
    git_sha1
        The SHA-1 under which git stores the file; git repositories publish it for every file.
    sha256
        The SHA-256 of the file, if known.
    cache
        Folder of the cache; by default ``pooch.os_cache("pekasc")``.

    Raises
    ------
    ValueError
        If the file has another checksum; it is removed.
    OSError
        If the download fails.
    """
    import pooch

    target = (Path(pooch.os_cache("pekasc")) if cache is None else cache) / folder / path
    if target.is_file() and _difference(target, git_sha1, sha256) is None:
        return target
    target.unlink(missing_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        pooch.retrieve(url, known_hash=None, fname=part.name, path=part.parent)
        difference = _difference(part, git_sha1, sha256)
        if difference is not None:
            raise ValueError(
                f"{url} is not the file that was published: {difference}. It was removed; try again, or pass `path=` "
                "a folder with the data."
            )
        part.replace(target)
    except OSError as error:
        raise OSError(
            f"Could not download {url} ({error}). Check the connection, or pass `path=` a folder with the data."
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return target


def _difference(file: Path, git_sha1: str, sha256: str) -> str | None:
    """Return a description of the checksum of `file` that differs, or None."""
    found = git_blob_sha1(file)
    if found != git_sha1:
        return f"its git SHA-1 is {found}, expected {git_sha1}"
    with file.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    return f"its SHA-256 is {found}, expected {sha256}" if sha256 and found != sha256 else None
