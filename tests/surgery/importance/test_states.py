"""States on disk come back as they were or not at all: damage, a full disk and a place that cannot be written are one clear line."""

import os
import resource
import shutil
import signal
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from downcycle import DowncycleError, open_checkpoint  # noqa: E402
from downcycle.surgery.importance.parts import Parts, State  # noqa: E402
from downcycle.surgery.importance.paths import WHOLE, run_paths  # noqa: E402
from downcycle.surgery.importance.states import States  # noqa: E402


def state(seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    hidden, more = (torch.randn(2, 5, 8, generator=random).to(dtype) for _ in range(2))
    return State((hidden, None, more), {"shared": {3: (more, hidden), "name": more}})


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_state_comes_back_bit_by_bit(tmp_path, dtype):
    States(tmp_path).put(2, {5, 1}, 3, state(dtype=dtype))
    found, known = States(tmp_path).get(2, {1, 5}, 3), state(dtype=dtype)
    assert found.returned[1] is None and found.hidden.dtype == dtype
    assert torch.equal(found.hidden, known.hidden) and torch.equal(found.returned[2], known.returned[2])
    assert found.shared.keys() == {"shared"} and torch.equal(found.shared["shared"][3][1], known.hidden)


def test_nothing_stands_before_the_first_layer(tmp_path):
    states = States(tmp_path)
    assert states.get(0, WHOLE, 0) is None and states.finished() == (0, None)
    states.pass_on(0, WHOLE, 0, 0)
    assert states.get(1, {0}, 0) is None


def test_paths_and_batches_are_told_apart(tmp_path):
    states = States(tmp_path)
    places = [(path, batch) for path in ((), (1,), (11,), (1, 1 + 10), (0, 1, 2), (0, 1, 2, 3)) for batch in (0, 1, 11)]
    for seed, (path, batch) in enumerate(places):
        states.put(12, path, batch, state(seed))
    for seed, (path, batch) in enumerate(places):
        assert torch.equal(states.get(12, path, batch).hidden, state(seed).hidden)


def test_many_dropped_layers_have_a_file_name(tmp_path):
    dropped = range(0, 126, 2)
    States(tmp_path).put(126, dropped, 0, state())
    assert torch.equal(States(tmp_path).get(126, dropped, 0).hidden, state().hidden)


def test_a_path_that_drops_a_layer_stands_where_it_stood(tmp_path):
    states = States(tmp_path)
    states.put(4, {1}, 0, state(7))
    states.pass_on(4, {1}, 0, 4)
    states.put(5, {1}, 0, state(8))
    assert torch.equal(states.get(5, {1, 4}, 0).hidden, state(7).hidden)
    assert torch.equal(states.get(5, {1}, 0).hidden, state(8).hidden)
    assert torch.equal(states.get(4, {1}, 0).hidden, state(7).hidden)
    states.pass_on(4, {1}, 0, 4)  # a second time, by a run that goes on
    assert torch.equal(states.get(5, {1, 4}, 0).hidden, state(7).hidden)


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def no_links(*given):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    test_a_path_that_drops_a_layer_stands_where_it_stood(tmp_path)


@pytest.mark.parametrize("keep", [False, True])
def test_what_is_left_of_a_finished_depth(tmp_path, keep):
    states = States(tmp_path)
    for depth in (1, 2):
        states.put(depth, WHOLE, 0, state())
        states.put(depth, {0}, 0, state())
        states.finish(depth, {"at": depth}, keep)
    assert states.finished() == (2, {"at": 2})
    assert [file for file in files(tmp_path) if "done" not in file] == (["1/whole.0.pt"] if keep else []) + ["2/0.0.pt", "2/whole.0.pt"]
    assert ("1/done" in files(tmp_path)) == keep and "2/done" in files(tmp_path)
    states.clear()
    assert not tmp_path.exists()


def test_a_depth_counts_when_it_is_whole(tmp_path):
    states = States(tmp_path)
    states.put(1, WHOLE, 0, state())
    states.finish(1, None)
    states.put(2, WHOLE, 0, state())
    (tmp_path / "2" / "done.partial").write_bytes(b"half of it")
    assert States(tmp_path).finished() == (1, None)
    for depth in range(2, 12):
        states.put(depth, WHOLE, 0, state())
        states.finish(depth, depth)
    assert States(tmp_path).finished() == (11, 11)


# Damage.


def flip(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


DAMAGE = {
    "a bit": flip,
    "cut off": lambda data: data[: len(data) * 3 // 4],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "of another": lambda data: b"PK\3\4" + data,
}


@pytest.mark.parametrize("file", ["1/whole.0.pt", "1/done"])
@pytest.mark.parametrize("damage", [*DAMAGE, "gone"])
def test_a_damaged_file_is_never_used(tmp_path, file, damage):
    folder = tmp_path / "states"
    states = States(folder)
    states.put(1, WHOLE, 0, state())
    states.finish(1, {"seen": 1})
    if damage == "gone":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(DAMAGE[damage]((folder / file).read_bytes()))
    if (damage, file) == ("gone", "1/done"):
        assert states.finished() == (0, None)
        return
    with pytest.raises(DowncycleError, match=f"{file}: what was left there is damaged or gone, and the rest is deleted now; run the same"):
        _ = states.finished(), states.get(1, WHOLE, 0)
    assert not folder.exists() and states.finished() == (0, None)


def test_any_flipped_bit_is_seen(tmp_path):
    States(tmp_path / "s").put(1, WHOLE, 0, state())
    file = tmp_path / "s" / "1" / "whole.0.pt"
    data = file.read_bytes()
    for place in range(0, len(data), 61):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        with pytest.raises(DowncycleError, match="damaged"):
            States(tmp_path / "s").get(1, WHOLE, 0)


def test_a_run_begins_anew_where_states_are_damaged(tiny, batches, tmp_path):
    checkpoint, paths = open_checkpoint(tiny()), [WHOLE, frozenset({1, 6})]
    known = run_paths(Parts(checkpoint), batches, paths, States(tmp_path / "sound"))

    class Killed(Exception):
        pass

    def kill(what, done, total):
        if done == 4:
            raise Killed

    states = States(tmp_path / "states")
    with pytest.raises(Killed):
        run_paths(Parts(checkpoint), batches, paths, states, progress=kill)
    file = next(file for file in (tmp_path / "states" / "4").iterdir() if file.name.startswith("1."))
    file.write_bytes(flip(file.read_bytes()))
    with pytest.raises(DowncycleError, match=f"{file}: what was left there is damaged"):
        run_paths(Parts(checkpoint), batches, paths, states)
    parts = Parts(checkpoint)
    assert run_paths(parts, batches, paths, states) == known
    assert parts.loads == checkpoint.num_layers


# No room.


def test_a_full_disk(tiny, batches, disk, tmp_path):
    """What stands there stays, so that the same run goes on when there is room."""
    checkpoint, paths = open_checkpoint(tiny()), [WHOLE, *(frozenset({layer}) for layer in range(8))]
    states = States(disk("size=200k") / "states")
    with pytest.raises(DowncycleError, match=r"disk/states: cannot hold the hidden states \(No space left on device; 0.0 GB free\); give"):
        run_paths(Parts(checkpoint), batches, paths, states)
    begin, _ = states.finished()
    assert begin > 0
    disk("size=8m")
    parts = Parts(checkpoint)
    assert run_paths(parts, batches, paths, states) == run_paths(Parts(checkpoint), batches, paths, States(tmp_path / "sound"))
    assert parts.loads == 8 - begin


def test_a_limit_on_the_size_of_files(tmp_path):
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(DowncycleError, match=r"cannot hold the hidden states \(File too large; ") as refusal:
            States(tmp_path / "states").put(1, WHOLE, 0, state())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(refusal.value)


def test_a_disk_that_is_full_of_names(tmp_path, monkeypatch):
    """Neither a link nor a copy can be made."""
    states = States(tmp_path / "states")
    states.put(1, WHOLE, 0, state())

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(DowncycleError, match=r"states: cannot hold the hidden states \(No space left on device"):
        states.pass_on(1, WHOLE, 0, 1)


def test_a_place_that_is_a_file(tmp_path):
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(
        DowncycleError, match=r"cache/states: cannot hold the hidden states \(Not a directory; .* or another place as DOWNCYCLE"
    ):
        States(Path(tmp_path / "cache" / "states")).put(1, WHOLE, 0, state())
