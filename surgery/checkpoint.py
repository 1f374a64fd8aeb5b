"""A checkpoint as a value: a config, a few small files and a list of named tensors, each a byte range or a computation.

Opening one reads headers only. Nothing here loads a weight, writes a file or needs torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

from .errors import DowncycleError
from .families import is_native, num_layers
from .filenames import ADAPTER_CONFIG, CONFIG, INDEX, LINEAGE, PICKLES, SINGLE, TOKENIZER, belongs, leads_out
from .header import LENGTH_BYTES, MAX_HEADER_BYTES, header_length, parse_header, tensor_nbytes
from .sources import CHUNK, LocalFolder, Source

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent.parent / "recipes" / "demo" / "model"

Chunks = Callable[[], Iterable[bytes]]


@dataclass(frozen=True)
class Span:
    """A byte range of one file of a source."""

    source: Source
    path: str
    start: int
    length: int

    def read(self) -> bytes:
        """Return the bytes, all at once: for small files."""
        return self.source.read(self.path, self.start, self.length)

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes in pieces of at most 8 MiB."""
        for done in range(0, self.length, CHUNK):
            yield self.source.read(self.path, self.start + done, min(CHUNK, self.length - done))


@dataclass(frozen=True)
class Tensor:
    """A named tensor's dtype (as safetensors spells it), shape and bytes: a range of a file, or a function that yields them in pieces.

    inputs: the byte ranges that such a function reads, so that a plan can count them and see when they change.
    """

    dtype: str
    shape: tuple[int, ...]
    data: Span | Chunks
    inputs: tuple[Span, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return tensor_nbytes(self.dtype, self.shape)

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes in order, in pieces that fit in memory."""
        yield from self.data.chunks() if isinstance(self.data, Span) else self.data()


def file_bytes(data: Span | bytes) -> bytes:
    """Return what a small file holds."""
    return data.read() if isinstance(data, Span) else data


def file_length(data: Span | bytes) -> int:
    """Return the size of a small file in bytes."""
    return data.length if isinstance(data, Span) else len(data)


@dataclass(frozen=True)
class Checkpoint:
    """A model that may or may not have been written. Never changed in place: operations return a new one.

    name: what it is called, a folder or a Hub id. config: config.json. tensors: in the order in which they lie in their files.
    files: the small files, copied or given. lineage: downcycle.json, how it was made from what; empty for a model not made here.
    """

    name: str
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    files: Mapping[str, Span | bytes] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    revision: str | None = None
    lineage: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """How many decoder layers the config states."""
        depth = num_layers(self.config)
        if not 1 <= depth <= len(self.tensors):
            raise DowncycleError(f"{self.name}/{CONFIG}: states {depth} layers; there are {len(self.tensors)} tensors. Fetch it again")
        return depth

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def num_elements(self) -> int:
        """Numbers stored: the parameters, where the weights are not packed."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the config and of every tensor's name, dtype and shape: equal for two copies of one architecture."""
        tensors = sorted((name, tensor.dtype, tensor.shape) for name, tensor in self.tensors.items())
        return sha256(json.dumps([self.config, tensors], sort_keys=True).encode()).hexdigest()


def open_checkpoint(src: str | Path, revision: str | None = None, *, trust_remote_code: bool = False) -> Checkpoint:
    """Open a folder, a Hub repo or the built-in model `demo` by reading its config and headers.

    Args:
        revision: branch, tag or commit of a Hub repo.
        trust_remote_code: accept a model that transformers cannot load without Python code of its own (copied, never run here).
    Raises:
        DowncycleError: not a safetensors checkpoint, or a damaged one.
    """
    source = find_source(src, revision)
    config = _config(source, trust_remote_code)
    tensors, metadata = _tensors(source)
    files = {path: Span(source, path, 0, size) for path, size in source.files.items() if belongs(path, trust_remote_code)}
    lineage = load_json(source, LINEAGE) if LINEAGE in source.files else {}
    return Checkpoint(source.name, config, tensors, files, metadata, source.revision, lineage)


def find_source(src: str | Path, revision: str | None = None) -> Source:
    """Say where `src` is: the built-in model, a folder on this machine, or a Hub repo. A Path is always a folder."""
    text = str(src)
    folder = DEMO_FOLDER if src == DEMO else Path(os.path.expanduser(text))
    if text and os.path.isdir(folder):
        if revision:
            raise DowncycleError(f"--revision {revision}: {text} is a folder, and only a Hub repo has revisions; leave it out")
        return LocalFolder(folder, name=text)
    if os.path.isfile(folder):
        raise DowncycleError(f"{text}: a file; give the folder that holds config.json and the safetensors files")
    if isinstance(src, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text):
        raise DowncycleError(f"{text or repr(text)}: no such folder, and not a Hub id (USER/NAME); check the path")
    from .hub import open_hub

    return open_hub(text, revision)


def split_revision(src: str) -> tuple[str, str | None]:
    """Split USER/NAME@REVISION, unless a folder has that name."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+@[\w./-]+", src) and not os.path.exists(src):
        name, _, revision = src.partition("@")
        return name, revision
    return src, None


def load_json(source: Source, path: str) -> dict[str, Any]:
    """Read a JSON object from a source."""
    where = f"{source.name}/{path}"
    if path not in source.files:
        raise DowncycleError(f"{where}: not there; a checkpoint folder holds {CONFIG} and safetensors files")
    if source.files[path] > MAX_HEADER_BYTES:
        raise DowncycleError(f"{where}: {source.files[path]} bytes long, too long for what it should be; fetch it again")
    try:
        value = json.loads(source.read(path, 0, source.files[path]))
        if _nesting(value) > 100:
            raise ValueError("nested too deeply")
    except (ValueError, RecursionError) as error:
        raise DowncycleError(f"{where}: not valid JSON ({str(error)[:80]}); fetch it again") from error
    if not isinstance(value, dict):
        raise DowncycleError(f"{where}: holds no JSON object; fetch it again")
    return value


def _nesting(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_nesting, items), default=0)


def _config(source: Source, trust_remote_code: bool) -> dict[str, Any]:
    if ADAPTER_CONFIG in source.files and (CONFIG not in source.files or not {SINGLE, INDEX} & source.files.keys()):
        raise DowncycleError(
            f"{source.name}: an adapter, not a model; merge it into its base model first: downcycle merge BASE {source.name} --out DIR"
        )
    config = load_json(source, CONFIG)
    if not isinstance(config.get("model_type"), str | None):
        raise DowncycleError(f"{source.name}/{CONFIG}: model_type is no name; fetch it again")
    if config.get("auto_map") and not trust_remote_code and not is_native(config):
        raise DowncycleError(
            f"{source.name}: needs the Python code that comes with it, as transformers has no {config.get('model_type')!r}; if you trust "
            "it, give --trust-remote-code: the code is copied, not run, and the cut is by general rules"
        )
    if not trust_remote_code and TOKENIZER in source.files and "auto_map" in load_json(source, TOKENIZER):
        raise DowncycleError(
            f"{source.name}: its tokenizer needs Python code that comes with it; if you trust it, give --trust-remote-code: "
            "the code is copied, not run"
        )
    return config


def _tensors(source: Source) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the headers of every shard, several at once where the source takes several connections."""
    weight_map = _weight_map(source)
    shards = sorted(set(weight_map.values()))
    with ThreadPoolExecutor(source.connections) as pool:
        headers = dict(zip(shards, pool.map(lambda path: read_header(source, path), shards), strict=True))
    tensors: dict[str, Tensor] = {}
    for path, (entries, _) in headers.items():
        for name, tensor in entries.items():
            if name in tensors:
                raise DowncycleError(f"{source.name}: tensor {name[:80]!r} stands in two shards, one of them {path}; fetch it again")
            tensors[name] = tensor
    for name, path in weight_map.items():
        if name and name not in headers[path][0]:
            raise DowncycleError(f"{source.name}/{INDEX}: puts {name[:80]!r} into {path}, which does not hold it; fetch both again")
    if not any(tensor.nbytes for tensor in tensors.values()):
        raise DowncycleError(f"{source.name}: its safetensors files hold no weights; fetch it again")
    return tensors, next(iter(headers.values()))[1]


def read_header(source: Source, path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of one safetensors file, and its metadata; reads the header only."""
    size, where = source.files[path], f"{source.name}/{path}"
    length = header_length(source.read(path, 0, min(LENGTH_BYTES, size)), size, where)
    entries, metadata = parse_header(source.read(path, LENGTH_BYTES, length), size, where)
    return {
        name: Tensor(dtype, shape, Span(source, path, start, end - start)) for name, (dtype, shape, start, end) in entries.items()
    }, metadata


def _weight_map(source: Source) -> dict[str, str]:
    """Map each tensor that the index names to its shard; one file that holds all, which transformers prefers, is named without tensors."""
    if SINGLE in source.files:
        return {"": SINGLE}
    if INDEX not in source.files:
        single = [path for path in source.files if "/" not in path and path.endswith(".safetensors")]
        if len(single) == 1:
            return {"": single[0]}
        raise _no_weights(source, single)
    weight_map = load_json(source, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(path, str) for path in weight_map.values()):
        raise DowncycleError(f"{source.name}/{INDEX}: has no weight_map from tensors to files; fetch it again")
    for path in set(weight_map.values()):
        if leads_out(path):
            raise DowncycleError(f"{source.name}/{INDEX}: names the file {path!r}, which lies outside the checkpoint; do not trust it")
        if path not in source.files:
            raise DowncycleError(f"{source.name}: the index names {path!r}, which is not there; fetch it again")
    return weight_map


def _no_weights(source: Source, single: list[str]) -> DowncycleError:
    if single:
        return DowncycleError(f"{source.name}: {len(single)} safetensors files but no {INDEX}; fetch the repo whole")
    pickles = [path for path in source.files if any(fnmatch(path, pattern) for pattern in PICKLES)]
    if pickles:
        return DowncycleError(
            f"{source.name}: its weights are pickled ({pickles[0]}), which can run code when read. Convert them with: python -c "
            f"\"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{source.name}').save_pretrained('DIR')\""
        )
    return DowncycleError(f"{source.name}: no safetensors files; a checkpoint folder holds {CONFIG} and {SINGLE} or shards")
