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
# # A slide that nobody sequenced
#
# Most of an archive is H&E without expression. This notebook teaches an adapter on two patients with expression, and
# then takes a bare slide file of a third: tiles on tissue, predicted expression, clusters, pictures.
#
# The tissue is synthetic, so that the notebook runs anywhere in minutes and the truth is known at the end. With data
# of your own, start from your sections ("Your own data" in the documentation) and your slide files.

# %%
import tempfile
from pathlib import Path

import numpy as np
import scanpy as sc
import spatialdata as sd
import squidpy as sq
import tifffile

import pekasc as pk

work = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Two patients with expression, and the slide of a third
#
# The third patient's image goes into a pyramidal TIFF, as a scanner writes it. From here on it is a file like any
# other: nothing of its expression is used before the last cell.

# %%
sections = pk.datasets.phantom(n_patients=3, mpp=1.0, size_um=1500)
pixels = np.moveaxis(np.asarray(sd.get_pyramid_levels(sections["P3S1_he"], n=0)), 0, -1)
with tifffile.TiffWriter(work / "archive-0042.tif") as file:
    size = {"tile": (256, 256), "photometric": "rgb", "resolutionunit": "CENTIMETER"}
    file.write(pixels, resolution=(1e4, 1e4), subifds=1, **size)
    file.write(pixels[::2, ::2], resolution=(5e3, 5e3), subfiletype=1, **size)

# %% [markdown]
# ## Teach

# %%
pk.pp.tile(sections, tile_px=112, mpp=1.0)
adapter = pk.tl.fit_adapter(sections, train=["P1S1", "P2S1"], progress=False)
print(adapter)

# %% [markdown]
# ## Read the slide and tile it
#
# Pixels stay in the file. Tiles have the adapter's size and are placed on tissue only; what is out of focus or marked
# with a pen is left out and counted.

# %%
slide = pk.io.read_slide(work / "archive-0042.tif", name="he")
pk.pp.tile_grid(slide, "he", tile_px=adapter.spec.tile_px, mpp=adapter.spec.mpp, stride_um=50)
_ = pk.pl.slide(slide)

# %% [markdown]
# ## Predict
#
# With `store=`, features and predictions go to disk part by part, so that a slide may be larger than memory, and an
# interrupted call continues. The table gets the adapter's genes; its layer reads from the store what is asked for.

# %%
pk.tl.predict_expression(slide, adapter, table_name="grid", store=work / "predictions.zarr", progress=False)
slide["grid"]

# %%
best = adapter.gene_scores.sort_values("pearson", ascending=False)
best.head()

# %% [markdown]
# Which genes to look at? The adapter knows how well it predicted each gene in patients that it had not seen. Look at
# those at the top of the list, not at those whose name you know.

# %%
genes = [best.index[0], next(gene for gene in best.index if gene.startswith("STATE"))]
_ = pk.pl.slide(slide, genes)

# %% [markdown]
# ## Go on in scanpy and squidpy
#
# `get.expression` gives a plain AnnData with positions in um.

# %%
adata = pk.get.expression(slide, table_name="grid")
sc.pp.pca(adata, n_comps=20)
sc.pp.neighbors(adata)
sc.tl.leiden(adata, resolution=0.5, flavor="igraph", n_iterations=2)
slide["grid"].obs["leiden"] = adata.obs["leiden"]
_ = pk.pl.slide(slide, "leiden")

# %%
sq.gr.spatial_neighbors_knn(adata, n_neighs=6)
sq.gr.spatial_autocorr(adata, mode="moran", genes=list(adata.var_names[:50]))
adata.uns["moranI"].head()

# %% [markdown]
# ## Was it right?
#
# For once, the answer is there: the third patient was measured. Here is the correlation of predictions at the nearest
# tile with what was measured, over the genes that the adapter thought it knew, and over those that it did not.

# %%
measured = sections["table"][sections["table"].obs["section"] == "P3S1"].copy()
sc.pp.normalize_total(measured, target_sum=1e4)
sc.pp.log1p(measured)
where = np.linalg.norm(measured.obsm["spatial"][:, None] - slide["grid"].obsm["spatial"][None], axis=-1)
near, distance = where.argmin(axis=1), where.min(axis=1)
on_tile = distance < 50
x = np.asarray(measured[on_tile, adata.var_names].X.todense())
y = np.asarray(slide["grid"].layers["peka"])[near[on_tile]]
r = np.array([np.corrcoef(a, b)[0, 1] if a.std() > 0 else np.nan for a, b in zip(x.T, y.T, strict=True)])
expected = best["pearson"].reindex(adata.var_names).to_numpy()
known = expected > np.nanmedian(expected)
print(
    f"{on_tile.sum()} spots; mean Pearson {np.nanmean(r[known]):.2f} for the better half of the genes by the adapter's"
)
print(f"own held-out scores, {np.nanmean(r[~known]):.2f} for the other half.")

# %% [markdown]
# ## Keep it
#
# Writing the object leaves the predictions in their store; `attach_predictions` brings them back. (If anndata warns of
# another layout of files in its next release: nothing to act on, both are read.)

# %%
slide.write(work / "archive-0042.zarr")
again = sd.read_zarr(work / "archive-0042.zarr")
pk.io.attach_predictions(again)
again["grid"]
