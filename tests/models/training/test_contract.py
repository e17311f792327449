"""What every parameter-efficient method promises: it begins as the frozen encoder, and leaves that as it was."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    RandLoraConfig,
    VeraConfig,
    get_peft_model_state_dict,
)

import pekasc as pk
from pekasc.models.encoders import EncoderNetwork
from pekasc.models.runtime import weights_digest
from pekasc.models.training._methods import (
    METHODS,
    Method,
    attach,
    attached,
    check_method,
    known_methods,
    make_config,
    method_name,
    target_layers,
    with_steps,
)

N_BLOCKS, TILE_PX, WIDTH, RANK, STEPS = 2, 32, 384, 8, 4
ROW = pk.models.Encoder("vit_tiny_patch16_224", weights="random", model_kwargs={"depth": N_BLOCKS})
TILES = np.random.default_rng(0).integers(0, 256, (4, TILE_PX, TILE_PX, 3)).astype(np.uint8)
# adding an update to the weights rounds, by more or less than 1e-5 of features of order 1, by the processor
MERGED = 3e-5
CASES: dict[str, Method] = {
    **{name: name for name in METHODS},
    "LoRA": LoraConfig(r=4),
    "LoRA with dropout": LoraConfig(r=4, use_rslora=True, lora_dropout=0.5),
    "LoRA of other layers": LoraConfig(r=4, target_modules=["attn.proj", "mlp.fc1"]),
    "LoRA with biases": LoraConfig(r=4, bias="all"),
    "LoRA with its layers' biases": LoraConfig(r=4, bias="lora_only", target_modules=["attn.proj", "mlp.fc1"]),
    "DoRA": LoraConfig(r=4, use_dora=True),
    "MiSS": MissConfig(r=8),
    "IA3": IA3Config(feedforward_modules=[]),
    "VeRA": VeraConfig(r=8),
    "LoHa": LoHaConfig(r=4),
    "LoKr": LoKrConfig(r=4),
    "OFT": OFTConfig(oft_block_size=32),
    "RandLora": RandLoraConfig(r=8),
}
TRAINS_BIASES = {
    "LoRA with biases",
    "LoRA with its layers' biases",
}  # of the encoder, for as long as the adapter is in it


@dataclass
class Taught:
    """What a few steps of training made of an adapter."""

    start: np.ndarray  # features before the first step
    end: np.ndarray  # after the last
    config: PeftConfig
    state: dict[str, torch.Tensor]
    changed: set[str]  # names of the encoder's own parameters that are not what they were
    still: set[str]  # of the trained parameters that are what they were
    disabled: np.ndarray | None
    merged: np.ndarray
    unloaded: np.ndarray
    digest: str  # of the encoder that was left behind


def features(encoder: EncoderNetwork) -> np.ndarray:
    encoder.eval()
    with torch.inference_mode():
        return encoder(encoder.normalise(torch.from_numpy(TILES)), [N_BLOCKS])[0].numpy()


@contextmanager
def in_place_of(encoder: EncoderNetwork, model: Any) -> Iterator[None]:
    own, encoder.model = encoder.model, model
    try:
        yield
    finally:
        encoder.model = own


@pytest.fixture(scope="module")
def encoder() -> EncoderNetwork:
    return EncoderNetwork(ROW, TILE_PX)


@pytest.fixture(scope="module")
def frozen(encoder: EncoderNetwork) -> np.ndarray:
    return features(EncoderNetwork(ROW, TILE_PX))


@pytest.fixture(scope="module")
def untouched() -> str:
    return weights_digest(EncoderNetwork(ROW, TILE_PX).model)  # positions are those of the tile size


@pytest.fixture(scope="module", params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def config_for(encoder: EncoderNetwork, method: Any) -> PeftConfig:
    layers = target_layers(encoder, (N_BLOCKS,), "all", check_method(method))
    return with_steps(make_config(method, RANK, layers), STEPS)


@pytest.fixture(scope="module")
def taught(name: str, encoder: EncoderNetwork) -> Taught:
    method = CASES[name]
    own = dict(encoder.model.named_parameters())
    before = {key: parameter.detach().clone() for key, parameter in own.items()}
    with attached(encoder, config_for(encoder, method), random_state=0) as model:
        start = features(encoder)
        trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
        first = {key: p.detach().clone() for key, p in trained.items()}
        encoder.train()
        torch.manual_seed(0)  # dropout
        x = encoder.normalise(torch.from_numpy(TILES))
        goal = torch.randn(len(TILES), WIDTH)
        optimiser = torch.optim.Adam(trained.values(), lr=1e-2)
        for _ in range(STEPS):
            optimiser.zero_grad()
            (encoder(x, [N_BLOCKS])[0] - goal).square().mean().backward()
            optimiser.step()
        end = features(encoder)
        state = {key: t.detach().clone() for key, t in get_peft_model_state_dict(model).items()}
        disabled = None
        if name not in TRAINS_BIASES:  # PEFT says itself that those are not put back
            with model.disable_adapter():
                disabled = features(encoder)
        with in_place_of(encoder, copy.deepcopy(model).merge_and_unload()):
            merged = features(encoder)
        config = copy.deepcopy(model.active_peft_config)
        changed = {key for key, parameter in own.items() if not torch.equal(parameter, before[key])}
        still = {key for key, p in trained.items() if torch.equal(p, first[key])}
    return Taught(
        start, end, config, state, changed, still, disabled, merged, features(encoder), weights_digest(encoder.model)
    )


@pytest.fixture(scope="module")
def adapter(taught: Taught, encoder: EncoderNetwork, put_together: Callable[..., pk.Adapter]) -> pk.Adapter:
    return put_together(encoder, width=WIDTH, config=taught.config, state=taught.state)


def test_it_begins_as_the_frozen_encoder(taught: Taught, frozen: np.ndarray) -> None:
    np.testing.assert_allclose(taught.start, frozen, rtol=0, atol=1e-5)


def test_training_changes_the_features_and_the_adapter_alone(name: str, taught: Taught, frozen: np.ndarray) -> None:
    assert np.isfinite(taught.end).all() and np.abs(taught.end - frozen).max() > 1e-2
    assert not taught.still
    assert all(key.endswith(".bias") for key in taught.changed)
    assert bool(taught.changed) == (name in TRAINS_BIASES)


def test_disabled_it_is_the_frozen_encoder_to_the_bit(taught: Taught, frozen: np.ndarray) -> None:
    if taught.disabled is not None:
        np.testing.assert_array_equal(taught.disabled, frozen)


def test_taken_out_it_leaves_the_frozen_encoder_to_the_bit(
    taught: Taught, encoder: EncoderNetwork, frozen: np.ndarray, untouched: str
) -> None:
    np.testing.assert_array_equal(taught.unloaded, frozen)
    assert taught.digest == untouched
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any("base_layer" in key for key, _ in encoder.model.named_modules())


def test_merged_it_gives_the_same_features(taught: Taught) -> None:
    np.testing.assert_allclose(taught.merged, taught.end, rtol=0, atol=MERGED)


def test_an_adapter_on_disk_gives_the_same_features(taught: Taught, adapter: pk.Adapter, tmp_path: Path) -> None:
    adapter.save(tmp_path / "mine")
    loaded = pk.Adapter.load(tmp_path / "mine")
    for made in (adapter, loaded):
        np.testing.assert_allclose(made.embed(TILES, mpp=1.0, compute={"device": "cpu"}), taught.end, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(loaded.predict(TILES, mpp=1.0), adapter.predict(TILES, mpp=1.0))
    assert loaded.weights["adapter"].keys() == taught.state.keys()
    assert all(torch.equal(loaded.weights["adapter"][key], tensor) for key, tensor in taught.state.items())


def test_an_adapter_merges_into_a_plain_model(taught: Taught, adapter: pk.Adapter, encoder: EncoderNetwork) -> None:
    plain = adapter.merge()
    assert not any("base_layer" in key for key, _ in plain.named_modules())
    with in_place_of(encoder, plain):
        np.testing.assert_allclose(features(encoder), taught.end, rtol=0, atol=MERGED)


def test_plain_peft_reads_the_folder(taught: Taught, adapter: pk.Adapter, tmp_path: Path) -> None:
    adapter.save(tmp_path / "mine")
    encoder = EncoderNetwork(ROW, TILE_PX)
    PeftModel.from_pretrained(encoder.model, str(tmp_path / "mine"))
    np.testing.assert_allclose(features(encoder), taught.end, rtol=0, atol=1e-5)


def test_the_seed_decides_whatever_was_drawn_before(name: str, encoder: EncoderNetwork) -> None:
    config = config_for(encoder, CASES[name])
    states = []
    for drawn in (1, 2):
        torch.manual_seed(drawn)
        expected = torch.rand(2)
        torch.manual_seed(drawn)
        with attached(encoder, config, random_state=3) as model:
            assert torch.equal(torch.rand(2), expected)  # and the caller's generator is where it was
            states.append({key: t.clone() for key, t in get_peft_model_state_dict(model).items()})
    assert states[0].keys() == states[1].keys() and states[0]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_it_goes_where_it_is_told(name: str, encoder: EncoderNetwork) -> None:
    method = CASES[name]
    own = getattr(method, "target_modules", None) or ["attn.qkv"]
    layers = target_layers(encoder, (N_BLOCKS,), 1, method)
    assert layers == [f"blocks.{N_BLOCKS - 1}.{layer}" for layer in sorted(own)]
    with attached(encoder, with_steps(make_config(method, RANK, layers), STEPS), 0) as model:
        holders = {key for key, module in model.base_model.model.named_modules() if hasattr(module, "base_layer")}
        assert holders == set(layers)


def test_a_rank_is_the_one_asked_for(encoder: EncoderNetwork) -> None:
    for method in METHODS:
        for rank in (4, 6):  # both divide 192 and 576, and are even
            config: Any = make_config(method, rank, target_layers(encoder, (1,), "all"))
            assert getattr(config, "target_r", rank) == rank
            assert method == "adalora" or config.r == rank
    assert make_config(LoraConfig(r=4), 64, ["blocks.0.attn.qkv"]).r == 4  # type: ignore[attr-defined]


def test_names_for_tables() -> None:
    assert known_methods() == list(METHODS)
    assert [method_name(method) for method in METHODS] == list(METHODS)
    assert [method_name(m) for m in (None, MissConfig(r=4), LoraConfig())] == ["frozen", "miss", "lora"]


def test_a_method_that_is_registered_is_known(encoder: EncoderNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "_rows", dict(METHODS))
    METHODS.register("mine", lambda rank, targets: LoraConfig(r=rank, target_modules=targets))
    assert check_method("mine") == "mine" and known_methods()[-1] == "mine"
    with attached(encoder, config_for(encoder, "mine"), 0) as model:
        assert model.active_peft_config.r == RANK


def test_a_name_that_is_taken() -> None:
    with pytest.raises(ValueError, match=r"The method 'bone' is there already \(_bone\): take another name"):
        METHODS.register("bone", METHODS["lora"])
    assert METHODS["bone"] is not METHODS["lora"]


@pytest.mark.parametrize(
    ("given", "close"), [("bonee", " Close names: bone."), ("LORA", " Close names: lora"), ("", "")]
)
def test_a_name_that_is_not_there(given: str, close: str) -> None:
    known = re.escape(f"Choose one of {known_methods()}, a peft.PeftConfig, or None for the frozen encoder.")
    with pytest.raises(ValueError, match=rf"`method='{given}'` is not known\.{close}.*{known}"):
        check_method(given)


def test_what_is_no_method() -> None:
    for given in (3, ["bone"], LoraConfig):
        with pytest.raises(TypeError, match=f"must be a name, a peft.PeftConfig or None, got {type(given).__name__}"):
            check_method(given)
    for key, value in (("modules_to_save", ["head"]), ("trainable_token_indices", [1])):
        with pytest.raises(ValueError, match=rf"`{key}=.*would train parts of the encoder itself"):
            check_method(LoraConfig(**{key: value}))


def test_a_rank_that_does_not_divide_the_layer(encoder: EncoderNetwork, untouched: str) -> None:
    with pytest.raises(ValueError, match=r'`method="bat"` needs a rank that divides both sides .*192 and 576.* got 10'):
        attach(encoder, make_config("bat", 10, ["blocks.0.attn.qkv"]), 0)
    assert weights_digest(encoder.model) == untouched


def test_too_few_steps_for_a_plan_of_ranks(encoder: EncoderNetwork) -> None:
    config = make_config("adalora", RANK, ["blocks.0.attn.qkv"])
    with pytest.raises(ValueError, match="AdaLoRA plans its ranks over the steps of the training, and 1 are too few"):
        with_steps(config, 1)
    assert (with_steps(config, 30).total_step, with_steps(config, 30).tinit) == (30, 3)  # type: ignore[attr-defined]
