"""The real Axolotl trains ternary weights with the plugin; packed, they are run by stock transformers, number for number as in training.

Two short trainings: of four layers of the built-in model, and of random weights in their shape.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not importlib.util.find_spec("axolotl"):
    pytest.skip("needs Axolotl", allow_module_level=True)
from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import linear  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from downcycle import DowncycleError, keep_layers, load_model, open_checkpoint, write, write_gguf  # noqa: E402
from downcycle.recipes import training  # noqa: E402
from downcycle.recipes.training import history, train  # noqa: E402
from downcycle.surgery.checkpoint import DEMO_FOLDER  # noqa: E402
from downcycle.surgery.ternary.ternarize import ternarize  # noqa: E402

import llama_cpp  # noqa: E402
from ternary_training import as_trained, logits_of, loss_of, recipe, run_axolotl, section, windows, write_text  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet")
STEPS, WARM = 30, 15  # half of the steps have lambda at 1
LAYERS = (0, 1, 10, 11)
STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, given, found = sys.argv[1:]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
ids = torch.load(given)
with torch.inference_mode():
    logits = torch.cat([model(input_ids=one[None]).logits for one in ids])
assert not [name for name in sys.modules if name.startswith("downcycle")]
torch.save({"logits": logits, "kinds": sorted({type(one).__name__ for one in model.modules()})}, found)
"""


def random_model(shape: Path, target: Path) -> Path:
    """A model with new random weights, in the shape of another."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(shape)).float().save_pretrained(target)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_FOLDER / file, target)
    return target


@pytest.fixture(scope="session")
def trained(once) -> Path:
    """Trainings of a part of the built-in model and of a random one, on the same text in the same steps; what the first learnt, packed."""

    def fill(folder: Path) -> None:
        write_text(folder, 80)
        child = write(keep_layers(open_checkpoint("demo"), LAYERS), folder / "child")
        common = {"max_steps": STEPS, "learning_rate": 3e-3, "save_total_limit": 1}
        ternary = {"schedule": "linear", "warmup_steps": WARM}
        models = {"pretrained": child, "scratch": random_model(child, folder / "random")}
        run_axolotl(*(recipe(folder, name, model, ternary, **common) for name, model in models.items()))
        write(ternarize(open_checkpoint(folder / "pretrained")), folder / "packed")
        ids = windows()
        torch.save(ids, folder / "ids.pt")
        script = [sys.executable, "-c", STOCK, str(folder / "packed"), str(folder / "ids.pt"), str(folder / "stock.pt")]
        environment = {"PATH": os.environ["PATH"], "TORCH_COMPILE_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        subprocess.run(script, check=True, env=environment, cwd=folder, capture_output=True)

    return once("ternary", fill)


class ByHand(nn.Module):
    """A packed map's arithmetic, in transformers' order: whole numbers by whole numbers, then the two scales."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        scale = (weight.double().abs().sum() / prod(weight.shape)).float()
        self.codes, self.inverse = (weight / scale).round().clamp(-1, 1), (1 / scale.double()).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        near = 127 / x.abs().max(-1, keepdim=True).values.clamp(min=1e-5)
        return linear((x * near).round().clamp(-128, 127), self.codes) / (self.inverse * near)


def test_stock_transformers_gives_exactly_the_logits_of_the_reference(trained):
    model = load_model(open_checkpoint(trained / "pretrained"), dtype=torch.float32)
    maps = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    for name in maps:
        model.set_submodule(name, ByHand(model.get_submodule(name).weight.detach()))
    stock = torch.load(trained / "stock.pt")
    assert len(maps) == len(LAYERS) * 7 and "BitLinear" in stock["kinds"]
    assert torch.equal(stock["logits"], logits_of(model, torch.load(trained / "ids.pt")))


def test_the_packed_model_has_the_loss_of_the_model_in_training(trained):
    ids = torch.load(trained / "ids.pt")
    packed, learnt = loss_of(torch.load(trained / "stock.pt")["logits"], ids), logits_of(as_trained(trained / "pretrained", 1), ids)
    assert packed == pytest.approx(loss_of(learnt, ids), abs=5e-3)


def test_llama_cpp_and_transformers_read_its_gguf_file(trained, tmp_path):
    """Without the rounding of activations, which neither does there."""
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    file = write_gguf(open_checkpoint(trained / "packed"), tmp_path / "model.gguf", "f32").path
    ids, stock = torch.load(trained / "ids.pt"), torch.load(trained / "stock.pt")["logits"]
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    logits = logits_of(read, ids)
    assert loss_of(logits, ids) == pytest.approx(loss_of(stock, ids), abs=0.02)
    prompt = ids[0, :60]
    (native,) = llama_cpp.run(file, [prompt.tolist()], logits.shape[-1])["scores"]
    assert torch.tensor(native).sub(logits[0, 59].log_softmax(-1)).abs().max() < 1e-3


def test_training_wins_back_what_rounding_loses_and_pretrained_weights_are_worth_a_lot(trained):
    ids = torch.load(trained / "ids.pt")
    losses = {
        "parent": loss_of(logits_of(load_model(open_checkpoint("demo"), dtype=torch.float32), ids), ids),
        "rounded": loss_of(logits_of(as_trained(trained / "child", 1), ids), ids),
        "scratch": loss_of(logits_of(as_trained(trained / "scratch", 1), ids), ids),
        "trained": loss_of(torch.load(trained / "stock.pt")["logits"], ids),
    }
    assert losses["rounded"] > losses["trained"] + 1 and losses["scratch"] > losses["trained"] + 1, losses
    assert losses["parent"] < losses["trained"], losses


def test_lambda_rises_to_1_beside_the_loss_which_falls(trained):
    for name in ("pretrained", "scratch"):
        logged = [entry for entry in history(trained / name) if "loss" in entry]
        assert [entry["step"] for entry in logged] == list(range(1, STEPS + 1))
        wanted = [min(step / WARM, 1) for step in range(STEPS)]
        assert [entry["lambda"] for entry in logged] == pytest.approx(wanted, abs=1e-5)
    assert (trained / "pretrained" / training.LOG).read_text(errors="replace").count("'lambda'") >= 2 * STEPS
    losses = [entry["loss"] for entry in history(trained / "scratch") if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5]) - 5 * 0.5, losses


def test_config_json_says_how_it_was_trained(trained):
    wanted = {"schedule": "linear", "warmup_steps": WARM, "k": None, "include": [], "exclude": [], "norm": False}
    for name in ("pretrained", "scratch", f"pretrained/checkpoint-{STEPS}"):
        assert section(trained / name) == wanted | {"strength": 1.0, "steps": STEPS}
    state = load_file(trained / "pretrained" / "model.safetensors")
    assert {weight.dtype for weight in state.values()} == {torch.float32}
    assert state.keys() == load_file(trained / "child" / "model.safetensors").keys()


# Slips.


def test_the_real_axolotl_refuses_contradictions(tmp_path):
    write_text(tmp_path, 2)
    path = recipe(tmp_path, "out", DEMO_FOLDER, {}, max_steps=1, learning_rate=1e-4, qat={"weight_dtype": "int4"})
    with pytest.raises(DowncycleError, match=r"DowncycleError: qat: not with TernaryPlugin: .*take it out; the log is"):
        train(path)
    assert not (tmp_path / "out" / "model.safetensors").exists()
