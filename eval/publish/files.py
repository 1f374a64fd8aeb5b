"""Plan a push: which files of a folder go to which repo, after everything that can be checked without the Hub.

Sends nothing. What goes is listed with its bytes, what stays behind with the reason; a folder that must not be published is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...recipes.commands import RECIPE
from ...surgery.checkpoint import open_checkpoint
from ...surgery.errors import DowncycleError
from ...surgery.filenames import ADAPTER_CONFIG, CONFIG
from ...surgery.sources import Progress
from ..card.facts import Facts, gather, gather_adapter, is_adapter
from ..card.redact import redact_recipe
from ..card.repo_name import check_repo_name
from ..secrets import find_secrets, own_secrets
from .legal import check_name, notes, read_card
from .places import places
from .proof import foreign_weights, other_weights, prove_adapter, prove_model
from .rules import SECRET, sort_files

MODEL, ADAPTER = "model", "adapter"
FOREIGN = "weights of which nothing is known"
HOLD_SECRETS = "what looks like secrets"

Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class PushPlan:
    """What a push sends. files: bytes of each, by its path in the repo; left_out: why, by path, folders with a slash behind.

    proof: what was proved of it, in words. contents: where each file lies, or what it holds. stamps: what the
    file system said of each before it was read.
    """

    folder: Path
    repo: str
    files: Mapping[str, int]
    left_out: Mapping[str, str]
    proof: str
    notes: tuple[str, ...] = ()
    contents: Mapping[str, Path | bytes] = field(default_factory=dict)
    stamps: Mapping[str, Stamp | None] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """All bytes that go."""
        return sum(self.files.values())

    def change(self) -> DowncycleError | None:
        """Return what is to be said of files that have changed since they were checked; None where none has."""
        changed = [path for path, stamp in self.stamps.items() if stamp != _stamp(self.folder / path)]
        if not changed:
            return None
        return DowncycleError(f"{self.folder}: {shorten(changed)} changed while it was pushed; when nobody writes there, push again")


def plan_push(
    folder: str | Path,
    repo: str,
    *,
    include_recipe: bool = False,
    src: str | Path | None = None,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress = lambda count: None,
) -> PushPlan:
    """Check a folder and list what a push of it would send.

    Args:
        repo: USER/NAME.
        include_recipe: send the Axolotl recipe too, with paths shortened and accounts taken out, as in the card.
        src, adapter: what the folder was made from, where it is not where the folder says.
        progress: called with the number of bytes of each step of the comparison with the parent.
    Raises:
        DowncycleError: no model or adapter, one that does not verify, secrets or states of a training among its files, a name that its
            licence does not allow.
    """
    folder = Path(os.path.expanduser(folder))
    check_repo_name(repo)
    kind = _kind(folder)
    if kind == ADAPTER and adapter is not None:
        raise DowncycleError(f"--adapter {adapter}: {folder} is an adapter itself; leave it out")
    found = sort_files(folder)
    stamps = {path: _stamp(place) for path, place in found.files.items()}
    checkpoint = open_checkpoint(folder, trust_remote_code=trust_remote_code) if kind == MODEL else None
    card, metadata = read_card(folder)
    facts = gather(checkpoint, repo, folder, metadata) if checkpoint else gather_adapter(folder, repo, metadata)
    contents: dict[str, Path | bytes] = dict(found.files)
    if include_recipe:
        contents[RECIPE] = _recipe(folder, facts)
        found.left_out.pop(RECIPE, None)
    _refuse(folder, found.refused | _secrets(contents))
    check_name(facts, repo)
    if checkpoint:
        proof = prove_model(checkpoint, src, adapter=adapter, trust_remote_code=trust_remote_code, progress=progress)
    else:
        proof = prove_adapter(folder, src)
    _refuse(folder, {FOREIGN: foreign} if (foreign := foreign_weights(contents, proof)) else {})
    sizes = {path: len(place) if isinstance(place, bytes) else place.stat().st_size for path, place in sorted(contents.items())}
    said = (*proof.notes, *notes(facts, folder, repo, card, sizes), *places(contents))
    if others := other_weights(sizes):
        said += (f"nothing proves where the weights in {shorten(others)} come from; they go as they are",)
    return PushPlan(folder, repo, sizes, found.left_out, proof.words, said, contents, stamps)


def _kind(folder: Path) -> str:
    if is_adapter(folder):
        return ADAPTER
    if (folder / CONFIG).is_file():
        return MODEL
    what = "neither a model nor an adapter" if folder.is_dir() else "no such folder"
    raise DowncycleError(f"{folder}: {what}; give the folder that holds {CONFIG} or {ADAPTER_CONFIG}")


def _recipe(folder: Path, facts: Facts) -> bytes:
    """Return the recipe as it may be published: the folder's own, or that of the training whose adapter was merged."""
    if (folder / RECIPE).is_file():
        return redact_recipe((folder / RECIPE).read_text()).encode()
    if facts.training and facts.training.recipe:
        return facts.training.recipe.encode()
    raise DowncycleError(f"--include-recipe: {folder} has no {RECIPE}, and that of its training was not found; copy it into the folder")


def _secrets(contents: Mapping[str, Path | bytes]) -> dict[str, list[str]]:
    own = own_secrets()
    found = {path: secrets for path, place in contents.items() if (secrets := find_secrets(place, own))}
    return {HOLD_SECRETS: [f"{path}: {', '.join(secrets)}" for path, secrets in found.items()]} if found else {}


def _refuse(folder: Path, refused: Mapping[str, list[str]]) -> None:
    if refused:
        kinds = "; ".join(f"{what} ({shorten(paths)})" for what, paths in refused.items())
        hint = "; a secret that others have seen is to be replaced" if {SECRET, HOLD_SECRETS} & refused.keys() else ""
        raise DowncycleError(f"{folder}: not pushed, as it holds {kinds}. Take that out, and push again{hint}")


def shorten(paths: Iterable[str]) -> str:
    """Name the first three of many."""
    paths = [path if path.isprintable() else ascii(path)[1:-1] for path in paths]
    first, more = paths[:3], len(paths) - 3
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def _stamp(place: Path) -> Stamp | None:
    try:
        status = place.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino
