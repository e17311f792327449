"""The record of a saved adapter: which values each field may have, and which shapes the weights beside it.

The record's own SHA-256 shows accidents. Whoever edits it by hand, or sends it, may have made that anew: every value is
checked before it is used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor

from pekasc._expression import TARGETS
from pekasc._options import REFITS
from pekasc.models.adapter._saved_reading import expected_shapes
from pekasc.models.adapter._saved_trust import KIND, check_trust
from pekasc.models.trust import COUNTS, GUARANTEES, INSIDE, RESIDUALS, UNSEEN
from pekasc.tiling import Stain

Check = Callable[[Any], bool]
_MOST = 1e15
MOST = 8  # adapters of an ensemble
_DTYPES = {"float64": "number", "float32": "number", "int64": "whole", "int32": "whole", "bool": "flag"}
_DTYPES |= dict.fromkeys(("object", "str", "string"), "scalar")


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MOST


def _number(value: Any) -> bool:
    return _whole(value) or (isinstance(value, float) and math.isfinite(value))


def _number_or_nan(value: Any) -> bool:
    return _whole(value) or isinstance(value, float)


def _count(value: Any) -> bool:
    return _whole(value) and value >= 0


def _positive(value: Any) -> bool:
    return _number(value) and 0 < value < _MOST


def _name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list(check: Check, least: int = 0, most: float = math.inf) -> Check:
    return lambda value: isinstance(value, list) and least <= len(value) <= most and all(map(check, value))


def _mapping(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _plain(value: Any, levels: int = 6) -> bool:
    """Return whether a value is made of scalars, lists and mappings, of a few levels."""
    if isinstance(value, list | dict):
        return levels > 0 and all(
            _plain(part, levels - 1) for part in (value.values() if isinstance(value, dict) else value)
        )
    return _scalar(value)


def _each_once(check: Check) -> Check:
    return lambda value: check(value) and len(set(value)) == len(value)


_SOURCE: Check = lambda value: (  # noqa: E731
    isinstance(value, list)
    and (len(value) == 3 or (len(value) == 4 and value[0] == "adapted" and _count(value[3]) and 0 < value[3] < MOST))
    and value[0] in ("frozen", "adapted")
    and _count(value[1])
    and value[1] < 17
    and (value[2] is None or _each_once(_list(lambda v: _count(v) and 0 < v < 10_000, 1))(value[2]))
)
_MEMBER: dict[str, Check] = {
    "name": _name,
    "weight": lambda value: _positive(value) and value <= 1 + 1e-9,  # a sum of shares
    "variant": lambda value: _count(value) and value < 8,
    "context_um": _optional(_positive),
    "blocks": _list(_list(_SOURCE, 1, 1000), 1, 1000),
}


_KIND: Check = lambda value: value in (COUNTS, RESIDUALS)  # noqa: E731
_DEPTH: Check = _optional(_each_once(_list(lambda v: _count(v) and 0 < v < 10_000, 1)))
_TRUST: dict[str, dict[str, Check]] = {
    "held_out": {"kind": _KIND, "groups": _list(lambda value: isinstance(value, str), 1)},
    "novelty": {
        "depths": _list(_DEPTH, 1, 16),
        "rest": _positive,
        "n_tiles": _list(_positive, 1, 16),
        "faults": _each_once(_list(_name, 0, 100)),
        "scale": _positive,
    },
    "calibration": {
        "kind": _KIND,
        "level": lambda value: _number(value) and 0 < value < 1,
        "guarantee": lambda value: value in GUARANTEES,
        "groups": _list(lambda value: isinstance(value, str), 1),
        "source": lambda value: value in (INSIDE, UNSEEN),
    },
}


def _trust(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == _TRUST.keys()
        and all(value[part] is None or _holds_all(value[part], checks) for part, checks in _TRUST.items())
    )


def _stain(value: Any) -> bool:
    try:
        Stain.from_dict(value)
    except ValueError:
        return False
    return True


def _holds_all(value: Any, checks: Mapping[str, Check]) -> bool:
    return isinstance(value, dict) and value.keys() == checks.keys() and all(c(value[k]) for k, c in checks.items())


# what each field may be, and how an error says so
_FIELDS: dict[str, tuple[Check, str]] = {
    "encoder_digest": (_digest, "a SHA-256"),
    "tile_px": (lambda value: _whole(value) and 0 < value <= 100_000, "a number of pixels"),
    "mpp": (_positive, "a positive number"),
    "depth": (_DEPTH, "null or numbers of blocks"),
    "method": (_name, "a name"),
    "genes": (_each_once(_list(_name, 1)), "names, each once"),
    "context_um": (_optional(_positive), "null or a positive number"),
    "scales": (
        lambda value: _each_once(_list(_positive, 1))(value) and value[0] == 1,
        "positive numbers, each once, the first 1",
    ),
    "reading": (_list(lambda value: _holds_all(value, _MEMBER), 1, 512), "a list of members"),
    "smooth_um": (_optional(_positive), "null or a positive number"),
    "smooth_weight": (lambda value: _number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "fields_um": (_each_once(_list(_positive, 0, 16)), "positive numbers, each once"),
    "orientations": (lambda value: _whole(value) and value in (1, 2, 4, 8), "1, 2, 4 or 8"),
    "stain": (_optional(_stain), "null or a stain: its method and two lists of three numbers"),
    "trust": (_trust, "what is known of its errors: held_out, novelty, calibration"),
    "info": (lambda value: isinstance(value, dict) and _plain(value), "plain values by name"),
    "files": (_mapping(_digest), "a SHA-256 for every file"),
}
_ENCODER: dict[str, tuple[Check, str]] = {
    "name": (_name, "a name"),
    "weights": (_optional(_name), "null or a path"),
    "model_kwargs": (lambda value: isinstance(value, dict) and _plain(value, 2), "plain values by name"),
    "mean": (_optional(_list(_number, 3, 3)), "null or three numbers"),
    "std": (_optional(_list(_positive, 3, 3)), "null or three positive numbers"),
    "mpp": (_optional(_positive), "null or a positive number"),
    "adapter_targets": (_list(_name), "names of layers"),
    "gated": (_flag, "true or false"),
    "pooling": (lambda value: value in (None, "class", "class+mean"), 'null, "class" or "class+mean"'),
    **dict.fromkeys(("key", "licence", "citation", "note", "hub", "hub_file"), (_optional(_name), "null or a text")),
}
# what the summary needs, and what it takes where it is there
_NEEDED = ("n_spots", "groups", "target", "head", "depth", "epochs", "versions")
_INFO: dict[str, tuple[Check, str]] = {
    "n_spots": (_count, "a number of spots"),
    "groups": (_list(lambda value: isinstance(value, str)), "names of groups"),
    "target": (_name, "a name"),
    "obsm": (_optional(_name), "null or a key of obsm"),
    "head": (_name, "a name"),
    "depth": (_name, "a name"),
    "epochs": (_count, "a number of epochs"),
    "n_parameters": (_count, "a number of parameters"),
    "refit": (lambda value: value in (None, *REFITS), f"null or one of {list(REFITS)}"),
    "teacher": (_optional(_name), "null or a name"),
    "total_genes": (_each_once(_list(_name, 1)), "names, each once"),
    "teacher_licence": (_optional(lambda value: isinstance(value, str)), "null or a text"),
    "versions": (_mapping(_name), "versions by name"),
    "call": (_name, "a text"),
    "profile": (
        lambda value: (
            isinstance(value, dict)
            and all(_mapping(_number)(value.get(name)) for name in ("seconds", "tiles_per_second"))
            and _number(value.get("peak_memory"))
        ),
        "seconds and tiles per second by stage, and peak_memory",
    ),
}


def check_record(record: Mapping[str, Any]) -> None:
    """Check the values of a record.

    Raises
    ------
    ValueError
        Naming the field that is wrong.
    """
    _check_fields(record, _FIELDS, "")
    if not isinstance(record["encoder"], dict):
        raise ValueError(f"`encoder` must be the description of an encoder, got {_short(record['encoder'])}")
    if unknown := sorted(set(record["encoder"]) - set(_ENCODER)):
        raise ValueError(f"`encoder` has unknown fields {unknown}")
    _check_fields(record["encoder"], _ENCODER, "encoder.", needed=("name",))
    _check_fields(record["info"], _INFO, "info.", needed=_NEEDED)
    sources = [source for member in record.get("reading", ()) for block in member["blocks"] for source in block]
    if (widest := max((source[1] for source in sources), default=0)) > len(record.get("fields_um", ())):
        raise ValueError(f"`reading` reads field of view {widest}, and there are {len(record['fields_um'])}")
    n_adapters = sum(name.startswith("adapter_model") for name in record["files"])
    if any(len(source) == 4 and source[3] >= n_adapters for source in sources):
        raise ValueError(f"`reading` reads more adapters than the {n_adapters} that there are")
    if record["format"] < 8 and "stain" in record:
        raise ValueError(f"`stain` is no field of format {record['format']}")
    if record["format"] == 8 and record["stain"] is None:
        raise ValueError("`stain` must be a stain, got null")
    wanted = COUNTS if record["info"]["target"] == TARGETS["log1p"] else RESIDUALS
    for name in ("held_out", "calibration"):
        part = record.get("trust", {}).get(name)
        if part is not None and part["kind"] != wanted:
            raise ValueError(f"`trust.{name}` is of {part['kind']}, and the target is {record['info']['target']!r}")
    for name in ("gene_scores", "history", "selection"):
        _check_frame(record[name], name)
    scores = record["gene_scores"]
    if scores["index"] != record["genes"]:
        raise ValueError("`gene_scores.index` must be the genes")
    if _DTYPES.get(scores["dtypes"].get("pearson")) != "number":
        raise ValueError("`gene_scores` must have a column of numbers, pearson")


def _check_fields(
    values: Mapping[str, Any], table: Mapping[str, tuple[Check, str]], prefix: str, needed: tuple[str, ...] = ()
) -> None:
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"`{prefix}{missing[0]}` is missing")
    for name, (check, words) in table.items():
        if name in values and not _holds(check, values[name]):
            raise ValueError(f"`{prefix}{name}` must be {words}, got {_short(values[name])}")


def _holds(check: Check, value: Any) -> bool:
    try:
        return check(value)
    except TypeError:  # such as lists, which are in no set
        return False


def _check_frame(value: Any, field: str) -> None:
    """Check a table: an index, and columns of its length with their types."""
    if not isinstance(value, dict) or value.keys() != {"index", "index_name", "columns", "dtypes"}:
        raise ValueError(f"`{field}` must be a table with index, index_name, columns and dtypes, got {_short(value)}")
    index, columns, dtypes = value["index"], value["columns"], value["dtypes"]
    checks = {"number": _number_or_nan, "whole": _whole, "flag": _flag, "scalar": _scalar}
    if not _list(lambda v: isinstance(v, str) or _whole(v))(index) or not _optional(_name)(value["index_name"]):
        raise ValueError(f"`{field}.index` must be names or numbers, got {_short(index)}")
    if not isinstance(columns, dict) or not isinstance(dtypes, dict) or columns.keys() != dtypes.keys():
        raise ValueError(f"`{field}.dtypes` must name the type of every column")
    for name, column in columns.items():
        kind = _DTYPES.get(dtypes[name]) if isinstance(dtypes[name], str) else None
        if kind is None or not _list(checks[kind], len(index), len(index))(column):
            raise ValueError(f"`{field}.columns.{name}` must be {len(index)} values of type {_short(dtypes[name])}")


def check_tensors(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Check shapes and values of the reading, and of what shows the training tissue.

    Raises
    ------
    ValueError
        Naming the tensor that is wrong.
    """
    if record["format"] < 5:
        _check_old_head(tensors, len(record["genes"]))
        n, parts = tensors["head.mean"].numel(), len(record["scales"]) * (1 if record["context_um"] is None else 2)
        if not n or n % parts:
            raise ValueError(f"head.mean has {n} features, which is none or no multiple of {parts}")
        kinds: tuple[str, ...] = ("head", "projector", "cluster_head")
    else:
        for name, shape in expected_shapes(record["reading"], len(record["genes"]), tensors).items():
            if name not in tensors:
                raise ValueError(f"{name} is missing")
            _check_tensor(name, tensors[name], [shape])
        kinds = ("reading", "projector", "cluster_head")
        if record["format"] >= 7:
            check_trust(record["trust"], len(record["genes"]), tensors)
            kinds = (*kinds, KIND)
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "trained_on":
            _check_place(rest, tensor, tensors)
        elif kind not in kinds:
            raise ValueError(f"{name} is not part of an adapter")
        elif tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be floating-point numbers, got {tensor.dtype}")


def _check_old_head(tensors: Mapping[str, Tensor], n_genes: int) -> None:
    wanted = ("mean", "scale", "components", "coef", "intercept", "alpha")
    if missing := [f"head.{name}" for name in wanted if f"head.{name}" not in tensors]:
        raise ValueError(f"{missing[0]} is missing")
    head = {name: tensors[f"head.{name}"] for name in wanted}
    n, k = head["mean"].numel(), len(head["components"]) if head["components"].ndim else 0
    shapes: dict[str, list[tuple[int, ...]]] = {
        "mean": [(n,)], "scale": [(n,)], "components": [(k, n)], "coef": [(k, n_genes)], "intercept": [(n_genes,)],
        "alpha": [(), (1,), (n_genes,)],
    }  # fmt: skip
    for name, tensor in head.items():
        _check_tensor(f"head.{name}", tensor, shapes[name])
    for name in ("scale", "alpha"):
        if not bool((head[name] > 0).all()):
            raise ValueError(f"head.{name} must be positive")


def _check_tensor(name: str, tensor: Tensor, shapes: list[tuple[int, ...]]) -> None:
    if tensor.dtype not in (torch.float32, torch.float64) or tuple(tensor.shape) not in shapes:
        raise ValueError(
            f"{name} must be floating-point numbers of shape {' or '.join(map(str, shapes))}, got {tensor.dtype} of "
            f"shape {tuple(tensor.shape)}"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} has values that are NaN or infinite")


def _check_place(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> None:
    """Check centres of training tiles, (n, 2), and landmarks of an image: points (m, 3) and descriptors (m, 128)."""
    n = len(tensor) if tensor.ndim else 0
    if name.endswith(".descriptors"):
        points = tensors.get(f"trained_on.{name.removesuffix('.descriptors')}.points")
        if tensor.dtype != torch.uint8 or tuple(tensor.shape) != (n, 128) or points is None or len(points) != n:
            raise ValueError(f"trained_on.{name} must be 128 bytes for each of its points")
    else:
        _check_tensor(f"trained_on.{name}", tensor, [(n, 3 if name.endswith(".points") else 2)])


def check_config(config: PeftConfig, weights: Mapping[str, Tensor]) -> None:
    """Check the sizes in a PEFT configuration against the weights: building what it describes takes no more room.

    Raises
    ------
    ValueError
        Naming the field that is wrong.
    """
    targets = getattr(config, "target_modules", None)
    if not isinstance(targets, list | set) or not targets or not all(map(_name, targets)):
        raise ValueError(f"its `target_modules` must be names of layers, got {_short(targets)}")
    if getattr(config, "layer_replication", None):
        raise ValueError("its `layer_replication` would copy layers of the encoder")
    if not weights or not all(tensor.is_floating_point() and tensor.ndim for tensor in weights.values()):
        raise ValueError("the weights must be floating-point numbers")
    most = max(max(tensor.shape) for tensor in weights.values())
    for name in ("r", "init_r", "target_r"):
        rank = getattr(config, name, 1)
        if not _whole(rank) or not 0 <= rank <= most:  # 0 where PEFT derives it from another size
            raise ValueError(
                f"its `{name}` must be a rank from 1 to {most}, as the weights have it, got {_short(rank)}"
            )
    pattern: Any = getattr(config, "rank_pattern", None) or {}
    ranks: list[Any] = list(pattern.values()) if isinstance(pattern, dict) else [None]
    if not all(_list(_flag, 1, most)(rank) or (_whole(rank) and 1 <= rank <= most) for rank in ranks):
        raise ValueError("its `rank_pattern` must give ranks by layer")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
