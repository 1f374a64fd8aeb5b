"""A packed model is loaded by stock transformers, gives exactly the logits of its own arithmetic, and is proved byte for byte."""

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402

from downcycle import DowncycleError, keep_layers, load_model, open_checkpoint, verify, write  # noqa: E402
from downcycle.surgery.ternary.bitlinear import convert, set_strength  # noqa: E402
from downcycle.surgery.ternary.rule import Rule  # noqa: E402
from downcycle.surgery.ternary.ternarize import LINEAR, check_patterns, ternarize  # noqa: E402

from tiny_models import tiny_config, tiny_model  # noqa: E402

IDS = torch.arange(10, 50).reshape(2, 20)

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(autouse=True)
def eager():
    """Transformers compiles its unpacking; without a compiler it cannot, and the results are the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Write a tiny model of a family, once for each dtype."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def save(family="llama", dtype=torch.float32):
        if (family, dtype) not in made:
            made[family, dtype] = tmp_path_factory.mktemp(family)
            tiny_model(family).to(dtype).save_pretrained(made[family, dtype])
        return made[family, dtype]

    return save


class ByHand(nn.Module):
    """What transformers' BitLinear computes, in its order: codes by codes, then the scales."""

    def __init__(self, weight, bias):
        super().__init__()
        (scale,) = struct.unpack("<f", struct.pack("<f", max(float(weight.double().abs().mean()), 1e-5)))
        self.codes = (weight.float() / scale).round().clamp(-1, 1).to(weight.dtype)
        self.scale, self.bias = torch.tensor([1 / scale]).to(weight.dtype), bias

    def forward(self, x):
        near = 127 / x.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
        y = nn.functional.linear((x * near).round().clamp(-128, 127), self.codes) / (self.scale * near)
        return y if self.bias is None else y + self.bias


def by_hand(folder, dtype, rule=None):
    rule, model = rule or Rule(), load_model(open_checkpoint(folder), dtype=dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and rule.takes(name):
            model.set_submodule(name, ByHand(module.weight.detach(), module.bias))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "gpt_neox", "opt"])
def test_stock_transformers_computes_exactly_this(family, dtype, saved, tmp_path):
    """Models with biases, tied heads, fused maps."""
    folder = write(ternarize(open_checkpoint(saved(family, dtype))), tmp_path / "packed")
    model = load_model(open_checkpoint(folder), dtype=dtype)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS).logits, by_hand(saved(family, dtype), dtype)(input_ids=IDS).logits)
    assert sum(type(module).__name__ == "BitLinear" for module in model.modules()) >= 8 * 4


@pytest.mark.parametrize("linear", LINEAR)
def test_both_conventions_say_what_the_model_says_in_training(linear, saved, tmp_path):
    """Within the rounding of activations: an 8-bit code that falls on the other side moves a logit a little."""
    trained = load_model(open_checkpoint(saved()), dtype=torch.float32)
    for name, module in trained.named_modules():
        if isinstance(module, nn.Linear) and Rule().takes(name):
            convert(module)
    with torch.inference_mode():
        plain = trained(input_ids=IDS).logits
        set_strength(trained, 1)
        wanted = trained(input_ids=IDS).logits
        folder = write(ternarize(open_checkpoint(saved()), linear=linear), tmp_path / "packed")
        found = load_model(open_checkpoint(folder), dtype=torch.float32)(input_ids=IDS).logits
    assert float((found - wanted).abs().median()) < 1e-5 < 1e-2 < float((plain - wanted).abs().median())


def test_what_becomes_ternary_is_small_and_all_else_is_copied(saved, tmp_path):
    folder = write(ternarize(open_checkpoint(saved())), tmp_path / "packed")
    before, after = load_file(saved() / "model.safetensors"), load_file(folder / "model.safetensors")
    for name, weight in before.items():
        if Rule().takes(name.removesuffix(".weight")) and weight.ndim == 2:
            assert (after[name].dtype, after[name].shape) == (torch.uint8, (weight.shape[0] // 4, weight.shape[1]))
            assert after[f"{name}_scale"].shape == (1,)
        else:
            assert torch.equal(weight, after[name])
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head", "model.embed_tokens"]}
    assert config == json.loads((saved() / "config.json").read_text())


def test_patterns_leave_maps_as_they_are(saved, tmp_path):
    rule = Rule(exclude=["down_proj$", r"layers\.0\."])
    folder = write(ternarize(open_checkpoint(saved()), rule=rule), tmp_path / "packed")
    model = load_model(open_checkpoint(folder), dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS).logits, by_hand(saved(), torch.float32, rule)(input_ids=IDS).logits)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["model.layers.1.mlp.up_proj"] == "BitLinear"
    assert kinds["model.layers.1.mlp.down_proj"] == kinds["model.layers.0.mlp.up_proj"] == "Linear"


def test_experts_and_routers_stay_as_they_are(saved, tmp_path):
    folder = write(ternarize(open_checkpoint(saved("mixtral"))), tmp_path / "packed")
    model = load_model(open_checkpoint(folder), dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS).logits, by_hand(saved("mixtral"), torch.float32)(input_ids=IDS).logits)


def test_a_cut_is_converted_in_one_pass_and_proved(saved, tmp_path):
    child = keep_layers(open_checkpoint(saved()), [0, 1, 2, 6, 7])
    folder = write(ternarize(child), tmp_path / "packed")
    assert "with ternary weights" in verify(folder).what
    write(child, tmp_path / "child")
    assert load_file(write(ternarize(open_checkpoint(tmp_path / "child")), tmp_path / "twice") / "model.safetensors").keys()
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "twice" / "model.safetensors").read_bytes()


def test_a_changed_byte_is_found(saved, tmp_path):
    folder = write(ternarize(open_checkpoint(saved())), tmp_path / "packed")
    assert verify(folder).tensors == len(load_file(folder / "model.safetensors"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    with pytest.raises(DowncycleError, match="is not what downcycle.json says: .* Convert it again"):
        verify(folder)


@pytest.mark.parametrize(("key", "value"), [("include", "all"), ("exclude", [1]), ("exclude", ["("]), ("linear", "bitliner")])
def test_a_changed_lineage_is_refused(key, value, saved, tmp_path):
    folder = write(ternarize(open_checkpoint(saved())), tmp_path / "packed")
    lineage = json.loads((folder / "downcycle.json").read_text())
    (folder / "downcycle.json").write_text(json.dumps(lineage | {key: value}))
    with pytest.raises(DowncycleError) as refusal:
        verify(folder)
    assert "\n" not in str(refusal.value)


# What cannot be packed.


def changed(folder, target, **tensors):
    shutil.copytree(folder, target)
    save_file(load_file(target / "model.safetensors") | tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_what_is_not_finite_is_refused_by_name(saved, tmp_path):
    name = "model.layers.3.mlp.up_proj.weight"
    weight = load_file(saved() / "model.safetensors")[name]
    weight[0, 0] = torch.nan
    folder = changed(saved(), tmp_path / "m", **{name: weight})
    with pytest.raises(DowncycleError, match=f"{name}: holds NaN or infinity"):
        write(ternarize(open_checkpoint(folder)), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_outputs_that_do_not_come_in_fours_are_refused_and_can_be_left_out(tmp_path):
    config = tiny_config("llama")
    config.intermediate_size = 42
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    model = open_checkpoint(tmp_path / "m")
    with pytest.raises(DowncycleError, match=r"has 42 outputs, and .* multiples of 4 only; leave it out with --exclude 'gate_proj\$'"):
        ternarize(model)
    packed = write(ternarize(model, rule=Rule(exclude=["gate_proj$", "up_proj$"])), tmp_path / "packed")
    assert load_model(open_checkpoint(packed), dtype=torch.float32)(input_ids=IDS).logits.isfinite().all()


def test_a_head_becomes_ternary_where_it_is_asked_for(saved, tmp_path):
    rule = Rule(include=["^lm_head$"])
    folder = write(ternarize(open_checkpoint(saved()), rule=rule), tmp_path / "packed")
    model = load_model(open_checkpoint(folder), dtype=torch.float32)
    with torch.inference_mode():
        found, wanted = (one(input_ids=IDS).logits for one in (model, by_hand(saved(), torch.float32, rule)))
    assert type(model.lm_head).__name__ == "BitLinear" and torch.equal(found, wanted)


def test_embeddings_and_heads_tied_to_them_stay(saved):
    model = open_checkpoint(saved())
    assert ternarize(model, rule=Rule(include=["embed_tokens"])).tensors.keys() == ternarize(model).tensors.keys()
    for rule in (Rule(include=["embed_tokens"]), Rule(exclude=["nothing_like_it"]), Rule(include=["norm"]), Rule(["proj"], ["q_prj"])):
        with pytest.raises(DowncycleError, match="no linear map that this pattern takes or leaves out; their names are like "):
            check_patterns(model, rule)
    check_patterns(model, Rule(["^lm_head$"], ["down_proj$"]))
    tied = replace(model, config={**model.config, "tie_word_embeddings": True})
    with pytest.raises(DowncycleError, match="its head has the weights of the embeddings, which stay floats"):
        ternarize(tied, rule=Rule(include=["^lm_head$"]))
    assert ternarize(tied)


def test_experts_that_stay_are_named_together(saved, tmp_path):
    """Transformers asks each name about each module; it takes a name for all below it."""
    model = open_checkpoint(saved("qwen3_moe"))
    kept = ternarize(model).config["quantization_config"]["modules_to_not_convert"]
    layers = {name.partition(".experts.")[0] for name in model.tensors if ".experts." in name}
    assert [name for name in kept if "experts" in name] == sorted(f"{layer}.experts" for layer in layers) and layers
    loaded = load_model(open_checkpoint(write(ternarize(model), tmp_path / "packed")), dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(loaded(input_ids=IDS).logits, by_hand(saved("qwen3_moe"), torch.float32)(input_ids=IDS).logits)


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_what_stays_floating_point_is_rounded_where_it_is_asked_for(dtype, kind, saved, tmp_path):
    folder = write(ternarize(open_checkpoint(saved()), dtype=dtype), tmp_path / "packed")
    plain = load_file(write(ternarize(open_checkpoint(saved())), tmp_path / "plain") / "model.safetensors")
    found = load_file(folder / "model.safetensors")
    for name, tensor in plain.items():
        packed = tensor.dtype == torch.uint8 or name.endswith("_scale")
        assert torch.equal(found[name], tensor if packed else tensor.to(kind)) and found[name].dtype == (tensor.dtype if packed else kind)
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(kind).removeprefix("torch.")
    assert verify(folder).what
    with torch.inference_mode():
        assert load_model(open_checkpoint(folder), dtype="auto")(input_ids=IDS).logits.dtype == kind


def test_what_was_packed_is_not_packed_again(saved, tmp_path):
    folder = write(ternarize(open_checkpoint(saved())), tmp_path / "packed")
    with pytest.raises(DowncycleError, match="its weights are packed by bitnet already; give the model as it was before"):
        ternarize(open_checkpoint(folder))


def test_other_refusals(saved):
    with pytest.raises(DowncycleError, match="--dtype f8: no such dtype; choose one of stored, bf16, f16"):
        ternarize(open_checkpoint(saved()), dtype="f8")
    with pytest.raises(DowncycleError, match="--linear bitnet: no such class; choose bitlinear or autobitlinear"):
        ternarize(open_checkpoint(saved()), linear="bitnet")
    with pytest.raises(DowncycleError, match="_proj has a bias, which transformers multiplies with the scale .* take bitlinear"):
        ternarize(open_checkpoint(saved("qwen2")), linear="autobitlinear")
    with pytest.raises(DowncycleError, match="gpt2 has no linear maps that transformers runs with ternary weights"):
        ternarize(open_checkpoint(saved("gpt2")))
    with pytest.raises(DowncycleError, match="no linear map that becomes ternary; change the patterns"):
        ternarize(open_checkpoint(saved()), rule=Rule(exclude=["proj"]))
