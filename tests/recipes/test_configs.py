"""axolotl_configs: the files are those that the recipes make today, and Axolotl itself finds no fault in them."""

import pytest
import yaml

from downcycle.recipes.check import check_file
from downcycle.recipes.configs import FILES, FOLDER, config_texts, write_configs
from downcycle.recipes.recipe_text import is_untouched


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


@pytest.mark.parametrize("name", FILES)
def test_axolotl_finds_no_fault(name):
    pytest.importorskip("axolotl")
    machine = FILES[name][1]
    assert check_file(FOLDER / name, machine.gpus * machine.nodes, machine.arch) == []
