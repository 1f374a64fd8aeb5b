"""Text in FineWeb's schema, the law of `downcycle data` spelt a second time, and what a made dataset holds.

A test module that imports this is skipped where datatrove is not installed.
"""

import random
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from downcycle import DowncycleError
from downcycle.recipes.dataset.make import Request, make_dataset
from downcycle.surgery.checkpoint import DEMO_FOLDER

pytest.importorskip("datatrove")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

DEMO = DEMO_FOLDER.parent
PARAGRAPHS = [text for text in (DEMO / "healing.txt").read_text().split("\n\n") if len(text) > 100]
FILES = {"downcycle-data.json", "README.md", "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"}
COLUMNS = ["text", "id", "dump", "url", "date", "file_path", "language", "language_score", "token_count"]
END = 4081


def documents(count: int, seed: int) -> list[dict]:
    """Rows in FineWeb's schema; one in ten repeats an earlier text, one in eight is not English."""
    rng = random.Random(seed)
    rows: list[dict] = []
    for i in range(count):
        text = "\n\n".join(rng.sample(PARAGRAPHS, rng.randint(1, 3)))
        if rows and rng.random() < 0.1:
            text = rng.choice(rows)["text"]
        facts = {
            "dump": "CC-MAIN-2024-10",
            "url": f"https://a.example/{i}",
            "date": "2024-02-21T00:00:00Z",
            "file_path": "s3://commoncrawl",
        }
        language = {
            "language": rng.choice(["en"] * 7 + ["fr"]),
            "language_score": rng.uniform(0.65, 1),
            "token_count": rng.randint(20, 900),
        }
        rows.append({"text": text, "id": f"<urn:uuid:{seed}-{i}>", **facts, **language})
    return rows


def store(folder: Path, files: dict[str, list[dict]], rows: int = 50) -> Path:
    """Write parquet files of rows."""
    return store_tables(folder, {name: pa.Table.from_pylist(content) for name, content in files.items()}, rows)


def store_tables(folder: Path, files: dict[str, "pa.Table"], rows: int = 50) -> Path:
    """Write parquet files of tables."""
    for name, table in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / name, row_group_size=rows)
    return folder


def expect(rows: list[dict], tokens: int, held_out: float) -> dict[str, list[dict]]:
    """The law, spelt a second time, on rows that passed the filters."""
    tokenizer = Tokenizer.from_file(str(DEMO / "model/tokenizer.json"))
    splits: dict[str, list[dict]] = {"train": [], "test": []}
    total = 0
    for row in rows:
        ids = tokenizer.encode(row["text"]).ids
        count = len(ids) + (ids[-1] != END)
        share = int.from_bytes(blake2b(row["text"].encode(), digest_size=8).digest(), "little") / 2**64
        held = held_out and (share < held_out or row["text"] == rows[0]["text"])
        splits["test" if held else "train"].append(row | {"n_tokens": count})
        total += 0 if held else count
        if total >= tokens:
            return splits
    raise AssertionError("the test's source is too small")


def read(folder: Path) -> dict[str, list[dict]]:
    """Rows of a made dataset, by split."""
    return {
        split: [row for file in sorted((folder / "data").glob(f"{split}-*")) for row in pq.read_table(file).to_pylist()]
        for split in ("train", "test")
    }


def data_bytes(folder: Path) -> dict[str, bytes]:
    """Bytes of all that must not depend on how the work went."""
    return {path.name: path.read_bytes() for path in [*(folder / "data").iterdir(), folder / "downcycle-data.json"]}


def paths(folder: Path) -> set[str]:
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def workers_of(pid: int) -> list[int]:
    """Worker processes that a process started."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            parent = (place / "stat").read_text().rpartition(")")[2].split()[1]
            if parent == str(pid) and b"dataset.worker" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
    return found


def refusal(out: Path, request: Request, **options: object) -> str:
    """What a call that must be refused says; it must leave no target and fit on a line."""
    with pytest.raises(DowncycleError) as caught:
        make_dataset(out, request, **options)
    assert "\n" not in str(caught.value)
    assert not out.is_dir() or not any(out.iterdir())
    return str(caught.value)
