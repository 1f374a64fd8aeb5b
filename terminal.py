"""What commands share: options, counts and sizes as people write them, layer maps, progress on stderr. Knows no command."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from typing import Annotated, Any

import typer

from .surgery.errors import DowncycleError
from .surgery.staging import staging_path, target_path

QUIET = 5.0  # seconds between two lines of one stage, where there is no progress bar

Src = Annotated[str, typer.Argument(metavar="SRC", help="Folder, Hub id, or 'demo', the built-in model.")]
Revision = Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a Hub repo.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Accept models that come with Python code; it is copied, not run.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, for programs.")]


def was_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_given(context: typer.Context, names: Iterable[str], why: str) -> None:
    """End with a usage error where one of these options stands on the command line."""
    for name in names:
        if was_given(context, name):
            given = next(parameter for parameter in context.command.params if parameter.name == name)
            option = given.opts[0] if given.opts[0].startswith("-") else str(given.metavar)
            raise typer.BadParameter(f"{option} {why}", context)


def printable(text: str) -> str:
    """Put text on one line; spell out what could steer a terminal."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in " ".join(text.splitlines()))


def parse_count(text: str, option: str) -> int:
    """Read 24, 5GB or 1B (decimal units; GiB and MiB are binary)."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgtb])(i?)b?)?\s*", text, re.IGNORECASE)
    if not match or len(text) > 20:
        raise DowncycleError(f"{option} {text}: not a number; write it like 24, 5GB or 1B")
    power = {"k": 1, "m": 2, "g": 3, "b": 3, "t": 4}.get((match[2] or "").lower(), 0)
    count = Decimal(match[1]) * (1024 if match[3] else 1000) ** power
    if count != int(count):
        raise DowncycleError(f"{option} {text}: not a whole number")
    return int(count)


def format_bytes(count: float) -> str:
    """Write bytes in decimal units, three digits."""
    return scale(count, (" B", " kB", " MB", " GB", " TB"))


def scale(count: float, units: Sequence[str]) -> str:
    """Write a number with three digits, in the first of these units, each a thousand times the one before, in which it has no more."""
    for unit in units[:-1]:
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}{units[-1]}"


def layer_map(depth: int, kept: Sequence[int], signs: str = "░█") -> str:
    """Draw dropped layers as light and kept ones as full blocks, in the parent's order; a layer kept n times as the digit n."""
    return "".join(signs[times] if (times := kept.count(layer)) < 2 else str(min(times, 9)) for layer in range(depth))


@contextmanager
def progress_bar(title: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show bytes and rate on stderr where that is a terminal; give the function that advances it."""
    if quiet or not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def stage_bar(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show what is being done and how much of how much; give the function that is told (what, done, total), a total of 0 being unknown.

    Where stderr is no terminal, each new stage is one line, and so is each sign of life that comes 5 s after the last.
    """
    if quiet:
        yield lambda what, done, total: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TaskID,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            tasks: dict[str, TaskID] = {}  # a bar for each stage

            def show(what: str, done: int, total: int) -> None:
                stage = what.partition(":")[0]
                if stage not in tasks:
                    for before in tasks.values():
                        bar.stop_task(before)
                    tasks[stage] = bar.add_task(what, total=total or None)
                bar.update(tasks[stage], description=what, completed=done, total=total or None)

            yield show
    else:
        stage, line, told = "", "", 0.0

        def say(what: str, done: int, total: int) -> None:
            nonlocal stage, line, told
            now, new = what.partition(":")[0], f"{what} {done:,}/{total:,}" if total else what
            if now != stage or time.monotonic() - told >= QUIET or done == total > 0 and new != line:
                print(new, file=sys.stderr, flush=True)
                stage, line, told = now, new, time.monotonic()

        yield say


@contextmanager
def say_staging(target: str) -> Iterator[None]:
    """Tell a user who interrupts a command where the finished part is."""
    try:
        yield
    except KeyboardInterrupt:
        staging = staging_path(target_path(target))
        kept = f"; what is done stays in {staging}, and the same command goes on from there" if staging.exists() else ""
        raise KeyboardInterrupt(f"interrupted{kept}") from None


def print_json(value: dict[str, Any]) -> None:
    """Print a command's answer for programs."""
    typer.echo(json.dumps(value, indent=2))
