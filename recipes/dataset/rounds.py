"""Do as many tasks as an asked number of training tokens needs, and say which of them make the dataset.

Knows tasks by their numbers and the files they leave; knows nothing of how they are run, nor of options.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from .shards import Split, count_training, first_hash
from .source import Piece
from .work import finished

Work = Callable[[list[Piece], Callable[[], bool]], None]
Watcher = Callable[[int, int], None]


@dataclass
class Rounds:
    """Tasks done so far in a work folder, task r on the r-th piece. held_out: the hash below which a text is held out."""

    folder: Path
    tokens: int
    held_out: int
    progress: Watcher
    _done: set[int] = field(default_factory=set)
    _counts: dict[Path, dict[str, int]] = field(default_factory=dict)
    _training: dict[int, int] = field(default_factory=dict)
    _split: Split | None = None

    def collect(self, source: Iterator[Piece], workers: int, work: Work) -> list[Piece]:
        """Have leading pieces worked at, in rounds, until they hold enough training tokens; return those that do, or all there are.

        The first round has a task for each worker, or those done before; what they give says how many the next round needs. Which tasks
        are needed in the end does not depend on the rounds.
        """
        for name in ("counts", "parts"):
            (self.folder / name).mkdir(exist_ok=True)
        self._forget_cut_short()
        pieces = list(islice(source, max(workers, len(self._leading()))))
        while True:
            work(pieces, self._watch)
            self._watch()
            needed, have = self._needed()
            if have >= self.tokens:
                return pieces[:needed]
            guess = (self.tokens - have) * len(pieces) // have + 1 if have else len(pieces)
            more = list(islice(source, guess))
            if not more:
                return pieces
            pieces += more

    def training_tokens(self) -> int:
        """Count the training tokens of the tasks done, up to the first that is not done."""
        return self._needed()[1]

    def held_out_tokens(self) -> int:
        """Count the other tokens that the tasks done wrote, where all are needed."""
        return sum(count["tokens"] for count in self._counts.values()) - self.training_tokens()

    def split(self) -> Split:
        """How texts are held out, given the first text of all."""
        if self._split is None:
            first = first_hash(self.parts(len(self._leading()))) if self.held_out else None
            split = Split(self.held_out, first)
            if first is None and self.held_out:
                return split  # the first text is not there yet
            self._split = split
        return self._split

    def parts(self, count: int) -> list[Path]:
        """Where the first `count` tasks put their documents; a task that found none has no file."""
        return [self.folder / "parts" / f"{rank:05}.parquet" for rank in range(count)]

    def dropped(self, count: int) -> dict[str, int]:
        """Count what the steps of the first `count` tasks dropped, by reason."""
        total: Counter[str] = Counter()
        for rank in range(count):
            for step in json.loads((self.folder / "stats" / f"{rank:05}.json").read_text()):
                for name, value in step["stats"].items():
                    if name.startswith("dropped_"):
                        total[name.removeprefix("dropped_")] += value if isinstance(value, int) else value["total"]
        return dict(sorted(total.items()))

    def _leading(self) -> range:
        """Tasks that are done, up to the first that is not."""
        return range(next(rank for rank in range(len(self._done) + 1) if rank not in self._done))

    def _needed(self) -> tuple[int, int]:
        """Say how many leading tasks hold enough, or all that are done, and how many training tokens they hold."""
        have = 0
        for rank in self._leading():
            if rank not in self._training:
                self._training[rank] = count_training(self.parts(rank + 1)[rank], self.split())
            have += self._training[rank]
            if have >= self.tokens:
                return rank + 1, have
        return len(self._leading()), have

    def _watch(self) -> bool:
        """Report progress, and say whether there is enough."""
        done = finished(self.folder)  # asked first: what a task done has counted is final
        for path in (self.folder / "counts").glob("*.json"):
            if int(path.stem) not in self._done or path not in self._counts:
                with suppress(OSError, ValueError):  # another process is writing it
                    self._counts[path] = json.loads(path.read_text())
        counts = self._counts.values()
        self.progress(sum(count["documents"] for count in counts), sum(count["tokens"] for count in counts))
        if done == self._done:
            return False
        self._done = done
        return self._needed()[1] >= self.tokens

    def _forget_cut_short(self) -> None:
        """Undo the first task where it stopped for another number of tokens, or went on where this number would have stopped it."""
        self._done = finished(self.folder)
        if 0 not in self._done:
            return
        limit = json.loads((self.folder / "counts" / "00000.json").read_text())["limit"]
        alone = count_training(self.parts(1)[0], self.split())
        if limit != [self.tokens, self.held_out] and (limit is not None or alone >= self.tokens):
            for path in (self.folder / "completions" / "00000", self.folder / "counts" / "00000.json", *self.parts(1)):
                path.unlink(missing_ok=True)
            self._done, self._training, self._split = finished(self.folder), {}, None
