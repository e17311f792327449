"""Adapters on the Hugging Face hub: fetched by name, and sent with a model card once licences have been checked."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub

from pekasc._paths import HUB, is_hub
from pekasc._settings import get_logger
from pekasc.models.adapter import _folder
from pekasc.models.adapter._card import MARK, model_card

if TYPE_CHECKING:
    from pekasc.models.adapter._adapter import Adapter

logger = get_logger(__name__)

CARD = "README.md"
_OURS = [_folder.MAIN, *_folder.FILES]
# files beside an adapter that are no reason to think that a repository holds something else
_BESIDE = re.compile(r"readme\.md|\.gitattributes|licen[cs]e.*|.*\.(png|jpe?g|svg|html|md|txt|csv)", re.IGNORECASE)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[\w./-]{1,200}", re.ASCII)
# licences under which others may build on the weights, whatever for
_OPEN = re.compile(r"(apache-2\.0|mit|bsd(-\d-clause)?|cc0-1\.0|cc-by-(sa-)?\d\.\d|unlicense)$")
_LOCAL = " An adapter in a local folder loads without a network."
_NOT_NEEDED = "none needed"  # of teachers that are fitted on the training spots
_NON_COMMERCIAL = re.compile(r"non-?commercial|not-for-commercial|\bnc\b|research-(use-)?only|research-use|academic")


def hub_hint(path: str | Path) -> str:
    """Return how to load a name like one of the hub from there, for an error about a folder that is not there."""
    name = str(path)
    return f" From the Hugging Face hub: `Adapter.load('{HUB}{name}')`." if _REPOSITORY.fullmatch(name) else ""


def fetch(path: str | Path) -> Path:
    """Return the folder of an adapter on the hub, ``"hf-hub:owner/name"`` or ``"hf-hub:owner/name@revision"``.

    It is fetched once and kept in the hub's cache.

    Raises
    ------
    ValueError
        If that is no name of a repository.
    OSError
        If it cannot be fetched.
    """
    name, at, revision = str(path).removeprefix(HUB).partition("@")
    _check_repository(name)
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ValueError(f"{str(path)!r} names no revision after `@`: give a branch, a tag or a commit.")
    fetching = (f"The adapter {name!r} could not be fetched from the model hub", name, _LOCAL)
    with _named_errors(*fetching):
        # the record first: of a repository that holds something else, nothing more is fetched
        record = huggingface_hub.hf_hub_download(name, _folder.MAIN, revision=revision or None)
    named = _files_named(Path(record))
    with _named_errors(*fetching):
        wanted = [file for file in _OURS if file == _folder.MAIN or file in named]
        return Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=wanted))


def _files_named(record: Path) -> set[str]:
    """Return the files that an adapter's record names; nothing of one that is none, whose reading says so."""
    try:
        named = json.loads(record.read_text())["files"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return set()
    return {name for name in named if isinstance(name, str)} if isinstance(named, dict) else set()


def push(
    adapter: Adapter, name: str, *, licence: str, terms_checked: bool, private: bool, token: str | None,
    message: str | None,
) -> str:  # fmt: skip
    """Send an adapter and its model card; see :meth:`pekasc.models.Adapter.push_to_hub`."""
    if is_hub(name):
        name = name.removeprefix(HUB)
    _check_repository(name)
    check_licences(adapter, licence, terms_checked=terms_checked)
    api = huggingface_hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        _folder.save(adapter, Path(folder) / "adapter")
        (Path(folder) / "adapter" / CARD).write_text(model_card(adapter, name, licence), encoding="utf-8")
        said = f"The adapter could not be sent to {name!r} on the model hub"
        with _named_errors(said, name):
            api.create_repo(name, private=private, exist_ok=True)
            there = set(api.list_repo_files(name))
        _check_free(name, there)
        with _named_errors(said, name):
            keep = CARD in there and MARK not in Path(api.hf_hub_download(name, CARD)).read_text(encoding="utf-8")
            if keep:
                logger.hint("The model card of %s was not written by pekasc and is kept.", name)
            sent = api.upload_folder(
                repo_id=name, folder_path=Path(folder) / "adapter", delete_patterns=_OURS,
                commit_message=message or "Adapter of pekasc", allow_patterns=_OURS if keep else [*_OURS, CARD],
            )  # fmt: skip
    return str(getattr(sent, "commit_url", sent))


def _check_free(name: str, there: set[str]) -> None:
    """Check that a repository holds an adapter, or nothing.

    Raises
    ------
    ValueError
        If it holds something else.
    """
    others = sorted(f for f in there if f not in _OURS and not _BESIDE.fullmatch(f))
    if others or (_folder.MAIN not in there and there & set(_folder.FILES)):
        raise ValueError(
            f"The repository {name!r} holds files that do not belong to a pekasc adapter "
            f"({(others or sorted(there))[:5]}): use another repository. Nothing was sent."
        )


def check_licences(adapter: Adapter, licence: str, *, terms_checked: bool) -> None:
    """Check that what the adapter was made from may be shared, as far as its record says.

    Raises
    ------
    ValueError
        If the licence of the encoder or the teacher is unknown or restricts what is built on it, unless
        `terms_checked`; or if `licence` allows what theirs does not.
    """
    if not isinstance(licence, str) or not licence.strip():
        raise ValueError(
            '`licence=` must name the licence that you give the adapter, such as "apache-2.0" or "cc-by-nc-4.0", got '
            f"{licence!r}."
        )
    found = {"encoder": (adapter.encoder.short, adapter.encoder.licence)}
    if adapter.info.get("teacher") is not None:
        found["teacher"] = (str(adapter.info["teacher"]), adapter.info.get("teacher_licence"))
    closed = {
        what: f"{what} {name!r}: {text or 'not stated'}"
        for what, (name, text) in found.items()
        if text is None or not (_OPEN.match(_spelled(text)) or text.startswith(_NOT_NEEDED))
    }
    if adapter.encoder.gated and "encoder" not in closed:
        closed["encoder"] = f"encoder {adapter.encoder.short!r}: gated, terms beside {adapter.encoder.licence}"
    if closed and not terms_checked:
        raise ValueError(
            f"Licences restrict, or do not say, whether an adapter may be shared ({'; '.join(closed.values())}). The "
            "adapter contains none of their weights, but was made with them: read their terms, ask where they are "
            "unclear, and pass `terms_checked=True` if they allow it. Nothing was sent."
        )
    limited = [text for what, text in closed.items() if _NON_COMMERCIAL.search(_spelled(found[what][1] or ""))]
    if limited and not _NON_COMMERCIAL.search(_spelled(licence)):
        raise ValueError(
            f"`licence={licence!r}` allows commercial use, or does not say, but the terms of what the adapter was made "
            f'with exclude it ({"; ".join(limited)}): take a non-commercial licence such as "cc-by-nc-4.0". Nothing '
            "was sent."
        )


def _spelled(licence: str) -> str:
    """Return the name of a licence in small letters, with hyphens for spaces."""
    return re.sub(r"[\s_]+", "-", licence.strip().lower())


def _check_repository(name: str) -> None:
    if not isinstance(name, str) or not _REPOSITORY.fullmatch(name):
        raise ValueError(f"{name!r} is no repository of the model hub: give `owner/name`.")


@contextmanager
def _named_errors(what: str, name: str, advice: str = "") -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's own, and those of its network library, which is another one by version
        raise OSError(
            f"{what} ({type(error).__name__}: {str(error)[:200]}). Check the network and that "
            f"https://huggingface.co/{name} exists; if it is private or yours, log in with `hf auth login`.{advice}"
        ) from error
