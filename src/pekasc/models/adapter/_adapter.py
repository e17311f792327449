"""The fitted object: an encoder's adapter with its expression head, genes, history and honest scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

from pekasc._options import Compute, resolve, unused_in_embedding
from pekasc.models.adapter import _folder as _store
from pekasc.models.encoders import Depth, Encoder, EncoderNetwork
from pekasc.models.features import embed
from pekasc.models.heads import Head, with_context
from pekasc.models.runtime import profile_text, resolve_device
from pekasc.models.training import attached, last_block
from pekasc.tiling import ArrayTiles, TileSource, TileSpec

TOLERANCE = 0.02  # relative difference in pixel size that is still the same, as for pixel sizes elsewhere


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """An encoder taught to predict gene expression; made by :func:`pekasc.tl.fit_adapter`.

    Parameters
    ----------
    encoder
        The encoder's row. Its weights are not part of the adapter.
    encoder_digest
        SHA-256 of the encoder's weights that it was trained on.
    spec
        Tile side in pixels and pixel size in um.
    depth
        Block(s) after which features are taken; None is the encoder's own output.
    method
        Name of the method; ``"frozen"`` without an adapter.
    genes
        Names of the genes that it predicts.
    head
        The expression head.
    config
        PEFT configuration, None for the frozen encoder.
    weights
        Tensors by kind: ``"adapter"`` in PEFT's own names, ``"projector"``, ``"cluster_head"``.
    gene_scores
        Per gene on held-out training groups, index gene: ``pearson`` (mean over their sections), ``n_sections``.
    history
        One row per epoch and fold: ``fold`` (-1 is the final fit), ``held_out``, ``epoch``, ``loss``, ``kd``, ``sa``,
        ``matching`` (feature matching; NaN where no part of the loss), ``peak_memory`` (bytes: allocated on a GPU,
        of the whole process so far on the CPU), ``val_error`` (squared error on held-out groups over the mean
        predictor's).
    selection
        What was tried and its held-out error: ``stage``, ``depth``, ``epochs``, ``alpha``, ``error``. Rows of stage
        ``"frozen"`` choose an adapter's depth and are without context; those of stage ``"adapter"`` have it.
    info
        Plain facts: target, groups, numbers of spots, seeds, choices, versions, licences; ``profile``: seconds in
        reading, encoding, training and head, tiles per second, peak memory in bytes.
    trained_on
        Where the training tiles lay: centres (n, 2) in level-0 pixels, by a digest of the image's content.
    context_um
        Radius in um of the neighbours whose mean features the head reads beside a tile's own; None without.
    scales
        Multiples of the pixel size at which tiles are read; features of all of them stand side by side.
    orientations
        Features are the mean over so many turns and flips of a tile.
    """

    encoder: Encoder
    encoder_digest: str
    spec: TileSpec
    depth: Depth
    method: str
    genes: tuple[str, ...]
    head: Head
    config: PeftConfig | None
    weights: Mapping[str, Mapping[str, torch.Tensor]]
    gene_scores: pd.DataFrame
    history: pd.DataFrame
    selection: pd.DataFrame
    info: Mapping[str, Any]
    trained_on: Mapping[str, np.ndarray] = field(default_factory=dict)
    context_um: float | None = None
    scales: tuple[float, ...] = (1.0,)
    orientations: int = 1

    @cached_property
    def _model(self) -> EncoderNetwork:
        model = EncoderNetwork(self.encoder, self.spec.tile_px)
        if model.digest != self.encoder_digest:
            raise ValueError(
                f"This adapter was trained on encoder {self.encoder.short!r} with weights {self.encoder_digest[:12]}, "
                f"but the weights found now are {model.digest[:12]}. Give the same weights, for instance "
                "`Adapter.load(path, encoder=pekasc.models.Encoder(..., weights=PATH))`."
            )
        self._attach(model)
        return model

    def _attach(self, model: EncoderNetwork) -> Any:
        """Put the trained adapter into the model, in place; return the PEFT model, None for a frozen encoder."""
        if self.config is None:
            return None
        with torch.random.fork_rng(devices=[]):
            peft_model = get_peft_model(model.model, self.config)
        set_peft_model_state_dict(peft_model, dict(self.weights["adapter"]))
        model.requires_grad_(False)
        model.eval()
        return peft_model

    def __getstate__(self) -> dict[str, Any]:
        # another process attaches the adapter to the encoder for itself
        return {name: value for name, value in self.__dict__.items() if name != "_model"}

    def network(self) -> EncoderNetwork:
        """Return the encoder with the adapter attached, built once.

        Raises
        ------
        ValueError
            If the encoder's weights are not those that the adapter was trained on.
        """
        return self._model

    def check_tiles(self, tile_px: int, mpp: float) -> None:
        """Raise if tiles of `tile_px` pixels of `mpp` um are not what the adapter was trained on."""
        same_mpp = abs(mpp / self.spec.mpp - 1) <= TOLERANCE
        if tile_px != self.spec.tile_px or not same_mpp:
            raise ValueError(
                f"This adapter was trained on tiles of {self.spec.tile_px} px at {self.spec.mpp:g} um/px "
                f"({self.spec.side_um:g} um); these have {tile_px} px at {mpp:g} um/px ({tile_px * mpp:g} um). "
                f"Run `pekasc.pp.tile(sdata, tile_px={self.spec.tile_px}, mpp={self.spec.mpp:g})`."
            )

    @contextmanager
    def attached_to(self, model: EncoderNetwork) -> Iterator[EncoderNetwork]:
        """Put the trained adapter into an encoder that is there already, for as long as the block lasts."""
        if self.config is None:
            yield model
            return
        with attached(model, self.config, 0) as peft_model:
            set_peft_model_state_dict(peft_model, dict(self.weights["adapter"]))
            model.requires_grad_(False)
            model.eval()
            yield model

    def embed_source(
        self,
        source: TileSource,
        further: Sequence[TileSource] = (),
        *,
        compute: Compute,
        device: torch.device | None = None,
        model: EncoderNetwork | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Return adapted features (n, d), float32, of tiles that were checked before, `further` ones at every scale.

        Parameters
        ----------
        source, further
            The tiles.
        compute
            Where and how.
        device
            The device, where it is resolved already.
        model
            The encoder without an adapter, where it is built already; given back as it was.
        progress
            Show a progress bar.
        """
        with nullcontext(self._model) if model is None else self.attached_to(model) as network:
            features = embed(
                network,
                source,
                [self.depth],
                further=further,
                orientations=self.orientations,
                batch_size=compute.embed_batch_size,
                device=resolve_device(compute.device) if device is None else device,
                precision=compute.precision,
                progress=progress,
            )
        return features[self.depth]

    def embed(
        self,
        tiles: np.ndarray,
        *,
        mpp: float,
        scales: Mapping[float, np.ndarray] | None = None,
        compute: Compute | Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """Return the adapted features of tiles, without SpatialData.

        Parameters
        ----------
        tiles
            Shape (n, y, x, 3), uint8, RGB.
        mpp
            Their pixel size in um.
        scales
            For an adapter that reads several scales (:attr:`scales`): tiles of the same shape around the same centres
            at each of the others, by their pixel size in um, such as ``{2.0: wide}``;
            ``pekasc.get.tiles(sdata, scale=2)`` reads them.
        compute
            Where and how: device, precision and batch size of :class:`pekasc.Compute`.

        Returns
        -------
        Shape (n, d), float32.

        Raises
        ------
        ValueError
            If the tiles are of another size, field of view or dtype, a scale is missing, or the encoder's weights are
            not those that the adapter was trained on.
        """
        how = resolve(compute, Compute, "compute", unused=unused_in_embedding(arrays=True))
        source = ArrayTiles(np.asarray(tiles))
        self.check_tiles(source.tile_px, mpp)
        more = [ArrayTiles(array) for array in self._further(source, scales)]
        return self.embed_source(source, more, compute=how)

    def _further(self, source: ArrayTiles, scales: Mapping[float, np.ndarray] | None) -> list[np.ndarray]:
        """Return the tiles of the further scales in their order, checked against the first ones."""
        wanted = [scale * self.spec.mpp for scale in self.scales[1:]]
        if scales is not None and not isinstance(scales, Mapping):
            raise TypeError(
                f"`scales` must map pixel sizes in um to tiles, such as {{{2 * self.spec.mpp:g}: wide}}, got "
                f"{type(scales).__name__}."
            )
        given = {float(mpp): np.asarray(array) for mpp, array in (scales or {}).items()}
        found = [next((m for m in given if abs(m / mpp - 1) <= TOLERANCE), None) for mpp in wanted]
        if not wanted and given:
            raise ValueError(f"This adapter reads tiles at one scale, {self.spec.mpp:g} um/px: leave `scales=` out.")
        if None in found or len(given) != len(wanted):
            listed = ", ".join(f"{mpp:g}" for mpp in wanted)
            raise ValueError(
                f"This adapter also reads tiles of {listed} um/px around the same centres: give them as "
                f"`scales={{um/px: tiles}}`; got tiles of {sorted(given)} um/px."
            )
        arrays = [given[m] for m in found if m is not None]
        for mpp, array in zip(wanted, arrays, strict=True):
            if array.shape != source.array.shape:
                raise ValueError(
                    f"`scales`: the tiles of {mpp:g} um/px have shape {array.shape}, the others {source.array.shape}."
                )
        return arrays

    def predict(
        self,
        tiles: np.ndarray,
        *,
        mpp: float,
        coords_um: np.ndarray | None = None,
        section: np.ndarray | None = None,
        scales: Mapping[float, np.ndarray] | None = None,
        compute: Compute | Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """Return predicted expression of tiles, without SpatialData.

        Parameters
        ----------
        tiles
            Shape (n, y, x, 3), uint8, RGB.
        mpp
            Their pixel size in um.
        coords_um, section
            Positions in um (n, 2) and sections (n,) of the tiles, all of one section by default: needed by a head
            with spatial context (:attr:`context_um`), not read by another.
        scales, compute
            As in :meth:`embed`.

        Returns
        -------
        Shape (n, genes), float32, in the order of :attr:`genes`, on the scale of the target.

        Raises
        ------
        ValueError
            As for :meth:`embed`, and if the head needs positions and there are none.
        """
        if self.context_um is not None and coords_um is None:
            raise ValueError(
                f"The head of this adapter reads the neighbours within {self.context_um:g} um, so it needs to know "
                "where the tiles lie: give `coords_um=` (n, 2) in um, and `section=` if they are of several."
            )
        features = self.embed(tiles, mpp=mpp, scales=scales, compute=compute)
        if coords_um is None:
            return self.head.predict(features)
        n = len(features)
        places = np.asarray(coords_um, dtype=np.float64)
        sections = np.zeros(n) if section is None else np.asarray(section)
        if places.shape != (n, 2) or sections.shape != (n,):
            raise ValueError(
                f"`coords_um` must have shape ({n}, 2) and `section` ({n},) for {n} tiles, got {places.shape} and "
                f"{sections.shape}."
            )
        return self.predict_features(features, places, sections)

    def predict_features(self, features: np.ndarray, coords_um: np.ndarray, sections: np.ndarray) -> np.ndarray:
        """Return predicted expression (n, genes), float32, from adapted features (n, d).

        Parameters
        ----------
        features
            What :meth:`embed` returned.
        coords_um, sections
            Positions in um (n, 2) and sections (n,): neighbours are looked for among these tiles.
        """
        return self.head.predict(with_context(features, coords_um, sections, self.context_um))

    def merge(self) -> torch.nn.Module:
        """Return a plain timm model with the adapter merged into its weights, cut after the adapter's depth.

        Its ``forward_features`` gives the adapted tokens, final norm applied; the class token beside the mean patch
        token are the features of this adapter. For several depths, they are those of the deepest; for several scales
        or orientations, of the tile that is given: put scales side by side, take the mean over orientations. Where the
        encoder's own output is read, they are that or its class token, see ``pooling`` of :class:`Encoder`; where that
        is None, calling the model gives it.

        Raises
        ------
        ValueError
            If the encoder's weights are not those that the adapter was trained on.
        """
        model = EncoderNetwork(self.encoder, self.spec.tile_px)
        if model.digest != self.encoder_digest:
            return self._model.model  # raises with the reason
        peft_model = self._attach(model)
        if peft_model is not None:
            model.model = peft_model.merge_and_unload()
        model.cut(last_block(model, self.depth))
        model.model.requires_grad_(False)
        return model.model.eval()

    def save(self, path: str | Path) -> None:
        """Write the adapter to the folder `path`: ``.json`` and ``.safetensors``, adapter weights in PEFT's format.

        Parameters
        ----------
        path
            A folder; made if it is not there, replaced if it holds an adapter.

        Raises
        ------
        FileExistsError
            If the folder holds anything but an adapter.
        """
        _store.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, *, encoder: Encoder | None = None) -> Adapter:
        """Read what :meth:`save` wrote.

        Parameters
        ----------
        path
            The folder.
        encoder
            Where the encoder's weights are now, if not where they were when the adapter was trained.

        Raises
        ------
        FileNotFoundError
            If the folder, or a file in it, is not there.
        ValueError
            If it holds no adapter of pekasc, or a damaged one.
        """
        adapter = cls(**_store.load(Path(path)))
        return adapter if encoder is None else replace(adapter, encoder=encoder)

    def __repr__(self) -> str:
        info, scores = self.info, self.gene_scores["pearson"].dropna().sort_values(ascending=False)
        at = "its own output" if self.depth is None else f"block {' + '.join(str(d) for d in self.depth)}"
        what = self.method if self.config is None else f"{self.method}, {info['epochs']} epochs"
        context = "" if self.context_um is None else f", with the neighbours within {self.context_um:g} um"
        lines = [
            f"Adapter ({what}) on encoder {self.encoder.short!r}, features of {at}",
            f"  tiles       {self.spec.tile_px} px at {self.spec.mpp:g} um/px ({self.spec.side_um:g} um)",
            f"  trained on  {info['n_spots']} spots, groups: {_shorten(info['groups'])}",
            *([] if info.get("teacher") is None else [f"  teacher     {info['teacher']}"]),
            f"  predicts    {len(self.genes)} genes, {info['target']}",
            f"  head        {info['head']}{context}",
            *self._extras(),
        ]
        if len(scores):
            best = ", ".join(f"{gene} {score:.2f}" for gene, score in scores.head(3).items())
            lines.append(
                f"  trust       held-out groups of the training data: Pearson median {scores.median():.2f}, "
                f"{(scores > 0.2).mean():.0%} of genes above 0.2; best {best}"
            )
        else:
            lines.append("  trust       unknown: no group was held out (see `groups=` of fit_adapter)")
        if "profile" in info:  # not of an adapter that an earlier version saved
            lines.append(f"  profile     {profile_text(info['profile'])}")
        unknown = "not stated, see its source"
        lines.append(f"  licence     encoder: {self.encoder.licence or unknown}")
        if info.get("teacher") is not None:
            lines.append(f"              teacher: {info.get('teacher_licence') or unknown}")
        return "\n".join(lines)

    def _extras(self) -> list[str]:
        """Return what is read beside a tile as it is, as lines of the summary."""
        out = []
        if len(self.scales) > 1:
            out.append(f"  scales      {', '.join(f'{scale * self.spec.mpp:g} um/px' for scale in self.scales)}")
        if self.orientations > 1:
            out.append(f"  reads       the mean over {self.orientations} orientations of a tile")
        return out


def _shorten(names: Sequence[str], n: int = 6) -> str:
    return ", ".join(names) if len(names) <= n else f"{', '.join(names[:n])} and {len(names) - n} more"
