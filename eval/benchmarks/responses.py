"""What a model answered to each request, kept as the answers come, so that a run that was killed goes on where it was.

A file of lines that is only ever added to: several processes can write it at once, and a line that was cut off is asked for again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

EVERY = 1.0  # seconds from one writing to the next: at most what a killed run asks for again


class Responses:
    """Answers by a digest of their request. Where the file cannot be written, they are known to this run only."""

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[str, Any] = {}
        self.unwritten: list[str] = []
        self.written = time.monotonic()
        with suppress(OSError), open(path, "rb") as file:
            for line in file:
                with suppress(ValueError, TypeError):
                    key, answer = json.loads(line)
                    self.known[key] = tuple(answer) if isinstance(answer, list) else answer

    def add(self, key: str, answer: Any) -> None:
        """Keep an answer: a text, or a tuple of numbers."""
        if key in self.known:
            return
        self.known[key] = answer
        self.unwritten.append(json.dumps([key, answer]))
        if time.monotonic() - self.written >= EVERY:
            self.write()

    def write(self) -> None:
        """Add to the file what it does not hold yet, in one piece; the piece begins with a new line, as the last may have been cut off."""
        if self.unwritten:
            piece = "".join(f"\n{line}" for line in self.unwritten) + "\n"
            self.unwritten.clear()
            with suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                try:
                    os.write(descriptor, piece.encode())
                finally:
                    os.close(descriptor)
        self.written = time.monotonic()


@contextmanager
def open_responses(path: Path) -> Iterator[Responses]:
    """Give the answers of a file, and write what came, however the run ends."""
    responses = Responses(path)
    try:
        yield responses
    finally:
        responses.write()
