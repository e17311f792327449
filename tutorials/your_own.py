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
# # Your own encoder, teacher and adapter
#
# pekasc's defaults need nothing: `encoder="tiny"`, `teacher="pca"`, `method="bone"`. Each is one argument, and takes
# what you bring: any image model of timm with your weights, any embedding of the expression, any configuration of
# PEFT. This notebook replaces all three and compares the results.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import scanpy as sc
import timm
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from sklearn.decomposition import NMF

import pekasc as pk

work = Path(tempfile.mkdtemp())
sdata = pk.datasets.phantom(n_patients=2, mpp=2.0, size_um=1200)
pk.pp.tile(sdata, tile_px=56, mpp=2.0)
quick = {"epochs": 2, "blocks": 1, "n_views": 1, "cluster_head_epochs": 20}  # leave out for real work

# %% [markdown]
# ## An encoder
#
# `pk.models.list_encoders()` names pathology models that are downloaded on first use, most of them after their terms
# are accepted. Anything else is described by {class}`pekasc.models.Encoder`: timm's architecture, a file of weights,
# and mean and standard deviation of the pixels in its training. Here the weights are random, saved under another name,
# as if somebody had sent them: the point is the way in, not the score.

# %%
torch.manual_seed(0)
network = timm.create_model("vit_tiny_patch16_224", img_size=56, patch_size=14, num_classes=0)
save_file(network.state_dict(), work / "weights.safetensors")
mine = pk.models.Encoder(
    "vit_tiny_patch16_224",
    weights=work / "weights.safetensors",
    model_kwargs={"img_size": 56, "patch_size": 14},
    mean=(0.70, 0.55, 0.70),
    std=(0.20, 0.23, 0.18),
    mpp=2.0,
    key="mine",
)
pk.tl.embed_tiles(sdata, mine, progress=False)
print(sdata["table"].obsm["X_mine"].shape)

# %% [markdown]
# Weights that do not fit the architecture to the last tensor are refused, as are tiles of another size.
#
# ## A teacher
#
# The teacher embeds a spot's measured expression, and the adapter learns to predict that embedding from the tile. A
# matrix in `obsm` is a teacher, one row a spot. It has to be fitted without the spots that you test on: here on the
# first patient alone.

# %%
table = sdata["table"]
log = sc.pp.log1p(sc.pp.normalize_total(table, target_sum=1e4, copy=True), copy=True)
train = (table.obs["patient"] == "P1").to_numpy()
factors = NMF(8, init="nndsvda", max_iter=500, random_state=0).fit(log.X[train])
table.obsm["X_programmes"] = np.asarray(factors.transform(log.X), dtype=np.float32)

# %% [markdown]
# ## An adapter
#
# `method=` takes a name (`"bone"`, the Block-Affine adapter of PEKA, `"lora"`, `"dora"`, `"hra"`, ...) or a
# configuration of PEFT, whose target layers may be left out: pekasc knows those of vision transformers.

# %%
lora = LoraConfig(r=8, lora_alpha=16, target_modules=["attn.qkv", "attn.proj"])
how = {"train": ["P1S1_spots"], "recipe": quick, "progress": False}
adapters = {
    "defaults": pk.tl.fit_adapter(sdata, **how),
    "teacher of programmes": pk.tl.fit_adapter(sdata, teacher="X_programmes", **how),
    "LoRA": pk.tl.fit_adapter(sdata, method=lora, **how),
    "random weights": pk.tl.fit_adapter(sdata, encoder=mine, **how),
}
print(adapters["teacher of programmes"])

# %% [markdown]
# ## Predict the second patient with each
#
# Every prediction has a layer of its own.

# %%
scores = {}
for name, adapter in adapters.items():
    key = name.replace(" ", "_")
    pk.tl.predict_expression(sdata, adapter, key_added=key, progress=False)
    frame = pk.tl.evaluate(sdata, layer=key)
    scores[name] = frame["pearson"].to_numpy()

figure, ax = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
ax.boxplot([s[np.isfinite(s)] for s in scores.values()], orientation="horizontal", showfliers=False, widths=0.6)
ax.set_yticks(range(1, len(scores) + 1), scores)
ax.axvline(0, color="0.7", linewidth=0.8, zorder=0)
ax.set(xlabel="Pearson correlation of genes, second patient", title="one argument each")
ax.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# An encoder with random weights still sees colour and texture, so it is not at 0: a baseline worth having. The three
# that read `tiny` differ by next to nothing after two epochs on one section; with the teacher of programmes no epoch
# beat the frozen encoder on held-out tissue, so that its adapter stayed untrained, as the log says.
#
# ## Take it with you
#
# An adapter is a folder of safetensors and JSON without the encoder's weights, which are named by their digest.
# `merge()` gives a plain timm model whose features are the adapted ones, for tools that know nothing of pekasc.

# %%
folder = work / "adapter"
adapters["LoRA"].save(folder)
print(sorted(path.name.split("-")[0] for path in folder.iterdir()))
network = pk.Adapter.load(folder).merge()
with torch.no_grad():
    print(type(network).__name__, tuple(network(torch.zeros(1, 3, 56, 56)).shape))
