"""A config and tensors that do not belong together are refused; a head beside embeddings is what transformers takes it for."""

import json
from dataclasses import replace

import pytest

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
pytest.importorskip("xllamacpp")

import numpy as np  # noqa: E402

from downcycle.surgery.checkpoint import open_checkpoint  # noqa: E402
from downcycle.surgery.errors import DowncycleError  # noqa: E402
from downcycle.surgery.gguf.export import plan_gguf, write_gguf  # noqa: E402

import llama_cpp  # noqa: E402

PROMPT = list(range(100, 120))


def with_tensors(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def names_of(folder):
    return {tensor.name for tensor in plan_gguf(open_checkpoint(folder), "f32").tensors}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_hidden_layers": 6}, "llama.cpp needs blk.4.attn_norm.weight, which is not there; config.json counts 6 layers"),
        ({"num_hidden_layers": 3}, "no place for model.layers.3"),
        ({"vocab_size": 4200}, r"is \[4096, 64\], and by config.json it is \[4200, 64\]"),
        ({"vocab_size": 4000}, r"is \[4096, 64\], and by config.json it is \[4000, 64\]"),
        ({"num_key_value_heads": 4}, r"k_proj.weight is \[32, 64\], and by config.json it is \[64, 64\]"),
        ({"num_key_value_heads": 5}, r"k_proj.weight is \[32, 64\], and by config.json it is \[80, 64\]"),
        ({"head_dim": 32}, r"_proj.weight is .*, and by config.json it is"),
        ({"intermediate_size": 64}, r"_proj.weight is .*96.*, and by config.json it is"),
        ({"hidden_size": 128}, "and by config.json it is"),
    ],
)
def test_a_config_of_another_model_is_refused(fields, says, saved, tmp_path):
    _, folder = saved("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(DowncycleError, match=says):
        write_gguf(open_checkpoint(folder), tmp_path / "model.gguf", "f16")
    assert list(tmp_path.iterdir()) == []


def test_each_expert_must_have_the_shape(saved):
    _, folder = saved("mixtral", num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=None)
    model = open_checkpoint(folder)
    name = next(name for name in model.tensors if ".experts.3." in name and name.endswith(("w2.weight", "down_proj.weight")))
    narrow = replace(model.tensors[name], shape=(32, 96))
    with pytest.raises(DowncycleError, match=r"experts.3.* is \[32, 96\], and by config.json it is \[64, 96\]"):
        plan_gguf(replace(model, tensors={**model.tensors, name: narrow}), "f16")
    with pytest.raises(DowncycleError, match="needs 4 parts, and 3 are there"):
        plan_gguf(replace(model, tensors={other: tensor for other, tensor in model.tensors.items() if other != name}), "f16")


def test_a_layer_without_one_of_its_tensors_is_refused():
    model = open_checkpoint("demo")
    for name, new in (("model.layers.7.mlp.up_proj.weight", "blk.7.ffn_up.weight"), ("model.norm.weight", "output_norm.weight")):
        with pytest.raises(DowncycleError, match=f"needs {new}, which is not there"):
            plan_gguf(replace(model, tensors={other: tensor for other, tensor in model.tensors.items() if other != name}), "f16")


def test_a_head_of_its_own_in_a_tied_model_is_used_as_transformers_uses_it(saved, scores, tmp_path, quiet):
    from transformers import AutoModelForCausalLM as Model

    _, folder = saved("llama", tie_word_embeddings=True)
    assert "output.weight" not in names_of(folder)
    other = torch.randn(4096, 64, generator=torch.Generator().manual_seed(5)) * 0.15
    with_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": other}))
    write_gguf(open_checkpoint(folder), tmp_path / "model.gguf", "f32")
    found = np.array(llama_cpp.run(tmp_path / "model.gguf", [PROMPT], 4096)["scores"])
    expected = np.array(scores(Model.from_pretrained(folder, dtype=torch.float32).eval(), [PROMPT]))
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_head_that_is_the_embeddings_once_more_is_not_written(family, saved):
    _, folder = saved(family, tie_word_embeddings=True, head_dim=16)
    before = names_of(folder)
    with_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" in open_checkpoint(folder).tensors
    assert names_of(folder) == before
    with_tensors(folder, lambda tensors: tensors["lm_head.weight"][4095, 63].add_(1))
    if family == "llama":
        assert names_of(folder) == before | {"output.weight"}
    else:  # whose graph takes the embeddings always
        with pytest.raises(DowncycleError, match="no place for lm_head.weight"):
            names_of(folder)


def test_a_head_that_is_missing_is_refused(saved):
    _, folder = saved("llama", tie_word_embeddings=False)
    with_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(DowncycleError, match="needs lm_head.weight, as embeddings and head are not tied, which is not there"):
        names_of(folder)
