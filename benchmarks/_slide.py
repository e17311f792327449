"""A section of her2st as a slide on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import spatialdata as sd
import tifffile

import pekasc as pk


def her2st_slide(her2st: Path, folder: Path) -> Path:
    """Return section C2 as a tiled pyramidal TIFF (JPEG, tiles of 256 px), written to `folder` once."""
    file = folder / "C2.tif"
    if not file.exists():
        sdata = pk.datasets.her2st(("C2",), path=her2st)
        mpp = float(sdata["table"].uns["pekasc"]["image_mpp"]["C2_he"])
        folder.mkdir(parents=True, exist_ok=True)
        with tifffile.TiffWriter(file, bigtiff=True) as tiff:
            for i, level in enumerate(sd.get_pyramid_levels(sdata["C2_he"])):
                pixels = np.ascontiguousarray(np.moveaxis(np.asarray(level), 0, -1))
                tiff.write(
                    pixels, photometric="rgb", tile=(256, 256), compression="jpeg", compressionargs={"level": 90},
                    subfiletype=int(i > 0), metadata=None, resolution=(1e4 / mpp / 2**i,) * 2,
                    resolutionunit="CENTIMETER",
                )  # fmt: skip
    return file
