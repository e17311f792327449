"""Image encoders: the row that describes one, the registry of rows, and the frozen model with its features."""

from __future__ import annotations

from collections.abc import Sequence
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
    """An encoder built for one tile size, in evaluation mode, without gradients.

    Parameters
    ----------
    encoder
        The row, see :class:`Encoder`.
    tile_px
        Side of the tiles in pixels.

    Attributes
    ----------
    model
        The timm model.
    n_blocks
        Number of transformer blocks (of stages, for a convolutional model): depths run from 1 to this.
    digest
        SHA-256 of the weights before any change for `tile_px`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder, tile_px: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.tile_px = tile_px
        self.model: Any = _create(encoder)
        if not hasattr(self.model, "forward_intermediates"):
            raise ValueError(f"timm's {encoder.name!r} gives no intermediate features, which pekasc needs.")
        self.digest = weights_digest(self.model)
        config = timm.data.resolve_model_data_config(self.model)
        shape = (1, 3, 1, 1)
        self.register_buffer("mean", torch.tensor(encoder.mean or config["mean"]).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(encoder.std or config["std"]).view(shape), persistent=False)
        self.is_vit = hasattr(self.model, "blocks") and hasattr(self.model, "num_prefix_tokens")
        stages: Any = self.model.blocks if self.is_vit else self.model.feature_info
        self.n_blocks = len(stages)
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
        """Stay in evaluation mode: a frozen encoder's features do not change while an adapter in it is trained.

        Only an adapter's own dropout (PEFT names it ``lora_dropout`` and the like) follows `mode`.
        """
        super().train(False)
        for name, module in self.named_modules():
            if "_dropout." in name:
                module.train(mode)
        return self

    def check_depth(self, depth: int) -> int:
        """Return `depth` counted from the first block (1 to `n_blocks`); negative ones count from the end."""
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
        """Return uint8 tiles (n, y, x, 3) as normalised float (n, 3, y, x)."""
        x = tiles.permute(0, 3, 1, 2).to(self.mean.dtype).div_(255.0)
        return x.sub_(self.mean).div_(self.std)

    @property
    def splits(self) -> bool:
        """Whether blocks can be run apart from those before them: timm's plain vision transformer, as it is."""
        kind: Any = type(self.model)
        return isinstance(self.model, VisionTransformer) and all(
            getattr(kind, name) is getattr(VisionTransformer, name)
            for name in ("forward", "forward_features", "forward_intermediates", "forward_head")
        )

    def check_splits(self) -> None:
        """Raise if :attr:`splits` is False."""
        if not self.splits:
            raise ValueError(
                f"The blocks of encoder {self.encoder.short!r} ({type(self.model).__name__}) cannot be run one by one: "
                "timm's plain VisionTransformer can. Leave `Compute.gradient_checkpointing` and `Compute.compile` out."
            )

    def tokens(self, x: Tensor, n_blocks: int) -> Tensor:
        """Return what enters block `n_blocks` + 1 for normalised tiles: (n, tokens, width)."""
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
        """Return per depth the class token beside the mean patch token, (n, 2 * width); pooled stages without tokens.

        The model's final norm is applied after every depth, as DINOv2's ``get_intermediate_layers`` does, so that
        the features of an encoder that is cut there are the same. Blocks after the last depth do not run.

        Parameters
        ----------
        x
            Normalised tiles; with `start`, what :meth:`tokens` gives for as many blocks.
        depths
            Blocks, after `start`.
        start
            Blocks that ran already.
        kept
            Its keys are numbers of blocks: filled, on the way, with what :meth:`tokens` gives for as many.
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
        """Return the class token beside the mean patch token; the mean alone where there is no class token."""
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
        # tokens alone where there are no prefix tokens
        pooled = []
        for layer in layers:
            tokens, prefix = layer if isinstance(layer, tuple) else (layer, None)
            pooled.append(self._class_and_mean(prefix, tokens))
        return [pooled[order[depth]] for depth in depths]

    def own_output(self, x: Tensor, start: int = 0) -> Tensor:
        """Return the encoder's own output, as its authors pool it: (n, width), or twice that for ``"class+mean"``.

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
        """Keep the weights of linear and convolutional layers in half precision, in place; only for autocast to it.

        Autocast would make the same half of them at every step, and keep it beside the whole until the backward pass.
        Norms and tokens, which it leaves alone, stay as they are.
        """
        for module in self.model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(dtype)

    def cut(self, depth: int) -> None:
        """Drop the blocks after `depth`; the final norm stays."""
        if self.is_vit and depth < self.n_blocks:
            self.model.prune_intermediate_layers([depth - 1], prune_norm=False, prune_head=False)
