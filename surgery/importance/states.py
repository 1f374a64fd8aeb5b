"""What stands between the layers, kept on disk: memory stays small, and a killed run goes on after the last finished layer.

A folder for each depth, which holds a state for each path and batch. Each file begins with the CRC-32 of the rest, as torch does not check
what it reads. Knows no model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any
from zlib import crc32

from ..choose import format_layers
from ..errors import DowncycleError
from .parts import State

WHOLE = "whole"  # the name of the path that leaves no layer out
DONE = "done"  # stands in a depth's folder once that is whole


class States:
    """States by depth, path and batch. A path is the set of layers that it has dropped so far.

    Args:
        folder: of this one pass over the layers; what an earlier run left in it is used.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def finished(self) -> tuple[int, Any]:
        """Return the deepest depth that is whole, and what was noted there; 0 and None at the beginning.

        Raises:
            DowncycleError: a damaged file, here as in `get`; all are deleted then.
        """
        marks = [path.parent for path in self.folder.glob(f"*/{DONE}")]
        if not marks:
            return 0, None
        deepest = max(marks, key=lambda folder: int(folder.name))
        return int(deepest.name), self._read(deepest / DONE, "cpu")

    def put(self, depth: int, path: Iterable[int], batch: int, state: State | None) -> None:
        """Keep a state."""
        self._save(None if state is None else (state.returned, state.shared), self._file(depth, path, batch))

    def get(self, depth: int, path: Iterable[int], batch: int, device: str = "cpu") -> State | None:
        """Return a state; None where no layer has been run yet."""
        if depth == 0:
            return None
        found = self._read(self._file(depth, path, batch), device)
        return None if found is None else State(*found)

    def pass_on(self, depth: int, path: Iterable[int], batch: int, number: int) -> None:
        """Let a path that drops layer `number` stand behind it as it stood before it."""
        if depth == 0:
            self.put(1, [number], batch, None)
            return
        source, target = self._file(depth, path, batch), self._file(depth + 1, [*path, number], batch)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                os.link(source, target)
            except OSError:  # this file system has no links
                shutil.copyfile(source, target)
        except OSError as error:
            raise _no_room(self.folder, error) from error

    def finish(self, depth: int, notes: Any, keep: bool = False) -> None:
        """Mark a depth as whole, and let the one before go, or all of it but the whole model's states where those are kept.

        Args:
            notes: numbers, text and tensors, for the run that goes on from here.
        """
        mark = self.folder / str(depth) / DONE
        self._save(notes, partial := mark.with_suffix(".partial"))
        partial.replace(mark)
        before = self.folder / str(depth - 1)
        if not keep:
            shutil.rmtree(before, ignore_errors=True)
            return
        for file in before.glob("*.pt"):
            if not file.name.startswith(f"{WHOLE}."):
                file.unlink()

    def part(self, name: str) -> States:
        """Return the states of something else that goes on beside, in a folder of this one."""
        return States(self.folder / name)

    def clear(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.folder.parent.rmdir()  # the last one

    def _save(self, value: Any, file: Path) -> None:
        import torch

        try:
            torch.save(value, data := BytesIO())
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "wb") as target:
                target.write(crc32(data.getbuffer()).to_bytes(4, "big"))
                target.write(data.getbuffer())
        except OSError as error:
            raise _no_room(self.folder, error) from error

    def _read(self, file: Path, device: str) -> Any:
        import torch

        with suppress(OSError), open(file, "rb") as source:
            stated, data = source.read(4), source.read()
            if stated == crc32(data).to_bytes(4, "big"):
                return torch.load(BytesIO(data), map_location=device, weights_only=True)
        self.clear()
        raise DowncycleError(f"{file}: what was left there is damaged or gone, and the rest is deleted now; run the same once more")

    def _file(self, depth: int, path: Iterable[int], batch: int) -> Path:
        return self.folder / str(depth) / f"{format_layers(sorted(path)) or WHOLE}.{batch}.pt"


def _no_room(folder: Path, error: Exception) -> DowncycleError:
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free / 1e9
    said = getattr(error, "strerror", None) or " ".join(str(error).split())[:80]
    return DowncycleError(
        f"{folder}: cannot hold the hidden states ({said}; {free:.1f} GB free); give fewer --samples, or another place as DOWNCYCLE_CACHE"
    )
