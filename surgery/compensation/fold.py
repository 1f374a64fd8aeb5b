"""Put fitted weights in the place of a parent's, and say in the child's lineage what was done. Fits nothing itself.

Fitted tensors lie in a safetensors file, under the names that they have in the parent: they are byte ranges like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapter.lowrank import FLOATS
from ..checkpoint import Checkpoint, Tensor, read_header
from ..errors import DowncycleError
from ..filenames import LINEAGE
from ..header import build_header
from ..layers import keep_layers
from ..sources import LocalFolder

if TYPE_CHECKING:
    import torch


METHODS = ("scale", "refit")
COMPENSATION, CALIBRATION = "compensation", "calibration"  # in downcycle.json


@dataclass(frozen=True)
class Fitted:
    """Weights that a method fitted, by their names in the parent, in its dtypes; notes: what the user is told of them."""

    tensors: Mapping[str, torch.Tensor]
    notes: tuple[str, ...] = ()


class Lazy(Mapping[str, "torch.Tensor"]):
    """Fitted weights by name, each made when it is asked for, as all of them may take as much memory as the model.

    Args:
        sources: what each is made of. make: makes one, of its name and its source.
    """

    def __init__(self, sources: Mapping[str, Any], make: Callable[[str, Any], torch.Tensor]):
        self.sources, self.make = sources, make

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.make(name, self.sources[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)


def save_fitted(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write fitted tensors, one at a time, whole or not at all."""
    import torch

    dtypes = {getattr(torch, word): dtype for dtype, word in FLOATS.items()}
    kinds = {name: (dtypes[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        file.write(build_header(kinds, {"format": "pt"}))
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
    partial.replace(path)


def open_fitted(path: Path) -> dict[str, Tensor]:
    """Return the tensors of such a file."""
    return read_header(LocalFolder(path.parent, name=str(path.parent)), path.name)[0]


def with_fitted(parent: Checkpoint, fitted: Mapping[str, Tensor]) -> Checkpoint:
    """Return a parent whose tensors of these names are others.

    Raises:
        DowncycleError: one has another dtype or shape than the parent's.
    """
    for name, tensor in fitted.items():
        known = parent.tensors.get(name)
        if known is None or (known.dtype, known.shape) != (tensor.dtype, tensor.shape):
            raise DowncycleError(f"{parent.name}: {name} was fitted for another model; delete the cache and fit it again")
    return replace(parent, tensors={name: fitted.get(name, tensor) for name, tensor in parent.tensors.items()})


def keep_compensated(parent: Checkpoint, layers: list[int], rule: str, fitted: Mapping[str, Tensor], how: Mapping[str, Any]) -> Checkpoint:
    """Return the child of these layers with fitted tensors in it.

    Args:
        how: what was done, for downcycle.json: the method, and what it was fitted on.
    """
    plain = keep_layers(parent, layers, rule)
    child = keep_layers(with_fitted(parent, fitted), layers, rule)
    changed = {name: tensor for name, tensor in child.tensors.items() if tensor.data != plain.tensors[name].data}
    digests = {name: _digest(tensor) for name, tensor in changed.items()}
    return replace(child, lineage={**child.lineage, COMPENSATION: {**how, "tensors": digests}})


def fitted_digests(lineage: Any) -> dict[str, str]:
    """Return the SHA-256 of each fitted tensor, by its name in the child, as downcycle.json says; nothing where none was fitted."""
    how = lineage.get(COMPENSATION) if isinstance(lineage, Mapping) else None
    digests = how.get("tensors") if isinstance(how, Mapping) else None
    return {str(name): str(digest) for name, digest in digests.items()} if isinstance(digests, Mapping) else {}


def take_fitted(expected: Checkpoint, found: Checkpoint) -> Checkpoint:
    """Return what a child must be: of its fitted tensors those that are found, where they have the digests that were noted.

    Raises:
        DowncycleError: a digest is noted of a tensor that the model has not.
    """
    digests = fitted_digests(found.lineage)
    fitted = {name: found.tensors[name] for name, digest in digests.items() if name in found.tensors}
    right = {name: tensor for name, tensor in fitted.items() if _digest(tensor) == digests[name]}
    if strange := [name for name in digests if name not in expected.tensors]:
        raise DowncycleError(f"{found.name}/{LINEAGE}: says that {strange[0][:80]} was fitted, which the model has not; it was changed")
    lineage = {name: found.lineage[name] for name in (COMPENSATION, CALIBRATION) if name in found.lineage}
    tensors = {name: right.get(name, tensor) for name, tensor in expected.tensors.items()}
    return replace(expected, tensors=tensors, lineage={**expected.lineage, **lineage})


def _digest(tensor: Tensor) -> str:
    digest = sha256()
    for piece in tensor.chunks():
        digest.update(piece)
    return digest.hexdigest()
