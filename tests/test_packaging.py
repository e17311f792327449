"""What lies beside the package and cannot be run everywhere: recipes, image, workflows, forms and metadata.

Hosted jobs build them (.github/workflows/hosted.yaml); here they are read, and compared with pyproject.toml.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "conda-recipe").is_dir(), reason="needs a checkout")
if (ROOT / "pyproject.toml").is_file():
    PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# conda-forge's names of what is called otherwise elsewhere; matplotlib-base is matplotlib without a window system
CONDA_NAMES = {"huggingface-hub": "huggingface_hub", "matplotlib": "matplotlib-base", "torch": "pytorch"}
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yaml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")


def _yaml(path: Path | str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def test_conda_recipe_has_the_dependencies_of_the_project() -> None:
    recipe = _yaml("conda-recipe/recipe.yaml")
    wanted = {}
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        wanted[CONDA_NAMES.get(requirement.name, requirement.name)] = str(requirement.specifier)
    python, *run = recipe["requirements"]["run"]
    assert python == "python >=${{ python_min }}"
    assert dict(line.split(" ") for line in run) == wanted
    (build,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert build.replace(">=", " >=") in recipe["requirements"]["host"]


def test_conda_recipe_has_the_metadata_of_the_project() -> None:
    recipe = _yaml("conda-recipe/recipe.yaml")
    assert recipe["context"]["version"] == PROJECT["version"] and recipe["package"]["name"] == PROJECT["name"]
    assert f">={recipe['context']['python_min']}" == PROJECT["requires-python"]
    assert recipe["build"]["python"]["entry_points"] == [f"{k} = {v}" for k, v in PROJECT["scripts"].items()]
    about = recipe["about"]
    assert (about["summary"], about["license"]) == (PROJECT["description"], PROJECT["license"])
    assert [about["license_file"]] == PROJECT["license-files"] and (ROOT / about["license_file"]).is_file()


def test_citation_file_is_of_this_version() -> None:
    # the whole schema is checked by cffconvert, in a hosted job
    citation = _yaml("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert set(citation) >= {"message", "title", "authors"}  # what the format requires
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert citation["title"].startswith(PROJECT["name"]) and citation["type"] == "software"
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    (paper,) = citation["references"]
    assert paper["url"] == PROJECT["urls"]["Method"] and paper["url"] in (ROOT / "README.md").read_text()
    assert {"type", "title", "authors"} <= set(paper) and all("family-names" in author for author in paper["authors"])


def _dockerfile() -> list[tuple[str, str]]:
    """Return instruction and argument of each step."""
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "Dockerfile").read_text()))
    steps = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    return [(name, value.strip()) for name, value in steps]


def _ignored(path: str) -> bool:
    """Whether .dockerignore leaves the path out: the last pattern that fits it, or a folder above it, decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            if any(fnmatch(part, pattern) for part in (path, path.split("/")[0], path.split("/")[-1])):
                ignored = not line.startswith("!")
    return ignored


def test_image_runs_the_command_line_as_nobody_in_particular() -> None:
    steps = _dockerfile()
    known = {"FROM", "LABEL", "COPY", "RUN", "ENV", "WORKDIR", "USER", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in steps} <= known and steps[0][0] == "FROM"
    last = dict(steps)
    (command,) = json.loads(last["ENTRYPOINT"])
    assert command in PROJECT["scripts"] and json.loads(last["CMD"]) == ["--help"]
    assert last["USER"] not in {"root", "0"}
    base = re.fullmatch(r"python:(3\.\d+)-slim", last["FROM"])
    assert base and f"Programming Language :: Python :: {base[1]}" in PROJECT["classifiers"]


def test_image_is_made_from_files_that_are_there() -> None:
    copied = [source for name, value in _dockerfile() if name == "COPY" for source in shlex.split(value)[:-1]]
    assert {"pyproject.toml", "README.md", "LICENSE", "src"} <= set(copied)  # what the build backend reads
    for source in copied:
        assert (ROOT / source).exists() and not _ignored(source), source
    for path in (".git", "tests", "benchmarks", "src/pekasc/__pycache__"):
        assert _ignored(path), path
    (install,) = (value for name, value in _dockerfile() if name == "RUN" and "pip install" in value)
    (extras,) = re.findall(r"\[([\w,]+)\]", install)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_actions_are_pinned_and_read_only(path: Path) -> None:
    uses = re.findall(r"uses: (\S+)(.*)", path.read_text())
    assert uses
    for action, comment in uses:
        # a tag can be moved to other code, a commit cannot; the comment is what dependabot reads and raises
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v\d+(\.\d+)*", comment), action
    workflow = _yaml(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 60
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


def test_hosted_jobs_name_what_is_there_and_local_runs_say_so() -> None:
    jobs = _yaml(".github/workflows/hosted.yaml")["jobs"]
    assert set(jobs) == {"links", "model-cards", "coverage", "conda", "container", "citation"}
    commands = " ".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    for name in ("conda-recipe", "docs", "tests/models/encoders/test_registry.py"):
        assert re.search(rf"(?<!\S){re.escape(name)}(?!\S)", commands) and (ROOT / name).exists()
    local = (ROOT / ".ci" / "run").read_text()
    assert "not run here: links, model cards, coverage, conda package, container image" in local
    roles = {entry["environment"] for entry in _yaml(WORKFLOWS[-1])["jobs"]["test"]["strategy"]["matrix"]["include"]}
    assert roles and all(f"run_{role}()" in local for role in roles)


def test_dependabot_reads_actions_image_and_project() -> None:
    config = _yaml(".github/dependabot.yml")
    assert config["version"] == 2
    kinds = {entry["package-ecosystem"]: entry for entry in config["updates"]}
    assert set(kinds) == {"github-actions", "docker", "pip"}
    for entry in kinds.values():
        assert entry["directory"] == "/" and entry["schedule"]["interval"] in {"daily", "weekly", "monthly"}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_form(path: Path) -> None:
    form = _yaml(path)
    assert form["name"] and form["description"] and form["labels"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    for field in form["body"]:
        assert field["type"] in {"markdown", "textarea", "input", "dropdown", "checkboxes"}
        assert field["attributes"]["label"]
        assert set(field) <= {"type", "id", "attributes", "validations"}
    assert any(field.get("validations", {}).get("required") for field in form["body"])


# what the registry's README lists (scverse/ecosystem-packages, read 2026-11)
CATEGORIES = """
    Data structures, scRNA-seq, bulk RNA-seq, Spatial, Epigenomics, Proteomics, Adaptive immune cell receptor,
    Multimodal, Imaging, Infrastructure
"""
TAGS = """
    scRNA-seq, bulk RNA-seq, spatial transcriptomics, spatial proteomics, proteomics, flow cytometry, ATAC-seq,
    epigenomics, immune receptor, imaging, multimodal, preprocessing, quality control, denoising, data integration,
    cell-type annotation, differential expression, compositional analysis, functional analysis, gene regulatory
    networks, cell-cell communication, deconvolution, clustering, dimensionality reduction, trajectory inference,
    pseudotime, RNA velocity, lineage tracing, perturbation, spatially variable genes, segmentation, copy number
    variation, visualization, benchmarking, deep learning, foundation model, large language models, probabilistic
    modeling, optimal transport, GPU acceleration, pipeline, data structures, interoperability, file formats,
    documentation
"""
OPEN = {"project_home": "Repository", "documentation_home": "Documentation", "contact": None}


def test_entry_for_the_ecosystem_registry() -> None:
    entry = _yaml("docs/ecosystem/meta.yaml")
    assert (entry["name"], entry["license"]) == (PROJECT["name"], PROJECT["license"])
    assert entry["install"] == {"pypi": PROJECT["name"]}
    assert entry["category"] == "ecosystem" and entry["language"] == "Python"
    assert entry["primary_category"] in re.split(r",\s+", CATEGORIES.strip())
    tags = entry["tags"]
    assert tags and len(set(tags)) == len(tags) and set(tags) <= set(re.split(r",\s+", TAGS.strip()))
    assert {name for name, value in entry.items() if value is None} <= set(OPEN)
    for name, url in OPEN.items():
        if entry[name] is None:
            assert url not in PROJECT["urls"], f"{name} is known by now"
        elif url is not None:
            assert entry[name] == PROJECT["urls"][url]
