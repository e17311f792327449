"""Images of sections: choose the image of a region, check that it is RGB, and read its pyramid and transformations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from geopandas import GeoDataFrame
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation
from xarray import DataArray, DataTree

from pekasc._sections._overview import OVERVIEW_PX, coarse, tissue_mask
from pekasc._sections._slides import images_of
from pekasc._sections._table import READ_SLIDE, examples
from pekasc._settings import get_logger
from pekasc.tiling import ImagePyramid

logger = get_logger(__name__)

_SAME_EXTENT = 0.02  # of the diagonal, since sizes of lowres images are rounded to whole pixels
_SAME_CONTENT = 0.6  # correlation of local contrast on tissue; serial sections have less than 0.2
_THUMBNAIL_PX = 512
_LOCAL_PX = 15  # of a thumbnail, within which the mean is taken off


def levels_of(image: DataArray | DataTree) -> list[DataArray]:
    """Return the levels of an image, finest first."""
    if isinstance(image, DataTree):
        levels = [next(iter(child.ds.values())) for child in image.children.values() if child.ds.data_vars]
        return sorted(levels, key=lambda level: -level.sizes["x"] * level.sizes["y"])
    return [image]


def image_size(image: DataArray | DataTree) -> tuple[int, int]:
    """Return width and height of level 0."""
    finest = levels_of(image)[0]
    return int(finest.sizes["x"]), int(finest.sizes["y"])


def coordinate_systems(element: Any) -> set[str]:
    """Return the names of an element's coordinate systems."""
    return set(get_transformation(element, get_all=True))


def affine(element: Any, coordinate_system: str) -> np.ndarray:
    """Return the 3 x 3 affine matrix from the element's own coordinates to a coordinate system."""
    transformation = get_transformation(element, to_coordinate_system=coordinate_system)
    matrix = np.asarray(transformation.to_affine_matrix(("x", "y"), ("x", "y")), dtype=np.float64)
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix[:2, :2])) < 1e-12:
        raise ValueError(
            f"The transformation to {coordinate_system!r} cannot be inverted: {matrix.tolist()}. Set another one "
            "with `spatialdata.transformations.set_transformation`."
        )
    return matrix


def transform(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Map (n, 2) points through a 3 x 3 matrix."""
    return np.asarray(points @ matrix[:2, :2].T + matrix[:2, 2])


def image_pyramid(name: str, image: DataArray | DataTree, *, announce: bool = True) -> ImagePyramid:
    """Return the levels of an RGB image as a pyramid; with `announce`, the log says if they are converted.

    Raises
    ------
    ValueError
        If the image is not 3 channels of uint8; the message says what it is and how to convert it.
    """
    levels = levels_of(image)
    first = levels[0]
    if set(first.dims) != {"c", "y", "x"}:
        raise ValueError(
            f"Image {name!r} has dimensions {tuple(first.dims)}; an H&E image has ('c', 'y', 'x'): take one plane, "
            "and parse it again with `spatialdata.models.Image2DModel`."
        )
    if _is_opaque_rgba(levels):
        if announce:
            logger.hint("image %s: RGBA without transparency is read as RGB.", name)
        levels = [level.isel(c=slice(3)) for level in levels]
    if _between_0_and_1(levels[0]):
        if announce:
            logger.hint("image %s: values between 0 and 1 are read as 8 bit (0 to 255).", name)
        levels = [(level * 255).clip(0, 255).round().astype(np.uint8) for level in levels]
    _check_rgb(name, image, levels[0])
    levels = [_rgb_order(level.transpose("c", "y", "x")) for level in levels]
    width, height = image_size(image)
    # spatialdata's convention: all levels have the same extent (for odd sizes, levels can be off by less than one of
    # their pixels, since its writer crops)
    scales = [(width / level.sizes["x"], height / level.sizes["y"]) for level in levels]
    return ImagePyramid([level.data for level in levels], scales)


def _check_rgb(name: str, image: DataArray | DataTree, first: DataArray) -> None:
    n, dtype = first.sizes["c"], first.dtype
    if n == 3 and dtype == np.uint8:
        return
    channels = {1: "1 channel (grey)", 4: "4 channels (RGBA?)"}.get(n, f"{n} channels")
    problems = ([channels] if n != 3 else []) + ([f"dtype {dtype}"] if dtype != np.uint8 else [])
    wrong = f"Image {name!r} has {' and '.join(problems)}; pekasc reads RGB images: 3 channels of uint8."
    if n not in (1, 3, 4) or not _unnamed_or_rgb(first):
        raise ValueError(
            f"{wrong} With the channels {examples(_channels(first))}, it is no H&E (immunofluorescence?): name the one "
            "that is with `images=`, or add one (of Xenium: `sdata.images['he_image'] = "
            "spatialdata_io.xenium_aligned_image(image_path, alignment_file)`). If three of its channels are red, "
            "green and blue, make an image of those with `spatialdata.models.Image2DModel`."
        )
    access = f"sdata.images[{name!r}]"
    if isinstance(image, DataTree):
        access = f"spatialdata.get_pyramid_levels({access}, n=0)"
    pixels = {1: "np.repeat(np.asarray(image), 3, axis=0)", 4: "np.asarray(image)[:3]"}.get(n, "np.asarray(image)")
    raise ValueError(
        f"{wrong} If it shows H&E, convert it: `image = {access}; sdata.images['{name}_rgb'] = "
        f"spatialdata.models.Image2DModel.parse({_to_uint8(pixels, dtype, first)}, dims=('c', 'y', 'x'), "
        f"transformations=spatialdata.transformations.get_transformation(image, get_all=True))`, then "
        f"`del sdata.images[{name!r}]` or name the new one with `images=`."
    )


def _to_uint8(pixels: str, dtype: np.dtype, first: DataArray) -> str:
    """Return code that converts the image to 8 bit, depending on the range of a sample of its pixels."""
    if dtype == np.uint8:
        return pixels
    step = max(1, max(first.shape) // OVERVIEW_PX)
    largest = float(np.nanmax(np.asarray(first[..., ::step, ::step])))
    if dtype.kind == "b":
        return f"{pixels}.astype('uint8') * 255"
    if largest <= 1:
        return f"np.clip({pixels} * 255, 0, 255).round().astype('uint8')"
    if largest <= 255:
        return f"np.clip({pixels}, 0, 255).round().astype('uint8')"
    # scanners with more than 8 bits use 10, 12, 14 or 16
    full = next((2**bits - 1 for bits in (10, 12, 14, 16) if largest < 2**bits), largest)
    return f"np.clip({pixels} * (255 / {full:.6g}), 0, 255).round().astype('uint8')"


def _may_be_rgb(image: DataArray | DataTree) -> bool:
    """Tell whether an image may be RGB (or opaque RGBA): channels without other names, of 8 bit or between 0 and 1."""
    levels = levels_of(image)
    rgb = (levels[0].sizes.get("c") == 3 and _unnamed_or_rgb(levels[0])) or _is_opaque_rgba(levels)
    return rgb and (levels[0].dtype == np.uint8 or levels[0].dtype.kind == "f")


def _is_opaque_rgba(levels: list[DataArray]) -> bool:
    """Tell whether a fourth channel, without a name or named alpha, is 255 (floats: 1) all over the coarsest level."""
    first, coarsest = levels[0], levels[-1]
    if first.sizes.get("c") != 4 or not _unnamed_or_rgb(first):
        return False
    full = {"f": 1.0, "u": 255}.get(first.dtype.kind)
    if full is None or _channels(first)[3][:1].lower() not in {"3", "a"}:
        return False
    step = max(1, max(coarsest.shape) // OVERVIEW_PX)
    return bool((np.asarray(coarsest.isel(c=3)[..., ::step, ::step]) == full).all())


def _channels(level: DataArray) -> list[str]:
    return [str(c) for c in (level.coords["c"].values if "c" in level.coords else range(level.sizes["c"]))]


def _unnamed_or_rgb(level: DataArray) -> bool:
    """Tell whether channels are only numbered, or named red, green, blue and alpha."""
    names = [name.lower() for name in _channels(level)]
    return all(name.isdecimal() for name in names) or {name[:1] for name in names} - {"a"} == {"r", "g", "b"}


def _between_0_and_1(first: DataArray) -> bool:
    """Tell whether an image of three channels holds floats between 0 and 1, by a sample."""
    if first.sizes.get("c") != 3 or first.dtype.kind != "f":
        return False
    step = max(1, max(first.shape) // OVERVIEW_PX)
    sample = np.asarray(first[..., ::step, ::step])
    return bool(np.isfinite(sample).all() and sample.min() >= 0 and 0 < sample.max() <= 1)


def _rgb_order(level: DataArray) -> DataArray:
    # reorder named channels, so that a BGR image is not read as RGB
    first = {str(c).lower()[:1]: i for i, c in enumerate(level.coords["c"].values)} if "c" in level.coords else {}
    if set(first) == {"r", "g", "b"} and list(first) != ["r", "g", "b"]:
        return level.isel(c=[first["r"], first["g"], first["b"]])
    return level


def has_image(
    sdata: SpatialData, region: str, images: Mapping[str, str] | None, shapes: Mapping[str, GeoDataFrame]
) -> bool:
    """Tell whether a section has an image: given in `images`, or in a coordinate system of its shapes."""
    systems = coordinate_systems(shapes[region])
    return region in (images or {}) or any(systems & coordinate_systems(image) for image in images_of(sdata).values())


def choose_image(
    sdata: SpatialData, region: str, images: Mapping[str, str] | None, shapes: Mapping[str, GeoDataFrame]
) -> str:
    """Return the name of the image of a section; `shapes` are those of all regions of the table.

    Raises
    ------
    KeyError
        If `images` names one that does not exist.
    ValueError
        If no image shares a coordinate system with the shapes, or several different ones do.
    """
    there = images_of(sdata)
    if images and region in images:
        if images[region] not in there:
            raise KeyError(f"Image {images[region]!r} not found in `sdata.images`. Available images: {list(there)}.")
        return images[region]
    systems = coordinate_systems(shapes[region])
    candidates = sorted(name for name, image in there.items() if systems & coordinate_systems(image))
    if not candidates and not there:
        raise ValueError(f"There are no images, and tiles are cut from them: {READ_SLIDE}.")
    if not candidates:
        listed = "; ".join(f"{name!r}: {sorted(coordinate_systems(image))}" for name, image in there.items())
        raise ValueError(
            f"No image shares a coordinate system with the shapes {region!r} (in {sorted(systems)}). "
            f"Coordinate systems of the images: {listed}. Add one with "
            "`spatialdata.transformations.set_transformation(image, ..., to_coordinate_system=...)`."
        )
    # if all sections share one coordinate system, exclude images that another region has in a system of its own
    elsewhere = set().union(*(coordinate_systems(other) for other in shapes.values())) - systems
    candidates = [name for name in candidates if not elsewhere & coordinate_systems(there[name])] or candidates
    candidates = [name for name in candidates if _may_be_rgb(there[name])] or candidates
    if len(candidates) == 1:
        return candidates[0]
    finest = max(candidates, key=lambda name: np.prod(image_size(there[name])))
    if not all(_same_picture(shapes[region], there[finest], there[name]) for name in candidates if name != finest):
        sizes = ", ".join("{!r} ({} x {} px)".format(n, *image_size(there[n])) for n in candidates)
        raise ValueError(
            f"Several different images share a coordinate system with the shapes {region!r}: {sizes}. "
            f"Say which one shows its H&E: `images={{{region!r}: {finest!r}}}`."
        )
    logger.hint("section %s: using image %s, the finest of %s, which show the same.", region, finest, candidates)
    return finest


def _same_picture(shapes: GeoDataFrame, a: DataArray | DataTree, b: DataArray | DataTree) -> bool:
    """Tell whether two images show the same at different scales: same extent, other size, same content."""
    size_a, size_b = image_size(a), image_size(b)
    if size_a == size_b:
        return False
    corners_a, corners_b = (_corners_in_shapes(image, shapes) for image in (a, b))
    diagonal = np.linalg.norm(corners_a[2] - corners_a[0])
    if np.linalg.norm(corners_a - corners_b, axis=1).max() > _SAME_EXTENT * diagonal:
        return False
    return _same_content(image_pyramid("", a, announce=False), image_pyramid("", b, announce=False))


def _same_content(a: ImagePyramid, b: ImagePyramid) -> bool:
    """Tell whether two images of the same extent show the same, by their local contrast on tissue."""
    from scipy.ndimage import gaussian_filter, uniform_filter
    from skimage.transform import resize

    pictures = []
    for pyramid in (a, b):
        size = np.array(pyramid.levels[0].shape[:0:-1])
        pictures.append(coarse(pyramid, np.zeros(2, int), size, max(1.0, size.max() / _THUMBNAIL_PX))[0])
    shape = min((picture.shape[:2] for picture in pictures), key=np.prod)
    on = np.ones(shape, dtype=bool)
    local = []
    for picture in pictures:
        small = np.rint(resize(picture, shape, order=1, anti_aliasing=True, preserve_range=True)).astype(np.uint8)
        on &= tissue_mask(small)
        grey = gaussian_filter(small.astype(np.float64).mean(axis=-1), 1)  # levels may be off by part of a pixel
        local.append(grey - uniform_filter(grey, _LOCAL_PX, mode="nearest"))
    if not on.any():
        return False  # blank images are not known to show the same
    x, y = (values[on] - values[on].mean() for values in local)
    norm = np.linalg.norm(x) * np.linalg.norm(y)
    return bool(norm > 0 and (x @ y) / norm > _SAME_CONTENT)


def _corners_in_shapes(image: DataArray | DataTree, shapes: GeoDataFrame) -> np.ndarray:
    system = sorted(coordinate_systems(image) & coordinate_systems(shapes))[0]
    width, height = image_size(image)
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=np.float64)
    return transform(np.linalg.inv(affine(shapes, system)) @ affine(image, system), corners)
