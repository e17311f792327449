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
# # From predictions to domains, markers and spatial statistics
#
# Predicted expression is an AnnData like any other: scanpy and squidpy go on with it as if it had been measured. This
# notebook does so with the predicted and the measured values of one section side by side, and shows where the predicted
# map misleads.
#
# The tissue is synthetic, so that the notebook runs anywhere in minutes, and so that it is known which genes an image
# can say anything about. For real tissue, the same comparison is in the benchmarks.

# %%
import os

import matplotlib.pyplot as plt
import pandas as pd
import scanpy as sc
import squidpy as sq
from sklearn.metrics import adjusted_rand_score

import pekasc as pk

sc.settings.verbosity = 0

# %% [markdown]
# ## Predict a patient that was not trained on
#
# Three patients with expression, two to learn from. `recipe="quick"` trains no adapter and reads the frozen encoder at
# all depths, which takes seconds; leave it out to train one.

# %%
sdata = pk.datasets.phantom(n_patients=3, size_um=2000, mpp=1.0)
pk.pp.tile(sdata, tile_px=112, mpp=1.0)
adapter = pk.tl.fit_adapter(sdata, train=["P1S1", "P2S1"], recipe="quick", progress=False)
pk.tl.predict_expression(sdata, adapter, progress=False)
print(adapter)

# %% [markdown]
# ## Two AnnData of the same spots
#
# `get.expression` returns predicted genes only, with positions in um. The measured values of the same spots and genes
# are log1p of counts per 10,000, the scale of the predictions.

# %%
test = sdata["table"].obs["section"].astype(str).to_numpy() == "P3S1"
everything = pk.get.expression(sdata, layer="peka")
predicted = everything[test[sdata["table"].obs_names.get_indexer(everything.obs_names)]].copy()
measured = sdata["table"][predicted.obs_names, predicted.var_names].copy()
measured.obsm["spatial"] = predicted.obsm["spatial"]
measured.layers.clear()
sc.pp.normalize_total(measured, target_sum=1e4)
sc.pp.log1p(measured)
print(predicted)

# %% [markdown]
# ## Domains
#
# The usual steps of scanpy, once for each. Clusters of predictions agree with those of the measured values, not in
# every spot, and say less of the tissue than they do: counts hold more than the image.

# %%
for adata in (measured, predicted):
    sc.pp.pca(adata, n_comps=20, random_state=0)
    sc.pp.neighbors(adata, random_state=0)
    sc.tl.leiden(adata, resolution=0.5, flavor="igraph", n_iterations=2, random_state=0)

figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
for ax, (title, adata) in zip(axes, {"measured": measured, "predicted": predicted}.items(), strict=True):
    sc.pl.embedding(adata, "spatial", color="leiden", ax=ax, show=False, size=90, title=f"clusters, {title}")
    ax.invert_yaxis()
    ax.set_aspect("equal")
plt.show()
states = sdata["table"].obsm["phantom_states"].loc[predicted.obs_names].idxmax(axis=1)
pd.Series(
    {
        "predicted with measured clusters": adjusted_rand_score(measured.obs["leiden"], predicted.obs["leiden"]),
        "measured clusters with the tissue": adjusted_rand_score(states, measured.obs["leiden"]),
        "predicted clusters with the tissue": adjusted_rand_score(states, predicted.obs["leiden"]),
    },
    name="adjusted Rand index",
).round(2)

# %% [markdown]
# ## Marker genes
#
# The markers of the measured clusters, found in predicted values of the same spots: the share of the first ten.

# %%
predicted.obs["measured cluster"] = measured.obs["leiden"]
measured.obs["measured cluster"] = measured.obs["leiden"]
shared = {}
for adata in (measured, predicted):
    sc.tl.rank_genes_groups(adata, "measured cluster", method="t-test", n_genes=10)
for cluster in measured.obs["leiden"].cat.categories:
    names = [set(adata.uns["rank_genes_groups"]["names"][cluster]) for adata in (measured, predicted)]
    shared[cluster] = len(names[0] & names[1]) / 10
pd.Series(shared, name="share of markers found again")

# %% [markdown]
# ## Neighbourhoods
#
# Which clusters lie beside which, by squidpy's permutation test, for the two sets of clusters.

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
for ax, (title, adata) in zip(axes, {"measured": measured, "predicted": predicted}.items(), strict=True):
    sq.gr.spatial_neighbors_knn(adata, n_neighs=6)
    sq.gr.nhood_enrichment(adata, cluster_key="leiden", seed=0, show_progress_bar=False)
    z = adata.uns["leiden_nhood_enrichment"]["zscore"]
    shown = ax.imshow(z, cmap="RdBu_r", vmin=-20, vmax=20)
    ax.set(title=f"neighbourhood enrichment, {title}", xlabel="cluster", ylabel="cluster")
    figure.colorbar(shown, ax=ax, label="z-score")
plt.show()

# %% [markdown]
# ## Spatial statistics, and where the map misleads
#
# Moran's I of every gene. Predictions are smooth, because tiles that lie side by side look alike: nearly every
# predicted gene is "spatially variable", those among them that depend on nothing the image shows. Ranks of genes are
# worth more than values, and for such genes not even those.

# %%
for adata in (measured, predicted):
    sq.gr.spatial_autocorr(adata, mode="moran", n_perms=None, show_progress_bar=False)
moran = pd.DataFrame(
    {
        "measured": measured.uns["moranI"]["I"],
        "predicted": predicted.uns["moranI"]["I"],
        "depends on": sdata["table"].var["phantom_depends_on"].astype(str),
    }
).dropna()
figure, ax = plt.subplots(figsize=(5.4, 4.8), layout="constrained")
for kind, group in moran.groupby("depends on"):
    ax.scatter(group["measured"], group["predicted"], s=14, label=kind)
ax.plot([0, 1], [0, 1], color="grey", linewidth=1)
ax.set(xlabel="Moran's I, measured", ylabel="Moran's I, predicted")
ax.legend(title="the gene depends on")
plt.show()
moran.groupby("depends on")[["measured", "predicted"]].median().round(2)

# %% [markdown]
# What tells them apart before anything is measured is the score on held-out patients that the adapter carries, and,
# where there is a measurement, `tl.evaluate`.

# %%
held_out = adapter.gene_scores["pearson"]
moran["held-out score"] = held_out.reindex(moran.index)
pk.tl.evaluate(sdata)
moran["test score"] = sdata["table"].var["peka_pearson"].reindex(moran.index)
moran.groupby("depends on")[["held-out score", "test score"]].median().round(2)

# %% [markdown]
# A gene with a good score, and one with none: H&E, measured, predicted.

# %%
good = held_out.idxmax()
none = moran.query("`depends on` == 'nothing'")["held-out score"].idxmin()
for gene in (good, none):
    pk.pl.expression(sdata, gene, section="P3S1_spots")

# %% [markdown]
# So: before a list of spatially variable genes or markers is read off predictions, leave out the genes that the adapter
# could not predict on the patients that were held out. Of the genes that depend on nothing, next to none is left.

# %%
moran["kept"] = moran["held-out score"] > 0.2
pd.crosstab(moran["depends on"], moran["kept"])

# %% [markdown]
# ## On real tissue
#
# The same on two HER2-positive breast tumours ([Andersson et al., 2021](https://doi.org/10.1038/s41467-021-26271-2)):
# trained on sections C2 and C3 of one patient, predicted for B4, another patient. `datasets.her2st` downloads sections
# from the authors' repository, which states no licence: use them with a citation, and do not redistribute them. The
# cell reads a copy in the folder that the environment variable `PEKASC_HER2ST` names, and is skipped without it; leave
# out `path=` to download about 5 MB per section.
#
# Here, too, every predicted gene is smooth, whatever its score. Clusters agree less than on the phantom: B4 has few
# counts in a spot, and `encoder="tiny"` is for trying out.

# %%
folder = os.environ.get("PEKASC_HER2ST")
if folder is None:
    print("Skipped: PEKASC_HER2ST names no folder with sections of her2st.")
else:
    tumours = pk.datasets.her2st(("C2", "C3", "B4"), path=folder)
    pk.pp.tile(tumours, tile_px=112, mpp=1.0)
    real = pk.tl.fit_adapter(tumours, train=["C2", "C3"], recipe="quick", progress=False)
    pk.tl.predict_expression(tumours, real, progress=False)

    everything = pk.get.expression(tumours, layer="peka")
    predicted = everything[everything.obs["section"] == "B4"].copy()
    measured = tumours["table"][predicted.obs_names].copy()
    measured.obsm["spatial"] = predicted.obsm["spatial"]
    measured.layers.clear()
    sc.pp.normalize_total(measured, target_sum=1e4)
    sc.pp.log1p(measured)
    measured = measured[:, predicted.var_names].copy()
    for adata in (measured, predicted):
        sc.pp.pca(adata, n_comps=20, random_state=0)
        sc.pp.neighbors(adata, random_state=0)
        sc.tl.leiden(adata, resolution=0.5, flavor="igraph", n_iterations=2, random_state=0)
        sq.gr.spatial_neighbors_knn(adata, n_neighs=6)
        sq.gr.spatial_autocorr(adata, mode="moran", n_perms=None, show_progress_bar=False)

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for ax, (title, adata) in zip(axes, {"measured": measured, "predicted": predicted}.items(), strict=False):
        sc.pl.embedding(adata, "spatial", color="leiden", ax=ax, show=False, size=90, title=f"B4, clusters, {title}")
        ax.invert_yaxis()
        ax.set_aspect("equal")
    held_out = real.gene_scores["pearson"].reindex(predicted.var_names)
    morans = [adata.uns["moranI"]["I"].reindex(predicted.var_names) for adata in (measured, predicted)]
    shown = axes[2].scatter(*morans, c=held_out, s=10, vmin=0)
    axes[2].plot([0, 1], [0, 1], color="grey", linewidth=1)
    axes[2].set(xlabel="Moran's I, measured", ylabel="Moran's I, predicted")
    figure.colorbar(shown, ax=axes[2], label="held-out score of the gene")
    plt.show()
    agreement = adjusted_rand_score(measured.obs["leiden"], predicted.obs["leiden"])
    print(f"adjusted Rand index of predicted and measured clusters: {agreement:.2f}")
