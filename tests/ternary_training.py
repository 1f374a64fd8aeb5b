"""Trainings of ternary weights by the real Axolotl, and the losses of what came of them. Needs torch."""

import json
import sys
from pathlib import Path

import torch
import yaml
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from downcycle import load_model, open_checkpoint
from downcycle.recipes import training
from downcycle.recipes.demo.corpus import read_text
from downcycle.surgery.checkpoint import DEMO_FOLDER
from downcycle.surgery.ternary.bitlinear import convert, set_strength
from downcycle.surgery.ternary.rule import Rule

PLUGIN = "downcycle.recipes.plugins.TernaryPlugin"
WINDOW = 256
# Several trainings in one process, which takes longer to start than one of them.
TRAIN = """
import sys
from axolotl.cli.train import do_cli
recipes, sys.argv = sys.argv[1:], sys.argv[:1]
for recipe in recipes:
    do_cli(recipe)
"""


def recipe(folder: Path, name: str, model: Path, ternary: dict, **settings: object) -> Path:
    """Write a recipe whose output is the folder `name`, on the text below `folder`."""
    config = {
        "base_model": str(model),
        "special_tokens": {"pad_token": "<|reserved_special_token_0|>"},
        "datasets": [{"path": str(folder / "text.jsonl"), "ds_type": "json", "split": "train", "type": "completion"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
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


def run_axolotl(*recipes: Path) -> None:
    """Do what `axolotl train` does, for one recipe after the other; it prepares the text, too. The log lies with the first's weights."""
    config = training._read(recipes[0])
    out = Path(config["output_dir"])
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-c", TRAIN, *map(str, recipes)]
    with open(out / training.LOG, "wb") as log:
        training._run(command, training.STAGES["train"], training._environment(config, out), log, lambda step: None)


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
