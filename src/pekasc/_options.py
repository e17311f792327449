"""The option objects of every call: Recipe (training), Readout (from features to genes), Compute (device and files)."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Compute", "Readout", "Recipe", "resolve", "resolve_recipe", "whole"]

from pekasc._paths import folder_path
from pekasc._settings import get_logger

logger = get_logger(__name__)

ORIENTATIONS = (1, 2, 4, 8)
STAINS = ("reinhard", "macenko")
PRECISIONS = ("fp32", "bf16", "fp16")
CACHED = ("fp16", "fp32")
REFITS = ("last", "ensemble", "both")
# default limits in bytes
FIT_MEMORY = 2 * 2**30  # of tiles, of features and of cached activations, each, in a call that trains
RESULT_MEMORY = 4 * 2**30  # of what a call writes into the object


class _Options:
    """Base of the option objects: presets, copies with changed fields, and a repr of the non-default fields."""

    _presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}

    @classmethod
    def preset(cls, name: str) -> Self:
        """Return the options of a preset.

        Parameters
        ----------
        name
            Name of the preset.

        Raises
        ------
        ValueError
            If there is no preset of that name.
        """
        if name not in cls._presets:
            raise ValueError(
                f"{cls.__name__} has no preset {name!r}.{_nearest(name, list(cls._presets))} "
                f"Presets: {list(cls._presets)}."
            )
        return cls(**cls._presets[name])

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed.

        Parameters
        ----------
        **changes
            New value of each field.
        """
        _check_fields(type(self), changes)
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def changed(self) -> dict[str, Any]:
        """Return the fields that differ from the defaults."""
        default = type(self)()
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if value != getattr(default, name)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.changed().items())})"

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


@dataclass(frozen=True, repr=False)
class Recipe(_Options):
    """How an adapter is trained: its size, the losses and the optimiser.

    Pass it as ``recipe=``; the name of a preset or a mapping of the fields to change does as well. Presets:
    ``"default"``; ``"quick"``, which trains nothing and reads the frozen encoder; and ``"paper"``, the published
    training, whose sizes never adapt to the data.

    Parameters
    ----------
    rank
        Rank of the adapter. A ``peft.PeftConfig`` sets its own.
    blocks
        Number of blocks to adapt, counted back from the block whose features are used, or ``"all"``. ``"auto"`` is
        four; fewer if training them would not fit the free memory, all if the encoder's blocks cannot be run one by
        one.
    n_clusters
        Number of k-means clusters of the teacher's embedding, which are the structure labels; None is
        ``min(100, n // 20)`` for n training spots.
    teacher_components
        Principal components of ``teacher="pca"``; None is ``min(256, n - 1, d)`` for n training spots and d genes.
    kd_weight
        Weight of the knowledge distillation loss, between 0 and 1; the structure alignment loss has ``1 - kd_weight``.
    matching_weight
        Weight of an additional feature matching loss, the mean squared error between student and teacher embedding.
    temperature
        Softmax temperature of the distillation.
    learning_rate, weight_decay
        Learning rate and weight decay of AdamW.
    batch_size
        Tiles per training batch.
    step_epochs
        Number of epochs after which the learning rate is divided by 10, repeatedly; None keeps it constant.
    epochs
        Maximum number of epochs.
    patience
        Early stopping in the inner folds: stop after so many epochs without a smaller held-out error; None runs all
        `epochs`.
    choose_epochs
        Choose the number of epochs by the held-out error, with 0 (the frozen encoder) as a candidate. False always
        trains `epochs`.
    refit
        Which adapters predict. ``"last"``: one, trained on all training groups for the chosen number of epochs.
        ``"ensemble"``: those of the inner folds, each trained without the groups that are held out, at the chosen
        number of epochs; no further one is trained. ``"both"``: all of these. Each has heads of its own, and adapted
        members of the readout are the mean of their predictions. Only the adapted blocks run once for each.
    n_views
        Data augmentation: train on 1 (no augmentation), 2, 4 or 8 orientations of a tile (rotations by 90 degrees and
        mirror images).
    gradient_clip
        Maximum norm of the gradient.
    standardise_teacher
        Divide the teacher's embedding by its standard deviation over the training spots.
    cluster_head_learning_rate, cluster_head_epochs, cluster_head_patience
        Learning rate, maximum number of epochs and early stopping of the cluster head, which is frozen afterwards. It
        stops after so many epochs without a smaller validation loss (None runs all), and the best state is kept.

    References
    ----------
    Pan, Chen, Secrier. Teaching pathology foundation models to accurately predict gene expression with parameter
    efficient knowledge transfer. arXiv:2504.07061 (MICCAI 2025).

    Examples
    --------
    >>> import pekasc as pk
    >>> pk.Recipe(epochs=3, rank=32)
    Recipe(rank=32, epochs=3)
    >>> pk.Recipe.preset("paper").epochs
    50
    """

    rank: int = 64
    blocks: Literal["auto", "all"] | int = "auto"
    n_clusters: int | None = None
    teacher_components: int | None = None
    kd_weight: float = 0.5
    matching_weight: float = 0.0
    temperature: float = 2.0
    learning_rate: float = 3e-4
    weight_decay: float = 1e-2
    batch_size: int = 32
    step_epochs: int | None = None
    epochs: int = 6
    patience: int | None = None
    choose_epochs: bool = True
    refit: Literal["last", "ensemble", "both"] = "last"
    n_views: int = 8
    gradient_clip: float = 1.0
    standardise_teacher: bool = True
    cluster_head_learning_rate: float = 1e-3
    cluster_head_epochs: int = 100
    cluster_head_patience: int | None = 10

    _presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "quick": {"epochs": 0, "choose_epochs": False},
        "paper": {
            "rank": 256, "blocks": "all", "n_clusters": 100, "teacher_components": 256, "learning_rate": 1e-4,
            "weight_decay": 0.0, "step_epochs": 10, "epochs": 50, "choose_epochs": False, "n_views": 1,
            "standardise_teacher": False, "cluster_head_learning_rate": 1e-4, "cluster_head_epochs": 20,
            "cluster_head_patience": None,
        },
    }  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("rank", "batch_size", "cluster_head_epochs"):
            self._set(name, whole(name, getattr(self, name), least=1))
        for name in ("n_clusters", "teacher_components", "step_epochs", "patience", "cluster_head_patience"):
            if getattr(self, name) is not None:
                self._set(name, whole(name, getattr(self, name), least=2 if name == "n_clusters" else 1))
        self._set("epochs", whole("epochs", self.epochs, least=0))
        for name in ("learning_rate", "temperature", "gradient_clip", "cluster_head_learning_rate"):
            self._set(name, _number(name, getattr(self, name), positive=True))
        for name in ("matching_weight", "weight_decay"):
            self._set(name, _number(name, getattr(self, name)))
        if _number("kd_weight", self.kd_weight) > 1:
            raise ValueError(f"`kd_weight={self.kd_weight}` must lie between 0 and 1.")
        self._set("kd_weight", float(self.kd_weight))
        for name in ("choose_epochs", "standardise_teacher"):
            self._set(name, _flag(name, getattr(self, name)))
        self._set("n_views", _one_of("n_views", self.n_views, ORIENTATIONS))
        self._set("refit", _one_of("refit", self.refit, REFITS))
        if isinstance(self.blocks, str):
            _one_of("blocks", self.blocks, ("auto", "all"))
        else:
            self._set("blocks", whole("blocks", self.blocks, least=1))
        if self.patience is not None and not self.choose_epochs:
            raise ValueError(
                f"`patience={self.patience}` stops inner folds by the held-out error, and `choose_epochs=False` trains "
                "all epochs in any case: leave one of them out."
            )
        if self.refit != "last" and self.epochs == 0:
            raise ValueError(
                f'`refit="{self.refit}"` keeps the adapters of the inner folds, and `epochs=0` trains none: leave one '
                "of them out."
            )


@dataclass(frozen=True, repr=False)
class Readout(_Options):
    """Which features of a tile are used, and how gene expression is predicted from them.

    Pass it as ``readout=``; the name of a preset or a mapping of the fields to change does as well. Presets:
    ``"default"``; ``"quick"``, the same with one field of view; ``"ridge"``, one ridge regression at the best depth, as
    one would do without this package; and ``"paper"``, the published features: the encoder's own output, 256 principal
    components, ridge.

    Parameters
    ----------
    head
        Regression from standardised principal components of the features to genes. ``"ridge"``: one penalty.
        ``"ridge-per-gene"``: a penalty per gene. ``"low-rank"``: ridge onto the principal components of all expressed
        genes, mapped back to every gene, in which spots weigh ``N / (N + c)`` for a total of N counts and c a tenth of
        the median. ``"blend"``: the weighted mean of `members`.
    head_rank
        Number of principal components of the genes in a low-rank head; None tries 1, 2, 3, 5, 8, 12, 20 and 40, as they
        fit.
    members
        Members of a blend, as network and head, such as ``("frozen:low-rank", "adapted:ridge")``; those of each network
        share half of the weight. None is ``("frozen:low-rank", "adapted:ridge", "adapted:low-rank")``, of which only
        the frozen one is left with ``method=None``.
    depth
        Block(s) after which features are taken. ``"all"``: every depth has a head of its own (twelve evenly spaced
        depths for deeper encoders), of which `selection` takes the weighted mean or the best. ``"best"``: the depth
        with the smallest held-out error. A number of blocks (-1 is the last), or several, whose features are
        concatenated. ``"own"`` is the encoder's own output. An adapter is trained, and its features are read, at one
        depth, which plain ridge chooses on the frozen features unless it is given.
    selection
        ``"average"``: depths, ranks and penalties are averaged, with weights from their held-out error. ``"best"``: the
        setting with the smallest held-out error.
    n_depths
        With ``depth="best"`` and a frozen encoder: maximum number of blocks to concatenate; blocks are added as long as
        the held-out error falls. None is 1 in a fit, 2 for ``"frozen-best"`` in a comparison.
    n_components
        Principal components of the features; None is ``min(256, n - 1, d)`` for n training spots and d features.
    context_um
        Spatial context: the head also gets the mean features of the neighbours within this radius in um. ``"auto"``
        tries none, 150 (or the nearest neighbours, where spots are farther apart), 300 and 500 um, of which `selection`
        takes the weighted mean or the best, as of depths; None uses no context.
    smooth_um
        Smoothing: predictions are mixed with their mean over the neighbours within this radius in um, with the weight
        that has the smallest held-out error, which may be 0. ``"auto"`` chooses the radius as well; None does not
        smooth.
    fields_um
        Fields of view: widths in um of wider tiles around the same centres, read at the same `tile_px` and by the
        frozen encoder, whose features are concatenated with those of the tile. Every one costs a pass through the
        encoder. ``"auto"`` is one of four times the tile's width, where the images hold enough tissue around the tiles
        and inner folds keep enough training spots. None is the tile alone.
    orientations
        Test-time augmentation: average the features over 1, 2 (180 degrees), 4 (90 degrees) or 8 (with mirror images)
        orientations of a tile, for training spots as well. Every orientation costs a pass through the encoder.
    stain
        Stain normalisation: ``"reinhard"`` (mean and spread of the colours) or ``"macenko"`` (hue of haematoxylin and
        of eosin, not their amount) brings the colours of every section to the mean of the training sections, before
        the encoder's own normalisation. They are measured on the tissue under a section's tiles. None takes tiles as
        they are.

    References
    ----------
    Reinhard et al., Color transfer between images, IEEE CG&A 2001. Macenko et al., A method for normalizing histology
    slides for quantitative analysis, ISBI 2009.

    Examples
    --------
    >>> import pekasc as pk
    >>> pk.Readout(context_um=300)
    Readout(context_um=300.0)
    >>> pk.Readout(context_um=300).replace(head="ridge-per-gene")
    Readout(head='ridge-per-gene', context_um=300.0)
    """

    head: str = "blend"
    head_rank: int | None = None
    members: tuple[str, ...] | None = None
    depth: Literal["all", "best", "own"] | int | tuple[int, ...] = "all"
    selection: Literal["average", "best"] = "average"
    n_depths: int | None = None
    n_components: int | None = None
    context_um: Literal["auto"] | float | None = "auto"
    smooth_um: Literal["auto"] | float | None = None
    fields_um: Literal["auto"] | tuple[float, ...] | None = "auto"
    orientations: int = 1
    stain: Literal["reinhard", "macenko"] | None = None

    _presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "quick": {"fields_um": None},
        "ridge": {
            "head": "ridge", "depth": "best", "selection": "best", "n_depths": 1, "context_um": None, "fields_um": None,
        },
        "paper": {
            "head": "ridge", "depth": "own", "selection": "best", "n_components": 256, "context_um": None,
            "fields_um": None,
        },
    }  # fmt: skip

    def __post_init__(self) -> None:
        if not isinstance(self.head, str):
            raise TypeError(f'`head={self.head!r}` must be the name of a head, such as "ridge".')
        for name in ("n_components", "head_rank", "n_depths"):
            if getattr(self, name) is not None:
                self._set(name, whole(name, getattr(self, name), least=1))
        if self.head_rank is not None and self.head not in ("low-rank", "blend"):
            raise ValueError(
                f'`head_rank={self.head_rank}` is of a low-rank head, and `head="{self.head}"` is none: leave one of '
                "them out."
            )
        self._set("members", _members(self.members, self.head))
        self._set("depth", _depth(self.depth))
        self._set("selection", _one_of("selection", self.selection, ("average", "best")))
        if self.n_depths is not None and self.n_depths > 1 and self.depth != "best":
            raise ValueError(
                f'`n_depths={self.n_depths}` limits how many blocks `depth="best"` may concatenate, but '
                f"`depth={self.depth!r}` needs no such limit: leave one of them out."
            )
        for name in ("context_um", "smooth_um"):
            radius = getattr(self, name)
            if radius is not None and radius != "auto":
                self._set(name, _number(name, radius, positive=True, otherwise='a radius in um, "auto" or None'))
        self._set("fields_um", _fields_um(self.fields_um))
        if not self.reads_fields and self.fields_um not in (None, "auto"):
            raise ValueError(
                f"`fields_um={self.fields_um!r}` are read by the frozen members of a blend, and "
                f"`members={self.members!r}` are all adapted: leave one of them out."
            )
        self._set("orientations", _one_of("orientations", self.orientations, ORIENTATIONS))
        if self.stain is not None:
            self._set("stain", _one_of("stain", self.stain, STAINS, otherwise=", or None for tiles as they are"))

    @property
    def reads_fields(self) -> bool:
        """Whether something reads wider fields of view: of a blend, its frozen members."""
        return self.members is None or any(name.startswith("frozen:") for name in self.members)

    @property
    def depths(self) -> tuple[int, ...] | None | Literal["all", "best"]:
        """Depth as a tuple of block numbers; None for the encoder's own output, else ``"all"`` or ``"best"``."""
        if self.depth == "own":
            return None
        if isinstance(self.depth, int):
            return (self.depth,)
        return self.depth


@dataclass(frozen=True, repr=False)
class Compute(_Options):
    """Where and how a call runs: device, precision, memory and folders. Results do not depend on it, beyond rounding.

    Pass it as ``compute=``; a mapping of the fields to change does as well. The only preset is ``"default"``.

    Parameters
    ----------
    device
        ``"auto"`` (the first CUDA GPU, else the CPU), ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
    precision
        ``"fp32"``, ``"bf16"`` or, on a GPU, ``"fp16"``: mixed precision. Frozen weights are then kept in half
        precision, the trained ones in full.
    embed_batch_size
        Batch size for embedding tiles; halved, which is logged, if the device runs out of memory.
    max_memory
        Bytes of memory for tiles, for features and for cached activations, each; more are kept in files, features of
        the frozen encoder at all depths in half precision, of which those of one depth at a time come into memory. None
        is 2 GiB in a call that trains, and 4 GiB for the features and layers that a call writes.
    cache
        Folder for what can be computed again: cached activations and frozen features that do not fit in memory, and
        features and gene sets of a comparison. A later call with the same data reuses it. Can be deleted at any time.
    resume
        Folder for checkpoints of an unfinished fit. After an interruption, the same call continues from there and ends
        with the same weights. Delete it once the adapter is saved.
    checkpoint_minutes
        Minutes between two checkpoints of a training in `resume`.
    stored_precision
        ``"float32"`` or ``"float16"``, of predictions in a ``store=``.
    client
        A :class:`distributed.Client` whose workers read and embed tiles. Workers must be able to open the image (so
        keep images on disk, as zarr or slide) and the encoder's weights. `device` is then the device of each worker.
    trainer
        Arguments of the :class:`lightning.Trainer` of every training: ``accelerator``, ``devices``, ``strategy``,
        ``num_nodes``, ``precision``, ``callbacks``, ``logger`` and others. With several devices (``{"devices": 4,
        "strategy": "ddp"}`` in a script, or processes started by ``torchrun`` or a cluster), each process reads and
        embeds its share of every section, and every batch is split among them, with the losses of the whole batch. Run
        the call in every process; each returns the same adapter. Callbacks and loggers are called for every training,
        those of the inner folds and then the final one; those that would change the result are refused.
    accumulate
        Gradient accumulation: number of micro-batches per batch. The gradients are the same, with less memory.
    gradient_checkpointing
        Recompute blocks in the backward pass instead of storing their activations: less memory, more time.
    compile
        Compile the trained blocks with :func:`torch.compile`: pays off on a GPU with many tiles, hardly on a CPU.
    cached_activations
        Compute the activations entering the first adapted block once per orientation and keep them in half
        (``"fp16"``) or full (``"fp32"``) precision. None runs all blocks in every epoch.

    Examples
    --------
    >>> import pekasc as pk
    >>> pk.Compute(device="cpu", embed_batch_size=32)
    Compute(device='cpu', embed_batch_size=32)
    """

    device: str = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    embed_batch_size: int = 64
    max_memory: int | None = None
    cache: str | Path | None = None
    resume: str | Path | None = None
    checkpoint_minutes: float = 5.0
    stored_precision: Literal["float32", "float16"] = "float32"
    client: Client | None = None
    trainer: Mapping[str, Any] | None = field(default=None, hash=False)
    accumulate: int = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    cached_activations: Literal["fp16", "fp32"] | None = "fp16"

    def __post_init__(self) -> None:
        if not isinstance(self.device, str):
            raise TypeError(f'`device={self.device!r}` must be a string, such as "auto", "cpu" or "cuda".')
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("stored_precision", self.stored_precision, ("float32", "float16"))
        if self.cached_activations is not None:
            _one_of("cached_activations", self.cached_activations, CACHED, otherwise=", or None to keep nothing")
        for name in ("embed_batch_size", "accumulate"):
            self._set(name, whole(name, getattr(self, name), least=1))
        if self.max_memory is not None:
            self._set("max_memory", whole("max_memory", self.max_memory, least=1, unit=" of bytes"))
        for name in ("gradient_checkpointing", "compile"):
            self._set(name, _flag(name, getattr(self, name)))
        self._set("checkpoint_minutes", _number("checkpoint_minutes", self.checkpoint_minutes, otherwise="minutes"))
        for name in ("cache", "resume"):
            if getattr(self, name) is not None:
                self._set(name, str(folder_path(name, getattr(self, name))))  # a string: its repr can be typed back
        if self.trainer is not None and not isinstance(self.trainer, Mapping):
            raise TypeError(
                '`trainer` must map arguments of lightning.Trainer to values, such as {"devices": 2, "strategy": '
                f'"ddp"}}, got {type(self.trainer).__name__}.'
            )
        if self.precision != "fp32" and "precision" in (self.trainer or {}):
            raise ValueError(f"`precision={self.precision!r}` is also set in `trainer`: leave one of them out.")
        if self.client is not None:
            _check_client(self.client)

    def memory(self, default: int) -> int:
        """Return `max_memory` in bytes, or `default` where it is None.

        Parameters
        ----------
        default
            Bytes that the call takes if nothing is said.

        Returns
        -------
        The number of bytes.
        """
        return default if self.max_memory is None else self.max_memory


Options = TypeVar("Options", Recipe, Readout, Compute)


_NOT_TRAINED = "it trains nothing"
_TRAINING_FIELDS = (
    "cache", "resume", "checkpoint_minutes", "trainer", "accumulate", "gradient_checkpointing", "compile",
    "cached_activations",
)  # fmt: skip


NOT_STORED = {"stored_precision": "no predictions are stored on disk"}


def unused_in_embedding(*, arrays: bool = False, stored: bool = False) -> dict[str, str]:
    """Return the fields of `Compute` that do nothing in a call that embeds and does not train, with the reason.

    Parameters
    ----------
    arrays
        Whether the tiles are arrays in memory.
    stored
        Whether predictions are stored on disk.
    """
    unused = dict.fromkeys(_TRAINING_FIELDS, _NOT_TRAINED) | ({} if stored else NOT_STORED)
    if arrays:
        unused |= dict.fromkeys(("client", "max_memory"), "the tiles are in memory")
    return unused


def resolve(value: Any, cls: type[Options], label: str, *, unused: Mapping[str, str] | None = None) -> Options:
    """Turn an argument of a call into an option object.

    Parameters
    ----------
    value
        None (the defaults), an instance, the name of a preset, or a mapping of the fields to change.
    cls
        :class:`Recipe`, :class:`Readout` or :class:`Compute`.
    label
        Name of the argument, for errors.
    unused
        Fields that do nothing in this call, with the reason. In a mapping, which is written for one call, such a field
        is an error; in an instance or a preset, which may serve several calls, it is logged.

    Raises
    ------
    TypeError
        If `value` is none of these, or a field has a wrong type.
    ValueError
        If there is no such preset or field, a value is out of range, or a mapping has a field that does nothing.
    """
    unused = unused or {}
    if value is None:
        return cls()
    if isinstance(value, str):
        if value not in cls._presets:
            raise ValueError(
                f"`{label}={value!r}` is no preset.{_nearest(value, list(cls._presets))} Give one of "
                f"{list(cls._presets)}, a pekasc.{cls.__name__}, or a mapping of its fields."
            )
        return _log_unused(cls.preset(value), label, unused)
    if isinstance(value, cls):
        return _log_unused(value, label, unused)
    if not isinstance(value, Mapping):
        raise TypeError(
            f"`{label}` must be None, a pekasc.{cls.__name__}, the name of a preset or a mapping of its fields, got "
            f"{type(value).__name__}."
        )
    _check_fields(cls, value, f"`{label}`: ")
    for name in value:
        if name in unused:
            raise ValueError(f"`{label}`: {name!r} does nothing in this call: {unused[name]}. Leave it out.")
    try:
        return cls(**value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"`{label}`: {error}") from None


def resolve_recipe(recipe: Any, readout: Any, *, unused: Mapping[str, str] | None = None) -> tuple[Recipe, Any]:
    """Return the recipe, and the readout argument to resolve next.

    That is `readout` as given; that of the same name if none is given with the preset ``"paper"`` or ``"quick"``.
    """
    found, paper = resolve(recipe, Recipe, "recipe", unused=unused), Recipe.preset("paper")
    for name in ("paper", "quick"):
        if found == Recipe.preset(name) and readout is None:
            logger.hint('recipe="%s" brings readout="%s" with it: %r.', name, name, Readout.preset(name))
            return found, name
    if found == paper:
        logger.hint('recipe="paper" with the readout that was given.')
    elif readout is None:
        differs = [f.name for f in fields(Recipe) if getattr(found, f.name) != getattr(paper, f.name)]
        if len(differs) < len(paper.changed()) / 2:
            logger.hint(
                'The recipe is the published one but for %s; the readout is the default: give readout="paper" for the '
                "published features.", ", ".join(differs),
            )  # fmt: skip
    return found, readout


def _log_unused(options: Options, label: str, unused: Mapping[str, str]) -> Options:
    idle = [name for name in options.changed() if name in unused]
    if idle:
        reasons = sorted({unused[name] for name in idle})
        logger.hint("%s: %s do nothing in this call: %s.", label, ", ".join(idle), "; ".join(reasons))
    return options


def _check_fields(cls: type[Any], given: Mapping[str, Any], prefix: str = "") -> None:
    known = [f.name for f in fields(cls)]
    for name in given:
        if name not in known:
            raise ValueError(
                f"{prefix}{cls.__name__} has no field {name!r}.{_nearest(str(name), known)} Fields: {', '.join(known)}."
            )


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def whole(name: str, value: Any, *, least: int | None = None, unit: str = "") -> int:
    """Check that a value is an integer, of Python or NumPy, and return it as int.

    Raises
    ------
    TypeError
        If it is no integer.
    ValueError
        If it is smaller than `least`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}={value!r}` must be a whole number{unit}.")
    if least is not None and value < least:
        raise ValueError(f"`{name}={value}` must be a whole number{unit}, at least {least}.")
    return int(value)


def _number(name: str, value: Any, *, positive: bool = False, otherwise: str = "a number") -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}={value!r}` must be {otherwise}.")
    number = float(value)
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise ValueError(
            f"`{name}={value!r}` must be {'positive' if positive else '0 or more'} and finite ({otherwise})."
        )
    return number


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"`{name}={value!r}` must be True or False.")
    return value


def _one_of(name: str, value: Any, choices: Sequence[Any], otherwise: str = "") -> Any:
    kind: type = str if isinstance(choices[0], str) else Real
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"`{name}={value!r}` must be one of {list(choices)}{otherwise}.")
    for choice in choices:
        if value == choice:
            return choice
    near = _nearest(value, choices) if isinstance(value, str) else ""
    raise ValueError(f"`{name}={value!r}` must be one of {list(choices)}{otherwise}.{near}")


def _depth(depth: Any) -> Any:
    if isinstance(depth, str):
        return _one_of("depth", depth, ("all", "best", "own"), otherwise=", a number of blocks or several")
    blocks = [depth] if isinstance(depth, Integral) else list(depth) if isinstance(depth, Sequence) else []
    if not blocks or not all(isinstance(block, Integral) and not isinstance(block, bool) for block in blocks):
        raise TypeError(f'`depth={depth!r}` must be "all", "best", "own", a number of blocks or a tuple of several.')
    if len(set(blocks)) < len(blocks):
        raise ValueError(f"`depth={depth!r}` must hold each block once.")
    return int(depth) if isinstance(depth, Integral) else tuple(int(block) for block in blocks)


def _members(members: Any, head: str) -> tuple[str, ...] | None:
    if members is None:
        return None
    if head != "blend":
        raise ValueError(
            f'`members={members!r}` are those of a blend, and `head="{head}"` is none: leave one of them out.'
        )
    names = [members] if isinstance(members, str) else list(members) if isinstance(members, Sequence) else [None]
    heads = ("ridge", "ridge-per-gene", "low-rank")
    known = [f"{network}:{name}" for network in ("frozen", "adapted") for name in heads]
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"`members={members!r}` must be several of {known}.")
        if name not in known:
            raise ValueError(f"`members`: {name!r} is none of {known}.{_nearest(name, known)}")
    if len(set(names)) < max(2, len(names)):
        raise ValueError(
            f"`members={members!r}` must be at least two, each once: a blend of one is that head, such as "
            '`head="low-rank"`.'
        )
    return tuple(names)


def _fields_um(fields_um: Any) -> Any:
    if fields_um is None or (isinstance(fields_um, str) and fields_um == "auto"):
        return fields_um
    problem = (
        f'`fields_um={fields_um!r}` must be widths in um beyond that of the tile, each once, such as (448,), "auto" or '
        "None."
    )
    if isinstance(fields_um, Real) and not isinstance(fields_um, bool):
        fields_um = (fields_um,)
    if not isinstance(fields_um, Sequence) or isinstance(fields_um, str) or not len(fields_um):
        raise TypeError(problem)
    if not all(isinstance(value, Real) and not isinstance(value, bool) for value in fields_um):
        raise TypeError(problem)
    widths = tuple(float(value) for value in fields_um)
    if len(set(widths)) < len(widths) or not all(0 < value < math.inf for value in widths):
        raise ValueError(problem)
    return widths


def _check_client(client: Any) -> None:
    from distributed import Client

    if not isinstance(client, Client):
        raise TypeError(
            f"`client` must be a distributed.Client, got {type(client).__name__}: `client=Client(cluster)` of "
            "`dask.distributed`, or leave it out to work in this process."
        )
    if client.asynchronous:
        raise ValueError("`client` is asynchronous: give a `distributed.Client` made without `asynchronous=True`.")
    if client.status != "running":
        raise ValueError(f"`client` is {client.status}: give a `distributed.Client` that is connected to its cluster.")
