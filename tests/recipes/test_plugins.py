"""The plugin's keys are checked, what contradicts it is refused in one line, and a model is converted so that it can be packed."""

import copy
import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("axolotl")
from axolotl.integrations.base import load_plugin  # noqa: E402
from axolotl.utils.dict import DictDefault  # noqa: E402
from pydantic import ValidationError  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from downcycle import DowncycleError  # noqa: E402
from downcycle.recipes.plugins.conversion import make_ternary  # noqa: E402
from downcycle.recipes.plugins.settings import TernaryArgs, TernarySettings, settings  # noqa: E402
from downcycle.surgery.ternary.bitlinear import BitLinear  # noqa: E402
from downcycle.surgery.ternary.record import RECORD, read_record  # noqa: E402

from tiny_models import tiny_config, tiny_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet")
IDS = torch.arange(10, 50).reshape(2, 20)


# The keys.


def test_the_published_choice_stands_where_nothing_is_said():
    chosen = settings(DictDefault({}))
    assert (chosen, chosen.distill) == (TernarySettings(), None)
    assert [chosen.warmup().strength(step, 5000) for step in (0, 500, 1000, 5000)] == [0, 0.5, 1, 1]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"warmup_steps": 0}, [1, 1, 1]),
        ({"warmup_steps": 20}, [0, 0.5, 1]),
        ({"schedule": "ramp"}, [0, 0.1, 1]),
        ({"schedule": "exponential", "k": 2}, [0, 0.19, 1]),
    ],
)
def test_a_warmup_is_chosen(given, wanted):
    warmup = settings(DictDefault({RECORD: given})).warmup()
    assert [warmup.strength(step, 100) for step in (0, 10, 100)] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"shedule": "linear"}, "shedule"),
        ({"distill": {"temprature": 2}}, "temprature"),
        ({"distill": {"weight": 1.01}}, "less than or equal to 1"),
        ({"distill": {"weight": -0.1}}, "greater than or equal to 0"),
        ({"distill": {"temperature": 0}}, "greater than 0"),
        ({"distill": {"temperature": float("inf")}}, "finite"),
        ({"schedule": "linaer"}, "schedule 'linaer': no such warm-up"),
        ({"warmup_steps": -1}, "greater than or equal to 0"),
        ({"warmup_steps": 2.5}, "integer"),
        ({"k": 4}, "k is for the other schedules; linear has warmup_steps"),
        ({"schedule": "sigmoid", "warmup_steps": 10}, "warmup_steps is for the schedule linear; sigmoid has k"),
        ({"schedule": "sigmoid", "k": 0}, "k 0.0: must be a number above 0"),
        ({"include": "q_proj"}, "list"),
        ({"exclude": ["("]}, "is no regular expression"),
        ({"norm": "perhaps"}, "boolean"),
    ],
)
def test_slips_are_refused(given, says):
    with pytest.raises(ValidationError) as refusal:
        TernaryArgs(**{RECORD: given})
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {"schedule": "linear", "warmup_steps": 1000, "k": None, "include": [], "exclude": [], "norm": False}),
        (
            {"schedule": "sigmoid", "exclude": ["down_proj"], "norm": True},
            {"schedule": "sigmoid", "warmup_steps": None, "k": 100, "include": [], "exclude": ["down_proj"], "norm": True},
        ),
        (
            {"schedule": "ramp", "k": 2, "include": ["lm_head"]},
            {"schedule": "ramp", "warmup_steps": None, "k": 2, "include": ["lm_head"], "exclude": [], "norm": False},
        ),
    ],
)
def test_what_config_json_says_is_read_back(given, wanted):
    section = TernarySettings(**given).section(0.75, 7)
    assert json.loads(json.dumps(section)) == wanted | {"strength": 0.75, "steps": 7}
    record = read_record({RECORD: section}, "m")
    assert (list(record.rule.exclude), record.norm, record.strength) == (wanted["exclude"], wanted["norm"], 0.75)


# What is refused before anything is loaded.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(made)
    return made


@pytest.fixture
def plugin():
    return load_plugin("downcycle.recipes.plugins.TernaryPlugin")


def changed(folder, target, **fields):
    """A copy of a model's config, with other fields."""
    target.mkdir()
    (target / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | fields))
    return target


def refusal(act, cfg):
    with pytest.raises(DowncycleError) as refused:
        act(DictDefault(cfg))
    assert "\n" not in str(refused.value)
    return str(refused.value)


DISTILL = {RECORD: {"distill": {}}}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"adapter": "lora"}, "adapter: not with TernaryPlugin: ternary training moves every weight"),
        ({"load_in_4bit": True}, "load_in_4bit: not with TernaryPlugin: .* packed ones cannot be moved"),
        ({"load_in_8bit": True}, "load_in_8bit: not with TernaryPlugin: .* packed ones cannot be moved"),
        ({"adapter": "qlora", "load_in_4bit": True}, "^adapter: not with TernaryPlugin: [^:]*; take it out, and load_in_4bit"),
        ({"qat": {"weight_dtype": "ternary"}}, "qat: not with TernaryPlugin: Axolotl's own rounding"),
        ({"fp8": True}, "fp8: not with TernaryPlugin"),
        ({"use_onebitllms": True}, "use_onebitllms: not with TernaryPlugin"),
        ({"rl": "dpo"}, "rl: not with TernaryPlugin: it learns from text"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "deepspeed: .* keeps weights and lambda in bf16"),
        ({"bfloat16": True}, "bfloat16: .* write bf16: auto"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: not with TernaryPlugin"),
        ({"fsdp_config": {"offload_params": True}, "fsdp_version": 1}, "write fsdp_version: 2"),
        ({"fsdp_config": {"version": 1}}, "write fsdp_version: 2"),
        (DISTILL | {"liger_fused_linear_cross_entropy": True}, "gives no logits, which downcycle_ternary.distill compares"),
        (DISTILL | {"cut_cross_entropy": True}, "cut_cross_entropy: gives no logits"),
        (DISTILL | {"kd_trainer": True}, "downcycle_ternary.distill: not together with KDPlugin"),
        (DISTILL | {"context_parallel_size": 2}, "whose teacher reads whole sequences"),
        ({"fp8": True, "rl": "dpo"}, "rl: not with .*; fp8: not with"),
    ],
)
@pytest.mark.parametrize("hook", ["load_datasets", "pre_model_load"])
def test_a_recipe_that_contradicts_itself_is_refused(plugin, folder, hook, given, says):
    import re

    assert re.search(says, refusal(getattr(plugin, hook), {"base_model": str(folder), "base_model_config": str(folder)} | given))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"bf16": True, "tensor_parallel_size": 1, "context_parallel_size": 1},
        {"fsdp_config": {"offload_params": True}, "fsdp_version": 2},
        {"liger_fused_linear_cross_entropy": True, "context_parallel_size": 2},
        DISTILL,
    ],
)
def test_what_goes_together_does(plugin, folder, given):
    cfg = DictDefault({"base_model": str(folder), "base_model_config": str(folder), "torch_dtype": torch.bfloat16} | given)
    assert plugin.load_datasets(cfg) is None
    plugin.pre_model_load(cfg)
    assert cfg.torch_dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "given", "says"),
    [
        ({"quantization_config": {"quant_method": "bitnet"}}, {}, "its weights are packed by bitnet already; give the model as it was"),
        (
            {RECORD: {"norm": True, "strength": 1.0}},
            {},
            "norm: base_model was trained with a norm before each ternary map; write norm: true",
        ),
        (
            {RECORD: {"strength": 1.0}},
            {"distill": {}},
            "distill.teacher: missing; base_model was trained ternary already and is no teacher of itself",
        ),
        ({RECORD: {"strength": 7}}, {}, "strength is 7 and no number from 0 to 1"),
    ],
)
def test_a_model_that_cannot_be_trained_so_is_refused(plugin, folder, tmp_path, fields, given, says):
    model = str(changed(folder, tmp_path / "m", **fields))
    assert says in refusal(plugin.pre_model_load, {"base_model": model, "base_model_config": model, RECORD: given})


def test_a_ternary_model_learns_from_a_teacher_that_is_named(plugin, folder, tmp_path):
    model = str(changed(folder, tmp_path / "m", **{RECORD: {"strength": 1.0}}))
    plugin.pre_model_load(DictDefault({"base_model": model, "base_model_config": model, RECORD: {"distill": {"teacher": str(folder)}}}))


def test_families_without_linear_maps_are_refused(plugin, tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    model = str(tmp_path / "gpt2")
    assert "gpt2 has no linear maps" in refusal(plugin.pre_model_load, {"base_model": model, "base_model_config": model})


# What becomes of a model.


def kinds(model):
    return {name for name, module in model.named_modules() if isinstance(module, BitLinear)}


def test_the_plugin_converts_what_the_rule_takes_and_trains_float32(plugin, folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    plain = copy.deepcopy(model).float()
    cfg = {"base_model": str(folder), "torch_dtype": torch.float32, RECORD: {"exclude": ["down_proj$"], "include": ["lm_head"]}}
    plugin.post_model_build(DictDefault(cfg), model)
    parts = ("q_proj", "k_proj", "v_proj", "o_proj")
    layers = [f"model.layers.{i}" for i in range(plain.config.num_hidden_layers)]
    wanted = {f"{layer}.self_attn.{part}" for layer in layers for part in parts}
    wanted |= {f"{layer}.mlp.{part}_proj" for layer in layers for part in ("gate", "up")}
    assert kinds(model) == wanted | {"lm_head"}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_for_use_a_model_keeps_its_dtype_and_the_lambda_that_it_was_trained_with(plugin, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    setattr(model.config, RECORD, TernarySettings().section(0.75, 750))
    plugin.post_model_build(DictDefault({"base_model": str(folder), "torch_dtype": torch.bfloat16}), model)
    found = {(float(module.strength), module.weight.dtype) for module in model.modules() if isinstance(module, BitLinear)}
    assert found == {(0.75, torch.bfloat16)}


def test_nothing_to_convert_is_refused(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(DowncycleError, match="has no linear map that becomes ternary; change include and exclude"):
        make_ternary(model, TernarySettings(exclude=["proj"]), str(folder))


def test_outputs_that_cannot_be_packed_are_refused_before_training():
    from transformers import LlamaForCausalLM

    config = tiny_config("llama")
    config.intermediate_size = 42
    model = LlamaForCausalLM(config)
    with pytest.raises(DowncycleError, match=r"gate_proj has 42 outputs, .* leave it out: exclude: \['gate_proj\$'\]") as refused:
        make_ternary(model, TernarySettings(), "m")
    assert "\n" not in str(refused.value) and not kinds(model)
    make_ternary(model, TernarySettings(exclude=["gate_proj$", "up_proj$"]), "m")
    assert len(kinds(model)) == 8 * 5


def test_a_pattern_that_does_nothing_is_refused(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(DowncycleError, match="'down_prj' takes or leaves out no linear map; mend the pattern"):
        make_ternary(model, TernarySettings(exclude=["up_proj", "down_prj"]), str(folder))
    assert not kinds(model)


def test_a_head_that_is_tied_is_refused():
    from transformers import LlamaForCausalLM

    config = tiny_config("llama")
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config)
    says = r"lm_head has the weights of the embeddings, which stay floats; leave it out: exclude: \['lm_head\$'\]"
    with pytest.raises(DowncycleError, match=says) as refused:
        make_ternary(model, TernarySettings(include=["head"]), "m")
    assert "\n" not in str(refused.value) and not kinds(model)
    make_ternary(model, TernarySettings(exclude=["lm_head$"]), "m")
    assert len(kinds(model)) == 8 * 7


# Norms.


@pytest.fixture
def normed(folder, tmp_path):
    """A model that was trained with norms, and their weights."""
    target = changed(folder, tmp_path / "normed", **{RECORD: TernarySettings(norm=True).section(0.5, 3)})
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    norms = {
        f"{name.removesuffix('.weight')}.rms_norm.weight": torch.rand(weight.shape[1], generator=generator) + 0.5
        for name, weight in weights.items()
        if name.endswith("_proj.weight")
    }
    save_file(weights | norms, target / "model.safetensors", {"format": "pt"})
    return target, norms


def test_norms_that_were_trained_are_loaded(normed):
    folder, norms = normed
    model = AutoModelForCausalLM.from_pretrained(folder)
    make_ternary(model, TernarySettings(norm=True), str(folder))
    state = model.state_dict()
    assert {name for name in state if "rms_norm" in name} == norms.keys()
    assert all(torch.equal(state[name], weight) for name, weight in norms.items())
    assert {float(one.strength) for one in model.modules() if isinstance(one, BitLinear)} == {0.5}
    model.save_pretrained(folder / "again")
    assert torch.equal(load_file(folder / "again" / "model.safetensors")[min(norms)], norms[min(norms)])


@pytest.mark.parametrize(
    ("weight", "says"),
    [(None, "there is no model.layers.3.mlp.up_proj.rms_norm.weight"), (torch.ones(5), "has 5 numbers, and the map has 32 inputs")],
)
def test_norms_that_are_not_as_they_should_be_are_refused(normed, weight, says):
    folder, _ = normed
    weights, name = load_file(folder / "model.safetensors"), "model.layers.3.mlp.up_proj.rms_norm.weight"
    del weights[name]
    save_file(weights | ({} if weight is None else {name: weight}), folder / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with pytest.raises(DowncycleError, match=says) as refused:
        make_ternary(model, TernarySettings(norm=True), str(folder))
    assert "\n" not in str(refused.value)


def test_new_norms_have_weight_1(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    make_ternary(model, TernarySettings(norm=True), str(folder))
    norms = [module.rms_norm.weight for module in model.modules() if isinstance(module, BitLinear)]
    assert norms and all(torch.equal(weight, torch.ones_like(weight)) and isinstance(weight, nn.Parameter) for weight in norms)
