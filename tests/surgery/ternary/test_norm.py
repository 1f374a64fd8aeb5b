"""A norm before each ternary map is carried, and stock transformers computes with it what it must; where it would not, it is refused."""

import json
import shutil
import struct

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402

from downcycle import DowncycleError, load_model, open_checkpoint, verify, write  # noqa: E402
from downcycle.surgery.ternary.bitlinear import convert, set_strength  # noqa: E402
from downcycle.surgery.ternary.rule import Rule  # noqa: E402
from downcycle.surgery.ternary.ternarize import LINEAR, ternarize  # noqa: E402

from tiny_models import tiny_model  # noqa: E402

IDS = torch.arange(10, 50).reshape(2, 20)
RECORD = {"schedule": "linear", "include": [], "exclude": [], "norm": True, "strength": 1.0, "steps": 9}

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(autouse=True)
def eager():
    with torch.compiler.set_stance("force_eager"):
        yield


def norm_names(tensors):
    return [f"{name.removesuffix('.weight')}.rms_norm.weight" for name in tensors if "_proj.weight" in name]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def trained(request, tmp_path_factory):
    """A tiny Llama as a training with norms leaves it, and its dtype."""
    folder = tmp_path_factory.mktemp("trained")
    tiny_model("llama").to(request.param).save_pretrained(folder)
    tensors, chance = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(1)
    for name in norm_names(tensors):
        inputs = tensors[name.replace(".rms_norm", "")].shape[1]
        tensors[name] = (1 + 0.3 * torch.randn(inputs, generator=chance)).to(request.param)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"downcycle_ternary": RECORD}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, request.param


def changed(folder, target, drop=(), **tensors):
    shutil.copytree(folder, target)
    kept = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name not in drop}
    save_file(kept | tensors, target / "model.safetensors", {"format": "pt"})
    return open_checkpoint(target)


class ByHand(nn.Module):
    """A norm, then codes by codes and the scales, or 8-bit inputs by codes and the scale: as each class has it."""

    def __init__(self, weight, norm, linear):
        super().__init__()
        (scale,) = struct.unpack("<f", struct.pack("<f", float(weight.double().abs().mean())))
        self.codes, self.norm, self.linear = (weight.float() / scale).round().clamp(-1, 1).to(weight.dtype), norm, linear
        self.scale = torch.tensor([scale if linear == "autobitlinear" else 1 / scale]).to(weight.dtype)

    def forward(self, x):
        square = x.float().pow(2).mean(-1, keepdim=True)
        x = self.norm * (x.float() * torch.rsqrt(square + 1e-6)).to(x.dtype)
        if self.linear == "autobitlinear":
            near = 127 / x.float().abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
            x = ((x.float() * near).round().clamp(-128, 127) / near).to(x.dtype)
            return nn.functional.linear(x, self.codes) * self.scale
        near = 127 / x.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
        return nn.functional.linear((x * near).round().clamp(-128, 127), self.codes) / (self.scale * near)


@pytest.mark.parametrize("linear", LINEAR)
def test_stock_transformers_computes_exactly_this(linear, trained, tmp_path):
    source, dtype = trained
    folder = write(ternarize(open_checkpoint(source), linear=linear), tmp_path / "packed")
    tensors, wanted = load_file(source / "model.safetensors"), load_model(open_checkpoint(source), dtype=dtype)
    for name in norm_names(tensors):
        weight = tensors[name.replace(".rms_norm", "")]
        wanted.set_submodule(name.removesuffix(".rms_norm.weight"), ByHand(weight, tensors[name], linear))
    packed = load_model(open_checkpoint(folder), dtype=dtype)
    with torch.inference_mode():
        assert torch.equal(packed(input_ids=IDS).logits, wanted(input_ids=IDS).logits)
    how = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (how["use_rms_norm"], how["rms_norm_eps"]) == (True, 1e-6) and not any("rms" in name for name in how["modules_to_not_convert"])
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(after[name], tensors[name]) for name in norm_names(tensors))
    assert verify(folder).tensors == len(after)


def test_it_says_what_the_training_said(trained, tmp_path):
    """The training's own BitLinear with its norms: the same but for 8-bit codes that fall on the other side."""
    source, dtype = trained
    model, tensors = load_model(open_checkpoint(source), dtype=dtype), load_file(source / "model.safetensors")
    for name in norm_names(tensors):
        module = model.get_submodule(name.removesuffix(".rms_norm.weight"))
        convert(module, norm=True)
        module.rms_norm.weight.data.copy_(tensors[name])
    set_strength(model, 1)
    folder = write(ternarize(open_checkpoint(source)), tmp_path / "packed")
    with torch.inference_mode():
        found, wanted = load_model(open_checkpoint(folder), dtype=dtype)(input_ids=IDS).logits, model(input_ids=IDS).logits
    near = 1e-5 if dtype == torch.float32 else 0.02
    assert float((found - wanted).abs().median()) < near < 0.1 * float(wanted.std())


def test_a_model_without_norms_says_nothing_of_them(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "m")
    assert "use_rms_norm" not in ternarize(open_checkpoint(tmp_path / "m")).config["quantization_config"]


def test_a_map_with_a_norm_that_stays_floating_point_is_refused(trained):
    with pytest.raises(DowncycleError, match=r"layers.0.mlp.down_proj.weight has a norm of its own .* with ternary maps only; --include"):
        ternarize(open_checkpoint(trained[0]), rule=Rule(exclude=["down_proj$"]))


def test_a_ternary_map_without_the_norm_that_others_have_is_refused(trained, tmp_path):
    name = "model.layers.3.self_attn.q_proj"
    model = changed(trained[0], tmp_path / "m", drop=[f"{name}.rms_norm.weight"])
    with pytest.raises(DowncycleError, match=rf"{name}.weight has no norm of its own .* leave it out with --exclude"):
        ternarize(model)
    assert ternarize(model, rule=Rule(exclude=[r"layers\.3\.self_attn\.q_proj$"])).config["quantization_config"]["use_rms_norm"]


def test_a_norm_of_another_size_is_refused(trained, tmp_path):
    name = "model.layers.3.self_attn.q_proj.rms_norm.weight"
    with pytest.raises(DowncycleError, match=r"the norm of .*layers.3.self_attn.q_proj.weight holds F32 \[7\], and its inputs are"):
        ternarize(changed(trained[0], tmp_path / "m", **{name: torch.ones(7)}))


def test_norms_that_the_config_speaks_of_and_that_are_not_there_are_refused(trained, tmp_path):
    gone = norm_names(load_file(trained[0] / "model.safetensors"))
    with pytest.raises(DowncycleError, match=r"by its config each ternary map has a norm \(rms_norm\), and there is none"):
        ternarize(changed(trained[0], tmp_path / "m", drop=gone))
