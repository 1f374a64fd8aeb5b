"""Draw the tokens that layers are scored and fitted on from a text, and others to report losses on. Loads no model.

What a user asks for is about samples * length tokens. So the longest pieces are drawn, at random among those about as long; of a text of
short documents, its pieces are what there is. Pieces are spread over as many documents as there are, as tokens of one resemble each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from random import Random
from typing import Any

from ...surgery.checkpoint import Checkpoint
from ...surgery.errors import DowncycleError
from ...surgery.families import read_config
from ...surgery.importance.calibration import LENGTH, SAMPLES, SEED, Calibration, Sample
from .loading import load_tokenizer, positions
from .text import BUILT_IN_TRAINING, Documents, as_documents, stream_documents
from .windows import Passage, check_length, check_vocabulary, to_passages

# A quarter is enough to tell cuts apart: with 16 samples, the built-in model's loss has a standard error of 0.18, and what a cut adds to it
# on the same tokens one of 0.04. Errors are taken across documents: of fewer than four they would say nothing.
HELD_OUT, FEWEST = 4, 4
POOL = 4  # of how many times the tokens that are needed the samples are drawn
CHARACTERS = 4  # in a token, as a first guess; where there are more, the text is read again, further
FURTHER = 8  # times as far
DOCUMENTS = 16  # that are read at least, however long they are, the longest not to their ends
SHORTEST = 8  # tokens that are still worth a try
Progress = Callable[[str, int, int], None]


def make_calibration(
    checkpoint: Checkpoint,
    text: str | None,
    *,
    samples: int = SAMPLES,
    length: int | None = None,
    seed: int = SEED,
    trust_remote_code: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Calibration:
    """Draw samples of a text, tokenized for a model, and held-out ones, a quarter as many and at least four.

    Documents are tokenized as in training and cut as there (see `to_passages`): the first piece of each has what the tokenizer puts in
    front, the further ones begin with their first token as context. No sample holds tokens of two documents. Of a large text, its first
    documents are read, about four times as many tokens as are needed, so that it does not matter how much lies behind them.

    Held-out samples are of other documents than the others; where they cannot be, as in a single long document, of the text's last part.
    The draw follows text, tokenizer, samples, length and seed alone.

    Args:
        text: what `stream_documents` reads for training; None: the built-in text to heal on.
        samples: to measure and fit on. length: of a sample at most, in tokens [default: 512, or the model's positions].
        progress: called with what is being done, how many documents are done, and of how many.
    Raises:
        DowncycleError: a text that cannot be read, or is too short; a length that the model cannot take; no tokenizer, or not the model's.
    """
    limit, rows = _limits(checkpoint)
    length = min(LENGTH, limit or LENGTH) if length is None else length
    _check(samples, length)
    check_length(checkpoint.name, length, limit)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code)
    documents, passages = _read(tokenizer, text, samples, length, progress)
    if rows:
        check_vocabulary(checkpoint.name, tokenizer, passages, rows)
    found = _candidates(passages, samples, length)
    if not found:
        raise _too_short(documents.name, passages, samples, length)
    random = Random(f"calibration {seed}")  # a string, as -1 and 1 would be the same seed
    for_fit, apart = _split(found, samples, random)
    fit, held_out = _draw(for_fit, samples, length, random), _draw(apart, held_out_samples(samples), length, random)
    return Calibration(documents.name, documents.digest, _digest(fit, held_out), samples, length, seed, fit, held_out)


def held_out_samples(samples: int) -> int:
    """How many samples are held out beside so many others."""
    return max(FEWEST, -(-samples // HELD_OUT))


def _check(samples: int, length: int) -> None:
    if samples < 1:
        raise DowncycleError(f"--samples {samples}: give a number from 1")
    if length < 2:
        raise DowncycleError(f"--length {length}: give a number from 2, as the first token of a sample is not predicted")


def _limits(checkpoint: Checkpoint) -> tuple[int | None, int | None]:
    """Return how many positions and embeddings a model has, as its config says; None where it does not."""
    config = read_config(checkpoint.config)
    try:
        text = config and config.get_text_config()
    except ValueError:  # two texts: what it reads, and what it writes
        text = None
    rows = getattr(text, "vocab_size", None)
    return positions(config) if text else None, rows if type(rows) is int and rows > 0 else None


# What is read of the text.


def _read(tokenizer: Any, text: str | None, samples: int, length: int, progress: Progress) -> tuple[Documents, list[Passage]]:
    """Read and tokenize enough of a text, or all of it."""
    name = BUILT_IN_TRAINING if text is None else text
    budget = POOL * CHARACTERS * length * max(DOCUMENTS, _needed(samples))
    while True:
        texts, all_read = _take(stream_documents(text, training=True, most=budget + 1), budget, progress)
        documents = as_documents(name, texts)
        most = _level([len(one) for one in texts], budget)
        passages = to_passages(tokenizer, [one[:most] for one in texts], _counted(progress, len(texts)))
        whole = [len(one) <= most for one in texts]
        passages = [one if whole[number] else _without_end(one, length) for number, one in enumerate(passages)]
        if _candidates(passages, samples, length) or (all_read and all(whole)):
            return documents, passages
        budget *= FURTHER


def _take(found: Iterator[str], budget: int, progress: Progress) -> tuple[list[str], bool]:
    """Take documents, until they are so many and have so many characters; say whether that is all of them."""
    texts: list[str] = []
    size = 0
    for one in found:
        texts.append(one)
        size += len(one)
        progress("reading the text", len(texts), 0)
        if size >= budget and len(texts) >= DOCUMENTS:
            return texts, False
    return texts, True


def _level(sizes: Sequence[int], budget: int) -> int:
    """Return how much of each document to take, so that all together give the budget, if they can."""
    for done, size in enumerate(sorted(sizes)):
        left = len(sizes) - done
        if size * left >= budget:
            return -(-budget // left)
        budget -= size
    return max(sizes)


def _without_end(passage: Passage, length: int) -> Passage:
    """Leave out the last piece of a document whose text was cut somewhere: its last token may be half a word."""
    kept = (len(passage.ids) - 1) // length * length or len(passage.ids)
    return Passage(passage.ids[:kept], passage.given, passage.bytes)


def _counted(progress: Progress, total: int) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("tokenizing the text", done, total)

    return advance


# What is drawn of it.


def _pieces(passages: Sequence[Passage], length: int) -> list[Sample]:
    """Cut documents into pieces without gaps, in their order; leave out those in which nothing is predicted."""
    every = (
        Sample(passage.ids[start : start + length], max(1, passage.given - start), document)
        for document, passage in enumerate(passages)
        for start in range(0, len(passage.ids), length)
    )
    return [piece for piece in every if piece.scored > 0]


def _needed(samples: int) -> int:
    return samples + held_out_samples(samples)


def _shortness(piece: Sample, length: int) -> int:
    """0 for a full piece; else how often the length is to be halved until it is no longer than the piece."""
    return ((length - 1) // len(piece.ids)).bit_length()


def _candidates(passages: Sequence[Passage], samples: int, length: int) -> list[Sample]:
    """Return the longest pieces, as few kinds of them as hold enough samples; nothing, where all together do not."""
    pieces = _pieces(passages, length)
    kinds = Counter(_shortness(piece, length) for piece in pieces)
    count = 0
    for kind in sorted(kinds):
        count += kinds[kind]
        if count >= _needed(samples):
            return [piece for piece in pieces if _shortness(piece, length) <= kind]
    return []


def _split(pieces: Sequence[Sample], samples: int, random: Random) -> tuple[list[Sample], list[Sample]]:
    """Set documents apart for the held-out samples, a quarter of them or as many as there will be samples, as far as enough is left."""
    sizes = Counter(piece.document for piece in pieces)
    held_out, count = held_out_samples(samples), 0
    apart: set[int] = set()
    for document in _shuffled(sorted(sizes), random):
        if count >= held_out and len(apart) >= min(held_out, len(sizes) // HELD_OUT):
            break
        if len(pieces) - count - sizes[document] >= samples:
            apart.add(document)
            count += sizes[document]
    if count >= held_out:
        return [piece for piece in pieces if piece.document not in apart], [piece for piece in pieces if piece.document in apart]
    end = len(pieces) * samples // _needed(samples)
    return list(pieces[:end]), list(pieces[end:])


def _draw(pieces: Sequence[Sample], count: int, length: int, random: Random) -> tuple[Sample, ...]:
    """Draw full pieces first, and of each document one before a second; return them in the order of the text."""
    order = sorted(_shuffled(range(len(pieces)), random), key=lambda place: _shortness(pieces[place], length))
    turns: Counter[int] = Counter()
    ranks: list[tuple[int, int, int]] = []
    for place in order:
        document = pieces[place].document
        ranks.append((_shortness(pieces[place], length), turns[document], place))
        turns[document] += 1
    chosen = sorted(ranks, key=lambda rank: rank[:2])[:count]
    return tuple(pieces[place] for place in sorted(place for _, _, place in chosen))


def _shuffled(numbers: Sequence[int], random: Random) -> list[int]:
    """Shuffle by `random()`, the one method whose numbers Python promises to keep from release to release."""
    return sorted(numbers, key=lambda _: random.random())


def _digest(fit: Sequence[Sample], held_out: Sequence[Sample]) -> str:
    digest = sha256()
    for name, samples in (("fit", fit), ("held out", held_out)):
        for sample in samples:
            digest.update(f"{name} {sample.document} {sample.given} {len(sample.ids)}\n".encode())
            digest.update(sample.ids.astype("<i8").tobytes())
    return digest.hexdigest()


def _too_short(name: str, passages: Sequence[Passage], samples: int, length: int) -> DowncycleError:
    """Say what the text has, what is needed, and which fewer or shorter samples it has enough of."""
    count, tokens = len(_pieces(passages, length)), sum(len(passage.ids) for passage in passages)
    ways = ["give a longer text"]
    if fewer := next((less for less in range(samples - 1, 0, -1) if _needed(less) <= count), 0):
        ways.append(f"--samples {fewer}")
    shorter = length // 2
    while shorter >= SHORTEST and not _candidates(passages, samples, shorter):
        shorter //= 2
    if shorter >= SHORTEST:
        ways.append(f"--length {shorter}")
    has = f"{tokens} token{'s' * (tokens != 1)} in {len(passages)} document{'s' * (len(passages) != 1)}"
    gives = f"{count} piece{'s' * (count != 1)} of at most {length} tokens"
    needs = f"{samples} + {held_out_samples(samples)} held-out ones are needed"
    return DowncycleError(f"{name}: too short: {has} give {gives}, and {needs}; {', or '.join(ways)}")
