"""What cannot be merged rightly is refused, in one line that names it."""

import json
import re
import shutil
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_adapters import EXPERTS, TWO, as_bytes, edit, edit_tensors, make  # noqa: E402

from downcycle import DowncycleError, open_checkpoint, write  # noqa: E402
from downcycle.surgery.adapter.merge import merge_adapter  # noqa: E402

KEY = "base_model.model.model.layers.3.self_attn.q_proj.lora_{}.weight"
CONFIGS = {
    "another kind": ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
    "no kind": ({"peft_type": "gone"}, "peft_type is 'None'"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changed the base"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "'loftq', which changed the base"),
    "layers that repeat": ({"layer_replication": [[0, 8], [4, 8]]}, "layer_replication is set.*--layers"),
    "activated LoRA": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
    "Megatron": ({"megatron_config": {"x": 1}}, "megatron_config is set"),
    "a field of the future": ({"use_new_lora": True}, "use_new_lora is set, which is not known here"),
    "a rank that is text": ({"r": "4"}, "r is '4' and should be a whole number"),
    "a rank of nothing": ({"r": 0}, "r is '0'"),
    "two faults": ({"lora_alpha": float("nan"), "target_modules": 5}, "lora_alpha is 'nan' .*; target_modules is '5'"),
    "a pattern that is none": ({"rank_pattern": {"(": 4}}, "rank_pattern is"),
    "names that are no patterns": ({"modules_to_save": ["("]}, r"modules_to_save is .* should be a list of names"),
    "layers' names that are no patterns": ({"layers_pattern": ["("], "layers_to_transform": [1]}, "layers_pattern is"),
    "a pattern only within another": ({"target_modules": ")("}, r"target_modules is '\)\('"),
    "another such": ({"exclude_modules": "x)|(.*"}, "exclude_modules is"),
    "another such for ranks": ({"rank_pattern": {"x)|(.*": 4}}, "rank_pattern is"),
    "more than a float holds": ({"lora_alpha": 10**400}, "lora_alpha is '1000.*' and should be a number"),
    "a rank that no matrix has": ({"r": 10**400}, "r is '1000.*' and should be a whole number"),
    "a word that is not false": ({"use_rslora": "false"}, "use_rslora is 'false' and should be true or false"),
    "a number that is not true": ({"lora_bias": 1}, "lora_bias is '1' and should be true or false"),
    "biases that nobody knows": ({"bias": "some"}, "bias is 'some' and should be none, all or lora_only"),
    "a base that is a number": ({"base_model_name_or_path": 5}, "base_model_name_or_path is '5' and should be a name or a folder"),
    "another rank": ({"r": 8}, r"layers.0.mlp.down_proj has factors of rank 4 and 4; .*adapter_config.json says 8"),
    "another rank by pattern": ({"rank_pattern": {"layers.3.self_attn.q_proj": 5}}, "layers.3.self_attn.q_proj has factors of rank 4"),
    "DoRA without magnitudes": ({"use_dora": True}, "has no DoRA magnitude, and use_dora is set"),
    "a target without tensors": ({"target_modules": [*TWO, "k_proj"]}, "names .*k_proj, but the adapter has nothing for it; there are 8"),
}
NEW = "base_model.model."
TOKENS = f"{NEW}model.embed_tokens.token_adapter.trainable_tokens_delta"
OTHERS = [KEY.format(half).replace(".3.", f".{layer}.") for layer in (8, 9, 11) for half in "AB"]


def put(key, *shape, dtype=torch.float32, fill=0):
    return lambda tensors: tensors.update({key: torch.full(shape, fill, dtype=dtype)})


TENSORS = {
    "half a pair": (lambda t: t.pop(KEY.format("B")), "layers.3.self_attn.q_proj: lora_B.weight is missing"),
    "the other half": (lambda t: t.pop(KEY.format("A")), "lora_A.weight is missing"),
    "a module that the base lacks": (
        lambda t: [t.update({KEY.format(half).replace("q_", "x_"): t[KEY.format(half)].clone()}) for half in "AB"],
        "layers.3.self_attn.x_proj: no module of .*base is called so, or several are; the adapter",
    ),
    "layers that the base lacks": (
        lambda t: t.update({key: torch.zeros(4, 32) for key in OTHERS}),
        r"has layers 8-9,11, and .*base has 8 \(0-7\); it was trained on another model",
    ),
    "layers that are not there": (
        lambda t: [t.pop(key) for key in list(t) if ".6." in key or ".7." in key],
        "has nothing for it; there are 4 such modules in layers 6-7 of .*trained on another model",
    ),
    "no number": (lambda t: t[KEY.format("A")].fill_(torch.nan), "layers.3.self_attn.q_proj.lora_A.weight holds numbers that are not fin"),
    "infinity": (lambda t: t[KEY.format("B")][0].fill_(-torch.inf), "lora_B.weight holds numbers that are not finite"),
    "too wide": (put(KEY.format("A"), 4, 33), r"q_proj is for \[32, 33\], and .*base has \[32, 32\]"),
    "too flat": (put(KEY.format("A"), 128), "q_proj adapts a convolution"),
    "another rank": (put(KEY.format("A"), 5, 32), "q_proj has factors of rank 5 and 4"),
    "whole numbers": (put(KEY.format("A"), 4, 32, dtype=torch.int8), "q_proj.lora_A.weight is I8"),
    "a name that peft does not give": (put("model.x.lora_A.weight", 4, 4), "holds the tensor 'model.x.lora_A.weight'"),
    "a part that nobody knows": (put(KEY.format("E"), 4, 4), "holds the tensor .*lora_E.weight"),
    "a saved tensor that the base lacks": (put(f"{NEW}score.weight", 2, 32), "score.weight: no tensor of .*base is called so"),
    "more tokens": (
        put(f"{NEW}lm_head.weight", 98, 32),
        "lm_head.weight has 98 rows, and 96 in .*base: the vocabulary grew in training; give the base as many first",
    ),
    "a saved tensor of another shape": (put(f"{NEW}model.norm.weight", 31), r"model.norm.weight is for \[31\], and .*base has \[32\]"),
    "a magnitude": (
        put(KEY.format("magnitude_vector").removesuffix(".weight"), 32, fill=1),
        "has a DoRA magnitude, and use_dora is",
    ),
    "a bias": (put(KEY.format("B").replace("weight", "bias"), 32, fill=1), "q_proj has a bias of its own, and lora_bias is not set"),
    "tokens that the config does not name": (
        put(TOKENS, 2, 32),
        "model.embed_tokens has trained tokens, and trainable_token_indices names n",
    ),
    "no tokens": (put(TOKENS, 0, 32), "model.embed_tokens has trained tokens, and trainable_token_indices names none"),
    "nothing": (lambda t: t.clear(), "holds no tensors"),
}


@pytest.mark.parametrize(("changes", "says"), CONFIGS.values(), ids=CONFIGS)
def test_configs_that_cannot_be_merged(refusal, base, adapter, changes, says):
    edit(adapter, **changes)
    assert re.search(says, said := refusal(base, adapter)), said


@pytest.mark.parametrize(("change", "says"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_cannot_be_merged(refusal, base, adapter, change, says):
    edit_tensors(adapter, change)
    assert re.search(says, said := refusal(base, adapter)), said


def test_folders_that_are_no_adapter(refusal, base, adapter, llama, tmp_path):
    assert "no such folder" in refusal(base, tmp_path / "nowhere")
    assert "no adapter, as it holds no adapter_config.json" in refusal(base, llama[0])
    shutil.copytree(adapter, tmp_path / "run" / "checkpoint-9")
    shutil.copytree(adapter, tmp_path / "run" / "checkpoint-10")
    assert f"did you mean {tmp_path}/run/checkpoint-10?" in refusal(base, tmp_path / "run")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", ')
    assert "not valid JSON" in refusal(base, adapter)


def test_pickled_weights_are_refused_with_a_way_that_works(refusal, base, adapter):
    expected = as_bytes(merge_adapter(base, adapter))
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    assert "holds no adapter_model.safetensors" in refusal(base, adapter)
    torch.save(tensors, adapter / "adapter_model.bin")
    said = refusal(base, adapter)
    program = said.split('python -c "')[1].removesuffix('"')
    subprocess.run([sys.executable, "-c", program], cwd=adapter, check=True)
    assert as_bytes(merge_adapter(base, adapter)) == expected


def test_a_damaged_adapter_file(refusal, base, adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "is truncated" in refusal(base, adapter)


@pytest.mark.parametrize("place", ["config", "text_config"])
def test_a_quantised_base(refusal, llama, tmp_path, place):
    folder = shutil.copytree(llama[0], tmp_path / "q")
    config = json.loads((folder / "config.json").read_text())
    (config if place == "config" else config.setdefault(place, {}))["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "packed by gptq; merge into the unquantised model" in refusal(open_checkpoint(folder), llama[1])


def test_a_weight_in_a_packed_dtype(refusal, llama, tmp_path):
    folder = shutil.copytree(llama[0], tmp_path / "f8")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"] = tensors["model.layers.3.mlp.down_proj.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    assert "down_proj.weight is F8_E4M3 in" in refusal(open_checkpoint(folder), llama[1])


def test_numbers_that_leave_float16(tmp_path):
    folder, adapter = make(tmp_path, "llama", torch.float16, target_modules=TWO)
    edit(adapter, lora_alpha=10**7)
    with pytest.raises(DowncycleError, match=r"_proj.weight: not all of its numbers are finite in F16"):
        write(merge_adapter(open_checkpoint(folder), adapter), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["BF16", "F32"])
@pytest.mark.parametrize("what", ["scale", "factors"])
def test_sums_that_are_not_finite(tmp_path, dtype, what):
    """Each number of the adapter is finite; only the weights that come of it are not."""
    folder, adapter = make(tmp_path, "llama", dtype, target_modules=TWO)
    if what == "scale":
        edit(adapter, lora_alpha=1e60)
    else:
        edit_tensors(adapter, lambda tensors: [tensor.fill_(3e20) for key, tensor in tensors.items() if ".3." in key])
    with pytest.raises(DowncycleError, match=r"_proj.weight: not all of its numbers are finite in B?F"):
        write(merge_adapter(open_checkpoint(folder), adapter), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_that_an_untied_base_lacks(refusal, tmp_path):
    folder, adapter = make(tmp_path, "llama", target_modules=TWO, modules_to_save=["lm_head"])
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"), "model.safetensors")
    assert "lm_head.weight: no tensor of" in refusal(open_checkpoint(folder), adapter)


def test_experts_stored_in_a_way_of_their_own(refusal, tmp_path):
    folder, adapter = make(tmp_path, "mixtral", target_modules=["q_proj"], target_parameters=EXPERTS)
    tensors = load_file(folder / "model.safetensors")
    save_file({name.replace(".w1.", ".v1."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert "mlp.experts.gate_up_proj: " in (said := refusal(open_checkpoint(folder), adapter))
    assert "stores its experts in a way that is not known here" in said


def test_the_result_is_not_written_over_its_inputs(base, adapter):
    for out, says in (
        (adapter, "holds no checkpoint"),
        (adapter / "merged", "lies in the source"),
        (adapter.parent, "holds no checkpoint"),
    ):
        with pytest.raises(DowncycleError, match=says):
            write(merge_adapter(base, adapter), out, overwrite=True)


TIED = {
    "a head": {"target_modules": ["c_fc", "lm_head"]},
    "an embedding": {"target_modules": ["c_fc", "wte"]},
    "a saved embedding": {"target_modules": ["c_fc"], "modules_to_save": ["wte"]},
    "the head's own tokens": {"target_modules": ["c_fc"], "trainable_token_indices": {"wte": [1], "lm_head": [2]}},
    "both saved, and not alike": {"target_modules": ["c_fc"], "modules_to_save": ["wte", "lm_head"]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", TIED.values(), ids=TIED)
def test_one_of_two_tied_tensors_is_not_changed_alone(refusal, tmp_path, options):
    folder, adapter = make(tmp_path, "gpt2", **options)
    assert "ties its head to its embedding, and the adapter trained them apart" in refusal(open_checkpoint(folder), adapter)
