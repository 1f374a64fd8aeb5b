"""In the real Axolotl: 16-bit products of float32 weights, a teacher, evaluations, a training that is resumed, norms."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not importlib.util.find_spec("axolotl"):
    pytest.skip("needs Axolotl", allow_module_level=True)
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from downcycle import keep_layers, load_model, open_checkpoint, write  # noqa: E402
from downcycle.recipes.demo.corpus import read_text  # noqa: E402
from downcycle.recipes.training import history  # noqa: E402
from downcycle.surgery.checkpoint import DEMO_FOLDER  # noqa: E402
from downcycle.surgery.ternary.bitlinear import convert, set_strength  # noqa: E402
from downcycle.surgery.ternary.ternarize import ternarize  # noqa: E402

from ternary_training import PLUGIN, as_trained, logits_of, loss_of, recipe, run_axolotl, section, windows, write_text  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet")
SHORT, HALF, SLOW = 6, 3, 1e-5  # steps, those after which one is cut off, and its learning rate
ON_A_CPU = """
from axolotl.integrations.base import BasePlugin


class Cpu(BasePlugin):
    def get_training_args(self, cfg):
        return {"use_cpu": True}
"""


def with_norms(folder: Path) -> Path:
    """The child as if a ternary training had left it, with norms."""
    target = write(open_checkpoint(folder / "child"), folder / "child with norms")
    weights = load_file(target / "model.safetensors")
    maps = {name: weight for name, weight in weights.items() if name.endswith("_proj.weight")}
    norms = {name.replace(".weight", ".rms_norm.weight"): torch.linspace(0.5, 1.5, weight.shape[1]) for name, weight in maps.items()}
    save_file(weights | norms, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"downcycle_ternary": {"norm": True, "strength": 1.0, "steps": 9}}))
    (target / "downcycle.json").unlink()
    return target


@pytest.fixture(scope="session")
def short(once) -> Path:
    """A training in six steps, `whole`, and its last three once more from the checkpoint after the first three, `resumed`.

    And `normed`, which goes on from a model with norms, with lambda at 1 from its first step on.
    """

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
            further = recipe(folder, "normed", with_norms(folder), {"warmup_steps": 0, "norm": True}, max_steps=2, learning_rate=1e-4)
            run_axolotl(recipe(folder, "whole", folder / "child", ternary, **common), further)
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


def test_norms_are_trained_on_and_run_by_stock_transformers(short, tmp_path):
    before, after = load_file(short / "child with norms" / "model.safetensors"), load_file(short / "normed" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        if name.endswith("rms_norm.weight"):
            assert 0 < float((after[name] - before[name]).abs().max()) < 3e-4
    assert [entry["lambda"] for entry in history(short / "normed") if "loss" in entry] == [1, 1]
    assert section(short / "normed")["norm"] is True

    folder = write(ternarize(open_checkpoint(short / "normed")), tmp_path / "packed")
    ids = windows()[:2]
    with torch.compiler.set_stance("force_eager"):
        packed = logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids)
    learnt = load_model(open_checkpoint(short / "normed"), dtype=torch.float32)
    for name, module in list(learnt.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            convert(module, norm=True)
            module.rms_norm.weight.data.copy_(after[f"{name}.rms_norm.weight"])
    set_strength(learnt, 1)
    assert loss_of(packed, ids) == pytest.approx(loss_of(logits_of(learnt, ids), ids), abs=5e-3)
    assert loss_of(packed, ids) != pytest.approx(loss_of(logits_of(as_trained(short / "normed", 1), ids), ids), abs=5e-2)
