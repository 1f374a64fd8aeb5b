"""axolotl_configs: the files are those that the recipes make today, and Axolotl itself finds no fault in them."""

import json

import pytest
import yaml

from downcycle.recipes.configs import FILES, FOLDER, LLAMA_3_6B, config_texts, llama_shape, write_configs
from downcycle.recipes.machine import Machine
from downcycle.recipes.presets import PRESETS
from downcycle.recipes.recipe import make_recipe
from downcycle.recipes.recipe_text import is_untouched
from downcycle.recipes.validation.check import check_keys, conflicts, validate


def test_the_files_are_what_is_made_today(tmp_path):
    write_configs(tmp_path)
    made = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.yaml")}
    assert made == config_texts()
    assert {str(path.relative_to(FOLDER)): path.read_text() for path in FOLDER.rglob("*.yaml")} == made
    assert all(is_untouched(text) and yaml.safe_load(text) for text in made.values())


def test_a_file_that_is_no_longer_made_goes(tmp_path):
    (tmp_path / "old.yaml").touch()
    write_configs(tmp_path)
    assert not (tmp_path / "old.yaml").exists()


def test_axolotl_finds_no_fault():
    pytest.importorskip("axolotl")
    machines = {name: machine for name, (_, machine, _) in FILES.items()}
    jobs = {
        name: (yaml.safe_load((FOLDER / name).read_text()), machine.gpus * machine.nodes, machine.arch)
        for name, machine in machines.items()
    }
    ours = {name: check_keys(config) + conflicts(config, gpus, arch) for name, (config, gpus, arch) in jobs.items()}
    assert ours == dict.fromkeys(jobs, [])
    assert dict(zip(jobs, validate(list(jobs.values())), strict=True)) == dict.fromkeys(jobs, [])


def test_axolotl_finds_no_fault_in_any_preset():
    pytest.importorskip("axolotl")
    llama = llama_shape(LLAMA_3_6B)
    jobs = []
    for preset in PRESETS:
        for machine in (Machine(0), Machine(1, 80), Machine(4, 80, arch="sm_90"), Machine(1, 80, arch="sm_75")):
            if machine.arch != "sm_75" or preset not in ("full", "tail"):  # refused: fp16 weights cannot be trained whole
                jobs.append((make_recipe(llama, "Llama-3-6B", preset, machine=machine).config, machine.gpus, machine.arch))
    assert validate(jobs) == [[]] * len(jobs)


def test_the_command_checks_any_file(downcycle, tmp_path):
    pytest.importorskip("axolotl")
    file = FOLDER / "demo" / "qlora-cpu.yaml"
    code, out, err = downcycle("recipe", "--check", file, "--gpus", "0")
    assert (code, err) == (0, "") and "no fault found" in out
    broken = tmp_path / "broken.yaml"
    broken.write_text(file.read_text() + "lerning_rate: 1\nload_in_8bit: true\n")
    code, out, err = downcycle("recipe", "--check", broken, "--gpus", "0")
    assert code == 1 and out == ""
    assert "lerning_rate" in err and "load_in_8bit" in err and err.splitlines()[-1].endswith("mend and check again")
    shown = downcycle("recipe", "--check", broken, "--gpus", "0", "--json")
    assert shown.code == 1 and len(json.loads(shown.out)["faults"]) >= 2
