"""`downcycle merge` and `verify` of what it made: what they print and refuse, with a LoRA written by hand."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("torch")
save_file = pytest.importorskip("safetensors.numpy").save_file

from downcycle import open_checkpoint  # noqa: E402
from downcycle.surgery.checkpoint import DEMO_FOLDER  # noqa: E402

MODULES = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(12) for name in "qv"]


def write_adapter(folder: Path, base: str | int, modules: list[str], rank: int = 4, **config) -> Path:
    """Write what peft would write for a LoRA on these modules of the built-in model."""
    shapes = {name: tensor.shape for name, tensor in open_checkpoint(DEMO_FOLDER).tensors.items()}
    chance = np.random.default_rng(0)
    tensors = {}
    for module in modules:
        out, into = shapes[f"{module}.weight"]
        for half, shape in (("A", (rank, into)), ("B", (out, rank))):
            tensors[f"base_model.model.{module}.lora_{half}.weight"] = chance.normal(0, 0.05, shape).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({module.rpartition(".")[2] for module in modules})
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 8, "target_modules": targets, **config}
    (folder / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": base}))
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def adapter(tmp_path) -> Path:
    return write_adapter(tmp_path / "lora", "demo", MODULES)


def test_a_merge_and_its_proof(downcycle, adapter, read_back):
    assert downcycle("merge", "demo", adapter, "--out", "m") == (0, "m\n", "24 of 111 tensors changed, the rest copied\n")
    before, after = read_back(DEMO_FOLDER), read_back(Path("m"))
    assert sorted(name.removesuffix(".weight") for name in after if after[name] != before[name]) == sorted(MODULES)
    code, out, err = downcycle("verify", "m")
    assert (code, err) == (0, "")
    assert out.startswith(f"m is demo with {adapter} merged into it: 111 tensors, ")
    assert json.loads(downcycle("verify", "m", "--json").out)["tensors"] == 111


def test_json_is_all_that_is_printed(downcycle, adapter):
    code, out, err = downcycle("merge", "demo", "lora", "--out", "m", "--json", "--max-shard-size", "2MB")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"out": "m", "base": "demo", "adapter": "lora", "changed": 24, "tensors": 111}
    assert len(list(Path("m").glob("model-*.safetensors"))) > 1


def test_an_adapter_that_names_another_model_is_merged_with_a_note(downcycle, tmp_path):
    write_adapter(tmp_path / "other", "somebody/another-demo", MODULES)
    code, out, err = downcycle("merge", "demo", "other", "--out", "m")
    assert (code, out) == (0, "m\n")
    assert err.splitlines()[0] == "note: the adapter says that it was trained on somebody/another-demo; it fits demo"


def test_a_base_that_has_no_name_is_refused_before_anything_is_written(refused, tmp_path):
    write_adapter(tmp_path / "five", 5, MODULES)
    assert "base_model_name_or_path is '5' and should be a name" in refused("merge", "demo", "five", "--out", "m")
    assert not Path("m").exists()


def test_a_revision_stands_behind_an_id_and_never_behind_a_folder(downcycle, refused, adapter):
    Path("runs").mkdir()
    adapter.rename("runs/lora@2")
    assert downcycle("merge", "demo", "runs/lora@2", "--out", "m").code == 0
    assert downcycle("verify", "m").code == 0
    Path("runs/lora@2").rename("runs/lora")
    assert "runs/lora is a folder, and only a Hub repo has revisions" in refused("merge", "demo", "runs/lora@2", "--out", "n")


def test_what_does_not_fit_is_refused_by_name(refused, downcycle, tmp_path, adapter):
    assert downcycle("--src", "demo", "--keep", "9", "--out", "child").code == 0
    said = refused("merge", "child", adapter, "--out", "m")
    assert "has layers 9-11, and child has 9 (0-8)" in said
    write_adapter(tmp_path / "few", "demo", MODULES[:-1])
    assert "model.layers.11.self_attn.v_proj" in refused("merge", "demo", "few", "--out", "m")
    write_adapter(tmp_path / "extra", "demo", MODULES, target_modules=["q_proj"])
    assert "target_modules does not name model.layers.0.self_attn.v_proj" in (said := refused("merge", "demo", "extra", "--out", "m"))
    assert "there are 12 such modules" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("merge", "demo", "none", "--out", "m"), "none"),
        (("merge", "none", "lora", "--out", "m"), "none"),
        (("merge", "demo", "demo", "--out", "m"), "adapter_config.json"),
        (("merge", "demo", "lora", "--out", "lora"), "lora"),
        (("merge", "demo", "lora", "--out", "m", "--max-shard-size", "big"), "--max-shard-size big"),
    ],
)
def test_bad_arguments(refused, adapter, arguments, says):
    assert says in refused(*arguments)


def test_ctrl_c_says_where_the_work_stays_and_the_same_command_ends_it(downcycle, adapter):
    """An output of one tensor a file, so that there is time to interrupt it."""
    command = ["merge", "demo", "lora", "--out", "m", "--max-shard-size", "1"]
    process = subprocess.Popen([sys.executable, "-c", SLOW, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None and not list(Path(".m.downcycle").glob("*.safetensors")):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    staging = Path.cwd() / ".m.downcycle"
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == f"downcycle: interrupted; what is done stays in {staging}, and the same command goes on from there"
    assert not Path("m").exists()
    assert downcycle(*command).code == 0
    assert not staging.exists()
    assert downcycle("verify", "m").code == 0


SLOW = """
import os, time
from downcycle.surgery import sources
flush = os.fsync
def slow(file):
    time.sleep(0.05)
    flush(file)
os.fsync = slow
from downcycle.cli import main
main()
"""
