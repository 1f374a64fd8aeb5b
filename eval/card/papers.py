"""The papers behind what was done to a model, as BibTeX. Names none that was not used."""

from __future__ import annotations

from .facts import Facts


def _arxiv(key: str, title: str, authors: str, number: str) -> str:
    return (
        f"@misc{{{key},\n  title = {{{title}}},\n  author = {{{authors}}},\n  year = {{20{number[:2]}}},\n"
        f"  eprint = {{{number}}},\n  archivePrefix = {{arXiv}}\n}}"
    )


INHERITUNE = _arxiv(
    "sanyal2024pretraining",
    "Pre-training Small Base LMs with Fewer Tokens",
    "Sunny Sanyal and Sujay Sanghavi and Alexandros G. Dimakis",
    "2404.08634",
)
SOLAR = _arxiv(
    "kim2023solar",
    "SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective Depth Up-Scaling",
    "Dahyun Kim and others",
    "2312.15166",
)
QLORA = _arxiv(
    "dettmers2023qlora",
    "QLoRA: Efficient Finetuning of Quantized LLMs",
    "Tim Dettmers and Artidoro Pagnoni and Ari Holtzman and Luke Zettlemoyer",
    "2305.14314",
)
LORA = _arxiv("hu2021lora", "LoRA: Low-Rank Adaptation of Large Language Models", "Edward J. Hu and others", "2106.09685")
RSLORA = _arxiv(
    "kalajdzievski2023rslora", "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", "Damjan Kalajdzievski", "2312.03732"
)


def software(release: str) -> str:
    """Cite this package."""
    return f"@software{{downcycle,\n  title = {{downcycle: Make small language models out of large ones}},\n  version = {{{release}}}\n}}"


def papers(facts: Facts) -> list[str]:
    """Return the papers of the rule that chose the layers, and of the method that healed them."""
    cited = []
    cuts = [step for step in facts.origin.steps if step.layers]
    if any(step.rule == "first" for step in cuts):
        cited.append(INHERITUNE)
    if any(len(set(step.layers)) < len(step.layers) for step in cuts):
        cited.append(SOLAR)
    config = facts.training.config if facts.training else {}
    cited += {"qlora": [QLORA], "lora": [LORA]}.get(str(config.get("adapter")), [])
    if config.get("peft_use_rslora") is True:
        cited.append(RSLORA)
    return cited
