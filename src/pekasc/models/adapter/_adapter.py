"""`Adapter`: the adapter of an encoder with its expression head, genes, training history and held-out scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from peft import PeftConfig

from pekasc._options import Compute, resolve, unused_in_embedding
from pekasc._paths import folder_path, is_hub
from pekasc._settings import get_logger
from pekasc.models.adapter import _folder as _store
from pekasc.models.adapter import _hub
from pekasc.models.adapter._arrays import TOLERANCE, field_tiles, neighbour_matrices, positions, recoloured
from pekasc.models.adapter._lazyslide import LazySlideModels, lazyslide_models
from pekasc.models.adapter._networks import attached_network, fill, merged_network, trained_parts
from pekasc.models.adapter._summary import summary
from pekasc.models.encoders import Depth, Encoder, EncoderNetwork
from pekasc.models.features import ReadingEncoder, embed
from pekasc.models.heads import Reading
from pekasc.models.runtime import resolve_device
from pekasc.models.training import attached
from pekasc.models.trust import Calibration, HeldOut, Novelty
from pekasc.tiling import ArrayTiles, Stain, StainMap, TileSource, TileSpec

logger = get_logger(__name__)


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """Predict gene expression from tiles: a (trained) encoder with its expression head.

    :func:`pekasc.tl.fit_adapter` returns one; use it with :func:`pekasc.tl.predict_expression`, or on arrays of tiles
    with :meth:`predict`. Printing it shows what it was trained on and its held-out scores.

    Parameters
    ----------
    encoder
        Description of the encoder, whose weights are not part of the adapter.
    encoder_digest
        SHA-256 of the encoder's weights.
    spec
        Tile side in pixels and pixel size in um.
    depth
        Block(s) after which adapted features are taken; None is the encoder's own output.
    method
        Name of the method; ``"frozen"`` without an adapter.
    genes
        Names of the predicted genes, or of the columns of another target.
    reading
        How features become expression: one head, or several whose predictions are averaged.
    config
        PEFT configuration; None for the frozen encoder.
    weights
        Tensors by kind: ``"adapter"`` under PEFT's names, ``"projector"``, ``"cluster_head"``.
    gene_scores
        Scores on held-out training groups, indexed by gene: ``pearson`` (mean over the sections that measured
        the gene), ``lowest`` and ``highest`` of them, ``n_sections``, and ``n_groups``, the number of training groups
        that it was learned from.
    history
        One row per epoch and fold: ``fold`` (-1 is the final fit), ``held_out``, ``epoch``, ``loss``, ``kd``, ``sa``,
        ``matching`` (feature matching; NaN if not part of the loss), ``peak_memory`` (bytes: allocated on a GPU, of the
        whole process on the CPU), ``val_error`` (squared error on held-out groups, relative to the mean predictor).
    selection
        Settings with their held-out error: ``stage``, ``network``, ``head``, ``depth``, ``context_um``, ``fields``
        (number of wider fields of view beside the tile), ``epochs``,
        ``rank``, ``alpha``, ``error``, ``weight``. Rows of stage ``"frozen"`` choose an adapter's depth by plain ridge,
        those of stage ``"adapter"`` the epochs; those of stage ``"reading"`` have the weight that the setting got.
    info
        Summary of the fit: target, groups, numbers of spots, seeds, chosen settings, versions, licences; ``profile``:
        seconds of reading, encoding, training and head, tiles per second, peak memory in bytes.
    trained_on
        Which tissue the adapter was trained on: by a digest of each image's content, the centres of the training tiles,
        (n, 2) in level-0 pixels, and as ``"{digest}.points"`` and ``"{digest}.descriptors"`` the landmarks by which the
        tissue is known again in crops, other levels and other orientations.
    fields_um
        Widths in um of wider fields of view, whose features are read beside those of the tile.
    orientations
        Test-time augmentation: number of orientations of a tile that features are averaged over.
    others
        Configuration and weights, under PEFT's names, of the further adapters of an ensemble (``Recipe.refit``), of
        which `config` and `weights` are the first: that of all training groups, if it is one of them, then those of the
        inner folds, in their order.
    held_out
        What it predicted for held-out training groups against what was measured there.
    novelty
        Distance of tiles to the training tiles, and how like known faults they are.
    calibration
        Intervals around predictions, by :func:`pekasc.tl.calibrate`.
    stain
        Mean colours of the training sections, to which those of every section are brought; None takes tiles as they
        are.
    """

    encoder: Encoder
    encoder_digest: str
    spec: TileSpec
    depth: Depth
    method: str
    genes: tuple[str, ...]
    reading: Reading
    config: PeftConfig | None
    weights: Mapping[str, Mapping[str, torch.Tensor]]
    gene_scores: pd.DataFrame
    history: pd.DataFrame
    selection: pd.DataFrame
    info: Mapping[str, Any]
    trained_on: Mapping[str, np.ndarray] = field(default_factory=dict)
    fields_um: tuple[float, ...] = ()
    orientations: int = 1
    others: tuple[tuple[PeftConfig, Mapping[str, torch.Tensor]], ...] = ()
    held_out: HeldOut | None = None
    novelty: Novelty | None = None
    calibration: Calibration | None = None
    stain: Stain | None = None

    @property
    def n_adapters(self) -> int:
        """Number of adapters whose predictions are averaged; 0 for the frozen encoder."""
        return 0 if self.config is None else 1 + len(self.others)

    @property
    def context_um(self) -> float | None:
        """Largest radius of the spatial context in um, whose mean features the heads also get; None without context."""
        radii = self.reading.use().radii_um
        return radii[-1] if radii else None

    @property
    def target_key(self) -> str | None:
        """Key of the obsm whose columns are predicted (``target={"obsm": key}``); None if genes are."""
        key = self.info.get("obsm")
        return None if key is None else str(key)

    @property
    def scales(self) -> tuple[float, ...]:
        """Fields of view as multiples of the tile's pixel size, 1 (the tile itself) first."""
        return (1.0, *(width / self.spec.side_um for width in self.fields_um))

    @cached_property
    def _model(self) -> EncoderNetwork:
        return attached_network(self)

    def __getstate__(self) -> dict[str, Any]:
        # without the encoder's weights: another process loads them and attaches the adapter itself
        return {name: value for name, value in self.__dict__.items() if name != "_model"}

    def network(self) -> EncoderNetwork:
        """Return the encoder with its adapters attached; it is built at the first call and kept.

        Returns
        -------
        The network, in evaluation mode and without gradients.

        Raises
        ------
        ValueError
            If the encoder's weights are not those that the adapter was trained on.
        """
        return self._model

    def check_tiles(self, tile_px: int, mpp: float) -> None:
        """Raise ValueError unless tiles of `tile_px` pixels at `mpp` um per pixel are like those of the training.

        Parameters
        ----------
        tile_px, mpp
            Side in pixels, and pixel size in um.
        """
        same_mpp = abs(mpp / self.spec.mpp - 1) <= TOLERANCE
        if tile_px != self.spec.tile_px or not same_mpp:
            raise ValueError(
                f"This adapter was trained on tiles of {self.spec.tile_px} px at {self.spec.mpp:g} um/px "
                f"({self.spec.side_um:g} um); these have {tile_px} px at {mpp:g} um/px ({tile_px * mpp:g} um). "
                f"Tile with `tile_px={self.spec.tile_px}, mpp={self.spec.mpp:g}` (`pekasc.pp.tile`, and of a grid "
                "`pekasc.pp.tile_grid`)."
            )

    def embed_with(
        self, model: EncoderNetwork, source: TileSource, *, compute: Compute, device: torch.device
    ) -> list[np.ndarray]:
        """Return the features of tiles by every adapter, (n, d) float32, without checking their size.

        Parameters
        ----------
        model
            The encoder without an adapter, loaded already; it is left as it was.
        source
            The tiles.
        compute, device
            Where and how to run.

        Returns
        -------
        One array for each adapter; one of the frozen features without any.
        """
        made = []
        for config, weights in trained_parts(self):
            with attached(model, config, 0) as peft_model:
                fill(self, peft_model, weights)
                model.requires_grad_(False)
                model.eval()
                made.append(self._embed(model, source, compute, device))
        return made or [self._embed(model, source, compute, device)]

    def _embed(self, network: EncoderNetwork, source: TileSource, compute: Compute, device: torch.device) -> np.ndarray:
        features = embed(
            network, source, [self.depth], orientations=self.orientations, batch_size=compute.embed_batch_size,
            device=device, precision=compute.precision,
        )  # fmt: skip
        return features[self.depth]

    def embed(
        self,
        tiles: np.ndarray,
        *,
        mpp: float,
        section: np.ndarray | None = None,
        stain: StainMap | Mapping[Any, StainMap] | Literal["tiles"] | None = None,
        compute: Compute | Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """Embed an array of tiles with the adapted encoder.

        The features of several adapters (``Recipe.refit``) are averaged: all are small changes of one encoder.

        Parameters
        ----------
        tiles
            RGB tiles, (n, y, x, 3) uint8.
        mpp
            Pixel size of the tiles in um.
        section
            Section of every tile, (n,), by default a single one, for the stain map.
        stain
            For an adapter with a stain map (:attr:`stain`): ``pekasc.get.stain_maps(sdata, adapter)``, the map of each
            section by name, or the map of a single section. Or ``"tiles"``: colours are measured on the tiles of each
            section given here, which should then be all of it, not a few.
        compute
            A :class:`pekasc.Compute`, or a mapping of its fields: ``device``, ``precision`` and ``embed_batch_size``.

        Returns
        -------
        Features, (n, d) float32.

        Raises
        ------
        KeyError
            If `stain` has no map of a section.
        TypeError
            If `stain` is neither a map, a mapping of maps nor a string.
        ValueError
            If the tiles have another size, field of view or dtype than those of the training, or the encoder's weights
            are not those that the adapter was trained on. If the adapter has a stain map and `stain` is missing or of
            another adapter, or the tiles show too little tissue to measure it.
        """
        how = resolve(compute, Compute, "compute", unused=unused_in_embedding(arrays=True))
        source = ArrayTiles(np.asarray(tiles))
        self.check_tiles(source.tile_px, mpp)
        source = ArrayTiles(recoloured([source.array], self.spec, self.stain, stain, section)[0])
        return self._embed(self._model, source, how, resolve_device(how.device))

    def predict(
        self,
        tiles: np.ndarray,
        *,
        mpp: float,
        coords_um: np.ndarray | None = None,
        section: np.ndarray | None = None,
        fields: Mapping[float, np.ndarray] | None = None,
        stain: StainMap | Mapping[Any, StainMap] | Literal["tiles"] | None = None,
        compute: Compute | Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """Predict expression from an array of tiles.

        Parameters
        ----------
        tiles
            RGB tiles, (n, y, x, 3) uint8.
        mpp
            Pixel size of the tiles in um.
        coords_um, section
            Positions in um, (n, 2), and section of every tile, (n,), by default a single one, for the spatial context
            (:attr:`context_um`) and the stain map. Without positions, heads that were fitted without context predict.
        fields
            For an adapter with wider fields of view (:attr:`fields_um`): a mapping from their width in um to tiles of
            the same shape around the same centres; ``pekasc.get.tiles(sdata, field_um=448)`` gives them. Without it,
            heads that were fitted on the tiles alone predict.
        stain
            As in :meth:`embed`; the map of a section is that of its wider fields of view as well.
        compute
            As in :meth:`embed`.

        Returns
        -------
        Predicted expression, (n, genes) float32, in the order of :attr:`genes`, on the scale of the target.

        Raises
        ------
        KeyError, TypeError, ValueError
            As for :meth:`embed`, if tiles of a field of view have another shape or width, or if the only head needs
            positions or fields and there are none.
        """
        how = resolve(compute, Compute, "compute", unused=unused_in_embedding(arrays=True))
        source = ArrayTiles(np.asarray(tiles))
        self.check_tiles(source.tile_px, mpp)
        wide = [ArrayTiles(array) for array in field_tiles(source.array, fields, self.fields_um)]
        places = None if coords_um is None else positions(source.n, coords_um, section)
        reading = self.reading_of(context=places is not None, fields=bool(wide) or not self.fields_um)
        if not source.n:
            return np.zeros((0, len(self.genes)), dtype=np.float32)
        arrays = recoloured([each.array for each in (source, *wide)], self.spec, self.stain, stain, section)
        source, *wide = [ArrayTiles(array) for array in arrays]
        scores = np.zeros((source.n, reading.n_scores), dtype=np.float32)
        around = np.zeros((source.n, reading.n_around), dtype=np.float32)
        for number, tiles_at in enumerate([source, *wide]):
            run = ReadingEncoder(
                self._model, reading, number, self.depth, self.orientations, resolve_device(how.device), how.precision
            )
            step = how.embed_batch_size
            parts = np.concatenate([run.features(tiles_at.array[i : i + step]) for i in range(0, source.n, step)])
            first = parts.shape[1] - reading.n_scores - reading.n_around
            scores = scores + parts[:, first : first + reading.n_scores]
            around = around + parts[:, first + reading.n_scores :]
        if places is not None:
            scores = reading.joined(scores, around, reading.neighbours(*places))
        return reading.expression(scores)

    def reading_of(self, *, context: bool, fields: bool) -> Reading:
        """Return the part of :attr:`reading` that needs no more than there is: positions, and wider fields of view.

        Parameters
        ----------
        context, fields
            Whether positions, and tiles of the wider fields of view, are there.

        Returns
        -------
        The heads that do without what is not.

        Raises
        ------
        ValueError
            If no head does without what is missing, as in adapters of earlier versions.
        """
        names = {member.name for member in self.reading.members}
        found = self.reading.use(context=context, fields=fields) if self.reading.members else self.reading
        if {member.name for member in found.members} != names:
            if not context and self.context_um is not None:
                raise ValueError(
                    f"The head of this adapter uses the neighbours within {self.context_um:g} um as spatial context, "
                    "which needs positions: give `coords_um=` (n, 2) in um, and `section=` if the tiles are of several "
                    "sections."
                )
            listed = ", ".join(f"{width:g}" for width in self.fields_um)
            raise ValueError(
                f"This adapter also needs tiles of {listed} um around the same centres: give them as "
                "`fields={um: tiles}`."
            )
        return found

    def neighbours(self, coords_um: np.ndarray, sections: np.ndarray, *, grid: bool = False) -> dict[float, Any]:
        """Return the sparse matrices that average over neighbours within every radius of the reading, (n, n) each.

        Parameters
        ----------
        coords_um, sections
            Positions in um, (n, 2), and sections, (n,).
        grid
            Tiles of a grid of any stride: the neighbours of a tile are the tiles nearest to the places of the training
            lattice around it, so that a denser grid does not change their mean.

        Returns
        -------
        The matrices by radius in um.
        """
        return neighbour_matrices(self.reading, self.info, coords_um, sections, grid=grid)

    def merge(self) -> torch.nn.Module:
        """Merge the adapter into the encoder's weights, and return a plain timm model without later blocks.

        Its ``forward_features`` returns the adapted tokens after the final norm. The features of this adapter are the
        class token concatenated with the mean patch token; with several depths, only those of the deepest; with several
        orientations, those of one, so average over them. The reading may use frozen features as well. With
        ``depth="own"``, features are the encoder's own output: calling the model returns it if ``pooling`` of the
        :class:`Encoder` is None, else pool the tokens as that says. The model takes tiles as they are: of an adapter
        with a stain map (:attr:`stain`), give it tiles with their colours mapped (:func:`pekasc.get.stain_maps`).

        Returns
        -------
        The model, without pekasc's or PEFT's layers.

        Raises
        ------
        ValueError
            If the encoder's weights are not those that the adapter was trained on, or there are several adapters.
        """
        if self.stain is not None:
            logger.hint("The merged model has no stain map: give it mapped tiles (`pekasc.get.stain_maps`).")
        return merged_network(self)

    def as_lazyslide(
        self, *, mpp: float, slide_mpp: float | None = None, genes: Sequence[str] | None = None
    ) -> LazySlideModels:
        """Return models for LazySlide: one that embeds its tiles, and one that predicts expression from that.

        On the same pixels, values are those of :func:`pekasc.tl.predict_expression`. Intervals and novelty are
        pekasc's alone.

        Parameters
        ----------
        mpp
            Pixel size in um of the tiles, as in ``lazyslide.pp.tile_tissues(wsi, tile_px, mpp=mpp)``.
        slide_mpp
            Pixel size in um of the slide's finest level, ``wsi.properties.mpp``, by which corners of tiles become
            positions. An adapter with spatial context (:attr:`context_um`) needs it.
        genes
            Genes to predict; by default all.

        Returns
        -------
        ``image, feature``: an image model and a feature model. With spatial context, the latter asks for coordinates
        and for all tiles of the slide at once. ``.tile_model(genes)`` is one for LazySlide's ``tile_prediction``.

        Raises
        ------
        ImportError
            If LazySlide is not installed, or too old.
        KeyError
            If the adapter does not predict one of `genes`.
        ValueError
            If tiles of this pixel size are not those of the training, `slide_mpp` is needed, `genes` is empty, a head
            does not do without wider fields of view, or the encoder's weights are not those that the adapter was
            trained on.
        """
        return lazyslide_models(self, mpp, slide_mpp, genes)

    def save(self, path: str | Path) -> None:
        """Save the adapter to the folder `path` as ``.json`` and ``.safetensors``, with the weights in PEFT's format.

        Parameters
        ----------
        path
            A folder. It is created if it does not exist; an adapter in it is replaced at once: however the call ends,
            the folder holds the old one or the new one. Other files in it stay.

        Raises
        ------
        FileExistsError
            If the folder holds anything but an adapter.
        OSError
            If it cannot be written; what was there stays.
        """
        _store.save(self, folder_path("path", path))

    @classmethod
    def load(cls, path: str | Path, *, encoder: Encoder | None = None) -> Adapter:
        """Load an adapter that was saved with :meth:`save`.

        Parameters
        ----------
        path
            The folder, or ``"hf-hub:owner/name"``, ``"hf-hub:owner/name@revision"``, an adapter on the Hugging Face
            hub, which is fetched once. Nothing of it is run: weights are safetensors, the rest is JSON, and all is
            checked against its digests.
        encoder
            Description of the encoder, if its weights have moved since the adapter was trained.

        Raises
        ------
        FileNotFoundError
            If the folder, or a file in it, does not exist.
        OSError
            If it cannot be fetched from the hub.
        ValueError
            If the folder holds no adapter of pekasc, or a damaged one.
        """
        folder = _hub.fetch(path) if is_hub(path) else folder_path("path", path)
        if not folder.exists() and (hint := _hub.hub_hint(path)):
            raise FileNotFoundError(f"No adapter at {folder}: there is no such folder.{hint}")
        adapter = cls(**_store.load(folder))
        return adapter if encoder is None else replace(adapter, encoder=encoder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        licence: str,
        terms_checked: bool = False,
        private: bool = True,
        token: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Share the adapter on the Hugging Face hub, with a model card made from its record.

        The files of :meth:`save` are sent in one commit, without the encoder's weights; ``Adapter.load("hf-hub:...")``
        reads them. Names of training groups, sections and genes, the call, and landmarks of the training images (by
        which their tissue is known again) go along: see that these may be shared.

        Parameters
        ----------
        repo_id
            The repository, ``"owner/name"``; it is created if it does not exist.
        licence
            The licence that you give to the adapter, such as ``"apache-2.0"`` or ``"cc-by-nc-4.0"``.
        terms_checked
            Say that the terms of encoder and teacher allow it, where their licence restricts what is built on them, is
            not stated, or the encoder is gated.
        private
            Create the repository as a private one. One that is there stays as it is.
        token
            Token of the hub; by default that of ``hf auth login``.
        commit_message
            Message of the commit.

        Returns
        -------
        Address of the commit.

        Raises
        ------
        ValueError
            If `repo_id` is no name of a repository, `licence` is missing, or licences of encoder or teacher do not
            allow it as far as is known. Nothing is sent then.
        OSError
            If the hub cannot be reached, or does not allow it.
        """
        return _hub.push(
            self, repo_id, licence=licence, terms_checked=terms_checked, private=private, token=token,
            message=commit_message,
        )  # fmt: skip

    def __repr__(self) -> str:
        return summary(self)
