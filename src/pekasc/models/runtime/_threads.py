"""The number of threads that torch computes with, kept through what changes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Give torch the number of threads back that it had before.

    The first parallel numba kernel of scanpy or squidpy sets the OpenMP threads of the whole process to all cores.
    Where the user gave torch fewer, because other processes share the machine, its small operations would then wait
    for each other at every step: five times slower than with one thread.
    """
    import torch

    n_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
