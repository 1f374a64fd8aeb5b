"""The tokens that layers are scored on, and those that are kept out of it. Knows no text and no tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

# 32k tokens: what refits were tried with. Of as many tokens, more and shorter samples say more: they are of more documents, and each gives
# one angular distance. Gromov et al. and SLEB read 2048 at once, which few pages of the web have, and many have 512.
SAMPLES, LENGTH, SEED = 64, 512, 0


@dataclass(frozen=True)
class Sample:
    """A piece of one document as a model is given it. ids: [n] int64. given: how many of the first tokens are not predicted, 1 or more.

    document: its number, as tokens of one document resemble each other.
    """

    ids: np.ndarray
    given: int
    document: int

    @property
    def scored(self) -> int:
        """How many tokens are predicted."""
        return len(self.ids) - self.given


@dataclass(frozen=True)
class Calibration:
    """Samples to measure and fit on, and held-out ones, of other documents (or another part of a single one), for the reported losses.

    text, text_digest: where they are from, and the SHA-256 of its documents. digest: SHA-256 of all tokens and of what is scored.
    samples, length, seed: as asked for.
    """

    text: str
    text_digest: str
    digest: str
    samples: int
    length: int
    seed: int
    fit: tuple[Sample, ...]
    held_out: tuple[Sample, ...]

    def facts(self) -> dict[str, Any]:
        """Return what makes the samples again, and how many tokens they have, as JSON can hold it."""
        return {
            "text": self.text,
            "text_digest": self.text_digest,
            "digest": self.digest,
            "samples": self.samples,
            "length": self.length,
            "seed": self.seed,
            "tokens": sum(len(sample.ids) for sample in self.fit),
            "held_out_samples": len(self.held_out),
            "held_out_tokens": sum(len(sample.ids) for sample in self.held_out),
        }


@dataclass(frozen=True)
class Batch:
    """Samples of one length, which run together. ids: [samples, tokens] int64. given, documents: [samples]."""

    ids: np.ndarray
    given: tuple[int, ...]
    documents: tuple[int, ...]


def make_batches(samples: Sequence[Sample], tokens: int) -> list[Batch]:
    """Put samples of equal length together, the longest first, at most about `tokens` tokens in a batch. Nothing is padded."""
    return list(_batches(sorted(samples, key=lambda sample: -len(sample.ids)), tokens))


def _batches(samples: Sequence[Sample], tokens: int) -> Iterator[Batch]:
    import numpy as np

    for length, group in groupby(samples, lambda sample: len(sample.ids)):
        while some := list(islice(group, max(1, tokens // length))):
            yield Batch(np.stack([one.ids for one in some]), tuple(one.given for one in some), tuple(one.document for one in some))
