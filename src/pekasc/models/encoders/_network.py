"""Image encoders: the row that describes one, the registry of rows, and the frozen model with its features."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import json
import math
import pickle
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import timm
import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pekasc._keys import short_name
from pekasc._settings import get_logger
from pekasc.models._registry import Registry
from pekasc.models.encoders._remap import to_timm

logger = get_logger(__name__)

RANDOM = "random"
PACKAGED = "package:"
_HUB = ("hf-hub:", "hf_hub:")
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_LISTED = "which `pekasc.models.list_encoders()` describes"
_WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


@dataclass(frozen=True)
class Encoder:
    """Describe an image encoder: which timm architecture, which weights, which input statistics.

    Goes wherever ``encoder=`` stands, beside a name of :func:`list_encoders` or a timm name.

    Parameters
    ----------
    name
        A timm model name (``"vit_small_patch14_dinov2"``) or a hub name (``"hf-hub:owner/model"``).
    weights
        Path of a local state dict (``.safetensors``, or a file for ``torch.load(weights_only=True)``), under the
        names of timm, of transformers' ViT and DINOv2, or of DINOv2's repository;
        None takes the pretrained weights from the hub; ``"random"`` asks for random weights (seed 0).
    model_kwargs
        Passed to :func:`timm.create_model`; ``mlp_layer`` by its name in :mod:`timm.layers`.
    mean, std
        Input statistics per channel for values in 0-1; None takes those of timm's configuration.
    mpp
        Pixel size in um that the encoder was trained at; tiles of another are embedded with a warning.
    adapter_targets
        Names of the linear layers inside a block that adapters attach to.
    key
        Short name in slots and logs; by default the last part of `name`.
    licence
        Licence of the weights.
    citation
        What to cite.
    note
        Logged when the encoder is taken by its name.
    hub
        Repository on the Hugging Face hub (``"owner/model"``) with the weights for the architecture `name`; None
        leaves it to timm, which knows the weights of its own names and of ``hf-hub:`` names.
    hub_file
        The file there; by default ``model.safetensors``, else ``pytorch_model.bin``.
    gated
        Whether the hub asks for terms to be accepted before it gives the weights.
    pooling
        What the authors take as a tile's features, for ``preset="paper"``: the ``"class"`` token, or
        ``"class+mean"``, the class token beside the mean patch token. None is what the model itself returns.

    Examples
    --------
    >>> import pekasc as pk
    >>> pk.models.Encoder("vit_small_patch14_dinov2", weights="vit_small.safetensors", mpp=0.5).short
    'vit_small_patch14_dinov2'
    """

    name: str
    weights: str | Path | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    mpp: float | None = None
    adapter_targets: tuple[str, ...] = ("attn.qkv",)
    key: str | None = None
    licence: str | None = None
    citation: str | None = None
    note: str | None = None
    hub: str | None = None
    hub_file: str | None = None
    gated: bool = False
    pooling: Literal["class", "class+mean"] | None = None

    @property
    def short(self) -> str:
        """Short name, fit for a slot."""
        return short_name(self.key or self.name)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain values for JSON."""
        row = dataclasses.asdict(self)
        row["weights"] = None if self.weights is None else str(self.weights)
        row["model_kwargs"] = dict(self.model_kwargs)
        return row

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Encoder:
        """Return the encoder that :meth:`to_dict` described."""
        values = dict(row)
        for name in ("mean", "std", "adapter_targets"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        return cls(**values)


# facts of a row of the table that are no part of an Encoder: the built model has them
_FACTS = ("library", "width", "n_blocks", "heads", "patch", "registers", "parameters")


@dataclass(frozen=True)
class EncoderRow:
    """An encoder that is known by its name.

    Parameters
    ----------
    encoder
        What is built; `key` is the name.
    facts
        What :func:`list_encoders` says of it besides: ``width``, ``n_blocks`` and so on.
    """

    encoder: Encoder
    facts: Mapping[str, Any] = field(default_factory=dict)


@cache
def _table() -> Registry[EncoderRow]:
    folder = files("pekasc.models.encoders")
    tiny = json.loads(folder.joinpath("weights", "tiny.json").read_text())
    kwargs = tiny["model_kwargs"]
    row = {
        "architecture": tiny["architecture"],
        "weights": f"{PACKAGED}tiny.safetensors",
        "model_kwargs": kwargs,
        "library": "timm",
        "mean": tiny["mean"],
        "std": tiny["std"],
        "width": kwargs["embed_dim"],
        "n_blocks": kwargs["depth"],
        "heads": kwargs["num_heads"],
        "patch": 14,
        "registers": 0,
        "parameters": 4.9,
        "licence": tiny["licence"],
        "gated": False,
        "note": "encoder 'tiny' is for trying pekasc out, not for a paper: see the page on it in the documentation.",
    }
    rows = {"tiny": row, **tomllib.loads(folder.joinpath("encoders.toml").read_text())}
    return Registry("encoder", {name: _row(name, values) for name, values in rows.items()})


def _row(name: str, values: Mapping[str, Any]) -> EncoderRow:
    own = {key: value for key, value in values.items() if key not in _FACTS}
    encoder = Encoder.from_dict({"key": name, "name": own.pop("architecture"), **own})
    return EncoderRow(encoder, {key: values[key] for key in _FACTS if key in values})


def list_encoders() -> pd.DataFrame:
    """List the encoders that have a name here, with what is known of them.

    Returns
    -------
    One row per encoder, index ``name`` (what ``encoder=`` takes). Columns: ``architecture`` (timm's name),
    ``model_kwargs`` (what it is built with beside), ``hub`` (repository of the weights), ``library`` (whose model the
    weights were released for), ``width``, ``n_blocks``, ``heads``, ``patch`` (pixels), ``registers``, ``parameters``
    (millions), ``mpp`` (um per pixel of the training tiles; NaN if there were several, or it is not known), ``mean``,
    ``std``, ``pooling`` (the authors' own), ``licence``, ``gated`` and ``citation``. Where text is missing it is None.

    Examples
    --------
    >>> import pekasc as pk
    >>> table = pk.models.list_encoders()
    >>> table.query("not gated and width <= 384").index.tolist()
    ['tiny', 'lunit-s8', 'lunit-s16', 'kaiko-s8', 'kaiko-s16', 'dinov2-s']
    """
    columns = (
        "architecture", "model_kwargs", "hub", "library", "width", "n_blocks", "heads", "patch", "registers",
        "parameters", "mpp", "mean", "std", "pooling", "licence", "gated", "citation",
    )  # fmt: skip
    rows = {}
    for name, row in _table().items():
        known = {**vars(copy.deepcopy(row.encoder)), "architecture": row.encoder.name, **row.facts}
        rows[name] = {column: known.get(column) for column in columns}
    # objects: the string type of pandas 3 would make NaN of None
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(columns), dtype=object).rename_axis("name")
    whole = dict.fromkeys(("width", "n_blocks", "heads", "patch", "registers"), int)
    return table.astype({**whole, "mpp": float, "parameters": float, "gated": bool})


def get_encoder(name: str) -> Encoder:
    """Return the row of an encoder that :func:`list_encoders` lists, for instance to give it local weights.

    Parameters
    ----------
    name
        Its name.

    Returns
    -------
    The row; ``dataclasses.replace(row, weights=PATH)`` reads the weights from a file.

    Raises
    ------
    TypeError
        If `name` is not a string.
    ValueError
        If there is no encoder of that name.

    Examples
    --------
    >>> import dataclasses
    >>> import pekasc as pk
    >>> row = pk.models.get_encoder("uni2-h")
    >>> dataclasses.replace(row, weights="pytorch_model.bin").short
    'uni2-h'
    """
    if not isinstance(name, str):
        raise TypeError(f"`name` must be a string, got {type(name).__name__}.")
    others = f"{_LISTED}, or write `pekasc.models.Encoder(name)` for a timm or hub name"
    return copy.deepcopy(_table().find("name", name, others).encoder)  # the table is read once for all


def resolve_encoder(encoder: str | Encoder) -> Encoder:
    """Return the row for `encoder`: a name of the table, a timm or ``hf-hub:`` name, or a row itself.

    Raises
    ------
    TypeError
        If `encoder` is neither a string nor an :class:`Encoder`.
    ValueError
        If `encoder` is a path, or no name that is known.
    """
    if isinstance(encoder, Encoder):
        return encoder
    if not isinstance(encoder, str):
        raise TypeError(f"`encoder` must be a name or a pekasc.models.Encoder, got {type(encoder).__name__}.")
    if encoder in _table():
        row = get_encoder(encoder)
        if row.note:
            logger.warning(row.note)
        return row
    if encoder.startswith(_HUB):
        hub = encoder.split(":", 1)[1]
        known = [name for name, row in _table().items() if row.encoder.hub == hub]
        if len(known) == 1:
            logger.hint("%r is known as %r: taking its arguments and input statistics.", encoder, known[0])
            # slots are named after what was asked for
            return dataclasses.replace(get_encoder(known[0]), key=short_name(encoder))
        return Encoder(encoder)
    if timm.is_model(encoder):
        return Encoder(encoder)
    if encoder.endswith(_WEIGHT_SUFFIXES) or Path(encoder).exists():
        raise ValueError(
            f"`encoder={encoder!r}` is a path, which does not say what model it holds. Name the architecture: "
            f'`encoder=pekasc.models.Encoder("vit_small_patch14_dinov2", weights={encoder!r})`.'
        )
    others = f"{_LISTED}, a timm model name, 'hf-hub:owner/model' or a `pekasc.models.Encoder`"
    raise _table().unknown("encoder", encoder, others, timm.list_models())


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"Encoder weights not found: {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"The encoder weights {path.name} cannot be read: {str(error)[:300]}. A state dict is needed: "
            ".safetensors, or a file for `torch.load(weights_only=True)`."
        ) from error
    state = state.get("state_dict", state.get("model", state)) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path.name} holds no state dict (names and tensors) but a {type(state).__name__}.")
    return dict(state)


def _create(encoder: Encoder) -> nn.Module:
    if not encoder.name.startswith(_HUB) and not timm.is_model(encoder.name):
        close = difflib.get_close_matches(encoder.name, timm.list_models(), n=3)
        raise ValueError(
            f"`Encoder({encoder.name!r})`: timm {timm.__version__} knows no model of that name. Give one of "
            f"`timm.list_models()` or 'hf-hub:owner/model'.{' Close names: ' + ', '.join(close) + '.' if close else ''}"
        )
    # timm draws random weights before it reads any: the caller's generator is left as it was
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _build(encoder, {"num_classes": 0, **encoder.model_kwargs})


def _build(encoder: Encoder, kwargs: dict[str, Any]) -> nn.Module:
    # a layer stands in a row as a name, so that rows stay plain values; timm takes names for all but this one
    if isinstance(layer := kwargs.get("mlp_layer"), str):
        if not hasattr(timm.layers, layer):
            raise ValueError(f"`model_kwargs`: timm.layers has no `mlp_layer` named {layer!r}.")
        kwargs = {**kwargs, "mlp_layer": getattr(timm.layers, layer)}
    if encoder.weights == RANDOM:
        return timm.create_model(encoder.name, pretrained=False, **kwargs)
    if encoder.weights is None and encoder.hub is None:
        return _create_pretrained(encoder, kwargs)
    path = _weights_path(encoder)
    state = to_timm(_read_state_dict(path))
    model = timm.create_model(encoder.name, pretrained=False, **kwargs)
    _match_grid(model, state)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"The weights in {path.name} do not fit {encoder.name!r} with model_kwargs={dict(encoder.model_kwargs)}: "
            f"{str(error)[:500]}"
        ) from error
    return model


def _match_grid(model: Any, state: Mapping[str, Tensor]) -> None:
    """Give the model the grid of positions that the weights were saved with, whatever tiles they were trained on."""
    own, theirs = getattr(model, "pos_embed", None), state.get("pos_embed")
    if own is None or theirs is None or own.shape == theirs.shape or not hasattr(model, "set_input_size"):
        return
    patches: Any = model.patch_embed
    n = theirs.shape[1] - (own.shape[1] - patches.num_patches)  # less what precedes the patches
    side = math.isqrt(max(n, 0))
    if side and side * side == n:
        model.set_input_size(img_size=(side * patches.patch_size[0], side * patches.patch_size[1]))


def _weights_path(encoder: Encoder) -> Path:
    if encoder.weights is None:
        return _hub_path(encoder)
    if str(encoder.weights).startswith(PACKAGED):
        return Path(str(files("pekasc.models.encoders").joinpath("weights", str(encoder.weights)[len(PACKAGED) :])))
    return Path(encoder.weights)


def _hub_path(encoder: Encoder) -> Path:
    """Return the file with the weights in the hub's cache, fetched if it is not there."""
    hub = str(encoder.hub)
    names = _HUB_FILES if encoder.hub_file is None else (encoder.hub_file,)
    for name in names:
        # what was fetched once is read without asking the hub again, so that it works without a network
        cached = try_to_load_from_cache(hub, name)
        if isinstance(cached, str):
            return Path(cached)
    for name in names:
        try:
            return Path(hf_hub_download(hub, name))
        except LocalEntryNotFoundError as error:  # no network: another name would fail as well
            raise _unreachable(encoder, hub, error) from error
        except EntryNotFoundError as error:
            if name == names[-1]:
                raise _unreachable(encoder, hub, error) from error
        except (OSError, ValueError, RuntimeError) as error:
            raise _unreachable(encoder, hub, error) from error
    raise AssertionError  # for the type checker: the loop returns or raises


def _create_pretrained(encoder: Encoder, kwargs: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(encoder.name, pretrained=True, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        # huggingface_hub's errors (gated, not found, offline) derive from OSError and ValueError
        raise _unreachable(encoder, encoder.name.split(":", 1)[-1], error) from error


def _unreachable(encoder: Encoder, hub: str, error: Exception) -> OSError:
    own = encoder.key if encoder.key in _table() else None
    terms = "The model is gated:" if encoder.gated else "If the model is gated,"
    local = (
        f'`dataclasses.replace(pekasc.models.get_encoder({own!r}), weights="PATH")`'
        if own
        else f'`pekasc.models.Encoder({encoder.name!r}, weights="PATH")`'
    )
    return OSError(
        f"The weights of {own or encoder.name!r} could not be fetched from the model hub ({type(error).__name__}: "
        f"{str(error)[:200]}). "
        f"{terms} accept its terms at https://huggingface.co/{hub} and log in with `hf auth login`. "
        f'Without a network, fetch the file elsewhere and give it with {local}; `weights="random"` gives random '
        'weights, and `encoder="tiny"` needs no network.'
    )


def depth_tuple(depth: Any) -> tuple[int, ...]:
    """Return `depth=` as numbers of blocks: one, or several.

    Raises
    ------
    TypeError
        If it is neither an integer nor a sequence of integers.
    ValueError
        If it is an empty sequence.
    """
    blocks = [depth] if isinstance(depth, Integral) else list(depth) if isinstance(depth, Sequence) else None
    if blocks is None or isinstance(depth, str) or not all(isinstance(b, Integral) for b in blocks):
        raise TypeError(f"`depth` counts blocks and must be an integer or several, got {depth!r}.")
    if not blocks:
        raise ValueError("`depth` is empty: give one block or several.")
    return tuple(block if isinstance(block, bool) else int(block) for block in blocks)


def warn_of_scale(encoder: Encoder, mpp: float) -> None:
    """Log a warning where tiles of `mpp` um per pixel are not what the encoder was trained on."""
    if encoder.mpp is not None and abs(mpp / encoder.mpp - 1) > 0.05:
        logger.warning("Encoder %r was trained at %g um/px; these tiles have %g.", encoder.short, encoder.mpp, mpp)


def digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's state dict (names, shapes and values in order of names)."""
    sha = hashlib.sha256()
    add_tensors(sha, model.state_dict())
    return sha.hexdigest()


def add_tensors(sha: Any, tensors: Mapping[str, Tensor]) -> None:
    """Add names, types, shapes and values to a hash, in order of names."""
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


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
        self.digest = digest(self.model)
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
                "timm's plain VisionTransformer can. Leave `gradient_checkpointing=` and `compile=` out."
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
        mean = tokens[:, n:].mean(dim=1)
        has_class = n and getattr(self.model, "cls_token", None) is not None
        return torch.cat([tokens[:, 0], mean], dim=1) if has_class else mean

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
            mean = tokens.mean(dim=1)
            has_class = prefix is not None and getattr(self.model, "cls_token", None) is not None
            pooled.append(torch.cat([prefix[:, 0], mean], dim=1) if has_class else mean)
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
        return torch.cat([tokens[:, 0], tokens[:, self.model.num_prefix_tokens :].mean(dim=1)], dim=1)

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
