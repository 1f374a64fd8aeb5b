"""What is shipped: the exact files of the wheel, and a cut made by it in a clean environment without torch."""

import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("pyproject_hooks")  # comes with build
ROOT = Path(__file__).parent.parent
PACKAGES = {"surgery", "surgery/adapter", "recipes", "recipes/dataset", "recipes/demo", "recipes/validation", "eval", "axolotl_configs"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")  # clean of what earlier builds left, and no other test builds there
    for path in tracked("."):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, source / path)
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", folder, source], check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def tracked(*patterns: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", "--", *patterns], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(listed.stdout.split())


def test_every_folder_with_code_is_a_declared_package():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {str(Path(path).parent) for path in tracked("*.py") if "/" in path and not path.startswith("tests/")}
    assert set(declared) == {"downcycle." + folder.replace("/", ".") for folder in folders | PACKAGES}


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {path for path in tracked("*.py") if not path.startswith("tests/")}
    data = tracked(
        "axolotl_configs/*", "recipes/validation/axolotl_keys.json", "recipes/demo/*", "eval/report/page.html", "eval/benchmarks/*.yaml"
    )
    assert found == {f"downcycle/{path}" for path in sources | data}


def test_wheel_cuts_the_built_in_model_without_torch(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], check=True, capture_output=True)
    assert subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 1
    downcycle = tmp_path / "env" / "bin" / "downcycle"
    cut = subprocess.run([downcycle, "--src", "demo", "--keep", "9"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert cut.stdout == "demo-9L\n"
    assert sorted(path.name for path in (tmp_path / "demo-9L").iterdir()) == [
        "README.md",
        "axolotl.yaml",
        "chat_template.jinja",
        "config.json",
        "downcycle.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    proof = subprocess.run([downcycle, "verify", "demo-9L", "--src", "demo"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "84 tensors" in proof.stdout
    assert "all equal" in proof.stdout
