"""Memory estimates against published figures, against what bitsandbytes and PEFT hold, and against measured peaks."""

import pytest

from downcycle import open_checkpoint
from downcycle.recipes.configs import LLAMA_3_6B, llama_shape
from downcycle.recipes.memory import (
    GIB,
    NF4_BITS,
    format_gib,
    kv_cache_bytes,
    memory_table,
    model_size,
    training_bytes,
    weight_bytes,
)

LLAMA_8B = LLAMA_3_6B | {"num_hidden_layers": 32}
LLAMA_70B = LLAMA_3_6B | {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}


# Published for Llama 3.1 in fp16; "16k" and "128k" are thousands there.
@pytest.mark.parametrize(
    ("config", "published"),
    [
        (LLAMA_8B, {1024: 0.125, 16_000: 1.95, 128_000: 15.62}),
        (LLAMA_70B, {1024: 0.313, 16_000: 4.88, 128_000: 39.06}),
    ],
    ids=["8B", "70B"],
)
def test_kv_cache_as_published(config, published):
    size = model_size(llama_shape(config))
    for tokens, gib in published.items():
        assert kv_cache_bytes(size, tokens) / GIB == pytest.approx(gib, abs=0.006)


def test_parameters_of_the_published_models():
    size = model_size(llama_shape(LLAMA_3_6B))
    assert size.elements == 6_285_365_248
    assert size.linear == 24 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336)
    assert size.head == 4096 * 128256
    assert size.cache == ((2 * 8 * 128, 0),) * 24
    assert weight_bytes(size, "bf16") == 2 * 6_285_365_248
    assert weight_bytes(size, "fp32") == 4 * 6_285_365_248


def test_a_windowed_layer_keeps_its_window_and_a_linear_one_nothing():
    config = LLAMA_8B | {"num_hidden_layers": 4, "sliding_window": 1000}
    config["layer_types"] = ["sliding_attention", "full_attention", "linear_attention", "sliding_attention"]
    size = model_size(llama_shape(config))
    each = 2 * 8 * 128 * 2
    assert kv_cache_bytes(size, 500) == 3 * 500 * each
    assert kv_cache_bytes(size, 5000) == (1000 + 5000 + 1000) * each


def test_a_window_that_layer_types_do_not_share_out_binds_all_layers_of_mistral_only():
    wide = llama_shape(LLAMA_8B | {"sliding_window": 1000})
    mistral = llama_shape(LLAMA_8B | {"sliding_window": 1000, "model_type": "mistral"})
    assert kv_cache_bytes(model_size(wide), 4000) == 4 * kv_cache_bytes(model_size(mistral), 4000)


def test_experts_count_whole_as_weights_and_by_share_as_activations():
    config = LLAMA_8B | {"num_hidden_layers": 1, "num_local_experts": 4, "num_experts_per_tok": 1}
    dense = llama_shape(config)
    experts = {f"model.layers.0.mlp.experts.{n}.up_proj.weight": dense.tensors["model.layers.0.mlp.up_proj.weight"] for n in range(4)}
    size = model_size(type(dense)(dense.name, config, {**dense.tensors, **experts}))
    assert size.linear - model_size(dense).linear == 4 * 14336 * 4096
    assert size.layer_outputs - model_size(dense).layer_outputs == 14336
    assert size.lora_width() == model_size(dense).lora_width()  # LoRA's linear targets are dense matrices


def test_training_by_hand():
    size = model_size(llama_shape(LLAMA_8B))
    whole = size.elements
    full = training_bytes(size, tokens=8192, trained=whole, fused_loss=True)
    assert (full.weights, full.gradients, full.optimizer) == (2 * whole, 2 * whole, 4 * whole)
    assert training_bytes(size, tokens=8192, trained=whole, adam_bits=32).optimizer == 8 * whole
    gathered = 2 * (max(size.layer_elements) + size.head)
    fsdp = training_bytes(size, tokens=8192, trained=whole, parallel="fsdp2", shards=8)
    assert (fsdp.weights, fsdp.gradients, fsdp.optimizer) == (whole / 4 + gathered, whole / 4, whole / 2)
    away = training_bytes(size, tokens=8192, trained=whole, parallel="fsdp2", shards=8, offloaded=True)
    assert (away.weights, away.gradients, away.optimizer) == (gathered, 0, 0)
    zero = training_bytes(size, tokens=8192, trained=whole, parallel="zero3", shards=8)
    assert (zero.weights, zero.gradients, zero.optimizer) == (whole / 4 + gathered, whole / 4, 12 * whole / 8)
    assert training_bytes(size, tokens=8192, trained=whole, parallel="ddp", shards=8).gradients == 2 * full.gradients
    adapters = 128 * size.lora_width()
    lora = training_bytes(size, tokens=8192, added=adapters)
    assert (lora.weights, lora.gradients, lora.optimizer) == (2 * whole + 4 * adapters, 4 * adapters, 8 * adapters)
    assert lora.logits == 8192 * 128256 * 12
    part = size.head + 3 * size.layer_elements[0]
    assert training_bytes(size, tokens=8192, trained=part).optimizer == 4 * part
    assert full.total == sum(vars(full).values())


def test_evaluation_stores_the_logits_that_training_does_not():
    size = model_size(llama_shape(LLAMA_8B))
    options = {"tokens": 8192, "added": 128 * size.lora_width(), "frozen": "nf4", "fused_loss": True}
    trains, evaluates = training_bytes(size, **options), training_bytes(size, **options, evaluated=8192)
    assert trains.evaluation == 0
    assert evaluates.total - trains.total == 8192 * 128256 * 10 - trains.activations - trains.logits
    assert training_bytes(size, **(options | {"fused_loss": False}), evaluated=8192).evaluation == 0  # training stores more


def test_sharded_nf4_weights_are_loaded_whole_first():
    size = model_size(llama_shape(LLAMA_70B))
    needs = training_bytes(size, tokens=2048, added=16 * size.lora_width(), frozen="nf4", fused_loss=True, parallel="fsdp2", shards=8)
    assert needs.total == pytest.approx(weight_bytes(size, "nf4") + needs.overhead)
    assert training_bytes(size, tokens=2048, trained=size.elements, parallel="fsdp2", shards=8).loading == 0


def test_less_is_less():
    size = model_size(llama_shape(LLAMA_8B))
    lora = {"added": 128 * size.lora_width()}
    ways = ({"trained": size.elements}, {"trained": size.elements // 4}, lora, lora | {"frozen": "int8"}, lora | {"frozen": "nf4"})
    totals = [training_bytes(size, tokens=8192, **way).total for way in ways]
    assert totals == sorted(totals, reverse=True)
    assert weight_bytes(size, "nf4") < weight_bytes(size, "int8") < weight_bytes(size, "bf16")


def test_packed_weights_are_not_reckoned_anew(make, tmp_path):
    make(tmp_path / "m", config={"quantization_config": {"quant_method": "gptq"}, "num_attention_heads": 2})
    table = memory_table(model_size(open_checkpoint(tmp_path / "m")))
    assert table.keys() == {"kv_cache"}


def test_spelling():
    assert (format_gib(GIB), format_gib(15.625 * GIB), format_gib(2**20)) == ("1 GiB", "15.6 GiB", "1 MiB")


def test_nf4_and_int8_against_what_bitsandbytes_holds():
    torch = pytest.importorskip("torch")
    bnb = pytest.importorskip("bitsandbytes")
    matrix = torch.randn(1024, 2048)
    nf4 = bnb.nn.Params4bit(matrix, requires_grad=False, quant_type="nf4", compress_statistics=True).to("cpu")
    state = nf4.quant_state
    held = nf4.data.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert held == pytest.approx(matrix.numel() * NF4_BITS / 8, rel=1e-6)
    int8, scales, _ = bnb.functional.int8_vectorwise_quant(matrix.to(torch.float16))
    assert int8.nbytes + scales.nbytes == matrix.numel() + 4 * 1024


def test_lora_parameters_against_peft():
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from downcycle import load_model

    demo = open_checkpoint("demo")
    model = peft.get_peft_model(load_model(demo), peft.LoraConfig(r=7, target_modules="all-linear"))
    assert model.get_nb_trainable_parameters()[0] == 7 * model_size(demo).lora_width()


@pytest.mark.parametrize(("layers", "vocab", "tokens"), [(2, 512, 512), (8, 512, 512), (2, 8192, 512), (4, 4096, 1024)])
def test_activations_and_logits_against_a_measured_peak(layers, vocab, tokens):
    pytest.importorskip("torch")
    measured = measured_peak(layers, vocab, tokens)
    config = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": layers, "vocab_size": vocab}
    size = model_size(llama_shape(config | {"num_attention_heads": 4, "num_key_value_heads": 1}))
    needs = training_bytes(size, tokens=tokens)
    # the layer's peak comes after the logits' one: the greater of both, and what is stored, is what is reached
    assert measured == pytest.approx(max(needs.activations, needs.logits), rel=0.25)
    assert needs.activations + needs.logits > 0.95 * measured


@pytest.mark.parametrize("wide", [True, False], ids=["float32 between layers", "bf16 between layers"])
@pytest.mark.parametrize(("layers", "vocab", "tokens"), [(2, 512, 512), (8, 512, 512), (2, 512, 2048)])
def test_ternary_activations_against_a_measured_peak(layers, vocab, tokens, wide):
    pytest.importorskip("torch")
    measured = measured_peak(layers, vocab, tokens, "wide" if wide else "gathered")
    config = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": layers, "vocab_size": vocab}
    size = model_size(llama_shape(config | {"num_attention_heads": 4, "num_key_value_heads": 1}))
    sharded = {} if wide else {"parallel": "fsdp2", "shards": 8}
    needs = training_bytes(size, tokens=tokens, trained=size.elements, ternary=True, **sharded)
    assert measured == pytest.approx(needs.activations, rel=0.2)
    plain = training_bytes(size, tokens=tokens, trained=size.elements, **sharded)
    assert measured > 1.3 * plain.activations  # which the ternary maps alone explain


def test_ternary_training_by_hand():
    size = model_size(llama_shape(LLAMA_8B))
    whole, linear = size.elements, 4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336
    plain = training_bytes(size, tokens=8192, trained=whole, fused_loss=True)
    alone = training_bytes(size, tokens=8192, trained=whole, fused_loss=True, ternary=True)
    assert (alone.weights, alone.gradients, alone.optimizer) == (4 * whole, 4 * whole, 8 * whole)
    assert training_bytes(size, tokens=8192, trained=whole, ternary=True, adam_bits=8).optimizer == 2 * whole
    assert training_bytes(size, tokens=8192, trained=whole, ternary=True, parallel="ddp", shards=8).gradients == 8 * whole
    sharded = training_bytes(size, tokens=8192, trained=whole, ternary=True, parallel="fsdp2", shards=8)
    gathered = 2 * (max(size.layer_elements) + size.head)  # FSDP2 gathers weights in bf16
    assert (sharded.weights, sharded.gradients, sharded.optimizer) == (whole / 2 + gathered, whole / 2, whole)
    inputs = 8192 * 4 * (6 * 4096 + 14336)  # what seven maps of a layer take
    rounded = 2 * (linear + 2 * 4096) + 4 * 4096 * 14336
    assert sharded.activations - plain.activations == inputs + rounded
    wider = 8192 * 4096 * (32 * 2 + 8)  # between layers, and in one, float32
    assert alone.activations - plain.activations == inputs + rounded + wider
    taught = training_bytes(size, tokens=8192, trained=whole, ternary=True, teacher=True)
    untaught = training_bytes(size, tokens=8192, trained=whole, ternary=True)
    assert (taught.weights - untaught.weights, taught.logits - untaught.logits) == (2 * whole, 8192 * 128256 * 4)


def measured_peak(layers: int, vocab: int, tokens: int, ternary: str = "") -> int:
    """Bytes that one step of a Llama with checkpointing allocates at its peak, by the profiler's or CUDA's count.

    A frozen one in bf16, or a ternary one whose gradients are there already: `wide` with float32 weights under autocast, `gathered` with
    weights in bf16, as FSDP2 gathers them.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64}
    config = LlamaConfig(num_hidden_layers=layers, vocab_size=vocab, use_cache=False, **shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autocast = torch.autocast(device, torch.bfloat16, enabled=ternary == "wide")
    model = LlamaForCausalLM(config).to(device, torch.bfloat16).train().requires_grad_(False)
    model.enable_input_require_grads()
    if ternary:
        make_ternary(model.float() if ternary == "wide" else model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    text = torch.randint(0, vocab, (1, tokens), device=device)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with autocast:
            loss = model(input_ids=text, labels=text).loss
        loss.backward()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with autocast:
            loss = model(input_ids=text, labels=text).loss
        loss.backward()
    events = sorted(
        (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"), key=lambda event: event.start_ns()
    )
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def make_ternary(model):
    """Make a model's decoder ternary, and all of it trained, with gradients."""
    import torch

    from downcycle.surgery.ternary.bitlinear import convert, set_strength

    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            convert(module)
    set_strength(model, 1.0)
    for parameter in model.requires_grad_(True).parameters():
        parameter.grad = torch.zeros_like(parameter)
