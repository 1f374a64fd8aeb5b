"""Measure scoring layer by layer: memory, time beside a plain forward, work beside the naive way, what rules and compensations lose.
Prints tables, asserts nothing.

    python tests/benchmarks/score.py                      a 4.9 GB model is made and deleted; about 45 minutes on 2 cores
    python tests/benchmarks/score.py --parts demo peers   only these parts: memory, time, work, demo, peers

Peers: block influence by short-transformers, where that is installed, and angular distances by the procedure that PruneMe publishes:
the whole model with `output_hidden_states`, last tokens of hidden_states[1:], arccos of their cosine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from cut import measure
from llama import Shape, write_model

PARTS = ("memory", "demo", "time", "work", "peers")  # a process starts with the peak of the one that starts it
DOWNCYCLE = Path(sys.executable).with_name("downcycle")
CALIBRATION = ("--calibrate", "demo", "--samples", "8", "--length", "256")
MODEL = Path(__file__).parents[2] / "recipes/demo/model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryDirectory(prefix="downcycle-") as folder:
        os.environ["DOWNCYCLE_CACHE"] = str(Path(folder) / "cache")
        if "memory" in options.parts:
            print_memory(Path(folder))
        if "demo" in options.parts:
            print_demo(Path(folder))
        from downcycle.eval.machine import machine_words

        print(f"{machine_words()}; load {os.getloadavg()[1]:.1f}")
        if "time" in options.parts:
            print_time(Path(folder), options.rounds)
        if "work" in options.parts:
            print_work()
        if "peers" in options.parts:
            print_peers()


# Memory, from outside.


def print_memory(work: Path) -> None:
    """Choose layers of a 4.9 GB model of 32 layers by each kind of pass, as whole processes."""
    parent = work / "parent"
    write_model(parent, Shape(), 10**9, sparse=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, parent)
    print("4.94 GB bf16 Llama of 32 layers, 8 samples of 256 tokens, on the CPU:")
    for rule, keep, compensate in (("bi", 24, "none"), ("taylor", 24, "none"), ("ppl", 31, "none"), ("bi", 24, "refit")):
        command = [str(DOWNCYCLE), "--src", str(parent), "--keep", str(keep), "--select", rule, "--compensate", compensate]
        run = measure([*command, *CALIBRATION, "--dry-run", "--out", str(work / "out")])
        print(f"  --select {rule:6} --compensate {compensate:5} {run.seconds:6.1f} s, peak {run.peak / 1e9:.2f} GB")
    shutil.rmtree(parent)


# Time and work, in this process.


def print_time(work: Path, rounds: int) -> None:
    """Time one pass that takes all single-pass metrics beside plain forwards of the whole model over the same batches, in turn."""
    from downcycle import open_checkpoint

    write_model(work / "half", Shape(hidden=1024, intermediate=3072, heads=16, kv_heads=4, vocab=32000), 10**9, sparse=False)
    half = open_checkpoint(work / "half")
    for checkpoint, samples in ((half, 16), (open_checkpoint("demo"), 64)):
        batches = study(samples=samples).fit
        print(f"{checkpoint.num_layers} layers, {checkpoint.nbytes / 1e6:.0f} MB, {sum(batch.ids.size for batch in batches):,} tokens:")
        for dtype in ("float32", "bfloat16"):
            ours, plain = _times(checkpoint, batches, dtype, rounds)
            print(f"  {dtype}: all single-pass metrics {ours:.2f} s, plain forwards {plain:.2f} s: {ours / plain:.2f} x")
    shutil.rmtree(work / "half")


def _times(checkpoint, batches, dtype, rounds):  # noqa: ANN001, ANN202
    import torch

    from downcycle import load_model
    from downcycle.surgery.importance.observers import Influences, LastTokens, Magnitudes
    from downcycle.surgery.importance.parts import Parts
    from downcycle.surgery.importance.paths import WHOLE, run_paths
    from downcycle.surgery.importance.states import States

    options = {"dtype": getattr(torch, dtype)}
    model = load_model(checkpoint, **options)

    def plain() -> None:
        with torch.inference_mode():
            for batch in batches:
                model(input_ids=torch.from_numpy(batch.ids), use_cache=False)

    def scored() -> None:
        with tempfile.TemporaryDirectory() as folder:
            parts = Parts(checkpoint, **options)
            observers = [kind(parts.depth) for kind in (Influences, LastTokens, Magnitudes)]
            run_paths(parts, batches, [WHOLE], States(Path(folder)), observers=observers)

    seconds: dict[str, list[float]] = {"plain": [], "scored": []}
    for _ in range(rounds):
        for name, run in (("plain", plain), ("scored", scored)):
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return median(seconds["scored"]), median(seconds["plain"])


def print_work() -> None:
    """Count layers loaded and run, and time leave-one-out beside rerunning the whole model for each candidate."""
    import torch

    from downcycle import load_model
    from downcycle.eval.scoring.measure import alone, fit_losses
    from downcycle.surgery.importance.paths import WHOLE
    from downcycle.surgery.importance.search import count_naive, count_work, mean_loss

    for depth in (12, 32):
        paths = [WHOLE, *(frozenset({layer}) for layer in range(depth))]
        (loads, runs), naive = count_work(depth, paths), count_naive(depth, paths)
        print(f"leave one out of {depth}: {loads} layers loaded, {runs} run; naive {naive}: {naive / loads:.0f} x, {naive / runs:.1f} x")
    one = study(samples=8)
    began = time.perf_counter()
    found = fit_losses(one, alone(one), "scoring the layers")
    ours, began = time.perf_counter() - began, time.perf_counter()
    largest = 0.0
    for path in alone(one):
        model = load_model(one.checkpoint)
        layers = torch.nn.ModuleList(layer for number, layer in enumerate(model.model.layers) if number not in path)
        model.model.layers, model.config.num_hidden_layers = layers, len(layers)
        largest = max(largest, abs(mean_loss(list(_losses(model, one.fit))) - found[path]))
    naive_seconds = time.perf_counter() - began
    print(f"demo: {ours:.1f} s, naive {naive_seconds:.1f} s: {naive_seconds / ours:.1f} x; largest difference of a loss {largest:.1e}")


def _losses(model, batches):  # noqa: ANN001, ANN202
    import torch

    from downcycle.surgery.importance.paths import SampleLoss

    with torch.inference_mode():
        for batch in batches:
            ids = torch.from_numpy(batch.ids)
            losses = torch.nn.functional.cross_entropy(
                model(input_ids=ids, use_cache=False).logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none"
            )
            for row, given in zip(losses, batch.given, strict=True):
                yield SampleLoss(float(row[given - 1 :].double().sum()), len(row) - given + 1, 0)


# What rules and compensations lose.


def print_demo(work: Path) -> None:
    """Run the command of the README on the built-in model, and say what each compensation wins back on average."""
    run = measure([str(DOWNCYCLE), "score", "demo", "--calibrate", "demo", "--report", str(work / "scores")])
    scores = json.loads((work / "scores" / "scores.json").read_text())
    uncut = scores["uncut"]["loss"]
    print(f"downcycle score demo --calibrate demo: {run.seconds:.0f} s, peak {run.peak / 1e9:.2f} GB; uncut {uncut:.3f}")
    won: dict[str, list[float]] = {"scale": [], "refit": []}
    for choice in scores["choices"]:
        cut = choice["cut"]["loss"]
        losses = {method: choice["compensated"].get(method, choice["cut"])["loss"] for method in won}
        for method, loss in losses.items():
            won[method].append((cut - loss) / (cut - uncut))
        print(
            f"  {choice['rule']:10} keeps {choice['kept']}: cut {cut:.3f}, "
            + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        )
    for method, shares in won.items():
        print(f"  {method} wins back {sum(shares) / len(shares):.0%} on average, {min(shares):.0%} to {max(shares):.0%}")


def print_peers() -> None:
    """Compare block influence and angular distances with those of peers, on samples of one length in float32."""
    import torch

    from downcycle import load_model
    from downcycle.eval.scoring.measure import HIDDEN
    from downcycle.eval.scoring.measure import measure as measure_layers

    one = replace(study(samples=16), load="fp32")
    found = measure_layers(one, HIDDEN)[HIDDEN]
    ids = [row.tolist() for batch in one.fit for row in batch.ids if batch.ids.shape[1] == one.calibration.length]
    model = load_model(one.checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        states = model(input_ids=torch.tensor(ids), output_hidden_states=True).hidden_states
    last = [state[:, -1] for state in states]
    depth, inner, reaching = len(last) - 1, 0.0, 0.0
    for size in range(1, depth):
        for start in range(1, depth - size + 1):  # PruneMe begins at hidden_states[1]
            cosine = torch.nn.functional.cosine_similarity(last[start], last[start + size], dim=-1).clamp(-1, 1)
            gap = abs(float((cosine.arccos() / math.pi).mean()) - found["angular"][size - 1][start])
            inner, reaching = (max(inner, gap), reaching) if start + size < depth else (inner, max(reaching, gap))
    print(f"angular distance, PruneMe's procedure: largest difference {inner:.1e}; of blocks that reach the last layer {reaching:.1e},")
    print("  as its last state is behind the final norm")
    if importlib.util.find_spec("short_transformers") is None:
        print("short-transformers: not installed here (pip install short-transformers), not compared")
        return
    gaps = [abs(theirs - ours) for theirs, ours in zip(_short_transformers(model, ids), found["bi"], strict=True)]
    print(f"block influence, short-transformers: largest difference {max(gaps):.1e}")


def _short_transformers(model, ids):  # noqa: ANN001, ANN202
    """Its own `analyse_layers`, given token ids; its hook wants tuples of layers, which recent transformers do not return."""
    import torch
    from short_transformers import ShortTransformer, dist
    from transformers import BatchEncoding

    for layer in model.model.layers:
        layer.forward = (lambda own: lambda *args, **kwargs: (own(*args, **kwargs),))(layer.forward)
    short = ShortTransformer.from_model(model)
    for layer in short.model.layers:
        layer.forward = (lambda own: lambda *args, **kwargs: own(*args, **kwargs)[0])(layer.forward)
    short.set_metric(dist.bi_score)
    rows = [{"ids": row} for row in ids]
    found = short.analyse_layers(
        dataset=rows,
        tokenizer=lambda ids, **_: BatchEncoding({"input_ids": torch.tensor([ids])}),
        key="ids",
        limit=len(rows),
        max_length=10**6,
    )
    return [float(found[0, layer]) for layer in range(model.config.num_hidden_layers)]


def study(**options: int):  # noqa: ANN201
    """The built-in model on the built-in text."""
    from downcycle import open_checkpoint
    from downcycle.eval.scoring.commands import Measuring, open_study

    return open_study(open_checkpoint("demo"), Measuring("demo", **options))


if __name__ == "__main__":
    main()
