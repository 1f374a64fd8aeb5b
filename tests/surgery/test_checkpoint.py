"""Opening reads headers only, follows links, and refuses in one line what is no checkpoint."""

import json
import os
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import transformers

from downcycle import DowncycleError, open_checkpoint
from downcycle.surgery.checkpoint import find_source
from downcycle.surgery.filenames import SMALL_FILES
from downcycle.surgery.sources import LocalFolder

INDEX = "model.safetensors.index.json"
SMALL = {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.fixture
def reads(monkeypatch):
    """Every range that is read of a local file."""
    seen = []
    read, copy = LocalFolder.read, LocalFolder.copy
    monkeypatch.setattr(
        LocalFolder, "read", lambda self, path, start, length: seen.append((path, start, length)) or read(self, path, start, length)
    )
    monkeypatch.setattr(LocalFolder, "copy", lambda self, path, *rest: seen.append((path, *rest[:2])) or copy(self, path, *rest))
    return seen


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_there_with_its_bytes(make, tmp_path, shards):
    tensors = make(tmp_path / "m", shards=shards, dtypes=("F32", "BF16", "F8_E4M3", "F4"))
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.num_layers == 4
    assert {name: (tensor.dtype, tensor.shape, b"".join(tensor.chunks())) for name, tensor in checkpoint.tensors.items()} == tensors
    assert checkpoint.nbytes == sum(len(tensor.data) for tensor in tensors.values())
    assert set(checkpoint.files) == SMALL
    assert checkpoint.metadata == {"format": "pt"}
    assert checkpoint.lineage == {}


def test_opening_reads_config_index_and_headers_only(make, tmp_path, reads):
    make(tmp_path / "m", shards=3)
    open_checkpoint(tmp_path / "m")
    for path, start, length in reads:
        header = 8 + int.from_bytes((tmp_path / "m" / path).read_bytes()[:8], "little") if path.endswith(".safetensors") else 10**6
        assert start + length <= header
    assert {path for path, _, _ in reads} == {
        "config.json",
        "tokenizer_config.json",
        INDEX,
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
    }


def test_only_a_model_s_own_files_come_along(make, tmp_path):
    make(tmp_path / "m")
    for name in ("optimizer.pt", "training_args.bin", ".env", "id_rsa", "README.md", "modeling_x.py", "trainer_state.json"):
        (tmp_path / "m" / name).write_bytes(b"x")
    (tmp_path / "m" / "LICENSE.txt").write_bytes(b"x")
    (tmp_path / "m" / "chat_templates").mkdir()
    (tmp_path / "m" / "chat_templates" / "tools.jinja").write_bytes(b"x")
    assert set(open_checkpoint(tmp_path / "m").files) == SMALL | {"LICENSE.txt", "chat_templates/tools.jinja"}
    trusted = open_checkpoint(tmp_path / "m", trust_remote_code=True)
    assert set(trusted.files) == SMALL | {"LICENSE.txt", "chat_templates/tools.jinja", "modeling_x.py"}


def test_a_hub_cache_of_links_is_followed(make, tmp_path):
    tensors = make(tmp_path / "blobs", shards=2)
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{path.name}")
    checkpoint = open_checkpoint(tmp_path / "snapshot")
    assert {name: b"".join(tensor.chunks()) for name, tensor in checkpoint.tensors.items()} == {n: t.data for n, t in tensors.items()}


def test_a_linked_folder_of_shards_is_followed(make, tmp_path):
    tensors = make(tmp_path / "elsewhere")
    make(tmp_path / "m", shards=2, seed=1)
    (tmp_path / "m" / "sub").symlink_to("../elsewhere")
    (tmp_path / "m" / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "sub/model.safetensors")}))
    checkpoint = open_checkpoint(tmp_path / "m")
    assert {name: b"".join(tensor.chunks()) for name, tensor in checkpoint.tensors.items()} == {n: t.data for n, t in tensors.items()}


def test_the_fingerprint_is_of_config_and_shapes(make, tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b", shards=3, seed=1)
    make(tmp_path / "c", dtypes=("F16",))
    make(tmp_path / "d", config={"rope_theta": 1.0})
    first, same, *others = (open_checkpoint(tmp_path / name).fingerprint for name in "abcd")
    assert first == same
    assert len({first, *others}) == 3


def test_a_path_is_a_folder_and_never_the_demo_or_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("demo").name == "demo"
    for name in ("demo", "user/model"):
        with pytest.raises(DowncycleError, match="no such folder"):
            open_checkpoint(tmp_path / ".." / tmp_path.name / name)
        with pytest.raises(DowncycleError, match="no such folder"):
            find_source((tmp_path / name).relative_to(tmp_path))


def test_home_is_expanded(make, tmp_path, monkeypatch):
    make(tmp_path / "a model é")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_checkpoint("~/a model é/").num_layers == 4


NO_PLACES = [
    "",
    "./x",
    "../x",
    "/x/y/z",
    "~/x",
    "~nobody-of-that-name/x",
    "a/b/c",
    "a b",
    "é/",
    "-x",
    "x" * 300 + "/" * 2,
    "a\nb",
    "a\x00b",
    "~",
]


@pytest.mark.parametrize("src", NO_PLACES, ids=ascii)
def test_no_such_place(src, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "no-home"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DowncycleError, match="no such folder, and not a Hub id"):
        open_checkpoint(src)


def write_config(folder, text):
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else json.dumps(text).encode())


def edit_index(folder, **entries):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= entries
    (folder / INDEX).write_text(json.dumps(index))


def overwrite(path, start, data):
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(data)


def outside_shard(m):
    (m.parent / "out.safetensors").write_bytes((m / "model-00001-of-00002.safetensors").read_bytes())
    return m.parent / "out.safetensors"


def only(m, name):
    """Leave no weights but a file of this name."""
    for path in m.glob("model*"):
        path.unlink()
    (m / name).write_bytes(b"x")


FAULTS = {
    "no config": (lambda m: (m / "config.json").unlink(), "config.json: not there"),
    "config is a folder": (lambda m: (m / "config.json").unlink() or (m / "config.json").mkdir(), "config.json: not there"),
    "config is empty": (lambda m: write_config(m, b""), "config.json: not valid JSON"),
    "config is a list": (lambda m: write_config(m, []), "no JSON object"),
    "config is a number": (lambda m: write_config(m, 7), "no JSON object"),
    "config is null": (lambda m: write_config(m, None), "no JSON object"),
    "config is invalid UTF-8": (lambda m: write_config(m, b'{"a": "\xff\xfe"}'), "not valid JSON"),
    "config is nested 500 deep": (lambda m: write_config(m, b'{"a":' * 500 + b"1" + b"}" * 500), "nested too deeply|recursion"),
    "config is nested 500,000 deep": (lambda m: write_config(m, b'{"a":' * 500_000), "recursion"),
    "config has a number of 5000 digits": (lambda m: write_config(m, b'{"num_hidden_layers": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "config is a huge sparse file": (lambda m: os.truncate(m / "config.json", 10**12), "too long"),
    "config with a list of model types": (lambda m: write_config(m, {"model_type": ["llama"]}), "model_type is no name"),
    "config wants code": (lambda m: write_config(m, {"num_hidden_layers": 4, "auto_map": {"AutoModel": "x.Y"}}), "--trust-remote-code"),
    "an adapter": (lambda m: (m / "config.json").rename(m / "adapter_config.json"), "an adapter, not a model"),
    "pickled weights": (lambda m: only(m, "pytorch_model.bin"), "pickled .*save_pretrained"),
    "pickled shards": (lambda m: only(m, "pytorch_model-00001-of-00002.bin"), "pickled .*save_pretrained"),
    "the original Llama format": (lambda m: only(m, "consolidated.00.pth"), "pickled .*save_pretrained"),
    "no weights": (lambda m: only(m, "notes.txt"), "no safetensors files"),
    "shards without index": (lambda m: (m / INDEX).unlink(), "2 safetensors files but no model.safetensors.index.json"),
    "index is a list": (lambda m: (m / INDEX).write_text("[]"), "no JSON object"),
    "index without a map": (lambda m: (m / INDEX).write_text("{}"), "no weight_map"),
    "index with an empty map": (lambda m: (m / INDEX).write_text('{"weight_map": {}}'), "no weight_map"),
    "index with a list": (lambda m: (m / INDEX).write_text('{"weight_map": ["a"]}'), "no weight_map"),
    "index naming a number": (lambda m: edit_index(m, x=5), "no weight_map from tensors to files"),
    "index naming a list": (lambda m: edit_index(m, x=["a"]), "no weight_map from tensors to files"),
    "index naming null": (lambda m: edit_index(m, x=None), "no weight_map from tensors to files"),
    "index naming a missing file": (lambda m: edit_index(m, x="gone.safetensors"), "'gone.safetensors', which is not there"),
    "index naming an empty path": (lambda m: edit_index(m, x=""), "'', which is not there"),
    "index naming a folder": (lambda m: edit_index(m, x="."), "'.', which is not there"),
    "index naming a control character": (lambda m: edit_index(m, x="a\x1b[2J\n"), r"a\\x1b\[2J\\n.*not there"),
    "index naming an absolute path": (lambda m: edit_index(m, x=str(outside_shard(m))), "outside the checkpoint"),
    "index naming a path above": (lambda m: edit_index(m, x=f"../{outside_shard(m).name}"), "outside the checkpoint"),
    "index naming a path up and down": (lambda m: edit_index(m, x=f"a/../../{outside_shard(m).name}"), "outside the checkpoint"),
    "index naming a Windows path": (lambda m: edit_index(m, x="..\\out.safetensors"), "outside the checkpoint"),
    "index naming a wrong shard": (
        lambda m: edit_index(m, **{"lm_head.weight": "model-00001-of-00002.safetensors"}),
        "puts 'lm_head.weight' into model-00001-of-00002.safetensors, which does not hold it",
    ),
    "a tensor in two shards": (
        lambda m: (m / "model-00002-of-00002.safetensors").write_bytes((m / "model-00001-of-00002.safetensors").read_bytes()),
        "stands in two shards",
    ),
    "a missing shard": (
        lambda m: (m / "model-00002-of-00002.safetensors").unlink(),
        "model-00002-of-00002.safetensors', which is not there",
    ),
    "a truncated shard": (lambda m: os.truncate(m / "model-00002-of-00002.safetensors", 2800), "truncated"),
    "an empty shard": (lambda m: os.truncate(m / "model-00002-of-00002.safetensors", 0), "too short"),
    "a shard that is a dangling link": (
        lambda m: (m / "model-00002-of-00002.safetensors").unlink() or (m / "model-00002-of-00002.safetensors").symlink_to("gone"),
        "not there",
    ),
    "a header beyond the file": (lambda m: overwrite(m / "model-00001-of-00002.safetensors", 0, b"\xff" * 7), "claims a header"),
    "a Git LFS pointer": (
        lambda m: (m / "model-00001-of-00002.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "not a safetensors file",
    ),
    "lineage is a list": (lambda m: (m / "downcycle.json").write_text("[]"), "downcycle.json: holds no JSON object"),
}


@pytest.mark.parametrize(("damage", "says"), FAULTS.values(), ids=FAULTS)
def test_what_is_no_checkpoint_is_refused_in_one_line(make, tmp_path, damage, says):
    make(tmp_path / "m", shards=2)
    damage(tmp_path / "m")
    with pytest.raises(DowncycleError, match=says) as refusal:
        open_checkpoint(tmp_path / "m")
    assert "\n" not in str(refusal.value)
    assert str(tmp_path / "m") in str(refusal.value)


@pytest.mark.parametrize("depth", [0, -1, -(10**30), 10**30, 10**9, 40], ids=repr)
def test_a_depth_that_cannot_be_is_refused(make, tmp_path, depth):
    make(tmp_path / "m", config={"num_hidden_layers": depth})
    with pytest.raises(DowncycleError, match=rf"m/config.json: states {depth} layers; there are 39 tensors"):
        open_checkpoint(tmp_path / "m").num_layers  # noqa: B018


@pytest.mark.parametrize("depth", ["4", "", True, None, [4], {"a": 4}, 4.0, float("nan")], ids=repr)
def test_a_depth_that_is_no_whole_number_is_none(make, tmp_path, depth):
    make(tmp_path / "m", config={"num_hidden_layers": depth})
    with pytest.raises(DowncycleError, match="config.json of llama states no depth"):
        open_checkpoint(tmp_path / "m").num_layers  # noqa: B018


def test_a_checkpoint_without_a_single_byte_is_refused(make, tmp_path):
    make(tmp_path / "m", hidden=0)
    with pytest.raises(DowncycleError, match="hold no weights"):
        open_checkpoint(tmp_path / "m")


def test_what_others_write_is_accepted(make, tmp_path):
    """A byte-order mark, Infinity (Mamba's time_step_limit), numbers in the metadata, an index with more in it, a lone surrogate."""
    tensors = make(tmp_path / "m", shards=2)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    write_config(tmp_path / "m", b"\xef\xbb\xbf" + json.dumps(config | {"time_step_limit": [0.0, float("inf")], "x": "\ud800"}).encode())
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    (tmp_path / "m" / INDEX).write_text(json.dumps(index | {"metadata": {"total_size": "?"}, "more": 1}))
    assert set(open_checkpoint(tmp_path / "m").tensors) == set(tensors)


def test_one_file_is_preferred_to_shards_as_transformers_prefers_it(make, tmp_path):
    make(tmp_path / "m", shards=2, seed=1)
    make(tmp_path / "one", seed=2)
    (tmp_path / "one" / "model.safetensors").rename(tmp_path / "m" / "model.safetensors")
    paths = {tensor.data.path for tensor in open_checkpoint(tmp_path / "m").tensors.values()}
    assert paths == {"model.safetensors"}


def test_a_tokenizer_with_code_of_its_own_needs_trust(make, tmp_path):
    make(tmp_path / "m")
    (tmp_path / "m" / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tok.T", null]}}')
    (tmp_path / "m" / "tok.py").write_text("x")
    with pytest.raises(DowncycleError, match="its tokenizer needs Python code.*--trust-remote-code"):
        open_checkpoint(tmp_path / "m")
    assert "tok.py" in open_checkpoint(tmp_path / "m", trust_remote_code=True).files


def test_the_built_in_model_has_no_revisions():
    with pytest.raises(DowncycleError, match="--revision x: demo .* leave it out"):
        open_checkpoint("demo", "x")


def test_every_vocabulary_that_transformers_names_comes_along():
    names = set()
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization*.py"):
        for block in re.findall(r"VOCAB_FILES_NAMES = \{(.*?)\}", path.read_text(), re.DOTALL):
            names |= set(re.findall(r':\s*"([^"]+)"', block))
    assert len(names) > 20
    assert {name for name in names if not any(fnmatch(name, pattern) for pattern in SMALL_FILES)} == set()
