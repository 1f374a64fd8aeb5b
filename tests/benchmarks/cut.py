"""Measure a cut from outside, as whole processes, beside `cp` of the same bytes and beside mergekit. Prints tables, asserts nothing.

    make bench                                               25 GB of free disk, about 5 minutes
    make bench BENCH="--mergekit /opt/mergekit/bin/mergekit-yaml --work /mnt/scratch"

Makes its own inputs and deletes them. Imports the standard library only: Linux never reports a lower peak for a process than that
of the process which started it, so this one stays small.
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

from llama import BLOCK, LLAMA_405B, QWEN3, Shape, write_model

MB, GB = 10**6, 10**9
FULL, LIGHT, CP, SYNCED, MERGEKIT = "downcycle", "downcycle, no torch installed", "`cp`", "`cp`, then fsync", "mergekit"


class Run(NamedTuple):
    """One process: wall time, processor time and peak resident memory."""

    seconds: float
    cpu: float
    peak: int


Runs = dict[str, list[Run]]


@dataclass(frozen=True)
class Contender:
    """A command, the folder it reads and the folder it makes."""

    title: str
    command: list[str]
    reads: Path
    makes: Path


@dataclass(frozen=True)
class Figures:
    """All that was measured, by program where several were."""

    race: Runs
    large: Runs
    qwen3: Runs
    plan: list[Run]
    help: list[Run]
    recipe: list[Run]


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


def race(contenders: list[Contender], rounds: int) -> Runs:
    """Run the contenders in turn, each round from another one on; first each input is read, old output deleted, the disk at rest."""
    results: Runs = {contender.title: [] for contender in contenders}
    for round_ in range(rounds):
        first = round_ % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            if contender.title == MERGEKIT and round_ not in (0, rounds - 1):
                continue  # twice is enough for what takes the longest
            shutil.rmtree(contender.makes, ignore_errors=True)
            read_all(contender.reads)
            os.sync()
            time.sleep(1)
            results[contender.title].append(run := measure(contender.command))
            print(f"{round_ + 1}/{rounds} {contender.title}: {run.seconds:.2f} s", file=sys.stderr)
    return results


def read_all(folder: Path) -> None:
    """Read every file, so that each contender finds its input in the page cache as far as it fits."""
    for path in folder.iterdir():
        with open(path, "rb", buffering=0) as file:
            while file.read(BLOCK):
                pass


def cut(program: Path, parent: Path, out: Path, keep: int = 24) -> list[str]:
    """The command under test."""
    return [str(program), "--src", str(parent), "--keep", str(keep), "--out", str(out)]


def mergekit(program: Path, parent: Path, out: Path) -> list[str]:
    """The same cut by mergekit's passthrough."""
    config = parent.with_suffix(".yaml")
    config.write_text(f"slices: [{{sources: [{{model: {parent}, layer_range: [0, 24]}}]}}]\nmerge_method: passthrough\ndtype: bfloat16\n")
    return [str(program), str(config), str(out), "--no-copy-tokenizer"]


def measure_race(work: Path, options: argparse.Namespace, programs: dict[str, Path]) -> Runs:
    """Cut, copy and merge one generated model; print what that was, and a row for each contender."""
    parent, child, out = work / "parent", work / "child", work / "out"
    write_model(parent, Shape().scaled(options.size * GB), GB, sparse=False)
    measure(cut(programs[FULL], parent, child))
    contenders = [Contender(title, cut(program, parent, out), parent, out) for title, program in programs.items()]
    contenders.append(Contender(CP, ["cp", "-r", str(child), str(out)], child, out))
    synced = ["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/* "$2"', "sh", str(child), str(out)]
    contenders.append(Contender(SYNCED, synced, child, out))
    if options.mergekit:
        contenders.append(Contender(MERGEKIT, mergekit(options.mergekit, parent, out), parent, out))
    results = race(contenders, options.runs)
    before, after = (sum(path.stat().st_size for path in folder.iterdir()) for folder in (parent, child))
    print(f"Keep 24 of the 32 layers of a bf16 Llama: {before / GB:.2f} GB in 1 GB shards -> {after / GB:.2f} GB, flushed to the disk.")
    print(f"{machine(work)}; {time.strftime('%Y-%m-%d %H:%M')}, load {os.getloadavg()[1]:.1f}.\n")
    print_race(results, after)
    for folder in (parent, child, out):
        shutil.rmtree(folder)
    return results


def measure_large(work: Path, size: float, programs: dict[str, Path]) -> Runs:
    """Cut a larger model, made of holes: what peak memory does when the model grows."""
    parent, out, runs = work / "large", work / "out", {}
    if not size or shutil.disk_usage(work).free < size * GB:
        print(f"--large {size:g}: not measured, it takes as many GB of free disk in {work}", file=sys.stderr)
        return {}
    write_model(parent, Shape().scaled(size * GB), GB, sparse=True)
    for title, program in programs.items():
        runs[title] = [measure(cut(program, parent, out))]
        shutil.rmtree(out)
    shutil.rmtree(parent)
    return runs


def measure_plans(work: Path, shape: Shape, programs: dict[str, Path], rounds: int) -> Runs:
    """Plan a cut to three quarters with each program, of a checkpoint made of holes."""
    parent, keep = work / "holes", shape.layers * 3 // 4
    write_model(parent, shape, 5 * GB, sparse=True)
    commands = {title: [*cut(program, parent, work / "out", keep), "--dry-run"] for title, program in programs.items()}
    results = {title: [measure(command) for _ in range(rounds)] for title, command in commands.items()}
    shutil.rmtree(parent)
    return results


def print_race(results: Runs, size: int) -> None:
    """One row for each contender."""
    print("| | wall time: median (range) | against `cp` | GB/s | processor time | peak memory |\n|-|-|-|-|-|-|")
    for title, runs in results.items():
        times = [run.seconds for run in runs]
        cells = (
            f"{title} ({len(runs)} runs)",
            f"{median(times):.2f} s ({min(times):.2f}-{max(times):.2f})",
            f"{median(times) / wall(results[CP]):.2f} ×",
            f"{size / GB / median(times):.2f}",
            f"{median(run.cpu for run in runs):.2f} s",
            f"{peak(runs):.0f} MB",
        )
        print(f"| {' | '.join(cells)} |")


def print_targets(figures: Figures, large: float) -> None:
    """One row for each target, met or missed."""
    print("\n| target | measured | |\n|-|-|-|")
    ours, copy = wall(figures.race[FULL]), wall(figures.race[CP])
    row(f"cut: at most 1.15 × `cp` + 2 s, here {1.15 * copy + 2:.2f} s", ours, 1.15 * copy + 2, f"{ours:.2f} s = {ours / copy:.2f} × `cp`")
    factor = wall(figures.race[MERGEKIT]) / ours if MERGEKIT in figures.race else 0
    row("at least 5 × faster than mergekit", -factor, -5, f"{factor:.1f} ×")
    for title, limit in ((FULL, 350), (LIGHT, 120)):
        usual, more, asked = (peak(runs.get(title, [])) for runs in (figures.race, figures.large, figures.qwen3))
        row(f"{title}: peak memory at most {limit} MB", usual, limit, f"{usual:.0f} MB")
        row(f"- the same for {large:g} GB, within a tenth", more, 1.1 * usual, f"{more:.0f} MB")
        row(f"- at most {limit} MB where transformers is asked about the config (Qwen3)", asked, limit, f"{asked:.0f} MB")
    row("plan a cut of 405B in 191 shards: at most 3 s", wall(figures.plan), 3, f"{wall(figures.plan):.2f} s")
    row("`downcycle recipe` for the built-in model: at most 1 s", wall(figures.recipe), 1, f"{wall(figures.recipe):.2f} s")
    row("`downcycle --help`: at most 0.4 s", wall(figures.help), 0.4, f"{wall(figures.help):.2f} s")


def row(target: str, measured: float, limit: float, text: str) -> None:
    """Print a target's row."""
    print(f"| {target} | {text} | {'PASS' if measured <= limit else 'MISS'} |" if measured else f"| {target} | not measured | |")


def wall(runs: list[Run]) -> float:
    """Median wall time in seconds."""
    return median(run.seconds for run in runs)


def peak(runs: list[Run]) -> float:
    """Largest resident memory in MB, mapped files included; 0 where nothing ran."""
    return max((run.peak / MB for run in runs), default=0)


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
    parser.add_argument("--large", type=float, default=20, help="GB of the larger model, 3/4 of it on disk; 0 leaves it out")
    parser.add_argument("--runs", type=int, default=5, help="rounds")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="folder on the disk to be measured")
    options = parser.parse_args()
    programs = {FULL: options.downcycle} | ({LIGHT: options.light} if options.light else {})
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder).resolve()
        helps = [measure([str(options.downcycle), "--help"]) for _ in range(2 * options.runs)]
        recipe = [str(options.downcycle), "recipe", "demo", "--out", str(work / "axolotl.yaml")]
        recipes = [measure(recipe) for _ in range(2 * options.runs)]
        plans = measure_plans(work, LLAMA_405B, {FULL: options.downcycle}, options.runs)[FULL]
        qwen3 = measure_plans(work, QWEN3, programs, options.runs)
        results = measure_race(work, options, programs)
        large = measure_large(work, options.large, programs)
    print_targets(Figures(results, large, qwen3, plans, helps, recipes), options.large)


if __name__ == "__main__":
    main()
