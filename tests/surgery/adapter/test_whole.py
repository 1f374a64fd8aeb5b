"""An adapter that lacks what its own config says was trained is refused by that field's name; what is targeted is what peft targets."""

import re
import shutil

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft.tuners.tuners_utils import check_target_module_exists  # noqa: E402
from tiny_adapters import EXPERTS, GPT2, TWO, edit_tensors, make  # noqa: E402

from downcycle import open_checkpoint  # noqa: E402
from downcycle.surgery.adapter.config import AdapterConfig  # noqa: E402
from downcycle.surgery.adapter.merge import merge_adapter  # noqa: E402

from tiny_models import tiny_model  # noqa: E402

MOE = {"target_modules": ["q_proj"], "target_parameters": EXPERTS}
NORM = "model.layers.3.input_layernorm"
SAVED, TOKENS = "modules_to_save names", "trainable_token_indices names"
BY_MODULE = {"embed_tokens": [3], "lm_head": [4]}
LACKING = {
    "a module": ("llama", {}, r"\.3\.mlp", "target_modules names model.layers.3.mlp.down_proj, .* there are 1 such modules in layers 3 of"),
    "a head that was saved": ("llama", {"modules_to_save": ["lm_head"]}, "lm_head", f"{SAVED} lm_head,"),
    "one of many that were": ("llama", {"modules_to_save": ["input_layernorm"]}, NORM, f"{SAVED} {NORM},"),
    "one in blocks that were": ("llama", {"modules_to_save": ["self_attn"]}, r"\.2\..*v_proj", f"{SAVED} model.layers.2.self_attn.v_proj,"),
    "tokens": ("llama", {"trainable_token_indices": [3]}, "token_adapter", f"{TOKENS} model.embed_tokens,"),
    "the head's tokens": ("llama", {"trainable_token_indices": BY_MODULE}, "lm_head.token_adapter", f"{TOKENS} lm_head,"),
    "experts one by one": (
        "qwen3_moe",
        MOE,
        r"\.[4-7]\.mlp",
        r"parameters names model.layers.5.mlp.experts.0.\S+ .* in layers 5,7 of",
    ),
    "stacked experts": ("gpt_oss", MOE, r"\.[4-7]\.mlp", r"target_parameters names model.layers.4.mlp.experts.\S+ .* in layers 4-7 of"),
    "experts of other names": (
        "mixtral",
        MOE,
        r"\.7\.mlp",
        r"parameters names .*.7.block_sparse_moe.experts.0.\S+ .* in layers 7 of",
    ),
    "half of the experts": ("mixtral", MOE, r"\.7\.mlp.experts.base_layer", "model.layers.7.mlp.experts: no module of"),
    "a parameter": ("llama", {"target_parameters": ["up_proj.weight"]}, r"\.5.*up", "target_parameters names model.layers.5.mlp.up_proj,"),
    "a parameter of another name": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]},
        r"\.5\.mlp",
        "target_parameters names model.layers.5.block_sparse_moe.gate,",
    ),
    "a bias of LoRA": ("gpt2", {"lora_bias": True}, r"\.3\..*c_fc.*bias", "h.3.mlp.c_fc has no bias of its own, and lora_bias is set"),
    "a bias": ("gpt2", {"bias": "all"}, r"\.3\.ln_1.bias", "bias names transformer.h.3.ln_1.bias,"),
}


@pytest.mark.parametrize(("family", "options", "gone", "says"), LACKING.values(), ids=LACKING)
def test_what_the_config_names_and_the_file_lacks(refusal, tmp_path, family, options, gone, says):
    folder, adapter = make(tmp_path, family, **{"target_modules": GPT2 if family == "gpt2" else TWO, **options})
    merge_adapter(open_checkpoint(folder), adapter)
    count = []
    edit_tensors(adapter, lambda tensors: count.extend(tensors.pop(key) for key in list(tensors) if re.search(gone, key)))
    assert count
    assert re.search(says, said := refusal(open_checkpoint(folder), adapter)), said


@pytest.mark.parametrize("beginning", ["model.layers.8", "model.visual.blocks.0"])
def test_layers_for_more_tokens_and_other_towers_are_not_asked_for(llama, tmp_path, beginning):
    """The layers behind the last predict further tokens in training; transformers loads none of them."""
    folder = shutil.copytree(llama[0], tmp_path / "more")
    extra = f"{beginning}.self_attn.q_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({extra: torch.ones(32, 32)}), "model.safetensors")
    base = open_checkpoint(folder)
    assert merge_adapter(base, llama[1]).tensors[extra] is base.tensors[extra]


def without_beginning(tensors):
    for key in list(tensors):
        tensors[key.removeprefix("transformer.")] = tensors.pop(key)


@pytest.mark.parametrize("targets", [GPT2, r"transformer\.h\.\d\.(attn|mlp)\.c_\w+"], ids=["names", "pattern"])
def test_files_that_lack_the_models_prefix_are_checked_too(refusal, tmp_path, targets):
    folder, adapter = make(tmp_path, "gpt2", target_modules=targets)
    edit_tensors(folder, without_beginning, "model.safetensors")
    merge_adapter(open_checkpoint(folder), adapter)
    edit_tensors(adapter, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".3.attn.c_attn" in key])
    assert "target_modules names h.3.attn.c_attn, but the adapter has nothing for it" in refusal(open_checkpoint(folder), adapter)


TARGETS = {
    "names": {"target_modules": ["q_proj", "c_attn", "gate"]},
    "a longer name": {"target_modules": ["self_attn.q_proj", "1.attn.c_attn", "layers.2.mlp.gate"]},
    "part of a name": {"target_modules": ["proj", "attn", "head"]},
    "a pattern": {"target_modules": r".*\.(q_proj|c_fc)"},
    "a pattern that is no whole name": {"target_modules": "q_proj|lm_head"},
    "some layers": {"target_modules": ["q_proj", "c_fc", "gate_proj"], "layers_to_transform": [0, 2]},
    "one layer": {"target_modules": ["q_proj", "c_fc"], "layers_to_transform": 3},
    "no layers, which means all": {"target_modules": ["q_proj", "c_fc"], "layers_to_transform": []},
    "a whole name beside some layers": {"target_modules": ["q_proj", "lm_head", "model.layers.5.mlp.up_proj"], "layers_to_transform": [0]},
    "layers of a name": {"target_modules": ["q_proj", "c_fc"], "layers_to_transform": [1], "layers_pattern": "h"},
    "layers of several": {"target_modules": ["q_proj", "c_fc"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    "layers of no such name": {"target_modules": ["q_proj", "c_fc"], "layers_to_transform": [1], "layers_pattern": "blocks"},
    "without some": {"target_modules": ["q_proj", "c_fc"], "exclude_modules": ["layers.1.self_attn.q_proj", "h.0.mlp.c_fc"]},
    "without a pattern": {"target_modules": ["q_proj", "c_fc"], "exclude_modules": r".*\.[0-3]\..*"},
    "without what is saved": {"target_modules": ["q_proj", "up_proj", "c_fc"], "modules_to_save": ["mlp", "layers.1.self_attn"]},
    "saved by an end": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["proj", "head"]},
}


@pytest.mark.parametrize("options", TARGETS.values(), ids=TARGETS)
def test_what_is_targeted_is_what_peft_targets(options):
    modules = [name for family in ("llama", "gpt2", "mixtral") for name, _ in tiny_model(family).named_modules() if name]
    config, stock = AdapterConfig("", options), peft.LoraConfig(**options)
    assert [name for name in modules if config.targets(name)] == [name for name in modules if check_target_module_exists(stock, name)]
