"""Preserve torch's number of threads around code that changes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Restore torch's number of threads after the block.

    The first parallel numba kernel of scanpy or squidpy sets the OpenMP threads of the whole process to all cores. If
    the user gave torch fewer threads, since other processes share the machine, its small operations would then be up
    to five times slower.
    """
    import torch

    n_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
