"""Quantised checkpoints are cut without being understood: bitsandbytes ones load and agree, others keep their bytes."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM  # noqa: E402

from downcycle import keep_layers, load_model, open_checkpoint, write  # noqa: E402

KEPT = [0, 1, 3, 5]
TOKENS = torch.arange(2, 18)[None]
SIZES = {"num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def float_parent(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("float")
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=128)).save_pretrained(folder)
    return folder


class Identity(torch.nn.Module):
    def forward(self, hidden_states, **kwargs):
        return hidden_states


def without_dropped_layers(model):
    """The oracle: the parent in memory, each dropped layer replaced by one that does nothing."""
    for layer in set(range(6)) - set(KEPT):
        model.model.layers[layer] = Identity()
    return model


@pytest.mark.parametrize(
    "quantizer",
    [
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        BitsAndBytesConfig(load_in_8bit=True),
    ],
    ids=["nf4", "int8"],
)
def test_bitsandbytes_child_agrees_with_parent_without_the_layers(float_parent, tmp_path, quantizer):
    parent = AutoModelForCausalLM.from_pretrained(float_parent, quantization_config=quantizer, dtype=torch.float32)
    parent.save_pretrained(tmp_path / "parent")
    child = keep_layers(open_checkpoint(tmp_path / "parent"), KEPT)
    write(child, tmp_path / "child")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "child", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert len(loaded.model.layers) == 4
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "parent", dtype=torch.float32)
    with torch.no_grad():
        expected = without_dropped_layers(reloaded)(TOKENS, use_cache=False).logits
        assert torch.equal(loaded(TOKENS, use_cache=False).logits, expected)
        assert torch.equal(load_model(child, dtype=torch.float32)(TOKENS, use_cache=False).logits, expected)


def packed_layers(style: str) -> dict[str, torch.Tensor]:
    """Tensors as the quantiser's files hold them, with random contents."""
    generator = torch.Generator().manual_seed(1)

    def integers(*shape: int, dtype=torch.int32) -> torch.Tensor:
        return torch.randint(-128, 127, shape, generator=generator).to(dtype)

    tensors = {"model.embed_tokens.weight": torch.randn(128, 64, generator=generator).half(), "model.norm.weight": torch.ones(64).half()}
    for layer in range(6):
        stem = f"model.layers.{layer}.self_attn.q_proj."
        if style == "fp8":
            tensors[stem + "weight"] = torch.randn(64, 64, generator=generator).to(torch.float8_e4m3fn)
            tensors[stem + "weight_scale_inv"] = torch.randn(1, 1, generator=generator)
        else:
            tensors[stem + "qweight"] = integers(8, 64) if style == "gptq" else integers(64, 8)
            tensors[stem + "qzeros"] = integers(1, 8)
            tensors[stem + "scales"] = torch.randn(1, 64, generator=generator).half()
        if style == "gptq":
            tensors[stem + "g_idx"] = integers(64)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.randn(64, generator=generator).half()
    return tensors


CONFIGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "dynamic": {r"-:model\.layers\.3\.mlp": {}, r"+:.*\.layers\.2\..*": {"bits": 8}}},
    "awq": {"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["lm_head", "model.layers.2", "model.layers.5.mlp"]},
    "fp8": {"quant_method": "fp8", "ignored_layers": ["model.layers.0.mlp.gate", "model.layers.4.mlp.gate", "model.layers.5.mlp.gate"]},
}
RENUMBERED = {
    "gptq": {"dynamic": {r"-:model\.layers\.2\.mlp": {}}},
    "awq": {"modules_to_not_convert": ["lm_head", "model.layers.3.mlp"]},
    "fp8": {"ignored_layers": ["model.layers.0.mlp.gate", "model.layers.3.mlp.gate"]},
}


@pytest.mark.parametrize("style", CONFIGS)
def test_packed_tensors_keep_their_bytes_and_names_are_renumbered(tmp_path, style):
    tensors = packed_layers(style)
    parent = tmp_path / "parent"
    parent.mkdir()
    save_file(tensors, parent / "model.safetensors")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES, "quantization_config": CONFIGS[style]}
    (parent / "config.json").write_text(json.dumps(config))
    (parent / "quantize_config.json").write_text(json.dumps(CONFIGS[style]))
    write(keep_layers(open_checkpoint(parent), KEPT), tmp_path / "child")

    expected = {name: tensor for name, tensor in tensors.items() if ".layers." not in name}
    for new, old in enumerate(KEPT):
        part = f"model.layers.{old}."
        expected |= {f"model.layers.{new}." + name.removeprefix(part): tensors[name] for name in tensors if name.startswith(part)}
    with safe_open(tmp_path / "child" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(expected)
        for name, tensor in expected.items():
            assert file.get_tensor(name).view(torch.uint8).equal(tensor.view(torch.uint8)), name
    quantizer = json.loads((tmp_path / "child" / "config.json").read_text())["quantization_config"]
    assert quantizer == CONFIGS[style] | RENUMBERED[style]
    assert json.loads((tmp_path / "child" / "quantize_config.json").read_text()) == quantizer
