"""`tl.fit_adapter`: read training spots, hand arrays to the fit, record what was done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from peft import PeftConfig
from spatialdata import SpatialData

from pekasc._expression import Matrix, counts, gene_names, target_matrix
from pekasc._keys import ADAPTER, TILES, check_free, check_key, write_uns
from pekasc._sections import check_table, get_table, section_labels, writable_table
from pekasc._settings import get_logger
from pekasc.models import Adapter, Encoder, _ranks
from pekasc.models._context import check_radius
from pekasc.models._embed import autocast, resolve_device
from pekasc.models._encoders import resolve_encoder
from pekasc.models._fit import fit
from pekasc.models._fit_job import Data, Options, Reader
from pekasc.models._head_methods import check_head
from pekasc.models._heads import n_components_for
from pekasc.models._methods import check_method
from pekasc.models._profile import Profile
from pekasc.models._teachers import TEACHERS, Source, Teacher, asked_once
from pekasc.models._training import Engine, check_trainer
from pekasc.tl import _inputs
from pekasc.tl._options import (
    check_context,
    check_engine,
    check_orientations,
    check_scales,
    make_recipe,
    wanted_blocks,
    wanted_depth,
    wanted_spec,
    whole,
)
from pekasc.tl._teachers import stored_key, stored_teacher

logger = get_logger(__name__)


def fit_adapter(
    sdata: SpatialData,
    *,
    encoder: str | Encoder = "tiny",
    teacher: str = "pca",
    checkpoint: str | Path | None = None,
    method: str | PeftConfig | None = "bone",
    blocks: Literal["auto", "all"] | int = "auto",
    depth: int | tuple[int, ...] | None = None,
    train: Any = None,
    groups: str | None = None,
    genes: Any = None,
    layer: str | None = None,
    target: Literal["log1p", "as_is"] = "log1p",
    gene_key: str | None = None,
    preset: Literal["paper"] | None = None,
    rank: int | None = None,
    n_clusters: int | None = None,
    n_components: int | None = None,
    epochs: int | None = None,
    learning_rate: float | None = None,
    kd_weight: float | None = None,
    matching_weight: float | None = None,
    temperature: float | None = None,
    n_views: int | None = None,
    patience: int | None = None,
    head: Literal["ridge", "ridge-per-gene", "mlp"] = "ridge",
    context_um: float | None = None,
    scales: Sequence[float] = (1,),
    orientations: int = 1,
    batch_size: int = 64,
    device: str = "auto",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    prefix: Literal["fp16", "fp32"] | None = "fp16",
    store: str | Path | None = None,
    trainer: Mapping[str, Any] | None = None,
    accumulate: int = 1,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    resume: str | Path | None = None,
    checkpoint_minutes: float = 5,
    tile_px: int | None = None,
    mpp: float | None = None,
    images: dict[str, str] | None = None,
    image_mpp: float | dict[str, float] | None = None,
    um_coordinate_system: str | None = None,
    array: str | None = None,
    table_name: str = "table",
    key: str = TILES,
    key_added: str = ADAPTER,
    random_state: int = 0,
    max_memory: int = 2 * 2**30,
    progress: bool = True,
) -> Adapter:
    """Teach an image encoder to predict gene expression, and choose everything on held-out training groups.

    PEKA: the teacher embeds every training spot's expression, k-means gives structure labels, a cluster head learns
    them and is frozen; an adapter inside the encoder and a projector learn to give, from the tile, an embedding that
    the cluster head judges as it judges the teacher's (knowledge distillation) and that falls into the spot's cluster
    (structure alignment). Then standardisation, PCA and ridge predict expression from the adapted features.

    Depth, epochs and penalty are those with the smallest squared error on held-out groups: each group in turn (at most
    three folds), or contiguous blocks of tissue with a margin where there is one group. Depth is chosen on the frozen
    encoder's features, which cost one pass; the adapter is trained in the blocks up to there. Zero epochs, the frozen
    encoder, is among the choices. Last comes one fit on all training spots with what was chosen.

    Parameters
    ----------
    sdata
        Sections with tiles; tiled first, with the defaults of :func:`pekasc.pp.tile`, where they have none.
    encoder
        A name (``"tiny"`` comes with the package; any timm or ``hf-hub:`` name) or a :class:`pekasc.models.Encoder`.
    teacher
        ``"pca"`` of log-normalised expression or ``"scvi"`` (latent means of 10 dimensions, 100 epochs on the counts;
        needs ``pip install "pekasc[scvi]"``), both fitted on the training spots of each fold; ``"scfoundation"``,
        frozen, from `checkpoint`; or a key of ``obsm``. A stored embedding must not have been fitted on spots that
        are tested later.
    checkpoint
        Folder with scFoundation's official files ``models.ckpt`` and ``OS_scRNA_gene_index.19264.tsv``. Without it,
        ``teacher="scfoundation"`` is what :func:`pekasc.tl.embed_expression` stored.
    method
        ``"bone"`` (Block-Affine adaptation), ``"bat"``, ``"lora"``, ``"dora"``, ``"adalora"``, ``"hra"``, any
        ``peft.PeftConfig``, or None for the frozen encoder with the same head. A configuration attaches to the layers
        that its ``target_modules`` names within a block, such as ``["attn.qkv", "mlp.fc1"]``, else to the encoder's
        ``adapter_targets``.
    blocks
        Adapt the last few blocks up to `depth`, or ``"all"`` of them. ``"auto"`` is the last four, fewer where training
        them does not fit the memory that is free, all where an encoder's blocks cannot be run one by one; the log says.
    depth
        Number of blocks after which features are taken, or several, whose features are concatenated; -1 is the last.
        None chooses. Blocks after it do not run.
    train
        Spots to learn from: a boolean mask, a boolean column of obs, or a list of sections; all by default. Nothing
        outside is looked at.
    groups
        Column of obs whose values are held out in turn. By default ``"patient"``, if there is such a column with two
        patients or more among the training spots, else sections.
    genes
        Genes to predict: names, a boolean mask, or a boolean column of var. By default those seen in at least 10 % of
        the spots of every training group.
    layer
        Layer with counts. By default ``X`` if it holds counts, else ``layers["counts"]``.
    target
        ``"log1p"``: log1p(1e4 * count / total of the spot). ``"as_is"``: log data as stored.
    gene_key
        Column of var with the names that the adapter is to use, and by which scFoundation finds its genes (symbols);
        by default ``var_names``.
    preset
        ``"paper"``: the published training, exactly (rank 256, 100 clusters, 256 components, 50 epochs, the encoder's
        own output as features, all blocks); sizes never adapt. The head is that of every method here: its features are
        standardised, and its penalty is chosen on held-out groups.
    rank, n_clusters, n_components, epochs, learning_rate, kd_weight, matching_weight, temperature
        Change single numbers: rank of the adapter (64; a ``PeftConfig`` has its own), structure labels
        (``min(100, n // 20)``), principal components of teacher and head (``min(256, n - 1, d)``), most epochs to try
        (6), learning rate (3e-4), weight of distillation against structure alignment (0.5), weight of feature
        matching beside both (0), temperature of the distillation (2).
    n_views
        Train on so many fixed turns and flips of a tile: 1 (as it is), 2, 4 or 8 (the default; 1 in the preset).
    patience
        Inner folds end after so many epochs without a smaller held-out error; epochs are chosen among those that all
        folds ran. None runs all `epochs`.
    head
        From features to genes, on standardised principal components: ``"ridge"`` with one penalty,
        ``"ridge-per-gene"`` with one for each gene, or ``"mlp"``, a perceptron with two hidden layers.
    context_um
        Spatial context: the head also reads the mean features of the neighbours within so many micrometers. The depth
        of an adapter is chosen without it, penalty and epochs with it.
    scales
        Tiles at several scales: multiples of the pixel size at which the tissue around a spot is read, in as many
        pixels; 1, the tile itself, comes first. Features stand side by side; the adapter is trained on the tile itself.
        Scales and orientations multiply: ``scales=(1, 2), orientations=8`` are 16 passes through the encoder, after
        every epoch of every inner fold too. Inner folds keep the widest tiles apart.
    orientations
        Several views: features are the mean over so many turns and flips of a tile, of training spots and of those that
        are predicted alike: 1; 2, also half round; 4, all quarter turns; 8, their mirror images too.
    batch_size
        Tiles at once when embedding.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
    precision
        ``"fp32"``, ``"bf16"`` or, on a GPU, ``"fp16"``. In half precision the frozen weights are kept in it, without
        a copy in full; the adapter's stay in full.
    prefix
        Blocks before the first adapted one are frozen, so that what they make of a tile is computed once for each view
        and kept, in half (``"fp16"``) or full precision. None keeps nothing and runs all blocks in every epoch.
    store
        Folder for the prefix where it does not fit `max_memory` (a zarr group, as of :func:`pekasc.tl.embed_tiles`; a
        later call with the same encoder and tiles finds it); a temporary one by default.
    trainer
        Arguments that go straight to :class:`lightning.Trainer`, for every training: ``accelerator``, ``devices``,
        ``strategy``, ``num_nodes``, ``precision``, ``callbacks``, ``logger`` and others. With several devices
        (``{"devices": 4, "strategy": "ddp"}``, in a script, or processes of ``torchrun`` or a cluster) each process
        reads and embeds its own part of every section, and a batch is shared among them: the losses are those of one
        device. The call is made, and returns the same, in every process. Callbacks and loggers see every training in
        turn, of the inner folds and then the final one; those that change what is learned are refused.
    accumulate
        Run every batch in so many parts, one after the other: the same gradients from less memory.
    gradient_checkpointing
        Compute blocks again in the backward pass instead of keeping their activations: less memory, more time.
    compile
        ``torch.compile`` the trained blocks: pays on a GPU with many tiles, hardly on a CPU.
    resume
        Folder for the state of the fit: what is finished, and every few minutes what is not. The same call goes on from
        there after it was killed, and ends with the same weights. A prefix that does not fit the memory lies there,
        too, unless `store` is given. Delete the folder when the adapter is saved.
    checkpoint_minutes
        Minutes between two states of a training.
    tile_px, mpp, images, image_mpp, um_coordinate_system, array
        How to tile, for sections without tiles; see :func:`pekasc.pp.tile`. All sections of the table are tiled, so
        that it can be predicted next; only the tiles of training spots are read.
    table_name
        Name of the table.
    key
        Name of the tiles.
    key_added
        Where the record of the fit goes in ``uns["pekasc"]``.
    random_state
        Seed of every random number. The same seed gives the same adapter on the same machine.
    max_memory
        Bytes of tiles to keep in memory (of all scales together), as many of features, and as many of the prefix; more
        go to files.
    progress
        Show progress bars.

    Returns
    -------
    The fitted :class:`pekasc.Adapter`. Writes ``uns["pekasc"][key_added]``, a summary (with a ``profile``: seconds in
    reading, encoding, training and head, tiles per second, peak memory), and what :func:`pekasc.pp.tile` writes if
    there were no tiles.

    Raises
    ------
    KeyError
        If a layer, column, gene, section or the teacher's embedding is not there.
    ValueError
        If counts are needed and there are none, sizes do not fit the training spots, the encoder cannot take the
        tiles or has no layers to adapt, or genes do not overlap. If devices are not there, or the folder `resume` is
        of other settings or data.
    FloatingPointError
        If the loss is no number any more: it says at which step, and its ``last_good`` (with `resume`, a file there)
        holds the trained weights before that.
    RuntimeError
        If a callback in `trainer` ends a training after an epoch, or another process failed.
    OSError
        If the encoder's weights cannot be fetched or read, or a file of the teacher's checkpoint. If there is no room
        for the prefix; nothing was trained then.
    ImportError
        If scVI is asked for and not installed.

    References
    ----------
    Pan, Chen, Secrier. Teaching pathology foundation models to accurately predict gene expression with parameter
    efficient knowledge transfer. arXiv:2504.07061 (MICCAI 2025). Adapters: the PEFT library.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=1, size_um=1000)
    >>> pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    >>> adapter = pk.tl.fit_adapter(sdata, method=None, progress=False)
    >>> adapter.method
    'frozen'
    """
    check_key(key_added)
    check_head(head)
    check_context(context_um)
    scales, orientations = check_scales(scales), check_orientations(orientations)
    row = resolve_encoder(encoder)
    method = check_method(method)
    recipe = make_recipe(
        preset, rank=rank, n_clusters=n_clusters, epochs=epochs, learning_rate=learning_rate,
        kd_weight=kd_weight, matching_weight=matching_weight,
        temperature=temperature, n_views=n_views, patience=patience,
    )  # fmt: skip
    trainer_arguments = check_trainer(trainer)
    check_engine(prefix, accumulate, checkpoint_minutes)
    if precision != "fp32" and "precision" in trainer_arguments:
        raise ValueError(f"`precision={precision!r}` and `trainer`'s precision say it twice: leave one of them out.")
    if n_components is not None:
        n_components = whole("n_components", n_components)
    blocks = wanted_blocks(blocks)
    if preset == "paper" and blocks == "auto":
        blocks = "all"  # as published
    if preset == "paper" and n_components is None:
        n_components = 256
    place, trainer_arguments = _ranks.launch(trainer_arguments, resolve_device(device))
    autocast(place, precision)
    profile = Profile()
    table = get_table(sdata, table_name)
    check_table(table)
    check_free(table, key_added, "adapter")
    mask = _inputs.training_mask(table, train)
    names = gene_names(table, gene_key)

    # only training rows of the matrix are ever read
    candidates = np.flatnonzero(mask)
    expression = target_matrix(table if mask.all() else table[candidates], layer, target)
    asked = None if genes is None else _inputs.wanted_genes(table, names, genes)
    stored = stored_key(table, teacher, checkpoint)

    pixel_size = {
        "images": images,
        "image_mpp": image_mpp,
        "um_coordinate_system": um_coordinate_system,
        "array": array,
    }
    spec_wanted = wanted_spec(tile_px, mpp)
    with _inputs.untiled_on_error(sdata, table_name=table_name, key=key):
        sections, spec = _inputs.ensure_tiles(
            sdata, table_name=table_name, key=key, pixel_size=pixel_size, spec=spec_wanted
        )
        if spec_wanted is not None and spec != spec_wanted:
            raise ValueError(
                f"The table has tiles {key!r} of {spec.tile_px} px at {spec.mpp:g} um/px; `tile_px`/`mpp` ask for "
                f"{spec_wanted.tile_px} px at {spec_wanted.mpp:g}. Leave them out, or run `pekasc.pp.tile` again."
            )
        keep = _usable(expression, target)
        usable = np.zeros(table.n_obs, dtype=bool)
        usable[candidates[keep]] = True
        training = [section.take(usable[section.rows]) for section in sections]
        training = [section for section in training if section.rows.size]
        if not training:
            raise ValueError("No training spot has both a tile and counts.")
        stream, rows = _inputs.tile_stream(training, spec)
        _log_left_out(candidates, keep, rows)
        if not np.array_equal(rows, candidates):  # no second copy of all counts where they are in order
            expression = expression[np.searchsorted(candidates, rows)]

        groups = _inputs.default_groups(table, rows) if groups is None else groups
        labels = _inputs.obs_groups(table, groups, rows)
        expressed = _inputs.expressed_genes(expression, labels)
        predicted = expressed if asked is None else asked
        if not expressed.size:
            raise ValueError(
                "No gene is seen in at least 10 % of the spots of every training group: the sections share too little, "
                "or the counts are too shallow."
            )
        _log_choices(row, teacher, method, groups, labels, predicted, asked is None)
        lessons: Teacher
        if stored is not None:
            lessons = stored_teacher(table, stored, teacher, rows)
        else:
            if teacher == "pca":
                n_components_for(rows.size, expressed.size, n_components)
            row_of_teacher = TEACHERS[teacher]
            source = Source(
                expression=expression,
                # log data as stored are no counts: those are looked for where they are by default
                counts=counts(table[rows], layer if target == "log1p" else None) if row_of_teacher.counts else None,
                genes=names,
                expressed=expressed,
                # scVI's latent dimensions are no principal components
                n_components=n_components if teacher == "pca" else None,
                checkpoint=checkpoint,
                device=place,
                precision=precision,
                random_state=random_state,
                progress=progress,
            )
            lessons = row_of_teacher.make(source)
            if method is not None and not row_of_teacher.fitted:
                # the same in every fold: once, and before hours of training
                lessons = asked_once(lessons)
        of = section_labels(table)[rows]
        mine = None
        if _ranks.n_ranks() > 1:
            mine = np.flatnonzero(_ranks.owners(of, stream.reading_order) == _ranks.rank())
        with profile.stage("reading", (rows.size if mine is None else mine.size) * len(scales)):
            tiles, *further = _inputs.cached_scales(stream, training, spec, scales, max_memory, mine)
        data = Data(
            tiles=tiles,
            further=further,
            expression=expression if predicted.size == expression.shape[1] else expression[:, predicted],
            genes=[str(name) for name in names[predicted]],
            groups=labels,
            sections=of,
            coords_um=np.concatenate([section.centres_um for section in training]),
            mine=mine,
        )
        check_radius(data.coords_um, data.sections, context_um)
        options = Options(
            method=method,
            blocks=blocks,
            depth=wanted_depth(depth, preset),
            recipe=recipe,
            n_components=n_components,
            batch_size=batch_size,
            device=place,
            precision=precision,
            random_state=random_state,
            progress=progress,
            max_memory=max_memory,
            scales=scales,
            orientations=orientations,
            prefix=prefix,
            store=None if store is None else Path(store),
            resume=None if resume is None else Path(resume),
            engine=Engine(
                place, precision, progress, trainer_arguments, accumulate, gradient_checkpointing, compile,
                checkpoint_minutes,
            ),
            profile=profile,
        )  # fmt: skip
        adapter = fit(row, spec, data, lessons, options, [Reader(head, context_um)])[0]
    info = {**adapter.info, "target": "log1p(counts per 10,000)" if target == "log1p" else "as stored"}
    adapter = replace(adapter, info=info, trained_on=_inputs.places(training))
    write_uns(writable_table(sdata, table_name), key_added, _record(adapter), kind="adapter")
    return adapter


def _usable(expression: Matrix, target: str) -> np.ndarray:
    """Return which rows have anything to learn from: a spot without counts has no log-normalised expression."""
    if target == "as_is":
        return np.ones(expression.shape[0], dtype=bool)
    return np.asarray(expression.sum(axis=1)).ravel() > 0


def _log_left_out(candidates: np.ndarray, keep: np.ndarray, rows: np.ndarray) -> None:
    empty, untiled = int((~keep).sum()), int(keep.sum() - rows.size)
    if empty or untiled:
        logger.hint("Left out of training: %d spots without counts, %d without a tile.", empty, untiled)
    logger.hint("Training on %d of %d spots.", rows.size, candidates.size)


def _log_choices(
    encoder: Encoder,
    teacher: str,
    method: Any,
    groups: str | None,
    labels: np.ndarray,
    genes: np.ndarray,
    default: bool,
) -> None:
    logger.hint('encoder="%s", teacher="%s", method=%r.', encoder.short, teacher, method)
    names = [str(name) for name in np.unique(labels)]
    where = "sections" if groups is None else f"obs[{groups!r}]"
    logger.hint("Held out in turn: %s (%s).", where, ", ".join(names[:6]) + (", ..." if len(names) > 6 else ""))
    logger.hint("%d genes%s.", genes.size, ", seen in 10 % of spots of every group" if default else "")


def _record(adapter: Adapter) -> dict[str, Any]:
    return {
        **adapter.info,
        "encoder": adapter.encoder.to_dict(),
        "encoder_digest": adapter.encoder_digest,
        "method": adapter.method,
        "depth": "own" if adapter.depth is None else list(adapter.depth),
        "tile_px": adapter.spec.tile_px,
        "mpp": adapter.spec.mpp,
        "n_genes": len(adapter.genes),
        "gene_scores": adapter.gene_scores,
    }
