"""Several processes, each with a device: who has which tiles, and how results come together."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException

_T = TypeVar("_T")
_REDUCED = 2**26  # numbers in one message
_PLACES = ("accelerator", "devices", "strategy", "num_nodes", "plugins")


def launch(trainer: Mapping[str, Any], device: torch.device) -> tuple[torch.device, dict[str, Any]]:
    """Start the processes that Lightning's arguments ask for; return this process's device, and all arguments.

    As with Lightning's own strategies, a script is run again for every further device; processes that ``torchrun`` or
    a cluster started are found. With one device nothing is started.

    Parameters
    ----------
    trainer
        Arguments of :class:`lightning.Trainer`.
    device
        Where there is one device, and `trainer` names none.

    Raises
    ------
    ValueError
        If the devices are not there, or the strategy starts processes in a way that cannot be joined here.
    """
    asked = {name: trainer[name] for name in _PLACES if name in trainer}
    if not asked:
        return device, dict(trainer)
    if "accelerator" not in asked:
        asked["accelerator"] = "auto" if "devices" in asked and device.type != "cpu" else device.type
    asked.setdefault("devices", 1 if device.index is None else [device.index])
    try:
        fabric = L.Fabric(**asked)
        fabric.launch()
    except (MisconfigurationException, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, TypeError) and "launch" in str(error):
            raise ValueError(
                f"`trainer`: strategy={asked.get('strategy', 'auto')!r} forks or spawns processes in the middle of a "
                'call. Run a script (`python script.py` or `torchrun script.py`) with strategy="ddp", or take one '
                "device here."
            ) from error
        n = torch.cuda.device_count()
        there = f"{n} CUDA device{'s' if n > 1 else ''}" if n else "the CPU"
        raise ValueError(f"`trainer={asked}` cannot be had: {error} Available: {there}.") from error
    # what was left open is decided once, for every trainer
    return fabric.device, {**trainer, **asked}


def n_ranks() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _several() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if _several() else 0


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def owners(sections: np.ndarray, reading_order: np.ndarray) -> np.ndarray:
    """Return the process that has each tile, (n,): of every section each process has one stretch of the reading order.

    So each reads only its part of an image, and all have as much to do whichever sections a fold leaves out.
    """
    out = np.zeros(len(sections), dtype=np.int64)
    for section in np.unique(sections):
        rows = reading_order[sections[reading_order] == section]
        out[rows] = np.arange(len(rows)) * n_ranks() // len(rows)
    return out


def broadcast(value: _T) -> _T:
    """Return what the first process has: choices must be the same in all, whatever their machines round to."""
    if not _several():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather(value: _T) -> list[_T]:
    """Return what every process has, in their order."""
    if not _several():
        return [value]
    found: list[Any] = [None] * n_ranks()
    dist.all_gather_object(found, value)
    return found


@contextmanager
def raise_together() -> Iterator[None]:
    """Run a block in which one process may fail, and no other is waited for: then all fail, and none waits for it.

    Raises
    ------
    RuntimeError
        In the others; in the one that failed, its own error.
    """
    if not _several():
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 (raised below, once the others know)
        own = error
    errors = all_gather(None if own is None else f"{type(own).__name__}: {own}")
    if own is not None:
        raise own
    if failed := [f"process {number}: {text}" for number, text in enumerate(errors) if text is not None]:
        raise RuntimeError(f"Another process failed ({'; '.join(failed)}).")


def n_on_machine() -> int:
    """Return the number of processes on this machine: they share its disk."""
    names = all_gather(socket.gethostname())
    return names.count(names[rank()])


def all_reduce(values: torch.Tensor) -> torch.Tensor:
    """Return the sum over processes."""
    if _several():
        values = values.clone()
        dist.all_reduce(values)
    return values


def gather_rows(values: np.ndarray, device: torch.device) -> np.ndarray:
    """Fill in, in place, the rows that other processes have; every row is 0 in all but one."""
    if _several():
        step = max(1, _REDUCED // max(1, values.shape[1]))
        for start in range(0, len(values), step):
            part = torch.from_numpy(np.ascontiguousarray(values[start : start + step]))
            part = part.to(device) if dist.get_backend() == "nccl" else part
            dist.all_reduce(part)
            values[start : start + step] = part.cpu().numpy()
    return values
