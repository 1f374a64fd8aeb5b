"""The tokenizer that documents are counted with, set up as training will set it up.

Uses transformers to load it, because that adds the special tokens; counts nothing itself.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ...surgery.checkpoint import Span, file_bytes, find_source
from ...surgery.errors import DowncycleError
from ...surgery.filenames import CONFIG, VOCABULARIES, belongs


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer as the `tokenizers` library spells it in JSON, without truncation and padding, and its end-of-text token."""

    name: str
    revision: str | None
    json: str
    end: int
    vocabulary: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what counts depend on."""
        return hashlib.sha256(f"{self.end}\n{self.json}".encode()).hexdigest()


def open_tokenizer(src: str) -> TextTokenizer:
    """Load the tokenizer of a checkpoint (a folder, a Hub id, or `demo`) with the class that Axolotl loads it with.

    Raises:
        DowncycleError: there is no tokenizer.json, it cannot be read, or it names no end-of-text token.
    """
    try:
        source = find_source(src)
    except DowncycleError as error:
        raise DowncycleError(f"--tokenizer {error}") from error
    if "tokenizer.json" not in source.files:
        raise DowncycleError(f"--tokenizer {src}: holds no tokenizer.json; give the folder or Hub id of a model that has one")
    files = {path: Span(source, path, 0, size) for path, size in source.files.items() if path == CONFIG or belongs(path)}
    loaded = load_files(f"--tokenizer {src}", files)
    end = loaded.eos_token_id
    if not loaded.is_fast or end is None:
        lacks = "names no end-of-text token, which training puts behind each document" if loaded.is_fast else "needs Python code to run"
        raise DowncycleError(f"--tokenizer {src}: {lacks}; give another")
    backend = loaded.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return TextTokenizer(source.name, source.revision, backend.to_str(), end, backend.get_vocab_size())


def load_files(name: str, files: Mapping[str, Span | bytes], trust_remote_code: bool = False) -> Any:
    """Load the tokenizer that lies among a checkpoint's small files with transformers' AutoTokenizer, and nothing from anywhere else.

    Raises:
        DowncycleError: there is none, or it cannot be read; begins with `name`.
    """
    from transformers import AutoTokenizer

    if not trust_remote_code and not any(fnmatch(path, pattern) for path in files for pattern in VOCABULARIES):
        raise DowncycleError(f"{name}: holds no tokenizer (tokenizer.json, tokenizer.model, vocab.json, ...); put its files there")
    with tempfile.TemporaryDirectory(prefix="downcycle-") as folder:
        for path, data in files.items():
            target = Path(folder) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file_bytes(data))
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        except Exception as error:  # tokenizers and transformers raise plain Exception for damaged files
            reason = " ".join(str(error).replace(folder, name).split())[:200]
            raise DowncycleError(f"{name}: cannot be loaded ({reason}); fetch its files again, or give another") from error
