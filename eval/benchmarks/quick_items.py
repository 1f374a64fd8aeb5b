"""The items of the two quick benchmarks, made from a text of documents; the same text gives the same items on every machine.

lm-eval runs this file by its path, so that imports name the package. Knows nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from downcycle.recipes.demo.corpus import read_text

if TYPE_CHECKING:
    from datasets import Dataset

ITEMS = 500
ENDING, SHORTEST, LONGEST = 6, 20, 60  # words: of an ending, of a context at least and at most
CHOICES = 4


def endings(text: str, **metadata: Any) -> dict[str, Dataset]:
    """Return the items of downcycle_endings: a paragraph without its last words, and four endings of paragraphs of its document.

    Args:
        text: path of the documents, from the folder of this file.
        metadata: the rest of what the task's YAML says of itself.
    """
    items = []
    for document in _documents(text):
        paragraphs = [words for part in document.split("\n\n") if len(words := part.split()) >= SHORTEST + ENDING]
        ends = list(dict.fromkeys(" ".join(words[-ENDING:]) for words in paragraphs))
        if len(ends) >= CHOICES:
            items += [_choice(words, ends) for words in paragraphs]
    return _dataset(items)


def last_words(text: str, **metadata: Any) -> dict[str, Dataset]:
    """Return the items of downcycle_last_word: a passage, and the word of four letters or more that ends its last sentence.

    Only words that stand in the passage before: a model that reads it has them at hand. Arguments as of `endings`.
    """
    items = []
    for document in _documents(text):
        words = document.split()
        for end in range(LONGEST, len(words)):
            context = words[end - LONGEST : end]
            last = re.fullmatch(r"([a-z]{4,})\.", words[end])
            if last and last[1] in (re.sub(r"\W", "", word).lower() for word in context):
                items.append({"context": " ".join(context), "word": last[1]})
    return _dataset(items)


def _documents(text: str) -> list[str]:
    return read_text(Path(__file__).parent / text)


def _choice(words: list[str], ends: list[str]) -> dict[str, Any]:
    """Put a paragraph's own ending among three others; a hash chooses them and the place of the right one."""
    context, own = " ".join(words[:-ENDING][-LONGEST:]), " ".join(words[-ENDING:])
    others = _shuffled((end for end in ends if end != own), salt=context)[: CHOICES - 1]
    label = int.from_bytes(_hash(context)) % CHOICES
    return {"context": context, "endings": [*others[:label], own, *others[label:]], "label": label}


def _dataset(items: list[dict[str, Any]]) -> dict[str, Dataset]:
    from datasets import Dataset

    chosen = {item["context"]: item for item in items}
    return {"test": Dataset.from_list([chosen[context] for context in _shuffled(chosen)[:ITEMS]])}


def _shuffled(texts: Iterable[str], salt: str = "") -> list[str]:
    """Order by a hash: Python's own generator may draw otherwise in another release."""
    return sorted(texts, key=lambda text: _hash(salt + text))


def _hash(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()
