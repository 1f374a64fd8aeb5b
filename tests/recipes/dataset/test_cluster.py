"""Slurm and Ray are handed the same tasks; no job outlives the run that handed it over."""

import importlib.util
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from fineweb import expect, read, refusal

from downcycle.recipes.dataset import work
from downcycle.recipes.dataset.make import make_dataset
from downcycle.surgery.staging import staging_path

SLURM = {
    "sbatch": """#!/bin/bash
script="${@: -1}"; number=$(ls SHARED | grep -c script); cp "$script" SHARED/$number.script
name=$(sed -n 's/^#SBATCH --job-name=//p' "$script")
logs=$(sed -n 's/^#SBATCH --output=\\(.*\\)%A_%a.out/\\1/p' "$script")
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
if grep -q launch_pickled "$script"; then
  setsid bash -c "cd SHARED; export SLURM_NODELIST=here; sleep 0.2; for i in \\$(seq 0 $last); do
    SLURM_ARRAY_TASK_ID=\\$i bash $number.script > $logs/${number}_\\$i.out 2>&1; done; rm $number.job" > /dev/null 2>&1 &
else
  setsid sleep 600 > /dev/null 2>&1 &
fi
ls SHARED | grep job >> SHARED/queued_before
echo "$name $!" | tee SHARED/$number.job >> SHARED/all
echo "Submitted batch job $number"
""",
    "srun": '#!/bin/bash\nwhile [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done\nexec "$@"\n',
    "scontrol": "#!/bin/bash\necho here\n",
    "squeue": """#!/bin/bash
cd SHARED; shopt -s nullglob
for job in *.job; do [[ "$3" == "${job%.job}" || "$3" == "$(cut -d ' ' -f 1 $job 2> /dev/null)" ]] && echo "$job"; done | grep . && exit
[[ $2 == --name ]] || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
""",
    "scancel": """#!/bin/bash
cd SHARED; shopt -s nullglob
for job in *.job; do
  read -r name group < "$job" 2> /dev/null && [[ $1 == --name && $2 == "$name" ]] && kill -KILL -- "-$group" && rm -f "$job"
done; true
""",
}


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Iterator[Path]:
    """Slurm's commands as they look from outside: sbatch queues and answers at once, one task of a job runs after the other."""
    folder = tmp_path / "slurm"
    shared = folder / "shared"
    shared.mkdir(parents=True)
    for name, text in SLURM.items():
        (folder / name).write_text(text.replace("SHARED", str(shared)))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SBATCH_PARTITION", "cpu")
    monkeypatch.setitem(work.POLL, "slurm", 0.01)
    yield folder
    left = still_running(folder)
    for group in left:
        os.killpg(group, signal.SIGKILL)
    assert not left


def running(cluster: Path) -> set[int]:
    """Jobs of which a process lives, whatever the queue says."""
    started = (
        {int(line.split()[1]) for line in (cluster / "shared/all").read_text().splitlines()} if (cluster / "shared/all").exists() else set()
    )
    living = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            living |= {int(group)} if state not in "ZX" else set()
    return started & living


def still_running(cluster: Path, allow: float = 10.0) -> set[int]:
    """Jobs that do not end within some seconds: one that was killed takes a moment to be gone."""
    deadline = time.monotonic() + allow
    while running(cluster) and time.monotonic() < deadline:
        time.sleep(0.01)
    return running(cluster)


def test_slurm(tmp_path, cluster, request_, rows):
    make_dataset(tmp_path / "out", replace(request_, tokens=9000), workers=2, executor="slurm")
    assert read(tmp_path / "out") == expect(rows, 9000, request_.held_out)
    script = next(path.read_text() for path in (cluster / "shared").glob("*.script") if "launch_pickled" in path.read_text())
    assert re.search(r"#SBATCH --array=0-1%2\n", script)
    assert re.search(r"#SBATCH --partition=cpu\n", script)
    assert "qos" not in script


def test_tasks_that_are_not_needed_any_more_are_taken_out_of_the_queue(tmp_path, cluster, request_, rows):
    make_dataset(tmp_path / "out", replace(request_, tokens=2000), workers=9, executor="slurm")
    assert read(tmp_path / "out") == expect(rows, 2000, request_.held_out)
    assert not still_running(cluster)
    assert not list((cluster / "shared").glob("*.job"))
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


def test_interrupt_takes_the_job_out_of_the_queue(tmp_path, cluster, request_, rows):
    out, wanted = tmp_path / "out", replace(request_, tokens=9000)

    def interrupt(done: int, tokens: int) -> None:
        if list((cluster / "shared").glob("*.job")) and work.finished(staging_path(out)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_dataset(out, wanted, workers=9, executor="slurm", progress=interrupt)
    assert not still_running(cluster)
    assert staging_path(out).is_dir()
    make_dataset(out, wanted, workers=9, executor="slurm")
    assert read(out) == expect(rows, 9000, request_.held_out)


def test_jobs_of_a_killed_run_are_taken_out_of_the_queue_first(tmp_path, cluster, request_):
    left, other = tmp_path / "left.slurm", tmp_path / "other.slurm"
    left.write_text(f"#SBATCH --job-name={work.job_name(staging_path(tmp_path / 'out'))}\n")
    other.write_text(f"#SBATCH --job-name={work.job_name(staging_path(tmp_path / 'else'))}\n")
    for script in (left, other):
        subprocess.run([cluster / "sbatch", script], check=True)
    (foreign,) = running(cluster) - {int((cluster / "shared/0.job").read_text().split()[1])}
    make_dataset(tmp_path / "out", replace(request_, tokens=2000), workers=1, executor="slurm")
    assert (cluster / "shared/queued_before").read_text().split()[:2] == ["0.job", "1.job"]
    assert still_running(cluster, 0.5) == {foreign}
    os.killpg(foreign, signal.SIGKILL)


def test_slurm_that_does_not_answer_for_a_while(tmp_path, cluster, request_, rows):
    """As when its controller starts anew: the job is not given up."""
    squeue, silent = cluster / "squeue", cluster / "silent"
    squeue.rename(cluster / "answers")
    refuses = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
    squeue.write_text(f"""#!/bin/bash\necho >> {silent}\n[[ $2 == --jobs && $(wc -l < {silent}) -lt 9 ]] && {{ {refuses}; }}
exec {cluster}/answers "$@"\n""")
    squeue.chmod(0o755)
    make_dataset(tmp_path / "out", replace(request_, tokens=2000), workers=1, executor="slurm")
    assert read(tmp_path / "out") == expect(rows, 2000, request_.held_out)
    assert len(silent.read_text()) > 9


def test_slurm_job_that_fails(tmp_path, cluster, request_):
    """Nothing is done, but the folder stays, as it holds the only word on why."""
    (cluster / "srun").write_text("#!/bin/bash\necho no such node >&2; exit 1\n")
    said = refusal(tmp_path / "out", request_, workers=2, executor="slurm")
    logs = Path(re.search(r"Slurm job 0 ended with 2 of 2 tasks undone; see (\S+)\. What is done stays in", said)[1])
    assert any("no such node" in path.read_text() for path in logs.iterdir())


def test_slurm_that_takes_no_job(tmp_path, cluster, request_):
    why = "sbatch: error: Batch job submission failed: Invalid partition name specified"
    (cluster / "sbatch").write_text(f"#!/bin/bash\necho '{why}' >&2; exit 1\n")
    assert refusal(tmp_path / "out", request_, workers=2, executor="slurm") == f"a worker ended with status 1: {why}"
    assert not staging_path(tmp_path / "out").exists()


def test_without_slurm(tmp_path, cluster, request_):
    (cluster / "scancel").unlink()
    assert "there is no scancel here; run this where" in refusal(tmp_path / "out", request_, executor="slurm")
    assert not staging_path(tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_ray_is_asked_for(tmp_path, request_):
    assert "pip install 'datatrove[ray]'" in refusal(tmp_path / "out", request_, executor="ray")
    made = work.make_executors("ray", [], 7, [3], tmp_path, 4)
    assert [(one.tasks, one.workers) for one in made] == [(7, 4)]
