"""Vocabularies of the SentencePiece kind: pieces with scores, from tokenizer.json or tokenizer.model. Knows no model.

llama.cpp joins the two neighbours whose joint piece has the highest score, whichever they are. tokenizer.json lists pairs in the order in
which they are joined: the two agree where all pairs of a piece stand together and none is missing, and that is checked here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..errors import DowncycleError

SPACE = "\u2581"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTES = range(1, 7)  # the types of tokens, as SentencePiece and GGUF number them
UNSCORED = -1e9  # of a piece that nothing is joined to
BPE = 2  # the kind of model, in tokenizer.model


class Pieces(NamedTuple):
    """Pieces by id with their scores and types; whether text gets a space in front."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    prefix: bool


def pieces_of_json(tokenizer: dict[str, Any], where: str) -> Pieces:
    """Return the pieces of a tokenizer.json that falls back to bytes.

    Raises:
        DowncycleError: its pairs are in an order that no scores give, or its text is changed in a way that is not known here.
    """
    model, prefix = tokenizer["model"], _prefix(tokenizer, where)
    vocab: dict[str, int] = model["vocab"]
    pairs = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ", 1)) for pair in model["merges"]]
    ranks: dict[str, int] = {}
    last = ""
    for rank, (left, right) in enumerate(pairs):
        if left + right in ranks and left + right != last:
            raise DowncycleError(f"{where}: joins {left + right!r} at two places of its list, which no scores can say; add tokenizer.model")
        last = left + right
        ranks.setdefault(last, rank)
    _check_complete(vocab, set(pairs), {token["content"] for token in tokenizer.get("added_tokens", [])}, where)
    tokens = sorted(vocab, key=vocab.__getitem__)
    if [vocab[token] for token in tokens] != list(range(len(tokens))):
        raise DowncycleError(f"{where}: its ids have gaps, or two pieces have one; fetch it again")
    unknown = model.get("unk_token")
    types = [UNKNOWN if token == unknown else BYTES if BYTE.fullmatch(token) else NORMAL for token in tokens]
    return Pieces(tokens, [-float(ranks[token]) if token in ranks else UNSCORED for token in tokens], types, prefix)


def _check_complete(vocab: dict[str, int], pairs: set[tuple[str, ...]], added: set[str], where: str) -> None:
    for token in vocab.keys() - added:
        if not BYTE.fullmatch(token):
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in vocab and right in vocab and (left, right) not in pairs:
                    raise DowncycleError(f"{where}: never joins {left!r} and {right!r}, and llama.cpp would; add tokenizer.model")


def _prefix(tokenizer: dict[str, Any], where: str) -> bool:
    """Say whether text gets a space in front, by the normaliser or what splits; refuse what else they may do."""
    normal, split = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    parts = normal.get("normalizers", []) if normal.get("type") == "Sequence" else [normal] if normal else []
    known = [part for part in parts if part == {"type": "Prepend", "prepend": SPACE} or _replaces(part)]
    spaced = split.get("type") == "Metaspace" and split.get("replacement") == SPACE
    harmless = split.get("type") == "Split" and split.get("pattern") == {"String": " "}  # no spaces are left by then
    if len(known) != len(parts) or (split and not spaced and not harmless) or not (any(map(_replaces, parts)) or spaced):
        raise DowncycleError(f"{where}: changes or splits text in a way that llama.cpp is not known to have, so its GGUF would be wrong")
    return len(known) > sum(map(_replaces, parts)) or (spaced and split.get("prepend_scheme", "always") != "never")


def _replaces(part: dict[str, Any]) -> bool:
    return part.get("type") == "Replace" and part.get("pattern") == {"String": " "} and part.get("content") == SPACE


def pieces_of_model(data: bytes, where: str) -> Pieces:
    """Return the pieces of a tokenizer.model, SentencePiece's own file.

    Raises:
        DowncycleError: damaged, or of another kind than BPE, whose algorithm llama.cpp's differs from.
    """
    tokens, scores, types, kind, prefix = [], [], [], 1, True
    try:
        for number, value in _message(data):
            if number == 1:
                piece = dict(_message(value))
                tokens.append(piece[1].decode())
                scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
                types.append(piece.get(3, NORMAL))
            elif number == 2:
                kind = dict(_message(value)).get(3, 1)
            elif number == 3:
                prefix = bool(dict(_message(value)).get(3, 1))
    except (ValueError, IndexError, KeyError, AttributeError, TypeError, struct.error) as error:
        raise DowncycleError(f"{where}: damaged, or no SentencePiece model; fetch it again") from error
    if kind != BPE or not tokens:
        raise DowncycleError(f"{where}: a SentencePiece model that is no BPE; what llama.cpp makes of those was not verified")
    return Pieces(tokens, scores, types, prefix)


def _message(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the fields of a protocol buffer with their numbers."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place, value, shift = place + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while place < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        length = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        if place + length > len(data):
            raise ValueError("cut off")
        yield number, data[place : place + length]
        place += length
