"""Build what a release uploads, and look into it: sdist, the wheel made from the sdist, and their metadata."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, cwd: Path = ROOT) -> str:
    return subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True).stdout


def build(kind: str, source: Path, out: Path) -> Path:
    run(sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(out), cwd=source)
    (built,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


def tracked(*folders: str) -> set[str]:
    return set(run("git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders).splitlines())


def differ(kind: str, found: set[str], wanted: set[str]) -> list[str]:
    return [f"{kind}: {name} is missing" for name in sorted(wanted - found)] + [
        f"{kind}: {name} does not belong there" for name in sorted(found - wanted)
    ]


def main(out: Path) -> int:
    sdist = build("sdist", ROOT, out)
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "unpacked", filter="data")
        names = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    (unpacked,) = (out / "unpacked").iterdir()
    wheel = build("wheel", unpacked, out)
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        entry_points = archive.read(next(name for name in inside if name.endswith("/entry_points.txt"))).decode()
    package = {name for name in inside if ".dist-info/" not in name}
    notes = inside - package

    wrong = differ("wheel", package, {name.removeprefix("src/") for name in tracked("src")})
    for name in ("py.typed", "models/encoders/encoders.toml", "models/encoders/weights/tiny.safetensors"):
        if f"pekasc/{name}" not in package:
            wrong.append(f"wheel: pekasc/{name} is missing")
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in notes):
        wrong.append("wheel: the licence is missing")
    if "pekasc = pekasc.cli:main" not in entry_points:
        wrong.append(f"wheel: no command `pekasc` in {entry_points!r}")
    wrong += differ("sdist", names - {"PKG-INFO"}, {name for name in tracked(".") if not name.endswith(".ipynb")})

    print("\n".join(wrong) or f"{sdist.name}: {len(names)} files, {wheel.name}: {len(inside)} files, as they should be")
    if wrong:
        return 1
    print(run(sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)).strip())
    return 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(main(Path(folder)))
