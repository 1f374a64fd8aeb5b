"""The keys that say where a recipe's text comes from: a folder of `downcycle data`, other files, or a Hub data set.

Looks at names and counts on this machine; reads no text and asks no Hub.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..surgery.errors import DowncycleError
from .dataset.source import REPORT
from .presets import FINEWEB_1B, FINEWEB_EDU_10B

COUNTED = {FINEWEB_1B: 1_000_000_000, FINEWEB_EDU_10B: 10_000_000_000}  # training tokens of Hub data sets, as their cards say
FILE_KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".arrow": "arrow"}


@dataclass(frozen=True)
class TextSource:
    """Text to train on. train, test: entries for Axolotl's lists; test is None where there is no held-out part.

    tokens, documents: to train on, where counted. held_out: tokens held out, where counted.
    """

    train: dict[str, Any]
    test: dict[str, Any] | None = None
    tokens: int | None = None
    documents: int | None = None
    held_out: int | None = None


def find_text(dataset: str, streaming: bool = False) -> TextSource:
    """Describe a data set for Axolotl: each document is one completion, trained on from its first token to its last.

    Args:
        dataset: a folder or file on this machine, or a Hub id; `USER/NAME:CONFIG` names a part of one.
    """
    path = Path(dataset).expanduser()
    if path.is_dir():
        source = _folder(dataset, path)
    elif path.is_file():
        kind = _kind(path)
        one = {"path": kind, "data_files": dataset} if streaming else {"path": dataset, "ds_type": kind}
        source = TextSource(one | {"split": "train"})
    else:
        source = _hub(dataset)
    if not streaming:
        text = {"type": "completion"}
        return replace(source, train=source.train | text, test=source.test and source.test | text)
    return replace(source, train=source.train | {"type": "pretrain", "text_column": "text"}, test=None)


def _folder(dataset: str, path: Path) -> TextSource:
    if (path / REPORT).is_file():
        try:
            report = json.loads((path / REPORT).read_text())
            train, test = (report["splits"][name] for name in ("train", "test"))
            counts = {"tokens": train["tokens"], "documents": train["documents"], "held_out": test["tokens"]}
        except (ValueError, KeyError, TypeError) as error:
            raise DowncycleError(f"{path / REPORT}: not a report of `downcycle data` ({error}); make the data again") from error
        held_out = {"path": dataset, "split": "test"} if counts["held_out"] else None
        return TextSource({"path": dataset, "split": "train"}, held_out, **counts)
    if not any(file.suffix in FILE_KINDS for file in path.rglob("*")):
        raise DowncycleError(f"--dataset {dataset}: a folder without {', '.join(FILE_KINDS)} files; make one with `downcycle data`")
    return TextSource({"path": dataset, "split": "train"})


def _kind(path: Path) -> str:
    if path.suffix not in FILE_KINDS:
        raise DowncycleError(f"--dataset {path}: not a data set; give a folder, a Hub id, or a file that ends in {', '.join(FILE_KINDS)}")
    return FILE_KINDS[path.suffix]


def _hub(dataset: str) -> TextSource:
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?::([\w.-]+))?", dataset)
    if not match:
        raise DowncycleError(
            f"--dataset {dataset}: no such folder or file, and not a Hub id (USER/NAME or USER/NAME:CONFIG); check the path"
        )
    entry = {"path": match[1], **({"name": match[2]} if match[2] else {}), "split": "train"}
    return TextSource(entry, tokens=COUNTED.get(dataset))
