"""Llama-shaped checkpoints made by hand from bytes, a reading of what was written by the safetensors library, and the command line.

Needs no torch, and takes none of its answers from the package.
"""

import fcntl
import json
import logging
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import cycle
from math import prod
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors import deserialize

with suppress(ValueError):  # not the main thread
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and all that they start, would ignore it
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads of several workers share the cores: those that wait must not spin

HALF_BYTES = {"F64": 16, "F32": 8, "BF16": 4, "F16": 4, "F8_E4M3": 2, "I8": 2, "U8": 2, "F4": 1}
SMALL_FILES = {
    "generation_config.json": b'{"temperature": 0.6}\n',
    "tokenizer.json": '{"version": "1.0", "added_tokens": ["é"]}\n'.encode(),
    "tokenizer_config.json": b"{}\n",
    "chat_template.jinja": b"{{ messages }}\n",
}


class Stored(NamedTuple):
    """A tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Answer(NamedTuple):
    """What a command said."""

    code: int
    out: str
    err: str


def llama_shapes(layers: int, hidden: int, vocab: int, tied: bool) -> dict[str, tuple[int, ...]]:
    block = {f"self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
    block |= {f"mlp.{part}_proj.weight": (2 * hidden, hidden) for part in ("gate", "up")} | {"mlp.down_proj.weight": (hidden, 2 * hidden)}
    block |= {f"{part}_layernorm.weight": (hidden,) for part in ("input", "post_attention")}
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    shapes |= {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in block.items()}
    return shapes | {"model.norm.weight": (hidden,)} | ({} if tied else {"lm_head.weight": (vocab, hidden)})


def random_tensor(rng: random.Random, dtype: str, shape: tuple[int, ...]) -> Stored:
    return Stored(dtype, shape, rng.randbytes(prod(shape) * HALF_BYTES[dtype] // 2))


def pack(tensors: dict[str, Stored], metadata: dict[str, str] | None = None) -> bytes:
    """Spell a safetensors file: length, header, data."""
    header: dict = {"__metadata__": metadata or {"format": "pt"}}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def make_checkpoint(
    folder: Path,
    *,
    layers: int = 4,
    hidden: int = 4,
    vocab: int = 8,
    shards: int = 1,
    dtypes: tuple[str, ...] = ("BF16",),
    tied: bool = False,
    extra: dict[str, Stored] | None = None,
    config: dict | None = None,
    seed: int = 0,
) -> dict[str, Stored]:
    """Write a checkpoint into a new folder and return its tensors; dtypes take turns, `extra` tensors and config fields are added."""
    rng = random.Random(seed)
    kinds = cycle(dtypes)
    tensors = {name: random_tensor(rng, next(kinds), shape) for name, shape in llama_shapes(layers, hidden, vocab, tied).items()}
    tensors |= extra or {}
    folder.mkdir(parents=True)
    names = list(tensors)
    parts = [names[len(names) * i // shards : len(names) * (i + 1) // shards] for i in range(shards)]
    files = ["model.safetensors"] if shards == 1 else [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for file, part in zip(files, parts, strict=True):
        (folder / file).write_bytes(pack({name: tensors[name] for name in part}))
    if shards > 1:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, content in SMALL_FILES.items():
        (folder / name).write_bytes(content)
    fields = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": 2 * hidden}
    fields |= {"num_attention_heads": 1, "num_hidden_layers": layers, "vocab_size": vocab, "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(fields | (config or {})))
    return tensors


def read_tensors(folder: Path) -> dict[str, Stored]:
    """Read a folder's tensors with the safetensors library; an index must name exactly what each file holds."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    held = {file.name: dict(deserialize(file.read_bytes())) for file in files}
    if index.exists():
        assert json.loads(index.read_text())["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    else:
        assert list(held) == ["model.safetensors"]
    return {
        name: Stored(tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
        for tensors in held.values()
        for name, tensor in tensors.items()
    }


def cut_tensors(tensors: dict[str, Stored], layers: list[int]) -> dict[str, Stored]:
    """The oracle of a cut: new layer i holds old layer layers[i], and what is no layer stays."""
    child: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"model\.layers\.(0|[1-9][0-9]{0,3})\.(.+)", name, re.DOTALL)
        news = [new for new, old in enumerate(layers) if match and old == int(match[1])]
        child |= {f"model.layers.{new}.{match[2]}": tensor for new in news} if match else {name: tensor}
    return child


def list_tree(folder: Path) -> dict[str, object]:
    """Every path below a folder, links not followed, with what it holds."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = path.readlink()
        else:
            found[str(path)] = "folder" if path.is_dir() else (path.stat().st_size, path.stat().st_mtime_ns)
    return found


@pytest.fixture(autouse=True)
def one_thread():
    """Models as small as these run faster so, and each worker of a parallel run has about one core."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0
    if torch:
        torch.set_num_threads(1)
    yield
    if torch:
        torch.set_num_threads(before)


@pytest.fixture
def quiet():
    """Keep away transformers' bars and all log lines, which hide what a test says."""
    from transformers.utils import logging as bars

    hook, level = bars.set_tqdm_hook(lambda factory, args, kwargs: bars.EmptyTqdm(*args, **kwargs)), logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(level)
    bars.set_tqdm_hook(hook)


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Fill a folder once for all workers of a parallel run: the first does it, the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def run(name: str, fill: Callable[[Path], object]) -> Path:
        folder = shared / name
        folder.mkdir(exist_ok=True)
        with open(shared / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (shared / f"{name}.done").exists():
                shutil.rmtree(folder)  # what one left that failed; the place stays the same, for what is filled in names it
                folder.mkdir()
                fill(folder)
                (shared / f"{name}.done").touch()
        return folder

    return run


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Mount a small disk, with the options of a tmpfs, where this process may; called again, give it others."""
    folder, mounted = tmp_path / "disk", []

    def mount(options: str) -> Path:
        folder.mkdir(exist_ok=True)
        what = f"remount,{options}" if mounted else options
        if subprocess.run(["mount", "-t", "tmpfs", "-o", what, "tmpfs", folder], capture_output=True, check=False).returncode:
            pytest.skip("mounting is not permitted here")
        mounted.append(folder)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="session")
def make() -> Callable[..., dict[str, Stored]]:
    return make_checkpoint


@pytest.fixture(scope="session")
def read_back() -> Callable[[Path], dict[str, Stored]]:
    return read_tensors


@pytest.fixture(scope="session")
def cut_by_hand() -> Callable[..., dict[str, Stored]]:
    return cut_tensors


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, object]]:
    return list_tree


@pytest.fixture(scope="session")
def pack_file() -> Callable[..., bytes]:
    return pack


@pytest.fixture(scope="session")
def stored() -> Callable[..., Stored]:
    """Make a tensor of random bytes from dtype, shape and seed."""
    return lambda dtype, shape, seed=0: random_tensor(random.Random(seed), dtype, shape)


@pytest.fixture
def downcycle(monkeypatch, capsys) -> Callable[..., Answer]:
    """Run the command line in this process. Only SystemExit may leave it: anything else is what users see as a traceback."""
    from downcycle.cli import main

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["downcycle", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Answer(ended.value.code or 0, captured.out, captured.err)

    return run


@pytest.fixture
def refused(downcycle, tmp_path) -> Callable[..., str]:
    """Run a command that must be refused: status 1, one line on stderr, not a file changed. Return the line."""

    def run(*arguments: object) -> str:
        before = list_tree(tmp_path)
        code, out, err = downcycle(*arguments)
        assert (code, out) == (1, ""), err
        assert re.fullmatch(r"downcycle: [^\n]*[^\n\s]\n", err), err
        assert list_tree(tmp_path) == before
        return err

    return run
