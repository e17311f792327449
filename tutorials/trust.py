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
# # How far can I trust this gene, here?
#
# A score over a whole section says little about one gene in one spot. This notebook asks three questions of a
# prediction for a patient whom nobody trained on: can an image tell this gene, is this tile like the training tissue,
# and where will a measurement lie? Each answer is then held against the truth.
#
# The tissue is synthetic, so that the notebook runs anywhere in two minutes and the truth is known.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import spatialdata as sd
from scipy.ndimage import gaussian_filter
from spatialdata.models import Image2DModel
from spatialdata.transformations import get_transformation

import pekasc as pk

# %% [markdown]
# ## Thirteen patients
#
# Three to learn from, nine that the adapter never sees before its intervals are made, and one to predict. The frozen
# encoder is read here (`recipe="quick"`), which takes seconds; everything below is the same for an adapter that was
# trained.

# %%
sdata = pk.datasets.phantom(n_patients=13, mpp=2.0, size_um=1200, n_genes=60)
pk.pp.tile(sdata, tile_px=56, mpp=2.0)
names = [f"P{i}S1" for i in range(1, 14)]
training, others = (sdata.filter_by_coordinate_system(part) for part in (names[:3], names[3:12]))
new = sdata.filter_by_coordinate_system("P13S1")
adapter = pk.tl.fit_adapter(training, groups="patient", recipe="quick", progress=False)

# %% [markdown]
# ## Intervals
#
# Without further tissue, intervals are made of what the fit held out: each of the three patients was predicted by a
# model that had not seen it. A warning says that three patients are few, and `print` that they could promise 75 %.

# %%
few = pk.tl.calibrate(adapter)
print(few)

# %% [markdown]
# Patients that the adapter never saw are better: there are more of them here, and they are predicted by the adapter
# itself. By default they stand for all there are, and nothing is promised. `guarantee="exact"` promises the level for
# a spot of one more patient of their kind, and K patients can promise K / (K + 1): nine are just enough for 90 %.

# %%
nine = pk.tl.calibrate(adapter, others, groups="patient", progress=False)
exact = pk.tl.calibrate(adapter, others, groups="patient", guarantee="exact", progress=False)
print(nine.calibration.text, exact.calibration.text, sep="\n")

# %% [markdown]
# The new patient was sequenced, so that all three can be checked: which share of the measured values lies in its
# interval, and how wide are intervals?

# %%
scores = {}
for name, calibrated in {"three, held out": few, "nine, exact": exact, "nine": nine}.items():
    pk.tl.predict_expression(new, calibrated, progress=False)
    scores[name] = pk.tl.evaluate(new)
pd.DataFrame({name: part[["coverage_randomised", "width"]].mean() for name, part in scores.items()}).T.round(2)

# %% [markdown]
# Counts are whole numbers, and a closed interval holds a little more than its level; `coverage_randomised` is the one
# that should be 0.9. Nine patients come close. Their exact promise is kept by intervals that hold nearly everything: at
# the least number of patients, an interval is as wide as the most wrong spot among them all needs, and a gene with a
# spot beyond all that counts allow has none. A promise that is of use takes more patients, or a lower level. Nine
# without a promise go on from here.

# %% [markdown]
# ## Can an image tell this gene?
#
# A prediction of a calibrated adapter brings intervals, novelty and levels of trust along. Levels are from scores on
# the held-out patients. On the phantom it is known what a gene depends on: what the image does not show is of low
# trust.

# %%
table = new["table"]
pd.crosstab(table.var["phantom_depends_on"], table.var["peka_trust"])

# %%
pk.pl.trust(nine, n=20)
plt.show()

# %% [markdown]
# ## Where will the measurement lie?
#
# Intervals must hold at any depth of sequencing, and say which genes they are of use for.
#
# ### The same patient, sequenced ten times less
#
# Every transcript is kept with a probability of one in ten. The tissue and its rates are the same, so that predictions
# and intervals of the *rate* stay; measurements are noisier, and their intervals wider. Nothing is calibrated again:
# intervals know the depth of every spot.

# %%
shallow = sdata.filter_by_coordinate_system("P13S1")
counts = shallow["table"].X.copy()
counts.data = np.random.default_rng(0).binomial(counts.data.astype(int), 0.1).astype(np.float32)
shallow["table"].X = counts
pk.tl.predict_expression(shallow, nine, progress=False)
found = {"as sequenced": scores["nine"], "ten times less": pk.tl.evaluate(shallow)}
depths = pd.concat([part.assign(depth=depth) for depth, part in found.items()])
depths.groupby("depth")[["coverage", "coverage_randomised", "width", "pearson", "ceiling"]].mean().round(3)

# %% [markdown]
# Coverage stays where it was. The correlation falls with its ceiling, the largest that counting noise allows: the
# prediction is as good as before, and what it is compared with is worse.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
colors = {"as sequenced": "#3b6ea5", "ten times less": "#d98c4a"}
for depth, part in depths.groupby("depth"):
    left.hist(
        part["coverage_randomised"], bins=np.arange(0.7, 1.01, 0.025), color=colors[depth], alpha=0.6, label=depth
    )
    right.hist(part["width"], bins=np.arange(0, 6.1, 0.25), color=colors[depth], alpha=0.6)
left.axvline(0.9, color="black", lw=1, ls="--")
left.set(xlabel="coverage (randomised)", ylabel="genes", title="how often intervals are right")
right.set(xlabel="mean width, log1p units", title="how wide they are")
left.legend(frameon=False, loc="upper left")
for ax in (left, right):
    ax.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ### Three genes, spot by spot
#
# The gene with the best held-out score, one in the middle, and the worst. Spots are sorted by their prediction. The
# dark band is the interval of the rate, all that a slide has which nobody sequenced; the light one is that of a
# measurement at the spot's total. Dots are measured.

# %%
ranked = adapter.gene_scores["pearson"].sort_values(ascending=False).index
genes = [ranked[0], ranked[len(ranked) // 2], ranked[-1]]
fig, axes = plt.subplots(2, 3, figsize=(9.5, 5.6), sharex=True, sharey=True, layout="constrained")
for row, (depth, data) in zip(axes, [("as sequenced", new), ("ten times less", shallow)], strict=True):
    table = data["table"]
    totals = np.asarray(table.X.sum(axis=1))
    measured = np.log1p(1e4 * table.X.toarray() / totals.reshape(-1, 1))
    low, high = pk.get.interval(data)
    for ax, gene in zip(row, genes, strict=True):
        i = table.var_names.get_loc(gene)
        order = np.argsort(table.layers["peka"][:, i])
        x = np.arange(order.size)
        inside = (measured[:, i] >= low[:, i] - 1e-5) & (measured[:, i] <= high[:, i] + 1e-5)
        ax.fill_between(x, low[order, i], high[order, i], step="mid", color="#c9d6e8", lw=0, label="measurement")
        rate = [table.layers[f"peka_{end}"][order, i] for end in ("lower", "upper")]
        ax.fill_between(x, *rate, color="#7f9fc6", lw=0, label="rate")
        ax.plot(x, table.layers["peka"][order, i], color="#1f3f66", lw=1.5, label="prediction")
        ax.scatter(x, measured[order, i], s=7, c=np.where(inside[order], "black", "#c23b22"), zorder=3)
        ax.spines[["top", "right"]].set_visible(False)
        trust = table.var.loc[gene, "peka_trust"]
        ax.set_title(f"{gene}, {trust} trust\n{inside.mean():.0%} inside", fontsize=10)
    row[0].set_ylabel(f"{depth}\nlog1p(counts per 10,000)")
axes[1, 1].set_xlabel("spots, by prediction")
fig.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, ncols=3, loc="outside upper center")
plt.show()

# %% [markdown]
# Dots outside are red. The intervals of the worst gene are right as often as those of the best; they are of no use,
# since they are as wide as the gene varies in all of the tissue. Coverage says that an interval is honest, its width
# what it is worth.
#
# ## Is this tile like the training tissue?
#
# A copy of the slide is spoilt: its left third goes out of focus, and a pen crosses the right half.

# %%
pixels = np.asarray(sd.get_pyramid_levels(new["P13S1_he"], n=0))
rows, columns = np.mgrid[: pixels.shape[1], : pixels.shape[2]]
width = pixels.shape[2]
blurred = columns < width / 3
pen = (np.abs(rows - 0.45 * width - 0.3 * (columns - 0.7 * width)) < 24) & (columns > 0.5 * width)
spoilt_pixels = np.where(blurred, gaussian_filter(pixels, (0, 4, 4)), pixels)  # 8 um
ink = np.array([25, 70, 160]).reshape(3, 1, 1)
spoilt_pixels = np.where(pen, (0.25 * spoilt_pixels + 0.75 * ink).astype(np.uint8), spoilt_pixels)

spoilt = sdata.filter_by_coordinate_system("P13S1")
spoilt["P13S1_he"] = Image2DModel.parse(
    spoilt_pixels, dims=("c", "y", "x"), scale_factors=[2],
    transformations=get_transformation(new["P13S1_he"], get_all=True),
)  # fmt: skip
pk.tl.predict_expression(spoilt, nine, abstain=0.05, progress=False)

# %%
fig, axes = plt.subplots(2, 2, figsize=(8.4, 7.4), layout="constrained")
shown = [("the slide", pixels, new), ("spoilt", spoilt_pixels, spoilt)]
for row, (title, image, data) in zip(axes, shown, strict=True):
    p = data["table"].obs["peka_novelty"].to_numpy()
    x, y = data["table"].obsm["spatial"].T
    for ax in row:
        ax.imshow(np.moveaxis(image, 0, -1), alpha=1 if ax is row[0] else 0.25)
        ax.set_axis_off()
    row[0].set_title(title)
    dots = row[1].scatter(x, y, c=p, s=110, cmap="magma", norm="log", vmin=0.001, vmax=1, marker="h", lw=0)
    row[1].scatter(x[p < 0.05], y[p < 0.05], s=14, c="white", marker="x", lw=1.2)
    row[1].set_title(f"novelty: {np.mean(p < 0.05):.0%} of spots below 0.05 (crosses)", fontsize=10)
    fig.colorbar(dots, ax=row[1], shrink=0.75, label="p-value, small is novel")
plt.show()

# %% [markdown]
# `pk.pl.novelty` shows the tiles at both ends, which say more than a number.

# %%
pk.pl.novelty(spoilt)
plt.show()

# %% [markdown]
# With `abstain=0.05`, nothing is predicted at the crosses: those rows are NaN in the layer, and left out of scores.
# What counts is whether predictions are worse there.

# %%
p = spoilt["table"].obs["peka_novelty"].to_numpy()
truth = new["table"].layers["truth"]  # rates that the phantom drew counts from
known = (new["table"].var["peka_trust"] == "high").to_numpy()
pk.tl.predict_expression(spoilt, nine, progress=False)  # everywhere, to see what abstaining spares
error = {
    name: np.sqrt(np.square(data["table"].layers["peka"] - truth)[:, known].mean(axis=1))
    for name, data in (("the slide", new), ("spoilt", spoilt))
}
where = np.where(p < 0.05, "abstained", "predicted")
pd.DataFrame(error).groupby(where).agg(["mean", "size"]).round(2)

# %% [markdown]
# On the spoilt copy the error at the crosses is almost twice what it was on the slide, and the same elsewhere.
#
# ## What to take along
#
# - Calibrate on patients that the adapter never saw, as many as there are. A promise of 90 % needs nine at the least,
#   and a good many more to be of use.
# - Look at the width of an interval as well as at its coverage, and at `var["peka_trust"]` before either.
# - Novelty is about tiles: it finds what is out of focus, marked, folded or at another pixel size. Where patients
#   differ in stain, it calls
#   more of a good slide novel than its p-values say.
# - Intervals are of one gene in one spot. They say nothing of genes against each other, nor of lists of markers: "What
#   can be trusted" in the documentation says why.
