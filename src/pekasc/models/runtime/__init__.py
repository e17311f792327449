"""Devices, processes, digests, atomic files, time and memory, for the other rooms of `models`."""

from __future__ import annotations

from pekasc._digests import fingerprint, plain
from pekasc.models.runtime import _processes as processes
from pekasc.models.runtime._device import PRECISIONS, autocast, resolve_device
from pekasc.models.runtime._digests import array_parts, tensor_parts, weights_digest
from pekasc.models.runtime._files import NO_ROOM, READ_ONLY, explained, unfinished, write_array, write_json, write_whole
from pekasc.models.runtime._profile import Profile, peak_memory, profile_text
from pekasc.models.runtime._quiet import quiet_lightning
from pekasc.models.runtime._registry import Registry
from pekasc.models.runtime._sealed import (
    check_sealed,
    read_sealed_array,
    read_sealed_json,
    replace_sealed,
    write_sealed_array,
    write_sealed_json,
)
from pekasc.models.runtime._threads import torch_threads_kept

__all__ = [
    "NO_ROOM",
    "PRECISIONS",
    "READ_ONLY",
    "Profile",
    "Registry",
    "array_parts",
    "autocast",
    "check_sealed",
    "explained",
    "fingerprint",
    "peak_memory",
    "plain",
    "processes",
    "profile_text",
    "quiet_lightning",
    "read_sealed_array",
    "read_sealed_json",
    "replace_sealed",
    "resolve_device",
    "tensor_parts",
    "torch_threads_kept",
    "unfinished",
    "weights_digest",
    "write_array",
    "write_json",
    "write_sealed_array",
    "write_sealed_json",
    "write_whole",
]
