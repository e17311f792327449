"""`Teacher`, the description of a teacher, and the interface of teacher models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pekasc._options import whole


@dataclass(frozen=True)
class Teacher:
    """Describe a teacher: a model that embeds expression, from which the adapter learns by distillation.

    Pass it as ``teacher=``, where a name is not enough.

    Parameters
    ----------
    name
        ``"pca"`` of log-normalised expression or ``"scvi"`` (10 latent dimensions, 100 epochs on the counts; needs
        ``pip install "pekasc[scvi]"``), both fitted on the training spots of each fold; ``"scfoundation"``, a frozen
        model from `files`; or a key of ``obsm``. An embedding in ``obsm`` must not have been fitted on spots that are
        tested later.
    files
        Folder with the official files of a frozen teacher; for scFoundation ``models.ckpt`` and
        ``OS_scRNA_gene_index.19264.tsv``, which have a licence of their own. Without files, the embedding that
        :func:`pekasc.tl.embed_expression` stored in ``obsm`` is used.
    max_tokens
        scFoundation: maximum number of tokens per batch, one for every expressed gene of a spot. Fewer need less
        memory; None is 16,384.

    Examples
    --------
    >>> import pekasc as pk
    >>> pk.models.Teacher("scfoundation", files="scfoundation").name
    'scfoundation'
    """

    name: str
    files: str | Path | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"`name` of a Teacher must be a string, got {type(self.name).__name__}.")
        if self.files is not None and not isinstance(self.files, str | Path):
            raise TypeError(f"`files={self.files!r}` of a Teacher must be the path of a folder.")
        if self.max_tokens is not None:
            object.__setattr__(self, "max_tokens", whole("max_tokens", self.max_tokens, least=1))


def resolve_teacher(teacher: Any) -> Teacher:
    """Return the :class:`Teacher` for a name, or a :class:`Teacher` unchanged.

    Raises
    ------
    TypeError
        If it is neither.
    """
    if isinstance(teacher, Teacher):
        return teacher
    if not isinstance(teacher, str):
        raise TypeError(
            f"`teacher` must be a name, a key of `obsm` or a pekasc.models.Teacher, got {type(teacher).__name__}."
        )
    return Teacher(teacher)


class TeacherModel(Protocol):
    """Interface of a teacher."""

    name: str
    licence: str | None  # of pretrained weights
    digest: str | None  # of pretrained weights
    n_spots: int
    n_genes: int | None  # None if unknown

    def embed(self, train: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Fit the teacher on spots `train`, and return the embedding of spots `rows`, (len(rows), D) float32.

        Parameters
        ----------
        train
            Indices of the spots to fit on; ignored by a frozen teacher.
        rows
            Indices of the spots to embed, `train` by default. Spots that cannot be embedded are NaN.
        """
        ...
