"""Devices, processes, digests, files, time and memory: what every other room of `models` stands on."""

from __future__ import annotations

from pekasc.models.runtime import _processes as processes
from pekasc.models.runtime._device import PRECISIONS, autocast, resolve_device
from pekasc.models.runtime._digests import add_tensors, digest, fingerprint, plain
from pekasc.models.runtime._profile import Profile, peak_memory, profile_text
from pekasc.models.runtime._quiet import quiet_lightning
from pekasc.models.runtime._registry import Registry
from pekasc.models.runtime._threads import torch_threads_kept

__all__ = [
    "PRECISIONS",
    "Profile",
    "Registry",
    "add_tensors",
    "autocast",
    "digest",
    "fingerprint",
    "peak_memory",
    "plain",
    "processes",
    "profile_text",
    "quiet_lightning",
    "resolve_device",
    "torch_threads_kept",
]
