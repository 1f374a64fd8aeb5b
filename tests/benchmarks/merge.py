"""Measure a merge from outside, as whole processes, beside `cp` of the model and beside Axolotl's own. Prints tables, asserts nothing.

    python tests/benchmarks/merge.py                                          15 GB of free disk, a minute
    python tests/benchmarks/merge.py --axolotl .venv/bin/axolotl --runs 3     25 GB of free disk and as much memory

Makes its own inputs and deletes them: the bf16 Llama of the other benchmark, and a LoRA of rank 128 on all its linear modules.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import time
from math import prod
from pathlib import Path

from cut import CP, FULL, GB, SYNCED, Contender, machine, peak, print_race, race, row, wall
from llama import BLOCK, Shape, write_model

RANK = 128
AXOLOTL = {"axolotl merge-lora": "memory_efficient", "axolotl merge-lora, legacy": "legacy"}
DEMO = Path(__file__).parents[2] / "recipes" / "demo" / "model"


def write_adapter(folder: Path, shape: Shape) -> None:
    """Write a float32 LoRA of finite random numbers on every linear module of the model's layers."""
    fields: dict[str, object] = {}
    end = 0
    linear = {name: dims for name, dims in shape.tensors() if "_proj." in name}
    for name, (out, into) in linear.items():
        for half, dims in (("A", (RANK, into)), ("B", (out, RANK))):
            size = 4 * prod(dims)
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_{half}.weight"
            fields[key] = {"dtype": "F32", "shape": dims, "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)
    chance = random.Random(0)
    block = struct.pack(f"{BLOCK // 4}f", *(chance.gauss(0, 0.02) for _ in range(BLOCK // 4)))
    folder.mkdir()
    with open(folder / "adapter_model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for done in range(0, end, BLOCK):
            file.write(block[: end - done])
    targets = sorted({name.split(".")[-2] for name in linear})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "base"}))


def axolotl(program: Path, work: Path, method: str) -> list[str]:
    """The same merge by Axolotl, on the processor; it writes into a folder of its own naming."""
    config = work / f"{method}.yaml"
    keys = {
        "base_model": str(work / "base"), "adapter": "lora", "lora_model_dir": str(work / "adapter"), "output_dir": str(work / "axolotl"),
        "lora_r": RANK, "lora_alpha": 2 * RANK, "lora_target_linear": True, "merge_method": method, "sequence_len": 64,
        "micro_batch_size": 1, "gradient_accumulation_steps": 1, "num_epochs": 1, "learning_rate": 1e-4, "bf16": True,
        "attn_implementation": "sdpa", "datasets": [{"path": str(work / "text.jsonl"), "type": "completion"}],
        **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"), False),
    }  # fmt: skip
    config.write_text(json.dumps(keys))  # JSON is YAML
    return [str(program), "merge-lora", str(config)]


def measure_merges(work: Path, options: argparse.Namespace) -> None:
    """Merge and copy one generated model; print a row for each contender, and the targets."""
    base, adapter, out = work / "base", work / "adapter", work / "out"
    shape = Shape().scaled(options.size * GB)
    write_model(base, shape, GB, sparse=False)
    write_adapter(adapter, shape)
    merge = [str(options.downcycle), "merge", str(base), str(adapter), "--out", str(out)]
    contenders = [Contender(FULL, merge, base, out), Contender(CP, ["cp", "-r", str(base), str(out)], base, out)]
    synced = ["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/* "$2"', "sh", str(base), str(out)]
    contenders.append(Contender(SYNCED, synced, base, out))
    if options.axolotl:
        for path in DEMO.glob("tokenizer*"):
            shutil.copy(path, base)
        (work / "text.jsonl").write_text('{"text": "x"}\n')
        contenders += [
            Contender(title, axolotl(options.axolotl, work, method), base, work / "axolotl") for title, method in AXOLOTL.items()
        ]
    results = race(contenders, options.runs)
    size = sum(path.stat().st_size for path in base.iterdir())
    print(f"Merge a float32 LoRA of rank {RANK} on all linear modules into a bf16 Llama of {size / GB:.2f} GB, flushed to the disk.")
    print(f"{machine(work)}; {time.strftime('%Y-%m-%d %H:%M')}, load {os.getloadavg()[1]:.1f}.\n")
    print_race(results, size)
    print("\n| target | measured | |\n|-|-|-|")
    ours, copy = wall(results[FULL]), wall(results[SYNCED])
    row(f"at most 3 × `cp`, then fsync: {3 * copy:.2f} s", ours, 3 * copy, f"{ours:.2f} s = {ours / copy:.2f} ×")
    row("peak memory at most 1 GB", peak(results[FULL]), 1000, f"{peak(results[FULL]):.0f} MB")


def main() -> None:
    """Measure everything, print it, leave nothing behind."""
    parser = argparse.ArgumentParser(description="Measure merges beside cp and Axolotl.")
    parser.add_argument("--downcycle", type=Path, default=Path(sys.executable).with_name("downcycle"), help="the program under test")
    parser.add_argument("--axolotl", type=Path, help="axolotl")
    parser.add_argument("--size", type=float, default=4.94, help="GB of the base")
    parser.add_argument("--runs", type=int, default=5, help="rounds")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="folder on the disk to be measured")
    options = parser.parse_args()
    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        measure_merges(Path(folder).resolve(), options)


if __name__ == "__main__":
    main()
