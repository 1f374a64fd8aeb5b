"""The demo really runs, shorter: cut, NF4 QLoRA by Axolotl, merge. Its numbers and weights are computed again here by other means."""

import dataclasses
import json
import math
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
for package in ("axolotl", "bitsandbytes", "matplotlib", "peft"):
    pytest.importorskip(package)
import numpy as np  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from downcycle import DowncycleError, open_checkpoint, verify  # noqa: E402
from downcycle.eval.demo import DemoResult, draw_losses, loss_lines, run_demo  # noqa: E402

STEPS = 16
COMMAND = f"""
from downcycle.cli import main
from downcycle.eval.demo import run_demo
run_demo.__kwdefaults__["steps"] = {STEPS}
main()
"""
UTF8 = os.environ | {"PYTHONIOENCODING": "utf-8"}
LINEAR = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]


@pytest.fixture(scope="session")
def demo(once) -> DemoResult:
    """One run of the demo, for all tests of this file."""

    def fill(folder: Path) -> None:
        with open(folder / "stdout", "w") as out, open(folder / "stderr", "w") as err:
            subprocess.run([sys.executable, "-c", COMMAND, "demo", "--out", folder / "out"], stdout=out, stderr=err, env=UTF8, check=True)

    record = json.loads((once("demo", fill) / "out" / "losses.json").read_text())
    return DemoResult(**record | {"layers": tuple(record["layers"]), "curve": [tuple(point) for point in record["curve"]]})


@pytest.fixture(scope="session")
def adapter(demo) -> dict[str, np.ndarray]:
    return {name.removeprefix("base_model.model."): array for name, array in load_file(f"{demo.adapter}/adapter_model.safetensors").items()}


def widen(stored) -> np.ndarray:
    """The numbers of a bf16 tensor, exactly, as float64 [shape]."""
    assert stored.dtype == "BF16"
    return (np.frombuffer(stored.data, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64).reshape(stored.shape)


def test_cutting_hurts_and_healing_helps(demo):
    assert demo.parent_loss == pytest.approx(3.466, abs=0.005)  # 3.473 in recipes/demo/README.md, with documents in one stream
    assert demo.cut_loss == pytest.approx(6.920, abs=0.01)
    assert demo.healed_loss < demo.cut_loss - 1.7
    assert demo.recovered == pytest.approx((demo.cut_loss - demo.healed_loss) / (demo.cut_loss - demo.parent_loss))


def test_the_healed_loss_is_that_of_the_files(demo):
    """Stock transformers in float32, the loss from its own logits, on some of the windows."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from downcycle.surgery.checkpoint import DEMO_FOLDER

    tokenizer = AutoTokenizer.from_pretrained(demo.healed)
    documents = (DEMO_FOLDER.parent / "held_out.txt").read_text(encoding="utf-8").rstrip("\n").split("\n\n\n")
    ids = [token for text in documents for token in (*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id)]
    starts = range(0, len(ids) - 512, 512)
    windows = torch.tensor([ids[start : start + 513] for start in starts][::6])
    losses = {}
    for name in (demo.child, demo.healed):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        with torch.no_grad():
            logs = torch.cat([model(rows[:, :-1]).logits.log_softmax(-1) for rows in windows.split(8)])
        losses[name] = -logs.gather(-1, windows[:, 1:, None]).mean().item()
    assert losses[demo.child] == pytest.approx(demo.cut_loss, abs=0.15)
    assert losses[demo.healed] == pytest.approx(demo.healed_loss, abs=0.15)


def test_every_matrix_was_trained_by_nf4_qlora_and_nothing_else(demo, adapter):
    config = json.loads(Path(demo.adapter, "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["use_rslora"], config["modules_to_save"]) == ("LORA", 128, True, None)
    settings = set(re.findall(r"^\w+: \S+", Path(demo.recipe).read_text(), re.M))
    assert {"adapter: qlora", "load_in_4bit: true", "bf16: false", "attn_implementation: sdpa", "val_set_size: 0"} <= settings
    wanted = {f"model.layers.{layer}.{part}.lora_{half}.weight" for layer in range(9) for part in LINEAR for half in "AB"}
    assert adapter.keys() == wanted
    assert all(np.isfinite(array).all() for array in adapter.values())
    assert [name for name, array in adapter.items() if not array.any()] == []


def test_gradients_came_at_every_step_and_no_evaluation_broke_them(demo):
    """On CPUs with AVX512-BF16 an evaluation packs NF4 weights, and the gradients that follow are wrong without an error."""
    states = list(Path(demo.adapter).glob("checkpoint-*/trainer_state.json"))
    history = json.loads(max(states, key=lambda path: int(path.parent.name.split("-")[1])).read_text())["log_history"]
    norms = [entry["grad_norm"] for entry in history if "loss" in entry]
    assert len(norms) == STEPS // 4
    assert all(math.isfinite(norm) and norm > 0 for norm in norms)
    assert [entry for entry in history if any(key.startswith("eval") for key in entry)] == []
    assert demo.curve == [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


def test_the_merge_is_w_plus_ba_rounded_once(demo, adapter, read_back):
    child, healed = read_back(Path(demo.child)), read_back(Path(demo.healed))
    config = json.loads(Path(demo.adapter, "adapter_config.json").read_text())
    scale = config["lora_alpha"] / math.sqrt(config["r"])
    modules = {name.rsplit(".", 2)[0] for name in adapter}
    assert len(modules) == 9 * len(LINEAR)
    for module in modules:
        a, b = (adapter[f"{module}.lora_{half}.weight"].astype(np.float64) for half in "AB")
        exact = widen(child[f"{module}.weight"]) + scale * b @ a
        half_ulp = np.exp2(np.floor(np.log2(np.abs(exact))) - 8)  # bf16 has 8 significant bits
        error = np.abs(widen(healed[f"{module}.weight"]) - exact)
        assert (error <= half_ulp * (1 + 1e-3) + 1e-7).all(), module
        assert healed[f"{module}.weight"].data != child[f"{module}.weight"].data


def test_what_no_adapter_touched_is_the_parents_byte_for_byte(demo, read_back):
    from downcycle.surgery.checkpoint import DEMO_FOLDER

    parent, child, healed = (read_back(Path(folder)) for folder in (DEMO_FOLDER, demo.child, demo.healed))
    assert healed.keys() == child.keys()
    untouched = [name for name in child if not any(f".{part}.weight" in name for part in LINEAR)]
    assert len(untouched) == 3 + 2 * 9
    for name in untouched:
        assert healed[name] == child[name] == parent[name], name


def test_both_models_prove_themselves(demo):
    assert verify(demo.child).layers == list(range(9))
    assert verify(demo.healed).tensors == len(open_checkpoint(demo.child).tensors)


def test_everything_lies_in_one_folder(demo):
    out = Path(demo.child).parent
    names = {"axolotl.yaml", "child", "healed", "healing.jsonl", "loss.png", "losses.json", "training"}
    assert {path.name for path in out.iterdir()} == names
    assert (demo.recipe, demo.picture) == (str(out / "axolotl.yaml"), str(out / "loss.png"))


def test_every_stage_is_told(demo):
    lines = (Path(demo.child).parent.parent / "stderr").read_text().splitlines()
    assert list(dict.fromkeys(re.sub(r"(:| \d).*", "", line) for line in lines)) == [
        *("cutting the built-in model", "loading torch", "measuring the parent", "measuring the cut", "starting Axolotl"),
        *("preparing the text", "loading the model", "training", "saving", "merging", "measuring the healed model"),
    ]
    assert sum(line.endswith(f" {STEPS}/{STEPS}") and line.startswith("training") for line in lines) >= 1


def test_the_command_prints_bars_and_what_was_won(demo):
    out = (Path(demo.child).parent.parent / "stdout").read_text(encoding="utf-8")
    assert out.splitlines() == [
        *loss_lines(demo),
        "child and healed model are verified: each holds what it was made from, byte for byte",
        f"healing won back {demo.recovered:.0%} of what the cut cost, in {demo.seconds:.0f} s; picture: {demo.picture}",
    ]


def test_an_existing_folder_is_refused_untouched(tmp_path, tree):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    before = tree(tmp_path)
    with pytest.raises(DowncycleError, match="exists already; delete it, or give another folder"):
        run_demo(tmp_path / "out")
    assert tree(tmp_path) == before


def test_the_command_refuses_an_existing_folder(refused, tmp_path):
    (tmp_path / "out").mkdir()
    assert refused("demo", "--out", tmp_path / "out", "--json").startswith(f"downcycle: --out {tmp_path / 'out'}: exists already")


def test_a_demo_that_was_interrupted_says_so(tmp_path):
    (tmp_path / "out" / "child").mkdir(parents=True)
    with pytest.raises(DowncycleError, match="holds a demo that was interrupted; delete it"):
        run_demo(tmp_path / "out")


def test_a_missing_package_is_named_before_anything_is_made(tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    with pytest.raises(DowncycleError, match=r"lacks matplotlib: pip install 'downcycle\[train,eval\]'"):
        run_demo(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def made_up(tmp_path) -> DemoResult:
    curve = [(step, 6 - step / 20) for step in range(1, 41)]
    paths = {name: str(tmp_path / name) for name in ("child", "recipe", "adapter", "healed", "picture")}
    return DemoResult(3.0, 6.0, 4.0, 2 / 3, 1.0, 40, (12, 9), curve=curve, **paths | {"picture": str(tmp_path / "loss.png")})


def test_bars_are_as_long_as_the_losses(made_up):
    lines = loss_lines(made_up, "#", 60)
    assert [line.split()[-2] for line in lines[:2]] == ["3.000", "6.000"]
    assert [line.count("#") for line in (lines[0], lines[1], lines[-1])] == [30, 60, 40]
    steps = [int(match[1]) for line in lines if (match := re.search(r"step (\d+) ", line))]
    assert steps == list(range(4, 41, 4))
    assert lines[-2].split()[-2] == "4.000"


def test_one_point_is_enough_for_bars_and_picture(made_up):
    short = dataclasses.replace(made_up, curve=[(1, 5.0)])
    assert len(loss_lines(short)) == 4
    draw_losses(short)
    assert Path(short.picture).stat().st_size > 1000


def test_the_picture_shows_three_lines_at_their_heights(made_up):
    from matplotlib.image import imread

    draw_losses(made_up)
    assert struct.unpack(">II", Path(made_up.picture).read_bytes()[16:24]) == (960, 600)
    pixels = imread(made_up.picture)[..., :3]
    rows = {}
    for name, colour in {"cut": (0.839, 0.153, 0.157), "healed": (0.173, 0.627, 0.173), "parent": (0.122, 0.467, 0.706)}.items():
        hits = (np.abs(pixels - np.array(colour)) < 0.02).all(axis=-1).sum(axis=1)
        assert hits.max() > 300, name
        rows[name] = int(hits.argmax())
    assert (rows["parent"] - rows["cut"]) / (rows["healed"] - rows["cut"]) == pytest.approx(3 / 2, rel=0.02)
