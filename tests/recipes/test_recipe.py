"""Recipes: the published one value for value, keys that follow model, text and machine, what users set, and what is refused."""

import json
import subprocess
import sys

import pytest
import yaml

from downcycle import DowncycleError, open_checkpoint
from downcycle.recipes.commands import parse_settings
from downcycle.recipes.configs import LLAMA_3_6B, RESERVED, llama_shape
from downcycle.recipes.machine import Machine
from downcycle.recipes.presets import PRESETS
from downcycle.recipes.recipe import make_recipe
from downcycle.recipes.recipe_text import is_untouched, recipe_text

LLAMA = llama_shape(LLAMA_3_6B)
TERNARY = llama_shape(LLAMA_3_6B | {"downcycle_ternary": {"schedule": "linear", "strength": 1.0, "steps": 5000}})
PUBLISHED = {
    "load_in_4bit": True,
    "adapter": "qlora",
    "sequence_len": 8192,
    "sample_packing": False,
    "pad_to_sequence_len": False,
    "lora_r": 128,
    "lora_alpha": 128,
    "lora_dropout": 0.05,
    "lora_target_linear": True,
    "gradient_accumulation_steps": 8,
    "micro_batch_size": 2,
    "num_epochs": 2,
    "optimizer": "paged_adamw_32bit",
    "lr_scheduler": "cosine",
    "learning_rate": 2e-4,
    "warmup_steps": 100,
    "train_on_inputs": False,
    "group_by_length": False,
    "bf16": "auto",
    "tf32": False,
    "gradient_checkpointing": True,
    "attn_implementation": "flash_attention_2",
    "evals_per_epoch": 4,
    "save_steps": 4000,
    "weight_decay": 0,
    "val_set_size": 0.001,
    "seed": 42,
    "special_tokens": {"pad_token": "<|reserved_special_token_0|>"},
    "datasets": [{"path": "prince-canuma/fineweb-CC-MAIN-2024-10-1B-en", "split": "train", "type": "completion"}],
}


def made(preset="qlora", model=None, base="Llama-3-6B", **options):
    return make_recipe(model or (TERNARY if preset == "ternary-long" else LLAMA), base, preset, **options)


def test_the_published_run_value_for_value():
    config = made("llama-3-6b").config
    assert {key: config.get(key) for key in PUBLISHED} == PUBLISHED
    kernels = {f"lora_{name}_kernel": False for name in ("mlp", "qkv", "o", "embedding")}
    rest = {"base_model", "output_dir", "dataset_prepared_path", "wandb_project"}
    assert config.keys() == PUBLISHED.keys() | kernels.keys() | rest
    assert {key: config[key] for key in kernels} == kernels


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("machine", [None, Machine(1, 80), Machine(8, 80, 2), Machine(0), Machine(1, 80, 1, "sm_75")])
def test_what_is_written_is_what_was_made(preset, machine):
    if machine == Machine(1, 80) and preset.startswith("ternary"):
        with pytest.raises(DowncycleError, match="does not fit: ternary training"):
            made(preset, machine=machine)
        return
    if machine and machine.arch == "sm_75" and PRESETS[preset].settings.get("adapter") is None:
        with pytest.raises(DowncycleError, match="sm_75 has no bf16"):
            made(preset, machine=machine)
        return
    recipe = made(preset, machine=machine)
    text = recipe_text(recipe, "Llama-3-6B/axolotl.yaml")
    assert yaml.safe_load(text) == recipe.config
    assert is_untouched(text)
    assert not is_untouched(text.replace("seed: 42", "seed: 43"))
    assert not is_untouched("seed: 42\n")
    assert max(map(len, text.splitlines())) < 200


def test_the_head_says_what_to_run():
    def head(**options):
        return recipe_text(made(**options), "a b/axolotl.yaml").split("\n\n")[0]

    assert "# In the folder where Llama-3-6B lies:\n#   axolotl train 'a b/axolotl.yaml'  " in head()
    assert "In the folder where" not in head(base="/models/Llama-3-6B")
    assert "downcycle merge Llama-3-6B outputs/llama-3-6b --out Llama-3-6B-healed" in head()
    assert "downcycle merge" not in head(preset="full")
    assert "The healed model is outputs/llama-3-6b-full then." in head(preset="full")
    assert "outputs/llama-3-6b-tail then, in float32." in head(preset="tail", machine=Machine(0))
    assert "--launcher torchrun -- --nproc_per_node 4" in head(machine=Machine(4))
    many = head(machine=Machine(8, None, 2))
    assert (
        "torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_id heal --rdzv_endpoint FIRST:29400 -m axolotl.cli.train" in many
    )
    ray = head(machine=Machine(8, None, 2), ray=True)
    assert "ray start --head" in ray and "axolotl train 'a b/axolotl.yaml' --use-ray\n" in ray
    two = {"context_parallel_size": 2, "micro_batch_size": 1}
    assert "Batch: 64 sequences = 8 GPUs, 2 to each sequence, x 1 x 16 steps" in head(machine=Machine(8), overrides=two)
    assert "--launcher python" in head(machine=Machine(0))
    assert "Training needs about" in head(machine=Machine(1, 48))


def test_a_name_cannot_break_out_of_its_comment():
    text = recipe_text(made(base="x\nbase_model: evil\n#"), "p\nq: 1")
    assert yaml.safe_load(text)["base_model"] == "x\nbase_model: evil\n#"
    assert text.splitlines()[0].startswith("# x base_model: evil")


def test_the_pad_token_is_one_that_is_there(make, tmp_path):
    make(tmp_path / "m")

    def pad(tokenizer_config, tokenizer=None):
        (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(tokenizer or {}))
        return made(model=open_checkpoint(tmp_path / "m")).config.get("special_tokens", {}).get("pad_token")

    assert made().config["special_tokens"]["pad_token"] == RESERVED
    assert pad({"pad_token": "<pad>"}) is None
    assert pad({"eos_token": "</s>"}) == "</s>"
    assert pad({"eos_token": {"content": "</s>"}, "added_tokens_decoder": {"7": {"content": "<unused1>"}}}) == "<unused1>"
    assert pad({"eos_token": "</s>"}, {"added_tokens": [{"content": "<s>"}, {"content": "<reserved>"}, {"content": "[PAD]"}]}) == "[PAD]"
    assert pad({}) is None


def test_tail_names_the_head_the_norm_and_the_last_layers():
    patterns = made("tail").config["unfrozen_parameters"]
    assert patterns == ["^lm_head.weight$", "^model.norm.weight$", "^model.layers.21.", "^model.layers.22.", "^model.layers.23."]
    tied = llama_shape(LLAMA_3_6B | {"num_hidden_layers": 2, "tie_word_embeddings": True})
    tensors = {name: tensor for name, tensor in tied.tensors.items() if name != "lm_head.weight"}
    small = made("tail", type(tied)("tied", tied.config, tensors, tied.files))
    assert small.config["unfrozen_parameters"] == [
        "^model.embed_tokens.weight$",
        "^model.norm.weight$",
        "^model.layers.0.",
        "^model.layers.1.",
    ]


def test_a_short_model_gets_short_sequences():
    assert made(model=llama_shape(LLAMA_3_6B | {"max_position_embeddings": 2048})).config["sequence_len"] == 2048


def test_kernels_only_where_there_are_some():
    assert made().config["lora_mlp_kernel"] is True
    strange = made(model=llama_shape(LLAMA_3_6B | {"model_type": "bloom"})).config
    assert not {key for key in strange if key.startswith(("liger_", "lora_mlp", "plugins"))}
    cpu = made(machine=Machine(0)).config
    assert not {key for key in cpu if key.startswith("liger_") or key in ("plugins", "tf32", "test_datasets")}
    assert {cpu[f"lora_{name}_kernel"] for name in ("mlp", "qkv", "o", "embedding")} == {False}
    assert (cpu["attn_implementation"], cpu["bf16"], cpu["val_set_size"], cpu["optimizer"]) == ("sdpa", False, 0, "adamw_torch")
    turing = made(machine=Machine(1, 16, 1, "sm_75"), overrides={"sequence_len": 2048}).config
    assert (turing["attn_implementation"], turing["bf16"], turing["fp16"]) == ("sdpa", False, True)


def test_text_of_every_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "web" / "data").mkdir(parents=True)
    (tmp_path / "web" / "data" / "train-00000-of-00001.parquet").touch()
    (tmp_path / "lines.jsonl").touch()
    completion = {"split": "train", "type": "completion"}
    assert made(dataset="web").config["datasets"] == [{"path": "web", **completion}]
    assert made(dataset="lines.jsonl").config["datasets"] == [{"path": "lines.jsonl", "ds_type": "json", **completion}]
    assert made(dataset="a/b:part").config["datasets"] == [{"path": "a/b", "name": "part", **completion}]
    splits = {"train": {"tokens": 10_000_000, "documents": 12_800}, "test": {"tokens": 30_000, "documents": 20}}
    (tmp_path / "web" / "downcycle-data.json").write_text(json.dumps({"splits": splits}))
    counted = made(dataset="web")
    assert counted.config["test_datasets"] == [{"path": "web", "split": "test", "type": "completion"}]
    assert counted.config["val_set_size"] == 0
    assert "10,000,000 tokens of text: about 20 steps an epoch" in recipe_text(counted, "f")
    stream = made("stream", dataset="web").config
    assert stream["pretraining_dataset"] == [{"path": "web", "split": "train", "type": "pretrain", "text_column": "text"}]
    lines = made("stream", dataset="lines.jsonl").config["pretraining_dataset"]
    assert lines == [{"path": "json", "data_files": "lines.jsonl", "split": "train", "type": "pretrain", "text_column": "text"}]
    assert stream["max_steps"] == 10_000_000 // (64 * 8192)
    assert made("stream").config["max_steps"] == 1_000_000_000 // (64 * 8192)
    published = recipe_text(made("llama-3-6b", dataset="web", overrides={"warmup_steps": 400}), "f")
    assert "about 200 steps an epoch. All 400 steps of this run are warm-up" in published  # 12,800 documents, 64 in a step


def test_what_is_held_out_is_packed_where_it_fills_a_batch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "web").mkdir()
    for held_out, packed in ((0, False), (4 * 8192 - 1, False), (4 * 8192, True)):
        splits = {name: {"tokens": tokens, "documents": 9} for name, tokens in (("train", 10**7), ("test", held_out))}
        (tmp_path / "web" / "downcycle-data.json").write_text(json.dumps({"splits": splits}))
        config = made(dataset="web").config
        assert (config["eval_sample_packing"], config["eval_batch_size"], "test_datasets" in config) == (packed, 1, held_out > 0)
    assert made().config["eval_sample_packing"] is True  # a thousandth of a billion
    assert made(dataset="some/other").config["eval_sample_packing"] is False


def test_each_preset_has_outputs_of_its_own():
    assert len({made(preset).config["output_dir"] for preset in PRESETS}) == len(PRESETS)


def test_the_published_micro_batch_stays_on_any_gpu():
    for memory in (None, 48, 80):
        config = made("llama-3-6b", machine=Machine(4, memory)).config
        assert (config["micro_batch_size"], config["gradient_accumulation_steps"]) == (2, 8)
    with pytest.raises(DowncycleError, match="does not fit: .* what would fit: .*--preset qlora"):
        made("llama-3-6b", machine=Machine(1, 32))


def test_any_key_can_be_set():
    pairs = [
        "learning_rate=1e-4",
        "num_epochs=3",
        "fsdp_config.offload_params=true",
        "datasets.0.split=validation",
        "wandb_project=x",
        "seed=null",
    ]
    settings = parse_settings(pairs)
    assert settings["learning_rate"] == 1e-4
    recipe = made("full", machine=Machine(8, 80), parallel="fsdp2", overrides=settings)
    assert recipe.config["learning_rate"] == 1e-4
    assert recipe.config["datasets"][0]["split"] == "validation"
    assert recipe.config["wandb_project"] == "x"
    assert "seed" not in recipe.config
    untouched = made("full", machine=Machine(8, 80), parallel="fsdp2").config["fsdp_config"]
    assert recipe.config["fsdp_config"] == untouched | {"offload_params": True}
    assert "learning_rate: 0.0001  # set by you" in recipe_text(recipe, "f")
    assert PRESETS["full"].settings["learning_rate"].value == 1e-4  # presets are never changed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"preset": "best"}, "no preset 'best'; there are qlora, lora"),
        ({"dataset": "nowhere"}, "--dataset nowhere: no such folder or file, and not a Hub id"),
        ({"dataset": "/etc/hostname"}, "not a data set"),
        ({"overrides": {"lerning_rate": 1}}, "lerning_rate.*learning_rate"),
        ({"overrides": {"optimizer": "adamx"}}, "adamx"),
        ({"overrides": {"sequence_len": "long"}}, "sequence_len: 'long'"),
        ({"overrides": {"sequence_len": 0}}, "sequence_len 0"),
        ({"overrides": {"sequence_len": 8193}}, "sequence_len: 8193, and the model has 8192 positions"),
        ({"overrides": {"lora_r": "abc"}}, "lora_r"),
        ({"overrides": {"lora_r": [1]}}, "lora_r"),
        ({"preset": "tail", "overrides": {"unfrozen_parameters": 5}}, "unfrozen_parameters"),
        ({"batch": 0}, "--batch 0"),
        ({"overrides": {"lora_target_linear": None, "lora_target_modules": ["q_projj"]}}, "lora_target_modules: .* no module 'q_projj'"),
        ({"preset": "tail", "overrides": {"unfrozen_parameters": ["^head."]}}, r"unfrozen_parameters: '\^head\.' is no parameter's name"),
        ({"preset": "stream", "overrides": {"test_datasets.0.path": "x"}}, "there is no list test_datasets here"),
        ({"preset": "lora", "overrides": {"load_in_8bit": True}}, "load_in_8bit|8-bit"),
        ({"overrides": {"load_in_8bit": True}}, "load_in_8bit|load_in_4bit"),
        ({"overrides": {"unfrozen_parameters": ["^lm_head.weight$"]}}, "unfrozen_parameters"),
        ({"overrides": {"datasets.7.split": "x"}}, "--set datasets.7.split: there is no '7'"),
        ({"overrides": {"seed.deep": 1}}, "--set seed.deep"),
        ({"preset": "stream", "overrides": {"max_steps": None}}, "max_steps"),
        ({"machine": Machine(1, 80, 1, "sm_75"), "overrides": {"bf16": True}}, "bf16"),
        ({"machine": Machine(0), "overrides": {"val_set_size": 0.1}}, "val_set_size"),
        ({"machine": Machine(0), "ray": True}, "--ray"),
        ({"machine": Machine(1), "ray": True}, "--ray: needs several GPUs"),
        ({"preset": "full", "machine": Machine(1, 24)}, "does not fit"),
        (
            {
                "preset": "full",
                "machine": Machine(8, 80),
                "parallel": "zero3",
                "overrides": {"fsdp_version": 2, "fsdp_config.offload_params": False},
            },
            "deepspeed",
        ),
        ({"base": "\udcff"}, "not Unicode"),
    ],
)
def test_refusals(options, said):
    with pytest.raises(DowncycleError, match=said):
        made(**options)


def test_quantised_weights_are_not_trained():
    packed = llama_shape(LLAMA_3_6B | {"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(DowncycleError, match="heal the unquantised model"):
        made(model=packed)


@pytest.mark.parametrize("pair", ["learning_rate", "=3", "x={a: [", "x='"])
def test_pairs_that_are_none(pair):
    with pytest.raises(DowncycleError, match="--set"):
        parse_settings([pair])


def test_values_are_read_as_people_mean_them():
    read = parse_settings(["a=2e-4", "b=-1E5", "c=infinity", "d=1", "e=true", "f=[1, 2]", "g=", "h=x=y"])
    assert read == {"a": 2e-4, "b": -1e5, "c": "infinity", "d": 1, "e": True, "f": [1, 2], "g": None, "h": "x=y"}


def test_the_command(downcycle, make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "m", config={"max_position_embeddings": 64})
    assert downcycle("recipe", "m", "--preset", "lora", "--gpus", "2", "--set", "num_epochs=3") == (0, "m/axolotl.yaml\n", "")
    first = (tmp_path / "m" / "axolotl.yaml").read_text()
    assert yaml.safe_load(first)["num_epochs"] == 3
    assert downcycle("recipe", "m").code == 0  # as it was written: replaced
    (tmp_path / "m" / "axolotl.yaml").write_text(first + "# mine\n")
    code, _, err = downcycle("recipe", "m")
    assert code == 1 and "changed by hand" in err
    assert (tmp_path / "m" / "axolotl.yaml").read_text() == first + "# mine\n"
    assert downcycle("recipe", "m", "--overwrite").code == 0
    assert downcycle("recipe", "m", "--out", "other.yaml").out == "other.yaml\n"
    shown = json.loads(downcycle("recipe", "m", "--out", "third.yaml", "--json").out)
    assert shown["config"] == yaml.safe_load((tmp_path / "third.yaml").read_text())
    assert yaml.safe_load(downcycle("recipe", "m", "--out", "-").out) == shown["config"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "other.yaml", "third.yaml"]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["recipe"], 2, "give the model's folder"),
        (["recipe", "m", "--check", "f.yaml"], 2, "DIR makes a recipe, --check reads one"),
        (["recipe", "m", "--out", "no/such/f.yaml"], 1, "no such folder"),
        (["recipe", "demo"], 1, "say with --out"),
        (["recipe", "m", "--gpus", "3"], 1, "--batch"),
    ],
)
def test_the_command_refuses(downcycle, make, tmp_path, monkeypatch, args, code, said):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "m")
    answer = downcycle(*args)
    assert answer.code == code and said in answer.err
    assert not list(tmp_path.rglob("*.yaml"))


def test_the_command_loads_neither_torch_nor_axolotl(make, tmp_path):
    make(tmp_path / "m")
    heavy = {"torch", "transformers", "axolotl", "datasets", "bitsandbytes", "peft", "datatrove", "pyarrow"}
    code = f"import sys; from downcycle.cli import main\ntry: main()\nfinally: print(*{heavy} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code, "recipe", "m"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["m/axolotl.yaml", ""]
