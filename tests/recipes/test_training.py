"""Trainings really run: `tail` moves what it names and nothing else; faults and interruptions end in one line and leave no process."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from downcycle import DowncycleError, keep_layers, open_checkpoint, write
from downcycle.recipes import training
from downcycle.recipes.training import Step, losses, train

TRAINS = pytest.mark.skipif(not importlib.util.find_spec("axolotl"), reason="needs Axolotl")
STEPS, EVERY = 12, 2
FAST = {"sequence_len": 256, "learning_rate": 2e-3, "gradient_checkpointing": False, "val_set_size": 0, "logging_steps": EVERY}


def write_recipe(folder: Path, preset: str, **overrides: object) -> Path:
    """Cut the built-in model to 9 layers and write its recipe for a CPU, all in `folder`."""
    from downcycle.recipes.demo.corpus import read_text
    from downcycle.recipes.machine import Machine
    from downcycle.recipes.recipe import make_recipe
    from downcycle.recipes.recipe_text import recipe_text
    from downcycle.surgery.checkpoint import DEMO_FOLDER

    child, text = folder / "child", folder / "healing.jsonl"
    write(keep_layers(open_checkpoint("demo"), list(range(9))), child)
    text.write_text("".join(json.dumps({"text": part}) + "\n" for part in read_text(DEMO_FOLDER.parent / "healing.txt")[:60]))
    settings = FAST | {"output_dir": str(folder / "out"), "dataset_prepared_path": str(folder / "prepared")} | overrides
    made = make_recipe(open_checkpoint(child), str(child), preset, dataset=str(text), machine=Machine(gpus=0), batch=4, overrides=settings)
    path = folder / "axolotl.yaml"
    path.write_text(recipe_text(made, str(path)))
    return path


def children() -> set[str]:
    """Processes that this one started, directly, and has not reaped."""
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


@pytest.fixture(scope="session")
def tail(once) -> Path:
    """A training of the head, the final norm and the last three layers, with home and current folder watched."""

    def fill(folder: Path) -> None:
        recipe = write_recipe(folder, "tail", max_steps=STEPS)
        for name in ("home", "here"):
            (folder / name).mkdir()
        told: list[Step] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOME", str(folder / "home"))
            patch.setenv("XDG_CACHE_HOME", str(folder / "home" / ".cache"))
            patch.chdir(folder / "here")
            assert train(recipe, progress=told.append) == folder / "out"
        (folder / "told.json").write_text(json.dumps([[step.stage, step.step, step.steps, step.loss] for step in told]))

    return once("tail", fill)


@TRAINS
def test_tail_moves_the_named_parameters_and_no_byte_of_another(tail, read_back):
    import numpy as np

    before, after = read_back(tail / "child"), read_back(tail / "out")
    assert before.keys() == after.keys()
    for name, old in before.items():
        assert (old.dtype, after[name].dtype) == ("BF16", "F32")
        widened = (np.frombuffer(old.data, np.uint16).astype(np.uint32) << 16).tobytes()
        named = name in ("lm_head.weight", "model.norm.weight") or name.startswith(tuple(f"model.layers.{i}." for i in (6, 7, 8)))
        assert (widened != after[name].data) is named, name


@TRAINS
def test_tail_lowers_the_held_out_loss(tail):
    torch = pytest.importorskip("torch")
    from transformers import AutoTokenizer

    from downcycle import load_model
    from downcycle.recipes.demo.corpus import read_text
    from downcycle.recipes.demo.pretrain import mean_loss, token_stream, windows_of
    from downcycle.surgery.checkpoint import DEMO_FOLDER

    stream = token_stream(AutoTokenizer.from_pretrained(tail / "child"), read_text(DEMO_FOLDER.parent / "held_out.txt"))
    windows = windows_of(stream, 256)[::8]
    cut, healed = (mean_loss(load_model(open_checkpoint(tail / name), dtype=torch.bfloat16), windows) for name in ("child", "out"))
    assert 6.5 < cut < 7.5
    assert healed < cut - 0.7


@TRAINS
def test_the_trainers_record_is_read(tail):
    curve = losses(tail / "out")
    assert [step for step, _ in curve] == list(range(EVERY, STEPS + 1, EVERY))
    assert all(math.isfinite(loss) for _, loss in curve)
    assert curve[-1][1] < curve[0][1] - 0.5


@TRAINS
def test_progress_is_told_in_order_to_the_last_step(tail):
    told = [Step(*entry) for entry in json.loads((tail / "told.json").read_text())]
    stages = list(dict.fromkeys(step.stage for step in told))
    assert stages == ["starting Axolotl", "preparing the text", "loading the model", "training", "saving"]
    steps = [step.step for step in told]
    assert steps == sorted(steps)
    assert told[-1].step == told[-1].steps == STEPS
    seen = {step.loss for step in told} - {None}
    assert seen
    assert all(any(math.isclose(loss, exact, rel_tol=2e-3) for _, exact in losses(tail / "out")) for loss in seen)


@TRAINS
def test_nothing_is_written_outside_the_output_folder(tail):
    assert list((tail / "here").iterdir()) == []
    assert [path for path in (tail / "home").rglob("*") if path.is_file()] == []
    assert (tail / "out" / "axolotl.log").stat().st_size > 1000


@TRAINS
def test_nf4_gradients_are_those_of_the_dequantised_weights():
    """Where a CPU's fast path packs NF4 weights in an evaluation, they are wrong and no error says so; training must not take it."""
    torch = pytest.importorskip("torch")
    import bitsandbytes as bnb

    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 96, bias=False)
    layer = bnb.nn.Linear4bit(64, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=True)
    layer.load_state_dict(plain.state_dict())
    layer = layer.to("cpu").train()
    x = torch.randn(5, 64, requires_grad=True)
    layer(x).square().sum().backward()
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    expected = 2 * (x.detach() @ weight.T) @ weight
    assert x.grad is not None
    assert torch.allclose(x.grad, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@TRAINS
def test_missing_text_is_one_line_with_the_log(tmp_path):
    recipe = write_recipe(tmp_path, "full", max_steps=1)
    (tmp_path / "healing.jsonl").unlink()
    with pytest.raises(DowncycleError) as caught:
        train(recipe)
    said = str(caught.value)
    assert "\n" not in said
    assert str(tmp_path / "healing.jsonl") in said
    log = tmp_path / "out" / "axolotl.log"
    assert said.endswith(f"the log is {log}")
    assert "Traceback" in log.read_text()
    assert not list((tmp_path / "out").glob("*.safetensors"))


@TRAINS
def test_a_killed_training_is_told(tmp_path):
    recipe = write_recipe(tmp_path, "full", max_steps=1)

    def kill(step: Step) -> None:
        for child in children() - before:
            os.kill(int(child), signal.SIGKILL)

    before = children()
    with pytest.raises(DowncycleError, match=r"axolotl preprocess was ended by SIGKILL, as happens when memory runs out; the log is "):
        train(recipe, progress=kill)
    assert children() <= before


@TRAINS
def test_ctrl_c_ends_the_training_too(tmp_path):
    """The signal goes to downcycle alone, as no terminal passes it on to a process in a session of its own."""
    recipe = write_recipe(tmp_path, "full", max_steps=1)
    script = f"from downcycle.recipes.training import train; train({str(recipe)!r})"
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    listing = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while not (started := listing.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert started, "Axolotl was never started"
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert said.strip().endswith("KeyboardInterrupt")
    assert [child for child in started if Path(f"/proc/{child}").exists()] == []


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked after does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("output", ["open", "closed"])
def test_what_a_process_leaves_behind_is_ended(tmp_path, monkeypatch, output):
    """A worker that is deaf to SIGTERM outlives its parent, with and without the parent's output in hand."""
    monkeypatch.setattr(training, "HEARTBEAT", 0.2)
    close = ">/dev/null 2>&1" if output == "closed" else ""
    script = f"(trap '' TERM; sleep 300) {close} & echo $! > {tmp_path}/pid; echo done; exit 3"
    with open(tmp_path / "log", "wb") as log, pytest.raises(DowncycleError, match=r"axolotl train failed: done; the log is"):
        training._run(["sh", "-c", script, "train"], training.STAGES["train"], dict(os.environ), log, lambda step: None)
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_what_does_not_end_when_asked_is_ended_by_force(tmp_path, monkeypatch):
    """Parent and worker are deaf to SIGTERM, and the user gives up."""
    monkeypatch.setattr(training, "HEARTBEAT", 0.05)
    monkeypatch.setattr(training, "PATIENCE", 0.3)
    script = f"trap '' TERM; sleep 300 & echo $! $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pids; while :; do sleep 0.1; done"

    def interrupt(step: Step) -> None:
        if (tmp_path / "pids").exists():
            raise KeyboardInterrupt

    with open(tmp_path / "log", "wb") as log, pytest.raises(KeyboardInterrupt):
        training._run(["sh", "-c", script, "train"], training.STAGES["train"], dict(os.environ), log, interrupt)
    assert [pid for pid in (tmp_path / "pids").read_text().split() if is_alive(int(pid))] == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file or directory; give an Axolotl YAML"),
        ("a: [1", "no YAML"),
        ("- a\n- b\n", "names no output_dir"),
        ("base_model: x\n", "names no output_dir"),
        ("output_dir: 7\n", "names no output_dir"),
        ("\x00", "no YAML"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path, text, said):
    path = tmp_path / "axolotl.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DowncycleError) as caught:
        train(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(bool(importlib.util.find_spec("axolotl")), reason="Axolotl is installed")
def test_without_axolotl_the_pip_line_is_named(tmp_path):
    path = tmp_path / "axolotl.yaml"
    path.write_text(f"output_dir: {tmp_path / 'out'}\n")
    with pytest.raises(DowncycleError, match=r"pip install 'downcycle\[train\]'"):
        train(path)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_record_is_refused(tmp_path):
    with pytest.raises(DowncycleError, match="holds no checkpoint"):
        losses(tmp_path)
