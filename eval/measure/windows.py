"""Cut documents into the windows that a model reads: which tokens it is given, and which it must predict. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...surgery.errors import DowncycleError

if TYPE_CHECKING:
    import numpy as np

TOGETHER = 64  # documents that are tokenized in one call


@dataclass(frozen=True)
class Passage:
    """A document as a model is given it. ids: [n] int64. given: how many of the first tokens are context and not predicted.

    bytes: of UTF-8, that the predicted tokens spell.
    """

    ids: np.ndarray
    given: int
    bytes: int

    @property
    def scored(self) -> int:
        """How many tokens are predicted."""
        return max(0, len(self.ids) - self.given)


@dataclass(frozen=True)
class Window:
    """Tokens start <= i < stop of a document, of which those from `first` on predict their successors."""

    document: int
    start: int
    first: int
    stop: int

    @property
    def length(self) -> int:
        """Tokens that are read."""
        return self.stop - self.start

    @property
    def scored(self) -> int:
        """Tokens that are predicted."""
        return self.stop - self.first


def to_passages(tokenizer: Any, texts: Sequence[str], progress: Callable[[int], None] = lambda count: None) -> list[Passage]:
    """Tokenize documents as Axolotl's `type: completion` does for training: with the special tokens that the tokenizer itself adds.

    What it puts in front (BOS) is context; where it puts nothing, the end-of-text token that stood before each document in training is;
    where there is none either, the first token is context. What it puts behind is left out, as no text.

    Args:
        progress: called with the number of documents of each step.
    """
    passages: list[Passage] = []
    for start in range(0, len(texts), TOGETHER):
        some = list(texts[start : start + TOGETHER])
        rows = tokenizer(some, verbose=False, return_attention_mask=False, return_special_tokens_mask=True)
        masks = rows["special_tokens_mask"]
        passages += [_passage(tokenizer, *row) for row in zip(some, rows["input_ids"], masks, strict=True)]
        progress(len(some))
    return passages


def _passage(tokenizer: Any, text: str, ids: list[int], special: list[int]) -> Passage:
    import numpy as np

    before = next((place for place, mark in enumerate(special) if not mark), len(ids))
    after = next((place for place, mark in enumerate(reversed(special)) if not mark), 0)
    ids, size = ids[: len(ids) - after], len(text.encode())
    if not before and tokenizer.eos_token_id is not None:
        ids, before = [tokenizer.eos_token_id, *ids], 1
    elif not before and ids:
        before, size = 1, size - min(size, len(tokenizer.decode(ids[:1]).encode()))
    return Passage(np.array(ids, dtype=np.int64), before, size)


def check_vocabulary(name: str, tokenizer: Any, passages: Sequence[Passage], rows: int) -> None:
    """Refuse tokens that a model of this name has no embeddings for.

    Args:
        rows: how many tokens it has embeddings for.
    """
    highest = max((int(passage.ids.max()) for passage in passages if len(passage.ids)), default=0)
    if highest >= rows:
        raise DowncycleError(
            f"{name}: its tokenizer gives token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}), and the model has embeddings for "
            f"0-{rows - 1}; put the tokenizer that it was trained with into its folder"
        )


def check_length(name: str, length: int, limit: int | None) -> None:
    """Refuse more tokens at once than a model of this name has positions (None: no limit)."""
    if limit and length > limit:
        raise DowncycleError(f"length {length}: {name} has {limit} positions; give at most that many tokens")


def to_windows(passages: Sequence[Passage], length: int, stride: int) -> Iterator[Window]:
    """Slide a window over each document, so that each of its tokens is predicted once.

    The first window predicts all that it can; each further one begins `stride` tokens later and predicts what the one before did not
    reach, so that a token is predicted from at least length - stride + 1 tokens, once so many stand before it.

    Args:
        length: of a window, in tokens that are read. stride: from 1 to length.
    """
    for number, passage in enumerate(passages):
        first, end = max(passage.given, 1) - 1, len(passage.ids) - 1  # the last token predicts nothing
        start = 0
        while first < end:
            stop = min(start + length, end)
            if first < stop:
                yield Window(number, start, first, stop)
                first = stop
            start += stride
