"""Recipes for ternary training: what was published, where it goes on, what the head says, which machines it fits, and what is refused."""

import json
import re

import pytest
import yaml

from downcycle import DowncycleError, open_checkpoint
from downcycle.eval.publish.rules import sort_files
from downcycle.recipes.commands import parse_settings
from downcycle.recipes.configs import LLAMA_3_6B, llama_shape
from downcycle.recipes.machine import Machine, estimate
from downcycle.recipes.memory import GIB, model_size, needed_bytes
from downcycle.recipes.presets import PRESETS
from downcycle.recipes.recipe import make_recipe
from downcycle.recipes.recipe_text import recipe_text
from downcycle.recipes.validation.ternary import is_ternary

PLUGIN = "downcycle.recipes.plugins.TernaryPlugin"
LIGER = "axolotl.integrations.liger.LigerPlugin"
SHAPES = {"6B": LLAMA_3_6B, "8B": LLAMA_3_6B | {"num_hidden_layers": 32}}
LEFT = {"schedule": "linear", "warmup_steps": 1000, "k": None, "include": [], "exclude": [], "norm": False, "strength": 1.0, "steps": 5000}


def shape(**left):
    """Llama-3-6B's, as it is or as a ternary training left it."""
    return llama_shape(LLAMA_3_6B | ({"downcycle_ternary": LEFT | left} if left else {}))


def made(preset="ternary", model=None, base="Llama-3-6B", **options):
    return make_recipe(model or (shape(norm=False) if preset == "ternary-long" else shape()), base, preset, **options)


def head(**options):
    return recipe_text(made(**options), "f.yaml").split("\n\n")[0]


PUBLISHED = {
    "ternary": {"learning_rate": 1e-4, "max_steps": 5000, "downcycle_ternary": {"schedule": "linear", "warmup_steps": 1000}},
    "ternary-long": {"learning_rate": 1e-5, "max_steps": 45_000, "downcycle_ternary": {"schedule": "linear", "warmup_steps": 0}},
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_published_values(preset):
    recipe = made(preset)
    config = recipe.config
    assert {key: config[key] for key in PUBLISHED[preset]} == PUBLISHED[preset]
    assert config["sequence_len"] * recipe.fit.batch == 8192 * 256  # 2M tokens
    assert recipe.fit.batch == config["micro_batch_size"] * config["gradient_accumulation_steps"] * 8
    assert config["plugins"] == [LIGER, PLUGIN] and is_ternary(config)
    assert not {key for key in config if key.startswith(("lora", "load_in", "adapter", "num_epochs", "deepspeed"))}
    text = config.get("datasets") or config["pretraining_dataset"]
    part = {"ternary": "sample-10BT", "ternary-long": "sample-100BT"}[preset]
    assert {key: text[0][key] for key in ("path", "name")} == {"path": "HuggingFaceFW/fineweb-edu", "name": part}


def test_text_of_downcycle_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "fineweb-edu-10b"
    folder.mkdir()
    splits = {name: {"tokens": tokens, "documents": 9_000} for name, tokens in (("train", 10**10), ("test", 10**7))}
    (folder / "downcycle-data.json").write_text(json.dumps({"splits": splits}))
    config = made(dataset="fineweb-edu-10b").config
    assert config["datasets"] == [{"path": "fineweb-edu-10b", "split": "train", "type": "completion"}]
    assert config["test_datasets"] == [{"path": "fineweb-edu-10b", "split": "test", "type": "completion"}]
    assert (config["val_set_size"], config["eval_sample_packing"], config["max_steps"]) == (0, True, 5000)
    long = made("ternary-long", dataset="fineweb-edu-10b").config
    assert long["pretraining_dataset"] == [{"path": "fineweb-edu-10b", "split": "train", "type": "pretrain", "text_column": "text"}]
    assert long["max_steps"] == 45_000  # the preset's, not one pass over the text
    assert "about 4,769 steps an epoch. The run has 5,000 such steps." in head(dataset="fineweb-edu-10b")


def test_the_head_says_what_a_step_is_and_what_comes_after():
    assert "Batch: 256 sequences = 8 GPUs x 1 x 32 steps accumulated, sharded by FSDP2; 2,097,152 tokens." in head()
    assert "#   downcycle ternarize outputs/llama-3-6b-1.58 --out Llama-3-6B-1.58\n" in head()
    assert "downcycle recipe outputs/llama-3-6b-1.58 --preset ternary-long" in head()
    long = head(preset="ternary-long", base="outputs/llama-3-6b-1.58")
    assert "#   downcycle ternarize outputs/llama-3-6b-1.58-long --out llama-3-6b-1.58-long\n" in long
    assert "--preset ternary-long" not in long and "healed" not in long + head()
    assert "The run has 45,000 such steps." in long
    assert "ternarize outputs/healed-1.58 --out outputs/healed-1.58-packed\n" in head(base="outputs/healed")
    assert "ternarize 'outputs/my model-1.58' --out 'a b/My Model-1.58'" in head(base="a b/My Model")


def test_the_amount_of_text_is_that_of_the_batch():
    assert "max_steps: 5000  # published, of 2M tokens each; 10,485,760,000 tokens here\n" in recipe_text(made(), "f")
    assert "max_steps: 5000  # published, of 2M tokens each; 2,621,440,000 tokens here\n" in recipe_text(made(batch=64), "f")
    assert "max_steps: 7  # set by you\n" in recipe_text(made(overrides={"max_steps": 7}), "f")


def test_a_warm_up_that_does_not_end_is_said():
    late = "in which lambda does not reach 1: set downcycle_ternary.warmup_steps lower"
    assert late in head(overrides={"max_steps": 1000})
    assert late in head(overrides={"max_steps": 1000, "downcycle_ternary.warmup_steps": None})  # then it is 1000 too
    assert late not in head(overrides={"max_steps": 1001})
    assert late not in head(overrides={"max_steps": 1000, "downcycle_ternary.warmup_steps": 999})
    assert late not in head(overrides={"max_steps": 10, "downcycle_ternary": {"schedule": "ramp", "k": 2}})


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (shape(), "was never trained ternary; --preset ternary-long goes on where --preset ternary ended: run that first"),
        (shape(strength=0.4), "its warm-up stopped at a lambda of 0.4; .*: let that end first"),
        (shape(strength="much"), "downcycle_ternary is not what a training writes"),
    ],
)
def test_only_what_was_trained_ternary_is_trained_on(model, said):
    with pytest.raises(DowncycleError, match=said):
        made("ternary-long", model)


def test_maps_and_norms_stay_those_that_were_trained():
    left = {"include": ["lm_head"], "exclude": [r"\.0\."], "norm": True}
    plain = {"liger_fused_linear_cross_entropy": None}  # which would go round a ternary head
    for preset, steps, strength in (("ternary-long", 0, 0.9995), ("ternary", 1000, 0.4)):  # as a sigmoid ends, and as one does not
        section = made(preset, shape(**left, strength=strength), overrides=plain).config["downcycle_ternary"]
        assert section == {"schedule": "linear", "warmup_steps": steps, "include": ["lm_head"], "exclude": [r"\.0\."], "norm": True}
    with pytest.raises(DowncycleError, match="liger_fused_linear_cross_entropy: multiplies with the head's weight"):
        made("ternary-long", shape(**left))
    with pytest.raises(DowncycleError, match="downcycle_ternary.norm: base_model was trained with a norm"):
        made("ternary-long", shape(norm=True), overrides={"downcycle_ternary.norm": None})
    assert PRESETS["ternary"].settings["downcycle_ternary"].value == PUBLISHED["ternary"]["downcycle_ternary"]  # presets are never changed


@pytest.mark.parametrize(
    ("preset", "strength", "said"),
    [
        *[(preset, 1.0, "without TernaryPlugin undoes that; .*--preset ternary-long`") for preset in ("qlora", "lora", "full", "tail")],
        ("stream", 0.4, "without TernaryPlugin undoes that; .*--preset ternary`"),
        ("ternary", 1.0, "lambda was 1, which goes back to 0 here; .*--preset ternary-long`, or schedule: linear and warmup_steps: 0"),
    ],
)
def test_what_was_learnt_is_not_undone(preset, strength, said):
    with pytest.raises(DowncycleError, match=said) as refused:
        made(preset, shape(strength=strength))
    assert "\n" not in str(refused.value)
    assert made(preset).preset == preset


def test_a_model_that_was_trained_whole_goes_on_without_a_warm_up():
    section = made("ternary", shape(strength=1.0), overrides={"downcycle_ternary.warmup_steps": 0}).config["downcycle_ternary"]
    assert section["warmup_steps"] == 0


def test_machines_without_kernels_and_without_bf16():
    cpu = made(machine=Machine(0)).config
    assert (cpu["plugins"], cpu["bf16"], cpu["attn_implementation"]) == ([PLUGIN], False, "sdpa")
    assert not {key for key in cpu if key.startswith("liger_") or key == "tf32"}
    strange = made(model=llama_shape(LLAMA_3_6B | {"model_type": "bloom"})).config
    assert strange["plugins"] == [PLUGIN]
    with pytest.raises(DowncycleError, match="sm_75 has no bf16, .* take a GPU of sm_80 or newer"):
        made(machine=Machine(1, 16, 1, "sm_75"))


def test_it_is_sharded_with_fsdp2():
    config = made(machine=Machine(8, 80)).config
    assert config["fsdp_version"] == 2 and "deepspeed" not in config
    assert made(machine=Machine(4)).fit.parallel == "fsdp2"
    assert made(machine=Machine(4), parallel="ddp").fit.parallel == "ddp"
    with pytest.raises(DowncycleError, match="deepspeed: not with TernaryPlugin: keeps weights and lambda in bf16"):
        made(machine=Machine(8, 80), parallel="zero3")


@pytest.mark.parametrize(
    ("size", "machine", "micro_batch"),
    [("6B", Machine(8, 80), 8), ("8B", Machine(8, 80), 8), ("6B", Machine(4, 48), 2), ("6B", Machine(2, 80), 4)],
)
def test_machines_that_it_fits(size, machine, micro_batch):
    recipe = made(model=llama_shape(SHAPES[size]), machine=machine)
    assert (recipe.fit.micro_batch, recipe.fit.batch, recipe.fit.parallel) == (micro_batch, 256, "fsdp2")
    assert needed_bytes(recipe.fit.training) <= machine.memory * GIB * 0.92
    state = model_size(llama_shape(SHAPES[size])).elements * 16 / machine.gpus  # float32 weights, gradients and two moments
    held = recipe.fit.training
    assert held.weights + held.gradients + held.optimizer >= state


@pytest.mark.parametrize(
    ("size", "machine", "ways"),
    [
        ("6B", Machine(1, 80), ["optimizer=adamw_torch_8bit", "--gpus 2"]),
        ("8B", Machine(1, 80), ["--gpus 4"]),
        ("8B", Machine(4, 48), ["sequence_len=2048", "optimizer=adamw_torch_8bit", "fsdp_config.offload_params=true", "--gpus 8"]),
        ("6B", Machine(1, 48), ["--gpus 4"]),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(size, machine, ways):
    model = llama_shape(SHAPES[size])
    with pytest.raises(DowncycleError, match="does not fit: ternary training .*; what would fit: ") as refused:
        made(model=model, machine=machine)
    named = re.sub("--set ", "", str(refused.value).split("what would fit: ")[1]).split(", or ")
    assert named == ways
    for way in named:  # each does what it says
        gpus = int(way.split()[1]) if way.startswith("--gpus") else machine.gpus
        keys = {} if way.startswith("--gpus") else parse_settings([way])
        assert made(model=model, machine=Machine(gpus, machine.memory), overrides=keys).fit.training


def test_memory_follows_the_plugin_and_not_the_preset():
    size, machine = model_size(shape()), Machine(1)
    full = {key: setting.value for key, setting in PRESETS["full"].settings.items()}
    needs = {
        name: estimate(size, full | keys, 1, machine, "none")
        for name, keys in {
            "plain": {},
            "ternary": {"plugins": [PLUGIN]},
            "taught": {"plugins": [PLUGIN], "downcycle_ternary": {"distill": {"weight": 0.5}}},
            "unused": {"downcycle_ternary": {"distill": {"weight": 0.5}}},
        }.items()
    }
    assert needs["plain"] == needs["unused"]
    assert (needs["plain"].optimizer, needs["ternary"].optimizer) == (4 * size.elements, 8 * size.elements)
    assert needs["taught"].weights - needs["ternary"].weights == 2 * size.elements


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"downcycle_ternary.warmup_step": 5}, "downcycle_ternary.warmup_step: there is no such key here; did you mean warmup_steps"),
        ({"downcycle_ternary.schedule": "sigmoid"}, "warmup_steps: not read with schedule: sigmoid"),
        ({"downcycle_ternary.exclude": ["_proj"]}, "no linear map that becomes ternary"),
        ({"downcycle_ternary.distill": {"weight": 0.5}}, "liger_fused_linear_cross_entropy: gives no logits"),
        ({"adapter": "lora", "lora_r": 8, "lora_alpha": 8, "lora_target_linear": True}, "adapter: not with TernaryPlugin"),
        ({"plugins": [LIGER]}, f"downcycle_ternary: needs plugin {PLUGIN}"),
    ],
)
def test_what_a_user_sets_is_checked(overrides, said):
    with pytest.raises(DowncycleError, match=said):
        made(overrides=overrides)


def test_the_command_leaves_the_healing_recipe_alone(downcycle, make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "m", config={"max_position_embeddings": 64})
    assert downcycle("recipe", "m").out == "m/axolotl.yaml\n"
    heals = (tmp_path / "m" / "axolotl.yaml").read_text()
    assert downcycle("recipe", "m", "--preset", "ternary") == (0, "m/axolotl-ternary.yaml\n", "")
    assert yaml.safe_load((tmp_path / "m" / "axolotl-ternary.yaml").read_text())["output_dir"] == "outputs/m-1.58"
    assert (tmp_path / "m" / "axolotl.yaml").read_text() == heals
    answer = downcycle("recipe", "m", "--preset", "ternary-long")
    assert answer.code == 1 and "m: was never trained ternary" in answer.err
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"downcycle_ternary": LEFT}))
    assert downcycle("recipe", "m", "--preset", "ternary-long").out == "m/axolotl-ternary-long.yaml\n"


def test_a_cut_brings_the_recipe_that_was_asked_for(downcycle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = downcycle("--src", "demo", "--keep", "3", "--out", "c", "--recipe", "ternary")
    assert code == 0 and "with axolotl-ternary.yaml, which trains it; for your GPUs: downcycle recipe c --preset ternary --gpus N" in err
    config = yaml.safe_load((tmp_path / "c" / "axolotl-ternary.yaml").read_text())
    assert config == make_recipe(open_checkpoint("c"), "c", "ternary").config
    assert not (tmp_path / "c" / "axolotl.yaml").exists()
    assert sort_files(tmp_path / "c").left_out == {"axolotl-ternary.yaml": "recipe"}  # of a push
