"""Many slides, one result each: names, claims between processes, and what counts as finished.

A result is written under a temporary name and renamed when it is whole; the record of what it was made from is in it. A
slide is claimed with a lock of the kernel, which is free again when its process ends, however it ends.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from filelock import FileLock, Timeout

from pekasc._settings import get_logger
from pekasc.cli._output import Output, finish

logger = get_logger(__name__)

MADE = "made_by"  # key of the record in the attributes of a result
_HIDDEN = ".pekasc"  # names, locks, unfinished results and reasons of failures, in the output folder
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_LONGEST = 200  # bytes of a name, of which a file system takes 255


@dataclass(frozen=True)
class Job:
    """A slide or object, the name of its result, and where the result goes."""

    source: Path
    name: str
    target: Path


def read_list(sources: Sequence[Path] | None, list_file: Path | None) -> list[Path]:
    """Return the paths given as arguments and those of a file, one a line, each once.

    Raises
    ------
    typer.BadParameter
        If the file cannot be read, or there are no paths.
    """
    paths = list(sources or ())
    if list_file is not None:
        try:
            lines = [line.strip() for line in list_file.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise typer.BadParameter(f"{list_file} cannot be read: {error}", param_hint="--list") from None
        paths += [Path(line) for line in lines if line and not line.startswith("#")]
    if not paths:
        raise typer.BadParameter("Nothing is given: name slides or zarr folders, or a file with their paths (--list).")
    return list({path.resolve(): path for path in paths}.values())


def stem(path: Path) -> str:
    """Return the name of a file or zarr folder, without the ending of its format, as SpatialData can store it."""
    from pekasc._keys import element_name  # which needs anndata: seconds, where help is asked for

    return element_name(_plain_stem(path))


def _plain_stem(path: Path) -> str:
    from pekasc._keys import slide_stem

    return path.stem if path.suffix.lower() == ".zarr" else slide_stem(path.name)


def plan(sources: Iterable[Path], out: Path) -> list[Job]:
    """Give every source a name of its own in the output folder, the same in every later run and in other processes.

    That is the stem of the file; of several with one stem, with the folders above it, and if need be with a digest of
    the path. Names are told apart without case, as some file systems do.
    """
    sources = list(sources)
    hidden = out / _HIDDEN
    try:
        hidden.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise typer.BadParameter(
            f"{out} is no folder, but a file, or in one: give a folder.", param_hint="--out"
        ) from None
    record = hidden / "names.json"
    shared = Counter(stem(source).casefold() for source in sources)
    with FileLock(hidden / "names.lock"):
        names = _read_names(record)
        taken = {name.casefold() for name in names.values()}
        before = dict(names)
        for source in sources:
            path = str(source.resolve())
            if path not in names:
                candidates = _candidates(source, alone=shared[stem(source).casefold()] == 1)
                names[path] = next(name for name in candidates if name.casefold() not in taken)
                taken.add(names[path].casefold())
        if names != before:
            _write_json(record, names)
    found = [(source, names[str(source.resolve())]) for source in sources]
    return [Job(source, name, out / f"{name}.zarr") for source, name in found]


def _read_names(record: Path) -> dict[str, str]:
    try:
        found = json.loads(record.read_text()) if record.is_file() else {}
    except ValueError as error:
        found = error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(
            f"{record}, which says what the result of each slide is called, is damaged: delete it. The same list gets "
            "the same names again."
        )
    return found


def _candidates(source: Path, *, alone: bool) -> Iterator[str]:
    """Yield names for a result, the last of which no other source has."""
    from pekasc._keys import element_name

    path, name = source.resolve(), _plain_stem(source)
    names = [name] if alone else []
    for folder in path.parents:
        name = f"{folder.name}_{name}"
        names.append(name.lstrip("_"))
    yield from (element_name(name) for name in names if len(name.encode()) <= _LONGEST)
    yield f"slide-{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}"


def run(
    jobs: Sequence[Job],
    out: Path,
    work: Callable[[Job, Path, Mapping[str, Any]], Mapping[str, Any]],
    settings: Mapping[str, Any],
    output: Output,
) -> None:
    """Do all jobs that are not finished and that no other process is at, say how each went, and leave if some failed.

    Parameters
    ----------
    jobs
        From :func:`plan`.
    out
        The output folder.
    work
        Function that writes the result of a job to a path, with a record in the attributes of its root group, under
        ``["pekasc"][MADE]``; it returns what there is to say of it.
    settings
        What results depend on besides the source. A result with other settings is never taken for finished.
    output
        Where to write.

    Raises
    ------
    typer.Exit
        With its code, if a job failed.
    """
    hidden = out / _HIDDEN
    started = _now(hidden)
    failures: dict[str, str] = {}
    n_done, pending = 0, list(jobs)
    with _bar(len(jobs), output) as advance:
        while pending:
            held: list[Job] = []
            for job in pending:
                made = {"source": str(job.source.resolve()), **settings}
                record = _attempt(job, hidden, work, json.loads(json.dumps(made)), started, output)
                if record is None:
                    held.append(job)
                    continue
                record = {"source": str(job.source), "output": str(job.target), **record}
                if record["status"] == "failed":
                    failures[str(job.source)] = str(record["reason"])
                    del record["output"]
                n_done += record["status"] != "failed"
                advance()
                _say(output, record, n_done + len(failures), len(jobs))
            # of those that others were at, some may have been left by a process that died
            if len(held) == len(pending):
                break
            pending = held
        else:
            held = []
    for job in held:
        _say(output, {"source": str(job.source), "status": "held"}, n_done + len(failures), len(jobs))
    finish(output, failures, n_done + len(held))


def _say(output: Output, record: Mapping[str, Any], n: int, total: int) -> None:
    how = {
        "done": f"done in {record.get('seconds', 0):.1f} s",
        "finished": "finished before",
        "failed": f"failed: {record.get('reason')}",
        "held": "another process is at it",
    }[str(record["status"])]
    output.line(f"[{n}/{total}] {record['source']}: {how}")
    output.result(record, str(record.get("output", "")))


def _attempt(
    job: Job,
    hidden: Path,
    work: Callable[..., Mapping[str, Any]],
    made: Mapping[str, Any],
    started: int,
    output: Output,
) -> dict[str, Any] | None:
    """Do a job and return its record; None if another process is at it."""
    failed, part = hidden / f"{job.name}.failed.json", hidden / f"{job.name}.zarr"
    lock = FileLock(hidden / f"{job.name}.lock")  # the file stays: to delete it would race with other processes
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    except OSError as error:
        return {"status": "failed", "reason": _reason(error, job, output)}
    try:
        if job.target.exists():
            reason = _differs(job, made)
            return {"status": "finished"} if reason is None else {"status": "failed", "reason": reason}
        if failed.is_file() and failed.stat().st_mtime_ns > started:  # by another process of this run
            return {"status": "failed", "reason": json.loads(failed.read_text())["reason"]}
        failed.unlink(missing_ok=True)
        _delete(part)  # of a process that was killed
        clock = time.perf_counter()
        try:
            details = work(job, part, made)
            part.replace(job.target)
        except Exception as error:  # noqa: BLE001 (whatever stops a slide must not stop the others; all are named)
            reason = _reason(error, job, output)
            with suppress(OSError):  # where there is no room for the result, there may be none for its reason
                _delete(part)
                _write_json(failed, {"source": made["source"], "reason": reason})
            return {"status": "failed", "reason": reason}
        return {"status": "done", **details, "seconds": round(time.perf_counter() - clock, 2)}
    finally:
        lock.release()


def _reason(error: Exception, job: Job, output: Output) -> str:
    reason = output.reason(error)
    if isinstance(error, OSError) and error.errno in _NO_ROOM and "make room" not in reason:
        return f"{reason}. There is no room for {job.target}: make room and run the same command again."
    return reason


def _differs(job: Job, made: Mapping[str, Any]) -> str | None:
    """Return why what lies at the place of a result is not that result, or None if it is."""
    try:
        found = json.loads((job.target / "zarr.json").read_text())["attributes"]["pekasc"][MADE]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{job.target} is there and was not made by this command: delete it, or take another --out."
    if found == made:
        return None
    what = [name for name in sorted({*found, *made}) if found.get(name) != made.get(name)]
    was = ", ".join(f"{name} was {found.get(name)!r}, is {made.get(name)!r}" for name in what)
    return f"{job.target} was made with other settings ({was}): delete it, or take another --out."


def _now(hidden: Path) -> int:
    """Return the time in ns by the clock of the file system, which all processes share."""
    mark = hidden / "clock"
    mark.touch()
    return mark.stat().st_mtime_ns


def _delete(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _write_json(path: Path, value: Any) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(value, indent=1))
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror}") from error


@contextmanager
def _bar(total: int, output: Output) -> Iterator[Callable[[], Any]]:
    """Show a progress bar on a terminal, and yield what advances it."""
    if not output.bars or total == 1:
        yield lambda: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="slide") as bar:
        yield bar.update
