"""`Encoder`, the description of an image encoder, and the registry of encoders with a name."""

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
from pekasc.models.encoders._size import check_size
from pekasc.models.runtime import Registry

logger = get_logger(__name__)

RANDOM = "random"
PACKAGED = "package:"
_HUB = ("hf-hub:", "hf_hub:")
_LISTED = "which `pekasc.models.list_encoders()` describes"
# arguments of timm's models (vision transformers, Swin, ConvNeXt, ResNet, ...) that shape an architecture by plain
# values: no others, since an adapter's file names them, and some of timm's read files (`checkpoint_path`, `cache_dir`)
_SHAPING = frozenset(
    "act_layer always_partition attn_drop_rate attn_only_layer_scale attn_pool_mlp_ratio attn_pool_num_heads "
    "attn_type avg_down base_width block_reduce_first cardinality channels class_token conv_bias conv_mlp depth "
    "depths dims down_kernel_size drop_block_rate drop_path_rate drop_rate dynamic_img_pad dynamic_img_size "
    "embed_dim embed_norm fc_norm final_norm fix_init global_pool head_dim head_hidden_size head_init_scale "
    "head_norm_first img_size in_chans init_values kernel_sizes layer_scale_init_value layers ls_init_value "
    "mlp_layer mlp_ratio no_embed_class norm_eps norm_layer num_classes num_heads num_kv_heads num_reg_tokens "
    "output_stride patch_drop_rate patch_size pool_include_prefix pos_drop_rate pos_embed pre_norm "
    "pretrained_window_sizes proj_bias proj_drop_rate qk_norm qkv_bias qkv_fused ref_feat_shape reg_tokens "
    "replace_stem_pool rope_grid_indexing rope_grid_offset rope_jitter_coords rope_rescale_coords rope_rotate_half "
    "rope_shift_coords rope_temperature rope_type scale_attn_inner scale_attn_norm scale_mlp scale_mlp_norm "
    "stem_type stem_width strict_img_size swiglu_align_to swiglu_mlp use_abs_pos_emb use_fc_norm use_grn "
    "use_post_norm use_post_transformer_norm use_pre_transformer_norm use_rel_pos_bias use_rot_pos_emb "
    "use_shared_rel_pos_bias weight_init widths window_size zero_init_last".split()
)
_PLAIN = bool | int | float | str | None
_WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


@dataclass(frozen=True)
class Encoder:
    """Describe an image encoder: its timm architecture, weights and input statistics.

    Pass it as ``encoder=``, where a name of :func:`list_encoders` or of timm is not enough.

    Parameters
    ----------
    name
        A timm model name (``"vit_small_patch14_dinov2"``) or a hub name (``"hf-hub:owner/model"``).
    weights
        Path of a local state dict (``.safetensors``, or a file for ``torch.load(weights_only=True)``), with the
        parameter names of timm, of transformers' ViT and DINOv2, or of DINOv2's repository. None downloads the
        pretrained weights from the hub; ``"random"`` is random weights (seed 0).
    model_kwargs
        Passed to :func:`timm.create_model`: arguments that shape an architecture, such as ``img_size``, ``depth``,
        ``embed_dim``, ``reg_tokens`` or ``init_values``, with plain values; layers by their name in :mod:`timm.layers`
        (``mlp_layer="SwiGLUPacked"``). None that names a file, an address or a configuration, since an adapter that was
        saved brings them with it.
    mean, std
        Mean and standard deviation of the input per channel, for values in 0-1; None takes timm's.
    mpp
        Pixel size in um of the encoder's training images; embedding tiles of another pixel size logs a warning.
    adapter_targets
        Names of the linear layers of a block that adapters are attached to.
    key
        Short name for keys and logs; by default the last part of `name`.
    licence
        Licence of the weights.
    citation
        What to cite.
    note
        Warning to log when the encoder is chosen by its name.
    hub
        Repository on the Hugging Face hub (``"owner/model"``) with weights for the architecture `name`. None leaves it
        to timm, for timm names and ``hf-hub:`` names.
    hub_file
        File in that repository; by default ``model.safetensors``, else ``pytorch_model.bin``.
    gated
        Whether terms have to be accepted on the hub before the weights can be downloaded.
    pooling
        Features as the authors pool them, for ``Readout(depth="own")``: the ``"class"`` token, or ``"class+mean"``, the
        class token concatenated with the mean patch token. None is what the model itself returns.

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

    def __post_init__(self) -> None:
        if not isinstance(self.model_kwargs, Mapping):
            raise TypeError(f"`model_kwargs` must be a mapping, got {type(self.model_kwargs).__name__}.")
        if other := sorted(str(name) for name in self.model_kwargs if name not in _SHAPING):
            raise ValueError(
                f"`model_kwargs` takes arguments of timm that shape an architecture; {other} do not, or are unknown. "
                "Weights are given as `weights=`."
            )
        for name, value in self.model_kwargs.items():
            if not all(isinstance(part, _PLAIN) for part in (value if isinstance(value, list | tuple) else [value])):
                raise TypeError(
                    f"`model_kwargs`: {name!r} must be a number, a name, True, False, None or several of these, got "
                    f"{value!r}."
                )
        check_size(self.model_kwargs)

    @property
    def short(self) -> str:
        """Short name, valid as part of a key."""
        return short_name(self.key or self.name)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain values for JSON.

        Returns
        -------
        A dict with the names of the fields.
        """
        row = dataclasses.asdict(self)
        row["weights"] = None if self.weights is None else str(self.weights)
        row["model_kwargs"] = dict(self.model_kwargs)
        return row

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Encoder:
        """Return the encoder that :meth:`to_dict` described.

        Parameters
        ----------
        row
            The dict, or what JSON made of it.

        Returns
        -------
        The :class:`Encoder`.

        Raises
        ------
        TypeError
            If `row` has a field that is not one of an encoder.
        """
        values = dict(row)
        for name in ("mean", "std", "adapter_targets"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        return cls(**values)


# columns of the table of encoders that are not fields of Encoder, since the network has them
_FACTS = ("library", "width", "n_blocks", "heads", "patch", "registers", "parameters")


@dataclass(frozen=True)
class EncoderRow:
    """An encoder of the registry.

    Parameters
    ----------
    encoder
        Its description; `key` is the name.
    facts
        Further columns of :func:`list_encoders`: ``width``, ``n_blocks`` and so on.
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
    """List the encoders that can be chosen by name, with size, training pixel size, licence and citation.

    Returns
    -------
    One row per encoder, indexed by ``name``, as ``encoder=`` takes it. Columns: ``architecture`` (timm's name),
    ``model_kwargs`` (further arguments of :func:`timm.create_model`), ``hub`` (repository of the weights), ``library``
    (that the weights were released for), ``width``, ``n_blocks``, ``heads``, ``patch`` (pixels), ``registers``,
    ``parameters`` (millions), ``mpp`` (um per pixel of the training images; NaN if there were several, or if it is
    unknown), ``mean``, ``std``, ``pooling`` (of the authors), ``licence``, ``gated`` and ``citation``. Missing text is
    None.

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
    # dtype object, since the string dtype of pandas 3 would turn None into NaN
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(columns), dtype=object).rename_axis("name")
    # a row that was registered need not say everything: then there are NaN
    whole = {
        name: int if table[name].notna().all() else float
        for name in ("width", "n_blocks", "heads", "patch", "registers")
    }
    return table.astype({**whole, "mpp": float, "parameters": float, "gated": bool})


def get_encoder(name: str) -> Encoder:
    """Return an encoder of :func:`list_encoders`, for instance to load its weights from a local file.

    Parameters
    ----------
    name
        Name of the encoder.

    Returns
    -------
    The :class:`Encoder`; ``dataclasses.replace(encoder, weights=PATH)`` takes the weights from a file.

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
    """Return the :class:`Encoder` for a name of the registry, a timm or ``hf-hub:`` name, or an :class:`Encoder`.

    Raises
    ------
    TypeError
        If `encoder` is neither a string nor an :class:`Encoder`.
    ValueError
        If `encoder` is a path, or an unknown name.
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
            # keys are made from the name as the user wrote it
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
    """Log a warning if the encoder was trained at another pixel size than `mpp` um per pixel."""
    if encoder.mpp is not None and abs(mpp / encoder.mpp - 1) > 0.05:
        logger.warning("Encoder %r was trained at %g um/px; these tiles have %g.", encoder.short, encoder.mpp, mpp)
