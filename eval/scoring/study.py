"""A model, the samples that its layers are scored on, and where what is measured of them is kept. Measures nothing itself."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from ...recipes.memory import format_gib, model_size, weight_bytes
from ...surgery.checkpoint import Checkpoint
from ...surgery.errors import DowncycleError
from ...surgery.importance.calibration import Batch, Calibration, Sample, make_batches
from ...surgery.importance.parts import Parts
from ...surgery.importance.states import States
from ...surgery.stack import split_layers
from ..cache import keep, key_of, recall
from ..content import cache_folder
from ..machine import release_of
from ..measure.loading import WORKING, fetch, load_options
from ..measure.memory import free_memory
from ..measure.uncompiled import uncompiled

NUMBERS = {"cpu": 1 << 23, "cuda": 1 << 28}  # that a batch makes of the widest matrix of a layer
TOKENS = 8192  # in a batch at most; more at once is no faster
ENDS = {"fp32": 4, "bf16": 2, "int8": 2, "nf4": 2}  # bytes of a weight of the embeddings and the head
RESIDENT = 0.5  # of a GPU's free memory: a model that takes no more stays loaded
SMALL = 1 << 28  # bytes of a model that stays loaded on a CPU; of larger ones the kernel keeps the files in memory as far as it has any
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Study:
    """One model on one calibration, loaded in one way on one device. content: the model's digest.

    load: stored, bf16, fp32, int8 or nf4. device: as torch names it.
    """

    checkpoint: Checkpoint
    content: str
    calibration: Calibration
    load: str = "stored"
    device: str = "cpu"
    progress: Progress = field(default=lambda what, done, total: None, compare=False)

    @cached_property
    def parts(self) -> Parts:
        """The model, taken apart; its files are fetched first, where it lies on the Hub."""
        self.progress("opening the model", 0, 0)
        fetch(self.checkpoint)
        resident = check_memory(self.checkpoint, self.load, self.device)
        return Parts(self.checkpoint, device=self.device, resident=resident, **load_options(self.checkpoint, self.load, self.device))

    @cached_property
    def fit(self) -> list[Batch]:
        """The samples to measure and fit on."""
        return self._batches(self.calibration.fit)

    @cached_property
    def held_out(self) -> list[Batch]:
        """The samples whose losses are reported."""
        return self._batches(self.calibration.held_out)

    def _batches(self, samples: Sequence[Sample]) -> list[Batch]:
        widest = max(size for layer in split_layers(self.checkpoint).layers for tensor in layer.values() for size in tensor.shape)
        return make_batches(samples, min(TOKENS, NUMBERS[self.device.partition(":")[0]] // widest))

    @cached_property
    def key(self) -> str:
        """All that decides what is measured, beside the model."""
        releases = [release_of(name) for name in ("torch", "transformers", "bitsandbytes")]
        return key_of("layers", self.calibration.digest, self.load, self.device.partition(":")[0], releases)

    @property
    def folder(self) -> Path:
        """Where the states of a run stand, until it is done."""
        return cache_folder() / "layers" / f"{self.content[:16]}-{self.key[:16]}"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let other runs that measure the same wait until this one is done: they find then what it measured.

        Raises:
            DowncycleError: nothing can be kept in the cache.
            KeyboardInterrupt: with what becomes of the work.
        """
        place = self.folder.with_name(f"{self.folder.name}.lock")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise DowncycleError(f"{cache_folder()}: nothing can be kept there ({error.strerror}); give another DOWNCYCLE_CACHE") from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.progress("waiting for another run that measures the same", 0, 0)
                fcntl.flock(lock, fcntl.LOCK_EX)
            with uncompiled(self.checkpoint, self.device):
                yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; the same command goes on from where it was") from None
        finally:
            os.close(lock)

    def states(self, *what: object) -> States:
        """Return the place of one pass's states."""
        return States(self.folder / key_of(*what)[:16])

    def recall(self, *what: object) -> Any:
        """Return what was measured before; None where it was not."""
        return recall(self.content, key_of(self.key, *what))

    def keep(self, value: Any, *what: object) -> Any:
        """Keep what was measured, and return it."""
        keep(self.content, key_of(self.key, *what), value)
        return value


def check_memory(checkpoint: Checkpoint, load: str, device: str) -> bool:
    """Whether the whole model fits, so that layers can stay loaded; refuse one of which not even one layer does."""
    size, rest = model_size(checkpoint), split_layers(checkpoint).rest.values()
    whole = checkpoint.nbytes if load == "stored" else weight_bytes(size, load)
    ends = sum(tensor.nbytes if load == "stored" else prod(tensor.shape) * ENDS[load] for tensor in rest)
    largest = (whole - ends) * max(size.layer_elements) / sum(size.layer_elements)
    needs, free = largest + ends + WORKING, free_memory(device)
    if needs > free:
        raise DowncycleError(
            f"{checkpoint.name}: one layer as {load} takes {format_gib(largest)}, embeddings and head {format_gib(ends)}, "
            f"{format_gib(needs)} with what is computed, and {device} has {format_gib(free)} free; use a machine with more memory"
        )
    return whole <= SMALL if device == "cpu" else whole + WORKING <= RESIDENT * free


def check_equations(checkpoint: Checkpoint, device: str) -> None:
    """Refuse to fit maps whose equations do not fit into memory: sums, Cholesky factor and work space, [inputs, inputs] float64 each."""
    size = model_size(checkpoint)
    sides = [max(one.rows, one.columns) for one in size.matrices if size.hidden in (one.rows, one.columns) and not one.routed]
    widest = max(sides, default=size.hidden)
    needs, free = 8 * 3 * widest * (widest + size.hidden) + WORKING, free_memory(device)
    if needs > free:
        raise DowncycleError(
            f"{checkpoint.name}: fitting a map of {widest} inputs takes {format_gib(needs)}, its equations being float64, and {device} has "
            f"{format_gib(free)} free; try --compensate scale, or use a machine with more memory"
        )
