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
# # Gallery
#
# Every plot of pekasc, and how squidpy, scanpy and spatialdata-plot draw the same objects. All plots return
# matplotlib's figures or axes, have their units in um, and draw spots and tiles to scale. Copy the line above a
# picture.
#
# First something to look at: three synthetic patients, two of them trained on, for two epochs without augmentation,
# so that it takes a minute. Leave out `recipe=` and `readout=` for real work.

# %%
import tempfile
from pathlib import Path

import geopandas
import matplotlib.pyplot as plt
import scanpy as sc
import spatialdata as sd
import spatialdata_plot  # noqa: F401  adds `sdata.pl`
import squidpy as sq

import pekasc as pk

pk.settings.verbosity = "warning"  # what calls choose by themselves is in the other tutorials

sdata = pk.datasets.phantom(n_patients=3, size_um=1500, mpp=1.0)
pk.pp.tile(sdata, tile_px=112, mpp=1.0)
adapter = pk.tl.fit_adapter(
    sdata,
    train=["P1S1", "P2S1"],
    recipe={"epochs": 2, "n_views": 1},
    readout={"fields_um": None},
    progress=False,
)
adapter = pk.tl.calibrate(adapter)  # intervals, novelty, trust
pk.tl.predict_expression(sdata, adapter, progress=False)
scores = pk.tl.evaluate(sdata)
best = sdata["table"].var["peka_pearson"].idxmax()

# %% [markdown]
# ## `pl.tiles`: what the encoder sees
#
# Tiles as they go into the encoder, with a scale bar. Look at them first: a wrong pixel size or a shifted image shows
# here.

# %%
_ = pk.pl.tiles(sdata, n=12, n_columns=6)

# %% [markdown]
# An adapter that was fitted with a [stain map](../../stain.md) reads them in the colours of its training patients.
# The third patient is more violet than these two: its tiles as they are, and as the adapter reads them.

# %%
stained = pk.tl.fit_adapter(
    sdata,
    train=["P1S1", "P2S1"],
    method=None,
    readout={"stain": "reinhard", "fields_um": None},
    progress=False,
)
names = [name for name in sdata["table"].obs_names if name.startswith("P3S1")][40:46]
_ = pk.pl.tiles(sdata, names=names, n_columns=6)
_ = pk.pl.tiles(sdata, names=names, n_columns=6, adapter=stained)

# %% [markdown]
# ## Tiles on the slide, by spatialdata-plot
#
# Tiles are shapes of the object, so that any tool for SpatialData draws them.

# %%
sdata.pl.render_images("P3S1_he").pl.render_shapes(
    "P3S1_spots_tiles", fill_alpha=0, outline_alpha=1, outline_width=0.8, outline_color="black"
).pl.show(coordinate_systems="P3S1", figsize=(5, 5), title="tiles of 112 um, 100 um apart")

# %% [markdown]
# ## `pl.expression`: H&E, measured, predicted
#
# One row per section, one colour scale for all of it, so that a prediction with less contrast than the measurement
# looks like it. Titles show the correlation, and whether the section was trained on.

# %%
_ = pk.pl.expression(sdata, best)

# %% [markdown]
# On the image, with a colour map and limits of your own:

# %%
_ = pk.pl.expression(sdata, best, section="P3S1", background="image", cmap="magma", vmin=0, vmax=6)

# %% [markdown]
# With the ends of the interval around the prediction, which a calibrated adapter gives:

# %%
_ = pk.pl.expression(sdata, best, section="P3S1", interval=True)

# %% [markdown]
# ## `pl.gene_scores`: which genes can be predicted
#
# From scores on a section that was measured (left), or from the adapter, whose scores on held-out patients are there
# before any test section is (right). Genes at the lower end are not to be interpreted.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
pk.pl.gene_scores(sdata, ax=axes[0]).set_title("patient P3, measured")
_ = pk.pl.gene_scores(adapter, ax=axes[1]).set_title("held out in training: P1, P2")

# %% [markdown]
# ## `pl.trust`: which genes to trust
#
# The best genes with the range of their scores over held-out sections. A gene of high trust is predicted in each of
# them; the legend counts all genes.

# %%
_ = pk.pl.trust(adapter, n=20)

# %% [markdown]
# ## `pl.calibration`: do intervals hold what they say
#
# The share of held-out measurements in intervals of every nominal level, by group. Below the diagonal, intervals would
# be too narrow; `tl.calibrate` widens them. With two groups, how far a third may lie is hardly known.

# %%
_ = pk.pl.calibration(adapter)

# %% [markdown]
# ## `pl.novelty`: tiles unlike the training
#
# Where they are, how many, and what the most and the least novel tiles look like.

# %%
_ = pk.pl.novelty(sdata, section="P3S1")

# %% [markdown]
# ## `pl.history`: how the training went
#
# Losses of the inner folds (thin) and of the final fit (bold); held-out error by epoch, of which the smallest is taken.
# Epoch 0 is the frozen encoder: where no epoch beats it, as after a training as short as this one, the adapter stays
# untrained, and the log says so.

# %%
_ = pk.pl.history(adapter)

# %% [markdown]
# ## `pl.slide`: a slide without spots
#
# A slide is an image alone. `pp.tile_grid` puts tiles on its tissue; without a colour, `pl.slide` shows them, and how
# many were left out for which reason.

# %%
slide = pk.datasets.phantom(n_patients=1, size_um=1500, mpp=1.0, random_state=7)
pk.pp.tile_grid(slide, "P1S1_he", tile_px=112, mpp=1.0, stride_um=56)
_ = pk.pl.slide(slide)

# %% [markdown]
# Predicted genes, side by side:

# %%
pk.tl.predict_expression(slide, adapter, table_name="grid", progress=False)
genes = adapter.gene_scores["pearson"].nlargest(2).index.tolist()
_ = pk.pl.slide(slide, genes)

# %% [markdown]
# Clusters of the predicted expression, and a measure of the tiles:

# %%
adata = pk.get.expression(slide, table_name="grid")
sc.pp.pca(adata, n_comps=20, random_state=0)
sc.pp.neighbors(adata, random_state=0)
sc.tl.leiden(adata, resolution=0.5, flavor="igraph", n_iterations=2, random_state=0)
slide["grid"].obs["leiden"] = adata.obs["leiden"]
_ = pk.pl.slide(slide, ["leiden", "tissue_fraction"])

# %% [markdown]
# ## `tl.rasterize_expression`: a predicted gene over the H&E
#
# An image with a pixel for each tile, which napari-spatialdata and spatialdata-plot lay over the slide. Pixels without
# a prediction get a number below all others, since spatialdata-plot refuses NaN, which the colour map draws white.

# %%
pk.tl.rasterize_expression(slide, genes, fill=-1)
magma = plt.get_cmap("magma").with_extremes(under="white")
slide.pl.render_images("P1S1_he").pl.render_images(
    "P1S1_he_grid_peka", channel=genes[0], cmap=magma, norm=plt.Normalize(0, 6), alpha=0.6
).pl.show(coordinate_systems="P1S1", figsize=(5.6, 5), title=f"{genes[0]}, predicted")

# %% [markdown]
# ## `io.write_geojson`: clusters for QuPath
#
# One annotation for each cluster, in pixels of the slide, with its colour; here read again and drawn on the image.

# %%
file = Path(tempfile.mkdtemp()) / "clusters.geojson"
pk.io.write_geojson(slide, file, classes="leiden", merge=True)
annotations = geopandas.read_file(file)
colours = [[part / 255 for part in c["color"]] for c in annotations["classification"]]
figure, ax = plt.subplots(figsize=(5, 5))
ax.imshow(sd.get_pyramid_levels(slide["P1S1_he"], n=0).transpose("y", "x", "c").to_numpy())
_ = annotations.plot(ax=ax, aspect=None, color=colours, alpha=0.4, edgecolor=colours, linewidth=2)
_ = ax.set(xlabel="px", ylabel="px")

# %% [markdown]
# ## spatialdata-plot: predictions on the spots
#
# `table_layer="peka"` colours the spots of a section by the prediction.

# %%
sdata.pl.render_images("P3S1_he").pl.render_shapes(
    "P3S1_spots", color=best, table_layer="peka", method="matplotlib"
).pl.show(coordinate_systems="P3S1", figsize=(5.6, 5), title=f"{best}, predicted")

# %% [markdown]
# ## A map between spots, pulled to what they measured
#
# The third patient at 25 um: a gene at its spots as they measured it, the plain prediction, the same pulled to the
# spots (`measured="kriging"`), and the standard deviation of the pull.

# %%
pk.pp.tile_grid(sdata, "P3S1_he", tile_px=112, mpp=1.0, stride_um=25, min_sharpness=None, max_pen=None)
pk.tl.predict_expression(sdata, adapter, table_name="grid", genes=[best], key_added="plain", progress=False)
pk.tl.predict_expression(sdata, adapter, table_name="grid", genes=[best], measured="kriging", progress=False)
layers = {"plain prediction": "plain", "pulled to the spots": "peka", "standard deviation": "peka_kriging_sd"}
maps = {title: pk.get.expression(sdata, layer=layer, table_name="grid") for title, layer in layers.items()}
spots = pk.get.expression(sdata, layer=None)
sc.pp.normalize_total(spots, target_sum=1e4)
sc.pp.log1p(spots)
maps = {"measured": spots[spots.obs["section"] == "P3S1", best], **maps}
low, high = maps["measured"].X.min(), maps["measured"].X.max()  # one scale for the three maps of the gene
figure, axes = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
for ax, (title, map_) in zip(axes, maps.items(), strict=True):
    values = map_.X.toarray() if hasattr(map_.X, "toarray") else map_.X
    limits = {} if title == "standard deviation" else {"vmin": low, "vmax": high}
    size = 40 if title == "measured" else 4
    drawn = ax.scatter(*map_.obsm["spatial"].T, c=values[:, 0], s=size, marker="o" if size > 4 else "s", **limits)
    ax.set(title=f"{best}, {title}", aspect="equal", xticks=[], yticks=[], xlim=(0, 1500), ylim=(1500, 0))
    figure.colorbar(drawn, ax=ax, shrink=0.7)

# %% [markdown]
# ## squidpy: sections side by side
#
# `get.expression` is an AnnData with positions in um, which squidpy draws without an image.

# %%
predicted = pk.get.expression(sdata)
sq.pl.spatial_scatter(
    predicted,
    color=best,
    shape=None,
    library_key="section",
    size=70,
    title=["P1S1", "P2S1", "P3S1"],
    ncols=3,
    frameon=False,
    figsize=(4, 3.6),
)

# %% [markdown]
# ## squidpy: which clusters lie beside which

# %%
sc.pp.pca(predicted, n_comps=20, random_state=0)
sc.pp.neighbors(predicted, random_state=0)
sc.tl.leiden(predicted, resolution=0.5, flavor="igraph", n_iterations=2, random_state=0)
sq.gr.spatial_neighbors_knn(predicted, library_key="section")
sq.gr.nhood_enrichment(predicted, cluster_key="leiden", seed=0, show_progress_bar=False)
sq.pl.nhood_enrichment(predicted, cluster_key="leiden", figsize=(4, 4))

# %% [markdown]
# ## scanpy: predicted genes by cluster

# %%
states = adapter.gene_scores[adapter.gene_scores.index.str.startswith("STATE")]
kinds = states["pearson"].groupby(states.index.str.rsplit("_", n=1).str[0])
top = [gene for _, scores in kinds for gene in scores.nlargest(3).index]
sc.pl.matrixplot(predicted, top, groupby="leiden", standard_scale="var", cmap="viridis")

# %% [markdown]
# ## Saving a figure
#
# All of these are matplotlib's: `pk.pl.expression(sdata, gene).savefig("gene.pdf")`.
