"""Which maps write into the stream: as the families' own code says, and by changing a weight and looking at what leaves the layer."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from downcycle.surgery.compensation.output import Writer, find_writers  # noqa: E402
from downcycle.surgery.importance.pruned import find_stack  # noqa: E402

from tiny_models import FAMILIES, inputs, tiny_model  # noqa: E402

DEPTH = 8
LLAMA = [Writer("self_attn.o_proj", 1.0, "post_attention_layernorm"), Writer("mlp.down_proj", 1.0)]
GPT2 = [Writer("attn.c_proj", 1.0, "ln_2"), Writer("mlp.c_proj", 1.0)]
ATTENTION = LLAMA[:1]
SHARED = [*ATTENTION, Writer("mlp.shared_experts.down_proj", 1.0)]
GEMMA = [
    Writer("post_attention_layernorm", 1.0, "pre_feedforward_layernorm", norm=True, offset=1.0),
    Writer("post_feedforward_layernorm", 1.0, norm=True, offset=1.0),
]
# layer of a family: what its source says
EXPECTED = {
    ("llama", 0): LLAMA,
    ("qwen3", 5): LLAMA,
    ("gpt2", 2): GPT2,
    ("gpt_neox", 1): [Writer("attention.dense", 1.0), Writer("mlp.dense_4h_to_h", 1.0)],
    ("gptj", 1): [Writer("attn.out_proj", 1.0), Writer("mlp.fc_out", 1.0)],
    ("falcon", 1): [Writer("self_attention.dense", 1.0), Writer("mlp.dense_4h_to_h", 1.0)],
    ("phi", 1): [Writer("self_attn.dense", 1.0), Writer("mlp.fc2", 1.0)],
    ("opt", 1): [Writer("self_attn.out_proj", 1.0, "final_layer_norm"), Writer("fc2", 1.0)],  # fc2 sees batch and tokens as one
    ("longcat_flash", 5): [Writer("self_attn.0.o_proj", 1.0, "post_attention_layernorm.0"), Writer("mlps.1.down_proj", 1.0)],
    ("mamba2", 3): [Writer("mixer.out_proj", 1.0)],
    ("deepseek_v3", 0): LLAMA,
    ("deepseek_v3", 4): SHARED,
    ("qwen2_moe", 1): ATTENTION,  # what its shared expert gives is multiplied by another number for each token
    ("mixtral", 1): ATTENTION,
    ("gpt_oss", 1): ATTENTION,
    ("gemma2", 1): GEMMA,
    ("olmo2", 1): [
        Writer("post_attention_layernorm", 1.0, "mlp.gate_proj", norm=True),
        Writer("post_feedforward_layernorm", 1.0, norm=True),
    ],
    ("bert", 1): [Writer("attention.output.dense", 1.0, "attention.output.LayerNorm"), Writer("output.LayerNorm", 1.0, norm=True)],
}


def hidden(returned):
    return returned[0] if isinstance(returned, tuple) else returned


def take(model, number):
    """A layer of a model, and how to run it on what the model gives it."""
    layer, given = model.requires_grad_(False).get_submodule(find_stack(model, DEPTH))[number], []
    handle = layer.register_forward_pre_hook(lambda module, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(**inputs(model), use_cache=False)
    handle.remove()
    args, kwargs = given[0]

    def run():
        with torch.no_grad():
            return hidden(layer(*args, **kwargs))

    return layer, run


def round_off(writers):
    return [Writer(one.name, round(one.coefficient, 4), one.at, one.norm, one.offset) for one in writers]


@pytest.mark.parametrize(("family", "number"), EXPECTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_writers_are_those_of_the_family(family, number, dtype):
    if family not in FAMILIES:
        pytest.skip("this transformers does not know it")
    layer, run = take(tiny_model(family).to(dtype), number)
    assert round_off(find_writers(layer, run)) == EXPECTED[family, number]


def test_constant_factor_of_the_residual_is_measured():
    layer, run = take(tiny_model("granite"), 2)
    layer.residual_multiplier = 0.22
    assert round_off(find_writers(layer, run)) == [Writer(one.name, 0.22, one.at) for one in LLAMA]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "minicpm3", "mamba2", "deepseek_v3"])
def test_layer_moves_by_what_a_change_of_the_weight_says(family):
    """That is the law that a fit relies on: h' = h + c A D^T."""
    layer, run = take(tiny_model(family), 3)
    writers = [one for one in find_writers(layer, run) if not one.at]
    assert writers
    for writer in writers:
        module, seen = layer.get_submodule(writer.name), []
        handle = module.register_forward_hook(lambda module, args, output, seen=seen: seen.append(args[0]))
        before = run()
        handle.remove()
        weight = module.weight
        change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype)
        weight.data += change
        moved = run() - before
        weight.data -= change
        wanted = writer.coefficient * (seen[0] @ (change if family == "gpt2" else change.T))
        torch.testing.assert_close(moved, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_layer_moves_by_what_a_change_of_a_norm_says(family):
    layer, run = take(tiny_model(family).double(), 3)
    (writer,) = [one for one in find_writers(layer, run) if not one.at]
    norm, gave = layer.get_submodule(writer.name), []
    handle = norm.register_forward_hook(lambda module, args, output: gave.append(output))
    before = run()
    handle.remove()
    factors = torch.linspace(0.5, 2, before.shape[-1], dtype=before.dtype)
    norm.weight.data = (norm.weight.data + writer.offset) * factors - writer.offset
    torch.testing.assert_close(run() - before, writer.coefficient * gave[0] * (factors - 1), rtol=1e-5, atol=1e-6)


def test_offset_of_a_norm_with_a_bias():
    """Nemotron's multiplies by 1 + w and adds b."""
    layer, run = take(tiny_model("nemotron"), 1)
    layer.mlp.down_proj = torch.nn.Sequential(layer.mlp.down_proj, type(layer.input_layernorm)(32))
    with torch.no_grad():
        for value in layer.mlp.down_proj[1].parameters():
            value.normal_(generator=torch.Generator().manual_seed(0))
            value.requires_grad_(False)
    found = round_off(find_writers(layer, run))
    assert found[-1] == Writer("mlp.down_proj.1", 1.0, norm=True, offset=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_mlp_and_huge_token_do_not_hide_that_attention_goes_through_the_mlp(dtype):
    """Trained models have a first token a thousand times as large as the others, beside which what an MLP adds is nothing."""
    model = tiny_model("llama")
    layer, _ = take(model, 1)
    layer.mlp.down_proj.weight.data *= 0.05
    model.model.embed_tokens.weight.data[inputs(model)["input_ids"][0, 0]] *= 3000
    layer, run = take(model.to(dtype), 1)
    assert round_off(find_writers(layer, run)) == LLAMA


def test_layer_is_left_as_it_was():
    layer, run = take(tiny_model("gemma2").to(torch.bfloat16), 1)
    before = {name: (value, value.data_ptr(), value.clone()) for name, value in layer.state_dict(keep_vars=True).items()}
    output = run()
    find_writers(layer, run)
    for name, value in layer.state_dict(keep_vars=True).items():
        same, place, values = before[name]
        assert value is same and value.data_ptr() == place and value.dtype == values.dtype and torch.equal(value, values)
    assert torch.equal(run(), output) and run().dtype == torch.bfloat16
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())


def test_layer_is_left_as_it_was_after_a_failure():
    layer, run = take(tiny_model("llama").to(torch.bfloat16), 1)
    runs = []

    def fail():
        runs.append(1)
        if len(runs) > 1:
            raise RuntimeError("no memory")
        return run()

    with pytest.raises(RuntimeError, match="no memory"):
        find_writers(layer, fail)
    assert {value.dtype for value in layer.parameters()} == {torch.bfloat16}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())


def test_map_that_rounds_its_inputs_is_none():
    class Rounding(torch.nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs.sign())

    layer, run = take(tiny_model("llama"), 1)
    rounding = Rounding(48, 32, bias=False)
    rounding.weight = layer.mlp.down_proj.weight
    layer.mlp.down_proj = rounding
    assert round_off(find_writers(layer, run)) == ATTENTION


def test_packed_weights_are_none():
    layer, run = take(tiny_model("llama"), 1)
    for module in (layer.mlp.down_proj, layer.self_attn.o_proj):
        whole = module.weight.data
        del module._parameters["weight"]
        module.register_buffer("weight", (whole * 100).to(torch.int8))
        module.forward = lambda inputs, module=module: inputs @ (module.weight.float() / 100).T
    assert find_writers(layer, run) == []


def test_several_streams_have_no_writer():
    if "deepseek_v4" not in FAMILIES:
        pytest.skip("this transformers does not know it")
    layer, run = take(tiny_model("deepseek_v4"), 2)
    assert find_writers(layer, run) == []
