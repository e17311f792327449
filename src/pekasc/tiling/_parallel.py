"""Threads for decoding and resampling, which both let go of Python's lock."""

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
    # not numba.get_num_threads(): that starts numba's threads, and takes torch's number of threads away
    config: Any = numba.config
    return int(config.NUMBA_NUM_THREADS)


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return ``[function(item) for item in items]``, several at a time; the first error in that order is raised.

    A `function` must not call this itself: its calls would wait for the threads that wait for it.
    """
    items = list(items)
    if len(items) < 2 or n_threads() == 1:
        return [function(item) for item in items]
    # a forked process has none of its parent's threads
    return list(_pool(os.getpid()).map(function, items))
