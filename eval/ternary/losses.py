"""What rounding costs: the loss of a model before and after its weights are packed, on one text. Neither needs to be written."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ...surgery.checkpoint import Checkpoint
from ...surgery.ternary.ternarize import norms
from ..measure.loading import fetch, load
from ..measure.perplexity import perplexity
from ..measure.text import Documents
from ..results import Perplexity

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Losses:
    """before: of the floating-point weights; None where stock transformers cannot run them. after: of the packed ones.

    guessing: ln of the number of tokens, in nats: the loss of who knows nothing.
    """

    before: Perplexity | None
    after: Perplexity
    guessing: float

    @property
    def cost(self) -> float | None:
        """What packing adds to the loss, in nats per token."""
        return None if self.before is None else self.after.loss - self.before.loss

    def facts(self) -> dict[str, Any]:
        """Spell it for JSON."""
        return {**asdict(self), "cost": self.cost}


def measure_losses(
    model: Checkpoint,
    packed: Checkpoint,
    text: Documents,
    *,
    trust_remote_code: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Losses:
    """Measure both, one after the other.

    Raises:
        DowncycleError: one of them cannot be loaded or measured here.
    """
    fetch(model)
    found: list[Perplexity | None] = []
    vocabulary = 1
    for name, one in (("float weights", model), ("ternary weights", packed)):
        if one is model and norms(model):  # which transformers would leave out
            found.append(None)
            continue
        progress(f"{name}: loading", 0, 0)
        loaded = load(one, trust_remote_code=trust_remote_code)
        found.append(perplexity(loaded, text, progress=partial(_told, progress, name)))
        vocabulary = len(loaded.tokenizer)
        del loaded
        gc.collect()
    before, after = found
    assert after is not None
    return Losses(before, after, math.log(vocabulary))


def _told(progress: Progress, name: str, what: str, done: int, total: int) -> None:
    progress(f"{name}, {what}", done, total)
