"""PEKA's lesson: losses in closed form, the cluster head, orientations, the Block-Affine layer, published numbers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, MissConfig, get_peft_model
from scipy.special import log_softmax
from torch import nn

from pekasc._options import Recipe
from pekasc.models.encoders._network import EncoderNetwork
from pekasc.models.encoders._orientations import orient, turned
from pekasc.models.encoders._registry import Encoder
from pekasc.models.training._losses import losses
from pekasc.models.training._methods import attached, make_config, target_layers
from pekasc.models.training._network import cluster_head, projector
from pekasc.models.training._plan import Student
from pekasc.models.training._targets import n_clusters_for, prepare_targets, structure_labels, train_cluster_head


def test_losses_are_the_formulas_of_the_paper() -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 5).double()
    teacher, student = torch.randn(8, 6).double(), torch.randn(8, 6).double()
    labels, temperature = torch.randint(5, (8,)), 2.0
    kd, sa = losses(head, teacher, student, labels, temperature)
    with torch.no_grad():
        t, s = head(teacher).numpy(), head(student).numpy()
    log_p, log_q = log_softmax(t / temperature, axis=1), log_softmax(s / temperature, axis=1)
    expected = temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()
    np.testing.assert_allclose(kd.item(), expected, rtol=1e-12)
    np.testing.assert_allclose(sa.item(), -log_softmax(s, axis=1)[np.arange(8), labels].mean(), rtol=1e-12)


def test_a_student_that_is_the_teacher_has_nothing_to_distil() -> None:
    head, teacher = nn.Linear(6, 5), torch.randn(8, 6)
    kd, _ = losses(head, teacher, teacher.clone(), torch.zeros(8, dtype=torch.long), 2.0)
    assert abs(kd.item()) < 1e-6


def test_gradients_reach_the_student_alone() -> None:
    head = nn.Linear(6, 5).requires_grad_(False)
    teacher, student = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    kd, sa = losses(head, teacher, student, torch.zeros(4, dtype=torch.long), 2.0)
    (kd + sa).backward()
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert teacher.grad is None


def blobs(n: int = 200, k: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    truth = np.arange(n) % k
    return (rng.normal(size=(k, 10))[truth] * 4 + rng.normal(size=(n, 10)) * 0.2).astype(np.float32), truth


def test_labels_find_the_clusters_and_the_head_learns_them() -> None:
    x, truth = blobs()
    labels = structure_labels(x, 4, random_state=0)
    assert len({*zip(labels, truth, strict=True)}) == 4  # a renumbering of the truth
    head = cluster_head(10, 4)
    before = (head(torch.from_numpy(x)).argmax(1).numpy() == labels).mean()
    recipe = Recipe(head_epochs=15)
    train_cluster_head(head, torch.from_numpy(x), torch.from_numpy(labels), recipe, torch.Generator().manual_seed(0))
    after = (head(torch.from_numpy(x)).argmax(1).numpy() == labels).mean()
    assert before < 0.9 < after
    assert not any(p.requires_grad for p in head.parameters())


def test_shapes_of_the_heads() -> None:
    widths = [tuple(layer.weight.shape) for layer in cluster_head(30, 7) if isinstance(layer, nn.Linear)]
    assert widths == [(512, 30), (512, 512), (7, 512)]
    widths = [tuple(layer.weight.shape) for layer in projector(384, 30) if isinstance(layer, nn.Linear)]
    assert widths == [(512, 384), (30, 512)]


def test_a_lesson_leaves_the_callers_random_numbers_alone_and_repeats() -> None:
    x, _ = blobs(80)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = prepare_targets(x, Recipe(head_epochs=2), 0)
    assert torch.equal(torch.rand(3), expected)
    second = prepare_targets(x, Recipe(head_epochs=2), 0)
    assert torch.equal(first.labels, second.labels)
    for a, b in zip(first.head.parameters(), second.head.parameters(), strict=True):
        assert torch.equal(a, b)
    # by default in units of its own standard deviation, which leaves no trace of its scale
    assert first.embedding.std().item() == pytest.approx(1, abs=0.01)
    raw = prepare_targets(x, Recipe(head_epochs=0, standardise_teacher=False), 0)
    assert torch.equal(raw.embedding, torch.from_numpy(x))


def test_orient_gives_the_eight_orientations() -> None:
    base = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    sides = orient(np.stack([base] * 16), np.arange(16) % 8)
    got = {t.tobytes() for t in sides}
    expected = {np.rot90(side, k).tobytes() for side in (base, base[:, ::-1]) for k in range(4)}
    assert got == expected and len(expected) == 8
    np.testing.assert_array_equal(sides[:8], sides[8:])
    np.testing.assert_array_equal(sides[0], base)  # 0 is as it is
    # the same as on a device, before the frozen blocks
    tiles = torch.from_numpy(base)[None]
    for number in range(8):
        np.testing.assert_array_equal(turned(tiles, number, (1, 2))[0].numpy(), sides[number])


@pytest.mark.parametrize("r", [4, 5])  # 12 inputs: three shards, or two and a padded one
def test_block_affine_is_the_formula_of_the_method(r: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 18))
    weight, bias = net[0].weight.detach().clone(), net[0].bias.detach().clone()
    config = make_config("bone", r, ["0"])
    assert isinstance(config, MissConfig)
    model = get_peft_model(net, config)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    (block,) = trainable.values()
    assert tuple(block.shape) == (r, 18)
    assert block.abs().sum() == 0  # starts as the plain layer
    with torch.no_grad():
        block.normal_()
    x = torch.randn(7, 12)
    padded = nn.functional.pad(x, (0, -12 % r))
    expected = x @ weight.T + bias + sum(padded.split(r, dim=1)) @ block.detach()
    np.testing.assert_allclose(model(x).detach().numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload()
    np.testing.assert_allclose(merged(x).detach().numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)


def test_published_numbers() -> None:
    assert (
        Recipe.preset("paper").rank,
        Recipe.preset("paper").n_clusters,
        Recipe.preset("paper").temperature,
        Recipe.preset("paper").kd_weight,
    ) == (256, 100, 2.0, 0.5)
    assert (
        Recipe.preset("paper").learning_rate,
        Recipe.preset("paper").weight_decay,
        Recipe.preset("paper").batch_size,
        Recipe.preset("paper").gradient_clip,
    ) == (1e-4, 0.0, 32, 1.0)
    assert (
        Recipe.preset("paper").step_epochs,
        Recipe.preset("paper").epochs,
        Recipe.preset("paper").choose_epochs,
        Recipe.preset("paper").n_views,
    ) == (10, 50, False, 1)
    assert (Recipe.preset("paper").head_learning_rate, Recipe.preset("paper").head_epochs) == (1e-4, 20)


def test_number_of_clusters_adapts_and_explicit_ones_must_fit() -> None:
    assert [n_clusters_for(n, None) for n in (10, 200, 5000)] == [2, 10, 100]
    assert n_clusters_for(30, 30) == 30
    for k in (1, 31):
        with pytest.raises(ValueError, match=rf"`n_clusters={k}` does not fit 30 training spots.*2 to 30"):
            n_clusters_for(30, k)


def test_the_best_cluster_head_is_kept_not_the_last() -> None:
    x, _ = blobs()
    labels, embedding = torch.from_numpy(structure_labels(x, 4, random_state=0)), torch.from_numpy(x)
    # the tenth that the generator draws first is what heads are compared on
    check = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: len(x) // 10]
    kept = []
    for epochs in range(1, 8):
        torch.manual_seed(0)
        head = cluster_head(10, 4)
        # steps so large that the loss goes up and down
        recipe = Recipe(head_epochs=epochs, head_learning_rate=0.3)
        train_cluster_head(head, embedding, labels, recipe, torch.Generator().manual_seed(0))
        with torch.no_grad():
            kept.append(float(nn.functional.cross_entropy(head(embedding[check]), labels[check])))
    assert all(b <= a for a, b in pairwise(kept))
    assert len(set(kept)) < len(kept)  # some epochs made it worse, and were not kept


def test_the_head_ends_when_it_has_stopped_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = blobs()
    # labels that have nothing to do with the embedding: soon there is nothing more to learn for the held-out ones
    labels, embedding = torch.from_numpy(np.random.default_rng(1).integers(0, 4, len(x))), torch.from_numpy(x)
    steps: list[int] = []
    step = torch.optim.Adam.step

    def counted(self: Any, *args: Any) -> Any:
        steps.append(1)
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", counted)
    heads, counts = [], []
    for patience in (10, None):
        torch.manual_seed(0)
        heads.append(cluster_head(10, 4))
        recipe, generator = Recipe(head_epochs=40, head_patience=patience), torch.Generator().manual_seed(0)
        train_cluster_head(heads[-1], embedding, labels, recipe, generator)
        counts.append(len(steps))
        steps.clear()
    assert counts[0] < counts[1] == 40 * 6
    assert all(torch.equal(a, b) for a, b in zip(*(head.parameters() for head in heads), strict=True))
    assert Recipe().head_patience == 10 and Recipe.preset("paper").head_patience is None


@pytest.fixture(scope="module")
def tiny() -> EncoderNetwork:
    return EncoderNetwork(Encoder("vit_tiny_patch16_224", weights="random", model_kwargs={"depth": 4}), 32)


def test_adapters_go_to_the_blocks_that_features_need(tiny: EncoderNetwork) -> None:
    def numbers(depth: tuple[int, ...] | None, blocks: str | int) -> list[int]:
        names = target_layers(tiny, depth, blocks)
        assert all(name.endswith(".attn.qkv") for name in names)
        return [int(name.split(".")[1]) for name in names]

    assert numbers(None, "all") == [0, 1, 2, 3]
    assert numbers((3,), "all") == [0, 1, 2]
    assert numbers((1, 3), 2) == [1, 2]
    assert all(b - a == 1 for a, b in pairwise(numbers((4,), 3)))
    for blocks in (0, 4, True, "some", 1.5):
        with pytest.raises(ValueError, match=r"`blocks=.*does not fit.*1 to 3"):
            target_layers(tiny, (3,), blocks)


def test_a_configuration_has_its_own_layers_rank_and_dropout(tiny: EncoderNetwork) -> None:
    method = LoraConfig(r=4, target_modules=["attn.proj", "mlp.fc1"], lora_dropout=0.5)
    layers = target_layers(tiny, (2,), 1, method)
    assert layers == ["blocks.1.attn.proj", "blocks.1.mlp.fc1"]
    config = make_config(method, 64, layers)
    assert config.r == 4  # type: ignore[attr-defined]
    with attached(tiny, config, 0):
        tiny.train()
        active = {name for name, module in tiny.named_modules() if module.training}
        assert active and all("lora_dropout" in name for name in active)
        tiny.eval()
        assert not any(module.training for module in tiny.modules())
    with pytest.raises(ValueError, match=r"linear layers \['attn.query'\].*its blocks have: \['attn.proj', 'attn.qkv'"):
        target_layers(tiny, (2,), "all", LoraConfig(target_modules=["attn.query"]))


def test_the_optimiser_is_the_recipes(tiny: EncoderNetwork) -> None:
    x, _ = blobs(80)
    config = make_config("bone", 8, target_layers(tiny, (2,), "all"))
    for recipe, steps in ((Recipe.preset("paper"), 10), (Recipe(), None)):
        lesson = prepare_targets(x, Recipe(head_epochs=0), 0)
        with attached(tiny, config, 0):
            student = Student(tiny, (2,), lesson, recipe, 0)
            made = student.configure_optimizers()
            (group,) = made["optimizer"].param_groups
            assert (group["lr"], group["weight_decay"]) == (recipe.learning_rate, recipe.weight_decay)
            # two blocks' adapters, and two layers of the projector: the cluster head is frozen
            assert len(group["params"]) == 2 + 4
            schedule = made.get("lr_scheduler")
            assert (schedule is None) == (steps is None)
            if schedule is not None:
                assert (schedule.step_size, schedule.gamma) == (steps, 0.1)
