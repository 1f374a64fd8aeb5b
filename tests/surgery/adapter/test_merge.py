"""Merging an adapter gives what peft's own merge gives in float64, rounded once."""

import json
import shutil
from dataclasses import fields, replace

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_adapters import EXPERTS, GPT2, TWO, as_bytes, base_model, edit, edit_tensors, is_nearest, loaded, make  # noqa: E402

from downcycle import DowncycleError, open_checkpoint, plan_write, verify, write  # noqa: E402
from downcycle.surgery.adapter import lowrank  # noqa: E402
from downcycle.surgery.adapter.config import HARMLESS, UNLIKE_LORA  # noqa: E402
from downcycle.surgery.adapter.merge import merge_adapter  # noqa: E402
from downcycle.surgery.checkpoint import Span  # noqa: E402

PATTERNS = {"rank_pattern": {"layers.1.self_attn.q_proj": 2, r"^model\.layers\.2.*up_proj": 3}, "alpha_pattern": {"down_proj": 3}}
CASES = {
    "two kinds of modules": ("llama", {"target_modules": TWO}),
    "a pattern of modules": ("llama", {"target_modules": r".*layers\.[0-3]\..*_proj"}),
    "some layers": ("llama", {"target_modules": TWO, "layers_to_transform": [1, 3]}),
    "rsLoRA, patterns": ("llama", {"target_modules": "all-linear", "lora_alpha": 7, "use_rslora": True, **PATTERNS}),
    "DoRA": ("llama", {"target_modules": TWO, "use_dora": True, "use_rslora": True}),
    "embeddings and head": ("llama", {"target_modules": [*TWO, "embed_tokens", "lm_head"]}),
    "DoRA of embeddings": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "modules to save": ("llama", {"target_modules": TWO, "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "tokens": ("llama", {"target_modules": TWO, "trainable_token_indices": [3, 95, 5]}),
    "tokens by module": ("llama", {"target_modules": TWO, "trainable_token_indices": {"embed_tokens": [0], "lm_head": [1, 2]}}),
    "tokens of tied embeddings": ("gpt2", {"target_modules": ["c_fc"], "trainable_token_indices": [7, 1]}),
    "Qwen 2": ("qwen2", {"target_modules": ["k_proj", "v_proj"], "lora_alpha": 16, "bias": "all"}),
    "Conv1D, their biases": ("gpt2", {"target_modules": GPT2, "fan_in_fan_out": True, "lora_bias": True}),
    "Conv1D, DoRA": ("gpt2", {"target_modules": GPT2, "use_dora": True}),
    "all biases": ("gpt2", {"target_modules": GPT2, "bias": "all"}),
    "some biases": ("gpt2", {"target_modules": GPT2, "bias": "lora_only"}),
    "experts in files of their own names": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts' second matrices": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]}),
    "experts as targeted of old": ("mixtral", {"target_modules": ["q_proj", "gate", "w1", "w2", "w3"], "rank_pattern": {"gate.weight": 2}}),
    "experts one by one": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "rank_pattern": {"down_proj": 2}}),
    "stacked experts": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts that are not targeted": ("qwen3_moe", {"target_modules": TWO}),
    "all but some by name": ("llama", {"target_modules": TWO, "exclude_modules": ["layers.1.self_attn.q_proj", "layers.2.mlp.down_proj"]}),
    "all but some by pattern": ("llama", {"target_modules": TWO, "exclude_modules": r".*layers\.[02]\..*down_proj"}),
    "layers of a pattern": ("llama", {"target_modules": TWO, "layers_to_transform": [1, 3], "layers_pattern": "layers"}),
    "a whole name beside some layers": ("llama", {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0, 2]}),
    "a parameter": ("llama", {"target_modules": ["q_proj"], "target_parameters": ["mlp.down_proj.weight"]}),
    "whole blocks": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "an adapter of the base's dtype": ("llama", {"target_modules": TWO, "autocast_adapter_dtype": False}),
    "tied, embedding saved": ("llama, tied", {"target_modules": TWO, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied, both saved": (
        "llama, tied",
        {"target_modules": TWO, "modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "tied, tokens": ("llama, tied", {"target_modules": TWO, "trainable_token_indices": [3, 7]}),
    "tied, tokens of both": (
        "llama, tied",
        {"target_modules": TWO, "trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [3, 7]}, "ensure_weight_tying": True},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["F32", "BF16"])
@pytest.mark.parametrize(("family", "options"), CASES.values(), ids=CASES)
def test_a_merge_is_what_peft_computes_in_float64_rounded_once(tmp_path, family, options, dtype):
    folder, adapter = make(tmp_path, family, dtype, **options)
    before = open_checkpoint(folder)
    expected = stock_merge(folder, adapter, family)
    write(merge_adapter(before, adapter), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys() == before.tensors.keys()
    slack = 1e-6 if dtype == torch.bfloat16 and not options.get("use_dora") else 1e-14  # what the sums are carried in
    assert [name for name in found if not is_nearest(found[name], expected[name], slack)] == []
    assert any(not torch.equal(found[name], tensor) for name, tensor in loaded(before).items())
    assert verify(tmp_path / "out").what == f"{folder} with {adapter} merged into it"


def stock_merge(folder, adapter, family):
    """Return what peft merges in float64."""
    model = type(base_model(family)).from_pretrained(folder, dtype=torch.float64)
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder.parent / "stock")
    return load_file(folder.parent / "stock" / "model.safetensors")


def exact(weight, a, b, scale):
    """W + s BA in float64, by numpy."""
    return weight.double().numpy() + scale * (b.double().numpy() @ a.double().numpy())


@pytest.mark.parametrize("rank", [4, 160])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_are_rounded_once(tmp_path, dtype, rank):
    folder, adapter = make(tmp_path, "llama", dtype, target_modules=TWO, r=rank, lora_alpha=3)
    before, after = load_file(folder / "model.safetensors"), loaded(merge_adapter(open_checkpoint(folder), adapter))
    factors = load_file(adapter / "adapter_model.safetensors")
    for name, weight in before.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" not in factors:
            assert torch.equal(after[name], weight)
            continue
        wanted = torch.from_numpy(exact(weight, factors[f"{stem}.lora_A.weight"], factors[f"{stem}.lora_B.weight"], 3 / rank))
        slack = 1e-14 if dtype in (torch.float32, torch.float64) else 1e-6  # what the sums are carried in
        assert is_nearest(after[name], wanted, slack)
        assert not torch.equal(after[name], weight)


def test_rounding_is_to_nearest_even_from_float64_on():
    """Numbers on both sides of the middle of two bfloat16, nearer to it than float32 can tell."""
    middle = 1 + 2**-8
    values = [middle, middle + 2**-40, middle - 2**-40, middle + 2**-7, middle + 2**-7 - 2**-40, -middle - 2**-40, 0.0]
    rounded = torch.frombuffer(
        bytearray(lowrank._round(torch.tensor(values, dtype=torch.float64), "BF16", "x")), dtype=torch.bfloat16
    ).double()
    up = 1 + 2**-7
    assert rounded.tolist() == [1, up, 1, 1 + 2**-6, up, -up, 0]


def test_an_adapter_that_adds_nothing_changes_no_byte(base, adapter):
    edit_tensors(adapter, lambda tensors: [tensor.zero_() for key, tensor in tensors.items() if "lora_B" in key])
    assert as_bytes(merge_adapter(base, adapter)) == as_bytes(base)


def test_what_is_not_adapted_is_copied(base, llama):
    after = merge_adapter(base, llama[1])
    computed = {name for name, tensor in after.tensors.items() if not isinstance(tensor.data, Span)}
    assert computed == {f"model.layers.{layer}.{name}.weight" for layer in range(8) for name in ("self_attn.q_proj", "mlp.down_proj")}
    assert all(after.tensors[name] is tensor for name, tensor in base.tensors.items() if name not in computed)
    assert (after.config, after.files, list(after.tensors)) == (base.config, base.files, list(base.tensors))


def test_what_was_changed_did_not_learn_to_be_ternary(base, llama):
    trained = replace(base, config={**base.config, "downcycle_ternary": {"schedule": "linear", "strength": 1.0}})
    assert merge_adapter(trained, llama[1]).config == base.config


def test_memory_is_bounded_and_blocks_do_not_show(base, llama, monkeypatch):
    whole = as_bytes(merge_adapter(base, llama[1]))
    monkeypatch.setattr(lowrank, "BLOCK", 16 * 48)
    monkeypatch.setattr(lowrank, "ROWS", 16)
    after = merge_adapter(base, llama[1])
    chunks = [len(chunk) for tensor in after.tensors.values() if not isinstance(tensor.data, Span) for chunk in tensor.chunks()]
    assert max(chunks) <= 2 * 24 * 32
    assert len(chunks) == 8 * 2 * 2
    assert as_bytes(after) == whole


def test_torch_is_left_as_it_was(base, llama, tmp_path):
    before = torch.get_num_threads()
    write(merge_adapter(base, llama[1]), tmp_path / "out")
    assert torch.get_num_threads() == before


def test_an_old_config_that_leaves_out_what_is_new(base, adapter):
    whole = as_bytes(merge_adapter(base, adapter))
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "target_modules": TWO, "merge_weights": False, "enable_lora": None})
    )
    assert as_bytes(merge_adapter(base, adapter)) == whole


def test_every_field_of_pefts_config_is_known():
    assert {field.name for field in fields(peft.LoraConfig)} <= HARMLESS | UNLIKE_LORA.keys()


def test_files_that_lack_the_models_prefix(tmp_path):
    folder, adapter = make(tmp_path, "gpt2", target_modules=GPT2)
    whole = as_bytes(merge_adapter(open_checkpoint(folder), adapter))
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    found = as_bytes(merge_adapter(open_checkpoint(folder), adapter))
    assert found == {name.removeprefix("transformer."): tensor for name, tensor in whole.items()}


def test_an_end_that_two_towers_share_is_taken_for_neither(llama, tmp_path):
    folder = shutil.copytree(llama[0], tmp_path / "two")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {f"{tower}.{name}": tensor.clone() for name, tensor in tensors.items() for tower in ("one", "other")}, folder / "model.safetensors"
    )
    with pytest.raises(DowncycleError, match="_proj: no module of .*two is called so, or several are"):
        merge_adapter(open_checkpoint(folder), llama[1])


def test_a_computed_base_and_a_cut_that_was_never_written(base, llama, tmp_path):
    adapter = make(tmp_path, "llama", torch.bfloat16, target_modules=TWO)[1]
    twice = merge_adapter(merge_adapter(base, llama[1]), adapter)
    write(merge_adapter(base, llama[1]), tmp_path / "once")
    assert as_bytes(twice) == as_bytes(merge_adapter(open_checkpoint(tmp_path / "once"), adapter))


def test_the_plan_changes_with_the_adapter(base, adapter):
    digests = {plan_write(merge_adapter(base, adapter)).digest}
    edit(adapter, lora_alpha=9)
    digests.add(plan_write(merge_adapter(base, adapter)).digest)
    edit_tensors(adapter, lambda tensors: next(iter(tensors.values())).add_(1))
    digests.add(plan_write(merge_adapter(base, adapter)).digest)
    assert len(digests) == 3


def test_both_of_two_tied_tensors_get_the_new_rows(tmp_path):
    """Some files hold the head too, though the config ties it; were it left as it was, transformers would load another model."""
    folder, adapter = make(tmp_path, "llama, tied", target_modules=TWO, trainable_token_indices=[3, 7])
    expected = stock_merge(folder, adapter, "llama, tied")["model.embed_tokens.weight"].float()
    name = "model.embed_tokens.weight"
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[name].clone()}), "model.safetensors")
    out = write(merge_adapter(open_checkpoint(folder), adapter), tmp_path / "out")
    found = load_file(out / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], expected) and torch.equal(found[name], expected)
    model = type(base_model("llama, tied")).from_pretrained(out)
    assert torch.equal(model.lm_head.weight, expected) and torch.equal(model.model.embed_tokens.weight, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_saved_tensors_of_another_dtype_are_rounded_once(tmp_path, dtype):
    folder, adapter = make(tmp_path, "llama", dtype, target_modules=TWO, modules_to_save=["lm_head"])
    wanted = torch.randn(96, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    edit_tensors(adapter, lambda tensors: tensors.update({"base_model.model.lm_head.weight": wanted}))
    assert is_nearest(loaded(merge_adapter(open_checkpoint(folder), adapter))["lm_head.weight"], wanted, 1e-14)


def test_what_a_config_leaves_out_is_pefts_default(tmp_path):
    folder, adapter = make(tmp_path, "llama", target_modules=TWO, r=8, lora_alpha=8)
    whole = as_bytes(merge_adapter(open_checkpoint(folder), adapter))
    edit(adapter, r="gone", lora_alpha="gone")
    assert as_bytes(merge_adapter(open_checkpoint(folder), adapter)) == whole


def test_square_weights_of_a_model_with_its_own_code(tmp_path):
    """fan_in_fan_out says that they are stored [in, out], where no known family does."""
    folder, adapter = make(tmp_path, "gpt2", target_modules=["attn.c_proj"], fan_in_fan_out=True)
    whole = as_bytes(merge_adapter(open_checkpoint(folder), adapter))
    edit(folder, "config.json", model_type="of_its_own", auto_map={"AutoModelForCausalLM": "modeling.Own"})
    assert as_bytes(merge_adapter(open_checkpoint(folder, trust_remote_code=True), adapter)) == whole


@pytest.mark.parametrize("infix", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_names_of_modules_that_were_wrapped_in_training(base, adapter, infix):
    whole = as_bytes(merge_adapter(base, adapter))

    def wrap(tensors):
        for key in list(tensors):
            begin, end = key.split("layers.")
            tensors[f"{begin}layers.{end.replace('.', f'.{infix}', 1)}"] = tensors.pop(key)

    edit_tensors(adapter, wrap)
    assert as_bytes(merge_adapter(base, adapter)) == whole


def test_an_embedding_saved_for_both_as_the_config_says(tmp_path):
    folder, adapter = make(tmp_path, "llama, tied", target_modules=TWO, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    whole = as_bytes(merge_adapter(open_checkpoint(folder), adapter))
    edit_tensors(adapter, lambda tensors: tensors.pop("base_model.model.lm_head.weight"))
    assert as_bytes(merge_adapter(open_checkpoint(folder), adapter)) == whole


def test_tied_tensors_saved_alike(tmp_path):
    folder, adapter = make(tmp_path, "gpt2", target_modules=["c_fc"], modules_to_save=["wte", "lm_head"])
    wte, head = "base_model.model.transformer.wte.weight", "base_model.model.lm_head.weight"
    edit_tensors(adapter, lambda tensors: tensors.update({head: tensors[wte].clone()}))
    after = merge_adapter(open_checkpoint(folder), adapter)
    assert "lm_head.weight" not in after.tensors
    assert torch.equal(loaded(after)["transformer.wte.weight"], load_file(adapter / "adapter_model.safetensors")[wte])
