"""Tell what a trainer wrote into a model card from what a person did.

A card is a trainer's where every line is one that trainers write. Of one that holds more, only what names this machine, or says nothing,
is a trainer's; the rest may be a person's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .redact import is_path

COMMENT = "<!-- This model card has been generated automatically according to the information the Trainer"
MACHINE = ("library_name", "base_model", "datasets", "tags", "pipeline_tag", "model-index")  # metadata that trainers write
_TRAINER = [
    r"<!-- This model card has been generated automatically according to the information the Trainer had access to\. You",
    r"should probably proofread and complete it, then remove this comment\. -->",
    r"\[<img src=\"https://raw\.githubusercontent\.com/axolotl-ai-cloud/axolotl/[^\"]*\"[^>]*>\]\(https://github\.com/axolotl-ai-cloud/axolotl\)",
    r"# [^\n]*",
    r"This model (is a fine-tuned version of \[[^\]]*\]\([^)]*\)|was trained from scratch) on (the .* datasets?|an unknown dataset)\.",
    r"It achieves the following results on the evaluation set:",
    r"#{2,3} (Model description|Intended uses & limitations|Training and evaluation data|Training procedure|Training hyperparameters|"
    r"Training results|Framework versions)",
    r"More information needed",
    r"The following hyperparameters were used during training:",
    r"- [\w/() .-]+: [^\n]*",
    r"\|.*\|",
    r"- (PEFT|Transformers|Pytorch|Datasets|Tokenizers|Accelerate|TRL) [\w.+-]+",
]
_TEMPLATE = [
    r"#{1,4} [^\n]*",
    r"<!--.*-->",
    r"(- )?(\*\*[^*]+:?\*\*:? ?)?\[More Information Needed\]( <!--.*-->)?",
    r"\*\*(BibTeX|APA):\*\*",
    r"Use the code below to get started with the model\.",
    r"Users \(both direct and downstream\) should be made aware of the risks, biases and limitations of the model\. "
    r"More information needed for further recommendations\.",
    r"Carbon emissions can be estimated using the \[Machine Learning Impact calculator\]\([^)]*\) presented in \[[^\]]*\]\([^)]*\)\.",
    r"- PEFT [\w.+-]+",
]
_FOLDED = re.compile(
    r"<details><summary>See axolotl config</summary>\n\naxolotl version: `[^`\n]*`\n```yaml\n.*?\n```\n\n</details><br>\n", re.DOTALL
)


_HEAD = re.compile(
    r"\A\s*<!-- This model card has been generated automatically.*?-->\n(?:\s*\[<img src=\"[^\n]*\n)?(?:\s*<details>.*?</details><br>\n)?"
    r"(?:\s*# [^\n]*\n)?(?:\s*This model (?:is a fine-tuned version of|was trained from scratch on) [^\n]*\n)?",
    re.DOTALL,
)
_EMPTY = re.compile(
    r"^## (?:Model description|Intended uses & limitations|Training and evaluation data)\n\nMore information needed\n+", re.MULTILINE
)


def is_trainers(body: str) -> bool:
    """Whether a trainer began a card's text, whatever a person has added since."""
    return COMMENT in body or body.lstrip().startswith("# Model Card for Model ID")


def persons_words(body: str) -> str:
    """Return of a card that a trainer began what a person may have written: nothing, where all lines are the trainer's."""
    if COMMENT in body:
        return "" if _all_lines(_FOLDED.sub("", body), _TRAINER) else _EMPTY.sub("", _HEAD.sub("", body)).lstrip("\n")
    return "" if _all_lines(body, _TEMPLATE) else body


def portable(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a trainer's metadata without the names of this machine's folders."""
    kept = {key: value for key, value in data.items() if key not in MACHINE}
    for key in (key for key in MACHINE if key in data and key != "model-index"):
        values = data[key] if isinstance(data[key], list) else [data[key]]
        left = [one for one in values if not (isinstance(one, str) and is_path(one.removeprefix("base_model:adapter:")))]
        if left:
            kept[key] = left if isinstance(data[key], list) else left[0]
    return kept


def _all_lines(text: str, patterns: list[str]) -> bool:
    line = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
    return all(line.fullmatch(one.strip()) for one in text.splitlines() if one.strip())
