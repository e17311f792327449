"""Everything that the result of a fit depends on, as plain values and digests, to check the folder of checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
from peft import PeftConfig
from scipy import sparse

from pekasc._digests import fingerprint, plain
from pekasc._expression import Matrix
from pekasc.models.encoders import EncoderNetwork
from pekasc.models.features import EmbedJob, tiles_digest
from pekasc.models.runtime import processes
from pekasc.models.selection._inputs import Data, HeadSpec, Options
from pekasc.models.teachers import TeacherModel


def _matrix_print(matrix: Matrix) -> str:
    """Return the fingerprint of a dense or sparse matrix."""
    if sparse.issparse(matrix):
        return fingerprint(matrix.data, matrix.indices, matrix.indptr)
    return fingerprint(np.asarray(matrix))


def _teacher_inputs(teacher: TeacherModel) -> list[str]:
    """Return digests of the matrices of a teacher, which may have other genes than the predicted ones."""
    found = []
    for name, value in sorted(vars(teacher).items()):
        if sparse.issparse(value) or isinstance(value, np.ndarray):
            found.append(f"{name} {_matrix_print(value)}")
        elif isinstance(value, int | float | str | None):
            found.append(f"{name} {value}")
    return found


_READOUT_FIELDS = ("depth", "orientations")
# these change rounding: a resumed fit must give bit-identical results
_COMPUTE_FIELDS = (
    "precision", "embed_batch_size", "accumulate", "gradient_checkpointing", "compile", "cached_activations",
)  # fmt: skip
_TRAINER_ARGUMENTS = ("precision",)  # others do not change results


def settings_of(
    model: EncoderNetwork, data: Data, teacher: TeacherModel | None, options: Options, heads: Sequence[HeadSpec]
) -> dict[str, Any]:
    """Return everything that the result of a fit depends on: plain values, and digests of the data."""
    o, encoder = options, model.encoder
    job = EmbedJob(
        encoder, model.digest, model.tile_px, None, 1, o.compute.embed_batch_size, str(o.device), o.precision
    )
    method = o.method.to_dict() if isinstance(o.method, PeftConfig) else o.method
    own = np.arange(data.tiles.n) if data.local is None else data.local
    return {
        "encoder": job.digest(model),
        "adapter_targets": encoder.adapter_targets,
        "method": json.loads(json.dumps(method, default=plain)),
        # by number, so that an error names the field that differs
        "heads": {str(i): asdict(head) for i, head in enumerate(heads)},
        "fields_um": list(o.fields_um),
        "recipe": asdict(o.recipe),
        "readout": {name: getattr(o.readout, name) for name in _READOUT_FIELDS},
        "compute": {name: getattr(o.compute, name) for name in _COMPUTE_FIELDS},
        "trainer": {name: str(o.trainer[name]) for name in _TRAINER_ARGUMENTS if name in o.trainer},
        "device": o.device.type,
        "random_state": o.random_state,
        "tile_px": data.tiles.tile_px,
        "tiles": processes.all_gather([tiles_digest(source, own) for source in (data.tiles, *data.further)]),
        "expression": _matrix_print(data.expression),
        "every gene": None if data.every is None else _matrix_print(data.every),
        "totals": None if data.totals is None else fingerprint(data.totals),
        "panels": None if data.panels is None else fingerprint(data.panels.panel, data.panels.genes),
        "genes": fingerprint(np.array(list(data.genes), dtype=object)),
        "groups": fingerprint(data.groups.astype("U"), data.sections.astype("U"), data.coords_um),
        "teacher": None if teacher is None else [teacher.name, teacher.digest, *_teacher_inputs(teacher)],
        "processes": processes.n_ranks(),
        "versions": {name: version(name) for name in ("pekasc", "torch", "timm", "peft", "lightning")},
    }
