"""Sort the files of a folder by their names: what goes to the Hub, what stays behind, and what must not lie there when it is pushed.

Reads names and the file system's word about them; opens no file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from ...recipes.presets import RECIPE, RECIPES
from ...surgery.filenames import PICKLES, leads_out
from ..secrets import is_secret_name

STATE = "state of a training"
CACHE = "cache"
LOG = "log"
# What stays behind, by its name, and why.
FOLDERS = {
    "checkpoint-*": STATE,
    **dict.fromkeys(("prepared", "*_prepared", "datasets-cache", "__pycache__"), CACHE),
    **dict.fromkeys(("runs", "wandb", "mlruns", "tensorboard"), LOG),
}
FILES = {
    **dict.fromkeys(("*.log", "events.out.tfevents.*"), LOG),
    **dict.fromkeys(("training_args.bin", "trainer_state.json", "tokens_state.json"), STATE),
    **dict.fromkeys(("*.lock", "*.tmp", "*.part", "*.incomplete", "*~", "*.swp", "*.pyc"), "left by a program"),
}
# Why a folder is refused: what a file of this name is.
SECRET = "secrets by their names"
OPTIMIZER = "states of an optimizer"
PICKLED = "pickles, which can run code when read"
STATES = ("*optimizer*", "optim", "optim[_-]*", "opt", "opt_state*", "scheduler*", "scaler")
REFUSED = {
    **dict.fromkeys(("optimizer*.pt", "optimizer*.bin", "scheduler*.pt", "scheduler*.bin", "scaler.pt", "rng_state*"), OPTIMIZER),
    **dict.fromkeys((f"{name}.{end}" for name in STATES for end in ("npz", "npy", "h5", "msgpack", "safetensors")), OPTIMIZER),
    **dict.fromkeys(("*.distcp", "zero_pp_rank_*", "*_optim_states.pt", "*_model_states.pt"), OPTIMIZER),
    **dict.fromkeys((*PICKLES, "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib"), PICKLED),
}
REFUSED_FOLDERS = {"global_step*": OPTIMIZER, "optimizer_*": OPTIMIZER, "pytorch_model_fsdp_*": OPTIMIZER}
OUTSIDE = "links that lead out of the folder"
NOWHERE = "links that lead nowhere"
UNREADABLE = "files that cannot be read"
UNFIT = "names that the Hub cannot hold"


@dataclass
class Sorted:
    """The files of a folder. files: where each lies, by its path in the folder; left_out: why, by path; refused: paths, by what."""

    files: dict[str, Path] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    refused: dict[str, list[str]] = field(default_factory=dict)


def sort_files(folder: Path) -> Sorted:
    """Sort what a folder holds, however deep; of what stays behind whole, only the folder is named."""
    result = Sorted()
    for path, entry in _walk(folder, folder.resolve(), ""):
        why, refused = _judge(path, entry, folder.resolve())
        if refused:
            result.refused.setdefault(refused, []).append(path)
        elif why:
            result.left_out[path] = why
        elif entry.is_file():
            result.files[path] = Path(entry.path)
    return result


def _walk(folder: Path, root: Path, inside: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield each entry by its path, folders with a slash behind; go into those that neither stay behind nor are refused."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        is_folder = entry.is_dir()
        path = f"{inside}{entry.name}{'/' if is_folder else ''}"
        yield path, entry
        if is_folder and not any(_judge(path, entry, root)):
            yield from _walk(Path(entry.path), root, path)


def _judge(path: str, entry: os.DirEntry[str], root: Path) -> tuple[str, str]:
    """Return why an entry stays behind, and why it is refused; at most one is said."""
    if entry.is_symlink():
        if not os.path.exists(entry.path):
            return "", NOWHERE
        if not Path(entry.path).resolve().is_relative_to(root):
            return "", OUTSIDE
        if entry.is_dir():
            return "link to a folder of this one", ""
    is_folder = entry.is_dir()
    if refused := SECRET * (not is_folder and is_secret_name(entry.name)) or _by_name(entry.name, REFUSED_FOLDERS if is_folder else {}):
        return "", refused
    if why := _by_name(entry.name, FOLDERS if is_folder else FILES) or "hidden" * entry.name.startswith("."):
        return why, ""
    if path in RECIPES:
        return "recipe; --include-recipe takes it along" if path == RECIPE else "recipe", ""
    if is_folder:
        return "", ""
    if not entry.is_file():
        return "no plain file", ""
    return "", _by_name(entry.name, REFUSED) or _unfit(path, entry)


def _by_name(name: str, table: dict[str, str]) -> str:
    return next((what for pattern, what in table.items() if fnmatch(name.lower(), pattern)), "")


def _unfit(path: str, entry: os.DirEntry[str]) -> str:
    if not path.isprintable() or leads_out(path) or len(path.encode(errors="surrogateescape")) > 255:
        return UNFIT
    return "" if os.access(entry.path, os.R_OK) else UNREADABLE
