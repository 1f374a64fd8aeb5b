"""The metadata of a model card, as the Hub understands them: licence, base model, tags, and results as a `model-index`.

Makes values from facts; reads and writes no file. The keys are those of huggingface_hub's ModelCardData, which a cut does not load, as
that takes longer than all else that a card does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..report.compare import score_rows, text_rows
from ..results import Score
from .facts import Facts
from .front_matter import INDEX
from .licences import known_licence
from .redact import is_path, name_of, scrub
from .ternary_text import is_converted
from .training_record import HUB_ID

RELATION = "finetune"  # of the Hub's four (adapter, merge, quantized, finetune) the one for other weights made from one parent's
LLAMA_TAGS = {"llama2": "llama-2", "llama4": "llama-4"} | dict.fromkeys(["llama3", "llama3.1", "llama3.2", "llama3.3"], "llama-3")


@dataclass(frozen=True)
class Benchmark:
    """How the Open LLM Leaderboard spelt a benchmark in the cards of models."""

    name: str
    dataset: str
    config: str | None
    split: str


LEADERBOARD = {
    "arc_challenge": Benchmark("AI2 Reasoning Challenge", "ai2_arc", "ARC-Challenge", "test"),
    "hellaswag": Benchmark("HellaSwag", "hellaswag", None, "validation"),
    "mmlu": Benchmark("MMLU", "cais/mmlu", "all", "test"),
    "truthfulqa_mc2": Benchmark("TruthfulQA", "truthful_qa", "multiple_choice", "validation"),
    "winogrande": Benchmark("Winogrande", "winogrande", "winogrande_xl", "validation"),
    "gsm8k": Benchmark("GSM8k", "gsm8k", "main", "test"),
}
METRICS = {"acc": "accuracy", "acc_norm": "normalized accuracy", "exact_match": "exact match", "mc2": "mc2"}


def make_metadata(facts: Facts) -> dict[str, Any]:
    """Return the metadata of a model's card; a key that nothing is known for is left out."""
    base = base_model(facts)
    data = {
        **_licence(facts),
        "base_model": base,
        "base_model_relation": ("adapter" if facts.adapter is not None else RELATION) if base else None,
        "library_name": "peft" if facts.adapter is not None else "transformers",
        "pipeline_tag": pipeline_tag(facts),
        "language": _languages(facts),
        "datasets": _datasets(facts),
        "tags": _tags(facts),
        INDEX: _model_index(facts),
    }
    return {key: value for key, value in data.items() if value}


def base_model(facts: Facts) -> str | None:
    """Return the nearest parent that is on the Hub, or what a nearest one's card says that it was made from.

    An adapter fits the very model that it was trained on, so that no other may stand in its place.
    """
    near = facts.parents[:1] if facts.adapter is not None else facts.parents
    for parent in near:
        if parent.hub_id:
            return parent.hub_id
    for parent in near if facts.adapter is None else ():
        named = parent.card.get("base_model")
        named = named[0] if isinstance(named, list) and len(named) == 1 else named
        if isinstance(named, str) and re.fullmatch(HUB_ID, named):
            return named
    return None


def pipeline_tag(facts: Facts) -> str | None:
    """Return the Hub's name of what a model does, by its architecture."""
    architectures = facts.config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    if facts.adapter is not None:
        return "text-generation" if facts.adapter.get("task_type") == "CAUSAL_LM" else None
    if str(first).endswith("ForCausalLM"):
        return "text-generation"
    return "image-text-to-text" if isinstance(facts.config.get("vision_config"), dict) else None


def _licence(facts: Facts) -> dict[str, str]:
    """Return `license`, and its name and link where the Hub does not know it."""
    if not facts.licence:
        return {}
    known = known_licence(facts.licence)
    if known and known.on_hub:
        return {"license": known.key}
    if known:
        return {"license": "other", "license_name": known.key, "license_link": known.link}
    for parent in facts.parents:
        card = parent.card
        if card.get("license") == "other" and card.get("license_name") == facts.licence:
            link = card.get("license_link")
            links = {"license_link": _whole_link(link, parent.hub_id, facts)} if isinstance(link, str) else {}
            return {"license": "other", "license_name": facts.licence} | {key: one for key, one in links.items() if one}
    if facts.card.get("license") == "other":
        return {key: facts.card[key] for key in ("license", "license_name", "license_link") if isinstance(facts.card.get(key), str)}
    return {"license": scrub(facts.licence)}


def _whole_link(link: str, hub_id: str | None, facts: Facts) -> str:
    """Return where a parent's licence is: an address, a file that this folder has too, or one in the parent's repo."""
    if re.match(r"https?://", link) or link in facts.files:
        return link
    return f"https://huggingface.co/{hub_id}/blob/main/{link}" if hub_id and not is_path(link) else ""


def _languages(facts: Facts) -> list[str]:
    """Return the languages that it was trained on last, or, where it was not or they are not known, those of its parents."""
    trained = [text.language for text in facts.training.texts] if facts.training else []
    if trained and all(trained):
        return list(dict.fromkeys(one for one in trained if one))
    for parent in facts.parents:
        named = parent.card.get("language")
        listed = named if isinstance(named, list) else [named]
        if found := [one for one in listed if isinstance(one, str)]:
            return found
    return []


def _datasets(facts: Facts) -> list[str]:
    """Return the Hub data sets that it was trained on, and those that these were taken from."""
    texts = facts.training.texts if facts.training else ()
    named = [name for text in texts if text.source for name in (text.name, text.source) if re.fullmatch(HUB_ID, name)]
    return list(dict.fromkeys(named))


def _tags(facts: Facts) -> list[str]:
    tags = []
    if facts.origin.steps:
        tags += ["downcycle"]
    if facts.is_cut or facts.adapter is not None and facts.origin.kept is not None:
        tags += ["depth-pruning"]
    if is_converted(facts):
        tags += ["bitnet"]
    known = known_licence(facts.licence)
    if known and known.key in LLAMA_TAGS:
        tags += ["llama", LLAMA_TAGS[known.key]]
    if facts.training:
        method = facts.training.config.get("adapter")
        tags += ["axolotl"] if facts.training.recipe else []
        tags += [method] if method in ("lora", "qlora") else []
    return tags


def _model_index(facts: Facts) -> list[dict[str, Any]]:
    """Return the results as the Hub's `model-index`: an entry for each data set and way of measuring, with all that was measured so.

    huggingface_hub's own `eval_results_to_model_index` puts different ways of measuring under the first one's name.
    """
    entries: list[dict[str, Any]] = []
    for dataset, metric in _measured(facts):
        same = next((one for one in entries if one["dataset"] == dataset), None)
        if same:
            same["metrics"].append(metric)
        else:
            task = {"type": "text-generation", "name": "Text Generation"}
            entries.append({"task": task, "dataset": dataset, "metrics": [metric]})
    return [{"name": facts.title, "results": entries}] if entries else []


def _measured(facts: Facts) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield what was measured of this model as data set and metric; scores of 0 to 1 in per cent, as the leaderboard gave them."""
    if not facts.results or not facts.measured:
        return
    place = facts.results.models.index(facts.measured)
    percents = {
        (row.title, row.metric, row.shots, row.limit): row.percent for row in score_rows(facts.results) if row.values[place] is not None
    }
    for score in facts.measured.scores:
        yield _score(score, percents[score.title, score.metric, score.shots, score.limit])
    for row in text_rows(facts.results):
        if one := row.models[place]:
            text, args = plain_name(one.text), {"window": one.length, "stride": one.stride, "tokens": one.tokens}
            for metric, value in (("perplexity", one.perplexity), ("bits_per_byte", one.bits_per_byte)):
                yield _dataset(text, text, args=args), _metric(metric, value, metric.replace("_", " "))


def _score(score: Score, percent: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    known = LEADERBOARD.get(score.task)
    shots = f" ({score.shots}-Shot)" if score.shots is not None else ""
    metric, _, kind = score.metric.partition(",")
    if score.task == "truthfulqa_mc2" and metric == "acc":
        metric = "mc2"
    args = {"num_few_shot": score.shots, "limit": score.limit}
    name = METRICS.get(metric, metric) + (f" ({kind})" if kind not in ("", "none") else "")
    dataset = _dataset(
        known.dataset if known else plain_name(score.task),
        (known.name if known else plain_name(score.title)) + shots,
        config=known.config if known else None,
        split=known.split if known else None,
        args={key: value for key, value in args.items() if value is not None} or None,
    )
    return dataset, _metric(metric, round(100 * score.value, 2) if percent else score.value, name)


def _dataset(kind: str, name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "type": kind} | {key: value for key, value in more.items() if value is not None}


def _metric(kind: str, value: float, name: str) -> dict[str, Any]:
    return {"type": kind, "value": float(f"{value:.6g}"), "name": name}


def plain_name(text: str) -> str:
    """Return a name of a text or task without the folders that it lies in."""
    return scrub(name_of(text) if is_path(text) else text)
