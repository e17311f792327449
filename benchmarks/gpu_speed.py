"""Share of a GPU's bf16 matrix peak that embedding and training reach, beside timm's own plain loop.

    python benchmarks/gpu_speed.py --out benchmarks/RESULTS_GPU.md
    python benchmarks/gpu_speed.py --device cpu --small     # the same code at small size

ViT-L/16 and ViT-g/14 sized models with random weights, 224 px, bf16. The peak is measured: the fastest of square matrix
products of several sizes. Work is counted in matrix products of the blocks (attention included), twice a multiply-add;
training counts the forward pass and the gradient of activations in the trained blocks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from peft import MissConfig, get_peft_model

import pekasc as pk
from _machine import machine
from pekasc._options import Recipe
from pekasc.models.encoders import EncoderNetwork
from pekasc.models.features import BatchEncoder, CachePlan, TileInputs, cache_activations
from pekasc.models.runtime import peak_memory
from pekasc.models.training import Engine, make_config, target_layers, train_student
from pekasc.tiling import ArrayTiles, batches

MODELS = {"ViT-L/16": ("vit_large_patch16_224", {}), "ViT-g/14": ("vit_giant_patch14_dinov2", {"img_size": 224})}
SMALL = {"ViT-Ti/16": ("vit_tiny_patch16_224", {"depth": 4})}
ROUNDS = 3


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Return seconds, with the device's queue empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_peak(device: torch.device, small: bool) -> float:
    """Return the most bf16 operations per second of a square matrix product."""
    best = 0.0
    for n in (256, 512) if small else (4096, 8192, 12288):
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        for _ in range(3):
            a @ b
        repeats = 3 if small else 30
        best = max(best, 2 * n**3 * repeats / timed(lambda a=a, b=b, k=repeats: [a @ b for _ in range(k)], device))
    return best


def block_flops(model: Any, tokens: int) -> float:
    """Return operations of one block's matrix products for one tile, forward."""
    linear = sum(m.weight.numel() for m in model.blocks[0].modules() if isinstance(m, torch.nn.Linear))
    return 2.0 * tokens * linear + 4.0 * tokens**2 * model.embed_dim


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--compile", action="store_true")
    a = parser.parse_args()
    device = torch.device(a.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("No GPU here: nothing is measured. `--device cpu --small` runs the same code at small size.")
    peak = matrix_peak(device, a.small)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    command = f"python benchmarks/gpu_speed.py --batch {a.batch}" + (" --compile" if a.compile else "")
    lines = [
        "# Results on a GPU", "", f"    {command}", "",
        f"{name}; measured bf16 matrix peak {peak / 1e12:.3g} TFLOP/s. {machine()}", "",
        "| model | work | tiles/s | share of the peak | peak memory, GB |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for label, (model, kwargs) in (SMALL if a.small else MODELS).items():
        for work, rate, share, memory in measure(model, kwargs, a, device, peak):
            lines.append(f"| {label} | {work} | {rate:.4g} | {share:.0%} | {memory / 1e9:.2f} |")
            print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if a.out:
        a.out.write_text(text)


def measure(
    name: str, kwargs: dict[str, Any], a: Any, device: torch.device, peak: float
) -> list[tuple[str, float, float, int]]:
    """Return work, tiles per second, share of the peak and peak memory, medians of interleaved rounds."""
    batch = 4 if a.small else a.batch
    n = 2 * batch if a.small else 12 * batch
    tiles = ArrayTiles(np.random.default_rng(0).integers(0, 255, (n, 224, 224, 3), dtype=np.uint8))
    row = pk.models.Encoder(name, weights="random", model_kwargs=kwargs)
    encoder = EncoderNetwork(row, 224)
    encoder.halve(torch.bfloat16)
    run = BatchEncoder(encoder, [(encoder.n_blocks,)], 1, device, "bf16")
    plain = timm.create_model(name, num_classes=0, **kwargs).eval().to(device, torch.bfloat16).requires_grad_(False)
    one = torch.from_numpy(tiles.array[:batch]).permute(0, 3, 1, 2).to(device, torch.bfloat16)
    tokens = int(plain.forward_features(one[:1]).shape[1])
    each, depth = block_flops(plain, tokens), encoder.n_blocks
    last = min(4, depth - 1)
    recipe = Recipe(batch_size=batch, epochs=1, n_views=1, n_clusters=4, cluster_head_epochs=1)
    teacher = np.random.default_rng(0).normal(size=(n, 64)).astype(np.float32)
    engine = Engine(device, "bf16", progress=False, compile=a.compile)
    facts = CachePlan(depth - last, 1, "fp16", batch, device, "bf16", None, False, None, "")

    def embed() -> None:
        for _ in run.over(batches(tiles, batch)):
            pass

    def embed_plain() -> None:
        with torch.inference_mode():
            for _ in range(n // batch):
                plain.forward_features(one)

    def train(inputs: Any, blocks: Any) -> Callable[[], Any]:
        config = make_config("bone", 64, target_layers(encoder, (depth,), blocks))
        return lambda: train_student(
            encoder, (depth,), config, inputs, np.arange(n), teacher, recipe=recipe, epochs=1, engine=engine,
            random_state=0, local=np.ones(n, dtype=bool),
        )  # fmt: skip

    def train_plain() -> None:
        model = timm.create_model(name, num_classes=0, **kwargs).eval().to(device, torch.bfloat16)
        peft = get_peft_model(model, MissConfig(r=64, target_modules=r".*attn\.qkv", init_weights=True))
        optimiser = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=3e-4)
        for _ in range(n // batch):
            with torch.autocast(device.type, torch.bfloat16):
                loss = peft.base_model.model.forward_features(one).float().pow(2).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    cache: list[Any] = []
    works: dict[str, tuple[Callable[[], Any], float]] = {
        "embedding, timm's plain loop": (embed_plain, each * depth),
        "embedding, pekasc": (embed, each * depth),
        "training all blocks, plain loop with peft": (train_plain, 2 * each * depth),
        "training all blocks, pekasc": (train(TileInputs(tiles), "all"), 2 * each * depth),
        f"cached activations of {depth - last} blocks, pekasc": (
            lambda: cache.append(cache_activations(encoder, tiles, np.arange(n), facts)), each * (depth - last),
        ),
        f"training the last {last} blocks, pekasc": (lambda: train(cache[0], last)(), 2 * each * last),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {work: [] for work in works}
    memory = dict.fromkeys(works, 0)
    for number in range(1 + ROUNDS):  # the first is not counted: kernels are chosen in it
        for work, (call, _) in works.items():
            peak_memory(device)
            spent = timed(call, device)
            memory[work] = max(memory[work], peak_memory(device))
            if number:
                seconds[work].append(spent)
    return [
        (work, n / float(np.median(seconds[work])), n * flops / float(np.median(seconds[work])) / peak, memory[work])
        for work, (_, flops) in works.items()
    ]


if __name__ == "__main__":
    main()
