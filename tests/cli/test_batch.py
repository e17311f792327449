"""Many slides: names, claims between processes, and what counts as finished."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import typer

from pekasc._keys import element_name
from pekasc.cli import _batch
from pekasc.cli._output import Output


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.1.svs", "a.1"),
        ("a.2.SVS", "a.2"),
        ("x.ome.tiff", "x"),
        ("TCGA-AA 01Z.tif", element_name("TCGA-AA 01Z")),
        ("section.zarr", "section"),
        ("scan.unknown", "scan.unknown"),
    ],
)
def test_stem(name: str, expected: str) -> None:
    assert _batch.stem(Path("folder") / name) == expected


def _names(sources: list[Path], out: Path) -> list[str]:
    return [job.name for job in _batch.plan(sources, out)]


def test_two_files_never_get_one_name(tmp_path: Path) -> None:
    sources = [tmp_path / name for name in ("a.1.svs", "a.2.svs", "A/x.svs", "B/x.tif", "C/A/x.svs", "X.tif", "ä.svs")]
    sources += [tmp_path / "ö.svs", tmp_path / f"{'long' * 60}.svs"]
    names = _names(sources, tmp_path / "out")
    assert names[:6] == ["a.1", "a.2", "A_x", "B_x", "C_A_x", f"{tmp_path.name}_X"]
    assert len({name.casefold() for name in names}) == len(sources)


def test_names_stay_in_other_lists(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, second = tmp_path / "A" / "x.svs", tmp_path / "B" / "x.svs"
    assert _names([first], out) == ["x"]
    assert _names([second], out) == ["B_x"]
    assert _names([second, tmp_path / "C" / "x.svs", first], out) == ["B_x", "C_x", "x"]


def test_list_file(tmp_path: Path) -> None:
    path = tmp_path / "slides.txt"
    path.write_text(f"# two\n{tmp_path / 'a.svs'}\n\n  {tmp_path / 'b.svs'}\n{tmp_path / 'a.svs'}\n")
    assert _batch.read_list([tmp_path / "b.svs"], path) == [tmp_path / "b.svs", tmp_path / "a.svs"]
    path.write_text(f"{tmp_path / 'a.svs'}\r\n", encoding="utf-8-sig")  # as Windows writes it
    assert _batch.read_list(None, path) == [tmp_path / "a.svs"]
    with pytest.raises(typer.BadParameter, match="cannot be read"):
        _batch.read_list(None, tmp_path / "nothing.txt")
    with pytest.raises(typer.BadParameter, match="Nothing is given"):
        _batch.read_list([], None)


def _write(part: Path, made: Mapping[str, Any]) -> None:
    part.mkdir()
    (part / "zarr.json").write_text(json.dumps({"attributes": {"pekasc": {_batch.MADE: made}}}))


def _run(sources: list[Path], out: Path, work: Any, **settings: Any) -> int:
    try:
        _batch.run(_batch.plan(sources, out), out, work, settings, Output(as_json=True, debug=False))
    except typer.Exit as end:
        return end.exit_code
    return 0


def test_failures_are_named_at_the_end_and_the_rest_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources, out, tried = [tmp_path / f"{name}.svs" for name in "abc"], tmp_path / "out", []

    def work(job: _batch.Job, part: Path, made: Mapping[str, Any]) -> dict[str, Any]:
        tried.append(job.name)
        part.mkdir()
        if job.name == "b" and len(tried) < 4:
            raise OSError("half of it\nis missing")
        part.rmdir()
        _write(part, made)
        return {"n_tiles": 3}

    assert _run(sources, out, work) == 1
    captured = capsys.readouterr()
    results = [json.loads(line) for line in captured.out.splitlines()]
    assert [r["status"] for r in results] == ["done", "failed", "done"]
    assert results[0] == {
        "source": str(sources[0]), "output": str(out / "a.zarr"), "status": "done", "n_tiles": 3,
        "seconds": results[0]["seconds"],
    }  # fmt: skip
    assert results[1]["reason"] == "half of it is missing" and "output" not in results[1]
    assert captured.err.splitlines()[-2:] == [
        "1 of 3 failed:", f"pekasc: error: {sources[1]}: half of it is missing",
    ]  # fmt: skip
    assert sorted(p.name for p in out.iterdir()) == [".pekasc", "a.zarr", "c.zarr"]
    # the next run does what failed, and nothing else
    assert _run(sources, out, work) == 0
    assert tried == ["a", "b", "c", "b"]
    assert [json.loads(line)["status"] for line in capsys.readouterr().out.splitlines()] == [
        "finished", "done", "finished",
    ]  # fmt: skip
    assert not list((out / ".pekasc").glob("*.failed.json"))


def test_no_room_even_for_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, out = [tmp_path / f"{name}.svs" for name in "abc"], tmp_path / "out"

    def full(path: Path, value: Any) -> None:
        if path.name != "names.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, value)

    def work(job: _batch.Job, part: Path, made: Mapping[str, Any]) -> dict[str, Any]:
        if job.name == "b":
            raise OSError(errno.ENOSPC, "No space left on device")
        _write(part, made)
        return {}

    write = _batch._write_json
    monkeypatch.setattr(_batch, "_write_json", full)
    assert _run(sources, out, work) == 1
    captured = capsys.readouterr()
    assert [json.loads(line)["status"] for line in captured.out.splitlines()] == ["done", "failed", "done"]
    assert f"There is no room for {out / 'b.zarr'}: make room and run the same command again." in captured.err


def test_a_lock_that_cannot_be_made_fails_one_slide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def work(job: _batch.Job, part: Path, made: Mapping[str, Any]) -> dict[str, Any]:
        _write(part, made)
        return {}

    out = tmp_path / "out"
    (out / ".pekasc" / "a.lock").mkdir(parents=True)
    assert _run([tmp_path / "a.svs", tmp_path / "b.svs"], out, work) == 1
    assert [json.loads(line)["status"] for line in capsys.readouterr().out.splitlines()] == ["failed", "done"]


@pytest.mark.parametrize("text", ['{"a', "[]", '{"a": 3}'])
def test_damaged_names(tmp_path: Path, text: str) -> None:
    (tmp_path / ".pekasc").mkdir()
    (tmp_path / ".pekasc" / "names.json").write_text(text)
    with pytest.raises(ValueError, match=r"names\.json, which says .* is damaged: delete it"):
        _batch.plan([tmp_path / "a.svs"], tmp_path)


def test_nothing_done(tmp_path: Path) -> None:
    def work(job: _batch.Job, part: Path, made: Mapping[str, Any]) -> dict[str, Any]:
        raise ValueError("no")

    assert _run([tmp_path / "a.svs"], tmp_path / "out", work) == 3


def test_result_of_other_settings_is_not_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def work(job: _batch.Job, part: Path, made: Mapping[str, Any]) -> dict[str, Any]:
        _write(part, made)
        return {}

    source, out = tmp_path / "a.svs", tmp_path / "out"
    assert _run([source], out, work, adapter="first") == 0
    assert _run([source], out, work, adapter="first") == 0
    assert _run([source], out, work, adapter="second") == 3
    assert "adapter was 'first', is 'second'" in capsys.readouterr().err
    (out / "a.zarr" / "zarr.json").write_text("{}")  # somebody else's
    assert _run([source], out, work, adapter="first") == 3
    assert "was not made by this command" in capsys.readouterr().err


def test_unfinished_result_does_not_count(tmp_path: Path) -> None:
    def work(job: _batch.Job, part: Path, made: Mapping[str, Any]) -> dict[str, Any]:
        assert not part.exists()
        _write(part, made)
        return {}

    source, out = tmp_path / "a.svs", tmp_path / "out"
    (job,) = _batch.plan([source], out)
    _write(out / ".pekasc" / "a.zarr", {"source": "killed while writing"})
    assert _run([source], out, work) == 0
    assert json.loads((job.target / "zarr.json").read_text())["attributes"]["pekasc"][_batch.MADE] == {
        "source": str(source)
    }


# a worker of a list: says when it begins and ends a slide; with a name as fourth argument it never ends that one
_WORKER = """
import json, sys, time
from pathlib import Path
from pekasc.cli import _batch
from pekasc.cli._output import Output

me, log, out, stuck, *sources = sys.argv[1:]

def say(text):
    with open(log, "a") as file:
        file.write(f"{me} {text}\\n")

def work(job, part, made):
    say(f"begins {job.name}")
    part.mkdir()
    time.sleep(600 if job.name == stuck else 0.02)
    (part / "zarr.json").write_text(json.dumps({"attributes": {"pekasc": {_batch.MADE: made}}}))
    say(f"ends {job.name}")
    return {}

_batch.run(_batch.plan(map(Path, sources), Path(out)), Path(out), work, {}, Output(as_json=True, debug=False))
"""


def test_two_processes_share_a_list_and_one_is_killed(tmp_path: Path) -> None:
    sources, out, log = [str(tmp_path / f"{name}.svs") for name in "abcdefgh"], tmp_path / "out", tmp_path / "log"

    def start(me: str, stuck: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _WORKER, me, str(log), str(out), stuck, *sources]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def lines() -> list[str]:
        return log.read_text().splitlines() if log.is_file() else []

    first = start("first", "c")
    deadline = time.monotonic() + 60
    while "first begins c" not in lines():
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.02)
    # the other one leaves the slide alone as long as the first is at it
    second = start("second", "")
    written, _ = second.communicate(timeout=60)
    assert second.returncode == 0
    statuses = Counter(json.loads(line)["status"] for line in written.splitlines())
    assert statuses == {"finished": 2, "done": 5, "held": 1}
    assert not (out / "c.zarr").exists()
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    assert first.returncode == -signal.SIGKILL
    third = start("third", "")
    third.communicate(timeout=60)
    assert third.returncode == 0
    ended = [line.split()[2] for line in lines() if " ends " in line]
    assert sorted(ended) == list("abcdefgh")  # each once
    assert sorted(p.name for p in out.glob("*.zarr")) == [f"{name}.zarr" for name in "abcdefgh"]
    assert [line for line in lines() if line.endswith(" c")] == ["first begins c", "third begins c", "third ends c"]


def test_slide_that_failed_in_another_process_of_the_run_is_not_tried_again(tmp_path: Path) -> None:
    sources, out = [tmp_path / "a.svs", tmp_path / "b.svs"], tmp_path / "out"
    tried: list[str] = []

    def work(job: _batch.Job, part: Path, made: Mapping[str, Any]) -> dict[str, Any]:
        tried.append(job.name)
        if job.name == "a":  # meanwhile, elsewhere
            (out / ".pekasc" / "b.failed.json").write_text(json.dumps({"reason": "no tissue"}))
        _write(part, made)
        return {}

    assert _run(sources, out, work) == 1
    assert tried == ["a"]
    assert _run(sources, out, work) == 0
    assert tried == ["a", "b"]
