# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Into LazySlide and back
#
# An adapter that was trained with pekasc predicts in [LazySlide](https://lazyslide.readthedocs.io), on LazySlide's
# tiles; the result goes on in scanpy and QuPath. It needs the extra: `pip install "pekasc[lazyslide]"`.
#
# The tissue is synthetic, so that the notebook runs anywhere in two minutes. With data of your own, start from an
# adapter that you have saved.

# %%
import tempfile
from pathlib import Path

import lazyslide as zs
import matplotlib.pyplot as plt
import numpy as np
import scanpy as sc
import spatialdata as sd
import tifffile
from spatialdata.models import ShapesModel
from wsidata import open_wsi

import pekasc as pk

work = Path(tempfile.mkdtemp())

# %% [markdown]
# ## A trained adapter, and a slide
#
# Trained on one patient, with the spots around a spot as context; the slide is another patient's, written as a scanner
# writes it.

# %%
sections = pk.datasets.phantom(n_patients=2, mpp=1.0, size_um=1200, n_genes=60)
pk.pp.tile(sections, tile_px=112, mpp=1.0)
adapter = pk.tl.fit_adapter(
    sections, train=["P1S1"], method=None, readout={"context_um": 200, "fields_um": None}, progress=False
)
pixels = np.moveaxis(np.asarray(sd.get_pyramid_levels(sections["P2S1_he"], n=0)), 0, -1)
with tifffile.TiffWriter(work / "slide.tif") as file:
    size = {"tile": (256, 256), "photometric": "rgb", "resolutionunit": "CENTIMETER"}
    for level, factor in enumerate((1, 4)):
        file.write(
            np.ascontiguousarray(pixels[::factor, ::factor]),
            resolution=(1e4 / factor,) * 2,
            subfiletype=level,
            **size,
        )

# %% [markdown]
# ## Into LazySlide
#
# LazySlide finds the tissue and cuts tiles, of the size that the adapter read in training. They lie 50 um apart, half
# of the distance of the training spots, so that there is a tile near every place where the training had a neighbour.

# %%
wsi = open_wsi(work / "slide.tif", store=None)
zs.pp.find_tissues(wsi)
zs.pp.tile_tissues(wsi, adapter.spec.tile_px, mpp=adapter.spec.mpp, stride_px=50)
print(wsi.tile_spec("tiles"))

# %% [markdown]
# Two models: one for `feature_extraction`, one for `feature_prediction`. The second asks LazySlide for the corners of
# all tiles, since its heads read neighbours; `slide_mpp` makes micrometers of them.

# %%
models = adapter.as_lazyslide(mpp=adapter.spec.mpp, slide_mpp=wsi.properties.mpp)
zs.tl.feature_extraction(wsi, models.image, device="cpu", pbar=False)
zs.tl.feature_prediction(wsi, models.feature, device="cpu", pbar=False)
predicted = wsi["peka_expression_tiles"]
print(predicted)

# %% [markdown]
# The gene that the adapter predicted best in tissue held out from its training, drawn by LazySlide on its tiles:

# %%
gene = adapter.gene_scores["pearson"].idxmax()
wsi["tiles"][gene] = np.asarray(predicted[:, gene].X).ravel()
zs.pl.tiles(wsi, color=gene, cmap="magma", alpha=0.7)

# %% [markdown]
# ## And back
#
# The object of wsidata is a SpatialData, so pekasc takes it, with LazySlide's tiles. The same pixels give the same
# values. Tiles of 112 um that lie 50 um apart overlap; for maps, squares of 50 um around the same centres do not.

# %%
cells = wsi["tiles"][["geometry"]].copy()
cells["geometry"] = cells.buffer(-(adapter.spec.tile_px - 50) / 2, join_style="mitre")
wsi.shapes["cells"] = ShapesModel.parse(cells)
pk.pp.tile_grid(
    wsi,
    "wsi",
    shapes="cells",
    tile_px=adapter.spec.tile_px,
    mpp=adapter.spec.mpp,
    tissue=False,
    min_sharpness=None,
    max_pen=None,
)
pk.tl.predict_expression(wsi, adapter, table_name="grid", progress=False)
ours = wsi["grid"].layers["peka"]
print(f"largest difference {np.abs(predicted.X - ours).max():.1e}, of values up to {ours.max():.1f}")

# %% [markdown]
# ## Clusters, for QuPath
#
# Clusters of the predicted expression, one annotation each, as a file that QuPath opens on the slide. Here it is read
# again and drawn as QuPath would, in pixels of the slide.

# %%
adata = pk.get.expression(wsi, table_name="grid")
sc.pp.pca(adata, n_comps=20)
sc.pp.neighbors(adata)
sc.tl.leiden(adata, resolution=0.5, flavor="igraph", n_iterations=2)
wsi["grid"].obs["leiden"] = adata.obs["leiden"]
pk.io.write_geojson(wsi, work / "clusters.geojson", classes="leiden", genes=gene, merge=True)

# %%
import geopandas

drawn = geopandas.read_file(work / "clusters.geojson")
colours = [tuple(part / 255 for part in c["color"]) for c in drawn["classification"]]
figure, axes = plt.subplots(figsize=(5, 5))
axes.imshow(pixels)
drawn.plot(ax=axes, aspect=None, color=colours, alpha=0.4, edgecolor=colours, linewidth=2)
axes.set(title="clusters.geojson on the slide", xlabel="px", ylabel="px")
drawn[["objectType", "measurements"]]
