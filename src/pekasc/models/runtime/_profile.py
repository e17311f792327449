"""Where the time of a fit goes, and its memory."""

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
    """Return the most bytes that a CUDA device had allocated since it was asked last, else that the process ever had.

    The system counts the whole process, from its start: what was there before the call is part of it.
    """
    if device.type == "cuda":
        peak = int(torch.cuda.max_memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says of a process that another one started begins with that one's
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass
class Profile:
    """Seconds by stage, and how many tiles went through each.

    A stage inside another is taken off the outer one: features measured after an epoch are encoding, not training.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    tiles: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    peak: int = 0
    _inner: list[float] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, n_tiles: int = 0) -> Iterator[None]:
        """Count the time of a block, and the tiles that it goes through."""
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
        """Keep the larger peak."""
        self.peak = max(self.peak, peak)

    def record(self) -> dict[str, Any]:
        """Return plain numbers: seconds by stage, tiles per second, and the peak of memory in bytes."""
        rate = {n: self.tiles[n] / s for n, s in self.seconds.items() if self.tiles[n] and s > 0}
        return {"seconds": dict(self.seconds), "tiles_per_second": rate, "peak_memory": self.peak}


def profile_text(record: Mapping[str, Any]) -> str:
    """Return a profile for people: ``reading 1.2 s, encoding 30 s (45 tiles/s), ...; peak 1.4 GB``."""
    parts = []
    for name, seconds in record["seconds"].items():
        rate = record["tiles_per_second"].get(name)
        parts.append(f"{name} {seconds:.3g} s" + ("" if rate is None else f" ({rate:.3g} tiles/s)"))
    return f"{', '.join(parts)}; peak {record['peak_memory'] / 1e9:.2f} GB"
