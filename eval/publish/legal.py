"""What a folder's card and the licence of its model ask for before it is published: a name, files, names that others understand.

Takes facts that were gathered for the card; asks nobody.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ...surgery.checkpoint import DEMO
from ...surgery.errors import DowncycleError
from ...surgery.filenames import ADAPTER_CONFIG, LINEAGE, README, is_licence_text
from ..card.facts import Facts
from ..card.front_matter import read_front_matter
from ..card.licences import Licence, name_fault
from ..card.redact import is_path

HUB_ID = r"[\w.-]+(/[\w.-]+)?"


def read_card(folder: Path) -> tuple[str, Mapping[str, Any]]:
    """Return a folder's card and its metadata; both empty where there is none.

    Raises:
        DowncycleError: its metadata are no YAML, or name as base model what is no repo; the Hub refuses both.
    """
    place = folder / README
    text = place.read_text(errors="replace").replace("\r\n", "\n") if place.is_file() else ""
    try:
        data = read_front_matter(text).data
    except DowncycleError as error:
        raise DowncycleError(f"{place}: {error}") from error
    bases = data.get("base_model")
    for base in bases if isinstance(bases, list) else [bases] if bases is not None else []:
        if not isinstance(base, str) or is_path(base) or not re.fullmatch(HUB_ID, base):
            raise DowncycleError(
                f"{place}: its base_model is {str(base)[:100]}, which is no name on the Hub, and the Hub refuses that; write what "
                "the base is called there, or take the line out"
            )
    return text, data


def check_name(facts: Facts, repo: str) -> None:
    """Refuse a name that the licence of a model, of one of its parents, or the one that its card names, does not allow."""
    for licence in facts.licences:
        if fault := name_fault(licence.key, repo):
            raise DowncycleError(fault)


def notes(facts: Facts, folder: Path, repo: str, card: str, paths: Collection[str]) -> list[str]:
    """Say what others will miss in a folder, and what they will see of this machine."""
    found = [] if card else [f"no {README}; `downcycle card {folder}` writes one"]
    loaded = dict.fromkeys(re.findall(r"(?:Model|Tokenizer)\w*\.from_pretrained\([\"']([^\"']+)", card))
    if loaded and repo not in loaded:
        found.append(f"{README} shows how to load {next(iter(loaded))}, not {repo}; `downcycle card {folder} --name {repo}` mends that")
    for licence in facts.licences:
        found += _missing(licence, card, paths)
    named = (facts.adapter or {}).get("base_model_name_or_path")
    if isinstance(named, str) and (is_path(named) or named == DEMO):
        found.append(f"{ADAPTER_CONFIG} calls the base model {named}, as this machine does; others need its name on the Hub there")
    places = [place for step in facts.origin.steps for place in (step.parent, step.adapter) if is_path(place)]
    if LINEAGE in paths and places:
        found.append(f"{LINEAGE}, which says what the model was made from, names places of this machine, such as {places[0]}")
    return found


def _missing(licence: Licence, card: str, paths: Collection[str]) -> list[str]:
    asked, missing = f"the {licence.title.partition(',')[0]}", []
    if licence.copy and not any(map(is_licence_text, paths)):
        missing.append(f"{asked} asks that a copy of it goes along; there is no LICENSE file")
    if licence.notice and not any(path.upper().startswith("NOTICE") for path in paths):
        missing.append(f"{asked} asks for a NOTICE file; there is none")
    if licence.built_with and card and licence.built_with not in card:
        missing.append(f"{asked} asks to show “{licence.built_with}”; {README} does not")
    return missing
