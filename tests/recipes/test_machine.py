"""Fitting a batch to GPUs: the total stays as asked, memory fits, and what cannot be split or does not fit is refused with a way out."""

import pytest

from downcycle import DowncycleError
from downcycle.recipes.configs import LLAMA_3_6B, llama_shape
from downcycle.recipes.machine import Machine, check_machine, estimate, fit, parallel_settings
from downcycle.recipes.memory import GIB, model_size, needed_bytes

SIZE = model_size(llama_shape(LLAMA_3_6B))
QLORA = {
    "adapter": "qlora",
    "load_in_4bit": True,
    "lora_target_linear": True,
    "sequence_len": 8192,
    "lora_r": 128,
    "optimizer": "paged_adamw_32bit",
    "gradient_checkpointing": True,
    "liger_fused_linear_cross_entropy": True,
}
LORA = QLORA | {"adapter": "lora", "load_in_4bit": False}
FULL = {"sequence_len": 8192, "optimizer": "adamw_torch_fused", "gradient_checkpointing": True, "liger_fused_linear_cross_entropy": True}


def split(machine: Machine, settings=QLORA, batch=None, micro_batch=2, parallel="auto"):
    return fit(SIZE, settings, machine, batch=batch, default=64, micro_batch=micro_batch, parallel=parallel)


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("memory", [None, 16, 24, 48, 80])
@pytest.mark.parametrize("batch", [16, 64, 48])
def test_the_total_batch_stays_and_memory_fits(gpus, nodes, memory, batch):
    machine = Machine(gpus, memory, nodes)
    settings = QLORA | {"sequence_len": 2048}
    found = split(machine, settings=settings, batch=batch)
    assert found.micro_batch * found.accumulation * machine.world == batch
    if memory:
        assert needed_bytes(found.training) <= memory * GIB * 0.92
        if (
            found.parallel in ("none", "ddp") and found.accumulation % 2 == 0 and found.micro_batch * 2 <= 16
        ):  # a greater one would not have fit
            greater = estimate(SIZE, settings, found.micro_batch * 2, machine, found.parallel)
            assert needed_bytes(greater) > memory * GIB * 0.92


def test_sharding_comes_only_where_one_gpu_is_too_small():
    assert split(Machine(4, 80), LORA).parallel == "ddp"
    assert split(Machine(4, 16), QLORA | {"sequence_len": 1024}).parallel == "ddp"
    assert split(Machine(8, 12), LORA | {"sequence_len": 1024}).parallel == "fsdp2"
    assert split(Machine(8, 80), FULL).parallel == "fsdp2"  # DDP would hold the gradients twice
    assert split(Machine(1, 80)).parallel == "none"
    assert split(Machine(8), FULL).parallel == "fsdp2"  # nothing known of the memory: the careful way
    assert split(Machine(8)).parallel == "ddp"
    assert split(Machine(8, 80), FULL, parallel="zero3").parallel == "zero3"


def test_given_numbers_are_kept():
    assert split(Machine(4, 80), settings=QLORA | {"micro_batch_size": 1}).micro_batch == 1
    both = split(Machine(4, 80), settings=QLORA | {"micro_batch_size": 1, "gradient_accumulation_steps": 3})
    assert (both.micro_batch, both.accumulation) == (1, 3)
    assert split(Machine(4, 80), settings=QLORA | {"gradient_accumulation_steps": 8}).micro_batch == 2


def test_gpus_that_share_a_sequence_count_as_one():
    found = split(Machine(8, 80), settings=QLORA | {"context_parallel_size": 2, "tensor_parallel_size": 2})
    assert (found.replicas, found.batch) == (2, 64)


def test_memory_follows_the_settings_and_not_the_preset():
    def needs(**changes):
        return estimate(SIZE, QLORA | changes, 1, Machine(1), "none")

    base, hidden, layers = needs(), 4096, 24
    assert needs(load_in_4bit=False).weights - base.weights == pytest.approx(SIZE.linear * (2 - 4.127 / 8), rel=1e-3)
    q_and_v = needs(lora_target_linear=False, lora_target_modules=["q_proj", "v_proj"])
    assert q_and_v.gradients == 4 * 128 * layers * (hidden + hidden + hidden + 1024)
    assert needs(lora_target_linear=False, lora_target_modules=r"model\.layers\.0\..*(q|v)_proj").gradients == q_and_v.gradients / layers
    saved = needs(lora_modules_to_save=["embed_tokens", "lm_head"])
    assert saved.gradients - base.gradients == 4 * 2 * SIZE.head
    some = {"adapter": None, "load_in_4bit": False, "unfrozen_parameters": ["^lm_head.weight$[:100]", "^model.layers.2[0-9]."]}
    assert needs(**some).gradients == 2 * (SIZE.head + 4 * SIZE.layer_elements[0])
    assert needs(**some | {"unfrozen_parameters": None}).gradients == 2 * SIZE.elements
    assert needs(val_set_size=0.01, eval_batch_size=2).evaluation > needs(val_set_size=0.01, eval_batch_size=1).evaluation > 0


def test_without_memory_the_preset_is_kept_and_a_cpu_needs_no_estimate():
    found = split(Machine(4))
    assert (found.micro_batch, found.accumulation) == (2, 8)
    assert split(Machine(0)).training is None


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: split(Machine(3, 80)), "give --batch 63 or 66"),
        (lambda: split(Machine(128, 80)), "give --batch 128"),
        (lambda: split(Machine(1, 24), FULL), r"does not fit: full .* of which 24 GB have 22.1 GiB for it; what would fit: --preset qlora"),
        (lambda: split(Machine(1, 12)), "does not fit: qlora .*; what would fit: --gpus 4$"),
        (lambda: split(Machine(4, 20), FULL), "what would fit: .*--set fsdp_config.offload_params=true"),
        (lambda: split(Machine(1, 2)), "it needs larger GPUs, or a smaller model"),
        (lambda: split(Machine(2, 48), FULL, parallel="ddp"), "what would fit: --preset qlora, or --parallel fsdp2, or --gpus 4"),
        (lambda: split(Machine(4, 80), settings=QLORA | {"micro_batch_size": 2, "gradient_accumulation_steps": 3}, batch=64), "ask for 24"),
        (lambda: split(Machine(4, 80), settings=QLORA | {"context_parallel_size": 3}), "is 3, which does not divide 4 GPUs"),
        (lambda: split(Machine(1, 80), batch=0), "--batch 0: give whole numbers"),
        (lambda: split(Machine(1, 80), settings=QLORA | {"micro_batch_size": 5}), "which micro_batch_size 5 does not divide"),
        (lambda: split(Machine(1, 80), settings=QLORA | {"micro_batch_size": "2"}), "micro_batch_size 2: give whole numbers"),
        (lambda: split(Machine(1, 80), batch=-64), "--batch -64"),
        (lambda: split(Machine(1, 80), settings=QLORA | {"gradient_accumulation_steps": 0}), "gradient_accumulation_steps"),
        (lambda: check_machine(Machine(-1), "auto"), "--gpus -1"),
        (lambda: check_machine(Machine(1, None, 0), "auto"), "--nodes 0"),
        (lambda: check_machine(Machine(0, None, 2), "auto"), "one CPU only"),
        (lambda: check_machine(Machine(1, 0.5), "auto"), "--gpu-memory 0.5"),
        (lambda: check_machine(Machine(1, 48e9), "auto"), "--gpu-memory"),
        (lambda: check_machine(Machine(1, 48, 1, "a100"), "auto"), "GPU architecture a100: no compute capability; give one like"),
        (lambda: check_machine(Machine(4), "fsdp"), "--parallel fsdp: choose one of"),
        (lambda: check_machine(Machine(1), "fsdp2"), "there is one GPU"),
    ],
)
def test_refusals_name_a_way_out(call, said):
    with pytest.raises(DowncycleError, match=said):
        call()


def test_fsdp2_loads_quantised_weights_on_every_rank():
    assert parallel_settings("fsdp2", {"load_in_4bit": True})["fsdp_config"]["cpu_ram_efficient_loading"] is False
    assert parallel_settings("fsdp2", {})["fsdp_config"]["cpu_ram_efficient_loading"] is True
    assert parallel_settings("ddp", {}) == parallel_settings("none", {}) == {}
    assert parallel_settings("zero3", {})["deepspeed"]["zero_optimization"]["stage"] == 3
