"""A run killed at any instant leaves no target or a whole one; the same run again finishes, and writes no finished shard twice."""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from downcycle import DowncycleError, keep_layers, open_checkpoint, write
from downcycle.surgery.staging import MARK, staging_path

INSTANTS = 200
SHARD = 5000


@pytest.fixture(scope="module")
def tmp_path_in_memory(tmp_path_factory) -> Iterator[Path]:
    """What a killed process has written is there for the next, whatever the disk: no need to wait for one."""
    memory = Path("/dev/shm")
    if os.access(memory, os.W_OK):
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            yield Path(folder)
    else:
        yield tmp_path_factory.mktemp("kill")


@pytest.fixture
def place(tmp_path_in_memory, request) -> Path:
    folder = tmp_path_in_memory / request.node.name
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def cut(make, tmp_path_in_memory):
    folder = tmp_path_in_memory / "m"
    make(folder, layers=6, hidden=32, shards=2)
    return keep_layers(open_checkpoint(folder), [0, 2, 5])


@pytest.fixture(scope="module")
def whole(cut, tmp_path_in_memory):
    """What every finished run must leave."""
    folder = write(cut, tmp_path_in_memory / "whole", max_shard_size=SHARD)
    assert len(list(folder.glob("*.safetensors"))) > 10
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
        case = "nothing" if not staging.exists() else "marked" if (staging / MARK).exists() else "unmarked"
        done = finished(staging) if case == "marked" else {}
        case += " with finished shards" if done else ""
        work()
        assert contents(target) == whole
        assert done.items() <= finished(target).items()
    assert list(target.parent.iterdir()) == [target]
    shutil.rmtree(target)
    return case


def test_killed_at_two_hundred_instants(cut, whole, place):
    target = place / "c"

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


def test_killed_at_instants_of_an_overwrite(cut, whole, make, place):
    """The old model is there until the new one is; between two renames it stands aside, whole."""
    target, aside = place / "c", place / ".c.replaced"
    make(place / "old")
    old = contents(place / "old")

    def work():
        write(cut, target, max_shard_size=SHARD, overwrite=True)

    shutil.copytree(place / "old", target)
    longest = duration(work)
    rng = random.Random(12)
    seen = set()
    for _ in range(INSTANTS // 4):
        shutil.rmtree(target)
        shutil.copytree(place / "old", target)
        killed_after(rng.uniform(0, longest * 1.1), work)
        left = contents(target if target.exists() else aside)
        assert left in (old, whole)
        seen.add(left == whole)
        work()
        assert contents(target) == whole
        assert set(place.iterdir()) == {target, place / "old"}
    assert False in seen


def killing_itself_at_line(number: int, work: Callable[[], object], functions: tuple[str, ...]) -> Callable[[], None]:
    """Wrap work so that SIGKILL comes before its nth line in the modules that write, in these functions or in all."""
    left = number

    def trace(frame, event, argument):
        nonlocal left
        if not frame.f_code.co_filename.endswith(("surgery/write.py", "surgery/staging.py")) or (
            functions and frame.f_code.co_name not in functions
        ):
            return None
        left -= event == "line"
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def traced():
        sys.settrace(trace)
        work()

    return traced


@pytest.mark.parametrize(("overwrite", "functions"), [(False, ()), (True, ("_claim", "publish"))], ids=["new", "overwrite"])
def test_killed_before_every_line(cut, make, place, overwrite, functions):
    """A clock may miss the instant that matters; here every line of the modules that write is one."""
    target, aside = place / "c", place / ".c.replaced"
    whole = contents(write(cut, place / "whole"))
    make(place / "old")
    old = contents(place / "old")

    def work():
        write(cut, target, overwrite=overwrite)

    line, alive, cases = 0, True, set()
    while alive:
        line += 1
        if overwrite:
            shutil.copytree(place / "old", target)
        _, status = os.waitpid(run(killing_itself_at_line(line, work, functions)), 0)
        alive = os.WIFSIGNALED(status)
        left = contents(target) if target.exists() else contents(aside) if overwrite else None
        assert left in ((old, whole) if overwrite else (None, whole)), line
        cases.add((target.exists(), left == whole))
        if left != whole:
            work()
        assert contents(target) == whole, line
        assert set(place.iterdir()) - {aside} == {target, place / "old", place / "whole"}, line
        shutil.rmtree(target)
        shutil.rmtree(aside, ignore_errors=True)
    assert line > (10 if functions else 100)
    assert cases == ({(True, False), (False, False), (True, True)} if overwrite else {(False, False), (True, True)})


def test_of_four_runs_at_once_one_succeeds(cut, whole, place):
    target = place / "c"

    def work():
        try:
            write(cut, target, max_shard_size=SHARD)
        except DowncycleError as refusal:
            os._exit(3 if "another run is writing it" in str(refusal) or "exists already" in str(refusal) else 4)

    for _ in range(25):
        ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in [run(work) for _ in range(4)]]
        assert sorted(ends) == [0, 3, 3, 3]
        assert contents(target) == whole
        assert list(place.iterdir()) == [target]
        shutil.rmtree(target)
