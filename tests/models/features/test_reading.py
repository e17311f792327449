"""What a reading needs of a tile, from one pass: frozen and adapted features are those of passes of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn

import pekasc as pk
from pekasc.models.encoders import Depth, EncoderNetwork
from pekasc.models.features import ReadingEncoder, embed
from pekasc.models.features import _reading as room
from pekasc.models.heads import LinearHead, Member, Reading, Source, linear_block
from pekasc.models.training._methods import attached, known_methods, make_config, target_layers
from pekasc.tiling import ArrayTiles

CPU, TILE_PX, N, GENES = torch.device("cpu"), 32, 5, 3
VIT = pk.models.Encoder("vit_tiny_patch16_224", weights="random", model_kwargs={"depth": 4})
ENCODERS = {
    "vit": VIT,
    # blocks that cannot be run one by one
    "eva": pk.models.Encoder("eva02_tiny_patch14_224", weights="random", model_kwargs={"depth": 4}),
}
CNN = pk.models.Encoder("resnet18", weights="random", adapter_targets=("conv1",))
TILES = np.random.default_rng(0).integers(0, 256, (N, TILE_PX, TILE_PX, 3)).astype(np.uint8)
METHODS: dict[str, Any] = {
    **{name: name for name in known_methods()},
    "biases of the adapted layers": LoraConfig(r=2, bias="lora_only"),
    "biases of all layers": LoraConfig(r=2, bias="all"),
}


def px(name: str) -> int:
    return 28 if name == "eva" else TILE_PX


def tiles_of(model: EncoderNetwork) -> np.ndarray:
    return TILES[:, : model.tile_px, : model.tile_px]


def features(model: EncoderNetwork, depths: Sequence[Depth], orientations: int = 1) -> dict[Depth, np.ndarray]:
    how: dict[str, Any] = {"batch_size": N, "device": CPU, "orientations": orientations}
    return dict(embed(model, ArrayTiles(tiles_of(model)), list(depths), **how))


def reading_of(widths: dict[Source, int], context_um: float | None = None) -> Reading:
    """Return a reading of one member per source, each of which gives the sum of some features."""
    rng, members = np.random.default_rng(1), []
    for i, (source, width) in enumerate(widths.items()):
        matrix = rng.normal(size=(width * (2 if context_um else 1), GENES))
        block = linear_block(matrix, rng.normal(size=len(matrix)), np.eye(GENES), [source], context=bool(context_um))
        members.append(
            Member(f"{source.network}:{i}", 1 / len(widths), LinearHead((block,), np.zeros(GENES), context_um))
        )
    return Reading(tuple(members))


@contextmanager
def trained(model: EncoderNetwork, method: Any, depth: Depth, blocks: Any) -> Iterator[EncoderNetwork]:
    """Attach an adapter whose every trained number is far from where it started."""
    config = make_config(method, 4, target_layers(model, depth, blocks, method))
    with attached(model, config, 0) as peft_model:
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in peft_model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
        model.requires_grad_(False)
        model.eval()
        yield model


CASES = [
    *(("vit", method, (4,), 2, 1) for method in METHODS),
    ("vit", "bone", (4,), 2, 4), ("vit", "lora", (4,), 1, 8),  # averaged over orientations
    ("vit", "bone", (4,), "all", 1), ("vit", "lora", (4,), "all", 2),
    ("vit", "bone", (2,), 1, 1),  # frozen features of blocks after the last adapted one
    ("vit", "bone", (1, 4), 2, 1), ("vit", "bone", None, 1, 1),
    ("eva", "bone", (4,), 2, 1), ("eva", "lora", (2,), 1, 2),
]  # fmt: skip


@pytest.mark.parametrize(("encoder", "method", "depth", "blocks", "orientations"), CASES)
def test_one_pass_gives_what_separate_passes_give(
    encoder: str, method: str, depth: Depth, blocks: Any, orientations: int
) -> None:
    model = EncoderNetwork(ENCODERS[encoder], px(encoder))
    at: list[Depth] = [(1,), (3,), (2, 4), None]
    frozen = features(model, at, orientations)
    with trained(model, METHODS[method], depth, blocks):
        adapted = features(model, [depth], orientations)[depth]
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        asks = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        widths = {Source("adapted", 0, depth): adapted.shape[1]}
        widths |= {Source("frozen", 0, d): x.shape[1] for d, x in frozen.items()}
        reading = reading_of(widths, context_um=100.0)
        run = ReadingEncoder(model, reading, 0, depth, orientations, CPU, "fp32")
        found = run.features(tiles_of(model))
        # nothing of the adapter has changed
        assert asks == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        after = model.state_dict()
        assert state.keys() == after.keys() and all(torch.equal(state[name], after[name]) for name in state)
        np.testing.assert_array_equal(features(model, [depth], orientations)[depth], adapted)
        assert (found == run.features(tiles_of(model))).all()
    width, k = adapted.shape[1], reading.n_scores
    assert found.shape == (N, width + 2 * k) and found.dtype == np.float32
    np.testing.assert_allclose(found[:, :width], adapted, atol=1e-4)
    separate = {Source("adapted", 0, depth): adapted, **{Source("frozen", 0, d): x for d, x in frozen.items()}}
    np.testing.assert_allclose(found[:, width : width + k], reading.scores(separate), atol=5e-3)
    np.testing.assert_allclose(found[:, width + k :], reading.scores(separate, around=True), atol=5e-3)
    # the two networks differ, or there was nothing to tell apart
    deep = adapted.shape == frozen[depth].shape if depth in frozen else False
    assert not deep or np.abs(adapted - frozen[depth]).max() > 1e-2


def blocks_run(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Return a list to which every block that runs from now on is added."""
    ran: list[nn.Module] = []
    run_block = EncoderNetwork._run

    def counted(self: EncoderNetwork, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        ran.append(block)
        return run_block(self, block, x)

    monkeypatch.setattr(EncoderNetwork, "_run", counted)
    return ran


@pytest.mark.parametrize(
    ("method", "blocks", "shared"), [("bone", 2, 2), ("bone", "all", 0), ("biases of all layers", 2, 0)]
)
def test_frozen_blocks_run_once(method: str, blocks: Any, shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = EncoderNetwork(VIT, TILE_PX)
    ran = blocks_run(monkeypatch)
    with trained(model, METHODS[method], (4,), blocks):
        reading = reading_of({Source("adapted", 0, (4,)): 384, Source("frozen", 0, (4,)): 384})
        ReadingEncoder(model, reading, 0, (4,), 1, CPU, "fp32").features(TILES)
        counts = [ran.count(block) for block in model.model.blocks]
    assert counts == [1] * shared + [2] * (4 - shared)


def test_several_adapters_share_the_frozen_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = EncoderNetwork(VIT, TILE_PX)
    other = model.add_copy(share=True)
    assert model.networks == [model, other]
    assert {p.data_ptr() for p in other.parameters()} <= {p.data_ptr() for p in model.parameters()}
    own, frozen = features(model, [(4,)])[4,], features(model, [(4,)])[4,]
    with trained(model, "bone", (4,), 2), trained(other, "lora", (4,), 2):
        alone = [features(network, [(4,)])[4,] for network in (EncoderNetwork(VIT, TILE_PX), other)]
        np.testing.assert_allclose(alone[0], frozen, atol=1e-5)  # the weights that are shared stay as they were
        sources = {Source("adapted", 0, (4,)): 384, Source("frozen", 0, (4,)): 384, Source("adapted", 0, (4,), 1): 384}
        reading = reading_of(sources)
        ran = blocks_run(monkeypatch)
        found = ReadingEncoder(model, reading, 0, (4,), 1, CPU, "fp32").features(TILES)
        blocks = list(zip(*(network.model.blocks for network in (model, other)), strict=True))
        assert [sum(block in pair for block in ran) for pair in blocks] == [1, 1, 3, 3]
        mean = features(model, [(4,)])[4,]
        model.copies = nn.ModuleList()
        own = features(model, [(4,)])[4,]
    np.testing.assert_allclose(found[:, :384], (own + alone[1]) / 2, atol=1e-4)
    np.testing.assert_allclose(mean, (own + alone[1]) / 2, atol=1e-4)
    by_hand = reading.scores(dict(zip(sources, (own, frozen, alone[1]), strict=True)))
    np.testing.assert_allclose(found[:, 384:], by_hand, atol=5e-3)
    assert min(np.abs(a - b).max() for a, b in ((own, frozen), (own, alone[1]), (alone[1], frozen))) > 1e-2


def test_a_cnn_has_no_blocks_and_an_encoder_without_an_adapter_is_read_at_once() -> None:
    for row, depths in ((CNN, [(1,), (3,)]), (VIT, [(2,), None])):
        model = EncoderNetwork(row, TILE_PX)
        frozen = features(model, depths, 2)
        reading = reading_of({Source("frozen", 0, d): x.shape[1] for d, x in frozen.items()})
        found = ReadingEncoder(model, reading, 0, depths[0], 2, CPU, "fp32").features(TILES)
        width = frozen[depths[0]].shape[1]
        np.testing.assert_allclose(found[:, :width], frozen[depths[0]], atol=1e-5)
        by_hand = reading.scores({Source("frozen", 0, d): x for d, x in frozen.items()})
        np.testing.assert_allclose(found[:, width:], by_hand, atol=1e-3)


def test_an_adapter_of_an_earlier_version_reads_wider_fields_with_the_adapter() -> None:
    model = EncoderNetwork(VIT, TILE_PX)
    with trained(model, "bone", (4,), 2):
        adapted = features(model, [(4,)])[4,]
        reading = reading_of({Source("adapted", field, (4,)): 384 for field in (0, 1)})
        near, wide = (ReadingEncoder(model, reading, i, (4,), 1, CPU, "fp32").features(TILES) for i in (0, 1))
    np.testing.assert_allclose(near[:, :384], adapted, atol=1e-4)
    assert wide.shape == (N, 2 * GENES)  # features of a wider field are nobody's embedding
    np.testing.assert_allclose(wide, reading.scores({Source("adapted", 1, (4,)): adapted}), atol=2e-3)
    np.testing.assert_allclose(near[:, 384:], reading.scores({Source("adapted", 0, (4,)): adapted}), atol=2e-3)


def test_a_field_that_no_member_reads_gives_zeros() -> None:
    model = EncoderNetwork(VIT, TILE_PX)
    reading = reading_of({Source("frozen", 0, (2,)): 384}, context_um=50.0)
    found = ReadingEncoder(model, reading, 1, (2,), 1, CPU, "fp32").features(TILES)
    assert found.shape == (N, 2 * GENES) and (found == 0).all()


def test_batches_are_what_single_calls_are() -> None:
    model = EncoderNetwork(VIT, TILE_PX)
    reading = reading_of({Source("frozen", 0, d): 384 for d in ((2,), (3,))})
    run = ReadingEncoder(model, reading, 0, (3,), 1, CPU, "fp32")
    whole = run.features(TILES)
    stream = [(np.arange(2), TILES[:2]), (np.arange(2, N), TILES[2:])]
    parts = list(run.over(stream))
    assert [list(at) for at, _ in parts] == [[0, 1], [2, 3, 4]] and all(len(x) == 1 for _, x in parts)
    np.testing.assert_allclose(np.concatenate([x[0] for _, x in parts]), whole, atol=1e-4)


def test_an_error_within_leaves_the_adapter_on() -> None:
    model = EncoderNetwork(VIT, TILE_PX)
    with trained(model, "lora", (4,), 2):
        before = features(model, [(4,)])[4,]
        with pytest.raises(KeyError), room.without_adapter(model):
            assert np.abs(features(model, [(4,)])[4,] - before).max() > 1e-3
            raise KeyError("stop")
        np.testing.assert_array_equal(features(model, [(4,)])[4,], before)
