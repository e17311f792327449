"""Time and peak memory of the stages of a fit."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

STAGES = ("reading", "encoding", "training", "head")


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: allocated on a CUDA device since the last call, on the CPU of the whole process.

    On the CPU, the operating system counts from the start of the process, so memory used before the call is included.
    """
    if device.type == "cuda":
        peak = int(torch.cuda.max_memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    status = Path("/proc/self/status")
    if status.exists():  # getrusage of a child process would include the peak of its parent
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass
class Profile:
    """Seconds and number of tiles by stage.

    The time of a nested stage is not counted in the outer one: computing features after an epoch is encoding, not
    training.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    tiles: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    peak: int = 0
    _inner: list[float] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, n_tiles: int = 0) -> Iterator[None]:
        """Add the time of the block, and its number of tiles, to a stage."""
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            whole = time.perf_counter() - start
            self.seconds[name] += whole - self._inner.pop()
            self.tiles[name] += n_tiles
            if self._inner:
                self._inner[-1] += whole

    def saw_memory(self, peak: int) -> None:
        """Update the peak memory."""
        self.peak = max(self.peak, peak)

    def record(self) -> dict[str, Any]:
        """Return plain numbers: seconds by stage, tiles per second, and peak memory in bytes."""
        rate = {n: self.tiles[n] / s for n, s in self.seconds.items() if self.tiles[n] and s > 0}
        return {"seconds": dict(self.seconds), "tiles_per_second": rate, "peak_memory": self.peak}


def profile_text(record: Mapping[str, Any]) -> str:
    """Format a profile as text: ``reading 1.2 s, encoding 30 s (45 tiles/s), ...; peak 1.4 GB``."""
    parts = []
    for name, seconds in record["seconds"].items():
        rate = record["tiles_per_second"].get(name)
        parts.append(f"{name} {seconds:.3g} s" + ("" if rate is None else f" ({rate:.3g} tiles/s)"))
    return f"{', '.join(parts)}; peak {record['peak_memory'] / 1e9:.2f} GB"
