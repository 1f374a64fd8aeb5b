"""Prove that the files of a folder hold what a Checkpoint value says, byte for byte.

Reads both sides in pieces. Merges and conversions are computed again; everything else is compared without decoding a weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from os.path import commonprefix
from pathlib import Path
from typing import Any

from .checkpoint import DEMO, Checkpoint, Span, Tensor, file_bytes, open_checkpoint
from .choose import format_layers
from .compensation.fold import fitted_digests, take_fitted
from .errors import DowncycleError
from .filenames import LEGAL, LINEAGE
from .layers import keep_layers
from .lineage import CUT, MERGE, TERNARY
from .sources import Progress

# What downcycle.json says of each operation, beside its parent; of a cut it does not say that it is one.
OWN = {
    CUT: ("layers", "rule"),
    MERGE: ("adapter", "adapter_revision", "adapter_fingerprint"),
    TERNARY: ("linear", "include", "exclude", "dtype"),
}
SHOWN = 60  # characters of a value that differs
AGAIN = {CUT: "Cut", MERGE: "Merge", TERNARY: "Convert"}


@dataclass(frozen=True)
class Proof:
    """What was compared and found equal. what: the checkpoint in words; layers: those of the parent, where it is a cut."""

    parent: str
    what: str
    layers: list[int]
    tensors: int
    files: int
    bytes: int


def verify(
    folder: str | Path,
    src: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress = lambda count: None,
) -> Proof:
    """Make the checkpoint again, as a value, from its parent and downcycle.json, and compare the folder with it.

    Args:
        src: the parent, where it is not where downcycle.json says.
        adapter: the adapter that was merged, where it is not there.
        progress: called with the number of bytes of each step.
    Raises:
        DowncycleError: anything differs; names the first differences.
    """
    found = open_checkpoint(folder, trust_remote_code=trust_remote_code)
    expected = rebuild(found, src, adapter=adapter, trust_remote_code=trust_remote_code)
    faults = list(differences(expected, found, progress))
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        again = AGAIN[expected.lineage.get("operation", CUT)]
        raise DowncycleError(f"{folder} is not what {LINEAGE} says: {'; '.join(faults[:3])}{more}. {again} it again")
    lineage = expected.lineage
    layers = list(lineage.get("layers", ()))
    return Proof(lineage["parent"], _what(lineage, layers), layers, len(expected.tensors), len(expected.files) + 1, expected.nbytes)


def _what(lineage: Mapping[str, Any], layers: list[int]) -> str:
    """Say in words what a checkpoint was proved to be."""
    if layers:
        fitted = fitted_digests(lineage)
        more = f", {len(fitted)} tensors of them fitted, with the digests that {LINEAGE} states" if fitted else ""
        return f"layers {format_layers(layers)} of {lineage['parent']}{more}"
    if lineage["operation"] == TERNARY:
        return f"{lineage['parent']} with ternary weights"
    return f"{lineage['parent']} with {lineage['adapter']} merged into it"


def rebuild(
    made: Checkpoint, src: str | Path | None = None, *, adapter: str | Path | None = None, trust_remote_code: bool = False
) -> Checkpoint:
    """Return the value that a checkpoint was written from, by its downcycle.json."""
    if not made.lineage:
        raise DowncycleError(f"{made.name}: holds no {LINEAGE}; only a folder that downcycle wrote can be verified")
    if adapter is not None and made.lineage.get("operation") != MERGE:
        raise DowncycleError(f"--adapter {adapter}: no adapter was merged into {made.name}; leave it out")
    return take_fitted(_replay(made.lineage, made.name, src, adapter, trust_remote_code), made)


def parent_of(made: Checkpoint, *, trust_remote_code: bool = False) -> Checkpoint:
    """Return the value that the last operation on a checkpoint took, by its downcycle.json: opened, or made again where it was not written.

    Raises:
        DowncycleError: it was not made here, or its parent is gone or another one now.
    """
    _own(made.lineage, made.name)
    return _find_parent(made.lineage, made.name, None, trust_remote_code)


def _replay(lineage: Any, name: str, src: str | Path | None, adapter: str | Path | None, trust_remote_code: bool) -> Checkpoint:
    """Do again what one link of the chain says."""
    operation, own = _own(lineage, name)
    parent = _find_parent(lineage, name, src, trust_remote_code)
    if operation == TERNARY:
        return _convert_again(parent, name, *own)
    return keep_layers(parent, *own) if operation == CUT else _merge_again(parent, name, adapter, *own)


def _own(lineage: Any, name: str) -> tuple[str, list[Any]]:
    """Return which operation a link is of, and what it says of that one; refuse what is no link."""
    operation = lineage.get("operation", CUT) if isinstance(lineage, Mapping) else None
    if not isinstance(operation, str) or operation not in OWN:
        raise DowncycleError(
            f"{name}/{LINEAGE}: speaks of {str(operation)[:40]!r}, which is not known here; it was changed, or is a newer version's"
        )
    try:
        own = [lineage[key] for key in OWN[operation]]
        parent_name, *_ = (lineage[key] for key in ("parent", "fingerprint", "revision"))
    except KeyError as error:
        raise DowncycleError(f"{name}/{LINEAGE}: lacks {error}; it was changed, or is another version's") from error
    if not isinstance(parent_name, str) or operation == CUT and not _are_layers(own[0]):
        raise DowncycleError(f"{name}/{LINEAGE}: names no parent or no list of layers; it was changed")
    return operation, own


def _find_parent(lineage: Mapping[str, Any], name: str, src: str | Path | None, trust_remote_code: bool) -> Checkpoint:
    """Open what an operation was done on, or make it again where it was never written, or is gone."""
    parent, fault, before = None, None, lineage.get("parent_lineage")
    try:
        parent = _open_parent(lineage, name, src, trust_remote_code)
    except DowncycleError as error:
        fault = error
    if before and (parent is None or parent.lineage != before):  # it was never written, or is gone: it can be made as it was made
        with suppress(DowncycleError):
            if fitted_digests(before):
                raise DowncycleError(f"{lineage['parent']}: holds weights that were fitted, and cannot be made again without it")
            made = _replay(before, name, src, None, trust_remote_code)
            parent = replace(made, name=lineage["parent"]) if made.fingerprint == lineage["fingerprint"] else parent
    if parent is None:
        raise fault or AssertionError
    return parent


def _open_parent(lineage: Mapping[str, Any], name: str, src: str | Path | None, trust_remote_code: bool) -> Checkpoint:
    parent_name, revision = lineage["parent"], lineage["revision"]
    where: str | Path = parent_name if revision or parent_name == DEMO else Path(parent_name)  # a folder is never looked for on the Hub
    if src is not None and str(src) != parent_name:
        where, revision = src, None
    try:
        parent = open_checkpoint(where, revision, trust_remote_code=trust_remote_code)
    except DowncycleError as error:
        if src is not None:
            raise
        raise DowncycleError(f"{error}. If the parent of {name} lies elsewhere now, give it with --src") from error
    if parent.fingerprint != lineage["fingerprint"]:
        raise DowncycleError(f"{parent.name} is not the parent of {name}: config or tensors differ; give the parent with --src")
    return parent


def _merge_again(
    parent: Checkpoint, name: str, given: str | Path | None, recorded: Any, revision: str | None, fingerprint: Any
) -> Checkpoint:
    from .adapter.merge import find_adapter, merge_found

    if not isinstance(recorded, str):
        raise DowncycleError(f"{name}/{LINEAGE}: names no adapter; it was changed")
    where: str | Path = recorded if revision else Path(recorded)
    if given is not None and str(given) != recorded:
        where, revision = given, None
    try:
        source = find_adapter(where, revision)
    except DowncycleError as error:
        if given is not None:
            raise
        raise DowncycleError(f"{error}. If the adapter merged into {name} lies elsewhere now, give it with --adapter") from error
    made = merge_found(parent, source)
    if made.lineage["adapter_fingerprint"] != fingerprint:
        raise DowncycleError(f"{where} is not the adapter merged into {name}: config or tensors differ; give that one with --adapter")
    return made


def _convert_again(parent: Checkpoint, name: str, linear: Any, include: Any, exclude: Any, dtype: Any) -> Checkpoint:
    from .ternary.rule import Rule
    from .ternary.ternarize import ternarize

    if not all(isinstance(patterns, list) and all(isinstance(one, str) for one in patterns) for patterns in (include, exclude)):
        raise DowncycleError(f"{name}/{LINEAGE}: names no list of patterns; it was changed")
    return ternarize(parent, linear=str(linear), rule=Rule(include, exclude), dtype=str(dtype))


def _are_layers(value: Any) -> bool:
    return isinstance(value, list) and all(type(layer) is int for layer in value)


def differences(expected: Checkpoint, found: Checkpoint, progress: Progress = lambda count: None) -> Iterator[str]:
    """Yield each way in which two checkpoints differ, in words; nothing where they are equal.

    A licence text that was added is no difference: licences ask those who publish a model to add some.
    """
    for key in sorted({*expected.config, *found.config}):
        wanted, there = _spell(expected.config, key), _spell(found.config, key)
        if wanted != there:
            same = len(commonprefix([wanted, there])) if min(len(wanted), len(there)) > SHOWN else 0
            start = max(0, same - SHOWN // 2)
            yield f"config.json: {key} is {there[start : start + SHOWN]} instead of {wanted[start : start + SHOWN]}"
    for path, data in expected.files.items():
        if path not in found.files:
            yield f"{path} is missing"
        elif file_bytes(data) != file_bytes(found.files[path]):
            yield f"{path} differs"
    for path in (path for path in found.files if path not in expected.files and not path.startswith(LEGAL)):
        yield f"{path} does not belong"
    for name in (name for name in found.tensors if name not in expected.tensors):
        yield f"tensor {name} does not belong"
    for name, tensor in expected.tensors.items():
        if name not in found.tensors:
            yield f"tensor {name} is missing"
        elif fault := _differ(tensor, found.tensors[name], progress):
            yield f"tensor {name} {fault}"


def _spell(config: dict[str, Any], key: str) -> str:
    """Spell a value as JSON: there true is not 1, and NaN is NaN."""
    return json.dumps(config[key], sort_keys=True) if key in config else "absent"


def _differ(expected: Tensor, found: Tensor, progress: Progress) -> str:
    if (expected.dtype, expected.shape) != (found.dtype, found.shape):
        return f"is {found.dtype} {list(found.shape)} instead of {expected.dtype} {list(expected.shape)}"
    assert isinstance(found.data, Span)
    done = 0
    for chunk in expected.chunks():
        if found.data.source.read(found.data.path, found.data.start + done, len(chunk)) != chunk:
            return f"differs between bytes {done} and {done + len(chunk)}"
        done += len(chunk)
        progress(len(chunk))
    return ""
