"""What stands beside every figure: the kind of machine, and the versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

PACKAGES = ("pekasc", "torch", "timm", "peft", "lightning", "spatialdata", "scanpy", "scikit-learn", "numpy")


def machine(packages: tuple[str, ...] = PACKAGES) -> str:
    """Return one sentence about this machine and the packages."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{os.cpu_count()} {platform.machine()} cores. Python {platform.python_version()}, {versions}."
