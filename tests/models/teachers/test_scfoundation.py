"""scFoundation against an implementation that takes one spot at a time, written from the method's description."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from torch import nn

from pekasc.models.teachers import _scfoundation
from pekasc.models.teachers._scfoundation import ScFoundationTeacher, align, length_batches, load

Write = Callable[..., Path]
GENES = [f"G{i}" for i in range(40)]
# of the table: another order, some unknown, some of the index absent
TABLE = [*GENES[35:2:-1], "XIST-AS", "ENSG0001"]
ALL = np.arange(30)


@pytest.fixture(scope="module")
def files(scfoundation: Write, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scfoundation(tmp_path_factory.mktemp("scfoundation"), GENES)


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    """Return counts of 30 spots, from very shallow to deep."""
    rng = np.random.default_rng(0)
    rate = np.geomspace(0.05, 20, 30)[:, None] * rng.gamma(0.5, 2, (1, len(TABLE)))
    counts = rng.poisson(rate).astype(np.float32)
    counts[:, 0] += 2  # a gene of the index: every spot can be embedded
    return counts[rng.permutation(30)]


def reference(folder: Path, spot: dict[str, float]) -> np.ndarray:
    """Embed one spot, gene -> count, with plain loops and torch's own encoder."""
    cell = torch.load(folder / "models.ckpt", weights_only=True)["cell"]
    setting = cell["config"]["model_config"]["mae_autobin"]
    weight = {key.removeprefix("model."): value for key, value in cell["state_dict"].items()}
    genes = list(pd.read_csv(folder / "OS_scRNA_gene_index.19264.tsv", sep="\t")["gene_name"])
    total = sum(spot.get(gene, 0) for gene in genes)
    values = [math.log(1 + 1e4 * spot.get(gene, 0) / total) for gene in genes]
    values += [math.log10(total), math.log10(total)]
    dim = setting["encoder"]["hidden_dim"]
    tokens = []
    for position, value in enumerate(values):
        if value <= 0:
            continue
        h = [float(weight["token_emb.mlp.weight"][b, 0] * value + weight["token_emb.mlp.bias"][b]) for b in range(7)]
        h = [x if x > 0 else 0.1 * x for x in h]
        mixed = weight["token_emb.mlp2.weight"] @ torch.tensor(h) + weight["token_emb.mlp2.bias"]
        scores = [setting["bin_alpha"] * x + float(m) for x, m in zip(h, mixed, strict=True)]
        share = [math.exp(s) for s in scores]
        token = torch.zeros(dim)
        for b in range(7):
            token += share[b] / sum(share) * weight["token_emb.emb.weight"][b]
        tokens.append(token + weight["pos_emb.weight"][position])
    layer = nn.TransformerEncoderLayer(dim, setting["encoder"]["heads"], 4 * dim, batch_first=True)
    stack = nn.TransformerEncoder(layer, setting["encoder"]["depth"], enable_nested_tensor=False)
    stack.load_state_dict(
        {
            key.replace("encoder.transformer_encoder", "layers"): value
            for key, value in weight.items()
            if key.startswith("encoder.transformer_encoder")
        }
    )
    norm = nn.LayerNorm(dim)
    norm.load_state_dict({"weight": weight["encoder.norm.weight"], "bias": weight["encoder.norm.bias"]})
    with torch.no_grad():
        out = norm(stack.eval()(torch.stack(tokens)[None]))[0]
    return torch.cat([out[-1], out[-2], out[:-2].max(dim=0).values, out[:-2].mean(dim=0)]).numpy()


def test_agrees_with_one_spot_at_a_time(files: Path, counts: np.ndarray) -> None:
    teacher = ScFoundationTeacher(counts, TABLE, files)
    got = teacher.embed(ALL)
    assert got.shape == (30, 64) and got.dtype == np.float32
    expected = [reference(files, dict(zip(TABLE, spot.tolist(), strict=True))) for spot in counts]
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
    # the embeddings differ, so that agreement means something
    assert np.ptp(got, axis=0).min() > 1e-3 and np.ptp(np.diff(np.reshape(got, (30, 4, 16)), axis=1)) > 0.1


@pytest.mark.parametrize("max_tokens", [1, 17, 60, 100_000])
def test_batches_change_nothing(files: Path, counts: np.ndarray, max_tokens: int) -> None:
    one = ScFoundationTeacher(counts, TABLE, files)
    alone = np.concatenate([one.embed(ALL[i : i + 1]) for i in ALL])
    got = ScFoundationTeacher(sparse.csc_matrix(counts), TABLE, files, max_tokens=max_tokens).embed(ALL)
    np.testing.assert_allclose(got, alone, atol=1e-5, rtol=0)
    order = np.random.default_rng(1).permutation(30)[:20]
    mixed = ScFoundationTeacher(counts, TABLE, files, max_tokens=max_tokens).embed(order)
    np.testing.assert_allclose(mixed, alone[order], atol=1e-5, rtol=0)


def test_what_stands_in_padding_changes_nothing(files: Path, scfoundation: Write, counts: np.ndarray, tmp_path: Path):
    def other_padding(checkpoint: dict[str, Any]) -> None:
        state = checkpoint["cell"]["state_dict"]
        state["model.token_emb.emb_pad.weight"] += 100
        state["model.pos_emb.weight"][-1] -= 50

    scfoundation(tmp_path, GENES, change=other_padding)
    np.testing.assert_array_equal(
        ScFoundationTeacher(counts, TABLE, tmp_path).embed(ALL), ScFoundationTeacher(counts, TABLE, files).embed(ALL)
    )


def test_batches_keep_to_their_budget_and_are_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(3, 200, 500)
    batches = list(length_batches(lengths, 1000))
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(500))
    padded = [len(batch) * lengths[batch].max() for batch in batches]
    assert max(padded) <= 1000
    assert sum(padded) < 1.05 * lengths.sum()  # sorted: next to no padding
    # a spot that is over the budget goes alone
    assert [len(batch) for batch in length_batches(np.array([5, 2000, 5]), 1000)] == [1, 2]


def test_every_batch_that_runs_is_within_the_budget(
    files: Path, counts: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    teacher = ScFoundationTeacher(counts, TABLE, files, max_tokens=50)
    encode = teacher.model.encoder.forward

    def counted(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        sizes.append(x.shape[:2])
        return encode(x, padding)

    monkeypatch.setattr(teacher.model.encoder, "forward", counted)
    teacher.embed(ALL)
    assert len(sizes) > 5 and max(n * length for n, length in sizes) <= 50


def test_a_spot_with_next_to_no_counts_is_nan_and_said(
    files: Path, counts: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    few = counts.copy()
    few[3] = 0
    few[4] = 0
    few[4, 0] = 1  # log10(1) = 0: neither depth has a token
    few[5] = 0
    few[5, -1] = 9  # counts of a gene that scFoundation does not know
    few[6] = 0
    few[6, 0] = 2
    got = ScFoundationTeacher(few, TABLE, files).embed(ALL)
    assert np.flatnonzero(np.isnan(got).any(axis=1)).tolist() == [3, 4, 5] and np.isnan(got[3:6]).all()
    assert "3 of 30 spots have fewer than two counts" in caplog.text
    others = np.setdiff1d(ALL, [3, 4, 5, 6])
    np.testing.assert_allclose(got[others], ScFoundationTeacher(counts, TABLE, files).embed(others), atol=1e-5)


def test_missing_genes_are_reported_and_equal_names_add_up(
    files: Path, counts: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        teacher = ScFoundationTeacher(counts, TABLE, files)
    assert "7 of the 40 genes of scFoundation are not in the table" in caplog.text
    assert "33 of the table's 35 genes are read" in caplog.text
    assert teacher.n_genes == 33
    halves = np.column_stack([counts, counts[:, :1]])
    halves[:, 0] = 0
    np.testing.assert_array_equal(ScFoundationTeacher(halves, [*TABLE, TABLE[0]], files).embed(ALL), teacher.embed(ALL))
    # stored zeros are no tokens
    stored = sparse.csr_matrix(np.where(counts == 0, 1, counts))
    stored.data = counts[stored.nonzero()]
    assert stored.nnz == counts.size
    np.testing.assert_array_equal(ScFoundationTeacher(stored, TABLE, files).embed(ALL), teacher.embed(ALL))


def test_names_of_another_kind_are_an_error(files: Path, counts: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"knows none of the 35 genes .*\['G0', 'G1', 'G2'\].*`gene_key=`"):
        ScFoundationTeacher(counts, [f"ENSG{i}" for i in range(35)], files)
    # one gene that happens to have the name of another species' is no overlap
    with pytest.raises(ValueError, match="knows 1 of the 35 genes"):
        ScFoundationTeacher(counts, ["G7", *(f"g{i}" for i in range(34))], files)
    # a small panel whose genes are known is none either, but an input
    assert align(counts[:, :3], ["G1", "G5", "G2"], GENES)[1] == 3


def test_digest_is_of_weights_and_genes(scfoundation: Write, files: Path, counts: np.ndarray, tmp_path: Path) -> None:
    first = ScFoundationTeacher(counts, TABLE, files).digest
    assert first == ScFoundationTeacher(counts, TABLE, scfoundation(tmp_path / "same", GENES)).digest
    assert first != ScFoundationTeacher(counts, TABLE, scfoundation(tmp_path / "seed", GENES, seed=1)).digest
    assert first != ScFoundationTeacher(counts, TABLE, scfoundation(tmp_path / "order", GENES[::-1])).digest
    assert first is not None and len(first) == 64


def test_nothing_is_drawn_and_prefixes_may_differ(scfoundation: Write, files: Path, tmp_path: Path) -> None:
    def longer(checkpoint: dict[str, Any]) -> None:
        cell = checkpoint["cell"]
        cell["state_dict"] = {f"module.{key}": value.double() for key, value in cell["state_dict"].items()}

    before = torch.get_rng_state()
    plain, genes = load(files)
    renamed, _ = load(scfoundation(tmp_path, GENES, change=longer))
    assert torch.equal(torch.get_rng_state(), before)
    assert genes == GENES and not plain.training
    assert not any(p.requires_grad for p in plain.parameters())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(renamed.state_dict()[name], tensor) and tensor.dtype == torch.float32


def _set(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(checkpoint: dict[str, Any]) -> None:
        inside = checkpoint
        for key in keys[:-1]:
            inside = inside[key]
        if value is None:
            del inside[keys[-1]]
        else:
            inside[keys[-1]] = value

    return change


CONFIG = ("cell", "config")
MODEL = (*CONFIG, "model_config", "mae_autobin")
STATE = ("cell", "state_dict")
LAST = "model.encoder.transformer_encoder.2.norm1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("cell", value=None), r"no checkpoint of scFoundation: checkpoint lacks 'cell', it has \['gene', 'rde'\]"),
        (_set(*CONFIG, value=None), r"checkpoint\['cell'\] lacks 'config'"),
        (_set(*CONFIG, "model", value="scgpt"), "another architecture: .*'scgpt', expected 'mae_autobin'"),
        (_set(*MODEL, "encoder", "module_type", value="performer"), "'performer', expected 'transformer'"),
        (_set(*MODEL, "encoder", "norm_first", value=True), "norm_first is True, expected False"),
        (_set(*MODEL, "encoder", "heads", value=3), "hidden_dim 16 is no multiple of heads 3"),
        (_set(*MODEL, "encoder", "hidden_dim", value=32), r"shape of the weight .* is \(\d+, 16\), expected \(\d+, 32"),
        (_set(*MODEL, "encoder", "depth", value=3), r"lack 'encoder.transformer_encoder.2"),
        (_set(*MODEL, "encoder", "depth", value=1), r"no place in an encoder of depth 1"),
        (_set(*MODEL, "encoder", "depth", value=0), "`depth` is 0"),
        (_set(*MODEL, "bin_num", value=9), r"token_emb.* is \(7.*expected \(9"),
        (_set(*MODEL, "pad_token_id", value=None), "lacks 'pad_token_id'"),
        (_set(*MODEL, "bin_alpha", value="much"), "`bin_alpha` is 'much'"),
        (_set(*CONFIG, "dataset_config", "rnaseq", "seq_len", value=50), "has 40 genes, but the checkpoint .* for 48"),
        (_set(*STATE, value={}), "its weights lack 'token_emb"),
        (_set(*STATE, value=None), "lacks 'state_dict'"),
        (_set(*STATE, "model.pos_emb.weight", value="lost"), "weight 'pos_emb.weight' is str"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_checkpoint_of_another_architecture(
    scfoundation: Write, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(scfoundation(tmp_path, GENES, change=change))


def test_missing_and_damaged_files(scfoundation: Write, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'models.ckpt' not found in .*nowhere.*OS_scRNA_gene_index.19264.tsv"):
        load(tmp_path / "nowhere")
    folder = scfoundation(tmp_path / "a", GENES)
    index = folder / _scfoundation.GENE_INDEX
    kept = index.read_text()
    index.unlink()
    with pytest.raises(FileNotFoundError, match="'OS_scRNA_gene_index.19264.tsv' not found"):
        load(folder)
    index.write_text(kept.replace("gene_name", "symbol"))
    with pytest.raises(ValueError, match=r"no column 'gene_name', only \['symbol', 'index'\]"):
        load(folder)
    index.write_text(kept.replace("G7\t", "G8\t"))
    with pytest.raises(ValueError, match=r"names 1 genes more than once \(such as \['G8'\]\)"):
        load(folder)
    index.write_text("")
    with pytest.raises(OSError, match="cannot be read as a table"):
        load(folder)
    index.write_text(kept)
    whole = (folder / "models.ckpt").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"<html>404</html>"):
        (folder / "models.ckpt").write_bytes(damaged)
        with pytest.raises(OSError, match=r"models.ckpt' (is no checkpoint, or damaged|cannot be read)"):
            load(folder)


class Harmful:
    """What a pickle could run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


def test_nothing_but_weights_is_loaded(scfoundation: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = scfoundation(tmp_path, GENES, change=lambda checkpoint: checkpoint.update(extra=Harmful()))
    with pytest.raises(OSError, match="never loaded, for they could run code"):
        load(folder)
    assert capsys.readouterr().out == ""


def test_bad_budget(files: Path, counts: np.ndarray) -> None:
    with pytest.raises(ValueError, match="`max_tokens=0` must be a positive whole number"):
        ScFoundationTeacher(counts, TABLE, files, max_tokens=0)


def test_bfloat16_is_close(files: Path, counts: np.ndarray) -> None:
    exact = ScFoundationTeacher(counts, TABLE, files).embed(ALL)
    rough = ScFoundationTeacher(counts, TABLE, files, precision="bf16").embed(ALL)
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() < 0.2
    assert np.corrcoef(rough.ravel(), exact.ravel())[0, 1] > 0.999
