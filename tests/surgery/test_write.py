"""What is written is whole, exact and readable by others; what cannot be written leaves no trace but a staging folder that is named."""

import errno
import fcntl
import json
import os
import resource
import shutil
from collections import namedtuple
from dataclasses import replace
from math import prod

import pytest
from safetensors import deserialize

from downcycle import Checkpoint, DowncycleError, Tensor, keep_layers, open_checkpoint, plan_write, write
from downcycle.surgery.checkpoint import Span
from downcycle.surgery.sources import LocalFolder
from downcycle.surgery.staging import staging_path

from conftest import Stored

SMALL = ["chat_template.jinja", "config.json", "downcycle.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
INDEX = "model.safetensors.index.json"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def cut(make, tmp_path):
    """A value: three of five layers of a parent in two shards."""
    make(tmp_path / "m", layers=5, shards=2)
    return keep_layers(open_checkpoint(tmp_path / "m"), [0, 2, 4])


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def shards_of(count):
    return [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def state(folder):
    """Which files these are: finished ones are not written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.safetensors")}


def fail_after(count, error):
    """A progress function that fails once so many bytes are done."""
    done = 0

    def progress(step):
        nonlocal done
        done += step
        if done > count:
            raise error

    return progress


def test_one_file_or_several_of_at_most_the_size(make, cut_by_hand, read_back, tmp_path):
    tensors = make(tmp_path / "m", layers=6, shards=3)
    child = keep_layers(open_checkpoint(tmp_path / "m"), [0, 1, 5])
    expected = cut_by_hand(tensors, [0, 1, 5])
    write(child, tmp_path / "one")
    assert names(tmp_path / "one") == sorted([*SMALL, "model.safetensors"])
    write(child, tmp_path / "several", max_shard_size=200)
    files = shards_of(len(list((tmp_path / "several").glob("*.safetensors"))))
    assert names(tmp_path / "several") == sorted([*SMALL, INDEX, *files])
    assert len(files) > 3
    for file in files:
        assert sum(len(tensor["data"]) for _, tensor in deserialize((tmp_path / "several" / file).read_bytes())) <= 200
    assert read_back(tmp_path / "one") == read_back(tmp_path / "several") == expected
    index = json.loads((tmp_path / "several" / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(len(tensor.data) for tensor in expected.values())}


def test_small_files_are_copied_and_the_staging_folder_is_gone(cut, tmp_path):
    before = set(tmp_path.iterdir())
    assert write(cut, str(tmp_path / "c")) == tmp_path / "c"
    assert set(tmp_path.iterdir()) == before | {tmp_path / "c"}
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()
    assert json.loads((tmp_path / "c" / "config.json").read_text()) == cut.config


def test_the_same_value_gives_the_same_bytes(cut, tmp_path):
    contents = []
    for name in "ab":
        write(cut, tmp_path / name, max_shard_size=150)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]


def test_a_tensor_larger_than_a_shard_has_its_own(make, stored, cut_by_hand, read_back, tmp_path):
    tensors = make(tmp_path / "m", extra={"huge": stored("BF16", (1000,))})
    write(keep_layers(open_checkpoint(tmp_path / "m"), [1]), tmp_path / "c", max_shard_size=300)
    assert read_back(tmp_path / "c") == cut_by_hand(tensors, [1])
    (holder,) = {json.loads((tmp_path / "c" / INDEX).read_text())["weight_map"]["huge"]}
    assert [name for name, _ in deserialize((tmp_path / "c" / holder).read_bytes())] == ["huge"]


def test_every_tensor_lies_at_a_multiple_of_its_element_size(make, stored, cut_by_hand, read_back, tmp_path):
    """Odd counts of narrow elements before wide ones: a reader that maps the file needs the wide ones aligned."""
    odd = {f"odd{i}": stored(dtype, (3,), i) for i, dtype in enumerate(["U8", "F64", "I8", "F32", "BF16", "F8_E4M3", "F64", "F16"])}
    tensors = make(tmp_path / "m", hidden=3, vocab=5, shards=3, dtypes=("U8", "F32", "BF16", "F8_E4M3", "F64"), extra=odd)
    write(keep_layers(open_checkpoint(tmp_path / "m"), [0, 3]), tmp_path / "c")
    assert read_back(tmp_path / "c") == cut_by_hand(tensors, [0, 3])
    file = (tmp_path / "c" / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:start])
    assert start % 8 == 0
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            element = (end - begin) // prod(entry["shape"])
            assert (start + begin) % element == 0, name


def test_empty_and_half_byte_tensors(make, stored, cut_by_hand, read_back, tmp_path):
    extra = {
        "none": stored("F32", (0, 7)),
        "scalar": stored("I8", ()),
        "model.layers.1.packed": stored("F4", (3, 2)),
        "nought": stored("F64", (0,)),
    }
    extra |= {f"model.layers.{layer}.packed": stored("F4", (3, 2), layer) for layer in range(4)}
    tensors = make(tmp_path / "m", extra=extra)
    for size in (1, 10**9):
        write(keep_layers(open_checkpoint(tmp_path / "m"), [1, 1, 3]), tmp_path / f"c{size}", max_shard_size=size)
        assert read_back(tmp_path / f"c{size}") == cut_by_hand(tensors, [1, 1, 3])


def test_computed_tensors_are_written_and_checked(tmp_path, read_back):
    def value(chunks):
        return Checkpoint(
            "x", {"num_hidden_layers": 1}, {"a": Tensor("I8", (5,), lambda: chunks), "b": Tensor("F32", (1,), lambda: [b"wxyz"])}
        )

    write(value([b"ab", b"", b"cde"]), tmp_path / "c")
    assert {name: tensor.data for name, tensor in read_back(tmp_path / "c").items()} == {"a": b"abcde", "b": b"wxyz"}
    assert names(tmp_path / "c") == ["config.json", "model.safetensors"]
    for chunks in ([b"abcd"], [b"abcdef"]):
        with pytest.raises(ValueError, match="a computed tensor gave"):
            write(value(chunks), tmp_path / "bad")
        assert not (tmp_path / "bad").exists()


def test_metadata_comes_from_the_parent(make, pack_file, stored, tmp_path):
    make(tmp_path / "m")
    one = pack_file({"model.layers.0.x": stored("I8", (1,))}, {"format": "mlx", "é": '"'})
    (tmp_path / "m" / "model.safetensors").write_bytes(one)
    (tmp_path / "m" / "config.json").write_text('{"num_hidden_layers": 1}')
    write(open_checkpoint(tmp_path / "m"), tmp_path / "c")
    file = (tmp_path / "c" / "model.safetensors").read_bytes()
    assert json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])["__metadata__"] == {"format": "mlx", "é": '"'}


def test_a_shard_that_is_a_link_is_followed_and_never_written_through(make, cut_by_hand, read_back, tmp_path):
    tensors = make(tmp_path / "blobs", shards=2)
    for place in ("m", "c"):  # the target to be replaced holds links, too
        (tmp_path / place).mkdir()
        for path in (tmp_path / "blobs").iterdir():
            (tmp_path / place / path.name).symlink_to(path)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "blobs").iterdir()}
    write(keep_layers(open_checkpoint(tmp_path / "m"), [0, 2]), tmp_path / "c", overwrite=True)
    assert read_back(tmp_path / "c") == cut_by_hand(tensors, [0, 2])
    assert not any(path.is_symlink() for path in (tmp_path / "c").iterdir())
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "blobs").iterdir()} == before


def test_a_parent_is_never_changed(cut, tree, tmp_path):
    before = tree(tmp_path / "m")
    write(cut, tmp_path / "c")
    with open(tmp_path / "c" / "model.safetensors", "r+b") as file:
        file.write(b"x" * 1000)
    assert tree(tmp_path / "m") == before


def test_missing_parent_folders_are_made(cut, tmp_path):
    write(cut, tmp_path / "a" / "b" / "c")
    assert names(tmp_path / "a" / "b" / "c") == sorted([*SMALL, "model.safetensors"])


def test_an_empty_folder_is_taken(cut, tmp_path):
    (tmp_path / "c").mkdir()
    write(cut, tmp_path / "c")
    assert names(tmp_path / "c") == sorted([*SMALL, "model.safetensors"])


def test_overwrite_replaces_all_and_leaves_nothing_aside(cut, make, cut_by_hand, read_back, tmp_path):
    make(tmp_path / "c", seed=9, shards=4)
    (tmp_path / "c" / "my notes").write_text("gone with the old model")
    before = set(tmp_path.iterdir())
    write(cut, tmp_path / "c", overwrite=True)
    assert names(tmp_path / "c") == sorted([*SMALL, "model.safetensors"])
    assert set(tmp_path.iterdir()) == before


def test_the_old_model_stays_until_the_new_one_is_whole(cut, make, tree, tmp_path):
    make(tmp_path / "c", seed=9)
    before = tree(tmp_path / "c")
    with pytest.raises(KeyboardInterrupt):
        write(cut, tmp_path / "c", overwrite=True, progress=fail_after(500, KeyboardInterrupt()))
    assert tree(tmp_path / "c") == before
    write(cut, tmp_path / "c", overwrite=True)
    assert names(tmp_path / "c") == sorted([*SMALL, "model.safetensors"])


def test_a_run_that_was_stopped_goes_on_with_the_shards_that_are_done(cut, cut_by_hand, read_back, tmp_path):
    whole = plan_write(cut, 150)
    stop = whole.shards[0].size + whole.shards[1].size + 10
    with pytest.raises(KeyboardInterrupt):
        write(cut, tmp_path / "c", max_shard_size=150, progress=fail_after(stop, KeyboardInterrupt()))
    staging = staging_path(tmp_path / "c")
    assert names(tmp_path) == sorted(
        ["m", ".c.downcycle", *(f"m/{name}" for name in names(tmp_path / "m")), *(f".c.downcycle/{n}" for n in names(staging))]
    )
    assert names(staging) == sorted(["plan.sha256", *[shard.name for shard in whole.shards[:2]], f"{whole.shards[2].name}.part"])
    done = state(staging)
    counts = []
    write(cut, tmp_path / "c", max_shard_size=150, progress=counts.append)
    after = state(tmp_path / "c")
    assert {name: after[name] for name in done} == done
    assert sum(counts) == whole.write_bytes
    assert names(tmp_path / "c") == sorted([*SMALL, INDEX, *shards_of(len(whole.shards))])
    assert not staging.exists()


def test_a_staging_folder_of_another_plan_or_source_is_begun_anew(cut, make, cut_by_hand, read_back, tmp_path):
    def stop():
        with pytest.raises(KeyboardInterrupt):
            write(cut, tmp_path / "c", max_shard_size=150, progress=fail_after(2000, KeyboardInterrupt()))

    stop()
    (staging_path(tmp_path / "c") / "model-00001-of-00009.safetensors").write_bytes(b"stale")
    shutil.rmtree(tmp_path / "m")
    tensors = make(tmp_path / "m", layers=5, shards=2, seed=1)  # same shapes, other weights
    changed = keep_layers(open_checkpoint(tmp_path / "m"), [0, 2, 4])
    write(changed, tmp_path / "c", max_shard_size=150)
    assert read_back(tmp_path / "c") == cut_by_hand(tensors, [0, 2, 4])
    shutil.rmtree(tmp_path / "c")
    with pytest.raises(KeyboardInterrupt):
        write(changed, tmp_path / "c", max_shard_size=150, progress=fail_after(2000, KeyboardInterrupt()))
    write(changed, tmp_path / "c", max_shard_size=10**6)
    assert names(tmp_path / "c") == sorted([*SMALL, "model.safetensors"])


@pytest.mark.parametrize("mark", [b"", b"\xff\xfe", b"0" * 64])
def test_a_damaged_mark_means_to_begin_anew(cut, tmp_path, mark):
    staging = staging_path(tmp_path / "c")
    (staging / "model.safetensors").mkdir(parents=True)
    (staging / "plan.sha256").write_bytes(mark)
    (staging / "link").symlink_to(tmp_path / "m")
    write(cut, tmp_path / "c")
    assert names(tmp_path / "c") == sorted([*SMALL, "model.safetensors"])
    assert (tmp_path / "m" / "config.json").exists()


# What must not be written


def folder_with(path, *files):
    path.mkdir(parents=True)
    for file in files:
        (path / file).write_text("{}")
    return path


TARGETS = {
    "the source": (lambda t: t / "m", True, "holds the source"),
    "the source, spelled otherwise": (lambda t: t / "x" / ".." / "m", True, "holds the source"),
    "a folder around the source": (lambda t: t, True, "exists and holds no checkpoint|holds the source"),
    "a checkpoint around the source": (lambda t: (t / "config.json").write_text("{}") and t, True, "holds the source"),
    "a folder in the source": (lambda t: t / "m" / "child", True, "lies in the source"),
    "a folder deep in the source": (lambda t: t / "m" / "a" / "child", True, "lies in the source"),
    "a link to the source": (lambda t: (t / "link").symlink_to(t / "m") or t / "link", True, "is a symbolic link"),
    "a folder in a link to the source": (lambda t: (t / "link").symlink_to(t / "m") or t / "link" / "child", True, "lies in the source"),
    "a file": (lambda t: (t / "f").write_text("x") and t / "f", True, "is no folder"),
    "a folder in a file": (lambda t: (t / "f").write_text("x") and t / "f" / "c", True, "nothing can be written into"),
    "a dangling link": (lambda t: (t / "l").symlink_to(t / "gone") or t / "l", True, "is a symbolic link"),
    "a link to itself": (lambda t: (t / "l").symlink_to(t / "l") or t / "l", True, "is a symbolic link"),
    "a link to a folder": (lambda t: (t / "l").symlink_to(folder_with(t / "d")) or t / "l", True, "is a symbolic link"),
    "a checkpoint, not to be replaced": (lambda t: folder_with(t / "d", "config.json"), False, "exists already.*--overwrite"),
    "a folder that is no checkpoint": (lambda t: folder_with(t / "d", "thesis.tex"), True, "--overwrite replaces checkpoints only"),
    "the root": (lambda t: "/", True, "holds no checkpoint"),
    "no name": (lambda t: "", True, "give a folder's name"),
}


@pytest.mark.parametrize(("target", "overwrite", "says"), TARGETS.values(), ids=TARGETS)
def test_targets_that_are_refused(cut, tree, tmp_path, target, overwrite, says):
    out = target(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(DowncycleError, match=says) as refusal:
        write(cut, out, overwrite=overwrite)
    assert "\n" not in str(refusal.value)
    assert tree(tmp_path) == before


def test_a_staging_name_that_is_taken_is_not_touched(cut, tree, tmp_path):
    for place in (tmp_path / "m", tmp_path / "m" / "config.json"):
        staging_path(tmp_path / "c").symlink_to(place)
        before = tree(tmp_path)
        with pytest.raises(DowncycleError, match="--out"):
            write(cut, tmp_path / "c")
        assert tree(tmp_path) == before
        staging_path(tmp_path / "c").unlink()
    staging_path(tmp_path / "c").write_text("mine")
    with pytest.raises(DowncycleError, match="--out"):
        write(cut, tmp_path / "c")
    assert staging_path(tmp_path / "c").read_text() == "mine"


def test_the_second_run_on_one_target_is_refused(cut, tree, tmp_path):
    """Inside the first run, which is told of its progress, the second is started."""
    said = []

    def second(count):
        if not said:
            before = tree(tmp_path)
            with pytest.raises(DowncycleError, match="another run is writing it") as refusal:
                write(cut, tmp_path / "c")
            said.append(str(refusal.value))
            assert tree(tmp_path) == before

    write(cut, tmp_path / "c", progress=second)
    assert len(said) == 1
    assert names(tmp_path / "c") == sorted([*SMALL, "model.safetensors"])


def test_a_target_that_appears_meanwhile_is_not_replaced(cut, monkeypatch, tmp_path):
    """Another run completes between the check and the lock."""
    lock = fcntl.flock

    def complete_then_lock(*arguments):
        monkeypatch.setattr(fcntl, "flock", lock)
        folder_with(tmp_path / "c", "config.json")
        return lock(*arguments)

    monkeypatch.setattr(fcntl, "flock", complete_then_lock)
    with pytest.raises(DowncycleError, match="exists already"):
        write(cut, tmp_path / "c")
    assert names(tmp_path) == sorted(["m", "c", "c/config.json", *(f"m/{name}" for name in names(tmp_path / "m"))])


def test_too_little_space_is_said_before_the_first_byte(cut, tree, tmp_path, monkeypatch):
    needed = plan_write(cut).write_bytes
    before = tree(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, needed - 1))
    with pytest.raises(DowncycleError, match="are needed and .* are free; free some space or choose --out on another disk"):
        write(cut, tmp_path / "new" / "c")
    assert tree(tmp_path) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, needed))
    write(cut, tmp_path / "c")


def test_what_is_done_counts_as_space(cut, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        write(cut, tmp_path / "c", progress=fail_after(1000, KeyboardInterrupt()))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, plan_write(cut).write_bytes - 1))
    write(cut, tmp_path / "c")


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.ENOSPC, "the disk is full; free some space"), (errno.EDQUOT, "the disk is full"), (errno.EIO, "Input/output error")],
    ids=["ENOSPC", "EDQUOT", "EIO"],
)
@pytest.mark.parametrize("call", ["copy_file_range", "fsync", "rename", "mkdir"])
def test_a_fault_of_the_disk_is_one_line_that_names_the_staging_folder(cut, tree, tmp_path, monkeypatch, call, number, says):
    """The third call fails; the folder that mkdir makes is the staging folder itself, and its first call fails."""
    real = getattr(os, call)
    calls = []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) >= (1 if call == "mkdir" else 3):
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    before = tree(tmp_path)
    monkeypatch.setattr(os, call, failing)
    with pytest.raises(DowncycleError) as refusal:
        write(cut, tmp_path / "c", max_shard_size=150)
    monkeypatch.setattr(os, call, real)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "c").exists()
    staging = staging_path(tmp_path / "c")
    if call == "mkdir":
        assert tree(tmp_path) == before
        return
    assert says in str(refusal.value)
    assert f"What is done stays in {staging}; the same command goes on from there." in str(refusal.value)
    done = state(staging)
    write(cut, tmp_path / "c", max_shard_size=150)
    assert done.items() <= state(tmp_path / "c").items()
    assert not staging.exists()


def test_a_real_full_disk(make, disk, tmp_path, monkeypatch):
    make(tmp_path / "m", hidden=96, shards=2)
    child, place = keep_layers(open_checkpoint(tmp_path / "m"), [0, 1, 2]), disk("size=256k")
    with pytest.raises(DowncycleError, match="are needed and 0.3 MB are free"):
        write(child, place / "c")
    assert names(place) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 10**12))  # somebody else fills it meanwhile
    with pytest.raises(
        DowncycleError, match=r"c is not complete: the disk is full; free some space. What is done stays in .*\.c\.downcycle"
    ):
        write(child, place / "c", max_shard_size=50_000)
    done = state(staging_path(place / "c"))
    assert done
    disk("size=4m")
    write(child, place / "c", max_shard_size=50_000)
    assert done.items() <= state(place / "c").items()
    assert names(place) == sorted(["c", *(f"c/{name}" for name in names(place / "c"))])


def test_a_real_read_only_disk(cut, disk):
    place = disk("size=1m,ro")
    with pytest.raises(DowncycleError, match="nothing can be written into .*/disk; choose another"):
        write(cut, place / "new" / "c")


def test_a_folder_where_nobody_may_write(cut):
    with pytest.raises(DowncycleError, match="^/sys: .* 0.0 MB are free|^--out /sys/child: nothing can be written into /sys"):
        write(cut, "/sys/child")


def test_a_limit_on_file_size(cut, tmp_path):
    """RLIMIT_FSIZE, as batch systems set it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DowncycleError, match="c is not complete: File too large. What is done stays in"):
            write(cut, tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    write(cut, tmp_path / "c")
    assert names(tmp_path / "c") == sorted([*SMALL, "model.safetensors"])


def test_a_source_that_is_cut_short_meanwhile(cut, tmp_path):
    os.truncate(tmp_path / "m" / "model-00002-of-00002.safetensors", 2500)
    with pytest.raises(DowncycleError, match=r"ends before byte \d+; the file is truncated.* What is done stays in"):
        write(cut, tmp_path / "c", max_shard_size=150)
    assert not (tmp_path / "c").exists()
    assert state(staging_path(tmp_path / "c"))


@pytest.mark.parametrize("size", [0, -1])
def test_shard_sizes_that_are_none(cut, tmp_path, size):
    with pytest.raises(DowncycleError, match=f"--max-shard-size {size}"):
        write(cut, tmp_path / "c", max_shard_size=size)


def test_the_plan_says_how_much_is_read_and_written(cut, tmp_path, monkeypatch):
    plan = plan_write(cut, 150)
    copied = []
    copy, read = LocalFolder.copy, LocalFolder.read
    monkeypatch.setattr(
        LocalFolder, "copy", lambda self, path, start, length, *rest: copied.append(length) or copy(self, path, start, length, *rest)
    )
    monkeypatch.setattr(LocalFolder, "read", lambda self, path, start, length: copied.append(length) or read(self, path, start, length))
    counts = []
    write(cut, tmp_path / "c", max_shard_size=150, progress=counts.append)
    assert sum(copied) == plan.read_bytes
    assert sum(counts) == plan.write_bytes == sum(path.stat().st_size for path in (tmp_path / "c").iterdir())
    assert plan.download_bytes == 0


def test_a_shard_computed_from_other_bytes_is_not_taken_for_finished(make, tmp_path):
    """The run stops before its small files; the file that a tensor is computed from changes; the same call writes the new bytes."""
    make(tmp_path / "m")
    (tmp_path / "m" / "extra.bin").write_bytes(b"old.")
    parent = open_checkpoint(tmp_path / "m")
    source = LocalFolder(tmp_path / "m")
    span = Span(source, "extra.bin", 0, 4)
    made = replace(parent, tensors={"x": Tensor("U8", (4,), lambda: [span.read()], (span,))})

    def stop(count):
        if (tmp_path / ".c.downcycle" / "model.safetensors").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(made, tmp_path / "c", progress=stop)
    (tmp_path / "m" / "extra.bin").write_bytes(b"new.")
    write(made, tmp_path / "c")
    assert (tmp_path / "c" / "model.safetensors").read_bytes().endswith(b"new.")


def test_a_plan_counts_what_computed_tensors_read(make, tmp_path):
    make(tmp_path / "m", extra={"embed_tokens_per_layer.weight": Stored("BF16", (5, 8), bytes(80))})
    child = keep_layers(open_checkpoint(tmp_path / "m"), [0])
    (computed,) = [tensor for tensor in child.tensors.values() if tensor.inputs]
    assert computed.nbytes == 20
    copied = sum(data.length for data in child.files.values() if isinstance(data, Span))
    assert plan_write(child).read_bytes == child.nbytes - 20 + 80 + copied


def test_a_journal_without_its_shard_says_nothing(cut, tmp_path):
    staging = tmp_path / ".c.downcycle"
    staging.mkdir()
    (staging / "plan.sha256").write_text(plan_write(cut).digest)
    (staging / "model.safetensors.done").write_text("0\n")
    write(cut, tmp_path / "c")
    assert not (tmp_path / "c" / "model.safetensors.done").exists()
