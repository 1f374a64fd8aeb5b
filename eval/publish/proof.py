"""Prove, before anything is sent, that a folder is what it says: a model, equal to what it was made from, or an adapter that fits.

Reads the folder and what it was made from; changes nothing and asks nothing of the Hub but a parent that lies there.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ...surgery.adapter.merge import PICKLE, WEIGHTS, merge_adapter
from ...surgery.checkpoint import DEMO, Checkpoint, Span, load_json, open_checkpoint, read_header
from ...surgery.errors import DowncycleError
from ...surgery.filenames import ADAPTER_CONFIG, LINEAGE
from ...surgery.sources import LocalFolder, Progress
from ...surgery.verify import verify

OTHER_FORMATS = (
    *(".gguf", ".ggml", ".llamafile", ".onnx", ".onnx_data", ".npz", ".npy", ".h5", ".hdf5", ".msgpack", ".tflite", ".pb", ".mlmodel"),
)


@dataclass(frozen=True)
class Proof:
    """What was proved of a folder, in words. weights: the safetensors files that it is about."""

    words: str
    weights: frozenset[str]
    notes: tuple[str, ...] = ()


def prove_model(
    found: Checkpoint,
    src: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress = lambda count: None,
) -> Proof:
    """Compare a model with what its downcycle.json says it was made from, byte for byte; of a model without one, every header was read.

    Args:
        src: the parent, where it is not where downcycle.json says.
        adapter: the adapter that was merged, where it is not there.
        progress: called with the number of bytes of each step.
    Raises:
        DowncycleError: anything differs, or the parent cannot be opened.
    """
    weights = frozenset(tensor.data.path for tensor in found.tensors.values() if isinstance(tensor.data, Span))
    if not found.lineage:
        if src is not None or adapter is not None:
            given = f"--src {src}" if src is not None else f"--adapter {adapter}"
            raise DowncycleError(f"{given}: {found.name} holds no {LINEAGE}, so it cannot be compared; leave it out")
        note = f"nothing proves where these weights come from, as there is no {LINEAGE}"
        return Proof(f"whole: {len(found.tensors)} tensors", weights, (note,))
    proof = verify(Path(found.name), src, adapter=adapter, trust_remote_code=trust_remote_code, progress=progress)
    return Proof(f"verified: {proof.what}, {proof.tensors} tensors and {proof.files} files equal", weights)


def prove_adapter(folder: Path, src: str | Path | None = None) -> Proof:
    """Read an adapter's config and header, and lay it onto its base model, where that is on this machine.

    Args:
        src: the base, where it is not where adapter_config.json says.
    Raises:
        DowncycleError: it is damaged, holds nothing, or does not fit.
    """
    source = LocalFolder(folder)
    config = load_json(source, ADAPTER_CONFIG)
    if WEIGHTS not in source.files:
        there = f"only the pickled {PICKLE}" if PICKLE in source.files else "no weights"
        raise DowncycleError(f"{folder}: an adapter with {there}; it needs {WEIGHTS}: save it again, with peft's save_pretrained")
    stored, _ = read_header(source, WEIGHTS)
    if not stored:
        raise DowncycleError(f"{folder}/{WEIGHTS}: holds no tensors; nothing was trained: save the adapter again")
    words, note = _lay_on(folder, src if src is not None else _base_at_hand(config.get("base_model_name_or_path")), src is not None)
    return Proof(f"{words}: {len(stored)} tensors", frozenset([WEIGHTS]), (note,) if note else ())


def _base_at_hand(named: object) -> str | Path | None:
    """Return the base model that an adapter names, where it is on this machine."""
    if not isinstance(named, str) or named == DEMO:
        return named if isinstance(named, str) else None
    return Path(named) if os.path.isdir(named) else None


def _lay_on(folder: Path, base: str | Path | None, was_given: bool) -> tuple[str, str]:
    """Merge an adapter into its base as a value, which is not written; return what that proves, and a note where it could not be done."""
    if base is None:
        return "whole", "the adapter was not held against its base model, which is not on this machine; --src gives it"
    if not was_given and importlib.util.find_spec("torch") is None:
        return "whole", "the adapter was not held against its base model, for which PyTorch is needed: pip install 'downcycle[score]'"
    merge_adapter(open_checkpoint(base), folder)
    return f"fits {base}", ""


def foreign_weights(paths: Iterable[str], proof: Proof) -> list[str]:
    """Return the safetensors files among these paths of which nothing was proved."""
    return [path for path in paths if path.endswith(".safetensors") and path not in proof.weights]


def other_weights(paths: Iterable[str]) -> list[str]:
    """Return those of these paths that hold weights in another format, such as a GGUF made from the model; none of them was compared."""
    return [path for path in paths if path.lower().endswith(OTHER_FORMATS)]
