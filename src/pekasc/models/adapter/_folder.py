"""Save and load an adapter: a folder with pekasc.json, heads.safetensors, and the two files of PEFT."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pekasc._digests import file_sha256, sha256
from pekasc.models.encoders import Encoder
from pekasc.models.heads import Head, Projection, RidgeHead
from pekasc.tiling import TileSpec

if TYPE_CHECKING:
    from pekasc.models.adapter._adapter import Adapter

FORMAT = 3
_ADDED = {"scales": [1.0], "orientations": 1}  # fields new in format 3, with the values of older adapters
_FIELDS = (
    "encoder", "encoder_digest", "tile_px", "mpp", "depth", "method", "genes", "head", "context_um", "scales",
    "orientations", "info", "gene_scores", "history", "selection", "files", "sha256",
)  # fmt: skip
MAIN = "pekasc.json"
HEADS = "heads.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"


def _frame_to_json(frame: pd.DataFrame) -> dict[str, Any]:
    # Python's own JSON writes the shortest text that gives the same float back; pandas rounds
    return {
        "index": list(frame.index),
        "index_name": frame.index.name,
        "columns": {str(name): frame[name].tolist() for name in frame},
        "dtypes": {str(name): str(frame[name].dtype) for name in frame},
    }


def _frame_from_json(record: Mapping[str, Any]) -> pd.DataFrame:
    index = pd.Index(record["index"], name=record["index_name"])
    columns = {k: pd.Series(v, index=index, dtype=record["dtypes"][k]) for k, v in record["columns"].items()}
    return pd.DataFrame(columns, index=index, columns=pd.Index(list(columns), dtype=str))


def _seal(record: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in record.items() if k != "sha256"}, sort_keys=True)
    return sha256(text)


def save(adapter: Adapter, path: Path) -> None:
    """Write `adapter` to the folder `path`, all or nothing."""
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / MAIN).is_file())):
        raise FileExistsError(f"{path} is there and holds no adapter of pekasc: choose another folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as name:
        folder = Path(name) / "adapter"
        folder.mkdir()
        _write(adapter, folder)
        if not path.exists():
            folder.rename(path)
            return
        # other files in the folder stay. The record is deleted first and written last, so that an interrupted save
        # leaves an incomplete folder and not a mixture of two adapters
        for name in (MAIN, HEADS, PEFT_WEIGHTS, PEFT_CONFIG):
            (path / name).unlink(missing_ok=True)
        for file in sorted(folder.iterdir(), key=lambda file: file.name == MAIN):
            shutil.move(file, path / file.name)


def _write(adapter: Adapter, folder: Path) -> None:
    trained_on = {f"trained_on.{image}": centres for image, centres in adapter.trained_on.items()}
    arrays = {**_head_arrays(adapter.head), **trained_on}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    for kind, state in adapter.weights.items():
        if kind != "adapter":
            tensors |= {f"{kind}.{name}": tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / HEADS)
    files = [HEADS]
    if adapter.config is not None:
        adapter.config.save_pretrained(str(folder))
        weights = {name: tensor.contiguous() for name, tensor in adapter.weights["adapter"].items()}
        save_file(weights, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
        files += [PEFT_CONFIG, PEFT_WEIGHTS]
    record = {
        "format": FORMAT,
        "encoder": adapter.encoder.to_dict(),
        "encoder_digest": adapter.encoder_digest,
        "tile_px": adapter.spec.tile_px,
        "mpp": adapter.spec.mpp,
        "depth": None if adapter.depth is None else list(adapter.depth),
        "method": adapter.method,
        "genes": list(adapter.genes),
        "head": "ridge",
        "context_um": adapter.context_um,
        "scales": list(adapter.scales),
        "orientations": adapter.orientations,
        "info": dict(adapter.info),
        "gene_scores": _frame_to_json(adapter.gene_scores),
        "history": _frame_to_json(adapter.history),
        "selection": _frame_to_json(adapter.selection),
        "files": {name: file_sha256(folder / name) for name in files},
    }
    record = json.loads(json.dumps(record))  # as it will be read back
    (folder / MAIN).write_text(json.dumps({**record, "sha256": _seal(record)}, indent=1))


def _head_arrays(head: Head) -> dict[str, np.ndarray]:
    if not isinstance(head, RidgeHead):
        raise TypeError(f"A head that is no ridge regression cannot be saved, got {type(head).__name__}.")
    return {
        "head.mean": head.projection.mean,
        "head.scale": head.projection.scale,
        "head.components": head.projection.components,
        "head.coef": head.coef,
        "head.intercept": head.intercept,
        "head.alpha": np.asarray(head.alpha, dtype=np.float64),
    }


def _head(array: Mapping[str, np.ndarray]) -> Head:
    projection = Projection(array["head.mean"], array["head.scale"], array["head.components"])
    alpha = array["head.alpha"]
    return RidgeHead(
        projection, array["head.coef"], array["head.intercept"], float(alpha) if alpha.ndim == 0 else alpha
    )


def load(path: Path) -> dict[str, Any]:
    """Return the fields of the adapter in the folder `path`."""
    record = _read_record(path)
    for name, expected in record["files"].items():
        if not (path / name).is_file():
            raise FileNotFoundError(f"The adapter in {path} is damaged: {name} is missing. Copy the folder again.")
        if file_sha256(path / name) != expected:
            raise ValueError(f"The adapter in {path} is damaged: {name} is not the file that was saved with it.")
    try:
        tensors = load_file(path / HEADS)
    except SafetensorError as error:
        raise ValueError(f"The adapter in {path} is damaged: {HEADS} cannot be read ({error}).") from error
    array = {name: tensor.numpy() for name, tensor in tensors.items()}
    weights: dict[str, Mapping[str, torch.Tensor]] = {}
    for kind in ("projector", "cluster_head"):
        state = {name[len(kind) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{kind}.")}
        if state:
            weights[kind] = state
    config = None
    if PEFT_WEIGHTS in record["files"]:
        config = PeftConfig.from_pretrained(str(path))
        weights["adapter"] = load_file(path / PEFT_WEIGHTS)
    return {
        "encoder": Encoder.from_dict(record["encoder"]),
        "encoder_digest": record["encoder_digest"],
        "spec": TileSpec(tile_px=record["tile_px"], mpp=record["mpp"]),
        "depth": None if record["depth"] is None else tuple(record["depth"]),
        "method": record["method"],
        "genes": tuple(record["genes"]),
        "head": _head(array),
        "context_um": record["context_um"],
        "scales": tuple(record["scales"]),
        "orientations": record["orientations"],
        "config": config,
        "weights": weights,
        "gene_scores": _frame_from_json(record["gene_scores"]),
        "history": _frame_from_json(record["history"]),
        "selection": _frame_from_json(record["selection"]),
        "info": record["info"],
        "trained_on": {name[len("trained_on.") :]: a for name, a in array.items() if name.startswith("trained_on.")},
    }


def _read_record(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise FileNotFoundError(f"No adapter at {path}: there is no such folder.")
    main = path / MAIN
    if not main.is_file():
        there = sorted(p.name for p in path.iterdir())[:5]
        raise ValueError(
            f"{path} holds no adapter of pekasc: {MAIN} is missing (found {there}). "
            "A plain PEFT adapter has no expression head and cannot be loaded."
        )
    try:
        record = json.loads(main.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"The adapter in {path} is damaged: {MAIN} is no JSON ({error}).") from error
    if not isinstance(record, dict) or "format" not in record or "files" not in record:
        raise ValueError(f"{path} holds no adapter of pekasc: {MAIN} lacks the fields of one.")
    if record["format"] not in (FORMAT - 1, FORMAT):
        newer = isinstance(record["format"], int) and record["format"] > FORMAT
        raise ValueError(
            f"The adapter in {path} has format {record['format']}, this pekasc reads {FORMAT}: "
            f"{'update pekasc' if newer else 'fit it again, or load it with the version that saved it'}."
        )
    old = record["format"] < FORMAT
    missing = [name for name in _FIELDS if name not in record and not (old and name in _ADDED)]
    if missing:
        raise ValueError(f"The adapter in {path} is damaged: {MAIN} lacks {missing}.")
    if record["head"] != "ridge":
        raise ValueError(
            f"The adapter in {path} has the head {record['head']!r}, which this pekasc does not read: fit it again, or "
            "load it with the version that saved it."
        )
    if _seal(record) != record["sha256"]:
        raise ValueError(f"The adapter in {path} is damaged: {MAIN} was changed after it was saved. Copy it again.")
    return {**_ADDED, **record} if old else record
