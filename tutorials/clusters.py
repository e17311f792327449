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
# # Many slides on a cluster
#
# Jobs on a cluster are killed: they run out of time, are preempted, or their node fails. This notebook kills a fit and
# a prediction on purpose, and shows that the same command goes on from where it was and ends with the same result.
# Then four predicted slides are brought together in one picture, and tiles are embedded by the workers of a Dask
# cluster.
#
# The tissue is synthetic and the "cluster" is a few processes on this machine, so that the notebook runs anywhere in
# minutes. The commands are those of a real one.

# %%
import filecmp
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scanpy as sc
import spatialdata as sd
import tifffile
from distributed import Client, SubprocessCluster, get_task_stream

import pekasc as pk

work = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Two patients to learn from, and four slides
#
# Two sections with expression go into a zarr folder, as a pipeline finds them. Of four more patients there is only the
# slide: a TIFF file each, and a list of their paths.

# %%
sections = pk.datasets.phantom(n_patients=6, size_um=1300, mpp=2.0)
train = sections.filter_by_coordinate_system(["P1S1", "P2S1"])
train.write(work / "sections.zarr")  # anndata warns of a new layout in its next release: nothing to act on

slides = [f"P{i}S1" for i in range(3, 7)]
for name in slides:
    pixels = np.moveaxis(np.asarray(sd.get_pyramid_levels(sections[f"{name}_he"], n=0)), 0, -1)
    options = {"tile": (256, 256), "photometric": "rgb", "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(work / f"{name}.tif", pixels, resolution=(5e3, 5e3), **options)  # 2 um per pixel
(work / "slides.txt").write_text("".join(f"{name}.tif\n" for name in slides))
print((work / "slides.txt").read_text())


# %% [markdown]
# Commands run as processes of their own, with their results and their messages in files.


# %%
def start(command: str, log: str) -> subprocess.Popen:
    """Start `pekasc` with the arguments of a command line, in the folder of this notebook's data."""
    with (work / f"{log}.out").open("w") as out, (work / f"{log}.err").open("w") as err:
        return subprocess.Popen([sys.executable, "-m", *command.split()], cwd=work, stdout=out, stderr=err)


# %% [markdown]
# ## A fit that is killed
#
# With `--compute resume=FOLDER`, a fit writes down what it has chosen, every fold that is done, and every
# `checkpoint_minutes` the state of the training. Here the process is killed (`SIGKILL`, which it cannot catch) as soon
# as its last training, the one on all patients, has a checkpoint.
#
# Small settings keep it short; leave out `--recipe`, `--readout` and `checkpoint_minutes` (then 5) for real work.

# %%
fit = (
    "pekasc fit sections.zarr --out adapter --groups patient --tile-px 56 --mpp 2 "
    "--compute resume=state --compute checkpoint_minutes=0.01 "
    "--recipe epochs=4 --recipe choose_epochs=false --recipe n_views=1 --recipe blocks=2 --readout ridge"
)
process = start(fit, "fit")
while process.poll() is None and not (work / "state" / "final" / "last.ckpt").exists():
    time.sleep(0.02)
process.kill()
print("exit code:", process.wait())
print("adapter written:", (work / "adapter").exists())
print("checkpoints:", *sorted(str(path.relative_to(work)) for path in (work / "state").rglob("*.ckpt")))

# %% [markdown]
# The same command again goes on from there: both folds are read, the last training continues.

# %%
print("exit code:", start(fit, "fit").wait())
print("\n".join((work / "fit.err").read_text().splitlines()[-4:]))

# %% [markdown]
# Is it the adapter that an undisturbed fit gives? Here is one, by the call in Python that the command stands for; every
# file of weights is the same, byte for byte. (The warning is about spots on fat, whose tiles are nearly white.)

# %%
read = sd.read_zarr(work / "sections.zarr")
pk.pp.tile(read, tile_px=56, mpp=2.0)
undisturbed = pk.tl.fit_adapter(
    read,
    groups="patient",
    recipe={"epochs": 4, "choose_epochs": False, "n_views": 1, "blocks": 2},
    readout="ridge",
    progress=False,
)
undisturbed.save(work / "undisturbed")
for path in sorted((work / "undisturbed").glob("*.safetensors")):
    same = filecmp.cmp(path, work / "adapter" / path.name, shallow=False)
    print(f"{path.name}: {'the same bytes' if same else 'DIFFERENT'}")

# %% [markdown]
# Delete `state` once the adapter is saved.
#
# ## Two processes, one list
#
# Both get the whole list and one output folder, as the tasks of a Slurm array do. A process claims a slide before it
# works on it, and passes over those that the other has claimed or finished. The first process is killed when it has
# finished one slide and is at its next.

# %%
predict = "pekasc predict --list slides.txt --adapter adapter --out predicted --stride-um 50 --json"
first, second = start(predict, "first"), start(predict, "second")
while first.poll() is None and not (work / "first.out").read_text():
    time.sleep(0.02)
time.sleep(0.5)
first.kill()
print("exit codes:", first.wait(), second.wait())


# %% [markdown]
# With `--json`, a process writes one line for each slide that it dealt with. The slide that the first one was at when
# it was killed is in the second one's list: a claim is a lock that ends with its process, and at the end of the list
# a process looks once more for slides that were left.


# %%
def results(log: str) -> pd.DataFrame:
    """Return the results of a process, one row a slide."""
    rows = pd.read_json(work / f"{log}.out", lines=True)
    return rows[rows.columns.intersection(["source", "status", "n_tiles", "seconds"])].assign(process=log)


both = pd.concat([results("first"), results("second")], ignore_index=True)
both[["process", "source", "status", "n_tiles", "seconds"]]

# %%
print((work / "second.err").read_text())
done = both.query("status == 'done'")["source"].value_counts()
print("each slide was done once:", set(done.index) == {f"{name}.tif" for name in slides} and (done == 1).all())

# %% [markdown]
# To be sure, run the command again, until nothing is left. Where all is finished it takes a moment, and nothing is
# computed. With more slides in the list, only those are.

# %%
third = start(predict, "third")
print("exit code:", third.wait())
print((work / "third.err").read_text())
print("in the output folder:", *sorted(path.name for path in (work / "predicted").iterdir()))

# %% [markdown]
# `predicted/P3S1.zarr` is a SpatialData; its predictions are in the store `predicted/predictions/P3S1.zarr`, which was
# written piece by piece. `.pekasc` holds the locks and the reasons of slides that failed; leave it where it is.
#
# ## Back into SpatialData
#
# `io.attach_predictions` connects a table with its store. The layer stays on disk; `get.expression` reads the genes it
# is asked for. Here are the four slides, with the gene that the adapter predicted best on the patients held out in
# training, on one scale, and clusters of all their tiles together, by the genes that the adapter can predict.

# %%
adapter = pk.Adapter.load(work / "adapter")
gene = adapter.gene_scores["pearson"].idxmax()
cohort, pictures = {}, {}
for name in slides:
    sdata = sd.read_zarr(work / "predicted" / f"{name}.zarr")
    pk.io.attach_predictions(sdata)
    cohort[name] = pk.get.expression(sdata, table_name="grid")
    pictures[name] = np.asarray(sdata[name])
print(sdata["grid"])

# %%
adata = ad.concat(cohort, label="slide", index_unique="-")
trusted = adapter.gene_scores.query("pearson > 0.3").index
sc.pp.pca(adata, mask_var=adata.var_names.isin(trusted), n_comps=20, random_state=0)
sc.pp.neighbors(adata, random_state=0)
sc.tl.leiden(adata, resolution=0.3, flavor="igraph", n_iterations=2, random_state=0)
print(f"{adata.n_obs} tiles of {len(cohort)} slides, clustered by {len(trusted)} of {adata.n_vars} genes")

# %%
values = adata.obs_vector(gene)
limits = dict(zip(("vmin", "vmax"), np.percentile(values, [1, 99]), strict=True))
figure, axes = plt.subplots(3, 4, figsize=(11, 8.2), layout="constrained", sharex=True, sharey=True)
for column, name in enumerate(slides):
    here = (adata.obs["slide"] == name).to_numpy()
    x, y = adata.obsm["spatial"][here].T
    axes[0, column].imshow(np.moveaxis(pictures[name], 0, -1), extent=(0, 1300, 1300, 0))
    shown = axes[1, column].scatter(x, y, c=values[here], s=42, marker="s", linewidths=0, **limits)
    clusters = adata.obs["leiden"].cat.codes[here]
    axes[2, column].scatter(x, y, c=clusters, cmap="tab10", vmin=0, vmax=9, s=42, marker="s", linewidths=0)
    axes[0, column].set_title(name)
for row, label in zip(axes, ("H&E", f"{gene}, predicted", "clusters of all four"), strict=True):
    row[0].set_ylabel(label)
for ax in axes.flat:
    ax.set(xticks=[], yticks=[], aspect="equal")
    ax.spines[:].set_visible(False)
figure.colorbar(shown, ax=axes[1], label="log1p(counts per 10k)", shrink=0.8)
plt.show()

# %% [markdown]
# ## Tiles embedded by a Dask cluster
#
# `compute={"client": ...}` hands pieces of about 256 tiles to the workers of a `distributed.Client`, which read them
# from the images on disk and embed them. A worker that dies costs the piece it was at. Here are two workers of one
# thread on this machine; on a cluster it is `dask_jobqueue.SLURMCluster` or any other. (`LocalCluster` does as well in
# a notebook; in a script it needs the guard `if __name__ == "__main__"`, which `SubprocessCluster` does not.)

# %%
pk.tl.embed_tiles(read, "tiny", key_added="X_here", progress=False)
with SubprocessCluster(worker_kwargs={"nthreads": 1}, n_workers=2) as cluster, Client(cluster) as client:
    with get_task_stream(client) as stream:
        pk.tl.embed_tiles(read, "tiny", key_added="X_there", compute={"client": client}, progress=False)
    workers = {task["worker"] for task in stream.data}
here, there = (read["table"].obsm[key] for key in ("X_here", "X_there"))
print(f"{len(there)} tiles, {len(workers)} workers, largest difference to one process: {np.abs(here - there).max():g}")

# %% [markdown]
# `tl.fit_adapter`, `tl.predict_expression` and `tl.cross_validate` take the same client.
#
# ## On a real cluster
#
# The array below is all of it: tasks share the list and the output folder, and the script is submitted again until
# nothing is left.
#
# ```bash
# #!/bin/bash
# #SBATCH --array=0-7
# #SBATCH --gres=gpu:1
# #SBATCH --cpus-per-task=8
# #SBATCH --mem=32G
# #SBATCH --time=12:00:00
#
# srun pekasc predict --list slides.txt --adapter adapter --out predicted --compute device=cuda
# ```
#
# With Snakemake, one job for each slide:
#
# ```python
# rule predict:
#     input:
#         slide=lambda wildcards: SLIDES[wildcards.slide],
#         adapter="adapter",
#     output:
#         directory("predicted/{slide}.zarr"),
#     shell:
#         "pekasc predict {input.slide:q} --adapter {input.adapter} --out predicted --compute device=cpu"
# ```
#
# [Clusters and pipelines](../../clusters.md) has the whole of both, Nextflow, the container, and which file systems the
# locks hold on; [Large objects](../../large.md) says what is kept where.
