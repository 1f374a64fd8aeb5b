"""axolotl_configs: the files are those that the recipes make today, and Axolotl itself finds no fault in them."""

import json
import shlex

import pytest
import yaml

from downcycle.recipes.configs import FILES, FOLDER, LLAMA_3_6B, TRAINED, config_texts, llama_shape, write_configs
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
    jobs = []
    for preset in PRESETS:
        for machine in (Machine(0), Machine(1, 80), Machine(4, 80, arch="sm_90"), Machine(1, 80, arch="sm_75")):
            whole = "adapter" not in PRESETS[preset].settings
            if (machine.arch == "sm_75" and whole) or (machine.gpus == 1 and "ternary" in preset):
                continue  # refused: fp16 weights cannot be trained whole; float32 weights do not fit
            model = llama_shape(LLAMA_3_6B | TRAINED if PRESETS[preset].goes_on else LLAMA_3_6B)
            jobs.append((make_recipe(model, "Llama-3-6B", preset, machine=machine).config, machine.gpus, machine.arch))
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


def launch_lines(text: str) -> list[list[str]]:
    """The commands in a recipe's head."""
    lines = [line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   ")]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("axolotl ", "torchrun "))]


@pytest.mark.parametrize("name", FILES)
def test_axolotl_and_torchrun_take_the_launch_lines(name, monkeypatch):
    """The programs' own parsers read each line; what they would start is looked at and not started."""
    pytest.importorskip("axolotl")
    from axolotl.cli import main
    from axolotl.cli.utils import train
    from torch.distributed.run import parse_args

    machine, started = FILES[name][1], []
    monkeypatch.setattr(train.os, "execvpe", lambda program, command, env: started.append(command))
    monkeypatch.setattr(train, "_launch_python_training", lambda file, options: started.append(["python", file, options]))
    monkeypatch.chdir(FOLDER.parent)
    (words,) = launch_lines((FOLDER / name).read_text())
    if words[0] == "axolotl":
        main.cli.main(words[1:], standalone_mode=False)
        (words,) = started
    if machine.gpus * machine.nodes < 2 or words[0] == "python":
        file = f"axolotl_configs/{name}"
        assert file in words and words[0] == ("python" if machine.gpus == 0 or "ray" in name else "accelerate")
        assert words[0] == "accelerate" or words[2].get("use_ray") == (True if "ray" in name else None)
        return
    parsed = parse_args(words[1:])
    assert (parsed.nnodes, parsed.nproc_per_node) == (str(machine.nodes) if machine.nodes > 1 else "1:1", str(machine.gpus))
    assert (parsed.module, parsed.training_script, parsed.training_script_args[0]) == (True, "axolotl.cli.train", f"axolotl_configs/{name}")
