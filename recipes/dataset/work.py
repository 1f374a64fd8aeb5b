"""Have a datatrove pipeline done by worker processes, by Slurm or by Ray, and watch over it.

Knows tasks by their numbers and what they leave in the work folder; knows nothing of documents.

Each local worker is a process that runs a LocalPipelineExecutor on its share of the tasks, rather than one executor with a pool: a pool
waits for ever for a worker that was killed. Slurm and Ray have one process that hands the tasks over. All datatrove says goes to log.txt.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from ...surgery.errors import DowncycleError

EXECUTORS = ("local", "slurm", "ray")
POLL = {"local": 0.1, "slurm": 5.0}  # seconds
HAND_OVER = 30.0  # seconds that handing a job over may still take when it is not wanted any more: cut short, it may queue one all the same
CANCEL = 120.0  # seconds that Slurm has to end what it runs; it asks first, and kills 30 s later as it comes
LOGS = "slurm_logs"  # where datatrove has Slurm put what tasks print
Watch = Callable[[], bool]


def check_executor(kind: str) -> None:
    """Refuse an executor that does not exist or cannot run here."""
    if kind not in EXECUTORS:
        raise DowncycleError(f"--executor {kind}: no such executor; choose {', '.join(EXECUTORS)}")
    if kind == "slurm" and not os.environ.get("SBATCH_PARTITION"):
        raise DowncycleError("--executor slurm: set SBATCH_PARTITION to the partition to use (SBATCH_TIMELIMIT and SBATCH_QOS count too)")
    if kind == "slurm" and (missing := [name for name in ("sbatch", "squeue", "scancel") if shutil.which(name) is None]):
        raise DowncycleError(f"--executor slurm: there is no {', '.join(missing)} here; run this where jobs are handed to Slurm")
    if kind == "ray" and importlib.util.find_spec("ray") is None:
        raise DowncycleError("--executor ray: ray is not installed; run `pip install 'datatrove[ray]'`, or leave --executor out")


def finished(work: Path) -> set[int]:
    """Numbers of the tasks that are done."""
    return {int(path.name) for path in (work / "completions").glob("[0-9]*")}


def run_tasks(pipeline: list[Any], count: int, work: Path, workers: int, kind: str, watch: Watch) -> None:
    """Do tasks 0 to count-1, those that are done left out; end early where `watch`, called now and then, says that it is enough.

    Raises:
        DowncycleError: a worker failed or was killed, or a cluster's job ended with tasks undone. No process and no job is left behind.
    """
    todo = sorted(set(range(count)) - finished(work))
    if not todo:
        return
    if kind == "slurm":
        _cancel(job_name(work))  # what a run that was killed left in the queue
    started: list[subprocess.Popen[str]] = []
    try:
        for executor in make_executors(kind, pipeline, count, todo, work, workers):
            started.append(_start(executor, work, len(started)))
        job = _wait(started, watch, work)
        if job is not None and kind == "slurm":
            _wait_for_job(job, set(todo), work, watch)
    finally:
        for process in started:
            _end(process, HAND_OVER if kind == "slurm" else 0)
        if kind == "slurm":
            _cancel(job_name(work))


def make_executors(kind: str, pipeline: list[Any], count: int, todo: list[int], work: Path, workers: int) -> list[Any]:
    """Make the datatrove executors that do the tasks `todo` of `count`: one for each local worker, one in all for a cluster."""
    if kind == "slurm":
        return [_slurm(pipeline, count, work, workers)]
    if kind == "ray":
        from datatrove.executor.ray import RayPipelineExecutor
        from loguru import logger

        logger.disable("datatrove")
        return [RayPipelineExecutor(pipeline, tasks=count, workers=workers, logging_dir=str(work), mem_per_cpu_gb=4)]
    from datatrove.executor.local import LocalPipelineExecutor

    shares = min(workers, len(todo))
    bounds = [len(todo) * share // shares for share in range(shares + 1)]
    parts = [todo[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]
    return [
        LocalPipelineExecutor(
            pipeline, tasks=count, workers=1, logging_dir=str(work), local_tasks=part[-1] - part[0] + 1, local_rank_offset=part[0]
        )
        for part in parts
    ]


def _slurm(pipeline: list[Any], count: int, work: Path, workers: int) -> Any:
    """Describe the job as the environment variables of sbatch do; datatrove wants to know two of them itself."""
    from datatrove.executor.slurm import SlurmPipelineExecutor

    return SlurmPipelineExecutor(
        pipeline,
        tasks=count,
        time=os.environ.get("SBATCH_TIMELIMIT", "24:00:00"),
        partition=os.environ["SBATCH_PARTITION"],
        qos=os.environ.get("SBATCH_QOS", ""),
        workers=workers,
        job_name=job_name(work),
        mem_per_cpu_gb=4,
        env_command=f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",  # where launch_pickled_pipeline is
        logging_dir=str(work),
    )


def job_name(work: Path) -> str:
    """Name the Slurm jobs of a work folder, and of no other."""
    return f"downcycle-data-{sha256(str(work).encode()).hexdigest()[:12]}"


def _start(executor: Any, work: Path, number: int) -> subprocess.Popen[str]:
    import dill

    path = work / f"executor-{number}.pickle"
    path.write_bytes(dill.dumps(executor))
    command = [sys.executable, "-m", f"{__package__}.worker", str(path)]
    with open(work / "log.txt", "a") as log:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True, env=_environment()
        )


def _environment() -> dict[str, str]:
    return os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONWARNINGS": "ignore"}


def _wait(started: list[subprocess.Popen[str]], watch: Watch, work: Path) -> str | None:
    """Wait until all workers have ended well, and return the job that the last one started; None where `watch` ended it."""
    job, running = "", list(started)
    while running:
        if watch():
            return None
        for process in [process for process in running if process.poll() is not None]:
            running.remove(process)
            job = _answer(process, work)
        time.sleep(POLL["local"] if running else 0)
    return job


def _answer(process: subprocess.Popen[str], work: Path) -> str:
    """Read what a worker that has ended said, or raise its fault."""
    _kill_group(process)  # what it started may have outlived it, and would hold its stdout open
    text = process.stdout.read() if process.stdout else ""
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise DowncycleError(f"a worker was killed ({name}); if memory ran out, give fewer --workers.")
    try:
        answer = json.loads(text)
    except ValueError:
        last = (work / "log.txt").read_text(errors="replace").strip().rpartition("\n")[2]
        raise DowncycleError(f"a worker ended with status {process.returncode}: {last}") from None
    if "error" in answer:
        raise DowncycleError(f"{' '.join(answer['error'].split()).rstrip('.')}.")
    return answer["job"]


def _wait_for_job(job: str, todo: set[int], work: Path, watch: Watch) -> None:
    """Wait for a Slurm job's tasks as long as the queue knows it; one look more, since a shared disk may show files late."""
    gone = 0
    while not watch() and todo - finished(work):
        if gone == 2:
            left = len(todo - finished(work))
            raise DowncycleError(f"Slurm job {job} ended with {left} of {len(todo)} tasks undone; see {work / LOGS}.")
        gone = 0 if _is_queued("--jobs", job) else gone + 1
        time.sleep(POLL["slurm"])


def _is_queued(*which: str) -> bool:
    """Whether the queue knows a job; where Slurm does not answer, it has not said that the job is gone."""
    answer = subprocess.run(["squeue", "--noheader", *which], capture_output=True, text=True)
    return bool(answer.stdout.strip()) or (answer.returncode != 0 and "Invalid job id" not in answer.stderr)


def _cancel(name: str) -> None:
    """Take all jobs of this name out of the queue, and wait until none runs that could still write.

    Asked for by name, since datatrove hands over several jobs, and an interrupted run knows no number.
    """
    deadline = time.monotonic() + CANCEL
    subprocess.run(["scancel", "--name", name], capture_output=True)
    while _is_queued("--name", name) and time.monotonic() < deadline:
        time.sleep(POLL["slurm"])


def _kill_group(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[str], patience: float) -> None:
    """End a worker and all it started, if it has not ended itself after `patience` seconds; nothing that was finished is lost."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    _kill_group(process)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()
