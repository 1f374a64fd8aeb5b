"""Factors of dropped layers fold into weights of any family exactly, or are refused.

The oracle knows nothing of the package: the stock parent in memory, whose dropped layers pass on what they are given, times the factor.
"""

from collections.abc import Callable
from dataclasses import replace
from math import inf, nan

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from downcycle.surgery.checkpoint import open_checkpoint  # noqa: E402
from downcycle.surgery.compensation.fold import keep_compensated, open_fitted, save_fitted  # noqa: E402
from downcycle.surgery.compensation.scale import dropped_runs, scale  # noqa: E402
from downcycle.surgery.errors import DowncycleError, UnsuitableError  # noqa: E402
from downcycle.surgery.importance.calibration import Batch  # noqa: E402
from downcycle.surgery.importance.observers import ChannelMagnitudes  # noqa: E402
from downcycle.surgery.importance.parts import Parts  # noqa: E402
from downcycle.surgery.importance.paths import WHOLE, run_paths  # noqa: E402
from downcycle.surgery.importance.pruned import find_stack  # noqa: E402
from downcycle.surgery.importance.states import States  # noqa: E402
from downcycle.surgery.model import load_model  # noqa: E402

import families  # noqa: E402
from tiny_models import DEPTH, inputs, tiny_config, tiny_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet")

PATH = frozenset({2, 3, 6})
FACTORS = {(2, 4): 1.7, (6, 7): 0.6}
EXACT = [
    "llama", "gpt2", "gemma2", "gemma3_text", "olmo2", "mixtral", "qwen3_moe", "gpt_oss", "gpt_neox", "falcon", "phi", "opt",
    "bloom", "qwen3", "granite", "cohere", "glm4", "mamba2", "falcon_h1", "recurrent_gemma", "qwen3_5_text", "starcoder2",
]  # fmt: skip
REFUSED = {
    "bart": "what layer 0 adds to the hidden states does not grow with any of its output projections and norms",  # norms behind the sum
    "gemma4_text": "what layer 0 adds to the hidden states does not grow",  # a part of each layer reads the stream without a norm
    "glm_moe_dsa": r"layer 4 cannot be run by itself \(Shared DSA layers",
    "nanochat": "what enters its first layer does not grow with its embeddings",  # a norm without weights behind them
    "flex_olmo": "no tensor of it holds the values of mlp.experts.gate_up_proj",  # the file has gate and up apart
    "zamba": "layer 1 takes the embeddings from elsewhere than the layer before it",
}


@pytest.fixture
def saved(tmp_path) -> Callable[..., nn.Module]:
    """Write a tiny model, of other dtype or config where that is asked for; return it."""

    def save(name: str, dtype: torch.dtype = torch.float32, **fields: object) -> nn.Module:
        model = tiny_model(name)
        if fields:
            config = tiny_config(name)
            config.update(fields)
            torch.manual_seed(0)
            model = type(model)(config).eval()
            for weight in model.parameters():
                nn.init.normal_(weight, std=0.15) if weight.ndim > 1 else nn.init.normal_(weight, 1.0, 0.1)
        model.to(dtype).save_pretrained(tmp_path)
        return model

    return save


def ratios_of(factors):
    return [[factors.get((start, end), nan) for end in range(DEPTH + 1)] for start in range(DEPTH + 1)]


def fit(folder, path=PATH, factors=None, **options):
    return scale(Parts(open_checkpoint(folder), **options), frozenset(path), ratios_of(factors or FACTORS))


def child_of(folder, fitted, path=PATH):
    """Return the compensated child, as stock transformers loads it."""
    save_fitted(folder / "fitted" / "one.safetensors", fitted.tensors)
    kept = sorted(set(range(DEPTH)) - set(path))
    return load_model(keep_compensated(open_checkpoint(folder), kept, "test", open_fitted(folder / "fitted" / "one.safetensors"), {}))


def logits_of_cut(model, path=PATH, factors=None):
    """The oracle: hidden states are multiplied where layers are dropped, and no weight is."""
    layers = model.get_submodule(find_stack(model, DEPTH))

    def multiplied(factor):
        def hook(layer, args, output):
            return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor

        return hook

    handles = [layers[start].register_forward_hook(multiplied(factor)) for (start, _), factor in (factors or {}).items()]
    with families.without_layers(model, sorted(path)):
        found = families.logits(model)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", EXACT)
def test_child_computes_what_the_cut_does_with_multiplied_hidden_states(name, saved, tmp_path):
    model = saved(name)
    wanted, plain = logits_of_cut(model, factors=FACTORS), logits_of_cut(model)
    with torch.no_grad():
        found = child_of(tmp_path, fit(tmp_path))(**inputs(model)).logits
    size = wanted.abs().max()
    assert (found - wanted).abs().max() < 5e-4 * size
    assert (plain - wanted).abs().max() > 0.1 * size


@pytest.mark.parametrize(("name", "tied"), [("llama", True), ("gpt2", False), ("gemma2", False), ("cohere", False), ("opt", False)])
def test_head_that_is_the_table_and_head_that_is_not(name, tied, saved, tmp_path):
    model = saved(name, tie_word_embeddings=tied)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    wanted = logits_of_cut(model, factors=FACTORS)
    with torch.no_grad():
        found = child_of(tmp_path, fit(tmp_path))(**inputs(model)).logits
    assert (found - wanted).abs().max() < 5e-4 * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_computed_wide_and_rounded_once(dtype, saved, tmp_path):
    weights = saved("llama", dtype).state_dict()
    layer = {number: 1.7 * 0.6 for number in (0, 1)} | {number: 0.6 for number in (4, 5)}  # runs begin at 2 and 6
    names = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
    wanted = {f"model.layers.{number}.{name}": factor for number, factor in layer.items() for name in names}
    wanted["model.embed_tokens.weight"] = 1.7 * 0.6
    found = fit(tmp_path, dtype=dtype).tensors
    assert set(found) == set(wanted)
    for name, factor in wanted.items():
        exact = weights[name].double() * factor
        step = exact.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).tiny
        assert found[name].dtype == dtype
        assert ((found[name].double() - exact).abs() <= 0.51 * step).all()


def test_tied_table_is_changed_wherever_it_is_stored(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    model = saved("llama", torch.bfloat16, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    once = dict(fit(tmp_path, dtype=torch.bfloat16).tensors)
    table = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": table.clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    twice = fit(tmp_path, dtype=torch.bfloat16).tensors
    assert set(twice) == {*once, "lm_head.weight"}
    assert torch.equal(twice["lm_head.weight"], once["model.embed_tokens.weight"])
    assert torch.equal(once["model.norm.weight"], (model.model.norm.weight.float() / (1.7 * 0.6)).bfloat16())


def test_ends_of_the_stack(saved, tmp_path):
    saved("llama")
    assert set(fit(tmp_path, {0, 1}, {(0, 2): 3.0}).tensors) == {"model.embed_tokens.weight"}
    behind = fit(tmp_path, {7}, {(7, 8): 3.0}).tensors
    assert {name.split(".")[2] for name in behind if ".layers." in name} == set("0123456")


def test_nothing_to_fold_changes_nothing(saved, tmp_path):
    saved("gpt2")
    assert not fit(tmp_path, {3}, {(3, 4): 1.0}).tensors
    assert not scale(Parts(open_checkpoint(tmp_path)), WHOLE, ratios_of({})).tensors
    between = fit(tmp_path, {2, 5}, {(2, 3): 2.0, (5, 6): 0.5}).tensors  # whose product is 1
    assert {name.split(".")[2] for name in between} == set("34")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_model_that_was_looked_at_is_left_as_it_was(name, saved, tmp_path):
    saved(name)
    parts = Parts(open_checkpoint(tmp_path), resident=True)
    frame, layers = parts.frame, [parts.layer(number) for number in range(DEPTH)]
    before = [weight.clone() for part in (frame, *layers) for weight in part.parameters() if not weight.is_meta]
    scale(parts, PATH, ratios_of(FACTORS))
    after = [weight for part in (frame, *layers) for weight in part.parameters() if not weight.is_meta]
    assert len(after) > 5 * DEPTH
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert not any(module._forward_pre_hooks for part in (frame, *layers) for module in part.modules())


def test_quantiser_that_was_asked_for_is_left_out(saved, tmp_path):
    saved("llama", torch.bfloat16)
    plain, asked = fit(tmp_path, dtype=torch.bfloat16), fit(tmp_path, dtype=torch.bfloat16, quantization_config={"load_in_4bit": True})
    assert all(torch.equal(plain.tensors[name], tensor) for name, tensor in asked.tensors.items())
    assert set(plain.tensors) == set(asked.tensors)


def test_notes_say_each_factor(saved, tmp_path):
    saved("llama")
    assert fit(tmp_path).notes == (
        "hidden states are made 1.700 times as large in place of layers 2-3",
        "hidden states are made 0.600 times as large in place of layer 6",
    )


@pytest.mark.parametrize("name", REFUSED)
def test_family_that_obeys_no_law_is_refused(name, saved, tmp_path):
    saved(name)
    with pytest.raises(DowncycleError, match=f"{REFUSED[name]}.*; try --compensate [^\n]*$") as error:
        fit(tmp_path)
    assert isinstance(error.value, UnsuitableError) == ("by itself" not in REFUSED[name])  # which may be for want of memory


def test_tied_head_without_a_norm_before_it_is_refused(saved, tmp_path):
    saved("opt", tie_word_embeddings=True, _remove_final_layer_norm=True)
    with pytest.raises(DowncycleError, match="its head is its embedding table, and no final norm can take the factor back"):
        fit(tmp_path)


def test_packed_weights_are_refused(saved, tmp_path):
    saved("llama")
    checkpoint = open_checkpoint(tmp_path)
    packed = replace(checkpoint, config={**checkpoint.config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(UnsuitableError, match="its weights are packed"):
        scale(Parts(packed), PATH, ratios_of(FACTORS))


def test_weight_of_two_layers_is_refused(saved, tmp_path):
    saved("llama")
    parts = Parts(open_checkpoint(tmp_path))
    parts.frame.ties["model.layers.5.mlp.down_proj.weight"] = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(DowncycleError, match=r"layer 1 shares mlp.down_proj.weight with another layer"):
        scale(parts, PATH, ratios_of(FACTORS))


@pytest.mark.parametrize("factor", [0.0, inf, nan, -1.0])
def test_factor_that_is_no_size_is_refused(factor, saved, tmp_path):
    saved("llama")
    with pytest.raises(DowncycleError, match="over layers 2-3; use other text"):
        fit(tmp_path, factors={**FACTORS, (2, 4): factor})


def test_numbers_too_large_for_their_dtype_are_refused(saved, tmp_path):
    saved("llama", torch.float16)
    found = fit(tmp_path, factors={**FACTORS, (2, 4): 1e6}, dtype=torch.float16).tensors
    with pytest.raises(DowncycleError, match=r"model.embed_tokens.weight: times 6e\+05 it is more than F16 holds"):
        found["model.embed_tokens.weight"]


def test_runs_of_dropped_layers():
    assert dropped_runs(frozenset({0, 3, 4, 5, 7})) == [(0, 1), (3, 6), (7, 8)]
    assert dropped_runs(frozenset()) == []


def batches_of(count=4):
    ids = torch.randint(10, 60, (count, 2, 13), generator=torch.Generator().manual_seed(4))
    return [Batch(one.numpy(), (1, 1), (number, number)) for number, one in enumerate(ids)]


@pytest.fixture
def whole(saved, tmp_path):
    """A tiny Llama, and the mean size of each channel of its hidden states at each depth, [depths, channels], as transformers has them."""
    model = saved("llama")
    entered = [[] for _ in range(DEPTH)]
    layers = model.model.layers
    hooks = [layer.register_forward_pre_hook(lambda _, args, to=to: to.append(args[0])) for layer, to in zip(layers, entered, strict=True)]
    left = []
    hooks.append(layers[-1].register_forward_hook(lambda _, args, output: left.append(output)))
    with torch.no_grad():
        for batch in batches_of():
            model(input_ids=torch.from_numpy(batch.ids))
    for hook in hooks:
        hook.remove()
    return model, torch.stack([torch.cat(states).double().abs().mean((0, 1)) for states in (*entered, left)])


def observed(folder, observer, batches):
    run_paths(Parts(open_checkpoint(folder)), batches, [WHOLE], States(folder / "states"), observers=[observer])
    return observer


def test_ratios_are_those_of_the_hidden_states(whole, tmp_path):
    _, sizes = whole
    found = torch.tensor(observed(tmp_path, ChannelMagnitudes(DEPTH), batches_of()).ratios())
    wanted = torch.stack([(sizes / size).mean(1) for size in sizes])
    assert found.shape == (DEPTH + 1, DEPTH + 1)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=0)
    assert (found[0, 1:] > 1.05).all()  # they grow


def test_ratios_go_on_from_notes(tmp_path):
    states = torch.randn(3, 4, 2, 5, 6, generator=torch.Generator().manual_seed(5))  # depths, batches, samples, tokens, channels
    whole, resumed = ChannelMagnitudes(2), ChannelMagnitudes(2)
    for number in range(2):
        torch.save(resumed.notes(), tmp_path / "notes")
        resumed = ChannelMagnitudes(2)
        resumed.recall(torch.load(tmp_path / "notes", weights_only=True))
        for batch in range(4):
            for observer in (whole, resumed):
                observer.see(number, states[number, batch], states[number + 1, batch])
    assert resumed.ratios() == whole.ratios()


def test_ratios_leave_out_dead_channels_and_layers_that_are_not_run():
    observer = ChannelMagnitudes(2)
    observer.see(0, torch.tensor([[[1.0, 0.0, -2.0]]]), torch.tensor([[[3.0, 5.0, 2.0]]]))
    assert observer.ratios() == [[1.0, 2.0, 2.0], [pytest.approx(4 / 9), 1.0, 1.0], [pytest.approx(4 / 9), 1.0, 1.0]]


def test_hidden_states_behind_the_cut_have_the_size_of_the_parents(whole, tmp_path):
    model, sizes = whole
    ratios = observed(tmp_path, ChannelMagnitudes(DEPTH), batches_of()).ratios()
    parts = Parts(open_checkpoint(tmp_path))
    path = frozenset({3, 4, 5})
    child = child_of(tmp_path, scale(parts, path, ratios), path)
    entered = []
    child.model.layers[3].register_forward_pre_hook(lambda _, args: entered.append(args[0]))  # the parent's layer 6
    with torch.no_grad():
        for batch in batches_of():
            child(input_ids=torch.from_numpy(batch.ids))
    found = torch.cat(entered).double().abs().mean((0, 1))
    assert (found / sizes[3]).mean().item() == pytest.approx((sizes[6] / sizes[3]).mean().item(), rel=1e-3)
    assert (sizes[6] / sizes[3]).mean() > 1.05  # without a factor it would be 1
