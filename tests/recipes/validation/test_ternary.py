"""What is wrong with a ternary training is named, and what is right passes; the plugin's own reading of its keys is the oracle."""

import json
import re

import pytest

from downcycle import open_checkpoint
from downcycle.recipes.recipe import make_recipe
from downcycle.recipes.validation.check import check_file, check_keys, conflicts, validate
from downcycle.recipes.validation.model_faults import model_faults
from downcycle.recipes.validation.own_plugins import OWN, SECTION, TERNARY
from downcycle.surgery.checkpoint import DEMO_FOLDER
from downcycle.surgery.ternary.warmup import SCHEDULES

from good_configs import BASE, FSDP, LORA, QLORA

LIGER = "axolotl.integrations.liger.LigerPlugin"
CUT = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"
PLUGIN = BASE | {"plugins": [TERNARY], "bf16": True}
FUSED = PLUGIN | {"plugins": [LIGER, TERNARY], "liger_fused_linear_cross_entropy": True}
DEMO = open_checkpoint("demo")


def faults_of(config, gpus=1):
    return check_keys(config) + conflicts(config, gpus)


def said(**settings):
    return PLUGIN | {SECTION: settings}


# what stands under downcycle_ternary, and what is wrong with it: one fault
WRONG = {
    "typo": ({"warmup_step": 100}, "downcycle_ternary.warmup_step: there is no such key here; did you mean warmup_steps?"),
    "deep typo": ({"distill": {"temperatur": 2}}, "distill.temperatur: there is no such key here; did you mean temperature?"),
    "schedule": ({"schedule": "linaer"}, "schedule: 'linaer' is none of linear, ramp, exponential, sigmoid; did you mean linear?"),
    "no steps": ({"warmup_steps": -1}, "warmup_steps: -1 where at least 0"),
    "part of a step": ({"warmup_steps": 0.5}, "warmup_steps: 0.5 where a whole number"),
    "steps of another": ({"schedule": "ramp", "warmup_steps": 9}, "warmup_steps: not read with schedule: ramp, which has k; take it out"),
    "k of another": ({"k": 4.0}, "k: not read with schedule: linear, which has warmup_steps; take it out"),
    "k of nothing": ({"schedule": "ramp", "k": 0}, "k 0.0: must be a number above 0"),
    "endless k": ({"schedule": "sigmoid", "k": float("inf")}, "k inf: must be a number above 0"),
    "k in words": ({"schedule": "ramp", "k": "fast"}, "k: 'fast' where a number is needed"),
    "pattern": ({"exclude": ["*_proj"]}, "'*_proj': is no regular expression"),
    "one pattern": ({"include": "lm_head"}, "include: 'lm_head' where a list is needed"),
    "pattern of a number": ({"include": [3]}, "include[0]: 3 where text is needed"),
    "norm": ({"norm": "maybe"}, "norm: 'maybe' where true or false is needed"),
    "weight": ({"distill": {"weight": 1.5}}, "distill.weight: 1.5 where at most 1"),
    "less than no weight": ({"distill": {"weight": -0.1}}, "distill.weight: -0.1 where at least 0"),
    "no number of a weight": ({"distill": {"weight": float("nan")}}, "distill.weight: nan where a number"),
    "temperature": ({"distill": {"temperature": 0}}, "distill.temperature: 0 where more than 0"),
    "endless temperature": ({"distill": {"temperature": float("inf")}}, "distill.temperature: inf where a number"),
    "teacher": ({"distill": {"teacher": 3}}, "distill.teacher: 3 where text"),
    "distill": ({"distill": True}, "distill: true where a mapping is needed"),
}
RIGHT = {
    "nothing": {},
    "published": {"schedule": "linear", "warmup_steps": 1000},
    "at once": {"warmup_steps": 0},
    "nulls": {"warmup_steps": None, "k": None, "distill": None},
    "ramp": {"schedule": "ramp", "k": 2},
    "sigmoid": {"schedule": "sigmoid", "k": 100.0},
    "exponential": {"schedule": "exponential"},
    "patterns": {"include": ["lm_head$"], "exclude": [r"\.0\.", "down_proj"]},
    "norm": {"norm": True},
    "distill": {"distill": {"weight": 0.5, "temperature": 2.0, "teacher": "a/b"}},
    "distill by default": {"distill": {}},
    "distill alone": {"distill": {"weight": 1, "teacher": None}},
}
# configs that contradict ternary training: (config, GPUs, the one fault)
CONTRADICTIONS = {
    "lora": (LORA | {"plugins": [TERNARY]}, 1, "adapter: not with TernaryPlugin"),
    "qlora": (QLORA | {"plugins": [TERNARY]}, 1, "adapter: not with TernaryPlugin"),
    "packed": (PLUGIN | {"load_in_4bit": True}, 1, "load_in_4bit: not with TernaryPlugin"),
    "qat": (PLUGIN | {"qat": {"weight_dtype": "ternary"}}, 1, "qat: not with TernaryPlugin"),
    "onebitllms": (PLUGIN | {"use_onebitllms": True}, 1, "use_onebitllms: not with TernaryPlugin"),
    "deepspeed": (PLUGIN | {"deepspeed": {"zero_optimization": {"stage": 3}}}, 2, "deepspeed: not with TernaryPlugin"),
    "pure bf16": (BASE | {"plugins": [TERNARY], "bfloat16": True}, 1, "bfloat16: not with TernaryPlugin"),
    "fsdp 1": (PLUGIN | FSDP | {"fsdp_version": 1}, 2, "fsdp_version: 1 flattens the weights"),
    "parts of matrices": (PLUGIN | {"tensor_parallel_size": 2}, 2, "tensor_parallel_size: not with TernaryPlugin"),
    "a teacher without logits": (FUSED | {SECTION: {"distill": {}}}, 1, "liger_fused_linear_cross_entropy: gives no logits"),
    "nor by cut": (PLUGIN | {"plugins": [CUT, TERNARY], SECTION: {"distill": {}}}, 1, "cut_cross_entropy: gives no logits"),
    "two teachers": (
        PLUGIN | {"plugins": ["axolotl.integrations.kd.KDPlugin", TERNARY], "kd_trainer": True, SECTION: {"distill": {}}},
        1,
        "distill: not together with KDPlugin",
    ),
    "a ternary head": (FUSED | {SECTION: {"include": ["lm_head"]}}, 1, "liger_fused_linear_cross_entropy: multiplies with the head"),
    "a teacher of parts": (
        PLUGIN | {"context_parallel_size": 2, "attn_implementation": "flash_attention_2", SECTION: {"distill": {}}},
        2,
        "context_parallel_size: not with downcycle_ternary.distill",
    ),
    "no plugin": (BASE | {SECTION: {}}, 1, f"downcycle_ternary: needs plugin {TERNARY} under plugins"),
    "a slip in the key": (
        PLUGIN | {"downcycle_ternay": {}},
        1,
        "downcycle_ternay: downcycle has no such key; did you mean downcycle_ternary?",
    ),
    "a slip in the plugin": (
        BASE | {"plugins": ["downcycle.recipes.plugins.TernryPlugin"]},
        1,
        f"plugins: downcycle has no plugin downcycle.recipes.plugins.TernryPlugin; did you mean {TERNARY}?",
    ),
    "an empty section": (PLUGIN | {SECTION: None}, 1, "downcycle_ternary: nothing where a mapping is needed"),
}
FINE = {
    "one GPU": (PLUGIN, 1),
    "Liger's loss": (FUSED, 1),
    "a ternary head and a plain loss": (said(include=["lm_head"]), 1),
    "sharded": (PLUGIN | FSDP, 2),
    "a teacher": (said(distill={}), 1),
    "some parameters": (PLUGIN | {"unfrozen_parameters": ["^model.layers.1."]}, 1),
    "a head that stays": (FUSED | {SECTION: {"include": ["lm_head"], "exclude": ["head"]}}, 1),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_in_the_section_is_named_and_nothing_else(name):
    settings, words = WRONG[name]
    (fault,) = faults_of(said(**settings))
    assert words in fault and "\n" not in fault


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_in_the_section_passes(name):
    assert faults_of(said(**RIGHT[name])) == []


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_contradicts_ternary_training_is_named_and_nothing_else(name):
    config, gpus, words = CONTRADICTIONS[name]
    (fault,) = faults_of(config, gpus)
    assert words in fault


@pytest.mark.parametrize("name", FINE)
def test_what_does_not_contradict_it_passes(name):
    config, gpus = FINE[name]
    assert faults_of(config, gpus) == []


def test_without_the_plugin_nothing_is_asked_of_a_training():
    assert faults_of(BASE | {"deepspeed": {"zero_optimization": {"stage": 2}}}) == []


def test_no_value_of_the_section_breaks_the_check():
    odd = [None, True, 0, -1, 3.5, float("nan"), "", "1e-5", [], [None], {}, {"a": 1}, {1: 2}, ["(", 3]]
    for key in OWN[TERNARY][SECTION]["properties"]:
        for value in odd:
            for config in (said(**{key: value}), PLUGIN | {SECTION: value}, said(distill={"weight": value, "temperature": value})):
                for fault in [*faults_of(config), *model_faults(config, DEMO)]:
                    assert fault and "\n" not in fault and len(fault) < 400


def test_the_schedules_are_those_of_the_warm_up():
    assert OWN[TERNARY][SECTION]["properties"]["schedule"]["enum"] == list(SCHEDULES)


def keys_of(schema, models):
    """The keys that a JSON Schema names, at all depths."""
    schema = models[schema["$ref"]] if "$ref" in schema else schema
    parts = [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
    inner = [models[part["$ref"]] if "$ref" in part else part for part in parts]
    return {key: keys_of(part, models) for one in inner for key, part in one.get("properties", {}).items()}


def test_the_plugin_has_these_keys_and_reads_each_value_as_they_are_read_here():
    pytest.importorskip("axolotl")
    from pydantic import ValidationError

    from downcycle.recipes.plugins.settings import TernaryArgs, TernarySettings
    from downcycle.recipes.validation.axolotl_schema import _models_of

    models = _models_of(TernaryArgs)
    ours = {key: keys_of(schema, {}) for key, schema in OWN[TERNARY].items()}
    assert keys_of(models["TernaryArgs"], models) == ours
    for settings in RIGHT.values():
        TernarySettings(**settings)
    for name, (settings, _) in WRONG.items():
        with pytest.raises(ValidationError):
            print(name, TernarySettings(**settings))


BOTH = said(warmup_step=3, distill={"weight": 2}) | {"base_model": str(DEMO_FOLDER)}
SAYABLE = [name for name in WRONG if name not in ("endless k", "no number of a weight", "endless temperature")]  # JSON has none of these


@pytest.fixture(scope="module")
def answers():
    """What Axolotl says, asked in one process, since each is long to start: of what is wrong, of what is right, and of BOTH."""
    pytest.importorskip("axolotl")
    asked = [*(said(**WRONG[name][0]) for name in SAYABLE), *(said(**settings) for settings in RIGHT.values()), BOTH]
    *told, both = validate([(config, 1, "sm_80") for config in asked])
    return told[: len(SAYABLE)], told[len(SAYABLE) :], both


def test_axolotl_reads_the_plugin_too(answers):
    wrong, right, _ = answers
    assert [name for name, faults in zip(SAYABLE, wrong, strict=True) if not faults] == []
    assert right == [[]] * len(RIGHT)
    assert all(len(faults) == 1 and "\n" not in faults[0] for faults in wrong)


def test_a_file_is_checked_by_both_and_no_fault_is_said_twice(answers, tmp_path, monkeypatch):
    monkeypatch.setattr("downcycle.recipes.validation.check.validate", lambda jobs: [answers[2] for job in jobs if job[0] == BOTH])
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(BOTH))
    report = check_file(path, 1)
    assert report.by_axolotl and sorted(fault.split(":")[0] for fault in report.faults) == [
        "downcycle_ternary.distill.weight",
        "downcycle_ternary.warmup_step",
    ]


def changed(tensors=None, **config):
    return type(DEMO)(DEMO.name, {**DEMO.config, **config}, {**DEMO.tensors, **(tensors or {})}, DEMO.files)


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        (changed(quantization_config={"quant_method": "bitnet"}), {}, "base_model: its weights are packed by bitnet already"),
        (changed(model_type="gpt2"), {}, "base_model: gpt2 has no linear maps that transformers runs"),
        (changed({"model.layers.0.mlp.up_proj.weight": None}), {}, "leave it out with exclude 'up_proj\\$'"),
        (DEMO, {"exclude": ["layers"]}, "no linear map that becomes ternary; change the patterns of include and exclude"),
        (changed(downcycle_ternary={"strength": 1.0, "norm": True}), {}, "norm: base_model was trained with a norm .* write norm: true"),
        (changed(downcycle_ternary={"strength": 1.0}), {"distill": {}}, "distill.teacher: missing; base_model was trained ternary"),
        (changed(downcycle_ternary={"strength": 7}), {}, "downcycle_ternary is not what a training writes"),
        (changed(tie_word_embeddings=True), {"include": ["lm_head"]}, "its head has the weights of the embeddings"),
    ],
)
def test_a_model_that_cannot_be_trained_so_is_named(model, settings, words):
    from downcycle import Tensor

    tensors = {name: tensor or Tensor("BF16", (6, 128), lambda: ()) for name, tensor in model.tensors.items()}
    model = type(model)(model.name, model.config, tensors, model.files)
    (fault,) = model_faults(said(**settings), model)
    assert re.search(words, fault), fault
    assert list(model_faults(BASE, model)) == []  # of an ordinary training nothing is said


def test_a_model_that_fits_passes():
    trained = changed(downcycle_ternary={"strength": 1.0, "norm": True})
    assert list(model_faults(said(include=["lm_head"]), DEMO)) == []
    assert list(model_faults(said(norm=True, distill={"teacher": "a/b"}), trained)) == []
    assert list(model_faults(make_recipe(DEMO, "demo", "ternary").config, DEMO)) == []


FULLY, HALF = {"strength": 1.0}, {"strength": 0.5}
UNDONE = "base_model: was trained ternary, and training without TernaryPlugin undoes that; .* --preset {}`; .* out of its config.json"


@pytest.mark.parametrize(
    ("record", "config", "words"),
    [
        (FULLY, BASE, UNDONE.format("ternary-long")),
        (HALF, QLORA, UNDONE.format("ternary")),
        (FULLY, LORA, UNDONE.format("ternary-long")),
        (FULLY, PLUGIN, "downcycle_ternary: base_model was trained until lambda was 1, which goes back to 0 here; .* warmup_steps: 0"),
        (FULLY, said(warmup_steps=5), "goes back to 0 here"),
        (FULLY, said(schedule="ramp"), "goes back to 0 here"),
        (FULLY, said(schedule="linear", warmup_steps=0), None),
        (HALF, PLUGIN, None),
        (None, BASE, None),
        (None, PLUGIN, None),
        ({"strength": 7}, BASE, None),
    ],
)
def test_what_undoes_a_ternary_training_is_noted(record, config, words, tmp_path, monkeypatch):
    monkeypatch.setattr("downcycle.recipes.validation.check.find_spec", lambda name: None)  # our own checks are enough here
    fields = json.loads((DEMO_FOLDER / "config.json").read_text())
    for path in DEMO_FOLDER.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(fields | ({SECTION: record} if record else {})))
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(config | {"base_model": str(tmp_path)}))
    report = check_file(path, 1)
    found = [note for note in report.notes if "ternary" in note.lower()]
    assert not [fault for fault in report.faults if "trained" in fault]
    assert len(found) == bool(words) and re.search(words or "", "".join(found))
