"""Take a slice of FineWeb, or of any text dataset in its schema, with an exact number of training tokens, as local parquet files.

Reading, filtering, counting and writing are steps of a datatrove pipeline (steps.py), run by its executors (work.py). This module
decides which tasks are needed and joins what they wrote. It knows nothing of models.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...surgery.errors import DowncycleError
from ...surgery.filenames import README
from ...surgery.staging import check_name, publish, staging_folder, target_path
from .card import card, versions
from .rounds import Rounds, Watcher
from .shards import HASH, N_TOKENS, threshold, write_splits
from .source import FINEWEB, LLAMA, PIECE_ROWS, REPORT, Filters, ParquetSource, Piece, check_columns, cut_pieces, find_parquet, read_schema
from .tokenizer import TextTokenizer, open_tokenizer
from .work import LOGS, check_executor, finished, run_tasks

if TYPE_CHECKING:
    import pyarrow as pa

TOKENIZER, WHOLE = "tokenizer.json", "whole"


@dataclass(frozen=True)
class Request:
    """What a dataset is to hold. Each field is an option of `downcycle data`.

    src: a folder of parquet files, or a Hub dataset (USER/NAME, USER/NAME@REVISION). name: a part of it. held_out: share of documents.
    min_tokens, max_tokens: bounds on FineWeb's own token_count.
    """

    tokens: int
    src: str = FINEWEB
    name: str | None = None
    tokenizer: str = LLAMA
    language: str | None = None
    min_language_score: float | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    held_out: float = 0.001


def make_dataset(
    out: str | Path,
    request: Request,
    *,
    workers: int | None = None,
    executor: str = "local",
    overwrite: bool = False,
    progress: Watcher = lambda documents, tokens: None,
) -> dict[str, Any]:
    """Write the dataset that was asked for, and return its report (what downcycle-data.json holds).

    The law: documents are taken in the order of the source (files by name, rows as they stand) and filtered. A document is held out if the
    hash of its text is below `held_out` x 2^64, or if its text is the first of all (`held_out` 0 holds out none); else it trains. The set
    ends with the training document that reaches `tokens`, so tokens <= train total < tokens + that document. Files depend on nothing
    else: not on workers, on the order in which tasks end, or on how often the work was stopped.

    A document counts as Axolotl's `type: completion` trains on it (steps.py). Axolotl itself cuts documents after 64 sequences
    and drops a last piece of a single token: with a short `sequence_len` it trains on a little less.

    Run and tested: local workers. Tested with stand-ins for sbatch, srun and squeue that run the jobs on one machine: slurm. ray is
    handed the same pipeline, and has not been run.

    Args:
        workers: processes on this machine [default: its cores], or tasks at once on a cluster.
        overwrite: replace a dataset that downcycle made. Another kind of folder is never replaced.
        progress: called with the documents and the tokens that all tasks have written so far.
    Raises:
        DowncycleError: what was asked for cannot be, or work failed. Finished tasks stay in a folder beside the target, for the same call
        or one that differs in `tokens` or `held_out` only.
    """
    _check(request, workers)
    _need_libraries()
    check_executor(executor)
    target = target_path(out)
    _check_target(target, overwrite)
    source = find_parquet(request.src, request.name)
    _check_apart(target, source)
    columns, _ = read_schema(source, source.files[0])
    check_columns(source.path(source.files[0]), columns, _needed_columns(request))
    for name in {N_TOKENS, HASH} & set(columns.names):  # counted anew
        columns = columns.remove(columns.get_field_index(name))
    tokenizer = open_tokenizer(request.tokenizer)
    digest = _digest(request, source, columns, tokenizer)
    with staging_folder(target, digest, _has_work, "the same command, also with other --tokens,") as staging:
        _check_target(target, overwrite)  # again, now that nobody else can take it
        (staging / TOKENIZER).write_text(tokenizer.json)
        rounds = Rounds(staging, request.tokens, threshold(request.held_out), progress)
        work = partial(_work, request, source, columns, tokenizer.end, staging, workers or cores(), executor)
        pieces = rounds.collect(cut_pieces(source, columns), workers or cores(), work)
        if rounds.training_tokens() < request.tokens:
            raise DowncycleError(_too_little(request, rounds, len(pieces)))
        report = _write_whole(request, source, columns, tokenizer, rounds, pieces, staging / WHOLE)
        _write_text(staging / WHOLE / REPORT, json.dumps(report, indent=2) + "\n")
        _write_text(staging / WHOLE / README, card(target.name, report))
        publish(staging / WHOLE, target)
        shutil.rmtree(staging)
    return report


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check(request: Request, workers: int | None) -> None:
    low, high, score = request.min_tokens, request.max_tokens, request.min_language_score
    faults = [
        request.tokens < 1 and f"--tokens {request.tokens}: give the number of training tokens wanted, such as 1B",
        not 0 <= request.held_out < 0.5 and f"--held-out {request.held_out}: give a share of the documents from 0 to less than 0.5",
        request.language == "" and "--language '': give a code as FineWeb's column has it, such as en",
        score is not None and not 0 <= score <= 1 and f"--min-language-score {score}: give a number from 0 to 1",
        low is not None and low < 0 and f"--min-tokens {low}: give 0 or more",
        high is not None and high < max(low or 0, 1) and f"--max-tokens {high}: leaves no document; give more than --min-tokens",
        workers is not None and workers < 1 and f"--workers {workers}: give 1 or more",
    ]
    if found := [fault for fault in faults if fault]:
        raise DowncycleError("; ".join(found))


def _need_libraries() -> None:
    missing = [name for name in ("datatrove", "pyarrow", "tokenizers") if importlib.util.find_spec(name) is None]
    if missing:
        raise DowncycleError(f"making a dataset needs {' and '.join(missing)}; run `pip install 'downcycle[data]'`")


def _needed_columns(request: Request) -> dict[str, str]:
    needed = {"text": "string", "id": "string"}
    needed |= {"language": "string"} if request.language is not None else {}
    needed |= {"language_score": "number"} if request.min_language_score is not None else {}
    return needed | ({"token_count": "number"} if (request.min_tokens, request.max_tokens) != (None, None) else {})


def _check_target(target: Path, overwrite: bool) -> None:
    check_name(target, overwrite, "dataset", REPORT)


def _check_apart(target: Path, source: ParquetSource) -> None:
    if source.revision is None:
        there, here = Path(os.path.realpath(source.url)), Path(os.path.realpath(target))
        if here == there or here in there.parents or there in here.parents:
            raise DowncycleError(f"--out {target}: lies in the source, or holds it; choose a folder beside it")


def _has_work(staging: Path) -> bool:
    """Whether tasks are done, or a cluster says in its logs why none is."""
    return bool(finished(staging)) or any((staging / LOGS).glob("*"))


def _digest(request: Request, source: ParquetSource, columns: pa.Schema, tokenizer: TextTokenizer) -> str:
    """Name the work that a staging folder holds: all that the tasks depend on."""
    filters = asdict(_filters(request))
    facts = [source.url, source.files, source.identity, filters, str(columns), tokenizer.fingerprint, versions(), PIECE_ROWS]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _filters(request: Request) -> Filters:
    return Filters(request.language, request.min_language_score, request.min_tokens, request.max_tokens)


def _work(
    request: Request,
    source: ParquetSource,
    columns: pa.Schema,
    end: int,
    staging: Path,
    workers: int,
    executor: str,
    pieces: list[Piece],
    watch: Callable[[], bool],
) -> None:
    """Have the pieces that are not done worked at."""
    from .steps import make_pipeline

    tokenizer, held_out = (str(staging / TOKENIZER), end), threshold(request.held_out)
    pipeline = make_pipeline(source.url, pieces, columns, _filters(request), tokenizer, staging, request.tokens, held_out)
    run_tasks(pipeline, len(pieces), staging, workers, executor, watch)


def _too_little(request: Request, rounds: Rounds, count: int) -> str:
    have, held_out = rounds.training_tokens(), rounds.held_out_tokens()
    dropped = ", ".join(f"{number:,} {reason.replace('_', ' ')}" for reason, number in rounds.dropped(count).items())
    if have:
        advice = f"ask for at most {have}, or take more text"
    else:
        advice = "give --held-out 0, or another source" if held_out else "choose other filters or another source"
    facts = f"rows dropped: {dropped or 'none'}; tokens held out: {held_out:,}"
    return f"--tokens {request.tokens}: there are {have} training tokens in all ({facts}); {advice}"


def _write_whole(
    request: Request,
    source: ParquetSource,
    columns: pa.Schema,
    tokenizer: TextTokenizer,
    rounds: Rounds,
    pieces: list[Piece],
    whole: Path,
) -> dict[str, Any]:
    """Write the data out of the tasks' files, and return the report."""
    import pyarrow as pa

    shutil.rmtree(whole, ignore_errors=True)
    schema = columns.append(pa.field(N_TOKENS, pa.int64()))
    train, test = write_splits(rounds.parts(len(pieces)), request.tokens, rounds.split(), schema, whole / "data")
    return {
        "arguments": asdict(request),
        "revision": source.revision,
        "tokenizer": {
            "name": tokenizer.name,
            "revision": tokenizer.revision,
            "sha256": tokenizer.fingerprint,
            "size": tokenizer.vocabulary,
        },
        "splits": {shards.split: {"documents": shards.documents, "tokens": shards.tokens} for shards in (train, test)},
        "dropped": rounds.dropped(len(pieces)),
        "files": list(dict.fromkeys(piece.file for piece in pieces)),
        "versions": versions(),
    }


def _write_text(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
