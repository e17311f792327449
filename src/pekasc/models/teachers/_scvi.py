"""scVI as teacher: a variational autoencoder of counts, fitted on the training spots.

References
----------
Lopez, Regier, Cole, Jordan, Yosef. Deep generative modeling for single-cell transcriptomics. Nature Methods 15,
1053-1058 (2018). doi:10.1038/s41592-018-0229-2. Implementation: scvi-tools.
"""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from scipy import sparse

from pekasc._expression import Matrix

N_LATENT = 10
EPOCHS = 100
BATCH_SIZE = 128


def require_scvi() -> Any:
    """Return the module ``scvi``.

    Raises
    ------
    ImportError
        If scvi-tools is not installed.
    """
    try:
        with warnings.catch_warnings():  # deprecation warnings of its own imports
            warnings.simplefilter("ignore")
            import scvi
    except ImportError as error:
        raise ImportError(
            f'`teacher="scvi"` needs scvi-tools, which cannot be imported ({error}). Install it with '
            '`pip install "pekasc[scvi]"`.'
        ) from error
    return scvi


class ScviTeacher:
    """Latent means of scVI.

    Parameters
    ----------
    counts
        Raw counts, training spots x genes.
    n_latent
        Number of latent dimensions; None is scvi-tools' default, 10.
    epochs
        Number of epochs; None is 100, a quarter of scvi-tools' default, since an adapter needs four fits.
    device
        Device to train on.
    random_state
        Seed of weights, batches and noise.
    progress
        Show a progress bar.

    Raises
    ------
    ImportError
        If scvi-tools is not installed.
    ValueError
        If `n_latent` is not positive.
    """

    name = "scvi"
    licence: str | None = "none needed: fitted on the training spots"
    digest: str | None = None

    def __init__(
        self,
        counts: Matrix,
        n_latent: int | None = None,
        *,
        epochs: int | None = None,
        device: torch.device | str = "cpu",
        random_state: int = 0,
        progress: bool = False,
    ) -> None:
        require_scvi()
        if n_latent is not None and n_latent < 1:
            raise ValueError(f"`n_components={n_latent}` must be positive: scVI's latent dimensions.")
        self.counts = sparse.csr_matrix(counts).astype(np.float32)
        self.n_spots = int(self.counts.shape[0])
        self.n_genes: int | None = int(self.counts.shape[1])
        self.n_latent = N_LATENT if n_latent is None else n_latent
        self.epochs = EPOCHS if epochs is None else epochs
        self.device, self.random_state, self.progress = torch.device(device), random_state, progress

    def embed(self, train: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Return the latent means of `rows`, (n, n_latent), NaN without counts, from a model fitted on spots `train`.

        Raises
        ------
        ValueError
            If there are too few spots with counts to train on.
        """
        rows = np.asarray(train if rows is None else rows)
        counted = np.asarray(self.counts.sum(axis=1)).ravel() > 0  # scVI takes the logarithm of the total
        fitted = np.unique(train)  # sorted, since batches depend on the order of spots
        fitted = fitted[counted[fitted]]
        if len(fitted) < 2:
            raise ValueError(
                f"scVI cannot be fitted on {len(fitted)} spots with counts, of {len(np.unique(train))} in training: "
                "two are the least. Name the layer with counts (`layer=`), or take another teacher."
            )
        wanted = counted[rows]
        out = np.full((len(rows), self.n_latent), np.nan, dtype=np.float32)
        if wanted.any():
            out[wanted] = self._latent(fitted, rows[wanted])
        return out

    def _latent(self, fitted: np.ndarray, rows: np.ndarray) -> np.ndarray:
        from pekasc.models.runtime import quiet_lightning

        scvi = require_scvi()
        cuda = self.device.type == "cuda"
        with quiet_lightning(), _quiet(), _own_random_numbers(self.random_state, self.device):
            adata = AnnData(self.counts[fitted])
            scvi.model.SCVI.setup_anndata(adata)
            model = scvi.model.SCVI(adata, n_latent=self.n_latent)
            model.train(
                max_epochs=self.epochs,
                accelerator="gpu" if cuda else self.device.type,
                devices=[self.device.index or 0] if cuda else 1,
                # no validation set: random spots are neighbours of the rest
                train_size=1.0,
                shuffle_set_split=False,  # its generator cannot be seeded
                batch_size=_batch_size(len(fitted)),
                enable_progress_bar=self.progress,
                enable_model_summary=False,
            )
            latent = model.get_latent_representation(AnnData(self.counts[rows]))
        return np.asarray(latent, dtype=np.float32)


def _batch_size(n_spots: int) -> int:
    """Return a batch size without a last batch of one spot, which batch normalisation does not allow."""
    return next(size for size in range(BATCH_SIZE, 1, -1) if n_spots % size != 1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep scvi-tools' messages about its own set-up out of the user's log."""
    logger = logging.getLogger("scvi")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _own_random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global random generators, which scvi-tools uses, and restore their state afterwards."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
