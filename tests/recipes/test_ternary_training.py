"""The real Axolotl trains ternary weights with the plugin; packed, they are run by stock transformers, number for number as in training.

Trainings of a minute in all: of the built-in model and of one with random weights in its shape, and short ones of three of its layers.
"""

import importlib.util
import json
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
import yaml  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy, linear  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from downcycle import DowncycleError, keep_layers, load_model, open_checkpoint, write  # noqa: E402
from downcycle.recipes import training  # noqa: E402
from downcycle.recipes.demo.corpus import read_text  # noqa: E402
from downcycle.recipes.training import history, train  # noqa: E402
from downcycle.surgery.checkpoint import DEMO_FOLDER  # noqa: E402
from downcycle.surgery.ternary.bitlinear import convert, set_strength  # noqa: E402
from downcycle.surgery.ternary.rule import Rule  # noqa: E402
from downcycle.surgery.ternary.ternarize import ternarize  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet")
PLUGIN = "downcycle.recipes.plugins.TernaryPlugin"
WINDOW = 256
STEPS, WARM = 40, 20  # of the long trainings; half of them with lambda at 1
SHORT, HALF, SLOW = 6, 3, 1e-5  # steps of the short ones, where one is cut off, and its learning rate
ON_A_CPU = """
from axolotl.integrations.base import BasePlugin


class Cpu(BasePlugin):
    def get_training_args(self, cfg):
        return {"use_cpu": True}
"""
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


def recipe(folder: Path, name: str, model: Path, ternary: dict, **settings: object) -> Path:
    """Write a recipe whose output is the folder `name`, on the text below `folder`."""
    config = {
        "base_model": str(model),
        "special_tokens": {"pad_token": "<|reserved_special_token_0|>"},
        "datasets": [{"path": str(folder / "text.jsonl"), "ds_type": "json", "split": "train", "type": "completion"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "sequence_len": WINDOW,
        "sample_packing": True,
        "pad_to_sequence_len": True,
        "val_set_size": 0,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "optimizer": "adamw_torch_fused",
        "lr_scheduler": "cosine",
        "weight_decay": 0.0,
        "bf16": False,
        "attn_implementation": "sdpa",
        "logging_steps": 1,
        "seed": 42,
        "plugins": [PLUGIN],
        "downcycle_ternary": ternary,
        "output_dir": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config | settings, sort_keys=False))
    return path


def write_text(folder: Path, documents: int) -> None:
    texts = read_text(DEMO_FOLDER.parent / "healing.txt")[:documents]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def run_axolotl(path: Path) -> None:
    """Run `axolotl train` alone, which prepares the text where that was not done."""
    config = training._read(path)
    out = Path(config["output_dir"])
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(path), "--launcher", "python"]
    with open(out / training.LOG, "wb") as log:
        training._run(command, training.STAGES["train"], training._environment(config, out), log, lambda step: None)


def random_model(target: Path) -> Path:
    """The built-in model with new random weights."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(DEMO_FOLDER)).float().save_pretrained(target)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_FOLDER / file, target)
    return target


def section(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["downcycle_ternary"]


def windows() -> torch.Tensor:
    """Held-out text [10, WINDOW]."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    ids = tokenizer("\n\n".join(read_text(DEMO_FOLDER.parent / "held_out.txt")))["input_ids"]
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).reshape(-1, WINDOW)[::40][:10]


def as_trained(folder: Path, strength: float) -> nn.Module:
    """The model with the arithmetic of training, at one lambda."""
    model = load_model(open_checkpoint(folder), dtype=torch.float32)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and Rule().takes(name):
            convert(module)
    set_strength(model, strength)
    return model


@torch.inference_mode()
def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(input_ids=one[None]).logits for one in ids])


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


@pytest.fixture(scope="session")
def trained(once) -> Path:
    """Trainings of the built-in model and of a random one, on the same text in the same steps; what the first learnt, packed."""

    def fill(folder: Path) -> None:
        write_text(folder, 250)
        common = {"max_steps": STEPS, "learning_rate": 3e-3, "save_total_limit": 1}
        ternary = {"schedule": "linear", "warmup_steps": WARM}
        train(recipe(folder, "pretrained", DEMO_FOLDER, ternary, **common))
        run_axolotl(recipe(folder, "scratch", random_model(folder / "random"), ternary, **common))
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
    assert len(maps) == 12 * 7 and "BitLinear" in stock["kinds"]
    assert torch.equal(stock["logits"], logits_of(model, torch.load(trained / "ids.pt")))


def test_the_packed_model_has_the_loss_of_the_model_in_training(trained):
    ids = torch.load(trained / "ids.pt")
    packed, learnt = loss_of(torch.load(trained / "stock.pt")["logits"], ids), logits_of(as_trained(trained / "pretrained", 1), ids)
    assert packed == pytest.approx(loss_of(learnt, ids), abs=5e-3)


def test_training_wins_back_what_rounding_loses_and_pretrained_weights_are_worth_a_lot(trained):
    ids = torch.load(trained / "ids.pt")
    losses = {
        "parent": loss_of(logits_of(load_model(open_checkpoint("demo"), dtype=torch.float32), ids), ids),
        "rounded": loss_of(logits_of(as_trained(DEMO_FOLDER, 1), ids), ids),
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
        assert "'lambda'" in (trained / name / training.LOG).read_text(errors="replace")
    losses = [entry["loss"] for entry in history(trained / "scratch") if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5]) - 5 * 0.5, losses


def test_config_json_says_how_it_was_trained(trained):
    wanted = {"schedule": "linear", "warmup_steps": WARM, "k": None, "include": [], "exclude": [], "norm": False}
    for name in ("pretrained", "scratch", f"pretrained/checkpoint-{STEPS}"):
        assert section(trained / name) == wanted | {"strength": 1.0, "steps": STEPS}
    state = load_file(trained / "pretrained" / "model.safetensors")
    assert {weight.dtype for weight in state.values()} == {torch.float32}
    assert state.keys() == load_file(DEMO_FOLDER / "model.safetensors").keys()


# 16-bit products, a teacher, evaluations, and a training that goes on.


@pytest.fixture(scope="session")
def short(once) -> Path:
    """A training in six steps, `whole`, and its last three once more from the checkpoint after the first three, `resumed`."""

    def fill(folder: Path) -> None:
        write_text(folder, 40)
        texts = [text[:400] for text in read_text(DEMO_FOLDER.parent / "held_out.txt")[:4]]
        (folder / "held.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        (folder / "on_a_cpu.py").write_text(ON_A_CPU)
        write(keep_layers(open_checkpoint("demo"), [0, 1, 11]), folder / "child")
        common = {
            "plugins": [PLUGIN, "on_a_cpu.Cpu"],  # Axolotl has bf16 on a CPU only where a plugin says so
            "bf16": True,
            "learning_rate": SLOW,
            "max_steps": SHORT,
            "save_steps": HALF,
            "eval_steps": HALF,
            "test_datasets": [{"path": str(folder / "held.jsonl"), "ds_type": "json", "split": "train", "type": "completion"}],
            "eval_sample_packing": False,
            "eval_batch_size": 1,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "curriculum_sampling": True,  # texts in their order: shuffled and packed, Axolotl goes on with others than it would have had
        }
        ternary = {"schedule": "ramp", "k": 1.5, "distill": {"weight": 0.25, "temperature": 2.0}}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
            run_axolotl(recipe(folder, "whole", folder / "child", ternary, **common))
            half = {"resume_from_checkpoint": str(folder / "whole" / f"checkpoint-{HALF}")}
            run_axolotl(recipe(folder, "resumed", folder / "child", ternary, **common, **half))

    return once("short", fill)


def test_in_bf16_weights_stay_float32_and_small_updates_are_kept(short):
    before, after = load_file(short / "child" / "model.safetensors"), load_file(short / "whole" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    old, new = before[name].float(), after[name]
    assert new.dtype == torch.float32 and before[name].dtype == torch.bfloat16
    assert float((new != old).float().mean()) > 0.99
    assert float((new - old).abs().max()) < 1.5 * SLOW * SHORT
    assert float((new.bfloat16() == before[name]).float().mean()) > 0.5, "the updates were not small"
    assert "bf16" in (short / "whole.yaml").read_text()


def test_the_loss_is_that_of_text_and_teacher(short):
    logged = [entry for entry in history(short / "whole") if "loss" in entry]
    for entry in logged:
        assert entry["loss"] == pytest.approx(0.75 * entry["cross_entropy"] + 0.25 * entry["kl"], rel=1e-4)
    apart = [entry["kl"] for entry in logged]
    assert 0 <= apart[0] < 0.01, "at lambda 0 the model is its own teacher, as far as 16 bits can tell"
    assert apart[-1] > 0.5


def test_an_evaluation_runs_at_the_lambda_of_the_moment(short):
    """And has cross entropy alone, so that it can be compared with other models'."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    texts = [json.loads(line)["text"] for line in (short / "held.jsonl").read_text().splitlines()]
    found = {entry["step"]: entry["eval_loss"] for entry in history(short / "whole") if "eval_loss" in entry}
    at = {3: 0.5, 6: 1.0}
    losses: dict[int, dict[float, float]] = {}
    for step in at:
        losses[step] = {}
        for strength in (0.0, 0.25, 0.5, 1.0):
            model = as_trained(short / "whole" / f"checkpoint-{step}", strength)
            ids = [torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]) for text in texts]
            losses[step][strength] = sum(loss_of(logits_of(model, one), one) for one in ids) / len(ids)
    for step, strength in at.items():
        assert found[step] == pytest.approx(losses[step][strength], abs=0.03)
        assert all(abs(found[step] - loss) > 0.1 for other, loss in losses[step].items() if other != strength)


def test_a_training_that_is_resumed_goes_on_where_it_was(short):
    whole, resumed = ([entry for entry in history(short / name) if "loss" in entry] for name in ("whole", "resumed"))
    assert [entry["lambda"] for entry in whole] == pytest.approx([min(1.5 * step / SHORT, 1) for step in range(SHORT)], abs=1e-5)
    for key in ("step", "lambda", "learning_rate", "loss", "cross_entropy", "kl"):
        assert [entry[key] for entry in resumed] == pytest.approx([entry[key] for entry in whole], rel=1e-6), key
    one, other = (load_file(short / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_every_checkpoint_says_how_far_it_was(short):
    wanted = {"schedule": "ramp", "warmup_steps": None, "k": 1.5, "include": [], "exclude": [], "norm": False}
    for name, strength, steps in [("whole/checkpoint-3", 0.5, 3), ("whole", 1.0, 6), ("resumed", 1.0, 6)]:
        assert section(short / name) == wanted | {"strength": strength, "steps": steps}


# Norms.


@pytest.fixture(scope="session")
def normed(once) -> Path:
    """A training that goes on from a model with norms, with lambda at 1 from its first step on; what came of it, packed."""

    def fill(folder: Path) -> None:
        write_text(folder, 20)
        child = write(keep_layers(open_checkpoint("demo"), [0, 1, 11]), folder / "child")
        weights = load_file(child / "model.safetensors")
        maps = {name: weight for name, weight in weights.items() if name.endswith("_proj.weight")}
        norms = {name.replace(".weight", ".rms_norm.weight"): torch.linspace(0.5, 1.5, weight.shape[1]) for name, weight in maps.items()}
        save_file(weights | norms, child / "model.safetensors", {"format": "pt"})
        config = json.loads((child / "config.json").read_text())
        (child / "config.json").write_text(json.dumps(config | {"downcycle_ternary": {"norm": True, "strength": 1.0, "steps": 9}}))
        (child / "downcycle.json").unlink()
        run_axolotl(recipe(folder, "out", child, {"warmup_steps": 0, "norm": True}, max_steps=2, learning_rate=1e-4, micro_batch_size=1))

    return once("normed", fill)


def test_norms_are_trained_on_and_run_by_stock_transformers(normed, tmp_path):
    before, after = load_file(normed / "child" / "model.safetensors"), load_file(normed / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        if name.endswith("rms_norm.weight"):
            assert 0 < float((after[name] - before[name]).abs().max()) < 3e-4
    assert [entry["lambda"] for entry in history(normed / "out") if "loss" in entry] == [1, 1]
    assert section(normed / "out")["norm"] is True

    folder = write(ternarize(open_checkpoint(normed / "out")), tmp_path / "packed")
    ids = windows()[:2]
    with torch.compiler.set_stance("force_eager"):
        packed = logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids)
    learnt = load_model(open_checkpoint(normed / "out"), dtype=torch.float32)
    for name, module in list(learnt.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            convert(module, norm=True)
            module.rms_norm.weight.data.copy_(after[f"{name}.rms_norm.weight"])
    set_strength(learnt, 1)
    assert loss_of(packed, ids) == pytest.approx(loss_of(logits_of(learnt, ids), ids), abs=5e-3)
    assert loss_of(packed, ids) != pytest.approx(loss_of(logits_of(as_trained(normed / "out", 1), ids), ids), abs=5e-2)


# Slips.


@pytest.mark.parametrize(
    ("ternary", "settings", "says"),
    [
        ({"shedule": "linear"}, {}, r"(?s)downcycle_ternary.shedule.*Extra inputs are not permitted"),
        ({}, {"fp8": None, "qat": {"weight_dtype": "int4"}}, r"DowncycleError: qat: .* leave qat out; the log is"),
    ],
)
def test_the_real_axolotl_refuses_slips_and_contradictions(tmp_path, ternary, settings, says):
    write_text(tmp_path, 2)
    with pytest.raises(DowncycleError, match=says):
        train(recipe(tmp_path, "out", DEMO_FOLDER, ternary, max_steps=1, learning_rate=1e-4, **settings))
    assert not (tmp_path / "out" / "model.safetensors").exists()
