"""The network of an encoder: features of tiles after any of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pekasc._settings import get_logger
from pekasc.models.encoders._registry import Encoder
from pekasc.models.encoders._weights import _create
from pekasc.models.runtime import weights_digest

logger = get_logger(__name__)


class EncoderNetwork(nn.Module):
    """An encoder with its weights, for one tile size, in evaluation mode and without gradients.

    Parameters
    ----------
    encoder
        Description of the encoder.
    tile_px
        Side of the tiles in pixels.

    Attributes
    ----------
    model
        The timm model.
    n_blocks
        Number of transformer blocks (of stages, for a convolutional model): depths run from 1 to this.
    digest
        SHA-256 of the weights as loaded, before positions are resized for `tile_px`.
    originals
        Parameters of the encoder itself that the attached adapter trains (``bias="all"``), with their own values.
    copies
        Networks for further adapters; see :meth:`add_copy`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder, tile_px: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.tile_px = tile_px
        self.model: Any = _create(encoder)
        if not hasattr(self.model, "forward_intermediates"):
            raise ValueError(
                f"timm's {encoder.name!r} has no intermediate features (`forward_intermediates`), which pekasc "
                "needs: take another architecture, such as a vision transformer."
            )
        self.digest = weights_digest(self.model)
        config = timm.data.resolve_model_data_config(self.model)
        shape = (1, 3, 1, 1)
        self.register_buffer("mean", torch.tensor(encoder.mean or config["mean"]).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(encoder.std or config["std"]).view(shape), persistent=False)
        self.is_vit = hasattr(self.model, "blocks") and hasattr(self.model, "num_prefix_tokens")
        stages: Any = self.model.blocks if self.is_vit else self.model.feature_info
        self.n_blocks = len(stages)
        self.originals: list[tuple[nn.Parameter, Tensor]] = []
        self.copies = nn.ModuleList()
        self.checkpointing = False  # recompute the blocks in the backward pass instead of keeping their activations
        self._set_tile_size(tile_px)
        self.requires_grad_(False)
        self.eval()

    def _set_tile_size(self, tile_px: int) -> None:
        patch = getattr(getattr(self.model, "patch_embed", None), "patch_size", None)
        if patch is not None:
            step = int(patch[0])
            if tile_px % step:
                below = tile_px // step * step
                valid = ", ".join(str(v) for v in (below - step, below, below + step, below + 2 * step) if v > 0)
                raise ValueError(
                    f"Encoder {self.encoder.short!r} has patches of {step} px, so tiles of {tile_px} px do not fit. "
                    f"Valid `tile_px` are multiples of {step}, such as {valid}: run pekasc.pp.tile with one of them."
                )
        if hasattr(self.model, "set_input_size"):
            try:
                self.model.set_input_size(img_size=(tile_px, tile_px))
            except (AssertionError, RuntimeError, ValueError) as error:
                size = self.model.pretrained_cfg.get("input_size", "unknown")
                raise ValueError(
                    f"Encoder {self.encoder.short!r} cannot take tiles of {tile_px} px ({error}); "
                    f"it was built for {size}."
                ) from error

    def train(self, mode: bool = True) -> EncoderNetwork:
        """Stay in evaluation mode, so that dropout and batch statistics of the frozen encoder never change features.

        Only the dropout of an adapter (``lora_dropout`` and similar names in PEFT) follows `mode`.
        """
        super().train(False)
        for name, module in self.named_modules():
            if "_dropout." in name:
                module.train(mode)
        return self

    def check_depth(self, depth: int) -> int:
        """Return `depth` as a block number from 1 to `n_blocks`; negative numbers count from the end."""
        if isinstance(depth, bool) or not isinstance(depth, int):
            raise TypeError(f"`depth` counts blocks and must be an integer, got {depth!r}.")
        resolved = depth + self.n_blocks + 1 if depth < 0 else depth
        if not 1 <= resolved <= self.n_blocks:
            raise ValueError(
                f"`depth={depth}` is outside encoder {self.encoder.short!r}, which has {self.n_blocks} blocks: "
                f"give 1 to {self.n_blocks}, or -1 for the last."
            )
        return resolved

    def normalise(self, tiles: Tensor) -> Tensor:
        """Normalise uint8 tiles (n, y, x, 3) to float (n, 3, y, x) with the encoder's mean and std."""
        x = tiles.permute(0, 3, 1, 2).to(self.mean.dtype).div_(255.0)
        return x.sub_(self.mean).div_(self.std)

    @property
    def networks(self) -> list[EncoderNetwork]:
        """The network itself and its copies: one for every adapter."""
        return [self, *(network for network in self.copies if isinstance(network, EncoderNetwork))]

    def add_copy(self, *, share: bool) -> EncoderNetwork:
        """Add a network for another adapter, and return it. Call it before any adapter is attached.

        With `share`, it has the same weights in the same memory; else, for an adapter that trains some of the encoder's
        own, a copy of them.
        """
        weights = [*self.parameters(), *self.buffers()] if share else []
        copies, self.copies = self.copies, nn.ModuleList()
        copy = deepcopy(self, {id(weight): weight for weight in weights})
        self.copies = copies.append(copy)
        return copy

    @property
    def splits(self) -> bool:
        """Whether blocks can be run one by one: true for timm's plain VisionTransformer."""
        kind: Any = type(self.model)
        return isinstance(self.model, VisionTransformer) and all(
            getattr(kind, name) is getattr(VisionTransformer, name)
            for name in ("forward", "forward_features", "forward_intermediates", "forward_head")
        )

    def check_splits(self) -> None:
        """Raise ValueError if :attr:`splits` is False."""
        if not self.splits:
            raise ValueError(
                f"The blocks of encoder {self.encoder.short!r} ({type(self.model).__name__}) cannot be run one by one: "
                "timm's plain VisionTransformer can. Leave `Compute.gradient_checkpointing` and `Compute.compile` out."
            )

    def tokens(self, x: Tensor, n_blocks: int) -> Tensor:
        """Return the tokens after `n_blocks` blocks for normalised tiles, (n, tokens, width)."""
        self.check_splits()
        model = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        for block in model.blocks[:n_blocks]:
            x = self._run(block, x)
        return x

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def forward(
        self, x: Tensor, depths: Sequence[int], start: int = 0, kept: dict[int, Tensor | None] | None = None
    ) -> list[Tensor]:
        """Return the features after every depth: class token and mean patch token concatenated, (n, 2 * width).

        For a convolutional model, the spatial mean of a stage. The final norm is applied at every depth, as DINOv2's
        ``get_intermediate_layers`` does, so that an encoder truncated there has the same features. Blocks after the
        last depth do not run.

        Parameters
        ----------
        x
            Normalised tiles; with `start`, the tokens after that many blocks.
        depths
            Block numbers, above `start`.
        start
            Number of blocks that ran already.
        kept
            A dict whose keys are numbers of blocks: filled with the tokens after that many blocks.
        """
        if not self.is_vit or not self.splits:
            return self._by_timm(x, depths)
        layers = {}
        x = x if start else self.tokens(x, 0)
        for number in range(start, max(depths)):
            if kept is not None and number in kept:
                kept[number] = x
            x = self._run(self.model.blocks[number], x)
            if number + 1 in depths:
                layers[number + 1] = self._pooled(self.model.norm(x))
        return [layers[depth] for depth in depths]

    def _pooled(self, tokens: Tensor) -> Tensor:
        n = self.model.num_prefix_tokens
        return self._class_and_mean(tokens[:, :n], tokens[:, n:])

    def _class_and_mean(self, prefix: Tensor | None, patches: Tensor) -> Tensor:
        """Concatenate class token and mean patch token; without a class token, return the mean."""
        mean = patches.mean(dim=1)
        if prefix is None or not prefix.shape[1] or getattr(self.model, "cls_token", None) is None:
            return mean
        return torch.cat([prefix[:, 0], mean], dim=1)

    def _by_timm(self, x: Tensor, depths: Sequence[int]) -> list[Tensor]:
        indices = [depth - 1 for depth in depths]
        # timm gives layers in the model's order
        order = {depth: i for i, depth in enumerate(sorted(set(depths)))}
        if not self.is_vit:
            maps = self.model.forward_intermediates(
                x, indices=indices, stop_early=True, output_fmt="NCHW", intermediates_only=True
            )
            return [maps[order[depth]].mean(dim=(2, 3)) for depth in depths]
        layers = self.model.forward_intermediates(
            x,
            indices=indices,
            return_prefix_tokens=True,
            norm=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        # timm returns tokens alone for models without prefix tokens
        pooled = []
        for layer in layers:
            tokens, prefix = layer if isinstance(layer, tuple) else (layer, None)
            pooled.append(self._class_and_mean(prefix, tokens))
        return [pooled[order[depth]] for depth in depths]

    def own_output(self, x: Tensor, start: int = 0) -> Tensor:
        """Return the encoder's own output, pooled as its authors do: (n, width), or (n, 2 * width) for "class+mean".

        With `start`, `x` are tokens, as in :meth:`forward`.
        """
        if self.splits:
            x = x if start else self.tokens(x, 0)
            for block in self.model.blocks[start:]:
                x = self._run(block, x)
            tokens = self.model.norm(x)
            if self.encoder.pooling is None:
                return self.model.forward_head(tokens)
        elif self.encoder.pooling is None:
            return self.model(x)
        else:
            tokens = self.model.forward_features(x)
        if self.encoder.pooling == "class":
            return tokens[:, 0]
        return self._pooled(tokens)

    def halve(self, dtype: torch.dtype) -> None:
        """Convert the weights of linear and convolutional layers to half precision, in place, for use with autocast.

        Autocast would otherwise convert them at every step, and hold both copies until the backward pass. Norms and
        tokens, which autocast keeps in full precision, are not converted.
        """
        for module in self.model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(dtype)

    def cut(self, depth: int) -> None:
        """Remove the blocks after `depth`, but not the final norm."""
        if self.is_vit and depth < self.n_blocks:
            self.model.prune_intermediate_layers([depth - 1], prune_norm=False, prune_head=False)
