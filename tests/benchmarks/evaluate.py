"""Measure the throughput of perplexity beside a bare forward loop over the same batches, in turn, and how long `downcycle eval` takes the
second time. Prints a table, asserts nothing.

    python tests/benchmarks/evaluate.py [SRC] [--load bf16] [--length 1024] [--rounds 7]

The bare loop asks the model for all its logits and looks at none. In brackets: a bare loop that asks for the logits of the scored
columns only, as the measurement does; what is left between these two is the loss itself.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from downcycle import open_checkpoint
from downcycle.eval.measure.loading import load
from downcycle.eval.measure.perplexity import UNSCORED, batches, default_batch, kept_only, token_losses
from downcycle.eval.measure.text import read_documents
from downcycle.eval.measure.windows import to_passages, to_windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", nargs="?", default="demo")
    parser.add_argument("--load", default="stored")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--stride", type=int)
    parser.add_argument("--documents", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    loaded = load(open_checkpoint(options.src), options.load)
    model, length = loaded.model, options.length
    began = time.perf_counter()
    passages = to_passages(loaded.tokenizer, read_documents(None, options.documents).texts)
    tokenizing = time.perf_counter() - began
    windows = list(to_windows(passages, length, options.stride or length // 2))
    batch = options.batch or default_batch(loaded, length)
    made = [(ids, targets) for _, ids, targets in batches(passages, windows, batch, loaded.device)]

    def first_scored(targets: torch.Tensor) -> int:
        return targets.shape[1] - int((targets != UNSCORED).any(0).int().argmax())

    def wait() -> None:
        if loaded.device.type == "cuda":
            torch.cuda.synchronize()

    ways: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
        "bare, all logits": lambda ids, targets: model(input_ids=ids, use_cache=False),
        "bare, scored columns": lambda ids, targets: model(input_ids=ids, use_cache=False, **kept_only(model, first_scored(targets))),
        "perplexity": lambda ids, targets: token_losses(model, ids, targets).cpu().isfinite().all(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for turn in range(options.rounds + 1):
            for name, way in ways.items():
                wait()
                began = time.perf_counter()
                for ids, targets in made:
                    way(ids, targets)
                wait()
                if turn:
                    seconds[name].append(time.perf_counter() - began)
    tokens = sum(ids.numel() for ids, _ in made)
    print(f"{options.src} as {options.load}: {len(windows)} windows of {length} in {len(made)} batches, {tokens:,} tokens read")
    print(f"tokenizing: {tokenizing:.2f} s")
    for name, times in seconds.items():
        ratios = [bare / own for bare, own in zip(seconds["bare, all logits"], times, strict=True)]
        print(f"{name:<21} {tokens / median(times):>9,.0f} tokens/s   {median(ratios):.3f} x ({min(ratios):.3f}-{max(ratios):.3f})")
    closer = [bare / own for bare, own in zip(seconds["bare, scored columns"], seconds["perplexity"], strict=True)]
    print(f"perplexity, against scored columns only: {median(closer):.3f} x")
    first, second = eval_twice(options.src)
    print(f"`downcycle eval {options.src}`, whole process: {first:.1f} s, and {second:.2f} s the second time")


def eval_twice(src: str) -> tuple[float, float]:
    """Seconds that the command takes with an empty cache, and again."""
    command = [str(Path(sys.executable).with_name("downcycle")), "eval", src, "--limit", "10"]
    seconds = []
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(2):
            began = time.perf_counter()
            subprocess.run(command, env=os.environ | {"DOWNCYCLE_CACHE": cache}, check=True, capture_output=True)
            seconds.append(time.perf_counter() - began)
    return seconds[0], seconds[1]


if __name__ == "__main__":
    main()
