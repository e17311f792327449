"""The rival in speed: the method as a plain loop over tensors in memory, with torch, timm and peft alone.

Block-Affine adapters of rank 64 on `attn.qkv` of every block, a projector, distillation and structure alignment, AdamW,
clipped gradients, turns and flips: the recipe of ``pekasc.tl.fit_adapter``, features of the last block.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm
import torch
from peft import MissConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from pekasc._options import Recipe
from pekasc.models.training import losses, prepare_targets, projector

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PlainLoop:
    """Model, tiles and optimiser of one training.

    Parameters
    ----------
    weights
        Of the ViT-S/14.
    tiles
        (n, 112, 112, 3) uint8.
    teacher
        (n, D).
    seed
        Of everything.
    """

    def __init__(self, weights: Path, tiles: np.ndarray, teacher: np.ndarray, seed: int) -> None:
        torch.manual_seed(seed)
        self.recipe = Recipe()
        self.tiles = as_tensors(tiles)
        targets = prepare_targets(teacher, self.recipe, seed)
        self.teacher, self.labels, self.head = targets.embedding, targets.labels, targets.head
        model = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
        model.load_state_dict(load_file(weights))
        model.set_input_size(img_size=(tiles.shape[1], tiles.shape[2]))
        for block in model.blocks:  # the fused kernel's backward pass is twice as slow on a CPU
            block.attn.fused_attn = False
        config = MissConfig(r=self.recipe.rank, target_modules=r".*attn\.qkv", init_weights=True)
        self.model = get_peft_model(model.eval(), config)
        self.projector = projector(2 * model.embed_dim, teacher.shape[1])
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = [*trained, *self.projector.parameters()]
        self.optimiser = torch.optim.AdamW(
            self.trained, lr=self.recipe.learning_rate, weight_decay=self.recipe.weight_decay
        )

    def _features(self, x: Tensor) -> Tensor:
        tokens = self.model.base_model.model.forward_features(x)
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)

    def epoch(self) -> float:
        """Train on every tile once; return the mean loss."""
        total = 0.0
        for rows in torch.randperm(len(self.tiles)).split(self.recipe.batch_size):
            x = self.tiles[rows]
            turn = int(torch.randint(8, ()))  # of a batch, which costs less than one for each tile
            x = torch.rot90(x, turn % 4, (2, 3))
            x = x.flip(3) if turn >= 4 else x
            student = self.projector(self._features(x))
            kd, sa = losses(self.head, self.teacher[rows], student, self.labels[rows], self.recipe.temperature)
            loss = self.recipe.kd_weight * kd + (1 - self.recipe.kd_weight) * sa
            self.optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, self.recipe.gradient_clip)
            self.optimiser.step()
            total += loss.item() * len(rows)
        return total / len(self.tiles)

    @torch.inference_mode()
    def features(self, tiles: Tensor) -> np.ndarray:
        """Return the features of normalised tiles, (n, 768)."""
        return torch.cat([self._features(x) for x in tiles.split(64)]).numpy()


def as_tensors(tiles: np.ndarray) -> Tensor:
    """Return tiles as normalised floats, (n, 3, y, x)."""
    x = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def teacher_of(log: np.ndarray, n_components: int = 128) -> np.ndarray:
    """Return principal components of log-normalised expression, (n, D), for measuring speed."""
    from sklearn.decomposition import PCA

    return PCA(n_components, random_state=0).fit_transform(log).astype(np.float32)
