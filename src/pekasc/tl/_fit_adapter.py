"""`tl.fit_adapter`: train an adapter, or fit the frozen encoder, on sections with measured expression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from peft import PeftConfig
from spatialdata import SpatialData

from pekasc._expression import TARGETS, Matrix, expressed_genes, of_genes
from pekasc._keys import ADAPTER, TILES, check_free, check_key, packed, write_uns
from pekasc._obsm import obsm_columns, obsm_of, target_label, training_target
from pekasc._options import FIT_MEMORY, Compute, Readout, Recipe
from pekasc._panels import Panels
from pekasc._sections import get_table, reference_stain, tiled_table, tissue_of, with_stain, writable_table
from pekasc._settings import get_logger
from pekasc.models import Adapter, Encoder, Teacher
from pekasc.models.encoders import EncoderNetwork
from pekasc.models.heads import check_radius, lattice_offsets, n_components_for, pitch_um
from pekasc.models.runtime import processes
from pekasc.models.selection import Data, HeadSpec, fit, kept_spots
from pekasc.models.teachers import TEACHERS, TeacherModel, precomputed
from pekasc.models.training import method_name
from pekasc.tiling import Stain
from pekasc.tl._call import fit_call
from pekasc.tl._options import FitCall, resolve_fit
from pekasc.tl._read import Spots, field_scales, fields_of, reading
from pekasc.tl._select import wanted_genes
from pekasc.tl._teachers import make_teacher, stored_key, stored_teacher

logger = get_logger(__name__)


def fit_adapter(
    sdata: SpatialData,
    *,
    encoder: str | Encoder = "tiny",
    teacher: str | Teacher = "pca",
    method: str | PeftConfig | None = "bone",
    train: Any = None,
    groups: str | None = None,
    genes: Any = None,
    panels: Mapping[str, Any] | None = None,
    layer: str | None = None,
    target: Literal["log1p", "as_is"] | Mapping[str, str] = "log1p",
    gene_key: str | None = None,
    recipe: Recipe | str | Mapping[str, Any] | None = None,
    readout: Readout | str | Mapping[str, Any] | None = None,
    compute: Compute | str | Mapping[str, Any] | None = None,
    table_name: str = "table",
    key: str = TILES,
    key_added: str = ADAPTER,
    random_state: int = 0,
    progress: bool = True,
) -> Adapter:
    """Train an encoder to predict gene expression from tiles, with all settings chosen on held-out training groups.

    PEKA: the teacher embeds the expression of every training spot, and k-means on the embeddings gives structure
    labels. A cluster head is trained to predict the labels from the embeddings, and frozen. An adapter inside the
    encoder and a projector are then trained so that the frozen cluster head gives the tile's embedding the teacher's
    class probabilities (knowledge distillation) and the spot's label (structure alignment). Last, expression is
    predicted as `readout` says: by default half by the frozen encoder, read at all depths, half by the adapted one.

    Everything is chosen, or averaged with weights, by the squared error on held-out groups: leave-one-group-out with at
    most three folds, or contiguous blocks of tissue with a margin if there is one group. The adapter's depth is chosen
    on the frozen encoder's features, which costs one pass, and it is trained in the blocks up to that depth. Zero
    epochs (the frozen encoder) is a candidate as well. The final fit uses all training spots and the chosen settings.

    Parameters
    ----------
    sdata
        Sections with tiles; tiled first, with the defaults of :func:`pekasc.pp.tile`, where they have none.
    encoder
        A name (``"tiny"`` comes with the package; any timm or ``hf-hub:`` name) or a :class:`pekasc.models.Encoder`.
    teacher
        ``"pca"``, ``"scvi"``, ``"scfoundation"``, a key of ``obsm``, or a :class:`pekasc.models.Teacher`, where each is
        described. An embedding in ``obsm`` must not have been fitted on spots that are tested later.
    method
        ``"bone"`` (Block-Affine adaptation), ``"bat"``, ``"lora"``, ``"dora"``, ``"adalora"``, ``"hra"``, any
        ``peft.PeftConfig``, or None for the frozen encoder with the same readout. A ``PeftConfig`` is applied to the
        layers that its ``target_modules`` names within a block, such as ``["attn.qkv", "mlp.fc1"]``, by default to the
        encoder's ``adapter_targets``.
    train
        Spots to train on: a boolean mask, a boolean column of obs, or a list of sections; all by default. Other spots
        are not read.
    groups
        Column of obs whose values are held out in turn. By default ``"patient"``, if there is such a column with two
        patients or more among the training spots, else sections.
    genes
        Genes to predict: names, a boolean mask, or a boolean column of var. By default those detected in at least 10 %
        of the spots of every training group that measured them.
    panels
        Genes that each region measured, where sections differ in them: a mapping from regions to names, a boolean mask
        or a boolean column of var. By default ``varm["measured"]``, a boolean DataFrame of genes x regions; without
        either, all sections measured all genes. Each gene is learned from, and scored in, the sections that measured
        it; totals are over the genes that all training sections measured, and so are the teacher and the components of
        a low-rank head.
    layer
        Layer with counts. By default ``X`` if it holds counts, else ``layers["counts"]``.
    target
        ``"log1p"``: log1p(1e4 * count / total of the spot). ``"as_is"``: log data as stored. ``{"obsm": key}``: no
        genes but the columns of ``obsm[key]`` as stored, such as cell-type proportions, pathway scores or an embedding;
        the teacher sees the counts all the same. Columns that vary more count for more in what is chosen.
    gene_key
        Column of var with the gene names of the adapter, which scFoundation expects to be symbols; by default
        ``var_names``.
    recipe
        How the adapter is trained: a :class:`pekasc.Recipe`, a mapping of its fields, or a preset. ``"paper"`` is the
        published training, whose sizes never adapt; it also sets ``readout="paper"`` unless `readout` is given.
    readout
        Which features are used and how genes are predicted from them: a :class:`pekasc.Readout`, a mapping of its
        fields, or a preset.
    compute
        Where and how the call runs: a :class:`pekasc.Compute`, or a mapping of its fields.
    table_name
        Name of the table.
    key
        Name of the tiles.
    key_added
        Key in ``uns["pekasc"]`` for the summary of the fit.
    random_state
        Seed. The same seed gives the same adapter on the same machine.
    progress
        Show progress bars.

    Returns
    -------
    The fitted :class:`pekasc.Adapter`. Writes ``uns["pekasc"][key_added]``, a summary of the fit with a ``profile``
    (seconds of reading, encoding, training and head, tiles per second, peak memory), and what :func:`pekasc.pp.tile`
    writes if there were no tiles.

    Raises
    ------
    KeyError
        If a layer, column, gene, section, the target or the teacher's embedding is not there, or a region has no panel.
    TypeError
        If an argument or a field of an option has a wrong type, or ``varm["measured"]`` is not boolean.
    ValueError
        If sections share no gene, or a gene is in no panel. If counts are needed and there are none, sizes are
        too large for the training spots, the encoder does not accept tiles of this size or has no layers to
        adapt, or genes do not overlap. If a target in obsm is no table of finite numbers, or constant. If a
        field of an option is unknown or does nothing in this call. With ``readout.stain``, if a section has too
        little tissue or is no H&E. If a device is not available, or the checkpoints in ``compute.resume`` are
        of other settings or data.
    FloatingPointError
        If the loss becomes NaN or infinite. The message names the step; the attribute ``last_good`` (with
        ``compute.resume``, a file there) holds the trained weights before it.
    RuntimeError
        If a callback in ``compute.trainer`` stops a training early, or another process failed.
    OSError
        If the encoder's weights cannot be downloaded or read, or a file of the teacher is missing. If there is no disk
        space for cached activations, before anything is trained.
    ImportError
        If the teacher is scVI and it is not installed.

    References
    ----------
    Pan, Chen, Secrier. Teaching pathology foundation models to accurately predict gene expression with parameter
    efficient knowledge transfer. arXiv:2504.07061 (MICCAI 2025). Adapters: the PEFT library.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=1, size_um=700)
    >>> pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    >>> adapter = pk.tl.fit_adapter(sdata, method=None, progress=False)
    >>> adapter.method
    'frozen'
    """
    check_key(key_added)
    call = resolve_fit(encoder, teacher, method, recipe, readout, compute, random_state, progress)
    table_name = tiled_table(sdata, table_name)
    table = get_table(sdata, table_name)
    check_free(table, key_added, "adapter")
    obsm_key = obsm_of(target)
    if obsm_key is not None:
        obsm_columns(table, obsm_key)  # its form, before anything else is read
        if genes is not None:
            raise ValueError(f"`genes=` does nothing with `target={target}`: all columns of that obsm are predicted.")
    with reading(
        sdata, table_name=table_name, key=key, layer=layer, target=target, gene_key=gene_key, train=train,
        groups=groups, panels=panels, mixed=True,
    ) as spots:  # fmt: skip
        fields_um = fields_of(
            spots, call.options.readout,
            lambda width: kept_spots(spots.groups, spots.coords_um, spots.labels, spots.spec, width),
        )  # fmt: skip
        options = replace(call.options, fields_um=fields_um)
        data, teacher_model, model, reference = _inputs(replace(call, options=options), spots, genes, target)
        adapter = fit(model, spots.spec, data, teacher_model, options, [HeadSpec(options.readout)])[0]
    info = {**adapter.info, **_target_info(target), "layer": layer or ""}
    info["call"] = fit_call(
        call,
        {
            "encoder": encoder, "method": method, "train": train, "groups": groups, "genes": genes, "panels": panels,
            "layer": layer, "target": None if target == "log1p" else target, "gene_key": gene_key,
        },
    )  # fmt: skip
    if target == "log1p":
        info["n_genes_in_total"] = int(spots.names.size if spots.panels is None else spots.panels.shared.sum())
    if spots.panels is not None and target == "log1p":
        info["total_genes"] = [str(name) for name in spots.names[spots.panels.shared]]
    smooth_um = adapter.reading.smooth_um
    radii = {*adapter.reading.radii_um, *([] if smooth_um is None else [smooth_um])}
    if radii:
        found = {radius: lattice_offsets(spots.coords_um, spots.labels, radius) for radius in radii}
        info["neighbour_offsets_um"] = {
            f"{radius:g}": [] if offsets is None else np.round(offsets, 3).tolist() for radius, offsets in found.items()
        }
        info["pitch_um"] = pitch_um(spots.coords_um, spots.labels)
    adapter = replace(adapter, info=info, stain=reference, trained_on=tissue_of(spots.sections))
    write_uns(writable_table(sdata, table_name), key_added, _record(adapter), kind="adapter")
    return adapter


def _target_info(target: Any) -> dict[str, Any]:
    """Return what an adapter keeps of its target."""
    key = obsm_of(target)
    return {"target": TARGETS[target]} if key is None else {"target": f"{target_label(key)}, as stored", "obsm": key}


@dataclass(frozen=True)
class _Predicted:
    """What is predicted: names and values of genes, or of the columns of an obsm, spots x columns."""

    names: np.ndarray
    values: Matrix
    every: Matrix  # whose components a low-rank head predicts
    text: str
    panels: Panels | None = None


def _predicted(spots: Spots, found: np.ndarray, expressed: np.ndarray, genes: Any, target: Any) -> _Predicted:
    key = obsm_of(target)
    if key is not None:
        names, values = training_target(spots.table, key, spots.rows)
        return _Predicted(names, values, values, f"{len(names)} columns of {target_label(key)}")
    at = found if genes is None else wanted_genes(spots.table, spots.names, genes, spots.columns)

    def of(columns: np.ndarray) -> Matrix:
        return spots.expression if columns.size == spots.names.size else spots.expression[:, columns]

    which = " that measured them" if spots.panels is not None else ""
    default = f", detected in 10 % of the spots of every group{which}" if genes is None else ""
    return _Predicted(spots.names[at], of(at), of(expressed), f"{at.size} genes{default}", _panels_of(spots, at))


def _inputs(
    call: FitCall, spots: Spots, genes: Any, target: Any
) -> tuple[Data, TeacherModel | None, EncoderNetwork, Stain | None]:
    """Return arrays, teacher, encoder and the stain's reference; wrong arguments raise before any pixel is read."""
    options, readout = call.options, call.options.readout
    found = expressed_genes(spots.expression, spots.groups, spots.panels)
    # what the teacher and the components of a low-rank head are of
    expressed = found if spots.panels is None else found[spots.panels.shared[found]]
    predicted = _predicted(spots, found, expressed, genes, target)
    # only a teacher needs genes where the target is another
    if not expressed.size and (obsm_of(target) is None or options.method is not None):
        raise ValueError(
            "No gene is detected in at least 10 % of the spots of every training group: the sections share too little, "
            "or the counts are too shallow."
        )
    _log_choices(call, spots, predicted.text)
    teacher = _teacher(call, spots, expressed)
    if readout.context_um != "auto":
        check_radius(spots.coords_um, spots.labels, readout.context_um)
    model = EncoderNetwork(call.encoder, spots.spec.tile_px)
    local = None
    if processes.n_ranks() > 1:
        local = np.flatnonzero(processes.owners(spots.labels, spots.stream.reading_order) == processes.rank())
    scales = field_scales(spots.spec, options.fields_um)
    n_read = (spots.rows.size if local is None else local.size) * len(scales)
    with options.profile.stage("reading", n_read):
        spots, reference = _stained(spots, readout.stain)
        tiles, *further = spots.read_tiles(scales, options.compute.memory(FIT_MEMORY), local)
    data = Data(
        tiles=tiles,
        further=further,
        expression=predicted.values,
        genes=[str(name) for name in predicted.names],
        groups=spots.groups,
        sections=spots.labels,
        coords_um=spots.coords_um,
        local=local,
        every=predicted.every,
        totals=None if target == "as_is" else spots.totals,
        counts=target == "log1p",
        panels=predicted.panels,
    )
    return data, teacher, model, reference


def _stained(spots: Spots, method: str | None) -> tuple[Spots, Stain | None]:
    """Return the spots with tiles brought to the mean colours of their sections, and those."""
    if method is None:
        return spots, None
    reference, own = reference_stain(spots.sections, spots.spec, method)
    logger.hint("Stain: colours by %r, brought to the mean of %d training sections.", method, len(own))
    return replace(spots, sections=with_stain(spots.sections, spots.spec, reference, own)), reference


def _panels_of(spots: Spots, predicted: np.ndarray) -> Panels | None:
    """Return which spots measured which of the predicted genes; None if all measured all of them."""
    if spots.panels is None:
        return None
    nowhere = predicted[spots.panels.n_spots()[predicted] == 0]
    if nowhere.size:
        raise ValueError(
            f"{nowhere.size} of the {predicted.size} genes asked for are in the panel of no training section: "
            f"{[str(name) for name in spots.names[nowhere[:5]]]}. Leave them out (`genes=`), or train on sections that "
            "measured them."
        )
    panels = spots.panels.columns(predicted)
    return None if panels.genes.all() else panels


def _teacher(call: FitCall, spots: Spots, expressed: np.ndarray) -> TeacherModel | None:
    """Return the teacher of the training spots; None for the frozen encoder, which needs none."""
    teacher, options = call.teacher, call.options
    stored = stored_key(spots.table, teacher)
    if options.method is None:
        return None
    if stored is not None:
        return stored_teacher(spots.table, stored, teacher.name, spots.rows)
    row = TEACHERS[teacher.name]
    n_components = options.recipe.teacher_components if teacher.name == "pca" else None
    if teacher.name == "pca":
        n_components_for(spots.rows.size, expressed.size, n_components, "teacher_components")
    # of the genes that all sections measured
    shared = np.arange(spots.names.size) if spots.panels is None else np.flatnonzero(spots.panels.shared)
    made = make_teacher(
        teacher, expression=of_genes(spots.expression, shared),
        counts=of_genes(spots.counts, shared) if row.counts else None, genes=spots.names[shared],
        expressed=np.searchsorted(shared, expressed), n_components=n_components, device=options.device,
        precision=options.precision, random_state=options.random_state, progress=options.progress,
    )  # fmt: skip
    # a frozen teacher's embedding is the same in every fold: compute it once, before hours of training
    return made if row.fitted else precomputed(made)


def _log_choices(call: FitCall, spots: Spots, predicted: str) -> None:
    method = call.options.method
    teacher = f', teacher="{call.teacher.name}"' if method is not None else ""
    logger.hint('encoder="%s"%s, method="%s".', call.encoder.short, teacher, method_name(method))
    names = [str(name) for name in np.unique(spots.groups)]
    where = "sections" if spots.group_key is None else f"obs[{spots.group_key!r}]"
    logger.hint("Training on %d spots.", spots.rows.size)
    if len(names) == 1:
        logger.hint("One training group (%s): blocks of its tissue are held out in turn, with a margin.", names[0])
    else:
        logger.hint("Held out in turn: %s (%s).", where, ", ".join(names[:6]) + (", ..." if len(names) > 6 else ""))
    logger.hint("%s.", predicted)


def _record(adapter: Adapter) -> dict[str, Any]:
    return {
        **adapter.info,
        "encoder": packed(adapter.encoder.to_dict()),
        "encoder_digest": adapter.encoder_digest,
        "method": adapter.method,
        "depth": "own" if adapter.depth is None else list(adapter.depth),
        "tile_px": adapter.spec.tile_px,
        "mpp": adapter.spec.mpp,
        "n_genes": len(adapter.genes),
        "gene_scores": adapter.gene_scores,
    }
