"""Models whose making is known (a cut, a healed one with its training, an adapter, a trained one), and cards read by the Hub's classes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from downcycle import keep_layers, open_checkpoint, write
from downcycle.eval.card.card import card_files
from downcycle.surgery.adapter.merge import adapter_fingerprint
from downcycle.surgery.checkpoint import find_source

TOKEN = "hf_PlantedTokenOfNobody0123456789"
META = """---
language:
- en
pipeline_tag: text-generation
tags:
- facebook
license: llama3
---

# Meta Llama 3

Cite it so:

@article{llama3modelcard,
  title={Llama 3 Model Card},
  author={AI@Meta},
  year={2024},
  url = {https://github.com/meta-llama/llama3/blob/main/MODEL_CARD.md}
}
"""
LICENSE = "META LLAMA 3 COMMUNITY LICENSE AGREEMENT\n\nMeta Llama 3 Version Release Date: April 18, 2024\n"
RECIPE = """# {home}/child: heal it.
#   axolotl train {home}/axolotl.yaml
base_model: {home}/child
hub_model_id: jane/secret-repo
wandb_project: healing
wandb_entity: jane-doe
hf_token: {token}
special_tokens:
  pad_token: <|pad|>
datasets:
  - path: prince-canuma/fineweb-CC-MAIN-2024-10-1B-en
    split: train
    type: completion
  - path: {home}/own.jsonl
    ds_type: json
    type: completion
sequence_len: 8
adapter: qlora
load_in_4bit: true
lora_r: 128
lora_alpha: 16
peft_use_rslora: true
learning_rate: 0.0002
micro_batch_size: 2
gradient_accumulation_steps: 8
num_epochs: 2
output_dir: {home}/training
"""
BADGE = (
    '[<img src="https://raw.githubusercontent.com/axolotl-ai-cloud/axolotl/main/image/axolotl-badge-web.png" alt="Built with Axolotl" '
    'width="200" height="32"/>](https://github.com/axolotl-ai-cloud/axolotl)'
)
AXOLOTL_CARD = """---
library_name: peft
tags:
- axolotl
- base_model:adapter:{home}/child
- lora
datasets:
- {home}/own.jsonl
base_model: {home}/child
model-index:
- name: {home}/training
  results: []
---

<!-- This model card has been generated automatically according to the information the Trainer had access to. You
should probably proofread and complete it, then remove this comment. -->

{badge}
<details><summary>See axolotl config</summary>

axolotl version: `0.19.0`
```yaml
{recipe}
```

</details><br>

# {home}/training

This model was trained from scratch on the {home}/own.jsonl dataset.
It achieves the following results on the evaluation set:
- Loss: 2.4942

## Model description

More information needed

## Intended uses & limitations

More information needed

## Training and evaluation data

More information needed

## Training procedure

### Training hyperparameters

The following hyperparameters were used during training:
- learning_rate: 0.0002
- train_batch_size: 2
- distributed_type: multi-GPU
- num_devices: 4
- gradient_accumulation_steps: 8
- total_train_batch_size: 1,024
- optimizer: Use OptimizerNames.PAGED_ADAMW with betas=(0.9,0.999) and epsilon=1e-08 and optimizer_args=No additional optimizer arguments

### Training results

| Training Loss | Epoch | Step | Validation Loss |
|:-------------:|:-----:|:----:|:---------------:|
| 7.4207        | 0.0   | 1    | 7.1806          |


### Framework versions

- PEFT 0.20.0
- Transformers 5.16.1
- Pytorch 2.13.0+cpu
"""
LOG = [
    {"step": 1, "epoch": 0.001, "loss": 7.4},
    {"step": 1, "epoch": 0.001, "eval_loss": 7.1806, "eval_runtime": 3.0},
    {"step": 10, "epoch": 0.5, "loss": 2.7, "tokens/total": 5242880},
    {"step": 10, "epoch": 0.5, "eval_loss": 2.5872},
    {"step": 40, "epoch": 2.0, "loss": 2.5, "tokens/total": 20971520},
    {"step": 40, "epoch": 2.0, "eval_loss": 2.4942},
    {"step": 40, "epoch": 2.0, "train_runtime": 100.0},
]


def save_training(folder, home, log=LOG, recipe=None):
    """Write what Axolotl leaves in its output folder."""
    (folder / "checkpoint-40").mkdir(parents=True)
    (folder / "checkpoint-40" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    text = RECIPE.format(home=home, token=TOKEN) if recipe is None else recipe
    (folder / "README.md").write_text(AXOLOTL_CARD.format(home=home, recipe=text, badge=BADGE))
    return folder


def save_adapter(folder, base, rank=128):
    """Write an adapter of which one matrix is enough."""
    config = {"base_model_name_or_path": str(base), "r": rank, "task_type": "CAUSAL_LM", "peft_type": "LORA", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    key, size = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", rank * 4 * 4
    header = json.dumps({key: {"dtype": "F32", "shape": [rank, 4], "data_offsets": [0, size]}}).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    return folder


def healed_by(child, adapter, **more):
    """A model that says that an adapter was merged into it; its weights do not matter here."""
    lineage = {"downcycle": "0.1.0", "operation": "merge", "parent": child.name, "revision": child.revision, "adapter": str(adapter)}
    lineage |= {"fingerprint": child.fingerprint, "adapter_revision": None, "adapter_base": child.name, **more}
    lineage["adapter_fingerprint"] = adapter_fingerprint(find_source(Path(adapter)))
    return replace(child, lineage={**lineage, "parent_lineage": child.lineage})


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder of a person whose name nobody is to read, who is in it, with a token in the environment."""
    folder = tmp_path / "home" / "jane-doe"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def parent(make, home):
    """A folder of eight layers with Meta's card and licence."""
    make(home / "Meta-Llama-3-8B", layers=8, config={"dtype": "bfloat16", "max_position_embeddings": 64})
    (home / "Meta-Llama-3-8B" / "README.md").write_text(META)
    (home / "Meta-Llama-3-8B" / "LICENSE").write_text(LICENSE)
    return home / "Meta-Llama-3-8B"


@pytest.fixture
def child(parent, home):
    """The first six of its layers, written."""
    return write(keep_layers(open_checkpoint(parent), [*range(6)], "first"), home / "child")


@pytest.fixture
def healed(child, home):
    """The child, healed by a training that is still there."""
    save_adapter(save_training(home / "training", home), child)
    return write(healed_by(open_checkpoint(child), home / "training"), home / "Llama-3-6B-v0.1")


@pytest.fixture
def adapter(child, home):
    """The adapter of that training."""
    save_adapter(save_training(home / "training", home), child)
    (home / "training" / "tokenizer.json").write_text("{}")
    return home / "training"


@pytest.fixture
def trained(child, home):
    """The child, every weight trained: the output folder is the model, and holds no downcycle.json."""
    folder = home / "outputs" / "full"
    shutil.copytree(child, folder)
    for name in ("downcycle.json", "LICENSE"):
        (folder / name).unlink()
    recipe = f"base_model: {home}/child\ndatasets:\n  - path: HuggingFaceFW/fineweb\n    type: completion\noutput_dir: {folder}\n"
    return save_training(folder, home, recipe=recipe)


class Read:
    """A card as the Hub's own classes read it, checked for what no card may hold."""

    def __init__(self, text: str, home: Path):
        for word in (str(home), str(home.parent), "jane-doe", TOKEN, TOKEN[:12], "hf_P", "/home/", "/tmp/"):
            assert word not in text
        self.text = text
        self.card = ModelCard(text)
        self.data = self.card.data.to_dict()
        again = ModelCard(str(self.card)).data.to_dict()
        assert again == self.data
        self.results = self.card.data.eval_results

    def section(self, title: str) -> str:
        """The text below a heading, up to the next of its kind."""
        return self.text.partition(f"\n{title}\n")[2].partition("\n## ")[0]


@pytest.fixture
def heal():
    """Save an adapter into a folder and make a model that says that it was merged into it."""
    return lambda child, folder, **more: replace(
        made := healed_by(child, save_adapter(folder, child.name)), lineage={**made.lineage, **more}
    )


@pytest.fixture
def planned(read):
    """The card of a model that was not written yet."""
    return lambda checkpoint, name: read(card_files(checkpoint, name)["README.md"].decode())


@pytest.fixture
def read(home):
    """Read a folder's card, or a text."""
    return lambda card: Read(card if isinstance(card, str) else (card / "README.md").read_text(), home)
