"""A folder that is not what it says is not published: one changed byte, one tensor less, one file more."""

import json
import os
import shutil
import struct

import pytest

from downcycle.eval.publish.files import plan_push

REPO = "ann/small"


def flip(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def drop_tensor(folder):
    """Take the last tensor out of the last shard and out of the index: the model is whole by its own word."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = sorted(folder.glob("*.safetensors"))[-1]
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1])
    start, end = header.pop(name)["data_offsets"]
    assert end == len(content) - 8 - length
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length : 8 + length + start])
    del index["weight_map"][name]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return name


def test_one_changed_byte(model, line, hub):
    flip(sorted(model.glob("*.safetensors"))[1])
    text = line(plan_push, model, REPO)
    assert text.startswith(f"{model} is not what downcycle.json says: tensor ") and "differs between bytes" in text
    assert not hub.requests


def test_one_tensor_less(model, line):
    name = drop_tensor(model)
    assert f"tensor {name} is missing" in line(plan_push, model, REPO)


def test_one_file_more(model, line):
    (model / "vocab.txt").write_text("a\nb\n")
    assert "vocab.txt does not belong" in line(plan_push, model, REPO)


def test_a_changed_config(model, line):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 1}))
    assert "config.json: rope_theta is 1 instead of absent" in line(plan_push, model, REPO)


def test_a_parent_that_was_moved(model, parent, line, tmp_path):
    parent.rename(tmp_path / "elsewhere")
    assert "give it with --src" in line(plan_push, model, REPO)
    assert plan_push(model, REPO, src=tmp_path / "elsewhere").proof.startswith("verified: layers 0-1,5 of ")


def test_progress_counts_the_bytes_that_are_compared(model, read_back):
    steps = []
    plan_push(model, REPO, progress=steps.append)
    assert sum(steps) == sum(len(tensor.data) for tensor in read_back(model).values())


def test_a_model_from_elsewhere_is_whole_and_no_more_is_said(parent, line):
    plan = plan_push(parent, REPO)
    assert plan.proof.startswith("whole: ") and "nothing proves where these weights come from" in plan.notes[0]
    assert f"--src {parent}: {parent} holds no downcycle.json" in line(plan_push, parent, REPO, src=parent)
    assert f"--adapter x: {parent} holds no downcycle.json" in line(plan_push, parent, REPO, adapter="x")
    os.truncate(parent / "model.safetensors", (parent / "model.safetensors").stat().st_size - 1)
    assert "it is truncated" in line(plan_push, parent, REPO)


@pytest.fixture
def adapter(tmp_path, pack_file, stored):
    """A LoRA of one module, as peft writes it, made by hand."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{prefix}.lora_A.weight": stored("F32", (2, 32)), f"{prefix}.lora_B.weight": stored("F32", (32, 2))}
    tensors = {name: tensor._replace(data=struct.pack("<64f", *range(64))) for name, tensor in tensors.items()}
    (folder / "adapter_model.safetensors").write_bytes(pack_file(tensors))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "layers_to_transform": [0]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")}))
    (folder / "config.json").write_text("{}")  # as Axolotl leaves it
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / "optimizer.pt").write_text("1")
    return folder


def test_an_adapter_arrives(hub, adapter, files_of):
    from downcycle.eval.publish.push import push

    plan = plan_push(adapter, REPO)
    assert plan.proof == "whole: 2 tensors"
    assert "was not held against its base model" in plan.notes[0]
    assert plan.left_out == {"checkpoint-7/": "state of a training"}
    push(plan)
    shutil.rmtree(adapter / "checkpoint-7")
    assert hub.content(REPO) == files_of(adapter)


def test_an_adapter_is_held_against_its_base(parent, adapter, line):
    pytest.importorskip("torch")
    assert plan_push(adapter, REPO, src=parent).proof == f"fits {parent}: 2 tensors"
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(parent)}))
    plan = plan_push(adapter, REPO)
    assert plan.proof.startswith("fits ")
    assert any("adapter_config.json calls the base model" in note and str(parent) in note for note in plan.notes)
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"layers_to_transform": [0, 1]}))
    assert "target_modules names" in line(plan_push, adapter, REPO, src=parent)
    assert "another model" in line(plan_push, adapter, REPO, src="demo")


def test_adapters_that_are_none(adapter, line, pack_file):
    assert "is an adapter itself" in line(plan_push, adapter, REPO, adapter="x")
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(pack_file({}))
    assert "holds no tensors; nothing was trained" in line(plan_push, adapter, REPO)
    (adapter / "adapter_model.safetensors").write_bytes(weights)
    os.truncate(adapter / "adapter_model.safetensors", len(weights) - 3)
    assert "it is truncated" in line(plan_push, adapter, REPO)
    (adapter / "adapter_model.safetensors").unlink()
    assert "an adapter with no weights; it needs adapter_model.safetensors" in line(plan_push, adapter, REPO)
    (adapter / "adapter_model.bin").write_bytes(b"x")
    assert "pickles, which can run code when read (adapter_model.bin)" in line(plan_push, adapter, REPO)
    (adapter / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in line(plan_push, adapter, REPO)


def test_other_weights_beside_an_adapter(adapter, line):
    shutil.copy(adapter / "adapter_model.safetensors", adapter / "other.safetensors")
    assert "weights of which nothing is known (other.safetensors)" in line(plan_push, adapter, REPO)
