"""Score the encoder "tiny" against the frozen ViT-S/14 on real tissue that it has never seen.

    python benchmarks/tiny_score.py --her2st ../shared/data/her2st \
        --vits ../shared/weights/vit_small_patch14_dinov2.safetensors --out benchmarks/RESULTS.md

Spots of the sections C2 and C3 train and C4 tests (same patient), or C2, C3, C4 train and B4 tests (another patient).
Features: class token beside mean patch token after a block, through the model's final norm; standardised and reduced
(PCA, 256 at most) on the training spots; one ridge regression whose alpha is chosen by leaving one training section
out. Genes are chosen on the training sections. The score is the mean over genes of Pearson's correlation.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.neighbors import kneighbors_graph
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

Array = NDArray[np.float32]
SECTIONS = ("B4", "C2", "C3", "C4")
SPLITS = {"C4": ("C2", "C3"), "B4": ("C2", "C3", "C4")}
SOURCE_MPP = 0.688
ALPHAS = np.logspace(0, 6, 25)
N_GENES = 50
WEIGHTS = Path(__file__).parents[1] / "src/pekasc/models/encoders/weights"
# counted from 0
BLOCKS = {"ViT-S": [3, 5, 11], "tiny": [1, 2, 3, 4, 5], "untrained tiny": [5]}


@dataclass
class Section:
    """Tiles (n, y, x, 3) uint8, counts (n, genes) and array coordinates of the spots of one section."""

    tiles: NDArray[np.uint8]
    counts: pd.DataFrame
    array: NDArray[np.float64]


def read_section(folder: Path, tile_px: int, mpp: float) -> Section:
    """Read one section; spots are joined to counts by their array position."""
    with gzip.open(folder / "counts.tsv.gz") as f:
        counts = pd.read_csv(f, sep="\t", index_col=0)
    spots = pd.read_csv(folder / "spots.tsv", sep="\t")
    spots.index = pd.Index([f"{x}x{y}" for x, y in zip(spots["x"].astype(int), spots["y"].astype(int), strict=True)])
    spots = spots.loc[counts.index]
    Image.MAX_IMAGE_PIXELS = None
    image = Image.open(folder / "image.jpg").convert("RGB")
    half = tile_px * mpp / SOURCE_MPP / 2
    how = Image.Resampling.BOX if mpp >= SOURCE_MPP else Image.Resampling.BILINEAR
    tiles = [
        np.asarray(image.resize((tile_px, tile_px), how, box=(x - half, y - half, x + half, y + half)))
        for x, y in spots[["pixel_x", "pixel_y"]].to_numpy()
    ]
    return Section(np.stack(tiles), counts, spots[["x", "y"]].to_numpy(float))


def log_expression(counts: pd.DataFrame, genes: list[str], total: NDArray[np.float64]) -> Array:
    """log1p(1e4 * count / total of the spot)."""
    return np.log1p(1e4 * counts[genes].to_numpy() / total[:, None]).astype(np.float32)


def morans_i(values: Array, array: NDArray[np.float64]) -> NDArray[np.float64]:
    """Moran's I of each column on the graph of six nearest neighbours."""
    w = kneighbors_graph(array, 6)
    z = values - values.mean(0)
    return np.asarray((z * (w @ z)).sum(0) / np.maximum((z * z).sum(0), 1e-12) * len(z) / w.sum())


def choose_genes(sections: dict[str, Section], train: tuple[str, ...], test: str) -> dict[str, list[str]]:
    """Spatially variable and highly variable genes of the training sections."""
    shared = set.intersection(*(set(sections[s].counts.columns) for s in (*train, test)))
    genes = [g for g in sections[train[0]].counts.columns if g in shared]
    for s in train:
        seen = (sections[s].counts[genes] > 0).mean() >= 0.1
        genes = [g for g, keep in zip(genes, seen, strict=True) if keep]
    y = {s: log_expression(sections[s].counts, genes, sections[s].counts.sum(axis=1).to_numpy(float)) for s in train}
    moran = np.mean([morans_i(y[s], sections[s].array) for s in train], axis=0)
    table = ad.AnnData(sparse.csr_matrix(np.concatenate([y[s] for s in train])), var=pd.DataFrame(index=genes))
    table.uns["log1p"] = {}
    sc.pp.highly_variable_genes(table, n_top_genes=N_GENES)
    return {
        "svg": [genes[i] for i in np.argsort(-moran)[:N_GENES]],
        "hvg": list(table.var_names[table.var["highly_variable"]]),
    }


def normalised(tiles: NDArray[np.uint8]) -> Tensor:
    """Pixels as the encoders want them (ImageNet mean and deviation; the same for both)."""
    x = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    return (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)


@torch.inference_mode()
def features(model: nn.Module, tiles: NDArray[np.uint8], blocks: list[int]) -> list[Array]:
    """Class token beside mean patch token after each block, through the final norm."""
    out: list[list[Tensor]] = [[] for _ in blocks]
    for start in range(0, len(tiles), 64):
        tokens = model.forward_intermediates(
            normalised(tiles[start : start + 64]), indices=blocks, return_prefix_tokens=True, norm=True,
            output_fmt="NLC", intermediates_only=True,
        )  # fmt: skip
        for store, (patch, prefix) in zip(out, tokens, strict=True):
            store.append(torch.cat([prefix[:, 0], patch.mean(1)], 1))
    return [torch.cat(o).numpy() for o in out]


def ridge(x: Array, y: Array, x_new: Array, alphas: NDArray[np.float64]) -> list[Array]:
    """Predictions of one ridge regression per alpha, after standardising and PCA fitted on x."""
    scaler = StandardScaler().fit(x)
    z = scaler.transform(x)
    pca = PCA(min(256, len(x) - 1, x.shape[1]), random_state=0).fit(z)
    a, b = pca.transform(z), pca.transform(scaler.transform(x_new))
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    target = u.T @ (y - y.mean(0))
    return [(b @ vt.T) @ ((s / (s**2 + alpha))[:, None] * target) + y.mean(0) for alpha in alphas]


def score(x: dict[str, Array], y: dict[str, Array], train: tuple[str, ...], test: str) -> float:
    """Mean Pearson's correlation over genes on the test section; alpha by leaving one training section out."""
    error = np.zeros(len(ALPHAS))
    for out in train:
        rest = [s for s in train if s != out]
        fits = ridge(np.concatenate([x[s] for s in rest]), np.concatenate([y[s] for s in rest]), x[out], ALPHAS)
        error += [((f - y[out]) ** 2).mean() for f in fits]
    alpha = ALPHAS[[int(np.argmin(error))]]
    p = ridge(np.concatenate([x[s] for s in train]), np.concatenate([y[s] for s in train]), x[test], alpha)[0]
    p, t = p - p.mean(0), y[test] - y[test].mean(0)
    return float(np.mean((p * t).sum(0) / np.maximum(np.sqrt((p**2).sum(0) * (t**2).sum(0)), 1e-12)))


@torch.inference_mode()
def speed(models: dict[str, nn.Module], tiles: NDArray[np.uint8], rounds: int) -> dict[str, float]:
    """Tiles per second in float32, the models taking turns; medians."""
    x = normalised(tiles[:32])
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for i in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(x)
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: len(x) / statistics.median(s) for name, s in seconds.items()}


def load_models(weights: Path, vits: Path, tile_px: int) -> dict[str, nn.Module]:
    """Both encoders, and the small one as it was before training."""
    about = json.loads((weights / "tiny.json").read_text())
    torch.manual_seed(0)
    untrained = timm.create_model(about["architecture"], num_classes=0, init_values=1.0, **about["model_kwargs"])
    tiny = timm.create_model(about["architecture"], num_classes=0, **about["model_kwargs"])
    tiny.load_state_dict(load_file(weights / "tiny.safetensors"))
    large = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=518)
    large.load_state_dict(load_file(vits))
    models = {"tiny": tiny, "ViT-S": large, "untrained tiny": untrained}
    for model in models.values():
        model.eval().set_input_size(img_size=tile_px)
    return models


def score_table(models: dict[str, nn.Module], sections: dict[str, Section]) -> pd.DataFrame:
    """One row per encoder and block, one column per split and gene set."""
    rows: dict[str, dict[str, float]] = {}
    x: dict[str, dict[str, Array]] = {}
    for name, blocks in BLOCKS.items():
        for s, section in sections.items():
            for block, found in zip(blocks, features(models[name], section.tiles, blocks), strict=True):
                x.setdefault(f"{name}, block {block + 1}", {})[s] = found
    for s, section in sections.items():  # what colour alone can say
        flat = section.tiles.reshape(len(section.tiles), -1, 3).astype(np.float32)
        x.setdefault("mean and deviation of colour", {})[s] = np.concatenate([flat.mean(1), flat.std(1)], 1)
    for test, train in SPLITS.items():
        for kind, genes in choose_genes(sections, train, test).items():
            y = {
                s: log_expression(sections[s].counts, genes, sections[s].counts.sum(axis=1).to_numpy(float))
                for s in (*train, test)
            }
            for name, value in x.items():
                rows.setdefault(name, {})[f"{test} 50 {kind.upper()}"] = score(value, y, train, test)
    return pd.DataFrame(rows).T


def report(table: pd.DataFrame, rate: dict[str, float], tile_px: int, mpp: float) -> str:
    """A section of Markdown."""
    head = "| frozen features | " + " | ".join(table.columns) + " |\n|---|" + "---|" * table.shape[1] + "\n"
    rows = zip(table.index, table.to_numpy(), strict=True)
    body = "".join(f"| {name} | " + " | ".join(f"{v:.3f}" for v in row) + " |\n" for name, row in rows)
    return f"""## The encoder `tiny` against the frozen ViT-S/14

Script: `benchmarks/tiny_score.py`. Mean Pearson over genes; her2st, `tile_px={tile_px}, mpp={mpp}`, train C2 + C3 for
C4, train C2 + C3 + C4 for B4 (another patient); class token beside mean patch token, one ridge head, alpha by
leaving one training section out.

{head}{body}
Speed (float32, {tile_px} px, {torch.get_num_threads()} threads of {os.cpu_count()} {platform.machine()} cores, models
taking turns, medians): tiny {rate["tiny"]:.0f} tiles/s, whole ViT-S {rate["ViT-S"]:.0f} tiles/s, ratio
{rate["tiny"] / rate["ViT-S"]:.1f}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--her2st", type=Path, required=True, help="folder with B4, C2, C3, C4")
    parser.add_argument("--vits", type=Path, required=True, help="weights of the ViT-S/14")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder with tiny.*")
    parser.add_argument("--tile-px", type=int, default=112)
    parser.add_argument("--mpp", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the timing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="append the table to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = load_models(args.weights, args.vits, args.tile_px)
    sections = {s: read_section(args.her2st / s, args.tile_px, args.mpp) for s in SECTIONS}
    rate = speed({name: models[name] for name in ("ViT-S", "tiny")}, sections["C2"].tiles, args.rounds)
    text = report(score_table(models, sections), rate, args.tile_px, args.mpp)
    print(text)
    if args.out:
        with args.out.open("a") as f:
            f.write("\n" + text)


if __name__ == "__main__":
    main()
