"""A model's tokenizer as GGUF holds it: tokens, types, merges or scores, special tokens and chat templates. From the small files only."""

from __future__ import annotations

import json
import re
from typing import Any

from ..checkpoint import Checkpoint, file_bytes
from ..errors import DowncycleError
from ..filenames import TOKENIZER
from .pre_tokenizers import NAMES, pre_tokenizer_name
from .sentencepiece import CONTROL, NORMAL, UNKNOWN, UNSCORED, UNUSED, USER_DEFINED, pieces_of_json, pieces_of_model

Fields = dict[str, Any]

VOCABULARY, PIECES, TEMPLATE = "tokenizer.json", "tokenizer.model", "chat_template.jinja"
NAMED, DEFAULT = re.compile(r"additional_chat_templates/(.+)\.jinja"), "default"
LETTERS = re.compile(r"[^A-Za-z0-9]")  # which no name of a template has in GGUF
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' names, and GGUF's

# By what a tokenizer.json does: where llama.cpp, whose tokens are else the same, does it otherwise.
DIFFERENCES = {
    "NFC": "llama.cpp does not compose letters and accents (NFC) before it splits text, as transformers does",
    "Metaspace": "llama.cpp puts a space before text that begins with one already, or follows an added token; transformers does not",
}


def tokenizer_fields(model: Checkpoint, rows: int) -> tuple[Fields, tuple[str, ...]]:
    """Return the metadata of a tokenizer by key, without `tokenizer.` in front, and where llama.cpp splits text otherwise.

    Args:
        rows: of the embeddings; ids without a token are called [PAD...].
    Raises:
        DowncycleError: no tokenizer, or one that llama.cpp is not known to have.
    """
    settings = _json(model, TOKENIZER)
    tokenizer = _json(model, VOCABULARY)
    kind = (tokenizer.get("model") or {}).get("type", "BPE" if "merges" in (tokenizer.get("model") or {}) else None)
    if kind == "BPE" and not tokenizer["model"].get("byte_fallback"):
        fields = _byte_level(tokenizer, rows, f"{model.name}/{VOCABULARY}")
    elif kind == "BPE" or (not tokenizer and PIECES in model.files):
        fields = _pieces(model, tokenizer, settings, rows)
    else:
        what = f"of the kind {kind}" if kind else "not there"
        raise DowncycleError(f"{model.name}: its tokenizer is {what}; GGUF is written from {VOCABULARY} of the kind BPE, or {PIECES}")
    ids = {token: place for place, token in enumerate(fields["ggml.tokens"])}
    fields |= _special(model, settings, ids) | _added(tokenizer, settings) | _templates(model, settings)
    return fields, tuple(note for part, note in DIFFERENCES.items() if _holds(tokenizer, part))


def _holds(tokenizer: Fields, part: str) -> bool:
    """Whether the text is changed by such a step before it is split; a Metaspace that puts no space in front changes nothing."""
    steps = [tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}]
    return any(step.get("type") == part and step.get("prepend_scheme") != "never" for step in steps)


def _byte_level(tokenizer: Fields, rows: int, where: str) -> Fields:
    """Byte-level BPE, as GPT-2's."""
    bpe = tokenizer["model"]
    name = pre_tokenizer_name(tokenizer)
    normal = tokenizer.get("normalizer") or {"type": "NFC"}  # which llama.cpp leaves out: text mostly is in that form
    odd = [key for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix") if bpe.get(key)]
    if not name or normal != {"type": "NFC"} or odd:
        raise DowncycleError(
            f"{where}: {'splits text' if not name else f'has {odd[0]}' if odd else 'changes text'} in a way that llama.cpp is not known to "
            f"have, so its GGUF would be wrong; known are those of {', '.join(NAMES.values())}"
        )
    tokens, types = _filled({place: token for token, place in bpe["vocab"].items()}, tokenizer.get("added_tokens", []), rows, where)
    merges = [pair if isinstance(pair, str) else " ".join(part.replace(" ", "\u0120") for part in pair) for pair in bpe["merges"]]
    return {"ggml.model": "gpt2", "ggml.pre": name, "ggml.tokens": tokens, "ggml.token_type": types, "ggml.merges": merges}


def _pieces(model: Checkpoint, tokenizer: Fields, settings: Fields, rows: int) -> Fields:
    """BPE that falls back to bytes, as Llama 2's."""
    where = f"{model.name}/{VOCABULARY if tokenizer else PIECES}"
    if PIECES in model.files:
        pieces = pieces_of_model(file_bytes(model.files[PIECES]), f"{model.name}/{PIECES}")
    else:
        pieces = pieces_of_json(tokenizer, where)
    added = tokenizer.get("added_tokens") or [{"id": int(key), **token} for key, token in settings.get("added_tokens_decoder", {}).items()]
    tokens, types = _filled(dict(enumerate(pieces.tokens)), added, rows, where)
    kinds = dict(enumerate(pieces.types))
    types = [kinds[place] if kinds.get(place) == UNKNOWN or kind == NORMAL else kind for place, kind in enumerate(types)]
    scores = pieces.scores + [UNSCORED] * (rows - len(pieces.scores))
    fields = {"ggml.model": "llama", "ggml.pre": "default", "ggml.tokens": tokens, "ggml.scores": scores, "ggml.token_type": types}
    return {**fields, "ggml.add_space_prefix": pieces.prefix}


def _filled(vocab: dict[int, str], added: list[Fields], rows: int, where: str) -> tuple[list[str], list[int]]:
    """Return the token of each row, and its type."""
    types = dict.fromkeys(vocab, NORMAL) | {token["id"]: CONTROL if token.get("special") else USER_DEFINED for token in added}
    vocab = vocab | {token["id"]: token["content"] for token in added}
    if max(vocab, default=0) >= rows:
        raise DowncycleError(f"{where}: has the token {max(vocab)}, and the embeddings have {rows} rows; they do not belong together")
    return [vocab.get(row, f"[PAD{row}]") for row in range(rows)], [types.get(row, UNUSED) for row in range(rows)]


def _special(model: Checkpoint, settings: Fields, ids: dict[str, int]) -> Fields:
    """Return the ids of special tokens: as the tokenizer names them, or else as config.json numbers them."""
    fields = {}
    for name, key in SPECIAL.items():
        token = settings.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        number = model.config.get(f"{name}_token_id")
        number = ids.get(text, number) if isinstance(text, str) else number
        number = number[0] if isinstance(number, list) and number else number
        if type(number) is int and 0 <= number < len(ids):
            fields[f"ggml.{key}_token_id"] = number
    return fields


def _added(tokenizer: Fields, settings: Fields) -> Fields:
    """Say whether the first and the last token are put around a text."""
    processor = tokenizer.get("post_processor") or {}
    parts = processor.get("processors", [processor])
    single: list[Fields] = next((part["single"] for part in parts if part.get("type") == "TemplateProcessing"), [])
    around = {"bos": bool(single) and "SpecialToken" in single[0], "eos": bool(single) and "SpecialToken" in single[-1]}
    for name in around:
        if isinstance(stated := settings.get(f"add_{name}_token"), bool):
            around[name] = stated
    return {f"ggml.add_{name}_token": value for name, value in around.items()}


def _templates(model: Checkpoint, settings: Fields) -> Fields:
    """Return the chat template, and others under their names."""
    files = {path: DEFAULT for path in model.files if path == TEMPLATE}
    files |= {path: match[1] for path in sorted(model.files) if (match := NAMED.fullmatch(path))}
    stated = settings.get("chat_template") or []
    named = {one["name"]: one["template"] for one in stated} if isinstance(stated, list) else {DEFAULT: stated}
    if files:  # transformers then passes over what tokenizer_config.json says
        named = {name: _text(model, path) for path, name in files.items()}
    others = {LETTERS.sub("_", name): text for name, text in named.items() if name != DEFAULT}
    fields: Fields = {"chat_template": named[DEFAULT]} if DEFAULT in named else {}
    return fields | {f"chat_template.{name}": text for name, text in others.items()} | ({"chat_templates": list(others)} if others else {})


def _text(model: Checkpoint, path: str) -> str:
    try:
        return file_bytes(model.files[path]).decode()
    except UnicodeDecodeError as error:
        raise DowncycleError(f"{model.name}/{path}: no text in UTF-8; fetch it again") from error


def _json(model: Checkpoint, path: str) -> Fields:
    if path not in model.files:
        return {}
    try:
        value = json.loads(file_bytes(model.files[path]))
    except ValueError as error:
        raise DowncycleError(f"{model.name}/{path}: not valid JSON; fetch it again") from error
    if not isinstance(value, dict):
        raise DowncycleError(f"{model.name}/{path}: holds no JSON object; fetch it again")
    return value
