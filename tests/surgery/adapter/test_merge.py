"""Merging an adapter gives what peft's own merge gives in float64, rounded once; and what cannot be merged rightly is refused by name."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from huggingface_hub import constants  # noqa: E402
from huggingface_hub.utils import close_session  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from downcycle import DowncycleError, keep_layers, open_checkpoint, plan_write, verify, write  # noqa: E402
from downcycle.surgery.adapter import lowrank  # noqa: E402
from downcycle.surgery.adapter.config import HARMLESS, UNLIKE_LORA  # noqa: E402
from downcycle.surgery.adapter.merge import merge_adapter  # noqa: E402
from downcycle.surgery.checkpoint import Span  # noqa: E402

from hub_server import HubServer  # noqa: E402
from tiny_models import tiny_model  # noqa: E402

TWO = ["q_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
GPT2 = ["c_attn", "c_proj", "c_fc"]
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
}


def train(model, **options):
    """Return a peft model whose every trainable number was moved."""
    model = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **options}))
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.05)
    return model


def as_bytes(checkpoint):
    return {name: (tensor.dtype, tensor.shape, b"".join(tensor.chunks())) for name, tensor in checkpoint.tensors.items()}


def loaded(checkpoint):
    return {name: lowrank.to_torch(tensor) for name, tensor in checkpoint.tensors.items()}


def make(folder, family, dtype=torch.float32, **options):
    """Write a base and an adapter trained on it; return both folders."""
    model = tiny_model(family).to(dtype)
    model.save_pretrained(folder / "base")
    train(model, **options).save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A bf16 Llama of 8 layers and a LoRA of two kinds of modules."""
    return make(tmp_path_factory.mktemp("llama"), "llama", torch.bfloat16, target_modules=TWO)


@pytest.fixture
def base(llama):
    return open_checkpoint(llama[0])


@pytest.fixture
def adapter(llama, tmp_path):
    """A copy of that adapter, to be spoilt."""
    return shutil.copytree(llama[1], tmp_path / "adapter")


def edit(adapter, **changes):
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))


def edit_tensors(adapter, change):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("family", "options"), CASES.values(), ids=CASES)
def test_a_merge_is_what_peft_computes_in_float64_rounded_once(tmp_path, family, options):
    folder, adapter = make(tmp_path, family, **options)
    stock = type(tiny_model(family)).from_pretrained(folder, dtype=torch.float64)
    peft.PeftModel.from_pretrained(stock, adapter).merge_and_unload().float().save_pretrained(tmp_path / "stock")
    expected = load_file(tmp_path / "stock" / "model.safetensors")
    before = open_checkpoint(folder)
    write(merge_adapter(before, adapter), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys() == before.tensors.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name].to(found[name].dtype))] == []
    assert any(not torch.equal(found[name], tensor) for name, tensor in loaded(before).items())
    assert verify(tmp_path / "out").what == f"{folder} with {adapter} merged into it"


def exact(weight, a, b, scale):
    """W + s BA in float64, by numpy."""
    return weight.double().numpy() + scale * (b.double().numpy() @ a.double().numpy())


@pytest.mark.parametrize("rank", [4, 160])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_are_rounded_once(tmp_path, dtype, rank):
    folder, adapter = make(tmp_path, "llama", dtype, target_modules=TWO, r=rank, lora_alpha=3)
    before, after, factors = load_file(folder / "model.safetensors"), loaded(merge_adapter(open_checkpoint(folder), adapter)), {}
    factors = load_file(adapter / "adapter_model.safetensors")
    for name, weight in before.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" not in factors:
            assert torch.equal(after[name], weight)
            continue
        wanted = torch.from_numpy(exact(weight, factors[f"{stem}.lora_A.weight"], factors[f"{stem}.lora_B.weight"], 3 / rank))
        below, above = (torch.nextafter(after[name], torch.tensor(end, dtype=dtype)).double() for end in (-torch.inf, torch.inf))
        got = after[name].double()
        slack = 1e-14 if dtype in (torch.float32, torch.float64) else 1e-6  # what the sums are carried in
        assert bool(((wanted >= (got + below) / 2 - slack) & (wanted <= (got + above) / 2 + slack)).all())
        assert not torch.equal(after[name], weight)


def test_rounding_is_to_nearest_even_from_float64_on():
    """Numbers on both sides of the middle of two bfloat16, nearer to it than float32 can tell."""
    middle = 1 + 2**-8
    values = [middle, middle + 2**-40, middle - 2**-40, middle + 2**-7, middle + 2**-7 - 2**-40, -middle - 2**-40, 0.0]
    rounded = torch.frombuffer(lowrank._round(torch.tensor(values, dtype=torch.float64), "BF16", "x"), dtype=torch.bfloat16).double()
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
    "another rank": ({"r": 8}, r"layers.0.mlp.down_proj has factors of rank 4 and 4; .*adapter_config.json says 8"),
    "another rank by pattern": ({"rank_pattern": {"layers.3.self_attn.q_proj": 5}}, "layers.3.self_attn.q_proj has factors of rank 4"),
    "DoRA without magnitudes": ({"use_dora": True}, "has no DoRA magnitude though use_dora is set"),
    "a target without tensors": ({"target_modules": [*TWO, "k_proj"]}, "names .*k_proj, but the adapter has nothing for it; there are 8"),
}
NEW = "base_model.model."
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
    "a magnitude": (put(KEY.format("magnitude_vector").removesuffix(".weight"), 32, fill=1), "or one though it is not"),
    "a bias": (put(KEY.format("B").replace("weight", "bias"), 32, fill=1), "q_proj has a bias in its adapter"),
    "nothing": (lambda t: t.clear(), "holds no tensors"),
}


def refusal(base, adapter):
    """Return the one line in which a merge is refused."""
    with pytest.raises(DowncycleError) as raised:
        merge_adapter(base, adapter)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(("changes", "says"), CONFIGS.values(), ids=CONFIGS)
def test_configs_that_cannot_be_merged(base, adapter, changes, says):
    edit(adapter, **changes)
    assert re.search(says, said := refusal(base, adapter)), said


@pytest.mark.parametrize(("change", "says"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_cannot_be_merged(base, adapter, change, says):
    edit_tensors(adapter, change)
    assert re.search(says, said := refusal(base, adapter)), said


def test_folders_that_are_no_adapter(base, adapter, llama, tmp_path):
    assert "no such folder" in refusal(base, tmp_path / "nowhere")
    assert "no adapter, as it holds no adapter_config.json" in refusal(base, llama[0])
    shutil.copytree(adapter, tmp_path / "run" / "checkpoint-9")
    assert f"did you mean {tmp_path}/run/checkpoint-9?" in refusal(base, tmp_path / "run")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", ')
    assert "not valid JSON" in refusal(base, adapter)


def test_pickled_weights_are_refused_with_a_way_that_works(base, adapter):
    expected = as_bytes(merge_adapter(base, adapter))
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    assert "holds no adapter_model.safetensors" in refusal(base, adapter)
    torch.save(tensors, adapter / "adapter_model.bin")
    said = refusal(base, adapter)
    program = said.split('python -c "')[1].removesuffix('"')
    subprocess.run([sys.executable, "-c", program], cwd=adapter, check=True)
    assert as_bytes(merge_adapter(base, adapter)) == expected


def test_a_damaged_adapter_file(base, adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "is truncated" in refusal(base, adapter)


@pytest.mark.parametrize("place", ["config", "text_config"])
def test_a_quantised_base(llama, tmp_path, place):
    folder = shutil.copytree(llama[0], tmp_path / "q")
    config = json.loads((folder / "config.json").read_text())
    (config if place == "config" else config.setdefault(place, {}))["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "quantised (gptq); merge into the unquantised model" in refusal(open_checkpoint(folder), llama[1])


def test_a_weight_in_a_packed_dtype(llama, tmp_path):
    folder = shutil.copytree(llama[0], tmp_path / "f8")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"] = tensors["model.layers.3.mlp.down_proj.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    assert "down_proj.weight is F8_E4M3 in" in refusal(open_checkpoint(folder), llama[1])


def test_numbers_that_leave_float16(tmp_path):
    folder, adapter = make(tmp_path, "llama", torch.float16, target_modules=TWO)
    edit(adapter, lora_alpha=10**7)
    with pytest.raises(DowncycleError, match=r"_proj.weight: not all of its merged numbers are finite in F16"):
        write(merge_adapter(open_checkpoint(folder), adapter), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_stored_in_a_way_of_their_own(tmp_path):
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


def test_a_base_and_an_adapter_of_the_hub(llama, tmp_path, monkeypatch):
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name, folder in (("ann/base", llama[0]), ("ann/lora", llama[1])):
            server.add(name, folder)
        write(merge_adapter(open_checkpoint("ann/base"), "ann/lora"), tmp_path / "out")
        proof = verify(tmp_path / "out")
    close_session()
    assert proof.what == "ann/base with ann/lora merged into it"
    assert as_bytes(open_checkpoint(tmp_path / "out")) == as_bytes(merge_adapter(open_checkpoint(llama[0]), llama[1]))


TIED = {
    "a head": {"target_modules": ["c_fc", "lm_head"]},
    "an embedding": {"target_modules": ["c_fc", "wte"]},
    "a saved embedding": {"target_modules": ["c_fc"], "modules_to_save": ["wte"]},
    "both saved, and not alike": {"target_modules": ["c_fc"], "modules_to_save": ["wte", "lm_head"]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", TIED.values(), ids=TIED)
def test_one_of_two_tied_tensors_is_not_changed_alone(tmp_path, options):
    folder, adapter = make(tmp_path, "gpt2", **options)
    assert "ties its head to its embedding, and the adapter trained them apart" in refusal(open_checkpoint(folder), adapter)


def test_tied_tensors_saved_alike(tmp_path):
    folder, adapter = make(tmp_path, "gpt2", target_modules=["c_fc"], modules_to_save=["wte", "lm_head"])
    wte, head = "base_model.model.transformer.wte.weight", "base_model.model.lm_head.weight"
    edit_tensors(adapter, lambda tensors: tensors.update({head: tensors[wte].clone()}))
    after = merge_adapter(open_checkpoint(folder), adapter)
    assert "lm_head.weight" not in after.tensors
    assert torch.equal(loaded(after)["transformer.wte.weight"], load_file(adapter / "adapter_model.safetensors")[wte])


def test_a_merge_is_proved_and_its_faults_are_found(llama, adapter, tmp_path):
    child = write(keep_layers(open_checkpoint(llama[0]), [*range(8)]), tmp_path / "child")
    write(merge_adapter(open_checkpoint(child), adapter), tmp_path / "out")
    lineage = json.loads((tmp_path / "out" / "downcycle.json").read_text())
    assert (lineage["operation"], lineage["parent"], lineage["adapter"]) == ("merge", str(child), str(adapter))
    assert lineage["parent_lineage"]["layers"] == [*range(8)]
    assert lineage["adapter_base"] == json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    proof = verify(tmp_path / "out")
    assert (proof.parent, proof.layers, proof.tensors) == (str(child), [], len(open_checkpoint(child).tensors))
    shutil.rmtree(child)
    assert verify(tmp_path / "out") == proof  # made again from its parent
    assert verify(tmp_path / "out", llama[0]) == proof
    adapter.rename(tmp_path / "moved")
    with pytest.raises(DowncycleError, match="adapter: no such folder.*give it with --adapter"):
        verify(tmp_path / "out")
    assert verify(tmp_path / "out", adapter=tmp_path / "moved").tensors == proof.tensors
    edit_tensors(tmp_path / "moved", lambda tensors: tensors[KEY.format("B")].add_(1))
    with pytest.raises(DowncycleError, match=r"tensor model.layers.3.self_attn.q_proj.weight differs .*Merge it again"):
        verify(tmp_path / "out", adapter=tmp_path / "moved")
    edit(tmp_path / "moved", lora_alpha=9)
    with pytest.raises(DowncycleError, match="moved is not the adapter merged into"):
        verify(tmp_path / "out", adapter=tmp_path / "moved")


def test_a_merge_into_a_cut_that_was_never_written_is_proved(llama, tmp_path):
    write(merge_adapter(keep_layers(open_checkpoint(llama[0]), [7, *range(1, 8)]), llama[1]), tmp_path / "out")
    assert verify(tmp_path / "out").what == f"{llama[0]} with {llama[1]} merged into it"
