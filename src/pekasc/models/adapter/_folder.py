"""Save and load an adapter: a folder with pekasc.json, heads.safetensors, and the two files of PEFT."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

from pekasc._digests import sha256
from pekasc.models.adapter._record import MOST, check_config, check_record, check_tensors
from pekasc.models.adapter._saved_reading import old_reading, reading_from, reading_parts
from pekasc.models.adapter._saved_trust import PARTS, trust_from, trust_parts
from pekasc.models.encoders import Encoder
from pekasc.models.runtime import explained, write_whole
from pekasc.models.training import config_from, config_values
from pekasc.tiling import Stain, TileSpec

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from pekasc.models.adapter._adapter import Adapter

FORMAT = 9
READ = (2, 3, 4, 5, 6, 7, 8, FORMAT)
_ADDED = {"scales": [1.0], "orientations": 1}  # fields new in format 3, with the values of older adapters
_NO_FAULTS = {"faults": [], "scale": 1.0}  # of novelty, new in format 9
_FIELDS = (
    "encoder", "encoder_digest", "tile_px", "mpp", "depth", "method", "genes", "reading", "smooth_um",
    "smooth_weight", "fields_um", "orientations", "trust",
    "info", "gene_scores", "history", "selection", "files", "sha256",
)  # fmt: skip
_BEFORE_TRUST = tuple(name for name in _FIELDS if name != "trust")
_OLD_FIELDS = (
    *(name for name in _BEFORE_TRUST if name not in ("reading", "smooth_um", "smooth_weight", "fields_um")),
    "head",
    "context_um",
    "scales",
)
MAIN = "pekasc.json"
HEADS = "heads.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
_WHAT = "The adapter"
# files of ours that a killed save leaves: under the name of their content, or not whole
_LEFT = re.compile(
    r"(heads|adapter_model(_\d)?)-[0-9a-f]{16}\.safetensors|adapter_config(_\d)?-[0-9a-f]{16}\.json|"
    r"\.(pekasc|(heads|adapter_(model|config)(_\d)?)-[0-9a-f]{16})\.(json|safetensors)\.[0-9a-f]{32}\.part"
)


def _peft_files(number: int) -> tuple[str, str]:
    """Return the names of the two files of an adapter: the first has PEFT's own."""
    if not number:
        return PEFT_CONFIG, PEFT_WEIGHTS
    return f"adapter_config_{number + 1}.json", f"adapter_model_{number + 1}.safetensors"


_NAMES = [name for number in range(MOST) for name in _peft_files(number)]
FILES = (HEADS, *_NAMES)  # that a record may name


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
    """Write `adapter` to the folder `path`: at any moment the folder holds the old adapter or the new one.

    Files are written under names of their content first; then one rename of the record, which names their digests,
    makes the new adapter the one that is loaded; then they get their own names, which plain PEFT reads.
    """
    if path.exists() and (not path.is_dir() or (not (path / MAIN).is_file() and not all(map(_ours, path.iterdir())))):
        raise FileExistsError(f"{path} is there and holds no adapter of pekasc: choose another folder.")
    files, record = _contents(adapter)
    new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            if (path / MAIN).is_file():  # of a save that was killed after its record was written
                _settle(path, _digests(path))
            staged = {_staged(name, digest): files[name] for name, digest in record["files"].items()}
            try:
                for name, content in staged.items():
                    write_whole(path / name, lambda out, content=content: out.write(content), _WHAT)  # type: ignore[misc]
                text = json.dumps(record, indent=1).encode()
                write_whole(path / MAIN, lambda out: out.write(text), _WHAT)
            except BaseException:
                for name in staged:
                    with suppress(OSError):
                        (path / name).unlink()
                raise
            _settle(path, record["files"])
    except OSError as error:
        if new:
            with suppress(OSError):  # only if nothing is in it
                path.rmdir()
        raise error if str(path) in str(error) else explained(error, path, _WHAT) from error
    _sweep_beside(path)


def _staged(name: str, digest: str) -> str:
    stem, suffix = name.rsplit(".", 1)
    return f"{stem}-{digest[:16]}.{suffix}"


def _ours(file: Path) -> bool:
    """Return whether an unfinished save left the file."""
    return _LEFT.fullmatch(file.name) is not None


def _digests(path: Path) -> dict[str, str]:
    """Return the digests that the record in a folder names; none if it cannot be read."""
    try:
        record = _read_record(path)
        check_record(record)
        return dict(record["files"])
    except ValueError:
        return {}


def _settle(path: Path, digests: Mapping[str, str]) -> None:
    """Give files under names of their content their own names, and delete what is not named in the record."""
    for name, digest in digests.items():
        if (path / _staged(name, digest)).is_file():
            (path / _staged(name, digest)).replace(path / name)
    left = [file for file in path.iterdir() if _ours(file)]
    if digests:
        left += [path / name for name in (HEADS, *_NAMES) if name not in digests]
    for file in left:
        file.unlink(missing_ok=True)


def _sweep_beside(path: Path) -> None:
    """Delete the hidden folders that killed saves of earlier versions left beside `path`."""
    for folder in path.absolute().parent.glob(f".{glob.escape(path.name)}-????????"):
        if folder.is_dir() and not folder.is_symlink() and {p.name for p in folder.iterdir()} <= {"adapter"}:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other saves into the same folder waiting; the lock is on the folder, so that no file stays."""
    if fcntl is None:
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _contents(adapter: Adapter) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the files of an adapter, and its record."""
    trained_on = {f"trained_on.{image}": centres for image, centres in adapter.trained_on.items()}
    reading, arrays = reading_parts(adapter.reading)
    trust, trust_arrays = trust_parts(adapter.held_out, adapter.novelty, adapter.calibration)
    arrays |= {**trained_on, **trust_arrays}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    for kind, state in adapter.weights.items():
        if kind != "adapter":
            tensors |= {f"{kind}.{name}": tensor.contiguous() for name, tensor in state.items()}
    files = {HEADS: to_bytes(tensors)}
    first = [] if adapter.config is None else [(adapter.config, adapter.weights["adapter"])]
    for number, (config, state) in enumerate([*first, *adapter.others]):
        weights = {name: tensor.contiguous() for name, tensor in state.items()}
        config_file, weights_file = _peft_files(number)
        files[config_file] = json.dumps(config_values(config), indent=2, sort_keys=True).encode()
        files[weights_file] = to_bytes(weights, metadata={"format": "pt"})
    record = {
        "format": FORMAT,
        "encoder": adapter.encoder.to_dict(),
        "encoder_digest": adapter.encoder_digest,
        "tile_px": adapter.spec.tile_px,
        "mpp": adapter.spec.mpp,
        "depth": None if adapter.depth is None else list(adapter.depth),
        "method": adapter.method,
        "genes": list(adapter.genes),
        "reading": reading,
        "smooth_um": adapter.reading.smooth_um,
        "smooth_weight": adapter.reading.smooth_weight,
        "fields_um": list(adapter.fields_um),
        "orientations": adapter.orientations,
        "trust": trust,
        "info": dict(adapter.info),
        "gene_scores": _frame_to_json(adapter.gene_scores),
        "history": _frame_to_json(adapter.history),
        "selection": _frame_to_json(adapter.selection),
        "files": {name: sha256(content) for name, content in files.items()},
        "stain": None if adapter.stain is None else adapter.stain.to_dict(),
    }
    record = json.loads(json.dumps(record))  # as it will be read back
    return files, {**record, "sha256": _seal(record)}


def load(path: Path) -> dict[str, Any]:
    """Return the fields of the adapter in the folder `path`."""
    record = _read_record(path)
    try:
        check_record(record)
        encoder = Encoder.from_dict(record["encoder"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"The adapter in {path} is damaged: {MAIN}: {error}.") from error
    content = {name: _read_file(path, name, digest) for name, digest in record["files"].items()}
    try:
        tensors = from_bytes(content[HEADS])
        check_tensors(tensors, record)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"The adapter in {path} is damaged: {HEADS} cannot be read ({error}).") from error
    array = {name: tensor.numpy() for name, tensor in tensors.items()}
    if record["format"] < 5:
        reading = old_reading(array, record, adapted=PEFT_WEIGHTS in record["files"])
        side = record["tile_px"] * record["mpp"]
        fields_um = tuple(scale * side for scale in record["scales"][1:])
    else:
        reading, fields_um = reading_from(record["reading"], array), tuple(record["fields_um"])
        reading = replace(reading, smooth_um=record["smooth_um"], smooth_weight=record["smooth_weight"])
    held_out, novelty, calibration = trust_from(record.get("trust", dict.fromkeys(PARTS)), array)
    weights: dict[str, Mapping[str, torch.Tensor]] = {}
    for kind in ("projector", "cluster_head"):
        state = {name[len(kind) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{kind}.")}
        if state:
            weights[kind] = state
    adapters = [_adapter(path, content, number) for number in range(len(content) // 2)]
    if adapters:
        weights["adapter"] = adapters[0][1]
    return {
        "encoder": encoder,
        "encoder_digest": record["encoder_digest"],
        "spec": TileSpec(tile_px=record["tile_px"], mpp=record["mpp"]),
        "depth": None if record["depth"] is None else tuple(record["depth"]),
        "method": record["method"],
        "genes": tuple(record["genes"]),
        "reading": reading,
        "fields_um": fields_um,
        "orientations": record["orientations"],
        "config": adapters[0][0] if adapters else None,
        "weights": weights,
        "others": tuple(adapters[1:]),
        "gene_scores": _frame_from_json(record["gene_scores"]),
        "history": _frame_from_json(record["history"]),
        "selection": _frame_from_json(record["selection"]),
        "info": record["info"],
        "held_out": held_out,
        "novelty": novelty,
        "calibration": calibration,
        "stain": None if record.get("stain") is None else Stain.from_dict(record["stain"]),
        "trained_on": {name[len("trained_on.") :]: a for name, a in array.items() if name.startswith("trained_on.")},
    }


def _read_file(path: Path, name: str, digest: str) -> bytes:
    """Return a file of the adapter: under the name of its content, if a save was killed, or under its own."""
    for file in (path / _staged(name, digest), path / name):
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            continue
        if sha256(content) == digest:
            return content
    if not (path / name).is_file():
        raise FileNotFoundError(f"The adapter in {path} is damaged: {name} is missing. Copy the folder again.")
    raise ValueError(f"The adapter in {path} is damaged: {name} is not the file that was saved with it.")


def _adapter(path: Path, content: Mapping[str, bytes], number: int) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """Return configuration and weights of an adapter from its two files."""
    config_file, weights_file = _peft_files(number)
    try:
        weights = from_bytes(content[weights_file])
        config = config_from(json.loads(content[config_file]))
        check_config(config, weights)
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"The adapter in {path} is damaged: {config_file} or {weights_file} cannot be read ({error})."
        ) from error
    return config, weights


def _read_record(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        what = "it is a file, and an adapter is a folder" if path.exists() else "there is no such folder"
        raise FileNotFoundError(f"No adapter at {path}: {what}.")
    main = path / MAIN
    if not main.is_file():
        there = sorted(p.name for p in path.iterdir())[:5]
        raise ValueError(
            f"{path} holds no adapter of pekasc: {MAIN} is missing (found {there}). "
            "A plain PEFT adapter has no expression head and cannot be loaded."
        )
    try:
        record = json.loads(main.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The adapter in {path} is damaged: {MAIN} is no JSON ({error}).") from error
    if not isinstance(record, dict) or "format" not in record or "files" not in record:
        raise ValueError(f"{path} holds no adapter of pekasc: {MAIN} lacks the fields of one.")
    if record["format"] not in READ:
        newer = isinstance(record["format"], int) and record["format"] > FORMAT
        raise ValueError(
            f"The adapter in {path} has format {record['format']}, this pekasc reads up to {FORMAT}: "
            f"{'update pekasc' if newer else 'fit it again, or load it with the version that saved it'}."
        )
    old = record["format"] < 3
    wanted = _FIELDS if record["format"] >= 7 else _BEFORE_TRUST if record["format"] >= 5 else _OLD_FIELDS
    if record["format"] >= 8:
        wanted = (*wanted, "stain")
    missing = [name for name in wanted if name not in record and not (old and name in _ADDED)]
    if missing:
        raise ValueError(f"The adapter in {path} is damaged: {MAIN} lacks {missing}.")
    named = set(record["files"]) if isinstance(record["files"], dict) else set()
    # format 6 was 5 with several adapters
    counts = {6: range(2, MOST + 1)}.get(record["format"], range(MOST + 1) if record["format"] >= 7 else range(2))
    if named not in [{HEADS, *_NAMES[: 2 * count]} for count in counts]:
        raise ValueError(f"The adapter in {path} is damaged: {MAIN} names other files than those of an adapter.")
    if record.get("head", "ridge") != "ridge":
        raise ValueError(
            f"The adapter in {path} has the head {record['head']!r}, which this pekasc does not read: fit it again, or "
            "load it with the version that saved it."
        )
    if _seal(record) != record["sha256"]:
        raise ValueError(f"The adapter in {path} is damaged: {MAIN} was changed after it was saved. Copy it again.")
    look = record["trust"].get("novelty") if isinstance(record.get("trust"), dict) else None
    if record["format"] < 9 and isinstance(look, dict):
        if known := sorted(set(look) & set(_NO_FAULTS)):
            raise ValueError(
                f"The adapter in {path} is damaged: {MAIN}: `trust.novelty.{known[0]}` is no field of format "
                f"{record['format']}."
            )
        look |= _NO_FAULTS
    return {**_ADDED, **record} if old else record
