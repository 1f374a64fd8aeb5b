"""The papers behind what was done to a model, as BibTeX. Names none that was not used."""

from __future__ import annotations

from .facts import Facts
from .ternary_text import is_converted


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
OF_RULES = {
    "first": INHERITUNE,
    "bi": _arxiv(
        "men2024shortgpt",
        "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
        "Xin Men and others",
        "2403.03853",
    ),
    "angular": _arxiv(
        "gromov2024unreasonable", "The Unreasonable Ineffectiveness of the Deeper Layers", "Andrey Gromov and others", "2403.17887"
    ),
    "ppl": _arxiv(
        "song2024sleb",
        "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer Blocks",
        "Jiwon Song and others",
        "2402.09025",
    ),
    "taylor": _arxiv(
        "kim2024shortened",
        "Shortened LLaMA: Depth Pruning for Large Language Models with Comparison of Retraining Methods",
        "Bo-Kyeong Kim and others",
        "2402.02834",
    ),
}
OF_METHODS = {
    "scale": _arxiv(
        "chen2025prunecomp",
        "Prune&Comp: Free Lunch for Layer-Pruned LLMs via Iterative Pruning with Magnitude Compensation",
        "Chen and others",
        "2507.18212",
    ),
    "refit": _arxiv(
        "shopkhoev2025replaceme",
        "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization",
        "Dmitriy Shopkhoev and others",
        "2505.02819",
    ),
}
RSLORA = _arxiv(
    "kalajdzievski2023rslora", "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", "Damjan Kalajdzievski", "2312.03732"
)

BITNET = _arxiv("ma2024bitnet", "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits", "Shuming Ma and others", "2402.17764")


def software(release: str) -> str:
    """Cite this package."""
    return f"@software{{downcycle,\n  title = {{downcycle: Make small language models out of large ones}},\n  version = {{{release}}}\n}}"


def papers(facts: Facts) -> list[str]:
    """Return the papers of the rules that chose the layers, of what made up for the dropped ones, and of the method that healed them."""
    cuts = [step for step in facts.origin.steps if step.layers]
    named = [OF_RULES.get(step.rule) for step in cuts] + [OF_METHODS.get(str(step.compensation.get("method"))) for step in cuts]
    cited = list(dict.fromkeys(filter(None, named)))
    if any(len(set(step.layers)) < len(step.layers) for step in cuts):
        cited.append(SOLAR)
    config = facts.training.config if facts.training else {}
    cited += {"qlora": [QLORA], "lora": [LORA]}.get(str(config.get("adapter")), [])
    if config.get("peft_use_rslora") is True:
        cited.append(RSLORA)
    if is_converted(facts):
        cited.append(BITNET)
    return cited
