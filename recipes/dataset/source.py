"""Find the parquet files of a text dataset, on this machine or on the Hub, and divide them into pieces of work.

Reads names and footers only, and a file's footer only when its turn comes; reads no text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ...surgery.errors import DowncycleError

if TYPE_CHECKING:
    import pyarrow as pa

FINEWEB, LLAMA = "HuggingFaceFW/fineweb", "meta-llama/Meta-Llama-3-8B"  # text and tokenizer, where nobody names others
REPORT = "downcycle-data.json"  # marks a dataset that was made here
PIECE_ROWS = 20_000  # some 14 million tokens of FineWeb: seconds of work, so that little is lost when a run is stopped


@dataclass(frozen=True)
class Filters:
    """Which documents are taken, by FineWeb's own columns; a document without the value is not."""

    language: str | None = None
    min_language_score: float | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class Piece:
    """Consecutive row groups of one file: what one task reads."""

    file: str
    first: int
    stop: int


@dataclass(frozen=True)
class ParquetSource:
    """A dataset's parquet files, in the order in which they are read.

    url: the folder or `hf://` address that `files` are relative to. identity: changes when a file does. revision: the Hub's commit.
    """

    name: str
    revision: str | None
    url: str
    files: tuple[str, ...]
    identity: tuple[str, ...]

    def path(self, file: str) -> str:
        """Name a file in a message."""
        return f"{self.url}/{file}"


def find_parquet(src: str, name: str | None) -> ParquetSource:
    """List the parquet files of a folder or of a Hub dataset (`USER/NAME`, or `USER/NAME@REVISION`).

    `name` is a part of it: a folder of that name, or what FineWeb's layout calls so (`CC-MAIN-2024-10` is `data/CC-MAIN-2024-10`,
    `sample-10BT` is `sample/10BT`). Hidden files and folders are passed over.
    """
    if name is not None and (not name or name.startswith("/") or ".." in PurePosixPath(name).parts):
        raise DowncycleError(f"--name {name!r}: give the name of a part of {src}, such as CC-MAIN-2024-10 or sample-10BT")
    folder = Path(os.path.expanduser(src))
    if src and folder.is_dir():
        return _find_local(src, Path(os.path.abspath(folder)), name)
    if os.path.isfile(folder):
        raise DowncycleError(f"--src {src}: a file; give the folder that holds the parquet files")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", src):
        raise DowncycleError(f"--src {src or repr(src)}: no such folder, and not the id of a Hub dataset (USER/NAME); check the path")
    return _find_on_hub(src, name)


def _find_local(src: str, folder: Path, name: str | None) -> ParquetSource:
    from datatrove.io import get_datafolder

    place, files = _first_part([(part, get_datafolder(str(folder / part))) for part in _parts(name, "")], src, name)
    if (folder / REPORT).is_file():
        files = _training_files(files)
    status = [os.stat(folder / place / file) for file in files]
    return ParquetSource(src, None, str(folder / place), files, tuple(f"{one.st_size}:{one.st_mtime_ns}" for one in status))


def _find_on_hub(src: str, name: str | None) -> ParquetSource:
    from datatrove.io import get_datafolder
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    from ...surgery.hub_faults import HTTPError, Patience, endpoint

    repo, _, revision = src.partition("@")
    try:
        info = HfApi().dataset_info(repo, revision=revision or None)
        commit = info.sha or ""
        url = f"hf://datasets/{repo}@{commit}"
        places = [(part, get_datafolder(f"{url}/{part}".rstrip("/"))) for part in _parts(name, "data")]
        place, files = _first_part(places, src, name)
        if any(file.rfilename == REPORT for file in info.siblings or ()):
            files = _training_files(files)
    except HTTPError as fault:
        if isinstance(fault, RepositoryNotFoundError) and not isinstance(fault, GatedRepoError):
            unknown = f"--src {src}: no public dataset at {endpoint()} has this name; check the spelling"
            raise DowncycleError(f"{unknown}, or run `hf auth login` if it is private") from None
        Patience(repo, revision or "main", "", attempts=1).wait(fault)  # raises: says what to do
        raise
    except ConnectionError as fault:  # of huggingface_hub, where HF_HUB_OFFLINE forbids to ask
        raise DowncycleError(f"--src {src}: the Hub cannot be asked ({fault}); go online, or give a folder of parquet files") from fault
    return ParquetSource(repo, commit, f"{url}/{place}".rstrip("/"), files, (commit,))


def _parts(name: str | None, usual: str) -> list[str]:
    """Folders that a name may mean, likeliest first."""
    if name is None:
        return [usual, ""]
    return list(dict.fromkeys([f"data/{name}", name, name.replace("-", "/", 1)]))


def _first_part(places: list[tuple[str, Any]], src: str, name: str | None) -> tuple[str, tuple[str, ...]]:
    """Return the first folder that holds parquet files, and the files."""
    for part, folder in places:
        try:
            listed = folder.list_files()
        except FileNotFoundError:
            continue
        files = [file for file in listed if file.endswith(".parquet") and not any(one.startswith(".") for one in file.split("/"))]
        if files:
            return part, tuple(files)
    where = f" in {', '.join(part or '.' for part, _ in places)}" if name else ""
    raise DowncycleError(
        f"--src {src}: holds no parquet files{where}; give a folder or a Hub dataset with .parquet files, or another --name"
    )


def _training_files(files: tuple[str, ...]) -> tuple[str, ...]:
    """Leave out what `downcycle data` held out of the dataset that is taken from."""
    return tuple(file for file in files if not file.rpartition("/")[2].startswith("test-"))


def read_schema(source: ParquetSource, file: str) -> tuple[pa.Schema, list[int]]:
    """Read a file's footer: its columns, with the types that they are given when they are read, and the rows of each row group.

    Raises:
        DowncycleError: the file is damaged, or gives one name to several columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datatrove.io import get_datafolder

    try:
        with get_datafolder(source.url).open(file, "rb") as handle, pq.ParquetFile(handle) as parquet:
            footer, columns = parquet.metadata, parquet.schema_arrow
            rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    except Exception as error:
        raise read_fault(source.path(file), error) from error
    if repeated := {name for name in columns.names if columns.names.count(name) > 1}:
        names = ", ".join(sorted(repeated))
        raise DowncycleError(f"{source.path(file)}: has more than one column named {names}; write it again with one of them")
    return pa.schema([(column.name, _plain(column.type)) for column in columns]), rows


def _plain(type_: pa.DataType) -> pa.DataType:
    """Give all text one type: writers of one dataset's files differ in whether they spell it large, as views, or with a dictionary."""
    from pyarrow import string, types

    held = type_.value_type if types.is_dictionary(type_) else type_
    return string() if types.is_string(held) or types.is_large_string(held) or types.is_string_view(held) else type_


def read_fault(path: str, error: Exception) -> Exception:
    """Say in one line why a file cannot be read; give back an error that has nothing to do with it."""
    from pyarrow import ArrowException

    from ...surgery.hub_faults import HTTPError

    if isinstance(error, HTTPError) or is_broken_connection(error):
        return DowncycleError(f"{path}: the Hub did not give it ({type(error).__name__}); check the network and run the same again")
    if isinstance(error, OSError) and error.errno:
        return DowncycleError(f"{path}: {error.strerror}")
    if isinstance(error, (OSError, ArrowException)):
        return DowncycleError(f"{path}: damaged or truncated, or no parquet file; fetch it again, or take it out of the folder")
    return error


def is_broken_connection(error: Exception) -> bool:
    """Whether the same request may succeed later: the network failed, not the Hub or the file."""
    from ...surgery.hub_faults import HTTPError

    closed = isinstance(error, RuntimeError) and "client has been closed" in str(error)  # huggingface_hub, after its own first retry
    return (
        closed
        or isinstance(error, (ConnectionError, TimeoutError))
        or (isinstance(error, HTTPError) and not hasattr(error, "server_message"))
    )


def cut_pieces(source: ParquetSource, schema: pa.Schema) -> Iterator[Piece]:
    """Divide the files, in order, into pieces of whole row groups with PIECE_ROWS rows or a little more, reading footers as needed.

    Raises:
        DowncycleError: a file is damaged, or lacks a column of the first one.
    """
    for file in source.files:
        found, groups = read_schema(source, file)
        _check_same(source.path(file), found, schema)
        first = rows = 0
        for group, count in enumerate(groups):
            rows += count
            if rows >= PIECE_ROWS or (group == len(groups) - 1 and rows):
                yield Piece(file, first, group + 1)
                first, rows = group + 1, 0


def _check_same(path: str, found: pa.Schema, schema: pa.Schema) -> None:
    for column in schema:
        if column.name not in found.names:
            raise DowncycleError(f"{path}: has no column {column.name}, which the first file has; take one of them out of the folder")
        if found.field(column.name).type != column.type:
            raise DowncycleError(
                f"{path}: column {column.name} is {found.field(column.name).type}, in the first file {column.type}; take one of them out"
            )


def check_columns(path: str, schema: pa.Schema, needed: dict[str, str]) -> None:
    """Refuse a file that lacks a needed column, or has one of another kind (`string` or `number`)."""
    from pyarrow import types

    for column, kind in needed.items():
        if column not in schema.names:
            raise DowncycleError(f"{path}: has no column {column}, only {', '.join(schema.names)}; FineWeb's columns are needed")
        type_ = schema.field(column).type
        is_number = types.is_integer(type_) or types.is_floating(type_)
        if not (types.is_string(type_) if kind == "string" else is_number):
            raise DowncycleError(f"{path}: its column {column} holds {type_}, and {kind}s are needed, as in FineWeb")
