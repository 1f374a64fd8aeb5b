"""A folder to push, and a Hub on loopback that takes it, with a token that nobody else may see."""

import re
import traceback
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from downcycle import DowncycleError, keep_layers, open_checkpoint, write

from hub_server import connected, skip_waits
from upload_server import SIGNATURE, UploadServer

TOKEN = "hf_" + "DoNotTellAnyoneWhatStandsHere2026x"
IS_NEW = int(huggingface_hub.__version__.partition(".")[0]) >= 2
CARD = b"---\nlicense: apache-2.0\nbase_model: ann/parent\n---\n# A small model\n"


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return TOKEN


@pytest.fixture
def waits(monkeypatch):
    """Let waits pass at once; list them."""
    waits = skip_waits(monkeypatch)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=waits.append))
    return waits


@pytest.fixture
def hub(tmp_path, monkeypatch, waits):
    """A Hub that huggingface_hub takes for its own. It speaks no Xet, which huggingface_hub 2 would use without asking."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", IS_NEW)
    with connected(monkeypatch, tmp_path / "cache", UploadServer(TOKEN)) as server:
        yield server


@pytest.fixture
def parent(tmp_path, make):
    """A Llama of 6 layers."""
    make(tmp_path / "parent", layers=6, hidden=32, vocab=64)
    return tmp_path / "parent"


@pytest.fixture
def model(tmp_path, parent):
    """A cut in three shards, with a card and a figure, beside its parent."""
    write(keep_layers(open_checkpoint(parent), [0, 1, 5]), tmp_path / "child", max_shard_size=30_000)
    (tmp_path / "child" / "README.md").write_bytes(CARD)
    (tmp_path / "child" / "figures").mkdir()
    (tmp_path / "child" / "figures" / "layers.png").write_bytes(b"\x89PNG\r\n\x1a\n\0" + bytes(range(256)))
    return tmp_path / "child"


@pytest.fixture
def files_of():
    """Read every file of a folder, by its path."""

    def read(folder):
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return read


@pytest.fixture
def line():
    """Return the one line of what a call must refuse with; neither it nor what lies behind it holds the token or a signed link."""

    def call(function, *arguments, **options):
        with pytest.raises(DowncycleError) as refused:
            function(*arguments, **options)
        text = str(refused.value)
        assert "\n" not in text and text
        seen, error = [], refused.value
        while error is not None:
            seen += [repr(error), *map(str, error.args)]
            error = error.__cause__ or error.__context__
        seen.append("".join(traceback.format_exception(refused.value)))
        assert not re.search(f"{TOKEN}|{SIGNATURE}", " ".join(seen))
        return text

    return call
