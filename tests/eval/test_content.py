"""A model's content: equal for copies, another for any change of what it computes with, and read once."""

import json
import os
import shutil

import pytest

from downcycle import keep_layers, open_checkpoint
from downcycle.eval.content import content_digest


def digest(folder, read=None):
    return content_digest(open_checkpoint(folder), (lambda count: None) if read is None else read.append)


@pytest.fixture
def model(make, tmp_path):
    make(tmp_path / "m", shards=2)
    return tmp_path / "m"


def test_a_copy_is_the_same_model_and_legal_files_do_not_count(model, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy" / "LICENSE").write_text("x")
    (tmp_path / "copy" / "README.md").write_text("x")
    assert digest(model) == digest(tmp_path / "copy")


@pytest.mark.parametrize("change", ["weight", "config", "tokenizer", "name", "weight, same size and time"])
def test_any_change_is_another_model(model, change):
    before = digest(model)
    path = model / {"config": "config.json", "tokenizer": "tokenizer.json"}.get(change, "model-00002-of-00002.safetensors")
    status, data = path.stat(), bytearray(path.read_bytes())
    if change in ("config", "tokenizer"):
        path.write_text(json.dumps(json.loads(data) | {"x": 1}))
    elif change == "name":
        at = data.index(b"model.norm.weight")
        data[at : at + 17] = b"model.morn.weight"
        index = model / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("model.norm.weight", "model.morn.weight"))
        path.write_bytes(data)
    else:
        data[-1] ^= 1
        with open(path, "r+b") as file:
            file.write(data)
        if "time" in change:
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digest(model) != before


def test_weights_are_read_once(model):
    first, second = [], []
    assert digest(model, first) == digest(model, second)
    assert sum(first) == sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert second == []


def test_a_memory_that_cannot_be_written_or_read_changes_nothing(model, cache):
    before = digest(model)
    for damaged in ("{", "[]", "null", json.dumps({str(path): 5 for path in model.iterdir()})):
        (cache / "files.json").write_text(damaged)
        assert digest(model) == before
    shutil.rmtree(cache)
    cache.write_text("a file where the folder should be")
    assert digest(model) == before


def test_a_cut_that_was_not_written_has_its_own_content(model):
    parent = open_checkpoint(model)
    contents = {content_digest(keep_layers(parent, kept)) for kept in ([0, 1], [0, 2], [1, 0])}
    assert len({*contents, content_digest(parent)}) == 4
    assert content_digest(keep_layers(parent, [0, 1])) == content_digest(keep_layers(parent, [0, 1]))
