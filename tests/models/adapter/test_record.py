"""The record of an adapter: a value or shape that cannot be is an error that names file and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pekasc as pk
from pekasc._digests import file_sha256
from pekasc.models.adapter import _folder

NAN, HUGE = float("nan"), 10**400


@pytest.fixture
def saved(adapter: pk.Adapter, tmp_path: Path) -> Path:
    adapter.save(tmp_path / "mine")
    return tmp_path / "mine"


def reseal(folder: Path, **changes: Any) -> None:
    """Change the record, and make all digests anew, as an attacker would."""
    main = folder / "pekasc.json"
    record = json.loads(main.read_text())
    for place, value in changes.items():
        *path, last = place.split("__")
        part = record
        for name in path:
            part = part[name]
        part[last] = value
    if not any(place.startswith("files") for place in changes):
        record["files"] = {name: file_sha256(folder / name) for name in record["files"]}
    main.write_text(json.dumps({**record, "sha256": _folder._seal(record)}))


@pytest.mark.parametrize(
    ("field", "values", "words"),
    [
        ("encoder_digest", [3, "abc", None], "a SHA-256"),
        ("tile_px", [0, -8, 2.5, "56", True, HUGE], "a number of pixels"),
        ("mpp", [0, -1.0, NAN, float("inf"), "1", True, HUGE], "a positive number"),
        ("depth", [[], [0], [1, 1], [[1]], 2, "all", [1.5]], "null or numbers of blocks"),
        ("method", ["", 3, None], "a name"),
        ("genes", [[], ["a", "a"], [1], "abc", [["a"]], [""], None], "names, each once"),
        ("reading", [[], None, {}, [3], [[]], [{}]], "a list of members"),
        ("smooth_um", [0, -5, NAN, "300", [1]], "null or a positive number"),
        ("smooth_weight", [-0.1, 1.5, NAN, None, "1", True], "a number from 0 to 1"),
        ("fields_um", [[0], [-168.0], [168.0, 168.0], [NAN], "168", [[168]], None, 168], "positive numbers, each once"),
        ("orientations", [0, 3, 1.0, "2", None, [1]], "1, 2, 4 or 8"),
        (
            "stain",
            [
                {},
                {"method": "reinhard", "first": [1, 2, 3]},
                {"method": "vahadane", "first": [1, 2, 3], "second": [1, 1, 1]},
                {"method": "reinhard", "first": [1, 2, 3], "second": [1, 0, 1]},
                {"method": "reinhard", "first": [1, 2, NAN], "second": [1, 1, 1]},
                [1, 2, 3],
                "reinhard",
            ],
            "null or a stain: its method and two lists of three numbers",
        ),
        ("info", [[], None, "x"], "plain values by name"),
        ("info__n_spots", [-1, "7", None, NAN], "a number of spots"),
        ("info__groups", ["P1", [1], None], "names of groups"),
        ("info__obsm", [3, "", ["types"]], "null or a key of obsm"),
        ("info__epochs", ["1", -1, None], "a number of epochs"),
        ("info__profile", [{}, {"seconds": {"a": "b"}, "tiles_per_second": {}, "peak_memory": 1}, 3], "seconds and"),
        ("encoder__name", ["", None, 3], "a name"),
        ("encoder__weights", [3, ["a"]], "null or a path"),
        ("encoder__mean", [[1], "abc", [1, 2, NAN], 3], "null or three numbers"),
        ("encoder__std", [[0, 1, 1], [1, 1]], "null or three positive numbers"),
        ("encoder__gated", [1, None], "true or false"),
        ("encoder__adapter_targets", ["attn.qkv", [1], None], "names of layers"),
        ("encoder__pooling", ["max", 1, []], "null, .class. or .class.mean."),
        ("files__heads.safetensors", ["../../x", 3, None], "a SHA-256 for every file"),
    ],
)
def test_values_of_a_field(saved: Path, field: str, values: list[Any], words: str) -> None:
    named = "files" if field.startswith("files") else field.replace("__", ".")
    for value in values:
        reseal(saved, **{field: value})
        with pytest.raises(ValueError, match=rf"is damaged: pekasc\.json: `{named}` must be {words}"):
            pk.Adapter.load(saved)


def test_noise_must_be_of_the_target_and_novelty_of_its_depths(saved: Path) -> None:
    trust = json.loads((saved / "pekasc.json").read_text())["trust"]
    assert trust["held_out"]["kind"] == "counts"
    reseal(saved, trust={**trust, "held_out": {**trust["held_out"], "kind": "residuals"}})
    with pytest.raises(
        ValueError, match=r"`trust.held_out` is of residuals, and the target is 'log1p\(counts per 10,000\)'"
    ):
        pk.Adapter.load(saved)
    reseal(saved, trust={**trust, "novelty": {**trust["novelty"], "depths": [[k] for k in range(1, 8)]}})
    with pytest.raises(ValueError, match="trust.novelty.centre has .* features, not a multiple of its 7 depths"):
        pk.Adapter.load(saved)
    reseal(saved, trust={**trust, "novelty": {**trust["novelty"], "faults": ["pen marks"]}})
    with pytest.raises(ValueError, match=r"trust.novelty.weights must be float32 of shape \(1, "):
        pk.Adapter.load(saved)
    reseal(saved, format=8, stain={"method": "reinhard", "first": [1, 0, 0], "second": [1, 1, 1]})
    with pytest.raises(ValueError, match=r"`trust.novelty.faults` is no field of format 8"):
        pk.Adapter.load(saved)
    reseal(saved, format=9, trust={**trust, "novelty": {**trust["novelty"], "faults": []}})
    with pytest.raises(ValueError, match=r"trust.novelty.offset is not part of an adapter"):
        pk.Adapter.load(saved)


def _with(record: Any, **changes: Any) -> Any:
    """Return the members of a record with changes of the first; "source" is that of its first block."""
    first = json.loads(json.dumps(record))
    source = changes.pop("source", None)
    first[0] |= changes
    if source is not None:
        first[0]["blocks"][0][0] = source
    return first


WRONG_MEMBERS: dict[str, list[Any]] = {
    "name": ["", 3, None],
    "weight": [0, -0.5, 1.5, NAN, "1", None, True],
    "variant": [-1, 8, 0.5, None, "0", True],
    "context_um": [0, -1, "200", [200], NAN],
    "blocks": [[], [[]], None, 3, {}, [[3]]],
    "more": [1],
    "source": [
        [], ["frozen", 0], ["other", 0, [1]], ["frozen", -1, [1]], ["frozen", 99, [1]], ["frozen", "0", [1]],
        ["frozen", 0, []], ["frozen", 0, [0]], ["frozen", 0, [1, 1]], ["frozen", 0, "1"], [["frozen"], 0, [1]],
        ["frozen", 0, [[1]]], ["frozen", 0, [1], 3], ["frozen", HUGE, [1]],
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_MEMBERS)
def test_members_of_a_reading(saved: Path, name: str) -> None:
    record = json.loads((saved / "pekasc.json").read_text())["reading"]
    for value in WRONG_MEMBERS[name]:
        reseal(saved, reading=_with(record, **{name: value}))
        with pytest.raises(ValueError, match=r"is damaged: pekasc\.json: `reading` must be a list of members"):
            pk.Adapter.load(saved)
    missing = [{k: v for k, v in member.items() if k != "weight"} for member in record]
    reseal(saved, reading=missing)
    with pytest.raises(ValueError, match="`reading` must be a list of members"):
        pk.Adapter.load(saved)


def test_a_member_whose_arrays_are_not_there(saved: Path) -> None:
    record = json.loads((saved / "pekasc.json").read_text())["reading"]
    reseal(saved, reading=[*record, record[0]])
    with pytest.raises(ValueError, match=rf"heads.safetensors .*reading.{len(record)}.0.offset is missing, or no vec"):
        pk.Adapter.load(saved)
    # context where there was none, whose maps are missing
    alone = next(i for i, member in enumerate(record) if member["context_um"] is None)
    record[alone]["context_um"] = 100.0
    reseal(saved, reading=record)
    with pytest.raises(ValueError, match=rf"heads.safetensors .*reading.{alone}.0.0.around is missing"):
        pk.Adapter.load(saved)


def test_a_field_of_view_that_is_not_there(saved: Path) -> None:
    reseal(saved, fields_um=[])
    with pytest.raises(ValueError, match=r"is damaged: pekasc\.json: `reading` reads field of view 1, and there are 0"):
        pk.Adapter.load(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": 3}, "`encoder` must be the description of an encoder"),
        ({"info": {}}, "`info.n_spots` is missing"),
        ({"encoder__evil": 3}, r"`encoder` has unknown fields \['evil'\]"),
        ({"encoder__model_kwargs": {"pretrained_cfg": {}}}, "`model_kwargs` takes arguments of timm that shape"),
        ({"encoder__model_kwargs": {"depth": [[1]]}}, "`encoder.model_kwargs` must be plain values|'depth' must be"),
        ({"gene_scores__index": ["x"]}, r"`gene_scores.columns.pearson` must be 1 values"),
        ({"gene_scores__columns": {}}, "`gene_scores.dtypes` must name the type of every column"),
        ({"gene_scores__dtypes__pearson": "M8[ns]"}, "`gene_scores.columns.pearson` must be"),
        ({"gene_scores__dtypes__pearson": "object"}, "`gene_scores` must have a column of numbers, pearson"),
        ({"selection__columns__epochs": [1.5]}, "`selection.columns.epochs` must be"),
        ({"history__index": None}, "`history.index` must be names or numbers"),
        ({"history__extra": 1}, "`history` must be a table"),
    ],
)
def test_tables_and_encoders(saved: Path, changes: dict[str, Any], message: str) -> None:
    reseal(saved, **changes)
    with pytest.raises(ValueError, match=rf"is damaged: pekasc\.json: {message}"):
        pk.Adapter.load(saved)


def test_genes_of_another_number_or_name_than_the_weights(saved: Path) -> None:
    record = json.loads((saved / "pekasc.json").read_text())
    reseal(saved, genes=[*record["genes"][1:], "other"])
    with pytest.raises(ValueError, match="`gene_scores.index` must be the genes"):
        pk.Adapter.load(saved)
    columns = {name: values[1:] for name, values in record["gene_scores"]["columns"].items()}
    genes = record["genes"][1:]
    reseal(saved, genes=genes, gene_scores__index=genes, gene_scores__columns=columns)
    with pytest.raises(
        ValueError, match=rf"heads.safetensors .*reading.0.intercept must be .* of shape \({len(genes)},\)"
    ):
        pk.Adapter.load(saved)


def _first(tensors: dict[str, torch.Tensor], prefix: str) -> str:
    return next(name for name in sorted(tensors) if name.startswith(prefix))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("reading.0.0.out"), "reading.0.0.out is missing"),
        (lambda t: t.pop("reading.1.intercept"), "reading.1.intercept is missing"),
        (lambda t: t.pop("reading.0.0.offset"), "reading.0.0.offset is missing, or no vector"),
        (
            lambda t: t.update({"reading.0.0.0.centre": t["reading.0.0.0.centre"][1:].clone()}),
            r"reading.0.0.0.own must be floating-point numbers of shape \(511, ",
        ),
        (
            lambda t: t.update({"reading.0.0.0.around": t["reading.0.0.0.around"][:, 1:].clone()}),
            "reading.0.0.0.around must be floating-point numbers of shape",
        ),
        (
            lambda t: t.update({"reading.0.0.out": t["reading.0.0.out"].to(torch.bfloat16)}),
            "reading.0.0.out must be floating-point",
        ),
        (
            lambda t: t.update({"reading.0.intercept": t["reading.0.intercept"] * NAN}),
            "reading.0.intercept has values that are NaN",
        ),
        (lambda t: t.update({"head.coef": torch.zeros(1)}), "head.coef is not part of an adapter"),
        (lambda t: t.update({"evil": torch.zeros(1)}), "evil is not part of an adapter"),
        (lambda t: t.update({"trust.evil": torch.zeros(1)}), "trust.evil is not part of an adapter"),
        (lambda t: t["trust.held_out.scale"].mul_(NAN), r"trust.held_out.scale must be finite\)"),
        (lambda t: t["trust.held_out.scale"].mul_(0), "trust.held_out.scale must be above 0"),
        (lambda t: t["trust.held_out.floor"].sub_(1e6), "trust.held_out.floor must be at least 0"),
        (lambda t: t["trust.held_out.curve"].add_(1), "trust.held_out.curve must be finite or NaN, and at most 1.0000"),
        (
            lambda t: t.update({"projector.x": torch.zeros(1, dtype=torch.bfloat16)}),
            "projector.x must be floating-point",
        ),
        (lambda t: t.update({_first(t, "trained_on"): torch.zeros(4)}), "trained_on.* must be"),
        (lambda t: t.update({"trained_on.x.descriptors": torch.zeros(2, 128, dtype=torch.uint8)}), "of its points"),
    ],
)
def test_shapes_of_tensors(saved: Path, change: Any, message: str) -> None:
    tensors = load_file(saved / "heads.safetensors")
    change(tensors)
    save_file(tensors, saved / "heads.safetensors")
    reseal(saved)
    with pytest.raises(ValueError, match=rf"is damaged: heads\.safetensors cannot be read \(.*{message}"):
        pk.Adapter.load(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 10**7}, "its `r` must be a rank from 1 to"),
        ({"r": "8"}, "its `r` must be a rank"),
        ({"target_modules": ".*"}, "its `target_modules` must be names of layers"),
        ({"modules_to_save": ["head"]}, "would train parts of the encoder"),
        ({"peft_type": "PROMPT_TUNING"}, "is no adapter of linear layers"),
        ({"peft_type": 3}, "cannot be read"),
        (None, "it holds a list"),
    ],
)
def test_configurations_of_peft(saved: Path, changes: Any, message: str) -> None:
    file = saved / "adapter_config.json"
    file.write_text("[]" if changes is None else json.dumps(json.loads(file.read_text()) | changes))
    reseal(saved)
    with pytest.raises(ValueError, match=rf"is damaged: adapter_config\.json .*{message}"):
        pk.Adapter.load(saved)


@pytest.mark.parametrize("change", ["name", "shape", "layer"])
def test_weights_that_do_not_fit_are_not_left_out(saved: Path, change: str) -> None:
    weights = load_file(saved / "adapter_model.safetensors")
    first = sorted(weights)[0]
    if change == "name":
        weights["x" + first] = weights.pop(first)
    elif change == "shape":
        weights[first] = weights[first][..., 1:].contiguous()
    else:
        config = json.loads((saved / "adapter_config.json").read_text())
        config["target_modules"] = ["blocks.99.attn.qkv"]
        (saved / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, saved / "adapter_model.safetensors")
    reseal(saved)
    found = pk.Adapter.load(saved)
    tiles = np.zeros((1, found.spec.tile_px, found.spec.tile_px, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"The weights of this adapter and its configuration .* do not fit encoder"):
        found.predict(tiles, mpp=found.spec.mpp, compute={"device": "cpu"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "reinhard", "first": [10**400, 0, 0], "second": [1, 1, 1]},
        {"method": "reinhard", "first": [1e300, 0, 0], "second": [1, 1, 1]},
        {"method": "reinhard", "first": [1, 0, 0], "second": [1e-300, 1, 1]},
        {"method": "reinhard", "first": [True, 0, 0], "second": [1, 1, 1]},
        {"method": "macenko", "first": [5, 0, 0], "second": [0, 1, 0]},
    ],
)
def test_a_stain_that_is_none(saved: Path, wrong: dict[str, Any]) -> None:
    reseal(saved, stain=wrong)
    with pytest.raises(ValueError, match="`stain` must be null or a stain"):
        pk.Adapter.load(saved)


def test_a_stain_in_an_earlier_format(saved: Path) -> None:
    reseal(saved, format=8, stain=None, trust__novelty=None)
    with pytest.raises(ValueError, match="`stain` must be a stain, got null"):
        pk.Adapter.load(saved)
    reseal(saved, format=7, stain={"method": "reinhard", "first": [1, 0, 0], "second": [1, 1, 1]})
    with pytest.raises(ValueError, match="`stain` is no field of format 7"):
        pk.Adapter.load(saved)
