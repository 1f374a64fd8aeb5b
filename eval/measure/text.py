"""Documents to measure a model on: the built-in text, a file, a folder, or a data set of the Hub. Knows no tokens."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from ...recipes.dataset.source import REPORT, read_fault
from ...recipes.demo.corpus import read_text
from ...surgery.checkpoint import DEMO_FOLDER
from ...surgery.errors import DowncycleError
from ...surgery.filenames import CONFIG

BUILT_IN, BUILT_IN_TRAINING = "built-in held-out text", "built-in text to heal on"
COLUMN = "text"
TABLES, TEXTS = (".parquet", ".jsonl", ".json"), (".txt", ".md")
SPLITS = ("test", "validation", "train")  # of a Hub data set; the first that it has, or, to train on, the last
HUB = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Documents:
    """Texts that do not see each other, in their order. digest: SHA-256 of them and of their order."""

    name: str
    digest: str
    texts: tuple[str, ...]


def read_documents(text: str | None = None, limit: int | None = None) -> Documents:
    """Read the documents that `text` names; those without a word are passed over.

    Args:
        text: a .txt or .md file, which is one document; a .parquet, .jsonl or .json file with a row for each, in its column `text`; a
            folder of such files; one that `downcycle data` made, of which the held-out split is read, or the other where nothing was
            held out; a data set of the Hub (USER/NAME, USER/NAME:CONFIG, @REVISION behind it), of which the test split is read, else
            the validation split, else the train split. None: the text that comes with the package, which the built-in model never saw.
        limit: read the first so many documents and no more.
    Raises:
        DowncycleError: there is no such text, or nothing in it that can be read.
    """
    if limit is not None and limit < 1:
        raise DowncycleError(f"limit {limit}: give a number from 1, or leave it out")
    return as_documents(BUILT_IN if text is None else text, islice(stream_documents(text), limit))


def as_documents(name: str, found: Iterable[str]) -> Documents:
    """Put documents together; refuse none at all."""
    texts = tuple(found)
    if not texts:
        raise DowncycleError(f"{name}: an empty text; give one with at least two tokens")
    digest = sha256()
    for one in texts:
        data = one.encode()
        digest.update(b"%d\n" % len(data) + data)
    return Documents(name, digest.hexdigest(), texts)


def stream_documents(text: str | None = None, *, training: bool = False, most: int | None = None) -> Iterator[str]:
    """Yield what `read_documents` reads, one document at a time: what is not asked for is neither read nor fetched.

    Args:
        training: read the part that is there to train on, and so none that models are evaluated on: the train split, else the validation
            split, else the test split; of `downcycle data`, what was not held out; for None, the built-in text to heal on.
        most: characters of each document that are needed; what is behind them is left out.
    Raises:
        DowncycleError: as `read_documents` does.
    """
    name = BUILT_IN if text is None else text
    for one in _documents(text, training, most):
        if (found := _clean(one[:most], name)).strip():
            yield found


def _documents(text: str | None, training: bool, most: int | None) -> Iterable[str]:
    if text is None:
        return read_text(DEMO_FOLDER.parent / ("healing.txt" if training else "held_out.txt"))
    path = Path(os.path.expanduser(text))
    if text and path.is_dir():
        return _folder(path, training, most)
    if text and path.exists():
        return _file(path, most)
    if match := HUB.fullmatch(text):
        return _hub(text, match["repo"], match["config"], match["revision"], SPLITS[::-1] if training else SPLITS)
    raise DowncycleError(f"{text or repr(text)}: no such file or folder, and not a data set of the Hub (USER/NAME or USER/NAME:CONFIG)")


def _folder(folder: Path, training: bool, most: int | None) -> Iterator[str]:
    """Read the files of a folder in the order of their names, all of one kind: tables where there are any, else texts."""
    if (folder / CONFIG).is_file():
        raise DowncycleError(f"{folder}: holds a model, and no text; give the file or folder of a text")
    visible = [
        path for path in sorted(folder.rglob("*")) if path.is_file() and not any(p[0] == "." for p in path.relative_to(folder).parts)
    ]
    if (folder / REPORT).is_file():
        parquet = [path for path in visible if path.suffix == ".parquet"]
        held_out = [path for path in parquet if path.name.startswith("test-")]
        trained = [path for path in parquet if path not in held_out]
        chosen = (trained or held_out) if training else (held_out or trained)
    else:
        kinds = [[path for path in visible if path.suffix in kind] for kind in (*((suffix,) for suffix in TABLES), TEXTS)]
        chosen = next(filter(None, kinds), [])
    if not chosen:
        raise DowncycleError(f"{folder}: a folder without text; it should hold {', '.join((*TABLES, *TEXTS))} files")
    for path in chosen:
        yield from _file(path, most)


def _file(path: Path, most: int | None) -> Iterator[str]:
    readers: dict[str, Callable[[Path], Iterator[str]]] = {".parquet": _parquet, ".jsonl": _json_lines, ".json": _json}
    readers |= dict.fromkeys(TEXTS, partial(_plain, most=most))
    if path.suffix.lower() not in readers:
        raise DowncycleError(f"{path}: not a text that can be read; give a {', '.join((*TABLES, *TEXTS))} file, or a folder of them")
    try:
        yield from readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        said = f"no UTF-8 text (byte {error.start} is not): binary, or in another encoding"
        raise DowncycleError(f"{path}: {said}; convert it, or give another file") from error
    except OSError as error:
        raise DowncycleError(f"{path}: {error.strerror or error}") from error


def _plain(path: Path, most: int | None) -> Iterator[str]:
    """Read a file as one document: where only so many characters are needed, no more than the bytes that these may take."""
    size = -1 if most is None else 4 * most
    with open(path, "rb") as file:
        data = file.read(size)
    text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=len(data) != size)
    if "\0" in text:
        raise DowncycleError(f"{path}: a binary file; give one that holds text")
    yield text


def _json_lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield from _row(_parse(line, f"{path}, line {number}"), f"{path}, line {number}")


def _json(path: Path) -> Iterator[str]:
    """Read an array of objects, or, as data sets' .json files often are, an object in each line."""
    with open(path, encoding="utf-8-sig") as file:
        start = file.read(4096).lstrip()
    if not start.startswith("["):
        yield from _json_lines(path)
        return
    for number, row in enumerate(_parse(path.read_bytes().decode("utf-8-sig"), str(path))):
        yield from _row(row, f"{path}, row {number}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        said = "a binary file" if "\0" in text else f"not valid JSON ({str(error)[:80]})"
        raise DowncycleError(f"{where}: {said}; mend it, or give another file") from error


def _row(row: Any, where: str) -> Iterator[str]:
    """Yield the text of one row of a table; of one without a value, nothing."""
    if not isinstance(row, dict) or COLUMN not in row:
        raise _lacks(where, row if isinstance(row, dict) else ())
    if not isinstance(row[COLUMN], str | None):
        raise DowncycleError(f"{where}: its {COLUMN} is {type(row[COLUMN]).__name__}, and must be a string")
    yield from filter(None, [row[COLUMN]])


def _lacks(where: str, columns: Iterable[str]) -> DowncycleError:
    """The error of a table without the column."""
    found = f"only {', '.join(columns)[:200]}" if list(columns) else "nor any other"
    return DowncycleError(f"{where}: has no column {COLUMN}, {found}; rename the one that holds the documents")


def _parquet(path: Path) -> Iterator[str]:
    """Read the column a few rows at a time, so that a limit leaves the rest unread."""
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DowncycleError(f"{path}: reading parquet needs pyarrow: pip install 'downcycle[eval]'") from error
    try:
        with pq.ParquetFile(path) as file:
            if COLUMN not in file.schema_arrow.names:
                raise _lacks(str(path), file.schema_arrow.names)
            for rows in file.iter_batches(256, columns=[COLUMN]):
                for row in rows.to_pylist():
                    yield from _row(row, str(path))
    except (OSError, pyarrow.ArrowException) as error:
        raise read_fault(str(path), error) from error


def _hub(text: str, repo: str, config: str | None, revision: str | None, wanted: Sequence[str]) -> Iterator[str]:
    """Stream a data set, so that a limit leaves the rest unfetched."""
    try:
        from datasets import get_dataset_split_names, load_dataset
    except ImportError as error:
        raise DowncycleError(f"{text}: reading a data set of the Hub needs datasets: pip install 'downcycle[eval]'") from error
    try:
        splits = get_dataset_split_names(repo, config, revision=revision)
        split = next((name for name in wanted if name in splits), splits[0])
        for number, row in enumerate(load_dataset(repo, config, split=split, revision=revision, streaming=True)):
            yield from _row(row, f"{text}, split {split}, row {number}")
    except (DowncycleError, GeneratorExit):
        raise
    except Exception as error:  # noqa: BLE001 - datasets, huggingface_hub, fsspec and pyarrow each have their own
        said = " ".join(str(error).split())[:200]
        raise DowncycleError(f"{text}: no such file or folder, and as a data set of the Hub it cannot be read ({said})") from error


def _clean(text: str, name: str) -> str:
    """Refuse what is no Unicode: a lone half of a surrogate pair, which JSON can spell and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DowncycleError(
            f"{name}: a document holds half a surrogate pair ({text[error.start]!r}), which is no text; mend it"
        ) from error
    return text
