"""One file is written whole or not at all, and what cannot be written leaves nothing behind."""

import pytest

from downcycle.surgery.staging import replace_file


def test_a_file_takes_the_place_of_the_old_one_and_its_folder_is_made(tmp_path):
    path = tmp_path / "a" / "b" / "c.json"
    replace_file(path, b"1")
    replace_file(path, b"22")
    assert path.read_bytes() == b"22"
    assert [one.name for one in path.parent.iterdir()] == ["c.json"]


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path, tree):
    (tmp_path / "folder" / "x").mkdir(parents=True)
    (tmp_path / "file").write_text("kept")
    before = tree(tmp_path)
    for path in (tmp_path / "folder", tmp_path / "file" / "inside", tmp_path / ("n" * 300)):
        with pytest.raises(OSError):
            replace_file(path, b"1")
    assert tree(tmp_path) == before
