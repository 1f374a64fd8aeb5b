"""Every broken config is named broken by the right words and no others; every good one passes; Axolotl itself is the oracle."""

import copy
import json
import re
import time
from pathlib import Path

import pytest

from downcycle.recipes.validation import axolotl_schema
from downcycle.recipes.validation.check import check_file, check_keys, conflicts, read_config, validate
from downcycle.recipes.validation.conflicts import HANDED_ON
from downcycle.recipes.validation.data_conflicts import FILE_TYPES
from downcycle.recipes.validation.hardware import capabilities
from downcycle.recipes.validation.names import FOREIGN_NAMES, MAPPED, STILL_READ, modern, notes, replacements
from downcycle.recipes.validation.sharding import assumed_gpus
from downcycle.surgery.errors import DowncycleError

from good_configs import BASE, FSDP, GOOD, LORA, NO_DATA, QLORA, STREAM, WITH_PLUGINS, good

BROKEN = sorted((Path(__file__).parent / "broken").glob("*.yaml"))
LIGER, CUT = "axolotl.integrations.liger.LigerPlugin", "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"
STREAMED = NO_DATA | STREAM | {"max_steps": 9}
PACKED = {"sample_packing": True}

# what is wrong: (config, the one fault, whether Axolotl refuses the config too)
FAULTS = {
    "no base_model": ({"learning_rate": 1e-4, "datasets": BASE["datasets"]}, "base_model: missing", True),
    "no rate": ({key: value for key, value in BASE.items() if key != "learning_rate"}, "learning_rate: missing", True),
    "no data": (NO_DATA, "datasets: missing", True),
    "rate is a word": (BASE | {"learning_rate": "fast"}, "learning_rate: 'fast' where a number above 0", True),
    "rate is 0": (BASE | {"learning_rate": 0}, "learning_rate: 0 where a number above 0", False),
    "empty sequence_len": (BASE | {"sequence_len": None}, "sequence_len: nothing where a whole number is needed", True),
    "empty tokenizer_config": (BASE | {"tokenizer_config": None}, "tokenizer_config: empty, which crashes Axolotl", True),
    "empty batch": (BASE | {"micro_batch_size": None}, "micro_batch_size: empty, which crashes Axolotl", False),
    "empty dataset": (BASE | {"datasets": [None]}, "datasets[0]: nothing where", True),
    "datasets beside a stream": (STREAMED | {"datasets": None}, "datasets: empty, which crashes Axolotl", True),
    "datasets is a mapping": (BASE | {"datasets": {"path": "a"}}, "datasets: a mapping where a list is needed", True),
    "no datasets in the list": (BASE | {"datasets": []}, "datasets: 0 entries where at least 1", True),
    "dataset without path": (BASE | {"datasets": [{"type": "completion"}]}, "datasets[0].path: missing", False),
    "text for a number": (BASE | {"num_epochs": "two"}, "num_epochs: 'two' where a number is needed", True),
    "part of a step": (BASE | {"warmup_steps": 0.5}, "warmup_steps: 0.5 where a whole number is needed", True),
    "truth for a number": (LORA | {"lora_r": True}, "lora_r: true where a whole number is needed", False),
    "number for text": (BASE | {"wandb_project": 12}, "wandb_project: 12 where text is needed", True),
    "number for truth": (BASE | {"group_by_length": 2}, "group_by_length: 2 where true or false is needed", True),
    "text for a list": (BASE | {"unfrozen_parameters": "lm_head"}, "unfrozen_parameters: 'lm_head' where a list is needed", True),
    "bf16 full": (BASE | {"bf16": "full"}, "bf16: 'full' where auto or true or false is needed", True),
    "wrap policy": (
        BASE | {"fsdp_version": 2, "fsdp_config": {"auto_wrap_policy": "TRANSFORMER_BASED"}},
        "fsdp_config.auto_wrap_policy: 'TRANSFORMER_BASED' where TRANSFORMER_BASED_WRAP or SIZE_BASED_WRAP is needed",
        True,
    ),
    "prune ratio": (LORA | {"relora_prune_ratio": 1.5}, "relora_prune_ratio: 1.5 where at most 1.0 is needed", True),
    "qat dtype": (BASE | {"qat": {"weight_dtype": "int2"}}, "qat.weight_dtype: 'int2' is none of", True),
    "fsdp prefix": (
        BASE | {"fsdp_version": 2, "fsdp_config": {"fsdp_offload_params": "maybe"}},
        "fsdp_config.fsdp_offload_params: 'maybe' where true or false is needed",
        True,
    ),
    "optimizer": (BASE | {"optimizer": "adamw_tosh"}, "optimizer: 'adamw_tosh' is none", False),
    "scheduler": (
        BASE | {"lr_scheduler": "cosin"},
        "lr_scheduler: 'cosin' is none that Axolotl or transformers know; did you mean cosine?",
        False,
    ),
    "dataset type": (
        BASE | {"datasets": [{"path": "a", "type": "completions"}]},
        "datasets[0].type: 'completions' is no prompt strategy",
        False,
    ),
    "sharegpt": (BASE | {"datasets": [{"path": "a", "type": "sharegpt"}]}, "write chat_template", True),
    "pretrain as a dataset": (BASE | {"datasets": [{"path": "a", "type": "pretrain"}]}, "write completion", False),
    "model type": (BASE | {"model_type": "LlamaForCausalLm"}, "did you mean LlamaForCausalLM?", False),
    "tokenizer type": (BASE | {"tokenizer_type": "AutoTokeniser"}, "did you mean AutoTokenizer?", False),
    "attention": (BASE | {"attn_implementation": "flash"}, "attn_implementation: 'flash' is none", True),
    "adapter": (LORA | {"adapter": "loora"}, "adapter: 'loora' is none that Axolotl knows", True),
    "strategy": (BASE | {"save_strategy": "always"}, "save_strategy: 'always' is none", False),
    "warmups": (BASE | {"warmup_steps": 10, "warmup_ratio": 0.1}, "warmup_steps: not together with warmup_ratio", True),
    "saves": (BASE | {"save_steps": 10, "saves_per_epoch": 2}, "save_steps: not together with saves_per_epoch", True),
    "evaluations": (BASE | {"val_set_size": 0.1, "test_datasets": BASE["datasets"]}, "val_set_size: not together with test_datasets", True),
    "all held out": (BASE | {"val_set_size": 1}, "val_set_size: 1 leaves nothing to train on", False),
    "two sources": (BASE | STREAM | {"max_steps": 9}, "datasets: not together with pretraining_dataset", False),
    "no rank": (BASE | {"adapter": "lora", "lora_alpha": 8, "lora_target_linear": True}, "lora_r: missing", False),
    "no target": (BASE | {"adapter": "lora", "lora_alpha": 8, "lora_r": 8}, "lora_target_linear: adapter: lora has no target", False),
    "new tokens": (LORA | {"tokens": ["<a>"]}, "tokens: new tokens with an adapter need lora_modules_to_save", False),
    "rank without adapter": (BASE | {"lora_r": 8}, "lora_r: does nothing without an adapter", False),
    "dora without adapter": (BASE | {"peft_use_dora": True}, "peft_use_dora: does nothing without an adapter", False),
    "qlora unpacked": (LORA | {"adapter": "qlora"}, "load_in_4bit: adapter: qlora needs", True),
    "lora packed": (LORA | {"load_in_4bit": True}, "load_in_4bit: Axolotl ignores it with adapter: lora", False),
    "qlora in 8 bit": (LORA | {"adapter": "qlora", "load_in_8bit": True}, "load_in_8bit: not with adapter: qlora", True),
    "packed, no adapter": (BASE | {"load_in_4bit": True}, "load_in_4bit: packed weights cannot be trained", True),
    "loftq": (QLORA | {"peft": {"loftq_config": {"loftq_bits": 4}}}, "peft.loftq_config: LoftQ packs whole weights itself", False),
    "unfrozen": (LORA | {"unfrozen_parameters": ["lm_head"]}, "unfrozen_parameters: freezes an adapter's own weights", False),
    "unfrozen by escaped dots": (BASE | {"unfrozen_parameters": [r"^lm_head\.weight$"]}, "matches nothing, since Axolotl escapes", False),
    "unfrozen by nonsense": (BASE | {"unfrozen_parameters": ["layers.[0-"]}, "is no regular expression", False),
    "some layers of a text": (
        {key: value for key, value in LORA.items() if key != "lora_target_linear"}
        | {"lora_target_modules": "all-linear", "peft_layers_to_transform": [1]},
        "peft_layers_to_transform: PEFT refuses it",
        False,
    ),
    "relora in 4 bit": (QLORA | {"relora": True, "jagged_restart_steps": 9}, "relora: fails with adapter: qlora", False),
    "relora without restarts": (LORA | {"relora": True}, "jagged_restart_steps: missing", True),
    "stream and share": (
        BASE | {"streaming": True, "max_steps": 9, "val_set_size": 0.1},
        "val_set_size: cannot be split off a stream",
        True,
    ),
    "endless stream": (BASE | {"streaming": True}, "max_steps: missing", True),
    "unread test set": (
        BASE | {"streaming": True, "max_steps": 9, "test_datasets": BASE["datasets"]},
        "test_datasets: not read while streaming",
        False,
    ),
    "unread column": (
        NO_DATA
        | PACKED
        | {"attn_implementation": "sdpa", "max_steps": 9, "pretraining_dataset": [{"path": "a", "type": "completion", "text_column": "t"}]},
        "pretraining_dataset[0].text_column: not read with type: completion",
        False,
    ),
    "best model unsaved": (BASE | {"val_set_size": 9, "load_best_model_at_end": True}, "load_best_model_at_end: Axolotl ignores it", False),
    "best model between": (
        BASE | {"val_set_size": 9, "load_best_model_at_end": True, "save_steps": 30, "eval_steps": 20},
        "eval_steps: 20 does not divide 30 (save_steps)",
        False,
    ),
    "best by nothing": (BASE | {"val_set_size": 9, "save_strategy": "best"}, "metric_for_best_model: missing", True),
    "packed, no attention": (BASE | PACKED, "attn_implementation: unset lets packed samples see each other", False),
    "floor of another schedule": (
        BASE | {"lr_scheduler": "linear", "cosine_min_lr_ratio": 0.1},
        "cosine_min_lr_ratio: not read with",
        False,
    ),
    "best model between shares": (
        BASE | {"val_set_size": 9, "load_best_model_at_end": True, "save_steps": 0.5, "eval_steps": 0.2},
        "eval_steps: 0.2 does not divide 0.5 (save_steps)",
        False,
    ),
    "best model between saves of an epoch": (
        BASE | {"val_set_size": 9, "load_best_model_at_end": True, "num_epochs": 2, "saves_per_epoch": 2, "evals_per_epoch": 3},
        "evals_per_epoch: 0.1667 does not divide 0.25 (save_steps)",
        False,
    ),
    "two halves": (BASE | {"fp16": True, "bf16": True}, "fp16: not together with bf16; bf16 wins silently", False),
    "lines of json": (
        BASE | {"datasets": [{"path": "a.jsonl", "ds_type": "jsonl"}]},
        "datasets[0].ds_type: 'jsonl' is no kind of file that datasets loads; write json",
        False,
    ),
    "layer class": (
        BASE | FSDP | {"fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecodeLayer"}},
        "transformers has no class LlamaDecodeLayer; did you mean LlamaDecoderLayer?",
        False,
    ),
    "DeepSpeed's batch": (
        BASE | {"micro_batch_size": 2, "deepspeed": {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}}},
        "deepspeed.train_micro_batch_size_per_gpu: 4 where micro_batch_size makes 2",
        False,
    ),
    "DeepSpeed's steps": (BASE | {"deepspeed": {"gradient_accumulation_steps": 8}}, "deepspeed.gradient_accumulation_steps: 8", False),
    "DeepSpeed's whole batch": (BASE | {"deepspeed": {"train_batch_size": 8}}, "deepspeed.train_batch_size: 8 where", False),
    "DeepSpeed's clipping": (BASE | {"max_grad_norm": 0.5, "deepspeed": {"gradient_clipping": 1.0}}, "max_grad_norm makes 0.5", False),
    "DeepSpeed's slip": (
        BASE | {"deepspeed": {"zero_optimisation": {"stage": 2}}},
        "deepspeed.zero_optimisation: DeepSpeed has no such setting; did you mean zero_optimization?",
        False,
    ),
    "DeepSpeed's nested slip": (
        BASE | {"deepspeed": {"zero_optimization": {"stage": 2, "overlap_com": True}}},
        "deepspeed.zero_optimization.overlap_com: DeepSpeed has no such setting; did you mean overlap_comm?",
        False,
    ),
    "wandb mode": (BASE | {"wandb_mode": "ofline"}, "wandb_mode: 'ofline' is none of online, offline", False),
    "checkpointing setting": (
        BASE | {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentran": False}},
        "gradient_checkpointing_kwargs.use_reentran: no such setting",
        False,
    ),
    "bitsandbytes setting": (
        QLORA | {"bnb_config_kwargs": {"bnb_4bit_quant_typ": "nf4"}},
        "did you mean bnb_4bit_quant_type?",
        False,
    ),
    "workers": (BASE | {"dataloader_num_workers": -2}, "dataloader_num_workers: -2 where a number from 0", False),
    "steps below none": (BASE | {"max_steps": -5}, "max_steps: -5 where a number from -1", False),
    "kernels in 8 bit": (
        LORA | {"load_in_8bit": True, "lora_qkv_kernel": True},
        "lora_qkv_kernel: Axolotl's LoRA kernels cannot read the weights of load_in_8bit",
        True,
    ),
    "attention twice": (
        BASE | {"flash_attention": True, "attn_implementation": "sdpa"},
        "flash_attention: the old name of attn_implementation, which is there too",
        True,
    ),
    "workers twice": (BASE | {"dataset_processes": 2, "dataset_num_proc": 4}, "dataset_processes: the old name of dataset_num_proc", False),
    "old name, wrong kind": (BASE | {"dataset_processes": "many"}, "dataset_processes: 'many' where a whole number is needed", True),
    "a name of transformers": (BASE | {"per_device_train_batch_size": 4}, "did you mean micro_batch_size?", True),
    "a name of bitsandbytes": (QLORA | {"bnb_4bit_quant_type": "nf4"}, "did you mean bnb_config_kwargs: {bnb_4bit_quant_type: ...}?", True),
    "field text": (BASE | {"datasets": [{"path": "a", "field_text": "t"}]}, "datasets[0].field_text: Axolotl has no such key here", False),
    "no name": (BASE | {"": {"x": 5}}, '"": a key without a name', True),
    "no name inside": (BASE | {"special_tokens": {"": 5}}, "special_tokens: holds a key without a name", False),
    "chat template": (BASE | {"chat_template": "lama3"}, "llama3, ", True),
    "offload of nothing": (BASE | {"activation_offloading": True}, "activation_offloading: needs gradient_checkpointing", True),
    "half precision": (BASE | {"bf16": False, "fp16": True}, "fp16: weights loaded in fp16 cannot be fine-tuned whole", False),
    "on top of the parent": (BASE | {"output_dir": "prince-canuma/Llama-3-6B-v0/"}, "output_dir: is base_model", False),
    "steps and a half": (BASE | {"save_steps": 1.5}, "save_steps: 1.5 is neither a whole number", False),
    "batch of none": (BASE | {"micro_batch_size": 0}, "micro_batch_size: 0 where a number from 1", False),
}
# what is wrong with the machine: (config, GPUs, architecture, the one fault)
MISFITS = {
    "one GPU, sharded": (BASE | FSDP, 1, "sm_80", "fsdp_config: FSDP needs several GPUs"),
    "fsdp of which version": (BASE | {"fsdp_config": {"offload_params": True}}, 2, "sm_80", "fsdp_version: missing"),
    "8 bit of bitsandbytes": (
        BASE | FSDP | {"optimizer": "lion_8bit"},
        2,
        "sm_80",
        "cannot step the sharded tensors of FSDP 2; write adamw_torch_8bit",
    ),
    "4 bit from one rank": (
        QLORA | {"fsdp_version": 2, "fsdp_config": {"cpu_ram_efficient_loading": True}},
        2,
        "sm_80",
        "fsdp_config.cpu_ram_efficient_loading: deadlocks",
    ),
    "mesh": (BASE | FSDP | {"dp_shard_size": 3}, 4, "sm_80", "dp_shard_size: dp_shard_size 3 does not divide 4 GPUs"),
    "Liger in parts of layers": (
        {**good("liger")[0], "liger_fused_linear_cross_entropy": False, "tensor_parallel_size": 2},
        2,
        "sm_80",
        "liger_rms_norm: Liger cannot work on the parts that tensor_parallel_size makes",
    ),
    "Liger's loss in parts of layers": (
        {**good("liger")[0], "liger_rms_norm": False, "tensor_parallel_size": 2},
        2,
        "sm_80",
        "liger_fused_linear_cross_entropy: Liger cannot work on the parts",
    ),
    "parts of sequences, packed": (
        BASE | PACKED | {"context_parallel_size": 2, "micro_batch_size": 2, "attn_implementation": "flash_attention_2"},
        2,
        "sm_80",
        "micro_batch_size: must be 1 with context_parallel_size and sample_packing",
    ),
    "parts of sequences, by SDPA": (
        BASE | {"sequence_parallel_degree": 2, "sdp_attention": True},
        2,
        "sm_80",
        "sdpa cannot split a sequence",
    ),
    "DeepSpeed's batch over GPUs": (BASE | {"deepspeed": {"train_batch_size": 2}}, 4, "sm_80", "x GPUs makes 4, and transformers refuses"),
    "shards of nothing": (BASE | {"dp_shard_size": 2}, 2, "sm_80", "dp_shard_size: needs fsdp_config"),
    "fp8 on an A100": (BASE | {"fp8": True}, 1, "sm_80", "fp8: true needs sm_90 or newer; sm_80 is refused by Axolotl"),
    "fp8 on a 4090": (BASE | {"fp8": True}, 1, "sm_89", "fp8: true needs sm_90"),
    "flash 3 on an A100": (BASE | {"attn_implementation": "flash_attention_3"}, 1, "sm_80", "flash_attention_3 needs sm_90"),
    "bf16 on a V100": (LORA | {"bf16": True}, 1, "sm_70", "bf16: true needs sm_80 or newer; sm_70 only emulates it"),
    "int8 on a V100": (LORA | {"load_in_8bit": True}, 1, "sm_70", "load_in_8bit: true needs sm_75"),
    "auto on a T4, whole": (BASE, 1, "sm_75", "bf16: auto becomes fp16 or emulated bf16 on sm_75"),
    "fp8 optimizer": (BASE | {"optimizer": "ao_adamw_fp8"}, 1, "sm_80", "optimizer: ao_adamw_fp8 needs sm_89"),
    "cpu in auto": ({**good("cpu full")[0], "bf16": "auto"}, 0, "sm_80", "bf16: a CPU needs bf16: false"),
    "cpu with kernels": ({**good("cpu qlora")[0], "lora_o_kernel": True}, 0, "sm_80", "lora_mlp_kernel: Axolotl's LoRA kernels"),
    "cpu evaluated in 4 bit": ({**good("cpu qlora")[0], "val_set_size": 0.1}, 0, "sm_80", "val_set_size: with NF4 on a CPU"),
    "cpu sharded": ({**good("cpu full")[0], "deepspeed": "zero1.json"}, 0, "sm_80", "deepspeed: shards over GPUs, and there is none"),
    "cpu with liger": ({**good("cpu full")[0], "plugins": [LIGER]}, 0, "sm_80", "plugins: liger has Triton kernels"),
}


def faults_of(config: dict, gpus: int = 1, arch: str = "sm_80") -> list[str]:
    return check_keys(config) + conflicts(config, gpus, arch)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_and_nothing_else(name):
    config, words, _ = FAULTS[name]
    before = copy.deepcopy(config)
    faults = faults_of(config, gpus=2 if "fsdp_config" in config else 1)
    assert len(faults) == 1 and words in faults[0], faults
    assert config == before


@pytest.mark.parametrize("name", MISFITS)
def test_a_machine_that_does_not_fit_is_named(name):
    config, gpus, arch, words = MISFITS[name]
    faults = faults_of(config, gpus, arch)
    assert len(faults) == 1 and words in faults[0], faults


@pytest.mark.parametrize("path", BROKEN, ids=lambda path: path.stem)
def test_a_broken_file_has_all_its_faults_named(path):
    text = path.read_text()
    wanted = re.findall(r"^# fault: (.*)$", text, re.MULTILINE)
    told = dict(re.findall(r"^# (gpus|arch): (\S+)$", text, re.MULTILINE))
    config, faults = read_config(path)
    faults += faults_of(config, int(told.get("gpus", 1)), told.get("arch", "sm_80"))
    unsaid = [words for words in wanted if not any(words in fault for fault in faults)]
    assert wanted and not unsaid and len(faults) == len(wanted), (unsaid, faults)


@pytest.mark.parametrize("name", [*GOOD, *WITH_PLUGINS])
def test_a_good_config_has_no_fault(name):
    assert faults_of(*good(name)) == []


def test_no_value_of_any_key_breaks_the_check():
    odd = [None, True, 0, -1, 3.5, float("nan"), "", "1e-5", [], [None], {}, {"a": {"b": ["1e-5"]}}, {1: 2}, [{"path": 3, "type": [1]}]]
    full = QLORA | FSDP | STREAM | PACKED | {"plugins": [LIGER, CUT], "relora": True, "load_best_model_at_end": True, "save_steps": 2}
    for key in axolotl_schema.load_keys()["models"]["AxolotlInputConfig"]["properties"]:
        for value in odd:
            config = full | {key: value}
            assert assumed_gpus(config) > 0
            for fault in faults_of(config, gpus=len(key) % 3, arch="sm_75") + notes(config):
                assert fault and "\n" not in fault and len(fault) < 600


def test_the_check_of_keys_takes_milliseconds_and_loads_neither_torch_nor_axolotl():
    import subprocess
    import sys

    code = "import sys, json; from downcycle.recipes.validation.check import check_keys, conflicts; c = json.loads(sys.argv[1]);"
    code += "check_keys(c), conflicts(c); sys.exit(any(name in sys.modules for name in ('torch', 'axolotl', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code, json.dumps(GOOD["published"][0])]).returncode == 0
    start = time.process_time()
    faults_of(*good("published"))
    assert time.process_time() - start < 1  # a guard against an import, not a measurement


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "empty; an Axolotl config is a YAML mapping"),
        (b"# nothing\n", "empty"),
        (b"- a\n- b\n", "a YAML list, not a mapping"),
        (b"just words", "a YAML str, not a mapping"),
        (b"a: [1, 2", "not YAML: "),
        (b"a: b: c", "not YAML: "),
        (b"a: !!python/object:os.system x", "not YAML: "),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "not UTF-8 text"),
        (b"a: \x00", "not YAML: "),
        (b"a: 1\n---\nb: 2\n", "2 YAML documents"),
        (b"a: " + b"x" * 1_100_000, "1,100,003 bytes"),
        (b"a: " + b"[" * 5000, "not YAML: "),
        (b"a: &a [*a]", "contain themselves"),
        (
            b"a0: &a0 [x]\n" + b"".join(b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 12)),
            "anchors unfold",
        ),
    ],
    ids=lambda value: value[:20].decode("latin1") if isinstance(value, bytes) else "",
)
def test_what_is_no_yaml_mapping_is_said(tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    faults = check_file(path).faults
    assert len(faults) == 1 and words in faults[0], faults


def test_anchors_and_merges_are_no_fault(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("base_model: m\nlearning_rate: 1.0e-4\ndatasets: [&d {path: a, type: completion}, {<<: *d, path: b}]\n")
    config, faults = read_config(path)
    assert faults == [] and config["datasets"][1] == {"path": "b", "type": "completion"} and faults_of(config) == []


def test_a_missing_file_and_an_unknown_architecture_are_refused(tmp_path):
    with pytest.raises(DowncycleError, match=r"none\.yaml: No such file.*; give an Axolotl YAML file"):
        check_file(tmp_path / "none.yaml")
    for arch in ("ampere", "sm_8", "80", "sm_81", "sm_-80", ""):
        with pytest.raises(DowncycleError, match="no compute capability; give one like sm_70"):
            conflicts(BASE, arch=arch)
    with pytest.raises(DowncycleError, match="-1 GPUs"):
        capabilities(-1, "sm_80")


def test_what_axolotl_would_find_out_about_a_machine():
    assert capabilities(4, "sm_90a") == {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 4, "compute_capability": "sm_90"}
    assert capabilities(1, "sm_75") == {"bf16": False, "fp8": False, "tf32": False, "n_gpu": 1, "compute_capability": "sm_75"}
    assert capabilities(0, "sm_90") == {"bf16": False, "fp8": False, "tf32": False, "n_gpu": 1, "compute_capability": None}


def test_without_axolotl_our_own_checks_still_run(tmp_path, monkeypatch):
    monkeypatch.setattr("downcycle.recipes.validation.check.find_spec", lambda name: None)
    path = tmp_path / "a.yaml"
    path.write_text(
        "base_model: a/m\nlearning_rate: 1.0e-4\ndatasets: [{path: a/b, type: completion}]\nlorra_r: 3\nflash_attention: true\n"
    )
    found = check_file(path)
    assert len(found.faults) == 1 and "lorra_r" in found.faults[0] and not found.by_axolotl
    assert [note.split(":")[0] for note in found.notes] == [
        "flash_attention",
        "Axolotl's own validation was left out, since Axolotl is not installed; for it",
    ]
    with pytest.raises(DowncycleError, match=r"pip install 'downcycle\[train\]'"):
        validate([(BASE, 1, "sm_80")])


def test_the_command_tells_faults_from_notes(downcycle, tmp_path, monkeypatch):
    monkeypatch.setattr("downcycle.recipes.validation.check.find_spec", lambda name: None)
    path = tmp_path / "a.yaml"
    path.write_text("base_model: a/m\nlearning_rate: 1.0e-4\ndatasets: [{path: a/b, type: completion}]\nflash_attention: true\ndebug:\n")
    code, out, err = downcycle("recipe", "--check", path)
    assert code == 0 and out.strip() == f"{path}: no fault found for 1 x sm_80"
    assert len(err.splitlines()) == 2 and all(line.startswith(f"{path}: note: ") for line in err.splitlines())
    shown = json.loads(downcycle("recipe", "--check", path, "--json").out)
    assert shown["file"] == str(path) and shown["faults"] == [] and len(shown["notes"]) == 2
    path.write_text(path.read_text() + "fsdp_version: 2\nfsdp_config: {offload_params: true}\nwarmup_ratio: 2\n")
    code, out, err = downcycle("recipe", "--check", path)
    assert code == 1 and "warmup_ratio" in err and "1 fault for 2 x sm_80 (assumed, since the file asks for several" in err.splitlines()[-1]


def test_a_published_file_in_old_spelling_has_no_fault(tmp_path):
    path = Path(__file__).with_name("published_in_old_spelling.yaml")
    config, faults = read_config(path)
    assert faults + faults_of(config) == []
    assert notes(config) == ["flash_attention: an old name that Axolotl still reads; write attn_implementation: flash_attention_2"]
    assert modern(config)["attn_implementation"] == "flash_attention_2"


# name: (config, GPUs, the notes)
OLD = {
    "offload": (BASE | {"gradient_checkpointing": "offload"}, 1, ["gradient_checkpointing"]),
    "offload to disk": (BASE | {"gradient_checkpointing": "offload_disk"}, 1, ["gradient_checkpointing"]),
    "names": (
        BASE | {"dataset_processes": 2, "noisy_embedding_alpha": 5, "evaluation_strategy": "steps", "eval_steps": 5, "val_set_size": 0.1},
        1,
        ["dataset_processes", "noisy_embedding_alpha", "evaluation_strategy"],
    ),
    "in a dataset": (
        BASE | {"datasets": [{"path": "a", "type": "chat_template", "message_field_role": "from"}], "chat_template": "chatml"},
        1,
        ["datasets[0].message_field_role"],
    ),
    "FSDP": (
        BASE
        | {"fsdp": ["full_shard", "auto_wrap"], "fsdp_version": 2}
        | {"fsdp_config": {"fsdp_offload_params": True, "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}},
        2,
        ["fsdp", "fsdp_config.fsdp_offload_params", "fsdp_config.fsdp_transformer_layer_cls_to_wrap"],
    ),
    "no value": (BASE | {"debug": None, "fsdp": None, "datasets": [{"path": "a", "typ": None}], "liger_rms_norm": None}, 1, []),
}


@pytest.mark.parametrize("name", OLD)
def test_an_old_spelling_that_axolotl_reads_is_a_note(name):
    config, gpus, keys = OLD[name]
    assert faults_of(config, gpus) == [] and [note.split(": ")[0] for note in notes(config)] == keys


def test_names_of_other_trainers_lead_to_keys_that_axolotl_has():
    models = axolotl_schema.load_keys()["models"]
    known = {key for name in ("AxolotlInputConfig", "LigerArgs") for key in models[name]["properties"]}
    assert {meant.split(":")[0] for meant in FOREIGN_NAMES.values()} <= known and not set(FOREIGN_NAMES) & known
    assert set(MAPPED) <= set(STILL_READ) <= set(replacements()) and {replacements()[key].split(":")[0] for key in MAPPED} <= known
    for name, meant in FOREIGN_NAMES.items():
        assert check_keys(BASE | {name: 3}) == [f"{name}: Axolotl has no such key and would drop it silently; did you mean {meant}?"]


def test_a_line_never_lists_dozens_of_names():
    (fault,) = check_keys(BASE | {"chat_template": "lama3"})
    assert fault.endswith("did you mean llama3?") and "34 others or text like ^tokenizer_default_fallback_" in fault and len(fault) < 200


@pytest.mark.parametrize(
    ("settings", "gpus"),
    [
        ({}, 1),
        (FSDP, 2),
        ({"deepspeed": "zero3.json"}, 2),
        (FSDP | {"dp_shard_size": 4, "dp_replicate_size": 2}, 8),
        ({"sequence_parallel_degree": 4}, 4),
        ({"use_ray": True, "ray_num_workers": 8}, 8),
        ({"use_ray": True}, 2),
        ({"deepspeed": {"train_batch_size": 64}, "micro_batch_size": 2, "gradient_accumulation_steps": 8}, 4),
        ({"deepspeed": {"train_batch_size": 63}, "micro_batch_size": 2}, 2),
        ({"deepspeed": {"train_batch_size": "auto"}}, 2),
    ],
)
def test_a_config_that_shards_takes_several_gpus(settings, gpus):
    assert assumed_gpus(BASE | settings) == gpus


def test_the_configs_that_are_shipped_pass_without_a_machine():
    from downcycle.recipes.configs import FOLDER

    for path in FOLDER.rglob("*.yaml"):
        config, faults = read_config(path)
        assert faults + faults_of(config, assumed_gpus(config)) + notes(config) == [], path


def test_a_deepspeed_file_is_looked_for_where_axolotl_would(tmp_path, monkeypatch):
    monkeypatch.setattr("downcycle.recipes.validation.check.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.yaml"

    def found(named):
        path.write_text(json.dumps(BASE | {"deepspeed": named}))
        report = check_file(path)
        return report.faults, [note for note in report.notes if "deepspeed" in note]

    assert found("none.json")[0] == ["deepspeed: there is no file none.json here, where Axolotl looks for it"]
    assert found("deepspeed_configs/zero33.json")[0][0].endswith("did you mean deepspeed_configs/zero3.json?")
    faults, told = found("deepspeed_configs/zero3.json")
    assert faults == [] and "axolotl fetch deepspeed_configs" in told[0]
    (tmp_path / "none.json").write_text("{}")
    assert found("none.json") == ([], [])


def test_what_is_handed_on_is_what_the_libraries_know():
    pytest.importorskip("axolotl")
    import inspect

    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
    from transformers import BitsAndBytesConfig

    known = set(inspect.signature(BitsAndBytesConfig.__init__).parameters) - {"self", "kwargs"}
    assert set(HANDED_ON["bnb_config_kwargs"]) == known | {"blocksize"}
    assert set(FILE_TYPES) == set(_PACKAGED_DATASETS_MODULES)


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """Make every process started from here fail, and leave a note, at the first look-up of a host."""
    note, folder = tmp_path / "network", tmp_path / "site"
    folder.mkdir()
    hook = "if event in ('socket.connect', 'socket.getaddrinfo'): open(NOTE, 'a').write(f'{event} {args}'); raise OSError('no network')"
    (folder / "sitecustomize.py").write_text(
        f"import sys\nNOTE = {str(note)!r}\ndef guard(event, args):\n    {hook}\nsys.addaudithook(guard)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return note


def test_axolotl_agrees_and_touches_no_network(no_network):
    """One run of Axolotl over the good configs for a GPU and over all broken ones: it refuses exactly those marked so."""
    pytest.importorskip("axolotl")
    fine = [name for name, (_, gpus, arch) in GOOD.items() if gpus and arch != "sm_75"]
    answers = validate(
        [(config, 1, "sm_90") for config in (*(GOOD[name][0] for name in fine), *(config for config, _, _ in FAULTS.values()))]
    )
    assert [(name, faults) for name, faults in zip(fine, answers, strict=False) if faults] == []
    assert validate([(config, gpus, "sm_90") for config, gpus, _ in OLD.values()]) == [[]] * len(OLD)
    said = {name: bool(faults) for name, faults in zip(FAULTS, answers[len(fine) :], strict=True)}
    assert said == {name: marked for name, (_, _, marked) in FAULTS.items()}
    assert not no_network.exists()


def test_axolotl_reports_all_faults_together_in_one_line_each(tmp_path):
    pytest.importorskip("axolotl")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "base_model: some/model-on-the-hub\nlearning_rate: 1.0e-4\ndatasets: [{path: a, type: completion}]\n"
        "plugins: [no_such_package.Plugin]\nwarmup_steps: 1\nwarmup_ratio: 0.1\nearly_stopping_patience: 2\n"
        "num_epochs: many\nmax_packed_sequence_len: 3\nfp8: true\nlorra_r: 3\nscaling_softmax: true\n"
    )
    theirs = validate([(read_config(path)[0], 1, "sm_80")])[0]
    for words in (
        "plugins: no_such_package.Plugin cannot be loaded (ModuleNotFoundError",
        "lorra_r: neither Axolotl nor a plugin of this config has such a key",
        "num_epochs: Input should be a valid number",
        "warmup_steps and warmup_ratio are mutually exclusive",
        "`max_packed_sequence_len` is no longer supported",
        "`early_stopping_patience` requires save_steps and eval_steps",
        "scaling_softmax requires flex attention",
        "fp8 is not supported on this GPU",
    ):
        assert sum(words in fault for fault in theirs) == 1, (words, theirs)
    assert len(theirs) == 8, theirs
    assert all("\n" not in fault and "errors.pydantic.dev" not in fault for fault in theirs)


@pytest.mark.parametrize("name", ["liger", "cut cross entropy"])
def test_axolotl_finds_no_fault_with_its_plugins(name):
    pytest.importorskip("axolotl")
    config, gpus, arch = good(name)
    assert validate([(config, gpus, arch)]) == [[]]


def test_a_file_is_checked_by_all_and_no_fault_is_said_twice(tmp_path):
    pytest.importorskip("axolotl")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "base_model: m\nlearning_rate: 1.0e-4\ndatasets: [{path: a, type: completion}]\nwarmup_steps: 1\nwarmup_ratio: 0.1\n"
        "save_safetensors: false\nlorra_r: 3\ndo_bench_eval: true\nchat_template: jinja\n"
        "dataset_processes: many\nadapter: qlora\nload_in_8bit: true\nlora_r: 8\nlora_alpha: 8\nlora_target_linear: true\n"
    )
    faults = check_file(path).faults
    for key in ("warmup_steps", "save_safetensors", "lorra_r", "do_bench_eval requires", "chat_template_jinja", "many", "8bit"):
        assert sum(key in fault for fault in faults) == 1, (key, faults)
    assert len(faults) == 7, faults


def test_the_file_of_keys_is_what_axolotl_has_and_small():
    pytest.importorskip("axolotl")
    assert axolotl_schema.KEYS_FILE.read_text() == axolotl_schema.render(axolotl_schema.read_axolotl())


def test_the_file_of_keys_is_small_and_holds_no_texts_of_axolotl():
    text = axolotl_schema.KEYS_FILE.read_text()
    assert len(text) < 150_000 and "description" not in json.dumps(axolotl_schema.load_keys()["models"]["SFTDataset"])
    assert len(axolotl_schema.load_keys()["models"]["AxolotlInputConfig"]["properties"]) > 350
