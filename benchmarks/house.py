"""How large the house is: parameters of every public call, and lines, files and long functions of every room.

    python benchmarks/house.py
    python benchmarks/house.py --before ANOTHER_CHECKOUT/src/pekasc

Source is parsed, never imported, so that another checkout, or one whose dependencies are missing, can be measured too.
A room is a folder of `src/pekasc`, or of `models` in it. Lines are those of `.py` files, blank ones, comments and
docstrings included. A long function has more than 60 lines without its docstring.
"""

from __future__ import annotations

import argparse
import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SRC = Path(__file__).parents[1] / "src/pekasc"
NAMESPACES = ("pp", "tl", "pl", "get", "io", "datasets")
LONG = 60
Function = ast.FunctionDef | ast.AsyncFunctionDef


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def n_parameters(function: Function) -> int:
    """Return how many parameters a call takes, ``self`` and ``cls`` not counted."""
    a = function.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return sum(argument.arg not in ("self", "cls") for argument in every)


def public_functions(module: ast.Module) -> Iterator[Function]:
    for node in module.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node


def of_namespace(src: Path, name: str) -> dict[str, int]:
    """Return the parameters of every public function of a namespace, a module or a package that imports them."""
    if (src / f"{name}.py").exists():
        module = parsed(src / f"{name}.py")
        return {f"{name}.{function.name}": n_parameters(function) for function in public_functions(module)}
    found: dict[str, int] = {}
    for node in ast.walk(parsed(src / name / "__init__.py")):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("pekasc."):
            continue
        file = src.joinpath(*str(node.module).split(".")[1:]).with_suffix(".py")
        wanted = {alias.name for alias in node.names}
        found |= {
            f"{name}.{function.name}": n_parameters(function)
            for function in (public_functions(parsed(file)) if file.exists() else ())
            if function.name in wanted
        }
    return dict(sorted(found.items()))


def of_adapter(src: Path) -> dict[str, int]:
    """Return the parameters of the public methods of `Adapter`, properties left out."""
    for file in sorted(src.joinpath("models").rglob("*.py")):
        for node in parsed(file).body:
            if isinstance(node, ast.ClassDef) and node.name == "Adapter":
                return {
                    f"Adapter.{method.name}": n_parameters(method)
                    for method in node.body
                    if isinstance(method, Function) and not method.name.startswith("_") and not is_property(method)
                }
    return {}


def is_property(method: Function) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in method.decorator_list)


def calls(src: Path) -> dict[str, int]:
    """Return the number of parameters of every public call."""
    found: dict[str, int] = {}
    for name in NAMESPACES:
        found |= of_namespace(src, name)
    return found | of_adapter(src)


def n_lines(function: Function) -> int:
    """Return the lines of a function without its docstring."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        text = function.body[0]
        lines -= (text.end_lineno or 0) - text.lineno + 1
    return lines


def room_of(file: Path, src: Path) -> str:
    folders = file.relative_to(src).parent.parts
    return "/".join(folders[: 2 if folders[:1] == ("models",) else 1]) or "top level"


def rooms(src: Path) -> dict[str, Counter[str]]:
    """Return lines, files and long functions of every room, and in all."""
    found: dict[str, Counter[str]] = {}
    for file in sorted(src.rglob("*.py")):
        long = sum(isinstance(n, Function) and n_lines(n) > LONG for n in ast.walk(parsed(file)))
        of = Counter(lines=len(file.read_text(encoding="utf-8").splitlines()), files=1, long=long)
        for room in (room_of(file, src), "in all"):
            found.setdefault(room, Counter()).update(of)
    return {room: found[room] for room in [*sorted(set(found) - {"in all"}), "in all"]}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)) + "\n"


def calls_table(sources: dict[str, Path]) -> str:
    """Return one row for every public call."""
    of = [calls(src) for src in sources.values()]
    spaces = (*NAMESPACES, "Adapter")
    names = dict.fromkeys(name for space in spaces for found in of for name in found if name.startswith(f"{space}."))
    rows = [[f"`{name}`", *(str(found.get(name, "")) for found in of)] for name in names]
    return markdown(["parameters", *sources], rows)


def rooms_table(sources: dict[str, Path]) -> str:
    """Return one row for every room."""
    of = [rooms(src) for src in sources.values()]
    names = sorted({room for found in of for room in found} - {"in all"})
    kinds = {"lines": "lines", "files": "files", "long": f"functions over {LONG} lines"}
    rows = [
        [name if name in ("top level", "in all") else f"`{name}`"]
        + [str(found[name][kind]) if name in found else "" for kind in kinds for found in of]
        for name in [*names, "in all"]
    ]
    labels = [f"{title}, {label}" if len(of) > 1 else title for title in kinds.values() for label in sources]
    return markdown(["room", *labels], rows)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", type=Path, default=SRC, help="folder of the package; that of this checkout by default")
    parser.add_argument("--before", type=Path, help="the same of another checkout, shown beside it")
    arguments = parser.parse_args()
    sources = {"now": arguments.src}
    if arguments.before is not None:
        sources = {"before": arguments.before, "after": arguments.src}
    print(calls_table(sources))
    print(rooms_table(sources))


if __name__ == "__main__":
    main()
