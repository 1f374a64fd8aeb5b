"""What is left on this machine of the training that healed a model: the recipe, the trainer's log, the text, the releases used.

Reads what Axolotl and the trainer wrote and infers nothing: what they do not say stays unknown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...recipes.commands import RECIPE
from ...recipes.dataset.source import FINEWEB, REPORT
from ...recipes.presets import FINEWEB_1B
from ...recipes.text_source import COUNTED
from ...recipes.training import history
from ...recipes.validation.data_conflicts import TEXTS, entries
from ...surgery.errors import DowncycleError
from ...surgery.filenames import README
from ..origin import training_log
from ..results import Logged
from .redact import name_of, redact_recipe

HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
LANGUAGES = {FINEWEB: "en", FINEWEB_1B: "en"}  # of Hub data sets, as their cards say
MADE_FROM = {FINEWEB_1B: FINEWEB}
HUB_DATA = {FINEWEB, FINEWEB_1B, *COUNTED}  # data sets of the Hub that recipes name here; another of two parts may be a folder
COUNTS = ("total_train_batch_size", "num_devices")  # what the trainer says and the recipe does not


@dataclass(frozen=True)
class Text:
    """A text that a model was trained on. name: a Hub id, or what the folder or file is called; source: the Hub data set it is from.

    doubtful: what it was called, where that may be a folder or a data set of the Hub.

    part: configuration of the data set. tokens, documents: to train on, where counted. language: an ISO code, where known.
    """

    name: str
    source: str | None = None
    doubtful: str = ""
    part: str | None = None
    tokens: int | None = None
    documents: int | None = None
    language: str | None = None


@dataclass(frozen=True)
class Training:
    """What is known of a training. recipe: its YAML, fit for publication; config: its keys and values, as on this machine.

    log: of the trainer. tokens: that the trainer counted. counts: what it says of devices and batch. versions: of packages, by name.
    """

    recipe: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    log: tuple[Logged, ...] = ()
    tokens: int | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    texts: tuple[Text, ...] = ()


def read_training(output: Path | None, recipes: Iterable[Path] = ()) -> Training | None:
    """Read what is known of a training.

    Args:
        output: its output folder, where it is still there.
        recipes: files that may be its recipe; one is taken where it names this output folder and Axolotl's own card holds none.
    """
    card = _read(output / README) if output else ""
    log = training_log(output) if output else ()
    text = recipe_in_card(card)
    if not text and output:
        text = next((one for path in (output / RECIPE, *recipes) if _names_output(one := _read(path), output)), "")
    if not text and not log and not card:
        return None
    config = parse_recipe(text)
    return Training(
        recipe=redact_recipe(text) if text else "",
        config=config,
        log=log,
        tokens=_tokens_seen(output) if output else None,
        counts=_counts(card),
        versions=_versions(card),
        texts=tuple(_texts(config, [Path(), *([output.parent] if output else [])])),
    )


def parse_recipe(text: str) -> dict[str, Any]:
    """Return the keys and values of a recipe; nothing of what is no YAML mapping."""
    import yaml

    with suppress(yaml.YAMLError):
        if isinstance(value := yaml.safe_load(text), dict):
            return value
    return {}


def recipe_in_card(card: str) -> str:
    """Return the YAML that Axolotl, or this package, folded into a model card; empty where there is none."""
    pattern = r"<details><summary>[^<]*axolotl config[^<]*</summary>.*?\n(```+)yaml\n(.*?)\n\1\s*</details>"
    found = re.search(pattern, card, re.DOTALL | re.IGNORECASE)
    return found[2].strip("\n") + "\n" if found else ""


def _read(path: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text()
    return ""


def _names_output(recipe: str, output: Path) -> bool:
    """Whether a recipe trains into this folder; a path below another current folder is taken at its end."""
    named = parse_recipe(recipe).get("output_dir")
    if not isinstance(named, str):
        return False
    wanted, there = Path(named).expanduser(), output.resolve()
    return wanted.resolve() == there or not wanted.is_absolute() and there.parts[-len(wanted.parts) :] == wanted.parts


def _tokens_seen(output: Path) -> int | None:
    """How many tokens the trainer had seen at the last entry of its log that says so."""
    with suppress(DowncycleError):
        seen = [one["tokens/total"] for one in history(output) if isinstance(one.get("tokens/total"), int)]
        return seen[-1] if seen else None
    return None


def _counts(card: str) -> dict[str, int]:
    found = re.findall(rf"^(?:- |\| `)({'|'.join(COUNTS)})(?:: |` \| )([\d,]+)", card, re.MULTILINE)
    return {name: int(count.replace(",", "")) for name, count in found}


def _versions(card: str) -> dict[str, str]:
    """Return the releases that a card lists under `Framework versions`, and that of Axolotl."""
    axolotl = re.search(r"^axolotl version: `([^`\n]+)`", card, re.MULTILINE)
    _, _, listed = card.partition("# Framework versions\n")
    found = re.match(r"(?:\s*- (?:[A-Za-z]+) [\w.+-]+(?: \([^)\n]*\))?(?=\n|$))+", listed)
    pairs = re.findall(r"- ([A-Za-z]+) ([\w.+-]+)(?=\n|$)", found[0]) if found else []
    return ({"Axolotl": axolotl[1]} if axolotl else {}) | dict(pairs)


def _texts(config: Mapping[str, Any], places: list[Path]) -> Iterable[Text]:
    """Yield what a recipe trains on; held-out texts are not trained on."""
    for key in TEXTS:
        if key != "test_datasets":
            for entry in entries(dict(config), key):
                if isinstance(path := entry.get("path"), str):
                    yield _text(path, entry, places)


def _text(path: str, entry: Mapping[str, Any], places: list[Path]) -> Text:
    """Describe one text: by the report of `downcycle data`, where its folder is still there, or as a Hub data set."""
    part = entry.get("name") if isinstance(entry.get("name"), str) else None
    for place in places:
        with suppress(OSError, ValueError, KeyError, TypeError):
            report = json.loads((place / Path(path).expanduser() / REPORT).read_text())
            arguments, train = report["arguments"], report["splits"]["train"]
            source = arguments["src"].partition("@")[0] if report["revision"] else None
            language = arguments["language"] or LANGUAGES.get(source or "")
            counts = {"tokens": train["tokens"], "documents": train["documents"]}
            return Text(name_of(path), source, part=arguments["name"], language=language, **counts)
    if path in HUB_DATA:
        return Text(path, MADE_FROM.get(path, path), part=part, tokens=COUNTED.get(path), language=LANGUAGES.get(path))
    is_here = any((place / Path(path).expanduser()).exists() for place in places)
    return Text(name_of(path), doubtful=path if re.fullmatch(HUB_ID, path) and not is_here else "")
