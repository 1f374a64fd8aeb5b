"""A run killed at any instant leaves no target or a whole one; the same run again finishes, and writes no finished shard twice."""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from downcycle import keep_layers, open_checkpoint, write
from downcycle.surgery.write import PLAN, staging_path

INSTANTS = 200
SHARD = 12_000


@pytest.fixture(scope="module")
def cut(make, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parent") / "m"
    make(folder, layers=6, hidden=32, shards=2)
    return keep_layers(open_checkpoint(folder), [0, 2, 5])


@pytest.fixture(scope="module")
def whole(cut, tmp_path_factory):
    """What every finished run must leave."""
    folder = write(cut, tmp_path_factory.mktemp("whole") / "c", max_shard_size=SHARD)
    assert len(list(folder.glob("*.safetensors"))) == 7
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(work: Callable[[], object]) -> int:
    """Start work in a process of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def killed_after(seconds: float, work: Callable[[], object]) -> bool:
    """Kill a run at this instant; say whether it was still running."""
    pid = run(work)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def duration(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    os.waitpid(run(work), 0)
    return time.perf_counter() - start


def finished(staging: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in staging.glob("*.safetensors")}


def check_new_target(target: Path, whole: dict[str, bytes], work: Callable[[], object]) -> str:
    """Check what a killed run left, finish it and clear up; say which of the cases it was."""
    staging = staging_path(target)
    assert set(target.parent.iterdir()) <= {target, staging}
    if target.exists():
        assert contents(target) == whole
        case = "whole"
    else:
        case = "nothing" if not staging.exists() else "marked" if (staging / PLAN).exists() else "unmarked"
        done = finished(staging) if case == "marked" else {}
        case += " with finished shards" if done else ""
        work()
        assert contents(target) == whole
        assert done.items() <= finished(target).items()
    assert list(target.parent.iterdir()) == [target]
    shutil.rmtree(target)
    return case


def test_killed_at_two_hundred_instants(cut, whole, tmp_path):
    target = tmp_path / "c"

    def work():
        write(cut, target, max_shard_size=SHARD)

    longest = duration(work)
    shutil.rmtree(target)
    rng = random.Random(11)
    cases = []
    for _ in range(INSTANTS):
        killed_after(rng.uniform(0, longest * 1.1), work)
        cases.append(check_new_target(target, whole, work))
    assert {"nothing", "marked with finished shards"} <= set(cases), cases


def test_killed_at_instants_of_an_overwrite(cut, whole, make, tmp_path):
    """The old model is there until the new one is; between two renames it stands aside, whole."""
    target, aside = tmp_path / "c", tmp_path / ".c.replaced"
    make(tmp_path / "old")
    old = contents(tmp_path / "old")

    def work():
        write(cut, target, max_shard_size=SHARD, overwrite=True)

    shutil.copytree(tmp_path / "old", target)
    longest = duration(work)
    rng = random.Random(12)
    seen = set()
    for _ in range(INSTANTS // 4):
        shutil.rmtree(target)
        shutil.copytree(tmp_path / "old", target)
        killed_after(rng.uniform(0, longest * 1.1), work)
        left = contents(target if target.exists() else aside)
        assert left in (old, whole)
        seen.add(left == whole)
        work()
        assert contents(target) == whole
        assert set(tmp_path.iterdir()) == {target, tmp_path / "old"}
    assert False in seen


def killing_itself_at_line(number: int, work: Callable[[], object], functions: tuple[str, ...]) -> Callable[[], None]:
    """Wrap work so that SIGKILL comes before its nth line in the module that writes, in these functions or in all."""
    left = number

    def trace(frame, event, argument):
        nonlocal left
        if not frame.f_code.co_filename.endswith("surgery/write.py") or (functions and frame.f_code.co_name not in functions):
            return None
        left -= event == "line"
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def traced():
        sys.settrace(trace)
        work()

    return traced


@pytest.mark.parametrize(("overwrite", "functions"), [(False, ()), (True, ("_claim", "_publish"))], ids=["new", "overwrite"])
def test_killed_before_every_line(cut, make, tmp_path, overwrite, functions):
    """A clock may miss the instant that matters; here every line of the module that writes is one."""
    target, aside = tmp_path / "c", tmp_path / ".c.replaced"
    whole = contents(write(cut, tmp_path / "whole"))
    make(tmp_path / "old")
    old = contents(tmp_path / "old")

    def work():
        write(cut, target, overwrite=overwrite)

    line, alive, cases = 0, True, set()
    while alive:
        line += 1
        if overwrite:
            shutil.copytree(tmp_path / "old", target)
        _, status = os.waitpid(run(killing_itself_at_line(line, work, functions)), 0)
        alive = os.WIFSIGNALED(status)
        left = contents(target) if target.exists() else contents(aside) if overwrite else None
        assert left in ((old, whole) if overwrite else (None, whole)), line
        cases.add((target.exists(), left == whole))
        if left != whole:
            work()
        assert contents(target) == whole, line
        assert set(tmp_path.iterdir()) - {aside} == {target, tmp_path / "old", tmp_path / "whole"}, line
        shutil.rmtree(target)
        shutil.rmtree(aside, ignore_errors=True)
    assert line > (10 if functions else 100)
    assert cases == ({(True, False), (False, False), (True, True)} if overwrite else {(False, False), (True, True)})
