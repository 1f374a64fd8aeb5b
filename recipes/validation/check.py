"""Check an Axolotl YAML file: name every fault, in words a user can act on, all together.

Reads the file, gathers what keys, conflicts, model and Axolotl's own validation say, and judges only which of the files it names are here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...surgery.checkpoint import open_checkpoint
from ...surgery.errors import DowncycleError
from .conflicts import conflicts
from .data_conflicts import TEXTS, entries
from .hardware import capabilities
from .keys import check_keys, plugins_of
from .model_faults import model_faults
from .names import MAPPED, SLIP, nearest, notes, replacements
from .sharding import assumed_gpus
from .ternary import base_notes

LARGEST_FILE = 1_000_000  # bytes; a recipe has a few thousand
LARGEST_TREE = 100_000  # values
OFFLINE = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}

Job = tuple[dict[str, Any], int, str]  # config, GPUs in all, compute capability

DEEPSPEED_FILES = (  # what `axolotl fetch deepspeed_configs` brings
    *("zero1", "zero1_torch_compile", "zero2", "zero2_torch_compile"),
    *("zero3", "zero3_bf16", "zero3_bf16_cpuoffload_all", "zero3_bf16_cpuoffload_params"),
)
LEFT_OUT = "Axolotl's own validation was left out, since Axolotl is not installed; for it: pip install 'downcycle[train]'"


@dataclass(frozen=True)
class Report:
    """What a check found: faults to mend, and notes that hinder nothing.

    gpus: how many GPUs it was checked for. by_axolotl: whether Axolotl's own validation had its say.
    """

    faults: list[str]
    notes: list[str]
    gpus: int
    by_axolotl: bool


def check_file(path: Path, gpus: int | None = None, arch: str = "sm_80") -> Report:
    """Check one YAML file for `gpus` GPUs (0: a CPU; None: as many as it takes) of one compute capability.

    Where Axolotl is not installed, its own validation is left out, and a note says so.
    """
    capabilities(gpus or 0, arch)
    config, faults = read_config(path)
    if config is None:
        return Report(faults, [], 1 if gpus is None else gpus, False)
    gpus = assumed_gpus(config) if gpus is None else gpus
    missing, said = _deepspeed_file(config)
    unfit, absent = _model_and_text(config)
    ours = [*faults, *check_keys(config), *conflicts(config, gpus, arch), *missing, *unfit]
    installed = find_spec("axolotl") is not None
    theirs = _unsaid(validate([(config, gpus, arch)])[0], ours) if installed else []
    told = [*notes(config), *said, *absent, *([] if installed else [LEFT_OUT])]
    return Report(list(dict.fromkeys([*ours, *theirs])), told, gpus, installed)


def _deepspeed_file(config: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Faults and notes about a DeepSpeed file that is not where `axolotl train` would look for it: in the current folder."""
    named = config.get("deepspeed")
    if not isinstance(named, str) or not named or named.lstrip().startswith("{") or Path(named).is_file():
        return [], []
    place = Path(named)
    if place.parent.name == "deepspeed_configs" and place.stem in DEEPSPEED_FILES:
        return [], [f"deepspeed: {named} is not here; run `axolotl fetch deepspeed_configs` where you train"]
    hint = nearest(place.stem, DEEPSPEED_FILES, SLIP).replace("did you mean ", "did you mean deepspeed_configs/").replace("?", ".json?")
    return [f"deepspeed: there is no file {named} here, where Axolotl looks for it{hint}"], []


def _model_and_text(config: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What does not fit the model, where it lies on this machine; and notes: what training would undo, and what is not here."""
    texts = [entry for key in TEXTS for entry in entries(config, key)]
    base = config.get("base_model")
    named = {f"base_model: {base}": base} | {f"datasets: {entry.get('path')}": entry.get("path") for entry in texts}
    absent = [
        f"{what} is not here; run Axolotl where it lies"
        for what, path in named.items()
        if isinstance(path, str) and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*|.*://.*", path) and not os.path.exists(path)
    ]
    if not isinstance(base, str) or not os.path.isdir(base):
        return [], absent
    try:
        model = open_checkpoint(Path(base), trust_remote_code=True)
        return list(model_faults(config, model)), [*absent, *base_notes(config, model.config, model.name)]
    except DowncycleError as error:
        return [f"base_model: {error}"], absent


def read_config(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Read a YAML file with PyYAML, as Axolotl does; the mapping, or None and why it is none, and its doubled keys."""
    import yaml

    try:
        if (size := path.stat().st_size) > LARGEST_FILE:
            return None, [f"{size:,} bytes; a recipe has a few thousand: is this the right file?"]
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DowncycleError(f"{path}: {error.strerror or error}; give an Axolotl YAML file") from error
    except UnicodeDecodeError:
        return None, ["not UTF-8 text; give an Axolotl YAML file"]
    try:
        documents = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
        config = yaml.safe_load(text) if len(documents) == 1 else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return None, [f"not YAML: {' '.join(str(error).split())[:300]}"]
    if len(documents) != 1 or config is None:
        return None, [
            f"{len(documents)} YAML documents; Axolotl reads one" if len(documents) > 1 else "empty; an Axolotl config is a YAML mapping"
        ]
    if _weight(documents[0], {}, ()) > LARGEST_TREE:
        return None, [f"its anchors unfold to more than {LARGEST_TREE:,} values or contain themselves; write the values out"]
    if not isinstance(config, dict):
        return None, [f"a YAML {type(config).__name__}, not a mapping; write one `key: value` a line"]
    return config, list(_doubled(documents[0]))


def _weight(node: Any, known: dict[int, int], above: tuple[int, ...]) -> int:
    """How many values a YAML node has once its anchors are unfolded; one that contains itself has too many."""
    if id(node) in above:
        return LARGEST_TREE + 1
    if id(node) not in known:
        parts = node.value if isinstance(node.value, list) else []
        inner = [part for entry in parts for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_weight(part, known, (*above, id(node))) for part in inner)
    return known[id(node)]


def _doubled(node: Any, path: str = "") -> Iterable[str]:
    """Keys that stand twice in one mapping: YAML takes the last and says nothing."""
    if not isinstance(node.value, list):
        return
    seen: dict[str, int] = {}
    pairs = node.value if node.id == "mapping" else [(None, item) for item in node.value]
    for number, (key, value) in enumerate(pairs):
        name = key.value if key is not None and isinstance(key.value, str) else f"[{number}]"
        if key is not None and name in seen and name != "<<":
            yield f"{path}{name}: stands twice, in lines {seen[name]} and {key.start_mark.line + 1}; YAML takes the last silently"
        if key is not None:
            seen[name] = key.start_mark.line + 1
        yield from _doubled(value, f"{path.removesuffix('.')}{name}." if key is None else f"{path}{name}.")


def validate(jobs: list[Job]) -> list[list[str]]:
    """What Axolotl's own validation says about each (config, GPUs, arch), in order.

    Configs with the same plugins share a process; other plugins have another, because plugins stay registered.
    """
    if find_spec("axolotl") is None:
        raise DowncycleError("Axolotl is not installed, so its own validation cannot run; try: pip install 'downcycle[train]'")
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for number, (config, _, _) in enumerate(jobs):
        groups[repr(plugins_of(config))].append(number)
    answers: dict[int, list[str]] = {}
    for group in groups.values():
        asked = [{"config": config, "capabilities": capabilities(gpus, arch)} for config, gpus, arch in (jobs[number] for number in group)]
        answers |= zip(group, _run(asked), strict=True)
    return [answers[number] for number in range(len(jobs))]


def _run(asked: list[dict[str, Any]]) -> list[list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder, "jobs.json"), Path(folder, "answers.json")
        question.write_text(json.dumps(asked, default=str), encoding="utf-8")
        command = [sys.executable, "-m", "downcycle.recipes.validation.axolotl_validate", str(question), str(answer)]
        done = subprocess.run(command, env=os.environ | OFFLINE, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
        if done.returncode or not answer.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            raise DowncycleError(f"Axolotl's own validation did not run: {lines[-1].strip()[:300]}; try: pip install 'downcycle[train]'")
        found: list[list[str]] = json.loads(answer.read_text(encoding="utf-8"))
        return found


def _unsaid(theirs: list[str], ours: list[str]) -> list[str]:
    """Axolotl's faults less those about keys that ours name already, and less crashes where ours name a cause."""
    plain = [fault.split("; did you mean")[0] for fault in ours]
    paths = {fault.split(": ")[0] for fault in plain}
    paths |= {replacements()[path] for path in paths if path in MAPPED}
    words = {word for fault in plain for word in _words(fault)} | paths
    return [fault for fault in theirs if not (ours and fault.startswith("Axolotl crashes")) and not _said(fault, paths, words)]


def _said(fault: str, paths: set[str], words: set[str]) -> bool:
    place = re.match(r"([\w.\[\]]+): ", fault)
    if place:
        return any(path == place[1] or path.startswith((f"{place[1]}.", f"{place[1]}[")) for path in paths)
    return bool(words & _words(fault)) or any(f"`{path}`" in fault for path in paths)


def _words(fault: str) -> set[str]:
    """The names of keys in a line; Axolotl writes 8bit for load_in_8bit, too."""
    return set(re.findall(r"[a-z0-9]+(?:_[a-z0-9]+)+", re.sub(r"\b([48]bit)\b", r"load_in_\1", fault)))
