"""The tokenizer that documents are counted with, set up as training will set it up.

Uses transformers to load it, because that adds the special tokens; counts nothing itself.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...surgery.checkpoint import find_source
from ...surgery.errors import DowncycleError
from ...surgery.filenames import CONFIG, belongs


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
    names = [path for path in source.files if path == CONFIG or belongs(path)]
    with tempfile.TemporaryDirectory() as folder:
        for path in names:
            target = Path(folder) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read(path, 0, source.files[path]))
        loaded = _load(src, folder)
    end = loaded.eos_token_id
    if not loaded.is_fast or end is None:
        lacks = "names no end-of-text token, which training puts behind each document" if loaded.is_fast else "needs Python code to run"
        raise DowncycleError(f"--tokenizer {src}: {lacks}; give another")
    backend = loaded.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return TextTokenizer(source.name, source.revision, backend.to_str(), end, backend.get_vocab_size())


def _load(src: str, folder: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers and transformers raise plain Exception for damaged files
        reason = " ".join(str(error).replace(folder, src).split())[:200]
        raise DowncycleError(f"--tokenizer {src}: cannot be loaded ({reason}); fetch its files again, or give another") from error
