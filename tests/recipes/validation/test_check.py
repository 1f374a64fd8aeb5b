"""Every broken config is named broken by the right words and no others; every good one passes; Axolotl itself is the oracle."""

import copy
import json
import re
import time
from pathlib import Path

import pytest

from downcycle.recipes.validation import axolotl_schema
from downcycle.recipes.validation.check import axolotl_faults, check_file, check_keys, conflicts, read_config, validate
from downcycle.recipes.validation.hardware import capabilities
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
    "fsdp prefix": (BASE | {"fsdp_version": 2, "fsdp_config": {"fsdp_offload_params": True}}, "write offload_params", False),
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
        "eval_steps: 20 does not divide save_steps: 30",
        False,
    ),
    "best by nothing": (BASE | {"val_set_size": 9, "save_strategy": "best"}, "metric_for_best_model: missing", True),
    "packed, no attention": (BASE | PACKED, "attn_implementation: unset lets packed samples see each other", False),
    "floor of another schedule": (
        BASE | {"lr_scheduler": "linear", "cosine_min_lr_ratio": 0.1},
        "cosine_min_lr_ratio: not read with",
        False,
    ),
    "old offload": (BASE | {"gradient_checkpointing": "offload"}, "activation_offloading: true", False),
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
            for fault in faults_of(full | {key: value}, gpus=len(key) % 3, arch="sm_75"):
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
    faults = check_file(path)
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


def test_without_axolotl_its_own_validation_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("downcycle.recipes.validation.check.find_spec", lambda name: None)
    (tmp_path / "a.yaml").write_text("base_model: m\n")
    with pytest.raises(DowncycleError, match=r"pip install 'downcycle\[train\]'"):
        axolotl_faults(tmp_path / "a.yaml")


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
    theirs = axolotl_faults(path)
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
    )
    faults = check_file(path)
    for key in ("warmup_steps", "save_safetensors", "lorra_r", "do_bench_eval requires", "chat_template_jinja"):
        assert sum(key in fault for fault in faults) == 1, (key, faults)
    assert len(faults) == 5, faults


def test_the_file_of_keys_is_what_axolotl_has_and_small():
    pytest.importorskip("axolotl")
    assert axolotl_schema.KEYS_FILE.read_text() == axolotl_schema.render(axolotl_schema.read_axolotl())


def test_the_file_of_keys_is_small_and_holds_no_texts_of_axolotl():
    text = axolotl_schema.KEYS_FILE.read_text()
    assert len(text) < 150_000 and "description" not in json.dumps(axolotl_schema.load_keys()["models"]["SFTDataset"])
    assert len(axolotl_schema.load_keys()["models"]["AxolotlInputConfig"]["properties"]) > 350
