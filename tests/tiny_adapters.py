"""Tiny adapters that peft itself writes, trained on tiny models, and ways to spoil and to read them."""

import json
from copy import deepcopy

import peft
import torch
from safetensors.torch import load_file, save_file

from downcycle.surgery.adapter import lowrank

from tiny_models import tiny_model

TWO = ["q_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
GPT2 = ["c_attn", "c_proj", "c_fc"]


def base_model(family):
    """Return a tiny model; "llama, tied" is a Llama whose head is its embedding."""
    model = tiny_model(family.removesuffix(", tied"))
    if family.endswith(", tied"):
        config = deepcopy(model.config)
        config.tie_word_embeddings = True
        state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        model = type(model)(config).eval()
        model.load_state_dict(state, strict=False)
    return model


def train(model, *, autocast_adapter_dtype=True, **options):
    """Return a peft model whose every trainable number was moved."""
    config = peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **options})
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.05)
    return model


def make(folder, family, dtype=torch.float32, **options):
    """Write a base and an adapter trained on it; return both folders."""
    model = base_model(family).to(dtype)
    model.save_pretrained(folder / "base")
    train(model, **options).save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def edit(folder, name="adapter_config.json", **changes):
    """Change fields of a folder's config; those that become "gone" are left out."""
    path = folder / name
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))


def edit_tensors(folder, change, name="adapter_model.safetensors"):
    """Let `change` work on the tensors of a folder's file."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def as_bytes(checkpoint):
    """Return dtype, shape and bytes of every tensor."""
    return {name: (tensor.dtype, tensor.shape, b"".join(tensor.chunks())) for name, tensor in checkpoint.tensors.items()}


def loaded(checkpoint):
    """Return every tensor as torch has it."""
    return {name: lowrank.to_torch(tensor) for name, tensor in checkpoint.tensors.items()}


def is_nearest(got, wanted, slack):
    """Whether each number is the nearest of its dtype to the wanted one in float64, which is known up to `slack` of it."""
    below, above = (torch.nextafter(got, torch.tensor(end, dtype=got.dtype)).double() for end in (-torch.inf, torch.inf))
    got, slack = got.double(), slack * wanted.abs().clamp(min=1)
    return bool(((wanted >= (got + below) / 2 - slack) & (wanted <= (got + above) / 2 + slack)).all())
