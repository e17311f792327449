"""The package as a whole: import, metadata, docstrings, and documents that must not drift from the code."""

from __future__ import annotations

import ast
import builtins
import doctest
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest

import pekasc

ROOT = Path(__file__).resolve().parents[1]
NAMESPACES = ("pp", "tl", "get", "pl", "datasets", "models", "io")
# a namespace without `__all__` ends the collection: with no names, the tests of all names would pass
PUBLIC = [f"{namespace}.{name}" for namespace in NAMESPACES for name in getattr(pekasc, namespace).__all__]
OPTIONS = ["Recipe", "Readout", "Compute"]
PUBLIC += [*OPTIONS, "report"]
# methods and properties of public classes, which users meet in completions and on the API page
MEMBERS = [
    f"{name}.{member}"
    for name in PUBLIC
    if inspect.isclass(attrgetter(name)(pekasc))
    for member, value in vars(attrgetter(name)(pekasc)).items()
    if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property | classmethod))
]
CALLS = [name for name in PUBLIC if name.split(".")[0] in {"pp", "tl", "get", "pl", "datasets", "report"}]

# numpydoc's checks that hold for every public object. Not among them: types of parameters (they stand in the
# signature), "See Also", extended summaries, and the form of the return section, which names slots.
CHECKS = {
    "GL03",  # no blank lines too many
    "GL06",  # no unknown section
    "GL07",  # order of sections
    "GL08",  # there is a docstring
    "SS01",  # there is a summary
    "SS02",  # it starts with a capital letter
    "SS03",  # it ends with a full stop
    "SS05",  # it is imperative
    "SS06",  # it fits on one line
    "PR01",  # every parameter is documented
    "PR02",  # nothing else is
    "PR03",  # in the order of the signature
    "PR07",  # with a description
    "RT01",  # there is a return section
}


def _resolve(name: str) -> Any:
    return attrgetter(name)(pekasc)


def _python(code: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, *arguments, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout


def test_version_is_the_distributions() -> None:
    assert pekasc.__version__ == version("pekasc")
    assert re.search(rf"^## {re.escape(pekasc.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_import_is_light() -> None:
    heavy = ["anndata", "lightning", "matplotlib", "numba", "peft", "scanpy", "spatialdata", "squidpy", "timm", "torch"]
    code = f"import sys, pekasc; print([name for name in {heavy} if name in sys.modules])"
    assert _python(code).strip() == "[]"


def test_import_is_fast() -> None:
    # what takes time is other packages, whatever the machine: none is imported before a namespace is asked for, and of
    # our own only the option objects, the check of their paths and the settings
    code = """
import sys
before = set(sys.modules)
import pekasc
names = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(names - sys.stdlib_module_names))
print(sorted(name for name in sys.modules if name.startswith("pekasc.")))
"""
    assert _python(code).splitlines() == ["['pekasc']", "['pekasc._options', 'pekasc._paths', 'pekasc._settings']"]


def test_every_namespace_has_public_names() -> None:
    for namespace in NAMESPACES:
        assert [name for name in PUBLIC if name.startswith(f"{namespace}.")], namespace
    assert len(set(PUBLIC)) == len(PUBLIC)


def test_namespaces_that_do_not_train_load_without_torch() -> None:
    # in one process: what they load takes seconds, and is the same for all
    code = """
import sys
import pekasc
for namespace in ("datasets", "pp", "get", "io", "pl"):
    getattr(pekasc, namespace)
    print(namespace, [name for name in ("lightning", "peft", "squidpy", "timm", "torch") if name in sys.modules])
"""
    assert _python(code).splitlines() == [f"{namespace} []" for namespace in ("datasets", "pp", "get", "io", "pl")]


def test_modules_only_define() -> None:
    # a call at module level is a side effect of the import: handlers, filters, seeds, style sheets
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "src").rglob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ]
    assert not found


def test_dir_lists_the_public_names() -> None:
    assert set(NAMESPACES) <= set(dir(pekasc))
    assert pekasc.Adapter is pekasc.models.Adapter
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pekasc.nothing  # noqa: B018


@pytest.mark.parametrize("name", [*PUBLIC, *MEMBERS])
def test_docstring(name: str) -> None:
    from numpydoc.validate import validate

    errors = [(code, text) for code, text in validate(f"pekasc.{name}")["errors"] if code in CHECKS]
    assert not errors


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "models.list_encoders"])
def test_docstring_says_what_is_raised_and_when(name: str) -> None:
    # list_encoders takes nothing that could be wrong
    from numpydoc.docscrape import ClassDoc, FunctionDoc

    documented = _resolve(name)
    raises = (ClassDoc if inspect.isclass(documented) else FunctionDoc)(documented)["Raises"]
    assert raises or inspect.isclass(documented)
    for error in raises:
        assert all(issubclass(getattr(builtins, kind), Exception) for kind in error.type.split(", "))
        assert re.match(r"(If|When|Where|As :func:) ?", error.desc[0]), error.desc


@pytest.mark.parametrize("name", [*CALLS, *OPTIONS, "models.Teacher", "models.Encoder"])
def test_docstring_has_an_example(name: str) -> None:
    assert ">>> " in (_resolve(name).__doc__ or "")


@pytest.mark.parametrize("name", [*CALLS, *OPTIONS, "models.Teacher", "models.Encoder"])
@pytest.mark.filterwarnings("ignore")
def test_docstring_example_runs(name: str) -> None:
    matplotlib.use("Agg")
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for example in doctest.DocTestFinder(recurse=False).find(_resolve(name), name, globs={}):
        runner.run(example, out=report.append)
    assert not report, "".join(report)
    plt.close("all")


@pytest.mark.parametrize("name", CALLS)
def test_docstring_leaves_types_to_the_signature(name: str) -> None:
    from numpydoc.docscrape import FunctionDoc

    assert not [p.name for p in FunctionDoc(_resolve(name))["Parameters"] if p.type]


@pytest.mark.parametrize("name", CALLS)
def test_signature_is_annotated_with_few_positionals(name: str) -> None:
    parameters = inspect.signature(_resolve(name)).parameters.values()
    assert all(p.annotation is not p.empty for p in parameters)
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert len(positional) <= (3 if name == "report" else 2)  # what it is about, and where to


@pytest.mark.parametrize("name", PUBLIC)
def test_api_page_lists(name: str) -> None:
    pages = [page.read_text() for page in (ROOT / "docs" / "api").glob("*.md")]
    assert sum(bool(re.search(rf"^   {re.escape(name)}$", page, re.MULTILINE)) for page in pages) == 1


@pytest.mark.parametrize("name", CALLS)
def test_table_of_outputs_covers(name: str) -> None:
    assert f"`{name}`" in (ROOT / "docs" / "outputs.md").read_text()


def test_readme_has_the_two_commands() -> None:
    # .ci/run takes its test command from the last of these blocks, so the README cannot promise another
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    job, tests = (block.strip().split(" && ") for block in blocks)
    assert job[0] == tests[0] == "python3 -m venv .venv"
    assert job[-1] == ".venv/bin/python tutorials/quickstart.py"
    assert tests[-1] == ".venv/bin/python -m pytest -n 2 --dist loadfile"
    # `pip install --group` came with pip 25.1, and a fresh environment of Python 3.11 has an older one
    assert tests[1].endswith("pip install --upgrade pip")


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_every_import_is_declared() -> None:
    other_name = {"huggingface_hub": "huggingface-hub", "skimage": "scikit-image"}
    other_name |= {"sklearn": "scikit-learn", "PIL": "pillow"}
    # imported where they are asked for, with an error that says how to install them, or where their objects are given
    extras = {"openslide", "scvi", "transformers", "wsidata"}
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[\[<>=!~ ]", dependency)[0] for dependency in declared}
    used: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        used |= _imports(path)
    third_party = used - sys.stdlib_module_names - {"pekasc", "__future__"} - extras
    assert {other_name.get(name, name) for name in third_party} <= names


READERS = ["legacy", "sopa", "visium", "visium_hd", "xenium"]

# test files that are not named after one file of the package, with the reason
NOT_MIRRORED = {
    "test_package.py": "the package as a whole",
    "test_benchmarks.py": "a script beside the package",
    "test_docs.py": "docs",
    "test_tutorials.py": "scripts beside the package",
    "test_packaging.py": "recipes, workflows and metadata beside the package",
    "cli/test_clusters.py": "docs/clusters.md",
    "fuzz/test_adapter_folders.py": "damaged folders of adapters, from the record to a prediction",
    "fuzz/test_states.py": "damaged states of fits, as `fit` goes on from them",
    "fuzz/test_hest.py": "damaged samples of HEST-1k, from the files to the table",
    "fuzz/test_tables.py": "odd and damaged tables, through every call that reads one",
    "fuzz/test_tiff.py": "damaged files, from their bytes to the pixels: all of the room io that reads TIFF",
    **{f"readers/test_{name}.py": "objects of readers, to the tiles" for name in READERS},
    "models/adapter/test_formats.py": "adapters that earlier versions saved",
    "readers/test_object_store.py": "objects whose images are on an object store",
    "readers/test_pages.py": "docs/data",
    "readers/test_tools.py": "docs/lazyslide.md and docs/qupath_napari.md",
    "readers/test_slide.py": "a slide on disk, to clusters: io, pp, tl, get and scanpy",
    "tl/test_stain.py": "`Readout.stain` through every call that reads tiles",
    "tl/test_fit_engine.py": "what `Compute` changes in a whole fit: rooms of models from `fit_adapter` down",
}


def test_every_test_file_is_named_after_what_it_tests() -> None:
    source, tests = ROOT / "src" / "pekasc", ROOT / "tests"
    wrong = []
    for path in sorted(tests.rglob("test_*.py")):
        place, name = path.relative_to(tests), path.stem.removeprefix("test_")
        room = source / place.parent
        if name == "contract":
            # a suite over all rows of the room's registry
            found = (room / "_registry.py").is_file() or any("Registry(" in f.read_text() for f in room.glob("*.py"))
        else:
            found = (room / f"_{name}.py").is_file() or (room / f"{name}.py").is_file() or (room / f"_{name}").is_dir()
        if found == (str(place.as_posix()) in NOT_MIRRORED):
            wrong.append(str(place))
    assert not wrong


def _room(parts: list[str]) -> list[str]:
    """Return the room of a module: a folder of the package, or of `models`."""
    return parts[: 2 if parts[0] == "models" and len(parts) > 1 and not parts[1].startswith("_") else 1]


def _imported(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield line and dotted parts, below the package, of everything of our own that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name.split(".")[1:]) for name in names if name.startswith("pekasc."))


def test_rooms_import_one_anothers_faces_only() -> None:
    # a face is a room's `__init__`, or a single file beside the rooms; private files are for the room itself
    source = ROOT / "src" / "pekasc"
    wrong, n = [], 0
    for path in sorted(source.rglob("*.py")):
        own = list(path.relative_to(source).with_suffix("").parts)
        for line, parts in _imported(path):
            n += 1
            room = _room(parts)
            if room != _room(own) and any(part.startswith("_") for part in parts[len(room) :]):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {'.'.join(parts)}")
    assert n > 300 and not wrong


def test_package_data_is_installed() -> None:
    folder = Path(str(pekasc.__file__)).parent
    assert (folder / "py.typed").is_file()
    weights = sorted((folder / "models" / "encoders" / "weights").glob("*.safetensors"))
    assert weights
    assert (folder / "models" / "encoders" / "encoders.toml").is_file()
    assert sum(path.stat().st_size for path in weights) < 12 * 2**20


def test_namespaces_are_modules() -> None:
    for namespace in NAMESPACES:
        module = import_module(f"pekasc.{namespace}")
        assert isinstance(module, ModuleType)
        assert getattr(pekasc, namespace) is module
