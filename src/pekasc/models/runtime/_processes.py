"""Several processes, each with a device: which has which tiles, and broadcast, gather and reduce between them."""

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

from pekasc._text import number

_T = TypeVar("_T")
_REDUCED = 2**26  # values per message
_DEVICE_ARGUMENTS = ("accelerator", "devices", "strategy", "num_nodes", "plugins")


def launch(trainer: Mapping[str, Any], device: torch.device) -> tuple[torch.device, dict[str, Any]]:
    """Start the processes of a fit on several devices; return the device of this process, and all arguments.

    As with Lightning's own strategies, the script is run again for every further device; processes started by
    ``torchrun`` or a cluster are used. With one device nothing is started.

    Parameters
    ----------
    trainer
        Arguments of :class:`lightning.Trainer`.
    device
        Device to use if `trainer` names none.

    Raises
    ------
    ValueError
        If the devices are not available, or the strategy forks or spawns processes.
    """
    given = {name: trainer[name] for name in _DEVICE_ARGUMENTS if name in trainer}
    if not given:
        return device, dict(trainer)
    if "accelerator" not in given:
        given["accelerator"] = "auto" if "devices" in given and device.type != "cpu" else device.type
    given.setdefault("devices", 1 if device.index is None else [device.index])
    try:
        fabric = L.Fabric(**given)
        fabric.launch()
    except (MisconfigurationException, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, TypeError) and "launch" in str(error):
            raise ValueError(
                f"`trainer`: strategy={given.get('strategy', 'auto')!r} forks or spawns processes in the middle of a "
                'call. Run a script (`python script.py` or `torchrun script.py`) with strategy="ddp", or take one '
                "device here."
            ) from error
        n = torch.cuda.device_count()
        there = number(n, "CUDA device") if n else "the CPU"
        raise ValueError(f"`trainer={given}` cannot be used: {error} Available: {there}.") from error
    # the resolved arguments are used for every trainer of the fit
    return fabric.device, {**trainer, **given}


def n_ranks() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _several() else 1


def rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if _several() else 0


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def owners(sections: np.ndarray, reading_order: np.ndarray) -> np.ndarray:
    """Return the rank of the process that has each tile, (n,): a contiguous part of the reading order of every section.

    So each process reads only its part of an image, and the load stays balanced whichever sections a fold leaves out.
    """
    out = np.zeros(len(sections), dtype=np.int64)
    for section in np.unique(sections):
        rows = reading_order[sections[reading_order] == section]
        out[rows] = np.arange(len(rows)) * n_ranks() // len(rows)
    return out


def broadcast(value: _T) -> _T:
    """Return the value of the first process: choices must agree, even if machines round differently."""
    if not _several():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather(value: _T) -> list[_T]:
    """Return the values of all processes, in order of their ranks."""
    if not _several():
        return [value]
    found: list[Any] = [None] * n_ranks()
    dist.all_gather_object(found, value)
    return found


@contextmanager
def raise_together() -> Iterator[None]:
    """Run a block without communication; if it fails in one process, raise in all, so that none waits for another.

    Raises
    ------
    RuntimeError
        In the other processes; the one that failed raises its own error.
    """
    if not _several():
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 (raised below, once the others know)
        own = error  # raised after the others are told
    errors = all_gather(None if own is None else f"{type(own).__name__}: {own}")
    if own is not None:
        raise own
    if failed := [f"process {number}: {text}" for number, text in enumerate(errors) if text is not None]:
        raise RuntimeError(f"Another process failed ({'; '.join(failed)}).")


def n_on_machine() -> int:
    """Return the number of processes on this machine, which share its disk."""
    names = all_gather(socket.gethostname())
    return names.count(names[rank()])


def all_reduce(values: torch.Tensor) -> torch.Tensor:
    """Return the sum over processes."""
    if _several():
        values = values.clone()
        dist.all_reduce(values)
    return values


def gather_rows(values: np.ndarray, device: torch.device) -> np.ndarray:
    """Fill in the rows of other processes, in place; every row is 0 in all processes but one."""
    if _several():
        step = max(1, _REDUCED // max(1, values.shape[1]))
        for start in range(0, len(values), step):
            part = torch.from_numpy(np.ascontiguousarray(values[start : start + step]))
            part = part.to(device) if dist.get_backend() == "nccl" else part
            dist.all_reduce(part)
            values[start : start + step] = part.cpu().numpy()
    return values
