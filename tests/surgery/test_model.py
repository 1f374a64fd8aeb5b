"""A model made from a Checkpoint value is the model that stock transformers loads from its files."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM  # noqa: E402

from downcycle import DowncycleError, keep_layers, load_model, open_checkpoint, write  # noqa: E402
from downcycle.surgery.checkpoint import Tensor  # noqa: E402

TOKENS = torch.arange(1, 13)[None]
SIZES = {"num_hidden_layers": 6, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def logits(model) -> "torch.Tensor":
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


@pytest.fixture(params=["llama", "llama-tied", "mixtral"])
def parent(request, tmp_path):
    """A saved model; the Mixtral one has its experts apart on disk and fused in memory."""
    torch.manual_seed(0)
    if request.param == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**SIZES, vocab_size=64, num_local_experts=4))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=64, tie_word_embeddings=request.param == "llama-tied"))
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "parent", max_shard_size="50KB")
    return model.eval(), open_checkpoint(tmp_path / "parent")


def test_unwritten_cut_gives_the_logits_of_the_layers_deleted_by_hand(parent):
    model, checkpoint = parent
    loaded = load_model(keep_layers(checkpoint, [0, 1, 4, 5]))
    model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in (0, 1, 4, 5))
    model.config.num_hidden_layers = 4
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.training
    assert loaded.generation_config.max_new_tokens == 7


def test_unwritten_and_written_are_one_model(parent, tmp_path):
    _, checkpoint = parent
    child = keep_layers(checkpoint, [5, 0, 0])
    written = AutoModelForCausalLM.from_pretrained(write(child, tmp_path / "child"))
    assert torch.equal(logits(load_model(child)), logits(written))


def test_dtype_is_an_option(parent):
    _, checkpoint = parent
    assert load_model(checkpoint, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_changing_the_model_leaves_the_files_alone(parent):
    model, checkpoint = parent
    with torch.no_grad():
        for weight in load_model(checkpoint).parameters():
            weight.zero_()
    assert torch.equal(logits(load_model(checkpoint)), logits(model))


def test_computed_tensors_are_computed(parent):
    _, checkpoint = parent
    name = "model.norm.weight"
    doubled = torch.full((32,), 2.0).numpy().tobytes()
    tensor = Tensor("F32", (32,), lambda: [doubled[:50], doubled[50:]])
    child = replace(checkpoint, tensors={**checkpoint.tensors, name: tensor})
    assert load_model(child).model.norm.weight.tolist() == [2.0] * 32


def test_weights_that_are_missing_are_not_made_up(make, tmp_path):
    make(tmp_path / "m", layers=2)
    checkpoint = open_checkpoint(tmp_path / "m")
    less = {name: tensor for name, tensor in checkpoint.tensors.items() if "layers.1.mlp" not in name and "lm_head" not in name}
    with pytest.raises(DowncycleError, match=r"lacks lm_head.weight, model.layers.1.mlp.down_proj.weight, .* and 1 more, which a Llama"):
        load_model(replace(checkpoint, tensors=less))
