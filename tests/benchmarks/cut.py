"""Measure a cut from outside, as whole processes, beside `cp` of the same bytes and beside mergekit. Prints tables, asserts nothing.

    make bench                                               about 45 GB of free disk, 10 minutes
    make bench BENCH="--mergekit /opt/mergekit/bin/mergekit-yaml --work /mnt/scratch"

Makes its own inputs and deletes them. Imports the standard library only: Linux never reports a lower peak for a process
than that of the process which started it, so this one stays small.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from llama import BLOCK, LLAMA_405B, Shape, write_model

MB, GB = 10**6, 10**9
FULL, LIGHT, CP, SYNCED, MERGEKIT = "downcycle", "downcycle, no torch", "cp", "cp, then fsync", "mergekit"


class Run(NamedTuple):
    """One process: wall time, processor time and peak resident memory."""

    seconds: float
    cpu: float
    peak: int


@dataclass(frozen=True)
class Contender:
    """A command, the folder it reads and the folder it makes."""

    title: str
    command: list[str]
    reads: Path
    makes: Path


def measure(command: list[str]) -> Run:
    """Run a command to its end, unseen; stop with its output if it fails."""
    with tempfile.TemporaryFile() as log:
        actions = [(os.POSIX_SPAWN_DUP2, log.fileno(), 1), (os.POSIX_SPAWN_DUP2, log.fileno(), 2)]
        start = time.perf_counter()
        child = os.posix_spawnp(command[0], command, os.environ, file_actions=actions)
        _, status, usage = os.wait4(child, 0)
        seconds = time.perf_counter() - start
        if status:
            log.seek(0)
            sys.exit(f"{' '.join(command)}: status {status}\n{log.read()[-3000:].decode(errors='replace')}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def race(contenders: list[Contender], runs: int) -> dict[str, list[Run]]:
    """Run the contenders in turn, each round from another one on; first each input is read, old output deleted, the disk at rest."""
    results: dict[str, list[Run]] = {contender.title: [] for contender in contenders}
    for round_ in range(runs):
        first = round_ % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            if contender.title == MERGEKIT and round_ not in (0, runs - 1):
                continue  # twice is enough for what takes the longest
            shutil.rmtree(contender.makes, ignore_errors=True)
            read_all(contender.reads)
            os.sync()
            time.sleep(1)
            results[contender.title].append(run := measure(contender.command))
            print(f"{round_ + 1}/{runs} {contender.title}: {run.seconds:.2f} s", file=sys.stderr)
    for contender in contenders:
        shutil.rmtree(contender.makes, ignore_errors=True)
    return results


def read_all(folder: Path) -> None:
    """Read every file, so that each contender finds its input in the page cache as far as it fits."""
    for path in folder.iterdir():
        with open(path, "rb", buffering=0) as file:
            while file.read(BLOCK):
                pass


def nbytes(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def cut(program: Path, parent: Path, out: Path, keep: int = 24) -> list[str]:
    """The command under test."""
    return [str(program), "--src", str(parent), "--keep", str(keep), "--out", str(out)]


def mergekit(program: Path, parent: Path, out: Path) -> list[str]:
    """The same cut by mergekit's passthrough."""
    config = parent.with_suffix(".yaml")
    config.write_text(f"slices: [{{sources: [{{model: {parent}, layer_range: [0, 24]}}]}}]\nmerge_method: passthrough\ndtype: bfloat16\n")
    return [str(program), str(config), str(out), "--no-copy-tokenizer"]


def measure_cut(work: Path, options: argparse.Namespace) -> tuple[dict[str, list[Run]], int, int]:
    """Race all contenders over one generated model; return their runs, and the bytes of parent and child."""
    parent, child, out = work / "parent", work / "child", work / "out"
    write_model(parent, Shape().scaled(options.size * GB), GB, sparse=False)
    measure(cut(options.downcycle, parent, child))
    contenders = [Contender(FULL, cut(options.downcycle, parent, out), parent, out)]
    if options.light:
        contenders.append(Contender(LIGHT, cut(options.light, parent, out), parent, out))
    contenders.append(Contender(CP, ["cp", "-r", str(child), str(out)], child, out))
    synced = ["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/* "$2"', "sh", str(child), str(out)]
    contenders.append(Contender(SYNCED, synced, child, out))
    if options.mergekit:
        contenders.append(Contender(MERGEKIT, mergekit(options.mergekit, parent, out), parent, out))
    results = race(contenders, options.runs), nbytes(parent), nbytes(child)
    shutil.rmtree(parent)
    shutil.rmtree(child)
    return results


def measure_large(work: Path, options: argparse.Namespace) -> dict[str, Run]:
    """Cut a model four times as large, made of holes: what peak memory does when the model grows."""
    parent, out, runs = work / "large", work / "out", {}
    write_model(parent, Shape().scaled(options.large * GB), GB, sparse=True)
    if shutil.disk_usage(work).free < options.large * GB:
        print(f"--large {options.large:g} skipped: too little free disk in {work}", file=sys.stderr)
    else:
        for title, program in ((FULL, options.downcycle), (LIGHT, options.light)):
            if program:
                runs[title] = measure(cut(program, parent, out))
                shutil.rmtree(out)
    shutil.rmtree(parent)
    return runs


def measure_plan(work: Path, program: Path, runs: int) -> list[Run]:
    """Plan a cut of a checkpoint with the tensors of Llama-3.1-405B in its 191 shards."""
    parent = work / "405b"
    write_model(parent, LLAMA_405B, 5 * GB, sparse=True)
    results = [measure([*cut(program, parent, work / "out", 100), "--dry-run"]) for _ in range(runs)]
    shutil.rmtree(parent)
    return results


def print_race(results: dict[str, list[Run]], size: int) -> None:
    """One row for each contender."""
    print("| | wall time: median (range) | against `cp` | GB/s | processor time | peak memory |\n|-|-|-|-|-|-|")
    copy = seconds(results[CP])
    for title, runs in results.items():
        times = [run.seconds for run in runs]
        cells = [
            f"{title} ({len(runs)} runs)",
            f"{median(times):.2f} s ({min(times):.2f}-{max(times):.2f})",
            f"{median(times) / copy:.2f} ×",
            f"{size / GB / median(times):.2f}",
            f"{median(run.cpu for run in runs):.2f} s",
            f"{max(run.peak for run in runs) / MB:.0f} MB",
        ]
        print(f"| {' | '.join(cells)} |")


def print_targets(results: dict[str, list[Run]], large: dict[str, Run], plan: list[Run], start: list[Run], large_size: float) -> None:
    """One row for each target, met or missed."""
    print("\n| target | measured | |\n|-|-|-|")
    ours, copy = seconds(results[FULL]), seconds(results[CP])
    row(f"cut: at most 1.15 × `cp` + 2 s = {1.15 * copy + 2:.2f} s", f"{ours:.2f} s, {ours / copy:.2f} × `cp`", ours <= 1.15 * copy + 2)
    factor = seconds(results[MERGEKIT]) / ours if MERGEKIT in results else None
    row("at least 5 × faster than mergekit", factor and f"{factor:.1f} ×", bool(factor and factor >= 5))
    for title, limit in ((FULL, 350), (LIGHT, 120)):
        peak = max((run.peak for run in results.get(title, [])), default=0) / MB
        row(f"{title}: peak memory at most {limit} MB", peak and f"{peak:.0f} MB", peak <= limit)
        more = large[title].peak / MB if title in large else 0
        row(f"{title}: the same at {large_size:g} GB, within a tenth", more and f"{more:.0f} MB", more <= 1.1 * peak)
    row("plan a cut of 405B in 191 shards: at most 3 s", f"{seconds(plan):.2f} s", seconds(plan) <= 3)
    row("`downcycle --help`: at most 0.4 s", f"{seconds(start):.2f} s", seconds(start) <= 0.4)


def row(target: str, measured: object, met: bool) -> None:
    """Print a target's row."""
    print(f"| {target} | {measured or 'not measured'} | {('PASS' if met else 'MISS') if measured else ''} |")


def seconds(runs: list[Run]) -> float:
    """Median wall time."""
    return median(run.seconds for run in runs)


def machine(work: Path) -> str:
    """The machine in words."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB
    model = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    mounts = (line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines())
    mount = max((mount for mount in mounts if work.is_relative_to(mount[1])), key=lambda mount: len(mount[1]))
    disk = "virtual disk" if re.match("/dev/x?vd", mount[0]) else mount[0]
    return f"{os.cpu_count()} cores ({model[0] if model else '?'}), {memory:.0f} GB of memory, {disk} ({mount[2]})"


def main() -> None:
    """Measure everything, print it, leave nothing behind."""
    parser = argparse.ArgumentParser(description="Measure cuts beside cp and mergekit.")
    parser.add_argument("--downcycle", type=Path, default=Path(sys.executable).with_name("downcycle"), help="the program under test")
    parser.add_argument("--light", type=Path, help="downcycle of an environment without torch")
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml")
    parser.add_argument("--size", type=float, default=4.94, help="GB of the model that is cut")
    parser.add_argument("--large", type=float, default=20, help="GB of the model for the peak memory; takes 3/4 of it on disk")
    parser.add_argument("--runs", type=int, default=5, help="rounds")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="folder on the disk to be measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work, before = Path(folder).resolve(), os.getloadavg()[0]
        start = [measure([str(options.downcycle), "--help"]) for _ in range(2 * options.runs)]
        plan = measure_plan(work, options.downcycle, options.runs)
        large = measure_large(work, options)
        results, size, written = measure_cut(work, options)
        print(f"\nKeep 24 of 32 layers of a {size / GB:.2f} GB bf16 Llama in 1 GB shards: {written / GB:.2f} GB are written.")
        print(f"{machine(work)}; load before and after {before:.1f}, {os.getloadavg()[0]:.1f}; {time.strftime('%Y-%m-%d %H:%M')}.\n")
    print_race(results, written)
    print_targets(results, large, plan, start, options.large)


if __name__ == "__main__":
    main()
