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
# # How well does it predict a patient whom it never saw?
#
# A score is worth what its test is worth. This notebook compares methods on held-out patients, with everything that is
# chosen (genes, depth, epochs, penalties) chosen on the other patients; then it shows what folds of random spots, which
# many papers use, would have claimed.
#
# The tissue is synthetic, so that the notebook runs anywhere in minutes and it is known which genes an image can tell.

# %%
import os

import matplotlib.pyplot as plt

import pekasc as pk

# %% [markdown]
# ## Three patients
#
# `groups="patient"` below names what must not be split: two sections of one patient show the same tumour, so that they
# are in training or in the test together.

# %%
sdata = pk.datasets.phantom(n_patients=3, mpp=2.0, size_um=1300)
pk.pp.tile(sdata, tile_px=56, mpp=2.0)
sdata["table"].obs.groupby("patient", observed=True).size()

# %% [markdown]
# ## Methods, side by side
#
# Every patient is held out in turn. `"mean"` predicts the training mean of every gene. `"lazy"` is what one would do
# without pekasc: the encoder's last block and a ridge regression over spots. `"frozen-best"` reads the frozen encoder
# as well as an adapter is read, so that the difference to `"bone"`, an adapter of PEKA's kind, is what training
# adds. Spatially variable genes (`"svg"`) are chosen on the training patients of every fold.
#
# Small settings keep this short; leave out `recipe=` for real work.

# %%
frame = pk.tl.cross_validate(
    sdata,
    groups="patient",
    methods=["mean", "lazy", "frozen-best", "bone"],
    genes="svg",
    n_genes=30,
    recipe={"epochs": 2, "blocks": 1, "n_views": 1},
    n_bootstrap=200,
    progress=False,
)
summary = pk.get.comparison(frame, rival="frozen-best")
summary[["n_folds", "pearson", "difference", "n_better"]].round(3)

# %% [markdown]
# On this tissue, whose genes depend on what one tile shows, one way of reading is as good as another, and training adds
# next to nothing: the comparison says so. On real tissue ways of reading differ by a quarter ("Readouts" in the
# documentation).
#
# Three patients are three observations, however many spots they have: with fewer than five folds no interval is given.
# What each patient says is there to look at.

# %%
by_patient = summary.filter(like=" pearson").droplevel(["encoder", "context_um", "genes"])
by_patient.columns = by_patient.columns.str.removesuffix(" pearson")
ax = by_patient.drop("mean").T.plot.bar(figsize=(6.4, 3.4), rot=0, width=0.75)
ax.set(xlabel="held-out patient", ylabel="mean Pearson correlation, 30 genes", title="each patient was held out once")
ax.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.08))
ax.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## What folds of random spots would have claimed
#
# With random spots as folds, a test spot's neighbours were trained on: they share tissue, stain and, where tiles
# overlap, pixels. `tl.leakage_audit` runs both kinds of folds with the same methods. One of them here is a polynomial
# of the coordinates, which knows nothing of the image: whatever it scores on random spots is leakage.

# %%
audit = pk.tl.leakage_audit(
    sdata,
    groups="patient",
    methods=["coordinates", "frozen-best"],
    genes="svg",
    n_genes=30,
    readout={"fields_um": None, "context_um": None},
    progress=False,
)
audit.round(3)

# %%
scores = audit[["grouped", "random_spots"]].droplevel(["encoder", "context_um", "genes"])
scores.columns = ["held-out patients", "random spots"]
ax = scores.plot.bar(figsize=(5.4, 3.4), rot=0, color=["#3b6ea5", "#d98c4a"], width=0.7)
ax.set(xlabel="", ylabel="mean Pearson correlation, 30 genes", title="the same methods, two kinds of folds")
ax.legend(frameon=False)
ax.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# The honest figure of the coordinates is near 0, since no place in one patient says anything about the same place in
# another. On random spots they look like a method.
#
# ## Gene by gene
#
# An adapter keeps the scores that its training patients gave one another. On the phantom it is known what a gene
# depends on: genes that depend on nothing the image shows are predicted by nobody.

# %%
adapter = pk.tl.fit_adapter(sdata, groups="patient", recipe={"epochs": 2, "blocks": 1, "n_views": 1}, progress=False)
scores = adapter.gene_scores.join(sdata["table"].var["phantom_depends_on"])
scores.groupby("phantom_depends_on", observed=True)["pearson"].describe()[["count", "mean", "min", "max"]].round(2)

# %%
pk.pl.gene_scores(adapter)
plt.show()

# %% [markdown]
# ## On real tissue
#
# The same audit on a section each of two HER2-positive breast tumours
# ([Andersson et al., 2021](https://doi.org/10.1038/s41467-021-26271-2)), with the 50 most spatially variable genes.
# `datasets.her2st` downloads sections from the authors' repository, which states no licence: use them with a citation,
# and do not redistribute them. The cell reads a copy in the folder that the environment variable `PEKASC_HER2ST`
# names, and is skipped without it; leave out `path=` to download about 5 MB per section. Coordinates look like a method
# on random spots here as well, and the encoder like a better one than it is.

# %%
folder = os.environ.get("PEKASC_HER2ST")
if folder is None:
    print("Skipped: PEKASC_HER2ST names no folder with sections of her2st.")
else:
    tumours = pk.datasets.her2st(("B4", "C2"), path=folder)
    pk.pp.tile(tumours, tile_px=112, mpp=1.0)
    audit = pk.tl.leakage_audit(
        tumours,
        groups="patient",
        methods=["coordinates", "frozen-best"],
        genes="svg",
        n_genes=50,
        readout={"fields_um": None, "context_um": None},
        progress=False,
    )
    scores = audit[["grouped", "random_spots"]].droplevel(["encoder", "context_um", "genes"])
    scores.columns = ["the other patient", "random spots"]
    ax = scores.plot.bar(figsize=(5.4, 3.4), rot=0, color=["#3b6ea5", "#d98c4a"], width=0.7)
    ax.set(xlabel="", ylabel="mean Pearson correlation, 50 genes", title="two HER2-positive tumours")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    plt.show()

# %% [markdown]
# ## What to report
#
# - The unit of the test (patients), how many there were, and each one's score.
# - A baseline that reads the frozen encoder as well as the method is read (`"frozen-best"`).
# - The scores of genes that were chosen without the test group.
#
# On real tissue the gap is smaller for some methods and larger for others; "Benchmarks" in the documentation has the
# figures for HER2-positive breast cancer, where sections of one patient score three times what another patient does.
