"""A local folder gives exactly the bytes that were asked for, through links, and says what it lacks."""

import errno
import os
import random

import pytest

from downcycle import DowncycleError
from downcycle.surgery import sources
from downcycle.surgery.sources import LocalFolder

CONTENT = random.Random(1).randbytes(100_000)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_bytes(CONTENT)
    model = tmp_path / "snapshot"
    (model / "chat_templates").mkdir(parents=True)
    (model / "chat_templates" / "tool.jinja").write_bytes(b"x")
    (model / "plain").write_bytes(CONTENT)
    (model / "linked").symlink_to("../blobs/abc")
    (model / "dangling").symlink_to("../blobs/def")
    (model / ".git").mkdir()
    (model / ".git" / "secret").write_bytes(b"x")
    (model / "deep" / "deeper").mkdir(parents=True)
    (model / "deep" / "deeper" / "file").write_bytes(b"x")
    (model / "loop").symlink_to(".")
    os.mkfifo(model / "pipe")
    return model


def copy(source, path, start, length, tmp_path):
    """Copy between two marks and return what lies between them."""
    counts = []
    with open(tmp_path / "into", "wb+") as into:
        into.write(b"<" * 10 + b"." * length + b">" * 10)
        into.flush()
        source.copy(path, start, length, into.fileno(), 10, counts.append)
        into.seek(0)
        written = into.read()
    assert sum(counts) == length
    assert (written[:10], written[10 + length :]) == (b"<" * 10, b">" * 10)
    return written[10 : 10 + length]


def test_files_are_listed_one_folder_deep(folder):
    listed = LocalFolder(folder).files
    assert {path for path in listed if not path.startswith("loop/")} == {"plain", "linked", "chat_templates/tool.jinja"}
    assert listed["linked"] == listed["plain"] == 100_000


@pytest.mark.parametrize("path", ["plain", "linked"])
@pytest.mark.parametrize(("start", "length"), [(0, 100_000), (0, 0), (1, 1), (99_999, 1), (100_000, 0), (7, 77_777)])
def test_ranges_are_exact(folder, tmp_path, monkeypatch, path, start, length):
    source = LocalFolder(folder)
    expected = CONTENT[start : start + length]
    assert source.read(path, start, length) == expected
    assert copy(source, path, start, length, tmp_path) == expected
    monkeypatch.setattr(sources, "CHUNK", 1000)
    monkeypatch.setattr(os, "copy_file_range", lambda *_: fail(errno.EXDEV))
    assert copy(source, path, start, length, tmp_path) == expected
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)  # what some network file systems answer
    assert copy(source, path, start, length, tmp_path) == expected
    monkeypatch.delattr(os, "copy_file_range")
    assert copy(source, path, start, length, tmp_path) == expected


def fail(number):
    raise OSError(number, os.strerror(number))


def test_short_reads_are_continued(folder, monkeypatch):
    read = os.pread
    monkeypatch.setattr(os, "pread", lambda file, length, start: read(file, min(length, 999), start))
    assert LocalFolder(folder).read("plain", 5, 50_000) == CONTENT[5:50_005]


def test_a_file_that_ends_early_is_named(folder, tmp_path):
    source = LocalFolder(folder)
    with pytest.raises(DowncycleError, match="plain: ends before byte 100001; the file is truncated"):
        source.read("plain", 99_000, 1001)
    with open(tmp_path / "into", "wb") as into, pytest.raises(DowncycleError, match="plain: ends before byte 100001"):
        source.copy("plain", 99_000, 1001, into.fileno(), 0, lambda count: None)


def test_a_file_that_vanished_is_named(folder):
    with pytest.raises(DowncycleError, match="gone: No such file or directory"):
        LocalFolder(folder).read("gone", 0, 1)


def test_identity_changes_with_size_and_time(folder):
    source = LocalFolder(folder)
    before = source.identity("linked")
    assert source.identity("linked") == before
    os.utime(folder.parent / "blobs" / "abc", ns=(0, 12345))
    touched = source.identity("linked")
    (folder.parent / "blobs" / "abc").write_bytes(b"")
    os.utime(folder.parent / "blobs" / "abc", ns=(0, 12345))
    assert len({before, touched, source.identity("linked")}) == 3
