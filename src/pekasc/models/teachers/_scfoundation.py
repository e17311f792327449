"""scFoundation: a frozen single-cell model as teacher, read from its official files.

An implementation of our own of what Hao et al. (2024) describe and their files fix, encoder only: the decoder of the
checkpoint is never built. The weights do not come with the package; the user brings them.

References
----------
Hao, Gong, Zeng, Liu, Guo, Cheng, Wang, Ma, Zhang, Song. Large-scale foundation model on single-cell transcriptomics.
Nature Methods 21, 1481-1491 (2024). doi:10.1038/s41592-024-02305-7
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from pekasc._digests import sha256
from pekasc._expression import SCALE, Matrix, gene_positions
from pekasc._settings import get_logger
from pekasc.models.runtime import autocast, weights_digest

logger = get_logger(__name__)

CHECKPOINT = "models.ckpt"
GENE_INDEX = "OS_scRNA_gene_index.19264.tsv"
# the file holds one model per use; this one is for embedding cells
VERSION = "cell"
ARCHITECTURE = "mae_autobin"
# target depth and own depth of the spot, beside the genes
N_DEPTHS = 2
# about 0.7 GB for the official model in single precision; a spot with more tokens is a batch of its own
MAX_TOKENS = 16_384
# minimum fraction of the genes of the table or of scFoundation, whichever are fewer: below, gene names do not match
MIN_OVERLAP = 0.1


@dataclass(frozen=True)
class Config:
    """Configuration of the encoder in the checkpoint.

    Parameters
    ----------
    hidden_dim, depth, heads
        Width, number of layers and of attention heads.
    bin_num, bin_alpha
        Number of bins of the value embedding, and weight of its skip connection.
    pad_token_id
        Value of padding tokens.
    seq_len
        Number of genes plus the two depth tokens.
    """

    hidden_dim: int
    depth: int
    heads: int
    bin_num: int
    bin_alpha: float
    pad_token_id: float
    seq_len: int


class ValueEmbedding(nn.Module):
    """Embed a number as a soft mixture of learned bins; parameters are named as in the checkpoint."""

    def __init__(self, dim: int, bins: int, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.mlp = nn.Linear(1, bins)
        self.mlp2 = nn.Linear(bins, bins)
        self.emb = nn.Embedding(bins, dim)
        self.emb_pad = nn.Embedding(1, dim)

    def forward(self, values: Tensor) -> Tensor:
        """Return embeddings (..., dim) of values (...)."""
        h = functional.leaky_relu(self.mlp(values[..., None]), 0.1)
        return (self.alpha * h + self.mlp2(h)).softmax(dim=-1) @ self.emb.weight


class Encoder(nn.Module):
    """Transformer layers (post-norm, ReLU) and a final norm."""

    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.transformer_encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, 4 * dim, batch_first=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """Return tokens (batch, tokens, dim); those where `padding` (batch, tokens) is true are not attended to."""
        mask = ~padding[:, None, None, :] if bool(padding.any()) else None
        for layer in self.transformer_encoder:
            x = self._layer(layer, x, mask)
        return self.norm(x)

    def _layer(self, layer: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        # written out, since torch's own fast path stores all attention weights: 19,266 x 19,266 per head
        attention = layer.self_attn
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in functional.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = layer.norm1(x + attention.out_proj(mixed))
        return layer.norm2(x + layer.linear2(functional.relu(layer.linear1(x))))


class ScFoundation(nn.Module):
    """The encoder of scFoundation with its embeddings.

    Each sequence has the two depth tokens of the spot (whose positions come after all genes), then its expressed genes,
    then padding. Attention uses positions only through their embedding, so the order in memory does not matter.

    Parameters
    ----------
    config
        See :class:`Config`.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.token_emb = ValueEmbedding(config.hidden_dim, config.bin_num, config.bin_alpha)
        self.pos_emb = nn.Embedding(config.seq_len + 1, config.hidden_dim)
        self.encoder = Encoder(config.hidden_dim, config.depth, config.heads)

    def tokens(self, values: Tensor, positions: Tensor, padding: Tensor) -> Tensor:
        """Return the input tokens of the encoder, (batch, tokens, dim)."""
        x = torch.where(padding[..., None], self.token_emb.emb_pad.weight, self.token_emb(values))
        return x + self.pos_emb(positions)

    def pool(self, x: Tensor, padding: Tensor) -> Tensor:
        """Return pooling "all", (batch, 4 * dim): own depth, target depth, maximum and mean over the gene tokens."""
        genes, there = x[:, N_DEPTHS:], ~padding[:, N_DEPTHS:, None]
        largest = genes.masked_fill(~there, -torch.inf).amax(dim=1)
        mean = genes.masked_fill(~there, 0).sum(dim=1) / there.sum(dim=1)
        return torch.cat([x[:, 1], x[:, 0], largest, mean], dim=1)


class ScFoundationTeacher:
    """scFoundation's embedding of spots: frozen, nothing is fitted on the data.

    Parameters
    ----------
    counts
        Raw counts, spots x genes.
    genes
        Names of those genes: symbols, as in the gene index.
    checkpoint
        Folder with the official files ``models.ckpt`` and ``OS_scRNA_gene_index.19264.tsv``.
    device, precision
        See :func:`pekasc.models.runtime.resolve_device` and :func:`pekasc.models.runtime.autocast`.
    max_tokens
        Maximum number of tokens per batch, with padding. A spot with more is a batch of its own.
    progress
        Show a progress bar.

    Attributes
    ----------
    n_genes
        Number of genes of scFoundation that are in the data.
    digest
        SHA-256 of the encoder's weights and of the gene index.

    Raises
    ------
    OSError
        If a file is missing (FileNotFoundError) or cannot be read.
    ValueError
        If the checkpoint is of another architecture, the gene index does not fit it, or no gene is known.
    """

    name = "scfoundation"
    licence: str | None = "MODEL_LICENSE of github.com/biomap-research/scFoundation (non-commercial research)"

    def __init__(
        self,
        counts: Matrix,
        genes: Sequence[str],
        checkpoint: str | Path,
        *,
        max_tokens: int = MAX_TOKENS,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        progress: bool = False,
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"`max_tokens={max_tokens!r}` must be a positive whole number.")
        model, known = load(checkpoint)
        self.n_genes: int | None
        self.counts, self.n_genes = align(counts, genes, known)
        self.n_spots = int(self.counts.shape[0])
        # the gene index is part of the digest, since it assigns genes to positions
        self.digest: str | None = sha256("\n".join([weights_digest(model), *known]))
        self.model = model.to(device)
        self.device, self.precision = torch.device(device), precision
        self.max_tokens, self.progress = max_tokens, progress

    def embed(self, train: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Return the embedding of spots `rows`, (len(rows), 4 * dim) float32; `train` is ignored.

        Spots with fewer than two counts have no depth tokens (log10(1) = 0 means absent), so their embedding is NaN.
        """
        x = self.counts[np.asarray(train if rows is None else rows)]
        total = np.asarray(x.sum(axis=1, dtype=np.float64)).ravel()
        deep = np.flatnonzero(total > 1)
        if deep.size < total.size:
            logger.warning(
                "%d of %d spots have fewer than two counts of scFoundation's genes: their embedding is NaN.",
                total.size - deep.size, total.size,
            )  # fmt: skip
        out = np.full((len(total), 4 * self.model.config.hidden_dim), np.nan, dtype=np.float32)
        lengths = np.diff(x.indptr)[deep] + N_DEPTHS
        with torch.inference_mode(), tqdm(
            total=len(deep), desc="embed expression", unit="spot", disable=not self.progress
        ) as bar:  # fmt: skip
            for batch in length_batches(lengths, self.max_tokens):
                out[deep[batch]] = self._embed_batch(x, total, deep[batch])
                bar.update(len(batch))
        return out

    def _embed_batch(self, x: Matrix, total: np.ndarray, rows: np.ndarray) -> np.ndarray:
        values, positions, padding = (
            torch.from_numpy(array).to(self.device) for array in sequences(x, total, rows, self.model.config)
        )
        # in full precision: bfloat16 would keep two digits of an expression value
        tokens = self.model.tokens(values, positions, padding)
        with autocast(self.device, self.precision):
            tokens = self.model.encoder(tokens, padding)
        return self.model.pool(tokens.float(), padding).cpu().numpy()


def sequences(
    x: Matrix, total: np.ndarray, rows: np.ndarray, config: Config
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return values (float32), positions (int64) and padding (bool) of the sequences of `rows`, (len(rows), longest).

    Parameters
    ----------
    x
        Counts in the order of the gene index, in CSR format without stored zeros.
    total
        Sum of every row.
    rows
        Rows of `x`.
    config
        Configuration of the model.
    """
    longest = int(np.diff(x.indptr)[rows].max()) + N_DEPTHS
    values = np.full((len(rows), longest), config.pad_token_id, dtype=np.float32)
    positions = np.full((len(rows), longest), config.seq_len, dtype=np.int64)
    padding = np.ones((len(rows), longest), dtype=bool)
    for i, row in enumerate(rows):
        part = slice(x.indptr[row], x.indptr[row + 1])
        end = N_DEPTHS + part.stop - part.start
        values[i, :N_DEPTHS] = np.log10(total[row])  # PEKA sets the target depth to the spot's own
        values[i, N_DEPTHS:end] = np.log1p(SCALE * x.data[part] / total[row])
        positions[i, :N_DEPTHS] = config.seq_len - N_DEPTHS, config.seq_len - 1
        positions[i, N_DEPTHS:end] = x.indices[part]
        padding[i, :end] = False
    return values, positions, padding


def length_batches(lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Yield batches of sequences, as indices, sorted by length, with at most `max_tokens` tokens after padding.

    The longest come first, so that running out of memory happens at once and not after an hour.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, max_tokens // int(lengths[order[start]]))
        yield order[start : start + size]
        start += size


def align(counts: Matrix, genes: Sequence[str], known: Sequence[str]) -> tuple[Matrix, int]:
    """Return counts in the order of `known`, (n, len(known)) CSR without stored zeros, and how many genes were found.

    Columns of the same name are added up.

    Raises
    ------
    ValueError
        If almost none of `genes` is known.
    """
    column = gene_positions(np.asarray(known, dtype=object), list(genes))
    found = np.flatnonzero(column >= 0)
    there = np.unique(column[found])
    if len(there) < MIN_OVERLAP * min(len(known), len(column)):
        raise ValueError(
            f"scFoundation knows {len(there) or 'none'} of the {len(column)} genes of the table: it has human symbols "
            f"({list(known[:3])}), the table {list(genes[:3])}. If a column of `var` holds symbols, name it with "
            "`gene_key=`."
        )
    if len(there) < len(known):
        absent = np.setdiff1d(np.arange(len(known)), there)
        logger.warning(
            "%d of the %d genes of scFoundation are not in the table and count as not expressed (such as %s); "
            "%d of the table's %d genes are read.",
            len(absent), len(known), [known[i] for i in absent[:3]], len(found), len(column),
        )  # fmt: skip
    part = sparse.csr_matrix(sparse.csr_matrix(counts)[:, found])
    out = sparse.csr_matrix((part.data, column[found][part.indices], part.indptr), shape=(part.shape[0], len(known)))
    out.sum_duplicates()  # also brings the genes into order
    out.eliminate_zeros()
    return out, len(there)


def load(folder: str | Path) -> tuple[ScFoundation, list[str]]:
    """Return the model, in evaluation mode on the CPU, and its genes in order, from a folder with the official files.

    Raises
    ------
    OSError
        If a file is missing (FileNotFoundError) or cannot be read.
    ValueError
        If the checkpoint is of another architecture, or the gene index does not fit it.
    """
    folder = Path(folder).expanduser()
    for name in (CHECKPOINT, GENE_INDEX):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{name!r} not found in {str(folder)!r}. `files=` of the Teacher names the folder with "
                "scFoundation's official "
                f"files {CHECKPOINT!r} and {GENE_INDEX!r} (see github.com/biomap-research/scFoundation)."
            )
    cell = _at(_read(folder / CHECKPOINT), VERSION, path="checkpoint")
    config = read_config(cell)
    genes = read_genes(folder / GENE_INDEX, config.seq_len - N_DEPTHS)
    with torch.device("meta"):  # no memory, and no random numbers drawn, for weights that are replaced
        model = ScFoundation(config)
    model.load_state_dict(_weights(cell, model), assign=True)
    return model.eval().requires_grad_(False), genes


def _read(path: Path) -> Any:
    try:
        # memory-mapped, since one of several models in the file is used; files older than the zip format cannot be
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise OSError(
            f"{str(path)!r} cannot be read as plain weights: {error}. Objects other than tensors and plain values are "
            "never loaded, for they could run code: save the file again without them."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise OSError(f"{str(path)!r} is no checkpoint, or damaged: {error}.") from error


def _at(mapping: Any, *keys: str, path: str) -> Any:
    for key in keys:
        if not isinstance(mapping, Mapping) or key not in mapping:
            there = list(mapping) if isinstance(mapping, Mapping) else type(mapping).__name__
            raise ValueError(f"This is no checkpoint of scFoundation: {path} lacks {key!r}, it has {there}.")
        mapping, path = mapping[key], f"{path}[{key!r}]"
    return mapping


def read_config(cell: Mapping[str, Any]) -> Config:
    """Return the configuration of the cell model in the checkpoint: that of the model, updated with the data set's.

    Raises
    ------
    ValueError
        If a key is missing, or the architecture differs.
    """
    path = f"checkpoint[{VERSION!r}]"
    config = _at(cell, "config", path=path)
    path += "['config']"
    _expect(f"{path}['model']", _at(config, "model", path=path), ARCHITECTURE)
    merged = {
        **_at(config, "model_config", ARCHITECTURE, path=path),
        **_at(config, "dataset_config", "rnaseq", path=path),
    }
    encoder = _at(merged, "encoder", path=path)
    _expect(f"{path} encoder.module_type", _at(encoder, "module_type", path=path), "transformer")
    _expect(f"{path} encoder.norm_first", bool(encoder.get("norm_first", False)), False)
    sizes = {key: _number(encoder, key, path, whole=True) for key in ("hidden_dim", "depth", "heads")}
    sizes |= {key: _number(merged, key, path, whole=True) for key in ("bin_num", "seq_len")}
    if sizes["hidden_dim"] % sizes["heads"]:
        raise ValueError(f"{path}: hidden_dim {sizes['hidden_dim']} is no multiple of heads {sizes['heads']}.")
    return Config(
        **{key: int(value) for key, value in sizes.items()},
        bin_alpha=_number(merged, "bin_alpha", path),
        pad_token_id=_number(merged, "pad_token_id", path),
    )


def _number(mapping: Mapping[str, Any], key: str, path: str, whole: bool = False) -> float:
    value = _at(mapping, key, path=path)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or (whole and value < 1):
        expected = "a positive whole number" if whole else "a number"
        raise ValueError(f"This is no checkpoint of scFoundation: {path} `{key}` is {value!r}, expected {expected}.")
    return value


def _expect(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ValueError(f"The checkpoint is of another architecture: {what} is {found!r}, expected {expected!r}.")


def read_genes(path: Path, n: int) -> list[str]:
    """Return the `n` gene names of the gene index.

    Raises
    ------
    ValueError
        If there is no column ``gene_name``, their number is not `n`, or a gene is listed twice.
    OSError
        If the file is no table.
    """
    # keep_default_na: a gene may be called NA or NAN
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    except ValueError as error:  # pandas' errors for what is no table, or no text
        raise OSError(f"The gene index {str(path)!r} cannot be read as a table: {error}.") from error
    if "gene_name" not in table:
        raise ValueError(f"The gene index {path.name!r} has no column 'gene_name', only {list(table)}.")
    if len(table) != n:
        raise ValueError(f"The gene index {path.name!r} has {len(table)} genes, but the checkpoint was made for {n}.")
    twice = table["gene_name"][table["gene_name"].duplicated()].tolist()
    if twice:
        raise ValueError(f"The gene index {path.name!r} names {len(twice)} genes more than once (such as {twice[:3]}).")
    return table["gene_name"].tolist()


# the official keys carry a prefix, which ends in "model."
_KEY = re.compile(r"(?:.*model\.)?((?:token_emb|pos_emb|encoder)\..+)")


def _weights(cell: Mapping[str, Any], model: ScFoundation) -> dict[str, Tensor]:
    state = _at(cell, "state_dict", path=f"checkpoint[{VERSION!r}]")
    found = {match[1]: tensor for key, tensor in state.items() if (match := _KEY.fullmatch(key))}
    wanted = model.state_dict()
    for key, expected in wanted.items():
        if key not in found:
            raise ValueError(
                f"The checkpoint is of another architecture: its weights lack {key!r} {tuple(expected.shape)}."
            )
        if not isinstance(found[key], Tensor):
            raise ValueError(f"The checkpoint is damaged: the weight {key!r} is {type(found[key]).__name__}.")
        _expect(f"shape of the weight {key!r}", tuple(found[key].shape), tuple(expected.shape))
    more = [key for key in found if key.startswith("encoder.") and key not in wanted]
    if more:
        raise ValueError(
            f"The checkpoint is of another architecture: the weight {more[0]!r} has no place in an encoder of depth "
            f"{model.config.depth} (depth in its own config)."
        )
    return {key: found[key].float() for key in wanted}
