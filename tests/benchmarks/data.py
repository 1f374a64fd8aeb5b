"""Measure how fast `downcycle data` counts and writes, beside the tokenizer alone on the same text in as many processes. Asserts nothing.

    python tests/benchmarks/data.py                          90 MB of text, about 6 minutes, 600 MB of free disk, 6 GB of memory
    python tests/benchmarks/data.py --megabytes 200 --tokenizer FOLDER

Makes its own text: paragraphs of the built-in model's healing text in other orders, in FineWeb's schema. Each round runs all contenders.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from downcycle.recipes.dataset.make import Request, make_dataset
from downcycle.recipes.dataset.tokenizer import open_tokenizer
from downcycle.surgery.checkpoint import DEMO_FOLDER

HEALING = DEMO_FOLDER.parent / "healing.txt"
ROWS_PER_FILE = 4000
TOKENIZERS: list[Tokenizer] = []  # where forked processes find it


def write_source(folder: Path, size: int) -> list[str]:
    """Write parquet files with `size` bytes of text in all; return the texts."""
    rng = random.Random(0)
    paragraphs = [text for text in HEALING.read_text().split("\n\n") if len(text) > 100]
    texts: list[str] = []
    while size > 0:
        texts.append("\n\n".join(rng.sample(paragraphs, rng.randint(2, 12))))
        size -= len(texts[-1].encode())
    for start in range(0, len(texts), ROWS_PER_FILE):
        part = texts[start : start + ROWS_PER_FILE]
        rows = [
            {
                "text": text,
                "id": f"<urn:uuid:{start + i}>",
                "dump": "CC-MAIN-2024-10",
                "url": f"https://a.example/{start + i}",
                "date": "2024-02-21T00:00:00Z",
                "file_path": "s3://commoncrawl/crawl-data",
                "language": "en",
                "language_score": 0.9,
                "token_count": len(text) // 4,
            }
            for i, text in enumerate(part)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{start:06}.parquet", row_group_size=1000)
    return texts


class Rate(NamedTuple):
    """Tokens per second and worker on the clock, and per second of processor time of all that ran (0: not known)."""

    wall: float
    cpu: float


def processor_seconds() -> float:
    """Processor time of this process and of those that it started and that ended."""
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def encode(texts: list[str]) -> Rate:
    """Encode all texts in batches of 1000 on one thread."""
    start, used, tokens = time.perf_counter(), processor_seconds(), 0
    tokenizer = TOKENIZERS[0]
    for first in range(0, len(texts), 1000):
        tokens += sum(len(encoding) for encoding in tokenizer.encode_batch(texts[first : first + 1000]))
    return Rate(tokens / (time.perf_counter() - start), tokens / (processor_seconds() - used))


def encode_together(texts: list[str], processes: int) -> Rate:
    """Encode the texts in several processes at once, each its share."""
    with get_context("fork").Pool(processes) as pool:
        rates = pool.map(encode, [texts[i::processes] for i in range(processes)], chunksize=1)
    return Rate(*(sum(rate[i] for rate in rates) / processes for i in (0, 1)))


def build(folder: Path, source: Path, tokenizer: str, tokens: int, workers: int) -> tuple[Rate, Rate]:
    """Make a dataset; return the rate while its tasks ran (from the first count to the last), and over the whole call."""
    seen: list[tuple[float, int]] = []
    start, used = time.perf_counter(), processor_seconds()
    request = Request(tokens, str(source), tokenizer=tokenizer, language="en")
    out = folder / f"out-{time.monotonic_ns()}"
    made = make_dataset(out, request, workers=workers, progress=lambda _, done: seen.append((time.perf_counter(), done)))
    total = made["splits"]["train"]["tokens"]
    whole = Rate(total / (time.perf_counter() - start) / workers, total / (processor_seconds() - used))
    begun = next(i for i, (_, done) in enumerate(seen) if done)
    ended = next(i for i, (_, done) in enumerate(seen) if done == seen[-1][1])
    tasks = (seen[ended][1] - seen[begun][1]) / (seen[ended][0] - seen[begun][0]) / workers
    return Rate(tasks, 0), whole


def main() -> None:
    """Make the text, run the rounds, print medians and ranges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=90)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", default="demo")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    loaded = open_tokenizer(options.tokenizer)
    tokenizer = Tokenizer.from_str(loaded.json)
    TOKENIZERS.append(tokenizer)
    results: dict[str, list[Rate]] = {}
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "source"
        source.mkdir()
        texts = write_source(source, options.megabytes * 10**6)
        tokens = int(0.97 * sum(len(encoding) for encoding in tokenizer.encode_batch(texts)))
        for _ in range(options.rounds):
            for workers in (1, 2):
                results.setdefault(f"encode_batch alone, {workers} at once", []).append(encode_together(texts, workers))
                tasks, whole = build(Path(name), source, options.tokenizer, tokens, workers)
                title = f"downcycle data, {workers} worker{'s' * (workers > 1)}"
                results.setdefault(f"{title}: tasks", []).append(tasks)
                results.setdefault(f"{title}: whole call", []).append(whole)
    print(f"{len(texts):,} documents, {tokens:,} tokens, tokenizer of {loaded.vocabulary:,}. Medians over {options.rounds} rounds")
    print(f"{'tokens per second':<40} {'and worker (range)':>31} {'ratio':>6} {'of processor':>13} {'ratio':>6}")
    base: list[Rate] = []
    for title, rates in results.items():
        base = results[title] if title.startswith("encode") else base
        wall, cpu = ([rate[i] for rate in rates] for i in (0, 1))
        ratios = [median(rate[i] / alone[i] for rate, alone in zip(rates, base, strict=True)) for i in (0, 1)]
        spread = f"{median(wall):,.0f} ({min(wall):,.0f}-{max(wall):,.0f})"
        work = f"{median(cpu):>13,.0f} {ratios[1]:>6.2f}" if all(cpu) else ""
        print(f"{title:<40} {spread:>31} {ratios[0]:>6.2f} {work}")


if __name__ == "__main__":
    main()
