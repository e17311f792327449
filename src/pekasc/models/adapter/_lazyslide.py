"""Models for LazySlide: an adapter behind its `feature_extraction`, `feature_prediction` and `tile_prediction`.

LazySlide takes any object with the right methods, so that nothing of it is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from pekasc._settings import get_logger
from pekasc.models.adapter._genes import wanted_index
from pekasc.models.features import ReadingEncoder
from pekasc.models.heads import Reading, coarse_stride
from pekasc.tiling import check_positive

if TYPE_CHECKING:
    from pekasc.models.adapter._adapter import Adapter

logger = get_logger(__name__)

NAME = "peka"
_LEAST = (0, 13)  # the first whose `feature_prediction` gives coordinates and whole slides
_INSTALL = "pip install 'pekasc[lazyslide]'"


class LazySlideModels(NamedTuple):
    """Models of an adapter for LazySlide, as :meth:`Adapter.as_lazyslide` returns them.

    Parameters
    ----------
    image
        For ``lazyslide.tl.feature_extraction``: embeds tiles. Its first ``n_features`` columns are the adapted
        features, as in ``obsm["X_peka"]``; the others are what `feature` needs of a tile beside them.
    feature
        For ``lazyslide.tl.feature_prediction``: predicts expression from the table that `image` made.
    """

    image: ImageModel
    feature: FeatureModel

    def tile_model(self, genes: str | Sequence[str]) -> TileModel:
        """Return a model for ``lazyslide.tl.tile_prediction``, which adds a column to the tiles for each of some genes.

        It sees one tile at a time: heads that were fitted without spatial context predict, as in
        :meth:`Adapter.predict` without positions.

        Parameters
        ----------
        genes
            A gene, or several.

        Returns
        -------
        The model.

        Raises
        ------
        KeyError
            If the adapter does not predict a gene.
        ValueError
            If `genes` is empty, or no head of the adapter does without spatial context.
        """
        return TileModel(self.image, genes)


class ToTensor:
    """Turn a tile, (y, x, 3) uint8, into a tensor, (3, y, x) uint8: the encoder normalises batches itself."""

    def __repr__(self) -> str:
        return "ToTensor()"

    def __call__(self, tile: Any) -> torch.Tensor:
        """Return the tensor."""
        return torch.from_numpy(np.ascontiguousarray(np.asarray(tile))).permute(2, 0, 1)


class _Model:
    """What LazySlide asks of every model."""

    model: Any = None
    name = NAME

    def get_transform(self) -> Any:
        """Return what turns a tile into a tensor."""
        return ToTensor()

    def to(self, device: Any) -> Any:
        """Move the model to a device."""
        return self

    def try_compile(self, **kwargs: Any) -> None:
        """Say that the model runs as it is."""
        logger.warning("%s: `compile=` is ignored; models of pekasc run uncompiled in LazySlide.", self.name)


class ImageModel(_Model):
    """Embed batches of tiles into the adapted features and the scores that the heads read."""

    def __init__(self, adapter: Adapter, reading: Reading) -> None:
        self.adapter, self.reading = adapter, reading
        self.model = adapter.network()
        self._run = self._on(torch.device("cpu"))
        px = adapter.spec.tile_px
        self.n_columns = self._run.features(np.zeros((1, px, px, 3), dtype=np.uint8)).shape[1]

    def __repr__(self) -> str:
        adapter = self.adapter
        return (
            f"ImageModel(encoder={adapter.encoder.short!r}, tile_px={adapter.spec.tile_px}, mpp={adapter.spec.mpp:g}, "
            f"n_features={self.n_features}, n_columns={self.n_columns})"
        )

    def _on(self, device: torch.device) -> ReadingEncoder:
        adapter = self.adapter
        return ReadingEncoder(self.model, self.reading, 0, adapter.depth, adapter.orientations, device, "fp32")

    @property
    def n_features(self) -> int:
        """Number of adapted features, which come first."""
        return self.n_columns - self.reading.n_scores - self.reading.n_around

    def to(self, device: Any) -> ImageModel:
        """Move the encoder to a device."""
        self._run = self._on(torch.device(device))
        return self

    def encode_image(self, image: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        """Return the columns of tiles, (n, n_columns) float32, from a batch (n, 3, y, x) of uint8."""
        tiles = image if isinstance(image, torch.Tensor) else torch.as_tensor(np.asarray(image))
        px = self.adapter.spec.tile_px
        if tiles.ndim != 4 or tiles.shape[1] != 3 or tiles.dtype != torch.uint8:
            raise ValueError(
                f"The adapter takes batches of tiles as they are, (n, 3, {px}, {px}) uint8, and got "
                f"{tuple(tiles.shape)} {tiles.dtype}. Leave `transform=` out, or return uint8 from yours."
            )
        if tiles.shape[2:] != (px, px):
            self.adapter.check_tiles(int(max(tiles.shape[2:])), self.adapter.spec.mpp)
            raise ValueError(f"Tiles must be squares of {px} px, got {tiles.shape[3]} x {tiles.shape[2]} px.")
        return self._run.features(tiles.permute(0, 2, 3, 1).cpu().numpy())


class FeatureModel(_Model):
    """Predict expression from what :class:`ImageModel` made of the tiles of a slide."""

    name = f"{NAME}_expression"
    features_model_name = NAME

    def __init__(self, image: ImageModel, genes: Sequence[str] | None, slide_mpp: float | None) -> None:
        self.image, self.slide_mpp = image, slide_mpp
        self._index = wanted_index(image.adapter, genes)
        self.genes = tuple(image.adapter.genes[i] for i in self._index)
        self.needs_coords = self.whole_slide = bool(image.reading.radii_um or image.reading.smooth_um)

    def __repr__(self) -> str:
        return f"FeatureModel(n_genes={len(self.genes)}, context_um={self.image.reading.radii_um})"

    def predict(self, features: Any, coords: Any = None, *args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
        """Predict genes, a vector (n,) each, from the columns of tiles and their upper left corners in pixels."""
        columns = np.asarray(features.detach().cpu() if isinstance(features, torch.Tensor) else features)
        if columns.ndim != 2 or columns.shape[1] != self.image.n_columns:
            raise ValueError(
                f"These features have shape {columns.shape}, and this adapter's image model makes "
                f"{self.image.n_columns} columns: run `lazyslide.tl.feature_extraction(wsi, models.image)` with the "
                "models of one `as_lazyslide` call, and name its table with `feature_key=`."
            )
        reading = self.image.reading
        scores = columns[:, self.image.n_features :].astype(np.float32)
        own, around = scores[:, : reading.n_scores], scores[:, reading.n_scores :]
        if self.needs_coords:
            own = reading.joined(own, around, self._neighbours(coords, len(columns)))
        return dict(zip(self.genes, reading.expression(own, self._index).T, strict=True))

    def _neighbours(self, coords: Any, n: int) -> dict[float, Any]:
        if coords is None or self.slide_mpp is None:
            raise ValueError(
                "The heads use neighbouring tiles, and `coords` is None: predict with "
                f"`lazyslide.tl.feature_prediction` of LazySlide {_least()} or newer, which passes the corners of all "
                "tiles."
            )
        adapter = self.image.adapter
        corners = np.asarray(coords, dtype=np.float64)
        if corners.shape != (n, 2):
            raise ValueError(f"`coords` must have shape ({n}, 2), the corners of {n} tiles, got {corners.shape}.")
        centres = corners * self.slide_mpp + adapter.spec.side_um / 2
        found = coarse_stride(centres, adapter.info.get("pitch_um"), adapter.context_um)
        if found is not None:
            logger.warning("Tiles %s", found)
        return replace(adapter, reading=self.image.reading).neighbours(centres, np.zeros(n), grid=True)


class TileModel(_Model):
    """Predict some genes from tiles alone."""

    def __init__(self, image: ImageModel, genes: str | Sequence[str]) -> None:
        self._index = wanted_index(image.adapter, genes)
        self.genes = tuple(image.adapter.genes[i] for i in self._index)
        self.columns = self.genes
        self.image = ImageModel(image.adapter, _reading(image.adapter, context=False))
        self.model = self.image.model

    def __repr__(self) -> str:
        return f"TileModel(n_genes={len(self.genes)}, image={self.image!r})"

    def to(self, device: Any) -> TileModel:
        """Move the encoder to a device."""
        self.image.to(device)
        return self

    def predict(self, image: Any, *args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
        """Predict genes, a vector (n,) each, from a batch of tiles (n, 3, y, x) of uint8."""
        scores = self.image.encode_image(image)[:, self.image.n_features :]
        return dict(zip(self.genes, self.image.reading.expression(scores, self._index).T, strict=True))


def lazyslide_models(
    adapter: Adapter, mpp: float, slide_mpp: float | None, genes: Sequence[str] | None
) -> LazySlideModels:
    """Return the models of :meth:`Adapter.as_lazyslide`, whose errors these are."""
    _check_installed()
    adapter.check_tiles(adapter.spec.tile_px, mpp)
    if adapter.stain is not None:
        raise ValueError(
            "This adapter maps the stain of a slide to that of its training before it reads tiles, and LazySlide gives "
            "tiles as they are: predict with `pekasc.tl.predict_expression`, or fit an adapter without `Readout.stain`."
        )
    reading = _reading(adapter, context=True)
    if slide_mpp is not None:
        check_positive(slide_mpp, "slide_mpp", integer=False)
    elif reading.radii_um or reading.smooth_um:
        raise ValueError(
            "The heads of this adapter read the tiles around a tile, and LazySlide gives corners in pixels of the "
            "slide: give their size in um, `slide_mpp=wsi.properties.mpp`."
        )
    if adapter.fields_um:
        logger.warning(
            "The adapter's wider fields of view (%s um) cannot be read in LazySlide, which cuts tiles of one size: "
            "heads that were fitted without them predict. `pekasc.tl.predict_expression` reads them.",
            ", ".join(f"{width:g}" for width in adapter.fields_um),
        )
    image = ImageModel(adapter, reading)
    return LazySlideModels(image, FeatureModel(image, genes, slide_mpp))


def _reading(adapter: Adapter, *, context: bool) -> Reading:
    """Return the heads that do without wider fields of view and, if it is so said, without context."""
    names = {member.name for member in adapter.reading.members}
    found = adapter.reading.use(context=context, fields=False) if names else adapter.reading
    if {member.name for member in found.members} == names:
        return found
    if adapter.fields_um and {m.name for m in adapter.reading.use(context=context).members} == names:
        raise ValueError(
            f"This adapter has heads that only read fields of view of {max(adapter.fields_um):g} um as well, and "
            "LazySlide cuts tiles of one size: fit it again, which keeps heads for the tile alone, or predict with "
            "`pekasc.tl.predict_expression`."
        )
    raise ValueError(
        f"The head of this adapter uses the neighbours within {adapter.context_um:g} um, which a model of single tiles "
        "has not: take `feature` of `as_lazyslide` with `lazyslide.tl.feature_prediction`."
    )


def _least() -> str:
    return ".".join(map(str, _LEAST))


def _check_installed() -> None:
    try:
        found = version("lazyslide")
    except PackageNotFoundError as error:
        raise ImportError(f"LazySlide is not installed: `{_INSTALL}`.") from error
    parts = found.split(".")[:2]
    if all(part.isdigit() for part in parts) and tuple(map(int, parts)) < _LEAST:
        raise ImportError(
            f"LazySlide {found} is installed, whose `feature_prediction` gives no coordinates: {_least()} is needed, "
            f"`{_INSTALL}`."
        )
