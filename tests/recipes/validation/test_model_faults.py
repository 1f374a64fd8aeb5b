"""A config is held against the model that it names: here the built-in one and what is wrong with it on purpose."""

import re

import pytest

from downcycle import open_checkpoint
from downcycle.recipes.recipe import make_recipe
from downcycle.recipes.validation.check import check_file
from downcycle.recipes.validation.model_faults import model_faults, parameter_pattern
from downcycle.surgery.checkpoint import DEMO_FOLDER

DEMO = open_checkpoint("demo")


@pytest.mark.parametrize("preset", ["qlora", "tail", "full", "llama-3-6b"])
def test_what_is_generated_fits(preset):
    assert list(model_faults(make_recipe(DEMO, "demo", preset).config, DEMO)) == []


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"sequence_len": 2049}, "sequence_len: 2049, and the model has 2048 positions"),
        ({"special_tokens": {"pad_token": "<pad>"}}, "special_tokens.pad_token: '<pad>' is not in the vocabulary"),
        ({"special_tokens": {"eos_token": "<|end|>", "bos_token": 'a"b'}}, r"eos_token: .*; special_tokens.bos_token: 'a\"b'"),
        ({"lora_target_modules": ["q_proj", "q_projj"]}, "lora_target_modules: the model has no module 'q_projj'$"),
        ({"lora_modules_to_save": ["head"]}, "lora_modules_to_save: the model has no module 'head'"),
        ({"unfrozen_parameters": ["^lm_head.weight$", "^model.layers.12."]}, r"unfrozen_parameters: '\^model.layers.12.' is no parameter"),
    ],
)
def test_what_does_not_fit_is_named(config, said):
    assert re.search(said, "; ".join(model_faults(config, DEMO)))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"sequence_len": 2048},
        {"sequence_len": 9999, "overrides_of_model_config": {"rope_scaling": {"factor": 8}}},
        {"sequence_len": "long"},
        {"special_tokens": {"pad_token": "<|reserved_special_token_0|>", "unk_token": None}},
        {"special_tokens": {"pad_token": "<new>"}, "tokenizer_config": "elsewhere"},
        {"special_tokens": 5},
        {"lora_target_modules": ["q_proj", "self_attn.v_proj", "lm_head"]},
        {"lora_target_modules": r"model\.layers\.\d+\..*"},
        {"unfrozen_parameters": ["lm_head.weight$[:100]", "model.embed_tokens"]},
    ],
)
def test_what_fits_passes(config):
    assert list(model_faults(config, DEMO)) == []


def test_a_file_is_held_against_the_model_that_it_names(tmp_path, monkeypatch):
    monkeypatch.setattr("downcycle.recipes.validation.check.find_spec", lambda name: None)  # our own checks are enough here
    path = tmp_path / "a.yaml"

    def check(base, text, more=""):
        path.write_text(f"base_model: {base}\nlearning_rate: 1.0e-4\ndatasets: [{{path: {text}, type: completion}}]\n{more}")
        report = check_file(path, 1)
        return report.faults, [note for note in report.notes if "not installed" not in note]

    assert check(DEMO_FOLDER, tmp_path) == ([], [])
    assert check("a/model", "a/text") == ([], [])
    assert check(DEMO_FOLDER, "https://a.example/a.parquet", "sequence_len: 4096\n")[0] == [
        "sequence_len: 4096, and the model has 2048 positions; give at most so many, or stretch its rope first"
    ]
    assert check("nosuch", "./gone")[1] == [
        *("base_model: nosuch is not here; run Axolotl where it lies", "datasets: ./gone is not here; run Axolotl where it lies")
    ]
    (tmp_path / "m").mkdir()
    assert "config.json: not there" in check(tmp_path / "m", tmp_path)[0][0]


def test_patterns_as_axolotl_reads_them():
    freeze = pytest.importorskip("axolotl.utils.freeze")
    names = [*DEMO.tensors, "model-layers-1-x", "lm_head.weight.more"]
    for pattern in (
        "^model.layers.1.",
        "lm_head.weight$[:7]",
        "^lm_head.weight$",
        "model.layers.[0-3].self",
        "model.norm.weight$[2:5]",
        "norm",
    ):
        theirs = freeze.LayerNamePattern(pattern)
        assert [bool(parameter_pattern(pattern).match(name)) for name in names] == [theirs.match(name) for name in names], pattern
