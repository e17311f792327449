"""The encoders that have a name, and the row that describes one."""

from __future__ import annotations

import copy
import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import timm

from pekasc._keys import short_name
from pekasc._settings import get_logger
from pekasc.models.runtime import Registry

logger = get_logger(__name__)

RANDOM = "random"
PACKAGED = "package:"
_HUB = ("hf-hub:", "hf_hub:")
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
        What the authors take as a tile's features, for ``Readout(depth="own")``: the ``"class"`` token, or
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


def warn_of_scale(encoder: Encoder, mpp: float) -> None:
    """Log a warning where tiles of `mpp` um per pixel are not what the encoder was trained on."""
    if encoder.mpp is not None and abs(mpp / encoder.mpp - 1) > 0.05:
        logger.warning("Encoder %r was trained at %g um/px; these tiles have %g.", encoder.short, encoder.mpp, mpp)
