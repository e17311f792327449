"""Threads for decoding and resampling, which both release the GIL."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

import numba

T = TypeVar("T")
R = TypeVar("R")


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=n_threads(), thread_name_prefix="pekasc-decode")


def n_threads() -> int:
    """Return the number of threads: the cores of this process, or ``NUMBA_NUM_THREADS``."""
    # not numba.get_num_threads(), which starts numba's threads and changes torch's number of threads
    config: Any = numba.config
    return int(config.NUMBA_NUM_THREADS)


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return ``[function(item) for item in items]``, computed in parallel; the first error in that order is raised.

    `function` must not call `in_threads` itself, which would be a deadlock.
    """
    items = list(items)
    if len(items) < 2 or n_threads() == 1:
        return [function(item) for item in items]
    # a pool per process, since a forked process has none of its parent's threads
    return list(_pool(os.getpid()).map(function, items))
