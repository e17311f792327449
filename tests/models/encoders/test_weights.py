"""Weights of encoders: packaged, from a local file, from the hub; what cannot be fetched or read says what to do."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save_file

import pekasc as pk
from pekasc.models.encoders import EncoderNetwork, _weights, resolve_encoder

SMALL = pk.models.Encoder("vit_tiny_patch16_224", weights="random", model_kwargs={"depth": 3})
# a small model in the place of a large one: what is tested is the way to its weights
ON_HUB = pk.models.Encoder("vit_tiny_patch16_224", model_kwargs={"depth": 2}, hub="owner/model", key="small")


def test_tiny_is_small() -> None:
    path = Path(str(files("pekasc.models.encoders").joinpath("weights", "tiny.safetensors")))
    assert path.stat().st_size <= 12e6


def test_local_weights(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=0)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pth")
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    digests = {EncoderNetwork(replace(SMALL, weights=tmp_path / n), 32).digest for n in ("a.pth", "a.safetensors")}
    assert len(digests) == 1
    with pytest.raises(ValueError, match=r"weights in a\.pth do not fit 'vit_tiny_patch16_224' with model_kwargs="):
        EncoderNetwork(replace(SMALL, weights=tmp_path / "a.pth", model_kwargs={"depth": 2}), 32)
    with pytest.raises(FileNotFoundError, match=r"Encoder weights not found: .*b\.pth"):
        EncoderNetwork(replace(SMALL, weights=tmp_path / "b.pth"), 32)


def test_weights_that_are_none(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.safetensors", b"no tensors", "cannot be read"),
        ("b.pth", b"no pickle", "cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"weights {name} {message}.*A state dict is needed"):
            EncoderNetwork(pk.models.Encoder("vit_tiny_patch16_224", weights=tmp_path / name), 32)
    torch.save([1, 2], tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt holds no state dict .* but a list"):
        EncoderNetwork(pk.models.Encoder("vit_tiny_patch16_224", weights=tmp_path / "c.pt"), 32)


def test_an_architecture_that_timm_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"timm .* knows no model of that name.*Close names: vit_tiny"):
        EncoderNetwork(pk.models.Encoder("vit_tiny_patch16_225", weights="random"), 32)


@pytest.mark.parametrize("error", [OSError, ValueError, RuntimeError])
@pytest.mark.parametrize("name", ["hf-hub:MahmoodLab/UNI2-h", "vit_small_patch14_dinov2.lvd142m"])
def test_an_unreachable_hub_says_what_to_do(name: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(*_: object, pretrained: bool, **__: object) -> None:
        assert pretrained
        raise error("gated or offline")

    def download(*_: object) -> None:
        raise error("gated or offline")

    # timm fetches what it knows itself, and pekasc what the table has a repository for
    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(_weights, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(_weights, "hf_hub_download", download)
    said = f"{error.__name__}: gated or offline"
    match = rf"could not be fetched.*{said}.*hf auth login.*weights=\"PATH\".*`encoder=\"tiny\"`"
    with pytest.raises(OSError, match=match):
        EncoderNetwork(resolve_encoder(name), 224)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Return a dict that stands for the hub: what is put in there can be downloaded."""
    there: dict[str, Path] = {}

    def download(repo: str, name: str) -> str:
        assert repo == "owner/model"
        if name not in there:
            raise EntryNotFoundError(name)
        return str(there[name])

    monkeypatch.setattr(_weights, "hf_hub_download", download)
    monkeypatch.setattr(_weights, "try_to_load_from_cache", lambda repo, name: None)
    return there


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "own.pth"])
def test_weights_from_the_hub_are_those_of_the_file(name: str, hub: dict[str, Path], tmp_path: Path) -> None:
    state = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0).state_dict()
    hub[name] = tmp_path / name
    if name.endswith("safetensors"):
        save_file(state, hub[name])
    else:
        torch.save(state, hub[name])
    row = replace(ON_HUB, hub_file=name) if name == "own.pth" else ON_HUB
    local = replace(ON_HUB, weights=hub[name], hub=None)
    assert EncoderNetwork(row, 32).digest == EncoderNetwork(local, 32).digest


def test_hub_weights_that_do_not_fit_are_an_error(hub: dict[str, Path], tmp_path: Path) -> None:
    state = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0).state_dict()
    del state["norm.bias"]
    hub["model.safetensors"] = tmp_path / "model.safetensors"
    save_file(state, hub["model.safetensors"])
    with pytest.raises(ValueError, match=r"model\.safetensors do not fit 'vit_tiny_patch16_224'(.|\n)*norm\.bias"):
        EncoderNetwork(ON_HUB, 32)


def test_a_hub_without_the_file_says_so(hub: dict[str, Path]) -> None:
    with pytest.raises(OSError, match=r"could not be fetched.*EntryNotFoundError.*https://huggingface\.co/owner/model"):
        EncoderNetwork(ON_HUB, 32)


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline"), OSError("gated"), ValueError("no such name")])
def test_a_gated_or_unreachable_encoder_says_what_to_do(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(repo: str, name: str) -> str:
        calls.append(name)
        raise error

    monkeypatch.setattr(_weights, "hf_hub_download", download)
    monkeypatch.setattr(_weights, "try_to_load_from_cache", lambda repo, name: None)
    with pytest.raises(
        OSError,
        match=r"weights of 'uni2-h' could not be fetched.*The model is gated: accept its terms at "
        r"https://huggingface\.co/MahmoodLab/UNI2-h and log in with `hf auth login`.*"
        r"replace\(pekasc\.models\.get_encoder\('uni2-h'\), weights=\"PATH\"\)",
    ):
        EncoderNetwork(resolve_encoder("uni2-h"), 224)
    assert calls == ["model.safetensors"]  # without a network, waiting a second time would not help


def test_what_was_fetched_once_is_read_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models--owner--model"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    state = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0).state_dict()
    torch.save(state, folder / "snapshots" / "abc" / "pytorch_model.bin")
    monkeypatch.setattr(
        _weights,
        "try_to_load_from_cache",
        lambda repo, name: huggingface_hub.try_to_load_from_cache(repo, name, cache_dir=tmp_path),
    )
    monkeypatch.setattr(_weights, "hf_hub_download", lambda *_: pytest.fail("the hub was asked"))
    assert EncoderNetwork(ON_HUB, 32).n_blocks == 2
