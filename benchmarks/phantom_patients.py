"""How the gain of an adapter grows with the number of training patients, on synthetic sections.

    python benchmarks/phantom_patients.py --vits PATH --out results/phantom

20 synthetic patients (``pekasc.datasets.phantom``), one section each. The last four are tested, the first 2, 4, 8 or 16
train; patients are held out in turn inside the training ones. ViT-S/14 on tiles of 112 px at 1.0 um/px, bfloat16, genes
50 spatially variable and 50 highly variable ones chosen on the training patients, all through ``tl.cross_validate``.
Finished pieces are kept in the folder ``--out``.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import pandas as pd
import torch

import pekasc as pk
from _machine import machine

N_TRAIN = [2, 4, 8, 16]
N_TEST = 4
RIDGE = pk.Readout.preset("ridge").replace(n_depths=None)
READOUTS = [RIDGE, RIDGE.replace(context_um=300)]
METHODS = ["frozen", "frozen-best", "bone", "teacher"]


def table(frame: pd.DataFrame) -> str:
    """Return one row per number of patients and context: scores on the test patients, and the gain."""
    sections = frame[frame["section"] != "pooled"]
    by = ["fold", "context_um", "genes", "method"]
    # every test patient counts the same; the spread of the gain is over patients
    per_patient = sections.groupby([*by, "section"])["pearson"].mean().unstack("method")
    lines = [
        "| training patients | context | genes | frozen last | frozen best | adapter | teacher | gain over frozen best "
        "| test patients with a gain |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for n in N_TRAIN:
        for context in (0.0, 300.0):
            for genes in ("svg", "hvg"):
                if str(n) not in per_patient.index.get_level_values("fold"):
                    continue
                of = per_patient.loc[(str(n), context, genes)]
                mean = of.mean()
                wins = int((of["bone"] > of["frozen-best"]).sum())
                cells = [mean[m] for m in ("frozen", "frozen-best", "bone", "teacher")]
                gain = mean["bone"] / mean["frozen-best"] - 1
                lines.append(
                    f"| {n} | {'300 um' if context else 'none'} | {genes} | "
                    + " | ".join(f"{value:.3f}" for value in cells)
                    + f" | {100 * gain:+.1f} % | {wins} of {len(of)} |"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vits", type=Path, required=True, help="weights of the ViT-S/14")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--size-um", type=float, default=1000.0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    torch.set_num_threads(arguments.threads)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    sdata = pk.datasets.phantom(max(N_TRAIN) + N_TEST, size_um=arguments.size_um, mpp=1.0)
    pk.pp.tile(sdata, tile_px=112, mpp=1.0)
    obs = sdata["table"].obs
    print(obs.groupby("patient", observed=True).size().describe())
    patients = list(dict.fromkeys(obs["patient"]))
    test = obs["patient"].isin(patients[-N_TEST:]).to_numpy()
    encoder = pk.models.Encoder("vit_small_patch14_dinov2", weights=arguments.vits)
    frames = []
    for n in N_TRAIN:
        train = obs["patient"].isin(patients[:n]).to_numpy()
        frames.append(
            pk.tl.cross_validate(
                sdata, encoders=encoder, methods=METHODS, folds={str(n): (train, test)}, seeds=arguments.seeds,
                readout=READOUTS, compute={"cache": out / "cache", "device": "cpu", "precision": "bf16"},
                store=out / "store",
            )
        )  # fmt: skip
        pd.concat(frames).to_csv(out / "phantom.csv")
    print(table(pd.read_csv(out / "phantom.csv", dtype={"fold": str})))
    print(machine())


if __name__ == "__main__":
    main()
