"""However the work is stopped, the same command goes on from there and the files are the same."""

import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fineweb import data_bytes, expect, read, refusal, store, workers_of

from downcycle import DowncycleError
from downcycle.recipes.dataset import source as parquet_source
from downcycle.recipes.dataset import work
from downcycle.recipes.dataset.make import Request, make_dataset
from downcycle.surgery.staging import staging_path


def test_killed_run_goes_on(tmp_path, made, request_):
    """Kill -9 in the middle: no target, no worker left; then finished tasks are not done again and the files are the same."""
    out, staging = tmp_path / "out", staging_path(tmp_path / "out")
    if not (run := os.fork()):
        make_dataset(out, request_, workers=1)
        os._exit(0)
    while len(work.finished(staging)) < 2:
        assert os.waitpid(run, os.WNOHANG) == (0, 0)
        time.sleep(0.01)
    children = workers_of(run)
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    assert children
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not out.exists()
    before = {path.name: path.stat().st_mtime_ns for path in (staging / "completions").iterdir()}
    after = dict(before)
    again = lambda *done: after.update({path.name: path.stat().st_mtime_ns for path in (staging / "completions").glob("*")})  # noqa: E731
    make_dataset(out, request_, workers=2, progress=again)
    assert {name: after[name] for name in before} == before
    assert data_bytes(out) == data_bytes(made)
    assert not staging.exists()


def test_killed_worker_is_reported_and_the_run_goes_on(tmp_path, made, request_):
    out = tmp_path / "out"

    def kill(done: int, tokens: int) -> None:
        if work.finished(staging_path(out)):
            for worker in workers_of(os.getpid()):
                os.kill(worker, signal.SIGKILL)

    said = refusal(out, request_, workers=1, progress=kill)
    assert re.search(r"a worker was killed \(SIGKILL\).*fewer --workers. What is done stays in .*goes on from there", said)
    make_dataset(out, request_, workers=1)
    assert data_bytes(out) == data_bytes(made)


def test_interrupt_leaves_no_process(tmp_path, request_):
    def interrupt(done: int, tokens: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_dataset(tmp_path / "out", request_, workers=2, progress=interrupt)
    assert not workers_of(os.getpid())
    assert staging_path(tmp_path / "out").is_dir()
    assert not (tmp_path / "out").exists()


def test_too_little_text_loses_nothing(tmp_path, source, rows, request_, made):
    """The error says how much there is; a call for less goes on from the work done and gives what it would give from nothing."""
    out = tmp_path / "out"
    said = refusal(out, replace(request_, tokens=10_000_000), workers=2)
    have = int(re.search(r"there are (\d+) training tokens in all .*ask for at most \1", said)[1])
    with pytest.raises(AssertionError):
        expect(rows, have + 1, 0.02)
    assert sum(row["n_tokens"] for row in expect(rows, have, 0.02)["train"]) == have
    started = time.time_ns()
    seen = set()
    look = lambda *done: seen.update(path.name for path in (staging_path(out) / "parts").glob("*") if path.stat().st_mtime_ns > started)  # noqa: E731
    make_dataset(out, request_, workers=2, progress=look)
    assert not seen
    assert data_bytes(out) == data_bytes(made)


def test_first_task_stops_early_and_is_done_again_for_more(tmp_path, rows, monkeypatch):
    """One row group of any size is not read to its end for a few tokens; what was cut short is not taken for the whole later."""
    monkeypatch.setattr(parquet_source, "PIECE_ROWS", 20_000)
    folder = store(tmp_path / "source", {"a.parquet": rows}, rows=10_000)
    small, large = (Request(tokens, str(folder), tokenizer="demo") for tokens in (2000, 100_000))
    seen = []

    def stop(done: int, tokens: int) -> None:
        seen.append(done)
        if work.finished(staging_path(tmp_path / "out")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_dataset(tmp_path / "out", small, workers=1, progress=stop)
    assert 0 < max(seen) < 100
    make_dataset(tmp_path / "out", large, workers=1)
    assert read(tmp_path / "out") == expect(rows, 100_000, 0.001)


def test_other_arguments_do_not_reuse_the_work(tmp_path, request_, rows):
    out = tmp_path / "out"

    def stop(done: int, tokens: int) -> None:
        if work.finished(staging_path(out)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_dataset(out, request_, workers=1, progress=stop)
    make_dataset(out, replace(request_, tokens=5000, language="fr"), workers=1)
    assert read(out) == expect([row for row in rows if row["language"] == "fr"], 5000, request_.held_out)


def test_overwrite(tmp_path, request_, made):
    out = tmp_path / "out"
    shutil.copytree(made, out)
    with pytest.raises(DowncycleError, match="exists already.*--overwrite"):
        make_dataset(out, request_)
    make_dataset(out, replace(request_, tokens=500), workers=1, overwrite=True)
    assert sum(row["n_tokens"] for row in read(out)["train"]) < 5000
    (out / "downcycle-data.json").unlink()
    with pytest.raises(DowncycleError, match="holds no dataset"):
        make_dataset(out, request_, overwrite=True)


def test_two_runs_into_one_target(tmp_path, request_):
    said = []

    def second(done: int, tokens: int) -> None:
        if not said:
            said.append(refusal(tmp_path / "out", request_))

    make_dataset(tmp_path / "out", replace(request_, tokens=500), workers=1, progress=second)
    assert "another run is writing it" in said[0]


def test_full_disk(disk, request_, made):
    out = disk("size=200k") / "out"
    assert "the disk is full; free some space" in refusal(out, request_, workers=1)
    disk("size=20m")
    make_dataset(out, request_, workers=1)
    assert data_bytes(out) == data_bytes(made)
