"""The metadata of a model card, as the Hub understands them: licence, base model, tags, and results as a `model-index`.

Makes values from facts; reads and writes no file. The keys are those of huggingface_hub's ModelCardData, which a cut does not load, as
that takes longer than all else that a card does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..report.compare import score_rows, text_rows
from ..results import Perplexity, Score
from .facts import Facts
from .front_matter import INDEX
from .licences import known_licence
from .parents import HUB_ID
from .redact import is_path, name_of, scrub

if TYPE_CHECKING:
    from huggingface_hub.repocard_data import EvalResult

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
    known = known_licence(facts.licence)
    if known and known.key in LLAMA_TAGS:
        tags += ["llama", LLAMA_TAGS[known.key]]
    if facts.training:
        method = facts.training.config.get("adapter")
        tags += ["axolotl"] if facts.training.recipe else []
        tags += [method] if method in ("lora", "qlora") else []
    return tags


def _model_index(facts: Facts) -> list[dict[str, Any]]:
    """Return the results as the Hub's `model-index`; only where there are any is huggingface_hub loaded."""
    if not facts.results or not facts.measured or not (facts.measured.scores or facts.measured.perplexity):
        return []
    from huggingface_hub.repocard_data import eval_results_to_model_index

    return eval_results_to_model_index(facts.title, list(_eval_results(facts)))


def _eval_results(facts: Facts) -> Iterator[EvalResult]:
    """Yield what was measured of this model; scores of 0 to 1 in per cent, as the leaderboard gave them."""
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
            yield from _perplexity(one)


def _score(score: Score, percent: bool) -> EvalResult:
    from huggingface_hub.repocard_data import EvalResult

    known = LEADERBOARD.get(score.task)
    shots = f" ({score.shots}-Shot)" if score.shots is not None else ""
    metric, _, kind = score.metric.partition(",")
    if score.task == "truthfulqa_mc2" and metric == "acc":
        metric = "mc2"
    args: dict[str, Any] = {} if score.shots is None else {"num_few_shot": score.shots}
    args |= {} if score.limit is None else {"limit": score.limit}
    name = METRICS.get(metric, metric) + (f" ({kind})" if kind not in ("", "none") else "")
    return EvalResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=known.dataset if known else plain_name(score.task),
        dataset_name=(known.name if known else plain_name(score.title)) + shots,
        dataset_config=known.config if known else None,
        dataset_split=known.split if known else None,
        dataset_args=args or None,
        metric_type=metric,
        metric_name=name,
        metric_value=round(100 * score.value, 2) if percent else float(f"{score.value:.6g}"),
    )


def _perplexity(one: Perplexity) -> Iterator[EvalResult]:
    from huggingface_hub.repocard_data import EvalResult

    text = plain_name(one.text)
    values = {"perplexity": one.perplexity, "bits_per_byte": one.bits_per_byte}
    for metric, value in values.items():
        yield EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=text,
            dataset_name=text,
            dataset_args={"window": one.length, "stride": one.stride, "tokens": one.tokens},
            metric_type=metric,
            metric_name=metric.replace("_", " "),
            metric_value=float(f"{value:.6g}"),
        )


def plain_name(text: str) -> str:
    """Return a name of a text or task without the folders that it lies in."""
    return scrub(name_of(text) if is_path(text) else text)
