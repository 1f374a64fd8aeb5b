"""Measure the ternary stage: packing and GGUF from outside, beside `cp` of their source; what training wins back of what rounding loses;
one BitLinear step beside nn.Linear and the naive form. Prints tables, asserts nothing.

    python tests/benchmarks/ternary.py                      20 GB of free disk, some minutes
    python tests/benchmarks/ternary.py --parts linear       only these parts: pack, gguf, train, linear

Makes its own inputs and deletes them. `linear` runs on a GPU too, where there is one: shapes of Llama-3-8B, bf16, compiled and not.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import llama
from cut import CP, GB, SYNCED, Contender, Runs, machine, measure, peak, print_race, race, row, wall
from llama import BLOCK, Shape, write_model

GGUF = "downcycle gguf"
PARTS = ("pack", "gguf", "train", "linear")  # processes first: one starts with the peak of the one that starts it
DEMO = Path(__file__).parents[2] / "recipes" / "demo" / "model"
STEPS = 60  # of the training
SIZE = 2048  # inputs, outputs and tokens of the step on a CPU
LLAMA_8B = {"q": (4096, 4096), "k": (1024, 4096), "gate": (14336, 4096), "down": (4096, 14336)}  # outputs, inputs
TOKENS = 4096  # of the step on a GPU


def main() -> None:
    """Measure everything, print it, leave nothing behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--downcycle", type=Path, default=Path(sys.executable).with_name("downcycle"), help="the program under test")
    parser.add_argument("--size", type=float, default=4.94, help="GB of the model that is packed")
    parser.add_argument("--runs", type=int, default=5, help="rounds")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="folder on the disk to be measured")
    options = parser.parse_args()
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder).resolve()
        print(f"{machine(work)}; {time.strftime('%Y-%m-%d %H:%M')}, load {os.getloadavg()[1]:.1f}.\n")
        if "pack" in options.parts:
            print_packing(work, options)
        if "gguf" in options.parts:
            print_gguf(work, options)
        if "train" in options.parts:
            print_training(work)
    if "linear" in options.parts:
        print_linear(options.runs)


# Whole processes, from outside.


def print_packing(work: Path, options: argparse.Namespace) -> None:
    """Pack and copy one generated model."""
    parent, out = work / "parent", work / "out"
    write_model(parent, Shape().scaled(options.size * GB), GB, sparse=False)
    command = [str(options.downcycle), "ternarize", str(parent), "--out", str(out)]
    results, size = _beside_copies(parent, out, "downcycle ternarize", command, options.runs)
    print(f"Pack the decoder layers of a bf16 Llama of {size / GB:.2f} GB into 2 bits a weight, flushed to the disk.")
    _print("pack", results, size, 400)
    shutil.rmtree(parent)


def print_gguf(work: Path, options: argparse.Namespace) -> None:
    """Write a TQ2_0 file of a model whose weights are ternary already, in bf16 and packed."""
    parent, packed, out, program = work / "parent", work / "packed", work / "out", str(options.downcycle)
    _write_ternary(parent, Shape().scaled(options.size * GB))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, parent)
    script = 'mkdir "$3" && exec "$1" gguf "$2" --out "$3/model.gguf" --type tq2_0'
    results, size = _beside_copies(parent, out, GGUF, ["sh", "-c", script, "sh", program, str(parent), str(out)], options.runs)
    print(f"\nTQ2_0 of a bf16 Llama of {size / GB:.2f} GB whose matrices hold three values each, flushed to the disk.")
    _print("tq2_0", results, size, 300)
    measure([program, "ternarize", str(parent), "--out", str(packed)])
    shutil.rmtree(parent)
    results, held = _beside_copies(packed, out, GGUF, ["sh", "-c", script, "sh", program, str(packed), str(out)], options.runs)
    print(f"\nTQ2_0 of the same model packed, {held / GB:.2f} GB; rates are of the {size / GB:.2f} GB that it stands for.")
    _print("tq2_0", results, size, 300)
    shutil.rmtree(packed)


def _beside_copies(source: Path, out: Path, title: str, command: list[str], rounds: int) -> tuple[Runs, int]:
    contenders = [
        Contender(title, command, source, out),
        Contender(CP, ["cp", "-r", str(source), str(out)], source, out),
        Contender(SYNCED, ["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/* "$2"', "sh", str(source), str(out)], source, out),
    ]
    results = race(contenders, rounds)
    shutil.rmtree(out, ignore_errors=True)
    return results, sum(path.stat().st_size for path in source.iterdir())


def _print(what: str, results: Runs, size: int, target: int) -> None:
    ours = next(title for title in results if title not in (CP, SYNCED))
    print_race(results, size)
    print("\n| target | measured | |\n|-|-|-|")
    rate = size / 1e6 / wall(results[ours])
    text = f"{rate:.0f} MB/s = {wall(results[ours]) / wall(results[CP]):.2f} × `cp`"
    row(f"{what}: at least {target} MB/s of source weights", -rate, -target, text)
    row("peak memory at most 600 MB", peak(results[ours]), 600, f"{peak(results[ours]):.0f} MB")


def _write_ternary(folder: Path, shape: Shape) -> None:
    """Write a bf16 model whose matrices hold -s, 0 and s only; so do its embeddings, which nobody packs."""
    chance = random.Random(0)
    numbers = [struct.pack("<f", value)[2:] for value in (-0.0078125, 0.0, 0.0078125)]  # powers of two: exact in bf16
    block = b"".join(chance.choices(numbers, k=BLOCK // 2))
    finite, llama.finite_block = llama.finite_block, lambda: block
    try:
        write_model(folder, shape, GB, sparse=False)
    finally:
        llama.finite_block = finite


# Training, by the real Axolotl.


def print_training(folder: Path) -> None:
    """Train the built-in model, and random weights in its shape, with ternary weights on the same text; print held-out losses."""
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from transformers import AutoConfig, AutoModelForCausalLM

    from downcycle import load_model, open_checkpoint, ternarize

    from ternary_training import as_trained, logits_of, loss_of, recipe, run_axolotl, windows, write_text

    write_text(folder, 250)
    shutil.copytree(DEMO, folder / "random")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(DEMO)).float().save_pretrained(folder / "random")
    settings = {"max_steps": STEPS, "learning_rate": 3e-3, "save_total_limit": 1}
    models = {"pretrained": DEMO, "scratch": folder / "random"}
    run_axolotl(*(recipe(folder, name, model, {"warmup_steps": STEPS // 2}, **settings) for name, model in models.items()))
    ids = windows()
    with torch.compiler.set_stance("force_eager"):
        packed = load_model(ternarize(open_checkpoint(folder / "pretrained")), dtype=torch.float32)
        contenders = {
            "as it was": load_model(open_checkpoint(DEMO), dtype=torch.float32),
            "rounded, not trained": as_trained(DEMO, 1),
            "trained with ternary weights": as_trained(folder / "pretrained", 1),
            "the same, packed, in stock transformers": packed,
            "trained so from random weights": as_trained(folder / "scratch", 1),
        }
        print(f"\nThe built-in model, {STEPS} steps of 1,024 tokens; loss in nats per held-out token:\n| | loss |\n|-|-|")
        for title, model in contenders.items():
            print(f"| {title} | {loss_of(logits_of(model, ids), ids):.3f} |")


# One step of training, in this process.


def print_linear(rounds: int) -> None:
    """Time forward and backward of one map, in turn."""
    import torch

    torch.manual_seed(0)
    print(f"\nOne linear map, forward and backward, {SIZE} tokens, {SIZE} inputs and outputs, float32, {torch.get_num_threads()} threads:")
    times = _steps((SIZE, SIZE), SIZE, "cpu", torch.float32, 4 * rounds)
    print("| | time | against nn.Linear |\n|-|-|-|")
    plain = median(times["nn.Linear"][0])
    for title, (seconds, _) in times.items():
        print(f"| {title} | {1e3 * median(seconds):.1f} ms | {median(seconds) / plain:.2f} × |")
    ratio = median(times["BitLinear"][0]) / plain
    print("\n| target | measured | |\n|-|-|-|")
    row("at most 1.2 × nn.Linear", ratio, 1.2, f"{ratio:.2f} ×")
    if torch.cuda.is_available():
        _print_gpu(rounds)


def _print_gpu(rounds: int) -> None:
    import torch

    print(f"\n{torch.cuda.get_device_name()}, bf16, {TOKENS} tokens, shapes of Llama-3-8B; time and most memory held while stepping:")
    print("| map | | time | against nn.Linear | memory |\n|-|-|-|-|-|")
    worst = 0.0
    for name, shape in LLAMA_8B.items():
        for compiled in (False, True):
            times = _steps(shape, TOKENS, "cuda", torch.bfloat16, 10 * rounds, compiled)
            plain = median(times["nn.Linear"][0])
            for title, (seconds, memory) in times.items():
                ratio = median(seconds) / plain
                worst = max(worst, ratio) if compiled and title == "BitLinear" else worst
                words, cells = f"{title}{', compiled' if compiled else ''}", f"{1e3 * median(seconds):.2f} ms | {ratio:.2f} ×"
                print(f"| {name} {shape[0]} × {shape[1]} | {words} | {cells} | {memory / 2**20:.0f} MiB |")
    print("\n| target | measured | |\n|-|-|-|")
    row("compiled: at most 1.25 × nn.Linear", worst, 1.25, f"{worst:.2f} × at worst")


def _steps(shape: tuple[int, int], tokens: int, device: str, dtype: Any, rounds: int, compiled: bool = False) -> dict[str, Any]:
    """Time steps of each kind of map, in turn; (seconds of each, bytes held at most) by its name."""
    import torch

    outputs, inputs = shape
    value = torch.randn(tokens, inputs, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(tokens, outputs, device=device, dtype=dtype)
    maps = _maps(inputs, outputs, device, dtype)
    steps = {name: torch.compile(one) if compiled else one for name, one in maps.items()}
    found: dict[str, Any] = {name: ([], 0) for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            gc.collect()
            seconds, memory = _step(step, value, gradient, device)
            maps[name].weight.grad = value.grad = None
            if number >= 2:  # the first compile, and touch memory for the first time
                found[name] = (found[name][0] + [seconds], max(found[name][1], memory))
    return found


def _step(step: Callable[[Any], Any], value: Any, gradient: Any, device: str) -> tuple[float, int]:
    import torch

    held = 0
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    began = time.perf_counter()
    step(value).backward(gradient)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return seconds, torch.cuda.max_memory_allocated() - held if device == "cuda" else 0


def _maps(inputs: int, outputs: int, device: str, dtype: Any) -> dict[str, Any]:
    """nn.Linear, BitLinear with lambda 1, and what the papers' formulas spell, operation by operation."""
    from torch import nn

    from downcycle.surgery.ternary.bitlinear import convert, set_strength

    class Naive(nn.Linear):
        """x + (Q(x) - x).detach() as it is written, in autograd's hands."""

        def forward(self, value: Any) -> Any:
            scale = 1 / self.weight.abs().mean().clamp(min=1e-5)
            rounded = (self.weight * scale).round().clamp(-1, 1) / scale
            weight = self.weight + (rounded - self.weight).detach()
            scale = 127 / value.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
            rounded = (value * scale).round().clamp(-128, 127) / scale
            return nn.functional.linear(value + (rounded - value).detach(), weight)

    plain, bit = (nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype) for _ in range(2))
    convert(bit)
    set_strength(bit, 1.0)
    return {"nn.Linear": plain, "BitLinear": bit, "naive": Naive(inputs, outputs, bias=False, device=device, dtype=dtype)}


if __name__ == "__main__":
    main()
