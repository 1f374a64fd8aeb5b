"""Run Axolotl on a recipe, in a process of its own: prepare the text, train, keep the log, pass on how far it is.

Reads of a recipe only where its model, text and output are: it refuses to know what is trained and how.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..surgery.errors import DowncycleError
from .validation.data_conflicts import TEXTS, entries

LOG = "axolotl.log"
HEARTBEAT = 5.0  # seconds of silence after which progress is told again
PATIENCE = 10.0  # seconds that a stopped process has to end by itself
GRACE = 1.0  # seconds more that what it started has; short, as the dead stay in the group where a container's first process reaps none


@dataclass(frozen=True)
class Step:
    """How far a training is: what is being done, the optimiser step (0 before the first), how many there are, the last loss in nats."""

    stage: str
    step: int = 0
    steps: int = 0
    loss: float | None = None


Progress = Callable[[Step], None]

# What Axolotl's log lines say of its stage.
STAGES = {
    "preprocess": {"": "starting Axolotl", "axolotl.utils.data": "preparing the text"},
    "train": {"": "starting Axolotl", "axolotl.loaders": "loading the model", "Starting trainer": "training", "Saving trained": "saving"},
}


def train(recipe: str | Path, *, progress: Progress = lambda step: None) -> Path:
    """Prepare the text of a recipe and train on it, in one process, on a CPU or one GPU; return the recipe's output folder.

    Relative paths in the recipe are below the current folder, as they are for Axolotl. Its output goes to `axolotl.log` in the output
    folder. Where model and text are files of this machine, nothing is asked of the Hub and all caches stay below the output folder.

    Args:
        progress: called at each sign of life, and every 5 s without one.
    Raises:
        DowncycleError: no such recipe, Axolotl is not installed or failed; gives the last line of its log.
    """
    config = _read(Path(recipe))
    if importlib.util.find_spec("axolotl") is None:
        raise DowncycleError("training needs Axolotl: pip install 'downcycle[train]'")
    out = Path(config["output_dir"])
    out.mkdir(parents=True, exist_ok=True)
    environment = _environment(config, out)
    with open(out / LOG, "wb") as log:
        for command in ("preprocess", "train") if "pretraining_dataset" not in config else ("train",):
            options = ["--launcher", "python"] if command == "train" else []
            _run([sys.executable, "-m", "axolotl.cli.main", command, str(recipe), *options], STAGES[command], environment, log, progress)
    return out


def losses(out: str | Path) -> list[tuple[int, float]]:
    """Return (optimiser step, training loss in nats) as the trainer recorded them in the newest checkpoint of an output folder."""
    return [(entry["step"], float(entry["loss"])) for entry in history(out) if "loss" in entry]


def history(out: str | Path) -> list[dict[str, Any]]:
    """Return what the trainer logged, entry by entry, from the newest trainer_state.json of an output folder.

    Raises:
        DowncycleError: it holds none, or a damaged one.
    """
    if not (states := _states(out)):
        raise DowncycleError(f"{out}: holds no checkpoint-*/trainer_state.json; give the output_dir of a training that saved one")
    try:
        entries = json.loads(states[-1].read_text())["log_history"]
        return [entry for entry in entries if isinstance(entry["step"], int)]
    except (ValueError, KeyError, TypeError) as error:
        raise DowncycleError(f"{states[-1]}: no trainer's state ({str(error)[:80]}); take it out, or give another folder") from error


def has_history(out: str | Path) -> bool:
    """Whether a folder holds the state of a trainer."""
    return bool(_states(out))


def _states(out: str | Path) -> list[Path]:
    found = (path for pattern in ("trainer_state.json", "checkpoint-*/trainer_state.json") for path in Path(out).glob(pattern))
    return sorted(found, key=lambda path: path.stat().st_mtime)


def _read(recipe: Path) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(recipe.read_text())
    except OSError as error:
        raise DowncycleError(f"{recipe}: {error.strerror}; give an Axolotl YAML, such as `downcycle recipe DIR` writes") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DowncycleError(f"{recipe}: no YAML ({' '.join(str(error).split())[:120]}); mend it, or write it anew") from error
    if not isinstance(config, dict) or not isinstance(config.get("output_dir"), str):
        raise DowncycleError(f"{recipe}: names no output_dir; say where the trained weights go")
    return config


def _environment(config: dict[str, Any], out: Path) -> dict[str, str]:
    # Threads that wait for one another sleep: where they spin, as is OpenMP's default, a CPU that others use too is four times slower.
    given = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "AXOLOTL_DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
    places = [config.get("base_model"), *(entry.get("path") for key in TEXTS for entry in entries(config, key))]
    if all(isinstance(place, str) and os.path.exists(os.path.expanduser(place)) for place in places):
        given |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str((out / "datasets-cache").resolve())}
    return given


def _run(command: list[str], stages: dict[str, str], environment: dict[str, str], log: BinaryIO, progress: Progress) -> None:
    """Run one command of Axolotl to its end, and stop it, with its workers, where that is not reached."""
    begin = log.tell()
    now = Step(stages[""])
    progress(now)
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    assert process.stdout
    try:
        for text in _pieces(process):
            log.write(text)
            log.flush()
            now = _advance(now, text.decode(errors="replace"), stages)
            progress(now)
        status = process.wait()
    finally:
        process.stdout.close()
        _stop(process)
    if status:
        raise DowncycleError(f"axolotl {command[3]} {_fault(status, Path(log.name), begin)}; the log is {log.name}")


def _pieces(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """Yield what a process writes, as it comes, and an empty piece after each HEARTBEAT of silence."""
    assert process.stdout
    descriptor = process.stdout.fileno()
    while True:
        if select.select([descriptor], [], [], HEARTBEAT)[0]:
            if not (text := os.read(descriptor, 65536)):
                return
            yield text
        elif process.poll() is None:
            yield b""
        else:
            return  # what it started holds its output open


def _advance(now: Step, text: str, stages: dict[str, str]) -> Step:
    """Read stage, step and loss from a piece of log; a piece that ends within a number is read wrong at worst for a moment."""
    stage = next((name for sign, name in reversed(stages.items()) if sign and sign in text), now.stage)
    step, steps, loss = now.step, now.steps, now.loss
    if stage == "training":
        text = text.rpartition("Starting trainer")[2]
        for done, total in re.findall(r"(?:^|[\r\n]) *\d+%\|[^|]*\| *(\d+)/(\d+) \[", text):
            if steps in (0, int(total)):  # the first bar is the training's; those of evaluations count to other numbers
                step, steps = max(step, int(done)), int(total)
        if found := re.findall(r"'loss': '?([0-9.]+|nan|inf)", text):
            loss = float(found[-1])
    return Step(stage, step, steps, loss)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, whether it has ended itself or not: asked first, then by force."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):  # nothing of its group is left
            os.killpg(process.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            until = time.monotonic() + GRACE
            while time.monotonic() < until:
                os.killpg(process.pid, 0)
                time.sleep(0.02)


def _fault(status: int, log: Path, begin: int) -> str:
    """Say in one line why a process failed: its last error, with what it says behind it, or its last line."""
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}" + (", as happens when memory runs out" if status == -signal.SIGKILL else "")
    with open(log, "rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").replace("\r", "\n").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    errors = [i for i, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    said = " ".join(lines[errors[-1] :] if errors else lines[-1:])
    return f"failed: {said[:300] or f'exit status {status}, without a word'}"
