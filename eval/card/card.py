"""The model card: README.md with metadata for the Hub and generated sections for people, written again without losing their words.

Puts together what the other modules of this folder know. Needs neither torch nor, but for pictures, matplotlib.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...surgery.checkpoint import Checkpoint, open_checkpoint
from ...surgery.errors import DowncycleError
from ...surgery.filenames import README, is_licence_text
from ...surgery.naming import folder_name
from ...surgery.staging import replace_file
from ..cache import best_results
from ..content import content_digest
from ..results import RESULTS, Results, find_model
from . import sections, training_text
from .boilerplate import is_trainers, persons_words, portable, written_by_trainer
from .evaluation_text import evaluation
from .facts import Facts, gather, gather_adapter, is_adapter, with_results
from .front_matter import INDEX, FrontMatter, read_front_matter, remembered, unite, write_front_matter
from .licences import base_models, is_own_notice, known_licence, name_fault, notice
from .marks import Record, Spliced, is_marked, put_record, splice, take_record
from .metadata import make_metadata
from .pictures import PICTURES, draw_pictures, drop_pictures, found_pictures
from .redact import scrub
from .repo_name import check_repo_name
from .wording import plain

NOTICE = "NOTICE"
# The sections of a card, in their order.
SECTIONS: dict[str, Callable[[Facts], str]] = {
    "summary": sections.summary,
    "making": sections.making,
    "use": sections.use,
    "training": training_text.training,
    "recipe": training_text.recipe,
    "evaluation": evaluation,
    "versions": training_text.versions,
    "limitations": sections.limitations,
    "licence": sections.licence,
    "citation": sections.citation,
}


@dataclass(frozen=True)
class CardWritten:
    """What writing a card did. kept_by_hand: sections that a person changed or wrote, and what else; deleted_by_hand: that one took out.

    missing: what is not known or not there, and what would help, a line each. pictures, notice: what was written beside the card.
    """

    path: Path
    kept_by_hand: list[str]
    deleted_by_hand: list[str]
    missing: list[str]
    pictures: list[str]
    notice: bool = False

    def remarks(self) -> list[str]:
        """Return in words what was left to a person, how to have that written anew, and what is missing."""
        lines = [f"kept as it was written by hand: {name}" for name in self.kept_by_hand]
        lines += [f"left out, as it was deleted by hand: {name}" for name in self.deleted_by_hand]
        if {*self.kept_by_hand, *self.deleted_by_hand} & SECTIONS.keys():
            lines.append(
                f"to have a section written anew, delete from {README} all of it, its marks, and its name in `<!-- downcycle-record`"
            )
        return lines + self.missing


@dataclass(frozen=True)
class _Existing:
    """A card that is there already: its metadata, its text without the record of the last run, and that record.

    is_trainers: the text is what a person may have written into a trainer's card.
    """

    front: FrontMatter
    body: str
    record: Record
    line_end: str = "\n"
    is_trainers: bool = False


def write_card(folder: Path, results: Results | None = None, *, name: str | None = None, source: Path = Path(RESULTS)) -> CardWritten:
    """Write or renew the card of a folder that holds a model or an adapter: README.md, its pictures, and a NOTICE where one is asked for.

    Args:
        name: under which it will be published, USER/NAME [default: the folder's name].
        source: where the results are from, for messages.
    Raises:
        DowncycleError: no model or adapter, a README.md that cannot be read, results of other weights, a name that the Hub does not take;
            nothing is changed then.
    """
    if name is not None:
        check_repo_name(name)
    path = folder / README
    before = _read_existing(_read_readme(path), path)
    name = name or folder.resolve().name
    if is_adapter(folder):
        if results is not None:
            raise DowncycleError(f"{folder}: an adapter, and results are of models; merge it, and write the card of the merged model")
        facts = gather_adapter(folder, name, before.front.data, ask=True)
    else:
        checkpoint = open_checkpoint(folder, trust_remote_code=True)
        facts = gather(checkpoint, name, folder, before.front.data, ask=True)
        if results is not None:
            facts = with_results(facts, results, find_model(results, content_digest(checkpoint), source))
    _write(facts, before, path)  # fails, if it must, before a picture is drawn
    try:
        pictures = draw_pictures(facts, folder)
        text, done = _write(_with_pictures(facts, folder), before, path)
        replace_file(path, _encode(text))
        hidden = [one for one in (PICTURES if before.record.sections else pictures) if one not in text]
        drop_pictures(folder, hidden)
        wanted = _renew_notice(facts, folder)
    except OSError as error:
        raise DowncycleError(f"{error.filename or folder}: {error.strerror}; the card cannot be written there") from error
    kept = [*done.kept, *done.own, *(["what was added to the trainer's card"] if before.is_trainers else [])]
    shown = [one for one in pictures if one not in hidden]
    return CardWritten(path, kept, list(done.gone), _missing(facts), shown, wanted)


def known_results(folder: Path) -> Results | None:
    """Return the comparison that says most of a folder's model as it is now; None for an adapter, or where it was never measured."""
    if is_adapter(folder):
        return None
    return best_results(content_digest(open_checkpoint(folder, trust_remote_code=True)))


def card_files(child: Checkpoint, target: str) -> dict[str, bytes]:
    """Return what is written beside a model that is about to be: README.md, and NOTICE where its licence asks for one.

    Asks nothing of the network but what is open already. Where no card can be made, there is none.

    Raises:
        DowncycleError: says why there can be no card.
    """
    facts = gather(child, folder_name(target), None, {})
    text, _ = _write(facts, _read_existing(""), check=False)
    wanted = notice_for(facts)
    return {README: _encode(text)} | ({NOTICE: wanted.encode()} if wanted else {})


def notice_for(facts: Facts) -> str | None:
    """Return the NOTICE that a model's licence asks for and that its folder lacks."""
    has = any(path.upper().startswith(NOTICE) for path in facts.files)
    return None if has else notice(facts.licence)


def _renew_notice(facts: Facts, folder: Path) -> bool:
    """Write the NOTICE that is asked for, and delete one written earlier that no licence asks for any more; whether one was written."""
    path = folder / NOTICE
    there = path.read_bytes().decode(errors="replace") if path.is_file() else ""
    if is_own_notice(there) and there not in [notice(licence.key) for licence in facts.licences]:
        path.unlink()
        facts = replace(facts, files=tuple(name for name in facts.files if name != NOTICE))
    wanted = notice_for(facts)
    if wanted:
        replace_file(path, _encode(wanted))
    return bool(wanted)


def _with_pictures(facts: Facts, folder: Path | None) -> Facts:
    return replace(facts, files=(*facts.files, *found_pictures(folder)))


def _read_readme(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig") if os.path.lexists(path) else ""
    except OSError as error:
        raise DowncycleError(f"{path}: {error.strerror}; the card there cannot be read") from error
    except UnicodeDecodeError as error:
        raise DowncycleError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8 and write the card again") from error


def _read_existing(text: str, path: Path = Path(README)) -> _Existing:
    line_end = "\r\n" if 2 * text.count("\r\n") > text.count("\n") else "\n"
    try:
        front = read_front_matter(text.replace("\r\n", "\n"))
        _check_index(front.data)
    except DowncycleError as error:
        raise DowncycleError(f"{path}: {error}") from error
    if not is_marked(front.body) and is_trainers(front.body):  # what a trainer wrote counts as written by the last run
        data, words = portable(front.data, front.body), persons_words(front.body, front.data)
        return _Existing(FrontMatter("", data, ""), words, Record((), written_by_trainer(data)), line_end, bool(words))
    body, record = take_record(front.body)
    return _Existing(front, body, record, line_end)


def _check_index(data: Mapping[str, Any]) -> None:
    """Refuse results that the Hub could not read either, before anything is built on them."""
    if data.get(INDEX):
        from huggingface_hub.repocard_data import model_index_to_eval_results

        try:
            model_index_to_eval_results(data[INDEX])
        except (KeyError, TypeError, AttributeError, ValueError, UnboundLocalError) as error:
            fault = f"{type(error).__name__}: {str(error)[:60]}"
            raise DowncycleError(f"its model-index is not as the Hub has it ({fault}); mend it, or take it out") from error


def _write(facts: Facts, before: _Existing, path: Path = Path(README), check: bool = True) -> tuple[str, Spliced]:
    """Return the whole card, and which of its sections are a person's."""
    texts = {name: scrub(text) if name != "recipe" else text for name, make in SECTIONS.items() if (text := make(facts))}
    ours = make_metadata(facts)
    known = before.record
    spliced = splice(before.body, texts, list(SECTIONS), known.sections)
    data = unite(known.metadata, before.front.data, ours)
    written = dict.fromkeys([*known.sections, *(name for name in SECTIONS if name in texts and name not in spliced.own)])
    record = Record(tuple(written), {**known.metadata, **remembered(ours)})
    yaml = write_front_matter(before.front, data)
    content = f"---\n{yaml}\n---\n\n{put_record(spliced.text.lstrip(chr(10)), record)}"
    if check:
        _validate(content, path)
    return content.replace("\n", before.line_end), spliced


def _validate(content: str, path: Path) -> None:
    """Let huggingface_hub read the card as the Hub would."""
    from huggingface_hub import ModelCard

    try:
        ModelCard(content)
    except Exception as error:  # whatever its parser raises
        raise DowncycleError(
            f"{path}: huggingface_hub cannot read its metadata ({' '.join(str(error).split())[:160]}); mend them"
        ) from error


def _encode(text: str) -> bytes:
    return text.encode(errors="backslashreplace")  # names of folders can be any bytes


def _missing(facts: Facts) -> list[str]:
    """Say what the card could not, and what would help."""
    lines = []
    known = known_licence(facts.licence)
    if facts.licence is None:
        lines.append("licence: not known; give `license:` in the metadata of README.md")
    if known and known.copy and not any(map(is_licence_text, facts.files)):
        wanted = f"LICENSE: the {known.title.partition(',')[0]} wants a copy of itself beside the model"
        lines.append(f"{wanted}: {known.link}" if known.link else wanted)
    if fault := name_fault(facts.licence, facts.name):
        lines.append(f"name: {fault}")
    doubtful = [("base_model", parent.doubtful) for parent in facts.parents if parent.doubtful and not base_models(facts.card)]
    doubtful += [("datasets", text.doubtful) for text in (facts.training.texts if facts.training else ()) if text.doubtful]
    said = facts.card.get("datasets") or []
    for key, named in (one for one in dict.fromkeys(doubtful) if one[1] not in said):
        lines.append(f"{key}: `{plain(named)}` may be a folder; if it is on the Hub, write it into README.md's metadata")
    if facts.is_healed and (facts.training is None or not facts.training.log):
        lines.append("training: its output folder is not where it was, or holds another adapter, so that losses are not known")
    if facts.is_healed and (facts.training is None or not facts.training.recipe):
        lines.append("recipe: the YAML that it was trained with was not found")
    if facts.results is None and facts.adapter is None:
        lines.append("evaluation: nothing was measured; run `downcycle eval PARENT DIR`")
    return lines
