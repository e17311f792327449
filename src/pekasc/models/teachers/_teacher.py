"""`Teacher`: which model of single cells teaches, and where its files are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pekasc._options import whole


@dataclass(frozen=True)
class Teacher:
    """Describe a teacher: a model of expression whose embedding the adapter is trained to predict.

    Goes wherever ``teacher=`` stands, beside a plain name.

    Parameters
    ----------
    name
        ``"pca"`` of log-normalised expression or ``"scvi"`` (latent means of 10 dimensions, 100 epochs on the counts;
        needs ``pip install "pekasc[scvi]"``), both fitted on the training spots of each fold; ``"scfoundation"``,
        frozen, from `files`; or a key of ``obsm``. A stored embedding must not have been fitted on spots that are
        tested later.
    files
        Folder with a frozen teacher's official files; for scFoundation ``models.ckpt`` and
        ``OS_scRNA_gene_index.19264.tsv``, which have a licence of their own. Without it, what
        :func:`pekasc.tl.embed_expression` stored in ``obsm`` is taken.
    max_tokens
        scFoundation: most tokens in a batch, one for every gene that a spot has. Fewer need less memory; None is the
        default of the model.

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
    """Return the description of a teacher: a name, or what stands already.

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
    """What training asks of a teacher."""

    name: str
    licence: str | None  # of what it learned elsewhere
    digest: str | None  # of the weights that it learned elsewhere
    n_spots: int  # that it knows
    n_genes: int | None  # that it reads, where that is known

    def embed(self, train: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Return the embedding of spots `rows`, (len(rows), D) float32, by what was fitted on spots `train` alone.

        Parameters
        ----------
        train
            Positions of the spots that may be learned from; a frozen teacher learns from none.
        rows
            Positions of the spots to embed, `train` by default. A spot that cannot be embedded is NaN.
        """
        ...
