"""Samples of HEST-1k that were changed or damaged: `read_hest` gives a table, or an error that names the sample."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

import pekasc as pk
from pekasc.models.runtime import peak_memory as runtime_peak

N_SPOTS, N_GENES, SIDE = 12, 5, 16
FILES = {"st": "st/S1.h5ad", "patches": "patches/S1.h5", "metadata": "metadata/S1.json"}
VALUES = [
    None,
    True,
    0,
    -1,
    10**400,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "a",
    "ü" * 50,
    [],
    [1],
    {},
    {"a": 1},
    "Visium",
]
DTYPES = ["f2", "f8", "i1", "u2", "i8", "?", "S3", "c8", "M8[s]", "V4"]
SLOW = [pytest.mark.slow, pytest.mark.timeout(7200)]
N = pytest.mark.parametrize("n", [50, pytest.param(2000, marks=SLOW)])
LARGE = 10**6  # numbers
MEMORY = 2 * 2**30
SECONDS = 20  # for a case, in which libhdf5 may loop for ever on damaged bytes


def write(folder: Path) -> None:
    """Write a small sample with stored patches."""
    rng = np.random.default_rng(0)
    for file in FILES.values():
        (folder / file).parent.mkdir(parents=True)
    row, col = np.divmod(np.arange(N_SPOTS), 4)
    barcodes = [f"spot{i}" for i in range(N_SPOTS)]
    obs = pd.DataFrame({"array_row": row, "array_col": col, "in_tissue": True}, index=barcodes)
    obs["other"] = pd.Categorical(["a", "b"] * (N_SPOTS // 2))
    counts = rng.poisson(2.0, (N_SPOTS, N_GENES)).astype(np.float32)
    adata = ad.AnnData(csr_matrix(counts), obs, pd.DataFrame(index=[f"g{i}" for i in range(N_GENES)]))
    centres = np.column_stack([100 + 200 * col, 100 + 200 * row])
    adata.obsm["spatial"] = centres
    adata.write_h5ad(folder / FILES["st"])
    with h5py.File(folder / FILES["patches"], "w") as h5:
        h5.create_dataset(
            "img", data=rng.integers(0, 255, (N_SPOTS, SIDE, SIDE, 3), np.uint8), chunks=(1, SIDE, SIDE, 3)
        )
        h5["img"].attrs.update({"patch_size_src": 2 * SIDE, "pixel_size": 1.0})
        h5["coords"] = centres - SIDE
        h5["barcode"] = np.array(barcodes, dtype="S")[:, None]
    metadata = {
        "st_technology": "Spatial Transcriptomics", "pixel_size_um_estimated": 1.0, "inter_spot_dist": 200.0,
        "spot_diameter": 100.0, "patient": "A", "fullres_px_width": 1000, "fullres_px_height": 800,
        "dataset_title": "Drawn",
    }  # fmt: skip
    (folder / FILES["metadata"]).write_text(json.dumps(metadata))


def tried(folder: Path) -> str:
    """Read the sample; return what came of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            table = pk.io.read_hest(folder, "S1")["table"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            assert "S1" in str(error) and len(str(error)) < 3000, error
            assert not isinstance(error, TypeError) or "pixel_size_um_estimated" in str(error), error
            return "refused"
    assert table.n_obs == len(table.obs) and np.isfinite(table.obsm["spatial"]).all()
    assert table.X.has_canonical_format or table.X.indices.size == 0 or table.X.indices.max() < table.n_vars
    return "read"


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "hest"
    write(folder)
    assert tried(folder) == "read"
    return folder


def parts(h5: h5py.File) -> list[str]:
    found: list[str] = []
    h5.visit(found.append)
    return found


def change_structure(data: st.DataObject, file: Path) -> None:
    """Change one part of an HDF5 file: another shape, type, link, storage or attribute, or leave it out."""
    with h5py.File(file, "a", track_order=False) as h5:
        name = data.draw(st.sampled_from(parts(h5)))
        part = h5[name]
        kinds = ["drop", "link", "external link", "itself", "attribute"]
        kinds += ["shape", "type", "strings", "external", "virtual", "huge"] * isinstance(part, h5py.Dataset)
        kinds += ["value"] * (isinstance(part, h5py.Dataset) and part.size < LARGE)
        kind = data.draw(st.sampled_from(kinds))
        if kind == "attribute":
            key = data.draw(st.sampled_from([*sorted(part.attrs), "encoding-type", "shape", "_index", "categories"]))
            value = data.draw(
                st.sampled_from(["a", "", "_index", "csr_matrix", 0, -1, 10**18, np.nan, [1, 2], [0.5], b"\xff"])
            )
            part.attrs[key] = value
            return
        attributes, shape = dict(part.attrs), getattr(part, "shape", ())
        try:
            old = part[...] if isinstance(part, h5py.Dataset) and part.size < LARGE else np.zeros(4)
        except OSError:  # what was changed before is in no file
            old = np.zeros(4)
        del h5[name]
        if kind == "link":
            h5[name] = h5py.SoftLink("/" + data.draw(st.sampled_from(["X", "obs", "img", name])))
        elif kind == "external link":
            h5[name] = h5py.ExternalLink("/etc/hostname", "x")
        elif kind == "itself":
            h5[name] = h5["/"]
        elif kind == "shape":
            new = data.draw(st.lists(st.integers(0, 14), max_size=3))
            h5[name] = np.resize(old, new) if old.dtype != object else np.zeros(new)
        elif kind == "type":
            dtype = data.draw(st.sampled_from(DTYPES))
            h5.create_dataset(name, shape, dtype if dtype[0] not in "M" else "i8")
        elif kind == "value":
            h5[name] = np.full(shape, data.draw(st.sampled_from([0, -1, 7, 1e300, np.nan, np.inf])))
            if old.dtype.kind in "iu" and data.draw(st.booleans()):
                del h5[name]
                h5[name] = np.full(shape, data.draw(st.sampled_from([0, 1, 7])), old.dtype)
        elif kind == "strings":
            h5[name] = [data.draw(st.sampled_from(["", "a", "True", "spot1", "x" * 1000]))] * (shape[0] if shape else 1)
        elif kind == "external":
            h5.create_dataset(name, shape or (1,), "u1", external=[("/etc/hostname", 0, h5py.h5f.UNLIMITED)])
        elif kind == "virtual":
            layout = h5py.VirtualLayout(shape or (1,), "f8")
            layout[...] = h5py.VirtualSource("/etc/hostname", "x", shape or (1,))
            h5.create_virtual_dataset(name, layout)
        elif kind == "huge":
            size = tuple(2**20 for _ in shape) or (2**40,)
            h5.create_dataset(name, size, "f8", chunks=tuple(min(64, n) for n in size))
        if name in h5 and kind not in ("link", "external link", "itself"):
            # what h5py cannot read as text, it cannot write as text either
            h5[name].attrs.update({key: value for key, value in attributes.items() if "\udcff" not in str(value)})


def change_metadata(data: st.DataObject, file: Path) -> None:
    found = json.loads(file.read_text())
    if not isinstance(found, dict) or not found:
        return
    name = data.draw(st.sampled_from(sorted(found)))
    value = data.draw(st.sampled_from(VALUES))
    file.write_text(json.dumps({**found, name: value} if data.draw(st.booleans()) else value))


def peak_memory() -> int:
    """Return the most memory that this process has had, in bytes, without that of the process that started it."""
    return runtime_peak(torch.device("cpu"))


@N
def test_changed(sample: Path, n: int) -> None:
    results: list[str] = []
    before = peak_memory()

    @settings(max_examples=n, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(shutil.copytree(sample, Path(parent) / "hest"))
            kind = data.draw(st.sampled_from(["st", "st", "st", "patches", "patches", "metadata"]))
            for _ in range(data.draw(st.integers(1, 2))):
                (change_metadata if kind == "metadata" else change_structure)(data, folder / FILES[kind])
            results.append(tried(folder))

    run()
    print({name: results.count(name) for name in sorted(set(results))})  # noqa: T201 (shown with -s, for the slow job)
    assert results.count("refused") > n // 3 and results.count("read") > n // 20
    assert peak_memory() - before < MEMORY


# in a process of its own, which libhdf5 may end: one line for each case that it came to
DAMAGE = """
import importlib.util, random, resource, shutil, signal, sys, tempfile
from pathlib import Path
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
spec = importlib.util.spec_from_file_location("fuzz_hest", sys.argv[1])
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)
sample, first, last = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
for case in range(first, last):
    chance = random.Random(case)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(shutil.copytree(sample, Path(parent) / "hest"))
        file = folder / fuzz.FILES[chance.choice(["st", "patches"])]
        content = bytearray(file.read_bytes())
        # HDF5's own structures are at the beginning and among the data
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(min(len(content), chance.choice([4096, 10**9])))
            kind = chance.random()
            if kind < 0.6:
                content[at] = chance.randrange(256)
            elif kind < 0.8:
                content[at : at + 8] = chance.choice([b"\\xff" * 8, bytes(8), (2**40).to_bytes(8, "little")])
            else:
                del content[at:]
                break
        file.write_bytes(content)
        print(case, "begins", flush=True)
        # ends the process, since nothing of Python runs while libhdf5 loops
        signal.alarm(fuzz.SECONDS)
        try:
            print(case, fuzz.tried(folder), flush=True)
        except BaseException as error:
            print(case, "RAW", type(error).__name__, str(error)[:300].replace("\\n", " "), flush=True)
        signal.alarm(0)
assert fuzz.peak_memory() < fuzz.MEMORY
"""


@pytest.mark.parametrize("n", [100, pytest.param(2000, marks=SLOW)])
def test_damaged(sample: Path, n: int) -> None:
    first, ended, lines = 0, dict[int, str](), list[str]()
    while first < n:
        command = [sys.executable, "-W", "ignore", "-c", DAMAGE, __file__, str(sample), str(first), str(n)]
        done = subprocess.run(command, capture_output=True, text=True)
        lines += done.stdout.splitlines()
        if done.returncode == 0:
            break
        assert done.returncode < 0, done.stderr[-2000:]  # a signal: libhdf5 itself
        first = int(lines[-1].split()[0]) + 1
        ended[first - 1] = signal.Signals(-done.returncode).name
    assert [line for line in lines if " RAW " in line] == []
    results = [line.split()[1] for line in lines]
    print({name: results.count(name) for name in ("refused", "read")}, "libhdf5 ended by a signal:", ended)  # noqa: T201
    assert results.count("refused") + results.count("read") + len(ended) == n
    assert results.count("refused") > n // 4 and len(ended) <= max(2, n // 50)
