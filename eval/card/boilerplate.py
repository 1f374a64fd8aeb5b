"""Tell what a trainer wrote into a model card from what a person did.

A card is a trainer's where every line is one that trainers write. Of one that holds more, only what names this machine, or says nothing,
is a trainer's; the rest may be a person's, and stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .front_matter import INDEX
from .redact import is_path, name_of
from .training_record import parse_recipe, recipe_in_card

COMMENT = "<!-- This model card has been generated automatically according to the information the Trainer"
ADAPTER_TAG = "base_model:adapter:"
TAGS = ("axolotl", "generated_from_trainer", "transformers", "lora", "dora")
VALUES = {"library_name": ("peft", "transformers"), "pipeline_tag": ("text-generation",)}  # that trainers write
_KEYS = (
    *("learning_rate", "train_batch_size", "eval_batch_size", "seed", "distributed_type", "num_devices", "gradient_accumulation_steps"),
    *("total_train_batch_size", "total_eval_batch_size", "optimizer", "lr_scheduler_type", "lr_scheduler_warmup_ratio"),
    *("lr_scheduler_warmup_steps", "training_steps", "num_epochs", "mixed_precision_training", "label_smoothing_factor"),
)
_RELEASES = r"- (PEFT|Transformers|Pytorch|Datasets|Tokenizers|Accelerate|TRL) \d[\w.+-]*"
_RESULTS = "### Training results"
_HEAD = [
    r"<!-- This model card has been generated automatically according to the information the Trainer had access to\. You",
    r"should probably proofread and complete it, then remove this comment\. -->",
    r"\[<img src=\"https://raw\.githubusercontent\.com/axolotl-ai-cloud/axolotl/[^\"]*\"[^>]*>\]\(https://github\.com/axolotl-ai-cloud/axolotl\)",
    r"This model (is a fine-tuned version of \[[^\]]*\]\([^)]*\)|was trained from scratch) on "
    r"(the .* datasets?|an unknown dataset)\.",
]
_EMPTY_SECTIONS = "Model description|Intended uses & limitations|Training and evaluation data"
_TRAINER = [
    r"It achieves the following results on the evaluation set:",
    rf"#{{2,3}} ({_EMPTY_SECTIONS}|Training procedure|Training hyperparameters|Training results|Framework versions)",
    r"More information needed",
    r"The following hyperparameters were used during training:",
    rf"- ({'|'.join(_KEYS)}): [^\n]*",
    r"- (Loss|Ppl|Perplexity|Model Preparation Time|Memory/[\w ()]+): (-?[\d.]+(e[+-]?\d+)?|nan|inf)",
    r"No additional optimizer arguments",
    _RELEASES,
]
_TEMPLATE = [
    r"# Model Card for Model ID",
    r"#{2,4} (Model Details|Model Description|Model Sources \[optional\]|Uses|Direct Use|Downstream Use \[optional\]|Out-of-Scope Use|"
    r"Bias, Risks, and Limitations|Recommendations|How to Get Started with the Model|Training Details|Training Data|Training Procedure|"
    r"Preprocessing \[optional\]|Training Hyperparameters|Speeds, Sizes, Times \[optional\]|Evaluation|Testing Data, Factors & Metrics|"
    r"Testing Data|Factors|Metrics|Results|Summary|Model Examination \[optional\]|Environmental Impact|"
    r"Technical Specifications \[optional\]|Model Architecture and Objective|Compute Infrastructure|Hardware|Software|"
    r"Citation \[optional\]|Glossary \[optional\]|"
    r"More Information \[optional\]|Model Card Authors \[optional\]|Model Card Contact|"
    r"Framework versions)",
    r"<!-- (Provide|Address|This section|This relates|This should|Relevant|Total emissions|If (there|relevant))[^\n]*-->",
    r"(- )?(\*\*[^*]+:?\*\*:? ?)?\[More Information Needed\]( <!--.*-->)?",
    r"\*\*(BibTeX|APA):\*\*",
    r"Use the code below to get started with the model\.",
    r"Users \(both direct and downstream\) should be made aware of the risks, biases and limitations of the model\. "
    r"More information needed for further recommendations\.",
    r"Carbon emissions can be estimated using the \[Machine Learning Impact calculator\]\([^)]*\) presented in \[[^\]]*\]\([^)]*\)\.",
    _RELEASES,
]
_FOLDED = re.compile(
    r"^<details><summary>See axolotl config</summary>\n\naxolotl version: `[^`\n]*`\n```yaml\n.*?\n```\n\n</details><br>\n",
    re.DOTALL | re.MULTILINE,
)
_EMPTY = re.compile(rf"^## (?:{_EMPTY_SECTIONS})\n\nMore information needed\n+(?=#|\Z)", re.MULTILINE)


def is_trainers(body: str) -> bool:
    """Whether a trainer began a card's text, whatever a person has added since."""
    return COMMENT in body or body.lstrip().startswith("# Model Card for Model ID")


def persons_words(body: str, data: Mapping[str, Any]) -> str:
    """Return of a card that a trainer began what a person may have written: nothing, where all lines are the trainer's.

    Args:
        data: the card's metadata, which hold the title that the trainer gave it.
    """
    if COMMENT not in body:
        return "" if all(map(_any_of(_TEMPLATE), _lines(body))) else body
    rest = _FOLDED.sub("", body, count=1)
    head = _any_of([*_HEAD, *(rf"# {re.escape(name)}" for name in _index_names(data))])
    before, heading, results = rest.partition(f"\n{_RESULTS}\n")
    table, below, last = results.partition("\n### ")
    lines = [*_lines(before), *_lines(below + last)]
    row = _any_of([r"\|.*\|", "No log"])
    if all(head(line) or _any_of(_TRAINER)(line) for line in lines) and all(map(row, _lines(table))):
        return ""
    top, mark, sections = before.partition("\n## ")
    kept = "\n".join(line for line in top.split("\n") if not head(line.strip()))
    return _EMPTY.sub("", "".join([re.sub(r"\n{3,}", "\n\n", kept), mark, sections, heading, results])).lstrip("\n")


def portable(data: Mapping[str, Any], body: str) -> dict[str, Any]:
    """Return the metadata of a card that a trainer began without what is only the trainer's: its tags, and names of this machine.

    What it was made from and trained on is taken out where it is what the recipe says, as that may be a folder.
    """
    recipe = parse_recipe(recipe_in_card(body))
    tags = [one for one in _listed(data.get("tags")) if isinstance(one, str)]
    named = [recipe.get("base_model"), *(tag.removeprefix(ADAPTER_TAG) for tag in tags if tag.startswith(ADAPTER_TAG))]
    texts = recipe.get("datasets")
    named += [one.get("path") for one in (texts if isinstance(texts, list) else []) if isinstance(one, dict)]
    kept = dict(data)
    for key in ("base_model", "datasets", "tags"):
        if key in kept:
            taken = [*TAGS, *(tag for tag in tags if tag.startswith(ADAPTER_TAG))] if key == "tags" else named
            left = [one for one in _listed(kept.pop(key)) if one not in taken and not (isinstance(one, str) and is_path(one))]
            kept |= {key: left if isinstance(data[key], list) else left[0]} if left else {}
    measured = [one for one in _listed(kept.pop(INDEX, None)) if isinstance(one, dict) and one.get("results")]
    return kept | ({INDEX: [{**one, "name": name_of(str(one.get("name", "")))} for one in measured]} if measured else {})


def written_by_trainer(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata that are as a trainer writes them, so that what is known better may take their place."""
    return {key: value for key, value in data.items() if value in VALUES.get(key, ())}


def _index_names(data: Mapping[str, Any]) -> list[str]:
    return [str(one["name"]) for one in _listed(data.get(INDEX)) if isinstance(one, dict) and one.get("name")]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _lines(text: str) -> Iterable[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _any_of(patterns: Iterable[str]) -> Any:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns)).fullmatch
