"""Adapters on the hub: a local folder stands for it, in the place of the hub's client."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import yaml

import pekasc as pk
from pekasc.models.adapter._card import MARK, model_card
from pekasc.models.adapter._hub import check_licences


class LocalHub:
    """What pekasc uses of `HfApi` and `snapshot_download`, on a folder."""

    root: Path
    calls: list[tuple[str, Any]]

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.calls.append(("create", (repo_id, private, self.token)))
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)

    def list_repo_files(self, repo_id: str) -> list[str]:
        there = self.root / repo_id
        return [str(file.relative_to(there)) for file in there.rglob("*") if file.is_file()]

    @classmethod
    def hf_hub_download(cls, repo_id: str, filename: str, *, revision: str | None = None) -> str:
        cls.calls.append(("file", (repo_id, filename, revision)))
        file = cls.root / repo_id / filename
        if not file.is_file():
            raise FileNotFoundError(f"404: {repo_id}/{filename}")
        return str(file)

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, delete_patterns: list[str], allow_patterns: list[str],
        commit_message: str,
    ) -> str:  # fmt: skip
        self.calls.append(("upload", commit_message))
        there = self.root / repo_id
        # as the hub's client does it: patterns are of whole paths, in which * is also a slash
        for name in self.list_repo_files(repo_id):
            if any(fnmatch(name, pattern) for pattern in delete_patterns):
                (there / name).unlink()
        for file in Path(folder_path).iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, there)
        return f"https://hub.test/{repo_id}/commit/1"

    @classmethod
    def snapshot_download(cls, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        cls.calls.append(("fetch", (repo_id, revision)))
        copy = cls.root / "cache" / repo_id
        shutil.copytree(
            cls.root / repo_id, copy, dirs_exist_ok=True,
            ignore=lambda _, names: [n for n in names if not any(fnmatch(n, pattern) for pattern in allow_patterns)],
        )  # fmt: skip
        return str(copy)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[LocalHub]]:
    LocalHub.root, LocalHub.calls = tmp_path / "hub", []
    monkeypatch.setattr(huggingface_hub, "HfApi", LocalHub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", LocalHub.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", LocalHub.hf_hub_download)
    yield LocalHub


def card_of(hub: type[LocalHub], name: str) -> tuple[dict[str, Any], str]:
    _, data, text = (hub.root / name / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(data), text


def with_licences(adapter: pk.Adapter, encoder: str | None, teacher: str | None, *, gated: bool = False) -> pk.Adapter:
    return replace(
        adapter, encoder=replace(adapter.encoder, licence=encoder, gated=gated),
        info={**adapter.info, "teacher": "scfoundation", "teacher_licence": teacher},
    )  # fmt: skip


def test_there_and_back(adapter: pk.Adapter, hub: type[LocalHub]) -> None:
    open_ = with_licences(adapter, "Apache-2.0", "none needed: fitted on the training spots")
    address = open_.push_to_hub("lab/breast", licence="apache-2.0", token="t", commit_message="First")
    assert address == "https://hub.test/lab/breast/commit/1"
    assert [call for call in hub.calls if call[0] != "file"] == [
        ("create", ("lab/breast", True, "t")), ("upload", "First"),
    ]  # fmt: skip
    loaded = pk.Adapter.load("hf-hub:lab/breast")
    assert loaded.genes == open_.genes and loaded.encoder == open_.encoder and loaded.info == open_.info
    tiles = np.random.default_rng(0).integers(0, 255, (2, adapter.spec.tile_px, adapter.spec.tile_px, 3), np.uint8)
    how: dict[str, Any] = {"mpp": adapter.spec.mpp, "compute": {"device": "cpu"}}
    np.testing.assert_array_equal(loaded.predict(tiles, **how), open_.predict(tiles, **how))
    data, text = card_of(hub, "lab/breast")
    assert data["license"] == "apache-2.0" and data["library_name"] == "pekasc"
    assert 'pk.Adapter.load("hf-hub:lab/breast")' in text and f"{open_.info['n_spots']:,} spots" in text
    pk.Adapter.load("hf-hub:lab/breast@v1.0")
    assert hub.calls[-2:] == [("file", ("lab/breast", "pekasc.json", "v1.0")), ("fetch", ("lab/breast", "v1.0"))]


def test_what_is_not_the_adapters_stays(
    adapter: pk.Adapter, hub: type[LocalHub], caplog: pytest.LogCaptureFixture
) -> None:
    there, mine = hub.root / "lab" / "breast", with_licences(adapter, "MIT", "none needed")
    mine.push_to_hub("hf-hub:lab/breast", licence="mit")
    (there / "figure.png").write_text("mine")
    (there / "adapter_model_2.safetensors").write_text("of an earlier ensemble")
    mine.push_to_hub("lab/breast", licence="mit")
    assert (there / "figure.png").exists() and not (there / "adapter_model_2.safetensors").exists()
    assert MARK in (there / "README.md").read_text()
    (there / "README.md").write_text("# My own words")
    with caplog.at_level("INFO", logger="pekasc"):
        mine.push_to_hub("lab/breast", licence="mit")
    assert (there / "README.md").read_text() == "# My own words"
    assert "The model card of lab/breast was not written by pekasc and is kept." in caplog.text


@pytest.mark.parametrize("other", ["model.safetensors", "v1/pekasc.json", "config.json", "heads.safetensors"])
def test_a_repository_of_something_else_is_left_alone(adapter: pk.Adapter, hub: type[LocalHub], other: str) -> None:
    file = hub.root / "lab" / "other" / other
    file.parent.mkdir(parents=True)
    file.write_text("theirs")
    with pytest.raises(
        ValueError, match="'lab/other' holds files that do not belong to a pekasc adapter .*: use another repository"
    ):
        with_licences(adapter, "MIT", "none needed").push_to_hub("lab/other", licence="mit")
    assert file.read_text() == "theirs" and "upload" not in [name for name, _ in hub.calls]


def test_only_files_of_the_record_are_fetched(adapter: pk.Adapter, hub: type[LocalHub]) -> None:
    with_licences(adapter, "MIT", "none needed").push_to_hub("lab/breast", licence="mit")
    (hub.root / "lab" / "breast" / "big.safetensors").write_text("big")
    (hub.root / "lab" / "breast" / "adapter_model_3.safetensors").write_text("big")
    pk.Adapter.load("hf-hub:lab/breast")
    fetched = {file.name for file in (hub.root / "cache" / "lab" / "breast").iterdir()}
    assert fetched == {"pekasc.json", "heads.safetensors", "adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("encoder", "teacher", "gated", "named"),
    [
        ("CC-BY-NC-ND-4.0", "none needed", False, "encoder 'tiny': CC-BY-NC-ND-4.0"),
        (None, "none needed", False, "encoder 'tiny': not stated"),
        ("Apache-2.0, for research only", "none needed", False, "encoder 'tiny': Apache-2.0, for research only"),
        ("Apache-2.0", None, False, "teacher 'scfoundation': not stated"),
        ("Apache-2.0", "MODEL_LICENSE (non-commercial research)", False, "teacher 'scfoundation': MODEL_LICENSE"),
        ("Apache-2.0", "none needed", True, "encoder 'tiny': gated, terms beside Apache-2.0"),
    ],
)
def test_licences_are_checked_before_anything_is_sent(
    adapter: pk.Adapter, hub: type[LocalHub], encoder: str | None, teacher: str | None, gated: bool, named: str
) -> None:
    limited = with_licences(adapter, encoder, teacher, gated=gated)
    with pytest.raises(ValueError, match="contains none of their weights.* pass `terms_checked=True` if") as raised:
        limited.push_to_hub("lab/breast", licence="cc-by-nc-4.0")
    assert named in str(raised.value) and not hub.calls
    limited.push_to_hub("lab/breast", licence="cc-by-nc-4.0", terms_checked=True)
    assert [name for name, _ in hub.calls] == ["create", "upload"]


def test_a_licence_that_allows_what_theirs_does_not(adapter: pk.Adapter, hub: type[LocalHub]) -> None:
    for terms in ("CC-BY-NC-ND-4.0", "Non commercial only", "academic use only", "for research use only", "cc by nc"):
        limited = with_licences(adapter, terms, "none needed")
        for licence in ("apache-2.0", "Apache 2.0", "MIT License", "gpl-3.0"):
            with pytest.raises(ValueError, match=f"`licence='{licence}'` allows commercial use, or does not say, but"):
                limited.push_to_hub("lab/breast", licence=licence, terms_checked=True)
        check_licences(limited, "CC BY-NC 4.0", terms_checked=True)
    with pytest.raises(ValueError, match="`licence=` must name the licence that you give the adapter, .* got ''"):
        limited.push_to_hub("lab/breast", licence="", terms_checked=True)
    assert not hub.calls


def test_names_that_are_none(adapter: pk.Adapter, hub: type[LocalHub]) -> None:
    for wrong in ("breast", "a/b/c", "../x/y", "lab/", "", 3):
        with pytest.raises(ValueError, match="is no repository of the model hub: give `owner/name`"):
            adapter.push_to_hub(wrong, licence="mit")  # type: ignore[arg-type]
    for wrong in ("hf-hub:breast", "hf-hub:"):
        with pytest.raises(ValueError, match="is no repository of the model hub"):
            pk.Adapter.load(wrong)
    for wrong in ("hf-hub:lab/breast@", "hf-hub:lab/breast@../../x"):
        with pytest.raises(ValueError, match="names no revision after `@`"):
            pk.Adapter.load(wrong)
    with pytest.raises(
        ValueError, match="is the name of a repository, and a folder is needed here: `adapter.push_to_hub`"
    ):
        adapter.save("hf-hub:lab/breast")
    assert not hub.calls


def test_a_hub_that_is_not_there(adapter: pk.Adapter, hub: type[LocalHub], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        OSError,
        match="'lab/none' could not be fetched from the model hub .FileNotFoundError: 404.* loads without a netw",
    ):
        pk.Adapter.load("hf-hub:lab/none")

    def unreachable(self: Any, repo_id: str, **_: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(LocalHub, "create_repo", unreachable)
    with pytest.raises(
        OSError,
        match="could not be sent to 'lab/breast' .* .ConnectionError: no route to host.*. Check the network and that "
        "https://huggingface.co/lab/breast exists; if it is private or yours, log in with `hf auth login`.$",
    ):
        with_licences(adapter, "MIT", "none needed").push_to_hub("lab/breast", licence="mit")


def test_a_repository_without_an_adapter(hub: type[LocalHub]) -> None:
    (hub.root / "lab" / "other").mkdir(parents=True)
    (hub.root / "lab" / "other" / "config.json").write_text("{}")
    with pytest.raises(
        OSError, match="'lab/other' could not be fetched from the model hub .FileNotFoundError: 404: .*pekasc.json"
    ):
        pk.Adapter.load("hf-hub:lab/other")
    (hub.root / "lab" / "other" / "pekasc.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no adapter of pekasc"):
        pk.Adapter.load("hf-hub:lab/other")


def test_names_in_a_card_are_no_markup(adapter: pk.Adapter) -> None:
    groups = ["<script>alert(1)</script>", "[x](javascript:alert(1))", "a|b\n# c", *(f"P{i}" for i in range(30))]
    text = model_card(replace(adapter, info={**adapter.info, "groups": groups}), "lab/breast", "My own licence")
    assert "<script>" not in text and "[x](" not in text and "\n# c" not in text
    assert "and 13 more" in text
    assert yaml.safe_load(text.split("---\n")[1])["license_name"] == "My own licence"
